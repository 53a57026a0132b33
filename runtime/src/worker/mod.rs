//! The worker role: runs every brane of a generation on one core.
//!
//! It starts with everything it will ever have: plan, artefacts and listening sockets as open descriptors, a channel
//! to init, one to control, a page for its counters. It maps, links and pools it all, says ready, and accepts when
//! init says so. One thread runs guests and connections; a second only ticks the epochs, on the housekeeping cores.

pub mod brane;
pub mod host;
pub mod instances;
pub mod linger;
pub mod route;
pub mod serve;

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use gaia_init::cores::parse_list;
use gaia_init::descriptors::Descriptors;
use gaia_init::wire::{FromWorker, ToWorker};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::thread::CpuSet;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use wasmtime::Engine;

use crate::channel::{Channel, is_sealed, read_whole};
use crate::plan::{self, Plan};
use crate::statistics::{Statistics, While};
use brane::Brane;

/// How often a running guest lets others run. Shorter costs more switches, longer more latency for its neighbours.
const TICK: Duration = Duration::from_millis(5);
/// How often the worker shows init that its loop turns.
const BEAT: Duration = Duration::from_secs(1);
/// A connection must send a request's whole head within this, and may be idle between requests for as long.
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// What hyper may buffer of a connection, in bytes; a longer head is answered 431.
const CONNECTION_BUFFER: usize = 64 * 1024;
/// Faults written to the kernel's log each second; more are only counted, so that no guest can flood it.
const FAULTS_PER_SECOND: u32 = 5;

/// A worker's state, shared by its tasks.
pub struct Worker {
    core: usize,
    /// Its position among the workers, from 0.
    pub number: u32,
    /// How many workers there are.
    pub workers: u32,
    /// Its branes.
    pub branes: Vec<Rc<Brane>>,
    /// Its counters.
    pub statistics: Arc<Statistics>,
    faults: Cell<(Option<Instant>, u32)>,
}

impl Worker {
    /// Writes a fault of a guest or of the runtime to the kernel's log, at most [`FAULTS_PER_SECOND`].
    fn fault(&self, words: &str) {
        let (since, written) = self.faults.get();
        let fresh = since.is_none_or(|s| s.elapsed() >= Duration::from_secs(1));
        let (since, written) = if fresh { (Some(Instant::now()), 0) } else { (since, written) };
        self.faults.set((since, written.saturating_add(1)));
        if written < FAULTS_PER_SECOND {
            let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(400).collect();
            say(self.core, &words);
        }
    }
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
}

impl Place {
    fn from_environment() -> anyhow::Result<Self> {
        let var = |name: &'static str| std::env::var(name).context(name);
        Ok(Self {
            core: var("GAIA_CORE")?.parse().context("GAIA_CORE")?,
            number: var("GAIA_WORKER")?.parse().context("GAIA_WORKER")?,
            housekeeping: parse_list(&var("GAIA_HOUSEKEEPING")?).context("GAIA_HOUSEKEEPING is no list of cores")?,
        })
    }
}

/// Runs the role until init says drain and the last request is answered.
///
/// # Errors
/// If it cannot get ready; init reports its end.
pub fn run() -> anyhow::Result<()> {
    let mut descriptors = Descriptors::inherit()?;
    let place = Place::from_environment()?;
    let core = place.core;
    let outcome = start(&place, &mut descriptors);
    if let Err(e) = &outcome {
        say(core, &format!("{e:#}"));
    }
    outcome
}

fn start(place: &Place, descriptors: &mut Descriptors) -> anyhow::Result<()> {
    let plan =
        read_whole(descriptors.take(&format!("file-{}", plan::FILE))?, plan::MAX_BYTES).context("reading the plan")?;
    let plan: Plan = serde_json::from_slice(&plan).context("reading the plan")?;
    let statistics = Arc::new(Statistics::map(descriptors.take("statistics")?).context("mapping the statistics")?);
    let artefacts = descriptors.take_all("file-");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let branes = local.block_on(&runtime, ready_all(&plan, &artefacts, &statistics))?;
    drop(artefacts);
    let engines = branes.iter().map(|b| b.engine.clone()).collect();
    tick(engines, place, descriptors.take("tick").ok())?;
    let worker = Rc::new(Worker {
        core: place.core,
        number: place.number,
        workers: plan.workers,
        branes,
        statistics,
        faults: Cell::new((None, 0)),
    });
    local.block_on(&runtime, live(worker, descriptors))
}

