//! The keeper role: one instance of one pinned brane, for as long as the brane stays what it is.
//!
//! It starts and is sealed as a worker is, with a plan of its one brane. It has no listening socket: workers pass requests on
//! (see [`link`]). One at a time the instance handles them, and what it keeps in its memory stays. The next has
//! its turn when `handle` has come back and the answer's body is finished, or was cut off at the deadline. A client that
//! hangs up changes nothing for the instance: what it still answers is drained.
//!
//! ```text
//! made ─▶ ready ── turn ─▶ handles ── came back, body finished ─▶ ready
//!           │                 └── trap, deadline, memory, exit ─▶ gone ─▶ another is made, then the next has its turn
//!           └── memory, or its brane changes ─▶ gone
//! ```

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use gaia_init::descriptors::Descriptors;
use gaia_init::sandbox::{Demand, worker as sandbox};
use gaia_init::wire::{FromWorker, ToWorker};
use gaia_manifest::{Capability, Lifetime};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout_at;
use wasmtime::Store;
use wasmtime_wasi::I32Exit;
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error, WasiHttpView as _};

use super::Place;
use super::brane::Brane;
use super::conversation::{self, Instance, Speaker};
use super::host::{Host, Means};
use super::link::{self, Asked, HEADER, Outcome};
use super::memory::Held;
use super::serve::word;
use super::turns::{Replica, TICK, Terms, thread_cpu};
use crate::channel::{Channel, read_whole};
use crate::histogram::nanos;
use crate::log::{Event, Log, Subject};
use crate::plan::{self, Plan};
use crate::statistics::{Profiles, Statistics, While};

/// What the start of an instance may take: as much as in a worker.
const MADE_WITHIN: Duration = Duration::from_secs(20);
/// How long workers have to end what is too large before a keeper looks at its own instance: that one cannot be made again as
/// it was.
const WORKERS_FIRST: Duration = TICK.saturating_mul(2);
/// How long a guest has whose answer was cut off at the deadline, to come to its end.
const CUT_OFF_FOR: Duration = Duration::from_secs(1);
/// What is added to the line that says how an instance ended.
const GONE: &str = "its state is gone";

/// The artefact's name among a keeper's files.
const ARTEFACT: &str = "artefact";

/// A keeper's state, shared by its tasks.
struct Keeper {
    /// `counter.001`
    name: String,
    replica: u32,
    brane: Rc<Brane>,
    means: Rc<Means>,
    log: Arc<Log>,
    statistics: Arc<Statistics>,
    /// Its part of the core, if that is bounded.
    quota: Option<Replica>,
    /// Files are emptied after each request.
    empties: bool,
    /// Whose turn it is.
    turn: Arc<Semaphore>,
    /// Turns that were given and not used yet.
    tickets: RefCell<HashMap<u64, OwnedSemaphorePermit>>,
    issued: Cell<u64>,
    /// To the task that has the instance; nothing when it is to end.
    work: RefCell<Option<mpsc::UnboundedSender<Work>>>,
    /// Since when there is an instance, and what it holds.
    there: RefCell<Option<(Instant, Arc<Held>)>>,
}

/// A request whose turn it is.
struct Work {
    request: Request<Incoming>,
    deadline: Instant,
    turn: OwnedSemaphorePermit,
    /// Gone when nobody waits for the answer any more.
    head: oneshot::Sender<Head>,
}

type Head = Result<Response<GuestBody>, Outcome>;

/// The instance.
struct Kept {
    store: Store<Host>,
    proxy: Proxy,
    held: Arc<Held>,
    cold: Duration,
    since: Instant,
}

/// How a request's work ended.
enum Ended {
    /// `handle` came back: the instance lives on.
    Returned,
    /// The guest exited by its own will.
    Exited,
    /// The deadline passed.
    Late,
    /// Memory.
    Short,
    /// The guest trapped, or the host held too much for it.
    Trap,
}

