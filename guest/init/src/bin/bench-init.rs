//! PID 1 for the VMM's tests and benchmarks: says that it runs, does what the kernel's command
//! line asks for, and ends the machine. It needs no host, no root filesystem and no network.
//!
//! Its first act is the line `LATHE-INIT-READY` on the console; a boot benchmark stops there.
//! `lathe.test=` then selects what follows, several joined by commas, done in that order:
//!
//! | value | what it does and prints |
//! | --- | --- |
//! | `ready` | nothing more (also when there is no `lathe.test`) |
//! | `info` | `cpus N`, `memory_kib N` |
//! | `blk` | direct I/O one at a time on the disk: `blk_read_4k`, `blk_read_1m`, `blk_write_4k`, each with its mean in microseconds of the guest's monotonic clock |
//! | `disk` | `disk_read BYTES SUM` of the whole disk; then a pattern over its second half: `disk_wrote OFFSET BYTES SUM`, or `disk_read_only` where it refuses writes |
//! | `net` | sends a pattern over TCP, then reads to the end: `net_sent BYTES SUM`, `net_received BYTES SUM` |
//! | `log` | the kernel's log so far, in the format of /dev/kmsg |
//! | `tick` | `tick N` every 100 ms, for `lathe.ticks=N` times (default 50) |
//!
//! `lathe.disk=vdb` names the disk (default `vda`), `lathe.net=10.0.0.2/24,10.0.0.1:9000` the
//! guest's address and the peer, `lathe.bytes=N` what `net` sends (default 1 MiB).
//! `lathe.end=` is `poweroff` (default), `reboot`, `panic`, `hang`, or `button`: wait for the power
//! button, print `button`, power off. SUM is FNV-1a, 64 bits, in hexadecimal. What fails prints
//! `error` and why, and the rest is still done.

#[path = "../modules.rs"]
mod modules;
#[path = "../network.rs"]
mod network;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use lathe_guest_protocol::{Address, Network};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Direct I/O wants buffers, offsets and lengths aligned to the disk's blocks.
const ALIGNMENT: usize = 4 * KIB;

fn main() {
    // Before anything else: boot benchmarks measure up to this line.
    let _ = io::stdout().write_all(b"LATHE-INIT-READY\n");
    if std::process::id() != 1 {
        eprintln!("bench-init: this is PID 1 of a test guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    mount_pseudo_filesystems();
    let options = Options::new(fs::read_to_string("/proc/cmdline").unwrap_or_default());
    let tests = options.get("lathe.test").unwrap_or("ready");
    if tests != "ready" {
        modules::load_all();
    }
    for test in tests.split(',') {
        if let Err(error) = run(test, &options) {
            println!("error {test}: {error}");
        }
    }
    end(options.get("lathe.end").unwrap_or("poweroff"));
}

fn mount_pseudo_filesystems() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir(target);
        if let Err(errno) = mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            && errno != nix::errno::Errno::EBUSY
        {
            println!("error mount {target}: {errno}");
        }
    }
}

/// The kernel's command line.
struct Options {
    line: String,
}

impl Options {
    fn new(line: String) -> Self {
        Self { line }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.line
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, v)| v)
    }

    fn number(&self, name: &str, default: u64) -> io::Result<u64> {
        self.get(name).map_or(Ok(default), |text| {
            text.parse().map_err(|_| io::Error::other(format!("{name}={text} is not a number")))
        })
    }

    fn disk(&self) -> String {
        format!("/dev/{}", self.get("lathe.disk").unwrap_or("vda"))
    }
}

fn run(test: &str, options: &Options) -> io::Result<()> {
    match test {
        "ready" => Ok(()),
        "info" => info(),
        "blk" => time_disk(&options.disk()),
        "disk" => check_disk(&options.disk()),
        "net" => check_network(options),
        "log" => log(),
        "tick" => tick(options.number("lathe.ticks", 50)?),
        unknown => Err(io::Error::other(format!("there is no test {unknown:?}"))),
    }
}

fn info() -> io::Result<()> {
    println!("cpus {}", std::thread::available_parallelism()?);
    let memory = fs::read_to_string("/proc/meminfo")?;
    let total = memory.split_whitespace().nth(1).unwrap_or("0");
    println!("memory_kib {total}");
    Ok(())
}

/// A buffer for direct I/O.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0x5a; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start, len }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

fn open_direct(path: &str, write: bool) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT).open(path)?;
    let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    Ok((file, size))
}

fn time_disk(path: &str) -> io::Result<()> {
    let (file, size) = open_direct(path, false)?;
    time("blk_read_4k", size, 4 * KIB, 256, |buffer, at| file.read_exact_at(buffer, at))?;
    time("blk_read_1m", size, MIB, 16, |buffer, at| file.read_exact_at(buffer, at))?;
    let (file, size) = open_direct(path, true)?;
    time("blk_write_4k", size, 4 * KIB, 256, |buffer, at| file.write_all_at(buffer, at))
}

/// Prints the mean time of `count` operations after one that is not counted.
fn time(
    name: &str,
    size: u64,
    length: usize,
    count: u32,
    mut operation: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = Aligned::new(length);
    let places = (size / length as u64).max(1);
    operation(buffer.get(), 0)?;
    let start = Instant::now();
    for index in 0..u64::from(count) {
        operation(buffer.get(), index % places * length as u64)?;
    }
    let mean = start.elapsed() / count;
    println!("{name} {}.{:03}", mean.as_micros(), mean.as_nanos() % 1000);
    Ok(())
}

