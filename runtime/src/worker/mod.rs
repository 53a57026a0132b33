//! The worker role: runs every brane of a generation on one core.
//!
//! It starts with everything it will ever have: plan, artefacts and listening sockets as open descriptors, a channel
//! to init, one to control, a page for its counters. It maps, links and pools it all, seals itself with what its graph
//! grants and nothing more (see [`gaia_init::sandbox::worker`]), says ready, and accepts when init says so. One thread runs guests and connections; a second only ticks the epochs, on the housekeeping cores.

pub mod brane;
pub mod conversation;
pub mod host;
pub mod linger;
pub mod memory;
pub mod route;
pub mod serve;
pub mod turns;

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Context as _;
use gaia_init::cores::parse_list;
use gaia_init::descriptors::Descriptors;
use gaia_init::sandbox::{Demand, worker as sandbox};
use gaia_init::wire::{FromWorker, ToWorker};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::thread::CpuSet;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use wasmtime::Engine;

use crate::channel::{Channel, is_sealed, read_whole};
use crate::kept;
use crate::log::Log;
use crate::plan::{self, Plan};
use crate::statistics::{Statistics, While};
use brane::Brane;
use memory::Meter;

/// How often the worker shows init that its loop turns.
const BEAT: Duration = Duration::from_secs(1);
/// A connection must send a request's whole head within this, and may be idle between requests for as long.
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// What a connection that has not asked for anything yet may take when the worker drains.
const FIRST_HEAD_WITHIN: Duration = Duration::from_millis(100);
/// What hyper may buffer of a connection, in bytes; a longer head is answered 431.
const CONNECTION_BUFFER: usize = 32 * 1024;
/// Connections at a time: with their buffers full they take 256 MiB. More wait in the sockets' queues.
const CONNECTIONS: usize = 8192;
/// How long a client may leave an answer unread, in milliseconds.
const UNREAD_FOR: u32 = 30_000;
/// What is kept of freed memory for the next request, in bytes: some hundred requests' tasks and buffers.
const KEPT: usize = 2 << 20;
/// A worker's state, shared by its tasks.
pub struct Worker {
    core: usize,
    /// Its branes.
    pub branes: Vec<Rc<Brane>>,
    /// Its counters.
    pub statistics: Arc<Statistics>,
    /// Its log.
    pub log: Arc<Log>,
    /// What its branes ask control for, if one may ask.
    pub names: Option<Arc<conversation::Names>>,
    /// What it has for all branes.
    pub means: Rc<host::Means>,
}

/// One line on standard error, which is the kernel's log on the appliance. It never blocks there.
fn say(core: usize, words: &str) {
    // In one piece: each write is a record.
    let _ = std::io::stderr().write_all(format!("gaia worker@{core}: {words}\n").as_bytes());
}

/// What the supervisor says about the worker's place.
struct Place {
    core: usize,
    number: u32,
    housekeeping: Vec<usize>,
    /// Bytes of memory that it may have, or all workers together if they have a cgroup.
    memory: Option<u64>,
}

impl Place {
    fn from_environment() -> anyhow::Result<Self> {
        let var = |name: &'static str| std::env::var(name).context(name);
        Ok(Self {
            core: var("GAIA_CORE")?.parse().context("GAIA_CORE")?,
            number: var("GAIA_WORKER")?.parse().context("GAIA_WORKER")?,
            housekeeping: parse_list(&var("GAIA_HOUSEKEEPING")?).context("GAIA_HOUSEKEEPING is no list of cores")?,
            memory: var("GAIA_MEMORY").ok().map(|bytes| bytes.parse().context("GAIA_MEMORY")).transpose()?,
        })
    }
}

/// Runs the role until init says drain and the last request is answered.
///
/// # Errors
/// If it cannot get ready; init reports its end.
pub fn run() -> anyhow::Result<()> {
    let demand = Demand::from_environment();
    let mut descriptors = Descriptors::inherit()?;
    let place = Place::from_environment()?;
    let core = place.core;
    let outcome = start(&place, &mut descriptors, demand);
    if let Err(e) = &outcome {
        say(core, &format!("{e:#}"));
    }
    outcome
}

