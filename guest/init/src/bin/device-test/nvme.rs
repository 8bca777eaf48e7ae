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

/// A disk, by the name its driver gave it.
pub struct Disk {
    name: String,
    path: String,
    /// In bytes.
    pub size: u64,
}

impl Disk {
    /// Waits for the disk that the option `nvme` names.
    pub fn find(options: &Options) -> Result<Self, Failure> {
        let name = options.text("nvme").unwrap_or("nvme0n1").to_owned();
        let path = format!("/dev/{name}");
        sysfs::wait_for(&format!("there is no {path}"), || Ok(Path::new(&path).exists().then_some(())))?;
        let (_, size) = direct::open(&path, false).map_err(Failure::at(format!("opening {path}")))?;
        Ok(Self { name, path, size })
    }

    /// Opens it past the page cache.
    pub fn open(&self, write: bool) -> Result<File, Failure> {
        let opened = direct::open(&self.path, write);
        opened.map(|(file, _)| file).map_err(Failure::at(format!("opening {}", self.path)))
    }

    /// A file that stands for a disk.
    #[cfg(test)]
    pub fn of_file(path: &Path, size: u64) -> Self {
        Self { name: "nvme0n1".into(), path: path.display().to_string(), size }
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

    #[test]
    fn blocks_are_of_the_second_half_and_repeat() {
        let disk = Disk::of_file(Path::new("/none"), 8 << 20);
        let blocks = disk.chosen_blocks(64, 1);
        assert_eq!(blocks.len(), 64);
        assert!(blocks.iter().all(|block| (1024..2048).contains(block)));
        assert_eq!(blocks, disk.chosen_blocks(64, 1));
        assert_ne!(blocks, disk.chosen_blocks(64, 2));
        assert!(
            Disk::of_file(Path::new("/none"), 16 << 10).chosen_blocks(64, 1).len() < 64,
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
        let disk = Disk::of_file(&path, content.len() as u64);
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
