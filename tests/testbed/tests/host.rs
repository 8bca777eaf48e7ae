//! One emulated host, from the outside: commands, files, virtualization, power.

#![allow(clippy::unwrap_used, reason = "in tests a panic is the message")]

mod common;

use std::fs;
use std::io::Write;
use std::time::Duration;

use kvm_ioctls::Kvm;
use lathe_testbed::{Bed, Device, DeviceKind, Error, Host, HostDescription, Status};
use sha2::{Digest, Sha256};

/// Not a test of this machine: [`kvm_is_real`] runs it inside the host.
#[test]
#[ignore = "runs inside an emulated host"]
fn inside_kvm_makes_a_vcpu() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    vm.create_vcpu(0).unwrap();
}

#[test]
fn one_host() {
    let files = tempfile::tempdir().unwrap();
    let disk = files.path().join("nvme.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    fs::write(files.path().join("shared.txt"), "from outside").unwrap();

    let bed = Bed::new().unwrap();
    let description = HostDescription::new("n1")
        .memory_mib(2048)
        .huge_pages(8)
        .share(files.path())
        .file(std::env::current_exe().unwrap(), "/opt/inside")
        .device(Device::root_port(Device::nvme(&disk, "abc")))
        .device(Device::root_port(Device::switch([DeviceKind::Edu.into()])))
        .device(Device::root_port(Device::pci_bridge([
            DeviceKind::E1000e.into(),
            DeviceKind::BochsDisplay.into(),
        ])));
    let host = bed.boot(description).unwrap();

    streams_and_status(&host);
    commands_side_by_side(&host);
    background(&host);
    files_both_ways(&host, files.path());
    kvm_is_real(&host);
    devices_and_groups(&host);
    machine(&host);
    pausing(&host);
    power(&host);

    let (name, namespace) = (bed.name().to_owned(), bed.namespace());
    assert!(!common::leftovers(&name, &namespace).is_empty(), "the check finds what is there");
    drop(host);
    drop(bed);
    assert_eq!(common::leftovers(&name, &namespace), Vec::<String>::new());
}

fn streams_and_status(host: &Host) {
    let output = host.exec(["sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap();
    assert_eq!(
        (output.status, output.stdout.as_slice(), output.stderr.as_slice()),
        (Status::Exited(3), b"out\n".as_slice(), b"err\n".as_slice())
    );
    assert_eq!(host.exec(["sh", "-c", "kill -9 $$"]).unwrap().status, Status::Signaled(9));
    let error = host.exec(["/no/such/program"]).unwrap_err().to_string();
    assert!(error.contains("/no/such/program"), "{error}");
    let error = host.shell("echo why >&2; false").unwrap_err().to_string();
    assert!(error.contains("exit code 1") && error.contains("why"), "{error}");

    let command = host.command(["sh", "-c", "pwd; echo $A; cat"]).unwrap();
    let text = command.stdin(&b"in"[..]).env("A", "b c").directory("/tmp").check().unwrap();
    assert_eq!(text, "/tmp\nb c\nin");
    // More output than all windows hold, from a daemon's parent: neither blocks the other.
    assert_eq!(host.shell("head -c 3000000 /dev/zero | wc -c; sleep 1000 &").unwrap(), "3000000");

    let slow = host.command(["sh", "-c", "echo begun; sleep 1000 & wait"]).unwrap();
    let error = slow.limit(Duration::from_secs(2)).check().unwrap_err().to_string();
    assert!(error.contains("did not end within 2 s") && error.contains("begun"), "{error}");
    // It went with its children; the sleep of the daemon above is another group's.
    host.shell("for _ in $(seq 100); do [ $(pidof sleep | wc -w) = 1 ] && exit; sleep 0.1; done; false")
        .unwrap();
    host.shell("kill $(pidof sleep)").unwrap();
}

fn commands_side_by_side(host: &Host) {
    host.shell("mkfifo /tmp/a /tmp/b").unwrap();
    std::thread::scope(|scope| {
        // Each waits for the other.
        let first = scope.spawn(|| host.shell("echo one >/tmp/a; cat /tmp/b").unwrap());
        let second = scope.spawn(|| host.shell("cat /tmp/a; echo two >/tmp/b").unwrap());
        assert_eq!(first.join().unwrap(), "two");
        assert_eq!(second.join().unwrap(), "one");
    });
}

fn background(host: &Host) {
    let script = "trap 'echo told; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let mut process = host.spawn(["sh", "-c", script], "/tmp/background.log").unwrap();
    assert_eq!(process.wait(Duration::ZERO).unwrap(), None);
    host.shell("for _ in $(seq 100); do grep -q ready /tmp/background.log && exit; sleep 0.1; done; false")
        .unwrap();
    assert!(host.check(["pidof", "sh"]).unwrap().split(' ').any(|pid| pid == process.pid().to_string()));
    process.signal(15).unwrap();
    assert_eq!(process.wait(Duration::from_secs(60)).unwrap(), Some(Status::Exited(5)));
    assert_eq!(host.read_file("/tmp/background.log").unwrap(), b"ready\ntold\n");
}

fn files_both_ways(host: &Host, directory: &std::path::Path) {
    // Not a multiple of any chunk, not compressible into a pattern that hides a misplaced one.
    let content: Vec<u8> = (0..5_000_011_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let sum: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    let local = directory.join("up");
    fs::File::create(&local).unwrap().write_all(&content).unwrap();
    host.put(&local, "/var/lib/lathe/deep/down").unwrap();
    assert!(host.check(["sha256sum", "/var/lib/lathe/deep/down"]).unwrap().starts_with(&sum));
    let back = directory.join("back");
    host.get("/var/lib/lathe/deep/down", &back).unwrap();
    assert!(fs::read(&back).unwrap() == content, "the file came back changed");

    host.write_file("/tmp/small", "text").unwrap();
    assert_eq!(host.read_file("/tmp/small").unwrap(), b"text");
    let nothing = directory.join("nothing");
    assert!(matches!(host.get("/no/such/file", &nothing), Err(Error::Command { .. })));
    assert!(!nothing.exists());

    assert_eq!(host.check(["cat", "/share/shared.txt"]).unwrap(), "from outside");
    fs::write(directory.join("later.txt"), "later").unwrap();
    assert_eq!(host.check(["cat", "/share/later.txt"]).unwrap(), "later");
    assert!(host.shell("echo x >/share/shared.txt").is_err(), "the share is read-only");
}

fn kvm_is_real(host: &Host) {
    assert!(host.shell("grep -c ' svm ' /proc/cpuinfo").is_ok());
    assert_eq!(host.shell("cat /sys/module/kvm_amd/parameters/npt").unwrap(), "Y");
    host.check(["/opt/inside", "--ignored", "--exact", "inside_kvm_makes_a_vcpu"]).unwrap();
}

fn devices_and_groups(host: &Host) {
    let groups = host
        .shell(
            "for d in /sys/bus/pci/devices/*; do
                 echo $(cat $d/vendor):$(cat $d/device) $(basename $(readlink $d/iommu_group))
             done",
        )
        .unwrap();
    let group = |id: &str| {
        let line = groups.lines().find_map(|line| line.strip_prefix(id));
        line.unwrap_or_else(|| panic!("no device {id} in {groups}")).trim().to_owned()
    };
    let members = |group: &str| groups.lines().filter(|line| line.ends_with(&format!(" {group}"))).count();
    // Alone behind its root port; with the switch's downstream port; with its neighbour on the bus.
    assert_eq!(members(&group("0x1b36:0x0010")), 1, "{groups}");
    assert_eq!(members(&group("0x1234:0x11e8")), 2, "{groups}");
    assert_eq!(group("0x8086:0x10d3"), group("0x1234:0x1111"), "{groups}");
    // Drivers were bound as udev would have.
    assert_eq!(host.shell("cat /sys/block/nvme0n1/size").unwrap(), (64 * 2048).to_string());
}

fn machine(host: &Host) {
    assert_eq!(host.check(["uname", "-n"]).unwrap(), "n1");
    assert_eq!(host.shell("grep -c ^processor /proc/cpuinfo").unwrap(), "2");
    assert_eq!(host.shell("cat /proc/sys/vm/nr_hugepages").unwrap(), "8");
    let mounts = host.check(["cat", "/proc/mounts"]).unwrap();
    assert!(mounts.contains("cgroup2 /sys/fs/cgroup cgroup2"), "{mounts}");
    assert!(!mounts.contains(" cgroup "), "only version 2: {mounts}");
    let controllers = host.check(["cat", "/sys/fs/cgroup/cgroup.controllers"]).unwrap();
    for controller in ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"] {
        assert!(controllers.split(' ').any(|c| c == controller), "{controllers}");
    }
    // What the agent's work needs: a root that can be pivoted, its tools, its kernel features.
    host.shell(
        "set -e; mkdir /tmp/root /tmp/work /tmp/up; mount -t tmpfs none /tmp/root; mkdir /tmp/root/old
         unshare -m sh -c 'cd /tmp/root && pivot_root . old'; umount /tmp/root
         nft add table inet t; nft add chain inet t c '{ type nat hook postrouting priority 100; }'
         nft add rule inet t c ip saddr 10.0.0.0/8 masquerade; nft add chain inet t d; nft add rule inet t d fib saddr type local ct state new accept
         nft delete table inet t
         truncate -s 32M /tmp/x; mkfs.ext4 -q /tmp/x; mkdir /tmp/d; echo hi >/tmp/d/f
         mkfs.erofs /tmp/e /tmp/d >/dev/null 2>&1; mkdir /tmp/m; mount -o loop,ro -t erofs /tmp/e /tmp/m; [ $(cat /tmp/m/f) = hi ]
         mkdir /var/lib/lathe/u /var/lib/lathe/w /tmp/o
         mount -t overlay -o lowerdir=/tmp/m,upperdir=/var/lib/lathe/u,workdir=/var/lib/lathe/w none /tmp/o; echo more >>/tmp/o/f
         umount /tmp/o /tmp/m
         ip link add br0 type bridge; ip link add v0 type veth peer name v1; ip tuntap add mode tap tap0; ip link del br0
         test -c /dev/vhost-net -a -c /dev/vhost-vsock -a -c /dev/vfio/vfio",
    )
    .unwrap();
}

fn pausing(host: &Host) {
    host.pause().unwrap();
    let command = host.command(["true"]).unwrap().limit(Duration::from_secs(2));
    assert!(command.run().is_err(), "a paused host does nothing");
    host.resume().unwrap();
    host.check(["true"]).unwrap();
}

fn power(host: &Host) {
    let boot = |host: &Host| host.check(["cat", "/proc/sys/kernel/random/boot_id"]).unwrap();
    let before = boot(host);
    host.shell("echo kept >/var/lib/lathe/kept; sync; echo lost >/tmp/lost").unwrap();
    assert!(matches!(host.restart(), Err(Error::Running(_))));
    host.kill();
    assert!(!host.is_running());
    assert!(matches!(host.exec(["true"]), Err(Error::Off(_))));
    host.restart().unwrap();
    assert_ne!(boot(host), before);
    assert_eq!(host.check(["cat", "/var/lib/lathe/kept"]).unwrap(), "kept");
    assert!(host.exec(["cat", "/tmp/lost"]).unwrap().status != Status::Exited(0));
    host.shell("echo marker >/dev/ttyS0").unwrap();
    host.shutdown().unwrap();
    assert!(!host.is_running());
    assert!(host.console().contains("marker"));
}

#[test]
fn clock_that_counts_instructions() {
    let bed = Bed::new().unwrap();
    let host = bed.boot(HostDescription::new("n1").memory_mib(1024).deterministic()).unwrap();
    let script = "now() { awk '/^now at/ { print $3; exit }' /proc/timer_list; }
        a=$(now); i=0; while [ $i -lt 10000 ]; do i=$((i+1)); done; b=$(now); echo $((b-a))";
    // Housekeeping of the host's kernel falls into some runs; the least of several is the loop alone.
    let least = || (0..4).map(|_| host.shell(script).unwrap().parse::<u64>().unwrap()).min().unwrap();
    let (first, second) = (least(), least());
    assert!(first.abs_diff(second) * 200 < first, "nanoseconds: {first} and {second}");
}
