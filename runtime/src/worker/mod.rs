//! The worker role: runs every brane of a generation on one core, but for the pinned ones, whose requests it passes on to
//! their keepers.
//!
//! It starts with everything it will ever have: plan, artefacts and listening sockets as open descriptors, a channel
//! to init, one to control, a page for its counters. It maps, links and pools it all, seals itself with what its graph
//! grants and nothing more (see [`gaia_init::sandbox::worker`]), says ready, and accepts when init says so. One thread runs guests and connections; a second only ticks the epochs, on the housekeeping cores.

pub mod brane;
pub mod conversation;
pub mod host;
mod ingress;
pub mod keeper;
pub mod linger;
pub mod link;
pub mod memory;
pub mod pages;
pub mod pinned;
pub mod route;
pub mod serve;
pub mod tls;
pub mod turns;

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
use gaia_init::listeners::Protocol;
use gaia_init::sandbox::{Demand, worker as sandbox};
use gaia_init::wire::{FromWorker, ToWorker};
use rustix::thread::CpuSet;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use wasmtime::Engine;

use crate::channel::{Channel, is_sealed, read_whole};
use crate::kept;
use crate::log::Log;
use crate::plan::{self, Plan};
use crate::statistics::{Profiles, Statistics};
use brane::Brane;
use memory::Meter;
use pinned::Pinned;

/// How often the worker shows init that its loop turns.
const BEAT: Duration = Duration::from_secs(1);
/// What is kept of freed memory for the next request, in bytes: some hundred requests' tasks and buffers.
const KEPT: usize = 2 << 20;
/// A worker's state, shared by its tasks.
pub struct Worker {
    core: usize,
    /// The branes that run here.
    pub branes: Vec<Rc<Brane>>,
    /// Those that keepers run.
    pub pinned: Vec<Rc<Pinned>>,
    /// Its counters.
    pub statistics: Arc<Statistics>,
    /// Its log.
    pub log: Arc<Log>,
    /// What its branes ask control for, if one may ask.
    pub names: Option<Arc<conversation::Names>>,
    /// What it has for all branes.
    pub means: Rc<host::Means>,
    /// What it serves TLS with.
    pub tls: tls::Current,
}

/// What the supervisor says about the place of a worker or keeper.
#[derive(Debug, Clone)]
struct Place {
    /// As the supervisor calls it: `worker@1`.
    role: String,
    housekeeping: Vec<usize>,
    /// Bytes of memory that it may have, or all of them together if they have a cgroup.
    memory: Option<u64>,
    measured: Measured,
}

/// What is written of requests, for whoever measures what that costs.
#[derive(Debug, Clone, Copy)]
struct Measured {
    is_logged: bool,
    is_profiled: bool,
}

impl Measured {
    /// By what the supervisor says is left out: `log profile`.
    fn without(words: &str) -> Self {
        let has = |word: &str| words.split(' ').all(|left_out| left_out != word);
        Self { is_logged: has("log"), is_profiled: has("profile") }
    }

    fn log(self, page: Arc<Statistics>) -> Log {
        if self.is_logged { Log::new(page) } else { Log::silent(page) }
    }
}

impl Place {
    fn from_environment(role: String) -> anyhow::Result<Self> {
        let memory = std::env::var("GAIA_MEMORY").ok();
        Ok(Self {
            role,
            housekeeping: parse_list(&var("GAIA_HOUSEKEEPING")?).context("GAIA_HOUSEKEEPING is no list of cores")?,
            memory: memory.map(|bytes| bytes.parse().context("GAIA_MEMORY")).transpose()?,
            measured: Measured::without(&std::env::var("GAIA_WITHOUT").unwrap_or_default()),
        })
    }

    /// One line on standard error, which is the kernel's log on the appliance. It never blocks there.
    fn say(&self, words: &str) {
        // In one piece: each write is a record.
        let _ = std::io::stderr().write_all(format!("gaia {}: {words}\n", self.role).as_bytes());
    }
}

fn var(name: &'static str) -> anyhow::Result<String> {
    std::env::var(name).context(name)
}

/// Runs the role until init says drain and the last request is answered.
///
/// # Errors
/// If it cannot get ready; init reports its end.
pub fn run() -> anyhow::Result<()> {
    let demand = Demand::from_environment();
    let mut descriptors = Descriptors::inherit()?;
    let core = var("GAIA_CORE")?.parse().context("GAIA_CORE")?;
    let number = var("GAIA_WORKER")?.parse().context("GAIA_WORKER")?;
    let place = Place::from_environment(format!("worker@{core}"))?;
    let outcome = start(&place, core, number, &mut descriptors, demand);
    if let Err(e) = &outcome {
        place.say(&format!("{e:#}"));
    }
    outcome
}

