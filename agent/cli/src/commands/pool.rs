//! `lathe pool` and `lathe tenant`: parts of the cluster, and who may have how much of them.

use std::path::PathBuf;

use clap::Subcommand;
use comfy_table::Table;
use lathe_api::client::Client;
use lathe_api::pool::{Amounts, Pool, PoolStatus, Quota, Tenant, TenantStatus};
use lathe_api::provider::{PoolProvider, ProvidedState, ProviderStatus};
use serde::Serialize;

use super::file;
use crate::exit::Exit;
use crate::output::{self, Format};

/// Subcommands of `lathe pool`.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// List the pools that you may use.
    List,
    /// Everything about one pool.
    Show {
        /// The pool's name.
        name: String,
    },
    /// Make a pool, or replace what was set of it (admin).
    Set {
        /// The pool, TOML (`.toml`) or JSON.
        file: PathBuf,
    },
    /// Remove a pool without jobs and parts (admin); the default pool becomes what it was at first.
    Remove {
        /// The pool's name.
        name: String,
    },
}

/// Subcommands of `lathe tenant`.
#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// What your tenant uses, or every tenant (admin).
    List,
    /// Everything about one tenant.
    Show {
        /// The tenant's name.
        name: String,
    },
    /// Set a tenant's weight and quota (admin).
    Set {
        /// The tenant, TOML (`.toml`) or JSON.
        file: PathBuf,
    },
    /// Forget a tenant's weight and quota (admin); its jobs and tokens stay.
    Remove {
        /// The tenant's name.
        name: String,
    },
}

/// Runs a subcommand of `lathe pool`.
///
/// # Errors
/// When the file is wrong, or what the coordinator said.
pub async fn pool(command: PoolCommand, client: &Client, format: Format) -> anyhow::Result<Exit> {
    match command {
        PoolCommand::List => {
            let pools = client.pools().await?;
            match format {
                Format::Json => output::json(&pools)?,
                Format::Table => println!("{}", pool_table(&pools)),
            }
        }
        PoolCommand::Show { name } => {
            let status = client.pool(&name).await?;
            match format {
                Format::Json => output::json(&status)?,
                Format::Table => print!("{}", pool_text(&status, output::now_ms())),
            }
        }
        PoolCommand::Set { file } => {
            let pool: Pool = file::read(&file)?;
            let pool = client.set_pool(&pool).await?;
            match format {
                Format::Json => output::json(&pool)?,
                Format::Table => println!("pool {} is set", pool.name),
            }
        }
        PoolCommand::Remove { name } => client.remove_pool(&name).await?,
    }
    Ok(Exit::Success)
}

/// Runs a subcommand of `lathe tenant`.
///
/// # Errors
/// When the file is wrong, or what the coordinator said.
pub async fn tenant(command: TenantCommand, client: &Client, format: Format) -> anyhow::Result<Exit> {
    match command {
        TenantCommand::List => {
            let tenants = client.tenants().await?;
            match format {
                Format::Json => output::json(&tenants)?,
                Format::Table => println!("{}", tenant_table(&tenants)),
            }
        }
        TenantCommand::Show { name } => {
            let status = client.tenant(&name).await?;
            match format {
                Format::Json => output::json(&status)?,
                Format::Table => println!("{}", tenant_table(std::slice::from_ref(&status))),
            }
        }
        TenantCommand::Set { file } => {
            let tenant: Tenant = file::read(&file)?;
            let tenant = client.set_tenant(&tenant).await?;
            match format {
                Format::Json => output::json(&tenant)?,
                Format::Table => println!("tenant {} is set", tenant.name),
            }
        }
        TenantCommand::Remove { name } => client.remove_tenant(&name).await?,
    }
    Ok(Exit::Success)
}

fn pool_table(pools: &[PoolStatus]) -> Table {
    let mut table = output::table(&[
        "NAME",
        "PARENT",
        "QUEUE",
        "NODES",
        "CPUS",
        "MEMORY",
        "GPUS",
        "RUNNING",
        "PENDING",
        "GUARANTEED",
        "LIMIT",
    ]);
    for status in pools {
        let PoolStatus { pool, nodes, capacity, usage, running, pending, provider: _ } = status;
        table.add_row([
            pool.name.clone(),
            pool.parent.clone().unwrap_or_default(),
            word(&pool.queue),
            nodes.to_string(),
            format!("{}/{}", usage.cpus, capacity.cpus),
            format!("{}/{} MiB", usage.memory.mib(), capacity.memory.mib()),
            format!("{}/{}", usage.gpus, capacity.gpus),
            running.to_string(),
            pending.to_string(),
            quota(pool.guaranteed.as_ref()),
            quota(pool.limit.as_ref()),
        ]);
    }
    table
}

