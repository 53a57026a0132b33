//! The host's memory: how much of it guests have touched, and what is done before it is used up.
//!
//! ```text
//!  0                                          near        over    limit
//!  │ instances get what their mem_max allows   │ no more    │ the   │
//!  │                                           │ growth, no │ largest is ended
//!  │                                           │ ready instances
//! ```
//!
//! What counts is what is touched, not what is declared: on the appliance the count of the workers' cgroup, elsewhere
//! this process's own resident size. The thread that ticks reads it at each tick, by position from a file that was open
//! before the worker was sealed: that takes a microsecond, and nothing on the path of a request. In huge pages a guest
//! touches in a tick what it was granted long before, and the next guest in the next: whoever may have huge pages has its turns only
//! after a reading of its own, and none while there is too little.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};

use anyhow::Context as _;
use gaia_tmpfs::Budget;
use tokio::sync::Notify;

use super::pages::HUGE;
use super::turns::TICK;

/// What one worker's guests can touch before the largest is ended, in bytes: for three ticks (one until it is read, one until
/// the running guest stops, one until the memory is back) at 2 GiB/s, which is what a core touches in pages of 4 KiB.
/// `make bench` has the figures; half as much again for what the host itself takes meanwhile.
const OUTRUN: u64 = 48 << 20;
/// What an instance may always grow to, in bytes, if its `mem_max` allows it: without that, small guests would fail because
/// large ones have taken all.
pub const ALWAYS: usize = 1 << 20;

/// What the slots of each of a worker's branes may keep between requests, in bytes, where so many processes share `limit`: all
/// of them together a sixteenth, less than is left free above the first mark, so that it is never the reason for an end.
#[must_use]
pub fn kept_of_each(limit: u64, processes: u32, branes: usize) -> u64 {
    limit / 16 / u64::from(processes.max(1)) / branes.max(1) as u64
}

/// Where something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marks {
    /// Growth is refused from here on, and instances that are ready for a request go.
    near: u64,
    /// The largest instances are ended from here on.
    over: u64,
}

impl Marks {
    /// Those below `limit`, which so many workers share.
    ///
    /// At least a sixteenth is left for what is not counted in pages of guests (tables, sockets, the kernel's own share),
    /// at most a quarter: where that is less than guests can outrun, the machine is too small to promise anything.
    fn of(limit: u64, workers: u32) -> Self {
        let left = (limit / 16).max(u64::from(workers.max(1)) * OUTRUN).min(limit / 4);
        Self { near: limit - left - left / 2, over: limit - left }
    }
}

/// Where the count is read.
#[derive(Debug)]
pub struct Meter {
    file: File,
    /// Which number in the file, and the bytes of one.
    field: usize,
    unit: u64,
    marks: Marks,
    /// How many workers read the same count, each of which may grant its part of what is left.
    workers: u64,
}

impl Meter {
    /// Of a cgroup's `memory.current`, whose `limit` so many workers share.
    #[must_use]
    pub fn of_group(current: OwnedFd, limit: u64, workers: u32) -> Self {
        Self {
            file: current.into(),
            field: 0,
            unit: 1,
            marks: Marks::of(limit, workers),
            workers: workers.max(1).into(),
        }
    }

    /// Of this process alone, which may have `limit` bytes.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn of_process(limit: u64) -> anyhow::Result<Self> {
        let path = "/proc/self/statm";
        let file = File::open(path).context(path)?;
        let unit = rustix::param::page_size() as u64;
        Ok(Self { file, field: 1, unit, marks: Marks::of(limit, 1), workers: 1 })
    }

    /// Bytes now.
    fn read(&self) -> io::Result<u64> {
        let mut text = [0; 128];
        let read = self.file.read_at(&mut text, 0)?;
        let number = std::str::from_utf8(&text[..read]).ok().and_then(|text| text.split_whitespace().nth(self.field));
        let number: u64 = number.and_then(|n| n.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(number.saturating_mul(self.unit))
    }
}

/// Readings for which a grant counts as used whether or not it has been touched. A guest that fills huge pages takes 16 GiB/s: what
/// it was granted just before a reading is there before the next one tells.
const GRANTS: usize = 3;

