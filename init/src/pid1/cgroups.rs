//! The cgroup tree.
//!
//! ```text
//! /                        controllers: cpuset cpu memory pids
//! ├─ system                control, compile, console: the housekeeping cores
//! └─ workers               all workers and keepers: what they touch is counted here, together
//!    ├─ tick (threaded)    each one's epoch thread: the housekeeping cores
//!    └─ core-N (threaded)  the rest of the worker on core N, in a partition of its own where cores are not shared; and then
//!                          that of the keepers there
//! ```
//!
//! Threads of one process sit in two cpusets, so `workers` is a threaded domain, and memory is bounded for it as a whole.
//! The bounds of `system` and `workers` together are more than there is: each is what its part may never take from the
//! other, not what it is expected to need.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use gaia_init::cores::{Cores, list};
use gaia_init::supervise::KEEPER_SLOTS;
use rustix::fs::{Mode, OFlags};

use crate::report::Failure;

const ROOT: &str = "/sys/fs/cgroup";

/// Processes and threads of control, compilers and the console: a dozen in use, and room for a pool of threads.
const SYSTEM_PIDS: usize = 256;
/// Threads of workers for each worker core: two in each worker, and sixteen generations, of which all but one drain.
const WORKER_PIDS: usize = 32;
/// Threads of keepers: two in each.
const KEEPER_PIDS: usize = 2 * KEEPER_SLOTS;

/// What `system` and `workers` may take of a machine with so many bytes of memory.
///
/// `system`: half. Two compilers, whose need grows with the component, and the artefacts of all generations, which are
/// counted where they were written; a machine twice as large has twice as many.
/// `workers`: all but a sixteenth and 64 MiB, which is what the idle appliance takes, for the kernel and for `system`:
/// whatever branes do, control and the console stay able to say so.
fn memory_bounds(total: u64) -> (u64, u64) {
    let half = total / 2;
    (half, total.saturating_sub(total / 16 + (64 << 20)).max(half))
}

/// Open membership files: writing "0" moves the writer. The kernel checks who opened the file, not who writes. And what
/// the workers read to know how much memory they have taken.
pub(crate) struct Groups {
    /// `system/cgroup.procs`
    pub(crate) system: OwnedFd,
    /// `workers/cgroup.procs`
    pub(crate) workers: OwnedFd,
    /// `workers/tick/cgroup.threads`
    pub(crate) tick: OwnedFd,
    /// `workers/memory.current`, for reading
    pub(crate) memory: OwnedFd,
    /// Bytes in `workers/memory.max`.
    pub(crate) memory_max: u64,
    /// `workers/core-N/cgroup.threads`, by core
    cores: Vec<(usize, OwnedFd)>,
    /// Which cores there are.
    pub(crate) divided: Cores,
}

impl Groups {
    /// What a process joins to be on this worker core; on any, if none is named.
    pub(crate) fn of_core(&self, core: Option<usize>) -> Vec<BorrowedFd<'_>> {
        let own = self.cores.iter().filter(|(number, _)| Some(*number) == core).map(|(_, fd)| fd.as_fd());
        std::iter::once(self.workers.as_fd()).chain(own).collect()
    }

    /// Makes the tree and says what the kernel made of it.
    pub(crate) fn make(cores: &Cores, memory: u64) -> Result<(Self, String), Failure> {
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
        let (system, workers) = memory_bounds(memory);
        put("system/memory.max", &system.to_string())?;
        put("system/pids.max", &SYSTEM_PIDS.to_string())?;
        put("workers/memory.max", &workers.to_string())?;
        put("workers/pids.max", &(cores.workers.len() * WORKER_PIDS + KEEPER_PIDS).to_string())?;
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
            system: open("system/cgroup.procs", OFlags::WRONLY)?,
            workers: open("workers/cgroup.procs", OFlags::WRONLY)?,
            tick: open("workers/tick/cgroup.threads", OFlags::WRONLY)?,
            memory: open("workers/memory.current", OFlags::RDONLY)?,
            memory_max: workers,
            cores: cores
                .workers
                .iter()
                .map(|core| Ok((*core, open(&format!("workers/core-{core}/cgroup.threads"), OFlags::WRONLY)?)))
                .collect::<Result<_, Failure>>()?,
            divided: cores.clone(),
        };
        let said =
            if partitions.is_empty() { "no partitions: every core shares".into() } else { partitions.join(", ") };
        let said = format!("{said}; at most {} MiB for system, {} MiB for workers", system >> 20, workers >> 20);
        Ok((groups, said))
    }
}

/// Where the cgroup of a worker core is.
pub(crate) fn folder_of_core(core: usize) -> String {
    format!("{ROOT}/workers/core-{core}")
}

fn make(name: &str) -> Result<(), Failure> {
    fs::create_dir(format!("{ROOT}/{name}")).map_err(|e| format!("{name}: {e}").into())
}

fn put(file: &str, text: &str) -> Result<(), String> {
    fs::write(format!("{ROOT}/{file}"), text).map_err(|e| format!("\"{text}\" to {file}: {e}"))
}

fn open(file: &str, to: OFlags) -> Result<OwnedFd, Failure> {
    rustix::fs::open(format!("{ROOT}/{file}"), to | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| format!("{file}: {e}").into())
}

#[cfg(test)]
mod tests {
    use super::memory_bounds;

    #[test]
    fn both_parts_have_bounds_that_leave_something_and_none_is_nothing() {
        let mib = |total: u64| {
            let (system, workers) = memory_bounds(total << 20);
            (system >> 20, workers >> 20)
        };
        assert_eq!(mib(512), (256, 416));
        assert_eq!(mib(16_384), (8192, 15_296));
        assert_eq!(mib(64), (32, 32));
    }
}
