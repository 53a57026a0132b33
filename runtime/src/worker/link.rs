//! The way between a worker and a keeper: HTTP/2 over a stream of which init has given each an end.
//!
//! | the worker asks                        | the keeper answers                                                      |
//! |----------------------------------------|-------------------------------------------------------------------------|
//! | `turn`                                 | a ticket, when it is its turn; the turn is kept while that answer's body is held |
//! | a ticket and a deadline, and a request | what the guest answers, or how it ended without an answer               |
//!
//! Nothing but a request whose turn it is reaches a keeper: what waits is lost to nobody when the keeper's process ends.
//! All of this stands in one header, which neither clients nor guests can set: both sides take it out of what is not theirs.

use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use http::HeaderName;
use hyper::rt::Executor;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::host::Means;

/// Where it stands.
pub const HEADER: HeaderName = HeaderName::from_static("gaia-keeper");
/// What either side may send of one body before the other has taken it, in bytes.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all answers of a keeper together: their ends wait for clients that take them slowly, and the next answer must
/// not wait with them.
const ANSWERS_WINDOW: u32 = 16 << 20;
/// What one set of headers may have, in bytes as HTTP/2 counts them: more than a connection may send and a guest may answer.
const HEADERS: u32 = 256 << 10;
/// Turns and requests that a worker may have open at a keeper: more than can wait in a worker.
const STREAMS: u32 = 4096;
/// Streams that were reset and are remembered: with several replicas a worker asks for more turns than it takes.
const RESETS: usize = 4096;

/// What a worker asks of a keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A turn.
    Turn,
    /// An answer.
    Answer {
        /// Of its turn.
        ticket: u64,
        /// Until when, in nanoseconds of the monotonic clock.
        deadline: u64,
    },
}

impl Asked {
    /// Reads the header.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(' ') {
            None => (text == "turn").then_some(Self::Turn),
            Some((ticket, deadline)) => {
                Some(Self::Answer { ticket: ticket.parse().ok()?, deadline: deadline.parse().ok()? })
            }
        }
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Turn => f.write_str("turn"),
            Self::Answer { ticket, deadline } => write!(f, "{ticket} {deadline}"),
        }
    }
}

/// How a request ended at a keeper without an answer of the guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was not begun.
    Refused,
    /// The deadline passed.
    Late,
    /// The host was short of memory.
    Short,
    /// The guest trapped.
    Trap,
    /// The runtime could not do its part.
    Host,
    /// `handle` came back without an answer.
    Nothing,
    /// The answer was an informational status.
    Informational,
    /// The guest answered with this error code.
    Error(String),
}

impl Outcome {
    const WORDS: [(&'static str, Self); 7] = [
        ("refused", Self::Refused),
        ("late", Self::Late),
        ("short", Self::Short),
        ("trap", Self::Trap),
        ("host", Self::Host),
        ("nothing", Self::Nothing),
        ("informational", Self::Informational),
    ];

    /// Reads the header.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(code) = text.strip_prefix("error ") {
            let plain =
                !code.is_empty() && code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric() || b == b':');
            return plain.then(|| Self::Error(code.to_owned()));
        }
        Self::WORDS.into_iter().find(|(word, _)| *word == text).map(|(_, outcome)| outcome)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(code) => write!(f, "error {code}"),
            other => {
                let word = Self::WORDS.iter().find(|(_, outcome)| outcome == other).map_or("host", |(word, _)| word);
                f.write_str(word)
            }
        }
    }
}

/// Now, in nanoseconds of the monotonic clock, which is the same in all processes.
#[must_use]
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// An end that init has given.
///
/// # Errors
/// If it is none.
pub fn end(stream: OwnedFd) -> std::io::Result<TokioIo<UnixStream>> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    Ok(TokioIo::new(UnixStream::from_std(stream)?))
}

/// The worker's side.
#[must_use]
pub fn client(means: &Rc<Means>) -> hyper::client::conn::http2::Builder<Local> {
    let mut builder = hyper::client::conn::http2::Builder::new(Local(Rc::clone(means)));
    builder
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(ANSWERS_WINDOW)
        .max_header_list_size(HEADERS)
        .max_concurrent_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS);
    builder
}

/// The keeper's side.
#[must_use]
pub fn server(means: &Rc<Means>) -> hyper::server::conn::http2::Builder<Local> {
    let mut builder = hyper::server::conn::http2::Builder::new(Local(Rc::clone(means)));
    builder
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(4 * STREAM_WINDOW)
        .max_header_list_size(HEADERS)
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        // The worker writes it, as on every answer.
        .auto_date_header(false);
    builder
}

/// Runs what belongs to a connection on this thread; guests at the end of their tick come behind it.
#[derive(Clone)]
pub struct Local(Rc<Means>);

impl<F: Future + 'static> Executor<F> for Local {
    fn execute(&self, work: F) {
        let means = Rc::clone(&self.0);
        tokio::task::spawn_local(async move {
            let work = std::pin::pin!(work);
            means.turns.before_others(work).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_outcome_survives_the_header() {
        for (_, outcome) in Outcome::WORDS {
            assert_eq!(Outcome::parse(&outcome.to_string()), Some(outcome));
        }
        let error = Outcome::Error("InternalError".into());
        assert_eq!(Outcome::parse(&error.to_string()), Some(error));
        assert_eq!(Outcome::parse("error two words"), None);
    }

    proptest! {
        #[test]
        fn what_is_asked_survives_the_header(ticket: u64, deadline: u64) {
            for asked in [Asked::Turn, Asked::Answer { ticket, deadline }] {
                prop_assert_eq!(Asked::parse(&asked.to_string()), Some(asked));
            }
        }

        #[test]
        fn any_text_is_something_or_nothing(text in "\\PC{0,40}") {
            let _ = (Asked::parse(&text), Outcome::parse(&text));
        }
    }
}
