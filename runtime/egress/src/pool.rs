//! Connections of one brane that are kept for its next request.
//!
//! One list for HTTP/1.1, whose connections are in it only while they are idle, and one for HTTP/2, whose are shared
//! and stay in it. Both are short, so they are searched from the end: what was used last is warmest.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use crate::body::{Fate, Outgoing};
use crate::client::Brane;
use crate::site::Origin;

/// Requests at a time on one connection of HTTP/2, so that unread answers, each holding its whole window, never close
/// the connection's window for the others; see [`crate::client`].
pub(crate) const STREAMS: usize = 8;

/// How long a connection is used for new requests: its name may stand for another address by then.
const AGE: Duration = Duration::from_mins(10);

/// One of the connections that the whole worker may keep.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one(all: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let more = |n: usize| (n < most).then_some(n + 1);
        all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(Arc::clone(all)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps a connection's tasks running; when the last of its clones is dropped, they end, whatever they wait for. hyper
/// by itself would first see a request to its end whose server takes no more of it.
#[derive(Clone)]
pub(crate) struct Life(#[expect(dead_code, reason = "held")] Arc<watch::Sender<()>>);

/// Runs a connection's tasks as long as it is to live. Its place among the others is free when they have ended.
#[derive(Clone)]
pub(crate) struct Tasks {
    end: watch::Receiver<()>,
    permit: Arc<Permit>,
}

/// Holds a connection's place among those of its brane and its worker.
pub(crate) struct Permit {
    pub(crate) _brane: OwnedSemaphorePermit,
    pub(crate) _worker: OwnedSemaphorePermit,
}

impl Tasks {
    pub(crate) fn new(permit: Permit) -> (Life, Self) {
        let (life, end) = watch::channel(());
        (Life(Arc::new(life)), Self { end, permit: Arc::new(permit) })
    }
}

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, task: F) {
        let Self { mut end, permit } = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                // Whoever waits on the connection is told its error too.
                _ = task => {}
                _ = end.changed() => {}
            }
            drop(permit);
        });
    }
}

/// A connection of HTTP/1.1 that nobody else uses.
pub(crate) struct Single {
    pub(crate) sender: http1::SendRequest<Outgoing>,
    pub(crate) opened: Instant,
    pub(crate) _life: Life,
}

struct Idle {
    origin: Origin,
    single: Single,
    since: Instant,
    _counted: Counted,
}

struct Shared {
    id: u64,
    origin: Origin,
    sender: http2::SendRequest<Outgoing>,
    life: Life,
    streams: Arc<Semaphore>,
    opened: Instant,
    since: Instant,
    _counted: Counted,
}

impl Shared {
    fn is_idle(&self) -> bool {
        self.streams.available_permits() == STREAMS
    }
}

/// A connection to send one request on.
pub(crate) enum Sender {
    Http1(Single),
    Http2(Stream),
}

/// A place on a connection of HTTP/2.
pub(crate) struct Stream {
    pub(crate) id: u64,
    pub(crate) sender: http2::SendRequest<Outgoing>,
    pub(crate) _life: Life,
    pub(crate) _place: OwnedSemaphorePermit,
}

/// How many connections are kept, and for how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keep {
    pub(crate) brane: usize,
    pub(crate) worker: usize,
    pub(crate) within: Duration,
}

/// The connections of one brane that are kept.
pub(crate) struct Pool {
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    next: u64,
    keep: Keep,
    all: Arc<AtomicUsize>,
    /// Whether somebody will come to throw out what is old.
    pub(crate) swept: bool,
}

impl Pool {
    pub(crate) fn new(keep: Keep, all: Arc<AtomicUsize>) -> Self {
        Self { idle: Vec::new(), shared: Vec::new(), next: 0, keep, all, swept: false }
    }

    /// One for this origin that is not known to be closed, nor older than it may be.
    pub(crate) fn take(&mut self, origin: &Origin) -> Option<Sender> {
        self.sweep(Instant::now());
        for shared in self.shared.iter().rev().filter(|s| s.origin == *origin) {
            if let Ok(place) = Arc::clone(&shared.streams).try_acquire_owned() {
                let (sender, life) = (shared.sender.clone(), shared.life.clone());
                return Some(Sender::Http2(Stream { id: shared.id, sender, _life: life, _place: place }));
            }
        }
        let index = self.idle.iter().rposition(|idle| idle.origin == *origin)?;
        Some(Sender::Http1(self.idle.remove(index).single))
    }

    /// Keeps an idle one, in place of the longest idle if there is no room; or lets it close.
    fn keep(&mut self, origin: Origin, single: Single) {
        if single.sender.is_closed() {
            return;
        }
        if let Some(counted) = self.room() {
            self.idle.push(Idle { origin, single, since: Instant::now(), _counted: counted });
        }
    }

