//! A slot of a pool is used again, and nothing is left in it: a guest fills everything it has with a secret, and the next
//! instance in the same slot looks for it everywhere, while the kernel moves, splits and takes away pages beside it.
//!
//! The pool is the one that workers have, and the component's machine code what the compiler makes. Under `GAIA_SOAK` there are
//! 12,500 rounds.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gaia_runtime::plan::Needs;
use gaia_runtime::{compile, engine};
use rustix::mm::{Advice, madvise};
use wasmtime::component::{Component, ComponentNamedList, Instance, InstancePre, Lift, Linker, Lower};
use wasmtime::{Enabled, Engine, PoolingAllocationConfig, Store};

/// What an instance may have, in bytes, and in the guest's pages: enough for three huge pages, wherever it begins.
const MEM_MAX: u64 = 8 << 20;
const PAGES: u32 = 128;
/// To how many elements the table is grown.
const ELEMENTS: u32 = 20_000;
/// What the guest writes, everywhere.
const SECRET: u64 = 0x5ec4_e75e_c4e7_5ec4;
const HUGE: usize = 2 << 20;
/// What is mapped and touched beside it, to make memory scarce for the allocator's lists, in bytes.
const PRESSED: usize = 64 << 20;

/// What may be kept, in bytes: any number.
const PLENTY: u64 = 1 << 30;

/// How a slot is reset.
struct Reset {
    name: &'static str,
    /// It is to leave nothing. Otherwise what it leaves is counted and printed.
    clean: bool,
    /// What all branes' slots may keep together, in bytes.
    share: u64,
    set: fn(&mut PoolingAllocationConfig),
}

const RESETS: &[Reset] = &[
    Reset { name: "as workers have it", clean: true, share: PLENTY, set: |_| {} },
    Reset { name: "as they have it with many slots", clean: true, share: 0, set: |_| {} },
    Reset {
        name: "nothing is kept resident",
        clean: true,
        share: PLENTY,
        set: |pool| {
            pool.linear_memory_keep_resident(0).table_keep_resident(0);
        },
    },
    Reset {
        name: "everything is kept resident",
        clean: true,
        share: PLENTY,
        set: |pool| {
            pool.linear_memory_keep_resident(16 << 20).table_keep_resident(1 << 20);
        },
    },
    Reset {
        name: "what the kernel says was written",
        clean: false,
        share: PLENTY,
        // Less than all, so that the rest is given back and can be a huge page again.
        set: |pool| {
            let scan = if PoolingAllocationConfig::is_pagemap_scan_available() { Enabled::Yes } else { Enabled::No };
            pool.linear_memory_keep_resident(4 << 20).table_keep_resident(1 << 20).pagemap_scan(scan);
        },
    },
];

/// An engine with one slot, so that each instance gets the one that the last has left.
struct Slot {
    engine: Engine,
    pre: InstancePre<()>,
    memory: Range<usize>,
}

/// What an instance finds, in words, elements and globals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Found {
    secrets: u64,
    /// Words that are not zero, the secret or not.
    words: u64,
    elements: u32,
    globals: u32,
}

impl Slot {
    fn new(component: &(Needs, Vec<u8>), reset: &Reset) -> Self {
        let (needs, artefact) = component;
        let mut pool = engine::pool(needs, MEM_MAX, 1, engine::resident(needs, 1, reset.share));
        (reset.set)(&mut pool);
        let engine = engine::for_worker(pool, engine::WHOLE, true).unwrap();
        let began = Instant::now();
        let start = engine::memories(&engine, 1).unwrap()[0];
        println!("where the memory is, found in {:?}", began.elapsed());
        // SAFETY: made by `compile` of this very process.
        let component = unsafe { Component::deserialize(&engine, artefact) }.unwrap();
        let pre = Linker::new(&engine).instantiate_pre(&component).unwrap();
        Self { engine, pre, memory: start..start + usize::try_from(MEM_MAX).unwrap() }
    }

    /// The whole huge pages in it.
    fn huge(&self) -> Range<usize> {
        self.memory.start.next_multiple_of(HUGE)..self.memory.end / HUGE * HUGE
    }

    fn instance(&self) -> One {
        let mut store = Store::new(&self.engine, ());
        store.set_epoch_deadline(1);
        let instance = self.pre.instantiate(&mut store).unwrap();
        One { store, instance }
    }

