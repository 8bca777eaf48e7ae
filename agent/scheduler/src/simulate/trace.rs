//! Traces of clusters, as CSV text: what kind of list it is, is told by its header.
//!
//! | list | columns |
//! | --- | --- |
//! | nodes | `sn,cpu_milli,memory_mib,gpu,model` |
//! | pods | `name,cpu_milli,memory_mib,num_gpu,gpu_milli`, and if wanted `gpu_spec` (models between `\|`), `creation_time`, `scheduled_time`, `deletion_time` (seconds) |
//! | jobs | `job,arrival_s,duration_s,gpus`, and if wanted `model` (jobs of one model run similarly long), `tenant`, `priority`, `estimate_s`, `min_gpus` |
//!
//! The first two are those of Alibaba's `cluster-trace-gpu-v2023`. Columns may be in any order, and
//! others may be there.

use std::collections::HashSet;

use csv::{ReaderBuilder, StringRecord, Trim};
use lathe_api::job::IsolationClass;

use crate::model::{Amount, Gang, Gpu, GpuRequest, Node, Scope, Share, Sharing, Size, TaskRequest};

/// Most GPUs of a node: a place names one by a byte, and sets of them are words.
const NODE_GPUS: u32 = 64;

/// Most GPUs of a job.
const JOB_GPUS: u32 = 1 << 20;

/// Latest time that a trace may name, seconds: a thousand years, far from where sums overflow.
const LATEST_S: f64 = 3.2e10;

/// Tasks on a node of a trace: bounded by what they take, not by addresses.
const NODE_TASKS: u32 = 1 << 20;

/// Why a list cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// It is none of the lists.
    #[error("{file}: columns {found:?} are not those of {wanted}")]
    Header {
        /// The file.
        file: String,
        /// Its header.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A column is missing.
    #[error("{file}: there is no column {column}; the header has {found:?}")]
    Column {
        /// The file.
        file: String,
        /// The column.
        column: &'static str,
        /// The header.
        found: String,
    },
    /// It has a header only.
    #[error("{file}: there is nothing below the header")]
    Empty {
        /// The file.
        file: String,
    },
    /// It is not CSV.
    #[error("{file}: line {line}: {problem}")]
    Csv {
        /// The file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// What is wrong.
        problem: String,
    },
    /// A value cannot be.
    #[error("{file}: line {line}: {field} {value:?}: {fix}")]
    Value {
        /// The file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// The column.
        field: &'static str,
        /// What is there.
        value: String,
        /// What should be.
        fix: String,
    },
}

/// A list of work.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Pods: one task each.
    Pods(Vec<Pod>),
    /// Jobs: gangs that run for a known time.
    Jobs(Vec<TraceJob>),
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// What it asks for.
    pub gang: Gang,
    /// When it came and how long it ran, milliseconds, where the list says so.
    pub lifetime_ms: Option<(u64, u64)>,
}

/// One job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceJob {
    /// Unique.
    pub id: String,
    /// Whose; empty where the list does not say.
    pub tenant: String,
    /// Jobs of one kind run similarly long.
    pub kind: String,
    /// When it came, milliseconds.
    pub arrival_ms: u64,
    /// How long it runs on all its GPUs, milliseconds, at least 1.
    pub duration_ms: u64,
    /// GPUs, at least 1.
    pub gpus: u32,
    /// GPUs that it can do with.
    pub min_gpus: u32,
    /// Higher goes first where the policy looks at it.
    pub priority: i32,
    /// What its owner says of how long it will run, milliseconds.
    pub estimate_ms: Option<u64>,
}

/// Reads a list of nodes.
///
/// # Errors
/// When it is something else or has a wrong value; the first is named.
pub fn nodes(file: &str, bytes: &[u8]) -> Result<Vec<Node>, TraceError> {
    let mut table = Table::new(file, bytes)?;
    if !table.has("sn") {
        return Err(table.wrong("a node list: sn,cpu_milli,memory_mib,gpu,model"));
    }
    let columns = Columns::of(["sn", "cpu_milli", "memory_mib", "gpu", "model"], &table)?;
    table.rows(|row| {
        let gpus = row.number(columns.at(3), 0, NODE_GPUS.into())?;
        let model = row.text(columns.at(4));
        Ok(node(
            row.unique(columns.at(0))?,
            Amount {
                cpu_milli: row.number(columns.at(1), 0, u64::MAX >> 20)?,
                memory_bytes: row.number(columns.at(2), 0, u64::MAX >> 40)? << 20,
                ..Amount::default()
            },
            u32::try_from(gpus).unwrap_or(NODE_GPUS),
            model,
        ))
    })
}