/// How much guests have touched, seen from the marks. Written by whoever reads the meter, read by all.
#[derive(Debug)]
pub struct Pressure {
    meter: OnceLock<Meter>,
    /// Bytes beyond the first mark; 0 while there is enough.
    beyond_near: AtomicU64,
    /// Bytes beyond the second.
    beyond_over: AtomicU64,
    /// This worker's part of the bytes that were left below the first mark at the last reading.
    left: AtomicU64,
    /// Bytes granted since that reading, and between those before it.
    granted: [AtomicU64; GRANTS],
    /// Which of them is the newest.
    newest: AtomicUsize,
    wake: Notify,
}

/// Without a meter there is no end.
impl Default for Pressure {
    fn default() -> Self {
        Self {
            meter: OnceLock::new(),
            beyond_near: AtomicU64::default(),
            beyond_over: AtomicU64::default(),
            left: AtomicU64::new(u64::MAX),
            granted: Default::default(),
            newest: AtomicUsize::default(),
            wake: Notify::default(),
        }
    }
}

impl Pressure {
    /// What is granted from now on is of what this meter says is left. Only the first counts.
    pub fn measure(&self, meter: Meter) {
        let _ = self.meter.set(meter);
        self.read();
    }

    /// A tick is over: what was granted some ticks ago is there, or it never will be.
    pub fn tick(&self) {
        let next = (self.newest.load(Relaxed) + 1) % GRANTS;
        self.granted[next].store(0, Relaxed);
        self.newest.store(next, Relaxed);
        self.read();
    }

    /// Reads the meter. What cannot be read changes nothing.
    fn read(&self) {
        let Some((meter, now)) = self.meter.get().and_then(|meter| Some((meter, meter.read().ok()?))) else { return };
        self.left.store(meter.marks.near.saturating_sub(now) / meter.workers, Relaxed);
        self.beyond_near.store(now.saturating_sub(meter.marks.near), Relaxed);
        self.beyond_over.store(now.saturating_sub(meter.marks.over), Relaxed);
        if !self.is_low() {
            self.wake.notify_one();
        }
    }

    /// Whether there is enough.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.beyond_near.load(Relaxed) == 0
    }

    /// Grants so many bytes, if there will still be enough when they and what was granted just before are touched.
    pub fn grant(&self, bytes: u64) -> bool {
        let recent: u64 = self.granted.iter().map(|granted| granted.load(Relaxed)).sum();
        let granted = self.is_low() && recent.saturating_add(bytes) <= self.left.load(Relaxed);
        if granted {
            self.granted[self.newest.load(Relaxed) % GRANTS].fetch_add(bytes, Relaxed);
        }
        granted
    }

    /// Waits until it is beyond the first mark.
    pub async fn near(&self) {
        while self.is_low() {
            self.wake.notified().await;
        }
    }

    /// By how many bytes it is beyond the mark at which instances are ended.
    #[must_use]
    pub fn over(&self) -> u64 {
        self.beyond_over.load(Relaxed)
    }
}

/// What one instance touches, and whether there is room for more of it.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    /// What is left.
    pub pressure: &'a Pressure,
    /// What it has.
    pub held: &'a Held,
}

impl Share<'_> {
    /// Whether it may go on. One that has only single pages always may: what those take until the next tick is reckoned with.
    #[must_use]
    pub fn may_go_on(&self) -> bool {
        if self.held.bytes() <= HUGE as u64 {
            return true;
        }
        self.pressure.read();
        self.pressure.over() == 0
    }

    /// Waits until it may, which is when the largest have ended. It may be one of them.
    pub async fn room(&self) {
        while !self.may_go_on() {
            tokio::time::sleep(TICK).await;
        }
    }
}

/// File systems take only while there is enough; what they took counts when it is touched, like all else.
impl Budget for Pressure {
    fn take(&self, bytes: u64) -> bool {
        self.grant(bytes)
    }

    fn give_back(&self, _: u64) {}
}

/// What an instance has been granted, and how to end it.
#[derive(Debug, Default)]
pub struct Held {
    /// Bytes of its memories and tables, and of what the host holds for it.
    pub memory: AtomicU64,
    /// Bytes of its file system.
    pub files: AtomicU64,
    /// It has more than its own `mem_max`.
    too_much: AtomicBool,
    end: Notify,
}

impl Held {
    /// All of it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.memory.load(Relaxed) + self.files.load(Relaxed)
    }

    /// Has it ended, because memory is short.
    pub fn end(&self) {
        self.end.notify_one();
    }

    /// Has it ended, because it has more than its own `mem_max`.
    pub fn end_as_too_much(&self) {
        self.too_much.store(true, Relaxed);
        self.end.notify_one();
    }

    /// Whether that was the reason.
    #[must_use]
    pub fn is_too_much(&self) -> bool {
        self.too_much.load(Relaxed)
    }

    /// Waits until it is to end.
    pub async fn ended(&self) {
        self.end.notified().await;
    }
}

