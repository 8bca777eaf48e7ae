//! `lathe service`: work that stays up.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use futures_util::StreamExt;
use lathe_api::client::{Client, ClientError, LogQuery};
use lathe_api::job::JobSpec;
use lathe_api::node::LogLine;
use lathe_api::service::{Exposure, Protocol, Service, ServiceState};
use tokio::sync::mpsc;

use super::job::{class_name, print_line, task_state_name};
use super::{file, why};
use crate::context::Connection;
use crate::exit::Exit;
use crate::output::{self, Format};

/// How often a follower looks for new replicas.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(2);

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a service and return: a job file with a [service] table.
    Run {
        /// The service, TOML (`.toml`) or JSON.
        file: PathBuf,
        /// Submit nothing: say where a replica would go now, or what it would wait for and until when.
        #[arg(long)]
        plan: bool,
    },
    /// List the services, newest first.
    List,
    /// Everything about one service: its replicas, what is in flight, what was decided and why.
    #[command(visible_alias = "why")]
    Show {
        /// The service's ID.
        id: String,
    },
    /// The output of a service's replicas.
    Logs {
        /// The service's ID.
        id: String,
        /// Go on until the service ends.
        #[arg(short, long)]
        follow: bool,
    },
    /// Stop a service and its replicas: SIGTERM, their grace period, SIGKILL.
    Cancel {
        /// The service's ID.
        id: String,
    },
}

/// Runs a subcommand.
///
/// # Errors
/// When the file is wrong, or what the coordinator said.
pub async fn run(command: Command, connection: &Connection, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::Run { file, plan } => {
            // The file first: a mistake in it should not need a cluster to be found.
            let spec: JobSpec = file::read(&file)?;
            let client = connection.client()?;
            if plan {
                return why::plan(&client, &spec, format).await;
            }
            let service = client.submit_service(&spec).await?;
            print(&service, format, |service| println!("{}", started(service)))
        }
        Command::List => {
            let mut services = connection.client()?.services().await?;
            services.sort_by_key(|service| std::cmp::Reverse(service.submitted_ms));
            match format {
                Format::Json => output::json(&services)?,
                Format::Table => list(&services),
            }
            Ok(Exit::Success)
        }
        Command::Show { id } => print(&connection.client()?.service(&id).await?, format, show),
        Command::Logs { id, follow } => logs(&connection.client()?, &id, follow, format).await,
        Command::Cancel { id } => {
            let service = connection.client()?.cancel_service(&id).await?;
            print(&service, format, |service| println!("{} {}", service.id, state_name(service.state)))
        }
    }
}

fn print(service: &Service, format: Format, table: impl Fn(&Service)) -> anyhow::Result<Exit> {
    match format {
        Format::Json => output::json(service)?,
        Format::Table => table(service),
    }
    Ok(Exit::Success)
}

fn state_name(state: ServiceState) -> &'static str {
    match state {
        ServiceState::Active => "active",
        ServiceState::Cancelling => "cancelling",
        ServiceState::Cancelled => "cancelled",
    }
}

fn started(service: &Service) -> String {
    format!("{}: {}", service.id, listens(service))
}

/// Where requests are taken.
fn listens(service: &Service) -> String {
    let spec = service.spec.service.as_ref();
    let protocol = match spec.map(|spec| spec.protocol) {
        Some(Protocol::Tcp) => "tcp",
        _ => "http",
    };
    let address = match spec.map(|spec| spec.expose) {
        Some(Exposure::Loopback) => "127.0.0.1 on each node",
        _ => "the address of each node",
    };
    format!("{protocol} at port {} of {address} in pool {}", service.listen, service.spec.pool)
}

fn list(services: &[Service]) {
    let mut table = output::table(&[
        "ID",
        "STATE",
        "POOL",
        "CLASS",
        "READY",
        "WANTED",
        "RANGE",
        "IN FLIGHT",
        "PORT",
        "AGE",
        "WHY",
    ]);
    for service in services {
        let range = service.spec.service.as_ref().map(|spec| format!("{}-{}", spec.min, spec.max));
        table.add_row([
            service.id.clone(),
            state_name(service.state).to_owned(),
            service.spec.pool.clone(),
            class_name(service.spec.class).to_owned(),
            service.ready.to_string(),
            service.wanted.to_string(),
            range.unwrap_or_default(),
            service.in_flight.to_string(),
            service.listen.to_string(),
            output::age(service.submitted_ms),
            service.why.clone().unwrap_or_default(),
        ]);
    }
    println!("{table}");
}

