//! Output of sandboxes: one append-only file of JSON lines for each, bounded.
//!
//! `logs/JOB/SANDBOX@NODE.jsonl`: the node in the name is who may go on writing, also after the
//! sandbox's assignment is gone. A batch is written before it is acknowledged, so a killed
//! coordinator loses nothing; a half-written last line is cut off when the file is opened again.
//! Numbers already stored are skipped, so that an agent can send a batch again when in doubt.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lathe_api::node::{LogLine, LogStream};

/// Files kept open for appending; others are opened again when needed.
const OPEN_FILES: usize = 256;

/// Output could not be stored or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the log {}: {source}", path.display())]
pub struct LogError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The directory of all logs.
pub struct Logs {
    dir: PathBuf,
    limit_bytes: u64,
    open: Mutex<HashMap<PathBuf, Arc<Mutex<Option<Appender>>>>>,
}

/// A sandbox's log file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LogFile {
    /// Its job.
    pub job: String,
    /// Its sandbox.
    pub sandbox: String,
    /// Its node.
    pub node: String,
}

struct Appender {
    file: File,
    length: u64,
    next_seq: u64,
    full: bool,
}

impl Logs {
    /// Opens the directory, or makes it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path, limit_bytes: u64) -> Result<Self, LogError> {
        fs::create_dir_all(dir).map_err(error("make", dir))?;
        Ok(Self { dir: dir.to_owned(), limit_bytes, open: Mutex::default() })
    }

    fn path(&self, log: &LogFile) -> PathBuf {
        self.dir.join(&log.job).join(format!("{}@{}.jsonl", log.sandbox, log.node))
    }

    /// Whether this node has written output of this sandbox before.
    pub fn exists(&self, log: &LogFile) -> bool {
        self.path(log).exists()
    }

    /// Appends lines of one sandbox, leaving out those stored already. Blocking. Returns how many
    /// were new.
    ///
    /// # Errors
    /// When the file cannot be written; part of the lines may be stored then, and are skipped when
    /// they come again.
    pub fn append(&self, log: &LogFile, lines: &[LogLine]) -> Result<u64, LogError> {
        let path = self.path(log);
        let slot = self.slot(&path);
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let appender = match &mut *slot {
            Some(appender) => appender,
            None => slot.insert(Appender::open(&path)?),
        };
        let result = appender.append(lines, self.limit_bytes);
        if result.is_err() {
            // What the file holds now is uncertain: read it again before the next write.
            *slot = None;
        }
        result.map_err(error("write", &path))
    }

    fn slot(&self, path: &Path) -> Arc<Mutex<Option<Appender>>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= OPEN_FILES && !open.contains_key(path) {
            // Those in use right now have another reference and stay: two appenders of one file
            // would write over each other.
            open.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        Arc::clone(open.entry(path.to_owned()).or_default())
    }

    /// Readers of the sandboxes of a job whose names `wanted` accepts, those that have a file.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn files(&self, job: &str, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, LogError> {
        let dir = self.dir.join(job);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(error("list", &dir)(source)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(error("list", &dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.split_once('@').is_some_and(|(sandbox, _)| wanted(sandbox)) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

impl Appender {
    fn open(path: &Path) -> Result<Self, LogError> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(error("make", dir))?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(error("open", path))?;
        let (length, last) = whole_lines(&file).map_err(error("read", path))?;
        file.set_len(length).map_err(error("cut", path))?;
        file.seek(SeekFrom::Start(length)).map_err(error("read", path))?;
        let full = last.as_ref().is_some_and(is_end_mark);
        Ok(Self { file, length, next_seq: last.map_or(0, |line| line.seq + 1), full })
    }

    fn append(&mut self, lines: &[LogLine], limit: u64) -> io::Result<u64> {
        let mut text = Vec::new();
        let mut new = 0;
        for line in lines.iter().filter(|line| line.seq != u64::MAX) {
            if line.seq < self.next_seq {
                continue;
            }
            self.next_seq = line.seq + 1;
            new += 1;
            if self.full {
                continue;
            }
            if self.length + text.len() as u64 > limit {
                serde_json::to_writer(&mut text, &end_mark(line, limit))?;
                self.full = true;
            } else {
                serde_json::to_writer(&mut text, line)?;
            }
            text.push(b'\n');
        }
        self.file.write_all(&text)?;
        self.length += text.len() as u64;
        Ok(new)
    }
}

/// What stands for everything beyond the limit.
fn end_mark(line: &LogLine, limit: u64) -> LogLine {
    LogLine {
        stream: LogStream::Lathe,
        text: format!("output beyond {limit} bytes is not kept"),
        ..line.clone()
    }
}

fn is_end_mark(line: &LogLine) -> bool {
    line.stream == LogStream::Lathe
        && line.text.starts_with("output beyond ")
        && line.text.ends_with(" bytes is not kept")
}

/// The length of the file up to its last whole line, and that line.
fn whole_lines(file: &File) -> io::Result<(u64, Option<LogLine>)> {
    let mut reader = BufReader::new(file);
    let (mut length, mut last) = (0, None);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        if read == 0 || line.last() != Some(&b'\n') {
            return Ok((length, last));
        }
        match serde_json::from_slice(&line) {
            Ok(parsed) => last = Some(parsed),
            // Garbage after a power cut: what follows it cannot be trusted to be in order.
            Err(_) => return Ok((length, last)),
        }
        length += read as u64;
    }
}

/// Reads several files of one job as one stream, by time.
#[derive(Debug, Default)]
pub struct LogReader {
    cursors: Vec<Cursor>,
}

#[derive(Debug)]
struct Cursor {
    path: PathBuf,
    /// Where the line after `next` begins.
    offset: u64,
    next: Option<LogLine>,
}

impl LogReader {
    /// Takes in files that were not there before.
    pub fn add(&mut self, files: Vec<PathBuf>) {
        for path in files {
            if !self.cursors.iter().any(|cursor| cursor.path == path) {
                self.cursors.push(Cursor { path, offset: 0, next: None });
            }
        }
    }

    /// Up to `limit` of the lines that are there and were not returned before, by time; those of one
    /// sandbox stay in their order. Blocking.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(&mut self, limit: usize) -> Result<Vec<LogLine>, LogError> {
        let mut readers = Vec::new();
        for cursor in &mut self.cursors {
            let open = File::open(&cursor.path).and_then(|mut file| {
                file.seek(SeekFrom::Start(cursor.offset))?;
                Ok(BufReader::new(file))
            });
            let mut reader = open.map_err(error("read", &cursor.path))?;
            if cursor.next.is_none() {
                cursor.advance(&mut reader)?;
            }
            readers.push(reader);
        }
        let mut lines = Vec::new();
        while lines.len() < limit {
            // A gang has few files; a heap would pay only with thousands.
            let first = self
                .cursors
                .iter()
                .enumerate()
                .filter_map(|(index, cursor)| cursor.next.as_ref().map(|line| (line.time_ms, index)));
            let Some((_, index)) = first.min() else { break };
            lines.extend(self.cursors[index].next.take());
            self.cursors[index].advance(&mut readers[index])?;
        }
        Ok(lines)
    }
}

