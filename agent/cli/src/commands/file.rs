//! Files that people write: jobs, pools, tenants; TOML, or JSON where the name ends in `.json`.

use std::path::Path;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

/// Reads a file.
///
/// # Errors
/// One line that names the file, the line and the field.
pub fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parsed = if path.extension().is_some_and(|extension| extension == "json") {
        let mut json = serde_json::Deserializer::from_str(&text);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| error.to_string());
        value.and_then(|value| json.end().map(|()| value).map_err(|error| error.to_string()))
    } else {
        parse_toml(&text)
    };
    match parsed {
        Ok(value) => Ok(value),
        Err(reason) => bail!("{}: {reason}", path.display()),
    }
}

/// A mistake is named by its line, and by its field where there is one.
fn parse_toml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let say = |field: &str, error: &toml::de::Error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text[..start].matches('\n').count() + 1;
        format!("line {line}: {field}{}", error.message().replace('\n', " "))
    };
    let document = toml::Deserializer::parse(text).map_err(|error| say("", &error))?;
    serde_path_to_error::deserialize(document).map_err(|error| {
        let field = match error.path().to_string().as_str() {
            "." => String::new(),
            path => format!("{path}: "),
        };
        say(&field, error.inner())
    })
}
