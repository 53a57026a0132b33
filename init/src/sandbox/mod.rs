//! What each role may ask of the kernel, as data, and the one engine that makes it so.
//!
//! A role enters its sandbox with its first instructions, before any thread and before it reads anything that a stranger
//! wrote; a worker reads its plan first, which control wrote, because its sandbox follows from it. Four layers, each of which holds by itself:
//!
//! ```text
//! init, before exec     a user of its own, no supplementary groups, secure bits locked, no_new_privs
//! enter  capabilities   all five sets empty
//!        Landlock       files, TCP ports, signals and abstract sockets: by default none
//!        seccomp        a list of system calls, with tests of their arguments; any other ends the process
//! seal   seccomp        workers, once all is mapped, linked and pooled: a shorter list, computed from the graph
//! ```
//!
//! The lists are one file per role beside this one, a line with its reason for each call. `program` has what every role's
//! program needs to run at all, `event_loop` what tokio needs.

pub mod compile;
pub mod console;
pub mod control;
mod event_loop;
pub mod log;
mod program;
mod sockets;
pub mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What the appliance's kernel has: Linux 6.12.
const LANDLOCK: ABI = ABI::V6;
/// The variable in a role's environment that says what becomes of it where a layer is missing.
pub const VARIABLE: &str = "GAIA_SANDBOX";

/// One system call that is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number on x86-64.
    pub number: i64,
    /// Its name.
    pub name: &'static str,
    /// It is allowed if all tests of one of these hold; always, if there is none.
    pub when: &'static [&'static [Test]],
    /// What needs it.
    pub why: &'static str,
}

/// A test of one argument. Arguments that are pointers cannot be tested.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// Which, from 0.
    pub argument: u8,
    /// Of its lower 32 bits, these.
    pub mask: u32,
    /// Must be this.
    pub is: u32,
    /// The same in words.
    pub says: &'static str,
}

/// `call!(read, "why")`, `call!(mmap, [[NO_EXEC]], "why")`: a [`Call`].
macro_rules! call {
    ($number:ident = $name:ident, [$([$($test:expr),+]),*], $why:literal) => {
        $crate::sandbox::Call {
            number: nix::libc::$number,
            name: stringify!($name),
            when: &[$(&[$($test),+]),*],
            why: $why,
        }
    };
}
pub(crate) use call;

/// The test that an argument is one value.
const fn is(argument: u8, value: i32, says: &'static str) -> Test {
    Test { argument, mask: u32::MAX, is: value.cast_unsigned(), says }
}

/// The test that an argument has none of these bits.
const fn without(argument: u8, bits: i32, says: &'static str) -> Test {
    Test { argument, mask: bits.cast_unsigned(), is: 0, says }
}

/// What a role may do.
#[derive(Debug)]
pub struct Sandbox {
    /// Its system calls.
    pub calls: &'static [&'static [Call]],
    /// Files and folders it may open to read, on the appliance, and why.
    pub files: &'static [(&'static str, &'static str)],
    /// Folders beneath which it may also make, change, move and remove files and folders, on the appliance, and why.
    pub data: &'static [(&'static str, &'static str)],
    /// What it may read under `gaia run`.
    pub files_of_a_workstation: &'static [(&'static str, &'static str)],
}

/// What becomes of a role where the kernel lacks a layer of its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// It ends: the appliance.
    Whole,
    /// It does with what there is: `gaia run`, which says what is missing.
    Possible,
    /// There is no sandbox: `gaia run --without-sandbox`, to measure what one costs.
    Nothing,
}

impl Demand {
    /// As the supervisor puts it into the environment. Whoever was told nothing wants all of it.
    #[must_use]
    pub fn from_environment() -> Self {
        let parent = rustix::process::getppid().map(rustix::process::Pid::as_raw_pid);
        Self::of(&std::env::var(VARIABLE).unwrap_or_default(), parent)
    }

    /// Without a sandbox is no child of process 1, whatever it is told: on the appliance that is everyone.
    fn of(word: &str, parent: Option<i32>) -> Self {
        let told = [Self::Possible, Self::Nothing].into_iter().find(|demand| demand.word() == word);
        match told {
            Some(Self::Nothing) if parent.is_none_or(|pid| pid == 1) => Self::Whole,
            told => told.unwrap_or(Self::Whole),
        }
    }

