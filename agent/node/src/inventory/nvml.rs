//! What NVIDIA's driver knows, asked through the program `lathe-nvml` and merged by PCI address.
//!
//! The answer is taken for hostile: the driver passes on what a device's firmware says, and a device
//! may have been a tenant's.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lathe_api::HostPciAddress;
use lathe_api::gpu::{Ecc, Gpu, GpuHealth, NvmlInfo, RecoveryAction};
use lathe_nvml::{Device, Document};

use super::health::assess;
use super::preflight::{blocks, warns};

/// Without persistence mode the driver initialises each GPU when it is asked, some seconds a GPU. One
/// that is sick takes minutes.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A document about 16 GPUs has 10 KiB.
const MAX_BYTES: u64 = 1 << 20;

/// More GPUs than any host has.
const MAX_GPUS: usize = 256;

/// `NVML_NVLINK_MAX_LINKS` of today, doubled.
const MAX_PEERS: usize = 36;

/// Longer than any name or UUID.
const MAX_TEXT: usize = 128;

/// The driver that NVML speaks to.
const NVIDIA: &str = "nvidia";

/// Why NVML did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NvmlError {
    /// Not installed.
    #[error("{} cannot be run: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Hung.
    #[error("NVML did not answer within {0:?}: a GPU or its driver hangs")]
    Timeout(Duration),
    /// Hung before, and its process cannot even be killed.
    #[error("NVML hangs in the driver since it was last asked")]
    StillHangs,
    /// Said why.
    #[error("{0}")]
    Failed(String),
    /// Too much.
    #[error("lathe-nvml printed more than {MAX_BYTES} bytes")]
    TooLong,
    /// Not the document.
    #[error("lathe-nvml printed something else than its document: {0}")]
    Garbage(serde_json::Error),
}

/// Adds to GPUs that NVIDIA's driver runs what it says of them, if there are any; `program` is started
/// only then.
pub(super) fn enrich(
    gpus: &mut [Gpu],
    program: &Path,
    limit: Duration,
    xids: impl FnOnce() -> BTreeMap<HostPciAddress, u32>,
) {
    if !gpus.iter().any(driven) {
        return;
    }
    match ask(program, limit) {
        Ok(document) => merge(gpus, &document, &xids()),
        Err(error) => {
            let hangs = matches!(error, NvmlError::Timeout(_) | NvmlError::StillHangs);
            let error = clean(&error.to_string(), 2 * MAX_TEXT);
            tracing::warn!(%error, "NVML does not answer");
            for gpu in gpus.iter_mut().filter(|gpu| driven(gpu)) {
                let what = format!("nothing is known of its health: {error}");
                gpu.problems.push(if hangs {
                    // A driver that hangs would hang as well when the GPU is taken from it.
                    blocks(what, "see the kernel log for Xids; restart the host if nvidia-smi hangs too")
                } else {
                    warns(
                        what,
                        "install lathe-nvml beside lathe-agent; nvidia-smi shows whether the driver works",
                    )
                });
            }
        }
    }
}

/// Whether NVIDIA's driver runs it.
pub(super) fn driven(gpu: &Gpu) -> bool {
    gpu.driver.as_deref() == Some(NVIDIA)
}

/// Runs the program. It is killed when its time is over. In a driver's call it dies only when the call
/// ends; until then no other is started, or there would be one more every minute.
fn ask(program: &Path, limit: Duration) -> Result<Document, NvmlError> {
    static HUNG: Mutex<Vec<(PathBuf, Child)>> = Mutex::new(Vec::new());
    let hung = || HUNG.lock().unwrap_or_else(PoisonError::into_inner);
    hung().retain_mut(|(_, child)| matches!(child.try_wait(), Ok(None)));
    if hung().iter().any(|(of, _)| of == program) {
        return Err(NvmlError::StillHangs);
    }
    let start = |source| NvmlError::Start { program: program.to_owned(), source };
    let mut child = Command::new(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    let output = collect(child.stdout.take());
    let errors = collect(child.stderr.take());
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(start)? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            hung().push((program.to_owned(), child));
            return Err(NvmlError::Timeout(limit));
        }
        std::thread::sleep(POLL);
    };
    // Whoever holds the pipes' other ends now is no part of it: what is there is all.
    let output = output.recv_timeout(POLL * 100).unwrap_or_default();
    if !status.success() {
        let errors = errors.recv_timeout(POLL * 100).unwrap_or_default();
        let text = String::from_utf8_lossy(&errors);
        let line = text.lines().next().unwrap_or_default();
        let line = line.strip_prefix("lathe-nvml: ").unwrap_or(line);
        let line = if line.is_empty() { format!("lathe-nvml ended with {status}") } else { line.to_owned() };
        return Err(NvmlError::Failed(line));
    }
    if output.len() as u64 > MAX_BYTES {
        return Err(NvmlError::TooLong);
    }
    serde_json::from_slice(&output).map_err(NvmlError::Garbage)
}