fn start(place: &Place, descriptors: &mut Descriptors, demand: Demand) -> anyhow::Result<()> {
    kept::keep(KEPT);
    let plan =
        read_whole(descriptors.take(&format!("file-{}", plan::FILE))?, plan::MAX_BYTES).context("reading the plan")?;
    let plan: Plan = serde_json::from_slice(&plan).context("reading the plan")?;
    let reach = plan.reach();
    sandbox::enter(&reach, demand)?;
    let statistics = Arc::new(Statistics::map(descriptors.take("statistics")?).context("mapping the statistics")?);
    let log = Arc::new(Log::new(Arc::clone(&statistics)));
    let artefacts = descriptors.take_all("file-");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let means = Rc::new(host::Means::of(&plan)?);
    let branes = link_all(&plan, place.number, &artefacts, &log, &means)?;
    drop(artefacts);
    // Before the first instance is made: its start may be the first thing that must be interrupted.
    let engines = branes.iter().map(|b| b.engine.clone()).collect();
    let mut each = vec![ticker(means.turns.ticker())];
    if let Some(limit) = place.memory {
        let meter = match descriptors.take("memory") {
            Ok(current) => Meter::of_group(current, limit, plan.workers),
            Err(_) => Meter::of_process(limit)?,
        };
        let pressure = Arc::clone(&means.pressure);
        each.push(ticker(move || pressure.read(&meter)));
    }
    tick(engines, each, place, descriptors.take("tick").ok())?;
    local.block_on(&runtime, async {
        for brane in &branes {
            brane.first_instance().await?;
        }
        anyhow::Ok(())
    })?;
    let names = means.network.as_ref().map(|network| Arc::clone(&network.names));
    let worker = Rc::new(Worker { core: place.core, branes, statistics, log, names, means });
    // Everything is mapped, linked and pooled, and both threads are there.
    sandbox::close(&reach, demand)?;
    local.block_on(&runtime, live(worker, descriptors))
}

fn link_all(
    plan: &Plan,
    worker: u32,
    artefacts: &[(String, OwnedFd)],
    log: &Arc<Log>,
    means: &Rc<host::Means>,
) -> anyhow::Result<Vec<Rc<Brane>>> {
    let link = |(index, brane): (usize, &plan::Brane)| {
        let artefact = artefacts.iter().find(|(name, _)| *name == brane.artefact);
        let (_, artefact) = artefact.with_context(|| format!("{}: its artefact was not handed down", brane.name))?;
        anyhow::ensure!(is_sealed(artefact), "{}: its artefact could still change", brane.name);
        Ok(Rc::new(Brane::link(brane, index, (worker, plan.workers), artefact, Arc::clone(log), Rc::clone(means))?))
    };
    plan.branes.iter().enumerate().map(link).collect()
}

/// What is done at each tick.
type Ticker = Box<dyn Fn() + Send>;

fn ticker(each: impl Fn() + Send + 'static) -> Ticker {
    Box::new(each)
}

/// Starts the thread that ticks all engines' epochs, on the housekeeping cores. It must be a thread: a task would wait
/// behind the very guest that it is to interrupt.
fn tick(engines: Vec<Engine>, each: Vec<Ticker>, place: &Place, group: Option<OwnedFd>) -> anyhow::Result<()> {
    let (core, cores) = (place.core, place.housekeeping.clone());
    let (there, arrived) = std::sync::mpsc::channel();
    let body = move || {
        if let Some(group) = group {
            // "0" is the writing thread. Without its own cgroup it ticks on the worker's core: later, but it ticks.
            if let Err(e) = File::from(group).write_all(b"0") {
                say(core, &format!("the tick thread stays on the worker's core: {e}"));
            }
        }
        let mut set = CpuSet::new();
        for core in &cores {
            set.set(*core);
        }
        let _ = rustix::thread::sched_setaffinity(None, &set);
        let _ = there.send(());
        loop {
            std::thread::sleep(turns::TICK);
            for each in &each {
                each();
            }
            engines.iter().for_each(Engine::increment_epoch);
        }
    };
    std::thread::Builder::new()
        .name("tick".into())
        .stack_size(64 * 1024)
        .spawn(body)
        .context("starting the tick thread")?;
    // The seal would end a thread that still moves.
    arrived.recv().context("the tick thread ended")
}

/// What the accepting and the serving tasks watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Held,
    Accepting,
    Draining,
}

