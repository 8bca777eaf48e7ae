//! Guests of a few instructions, assembled by hand, and a way to run them in a VMM process.
//!
//! They run on any KVM, also on one that only emulates kernels.

// Clippy exempts only test functions themselves; a helper of theirs fails the test just as well.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

/// Where the guests are linked to.
pub const LOAD: u32 = 0x10_0000;
const COM1: u16 = 0x3f8;
const ACPI_POWER: u16 = 0x600;

/// x86 instructions whose encoding is the same in protected and in long mode.
#[derive(Clone, Debug, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(COM1, byte))
    }

    /// `out dx, al` to the serial port with AL as it is.
    pub fn print_al(self) -> Self {
        let [low, high] = COM1.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xee])
    }

    /// `mov dword [address], value`; protected mode only.
    pub fn store(self, address: u32, value: u32) -> Self {
        self.raw(&[0xc7, 0x05]).raw(&address.to_le_bytes()).raw(&value.to_le_bytes())
    }

    /// `mov al, [address]`; protected mode only.
    pub fn load_al(self, address: u32) -> Self {
        self.raw(&[0xa0]).raw(&address.to_le_bytes())
    }

    pub fn power_off(self) -> Self {
        self.out(ACPI_POWER, 5 << 2 | 1 << 5).halt()
    }

    /// `hlt` for ever
    pub fn halt(self) -> Self {
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// An ELF kernel with a PVH note.
    pub fn pvh(&self) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4_u32, 4, 18] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&LOAD.to_le_bytes());
        self.elf(&note)
    }

    /// An ELF kernel for the 64-bit Linux protocol.
    pub fn linux64(&self) -> Vec<u8> {
        self.elf(&[])
    }

    fn elf(&self, note: &[u8]) -> Vec<u8> {
        let headers = 64 + 2 * 56;
        let code_at = (headers + note.len()) as u64;
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [u64::from(LOAD), 64, 0] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
        elf.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let segments = [(4_u32, headers as u64, 0, note.len()), (1, code_at, u64::from(LOAD), self.0.len())];
        for (kind, offset, address, length) in segments {
            elf.extend_from_slice(&kind.to_le_bytes());
            elf.extend_from_slice(&7_u32.to_le_bytes());
            for word in [offset, address, address, length as u64, length as u64, 4] {
                elf.extend_from_slice(&word.to_le_bytes());
            }
        }
        elf.extend_from_slice(note);
        elf.extend_from_slice(&self.0);
        elf
    }
}

/// A directory with a kernel, `vm.json` and whatever the VMM makes; removed when dropped.
pub struct Bench {
    directory: tempfile::TempDir,
    pub config: Value,
}

impl Bench {
    /// One CPU, 32 MiB, the serial port on standard output.
    pub fn new(kernel: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        std::fs::write(&path, kernel).unwrap();
        let config = json!({
            "boot": {"kernel": path},
            "cpus": {"count": 1},
            "memory": {"size": "32 MiB"},
            "rng": false,
            "serial": {"mode": "stdio"},
        });
        Self { directory, config }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let config = self.path("vm.json");
        std::fs::write(&config, self.config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lathe-vmm"));
        command.arg("--config").arg(config).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the machine to its end.
    pub fn run(&self) -> Output {
        self.command(&[]).output().unwrap()
    }

    /// Starts the machine with a control API.
    pub fn start(&self) -> (Child, PathBuf) {
        let socket = self.path("api");
        let child = self.command(&["--api-socket", socket.to_str().unwrap()]).spawn().unwrap();
        (child, socket)
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether guests run here at all; says so when not.
pub fn kvm() -> bool {
    let present = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !present {
        eprintln!("skipped: /dev/kvm does not open");
    }
    present
}

/// A file with `bytes`.
pub fn write_file(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}