/// A node as traces have them: GPUs that can be shared freely, and nothing known of where it stands.
pub fn node(name: String, amount: Amount, gpus: u32, model: &str) -> Node {
    let gpu = |index: u32| Gpu {
        id: index.to_string(),
        model: model.to_owned(),
        memory_bytes: 0,
        numa: None,
        switch: None,
        link: None,
        partition: None,
        sharing: Sharing::Milli,
    };
    Node {
        name,
        total: Amount { sandboxes: NODE_TASKS, ..amount },
        gpus: (0..gpus).map(gpu).collect(),
        classes: vec![IsolationClass::Container],
        ..Node::default()
    }
}

/// Reads a list of pods or of jobs.
///
/// # Errors
/// When it is something else or has a wrong value; the first is named.
pub fn work(file: &str, bytes: &[u8]) -> Result<Work, TraceError> {
    let mut table = Table::new(file, bytes)?;
    if table.has("num_gpu") {
        pods(&mut table).map(Work::Pods)
    } else if table.has("arrival_s") {
        jobs(&mut table).map(Work::Jobs)
    } else {
        Err(table.wrong(
            "a pod list (name,cpu_milli,memory_mib,num_gpu,gpu_milli) or a job list \
             (job,arrival_s,duration_s,gpus)",
        ))
    }
}

fn pods(table: &mut Table<'_>) -> Result<Vec<Pod>, TraceError> {
    let columns = Columns::of(["name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli"], table)?;
    let models = table.column("gpu_spec");
    let created = table.column("creation_time");
    let scheduled = table.column("scheduled_time");
    let deleted = table.column("deletion_time");
    table.rows(|row| {
        let id = row.unique(columns.at(0))?;
        let amount = Amount {
            cpu_milli: row.number(columns.at(1), 0, u64::MAX >> 20)?,
            memory_bytes: row.number(columns.at(2), 0, u64::MAX >> 40)? << 20,
            hugepage_bytes: 0,
            sandboxes: 1,
        };
        let count = row.number(columns.at(3), 0, NODE_GPUS.into())?;
        let gpus = match count {
            0 => None,
            count => Some(GpuRequest {
                share: share(row, columns.at(4), count)?,
                models: models
                    .map(|at| row.text(at).split('|').filter(|model| !model.is_empty()).map(str::to_owned))
                    .into_iter()
                    .flatten()
                    .collect(),
                ..GpuRequest::whole(u32::try_from(count).unwrap_or(NODE_GPUS))
            }),
        };
        let time = |row: &Row<'_>, column: Option<Column>| {
            column.filter(|&at| !row.text(at).is_empty()).map(|at| row.seconds(at)).transpose()
        };
        let (created, scheduled) = (time(row, created)?, time(row, scheduled)?);
        let lifetime_ms = time(row, deleted)?.zip(created).map(|(deleted, created)| {
            (created, deleted.saturating_sub(scheduled.unwrap_or(created).max(created)).max(1))
        });
        let submitted_ms = created.unwrap_or(0);
        let task = TaskRequest { amount, gpus };
        Ok(Pod { gang: Gang { id, task, submitted_ms, ..Gang::default() }, lifetime_ms })
    })
}

fn share(row: &Row<'_>, column: Column, count: u64) -> Result<Share, TraceError> {
    let milli = row.number(column, 1, 1000)?;
    match (milli, count) {
        (1000, _) => Ok(Share::Whole),
        (milli, 1) => Ok(Share::Milli(u16::try_from(milli).unwrap_or(1000))),
        _ => Err(row.bad(column, "only one GPU can be shared: write 1000, or num_gpu 1")),
    }
}

