//! Runs inside a host: starts a command, waits for a marker in its output, and prints as one JSON
//! line how long that took and how much memory the process then used beyond its guest's.
//!
//! `measure --marker TEXT --guest-mib N [--from TEXT] [--api SOCKET] [--timeout-s S] -- COMMAND...`
//!
//! The command is ended when the marker appears: on a host with a deterministic clock an idle guest
//! costs real time. The lines `NAME NUMBER` that the guest prints until the marker are passed on too, and
//! with them what the machine counts: lathe-vmm's metrics where its API is at SOCKET, and KVM's statistics
//! where debugfs is mounted.
//!
//! `measure --bind ADDRESS DRIVER` gives a PCI function to a driver and prints `{"bind_ns": N}`.

mod bind;
mod counters;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;

/// What was seen, times in nanoseconds of this host's monotonic clock, memory in KiB.
#[derive(Debug, Serialize)]
struct Measured {
    /// From just before fork to the marker's last byte.
    marker_ns: u64,
    /// The same for the last text of `--from`, or 0.
    from_ns: u64,
    /// Anonymous memory of the process, without mappings as large as the guest.
    anonymous_kib: u64,
    /// Resident memory of any kind, without the same mappings.
    resident_kib: u64,
    /// `NAME NUMBER` lines before the marker, and what the machine counted.
    lines: BTreeMap<String, f64>,
}

struct Args {
    marker: String,
    from: String,
    api: Option<PathBuf>,
    guest_mib: u64,
    timeout: Duration,
    command: Vec<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Args> {
    let mut args = Args {
        marker: String::new(),
        from: String::new(),
        api: None,
        guest_mib: 0,
        timeout: Duration::from_secs(60),
        command: Vec::new(),
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--marker" => args.marker = value()?,
            "--from" => args.from = value()?,
            "--api" => args.api = Some(value()?.into()),
            "--guest-mib" => args.guest_mib = value()?.parse().context("--guest-mib takes a number")?,
            "--timeout-s" => {
                args.timeout = Duration::from_secs(value()?.parse().context("--timeout-s takes a number")?);
            }
            "--" => {
                args.command = words.collect();
                break;
            }
            _ => bail!("unknown argument {word:?}"),
        }
    }
    if args.marker.is_empty() || args.command.is_empty() || args.guest_mib == 0 {
        bail!("usage: measure --marker TEXT --guest-mib N [OPTION]... -- COMMAND...");
    }
    Ok(args)
}

/// When what came, and what came till then.
struct Seen {
    marker: Instant,
    from: Option<Instant>,
    output: String,
}

/// Reads until `marker` appears, noting when the last `from` did.
fn wait_for(output: &mut impl Read, from: &str, marker: &str, deadline: Instant) -> anyhow::Result<Seen> {
    let mut seen = Vec::new();
    let mut chunk = [0_u8; 4096];
    let mut from_at = None;
    loop {
        let n = output.read(&mut chunk).context("cannot read the command's output")?;
        let now = Instant::now();
        seen.extend_from_slice(&chunk[..n]);
        let fresh = |text: &str| {
            let start = seen.len().saturating_sub(n + text.len().saturating_sub(1));
            !text.is_empty() && seen[start..].windows(text.len()).any(|window| window == text.as_bytes())
        };
        if fresh(from) {
            from_at = Some(now);
        }
        if fresh(marker) {
            let output = String::from_utf8_lossy(&seen).into_owned();
            return Ok(Seen { marker: now, from: from_at, output });
        }
        if n == 0 || now > deadline || seen.len() > 1 << 20 {
            let tail = seen.len().saturating_sub(2000);
            bail!("the marker never came; the output ends:\n{}", String::from_utf8_lossy(&seen[tail..]));
        }
    }
}

/// Sums `(anonymous, resident)` KiB over the mappings of `pid` that are smaller than the guest.
fn memory(pid: u32, guest_kib: u64) -> anyhow::Result<(u64, u64)> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read smaps")?;
    Ok(sum_smaps(&smaps, guest_kib))
}

fn sum_smaps(smaps: &str, guest_kib: u64) -> (u64, u64) {
    let (mut anonymous, mut resident, mut size, mut rss) = (0, 0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u64>)) else {
            continue;
        };
        match key {
            "Size:" => size = kib,
            "Rss:" => rss = kib,
            // Follows Size and Rss in every mapping's block. A guest's memory may be split around the
            // 32-bit hole or rounded, hence the half.
            "Anonymous:" if size < guest_kib / 2 => {
                anonymous += kib;
                resident += rss;
            }
            _ => {}
        }
    }
    (anonymous, resident)
}

fn run() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [option, address, driver] = &words[..]
        && option == "--bind"
    {
        println!("{}", serde_json::json!({"bind_ns": bind::bind(address, driver)?.as_nanos() as u64}));
        return Ok(());
    }
    let args = parse(words.into_iter())?;
    let (mut reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).stdin(Stdio::null());
    command.stdout(writer.try_clone()?).stderr(writer);
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot run {}", args.command[0]))?;
    // Ours must be closed for the pipe to end when the child ends.
    drop(command);
    let watchdog = {
        let (pid, timeout) = (child.id(), args.timeout);
        let (cancel, cancelled) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            if cancelled.recv_timeout(timeout) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        });
        (cancel, thread)
    };
    let result = wait_for(&mut reader, &args.from, &args.marker, start + args.timeout)
        .and_then(|seen| measured(&seen, start, child.id(), &args));
    let _ = child.kill();
    let _ = child.wait();
    drop(watchdog.0);
    let _ = watchdog.1.join();
    println!("{}", serde_json::to_string(&result?)?);
    Ok(())
}

fn measured(seen: &Seen, start: Instant, pid: u32, args: &Args) -> anyhow::Result<Measured> {
    let mut lines: BTreeMap<String, f64> = seen
        .output
        .lines()
        .filter_map(|line| {
            let (name, value) = line.trim().split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect();
    lines.extend(counters::of_kvm(pid));
    if let Some(socket) = &args.api {
        lines.extend(counters::of_vmm(socket)?);
    }
    let (anonymous_kib, resident_kib) = memory(pid, args.guest_mib * 1024)?;
    let since = |at: Instant| u64::try_from((at - start).as_nanos()).unwrap_or(u64::MAX);
    Ok(Measured {
        marker_ns: since(seen.marker),
        from_ns: seen.from.map_or(0, since),
        anonymous_kib,
        resident_kib,
        lines,
    })
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("measure: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_own_memory_is_left_out() {
        let smaps = "\
00400000-00500000 r-xp 00000000 00:00 0 /bin/vmm
Size:               1024 kB
Rss:                 512 kB
Anonymous:             0 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:               65536 kB
Anonymous:         65536 kB
7f1000000000-7f1000100000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                 100 kB
Anonymous:            96 kB
";
        assert_eq!(sum_smaps(smaps, 128 * 1024), (96, 612));
    }

    #[test]
    fn a_marker_split_over_reads_is_found() {
        let mut parts = std::io::Cursor::new(b"noise\nblk_read_4k 99.5\nREADY\n".to_vec());
        let far = Instant::now() + Duration::from_secs(3600);
        let seen = wait_for(&mut parts, "noise", "READY", far).unwrap();
        assert!(seen.output.contains("blk_read_4k 99.5"));
        assert!(seen.from.is_some_and(|from| from <= seen.marker));
    }
}
