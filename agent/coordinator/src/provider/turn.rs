//! One turn of one pool: what is known, what is decided from it, and one step.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use lathe_api::node::NodeOffer;
use lathe_api::pool::Pool;
use lathe_api::provider::{PoolProvider, ProvidedState};
use lathe_scheduler::Reason;

use super::decide::{Facts, MAX_GROW, Seen, Step, decide};
use super::fleet::Fleet;
use super::need::{self, Need, Question};
use super::steps::Turn;
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::dry_run::Moment;
use crate::reconcile::model::{takes_part, waits};
use crate::records::{FLEETS, load};
use crate::state::Contents;
use crate::store::{Revision, StoreError};

/// How often a provider is asked what it has although nothing went wrong, milliseconds.
const LIST_MS: u64 = 300_000;
/// The planner is asked again after so many times as long as it took: a tenth of a core at most.
const REST: u32 = 10;

/// What is kept of a pool from turn to turn. Without it nothing is lost but time.
#[derive(Debug)]
pub struct Memory {
    /// When the provider last said what it has.
    pub(super) listed_ms: Option<u64>,
    /// Nodes that it names and that are not its, which were complained about.
    pub(super) foreign: BTreeSet<String>,
    /// What a node has promised, and since when nothing.
    empty: HashMap<String, (Option<Revision>, u64)>,
    /// Since when a node's reports do not arrive.
    absent: HashMap<String, u64>,
    /// When the planner may be asked again.
    plan_from: Instant,
}

impl Memory {
    /// Nothing.
    pub fn new() -> Self {
        Self {
            listed_ms: None,
            foreign: BTreeSet::new(),
            empty: HashMap::new(),
            absent: HashMap::new(),
            plan_from: Instant::now(),
        }
    }

    /// What is known of the fleet's nodes.
    fn look(&mut self, coordinator: &Coordinator, fleet: &Fleet, now_ms: u64) -> BTreeMap<String, Seen> {
        self.empty.retain(|name, _| fleet.nodes.contains_key(name));
        self.absent.retain(|name, _| fleet.nodes.contains_key(name));
        let live = coordinator.live().clone();
        coordinator.view.read(|contents| {
            let seen = |name: &String| {
                let ready = takes_part(contents, &live, name);
                let promised = contents.allocations.get(name);
                let revision = promised.map(|of| of.revision);
                let empty = promised.is_none_or(|of| of.value.sandboxes.is_empty())
                    && contents.assigned(name).next().is_none()
                    && live.get(name).is_none_or(|live| live.strays == 0);
                let idle = self.empty.entry(name.clone()).or_insert((revision, now_ms));
                // Something may have come and gone since the last look.
                if !empty || idle.0 != revision {
                    *idle = (revision, now_ms);
                }
                if ready {
                    self.absent.remove(name);
                }
                let absent_since_ms =
                    if ready { now_ms } else { *self.absent.entry(name.clone()).or_insert(now_ms) };
                let offer =
                    contents.operations.get(name).map_or(NodeOffer::Open, |of| of.value.offer.clone());
                (name.clone(), Seen { ready, empty, offer, idle_since_ms: idle.1, absent_since_ms })
            };
            fleet.nodes.keys().map(seen).collect()
        })
    }

    fn list_due(&self, fleet: &Fleet, now_ms: u64) -> bool {
        self.listed_ms.is_none_or(|listed_ms| {
            now_ms.abs_diff(listed_ms) >= LIST_MS
                || fleet.failure.as_ref().is_some_and(|failure| failure.at_ms >= listed_ms)
        })
    }
}

/// Does what is next; whether anything was.
///
/// # Errors
/// When the store fails.
pub async fn turn(coordinator: &Coordinator, pool: &Pool, memory: &mut Memory) -> Result<bool, StoreError> {
    let Some(provider) = &pool.provider else { return Ok(false) };
    let Some(program) = coordinator.options.providers.get(&provider.name) else { return Ok(false) };
    let now_ms = now_ms();
    let fleet = load::<Fleet>(&*coordinator.store, &format!("{FLEETS}{}", pool.name)).await?;
    let fleet = fleet.map_or_else(|| Fleet::of(&provider.name), |fleet| fleet.value);
    if fleet.provider != provider.name && !fleet.is_empty() {
        return Ok(false);
    }
    let nodes = memory.look(coordinator, &fleet, now_ms);
    let list_due = memory.list_due(&fleet, now_ms);
    let jobs = match list_due || fleet.backs_off(now_ms) {
        true => Some(BTreeSet::new()),
        false => waiting(coordinator, &pool.name),
    };
    // Right after a start it is not known what runs where, and who waits for what.
    let Some(jobs) = jobs else { return Ok(false) };
    let need = if jobs.is_empty() || !matters(provider, &fleet, &nodes, now_ms) {
        None
    } else {
        match ask_planner(coordinator, pool, provider, &fleet, jobs, memory).await {
            Some(need) => Some(need),
            // Not now: nothing is begun or ended without knowing who needs it.
            None => return Ok(false),
        }
    };
    let facts = Facts { now_ms, provider, fleet: &fleet, nodes: &nodes, list_due, need: need.as_ref() };
    let step = decide(&facts);
    if step == Step::Wait {
        return Ok(false);
    }
    Turn { coordinator, pool, provider, program, now_ms }.take(step, &fleet, &nodes, memory).await
}