fn pool_text(status: &PoolStatus, now_ms: u64) -> String {
    let PoolStatus { pool, nodes, capacity, usage, running, pending, provider } = status;
    let mut lines = vec![("name", pool.name.clone())];
    if let Some(parent) = &pool.parent {
        lines.push(("part of", parent.clone()));
    }
    for one in &pool.selector {
        let values =
            if one.values.is_empty() { String::new() } else { format!(" {}", one.values.join(", ")) };
        lines.push(("nodes", format!("{} {}{values}", one.label, word(&one.operator))));
    }
    lines.push(("has", format!("{nodes} nodes, {}", amounts(capacity))));
    lines.push(("uses", format!("{}; {running} jobs run, {pending} wait", amounts(usage))));
    let (queue, backfill) = (word(&pool.queue), word(&pool.backfill));
    lines.push((
        "queue",
        format!("{queue}, backfill {backfill}, next at the latest after {}", pool.starvation),
    ));
    let preemption = if pool.preemption { "preemption" } else { "no preemption" };
    lines.push(("placement", format!("{}, {preemption}", word(&pool.placement))));
    lines.push(("guaranteed", quota(pool.guaranteed.as_ref())));
    lines.push(("limit", quota(pool.limit.as_ref())));
    lines.push(("weight", pool.weight.to_string()));
    let tenants = if pool.tenants.is_empty() { "all".to_owned() } else { pool.tenants.join(", ") };
    lines.push(("tenants", tenants));
    if let (Some(set), Some(status)) = (&pool.provider, provider) {
        lines.extend(provider_lines(set, status, now_ms).into_iter().map(|line| ("provider", line)));
    }
    lines.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect()
}

/// What a pool may have of its provider, has of it, and what is under way.
fn provider_lines(set: &PoolProvider, status: &ProviderStatus, now_ms: u64) -> Vec<String> {
    let ago = |then_ms: u64| output::duration(now_ms.saturating_sub(then_ms));
    let PoolProvider { name, min_nodes, max_nodes, cooldown, idle, shape, .. } = set;
    let gpus = if shape.gpus > 0 { format!(", {} GPUs", shape.gpus) } else { String::new() };
    let mut lines = vec![format!(
        "{name}: {min_nodes} to {max_nodes} nodes of {} CPUs, {}{gpus}; given back after {idle}, cool-down {cooldown}",
        shape.cpus, shape.memory
    )];
    lines.extend(status.problem.clone());
    if let Some(asked) = &status.asked {
        let why = if asked.why.is_empty() { String::new() } else { format!(": {}", asked.why) };
        lines.push(format!(
            "asked for {} nodes {} ago ({}){why}",
            asked.count,
            ago(asked.at_ms),
            asked.request
        ));
    }
    if let Some(failure) = &status.failure {
        let reason = failure.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let again = match failure.again_ms > now_ms {
            true => format!("; asked again {}", output::ahead_of(failure.again_ms, now_ms)),
            false => String::new(),
        };
        lines.push(format!("failed {} ago, {} in a row{reason}{again}", ago(failure.at_ms), failure.times));
    }
    if let Some(until_ms) = status.cooldown_until_ms {
        lines.push(format!("cools down, over {}", output::ahead_of(until_ms, now_ms)));
    }
    for node in &status.nodes {
        let state = match node.state {
            ProvidedState::Coming => "coming",
            ProvidedState::Joined => "joined",
            ProvidedState::Closing => "closing",
            ProvidedState::Releasing => "being given back",
        };
        lines.push(format!("{} {state} for {}", node.name, ago(node.since_ms)));
    }
    lines
}

fn tenant_table(tenants: &[TenantStatus]) -> Table {
    let mut table = output::table(&[
        "NAME",
        "PARENT",
        "WEIGHT",
        "POOL",
        "CPUS",
        "MEMORY",
        "GPUS",
        "RUNNING",
        "PENDING",
        "GUARANTEED",
        "LIMIT",
    ]);
    for TenantStatus { tenant, usage } in tenants {
        let mut row = |pool: &str, amounts: &Amounts, running: u32, pending: u32| {
            table.add_row([
                tenant.name.clone(),
                tenant.parent.clone().unwrap_or_default(),
                tenant.weight.to_string(),
                pool.to_owned(),
                amounts.cpus.to_string(),
                format!("{} MiB", amounts.memory.mib()),
                amounts.gpus.to_string(),
                running.to_string(),
                pending.to_string(),
                quota(tenant.guaranteed.as_ref()),
                quota(tenant.limit.as_ref()),
            ]);
        };
        if usage.is_empty() {
            row("-", &Amounts::default(), 0, 0);
        }
        for one in usage {
            row(&one.pool, &one.amounts, one.running, one.pending);
        }
    }
    table
}

