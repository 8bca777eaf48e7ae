//! What a running machine counts: lathe-vmm's metrics, and KVM's statistics of the process.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, ensure};

/// Where the kernel shows KVM's statistics, a directory `PID-FD` a virtual machine.
const KVM_STATISTICS: &str = "/sys/kernel/debug/kvm";

/// Samples of lathe-vmm's `/metrics` by name with labels.
pub fn of_vmm(socket: &Path) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("{}", socket.display()))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "/metrics: {head}");
    Ok(samples(body))
}

/// Comments and anything that is not `NAME VALUE` are left out.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

/// KVM's counters of the virtual machine of `pid`, as `kvm_NAME`; none where debugfs is not mounted.
pub fn of_kvm(pid: u32) -> BTreeMap<String, f64> {
    let prefix = format!("{pid}-");
    let machines = fs::read_dir(KVM_STATISTICS).into_iter().flatten().flatten();
    let files = machines
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
    let counter = |entry: fs::DirEntry| {
        let value = fs::read_to_string(entry.path()).ok()?.trim().parse().ok()?;
        Some((format!("kvm_{}", entry.file_name().to_string_lossy()), value))
    };
    files.filter_map(counter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stay_with_the_name() {
        let text = "# HELP a b c\n# TYPE a gauge\na{stage=\"open it\"} 0.25\nb 3\nHTTP\n";
        let samples = samples(text);
        assert_eq!(samples.len(), 2);
        assert_eq!(samples["a{stage=\"open it\"}"], 0.25);
    }
}
