//! What control tells the workers of a generation: one JSON file beside the artefacts. Written by control, read once
//! by each worker before it is sealed. A keeper has one of its own, with its brane alone.

use std::collections::BTreeMap;
use std::time::Duration;

use gaia_init::sandbox::worker::Reach;
use gaia_manifest::{Capability, Lifecycle, Scheme};
use serde::{Deserialize, Serialize};

use crate::engine;
use crate::secrets::Secret;

/// The name of the plan among a generation's files.
pub const FILE: &str = "plan";
/// The largest plan, in bytes: 200 branes take about 100 KiB.
pub const MAX_BYTES: u64 = 4 << 20;
/// The most branes in a graph, bounded by a worker's statistics page.
pub const MAX_BRANES: usize = crate::statistics::MAX_BRANES;

/// A generation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Its number.
    pub generation: u32,
    /// The graph of the store's history that becomes the current one when this serves; none, if that changes nothing there.
    #[serde(default)]
    pub graph: Option<u64>,
    /// What a new control needs to go on with its trial; none, if it has none.
    #[serde(default)]
    pub trial: Option<Trial>,
    /// How many workers share the replicas.
    pub workers: u32,
    /// The branes, in the order of their statistics.
    pub branes: Vec<Brane>,
    /// Certificates of authorities that are trusted beside the usual ones, in PEM; empty where no brane sends requests.
    #[serde(default)]
    pub roots: String,
}

/// A deploy of which it is counted for a while how many of its processes die.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Since when, in ns since the boot.
    pub since_ns: u64,
    /// How often each role had been started again by then, as init counts it.
    pub restarts: BTreeMap<String, u32>,
}

/// One brane as a worker sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Brane {
    /// Its name in the graph.
    pub name: String,
    /// What the manifest says under `image`.
    pub image: String,
    /// SHA-256 of the component, in hexadecimal.
    pub digest: String,
    /// The artefact's name among the generation's files.
    pub artefact: String,
    /// What is reserved for each of an instance's memories, in bytes: the artefact was made for it.
    pub reservation: u64,
    /// What an instance of it needs of the pool.
    pub needs: Needs,
    /// Host of its requests as the manifest writes it, lower case: exact or `*.example.org`; `None` takes any.
    pub host: Option<String>,
    /// Path prefix of its requests, on segment boundaries.
    pub path: String,
    /// What it is granted.
    pub grants: Vec<Capability>,
    /// The secrets that its `env` names, and their values.
    pub secrets: Vec<(String, Secret)>,
    /// How long an instance lives.
    pub lifecycle: Lifecycle,
    /// Instances on the whole appliance.
    pub replicas: u32,
    /// Of a pinned brane, what it is made of in one word: its requests are passed on to keepers that have the same.
    #[serde(default)]
    pub keeper: Option<String>,
    /// Bytes an instance's memories and tables may have together.
    pub mem_max: u64,
    /// Part of one core that an instance may have over any 100 ms, if that is bounded.
    pub cpu_quota: Option<f64>,
    /// Wall time for a request.
    pub deadline: Duration,
    /// Bytes a request's body may have.
    pub body_max: u64,
}

impl Plan {
    /// The branes that run where this is read, each with its place.
    pub fn here(&self) -> impl Iterator<Item = (usize, &Brane)> {
        self.branes.iter().enumerate().filter(|(_, brane)| brane.keeper.is_none())
    }

    /// What they reach together.
    #[must_use]
    pub fn reach(&self) -> Reach {
        reach(self.here().flat_map(|(_, brane)| &brane.grants))
    }

    /// How many processes share the memory that there is for instances: the workers, and the keepers that it has.
    #[must_use]
    pub fn processes(&self) -> u32 {
        let kept = self.branes.iter().filter(|brane| brane.keeper.is_some()).map(|brane| brane.replicas);
        kept.fold(self.workers, u32::saturating_add)
    }
}

/// What these grants let a worker reach: the seal is computed from it. Names need nothing, they are resolved by control; an
/// allowlist of `net.http` that is empty needs nothing either. A guest with `net.tcp` or `net.udp` may make a socket
/// whatever its list says.
#[must_use]
pub fn reach<'a>(grants: impl IntoIterator<Item = &'a Capability>) -> Reach {
    let mut reach = Reach::default();
    for grant in grants {
        match grant {
            Capability::Http(sites) => {
                reach.http |= !sites.is_empty();
                for site in sites {
                    let schemes = [Scheme::Http, Scheme::Https].into_iter();
                    let schemes = schemes.filter(|scheme| site.scheme.is_none_or(|only| only == *scheme));
                    reach.ports.extend(schemes.map(|scheme| site.port.unwrap_or(scheme.default_port())));
                }
            }
            Capability::Tcp(endpoints) => {
                reach.tcp = true;
                reach.ports.extend(endpoints.iter().map(|endpoint| endpoint.port));
            }
            Capability::Udp(_) => reach.udp = true,
            Capability::Dns(_)
            | Capability::Tmp { .. }
            | Capability::Clock(_)
            | Capability::Random
            | Capability::Env { .. } => {}
        }
    }
    reach
}

impl Brane {
    /// Instances in each of `workers` workers: the replicas divided, at least one.
    #[must_use]
    pub fn slots(&self, workers: u32) -> u32 {
        slots(self.replicas, workers)
    }

    /// What they reserve of the address space of each, in bytes.
    #[must_use]
    pub fn address_space(&self, workers: u32) -> u64 {
        engine::address_space(self.slots(workers), self.needs.memories.max(1), self.reservation)
    }
}

/// Instances in each of `workers` workers of a brane with so many replicas.
#[must_use]
pub fn slots(replicas: u32, workers: u32) -> u32 {
    replicas.div_ceil(workers.max(1)).max(1)
}

/// What one instance of a component needs of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Linear memories.
    pub memories: u32,
    /// Bytes of the largest memory at the start.
    pub initial_memory: u64,
    /// Where in its memory the data ends that it begins with, in bytes. Below lie what it always touches and its stack.
    #[serde(default)]
    pub data_end: u64,
    /// Tables.
    pub tables: u32,
    /// Elements of the largest table.
    pub table_elements: u64,
    /// The longest name of a function, in bytes: beyond some length its stacks are not followed.
    #[serde(default)]
    pub longest_name: u64,
}