fn amounts(amounts: &Amounts) -> String {
    let Amounts { cpus, memory, gpus, tasks } = amounts;
    format!("{cpus} CPUs, {memory}, {gpus} GPUs, {tasks} tasks")
}

fn quota(quota: Option<&Quota>) -> String {
    let Some(quota) = quota else { return "-".to_owned() };
    let parts = [
        quota.cpus.map(|cpus| format!("{cpus} CPUs")),
        quota.memory.map(|memory| memory.to_string()),
        quota.gpus.map(|gpus| format!("{gpus} GPUs")),
        quota.tasks.map(|tasks| format!("{tasks} tasks")),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "-".to_owned() } else { parts.join(", ") }
}

/// A word of the API, as files have it.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> PoolStatus {
        serde_json::from_str(
            r#"{"pool": {"name": "train", "parent": "gpus", "queue": "fair_share", "preemption": true,
                "selector": [{"label": "zone", "operator": "in", "values": ["a", "b"]}],
                "guaranteed": {"gpus": 8}, "limit": {"gpus": 16, "memory": "1 TiB"}, "tenants": ["red"]},
                "nodes": 2, "capacity": {"cpus": 64, "memory": "2 GiB", "gpus": 16, "tasks": 506},
                "usage": {"cpus": 4, "memory": "1 GiB", "gpus": 8, "tasks": 2}, "running": 1, "pending": 3}"#,
        )
        .unwrap()
    }

    #[test]
    fn a_pool_reads_as_it_was_set() {
        assert_eq!(
            pool_text(&status(), 0),
            "name       train\n\
             part of    gpus\n\
             nodes      zone in a, b\n\
             has        2 nodes, 64 CPUs, 2 GiB, 16 GPUs, 506 tasks\n\
             uses       4 CPUs, 1 GiB, 8 GPUs, 2 tasks; 1 jobs run, 3 wait\n\
             queue      fair_share, backfill easy, next at the latest after 1d\n\
             placement  balanced, preemption\n\
             guaranteed 8 GPUs\n\
             limit      1 TiB, 16 GPUs\n\
             weight     1\n\
             tenants    red\n"
        );
    }

    #[test]
    fn a_pools_provider_says_what_it_made_and_what_went_wrong() {
        let mut status = status();
        let json =
            r#"{"name": "cloud", "max_nodes": 4, "shape": {"cpus": 8, "memory": "32 GiB", "gpus": 2}}"#;
        status.pool.provider = Some(serde_json::from_str(json).unwrap());
        let json = r#"{"nodes": [{"name": "n1", "state": "coming", "since_ms": 50000, "request": "train-1"}],
            "asked": {"request": "train-2", "count": 2, "why": "for jobs that wait: a-ab12cd", "at_ms": 30000},
            "failure": {"reason": "no capacity", "times": 3, "at_ms": 58000, "again_ms": 62000},
            "cooldown_until_ms": 90000}"#;
        status.provider = Some(serde_json::from_str(json).unwrap());
        let text = pool_text(&status, 60_000);
        let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("provider   ")).collect();
        assert_eq!(
            lines,
            [
                "cloud: 0 to 4 nodes of 8 CPUs, 32 GiB, 2 GPUs; given back after 10m, cool-down 1m",
                "asked for 2 nodes 30.0 s ago (train-2): for jobs that wait: a-ab12cd",
                "failed 2.0 s ago, 3 in a row: no capacity; asked again in 2.0 s",
                "cools down, over in 30.0 s",
                "n1 coming for 10.0 s",
            ]
        );
    }

    #[test]
    fn lists_have_a_line_for_each_pool_and_for_each_pool_of_a_tenant() {
        let text = pool_table(&[status()]).to_string();
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("fair_share") && text.contains("8/16"), "{text}");
        let idle = TenantStatus { tenant: Tenant::named("red"), usage: vec![] };
        assert_eq!(tenant_table(&[idle.clone(), idle]).to_string().lines().count(), 3);
    }
}