    /// How many bytes of it are in huge pages just now.
    fn in_huge_pages(&self) -> u64 {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        let mut kib = 0;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((from, to)) = range.filter(|(from, _)| from.chars().all(|c| c.is_ascii_hexdigit())) {
                let [from, to] = [from, to].map(|at| usize::from_str_radix(at, 16).unwrap());
                inside = from < self.memory.end && to > self.memory.start;
            } else if let Some(size) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
                kib += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
        }
        kib * 1024
    }
}

/// An instance.
struct One {
    store: Store<()>,
    instance: Instance,
}

impl One {
    fn call<A, R>(&mut self, name: &str, arguments: A) -> R
    where
        A: ComponentNamedList + Lower,
        R: ComponentNamedList + Lift + 'static,
    {
        let function = self.instance.get_typed_func::<A, R>(&mut self.store, name).unwrap();
        function.call(&mut self.store, arguments).unwrap()
    }

    fn write(&mut self) {
        self.call::<_, ()>("write", (PAGES, ELEMENTS));
    }

    fn look(&mut self) -> Found {
        let (globals,) = self.call("globals", ());
        let (memory,): (u64,) = self.call("memory", (PAGES, ELEMENTS));
        let (elements,) = self.call("tables", ());
        Found { secrets: memory >> 32, words: memory & 0xffff_ffff, elements, globals }
    }
}

/// What goes on beside it, counted.
#[derive(Default)]
struct Weather {
    over: AtomicBool,
    compacted: AtomicU64,
    split: AtomicU64,
    pressed: AtomicU64,
}

impl Weather {
    fn repeat(&self, count: &AtomicU64, pause: Duration, mut once: impl FnMut(u64) -> bool) {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        while !self.over.load(Relaxed) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if !once(random) {
                return;
            }
            count.fetch_add(1, Relaxed);
            std::thread::sleep(pause);
        }
    }

    /// The kernel moves pages together.
    fn compact(&self) {
        let pause = Duration::from_millis(2);
        self.repeat(&self.compacted, pause, |_| fs::write("/proc/sys/vm/compact_memory", "1").is_ok());
    }

    /// A page in a huge one is not like the others any more, so that the kernel splits it; and pages are to be taken away, which they
    /// are where there is something to swap to. Neither changes what is in them.
    fn split(&self, memory: &Range<usize>) {
        self.repeat(&self.split, Duration::from_micros(50), |random| {
            let pages = (memory.len() / 4096) as u64;
            let page = usize::try_from(random % pages).unwrap();
            let (advice, most) = if random >> 63 == 0 { (Advice::LinuxCold, 1) } else { (Advice::LinuxPageOut, 64) };
            let at = std::ptr::with_exposed_provenance_mut(memory.start + page * 4096);
            let bytes = (most * 4096).min(memory.len() - page * 4096);
            // SAFETY: neither advice changes what is in the pages. The slot is mapped as long as its engine.
            unsafe { madvise(at, bytes, advice) }.is_ok()
        });
    }

    /// Others want memory.
    fn press(&self) {
        self.repeat(&self.pressed, Duration::from_millis(1), |_| {
            let mut taken = Vec::<u8>::with_capacity(PRESSED);
            taken.spare_capacity_mut().iter_mut().step_by(4096).for_each(|byte| {
                byte.write(1);
            });
            std::hint::black_box(&taken);
            true
        });
    }
}

fn component() -> (Needs, Vec<u8>) {
    // Relative to where cargo runs a test: its package.
    let path = "../out/interfaces/reuse.wasm";
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}; `make out/interfaces` makes it"));
    let (report, artefact) = compile::compile(&bytes, engine::WHOLE).unwrap();
    (report.needs.unwrap(), artefact)
}

