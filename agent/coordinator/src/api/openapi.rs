//! The API's description, generated from the handlers and the types.

use utoipa::OpenApi;

use super::{agent, artefacts, blobs, jobs, meta, nodes, pools, services, tokens};

/// OpenAPI 3.1. `tests/openapi.json` is its golden file.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lathe coordinator",
        description = "People authenticate with a bearer token, agents with the certificate they got \
                       when they joined. Errors are problem documents (RFC 9457). Streams are JSON \
                       lines; empty lines only keep them alive."
    ),
    paths(
        agent::join,
        agent::report,
        agent::desired_state,
        agent::logs,
        artefacts::images,
        artefacts::image,
        artefacts::add_image,
        artefacts::datasets,
        artefacts::dataset,
        artefacts::add_dataset,
        blobs::get,
        blobs::put,
        jobs::submit,
        jobs::list,
        jobs::show,
        jobs::why,
        jobs::plan,
        jobs::cancel,
        jobs::watch,
        jobs::logs,
        nodes::list,
        nodes::show,
        nodes::operate,
        pools::pools,
        pools::pool,
        pools::set_pool,
        pools::remove_pool,
        pools::tenants,
        pools::tenant,
        pools::set_tenant,
        pools::remove_tenant,
        pools::audit_log,
        services::submit,
        services::list,
        services::show,
        services::cancel,
        tokens::create,
        tokens::list,
        tokens::revoke,
        meta::health,
        meta::metrics,
        meta::openapi,
    )
)]
pub struct ApiDoc;
