//! The control role: what runs, who asks for it, and what is known about it.
//!
//! One thread, one task per conversation, one state. It holds the channel to init, the listening socket of the API and
//! the directory of the seed; it opens nothing else. When it is killed, requests go on: a new control asks init what
//! is there and takes it over.

pub mod api;
pub mod artefact;
pub mod caller;
mod certificate;
pub mod change;
mod delivery;
pub mod deploy;
mod export;
mod init;
pub mod log;
mod metrics;
pub mod profile;
mod pull;
pub mod remote;
pub mod report;
mod secrets;
mod stamp;
mod syslog;
mod vault;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use artefact::{Artefact, Key};
use gaia_egress::resolve::{self, Resolve as _, Stub};
use gaia_init::descriptors::Descriptors;
use gaia_init::listeners::{CONTROL_PREFIX, METRICS_PREFIX};
use gaia_init::sandbox::{self, Demand};
use gaia_init::wire::{self, FromControl};
use tokio::sync::{Notify, oneshot};

use crate::channel::{Channel, read_whole};
use crate::plan::{self, Plan};
use crate::registries::Known;
use crate::statistics::Statistics;
use crate::worker::conversation::{self, Instance};

/// How often control shows init that its loop turns.
const BEAT: Duration = Duration::from_secs(1);
/// Threads that wait for the disk, at most.
const DISK_THREADS: usize = 2;
/// How long a worker may take to answer about its instances; one that is busy says so by its silence.
const WORKER_WITHIN: Duration = Duration::from_secs(2);

/// What a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Runs {
    /// A worker: the branes of its generation, on this core.
    Branes {
        /// Which.
        core: usize,
    },
    /// A keeper: one replica of a pinned brane.
    Kept {
        /// The brane's name.
        name: String,
        /// Which of its replicas, from 1.
        replica: u32,
        /// What the brane is made of, in one word.
        identity: String,
    },
}

impl Runs {
    /// As init calls it: `worker@1`, `keeper@counter.001`.
    #[must_use]
    pub fn role(&self) -> String {
        match self {
            Self::Branes { core } => format!("worker@{core}"),
            Self::Kept { name, replica, .. } => format!("keeper@{name}.{replica:03}"),
        }
    }

    /// A worker's core.
    #[must_use]
    pub fn core(&self) -> Option<usize> {
        match self {
            Self::Branes { core } => Some(*core),
            Self::Kept { .. } => None,
        }
    }
}

/// A living worker or keeper as control sees it.
pub struct Worker {
    /// What it runs.
    pub runs: Runs,
    /// Its process.
    pub pid: i32,
    /// A worker's generation, or the first that a keeper was started for.
    pub generation: u32,
    /// Its counters and its log.
    pub statistics: Statistics,
    /// The same in memory that is not mapped, and what lies behind it: the profiles of its branes.
    page: OwnedFd,
    channel: Channel,
    /// Questions that it has not answered yet.
    asked: RefCell<HashMap<u32, oneshot::Sender<OwnedFd>>>,
    /// Look-ups that it has asked for and has no answer to yet.
    look_ups: Cell<usize>,
    /// There is something in its log, or it is gone.
    records: Notify,
    gone: Cell<bool>,
}

/// Control's state, shared by its tasks.
pub struct Control {
    init: init::Init,
    workers: RefCell<Vec<Rc<Worker>>>,
    /// What serves.
    plan: RefCell<Option<Rc<Plan>>>,
    /// The plans of all generations that have workers, for the names of their branes.
    plans: RefCell<BTreeMap<u32, Rc<Plan>>>,
    log: log::History,
    /// How the log gets to its collector, if it has one.
    exported: RefCell<Option<report::Export>>,
    /// Components that were compiled and serve, by digest and by what is reserved for a memory.
    compiled: RefCell<HashMap<(String, u64), Artefact>>,
    key: Key,
    /// The store, if there is a data directory.
    vault: Option<vault::Vault>,
    /// Where the graph is that serves before one is deployed, and what goes with every graph.
    source: Option<deploy::Source>,
    /// Workers that a generation has.
    cores: Cell<usize>,
    /// The newest generation that was started, or tried.
    newest: Cell<u32>,
    /// Held by whoever changes what serves.
    changing: tokio::sync::Mutex<()>,
    /// What was deployed last, while it may still have to be taken back.
    trial: RefCell<Option<delivery::Trial>>,
    /// Who this appliance is to operators.
    device: crate::key::Key,
    refusals: RefCell<remote::Refusals>,
    profiles: profile::Profiles,
    /// What processes counted that are gone.
    counted: RefCell<metrics::Counted>,
    /// What the last deploy failed with, or warned about.
    words: RefCell<Vec<String>>,
    tickets: Cell<u32>,
    names: Arc<Stub>,
    /// The registries that the operator names.
    registries: Known,
    /// What workers serve TLS with, if there is any.
    certificate: RefCell<Option<Rc<certificate::Pair>>>,
}