/// The largest of these, as many as hold `wanted` bytes together; the larger first.
#[must_use]
pub fn largest(mut all: Vec<Arc<Held>>, wanted: u64) -> Vec<Arc<Held>> {
    all.sort_by_key(|held| std::cmp::Reverse(held.bytes()));
    let mut sum = 0;
    let mut needed = |held: &Arc<Held>| {
        let needed = sum < wanted;
        sum += held.bytes();
        needed
    };
    let number = all.iter().take_while(|held| needed(held)).count();
    all.truncate(number);
    all
}

/// An instance that holds less than this part of what is missing is small.
const SMALL: u64 = 8;
/// Rounds in vain after which small instances are ended as well.
const SMALL_AFTER: u32 = 20;

/// Who ends while memory is short, round by round.
#[derive(Debug, Default)]
pub struct Shedding {
    /// Those that were chosen before and are not gone yet.
    going: Vec<Weak<Held>>,
    /// Rounds in which something was missing and nobody was large enough.
    in_vain: u32,
}

impl Shedding {
    /// Of those that are at work, who is to end now that so many bytes are missing.
    pub fn round(&mut self, all: Vec<Arc<Held>>, over: u64) -> Vec<Arc<Held>> {
        self.going.retain(|held| held.strong_count() > 0);
        let is_going =
            |held: &Arc<Held>| self.going.iter().any(|going| std::ptr::eq(going.as_ptr(), Arc::as_ptr(held)));
        let (gone, mut all): (Vec<_>, Vec<_>) = all.into_iter().partition(is_going);
        let missing = over.saturating_sub(gone.iter().map(|held| held.bytes()).sum());
        if self.in_vain < SMALL_AFTER {
            all.retain(|held| held.bytes() >= missing / SMALL);
        }
        let ended = largest(all, missing);
        self.in_vain = if missing > 0 && ended.is_empty() { self.in_vain + 1 } else { 0 };
        self.going.extend(ended.iter().map(Arc::downgrade));
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    #[test]
    fn the_marks_leave_what_guests_can_outrun() {
        let mib = |limit: u64, workers| {
            let marks = Marks::of(limit << 20, workers);
            (marks.near >> 20, marks.over >> 20)
        };
        assert_eq!(mib(256, 1), (184, 208));
        assert_eq!(mib(416, 2), (272, 320));
        assert_eq!(mib(16_384, 4), (14_848, 15_360));
        assert_eq!(mib(64, 16), (40, 48), "too little for all, but something");
    }

    #[test]
    fn a_cgroup_and_a_process_are_read_as_the_kernel_writes_them() {
        let mut group = tempfile();
        let pressure = Pressure::default();
        pressure.measure(Meter::of_group(group.try_clone().unwrap().into(), 1 << 30, 1));
        for (bytes, low, over) in
            [(0, true, false), (1 << 30, false, true), (1000 << 20, false, true), (900 << 20, true, false)]
        {
            hold(&mut group, bytes);
            pressure.tick();
            assert_eq!((pressure.is_low(), pressure.beyond_over.load(Relaxed) > 0), (low, over), "{bytes}");
        }
        let own = Meter::of_process(1 << 30).unwrap();
        let before = own.read().unwrap();
        let touched = std::hint::black_box(vec![1_u8; 32 << 20]);
        assert!(own.read().unwrap() >= before + (30 << 20), "{before}");
        drop(touched);
    }

    /// Would miss: guests that are each granted what is left, before any of them has touched it.
    #[test]
    fn what_was_granted_counts_until_the_readings_must_have_seen_it() {
        let pressure = Pressure::default();
        assert!(pressure.grant(1 << 40), "without a meter");
        let pressure = Pressure::default();
        pressure.measure(Meter::of_group(holding(84 << 20).into(), 256 << 20, 1));
        assert!(pressure.grant(60 << 20));
        assert!(!pressure.grant(41 << 20), "100 MiB were left, before the first tick");
        assert!(pressure.grant(40 << 20));
        pressure.tick();
        pressure.tick();
        pressure.read();
        assert!(!pressure.grant(1), "none of it has been touched yet");
        pressure.tick();
        assert!(pressure.grant(100 << 20), "it had its time");
    }

    /// Would miss: one that goes on by what was read at the last tick; a small one that waits for the large.
    #[tokio::test]
    async fn who_may_have_huge_pages_goes_on_only_when_there_is_room() {
        let (mut group, small, large) = (holding(84 << 20), held(HUGE as u64), held(HUGE as u64 + 1));
        let pressure = Pressure::default();
        pressure.measure(Meter::of_group(group.try_clone().unwrap().into(), 256 << 20, 1));
        let [small, large] = [&small, &large].map(|held| Share { pressure: &pressure, held });
        assert!(small.may_go_on() && large.may_go_on());
        hold(&mut group, 209 << 20);
        assert!(small.may_go_on() && !large.may_go_on());
        assert_eq!(pressure.over(), 1 << 20, "and now all know");
        let ended = std::cell::Cell::new(false);
        let waits = async {
            large.room().await;
            assert!(ended.get(), "there was none yet");
        };
        let ends = async {
            tokio::time::sleep(10 * TICK).await;
            ended.set(true);
            hold(&mut group, 208 << 20);
        };
        tokio::join!(waits, ends);
    }

    fn held(bytes: u64) -> Arc<Held> {
        Arc::new(Held { memory: AtomicU64::new(bytes), ..Held::default() })
    }

    fn sizes(of: &[Arc<Held>]) -> Vec<u64> {
        of.iter().map(|held| held.bytes()).collect()
    }

    /// Would miss: small instances of one worker that end for the large one of another.
    #[test]
    fn small_instances_are_spared_until_nothing_else_has_helped() {
        let small = [9, 12, 10].map(held).to_vec();
        let mut shedding = Shedding::default();
        for round in 0..SMALL_AFTER {
            assert_eq!(sizes(&shedding.round(small.clone(), 104)), [0; 0], "round {round}");
        }
        assert_eq!(sizes(&shedding.round(small.clone(), 20)), [12, 10]);
        assert_eq!(sizes(&shedding.round(small, 104)), [0; 0], "and then it is counted anew");
    }

    #[test]
    fn a_round_without_need_forgets_those_in_vain() {
        let small = vec![held(9)];
        let mut shedding = Shedding::default();
        for _ in 1..SMALL_AFTER {
            shedding.round(small.clone(), 100);
        }
        shedding.round(small.clone(), 0);
        for _ in 0..SMALL_AFTER {
            assert!(shedding.round(small.clone(), 100).is_empty());
        }
        assert_eq!(shedding.round(small, 100).len(), 1);
    }

    /// Would miss: a second one that ends because the first takes a moment to go.
    #[test]
    fn who_is_on_its_way_out_counts_as_gone_and_is_not_chosen_twice() {
        let mut all = [60, 50, 40].map(held).to_vec();
        let mut shedding = Shedding::default();
        assert_eq!(sizes(&shedding.round(all.clone(), 50)), [60]);
        assert_eq!(sizes(&shedding.round(all.clone(), 50)), [0; 0], "it is still there");
        assert_eq!(sizes(&shedding.round(all.clone(), 100)), [50], "more is missing than it gives back");
        all.remove(0);
        assert_eq!(sizes(&shedding.round(all, 85)), [40], "the first is gone, and it was not enough");
    }

    fn hold(group: &mut File, bytes: u64) {
        group.set_len(0).unwrap();
        std::io::Seek::rewind(group).unwrap();
        writeln!(group, "{bytes}").unwrap();
    }

    fn holding(bytes: u64) -> File {
        let mut group = tempfile();
        hold(&mut group, bytes);
        group
    }

    fn tempfile() -> File {
        rustix::fs::memfd_create("memory.current", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }

    proptest! {
        #[test]
        fn the_largest_are_enough_and_no_more(sizes in proptest::collection::vec(0_u64..100, 0..20), wanted in 0_u64..500) {
            let chosen = largest(sizes.iter().copied().map(held).collect(), wanted);
            let sum = |of: &[Arc<Held>]| of.iter().map(|held| held.bytes()).sum::<u64>();
            prop_assert!(sum(&chosen) >= wanted || chosen.len() == sizes.len());
            if let Some((_, all_but_the_last)) = chosen.split_last() {
                prop_assert!(sum(all_but_the_last) < wanted);
                let least = chosen.iter().map(|held| held.bytes()).min();
                let larger = sizes.iter().filter(|bytes| Some(**bytes) > least).count();
                prop_assert!(larger <= chosen.len());
            }
        }
    }
}
