//! Machines with passed-through devices, without a cluster: binding through sysfs, `lathe-vmm`, and what
//! `device-test` prints in the guest.

pub mod rounds;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use lathe_testbed::{Host, HostDescription, Output, Process, Status};
use serde_json::{Value, json};

use crate::artefacts;
use crate::wait::{PATIENCE, until};

/// Where the control socket of the machine that was started last is.
pub const SOCKET: &str = "/t/api";

/// Where the output of the machine that was started last goes, its guest's console included.
const LOG: &str = "/t/vm.log";

/// Both of the kernel's interfaces to VFIO, as `vfio.backend` has them. A host of
/// [`KernelFlavour::Iommufd`](lathe_testbed::KernelFlavour) offers both.
pub const BACKENDS: [&str; 2] = ["container", "iommufd"];

/// A host with the VMM, `lathe`, `device-test` and a guest that drives devices.
///
/// # Errors
/// When one of them is not built.
pub fn host() -> anyhow::Result<HostDescription> {
    let bundle = artefacts::device_guest_bundle()?;
    Ok(HostDescription::new("vmm")
        .disk_mib(0)
        .file(bundle.join("vmlinuz"), "/t/vmlinuz")
        .file(bundle.join("device-initramfs"), "/t/initramfs")
        .file(bundle.join("cmdline"), "/t/cmdline")
        .file(artefacts::binary("lathe-vmm")?, "/usr/bin/lathe-vmm")
        .file(artefacts::binary("lathe")?, "/usr/bin/lathe")
        .file(artefacts::binary("device-test")?, "/usr/bin/device-test"))
}

/// Gives functions of the host to vfio-pci.
///
/// # Errors
/// When the host will not.
pub fn bind(host: &Host, addresses: &[&str]) -> anyhow::Result<()> {
    for address in addresses {
        host.shell(&format!(
            "modprobe vfio-pci 2>/dev/null
             cd /sys/bus/pci/devices/{address}
             [ ! -e driver ] || echo {address} >driver/unbind
             echo vfio-pci >driver_override && echo {address} >/sys/bus/pci/drivers_probe
             [ $(basename $(readlink driver)) = vfio-pci ]"
        ))
        .with_context(|| format!("binding {address}"))?;
    }
    Ok(())
}

/// Takes a function from vfio-pci; no driver has it then.
///
/// # Errors
/// When the host will not.
pub fn unbind(host: &Host, address: &str) -> anyhow::Result<()> {
    host.shell(&format!(
        "cd /sys/bus/pci/devices/{address} && echo {address} >driver/unbind && echo >driver_override"
    ))?;
    Ok(())
}

/// A machine's description: two CPUs, 256 MiB, the guest's actions and their options as words of its command
/// line, and the devices by their addresses on the host with the IDs `d0`, `d1` and so on.
#[derive(Clone, Debug)]
pub struct Machine {
    actions: String,
    /// The description, for what differs.
    pub vm: Value,
}

impl Machine {
    /// One that does `actions`, as `tree,nvme lathe.seed=3`.
    #[must_use]
    pub fn new(actions: &str, devices: &[&str]) -> Self {
        let passthrough: Vec<Value> = (0..)
            .zip(devices)
            .map(|(index, address): (u32, _)| json!({"id": format!("d{index}"), "address": address}))
            .collect();
        let vm = json!({
            "boot": {"kernel": "/t/vmlinuz", "initramfs": "/t/initramfs"},
            "cpus": {"count": 2},
            "memory": {"size": "256 MiB"},
            "serial": {"mode": "stdio"},
            "passthrough": passthrough,
        });
        Self { actions: actions.to_owned(), vm }
    }

