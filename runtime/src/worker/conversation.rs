//! What a worker or keeper and control say to each other: which instances are at work, that there is something in the log, what
//! addresses a name has, and what TLS is served with.
//!
//! A worker cannot ask a name server itself: it asks control. Each brane has its share of the look-ups that may be open,
//! so that none waits for another's names. A look-up keeps its place until it is answered, even if nobody waits for it
//! any more: control is still at it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use gaia_egress::resolve::{Error, MAX_ADDRESSES, Resolve};
use gaia_egress::site::Peer;
use gaia_init::wire::{self, Message, Unknown};
use rustls::ServerConfig;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::tls;
use crate::channel::{Channel, is_sealed, read_whole, sealed};
use crate::log::Log;

/// The largest list, in bytes.
pub const MAX_BYTES: u64 = 64 << 20;
/// Look-ups that a worker may have open; more wait.
pub const LOOK_UPS: usize = 64;
/// Look-ups that one brane may have open in a worker; more wait.
const LOOK_UPS_OF_A_BRANE: usize = 8;
/// How long a look-up takes at most, waiting for its turn included: control has ten seconds for it.
const LOOK_UP_WITHIN: Duration = Duration::from_secs(11);
/// The longest response code of a name server, in bytes; the registry's longest has nine.
const MAX_CODE: usize = 24;

/// What became of a look-up.
pub type Found = Result<Vec<IpAddr>, Error>;

/// What control and a worker say to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// Asks for the instances; the answer carries the same ticket and, beside it, the list.
    Instances {
        /// Chosen by control.
        ticket: u32,
    },
    /// The worker's alone: there are records for a reader that asked to be woken.
    Records,
    /// The worker's alone: asks for the addresses of a name.
    LookUp {
        /// Chosen by the worker.
        ticket: u32,
        /// As [`Peer::Name`] has it.
        name: String,
    },
    /// Control's alone: the answer.
    Found {
        /// As asked.
        ticket: u32,
        /// At least one and at most [`MAX_ADDRESSES`], or why there are none.
        found: Found,
    },
    /// Control's alone: from now on TLS is served with the certificate and the key beside it, each in a sealed file, in PEM.
    Certificate,
}

/// Why a name server could not be asked, in the words of the wire; any other is `other`.
const KINDS: [(io::ErrorKind, &str); 5] = [
    (io::ErrorKind::ConnectionRefused, "connection-refused"),
    (io::ErrorKind::HostUnreachable, "host-unreachable"),
    (io::ErrorKind::NetworkUnreachable, "network-unreachable"),
    (io::ErrorKind::PermissionDenied, "permission-denied"),
    (io::ErrorKind::TimedOut, "timed-out"),
];

impl Message for Word {
    fn parse(text: &str) -> Result<Self, Unknown> {
        let read = || {
            match text {
                "records" => return Some(Self::Records),
                "certificate" => return Some(Self::Certificate),
                _ => {}
            }
            let (word, rest) = text.split_once(' ')?;
            let (ticket, rest) = rest.split_once(' ').map_or((rest, None), |(ticket, rest)| (ticket, Some(rest)));
            let ticket = ticket.parse().ok()?;
            Some(match (word, rest) {
                ("instances", None) => Self::Instances { ticket },
                ("look-up", Some(name)) => match Peer::parse(name) {
                    Ok(Peer::Name(same)) if same == name => Self::LookUp { ticket, name: same },
                    _ => return None,
                },
                ("found", Some(addresses)) => {
                    let all: Vec<IpAddr> = addresses.split(' ').map(|a| a.parse().ok()).collect::<Option<_>>()?;
                    if all.len() > MAX_ADDRESSES {
                        return None;
                    }
                    Self::Found { ticket, found: Ok(all) }
                }
                ("not-found", Some(why)) => Self::Found { ticket, found: Err(error(why)?) },
                _ => return None,
            })
        };
        read().ok_or_else(|| Unknown::of(text))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instances { ticket } => write!(f, "instances {ticket}"),
            Self::Records => f.write_str("records"),
            Self::Certificate => f.write_str("certificate"),
            Self::LookUp { ticket, name } => write!(f, "look-up {ticket} {name}"),
            Self::Found { ticket, found: Ok(addresses) } if !addresses.is_empty() => {
                write!(f, "found {ticket}")?;
                addresses.iter().take(MAX_ADDRESSES).try_for_each(|address| write!(f, " {address}"))
            }
            Self::Found { ticket, found: Ok(_) } => write!(f, "not-found {ticket} name"),
            Self::Found { ticket, found: Err(why) } => write!(f, "not-found {ticket} {}", word_of(why)),
        }
    }
}

