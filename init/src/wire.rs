//! What the supervisor and the roles say to each other: one line of text per `SOCK_SEQPACKET` message, with
//! descriptors beside it where a message says so.
//!
//! Text, because a person who debugs PID 1 reads it; packets, because a message then arrives whole or not at all.
//! Nothing a role sends can end the supervisor, and a role that sends what does not parse is ended by it.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 1024;
/// The most descriptors beside one message.
pub const MAX_DESCRIPTORS: usize = 2;
/// The longest name of a descriptor, in bytes.
pub const MAX_NAME: usize = 64;

/// What control says to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromControl {
    /// Asks what is there: answered by [`ToControl::Machine`], then the running generation's files and workers, then
    /// [`ToControl::End`]. Files that were handed over for a generation before are forgotten.
    Hello,
    /// Asks for a compiler: answered by [`ToControl::Compiler`], when one of the places is free, or [`ToControl::Refused`].
    Compile {
        /// Chosen by control, repeated in the answer.
        ticket: u32,
    },
    /// One descriptor beside it: a file that each worker of the generation gets under this name. It is one open file with
    /// one offset for all of them, so it is to be read by position or mapped.
    File {
        /// The generation it belongs to.
        generation: u32,
        /// Its name.
        name: String,
    },
    /// Two descriptors beside it: the plan of one pinned brane and its artefact. The generation is to have its keepers.
    Keepers {
        /// The generation.
        generation: u32,
        /// The brane's name.
        name: String,
        /// How many keepers, each of which holds one instance.
        replicas: u32,
        /// What the brane is made of, in one word: a keeper that has the same lives on.
        identity: String,
    },
    /// Starts the generation: one worker per worker core and the keepers that are not there yet, all ready before the old
    /// workers stop accepting.
    Start {
        /// Which. Its number is larger than that of any that was ever to be started: no number is used twice.
        generation: u32,
    },
    /// Asks for all roles: answered by one [`ToControl::Role`] each and [`ToControl::End`].
    Roles,
    /// Asks what the kernel gave the cores: answered by [`ToControl::Cores`].
    Cores,
    /// I am well.
    Beat,
    /// A line for the console.
    Say {
        /// The line.
        line: String,
    },
    /// End everything in order, then switch off.
    PowerOff,
    /// End everything in order, then start again.
    Reboot,
}

/// What the supervisor says to control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToControl {
    /// The machine as the supervisor divided it.
    Machine {
        /// Cores that run a worker each.
        workers: Vec<usize>,
        /// Whether they share with housekeeping.
        shared: bool,
        /// The largest number of a generation that was ever to be started, 0 before the first; the next is larger.
        newest: u32,
    },
    /// The generation that serves; its files and workers follow.
    Generation {
        /// Which.
        generation: u32,
    },
    /// One descriptor beside it: a file of the running generation.
    File {
        /// The generation.
        generation: u32,
        /// The file's name.
        name: String,
    },
    /// Two descriptors beside it: the channel to a worker, and its statistics.
    Worker {
        /// Its core.
        core: usize,
        /// Its process.
        pid: i32,
        /// Its generation.
        generation: u32,
    },
    /// Two descriptors beside it: the channel to a keeper, and its statistics.
    Keeper {
        /// Its process.
        pid: i32,
        /// The generation that it was first started for.
        generation: u32,
        /// Its brane.
        name: String,
        /// Which of the brane's replicas, from 1.
        replica: u32,
        /// As asked.
        identity: String,
    },
    /// One descriptor beside it: the channel to a fresh compiler.
    Compiler {
        /// As asked.
        ticket: u32,
        /// Its process.
        pid: i32,
    },
    /// What was asked cannot be had.
    Refused {
        /// As asked.
        ticket: u32,
        /// Why, in words.
        reason: String,
    },
    /// All workers of the generation accept.
    Serving {
        /// Which.
        generation: u32,
    },
    /// The generation did not come up; whatever served before still does.
    Failed {
        /// Which.
        generation: u32,
        /// Why, in words.
        reason: String,
    },
    /// A process ended.
    Exited {
        /// Its role.
        role: String,
        /// Its process.
        pid: i32,
        /// How, in words.
        cause: String,
    },
    /// One role's state.
    Role {
        /// `control`, `worker@1`, `keeper@counter.001`, …
        name: String,
        /// Its process, 0 when it is not running.
        pid: i32,
        /// Its generation, 0 for roles that have none.
        generation: u32,
        /// Times it was started again.
        restarts: u32,
        /// Milliseconds since it was started, or until it will be started again when it is not running.
        millis: u64,
        /// `up`, `starting`, `standing-in`, `draining`, `waiting`.
        state: String,
        /// What holds it, as the supervisor sees it: `whole`, `partly`, `none`, or what is missing: `no-seccomp.no-user`.
        sandbox: String,
    },
    /// One descriptor beside it: a file with [`crate::given::Given`] in TOML, as it is at this moment. None, if there was no memory
    /// for it.
    Cores,
    /// The list is complete.
    End,
}

