//! What control tells operators: the types of the API's answers. Version 1.

use std::collections::BTreeMap;
use std::time::Duration;

use gaia_store::Digest;
use serde::{Deserialize, Serialize};

use crate::log::Event;
use crate::log::text::{coloured_line, line};
use crate::secrets::Secret;

pub use super::init::Role;
pub use super::profile::{Profile, Rate, Sampled, Samples, Trend, Work};
pub use crate::worker::conversation::Instance;
pub use gaia_init::given::Given;

/// `GET /v1/status`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The appliance's version.
    pub version: String,
    /// The kernel's.
    pub kernel: String,
    /// The device's own key, by which operators know it.
    #[serde(default)]
    pub key: String,
    /// Seconds since power-on.
    pub uptime_s: f64,
    /// The generation that serves, if one does.
    pub generation: Option<u32>,
    /// Its branes.
    pub branes: usize,
    /// The processes.
    pub roles: Vec<Role>,
    /// The workers' counters.
    pub workers: Vec<Worker>,
    /// Requests of the living workers, and of those that ended since this control was started.
    pub requests: u64,
    /// Requests that ended with their worker since this control was started.
    pub lost: u64,
    /// The machine's memory.
    pub memory: Memory,
    /// What the kernel gave the cores; none if init could not tell.
    pub cores: Option<Given>,
    /// What the last deploy failed with or warned about.
    pub words: Vec<String>,
    /// How the log gets to its collector, if it has one.
    #[serde(default)]
    pub export: Option<Export>,
}

/// The log on its way to a collector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The collector.
    pub to: String,
    /// There is a connection now.
    pub connected: bool,
    /// Lines that were sent since this control was started; one that was on its way when a connection broke may be sent again.
    pub sent: u64,
    /// Lines that were let go before they could be sent.
    pub missed: u64,
    /// Why there is no connection, or the last broke.
    pub error: Option<String>,
}

/// One worker's counters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Its core.
    pub core: usize,
    /// Its process.
    pub pid: i32,
    /// Its generation.
    pub generation: u32,
    /// Connections accepted since it started.
    pub accepted: u64,
    /// Connections open now.
    pub open: u64,
    /// Requests since it started.
    pub requests: u64,
    /// Requests without a finished answer now.
    pub inside: u64,
    /// Bytes its guests wrote to stdout and stderr.
    pub output_bytes: u64,
    /// Records that its log had no room for.
    pub dropped: u64,
}

/// Memory, in KiB, as the kernel counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// What the kernel manages: less than what the machine has, by what the kernel reserved for itself.
    pub total_kib: u64,
    /// What could be given out now.
    pub available_kib: u64,
}

/// `GET /v1/ps`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ps {
    /// The branes, in the graph's order.
    pub branes: Vec<Brane>,
    /// Instances at work.
    pub instances: Vec<Instance>,
    /// Workers that did not say in time what runs in them.
    pub silent: Vec<String>,
}

/// One brane, summed over its workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Brane {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// SHA-256 of its component.
    pub digest: String,
    /// Its route: host, if it names one, and path.
    pub route: String,
    /// Instances it may have.
    pub replicas: u32,
    /// Instances at work now.
    pub busy: u64,
    /// Instances that are ready for a request.
    pub ready: u64,
    /// Requests that wait for one.
    pub waiting: u64,
    /// Requests since its workers started.
    pub requests: u64,
    /// Traps.
    pub traps: u64,
    /// Missed deadlines.
    pub late: u64,
    /// Refused because the queue was too long.
    pub refused: u64,
    /// Ended because the host was short of memory, or held too much for it.
    pub killed: u64,
    /// Nanoseconds that its instances waited for their quota of the core.
    pub throttled_ns: u64,
    /// Mean nanoseconds from dispatch to the guest's first instruction.
    pub cold_mean_ns: u64,
}

