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
        Shortage::NoNodes => "nodes become ready (`lathe node list`)",
        Shortage::NotInPool { .. } => {
            "nodes get the labels that the pool's selector asks for (`lathe pool show`), or the job goes to \
             another pool"
        }
        Shortage::NoNodeForConstraint { .. } => {
            "an operator labels a node so (`lathe node label`), or the job asks for less"
        }
        Shortage::Tainted { .. } => "the taint is removed (`lathe node taint`), or the job tolerates it",
        Shortage::Closed { .. } => "an operator uncordons nodes (`lathe node uncordon`), or others fulfil it",
        Shortage::NoGpuModel { .. } | Shortage::NoGpuMemory { .. } | Shortage::NoGpuProfile { .. } => {
            "nodes with such GPUs join, or the job asks for others"
        }
        Shortage::NoInstance { .. } => "jobs with such instances end",
        Shortage::Maintenance { .. } => {
            "the maintenance is over or called off, or the job says that it takes less (`estimate`)"
        }
        Shortage::Isolated { .. } => {
            "jobs of other tenants end, or the job asks for less isolation, if its own is in the way"
        }
        Shortage::GpusOnOneSwitch { .. } | Shortage::Group { .. } => {
            "jobs there end, or the job asks for a wider topology or fewer tasks"
        }
        Shortage::LargerThanGroup { .. } => "the job asks for a wider topology, or fewer or smaller tasks",
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
        Shortage::Gpus { .. }
        | Shortage::Cpus { .. }
        | Shortage::Memory { .. }
        | Shortage::Hugepages { .. } => "jobs end, or the job asks for less",
    }
}
