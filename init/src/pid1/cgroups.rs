//! The cgroup tree.
//!
//! ```text
//! /                        controllers: cpuset cpu memory pids
//! ├─ system                control, compile, console: the housekeeping cores
//! └─ workers               all workers: what they touch is counted here, together
//!    ├─ tick (threaded)    each worker's epoch thread: the housekeeping cores
//!    └─ core-N (threaded)  the rest of the worker on core N, in a partition of its own where cores are not shared
//! ```
//!
//! Threads of one process sit in two cpusets, so `workers` is a threaded domain; the memory controller stops above it.

use std::fs;
use std::os::fd::OwnedFd;

use gaia_init::cores::{Cores, list};
use rustix::fs::{Mode, OFlags};

use crate::report::Failure;

const ROOT: &str = "/sys/fs/cgroup";

/// Open membership files: writing "0" moves the writer. The kernel checks who opened the file, not who writes.
pub(crate) struct Groups {
    /// `system/cgroup.procs`
    pub(crate) system: OwnedFd,
    /// `workers/cgroup.procs`
    pub(crate) workers: OwnedFd,
    /// `workers/tick/cgroup.threads`
    pub(crate) tick: OwnedFd,
    /// `workers/core-N/cgroup.threads`, by core
    pub(crate) cores: Vec<(usize, OwnedFd)>,
}

impl Groups {
    /// Makes the tree and says what the kernel made of it.
    pub(crate) fn make(cores: &Cores) -> Result<(Self, String), Failure> {
        let home = list(&cores.housekeeping);
        put("cgroup.subtree_control", "+cpuset +cpu +memory +pids")?;
        make("system")?;
        put("system/cpuset.cpus", &home)?;
        make("workers")?;
        make("workers/tick")?;
        put("workers/tick/cgroup.type", "threaded")?;
        let mut partitions = Vec::new();
        for core in &cores.workers {
            make(&format!("workers/core-{core}"))?;
            put(&format!("workers/core-{core}/cgroup.type"), "threaded")?;
        }
        put("workers/cgroup.subtree_control", "+cpuset +cpu")?;
        put("workers/tick/cpuset.cpus", &home)?;
        for core in &cores.workers {
            put(&format!("workers/core-{core}/cpuset.cpus"), &core.to_string())?;
        }
        if !cores.shared() {
            // A partition's cores must be exclusive from the root down (Linux, cgroup-v2.rst, "remote partition").
            let all = list(&cores.workers);
            put("workers/cpuset.cpus.exclusive", &all)?;
            for core in &cores.workers {
                put(&format!("workers/core-{core}/cpuset.cpus.exclusive"), &core.to_string())?;
                let file = format!("workers/core-{core}/cpuset.cpus.partition");
                let wanted = put(&file, "isolated");
                let got = fs::read_to_string(format!("{ROOT}/{file}")).unwrap_or_else(|e| e.to_string());
                partitions.push(match wanted {
                    Ok(()) => format!("core {core} {}", got.trim()),
                    Err(e) => format!("core {core} not isolated ({e})"),
                });
            }
        }
        let groups = Self {
            system: open("system/cgroup.procs")?,
            workers: open("workers/cgroup.procs")?,
            tick: open("workers/tick/cgroup.threads")?,
            cores: cores
                .workers
                .iter()
                .map(|core| Ok((*core, open(&format!("workers/core-{core}/cgroup.threads"))?)))
                .collect::<Result<_, Failure>>()?,
        };
        let said =
            if partitions.is_empty() { "no partitions: every core shares".into() } else { partitions.join(", ") };
        Ok((groups, said))
    }
}

fn make(name: &str) -> Result<(), Failure> {
    fs::create_dir(format!("{ROOT}/{name}")).map_err(|e| format!("{name}: {e}").into())
}

fn put(file: &str, text: &str) -> Result<(), String> {
    fs::write(format!("{ROOT}/{file}"), text).map_err(|e| format!("\"{text}\" to {file}: {e}"))
}

fn open(file: &str) -> Result<OwnedFd, Failure> {
    rustix::fs::open(format!("{ROOT}/{file}"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| format!("{file}: {e}").into())
}
