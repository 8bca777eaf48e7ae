//! Which nodes may run a gang, whatever is free of them.

use crate::model::{Gang, Node, Offer, Window};

use super::shape::Shape;

/// Whether a node may run the gang, whatever is free of it.
pub fn eligible(node: &Node, gang: &Gang) -> bool {
    node.offer == Offer::Open
        && node.classes.contains(&gang.class)
        && tolerated(node, &gang.tolerations)
        && gang.constraints.iter().all(|constraint| constraint.holds(&node.name, &node.labels))
        && enough_gpus(node, gang.task.gpus.as_ref())
}

/// The same for a shape.
pub(super) fn eligible_shape(node: &Node, shape: &Shape) -> bool {
    node.offer == Offer::Open
        && node.classes.contains(&shape.class)
        && tolerated(node, &shape.tolerations)
        && shape.constraints.iter().all(|constraint| constraint.holds(&node.name, &node.labels))
        && enough_gpus(node, shape.task.gpus.as_ref())
}

/// Whether no taint of the node keeps it away.
pub(super) fn tolerated(node: &Node, tolerations: &[(String, Option<String>)]) -> bool {
    node.taints.iter().all(|taint| {
        tolerations
            .iter()
            .any(|(key, value)| *key == taint.key && value.as_ref().is_none_or(|value| *value == taint.value))
    })
}

/// Whether the node has as many devices as one task asks for, of the model, memory and profile.
fn enough_gpus(node: &Node, request: Option<&crate::model::GpuRequest>) -> bool {
    request.is_none_or(|request| {
        let accepted = node.gpus.iter().filter(|gpu| request.accepts(gpu)).count();
        accepted >= request.count as usize
    })
}

/// When a gang would be there: from now until its expected end; the same instant if nobody can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Now, milliseconds.
    pub from_ms: u64,
    /// When it will have ended, milliseconds.
    pub until_ms: u64,
}

impl Span {
    /// For a gang that starts now.
    pub fn of(gang: &Gang, now_ms: u64) -> Self {
        Self { from_ms: now_ms, until_ms: now_ms.saturating_add(gang.estimate_ms.unwrap_or(0)) }
    }

    /// The first window of the node that it reaches into.
    pub fn hits<'a>(&self, node: &'a Node) -> Option<&'a Window> {
        node.maintenance
            .iter()
            .filter(|window| {
                window.from_ms < self.until_ms.max(self.from_ms.saturating_add(1))
                    && window.until_ms > self.from_ms
            })
            .min_by_key(|window| window.from_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_that_reaches_into_a_window_hits_it() {
        let window = Window { from_ms: 100, until_ms: 200, reason: "kernel".to_owned() };
        let node = Node { maintenance: vec![window.clone()], ..Node::default() };
        let hits = |from_ms, until_ms| Span { from_ms, until_ms }.hits(&node).is_some();
        assert!(!hits(0, 100) && hits(0, 101) && hits(150, 150) && hits(199, 300) && !hits(200, 300));
        // Without an estimate only the present matters.
        let gang = Gang::default();
        assert_eq!(Span::of(&gang, 99).hits(&node), None);
        assert_eq!(Span::of(&gang, 100).hits(&node), Some(&window));
    }
}
