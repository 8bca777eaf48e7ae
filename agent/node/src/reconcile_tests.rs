//! Every situation a sandbox can be found in, and the one thing to do about it.

use super::*;
use crate::journal::Step;
use crate::sandbox::tests::spec;
use lathe_api::job::{TaskExit, TaskState};

const NOW: u64 = 1_000_000;

fn moment() -> Moment<'static> {
    Moment { informed: true, busy: false, unshipped: false, now_ms: NOW, boot_id: "boot" }
}

fn observed(steps: &[Step], supervised: bool, end: Option<End>) -> Observed {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), spec("a-0-1"), "boot".into()).unwrap();
    for step in steps {
        journal.begin(step.clone()).unwrap();
    }
    if let Some(end) = end {
        journal.end(end).unwrap();
    }
    Observed { record: journal.record().clone(), status: None, supervised }
}

fn stopped() -> SandboxSpec {
    SandboxSpec { desired: Desired::Stopped, ..spec("a-0-1") }
}

#[test]
fn a_life_from_wish_to_oblivion() {
    let wish = spec("a-0-1");
    assert_eq!(decide(Some(&wish), None, moment()), Action::Create);
    assert_eq!(decide(Some(&wish), Some(&observed(&[], false, None)), moment()), Action::Start);
    let running = observed(&[Step::Supervisor], true, None);
    assert_eq!(decide(Some(&wish), Some(&running), moment()), Action::Wait);
    assert_eq!(decide(Some(&stopped()), Some(&running), moment()), Action::Stop);
    assert_eq!(decide(None, Some(&running), moment()), Action::Stop);
    let mut gone = observed(&[Step::Supervisor], false, None);
    gone.status =
        Some(Status { state: TaskState::Exited, exit: Some(TaskExit::Code(3)), ..Status::default() });
    let Action::End(end) = decide(Some(&wish), Some(&gone), moment()) else { panic!("not ended") };
    assert_eq!((end.exit, end.lost), (Some(TaskExit::Code(3)), false));
    let mut ended = observed(&[Step::Supervisor], false, Some(end));
    assert_eq!(decide(Some(&wish), Some(&ended), moment()), Action::CleanUp);
    ended.record.cleaned = true;
    ended.record.ended_ms = NOW;
    assert_eq!(decide(Some(&wish), Some(&ended), moment()), Action::Wait);
    assert_eq!(decide(None, Some(&ended), Moment { unshipped: true, ..moment() }), Action::Wait);
    assert_eq!(decide(None, Some(&ended), moment()), Action::Forget);
    let late = Moment { unshipped: true, now_ms: NOW + UNSHIPPED_PATIENCE_MS + 1, ..moment() };
    assert_eq!(decide(None, Some(&ended), late), Action::Forget);
}

#[test]
fn an_ended_sandbox_is_never_started_again() {
    let ended = observed(&[], false, Some(End::failed("x")));
    for desired in [Some(&spec("a-0-1")), Some(&stopped()), None] {
        assert_eq!(decide(desired, Some(&ended), moment()), Action::CleanUp);
    }
}

#[test]
fn a_supervisor_gone_without_a_word_is_a_loss_and_a_reboot_is_told() {
    let gone = observed(&[Step::Supervisor], false, None);
    let Action::End(end) = decide(Some(&spec("a-0-1")), Some(&gone), moment()) else { panic!("not ended") };
    assert!(end.lost && end.reason.unwrap().contains("killed"));
    let after = Moment { boot_id: "another", ..moment() };
    let Action::End(end) = decide(Some(&spec("a-0-1")), Some(&gone), after) else { panic!("not ended") };
    assert!(end.lost && end.reason.unwrap().contains("restarted"));
}

#[test]
fn without_the_coordinator_running_sandboxes_run_on_and_nothing_begins() {
    let alone = Moment { informed: false, ..moment() };
    let running = observed(&[Step::Supervisor], true, None);
    assert_eq!(decide(None, Some(&running), alone), Action::Wait);
    assert_eq!(decide(None, Some(&observed(&[], false, None)), alone), Action::Wait);
    let mut ended = observed(&[], false, Some(End::failed("x")));
    assert_eq!(decide(None, Some(&ended), alone), Action::CleanUp);
    ended.record.cleaned = true;
    assert_eq!(decide(None, Some(&ended), alone), Action::Wait);
}

#[test]
fn a_wish_withdrawn_early_abandons_the_preparation() {
    let busy = Moment { busy: true, ..moment() };
    let preparing = observed(&[], false, None);
    assert_eq!(decide(Some(&stopped()), Some(&preparing), busy), Action::Abandon);
    assert_eq!(decide(Some(&spec("a-0-1")), Some(&preparing), busy), Action::Wait);
    let Action::End(end) = decide(Some(&stopped()), Some(&preparing), moment()) else { panic!("not ended") };
    assert!(!end.lost);
    // Stopping what was never here still gets a report of its end.
    assert_eq!(decide(Some(&stopped()), None, moment()), Action::Create);
}

#[test]
fn nothing_is_done_twice_while_a_worker_is_busy() {
    let busy = Moment { busy: true, ..moment() };
    let ended = observed(&[Step::Supervisor], false, Some(End::failed("x")));
    assert_eq!(decide(None, Some(&ended), busy), Action::Wait);
    let started = observed(&[Step::Supervisor], false, None);
    assert_eq!(decide(None, Some(&started), busy), Action::Wait);
}

#[test]
fn an_end_waits_for_its_output_but_not_for_long() {
    let running = observed(&[Step::Supervisor], true, None);
    assert!(!end_may_wait(&running, NOW));
    let mut ended = observed(&[Step::Supervisor], false, Some(End::failed("x")));
    ended.record.ended_ms = NOW;
    assert!(end_may_wait(&ended, NOW + OUTPUT_PATIENCE_MS - 1));
    assert_eq!((ended.report_ending().state, ended.report().state), (TaskState::Starting, TaskState::Failed));
    ended.status = Some(Status { state: TaskState::Exited, ..Status::default() });
    assert_eq!(ended.report_ending().state, TaskState::Stopping);
    assert!(!end_may_wait(&ended, NOW + OUTPUT_PATIENCE_MS), "what is reported has to become true");
}
