//! A service on real nodes: its replicas follow the requests in flight, on both hosts, come back when
//! they end, and are reached by nobody but those who may.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use lathe_api::job::{Job, JobState};
use lathe_api::service::{Service, ServiceReplica};
use lathe_e2e::artefacts;
use lathe_e2e::cluster::{Cluster, Options};
use lathe_e2e::wait::{PATIENCE, until};

/// `/` says which replica it is; `/hold` goes on until the client leaves; `/end` ends the replica.
const SERVER: &str = "import http.server, os, socket, sys, time\n\
    class Handler(http.server.BaseHTTPRequestHandler):\n\
    \x20   def do_GET(self):\n\
    \x20       if self.path == '/end': os._exit(3)\n\
    \x20       self.send_response(200); self.end_headers()\n\
    \x20       self.wfile.write((os.environ['MASTER_ADDR'] + '\\n').encode())\n\
    \x20       while self.path == '/hold':\n\
    \x20           self.wfile.write(b'more\\n'); time.sleep(0.2)\n\
    time.sleep(2)\n\
    http.server.ThreadingHTTPServer(('', int(os.environ['PORT'])), Handler).serve_forever()\n";

/// Says which of its arguments, HOST:PORT each, it can connect to.
const PROBE: &str = "import socket, sys\n\
    for target in sys.argv[1:]:\n\
    \x20   host, port = target.split(':')\n\
    \x20   try: socket.create_connection((host, int(port)), 5); print(target, 'open', flush=True)\n\
    \x20   except OSError: print(target, 'shut', flush=True)\n";

fn lathe(cluster: &Cluster, args: &[&str]) -> String {
    let output = cluster.lathe(args).unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn service(cluster: &Cluster, id: &str, what: &str, wanted: impl Fn(&Service) -> bool) -> Service {
    let found = until(what, PATIENCE, || {
        let service: Service = cluster.json(["service", "show", id])?;
        anyhow::ensure!(wanted(&service), "{service:#?}");
        Ok(Some(service))
    });
    if found.is_err() {
        cluster.save_logs(id);
    }
    found.unwrap()
}

fn serving(service: &Service) -> Vec<&ServiceReplica> {
    service.replicas.iter().filter(|replica| replica.ready && !replica.draining).collect()
}

fn settled(service: &Service, count: usize) -> bool {
    serving(service).len() == count && service.replicas.len() == count
}

/// A request to a node's port, and the first line of its answer: the replica's address.
fn ask(cluster: &Cluster, address: SocketAddr, path: &str) -> (BufReader<TcpStream>, String) {
    let mut stream = cluster.connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    let mut head = String::new();
    while stream.read_line(&mut line).unwrap() > 0 && !line.trim().is_empty() {
        head.push_str(&std::mem::take(&mut line));
    }
    line.clear();
    // Its length, in an answer that comes in pieces.
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        stream.read_line(&mut line).unwrap();
        line.clear();
    }
    stream.read_line(&mut line).unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}{line}");
    (stream, line.trim().to_owned())
}

/// Runs a probe as a tenant; what it found.
fn probe(cluster: &Cluster, tenant: &str, targets: &[String]) -> String {
    let token = lathe(cluster, &["token", "create", "user", "--tenant", tenant]);
    let token_file = cluster.scratch().join(format!("{tenant}.token"));
    std::fs::write(&token_file, token.trim()).unwrap();
    let targets = targets.iter().map(|target| format!("\"{target}\"")).collect::<Vec<_>>().join(", ");
    let file = cluster.scratch().join(format!("{tenant}.toml"));
    let text = format!(
        "name = \"probe\"\nclass = \"container\"\nimage = \"python\"\nargs = [{targets}]\n\
         entrypoint = [\"/usr/bin/python3\", \"-c\", '''\n{PROBE}''']\n[resources]\nmemory = \"128 MiB\"\n"
    );
    std::fs::write(&file, text).unwrap();
    let mut command = cluster.lathe_command().unwrap();
    command.env("LATHE_TOKEN_FILE", token_file).args(["--json", "job", "run", "--detach"]).arg(&file);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let job: Job = serde_json::from_slice(&output.stdout).unwrap();
    let job = cluster.wait_for_job(&job.id).unwrap();
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    cluster.logs(&job.id).unwrap()
}