    /// Shares a connection from now on, if there is room, and takes the first place on it.
    pub(crate) fn share(
        &mut self,
        origin: &Origin,
        sender: http2::SendRequest<Outgoing>,
        life: Life,
    ) -> Option<Stream> {
        let streams = Arc::new(Semaphore::new(STREAMS));
        let place = Arc::clone(&streams).try_acquire_owned().ok()?;
        let id = self.next;
        self.next += 1;
        // Two requests can have dialled at the same time: one connection is enough, the other ends with its request.
        let known = self.shared.iter().any(|s| s.origin == *origin && s.streams.available_permits() > 0);
        if !known && let Some(counted) = self.room() {
            let (origin, sender, life) = (origin.clone(), sender.clone(), life.clone());
            let now = Instant::now();
            self.shared.push(Shared { id, origin, sender, life, streams, opened: now, since: now, _counted: counted });
        }
        Some(Stream { id, sender, _life: life, _place: place })
    }

    /// A request on a shared connection is over.
    fn used(&mut self, id: u64) {
        if let Some(shared) = self.shared.iter_mut().find(|s| s.id == id) {
            shared.since = Instant::now();
        }
    }

    /// No more requests on a shared connection; those on it go on.
    pub(crate) fn forget(&mut self, id: u64) {
        self.shared.retain(|s| s.id != id);
    }

    /// Room for one more, after the longest idle has gone if need be.
    fn room(&mut self) -> Option<Counted> {
        if self.keep.brane == 0 || (self.len() >= self.keep.brane && !self.evict()) {
            return None;
        }
        Counted::one(&self.all, self.keep.worker)
    }

    pub(crate) fn len(&self) -> usize {
        self.idle.len() + self.shared.len()
    }

    /// Closes the one that has been idle for longest; whether there was one.
    pub(crate) fn evict(&mut self) -> bool {
        let idle = self.idle.iter().enumerate().map(|(i, c)| (c.since, true, i));
        let shared = self.shared.iter().enumerate().filter(|(_, c)| c.is_idle()).map(|(i, c)| (c.since, false, i));
        match idle.chain(shared).min() {
            Some((_, true, index)) => drop(self.idle.remove(index)),
            Some((_, false, index)) => drop(self.shared.remove(index)),
            None => return false,
        }
        true
    }

    /// Throws out what is closed or has been idle for too long. When the next one will have been, if there is one.
    pub(crate) fn sweep(&mut self, now: Instant) -> Option<Instant> {
        let within = self.keep.within;
        let old = |since: Instant| now.saturating_duration_since(since) >= within;
        let aged = |opened: Instant| now.saturating_duration_since(opened) >= AGE;
        self.idle.retain(|c| !c.single.sender.is_closed() && !old(c.since) && !aged(c.single.opened));
        // What is in use goes on without being listed here.
        self.shared.retain(|c| {
            let done = c.is_idle() && old(c.since);
            !(c.sender.is_closed() || done || aged(c.opened))
        });
        // One that is in use is looked at again when it could be old at the earliest.
        let due = |since: Instant, idle: bool| if idle { since + within } else { now + within };
        let idle = self.idle.iter().map(|c| due(c.since, true));
        idle.chain(self.shared.iter().map(|c| due(c.since, c.is_idle()))).min()
    }
}

/// A connection in use for one exchange, until the answer's body is over.
pub(crate) enum Lease {
    Http1 {
        brane: Weak<Brane>,
        origin: Origin,
        single: Single,
        /// Of the request's body.
        fate: Fate,
    },
    Http2 {
        brane: Weak<Brane>,
        stream: Stream,
        fate: Fate,
    },
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http1 { .. } => "Lease::Http1",
            Self::Http2 { .. } => "Lease::Http2",
        })
    }
}

impl Lease {
    /// After the answer's end. A request can still be on its way then: its connection is free after that.
    pub(crate) fn give_back(self) {
        match self {
            Self::Http1 { brane, origin, single, fate } if fate.is_over() => keep(&brane, origin, single),
            Self::Http1 { brane, origin, mut single, .. } => {
                tokio::spawn(async move {
                    if single.sender.ready().await.is_ok() {
                        keep(&brane, origin, single);
                    }
                });
            }
            Self::Http2 { brane, stream, fate } if fate.is_over() => used(&brane, stream),
            Self::Http2 { brane, stream, fate } => {
                tokio::spawn(async move {
                    let Some(stall) = brane.upgrade().map(|brane| brane.bounds.stall) else { return };
                    if fate.comes_to_an_end(stall).await {
                        used(&brane, stream);
                    } else {
                        Self::Http2 { brane, stream, fate }.give_up();
                    }
                });
            }
        }
    }

    /// Before the answer's end, by whom it was for. One of HTTP/1.1 is of no more use; a stream is reset by hyper, unless
    /// its request is still on its way, which only the connection's end stops.
    pub(crate) fn abandon(self) {
        match self {
            Self::Http2 { brane, stream, fate } if fate.is_over() => used(&brane, stream),
            other => other.give_up(),
        }
    }

    /// After a failure: nobody else is to be sent there.
    pub(crate) fn give_up(self) {
        if let Self::Http2 { brane, stream, .. } = self
            && let Some(brane) = brane.upgrade()
        {
            brane.pool().forget(stream.id);
        }
    }
}

