//! One brane inside one worker: its engine, its pool, its linked component, its queue.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use gaia_manifest::Lifecycle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::component::Component;
use wasmtime::{Engine, Store, UpdateDeadline};
use wasmtime_wasi_http::p2::bindings::{Proxy, ProxyPre};

use super::host::{HANDLES, Host, Means};
use super::memory::{Held, Share};
use super::pages::Pages;
use super::turns::{Replica, Replicas, Terms, Turns};
use crate::capability::Granted;
use crate::log::{Log, Subject};
use crate::stacks::{LONGEST_NAME, Sampler};
use crate::{engine, link, plan, statistics};

/// What a component's start may take: the longest seen (a JavaScript engine's, emulated) is about two seconds.
const FIRST_WITHIN: Duration = Duration::from_secs(20);
/// Chunks of ended file systems that are freed at a time: 32 of 64 KiB take about 0.3 ms.
const SLICE: usize = 32;
/// So long after a brane's last request its slots give back what they have kept.
const IDLE_AFTER: Duration = Duration::from_secs(10);
/// Slots that give back at a time.
const SLOTS: usize = 32;
/// Instances that take longer to start stay when a brane is idle.
const CHEAP_START: Duration = Duration::from_millis(5);
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

/// An instance that is ready for a request, or only the store that one is to be made in.
pub struct Instance {
    /// Its serial number.
    pub serial: u64,
    /// Where it is seen what it holds.
    pub held: Arc<Held>,
    /// Its store.
    pub store: Store<Host>,
    /// The instance, if it has been made.
    pub proxy: Option<Proxy>,
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
    /// Takes samples of its instances' stacks, if that is wanted. Never waited for: there is one thread.
    sampler: Option<Arc<Mutex<Sampler>>>,
    /// Its replicas' windows, if it has a quota.
    replicas: Option<Rc<Replicas>>,
    made: Cell<u64>,
    /// Its number among the workers, and how many they are.
    place: (u32, u32),
    /// Instances that wait for a request, in the order in which they were made. With those at work never more than there are slots: whoever makes
    /// one has a slot meanwhile.
    ready: RefCell<Vec<Instance>>,
    /// How long the quickest start took of those that were no request's own: others' turns are in all of them.
    start: Cell<Duration>,
    /// What is under its pool.
    pages: Pages,
    /// A task waits until nobody has asked for a while.
    watched: Cell<bool>,
    /// Its slots may have kept something since they gave it back.
    keeps: Cell<bool>,
    running: RefCell<BTreeMap<u64, (Instant, Arc<Held>)>>,
}

