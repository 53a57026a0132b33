//! A compiler: one component in, machine code out. It opens nothing, connects to nobody and starts nothing.

use super::{Call, Sandbox, call, event_loop, program};

const OWN: &[Call] = &[
    // Wasmtime has no other way to look into a component than to load what it compiled. The code is never called. Pages
    // are never both writable and executable.
    call!(SYS_mprotect = mprotect, [[program::READ_EXEC]], "Wasmtime loads what it compiled to look into it"),
    call!(SYS_sched_getaffinity = sched_getaffinity, [], "Wasmtime asks for the number of cores"),
];

/// What a compiler may do.
pub const SANDBOX: Sandbox =
    Sandbox { calls: &[program::CALLS, event_loop::CHANNELS, OWN], files: &[], data: &[], files_of_a_workstation: &[] };
