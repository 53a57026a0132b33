//! The supervisor: one thread, one `poll`, one waiter for every child.
//!
//! It is responsible for
//! - starting each role from the table and starting it again when it ends, with back-off,
//! - keeping what must outlive any role: listening sockets, the far ends of the channels, a generation's files,
//! - cutting over from one generation of workers to the next, all ready before any old one stops accepting,
//! - lending a worker's sockets to its neighbour while the worker stays away,
//! - killing what no longer beats, and ending everything in order.
//!
//! ```text
//! a worker:   start ─▶ Starting ── ready ─▶ Held ── all of its generation ready ─▶ Up ── drain ─▶ Draining ─▶ end
//!                                             └── its generation serves already ─────▲
//! ```

use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};

use crate::cores::{Cores, list};
use crate::listeners::Listener;
use crate::roles::{Kind, Restart, Role};
use crate::spawn::{Command, Confinement};
use crate::wire::{self, FromControl, FromWorker, Message, ToControl, ToWorker};

/// Size of a worker's statistics in shared memory, in bytes. The runtime owns the layout; this is all init knows.
pub const STATISTICS_BYTES: u64 = 64 * 1024;
/// Files a generation may have beside each worker's own descriptors.
pub const MAX_FILES: usize = 2048;
/// Compilers that may run at a time.
pub const MAX_COMPILERS: usize = 2;
/// A worker that is away for longer has its sockets served by its neighbour.
const STAND_IN_AFTER: Duration = Duration::from_millis(500);
/// A generation that is not ready by then has failed. Under emulation a worker needs about a second.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// A role that is up and has not beaten for so long is killed and started again.
const SILENT_FOR: Duration = Duration::from_secs(30);
/// An old worker that has not ended by then is killed: longer than the longest deadline a brane may have.
const DRAINED_WITHIN: Duration = Duration::from_secs(330);
/// What the orderly end may take before the rest is killed.
const END_WITHIN: Duration = Duration::from_secs(5);
/// A role that lived so long starts its back-off anew.
const SETTLED_AFTER: Duration = Duration::from_secs(30);
/// The longest back-off.
const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// The loop turns at least this often, for heartbeats and the watchdog.
const TURN: Duration = Duration::from_secs(1);

