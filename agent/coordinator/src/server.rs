//! The listener: TLS, then HTTP/1.1, one task a connection.
//!
//! A client certificate is optional in TLS, because people have none and a joining node has none
//! yet; one that is shown must be of the cluster's CA, or the handshake fails. Who the peer is goes
//! with every request of its connection; endpoints decide what they need.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Extension;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use crate::api;
use crate::api::extract::Peer;
use crate::coordinator::Coordinator;
use crate::{pki, provider, reconcile};

/// Connections at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 8192;
/// A peer that connects and says nothing must not hold a place.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests under way may take to finish once the coordinator is told to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves until the coordinator's shutdown is called for, then lets requests under way finish.
///
/// # Errors
/// When TLS cannot be set up.
pub async fn serve(coordinator: Arc<Coordinator>, listener: TcpListener) -> Result<(), pki::PkiError> {
    let tls = TlsAcceptor::from(Arc::new(server_tls(&coordinator)?));
    let reconciler = tokio::spawn(reconcile::run(Arc::clone(&coordinator)));
    let providers = tokio::spawn(provider::run(Arc::clone(&coordinator)));
    let router = api::router(Arc::clone(&coordinator));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = coordinator.shutdown.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, address, place)) = accepted else { continue };
        let (tls, router, coordinator) = (tls.clone(), router.clone(), Arc::clone(&coordinator));
        connections.spawn(async move {
            connection(&coordinator, tls, router, stream, address).await;
            drop(place);
        });
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(DRAIN, connections.wait()).await.is_err() {
        tracing::warn!(connections = connections.len(), "requests were still under way at the end");
    }
    // They end by themselves; a round under way is let finish, a provider's program is killed.
    let _ = tokio::join!(reconciler, providers);
    Ok(())
}

fn server_tls(coordinator: &Coordinator) -> Result<ServerConfig, pki::PkiError> {
    coordinator.authority.server_tls(&coordinator.cluster.names)
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, address)) => Some((stream, address, place)),
        Err(error) => {
            // Out of file descriptors, most likely: waiting is all that helps.
            tracing::warn!(%error, "cannot accept a connection");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

/// Closes after a refused handshake such that the peer reads why: closing with its request unread
/// would reset the connection and discard the alert on its side.
async fn hang_up(mut stream: TcpStream) {
    const LINGER: Duration = Duration::from_secs(1);
    const LINGER_BYTES: u64 = 64 << 10;
    // The peer may be gone already; there is nothing more to tell it.
    let _ = tokio::time::timeout(LINGER, async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await
    })
    .await;
}

async fn connection(
    coordinator: &Coordinator,
    tls: TlsAcceptor,
    router: Router,
    stream: TcpStream,
    address: SocketAddr,
) {
    // Latency of small answers matters more than packets here; failing to set it costs only that.
    let _ = stream.set_nodelay(true);
    let accept = tls.accept(stream).into_fallible();
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, accept).await {
        Ok(Ok(stream)) => stream,
        Ok(Err((error, stream))) => {
            coordinator.metrics.handshakes_failed.add(1);
            tracing::info!(%address, %error, "TLS handshake failed");
            hang_up(stream).await;
            return;
        }
        Err(_) => {
            coordinator.metrics.handshakes_failed.add(1);
            return;
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let peer = Peer(certificate.and_then(pki::node_identity));
    let service = TowerToHyperService::new(router.layer(Extension(peer)));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = coordinator.shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%address, %error, "connection broke");
    }
}
