//! The steps that are decided, each from its record in the store to what its answer means. What is
//! asked of a provider is written down before it is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use lathe_api::pool::Pool;
use lathe_api::provider::{PoolProvider, ProvidedState, ProviderAsked};
use uuid::Uuid;

use super::command::{self, CommandError};
use super::commit::{self, Draft, change, keys_of};
use super::contract::{self, Action, Answer, Named, Request, VERSION};
use super::decide::{Seen, Step};
use super::fleet::{Fault, Fleet, Provided};
use super::turn::Memory;
use super::{Judgement, one_line};
use crate::clock::now_ms;
use crate::coordinator::Coordinator;
use crate::store::StoreError;

/// A node that the provider does not list is gone if it was away for so long: lists may be behind.
const GONE_MS: u64 = 60_000;
const MAX_REASON_CHARS: usize = 300;
const NOT_SAID: &str = "it did not say why that is not all";
/// Names that a line of the audit log has.
const MAX_NAMED: usize = 20;

/// One turn of a pool.
pub(super) struct Turn<'a> {
    pub coordinator: &'a Coordinator,
    pub pool: &'a Pool,
    pub provider: &'a PoolProvider,
    pub program: &'a Path,
    pub now_ms: u64,
}

/// Nodes that a provider lists although they are not its, with why; and nodes that are gone.
type Reconciled = (Vec<(String, String)>, Vec<String>);

/// Why there is no answer.
enum Silence {
    /// The coordinator stops; what was asked is asked again when it is back.
    Stopped,
    /// One line.
    Failed(String),
}