fn jobs(table: &mut Table<'_>) -> Result<Vec<TraceJob>, TraceError> {
    let columns = Columns::of(["job", "arrival_s", "duration_s", "gpus"], table)?;
    let kind = table.column("model");
    let tenant = table.column("tenant");
    let priority = table.column("priority");
    let estimate = table.column("estimate_s");
    let least = table.column("min_gpus");
    table.rows(|row| {
        let id = row.unique(columns.at(0))?;
        let words = |column: Option<Column>| column.map_or("", |at| row.text(at)).to_owned();
        let given = |column: Option<Column>| column.filter(|&at| !row.text(at).is_empty());
        let duration_ms = row.seconds(columns.at(2))?;
        if duration_ms == 0 {
            return Err(row.bad(columns.at(2), "write at least 0.001"));
        }
        let gpus = row.number(columns.at(3), 1, JOB_GPUS.into())?;
        let min_gpus = given(least).map_or(Ok(gpus), |at| row.number(at, 1, gpus))?;
        let number = |at| row.text(at).parse::<i32>().map_err(|_| row.bad(at, "write a whole number"));
        Ok(TraceJob {
            id,
            tenant: words(tenant),
            kind: words(kind),
            arrival_ms: row.seconds(columns.at(1))?,
            duration_ms,
            gpus: u32::try_from(gpus).unwrap_or(JOB_GPUS),
            min_gpus: u32::try_from(min_gpus).unwrap_or(JOB_GPUS),
            priority: given(priority).map_or(Ok(0), number)?,
            estimate_ms: given(estimate).map(|at| row.seconds(at)).transpose()?,
        })
    })
}

impl Pod {
    /// GPUs that it asks for; a part of one for a share.
    pub fn gpus(&self) -> f64 {
        self.gang.task.gpus.as_ref().map_or(0.0, |gpus| match gpus.share {
            Share::Milli(milli) => f64::from(milli) / 1000.0,
            Share::Whole | Share::Profile(_) => f64::from(gpus.count),
        })
    }
}

impl TraceJob {
    /// The gang on nodes of `per_node` GPUs: on one node if it fits there, else in equal tasks, as
    /// large as divide it and fit a node.
    pub fn gang(&self, per_node: u32) -> Gang {
        let per_node = per_node.max(1);
        let (each, scope) = if self.gpus <= per_node && self.min_gpus == self.gpus {
            (self.gpus, Scope::Node)
        } else {
            let divides = |size: &u32| self.gpus.is_multiple_of(*size) && self.min_gpus.is_multiple_of(*size);
            ((1..=per_node).rev().find(divides).unwrap_or(1), Scope::Any)
        };
        Gang {
            id: self.id.clone(),
            tenant: self.tenant.clone(),
            kind: self.kind.clone(),
            tasks: Size { min: self.min_gpus / each, max: self.gpus / each },
            task: TaskRequest {
                amount: Amount { sandboxes: 1, ..Amount::default() },
                gpus: Some(GpuRequest::whole(each)),
            },
            scope,
            priority: self.priority,
            submitted_ms: self.arrival_ms,
            estimate_ms: self.estimate_ms,
            ..Gang::default()
        }
    }
}

/// Rows below a header.
struct Table<'a> {
    file: &'a str,
    header: StringRecord,
    reader: csv::Reader<&'a [u8]>,
}

/// A column: where it is, and its name.
#[derive(Clone, Copy)]
struct Column {
    at: usize,
    name: &'static str,
}

/// The columns that a list must have.
struct Columns<const N: usize>([Column; N]);

impl<const N: usize> Columns<N> {
    fn of(names: [&'static str; N], table: &Table<'_>) -> Result<Self, TraceError> {
        let mut columns = names.map(|name| Column { at: 0, name });
        for column in &mut columns {
            *column = table.column(column.name).ok_or_else(|| TraceError::Column {
                file: table.file.to_owned(),
                column: column.name,
                found: table.found(),
            })?;
        }
        Ok(Self(columns))
    }

    fn at(&self, index: usize) -> Column {
        self.0[index]
    }
}

impl<'a> Table<'a> {
    fn new(file: &'a str, bytes: &'a [u8]) -> Result<Self, TraceError> {
        let mut reader = ReaderBuilder::new().trim(Trim::All).from_reader(bytes);
        let header = reader.headers().map_err(|error| csv_error(file, &error))?.clone();
        Ok(Self { file, header, reader })
    }

    fn has(&self, name: &str) -> bool {
        self.header.iter().any(|column| column == name)
    }