    /// The variable's value.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Possible => "possible",
            Self::Nothing => "off",
        }
    }
}

/// A sandbox could not be closed. Whoever gets this must end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A set of capabilities could not be emptied.
    #[error("dropping capabilities: {0}")]
    Capabilities(String),
    /// Landlock refused.
    #[error("Landlock: {0}")]
    Landlock(String),
    /// Landlock is there in part.
    #[error("Landlock of this kernel is {0}: the appliance needs ABI {abi}, Linux 6.12", abi = 6)]
    Partly(&'static str),
    /// Seccomp refused.
    #[error("seccomp: {0}")]
    Seccomp(String),
}

/// One of the layers that a role puts on itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// No capability in any set.
    Capabilities,
    /// Files, TCP ports, signals and abstract sockets.
    Landlock,
    /// System calls.
    Seccomp,
}

/// In the order they are entered.
const LAYERS: [Layer; 3] = [Layer::Capabilities, Layer::Landlock, Layer::Seccomp];

/// A sandbox with all that it follows from. Roles enter it whole; there is no argument with which one could ask for less.
struct Closing<'a> {
    sandbox: &'a Sandbox,
    ports: &'a BTreeSet<u16>,
    /// Whether TCP may be bound to a port of the kernel's choice.
    bind: bool,
    /// Under `gaia run`, the folder it keeps files in.
    keeps: Option<BorrowedFd<'a>>,
    calls: Vec<&'static Call>,
}

impl Closing<'_> {
    fn enter(&self, demand: Demand) -> Result<(), Error> {
        if demand == Demand::Nothing {
            return Ok(());
        }
        LAYERS.into_iter().try_for_each(|layer| self.enter_one(layer, demand))
    }

    fn enter_one(&self, layer: Layer, demand: Demand) -> Result<(), Error> {
        match layer {
            Layer::Capabilities => drop_capabilities(demand),
            Layer::Landlock => confine(self.sandbox, self.ports, self.bind, self.keeps, demand),
            Layer::Seccomp => filter(self.calls.iter().copied(), Threads::This, demand),
        }
    }
}

fn closing<'a>(sandbox: &'a Sandbox, ports: &'a BTreeSet<u16>) -> Closing<'a> {
    Closing { sandbox, ports, bind: false, keeps: None, calls: sandbox.calls.iter().copied().flatten().collect() }
}

/// Enters a role's sandbox: capabilities, Landlock, seccomp, in this order. Must be called while the process has a single
/// thread. `ports` are those it may connect to with TCP.
///
/// # Errors
/// The layer that could not be had; with [`Demand::Possible`] only what the kernel has and refuses.
pub fn enter(sandbox: &Sandbox, ports: &BTreeSet<u16>, demand: Demand) -> Result<(), Error> {
    closing(sandbox, ports).enter(demand)
}

/// Enters the sandbox of a role that keeps files. Where that is under `gaia run`, this open folder says; on the appliance, the
/// sandbox does.
///
/// # Errors
/// As [`enter`].
pub fn enter_keeping(
    sandbox: &Sandbox,
    ports: &BTreeSet<u16>,
    keeps: Option<BorrowedFd<'_>>,
    demand: Demand,
) -> Result<(), Error> {
    Closing { keeps, ..closing(sandbox, ports) }.enter(demand)
}

/// Enters one layer of a role's sandbox and leaves the others off, to show what it stops by itself. No role may call this,
/// and `clippy.toml` refuses every call that does not say why it is one of the tests.
///
/// # Errors
/// If the layer could not be had.
pub fn enter_one_layer(layer: Layer, sandbox: &Sandbox, ports: &BTreeSet<u16>) -> Result<(), Error> {
    closing(sandbox, ports).enter_one(layer, Demand::Whole)
}

/// Empties all five sets of capabilities. On the appliance init has done so before; under `gaia run` by root, this does.
///
/// # Errors
/// [`Error::Capabilities`]
fn drop_capabilities(demand: Demand) -> Result<(), Error> {
    use caps::CapSet::{Ambient, Bounding, Effective, Inheritable, Permitted};
    let failed = |e: caps::errors::CapsError| Error::Capabilities(e.to_string());
    // The bounding set first, while there may be a capability to change it with; without one it is without effect as
    // well, because nothing is gained at exec under no_new_privs.
    match caps::clear(None, Bounding) {
        Err(e) if demand == Demand::Whole && caps::read(None, Bounding).is_ok_and(|left| !left.is_empty()) => {
            return Err(failed(e));
        }
        _ => {}
    }
    for set in [Ambient, Inheritable, Effective, Permitted] {
        caps::clear(None, set).map_err(failed)?;
    }
    Ok(())
}

