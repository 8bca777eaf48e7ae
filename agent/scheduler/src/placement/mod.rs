//! Where one gang goes: filters, then a score.
//!
//! A node passes the filters ([`eligible`]) if it takes work, runs the class, and fulfils constraints,
//! taints and isolation; its maintenance must not begin before the gang is expected to have ended.
//! Among the nodes that have room the one of least cost is taken. All parts of the cost are added up on
//! one scale, thousandths of a GPU that go unused while the gang runs:
//!
//! | part | thousandths of a GPU |
//! | --- | --- |
//! | fragmentation | what the node's rests lose of their worth to what typically comes (the strategy's score) |
//! | data | inputs that must come first keep the task's GPUs (or a tenth of one, without) waiting for that part of its time |
//! | devices | GPUs of one task that are not peers work less: 1 % less on one NUMA node, 2 % across |
//! | communication | links above the node carry less: 1 % of the gang's GPUs for each level that a ring must climb, half of that for each hop of the average pair of an all-to-all |
//! | preference | a weight of 100 is worth one GPU |
//!
//! Strategies other than the default rank in units of their own; for them the other parts break ties
//! only.
//!
//! Gangs are placed whole or not at all, ranks of one node consecutive. Whether a gang fits at all is
//! exact where its tasks can go anywhere ([`Scope::Any`](crate::model::Scope)); in a narrower scope it is
//! exact, too, as groups are counted before one is chosen, but for nodes with NVSwitch partitions of
//! unequal sizes, where devices are given task by task.

mod cutting;
mod demand;
mod devices;
mod diagnosis;
mod filter;
mod fragmentation;
mod group;
mod locality;
mod score;
mod shape;
mod shortage;

use std::collections::HashMap;

pub use demand::Demand;
pub use filter::{Span, eligible};
pub use shortage::{Filtered, Shortage};

use crate::model::{Cluster, Fold, Free, Gang, Node, TaskPlace};
use crate::policy::Strategy;
use devices::Choices;
use score::{Ask, Devices, Largest, Score};
use shape::{Shape, Table};

/// Shapes whose costs are kept: at 5,000 nodes one takes 160 KB.
const MOST_SHAPES: usize = 512;

/// A gang of so many tasks is counted before it is placed.
const MANY: u32 = 16;

/// Reasons that are kept.
const MOST_REASONS: usize = 4096;

/// Places gangs; keeps what it computed of nodes that did not change.
#[derive(Debug)]
pub struct Placer {
    strategy: Strategy,
    seed: u64,
    ties: Ties,
    score: Box<dyn Score>,
    /// How many ties were broken, so that the next is broken otherwise.
    draws: u64,
    tables: Vec<Table>,
    by_key: HashMap<u64, usize>,
    clock: u64,
    choices: Choices,
    /// The cluster's nodes that the following is of.
    nodes: u64,
    largest: Largest,
    /// By node: its place in the order of names.
    ranks: Vec<u32>,
    demand: Learning,
    reasons: HashMap<u64, Shortage>,
}

/// Nodes that are looked at.
#[derive(Clone, Copy, Debug)]
enum Among<'a> {
    All,
    Nodes(&'a [u32]),
}

/// What was free of nodes before tasks were put there. Giving a task back is not the same: it does not
/// tell which NUMA node a task took from that wanted none in particular.
#[derive(Debug, Default)]
struct Undo(Vec<(u32, Free)>);

impl Undo {
    fn before(&mut self, cluster: &Cluster, node: u32) {
        if self.0.iter().all(|(known, _)| *known != node) {
            self.0.push((node, cluster.free()[node as usize].clone()));
        }
    }

    fn all(self, cluster: &mut Cluster) {
        self.0.into_iter().for_each(|(node, free)| cluster.set_free(node, free));
    }
}

/// Where the mix of what is asked for comes from.
#[derive(Clone, Debug)]
enum Learning {
    /// From what is placed.
    From(demand::Learner),
    /// It was said.
    Given,
}

/// Which of several nodes of the same cost is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Ties {
    /// One that the seed draws.
    #[default]
    Seeded,
    /// The one whose name comes first.
    ByName,
}

