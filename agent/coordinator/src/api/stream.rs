//! Answers as streams of JSON lines.
//!
//! An empty line is sent when there was nothing to say for a while: the other side then knows that
//! the coordinator lives, and this side notices when the other does not.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::coordinator::Coordinator;
use std::sync::Arc;

/// Well below the client's read timeout.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Lines waiting for a slow reader; beyond, the producer waits.
const QUEUED_LINES: usize = 16;

/// Where a producer puts its lines.
pub struct Lines(mpsc::Sender<Bytes>);

/// The reader has gone; the producer ends.
pub struct Gone;

impl Lines {
    /// Sends one value, waiting for the reader.
    pub async fn send(&self, value: &impl Serialize) -> Result<(), Gone> {
        let mut line = serde_json::to_vec(value).map_err(|_| Gone)?;
        line.push(b'\n');
        self.0.send(Bytes::from(line)).await.map_err(|_| Gone)
    }

    /// Returns when the reader has gone.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// An answer of what `produce` sends, until it returns, the reader goes or the coordinator ends.
pub fn json_lines<F>(coordinator: &Arc<Coordinator>, produce: impl FnOnce(Lines) -> F) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUED_LINES);
    let work = produce(Lines(sender));
    let shutdown = coordinator.shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
    });
    let body = stream::unfold(receiver, |mut receiver| async move {
        let chunk = match tokio::time::timeout(KEEP_ALIVE, receiver.recv()).await {
            Ok(Some(line)) => line,
            Ok(None) => return None,
            Err(_) => Bytes::from_static(b"\n"),
        };
        Some((Ok::<_, std::convert::Infallible>(chunk), receiver))
    });
    ([(header::CONTENT_TYPE, "application/jsonl")], Body::from_stream(body)).into_response()
}
