//! What would let a job that waits start, for people. Pure.

use lathe_scheduler::plan::{Reason, Shortage};

/// What would change it, one line.
pub fn remedy(reason: &Reason) -> &'static str {
    match reason {
        Reason::Shortage(shortage) => of_shortage(shortage),
        Reason::Behind { .. } => {
            "that job starts or is cancelled; an estimate that shows that this one ends before would let it go \
             first"
        }
        Reason::Limit(_) => "jobs under that limit end, or an operator raises it",
        Reason::MakingRoom { .. } => "those jobs stop within their grace period",
        Reason::NoPool { .. } => "an operator sets the pool, or the job is submitted to another",
        Reason::Unseen => "jobs before it start or are cancelled",
        Reason::RunsStill => "its node says that they are gone, or is lost",
    }
}

fn of_shortage(shortage: &Shortage) -> &'static str {
    match shortage {
        Shortage::NoNodes => "nodes join the pool, or those that it has become ready (`lathe node list`)",
        Shortage::NoNodeForClass { .. } => {
            "what keeps nodes from running the class is put right, or the job asks for another class"
        }
        Shortage::NoNodeForGpus { .. } => {
            "GPUs that cannot be used are put right (`lathe gpu list`), or each task asks for fewer"
        }
        Shortage::LargerThanCluster { .. } => "nodes are added, or the job asks for less",
        Shortage::GpusOnOneNode { .. } | Shortage::Fragmented { .. } => {
            "jobs end, or the job asks for smaller tasks"
        }
        Shortage::Gpus { .. } | Shortage::Cpus { .. } | Shortage::Memory { .. } => {
            "jobs end, or the job asks for less"
        }
        _ => "jobs end, nodes come that fulfil what it asks for, or it asks for less",
    }
}
