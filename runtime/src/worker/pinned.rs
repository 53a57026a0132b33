//! A pinned brane as a worker sees it: its requests are checked and routed here, and passed on to a keeper.
//!
//! A request asks a keeper of its brane for a turn, and if that has none to give at once, all of them; it takes the first
//! that it is given. So it goes to one that is free if there is one, whatever other workers do. It waits here, not there: a
//! keeper that ends has one request inside, and the others ask the next.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{Either, Empty};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http2::SendRequest;
use tokio::sync::Notify;
use tokio::time::Sleep;
use wasmtime_wasi_http::Error;

use super::host::Means;
use super::link::{self, Asked, HEADER, Outcome};
use super::serve::{AtWork, Bounded, Own, QUEUE, own, too_busy, too_short};
use crate::plan;
use crate::statistics::{Brane as Counts, Statistics, While};

/// How much later than a keeper its worker takes a deadline for missed: the keeper knows what was missed.
const GRACE: Duration = Duration::from_millis(250);
/// How long the first keeper that is asked has to give a turn before all others are asked, too: many times what it takes one
/// that is free.
const FIRST_ALONE: Duration = Duration::from_millis(1);

/// What goes to a keeper.
type Sent = Either<Empty<Bytes>, Bounded>;

/// A pinned brane.
pub struct Pinned {
    /// What the plan says of it.
    pub plan: plan::Brane,
    /// The hosts it serves; any if `None`.
    pub host: Option<gaia_manifest::Host>,
    /// Its place in the plan, the statistics and the log.
    pub index: usize,
    statistics: Arc<Statistics>,
    means: Rc<Means>,
    links: RefCell<BTreeMap<u32, Link>>,
    made: Cell<u64>,
    /// There is another link.
    linked: Notify,
}

/// The way to one of its keepers.
struct Link {
    /// No two have the same.
    number: u64,
    way: SendRequest<Sent>,
    /// Requests of this worker's that are there.
    inside: Rc<Cell<u32>>,
}

/// A turn at a keeper, until this is dropped or used.
struct Turn {
    replica: u32,
    ticket: u64,
    way: SendRequest<Sent>,
    held: Incoming,
    inside: Inside,
}