/// Runs the role.
///
/// # Errors
/// If its sandbox cannot be closed, what init hands down is not there, or the channel to init breaks.
pub fn run() -> anyhow::Result<()> {
    let mut descriptors = Descriptors::inherit()?;
    let registries = registries(&mut descriptors);
    let ports = ports(&registries);
    let data = descriptors.take("data").ok();
    let keeps = data.as_ref().map(AsFd::as_fd);
    sandbox::enter_keeping(&sandbox::control::SANDBOX, &ports, keeps, Demand::from_environment())?;
    // Beside this thread there are those that wait for the disk.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(DISK_THREADS)
        .thread_stack_size(256 << 10)
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, live(&mut descriptors, data, registries))
}

/// The TCP ports that control may connect to: whoever else is to be reached has its port here, and in docs/security.md. All others
/// are closed to it by its sandbox.
fn ports(registries: &Known) -> BTreeSet<u16> {
    let mut all: BTreeSet<u16> = name_servers().iter().map(SocketAddr::port).collect();
    all.extend(registries.ports());
    all.extend(export::collector().map(|to| to.port));
    all
}

/// The registries that the supervisor hands down: none, if it is told of none. Whoever wrote what is wrong there was told.
fn registries(descriptors: &mut Descriptors) -> Known {
    let file = descriptors.take("registries").ok();
    let text = file.and_then(|file| read_whole(file, gaia_init::registries::MAX_BYTES * 2).ok());
    let text = text.and_then(|text| String::from_utf8(text).ok()).unwrap_or_default();
    let said = gaia_init::registries::Registries::parse(&text).unwrap_or_default();
    Known::of(&said).unwrap_or_default()
}

