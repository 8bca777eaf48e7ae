//! The client of the coordinator's API, for agents and the command line.
//!
//! - [`Client`]: one method an endpoint (the agent's in `agent`, blobs in `blob`, operators' in `operate`,
//!   those of services in `service`, other people's here).
//! - [`ClientError`]: what went wrong in one line that names the coordinator and the likely cause.
//!
//! It trusts the cluster's own certificate authority and nothing else: the system's roots, and
//! proxies of the environment, are left out on purpose. It does not retry: its callers are
//! reconcilers, or people.

mod agent;
mod blob;
mod error;
mod lines;
mod operate;
mod service;
mod tls;

use std::time::Duration;

use futures_util::Stream;
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use error::ClientError;

use crate::artefact::{Dataset, Image};
use crate::job::{Job, JobSpec};
use crate::node::{LogLine, Node};
use crate::scheduling::{Planned, Why};
use crate::token::{TokenCreated, TokenInfo, TokenRequest};

/// How long connecting and the TLS handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one plain request may take in all.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Silence after which a stream counts as dead; the coordinator sends something at least every
/// five seconds.
const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest answer to a plain request: 100,000 jobs fit, an endless body does not.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// How to reach a coordinator and who to be.
#[derive(Clone)]
pub struct ClientOptions {
    /// `HOST:PORT`, or `https://HOST:PORT`.
    pub address: String,
    /// The cluster's CA certificate, PEM.
    pub ca_pem: String,
    /// The node's certificate and key, for agents.
    pub identity: Option<ClientIdentity>,
    /// A bearer token, for people.
    pub token: Option<String>,
}

/// A certificate and its private key, PEM.
#[derive(Clone)]
pub struct ClientIdentity {
    /// The certificate, as `POST /v1/agent/join` answered it.
    pub certificate_pem: String,
    /// The key that the signing request was made with, PKCS#8.
    pub key_pem: String,
}

/// Which part of a job's output to read.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogQuery {
    /// One task only.
    pub rank: Option<u32>,
    /// One start of the gang only; the latest if absent.
    pub attempt: Option<u32>,
    /// Go on until the job ended.
    pub follow: bool,
}

/// A connection pool to one coordinator. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// `https://HOST:PORT`, without a trailing slash.
    base: String,
    token: Option<String>,
}

impl Client {
    /// Checks the options; connects only on the first request.
    ///
    /// # Errors
    /// When the address, a certificate, the key or the token is malformed.
    pub fn new(options: &ClientOptions) -> Result<Self, ClientError> {
        let authority = options.address.strip_prefix("https://").unwrap_or(&options.address);
        let authority = authority.trim_end_matches('/');
        let base = format!("https://{authority}");
        let url = reqwest::Url::parse(&base).map_err(|_| ClientError::BadAddress(options.address.clone()))?;
        if url.path() != "/" || url.query().is_some() || url.port_or_known_default().is_none() {
            return Err(ClientError::BadAddress(options.address.clone()));
        }
        let tls = tls::config(&options.ca_pem, options.identity.as_ref())?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .tcp_nodelay(true)
            .build()
            .map_err(|source| ClientError::Setup(error::root_cause(&source)))?;
        Ok(Self { http, base, token: options.token.as_ref().map(|token| token.trim().to_owned()) })
    }