/// Runs the role until init says drain and the last worker that knows it is gone.
///
/// # Errors
/// If it cannot get ready; init reports its end.
pub fn run() -> anyhow::Result<()> {
    let demand = Demand::from_environment();
    let mut descriptors = Descriptors::inherit()?;
    let replica = super::var("GAIA_REPLICA")?.parse().context("GAIA_REPLICA")?;
    let place = Place::from_environment(format!("keeper@{}", super::var("GAIA_NAME")?))?;
    let outcome = start(&place, replica, &mut descriptors, demand);
    if let Err(e) = &outcome {
        place.say(&format!("{e:#}"));
    }
    outcome
}

fn start(place: &Place, replica: u32, descriptors: &mut Descriptors, demand: Demand) -> anyhow::Result<()> {
    crate::kept::keep(super::KEPT);
    let plan = descriptors.take(&format!("file-{}", plan::FILE))?;
    let plan = read_whole(plan, plan::MAX_BYTES).context("reading the plan")?;
    let plan: Plan = serde_json::from_slice(&plan).context("reading the plan")?;
    let reach = plan.reach();
    sandbox::enter(&reach, demand)?;
    let [of_it] = plan.branes.as_slice() else { anyhow::bail!("the plan of a keeper has one brane") };
    let page = descriptors.take("statistics")?;
    let statistics = Arc::new(Statistics::map(&page).context("mapping the statistics")?);
    let log = Arc::new(place.measured.log(Arc::clone(&statistics)));
    let artefact = descriptors.take(&format!("file-{ARTEFACT}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let mut means = Means::of(&plan, 0)?;
    if place.measured.is_profiled {
        means.profiles = Some(Arc::new(Profiles::map(&page, 1).context("mapping the profiles")?));
    }
    let means = Rc::new(means);
    let brane = super::linked(of_it, 0, (0, 1), &artefact, &log, &means)?;
    drop(artefact);
    // Workers and this one: of the others it knows nothing.
    super::tick_all(&means, std::slice::from_ref(&brane), place, plan.processes() + 1, descriptors)?;
    let empties = of_it.grants.iter().any(|g| matches!(g, Capability::Tmp { lifetime: Lifetime::Request, .. }));
    let keeper = Rc::new(Keeper {
        name: format!("{}.{replica:03}", of_it.name),
        replica,
        quota: brane.replica(),
        brane,
        means,
        log,
        statistics,
        empties,
        turn: Arc::new(Semaphore::new(1)),
        tickets: RefCell::default(),
        issued: Cell::default(),
        work: RefCell::default(),
        there: RefCell::default(),
    });
    let kept = local.block_on(&runtime, keeper.instance()).map_err(|e| anyhow::anyhow!("{}: {e:#}", keeper.name))?;
    // Everything is mapped, linked and pooled, and both threads are there.
    sandbox::close(&reach, demand)?;
    local.block_on(&runtime, live(place, keeper, kept, descriptors))
}

async fn live(place: &Place, keeper: Rc<Keeper>, kept: Kept, descriptors: &mut Descriptors) -> anyhow::Result<()> {
    let init = Rc::new(Channel::new(descriptors.take("init")?)?);
    let control = Channel::new(descriptors.take("control")?)?;
    let (work, received) = mpsc::unbounded_channel();
    keeper.work.replace(Some(work));
    let keeping = tokio::task::spawn_local(Rc::clone(&keeper).keep(kept, received));
    init.send(&FromWorker::Ready, &[]).await.context("saying ready to init")?;
    let names = keeper.means.network.as_ref().map(|network| Arc::clone(&network.names));
    let (log, listed) = (Arc::clone(&keeper.log), Rc::clone(&keeper));
    let instances = Box::new(move || listed.instances());
    let speaker = Speaker { names, log, instances, certified: Box::new(drop) };
    tokio::task::spawn_local(conversation::hold(speaker, control));
    tokio::task::spawn_local(super::beat(Rc::clone(&init)));
    tokio::task::spawn_local(Rc::clone(&keeper).shed());
    loop {
        match init.receive::<ToWorker>().await {
            Ok((ToWorker::Link { .. }, streams)) => {
                for stream in streams {
                    if let Err(e) = keeper.listen(stream) {
                        place.say(&format!("a worker's stream: {e}"));
                    }
                }
            }
            // Without init nobody is left to say drain.
            Ok((ToWorker::Drain, _)) | Err(gaia_init::wire::Error::Closed) => break,
            Ok(_) => {}
            Err(e) => place.say(&format!("message from init dropped: {e}")),
        }
    }
    // Workers end when the last that they have for it is answered, and init has a deadline for all of them.
    while keeper.statistics.worker.open.load(Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    keeper.work.take();
    keeping.await.context("the task that has the instance")
}

impl Keeper {
    /// What control is told when it asks.
    fn instances(&self) -> Vec<Instance> {
        let millis = |since: &Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let role = format!("keeper@{}", self.name);
        let one =
            |(since, _): &(Instant, _)| Instance { name: self.name.clone(), role: role.clone(), millis: millis(since) };
        self.there.borrow().iter().map(one).collect()
    }

    fn log(&self, event: &Event<'_>) {
        self.log.write(Subject::Brane(self.brane.index, self.replica.into()), event);
    }

    /// Serves a worker until one of the two is gone.
    fn listen(self: &Rc<Self>, stream: OwnedFd) -> std::io::Result<()> {
        let stream = link::end(stream)?;
        let open = While::counted(&self.statistics, |page| &page.worker.open);
        self.statistics.worker.accepted.fetch_add(1, Relaxed);
        let keeper = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let asked = Rc::clone(&keeper);
            let service = hyper::service::service_fn(move |request| Rc::clone(&asked).answer(request));
            let http = link::server(&keeper.means).serve_connection(stream, service);
            let _ = keeper.means.turns.before_others(pin!(http)).await;
            drop(open);
        });
        Ok(())
    }

    async fn answer(self: Rc<Self>, mut request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
        let asked = request.headers_mut().remove(HEADER);
        Ok(match asked.as_ref().and_then(|text| Asked::parse(text.to_str().ok()?)) {
            Some(Asked::Turn) => self.turn().await,
            Some(Asked::Answer { ticket, deadline }) => match self.pass(request, ticket, deadline).await {
                Ok(response) => response.map(Answer::Guest),
                Err(outcome) => without_an_answer(&outcome),
            },
            None => without_an_answer(&Outcome::Refused),
        })
    }

    /// Waits for a turn, and gives a ticket for it.
    async fn turn(self: &Rc<Self>) -> Response<Answer> {
        // Never closed.
        let Ok(turn) = Arc::clone(&self.turn).acquire_owned().await else {
            return without_an_answer(&Outcome::Refused);
        };
        let ticket = self.issued.get() + 1;
        self.issued.set(ticket);
        self.tickets.borrow_mut().insert(ticket, turn);
        let mut response = Response::new(Answer::Turn { _ticket: Ticket { of: Rc::clone(self), number: ticket } });
        response.headers_mut().insert(HEADER, HeaderValue::from(ticket));
        response
    }

    /// Gives a request whose turn it is to the instance.
    async fn pass(&self, request: Request<Incoming>, ticket: u64, deadline: u64) -> Head {
        let turn = self.tickets.borrow_mut().remove(&ticket).ok_or(Outcome::Refused)?;
        let left = Duration::from_nanos(deadline.saturating_sub(link::now()));
        // No brane has a deadline beyond its own, whatever a worker says.
        let deadline = Instant::now() + left.min(self.brane.plan.deadline);
        let (head, answered) = oneshot::channel();
        if let Some(work) = &*self.work.borrow() {
            let _ = work.send(Work { request, deadline, turn, head });
        }
        answered.await.unwrap_or(Err(Outcome::Host))
    }

    /// Makes an instance.
    async fn instance(&self) -> wasmtime::Result<Kept> {
        let (brane, since) = (&self.brane, Instant::now());
        let held = Arc::<Held>::default();
        let mut store = brane.store(self.replica.into(), Arc::clone(&held));
        let work = brane.pre().instantiate_async(&mut store);
        let throttled = &brane.count().throttled_ns;
        let terms = Terms { cpu: None, replica: self.quota.as_ref(), throttled, memory: None };
        let work = brane.turns().run(work, terms);
        let late = |_| wasmtime::format_err!("its start has not ended after {} s", MADE_WITHIN.as_secs());
        let proxy = tokio::time::timeout(MADE_WITHIN, work).await.map_err(late)??;
        let cold = since.elapsed();
        brane.count().instances.fetch_add(1, Relaxed);
        brane.count().cold_ns.fetch_add(u64::try_from(cold.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        if let Some(profile) = brane.profile() {
            profile.cold.record(nanos(cold));
        }
        self.there.replace(Some((Instant::now(), Arc::clone(&held))));
        Ok(Kept { store, proxy, held, cold, since: Instant::now() })
    }

    /// Has the instance handle one request after the other, and makes another when it is gone; until there is no more work to
    /// come.
    async fn keep(self: Rc<Self>, kept: Kept, mut work: mpsc::UnboundedReceiver<Work>) {
        let (mut kept, mut turn) = (Some(kept), None);
        loop {
            let there = match kept.take() {
                Some(there) => there,
                None => match self.instance().await {
                    Ok(there) => there,
                    Err(e) => {
                        self.log(&Event::Fault { text: format!("instantiate: {e:#}").into() });
                        // Whoever is next tries again, and is told if that fails, too.
                        drop(turn.take());
                        let Some(next) = work.recv().await else { return };
                        let _ = next.head.send(Err(Outcome::Host));
                        turn = Some(next.turn);
                        continue;
                    }
                },
            };
            drop(turn.take());
            let ready = While::counted(&self.statistics, |page| &page.branes[0].ready);
            tokio::select! {
                biased;
                () = there.held.ended() => {
                    self.has_most(&there.held);
                    self.end(there, "");
                }
                next = work.recv() => match next {
                    Some(next) => {
                        drop(ready);
                        (kept, turn) = self.handle(there, next).await;
                    }
                    None => return self.end(there, "it is kept no longer"),
                },
            }
        }
    }

    /// Has the instance handle a request. Gives it back, or the request's turn when it is gone.
    async fn handle(&self, mut kept: Kept, work: Work) -> (Option<Kept>, Option<OwnedSemaphorePermit>) {
        let Work { request, deadline, turn, head } = work;
        let cpu = Cell::new(Duration::ZERO);
        if Instant::now() >= deadline {
            let _ = head.send(Err(Outcome::Refused));
            return (Some(kept), None);
        }
        self.means.turns.something_was_done();
        self.brane.begins(&mut kept.store);
        let _busy = While::counted(&self.statistics, |page| &page.branes[0].busy);
        let sending = Rc::new(Sending { head: RefCell::new(Some(head)), ..Sending::default() });
        let bodiless = *request.method() == Method::HEAD;
        let began = Instant::now();
        let ended = match self.call(&mut kept, request, deadline, bodiless, &sending, &cpu).await {
            Ok(ended) => ended,
            Err((what, e)) => {
                self.log(&Event::Fault { text: format!("{what}: {e:#}; {GONE}").into() });
                sending.ended(Outcome::Host);
                self.end(kept, "");
                return (None, Some(turn));
            }
        };
        if let Some(profile) = self.brane.profile() {
            profile.record(began.elapsed(), cpu.get(), kept.held.memory.load(Relaxed));
        }
        sending.broken.set(!matches!(ended, Ended::Returned | Ended::Exited));
        sending.ended(match ended {
            Ended::Returned | Ended::Exited => Outcome::Nothing,
            Ended::Late => Outcome::Late,
            Ended::Short => Outcome::Short,
            Ended::Trap => Outcome::Trap,
        });
        if matches!(ended, Ended::Returned) {
            // Of the guest nothing runs any more, so nothing of it must end with what is not taken in time.
            if timeout_at(deadline.into(), sending.settled()).await.is_err() {
                self.cut_off(&sending);
            }
            sending.body.take();
            if self.empties {
                kept.store.data_mut().empty_files();
            }
        }
        if let Some(status) = sending.status.get() {
            self.brane.count().failed.fetch_add(u64::from(status >= 500), Relaxed);
            self.log(&Event::Response { status, cpu: cpu.get(), text: "".into() });
        }
        match ended {
            Ended::Returned => (Some(kept), None),
            Ended::Exited => {
                self.end(kept, "it exited");
                (None, Some(turn))
            }
            Ended::Late | Ended::Short | Ended::Trap => {
                self.end(kept, "");
                (None, Some(turn))
            }
        }
    }

    /// Runs the guest until `handle` comes back or must not go on.
    async fn call(
        &self,
        kept: &mut Kept,
        request: Request<Incoming>,
        deadline: Instant,
        bodiless: bool,
        sending: &Rc<Sending>,
        cpu: &Cell<Duration>,
    ) -> Result<Ended, (&'static str, wasmtime::Error)> {
        let (sender, mut answered) = oneshot::channel();
        kept.store.data_mut().begins(request.headers());
        let mut wasi = kept.store.data_mut().http();
        let secure = request.uri().scheme() == Some(&http::uri::Scheme::HTTPS);
        let scheme = if secure { Scheme::Https } else { Scheme::Http };
        let request = request.map(|body| body.map_err(Error::Hyper));
        let request = wasi.new_incoming_request(scheme, request).map_err(|e| ("request", e))?;
        let outparam = wasi.new_response_outparam(sender).map_err(|e| ("response", e))?;
        let count = self.brane.count();
        let call = kept.proxy.wasi_http_incoming_handler().call_handle(&mut kept.store, request, outparam);
        let terms = Terms {
            cpu: Some(cpu),
            replica: self.quota.as_ref(),
            throttled: &count.throttled_ns,
            memory: Some(self.brane.share(&kept.held)),
        };
        let mut call = pin!(self.brane.turns().run(call, terms));
        let mut late = pin!(tokio::time::sleep_until(deadline.into()));
        // Whoever hangs up leaves the rest of the answer to be drained, or the guest would wait for room.
        let mut settled = pin!(sending.settled());
        let (mut waits, mut is_settled, mut is_cut) = (true, false, false);
        let ended = loop {
            tokio::select! {
                biased;
                () = kept.held.ended() => break self.has_most(&kept.held),
                answer = &mut answered, if waits => {
                    waits = false;
                    if let Ok(answer) = answer {
                        sending.pass(answer, bodiless);
                    }
                }
                called = &mut call => break match called {
                    Ok(()) => Ended::Returned,
                    Err(e) if e.downcast_ref::<I32Exit>().is_some() => Ended::Exited,
                    // That there are no more handles for it is only how it learns of it.
                    Err(_) if kept.held.is_too_much() => self.has_most(&kept.held),
                    Err(e) => {
                        count.traps.fetch_add(1, Relaxed);
                        self.log(&Event::Trap { text: format!("{}: {GONE}", e.root_cause()).into() });
                        Ended::Trap
                    }
                },
                () = &mut settled, if !is_settled => is_settled = true,
                // It may have been waiting for whoever reads its answer: that must not cost it what it knows.
                () = &mut late => {
                    if self.cut_off(sending) {
                        is_cut = true;
                        late.as_mut().reset((deadline + CUT_OFF_FOR).into());
                        continue;
                    }
                    count.late.fetch_add(u64::from(!is_cut), Relaxed);
                    let text = format!("deadline of {:?}: {GONE}", self.brane.plan.deadline);
                    self.log(&Event::Kill { text: text.into() });
                    break Ended::Late;
                }
            }
        };
        if let (true, Ok(answer)) = (waits, answered.try_recv()) {
            sending.pass(answer, bodiless);
        }
        Ok(ended)
    }

    /// The deadline passed while the answer was on its way; whether it was.
    fn cut_off(&self, sending: &Sending) -> bool {
        let is_cut = sending.cut_off();
        if is_cut {
            self.brane.count().late.fetch_add(1, Relaxed);
            let text = format!("deadline of {:?}: its answer is cut off", self.brane.plan.deadline);
            self.log(&Event::Kill { text: text.into() });
        }
        is_cut
    }

    /// It has more than it may, or than there is.
    fn has_most(&self, held: &Held) -> Ended {
        self.brane.count().killed.fetch_add(1, Relaxed);
        let kib = held.bytes() / 1024;
        let (ended, why) = if held.is_too_much() {
            let most = self.brane.plan.mem_max / 1024;
            (Ended::Trap, format!("mem_max is {most} KiB, and with what the host holds for it this had {kib}"))
        } else {
            (Ended::Short, format!("the host is short of it, and this held {kib} KiB"))
        };
        self.log(&Event::Kill { text: format!("memory: {why}: {GONE}").into() });
        ended
    }

    /// The instance is gone, and what it knew.
    fn end(&self, kept: Kept, why: &str) {
        let Kept { store, cold, since, .. } = kept;
        self.there.take();
        let text = if why.is_empty() { String::new() } else { format!("{why}: {GONE}") };
        self.log(&Event::End { cold, exec: since.elapsed(), ready: false, text: text.into() });
        let before = thread_cpu();
        drop(store);
        if let Some(quota) = &self.quota {
            quota.charge(&self.means.turns, thread_cpu().saturating_sub(before));
        }
        self.brane.reap();
    }

    /// Ends the instance while there is less memory than there must be: after the workers have ended theirs, and if that
    /// would help or nothing else does.
    async fn shed(self: Rc<Self>) {
        loop {
            self.means.pressure.near().await;
            for tried in 0.. {
                tokio::time::sleep(WORKERS_FIRST).await;
                let missing = self.means.pressure.over();
                if missing == 0 {
                    break;
                }
                let there = self.there.borrow().as_ref().map(|(_, held)| Arc::clone(held));
                match there {
                    Some(held) if held.bytes() >= missing || tried >= 10 => {
                        held.end();
                        break;
                    }
                    _ => {}
                }
            }
        }
    }
}

/// How it ended, where it ended without an answer.
fn without_an_answer(outcome: &Outcome) -> Response<Answer> {
    let mut response = Response::new(Answer::None);
    let value = HeaderValue::from_str(&outcome.to_string());
    response.headers_mut().insert(HEADER, value.unwrap_or_else(|_| HeaderValue::from_static("host")));
    response
}

/// An answer on its way: seen by the task that has the instance, and by its reader.
#[derive(Default)]
struct Sending {
    /// Who waits for the answer's head, until it is there.
    head: RefCell<Option<oneshot::Sender<Head>>>,
    /// The status that was answered.
    status: Cell<Option<u16>>,
    body: RefCell<Option<HyperOutgoingBody>>,
    /// The reader is gone, or gets no more: what is left of the body is drained.
    left: Cell<bool>,
    /// The rest must not look like the whole.
    broken: Cell<bool>,
    /// The body came to its end, or there is none.
    finished: Cell<bool>,
    reads: RefCell<Option<Waker>>,
    waits: RefCell<Option<Waker>>,
}

impl Sending {
    /// Sends the head, and the body after it.
    fn pass(self: &Rc<Self>, answer: Result<Response<HyperOutgoingBody>, ErrorCode>, bodiless: bool) {
        match answer {
            Err(code) => self.ended(Outcome::Error(word(&code))),
            Ok(response) if response.status().is_informational() => {
                self.ended(Outcome::Informational);
                self.body.replace(Some(response.into_body()));
                self.finished.set(false);
                self.leave();
            }
            Ok(mut response) => {
                let Some(head) = self.head.take() else { return };
                self.status.set(Some(response.status().as_u16()));
                response.headers_mut().remove(HEADER);
                // They have no body, whatever the guest writes; HTTP/2 does not see to that.
                let none = bodiless || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&response.status());
                let response = response.map(|body| {
                    self.body.replace(Some(body));
                    GuestBody { sending: Rc::clone(self), none }
                });
                if none {
                    self.leave();
                }
                // Where nobody waits any more, the reader is dropped here.
                drop(head.send(Ok(response)));
            }
        }
    }

    /// There is no answer to come, if there was none.
    fn ended(&self, outcome: Outcome) {
        if let Some(head) = self.head.take() {
            self.finish();
            let _ = head.send(Err(outcome));
        }
    }

    fn finish(&self) {
        self.finished.set(true);
        wake(&self.waits);
    }

    /// There is no reader any more.
    fn leave(&self) {
        self.left.set(true);
        wake(&self.waits);
    }

    /// Takes an answer that is being read away from its reader, who sees it break off; whether there was one.
    fn cut_off(&self) -> bool {
        let is_read = self.status.get().is_some() && !self.finished.get() && !self.left.get();
        if is_read {
            self.leave();
            wake(&self.reads);
        }
        is_read
    }

    /// Waits for the end of the body, and drains what its reader leaves. Safe to cancel, and to begin again.
    async fn settled(&self) {
        std::future::poll_fn(|cx| {
            self.waits.replace(Some(cx.waker().clone()));
            if self.left.get() && !self.finished.get() {
                if let Some(body) = &mut *self.body.borrow_mut() {
                    while let Some(Ok(_)) = ready!(Pin::new(&mut *body).poll_frame(cx)) {}
                }
                self.finished.set(true);
            }
            if self.finished.get() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

fn wake(waker: &RefCell<Option<Waker>>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// What goes out.
enum Answer {
    /// A guest's.
    Guest(GuestBody),
    /// Not ended before the turn is.
    Turn { _ticket: Ticket },
    /// Nothing.
    None,
}

/// A turn that was given, until it is used or not wanted any more.
struct Ticket {
    of: Rc<Keeper>,
    number: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Used, it is not there any more.
        let turn = self.of.tickets.borrow_mut().remove(&self.number);
        drop(turn);
    }
}

/// The reader of a guest's answer. Dropped before its end, the rest is left to be drained.
struct GuestBody {
    sending: Rc<Sending>,
    /// There is nothing to be read.
    none: bool,
}

impl Drop for GuestBody {
    fn drop(&mut self) {
        self.sending.leave();
    }
}

impl GuestBody {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let sending = &self.sending;
        if sending.left.get() {
            return Poll::Ready(Some(Err(Error::HttpResponseTimeout)));
        }
        sending.reads.replace(Some(cx.waker().clone()));
        let frame = match &mut *sending.body.borrow_mut() {
            None => return Poll::Ready(None),
            Some(body) => ready!(Pin::new(body).poll_frame(cx)),
        };
        let frame = match frame {
            None if sending.broken.get() => Some(Err(Error::HttpResponseIncomplete)),
            other => other,
        };
        if matches!(frame, None | Some(Err(_))) {
            sending.body.take();
            sending.finish();
        }
        Poll::Ready(frame)
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match self.get_mut() {
            Self::Guest(guest) => guest.poll(cx),
            Self::Turn { .. } => Poll::Pending,
            Self::None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Guest(GuestBody { sending, none }) => {
                *none || (!sending.left.get() && sending.body.borrow().as_ref().is_none_or(Body::is_end_stream))
            }
            Self::Turn { .. } => false,
            Self::None => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Guest(GuestBody { sending, none: false }) => {
                sending.body.borrow().as_ref().map_or_else(SizeHint::default, Body::size_hint)
            }
            Self::Turn { .. } => SizeHint::default(),
            Self::Guest(_) | Self::None => SizeHint::with_exact(0),
        }
    }
}
