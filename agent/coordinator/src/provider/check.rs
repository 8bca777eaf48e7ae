//! Whether a pool's provider makes sense: checked when a pool is set.

use lathe_api::TimeSpan;
use lathe_api::job::IsolationClass;
use lathe_api::pool::Pool;
use lathe_api::provider::{NodeShape, PROVIDED_LABEL, PoolProvider};

use super::fleet::Fleet;
use super::registry::Programs;
use crate::api::error::ApiError;
use crate::check;
use crate::policy::{self, Pools};

/// A provider that makes no sense. Displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// A field.
    #[error("{reason}")]
    Field {
        /// Its dotted path.
        field: String,
        /// The value, and what is possible.
        reason: String,
    },
    /// Nodes would be forgotten.
    #[error(
        "pool {pool:?} has or waits for {nodes} nodes of provider {provider:?}: set its provider's max_nodes and \
         min_nodes to 0, drain them, and wait until they are given back"
    )]
    InUse {
        /// The pool.
        pool: String,
        /// How many.
        nodes: u32,
        /// Whose.
        provider: String,
    },
}

impl From<ProviderError> for ApiError {
    fn from(error: ProviderError) -> Self {
        match &error {
            ProviderError::Field { field, .. } => Self::field(field, error.to_string()),
            ProviderError::InUse { .. } => Self::conflict(error.to_string()),
        }
    }
}

fn field(name: &str, reason: impl Into<String>) -> ProviderError {
    ProviderError::Field { field: format!("provider.{name}"), reason: reason.into() }
}

/// Nodes of one pool: what an answer may name, half of it.
const MAX_NODES: u32 = 4096;
const MAX_CPUS: u32 = 4096;
const MAX_GPUS: u32 = 64;
const MAX_LABELS: usize = 32;
const MAX_TAINTS: usize = 8;
const MAX_MODEL_CHARS: usize = 128;
/// 1 PiB, as for jobs.
const MAX_MEMORY: u64 = 1 << 50;
const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Checks a pool that is to be set beside the others and in place of what it was.
///
/// # Errors
/// The field, its value, what to do.
pub fn check_pool(
    pools: &Pools,
    pool: &Pool,
    fleet: Option<&Fleet>,
    programs: &Programs,
) -> Result<(), ProviderError> {
    let provider = pool.provider.as_ref();
    if let Some(fleet) = fleet.filter(|fleet| !fleet.is_empty())
        && provider.is_none_or(|provider| provider.name != fleet.provider)
    {
        return Err(in_use(&pool.name, fleet));
    }
    let Some(provider) = provider else { return Ok(()) };
    if !programs.contains_key(&provider.name) {
        let known: Vec<&str> = programs.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let name: String = provider.name.chars().take(80).collect();
        let detail = format!(
            "{name:?}: the coordinator was started with other providers ({known}); start it with --provider \
             NAME=PATH"
        );
        return Err(field("name", detail));
    }
    check_numbers(provider)?;
    check_shape(&provider.shape)?;
    let mut labels = provider.shape.labels.clone();
    labels.insert(PROVIDED_LABEL.to_owned(), pool.name.clone());
    let mut all = pools.clone();
    all.insert(pool.name.clone(), pool.clone());
    // A condition on names cannot be known to hold, nor to fail.
    let nameless = |pool: &mut Pool| pool.selector.retain(|one| one.label != "name");
    all.values_mut().for_each(nameless);
    if !policy::has_node(&all, &all[&pool.name], "", &labels) {
        let detail = "nodes with these are not the pool's: give them what its selector, and its parents', \
                      asks for";
        return Err(field("shape.labels", detail));
    }
    Ok(())
}

/// Why a pool with nodes of a provider's cannot be removed, or get another one.
pub fn in_use(pool: &str, fleet: &Fleet) -> ProviderError {
    ProviderError::InUse { pool: pool.to_owned(), nodes: fleet.size(), provider: fleet.provider.clone() }
}