impl Cursor {
    fn advance(&mut self, reader: &mut impl BufRead) -> Result<(), LogError> {
        // Far above the longest line with every character escaped: no file here has longer ones.
        const MAX_LINE_BYTES: u64 = 1 << 20;
        let mut line = Vec::new();
        let read = reader
            .by_ref()
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(error("read", &self.path))?;
        if line.last() == Some(&b'\n') {
            self.offset += read as u64;
            self.next = serde_json::from_slice(&line).ok();
        }
        Ok(())
    }
}

fn error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> LogError + use<> {
    let path = path.to_owned();
    move |source| LogError { action, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(sandbox: &str) -> LogFile {
        LogFile { job: "j".to_owned(), sandbox: sandbox.to_owned(), node: "n1".to_owned() }
    }

    fn line(sandbox: &str, seq: u64, text: &str) -> LogLine {
        LogLine {
            sandbox: sandbox.to_owned(),
            seq,
            time_ms: seq * 10,
            stream: LogStream::Stdout,
            text: text.to_owned(),
        }
    }

    fn all(logs: &Logs) -> Vec<LogLine> {
        let mut reader = LogReader::default();
        reader.add(logs.files("j", |_| true).expect("listed"));
        reader.read(usize::MAX).expect("read")
    }

    #[test]
    fn a_batch_sent_twice_is_stored_once_also_over_a_restart() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let batch = [line("j-0-1", 0, "a"), line("j-0-1", 1, "b")];
        let logs = Logs::open(dir.path(), 1 << 20).expect("opened");
        assert_eq!(logs.append(&log("j-0-1"), &batch).expect("stored"), 2);
        assert_eq!(logs.append(&log("j-0-1"), &batch).expect("stored"), 0);
        let logs = Logs::open(dir.path(), 1 << 20).expect("opened");
        let overlapping = [line("j-0-1", 1, "b"), line("j-0-1", 2, "c")];
        assert_eq!(logs.append(&log("j-0-1"), &overlapping).expect("stored"), 1);
        let texts: Vec<_> = all(&logs).into_iter().map(|line| line.text).collect();
        assert_eq!(texts, ["a", "b", "c"]);
    }

    #[test]
    fn a_half_written_line_is_cut_off_and_written_again() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let logs = Logs::open(dir.path(), 1 << 20).expect("opened");
        let batch = [line("j-0-1", 0, "a"), line("j-0-1", 1, "b")];
        logs.append(&log("j-0-1"), &batch).expect("stored");
        let path = dir.path().join("j/j-0-1@n1.jsonl");
        let whole = fs::read(&path).expect("there");
        fs::write(&path, &whole[..whole.len() - 3]).expect("cut");
        let logs = Logs::open(dir.path(), 1 << 20).expect("opened");
        assert_eq!(all(&logs).len(), 1, "a reader shows whole lines only");
        assert_eq!(logs.append(&log("j-0-1"), &batch).expect("stored"), 1);
        assert_eq!(fs::read(&path).expect("there"), whole);
    }

    #[test]
    fn output_is_bounded_and_says_so_once() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let logs = Logs::open(dir.path(), 2000).expect("opened");
        let lines: Vec<_> = (0..100).map(|seq| line("j-0-1", seq, "0123456789")).collect();
        for chunk in lines.chunks(10) {
            logs.append(&log("j-0-1"), chunk).expect("stored");
        }
        let logs = Logs::open(dir.path(), 2000).expect("opened");
        logs.append(&log("j-0-1"), &[line("j-0-1", 100, "more")]).expect("stored");
        let kept = all(&logs);
        assert!(fs::metadata(dir.path().join("j/j-0-1@n1.jsonl")).expect("there").len() < 2500);
        let marks: Vec<_> = kept.iter().filter(|line| line.stream == LogStream::Lathe).collect();
        assert_eq!(marks.len(), 1);
        assert_eq!(marks[0].text, "output beyond 2000 bytes is not kept");
    }

    #[test]
    fn ranks_are_merged_by_time_and_nothing_is_read_twice() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let logs = Logs::open(dir.path(), 1 << 20).expect("opened");
        logs.append(&log("j-0-1"), &[line("j-0-1", 0, "a0"), line("j-0-1", 2, "a2")]).expect("stored");
        logs.append(&log("j-1-1"), &[line("j-1-1", 1, "b1")]).expect("stored");
        let mut reader = LogReader::default();
        reader.add(logs.files("j", |_| true).expect("listed"));
        let texts = |lines: Vec<LogLine>| lines.into_iter().map(|line| line.text).collect::<Vec<_>>();
        assert_eq!(texts(reader.read(2).expect("read")), ["a0", "b1"]);
        logs.append(&log("j-1-1"), &[line("j-1-1", 3, "b3")]).expect("stored");
        assert_eq!(texts(reader.read(100).expect("read")), ["a2", "b3"]);
        assert!(reader.read(100).expect("read").is_empty());
    }
}
