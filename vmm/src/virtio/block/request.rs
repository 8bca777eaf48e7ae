//! What a driver asks of a disk (virtio 1.2 §5.2.6), checked against the disk's size.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{ByteValued, Le32, Le64};

use super::disk::SECTOR;
use crate::virtio::chain::Chain;

/// Segments of a discard or write-zeroes request.
pub const MAX_SEGMENTS: u32 = 16;
/// Sectors of one such segment: 1 GiB. They are done while the queue waits.
pub const MAX_SEGMENT_SECTORS: u32 = 2 << 20;

/// `struct virtio_blk_req` up to its data.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

// SAFETY: plain integers without padding.
unsafe impl ByteValued for Header {}

/// `struct virtio_blk_discard_write_zeroes`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    sector: Le64,
    sectors: Le32,
    flags: Le32,
}

// SAFETY: plain integers without padding.
unsafe impl ByteValued for Segment {}

/// A range of the disk in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// For write-zeroes: the range need not stay allocated.
    pub unmap: bool,
}

/// Up to [`MAX_SEGMENTS`] ranges, without an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    list: [Extent; MAX_SEGMENTS as usize],
    len: usize,
}

impl Extents {
    /// The ranges.
    pub fn as_slice(&self) -> &[Extent] {
        &self.list[..self.len]
    }
}

/// A valid request. Its data is what the chain has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable buffers from this byte of the disk on.
    Read(u64),
    /// Store the readable buffers from this byte of the disk on.
    Write(u64),
    /// Make what was written so far durable.
    Flush,
    /// The serial number.
    GetId,
    /// The ranges' contents do not matter any more.
    Discard(Extents),
    /// The ranges shall read as zeros.
    WriteZeroes(Extents),
}

/// The status byte that ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or not possible on this disk.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// No such request.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What the disk lets the driver do.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Size of the disk.
    pub sectors: u64,
    /// Everything that changes the disk fails.
    pub read_only: bool,
}

impl Request {
    /// Takes the header off the chain and sets the status byte aside.
    ///
    /// # Errors
    /// The status with which the request ends at once.
    pub fn parse(chain: &mut Chain, rules: Rules) -> Result<Self, Status> {
        let malformed = |_: io::Error| Status::IoError;
        // Without room for a status there is no way to tell anything but the length.
        if !chain.writable.reserve_last_byte() {
            return Err(Status::IoError);
        }
        let header: Header = chain.readable.read_obj().map_err(malformed)?;
        let sector = u64::from(header.sector);
        let request = match u32::from(header.kind) {
            VIRTIO_BLK_T_IN => Self::Read(rules.data(sector, chain.writable.remaining())?),
            VIRTIO_BLK_T_OUT => Self::Write(rules.data(sector, chain.readable.remaining())?),
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_DISCARD => Self::Discard(rules.segments(chain, 0)?),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                Self::WriteZeroes(rules.segments(chain, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?)
            }
            _ => return Err(Status::Unsupported),
        };
        let changes = matches!(request, Self::Write(_) | Self::Discard(_) | Self::WriteZeroes(_));
        if changes && rules.read_only { Err(Status::IoError) } else { Ok(request) }
    }
}

impl Rules {
    /// The first byte of `length` bytes at `sector`, if they are whole sectors of the disk.
    fn data(self, sector: u64, length: usize) -> Result<u64, Status> {
        let length = length as u64;
        if !length.is_multiple_of(SECTOR) {
            return Err(Status::IoError);
        }
        self.range(sector, length / SECTOR)
    }

    fn range(self, sector: u64, count: u64) -> Result<u64, Status> {
        let end = sector.checked_add(count).ok_or(Status::IoError)?;
        // The disk's size in bytes fits, so this offset does.
        if end <= self.sectors { Ok(sector * SECTOR) } else { Err(Status::IoError) }
    }

    fn segments(self, chain: &mut Chain, flags: u32) -> Result<Extents, Status> {
        const SIZE: usize = size_of::<Segment>();
        let length = chain.readable.remaining();
        let count = length / SIZE;
        if count == 0 || !length.is_multiple_of(SIZE) || count > MAX_SEGMENTS as usize {
            return Err(Status::IoError);
        }
        let mut extents = Extents { list: [Extent::default(); MAX_SEGMENTS as usize], len: count };
        for extent in &mut extents.list[..count] {
            let segment: Segment = chain.readable.read_obj().map_err(|_| Status::IoError)?;
            let sectors = u32::from(segment.sectors);
            // §5.2.6.2: flags that mean nothing here are an unsupported request.
            if u32::from(segment.flags) & !flags != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > MAX_SEGMENT_SECTORS {
                return Err(Status::IoError);
            }
            *extent = Extent {
                offset: self.range(u64::from(segment.sector), u64::from(sectors))?,
                length: u64::from(sectors) * SECTOR,
                unmap: u32::from(segment.flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            };
        }
        Ok(extents)
    }
}