fn check_numbers(provider: &PoolProvider) -> Result<(), ProviderError> {
    let PoolProvider { min_nodes, max_nodes, .. } = provider;
    if *max_nodes > MAX_NODES {
        let detail = format!("{max_nodes}: 0 to {MAX_NODES} are possible");
        return Err(field("max_nodes", detail));
    }
    if min_nodes > max_nodes {
        let detail = format!("{min_nodes}: at most max_nodes, which is {max_nodes}");
        return Err(field("min_nodes", detail));
    }
    let spans: [(&str, TimeSpan, u64, u64); 4] = [
        ("cooldown", provider.cooldown, 0, DAY),
        ("idle", provider.idle, 0, 30 * DAY),
        ("timeout", provider.timeout, 1, HOUR),
        ("join", provider.join, 1, DAY),
    ];
    for (name, span, least, most) in spans {
        if !(least..=most).contains(&span.seconds()) {
            let (least, most) = (TimeSpan::from_seconds(least), TimeSpan::from_seconds(most));
            let detail = format!("{span}: {least} to {most} are possible");
            return Err(field(name, detail));
        }
    }
    Ok(())
}

fn check_shape(shape: &NodeShape) -> Result<(), ProviderError> {
    let field = |name: &str, reason: String| field(&format!("shape.{name}"), reason);
    for (name, value, least, most) in [("cpus", shape.cpus, 1, MAX_CPUS), ("gpus", shape.gpus, 0, MAX_GPUS)] {
        if !(least..=most).contains(&value) {
            return Err(field(name, format!("{value}: {least} to {most} are possible")));
        }
    }
    for (name, value) in [("memory", Some(shape.memory)), ("gpu_memory", shape.gpu_memory)] {
        if let Some(value) = value.filter(|value| !(1 << 20..=MAX_MEMORY).contains(&value.bytes())) {
            return Err(field(name, format!("{value}: 1 MiB to 1 PiB are possible")));
        }
    }
    if let Some(model) = &shape.gpu_model
        && (model.is_empty() || model.len() > MAX_MODEL_CHARS || model.chars().any(char::is_control))
    {
        return Err(field("gpu_model", format!("one line of 1 to {MAX_MODEL_CHARS} characters")));
    }
    if shape.classes.is_empty() || shape.classes.contains(&IsolationClass::Unikernel) {
        return Err(field("classes", "microvm, container or both are possible".to_owned()));
    }
    if shape.labels.len() > MAX_LABELS {
        return Err(field("labels", format!("at most {MAX_LABELS}")));
    }
    for (name, value) in &shape.labels {
        if name == "name" || name == PROVIDED_LABEL {
            return Err(field("labels", format!("{name:?}: is the coordinator's to set; choose another")));
        }
        check::label(name).and_then(|()| check::label_value(value)).map_err(|why| field("labels", why))?;
    }
    if shape.taints.len() > MAX_TAINTS {
        return Err(field("taints", format!("at most {MAX_TAINTS}")));
    }
    for (index, taint) in shape.taints.iter().enumerate() {
        check::label(&taint.key).map_err(|why| field(&format!("taints.{index}.key"), why))?;
        check::label_value(&taint.value).map_err(|why| field(&format!("taints.{index}.value"), why))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: &str = r#"{"cpus":8,"memory":"32 GiB","labels":{"gpu":"h100"}}"#;

    fn pool(extra: &str, provider: &str, shape: &str) -> Pool {
        let json =
            format!(r#"{{"name":"train"{extra},"provider":{{"name":"cloud"{provider},"shape":{shape}}}}}"#);
        serde_json::from_str(&json).expect(&json)
    }

    fn set(pool: &Pool, fleet: Option<&Fleet>) -> Result<(), ProviderError> {
        let programs = Programs::from([("cloud".to_owned(), "/bin/true".into())]);
        let pools = Pools::from([("default".to_owned(), Pool::named("default"))]);
        check_pool(&pools, pool, fleet, &programs)
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_field() {
        let good = |extra| pool(extra, r#","max_nodes":4"#, SHAPE);
        assert_eq!(set(&good(""), None), Ok(()));
        let selector = r#","selector":[{"label":"gpu","operator":"in","values":["h100"]},
            {"label":"name","operator":"not_in","values":["n1"]},
            {"label":"lathe.provided","operator":"exists"}]"#;
        assert_eq!(set(&good(selector), None), Ok(()));
        let shape = |from: &str, to: &str| pool("", r#","max_nodes":4"#, &SHAPE.replace(from, to));
        for (pool, field, words) in [
            (pool("", r#","max_nodes":5000"#, SHAPE), "max_nodes", "5000: 0 to 4096"),
            (pool("", r#","max_nodes":1,"min_nodes":2"#, SHAPE), "min_nodes", "at most max_nodes"),
            (pool("", r#","max_nodes":1,"timeout":"0s""#, SHAPE), "timeout", "0s: 1s to 1h"),
            (pool("", r#","max_nodes":1,"join":"2d""#, SHAPE), "join", "2d: 1s to 1d"),
            (good(r#","selector":[{"label":"zone","operator":"exists"}]"#), "shape.labels", "not the pool's"),
            (shape("\"cpus\":8", "\"cpus\":0"), "shape.cpus", "0: 1 to 4096"),
            (shape("8,", "8,\"gpus\":65,"), "shape.gpus", "65: 0 to 64"),
            (shape("32 GiB", "1 KiB"), "shape.memory", "1 MiB"),
            (shape("8,", "8,\"gpu_model\":\"a\\nb\","), "shape.gpu_model", "one line"),
            (shape("8,", "8,\"classes\":[],"), "shape.classes", "microvm"),
            (shape("8,", "8,\"classes\":[\"unikernel\"],"), "shape.classes", "microvm"),
            (shape("\"gpu\"", "\"name\""), "shape.labels", "coordinator's to set"),
            (shape("\"gpu\"", "\"lathe.provided\""), "shape.labels", "coordinator's to set"),
            (shape("\"gpu\"", "\"g u\""), "shape.labels", "characters of"),
            (shape("8,", "8,\"taints\":[{\"key\":\"\"}],"), "shape.taints.0.key", "characters of"),
        ] {
            let error = set(&pool, None).expect_err(field);
            let ProviderError::Field { field: at, reason } = error else { panic!("{error}") };
            assert_eq!(at, format!("provider.{field}"), "{reason}");
            assert!(reason.contains(words) && !reason.contains('\n'), "{reason}");
        }
    }

    #[test]
    fn a_provider_that_the_coordinator_does_not_know_is_refused() {
        let mut unknown = pool("", r#","max_nodes":4"#, SHAPE);
        unknown.provider.as_mut().expect("one").name = "/bin/sh".to_owned();
        let error = set(&unknown, None).expect_err("unknown");
        let ProviderError::Field { field, reason } = error else { panic!("{error}") };
        assert_eq!(field, "provider.name");
        assert!(reason.contains("\"/bin/sh\"") && reason.contains("(cloud)"), "{reason}");
    }

    #[test]
    fn nodes_of_a_provider_are_not_forgotten_with_it() {
        let mut fleet = Fleet::of("cloud");
        let bare = Pool::named("train");
        assert_eq!(set(&bare, Some(&fleet)), Ok(()));
        fleet.add("n1", "r1", 1);
        let error = set(&bare, Some(&fleet)).expect_err("it has a node").to_string();
        assert!(error.contains("1 nodes of provider \"cloud\""), "{error}");
        assert_eq!(set(&pool("", r#","max_nodes":4"#, SHAPE), Some(&fleet)), Ok(()));
        fleet.provider = "other".to_owned();
        assert!(set(&pool("", r#","max_nodes":4"#, SHAPE), Some(&fleet)).is_err());
    }
}
