//! Requests against real files, through the transport.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::{Block, BlockCounters};
use crate::config::{DiskConfig, DiskFormat, DiskIo};
use crate::virtio::test_driver::Buffer;
use crate::virtio::test_machine::{BUFFERS, MEMORY, TestMachine, TestQueue, readable, writable};

const SIZE: usize = 4 << 20;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct TestDisk {
    _directory: TempDir,
    path: PathBuf,
    contents: Vec<u8>,
}

impl TestDisk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let contents: Vec<u8> =
            (0..SIZE as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(&path, &contents).unwrap();
        Self { _directory: directory, path, contents }
    }

    fn machine(&self, io: DiskIo, read_only: bool) -> (TestMachine, Arc<BlockCounters>) {
        let (id, path) = ("data".to_owned(), self.path.clone());
        let block = Block::new(&DiskConfig { id, path, format: DiskFormat::Raw, read_only, io }).unwrap();
        let counters = block.counters();
        (TestMachine::new(block), counters)
    }

    fn on_host(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    /// Has the host forget the file, so that reads must wait for the disk.
    fn drop_cache(&self) {
        let file = File::open(&self.path).unwrap();
        file.sync_all().unwrap();
        // SAFETY: plain integers and an open descriptor.
        let result = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}

fn put_header(machine: &TestMachine, at: u64, kind: u32, sector: u64) {
    machine.memory.write_obj(kind, GuestAddress(at)).unwrap();
    machine.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
    machine.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
}

/// One request with its header and status; returns the status and the length in the used ring.
fn request(
    machine: &TestMachine,
    queue: &mut TestQueue<'_>,
    kind: u32,
    sector: u64,
    data: &[Buffer],
) -> (u8, u32) {
    put_header(machine, HEADER, kind, sector);
    machine.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    let mut chain = vec![readable(HEADER, 16)];
    chain.extend_from_slice(data);
    chain.push(writable(STATUS, 1));
    let head = queue.send(&chain);
    let (used, length) = queue.wait();
    assert_eq!(used, head);
    (machine.memory.read_obj(GuestAddress(STATUS)).unwrap(), length)
}

fn bytes(machine: &TestMachine, at: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    machine.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
    data
}

#[test]
fn what_is_written_is_on_the_host_and_reads_back() {
    for io in [DiskIo::Sync, DiskIo::Auto] {
        let disk = TestDisk::new();
        let (machine, counters) = disk.machine(io, false);
        let mut queues = machine.start();
        let queue = &mut queues[0];
        assert_eq!(machine.read(machine.structure(4), 8), (SIZE / 512) as u64);

        let (status, length) = request(&machine, queue, VIRTIO_BLK_T_IN, 8, &[writable(DATA, 8192)]);
        assert_eq!((status, length), (OK, 8193));
        assert_eq!(bytes(&machine, DATA, 8192), disk.contents[4096..12288]);

        machine.memory.write_slice(&[0xab; 1536], GuestAddress(DATA)).unwrap();
        let pieces = [readable(DATA, 5), readable(DATA + 5, 1019), readable(DATA + 1024, 512)];
        assert_eq!(request(&machine, queue, VIRTIO_BLK_T_OUT, 3, &pieces), (OK, 1));
        assert_eq!(request(&machine, queue, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        let mut expected = disk.contents.clone();
        expected[1536..3072].fill(0xab);
        assert!(disk.on_host() == expected);
        let (status, _) = request(&machine, queue, VIRTIO_BLK_T_IN, 3, &[writable(DATA + 0x2000, 1536)]);
        assert_eq!((status, bytes(&machine, DATA + 0x2000, 1536)), (OK, vec![0xab; 1536]));
        assert_eq!(counters.reads.load(Ordering::Relaxed), 2);
        assert_eq!(counters.written_bytes.load(Ordering::Relaxed), 1536);
        assert_eq!(counters.flushes.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn many_cold_reads_at_once_are_all_right() {
    for io in [DiskIo::Auto, DiskIo::Sync] {
        let disk = TestDisk::new();
        let (machine, _) = disk.machine(io, true);
        let mut queues = machine.start();
        disk.drop_cache();
        // 64 requests of 64 KiB over the whole disk, in an order that defeats read-ahead.
        let place = |slot: u64| (slot * 37 % 64) * 128;
        let data = |slot: u64| 2 * BUFFERS + slot * 0x1_0000;
        assert!(data(64) <= MEMORY as u64);
        let mut slots = std::collections::HashMap::new();
        for slot in 0..64 {
            put_header(&machine, HEADER + slot * 32, VIRTIO_BLK_T_IN, place(slot));
            let head = queues[0]
                .driver
                .add(&[
                    readable(HEADER + slot * 32, 16),
                    writable(data(slot), 0x1_0000),
                    writable(HEADER + slot * 32 + 16, 1),
                ])
                .unwrap();
            slots.insert(head, slot);
        }
        queues[0].notify();
        for _ in 0..64 {
            let (head, length) = queues[0].wait();
            let slot = slots.remove(&head).unwrap();
            assert_eq!(length, 0x1_0001);
            let start = place(slot) as usize * 512;
            assert!(bytes(&machine, data(slot), 0x1_0000) == disk.contents[start..start + 0x1_0000]);
        }
    }
}

#[test]
fn a_reset_in_the_middle_waits_for_what_is_in_flight() {
    let disk = TestDisk::new();
    let (machine, _) = disk.machine(DiskIo::Auto, false);
    for _ in 0..10 {
        let mut queues = machine.start();
        disk.drop_cache();
        for slot in 0..32 {
            put_header(&machine, HEADER + slot * 32, VIRTIO_BLK_T_IN, slot * 200);
            let buffers = [
                readable(HEADER + slot * 32, 16),
                writable(DATA, 0x1_0000),
                writable(HEADER + slot * 32 + 16, 1),
            ];
            queues[0].driver.add(&buffers).unwrap();
        }
        queues[0].notify();
        machine.set_status(0);
        // The buffers are the driver's again: nothing may change them any more.
        machine.memory.write_slice(&[0x5a; 0x1_0000], GuestAddress(DATA)).unwrap();
        disk.drop_cache();
        assert!(bytes(&machine, DATA, 0x1_0000).iter().all(|byte| *byte == 0x5a));
    }
    let mut queues = machine.start();
    assert_eq!(request(&machine, &mut queues[0], VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]), (OK, 513));
}

#[test]
fn a_paused_disk_touches_nothing_and_misses_nothing() {
    let disk = TestDisk::new();
    let (machine, counters) = disk.machine(DiskIo::Auto, false);
    let mut queues = machine.start();
    machine.device.lock().unwrap().pause();
    put_header(&machine, HEADER, VIRTIO_BLK_T_IN, 0);
    queues[0].send(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    assert_eq!(counters.reads.load(Ordering::Relaxed), 0);
    machine.device.lock().unwrap().resume();
    assert_eq!(queues[0].wait().1, 513);
    machine.device.lock().unwrap().pause();
    machine.set_status(0);
    assert_eq!(machine.status(), 0, "a paused device can be reset");
}

#[test]
fn requests_beyond_the_disk_or_malformed_fail_alone() {
    let disk = TestDisk::new();
    let (machine, counters) = disk.machine(DiskIo::Auto, false);
    let mut queues = machine.start();
    let queue = &mut queues[0];
    let end = (SIZE / 512) as u64;
    let read = |length| [writable(DATA, length)];
    for (sector, length) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
        let (status, _) = request(&machine, queue, VIRTIO_BLK_T_IN, sector, &read(length));
        assert_eq!(status, ERROR, "{length} bytes at sector {sector}");
    }
    assert_eq!(request(&machine, queue, VIRTIO_BLK_T_IN, end - 1, &read(512)), (OK, 513));
    assert_eq!(request(&machine, queue, 99, 0, &[]), (UNSUPPORTED, 1));
    assert_eq!(counters.errors.load(Ordering::Relaxed), 6);
    // No room for a status, no header, a buffer that is not memory, the wrong order.
    for chain in [
        vec![readable(HEADER, 16)],
        vec![readable(HEADER, 15), writable(STATUS, 1)],
        vec![readable(HEADER, 16), writable(MEMORY as u64 - 4, 512), writable(STATUS, 1)],
        vec![writable(STATUS, 1), readable(HEADER, 16)],
        vec![readable(HEADER, 16), writable(0, u32::MAX), writable(0, u32::MAX), writable(STATUS, 1)],
    ] {
        let head = queue.send(&chain);
        let (used, length) = queue.wait();
        assert_eq!(used, head);
        assert!(length <= 1);
    }
    assert_eq!(request(&machine, queue, VIRTIO_BLK_T_IN, 0, &read(512)), (OK, 513));
    assert!(disk.on_host() == disk.contents);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let disk = TestDisk::new();
    let (machine, _) = disk.machine(DiskIo::Auto, true);
    let mut queues = machine.start();
    let features = machine.device_features();
    assert_eq!(features >> VIRTIO_BLK_F_RO & 1, 1);
    assert_eq!(features >> VIRTIO_BLK_F_FLUSH & 1, 0);
    assert_eq!(features >> VIRTIO_BLK_F_DISCARD & 1, 0);
    let queue = &mut queues[0];
    assert_eq!(request(&machine, queue, VIRTIO_BLK_T_OUT, 0, &[readable(DATA, 512)]).0, ERROR);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        put_segment(&machine, 0, 8, 0);
        assert_eq!(request(&machine, queue, kind, 0, &[readable(DATA, 16)]).0, ERROR);
    }
    assert!(disk.on_host() == disk.contents);
}

fn put_segment(machine: &TestMachine, sector: u64, sectors: u32, flags: u32) {
    machine.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
    machine.memory.write_obj(sectors, GuestAddress(DATA + 8)).unwrap();
    machine.memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
}

#[test]
fn discard_gives_space_back_and_write_zeroes_zeroes() {
    let disk = TestDisk::new();
    let (machine, _) = disk.machine(DiskIo::Auto, false);
    let mut queues = machine.start();
    let queue = &mut queues[0];
    let blocks = || std::fs::metadata(&disk.path).unwrap().blocks();
    let before = blocks();
    put_segment(&machine, 2048, 2048, 0);
    assert_eq!(request(&machine, queue, VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, 16)]), (OK, 1));
    assert_eq!(before - blocks(), 2048, "a mebibyte less is allocated");
    for flags in [0, 1] {
        put_segment(&machine, 1, 7, flags);
        let (status, _) = request(&machine, queue, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[readable(DATA, 16)]);
        assert_eq!(status, OK);
    }
    let mut expected = disk.contents.clone();
    expected[512..4096].fill(0);
    expected[1 << 20..2 << 20].fill(0);
    assert!(disk.on_host() == expected);
    for (sector, sectors, flags, length, wanted) in [
        ((SIZE / 512) as u64, 1, 0, 16, ERROR),
        (u64::MAX, 2, 0, 16, ERROR),
        (0, u32::MAX, 0, 16, ERROR),
        (0, 1, 1, 16, UNSUPPORTED),
        (0, 1, 0, 15, ERROR),
        (0, 1, 0, 17 * 16, ERROR),
    ] {
        put_segment(&machine, sector, sectors, flags);
        let (status, _) = request(&machine, queue, VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, length)]);
        assert_eq!(status, wanted, "{sectors} sectors at {sector}, flags {flags}, {length} bytes");
    }
    assert!(disk.on_host() == expected);
}

#[test]
fn the_serial_is_the_id() {
    let disk = TestDisk::new();
    let (machine, _) = disk.machine(DiskIo::Auto, true);
    let mut queues = machine.start();
    let (status, length) = request(&machine, &mut queues[0], VIRTIO_BLK_T_GET_ID, 0, &[writable(DATA, 20)]);
    assert_eq!((status, length), (OK, 21));
    assert_eq!(&bytes(&machine, DATA, 20), b"data\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_writes_and_a_shrunk_file_fails() {
    let disk = TestDisk::new();
    let (machine, _) = disk.machine(DiskIo::Sync, false);
    let mut queues = machine.start_with(1 << 32);
    machine.memory.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
    let queue = &mut queues[0];
    assert_eq!(request(&machine, queue, VIRTIO_BLK_T_OUT, 9, &[readable(DATA, 512)]), (OK, 1));
    let file = OpenOptions::new().write(true).read(true).open(&disk.path).unwrap();
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 9 * 512).unwrap();
    assert_eq!(sector, [7; 512]);
    file.set_len(4096).unwrap();
    assert_eq!(request(&machine, queue, VIRTIO_BLK_T_IN, 8, &[writable(DATA, 512)]).0, ERROR);
}