/// What to place.
#[derive(Clone, Copy)]
pub struct PlaceRequest<'a> {
    /// The gang.
    pub gang: &'a Gang,
    /// How many of its tasks.
    pub tasks: u32,
    /// Nodes that may be used.
    pub admits: &'a dyn Fn(&Node) -> bool,
    /// A number for `admits`: who gives one promises that the same number means the same nodes as long
    /// as they do not change. Reasons are then found once for all gangs of one shape.
    pub admits_key: Option<u64>,
    /// From when to when, to stay out of maintenance; it is not looked at without.
    pub span: Option<Span>,
}

impl Clone for Placer {
    fn clone(&self) -> Self {
        Self {
            score: self.score.boxed(),
            tables: self.tables.clone(),
            by_key: self.by_key.clone(),
            choices: self.choices.clone(),
            ranks: self.ranks.clone(),
            demand: self.demand.clone(),
            reasons: self.reasons.clone(),
            ..*self
        }
    }
}

impl Placer {
    /// For one strategy; `seed` decides what is left to chance.
    pub fn new(strategy: Strategy, seed: u64) -> Self {
        let score = score::of(strategy);
        let choices = Choices::new(score.devices() == Devices::Drawn);
        Self {
            strategy,
            seed,
            ties: Ties::Seeded,
            score,
            draws: 0,
            tables: Vec::new(),
            by_key: HashMap::new(),
            clock: 0,
            choices,
            nodes: 0,
            largest: Largest::default(),
            ranks: Vec::new(),
            demand: Learning::From(demand::Learner::default()),
            reasons: HashMap::new(),
        }
    }

    /// The same, with ties broken so.
    #[must_use]
    pub fn with_ties(mut self, ties: Ties) -> Self {
        self.ties = ties;
        self
    }

    /// The strategy.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Says what the mix of tasks is. Without, it is learnt from the gangs that come: those placed, and
    /// those that had no room, once each time the reason is found anew.
    pub fn set_demand(&mut self, demand: &Demand) {
        self.demand = Learning::Given;
        self.new_demand(demand);
    }

    /// Takes room for `tasks` tasks of the gang on nodes that `admits` lets through, all or none, and
    /// says where they are, by rank; ranks of one node are consecutive.
    ///
    /// # Errors
    /// What is missing; nothing changes then.
    pub fn place(
        &mut self,
        cluster: &mut Cluster,
        gang: &Gang,
        tasks: u32,
        admits: &dyn Fn(&Node) -> bool,
    ) -> Result<Vec<TaskPlace>, Shortage> {
        self.place_request(cluster, &PlaceRequest { gang, tasks, admits, admits_key: None, span: None })
    }

    /// The same, and says what else holds for the gang.
    ///
    /// # Errors
    /// What is missing; nothing changes then.
    pub fn place_request(
        &mut self,
        cluster: &mut Cluster,
        request: &PlaceRequest<'_>,
    ) -> Result<Vec<TaskPlace>, Shortage> {
        match self.try_place(cluster, request) {
            Some(places) => Ok(places),
            None => Err(self.shortage(cluster, request)),
        }
    }

    /// As [`Placer::place`], and learns from a gang that has no room in the same way, but looks for no
    /// reason: that takes longer than to find a place. [`Placer::reason`] finds it.
    pub fn seek(
        &mut self,
        cluster: &mut Cluster,
        gang: &Gang,
        tasks: u32,
        admits: &dyn Fn(&Node) -> bool,
    ) -> Option<Vec<TaskPlace>> {
        let request = PlaceRequest { gang, tasks, admits, admits_key: None, span: None };
        let found = self.try_place(cluster, &request);
        if found.is_none() {
            self.learn(gang, 1);
        }
        found
    }

    /// Why a gang has no room that [`Placer::seek`] found to have none.
    pub fn reason(
        &self,
        cluster: &Cluster,
        gang: &Gang,
        tasks: u32,
        admits: &dyn Fn(&Node) -> bool,
    ) -> Shortage {
        diagnosis::of(cluster, &PlaceRequest { gang, tasks, admits, admits_key: None, span: None })
    }

