//! `/metrics`: counters as Prometheus text (exposition format 0.0.4).

use std::fmt::Write;
use std::sync::atomic::Ordering;

use crate::kvm::EXIT_KINDS;
use crate::machine::{Controls, DeviceCounters, Passthrough, Sample, State};

/// All metrics of one machine.
pub(super) fn render(machine: &Controls) -> String {
    let mut text = String::new();
    family(&mut text, "lathe_vmm_uptime_seconds", "gauge", "Time since the guest's first instruction.");
    sample(&mut text, "lathe_vmm_uptime_seconds", "", machine.uptime().as_secs_f64());
    family(&mut text, "lathe_vmm_paused", "gauge", "Whether the machine is paused.");
    sample(&mut text, "lathe_vmm_paused", "", f64::from(u8::from(machine.state() == State::Paused)));
    family(&mut text, "lathe_vmm_exits_total", "counter", "Exits of vCPUs to the VMM.");
    for (index, vcpu) in machine.vcpus().iter().enumerate() {
        for (kind, count) in EXIT_KINDS.into_iter().zip(vcpu.counters.read()) {
            let labels = format!("{{vcpu=\"{index}\",kind=\"{kind}\"}}");
            sample(&mut text, "lathe_vmm_exits_total", &labels, count as f64);
        }
    }
    let serial = machine.serial();
    let counters = [("written", &serial.written), ("lost", &serial.lost), ("read", &serial.read)];
    family(&mut text, "lathe_vmm_serial_bytes_total", "counter", "Bytes through the serial port.");
    for (what, counter) in counters {
        let labels = format!("{{direction=\"{what}\"}}");
        sample(&mut text, "lathe_vmm_serial_bytes_total", &labels, counter.load(Ordering::Relaxed) as f64);
    }
    family(&mut text, "lathe_vmm_device_total", "counter", "What the virtio devices count.");
    for Sample { device, name, value } in machine.devices().iter().flat_map(DeviceCounters::samples) {
        // IDs may hold what ends a label's value.
        let device = device.replace('\\', "\\\\").replace('"', "\\\"");
        let labels = format!("{{device=\"{device}\",counter=\"{name}\"}}");
        sample(&mut text, "lathe_vmm_device_total", &labels, value as f64);
    }
    passthrough(&mut text, machine.passthrough());
    text
}

/// Passed-through devices: how long attaching took, what their interrupts and resets did.
fn passthrough(text: &mut String, devices: &Passthrough) {
    if let Some(times) = devices.times() {
        let name = "lathe_vmm_attach_seconds";
        family(text, name, "gauge", "Time of each stage of attaching devices, when that was done last.");
        for (stage, time) in times.stages() {
            sample(text, name, &format!("{{stage=\"{stage}\"}}"), time.as_secs_f64());
        }
    }
    let resets = devices.resets();
    if !resets.is_empty() {
        let name = "lathe_vmm_resets_total";
        family(text, name, "counter", "Resets of devices before the guest got them.");
        for (method, count) in resets {
            sample(text, name, &format!("{{method=\"{method}\"}}"), count as f64);
        }
    }
    let statistics = devices.statistics();
    if !statistics.is_empty() {
        let name = "lathe_vmm_passthrough_total";
        family(text, name, "counter", "What passed-through devices count.");
        for device in statistics {
            let id = device.id.replace('\\', "\\\\").replace('"', "\\\"");
            for (counter, value) in device.interrupts {
                let labels = format!("{{device=\"{id}\",counter=\"{counter}\"}}");
                sample(text, name, &labels, value as f64);
            }
        }
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn sample(text: &mut String, name: &str, labels: &str, value: f64) {
    let _ = writeln!(text, "{name}{labels} {value}");
}
