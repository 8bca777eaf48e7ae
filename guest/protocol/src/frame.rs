//! Length-prefixed frames of postcard.

use alloc::vec::Vec;
use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_FRAME;

/// A frame that cannot be sent or read. The connection is over: there is no resynchronising.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`]; carries the length.
    TooLong(usize),
    /// Not a message of this version.
    Malformed,
    /// Bytes were left over after the message.
    Trailing(usize),
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::TooLong(len) => write!(f, "a frame of {len} bytes is over the limit of {MAX_FRAME}"),
            Self::Malformed => f.write_str("the peer sent a frame that is not a message of this version"),
            Self::Trailing(len) => write!(f, "{len} bytes were left over after a message"),
        }
    }
}

impl core::error::Error for FrameError {}

/// The frame of `message`: its length, then its body.
///
/// # Errors
/// When the body would be longer than [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = postcard::to_extend(message, alloc::vec![0_u8; 4]).map_err(|_| FrameError::Malformed)?;
    let body = frame.len() - 4;
    if body > MAX_FRAME {
        return Err(FrameError::TooLong(body));
    }
    frame[..4].copy_from_slice(&(body as u32).to_le_bytes());
    Ok(frame)
}

/// The length of the body that follows a frame's first four bytes.
///
/// # Errors
/// When it is over [`MAX_FRAME`]; nothing should be allocated for it.
pub fn frame_length(prefix: [u8; 4]) -> Result<usize, FrameError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MAX_FRAME { Err(FrameError::TooLong(len)) } else { Ok(len) }
}

/// The message in a frame's body.
///
/// # Errors
/// When the body is not exactly one message.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let (message, rest) = postcard::take_from_bytes(body).map_err(|_| FrameError::Malformed)?;
    if rest.is_empty() { Ok(message) } else { Err(FrameError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FromGuest, Output, ToGuest};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<FromGuest>(&body);
            let _ = decode::<ToGuest>(&body);
        }

        #[test]
        fn output_round_trips(data in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let message = FromGuest::Output { stream: Output::Stderr, data };
            let frame = encode(&message).unwrap();
            let len = frame_length(frame[..4].try_into().unwrap()).unwrap();
            prop_assert_eq!(len, frame.len() - 4);
            prop_assert_eq!(decode::<FromGuest>(&frame[4..]).unwrap(), message);
        }
    }

    #[test]
    fn long_and_loose_frames_are_refused() {
        assert_eq!(frame_length(u32::MAX.to_le_bytes()), Err(FrameError::TooLong(u32::MAX as usize)));
        let mut frame = encode(&ToGuest::Shutdown).unwrap();
        frame.push(0);
        assert_eq!(decode::<ToGuest>(&frame[4..]), Err(FrameError::Trailing(1)));
        let huge = FromGuest::Output { stream: Output::Stdout, data: alloc::vec![0; MAX_FRAME + 1] };
        assert!(matches!(encode(&huge), Err(FrameError::TooLong(_))));
    }
}
