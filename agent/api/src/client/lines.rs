//! Streams of JSON lines.

use std::pin::Pin;

use bytes::BytesMut;
use futures_util::stream::{self, Stream, StreamExt};
use reqwest::Response;
use serde::de::DeserializeOwned;

use super::{Client, ClientError};

/// Longest line: a desired state of 1,024 sandboxes with full environments fits; a stream without
/// newlines does not fill the memory.
const MAX_LINE_BYTES: usize = 64 << 20;

/// Decodes a response line by line. Empty lines are keep-alives. Ends with the response, or after
/// the first error.
pub(super) fn decode<T: DeserializeOwned + Send + 'static>(
    client: Client,
    response: Response,
) -> Pin<Box<dyn Stream<Item = Result<T, ClientError>> + Send>> {
    let state = Some((client, response, Splitter::default()));
    stream::unfold(state, |state| async move {
        let (client, mut response, mut splitter) = state?;
        loop {
            match splitter.next_line() {
                Ok(Some(line)) => {
                    return match serde_json::from_slice(&line) {
                        Ok(value) => Some((Ok(value), Some((client, response, splitter)))),
                        Err(source) => Some((Err(client.bad_answer(&source)), None)),
                    };
                }
                Ok(None) => {}
                Err(TooLong) => return Some((Err(client.bad_answer(&TooLong)), None)),
            }
            match response.chunk().await {
                Ok(Some(chunk)) => splitter.buffer.extend_from_slice(&chunk),
                Ok(None) if splitter.buffer.is_empty() => return None,
                // Every line ends with a newline, so an unfinished one was cut off.
                Ok(None) => return Some((Err(client.bad_answer(&"it was cut off")), None)),
                Err(source) => return Some((Err(client.error(&source)), None)),
            }
        }
    })
    .boxed()
}

/// A line beyond [`MAX_LINE_BYTES`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line is longer than {MAX_LINE_BYTES} bytes")]
struct TooLong;

#[derive(Default)]
struct Splitter {
    buffer: BytesMut,
    /// How much of the buffer is known to hold no newline.
    searched: usize,
}

impl Splitter {
    /// The next line that is not empty, without its newline; none until more bytes come.
    fn next_line(&mut self) -> Result<Option<BytesMut>, TooLong> {
        while let Some(at) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') {
            let mut line = self.buffer.split_to(self.searched + at + 1);
            self.searched = 0;
            line.truncate(line.len() - 1);
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
        self.searched = self.buffer.len();
        if self.buffer.len() > MAX_LINE_BYTES { Err(TooLong) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_network_cut_them(
            lines in prop::collection::vec("[a-z]{0,9}", 0..20),
            cuts in prop::collection::vec(1_usize..7, 1..200),
        ) {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let mut splitter = Splitter::default();
            let mut got = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                splitter.buffer.extend_from_slice(now);
                while let Some(line) = splitter.next_line().expect("short lines") {
                    got.push(String::from_utf8(line.to_vec()).expect("ASCII"));
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            let expected: Vec<_> = lines.into_iter().filter(|line| !line.is_empty()).collect();
            prop_assert_eq!(got, expected);
            prop_assert!(splitter.buffer.is_empty());
        }
    }

    #[test]
    fn a_line_without_an_end_is_refused() {
        let mut splitter = Splitter::default();
        splitter.buffer.resize(MAX_LINE_BYTES + 1, b'x');
        assert_eq!(splitter.next_line(), Err(TooLong));
    }
}
