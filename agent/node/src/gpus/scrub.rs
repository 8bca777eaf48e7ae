//! Proves that a device's memory holds nothing of its last user.
//!
//! What shows of a device's memory in its prefetchable BARs is overwritten with zeros, all of it, and then
//! read back, all of it. Registers (BARs that are not prefetchable) are never written, nor are the BARs of
//! classes whose prefetchable BARs are registers all the same, as network cards have them.
//!
//! Some devices keep their memory closed after a reset until their own driver has opened it: NVIDIA's BAR 1
//! goes through page tables that are not there yet. Such a BAR takes no value at any of many places. Then a
//! reset is all that can be done, and the [`Proof`] says so. A BAR that held values once has to hold them
//! every time, and one that holds some of them is broken: both end in quarantine.
//!
//! A process that touches a mapping of a device that was pulled is killed (SIGBUS). So the work is done in a
//! child: if it dies, nothing is proven, and the agent lives.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lathe_api::{HostPciAddress, MemorySize};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::host::PciHost;
use crate::pci::{self, Resource};

/// Mapped and worked on at a time.
const WINDOW: u64 = 64 << 20;

/// Copied at a time. Small enough for the C library to use plain vector moves, which become one bus
/// transaction each; its loop for large copies reads uncached memory byte by byte.
const PIECE: usize = 512;

/// Places at which a BAR is tried before it is taken for memory.
const SAMPLES: u64 = 256;

/// One reader waits for each answer on the bus; this many wait side by side.
const MAX_THREADS: usize = 8;

/// What the slowest device must manage; a child that takes longer is killed.
const SLOWEST_BYTES_PER_SECOND: u64 = 16 << 20;

/// A memory BAR that shows a device's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// 0 to 5.
    pub index: u8,
    /// Bytes.
    pub size_bytes: u64,
}

/// What came of one BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BarScrub {
    /// All of it was written, and read back as zeros.
    Zero,
    /// It took no value at any of many places.
    Closed,
}

/// What is known of a device's memory once it is reset and scrubbed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Bytes that read back as zeros.
    pub zero_bytes: u64,
    /// How much memory it has, where something told.
    pub memory_bytes: Option<u64>,
    /// BARs that are closed until the device's driver opens them.
    pub closed: Vec<u8>,
    /// How long it took.
    pub milliseconds: u64,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = MemorySize::from_bytes;
        match (self.zero_bytes, self.memory_bytes) {
            (0, _) => f.write_str("reset only: ")?,
            (zero, Some(all)) if zero < all => {
                return write!(f, "memory proven zero in part: {} of {}", size(zero), size(all));
            }
            (zero, _) => write!(f, "memory proven zero: {}", size(zero))?,
        }
        match (self.zero_bytes, self.closed.first()) {
            (0, None) => f.write_str("no memory BAR"),
            (0, Some(bar)) => write!(f, "memory BAR {bar} is closed until the device's driver opens it"),
            (_, Some(bar)) => write!(f, " (BAR {bar} is closed until the device's driver opens it)"),
            (_, None) => Ok(()),
        }
    }
}

/// Why nothing was proven.
#[derive(Debug, thiserror::Error)]
pub enum ScrubError {
    /// Sysfs.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Old data, a broken cell, or a device that was pulled.
    #[error("BAR {bar}: the memory at offset {offset:#x} does not read back as the zero written to it")]
    NotZero {
        /// The BAR.
        bar: u8,
        /// Where.
        offset: u64,
    },
    /// Neither memory nor closed.
    #[error("BAR {bar} holds what is written to it at {held} of {tried} places")]
    Mixed {
        /// The BAR.
        bar: u8,
        /// Places that held a value.
        held: u64,
        /// All places.
        tried: u64,
    },
    /// It could be proven before.
    #[error("BAR {0} held memory before and does not take a value now")]
    ClosedNow(u8),
    /// The child's end.
    #[error("scrubbing {path} ended without a result: {why}")]
    Child {
        /// The BAR's file.
        path: PathBuf,
        /// How it ended.
        why: String,
    },
    /// It does not answer.
    #[error("the device does not answer any more")]
    Gone,
}

impl ScrubError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn in_bar(self, index: u8) -> Self {
        match self {
            Self::NotZero { offset, .. } => Self::NotZero { bar: index, offset },
            Self::Mixed { held, tried, .. } => Self::Mixed { bar: index, held, tried },
            other => other,
        }
    }
}