/// What may be done beneath a folder of [`Sandbox::data`]: with plain files and folders, and nothing that is a link, a device,
/// a socket, or is run.
fn keeping() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer
}

/// Applies Landlock to the calling thread: only the sandbox's files, to read, and what it keeps; only these TCP ports, to connect to; a port
/// of the kernel's choice to bind to, if `bind` says so; no signal and no abstract socket to anyone outside.
///
/// # Errors
/// [`Error::Landlock`], [`Error::Partly`]
fn confine(
    sandbox: &Sandbox,
    ports: &BTreeSet<u16>,
    bind: bool,
    keeps: Option<BorrowedFd<'_>>,
    demand: Demand,
) -> Result<(), Error> {
    let failed = |e: &dyn fmt::Display| Error::Landlock(e.to_string());
    let mut rules = ruleset(demand).and_then(Ruleset::create).map_err(|e| failed(&e))?;
    let files = match demand {
        Demand::Whole => sandbox.files,
        Demand::Possible | Demand::Nothing => sandbox.files_of_a_workstation,
    };
    let data = if demand == Demand::Whole { sandbox.data } else { &[] };
    for (path, _) in data {
        // A machine without a data disk.
        let Ok(folder) = PathFd::new(path) else { continue };
        rules = rules.add_rule(PathBeneath::new(folder, keeping())).map_err(|e| failed(&e))?;
    }
    if let (Some(folder), Demand::Possible | Demand::Nothing) = (keeps, demand) {
        rules = rules.add_rule(PathBeneath::new(folder, keeping())).map_err(|e| failed(&e))?;
    }
    for (path, _) in files {
        // What is not there cannot be opened either: a machine without a seed.
        let Ok(file) = PathFd::new(path) else { continue };
        let folder = std::fs::metadata(path).is_ok_and(|m| m.is_dir());
        let read = if folder { AccessFs::ReadFile | AccessFs::ReadDir } else { AccessFs::ReadFile.into() };
        rules = rules.add_rule(PathBeneath::new(file, read)).map_err(|e| failed(&e))?;
    }
    for port in ports {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp)).map_err(|e| failed(&e))?;
    }
    if bind {
        rules = rules.add_rule(NetPort::new(0, AccessNet::BindTcp)).map_err(|e| failed(&e))?;
    }
    let status = rules.restrict_self().map_err(|e| failed(&e))?;
    match (status.ruleset, demand) {
        (RulesetStatus::FullyEnforced, _) | (_, Demand::Possible | Demand::Nothing) => Ok(()),
        (RulesetStatus::PartiallyEnforced, Demand::Whole) => Err(Error::Partly("partly there")),
        (RulesetStatus::NotEnforced, Demand::Whole) => Err(Error::Partly("not there")),
    }
}

fn ruleset(demand: Demand) -> Result<Ruleset, landlock::RulesetError> {
    let level = match demand {
        Demand::Whole => CompatLevel::HardRequirement,
        Demand::Possible | Demand::Nothing => CompatLevel::BestEffort,
    };
    Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))
}

/// To which threads of the process a filter applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Threads {
    /// The caller, and those it will start.
    This,
    /// All there are.
    All,
}

/// Installs a filter: what is not in the list ends the process. Filters add up: a call must be in each.
///
/// # Errors
/// [`Error::Seccomp`]
fn filter<'a>(calls: impl Iterator<Item = &'a Call>, threads: Threads, demand: Demand) -> Result<(), Error> {
    let program = program(calls)?;
    let applied = match threads {
        Threads::This => seccompiler::apply_filter(&program),
        Threads::All => seccompiler::apply_filter_all_threads(&program),
    };
    match applied {
        Err(e) if demand == Demand::Whole || has_seccomp() => Err(Error::Seccomp(e.to_string())),
        _ => Ok(()),
    }
}

