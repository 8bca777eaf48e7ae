//! The data path on sockets that keep the bounds of frames, and the whole device on real taps.

mod data_path;
mod taps;

use super::HEADER_SIZE;

/// A frame of `len` bytes whose contents tell it from others.
fn frame(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// A header as a tap gives it: the count of buffers is left to the device.
fn with_header(frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xee; HEADER_SIZE];
    bytes.extend(frame);
    bytes
}