/// Reads a pipe in a thread of its own, so that a full one does not stop the program.
fn collect<R: Read + Send + 'static>(pipe: Option<R>) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // Ends at the limit: the program then gets SIGPIPE. What was read till an error counts.
            let _ = pipe.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

fn merge(gpus: &mut [Gpu], document: &Document, xids: &BTreeMap<HostPciAddress, u32>) {
    let devices: BTreeMap<HostPciAddress, &Device> = document
        .gpus
        .iter()
        .take(MAX_GPUS)
        .filter_map(|device| Some((device.address.parse().ok()?, device)))
        .collect();
    for gpu in gpus.iter_mut().filter(|gpu| driven(gpu)) {
        let Some(device) = devices.get(&gpu.address) else {
            let lost = document.lost.first().map(|line| format!(": {}", clean(line, MAX_TEXT)));
            gpu.health = GpuHealth::Failed(format!(
                "its driver does not know it any more{}",
                lost.unwrap_or_default()
            ));
            continue;
        };
        let info = info(device, &document.driver_version, xids.get(&gpu.address).copied());
        gpu.health = assess(&info);
        if !device.name.is_empty() {
            gpu.model = clean(&device.name, MAX_TEXT);
        }
        gpu.memory_bytes = device.memory_bytes.unwrap_or(gpu.memory_bytes);
        if info.mig_mode == Some(true) {
            gpu.problems.push(warns(
                "it is partitioned into instances (MIG); a guest gets all of it, unpartitioned",
                format!("nvidia-smi -i {} -mig 0, if nothing on the host uses the instances", gpu.address),
            ));
        }
        for failure in device.failures.iter().take(MAX_PEERS) {
            tracing::debug!(gpu = %gpu.address, failure = clean(failure, MAX_TEXT), "NVML does not tell");
        }
        gpu.nvml = Some(info);
    }
}

fn info(device: &Device, driver_version: &str, last_xid: Option<u32>) -> NvmlInfo {
    let peers = device.nvlink_peers.iter().take(MAX_PEERS).filter_map(|peer| peer.parse().ok());
    NvmlInfo {
        uuid: clean(&device.uuid, MAX_TEXT),
        serial: device.serial.as_ref().map(|serial| clean(serial, MAX_TEXT)).filter(|it| !it.is_empty()),
        driver_version: clean(driver_version, MAX_TEXT),
        mig_mode: device.mig_mode,
        ecc: device.ecc_enabled.map(|enabled| Ecc {
            enabled,
            corrected: device.ecc_corrected.unwrap_or(0),
            uncorrected: device.ecc_uncorrected.unwrap_or(0),
        }),
        nvlink_peers: peers.collect(),
        recovery_action: device.recovery_action.map(action),
        last_xid,
        temperature_celsius: device.temperature_celsius,
        power_milliwatts: device.power_milliwatts,
    }
}

/// `nvmlDeviceGpuRecoveryAction_t` of NVML 13.
fn action(value: u64) -> RecoveryAction {
    match value {
        0 => RecoveryAction::None,
        // 6 resets the bus rather than the GPU: to whoever waits for it, that is the same.
        1 | 6 => RecoveryAction::Reset,
        2 | 7 => RecoveryAction::Reboot,
        3 => RecoveryAction::DrainPeers,
        4 => RecoveryAction::DrainAndReset,
        _ => RecoveryAction::Unknown,
    }
}

