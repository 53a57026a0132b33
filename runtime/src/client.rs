//! The operator's side of the API, and how its answers look.

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::future::Future;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use gaia_init::given::{Fires, Interrupt};
use gaia_store::{Digest, Reference};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::rt::TokioIo;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::control::log::{Place, Query};
use crate::control::profile::Whose;
use crate::control::report::{
    Done, Failed, Given, Graphs, Line, Profile, Ps, Pushed, Reason, Samples, Secrets, Status, Step,
};
use crate::failure::{Failure, Kind};
use crate::progress::{EVERY, Progress};
use crate::remote::{Folder, Remote};

/// Where the appliance's control listens.
pub const DEFAULT_SOCKET: &str = "/run/control.sock";
/// The largest answer, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// An appliance that does not answer within this is not well.
const WITHIN: Duration = Duration::from_secs(10);
/// What pushing a component may take: the largest over a slow line.
const PUSHED_WITHIN: Duration = Duration::from_mins(10);

/// What an answer's `Server` header begins with; the version follows.
pub(crate) const SERVER: &str = concat!("gaia/", env!("CARGO_PKG_VERSION"));
/// How much of a body is handed over at a time, in bytes.
const PIECE: usize = 64 * 1024;
/// A follower to whom nothing came for so long has nobody at the other end any more: there is a sign of life four times in it.
const SILENT: Duration = Duration::from_mins(1);
/// How long it waits before it tries again: first, and at most.
const WAIT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// What becomes of following.
#[derive(Debug)]
pub enum Turn<'a> {
    /// It broke off. It is tried again, for ever.
    Broke(&'a Error),
    /// It goes on.
    Again {
        /// With another control: what the one before knew and had not told yet is gone.
        anew: bool,
    },
}

/// Why an appliance could not be asked.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Nobody listens.
    Connect {
        /// Where.
        socket: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It cannot be reached over the network, or one side does not trust the other.
    Remote(Failure),
    /// It took too long.
    Slow(Duration),
    /// The conversation broke.
    Broken(String),
    /// It and this command are of different versions, and do not understand each other.
    Version {
        /// Its version, if it says so.
        theirs: Option<String>,
        /// What was not understood.
        what: String,
    },
    /// It answered that it could not.
    Refused(String),
    /// It answered that nothing is changed until something else is.
    Unchanged(Reason, String),
    /// Whoever was asked did not agree.
    Declined,
    /// It answered that there is no such thing.
    Missing(String),
    /// What it was to be told is not what can be told.
    Input(String),
    /// What it answered could not be written.
    Output(std::io::Error),
}

impl Error {
    /// What failed, what to do about it, and what a script can make of it.
    #[must_use]
    pub fn failure(&self) -> Failure {
        match self {
            Self::Connect { socket, source } => no_socket(socket, source),
            Self::Remote(failure) => failure.clone(),
            Self::Slow(within) => {
                Failure::new(Kind::Unreachable, format!("the appliance does not answer within {} s", within.as_secs()))
                    .help("its console tells whether it is well")
            }
            Self::Broken(why) => {
                Failure::new(Kind::Failed, format!("the conversation with the appliance broke: {why}"))
                    .help("what it was asked for may be done or not: `gaia status` and `gaia graphs` tell")
            }
            Self::Version { theirs, what } => {
                let (ours, theirs) = (env!("CARGO_PKG_VERSION"), theirs.as_deref().unwrap_or("of another version"));
                Failure::new(
                    Kind::Failed,
                    format!("the appliance and this command do not understand each other: {what}"),
                )
                .help(format!("the appliance's gaia is {theirs}, this one is {ours}: use the same on both sides"))
            }
            Self::Refused(why) | Self::Missing(why) | Self::Unchanged(Reason::Other, why) => {
                Failure::new(Kind::Failed, why)
            }
            Self::Unchanged(Reason::NotAgreed, why) => {
                Failure::new(Kind::NotAgreed, format!("nothing is changed: {why}")).help("agree to it with --yes")
            }
            Self::Declined => Failure::new(Kind::NotAgreed, "nothing is changed"),
            Self::Unchanged(Reason::NotShown, why) => {
                Failure::new(Kind::Overtaken, why).help("look at the plan again: the same command shows it")
            }
            Self::Unchanged(Reason::Busy, why) => {
                Failure::new(Kind::Overtaken, why).help("try again when that is done")
            }
            Self::Input(why) => Failure::new(Kind::Usage, why),
            Self::Output(error) => Failure::new(Kind::Failed, format!("writing the answer: {error}")),
        }
    }
}

