//! A bed that outlives the command that made it: a process that holds the hosts and does what later
//! commands ask over a Unix socket. A request is one line of JSON, the reply another; after
//! [`Request::Attach`] the connection carries a host's exec channel instead.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;

use serde::{Deserialize, Serialize};

use crate::bed::{Bed, state_directory};
use crate::channel::{Channel, proxy};
use crate::description::HostDescription;
use crate::error::Error;
use crate::host::Host;
use crate::remote::Remote;

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// The hosts and their state.
    List,
    /// Carry this host's exec channel.
    Attach(String),
    /// All that the host wrote to its console.
    Console(String),
    /// Do something to a host.
    Do(Action, String),
    /// Take everything down.
    Down,
}

/// What can be done to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Stop its CPUs.
    Pause,
    /// Let them go on.
    Resume,
    /// Take its power.
    Kill,
    /// Power it off in order.
    Shutdown,
    /// Start it again.
    Restart,
    /// Take it off the network.
    Cut,
    /// Put it back.
    Restore,
}

/// What the supervisor answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Done,
    /// To [`Request::List`].
    Hosts {
        /// The bed's network namespace.
        namespace: String,
        /// The hosts.
        hosts: Vec<HostState>,
    },
    /// To [`Request::Console`].
    Text(String),
    /// It could not be done; why.
    Failed(String),
}

/// A host as a list shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostState {
    /// Its name.
    pub name: String,
    /// Its address in the bed's network.
    pub address: String,
    /// Its CPUs.
    pub cpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Process number of its QEMU; none: it is off.
    pub qemu_pid: Option<u32>,
}

/// Why a supervisor could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// Nobody listens.
    #[error("no bed {0:?} is up; start one with `scripts/testbed up`")]
    NotUp(String),
    /// The supervisor refused.
    #[error("{0}")]
    Refused(String),
    /// It answered something else than was asked for.
    #[error("the supervisor of bed {0:?} is of another version; `scripts/testbed down` and `up` again")]
    Version(String),
    /// The connection broke.
    #[error("talking to the supervisor of bed {bed:?}: {source}")]
    Connection {
        /// The bed.
        bed: String,
        /// What the system says.
        source: io::Error,
    },
}

fn socket(bed: &str) -> PathBuf {
    state_directory().join(bed).join("control.sock")
}

/// Boots the hosts, calls `ready`, and serves requests until one asks to take all down.
///
/// # Errors
/// When the bed or a host does not come up, or the socket cannot be made.
pub fn supervise(bed: &str, hosts: Vec<HostDescription>, ready: impl FnOnce()) -> Result<(), Error> {
    let bed = Bed::named(bed)?;
    let hosts = Arc::new(bed.boot_all(hosts)?);
    let path = socket(bed.name());
    let listener = UnixListener::bind(&path).map_err(Error::file(&path))?;
    let (down, end) = mpsc::channel();
    {
        let (hosts, namespace) = (Arc::clone(&hosts), bed.namespace());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (hosts, namespace, down) = (Arc::clone(&hosts), namespace.clone(), down.clone());
                // A client that goes away in the middle is no concern of the others.
                thread::spawn(move || drop(serve(client, &hosts, &namespace, &down)));
            }
        });
    }
    ready();
    // The client waits for its connection to close, which happens when everything is gone.
    let last_client = end.recv().ok();
    // Other threads hold the hosts too; what counts is that QEMU and the network are gone.
    for host in hosts.iter() {
        host.kill();
    }
    bed.clear();
    drop(last_client);
    Ok(())
}

fn serve(
    client: UnixStream,
    hosts: &[Host],
    namespace: &str,
    down: &mpsc::Sender<UnixStream>,
) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(client.try_clone()?).read_line(&mut line)?;
    let request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(e) => return send(&client, &Reply::Failed(format!("not a request: {e}"))),
    };
    let find = |name: &str| {
        let known = || hosts.iter().map(Host::name).collect::<Vec<_>>().join(", ");
        hosts
            .iter()
            .find(|h| h.name() == name)
            .ok_or_else(|| format!("no host {name:?}; there are: {}", known()))
    };
    let failed = |e: &dyn ToString| Reply::Failed(e.to_string());
    let reply = match request {
        Request::List => {
            Reply::Hosts { namespace: namespace.into(), hosts: hosts.iter().map(state_of).collect() }
        }
        Request::Console(name) => find(&name).map_or_else(|e| failed(&e), |host| Reply::Text(host.console())),
        Request::Do(action, name) => match find(&name) {
            Ok(host) => act(host, action).map_or_else(|e| failed(&e), |()| Reply::Done),
            Err(e) => failed(&e),
        },
        Request::Attach(name) => match find(&name).and_then(|host| host.channel().map_err(|e| e.to_string()))
        {
            Ok(channel) => {
                send(&client, &Reply::Done)?;
                return proxy(&channel, client);
            }
            Err(e) => failed(&e),
        },
        Request::Down => {
            let _ = down.send(client);
            return Ok(());
        }
    };
    send(&client, &reply)
}

fn act(host: &Host, action: Action) -> Result<(), Error> {
    match action {
        Action::Pause => host.pause(),
        Action::Resume => host.resume(),
        Action::Kill => {
            host.kill();
            Ok(())
        }
        Action::Shutdown => host.shutdown(),
        Action::Restart => host.restart(),
        Action::Cut => host.cut_network(),
        Action::Restore => host.restore_network(),
    }
}

fn state_of(host: &Host) -> HostState {
    HostState {
        name: host.name().into(),
        address: host.address(),
        cpus: host.description().cpus,
        memory_mib: host.description().memory_mib,
        qemu_pid: if host.is_running() { host.qemu_pid() } else { None },
    }
}

fn send(mut to: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Asks the supervisor of a bed.
///
/// # Errors
/// When there is none, or it cannot do what is asked.
pub fn ask(bed: &str, request: &Request) -> Result<Reply, SupervisorError> {
    call(bed, request).map(|(_, reply)| reply)
}

fn call(bed: &str, request: &Request) -> Result<(UnixStream, Reply), SupervisorError> {
    let stream = UnixStream::connect(socket(bed)).map_err(|_| SupervisorError::NotUp(bed.into()))?;
    let broken = |source| SupervisorError::Connection { bed: bed.into(), source };
    send(&stream, request).map_err(broken)?;
    let mut line = String::new();
    BufReader::new(stream.try_clone().map_err(broken)?).read_line(&mut line).map_err(broken)?;
    if line.is_empty() && matches!(request, Request::Down) {
        // It is gone, which was the wish.
        return Ok((stream, Reply::Done));
    }
    match serde_json::from_str(&line) {
        Ok(Reply::Failed(reason)) => Err(SupervisorError::Refused(reason)),
        Ok(reply) => Ok((stream, reply)),
        Err(_) => Err(SupervisorError::Version(bed.into())),
    }
}

/// Reaches the inside of a host of a bed that a supervisor holds.
///
/// # Errors
/// When there is no such bed or host, or the host is off.
pub fn attach(bed: &str, host: &str) -> Result<Remote, SupervisorError> {
    let (stream, _) = call(bed, &Request::Attach(host.into()))?;
    let channel =
        Channel::new(stream).map_err(|source| SupervisorError::Connection { bed: bed.into(), source })?;
    Ok(Remote::new(host.into(), channel))
}
