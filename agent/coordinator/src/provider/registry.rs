//! Which programs there are: the operator's who starts the coordinator, and nobody else's to say.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::check::check_name;

/// Programs by the names that pools use for them.
pub type Programs = BTreeMap<String, PathBuf>;

/// `NAME=PATH`, as the command line takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// What pools call it.
    pub name: String,
    /// Where it is: an absolute path.
    pub path: PathBuf,
}

impl FromStr for Program {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?}: write NAME=PATH, as cloud=/usr/local/bin/cloud-nodes"))?;
        check_name(name)?;
        let path = PathBuf::from(path);
        check(&path)?;
        Ok(Self { name: name.to_owned(), path })
    }
}

/// A program that anybody may change is anybody's program.
fn check(path: &Path) -> Result<(), String> {
    let shown = path.display();
    if !path.is_absolute() {
        return Err(format!("{shown:?}: write an absolute path"));
    }
    let metadata = path.metadata().map_err(|error| format!("{shown}: {error}"))?;
    let mode = metadata.permissions().mode();
    if !metadata.is_file() || mode & 0o111 == 0 {
        return Err(format!("{shown} is not a program: make it an executable file (chmod +x)"));
    }
    if mode & 0o002 != 0 {
        return Err(format!("{shown} can be changed by everybody: chmod o-w it first"));
    }
    Ok(())
}

/// All of a command line.
///
/// # Errors
/// When two have one name.
pub fn programs(given: Vec<Program>) -> Result<Programs, String> {
    let mut programs = Programs::new();
    for Program { name, path } in given {
        if programs.insert(name.clone(), path).is_some() {
            return Err(format!("--provider {name}: there are two of that name"));
        }
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_of_the_operators_are_taken() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = |name: &str, mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
            path.display().to_string()
        };
        let (good, plain, open) = (file("good", 0o755), file("plain", 0o644), file("open", 0o757));
        let program = format!("cloud={good}").parse::<Program>().expect("a program");
        assert_eq!(program, Program { name: "cloud".to_owned(), path: good.clone().into() });
        for (text, words) in [
            (good.clone(), "write NAME=PATH"),
            (format!("Cloud={good}"), "1 to 63 characters"),
            ("cloud=bin/x".to_owned(), "absolute"),
            ("cloud=/nowhere/x".to_owned(), "/nowhere/x: No such file"),
            (format!("cloud={plain}"), "chmod +x"),
            (format!("cloud={open}"), "chmod o-w"),
            (format!("cloud={}", dir.path().display()), "not a program"),
        ] {
            let error = text.parse::<Program>().expect_err(&text);
            assert!(error.contains(words) && !error.contains('\n'), "{text}: {error}");
        }
        assert!(programs(vec![program.clone(), program]).expect_err("twice").contains("two of that name"));
    }
}
