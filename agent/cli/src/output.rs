//! Tables for people, JSON for programs.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Table,
    /// One JSON document on stdout.
    Json,
}

/// Prints `value` as one JSON document.
///
/// # Errors
/// When stdout is closed.
pub fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, value)?;
    writeln!(stdout)?;
    Ok(())
}

/// A borderless table with these headings.
pub fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// `ms` milliseconds for people: `850 ms`, `12.3 s`, `4 min 10 s`.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        120_000..7_200_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1_000),
        _ => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// How long ago `then_ms` (since the Unix epoch) was.
pub fn age(then_ms: u64) -> String {
    duration(now_ms().saturating_sub(then_ms))
}

/// How far away `then_ms` (since the Unix epoch) is.
pub fn until(then_ms: u64) -> String {
    match then_ms.saturating_sub(now_ms()) {
        0 => "expired".to_owned(),
        left => format!("in {}", duration(left)),
    }
}

/// When `then_ms` (since the Unix epoch) is, from now: `in 4 min 10 s`.
pub fn ahead(then_ms: u64) -> String {
    ahead_of(then_ms, now_ms())
}

/// When `then_ms` is, seen from `now_ms`.
pub fn ahead_of(then_ms: u64, now_ms: u64) -> String {
    match then_ms.saturating_sub(now_ms) {
        0 => "any moment".to_owned(),
        left => format!("in {}", duration(left)),
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let pairs = [(0, "0 ms"), (999, "999 ms"), (12_345, "12.3 s"), (250_000, "4 min 10 s")];
        for (ms, text) in pairs {
            assert_eq!(duration(ms), text);
        }
        assert_eq!(duration(7_260_000), "2 h 1 min");
    }
}
