//! What can go wrong with a machine in a box, and what to do about it.

use crate::net::Forward;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

/// The last lines of a console, for a person to read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tail(pub String);

impl fmt::Display for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.trim().is_empty() {
            return f.write_str("; the console is empty");
        }
        f.write_str("; the console ends with:")?;
        self.0.lines().try_for_each(|line| write!(f, "\n  | {line}"))
    }
}

/// An error of this crate: what failed, with which input, what to do now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no QEMU to start.
    #[error(
        "{looked_for} was not found: install QEMU for x86-64 (Debian, Ubuntu: qemu-system-x86; Fedora: \
         qemu-system-x86-core; Arch: qemu-system-x86; Alpine: qemu-system-x86_64) or name the program in GAIA_QEMU"
    )]
    QemuMissing {
        /// The path or the name that was looked for.
        looked_for: String,
    },
    /// The program does not say a QEMU version.
    #[error("{} is not a QEMU: --version gave {output:?}; check GAIA_QEMU", path.display())]
    NotQemu {
        /// The program.
        path: PathBuf,
        /// What it printed.
        output: String,
    },
    /// QEMU lacks what the machine needs.
    #[error("{} is version {found}, but {needed} or newer is needed: upgrade it", path.display())]
    QemuTooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        found: crate::Version,
        /// The oldest one that will do.
        needed: crate::Version,
    },
    /// `GAIA_ACCEL` holds a word that means nothing.
    #[error("GAIA_ACCEL is {word:?}: write tcg or kvm, or unset it to let a probe decide")]
    AccelWord {
        /// The word.
        word: String,
    },
    /// The private directory for sockets cannot be made.
    #[error("no private directory in {}: {source}", parent.display())]
    PrivateDir {
        /// Where it was tried.
        parent: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file cannot be read or written.
    #[error("{role} {}: {source}", path.display())]
    File {
        /// What the file is for.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A socket for one of QEMU's channels cannot be made.
    #[error("socket for the {channel} at {}: {source}", path.display())]
    Socket {
        /// `console`, `qmp` or `debug channel`.
        channel: &'static str,
        /// The socket's path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The process cannot be started.
    #[error("{} did not start: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The process lives but did not open one of its channels.
    #[error("QEMU did not connect its {channel} within {waited:?}")]
    NoConnection {
        /// `console`, `qmp` or `debug channel`.
        channel: &'static str,
        /// For how long it was waited.
        waited: Duration,
    },
    /// The process ended while something was expected of it.
    #[error("QEMU ended ({status}) while waiting for {expected}{}{tail}", stderr_text(stderr))]
    Died {
        /// What was being waited for.
        expected: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error.
        stderr: String,
        /// The end of the console.
        tail: Tail,
    },
    /// A fixed host port of a forward cannot be had.
    #[error("host port {} of the forward {forward} cannot be bound on 127.0.0.1: {source}", forward.host)]
    PortTaken {
        /// The forward.
        forward: Forward,
        /// Why it failed.
        source: io::Error,
    },
    /// A forward is not written as `HOST:GUEST`.
    #[error("{word:?} is not a forward: write HOST:GUEST, two ports, where HOST 0 picks a free one (8080:8080, 0:80)")]
    ForwardWord {
        /// The word.
        word: String,
    },
    /// The machine forwards nothing to this guest port.
    #[error("no host port is forwarded to the guest's port {guest}: add Forward::to({guest}) to the builder")]
    NotForwarded {
        /// The guest's port.
        guest: u16,
    },
    /// QEMU runs, but does not list a port it was asked to forward.
    #[error("QEMU lists no host port for the forward {forward}; `info usernet` says:\n{listing}")]
    ForwardMissing {
        /// The forward.
        forward: Forward,
        /// QEMU's own list.
        listing: String,
    },
    /// The console did not print what was awaited.
    #[error("the console did not print {pattern} within {waited:.1?}{tail}")]
    Timeout {
        /// What was searched for.
        pattern: String,
        /// For how long.
        waited: Duration,
        /// The end of the console.
        tail: Tail,
    },
    /// The console printed although it should not have.
    #[error("the console should have {expected} for {window:?}, but printed {printed:?}{tail}")]
    NotQuiet {
        /// What was expected.
        expected: String,
        /// For how long.
        window: Duration,
        /// What came instead.
        printed: String,
        /// The end of the console.
        tail: Tail,
    },
    /// A channel was closed by a QEMU that still lives, or broke.
    #[error("the {channel} is closed{tail}")]
    ChannelClosed {
        /// `console`, `qmp` or `debug channel`.
        channel: &'static str,
        /// The end of the console.
        tail: Tail,
    },
    /// The transcript file cannot be written.
    #[error("the console's transcript cannot be written: {source}")]
    Transcript {
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// Bytes cannot be sent.
    #[error("the {channel} takes no bytes: {source}")]
    Send {
        /// `console`, `qmp` or `debug channel`.
        channel: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {text} ({class})")]
    QmpRefused {
        /// The command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's explanation.
        text: String,
    },
    /// QEMU did not answer a command, or an event did not come.
    #[error("QEMU did not send {expected} within {waited:?}")]
    QmpSilent {
        /// The answer or the event that was awaited.
        expected: String,
        /// For how long.
        waited: Duration,
    },
    /// The machine has no debug channel.
    #[error("this machine has no debug channel: call debug_channel(true) on the builder")]
    NoDebugChannel,
    /// The guest did not answer on the debug channel.
    #[error("the guest did not answer {request:?} on the debug channel within {waited:?}{tail}")]
    DebugSilent {
        /// What was asked.
        request: String,
        /// For how long it was waited.
        waited: Duration,
        /// The end of the console.
        tail: Tail,
    },
    /// An earlier request was never answered, so that the next line could belong to either.
    #[error("the debug channel is out of step since a request that was not answered: boot another machine")]
    DebugOutOfStep,
    /// A request or an answer breaks the rule of one line each.
    #[error("the debug channel carries one line each way, at most {limit} bytes; the {which} is not one")]
    DebugLine {
        /// `request` or `answer`.
        which: &'static str,
        /// The longest line.
        limit: usize,
    },
    /// The machine should have ended and has not.
    #[error("the machine still runs after {waited:.1?}{tail}")]
    StillRunning {
        /// For how long it was waited.
        waited: Duration,
        /// The end of the console.
        tail: Tail,
    },
    /// A signal cannot be sent to QEMU.
    #[error("QEMU cannot be killed: {source}")]
    Kill {
        /// Why it failed.
        source: io::Error,
    },
}

fn stderr_text(stderr: &str) -> String {
    match stderr.trim() {
        "" => String::new(),
        text => format!("; it said: {text}"),
    }
}
