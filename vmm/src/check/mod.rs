//! Checks of a machine description that need no host: ranges, uniqueness, spelling.
//!
//! Checks against the host (files, memory, CPUs) are made when the machine is prepared.

mod passthrough;

use std::collections::BTreeSet;
use std::fmt::Display;

use crate::config::{ConsoleConfig, HugepageSize, MemorySize, NetworkConfig, VmConfig};

/// A field that will not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    /// Its path in `vm.json`, as `disks[1].id`.
    pub field: String,
    /// The value, the limit, and what to do.
    pub problem: String,
}

fn refuse(field: impl Into<String>, problem: impl Display) -> Result<(), FieldError> {
    Err(FieldError { field: field.into(), problem: problem.to_string() })
}

/// Smallest guest: room for a small kernel, its page tables and an initramfs.
pub const MEMORY_MIN: MemorySize = MemorySize::from_mib(16);
/// Most vCPUs.
pub const CPUS_MAX: u8 = 64;
const CMDLINE_MAX: usize = 2047;
/// Linux's IFNAMSIZ less the terminator.
const TAP_MAX: usize = 15;
/// A virtio-blk serial (virtio 1.2 §5.2.6).
const DISK_ID_MAX: usize = 20;
const QUEUE_PAIRS_MAX: u8 = 8;
/// virtio 1.2 §5.1.4.1.
const MTU_MIN: u16 = 68;

