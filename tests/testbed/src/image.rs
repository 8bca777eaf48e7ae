//! What a host boots: a kernel and the base archive, from the caches of images/, and a second archive with
//! PID 1 and the files of this host. The kernel unpacks one after the other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::description::{HostDescription, HostFile, KernelFlavour};

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The build script says why on stderr.
    #[error("{} failed: {message}", script.display())]
    Build {
        /// The script.
        script: PathBuf,
        /// The end of what it said.
        message: String,
    },
    /// PID 1 is a binary of this crate.
    #[error("there is no {0}; build it with `cargo build --release -p lathe-testbed`")]
    NoBinary(&'static str),
    /// A file the description names.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// cpio failed.
    #[error("making the archive of the host's files failed: {0}")]
    Archive(String),
}

/// The repository, for its build scripts and binaries: where this was compiled, or `LATHE_ROOT`.
#[must_use]
pub fn repository() -> PathBuf {
    // The manifest is two levels below the root.
    let compiled = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/"));
    std::env::var_os("LATHE_ROOT").map_or_else(|| compiled.to_owned(), PathBuf::from)
}

/// A binary of the workspace: in `LATHE_BIN_DIR`, beside the running program, or where cargo puts it.
#[must_use]
pub fn binary(name: &str) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("LATHE_BIN_DIR").map(PathBuf::from).into_iter().collect();
    if let Ok(program) = std::env::current_exe() {
        // Tests run in target/.../release/deps, programs beside what they look for.
        places.extend(program.ancestors().skip(1).take(2).map(Path::to_owned));
    }
    places.push(repository().join("target/x86_64-unknown-linux-gnu/release"));
    places.into_iter().map(|place| place.join(name)).find(|path| path.is_file())
}

/// Runs an image build script with arguments; the directory it prints.
///
/// # Errors
/// [`ImageError::Build`] with the end of the script's messages.
pub fn build(script: &Path, arguments: &[&str]) -> Result<PathBuf, ImageError> {
    let failed = |message: String| ImageError::Build { script: script.to_owned(), message };
    let output = Command::new(script)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    let last = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().last().unwrap_or_default().to_owned();
    if !output.status.success() {
        return Err(failed(last(&output.stderr)));
    }
    Ok(PathBuf::from(last(&output.stdout)))
}

/// What a host of the product has installed: `lathe`, `lathe-agent` and `lathe-vmm` in /usr/bin, those
/// of them that are built, and the guest bundle in /usr/lib/lathe/guest.
///
/// # Errors
/// When the guest bundle cannot be built.
pub fn installed_files() -> Result<Vec<HostFile>, ImageError> {
    let mut files = Vec::new();
    for name in ["lathe", "lathe-agent", "lathe-vmm"] {
        if let Some(local) = binary(name) {
            files.push(HostFile { local, remote: format!("/usr/bin/{name}") });
        }
    }
    let script = repository().join("images/guest/build");
    if script.exists() {
        let bundle = build(&script, &[])?;
        for name in ["vmlinuz", "initramfs"] {
            files.push(HostFile { local: bundle.join(name), remote: format!("/usr/lib/lathe/guest/{name}") });
        }
    }
    Ok(files)
}

/// The directory with the QEMU that hosts run on (`bin/qemu-system-x86_64`, its files below `root`),
/// fetched where it is not in the cache.
///
/// # Errors
/// When it cannot be fetched.
pub fn qemu() -> Result<PathBuf, ImageError> {
    static QEMU: OnceLock<PathBuf> = OnceLock::new();
    if let Some(qemu) = QEMU.get() {
        return Ok(qemu.clone());
    }
    let qemu = build(&repository().join("images/qemu/fetch"), &[])?;
    Ok(QEMU.get_or_init(|| qemu).clone())
}

/// The directory with `vmlinux` and `base.cpio`, built once a process.
pub(crate) fn base() -> Result<PathBuf, ImageError> {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    if let Some(base) = BASE.get() {
        return Ok(base.clone());
    }
    let base = build(&repository().join("images/host/build"), &[])?;
    Ok(BASE.get_or_init(|| base).clone())
}

/// The image that a host boots.
pub(crate) fn kernel(base: &Path, host: &HostDescription) -> Result<PathBuf, ImageError> {
    if let Some(kernel) = &host.kernel {
        return Ok(kernel.clone());
    }
    Ok(match host.kernel_flavour {
        KernelFlavour::Debian => base.join("vmlinux"),
        KernelFlavour::Iommufd => built_kernel()?.join("vmlinux"),
    })
}

/// The directory that images/kernel/build prints for hosts.
fn built_kernel() -> Result<PathBuf, ImageError> {
    build(&repository().join("images/kernel/build"), &["host"])
}