impl Error {
    /// Whether it may be well after a while: one that shows another key than its own will not be another.
    fn may_pass(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken(_) | Self::Slow(_) => true,
            Self::Remote(failure) => failure.kind == Kind::Unreachable,
            _ => false,
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.failure().fmt(f)
    }
}

impl std::error::Error for Error {}

/// A socket on which nobody answers.
fn no_socket(socket: &std::path::Path, error: &std::io::Error) -> Failure {
    let shown = socket.display();
    let (what, help) = match error.kind() {
        ErrorKind::NotFound => (
            format!("no appliance here: there is no socket {shown}"),
            "is the appliance up? One over the network is asked with: gaia --on HOST …; one of `gaia run` with: gaia --api SOCKET …, as it \
             says when it starts",
        ),
        ErrorKind::ConnectionRefused => (
            format!("nobody listens on the socket {shown}"),
            "is the appliance up? A `gaia run` that was killed leaves its socket behind; on an appliance, control may be starting again",
        ),
        ErrorKind::PermissionDenied => {
            (format!("{shown}: {error}"), "that socket is its owner's alone: ask as the user who started it")
        }
        _ => (format!("{shown}: {error}"), "is the appliance up?"),
    };
    Failure::new(Kind::Unreachable, what).help(help)
}

/// An appliance that can be asked.
#[derive(Debug, Clone)]
pub struct Client {
    way: Way,
    within: Duration,
    progress: Progress,
    /// Whether a key ends what goes on.
    keys: bool,
}

/// How it is reached.
#[derive(Debug, Clone)]
enum Way {
    Socket(PathBuf),
    Network(Folder, Box<Remote>),
}

/// What a conversation goes over.
trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

