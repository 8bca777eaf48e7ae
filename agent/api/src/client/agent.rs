//! What agents say to the coordinator. All but joining needs the node's certificate.

use std::time::Duration;

use futures_util::Stream;
use reqwest::Method;

use super::{Client, ClientError, lines};
use crate::node::{JoinRequest, JoinResponse, LogBatch, NodeReport};
use crate::sandbox::DesiredUpdate;

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

    /// `GET /v1/agent/desired`: all of it at once, then after every change the parts that changed. The
    /// stream goes on until the connection breaks; another one begins anew.
    pub async fn watch_desired(
        &self,
    ) -> Result<impl Stream<Item = Result<DesiredUpdate, ClientError>> + Send + Unpin + use<>, ClientError>
    {
        let response = self.send(self.request(Method::GET, "/v1/agent/desired")).await?;
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