fn show(service: &Service) {
    println!("id         {}", service.id);
    println!("state      {}", state_name(service.state));
    println!("tenant     {}", service.tenant);
    println!("listens    {}", listens(service));
    let why = service.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    println!("replicas   {} ready, {} wanted{why}", service.ready, service.wanted);
    if let Some(spec) = &service.spec.service {
        println!("bounds     {} to {}, {} in flight at each", spec.min, spec.max, spec.target_in_flight);
    }
    let (waiting, away) = (service.waiting, service.turned_away);
    println!("in flight  {}, {waiting} of them wait; {away} turned away", service.in_flight);
    for problem in &service.problems {
        println!("problem    {problem}");
    }
    println!("image      {} {}", service.spec.image, service.image_digest);
    println!("submitted  {} ago", output::age(service.submitted_ms));
    let now_ms = output::now_ms();
    for decision in &service.decisions {
        println!("{}", why::decided(decision, now_ms));
    }
    let mut table =
        output::table(&["REPLICA", "NODE", "ADDRESS", "STATE", "READY", "IN FLIGHT", "STARTS", "REASON"]);
    for replica in &service.replicas {
        let ready = match (replica.draining, replica.ready) {
            (true, _) => "draining",
            (false, true) => "yes",
            (false, false) => "no",
        };
        table.add_row([
            replica.job.clone(),
            replica.node.clone().unwrap_or_default(),
            replica.address.clone().unwrap_or_default(),
            task_state_name(replica.state).to_owned(),
            ready.to_owned(),
            replica.in_flight.to_string(),
            replica.attempt.to_string(),
            replica.reason.clone().unwrap_or_default(),
        ]);
    }
    println!("{table}");
}

/// Prints what replicas say, each line after the replica's ID. Those that have ended are jobs by then.
async fn logs(client: &Client, id: &str, follow: bool, format: Format) -> anyhow::Result<Exit> {
    let (sender, mut lines) = mpsc::channel(256);
    let (client, id) = (client.clone(), id.to_owned());
    // The first answer decides whether there is such a service at all.
    client.service(&id).await?;
    let reading = tokio::spawn(async move { read_all(&client, &id, follow, sender).await });
    while let Some((replica, line)) = lines.recv().await {
        let line: LogLine = line;
        match format {
            Format::Json => println!("{}", serde_json::to_string(&line)?),
            Format::Table => print_line(&line, Some(&replica), false),
        }
    }
    reading.await??;
    Ok(Exit::Success)
}

/// Reads every replica's output in a task of its own, also of those that come later, until the service
/// has ended or nobody reads.
async fn read_all(
    client: &Client,
    id: &str,
    follow: bool,
    sender: mpsc::Sender<(String, LogLine)>,
) -> Result<(), ClientError> {
    let mut known = BTreeMap::new();
    loop {
        let service = client.service(id).await?;
        for replica in service.replicas {
            known.entry(replica.job.clone()).or_insert_with(|| {
                tokio::spawn(read_one(client.clone(), replica.job, follow, sender.clone()))
            });
        }
        if !follow || service.state == ServiceState::Cancelled || sender.is_closed() {
            break;
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
    for (_, reading) in known {
        // A replica that ends in between is no error of the others.
        let _ = reading.await;
    }
    Ok(())
}

async fn read_one(client: Client, job: String, follow: bool, sender: mpsc::Sender<(String, LogLine)>) {
    let query = LogQuery { follow, ..LogQuery::default() };
    let Ok(mut stream) = client.job_logs(&job, query).await else { return };
    while let Some(Ok(line)) = stream.next().await {
        if sender.send((job.clone(), line)).await.is_err() {
            return;
        }
    }
}
