//! Synthetic datasets with known coefficients.
//!
//! Everything is computed in integers, so a seed gives the same file on every machine, and the
//! CSV and the Parquet file of a seed hold the same doubles. Features are uniform in [-5, 5) in
//! steps of 0.001, coefficients are multiples of 0.001, the response is rounded to 0.0001: short
//! decimals keep the files small without making the problem less real.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Repetition, Type as PhysicalType};
use parquet::data_type::DoubleType;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use serde::Serialize;

use crate::data::MAX_FEATURES;
use crate::output::{OutputError, PendingFile};

/// Rows written at a time; a Parquet row group, so that four ranks find work in a small file and
/// the dictionaries of a large one stay cheap.
const GROUP_ROWS: u64 = 1 << 18;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Number of rows.
    pub rows: u64,
    /// Number of features, named `x1`, `x2`, …; the response is `y`.
    pub features: usize,
    /// Seed of all numbers, the coefficients included.
    pub seed: u64,
    /// Standard deviation of the noise in millionths.
    pub noise_millionths: u32,
}

/// The coefficients the dataset was made with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Truth {
    /// Names as the fit gives them.
    pub names: Vec<String>,
    /// The coefficients.
    pub coefficients: Vec<f64>,
    /// Standard deviation of the noise.
    pub noise: f64,
    /// Number of rows.
    pub rows: u64,
    /// The seed.
    pub seed: u64,
}

/// Why nothing was generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The recipe makes no dataset.
    #[error("{0}")]
    Recipe(String),
    /// The file could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The Parquet writer failed.
    #[error("{path}: {source}")]
    Parquet {
        /// The file.
        path: String,
        /// Why.
        source: ParquetError,
    },
}

/// Writes the dataset and returns the coefficients behind it.
pub fn generate(recipe: &Recipe, path: &Path) -> Result<Truth, GenerateError> {
    if recipe.features == 0 || recipe.features > MAX_FEATURES {
        let message = format!("--features {}: from 1 to {MAX_FEATURES} are possible", recipe.features);
        return Err(GenerateError::Recipe(message));
    }
    let kind = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    let mut rows = Rows::new(recipe);
    match kind.as_deref() {
        Some("csv") => write_csv(&mut rows, path)?,
        Some("parquet") => write_parquet(&mut rows, path)?,
        _ => {
            let message = format!("{}: the name must end in .csv or .parquet", path.display());
            return Err(GenerateError::Recipe(message));
        }
    }
    let thousandths = |v: &i64| *v as f64 / 1000.0;
    Ok(Truth {
        names: std::iter::once("(intercept)".to_owned()).chain(feature_names(recipe.features)).collect(),
        coefficients: std::iter::once(&rows.intercept).chain(&rows.slopes).map(thousandths).collect(),
        noise: f64::from(recipe.noise_millionths) / 1e6,
        rows: recipe.rows,
        seed: recipe.seed,
    })
}

fn feature_names(features: usize) -> impl Iterator<Item = String> {
    (1..=features).map(|i| format!("x{i}"))
}

/// SplitMix64 (Steele, Lea, Flood, 2014): one multiply-and-shift chain a number, and enough for
/// test data.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -5000..5000.
    fn thousandths(&mut self) -> i64 {
        (((self.next() >> 32) * 10_000) >> 32).cast_signed() - 5000
    }

    /// About normal with the given standard deviation: the sum of eight uniform numbers.
    fn noise(&mut self, deviation: i64) -> i64 {
        const TERMS: i64 = 8;
        const MEAN: i64 = TERMS * 65_535 / 2;
        /// 65536 √(8/12)
        const DEVIATION: i64 = 53_510;
        let sixteens = |v: u64| (0..4).map(move |i| ((v >> (16 * i)) & 0xffff).cast_signed());
        let sum: i64 = sixteens(self.next()).chain(sixteens(self.next())).sum();
        (sum - MEAN) * deviation / DEVIATION
    }
}

/// The rows, one after the other.
struct Rows {
    random: Random,
    /// In thousandths.
    intercept: i64,
    slopes: Vec<i64>,
    noise: i64,
    left: u64,
    /// The current row: features in thousandths, response in ten-thousandths.
    features: Vec<i64>,
    response: i64,
}

impl Rows {
    fn new(recipe: &Recipe) -> Self {
        let mut random = Random(recipe.seed);
        let mut coefficient = || match random.thousandths() {
            0 => 1,
            other => other,
        };
        Self {
            intercept: coefficient(),
            slopes: (0..recipe.features).map(|_| coefficient()).collect(),
            random,
            noise: i64::from(recipe.noise_millionths),
            left: recipe.rows,
            features: vec![0; recipe.features],
            response: 0,
        }
    }