    /// The same without a reason, which takes longer to find than a place.
    pub fn try_place(&mut self, cluster: &mut Cluster, request: &PlaceRequest<'_>) -> Option<Vec<TaskPlace>> {
        self.look_at(cluster);
        let table = self.table(cluster, request.gang);
        let placed = if group::is_single(request) {
            self.place_singly(cluster, table, request)
        } else {
            self.place_group(cluster, table, request)
        };
        if placed.is_some() {
            self.learn(request.gang, request.tasks);
        }
        placed
    }

    fn place_singly(
        &mut self,
        cluster: &mut Cluster,
        table: usize,
        request: &PlaceRequest<'_>,
    ) -> Option<Vec<TaskPlace>> {
        if request.tasks >= MANY {
            // Counting is quicker than placing many, and giving all back.
            self.refresh(cluster, table, Among::All);
            let rooms = self.rooms(cluster, table, request);
            if rooms.iter().map(|(_, room)| u64::from(*room)).sum::<u64>() < u64::from(request.tasks) {
                return None;
            }
        }
        Some(self.place_tasks(cluster, table, request, Among::All, None, false)?.0)
    }

    /// Task after task onto the node where it costs least; with `switch` onto devices below that one.
    /// The places, and what they cost together; none, and nothing changed, if not all fit. A trial changes
    /// nothing either.
    fn place_tasks(
        &mut self,
        cluster: &mut Cluster,
        table: usize,
        request: &PlaceRequest<'_>,
        among: Among<'_>,
        switch: Option<Option<u8>>,
        trial: bool,
    ) -> Option<(Vec<TaskPlace>, f64)> {
        let mut places: Vec<TaskPlace> = Vec::with_capacity(request.tasks as usize);
        let mut undo = Undo::default();
        let mut spent = 0.0;
        for _ in 0..request.tasks {
            self.refresh(cluster, table, among);
            let chosen = self.select(cluster, table, request, among, switch);
            let place = chosen.and_then(|node| {
                let place = self.place_on(cluster, table, node, switch)?;
                spent += self.tables[table].costs[node as usize];
                if trial || request.tasks > 1 {
                    undo.before(cluster, node);
                }
                cluster.take(request.gang, &place).ok()?;
                Some(place)
            });
            let Some(place) = place else {
                undo.all(cluster);
                return None;
            };
            places.push(place);
        }
        if trial {
            undo.all(cluster);
        }
        if places.len() > 1 {
            locality::order_ranks(cluster, &mut places);
        }
        Some((places, spent))
    }

    /// The node of least cost.
    fn select(
        &mut self,
        cluster: &Cluster,
        table: usize,
        request: &PlaceRequest<'_>,
        among: Among<'_>,
        switch: Option<Option<u8>>,
    ) -> Option<u32> {
        self.draws += 1;
        let drawn = Fold::mix(self.seed, self.draws);
        let costs = &self.tables[table].costs;
        let best = |nodes: &mut dyn Iterator<Item = (u32, f64)>| {
            let (mut least, mut first, mut chosen) = (f64::INFINITY, u64::MAX, None);
            for (index, cost) in nodes {
                if cost > least || cost == f64::INFINITY {
                    continue;
                }
                let rank = self.tie(drawn, index);
                let better = cost < least || rank < first;
                if better && self.allowed(cluster, table, request, index, switch) {
                    (least, first, chosen) = (cost, rank, Some(index));
                }
            }
            chosen
        };
        let mut all = (0..).zip(costs.iter().copied());
        match among {
            Among::All => {
                // Most often a node of the very least cost is allowed, and no other need be looked at.
                let least = shape::least(costs);
                if least == f64::INFINITY {
                    return None;
                }
                best(&mut all.clone().filter(|(_, cost)| *cost == least)).or_else(|| best(&mut all))
            }
            Among::Nodes(nodes) => best(&mut nodes.iter().map(|&index| (index, costs[index as usize]))),
        }
    }

    /// Of nodes of the same cost the one with the least is taken.
    #[inline]
    fn tie(&self, drawn: u64, index: u32) -> u64 {
        match self.ties {
            Ties::Seeded => Fold::mix(drawn, index.into()),
            Ties::ByName => self.ranks[index as usize].into(),
        }
    }