fn used(brane: &Weak<Brane>, stream: Stream) {
    let id = stream.id;
    drop(stream);
    if let Some(brane) = brane.upgrade() {
        brane.pool().used(id);
    }
}

fn keep(brane: &Weak<Brane>, origin: Origin, single: Single) {
    if let Some(brane) = brane.upgrade() {
        brane.pool().keep(origin, single);
        brane.sweep_later();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_util::rt::TokioIo;
    use proptest::prelude::*;

    /// An idle connection whose other end stays open for as long as the test lasts.
    async fn single() -> Single {
        let (near, far) = tokio::io::duplex(64);
        let (sender, connection) = http1::handshake(TokioIo::new(near)).await.unwrap();
        let place = || Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let (life, tasks) = Tasks::new(Permit { _brane: place(), _worker: place() });
        hyper::rt::Executor::execute(&tasks, async move {
            let _far = far;
            connection.await
        });
        Single { sender, opened: Instant::now(), _life: life }
    }

    fn origin(n: u8) -> Origin {
        Origin::parse(gaia_manifest::Scheme::Http, &format!("n{n}.example")).unwrap()
    }

    fn pool(brane: usize, worker: usize, within: Duration, all: &Arc<AtomicUsize>) -> Pool {
        Pool::new(Keep { brane, worker, within }, Arc::clone(all))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_not_used_for_ever() {
        let mut pool = pool(4, 4, Duration::from_mins(2), &Arc::default());
        pool.keep(origin(1), single().await);
        let mut used = 0;
        while let Some(Sender::Http1(single)) = pool.take(&origin(1)) {
            used += 1;
            tokio::time::advance(Duration::from_mins(1)).await;
            pool.keep(origin(1), single);
        }
        assert_eq!(used, 10, "minutes");
        assert_eq!(pool.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_used_last_is_used_first_and_what_is_longest_idle_goes_first() {
        let mut pool = pool(3, 9, Duration::from_secs(10), &Arc::default());
        for n in [1, 2, 1] {
            pool.keep(origin(n), single().await);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(pool.evict());
        assert_eq!(pool.sweep(Instant::now()), Some(Instant::now() + Duration::from_secs(8)), "the second is due next");
        pool.keep(origin(3), single().await);
        pool.keep(origin(4), single().await);
        assert!(pool.take(&origin(2)).is_none(), "made way");
        assert!(pool.take(&origin(1)).is_some());
        assert!(pool.take(&origin(1)).is_none());
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(pool.take(&origin(3)).is_none(), "too old");
        assert_eq!(pool.len(), 0);
        assert!(!pool.evict());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Keep(bool, u8),
        Take(bool, u8),
        Evict(bool),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (any::<bool>(), 0_u8..4).prop_map(|(which, n)| Step::Keep(which, n)),
            2 => (any::<bool>(), 0_u8..4).prop_map(|(which, n)| Step::Take(which, n)),
            1 => any::<bool>().prop_map(Step::Evict),
            1 => (0_u64..8).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #[test]
        fn two_branes_never_keep_more_than_they_may(steps in proptest::collection::vec(step(), 0..60)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let check = async {
                let all = Arc::new(AtomicUsize::new(0));
                let within = Duration::from_secs(10);
                let mut pools = [pool(3, 4, within, &all), pool(2, 4, within, &all)];
                // Each brane's, oldest first, with the second in which it was kept.
                let mut model: [Vec<(u8, u64)>; 2] = Default::default();
                let mut now = 0;
                for step in steps {
                    match step {
                        Step::Keep(which, n) => {
                            let (i, bound) = if which { (1, 2) } else { (0, 3) };
                            pools[i].keep(origin(n), single().await);
                            if model[i].len() == bound {
                                model[i].remove(0);
                            }
                            if model[0].len() + model[1].len() < 4 {
                                model[i].push((n, now));
                            }
                        }
                        Step::Take(which, n) => {
                            let i = usize::from(which);
                            model[i].retain(|(_, since)| now - since < 10);
                            let at = model[i].iter().rposition(|(m, _)| *m == n);
                            prop_assert_eq!(pools[i].take(&origin(n)).is_some(), at.is_some());
                            at.map(|at| model[i].remove(at));
                        }
                        Step::Evict(which) => {
                            let i = usize::from(which);
                            prop_assert_eq!(pools[i].evict(), !model[i].is_empty());
                            if !model[i].is_empty() {
                                model[i].remove(0);
                            }
                        }
                        Step::Wait(seconds) => {
                            tokio::time::advance(Duration::from_secs(seconds)).await;
                            now += seconds;
                        }
                    }
                    for (pool, model) in pools.iter().zip(&model) {
                        prop_assert_eq!(pool.len(), model.len());
                    }
                    prop_assert_eq!(all.load(Ordering::Relaxed), model[0].len() + model[1].len());
                }
                drop(pools);
                prop_assert_eq!(all.load(Ordering::Relaxed), 0);
                Ok(())
            };
            runtime.block_on(check)?;
        }
    }
}