async fn live(descriptors: &mut Descriptors, data: Option<OwnedFd>, registries: Known) -> anyhow::Result<()> {
    let init = init::Init::new(Channel::new(descriptors.take("init")?)?);
    let seed = descriptors.take("seed").ok();
    let files = seed.as_ref().map(certificate::Files::from_environment).transpose()?.flatten();
    let source = seed.map(deploy::Source::from_environment);
    let api = descriptors.take("api").ok();
    let (vault, findings) = match data.map(|data| vault::Vault::open(&data)) {
        None => (None, Vec::new()),
        Some(Ok((vault, findings))) => (Some(vault), findings.iter().map(ToString::to_string).collect()),
        Some(Err(e)) => (None, vec![format!("no store, so nothing can be deployed: {e}")]),
    };
    let key = Key::of(descriptors.take("key")?, || match vault.as_ref().map(vault::Vault::key) {
        Some(Ok(kept)) => Ok(kept),
        _ => Key::chance(),
    })?;
    let doors = descriptors.take_all(CONTROL_PREFIX);
    let collectors = descriptors.take_all(METRICS_PREFIX);
    let operators = remote::operators_of(&std::env::var("GAIA_OPERATORS").unwrap_or_default());
    // As long as the key: where there is a store, it is the same after a restart; where there is none, for this boot.
    let device = crate::key::Key::of_seed(key.seed())?;
    let control = Rc::new(Control {
        init,
        workers: RefCell::default(),
        plan: RefCell::default(),
        plans: RefCell::default(),
        log: log::History::default(),
        exported: RefCell::default(),
        compiled: RefCell::default(),
        key,
        vault,
        source,
        cores: Cell::default(),
        newest: Cell::default(),
        changing: tokio::sync::Mutex::default(),
        trial: RefCell::default(),
        device,
        refusals: RefCell::default(),
        profiles: profile::Profiles::default(),
        counted: RefCell::default(),
        words: RefCell::default(),
        // Not where the control before this one began: its questions may still be answered.
        tickets: Cell::new(std::process::id() << 12),
        names: Arc::new(Stub::new(name_servers())),
        registries,
        certificate: RefCell::default(),
    });
    let beating = Rc::clone(&control);
    tokio::task::spawn_local(async move {
        let mut every = tokio::time::interval(BEAT);
        loop {
            every.tick().await;
            beating.note_requests();
            beating.init.tell(&FromControl::Beat, &[]).await;
        }
    });
    if let Some(api) = api {
        tokio::task::spawn_local(api::serve(Rc::clone(&control), api));
    }
    if !collectors.is_empty() {
        let allowed = metrics::allowed_of(&std::env::var("GAIA_METRICS_ALLOW").unwrap_or_default());
        tokio::task::spawn_local(metrics::serve(Rc::clone(&control), collectors, allowed));
    }
    if !doors.is_empty() && !operators.is_empty() {
        tokio::task::spawn_local(remote::serve(Rc::clone(&control), doors, operators));
    }
    if let Some(collector) = export::collector() {
        tokio::task::spawn_local(export::run(Rc::clone(&control), collector));
    }
    let starting = Rc::clone(&control);
    tokio::task::spawn_local(async move {
        for finding in findings {
            starting.say(&format!("store: {finding}")).await;
            starting.words.borrow_mut().push(format!("store: {finding}"));
        }
        if let Err(e) = starting.begin(files).await {
            starting.say(&format!("{e:#}")).await;
        }
    });
    // Reads until init is gone, and then so is the appliance.
    control.init.listen(&control).await.context("the channel to init")
}

impl Control {
    /// Takes over what serves, or starts the graph.
    async fn begin(self: &Rc<Self>, files: Option<certificate::Files>) -> anyhow::Result<()> {
        // Until it is known what serves, nobody changes it.
        let changing = self.changing.lock().await;
        // Before the workers are known: each is given it when it is.
        if let Some(files) = files
            && let Err(e) = certificate::keep(self, files).await
        {
            self.say(&format!("{e:#}")).await;
            self.words.borrow_mut().push(format!("{e:#}"));
            if self.source.as_ref().is_some_and(deploy::Source::ends_when_it_fails) {
                self.init.tell(&FromControl::PowerOff, &[]).await;
                return Ok(());
            }
        }
        let mut found = self.init.hello().await?;
        // Before the first reading, or what changes between would not be seen.
        let seen = self.source.as_ref().filter(|source| source.watch).map(deploy::Seen::now);
        self.cores.set(found.workers);
        self.newest.set(found.newest);
        match found.generation {
            Some(generation) => {
                self.take_over(generation, std::mem::take(&mut found.files)).await?;
                delivery::settled(self).await.context("which graph is current could not be kept")?;
                delivery::resumed(self).await.context("whether it is on trial could not be found out")?;
            }
            None => deploy::first(self).await?,
        }
        drop(changing);
        if let (Some(source), Some(seen)) = (&self.source, seen) {
            deploy::watch(self, source, seen).await;
        }
        Ok(())
    }