/// Writes the whole initramfs of a host to `to`.
pub(crate) fn write_initramfs(base: &Path, host: &HostDescription, to: &Path) -> Result<(), ImageError> {
    let init = binary("testbed-init").ok_or(ImageError::NoBinary("testbed-init"))?;
    let mut files = host.files.clone();
    files.push(HostFile { local: init, remote: "/init".into() });
    if let Some(modules) = &host.modules {
        let release = modules.file_name().unwrap_or_default().to_string_lossy();
        list_modules(&release, modules, modules, &mut files)?;
    } else if host.kernel.is_none() && host.kernel_flavour == KernelFlavour::Iommufd {
        let built = built_kernel()?;
        let release = built.join("release");
        let release = fs::read_to_string(&release).map_err(|e| file_error(&release, e))?;
        let modules = built.join("modules");
        list_modules(release.trim(), &modules, &modules, &mut files)?;
    }
    fs::copy(base.join("base.cpio"), to).map_err(|source| file_error(to, source))?;
    append_archive(&files, to)
}

fn file_error(path: &Path, source: io::Error) -> ImageError {
    ImageError::File { path: path.to_owned(), source }
}

/// Every file below a module directory, with its place in the host.
fn list_modules(
    release: &str,
    top: &Path,
    directory: &Path,
    files: &mut Vec<HostFile>,
) -> Result<(), ImageError> {
    for entry in fs::read_dir(directory).map_err(|e| file_error(directory, e))? {
        let path = entry.map_err(|e| file_error(directory, e))?.path();
        if path.is_dir() {
            list_modules(release, top, &path, files)?;
        } else if let Ok(inside) = path.strip_prefix(top) {
            let remote = format!("/lib/modules/{release}/{}", inside.display());
            files.push(HostFile { local: path, remote });
        }
    }
    Ok(())
}

/// Makes a tree of links to the files and appends its archive, with the links followed.
fn append_archive(files: &[HostFile], to: &Path) -> Result<(), ImageError> {
    let staging = tempfile::tempdir().map_err(|e| file_error(Path::new("/tmp"), e))?;
    let mut entries = BTreeSet::new();
    for file in files {
        let local = fs::canonicalize(&file.local).map_err(|e| file_error(&file.local, e))?;
        let remote = merged_usr(&file.remote);
        let link = staging.path().join(&remote);
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).map_err(|e| file_error(parent, e))?;
        }
        let _ = fs::remove_file(&link);
        symlink(&local, &link).map_err(|e| file_error(&link, e))?;
        // A directory has to come before what is in it, as sorting puts it.
        for ancestor in remote.ancestors().filter(|a| !a.as_os_str().is_empty()) {
            entries.insert(ancestor.to_owned());
        }
    }
    let list = staging.path().join(".list");
    let names: String = entries.iter().map(|e| format!("{}\n", e.display())).collect();
    fs::write(&list, names).map_err(|e| file_error(&list, e))?;

    let archive = fs::OpenOptions::new().append(true).open(to).map_err(|e| file_error(to, e))?;
    let input = File::open(&list).map_err(|e| file_error(&list, e))?;
    let output = Command::new("cpio")
        .args(["--quiet", "--create", "--format=newc", "--dereference", "--owner=0:0"])
        .current_dir(staging.path())
        .stdin(input)
        .stdout(archive)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|e| ImageError::Archive(format!("cannot run cpio: {e}; run scripts/setup")))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(ImageError::Archive(String::from_utf8_lossy(&output.stderr).trim().into()))
    }
}

/// The path inside the archive. `/bin` and the like are links in the base archive; a directory of that
/// name in a later archive would take the link's place, and with it all that is behind it.
fn merged_usr(remote: &str) -> PathBuf {
    let inside = remote.trim_start_matches('/');
    let first = inside.split('/').next().unwrap_or_default();
    if ["bin", "sbin", "lib", "lib64"].contains(&first) {
        Path::new("usr").join(inside)
    } else {
        inside.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_the_base_are_not_replaced() {
        assert_eq!(merged_usr("/bin/a"), Path::new("usr/bin/a"));
        assert_eq!(merged_usr("/binary/a"), Path::new("binary/a"));
    }

    #[test]
    fn an_archive_has_parents_first_and_contents_instead_of_links() {
        let directory = tempfile::tempdir().unwrap();
        let local = directory.path().join("local");
        fs::write(&local, "content of the file").unwrap();
        let to = directory.path().join("archive");
        fs::write(&to, "").unwrap();
        let files = [HostFile { local, remote: "/opt/a/b".into() }];
        append_archive(&files, &to).unwrap();
        let bytes = fs::read(&to).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let position = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part} is missing"));
        assert!(position("opt\0") < position("opt/a\0"));
        assert!(position("opt/a\0") < position("opt/a/b\0"));
        assert!(position("content of the file") > 0);
    }

    #[test]
    fn a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("archive");
        fs::write(&to, "").unwrap();
        let files = [HostFile { local: "/no/such/file".into(), remote: "/x".into() }];
        let error = append_archive(&files, &to).unwrap_err().to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }
}
