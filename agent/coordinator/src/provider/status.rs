//! What people are told of pools' providers.

use lathe_api::TimeSpan;
use lathe_api::job::Job;
use lathe_api::pool::Pool;
use lathe_api::provider::{
    PoolProvider, ProvidedNode, ProvidedState, ProviderAsked, ProviderFailure, ProviderStatus,
};

use super::fleet::Fleet;
use super::registry::Programs;
use super::turn::provider_of;
use crate::coordinator::Coordinator;
use crate::records::{FLEETS, load};
use crate::store::StoreError;

/// How a pool stands with its provider, if it has one. Only an admin is told what went wrong, which may
/// say much of where the nodes come from, and for whose jobs nodes were asked for.
pub fn status(
    pool: &Pool,
    fleet: Option<&Fleet>,
    programs: &Programs,
    admin: bool,
    now_ms: u64,
) -> Option<ProviderStatus> {
    let provider = pool.provider.as_ref()?;
    let none = Fleet::of(&provider.name);
    let fleet = fleet.unwrap_or(&none);
    let nodes = fleet.nodes.iter().map(|(name, node)| ProvidedNode {
        name: name.clone(),
        state: node.state,
        since_ms: node.since_ms,
        request: node.request.clone(),
    });
    let asked = fleet.asked.as_ref().map(|asked| ProviderAsked {
        why: if admin { asked.why.clone() } else { String::new() },
        ..asked.clone()
    });
    Some(ProviderStatus {
        nodes: nodes.collect(),
        asked,
        failure: fleet.failure.as_ref().map(|failure| ProviderFailure {
            reason: admin.then(|| failure.reason.clone()),
            times: failure.times,
            at_ms: failure.at_ms,
            again_ms: failure.again_ms,
        }),
        cooldown_until_ms: fleet.cooldown_until_ms(provider.cooldown.milliseconds(), now_ms),
        problem: (!programs.contains_key(&provider.name)).then(|| unknown(&provider.name)),
    })
}

fn unknown(provider: &str) -> String {
    format!("the coordinator was started without --provider {provider}=PATH: nothing is asked for")
}

/// What a job that waits is told of its pool's provider; none if there is none.
///
/// # Errors
/// When the store fails.
pub async fn told(coordinator: &Coordinator, job: &Job, now_ms: u64) -> Result<Option<String>, StoreError> {
    let found = coordinator.view.read(|contents| {
        let pool = provider_of(contents, &job.spec.pool)?;
        Some(contents.pools.get(&pool)?.value.clone())
    });
    let Some(pool) = found else { return Ok(None) };
    let Some(provider) = &pool.provider else { return Ok(None) };
    if !coordinator.options.providers.contains_key(&provider.name) {
        return Ok(Some(unknown(&provider.name)));
    }
    let fleet = load::<Fleet>(&*coordinator.store, &format!("{FLEETS}{}", pool.name)).await?;
    let fleet = fleet.map(|fleet| fleet.value).unwrap_or_default();
    let helped = coordinator.helped.of(&pool.name, &job.id);
    Ok(Some(line(&pool.name, provider, &fleet, helped, now_ms)))
}

/// One line for a job that waits; `helped` is whether the planner said that more nodes would let it
/// start, if it was asked.
fn line(pool: &str, provider: &PoolProvider, fleet: &Fleet, helped: Option<bool>, now_ms: u64) -> String {
    let ago = |then_ms: u64| TimeSpan::from_seconds(now_ms.saturating_sub(then_ms) / 1000);
    let ahead = |then_ms: u64| TimeSpan::from_seconds(then_ms.saturating_sub(now_ms).div_ceil(1000));
    let nodes = |count: usize| if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
    let theirs = format!("pool {pool}'s provider");
    let again = || fleet.failure.as_ref().filter(|_| fleet.backs_off(now_ms));
    if let Some(ProviderAsked { count, at_ms, .. }) = &fleet.asked {
        let asked = format!("{theirs} was asked for {} {} ago", nodes(*count as usize), ago(*at_ms));
        return match again() {
            Some(failure) => format!("{asked} and failed; it is asked again in {}", ahead(failure.again_ms)),
            None => asked,
        };
    }
    let coming: Vec<u64> = fleet
        .nodes
        .values()
        .filter(|node| node.state == ProvidedState::Coming)
        .map(|node| node.since_ms)
        .collect();
    if let Some(since_ms) = coming.iter().min()
        && helped != Some(false)
    {
        let count = nodes(coming.len());
        return format!(
            "{count} of {theirs}, named {} ago, {} not joined yet",
            ago(*since_ms),
            have(coming.len())
        );
    }
    if let Some(failure) = again() {
        return format!(
            "{theirs} failed {} ago, the {} time in a row; it is asked again in {}",
            ago(failure.at_ms),
            ordinal(failure.times),
            ahead(failure.again_ms)
        );
    }
    if fleet.size() >= provider.max_nodes {
        return format!(
            "{theirs} is asked for no more than {}, which there are",
            nodes(provider.max_nodes as usize)
        );
    }
    if helped == Some(false) {
        return format!("no more nodes of {theirs} would let it start now");
    }
    match fleet.cooldown_until_ms(provider.cooldown.milliseconds(), now_ms) {
        Some(until_ms) => format!("{theirs} is asked again in {} at the earliest", ahead(until_ms)),
        None => format!("{theirs} is asked for nodes if they would let it start"),
    }
}

