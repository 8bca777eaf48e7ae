//! How fast an NVMe disk answers random reads of 4 KiB, which go past the page cache and through `io_uring`:
//!
//! ```text
//! nvme_reading N              the first of N reads is about to start
//! nvme_4k_read_ns N           the mean time from one read's end to the next's
//! nvme_4k_read_median_ns N    the median of the same over rounds of as many reads as are under way at once
//! ```
//!
//! One thread keeps `depth` reads under way. Each time it takes all that have ended and starts as many anew, with
//! one system call for both, which is how programs that read much do it (fio's t/io_uring among them). With a depth
//! of 1 a round is a read, and its time is what it took. The median is there because on an emulated machine some
//! rounds take long for reasons of whoever emulates.
//!
//! Whoever times the lines as they come sees by another clock what this one says.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};

use crate::Failure;
use crate::direct::{Aligned, BLOCK, Random};
use crate::nvme::Disk;
use crate::options::Options;

/// No disk wants more from one thread.
const MOST: u32 = 256;

/// Reads that fault in what the others have, before time is taken.
const WARMING: u32 = 16;

/// Does `reads` reads and prints how fast they were.
pub fn time(options: &Options) -> Result<(), Failure> {
    let disk = Disk::find(options)?;
    let depth: u32 = options.number("depth")?.unwrap_or(1).clamp(1, MOST);
    let count: u32 = options.number("reads")?.unwrap_or(2000).max(depth).next_multiple_of(depth);
    let mut reads = Reads::new(&disk, depth)?;
    reads.run(WARMING.max(depth))?;
    println!("nvme_reading {count}");
    let start = Instant::now();
    let mut rounds = reads.run(count)?;
    println!("nvme_4k_read_ns {}", start.elapsed().as_nanos() / u128::from(count));
    rounds.sort_unstable();
    println!("nvme_4k_read_median_ns {}", rounds.get(rounds.len() / 2).copied().unwrap_or_default());
    Ok(())
}

/// A disk that is read from, always `depth` blocks at a time.
struct Reads {
    uring: IoUring,
    file: File,
    /// A block for each read under way. Never freed: the kernel writes there until a read ends, whatever becomes
    /// of this value before that.
    buffers: &'static mut [u8],
    /// Of the disk.
    blocks: u64,
    random: Random,
    depth: u32,
}

impl Reads {
    fn new(disk: &Disk, depth: u32) -> Result<Self, Failure> {
        let uring = uring(depth).map_err(Failure::at("making an io_uring"))?;
        let buffers = Box::leak(Box::new(Aligned::new(depth as usize * BLOCK))).get();
        let blocks = (disk.size / BLOCK as u64).max(1);
        Ok(Self { uring, file: disk.open(false)?, buffers, blocks, random: Random::new(1), depth })
    }

    /// Reads `count` blocks; the nanoseconds a read took in each round.
    fn run(&mut self, count: u32) -> Result<Vec<u128>, Failure> {
        let mut rounds = Vec::with_capacity((count / self.depth) as usize);
        let mut ended_slots = Vec::with_capacity(self.depth as usize);
        let (mut started, mut ended) = (self.depth.min(count), 0);
        let (mut round_start, mut round_ended) = (Instant::now(), 0);
        (0..started).try_for_each(|slot| self.start(slot))?;
        while ended < count {
            self.wait()?;
            for completion in self.uring.completion() {
                let slot = completion.user_data() as u32;
                check(completion.result())?;
                ended_slots.push(slot);
            }
            let now = Instant::now();
            let fresh = ended_slots.len() as u32;
            (ended, round_ended) = (ended + fresh, round_ended + fresh);
            if round_ended >= self.depth {
                rounds.push((now - round_start).as_nanos() / u128::from(round_ended));
                (round_start, round_ended) = (now, 0);
            }
            for slot in ended_slots.drain(..) {
                if started < count {
                    self.start(slot)?;
                    started += 1;
                }
            }
        }
        Ok(rounds)
    }

    /// Queues a read of some block into a buffer.
    fn start(&mut self, slot: u32) -> Result<(), Failure> {
        let at = self.random.next() % self.blocks * BLOCK as u64;
        let first = slot as usize * BLOCK;
        let buffer = &mut self.buffers[first..first + BLOCK];
        let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), buffer.as_mut_ptr(), BLOCK as u32)
            .offset(at)
            .build()
            .user_data(u64::from(slot));
        // SAFETY: the buffer is never freed, and no other read has it: this slot's last one has ended.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.map_err(|_| Failure::wrong("the submission queue is full"))
    }

    /// Hands what is queued to the kernel, until at least one read has ended.
    fn wait(&mut self) -> Result<(), Failure> {
        loop {
            match self.uring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::at("waiting for reads")(error)),
            }
        }
    }
}

/// Completions are made where they are waited for, not in the midst of other system calls.
fn uring(depth: u32) -> io::Result<IoUring> {
    IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(depth)
}

/// What became of a read.
fn check(result: i32) -> Result<(), Failure> {
    match usize::try_from(result) {
        Ok(BLOCK) => Ok(()),
        Ok(short) => Err(Failure::wrong(format!("a read of {BLOCK} bytes returned {short}"))),
        Err(_) => Err(Failure::at("reading a block")(io::Error::from_raw_os_error(-result))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_read_ends_and_short_ones_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![7; 64 * BLOCK]).unwrap();
        let disk = |blocks: usize| Disk::of_file(&path, (blocks * BLOCK) as u64);
        let Ok(mut reads) = Reads::new(&disk(64), 8) else {
            // Some kernels have no io_uring, some filesystems no direct I/O.
            assert!(uring(8).is_err() || disk(64).open(false).is_err());
            return;
        };
        // Rounds are longer where more than 8 end in one.
        assert!((1..=10).contains(&reads.run(80).unwrap().len()));
        assert!(reads.buffers.iter().all(|byte| *byte == 7), "each buffer was read into");
        assert_eq!(
            Reads::new(&disk(64), 1).unwrap().run(5).unwrap().len(),
            5,
            "one at a time, each is a round"
        );
        // A disk that is said to be larger than it is.
        let mut beyond = Reads::new(&disk(1 << 20), 4).unwrap();
        assert!(beyond.run(64).unwrap_err().to_string().contains("returned 0"));
    }

    #[test]
    fn a_failed_read_says_why() {
        assert!(check(BLOCK as i32).is_ok());
        let text = check(-libc::EIO).unwrap_err().to_string();
        assert!(text.contains("reading a block") && text.contains("os error 5"), "{text}");
    }
}
