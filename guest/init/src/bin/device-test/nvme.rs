//! An NVMe disk through the kernel's own driver:
//!
//! ```text
//! nvme_size BYTES
//! nvme_queues N               the kernel's hardware queues
//! nvme_sha256 BYTES SUM       of the disk's start, read on all queues at once
//! nvme_written N SUM          random blocks of its second half, each read back; SHA-256 of them in order
//! nvme_interrupts nvme0q1 N   since boot, for each of the device's MSI-X vectors
//! ```
//!
//! Which blocks are written and what is in them follows from the seed, so that they can be checked after a
//! reboot ([`verify`]), or by whoever has the disk's image: block I has I as its first word.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

use crate::Failure;
use crate::direct::{self, Aligned, BLOCK, Random};
use crate::interrupts;
use crate::memory::online_cpus;
use crate::options::Options;
use crate::sysfs;

const MIB: usize = 1 << 20;

/// How much one thread reads at once.
const CHUNK: usize = MIB;

struct Disk {
    name: String,
    path: String,
    size: u64,
}

impl Disk {
    /// Waits for the disk that the option `nvme` names.
    fn find(options: &Options) -> Result<Self, Failure> {
        let name = options.text("nvme").unwrap_or("nvme0n1").to_owned();
        let path = format!("/dev/{name}");
        sysfs::wait_for(&format!("there is no {path}"), || Ok(Path::new(&path).exists().then_some(())))?;
        let (_, size) = direct::open(&path, false).map_err(Failure::at(format!("opening {path}")))?;
        Ok(Self { name, path, size })
    }

    fn open(&self, write: bool) -> Result<File, Failure> {
        let opened = direct::open(&self.path, write);
        opened.map(|(file, _)| file).map_err(Failure::at(format!("opening {}", self.path)))
    }

    /// Blocks of the second half: chosen by the seed, each once.
    fn chosen_blocks(&self, count: usize, seed: u64) -> BTreeSet<u64> {
        let (first, end) = (self.size / 2 / BLOCK as u64, self.size / BLOCK as u64);
        let mut random = Random::new(seed);
        let mut blocks = BTreeSet::new();
        while blocks.len() < count.min((end - first) as usize / 2) {
            blocks.insert(first + random.next() % (end - first));
        }
        blocks
    }

    /// The controller's name, `nvme0` of `nvme0n1`.
    fn controller(&self) -> &str {
        self.name.rsplit_once('n').map_or(&self.name, |(controller, _)| controller)
    }
}

/// Reads, writes, and says which queues and interrupts took part.
pub fn exercise(options: &Options) -> Result<(), Failure> {
    let disk = Disk::find(options)?;
    println!("nvme_size {}", disk.size);
    let queues = format!("/sys/block/{}/mq", disk.name);
    let count = fs::read_dir(&queues).map_err(Failure::at(queues))?.count();
    println!("nvme_queues {count}");
    let length = match options.number::<u64>("mib")? {
        Some(mib) => disk.size.min(mib.saturating_mul(MIB as u64)),
        None => disk.size,
    };
    println!("nvme_sha256 {length} {}", sum(&disk, length)?);
    let (writes, seed) = writes(options)?;
    write(&disk, &disk.chosen_blocks(writes, seed), seed)?;
    verify(options)?;
    let text = fs::read_to_string("/proc/interrupts").map_err(Failure::at("/proc/interrupts"))?;
    for (action, count) in interrupts::counts(&text, &format!("{}q", disk.controller())) {
        println!("nvme_interrupts {action} {count}");
    }
    Ok(())
}

fn writes(options: &Options) -> Result<(usize, u64), Failure> {
    Ok((options.number("writes")?.unwrap_or(64), options.number("seed")?.unwrap_or(1)))
}

/// Checks the blocks that [`exercise`] wrote.
pub fn verify(options: &Options) -> Result<(), Failure> {
    let disk = Disk::find(options)?;
    let (writes, seed) = writes(options)?;
    let file = disk.open(false)?;
    let mut buffer = Aligned::new(BLOCK);
    let mut sum = Sha256::new();
    let blocks = disk.chosen_blocks(writes, seed);
    for index in &blocks {
        read_back(&file, buffer.get(), *index, seed)?;
        sum.update(buffer.get());
    }
    println!("nvme_written {} {:x}", blocks.len(), sum.finalize());
    Ok(())
}