impl Client {
    /// The one whose control listens on this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { way: Way::Socket(socket), within: WITHIN, progress: Progress::default(), keys: false }
    }

    /// This one, over the network.
    #[must_use]
    pub fn remote(folder: Folder, remote: Remote) -> Self {
        let way = Way::Network(folder, Box::new(remote));
        Self { way, within: WITHIN, progress: Progress::default(), keys: false }
    }

    /// The same, which is not waited for any longer than this where a short answer is expected.
    #[must_use]
    pub fn within(&self, within: Duration) -> Self {
        Self { within, ..self.clone() }
    }

    /// The same, which shows how far it is.
    #[must_use]
    pub fn showing(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// Where it shows how far it is.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The same for whoever is at a terminal that sends each key: q or Ctrl-C ends what goes on.
    #[must_use]
    pub fn ended_by_key(&self) -> Self {
        Self { keys: true, ..self.clone() }
    }

    /// Which appliance it is, as a sentence begins.
    #[must_use]
    pub fn place(&self) -> String {
        match &self.way {
            Way::Socket(_) => "the appliance".to_owned(),
            Way::Network(_, remote) => remote.host().to_string(),
        }
    }

    /// How a conversation broke: what to do about it, if that is known.
    fn broken(&self, error: &(dyn std::error::Error + 'static)) -> Error {
        match &self.way {
            Way::Network(_, remote) if let Some(failure) = remote.explained(error) => Error::Remote(failure),
            _ => Error::Broken(error.to_string()),
        }
    }

    /// Does something while it is shown how far it is.
    async fn shown<T>(&self, work: impl Future<Output = T>) -> T {
        // Who sees nothing of it is not woken for it either: a log is followed for days.
        if !self.progress.is_seen() {
            return work.await;
        }
        let mut work = pin!(work);
        let mut tick = tokio::time::interval(EVERY);
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = work.as_mut() => break outcome,
                _ = tick.tick() => self.progress.draw(),
            }
        };
        self.progress.clear();
        outcome
    }

    /// `GET /v1/status`
    ///
    /// # Errors
    /// [`Error`].
    pub fn status(&self) -> Result<Status, Error> {
        self.ask(Method::GET, "/v1/status")
    }

    /// `GET /v1/ps`
    ///
    /// # Errors
    /// [`Error`].
    pub fn ps(&self) -> Result<Ps, Error> {
        self.ask(Method::GET, "/v1/ps")
    }

    /// `GET /v1/profile`
    ///
    /// # Errors
    /// [`Error`].
    pub fn profile(&self, whose: &Whose) -> Result<Profile, Error> {
        self.ask(Method::GET, &format!("/v1/profile{}", whose.query()))
    }

    /// `GET /v1/profile/stacks`
    ///
    /// # Errors
    /// [`Error`].
    pub fn stacks(&self, whose: &Whose) -> Result<Samples, Error> {
        self.ask(Method::GET, &format!("/v1/profile/stacks{}", whose.query()))
    }

    /// `POST /v1/poweroff`
    ///
    /// # Errors
    /// [`Error`].
    pub fn poweroff(&self) -> Result<Done, Error> {
        self.ask(Method::POST, "/v1/poweroff")
    }

    /// `POST /v1/reboot`
    ///
    /// # Errors
    /// [`Error`].
    pub fn reboot(&self) -> Result<Done, Error> {
        self.ask(Method::POST, "/v1/reboot")
    }

    /// `GET /v1/graphs`
    ///
    /// # Errors
    /// [`Error`].
    pub fn graphs(&self) -> Result<Graphs, Error> {
        self.ask(Method::GET, "/v1/graphs")
    }

    /// `GET /metrics`, as text: in the form of `OpenMetrics`, or in that which Prometheus reads.
    ///
    /// # Errors
    /// [`Error`].
    pub fn metrics(&self, open_metrics: bool) -> Result<String, Error> {
        let accept = if open_metrics { "application/openmetrics-text" } else { "text/plain" };
        let asked = Request::builder().method(Method::GET).uri("/metrics").header(header::ACCEPT, accept);
        let (_, bytes) = self.bytes(asked, Bytes::new(), self.within)?;
        String::from_utf8(bytes.into()).map_err(|e| self.broken(&e))
    }

    /// `GET /v1/secrets`: of one brane, or of all.
    ///
    /// # Errors
    /// [`Error`].
    pub fn secrets(&self, brane: Option<&str>) -> Result<Secrets, Error> {
        let query = brane.map(|brane| format!("?brane={brane}")).unwrap_or_default();
        self.ask(Method::GET, &format!("/v1/secrets{query}"))
    }

    /// `GET /v1/components/DIGEST`: whether a component is in the store.
    ///
    /// # Errors
    /// [`Error`].
    pub fn has(&self, digest: &Digest) -> Result<bool, Error> {
        match self.ask::<Done>(Method::GET, &format!("/v1/components/{digest}")) {
            Ok(_) => Ok(true),
            Err(Error::Missing(_)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// `POST /v1/components`: puts a component into the store, under this name if there is one.
    ///
    /// # Errors
    /// [`Error`].
    pub fn push(&self, name: Option<&Reference>, component: Bytes) -> Result<Pushed, Error> {
        let mut path = format!("/v1/components?digest={}", Digest::of(&component));
        if let Some(name) = name {
            path.push_str("&name=");
            path.push_str(name.as_str());
        }
        self.ask_with(Method::POST, &path, component, PUSHED_WITHIN)
    }

    /// `POST /v1/plan`, `/v1/deploy`, `/v1/rollback`: calls `step` with each step until the last, which is returned.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Refused`] if the last step is that it failed.
    pub fn change(&self, path: &str, what: &impl Serialize, mut step: impl FnMut(&str)) -> Result<Step, Error> {
        let body = serde_json::to_vec(what).map_err(|e| self.broken(&e))?;
        let mut last = None;
        self.lines(Method::POST, path, body.into(), |steps: Vec<Step>| {
            for one in steps {
                match one {
                    Step::Doing(words) => {
                        self.progress.doing(&words);
                        if !self.progress.cares() {
                            step(&words);
                        }
                    }
                    other => {
                        last = Some(other);
                        break;
                    }
                }
            }
            last.is_none()
        })?;
        match last {
            Some(Step::Failed(why)) => Err(Error::Refused(why)),
            Some(Step::Unchanged { reason, error }) => Err(Error::Unchanged(reason, error)),
            Some(last) => Ok(last),
            None => Err(Error::Broken("it ended before it said what came of it".into())),
        }
    }

    /// `GET /v1/logs`: calls `lines` with those that have come at once, until there are none or it says no.
    ///
    /// # Errors
    /// [`Error`].
    pub fn logs(&self, query: &Query, lines: impl FnMut(Vec<Line>) -> bool) -> Result<(), Error> {
        self.lines(Method::GET, &format!("/v1/logs?{query}"), Bytes::new(), lines)
    }

    /// The same, without an end: when the conversation breaks, it is begun again where it was. `turn` is told when that
    /// happens.
    ///
    /// # Errors
    /// [`Error`], if it does not come about the first time, or will not again.
    pub fn follow(
        &self,
        query: &Query,
        mut lines: impl FnMut(Vec<Line>) -> bool,
        mut turn: impl FnMut(Turn<'_>),
    ) -> Result<(), Error> {
        let mut query = Query { follow: true, ..query.clone() };
        let (mut wait, mut away) = (WAIT.0, false);
        loop {
            let (place, goes_on) = (Cell::new(query.from), Cell::new(true));
            let begun = |head: &HeaderMap| {
                let now = head.get(Place::FIELD).and_then(|place| Place::parse(place.to_str().ok()?));
                if std::mem::take(&mut away) {
                    let anew = now.map(|place| place.history) != query.from.map(|place| place.history);
                    turn(Turn::Again { anew });
                }
                place.set(now);
            };
            let each = |some: Vec<Line>| {
                let next = some.last().map(|last| last.seq + 1);
                place.set(place.get().map(|place| Place { number: next.unwrap_or(place.number), ..place }));
                wait = WAIT.0;
                goes_on.set(lines(some));
                goes_on.get()
            };
            let path = format!("/v1/logs?{query}");
            let ended = self.lines_from(Method::GET, &path, Bytes::new(), Some(SILENT), begun, each);
            query.from = place.get();
            if !goes_on.get() {
                return Ok(());
            }
            let error = match ended {
                Ok(true) => return Ok(()),
                Ok(false) => Error::Broken("it ended".to_owned()),
                Err(error) => error,
            };
            match error {
                // Where it was begun once, it may be begun again.
                _ if query.from.is_some() && error.may_pass() => {
                    if !std::mem::replace(&mut away, true) {
                        turn(Turn::Broke(&error));
                    }
                }
                other => return Err(other),
            }
            if self.keys {
                if runtime()?.block_on(async { timeout(wait, end_key()).await }).is_ok() {
                    return Ok(());
                }
            } else {
                std::thread::sleep(wait);
            }
            wait = (wait * 2).min(WAIT.1);
        }
    }

    /// Asks for what comes line by line, and calls `lines` with those that have come at once until there are none or it says no.
    fn lines<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        lines: impl FnMut(Vec<T>) -> bool,
    ) -> Result<(), Error> {
        self.lines_from(method, path, body, None, |_| (), lines).map(|_| ())
    }

    /// The same: `begun` sees the answer's head, and nothing may come for so long, not even an empty line. Whether a key ended it.
    fn lines_from<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        silent: Option<Duration>,
        begun: impl FnOnce(&HeaderMap),
        mut lines: impl FnMut(Vec<T>) -> bool,
    ) -> Result<bool, Error> {
        let silent = silent.unwrap_or(Duration::MAX);
        runtime()?.block_on(self.shown(async {
            let (sender, connection) = self.connection().await?;
            let exchange = async {
                let answer = self.answered(sender, Request::builder().method(method).uri(path), body).await?;
                let theirs = version(&answer);
                begun(answer.headers());
                let (mut body, mut text) = (answer.into_body(), Vec::new());
                while let Some(frame) = timeout(silent, body.frame()).await.map_err(|_| Error::Slow(silent))? {
                    let frame = frame.map_err(|e| self.broken(&e))?;
                    text.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
                    let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
                    let each = text[..whole].split(|b| *b == b'\n').filter(|one| !one.is_empty());
                    let (mut some, mut wrong) = (Vec::new(), None);
                    for one in each {
                        match serde_json::from_slice(one) {
                            Ok(one) => some.push(one),
                            Err(e) => {
                                wrong = Some(not_understood(theirs.as_ref(), &e));
                                break;
                            }
                        }
                    }
                    if !some.is_empty() && !lines(some) {
                        return Ok(false);
                    }
                    if let Some(wrong) = wrong {
                        return Err(wrong);
                    }
                    text.drain(..whole);
                    if text.len() > MAX_ANSWER {
                        return Err(Error::Broken("a line without an end".into()));
                    }
                }
                Ok(false)
            };
            let mut exchange = pin!(exchange);
            tokio::select! {
                biased;
                () = end_key(), if self.keys => Ok(true),
                outcome = exchange.as_mut() => outcome,
                outcome = connection => match outcome {
                    // What it brought last is still to be read; if it is not whole, the reader sees it.
                    Ok(()) => exchange.await,
                    // So is what it had brought when it broke.
                    Err(e) => match exchange.await {
                        Err(Error::Broken(_)) => Err(self.broken(&e)),
                        other => other,
                    },
                },
            }
        }))
    }

    async fn connection(&self) -> Result<(Sender, Connection), Error> {
        let stream: Box<dyn Stream> = match &self.way {
            Way::Socket(socket) => {
                let stream = UnixStream::connect(socket).await;
                Box::new(stream.map_err(|source| Error::Connect { socket: socket.clone(), source })?)
            }
            Way::Network(folder, remote) => {
                let stream = remote.connect(folder).await;
                Box::new(stream.map_err(|e| Error::Remote(Failure::of(&e)))?)
            }
        };
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| Error::Broken(e.to_string()))
    }

    /// Sends a request; an answer that is a refusal is an error.
    async fn answered(
        &self,
        mut sender: Sender,
        request: http::request::Builder,
        body: Bytes,
    ) -> Result<Response<Incoming>, Error> {
        let request = request.header(header::HOST, "appliance");
        let body = Sent { all: body.len() as u64, rest: body, progress: self.progress.clone() };
        let request = request.body(body).map_err(|e| self.broken(&e))?;
        let path = request.uri().path().to_owned();
        let response = sender.send_request(request).await.map_err(|e| self.broken(&e))?;
        let status = response.status();
        if status.is_success() && status != StatusCode::NO_CONTENT {
            return Ok(response);
        }
        let theirs = version(&response);
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| self.broken(&*e))?;
        match serde_json::from_slice::<Failed>(&body.to_bytes()) {
            Ok(failed) if status == StatusCode::NOT_FOUND && path.starts_with("/v1/components/") => {
                Err(Error::Missing(failed.error))
            }
            // What one of two versions does not know is not there, or no request.
            Ok(failed) if [400, 404, 405].contains(&status.as_u16()) && is_other(theirs.as_ref()) => {
                Err(Error::Version { theirs, what: failed.error })
            }
            Ok(failed) if status == StatusCode::NOT_FOUND => Err(Error::Missing(failed.error)),
            Ok(failed) => Err(Error::Refused(failed.error)),
            Err(_) => Err(Error::Refused(format!("the appliance answered {status}"))),
        }
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, Error> {
        self.progress.doing("waiting for the appliance");
        self.ask_with(method, path, Bytes::new(), self.within)
    }

    fn ask_with<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        within: Duration,
    ) -> Result<T, Error> {
        let (theirs, answer) = self.bytes(Request::builder().method(method).uri(path), body, within)?;
        serde_json::from_slice(&answer).map_err(|e| not_understood(theirs.as_ref(), &e))
    }

    /// A whole answer, and of which version whoever gave it is.
    fn bytes(
        &self,
        request: http::request::Builder,
        body: Bytes,
        within: Duration,
    ) -> Result<(Option<String>, Bytes), Error> {
        let conversation = async {
            let (sender, connection) = self.connection().await?;
            let exchange = async {
                let response = self.answered(sender, request, body).await?;
                let theirs = version(&response);
                let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
                Ok((theirs, body.map_err(|e| self.broken(&*e))?.to_bytes()))
            };
            match tokio::join!(exchange, connection) {
                // Whoever heard how it ended may be the connection.
                (Err(Error::Broken(_)), Err(e)) => Err(self.broken(&e)),
                (exchanged, _) => exchanged,
            }
        };
        let outcome = runtime()?.block_on(self.shown(async { tokio::time::timeout(within, conversation).await }));
        outcome.map_err(|_| Error::Slow(within))?
    }
}

