//! Why jobs wait, as the last round of planning found it.
//!
//! In memory and not in the store: at ten thousand jobs that wait, expected times change with every
//! round, and each change would be a write. What a restart forgets, the next round finds again.
//! Reasons are kept as the planner gives them and become text when somebody asks.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use lathe_api::job::{Job, JobState};
use lathe_scheduler::plan::Waiting;

/// See the module.
#[derive(Debug, Default)]
pub struct Explanations(RwLock<Arc<Round>>);

#[derive(Debug, Default)]
struct Round {
    waiting: Vec<Waiting>,
    /// By gang; made by the first who asks.
    index: OnceLock<HashMap<String, usize>>,
}

/// Why one job waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The planner's words.
    pub waiting: Waiting,
    /// Its place among those that wait, from 0, in the planner's order.
    pub position: usize,
}

impl Explanations {
    /// Replaces what was known; whether anything is different.
    pub fn set(&self, waiting: Vec<Waiting>) -> bool {
        let round = self.round();
        if round.waiting == waiting {
            return false;
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Round { waiting, index: OnceLock::new() });
        true
    }

    /// Why a job waits, if the last round left it waiting.
    pub fn of(&self, job: &str) -> Option<Explanation> {
        let round = self.round();
        let index = round.index.get_or_init(|| {
            round.waiting.iter().enumerate().map(|(at, waiting)| (waiting.gang.clone(), at)).collect()
        });
        let position = *index.get(job)?;
        Some(Explanation { waiting: round.waiting[position].clone(), position })
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.round().waiting.len()
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds to a job as it is stored what is known of why it waits.
    pub fn complete(&self, job: &mut Job) {
        if job.state != JobState::Pending {
            return;
        }
        let Some(Explanation { waiting, .. }) = self.of(&job.id) else { return };
        let reason = waiting.reason.to_string();
        // What is stored is why it had to start again.
        job.reason = Some(match &job.reason {
            Some(restart) => format!("{reason} ({restart})"),
            None => reason,
        });
        job.expected_start_ms = waiting.expected_ms;
        job.after = waiting.after;
    }

    fn round(&self) -> Arc<Round> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use lathe_scheduler::Reason;

    use super::*;

    fn waiting(gang: &str, expected_ms: Option<u64>) -> Waiting {
        let reason = Reason::NoPool { pool: "p".to_owned() };
        Waiting { gang: gang.to_owned(), reason, expected_ms, after: None }
    }

    #[test]
    fn only_what_is_different_is_news() {
        let explanations = Explanations::default();
        assert!(explanations.set(vec![waiting("a", None), waiting("b", Some(1))]));
        assert!(!explanations.set(vec![waiting("a", None), waiting("b", Some(1))]));
        assert!(explanations.set(vec![waiting("b", Some(2))]));
        assert_eq!(explanations.of("a"), None);
        let found = explanations.of("b").expect("it waits");
        assert_eq!((found.position, found.waiting.expected_ms), (0, Some(2)));
    }
}
