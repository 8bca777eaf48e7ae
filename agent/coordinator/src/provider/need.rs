//! How many more nodes would let jobs start: the planner's own answer, with nodes that are not there.
//!
//! Nothing is computed from what jobs ask for. The planner plans a cycle on copies of its state (a
//! [`Moment`], as a dry-run does), once without more nodes, once with as many as may be asked for, and
//! then with the least number of them that lets as many jobs start. So a gang that needs two nodes asks
//! for two, what no such node could ever run asks for none, and limits, reservations and the order of
//! the queue hold as they will when the nodes are there.
//!
//! Imagined nodes have a taint that only this pool's waiting jobs tolerate: others', which might like
//! them too, are not asked for here.

use std::collections::BTreeSet;
use std::sync::Arc;

use lathe_api::MemorySize;
use lathe_api::node::{Cpus, Inventory, LEAF_LABEL, RACK_LABEL};
use lathe_api::provider::{NodeShape, PROVIDED_LABEL};
use lathe_scheduler::Gang;
use lathe_scheduler::model::{Gpu, Node, Sharing, Taint};

use crate::dry_run::Moment;
use crate::reconcile::model::node;

/// Key of the taint of nodes that are not there.
const IMAGINED: &str = "lathe.imagined";

/// What the planner is asked.
#[derive(Debug)]
pub struct Question {
    /// The cluster, the queue and the planner.
    pub moment: Moment,
    /// Jobs that nodes are imagined for: they wait for room, in the pool or a part of it.
    pub jobs: BTreeSet<String>,
    /// What each node would be.
    pub template: Node,
    /// Nodes that will be there whatever is decided: named, and not joined.
    pub coming: u32,
    /// As many more may be asked for.
    pub most: u32,
    /// Nodes of the pool's that are there.
    pub there: BTreeSet<String>,
}

/// What it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// How many more nodes.
    pub count: u32,
    /// The jobs that would start with them, and with those that are coming.
    pub helps: BTreeSet<String>,
    /// Nodes that are there and that those jobs would use.
    pub keeps: BTreeSet<String>,
}

/// A node as it would be, without a name.
pub fn template(pool: &str, shape: &NodeShape) -> Node {
    let inventory = Inventory {
        cpus: Cpus { online: shape.cpus, ..Cpus::default() },
        memory: Some(shape.memory),
        ..Inventory::default()
    };
    let gpu = |index: u32| Gpu {
        id: index.to_string(),
        model: shape.gpu_model.clone().unwrap_or_default(),
        memory_bytes: shape.gpu_memory.map_or(0, MemorySize::bytes),
        numa: None,
        switch: None,
        link: None,
        partition: None,
        sharing: Sharing::Whole,
    };
    let mut node = Node {
        total: node::total(&inventory),
        gpus: (0..shape.gpus).map(gpu).collect(),
        classes: shape.classes.clone(),
        ..Node::default()
    };
    dress(&mut node, pool, shape);
    node
}

/// A node as it would be, like one that has come: agents know better than whoever wrote the shape.
pub fn template_like(known: &Node, pool: &str, shape: &NodeShape) -> Node {
    let mut node = Node {
        total: known.total,
        gpus: known.gpus.clone(),
        numa: known.numa.clone(),
        classes: known.classes.clone(),
        fetch_mbps: known.fetch_mbps,
        ..Node::default()
    };
    dress(&mut node, pool, shape);
    node
}

fn dress(node: &mut Node, pool: &str, shape: &NodeShape) {
    node.labels = shape.labels.clone();
    node.labels.insert(PROVIDED_LABEL.to_owned(), pool.to_owned());
    node.leaf = shape.labels.get(LEAF_LABEL).cloned();
    node.rack = shape.labels.get(RACK_LABEL).cloned();
    node.taints = shape
        .taints
        .iter()
        .map(|taint| Taint { key: taint.key.clone(), value: taint.value.clone() })
        .chain([Taint { key: IMAGINED.to_owned(), value: String::new() }])
        .collect();
}

/// What comes of a cycle.
struct Trial {
    started: BTreeSet<String>,
    keeps: BTreeSet<String>,
    /// Imagined nodes that are used, those that are coming left out.
    used: u32,
}

/// Asks the planner. As long as a few cycles: not for a thread that answers requests.
pub fn need(mut question: Question) -> Need {
    for gang in &mut question.moment.pending {
        if question.jobs.contains(&gang.id) {
            let mut tolerant = Gang::clone(gang);
            tolerant.tolerations.push((IMAGINED.to_owned(), None));
            *gang = Arc::new(tolerant);
        }
    }
    let none = trial(&question, 0);
    if question.most == 0 {
        return answer(0, none);
    }
    let most = trial(&question, question.most);
    let starts = most.started.len();
    if starts <= none.started.len() {
        return answer(0, none);
    }
    // As many as were used do as a rule, and one less does not; where the pool spreads its tasks, the
    // distance is halved.
    let (mut fails, mut fits, mut best) = (0, question.most, most);
    let mut guesses = vec![best.used.saturating_sub(1), best.used];
    while fits - fails > 1 {
        let between = |guess: &u32| (fails + 1..fits).contains(guess);
        let tried = guesses.pop().filter(between).unwrap_or(fails + (fits - fails) / 2);
        let trial = trial(&question, tried);
        if trial.started.len() >= starts {
            (fits, best) = (tried, trial);
        } else {
            fails = tried;
        }
    }
    answer(fits, best)
}