    async fn take_over(&self, generation: u32, files: Vec<(String, OwnedFd)>) -> anyhow::Result<()> {
        let (plan, files): (Vec<_>, _) = files.into_iter().partition(|(name, _)| name == plan::FILE);
        let (_, plan) = plan.into_iter().next().context("init has no plan of the running generation")?;
        let plan = read_whole(plan, plan::MAX_BYTES)?;
        let plan: Rc<Plan> = Rc::new(serde_json::from_slice(&plan).context("the running generation's plan")?);
        let workers = self.workers.borrow().iter().filter(|w| w.runs.core().is_some()).count();
        let (branes, keepers) = (plan.branes.len(), self.workers.borrow().len() - workers);
        self.plans.borrow_mut().insert(generation, Rc::clone(&plan));
        *self.plan.borrow_mut() = Some(plan);
        let (artefacts, wrong) = self.key.check_all(files);
        for wrong in wrong {
            self.say(&format!("compiled anew when it is next asked for: {wrong}")).await;
        }
        let known = artefacts.len();
        self.compiled.borrow_mut().extend(artefacts.into_iter().map(|a| ((a.digest.clone(), a.reservation), a)));
        let keepers = if keepers > 0 { format!(" and {keepers} keepers") } else { String::new() };
        let words = format!("{branes} branes, {workers} workers{keepers}, {known} artefacts");
        self.say(&format!("took over generation {generation}: {words}")).await;
        Ok(())
    }

    /// Workers among whom a graph's replicas are divided.
    fn workers_asked(&self) -> u32 {
        u32::try_from(self.cores.get()).unwrap_or(u32::MAX).max(1)
    }

    /// This generation serves from now on.
    fn serves(&self, generation: u32) {
        if let Some(plan) = self.plans.borrow().get(&generation) {
            *self.plan.borrow_mut() = Some(Rc::clone(plan));
        }
    }

    /// The number of the graph that is current in the store.
    fn current_number(&self) -> Option<u64> {
        self.vault.as_ref().and_then(|vault| vault.store().current_number())
    }

    /// Shows a line on the console.
    async fn say(&self, line: &str) {
        for line in line.lines() {
            self.init.tell(&FromControl::Say { line: line.to_owned() }, &[]).await;
        }
    }

    /// Says what the store has found to be wrong since this was called before.
    async fn say_findings(&self) {
        for finding in self.vault.iter().flat_map(|vault| vault.store().findings()) {
            let words = format!("store: {finding}");
            self.say(&words).await;
            self.words.borrow_mut().push(words);
        }
    }

    fn ticket(&self) -> u32 {
        let ticket = self.tickets.get();
        self.tickets.set(ticket.wrapping_add(1));
        ticket
    }

    /// A worker or keeper was started.
    fn worker_came(
        self: &Rc<Self>,
        runs: Runs,
        pid: i32,
        generation: u32,
        channel: OwnedFd,
        statistics: &OwnedFd,
    ) -> anyhow::Result<()> {
        let worker = Rc::new(Worker {
            runs,
            pid,
            generation,
            statistics: Statistics::map(statistics)?,
            page: statistics.try_clone()?,
            channel: Channel::new(channel)?,
            asked: RefCell::default(),
            look_ups: Cell::default(),
            records: Notify::new(),
            gone: Cell::new(false),
        });
        let mut workers = self.workers.borrow_mut();
        workers.retain(|w| w.pid != pid);
        workers.push(Rc::clone(&worker));
        let speaks = worker.runs.core().is_some();
        if let Some(pair) = self.certificate.borrow().clone().filter(|_| speaks) {
            let worker = Rc::clone(&worker);
            tokio::task::spawn_local(async move { pair.give(&worker).await });
        }
        tokio::task::spawn_local(listen(Rc::clone(self), Rc::clone(&worker)));
        tokio::task::spawn_local(log::read(Rc::clone(self), worker));
        Ok(())
    }

    /// A process ended. Of a worker, its page says how many requests ended with it; a keeper's state has ended.
    fn process_ended(self: &Rc<Self>, pid: i32, role: &str, cause: &str) {
        let mut workers = self.workers.borrow_mut();
        let Some(at) = workers.iter().position(|w| w.pid == pid) else { return };
        let worker = workers.swap_remove(at);
        // One that was drained has said so itself.
        if let (Runs::Kept { name, replica, .. }, false) = (&worker.runs, cause == "exited with status 0") {
            self.keeper_ended(name, *replica, cause);
        }
        if cause != "exited with status 0" {
            delivery::died(self, worker.generation, role, cause);
        }
        self.profile_ended(&worker);
        worker.gone.set(true);
        worker.records.notify_one();
        self.counted.borrow_mut().ended(&worker, cause == "exited with status 0");
    }

