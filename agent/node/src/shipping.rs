//! Ships sandboxes' output to the coordinator, in order, until it is acknowledged.
//!
//! Whoever is told that a task ended may read its output then, so its end is reported after its
//! output was shipped: [`Shipped::waits`] says whether some still waits.

use std::collections::HashMap;
use std::path::Path;

use lathe_api::client::{Client, ClientError};
use lathe_api::node::LogBatch;

use crate::files::FileError;
use crate::paths::{Paths, is_valid_id};
use crate::supervisor::SPOOL;
use crate::supervisor::spool::SpoolReader;

/// Lines in one request, as the API limits them.
const BATCH: usize = 256;

/// Lines read from one sandbox before the next gets its turn.
const TURN: usize = 4096;

/// Output that could not be shipped. It stays in the spool.
#[derive(Debug, thiserror::Error)]
pub enum ShippingError {
    /// The coordinator.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The spool.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Which spools were shipped to their end, and how many bytes they held then.
#[derive(Clone, Debug, Default)]
pub struct Shipped(HashMap<String, u64>);

impl Shipped {
    /// Whether output of this sandbox is not shipped yet. Read from the spool as it is now.
    pub fn waits(&self, paths: &Paths, id: &str) -> bool {
        let bytes = size(&paths.sandbox(id).join(SPOOL));
        bytes > 0 && self.0.get(id) != Some(&bytes)
    }
}

/// Knows which spools hold nothing new, so that idle ones are not read again.
#[derive(Debug, Default)]
pub struct Shipper {
    exhausted: Shipped,
}

impl Shipper {
    /// Ships what there is, a turn for each sandbox. Returns whether more is left.
    ///
    /// # Errors
    /// When the coordinator cannot be reached or a spool cannot be read.
    pub async fn pass(&mut self, paths: &Paths, client: &Client) -> Result<bool, ShippingError> {
        let mut more = false;
        let ids = sandboxes(paths)?;
        self.exhausted.0.retain(|id, _| ids.contains(id));
        for id in ids {
            let dir = paths.sandbox(&id).join(SPOOL);
            let bytes = size(&dir);
            if self.exhausted.0.get(&id) == Some(&bytes) {
                continue;
            }
            let mut reader = SpoolReader::open(&dir)?;
            let lines = reader.read(&id, TURN)?;
            for batch in lines.chunks(BATCH) {
                client.send_logs(&LogBatch { lines: batch.to_vec() }).await?;
            }
            match lines.last() {
                Some(last) => {
                    reader.acknowledge(last.seq + 1)?;
                    more = true;
                }
                None => drop(self.exhausted.0.insert(id, bytes)),
            }
        }
        Ok(more)
    }

    /// What was shipped so far.
    pub fn shipped(&self) -> &Shipped {
        &self.exhausted
    }
}

fn sandboxes(paths: &Paths) -> Result<Vec<String>, FileError> {
    let all = paths.sandboxes();
    let entries = std::fs::read_dir(&all).map_err(FileError::io("list", &all))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|id| is_valid_id(id)).collect())
}

/// Bytes in a spool's segments.
fn size(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let logs = entries.filter(|entry| entry.path().extension().is_some_and(|e| e == "log"));
    logs.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::spool::SpoolWriter;

    #[test]
    fn output_waits_from_its_first_byte_until_all_of_it_is_shipped() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            state: dir.path().join("state"),
            run: dir.path().join("run"),
            guest: "/none".into(),
            vmm: "/none".into(),
        };
        let spool = paths.sandbox("a-0-1").join(SPOOL);
        let mut shipped = Shipped::default();
        assert!(!shipped.waits(&paths, "a-0-1"), "there is none");
        std::fs::create_dir_all(&spool).unwrap();
        SpoolWriter::open(&spool).unwrap().note("hello").unwrap();
        assert!(shipped.waits(&paths, "a-0-1"));
        shipped.0.insert("a-0-1".to_owned(), size(&spool));
        assert!(!shipped.waits(&paths, "a-0-1"));
        SpoolWriter::open(&spool).unwrap().note("and more").unwrap();
        assert!(shipped.waits(&paths, "a-0-1"));
    }
}