fn word_of(error: &Error) -> String {
    match error {
        Error::NotFound => "name".into(),
        Error::Timeout => "timeout".into(),
        Error::NoServer => "no-server".into(),
        Error::Name => "not-a-name".into(),
        Error::Refused(code) if is_code(code) => format!("refused {code}"),
        Error::Unreachable(kind) => {
            let word = KINDS.iter().find(|(known, _)| known == kind).map_or("other", |(_, word)| word);
            format!("unreachable {word}")
        }
        _ => "malformed".into(),
    }
}

fn error(text: &str) -> Option<Error> {
    Some(match text.split_once(' ') {
        None => match text {
            "name" => Error::NotFound,
            "timeout" => Error::Timeout,
            "no-server" => Error::NoServer,
            "not-a-name" => Error::Name,
            "malformed" => Error::Malformed,
            _ => return None,
        },
        Some(("refused", code)) if is_code(code) => Error::Refused(code.to_owned()),
        Some(("unreachable", "other")) => Error::Unreachable(io::ErrorKind::Other),
        Some(("unreachable", word)) => {
            Error::Unreachable(KINDS.iter().find(|(_, known)| *known == word).map(|(kind, _)| *kind)?)
        }
        Some(_) => return None,
    })
}

fn is_code(text: &str) -> bool {
    (1..=MAX_CODE).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// One instance at work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// `brane.NNN`
    pub name: String,
    /// Where it runs: `worker@1`, `keeper@counter.001`.
    pub role: String,
    /// Milliseconds since it was made.
    pub millis: u64,
}

/// The names that a worker's branes ask control for.
#[derive(Debug)]
pub struct Names {
    open: Mutex<Open>,
    /// There is a question to be sent.
    asked: Notify,
    turns: Arc<Semaphore>,
    within: Duration,
}

#[derive(Debug, Default)]
struct Open {
    next: u32,
    /// Tickets that have not been sent yet.
    unsent: VecDeque<u32>,
    questions: HashMap<u32, Question>,
}

#[derive(Debug)]
struct Question {
    /// Until it is sent.
    name: Option<String>,
    asker: oneshot::Sender<Found>,
    expires: Instant,
    /// Of the brane, and of the worker.
    _turns: [OwnedSemaphorePermit; 2],
}

/// A brane's share of them.
#[derive(Debug)]
pub struct Share {
    names: Arc<Names>,
    turns: Arc<Semaphore>,
}

impl Default for Names {
    fn default() -> Self {
        Self::within(LOOK_UP_WITHIN)
    }
}

impl Names {
    fn within(within: Duration) -> Self {
        let turns = Arc::new(Semaphore::new(LOOK_UPS));
        Self { open: Mutex::default(), asked: Notify::new(), turns, within }
    }

