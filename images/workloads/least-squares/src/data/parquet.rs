//! Parquet files with flat numeric columns. A rank opens only the row groups its rows are in and
//! skips to its first row without decoding what lies before.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::{ConvertedType, Type as PhysicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{DataType, DoubleType, FloatType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::{BLOCK_ROWS, Block, BlockSource, DataError, Dataset, Part};

/// Names of the leaf columns, nested ones with dots.
pub(super) fn column_names(path: &Path) -> Result<Vec<String>, DataError> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    Ok(schema.columns().iter().map(|c| c.path().string()).collect())
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = File::open(path).map_err(|e| DataError::io(path, e))?;
    SerializedFileReader::new(file).map_err(|e| broken(path, &e))
}

fn broken(path: &Path, error: &ParquetError) -> DataError {
    DataError::file(path, format!("not a readable Parquet file: {error}"))
}

/// The rows of one rank.
pub(super) struct ParquetSource {
    path: PathBuf,
    names: Vec<String>,
    indexes: Vec<usize>,
    reader: SerializedFileReader<File>,
    /// The next row group to open, and the index of its first row.
    next_group: usize,
    next_group_at: u64,
    /// Next row of this rank, and the one after its last.
    row: u64,
    end: u64,
    /// Readers of the open row group, and the row after its last.
    columns: Vec<NumericReader>,
    group_end: u64,
}

impl ParquetSource {
    pub(super) fn open(dataset: &Dataset, part: Part) -> Result<Self, DataError> {
        let reader = open(&dataset.path)?;
        let mut total = 0u64;
        for group in reader.metadata().row_groups() {
            let rows = u64::try_from(group.num_rows()).ok();
            total = rows.and_then(|rows| total.checked_add(rows)).ok_or_else(|| {
                DataError::file(&dataset.path, format!("a row group of {} rows", group.num_rows()))
            })?;
        }
        let schema = reader.metadata().file_metadata().schema_descr();
        for index in &dataset.indexes {
            check_type(&dataset.path, &schema.column(*index))?;
        }
        let (row, end) = part.range(total);
        Ok(Self {
            path: dataset.path.clone(),
            names: dataset.features.iter().chain([&dataset.response]).cloned().collect(),
            indexes: dataset.indexes.clone(),
            reader,
            next_group: 0,
            next_group_at: 0,
            row,
            end,
            columns: Vec::new(),
            group_end: 0,
        })
    }

    /// Opens the row group that holds the next row, and skips to that row.
    fn open_group(&mut self) -> Result<(), DataError> {
        while self.group_end <= self.row {
            let rows = self.reader.metadata().row_group(self.next_group).num_rows();
            let first = self.next_group_at;
            // Not negative and no overflow: the sum over all groups was checked on opening.
            self.group_end = first + rows.unsigned_abs();
            self.next_group_at = self.group_end;
            if self.group_end > self.row {
                self.columns = self.open_columns(self.next_group, self.row - first)?;
            }
            self.next_group += 1;
        }
        Ok(())
    }

    fn open_columns(&self, group: usize, skip: u64) -> Result<Vec<NumericReader>, DataError> {
        let open = |index: &usize| -> Result<NumericReader, ParquetError> {
            let group = self.reader.get_row_group(group)?;
            let column = group.metadata().column(*index).column_descr_ptr();
            let mut reader = NumericReader::new(group.get_column_reader(*index)?, &column)?;
            reader.skip(usize::try_from(skip).map_err(|e| ParquetError::General(e.to_string()))?)?;
            Ok(reader)
        };
        self.indexes.iter().map(open).collect::<Result<_, _>>().map_err(|e| broken(&self.path, &e))
    }

    fn row_error(&self, offset: usize, slot: usize, problem: &str) -> DataError {
        DataError::Row {
            path: self.path.display().to_string(),
            unit: "row",
            number: self.row + offset as u64 + 1,
            problem: format!("column {}: {problem}", self.names[slot]),
        }
    }
}

impl BlockSource for ParquetSource {
    fn fill(&mut self, block: &mut Block) -> Result<(), DataError> {
        block.clear();
        if self.row >= self.end {
            return Ok(());
        }
        self.open_group()?;
        let left = self.end.min(self.group_end) - self.row;
        let rows = usize::try_from(left).unwrap_or(BLOCK_ROWS).min(BLOCK_ROWS);
        let mut columns = std::mem::take(&mut self.columns);
        for (slot, column) in columns.iter_mut().enumerate() {
            let target = block.column_slots(slot, rows);
            match column.read(target).map_err(|e| broken(&self.path, &e))? {
                Outcome::Whole => {}
                Outcome::Null(at) => return Err(self.row_error(at, slot, "no value")),
                Outcome::Short(got) => return Err(self.row_error(got, slot, "the column ends early")),
            }
            if let Some(at) = target.iter().position(|v| !v.is_finite()) {
                let problem = format!("\"{}\" is not a finite number", target[at]);
                return Err(self.row_error(at, slot, &problem));
            }
        }
        self.columns = columns;
        block.set_rows(rows);
        self.row += rows as u64;
        Ok(())
    }
}

