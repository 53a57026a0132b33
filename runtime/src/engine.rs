//! All settings of Wasmtime, in one place.
//!
//! What shapes machine code is in `base`, so that what compile makes is what a worker may map; what shapes memory
//! is in [`for_worker`]. Each setting has its reason beside it; figures are measured by `make bench` unless said.

use wasmtime::error::Context as _;
use wasmtime::{Config, Engine, Instance, InstanceAllocationStrategy, Module, PoolingAllocationConfig, Store};

use crate::plan::Needs;
use crate::stacks;

/// The stack a guest's call may use, in bytes. Rust guests keep most of theirs in linear memory.
const GUEST_STACK: usize = 128 * 1024;
/// The host stack under it: the guest's, and what a host call needs on top.
const FIBER_STACK: usize = 256 * 1024;
/// What a worker's pools may reserve of its address space, in bytes. Of its 47 bits the heap's place takes the upper third.
pub const ADDRESS_SPACE: u64 = 80 << 40;
/// What is reserved for a memory, in bytes, as long as there is room: all that 32 bits can address. No access needs a check
/// then, as what is out of bounds is not mapped.
pub const WHOLE: u64 = 4 << 30;
/// A brane with more instances than this in a worker has its memories closely packed instead, and each access checked: the
/// transform of a 13 KiB document takes a tenth longer then (234 to 258 us with its round trip, medians of 1500, three times).
const SPARSE: u64 = 4096;
/// What follows each memory and is never mapped, in bytes: Wasmtime's own figure, as machine code depends on it.
const GUARD: u64 = 32 << 20;
/// Core instances one component may be made of. Only a number to the pool: it sets nothing aside for them.
const CORE_INSTANCES: u32 = 64;
/// Elements a table may grow to, if it does not begin with more. Address space only, until it is touched.
const TABLE_ELEMENTS: usize = 20_000;
/// Linear memory that is cleared in place and kept when an instance is released, in bytes, of a brane whose data lies within it,
/// however many slots it has: most small guests touch less, and then a release costs no page fault later.
const RESIDENT: u64 = 192 * 1024;
/// What is kept beyond a component's data, in bytes: guests' heaps begin there. With Rust's usual stack of 1 MiB below the
/// data, the transform of a document has six page faults with nothing, and none with this.
const BEYOND_DATA: u64 = 256 * 1024;
/// What is kept where there is memory for it, in bytes, whatever the component has of data: a slot that has grown so far without
/// huge pages would have a page fault for each 4 KiB, and to clear it takes as long as ten to twenty of them.
const SINGLE: u64 = 2 << 20;
/// The most that is kept of a memory, in bytes: JavaScript's engine begins with 9 MiB of data, Python's with 12. It is
/// cleared whole, however little of it was touched.
const MOST_RESIDENT: u64 = 16 << 20;

/// What is reserved for each memory of a brane with so many instances in a worker, in bytes. Machine code depends on it.
#[must_use]
pub fn reservation(slots: u32, mem_max: u64) -> u64 {
    if u64::from(slots) <= SPARSE { WHOLE } else { mem_max.next_multiple_of(1 << 20).min(WHOLE) }
}

/// What a brane's pool reserves of a worker's address space, in bytes.
#[must_use]
pub fn address_space(slots: u32, memories: u32, reservation: u64) -> u64 {
    u64::from(slots).saturating_mul(u64::from(memories)).saturating_mul(reservation + GUARD)
}

fn base(reservation: u64) -> Config {
    let mut config = Config::new();
    config.memory_reservation(reservation);
    config.memory_guard_size(GUARD);
    // A guest that does not return is interrupted at its next loop head or call: deadlines and fairness need it.
    config.epoch_interruption(true);
    // Component-model async is not WASI 0.2; without it a host call costs less.
    config.concurrency_support(false);
    config.max_wasm_stack(GUEST_STACK);
    config.async_stack_size(FIBER_STACK);
    // WASI 0.2 components from today's toolchains use neither, and what is off cannot be attacked.
    config.wasm_memory64(false);
    config.wasm_relaxed_simd(false);
    config
}

/// An engine that compiles for memories of which so much is reserved, and never runs anything.
///
/// # Errors
/// If Wasmtime does not take the settings on this processor.
pub fn for_compiler(reservation: u64) -> wasmtime::Result<Engine> {
    Engine::new(&base(reservation))
}

/// How much of each memory is cleared in place and kept when an instance is released, in bytes; the rest is given back. So
/// many slots may keep `share` bytes together.
///
/// What is kept begins at a memory's beginning, so it is everything up to where the guest's heap begins, or nothing: with less
/// than that, what an instance touches is given back all the same, and what is below it is cleared for nothing.
#[must_use]
pub fn resident(needs: &Needs, slots: u32, share: u64) -> usize {
    let memories = u64::from(slots).saturating_mul(needs.memories.into()).max(1);
    let fits = |bytes: &u64| *bytes <= MOST_RESIDENT && *bytes <= share / memories;
    let with_heap = needs.data_end.min(needs.initial_memory).saturating_add(BEYOND_DATA).next_multiple_of(4096);
    let least = if with_heap <= RESIDENT + BEYOND_DATA { RESIDENT } else { 0 };
    let kept = [with_heap.max(SINGLE), with_heap].into_iter().find(fits).unwrap_or(least);
    usize::try_from(kept).unwrap_or(0)
}