    fn next(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        let mut millionths = self.intercept * 1000 + self.random.noise(self.noise);
        for (x, b) in self.features.iter_mut().zip(&self.slopes) {
            *x = self.random.thousandths();
            millionths += *x * b;
        }
        self.response = (millionths + 50).div_euclid(100);
        true
    }
}

fn write_csv(rows: &mut Rows, path: &Path) -> Result<(), GenerateError> {
    let mut file = PendingFile::create(path)?;
    let mut text = Vec::with_capacity(1 << 20);
    for name in feature_names(rows.features.len()) {
        // Writing to memory cannot fail.
        let _ = write!(text, "{name},");
    }
    text.extend_from_slice(b"y\n");
    while rows.next() {
        for x in &rows.features {
            push_decimal(&mut text, *x, 3);
            text.push(b',');
        }
        push_decimal(&mut text, rows.response, 4);
        text.push(b'\n');
        if text.len() >= (1 << 20) - 4096 {
            file.write(&text)?;
            text.clear();
        }
    }
    file.write(&text)?;
    Ok(file.finish()?)
}

/// Appends `value` · 10^-`decimals`. The standard formatter takes ten times as long, and the
/// demo's file has fourteen million numbers.
fn push_decimal(text: &mut Vec<u8>, value: i64, decimals: usize) {
    if value < 0 {
        text.push(b'-');
    }
    let mut digits = [b'0'; 24];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    let mut written = 0;
    while rest > 0 || written <= decimals {
        if written == decimals {
            at -= 1;
            digits[at] = b'.';
        }
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        written += 1;
    }
    text.extend_from_slice(&digits[at..]);
}

fn write_parquet(rows: &mut Rows, path: &Path) -> Result<(), GenerateError> {
    let mut file = PendingFile::create(path)?;
    let wrap = |source| GenerateError::Parquet { path: path.display().to_string(), source };
    let fields = feature_names(rows.features.len()).chain(["y".to_owned()]).map(|name| {
        Type::primitive_type_builder(&name, PhysicalType::DOUBLE)
            .with_repetition(Repetition::REQUIRED)
            .build()
            .map(Arc::new)
    });
    let fields = fields.collect::<Result<Vec<_>, _>>().map_err(wrap)?;
    let schema = Type::group_type_builder("dataset").with_fields(fields).build().map_err(wrap)?;
    let properties = WriterProperties::builder().set_max_row_group_row_count(None).build();
    let target = file.file_mut();
    let mut writer =
        SerializedFileWriter::new(target, Arc::new(schema), Arc::new(properties)).map_err(wrap)?;
    while rows.left > 0 {
        write_group(rows, &mut writer).map_err(wrap)?;
    }
    writer.close().map_err(wrap)?;
    Ok(file.finish()?)
}

fn write_group<W: Write + Send>(
    rows: &mut Rows,
    writer: &mut SerializedFileWriter<W>,
) -> Result<(), ParquetError> {
    let mut columns = vec![Vec::new(); rows.features.len() + 1];
    for _ in 0..GROUP_ROWS.min(rows.left) {
        rows.next();
        // Correctly rounded, as the decimals of the CSV are when they are parsed.
        let values = rows.features.iter().map(|x| *x as f64 / 1000.0);
        let values = values.chain([rows.response as f64 / 10_000.0]);
        columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
    }
    let mut group = writer.next_row_group()?;
    for values in &columns {
        if let Some(mut column) = group.next_column()? {
            column.typed::<DoubleType>().write_batch(values, None, None)?;
            column.close()?;
        }
    }
    group.close().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decimals_read_back(value in -1_000_000_000i64..1_000_000_000, decimals in 1usize..6) {
            let mut text = Vec::new();
            push_decimal(&mut text, value, decimals);
            let text = String::from_utf8(text).unwrap();
            let read: f64 = text.parse().unwrap();
            prop_assert_eq!(read, value as f64 / 10f64.powi(decimals as i32), "{}", text);
        }
    }

    #[test]
    fn noise_has_the_deviation_asked_for() {
        let mut random = Random(7);
        let draws: Vec<f64> = (0..100_000).map(|_| random.noise(500_000) as f64).collect();
        let mean = draws.iter().sum::<f64>() / 1e5;
        let deviation = (draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 1e5).sqrt();
        assert!(mean.abs() < 6_000.0, "{mean}");
        assert!((deviation - 500_000.0).abs() < 5_000.0, "{deviation}");
    }
}
