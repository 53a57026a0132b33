//! The fixed table of roles: which program, as whom, where, and what becomes of it.
//!
//! Nothing outside this file starts a process. Control can ask for a compiler or for a generation of workers and keepers;
//! it cannot choose a program, a user or an argument.

use std::ffi::CStr;
use std::time::Duration;

/// A kind of process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Store, deploys, the API.
    Control,
    /// One component in, machine code out.
    Compile,
    /// Runs the branes on one core.
    Worker,
    /// Runs one instance of a pinned brane, and outlives deploys that do not change it.
    Keeper,
    /// The prompt on the serial port.
    Console,
    /// Shows the log on the terminal of `gaia run`; the appliance has the prompt for that.
    Log,
    /// Answers the tests' questions; exists only in the test image.
    #[cfg(feature = "debug-role")]
    Debug,
}

/// Which cores and which part of the cgroup tree a role lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The housekeeping cores.
    Housekeeping,
    /// The one core it was started for.
    OwnCore,
    /// The workers' cores, beside the workers.
    WorkerCores,
}

/// As whom a role runs. User and group have the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Root stays root.
    Root,
    /// One user.
    One(u32),
    /// One user for each worker's core, keeper's slot or compiler's slot, from this on: what is hostile in one of them can
    /// neither signal nor look into another.
    Each(u32),
}

impl User {
    /// Its number for a worker's core or a keeper's or compiler's slot; `None` is root.
    #[must_use]
    pub fn id(self, number: Option<usize>) -> Option<u32> {
        match self {
            Self::Root => None,
            Self::One(id) => Some(id),
            Self::Each(first) => Some(first.saturating_add(number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0))),
        }
    }
}

/// What happens when a process of this role ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// It is started again, with back-off when it keeps ending.
    Always,
    /// That was it.
    Never,
}

/// What is fixed about a role.
#[derive(Debug)]
pub struct Role {
    /// The kind.
    pub kind: Kind,
    /// Its name in reports; a worker's is followed by `@core`, a compiler's by `@slot`, a keeper's by `@brane.NNN`.
    pub name: &'static str,
    /// The program.
    pub program: &'static CStr,
    /// Its arguments, the program's name first.
    pub arguments: &'static [&'static CStr],
    /// User and group it runs as.
    pub user: User,
    /// Where it runs.
    pub place: Place,
    /// What becomes of it.
    pub restart: Restart,
    /// Open files it may have (`RLIMIT_NOFILE`).
    pub max_files: u64,
    /// Processor time it may use in all (`RLIMIT_CPU`), for one-shot roles.
    pub max_cpu: Option<Duration>,
    /// Address space it may have in bytes (`RLIMIT_AS`), for roles whose need is known.
    pub max_memory: Option<u64>,
    /// What a file that it writes may have in bytes, those in memory included (`RLIMIT_FSIZE`), for roles whose need is
    /// known.
    pub max_file: Option<u64>,
    /// Its standard streams are the serial port. That is not its controlling terminal: the kernel hangs up the terminal
    /// of a session whose leader ends, and whoever is started next could not use it any more.
    pub terminal: bool,
}

/// The runtime's program on the appliance; every role of the runtime is a sub-command of it.
pub const RUNTIME: &CStr = c"/bin/gaia";

/// User ids; no name service is needed, so there is no `/etc/passwd`.
///
/// | from  | to    | who                                                                                    |
/// |-------|-------|----------------------------------------------------------------------------------------|
/// | 100   | 100   | control                                                                                |
/// | 103   | 103   | the console                                                                            |
/// | 104   | 104   | whoever shows the log                                                                  |
/// | 900   | 901   | compilers: 900 and the slot, below [`MAX_COMPILERS`](crate::supervise::MAX_COMPILERS)  |
/// | 1000  | 9191  | workers: 1000 and the core; the workers of two generations on one core are the same    |
/// | 10000 | 10127 | keepers: 10000 and the slot, below [`KEEPER_SLOTS`](crate::supervise::KEEPER_SLOTS)    |
pub mod users {
    /// Control.
    pub const CONTROL: u32 = 100;
    /// The console.
    pub const CONSOLE: u32 = 103;
    /// Whoever shows the log.
    pub const LOG: u32 = 104;
    /// The first of the compilers.
    pub const COMPILE: u32 = 900;
    /// The first of the workers.
    pub const WORKER: u32 = 1000;
    /// The first of the keepers.
    pub const KEEPER: u32 = 10_000;
}