    /// A brane's share.
    #[must_use]
    pub fn share(self: &Arc<Self>) -> Arc<Share> {
        Arc::new(Share { names: Arc::clone(self), turns: Arc::new(Semaphore::new(LOOK_UPS_OF_A_BRANE)) })
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, name: &str, turns: [OwnedSemaphorePermit; 2]) -> Found {
        let (asker, found) = oneshot::channel();
        let pending = {
            let mut open = self.open();
            let ticket = open.next;
            open.next = ticket.wrapping_add(1);
            open.unsent.push_back(ticket);
            let expires = Instant::now() + self.within;
            open.questions.insert(ticket, Question { name: Some(name.to_owned()), asker, expires, _turns: turns });
            Asked { names: self, ticket }
        };
        self.asked.notify_one();
        let found = found.await;
        drop(pending);
        found.unwrap_or(Err(Error::Timeout))
    }

    /// Waits for the next question. Safe to cancel. What was asked too long ago is forgotten meanwhile: the control that
    /// was asked is gone.
    pub async fn question(&self) -> Word {
        loop {
            let soonest = {
                let mut open = self.open();
                let now = Instant::now();
                open.questions.retain(|_, question| question.expires > now);
                while let Some(ticket) = open.unsent.pop_front() {
                    if let Some(name) = open.questions.get_mut(&ticket).and_then(|question| question.name.take()) {
                        return Word::LookUp { ticket, name };
                    }
                }
                open.questions.values().map(|question| question.expires).min()
            };
            match soonest {
                None => self.asked.notified().await,
                Some(soonest) => tokio::select! {
                    () = self.asked.notified() => {}
                    () = sleep_until(soonest) => {}
                },
            }
        }
    }

    /// Passes an answer on; one that nobody waits for is dropped.
    pub fn answered(&self, ticket: u32, found: Found) {
        let question = self.open().questions.remove(&ticket);
        if let Some(question) = question {
            let _ = question.asker.send(found);
        }
    }
}

/// Takes a question back that was not sent yet.
struct Asked<'a> {
    names: &'a Names,
    ticket: u32,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut open = self.names.open();
        if open.questions.get(&self.ticket).is_some_and(|question| question.name.is_some()) {
            open.questions.remove(&self.ticket);
            open.unsent.retain(|ticket| *ticket != self.ticket);
        }
    }
}

impl Resolve for Share {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Found> {
        let asking = async move {
            // Its own first: whoever waits for that one holds nobody else's.
            let own = Arc::clone(&self.turns).acquire_owned().await.map_err(|_| Error::Timeout)?;
            let all = Arc::clone(&self.names.turns).acquire_owned().await.map_err(|_| Error::Timeout)?;
            self.names.ask(name, [own, all]).await
        };
        Box::pin(async move { timeout(self.names.within, asking).await.unwrap_or(Err(Error::Timeout)) })
    }
}

/// What a worker or keeper has to say.
pub(super) struct Speaker {
    /// What its branes ask control for, if one may ask.
    pub(super) names: Option<Arc<Names>>,
    /// Its log.
    pub(super) log: Arc<Log>,
    /// The instances that it has now.
    pub(super) instances: Box<dyn Fn() -> Vec<Instance>>,
    /// Takes over what TLS is served with, or the reason why not; a keeper has no use for it.
    pub(super) certified: Box<dyn Fn(anyhow::Result<ServerConfig>)>,
}

/// Talks with control until it is gone for good: init hands the same channel to a new control, so a quiet one is waited
/// for.
pub(super) async fn hold(speaker: Speaker, control: Channel) {
    loop {
        let question = async {
            match &speaker.names {
                Some(names) => names.question().await,
                None => std::future::pending().await,
            }
        };
        let heard = tokio::select! {
            heard = control.receive::<Word>() => heard,
            () = speaker.log.reader_is_wanted() => {
                let _ = control.send(&Word::Records, &[]).await;
                continue;
            }
            question = question => {
                let _ = control.send(&question, &[]).await;
                continue;
            }
        };
        match heard {
            Ok((Word::Instances { ticket }, _)) => {
                let list = serde_json::to_vec(&(speaker.instances)()).unwrap_or_default();
                if let Ok(list) = sealed("instances", &list) {
                    let _ = control.send(&Word::Instances { ticket }, &[list.as_fd()]).await;
                }
            }
            Ok((Word::Found { ticket, found }, _)) => {
                if let Some(names) = &speaker.names {
                    names.answered(ticket, found);
                }
            }
            Ok((Word::Certificate, files)) => (speaker.certified)(certified(files)),
            Ok((Word::Records | Word::LookUp { .. }, _)) | Err(wire::Error::Unknown(_) | wire::Error::Malformed) => {}
            Err(_) => return,
        }
    }
}

