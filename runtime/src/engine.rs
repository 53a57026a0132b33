//! All settings of Wasmtime, in one place.
//!
//! What shapes machine code is in `base`, so that what compile makes is what a worker may map; what shapes memory
//! is in [`for_worker`]. Each setting has its reason beside it; figures are measured by `make bench` unless said.

use wasmtime::error::Context as _;
use wasmtime::{Config, Engine, Instance, InstanceAllocationStrategy, Module, PoolingAllocationConfig, Store};

use crate::plan::Needs;

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
/// Linear memory that is cleared in place and kept when an instance is released, in bytes: most small guests touch
/// less, and then a release costs no page fault later.
pub const KEEP_RESIDENT: usize = 192 * 1024;

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

/// The pool of one brane in one worker: `slots` instances, each of which may have what `needs` says and `mem_max` bytes of
/// linear memory.
#[must_use]
pub fn pool(needs: &Needs, mem_max: u64, slots: u32) -> PoolingAllocationConfig {
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
        .linear_memory_keep_resident(KEEP_RESIDENT)
        .table_keep_resident(64 * 1024)
        // Above 1 it needs process_madvise, which fails with EBADF in a sealed worker.
        .decommit_batch_size(1);
    pool
}

/// An engine with this pool, for each of whose memories so much is reserved.
///
/// # Errors
/// If the pool cannot be reserved: too many slots of too much address space.
pub fn for_worker(pool: PoolingAllocationConfig, reservation: u64) -> wasmtime::Result<Engine> {
    let mut config = base(reservation);
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
