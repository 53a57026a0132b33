//! The pages under a brane's pool: large ones where its instances grow, and none where nobody has asked for a while.
//!
//! ```text
//!  a slot   0            192 KiB   2 MiB          what its component declares     what it grows to         mem_max
//!           │ kept, zeroed │       │ single pages │                               │ huge pages, once advised │
//! ```
//!
//! What a component declares may never be touched; what an instance asks for while it runs it is about to touch. So a brane
//! is advised (`MADV_HUGEPAGE`) once its instances regularly grow by some MiB, and only from where growth begins: the
//! kernel puts a huge page only where 2 MiB of it have been granted, so a small instance never gets one. Whether the advice
//! counts is init's policy. A release gives huge pages back as it does single ones.

use std::cell::Cell;

use rustix::mm::{Advice, madvise};
use wasmtime::Engine;

use crate::engine;
use crate::plan::Needs;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Growth from which on huge pages pay, in bytes: two of them fit, wherever it begins.
const GROWTH: u64 = 4 << 20;
/// Instances in excess of those that grew less, after which a brane is advised.
const REGULARLY: u32 = 4;

/// Where a brane's pool has its memories, and what is known of their use.
#[derive(Debug)]
pub struct Pages {
    /// Where each begins.
    memories: Vec<usize>,
    /// Bytes that each may have.
    most: usize,
    /// Bytes that an instance begins with.
    declared: u64,
    /// Instances that grew, less those that did not; 0 at least.
    grew: Cell<u32>,
    advised: Cell<bool>,
}

impl Pages {
    /// Of this engine's pool, which has so many slots and has not been used.
    ///
    /// # Errors
    /// As [`engine::memories`].
    pub fn of(engine: &Engine, needs: &Needs, mem_max: u64, slots: u32) -> wasmtime::Result<Self> {
        let most = usize::try_from(mem_max).unwrap_or(usize::MAX);
        let memories = engine::memories(engine, slots.saturating_mul(needs.memories))?;
        let (grew, advised) = Default::default();
        Ok(Self { memories, most, declared: needs.initial_memory, grew, advised })
    }

    /// An instance has ended that had been granted so many bytes.
    pub fn ended(&self, granted: u64) {
        if self.advised.get() {
            return;
        }
        let grew = self.grew.get();
        let grew = if granted >= self.declared + GROWTH { grew + 1 } else { grew.saturating_sub(1) };
        self.grew.set(grew);
        if grew >= REGULARLY {
            self.advised.set(true);
            // Not below the first huge page: a release would clear its beginning, keep that, and give back the rest, for which
            // the kernel has to split it.
            let from = usize::try_from(self.declared).unwrap_or(usize::MAX).max(HUGE);
            self.advise(from, Advice::LinuxHugepage);
        }
    }

    /// Gives back what the slots' memories hold beyond what their components declare. Only while no instance has any of them.
    pub fn give_back(&self) {
        // A private mapping is then again what it is a mapping of: the component's data, or zeroes, as a reset leaves it.
        self.advise(0, Advice::LinuxDontNeed);
    }

    /// The advice does not change what a free slot holds.
    fn advise(&self, from: usize, advice: Advice) {
        for start in &self.memories {
            // Whole pages, huge ones where it is about them.
            let unit = if advice == Advice::LinuxHugepage { HUGE } else { 1 };
            let from = start.saturating_add(from).next_multiple_of(unit);
            let bytes = start.saturating_add(self.most).saturating_sub(from);
            if bytes > 0 {
                // SAFETY: the pool has reserved these bytes, for as long as its engine lives. Either the advice changes nothing
                // about what is in them, or no instance has them: then they are clean and stay so.
                let _ = unsafe { madvise(std::ptr::with_exposed_provenance_mut(from), bytes, advice) };
            }
        }
    }
}
