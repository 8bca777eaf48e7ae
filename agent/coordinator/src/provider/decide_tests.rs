//! Each rule by itself, then all of them in a world where everything goes wrong.

use lathe_api::provider::ProviderAsked;
use proptest::prelude::*;

use super::super::fleet::Fault;
use super::*;

fn provider(json: &str) -> PoolProvider {
    let json = format!(r#"{{"name":"cloud","shape":{{"cpus":8,"memory":"32 GiB"}},{json}}}"#);
    serde_json::from_str(&json).expect(&json)
}

fn usual() -> PoolProvider {
    provider(r#""max_nodes":4,"cooldown":"60s","idle":"600s","join":"900s""#)
}

const S: u64 = 1000;
const NOW: u64 = 10_000 * S;

/// A fleet and what is seen of it.
struct Case {
    provider: PoolProvider,
    fleet: Fleet,
    nodes: BTreeMap<String, Seen>,
    list_due: bool,
    need: Option<Need>,
}

impl Case {
    fn new(provider: PoolProvider) -> Self {
        let (fleet, nodes) = (Fleet::of("cloud"), BTreeMap::new());
        Self { provider, fleet, nodes, list_due: false, need: None }
    }

    fn with(mut self, name: &str, state: ProvidedState, change: impl FnOnce(&mut Seen)) -> Self {
        self.fleet.add(name, "r1", NOW - 1000 * S);
        self.fleet.set(name, state, NOW - 950 * S);
        let mut seen = Seen {
            ready: state != ProvidedState::Coming,
            empty: true,
            offer: NodeOffer::Open,
            idle_since_ms: NOW,
            absent_since_ms: NOW,
        };
        change(&mut seen);
        self.nodes.insert(name.to_owned(), seen);
        self
    }

    fn joined(self, name: &str, idle_s: u64) -> Self {
        self.with(name, ProvidedState::Joined, |seen| seen.idle_since_ms = NOW - idle_s * S)
    }

    fn needs(mut self, count: u32, keeps: &[&str]) -> Self {
        let keeps = keeps.iter().map(|name| (*name).to_owned()).collect();
        self.need = Some(Need { count, helps: ["a-ab12cd".to_owned()].into(), keeps });
        self
    }

    fn step(&self) -> Step {
        decide(&Facts {
            now_ms: NOW,
            provider: &self.provider,
            fleet: &self.fleet,
            nodes: &self.nodes,
            list_due: self.list_due,
            need: self.need.as_ref(),
        })
    }
}

fn grows(step: &Step) -> u32 {
    match step {
        Step::Grow { count, .. } => *count,
        _ => 0,
    }
}

fn closed(step: &Step) -> Vec<&str> {
    match step {
        Step::Close(nodes) => nodes.iter().map(|(name, _)| name.as_str()).collect(),
        _ => vec![],
    }
}

#[test]
fn nodes_are_asked_for_as_needed_within_what_the_pool_may_have() {
    assert_eq!(Case::new(usual()).step(), Step::Wait);
    assert_eq!(
        Case::new(usual()).needs(2, &[]).step(),
        Step::Grow { count: 2, why: "for jobs that wait: a-ab12cd".to_owned() }
    );
    assert_eq!(grows(&Case::new(usual()).needs(9, &[]).step()), 4);
    assert_eq!(grows(&Case::new(usual()).joined("n1", 0).joined("n2", 0).needs(9, &[]).step()), 2);
    let least = Case::new(provider(r#""max_nodes":4,"min_nodes":2"#)).joined("n1", 0);
    assert_eq!(least.step(), Step::Grow { count: 1, why: "the pool keeps 2 nodes of it".to_owned() });
    // Those that are being given back are paid for until they are gone.
    let case =
        Case::new(provider(r#""max_nodes":1"#))
            .needs(1, &[])
            .with("n1", ProvidedState::Releasing, |seen| seen.empty = false);
    assert_eq!(case.step(), Step::Wait);
}

#[test]
fn the_cool_down_holds_up_both_ways_and_nothing_else() {
    let mut case = Case::new(usual()).joined("n1", 1000).needs(1, &[]);
    case.fleet.changed_ms = NOW - 59 * S;
    assert_eq!(case.step(), Step::Wait);
    case.need = None;
    assert_eq!(case.step(), Step::Wait);
    case.fleet.changed_ms = NOW - 60 * S;
    assert_eq!(closed(&case.step()), ["n1"]);
    case.fleet.changed_ms = NOW;
    case = case.with("n2", ProvidedState::Closing, |_| {});
    assert_eq!(case.step(), Step::Release(vec!["n2".to_owned()]));
}

#[test]
fn after_a_failure_nothing_is_asked_until_it_is_time_and_then_first_what_there_is() {
    let mut case = Case::new(usual()).needs(1, &[]);
    case.fleet.fail(Fault::Grow, "no".to_owned(), NOW - 999);
    case.list_due = true;
    assert_eq!(case.step(), Step::Wait);
    case.fleet.failure.as_mut().expect("one").again_ms = NOW;
    assert_eq!(case.step(), Step::List);
    case.list_due = false;
    assert_eq!(grows(&case.step()), 1);
}

#[test]
fn an_unanswered_request_is_made_again_or_forgotten() {
    let mut case = Case::new(usual()).needs(2, &[]);
    case.fleet.ask("r1".to_owned(), 2, "w".to_owned(), NOW);
    assert_eq!(case.step(), Step::GrowAgain);
    case.need = None;
    assert_eq!(case.step(), Step::Forget);
    case.provider.min_nodes = 1;
    assert_eq!(case.step(), Step::GrowAgain);
    case.provider.max_nodes = 0;
    case.provider.min_nodes = 0;
    assert_eq!(case.needs(2, &[]).step(), Step::Forget, "it may not have any now");
}

#[test]
fn only_what_was_empty_for_long_enough_and_nobody_wants_is_closed() {
    let case = Case::new(usual())
        .joined("used", 1000)
        .joined("fresh", 599)
        .joined("idle", 700)
        .joined("older", 800)
        .with("kept", ProvidedState::Joined, |seen| {
            seen.idle_since_ms = 0;
            seen.offer = NodeOffer::Cordoned("mine".to_owned());
        })
        .with("drained", ProvidedState::Joined, |seen| {
            seen.idle_since_ms = NOW - 650 * S;
            seen.offer = NodeOffer::Draining("away".to_owned());
        });
    let mut case = Case { provider: provider(r#""max_nodes":9,"idle":"600s""#), ..case };
    case.nodes.get_mut("used").expect("there").empty = false;
    assert_eq!(closed(&case.step()), ["older", "idle", "drained"]);
    // What a gang that waits for more would use stays, as long as more may come.
    let mut case = case.needs(0, &["older"]);
    assert_eq!(closed(&case.step()), ["idle", "drained"]);
    case.fleet.fail(Fault::Grow, "no capacity".to_owned(), 0);
    assert_eq!(closed(&case.step()), ["older", "idle", "drained"]);
    case.provider.min_nodes = 5;
    assert_eq!(closed(&case.step()), ["older"], "the pool keeps five of six");
}

#[test]
fn nodes_that_do_not_join_or_do_not_come_back_are_given_back() {
    let coming = |since_s: u64| {
        let mut case = Case::new(usual()).with("n1", ProvidedState::Coming, |seen| seen.absent_since_ms = 0);
        case.fleet.nodes.get_mut("n1").expect("there").since_ms = NOW - since_s * S;
        case
    };
    assert_eq!(coming(899).step(), Step::Wait);
    assert_eq!(closed(&coming(900).step()), ["n1"]);
    // This process may not have been there to see it join.
    let mut restarted = coming(5000);
    restarted.nodes.get_mut("n1").expect("there").absent_since_ms = NOW - 10 * S;
    assert_eq!(restarted.step(), Step::Wait);
    restarted.nodes.get_mut("n1").expect("there").ready = true;
    assert_eq!(restarted.step(), Step::Joined(vec!["n1".to_owned()]));
    let lost = |empty| {
        Case::new(usual()).with("n1", ProvidedState::Joined, |seen| {
            (seen.ready, seen.empty, seen.absent_since_ms) = (false, empty, NOW - 900 * S);
        })
    };
    assert_eq!(closed(&lost(true).step()), ["n1"]);
    assert_eq!(lost(false).step(), Step::Wait, "its tasks are not counted as lost yet");
}

#[test]
fn a_closed_node_is_opened_for_whoever_needs_it_until_the_provider_was_told() {
    let closing = |empty| Case::new(usual()).with("n1", ProvidedState::Closing, |seen| seen.empty = empty);
    assert_eq!(closing(true).step(), Step::Release(vec!["n1".to_owned()]));
    assert_eq!(closing(true).needs(1, &[]).step(), Step::Reopen(vec!["n1".to_owned()]));
    assert_eq!(closing(false).step(), Step::Reopen(vec!["n1".to_owned()]), "an operator opened it");
    let releasing =
        |empty| Case::new(usual()).with("n1", ProvidedState::Releasing, |seen| seen.empty = empty);
    assert_eq!(releasing(true).needs(1, &[]).step(), Step::Release(vec!["n1".to_owned()]));
    assert_eq!(grows(&releasing(false).needs(1, &[]).step()), 1, "nothing is released under a task");
}

/// A node as the world has it.
#[derive(Clone, Debug)]
struct Machine {
    request: String,
    /// It will report.
    works: bool,
    ready: bool,
    tasks: u32,
    idle_since_ms: u64,
    absent_since_ms: u64,
}

/// Jobs of one whole node each, a provider, and a coordinator that may die.
#[derive(Debug)]
struct World {
    provider: PoolProvider,
    fleet: Fleet,
    machines: BTreeMap<String, Machine>,
    waiting: u32,
    now_ms: u64,
    listed_ms: Option<u64>,
    made: u32,
    asked: u32,
    broken: Broken,
}

/// How the provider behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Not,
    /// It says that it cannot.
    Refuses,
    /// It does it, and its answer is lost.
    Silent,
    /// It does it by half.
    Half,
    /// What it makes never joins.
    Dead,
}

#[derive(Clone, Debug)]
enum Event {
    Submit(u32),
    End,
    Pass(u64),
    Break(Broken),
    /// The machine of a running or idle node vanishes.
    Vanish,
    Restart,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let one = prop_oneof![
        (1..4_u32).prop_map(Event::Submit),
        Just(Event::End),
        Just(Event::End),
        (1..200 * S).prop_map(Event::Pass),
        prop_oneof![
            Just(Broken::Not),
            Just(Broken::Refuses),
            Just(Broken::Silent),
            Just(Broken::Half),
            Just(Broken::Dead)
        ]
        .prop_map(Event::Break),
        Just(Event::Vanish),
        Just(Event::Restart),
    ];
    prop::collection::vec(one, 1..60)
}

impl World {
    fn new(provider: PoolProvider) -> Self {
        Self {
            provider,
            fleet: Fleet::of("cloud"),
            machines: BTreeMap::new(),
            waiting: 0,
            now_ms: NOW,
            listed_ms: None,
            made: 0,
            asked: 0,
            broken: Broken::Not,
        }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Submit(jobs) => self.waiting += jobs,
            Event::End => {
                if let Some(machine) = self.machines.values_mut().find(|machine| machine.tasks > 0) {
                    (machine.tasks, machine.idle_since_ms) = (0, self.now_ms);
                }
            }
            Event::Pass(ms) => self.now_ms += ms,
            Event::Break(broken) => self.broken = *broken,
            Event::Vanish => {
                let joined = self.machines.iter().find(|(_, machine)| machine.ready);
                if let Some(name) = joined.map(|(name, _)| name.clone()) {
                    let machine = self.machines.remove(&name).expect("it is there");
                    self.waiting += machine.tasks;
                }
            }
            Event::Restart => {
                self.listed_ms = None;
                for machine in self.machines.values_mut() {
                    (machine.idle_since_ms, machine.absent_since_ms) = (self.now_ms, self.now_ms);
                }
            }
        }
    }

    /// Agents join, and jobs start on what is open.
    fn settle(&mut self) {
        for machine in self.machines.values_mut().filter(|machine| machine.works) {
            machine.ready = true;
        }
        for (name, machine) in &mut self.machines {
            let state = self.fleet.nodes.get(name).map(|node| node.state);
            let open = matches!(state, Some(ProvidedState::Coming | ProvidedState::Joined));
            if self.waiting > 0 && machine.ready && open && machine.tasks == 0 {
                machine.tasks = 1;
                self.waiting -= 1;
            }
        }
    }

    fn seen(&self) -> BTreeMap<String, Seen> {
        let see = |name: &String| {
            let machine = self.machines.get(name);
            let seen = Seen {
                ready: machine.is_some_and(|machine| machine.ready),
                empty: machine.is_none_or(|machine| machine.tasks == 0),
                offer: NodeOffer::Open,
                idle_since_ms: machine.map_or(0, |machine| machine.idle_since_ms),
                absent_since_ms: machine.map_or(NOW, |machine| machine.absent_since_ms),
            };
            (name.clone(), seen)
        };
        self.fleet.nodes.keys().map(see).collect()
    }

    fn step(&mut self) -> Step {
        let nodes = self.seen();
        let coming = self.fleet.in_state(ProvidedState::Coming).filter(|name| !nodes[*name].ready).count();
        let more = self.waiting.saturating_sub(u32::try_from(coming).expect("few"));
        let helps = (0..self.waiting).map(|job| format!("job-{job:06x}")).collect();
        let need = (self.waiting > 0).then_some(Need { count: more, helps, keeps: BTreeSet::new() });
        let due = self.listed_ms.is_none_or(|at| {
            self.now_ms - at >= 300 * S || self.fleet.failure.as_ref().is_some_and(|of| of.at_ms >= at)
        });
        let step = decide(&Facts {
            now_ms: self.now_ms,
            provider: &self.provider,
            fleet: &self.fleet,
            nodes: &nodes,
            list_due: due,
            need: need.as_ref(),
        });
        self.take(&step);
        step
    }

    fn take(&mut self, step: &Step) {
        let now = self.now_ms;
        match step {
            Step::Wait => {}
            Step::Joined(names) => {
                names.iter().for_each(|name| self.fleet.set(name, ProvidedState::Joined, now));
                self.fleet.mend(Fault::Join);
            }
            Step::Grow { count, why } => {
                assert!(*count > 0 && self.fleet.size() + count <= self.provider.max_nodes);
                assert_eq!(self.fleet.asked, None);
                let over = now - self.fleet.changed_ms >= self.provider.cooldown.milliseconds();
                assert!(over, "the cool-down is over");
                self.asked += 1;
                self.fleet.ask(format!("r{}", self.asked), *count, why.clone(), now);
                self.grow();
            }
            Step::GrowAgain => self.grow(),
            Step::Forget => self.fleet.answered(),
            Step::List => self.list(),
            Step::Close(nodes) => {
                for (name, _) in nodes {
                    let machine = self.machines.get(name);
                    assert!(machine.is_none_or(|machine| machine.tasks == 0), "{name} has a task");
                    self.fleet.set(name, ProvidedState::Closing, now);
                }
                self.fleet.changed_ms = now;
            }
            Step::Reopen(names) => {
                names.iter().for_each(|name| self.fleet.set(name, ProvidedState::Joined, now));
            }
            Step::Release(names) => self.release(names),
        }
    }

    /// The provider makes what is missing of the request.
    fn grow(&mut self) {
        let ProviderAsked { request, count, .. } = self.fleet.asked.clone().expect("asked");
        if self.broken == Broken::Refuses {
            self.fleet.answered();
            return self.fleet.fail(Fault::Grow, "no".to_owned(), self.now_ms);
        }
        let count = if self.broken == Broken::Half { count / 2 } else { count };
        let has = self.machines.values().filter(|machine| machine.request == request).count();
        for _ in has..count as usize {
            self.made += 1;
            let machine = Machine {
                request: request.clone(),
                works: self.broken != Broken::Dead,
                ready: false,
                tasks: 0,
                idle_since_ms: self.now_ms,
                absent_since_ms: self.now_ms,
            };
            self.machines.insert(format!("n{:04}", self.made), machine);
        }
        if self.broken == Broken::Silent {
            return self.fleet.fail(Fault::Grow, "silent".to_owned(), self.now_ms);
        }
        self.find();
        self.fleet.answered();
        match self.broken {
            Broken::Half => self.fleet.fail(Fault::Grow, "half".to_owned(), self.now_ms),
            _ => self.fleet.mend(Fault::Grow),
        }
    }

    fn find(&mut self) {
        for (name, machine) in &self.machines {
            self.fleet.add(name, &machine.request, self.now_ms);
        }
    }

    fn list(&mut self) {
        if matches!(self.broken, Broken::Silent | Broken::Refuses) {
            return self.fleet.fail(Fault::List, "silent".to_owned(), self.now_ms);
        }
        self.find();
        let gone = |name: &String| !self.machines.contains_key(name);
        let gone: Vec<String> = self.fleet.nodes.keys().filter(|name| gone(name)).cloned().collect();
        gone.iter().for_each(|name| drop(self.fleet.nodes.remove(name)));
        self.fleet.mend(Fault::List);
        self.listed_ms = Some(self.now_ms);
    }

    fn release(&mut self, names: &[String]) {
        for name in names {
            let machine = self.machines.get(name);
            assert!(machine.is_none_or(|machine| machine.tasks == 0), "{name} has a task");
            let state = self.fleet.nodes[name].state;
            assert!(matches!(state, ProvidedState::Closing | ProvidedState::Releasing), "{name} is open");
            self.fleet.set(name, ProvidedState::Releasing, self.now_ms);
        }
        if self.broken == Broken::Refuses {
            return self.fleet.fail(Fault::Release, "no".to_owned(), self.now_ms);
        }
        names.iter().for_each(|name| drop(self.machines.remove(name)));
        if self.broken == Broken::Silent {
            return self.fleet.fail(Fault::Release, "silent".to_owned(), self.now_ms);
        }
        names.iter().for_each(|name| drop(self.fleet.nodes.remove(name)));
        self.fleet.mend(Fault::Release);
    }

    /// Everything is well from now on, for so many seconds.
    fn be_well(&mut self, seconds: u64) {
        self.broken = Broken::Not;
        for _ in 0..seconds / 10 {
            self.now_ms += 10 * S;
            for _ in 0..4 {
                self.settle();
                self.step();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happens: never more than the most, never a node under a task; and once all is well, every
    /// job that fits runs, and what is not needed is given back, however it came to be.
    #[test]
    fn nothing_that_is_paid_for_is_forgotten(events in events(), least in 0..3_u32, most in 3..7_u32) {
        let settings = format!(
            r#""min_nodes":{least},"max_nodes":{most},"cooldown":"30s","idle":"60s","join":"120s""#
        );
        let mut world = World::new(provider(&settings));
        for event in &events {
            world.happen(event);
            for _ in 0..3 {
                world.settle();
                world.step();
            }
            world.now_ms += 500;
        }
        let jobs = world.waiting + world.machines.values().map(|machine| machine.tasks).sum::<u32>();
        world.be_well(2 * 3600);
        let running = world.machines.values().map(|machine| machine.tasks).sum::<u32>();
        prop_assert_eq!(running, jobs.min(most.max(running)), "{:?}", world);
        prop_assert_eq!(running + world.waiting, jobs);
        prop_assert_eq!(world.machines.keys().collect::<Vec<_>>(), world.fleet.nodes.keys().collect::<Vec<_>>());
        while world.machines.values().any(|machine| machine.tasks > 0) || world.waiting > 0 {
            world.happen(&Event::End);
            world.settle();
        }
        world.be_well(2 * 3600);
        prop_assert_eq!(world.machines.len(), least as usize, "{:?}", world);
        prop_assert_eq!(world.fleet.nodes.len(), least as usize);
        prop_assert_eq!(world.fleet.asked, None);
    }
}