/// The BARs that show memory, from the file `resource`.
pub fn memory_bars(class: u32, resource: &str) -> Vec<Bar> {
    // Display, processing accelerators, and memory as such (shared memory devices).
    if !matches!(class >> 16, 0x03 | 0x12 | 0x05) {
        return Vec::new();
    }
    // One without an address is not decoded; one smaller than a page cannot be mapped by itself.
    let usable = |bar: &Resource| {
        bar.start != 0 && bar.start.is_multiple_of(4096) && bar.size_bytes.is_multiple_of(4096)
    };
    let shown = pci::resources(resource).filter(|bar| bar.is_prefetchable() && usable(bar));
    shown.map(|Resource { index, size_bytes, .. }| Bar { index, size_bytes }).collect()
}

/// Scrubs the memory of a function that no driver has. `held_before` says whether its memory could be
/// proven at an earlier time.
///
/// # Errors
/// When its memory is not proven zero although it could be.
pub fn scrub(
    host: &dyn PciHost,
    function: HostPciAddress,
    held_before: bool,
    memory_bytes: Option<u64>,
) -> Result<Proof, ScrubError> {
    let begun = Instant::now();
    let mut proof = Proof { zero_bytes: 0, memory_bytes, closed: Vec::new(), milliseconds: 0 };
    let read = |name: &str| host.read(function, name).map_err(ScrubError::io(format!("read {name}")));
    let class = pci::class(&read("class")?);
    let bars = memory_bars(class, &read("resource")?);
    if !bars.is_empty() {
        let awake = Awake::new(host, function)?;
        for bar in bars {
            match host.scrub(function, bar).map_err(|error| error.in_bar(bar.index))? {
                BarScrub::Zero => proof.zero_bytes += bar.size_bytes,
                BarScrub::Closed if held_before => return Err(ScrubError::ClosedNow(bar.index)),
                BarScrub::Closed => proof.closed.push(bar.index),
            }
        }
        awake.end()?;
    }
    // A device that was pulled reads as all ones, which is not zero; but a closed BAR may do that too.
    if !host.answers(function) {
        return Err(ScrubError::Gone);
    }
    proof.milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(proof)
}

/// A function that is powered up and decodes its memory BARs, for as long as this exists.
struct Awake<'a> {
    host: &'a dyn PciHost,
    function: HostPciAddress,
    power: Option<String>,
    ended: bool,
}

impl<'a> Awake<'a> {
    fn new(host: &'a dyn PciHost, function: HostPciAddress) -> Result<Self, ScrubError> {
        let power = host.read(function, "power/control").ok();
        let awake = Self { host, function, power, ended: false };
        if awake.power.is_some() {
            host.write(function, "power/control", "on").map_err(ScrubError::io("power the device up"))?;
        }
        // The kernel counts. A count above zero is a crashed agent's: no driver is bound.
        if host.read(function, "enable").is_ok_and(|count| count == "0") {
            host.write(function, "enable", "1").map_err(ScrubError::io("enable the device"))?;
        }
        Ok(awake)
    }

    fn end(mut self) -> Result<(), ScrubError> {
        self.ended = true;
        self.restore().map_err(ScrubError::io("disable the device"))
    }

    fn restore(&self) -> std::io::Result<()> {
        // A few crashes at most; a count that does not go down is not ours.
        for _ in 0..16 {
            if self.host.read(self.function, "enable")? == "0" {
                break;
            }
            self.host.write(self.function, "enable", "0")?;
        }
        match &self.power {
            Some(power) => self.host.write(self.function, "power/control", power),
            None => Ok(()),
        }
    }
}

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        if !self.ended && !std::thread::panicking() {
            // The error that led here is the one to tell.
            let _ = self.restore();
        }
    }
}

/// What the child prints.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done(BarScrub),
    NotZero { offset: u64 },
    Mixed { held: u64, tried: u64 },
    Failed(String),
}

/// Runs [`child`] in a process of its own, for as long as the slowest device may take.
///
/// # Errors
/// When it does not say that the BAR is zero or closed.
pub(super) fn in_child(path: &Path, size_bytes: u64) -> Result<BarScrub, ScrubError> {
    let failed = |why: String| ScrubError::Child { path: path.to_owned(), why };
    let mut command = Command::new("/proc/self/exe");
    command.args(["gpus", "scrub-bar"]).arg(path).arg(size_bytes.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    let end = Instant::now() + Duration::from_secs(60 + size_bytes / SLOWEST_BYTES_PER_SECOND);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) => {
                let _ = child.kill();
                // Not waited for: one that hangs in the kernel does not die either.
                return Err(failed("it was too slow and was killed".into()));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
    };
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        // Its one line fits the pipe.
        let _ = stdout.take(4096).read_to_string(&mut text);
    }
    match serde_json::from_str(&text) {
        Ok(Answer::Done(done)) if status.success() => Ok(done),
        Ok(Answer::NotZero { offset }) => Err(ScrubError::NotZero { bar: 0, offset }),
        Ok(Answer::Mixed { held, tried }) => Err(ScrubError::Mixed { bar: 0, held, tried }),
        Ok(Answer::Failed(why)) => Err(failed(why)),
        _ => Err(failed(status.to_string())),
    }
}

