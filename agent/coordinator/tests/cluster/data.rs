//! Blobs, images, datasets, job descriptions and output.

use futures_util::StreamExt;
use lathe_api::MemorySize;
use lathe_api::artefact::{Dataset, DatasetFile, Digest, Image};
use lathe_api::client::{ClientError, LogQuery};
use lathe_api::job::{DatasetMount, IsolationClass, JobSpec, TaskExit};

use crate::harness::{Cluster, spec};

fn field(error: &ClientError) -> Option<&str> {
    error.problem().and_then(|problem| problem.field.as_deref())
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_travel_whole_or_not_at_all() {
    let cluster = Cluster::start().await;
    let (admin, dir) = (cluster.admin(), tempfile::tempdir().expect("a temporary directory"));
    let content: Vec<u8> = (0..700_000_u32).map(|i| (i % 251) as u8).collect();
    let (digest, path) = (Digest::of(&content), dir.path().join("content"));
    std::fs::write(&path, &content).expect("written");
    assert_eq!(admin.blob_size(&digest).await.expect("asked"), None);
    admin.put_blob(&digest, &path, |_| {}).await.expect("stored");
    assert_eq!(admin.blob_size(&digest).await.expect("asked"), Some(content.len() as u64));
    let copy = dir.path().join("copy");
    let mut told = 0;
    let node = cluster.client(None, Some(cluster.join("n1").await));
    assert_eq!(node.get_blob(&digest, &copy, |n| told += n).await.expect("fetched"), content.len() as u64);
    assert_eq!((std::fs::read(&copy).expect("there"), told), (content.clone(), content.len() as u64));

    let wrong = Digest::of(b"something else");
    let error = admin.put_blob(&wrong, &path, |_| {}).await.expect_err("another digest");
    assert_eq!(error.status(), Some(422), "{error}");
    assert!(error.to_string().contains("nothing was stored"), "{error}");
    assert_eq!(admin.blob_size(&wrong).await.expect("asked"), None);
    let long = vec![0; (1 << 20) + 1];
    let error = admin.put_small_blob(&Digest::of(&long), long.into()).await.expect_err("too long");
    assert_eq!(error.status(), Some(413), "{error}");

    // A blob damaged on the coordinator's disk does not reach anybody as if it were whole.
    let stored = cluster.data_dir.join("blobs").join(digest.hex());
    std::fs::write(&stored, vec![0; content.len()]).expect("damaged");
    let bad = dir.path().join("bad");
    admin.get_blob(&digest, &bad, |_| {}).await.expect_err("damaged");
    assert!(!bad.exists());
    assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 2, "no partial files");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_given_to_complete_things_only() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let missing = Image { name: "a".into(), digest: Digest::of(b"?"), size_bytes: 1 };
    assert_eq!(field(&admin.add_image(&missing).await.expect_err("no manifest")), Some("digest"));
    let manifest = format!(r#"{{"config":{{"digest":"{0}"}},"layers":[]}}"#, Digest::of(b"absent"));
    let digest = Digest::of(manifest.as_bytes());
    admin.put_small_blob(&digest, manifest.into()).await.expect("stored");
    let error =
        admin.add_image(&Image { name: "a".into(), digest, size_bytes: 1 }).await.expect_err("no config");
    assert!(error.to_string().contains("was not uploaded"), "{error}");

    admin.put_small_blob(&Digest::of(b"1,2"), "1,2".into()).await.expect("stored");
    let file =
        |path: &str, size_bytes| DatasetFile { path: path.into(), digest: Digest::of(b"1,2"), size_bytes };
    let dataset =
        |files: Vec<DatasetFile>| Dataset { name: "d".into(), digest: Dataset::digest_of(&files), files };
    admin.add_dataset(&dataset(vec![file("x/a.csv", 3)])).await.expect("added");
    for (bad, at) in [
        (dataset(vec![]), "files"),
        (dataset(vec![file("../a", 3)]), "files.0.path"),
        (dataset(vec![file("/a", 3)]), "files.0.path"),
        (dataset(vec![file("a", 3), file("a", 3)]), "files.1.path"),
        (dataset(vec![file("a", 4)]), "files.0.size_bytes"),
        (Dataset { digest: Digest::of(b""), ..dataset(vec![file("a", 3)]) }, "digest"),
        (Dataset { name: "D!".into(), ..dataset(vec![file("a", 3)]) }, "name"),
    ] {
        assert_eq!(field(&admin.add_dataset(&bad).await.expect_err(at)), Some(at));
    }
    assert_eq!(admin.datasets().await.expect("listed").len(), 1);
    assert_eq!(admin.dataset("other").await.expect_err("absent").status(), Some(404));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_jobs_are_refused_with_their_field_and_change_nothing() {
    let cluster = Cluster::start().await;
    let (admin, image) = (cluster.admin(), cluster.image().await);
    let with = |change: fn(&mut JobSpec)| {
        let mut job = spec(1);
        change(&mut job);
        job
    };
    let mount = |name: &str, mount: &str| DatasetMount { name: name.into(), mount: mount.into() };
    let other = Digest::of(b"other");
    for (job, at) in [
        (with(|job| job.name = "Bad Name".into()), "name"),
        (with(|job| job.tasks = 0), "tasks"),
        (with(|job| job.tasks = 1025), "tasks"),
        (with(|job| job.class = IsolationClass::Unikernel), "class"),
        (with(|job| job.image = "absent".into()), "image"),
        (with(|job| job.image = "test@sha256:00".into()), "image"),
        (JobSpec { image: format!("test@{other}"), ..spec(1) }, "image"),
        (with(|job| job.resources.cpus = 0), "resources.cpus"),
        (with(|job| job.resources.gpus = 65), "resources.gpus"),
        (with(|job| (job.resources.gpus, job.class) = (1, IsolationClass::Container)), "resources.gpus"),
        (with(|job| job.resources.memory = MemorySize::from_mib(63)), "resources.memory"),
        (with(|job| job.entrypoint = Some(vec![])), "entrypoint"),
        (with(|job| _ = job.env.insert("A=B".into(), "c".into())), "env"),
        (JobSpec { datasets: vec![mount("absent", "/data")], ..spec(1) }, "datasets.0.name"),
        (JobSpec { datasets: vec![mount("absent", "data")], ..spec(1) }, "datasets.0.mount"),
        (JobSpec { datasets: vec![mount("absent", "/a/../b")], ..spec(1) }, "datasets.0.mount"),
    ] {
        let error = admin.submit_job(&job).await.expect_err(at);
        assert_eq!((error.status(), field(&error)), (Some(422), Some(at)), "{error}");
    }
    assert!(admin.jobs().await.expect("listed").is_empty());
    let exact = JobSpec { image: format!("test@{}", image.digest), ..spec(1) };
    admin.submit_job(&exact).await.expect("the right digest is accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_bodies_name_the_field() {
    let cluster = Cluster::start().await;
    let token = std::fs::read_to_string(&cluster.made.admin_token).expect("a token");
    for (body, status, at) in [
        ("{", 400, None),
        (r#"{"name": "a"}"#, 422, Some("class")),
        (r#"{"name": "a", "class": "microvm", "image": "i", "colour": 1}"#, 422, Some("colour")),
        (r#"{"name": "a", "class": "vm", "image": "i"}"#, 422, Some("class")),
        (
            r#"{"name": "a", "class": "microvm", "image": "i", "resources": {"memory": "much"}}"#,
            422,
            Some("resources.memory"),
        ),
    ] {
        let (got, problem) = raw_post(&cluster, "/v1/jobs", &token, body).await;
        assert_eq!((got, problem["field"].as_str()), (status, at), "{body}: {problem}");
        assert_eq!(problem["status"].as_u64(), Some(status.into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn output_reaches_a_follower_once_and_to_the_end() {
    let cluster = Cluster::start().await;
    let (node, admin) = (cluster.node("n1", 2).await, cluster.admin());
    cluster.image().await;
    let job = admin.submit_job(&spec(2)).await.expect("accepted");
    let sandboxes = node.running_when(2).await;
    node.log(&sandboxes[0], 0, &["a0", "a1"]).await;
    node.log(&sandboxes[0], 0, &["a0", "a1", "a2"]).await;
    node.log(&sandboxes[1], 0, &["b0"]).await;
    node.log("unknown-job-0-1", 0, &["dropped"]).await;
    let follow =
        admin.job_logs(&job.id, LogQuery { follow: true, ..Default::default() }).await.expect("logs");
    let follow = tokio::spawn(follow.map(|line| line.expect("a line").text).collect::<Vec<_>>());
    node.log(&sandboxes[1], 1, &["b1"]).await;
    for sandbox in &sandboxes {
        node.exit(sandbox, TaskExit::Code(0));
    }
    cluster.job_when(&job.id, |job| job.state.is_terminal()).await;
    node.log(&sandboxes[1], 2, &["late"]).await;
    let mut lines = follow.await.expect("no panic");
    // Whether the follower still gets what comes after the end is a matter of time.
    lines.retain(|line| line != "late");
    let position = |text: &str| lines.iter().position(|line| line == text).expect(text);
    assert!(position("a0") < position("a1") && position("a1") < position("a2"));
    assert!(position("b0") < position("b1"));
    lines.sort();
    assert_eq!(lines, ["a0", "a1", "a2", "b0", "b1"]);

    let query = LogQuery { rank: Some(1), ..Default::default() };
    let one = admin.job_logs(&job.id, query).await.expect("logs");
    let one: Vec<_> = one.map(|line| line.expect("a line").text).collect().await;
    assert_eq!(one, ["b0", "b1", "late"]);
    let error = admin.job_logs(&job.id, LogQuery { rank: Some(2), ..Default::default() }).await.err();
    assert_eq!(error.and_then(|error| error.status()), Some(400));
}

/// A request that the typed client cannot make.
async fn raw_post(cluster: &Cluster, path: &str, token: &str, body: &str) -> (u16, serde_json::Value) {
    use rustls::pki_types::pem::PemObject;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut roots = rustls::RootCertStore::empty();
    let ca = rustls::pki_types::CertificateDer::from_pem_slice(cluster.ca().as_bytes()).expect("a CA");
    roots.add(ca).expect("added");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("TLS")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(&cluster.address).await.expect("connected");
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").expect("a name");
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let mut stream = connector.connect(name, stream).await.expect("TLS");
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        token.trim(),
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    // The end of the connection without TLS's own goodbye is fine here.
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).expect("text");
    let status = answer.split(' ').nth(1).expect("a status").parse().expect("a number");
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    (status, serde_json::from_str(body).expect("a problem document"))
}
