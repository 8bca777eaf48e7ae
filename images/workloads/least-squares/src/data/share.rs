//! One rank's rows, read as often as the computation needs them.

use std::time::{Duration, Instant};

use super::{BLOCK_ROWS, Block, DataError, Dataset, Part};

/// One rank's rows. Small shares are kept in memory after the first pass, larger ones are read
/// from the file again, so that memory stays bounded.
pub struct Share {
    dataset: Dataset,
    part: Part,
    budget_blocks: usize,
    kept: Option<Vec<Block>>,
    rows: Option<u64>,
    reading: Duration,
}

impl Share {
    /// The rows of `part`, of which up to `budget_bytes` may be kept in memory.
    pub fn new(dataset: Dataset, part: Part, budget_bytes: usize) -> Self {
        let block_bytes = (dataset.features.len() + 1) * BLOCK_ROWS * size_of::<f64>();
        Self {
            dataset,
            part,
            budget_blocks: budget_bytes / block_bytes,
            kept: None,
            rows: None,
            reading: Duration::ZERO,
        }
    }

    /// The dataset the rows come from.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Time spent on reading and parsing so far.
    pub fn reading(&self) -> Duration {
        self.reading
    }

    /// Calls `each` with every block in file order, and returns the number of rows.
    ///
    /// # Errors
    /// A row that cannot be used, a file that changed since the last pass, or what `each` returns.
    pub fn for_each_block<E: From<DataError>>(
        &mut self,
        mut each: impl FnMut(&Block) -> Result<(), E>,
    ) -> Result<u64, E> {
        if let Some(blocks) = &self.kept {
            blocks.iter().try_for_each(&mut each)?;
            return Ok(blocks.iter().map(|b| b.rows() as u64).sum());
        }
        let mut source = self.timed(|dataset, part| dataset.source(part))?;
        let mut keep = Some(Vec::new());
        let mut block = Block::new(self.dataset.features.len() + 1);
        let mut rows = 0;
        loop {
            let started = Instant::now();
            source.fill(&mut block)?;
            self.reading += started.elapsed();
            if block.rows() == 0 {
                break;
            }
            rows += block.rows() as u64;
            each(&block)?;
            match &mut keep {
                Some(blocks) if blocks.len() < self.budget_blocks => blocks.push(block.clone()),
                _ => keep = None,
            }
        }
        if self.rows.is_some_and(|before| before != rows) {
            return Err(DataError::file(self.dataset.path(), "changed while it was being read").into());
        }
        self.rows = Some(rows);
        self.kept = keep;
        Ok(rows)
    }

    fn timed<T>(
        &mut self,
        work: impl FnOnce(&Dataset, Part) -> Result<T, DataError>,
    ) -> Result<T, DataError> {
        let started = Instant::now();
        let result = work(&self.dataset, self.part);
        self.reading += started.elapsed();
        result
    }
}