/// `lathe-agent gpus scrub-bar`: prints what came of it as a line of JSON.
pub fn child(path: &Path, size_bytes: u64) {
    let answer = match scrub_file(path, size_bytes) {
        Ok(done) => Answer::Done(done),
        Err(ScrubError::NotZero { offset, .. }) => Answer::NotZero { offset },
        Err(ScrubError::Mixed { held, tried, .. }) => Answer::Mixed { held, tried },
        Err(error) => Answer::Failed(error.to_string()),
    };
    println!("{}", serde_json::to_string(&answer).unwrap_or_default());
}

/// Scrubs what a file maps: a BAR, or in tests a plain file.
fn scrub_file(path: &Path, size_bytes: u64) -> Result<BarScrub, ScrubError> {
    let open = || OpenOptions::new().read(true).write(true).open(path);
    let file = open().map_err(ScrubError::io(format!("open {}", path.display())))?;
    let held = samples(&file, size_bytes)?;
    let tried = sample_offsets(size_bytes).count() as u64;
    match held {
        0 => return Ok(BarScrub::Closed),
        held if held < tried => return Err(ScrubError::Mixed { bar: 0, held, tried }),
        _ => {}
    }
    // All is written before any of it is read: memory that shows at two places cannot pass for clean.
    in_windows(&file, size_bytes, |window, _| fill(window))?;
    in_windows(&file, size_bytes, verify)?;
    Ok(BarScrub::Zero)
}

fn map(file: &File, offset: u64, size: u64) -> Result<MmapRegion, ScrubError> {
    let error =
        |why: String| ScrubError::Io { what: "map the BAR".into(), source: std::io::Error::other(why) };
    let file = file.try_clone().map_err(ScrubError::io("map the BAR"))?;
    let size = usize::try_from(size).map_err(|e| error(e.to_string()))?;
    MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(|e| error(e.to_string()))
}

/// Offsets of 8-byte words spread over the whole, the first and the last among them.
fn sample_offsets(size_bytes: u64) -> impl Iterator<Item = u64> {
    let words = size_bytes / 8;
    let count = SAMPLES.min(words);
    (0..count).map(move |index| {
        let last = u128::from(words - 1) * u128::from(index) / u128::from((count - 1).max(1));
        // At most `words - 1`.
        8 * u64::try_from(last).unwrap_or(0)
    })
}

/// At how many places the file holds what is written there. Two values a place, each other's complement,
/// so that a value that happens to be there counts for nothing.
fn samples(file: &File, size_bytes: u64) -> Result<u64, ScrubError> {
    let mut held = vec![true; sample_offsets(size_bytes).count()];
    let each = |offset: u64| {
        let page = offset & !4095;
        Ok::<_, ScrubError>((map(file, page, (size_bytes - page).min(4096))?, (offset - page) as usize))
    };
    for complement in [0, u64::MAX] {
        let value = |offset: u64| (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1) ^ complement;
        for offset in sample_offsets(size_bytes) {
            let (page, at) = each(offset)?;
            let _ = page.as_volatile_slice().write_obj(value(offset), at);
        }
        for (held, offset) in held.iter_mut().zip(sample_offsets(size_bytes)) {
            let (page, at) = each(offset)?;
            *held &= page.as_volatile_slice().read_obj::<u64>(at).is_ok_and(|found| found == value(offset));
        }
    }
    Ok(held.iter().filter(|held| **held).count() as u64)
}

/// Calls `work` with each window of the file and its offset, on several threads.
fn in_windows(
    file: &File,
    size_bytes: u64,
    work: impl Fn(&MmapRegion, u64) -> Result<(), ScrubError> + Sync,
) -> Result<(), ScrubError> {
    let next = AtomicU64::new(0);
    let run = || loop {
        let offset = next.fetch_add(WINDOW, Ordering::Relaxed);
        if offset >= size_bytes {
            return Ok(());
        }
        work(&map(file, offset, WINDOW.min(size_bytes - offset))?, offset)?;
    };
    let windows = usize::try_from(size_bytes.div_ceil(WINDOW)).unwrap_or(usize::MAX);
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..windows.min(cpus).min(MAX_THREADS)).map(|_| scope.spawn(run)).collect();
        let died = || ScrubError::Io { what: "scrub".into(), source: std::io::Error::other("a thread died") };
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(died())))
    })
}