/// Text for one line of a terminal: bounded, without control characters.
fn clean(text: &str, limit: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::HostFiles;
    use crate::inventory::fake::{FakeHost, two_gpus};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const ANSWER: &str = r#"{"driver_version":"570.86.15","gpus":[{"address":"00000000:03:00.0",
        "uuid":"GPU-5a1b","name":"NVIDIA H100 80GB HBM3","serial":"165","memory_bytes":85520809984,
        "mig_mode":false,"ecc_enabled":true,"ecc_corrected":3,"ecc_uncorrected":0,
        "nvlink_peers":["00000000:07:00.0","00000000:08:00.0"],"recovery_action":0,
        "temperature_celsius":31,"power_milliwatts":70123}],"lost":[]}"#;

    /// The GPU of `two_gpus` that NVIDIA's driver runs, after a program of this text was asked.
    fn enriched(script: &str, limit: Duration, xids: &[(&str, u32)]) -> Gpu {
        let host: FakeHost = two_gpus();
        let program = host.path("nvml");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let xids = xids.iter().map(|(address, xid)| (address.parse().unwrap(), *xid)).collect();
        let mut gpus = crate::inventory::gpus::read(&HostFiles(host.root()), &[]);
        enrich(&mut gpus, &program, limit, || xids);
        assert!(gpus[0].nvml.is_none() && gpus[0].problems.is_empty(), "another driver's GPU");
        gpus.remove(1)
    }

    fn answered(json: &str) -> Gpu {
        enriched(&format!("cat <<'X'\n{json}\nX"), LIMIT, &[])
    }

    fn unknown(gpu: &Gpu, words: &str) {
        assert!(gpu.nvml.is_none());
        let what = &gpu.problems[0].what;
        assert!(what.contains("nothing is known of its health") && what.contains(words), "{what}");
    }

    #[test]
    fn what_nvml_says_is_merged_by_address() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&answered(ANSWER)).unwrap());
    }

    #[test]
    fn a_gpu_that_asks_for_a_reset_has_failed_and_comes_back_after_it() {
        let sick = answered(&ANSWER.replace("\"recovery_action\":0", "\"recovery_action\":1"));
        assert!(matches!(sick.health, GpuHealth::Failed(_)) && !sick.is_usable());
        let script = format!("cat <<'X'\n{ANSWER}\nX");
        let well = enriched(&script, LIMIT, &[("0000:03:00.0", 95)]);
        assert_eq!((well.health.clone(), well.is_usable()), (GpuHealth::Healthy, true));
        assert_eq!(well.nvml.unwrap().last_xid, Some(95));
    }

    #[test]
    fn a_gpu_that_is_missing_from_the_answer_has_failed() {
        let gpu = answered(r#"{"driver_version":"570","gpus":[],"lost":["GPU 0: GPU is lost"]}"#);
        assert!(matches!(gpu.health, GpuHealth::Failed(reason) if reason.ends_with("GPU 0: GPU is lost")));
    }

    #[test]
    fn failures_are_told_and_change_nothing_else() {
        unknown(
            &enriched("echo 'lathe-nvml: libnvidia-ml.so.1 not found' >&2; exit 1", LIMIT, &[]),
            "libnvidia-ml.so.1 not found",
        );
        let hangs = enriched("exec sleep 600", Duration::from_millis(50), &[]);
        unknown(&hangs, "did not answer within 50ms");
        assert!(!hangs.is_usable(), "it would hang when the GPU is taken, too");
        unknown(&enriched("kill -SEGV $$", LIMIT, &[]), "signal: 11");
        assert!(answered("[1, 2").is_usable(), "passthrough needs no driver");
        unknown(&answered("[1, 2"), "something else");
        unknown(&enriched("head -c 3000000 /dev/zero", LIMIT, &[]), "lathe-nvml");
        let mut gpus = crate::inventory::gpus::read(&HostFiles(two_gpus().root()), &[]);
        enrich(&mut gpus, Path::new("/nonexistent/lathe-nvml"), LIMIT, BTreeMap::new);
        unknown(&gpus[1], "cannot be run");
    }

    #[test]
    fn gpus_whose_driver_was_not_asked_yet_are_not_offered() {
        let mut gpus = crate::inventory::gpus::read(&HostFiles(two_gpus().root()), &[]);
        crate::inventory::hold_back_unasked(&mut gpus);
        assert_eq!(gpus.iter().map(Gpu::is_usable).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn hostile_sizes_are_cut() {
        let peers = vec!["\"00000000:07:00.0\""; 5000].join(",");
        let json = ANSWER
            .replace("NVIDIA H100 80GB HBM3", &format!("\\u001b[2J{}", "x".repeat(100_000)))
            .replace("\"00000000:07:00.0\",\"00000000:08:00.0\"", &peers)
            .replace("85520809984", "18446744073709551615");
        let gpu = answered(&json);
        assert_eq!((gpu.model.len(), gpu.model.contains('\u{1b}')), (MAX_TEXT, false));
        assert_eq!(gpu.nvml.unwrap().nvlink_peers.len(), MAX_PEERS);
    }
}
