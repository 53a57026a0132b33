//! What a manifest says, typed, with the place of everything that a later stage may object to.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::allow::{Endpoint, Host, Site};

/// A value and its place in the source, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub span: Range<usize>,
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Manifest {
    /// The branes, in the order of the file.
    pub branes: Vec<Brane>,
}

/// One brane.
#[derive(Debug, Clone, PartialEq)]
pub struct Brane {
    /// Its name: 1 to 48 of a-z, 0-9 and `-`.
    pub name: Spanned<String>,
    /// What it runs.
    pub image: Spanned<Image>,
    /// Instances on the whole appliance, from 1.
    pub replicas: u32,
    /// Which requests are its.
    pub ingress: Ingress,
    /// What it is granted; at most one of each key.
    pub capabilities: Vec<Grant>,
    /// Where its grants stand: its capability table, or its name if it has none.
    pub grants: Range<usize>,
    /// What it may use.
    pub limits: Limits,
    /// How long an instance lives.
    pub lifecycle: Lifecycle,
    /// Whether its runs can be repeated, byte for byte.
    pub deterministic: Option<Deterministic>,
}

/// Where a component comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// A file, relative to the manifest.
    File(String),
    /// A name in the store or a registry.
    Name {
        /// `registry.example/omega/cloud-fetch` or `omega/cloud-fetch`.
        repository: String,
        /// `2.4.1`
        tag: Option<String>,
        /// SHA-256, 64 hexadecimal digits in lower case.
        digest: Option<String>,
    },
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{path}"),
            Self::Name { repository, tag, digest } => {
                f.write_str(repository)?;
                if let Some(tag) = tag {
                    write!(f, ":{tag}")?;
                }
                digest.as_ref().map_or(Ok(()), |digest| write!(f, "@sha256:{digest}"))
            }
        }
    }
}

/// Which requests are a brane's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingress {
    /// The hosts; any, if not said.
    pub host: Option<Host>,
    /// The longest prefix wins, on segment boundaries. `/<name>` if not said.
    pub path: String,
    /// Where it is said: the table, or the brane's name.
    pub span: Range<usize>,
}

/// One granted capability.
#[derive(Debug, Clone, PartialEq)]
pub struct Grant {
    /// What is granted.
    pub capability: Capability,
    /// Where its key stands.
    pub span: Range<usize>,
}

/// Everything that can be granted. What is not named in a manifest is not there for the brane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Capability {
    /// `net.http`: requests to these sites.
    Http(Vec<Site>),
    /// `net.dns`: the addresses of these hosts.
    Dns(Vec<Host>),
    /// `net.tcp`: connections to these endpoints.
    Tcp(Vec<Endpoint>),
    /// `net.udp`: datagrams to these endpoints.
    Udp(Vec<Endpoint>),
    /// `fs.tmp`: a file system in memory.
    Tmp {
        /// Bytes it may hold.
        quota: u64,
        /// When it is emptied.
        lifetime: Lifetime,
    },
    /// `clock`: the time.
    Clock(Resolution),
    /// `random`: good randomness.
    Random,
    /// `env`: an environment.
    Env {
        /// Variables and their values.
        vars: BTreeMap<String, String>,
        /// Variables whose values are kept on the device.
        secrets: Vec<String>,
    },
}

/// All keys of `[brane.<name>.capability]`.
pub const KEYS: &[&str] = &["clock", "env", "fs.tmp", "net.dns", "net.http", "net.tcp", "net.udp", "random"];

impl Capability {
    /// Its key in the manifest.
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Self::Http(_) => "net.http",
            Self::Dns(_) => "net.dns",
            Self::Tcp(_) => "net.tcp",
            Self::Udp(_) => "net.udp",
            Self::Tmp { .. } => "fs.tmp",
            Self::Clock(_) => "clock",
            Self::Random => "random",
            Self::Env { .. } => "env",
        }
    }
}

/// When a temporary file system is emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Lifetime {
    /// With the request.
    #[default]
    Request,
    /// With the instance.
    Instance,
}

/// What clock readings and timers are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resolution {
    /// A second.
    Seconds,
    /// A millisecond.
    Milliseconds,
    /// A microsecond.
    Microseconds,
    /// A nanosecond: not rounded.
    Nanoseconds,
}

impl Resolution {
    /// One step, in nanoseconds.
    #[must_use]
    pub fn nanos(self) -> u64 {
        match self {
            Self::Seconds => 1_000_000_000,
            Self::Milliseconds => 1_000_000,
            Self::Microseconds => 1_000,
            Self::Nanoseconds => 1,
        }
    }
}

/// What a brane may use.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Of one core, per replica, over any 100 ms: more than 0, at most 1. No limit if not said.
    pub cpu_quota: Option<Spanned<f64>>,
    /// Bytes of all memories and tables of an instance, and what the host holds for it. 64 MiB if not said.
    pub mem_max: Spanned<u64>,
    /// Wall time for a request. 30 s if not said.
    pub deadline: Duration,
    /// Bytes of a request's body. 8 MiB if not said.
    pub body_max: u64,
}

/// How long an instance lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Lifecycle {
    /// One request; made when it arrives.
    Ephemeral,
    /// One request; ready before it arrives.
    #[default]
    Pooled,
    /// All requests.
    Pinned,
}

/// How a deterministic brane is seeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deterministic {
    /// The seed of its one source of randomness.
    pub seed: u64,
}