/// What a worker or keeper says to the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromWorker {
    /// Everything is mapped, linked and pooled, and the sandbox is closed.
    Ready,
    /// The event loop turns.
    Beat,
    /// Told to drain, it accepts on no socket any more.
    Stopped,
}

/// What the supervisor says to a worker or keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToWorker {
    /// Begin to accept on your own sockets.
    Accept,
    /// Stop accepting, finish what is inside, exit. A keeper: when the workers that ask it are gone.
    Drain,
    /// Accept on the sockets of the core you stand in for as well.
    Adopt,
    /// Leave them again.
    Release,
    /// One descriptor beside it: a stream between a worker and a keeper, one end for each. It takes the place of one that
    /// was there before.
    Link {
        /// The keeper's brane.
        name: String,
        /// Which of the brane's replicas, from 1.
        replica: u32,
    },
}

/// A message that means nothing here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a message of this protocol: {0:?}")]
pub struct Unknown(pub String);

impl Unknown {
    /// This text, as much of it as a report needs.
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(text.chars().take(80).collect())
    }
}

/// A message that goes over a channel.
pub trait Message: Sized + fmt::Display {
    /// Parses one message.
    ///
    /// # Errors
    /// [`Unknown`] with the text, if it is not one.
    fn parse(text: &str) -> Result<Self, Unknown>;
}

struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn word(&mut self) -> Option<&'a str> {
        let (word, rest) = self.0.split_once(' ').unwrap_or((self.0, ""));
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }
    fn number<T: std::str::FromStr>(&mut self) -> Option<T> {
        self.word()?.parse().ok()
    }
    fn name(&mut self) -> Option<String> {
        let word = self.word()?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.@".contains(&b);
        (word.len() <= MAX_NAME && word.bytes().all(plain)).then(|| word.to_owned())
    }
    fn rest(&mut self) -> String {
        std::mem::take(&mut self.0).to_owned()
    }
    fn done(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

fn parse<'a, T>(text: &'a str, read: impl FnOnce(&str, &mut Words<'a>) -> Option<T>) -> Result<T, Unknown> {
    let mut words = Words(text);
    words
        .word()
        .and_then(|first| {
            let value = read(first, &mut words)?;
            words.done()?;
            Some(value)
        })
        .ok_or_else(|| Unknown::of(text))
}

/// Reasons travel at the end of a line: no line breaks, and not so long that the message would not fit.
pub(crate) fn one_line(reason: &str) -> String {
    reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_MESSAGE / 5).collect()
}

impl Message for FromControl {
    fn parse(text: &str) -> Result<Self, Unknown> {
        parse(text, |first, w| {
            Some(match first {
                "hello" => Self::Hello,
                "compile" => Self::Compile { ticket: w.number()? },
                "file" => Self::File { generation: w.number()?, name: w.name()? },
                "keepers" => Self::Keepers {
                    generation: w.number()?,
                    name: w.name()?,
                    replicas: w.number()?,
                    identity: w.name()?,
                },
                "start" => Self::Start { generation: w.number()? },
                "roles" => Self::Roles,
                "cores" => Self::Cores,
                "beat" => Self::Beat,
                "say" => Self::Say { line: w.rest() },
                "poweroff" => Self::PowerOff,
                "reboot" => Self::Reboot,
                _ => return None,
            })
        })
    }
}