fn start(place: &Place, core: usize, number: u32, descriptors: &mut Descriptors, demand: Demand) -> anyhow::Result<()> {
    kept::keep(KEPT);
    let plan =
        read_whole(descriptors.take(&format!("file-{}", plan::FILE))?, plan::MAX_BYTES).context("reading the plan")?;
    let plan: Plan = serde_json::from_slice(&plan).context("reading the plan")?;
    let reach = plan.reach();
    sandbox::enter(&reach, demand)?;
    let page = descriptors.take("statistics")?;
    let statistics = Arc::new(Statistics::map(&page).context("mapping the statistics")?);
    let log = Arc::new(place.measured.log(Arc::clone(&statistics)));
    let artefacts = descriptors.take_all("file-");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    // Without a limit there is no end.
    let kept =
        place.memory.map_or(u64::MAX, |limit| memory::kept_of_each(limit, plan.processes(), plan.here().count()));
    let mut means = host::Means::of(&plan, kept)?;
    if place.measured.is_profiled {
        means.profiles = Some(Arc::new(Profiles::map(&page, plan.branes.len()).context("mapping the profiles")?));
    }
    let means = Rc::new(means);
    let branes = link_all(&plan, number, &artefacts, &log, &means)?;
    drop((artefacts, page));
    let kept = plan.branes.iter().enumerate().filter(|(_, brane)| brane.keeper.is_some());
    let kept =
        kept.map(|(index, brane)| Ok(Rc::new(Pinned::new(brane, index, Arc::clone(&statistics), Rc::clone(&means))?)));
    let pinned = kept.collect::<anyhow::Result<_>>()?;
    // Before the first instance is made: its start may be the first thing that must be interrupted.
    tick_all(&means, &branes, place, plan.processes(), descriptors)?;
    local.block_on(&runtime, async {
        for brane in &branes {
            brane.first_instance().await?;
        }
        anyhow::Ok(())
    })?;
    let names = means.network.as_ref().map(|network| Arc::clone(&network.names));
    let tls = tls::Current::default();
    let worker = Rc::new(Worker { core, branes, pinned, statistics, log, names, means, tls });
    // Everything is mapped, linked and pooled, and both threads are there.
    sandbox::close(&reach, demand)?;
    local.block_on(&runtime, live(place, worker, descriptors))
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
        linked(brane, index, (worker, plan.workers), artefact, log, means)
    };
    plan.here().map(link).collect()
}

fn linked(
    brane: &plan::Brane,
    index: usize,
    place: (u32, u32),
    artefact: &OwnedFd,
    log: &Arc<Log>,
    means: &Rc<host::Means>,
) -> anyhow::Result<Rc<Brane>> {
    anyhow::ensure!(is_sealed(artefact), "{}: its artefact could still change", brane.name);
    Ok(Rc::new(Brane::link(brane, index, place, artefact, Arc::clone(log), Rc::clone(means))?))
}

/// What is done at each tick.
type Ticker = Box<dyn Fn() + Send>;

fn ticker(each: impl Fn() + Send + 'static) -> Ticker {
    Box::new(each)
}

/// Ticks these branes' epochs, the clock of turns, and the count of memory that so many processes share.
fn tick_all(
    means: &host::Means,
    branes: &[Rc<Brane>],
    place: &Place,
    processes: u32,
    descriptors: &mut Descriptors,
) -> anyhow::Result<()> {
    let engines = branes.iter().map(|b| b.engine.clone()).collect();
    let mut each = vec![ticker(means.turns.ticker())];
    if let Some(limit) = place.memory {
        let meter = match descriptors.take("memory") {
            Ok(current) => Meter::of_group(current, limit, processes),
            Err(_) => Meter::of_process(limit)?,
        };
        let pressure = Arc::clone(&means.pressure);
        pressure.measure(meter);
        each.push(ticker(move || pressure.tick()));
    }
    tick(engines, each, place, descriptors.take("tick").ok())
}

