//! Who may talk to whom, as an nftables ruleset.
//!
//! - A sandbox's port sends from its own hardware and IP address only, IPv4 and ARP only.
//! - Sandboxes of one tenant talk to each other, on this node (bridge family, so that frames that
//!   never leave the bridge are filtered without `br_netfilter`) and across nodes (inet family).
//! - The nodes themselves, of all that are outside, connect to services' replicas, at their ports and no
//!   others; answers of those connections pass back.
//! - Nothing else from a sandbox reaches the host itself, other nodes' addresses, or the outside.
//!
//! The ruleset is text and replaced whole in one transaction: there is no moment without it, and
//! nothing of an old one remains.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::process::Stdio;

use lathe_api::artefact::Digest;
use lathe_api::sandbox::TenantAddresses;
use tokio::io::AsyncWriteExt;

use super::BRIDGE;
use super::address::{mac_of, mac_text};
use crate::paths::INTERFACE_PREFIX;

/// The ruleset could not be put in place.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// No nft.
    #[error("cannot run nft: {0}; install nftables")]
    Run(#[from] std::io::Error),
    /// nft or the kernel refused.
    #[error("nft refused the ruleset: {0}")]
    Refused(String),
}

/// The sandboxes' ports on this node: interface and address.
pub type Ports = BTreeMap<String, Ipv4Addr>;

/// Services' replicas on this node, and who connects to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Other nodes.
    pub nodes: BTreeSet<Ipv4Addr>,
    /// Replicas' addresses and TCP ports.
    pub replicas: BTreeSet<(Ipv4Addr, u16)>,
}

impl Served {
    /// Sets, rules for what is routed, and rules for what comes to this host. Where there is no replica
    /// there are none of them, and the kernel does not follow connections for their sake.
    fn rules(&self) -> (String, String, String) {
        if self.replicas.is_empty() {
            return Default::default();
        }
        let replicas: Vec<String> =
            self.replicas.iter().map(|(address, port)| format!("{address} . {port}")).collect();
        let mut sets = format!(
            "  set replicas {{ type ipv4_addr . inet_service; elements = {{ {} }}; }}\n",
            replicas.join(", ")
        );
        let mut routed = String::new();
        let answers = "ip saddr . tcp sport @replicas ct state established";
        if !self.nodes.is_empty() {
            let nodes: Vec<String> = self.nodes.iter().map(ToString::to_string).collect();
            let _ =
                writeln!(sets, "  set nodes {{ type ipv4_addr; elements = {{ {} }}; }}", nodes.join(", "));
            routed = format!(
                "    ip saddr @nodes ip daddr . tcp dport @replicas accept\n    {answers} ip daddr @nodes accept\n"
            );
        }
        (sets, routed, format!("    iifname \"{BRIDGE}\" {answers} accept\n"))
    }
}

