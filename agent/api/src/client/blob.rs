//! Blobs: content under its digest, verified on both sides of the wire.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use reqwest::{Body, Method, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::{Client, ClientError};
use crate::artefact::Digest;

impl Client {
    /// `HEAD /v1/blobs/{digest}`: the blob's length, if the coordinator has it.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, ClientError> {
        let request =
            self.request(Method::HEAD, &format!("/v1/blobs/{digest}")).timeout(super::REQUEST_TIMEOUT);
        let response = request.send().await.map_err(|source| self.error(&source))?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !response.status().is_success() {
            return Err(self.problem(response).await);
        }
        let length = response.headers().get(reqwest::header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        length.map(Some).ok_or_else(|| self.bad_answer(&"no content-length"))
    }

    /// `GET /v1/blobs/{digest}` into a small buffer: manifests and configurations.
    ///
    /// # Errors
    /// Also when it is longer than `limit` bytes or its content does not match.
    pub async fn get_small_blob(&self, digest: &Digest, limit: usize) -> Result<Vec<u8>, ClientError> {
        let response = self.send(self.request(Method::GET, &format!("/v1/blobs/{digest}"))).await?;
        let body = self.body(response, limit).await?;
        self.check(digest, Digest::of(&body))?;
        Ok(body)
    }

    /// `GET /v1/blobs/{digest}` into a file, which appears under `path` only once its content is
    /// complete, verified and on disk. Returns its length. `progress` is told of bytes as they come.
    pub async fn get_blob(
        &self,
        digest: &Digest,
        path: &Path,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<u64, ClientError> {
        let partial = Partial::beside(path);
        let file_error = |action, source| ClientError::File { action, path: partial.0.clone(), source };
        let mut response = self.send(self.request(Method::GET, &format!("/v1/blobs/{digest}"))).await?;
        let mut file = File::create_new(&partial.0).await.map_err(|e| file_error("create", e))?;
        let mut hasher = Sha256::new();
        let mut length = 0_u64;
        while let Some(chunk) = response.chunk().await.map_err(|source| self.error(&source))? {
            hasher.update(&chunk);
            file.write_all(&chunk).await.map_err(|e| file_error("write", e))?;
            length += chunk.len() as u64;
            progress(chunk.len() as u64);
        }
        self.check(digest, Digest::from_bytes(hasher.finalize().into()))?;
        // Flushed before it gets its name: after a power cut a file of that name must be whole.
        file.sync_all().await.map_err(|e| file_error("flush", e))?;
        fs::rename(&partial.0, path).await.map_err(|e| file_error("rename", e))?;
        Ok(length)
    }

    /// `PUT /v1/blobs/{digest}` from memory.
    pub async fn put_small_blob(&self, digest: &Digest, content: Bytes) -> Result<(), ClientError> {
        let request = self.request(Method::PUT, &format!("/v1/blobs/{digest}")).body(content);
        self.send(request).await.map(drop)
    }

    /// `PUT /v1/blobs/{digest}` from a file. `progress` is told of bytes as they leave.
    pub async fn put_blob(
        &self,
        digest: &Digest,
        path: &Path,
        mut progress: impl FnMut(u64) + Send + 'static,
    ) -> Result<(), ClientError> {
        let file_error = |source: io::Error| ClientError::File { action: "read", path: path.into(), source };
        let file = File::open(path).await.map_err(file_error)?;
        let length = file.metadata().await.map_err(file_error)?.len();
        let stream = ReaderStream::with_capacity(file, 256 << 10).inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                progress(chunk.len() as u64);
            }
        });
        let request = self
            .request(Method::PUT, &format!("/v1/blobs/{digest}"))
            .header(reqwest::header::CONTENT_LENGTH, length)
            .body(Body::wrap_stream(stream));
        self.send(request).await.map(drop)
    }

    fn check(&self, expected: &Digest, actual: Digest) -> Result<(), ClientError> {
        if *expected == actual {
            return Ok(());
        }
        Err(ClientError::Damaged {
            expected: *expected,
            actual,
            origin: format!("coordinator {}", self.address()),
        })
    }
}

/// A file that goes away unless it was renamed: an aborted download leaves nothing behind.
struct Partial(PathBuf);

impl Partial {
    fn beside(path: &Path) -> Self {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.partial", uuid::Uuid::new_v4().simple()));
        Self(path.with_file_name(name))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Not there any more after the rename, which is the good case.
        let _ = std::fs::remove_file(&self.0);
    }
}