#[test]
fn replicas_in_containers_follow_the_requests_in_flight_and_come_back_when_they_end() {
    let cluster = Cluster::start(&Options::default()).unwrap();
    let image = artefacts::python_ml_image().unwrap();
    lathe(&cluster, &["image", "add", "python", image.to_str().unwrap()]);
    let file = cluster.scratch().join("web.toml");
    let text = format!(
        "name = \"web\"\nclass = \"container\"\nimage = \"python\"\n\
         entrypoint = [\"/usr/bin/python3\", \"-c\", '''\n{SERVER}''']\ngrace_seconds = 5\n\
         [resources]\nmemory = \"128 MiB\"\n\
         [service]\nport = 8080\nmin = 1\nmax = 3\ntarget_in_flight = 2\n\
         scale_down_after = \"5s\"\ndrain = \"20s\"\n"
    );
    std::fs::write(&file, text).unwrap();
    let web: Service = cluster.json(["service", "run", file.to_str().unwrap()]).unwrap();
    let one = service(&cluster, &web.id, "one replica is ready", |service| settled(service, 1));
    let nodes: Vec<SocketAddr> = cluster
        .hosts()
        .iter()
        .map(|host| SocketAddr::new(host.address().parse::<Ipv4Addr>().unwrap().into(), web.listen))
        .collect();
    // Whichever node is asked, the replica on the one answers.
    for node in &nodes {
        assert_eq!(Some(ask(&cluster, *node, "/").1), one.replicas[0].address, "asked {node}");
    }
    let mut held = grow(&cluster, &web, nodes[0]);
    isolation(&cluster, &web, &nodes);
    held.clear();
    let shrunk = service(&cluster, &web.id, "one replica is left", |service| settled(service, 1));
    let history: Vec<&str> = shrunk.decisions.iter().map(|decision| decision.why.as_str()).collect();
    assert!(history.iter().any(|why| why.starts_with("3 replicas instead of")), "{history:?}");
    assert!(history.last().unwrap().starts_with("1 replicas instead of"), "{history:?}");
    comes_back(&cluster, &web, nodes[1], &shrunk.replicas[0]);
    lathe(&cluster, &["service", "cancel", &web.id]);
    service(&cluster, &web.id, "it is gone", |service| service.finished_ms.is_some());
    until("nobody listens any more", PATIENCE, || Ok(cluster.connect(nodes[0]).is_err().then_some(())))
        .unwrap();
}

/// Six requests at once, at one node, are two for each of three replicas, on both nodes.
fn grow(cluster: &Cluster, web: &Service, node: SocketAddr) -> Vec<BufReader<TcpStream>> {
    let (mut held, mut by): (Vec<_>, BTreeSet<_>) = (0..4).map(|_| ask(cluster, node, "/hold")).unzip();
    assert_eq!(by.len(), 1, "there is one replica");
    service(cluster, &web.id, "two replicas are ready", |service| settled(service, 2));
    // The node hears of it a moment later; from then on the new one has the least to do.
    until("the second replica answers", PATIENCE, || {
        Ok((!by.contains(&ask(cluster, node, "/").1)).then_some(()))
    })
    .unwrap();
    for _ in 0..2 {
        let (stream, replica) = ask(cluster, node, "/hold");
        held.push(stream);
        by.insert(replica);
    }
    assert_eq!(by.len(), 2);
    let three = service(cluster, &web.id, "three replicas are ready", |service| {
        settled(service, 3) && service.in_flight == 6
    });
    let places: BTreeSet<&str> = three.replicas.iter().filter_map(|one| one.node.as_deref()).collect();
    assert_eq!(places, BTreeSet::from(["n1", "n2"]), "a node has two CPUs");
    let shown = lathe(cluster, &["service", "show", &web.id]);
    assert!(shown.contains("in flight  6") && shown.contains("3 replicas instead of 2"), "{shown}");
    held
}

/// Sandboxes of other tenants reach neither replicas nor the nodes; those of the same tenant reach replicas
/// as they always did.
fn isolation(cluster: &Cluster, web: &Service, nodes: &[SocketAddr]) {
    let now: Service = cluster.json(["service", "show", &web.id]).unwrap();
    let replicas = now.replicas.iter().filter_map(|one| Some(format!("{}:8080", one.address.as_ref()?)));
    let mut targets: Vec<String> = replicas.collect();
    let count = targets.len();
    targets.extend(nodes.iter().map(ToString::to_string));
    let found = probe(cluster, "stranger", &targets);
    assert_eq!((found.matches("shut").count(), found.matches("open").count()), (targets.len(), 0), "{found}");
    let found = probe(cluster, &web.tenant, &targets);
    assert_eq!(found.matches("open").count(), count, "the tenant's own: {found}");
}

/// A replica that ends by itself is started again, and whoever asks meanwhile waits for it.
fn comes_back(cluster: &Cluster, web: &Service, node: SocketAddr, replica: &ServiceReplica) {
    let mut stream = cluster.connect(node).unwrap();
    write!(stream, "GET /end HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
    let again = service(cluster, &web.id, "it is up again", |service| {
        settled(service, 1) && service.replicas[0].attempt == 2
    });
    assert_eq!(again.replicas[0].job, replica.job);
    let why = lathe(cluster, &["job", "why", &replica.job]);
    assert!(why.contains("exited with code 3"), "{why}");
    assert_eq!(Some(ask(cluster, node, "/").1), again.replicas[0].address);
}
