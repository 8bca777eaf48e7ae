//! What operators call, and what shows what they did.

use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Client, ClientError, REQUEST_TIMEOUT, segments};
use crate::node::{Node, NodeOperation};
use crate::pool::{Pool, PoolStatus, Tenant, TenantStatus};
use crate::scheduling::AuditEntry;

impl Client {
    /// `POST /v1/nodes/{name}/operations` (admin).
    pub async fn operate_node(&self, name: &str, operation: &NodeOperation) -> Result<Node, ClientError> {
        self.post(&format!("/v1/nodes/{}/operations", segments(name)), operation).await
    }

    /// `GET /v1/pools`: those that the token's tenant may use, or all for an admin.
    pub async fn pools(&self) -> Result<Vec<PoolStatus>, ClientError> {
        self.get("/v1/pools").await
    }

    /// `GET /v1/pools/{name}`.
    pub async fn pool(&self, name: &str) -> Result<PoolStatus, ClientError> {
        self.get(&format!("/v1/pools/{}", segments(name))).await
    }

    /// `PUT /v1/pools/{name}` (admin).
    pub async fn set_pool(&self, pool: &Pool) -> Result<Pool, ClientError> {
        self.put(&format!("/v1/pools/{}", segments(&pool.name)), pool).await
    }

    /// `DELETE /v1/pools/{name}` (admin).
    pub async fn remove_pool(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/pools/{}", segments(name))).await
    }

    /// `GET /v1/tenants`: the token's own, or all for an admin.
    pub async fn tenants(&self) -> Result<Vec<TenantStatus>, ClientError> {
        self.get("/v1/tenants").await
    }

    /// `GET /v1/tenants/{name}`.
    pub async fn tenant(&self, name: &str) -> Result<TenantStatus, ClientError> {
        self.get(&format!("/v1/tenants/{}", segments(name))).await
    }

    /// `PUT /v1/tenants/{name}` (admin).
    pub async fn set_tenant(&self, tenant: &Tenant) -> Result<Tenant, ClientError> {
        self.put(&format!("/v1/tenants/{}", segments(&tenant.name)), tenant).await
    }

    /// `DELETE /v1/tenants/{name}` (admin).
    pub async fn remove_tenant(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/tenants/{}", segments(name))).await
    }

    /// `GET /v1/audit` (admin).
    pub async fn audit(&self) -> Result<Vec<AuditEntry>, ClientError> {
        self.get("/v1/audit").await
    }

    async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        let request = self.request(Method::PUT, path).timeout(REQUEST_TIMEOUT).json(body);
        self.decode(self.send(request).await?).await
    }

    async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(self.request(Method::DELETE, path).timeout(REQUEST_TIMEOUT)).await.map(drop)
    }
}
