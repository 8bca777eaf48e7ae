//! `lathe node`: the hosts of the cluster.

use clap::Subcommand;
use lathe_api::client::Client;
use lathe_api::node::{Node, NodeOffer, NodeState};

use super::operate;
use crate::exit::Exit;
use crate::output::{self, Format};

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the nodes.
    List,
    /// Everything about one node.
    Show {
        /// The node's name.
        name: String,
    },
    #[command(flatten)]
    Operate(operate::Operation),
}

/// Runs a subcommand.
///
/// # Errors
/// What the coordinator said.
pub async fn run(command: Command, client: &Client, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::Operate(operation) => return operate::run(operation, client, format).await,
        Command::List => {
            let nodes = client.nodes().await?;
            match format {
                Format::Json => output::json(&nodes)?,
                Format::Table => list(&nodes),
            }
        }
        Command::Show { name } => {
            let node = client.node(&name).await?;
            match format {
                Format::Json => output::json(&node)?,
                Format::Table => show(&node),
            }
        }
    }
    Ok(Exit::Success)
}

/// Its state, and what keeps new work away.
pub fn state(node: &Node) -> String {
    let state = match node.state {
        NodeState::Ready => "ready",
        NodeState::Lost => "lost",
    };
    match &node.offer {
        NodeOffer::Open => state.to_owned(),
        NodeOffer::Cordoned(reason) => format!("{state}, cordoned: {reason}"),
        NodeOffer::Draining(reason) => format!("{state}, draining: {reason}"),
        NodeOffer::Suspected(reason) => format!("{state}, suspected: {reason}"),
    }
}

/// The same in a word or two.
fn short_state(node: &Node) -> &'static str {
    match (node.state, &node.offer) {
        (NodeState::Lost, _) => "lost",
        (NodeState::Ready, NodeOffer::Open) => "ready",
        (NodeState::Ready, NodeOffer::Cordoned(_)) => "cordoned",
        (NodeState::Ready, NodeOffer::Draining(_)) => "draining",
        (NodeState::Ready, NodeOffer::Suspected(_)) => "suspected",
    }
}

fn classes(node: &Node) -> String {
    let names = node.inventory.classes.iter().map(|class| super::job::class_name(*class));
    names.collect::<Vec<_>>().join(",")
}

/// Those that a task could have.
fn usable_gpus(node: &Node) -> usize {
    node.inventory.gpus.iter().filter(|gpu| gpu.is_usable()).count()
}

fn list(nodes: &[Node]) {
    let mut table =
        output::table(&["NAME", "STATE", "ADDRESS", "CPUS", "MEMORY", "GPUS", "CLASSES", "SUBNET", "SEEN"]);
    for node in nodes {
        let memory = node.inventory.memory.map_or(0, |size| size.mib());
        table.add_row([
            node.name.clone(),
            short_state(node).to_owned(),
            node.address.clone(),
            format!("{}/{}", node.allocated_cpus, node.inventory.cpus.online),
            format!("{}/{memory} MiB", node.allocated_memory.mib()),
            format!("{}/{}", node.allocated_gpus, usable_gpus(node)),
            classes(node),
            node.subnet.clone(),
            format!("{} ago", output::age(node.last_heartbeat_ms)),
        ]);
    }
    println!("{table}");
}

fn show(node: &Node) {
    let inventory = &node.inventory;
    let cpus = &inventory.cpus;
    println!("name       {}", node.name);
    println!("state      {}, seen {} ago", state(node), output::age(node.last_heartbeat_ms));
    println!("address    {}, sandboxes in {}", node.address, node.subnet);
    for (label, value) in &node.labels {
        println!("label      {label}={value}");
    }
    for taint in &node.taints {
        println!("taint      {}={}", taint.key, taint.value);
    }
    for window in &node.maintenance {
        let lasts = output::duration(window.until_ms.saturating_sub(window.from_ms));
        println!("away       {} for {lasts}: {}", output::ahead(window.from_ms), window.reason);
    }
    println!("pools      {}", node.pools.join(", "));
    println!("kernel     {}", inventory.kernel);
    println!("agent      {}", inventory.agent_version);
    println!(
        "cpus       {} online, {} allocated; {} sockets, {} cores; {}",
        cpus.online, node.allocated_cpus, cpus.sockets, cpus.cores, cpus.model
    );
    let memory = inventory.memory.map_or_else(|| "unknown".to_owned(), |size| size.to_string());
    println!("memory     {memory}, {} allocated", node.allocated_memory);
    for numa in &inventory.numa {
        println!("numa {:<5} {} CPUs, {} MiB", numa.id, numa.cpus.len(), numa.memory_bytes >> 20);
    }
    for pool in &inventory.hugepages {
        println!("hugepages  {} of {} free, {} MiB each", pool.free, pool.total, pool.page_bytes >> 20);
    }
    for disk in &inventory.disks {
        println!("disk       {} {} MiB {}", disk.name, disk.size_bytes >> 20, disk.model);
    }
    for nic in &inventory.nics {
        println!("nic        {} {} {}", nic.name, nic.mac, nic.driver);
    }
    for gpu in &inventory.gpus {
        println!("gpu        {} {} {}", gpu.address, gpu.model, super::gpu::state(gpu));
    }
    println!("classes    {}", classes(node));
    for problem in &inventory.class_problems {
        println!("           not {problem}");
    }
    let mut table = output::table(&["PCI", "ID", "CLASS", "DRIVER", "IOMMU", "NUMA"]);
    let number = |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    for device in &inventory.pci {
        table.add_row([
            device.address.clone(),
            format!("{:04x}:{:04x}", device.vendor, device.device),
            format!("{:06x}", device.class),
            device.driver.clone().unwrap_or_else(|| "-".to_owned()),
            number(device.iommu_group),
            number(device.numa_node),
        ]);
    }
    println!("{table}");
}
