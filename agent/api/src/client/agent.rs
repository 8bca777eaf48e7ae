//! What agents say to the coordinator. All but joining needs the node's certificate.

use std::time::Duration;

use futures_util::Stream;
use reqwest::Method;

use super::{Client, ClientError, lines};
use crate::node::{JoinRequest, JoinResponse, LogBatch, NodeReport};
use crate::sandbox::NodeDesired;

/// A report that takes longer is worth less than the next one.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

impl Client {
    /// `POST /v1/agent/join`: a certificate for the node, against a join token.
    pub async fn join(&self, request: &JoinRequest) -> Result<JoinResponse, ClientError> {
        self.post("/v1/agent/join", request).await
    }

    /// `POST /v1/agent/report`: the whole observed state, and the heartbeat.
    pub async fn report(&self, report: &NodeReport) -> Result<(), ClientError> {
        let request = self.request(Method::POST, "/v1/agent/report").timeout(REPORT_TIMEOUT).json(report);
        self.send(request).await.map(drop)
    }

    /// `GET /v1/agent/desired`: at once if the revision differs from `after` (or there is none),
    /// then after every change. The stream goes on until the connection breaks.
    pub async fn watch_desired(
        &self,
        after: Option<u64>,
    ) -> Result<impl Stream<Item = Result<NodeDesired, ClientError>> + Send + Unpin + use<>, ClientError>
    {
        let path = match after {
            Some(revision) => format!("/v1/agent/desired?after={revision}"),
            None => "/v1/agent/desired".to_owned(),
        };
        let response = self.send(self.request(Method::GET, &path)).await?;
        Ok(lines::decode(self.clone(), response))
    }

    /// `POST /v1/agent/logs`: output of this node's sandboxes. Stored when this returns; sending a
    /// batch again does no harm.
    pub async fn send_logs(&self, batch: &LogBatch) -> Result<(), ClientError> {
        let request =
            self.request(Method::POST, "/v1/agent/logs").timeout(super::REQUEST_TIMEOUT).json(batch);
        self.send(request).await.map(drop)
    }
}
