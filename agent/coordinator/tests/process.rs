//! The program itself: what it prints, how it ends, and that `kill -9` loses nothing acknowledged.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lathe_api::artefact::{Digest, Image};
use lathe_api::client::{Client, ClientOptions};
use lathe_api::job::JobSpec;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lathe-coordinator");

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().expect("it starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

struct Cluster {
    _dir: tempfile::TempDir,
    data: PathBuf,
}

impl Cluster {
    fn init() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir.path().join("data");
        let path = data.to_str().expect("text").to_owned();
        let output = run(&["init", "--data-dir", &path, "--address", "127.0.0.1:7700,coordinator"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let printed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(printed["address"], "127.0.0.1:7700");
        assert_eq!(printed["join_token"], data.join("join.token").to_str().expect("text"));
        Self { _dir: dir, data }
    }

    fn path(&self) -> &str {
        self.data.to_str().expect("text")
    }

    fn serve(&self) -> Serving {
        let address = self.data.join("address");
        // A former process's.
        let _ = fs::remove_file(&address);
        let child = Command::new(PROGRAM)
            .args(["serve", "--data-dir", self.path(), "--listen", "127.0.0.1:0", "--log-format", "json"])
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut serving = Serving { child };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fs::read_to_string(&address).is_ok_and(|text| text.ends_with('\n')) {
            assert!(serving.child.try_wait().expect("waited").is_none(), "it ended");
            assert!(Instant::now() < deadline, "it does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        serving
    }

    fn client(&self) -> Client {
        let read = |name: &str| fs::read_to_string(self.data.join(name)).expect(name);
        let options = ClientOptions {
            address: read("address").trim().to_owned(),
            ca_pem: read("ca.pem"),
            identity: None,
            token: Some(read("admin.token")),
        };
        Client::new(&options).expect("a client")
    }
}

/// Killed when dropped.
struct Serving {
    child: Child,
}

impl Serving {
    fn signal(mut self, signal: &str) -> std::process::ExitStatus {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().expect("kill runs").success());
        self.child.wait().expect("it ends")
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn add_image(client: &Client) {
    let manifest = format!(r#"{{"config":{{"digest":"{}"}},"layers":[]}}"#, Digest::of(b"{}"));
    let digest = Digest::of(manifest.as_bytes());
    client.put_small_blob(&Digest::of(b"{}"), Bytes::from_static(b"{}")).await.expect("stored");
    client.put_small_blob(&digest, manifest.into()).await.expect("stored");
    client.add_image(&Image { name: "test".into(), digest, size_bytes: 0 }).await.expect("added");
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_it_at_any_moment_loses_nothing_acknowledged() {
    let cluster = Cluster::init();
    let spec: JobSpec =
        serde_json::from_str(r#"{"name": "fit", "class": "microvm", "image": "test"}"#).expect("a job");
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let serving = cluster.serve();
        let client = cluster.client();
        if round == 0 {
            add_image(&client).await;
        }
        let known: Vec<_> = client.jobs().await.expect("listed").into_iter().map(|job| job.id).collect();
        for id in &acknowledged {
            assert!(known.contains(id), "job {id} was acknowledged and is gone");
        }
        let submitting = tokio::spawn({
            let (client, spec) = (client.clone(), spec.clone());
            async move {
                let mut accepted = Vec::new();
                while let Ok(job) = client.submit_job(&spec).await {
                    accepted.push(job.id);
                }
                accepted
            }
        });
        // In the middle of whatever it does then.
        tokio::time::sleep(Duration::from_millis(200 + 37 * round)).await;
        let status = tokio::task::spawn_blocking(move || serving.signal("-KILL")).await.expect("no panic");
        assert_eq!(status.signal(), Some(9));
        acknowledged.extend(submitting.await.expect("no panic"));
    }
    assert!(!acknowledged.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_can_be_made_with_and_without_a_running_coordinator() {
    let cluster = Cluster::init();
    let create = || {
        let output =
            run(&["token", "create", "--data-dir", cluster.path(), "--kind", "user", "--tenant", "a"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    let before = create();
    let serving = cluster.serve();
    let after = create();
    for token in [&before, &after] {
        let address = fs::read_to_string(cluster.data.join("address")).expect("listening");
        let ca_pem = fs::read_to_string(cluster.data.join("ca.pem")).expect("a CA");
        let options = ClientOptions {
            address: address.trim().into(),
            ca_pem,
            identity: None,
            token: Some(token.clone()),
        };
        Client::new(&options).expect("a client").jobs().await.expect("accepted");
    }
    let id = after.split('-').nth(1).expect("an ID");
    let revoked = run(&["token", "revoke", "--data-dir", cluster.path(), id]);
    assert!(revoked.status.success(), "{}", text(&revoked.stderr));
    let list = text(&run(&["token", "list", "--data-dir", cluster.path()]).stdout);
    assert!(!list.contains(id) && list.contains(before.split('-').nth(1).expect("an ID")), "{list}");
    let status = tokio::task::spawn_blocking(move || serving.signal("-TERM")).await.expect("no panic");
    assert!(status.success(), "SIGTERM ends it in order: {status}");
}

#[test]
fn mistakes_get_one_line_and_change_nothing() {
    let cluster = Cluster::init();
    let elsewhere = cluster.data.with_file_name("elsewhere");
    let nowhere = elsewhere.to_str().expect("text");
    for (arguments, words) in [
        (vec!["init", "--data-dir", cluster.path(), "--address", "a:1"], "already holds a cluster"),
        (vec!["init", "--data-dir", nowhere, "--address", "no-port"], "HOST:PORT"),
        (vec!["serve", "--data-dir", nowhere], "holds no cluster"),
        (vec!["token", "list", "--data-dir", nowhere], "holds no cluster"),
        (vec!["token", "revoke", "--data-dir", cluster.path(), "00"], "there is no token"),
        (
            vec!["token", "create", "--data-dir", cluster.path(), "--kind", "user", "--tenant", "A!"],
            "--tenant",
        ),
    ] {
        let output = run(&arguments);
        let message = text(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(message.contains(words) && message.lines().count() == 1, "{arguments:?}: {message}");
        assert!(!Path::new(nowhere).exists(), "{arguments:?} left something behind");
    }
}