    /// Sets a field.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.vm[field] = value;
        self
    }

    /// Sets the kernel's interface, `container` or `iommufd`.
    #[must_use]
    pub fn backend(self, backend: &str) -> Self {
        self.with("vfio", json!({"backend": backend}))
    }

    fn write(&self, host: &Host) -> anyhow::Result<()> {
        let mut vm = self.vm.clone();
        let cmdline = host.shell("cat /t/cmdline")?;
        vm["boot"]["cmdline"] = json!(format!("{} lathe.test={}", cmdline.trim(), self.actions));
        Ok(host.write_file("/t/vm.json", vm.to_string())?)
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When the host does not answer, or it does not end.
    pub fn run(&self, host: &Host) -> anyhow::Result<Ended> {
        self.write(host)?;
        let command = host.command(["lathe-vmm", "--config", "/t/vm.json"])?;
        Ok(Ended(command.limit(PATIENCE).run()?))
    }

    /// Runs it to its end, which has to be that of a guest that did all it had to.
    ///
    /// # Errors
    /// As [`run`](Self::run), and with all output when the guest ended otherwise.
    pub fn check(&self, host: &Host) -> anyhow::Result<Ended> {
        let ended = self.run(host)?;
        let done = ended.0.status == Status::Exited(0) && ended.text().contains("DEVICES-DONE");
        ensure!(done, "{:?}: {}\n{}", ended.0.status, ended.text(), ended.stderr());
        Ok(ended)
    }

    /// Runs it, which the VMM has to refuse before a guest runs: exit status 2, one line with all of `words`, and
    /// each of the host's functions with the driver that it had.
    ///
    /// # Errors
    /// When any of it is otherwise.
    pub fn refused(&self, host: &Host, words: &[&str]) -> anyhow::Result<()> {
        let before = drivers(host)?;
        let ended = self.run(host)?;
        one_line(&ended.stderr(), words)?;
        let text = ended.text();
        ensure!(ended.0.status == Status::Exited(2) && text.is_empty(), "{:?}: {text}", ended.0.status);
        let after = drivers(host)?;
        ensure!(after == before, "drivers were {before:?} and are {after:?}");
        Ok(())
    }

    /// Starts it with the control API on [`SOCKET`], and waits for that.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<'a>(&self, host: &'a Host) -> anyhow::Result<Running<'a>> {
        self.write(host)?;
        // What the machine before said must not be taken for this one's words.
        host.shell(&format!("rm -f {LOG} {SOCKET}"))?;
        let argv = ["lathe-vmm", "--config", "/t/vm.json", "--api-socket", SOCKET];
        let running = Running { host, process: host.spawn(argv, LOG)? };
        until("the control API", PATIENCE, || {
            let there = host.exec(["test", "-S", SOCKET])?.status.success();
            Ok((there || running.has_ended()?).then_some(()))
        })?;
        Ok(running)
    }
}

/// What a machine left behind.
pub struct Ended(pub Output);

impl Ended {
    /// The guest's console.
    #[must_use]
    pub fn text(&self) -> String {
        self.0.text()
    }

    /// The VMM's own words.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).trim().to_owned()
    }

    /// Nothing is said where the devices reach each other, as `container` has it. In the IOMMU of iommufd device
    /// memory takes Linux 6.19: before, devices do without, and that is said once.
    ///
    /// # Errors
    /// With what was said instead.
    pub fn check_peers(&self, backend: &str) -> anyhow::Result<()> {
        let said = self.stderr();
        if backend == "iommufd" {
            return one_line(&said, &["not each other: iommufd cannot map"]);
        }
        ensure!(said.is_empty(), "{said}");
        Ok(())
    }

    /// The lines that start with this word, without it.
    #[must_use]
    pub fn lines(&self, word: &str) -> Vec<String> {
        lines(&self.text(), word)
    }
}

/// The driver of each function of the host that has one, to be compared.
fn drivers(host: &Host) -> anyhow::Result<BTreeMap<String, String>> {
    let script = "for d in /sys/bus/pci/devices/*; do
        echo ${d##*/} $(basename $(readlink $d/driver) 2>/dev/null)
    done";
    let text = host.shell(script)?;
    Ok(text.lines().filter_map(|line| line.split_once(' ')).map(|(a, d)| (a.into(), d.into())).collect())
}

/// A request that must not be granted: another exit status than 0, and one line with all of `words`.
///
/// # Errors
/// When any of it is otherwise.
pub fn turned_down(output: &Output, words: &[&str]) -> anyhow::Result<()> {
    ensure!(!output.status.success(), "{}", output.text());
    one_line(String::from_utf8_lossy(&output.stderr).trim(), words)
}

fn one_line(text: &str, words: &[&str]) -> anyhow::Result<()> {
    ensure!(text.lines().count() == 1, "not one line: {text}");
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in: {text}");
    }
    Ok(())
}

fn lines(text: &str, word: &str) -> Vec<String> {
    let of = |line: &str| line.trim_end().strip_prefix(word)?.strip_prefix(' ').map(str::to_owned);
    text.lines().filter_map(of).collect()
}

/// A machine that runs.
pub struct Running<'a> {
    host: &'a Host,
    /// Its VMM.
    pub process: Process,
}