impl Turn<'_> {
    /// Takes a step; whether there may be another at once.
    pub async fn take(
        &self,
        step: Step,
        fleet: &Fleet,
        nodes: &BTreeMap<String, Seen>,
        memory: &mut Memory,
    ) -> Result<bool, StoreError> {
        match step {
            Step::Wait => Ok(false),
            Step::List => self.list(nodes, memory).await,
            Step::Joined(names) => self.joined(&names).await,
            Step::Grow { count, why } => self.grow(count, why).await,
            Step::GrowAgain => match &fleet.asked {
                Some(asked) => self.ask(asked).await,
                None => Ok(false),
            },
            Step::Forget => self.forget().await,
            Step::Close(nodes) => self.close(&nodes, fleet).await,
            Step::Reopen(names) => self.reopen(&names).await,
            Step::Release(names) => self.release(&names).await,
        }
    }

    async fn change<T>(
        &self,
        keys: &[String],
        prepare: impl Fn(&mut Draft) -> Result<Option<T>, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        change(self.coordinator, &self.pool.name, keys, prepare).await
    }

    /// Runs the program.
    async fn run(&self, request: &Request<'_>) -> Result<Answer, Silence> {
        let input = serde_json::to_vec(request).map_err(|error| Silence::Failed(error.to_string()))?;
        let timeout = Duration::from_secs(self.provider.timeout.seconds());
        let (pool, action) = (&self.pool.name, request.action);
        tracing::info!(
            pool,
            provider = self.provider.name,
            ?action,
            request = request.request,
            "asking a provider"
        );
        let output = command::run(self.program, input, timeout, &self.coordinator.shutdown).await;
        let output = output.map_err(|error| match error {
            CommandError::Stopped => Silence::Stopped,
            error => Silence::Failed(one_line(&error.to_string(), MAX_REASON_CHARS)),
        })?;
        contract::parse(&output)
            .map_err(|error| Silence::Failed(one_line(&error.to_string(), MAX_REASON_CHARS)))
    }

    fn request(&self, action: Action) -> Request<'_> {
        Request {
            version: VERSION,
            action,
            pool: &self.pool.name,
            request: None,
            count: None,
            why: None,
            shape: None,
            nodes: Vec::new(),
        }
    }

    /// There was no answer.
    async fn silent(&self, fault: Fault, silence: Silence) -> Result<bool, StoreError> {
        let Silence::Failed(reason) = silence else { return Ok(false) };
        tracing::warn!(pool = self.pool.name, provider = self.provider.name, reason, "a provider failed");
        self.change(&[], |draft| {
            draft.fail(fault, &reason, now_ms());
            Ok(Some(()))
        })
        .await?;
        Ok(false)
    }

    async fn joined(&self, names: &[String]) -> Result<bool, StoreError> {
        self.change(&[], |draft| {
            names.iter().for_each(|name| draft.fleet.set(name, ProvidedState::Joined, self.now_ms));
            draft.fleet.mend(Fault::Join);
            draft.tell("provider joined", listed(names));
            Ok(Some(()))
        })
        .await?;
        Ok(true)
    }

    async fn grow(&self, count: u32, why: String) -> Result<bool, StoreError> {
        let request = format!("{}-{}", self.pool.name, Uuid::new_v4().simple());
        let asked = self.change(&[], |draft| {
            // Somebody may have set the pool meanwhile.
            let Some(provider) = draft.provider() else { return Ok(None) };
            if draft.fleet.asked.is_some() || draft.fleet.size().saturating_add(count) > provider.max_nodes {
                return Ok(None);
            }
            draft.fleet.ask(request.clone(), count, why.clone(), self.now_ms);
            draft.tell("provider grow", format!("{count} nodes, request {request}: {why}"));
            Ok(draft.fleet.asked.clone())
        });
        match asked.await? {
            Some(asked) => self.ask(&asked).await,
            None => Ok(false),
        }
    }

    /// Asks for nodes under the request's name, for the first time or again.
    async fn ask(&self, asked: &ProviderAsked) -> Result<bool, StoreError> {
        let request = Request {
            request: Some(&asked.request),
            count: Some(asked.count),
            why: Some(&asked.why),
            shape: Some(&self.provider.shape),
            ..self.request(Action::Grow)
        };
        let answer = match self.run(&request).await {
            Ok(answer) => answer,
            Err(silence) => return self.silent(Fault::Grow, silence).await,
        };
        self.gave(asked, &answer).await
    }

    /// Takes in the nodes that were made for a request.
    async fn gave(&self, asked: &ProviderAsked, answer: &Answer) -> Result<bool, StoreError> {
        let now_ms = now_ms();
        let names: Vec<String> = answer.nodes.iter().map(|node| node.name.clone()).collect();
        self.change(&keys_of(&names), |draft| {
            if draft.fleet.asked.as_ref().is_none_or(|known| known.request != asked.request) {
                return Ok(None);
            }
            let mut troubles: Vec<String> = answer.error.iter().cloned().collect();
            for name in &names {
                if let Judgement::Foreign(why) = self.adopt(draft, name, &asked.request, now_ms)? {
                    troubles.push(format!("{why}: it is left alone"));
                }
            }
            let made = draft.fleet.made_for(&asked.request);
            if troubles.is_empty() && made < asked.count {
                troubles.push(NOT_SAID.to_owned());
            }
            draft.fleet.answered();
            let trouble = one_line(&troubles.join("; "), MAX_REASON_CHARS);
            if trouble.is_empty() {
                draft.fleet.mend(Fault::Grow);
            } else {
                draft.fail(Fault::Grow, &format!("{made} of {} nodes: {trouble}", asked.count), now_ms);
            }
            if !names.is_empty() {
                let told = format!("{made} of {} nodes: {}", asked.count, listed(&names));
                draft.tell("provider gave", [told, trouble].join(" ").trim_end());
            }
            Ok(Some(()))
        })
        .await?;
        Ok(true)
    }

    fn adopt(
        &self,
        draft: &mut Draft,
        name: &str,
        request: &str,
        now_ms: u64,
    ) -> Result<Judgement, StoreError> {
        commit::adopt(draft, name, request, &self.pool.name, &self.provider.shape, now_ms)
    }

    async fn forget(&self) -> Result<bool, StoreError> {
        self.change(&[], |draft| {
            let request = draft.fleet.asked.take().map(|asked| asked.request).unwrap_or_default();
            draft.fleet.mend(Fault::Grow);
            draft.tell("provider forget", format!("request {request}: nobody needs it any more"));
            Ok(Some(()))
        })
        .await?;
        Ok(true)
    }

    /// Learns what the provider has: nodes that nobody knew of are the pool's, and those that it does not
    /// have and that do not report are gone.
    async fn list(&self, nodes: &BTreeMap<String, Seen>, memory: &mut Memory) -> Result<bool, StoreError> {
        let answer = match self.run(&self.request(Action::List)).await {
            Ok(Answer { nodes, error: None }) => nodes,
            Ok(Answer { error: Some(why), .. }) => {
                return self.silent(Fault::List, Silence::Failed(why)).await;
            }
            Err(silence) => return self.silent(Fault::List, silence).await,
        };
        let now_ms = now_ms();
        let (foreign, gone) = self.reconcile(&answer, nodes, now_ms).await?.unwrap_or_default();
        self.forget_live(&gone);
        for (name, why) in foreign {
            if memory.foreign.insert(name) {
                tracing::warn!(
                    pool = self.pool.name,
                    provider = self.provider.name,
                    why,
                    "a node is left alone"
                );
            }
        }
        memory.listed_ms = Some(now_ms);
        Ok(true)
    }

    /// Makes the fleet what the provider says that it has; what is not its after all, and what is gone.
    async fn reconcile(
        &self,
        has: &[Named],
        nodes: &BTreeMap<String, Seen>,
        now_ms: u64,
    ) -> Result<Option<Reconciled>, StoreError> {
        let names: BTreeSet<&String> = has.iter().map(|node| &node.name).collect();
        let missing: Vec<&String> = nodes.keys().filter(|name| !names.contains(name)).collect();
        let unknown = names.iter().copied().filter(|name| !nodes.contains_key(*name));
        self.change(&keys_of(unknown.chain(missing.iter().copied())), |draft| {
            if draft.provider().is_none() {
                return Ok(None);
            }
            let (mut foreign, mut new, mut gone) = (Vec::new(), Vec::new(), Vec::new());
            for Named { name, request } in has {
                match self.adopt(draft, name, request.as_deref().unwrap_or_default(), now_ms)? {
                    Judgement::Known => {}
                    Judgement::New => new.push(name.clone()),
                    Judgement::Foreign(why) => foreign.push((name.clone(), why)),
                }
            }
            for name in &missing {
                if is_gone(draft, name, &nodes[*name], now_ms) && commit::remove(draft, name)? {
                    gone.push((*name).clone());
                }
            }
            settle(draft);
            draft.fleet.mend(Fault::List);
            if !new.is_empty() {
                draft.tell("provider found", listed(&new));
            } else if !gone.is_empty() {
                draft.tell("provider lost", listed(&gone));
            }
            Ok(Some((foreign, gone)))
        })
        .await
    }

    async fn close(&self, nodes: &[(String, String)], fleet: &Fleet) -> Result<bool, StoreError> {
        let keys = keys_of(nodes.iter().map(|(name, _)| name));
        let closed = self.change(&keys, |draft| {
            let mut closed = Vec::new();
            for (name, why) in nodes {
                let before = draft.fleet.nodes.get(name).cloned();
                if before == fleet.nodes.get(name).cloned()
                    && commit::close(draft, name, ProvidedState::Closing, self.now_ms)?
                {
                    closed.push(format!("{name}: {why}"));
                }
            }
            if closed.is_empty() {
                return Ok(None);
            }
            let never_joined = nodes.iter().any(|(name, _)| {
                fleet.nodes.get(name).is_some_and(|node| node.state == ProvidedState::Coming)
            });
            if never_joined {
                let join = self.provider.join;
                draft.fail(
                    Fault::Join,
                    &format!("nodes did not join within {join}: {}", listed(&closed)),
                    self.now_ms,
                );
            }
            draft.fleet.changed_ms = self.now_ms;
            draft.tell("provider close", listed(&closed));
            Ok(Some(()))
        });
        Ok(closed.await?.is_some())
    }

    async fn reopen(&self, names: &[String]) -> Result<bool, StoreError> {
        self.change(&keys_of(names), |draft| {
            for name in names {
                let state = draft.fleet.nodes.get(name).map(|node| node.state);
                if state == Some(ProvidedState::Closing) {
                    commit::reopen(draft, name, self.now_ms)?;
                }
            }
            draft.tell("provider reopen", listed(names));
            Ok(Some(()))
        })
        .await?;
        Ok(true)
    }

    /// Has nodes taken back that are closed and empty.
    async fn release(&self, names: &[String]) -> Result<bool, StoreError> {
        let Some(nodes) = self.begin_release(names).await? else { return Ok(false) };
        let request = Request { nodes: nodes.clone(), ..self.request(Action::Release) };
        match self.run(&request).await {
            Ok(answer) => self.released(&nodes, &answer).await,
            Err(silence) => self.silent(Fault::Release, silence).await,
        }
    }

    /// Writes down that the provider is told; those that are still empty.
    async fn begin_release(&self, names: &[String]) -> Result<Option<Vec<Named>>, StoreError> {
        self.change(&keys_of(names), |draft| {
            let (mut nodes, mut new) = (Vec::new(), Vec::new());
            for name in names {
                let Some(Provided { request, state, .. }) = draft.fleet.nodes.get(name).cloned() else {
                    continue;
                };
                // An operator may have opened it meanwhile.
                if !commit::close(draft, name, ProvidedState::Releasing, self.now_ms)? {
                    continue;
                }
                if state != ProvidedState::Releasing {
                    new.push(name.clone());
                }
                nodes.push(Named { name: name.clone(), request: (!request.is_empty()).then_some(request) });
            }
            if !new.is_empty() {
                draft.tell("provider release", listed(&new));
            }
            Ok((!nodes.is_empty()).then_some(nodes))
        })
        .await
    }

    /// Forgets those that are gone.
    async fn released(&self, asked: &[Named], answer: &Answer) -> Result<bool, StoreError> {
        let now_ms = now_ms();
        let keys = keys_of(asked.iter().map(|node| &node.name));
        let gone = self.change(&keys, |draft| {
            let mut gone = Vec::new();
            let named = answer.nodes.iter().map(|node| &node.name);
            for name in named.filter(|name| asked.iter().any(|node| node.name == **name)) {
                if draft.fleet.nodes.contains_key(name) && commit::remove(draft, name)? {
                    gone.push(name.clone());
                }
            }
            if gone.len() < asked.len() || answer.error.is_some() {
                let why = answer.error.as_deref().unwrap_or(NOT_SAID);
                let reason = format!("{} of {} nodes taken back: {why}", gone.len(), asked.len());
                draft.fail(Fault::Release, &reason, now_ms);
            } else {
                draft.fleet.mend(Fault::Release);
            }
            if !gone.is_empty() {
                draft.tell("provider released", listed(&gone));
            }
            Ok(Some(gone))
        });
        let gone = gone.await?.unwrap_or_default();
        self.forget_live(&gone);
        Ok(!gone.is_empty())
    }

    fn forget_live(&self, gone: &[String]) {
        let mut live = self.coordinator.live();
        gone.iter().for_each(|name| drop(live.remove(name)));
    }
}

/// Whether a node that the provider does not list is not there.
fn is_gone(draft: &Draft, name: &str, seen: &Seen, now_ms: u64) -> bool {
    let Some(node) = draft.fleet.nodes.get(name) else { return false };
    let away = |since_ms: u64| now_ms.saturating_sub(since_ms) >= GONE_MS;
    match node.state {
        ProvidedState::Coming => !seen.ready && away(node.since_ms),
        ProvidedState::Joined | ProvidedState::Closing => !seen.ready && away(seen.absent_since_ms),
        ProvidedState::Releasing => true,
    }
}

/// A request is answered if all that it asked for was found.
fn settle(draft: &mut Draft) {
    let Some(asked) = &draft.fleet.asked else { return };
    if draft.fleet.made_for(&asked.request) >= asked.count {
        draft.fleet.answered();
        draft.fleet.mend(Fault::Grow);
    }
}

fn listed(names: &[String]) -> String {
    let first = names.iter().take(MAX_NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_NAMED) {
        0 => first,
        rest => format!("{first} and {rest} more"),
    }
}