/// Whether anything follows from what jobs need.
fn matters(provider: &PoolProvider, fleet: &Fleet, nodes: &BTreeMap<String, Seen>, now_ms: u64) -> bool {
    if fleet.in_state(ProvidedState::Coming).any(|name| nodes[name].ready) {
        return false;
    }
    if fleet.asked.is_some() || fleet.in_state(ProvidedState::Closing).next().is_some() {
        return true;
    }
    let cools = fleet.cooldown_until_ms(provider.cooldown.milliseconds(), now_ms).is_some();
    !cools && (fleet.size() < provider.max_nodes || nodes.values().any(|seen| seen.empty))
}

/// Jobs that wait for room in the pool, or in a part of it that has no provider of its own; none if that
/// is not known yet.
fn waiting(coordinator: &Coordinator, pool: &str) -> Option<BTreeSet<String>> {
    let live = coordinator.live().clone();
    let jobs: Option<Vec<String>> = coordinator.view.read(|contents| {
        // Nodes that were there before this process started have a moment to say that they still are.
        if !contents.alive.keys().all(|name| takes_part(contents, &live, name)) {
            return None;
        }
        let family = family(contents, pool);
        let waiting = contents
            .jobs
            .iter()
            .filter(|(_, job)| waits(&job.value) && family.contains(&job.value.job.spec.pool));
        Some(waiting.map(|(id, _)| id.clone()).collect())
    });
    let jobs = jobs?;
    let explained: Vec<_> = jobs.iter().filter_map(|id| coordinator.explanations.of(id)).collect();
    if explained.is_empty() && !jobs.is_empty() {
        return None;
    }
    // Those that others make room for, or that a limit holds up, need no nodes.
    let for_room =
        |reason: &Reason| matches!(reason, Reason::Shortage(_) | Reason::Behind { .. } | Reason::Unseen);
    let for_room = explained.into_iter().filter(|explained| for_room(&explained.waiting.reason));
    Some(for_room.map(|explained| explained.waiting.gang).collect())
}

/// Pools whose jobs the provider of this one is asked for.
fn family(contents: &Contents, pool: &str) -> BTreeSet<String> {
    let asks = |name: &&String| provider_of(contents, name).as_deref() == Some(pool);
    contents.pools.keys().filter(asks).cloned().collect()
}

/// The pool whose provider is asked for jobs of this one: itself, or the next whole that has one.
pub fn provider_of(contents: &Contents, pool: &str) -> Option<String> {
    let mut at = pool;
    for _ in 0..=contents.pools.len() {
        let found = &contents.pools.get(at)?.value;
        if found.provider.is_some() {
            return Some(at.to_owned());
        }
        at = found.parent.as_deref()?;
    }
    None
}

/// How many nodes would help these jobs; none if that cannot be said now.
async fn ask_planner(
    coordinator: &Coordinator,
    pool: &Pool,
    provider: &PoolProvider,
    fleet: &Fleet,
    jobs: BTreeSet<String>,
    memory: &mut Memory,
) -> Option<Need> {
    if Instant::now() < memory.plan_from {
        return None;
    }
    let moment = coordinator.dry_runs.moment(&coordinator.changed).await.ok()?;
    let asked = fleet.asked.as_ref().map_or(0, |asked| asked.count);
    let room = provider.max_nodes.saturating_sub(fleet.size().saturating_sub(asked));
    let there: BTreeSet<String> = fleet.in_state(ProvidedState::Joined).cloned().collect();
    let coming = fleet.in_state(ProvidedState::Coming).count();
    let question = Question {
        template: template(&moment, pool, provider, &there),
        moment,
        jobs,
        coming: u32::try_from(coming).unwrap_or(u32::MAX),
        most: room.min(MAX_GROW),
        there,
    };
    let started = Instant::now();
    let need = tokio::task::spawn_blocking(move || need::need(question)).await.ok()?;
    memory.plan_from = Instant::now() + (started.elapsed() * REST).min(Duration::from_secs(60));
    coordinator.helped.set(&pool.name, need.helps.clone());
    Some(need)
}

/// What a node would be: like the best of those that have joined, else as the shape says.
fn template(
    moment: &Moment,
    pool: &Pool,
    provider: &PoolProvider,
    there: &BTreeSet<String>,
) -> lathe_scheduler::Node {
    let known = there.iter().filter_map(|name| moment.cluster.index(name));
    let known = known.map(|index| &moment.cluster.nodes()[index as usize]);
    let best = known
        .filter(|node| !node.classes.is_empty())
        .max_by_key(|node| (node.gpus.len(), node.total.memory_bytes, node.total.cpu_milli));
    match best {
        Some(node) => need::template_like(node, &pool.name, &provider.shape),
        None => need::template(&pool.name, &provider.shape),
    }
}
