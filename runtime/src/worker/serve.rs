//! The request path: parse → route → take an instance → guest → respond → release.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::InvalidHeaderValue;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Sleep;
use wasmtime_wasi::I32Exit;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error, WasiHttpView as _};

use super::Worker;
use super::brane::{Brane, Instance};
use super::memory::Held;
use super::pinned::PassedBody;
use super::route::{self, Target};
use super::turns::{Terms, thread_cpu};
use crate::histogram::nanos;
use crate::log::{Event, Subject};
use crate::statistics::While;
use crate::trace;

/// Requests that may wait for an instance of one brane in one worker; more are refused at once.
pub(super) const QUEUE: u64 = 1024;

/// What goes out: the runtime's own few words, or a guest's stream, from here or from a keeper.
pub type Answer = Response<Either<Full<Bytes>, Either<GuestBody, PassedBody>>>;

/// One connection, as its requests see it; in HTTP/2 one stream of it.
pub struct Connection {
    /// The worker that accepted it.
    pub worker: Rc<Worker>,
    /// Who is at the other end.
    pub peer: SocketAddr,
    /// Whether it is TLS.
    pub secure: bool,
    /// Counted until the first request's head has been read.
    pub fresh: RefCell<Option<While>>,
    /// An answer broke off: the client must see a reset, or it could take the part for the whole.
    pub broken: Rc<Cell<bool>>,
    /// Of a stream: when its answer must be over.
    pub until: Cell<Option<Instant>>,
    /// Requests whose answer hyper has not taken whole yet.
    pub at_work: Cell<u32>,
    /// The worker drains: the next answer is the last one here, and says so.
    pub last: Cell<bool>,
    /// While it drains: when it began to, or when the last answer since was over.
    pub idle_since: Cell<Instant>,
}

/// Counts a request among those that a connection is at work on, until dropped.
pub(super) struct AtWork(Rc<Connection>);

impl AtWork {
    fn on(connection: &Rc<Connection>) -> Self {
        connection.at_work.set(connection.at_work.get() + 1);
        Self(Rc::clone(connection))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.at_work.set(self.0.at_work.get() - 1);
        if self.0.last.get() {
            self.0.idle_since.set(Instant::now());
        }
    }
}

impl Connection {
    /// How long nothing has been asked here since the worker drains; nothing while something is.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        (self.at_work.get() == 0).then(|| self.idle_since.get().elapsed())
    }

    /// A stream of this connection, which ends by itself when an answer breaks off.
    #[must_use]
    pub fn stream(&self, until: Instant) -> Self {
        Self {
            worker: Rc::clone(&self.worker),
            peer: self.peer,
            secure: self.secure,
            fresh: RefCell::new(self.fresh.take()),
            broken: Rc::default(),
            until: Cell::new(Some(until)),
            at_work: Cell::default(),
            last: Cell::default(),
            idle_since: Cell::new(until),
        }
    }
}

