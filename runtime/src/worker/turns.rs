//! Whose turn it is: in which order guests run on this core, for how long at a time, and what part of it a replica may have.
//!
//! A guest that has run to the end of a tick goes to the back of a queue. From there one guest comes at a time, and only
//! when the event loop has turned once and found nothing else to do, or nothing but that for a tick. So a request is
//! served within a tick of its arrival however many guests spin, and they still have their turns when requests never cease.
//!
//! `cpu_quota` is kept by a sliding window for each replica: what it has had of the core in each of the last slots of a
//! millisecond. A guest whose window has no room for a turn is not polled until enough has left it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::Poll;
use std::time::{Duration, Instant};

use rustix::time::ClockId;
use tokio::sync::Semaphore;

use super::memory::Share;

/// How often a running guest lets others run. Shorter costs more switches, longer more latency for its neighbours.
pub const TICK: Duration = Duration::from_millis(5);
/// What a tick may be late without being a reason to think of: a sleeping thread is woken some tens of microseconds late.
const LATE: u64 = 250_000;
/// The longest turn that is reckoned with, in nanoseconds.
const TURN: u64 = 5_000_000;
/// What a quota is a part of, in nanoseconds.
const PERIOD: u64 = 100_000_000;
/// What is told apart within it, in nanoseconds.
const SLOT: u64 = 1_000_000;
/// Slots that any period can touch.
const SLOTS: usize = 101;
/// Free replicas that are looked at for the one with most left. All, in most branes.
const LOOKED_AT: usize = 8;

const _: () = assert!(TICK.as_nanos() == TURN as u128 && SLOTS as u64 == PERIOD / SLOT + 1);

/// What a replica has had of the core in the last period. All in nanoseconds; times since any fixed moment.
///
/// Nothing is charged to a slot before the one it was had in. Whoever is admitted had `used + turn <= most` over all
/// slots that a period ending then can touch; so no period has more than `most`, as long as turns are not longer than they
/// were said to be. What one is longer is owed, and paid before the next.
#[derive(Debug, Clone)]
struct Window {
    most: u64,
    used: u64,
    owed: u64,
    /// The number of the newest slot.
    newest: u64,
    slots: [u32; SLOTS],
}

impl Window {
    fn new(most: u64) -> Self {
        Self { most, used: 0, owed: 0, newest: 0, slots: [0; SLOTS] }
    }

    fn slot(&mut self, number: u64) -> &mut u32 {
        &mut self.slots[usize::try_from(number % SLOTS as u64).unwrap_or(0)]
    }

    /// Lets time pass, and pays what is owed as far as there is room.
    fn pass(&mut self, now: u64) {
        let now = (now / SLOT).max(self.newest);
        for number in (self.newest + 1..=now).take(SLOTS) {
            self.used -= u64::from(std::mem::take(self.slot(number)));
        }
        self.newest = now;
        self.owed -= self.put(now, self.owed);
    }

    /// Puts into a slot what there is room for in the period; how much that is.
    fn put(&mut self, number: u64, nanos: u64) -> u64 {
        let put = nanos.min(self.most - self.used);
        // At most a period's nanoseconds.
        *self.slot(number) += u32::try_from(put).unwrap_or(u32::MAX);
        self.used += put;
        put
    }

    /// Charges a turn that has just ended: to the slots in which it was, or if it stood still meanwhile, to later ones.
    fn charge(&mut self, now: u64, nanos: u64) {
        self.pass(now);
        let (mut left, mut room) = (nanos, now.saturating_sub(self.newest * SLOT));
        for number in (self.newest.saturating_sub(SLOTS as u64 - 1)..=self.newest).rev() {
            left -= self.put(number, left.min(room));
            room = SLOT;
        }
        self.owed += left;
    }

    /// Whether there is room for a turn of so much; else when there may be.
    fn admits(&mut self, now: u64, turn: u64) -> Result<(), u64> {
        self.pass(now);
        // Below a tick in each period, one turn is more than there is: then it is due when nothing else is left, and
        // what it is longer is owed.
        let asked = self.used + self.owed + turn.min(self.most);
        if asked <= self.most {
            return Ok(());
        }
        let mut left = asked - self.most;
        let oldest = self.newest.saturating_sub(SLOTS as u64 - 1);
        for number in oldest..self.newest {
            left = left.saturating_sub(u64::from(*self.slot(number)));
            if left == 0 {
                return Err((number + SLOTS as u64) * SLOT);
            }
        }
        Err((self.newest + SLOTS as u64) * SLOT)
    }
}

/// The replicas of one brane in one worker, each with its window. Instances come and go; who makes one takes a replica.
#[derive(Debug)]
pub struct Replicas {
    windows: RefCell<Vec<Window>>,
    /// In the order in which they became free.
    free: RefCell<VecDeque<usize>>,
}