    /// Filters that depend on more than the shape and the node's state.
    fn allowed(
        &self,
        cluster: &Cluster,
        table: usize,
        request: &PlaceRequest<'_>,
        index: u32,
        switch: Option<Option<u8>>,
    ) -> bool {
        let node = &cluster.nodes()[index as usize];
        (request.admits)(node)
            && (node.maintenance.is_empty() || request.span.is_none_or(|span| span.hits(node).is_none()))
            && (switch.is_none() || {
                let mut choices = Choices::default();
                choices.find(node, &cluster.free()[index as usize], &self.tables[table].shape, switch)
            })
    }

    /// Brings the costs of a shape up to date.
    fn refresh(&mut self, cluster: &Cluster, table: usize, among: Among<'_>) {
        let Self { tables, score, choices, largest, strategy, .. } = self;
        let (nodes, free, prints) = (cluster.nodes(), cluster.free(), cluster.node_fingerprints());
        let scale = if *strategy == Strategy::Balanced { 1.0 } else { TIE_BREAK };
        tables[table].refresh(
            cluster,
            among,
            |shape, index| {
                let node = &nodes[index as usize];
                filter::eligible_shape(node, shape).then(|| scale * locality::fixed_cost(node, shape))
            },
            |shape, index| {
                let at = index as usize;
                let ask = Ask {
                    index,
                    node: &nodes[at],
                    node_print: prints[at],
                    free: &free[at],
                    task: &shape.task,
                    taken: shape.taken,
                    largest: *largest,
                };
                best_devices(score.as_mut(), choices, &ask, shape, None, scale, 0).map(|(cost, _)| cost)
            },
        );
    }

    /// The devices of the node that cost least, and the NUMA node of the CPUs.
    fn place_on(
        &mut self,
        cluster: &Cluster,
        table: usize,
        node: u32,
        switch: Option<Option<u8>>,
    ) -> Option<TaskPlace> {
        let at = node as usize;
        let shape = &self.tables[table].shape;
        let (place_of, free) = (&cluster.nodes()[at], &cluster.free()[at]);
        let ask = Ask {
            index: node,
            node: place_of,
            node_print: cluster.node_fingerprints()[at],
            free,
            task: &shape.task,
            taken: shape.taken,
            largest: self.largest,
        };
        let scale = if self.strategy == Strategy::Balanced { 1.0 } else { TIE_BREAK };
        let draw = Fold::mix(self.seed, !self.draws);
        let (_, chosen) =
            best_devices(self.score.as_mut(), &mut self.choices, &ask, shape, switch, scale, draw)?;
        let gpus = self.choices.sets().nth(chosen)?.to_vec();
        let numa = devices::numa(place_of, free, &shape.taken, &gpus);
        Some(TaskPlace { node, gpus, numa })
    }

    /// The table of the gang's shape.
    fn table(&mut self, cluster: &Cluster, gang: &Gang) -> usize {
        self.clock += 1;
        let isolated = cluster.is_isolated();
        let key = Shape::key(gang, isolated);
        let known = self.by_key.get(&key).copied();
        if let Some(at) = known.filter(|&at| self.tables[at].shape.is_of(gang, isolated)) {
            self.tables[at].used = self.clock;
            return at;
        }
        let mut table = Table::new(Shape::of(gang, isolated));
        table.used = self.clock;
        let at = if self.tables.len() < MOST_SHAPES {
            self.tables.push(table);
            self.tables.len() - 1
        } else {
            let oldest = (0..self.tables.len()).min_by_key(|&at| self.tables[at].used).unwrap_or(0);
            self.by_key.retain(|_, at| *at != oldest);
            self.tables[oldest] = table;
            oldest
        };
        self.by_key.insert(key, at);
        at
    }

    /// What is known of the nodes as a whole.
    fn look_at(&mut self, cluster: &Cluster) {
        let nodes = cluster.nodes_fingerprint();
        if self.nodes == nodes && self.ranks.len() == cluster.nodes().len() {
            return;
        }
        self.nodes = nodes;
        let largest = Largest::of(cluster.nodes());
        if largest != self.largest {
            self.largest = largest;
            self.tables.iter_mut().for_each(Table::forget);
        }
        let mut order: Vec<u32> = (0..).take(cluster.nodes().len()).collect();
        order.sort_by(|&one, &two| {
            cluster.nodes()[one as usize].name.cmp(&cluster.nodes()[two as usize].name)
        });
        self.ranks = vec![0; order.len()];
        for (rank, node) in (0..).zip(order) {
            self.ranks[node as usize] = rank;
        }
    }