/// Counts a request that is at a keeper, while it is.
struct Inside(Rc<Cell<u32>>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Pinned {
    /// Without any link.
    ///
    /// # Errors
    /// If its host is none.
    pub fn new(
        plan: &plan::Brane,
        index: usize,
        statistics: Arc<Statistics>,
        means: Rc<Means>,
    ) -> anyhow::Result<Self> {
        let host = plan.host.as_deref().map(gaia_manifest::Host::parse).transpose();
        Ok(Self {
            plan: plan.clone(),
            host: host.map_err(|e| anyhow::anyhow!("{}: {e}", plan.name))?,
            index,
            statistics,
            means,
            links: RefCell::default(),
            made: Cell::default(),
            linked: Notify::new(),
        })
    }

    /// Its counters.
    #[must_use]
    pub fn count(&self) -> &Counts {
        &self.statistics.branes[self.index]
    }

    /// Takes over the way to a keeper, in the place of one that was there before.
    ///
    /// # Errors
    /// If it is none, or is closed already.
    pub async fn link(self: &Rc<Self>, replica: u32, stream: OwnedFd) -> anyhow::Result<()> {
        let (way, connection) = link::client(&self.means).handshake(link::end(stream)?).await?;
        let number = self.made.replace(self.made.get() + 1);
        self.links.borrow_mut().insert(replica, Link { number, way, inside: Rc::default() });
        let this = Rc::clone(self);
        tokio::task::spawn_local(async move {
            // How it ended, whoever had a request there learns.
            let _ = this.means.turns.before_others(pin!(connection)).await;
            let mut links = this.links.borrow_mut();
            if links.get(&replica).is_some_and(|link| link.number == number) {
                links.remove(&replica);
            }
        });
        self.linked.notify_waiters();
        Ok(())
    }

    /// Waits for a turn at any of its keepers; `None` when it does not come in time.
    async fn turn(&self, deadline: Instant) -> Option<Turn> {
        let mut late = pin!(tokio::time::sleep_until(deadline.into()));
        let (mut asked, mut turns) = (HashSet::new(), FuturesUnordered::new());
        let mut first = true;
        loop {
            let mut linked = pin!(self.linked.notified());
            // From here on another link is noticed.
            linked.as_mut().enable();
            let mut links: Vec<_> = self.links.borrow().iter().map(|(replica, link)| link.to(*replica)).collect();
            links.sort_by_key(|to| (to.inside.get(), to.replica));
            let most = if first { 1 } else { usize::MAX };
            links.retain(|to| !asked.contains(&to.number));
            let others = links.len() > most;
            for to in links.into_iter().take(most) {
                asked.insert(to.number);
                turns.push(to.ask());
            }
            let mut alone = pin!(tokio::time::sleep(FIRST_ALONE));
            first = false;
            loop {
                tokio::select! {
                    biased;
                    Some(turn) = turns.next() => match turn {
                        Some(turn) => return Some(turn),
                        None if others => break,
                        None => {}
                    },
                    () = &mut linked => break,
                    () = &mut alone, if others => break,
                    () = &mut late => return None,
                }
            }
        }
    }

    /// Passes a request on to the first keeper whose turn is to be had. What counts it is held until the answer is over.
    ///
    /// # Errors
    /// The answer that the runtime gives itself.
    pub(super) async fn pass(
        &self,
        request: Request<Incoming>,
        deadline: Instant,
        reset: Rc<Cell<bool>>,
        until_sent: (AtWork, Option<While>),
    ) -> Result<Response<PassedBody>, Own> {
        let count = self.count();
        let busy = || {
            count.refused.fetch_add(1, Relaxed);
            too_busy()
        };
        if count.waiting.load(Relaxed) >= QUEUE {
            return Err(busy());
        }
        let turn = {
            count.waiting.fetch_add(1, Relaxed);
            let _waiting = Waiting(count);
            self.turn(deadline).await.ok_or_else(busy)?
        };
        let body_max = self.plan.body_max;
        let over = Arc::new(AtomicBool::new(false));
        let body = |body| Either::Right(Bounded { body, left: body_max, over: Arc::clone(&over) });
        let Turn { replica, ticket, mut way, held, inside: there } = turn;
        let left = deadline.saturating_duration_since(Instant::now());
        let until = link::now().saturating_add(u64::try_from(left.as_nanos()).unwrap_or(u64::MAX));
        let request = told(request.map(body), Asked::Answer { ticket, deadline: until });
        let last = tokio::time::Instant::from(deadline + GRACE);
        let answered = tokio::time::timeout_at(last, way.send_request(request)).await;
        // Used, whatever became of the request.
        drop(held);
        if over.load(Relaxed) {
            return Err(own(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have {body_max} bytes")));
        }
        let late = || own(StatusCode::GATEWAY_TIMEOUT, "the deadline passed before there was an answer");
        let id = || format!("{}.{replica:03}", self.plan.name);
        let response = match answered {
            Err(_) => return Err(late()),
            Ok(Err(_)) => return Err(own(StatusCode::BAD_GATEWAY, "the brane's keeper ended")),
            Ok(Ok(response)) => response,
        };
        let outcome = response.headers().get(HEADER).map(|text| text.to_str().ok().and_then(Outcome::parse));
        Err(match outcome {
            None => {
                let (mut parts, body) = response.into_parts();
                parts.version = http::Version::HTTP_11;
                let late = Box::pin(tokio::time::sleep_until(last));
                return Ok(Response::from_parts(
                    parts,
                    PassedBody { body, late, reset, _until_sent: until_sent, _there: there },
                ));
            }
            Some(Some(Outcome::Refused)) => busy(),
            Some(Some(Outcome::Late)) => late(),
            Some(Some(Outcome::Short)) => too_short(),
            Some(Some(Outcome::Trap)) => own(StatusCode::INTERNAL_SERVER_ERROR, format!("the brane trapped: {}", id())),
            Some(Some(Outcome::Host) | None) => {
                own(StatusCode::INTERNAL_SERVER_ERROR, format!("the runtime failed: {}", id()))
            }
            Some(Some(Outcome::Nothing)) => own(StatusCode::BAD_GATEWAY, "the brane ended without a response"),
            Some(Some(Outcome::Informational)) => {
                own(StatusCode::BAD_GATEWAY, "the brane answered with an informational status")
            }
            Some(Some(Outcome::Error(code))) => {
                own(StatusCode::BAD_GATEWAY, format!("the brane answered with an error: {code}"))
            }
        })
    }
}

/// Counted until it has its turn, or gives up.
struct Waiting<'a>(&'a Counts);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

/// Puts into a request what is asked, whatever it said there.
fn told(mut request: Request<Sent>, asked: Asked) -> Request<Sent> {
    // Digits and letters always are a value.
    let value = HeaderValue::from_str(&asked.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""));
    request.headers_mut().insert(HEADER, value);
    request
}

/// A keeper, to be asked.
struct To {
    replica: u32,
    number: u64,
    way: SendRequest<Sent>,
    inside: Rc<Cell<u32>>,
}

impl Link {
    fn to(&self, replica: u32) -> To {
        To { replica, number: self.number, way: self.way.clone(), inside: Rc::clone(&self.inside) }
    }
}

impl To {
    /// Asks for a turn; nothing, if the keeper ends meanwhile.
    async fn ask(self) -> Option<Turn> {
        let Self { replica, mut way, inside, .. } = self;
        let mut request = Request::new(Either::Left(Empty::new()));
        *request.uri_mut() = http::Uri::from_static("http://keeper/");
        let response = way.send_request(told(request, Asked::Turn)).await.ok()?;
        let ticket = response.headers().get(HEADER)?.to_str().ok()?.parse().ok()?;
        inside.set(inside.get() + 1);
        Some(Turn { replica, ticket, way, held: response.into_body(), inside: Inside(inside) })
    }
}

/// A keeper's answer on its way out. When it breaks off, the connection is reset: the part must not look like the whole.
pub struct PassedBody {
    body: Incoming,
    late: Pin<Box<Sleep>>,
    reset: Rc<Cell<bool>>,
    _until_sent: (AtWork, Option<While>),
    _there: Inside,
}

impl Body for PassedBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.late.as_mut().poll(cx).is_ready() {
            self.reset.set(true);
            return Poll::Ready(Some(Err(Error::HttpResponseTimeout)));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if matches!(frame, Some(Err(_))) {
            self.reset.set(true);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Error::Hyper)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