impl Replicas {
    /// So many, each of which may have this part of a core over any 100 ms; none if that is a whole core.
    #[must_use]
    pub fn new(number: u32, quota: f64) -> Option<Rc<Self>> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let most = (quota * PERIOD as f64) as u64;
        let number = number as usize;
        (most < PERIOD).then(|| {
            Rc::new(Self {
                windows: RefCell::new(vec![Window::new(most.max(1)); number]),
                free: RefCell::new((0..number).collect()),
            })
        })
    }

    /// The free one that has most left, as far as they are looked at; the one that has been free for longest comes first.
    /// `None` if all are taken: there must be a bound to how many are asked for.
    #[must_use]
    pub fn take(self: &Rc<Self>, turns: &Turns) -> Option<Replica> {
        let (now, mut free, mut windows) = (turns.now(), self.free.borrow_mut(), self.windows.borrow_mut());
        let had = |(_, number): &(usize, usize)| {
            let window = &mut windows[*number];
            window.pass(now);
            window.used + window.owed
        };
        let (at, _) = free.iter().copied().enumerate().take(LOOKED_AT).min_by_key(had)?;
        let number = free.remove(at)?;
        Some(Replica { of: Rc::clone(self), number })
    }
}

/// A replica that is taken; free again when dropped.
#[derive(Debug)]
pub struct Replica {
    of: Rc<Replicas>,
    number: usize,
}

impl Replica {
    /// What it has had of the core, until now.
    pub fn charge(&self, turns: &Turns, had: Duration) {
        self.of.windows.borrow_mut()[self.number].charge(turns.now(), nanos(had));
    }

    /// Whether it may have a turn; else when.
    fn admits(&self, turns: &Turns) -> Result<(), Instant> {
        let (now, turn) = turns.now_and_turn();
        let admitted = self.of.windows.borrow_mut()[self.number].admits(now, turn);
        admitted.map_err(|at| turns.since + Duration::from_nanos(at))
    }

    /// Waits until it may have a turn.
    async fn admitted(&self, turns: &Turns, throttled: &AtomicU64) {
        let Err(mut at) = self.admits(turns) else { return };
        let _counted = Throttled { since: Instant::now(), throttled };
        while Instant::now() < at {
            tokio::time::sleep_until(at.into()).await;
            match self.admits(turns) {
                Ok(()) => return,
                Err(later) => at = later,
            }
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.of.free.borrow_mut().push_back(self.number);
    }
}

/// Counts how long someone waits for his window, also if he is gone before he has waited.
struct Throttled<'a> {
    since: Instant,
    throttled: &'a AtomicU64,
}

impl Drop for Throttled<'_> {
    fn drop(&mut self) {
        self.throttled.fetch_add(nanos(self.since.elapsed()), Relaxed);
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// Ticks, as guests see them. One for all: one is polled at a time.
#[derive(Debug, Default)]
pub struct Ticks {
    now: AtomicU64,
    seen: AtomicU64,
}

impl Ticks {
    /// Ticks until now.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now.load(Relaxed)
    }

    /// A turn begins: no tick before it is its own.
    pub fn turn_begins(&self) {
        self.seen.store(self.now(), Relaxed);
    }

    /// The ticks of this turn that were not taken before.
    #[must_use]
    pub fn take(&self) -> u64 {
        let now = self.now();
        now.saturating_sub(self.seen.swap(now, Relaxed))
    }
}

/// The order of turns in one worker.
#[derive(Debug)]
pub struct Turns {
    since: Instant,
    /// Set by the guest that is polled when it stops because a tick is over. One for all: one is polled at a time.
    pub yielded: Arc<AtomicBool>,
    /// When the last tick was, in nanoseconds; set by the thread that ticks.
    pub ticked: Arc<AtomicU64>,
    /// Ticks until now, and how many of them the guest that is polled has seen: those of its turn tell where it is.
    pub ticks: Arc<Ticks>,
    /// Held by the next in the queue.
    next: Semaphore,
    /// Grows with everything that is done for a request or a connection and is no turn of this queue.
    done: Cell<u64>,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            yielded: Arc::default(),
            ticked: Arc::default(),
            ticks: Arc::default(),
            next: Semaphore::new(1),
            done: Cell::default(),
        }
    }
}

impl Turns {
    /// Nanoseconds since this was made.
    fn now(&self) -> u64 {
        nanos(self.since.elapsed())
    }

    /// Now, and how long a turn that begins now would be.
    fn now_and_turn(&self) -> (u64, u64) {
        let now = self.now();
        match (self.ticked.load(Relaxed) + TURN + LATE).checked_sub(now) {
            Some(turn) => (now, turn.min(TURN)),
            // The tick is due at any moment, or not for a while.
            None => (now, TURN),
        }
    }