fn answer(count: u32, trial: Trial) -> Need {
    Need { count, helps: trial.started, keeps: trial.keeps }
}

/// One cycle with so many more nodes.
fn trial(question: &Question, more: u32) -> Trial {
    let Moment { cluster, pending, planner, now_ms } = &question.moment;
    let (mut cluster, mut planner) = (cluster.clone(), planner.clone());
    let real = cluster.nodes().len();
    for number in 0..question.coming + more {
        // No node can have such a name.
        let name = format!("{IMAGINED}.{number}");
        cluster.push(Node { name, ..question.template.clone() });
    }
    let there = u32::try_from(real).unwrap_or(u32::MAX).saturating_add(question.coming);
    let plan = planner.cycle(&mut cluster, pending, *now_ms);
    let (mut started, mut keeps, mut used) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for start in plan.starts.iter().filter(|start| question.jobs.contains(&start.gang.id)) {
        started.insert(start.gang.id.clone());
        for place in &start.tasks {
            let name = &cluster.nodes()[place.node as usize].name;
            if place.node >= there {
                used.insert(place.node);
            } else if question.there.contains(name) {
                keeps.insert(name.clone());
            }
        }
    }
    Trial { started, keeps, used: u32::try_from(used.len()).unwrap_or(u32::MAX) }
}

#[cfg(test)]
mod tests {
    use lathe_api::job::IsolationClass;
    use lathe_scheduler::model::{Amount, GpuRequest, Isolation, Share, Size};
    use lathe_scheduler::plan::Waiting;
    use lathe_scheduler::policy::{Pool, Quota, Settings, Share as QuotaShare, Strategy};
    use lathe_scheduler::{Cluster, Planner};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn shape(json: &str) -> NodeShape {
        serde_json::from_str(json).expect("a shape")
    }