/// What a certificate and its key make. Control has checked them.
fn certified(files: Vec<OwnedFd>) -> anyhow::Result<ServerConfig> {
    let [certificate, key] = <[OwnedFd; 2]>::try_from(files).ok().context("not with two files")?;
    anyhow::ensure!(is_sealed(&certificate) && is_sealed(&key), "it could still change");
    Ok(tls::config(&read_whole(certificate, tls::MAX_BYTES)?, &read_whole(key, tls::MAX_BYTES)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaia_init::wire::MAX_MESSAGE;
    use proptest::prelude::*;
    use std::task::{Context, Waker};

    fn any_found() -> impl Strategy<Value = Found> {
        let errors = vec![
            Error::NotFound,
            Error::Timeout,
            Error::Malformed,
            Error::NoServer,
            Error::Name,
            Error::Refused("SERVFAIL".into()),
            Error::Unreachable(io::ErrorKind::Other),
            Error::Unreachable(io::ErrorKind::NetworkUnreachable),
        ];
        prop_oneof![
            proptest::collection::vec(any::<IpAddr>(), 1..=MAX_ADDRESSES).prop_map(Ok),
            proptest::sample::select(errors).prop_map(Err),
        ]
    }

    fn any_word() -> impl Strategy<Value = Word> {
        let ticket = any::<u32>;
        prop_oneof![
            ticket().prop_map(|ticket| Word::Instances { ticket }),
            Just(Word::Records),
            Just(Word::Certificate),
            (ticket(), "([a-z_][a-z0-9]{0,60}\\.){0,3}[a-z]{1,60}")
                .prop_map(|(ticket, name)| Word::LookUp { ticket, name }),
            (ticket(), any_found()).prop_map(|(ticket, found)| Word::Found { ticket, found }),
        ]
    }

    #[test]
    fn what_a_server_may_say_still_is_one_word() {
        for code in ["", "two words", "line\nbreak", &"X".repeat(MAX_CODE + 1)] {
            let word = Word::Found { ticket: 1, found: Err(Error::Refused(code.into())) };
            assert_eq!(word.to_string(), "not-found 1 malformed");
        }
        let none = Word::Found { ticket: 1, found: Ok(Vec::new()) };
        assert_eq!(Word::parse(&none.to_string()), Ok(Word::Found { ticket: 1, found: Err(Error::NotFound) }));
        let most = Word::Found { ticket: u32::MAX, found: Ok(vec!["ffff::255.255.255.255".parse().unwrap(); 99]) };
        assert!(most.to_string().len() <= MAX_MESSAGE);
        assert!(Word::parse(&most.to_string()).is_ok());
    }

    #[test]
    fn only_names_in_their_one_form_are_looked_up() {
        assert!(Word::parse("look-up 1 a.example").is_ok());
        for other in ["", "A.example", "a.example.", "127.0.0.1", "a b", "a.example x", "[::1]", "0x7f.1"] {
            assert!(Word::parse(&format!("look-up 1 {other}")).is_err(), "{other}");
        }
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    /// Whether it still waits, after a turn.
    fn waits<T>(work: &mut BoxFuture<'_, T>) -> bool {
        work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// The question that is there now.
    async fn question(names: &Names) -> Option<(u32, String)> {
        match timeout(Duration::ZERO, names.question()).await {
            Ok(Word::LookUp { ticket, name }) => Some((ticket, name)),
            _ => None,
        }
    }

    fn one() -> Vec<IpAddr> {
        vec!["9.9.9.9".parse().unwrap()]
    }

    #[test]
    fn each_asker_gets_the_answer_to_its_own_question() {
        run(async {
            let names = Arc::new(Names::default());
            let share = names.share();
            let both = async { tokio::join!(share.resolve("a.example"), share.resolve("b.example")) };
            let control = async {
                let (a, b) = (question(&names).await.unwrap(), question(&names).await.unwrap());
                assert_eq!((a.1.as_str(), b.1.as_str()), ("a.example", "b.example"));
                names.answered(b.0, Err(Error::NotFound));
                names.answered(a.0.wrapping_add(7), Err(Error::Malformed));
                names.answered(a.0, Ok(one()));
                names.answered(a.0, Err(Error::Malformed));
            };
            let (found, ()) = tokio::join!(both, control);
            assert_eq!(found, (Ok(one()), Err(Error::NotFound)));
            assert_eq!(names.turns.available_permits(), LOOK_UPS);
        });
    }

    #[test]
    fn one_brane_leaves_turns_for_others_and_gets_its_own_back() {
        run(async {
            let names = Arc::new(Names::default());
            let (greedy, other) = (names.share(), names.share());
            let mut asking: Vec<_> = (0..LOOK_UPS).map(|_| greedy.resolve("a.example")).collect();
            for asker in &mut asking {
                assert!(waits(asker));
            }
            let mut modest = other.resolve("b.example");
            assert!(waits(&mut modest));
            let mut sent = Vec::new();
            while let Some(asked) = question(&names).await {
                sent.push(asked);
            }
            assert_eq!(sent.len(), LOOK_UPS_OF_A_BRANE + 1);
            // Gone, but control is still at it.
            drop(asking);
            let mut again = greedy.resolve("c.example");
            assert!(waits(&mut again));
            assert_eq!(question(&names).await, None);
            for (ticket, _) in sent {
                names.answered(ticket, Ok(one()));
            }
            assert_eq!(modest.await, Ok(one()));
            assert!(waits(&mut again));
            assert_eq!(question(&names).await.unwrap().1, "c.example");
        });
    }

    #[test]
    fn what_is_taken_back_before_it_is_sent_is_never_sent() {
        run(async {
            let names = Arc::new(Names::default());
            let share = names.share();
            let mut asking = share.resolve("a.example");
            assert!(waits(&mut asking));
            drop(asking);
            assert_eq!(question(&names).await, None);
            assert_eq!(share.turns.available_permits(), LOOK_UPS_OF_A_BRANE);
        });
    }

    #[test]
    fn a_control_that_never_answers_costs_a_look_up_its_time_and_no_turn_for_ever() {
        run(async {
            let names = Arc::new(Names::within(Duration::from_millis(20)));
            let share = names.share();
            let asked = async {
                assert_eq!(share.resolve("a.example").await, Err(Error::Timeout));
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            let conversation = async {
                loop {
                    names.question().await;
                }
            };
            tokio::select! {
                () = asked => {}
                () = conversation => {}
            }
            assert_eq!(share.turns.available_permits(), LOOK_UPS_OF_A_BRANE);
        });
    }

    proptest! {
        #[test]
        fn a_word_survives_the_wire(word in any_word()) {
            let text = word.to_string();
            prop_assert!(text.len() <= MAX_MESSAGE);
            prop_assert_eq!(Word::parse(&text), Ok(word));
        }

        #[test]
        fn any_text_parses_or_not(text in "(instances|look-up|found|not-found)?[ ]?([0-9]{1,11})?\\PC{0,60}") {
            if let Ok(word) = Word::parse(&text) {
                prop_assert_eq!(Word::parse(&word.to_string()), Ok(word));
            }
        }
    }
}
