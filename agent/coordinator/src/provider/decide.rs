//! What is done next about a pool's fleet: one step, from what is known now. Pure.
//!
//! The order is that of what may be lost: first it is learnt what the provider has, then unanswered
//! requests are settled, then what is to be given back is, and only then is anything new begun, which
//! the cool-down alone holds up. A node is given back in two steps: it is closed, which is committed
//! only if nothing was placed there, and nothing is placed on a closed node; only then is the provider
//! told. In between, a job that needs it opens it again.

use std::collections::{BTreeMap, BTreeSet};

use lathe_api::node::NodeOffer;
use lathe_api::provider::{PoolProvider, ProvidedState};

use super::fleet::{Fleet, Provided};
use super::need::Need;

/// Nodes asked for at once, at most: the planner is asked how many would do.
pub const MAX_GROW: u32 = 256;
/// Nodes closed at once, at most: all of them are written in one transaction.
const MAX_CLOSE: usize = 64;

/// What is known of a node of the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its reports arrive.
    pub ready: bool,
    /// Nothing runs there, and nothing is to.
    pub empty: bool,
    /// What operators want of it.
    pub offer: NodeOffer,
    /// Since when it is empty, as far as this process knows.
    pub idle_since_ms: u64,
    /// Since when its reports do not arrive, as far as this process knows.
    pub absent_since_ms: u64,
}

/// All that is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Now.
    pub now_ms: u64,
    /// What was set.
    pub provider: &'a PoolProvider,
    /// What there is.
    pub fleet: &'a Fleet,
    /// Of every node of the fleet.
    pub nodes: &'a BTreeMap<String, Seen>,
    /// The provider is to be asked what it has.
    pub list_due: bool,
    /// What the planner says that jobs need; none if no job waits that nodes might help.
    pub need: Option<&'a Need>,
}

/// What is done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Wait,
    /// Ask the provider what it has.
    List,
    /// These have joined.
    Joined(Vec<String>),
    /// Ask for so many nodes.
    Grow {
        /// How many.
        count: u32,
        /// What for.
        why: String,
    },
    /// Ask for the same as before, which was not answered.
    GrowAgain,
    /// What was asked for before is not needed any more.
    Forget,
    /// These take no more work; why, for each.
    Close(Vec<(String, String)>),
    /// These take work again.
    Reopen(Vec<String>),
    /// These are given back.
    Release(Vec<String>),
}

/// Decides.
pub fn decide(facts: &Facts<'_>) -> Step {
    let Facts { now_ms, provider, fleet, nodes, .. } = *facts;
    let joined: Vec<String> =
        fleet.in_state(ProvidedState::Coming).filter(|name| nodes[*name].ready).cloned().collect();
    if !joined.is_empty() {
        return Step::Joined(joined);
    }
    if fleet.backs_off(now_ms) {
        return Step::Wait;
    }
    if facts.list_due {
        return Step::List;
    }
    let stale = stale(facts);
    if !stale.is_empty() {
        return Step::Close(stale);
    }
    let lacking = lacking(facts);
    if let Some(asked) = &fleet.asked {
        // What a forgotten one made after all is found when the provider lists what it has.
        return if lacking > 0 && asked.count > 0 { Step::GrowAgain } else { Step::Forget };
    }
    let reopened = reopened(facts);
    if !reopened.is_empty() {
        return Step::Reopen(reopened);
    }
    let given_back: Vec<String> = fleet
        .in_state(ProvidedState::Closing)
        .chain(fleet.in_state(ProvidedState::Releasing))
        .filter(|name| nodes[*name].empty)
        .take(MAX_CLOSE)
        .cloned()
        .collect();
    if !given_back.is_empty() {
        return Step::Release(given_back);
    }
    if fleet.cooldown_until_ms(provider.cooldown.milliseconds(), now_ms).is_some() {
        return Step::Wait;
    }
    if lacking > 0 {
        return Step::Grow { count: lacking, why: why(facts) };
    }
    let idle = idle(facts);
    if idle.is_empty() { Step::Wait } else { Step::Close(idle) }
}

