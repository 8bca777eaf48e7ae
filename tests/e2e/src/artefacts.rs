//! The binaries and images that go into hosts.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// The checkout.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap_or_else(|_| ".".into())
}

/// A binary of this workspace, beside the one that runs.
///
/// # Errors
/// When it was not built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program")?;
    let path = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} was not built; run cargo build --release"))?;
    Ok(path)
}

/// Runs a build script of images/ and gives what it made: its last line of output. The scripts keep what
/// they made, so only the first call takes long. Where nothing can be built, the environment's
/// `LATHE_ARTEFACTS` names a folder that has it, `guest` for `guest/build`.
///
/// # Errors
/// When the script fails; its own words are on stderr.
pub fn built(script: &str, args: &[&str]) -> anyhow::Result<PathBuf> {
    if let Some(made) = std::env::var_os("LATHE_ARTEFACTS") {
        return Ok(Path::new(&made).join(script.trim_end_matches("/build")));
    }
    let path = repository().join("images").join(script);
    let output = Command::new(&path)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", path.display()))?;
    if !output.status.success() {
        bail!("images/{script} failed: {}", output.status);
    }
    let text = String::from_utf8(output.stdout).context("a path that is not UTF-8")?;
    let line = text.lines().last().with_context(|| format!("images/{script} printed no path"))?;
    Ok(PathBuf::from(line))
}

/// The guest's kernel and initramfs.
///
/// # Errors
/// When they cannot be built.
pub fn guest_bundle() -> anyhow::Result<PathBuf> {
    built("guest/build", &[])
}

/// The same with the trimmed kernel, for machines smaller than Debian's kernel.
///
/// # Errors
/// When it cannot be built.
pub fn trimmed_guest_bundle() -> anyhow::Result<PathBuf> {
    built("guest/build", &["--kernel", "trimmed"])
}

/// The same with the kernel for tests of passthrough, and with the init that drives passed-through devices as
/// `device-initramfs`.
///
/// # Errors
/// When it cannot be built.
pub fn device_guest_bundle() -> anyhow::Result<PathBuf> {
    built("guest/build", &["--kernel", "devices"])
}

/// The least-squares image, an OCI archive.
///
/// # Errors
/// When it cannot be built.
pub fn least_squares_image() -> anyhow::Result<PathBuf> {
    built("workloads/least-squares/build", &[])
}

/// The python-ml image, an OCI archive.
///
/// # Errors
/// When it cannot be built.
pub fn python_ml_image() -> anyhow::Result<PathBuf> {
    built("python-ml/build", &[])
}

/// NIST's Longley data.
pub fn longley() -> PathBuf {
    repository().join("images/workloads/data/longley.csv")
}

/// A job file that ships with Lathe.
pub fn job(name: &str) -> PathBuf {
    repository().join("images/workloads/jobs").join(name)
}
