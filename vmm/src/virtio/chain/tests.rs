//! Chains as honest drivers make them, and as no driver should.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Chain, ChainError, ChainLimits};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const SIZE: u16 = 16;
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const HIGH: u64 = 0x10_0000;
const REGION: usize = 0x1_0000;

const LIMITS: ChainLimits = ChainLimits { descriptors: 8, readable: 0x4000, writable: 0x8000 };

/// Two regions with a hole between them.
fn memory() -> Arc<GuestMemoryMmap> {
    let ranges = [(GuestAddress(0), REGION), (GuestAddress(HIGH), REGION)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

#[derive(Clone, Copy, Debug)]
struct Descriptor(u64, u32, u16, u16);

fn put(memory: &GuestMemoryMmap, at: u64, descriptors: &[Descriptor]) {
    for (place, Descriptor(address, len, flags, next)) in (at..).step_by(16).zip(descriptors) {
        memory.write_obj(*address, GuestAddress(place)).unwrap();
        memory.write_obj(*len, GuestAddress(place + 8)).unwrap();
        memory.write_obj(*flags, GuestAddress(place + 12)).unwrap();
        memory.write_obj(*next, GuestAddress(place + 14)).unwrap();
    }
}

/// Loads the chain that starts at descriptor 0.
fn load(memory: &Arc<GuestMemoryMmap>, chain: &mut Chain) -> Result<(), ChainError> {
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    memory.write_obj(0u16, GuestAddress(AVAILABLE + 4)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let descriptors = queue.iter(&**memory).unwrap().next().unwrap();
    chain.load(memory, descriptors, &LIMITS)
}

fn loaded(descriptors: &[Descriptor]) -> Result<Chain, ChainError> {
    let memory = memory();
    put(&memory, TABLE, descriptors);
    let mut chain = Chain::new();
    load(&memory, &mut chain).map(|()| chain)
}

#[test]
fn both_streams_cross_buffers_in_order() {
    let memory = memory();
    memory.write_slice(b"abcdef", GuestAddress(0x2000)).unwrap();
    memory.write_slice(b"ghi", GuestAddress(HIGH)).unwrap();
    put(
        &memory,
        TABLE,
        &[
            Descriptor(0x2000, 6, NEXT, 1),
            Descriptor(HIGH, 3, NEXT, 2),
            Descriptor(0x3000, 2, NEXT | WRITE, 3),
            Descriptor(0x3002, 0, NEXT | WRITE, 4),
            Descriptor(HIGH + 0x100, 4, WRITE, 0),
        ],
    );
    let mut chain = Chain::new();
    load(&memory, &mut chain).unwrap();
    assert_eq!((chain.readable.remaining(), chain.writable.remaining()), (9, 6));
    assert_eq!(chain.readable.read_obj::<u32>().unwrap().to_le_bytes(), *b"abcd");
    chain.readable.skip(1);
    let mut rest = Vec::new();
    chain.readable.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"fghi");
    assert!(chain.readable.read_obj::<u8>().is_err(), "there is no more");
    assert!(chain.writable.reserve_last_byte());
    chain.writable.write_all(b"12345").unwrap();
    assert!(chain.writable.write_all(b"6").is_err(), "the last byte is set aside");
    assert!(chain.writable.write_last_byte(b'!') && !chain.writable.write_last_byte(b'?'));
    assert_eq!(chain.writable.written(), 5);
    let mut written = [0; 4];
    memory.read_slice(&mut written, GuestAddress(HIGH + 0x100)).unwrap();
    assert_eq!(&written, b"345!");
}

#[test]
fn files_move_straight_to_and_from_the_buffers() {
    let memory = memory();
    memory.write_slice(b"hello", GuestAddress(0x2000)).unwrap();
    put(&memory, TABLE, &[Descriptor(0x2000, 5, NEXT, 1), Descriptor(0x3000, 64, WRITE, 0)]);
    let mut chain = Chain::new();
    load(&memory, &mut chain).unwrap();
    let file = tempfile::tempfile().unwrap();
    assert_eq!(chain.readable.pwritev2_to(file.as_fd(), 10, 0).unwrap(), 5);
    assert_eq!(chain.readable.remaining(), 0);
    assert_eq!(chain.writable.preadv2_from(file.as_fd(), 12, 0).unwrap(), 3);
    assert_eq!((chain.writable.written(), chain.writable.remaining()), (3, 61));
    let mut read = [0; 3];
    memory.read_slice(&mut read, GuestAddress(0x3000)).unwrap();
    assert_eq!(&read, b"llo");
    assert!(chain.writable.preadv2_from(file.as_fd(), u64::MAX, 0).is_err());
}

#[test]
fn a_chain_outlives_everything_but_its_memory() {
    let mut chain = loaded(&[Descriptor(0x2000, 4, WRITE, 0)]).unwrap();
    // The only other reference to guest memory is gone.
    chain.writable.write_all(b"safe").unwrap();
}

#[test]
fn what_breaks_the_rules_is_refused() {
    let cases: [(&[Descriptor], ChainError); 9] = [
        (&[Descriptor(0x2000, 1, NEXT, 0)], ChainError::TooManyDescriptors(8)),
        (&[Descriptor(0x2000, 1, NEXT, 16)], ChainError::Endless),
        (&[Descriptor(0x2000, 0x4001, 0, 0)], ChainError::TooManyBytes(0x4000)),
        (
            &[Descriptor(0x2000, 0x8000, WRITE | NEXT, 1), Descriptor(0x2000, u32::MAX, WRITE, 0)],
            ChainError::Endless,
        ),
        (
            &[Descriptor(0x2000, 0x8000, WRITE | NEXT, 1), Descriptor(0x2000, 1, WRITE, 0)],
            ChainError::TooManyBytes(0x8000),
        ),
        (&[Descriptor(0x2000, 1, WRITE | NEXT, 1), Descriptor(0x2000, 1, 0, 0)], ChainError::Order),
        (
            &[Descriptor(REGION as u64 - 1, 2, 0, 0)],
            ChainError::NotMemory { address: REGION as u64 - 1, len: 2 },
        ),
        (&[Descriptor(u64::MAX, 2, 0, 0)], ChainError::NotMemory { address: u64::MAX, len: 2 }),
        (&[Descriptor(0x2000, 17, INDIRECT, 0)], ChainError::Endless),
    ];
    for (descriptors, error) in cases {
        assert_eq!(loaded(descriptors).err(), Some(error), "{descriptors:?}");
    }
}

#[test]
fn an_indirect_table_counts_as_its_descriptors() {
    let memory = memory();
    put(&memory, TABLE, &[Descriptor(0x5000, 3 * 16, INDIRECT, 0)]);
    let inner =
        [Descriptor(0x2000, 8, NEXT, 1), Descriptor(0x2100, 8, NEXT, 2), Descriptor(0x2200, 8, WRITE, 0)];
    put(&memory, 0x5000, &inner);
    let mut chain = Chain::new();
    load(&memory, &mut chain).unwrap();
    assert_eq!((chain.readable.remaining(), chain.writable.remaining()), (16, 8));
    let mut long = vec![Descriptor(0x2000, 1, NEXT, 0); 9];
    for (next, descriptor) in (1..).zip(&mut long) {
        descriptor.3 = next;
    }
    put(&memory, 0x5000, &long);
    put(&memory, TABLE, &[Descriptor(0x5000, 9 * 16, INDIRECT, 0)]);
    assert_eq!(load(&memory, &mut chain), Err(ChainError::TooManyDescriptors(8)));
    put(&memory, 0x5000, &[Descriptor(0x5000, 16, INDIRECT, 0)]);
    assert_eq!(load(&memory, &mut chain), Err(ChainError::Endless), "a table in a table");
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![0..REGION as u64, HIGH - 0x100..HIGH + REGION as u64 + 0x100, any::<u64>(),];
    let len = prop_oneof![0u32..0x100, 0u32..0x1_0000, any::<u32>()];
    let flags = prop_oneof![3 => 0u16..4, 1 => any::<u16>()];
    (address, len, flags, 0..SIZE + 2)
        .prop_map(|(address, len, flags, next)| Descriptor(address, len, flags, next))
}

proptest! {
    /// Whatever lies in guest memory: limits hold, and streams stay inside guest memory.
    #[test]
    fn random_chains_are_bounded(
        table in proptest::collection::vec(descriptor(), usize::from(SIZE)),
        indirect in proptest::collection::vec(descriptor(), 12),
        split in 0usize..0x9000,
    ) {
        let memory = memory();
        put(&memory, 0x5000, &indirect);
        put(&memory, TABLE, &table);
        let mut chain = Chain::new();
        if load(&memory, &mut chain).is_err() {
            prop_assert_eq!(chain.readable.remaining() + chain.writable.remaining(), 0);
            return Ok(());
        }
        let (readable, writable) = (chain.readable.remaining(), chain.writable.remaining());
        prop_assert!(readable <= LIMITS.readable && writable <= LIMITS.writable);
        prop_assert!(chain.readable.iovecs().len() <= 2 * LIMITS.descriptors);
        let total = |iovecs: &[libc::iovec]| iovecs.iter().map(|iovec| iovec.iov_len).sum::<usize>();
        prop_assert_eq!(total(chain.writable.iovecs()), writable);
        chain.writable.advance(split);
        prop_assert_eq!(total(chain.writable.iovecs()), writable.saturating_sub(split));
        let reserved = chain.writable.reserve_last_byte();
        prop_assert_eq!(reserved, split < writable);
        let mut data = Vec::new();
        chain.readable.read_to_end(&mut data).unwrap();
        prop_assert_eq!(data.len(), readable);
        let room = chain.writable.remaining();
        prop_assert_eq!(chain.writable.write(&vec![0xee; 0x9000]).unwrap(), room);
        prop_assert_eq!(chain.writable.write_last_byte(1), reserved);
    }
}
