//! Datasets: a table of numbers in a CSV or Parquet file, read in blocks of rows.
//!
//! A rank reads a contiguous part of the file and nothing else: a byte range of a CSV, a row
//! range of a Parquet file. Whatever is not a finite number is refused by file, line (row, for
//! Parquet) and column, since a silently dropped row would change the coefficients.

mod csv;
mod parquet;
mod share;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub use share::Share;

/// Rows in a block: with a handful of columns it stays within the second-level cache, and the
/// triangle that is stacked on top of each block costs under one percent of the work.
pub const BLOCK_ROWS: usize = 1024;

/// Most features of a fit. Factors grow with the square of it, and a peer's factor is held in
/// memory before it is checked.
pub const MAX_FEATURES: usize = 255;

/// Why a dataset cannot be used. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused to open or read the file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The name says neither CSV nor Parquet.
    #[error("{path}: unknown kind of dataset; the name must end in .csv or .parquet")]
    UnknownFormat {
        /// The file.
        path: String,
    },
    /// The file as a whole cannot be used.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// One line or row cannot be used.
    #[error("{path}: {unit} {number}: {problem}")]
    Row {
        /// The file.
        path: String,
        /// `line` in a CSV (the header is line 1), `row` in a Parquet file (the first is row 1).
        unit: &'static str,
        /// Which one, from 1.
        number: u64,
        /// What is wrong, with the column and the value where there is one.
        problem: String,
    },
    /// A column that was asked for is not there.
    #[error("{path}: no column {name:?}; it has {available}")]
    MissingColumn {
        /// The file.
        path: String,
        /// The column asked for.
        name: String,
        /// The columns there are.
        available: String,
    },
}

impl DataError {
    fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }

    fn file(path: &Path, problem: impl Into<String>) -> Self {
        Self::File { path: path.display().to_string(), problem: problem.into() }
    }
}

/// A block of rows, stored column after column: the features in order, then the response.
#[derive(Debug, Clone)]
pub struct Block {
    columns: usize,
    rows: usize,
    values: Vec<f64>,
}

impl Block {
    /// An empty block of `columns` columns with room for [`BLOCK_ROWS`] rows.
    pub fn new(columns: usize) -> Self {
        Self { columns, rows: 0, values: vec![0.0; columns * BLOCK_ROWS] }
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns held, the response included.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The values of one column; the response is the last.
    pub fn column(&self, index: usize) -> &[f64] {
        let start = index * BLOCK_ROWS;
        &self.values[start..start + self.rows]
    }

    /// The response.
    pub fn response(&self) -> &[f64] {
        self.column(self.columns - 1)
    }

    fn clear(&mut self) {
        self.rows = 0;
    }

    fn is_full(&self) -> bool {
        self.rows == BLOCK_ROWS
    }

    /// The place of `column` in the row after the last; [`Block::commit_row`] adds that row.
    fn next_row_slot(&mut self, column: usize) -> &mut f64 {
        &mut self.values[column * BLOCK_ROWS + self.rows]
    }

    fn commit_row(&mut self) {
        self.rows += 1;
    }

    /// The first `rows` places of `column`, to be filled whole; [`Block::set_rows`] follows.
    fn column_slots(&mut self, column: usize, rows: usize) -> &mut [f64] {
        let start = column * BLOCK_ROWS;
        &mut self.values[start..start + rows]
    }

    fn set_rows(&mut self, rows: usize) {
        self.rows = rows.min(BLOCK_ROWS);
    }
}

/// Rows of one rank, in file order.
trait BlockSource {
    /// Replaces the contents of `block` by the next rows; no rows means the share has ended.
    fn fill(&mut self, block: &mut Block) -> Result<(), DataError>;
}

/// Which part of the rows a rank reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The rank, below `of`.
    pub rank: u32,
    /// The number of ranks, at least one.
    pub of: u32,
}