impl VmConfig {
    /// Reads and checks a description.
    ///
    /// # Errors
    /// Names the field, or the line and column where the text is not a description at all.
    pub fn from_json(text: &str) -> Result<Self, FieldError> {
        let config: Self = serde_json::from_str(text)
            .map_err(|error| FieldError { field: "vm.json".to_owned(), problem: error.to_string() })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// The first field that will not do.
    pub fn check(&self) -> Result<(), FieldError> {
        self.check_cmdline()?;
        self.check_cpus()?;
        self.check_memory()?;
        self.check_disks()?;
        self.check_networks()?;
        self.check_passthrough()?;
        self.check_numa()?;
        self.check_vsock()?;
        self.check_consoles()
    }

    fn check_cmdline(&self) -> Result<(), FieldError> {
        let cmdline = &self.boot.cmdline;
        if cmdline.len() > CMDLINE_MAX {
            return refuse("boot.cmdline", format!("{} bytes, at most {CMDLINE_MAX}", cmdline.len()));
        }
        match cmdline.chars().find(|c| !(' '..='~').contains(c)) {
            Some(c) => refuse("boot.cmdline", format!("{c:?} is not printable ASCII")),
            None => Ok(()),
        }
    }

    fn check_cpus(&self) -> Result<(), FieldError> {
        let count = self.cpus.count;
        if !(1..=CPUS_MAX).contains(&count) {
            return refuse("cpus.count", format!("{count} is not between 1 and {CPUS_MAX}"));
        }
        let Some(topology) = self.cpus.topology else { return Ok(()) };
        if !(1..=2).contains(&topology.threads) {
            return refuse("cpus.topology.threads", format!("{} is not 1 or 2", topology.threads));
        }
        let product =
            [topology.sockets, topology.cores, topology.threads].map(u32::from).iter().product::<u32>();
        if product != u32::from(count) {
            let problem = format!("sockets * cores * threads is {product}, cpus.count is {count}");
            return refuse("cpus.topology", problem);
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<(), FieldError> {
        let size = self.memory.size;
        if size < MEMORY_MIN {
            return refuse("memory.size", format!("{size} is less than {MEMORY_MIN}"));
        }
        let page = self.memory.hugepages.map_or(2 << 20, HugepageSize::bytes);
        if !size.bytes().is_multiple_of(page) {
            let page = MemorySize::from_bytes(page);
            return refuse("memory.size", format!("{size} is not a multiple of {page}"));
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), FieldError> {
        let mut seen = BTreeSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let field = format!("disks[{index}].id");
            check_id(&field, &disk.id, DISK_ID_MAX)?;
            if !seen.insert(&disk.id) {
                return refuse(field, format!("{:?} is the ID of another disk", disk.id));
            }
        }
        Ok(())
    }

    fn check_networks(&self) -> Result<(), FieldError> {
        let mut seen = BTreeSet::new();
        for (index, network) in self.networks.iter().enumerate() {
            let field = format!("networks[{index}]");
            check_network(&field, network)?;
            if !seen.insert(&network.id) {
                return refuse(
                    format!("{field}.id"),
                    format!("{:?} is the ID of another network", network.id),
                );
            }
        }
        Ok(())
    }

    fn check_vsock(&self) -> Result<(), FieldError> {
        match &self.vsock {
            // 0 and 1 are reserved, 2 is the host, all ones means any (virtio 1.2 §5.10.4).
            Some(vsock) if vsock.cid < 3 || vsock.cid == u32::MAX => {
                refuse("vsock.cid", format!("{} is reserved, the first free one is 3", vsock.cid))
            }
            _ => Ok(()),
        }
    }

    fn check_consoles(&self) -> Result<(), FieldError> {
        let stdio = ConsoleConfig::Stdio;
        if self.serial == stdio && self.console.as_ref() == Some(&stdio) {
            return refuse("console.mode", "stdio is taken by serial");
        }
        Ok(())
    }
}

fn check_id(field: &str, id: &str, longest: usize) -> Result<(), FieldError> {
    if id.is_empty() || id.len() > longest || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
        return refuse(
            field,
            format!("{id:?} is not 1 to {longest} printable ASCII characters without spaces"),
        );
    }
    Ok(())
}

fn check_network(field: &str, network: &NetworkConfig) -> Result<(), FieldError> {
    check_id(&format!("{field}.id"), &network.id, 64)?;
    if network.tap.is_empty() || network.tap.len() > TAP_MAX || network.tap.contains(['/', ' ', '\0']) {
        return refuse(format!("{field}.tap"), format!("{:?} is not the name of an interface", network.tap));
    }
    check_mac(&format!("{field}.mac"), &network.mac)?;
    if !(1..=QUEUE_PAIRS_MAX).contains(&network.queue_pairs) {
        let problem = format!("{} is not between 1 and {QUEUE_PAIRS_MAX}", network.queue_pairs);
        return refuse(format!("{field}.queue_pairs"), problem);
    }
    match network.mtu {
        Some(mtu) if mtu < MTU_MIN => refuse(format!("{field}.mtu"), format!("{mtu} is less than {MTU_MIN}")),
        _ => Ok(()),
    }
}

fn check_mac(field: &str, mac: &str) -> Result<(), FieldError> {
    let hex = |part: &&str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let parts: Vec<&str> = mac.split(':').collect();
    if parts.len() != 6 || !parts.iter().all(hex) {
        return refuse(field, format!("{mac:?} is not an address like \"02:00:00:00:00:01\""));
    }
    if u8::from_str_radix(parts[0], 16).is_ok_and(|first| first & 1 != 0) {
        return refuse(field, format!("{mac} is a multicast address"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: &str) -> String {
        let mut json: serde_json::Value = serde_json::json!({
            "boot": {"kernel": "k"}, "cpus": {"count": 2}, "memory": {"size": "64 MiB"},
        });
        let change: serde_json::Value = serde_json::from_str(change).unwrap();
        for (key, value) in change.as_object().unwrap() {
            json[key] = value.clone();
        }
        VmConfig::from_json(&json.to_string()).unwrap_err().to_string()
    }

    #[test]
    fn refusals_name_the_field_and_the_value() {
        for (change, message) in [
            (r#"{"cpus":{"count":65}}"#, "cpus.count: 65 is not between 1 and 64"),
            (r#"{"cpus":{"count":0}}"#, "cpus.count: 0 is not between 1 and 64"),
            (
                r#"{"cpus":{"count":4,"topology":{"sockets":1,"cores":3,"threads":1}}}"#,
                "cpus.topology: sockets * cores * threads is 3, cpus.count is 4",
            ),
            (r#"{"memory":{"size":"8 MiB"}}"#, "memory.size: 8 MiB is less than 16 MiB"),
            (r#"{"memory":{"size":"17 MiB"}}"#, "memory.size: 17 MiB is not a multiple of 2 MiB"),
            (
                r#"{"memory":{"size":"512 MiB","hugepages":"1 GiB"}}"#,
                "memory.size: 512 MiB is not a multiple of 1 GiB",
            ),
            (r#"{"vsock":{"cid":2,"socket":"s"}}"#, "vsock.cid: 2 is reserved, the first free one is 3"),
            (
                r#"{"serial":{"mode":"stdio"},"console":{"mode":"stdio"}}"#,
                "console.mode: stdio is taken by serial",
            ),
            (r#"{"boot":{"kernel":"k","cmdline":"a\nb"}}"#, "boot.cmdline: '\\n' is not printable ASCII"),
            (
                r#"{"networks":[{"id":"n","tap":"t","mac":"01:00:00:00:00:01"}]}"#,
                "networks[0].mac: 01:00:00:00:00:01 is a multicast address",
            ),
        ] {
            assert_eq!(refused(change), message);
        }
        for (change, message) in [
            (
                r#"{"passthrough":[{"id":"g","address":"0000:01:00.0"},{"id":"h","address":"0000:01:00.0"}]}"#,
                "passthrough[1].address: 0000:01:00.0 is also passthrough[0]",
            ),
            (
                r#"{"passthrough":[{"id":"g","address":"0000:01:00.0","gpudirect_clique":16}]}"#,
                "passthrough[0].gpudirect_clique: 16 is not between 0 and 15",
            ),
            (r#"{"hotplug_slots":17}"#, "hotplug_slots: 17 is more than 16"),
            (
                r#"{"numa":[{"cpus":1,"memory":"64 MiB"}]}"#,
                "numa: the nodes have 1 CPUs together, cpus.count is 2",
            ),
            (
                r#"{"numa":[{"cpus":2,"memory":"32 MiB"}]}"#,
                "numa: the nodes have 32 MiB together, memory.size is 64 MiB",
            ),
        ] {
            assert_eq!(refused(change), message);
        }
        let twice = r#"{"id":"a","path":"p","format":"raw"}"#;
        let message = refused(&format!(r#"{{"disks":[{twice},{twice}]}}"#));
        assert_eq!(message, "disks[1].id: \"a\" is the ID of another disk");
    }
}
