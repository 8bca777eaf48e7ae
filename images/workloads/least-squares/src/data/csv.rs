//! CSV as RFC 4180 has it, with three limits that let every rank start anywhere in the file:
//! a record is one line (a line break inside quotes is refused), the separator is a comma, and a
//! line has at most [`MAX_LINE`] bytes.
//!
//! A line belongs to the rank in whose byte range its first byte lies. Lines without a quote, all
//! of them in most numeric files, are split here; those with quotes go through the `csv` crate.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::{Block, BlockSource, DataError, Dataset, Part, shortened};

/// Longest line in bytes: a file without line breaks must not fill the memory.
const MAX_LINE: usize = 1 << 20;

/// Read size: a virtual disk answers few large requests faster than many small ones.
const BUFFER: usize = 256 << 10;

/// The column names, and the offset at which the rows begin.
pub(super) fn header(path: &Path) -> Result<(Vec<String>, u64), DataError> {
    let mut lines = Lines::open(path, 0)?;
    while lines.next()? {
        let line = lines.content();
        let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let line = line.to_vec();
        let names: Vec<String> = quoted_fields(&lines, &line)?
            .iter()
            .map(|field| String::from_utf8_lossy(field.trim_ascii()).into_owned())
            .collect();
        if let Some(index) = names.iter().position(String::is_empty) {
            return Err(lines.error(format!("column {} of the header has no name", index + 1)));
        }
        if let [only] = names.as_slice()
            && only.contains([';', '\t'])
        {
            return Err(lines.error("the header has one column; separate columns by commas".to_owned()));
        }
        return Ok((names, lines.offset));
    }
    Err(DataError::file(path, "empty; the first line must name the columns"))
}

/// The lines of a file, with the offset of each.
struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: Vec<u8>,
    /// Offset of the first byte of `line`.
    line_at: u64,
    /// Offset of the byte after `line`.
    offset: u64,
}

impl Lines {
    fn open(path: &Path, offset: u64) -> Result<Self, DataError> {
        let mut file = File::open(path).map_err(|e| DataError::io(path, e))?;
        file.seek(SeekFrom::Start(offset)).map_err(|e| DataError::io(path, e))?;
        let reader = BufReader::with_capacity(BUFFER, file);
        Ok(Self { path: path.to_owned(), reader, line: Vec::new(), line_at: offset, offset })
    }

    /// Reads the next line; false at the end of the file.
    fn next(&mut self) -> Result<bool, DataError> {
        self.line.clear();
        self.line_at = self.offset;
        let mut limited = (&mut self.reader).take(MAX_LINE as u64 + 1);
        let read = limited.read_until(b'\n', &mut self.line).map_err(|e| DataError::io(&self.path, e))?;
        self.offset += read as u64;
        if read > MAX_LINE {
            return Err(self.error(format!("longer than {MAX_LINE} bytes")));
        }
        Ok(read > 0)
    }

    /// The line without its end, be it LF or CRLF.
    fn content(&self) -> &[u8] {
        let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        line.strip_suffix(b"\r").unwrap_or(line)
    }

    /// An error at the current line. Ranks do not know how many lines precede their share, and
    /// need not: they are counted when there is something to complain about.
    fn error(&self, problem: String) -> DataError {
        match count_line_breaks(&self.path, self.line_at) {
            Ok(before) => DataError::Row {
                path: self.path.display().to_string(),
                unit: "line",
                number: before + 1,
                problem,
            },
            Err(source) => DataError::io(&self.path, source),
        }
    }
}

fn count_line_breaks(path: &Path, end: u64) -> std::io::Result<u64> {
    let mut reader = BufReader::with_capacity(BUFFER, File::open(path)?).take(end);
    let mut count = 0;
    loop {
        let chunk = reader.fill_buf()?;
        if chunk.is_empty() {
            return Ok(count);
        }
        count += chunk.iter().filter(|b| **b == b'\n').count() as u64;
        let used = chunk.len();
        reader.consume(used);
    }
}

/// Splits a line that may have quotes.
fn quoted_fields(lines: &Lines, line: &[u8]) -> Result<csv::ByteRecord, DataError> {
    if line.iter().filter(|b| **b == b'"').count() % 2 != 0 {
        let problem = "a quoted field does not end on its line; line breaks inside quotes are not supported";
        return Err(lines.error(problem.to_owned()));
    }
    let mut record = csv::ByteRecord::new();
    csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(line)
        .read_byte_record(&mut record)
        .map_err(|e| lines.error(e.to_string()))?;
    Ok(record)
}

/// The rows of one rank.
pub(super) struct CsvSource {
    lines: Lines,
    /// Lines that begin at or after this offset are another rank's.
    end: u64,
    names: Vec<String>,
    /// For each column of the file, its place in a block.
    slots: Vec<Option<usize>>,
}