/// All roles.
pub const ROLES: &[Role] = &[
    Role {
        kind: Kind::Control,
        name: "control",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"control"],
        user: User::One(users::CONTROL),
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 4096,
        max_cpu: None,
        max_memory: None,
        max_file: None,
        terminal: false,
    },
    Role {
        kind: Kind::Compile,
        name: "compile",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"compile"],
        user: User::Each(users::COMPILE),
        place: Place::Housekeeping,
        restart: Restart::Never,
        max_files: 16,
        // Cranelift needs about 80 ms for 100 KiB of wasm natively and twenty times that under emulation; the
        // largest components in use (18 MB from JavaScript toolchains) need about 60 s emulated.
        max_cpu: Some(Duration::from_mins(5)),
        max_memory: Some(4 << 30),
        // The largest artefact that control takes.
        max_file: Some(512 << 20),
        terminal: false,
    },
    Role {
        kind: Kind::Worker,
        name: "worker",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"worker"],
        user: User::Each(users::WORKER),
        place: Place::OwnCore,
        restart: Restart::Always,
        // One per connection, and what it starts with.
        max_files: 65_536,
        max_cpu: None,
        max_memory: None,
        max_file: None,
        terminal: false,
    },
    Role {
        kind: Kind::Keeper,
        name: "keeper",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"keeper"],
        user: User::Each(users::KEEPER),
        place: Place::WorkerCores,
        restart: Restart::Always,
        // One per worker and generation, its brane's connections and sockets, and what it starts with.
        max_files: 4096,
        max_cpu: None,
        max_memory: None,
        max_file: None,
        terminal: false,
    },
    Role {
        kind: Kind::Console,
        name: "console",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"console"],
        user: User::One(users::CONSOLE),
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 64,
        max_cpu: None,
        max_memory: None,
        max_file: None,
        terminal: true,
    },
    Role {
        kind: Kind::Log,
        name: "log",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"log"],
        user: User::One(users::LOG),
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 64,
        max_cpu: None,
        max_memory: None,
        max_file: None,
        terminal: true,
    },
    #[cfg(feature = "debug-role")]
    Role {
        kind: Kind::Debug,
        name: "debug",
        program: c"/bin/gaia-debug",
        arguments: &[c"gaia-debug"],
        user: User::Root,
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 1024,
        max_cpu: None,
        max_memory: None,
        max_file: None,
        terminal: false,
    },
];

impl Kind {
    /// Its row in [`ROLES`].
    #[must_use]
    pub fn role(self) -> &'static Role {
        let index = match self {
            Self::Control => 0,
            Self::Compile => 1,
            Self::Worker => 2,
            Self::Keeper => 3,
            Self::Console => 4,
            Self::Log => 5,
            #[cfg(feature = "debug-role")]
            Self::Debug => 6,
        };
        &ROLES[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervise::{KEEPER_SLOTS, MAX_COMPILERS};

    #[test]
    fn each_kind_finds_its_own_row() {
        for role in ROLES {
            assert!(std::ptr::eq(role.kind.role(), role), "{}", role.name);
        }
    }

    #[test]
    fn no_two_roles_share_a_user() {
        let many = |r: &Role| match r.kind {
            Kind::Compile => MAX_COMPILERS,
            Kind::Keeper => KEEPER_SLOTS,
            _ => 8192,
        };
        let ids = |r: &Role| match r.user {
            User::Each(_) => (0..many(r)).map(|n| r.user.id(Some(n))).collect(),
            _ => vec![r.user.id(None)],
        };
        let mut users: Vec<_> = ROLES.iter().flat_map(ids).collect();
        let all = users.len();
        users.sort_unstable();
        users.dedup();
        assert_eq!(users.len(), all);
    }

    #[test]
    fn only_the_debug_role_stays_root() {
        assert!(ROLES.iter().all(|r| r.user != User::Root || r.name == "debug"));
    }
}
