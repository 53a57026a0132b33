//! All settings of Wasmtime, in one place.
//!
//! What shapes machine code is in `base`, so that what compile makes is what a worker may map; what shapes memory
//! is in [`for_worker`]. Each setting has its reason beside it; figures are measured by `make bench` unless said.

use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::plan::Needs;

/// The stack a guest's call may use, in bytes. Rust guests keep most of theirs in linear memory.
const GUEST_STACK: usize = 128 * 1024;
/// The host stack under it: the guest's, and what a host call needs on top.
const FIBER_STACK: usize = 256 * 1024;
/// Memories that fit into the address space of one worker: 47 bits of it, 4 GiB and a guard for each.
pub const MEMORIES_PER_WORKER: u64 = 30_000;
/// Core instances one component may be made of. Only a number to the pool: it sets nothing aside for them.
const CORE_INSTANCES: u32 = 64;
/// Elements a table may grow to, if it does not begin with more. Address space only, until it is touched.
const TABLE_ELEMENTS: usize = 20_000;
/// Linear memory that is cleared in place and kept when an instance is released, in bytes: most small guests touch
/// less, and then a release costs no page fault later.
const KEEP_RESIDENT: usize = 192 * 1024;

fn base() -> Config {
    let mut config = Config::new();
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

/// An engine that compiles and never runs anything.
///
/// # Errors
/// If Wasmtime does not take the settings on this processor.
pub fn for_compiler() -> wasmtime::Result<Engine> {
    Engine::new(&base())
}

/// An engine and pool of one brane in one worker: `slots` instances, each of which may have what `needs` says and
/// `mem_max` bytes of linear memory.
///
/// # Errors
/// If the pool cannot be reserved: too many slots of too much address space.
pub fn for_worker(needs: &Needs, mem_max: u64, slots: u32) -> wasmtime::Result<Engine> {
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
        .linear_memory_keep_resident(KEEP_RESIDENT)
        .table_keep_resident(64 * 1024)
        // Above 1 it needs process_madvise, which fails with EBADF in a sealed worker.
        .decommit_batch_size(1);
    let mut config = base();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config)
}