/// One line of `GET /v1/logs`, which answers with one JSON object a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Its number: counted from 0 by each control that is started, and without gaps only if nothing is left out.
    #[serde(default)]
    pub seq: u64,
    /// Nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The core of the worker; none, if it is a keeper's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core: Option<usize>,
    /// Whose it is; the runtime's own if it is nobody's.
    pub brane: Option<String>,
    /// `brane.NNN`, if one was at work.
    pub instance: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub event: Event<'static>,
}

impl Line {
    /// How a person reads it.
    #[must_use]
    pub fn text(&self) -> String {
        line(Duration::from_nanos(self.time_ns), self.whose(), &self.event)
    }

    /// The same, for a terminal with colours.
    #[must_use]
    pub fn coloured_text(&self) -> String {
        coloured_line(Duration::from_nanos(self.time_ns), self.whose(), &self.event)
    }

    /// The instance, or the brane, or the runtime.
    #[must_use]
    pub fn whose(&self) -> &str {
        self.instance.as_deref().or(self.brane.as_deref()).unwrap_or("gaia")
    }
}

/// The answer to a request that changes something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// What will happen.
    pub done: String,
}

/// The answer to a request that could not be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Why, and what to do.
    pub error: String,
}

/// `POST /v1/plan` and `POST /v1/deploy`: a graph that is to serve.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// The manifest's text.
    pub manifest: String,
    /// How its file is called where something is said about it.
    pub file: String,
    /// Components in the store that the manifest's `file:` images are, by what it calls them.
    #[serde(default)]
    pub images: BTreeMap<String, Digest>,
    /// The plan that was agreed to; any, if not said.
    #[serde(default)]
    pub plan: Option<String>,
    /// It may end the states of pinned instances.
    #[serde(default)]
    pub ends_states: bool,
}

/// `POST /v1/rollback`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// It may end the states of pinned instances.
    #[serde(default)]
    pub ends_states: bool,
}

/// One line of the answer to what takes a while. The last is none of the first kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// What is being done.
    Doing(String),
    /// What would change.
    Plan(Box<PlanReport>),
    /// It is done.
    Done(Deployed),
    /// A secret is set or removed.
    Secret(SecretChanged),
    /// It is not, and nothing has changed; why, and what to do.
    Failed(String),
    /// It is not, and would be if it were asked for in another way or at another time.
    Unchanged {
        /// What stands in the way.
        reason: Reason,
        /// As a person reads it.
        error: String,
    },
}

/// What stands in the way of a change that is right in itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It has to be agreed to.
    NotAgreed,
    /// What would change is not what was shown.
    NotShown,
    /// Somebody else is changing what serves.
    Busy,
    /// One that a later version knows.
    #[serde(other)]
    Other,
}

/// What a deploy or a way back has come to: the whole answer of `gaia deploy --json` and `gaia rollback --json`, and a
/// [`Step::Done`] of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployed {
    /// The graph's number in the history.
    pub graph: u64,
    /// The generation that serves it.
    pub generation: u32,
    /// What changed.
    pub plan: PlanReport,
    /// From the request to the moment from which on nothing else serves, in ms.
    pub millis: u64,
}

/// What a deploy would change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanReport {
    /// Stands for this plan and for what serves now: a deploy that names it is refused if either has become another.
    pub id: String,
    /// The graph that serves, by its number in the history; none, if it is none of that.
    pub against: Option<u64>,
    /// The branes, those that are removed last.
    pub branes: Vec<BraneChange>,
    /// The states of pinned instances that it would end, and why.
    pub ends: Vec<String>,
    /// What workers can do towards the outside.
    pub sandbox: String,
    /// What they can do before.
    pub sandbox_before: Option<String>,
    /// What all instances together may have of memory, in bytes. It is taken when it is touched.
    pub declared: u64,
    /// The memory that the machine has, in bytes.
    pub memory: u64,
    /// What else is to be said, as a person reads it.
    pub warnings: Vec<String>,
    /// Components that had to be compiled for it: by this request; in what `gaia deploy` shows of a deploy, by the plan before it, too.
    pub compiled: usize,
    /// What planning took, compiling included, in µs; of the same.
    pub micros: u64,
}