impl fmt::Display for FromControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello => f.write_str("hello"),
            Self::Compile { ticket } => write!(f, "compile {ticket}"),
            Self::File { generation, name } => write!(f, "file {generation} {name}"),
            Self::Keepers { generation, name, replicas, identity } => {
                write!(f, "keepers {generation} {name} {replicas} {identity}")
            }
            Self::Start { generation } => write!(f, "start {generation}"),
            Self::Roles => f.write_str("roles"),
            Self::Cores => f.write_str("cores"),
            Self::Beat => f.write_str("beat"),
            Self::Say { line } => write!(f, "say {}", one_line(line)),
            Self::PowerOff => f.write_str("poweroff"),
            Self::Reboot => f.write_str("reboot"),
        }
    }
}

impl Message for ToControl {
    fn parse(text: &str) -> Result<Self, Unknown> {
        parse(text, |first, w| {
            Some(match first {
                "machine" => Self::Machine {
                    shared: match w.word()? {
                        "shared" => true,
                        "apart" => false,
                        _ => return None,
                    },
                    workers: crate::cores::parse_list(w.word()?)?,
                    newest: w.number()?,
                },
                "generation" => Self::Generation { generation: w.number()? },
                "file" => Self::File { generation: w.number()?, name: w.name()? },
                "worker" => Self::Worker { core: w.number()?, pid: w.number()?, generation: w.number()? },
                "keeper" => Self::Keeper {
                    pid: w.number()?,
                    generation: w.number()?,
                    name: w.name()?,
                    replica: w.number()?,
                    identity: w.name()?,
                },
                "compiler" => Self::Compiler { ticket: w.number()?, pid: w.number()? },
                "refused" => Self::Refused { ticket: w.number()?, reason: w.rest() },
                "serving" => Self::Serving { generation: w.number()? },
                "failed" => Self::Failed { generation: w.number()?, reason: w.rest() },
                "exited" => Self::Exited { role: w.name()?, pid: w.number()?, cause: w.rest() },
                "role" => Self::Role {
                    name: w.name()?,
                    pid: w.number()?,
                    generation: w.number()?,
                    restarts: w.number()?,
                    millis: w.number()?,
                    state: w.name()?,
                    sandbox: w.name()?,
                },
                "cores" => Self::Cores,
                "end" => Self::End,
                _ => return None,
            })
        })
    }
}

impl fmt::Display for ToControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine { workers, shared, newest } => {
                let how = if *shared { "shared" } else { "apart" };
                write!(f, "machine {how} {} {newest}", crate::cores::list(workers))
            }
            Self::Generation { generation } => write!(f, "generation {generation}"),
            Self::File { generation, name } => write!(f, "file {generation} {name}"),
            Self::Worker { core, pid, generation } => write!(f, "worker {core} {pid} {generation}"),
            Self::Keeper { pid, generation, name, replica, identity } => {
                write!(f, "keeper {pid} {generation} {name} {replica} {identity}")
            }
            Self::Compiler { ticket, pid } => write!(f, "compiler {ticket} {pid}"),
            Self::Refused { ticket, reason } => write!(f, "refused {ticket} {}", one_line(reason)),
            Self::Serving { generation } => write!(f, "serving {generation}"),
            Self::Failed { generation, reason } => write!(f, "failed {generation} {}", one_line(reason)),
            Self::Exited { role, pid, cause } => write!(f, "exited {role} {pid} {}", one_line(cause)),
            Self::Role { name, pid, generation, restarts, millis, state, sandbox } => {
                write!(f, "role {name} {pid} {generation} {restarts} {millis} {state} {sandbox}")
            }
            Self::Cores => f.write_str("cores"),
            Self::End => f.write_str("end"),
        }
    }
}

