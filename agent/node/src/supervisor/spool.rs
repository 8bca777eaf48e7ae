//! Output of a sandbox on its way to the coordinator, bounded on disk.
//!
//! The supervisor appends, the agent ships and acknowledges; they share nothing but files, so
//! either may be restarted at any time. The spool is a folder of segments, each a file of JSON
//! lines named after its first line's number. The agent deletes a segment when all of it was
//! acknowledged, which is what keeps a service's spool small for ever.
//!
//! A guest can write as fast as it likes: past [`MAX_SPOOL`] bytes waiting on disk its output is
//! dropped and counted, and it is told so in its own log.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use lathe_api::node::{LogLine, LogStream};
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};

/// What one sandbox may keep waiting on the host's disk. Without it a task fills the disk of all.
pub const MAX_SPOOL: u64 = 64 << 20;

/// When a segment is full. Small enough that deleting acknowledged ones frees space soon.
const SEGMENT: u64 = 1 << 20;

/// The longest text of a line, in bytes, as the API says.
pub const MAX_LINE: usize = 16 << 10;

/// One line in the spool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    seq: u64,
    time_ms: u64,
    stream: LogStream,
    text: String,
}

/// The writing end.
#[derive(Debug)]
pub struct SpoolWriter {
    dir: PathBuf,
    segment: Option<(File, u64)>,
    waiting: u64,
    limit: u64,
    next: u64,
    dropped: u64,
    dropping: bool,
    stdout: Splitter,
    stderr: Splitter,
}

impl SpoolWriter {
    /// Makes or reopens the spool in `dir`.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(dir: &Path) -> Result<Self, FileError> {
        Self::with_limit(dir, MAX_SPOOL)
    }

    fn with_limit(dir: &Path, limit: u64) -> Result<Self, FileError> {
        files::make_private_dir(dir)?;
        let next = SpoolReader::open(dir)?.after_last()?;
        Ok(Self {
            dir: dir.to_owned(),
            segment: None,
            waiting: segments(dir)?.iter().map(|s| s.bytes).sum(),
            limit,
            next,
            dropped: 0,
            dropping: false,
            stdout: Splitter::default(),
            stderr: Splitter::default(),
        })
    }

    /// Takes bytes of one of the task's streams; whole lines go to the spool.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn output(&mut self, stream: LogStream, data: &[u8]) -> Result<(), FileError> {
        let splitter = if stream == LogStream::Stderr { &mut self.stderr } else { &mut self.stdout };
        let lines = splitter.push(data);
        lines.into_iter().try_for_each(|line| self.line(stream, line))
    }

    /// Something the agent says of the sandbox.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note(&mut self, text: &str) -> Result<(), FileError> {
        self.line(LogStream::Lathe, text.chars().take(MAX_LINE / 4).collect())
    }

    /// Writes what was left without a newline, and the count of dropped bytes if there were any.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn finish(&mut self) -> Result<(), FileError> {
        for stream in [LogStream::Stdout, LogStream::Stderr] {
            let splitter = if stream == LogStream::Stderr { &mut self.stderr } else { &mut self.stdout };
            let rest = splitter.finish();
            rest.into_iter().try_for_each(|line| self.line(stream, line))?;
        }
        if self.dropped > 0 {
            self.append(LogStream::Lathe, format!("{} bytes of output were dropped in all", self.dropped))?;
        }
        Ok(())
    }

    /// Bytes dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn line(&mut self, stream: LogStream, text: String) -> Result<(), FileError> {
        let size = text.len() as u64 + 80;
        if self.waiting + size > self.limit {
            // The agent deletes what it shipped; only the folder knows.
            self.waiting = segments(&self.dir)?.iter().map(|s| s.bytes).sum();
        }
        if self.waiting + size > self.limit {
            self.dropped += text.len() as u64 + 1;
            if !self.dropping {
                self.dropping = true;
                let limit = self.limit >> 20;
                self.append(
                    LogStream::Lathe,
                    format!("{limit} MiB of output wait to be stored: output is dropped until they are"),
                )?;
            }
            return Ok(());
        }
        self.dropping = false;
        self.append(stream, text)
    }

    fn append(&mut self, stream: LogStream, text: String) -> Result<(), FileError> {
        let entry = Entry { seq: self.next, time_ms: files::now_ms(), stream, text };
        let mut line = serde_json::to_vec(&entry)
            .map_err(|source| FileError::Json { path: self.dir.clone(), source })?;
        line.push(b'\n');
        if self.segment.as_ref().is_none_or(|(_, size)| *size >= SEGMENT) {
            let path = segment_path(&self.dir, self.next);
            // A file of this name can hold nothing but a line torn by a crash.
            let file = File::create(&path).map_err(FileError::io("make", &path))?;
            self.segment = Some((file, 0));
        }
        if let Some((file, size)) = &mut self.segment {
            // One write a line: a reader sees whole lines, or the beginning of the last one.
            file.write_all(&line).map_err(FileError::io("write to", &self.dir))?;
            *size += line.len() as u64;
        }
        self.waiting += line.len() as u64;
        self.next += 1;
        Ok(())
    }
}