    /// The clock of ticks, for the thread that ticks.
    pub fn ticker(&self) -> impl Fn() + Send + 'static {
        let (since, ticked, ticks) = (self.since, Arc::clone(&self.ticked), Arc::clone(&self.ticks));
        move || {
            ticked.store(nanos(since.elapsed()), Relaxed);
            // Before the epochs, so that whoever is stopped by a tick finds it counted.
            ticks.now.fetch_add(1, Relaxed);
        }
    }

    /// Something was done that guests at the end of their tick come behind.
    pub fn something_was_done(&self) {
        self.done.set(self.done.get().wrapping_add(1));
    }

    /// Does work that guests at the end of their tick come behind.
    pub async fn before_others<F: Future>(&self, mut work: Pin<&mut F>) -> F::Output {
        std::future::poll_fn(|cx| {
            self.something_was_done();
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Waits in the queue.
    async fn next(&self) {
        // Never closed.
        let Ok(_next) = self.next.acquire().await else { return };
        let since = Instant::now();
        loop {
            let before = self.done.get();
            // By tokio's own yield, which waits until the event loop has turned.
            tokio::task::yield_now().await;
            if self.done.get() == before || since.elapsed() >= TICK {
                return;
            }
        }
    }

    /// Does a guest's work turn by turn, on its terms.
    ///
    /// Reading the processor time is a system call. Without a quota the first turn, which is the only one of most requests, is
    /// timed by the clock that the kernel maps into every process: as long as the core is this worker's alone that is
    /// the same, and where it is not, what others had of it meanwhile is counted too.
    pub async fn run<F: Future>(&self, work: F, terms: Terms<'_>) -> F::Output {
        let Terms { cpu, replica, throttled, memory } = terms;
        let mut work = std::pin::pin!(work);
        let mut clock: fn() -> Duration = match (cpu, replica) {
            (None, None) => || Duration::ZERO,
            (Some(_), None) => monotonic,
            (_, Some(_)) => thread_cpu,
        };
        loop {
            if let Some(replica) = replica {
                replica.admitted(self, throttled).await;
            }
            let turn = std::future::poll_fn(|cx| {
                // It was woken because what it waited for is there.
                if replica.is_some_and(|replica| replica.admits(self).is_err()) {
                    return Poll::Ready(Turn::Refused);
                }
                if let Some(share) = memory.filter(|share| !share.may_go_on()) {
                    return Poll::Ready(Turn::Short(share));
                }
                self.yielded.store(false, Relaxed);
                self.ticks.turn_begins();
                let before = clock();
                let polled = work.as_mut().poll(cx);
                let had = clock().saturating_sub(before);
                if let Some(cpu) = cpu {
                    cpu.set(cpu.get() + had);
                }
                if let Some(replica) = replica {
                    replica.charge(self, had);
                }
                match polled {
                    Poll::Ready(output) => Poll::Ready(Turn::Last(output)),
                    Poll::Pending if self.yielded.load(Relaxed) => Poll::Ready(Turn::Over),
                    Poll::Pending => Poll::Pending,
                }
            });
            match turn.await {
                Turn::Last(output) => return output,
                // Not before it may have a turn: whoever is next in the queue keeps the others waiting.
                Turn::Over => {
                    if cpu.is_some() {
                        clock = thread_cpu;
                    }
                    if let Some(replica) = replica {
                        replica.admitted(self, throttled).await;
                    }
                    self.next().await;
                }
                Turn::Refused => {}
                Turn::Short(share) => share.room().await,
            }
        }
    }
}

/// What a guest's work is bound to, and where what it takes is counted.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// Where its processor time is added up, if somebody wants to know.
    pub cpu: Option<&'a Cell<Duration>>,
    /// The part of the core that it may have, if that is not all of it.
    pub replica: Option<&'a Replica>,
    /// Where the nanoseconds are added up that it waits for that part.
    pub throttled: &'a AtomicU64,
    /// The memory that it touches, if it is to wait while there is too little.
    pub memory: Option<Share<'a>>,
}

/// How a turn ended.
enum Turn<'a, T> {
    /// The work is done.
    Last(T),
    /// The tick was over.
    Over,
    /// It did not begin: the replica has had its part.
    Refused,
    /// It did not begin: there is too little memory.
    Short(Share<'a>),
}

/// The processor time that this thread has had.
#[must_use]
pub fn thread_cpu() -> Duration {
    read(ClockId::ThreadCPUTime)
}

fn monotonic() -> Duration {
    read(ClockId::Monotonic)
}

fn read(clock: ClockId) -> Duration {
    let now = rustix::time::clock_gettime(clock);
    Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What was had in the period that begins at `from`.
    fn had(turns: &[(u64, u64)], from: u64) -> u64 {
        let overlap = |(begin, end): &(u64, u64)| (*end).min(from + PERIOD).saturating_sub((*begin).max(from));
        turns.iter().map(overlap).sum()
    }

    /// The most that was had in any period. It begins or ends where a turn does.
    fn most_had(turns: &[(u64, u64)]) -> u64 {
        let edges = turns.iter().flat_map(|(begin, end)| [*begin, end.saturating_sub(PERIOD)]);
        edges.map(|from| had(turns, from)).max().unwrap_or(0)
    }

    /// Has turns of these lengths, each `idle` after the last or as soon as it is admitted.
    fn spent(window: &mut Window, wanted: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut now = 0;
        let mut turns = Vec::new();
        for (idle, length) in wanted {
            now += idle;
            while let Err(at) = window.admits(now, TURN) {
                assert!(at > now, "a wait that does not end");
                now = at;
            }
            turns.push((now, now + length));
            now += length;
            window.charge(now, *length);
        }
        turns
    }

    proptest! {
        /// The promise itself: any period, any sequence of turns that are no longer than a tick.
        #[test]
        fn no_period_has_more_than_the_quota(
            most in TURN..PERIOD,
            wanted in proptest::collection::vec((prop_oneof![Just(0_u64), 0..PERIOD / 2], 1..=TURN), 1..200),
        ) {
            let turns = spent(&mut Window::new(most), &wanted);
            prop_assert!(most_had(&turns) <= most, "{} of {most}", most_had(&turns));
        }

        #[test]
        fn turns_longer_than_there_is_room_for_are_paid_for(
            most in 1..PERIOD,
            wanted in proptest::collection::vec((Just(0_u64), 1..=4 * TURN), 1..100),
        ) {
            let turns = spent(&mut Window::new(most), &wanted);
            let (begin, end) = (turns[turns.len() - 1].0, turns.iter().map(|(begin, end)| end - begin));
            let before_the_last: u64 = end.rev().skip(1).sum();
            prop_assert!(before_the_last <= (begin / PERIOD + 1) * most, "{before_the_last} of {most} each, until {begin}");
        }

        #[test]
        fn who_always_wants_gets_what_there_is(most in 4 * TURN..PERIOD, length in SLOT..=TURN) {
            let turns = spent(&mut Window::new(most), &vec![(0, length); 1000]);
            let (sum, end) = (1000 * length, turns[999].1);
            // All but a turn in each period, and slots that are counted twice.
            prop_assert!(sum >= (most - TURN) * (end / (PERIOD + 2 * SLOT)), "{sum} of {most} each, until {end}");
        }
    }

    #[test]
    fn of_the_free_replicas_the_one_with_most_left_is_taken() {
        let turns = Turns::default();
        let replicas = Replicas::new(3, 0.5).unwrap();
        let had = [20, 30, 10].map(|ms| {
            let replica = replicas.take(&turns).unwrap();
            replica.charge(&turns, Duration::from_millis(ms));
            replica
        });
        assert!(replicas.take(&turns).is_none(), "all are taken");
        drop(had);
        let order: Vec<_> = std::iter::repeat_with(|| replicas.take(&turns)).map_while(|r| r).collect();
        assert_eq!(order.iter().map(|r| r.number).collect::<Vec<_>>(), [2, 0, 1]);
        assert!(Replicas::new(3, 1.0).is_none(), "a whole core is no bound");
    }

    /// A guest that never has enough: each poll is a tick.
    async fn spin(turns: &Turns, slices: &Cell<u32>) {
        let work = std::future::poll_fn(|_| {
            slices.set(slices.get() + 1);
            turns.yielded.store(true, Relaxed);
            Poll::<()>::Pending
        });
        let terms = Terms { cpu: None, replica: None, throttled: &AtomicU64::new(0), memory: None };
        turns.run(work, terms).await;
    }

    #[tokio::test]
    async fn spinning_guests_take_turns_and_come_behind_all_else() {
        let local = tokio::task::LocalSet::new();
        let turns = Rc::new(Turns::default());
        let slices: Rc<[Cell<u32>; 8]> = Rc::default();
        local
            .run_until(async {
                for guest in 0..8 {
                    let (turns, slices) = (Rc::clone(&turns), Rc::clone(&slices));
                    tokio::task::spawn_local(async move { spin(&turns, &slices[guest]).await });
                }
                let sum = || slices.iter().map(Cell::get).sum::<u32>();
                while sum() < 80 {
                    tokio::task::yield_now().await;
                }
                let each = slices.iter().map(Cell::get);
                assert!(each.clone().max() <= each.min().map(|least| least + 1), "{slices:?}");
                // Something that needs many turns of the loop, far less than a tick.
                let before = sum();
                for _ in 0..20 {
                    turns.something_was_done();
                    tokio::task::yield_now().await;
                }
                assert!(sum() <= before + 1, "{} slices meanwhile", sum() - before);
            })
            .await;
    }
}
