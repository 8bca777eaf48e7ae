//! Makes the node's sandboxes what the coordinator wants them to be.
//!
//! Level-triggered: [`decide`] takes what is desired and what is observed of one sandbox and says
//! the one next thing to do. It keeps no state and no history; whatever went wrong or was cut off,
//! the same two inputs lead on from there. Observed is read from journals, statuses and locks
//! each time ([`crate::sandbox::observe`]), never remembered, so an agent that has just started
//! and one that has run for a year do the same thing, and adopting running sandboxes after an
//! upgrade is no special case.
//!
//! [`Reconciler::pass`] runs on a timer and when something is known to have changed. Work that
//! takes long (fetching, starting, cleaning up) runs beside it, at most one worker a sandbox; a
//! worker that fails leaves its trace in the journal, and the next pass decides again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_api::job::TaskState;
use lathe_api::node::SandboxStatus;
use lathe_api::sandbox::{Desired, NodeDesired, SandboxSpec};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cgroup;
use crate::files;
use crate::journal::{End, Journal};
use crate::paths::{SandboxKey, is_valid_id};
use crate::sandbox::cleanup::cleanup;
use crate::sandbox::observe::{Observed, observe};
use crate::sandbox::prepare::{Host, prepare};
use crate::supervisor::control::{self, Request};
use crate::supervisor::status::Status;

/// How long an ended sandbox's output is kept when nobody takes it, once it is not desired.
const UNSHIPPED_PATIENCE_MS: u64 = 60_000;

/// How long the report of a sandbox's end waits for its output to be shipped. Shorter than the time in
/// which what is reported must be true.
const OUTPUT_PATIENCE_MS: u64 = 8_000;

/// What a supervisor gets beyond the task's grace period before it is killed itself.
const STOP_SLACK: Duration = Duration::from_secs(30);

/// How long a supervisor has to show that it was heard.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// The one next thing to do for a sandbox.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Nothing now.
    Wait,
    /// Begin a journal, then [`Action::Start`].
    Create,
    /// Prepare it, from wherever an earlier attempt was cut off, and start its supervisor.
    Start,
    /// Give up preparing it.
    Abandon,
    /// Ask its supervisor to stop it.
    Stop,
    /// Write down how it ended.
    End(End),
    /// Take away what is left of it.
    CleanUp,
    /// Remove its directory.
    Forget,
}

/// What else [`decide`] looks at: facts of this moment, not history.
#[derive(Clone, Copy, Debug)]
pub struct Moment<'a> {
    /// The coordinator's wishes are known. Before that nothing is begun, stopped or forgotten.
    pub informed: bool,
    /// A worker is busy with the sandbox.
    pub busy: bool,
    /// Output waits to be shipped.
    pub unshipped: bool,
    /// Milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// This boot.
    pub boot_id: &'a str,
}

/// The next thing to do for one sandbox. At least one of `desired` and `observed` is there.
pub fn decide(desired: Option<&SandboxSpec>, observed: Option<&Observed>, moment: Moment<'_>) -> Action {
    let wanted = !moment.informed || desired.is_some_and(|spec| spec.desired == Desired::Running);
    let Some(observed) = observed else {
        return if moment.informed && desired.is_some() && !moment.busy {
            Action::Create
        } else {
            Action::Wait
        };
    };
    let record = &observed.record;
    if moment.busy {
        let preparing = record.end.is_none() && !observed.was_started();
        return if preparing && !wanted { Action::Abandon } else { Action::Wait };
    }
    if record.end.is_none() {
        return match (observed.supervised, observed.was_started()) {
            (true, _) if wanted => Action::Wait,
            (true, _) => Action::Stop,
            (false, true) => Action::End(observed.verdict(moment.boot_id)),
            (false, false) if !wanted => Action::End(End::failed("stopped before it was started")),
            (false, false) if moment.informed => Action::Start,
            (false, false) => Action::Wait,
        };
    }
    if !record.cleaned {
        return Action::CleanUp;
    }
    let forgotten = moment.informed && desired.is_none();
    let given_up = moment.now_ms.saturating_sub(record.ended_ms) > UNSHIPPED_PATIENCE_MS;
    if forgotten && (!moment.unshipped || given_up) { Action::Forget } else { Action::Wait }
}

/// What a pass found.
#[derive(Debug, Default)]
pub struct Pass {
    /// What to report.
    pub sandboxes: Vec<SandboxStatus>,
    /// Whether one of them has ended and is not reported so yet: its output comes first.
    pub ends_wait: bool,
}