impl CsvSource {
    pub(super) fn open(dataset: &Dataset, part: Part) -> Result<Self, DataError> {
        let (first, end) = part.range(dataset.bytes.saturating_sub(dataset.rows_at));
        let (first, end) = (dataset.rows_at + first, dataset.rows_at + end);
        // From one byte before the range: when that byte ends a line, the first line is ours.
        let mut lines = Lines::open(&dataset.path, first.saturating_sub(1))?;
        if first > 0 {
            skip_line(&mut lines)?;
        }
        let mut slots = vec![None; dataset.width];
        for (slot, index) in dataset.indexes.iter().enumerate() {
            slots[*index] = Some(slot);
        }
        let names = dataset.features.iter().chain([&dataset.response]).cloned().collect();
        Ok(Self { lines, end, names, slots })
    }

    /// Parses the current line into the block's next row.
    fn parse(&self, block: &mut Block) -> Result<(), DataError> {
        let content = self.lines.content();
        let fields = if content.contains(&b'"') {
            let record = quoted_fields(&self.lines, content)?;
            self.parse_fields(record.iter(), block)?
        } else {
            self.parse_fields(content.split(|b| *b == b','), block)?
        };
        if fields != self.slots.len() {
            let problem = format!("{fields} fields, but the header names {}", self.slots.len());
            return Err(self.lines.error(problem));
        }
        block.commit_row();
        Ok(())
    }

    /// Returns the number of fields.
    fn parse_fields<'a>(
        &self,
        fields: impl Iterator<Item = &'a [u8]>,
        block: &mut Block,
    ) -> Result<usize, DataError> {
        let mut count = 0;
        for field in fields {
            if let Some(Some(slot)) = self.slots.get(count) {
                *block.next_row_slot(*slot) = match number(field) {
                    Some(value) => value,
                    None => return Err(self.field_error(*slot, field)),
                };
            }
            count += 1;
        }
        Ok(count)
    }

    fn field_error(&self, slot: usize, field: &[u8]) -> DataError {
        let name = &self.names[slot];
        let text = String::from_utf8_lossy(field);
        self.lines.error(match text.trim() {
            "" => format!("column {name}: no value"),
            text => format!("column {name}: {:?} is not a finite number", shortened(text, 40)),
        })
    }
}

impl BlockSource for CsvSource {
    fn fill(&mut self, block: &mut Block) -> Result<(), DataError> {
        block.clear();
        while !block.is_full() && self.lines.offset < self.end && self.lines.next()? {
            if !self.lines.content().is_empty() {
                self.parse(block)?;
            }
        }
        Ok(())
    }
}

/// Skips to the start of the next line, without a limit on what is skipped: the rank that owns
/// the line complains about its length.
fn skip_line(lines: &mut Lines) -> Result<(), DataError> {
    let skipped = lines.reader.skip_until(b'\n').map_err(|e| DataError::io(&lines.path, e))?;
    lines.offset += skipped as u64;
    Ok(())
}

fn number(field: &[u8]) -> Option<f64> {
    if let Some(value) = short_decimal(field) {
        return Some(value);
    }
    let value: f64 = std::str::from_utf8(field).ok()?.trim_ascii().parse().ok()?;
    value.is_finite().then_some(value)
}

/// Decimals of up to 15 digits without an exponent, in a quarter of the instructions of the
/// general parser. Exact: digits and power of ten are both doubles without rounding, so their
/// quotient is rounded once (Clinger, "How to read floating point numbers accurately", 1990).
fn short_decimal(field: &[u8]) -> Option<f64> {
    const POWERS: [f64; 16] =
        [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15];
    let (negative, text) = match field {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, field),
    };
    // 15 digits and a point.
    if text.len() > 16 {
        return None;
    }
    let (mut digits, mut point, mut value) = (0, None, 0u64);
    for byte in text {
        let digit = byte.wrapping_sub(b'0');
        if digit < 10 {
            value = value * 10 + u64::from(digit);
            digits += 1;
        } else if *byte == b'.' && point.is_none() {
            point = Some(digits);
        } else {
            return None;
        }
    }
    if digits == 0 || digits > 15 {
        return None;
    }
    let magnitude = value as f64 / POWERS[digits - point.unwrap_or(digits)];
    Some(if negative { -magnitude } else { magnitude })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_are_those_of_the_standard_library(text in "-?[0-9]{0,17}\\.?[0-9]{0,9}(e-?[0-9]{1,2})?") {
            let expected = text.parse::<f64>().ok().filter(|v| v.is_finite());
            prop_assert_eq!(number(text.as_bytes()).map(f64::to_bits), expected.map(f64::to_bits));
        }
    }

    #[test]
    fn what_is_not_a_finite_number_is_none() {
        for text in ["", "-", ".", "-.", "1.2.3", "nan", "inf", "1e999", "0x10", "1 2", "--1", "１"] {
            assert_eq!(number(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(number(b" 1.5 "), Some(1.5));
        assert_eq!(number(b"-0").map(f64::to_bits), Some((-0.0f64).to_bits()));
    }
}
