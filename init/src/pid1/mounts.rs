//! What is mounted where, and with which flags. There is no root file system but the initramfs, and it is sealed
//! read-only before the first role starts. The programs are in a file system of their own, which only reads.

use std::num::NonZeroU64;

use gaia_init::roles::RUNTIME;
use nix::mount::{MsFlags, mount};
use rustix::fs::{Advice, Mode, OFlags};

use crate::report::Failure;

struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Without these not even the report can be written, or nothing started.
const FIRST: &[Mount] = &[
    // Device nodes by the kernel itself; nothing in it may be run.
    Mount {
        source: "dev",
        target: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=755",
    },
    // A process sees only its own user's processes.
    Mount { source: "proc", target: "/proc", kind: "proc", flags: QUIET, data: "hidepid=invisible" },
    // The kernel unpacks pages of a program into its cache, and may drop them again. What it reads for that is in
    // memory already, so it keeps no copy of it.
    Mount {
        source: "/bin.erofs",
        target: "/bin",
        kind: "erofs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_RDONLY),
        data: "cache_strategy=disabled",
    },
];

const REST: &[Mount] = &[
    Mount { source: "sys", target: "/sys", kind: "sysfs", flags: QUIET, data: "" },
    Mount { source: "cgroup", target: "/sys/fs/cgroup", kind: "cgroup2", flags: QUIET, data: "" },
    // The control socket. Bounded, because it is memory.
    Mount { source: "run", target: "/run", kind: "tmpfs", flags: QUIET, data: "mode=755,size=1m,nr_inodes=64" },
];

/// After the last setting has been written: the file systems that must not change any more.
const SEALED: &[(&str, MsFlags)] =
    &[("/", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV)), ("/proc", QUIET), ("/sys", QUIET)];

/// What the kernel reads ahead at most, whatever it is asked for (Linux, `VM_READAHEAD_PAGES`).
const AHEAD: u64 = 128 << 10;

#[derive(Debug, thiserror::Error)]
#[error("mounting {target}: {source}")]
pub(crate) struct Error {
    target: &'static str,
    source: nix::errno::Errno,
}

fn all(table: &'static [Mount]) -> Result<(), Error> {
    for m in table {
        mount(Some(m.source), m.target, Some(m.kind), m.flags, Some(m.data))
            .map_err(|source| Error { target: m.target, source })?;
    }
    Ok(())
}

/// Mounts what the report needs.
pub(crate) fn first() -> Result<(), Error> {
    all(FIRST)
}

/// Mounts the rest.
pub(crate) fn rest() -> Result<String, Failure> {
    all(REST)?;
    Ok(FIRST.iter().chain(REST).map(|m| m.target).collect::<Vec<_>>().join(" "))
}

/// Has the kernel unpack the runtime's program now, into its cache: otherwise the first requests wait for pieces of it, and
/// what a role touches first counts as that role's memory.
pub(crate) fn unpack() -> Result<String, Failure> {
    let program = rustix::fs::open(RUNTIME, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let size = rustix::fs::fstat(&program)?.st_size.cast_unsigned();
    let mut at = 0;
    while at < size {
        rustix::fs::fadvise(&program, at, NonZeroU64::new(AHEAD), Advice::WillNeed)?;
        at += AHEAD;
    }
    Ok(format!("{} KiB of {} unpacked", size >> 10, RUNTIME.to_string_lossy()))
}

/// Makes everything read-only that has been written for the last time. Tries all of it, and fails if any is not.
pub(crate) fn seal() -> Result<String, Failure> {
    let mut wrong = Vec::new();
    for (target, flags) in SEALED {
        let flags = *flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(source) = mount(None::<&str>, *target, None::<&str>, flags, None::<&str>) {
            wrong.push(Error { target, source }.to_string());
        }
    }
    if !wrong.is_empty() {
        return Err(wrong.join("; ").into());
    }
    Ok(format!("{} read-only", SEALED.iter().map(|(t, _)| *t).collect::<Vec<_>>().join(" ")))
}
