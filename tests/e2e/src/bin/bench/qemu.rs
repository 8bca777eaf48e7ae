//! QEMU, the one that emulates the hosts, as a peer inside one.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use lathe_testbed::{HostFile, image};

/// Where it lies in the host.
const ROOT: &str = "/opt/qemu";

/// What its process is called in the host: it is started by its own loader.
pub const PROCESS: &str = "ld-linux-x86-64.so.2";

/// Firmware that the machines measured here load, in /usr/share of the packages.
const FIRMWARE: [&str; 7] = [
    "seabios/bios-256k.bin",
    "seabios/bios-microvm.bin",
    "qemu/linuxboot.bin",
    "qemu/linuxboot_dma.bin",
    "qemu/multiboot_dma.bin",
    "qemu/pvh.bin",
    "qemu/kvmvapic.bin",
];

/// QEMU, its libraries and its firmware, for a host.
pub fn files() -> anyhow::Result<Vec<HostFile>> {
    let file = |local: &Path, remote: String| HostFile { local: local.to_owned(), remote };
    let packages = image::qemu()?.join("root/usr");
    let program = packages.join("bin/qemu-system-x86_64");
    let loader = packages.join("lib64").join(PROCESS);
    let mut files = vec![file(&program, format!("{ROOT}/qemu"))];
    let mut list = Command::new(&loader);
    list.arg("--library-path").arg(packages.join("lib/x86_64-linux-gnu")).arg("--list").arg(&program);
    let output = list.output().with_context(|| format!("cannot run {}", loader.display()))?;
    ensure!(output.status.success(), "{} does not name its libraries", program.display());
    for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
        let name = library.file_name().context("a library without a name")?;
        files.push(file(&library, format!("{ROOT}/lib/{}", name.to_string_lossy())));
    }
    for firmware in FIRMWARE.map(|firmware| packages.join("share").join(firmware)) {
        if firmware.exists() {
            let name = firmware.file_name().context("firmware without a name")?;
            files.push(file(&firmware, format!("{ROOT}/firmware/{}", name.to_string_lossy())));
        }
    }
    Ok(files)
}

/// The paths in the loader's list, its own among them: the last of a line, as the first may be a name.
fn libraries(list: &str) -> Vec<PathBuf> {
    list.lines()
        .filter_map(|line| line.split_whitespace().rfind(|word| word.starts_with('/')))
        .map(Into::into)
        .collect()
}

/// QEMU's command line in the host for `machine`, with nothing that was not asked for.
pub fn command(machine: &str, memory_mib: u64) -> Vec<String> {
    let memory = format!("{memory_mib}M");
    let loader = format!("{ROOT}/lib/ld-linux-x86-64.so.2");
    let library_path = format!("{ROOT}/lib");
    let program = format!("{ROOT}/qemu");
    let firmware = format!("{ROOT}/firmware");
    [
        loader.as_str(),
        "--library-path",
        &library_path,
        &program,
        "-L",
        &firmware,
        "-machine",
        machine,
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]
    .into_iter()
    .map(str::to_owned)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_and_libraries_are_found() {
        let list = "\tlinux-vdso.so.1 (0x1)\n\tlibz.so.1 => /lib/libz.so.1 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 => /own/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(libraries(list), [Path::new("/lib/libz.so.1"), Path::new("/own/ld-linux-x86-64.so.2")]);
    }
}
