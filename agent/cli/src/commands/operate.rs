//! What operators do to nodes: `lathe node cordon`, `drain`, `label` and the like.

use std::collections::BTreeMap;

use anyhow::bail;
use clap::Subcommand;
use lathe_api::TimeSpan;
use lathe_api::client::Client;
use lathe_api::node::{MaintenanceWindow, NodeOperation};
use lathe_api::scheduling::Taint;

use crate::exit::Exit;
use crate::output::{self, Format};

/// Subcommands, for the cluster's admin.
#[derive(Debug, Subcommand)]
pub enum Operation {
    /// The node takes no more work; what runs there stays.
    Cordon {
        /// The node's name.
        name: String,
        /// Why: shown to everybody.
        #[arg(long)]
        reason: String,
    },
    /// The node takes work again: ends a cordon, a drain and suspicion.
    Uncordon {
        /// The node's name.
        name: String,
    },
    /// The node takes no more work, and preemptible jobs there stop and go elsewhere.
    Drain {
        /// The node's name.
        name: String,
        /// Why: shown to everybody.
        #[arg(long)]
        reason: String,
    },
    /// The node will be away for a time: nothing is placed there that would not be done before.
    Maintain {
        /// The node's name.
        name: String,
        /// From now, as `2h`; at once if left out.
        #[arg(long = "in", default_value = "0s")]
        starts_in: TimeSpan,
        /// For how long, as `90m`.
        #[arg(long = "for", required_unless_present = "end")]
        lasts: Option<TimeSpan>,
        /// Why: shown to everybody.
        #[arg(long, required_unless_present = "end")]
        reason: Option<String>,
        /// It will be there: forget all its maintenance.
        #[arg(long, conflicts_with_all = ["starts_in", "lasts", "reason"])]
        end: bool,
    },
    /// Set labels (`zone=a`) or remove them (`zone-`).
    Label {
        /// The node's name.
        name: String,
        /// `KEY=VALUE` or `KEY-`.
        #[arg(required = true)]
        labels: Vec<String>,
    },
    /// Set taints (`team=red`, `broken=`) or remove them (`team-`).
    Taint {
        /// The node's name.
        name: String,
        /// `KEY=VALUE` or `KEY-`.
        #[arg(required = true)]
        taints: Vec<String>,
    },
}

/// Runs a subcommand.
///
/// # Errors
/// When an argument is wrong, or what the coordinator said.
pub async fn run(operation: Operation, client: &Client, format: Format) -> anyhow::Result<Exit> {
    let (name, operation) = request(operation, output::now_ms())?;
    let node = client.operate_node(&name, &operation).await?;
    match format {
        Format::Json => output::json(&node)?,
        Format::Table => println!("{}: {}", node.name, super::node::state(&node)),
    }
    Ok(Exit::Success)
}

fn request(operation: Operation, now_ms: u64) -> anyhow::Result<(String, NodeOperation)> {
    Ok(match operation {
        Operation::Cordon { name, reason } => (name, NodeOperation::Cordon { reason }),
        Operation::Uncordon { name } => (name, NodeOperation::Uncordon),
        Operation::Drain { name, reason } => (name, NodeOperation::Drain { reason }),
        Operation::Maintain { name, starts_in, lasts, reason, end: _ } => match (lasts, reason) {
            (Some(lasts), Some(reason)) => {
                let from_ms = now_ms + starts_in.milliseconds();
                let until_ms = from_ms + lasts.milliseconds();
                (name, NodeOperation::Maintain(MaintenanceWindow { from_ms, until_ms, reason }))
            }
            _ => (name, NodeOperation::EndMaintenance),
        },
        Operation::Label { name, labels } => {
            let (set, remove) = changes(&labels)?;
            (name, NodeOperation::Label { set, remove })
        }
        Operation::Taint { name, taints } => {
            let (set, remove) = changes(&taints)?;
            let set = set.into_iter().map(|(key, value)| Taint { key, value }).collect();
            (name, NodeOperation::Taint { set, remove })
        }
    })
}

/// `KEY=VALUE` sets, `KEY-` removes.
fn changes(words: &[String]) -> anyhow::Result<(BTreeMap<String, String>, Vec<String>)> {
    let (mut set, mut remove) = (BTreeMap::new(), Vec::new());
    for word in words {
        match (word.split_once('='), word.strip_suffix('-')) {
            (Some((key, value)), _) => drop(set.insert(key.to_owned(), value.to_owned())),
            (None, Some(key)) => remove.push(key.to_owned()),
            (None, None) => bail!("{word:?}: write KEY=VALUE to set it, or KEY- to remove it"),
        }
    }
    Ok((set, remove))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        operation: Operation,
    }

    fn asked(words: &[&str]) -> anyhow::Result<NodeOperation> {
        let words = std::iter::once("node").chain(words.iter().copied());
        Ok(request(Cli::try_parse_from(words)?.operation, 1000)?.1)
    }

    #[test]
    fn words_become_operations() {
        let operation = asked(&["label", "n1", "zone=a", "url=a=b", "old-"]).unwrap();
        let set = [("zone", "a"), ("url", "a=b")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(operation, NodeOperation::Label { set, remove: vec!["old".to_owned()] });
        let operation = asked(&["taint", "n1", "broken="]).unwrap();
        let set = vec![Taint { key: "broken".to_owned(), value: String::new() }];
        assert_eq!(operation, NodeOperation::Taint { set, remove: vec![] });
        let operation = asked(&["maintain", "n1", "--in", "1m", "--for", "1h", "--reason", "disks"]).unwrap();
        let window = MaintenanceWindow { from_ms: 61_000, until_ms: 3_661_000, reason: "disks".to_owned() };
        assert_eq!(operation, NodeOperation::Maintain(window));
        assert_eq!(asked(&["maintain", "n1", "--end"]).unwrap(), NodeOperation::EndMaintenance);
    }

    #[test]
    fn half_an_operation_is_refused() {
        for words in [
            &["cordon", "n1"][..],
            &["drain", "n1"],
            &["maintain", "n1"],
            &["maintain", "n1", "--for", "1h"],
            &["maintain", "n1", "--for", "1x", "--reason", "r"],
            &["maintain", "n1", "--end", "--for", "1h"],
            &["label", "n1"],
            &["label", "n1", "zone"],
        ] {
            assert!(asked(words).is_err(), "{words:?}");
        }
    }
}
