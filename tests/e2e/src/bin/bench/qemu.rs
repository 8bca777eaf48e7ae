//! QEMU, Debian's package, as a peer inside an emulated host.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use lathe_testbed::HostFile;

/// Where it lies in the host.
const ROOT: &str = "/opt/qemu";

/// What its process is called in the host: it is started by its own loader.
pub const PROCESS: &str = "ld-linux-x86-64.so.2";

/// The program on this machine.
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// Firmware that the machines measured here load.
const FIRMWARE: [&str; 7] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/qemu/linuxboot.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/multiboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/kvmvapic.bin",
];

/// QEMU, its libraries and its firmware, for a host.
pub fn files() -> anyhow::Result<Vec<HostFile>> {
    let file = |local: &Path, remote: String| HostFile { local: local.to_owned(), remote };
    let mut files = vec![file(Path::new(PROGRAM), format!("{ROOT}/qemu"))];
    let output = Command::new("ldd").arg(PROGRAM).output().context("cannot run ldd")?;
    ensure!(output.status.success(), "{PROGRAM} is not there; scripts/setup installs it");
    for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
        let name = library.file_name().context("a library without a name")?;
        files.push(file(&library, format!("{ROOT}/lib/{}", name.to_string_lossy())));
    }
    for firmware in FIRMWARE.map(Path::new) {
        if firmware.exists() {
            let name = firmware.file_name().context("firmware without a name")?;
            files.push(file(firmware, format!("{ROOT}/firmware/{}", name.to_string_lossy())));
        }
    }
    Ok(files)
}

/// The paths in ldd's output, the loader among them.
fn libraries(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
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
        let ldd = "\tlinux-vdso.so.1 (0x1)\n\tlibz.so.1 => /lib/libz.so.1 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(libraries(ldd), [Path::new("/lib/libz.so.1"), Path::new("/lib64/ld-linux-x86-64.so.2")]);
    }
}
