//! The pages under a brane's pool: large ones where its instances grow, and none where nobody has asked for a while.
//!
//! ```text
//!  a slot   0         `resident`   2 MiB          what its component declares     what it grows to         mem_max
//!           │ kept, zeroed │       │ single pages │                               │ huge pages │
//! ```
//!
//! What a component declares may never be touched; what an instance asks for while it runs it is about to touch. So the part
//! of each slot where growth begins is advised (`MADV_HUGEPAGE`): the kernel puts a huge page only where 2 MiB of it have been
//! granted, so an instance that stays small never gets one. Whether the advice counts is init's policy. It is given before any
//! instance is there: a slot that has had single pages keeps their tables, and the kernel (before Linux 6.14) puts no huge page
//! over a table. A release gives huge pages back as it does single ones.

use rustix::mm::{Advice, madvise};
use wasmtime::Engine;

use crate::engine;
use crate::plan::Needs;

/// Bytes of a huge page. There is none in the first so many of a memory.
pub const HUGE: usize = 2 << 20;
/// Memories beyond which a pool is left as it is: each that is advised is two mappings more, and a process may not have any number.
const MEMORIES: usize = 1024;

/// Where a brane's pool has its memories.
#[derive(Debug)]
pub struct Pages {
    /// Where each begins.
    pub memories: Vec<usize>,
    /// Bytes that each may have.
    most: usize,
}

impl Pages {
    /// Of this engine's pool, which has so many slots, keeps so much of each memory, and has not been used: it is advised.
    ///
    /// # Errors
    /// As [`engine::memories`].
    pub fn of(engine: &Engine, needs: &Needs, mem_max: u64, slots: u32, resident: usize) -> wasmtime::Result<Self> {
        let most = usize::try_from(mem_max).unwrap_or(usize::MAX);
        let memories = engine::memories(engine, slots.saturating_mul(needs.memories))?;
        let pages = Self { memories, most };
        if pages.memories.len() <= MEMORIES {
            // Not below the first huge page, nor where something is kept: a release would clear a huge page's beginning, keep
            // that, and give back the rest, for which the kernel has to split it.
            let from = usize::try_from(needs.initial_memory).unwrap_or(usize::MAX).max(HUGE).max(resident);
            pages.advise(&pages.memories, from, Advice::LinuxHugepage);
        }
        Ok(pages)
    }

    /// Gives back what some of the slots' memories hold. Only while no instance has any of them.
    pub fn give_back(&self, memories: &[usize]) {
        // A private mapping is then again what it is a mapping of: the component's data, or zeroes, as a reset leaves it.
        self.advise(memories, 0, Advice::LinuxDontNeed);
    }

    fn advise(&self, memories: &[usize], from: usize, advice: Advice) {
        for start in memories {
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