    /// All instances at work, in all workers and keepers.
    ///
    /// One that does not answer in time is named in the second list.
    async fn instances(&self) -> (Vec<Instance>, Vec<String>) {
        let workers: Vec<Rc<Worker>> = self.workers.borrow().iter().map(Rc::clone).collect();
        let asked = workers.iter().map(async |worker| {
            let list = tokio::time::timeout(WORKER_WITHIN, self.instances_of(worker)).await;
            list.ok().flatten().ok_or_else(|| worker.runs.role())
        });
        let (mut all, mut silent) = (Vec::new(), Vec::new());
        for answer in futures_util::future::join_all(asked).await {
            match answer {
                Ok(list) => all.extend(list),
                Err(name) => silent.push(name),
            }
        }
        (all, silent)
    }

    async fn instances_of(&self, worker: &Worker) -> Option<Vec<Instance>> {
        let ticket = self.ticket();
        let (sender, answer) = oneshot::channel();
        worker.asked.borrow_mut().insert(ticket, sender);
        let sent = worker.channel.send(&conversation::Word::Instances { ticket }, &[]).await;
        let list = if sent.is_ok() { answer.await.ok() } else { None };
        serde_json::from_slice(&read_whole(list?, conversation::MAX_BYTES).ok()?).ok()
    }

    /// Forgets the plans of generations that neither serve nor have workers left.
    fn forget_plans(&self) {
        let serving = self.plan.borrow().as_ref().map(|p| p.generation);
        let workers = self.workers.borrow();
        let in_use = |generation| workers.iter().any(|w| w.runs.core().is_some() && w.generation == generation);
        let needed = |generation| Some(generation) == serving || in_use(generation);
        self.plans.borrow_mut().retain(|generation, _| needed(*generation));
    }

    fn sum(&self, of: impl Fn(&Worker) -> &AtomicU64) -> u64 {
        self.workers.borrow().iter().map(|w| of(w).load(Relaxed)).sum()
    }
}

/// Hears what a worker says until it is gone.
async fn listen(control: Rc<Control>, worker: Rc<Worker>) {
    use conversation::Word;
    loop {
        match worker.channel.receive::<Word>().await {
            // An answer to a question whose asker went away, or whose asker was another control, is passed over.
            Ok((Word::Instances { ticket }, files)) => {
                let asker = worker.asked.borrow_mut().remove(&ticket);
                if let (Some(asker), Some(list)) = (asker, files.into_iter().next()) {
                    let _ = asker.send(list);
                }
            }
            Ok((Word::Records, _)) => worker.records.notify_one(),
            Ok((Word::LookUp { ticket, name }, _)) => {
                // A worker that keeps to its own bound never has more open.
                if worker.look_ups.get() < conversation::LOOK_UPS {
                    worker.look_ups.set(worker.look_ups.get() + 1);
                    tokio::task::spawn_local(look_up(Rc::clone(&control), Rc::clone(&worker), ticket, name));
                } else {
                    let found = Err(resolve::Error::Timeout);
                    let _ = worker.channel.send(&Word::Found { ticket, found }, &[]).await;
                }
            }
            Ok((Word::Found { .. } | Word::Certificate, _)) | Err(wire::Error::Malformed | wire::Error::Unknown(_)) => {
            }
            Err(_) => return,
        }
        worker.asked.borrow_mut().retain(|_, asker| !asker.is_closed());
    }
}

/// Resolves a name on a worker's behalf.
async fn look_up(control: Rc<Control>, worker: Rc<Worker>, ticket: u32, name: String) {
    let found = control.names.resolve(&name).await;
    worker.look_ups.set(worker.look_ups.get() - 1);
    let _ = worker.channel.send(&conversation::Word::Found { ticket, found }, &[]).await;
}

/// The name servers that the supervisor names. What is no address is passed over: whoever wrote it was told.
fn name_servers() -> Vec<SocketAddr> {
    let all = std::env::var("GAIA_DNS").unwrap_or_default();
    all.split_whitespace().filter_map(|server| server.parse().ok()).collect()
}