impl Message for FromWorker {
    fn parse(text: &str) -> Result<Self, Unknown> {
        match text {
            "ready" => Ok(Self::Ready),
            "beat" => Ok(Self::Beat),
            "stopped" => Ok(Self::Stopped),
            _ => Err(Unknown::of(text)),
        }
    }
}

impl fmt::Display for FromWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Beat => "beat",
            Self::Stopped => "stopped",
        })
    }
}

impl Message for ToWorker {
    fn parse(text: &str) -> Result<Self, Unknown> {
        parse(text, |first, w| {
            Some(match first {
                "accept" => Self::Accept,
                "drain" => Self::Drain,
                "adopt" => Self::Adopt,
                "release" => Self::Release,
                "link" => Self::Link { name: w.name()?, replica: w.number()? },
                _ => return None,
            })
        })
    }
}

impl fmt::Display for ToWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drain => f.write_str("drain"),
            Self::Adopt => f.write_str("adopt"),
            Self::Release => f.write_str("release"),
            Self::Link { name, replica } => write!(f, "link {name} {replica}"),
        }
    }
}

/// Why a channel gave nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The other side is gone.
    #[error("the other side of the channel is gone")]
    Closed,
    /// Nothing to read, or no room to write, on a non-blocking channel.
    #[error("the channel would block")]
    WouldBlock,
    /// The text was longer than [`MAX_MESSAGE`], or was not UTF-8, or descriptors were cut off.
    #[error("a message was too long, not text, or had more than {MAX_DESCRIPTORS} descriptors")]
    Malformed,
    /// The text is no message of this protocol.
    #[error(transparent)]
    Unknown(#[from] Unknown),
    /// What the kernel said.
    #[error("channel: {0}")]
    Kernel(Errno),
}

/// A pair of connected channel ends, both close-on-exec and blocking.
///
/// # Errors
/// What the kernel said.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends one message with the given descriptors beside it.
///
/// # Errors
/// [`Error::Malformed`] for a message over the bounds (nothing is sent), [`Error::WouldBlock`] when `flags` or the
/// socket say so, [`Error::Closed`] when nobody is there.
pub fn send(to: impl AsFd, message: &impl Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
    let text = message.to_string();
    if text.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        return Err(Error::Malformed);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::Malformed);
    }
    let flags = SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(to, &[IoSlice::new(text.as_bytes())], &mut control, flags) {
        Ok(_) => Ok(()),
        Err(Errno::AGAIN) => Err(Error::WouldBlock),
        Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(Error::Closed),
        Err(e) => Err(Error::Kernel(e)),
    }
}

