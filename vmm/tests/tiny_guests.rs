//! Whole machines with guests of a few instructions: entry points, exits, exit codes, refusals.

mod guests;

use std::time::{Duration, Instant};

use guests::{Bench, Code, kvm, stderr, write_file};
use lathe_vmm::client::{VmState, VmmClient};
use lathe_vmm::exit::ExitReason;
use serde_json::json;

fn assert_ended(output: &std::process::Output, reason: ExitReason) {
    assert_eq!(output.status.code(), Some(reason.code().into()), "{}", stderr(output));
}

#[test]
fn a_pvh_guest_prints_and_powers_off() {
    if !kvm() {
        return;
    }
    let output = Bench::new(&Code::default().print("hello\n").power_off().pvh()).run();
    assert_ended(&output, ExitReason::PowerOff);
    assert_eq!(output.stdout, b"hello\n");
    assert_eq!(stderr(&output), "");
}

#[test]
fn an_elf_without_a_note_is_entered_in_long_mode() {
    if !kvm() {
        return;
    }
    // inc eax; dec eax are REX prefixes in long mode: `48 40 b0 'L'` prints L either way, but
    // `b0 'P'; 48 ff c0` increments RAX in long mode and is `dec eax; inc eax` in protected mode.
    let code = Code::default().raw(&[0xb0, b'P', 0x48, 0xff, 0xc0]).print_al().power_off();
    let output = Bench::new(&code.linux64()).run();
    assert_ended(&output, ExitReason::PowerOff);
    assert_eq!(output.stdout, b"Q");
    assert_eq!(Bench::new(&code.pvh()).run().stdout, b"P");
}

#[test]
fn each_way_to_end_has_its_exit_code() {
    if !kvm() {
        return;
    }
    let ends = [
        (Code::default().out(0x602, 1), ExitReason::Reboot, ""),
        (Code::default().out(0x64, 0xfe), ExitReason::Reboot, ""),
        // mov eax, 0xffff0; jmp eax: the code at the BIOS reset vector is the same in both modes.
        (Code::default().raw(&[0xb8, 0xf0, 0xff, 0x0f, 0x00, 0xff, 0xe0]), ExitReason::Reboot, ""),
        (Code::default().out(0x505, 1), ExitReason::Crash, "the guest kernel panicked"),
        (Code::default().raw(&[0x0f, 0x0b]), ExitReason::Crash, "triple fault"),
    ];
    for (code, reason, message) in ends {
        let output = Bench::new(&code.halt().pvh()).run();
        assert_ended(&output, reason);
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
        assert!(stderr(&output).lines().count() <= 1, "{}", stderr(&output));
    }
}

#[test]
fn ram_ends_where_the_description_says() {
    if !kvm() {
        return;
    }
    let last = (64 << 20) - 4;
    let code = Code::default()
        .store(last, u32::from(b'R'))
        .load_al(last)
        .print_al()
        .store(last + 4, u32::from(b'X'))
        .load_al(last + 4)
        .print_al()
        .power_off();
    let mut bench = Bench::new(&code.pvh());
    bench.config["memory"]["size"] = json!("64 MiB");
    assert_eq!(bench.run().stdout, b"R\xff");
}

#[test]
fn a_second_cpu_starts_by_init_and_sipi() {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if !kvm() || cpus < 2 {
        return;
    }
    // Real-mode code at 0x8000, vector 8: print A, then S5.
    let second =
        [0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd, 0x90];
    let mut code = Code::default().print("B");
    for (index, word) in second.chunks(4).enumerate() {
        code = code.store(0x8000 + 4 * index as u32, u32::from_le_bytes(word.try_into().unwrap()));
    }
    const ICR: u32 = 0xfee0_0300;
    const INIT_ALL_BUT_SELF: u32 = 0xc_4500;
    const SIPI_ALL_BUT_SELF: u32 = 0xc_4608;
    let code = code.store(ICR, INIT_ALL_BUT_SELF).store(ICR, SIPI_ALL_BUT_SELF).halt();
    let mut bench = Bench::new(&code.pvh());
    bench.config["cpus"]["count"] = json!(2);
    let output = bench.run();
    assert_ended(&output, ExitReason::PowerOff);
    assert_eq!(output.stdout, b"BA");
}

#[test]
fn a_serial_file_is_bounded() {
    if !kvm() {
        return;
    }
    let mut bench = Bench::new(&Code::default().print("0123456789").power_off().pvh());
    let log = bench.path("serial.log");
    bench.config["serial"] = json!({"mode": "file", "path": log, "limit": "1 KiB"});
    write_file(&log, &[b'-'; 1020]);
    assert_ended(&bench.run(), ExitReason::PowerOff);
    let written = std::fs::read(&log).unwrap();
    assert_eq!(&written[1020..], b"0123");
}