/// Whether the sandbox has ended so lately that its output may be shipped before its end is told.
fn end_may_wait(observed: &Observed, now_ms: u64) -> bool {
    let record = &observed.record;
    record.end.is_some() && now_ms.saturating_sub(record.ended_ms) < OUTPUT_PATIENCE_MS
}

/// Runs [`decide`] for all sandboxes and does what it says.
pub struct Reconciler {
    host: Arc<Host>,
    workers: HashMap<String, CancellationToken>,
    running: JoinSet<String>,
    /// When each supervisor was first and last asked to stop by this process: one that does not obey
    /// is killed.
    asked: HashMap<String, (Instant, Instant)>,
    /// Rung when a worker has finished.
    changed: Arc<Notify>,
}

impl Reconciler {
    /// A reconciler that rings `changed` when another pass may find something new.
    pub fn new(host: Arc<Host>, changed: Arc<Notify>) -> Self {
        Self { host, workers: HashMap::new(), running: JoinSet::new(), asked: HashMap::new(), changed }
    }

    /// One pass: observes, decides, acts, and returns what to report. `output_waits` says of a sandbox
    /// whether some of its output is still to be taken.
    ///
    /// # Errors
    /// When the sandboxes' directory cannot be read.
    pub async fn pass(
        &mut self,
        desired: Option<&NodeDesired>,
        output_waits: impl Fn(&str) -> bool,
    ) -> Result<Pass, files::FileError> {
        self.collect_workers();
        let (found, damaged) = observe(&self.host.paths)?;
        for (id, error) in damaged {
            // A directory whose journal was never written: the crash came in between.
            if error.is_not_found() && !self.workers.contains_key(&id) {
                files::remove(&self.host.paths.sandbox(&id))?;
            } else if !self.workers.contains_key(&id) {
                tracing::error!(id, %error, "a sandbox's journal cannot be read");
            }
        }
        let wishes: BTreeMap<&str, &SandboxSpec> =
            desired.iter().flat_map(|d| &d.sandboxes).map(|spec| (spec.id.as_str(), spec)).collect();
        let seen: BTreeMap<&str, &Observed> = found.iter().map(|o| (o.id(), o)).collect();
        let ids: std::collections::BTreeSet<&str> = wishes.keys().chain(seen.keys()).copied().collect();
        for id in ids {
            let (wish, seen) = (wishes.get(id).copied(), seen.get(id).copied());
            let moment = Moment {
                informed: desired.is_some(),
                busy: self.workers.contains_key(id),
                // Only what is cleaned up may be forgotten; for the others the spool need not be looked at.
                unshipped: seen.is_some_and(|o| o.record.cleaned) && output_waits(id),
                now_ms: files::now_ms(),
                boot_id: &self.host.boot_id,
            };
            let action = decide(wish, seen, moment);
            if let Err(error) = self.act(id, action, wish, seen).await {
                tracing::error!(id, %error, "will be tried again");
            }
        }
        let now_ms = files::now_ms();
        let mut pass = Pass::default();
        for observed in found.iter().filter(|o| !is_gone(&self.host, o)) {
            let waits = end_may_wait(observed, now_ms) && output_waits(observed.id());
            pass.ends_wait |= waits;
            pass.sandboxes.push(if waits { observed.report_ending() } else { observed.report() });
        }
        Ok(pass)
    }

    async fn act(
        &mut self,
        id: &str,
        action: Action,
        wish: Option<&SandboxSpec>,
        seen: Option<&Observed>,
    ) -> anyhow::Result<()> {
        let dir = self.host.paths.sandbox(id);
        match action {
            Action::Wait => {}
            Action::Create => {
                let Some(spec) = wish else { return Ok(()) };
                anyhow::ensure!(is_valid_id(id), "the sandbox's ID {id:?} is malformed");
                files::make_private_dir(&dir)?;
                Journal::create(&dir, spec.clone(), self.host.boot_id.clone())?;
                tracing::info!(id, "new sandbox");
                self.changed.notify_one();
            }
            Action::Start => self.spawn_start(id),
            Action::Abandon => {
                if let Some(cancel) = self.workers.get(id) {
                    cancel.cancel();
                }
            }
            Action::Stop => self.stop(id, seen)?,
            Action::End(end) => {
                tracing::info!(id, state = ?end.state, reason = end.reason.as_deref().unwrap_or(""), "sandbox ended");
                let mut journal = Journal::open(&dir)?;
                if let Ok(Some(status)) = Status::read(&dir) {
                    journal.stages().start_ms = status.start_ms;
                    journal.stages().run_ms = status.run_ms;
                }
                journal.end(end)?;
                self.asked.remove(id);
                self.changed.notify_one();
            }
            Action::CleanUp => self.spawn_cleanup(id),
            Action::Forget => {
                tracing::info!(id, "sandbox forgotten");
                files::remove(&dir)?;
            }
        }
        Ok(())
    }

