//! The supervisor: one thread, one `poll`, one waiter for every child.
//!
//! It is responsible for
//! - starting each role from the table and starting it again when it ends, with back-off,
//! - keeping what must outlive any role: listening sockets, the far ends of the channels, a generation's files,
//! - cutting over from one generation of workers to the next, all ready before any old one stops accepting,
//! - keeping the keepers of pinned branes over that, and linking each of them with each worker,
//! - lending a worker's sockets to its neighbour while the worker stays away,
//! - killing workers and control when they no longer beat or speak nonsense, and ending everything in order.
//!
//! ```text
//! a worker:   start ─▶ Starting ── ready ─▶ Held ── all of its generation ready ─▶ Up ── drain ─▶ Draining ─▶ end
//!                                             └── its generation serves already ─────▲
//! ```
//!
//! A keeper goes the same way. It belongs to every generation that has its brane unchanged, and is drained by the first that
//! does not; then it ends when the workers that ask it have ended.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::CStr;
use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus};

use crate::cores::{Cores, list};
use crate::given::{self, Given, Process};
use crate::listeners::{Listener, listen_again};
use crate::roles::{Kind, Restart, Role};
use crate::sandbox::{self, Demand};
use crate::settings::MAX_PORTS;
use crate::spawn::{Command, Confinement};
use crate::wire::{self, FromControl, FromWorker, Message, ToControl, ToWorker};

/// Size of a worker's statistics, log and profiles in shared memory, in bytes. It has memory where it is touched alone. The runtime
/// owns the layout; this is all init knows.
pub const STATISTICS_BYTES: u64 = 147_697_664;
/// Files a generation may have beside each worker's own descriptors: as many as have room for their names.
pub const MAX_FILES: usize = 1792;
// `LISTEN_FDNAMES` is one string, and the kernel takes at most 128 KiB of one (Linux, `MAX_ARG_STRLEN`): `file-NAME` for
// each file, `next-https-65535-v4` for the sockets of two cores, and less than 256 bytes of others, with their separators.
const _: () = assert!(MAX_FILES * (wire::MAX_NAME + 6) + MAX_PORTS * 2 * 2 * 20 + 256 < 128 * 1024);
/// Keepers that a generation may have.
pub const MAX_KEEPERS: usize = 64;
/// Keepers that there may be at a time: those of a generation, and those of others that come or go.
pub const KEEPER_SLOTS: usize = 2 * MAX_KEEPERS;
/// Compilers that may run at a time.
pub const MAX_COMPILERS: usize = 2;
/// Requests for a compiler that may wait for one; each is answered when its turn comes.
pub const MAX_TICKETS: usize = 64;
/// A worker that is away for longer has its sockets served by its neighbour.
const STAND_IN_AFTER: Duration = Duration::from_millis(500);
/// A generation that is not ready by then has failed. Under emulation a worker needs about a second.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// An old worker that still may accept by then is killed, with what is inside: a deploy is over only when none does.
const STOPPED_WITHIN: Duration = Duration::from_secs(10);
/// Control, or a worker that has been ready, is killed when it has not beaten for so long, and started again.
const SILENT_FOR: Duration = Duration::from_secs(30);
/// An old worker that has not ended by then is killed: longer than the longest deadline a brane may have.
const DRAINED_WITHIN: Duration = Duration::from_secs(330);
/// What the orderly end may take before the rest is killed.
const END_WITHIN: Duration = Duration::from_secs(5);
/// How long control has, when the last worker is gone, to read what it said and to have it shown.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// A role that lived so long starts its back-off anew.
const SETTLED_AFTER: Duration = Duration::from_secs(30);
/// The longest back-off.
const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// The loop turns at least this often, for heartbeats and the watchdog.
const TURN: Duration = Duration::from_secs(1);
/// And this often while something is left to be shown: a terminal says that it is ready only when it is nearly empty
/// (Linux, `WAKEUP_CHARS` is 256), so it is tried. At 115,200 baud that is 230 characters.
const SHOWING_TURN: Duration = Duration::from_millis(20);
/// How long after the boot the watchdog is petted without any generation. A first deploy takes minutes under emulation;
/// a runtime that has brought up nothing by then, not even an empty generation, is not well.
const FIRST_GENERATION_WITHIN: Duration = Duration::from_mins(10);
/// What is heard of one child in a turn, so that a chatterer cannot keep the loop from turning. More than fit into the
/// kernel's queue of a channel (208 KiB, at least 768 bytes each), so that an ended child is heard to its end.
const MESSAGES_PER_TURN: usize = 512;
/// Of these, lines for the console.
const LINES_PER_TURN: usize = 64;

/// What the supervisor needs from whatever it runs on: the appliance, or an ordinary process.
pub trait Machine {
    /// Shows a line to the operator. Must not wait: what cannot be shown at once is kept for [`Machine::show`].
    fn say(&mut self, line: &str);
    /// Shows a line that control wants the operator to read.
    fn relay(&mut self, line: &str) {
        self.say(&format!("control: {line}"));
    }
    /// Shows what was kept, as far as that needs no waiting. Returns whether something is left.
    fn show(&mut self) -> bool;
    /// A process of this role is about to be started.
    fn prepare(&mut self, _: &Role) {}
    /// The program of a role.
    fn program(&self, role: &Role) -> &CStr {
        role.program
    }
    /// How a process of this role is held; `number` is a worker's core, or a keeper's or compiler's slot.
    fn confinement(&self, role: &Role, number: Option<usize>) -> Confinement<'_>;
    /// Standard input, output and error of a role.
    fn stdio(&self, role: &Role) -> [BorrowedFd<'_>; 3];
    /// What a role gets beside the supervisor's own descriptors, with names.
    fn descriptors(&self, role: &Role) -> Vec<(String, BorrowedFd<'_>)>;
    /// What a role gets in its environment.
    fn environment(&self, role: &Role) -> Vec<(String, String)>;
    /// How the end is announced.
    fn farewell(&self, end: End) -> &'static str {
        match end {
            End::PowerOff => "going down: power off",
            End::Reboot => "going down: reboot",
        }
    }
    /// Where the cgroup of a worker core is, if there is one.
    fn group_of_core(&self, _: usize) -> Option<String> {
        None
    }
    /// What becomes of a role whose sandbox this kernel cannot close whole.
    fn demand(&self) -> Demand {
        Demand::Whole
    }
    /// Called at least once a second while the runtime is well.
    fn pet(&mut self);
}

/// How the supervisor's work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Switch off.
    PowerOff,
    /// Start again.
    Reboot,
}

/// The supervisor cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Signals cannot be read as a descriptor.
    #[error("signalfd: {0}")]
    Signals(nix::errno::Errno),
    /// There is no file in memory for control's key.
    #[error("memfd: {0}")]
    Key(rustix::io::Errno),
    /// Waiting for events failed.
    #[error("poll: {0}")]
    Poll(rustix::io::Errno),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Started, not ready yet. Roles without a ready message skip it.
    Starting,
    /// Ready, waits until its whole generation is.
    Held,
    /// At work.
    Up,
    /// Finishes what is inside.
    Draining,
}

struct Child {
    kind: Kind,
    /// A worker's core, a keeper's or compiler's slot.
    number: Option<usize>,
    pid: i32,
    /// A worker's, or the one that a keeper was first started for.
    generation: u32,
    /// Keepers: what for.
    keeper: Option<Rc<Kept>>,
    phase: Phase,
    since: Instant,
    last_beat: Instant,
    /// The supervisor's end of its channel.
    channel: Option<OwnedFd>,
    /// Workers and keepers: the end that control has a copy of, and the statistics.
    shared: Option<(OwnedFd, OwnedFd)>,
    /// Workers: it may accept, on its own sockets at least.
    accepts: bool,
    /// Workers: it accepts on its neighbour's sockets as well.
    stands_in: bool,
    /// It has been told to end by force; do not say so twice.
    killed: bool,
}

impl Child {
    fn name(&self) -> String {
        seat_name(self.kind, self.number, self.keeper.as_deref())
    }
}

fn seat_name(kind: Kind, number: Option<usize>, keeper: Option<&Kept>) -> String {
    let role = kind.role().name;
    match (keeper, number) {
        (Some(keeper), _) => format!("{role}@{}.{:03}", keeper.brane, keeper.replica),
        (None, Some(number)) => format!("{role}@{number}"),
        (None, None) => role.to_owned(),
    }
}

/// A place that should always be filled: one for each role that is started again, one per worker core, and one for each
/// replica of a pinned brane.
struct Seat {
    kind: Kind,
    /// A worker's core, a keeper's slot.
    core: Option<usize>,
    keeper: Option<Rc<Kept>>,
    restarts: u32,
    /// Ends in a row without settling.
    failures: u32,
    not_before: Instant,
    away_since: Option<Instant>,
}

impl Seat {
    fn empty(kind: Kind, core: Option<usize>, keeper: Option<Rc<Kept>>) -> Self {
        Self { kind, core, keeper, restarts: 0, failures: 0, not_before: Instant::now(), away_since: None }
    }
}

/// A pinned brane, as control asks for its keepers.
struct Pinned {
    brane: String,
    replicas: u32,
    identity: String,
    plan: Rc<OwnedFd>,
    artefact: Rc<OwnedFd>,
}