/// Serves one request.
///
/// # Errors
/// Never; the type is what hyper wants.
pub async fn serve(connection: Rc<Connection>, request: Request<Incoming>) -> Result<Answer, Infallible> {
    let began = Instant::now();
    let statistics = &connection.worker.statistics;
    statistics.worker.requests.fetch_add(1, Relaxed);
    let exchange = Rc::new(Exchange::new(&connection.worker));
    connection.fresh.take();
    let answer = dispatch(&connection, request, began, &exchange, AtWork::on(&connection)).await;
    let mut answer = answer.unwrap_or_else(|own| {
        exchange.status.set(own.status.as_u16());
        statistics.worker.answered_itself(own.status.as_u16());
        if exchange.why.borrow().is_empty() {
            exchange.why.replace(own.words.clone());
        }
        own.answer()
    });
    if connection.last.get() {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(answer)
}

/// A request and its answer, from the head of the one to the end of the other. Whoever works on it holds it; when the last
/// lets go, it writes what became of it to the log.
struct Exchange {
    worker: Rc<Worker>,
    /// Whose request it is: nobody's until it is routed.
    subject: Cell<Subject>,
    /// The answer's status, 0 before there is one.
    status: Cell<u16>,
    /// Why the runtime gave that answer, if it did.
    why: RefCell<Cow<'static, str>>,
    /// Processor time of the guest.
    cpu: Cell<Duration>,
    /// Of an instance that has begun: how long that took, and since when it has been at work.
    instance: Cell<Option<(Duration, Instant)>>,
    /// It was ready.
    ready: Cell<bool>,
    /// How long it was at work; nothing if it was ended before it was done, because its answer was whole or the client gone.
    exec: Cell<Option<Duration>>,
    /// What the instance held at its end, in bytes.
    held: Cell<u64>,
    /// The guest's work has ended; what is left is the release.
    ended: Cell<bool>,
    late: Cell<bool>,
    /// The whole answer was given out to be sent: nothing of the guest's is missed any more.
    whole: Cell<bool>,
    /// Counts it among the requests inside. It is held as long as the exchange, so until the answer has gone out: what a
    /// worker's end costs is then told whole.
    inside: Cell<Option<While>>,
}

impl Exchange {
    fn new(worker: &Rc<Worker>) -> Self {
        Self {
            worker: Rc::clone(worker),
            subject: Cell::new(Subject::Worker),
            status: Cell::new(0),
            why: RefCell::default(),
            cpu: Cell::default(),
            instance: Cell::default(),
            ready: Cell::default(),
            exec: Cell::default(),
            held: Cell::default(),
            ended: Cell::default(),
            late: Cell::default(),
            whole: Cell::default(),
            inside: Cell::new(Some(While::counted(&worker.statistics, |page| &page.worker.inside))),
        }
    }

    fn log(&self, event: &Event<'_>) {
        self.worker.log.write(self.subject.get(), event);
    }

    /// The deadline passed: said once, whoever notices it first.
    fn is_late(&self, brane: &Brane) {
        if !self.late.replace(true) {
            brane.count().late.fetch_add(1, Relaxed);
            self.log(&Event::Kill { text: format!("deadline of {:?}", brane.plan.deadline).into() });
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let status = self.status.get();
        if status > 0 {
            if let (Subject::Brane(index, _), 500..) = (self.subject.get(), status) {
                self.worker.statistics.branes[index].failed.fetch_add(1, Relaxed);
            }
            let text = self.why.borrow();
            self.log(&Event::Response { status, cpu: self.cpu.get(), text: text.as_ref().into() });
        }
        if let Some((cold, since)) = self.instance.get() {
            let given_up = self.exec.get().is_none() && !self.late.get() && !self.whole.get();
            let text = if given_up { "the client was gone" } else { "" };
            let exec = self.exec.get().unwrap_or_else(|| since.elapsed());
            if let (Subject::Brane(index, _), Some(profiles)) = (self.subject.get(), &self.worker.means.profiles)
                && let Some(profile) = profiles.of(index)
            {
                profile.cold.record(nanos(cold));
                profile.record(exec, self.cpu.get(), self.held.get());
            }
            self.log(&Event::End { cold, exec, ready: self.ready.get(), text: text.into() });
        }
    }
}

/// An answer that the runtime gives itself.
pub(super) struct Own {
    status: StatusCode,
    words: Cow<'static, str>,
    retry_after: Option<u64>,
}

pub(super) fn own(status: StatusCode, words: impl Into<Cow<'static, str>>) -> Own {
    Own { status, words: words.into(), retry_after: None }
}

/// No instance becomes free in time.
pub(super) fn too_busy() -> Own {
    Own { retry_after: Some(1), ..own(StatusCode::SERVICE_UNAVAILABLE, "all instances are busy") }
}

/// The instance ended because the host is short of memory.
pub(super) fn too_short() -> Own {
    let short = own(StatusCode::SERVICE_UNAVAILABLE, "memory is short, and the brane had most");
    Own { retry_after: Some(1), ..short }
}

impl Own {
    fn answer(self) -> Answer {
        let mut answer = Response::new(Either::Left(Full::new(Bytes::from(self.words.into_owned() + "\n"))));
        *answer.status_mut() = self.status;
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if let Some(seconds) = self.retry_after {
            answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        answer
    }
}

async fn dispatch(
    connection: &Connection,
    request: Request<Incoming>,
    began: Instant,
    exchange: &Rc<Exchange>,
    at_work: AtWork,
) -> Result<Answer, Own> {
    let worker = &connection.worker;
    let (request, host) = normalised(request, connection.peer, connection.secure)?;
    let Some(target) = route::find(&worker.branes, &worker.pinned, &host, request.uri().path()) else {
        worker.statistics.worker.no_route.fetch_add(1, Relaxed);
        exchange.why.replace(format!("no brane is served at {host}{}", request.uri().path()).into());
        return Err(own(StatusCode::NOT_FOUND, "no brane is served here"));
    };
    let (index, plan) = match &target {
        Target::Here(brane) => (brane.index, &brane.plan),
        Target::Kept(brane) => (brane.index, &brane.plan),
    };
    exchange.subject.set(Subject::Brane(index, 0));
    worker.statistics.branes[index].requests.fetch_add(1, Relaxed);
    let body_max = plan.body_max;
    let too_large = || own(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have {body_max} bytes"));
    if request.body().size_hint().lower() > body_max {
        return Err(too_large());
    }
    let head_only = request.method() == Method::HEAD;
    let deadline = began + plan.deadline;
    connection.until.set(Some(deadline));
    let brane = match target {
        Target::Here(brane) => brane,
        Target::Kept(brane) => {
            let held = (at_work, exchange.inside.take());
            let passed = brane.pass(request, deadline, Rc::clone(&connection.broken), held).await?;
            return Ok(passed.map(|body| Either::Right(Either::Right(body))));
        }
    };
    let permit = slot(&brane, deadline).await?;
    let over = Arc::new(AtomicBool::new(false));
    let request = request.map(|body| Bounded { body, left: body_max, over: Arc::clone(&over) });
    let (sender, head) = oneshot::channel();
    let broken = Arc::new(AtomicBool::new(false));
    let instance = brane.take();
    let place = (&instance, permit);
    let guest = Guest::begin(Rc::clone(exchange), Rc::clone(&brane), place, Arc::clone(&broken), Arc::clone(&over));
    // In a box of its own, or its some KiB would be copied from place to place on their way into a task.
    let work = tokio::task::spawn_local(Box::pin(run(guest, instance, request, sender, deadline)));
    let mut task = Task { work, exchange: Rc::clone(exchange) };
    let late = || {
        exchange.is_late(&brane);
        own(StatusCode::GATEWAY_TIMEOUT, "the deadline passed before there was an answer")
    };
    match tokio::time::timeout_at(deadline.into(), head).await {
        Err(_) => Err(late()),
        Ok(Ok(_)) if over.load(Relaxed) => Err(too_large()),
        Ok(Ok(Ok(response))) if response.status().is_informational() => {
            Err(own(StatusCode::BAD_GATEWAY, "the brane answered with an informational status"))
        }
        Ok(Ok(Ok(response))) => {
            let late = Box::pin(tokio::time::sleep_until(deadline.into()));
            let (reset, exchange) = (Rc::clone(&connection.broken), Rc::clone(exchange));
            exchange.status.set(response.status().as_u16());
            let left = if head_only { Some(0) } else { announced(&response) };
            exchange.whole.set(left == Some(0));
            Ok(response.map(|body| {
                let body =
                    GuestBody { body, left, late, broken, reset, brane, exchange, _task: task, _at_work: at_work };
                Either::Right(Either::Left(body))
            }))
        }
        Ok(Ok(Err(code))) => {
            Err(own(StatusCode::BAD_GATEWAY, format!("the brane answered with an error: {}", word(&code))))
        }
        // The guest has ended without an answer: how, its task says.
        Ok(Err(_)) => match (&mut task.work).await {
            _ if over.load(Relaxed) => Err(too_large()),
            Ok(Ended::Returned) => Err(own(StatusCode::BAD_GATEWAY, "the brane ended without a response")),
            Ok(Ended::Late) => Err(late()),
            Ok(Ended::Short) => Err(too_short()),
            Ok(Ended::Trap(id)) => Err(own(StatusCode::INTERNAL_SERVER_ERROR, format!("the brane trapped: {id}"))),
            Ok(Ended::Host(id)) => Err(own(StatusCode::INTERNAL_SERVER_ERROR, format!("the runtime failed: {id}"))),
            Err(_) => Err(own(StatusCode::INTERNAL_SERVER_ERROR, "the runtime failed")),
        },
    }
}

/// How many bytes an answer's body has, if its head says so: `Content-Length`, or a status that has no body.
fn announced<B>(response: &Response<B>) -> Option<u64> {
    if matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Some(0);
    }
    response.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The name of an error code without what it carries: that may be the guest's words, and they are for the log.
pub(super) fn word(code: &ErrorCode) -> String {
    format!("{code:?}").chars().take_while(|c| c.is_ascii_alphanumeric() || *c == ':').collect()
}

/// Waits for one of the brane's slots: not longer than the deadline, and not behind too many others.
async fn slot(brane: &Brane, deadline: Instant) -> Result<OwnedSemaphorePermit, Own> {
    if let Ok(permit) = Arc::clone(&brane.slots).try_acquire_owned() {
        return Ok(permit);
    }
    let refused = || {
        brane.count().refused.fetch_add(1, Relaxed);
        too_busy()
    };
    if brane.count().waiting.load(Relaxed) >= QUEUE {
        return Err(refused());
    }
    let _waiting = brane.waiting();
    match tokio::time::timeout_at(deadline.into(), Arc::clone(&brane.slots).acquire_owned()).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => Err(refused()),
    }
}

/// Checks what HTTP demands and puts the request into the form that guests see, whatever the version: an authority in the
/// URI, and the scheme of the connection; one `Forwarded` header that is the runtime's. Also returns the host it is for,
/// lower case, without port.
fn normalised<B>(mut request: Request<B>, peer: SocketAddr, secure: bool) -> Result<(Request<B>, String), Own> {
    if request.headers().contains_key(header::UPGRADE) || request.method() == Method::CONNECT {
        return Err(own(StatusCode::NOT_IMPLEMENTED, "no protocol to upgrade to, and no tunnels"));
    }
    let bad = |what: &'static str| own(StatusCode::BAD_REQUEST, what);
    let version = request.version();
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let authority = match (request.uri().authority(), hosts.next(), hosts.next()) {
        (_, _, Some(_)) => return Err(bad("more than one Host")),
        // One of them may have been checked by someone on the way, and not the other (RFC 9113, section 8.3.1).
        (Some(authority), Some(host), _)
            if version == Version::HTTP_2 && !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) =>
        {
            return Err(bad("Host is not the authority"));
        }
        // In absolute form the URI counts and `Host` does not (RFC 9112, section 3.2.2).
        (Some(authority), ..) => authority.clone(),
        (None, Some(host), _) => {
            host.to_str().ok().and_then(|h| h.parse().ok()).ok_or_else(|| bad("Host is not a host"))?
        }
        (None, None, _) if version == Version::HTTP_10 => http::uri::Authority::from_static("localhost"),
        (None, None, _) => return Err(bad("Host is missing")),
    };
    if authority.as_str().contains('@') {
        return Err(bad("a host has no user before it"));
    }
    let host = authority.host().to_ascii_lowercase();
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(if secure { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
    parts.authority = Some(authority);
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
    }
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| bad("the request's target is not a URI"))?;
    if version == Version::HTTP_2 {
        whole_cookie(request.headers_mut()).map_err(|_| bad("Cookie is not a header"))?;
    }
    let proto = if secure { "https" } else { "http" };
    let from = match peer {
        SocketAddr::V4(v4) => format!("for={};proto={proto}", v4.ip()),
        SocketAddr::V6(v6) => format!("for=\"[{}]\";proto={proto}", v6.ip()),
    };
    let from = HeaderValue::from_str(&from).map_err(|_| bad("the client has no address"))?;
    request.headers_mut().insert(header::FORWARDED, from);
    trace::check(request.headers_mut());
    Ok((request, host))
}

/// Puts together what HTTP/2 may send in pieces: elsewhere there is one `Cookie` (RFC 9113, section 8.2.3).
fn whole_cookie(headers: &mut HeaderMap) -> Result<(), InvalidHeaderValue> {
    if headers.get_all(header::COOKIE).iter().nth(1).is_some() {
        let pieces: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
        let whole = HeaderValue::from_bytes(&pieces.join(b"; ".as_slice()))?;
        headers.insert(header::COOKIE, whole);
    }
    Ok(())
}

/// How a guest's work ended.
enum Ended {
    /// `handle` came back, or the guest exited by its own will.
    Returned,
    /// The deadline passed.
    Late,
    /// The host was short of memory, and it had most.
    Short,
    /// The guest trapped; the instance's name, under which the cause is in the log.
    Trap(String),
    /// The runtime could not do its part; likewise.
    Host(String),
}

/// An instance at work; the counts go down when it is gone, however it goes.
struct Guest {
    exchange: Rc<Exchange>,
    brane: Rc<Brane>,
    serial: u64,
    /// What the instance holds.
    held: Arc<Held>,
    /// Set before the instance's part of the answer's stream is dropped, when it ended as it should not.
    broken: Arc<AtomicBool>,
    /// The client sent more than it may: what the guest makes of that is not the guest's fault.
    over: Arc<AtomicBool>,
    /// The slot that the instance is in, until the next is made there.
    slot: Option<OwnedSemaphorePermit>,
}

impl Guest {
    fn begin(
        exchange: Rc<Exchange>,
        brane: Rc<Brane>,
        (instance, slot): (&Instance, OwnedSemaphorePermit),
        broken: Arc<AtomicBool>,
        over: Arc<AtomicBool>,
    ) -> Self {
        let (serial, held) = (instance.serial, Arc::clone(&instance.held));
        exchange.subject.set(Subject::Brane(brane.index, serial));
        exchange.ready.set(instance.proxy.is_some());
        Self { exchange, brane, serial, held, broken, over, slot: Some(slot) }
    }

    /// The instance's name.
    fn id(&self) -> String {
        format!("{}.{:03}", self.brane.plan.name, self.serial)
    }

    fn trapped(&self, cause: &wasmtime::Error) -> Ended {
        // That there are no more handles for it is only how it learns of it.
        if self.held.is_too_much() {
            return self.has_most();
        }
        if !self.over.load(Relaxed) {
            self.brane.count().traps.fetch_add(1, Relaxed);
            self.exchange.log(&Event::Trap { text: cause.root_cause().to_string().into() });
        }
        Ended::Trap(self.id())
    }

    fn has_most(&self) -> Ended {
        self.brane.count().killed.fetch_add(1, Relaxed);
        let kib = self.held.bytes() / 1024;
        let (ended, why) = if self.held.is_too_much() {
            let most = self.brane.plan.mem_max / 1024;
            (
                Ended::Trap(self.id()),
                format!("mem_max is {most} KiB, and with what the host holds for it this had {kib}"),
            )
        } else {
            (Ended::Short, format!("the host is short of it, and this held {kib} KiB"))
        };
        self.exchange.log(&Event::Kill { text: format!("memory: {why}").into() });
        ended
    }

    fn failed(&self, what: &str, cause: &wasmtime::Error) -> Ended {
        self.exchange.log(&Event::Fault { text: format!("{what}: {cause:#}").into() });
        Ended::Host(self.id())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.exchange.held.set(self.held.memory.load(Relaxed));
        self.brane.end(self.serial);
        // Its request was over before its work: nobody is left who makes the next, and it would be missing until all are idle.
        if let Some(slot) = self.slot.take() {
            drop(slot);
            tokio::task::spawn_local(Rc::clone(&self.brane).make_all_ready());
        }
    }
}

type Head = Result<Response<HyperOutgoingBody>, ErrorCode>;

/// Lets a fresh instance handle the request, one that is ready or else one that it makes, releases it, and makes another
/// ready: both after the answer has gone out, so not on the request's own time. Ends at the deadline whether or not anyone
/// still reads the answer.
async fn run(
    mut guest: Guest,
    instance: Instance,
    request: Request<Bounded>,
    head: oneshot::Sender<Head>,
    deadline: Instant,
) -> Ended {
    let brane = &guest.brane;
    let turns = brane.turns();
    turns.something_was_done();
    let replica = brane.replica();
    let Instance { mut store, proxy, .. } = instance;
    let work = async {
        // What it waited for its quota is not its start.
        let dispatched = Instant::now();
        let proxy = match proxy {
            Some(proxy) => proxy,
            None => brane.pre().instantiate_async(&mut store).await.map_err(|e| guest.failed("instantiate", &e))?,
        };
        store.data_mut().begins(request.headers());
        let mut http = store.data_mut().http();
        let secure = request.uri().scheme() == Some(&http::uri::Scheme::HTTPS);
        let scheme = if secure { Scheme::Https } else { Scheme::Http };
        let request = http.new_incoming_request(scheme, request).map_err(|e| guest.failed("request", &e))?;
        let outparam = http.new_response_outparam(head).map_err(|e| guest.failed("response", &e))?;
        let cold = dispatched.elapsed();
        brane.count().cold_ns.fetch_add(u64::try_from(cold.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        guest.exchange.instance.set(Some((cold, Instant::now())));
        Ok(proxy.wasi_http_incoming_handler().call_handle(&mut store, request, outparam).await)
    };
    let terms = Terms {
        cpu: Some(&guest.exchange.cpu),
        replica: replica.as_ref(),
        throttled: &brane.count().throttled_ns,
        memory: Some(brane.share(&guest.held)),
    };
    let work = turns.run(work, terms);
    let work = tokio::time::timeout_at(deadline.into(), work);
    let ended = tokio::select! {
        biased;
        () = guest.held.ended() => guest.has_most(),
        worked = work => match worked {
            Err(_) => Ended::Late,
            Ok(Err(ended)) => ended,
            Ok(Ok(Ok(()))) => Ended::Returned,
            Ok(Ok(Err(e))) if e.downcast_ref::<I32Exit>().is_some() => Ended::Returned,
            Ok(Ok(Err(e))) => guest.trapped(&e),
        },
    };
    if matches!(ended, Ended::Late) {
        guest.exchange.is_late(brane);
    }
    if !matches!(ended, Ended::Returned) {
        guest.broken.store(true, Relaxed);
    }
    guest.exchange.exec.set(guest.exchange.instance.get().map(|(_, since)| since.elapsed()));
    guest.exchange.ended.set(true);
    behind_what_is_due().await;
    // The store first: what the instance held must be back in the pool before the slot is free.
    if let Some(replica) = &replica {
        let before = thread_cpu();
        drop(store);
        replica.charge(turns, thread_cpu().saturating_sub(before));
    } else {
        drop(store);
    }
    // Gone, and told so, whatever becomes of the next.
    let (brane, slot) = (Rc::clone(brane), guest.slot.take());
    drop(guest);
    if let Some(slot) = slot {
        brane.make_ready(slot, replica).await;
    }
    ended
}

/// Lets the tasks run first that are due already: among them the one that sends the answer.
async fn behind_what_is_due() {
    let mut polled = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut polled, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A guest's task. Its work ends with its request; the release does not.
struct Task {
    work: JoinHandle<Ended>,
    exchange: Rc<Exchange>,
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.exchange.ended.get() {
            self.work.abort();
        }
    }
}

/// A guest's answer on its way out. When the deadline passes first, or the guest ends as it should not, the connection
/// is reset: the part must not look like the whole.
pub struct GuestBody {
    body: HyperOutgoingBody,
    /// Bytes that are still to come, if the head said how many there are: behind the last of them nobody asks for the end.
    left: Option<u64>,
    late: Pin<Box<Sleep>>,
    broken: Arc<AtomicBool>,
    reset: Rc<Cell<bool>>,
    brane: Rc<Brane>,
    exchange: Rc<Exchange>,
    _task: Task,
    _at_work: AtWork,
}

impl Body for GuestBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.late.as_mut().poll(cx).is_ready() {
            self.exchange.is_late(&self.brane);
            self.reset.set(true);
            return Poll::Ready(Some(Err(Error::HttpResponseTimeout)));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(Ok(frame)), Some(left)) = (&frame, self.left) {
            self.left = Some(left.saturating_sub(frame.data_ref().map_or(0, Bytes::len) as u64));
        }
        let whole = (frame.is_none() && !self.broken.load(Relaxed)) || self.left == Some(0);
        self.exchange.whole.set(whole);
        match frame {
            None if self.broken.load(Relaxed) => {
                self.reset.set(true);
                Poll::Ready(Some(Err(Error::HttpResponseIncomplete)))
            }
            Some(Err(e)) => {
                self.reset.set(true);
                Poll::Ready(Some(Err(e)))
            }
            other => Poll::Ready(other),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request's body that ends with an error beyond its bound.
pub(super) struct Bounded {
    pub(super) body: Incoming,
    /// Bytes that may still come.
    pub(super) left: u64,
    /// Set when there are more.
    pub(super) over: Arc<AtomicBool>,
}

impl Body for Bounded {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let size = match &frame {
            Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len) as u64,
            _ => 0,
        };
        match self.left.checked_sub(size) {
            Some(left) => {
                self.left = left;
                Poll::Ready(frame.map(|f| f.map_err(Error::Hyper)))
            }
            None => {
                self.over.store(true, Relaxed);
                Poll::Ready(Some(Err(Error::HttpRequestBodySize(None))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "192.0.2.7:4711";

    /// A request of this version; its target in absolute form stands for what HTTP/2 says of scheme and authority.
    fn request(version: Version, method: &str, target: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().version(version).method(method).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn read(request: Request<()>, secure: bool) -> Result<(Request<()>, String), u16> {
        normalised(request, PEER.parse().unwrap(), secure).map_err(|own| own.status.as_u16())
    }

    #[test]
    fn a_request_has_one_form_in_all_versions() {
        let (one, two) = (Version::HTTP_11, Version::HTTP_2);
        let a = ("host", "a.example");
        for (version, target, headers, wanted) in [
            (one, "/x?y", &[a][..], "http://a.example/x?y"),
            (one, "/", &[("host", "A.Example:8080")], "http://A.Example:8080/"),
            (one, "http://b.example/x", &[a], "http://b.example/x"),
            (one, "https://b.example", &[a], "http://b.example/"),
            (Version::HTTP_10, "/x", &[], "http://localhost/x"),
            (Version::HTTP_10, "/x", &[a], "http://a.example/x"),
            (two, "http://a.example/x?y", &[], "http://a.example/x?y"),
            (two, "https://a.example/x", &[], "http://a.example/x"),
            (two, "http://a.example:8080/", &[("host", "A.EXAMPLE:8080")], "http://a.example:8080/"),
            (two, "/x", &[a], "http://a.example/x"),
        ] {
            let (read, host) = read(request(version, "GET", target, headers), false).unwrap();
            assert_eq!(read.uri().to_string(), wanted, "{version:?} {target}");
            assert_eq!(Some(host), read.uri().host().map(str::to_ascii_lowercase));
        }
        let (read, _) = read(request(two, "GET", "http://a.example/x", &[]), true).unwrap();
        assert_eq!(read.uri().to_string(), "https://a.example/x", "what the connection is, not what was said");
    }

    #[test]
    fn an_answer_says_how_long_it_is_or_does_not() {
        let of = |status: u16, length: Option<&str>| {
            let answer = Response::builder().status(status);
            let answer = length.map_or(Response::builder().status(status), |l| answer.header("content-length", l));
            announced(&answer.body(()).unwrap())
        };
        assert_eq!(of(200, Some("12")), Some(12));
        assert_eq!(of(200, Some("0")), Some(0));
        assert_eq!([of(200, None), of(200, Some("x")), of(404, None)], [None; 3]);
        assert_eq!([of(204, None), of(304, Some("12"))], [Some(0); 2]);
    }

    #[test]
    fn what_http_does_not_allow_is_refused() {
        let (one, two) = (Version::HTTP_11, Version::HTTP_2);
        let a = ("host", "a.example");
        for (version, method, target, headers, wanted) in [
            (one, "GET", "/", &[][..], 400),
            (one, "GET", "/", &[a, ("host", "b.example")], 400),
            (one, "GET", "/", &[("host", "me@a.example")], 400),
            (one, "GET", "/", &[("host", "a b")], 400),
            (one, "GET", "http://me@a.example/", &[a], 400),
            (one, "CONNECT", "a.example:80", &[a], 501),
            (one, "GET", "/", &[a, ("upgrade", "websocket")], 501),
            (one, "GET", "/", &[a, ("upgrade", "h2c")], 501),
            (two, "GET", "/", &[], 400),
            (two, "GET", "http://a.example/", &[("host", "b.example")], 400),
            (two, "GET", "http://a.example/", &[("host", "a.example:80")], 400),
            (two, "GET", "http://a.example/", &[a, a], 400),
            (two, "GET", "http://me@a.example/", &[], 400),
            (two, "CONNECT", "a.example:80", &[], 501),
        ] {
            let read = read(request(version, method, target, headers), false);
            assert_eq!(read.err(), Some(wanted), "{version:?} {method} {target} {headers:?}");
        }
    }

    #[test]
    fn where_a_request_comes_from_is_the_runtimes_to_say() {
        let forged = [("host", "a.example"), ("forwarded", "for=10.0.0.1"), ("forwarded", "for=10.0.0.2;proto=https")];
        let from = |peer: &str, secure| {
            let forged = request(Version::HTTP_11, "GET", "/", &forged);
            let (read, _) = normalised(forged, peer.parse().unwrap(), secure).ok().unwrap();
            let all: Vec<_> = read.headers().get_all(header::FORWARDED).iter().cloned().collect();
            assert_eq!(all.len(), 1, "{all:?}");
            all[0].to_str().unwrap().to_owned()
        };
        assert_eq!(from(PEER, false), "for=192.0.2.7;proto=http");
        assert_eq!(from("[2001:db8::7]:4711", true), "for=\"[2001:db8::7]\";proto=https");
    }

    #[test]
    fn the_pieces_of_a_cookie_are_put_together() {
        let pieces = [("cookie", "a=1"), ("cookie", "b=2; c=3"), ("cookie", "d=4")];
        let (read, _) = read(request(Version::HTTP_2, "GET", "http://a.example/", &pieces), false).unwrap();
        let all: Vec<_> = read.headers().get_all(header::COOKIE).iter().collect();
        assert_eq!(all, ["a=1; b=2; c=3; d=4"]);
    }
}
