//! One brane inside one worker: its engine, its pool, its linked component, its queue.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use wasmtime::component::Component;
use wasmtime::{Engine, Store, UpdateDeadline};
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use super::host::{HANDLES, Host, Means};
use super::memory::Held;
use super::turns::{Replica, Replicas, Turns};
use crate::capability::Granted;
use crate::log::{Log, Subject};
use crate::{engine, link, plan, statistics};

/// What a component's start may take: the longest seen (a JavaScript engine's, emulated) is about two seconds.
const FIRST_WITHIN: Duration = Duration::from_secs(20);
/// Chunks of ended file systems that are freed at a time: 32 of 64 KiB take about 0.3 ms.
const SLICE: usize = 32;
/// What one call to the host may move, in bytes. Writing to a stream is less: the guest asks first how much it may be.
const HOST_CALL: usize = 1 << 20;

/// A brane could not be made ready.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {step}: {source:#}")]
pub struct Error {
    name: String,
    step: &'static str,
    source: wasmtime::Error,
}

/// A request that waits.
pub struct Waiting<'a>(&'a Brane);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.count().waiting.fetch_sub(1, Relaxed);
    }
}

/// A brane, ready to serve.
pub struct Brane {
    /// What the plan says of it.
    pub plan: plan::Brane,
    /// The hosts it serves; any if `None`.
    pub host: Option<gaia_manifest::Host>,
    /// Its engine: none else's.
    pub engine: Engine,
    pre: ProxyPre<Host>,
    /// One permit for each slot of the pool, so that the pool is never asked for more than it has.
    pub slots: Arc<Semaphore>,
    /// Its place in the plan, the statistics and the log.
    pub index: usize,
    log: Arc<Log>,
    granted: Granted,
    means: Rc<Means>,
    /// Its replicas' windows, if it has a quota.
    replicas: Option<Rc<Replicas>>,
    made: Cell<u64>,
    running: RefCell<BTreeMap<u64, (Instant, Arc<Held>)>>,
}

impl Brane {
    /// Maps the artefact, makes engine and pool, and links.
    ///
    /// # Errors
    /// With the step that failed.
    pub fn link(
        plan: &plan::Brane,
        index: usize,
        workers: u32,
        artefact: &OwnedFd,
        log: Arc<Log>,
        means: Rc<Means>,
    ) -> Result<Self, Error> {
        let at = |step| move |source| Error { name: plan.name.clone(), step, source };
        let host = plan.host.as_deref().map(gaia_manifest::Host::parse).transpose();
        let host = host.map_err(|e| wasmtime::format_err!("{e}")).map_err(at("host"))?;
        let slots = plan.slots(workers);
        let engine = engine::for_worker(&plan.needs, plan.mem_max, slots).map_err(at("engine and pool"))?;
        let path = format!("/proc/self/fd/{}", artefact.as_raw_fd());
        // SAFETY: the artefact was made by this build's compiler, came through control and init alone, and is sealed:
        // nobody can have changed it since (checked by the caller).
        let component = unsafe { Component::deserialize_file(&engine, path) }.map_err(at("map the artefact"))?;
        let mut granted = Granted::of(&plan.grants, &means);
        granted.vars.extend(plan.secrets.iter().map(|(name, value)| (name.clone(), value.reveal().to_owned())));
        let linker = link::linker(&engine, granted.capabilities()).map_err(at("linker"))?;
        let pre = linker.instantiate_pre(&component).and_then(ProxyPre::new).map_err(at("link"))?;
        Ok(Self {
            plan: plan.clone(),
            host,
            engine,
            pre,
            slots: Arc::new(Semaphore::new(slots as usize)),
            index,
            log,
            granted,
            means,
            replicas: plan.cpu_quota.and_then(|quota| Replicas::new(slots, quota)),
            made: Cell::new(0),
            running: RefCell::default(),
        })
    }