    fn learn(&mut self, gang: &Gang, tasks: u32) {
        if !self.score.learns() {
            return;
        }
        let Learning::From(learner) = &mut self.demand else { return };
        if learner.see(&gang.task, tasks.into()) {
            let demand = learner.demand();
            self.new_demand(&demand);
        }
    }

    fn new_demand(&mut self, demand: &Demand) {
        if self.score.demand(demand) {
            self.tables.iter_mut().for_each(Table::forget);
        }
    }

    /// Why a gang that was found to have no room has none: found once for gangs that ask for the same of
    /// the same cluster, if `admits_key` says what that is.
    pub fn shortage(&mut self, cluster: &Cluster, request: &PlaceRequest<'_>) -> Shortage {
        let key = request.admits_key.map(|admits| {
            let gang = request.gang;
            let shape = Shape::key(gang, true);
            let asked = (shape, request.tasks, gang.scope, gang.communication, admits);
            let span = request.span.map(|span| (span.from_ms, span.until_ms));
            Fold::of(&(asked, span, cluster.fingerprint()))
        });
        if let Some(known) = key.and_then(|key| self.reasons.get(&key)) {
            return known.clone();
        }
        let shortage = diagnosis::of(cluster, request);
        if let Some(key) = key {
            if self.reasons.len() >= MOST_REASONS {
                self.reasons.clear();
            }
            self.reasons.insert(key, shortage.clone());
        }
        self.learn(request.gang, 1);
        shortage
    }
}

/// GPU thousandths that are free but of no use for what typically comes: the measure of Weng et al.,
/// summed over the nodes.
pub fn fragmented_milli(cluster: &Cluster, demand: &Demand) -> f64 {
    let demand = demand.processors_alone();
    let mut kinds = fragmentation::Kinds::default();
    let mut measures: Vec<fragmentation::Measure> = Vec::new();
    let mut sum = 0.0;
    for (index, (node, free)) in (0..).zip(cluster.nodes().iter().zip(cluster.free())) {
        let kind = kinds.of(index, node, cluster.node_fingerprints()[index as usize]).number as usize;
        if measures.len() <= kind {
            measures.push(fragmentation::Measure::published(node, &demand));
        }
        sum += measures[kind].of(&node.gpus, &free.amount, &free.gpus).stranded;
    }
    sum
}

/// Costs of parts that a published strategy does not know are scaled down to break its ties alone.
const TIE_BREAK: f64 = 1e-9;

/// The cost of the best devices of a node, and which set of `choices` they are.
fn best_devices(
    score: &mut dyn Score,
    choices: &mut Choices,
    ask: &Ask<'_>,
    shape: &Shape,
    switch: Option<Option<u8>>,
    scale: f64,
    draw: u64,
) -> Option<(f64, usize)> {
    let admitted = ask.free.alone.is_empty() && shape.isolation != crate::model::Isolation::Node
        || ask.free.admits(shape.tenant.as_deref().unwrap_or(""), shape.isolation);
    if !ask.free.amount.fits(&shape.taken) || !admitted || !choices.find(ask.node, ask.free, shape, switch) {
        return None;
    }
    let ties = score.devices();
    let mut best: Option<(f64, u64, usize)> = None;
    for (at, set) in choices.sets().enumerate() {
        let cost = score.cost(ask, set) + scale * locality::devices_cost(ask.node, set);
        let rank = match ties {
            Devices::First => at as u64,
            Devices::Drawn => Fold::mix(draw, at as u64),
            Devices::Tightest => {
                let left = set.iter().map(|place| u64::from(ask.free.gpus[usize::from(place.index)].milli));
                left.sum::<u64>() << 8 | at as u64
            }
        };
        if best.is_none_or(|(least, first, _)| cost < least || cost == least && rank < first) {
            best = Some((cost, rank, at));
        }
    }
    best.map(|(cost, _, at)| (cost, at))
}