/// What the supervisor needs from whatever it runs on: the appliance, or an ordinary process.
pub trait Machine {
    /// Shows a line to the operator. Must not block for long.
    fn say(&mut self, line: &str);
    /// How a process of this role on this core is held.
    fn confinement(&self, role: &Role, core: Option<usize>) -> Confinement<'_>;
    /// Standard input, output and error of a role.
    fn stdio(&self, role: &Role) -> [BorrowedFd<'_>; 3];
    /// What a role gets beside the supervisor's own descriptors, with names.
    fn descriptors(&self, role: &Role) -> Vec<(String, BorrowedFd<'_>)>;
    /// What a role gets in its environment.
    fn environment(&self, role: &Role) -> Vec<(String, String)>;
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
    core: Option<usize>,
    pid: i32,
    generation: u32,
    phase: Phase,
    since: Instant,
    last_beat: Instant,
    /// The supervisor's end of its channel.
    channel: Option<OwnedFd>,
    /// Workers: the end that control has a copy of, and the statistics.
    shared: Option<(OwnedFd, OwnedFd)>,
    /// Workers: it accepts on its neighbour's sockets as well.
    stands_in: bool,
    /// It has been told to end by force; do not say so twice.
    killed: bool,
}

impl Child {
    fn name(&self) -> String {
        seat_name(self.kind, self.core)
    }
}

fn seat_name(kind: Kind, core: Option<usize>) -> String {
    match core {
        Some(core) => format!("{}@{core}", kind.role().name),
        None => kind.role().name.to_owned(),
    }
}

/// A place that should always be filled: one for each role that is started again, and one per worker core.
struct Seat {
    kind: Kind,
    core: Option<usize>,
    restarts: u32,
    /// Ends in a row without settling.
    failures: u32,
    not_before: Instant,
    away_since: Option<Instant>,
}

struct Generation {
    number: u32,
    files: Vec<(String, OwnedFd)>,
    since: Instant,
}

/// The supervisor and everything it keeps.
pub struct Supervisor<M> {
    machine: M,
    cores: Cores,
    listeners: Vec<Listener>,
    signals: SignalFd,
    children: Vec<Child>,
    seats: Vec<Seat>,
    current: Option<Generation>,
    next: Option<Generation>,
    incoming: Option<Generation>,
    /// Last sign of life of any worker.
    last_beat: Instant,
    ending: Option<(End, Instant)>,
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
        let empty = |kind, core| Seat { kind, core, restarts: 0, failures: 0, not_before: now, away_since: None };
        let seats = standing.iter().map(|kind| empty(*kind, None));
        let seats = seats.chain(cores.workers.iter().map(|core| empty(Kind::Worker, Some(*core)))).collect();
        Ok(Self {
            machine,
            cores,
            listeners,
            signals,
            children: Vec::new(),
            seats,
            current: None,
            next: None,
            incoming: None,
            last_beat: now,
            ending: None,
            started: now,
        })
    }

    /// Supervises until someone with the right to says how to end.
    ///
    /// # Errors
    /// Only if waiting for events itself fails.
    pub fn run(&mut self) -> Result<End, Error> {
        loop {
            self.turn();
            if let Some((end, deadline)) = self.ending
                && (self.children.is_empty() || Instant::now() > deadline + Duration::from_secs(2))
            {
                return Ok(end);
            }
            self.wait()?;
            self.read_signals();
            self.read_channels();
        }
    }

    fn wait(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let mut timeout = TURN;
        for seat in &self.seats {
            if seat.not_before > now && !self.filled(seat) {
                timeout = timeout.min(seat.not_before - now);
            }
        }
        if self.seats.iter().any(|s| s.away_since.is_some()) || self.ending.is_some() {
            timeout = timeout.min(STAND_IN_AFTER / 5);
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
            while let Some((pid, cause)) = next_ended() {
                self.ended(pid, &cause);
            }
        }
    }

    fn read_channels(&mut self) {
        // A child's position may change while its message is acted on, so they are found again by process id.
        let pids: Vec<i32> = self.children.iter().filter(|c| c.channel.is_some()).map(|c| c.pid).collect();
        for pid in pids {
            // Bounded, so that a chatterer cannot keep the loop from turning.
            for _ in 0..256 {
                let Some(child) = self.children.iter().find(|c| c.pid == pid) else { break };
                let Some(channel) = &child.channel else { break };
                let outcome = match child.kind {
                    Kind::Control => {
                        wire::receive::<FromControl>(channel).map(|(message, fds)| self.hear_control(message, fds))
                    }
                    Kind::Worker => {
                        wire::receive::<FromWorker>(channel).map(|(message, _)| self.hear_worker(pid, message))
                    }
                    _ => Err(wire::Error::Closed),
                };
                match outcome {
                    Ok(()) => {}
                    Err(wire::Error::WouldBlock) => break,
                    Err(wire::Error::Closed) => {
                        // Its end is told by the waiter; until then there is nothing more to read.
                        if let Some(child) = self.child_mut(pid) {
                            child.channel = None;
                        }
                        break;
                    }
                    Err(e) => {
                        let name = self.children.iter().find(|c| c.pid == pid).map_or_else(String::new, Child::name);
                        self.machine.say(&format!("{name}: message dropped: {e}"));
                    }
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
            FromControl::Hello => self.introduce(),
            FromControl::Roles => self.list_roles(),
            FromControl::Compile { ticket } => self.start_compiler(ticket),
            FromControl::Say { line } => self.machine.say(&format!("control: {line}")),
            FromControl::PowerOff => self.end(End::PowerOff),
            FromControl::Reboot => self.end(End::Reboot),
            FromControl::File { generation, name } => {
                if self.incoming.as_ref().is_none_or(|g| g.number != generation) {
                    self.incoming = Some(Generation { number: generation, files: Vec::new(), since: now });
                }
                if let (Some(incoming), Some(file)) = (&mut self.incoming, descriptors.into_iter().next())
                    && incoming.files.len() < MAX_FILES
                {
                    incoming.files.push((name, file));
                }
            }
            FromControl::Start { generation } => self.start_generation(generation),
        }
    }

    fn introduce(&mut self) {
        let machine = ToControl::Machine { workers: self.cores.workers.clone(), shared: self.cores.shared() };
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
        if let (Some(core), Some((channel, statistics))) = (child.core, &child.shared) {
            let message = ToControl::Worker { core, pid: child.pid, generation: child.generation };
            self.tell_control(&message, &[channel.as_fd(), statistics.as_fd()]);
        }
    }

    fn list_roles(&self) {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let now = Instant::now();
        let role = |name, pid, generation, restarts, millis, state: &str| {
            self.tell_control(&ToControl::Role { name, pid, generation, restarts, millis, state: state.into() }, &[]);
        };
        role("init".into(), std::process::id().cast_signed(), 0, 0, millis(now - self.started), "up");
        for child in &self.children {
            let restarts = self.seats.iter().find(|s| (s.kind, s.core) == (child.kind, child.core));
            let restarts = restarts.map_or(0, |s| s.restarts);
            let state = match child.phase {
                Phase::Starting | Phase::Held => "starting",
                Phase::Up if child.stands_in => "standing-in",
                Phase::Up => "up",
                Phase::Draining => "draining",
            };
            role(child.name(), child.pid, child.generation, restarts, millis(now - child.since), state);
        }
        for seat in self.seats.iter().filter(|s| !self.filled(s)) {
            let wait = millis(seat.not_before.saturating_duration_since(now));
            role(seat_name(seat.kind, seat.core), 0, 0, seat.restarts, wait, "waiting");
        }
        self.tell_control(&ToControl::End, &[]);
    }

    fn start_compiler(&mut self, ticket: u32) {
        let refuse = |reason: String| ToControl::Refused { ticket, reason };
        if self.children.iter().filter(|c| c.kind == Kind::Compile).count() >= MAX_COMPILERS {
            self.tell_control(&refuse(format!("{MAX_COMPILERS} compilers are running already")), &[]);
            return;
        }
        match self.spawn(Kind::Compile, None, 0) {
            Err(reason) => self.tell_control(&refuse(reason), &[]),
            Ok(pid) => {
                // Control alone speaks to a compiler, so its end does not stay here.
                let channel = self.child_mut(pid).and_then(|c| c.channel.take());
                if let Some(channel) = channel {
                    self.tell_control(&ToControl::Compiler { ticket, pid }, &[channel.as_fd()]);
                }
            }
        }
    }

    fn start_generation(&mut self, number: u32) {
        let failed = |reason: &str| ToControl::Failed { generation: number, reason: reason.to_owned() };
        match self.incoming.take_if(|g| g.number == number) {
            None => self.tell_control(&failed("none of its files have been handed over"), &[]),
            Some(_) if self.next.is_some() => self.tell_control(&failed("another generation is just starting"), &[]),
            Some(_) if self.ending.is_some() => self.tell_control(&failed("the appliance is going down"), &[]),
            Some(mut generation) => {
                generation.since = Instant::now();
                self.next = Some(generation);
                for core in self.cores.workers.clone() {
                    if let Err(reason) = self.spawn(Kind::Worker, Some(core), number) {
                        self.abandon_next(&reason);
                        return;
                    }
                }
            }
        }
    }

    fn hear_worker(&mut self, pid: i32, message: FromWorker) {
        let now = Instant::now();
        self.last_beat = now;
        let serving = self.current.as_ref().map(|g| g.number);
        let Some(child) = self.child_mut(pid) else { return };
        child.last_beat = now;
        if message == FromWorker::Ready && child.phase == Phase::Starting {
            child.phase = Phase::Held;
            if Some(child.generation) == serving {
                child.phase = Phase::Up;
                let (name, core, took) = (child.name(), child.core, now - child.since);
                self.tell_worker(pid, ToWorker::Accept);
                let away = self.seat_mut(Kind::Worker, core).and_then(|s| s.away_since.take());
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
        let ready = |c: &&Child| c.kind == Kind::Worker && c.generation == number && c.phase == Phase::Held;
        if self.children.iter().filter(ready).count() < self.cores.workers.len() {
            return;
        }
        let took = next.since.elapsed();
        let old: Vec<i32> = self.serving_workers().map(|c| c.pid).collect();
        for pid in old {
            self.drain(pid);
        }
        self.current = self.next.take();
        let fresh: Vec<i32> = self.children.iter().filter(ready).map(|c| c.pid).collect();
        for pid in fresh {
            if let Some(child) = self.child_mut(pid) {
                child.phase = Phase::Up;
                child.since = Instant::now();
            }
            self.tell_worker(pid, ToWorker::Accept);
        }
        for seat in self.seats.iter_mut().filter(|s| s.kind == Kind::Worker) {
            (seat.failures, seat.away_since, seat.not_before) = (0, None, Instant::now());
        }
        let mut line = format!(
            "serving generation {number}: {} workers ready in {} ms",
            self.cores.workers.len(),
            took.as_millis()
        );
        let mut ports: Vec<&str> = self.listeners.iter().filter_map(|l| l.name.split('-').nth(1)).collect();
        ports.dedup();
        let _ = write!(line, ", listening on port {}", ports.join(", "));
        self.machine.say(&line);
        self.tell_control(&ToControl::Serving { generation: number }, &[]);
    }

    fn abandon_next(&mut self, reason: &str) {
        let Some(next) = self.next.take() else { return };
        let pids: Vec<i32> = self
            .children
            .iter()
            .filter(|c| c.kind == Kind::Worker && c.generation == next.number)
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
        self.tell_worker(pid, ToWorker::Drain);
    }

    // ── processes ────────────────────────────────────────────────────────────────────────────────────────────────

    fn spawn(&mut self, kind: Kind, core: Option<usize>, generation: u32) -> Result<i32, String> {
        let role = kind.role();
        let words = |step: &'static str| move |e: rustix::io::Errno| format!("{}: {step}: {e}", role.name);
        let (near, far) = wire::pair().map_err(words("socketpair"))?;
        rustix::io::ioctl_fionbio(&near, true).map_err(words("non-blocking"))?;
        // A whole generation's files are announced in one burst; the kernel caps this at net.core.wmem_max.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&near, 4 << 20);
        let shared = match kind {
            Kind::Worker => {
                let (for_control, for_worker) = wire::pair().map_err(words("socketpair"))?;
                Some((for_control, for_worker, statistics().map_err(words("statistics"))?))
            }
            _ => None,
        };
        let mut descriptors: Vec<(String, BorrowedFd<'_>)> = vec![];
        match kind {
            Kind::Control => descriptors.push(("init".into(), far.as_fd())),
            Kind::Compile => descriptors.push(("control".into(), far.as_fd())),
            Kind::Worker => {
                descriptors.push(("init".into(), far.as_fd()));
                if let Some((_, control, statistics)) = &shared {
                    descriptors.push(("control".into(), control.as_fd()));
                    descriptors.push(("statistics".into(), statistics.as_fd()));
                }
                let files = [&self.current, &self.next].into_iter().flatten().find(|g| g.number == generation);
                for (name, file) in files.into_iter().flat_map(|g| &g.files) {
                    descriptors.push((format!("file-{name}"), file.as_fd()));
                }
                let neighbour = core.and_then(|c| self.cores.stands_in_for(c));
                for (whose, prefix) in [(core, "own"), (neighbour, "next")] {
                    for listener in self.listeners.iter().filter(|l| Some(l.core) == whose) {
                        descriptors.push((format!("{prefix}-{}", listener.name), listener.socket.as_fd()));
                    }
                }
            }
            Kind::Console => {}
            #[cfg(feature = "debug-role")]
            Kind::Debug => {}
        }
        descriptors.extend(self.machine.descriptors(role));
        let mut environment = self.machine.environment(role);
        if let Some(core) = core {
            let number = self.cores.workers.iter().position(|c| *c == core).unwrap_or(0);
            environment.push(("GAIA_CORE".into(), core.to_string()));
            environment.push(("GAIA_WORKER".into(), number.to_string()));
            environment.push(("GAIA_HOUSEKEEPING".into(), list(&self.cores.housekeeping)));
        }
        let command = Command {
            program: role.program,
            arguments: role.arguments,
            environment,
            descriptors,
            stdio: self.machine.stdio(role),
            confinement: self.machine.confinement(role, core),
        };
        let pid = command.start().map_err(|e| e.to_string())?;
        let now = Instant::now();
        self.children.push(Child {
            kind,
            core,
            pid,
            generation,
            phase: if kind == Kind::Worker { Phase::Starting } else { Phase::Up },
            since: now,
            last_beat: now,
            channel: Some(near),
            shared: shared.map(|(for_control, _, statistics)| (for_control, statistics)),
            stands_in: false,
            killed: false,
        });
        if let Some(child) = self.children.last() {
            self.introduce_worker(child);
        }
        Ok(pid)
    }

    fn ended(&mut self, pid: i32, cause: &str) {
        let Some(at) = self.children.iter().position(|c| c.pid == pid) else {
            // An orphan that was handed to PID 1, or the failed child of a start that was reported already.
            return;
        };
        let child = self.children.swap_remove(at);
        let name = child.name();
        if child.kind != Kind::Control {
            self.tell_control(&ToControl::Exited { role: name.clone(), pid, cause: cause.to_owned() }, &[]);
        }
        if self.ending.is_some() || child.phase == Phase::Draining {
            return;
        }
        if child.kind == Kind::Worker && self.next.as_ref().is_some_and(|g| g.number == child.generation) {
            self.abandon_next(&format!("{name} (pid {pid}) {cause} before it was ready"));
            return;
        }
        if child.kind == Kind::Worker && self.current.as_ref().is_none_or(|g| g.number != child.generation) {
            return;
        }
        if child.kind.role().restart == Restart::Always {
            let now = Instant::now();
            let lived = now - child.since;
            let Some(seat) = self.seat_mut(child.kind, child.core) else { return };
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

    fn turn(&mut self) {
        let now = Instant::now();
        if self.ending.is_some() {
            self.finish(now);
            return;
        }
        self.fill_seats(now);
        self.lend_sockets(now);
        self.find_silent(now);
        if self.next.as_ref().is_some_and(|g| now - g.since > READY_WITHIN) {
            self.abandon_next(&format!("not ready within {} s", READY_WITHIN.as_secs()));
        }
        // Before the first generation there is no worker to beat; a runtime that never comes up is not hung.
        if self.current.is_none() || now - self.last_beat < 4 * SILENT_FOR {
            self.machine.pet();
        }
    }

    fn filled(&self, seat: &Seat) -> bool {
        match seat.kind {
            Kind::Worker => self.current.is_none() || self.serving_workers().any(|c| c.core == seat.core),
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
            } else if kind != Kind::Worker
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
            let away = self.current.is_some() && !self.serving_workers().filter(up).any(|c| c.core == Some(core));
            let long = self.seat(Kind::Worker, Some(core)).and_then(|s| s.away_since);
            let long = long.is_some_and(|since| now - since > STAND_IN_AFTER);
            let Some(by) = self.cores.stand_in(core) else { continue };
            let Some(other) = self.serving_workers().filter(up).find(|c| c.core == Some(by)) else { continue };
            let (pid, lent) = (other.pid, other.stands_in);
            let (message, what) = match (away, lent) {
                (true, false) if long => (ToWorker::Adopt, "accepts on the sockets of"),
                (false, true) => (ToWorker::Release, "leaves the sockets of"),
                _ => continue,
            };
            self.tell_worker(pid, message);
            if let Some(child) = self.child_mut(pid) {
                child.stands_in = message == ToWorker::Adopt;
            }
            self.machine.say(&format!("worker@{by} {what} worker@{core}"));
        }
    }

    fn find_silent(&mut self, now: Instant) {
        let silent = |c: &&Child| match (c.kind, c.phase) {
            (Kind::Worker, Phase::Draining) => now - c.since > DRAINED_WITHIN,
            (Kind::Worker | Kind::Control, _) => now - c.last_beat > SILENT_FOR,
            _ => false,
        };
        let pids: Vec<i32> = self.children.iter().filter(silent).map(|c| c.pid).collect();
        for pid in pids {
            self.kill(pid, "silent for too long");
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
        self.machine.say(match end {
            End::PowerOff => "going down: power off",
            End::Reboot => "going down: reboot",
        });
        let pids: Vec<(i32, Kind)> = self.children.iter().map(|c| (c.pid, c.kind)).collect();
        for (pid, kind) in pids {
            match kind {
                Kind::Worker => self.drain(pid),
                _ => signal(pid, Signal::TERM),
            }
        }
    }

    fn finish(&mut self, now: Instant) {
        self.machine.pet();
        if self.ending.is_some_and(|(_, deadline)| now > deadline) {
            let pids: Vec<i32> = self.children.iter().map(|c| c.pid).collect();
            for pid in pids {
                self.kill(pid, "did not end by itself");
            }
        }
    }

    // ── small things ─────────────────────────────────────────────────────────────────────────────────────────────

    /// The machine, for what comes after the supervision.
    pub fn machine(&mut self) -> &mut M {
        &mut self.machine
    }

    fn tell_control(&self, message: &impl Message, descriptors: &[BorrowedFd<'_>]) {
        let Some(control) = self.children.iter().find(|c| c.kind == Kind::Control) else { return };
        let Some(channel) = &control.channel else { return };
        if let Err(wire::Error::WouldBlock) = wire::send(channel, message, descriptors) {
            // It does not read. A new one will ask for everything again, so nothing is lost by this.
            signal(control.pid, Signal::KILL);
        }
    }

    fn tell_worker(&self, pid: i32, message: ToWorker) {
        if let Some(channel) = self.children.iter().find(|c| c.pid == pid).and_then(|c| c.channel.as_ref())
            && let Err(wire::Error::WouldBlock) = wire::send(channel, &message, &[])
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
fn next_ended() -> Option<(i32, String)> {
    loop {
        return match nix::sys::wait::waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) => Some((pid.as_raw(), format!("exited with status {status}"))),
            Ok(WaitStatus::Signaled(pid, signal, _)) => Some((pid.as_raw(), format!("was killed by {signal}"))),
            Ok(WaitStatus::StillAlive) | Err(_) => None,
            Ok(_) => continue,
        };
    }
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
}