fn program<'a>(calls: impl Iterator<Item = &'a Call>) -> Result<BpfProgram, Error> {
    let failed = |e: seccompiler::BackendError| Error::Seccomp(e.to_string());
    let mut always = BTreeSet::new();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let alternatives = rules.entry(call.number).or_default();
        if call.when.is_empty() {
            always.insert(call.number);
        }
        for tests in call.when {
            let conditions: Result<Vec<_>, _> = tests.iter().map(condition).collect();
            alternatives.push(SeccompRule::new(conditions.map_err(failed)?).map_err(failed)?);
        }
    }
    for number in always {
        rules.insert(number, Vec::new());
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(failed)
}

fn condition(test: &Test) -> Result<SeccompCondition, seccompiler::BackendError> {
    let operator = match test.mask {
        u32::MAX => SeccompCmpOp::Eq,
        mask => SeccompCmpOp::MaskedEq(mask.into()),
    };
    SeccompCondition::new(test.argument, SeccompCmpArgLen::Dword, operator, test.is.into())
}

/// The list as a person reads it, by name.
#[must_use]
pub fn text<'a>(calls: impl Iterator<Item = &'a Call>) -> String {
    let line = |call: &Call| {
        let tests = |tests: &&[Test]| tests.iter().map(|t| t.says).collect::<Vec<_>>().join(" and ");
        let when = call.when.iter().map(tests).collect::<Vec<_>>().join(", or ");
        let when = if when.is_empty() { String::new() } else { format!(" if {when}") };
        format!("{}{when}: {}\n", call.name, call.why)
    };
    calls.map(line).collect::<BTreeSet<_>>().into_iter().collect()
}

/// What of the sandbox this kernel cannot do, in words; nothing, if it can do all of it.
#[must_use]
pub fn not_possible_here() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !has_landlock() {
        missing.push("Landlock as of Linux 6.12");
    }
    if !has_seccomp() {
        missing.push("seccomp filters");
    }
    missing
}

fn has_landlock() -> bool {
    ruleset(Demand::Whole).and_then(Ruleset::create).is_ok()
}

fn has_seccomp() -> bool {
    // SAFETY: a question about a number (seccomp(2), `SECCOMP_GET_ACTION_AVAIL`); the kernel reads four bytes of a
    // constant that lives on.
    unsafe {
        nix::libc::syscall(nix::libc::SYS_seccomp, nix::libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const KILL_PROCESS) == 0
    }
}

/// `SECCOMP_RET_KILL_PROCESS`
static KILL_PROCESS: u32 = nix::libc::SECCOMP_RET_KILL_PROCESS;

/// What is missing of a process's confinement as the kernel shows it from outside, in the text of one of its threads'
/// `/proc/PID/task/TID/status`: words for a report. Landlock is not shown there: a role that cannot have it ends.
#[must_use]
pub fn missing(status: &str, demand: Demand) -> Vec<&'static str> {
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let empty = |set: &str| field(set).is_some_and(|bits| !bits.is_empty() && bits.bytes().all(|b| b == b'0'));
    let mut missing = Vec::new();
    if field("Seccomp") != Some("2") {
        missing.push("seccomp");
    }
    if field("NoNewPrivs") != Some("1") {
        missing.push("no-new-privileges");
    }
    let sets: &[&str] = match demand {
        Demand::Whole => &["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"],
        Demand::Possible | Demand::Nothing => &["CapInh", "CapPrm", "CapEff", "CapAmb"],
    };
    if !sets.iter().copied().all(empty) {
        missing.push("capabilities");
    }
    let root = |ids: &str| ids.split_whitespace().any(|id| id == "0");
    if demand == Demand::Whole && field("Uid").is_none_or(root) {
        missing.push("user");
    }
    missing
}