    fn eight_gpus() -> NodeShape {
        shape(r#"{"cpus":64,"memory":"512 GiB","gpus":8,"gpu_model":"H100","gpu_memory":"80 GiB"}"#)
    }

    fn gang(id: &str, tasks: u32, gpus: u32) -> Gang {
        let mut gang = Gang {
            id: id.to_owned(),
            tenant: "red".to_owned(),
            pool: "train".to_owned(),
            class: IsolationClass::Microvm,
            tasks: Size::exactly(tasks),
            ..Gang::default()
        };
        gang.task.amount = Amount { cpu_milli: 4000, memory_bytes: GIB, sandboxes: 1, ..Amount::default() };
        gang.task.gpus = (gpus > 0).then(|| GpuRequest {
            count: gpus,
            share: Share::Whole,
            models: vec![],
            memory_bytes: 0,
        });
        gang
    }

    fn question(pool: Pool, shape: &NodeShape, there: &[Node], gangs: Vec<Gang>, most: u32) -> Question {
        let settings = Settings { pools: vec![pool, other_pool()], tenants: Vec::new() };
        let moment = Moment {
            cluster: Cluster::new(there.to_vec()),
            pending: gangs.into_iter().map(Arc::new).collect(),
            planner: Planner::new(settings, 1),
            now_ms: 1000,
        };
        let jobs = moment.pending.iter().filter(|gang| gang.pool == "train").map(|gang| gang.id.clone());
        Question {
            jobs: jobs.collect(),
            moment,
            template: template("train", shape),
            coming: 0,
            most,
            there: there.iter().map(|node| node.name.clone()).collect(),
        }
    }

    fn pool() -> Pool {
        Pool { name: "train".to_owned(), ..Pool::default() }
    }

    fn other_pool() -> Pool {
        Pool { name: "other".to_owned(), ..Pool::default() }
    }

    /// As one that has joined.
    fn real(name: &str, shape: &NodeShape) -> Node {
        let mut node = Node { name: name.to_owned(), ..template("train", shape) };
        node.taints.pop();
        node
    }

    fn count(gangs: Vec<Gang>, most: u32) -> u32 {
        need(question(pool(), &eight_gpus(), &[], gangs, most)).count
    }

    #[test]
    fn as_many_nodes_are_needed_as_let_the_jobs_start() {
        assert_eq!(count(vec![], 8), 0);
        assert_eq!(count(vec![gang("a", 1, 8)], 8), 1);
        assert_eq!(count(vec![gang("a", 2, 8)], 8), 2, "a gang of two whole nodes");
        assert_eq!(count(vec![gang("a", 16, 1)], 8), 2);
        assert_eq!(count(vec![gang("a", 1, 4), gang("b", 1, 4), gang("c", 1, 1)], 8), 2);
        assert_eq!(count(vec![gang("a", 1, 0); 1], 8), 1, "also for CPUs alone");
        assert_eq!(count(vec![gang("a", 7, 8)], 200), 7);
    }

    #[test]
    fn nothing_is_asked_for_what_no_such_node_could_run() {
        assert_eq!(count(vec![gang("a", 1, 9)], 8), 0, "more GPUs than a node has");
        assert_eq!(count(vec![gang("a", 9, 8)], 8), 0, "more nodes than the pool may have");
        let mut models = gang("a", 1, 8);
        models.task.gpus.as_mut().expect("GPUs").models = vec!["A100".to_owned()];
        let mut memory = gang("b", 1, 0);
        memory.task.amount.memory_bytes = 512 * GIB;
        let mut labelled = gang("c", 1, 1);
        labelled.constraints = vec![lathe_scheduler::model::Constraint {
            label: "zone".to_owned(),
            operator: lathe_scheduler::model::Operator::Exists,
        }];
        assert_eq!(count(vec![models, memory, labelled], 8), 0);
        // One that it could does not wait for them.
        let all = need(question(pool(), &eight_gpus(), &[], vec![gang("a", 1, 9), gang("b", 1, 8)], 8));
        assert_eq!((all.count, all.helps), (1, ["b".to_owned()].into()));
    }

    #[test]
    fn what_is_there_or_coming_is_used_first() {
        let free = real("n1", &eight_gpus());
        let with = |there: &[Node], coming, gangs| {
            need(Question { coming, ..question(pool(), &eight_gpus(), there, gangs, 8) })
        };
        assert_eq!(with(std::slice::from_ref(&free), 0, vec![gang("a", 1, 8)]).count, 0);
        assert_eq!(with(&[], 2, vec![gang("a", 2, 8)]).count, 0);
        assert_eq!(with(&[], 1, vec![gang("a", 2, 8)]).count, 1);
        let found = with(std::slice::from_ref(&free), 0, vec![gang("a", 2, 8)]);
        let expected = Need { count: 1, helps: ["a".to_owned()].into(), keeps: ["n1".to_owned()].into() };
        assert_eq!(found, expected, "the idle one is kept for the gang");
        // For what will never start nothing is kept.
        assert_eq!(with(&[free], 0, vec![gang("a", 20, 8)]), Need::default());
    }

    #[test]
    fn spreading_pools_do_not_ask_for_a_node_for_each_task() {
        let spread = Pool { placement: Strategy::Spread, ..pool() };
        assert_eq!(need(question(spread, &eight_gpus(), &[], vec![gang("a", 16, 1)], 64)).count, 2);
    }

    #[test]
    fn limits_and_isolation_hold_for_nodes_that_are_not_there() {
        let limit = QuotaShare {
            gpu_milli: 8000,
            amount: Amount {
                cpu_milli: u64::MAX,
                memory_bytes: u64::MAX,
                hugepage_bytes: u64::MAX,
                sandboxes: u32::MAX,
            },
        };
        let limited = Pool { quota: Quota { limit: Some(limit), guaranteed: None }, ..pool() };
        let gangs = vec![gang("a", 1, 8), gang("b", 1, 8)];
        assert_eq!(need(question(limited, &eight_gpus(), &[], gangs, 8)).count, 1);
        let (mut one, mut two) = (gang("a", 1, 1), gang("b", 1, 1));
        (one.isolation, two.isolation, two.tenant) = (Isolation::Node, Isolation::Node, "blue".to_owned());
        assert_eq!(count(vec![one, two], 8), 2, "tenants that do not share nodes");
    }

    #[test]
    fn jobs_of_other_pools_are_not_asked_for() {
        let mut others = gang("a", 4, 8);
        others.pool = "other".to_owned();
        assert_eq!(count(vec![others, gang("b", 1, 8)], 8), 1);
    }

    #[test]
    fn elastic_gangs_are_asked_for_at_their_least() {
        let mut elastic = gang("a", 6, 8);
        elastic.tasks = Size { min: 2, max: 6 };
        assert_eq!(count(vec![elastic], 8), 2);
    }

    #[test]
    fn nodes_that_came_say_more_than_the_shape() {
        let came = shape(r#"{"cpus":64,"memory":"512 GiB","gpus":7,"gpu_model":"H100"}"#);
        let known = real("n1", &came);
        let mut asked = question(pool(), &eight_gpus(), &[], vec![gang("a", 1, 8)], 8);
        asked.template = template_like(&known, "train", &eight_gpus());
        assert_eq!(need(asked).count, 0, "what has come has seven");
    }

    #[test]
    fn the_reason_that_a_job_waits_does_not_name_what_is_imagined() {
        let mut asked = question(pool(), &eight_gpus(), &[], vec![gang("a", 1, 9)], 8);
        let Moment { cluster, pending, planner, now_ms } = &mut asked.moment;
        let waiting: Vec<Waiting> = planner.cycle(cluster, pending, *now_ms).waiting;
        assert!(!waiting[0].reason.to_string().contains(IMAGINED));
    }
}