/// FNV-1a.
struct Sum(u64);

impl Sum {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0 =
            bytes.iter().fold(self.0, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    }
}

/// Fills `buffer` with the `index`th block of a pattern in which no two blocks are alike.
fn pattern(buffer: &mut [u8], index: u64) {
    let mut state = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for word in buffer.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}

fn check_disk(path: &str) -> io::Result<()> {
    let (file, size) = open_direct(path, false)?;
    println!("disk_read {size} {:016x}", sum_of(&file, 0, size)?);
    match rewrite_half(path, size) {
        // The open succeeds also where the device says that it is read-only.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => println!("disk_read_only"),
        result => result?,
    }
    Ok(())
}

/// Writes a pattern over the second half and reads it back.
fn rewrite_half(path: &str, size: u64) -> io::Result<()> {
    let (file, _) = open_direct(path, true)?;
    let half = (size / 2).next_multiple_of(ALIGNMENT as u64).min(size);
    let mut buffer = Aligned::new(64 * KIB);
    let mut sum = Sum::new();
    for_blocks(half, size, buffer.len, |at, len| {
        let block = &mut buffer.get()[..len];
        pattern(block, at);
        sum.add(block);
        file.write_all_at(block, at)
    })?;
    file.sync_all()?;
    let written = sum_of(&file, half, size)?;
    if written != sum.0 {
        return Err(io::Error::other(format!("wrote {:016x}, read back {written:016x}", sum.0)));
    }
    println!("disk_wrote {half} {} {written:016x}", size - half);
    Ok(())
}

fn sum_of(file: &File, from: u64, to: u64) -> io::Result<u64> {
    let mut buffer = Aligned::new(64 * KIB);
    let mut sum = Sum::new();
    for_blocks(from, to, buffer.len, |at, len| {
        let block = &mut buffer.get()[..len];
        file.read_exact_at(block, at)?;
        sum.add(block);
        Ok(())
    })?;
    Ok(sum.0)
}

fn for_blocks(
    from: u64,
    to: u64,
    step: usize,
    mut block: impl FnMut(u64, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let len = (to - at).min(step as u64);
        block(at, len as usize)?;
        at += len;
    }
    Ok(())
}

fn check_network(options: &Options) -> io::Result<()> {
    let text = options.get("lathe.net").unwrap_or_default();
    let (address, peer) = parse_network(text)
        .ok_or_else(|| io::Error::other(format!("lathe.net={text:?} is not ADDRESS/PREFIX,PEER:PORT")))?;
    let network = Network { address, gateway: None, mtu: 1500, nameservers: Vec::new() };
    network::configure(Some(&network)).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(peer)?;
    let total = options.number("lathe.bytes", MIB as u64)?;
    let (mut sum, mut block) = (Sum::new(), vec![0; 64 * KIB]);
    for_blocks(0, total, block.len(), |at, len| {
        pattern(&mut block[..len], at);
        sum.add(&block[..len]);
        stream.write_all(&block[..len])
    })?;
    stream.shutdown(Shutdown::Write)?;
    println!("net_sent {total} {:016x}", sum.0);
    let (mut sum, mut total) = (Sum::new(), 0);
    loop {
        let len = stream.read(&mut block)?;
        if len == 0 {
            break;
        }
        sum.add(&block[..len]);
        total += len;
    }
    println!("net_received {total} {:016x}", sum.0);
    Ok(())
}

fn parse_network(text: &str) -> Option<(Address, SocketAddrV4)> {
    let (own, peer) = text.split_once(',')?;
    let (address, prefix) = own.split_once('/')?;
    let address: Ipv4Addr = address.parse().ok()?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    Some((Address { octets: address.octets(), prefix }, peer.parse().ok()?))
}

/// Shows where a quiet boot spent its time: priority, number and microseconds precede each line.
fn log() -> io::Result<()> {
    let mut kmsg = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    // The longest record there is; each read returns one.
    let mut record = [0; 8 * KIB];
    loop {
        match kmsg.read(&mut record) {
            Ok(0) => return Ok(()),
            Ok(len) => io::stdout().write_all(&record[..len])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn tick(times: u64) -> io::Result<()> {
    for number in 0..times {
        println!("tick {number}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn end(how: &str) {
    let mode = match how {
        "panic" => {
            let _ = fs::write("/proc/sysrq-trigger", "c");
            // Without sysrq: the kernel panics when its init ends.
            std::process::exit(1)
        }
        "hang" => loop {
            std::thread::park();
        },
        "button" => {
            wait_for_button();
            RebootMode::RB_POWER_OFF
        }
        "reboot" => RebootMode::RB_AUTOBOOT,
        _ => RebootMode::RB_POWER_OFF,
    };
    nix::unistd::sync();
    let Err(errno) = reboot(mode);
    println!("error {how}: {errno}");
}

/// Waits for any input event: the machine has one button.
fn wait_for_button() {
    modules::load_all();
    let pressed = File::open("/dev/input/event0").and_then(|mut device| device.read(&mut [0; 24]));
    match pressed {
        Ok(_) => println!("button"),
        Err(error) => println!("error button: {error}"),
    }
}