fn read_back(file: &File, buffer: &mut [u8], index: u64, seed: u64) -> Result<(), Failure> {
    file.read_exact_at(buffer, index * BLOCK as u64)
        .map_err(Failure::at(format!("reading block {index}")))?;
    direct::difference(buffer, index, seed).map_or(Ok(()), |wrong| Err(Failure::wrong(wrong)))
}

/// Prints the mean time between reads of 4 KiB past the page cache, of which `depth` threads have one each under
/// way, and the median of what a read took: on an emulated machine some take long for reasons of whoever emulates.
/// The line before, `nvme_reading`, comes when the first of them is about to start: whoever times the lines sees
/// by another clock what this one says.
pub fn time_reads(options: &Options) -> Result<(), Failure> {
    let disk = Disk::find(options)?;
    let depth: u32 = options.number("depth")?.unwrap_or(1).clamp(1, 64);
    let reads: u32 = options.number("reads")?.unwrap_or(2000).max(depth).next_multiple_of(depth);
    // The first ones fault in what the rest has.
    read_at_random(&disk, 16, 1)?;
    println!("nvme_reading {reads}");
    let start = Instant::now();
    let mut took = thread::scope(|scope| {
        let disk = &disk;
        let reader = |seed| scope.spawn(move || read_at_random(disk, reads / depth, seed));
        let readers: Vec<_> = (1..=depth).map(|seed| reader(u64::from(seed))).collect();
        let join = |reader: thread::ScopedJoinHandle<'_, _>| {
            reader.join().unwrap_or_else(|_| Err(Failure::wrong("a reading thread panicked")))
        };
        let took: Result<Vec<Vec<Duration>>, Failure> = readers.into_iter().map(join).collect();
        took.map(|took| took.concat())
    })?;
    println!("nvme_4k_read_ns {}", start.elapsed().as_nanos() / u128::from(reads));
    took.sort_unstable();
    println!("nvme_4k_read_median_ns {}", took.get(took.len() / 2).map_or(0, Duration::as_nanos));
    Ok(())
}

/// What each of the reads took.
fn read_at_random(disk: &Disk, reads: u32, seed: u64) -> Result<Vec<Duration>, Failure> {
    let file = disk.open(false)?;
    let mut buffer = Aligned::new(BLOCK);
    let mut random = Random::new(seed);
    let blocks = (disk.size / BLOCK as u64).max(1);
    let mut read = || {
        let index = random.next() % blocks;
        let start = Instant::now();
        file.read_exact_at(buffer.get(), index * BLOCK as u64)
            .map_err(Failure::at(format!("reading block {index}")))?;
        Ok(start.elapsed())
    };
    (0..reads).map(|_| read()).collect()
}

/// Makes the calling thread use one CPU, and so one of the disk's queues.
fn pin(cpu: usize) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    let result = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    result.map_err(Failure::at(format!("moving to CPU {cpu}")))
}

/// SHA-256 of the first `length` bytes: a thread a CPU reads every so many-th chunk, one adds them up in order.
fn sum(disk: &Disk, length: u64) -> Result<String, Failure> {
    let cpus = online_cpus();
    let chunks = length.div_ceil(CHUNK as u64);
    thread::scope(|scope| {
        let mut sources = Vec::new();
        for (number, &cpu) in (0_u64..).zip(&cpus) {
            // Two chunks under way: one being added up, the next being read.
            let (to, from) = sync_channel(1);
            let step = cpus.len();
            scope.spawn(move || {
                let result = read_chunks(disk, length, cpu, (number..chunks).step_by(step), |chunk| {
                    // Without a receiver another thread has failed.
                    to.send(Ok(chunk)).is_ok()
                });
                if let Err(failure) = result {
                    let _ = to.send(Err(failure));
                }
            });
            sources.push(from);
        }
        let mut sum = Sha256::new();
        for chunk in 0..chunks {
            let source = &sources[chunk as usize % sources.len()];
            let bytes = source.recv().map_err(|_| Failure::wrong("a reading thread ended early"))??;
            sum.update(bytes);
        }
        Ok(format!("{:x}", sum.finalize()))
    })
}