    /// Asks the supervisor, beside the pass and not again for a while: one that hangs must not hold
    /// up the other sandboxes.
    fn stop(&mut self, id: &str, seen: Option<&Observed>) -> anyhow::Result<()> {
        let key = SandboxKey::of(id);
        let now = Instant::now();
        let asked = self.asked.get(id).copied();
        let first = asked.map_or(now, |(first, _)| first);
        let grace = seen.map_or(0, |o| o.record.spec.grace_seconds);
        if first.elapsed() > Duration::from_secs(grace.into()) + STOP_SLACK {
            tracing::warn!(id, "the supervisor does not stop its sandbox and is killed");
            cgroup::kill(&self.host.cgroups.sandbox(&key.to_string()))?;
            return Ok(());
        }
        let obeys = seen.and_then(|o| o.status.as_ref()).is_some_and(|s| s.state == TaskState::Stopping);
        if obeys || asked.is_some_and(|(_, last)| last.elapsed() < ASK_AGAIN) {
            return Ok(());
        }
        self.asked.insert(id.to_owned(), (first, now));
        let (run_dir, id) = (self.host.paths.sandbox_run(&key), id.to_owned());
        tokio::spawn(async move {
            if let Err(error) = control::ask(&run_dir, Request::Stop).await {
                tracing::warn!(id, %error, "the supervisor does not answer yet");
            }
        });
        Ok(())
    }

    fn spawn_start(&mut self, id: &str) {
        let (host, cancel) = (self.host.clone(), CancellationToken::new());
        self.spawn(id, cancel.clone(), async move |id| {
            let dir = host.paths.sandbox(&id);
            let mut journal = Journal::open(&dir)?;
            let outcome = tokio::select! {
                outcome = prepare(&host, &mut journal) => Some(outcome),
                // Once it may be running, it is stopped as one that runs.
                () = cancelled_before_start(&cancel, &dir) => None,
            };
            match outcome {
                Some(Ok(())) => tracing::info!(id, "sandbox started"),
                Some(Err(error)) => {
                    tracing::warn!(id, %error, "the sandbox cannot be started");
                    journal.end(error.end())?;
                }
                None => journal.end(End::failed("stopped before it was started"))?,
            }
            Ok(())
        });
    }

    fn spawn_cleanup(&mut self, id: &str) {
        let host = self.host.clone();
        self.spawn(id, CancellationToken::new(), async move |id| {
            let mut journal = Journal::open(&host.paths.sandbox(&id))?;
            if let Err(error) = cleanup(&host, &mut journal).await {
                tracing::error!(id, %error, "cleaning up again in a moment");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        });
    }

    fn spawn<F>(&mut self, id: &str, cancel: CancellationToken, work: impl FnOnce(String) -> F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.workers.insert(id.to_owned(), cancel);
        let (id, changed) = (id.to_owned(), self.changed.clone());
        let work = work(id.clone());
        self.running.spawn(async move {
            if let Err(error) = work.await {
                tracing::error!(id, %error, "will be tried again");
            }
            changed.notify_one();
            id
        });
    }

    fn collect_workers(&mut self) {
        while let Some(finished) = self.running.try_join_next() {
            match finished {
                Ok(id) => drop(self.workers.remove(&id)),
                // Nobody knows whose it was: whoever is not running any more is free again.
                Err(error) => {
                    tracing::error!(%error, "a worker panicked");
                    if self.running.is_empty() {
                        self.workers.clear();
                    }
                }
            }
        }
    }

    /// Waits for the workers that are busy now, so that an agent that ends leaves no half step.
    pub async fn finish(mut self) {
        for cancel in self.workers.values() {
            cancel.cancel();
        }
        let wait = async { while self.running.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(Duration::from_secs(5), wait).await;
    }
}

fn is_gone(host: &Host, observed: &Observed) -> bool {
    observed.record.cleaned && !host.paths.sandbox(observed.id()).exists()
}

/// Resolves when the token is cancelled while nothing was started yet; never afterwards.
async fn cancelled_before_start(cancel: &CancellationToken, dir: &std::path::Path) {
    cancel.cancelled().await;
    let started = Journal::open(dir)
        .is_ok_and(|journal| journal.record().steps.contains(&crate::journal::Step::Supervisor));
    if started {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;
