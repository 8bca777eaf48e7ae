//! The host's side of a guest, by hand: gives it one task and prints each message it sends.
//!
//! `host SOCKET [OPTION...]` listens on a Unix socket, which is `SOCKET_1024` of the `vm.json` that
//! lathe-vmm is then started with.
//!
//! As PID 1 of a guest it needs no VMM with vsock: where the kernel has the vsock loopback transport
//! and no other, it forks the host, which listens on the agent's port, and becomes `/lathe-init`. Its
//! options are then words of the kernel's command line.
//!
//! Options: `lathe.argv=` is a shell command with `_` for a space; `lathe.user=`, `lathe.memory=`
//! (MiB), `lathe.overlay=` (serial), `lathe.data=` (serial, mounted at /data), `lathe.net=1`,
//! `lathe.signal=` (sent at the first output), `lathe.wait=` (ms before the first read of output),
//! `lathe.drop=1` (end the connection at the first output).

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::time::Duration;

use lathe_guest_protocol::{
    AGENT_PORT, Address, FromGuest, Limits, Mount, MountSource, Network, TaskSpec, ToGuest, UserSpec,
    VERSION, decode, encode, frame_length,
};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};
use nix::unistd::{ForkResult, fork};

#[path = "../src/modules.rs"]
mod modules;

fn main() -> io::Result<()> {
    if std::process::id() != 1 {
        let path =
            std::env::args().nth(1).ok_or_else(|| io::Error::other("usage: host SOCKET [OPTION...]"))?;
        let (stream, _) = std::os::unix::net::UnixListener::bind(path)?.accept()?;
        return host(fs::File::from(OwnedFd::from(stream)), &Options(std::env::args().skip(2).collect()));
    }
    for (fs, target) in [("proc", "/proc"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        mount(Some(fs), target, Some(fs), MsFlags::empty(), None::<&str>)?;
    }
    modules::load_all();
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))?;
    listen(&listener, Backlog::new(1)?)?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let fd = accept(listener.as_raw_fd())?;
            // SAFETY: accept returned this descriptor and nothing else owns it.
            let stream = fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            let line = fs::read_to_string("/proc/cmdline")?;
            host(stream, &Options(line.split_whitespace().map(str::to_owned).collect()))
        }
        ForkResult::Parent { .. } => Err(std::process::Command::new("/lathe-init").exec()),
    }
}

struct Options(Vec<String>);

impl Options {
    fn get(&self, name: &str) -> Option<String> {
        let found = self.0.iter().filter_map(|word| word.split_once('=')).find(|(key, _)| *key == name);
        found.map(|(_, value)| value.replace('_', " "))
    }

    fn number(&self, name: &str) -> u64 {
        self.get(name).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

fn disk(serial: String, fs: &str) -> MountSource {
    MountSource::Disk { serial, fs: fs.to_owned() }
}

fn task(options: &Options) -> TaskSpec {
    let data = options.get("lathe.data").map(|serial| Mount {
        source: disk(serial, "erofs"),
        target: "/data".to_owned(),
        read_only: true,
    });
    let network = Network {
        address: Address { octets: [10, 0, 2, 15], prefix: 24 },
        gateway: Some([10, 0, 2, 2]),
        mtu: 1400,
        nameservers: vec![[10, 0, 2, 3]],
    };
    TaskSpec {
        argv: ["sh".to_owned(), "-c".to_owned(), options.get("lathe.argv").unwrap_or("id".to_owned())].into(),
        env: vec![("RANK".to_owned(), "0".to_owned())],
        cwd: "/work/dir".to_owned(),
        user: UserSpec { user: options.get("lathe.user").unwrap_or_default() },
        hostname: "rank-0".to_owned(),
        root: disk("root".to_owned(), "erofs"),
        overlay: options.get("lathe.overlay").map(|serial| disk(serial, "ext4")),
        mounts: data.into_iter().collect(),
        network: options.get("lathe.net").map(|_| network),
        limits: Limits { memory: options.number("lathe.memory") << 20, pids: 64, open_files: 0 },
        grace_seconds: 2,
        ..TaskSpec::default()
    }
}

fn host(mut stream: fs::File, options: &Options) -> io::Result<()> {
    println!("host: {:?}", next(&mut stream)?);
    let wall_clock_ns = 1_790_000_000_000_000_000;
    send(&mut stream, &ToGuest::Start { version: VERSION, wall_clock_ns, task: Box::new(task(options)) })?;
    std::thread::sleep(Duration::from_millis(options.number("lathe.wait")));
    let mut signal = options.get("lathe.signal").and_then(|text| text.parse().ok());
    loop {
        match next(&mut stream) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => match other? {
                FromGuest::Output { stream: which, data } => {
                    println!("host: {which:?} {:?}", String::from_utf8_lossy(&data));
                    if options.get("lathe.drop").is_some() {
                        return Ok(());
                    }
                    if let Some(number) = signal.take() {
                        send(&mut stream, &ToGuest::Signal(number))?;
                    }
                }
                message => println!("host: {message:?}"),
            },
        }
    }
}

fn send(stream: &mut fs::File, message: &ToGuest) -> io::Result<()> {
    stream.write_all(&encode(message).map_err(io::Error::other)?)
}

fn next(stream: &mut fs::File) -> io::Result<FromGuest> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut body = vec![0; frame_length(prefix).map_err(io::Error::other)?];
    stream.read_exact(&mut body)?;
    decode(&body).map_err(io::Error::other)
}
