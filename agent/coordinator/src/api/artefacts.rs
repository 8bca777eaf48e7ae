//! Images and datasets: names for blobs that are already here.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use lathe_api::artefact::{Dataset, Digest, Image};
use lathe_api::problem::Problem;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::extract::{Json, User};
use crate::coordinator::Coordinator;
use crate::records::{self, DATASETS, IMAGES, Owned, load, put};
use crate::store::{Outcome, Transaction};

const IMAGE_BYTES: usize = 64 << 10;
const DATASET_BYTES: usize = 16 << 20;
/// OCI's own limit for manifests.
const MANIFEST_BYTES: u64 = 4 << 20;
const MAX_FILES: usize = 10_000;
const MAX_PATH_BYTES: usize = 1024;

/// All images, by name.
#[utoipa::path(get, path = "/v1/images", tag = "images",
    responses((status = 200, body = Vec<Image>), (status = "4XX", body = Problem)))]
pub async fn images(
    State(coordinator): State<Arc<Coordinator>>,
    _: User,
) -> Result<axum::Json<Vec<Image>>, ApiError> {
    list(&coordinator, IMAGES).await.map(axum::Json)
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{name}", tag = "images", params(("name" = String, Path)),
    responses((status = 200, body = Image), (status = "4XX", body = Problem)))]
pub async fn image(
    State(coordinator): State<Arc<Coordinator>>,
    _: User,
    Path(name): Path<String>,
) -> Result<axum::Json<Image>, ApiError> {
    get(&coordinator, IMAGES, "image", &name).await.map(axum::Json)
}

/// Names an image. Its manifest, configuration and layers must have been uploaded. A name may come
/// to mean another digest; jobs keep the one they were submitted with.
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = Image,
    responses((status = 201, body = Image), (status = "4XX", body = Problem)))]
pub async fn add_image(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Json(image): Json<Image, IMAGE_BYTES>,
) -> Result<(StatusCode, axum::Json<Image>), ApiError> {
    check_name(&image.name, true)?;
    check_manifest(&coordinator, &image.digest).await?;
    add(&coordinator, &user, IMAGES, "image", &image.name, &image).await?;
    tracing::info!(image = image.name, digest = %image.digest, "image added");
    Ok((StatusCode::CREATED, axum::Json(image)))
}

/// All datasets, by name.
#[utoipa::path(get, path = "/v1/datasets", tag = "datasets",
    responses((status = 200, body = Vec<Dataset>), (status = "4XX", body = Problem)))]
pub async fn datasets(
    State(coordinator): State<Arc<Coordinator>>,
    _: User,
) -> Result<axum::Json<Vec<Dataset>>, ApiError> {
    list(&coordinator, DATASETS).await.map(axum::Json)
}

/// One dataset.
#[utoipa::path(get, path = "/v1/datasets/{name}", tag = "datasets", params(("name" = String, Path)),
    responses((status = 200, body = Dataset), (status = "4XX", body = Problem)))]
pub async fn dataset(
    State(coordinator): State<Arc<Coordinator>>,
    _: User,
    Path(name): Path<String>,
) -> Result<axum::Json<Dataset>, ApiError> {
    get(&coordinator, DATASETS, "dataset", &name).await.map(axum::Json)
}

/// Names a dataset. Its files must have been uploaded.
#[utoipa::path(post, path = "/v1/datasets", tag = "datasets", request_body = Dataset,
    responses((status = 201, body = Dataset), (status = "4XX", body = Problem)))]
pub async fn add_dataset(
    State(coordinator): State<Arc<Coordinator>>,
    user: User,
    Json(mut dataset): Json<Dataset, DATASET_BYTES>,
) -> Result<(StatusCode, axum::Json<Dataset>), ApiError> {
    check_name(&dataset.name, false)?;
    check_files(&coordinator, &dataset).await?;
    let digest = Dataset::digest_of(&dataset.files);
    if digest != dataset.digest {
        return Err(ApiError::field(
            "digest",
            format!("the files' digest is {digest}, not {}", dataset.digest),
        ));
    }
    dataset.files.sort_by(|a, b| a.path.cmp(&b.path));
    add(&coordinator, &user, DATASETS, "dataset", &dataset.name, &dataset).await?;
    tracing::info!(dataset = dataset.name, %digest, files = dataset.files.len(), "dataset added");
    Ok((StatusCode::CREATED, axum::Json(dataset)))
}