type Sender = hyper::client::conn::http1::SendRequest<Sent>;
type Connection = hyper::client::conn::http1::Connection<TokioIo<Box<dyn Stream>>, Sent>;

/// A request's body, which tells how much of it has gone.
#[derive(Debug)]
struct Sent {
    rest: Bytes,
    all: u64,
    progress: Progress,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let next = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(next);
        self.progress.bytes(self.all - self.rest.len() as u64, self.all);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// The version of whoever answered, if it says so.
fn version(answer: &Response<Incoming>) -> Option<String> {
    let server = answer.headers().get(header::SERVER)?.to_str().ok()?;
    server.strip_prefix("gaia/").map(str::to_owned)
}

/// Whether it is known to be another than this one.
fn is_other(theirs: Option<&String>) -> bool {
    theirs.is_some_and(|theirs| theirs != env!("CARGO_PKG_VERSION"))
}

/// An answer that is none. One of this same version is broken; any other may be right in its own way.
fn not_understood(theirs: Option<&String>, error: &serde_json::Error) -> Error {
    match theirs {
        Some(theirs) if theirs == env!("CARGO_PKG_VERSION") => Error::Broken(error.to_string()),
        _ => Error::Version { theirs: theirs.cloned(), what: error.to_string() },
    }
}

/// Waits for q or Ctrl-C, or for the end of the terminal.
async fn end_key() {
    let Ok(stdin) = std::io::stdin().as_fd().try_clone_to_owned() else { return std::future::pending().await };
    // SAFETY: the descriptor is this value's own, which names the same open file for as long as it lives.
    let Ok(stdin) = (unsafe { AsyncFd::register_with_interest(stdin, Interest::READABLE) }) else {
        return std::future::pending().await;
    };
    while let Ok(mut ready) = stdin.readable().await {
        // The terminal blocks whoever reads when there is nothing: so it is asked first.
        let mut typed = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut typed, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => {
                ready.clear_ready();
                continue;
            }
            Ok(_) => {}
            Err(_) => return,
        }
        let mut byte = [0];
        match rustix::io::read(&stdin, &mut byte) {
            Ok(0) => return,
            Ok(_) if matches!(byte[0], b'q' | b'Q' | 3) => return,
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| Error::Broken(e.to_string()))
}

/// A status as a person reads it.
#[must_use]
pub fn status_text(s: &Status) -> String {
    let mut out = String::new();
    let serving =
        s.generation.map_or_else(|| "nothing yet".to_owned(), |g| format!("generation {g}, {} branes", s.branes));
    let used = s.memory.total_kib.saturating_sub(s.memory.available_kib);
    let _ = writeln!(out, "gaia {} · {} · up {}", s.version, s.kernel, seconds(s.uptime_s));
    if !s.key.is_empty() {
        let _ = writeln!(out, "key      {}", s.key);
    }
    let _ = writeln!(out, "serves   {serving} · {} requests, {} lost with a worker", s.requests, s.lost);
    let _ = writeln!(out, "memory   {} of {} MiB used", used / 1024, s.memory.total_kib / 1024);
    let dropped: u64 = s.workers.iter().map(|w| w.dropped).sum();
    if dropped > 0 {
        let _ = writeln!(out, "log      {dropped} records had no room, and are told as LOST");
    }
    if let Some(export) = &s.export {
        let state = match (&export.error, export.connected) {
            (_, true) => "connected".to_owned(),
            (Some(error), false) => format!("not connected: {error}"),
            (None, false) => "connecting".to_owned(),
        };
        let _ = writeln!(out, "log      to {}: {} sent, {} missed; {state}", export.to, export.sent, export.missed);
    }
    for words in &s.words {
        let _ = writeln!(out, "deploy   {}", words.replace('\n', "\n         "));
    }
    let _ = writeln!(out, "\n{:<20} {:>6} {:<12} {:>9} {:>8}  SANDBOX", "ROLE", "PID", "STATE", "SINCE", "RESTARTS");
    for r in &s.roles {
        let since = seconds(Duration::from_millis(r.millis).as_secs_f64());
        let _ =
            writeln!(out, "{:<20} {:>6} {:<12} {since:>9} {:>8}  {}", r.name, r.pid, r.state, r.restarts, r.sandbox);
    }
    let _ = writeln!(out, "\n{:<12} {:>10} {:>10} {:>8} {:>12}", "WORKER", "ACCEPTED", "REQUESTS", "INSIDE", "OUTPUT");
    for w in &s.workers {
        let name = format!("worker@{}", w.core);
        let _ =
            writeln!(out, "{name:<12} {:>10} {:>10} {:>8} {:>10} B", w.accepted, w.requests, w.inside, w.output_bytes);
    }
    out.push_str(&s.cores.as_ref().map(cores_text).unwrap_or_default());
    out
}

/// What the kernel gave the cores, as a person reads it. Where all share them, the counts of each core's interrupts mean little.
fn cores_text(given: &Given) -> String {
    let mut out = format!("\ncores    {}\n", given.line());
    for deviation in &given.deviations {
        let _ = writeln!(out, "differs  {deviation}");
    }
    if given.shared {
        return out;
    }
    let _ = writeln!(
        out,
        "{:<6} {:<12} {:<10} {:>10} {:>8}  INTERRUPTS SINCE THE BOOT",
        "CORE", "PARTITION", "CPUS", "TICKS", "CALLS"
    );
    for core in &given.cores {
        let one = |i: &Interrupt| {
            let place = match i.fires {
                Fires::Here => "",
                Fires::Once => " (goes after one more)",
                Fires::Elsewhere => " (gone)",
            };
            format!("{} {}: {}{place}", i.number, i.name, i.count)
        };
        let interrupts: Vec<_> = core.interrupts.iter().map(one).collect();
        let interrupts = if interrupts.is_empty() { "none".to_owned() } else { interrupts.join(", ") };
        let word = |of: &Option<String>| of.clone().unwrap_or_else(|| "-".into());
        let (partition, effective) = (word(&core.partition), word(&core.effective));
        let _ = writeln!(
            out,
            "{:<6} {partition:<12} {effective:<10} {:>10} {:>8}  {interrupts}",
            core.core, core.ticks, core.calls
        );
    }
    out
}

/// Branes and instances as a person reads them.
#[must_use]
pub fn ps_text(ps: &Ps) -> String {
    let mut out = format!(
        "{:<16} {:<20} {:>8} {:>5} {:>8} {:>9} {:>6} {:>5} {:>6} {:>9} {:>10}  {}\n",
        "BRANE",
        "ROUTE",
        "REPLICAS",
        "BUSY",
        "WAITING",
        "REQUESTS",
        "TRAPS",
        "LATE",
        "KILLED",
        "THROTTLED",
        "COLD",
        "IMAGE"
    );
    for b in &ps.branes {
        let cold = Duration::from_nanos(b.cold_mean_ns).as_secs_f64() * 1000.0;
        let throttled = seconds(Duration::from_nanos(b.throttled_ns).as_secs_f64());
        let digest = b.digest.get(..12).unwrap_or_default();
        let _ = writeln!(
            out,
            "{:<16} {:<20} {:>8} {:>5} {:>8} {:>9} {:>6} {:>5} {:>6} {throttled:>9} {cold:>8.2}ms  {} @{digest}",
            b.name, b.route, b.replicas, b.busy, b.waiting, b.requests, b.traps, b.late, b.killed, b.image
        );
    }
    for worker in &ps.silent {
        let _ = writeln!(out, "\n{worker} did not say in time what runs in it");
    }
    if !ps.instances.is_empty() {
        let _ = writeln!(out, "\n{:<20} {:<20} {:>8}", "INSTANCE", "ROLE", "RUNNING");
        for i in &ps.instances {
            let _ = writeln!(out, "{:<20} {:<20} {:>6}ms", i.name, i.role, i.millis);
        }
    }
    out
}

/// `4.2s`, `3m12s`, `2h5m`, `9d4h`
pub(crate) fn seconds(s: f64) -> String {
    let whole = Duration::try_from_secs_f64(s).unwrap_or_default().as_secs();
    match whole {
        0..60 => format!("{s:.1}s"),
        60..3600 => format!("{}m{}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!(seconds(4.24), "4.2s");
        assert_eq!(seconds(192.0), "3m12s");
        assert_eq!(seconds(7500.0), "2h5m");
        assert_eq!(seconds(792_000.0), "9d4h");
    }

    /// Answers one request with this and closes; its head.
    fn answer(listener: &std::os::unix::net::UnixListener, answer: &str) -> String {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8(head).unwrap()
    }

    /// Lines from here on, the last of which breaks off in its middle.
    fn broken_off(place: &str, lines: std::ops::Range<u64>) -> String {
        let line = |seq| {
            format!(
                "{{\"seq\":{seq},\"time_ns\":1,\"brane\":null,\"instance\":null,\"kind\":\"KILL\",\"text\":\"x\"}}\n"
            )
        };
        let whole: String = lines.clone().map(line).collect();
        let half = &line(lines.end)[..20];
        let size = whole.len() + half.len();
        format!(
            "HTTP/1.1 200 OK\r\n{}: {place}\r\ntransfer-encoding: chunked\r\n\r\n{size:x}\r\n{whole}{half}",
            Place::FIELD
        )
    }

    /// Would miss: a follower that is told a line twice, or not at all, when the conversation breaks in the middle of one.
    #[test]
    fn who_is_cut_off_goes_on_with_the_next_line() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let all = [("5.7", 7..9), ("5.9", 9..10), ("6.0", 0..1)];
            all.map(|(place, lines)| answer(&listener, &broken_off(place, lines)))
        });
        let (mut read, mut turns) = (Vec::new(), Vec::new());
        let query = Query { lines: Some(2), branes: vec!["a".into()], ..Query::default() };
        let lines = |lines: Vec<Line>| {
            read.extend(lines.iter().map(|line| line.seq));
            read.len() < 4
        };
        let turn = |turn: Turn<'_>| turns.push(if let Turn::Again { anew } = turn { Some(anew) } else { None });
        Client::new(socket).follow(&query, lines, turn).unwrap();
        assert_eq!(read, [7, 8, 9, 0]);
        assert_eq!(turns, [None, Some(false), None, Some(true)]);
        let [first, second, third] = server.join().unwrap();
        assert!(first.contains("brane=a") && first.contains("lines=2") && !first.contains("from="), "{first}");
        assert!(second.contains("from=5.9 ") && third.contains("from=5.10 "), "{second}{third}");
    }

    #[test]
    fn what_does_not_come_about_or_is_refused_is_not_tried_again() {
        let follow = |socket: PathBuf| Client::new(socket).follow(&Query::default(), |_| true, |_| panic!("a turn"));
        assert!(matches!(follow("/nonexistent/socket".into()), Err(Error::Connect { .. })));
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let refusal = "HTTP/1.1 404 Not Found\r\ncontent-length: 25\r\n\r\n{\"error\":\"no such brane\"}";
        let server = std::thread::spawn(move || answer(&listener, refusal));
        assert!(matches!(follow(socket), Err(Error::Missing(why)) if why == "no such brane"));
        server.join().unwrap();
    }

    #[test]
    fn nobody_there_says_what_to_look_at() {
        let error = Client::new("/nonexistent/socket".into()).status().unwrap_err();
        let (text, failure) = (error.to_string(), error.failure());
        assert!(text.contains("/nonexistent/socket") && text.contains("is the appliance up?"), "{text}");
        assert_eq!(failure.kind, Kind::Unreachable);
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("left.sock");
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        let failure = Client::new(left).status().unwrap_err().failure();
        assert_eq!(failure.kind, Kind::Unreachable);
        assert!(failure.error.starts_with("nobody listens on the socket"), "{failure}");
    }

    /// What a client makes of a control that gives this answer, whatever it is asked.
    fn answered<T>(answer: &str, ask: impl FnOnce(&Client) -> Result<T, Error>) -> (Result<T, Error>, String) {
        use std::io::{Read as _, Write as _};
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let answer = answer.to_owned();
        let control = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut heard, mut some) = (Vec::new(), [0; 4096]);
            loop {
                let text = String::from_utf8_lossy(&heard).into_owned();
                let length = |head: &str| {
                    let line = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                    line.map_or(0, |n| n.parse::<usize>().unwrap())
                };
                if text.split_once("\r\n\r\n").is_some_and(|(head, body)| body.len() >= length(head)) {
                    break;
                }
                let n = stream.read(&mut some).unwrap();
                assert!(n > 0, "{text}");
                heard.extend_from_slice(&some[..n]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&heard).into_owned()
        });
        let outcome = ask(&Client::new(socket));
        (outcome, control.join().unwrap())
    }

    fn http(status: &str, server: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\n{server}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
    }

    #[test]
    fn a_control_of_another_version_is_named_where_it_is_not_understood() {
        let ours = format!("Server: {SERVER}\r\n");
        let failure = |answer: &str| answered(answer, Client::status).0.unwrap_err().failure();
        let newer = failure(&http("200 OK", "Server: gaia/9.0.0\r\n", "{\"state\":\"fine\"}"));
        assert!(newer.help.unwrap().starts_with("the appliance's gaia is 9.0.0, this one is "), "{}", newer.error);
        let silent = failure(&http("200 OK", "", "{}"));
        assert!(silent.help.unwrap().starts_with("the appliance's gaia is of another version"));
        let broken = failure(&http("200 OK", &ours, "{}"));
        assert!(broken.error.contains("broke"), "{broken}");
        let gone = http("404 Not Found", "Server: gaia/0.0.1\r\n", "{\"error\":\"there is no such path\"}");
        assert!(failure(&gone).help.unwrap().contains("0.0.1"));
        // What is missing in the store of an older one is missing, and no misunderstanding.
        let (has, _) = answered(&gone, |client| client.has(&Digest::of(b"")));
        assert!(!has.unwrap());
        let refused = failure(&http("409 Conflict", "Server: gaia/9.0.0\r\n", "{\"error\":\"no\"}"));
        assert_eq!((refused.error.as_str(), refused.help), ("no", None));
    }

    #[test]
    fn why_nothing_was_changed_becomes_an_exit_status() {
        let of = |step: &str| {
            let answer = http("200 OK", "", &format!("{{\"doing\":\"a\"}}\n{step}\n"));
            let (outcome, _) = answered(&answer, |client| client.change("/v1/rollback", &"", |_| {}));
            outcome.unwrap_err().failure()
        };
        for (reason, kind) in [
            ("not_agreed", Kind::NotAgreed),
            ("not_shown", Kind::Overtaken),
            ("busy", Kind::Overtaken),
            ("new", Kind::Failed),
        ] {
            let failure = of(&format!("{{\"unchanged\":{{\"reason\":\"{reason}\",\"error\":\"why\"}}}}"));
            assert_eq!(failure.kind, kind, "{reason}");
            assert!(failure.error.contains("why"), "{failure}");
        }
        assert_eq!(of("{\"failed\":\"why\"}").kind, Kind::Failed);
    }

    #[test]
    fn a_component_goes_in_pieces_and_whole() {
        let component = Bytes::from(vec![b'x'; 3 * PIECE + 1]);
        let body = format!("{{\"digest\":\"{}\",\"bytes\":1,\"name\":null}}", Digest::of(&component));
        let progress = Progress::on_terminal(false);
        let (pushed, heard) = answered(&http("200 OK", "", &body), |client| {
            client.clone().showing(progress).push(None, component.clone())
        });
        assert_eq!(pushed.unwrap().bytes, 1);
        assert!(heard.contains(&format!("content-length: {}\r\n", component.len())), "{}", &heard[..200]);
        assert_eq!(heard.split_once("\r\n\r\n").unwrap().1.len(), component.len());
    }
}
