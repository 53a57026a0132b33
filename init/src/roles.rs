//! The fixed table of roles: which program, as whom, where, and what becomes of it.
//!
//! Nothing outside this file starts a process. Control can ask for a compiler or for a generation of workers;
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
    /// The prompt on the serial port.
    Console,
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
    /// Its name in reports; a worker's is followed by `@core`.
    pub name: &'static str,
    /// The program.
    pub program: &'static CStr,
    /// Its arguments, the program's name first.
    pub arguments: &'static [&'static CStr],
    /// User and group it runs as; `None` stays root.
    pub user: Option<u32>,
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
    /// It gets the serial port as its terminal and standard streams.
    pub terminal: bool,
}

/// The runtime's program on the appliance; every role of the runtime is a sub-command of it.
pub const RUNTIME: &CStr = c"/bin/gaia";

/// User ids, one per role; no name service is needed, so there is no `/etc/passwd`.
pub mod users {
    /// Control.
    pub const CONTROL: u32 = 100;
    /// Compilers.
    pub const COMPILE: u32 = 101;
    /// Workers.
    pub const WORKER: u32 = 102;
    /// The console.
    pub const CONSOLE: u32 = 103;
}

/// All roles.
pub const ROLES: &[Role] = &[
    Role {
        kind: Kind::Control,
        name: "control",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"control"],
        user: Some(users::CONTROL),
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 4096,
        max_cpu: None,
        max_memory: None,
        terminal: false,
    },
    Role {
        kind: Kind::Compile,
        name: "compile",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"compile"],
        user: Some(users::COMPILE),
        place: Place::Housekeeping,
        restart: Restart::Never,
        max_files: 16,
        // Cranelift needs about 80 ms for 100 KiB of wasm natively and twenty times that under emulation; the
        // largest components in use (18 MB from JavaScript toolchains) need about 60 s emulated.
        max_cpu: Some(Duration::from_mins(5)),
        max_memory: Some(4 << 30),
        terminal: false,
    },
    Role {
        kind: Kind::Worker,
        name: "worker",
        program: RUNTIME,
        arguments: &[c"gaia", c"role", c"worker"],
        user: Some(users::WORKER),
        place: Place::OwnCore,
        restart: Restart::Always,
        // One per connection, and what it starts with.
        max_files: 65_536,
        max_cpu: None,
        max_memory: None,
        terminal: false,
    },
    Role {
        kind: Kind::Console,
        name: "console",
        program: RUNTIME,
        arguments: &[c"gaia", c"console"],
        user: Some(users::CONSOLE),
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 64,
        max_cpu: None,
        max_memory: None,
        terminal: true,
    },
    #[cfg(feature = "debug-role")]
    Role {
        kind: Kind::Debug,
        name: "debug",
        program: c"/bin/gaia-debug",
        arguments: &[c"gaia-debug"],
        user: None,
        place: Place::Housekeeping,
        restart: Restart::Always,
        max_files: 1024,
        max_cpu: None,
        max_memory: None,
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
            Self::Console => 3,
            #[cfg(feature = "debug-role")]
            Self::Debug => 4,
        };
        &ROLES[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_finds_its_own_row() {
        for role in ROLES {
            assert!(std::ptr::eq(role.kind.role(), role), "{}", role.name);
        }
    }

    #[test]
    fn no_two_roles_share_a_user() {
        let mut users: Vec<_> = ROLES.iter().map(|r| r.user).collect();
        users.sort_unstable();
        users.dedup();
        assert_eq!(users.len(), ROLES.len());
    }

    #[test]
    fn only_the_debug_role_stays_root() {
        assert!(ROLES.iter().all(|r| r.user.is_some() || r.name == "debug"));
    }
}
