//! The actions and their options, from the kernel's command line or a program's arguments.

use std::collections::BTreeMap;
use std::str::FromStr;

/// A value that is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the option {name}={value} is not {wanted}")]
pub struct Mistake {
    name: String,
    value: String,
    wanted: &'static str,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    actions: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Options {
    /// `lathe.test=ACTION,...` and `lathe.NAME=VALUE` among other words.
    pub fn of_command_line(line: &str) -> Result<Self, String> {
        let mut values: BTreeMap<String, String> = line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("lathe."))
            .filter_map(|word| word.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let actions =
            values.remove("test").ok_or("the kernel's command line has no lathe.test=ACTION,...")?;
        Ok(Self { actions: split(&actions), values })
    }

    /// `ACTION,... NAME=VALUE...`
    pub fn of_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let actions = arguments.next().ok_or("usage: device-test ACTION,... [NAME=VALUE]...")?;
        let values = arguments
            .map(|word| match word.split_once('=') {
                Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
                None => Err(format!("{word:?} is not NAME=VALUE")),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { actions: split(&actions), values })
    }

    /// In the order they are to be done.
    pub fn actions(&self) -> impl Iterator<Item = &str> {
        self.actions.iter().map(String::as_str)
    }

    /// An option's text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// An option that is a number.
    pub fn number<N: FromStr>(&self, name: &str) -> Result<Option<N>, Mistake> {
        let parse = |value: &str| {
            let mistake = |_| Mistake { name: name.into(), value: value.into(), wanted: "a number" };
            value.parse().map_err(mistake)
        };
        self.text(name).map(parse).transpose()
    }
}

fn split(actions: &str) -> Vec<String> {
    actions.split(',').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        let line = "console=ttyS0 quiet lathe.test=tree,nvme lathe.mib=4 panic=-1";
        let options = Options::of_command_line(line).unwrap();
        let words = ["tree,nvme", "mib=4"].map(String::from);
        assert_eq!(Options::of_arguments(words.into_iter()).unwrap(), options);
        assert_eq!(options.actions().collect::<Vec<_>>(), ["tree", "nvme"]);
        assert_eq!(options.number("mib"), Ok(Some(4_u64)));
        assert_eq!(options.number::<u64>("seed"), Ok(None));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(Options::of_command_line("quiet").unwrap_err().contains("lathe.test"));
        assert!(Options::of_arguments(["tree", "mib"].map(String::from).into_iter()).is_err());
        let options = Options::of_command_line("lathe.test=nvme lathe.mib=x").unwrap();
        let mistake = options.number::<u64>("mib").unwrap_err();
        assert_eq!(mistake.to_string(), "the option mib=x is not a number");
    }
}