#[test]
fn the_command_line_and_the_initramfs_reach_the_guest() {
    if !kvm() {
        return;
    }
    // EBX points at the start info: +8 module list count at 12, list at 16, command line at 24.
    let code = Code::default()
        .raw(&[0x8b, 0x4b, 0x18, 0x8a, 0x01]) // mov ecx, [ebx+24]; mov al, [ecx]
        .print_al()
        .raw(&[0x8b, 0x4b, 0x10, 0x8b, 0x09, 0x8a, 0x01]) // mov ecx, [ebx+16]; mov ecx, [ecx]; mov al, [ecx]
        .print_al()
        .power_off();
    let mut bench = Bench::new(&code.pvh());
    let initramfs = bench.path("initramfs");
    write_file(&initramfs, b"ITS CONTENT");
    bench.config["boot"]["initramfs"] = json!(initramfs);
    bench.config["boot"]["cmdline"] = json!("console=ttyS0");
    assert_eq!(bench.run().stdout, b"cI");
}

#[test]
fn the_api_pauses_resumes_and_kills() {
    if !kvm() {
        return;
    }
    // Prints dots for ever.
    let print = Code::default().print(".");
    let back = -(print.0.len() as i8 + 2);
    let mut bench = Bench::new(&print.raw(&[0xeb, back as u8]).pvh());
    let log = bench.path("serial.log");
    bench.config["serial"] = json!({"mode": "file", "path": log, "limit": "64 MiB"});
    let (child, socket) = bench.start();
    let client = VmmClient::new(&socket);
    let deadline = Instant::now() + Duration::from_secs(20);
    while client.state().is_err() {
        assert!(Instant::now() < deadline, "the API did not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(client.state().unwrap().state, VmState::Running);
    client.pause().unwrap();
    client.pause().unwrap();
    assert_eq!(client.state().unwrap().state, VmState::Paused);
    let size = || std::fs::metadata(&log).unwrap().len();
    let paused_at = size();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(size(), paused_at, "the guest ran on while paused");
    client.resume().unwrap();
    while size() == paused_at {
        assert!(Instant::now() < deadline, "the guest did not resume");
        std::thread::sleep(Duration::from_millis(5));
    }
    client.power_button().unwrap();
    assert!(client.metrics().unwrap().contains("lathe_vmm_exits_total{vcpu=\"0\",kind=\"io\"}"));

    // A second VMM must not take the socket of a live one.
    let second = bench.command(&["--api-socket", socket.to_str().unwrap()]).output().unwrap();
    assert_ended(&second, ExitReason::BadConfig);
    assert!(stderr(&second).contains("in use"), "{}", stderr(&second));

    client.kill().unwrap();
    assert_ended(&child.wait_with_output().unwrap(), ExitReason::Killed);
    assert!(!socket.exists(), "the socket was left behind");
}

#[test]
fn sigterm_ends_the_machine_and_cleans_up() {
    if !kvm() {
        return;
    }
    let bench = Bench::new(&Code::default().halt().pvh());
    let (child, socket) = bench.start();
    let deadline = Instant::now() + Duration::from_secs(20);
    let client = VmmClient::new(&socket);
    while client.state().is_err() {
        assert!(Instant::now() < deadline, "the API did not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_ended(&output, ExitReason::Killed);
    assert!(stderr(&output).contains("SIGTERM"));
    assert!(!socket.exists(), "the socket was left behind");
}

#[test]
fn bad_descriptions_are_refused_in_one_line() {
    let bench = || Bench::new(&Code::default().power_off().pvh());
    let refused = |bench: Bench, start: &str| {
        let output = bench.run();
        let message = stderr(&output);
        assert_ended(&output, ExitReason::BadConfig);
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.starts_with(&format!("lathe-vmm: {start}")), "{message}");
        message
    };
    let mut unknown = bench();
    unknown.config["boot"]["krenel"] = json!("x");
    refused(unknown, "vm.json: unknown field `krenel`");
    let mut missing = bench();
    missing.config["boot"]["kernel"] = json!("/nonexistent/vmlinux");
    refused(missing, "boot.kernel: /nonexistent/vmlinux: No such file");
    let script = Bench::new(b"#!/bin/sh\n");
    assert!(refused(script, "boot.kernel: ").contains("is not a kernel: neither ELF nor bzImage"));
    let mut memory = bench();
    memory.config["memory"]["size"] = json!("64 TiB");
    refused(memory, "memory.size: 64 TiB is more than this host's ");
    let mut cpus = bench();
    cpus.config["cpus"]["count"] = json!(64);
    if std::thread::available_parallelism().map_or(1, usize::from) < 64 {
        refused(cpus, "cpus.count: 64 is more than this host's ");
    }
    let mut empty = bench();
    let initramfs = empty.path("initramfs");
    write_file(&initramfs, b"");
    empty.config["boot"]["initramfs"] = json!(initramfs);
    assert!(refused(empty, "boot.initramfs: ").contains("is empty"));
}

#[test]
fn linux_is_refused_at_once_where_kvm_cannot_boot_it() {
    if !kvm() || lathe_vmm::probe::hardware_virtualization() {
        return;
    }
    let mut code = Code::default().power_off();
    code.0.extend_from_slice(b"Linux version 6.12.0 (builder)");
    let output = Bench::new(&code.pvh()).run();
    assert_ended(&output, ExitReason::Unsupported);
    assert!(stderr(&output).contains("scripts/testbed"), "{}", stderr(&output));
}
