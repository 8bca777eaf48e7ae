//! The header in front of every vsock packet (virtio 1.2 §5.10.6), parsed and formatted.
//!
//! A header says nothing about how many bytes follow it in guest memory: whoever reads a packet
//! compares `len` with the descriptor chain before touching the payload (FC CVE-2019-18960).

/// Bytes of a header on the wire.
pub const HEADER_SIZE: usize = 44;

/// The context ID that means the host (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;

/// The only socket type here: a byte stream. Packets of other types are answered with a reset.
pub const TYPE_STREAM: u16 = 1;

/// In a [`Op::Shutdown`] packet: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;

/// In a [`Op::Shutdown`] packet: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// Both directions: the sender is done.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Refuses or ends a connection at once.
    Reset,
    /// Says what the sender will no longer do, see [`SHUTDOWN_BOTH`].
    Shutdown,
    /// Carries bytes.
    ReadWrite,
    /// Tells the sender's buffer state.
    CreditUpdate,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest,
    /// A value that the specification does not give a meaning.
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(value: u16) -> Self {
        match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::ReadWrite => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(value) => value,
        }
    }
}

/// A packet's header, fields as in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Payload bytes, as claimed by the sender.
    pub len: u32,
    /// Socket type, [`TYPE_STREAM`] or unsupported.
    pub socket_type: u16,
    /// What the packet is for.
    pub op: Op,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the wire format. Every bit pattern is a header; meaning is checked by its users.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)).into(),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes the wire format.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&u16::from(self.op).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet when no connection is concerned.
    ///
    /// The socket type is the packet's own: the sender looks its socket up by it.
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            socket_type: self.socket_type,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], offset: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&bytes[offset..offset + N]);
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_bit_pattern_survives_a_round_trip(low: [u8; 32], high: [u8; 12]) {
            let mut bytes = [0; HEADER_SIZE];
            bytes[..32].copy_from_slice(&low);
            bytes[32..].copy_from_slice(&high);
            prop_assert_eq!(Header::parse(&bytes).to_bytes(), bytes);
        }
    }

    #[test]
    fn the_wire_format_is_the_specification_s() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 0x0506_0708,
            len: 9,
            socket_type: TYPE_STREAM,
            op: Op::ReadWrite,
            flags: 0xa,
            buf_alloc: 0xb,
            fwd_cnt: 0xc,
        };
        let expected = [
            3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5, 9, 0, 0, 0, 1, 0, 5, 0,
            10, 0, 0, 0, 11, 0, 0, 0, 12, 0, 0, 0,
        ];
        assert_eq!(header.to_bytes(), expected);
    }
}
