//! The control role: what runs, who asks for it, and what is known about it.
//!
//! One thread, one task per conversation, one state. It holds the channel to init, the listening socket of the API and
//! the directory of the seed; it opens nothing else. When it is killed, requests go on: a new control asks init what
//! is there and takes it over.

pub mod api;
pub mod deploy;
mod init;
pub mod report;

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use gaia_init::descriptors::Descriptors;
use gaia_init::wire::FromControl;

use crate::channel::{Channel, read_whole};
use crate::plan::{self, Plan};
use crate::statistics::Statistics;
use crate::worker::instances::{self, Instance};

/// How often control shows init that its loop turns.
const BEAT: Duration = Duration::from_secs(1);
/// How long a worker may take to answer about its instances; one that is busy says so by its silence.
const WORKER_WITHIN: Duration = Duration::from_secs(2);

/// A living worker as control sees it.
pub struct Worker {
    /// Its core.
    pub core: usize,
    /// Its process.
    pub pid: i32,
    /// Its generation.
    pub generation: u32,
    /// Its counters.
    pub statistics: Statistics,
    channel: tokio::sync::Mutex<Channel>,
}

/// What served before a worker was replaced, so that sums do not fall.
#[derive(Debug, Default, Clone)]
struct Past {
    requests: u64,
    lost: u64,
}

/// Control's state, shared by its tasks.
pub struct Control {
    init: init::Init,
    workers: RefCell<Vec<Rc<Worker>>>,
    /// What serves.
    plan: RefCell<Option<Rc<Plan>>>,
    past: RefCell<Past>,
    /// What the last deploy failed with, or warned about.
    words: RefCell<Vec<String>>,
    tickets: Cell<u32>,
}

/// Runs the role.
///
/// # Errors
/// If what init hands down is not there, or the channel to init breaks.
pub fn run() -> anyhow::Result<()> {
    let mut descriptors = Descriptors::inherit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, live(&mut descriptors))
}

async fn live(descriptors: &mut Descriptors) -> anyhow::Result<()> {
    let init = init::Init::new(Channel::new(descriptors.take("init")?)?);
    let seed = descriptors.take("seed").ok();
    let api = descriptors.take("api").ok();
    let control = Rc::new(Control {
        init,
        workers: RefCell::default(),
        plan: RefCell::default(),
        past: RefCell::default(),
        words: RefCell::default(),
        // Not where the control before this one began: its questions may still be answered.
        tickets: Cell::new(std::process::id() << 12),
    });
    let beating = Rc::clone(&control);
    tokio::task::spawn_local(async move {
        let mut every = tokio::time::interval(BEAT);
        loop {
            every.tick().await;
            beating.init.tell(&FromControl::Beat, &[]).await;
        }
    });
    if let Some(api) = api {
        tokio::task::spawn_local(api::serve(Rc::clone(&control), api));
    }
    let starting = Rc::clone(&control);
    tokio::task::spawn_local(async move {
        if let Err(e) = starting.begin(seed).await {
            starting.say(&format!("{e:#}")).await;
        }
    });
    // Reads until init is gone, and then so is the appliance.
    control.init.listen(&control).await.context("the channel to init")
}

impl Control {
    /// Takes over what serves, or starts what the seed holds.
    async fn begin(&self, seed: Option<OwnedFd>) -> anyhow::Result<()> {
        let found = self.init.hello().await?;
        if let Some(generation) = found.generation {
            let (_, file) = found
                .files
                .into_iter()
                .find(|(name, _)| name == plan::FILE)
                .context("init has no plan of the running generation")?;
            let plan: Plan =
                serde_json::from_slice(&read_whole(file, plan::MAX_BYTES)?).context("the running generation's plan")?;
            let workers = self.workers.borrow().len();
            let branes = plan.branes.len();
            *self.plan.borrow_mut() = Some(Rc::new(plan));
            self.say(&format!("took over generation {generation}: {branes} branes, {workers} workers")).await;
            return Ok(());
        }
        deploy::from_seed(self, seed, &found).await
    }

    /// Shows a line on the console.
    async fn say(&self, line: &str) {
        for line in line.lines() {
            self.init.tell(&FromControl::Say { line: line.to_owned() }, &[]).await;
        }
    }

    fn ticket(&self) -> u32 {
        let ticket = self.tickets.get();
        self.tickets.set(ticket.wrapping_add(1));
        ticket
    }

    /// A worker was started.
    fn worker_came(
        &self,
        core: usize,
        pid: i32,
        generation: u32,
        channel: OwnedFd,
        statistics: &OwnedFd,
    ) -> anyhow::Result<()> {
        let statistics = Statistics::map(statistics)?;
        let worker =
            Worker { core, pid, generation, statistics, channel: tokio::sync::Mutex::new(Channel::new(channel)?) };
        let mut workers = self.workers.borrow_mut();
        workers.retain(|w| w.pid != pid);
        workers.push(Rc::new(worker));
        Ok(())
    }

    /// A process ended. Of a worker, its page says how many requests ended with it.
    fn process_ended(&self, pid: i32) {
        let mut workers = self.workers.borrow_mut();
        let Some(at) = workers.iter().position(|w| w.pid == pid) else { return };
        let worker = workers.swap_remove(at);
        let counted = &worker.statistics.worker;
        let mut past = self.past.borrow_mut();
        past.requests += counted.requests.load(Relaxed);
        // A request on its way on a fresh connection is lost to the client as well.
        past.lost += counted.inside.load(Relaxed) + counted.fresh.load(Relaxed);
    }

    /// All instances at work, in all workers of the serving generation.
    ///
    /// A worker that does not answer in time is named in the second list.
    async fn instances(&self) -> (Vec<Instance>, Vec<String>) {
        let workers: Vec<Rc<Worker>> = self.workers.borrow().iter().map(Rc::clone).collect();
        let asked = workers.iter().map(async |worker| {
            let list = tokio::time::timeout(WORKER_WITHIN, self.instances_of(worker)).await;
            list.ok().flatten().ok_or_else(|| format!("worker@{}", worker.core))
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
        // One question at a time: an answer taken by the wrong asker would be lost.
        let channel = worker.channel.lock().await;
        let wanted = self.ticket();
        channel.send(&instances::Word::Instances { ticket: wanted }, &[]).await.ok()?;
        loop {
            match channel.receive::<instances::Word>().await {
                // An answer to a question whose asker went away is passed over.
                Ok((instances::Word::Instances { ticket }, files)) if ticket == wanted => {
                    let list = read_whole(files.into_iter().next()?, instances::MAX_BYTES).ok()?;
                    return serde_json::from_slice(&list).ok();
                }
                Ok(_) | Err(gaia_init::wire::Error::Malformed | gaia_init::wire::Error::Unknown(_)) => {}
                Err(_) => return None,
            }
        }
    }

    fn sum(&self, of: impl Fn(&Worker) -> &AtomicU64) -> u64 {
        self.workers.borrow().iter().map(|w| of(w).load(Relaxed)).sum()
    }
}