/// What is missing of a running process's confinement, all its threads taken together.
///
/// # Errors
/// If it is gone, or `/proc` is.
pub fn missing_of(pid: i32, demand: Demand) -> std::io::Result<Vec<&'static str>> {
    let mut all = BTreeSet::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        all.extend(missing(&std::fs::read_to_string(thread?.path().join("status"))?, demand));
    }
    Ok(all.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use worker::Reach;

    #[test]
    fn no_child_of_process_1_is_without_a_sandbox_whatever_it_is_told() {
        for (word, parent, demand) in [
            ("off", Some(77), Demand::Nothing),
            ("off", Some(1), Demand::Whole),
            ("off", None, Demand::Whole),
            ("possible", Some(1), Demand::Possible),
            ("whole", Some(77), Demand::Whole),
            ("", Some(77), Demand::Whole),
            ("of", Some(77), Demand::Whole),
        ] {
            assert_eq!(Demand::of(word, parent), demand, "{word} {parent:?}");
        }
    }

    const EVERYTHING: Reach = Reach { http: true, tcp: true, udp: true, ports: BTreeSet::new() };

    const ALL: [(&str, &Sandbox); 5] = [
        ("control", &control::SANDBOX),
        ("compile", &compile::SANDBOX),
        ("worker", &worker::START),
        ("console", &console::SANDBOX),
        ("log", &log::SANDBOX),
    ];

    /// Calls that no role has, whatever it is for.
    const NEVER: &[i64] = &[
        nix::libc::SYS_execve,
        nix::libc::SYS_execveat,
        nix::libc::SYS_fork,
        nix::libc::SYS_vfork,
        nix::libc::SYS_clone3,
        nix::libc::SYS_ptrace,
        nix::libc::SYS_process_vm_readv,
        nix::libc::SYS_process_vm_writev,
        nix::libc::SYS_bpf,
        nix::libc::SYS_perf_event_open,
        nix::libc::SYS_io_uring_setup,
        nix::libc::SYS_io_uring_enter,
        nix::libc::SYS_io_uring_register,
        nix::libc::SYS_userfaultfd,
        nix::libc::SYS_mount,
        nix::libc::SYS_umount2,
        nix::libc::SYS_pivot_root,
        nix::libc::SYS_chroot,
        nix::libc::SYS_setns,
        nix::libc::SYS_unshare,
        nix::libc::SYS_kill,
        nix::libc::SYS_personality,
        nix::libc::SYS_pkey_mprotect,
        nix::libc::SYS_shmat,
        nix::libc::SYS_keyctl,
        nix::libc::SYS_add_key,
        nix::libc::SYS_listen,
        nix::libc::SYS_modify_ldt,
        nix::libc::SYS_init_module,
        nix::libc::SYS_finit_module,
        nix::libc::SYS_reboot,
        nix::libc::SYS_setuid,
        nix::libc::SYS_capset,
        nix::libc::SYS_memfd_secret,
        nix::libc::SYS_pidfd_getfd,
        nix::libc::SYS_sendmmsg,
    ];

    #[test]
    fn every_list_becomes_a_filter_that_the_kernel_can_hold() {
        for (name, sandbox) in ALL {
            let length = program(sandbox.calls.iter().copied().flatten()).unwrap().len();
            assert!((50..1000).contains(&length), "{name}: {length} instructions");
        }
        for reach in [Reach::default(), EVERYTHING] {
            assert!(program(worker::seal(&reach)).unwrap().len() < 1000);
        }
    }
    #[test]
    fn no_role_has_what_none_may_have() {
        let mut lists: Vec<(&str, Vec<&Call>)> =
            ALL.into_iter().map(|(name, s)| (name, s.calls.iter().copied().flatten().collect())).collect();
        lists.push(("seal", worker::seal(&EVERYTHING).collect()));
        for (name, calls) in lists {
            for call in calls {
                assert!(!NEVER.contains(&call.number), "{name} has {}", call.name);
                assert!(!call.why.is_empty(), "{name} has {} without a reason", call.name);
            }
        }
    }

    #[test]
    fn a_seal_takes_away_what_a_start_needs_and_no_start_reaches_the_network_without_a_grant() {
        let names = |calls: &mut dyn Iterator<Item = &'static Call>| calls.map(|c| c.name).collect::<BTreeSet<_>>();
        let (sealed, start) =
            (names(&mut worker::seal(&Reach::default())), names(&mut worker::START.calls.iter().copied().flatten()));
        for gone in ["open", "openat", "stat", "clone", "seccomp"] {
            assert!(start.contains(gone) && !sealed.contains(gone), "{gone}");
        }
        for network in ["socket", "connect", "bind"] {
            assert!(!start.contains(network) && !sealed.contains(network), "{network}");
            assert!(worker::seal(&EVERYTHING).any(|call| call.name == network), "{network}");
        }
    }

    #[test]
    fn what_the_kernel_shows_of_a_confined_process_is_read_as_whole() {
        let whole = "Name:\tgaia\nUid:\t1000\t1000\t1000\t1000\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
                     CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n\
                     Seccomp:\t2\nSeccomp_filters:\t2\n";
        assert!(missing(whole, Demand::Whole).is_empty());
        for (from, to, word) in [
            ("Seccomp:\t2", "Seccomp:\t0", "seccomp"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "no-new-privileges"),
            ("CapBnd:\t0000000000000000", "CapBnd:\t000001ffffffffff", "capabilities"),
            ("CapEff:\t0000000000000000", "CapEff:\t0000000000000400", "capabilities"),
            ("1000\t1000\t1000\t1000", "0\t1000\t1000\t1000", "user"),
        ] {
            assert_eq!(missing(&whole.replace(from, to), Demand::Whole), [word]);
        }
        assert!(missing(&whole.replace("CapBnd:\t0", "CapBnd:\t1"), Demand::Possible).is_empty());
    }

    #[test]
    fn a_confined_thread_opens_what_its_list_names_and_nothing_else() {
        if !has_landlock() {
            return;
        }
        // Landlock holds the thread that asked for it, and those it starts.
        let confined = std::thread::spawn(|| {
            confine(&worker::START, &BTreeSet::new(), false, None, Demand::Possible).unwrap();
            let open = |path: &str| std::fs::File::open(path).map(drop).map_err(|e| e.kind());
            [open("/proc/self/statm"), open("/proc/self/status"), open("/dev/null"), open("/etc/passwd")]
        });
        let refused = Err(std::io::ErrorKind::PermissionDenied);
        assert_eq!(confined.join().unwrap(), [Ok(()), refused, refused, refused]);
    }

    #[test]
    fn a_confined_thread_keeps_files_in_its_folder_and_nowhere_else() {
        static MAY: [(&str, &str); 1] = [("/tmp/gaia-init-test-of-data/own", "a test")];
        if !has_landlock() {
            return;
        }
        let base = std::path::Path::new(MAY[0].0).parent().unwrap();
        let _ = std::fs::remove_dir_all(base);
        std::fs::create_dir_all(MAY[0].0).unwrap();
        std::fs::create_dir_all(base.join("other")).unwrap();
        let confined = std::thread::spawn(|| {
            let sandbox = Sandbox { data: &MAY, ..worker::START };
            // Not with the other demand, under which nothing is kept.
            confine(&sandbox, &BTreeSet::new(), false, None, Demand::Whole).unwrap();
            let at = |name: &str| std::path::Path::new(MAY[0].0).join(name);
            std::fs::create_dir(at("a")).unwrap();
            std::fs::write(at("a/x"), "y").unwrap();
            std::fs::rename(at("a/x"), at("x")).unwrap();
            assert_eq!(std::fs::read_to_string(at("x")).unwrap(), "y");
            std::fs::remove_dir(at("a")).unwrap();
            let kind = |result: std::io::Result<()>| result.map_err(|e| e.kind());
            [
                kind(std::os::unix::fs::symlink("/etc", at("link"))),
                kind(std::os::unix::net::UnixListener::bind(at("socket")).map(drop)),
                kind(std::fs::write(at("../other/x"), "y")),
                kind(std::fs::read_dir(at("../other")).map(drop)),
                kind(std::fs::rename(at("x"), at("../other/x"))),
            ]
        });
        let refused = Err(std::io::ErrorKind::PermissionDenied);
        let came = confined.join().unwrap();
        std::fs::remove_dir_all(base).unwrap();
        assert_eq!(came[..4], [refused; 4]);
        assert!(came[4].is_err());
    }

    #[test]
    fn control_alone_keeps_anything() {
        let keepers: Vec<_> =
            ALL.iter().filter(|(_, sandbox)| !sandbox.data.is_empty()).map(|(name, _)| *name).collect();
        assert_eq!(keepers, ["control"]);
    }

    #[test]
    fn what_runs_these_tests_is_not_confined() {
        let missing = missing_of(std::process::id().cast_signed(), Demand::Whole).unwrap();
        assert!(missing.contains(&"seccomp"), "{missing:?}");
    }

    proptest! {
        #[test]
        fn no_text_but_the_kernels_is_whole(text in "([A-Za-z]{0,8}:?[ \\t]?[0-2]{0,16}\\n){0,12}") {
            let fields = ["Seccomp", "NoNewPrivs", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Uid"];
            let has = |name: &str| text.lines().any(|line| line.starts_with(&format!("{name}:")));
            prop_assert_eq!(missing(&text, Demand::Whole).is_empty() && !fields.into_iter().all(has), false);
        }
    }
}
