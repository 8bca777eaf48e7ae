//! Ships sandboxes' output to the coordinator, in order, until it is acknowledged.

use std::collections::{HashMap, HashSet};
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

/// Knows which spools hold nothing new, so that idle ones are not read again.
#[derive(Debug, Default)]
pub struct Shipper {
    /// Bytes in the spool when it was last read to its end.
    exhausted: HashMap<String, u64>,
}

impl Shipper {
    /// Ships what there is, a turn for each sandbox. Returns whether more is left.
    ///
    /// # Errors
    /// When the coordinator cannot be reached or a spool cannot be read.
    pub async fn pass(&mut self, paths: &Paths, client: &Client) -> Result<bool, ShippingError> {
        let mut more = false;
        let ids = sandboxes(paths)?;
        self.exhausted.retain(|id, _| ids.contains(id));
        for id in ids {
            let dir = paths.sandbox(&id).join(SPOOL);
            let bytes = size(&dir);
            if self.exhausted.get(&id) == Some(&bytes) {
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
                None => drop(self.exhausted.insert(id, bytes)),
            }
        }
        Ok(more)
    }

    /// The sandboxes whose output may not be shipped to the end yet.
    pub fn unshipped(&self, paths: &Paths) -> HashSet<String> {
        let ids = sandboxes(paths).unwrap_or_default();
        ids.into_iter()
            .filter(|id| {
                let bytes = size(&paths.sandbox(id).join(SPOOL));
                bytes > 0 && self.exhausted.get(id) != Some(&bytes)
            })
            .collect()
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