/// The ruleset for these tenants, ports and replicas.
pub fn ruleset(tenants: &[TenantAddresses], ports: &Ports, served: &Served) -> String {
    let (served_sets, from_nodes, answers) = served.rules();
    let sets = tenant_sets(tenants);
    let pairs = |source: &str, target: &str| -> String {
        sets.keys().map(|set| format!("    {source} @{set} {target} @{set} accept\n")).collect()
    };
    let declared: String = sets
        .iter()
        .map(|(set, addresses)| {
            format!("  set {set} {{ type ipv4_addr; elements = {{ {} }}; }}\n", addresses.join(", "))
        })
        .collect();
    let bound: Vec<String> = ports
        .iter()
        .map(|(port, address)| format!("\"{port}\" . {} . {address}", mac_text(mac_of(*address))))
        .collect();
    let bound = match bound.is_empty() {
        true => String::new(),
        false => format!(" elements = {{ {} }};", bound.join(", ")),
    };
    let mut text = String::new();
    for family in ["inet", "bridge"] {
        // Adding first makes the deletion never fail.
        let _ = writeln!(text, "add table {family} lathe\ndelete table {family} lathe");
    }
    let _ = write!(
        text,
        "table inet lathe {{
{declared}{served_sets}  chain tenants {{
{routed}{from_nodes}    drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname \"{BRIDGE}\" jump tenants
    oifname \"{BRIDGE}\" jump tenants
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
{answers}    iifname \"{BRIDGE}\" drop
  }}
}}
table bridge lathe {{
{declared}  set bound {{ type ifname . ether_addr . ipv4_addr;{bound} }}
  chain sender {{
    iifname . ether saddr . ip saddr @bound accept
    ether type arp iifname . ether saddr . arp saddr ip @bound jump arp_sender
    drop
  }}
  chain arp_sender {{
    iifname . arp saddr ether . arp saddr ip @bound accept
    drop
  }}
  chain prerouting {{
    type filter hook prerouting priority filter; policy accept;
    iifname \"{INTERFACE_PREFIX}*\" jump sender
  }}
  chain tenants {{
{routed}{resolved}    drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname \"{INTERFACE_PREFIX}*\" jump tenants
    oifname \"{INTERFACE_PREFIX}*\" jump tenants
  }}
}}
",
        routed = pairs("ip saddr", "ip daddr"),
        resolved = pairs("arp saddr ip", "arp daddr ip"),
    );
    text
}

/// The ruleset that removes everything.
pub fn nothing() -> String {
    ["inet", "bridge"].map(|f| format!("add table {f} lathe\ndelete table {f} lathe\n")).concat()
}

/// A set a tenant, named after the tenant's digest: tenants' names may have any characters.
/// What is no address is left out: a malformed entry must not cost the others their filter.
fn tenant_sets(tenants: &[TenantAddresses]) -> BTreeMap<String, Vec<String>> {
    let mut sets: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for tenant in tenants {
        let addresses: BTreeSet<Ipv4Addr> =
            tenant.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        if !addresses.is_empty() {
            let name = format!("t_{}", &Digest::of(tenant.tenant.as_bytes()).hex()[..12]);
            sets.insert(name, addresses.iter().map(ToString::to_string).collect());
        }
    }
    sets
}

/// Puts a ruleset in place, whole or not at all.
///
/// # Errors
/// When nft is missing or refuses; the old ruleset stands.
pub async fn apply(ruleset: &str) -> Result<(), FilterError> {
    let mut child = tokio::process::Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(ruleset.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(FilterError::Refused(text.lines().next().unwrap_or("no reason given").to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str, addresses: &[&str]) -> TenantAddresses {
        TenantAddresses {
            tenant: name.into(),
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
        }
    }

    #[test]
    fn the_ruleset_reads_as_intended() {
        let tenants = [
            tenant("red", &["10.42.1.2", "10.42.2.2"]),
            tenant("blue", &["10.42.1.3", "10.42.1.3", "nonsense; flush ruleset"]),
            tenant("empty", &[]),
        ];
        let ports = Ports::from([("lsb0123456789ab".to_owned(), Ipv4Addr::new(10, 42, 1, 2))]);
        insta::assert_snapshot!(ruleset(&tenants, &ports, &Served::default()));
    }

    #[test]
    fn replicas_are_reached_by_nodes_at_their_ports_alone() {
        let tenants = [tenant("red", &["10.42.1.2"])];
        let address = Ipv4Addr::new(10, 42, 1, 2);
        let mut served = Served { nodes: BTreeSet::new(), replicas: BTreeSet::from([(address, 8080)]) };
        let alone = ruleset(&tenants, &Ports::new(), &served);
        assert!(!alone.contains("@nodes") && alone.contains("@replicas"), "{alone}");
        served.nodes = BTreeSet::from([Ipv4Addr::new(10, 88, 0, 11), Ipv4Addr::new(10, 88, 0, 12)]);
        insta::assert_snapshot!(ruleset(&tenants, &Ports::new(), &served));
    }

    #[test]
    fn an_empty_node_lets_nothing_through() {
        let text = ruleset(&[], &Ports::new(), &Served::default());
        assert!(!text.contains("elements") && text.contains("drop"));
    }
}
