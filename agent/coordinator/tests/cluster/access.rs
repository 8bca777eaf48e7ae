//! Who may do what, and what those who may not are told.

use std::time::Duration;

use lathe_api::client::{ClientError, ClientIdentity, ClientOptions};
use lathe_api::token::{TokenKind, TokenRequest};

use crate::harness::{Cluster, add_image, join_request, spec};

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, status: u16, words: &str) {
    let error = result.expect_err("it should be refused");
    assert_eq!(error.status(), Some(status), "{error}");
    assert!(error.to_string().contains(words), "{error}");
    assert!(!error.to_string().contains('\n'), "one line: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_tokens_are_told_apart() {
    let cluster = Cluster::start().await;
    refused(cluster.client(None, None).jobs().await, 401, "a bearer token is needed");
    refused(cluster.client(Some("nonsense".into()), None).jobs().await, 401, "not one of this cluster");
    refused(cluster.client(Some(cluster.join_token()), None).jobs().await, 403, "join token");

    let request = TokenRequest { kind: TokenKind::User, tenant: "a".into(), expires_seconds: 1 };
    let short = cluster.admin().create_token(&request).await.expect("made");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    refused(cluster.client(Some(short.token), None).jobs().await, 401, "expired");

    let request = TokenRequest { expires_seconds: 3600, ..request };
    let token = cluster.admin().create_token(&request).await.expect("made");
    let user = cluster.client(Some(token.token), None);
    user.jobs().await.expect("it works");
    refused(user.create_token(&request).await, 403, "admin token");
    cluster.admin().revoke_token(&token.info.id).await.expect("revoked");
    refused(user.jobs().await, 401, "revoked");
}

#[tokio::test(flavor = "multi_thread")]
async fn joining_needs_a_join_token_and_a_name_nobody_uses() {
    let cluster = Cluster::start().await;
    let client = cluster.client(None, None);
    refused(client.join(&join_request("join-00-00", "n1").1).await, 401, "join token");
    let admin = std::fs::read_to_string(&cluster.made.admin_token).expect("a token");
    refused(client.join(&join_request(&admin, "n1").1).await, 403, "not a join token");
    for name in ["", "N1", "a/b", "../x", "ü", &"a".repeat(64)] {
        let result = client.join(&join_request(&cluster.join_token(), name).1).await;
        assert_eq!(
            result.as_ref().err().and_then(|e| e.problem()).and_then(|p| p.field.as_deref()),
            Some("name")
        );
        refused(result, 422, "1 to 63 characters");
    }
    let node = cluster.node("n1", 1).await;
    crate::harness::eventually("n1", || async {
        cluster.admin().node("n1").await.ok().filter(|n| n.last_heartbeat_ms > 0)
    })
    .await;
    refused(client.join(&join_request(&cluster.join_token(), "n1").1).await, 409, "is connected");
    drop(node);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_join_replaces_the_certificate() {
    let cluster = Cluster::start().await;
    let old = cluster.client(None, Some(cluster.join("n1").await));
    let new = cluster.client(None, Some(cluster.join("n1").await));
    let batch = lathe_api::node::LogBatch { lines: vec![] };
    new.send_logs(&batch).await.expect("the new one works");
    refused(old.send_logs(&batch).await, 401, "replaced by a later join");
    refused(new.jobs().await, 401, "bearer token");
    refused(cluster.admin().send_logs(&batch).await, 401, "node's certificate is needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_another_cluster_are_refused_by_both_sides() {
    let (cluster, other) = (Cluster::start().await, Cluster::start().await);
    let identity: ClientIdentity = other.join("n1").await;
    let error = cluster
        .client(None, Some(identity))
        .send_logs(&lathe_api::node::LogBatch { lines: vec![] })
        .await
        .expect_err("its certificate is of another cluster")
        .to_string();
    assert!(error.contains(&cluster.address) && error.contains("of another cluster"), "{error}");

    let options =
        ClientOptions { address: cluster.address.clone(), ca_pem: other.ca(), identity: None, token: None };
    let client = lathe_api::client::Client::new(&options).expect("a client");
    let error = client.health().await.expect_err("another CA").to_string();
    assert!(error.contains(&cluster.address) && error.contains("not of this cluster"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_coordinator_is_named() {
    let mut cluster = Cluster::start().await;
    let client = cluster.admin();
    cluster.stop().await;
    let error = client.jobs().await.expect_err("nobody is there");
    assert!(error.is_transient());
    let error = error.to_string();
    assert!(error.contains(&cluster.address) && error.contains("is lathe-coordinator running?"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_do_not_see_or_touch_each_other() {
    let cluster = Cluster::start().await;
    let (red, blue) = (cluster.user("red").await, cluster.user("blue").await);
    add_image(&red, "test").await;
    let job = red.submit_job(&spec(1)).await.expect("accepted");
    assert_eq!(job.tenant, "red");
    assert_eq!(red.jobs().await.expect("listed").len(), 1);
    assert!(blue.jobs().await.expect("listed").is_empty());
    refused(blue.job(&job.id).await, 404, "there is no job");
    refused(blue.cancel_job(&job.id).await, 404, "there is no job");
    assert_eq!(blue.job_logs(&job.id, Default::default()).await.err().and_then(|e| e.status()), Some(404));
    assert_eq!(blue.watch_job(&job.id).await.err().and_then(|e| e.status()), Some(404));
    let image = blue.image("test").await.expect("images are for all");
    refused(blue.add_image(&image).await, 403, "belongs to another tenant");
    assert_eq!(cluster.admin().jobs().await.expect("listed").len(), 1);
    cluster.admin().cancel_job(&job.id).await.expect("an admin may");
}