/// Cuts a stream of bytes into lines of at most [`MAX_LINE`] bytes of valid UTF-8.
#[derive(Debug, Default)]
struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    fn push(&mut self, data: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            self.pending.extend_from_slice(piece);
            if self.pending.last() == Some(&b'\n') {
                self.pending.pop();
                self.flush(&mut lines);
                continue;
            }
            // Only the tail stays: what is held in memory is bounded by one line.
            while self.pending.len() >= MAX_LINE {
                let rest = self.pending.split_off(MAX_LINE);
                self.flush(&mut lines);
                self.pending = rest;
            }
        }
        lines
    }

    fn finish(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.pending.is_empty() {
            self.flush(&mut lines);
        }
        lines
    }

    fn flush(&mut self, lines: &mut Vec<String>) {
        let bytes = std::mem::take(&mut self.pending);
        let text = String::from_utf8_lossy(&bytes);
        let text = text.strip_suffix('\r').unwrap_or(&text);
        // Replacement characters make text longer than its bytes, so the cut is made again here.
        let mut rest = text;
        while rest.len() > MAX_LINE {
            let cut = rest.floor_char_boundary(MAX_LINE);
            lines.push(rest[..cut].to_owned());
            rest = &rest[cut..];
        }
        lines.push(rest.to_owned());
    }
}

#[derive(Debug)]
struct Segment {
    first: u64,
    path: PathBuf,
    bytes: u64,
}

fn segment_path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.log"))
}

fn segments(dir: &Path) -> Result<Vec<Segment>, FileError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(FileError::io("list", dir))? {
        let entry = entry.map_err(FileError::io("list", dir))?;
        let name = entry.file_name();
        let first = name.to_str().and_then(|n| n.strip_suffix(".log")).and_then(|n| n.parse().ok());
        if let Some(first) = first {
            let bytes = entry.metadata().map_or(0, |m| m.len());
            found.push(Segment { first, path: entry.path(), bytes });
        }
    }
    found.sort_by_key(|s| s.first);
    Ok(found)
}

/// The reading end, in the agent.
#[derive(Debug)]
pub struct SpoolReader {
    dir: PathBuf,
    /// The first line that is not acknowledged.
    next: u64,
}

#[derive(Serialize, Deserialize)]
struct Acknowledged {
    next: u64,
}

const ACKNOWLEDGED: &str = "acknowledged.json";

impl SpoolReader {
    /// Opens the spool where the last reader stopped.
    ///
    /// # Errors
    /// When its position is damaged.
    pub fn open(dir: &Path) -> Result<Self, FileError> {
        let next = match files::read_json::<Acknowledged>(&dir.join(ACKNOWLEDGED)) {
            Ok(position) => position.next,
            Err(error) if error.is_not_found() => 0,
            Err(error) => return Err(error),
        };
        Ok(Self { dir: dir.to_owned(), next })
    }

    /// Up to `limit` lines that are not acknowledged. The same again until they are.
    ///
    /// # Errors
    /// When a segment cannot be read.
    pub fn read(&self, sandbox: &str, limit: usize) -> Result<Vec<LogLine>, FileError> {
        let mut lines = Vec::new();
        if !self.dir.exists() {
            return Ok(lines);
        }
        let segments = segments(&self.dir)?;
        // The last segment that begins at or before `next` is the first of interest.
        let start = segments.iter().rposition(|s| s.first <= self.next).unwrap_or(0);
        for segment in &segments[start.min(segments.len())..] {
            for entry in entries(&segment.path)? {
                if lines.len() == limit {
                    return Ok(lines);
                }
                if entry.seq >= self.next {
                    let Entry { seq, time_ms, stream, text } = entry;
                    lines.push(LogLine { sandbox: sandbox.to_owned(), seq, time_ms, stream, text });
                }
            }
        }
        Ok(lines)
    }

    /// Remembers that everything before `next` is stored elsewhere, and frees what that allows.
    ///
    /// # Errors
    /// When the position cannot be written.
    pub fn acknowledge(&mut self, next: u64) -> Result<(), FileError> {
        files::write_json(&self.dir.join(ACKNOWLEDGED), &Acknowledged { next })?;
        self.next = next;
        let segments = segments(&self.dir)?;
        // Never the last one: the writer may have it open.
        for pair in segments.windows(2) {
            if pair[1].first <= next {
                files::remove(&pair[0].path)?;
            }
        }
        Ok(())
    }