impl Running<'_> {
    /// The guest's console so far, and the VMM's own words.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn text(&self) -> anyhow::Result<String> {
        Ok(self.host.shell(&format!("cat {LOG}"))?)
    }

    /// Waits until the guest has printed `count` lines that start with `word`.
    ///
    /// # Errors
    /// When it does not, with all that it printed.
    pub fn wait_for(&self, word: &str, count: usize) -> anyhow::Result<()> {
        let failed = until(&format!("{count} times {word:?} from the guest"), PATIENCE, || {
            let text = self.text()?;
            let failed = self.has_ended()?;
            let seen = lines(&text, word).len() >= count;
            Ok((failed || seen).then_some(failed && !seen))
        })
        .with_context(|| self.text().unwrap_or_default())?;
        ensure!(!failed, "{}", self.text().unwrap_or_default());
        Ok(())
    }

    /// Waits until the machine lists `count` devices.
    ///
    /// # Errors
    /// When it does not, with all that was printed.
    pub fn wait_for_devices(&self, count: usize) -> anyhow::Result<()> {
        let failed = until(&format!("{count} devices"), PATIENCE, || {
            let failed = self.has_ended()?;
            Ok((failed || self.devices()?.len() == count).then_some(failed))
        })
        .with_context(|| self.text().unwrap_or_default())?;
        ensure!(!failed, "{}", self.text().unwrap_or_default());
        Ok(())
    }

    /// Whether nothing more will come: no reason to be patient.
    fn has_ended(&self) -> anyhow::Result<bool> {
        let gone = format!("test -d /proc/{} || echo gone", self.process.pid());
        Ok(self.text()?.contains("DEVICES-FAILED") || !self.host.shell(&gone)?.is_empty())
    }

    /// The devices, as the API has them.
    ///
    /// # Errors
    /// When the VMM does not answer.
    pub fn devices(&self) -> anyhow::Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.host.check(["lathe", "--json", "vm", "device", "list", SOCKET])?)?)
    }

    /// `lathe vm device VERB SOCKET ...`.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn device(&self, verb: &str, words: &[&str]) -> anyhow::Result<Output> {
        let argv = ["lathe", "vm", "device", verb, SOCKET].into_iter().chain(words.iter().copied());
        Ok(self.host.command(argv)?.limit(Duration::from_secs(60)).run()?)
    }

    /// Plugs a device in, for the `round`th time, and waits until the guest has moved data by its engine, as it does
    /// until the device goes.
    ///
    /// # Errors
    /// What the VMM said, or all that the guest printed.
    pub fn plug_edu(&self, address: &str, round: usize) -> anyhow::Result<()> {
        let output = self.device("plug", &[address, "--id", "edu"])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}\n{}", self.text()?);
        self.wait_for("plugged", round)
    }

    /// What the VMM holds of the host, once that stays the same: a request that was just answered has its thread and
    /// connection for a moment.
    ///
    /// # Errors
    /// When the host does not answer, or it keeps changing.
    pub fn held(&self) -> anyhow::Result<Held> {
        let mut last = None;
        until("what the VMM holds", PATIENCE, || {
            let now = Some(self.held_now()?);
            let same = now == last;
            last = now;
            Ok(if same { last } else { None })
        })
    }

    fn held_now(&self) -> anyhow::Result<Held> {
        let pid = self.process.pid();
        let count = |script: &str| -> anyhow::Result<u64> { Ok(self.host.shell(script)?.trim().parse()?) };
        let status = |field: &str| count(&format!("awk '/^{field}:/ {{print $2}}' /proc/{pid}/status"));
        Ok(Held {
            descriptors: count(&format!("ls /proc/{pid}/fd | wc -l"))?,
            threads: status("Threads")?,
            mappings: count(&format!("awk 'NF > 5' /proc/{pid}/maps | wc -l"))?,
            locked_kib: status("VmLck")? + status("VmPin")?,
            pinned_pages: pinned_pages(self.host)?,
        })
    }
}

/// What a VMM holds of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Open file descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
    /// Areas of its address space that have a name: BARs and guest memory are among them, what malloc has for
    /// threads that came and went is not.
    pub mappings: u64,
    /// Locked or pinned memory, as it is counted against the limit.
    pub locked_kib: u64,
    /// Pages that are pinned for DMA, of all processes of the host.
    pub pinned_pages: i64,
}

/// How many pages of the host's are pinned for DMA by whomever: a mapping in an IOMMU that was forgotten shows
/// here.
///
/// # Errors
/// When the host does not answer.
pub fn pinned_pages(host: &Host) -> anyhow::Result<i64> {
    // Each CPU counts on its own; the first line adds that up.
    let script = "echo 1 >/proc/sys/vm/stat_refresh
        awk '/^nr_foll_pin_acquired/ {n += $2} /^nr_foll_pin_released/ {n -= $2} END {print n}' /proc/vmstat";
    Ok(host.shell(script)?.trim().parse()?)
}