/// Refuses what has no plain reading as a number.
fn check_type(path: &Path, column: &ColumnDescriptor) -> Result<(), DataError> {
    let refuse = |what: String| {
        let problem = format!(
            "column {} is {what}; write it as a plain integer or floating point column",
            column.name()
        );
        Err(DataError::file(path, problem))
    };
    if column.max_rep_level() > 0 || column.max_def_level() > 1 {
        return refuse("nested".to_owned());
    }
    let plain = matches!(
        column.physical_type(),
        PhysicalType::INT32 | PhysicalType::INT64 | PhysicalType::FLOAT | PhysicalType::DOUBLE
    );
    if !plain {
        return refuse(column.physical_type().to_string());
    }
    match column.converted_type() {
        ConvertedType::NONE
        | ConvertedType::INT_8
        | ConvertedType::INT_16
        | ConvertedType::INT_32
        | ConvertedType::INT_64
        | ConvertedType::UINT_8
        | ConvertedType::UINT_16
        | ConvertedType::UINT_32
        | ConvertedType::UINT_64 => Ok(()),
        other => refuse(other.to_string()),
    }
}

enum Outcome {
    Whole,
    /// The row at this offset has no value.
    Null(usize),
    /// Only so many rows were left.
    Short(usize),
}

struct Typed<T: DataType> {
    reader: ColumnReaderImpl<T>,
    values: Vec<T::T>,
    levels: Vec<i16>,
    optional: bool,
    convert: fn(&T::T) -> f64,
}

impl<T: DataType> Typed<T> {
    fn new(reader: ColumnReader, optional: bool, convert: fn(&T::T) -> f64) -> Self {
        let reader = get_typed_column_reader::<T>(reader);
        let values = Vec::with_capacity(BLOCK_ROWS);
        Self { reader, values, levels: Vec::new(), optional, convert }
    }

    fn read(&mut self, target: &mut [f64]) -> Result<Outcome, ParquetError> {
        self.values.clear();
        self.levels.clear();
        let mut rows = 0;
        while rows < target.len() {
            let levels = self.optional.then_some(&mut self.levels);
            let (got, _, _) =
                self.reader.read_records(target.len() - rows, levels, None, &mut self.values)?;
            if got == 0 {
                return Ok(Outcome::Short(rows));
            }
            rows += got;
        }
        if let Some(at) = self.levels.iter().position(|level| *level == 0) {
            return Ok(Outcome::Null(at));
        }
        if self.values.len() != target.len() {
            return Ok(Outcome::Short(self.values.len()));
        }
        for (slot, value) in target.iter_mut().zip(&self.values) {
            *slot = (self.convert)(value);
        }
        Ok(Outcome::Whole)
    }
}

/// A column of numbers of any of the physical types.
enum NumericReader {
    Int32(Typed<Int32Type>),
    Int64(Typed<Int64Type>),
    Float(Typed<FloatType>),
    Double(Typed<DoubleType>),
}

impl NumericReader {
    fn new(reader: ColumnReader, column: &ColumnDescriptor) -> Result<Self, ParquetError> {
        let optional = column.max_def_level() > 0;
        let unsigned32 = column.converted_type() == ConvertedType::UINT_32;
        let unsigned64 = column.converted_type() == ConvertedType::UINT_64;
        Ok(match column.physical_type() {
            PhysicalType::INT32 if unsigned32 => {
                Self::Int32(Typed::new(reader, optional, |v: &i32| f64::from(v.cast_unsigned())))
            }
            PhysicalType::INT32 => Self::Int32(Typed::new(reader, optional, |v| f64::from(*v))),
            // Integers beyond 2^53 are rounded to the nearest double, as in every such library.
            PhysicalType::INT64 if unsigned64 => {
                Self::Int64(Typed::new(reader, optional, |v: &i64| v.cast_unsigned() as f64))
            }
            PhysicalType::INT64 => Self::Int64(Typed::new(reader, optional, |v| *v as f64)),
            PhysicalType::FLOAT => Self::Float(Typed::new(reader, optional, |v| f64::from(*v))),
            PhysicalType::DOUBLE => Self::Double(Typed::new(reader, optional, |v| *v)),
            other => return Err(ParquetError::General(format!("column type {other}"))),
        })
    }

    fn skip(&mut self, rows: usize) -> Result<(), ParquetError> {
        let skipped = match self {
            Self::Int32(c) => c.reader.skip_records(rows)?,
            Self::Int64(c) => c.reader.skip_records(rows)?,
            Self::Float(c) => c.reader.skip_records(rows)?,
            Self::Double(c) => c.reader.skip_records(rows)?,
        };
        if skipped == rows {
            Ok(())
        } else {
            Err(ParquetError::EOF(format!("only {skipped} of {rows} rows")))
        }
    }

    fn read(&mut self, target: &mut [f64]) -> Result<Outcome, ParquetError> {
        match self {
            Self::Int32(c) => c.read(target),
            Self::Int64(c) => c.read(target),
            Self::Float(c) => c.read(target),
            Self::Double(c) => c.read(target),
        }
    }
}
