//! HTTP/1.1 requests, handed to replicas one by one: a request is in flight from its head to the last
//! byte of its answer, and a client's connection without a request is not.
//!
//! A request that a replica may have seen is never sent again: whether that does harm, the client knows.
//! Connections that become something else (WebSocket) are passed on like TCP from there.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::upgrade::{self, OnUpgrade};
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::service::{Admission, Lease, Service, TurnedAway};

/// How long a client has to send a request's head, or its next request: idle clients would take all
/// connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Most that a head takes, and what of a body is held at once.
const BUFFER_BYTES: usize = 64 << 10;
/// Headers that are about one connection (RFC 9110 §7.6.1), or about a body's form, which hyper decides.
const OF_ONE_HOP: [HeaderName; 6] =
    [header::CONNECTION, header::TE, header::TRANSFER_ENCODING, header::UPGRADE, header::EXPECT, KEEP_ALIVE];
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

type Answer = Response<UnsyncBoxBody<Bytes, hyper::Error>>;

/// A request that got no answer from a replica.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    TurnedAway(#[from] TurnedAway),
    #[error("the replica did not answer: {0}")]
    Replica(#[from] hyper::Error),
    #[error("CONNECT is for proxies; this is a service")]
    Connect,
}

/// Answers a client's requests, until it closes the connection.
pub async fn serve(service: Arc<Service>, client: TcpStream, peer: SocketAddr) {
    let handler = service_fn(|request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(answer(&service, request, peer.ip()).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(client), handler)
        .with_upgrades();
    // Malformed requests and clients that go are theirs to know.
    let _ = connection.await;
}

async fn answer(service: &Arc<Service>, request: Request<Incoming>, peer: IpAddr) -> Answer {
    let failure = match forward(service, request, peer).await {
        Ok(answer) => return answer,
        Err(failure) => failure,
    };
    tracing::debug!(service = service.id(), %failure, "a request failed");
    let status = match failure {
        Failure::TurnedAway(_) => StatusCode::SERVICE_UNAVAILABLE,
        Failure::Replica(_) => StatusCode::BAD_GATEWAY,
        Failure::Connect => StatusCode::NOT_IMPLEMENTED,
    };
    let text = Full::new(Bytes::from(format!("{failure}\n")));
    let mut answer = Response::new(text.map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    if status == StatusCode::SERVICE_UNAVAILABLE {
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    answer
}

async fn forward(
    service: &Arc<Service>,
    mut request: Request<Incoming>,
    peer: IpAddr,
) -> Result<Answer, Failure> {
    if request.method() == Method::CONNECT {
        return Err(Failure::Connect);
    }
    let admission = service.admit()?;
    let (replica, lease) = admission.connect().await?;
    let asked = asks_for_upgrade(request.headers()).then(|| upgrade::on(&mut request));
    let protocol = request.headers().get(header::UPGRADE).cloned().filter(|_| asked.is_some());
    prepare(&mut request, peer, lease.address());
    if let Some(protocol) = protocol {
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, protocol);
    }
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(BUFFER_BYTES)
        .handshake(TokioIo::new(replica))
        .await?;
    let gone = lease.gone();
    tokio::spawn(async move {
        tokio::select! {
            // Its errors reach whoever waits for the answer.
            _ = connection.with_upgrades() => {}
            () = gone.cancelled() => {}
        }
    });
    let mut response = sender.send_request(request).await?;
    let held = Held { _admission: admission, lease };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(client) = asked
    {
        tokio::spawn(tunnel(client, upgrade::on(&mut response), held));
        return Ok(response.map(BodyExt::boxed_unsync));
    }
    remove_hop(response.headers_mut());
    // The server side speaks the client's version.
    *response.version_mut() = Version::HTTP_11;
    Ok(response.map(|body| Counted { body, _held: held }.boxed_unsync()))
}

fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    let connection = headers.get_all(header::CONNECTION).iter();
    let mut words = connection.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    headers.contains_key(header::UPGRADE) && words.any(|word| word.trim().eq_ignore_ascii_case("upgrade"))
}

/// Makes of a client's request what the replica gets.
fn prepare(request: &mut Request<Incoming>, peer: IpAddr, replica: std::net::SocketAddrV4) {
    remove_hop(request.headers_mut());
    *request.version_mut() = Version::HTTP_11;
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    if let Ok(uri) = target.parse::<Uri>() {
        *request.uri_mut() = uri;
    }
    let headers = request.headers_mut();
    if !headers.contains_key(header::HOST)
        && let Ok(host) = HeaderValue::from_str(&replica.to_string())
    {
        headers.insert(header::HOST, host);
    }
    if let Ok(peer) = HeaderValue::from_str(&peer.to_string()) {
        headers.append(FORWARDED_FOR, peer);
    }
}

fn remove_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&OF_ONE_HOP) {
        headers.remove(name);
    }
}

/// What counts as in flight as long as it is held.
struct Held {
    _admission: Admission,
    lease: Lease,
}

async fn tunnel(client: OnUpgrade, replica: OnUpgrade, held: Held) {
    let (Ok(client), Ok(replica)) = tokio::join!(client, replica) else { return };
    let (mut client, mut replica) = (TokioIo::new(client), TokioIo::new(replica));
    let gone = held.lease.gone();
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut replica) => {}
        () = gone.cancelled() => {}
    }
}

/// An answer's body: the request is in flight until it has passed, or the client is gone.
struct Counted {
    body: Incoming,
    _held: Held,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