fn fill(window: &MmapRegion) -> Result<(), ScrubError> {
    let memory = window.as_volatile_slice();
    for at in (0..window.size()).step_by(PIECE) {
        let zeros = &[0_u8; PIECE][..PIECE.min(window.size() - at)];
        memory
            .write_slice(zeros, at)
            .map_err(|e| ScrubError::Io { what: "write the BAR".into(), source: std::io::Error::other(e) })?;
    }
    Ok(())
}

fn verify(window: &MmapRegion, offset: u64) -> Result<(), ScrubError> {
    let memory = window.as_volatile_slice();
    let mut piece = [0_u8; PIECE];
    for at in (0..window.size()).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(window.size() - at)];
        memory
            .read_slice(piece, at)
            .map_err(|e| ScrubError::Io { what: "read the BAR".into(), source: std::io::Error::other(e) })?;
        if let Some(bad) = piece.iter().position(|byte| *byte != 0) {
            return Err(ScrubError::NotZero { bar: 0, offset: offset + (at + bad) as u64 });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn memory_that_holds_values_ends_as_zeros_to_its_last_byte() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let size = WINDOW + 3 * 4096;
        file.as_file().set_len(size).unwrap();
        for offset in [0, 77, WINDOW - 1, WINDOW, size - 1] {
            file.seek(SeekFrom::Start(offset)).unwrap();
            file.write_all(b"s").unwrap();
        }
        assert_eq!(scrub_file(file.path(), size).unwrap(), BarScrub::Zero);
        let mut all = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut all).unwrap();
        assert!(all.len() as u64 == size && all.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn one_byte_left_is_found_where_it_is() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let size = WINDOW + 2 * 4096;
        file.as_file().set_len(size).unwrap();
        in_windows(file.as_file(), size, verify).unwrap();
        file.seek(SeekFrom::Start(WINDOW + 4097)).unwrap();
        file.write_all(&[1]).unwrap();
        let error = in_windows(file.as_file(), size, verify).unwrap_err();
        assert!(matches!(error, ScrubError::NotZero { offset, .. } if offset == WINDOW + 4097), "{error}");
    }

    #[test]
    fn only_memory_is_written() {
        // An accelerator: registers, memory in two BARs' places, I/O ports, and a BAR without an address.
        let resource = "0x00000000c0000000 0x00000000c0ffffff 0x0000000000040200\n\
            0x0000007000000000 0x0000007fffffffff 0x000000000014220c\n\
            0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
            0x0000000000000000 0x0000000001ffffff 0x000000002014220c\n\
            0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
            0x000000000000c000 0x000000000000c07f 0x0000000000040101\n\
            0x00000000c1000000 0x00000000c107ffff 0x0000000000046200\n";
        assert_eq!(memory_bars(0x030200, resource), [Bar { index: 1, size_bytes: 64 << 30 }]);
        assert_eq!(memory_bars(0x120000, resource).len(), 1);
        // A network card's prefetchable BAR has its doorbells.
        assert_eq!(memory_bars(0x020000, resource), []);
    }

    #[test]
    fn the_proof_says_what_was_proven() {
        let proof = |zero_mib: u64, memory_mib: Option<u64>, closed: &[u8]| {
            Proof {
                zero_bytes: zero_mib << 20,
                memory_bytes: memory_mib.map(|mib| mib << 20),
                closed: closed.to_vec(),
                milliseconds: 1,
            }
            .to_string()
        };
        assert_eq!(proof(16, None, &[]), "memory proven zero: 16 MiB");
        assert_eq!(proof(16, Some(16), &[]), "memory proven zero: 16 MiB");
        assert_eq!(proof(256, Some(80 << 10), &[]), "memory proven zero in part: 256 MiB of 80 GiB");
        assert_eq!(proof(0, None, &[]), "reset only: no memory BAR");
        assert_eq!(
            proof(0, Some(80 << 10), &[1]),
            "reset only: memory BAR 1 is closed until the device's driver opens it"
        );
    }

    #[test]
    fn samples_reach_both_ends_of_any_size() {
        for size in [4096, 1 << 20, WINDOW + 8, 128 << 30] {
            let all: Vec<u64> = sample_offsets(size).collect();
            assert_eq!((all[0], *all.last().unwrap()), (0, size - 8));
            assert!(all.windows(2).all(|pair| pair[0] < pair[1] && pair[1] % 8 == 0));
        }
    }
}