    /// Makes one instance, to see that the pool has what it needs and that its start comes to an end. The epochs must
    /// be ticking, or a start that does not end is not interrupted.
    ///
    /// # Errors
    /// What went wrong, or that it took more than 20 seconds.
    pub async fn first_instance(&self) -> Result<(), Error> {
        let at = |source| Error { name: self.plan.name.clone(), step: "first instance", source };
        let mut store = self.store(0, Arc::default());
        let late = |_| wasmtime::format_err!("its start has not ended after {} s", FIRST_WITHIN.as_secs());
        let (cpu, throttled) = Default::default();
        let work = self.turns().run(self.pre.instantiate_async(&mut store), &cpu, None, &throttled);
        let made = tokio::time::timeout(FIRST_WITHIN, work).await;
        made.map_err(late).and_then(|made| made).map(drop).map_err(at)
    }

    /// A store for one fresh instance with this serial number, which tells `held` what it is granted.
    #[must_use]
    pub fn store(&self, serial: u64, held: Arc<Held>) -> Store<Host> {
        let subject = Subject::Brane(self.index, serial);
        let host = Host::new(self.plan.mem_max, &self.granted, &self.means, &self.log, subject, held);
        let mut store = Store::new(&self.engine, host);
        store.limiter(|host| &mut host.memory);
        store.set_hostcall_fuel(HOST_CALL);
        store.set_max_component_handles(HANDLES);
        // At each tick the guest lets others run: when it goes on, `Turns::run` decides. Deadlines are the business of
        // whoever waits for it.
        let yielded = Arc::clone(&self.means.turns.yielded);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |_| {
            yielded.store(true, Relaxed);
            // Wakes nobody, as Wasmtime's own yield does: that would be its next turn at once.
            let mut polled = false;
            let once = std::future::poll_fn(move |_| {
                if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
            });
            Ok(UpdateDeadline::YieldCustom(1, Box::pin(once)))
        });
        store
    }

    /// The order of turns on its core.
    #[must_use]
    pub fn turns(&self) -> &Turns {
        &self.means.turns
    }

    /// Takes a replica, if the brane has a quota. Only for who has one of its slots.
    #[must_use]
    pub fn replica(&self) -> Option<Replica> {
        self.replicas.as_ref()?.take(self.turns())
    }

    /// Its linked component.
    #[must_use]
    pub fn pre(&self) -> &ProxyPre<Host> {
        &self.pre
    }

    /// Counts one more request that waits for an instance, while it does.
    #[must_use]
    pub fn waiting(&self) -> Waiting<'_> {
        self.count().waiting.fetch_add(1, Relaxed);
        Waiting(self)
    }

    /// Its counters.
    #[must_use]
    pub fn count(&self) -> &statistics::Brane {
        &self.log.page().branes[self.index]
    }

    /// The next instance's serial number, and where it is seen what it holds. Workers count in steps of their number from different starts, so that no
    /// two of them share one; a worker that was started again begins anew.
    pub fn begin(&self, worker: u32, workers: u32) -> (u64, Arc<Held>) {
        let serial = self.made.get() * u64::from(workers) + u64::from(worker) + 1;
        self.made.set(self.made.get() + 1);
        let held = Arc::<Held>::default();
        self.running.borrow_mut().insert(serial, (Instant::now(), Arc::clone(&held)));
        (serial, held)
    }

    /// The instance is gone. What its files held is freed in slices, between which others have their turn: the kernel
    /// takes milliseconds to take back what 256 MiB were.
    pub fn end(&self, serial: u64) {
        self.running.borrow_mut().remove(&serial);
        if self.granted.tmp.is_some() && !self.means.reaping.replace(true) {
            let means = Rc::clone(&self.means);
            tokio::task::spawn_local(async move {
                while means.reaper.free_some(SLICE) {
                    tokio::task::yield_now().await;
                }
                means.reaping.set(false);
            });
        }
    }

    /// Instances that run now, with the milliseconds they have been running.
    #[must_use]
    pub fn running(&self) -> Vec<(u64, u64)> {
        let millis = |since: &Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.running.borrow().iter().map(|(serial, (since, _))| (*serial, millis(since))).collect()
    }

    /// What each of them holds.
    #[must_use]
    pub fn held(&self) -> Vec<Arc<Held>> {
        self.running.borrow().values().map(|(_, held)| Arc::clone(held)).collect()
    }
}