/// Starts the thread that ticks all engines' epochs, on the housekeeping cores. It must be a thread: a task would wait
/// behind the very guest that it is to interrupt.
fn tick(engines: Vec<Engine>, each: Vec<Ticker>, place: &Place, group: Option<OwnedFd>) -> anyhow::Result<()> {
    let place = place.clone();
    let (there, arrived) = std::sync::mpsc::channel();
    let body = move || {
        if let Some(group) = group {
            // "0" is the writing thread. Without its own cgroup it ticks on the worker's core: later, but it ticks.
            if let Err(e) = File::from(group).write_all(b"0") {
                place.say(&format!("the tick thread stays on the worker's core: {e}"));
            }
        }
        let mut set = CpuSet::new();
        for core in &place.housekeeping {
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

/// Shows init that this process's loop turns, until init is gone.
async fn beat(init: Rc<Channel>) {
    let mut every = tokio::time::interval(BEAT);
    loop {
        every.tick().await;
        if init.send(&FromWorker::Beat, &[]).await.is_err() {
            return;
        }
    }
}

/// What the accepting and the serving tasks watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Held,
    Accepting,
    Draining,
}

async fn live(place: &Place, worker: Rc<Worker>, descriptors: &mut Descriptors) -> anyhow::Result<()> {
    let init = Rc::new(Channel::new(descriptors.take("init")?)?);
    let control = Channel::new(descriptors.take("control")?)?;
    let own = descriptors.take_all("own-");
    let next = descriptors.take_all("next-");
    let (phase, watching) = watch::channel(Phase::Held);
    init.send(&FromWorker::Ready, &[]).await.context("saying ready to init")?;
    let (names, log, listed) = (worker.names.clone(), Arc::clone(&worker.log), Rc::clone(&worker));
    let (certified, said) = (Rc::clone(&worker), place.clone());
    let speaker = conversation::Speaker {
        names,
        log,
        instances: Box::new(move || listed.instances()),
        certified: Box::new(move |config| match config {
            Ok(config) => certified.tls.set(config),
            Err(e) => said.say(&format!("certificate dropped: {e:#}")),
        }),
    };
    tokio::task::spawn_local(conversation::hold(speaker, control));
    tokio::task::spawn_local(beat(Rc::clone(&init)));
    tokio::task::spawn_local(shed(Rc::clone(&worker)));
    for brane in &worker.branes {
        tokio::task::spawn_local(Rc::clone(brane).make_all_ready());
    }
    let places = Arc::new(Semaphore::new(ingress::CONNECTIONS));
    let begin = |sockets: &[(String, OwnedFd)]| -> anyhow::Result<Vec<JoinHandle<()>>> {
        let accept = |(name, socket): &(String, OwnedFd)| {
            let secure = Protocol::of(name) == Some(Protocol::Https);
            // A descriptor of its own: the event loop forgets it when the task ends, and the socket stays.
            let listener = tokio::net::TcpListener::from_std(TcpListener::from(socket.try_clone()?))?;
            let (worker, places) = (Rc::clone(&worker), Arc::clone(&places));
            Ok(tokio::task::spawn_local(ingress::accept(worker, listener, secure, places, watching.clone())))
        };
        sockets.iter().map(accept).collect()
    };
    let (mut accepting, mut lent) = (Vec::new(), Vec::new());
    loop {
        match init.receive::<ToWorker>().await {
            Ok((ToWorker::Accept, _)) => {
                accepting.extend(begin(&own)?);
                phase.send_replace(Phase::Accepting);
            }
            Ok((ToWorker::Adopt, _)) => lent.extend(begin(&next)?),
            Ok((ToWorker::Release, _)) => lent.drain(..).for_each(|task| task.abort()),
            // Without init nobody is left to say drain.
            Ok((ToWorker::Drain, _)) | Err(gaia_init::wire::Error::Closed) => break,
            Ok((ToWorker::Link { name, replica }, streams)) => {
                let of = worker.pinned.iter().find(|pinned| pinned.plan.name == name);
                if let (Some(pinned), Some(stream)) = (of, streams.into_iter().next())
                    && let Err(e) = pinned.link(replica, stream).await
                {
                    place.say(&format!("no way to the keeper of {name}.{replica:03}: {e:#}"));
                }
            }
            Err(e) => place.say(&format!("message from init dropped: {e}")),
        }
    }
    phase.send_replace(Phase::Draining);
    // Not before the last of them has ended may anybody be told that this worker serves nobody new.
    for task in accepting.into_iter().chain(lent) {
        let _ = task.await;
    }
    let _ = init.send(&FromWorker::Stopped, &[]).await;
    // Whoever is inside has a deadline, and init has one for all of them.
    while worker.statistics.worker.open.load(Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

impl Worker {
    /// What control is told when it asks.
    fn instances(&self) -> Vec<conversation::Instance> {
        let running = |b: &Rc<Brane>| {
            let (name, role) = (b.plan.name.clone(), format!("worker@{}", self.core));
            let one = move |(serial, millis)| conversation::Instance {
                name: format!("{name}.{serial:03}"),
                role: role.clone(),
                millis,
            };
            b.running().into_iter().map(one)
        };
        self.branes.iter().flat_map(running).collect()
    }
}

/// Lets go of ready instances when memory gets short, and ends the largest that are at work while there is less than there
/// must be: as many as hold what is missing, then those that it takes when the next count is there.
///
/// All processes see the same shortage, and the one that has the largest instance shall end it: small ones are ended only when that has not
/// helped for some rounds. What is ended counts as given back from then on, though its release may take a moment.
async fn shed(worker: Rc<Worker>) {
    let mut shedding = memory::Shedding::default();
    loop {
        worker.means.pressure.near().await;
        worker.branes.iter().for_each(|brane| brane.shed());
        let held = worker.branes.iter().flat_map(|brane| brane.held()).collect();
        shedding.round(held, worker.means.pressure.over()).iter().for_each(|held| held.end());
        tokio::time::sleep(2 * turns::TICK).await;
    }
}