    fn column(&self, name: &'static str) -> Option<Column> {
        self.header.iter().position(|column| column == name).map(|at| Column { at, name })
    }

    fn found(&self) -> String {
        short(&self.header.iter().collect::<Vec<_>>().join(","))
    }

    fn wrong(&self, wanted: &'static str) -> TraceError {
        TraceError::Header { file: self.file.to_owned(), found: self.found(), wanted }
    }

    fn rows<T>(
        &mut self,
        mut read: impl FnMut(&mut Row<'_>) -> Result<T, TraceError>,
    ) -> Result<Vec<T>, TraceError> {
        let mut names = HashSet::new();
        let mut rows = Vec::new();
        for record in self.reader.records() {
            let record = record.map_err(|error| csv_error(self.file, &error))?;
            let line = record.position().map_or(0, csv::Position::line);
            rows.push(read(&mut Row { file: self.file, line, record: &record, names: &mut names })?);
        }
        if rows.is_empty() { Err(TraceError::Empty { file: self.file.to_owned() }) } else { Ok(rows) }
    }
}

/// One row.
struct Row<'a> {
    file: &'a str,
    line: u64,
    record: &'a StringRecord,
    names: &'a mut HashSet<String>,
}

impl<'a> Row<'a> {
    fn text(&self, column: Column) -> &'a str {
        self.record.get(column.at).unwrap_or_default()
    }

    fn bad(&self, column: Column, fix: impl Into<String>) -> TraceError {
        TraceError::Value {
            file: self.file.to_owned(),
            line: self.line,
            field: column.name,
            value: short(self.text(column)),
            fix: fix.into(),
        }
    }

    /// A name that no row before has.
    fn unique(&mut self, column: Column) -> Result<String, TraceError> {
        let name = self.text(column).to_owned();
        if name.is_empty() {
            return Err(self.bad(column, "write a name"));
        }
        if !self.names.insert(name.clone()) {
            return Err(self.bad(column, "an earlier line has this name; names are unique"));
        }
        Ok(name)
    }

    fn number(&self, column: Column, least: u64, most: u64) -> Result<u64, TraceError> {
        let number = self.text(column).parse::<u64>().ok();
        number
            .filter(|number| (least..=most).contains(number))
            .ok_or_else(|| self.bad(column, format!("write a whole number from {least} to {most}")))
    }

    /// Seconds, as milliseconds.
    fn seconds(&self, column: Column) -> Result<u64, TraceError> {
        let seconds = self.text(column).parse::<f64>().ok();
        seconds
            .filter(|seconds| (0.0..=LATEST_S).contains(seconds))
            .map(|seconds| (seconds * 1000.0).round() as u64)
            .ok_or_else(|| self.bad(column, format!("write seconds from 0 to {LATEST_S:.0}")))
    }
}

fn csv_error(file: &str, error: &csv::Error) -> TraceError {
    let line = error.position().map_or(1, csv::Position::line);
    let problem = match error.kind() {
        csv::ErrorKind::Utf8 { .. } => "not UTF-8".to_owned(),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("{len} fields, where the header has {expected_len}")
        }
        _ => error.to_string(),
    };
    TraceError::Csv { file: file.to_owned(), line, problem }
}