/// The pool of one brane in one worker: `slots` instances, each of which may have what `needs` says and `mem_max` bytes of
/// linear memory, of each of which so much is kept.
#[must_use]
pub fn pool(needs: &Needs, mem_max: u64, slots: u32, resident: usize) -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(slots)
        .total_core_instances(slots.saturating_mul(CORE_INSTANCES))
        .total_memories(slots.saturating_mul(needs.memories))
        .total_tables(slots.saturating_mul(needs.tables))
        .total_stacks(slots)
        .max_core_instances_per_component(CORE_INSTANCES)
        .max_memories_per_component(needs.memories)
        .max_tables_per_component(needs.tables)
        .table_elements(usize::try_from(needs.table_elements).unwrap_or(usize::MAX).max(TABLE_ELEMENTS))
        .max_memory_size(usize::try_from(mem_max).unwrap_or(usize::MAX))
        // Not by what the kernel says was written (`pagemap_scan`): a page that is on its way elsewhere at that moment would be
        // left as it is (docs/memory.md).
        .linear_memory_keep_resident(resident)
        .table_keep_resident(64 * 1024)
        // Above 1 it needs process_madvise, which fails with EBADF in a sealed worker.
        .decommit_batch_size(1);
    pool
}

/// An engine with this pool, for each of whose memories so much is reserved. Stacks are followed only where functions have short
/// names: all names of a stack are copied each time, and how long they are is the component's to say.
///
/// # Errors
/// If the pool cannot be reserved: too many slots of too much address space.
pub fn for_worker(pool: PoolingAllocationConfig, reservation: u64, has_short_names: bool) -> wasmtime::Result<Engine> {
    let mut config = base(reservation);
    config.wasm_backtrace_max_frames(has_short_names.then_some(stacks::FOLLOWED));
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config)
}

/// A module that has an empty memory, exports it as `m`, and does nothing.
const EMPTY_MEMORY: &[u8] = b"\0asm\x01\0\0\0\x05\x03\x01\0\0\x07\x05\x01\x01m\x02\0";

/// Where the engine's pool has its memories: an address for each of `number`, which is how many it has. All of them must be
/// free. A component's instance does not tell; so each slot is given to an empty memory for a moment. Each must have room for a page.
///
/// # Errors
/// If there are fewer.
pub fn memories(engine: &Engine, number: u32) -> wasmtime::Result<Vec<usize>> {
    let module = Module::from_binary(engine, EMPTY_MEMORY)?;
    let mut held = Vec::new();
    let mut addresses = Vec::new();
    for _ in 0..number {
        let mut store = Store::new(engine, ());
        let instance = Instance::new(&mut store, &module, &[])?;
        let memory = instance.get_memory(&mut store, "m").context("no memory")?;
        addresses.push(memory.data_ptr(&store).addr());
        held.push(store);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLENTY: u64 = 1 << 40;

    fn needs(data_end: u64, initial_memory: u64) -> Needs {
        Needs { memories: 1, initial_memory, data_end, tables: 1, table_elements: 1, longest_name: 0 }
    }

    #[test]
    fn what_is_kept_is_fitted_to_the_component_and_to_what_there_is() {
        let (kib, mib) = (1 << 10, 1 << 20);
        let small = needs(70 * kib, 128 * kib);
        let usual_stack = needs(1034 * kib, 1088 * kib);
        let engine = needs(9 * mib, 9 * mib + 300 * kib);
        for (needs, slots, share, kept) in [
            (small, 16, PLENTY, 2 * mib),
            (small, 16, 16 * 328 * kib, 328 * kib),
            (small, 62_000, mib, 192 * kib),
            (usual_stack, 16, PLENTY, 2 * mib),
            (usual_stack, 16, 32 * mib - 1, 1292 * kib),
            (usual_stack, 16, 16 * mib, 0),
            (engine, 16, PLENTY, 9 * mib + 256 * kib),
            (engine, 16, 100 * mib, 0),
            (needs(40 * mib, 64 * mib), 1, PLENTY, 0),
            (needs(u64::MAX, 3 * mib), 1, PLENTY, 3 * mib + 256 * kib),
        ] {
            assert_eq!(resident(&needs, slots, share) as u64, kept, "{needs:?} {slots} {share}");
        }
    }

    proptest! {
        #[test]
        fn together_they_keep_no_more_than_they_may(
            data_end: u64, initial_memory: u64, slots in 1_u32..100_000, memories in 0_u32..8, share in 0_u64..1 << 36
        ) {
            let needs = Needs { memories, ..needs(data_end, initial_memory) };
            let kept = resident(&needs, slots, share) as u64;
            prop_assert!(kept <= RESIDENT || kept * u64::from(slots) * u64::from(memories) <= share);
            prop_assert!(kept <= MOST_RESIDENT && kept.is_multiple_of(4096));
        }
    }
}