impl Brane {
    /// Maps the artefact, makes engine and pool, and links, for the worker with this number of so many.
    ///
    /// # Errors
    /// With the step that failed.
    pub fn link(
        plan: &plan::Brane,
        index: usize,
        place: (u32, u32),
        artefact: &OwnedFd,
        log: Arc<Log>,
        means: Rc<Means>,
    ) -> Result<Self, Error> {
        let at = |step| move |source| Error { name: plan.name.clone(), step, source };
        let host = plan.host.as_deref().map(gaia_manifest::Host::parse).transpose();
        let host = host.map_err(|e| wasmtime::format_err!("{e}")).map_err(at("host"))?;
        let slots = plan.slots(place.1);
        let resident = engine::resident(&plan.needs, slots, means.kept_of_each);
        let pool = engine::pool(&plan.needs, plan.mem_max, slots, resident);
        let has_short_names = plan.needs.longest_name <= LONGEST_NAME;
        let engine = engine::for_worker(pool, plan.reservation, has_short_names).map_err(at("engine and pool"))?;
        let pages =
            Pages::of(&engine, &plan.needs, plan.mem_max, slots, resident).map_err(at("the pool's memories"))?;
        let path = format!("/proc/self/fd/{}", artefact.as_raw_fd());
        // SAFETY: the artefact was made by this build's compiler, came through control and init alone, and is sealed:
        // nobody can have changed it since (checked by the caller).
        let component = unsafe { Component::deserialize_file(&engine, path) }.map_err(at("map the artefact"))?;
        let mut granted = Granted::of(&plan.grants, &means);
        granted.vars.extend(plan.secrets.iter().map(|(name, value)| (name.clone(), value.reveal().to_owned())));
        let linker = link::linker(&engine, granted.capabilities()).map_err(at("linker"))?;
        let pre = linker.instantiate_pre(&component).and_then(ProxyPre::new).map_err(at("link"))?;
        let profiles = means.profiles.as_ref().filter(|_| has_short_names);
        let sampler = profiles.map(|profiles| Arc::new(Mutex::new(Sampler::new(Arc::clone(profiles), index))));
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
            sampler,
            replicas: plan.cpu_quota.and_then(|quota| Replicas::new(slots, quota)),
            made: Cell::new(0),
            place,
            ready: RefCell::default(),
            start: Cell::new(FIRST_WITHIN),
            pages,
            watched: Cell::default(),
            keeps: Cell::default(),
            running: RefCell::default(),
        })
    }

    /// Makes one instance, to see that the pool has what it needs and that its start comes to an end. The epochs must
    /// be ticking, or a start that does not end is not interrupted. It is the first that is ready, if any is to be.
    ///
    /// # Errors
    /// What went wrong, or that it took more than 20 seconds.
    pub async fn first_instance(&self) -> Result<(), Error> {
        let at = |source| Error { name: self.plan.name.clone(), step: "first instance", source };
        let first = self.instance(None).await.map_err(at)?;
        if self.plan.lifecycle == Lifecycle::Pooled {
            self.is_ready(first);
        } else {
            // As if it had not been.
            self.made.set(0);
        }
        Ok(())
    }

    /// Makes an instance, as part of what this replica may have of the core.
    async fn instance(&self, replica: Option<&Replica>) -> wasmtime::Result<Instance> {
        let mut instance = self.empty();
        let began = Instant::now();
        let late = |_| wasmtime::format_err!("its start has not ended after {} s", FIRST_WITHIN.as_secs());
        let throttled = AtomicU64::default();
        let start = self.pre.instantiate_async(&mut instance.store);
        let terms = Terms { cpu: None, replica, throttled: &throttled, memory: None };
        let start = tokio::time::timeout(FIRST_WITHIN, self.turns().run(start, terms));
        instance.proxy = Some(start.await.map_err(late)??);
        self.start.set(self.start.get().min(began.elapsed()));
        Ok(instance)
    }

    /// What an instance is made in: its number, and an empty store.
    fn empty(&self) -> Instance {
        let (worker, workers) = self.place;
        // Workers count in steps of their number from different starts, so that no two of them share one; a worker that
        // was started again begins anew.
        let serial = self.made.get() * u64::from(workers) + u64::from(worker) + 1;
        self.made.set(self.made.get() + 1);
        self.keeps.set(true);
        let held = Arc::<Held>::default();
        Instance { serial, store: self.store(serial, Arc::clone(&held)), held, proxy: None }
    }

    fn is_ready(&self, instance: Instance) {
        self.ready.borrow_mut().push(instance);
        self.count().ready.fetch_add(1, Relaxed);
    }

    /// An instance for a request that has a slot: one that is ready, or an empty store for one. It is at work from now on.
    pub fn take(&self) -> Instance {
        // The newest: what it has touched is still in the core's caches.
        let ready = self.ready.borrow_mut().pop();
        let instance = if let Some(mut instance) = ready {
            self.count().ready.fetch_sub(1, Relaxed);
            self.begins(&mut instance.store);
            instance
        } else {
            self.empty()
        };
        self.count().instances.fetch_add(1, Relaxed);
        self.running.borrow_mut().insert(instance.serial, (Instant::now(), Arc::clone(&instance.held)));
        self.count().busy.fetch_add(1, Relaxed);
        instance
    }

    /// Makes the instances that are to be ready, each in a slot that nobody needs just now.
    pub async fn make_all_ready(self: Rc<Self>) {
        while self.has_room_for_one() {
            let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else { return };
            if !self.make_ready(slot, self.replica()).await {
                return;
            }
            // Others are served meanwhile.
            tokio::task::yield_now().await;
        }
    }

    /// Makes the next instance, in the slot and with the replica of one that is gone, if nobody waits for these. Whether it
    /// did; a start that goes wrong is told to the request that tries it next.
    pub async fn make_ready(&self, slot: OwnedSemaphorePermit, replica: Option<Replica>) -> bool {
        let wanted = self.has_room_for_one() && self.count().waiting.load(Relaxed) == 0;
        let made = if wanted { self.instance(replica.as_ref()).await.ok() } else { None };
        let is_made = made.is_some();
        if let Some(instance) = made {
            self.is_ready(instance);
        }
        // Whoever has the slot has a replica.
        drop(replica);
        drop(slot);
        is_made
    }

    /// Whether one more may be made ready: there is a slot for it and memory.
    fn has_room_for_one(&self) -> bool {
        let most = self.plan.slots(self.place.1) as usize;
        // Permits that are out are instances at work, or in the making.
        let out = most - self.slots.available_permits();
        self.plan.lifecycle == Lifecycle::Pooled
            && self.ready.borrow().len() + out.max(1) <= most
            && self.means.pressure.is_low()
    }

    /// Lets go of the instances that are ready, and if none is at work, of what the slots have kept.
    pub fn shed(&self) {
        let gone = std::mem::take(&mut *self.ready.borrow_mut());
        self.count().ready.fetch_sub(gone.len() as u64, Relaxed);
        drop(gone);
        if self.is_idle() && self.keeps.replace(false) {
            self.pages.give_back(&self.pages.memories);
        }
    }

    /// A store for one fresh instance with this serial number, which tells `held` what it is granted.
    pub(super) fn store(&self, serial: u64, held: Arc<Held>) -> Store<Host> {
        let subject = Subject::Brane(self.index, serial);
        let host = Host::new(self.plan.mem_max, &self.granted, &self.means, &self.log, subject, held);
        let mut store = Store::new(&self.engine, host);
        store.limiter(|host| &mut host.memory);
        store.set_hostcall_fuel(HOST_CALL);
        store.set_max_component_handles(HANDLES);
        // At each tick the guest lets others run: when it goes on, `Turns::run` decides. Deadlines are the business of
        // whoever waits for it.
        let turns = &self.means.turns;
        let (yielded, ticks, sampler) = (Arc::clone(&turns.yielded), Arc::clone(&turns.ticks), self.sampler.clone());
        self.begins(&mut store);
        store.epoch_deadline_callback(move |store| {
            let (now, own) = (ticks.now(), ticks.take());
            let runs_until = store.data().runs_until;
            // A tick that came while it waited says nothing of where its time goes.
            if let Some(sampler) = sampler.as_ref().filter(|_| own > 0) {
                sampler.lock().unwrap_or_else(PoisonError::into_inner).ticked(&store);
            }
            if now < runs_until {
                return Ok(UpdateDeadline::Continue(1));
            }
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

    /// An instance begins to work. The ticks that have passed while it waited are not its own: it would be sent behind all others at its
    /// first instruction.
    ///
    /// The first tick comes at any moment, so it lets others run at the second, and has a whole one at least: whoever needs less than that
    /// does not queue behind guests that spin. A quota is kept tick by tick.
    pub(super) fn begins(&self, store: &mut Store<Host>) {
        let ticks = if self.replicas.is_some() { 1 } else { 2 };
        store.data_mut().runs_until = self.means.turns.ticks.now() + ticks;
        // At the first it is seen where it is, if it is to be seen at all.
        store.set_epoch_deadline(if self.sampler.is_some() { 1 } else { ticks });
    }

    /// What an instance that has this much takes of the memory that there is.
    pub fn share<'a>(&'a self, held: &'a Held) -> Share<'a> {
        Share { pressure: &self.means.pressure, held }
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

    /// Where it is counted how long and how large its work is.
    #[must_use]
    pub fn profile(&self) -> Option<&statistics::Profile> {
        self.means.profiles.as_ref()?.of(self.index)
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

    /// An instance that was at work is gone.
    pub fn end(self: &Rc<Self>, serial: u64) {
        self.running.borrow_mut().remove(&serial);
        self.watch();
        self.count().busy.fetch_sub(1, Relaxed);
        self.reap();
    }

    /// Frees what files held that are gone, in slices, between which others have their turn: the kernel takes milliseconds to
    /// take back what 256 MiB were.
    pub(super) fn reap(&self) {
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

    /// Once nobody has asked for a while, gives back what its slots have kept, and makes those that are to be ready anew.
    fn watch(self: &Rc<Self>) {
        if self.watched.replace(true) {
            return;
        }
        let brane = Rc::clone(self);
        tokio::task::spawn_local(async move {
            loop {
                let before = brane.count().requests.load(Relaxed);
                tokio::time::sleep(IDLE_AFTER).await;
                if brane.count().requests.load(Relaxed) == before && brane.is_idle() {
                    let all = brane.gives_back().await;
                    Rc::clone(&brane).make_all_ready().await;
                    if all {
                        break;
                    }
                }
            }
            brane.watched.set(false);
        });
    }

    /// No instance is at work or in the making.
    fn is_idle(&self) -> bool {
        self.slots.available_permits() == self.plan.slots(self.place.1) as usize
    }

    /// Gives back what its slots have kept, a little at a time, as others have their turns meanwhile; false if it was asked before
    /// that was done.
    async fn gives_back(&self) -> bool {
        // Those that are ready are in these slots, and as good as new ones; unless to make some takes longer than it is worth.
        if self.start.get() > CHEAP_START && !self.ready.borrow().is_empty() {
            return true;
        }
        loop {
            let Some(one) = self.ready.borrow_mut().pop() else { break };
            self.count().ready.fetch_sub(1, Relaxed);
            drop(one);
            tokio::task::yield_now().await;
        }
        for some in self.pages.memories.chunks(SLOTS) {
            if !self.is_idle() || !self.ready.borrow().is_empty() {
                return false;
            }
            self.pages.give_back(some);
            tokio::task::yield_now().await;
        }
        self.keeps.set(false);
        true
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