async fn ready_all(
    plan: &Plan,
    artefacts: &[(String, OwnedFd)],
    statistics: &Arc<Statistics>,
) -> anyhow::Result<Vec<Rc<Brane>>> {
    let mut branes = Vec::with_capacity(plan.branes.len());
    for (index, brane) in plan.branes.iter().enumerate() {
        let artefact = artefacts.iter().find(|(name, _)| *name == brane.artefact);
        let (_, artefact) = artefact.with_context(|| format!("{}: its artefact was not handed down", brane.name))?;
        anyhow::ensure!(is_sealed(artefact), "{}: its artefact could still change", brane.name);
        let ready = Brane::ready(brane, index, plan.workers, artefact, Arc::clone(statistics)).await?;
        branes.push(Rc::new(ready));
    }
    Ok(branes)
}

/// Starts the thread that ticks all engines' epochs, on the housekeeping cores. It must be a thread: a task would wait
/// behind the very guest that it is to interrupt.
fn tick(engines: Vec<Engine>, place: &Place, group: Option<OwnedFd>) -> anyhow::Result<()> {
    let (core, cores) = (place.core, place.housekeeping.clone());
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
        loop {
            std::thread::sleep(TICK);
            engines.iter().for_each(Engine::increment_epoch);
        }
    };
    std::thread::Builder::new()
        .name("tick".into())
        .stack_size(64 * 1024)
        .spawn(body)
        .context("starting the tick thread")?;
    Ok(())
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
    let own = listeners(descriptors.take_all("own-"))?;
    let next = listeners(descriptors.take_all("next-"))?;
    let (phase, watching) = watch::channel(Phase::Held);
    init.send(&FromWorker::Ready, &[]).await.context("saying ready to init")?;
    tokio::task::spawn_local(instances::answer(Rc::clone(&worker), control));
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
    let lent: RefCell<Vec<JoinHandle<()>>> = RefCell::default();
    loop {
        match init.receive::<ToWorker>().await {
            Ok((ToWorker::Accept, _)) => {
                phase.send_replace(Phase::Accepting);
                for listener in &own {
                    tokio::task::spawn_local(accept(Rc::clone(&worker), Rc::clone(listener), watching.clone()));
                }
            }
            Ok((ToWorker::Adopt, _)) => lent.borrow_mut().extend(next.iter().map(|listener| {
                tokio::task::spawn_local(accept(Rc::clone(&worker), Rc::clone(listener), watching.clone()))
            })),
            Ok((ToWorker::Release, _)) => lent.borrow_mut().drain(..).for_each(|task| task.abort()),
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

type Listener = Rc<tokio::net::TcpListener>;

fn listeners(sockets: Vec<(String, OwnedFd)>) -> anyhow::Result<Vec<Listener>> {
    let listener = |(_, socket)| Ok(Rc::new(tokio::net::TcpListener::from_std(TcpListener::from(socket))?));
    sockets.into_iter().map(listener).collect()
}

/// Accepts on one socket until the worker drains.
async fn accept(worker: Rc<Worker>, listener: Listener, mut phase: watch::Receiver<Phase>) {
    loop {
        let accepted = tokio::select! {
            biased;
            _ = phase.wait_for(|p| *p == Phase::Draining) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                worker.statistics.worker.accepted.fetch_add(1, Relaxed);
                tokio::task::spawn_local(connection(Rc::clone(&worker), stream, peer, phase.clone()));
            }
            // Out of descriptors or memory: those in use come back as requests end.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Serves one connection to its end, or to the end of its current request when the worker drains.
async fn connection(
    worker: Rc<Worker>,
    stream: TcpStream,
    peer: std::net::SocketAddr,
    mut phase: watch::Receiver<Phase>,
) {
    let counters = Arc::clone(&worker.statistics);
    let _open = While::counted(&counters.worker.open);
    let _ = stream.set_nodelay(true);
    let service = hyper::service::service_fn(move |request| serve::serve(Rc::clone(&worker), request, peer));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(CONNECTION_BUFFER)
        .pipeline_flush(true)
        .serve_connection(TokioIo::new(linger::Lingering::new(stream)), service);
    let mut connection = std::pin::pin!(connection);
    // What goes wrong on a connection is the client's to know: it sees it end.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = phase.wait_for(|p| *p == Phase::Draining) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}
