//! Connections, handed to replicas whole: what passes on them is not looked at.

use std::sync::Arc;

use tokio::net::TcpStream;

use super::service::Service;

/// Passes one connection on, until one side closes it in both directions or its replica is gone. One
/// that nobody takes is closed.
pub async fn serve(service: Arc<Service>, mut client: TcpStream) {
    let Ok(admission) = service.admit() else { return };
    match admission.connect().await {
        Ok((mut replica, lease)) => {
            let gone = lease.gone();
            tokio::select! {
                // An error is the end of the connection, whoever's it is.
                _ = tokio::io::copy_bidirectional(&mut client, &mut replica) => {}
                () = gone.cancelled() => {}
            }
        }
        Err(why) => tracing::debug!(service = service.id(), %why, "a connection is turned away"),
    }
}