fn read_chunks(
    disk: &Disk,
    length: u64,
    cpu: usize,
    chunks: impl Iterator<Item = u64>,
    mut take: impl FnMut(Vec<u8>) -> bool,
) -> Result<(), Failure> {
    pin(cpu)?;
    let file = disk.open(false)?;
    let mut buffer = Aligned::new(CHUNK);
    for chunk in chunks {
        let at = chunk * CHUNK as u64;
        let len = (length - at).min(CHUNK as u64) as usize;
        let bytes = &mut buffer.get()[..len];
        file.read_exact_at(bytes, at).map_err(Failure::at(format!("reading {len} bytes at {at:#x}")))?;
        if !take(bytes.to_vec()) {
            break;
        }
    }
    Ok(())
}

/// Writes the blocks from all CPUs at once, each read back by its writer.
fn write(disk: &Disk, blocks: &BTreeSet<u64>, seed: u64) -> Result<(), Failure> {
    let cpus = online_cpus();
    thread::scope(|scope| {
        let start = |(number, &cpu): (usize, &usize)| {
            let own = blocks.iter().copied().skip(number).step_by(cpus.len());
            scope.spawn(move || write_blocks(disk, cpu, own, seed))
        };
        let writers: Vec<_> = cpus.iter().enumerate().map(start).collect();
        writers.into_iter().try_for_each(|writer| {
            writer.join().unwrap_or_else(|_| Err(Failure::wrong("a writing thread panicked")))
        })
    })
}

fn write_blocks(
    disk: &Disk,
    cpu: usize,
    blocks: impl Iterator<Item = u64>,
    seed: u64,
) -> Result<(), Failure> {
    pin(cpu)?;
    let file = disk.open(true)?;
    let mut buffer = Aligned::new(BLOCK);
    for index in blocks {
        direct::pattern(buffer.get(), index, seed);
        let at = index * BLOCK as u64;
        file.write_all_at(buffer.get(), at).map_err(Failure::at(format!("writing block {index}")))?;
        buffer.get().fill(0);
        read_back(&file, buffer.get(), index, seed)?;
    }
    file.sync_all().map_err(Failure::at("flushing the disk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &Path, size: u64) -> Disk {
        Disk { name: "nvme0n1".into(), path: path.display().to_string(), size }
    }

    #[test]
    fn blocks_are_of_the_second_half_and_repeat() {
        let disk = disk(Path::new("/none"), 8 << 20);
        let blocks = disk.chosen_blocks(64, 1);
        assert_eq!(blocks.len(), 64);
        assert!(blocks.iter().all(|block| (1024..2048).contains(block)));
        assert_eq!(blocks, disk.chosen_blocks(64, 1));
        assert_ne!(blocks, disk.chosen_blocks(64, 2));
        assert!(
            self::disk(Path::new("/none"), 16 << 10).chosen_blocks(64, 1).len() < 64,
            "a small disk ends it"
        );
        assert_eq!(disk.controller(), "nvme0");
    }

    #[test]
    fn sums_and_blocks_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        // Not a whole number of chunks.
        let content: Vec<u8> = (0_u32..(5 << 19)).map(|index| (index / 1000) as u8).collect();
        fs::write(&path, &content).unwrap();
        let disk = disk(&path, content.len() as u64);
        let Ok(total) = sum(&disk, disk.size) else {
            // Some filesystems, tmpfs on older kernels among them, have no direct I/O.
            assert!(direct::open(&disk.path, false).is_err());
            return;
        };
        assert_eq!(total, format!("{:x}", Sha256::digest(&content)));
        write(&disk, &disk.chosen_blocks(8, 3), 3).unwrap();
        let options =
            Options::of_arguments(["nvme-verify", "writes=8", "seed=3"].map(String::from).into_iter());
        assert!(options.is_ok());
        let file = disk.open(false).unwrap();
        let mut buffer = Aligned::new(BLOCK);
        for index in disk.chosen_blocks(8, 3) {
            read_back(&file, buffer.get(), index, 3).unwrap();
            assert!(read_back(&file, buffer.get(), index, 4).is_err());
        }
    }
}
