//! Balancers with real sockets on loopback: replicas are small servers of this process.

use std::collections::BTreeSet;
use std::time::Instant;

use lathe_api::service::Backend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;

/// Long enough for any step on a busy machine; only a broken test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

async fn eventually(what: &str, mut look: impl FnMut() -> bool) {
    let search = async {
        while !look() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it hangs")
}

/// A port of loopback that was free just now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A replica that echoes what it gets after its name, and tells what it got.
struct Echo {
    backend: Backend,
    _serving: JoinHandle<()>,
}

async fn echo(name: &str) -> Echo {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let greeting = format!("{name}:");
    let serving = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let greeting = greeting.clone();
            tokio::spawn(async move {
                stream.write_all(greeting.as_bytes()).await.unwrap();
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let backend = Backend { sandbox: name.to_owned(), address: "127.0.0.1".to_owned(), port, accepts: true };
    Echo { backend, _serving: serving }
}

fn service(protocol: Protocol, replicas: &[&Backend]) -> NodeService {
    NodeService {
        id: "web-ab12cd".to_owned(),
        closing: false,
        protocol,
        listen: free_port(),
        expose: Exposure::Loopback,
        max_waiting: 2,
        max_wait_seconds: 3600,
        replicas: replicas.iter().map(|one| (*one).clone()).collect(),
    }
}

fn balancers() -> Balancers {
    Balancers::new(Ipv4Addr::LOCALHOST)
}

async fn connect(service: &NodeService) -> TcpStream {
    TcpStream::connect((Ipv4Addr::LOCALHOST, service.listen)).await.unwrap()
}

/// The name that the replica says first.
async fn name(stream: &mut TcpStream) -> String {
    let mut name = Vec::new();
    loop {
        match within(stream.read_u8()).await.unwrap() {
            b':' => return String::from_utf8(name).unwrap(),
            byte => name.push(byte),
        }
    }
}

fn load(balancers: &Balancers) -> ServiceLoad {
    balancers.loads().remove(0)
}

fn at(load: &ServiceLoad, sandbox: &str) -> u32 {
    load.replicas.iter().find(|one| one.sandbox == sandbox).map_or(0, |one| one.in_flight)
}

#[tokio::test]
async fn connections_go_to_the_replica_with_the_fewest_and_are_counted_until_they_end() {
    let (a, b) = (echo("a").await, echo("b").await);
    let (balancers, wanted) = (balancers(), service(Protocol::Tcp, &[&a.backend, &b.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut open = Vec::new();
    for _ in 0..6 {
        let mut stream = connect(&wanted).await;
        let replica = name(&mut stream).await;
        open.push((replica, stream));
    }
    let now = load(&balancers);
    assert_eq!((now.in_flight, at(&now, "a"), at(&now, "b"), now.waiting), (6, 3, 3, 0));
    // All of a's end: the next ones all go there.
    open.retain(|(replica, _)| replica == "b");
    eventually("a's connections to end", || at(&load(&balancers), "a") == 0).await;
    for _ in 0..3 {
        let mut stream = connect(&wanted).await;
        assert_eq!(name(&mut stream).await, "a");
        open.push(("a".to_owned(), stream));
    }
    // What passes arrives whole, also after one side has said all it has to say.
    let (_, stream) = &mut open[0];
    let sent: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    let (mut read, mut write) = stream.split();
    let mut got = Vec::new();
    let sending = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let (_, read) = within(async { tokio::join!(sending, read.read_to_end(&mut got)) }).await;
    read.unwrap();
    assert!(got == sent, "{} of {} bytes came back", got.len(), sent.len());
    eventually("it to end", || load(&balancers).in_flight == 5).await;
    assert!(load(&balancers).mean_in_flight_milli > 0);
}

#[tokio::test]
async fn without_a_replica_connections_wait_as_many_as_may_and_pass_when_one_comes() {
    let (balancers, mut wanted) = (balancers(), service(Protocol::Tcp, &[]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut waiting = [connect(&wanted).await, connect(&wanted).await];
    eventually("both to wait", || balancers.waiting() == 2).await;
    let mut third = connect(&wanted).await;
    assert_eq!(within(third.read(&mut [0; 1])).await.unwrap(), 0, "it is turned away");
    let now = load(&balancers);
    assert_eq!((now.in_flight, now.waiting, now.turned_away), (2, 2, 1));
    let replica = echo("a").await;
    wanted.replicas.push(replica.backend.clone());
    balancers.configure(std::slice::from_ref(&wanted));
    for stream in &mut waiting {
        assert_eq!(name(stream).await, "a");
    }
    assert_eq!((load(&balancers).waiting, load(&balancers).in_flight), (0, 2));
}

#[tokio::test]
async fn a_replica_that_drains_keeps_what_it_has_and_one_that_is_gone_does_not() {
    let (a, b) = (echo("a").await, echo("b").await);
    let (balancers, mut wanted) = (balancers(), service(Protocol::Tcp, &[&a.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut old = connect(&wanted).await;
    assert_eq!(name(&mut old).await, "a");
    wanted.replicas = vec![Backend { accepts: false, ..a.backend.clone() }, b.backend.clone()];
    balancers.configure(std::slice::from_ref(&wanted));
    for _ in 0..3 {
        assert_eq!(name(&mut connect(&wanted).await).await, "b");
    }
    old.write_all(b"x").await.unwrap();
    assert_eq!(within(old.read_u8()).await.unwrap(), b'x', "it is served to its end");
    wanted.replicas.remove(0);
    balancers.configure(std::slice::from_ref(&wanted));
    assert!(matches!(within(old.read(&mut [0; 1])).await, Ok(0) | Err(_)), "its host may never answer again");
}

#[tokio::test]
async fn a_replica_that_refuses_is_passed_over() {
    let (dead, b) = (free_port(), echo("b").await);
    let dead = Backend { sandbox: "dead".to_owned(), port: dead, ..b.backend.clone() };
    let (balancers, wanted) = (balancers(), service(Protocol::Tcp, &[&dead, &b.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    for _ in 0..4 {
        assert_eq!(name(&mut connect(&wanted).await).await, "b");
    }
    assert_eq!(load(&balancers).turned_away, 0);
}

#[tokio::test]
async fn a_service_that_closes_takes_nothing_new_and_one_that_is_gone_frees_its_port() {
    let a = echo("a").await;
    let (balancers, mut wanted) = (balancers(), service(Protocol::Tcp, &[&a.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut old = connect(&wanted).await;
    assert_eq!(name(&mut old).await, "a");
    wanted.closing = true;
    wanted.replicas[0].accepts = false;
    balancers.configure(std::slice::from_ref(&wanted));
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, wanted.listen);
    let refused = async || loop {
        match TcpStream::connect(address).await {
            Err(_) => break,
            Ok(_) => sleep(Duration::from_millis(5)).await,
        }
    };
    within(refused()).await;
    old.write_all(b"x").await.unwrap();
    assert_eq!(within(old.read_u8()).await.unwrap(), b'x');
    assert_eq!(load(&balancers).problem, None);
    balancers.configure(&[]);
    assert!(balancers.loads().is_empty());
    drop(bind(address).unwrap());
}

#[tokio::test]
async fn a_port_that_somebody_has_is_a_problem_that_is_told_and_tried_again() {
    let (balancers, wanted) = (balancers(), service(Protocol::Tcp, &[]));
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, wanted.listen)).unwrap();
    balancers.configure(std::slice::from_ref(&wanted));
    let problem = load(&balancers).problem.expect("a problem");
    assert!(
        problem.contains(&format!("127.0.0.1:{}", wanted.listen)) && !problem.contains('\n'),
        "{problem}"
    );
    drop(taken);
    balancers.configure(std::slice::from_ref(&wanted));
    assert_eq!(load(&balancers).problem, None);
}

/// An HTTP replica: answers each request, once it is told to, with its name and what it saw.
struct Web {
    backend: Backend,
    /// What came in, in full.
    seen: mpsc::Receiver<String>,
    /// Lets one request be answered.
    answer: mpsc::Sender<()>,
}

async fn web(name: &str) -> Web {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let backend = Backend { sandbox: name.to_owned(), address: "127.0.0.1".to_owned(), port, accepts: true };
    let (saw, seen) = mpsc::channel(64);
    let (answer, mut answers) = mpsc::channel::<()>(64);
    let name = name.to_owned();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => break,
                }
            }
            saw.send(String::from_utf8(head).unwrap()).await.unwrap();
            let Some(()) = answers.recv().await else { return };
            let body = format!("from {name}");
            let text = format!(
                "HTTP/1.1 200 OK\r\nConnection: x-secret\r\nX-Secret: 1\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(text.as_bytes()).await;
        }
    });
    Web { backend, seen, answer }
}

async fn ask(stream: &mut TcpStream, head: &str) {
    stream.write_all(format!("{head}\r\n\r\n").as_bytes()).await.unwrap();
}

/// An answer's head and body, whose length the head says.
async fn answer(stream: &mut TcpStream) -> (String, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within(stream.read_u8()).await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; length];
    within(stream.read_exact(&mut body)).await.unwrap();
    (head, String::from_utf8(body).unwrap())
}

#[tokio::test]
async fn requests_are_counted_and_the_connections_they_come_on_are_not() {
    let mut replica = web("a").await;
    let (balancers, wanted) = (balancers(), service(Protocol::Http, &[&replica.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut stream = connect(&wanted).await;
    for round in 0..3 {
        ask(
            &mut stream,
            &format!(
                "GET /x?round={round} HTTP/1.1\r\nHost: web\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1"
            ),
        )
        .await;
        let seen = within(replica.seen.recv()).await.unwrap().to_lowercase();
        assert!(seen.starts_with(&format!("get /x?round={round} http/1.1\r\n")), "{seen}");
        assert!(seen.contains("host: web\r\n") && seen.contains("x-forwarded-for: 127.0.0.1\r\n"), "{seen}");
        assert!(!seen.contains("x-hop"), "it is about the client's connection alone: {seen}");
        let now = load(&balancers);
        assert_eq!((now.in_flight, at(&now, "a")), (1, 1));
        replica.answer.send(()).await.unwrap();
        let (head, body) = answer(&mut stream).await;
        assert!(
            head.starts_with("http/1.1 200") && !head.contains("x-secret") && body == "from a",
            "{head}{body}"
        );
        eventually("the request to end", || load(&balancers).in_flight == 0).await;
    }
}

#[tokio::test]
async fn each_request_of_a_connection_may_go_to_another_replica() {
    let (mut a, mut b) = (web("a").await, web("b").await);
    let (balancers, wanted) = (balancers(), service(Protocol::Http, &[&a.backend, &b.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut streams = [connect(&wanted).await, connect(&wanted).await];
    for stream in &mut streams {
        ask(stream, "GET / HTTP/1.1\r\nHost: web").await;
    }
    within(a.seen.recv()).await.unwrap();
    within(b.seen.recv()).await.unwrap();
    a.answer.send(()).await.unwrap();
    b.answer.send(()).await.unwrap();
    let mut by = BTreeSet::new();
    for stream in &mut streams {
        by.insert(answer(stream).await.1);
    }
    assert_eq!(by, BTreeSet::from(["from a".to_owned(), "from b".to_owned()]));
}

#[tokio::test]
async fn whoever_is_turned_away_is_told_so_and_a_replica_that_breaks_is_a_bad_gateway() {
    let (balancers, mut wanted) = (balancers(), service(Protocol::Http, &[]));
    wanted.max_wait_seconds = 0;
    balancers.configure(std::slice::from_ref(&wanted));
    let mut stream = connect(&wanted).await;
    ask(&mut stream, "GET / HTTP/1.1\r\nHost: web").await;
    let (head, body) = answer(&mut stream).await;
    assert!(head.starts_with("http/1.1 503") && head.contains("retry-after"), "{head}");
    assert_eq!(body, "no replica took it in time\n");
    // A server that closes at once.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let (sandbox, address) = ("a".to_owned(), "127.0.0.1".to_owned());
    wanted.replicas.push(Backend { sandbox, address, port, accepts: true });
    balancers.configure(std::slice::from_ref(&wanted));
    ask(&mut stream, "GET / HTTP/1.1\r\nHost: web").await;
    assert!(answer(&mut stream).await.0.starts_with("http/1.1 502"));
    // An attempt to use it as a proxy, and what is no HTTP.
    ask(&mut stream, "CONNECT example:80 HTTP/1.1\r\nHost: example:80").await;
    assert!(answer(&mut stream).await.0.starts_with("http/1.1 501"));
    let mut other = connect(&wanted).await;
    ask(&mut other, "nonsense").await;
    let mut rest = Vec::new();
    let _ = within(other.read_to_end(&mut rest)).await;
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 400"), "{rest:?}");
    eventually("nothing to be left", || load(&balancers).in_flight == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_is_not_counted_any_more() {
    let mut replica = web("a").await;
    let (balancers, wanted) = (balancers(), service(Protocol::Http, &[&replica.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut stream = connect(&wanted).await;
    ask(&mut stream, "GET / HTTP/1.1\r\nHost: web").await;
    within(replica.seen.recv()).await.unwrap();
    assert_eq!(load(&balancers).in_flight, 1);
    drop(stream);
    eventually("it to be forgotten", || load(&balancers).in_flight == 0).await;
}

#[tokio::test]
async fn a_connection_that_becomes_something_else_passes_and_counts_until_it_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        assert!(String::from_utf8(head).unwrap().to_lowercase().contains("upgrade: echo"));
        let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
        stream.write_all(switch.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    });
    let backend = Backend { sandbox: "a".to_owned(), address: "127.0.0.1".to_owned(), port, accepts: true };
    let (balancers, wanted) = (balancers(), service(Protocol::Http, &[&backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let mut stream = connect(&wanted).await;
    ask(&mut stream, "GET / HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: echo").await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within(stream.read_u8()).await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    within(stream.read_exact(&mut back)).await.unwrap();
    assert_eq!((&back, load(&balancers).in_flight), (b"hello", 1));
    drop(stream);
    eventually("it to end", || load(&balancers).in_flight == 0).await;
}

#[tokio::test]
async fn the_mean_tells_of_what_came_and_went_between_two_reports() {
    let a = echo("a").await;
    let (balancers, wanted) = (balancers(), service(Protocol::Tcp, &[&a.backend]));
    balancers.configure(std::slice::from_ref(&wanted));
    let begin = Instant::now();
    let _ = load(&balancers);
    drop(name(&mut connect(&wanted).await).await);
    eventually("it to end", || load_without_taking(&balancers) == 0 && begin.elapsed().as_millis() > 0).await;
    let now = load(&balancers);
    assert!(now.in_flight == 0 && now.mean_in_flight_milli > 0, "{now:?}");
}

fn load_without_taking(balancers: &Balancers) -> u32 {
    let running = balancers.running();
    running.values().map(|one| one.service.in_flight()).sum()
}