    /// The coordinator's address, for messages.
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("https://")
    }

    /// `GET /healthz`: whether a coordinator answers. Needs no token.
    pub async fn health(&self) -> Result<(), ClientError> {
        self.send(self.request(Method::GET, "/healthz")).await.map(drop)
    }

    /// `GET /v1/images`.
    pub async fn images(&self) -> Result<Vec<Image>, ClientError> {
        self.get("/v1/images").await
    }

    /// `GET /v1/images/{name}`.
    pub async fn image(&self, name: &str) -> Result<Image, ClientError> {
        self.get(&format!("/v1/images/{}", segments(name))).await
    }

    /// `POST /v1/images`: names an image whose blobs are already uploaded.
    pub async fn add_image(&self, image: &Image) -> Result<Image, ClientError> {
        self.post("/v1/images", image).await
    }

    /// `GET /v1/datasets`.
    pub async fn datasets(&self) -> Result<Vec<Dataset>, ClientError> {
        self.get("/v1/datasets").await
    }

    /// `GET /v1/datasets/{name}`.
    pub async fn dataset(&self, name: &str) -> Result<Dataset, ClientError> {
        self.get(&format!("/v1/datasets/{}", segments(name))).await
    }

    /// `POST /v1/datasets`: names a dataset whose blobs are already uploaded.
    pub async fn add_dataset(&self, dataset: &Dataset) -> Result<Dataset, ClientError> {
        self.post("/v1/datasets", dataset).await
    }

    /// `GET /v1/nodes`.
    pub async fn nodes(&self) -> Result<Vec<Node>, ClientError> {
        self.get("/v1/nodes").await
    }

    /// `GET /v1/nodes/{name}`.
    pub async fn node(&self, name: &str) -> Result<Node, ClientError> {
        self.get(&format!("/v1/nodes/{}", segments(name))).await
    }

    /// `POST /v1/jobs`.
    pub async fn submit_job(&self, spec: &JobSpec) -> Result<Job, ClientError> {
        self.post("/v1/jobs", spec).await
    }

    /// `GET /v1/jobs`: the token's tenant's, or everyone's for an admin.
    pub async fn jobs(&self) -> Result<Vec<Job>, ClientError> {
        self.get("/v1/jobs").await
    }

    /// `GET /v1/jobs/{id}`.
    pub async fn job(&self, id: &str) -> Result<Job, ClientError> {
        self.get(&format!("/v1/jobs/{}", segments(id))).await
    }

    /// `GET /v1/jobs/{id}/why`.
    pub async fn job_why(&self, id: &str) -> Result<Why, ClientError> {
        self.get(&format!("/v1/jobs/{}/why", segments(id))).await
    }

    /// `POST /v1/jobs/plan`: what would become of the job.
    pub async fn plan_job(&self, spec: &JobSpec) -> Result<Planned, ClientError> {
        self.post("/v1/jobs/plan", spec).await
    }

    /// `GET /v1/jobs/{id}/watch`: the job now and after every change, until it has ended.
    pub async fn watch_job(
        &self,
        id: &str,
    ) -> Result<impl Stream<Item = Result<Job, ClientError>> + Send + Unpin + use<>, ClientError> {
        let request = self.request(Method::GET, &format!("/v1/jobs/{}/watch", segments(id)));
        Ok(lines::decode(self.clone(), self.send(request).await?))
    }

    /// `POST /v1/jobs/{id}/cancel`.
    pub async fn cancel_job(&self, id: &str) -> Result<Job, ClientError> {
        let request = self.request(Method::POST, &format!("/v1/jobs/{}/cancel", segments(id)));
        self.decode(self.send(request.timeout(REQUEST_TIMEOUT)).await?).await
    }

    /// `GET /v1/jobs/{id}/logs`: the job's output so far, and with `follow` until it has ended.
    pub async fn job_logs(
        &self,
        id: &str,
        query: LogQuery,
    ) -> Result<impl Stream<Item = Result<LogLine, ClientError>> + Send + Unpin + use<>, ClientError> {
        let mut path = format!("/v1/jobs/{}/logs?follow={}", segments(id), query.follow);
        if let Some(rank) = query.rank {
            path.push_str(&format!("&rank={rank}"));
        }
        if let Some(attempt) = query.attempt {
            path.push_str(&format!("&attempt={attempt}"));
        }
        let response = self.send(self.request(Method::GET, &path)).await?;
        Ok(lines::decode(self.clone(), response))
    }

    /// `GET /v1/tokens` (admin).
    pub async fn tokens(&self) -> Result<Vec<TokenInfo>, ClientError> {
        self.get("/v1/tokens").await
    }

    /// `POST /v1/tokens` (admin).
    pub async fn create_token(&self, request: &TokenRequest) -> Result<TokenCreated, ClientError> {
        self.post("/v1/tokens", request).await
    }

    /// `DELETE /v1/tokens/{id}` (admin).
    pub async fn revoke_token(&self, id: &str) -> Result<(), ClientError> {
        let request = self.request(Method::DELETE, &format!("/v1/tokens/{}", segments(id)));
        self.send(request.timeout(REQUEST_TIMEOUT)).await.map(drop)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let request = self.request(Method::GET, path).timeout(REQUEST_TIMEOUT);
        self.decode(self.send(request).await?).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        let request = self.request(Method::POST, path).timeout(REQUEST_TIMEOUT).json(body);
        self.decode(self.send(request).await?).await
    }

    /// Sends, and turns every status but success into an error.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|source| self.error(&source))?;
        if response.status().is_success() { Ok(response) } else { Err(self.problem(response).await) }
    }

    async fn decode<T: DeserializeOwned>(&self, response: Response) -> Result<T, ClientError> {
        let body = self.body(response, MAX_ANSWER_BYTES).await?;
        serde_json::from_slice(&body).map_err(|source| self.bad_answer(&source))
    }

    async fn body(&self, mut response: Response, limit: usize) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|source| self.error(&source))? {
            if body.len() + chunk.len() > limit {
                return Err(self.bad_answer(&format!("it is longer than {limit} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

/// A name as path segments: `/` stays, everything that means something in a URL is escaped.
fn segments(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place_in_the_path() {
        assert_eq!(segments("library/a_b-1.2"), "library/a_b-1.2");
        assert_eq!(segments("a?follow=1#x y"), "a%3Ffollow%3D1%23x%20y");
    }

    #[test]
    fn bad_options_are_refused_before_any_connection() {
        let options = |address: &str, ca: &str| ClientOptions {
            address: address.to_owned(),
            ca_pem: ca.to_owned(),
            identity: None,
            token: None,
        };
        for address in ["", "a b", "host:port", "host:7443/path", "http://host:1"] {
            let error = Client::new(&options(address, "")).err().expect(address).to_string();
            assert!(error.contains("HOST:PORT"), "{error}");
        }
        let error = Client::new(&options("127.0.0.1:7443", "nothing")).err().expect("no CA").to_string();
        assert!(error.contains("CA certificate"), "{error}");
    }
}