/// Would miss: a page, an element or a global that a reset leaves as it was, in either lifecycle, with huge pages or without, also while the kernel
/// has the page in its hands. That a leftover is found is shown in each setting.
#[test]
fn what_an_instance_leaves_the_next_one_in_its_slot_does_not_find() {
    let component = component();
    let all: usize = if std::env::var_os("GAIA_SOAK").is_some() { 12_500 } else { 1_500 };
    let settings = RESETS.len() * 2 * 2;
    let mut table = String::new();
    for reset in RESETS {
        for huge in [false, true] {
            let slot = Slot::new(&component, reset);
            let range = slot.huge();
            let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
            // SAFETY: how large pages are changes nothing about what is in them.
            let advised = unsafe { madvise(std::ptr::with_exposed_provenance_mut(range.start), range.len(), advice) };
            advised.unwrap();
            let fresh = slot.instance().look();
            assert!((fresh.secrets, fresh.elements, fresh.globals) == (0, 0, 0) && fresh.words > 0, "{fresh:?}");

            let mut writer = slot.instance();
            writer.write();
            let own = writer.look();
            let words = MEM_MAX / 8;
            assert_eq!(own, Found { secrets: words, words, elements: ELEMENTS, globals: 3 }, "what is looked at");
            let in_huge_pages = slot.in_huge_pages();
            drop(writer);

            for ready in [false, true] {
                let weather = Weather::default();
                let began = Instant::now();
                let left = std::thread::scope(|scope| {
                    scope.spawn(|| weather.compact());
                    scope.spawn(|| weather.split(&slot.memory));
                    scope.spawn(|| weather.press());
                    let left: Vec<Found> =
                        (0..all.div_ceil(settings)).filter_map(|round| left(&slot, ready, round, fresh)).collect();
                    weather.over.store(true, Relaxed);
                    left
                });
                let lifecycle = if ready { "pooled" } else { "ephemeral" };
                let _ = writeln!(
                    table,
                    "{:<34}{lifecycle:<11}{:>4} KiB huge, {:>3} rounds in {:>5} ms, {:>4} compactions, {:>5} splits, {:>3} × 64 MiB: {} left something",
                    reset.name,
                    in_huge_pages / 1024,
                    all.div_ceil(settings),
                    began.elapsed().as_millis(),
                    weather.compacted.load(Relaxed),
                    weather.split.load(Relaxed),
                    weather.pressed.load(Relaxed),
                    left.len()
                );
                assert!(left.is_empty() || !reset.clean, "{}, huge pages {huge}: {left:?}\n{table}", reset.name);
            }
            assert!(!huge || in_huge_pages > 0 || huge_pages_are_off(), "{table}");
            assert!(huge || in_huge_pages == 0, "{table}");
            is_found_if_left(&slot, fresh);
        }
    }
    println!("{table}");
}

fn huge_pages_are_off() -> bool {
    let enabled = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    !enabled.contains("[madvise]") && !enabled.contains("[always]")
}

/// One instance that writes, one that looks; what that finds which a fresh one has not.
fn left(slot: &Slot, ready: bool, round: usize, fresh: Found) -> Option<Found> {
    let mut writer = slot.instance();
    writer.write();
    // The kernel may have the pages in its hands when they are reset.
    std::thread::sleep(Duration::from_micros(u64::try_from(round % 7).unwrap() * 100));
    drop(writer);
    let between = Duration::from_micros(u64::try_from(round % 3).unwrap() * 200);
    let mut next = if ready {
        let next = slot.instance();
        std::thread::sleep(between);
        next
    } else {
        std::thread::sleep(between);
        slot.instance()
    };
    let found = next.look();
    (found != fresh).then_some(found)
}

/// The reset is broken on purpose: after it, a word of the memory is what it was before. Each is found, or nothing above is proven.
fn is_found_if_left(slot: &Slot, fresh: Found) {
    let words = slot.memory.len() / 8;
    for word in (0..words).step_by(words / 61) {
        let mut writer = slot.instance();
        writer.write();
        drop(writer);
        let at = std::ptr::with_exposed_provenance_mut::<u64>(slot.memory.start + word * 8);
        // SAFETY: the slot is nobody's just now, and can be written as far as its last instance could.
        unsafe { at.write_volatile(SECRET) };
        let found = slot.instance().look();
        // Below the first two pages the next instance's own beginning could be what is overwritten.
        assert_eq!((found.secrets, found.elements, found.globals), (1, 0, 0), "word {word}: {found:?}");
        assert!(found.words == fresh.words || found.words == fresh.words + 1, "word {word}: {found:?}");
        assert_eq!(slot.instance().look(), fresh, "and the next reset takes it away");
    }
}
