//! What control tells operators: the types of the API's answers. Version 1.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::log::Event;
use crate::log::text::line;

pub use super::init::Role;
pub use crate::worker::conversation::Instance;

/// `GET /v1/status`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The appliance's version.
    pub version: String,
    /// The kernel's.
    pub kernel: String,
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
    /// What the last deploy failed with or warned about.
    pub words: Vec<String>,
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
        let whose = self.instance.as_deref().or(self.brane.as_deref()).unwrap_or("gaia");
        line(Duration::from_nanos(self.time_ns), whose, &self.event)
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
