//! The request path: parse → route → take an instance → guest → respond → release.

use std::cell::Cell;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::task::JoinHandle;
use tokio::time::Sleep;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error, WasiHttpView as _};

use super::Worker;
use super::brane::Brane;
use super::route;

/// What goes out: the runtime's own few words, or the guest's stream.
pub type Answer = Response<Either<Full<Bytes>, GuestBody>>;

/// Serves one request on one of the worker's connections.
///
/// # Errors
/// Never; the type is what hyper wants.
pub async fn serve(worker: Rc<Worker>, request: Request<Incoming>, peer: SocketAddr) -> Result<Answer, Infallible> {
    let began = Instant::now();
    worker.statistics.worker.requests.fetch_add(1, Relaxed);
    let inside = Inside::enter(Rc::clone(&worker));
    Ok(match dispatch(&worker, request, peer, began, inside).await {
        Ok(answer) => answer,
        Err(own) => own.answer(),
    })
}

/// An answer that the runtime gives itself.
struct Own {
    status: StatusCode,
    words: String,
    retry_after: Option<u64>,
}

fn own(status: StatusCode, words: impl Into<String>) -> Own {
    Own { status, words: words.into(), retry_after: None }
}

impl Own {
    fn answer(self) -> Answer {
        let mut answer = Response::new(Either::Left(Full::new(Bytes::from(self.words + "\n"))));
        *answer.status_mut() = self.status;
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if let Some(seconds) = self.retry_after {
            answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        answer
    }
}

async fn dispatch(
    worker: &Rc<Worker>,
    request: Request<Incoming>,
    peer: SocketAddr,
    began: Instant,
    inside: Inside,
) -> Result<Answer, Own> {
    let (request, host) = normalised(request, peer)?;
    let Some(brane) = route::find(&worker.branes, &host, request.uri().path()) else {
        worker.statistics.worker.no_route.fetch_add(1, Relaxed);
        return Err(own(StatusCode::NOT_FOUND, "no brane is served here"));
    };
    brane.count().requests.fetch_add(1, Relaxed);
    let body_max = brane.plan.body_max;
    if request.body().size_hint().lower() > body_max {
        return Err(own(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have {body_max} bytes")));
    }
    let deadline = began + brane.plan.deadline;
    let over = Arc::new(AtomicBool::new(false));
    let request = request.map(|body| Bounded { body, left: body_max, over: Arc::clone(&over) });
    let (sender, head) = tokio::sync::oneshot::channel();
    let guest = Guest { brane: Rc::clone(&brane), worker: Rc::clone(worker), serial: Cell::new(0) };
    let mut task = Task(tokio::task::spawn_local(run(guest, request, sender, deadline)));
    let head = tokio::time::timeout_at(deadline.into(), head).await;
    let late = || {
        brane.count().late.fetch_add(1, Relaxed);
        own(StatusCode::GATEWAY_TIMEOUT, "the deadline passed before there was an answer")
    };
    match head {
        Err(_) => Err(late()),
        Ok(Ok(_)) if over.load(Relaxed) => {
            Err(own(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have {body_max} bytes")))
        }
        Ok(Ok(Ok(response))) => {
            let late = Box::pin(tokio::time::sleep_until(deadline.into()));
            Ok(response.map(|body| Either::Right(GuestBody { body, late, brane, _task: task, _inside: inside })))
        }
        Ok(Ok(Err(code))) => {
            Err(own(StatusCode::BAD_GATEWAY, format!("the brane answered with an error: {}", word(&code))))
        }
        // The guest is gone and has set no response: the task's end says why.
        Ok(Err(_)) => match tokio::time::timeout_at(deadline.into(), &mut task.0).await {
            Err(_) => Err(late()),
            Ok(Ok(Ok(()))) => Err(own(StatusCode::BAD_GATEWAY, "the brane ended without a response")),
            Ok(Ok(Err(ended))) => Err(ended.own()),
            Ok(Err(_)) => Err(own(StatusCode::INTERNAL_SERVER_ERROR, "the runtime failed")),
        },
    }
}

/// The name of an error code without what it carries: that may be the guest's words, and they are for the log.
fn word(code: &ErrorCode) -> String {
    format!("{code:?}").chars().take_while(|c| c.is_ascii_alphanumeric() || *c == ':').collect()
}

/// Checks what HTTP/1.1 demands and puts the request into the form that guests see: an authority in the URI, one
/// `Forwarded` header that is the runtime's. Also returns the host it is for, lower case, without port.
fn normalised(mut request: Request<Incoming>, peer: SocketAddr) -> Result<(Request<Incoming>, String), Own> {
    if request.headers().contains_key(header::UPGRADE) {
        return Err(own(StatusCode::NOT_IMPLEMENTED, "no protocol to upgrade to"));
    }
    let bad = |what: &str| own(StatusCode::BAD_REQUEST, what);
    let authority = match request.uri().authority() {
        // In absolute form the URI counts and `Host` does not (RFC 9112, section 3.2.2).
        Some(authority) => authority.clone(),
        None => match request.headers().get(header::HOST) {
            Some(host) => host.to_str().ok().and_then(|h| h.parse().ok()).ok_or_else(|| bad("Host is not a host"))?,
            None if request.version() == http::Version::HTTP_10 => http::uri::Authority::from_static("localhost"),
            None => return Err(bad("Host is missing")),
        },
    };
    let host = authority.host().to_ascii_lowercase();
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTP);
    parts.authority = Some(authority);
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
    }
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| bad("the request's target is not a URI"))?;
    let from = match peer {
        SocketAddr::V4(v4) => format!("for={}", v4.ip()),
        SocketAddr::V6(v6) => format!("for=\"[{}]\"", v6.ip()),
    };
    let from = HeaderValue::from_str(&from).map_err(|_| bad("the client has no address"))?;
    request.headers_mut().insert(header::FORWARDED, from);
    Ok((request, host))
}

/// Why a guest ended without having answered.
enum Ended {
    Queue(Duration),
    Trap(String),
    Host(String),
}

impl Ended {
    fn own(self) -> Own {
        match self {
            Self::Queue(wait) => Own {
                retry_after: Some(wait.as_secs().max(1)),
                ..own(StatusCode::SERVICE_UNAVAILABLE, "all instances are busy")
            },
            Self::Trap(id) => own(StatusCode::INTERNAL_SERVER_ERROR, format!("the brane trapped: {id}")),
            Self::Host(id) => own(StatusCode::INTERNAL_SERVER_ERROR, format!("the runtime failed: {id}")),
        }
    }
}

/// An instance at work; the counts go down when it is gone, however it goes.
struct Guest {
    brane: Rc<Brane>,
    worker: Rc<Worker>,
    serial: Cell<u64>,
}

impl Guest {
    fn id(&self) -> String {
        format!("{}.{:03}", self.brane.plan.name, self.serial.get())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.serial.get() > 0 {
            self.brane.end(self.serial.get());
            self.brane.count().busy.fetch_sub(1, Relaxed);
        }
    }
}

type Head = Result<Response<HyperOutgoingBody>, ErrorCode>;

/// Waits for a slot, makes a fresh instance, lets it handle the request, and releases it: after the answer's head has
/// gone out, so not on the request's own time.
async fn run(
    guest: Guest,
    request: Request<Bounded>,
    head: tokio::sync::oneshot::Sender<Head>,
    deadline: Instant,
) -> Result<(), Ended> {
    let brane = &guest.brane;
    let permit = match brane.slots.try_acquire() {
        Ok(permit) => permit,
        Err(_) => {
            let waiting = crate::statistics::While::counted(&brane.count().waiting);
            let permit = tokio::time::timeout_at(deadline.into(), brane.slots.acquire()).await;
            drop(waiting);
            match permit {
                Ok(Ok(permit)) => permit,
                _ => {
                    brane.count().refused.fetch_add(1, Relaxed);
                    return Err(Ended::Queue(brane.plan.deadline));
                }
            }
        }
    };
    let dispatched = Instant::now();
    guest.serial.set(brane.begin(guest.worker.number, guest.worker.workers));
    brane.count().busy.fetch_add(1, Relaxed);
    brane.count().instances.fetch_add(1, Relaxed);
    let mut store = brane.store();
    let failed = |what: &str, e: wasmtime::Error| {
        let id = guest.id();
        guest.worker.fault(&format!("{id}: {what}: {e:#}"));
        Ended::Host(id)
    };
    let mut http = store.data_mut().http();
    let request = http.new_incoming_request(Scheme::Http, request).map_err(|e| failed("request", e))?;
    let outparam = http.new_response_outparam(head).map_err(|e| failed("response", e))?;
    let proxy = brane.pre().instantiate_async(&mut store).await.map_err(|e| failed("instantiate", e))?;
    let cold = u64::try_from(dispatched.elapsed().as_nanos()).unwrap_or(u64::MAX);
    brane.count().cold_ns.fetch_add(cold, Relaxed);
    let outcome = proxy.wasi_http_incoming_handler().call_handle(&mut store, request, outparam).await;
    drop(store);
    drop(permit);
    outcome.map_err(|e| {
        brane.count().traps.fetch_add(1, Relaxed);
        let id = guest.id();
        guest.worker.fault(&format!("{id}: trap: {}", e.root_cause()));
        Ended::Trap(id)
    })
}

/// A guest's task that ends with its request.
struct Task(JoinHandle<Result<(), Ended>>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One request inside, until its answer's last byte.
pub struct Inside(Rc<Worker>);

impl Inside {
    fn enter(worker: Rc<Worker>) -> Self {
        worker.statistics.worker.inside.fetch_add(1, Relaxed);
        Self(worker)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.statistics.worker.inside.fetch_sub(1, Relaxed);
    }
}

/// A guest's answer on its way out. When the deadline passes first, the stream is reset.
pub struct GuestBody {
    body: HyperOutgoingBody,
    late: Pin<Box<Sleep>>,
    brane: Rc<Brane>,
    _task: Task,
    _inside: Inside,
}

impl Body for GuestBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.late.as_mut().poll(cx).is_ready() {
            self.brane.count().late.fetch_add(1, Relaxed);
            return Poll::Ready(Some(Err(Error::HttpResponseTimeout)));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request's body that ends with an error beyond its bound.
struct Bounded {
    body: Incoming,
    left: u64,
    over: Arc<AtomicBool>,
}

impl Body for Bounded {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
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