/// Receives one message and the descriptors beside it.
///
/// # Errors
/// [`Error::Closed`] at the end, [`Error::WouldBlock`] when the socket is non-blocking and empty; a malformed or
/// unknown message is consumed and its descriptors are closed.
pub fn receive<M: Message>(from: impl AsFd) -> Result<(M, Vec<OwnedFd>), Error> {
    let mut buffer = [0_u8; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match rustix::net::recvmsg(&from, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => break got,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(Error::WouldBlock),
            Err(Errno::CONNRESET) => return Err(Error::Closed),
            Err(e) => return Err(Error::Kernel(e)),
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if got.bytes == 0 && descriptors.is_empty() {
        return Err(Error::Closed);
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Error::Malformed);
    }
    let text = std::str::from_utf8(&buffer[..got.bytes]).map_err(|_| Error::Malformed)?;
    Ok((M::parse(text)?, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn survives<M: Message + PartialEq + fmt::Debug>(message: &M) {
        assert_eq!(M::parse(&message.to_string()).as_ref(), Ok(message));
    }

    #[test]
    fn every_message_survives_the_wire() {
        use {FromControl as C, ToControl as T};
        for m in [
            C::Hello,
            C::Compile { ticket: 7 },
            C::File { generation: 2, name: "artefact-0".into() },
            C::Keepers { generation: 2, name: "counter".into(), replicas: 3, identity: "0f".repeat(32) },
            C::Start { generation: 2 },
            C::Roles,
            C::Cores,
            C::Beat,
            C::Say { line: "no graph".into() },
            C::PowerOff,
            C::Reboot,
        ] {
            survives(&m);
        }
        for m in [
            T::Machine { workers: vec![1, 2], shared: false, newest: 3 },
            T::Generation { generation: 1 },
            T::File { generation: 1, name: "plan".into() },
            T::Worker { core: 3, pid: 77, generation: 1 },
            T::Keeper { pid: 7, generation: 1, name: "counter".into(), replica: 2, identity: "0f".repeat(32) },
            T::Compiler { ticket: 1, pid: 9 },
            T::Refused { ticket: 1, reason: "no more processes".into() },
            T::Serving { generation: 1 },
            T::Failed { generation: 1, reason: "worker@1 ended: exit status 1".into() },
            T::Exited { role: "worker@1".into(), pid: 5, cause: "killed by SIGKILL".into() },
            T::Role {
                name: "console".into(),
                pid: 3,
                generation: 0,
                restarts: 1,
                millis: 12,
                state: "up".into(),
                sandbox: "no-seccomp.no-user".into(),
            },
            T::Cores,
            T::End,
        ] {
            survives(&m);
        }
        for m in [FromWorker::Ready, FromWorker::Beat, FromWorker::Stopped] {
            survives(&m);
        }
        let link = ToWorker::Link { name: "counter".into(), replica: 2 };
        for m in [ToWorker::Accept, ToWorker::Drain, ToWorker::Adopt, ToWorker::Release, link] {
            survives(&m);
        }
    }

    #[test]
    fn descriptors_travel_beside_a_message() {
        let (a, b) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&a, &FromControl::File { generation: 1, name: "plan".into() }, &[null.as_fd()]).unwrap();
        let (message, fds) = receive::<FromControl>(&b).unwrap();
        assert_eq!(message, FromControl::File { generation: 1, name: "plan".into() });
        assert_eq!(fds.len(), 1);
        drop(a);
        assert!(matches!(receive::<FromControl>(&b), Err(Error::Closed)));
    }

    #[test]
    fn what_is_too_long_or_too_much_is_refused_and_the_channel_lives_on() {
        let (a, b) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(send(&a, &FromControl::Hello, &[null.as_fd(); 3]), Err(Error::Malformed)));
        rustix::net::send(&a, &[b'x'; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        rustix::net::send(&a, b"\xff\xfe", SendFlags::empty()).unwrap();
        rustix::net::send(&a, b"file 1 ../../etc/passwd", SendFlags::empty()).unwrap();
        send(&a, &FromControl::Beat, &[]).unwrap();
        assert!(matches!(receive::<FromControl>(&b), Err(Error::Malformed)));
        assert!(matches!(receive::<FromControl>(&b), Err(Error::Malformed)));
        assert!(matches!(receive::<FromControl>(&b), Err(Error::Unknown(_))));
        assert_eq!(receive::<FromControl>(&b).unwrap().0, FromControl::Beat);
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not_but_never_panics(text in "\\PC{0,100}") {
            let _ = FromControl::parse(&text);
            let _ = ToControl::parse(&text);
            let _ = FromWorker::parse(&text);
            let _ = ToWorker::parse(&text);
        }

        #[test]
        fn what_parses_prints_the_same(text in "(file|start|role|worker|keepers?|link|failed|machine) [a-z0-9 ,@-]{0,30}") {
            if let Ok(m) = FromControl::parse(&text) { prop_assert_eq!(FromControl::parse(&m.to_string()), Ok(m)); }
            if let Ok(m) = ToWorker::parse(&text) { prop_assert_eq!(ToWorker::parse(&m.to_string()), Ok(m)); }
            if let Ok(m) = ToControl::parse(&text) { prop_assert_eq!(ToControl::parse(&m.to_string()), Ok(m)); }
        }

        #[test]
        fn a_reason_of_any_kind_still_fits(reason in "\\PC{0,3000}") {
            let m = ToControl::Failed { generation: u32::MAX, reason };
            prop_assert!(m.to_string().len() <= MAX_MESSAGE);
        }
    }
}