impl Part {
    /// The half-open range of `total` things that falls to this rank: sizes differ by at most one.
    pub fn range(self, total: u64) -> (u64, u64) {
        let cut = |k: u32| {
            let scaled = u128::from(total) * u128::from(k) / u128::from(self.of.max(1));
            u64::try_from(scaled).unwrap_or(total)
        };
        (cut(self.rank), cut(self.rank + 1))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Csv,
    Parquet,
}

/// A dataset that was opened once, whose columns were found.
#[derive(Debug, Clone)]
pub struct Dataset {
    path: PathBuf,
    format: Format,
    bytes: u64,
    features: Vec<String>,
    response: String,
    /// For each feature and then the response, the index of its column in the file.
    indexes: Vec<usize>,
    /// Columns in the file.
    width: usize,
    /// Byte at which the rows of a CSV begin.
    rows_at: u64,
}

impl Dataset {
    /// Opens the file, reads its header and finds the columns. Without `features`, every column
    /// but the response is one.
    pub fn open(path: &Path, response: &str, features: Option<&[String]>) -> Result<Self, DataError> {
        let format = match path.extension().and_then(|e| e.to_str()) {
            Some(e) if e.eq_ignore_ascii_case("csv") => Format::Csv,
            Some(e) if e.eq_ignore_ascii_case("parquet") => Format::Parquet,
            _ => return Err(DataError::UnknownFormat { path: path.display().to_string() }),
        };
        let metadata = std::fs::metadata(path).map_err(|e| DataError::io(path, e))?;
        if !metadata.is_file() {
            return Err(DataError::file(path, "not a regular file"));
        }
        let (names, rows_at) = match format {
            Format::Csv => csv::header(path)?,
            Format::Parquet => (parquet::column_names(path)?, 0),
        };
        reject_repeats(path, "the header has two columns", &names)?;
        let features = match features {
            Some(wanted) => wanted.to_vec(),
            None => names.iter().filter(|n| *n != response).cloned().collect(),
        };
        check_selection(path, response, &features)?;
        let find = |name: &String| {
            names.iter().position(|n| n == name).ok_or_else(|| DataError::MissingColumn {
                path: path.display().to_string(),
                name: name.clone(),
                available: shortened(&names.join(", "), 300),
            })
        };
        let indexes =
            features.iter().chain([&response.to_owned()]).map(find).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            path: path.to_owned(),
            format,
            bytes: metadata.len(),
            features,
            response: response.to_owned(),
            indexes,
            width: names.len(),
            rows_at,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the features, in the order of the coefficients.
    pub fn features(&self) -> &[String] {
        &self.features
    }

    /// Name of the response.
    pub fn response(&self) -> &str {
        &self.response
    }

    /// Size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn source(&self, part: Part) -> Result<Box<dyn BlockSource>, DataError> {
        Ok(match self.format {
            Format::Csv => Box::new(csv::CsvSource::open(self, part)?),
            Format::Parquet => Box::new(parquet::ParquetSource::open(self, part)?),
        })
    }
}

fn check_selection(path: &Path, response: &str, features: &[String]) -> Result<(), DataError> {
    if features.is_empty() {
        return Err(DataError::file(path, format!("no feature left beside the response {response:?}")));
    }
    if features.len() > MAX_FEATURES {
        let problem = format!("{} features; at most {MAX_FEATURES} are supported", features.len());
        return Err(DataError::file(path, problem));
    }
    if features.iter().any(|f| f == response) {
        return Err(DataError::file(path, format!("column {response:?} is both the response and a feature")));
    }
    reject_repeats(path, "the list of features names one column twice:", features)
}

fn reject_repeats(path: &Path, complaint: &str, names: &[String]) -> Result<(), DataError> {
    let mut seen = HashSet::new();
    match names.iter().find(|n| !seen.insert(n.as_str())) {
        Some(name) => Err(DataError::file(path, format!("{complaint} {name:?}"))),
        None => Ok(()),
    }
}

/// `text` cut to `limit` characters, so that no value from a file floods a terminal.
fn shortened(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_everything_once(total in 0u64..1_000_000, of in 1u32..64) {
            let mut at = 0;
            for rank in 0..of {
                let (first, end) = Part { rank, of }.range(total);
                prop_assert_eq!(first, at);
                prop_assert!(end - first <= total / u64::from(of) + 1);
                at = end;
            }
            prop_assert_eq!(at, total);
        }
    }

    #[test]
    fn long_values_are_cut_at_a_character() {
        assert_eq!(shortened("äöü", 2), "äö…");
        assert_eq!(shortened("äö", 2), "äö");
    }
}