/// Nodes that never joined, or stopped reporting and do not come back.
fn stale(facts: &Facts<'_>) -> Vec<(String, String)> {
    let join_ms = facts.provider.join.milliseconds();
    let over = |since_ms: u64| facts.now_ms.saturating_sub(since_ms) >= join_ms;
    let of = |(name, node): (&String, &Provided)| {
        let seen = &facts.nodes[name];
        let absent = !seen.ready && seen.empty && over(seen.absent_since_ms);
        let why = match node.state {
            ProvidedState::Coming if absent && over(node.since_ms) => "it did not join in time",
            ProvidedState::Joined if absent => "it stopped reporting",
            _ => return None,
        };
        Some((name.clone(), why.to_owned()))
    };
    facts.fleet.nodes.iter().filter_map(of).take(MAX_CLOSE).collect()
}

/// How many more nodes should take work, those that are closed left out.
fn wanted(facts: &Facts<'_>) -> u32 {
    let least = facts.provider.min_nodes.saturating_sub(staying(facts.fleet));
    facts.need.map_or(0, |need| need.count).max(least)
}

/// How many nodes take work, or will when they have joined.
fn staying(fleet: &Fleet) -> u32 {
    let stays = |node: &&Provided| matches!(node.state, ProvidedState::Coming | ProvidedState::Joined);
    u32::try_from(fleet.nodes.values().filter(stays).count()).unwrap_or(u32::MAX)
}

/// How many nodes are to be asked for, an unanswered request included.
fn lacking(facts: &Facts<'_>) -> u32 {
    let Facts { provider, fleet, .. } = *facts;
    let asked = fleet.asked.as_ref().map_or(0, |asked| asked.count);
    let room = provider.max_nodes.saturating_sub(fleet.size().saturating_sub(asked));
    wanted(facts).min(room).min(MAX_GROW)
}

fn why(facts: &Facts<'_>) -> String {
    match facts.need.filter(|need| need.count > 0) {
        Some(need) => {
            let first: Vec<&str> = need.helps.iter().take(3).map(String::as_str).collect();
            let rest = need.helps.len() - first.len();
            let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            format!("for jobs that wait: {}{more}", first.join(", "))
        }
        None => format!("the pool keeps {} nodes of it", facts.provider.min_nodes),
    }
}

/// Closed nodes that jobs need now, of which the provider was not told yet; and those that an operator
/// opened, so that something runs there.
fn reopened(facts: &Facts<'_>) -> Vec<String> {
    let closed = || facts.fleet.in_state(ProvidedState::Closing).map(|name| (name, &facts.nodes[name]));
    let used = closed().filter(|(_, seen)| !seen.empty);
    let most = usize::try_from(wanted(facts)).unwrap_or(usize::MAX);
    let needed = closed().filter(|(_, seen)| seen.empty && seen.ready).take(most);
    used.chain(needed).take(MAX_CLOSE).map(|(name, _)| name.clone()).collect()
}

/// Nodes that nobody needed for long enough, those first that were idle longest.
fn idle(facts: &Facts<'_>) -> Vec<(String, String)> {
    let Facts { now_ms, provider, fleet, nodes, .. } = *facts;
    let spare = staying(fleet).saturating_sub(provider.min_nodes);
    let spare = usize::try_from(spare).unwrap_or(usize::MAX);
    let none = BTreeSet::new();
    // What is kept for a gang that waits for more is kept while more may come.
    let kept = facts.need.filter(|_| fleet.failure.is_none()).map_or(&none, |need| &need.keeps);
    let mut idle: Vec<(u64, &String)> = fleet
        .in_state(ProvidedState::Joined)
        .filter(|name| !kept.contains(*name))
        .map(|name| (&nodes[name], name))
        // An operator who cordons a node wants to have it; one who drains it wants to be rid of it.
        .filter(|(seen, _)| !matches!(seen.offer, NodeOffer::Cordoned(_)))
        .filter(|(seen, _)| seen.ready && seen.empty)
        .filter(|(seen, _)| now_ms.saturating_sub(seen.idle_since_ms) >= provider.idle.milliseconds())
        .map(|(seen, name)| (seen.idle_since_ms, name))
        .collect();
    idle.sort_unstable();
    let why = format!("nothing ran there for {}", provider.idle);
    idle.into_iter().take(spare.min(MAX_CLOSE)).map(|(_, name)| (name.clone(), why.clone())).collect()
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