async fn live(worker: Rc<Worker>, descriptors: &mut Descriptors) -> anyhow::Result<()> {
    let init = Rc::new(Channel::new(descriptors.take("init")?)?);
    let control = Channel::new(descriptors.take("control")?)?;
    let own = descriptors.take_all("own-");
    let next = descriptors.take_all("next-");
    let (phase, watching) = watch::channel(Phase::Held);
    init.send(&FromWorker::Ready, &[]).await.context("saying ready to init")?;
    tokio::task::spawn_local(conversation::hold(Rc::clone(&worker), control));
    let beating = Rc::clone(&init);
    tokio::task::spawn_local(async move {
        let mut every = tokio::time::interval(BEAT);
        loop {
            every.tick().await;
            if beating.send(&FromWorker::Beat, &[]).await.is_err() {
                return;
            }
        }
    });
    tokio::task::spawn_local(shed(Rc::clone(&worker)));
    for brane in &worker.branes {
        tokio::task::spawn_local(Rc::clone(brane).make_all_ready());
    }
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let begin = |sockets: &[(String, OwnedFd)]| -> anyhow::Result<Vec<JoinHandle<()>>> {
        let accept = |(_, socket): &(String, OwnedFd)| {
            // A descriptor of its own: the event loop forgets it when the task ends, and the socket stays.
            let listener = tokio::net::TcpListener::from_std(TcpListener::from(socket.try_clone()?))?;
            let (worker, places) = (Rc::clone(&worker), Arc::clone(&places));
            Ok(tokio::task::spawn_local(accept(worker, listener, places, watching.clone())))
        };
        sockets.iter().map(accept).collect()
    };
    let mut lent = Vec::new();
    loop {
        match init.receive::<ToWorker>().await {
            Ok((ToWorker::Accept, _)) => {
                begin(&own)?;
                phase.send_replace(Phase::Accepting);
            }
            Ok((ToWorker::Adopt, _)) => lent.extend(begin(&next)?),
            Ok((ToWorker::Release, _)) => lent.drain(..).for_each(|task| task.abort()),
            // Without init nobody is left to say drain.
            Ok((ToWorker::Drain, _)) | Err(gaia_init::wire::Error::Closed) => break,
            Err(e) => say(worker.core, &format!("message from init dropped: {e}")),
        }
    }
    phase.send_replace(Phase::Draining);
    // Whoever is inside has a deadline, and init has one for all of them.
    while worker.statistics.worker.open.load(Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Lets go of ready instances when memory gets short, and ends the largest that are at work while there is less than there
/// must be: as many as hold what is missing, then those that it takes when the next count is there.
async fn shed(worker: Rc<Worker>) {
    loop {
        worker.means.pressure.near().await;
        worker.branes.iter().for_each(|brane| brane.shed());
        let missing = worker.means.pressure.over();
        let all = worker.branes.iter().flat_map(|brane| brane.held()).collect();
        for held in memory::largest(all, missing) {
            held.end();
        }
        tokio::time::sleep(2 * turns::TICK).await;
    }
}

/// Accepts on one socket until the worker drains, no more than there are places for.
async fn accept(
    worker: Rc<Worker>,
    listener: tokio::net::TcpListener,
    places: Arc<Semaphore>,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            _ = phase.wait_for(|p| *p == Phase::Draining) => return,
            accepted = one_more(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, peer, place)) => {
                let counters = &worker.statistics;
                worker.means.turns.something_was_done();
                counters.worker.accepted.fetch_add(1, Relaxed);
                let open = While::counted(counters, |page| &page.worker.open);
                let fresh = While::counted(counters, |page| &page.worker.fresh);
                let connection = serve::Connection {
                    worker: Rc::clone(&worker),
                    peer,
                    fresh: RefCell::new(Some(fresh)),
                    broken: Rc::default(),
                };
                let phase = phase.clone();
                tokio::task::spawn_local(async move {
                    serve_connection(Rc::new(connection), stream, phase).await;
                    drop((open, place));
                });
            }
            // Out of descriptors or memory: those in use come back as requests end.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn one_more(
    listener: &tokio::net::TcpListener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, std::net::SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, place))
}

/// Serves one connection to its end, or to the end of its current request when the worker drains.
async fn serve_connection(connection: Rc<serve::Connection>, stream: TcpStream, mut phase: watch::Receiver<Phase>) {
    let _ = stream.set_nodelay(true);
    // A client that takes nothing for so long is gone, even if its machine still answers (tcp(7)).
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, UNREAD_FOR);
    let stream = linger::Lingering::new(stream, Rc::clone(&connection.broken));
    let served = Rc::clone(&connection);
    let service = hyper::service::service_fn(move |request| serve::serve(Rc::clone(&served), request));
    let http = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(CONNECTION_BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    let turns = &connection.worker.means.turns;
    let mut http = std::pin::pin!(http);
    // What goes wrong on a connection is the client's to know: it sees it end.
    tokio::select! {
        biased;
        _ = turns.before_others(http.as_mut()) => return,
        _ = phase.wait_for(|p| *p == Phase::Draining) => {}
    }
    // Accepted, and its first request may be on its way: it gets a moment, and its answer.
    if connection.fresh.borrow().is_some()
        && tokio::time::timeout(FIRST_HEAD_WITHIN, turns.before_others(http.as_mut())).await.is_ok()
    {
        return;
    }
    http.as_mut().graceful_shutdown();
    let _ = turns.before_others(http).await;
}
