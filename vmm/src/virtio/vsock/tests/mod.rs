//! The device from outside: with programs in memory, under random guests, and on real sockets.

mod device;
mod fake;
mod properties;
mod protocol;

use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};

const GUEST_CID: u64 = 7;

/// A packet of the guest without payload.
fn from_guest(guest_port: u32, host_port: u32, op: Op) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        socket_type: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 0,
    }
}

/// The `n`th byte of a stream that is recognisable at every place.
fn byte_at(n: u64) -> u8 {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