fn have(count: usize) -> &'static str {
    if count == 1 { "has" } else { "have" }
}

fn ordinal(number: u32) -> String {
    let ending = match (number % 10, number % 100) {
        (1, rest) if rest != 11 => "st",
        (2, rest) if rest != 12 => "nd",
        (3, rest) if rest != 13 => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

#[cfg(test)]
mod tests {
    use super::super::fleet::Fault;
    use super::*;

    fn provider() -> PoolProvider {
        let json = r#"{"name":"cloud","max_nodes":3,"cooldown":"1m","shape":{"cpus":8,"memory":"1 GiB"}}"#;
        serde_json::from_str(json).expect("a provider")
    }

    fn at(fleet: &Fleet, helped: Option<bool>, now_ms: u64) -> String {
        line("train", &provider(), fleet, helped, now_ms)
    }

    #[test]
    fn a_job_is_told_what_its_pools_provider_is_doing_about_it() {
        let mut fleet = Fleet::of("cloud");
        let rest = "pool train's provider is asked for nodes if they would let it start";
        assert_eq!(at(&fleet, None, 99_000), rest);
        assert_eq!(
            at(&fleet, Some(false), 99_000),
            "no more nodes of pool train's provider would let it start now"
        );
        fleet.ask("r1".to_owned(), 2, "why".to_owned(), 10_000);
        assert_eq!(at(&fleet, Some(true), 40_000), "pool train's provider was asked for 2 nodes 30s ago");
        fleet.fail(Fault::Grow, "secret".to_owned(), 50_000);
        assert_eq!(
            at(&fleet, Some(true), 50_100),
            "pool train's provider was asked for 2 nodes 40s ago and failed; it is asked again in 1s"
        );
        fleet.answered();
        fleet.fail(Fault::Grow, "secret".to_owned(), 60_000);
        assert_eq!(
            at(&fleet, Some(true), 61_000),
            "pool train's provider failed 1s ago, the 2nd time in a row; it is asked again in 1s"
        );
        fleet.add("n1", "r1", 61_000);
        assert_eq!(
            at(&fleet, Some(true), 70_000),
            "1 node of pool train's provider, named 9s ago, has not joined yet"
        );
        fleet.set("n1", ProvidedState::Joined, 65_000);
        assert_eq!(
            at(&fleet, Some(true), 69_500),
            "pool train's provider is asked again in 1s at the earliest"
        );
        assert_eq!(at(&fleet, Some(true), 70_000), rest);
        fleet.add("n2", "r1", 61_000);
        fleet.add("n3", "r1", 61_000);
        assert_eq!(
            at(&fleet, Some(false), 80_000),
            "pool train's provider is asked for no more than 3 nodes, which there are"
        );
        assert_eq!(ordinal(11), "11th");
    }

    #[test]
    fn only_an_admin_is_told_what_went_wrong_and_for_whom() {
        let pool = Pool { provider: Some(provider()), ..Pool::named("train") };
        let mut fleet = Fleet::of("cloud");
        fleet.ask("r1".to_owned(), 2, "for job a-ab12cd".to_owned(), 10_000);
        fleet.fail(Fault::Grow, "secret".to_owned(), 50_000);
        let programs = Programs::new();
        let text = |admin| {
            let status = status(&pool, Some(&fleet), &programs, admin, 60_000).expect("it has a provider");
            assert!(status.problem.as_ref().is_some_and(|problem| problem.contains("--provider cloud=PATH")));
            serde_json::to_string(&status).expect("JSON")
        };
        assert!(text(true).contains("secret") && text(true).contains("ab12cd"));
        assert!(!text(false).contains("secret") && !text(false).contains("ab12cd"));
        assert_eq!(status(&Pool::named("train"), None, &programs, true, 0), None);
    }
}