/// One replica of a pinned brane, for as long as the brane stays what it is: what a process that keeps it is started with.
struct Kept {
    brane: String,
    /// From 1.
    replica: u32,
    identity: String,
    slot: usize,
    /// The generation that it was first started for.
    generation: u32,
    plan: Rc<OwnedFd>,
    artefact: Rc<OwnedFd>,
}

struct Generation {
    number: u32,
    files: Vec<(String, OwnedFd)>,
    pinned: Vec<Pinned>,
    /// Those it has, from its start on.
    keepers: Vec<Rc<Kept>>,
    since: Instant,
    /// What was wrong with its files first; it is not started then.
    fault: Option<String>,
}

impl Generation {
    fn new(number: u32) -> Self {
        let (files, pinned, keepers) = (Vec::new(), Vec::new(), Vec::new());
        Self { number, files, pinned, keepers, since: Instant::now(), fault: None }
    }

    fn keep(&mut self, brane: String, replicas: u32, identity: String, files: Vec<OwnedFd>) {
        let there: usize = self.pinned.iter().map(|pinned| pinned.replicas as usize).sum();
        let fault = match <[OwnedFd; 2]>::try_from(files) {
            Err(_) => format!("the keepers of {brane} came without their plan and artefact"),
            Ok(_) if there + replicas as usize > MAX_KEEPERS => format!("it has more than {MAX_KEEPERS} keepers"),
            Ok(_) if self.pinned.iter().any(|p| p.brane == brane) => format!("the keepers of {brane} came twice"),
            Ok([plan, artefact]) => {
                let (plan, artefact) = (Rc::new(plan), Rc::new(artefact));
                return self.pinned.push(Pinned { brane, replicas, identity, plan, artefact });
            }
        };
        self.fault.get_or_insert(fault);
    }

    fn has(&self, keeper: &Kept) -> bool {
        self.keepers.iter().any(|kept| kept.slot == keeper.slot)
    }

    fn add(&mut self, name: String, file: Option<OwnedFd>) {
        let fault = match file {
            None => format!("file {name} came without its descriptor"),
            Some(_) if self.files.len() >= MAX_FILES => format!("it has more than {MAX_FILES} files"),
            Some(_) if self.files.iter().any(|(n, _)| *n == name) => format!("file {name} came twice"),
            Some(file) => return self.files.push((name, file)),
        };
        self.fault.get_or_insert(fault);
    }
}

/// The requests for a compiler that wait for one, in the order asked.
#[derive(Debug, Default)]
struct Tickets(VecDeque<u32>);

impl Tickets {
    fn take(&mut self, ticket: u32) -> Result<(), String> {
        if self.0.len() >= MAX_TICKETS {
            return Err(format!("{MAX_TICKETS} requests wait for a compiler already"));
        }
        self.0.push_back(ticket);
        Ok(())
    }
}

/// The numbers of generations. None is used twice, not even by a control that does not know what the last one started:
/// so whoever belongs to a number belongs to one attempt.
#[derive(Debug, Default)]
struct Numbers {
    newest: u32,
}

impl Numbers {
    fn take(&mut self, number: u32) -> Result<(), String> {
        if number <= self.newest {
            return Err(format!("no number is used twice, and {} was there already", self.newest));
        }
        self.newest = number;
        Ok(())
    }
}

/// The supervisor and everything it keeps.
pub struct Supervisor<M> {
    machine: M,
    cores: Cores,
    listeners: Vec<Listener>,
    signals: SignalFd,
    children: Vec<Child>,
    seats: Vec<Seat>,
    /// Control's secret, which it fills itself: kept for the next control, and never read here.
    key: OwnedFd,
    current: Option<Generation>,
    next: Option<Generation>,
    incoming: Option<Generation>,
    /// The generation that serves, and the line that says so, as long as they are not told: old workers may still accept.
    untold: Option<(u32, String)>,
    numbers: Numbers,
    tickets: Tickets,
    /// Last sign of life of any worker.
    last_beat: Instant,
    ending: Option<(End, Instant)>,
    /// While it ends: since when no worker is left.
    workers_gone: Option<Instant>,
    started: Instant,
}

impl<M: Machine> Supervisor<M> {
    /// Prepares to supervise. From here on the process's signals arrive at the supervisor.
    ///
    /// `standing` are the roles that run all the time beside the workers.
    ///
    /// # Errors
    /// If the signals cannot be had.
    pub fn new(machine: M, cores: Cores, listeners: Vec<Listener>, standing: &[Kind]) -> Result<Self, Error> {
        let mut set = SigSet::empty();
        for signal in [NixSignal::SIGCHLD, NixSignal::SIGTERM, NixSignal::SIGINT] {
            set.add(signal);
        }
        set.thread_block().map_err(Error::Signals)?;
        let signals =
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(Error::Signals)?;
        let now = Instant::now();
        let seats = standing.iter().map(|kind| Seat::empty(*kind, None, None));
        let workers = cores.workers.iter().map(|core| Seat::empty(Kind::Worker, Some(*core), None));
        let seats = seats.chain(workers).collect();
        Ok(Self {
            machine,
            cores,
            listeners,
            signals,
            children: Vec::new(),
            key: key().map_err(Error::Key)?,
            seats,
            current: None,
            next: None,
            incoming: None,
            untold: None,
            numbers: Numbers::default(),
            tickets: Tickets::default(),
            last_beat: now,
            ending: None,
            workers_gone: None,
            started: now,
        })
    }

    /// Supervises until someone with the right to says how to end.
    ///
    /// # Errors
    /// Only if waiting for events itself fails.
    pub fn run(&mut self) -> Result<End, Error> {
        loop {
            // What was said is heard before anyone's silence is judged, and by the time before that: however long this
            // process was kept from running, nobody else is taken for silent because of it.
            let heard = Instant::now();
            self.read_channels();
            self.read_signals();
            self.turn(heard);
            if let Some((end, deadline)) = self.ending
                && (self.children.is_empty() || Instant::now() > deadline + Duration::from_secs(2))
            {
                return Ok(end);
            }
            self.wait()?;
        }
    }