    fn after_last(&self) -> Result<u64, FileError> {
        let last = segments(&self.dir)?.pop();
        let entries = last.as_ref().map_or(Ok(Vec::new()), |segment| entries(&segment.path))?;
        Ok(entries.last().map_or(last.map_or(self.next, |s| s.first), |entry| entry.seq + 1))
    }
}

/// The whole lines of a segment; a line cut off by a crash is not one.
fn entries(path: &Path) -> Result<Vec<Entry>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FileError::io("read", path)(error)),
    };
    let lines = BufReader::new(file).split(b'\n');
    Ok(lines.map_while(Result::ok).map_while(|line| serde_json::from_slice(&line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(dir: &Path) -> Vec<String> {
        SpoolReader::open(dir).unwrap().read("s", 1_000_000).unwrap().into_iter().map(|l| l.text).collect()
    }

    #[test]
    fn lines_come_out_as_written_and_are_sent_until_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = SpoolWriter::open(dir.path()).unwrap();
        spool.output(LogStream::Stdout, b"one\ntw").unwrap();
        spool.output(LogStream::Stderr, b"err\r\n").unwrap();
        spool.output(LogStream::Stdout, b"o\nrest").unwrap();
        spool.finish().unwrap();
        assert_eq!(texts(dir.path()), ["one", "err", "two", "rest"]);
        let mut reader = SpoolReader::open(dir.path()).unwrap();
        reader.acknowledge(2).unwrap();
        let left = SpoolReader::open(dir.path()).unwrap().read("s", 10).unwrap();
        assert_eq!(left.iter().map(|l| l.seq).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn a_flood_is_dropped_counted_and_told_and_acknowledging_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = SpoolWriter::with_limit(dir.path(), 3 << 20).unwrap();
        let line = [b'x'; 1000];
        for _ in 0..8000 {
            spool.output(LogStream::Stdout, &line).unwrap();
            spool.output(LogStream::Stdout, b"\n").unwrap();
        }
        let bytes: u64 = segments(dir.path()).unwrap().iter().map(|s| s.bytes).sum();
        assert!(bytes < (3 << 20) + 1024, "{bytes}");
        assert!(spool.dropped() > 4 << 20);
        assert!(texts(dir.path()).last().unwrap().contains("dropped"));

        let mut reader = SpoolReader::open(dir.path()).unwrap();
        let all = reader.read("s", usize::MAX).unwrap();
        reader.acknowledge(all.last().unwrap().seq + 1).unwrap();
        spool.output(LogStream::Stdout, b"after\n").unwrap();
        assert_eq!(reader.read("s", 10).unwrap()[0].text, "after");
    }

    #[test]
    fn a_reopened_spool_goes_on_counting() {
        let dir = tempfile::tempdir().unwrap();
        SpoolWriter::open(dir.path()).unwrap().note("a").unwrap();
        let path = segments(dir.path()).unwrap().pop().unwrap().path;
        let mut torn = fs::OpenOptions::new().append(true).open(path).unwrap();
        torn.write_all(b"{\"seq\":1,\"ti").unwrap();
        SpoolWriter::open(dir.path()).unwrap().note("b").unwrap();
        let lines = SpoolReader::open(dir.path()).unwrap().read("s", 9).unwrap();
        assert_eq!(lines.iter().map(|l| (l.seq, l.text.as_str())).collect::<Vec<_>>(), [(0, "a"), (1, "b")]);
    }

    proptest! {
        #[test]
        fn no_line_is_too_long_and_no_byte_of_text_is_lost(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40_000), 0..6)
        ) {
            let mut splitter = Splitter::default();
            let mut lines = Vec::new();
            for piece in &pieces {
                lines.extend(splitter.push(piece));
                prop_assert!(splitter.pending.len() < MAX_LINE);
            }
            lines.extend(splitter.finish());
            prop_assert!(lines.iter().all(|line| line.len() <= MAX_LINE));
            let newlines = pieces.concat().iter().filter(|b| **b == b'\n').count();
            prop_assert!(lines.len() >= newlines);
        }

        #[test]
        fn text_survives_any_cut(text in "[a-zé\n]{0,200}", cut in 0usize..400) {
            let cut = cut.min(text.len());
            let mut splitter = Splitter::default();
            let mut lines = splitter.push(&text.as_bytes()[..cut]);
            lines.extend(splitter.push(&text.as_bytes()[cut..]));
            lines.extend(splitter.finish());
            let mut expected: Vec<_> = text.split('\n').collect();
            if expected.last() == Some(&"") { expected.pop(); }
            prop_assert_eq!(lines, expected);
        }
    }
}
