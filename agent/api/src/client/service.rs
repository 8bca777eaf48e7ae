//! What people say to the coordinator about services.

use reqwest::Method;

use super::{Client, ClientError, REQUEST_TIMEOUT, segments};
use crate::job::JobSpec;
use crate::service::Service;

impl Client {
    /// `POST /v1/services`: a job file with a `[service]` table.
    pub async fn submit_service(&self, spec: &JobSpec) -> Result<Service, ClientError> {
        self.post("/v1/services", spec).await
    }

    /// `GET /v1/services`: the token's tenant's, or everyone's for an admin.
    pub async fn services(&self) -> Result<Vec<Service>, ClientError> {
        self.get("/v1/services").await
    }

    /// `GET /v1/services/{id}`.
    pub async fn service(&self, id: &str) -> Result<Service, ClientError> {
        self.get(&format!("/v1/services/{}", segments(id))).await
    }

    /// `POST /v1/services/{id}/cancel`.
    pub async fn cancel_service(&self, id: &str) -> Result<Service, ClientError> {
        let request = self.request(Method::POST, &format!("/v1/services/{}/cancel", segments(id)));
        self.decode(self.send(request.timeout(REQUEST_TIMEOUT)).await?).await
    }
}