    fn wait(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let mut timeout = TURN;
        if self.machine.show() {
            timeout = timeout.min(SHOWING_TURN);
        }
        if self.ending.is_none() {
            for seat in self.seats.iter().filter(|s| !self.filled(s)) {
                timeout = timeout.min(seat.not_before.saturating_duration_since(now));
            }
        }
        if self.seats.iter().any(|s| s.away_since.is_some()) || self.ending.is_some() {
            timeout = timeout.min(STAND_IN_AFTER / 5).min(LAST_WORDS);
        }
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(self.children.iter().filter_map(|c| c.channel.as_ref()).map(|c| PollFd::new(c, PollFlags::IN)));
        let timeout = timeout_spec(timeout);
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(Error::Poll(e)),
        }
    }

    fn read_signals(&mut self) {
        let mut reap = false;
        while let Ok(Some(info)) = self.signals.read_signal() {
            match NixSignal::try_from(info.ssi_signo.cast_signed()) {
                Ok(NixSignal::SIGCHLD) => reap = true,
                Ok(NixSignal::SIGTERM) => self.end(End::PowerOff),
                Ok(NixSignal::SIGINT) => self.end(End::Reboot),
                _ => {}
            }
        }
        if reap {
            // What an ended child said last is heard first, while the kernel keeps its number for it.
            let pids: Vec<i32> = self.children.iter().map(|c| c.pid).filter(|pid| !is_alive(*pid)).collect();
            for pid in pids {
                self.hear(pid);
            }
            while let Some((pid, status)) = next_ended() {
                if status.terminating_signal() == Some(Signal::SYS.as_raw()) {
                    self.report_violation(pid);
                }
                self.ended(pid, &cause(status));
            }
        }
    }

    fn read_channels(&mut self) {
        // A child's position may change while its message is acted on, so they are found again by process id.
        let pids: Vec<i32> = self.children.iter().filter(|c| c.channel.is_some()).map(|c| c.pid).collect();
        for pid in pids {
            self.hear(pid);
        }
    }

    fn hear(&mut self, pid: i32) {
        let mut lines = 0;
        for _ in 0..MESSAGES_PER_TURN {
            let Some(child) = self.children.iter().find(|c| c.pid == pid) else { return };
            let Some(channel) = &child.channel else { return };
            let outcome = match child.kind {
                Kind::Control => wire::receive::<FromControl>(channel).map(|(message, fds)| {
                    lines += usize::from(matches!(message, FromControl::Say { .. }));
                    self.hear_control(message, fds);
                }),
                Kind::Worker | Kind::Keeper => {
                    wire::receive::<FromWorker>(channel).map(|(message, _)| self.hear_worker(pid, message))
                }
                _ => Err(wire::Error::Closed),
            };
            match outcome {
                Ok(()) if lines < LINES_PER_TURN => {}
                Ok(()) | Err(wire::Error::WouldBlock) => return,
                Err(e) => {
                    // Both sides of a channel are of one build: who does not keep to the protocol is not itself any more.
                    if !matches!(e, wire::Error::Closed) {
                        self.kill(pid, &format!("spoke nonsense: {e}"));
                    }
                    // Its end is told by the waiter; until then there is nothing more to read.
                    if let Some(child) = self.child_mut(pid) {
                        child.channel = None;
                    }
                    return;
                }
            }
        }
    }

    // ── what others ask for ──────────────────────────────────────────────────────────────────────────────────────

    fn hear_control(&mut self, message: FromControl, descriptors: Vec<OwnedFd>) {
        let now = Instant::now();
        if let Some(control) = self.children.iter_mut().find(|c| c.kind == Kind::Control) {
            control.last_beat = now;
        }
        match message {
            FromControl::Beat => {}
            FromControl::Hello => {
                self.incoming = None;
                self.introduce();
            }
            FromControl::Roles => self.list_roles(),
            FromControl::Cores => {
                let file = toml::to_string(&self.given()).ok().and_then(|text| in_memory("cores", &text).ok());
                let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
                self.tell_control(&ToControl::Cores, &files);
            }
            FromControl::Compile { ticket } => self.queue_for_compiler(ticket),
            FromControl::Say { line } => self.machine.relay(&wire::one_line(&line)),
            FromControl::PowerOff => self.end(End::PowerOff),
            FromControl::Reboot => self.end(End::Reboot),
            FromControl::File { generation, name } => {
                self.incoming(generation).add(name, descriptors.into_iter().next());
            }
            FromControl::Keepers { generation, name, replicas, identity } => {
                self.incoming(generation).keep(name, replicas, identity, descriptors);
            }
            FromControl::Start { generation } => self.start_generation(generation),
        }
    }

    /// The generation whose files are being handed over; those of another are forgotten.
    fn incoming(&mut self, number: u32) -> &mut Generation {
        let incoming = self.incoming.take_if(|g| g.number == number);
        self.incoming.insert(incoming.unwrap_or_else(|| Generation::new(number)))
    }

    fn introduce(&mut self) {
        let (workers, shared) = (self.cores.workers.clone(), self.cores.shared());
        let machine = ToControl::Machine { workers, shared, newest: self.numbers.newest };
        self.tell_control(&machine, &[]);
        if let Some(current) = &self.current {
            let generation = current.number;
            self.tell_control(&ToControl::Generation { generation }, &[]);
            for (name, file) in &current.files {
                self.tell_control(&ToControl::File { generation, name: name.clone() }, &[file.as_fd()]);
            }
        }
        for child in &self.children {
            self.introduce_worker(child);
        }
        self.tell_control(&ToControl::End, &[]);
    }

    fn introduce_worker(&self, child: &Child) {
        let (Some(number), Some((channel, statistics))) = (child.number, &child.shared) else { return };
        let (pid, generation) = (child.pid, child.generation);
        let message = match &child.keeper {
            None => ToControl::Worker { core: number, pid, generation },
            Some(kept) => {
                let (name, identity) = (kept.brane.clone(), kept.identity.clone());
                ToControl::Keeper { pid, generation, name, replica: kept.replica, identity }
            }
        };
        self.tell_control(&message, &[channel.as_fd(), statistics.as_fd()]);
    }

    fn list_roles(&self) {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let now = Instant::now();
        let role = |name, pid, generation, restarts, millis, state: &str, sandbox: &str| {
            let (state, sandbox) = (state.into(), sandbox.into());
            self.tell_control(&ToControl::Role { name, pid, generation, restarts, millis, state, sandbox }, &[]);
        };
        role("init".into(), std::process::id().cast_signed(), 0, 0, millis(now - self.started), "up", "none");
        let kernel = sandbox::not_possible_here().is_empty();
        let demand = self.machine.demand();
        let sandbox = |child: &Child| match sandbox::missing_of(child.pid, demand) {
            _ if demand == Demand::Nothing => "off".to_owned(),
            _ if !kernel => "partly".into(),
            Ok(missing) if missing.is_empty() => "whole".into(),
            Ok(missing) => format!("no-{}", missing.join(".no-")),
            Err(_) => "gone".into(),
        };
        for child in &self.children {
            let restarts = self.seats.iter().find(|s| (s.kind, s.core) == (child.kind, child.number));
            let restarts = restarts.map_or(0, |s| s.restarts);
            let state = match child.phase {
                Phase::Starting | Phase::Held => "starting",
                Phase::Up if child.stands_in => "standing-in",
                Phase::Up => "up",
                Phase::Draining => "draining",
            };
            let age = millis(now - child.since);
            role(child.name(), child.pid, child.generation, restarts, age, state, &sandbox(child));
        }
        for seat in self.seats.iter().filter(|s| !self.filled(s)) {
            let wait = millis(seat.not_before.saturating_duration_since(now));
            let name = seat_name(seat.kind, seat.core, seat.keeper.as_deref());
            role(name, 0, 0, seat.restarts, wait, "waiting", "none");
        }
        self.tell_control(&ToControl::End, &[]);
    }

    /// What the kernel gave the cores, now.
    fn given(&self) -> Given {
        let enforced = self.cores.workers.iter().any(|core| self.machine.group_of_core(*core).is_some());
        let process = |child: &Child| {
            let (home, here) = (Some(self.cores.housekeeping.clone()), |core| Some(vec![core]));
            let (main, others) = match child.kind {
                Kind::Worker => (child.number.and_then(here), home),
                Kind::Keeper => (child.number.and_then(|slot| self.cores.of_keeper(slot)).and_then(here), home),
                // What holds these is the cgroup.
                _ if enforced => (home.clone(), home),
                _ => (None, None),
            };
            Process { role: child.name(), pid: child.pid, main, others }
        };
        // One that starts is still on its way to where it will be.
        let there = self.children.iter().filter(|child| child.phase != Phase::Starting);
        let processes: Vec<_> = there.map(process).collect();
        Given::read(&given::Running, &self.cores, |core| self.machine.group_of_core(core), &processes)
    }

    /// Says what the kernel gave the cores, if it is not simply that all share them.
    fn say_what_was_given(&mut self) {
        let given = self.given();
        if given.enforced || !given.deviations.is_empty() {
            self.machine.say(&format!("cores: {}", given.line()));
        }
        for deviation in &given.deviations {
            self.machine.say(&format!("cores: {deviation}"));
        }
    }

    fn queue_for_compiler(&mut self, ticket: u32) {
        let queued = match self.ending {
            Some(_) => Err("the appliance is going down".to_owned()),
            None => self.tickets.take(ticket),
        };
        match queued {
            Ok(()) => self.start_compilers(),
            Err(reason) => self.tell_control(&ToControl::Refused { ticket, reason }, &[]),
        }
    }

    /// Gives those who wait a compiler each, while a slot is free.
    fn start_compilers(&mut self) {
        while let Some(slot) = self.free_slot()
            && let Some(ticket) = self.tickets.0.pop_front()
        {
            match self.spawn(Kind::Compile, Some(slot), 0) {
                Err(reason) => self.tell_control(&ToControl::Refused { ticket, reason }, &[]),
                Ok(pid) => {
                    // Control alone speaks to a compiler, so its end does not stay here.
                    let channel = self.child_mut(pid).and_then(|c| c.channel.take());
                    if let Some(channel) = channel {
                        self.tell_control(&ToControl::Compiler { ticket, pid }, &[channel.as_fd()]);
                    }
                }
            }
        }
    }

    fn free_slot(&self) -> Option<usize> {
        let taken = |slot| self.children.iter().any(|c| c.kind == Kind::Compile && c.number == Some(slot));
        (0..MAX_COMPILERS).find(|slot| !taken(*slot))
    }

    fn start_generation(&mut self, number: u32) {
        let generation = match self.may_start(number) {
            Ok(generation) => generation,
            Err(reason) => return self.tell_control(&ToControl::Failed { generation: number, reason }, &[]),
        };
        let workers = self.cores.workers.iter().map(|core| (Kind::Worker, *core));
        let fresh = generation.keepers.iter().filter(|kept| kept.generation == number);
        let all: Vec<_> = workers.chain(fresh.map(|kept| (Kind::Keeper, kept.slot))).collect();
        self.next = Some(Generation { since: Instant::now(), ..generation });
        for (kind, place) in all {
            if let Err(reason) = self.spawn(kind, Some(place), number) {
                self.abandon_next(&reason);
                return;
            }
        }
    }

    /// The keepers of a generation that is to start: those that are there for the same, and a place for each of the others.
    fn keepers_for(&self, generation: &Generation) -> Result<Vec<Rc<Kept>>, String> {
        let there = self.current.as_ref().map_or(&[][..], |g| &g.keepers);
        let children = self.children.iter().filter_map(|c| c.keeper.as_ref());
        let mut taken: BTreeSet<usize> = there.iter().chain(children).map(|kept| kept.slot).collect();
        let mut all = Vec::new();
        for pinned in &generation.pinned {
            for replica in 1..=pinned.replicas {
                let same = |kept: &&Rc<Kept>| {
                    (kept.brane == pinned.brane && kept.identity == pinned.identity) && kept.replica == replica
                };
                let kept = match there.iter().find(same) {
                    Some(kept) => Rc::clone(kept),
                    None => Rc::new(Kept {
                        brane: pinned.brane.clone(),
                        replica,
                        identity: pinned.identity.clone(),
                        slot: (0..KEEPER_SLOTS)
                            .find(|slot| taken.insert(*slot))
                            .ok_or_else(|| format!("{KEEPER_SLOTS} keepers are there, and some have not ended yet"))?,
                        generation: generation.number,
                        plan: Rc::clone(&pinned.plan),
                        artefact: Rc::clone(&pinned.artefact),
                    }),
                };
                all.push(kept);
            }
        }
        Ok(all)
    }

    fn may_start(&mut self, number: u32) -> Result<Generation, String> {
        let incoming = self.incoming.take_if(|g| g.number == number);
        self.numbers.take(number)?;
        if self.ending.is_some() {
            return Err("the appliance is going down".into());
        }
        if let Some(next) = &self.next {
            return Err(format!("generation {} is just starting", next.number));
        }
        let mut generation = incoming.ok_or("none of its files have been handed over")?;
        if let Some(fault) = generation.fault {
            return Err(fault);
        }
        generation.keepers = self.keepers_for(&generation)?;
        Ok(generation)
    }

    /// Forgets what a control that has ended wanted: the next one cannot know of it.
    fn forget_control(&mut self) {
        self.incoming = None;
        self.tickets.0.clear();
        let pids: Vec<i32> = self.children.iter().filter(|c| c.kind == Kind::Compile).map(|c| c.pid).collect();
        for pid in pids {
            self.kill(pid, "control ended");
        }
        self.abandon_next("control ended while it started");
    }

    fn hear_worker(&mut self, pid: i32, message: FromWorker) {
        let now = Instant::now();
        let serving = self.current.as_ref().map(|g| g.number);
        let demand = self.machine.demand();
        let Some(at) = self.children.iter().position(|c| c.pid == pid) else { return };
        let child = &mut self.children[at];
        child.last_beat = now;
        if child.kind == Kind::Worker {
            self.last_beat = now;
        }
        if message == FromWorker::Stopped {
            child.accepts = false;
            self.tell_serving();
            return;
        }
        if message == FromWorker::Ready && child.phase == Phase::Starting {
            // Not what it says of itself: what the kernel shows. Where all is demanded, nothing less serves.
            let missing = sandbox::missing_of(pid, demand).unwrap_or_else(|_| vec!["everything"]);
            if demand == Demand::Whole && !missing.is_empty() {
                return self.kill(pid, &format!("its sandbox is not closed: without {}", missing.join(", ")));
            }
            child.phase = Phase::Held;
            let serves = match &child.keeper {
                None => Some(child.generation) == serving,
                Some(kept) => self.current.as_ref().is_some_and(|g| g.has(kept)),
            };
            if serves {
                child.phase = Phase::Up;
                child.accepts = child.kind == Kind::Worker;
                let (name, kind, place, took) = (child.name(), child.kind, child.number, now - child.since);
                self.link_all(pid);
                self.tell_worker(pid, &ToWorker::Accept, &[]);
                let away = self.seat_mut(kind, place).and_then(|s| s.away_since.take());
                let away = away.map_or(took, |since| now - since);
                self.machine.say(&format!("{name} (pid {pid}) is back after {} ms", away.as_millis()));
            } else {
                self.cut_over_when_ready();
            }
        }
    }

    // ── generations ──────────────────────────────────────────────────────────────────────────────────────────────

    fn cut_over_when_ready(&mut self) {
        let Some(next) = &self.next else { return };
        let number = next.number;
        // One that has ended since it said so is not ready: its end, which is told by the waiter, ends the attempt.
        let ready = |c: &&Child| c.generation == number && c.phase == Phase::Held && is_alive(c.pid);
        let fresh = |kind| self.children.iter().filter(move |c| c.kind == kind).filter(ready).map(|c| c.pid);
        let (workers, keepers): (Vec<i32>, Vec<i32>) = (fresh(Kind::Worker).collect(), fresh(Kind::Keeper).collect());
        let wanted = next.keepers.iter().filter(|kept| kept.generation == number).count();
        if workers.len() < self.cores.workers.len() || keepers.len() < wanted {
            return;
        }
        let (took, is_first) = (next.since.elapsed(), self.current.is_none());
        let old: Vec<i32> = self.serving_workers().map(|c| c.pid).collect();
        for pid in old {
            self.drain(pid);
        }
        self.current = self.next.take();
        for pid in keepers.into_iter().chain(workers) {
            if let Some(child) = self.child_mut(pid) {
                child.phase = Phase::Up;
                child.accepts = child.kind == Kind::Worker;
                child.since = Instant::now();
            }
            self.link_all(pid);
            self.tell_worker(pid, &ToWorker::Accept, &[]);
        }
        for seat in self.seats.iter_mut().filter(|s| s.kind == Kind::Worker) {
            (seat.failures, seat.away_since, seat.not_before) = (0, None, Instant::now());
        }
        let kept = self.change_keepers();
        let mut line = format!("serving generation {number}: {} workers", self.cores.workers.len());
        if kept > 0 {
            let _ = write!(line, ", {kept} keepers");
        }
        let _ = write!(line, " ready in {} ms", took.as_millis());
        let mut ports: Vec<&str> = self.listeners.iter().filter_map(|l| l.name.split('-').nth(1)).collect();
        ports.dedup();
        let _ = write!(line, ", listening on port {}", ports.join(", "));
        self.untold = Some((number, line));
        self.tell_serving();
        if is_first {
            self.say_what_was_given();
        }
    }

    /// Tells that the generation serves, once it alone does: whoever connects from then on meets no other. Control first, so that it
    /// knows before anybody reads the line and asks.
    fn tell_serving(&mut self) {
        if self.children.iter().any(|c| c.phase == Phase::Draining && c.accepts) {
            return;
        }
        if let Some((generation, line)) = self.untold.take() {
            self.tell_control(&ToControl::Serving { generation }, &[]);
            self.machine.say(&line);
        }
    }

    /// Makes the keepers' seats those of the generation that now serves, and drains who has none any more. Returns how many
    /// it has.
    fn change_keepers(&mut self) -> usize {
        let Some(current) = &self.current else { return 0 };
        self.seats.retain(|s| s.keeper.as_ref().is_none_or(|kept| current.has(kept)));
        let seated: BTreeSet<usize> = self.seats.iter().filter_map(|s| Some(s.keeper.as_ref()?.slot)).collect();
        let new = current.keepers.iter().filter(|kept| !seated.contains(&kept.slot));
        self.seats.extend(new.map(|kept| Seat::empty(Kind::Keeper, Some(kept.slot), Some(Rc::clone(kept)))));
        let of_before = |c: &&Child| c.keeper.as_ref().is_some_and(|kept| !current.has(kept));
        let leaving = self.children.iter().filter(of_before).filter(|c| c.phase != Phase::Draining);
        let (leaving, kept): (Vec<i32>, usize) = (leaving.map(|c| c.pid).collect(), current.keepers.len());
        for pid in leaving {
            self.drain(pid);
        }
        kept
    }

    /// Links a worker that is about to accept with all keepers of its generation, or a keeper that has become ready with all
    /// workers that know it: those that still finish what is inside may have more for it.
    fn link_all(&mut self, pid: i32) {
        let Some(at) = self.children.iter().position(|c| c.pid == pid) else { return };
        let this = &self.children[at];
        let serves = |c: &&Child| c.phase == Phase::Up;
        let others = self.children.iter().filter(|c| match (&this.keeper, &c.keeper) {
            (None, Some(kept)) => serves(c) && self.current.as_ref().is_some_and(|g| g.has(kept)),
            (Some(kept), None) => {
                let there = matches!(c.phase, Phase::Up | Phase::Draining);
                c.kind == Kind::Worker && there && c.generation >= kept.generation
            }
            _ => false,
        });
        let mut failed = Vec::new();
        for other in others {
            let (worker, keeper) = if this.keeper.is_none() { (this, other) } else { (other, this) };
            if let Err(e) = self.link(worker, keeper) {
                failed.push(format!("{} has no way to {}: {e}", worker.name(), keeper.name()));
            }
        }
        for line in failed {
            self.machine.say(&line);
        }
    }

    /// A stream between them, of which the supervisor keeps nothing.
    fn link(&self, worker: &Child, keeper: &Child) -> Result<(), rustix::io::Errno> {
        let Some(kept) = &keeper.keeper else { return Ok(()) };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (for_worker, for_keeper) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let link = ToWorker::Link { name: kept.brane.clone(), replica: kept.replica };
        self.tell_worker(keeper.pid, &link, &[for_keeper.as_fd()]);
        self.tell_worker(worker.pid, &link, &[for_worker.as_fd()]);
        Ok(())
    }

    fn abandon_next(&mut self, reason: &str) {
        let Some(next) = self.next.take() else { return };
        let pids: Vec<i32> = self
            .children
            .iter()
            .filter(|c| matches!(c.kind, Kind::Worker | Kind::Keeper) && c.generation == next.number)
            .filter(|c| matches!(c.phase, Phase::Starting | Phase::Held))
            .map(|c| c.pid)
            .collect();
        for pid in pids {
            self.kill(pid, "its generation failed");
        }
        self.machine.say(&format!("generation {} did not come up: {reason}", next.number));
        self.tell_control(&ToControl::Failed { generation: next.number, reason: reason.to_owned() }, &[]);
    }

    fn serving_workers(&self) -> impl Iterator<Item = &Child> {
        let serving = self.current.as_ref().map(|g| g.number);
        self.children
            .iter()
            .filter(move |c| c.kind == Kind::Worker && Some(c.generation) == serving && c.phase != Phase::Draining)
    }

    fn drain(&mut self, pid: i32) {
        if let Some(child) = self.child_mut(pid) {
            child.phase = Phase::Draining;
            child.since = Instant::now();
            child.stands_in = false;
        }
        self.tell_worker(pid, &ToWorker::Drain, &[]);
    }

    // ── processes ────────────────────────────────────────────────────────────────────────────────────────────────

    /// `number` is a worker's core, or a keeper's or compiler's slot.
    fn spawn(&mut self, kind: Kind, number: Option<usize>, generation: u32) -> Result<i32, String> {
        let role = kind.role();
        let keeper = [&self.current, &self.next].into_iter().flatten().flat_map(|g| &g.keepers);
        let keeper = keeper.filter(|_| kind == Kind::Keeper).find(|kept| Some(kept.slot) == number).map(Rc::clone);
        let generation = keeper.as_ref().map_or(generation, |kept| kept.generation);
        let words = |step: &'static str| move |e: rustix::io::Errno| format!("{}: {step}: {e}", role.name);
        let (near, far) = wire::pair().map_err(words("socketpair"))?;
        rustix::io::ioctl_fionbio(&near, true).map_err(words("non-blocking"))?;
        // A whole generation's files are announced in one burst; the kernel caps this at net.core.wmem_max.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&near, 4 << 20);
        let shared = match kind {
            Kind::Worker | Kind::Keeper => {
                let (for_control, for_worker) = wire::pair().map_err(words("socketpair"))?;
                Some((for_control, for_worker, statistics().map_err(words("statistics"))?))
            }
            _ => None,
        };
        if kind == Kind::Worker {
            for listener in self.listeners.iter().filter(|l| Some(l.core) == number) {
                if let Err(e) = listen_again(listener) {
                    self.machine.say(&format!("{} of core {}: listening again: {e}", listener.name, listener.core));
                }
            }
        }
        self.machine.prepare(role);
        let mut descriptors: Vec<(String, BorrowedFd<'_>)> = vec![];
        match kind {
            Kind::Control => {
                descriptors.push(("init".into(), far.as_fd()));
                descriptors.push(("key".into(), self.key.as_fd()));
            }
            Kind::Compile => descriptors.push(("control".into(), far.as_fd())),
            Kind::Worker | Kind::Keeper => {
                descriptors.push(("init".into(), far.as_fd()));
                if let Some((_, control, statistics)) = &shared {
                    descriptors.push(("control".into(), control.as_fd()));
                    descriptors.push(("statistics".into(), statistics.as_fd()));
                }
            }
            Kind::Console | Kind::Log => {}
            #[cfg(feature = "debug-role")]
            Kind::Debug => {}
        }
        match (kind, &keeper) {
            (Kind::Keeper, Some(kept)) => {
                descriptors.push(("file-plan".into(), kept.plan.as_fd()));
                descriptors.push(("file-artefact".into(), kept.artefact.as_fd()));
            }
            (Kind::Worker, _) => {
                let files = [&self.current, &self.next].into_iter().flatten().find(|g| g.number == generation);
                for (name, file) in files.into_iter().flat_map(|g| &g.files) {
                    descriptors.push((format!("file-{name}"), file.as_fd()));
                }
                let neighbour = number.and_then(|core| self.cores.stands_in_for(core));
                for (whose, prefix) in [(number, "own"), (neighbour, "next")] {
                    for listener in self.listeners.iter().filter(|l| Some(l.core) == whose) {
                        descriptors.push((format!("{prefix}-{}", listener.name), listener.socket.as_fd()));
                    }
                }
            }
            _ => {}
        }
        descriptors.extend(self.machine.descriptors(role));
        let command = Command {
            program: self.machine.program(role),
            arguments: role.arguments,
            environment: self.environment(role, number, keeper.as_deref()),
            descriptors,
            stdio: self.machine.stdio(role),
            confinement: self.machine.confinement(role, number),
        };
        let pid = command.start().map_err(|e| e.to_string())?;
        let now = Instant::now();
        self.children.push(Child {
            kind,
            number,
            pid,
            generation,
            keeper,
            phase: if matches!(kind, Kind::Worker | Kind::Keeper) { Phase::Starting } else { Phase::Up },
            since: now,
            last_beat: now,
            channel: Some(near),
            shared: shared.map(|(for_control, _, statistics)| (for_control, statistics)),
            accepts: false,
            stands_in: false,
            killed: false,
        });
        if let Some(child) = self.children.last() {
            self.introduce_worker(child);
        }
        Ok(pid)
    }

    fn environment(&self, role: &Role, number: Option<usize>, keeper: Option<&Kept>) -> Vec<(String, String)> {
        let mut environment = self.machine.environment(role);
        environment.push((sandbox::VARIABLE.into(), self.machine.demand().word().into()));
        if let (Kind::Worker, Some(core)) = (role.kind, number) {
            let place = self.cores.workers.iter().position(|c| *c == core).unwrap_or(0);
            environment.push(("GAIA_CORE".into(), core.to_string()));
            environment.push(("GAIA_WORKER".into(), place.to_string()));
        }
        if let Some(kept) = keeper {
            environment.push(("GAIA_NAME".into(), format!("{}.{:03}", kept.brane, kept.replica)));
            environment.push(("GAIA_REPLICA".into(), kept.replica.to_string()));
        }
        if matches!(role.kind, Kind::Worker | Kind::Keeper) {
            environment.push(("GAIA_HOUSEKEEPING".into(), list(&self.cores.housekeeping)));
        }
        environment
    }

    /// Says who made a system call that its sandbox has not, whatever it was about: a compiler, or a worker that drains, whose end
    /// is otherwise nothing to tell, too. The kernel here keeps no audit of its own.
    fn report_violation(&mut self, pid: i32) {
        if let Some(name) = self.child_mut(pid).map(|child| child.name()) {
            self.machine.say(&format!("violation: {name} (pid {pid}) made a system call that its sandbox has not"));
        }
    }

    fn ended(&mut self, pid: i32, cause: &str) {
        let Some(at) = self.children.iter().position(|c| c.pid == pid) else {
            // An orphan that was handed to PID 1, or the failed child of a start that was reported already.
            return;
        };
        let child = self.children.swap_remove(at);
        let name = child.name();
        self.tell_serving();
        if child.kind != Kind::Control {
            self.tell_control(&ToControl::Exited { role: name.clone(), pid, cause: cause.to_owned() }, &[]);
        }
        if self.ending.is_some() || child.phase == Phase::Draining {
            return;
        }
        match child.kind {
            Kind::Control => self.forget_control(),
            Kind::Compile => self.start_compilers(),
            _ => {}
        }
        let tied = matches!(child.kind, Kind::Worker | Kind::Keeper);
        if tied && self.next.as_ref().is_some_and(|g| g.number == child.generation) {
            self.abandon_next(&format!("{name} (pid {pid}) {cause} before it was ready"));
            return;
        }
        let serves = self.current.as_ref().is_some_and(|g| match &child.keeper {
            None => g.number == child.generation,
            Some(kept) => g.has(kept),
        });
        if tied && !serves {
            return;
        }
        if child.kind.role().restart == Restart::Always {
            let now = Instant::now();
            let lived = now - child.since;
            let Some(seat) = self.seat_mut(child.kind, child.number) else { return };
            seat.restarts += 1;
            seat.failures = if lived >= SETTLED_AFTER { 1 } else { seat.failures + 1 };
            let wait = back_off(seat.failures);
            seat.not_before = now + wait;
            seat.away_since.get_or_insert(now);
            self.machine.say(&format!(
                "{name} (pid {pid}) {cause} after {:.1} s; starting it again in {} ms",
                lived.as_secs_f32(),
                wait.as_millis()
            ));
        }
    }

    /// Does what is due. `heard` is a time before which everything that was said has been heard.
    fn turn(&mut self, heard: Instant) {
        let now = Instant::now();
        if self.ending.is_some() {
            self.finish(now);
            return;
        }
        self.fill_seats(now);
        self.lend_sockets(now);
        if self.next.as_ref().is_some_and(|g| heard - g.since > READY_WITHIN) {
            self.abandon_next(&format!("not ready within {} s", READY_WITHIN.as_secs()));
        }
        self.find_silent(heard);
        let beat = self.current.as_ref().map(|_| heard - self.last_beat);
        if is_well(beat, now - self.started) {
            self.machine.pet();
        }
    }

    fn filled(&self, seat: &Seat) -> bool {
        match seat.kind {
            Kind::Worker => self.current.is_none() || self.serving_workers().any(|c| c.number == seat.core),
            Kind::Keeper => {
                let there = |c: &Child| c.kind == Kind::Keeper && c.number == seat.core && c.phase != Phase::Draining;
                self.children.iter().any(there)
            }
            kind => self.children.iter().any(|c| c.kind == kind),
        }
    }

    fn fill_seats(&mut self, now: Instant) {
        let due: Vec<(Kind, Option<usize>)> =
            self.seats.iter().filter(|s| s.not_before <= now && !self.filled(s)).map(|s| (s.kind, s.core)).collect();
        let generation = self.current.as_ref().map_or(0, |g| g.number);
        for (kind, core) in due {
            let generation = if kind == Kind::Worker { generation } else { 0 };
            if let Err(reason) = self.spawn(kind, core, generation) {
                let wait = self.seat_mut(kind, core).map(|seat| {
                    seat.failures += 1;
                    seat.not_before = now + back_off(seat.failures + 1);
                    back_off(seat.failures + 1)
                });
                let wait = wait.unwrap_or_default().as_millis();
                self.machine.say(&format!("{reason}; trying again in {wait} ms"));
            } else if !matches!(kind, Kind::Worker | Kind::Keeper)
                && let Some(seat) = self.seat_mut(kind, core)
            {
                seat.away_since = None;
            }
        }
    }

    /// Has the neighbour of each worker that stays away accept on its sockets, and leave them when it is back.
    fn lend_sockets(&mut self, now: Instant) {
        for core in self.cores.workers.clone() {
            let up = |c: &&Child| c.phase == Phase::Up;
            let away = self.current.is_some() && !self.serving_workers().filter(up).any(|c| c.number == Some(core));
            let long = self.seat(Kind::Worker, Some(core)).and_then(|s| s.away_since);
            let long = long.is_some_and(|since| now - since > STAND_IN_AFTER);
            let Some(by) = self.cores.stand_in(core) else { continue };
            let Some(other) = self.serving_workers().filter(up).find(|c| c.number == Some(by)) else { continue };
            let (pid, lent) = (other.pid, other.stands_in);
            let (message, what) = match (away, lent) {
                (true, false) if long => (ToWorker::Adopt, "accepts on the sockets of"),
                (false, true) => (ToWorker::Release, "leaves the sockets of"),
                _ => continue,
            };
            self.tell_worker(pid, &message, &[]);
            if let Some(child) = self.child_mut(pid) {
                child.stands_in = message == ToWorker::Adopt;
            }
            self.machine.say(&format!("worker@{by} {what} worker@{core}"));
        }
    }

    fn find_silent(&mut self, heard: Instant) {
        let overdue = |c: &Child| {
            overdue(c.kind, c.phase, c.accepts, heard - c.since, heard - c.last_beat).map(|why| (c.pid, why))
        };
        let pids: Vec<(i32, &str)> = self.children.iter().filter_map(overdue).collect();
        for (pid, why) in pids {
            self.kill(pid, why);
        }
    }

    fn kill(&mut self, pid: i32, why: &str) {
        let Some(child) = self.child_mut(pid) else { return };
        if !std::mem::replace(&mut child.killed, true) {
            let line = format!("{} (pid {pid}) is killed: {why}", child.name());
            self.machine.say(&line);
        }
        signal(pid, Signal::KILL);
    }

    // ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────

    fn end(&mut self, end: End) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some((end, Instant::now() + END_WITHIN));
        self.tickets.0.clear();
        self.machine.say(self.machine.farewell(end));
        let run = |c: &&Child| matches!(c.kind, Kind::Worker | Kind::Keeper);
        let pids: Vec<i32> = self.children.iter().filter(run).map(|c| c.pid).collect();
        for pid in pids {
            self.drain(pid);
        }
    }

    /// Ends the other roles once the workers and keepers are gone and what they said last has been read.
    fn finish(&mut self, now: Instant) {
        self.machine.pet();
        if self.children.iter().all(|c| !matches!(c.kind, Kind::Worker | Kind::Keeper)) {
            let since = *self.workers_gone.get_or_insert(now);
            if now - since >= LAST_WORDS {
                // Control at last: the others speak to it.
                let others = self.children.iter().any(|c| c.kind != Kind::Control);
                let due = self.children.iter().filter(|c| !others || c.kind != Kind::Control);
                due.for_each(|c| signal(c.pid, Signal::TERM));
            }
        }
        if self.ending.is_some_and(|(_, deadline)| now > deadline) {
            let pids: Vec<i32> = self.children.iter().map(|c| c.pid).collect();
            for pid in pids {
                self.kill(pid, "did not end by itself");
            }
        }
    }

    // ── small things ─────────────────────────────────────────────────────────────────────────────────────────────

    /// The number of the generation that serves, if one does.
    pub fn serving(&self) -> Option<u32> {
        self.current.as_ref().map(|generation| generation.number)
    }

    /// The machine, for what comes after the supervision.
    pub fn machine(&mut self) -> &mut M {
        &mut self.machine
    }

    fn tell_control(&self, message: &impl Message, descriptors: &[BorrowedFd<'_>]) {
        let Some(control) = self.children.iter().find(|c| c.kind == Kind::Control) else { return };
        let Some(channel) = &control.channel else { return };
        if let Err(wire::Error::WouldBlock | wire::Error::Kernel(_)) = wire::send(channel, message, descriptors) {
            // It does not read, or the kernel carries no more. A new one will ask for everything again, so nothing is
            // lost by this.
            signal(control.pid, Signal::KILL);
        }
    }

    fn tell_worker(&self, pid: i32, message: &ToWorker, descriptors: &[BorrowedFd<'_>]) {
        if let Some(channel) = self.children.iter().find(|c| c.pid == pid).and_then(|c| c.channel.as_ref())
            && let Err(wire::Error::WouldBlock | wire::Error::Kernel(_)) = wire::send(channel, message, descriptors)
        {
            signal(pid, Signal::KILL);
        }
    }

    fn child_mut(&mut self, pid: i32) -> Option<&mut Child> {
        self.children.iter_mut().find(|c| c.pid == pid)
    }

    fn seat(&self, kind: Kind, core: Option<usize>) -> Option<&Seat> {
        self.seats.iter().find(|s| (s.kind, s.core) == (kind, core))
    }

    fn seat_mut(&mut self, kind: Kind, core: Option<usize>) -> Option<&mut Seat> {
        self.seats.iter_mut().find(|s| (s.kind, s.core) == (kind, core))
    }
}

/// How long to wait before starting something that ended `failures` times in a row: not at all the first time, then
/// 100 ms, doubled each time, at most [`MAX_BACK_OFF`].
fn back_off(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        n => (Duration::from_millis(100) * 2_u32.pow((n - 2).min(10))).min(MAX_BACK_OFF),
    }
}

