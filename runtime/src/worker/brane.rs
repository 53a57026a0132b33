//! One brane inside one worker: its engine, its pool, its linked component, its queue.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use wasmtime::component::Component;
use wasmtime::{Engine, Store};
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use super::host::Host;
use crate::statistics::{self, Statistics};
use crate::{engine, link, plan};

/// A brane could not be made ready.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {step}: {source:#}")]
pub struct Error {
    name: String,
    step: &'static str,
    source: wasmtime::Error,
}

/// A brane, ready to serve.
pub struct Brane {
    /// What the plan says of it.
    pub plan: plan::Brane,
    /// Its engine: none else's.
    pub engine: Engine,
    pre: ProxyPre<Host>,
    /// One permit for each slot of the pool, so that the pool is never asked for more than it has.
    pub slots: Semaphore,
    index: usize,
    statistics: Arc<Statistics>,
    made: Cell<u64>,
    running: RefCell<BTreeMap<u64, Instant>>,
}

impl Brane {
    /// Maps the artefact, makes engine and pool, links, and makes one instance to see that all of it works.
    ///
    /// # Errors
    /// With the step that failed.
    pub async fn ready(
        plan: &plan::Brane,
        index: usize,
        workers: u32,
        artefact: &OwnedFd,
        statistics: Arc<Statistics>,
    ) -> Result<Self, Error> {
        let at = |step| move |source| Error { name: plan.name.clone(), step, source };
        let slots = plan.slots(workers);
        let engine = engine::for_worker(&plan.needs, plan.mem_max, slots).map_err(at("engine and pool"))?;
        let path = format!("/proc/self/fd/{}", artefact.as_raw_fd());
        // SAFETY: the artefact was made by this build's compiler, came through control and init alone, and is sealed:
        // nobody can have changed it since (checked by the caller).
        let component = unsafe { Component::deserialize_file(&engine, path) }.map_err(at("map the artefact"))?;
        let linker = link::base(&engine).map_err(at("linker"))?;
        let pre = linker.instantiate_pre(&component).and_then(ProxyPre::new).map_err(at("link"))?;
        let brane = Self {
            plan: plan.clone(),
            engine,
            pre,
            slots: Semaphore::new(slots as usize),
            index,
            statistics,
            made: Cell::new(0),
            running: RefCell::default(),
        };
        let mut store = brane.store();
        brane.pre.instantiate_async(&mut store).await.map_err(at("first instance"))?;
        Ok(brane)
    }

    /// A store for one fresh instance.
    #[must_use]
    pub fn store(&self) -> Store<Host> {
        let mut store = Store::new(&self.engine, Host::new(self.plan.mem_max, &self.statistics));
        store.limiter(|host| &mut host.memory);
        // At each tick the guest lets others run; deadlines are the business of whoever waits for it.
        store.epoch_deadline_async_yield_and_update(1);
        store
    }

    /// Its linked component.
    #[must_use]
    pub fn pre(&self) -> &ProxyPre<Host> {
        &self.pre
    }

    /// Its counters.
    #[must_use]
    pub fn count(&self) -> &statistics::Brane {
        &self.statistics.branes[self.index]
    }

    /// The next instance's serial number. Workers count in steps of their number from different starts, so that no
    /// two instances of a deploy share one.
    pub fn begin(&self, worker: u32, workers: u32) -> u64 {
        let serial = self.made.get() * u64::from(workers) + u64::from(worker) + 1;
        self.made.set(self.made.get() + 1);
        self.running.borrow_mut().insert(serial, Instant::now());
        serial
    }

    /// The instance is gone.
    pub fn end(&self, serial: u64) {
        self.running.borrow_mut().remove(&serial);
    }

    /// Instances that run now, with the milliseconds they have been running.
    #[must_use]
    pub fn running(&self) -> Vec<(u64, u64)> {
        let millis = |since: &Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.running.borrow().iter().map(|(serial, since)| (*serial, millis(since))).collect()
    }
}