/// At most 60 characters of it: lines of messages stay lines.
fn short(text: &str) -> String {
    match text.char_indices().nth(60) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: &str =
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,creation_time,deletion_time,scheduled_time\n";

    fn first_pod(row: &str) -> Result<Pod, String> {
        match work("p.csv", format!("{PODS}{row}\n").as_bytes()) {
            Ok(Work::Pods(pods)) => Ok(pods[0].clone()),
            Ok(Work::Jobs(_)) => Err("jobs".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn first_job(header: &str, row: &str) -> Result<TraceJob, String> {
        match work("j.csv", format!("{header}\n{row}\n").as_bytes()) {
            Ok(Work::Jobs(jobs)) => Ok(jobs[0].clone()),
            Ok(Work::Pods(_)) => Err("pods".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn nodes_have_what_their_line_says() {
        let list = "sn,cpu_milli,memory_mib,gpu,model\nn1,64000,262144,2,P100\nn2,32000,1,0,\n";
        let nodes = nodes("n.csv", list.as_bytes()).unwrap();
        assert_eq!((nodes.len(), nodes[0].gpus.len(), nodes[1].gpus.len()), (2, 2, 0));
        assert_eq!((nodes[0].total.cpu_milli, nodes[0].total.memory_bytes), (64_000, 262_144 << 20));
        assert_eq!(nodes[0].gpus[1].model, "P100");
    }

    #[test]
    fn pods_ask_for_shares_models_and_times() {
        let pod = first_pod("a,6000,12288,1,460,T4|P100,100,350,120").unwrap();
        let gpus = pod.gang.task.gpus.unwrap();
        assert_eq!((gpus.count, gpus.share, gpus.models.len()), (1, Share::Milli(460), 2));
        assert_eq!(pod.lifetime_ms, Some((100_000, 230_000)), "it runs from when it was scheduled");
        let pod = first_pod("a,6000,12288,4,1000,,100,350,").unwrap();
        assert_eq!(pod.gang.task.gpus, Some(GpuRequest::whole(4)));
        assert_eq!(pod.lifetime_ms, Some((100_000, 250_000)));
        assert_eq!(first_pod("a,6000,12288,0,0,,,,").unwrap().lifetime_ms, None);
    }

    #[test]
    fn a_gang_larger_than_a_node_is_cut_into_nodes() {
        let header = "job,arrival_s,duration_s,gpus,model";
        let gang = |gpus: u32, per_node| {
            let gang = first_job(header, &format!("1,0.5,2,{gpus},x")).unwrap().gang(per_node);
            (gang.tasks.max, gang.task.gpu_count(), gang.scope)
        };
        assert_eq!(gang(8, 8), (1, 8, Scope::Node));
        assert_eq!(gang(24, 8), (3, 8, Scope::Any));
        assert_eq!(gang(12, 8), (2, 6, Scope::Any));
        assert_eq!(gang(8, 4), (2, 4, Scope::Any));
        let elastic = first_job("job,arrival_s,duration_s,gpus,min_gpus", "1,0,1,16,8").unwrap().gang(8);
        assert_eq!((elastic.tasks, elastic.task.gpu_count()), (Size { min: 1, max: 2 }, 8));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_and_the_fix() {
        let header = "job,arrival_s,duration_s,gpus";
        let cases = [
            (
                first_job(header, "1,x,2,1").unwrap_err(),
                "j.csv: line 2: arrival_s \"x\": write seconds from 0 to 32000000000",
            ),
            (
                first_job(header, "1,0,NaN,1").unwrap_err(),
                "j.csv: line 2: duration_s \"NaN\": write seconds from 0 to 32000000000",
            ),
            (
                first_job(header, "1,0,0,1").unwrap_err(),
                "j.csv: line 2: duration_s \"0\": write at least 0.001",
            ),
            (
                first_job(header, "1,0,1,0").unwrap_err(),
                "j.csv: line 2: gpus \"0\": write a whole number from 1 to 1048576",
            ),
            (first_job(header, "1,0,1").unwrap_err(), "j.csv: line 2: 3 fields, where the header has 4"),
            (first_job(header, ",0,1,1").unwrap_err(), "j.csv: line 2: job \"\": write a name"),
            (
                first_job("job,arrival_s,gpus", "1,0,1").unwrap_err(),
                "j.csv: there is no column duration_s; the header has \"job,arrival_s,gpus\"",
            ),
            (
                first_pod("a,1,1,2,500,,,,").map(|_| ()).unwrap_err(),
                "p.csv: line 2: gpu_milli \"500\": only one GPU can be shared: write 1000, or num_gpu 1",
            ),
        ];
        for (said, wanted) in cases {
            assert_eq!(said, wanted);
        }
        let twice = work("j.csv", b"job,arrival_s,duration_s,gpus\n1,0,1,1\n1,0,1,1\n").unwrap_err();
        assert!(twice.to_string().starts_with("j.csv: line 3: job \"1\": an earlier line"), "{twice}");
        let other = nodes("n.csv", b"a,b\n1,2\n").unwrap_err().to_string();
        assert!(other.contains("\"a,b\" are not those of a node list"), "{other}");
        assert!(
            work("e.csv", b"job,arrival_s,duration_s,gpus\n")
                .unwrap_err()
                .to_string()
                .contains("nothing below")
        );
    }
}