/// Why a process of this kind and phase, started so long ago and heard of last so long ago, is to be killed, if it is.
fn overdue(kind: Kind, phase: Phase, accepts: bool, age: Duration, silence: Duration) -> Option<&'static str> {
    match (kind, phase) {
        (Kind::Worker, Phase::Draining) if accepts && age > STOPPED_WITHIN => Some("still accepting"),
        (Kind::Worker | Kind::Keeper, Phase::Draining) => (age > DRAINED_WITHIN).then_some("still draining"),
        // What it does meanwhile it does in one piece, so it does not beat.
        (Kind::Worker | Kind::Keeper, Phase::Starting | Phase::Held) => {
            (age > READY_WITHIN).then_some("not ready in time")
        }
        (Kind::Worker | Kind::Keeper | Kind::Control, _) => (silence > SILENT_FOR).then_some("silent for too long"),
        _ => None,
    }
}

/// Whether the watchdog may be petted. `beat` is the time since any worker was heard of, if a generation serves.
fn is_well(beat: Option<Duration>, up: Duration) -> bool {
    beat.map_or(up < FIRST_GENERATION_WITHIN, |silence| silence < 4 * SILENT_FOR)
}

fn timeout_spec(d: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), tv_nsec: d.subsec_nanos().into() }
}

fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended already; the waiter says so.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Takes one ended child from the kernel, if there is one. The only place that waits.
fn next_ended() -> Option<(i32, WaitStatus)> {
    loop {
        return match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if status.exited() || status.signaled() => Some((pid.as_raw_pid(), status)),
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => continue,
            Ok(None) | Err(_) => None,
        };
    }
}

/// How a process ended, in words. By number where a signal has no name: the real-time signals have none.
fn cause(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (_, Some(number)) => match NixSignal::try_from(number) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {number}"),
        },
        _ => format!("ended with wait status {:#x}", status.as_raw()),
    }
}

/// Whether a child has not ended, also when its end has not been waited for yet.
fn is_alive(pid: i32) -> bool {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    Pid::from_raw(pid).is_some_and(|pid| matches!(rustix::process::waitid(WaitId::Pid(pid), look), Ok(None)))
}

/// An empty file in memory, which control fills and seals.
fn key() -> Result<OwnedFd, rustix::io::Errno> {
    use rustix::fs::MemfdFlags;
    rustix::fs::memfd_create("key", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
}

/// A text in a file in memory.
fn in_memory(name: &str, text: &str) -> std::io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(file.into())
}

/// Shared memory of a fixed size that neither side can shrink or grow.
fn statistics() -> Result<OwnedFd, rustix::io::Errno> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let fd = rustix::fs::memfd_create("statistics", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, STATISTICS_BYTES)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_starts_at_once_doubles_and_is_bounded() {
        assert_eq!(back_off(1), Duration::ZERO);
        assert_eq!(back_off(2), Duration::from_millis(100));
        assert_eq!(back_off(3), Duration::from_millis(200));
        assert_eq!(back_off(u32::MAX), MAX_BACK_OFF);
    }

    #[test]
    fn statistics_keep_their_size() {
        let fd = statistics().unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size.cast_unsigned(), STATISTICS_BYTES);
    }

    #[test]
    fn requests_for_a_compiler_wait_in_order_and_are_bounded() {
        let mut tickets = Tickets::default();
        for ticket in 0..64 {
            tickets.take(ticket).unwrap();
        }
        assert!(tickets.take(64).unwrap_err().contains("64 requests"));
        assert_eq!(tickets.0.pop_front(), Some(0));
        tickets.take(64).unwrap();
        assert_eq!(tickets.0.pop_back(), Some(64));
    }

    #[test]
    fn no_number_of_a_generation_is_used_twice() {
        let mut numbers = Numbers::default();
        assert!(numbers.take(0).is_err(), "0 means none");
        numbers.take(1).unwrap();
        numbers.take(7).unwrap();
        for old in [0, 1, 5, 7] {
            assert!(numbers.take(old).unwrap_err().contains('7'));
        }
        numbers.take(8).unwrap();
    }

    #[test]
    fn a_generation_remembers_what_was_wrong_first() {
        let null = || Some(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let mut generation = Generation::new(1);
        for n in 0..MAX_FILES {
            generation
                .add(format!("artefact-{n}"), if n == 0 { null() } else { generation.files[0].1.try_clone().ok() });
        }
        assert_eq!(generation.fault, None);
        generation.add("plan".into(), null());
        generation.add("artefact-0".into(), null());
        assert_eq!((generation.files.len(), generation.fault.as_deref()), (1792, Some("it has more than 1792 files")));
        let mut twice = Generation::new(2);
        twice.add("plan".into(), null());
        twice.add("plan".into(), null());
        assert_eq!(twice.fault.as_deref(), Some("file plan came twice"));
        let mut bare = Generation::new(3);
        bare.add("plan".into(), None);
        assert_eq!(bare.fault.as_deref(), Some("file plan came without its descriptor"));
    }

    #[test]
    fn only_those_who_beat_are_judged_by_their_beat() {
        use super::overdue as judged;
        let s = Duration::from_secs;
        let overdue = |kind, phase, age, silence| judged(kind, phase, false, age, silence);
        assert_eq!(overdue(Kind::Worker, Phase::Starting, s(59), s(59)), None, "it has a minute to get ready");
        assert!(overdue(Kind::Worker, Phase::Held, s(61), s(0)).is_some());
        assert_eq!(overdue(Kind::Worker, Phase::Up, s(1000), s(30)), None);
        assert!(overdue(Kind::Keeper, Phase::Up, s(1000), s(31)).is_some());
        assert!(overdue(Kind::Worker, Phase::Up, s(1000), s(31)).is_some());
        assert!(overdue(Kind::Control, Phase::Up, s(1000), s(31)).is_some());
        assert_eq!(overdue(Kind::Console, Phase::Up, s(1000), s(1000)), None);
        assert_eq!(overdue(Kind::Worker, Phase::Draining, s(330), s(330)), None);
        assert_eq!(judged(Kind::Worker, Phase::Draining, true, s(10), s(10)), None);
        assert!(judged(Kind::Worker, Phase::Draining, true, s(11), s(0)).is_some());
    }

    #[test]
    fn the_watchdog_is_petted_by_beats_and_for_ten_minutes_without_a_generation() {
        let s = Duration::from_secs;
        assert!(is_well(None, s(599)) && !is_well(None, s(600)));
        assert!(is_well(Some(s(119)), s(100_000)) && !is_well(Some(s(120)), s(10)));
    }

    #[test]
    #[expect(
        clippy::zombie_processes,
        reason = "it is waited for by its number, for the status as the kernel gives it"
    )]
    fn an_end_by_a_signal_without_a_name_is_noticed_and_told() {
        for (script, words) in [
            ("exit 3", "exited with status 3"),
            ("kill -9 $$", "was killed by SIGKILL"),
            ("kill -40 $$", "was killed by signal 40"),
        ] {
            let child = std::process::Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = child.id().cast_signed();
            let (_, status) = rustix::process::waitpid(Pid::from_raw(pid), WaitOptions::empty()).unwrap().unwrap();
            assert_eq!(cause(status), words);
            assert!(!is_alive(pid));
        }
    }

    #[test]
    fn a_child_that_has_ended_is_not_alive_before_it_is_waited_for() {
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(is_alive(pid));
        drop(child.stdin.take());
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::process::waitid(WaitId::Pid(Pid::from_raw(pid).unwrap()), ended).unwrap();
        assert!(!is_alive(pid));
        assert!(child.wait().unwrap().success());
    }

    /// A machine that only remembers what was said.
    struct Recorder {
        said: Vec<String>,
        null: OwnedFd,
        /// Control's end, to see what it had been told when a line was said.
        control: Option<OwnedFd>,
        told: Vec<String>,
    }

    impl Recorder {
        fn new() -> Self {
            let null = std::fs::File::open("/dev/null").unwrap().into();
            Self { said: Vec::new(), null, control: None, told: Vec::new() }
        }
    }

    impl Machine for Recorder {
        fn say(&mut self, line: &str) {
            self.said.push(line.to_owned());
            if let Some(control) = &self.control {
                let mut text = [0; wire::MAX_MESSAGE];
                let length =
                    rustix::net::recv(control, &mut text, rustix::net::RecvFlags::PEEK).map_or(0, |(length, _)| length);
                self.told.push(String::from_utf8_lossy(&text[..length]).into_owned());
            }
        }
        fn show(&mut self) -> bool {
            false
        }
        fn confinement(&self, _: &Role, _: Option<usize>) -> Confinement<'_> {
            Confinement::default()
        }
        fn stdio(&self, _: &Role) -> [BorrowedFd<'_>; 3] {
            [self.null.as_fd(); 3]
        }
        fn descriptors(&self, _: &Role) -> Vec<(String, BorrowedFd<'_>)> {
            Vec::new()
        }
        fn environment(&self, _: &Role) -> Vec<(String, String)> {
            Vec::new()
        }
        fn pet(&mut self) {}
    }

    /// A supervisor without seats that takes a process of this test for one of its children, and its channel's far end.
    fn supervising(kind: Kind) -> (Supervisor<Recorder>, std::process::Child, OwnedFd) {
        let cores = Cores { housekeeping: vec![0], workers: vec![] };
        let mut supervisor = Supervisor::new(Recorder::new(), cores, Vec::new(), &[]).unwrap();
        let process = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (near, far) = wire::pair().unwrap();
        rustix::io::ioctl_fionbio(&near, true).unwrap();
        rustix::io::ioctl_fionbio(&far, true).unwrap();
        let now = Instant::now();
        supervisor.children.push(Child {
            kind,
            number: None,
            pid: process.id().cast_signed(),
            generation: 0,
            keeper: None,
            phase: Phase::Up,
            since: now,
            last_beat: now,
            channel: Some(near),
            shared: None,
            accepts: false,
            stands_in: false,
            killed: false,
        });
        (supervisor, process, far)
    }

    #[test]
    fn one_word_of_nonsense_ends_its_speaker_and_nothing_more_is_heard_of_it() {
        for kind in [Kind::Control, Kind::Worker] {
            let (mut supervisor, mut process, far) = supervising(kind);
            for _ in 0..100 {
                rustix::net::send(&far, b"\x00nonsense", rustix::net::SendFlags::empty()).unwrap();
            }
            wire::send(&far, &FromControl::Reboot, &[]).unwrap();
            supervisor.read_channels();
            supervisor.read_channels();
            let [line] = supervisor.machine.said.as_slice() else { panic!("{:?}", supervisor.machine.said) };
            assert!(line.contains("is killed: spoke nonsense: not a message"), "{line}");
            assert!(supervisor.ending.is_none());
            let status = std::os::unix::process::ExitStatusExt::signal(&process.wait().unwrap());
            assert_eq!(status, Some(9));
        }
    }

    #[test]
    fn a_violation_is_told_of_whoever_it_was_and_whatever_it_was_about() {
        for (kind, phase) in [(Kind::Compile, Phase::Up), (Kind::Worker, Phase::Draining), (Kind::Control, Phase::Up)] {
            let (mut supervisor, mut process, _far) = supervising(kind);
            supervisor.children[0].phase = phase;
            let pid = supervisor.children[0].pid;
            supervisor.report_violation(pid);
            supervisor.report_violation(1);
            let [line] = supervisor.machine.said.as_slice() else { panic!("{:?}", supervisor.machine.said) };
            assert!(line.starts_with(&format!("violation: {} (pid {pid})", kind.role().name)), "{line}");
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    #[test]
    fn a_worker_that_is_not_held_whole_is_killed_when_it_says_ready() {
        let (mut supervisor, mut process, far) = supervising(Kind::Worker);
        supervisor.children[0].phase = Phase::Starting;
        wire::send(&far, &FromWorker::Ready, &[]).unwrap();
        supervisor.read_channels();
        let [line] = supervisor.machine.said.as_slice() else { panic!("{:?}", supervisor.machine.said) };
        assert!(line.contains("its sandbox is not closed: without ") && line.contains("seccomp"), "{line}");
        assert_eq!(supervisor.children[0].phase, Phase::Starting, "it does not serve");
        let status = std::os::unix::process::ExitStatusExt::signal(&process.wait().unwrap());
        assert_eq!(status, Some(9));
    }

    #[test]
    fn lines_for_the_console_are_taken_a_few_in_a_turn_and_none_is_lost() {
        let (mut supervisor, mut process, far) = supervising(Kind::Control);
        for n in 0..100 {
            wire::send(&far, &FromControl::Say { line: format!("line {n}") }, &[]).unwrap();
        }
        rustix::net::send(&far, b"say \x1b[2Jgone\nfaked", rustix::net::SendFlags::empty()).unwrap();
        supervisor.read_channels();
        assert_eq!(supervisor.machine.said.len(), LINES_PER_TURN);
        supervisor.read_channels();
        assert_eq!(supervisor.machine.said.len(), 101);
        assert_eq!(supervisor.machine.said[100], "control:  [2Jgone faked");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    fn asked(number: u32, branes: &[(&str, u32, &str)]) -> Generation {
        let mut generation = Generation::new(number);
        for (brane, replicas, identity) in branes {
            let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
            generation.keep((*brane).into(), *replicas, (*identity).into(), vec![null(), null()]);
        }
        generation
    }

    #[test]
    fn a_keeper_whose_brane_is_the_same_has_its_place_in_the_next_generation() {
        let cores = Cores { housekeeping: vec![0], workers: vec![] };
        let mut supervisor = Supervisor::new(Recorder::new(), cores, Vec::new(), &[]).unwrap();
        let mut deployed = |generation: Generation| {
            let keepers = supervisor.keepers_for(&generation).unwrap();
            let shown: Vec<_> = keepers.iter().map(|k| (k.brane.clone(), k.replica, k.slot, k.generation)).collect();
            supervisor.current = Some(Generation { keepers, ..generation });
            supervisor.change_keepers();
            assert_eq!(supervisor.seats.iter().filter(|s| s.kind == Kind::Keeper).count(), shown.len());
            shown
        };
        let a = |replica, slot, generation| ("a".to_owned(), replica, slot, generation);
        let b = |replica, slot, generation| ("b".to_owned(), replica, slot, generation);
        assert_eq!(deployed(asked(1, &[("a", 2, "x"), ("b", 1, "y")])), [a(1, 0, 1), a(2, 1, 1), b(1, 2, 1)]);
        assert_eq!(
            deployed(asked(2, &[("b", 2, "y"), ("a", 2, "z")])),
            [b(1, 2, 1), b(2, 3, 2), a(1, 4, 2), a(2, 5, 2)]
        );
        assert_eq!(deployed(asked(3, &[("a", 1, "z")])), [a(1, 4, 2)], "one less is the last one less");
        assert_eq!(deployed(asked(4, &[("a", 1, "y")])), [a(1, 0, 4)], "a place that is free again");
        assert_eq!(deployed(asked(5, &[])), []);
    }

    /// Would miss: whoever reads the line and asks control, which does not know of it yet.
    #[test]
    fn control_is_told_that_a_generation_serves_before_the_line_is_said() {
        let (mut supervisor, mut process, far) = supervising(Kind::Control);
        supervisor.machine.control = Some(far);
        supervisor.next = Some(asked(1, &[]));
        supervisor.cut_over_when_ready();
        assert!(supervisor.machine.said[0].starts_with("serving generation 1: "), "{:?}", supervisor.machine.said);
        assert_eq!(supervisor.machine.told[0], "serving 1");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn keepers_are_asked_for_once_with_their_files_and_not_too_many() {
        let most = u32::try_from(MAX_KEEPERS).unwrap();
        assert_eq!(asked(1, &[("a", most - 1, "x"), ("b", 1, "x")]).fault, None);
        assert_eq!(asked(1, &[("a", most, "x"), ("b", 1, "x")]).fault.unwrap(), "it has more than 64 keepers");
        assert_eq!(asked(1, &[("a", u32::MAX, "x")]).fault.unwrap(), "it has more than 64 keepers");
        assert_eq!(asked(1, &[("a", 1, "x"), ("a", 1, "y")]).fault.unwrap(), "the keepers of a came twice");
        let mut bare = Generation::new(1);
        bare.keep("a".into(), 1, "x".into(), Vec::new());
        assert!(bare.fault.unwrap().contains("without"));
    }

    #[test]
    fn a_worker_and_a_keeper_get_the_ends_of_one_stream() {
        let (mut supervisor, mut worker, for_worker) = supervising(Kind::Worker);
        let (other, mut keeper, for_keeper) = supervising(Kind::Keeper);
        supervisor.children.extend(other.children);
        let generation = asked(1, &[("counter", 1, "x")]);
        let keepers = supervisor.keepers_for(&generation).unwrap();
        supervisor.children[0].generation = 1;
        supervisor.children[1].generation = 1;
        supervisor.children[1].keeper = Some(Rc::clone(&keepers[0]));
        supervisor.current = Some(Generation { keepers, ..generation });
        for started_anew in [0, 1] {
            supervisor.link_all(supervisor.children[started_anew].pid);
            let mut ends = [&for_worker, &for_keeper].map(|channel| {
                let (message, mut ends) = wire::receive::<ToWorker>(channel).unwrap();
                assert_eq!(message, ToWorker::Link { name: "counter".into(), replica: 1 });
                std::os::unix::net::UnixStream::from(ends.remove(0))
            });
            std::io::Write::write_all(&mut ends[0], b"x").unwrap();
            let mut byte = [0];
            std::io::Read::read_exact(&mut ends[1], &mut byte).unwrap();
            assert_eq!(byte, *b"x");
        }
        // Not with one of a generation before the keeper's.
        supervisor.children[0].generation = 0;
        supervisor.link_all(supervisor.children[1].pid);
        assert!(matches!(wire::receive::<ToWorker>(&for_worker), Err(wire::Error::WouldBlock)));
        assert_eq!(supervisor.machine.said, [] as [&str; 0]);
        for process in [&mut worker, &mut keeper] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    #[test]
    fn control_is_told_that_a_generation_serves_when_no_old_worker_accepts_any_more() {
        for by_its_end in [false, true] {
            let (mut supervisor, mut control, told) = supervising(Kind::Control);
            let (other, mut worker, from_worker) = supervising(Kind::Worker);
            supervisor.children.extend(other.children);
            let old = supervisor.children[1].pid;
            supervisor.children[1].accepts = true;
            supervisor.untold = Some((7, String::new()));
            supervisor.drain(old);
            supervisor.tell_serving();
            wire::send(&from_worker, &FromWorker::Beat, &[]).unwrap();
            supervisor.read_channels();
            assert!(matches!(wire::receive::<ToControl>(&told), Err(wire::Error::WouldBlock)));
            if by_its_end {
                supervisor.ended(old, "was killed by SIGKILL");
            } else {
                wire::send(&from_worker, &FromWorker::Stopped, &[]).unwrap();
                supervisor.read_channels();
            }
            let (first, _) = wire::receive::<ToControl>(&told).unwrap();
            assert_eq!(first, ToControl::Serving { generation: 7 });
            supervisor.tell_serving();
            assert!(!matches!(wire::receive::<ToControl>(&told), Ok((ToControl::Serving { .. }, _))));
            for process in [&mut control, &mut worker] {
                process.kill().unwrap();
                process.wait().unwrap();
            }
        }
    }

    #[test]
    fn a_generation_starts_once_and_what_a_dead_control_wanted_is_forgotten() {
        let (mut supervisor, mut process, far) = supervising(Kind::Control);
        let mut answers = |message: &FromControl| {
            let null = std::fs::File::open("/dev/null").unwrap();
            let files = if matches!(message, FromControl::File { .. }) { &[null.as_fd()][..] } else { &[] };
            wire::send(&far, message, files).unwrap();
            supervisor.read_channels();
            let mut text = [0; wire::MAX_MESSAGE];
            let next = || {
                let (length, _) = rustix::net::recv(&far, &mut text, rustix::net::RecvFlags::empty()).ok()?;
                Some(String::from_utf8_lossy(&text[..length]).into_owned())
            };
            std::iter::from_fn(next).collect::<Vec<_>>()
        };
        let plan = |generation| FromControl::File { generation, name: "plan".into() };
        let start = |generation| FromControl::Start { generation };
        assert!(answers(&start(1))[0].starts_with("failed 1 none of its files"));
        answers(&plan(1));
        assert!(answers(&start(1))[0].starts_with("failed 1 no number is used twice"));
        answers(&plan(2));
        let hello = answers(&FromControl::Hello);
        assert!(hello[0].starts_with("machine ") && hello[0].ends_with(" 1") && hello[1] == "end", "{hello:?}");
        answers(&plan(2));
        assert!(
            answers(&start(2)).is_empty(),
            "it starts; the plan from before the hello would have been a second one"
        );
        answers(&plan(3));
        assert!(answers(&start(3))[0].starts_with("failed 3 generation 2 is just starting"));
        answers(&plan(4));

        supervisor.tickets.take(1).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        supervisor.ended(process.id().cast_signed(), "was killed");
        assert!(supervisor.next.is_none() && supervisor.incoming.is_none() && supervisor.tickets.0.is_empty());
        assert_eq!(supervisor.numbers.newest, 3);
        assert!(supervisor.machine.said.iter().any(|l| l.contains("control ended while it started")));
    }
}