fn check_name(name: &str, slashes: bool) -> Result<(), ApiError> {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    let parts_fit = name.split('/').all(|part| !part.is_empty() && part.bytes().all(plain) && part != "..");
    if parts_fit && name.len() <= 128 && (slashes || !name.contains('/')) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    let slash = if slashes { ", with / between parts" } else { "" };
    Err(ApiError::field("name", format!("{shown:?}: 1 to 128 characters of a-z, 0-9, ., _ and -{slash}")))
}

/// What of an OCI image manifest matters here.
#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: Digest,
}

/// A job must not find out on a node that a layer is missing.
async fn check_manifest(coordinator: &Coordinator, digest: &Digest) -> Result<(), ApiError> {
    let manifest = coordinator.blobs.get_small(digest, MANIFEST_BYTES).await?;
    let manifest = manifest.ok_or_else(|| {
        ApiError::field("digest", format!("there is no blob {digest}; upload the manifest first"))
    })?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|error| {
        ApiError::field("digest", format!("blob {digest} is not an image manifest (an index?): {error}"))
    })?;
    for part in manifest.layers.iter().chain([&manifest.config]) {
        if coordinator.blobs.size(&part.digest).await?.is_none() {
            let detail = format!("the manifest names blob {}, which was not uploaded", part.digest);
            return Err(ApiError::field("digest", detail));
        }
    }
    Ok(())
}

async fn check_files(coordinator: &Coordinator, dataset: &Dataset) -> Result<(), ApiError> {
    if dataset.files.is_empty() || dataset.files.len() > MAX_FILES {
        return Err(ApiError::field("files", format!("1 to {MAX_FILES} files")));
    }
    let mut paths = BTreeSet::new();
    for (index, file) in dataset.files.iter().enumerate() {
        let field = |name: &str| format!("files.{index}.{name}");
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
        if file.path.len() > MAX_PATH_BYTES || !file.path.split('/').all(plain) {
            let detail = format!("{:?}: a relative path without empty, . and .. parts", file.path);
            return Err(ApiError::field(field("path"), detail));
        }
        if !paths.insert(&file.path) {
            return Err(ApiError::field(field("path"), format!("{:?} is there twice", file.path)));
        }
        match coordinator.blobs.size(&file.digest).await? {
            Some(size) if size == file.size_bytes => {}
            Some(size) => {
                let detail = format!("blob {} has {size} bytes, not {}", file.digest, file.size_bytes);
                return Err(ApiError::field(field("size_bytes"), detail));
            }
            None => {
                let detail = format!("there is no blob {}; upload it first", file.digest);
                return Err(ApiError::field(field("digest"), detail));
            }
        }
    }
    Ok(())
}

async fn list<T: DeserializeOwned>(coordinator: &Coordinator, prefix: &str) -> Result<Vec<T>, ApiError> {
    let records = records::load_all::<Owned<T>>(&*coordinator.store, prefix).await?;
    Ok(records.into_iter().map(|(_, record)| record.value.artefact).collect())
}

async fn get<T: DeserializeOwned>(
    coordinator: &Coordinator,
    prefix: &str,
    what: &str,
    name: &str,
) -> Result<T, ApiError> {
    let record = load::<Owned<T>>(&*coordinator.store, &format!("{prefix}{name}")).await?;
    record.map(|record| record.value.artefact).ok_or_else(|| ApiError::not_found(what, name))
}

/// Only its owner may change what a name means: it is what other tenants' jobs run.
async fn add<T: Serialize + DeserializeOwned + Clone>(
    coordinator: &Coordinator,
    user: &User,
    prefix: &str,
    what: &str,
    name: &str,
    artefact: &T,
) -> Result<(), ApiError> {
    let key = format!("{prefix}{name}");
    let known = load::<Owned<T>>(&*coordinator.store, &key).await?;
    let tenant = match &known {
        Some(known) if !user.may(&known.value.tenant) => {
            return Err(ApiError::forbidden(format!("{what} {name:?} belongs to another tenant")));
        }
        Some(known) => known.value.tenant.clone(),
        None => user.0.tenant.clone(),
    };
    let record = Owned { tenant, artefact: artefact.clone() };
    let transaction = Transaction {
        expect: vec![(key.clone(), known.map(|known| known.revision))],
        writes: vec![put(key, &record)?],
    };
    match coordinator.store.commit(transaction).await? {
        Outcome::Committed(_) => Ok(()),
        Outcome::Conflict { .. } => {
            Err(ApiError::conflict(format!("{what} {name:?} was changed by somebody else just now")))
        }
    }
}