/// What becomes of one brane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BraneChange {
    /// Its name.
    pub name: String,
    /// What becomes of it.
    pub change: Change,
    /// Its image.
    pub image: String,
    /// SHA-256 of its component, in hexadecimal.
    pub digest: String,
    /// What that was before, if it was another.
    pub digest_before: Option<String>,
    /// What it is granted now and was not, or the other way round; what widens first.
    pub grants: Vec<GrantChange>,
    /// What else is another.
    pub others: Vec<String>,
}

/// What becomes of a brane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It is new.
    Added,
    /// Something about it is another.
    Changed,
    /// It is gone.
    Removed,
    /// Nothing.
    Same,
}

/// A grant, or a part of one, that was not there before or is not there any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantChange {
    /// As a person reads it.
    pub text: String,
    /// Of what is granted now, whether that is more than before; none for what is not granted any more.
    pub widens: Option<bool>,
}

/// `POST /v1/components`: a component that is in the store now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pushed {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: u64,
    /// The name that stands for it.
    pub name: Option<String>,
}

/// `GET /v1/graphs`: the history, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graphs {
    /// Those that are kept.
    pub graphs: Vec<GraphEntry>,
}

/// A graph of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphEntry {
    /// Its number.
    pub number: u64,
    /// It is the one that serves, or is to.
    pub current: bool,
    /// A way back from it leads there.
    pub previous: Option<u64>,
    /// The manifest's file.
    pub file: String,
    /// Who deployed it.
    pub by: String,
    /// When, in ns since 1970.
    pub at_ns: u64,
    /// What became of it, if that is to be told.
    pub outcome: Option<String>,
    /// Its images and their digests.
    pub images: BTreeMap<String, Digest>,
}

/// `POST /v1/secrets`: a value that a brane is to be given. Nothing answers with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetSecret {
    /// The brane; it need not be there yet.
    pub brane: String,
    /// The name of the variable.
    pub name: String,
    /// The value.
    pub value: Secret,
    /// It may end the states of pinned instances.
    #[serde(default)]
    pub ends_states: bool,
}

/// `POST /v1/secrets/remove`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveSecret {
    /// The brane.
    pub brane: String,
    /// The name of the variable.
    pub name: String,
    /// The graph that serves may go on without it.
    #[serde(default)]
    pub force: bool,
    /// It may end the states of pinned instances.
    #[serde(default)]
    pub ends_states: bool,
}

/// What became of a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretChanged {
    /// The brane.
    pub brane: String,
    /// The name of the variable.
    pub name: String,
    /// It is gone.
    pub removed: bool,
    /// There was another before.
    pub replaced: bool,
    /// The generation that serves with the change; none, if nothing that serves uses it.
    pub generation: Option<u32>,
    /// A file that `gaia run` was told has another, which is what is given as long as that runs.
    pub of_file: bool,
    /// From the request to the moment from which on nothing else serves, in ms.
    pub millis: u64,
}

/// `GET /v1/secrets`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    /// By brane and name.
    pub secrets: Vec<SecretEntry>,
}

/// A secret without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretEntry {
    /// The brane.
    pub brane: String,
    /// The name of the variable.
    pub name: String,
    /// Who set it.
    pub by: Option<String>,
    /// When, in ns since 1970.
    pub at_ns: Option<u64>,
    /// The graph that serves names it.
    pub used: bool,
    /// Whether there is a value, and from where.
    pub state: SecretState,
}

/// Where a secret's value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretState {
    /// The store has it.
    Set,
    /// A file that `gaia run` was told has it, whatever the store has.
    OfFile,
    /// It has none: the brane runs without.
    Unset,
}
