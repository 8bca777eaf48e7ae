//! Lengths of time, as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// A length of time in whole seconds, written with units: `"45s"`, `"90m"`, `"2h"`, `"1d12h"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(value_type = String, example = "1h30m")]
pub struct TimeSpan(u64);

impl TimeSpan {
    /// So many seconds; beyond what milliseconds can count, the most they can.
    pub const fn from_seconds(seconds: u64) -> Self {
        const MOST: u64 = u64::MAX / 1000;
        Self(if seconds > MOST { MOST } else { seconds })
    }

    /// Its length in seconds.
    pub const fn seconds(self) -> u64 {
        self.0
    }

    /// Its length in milliseconds.
    pub const fn milliseconds(self) -> u64 {
        self.0 * 1000
    }
}

/// A length of time that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a length of time: write whole numbers with the units d, h, m and s, as in \"1h30m\", at \
     most 10000d"
)]
pub struct ParseTimeSpanError(String);

/// Units in the order they are written in.
const UNITS: [(char, u64); 4] = [('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];
/// 27 years: nobody means more, and sums with times since the epoch stay far from overflow.
const MOST_SECONDS: u64 = 10_000 * 86_400;

impl FromStr for TimeSpan {
    type Err = ParseTimeSpanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What is shown of a wrong text is bounded: it travels in errors.
        let error = || ParseTimeSpanError(text.chars().take(40).collect());
        let mut seconds: u64 = 0;
        let mut rest = text.trim();
        let mut units = UNITS.iter();
        if rest.is_empty() {
            return Err(error());
        }
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let count: u64 = rest[..digits].parse().map_err(|_| error())?;
            let unit = rest[digits..].chars().next().ok_or_else(error)?;
            let (_, each) = units.find(|(name, _)| *name == unit).ok_or_else(error)?;
            seconds =
                count.checked_mul(*each).and_then(|more| seconds.checked_add(more)).ok_or_else(error)?;
            rest = rest[digits + unit.len_utf8()..].trim_start();
        }
        if seconds > MOST_SECONDS {
            return Err(error());
        }
        Ok(Self(seconds))
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        for (unit, each) in UNITS {
            if rest >= each {
                write!(f, "{}{unit}", rest / each)?;
                rest %= each;
            }
        }
        Ok(())
    }
}

impl Serialize for TimeSpan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn people_write_lengths_of_time_with_units() {
        for (text, seconds) in
            [("0s", 0), ("90m", 5400), ("2h", 7200), ("1d12h", 129_600), (" 1h 30m ", 5400), ("1d1s", 86_401)]
        {
            assert_eq!(text.parse::<TimeSpan>().unwrap().seconds(), seconds, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_length_of_time_is_said_to_be_none() {
        for text in
            ["", "90", "h", "-1h", "1.5h", "1m1h", "1h1h", "1w", "10001d", "99999999999999999999s", "1é"]
        {
            let error = text.parse::<TimeSpan>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("1h30m"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(seconds in 0..=MOST_SECONDS) {
            let span = TimeSpan::from_seconds(seconds);
            prop_assert_eq!(span.to_string().parse::<TimeSpan>(), Ok(span));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,24}") {
            let _ = text.parse::<TimeSpan>();
        }
    }
}
