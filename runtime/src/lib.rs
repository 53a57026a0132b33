//! The brane runtime: everything of the appliance above PID 1.
//!
//! One binary, `gaia`, is the operator's command and, as `gaia role …`, each of the runtime's processes. It owns the
//! branes: manifest, compilation, link stage, workers, operations. It never opens a listening socket, never starts a
//! process and never chooses what a process may do: init does, by its table, and this crate asks. Under `gaia run`
//! [`run`] plays init's part, with the same table and the same supervisor.
//!
//! ```text
//! control ── asks init for a compiler ──▶ compile   wasm in, machine code out, then it ends
//!    │                                       │
//!    │◀──────── artefact (sealed memory) ────┘
//!    ├── plan + artefacts, through init ──▶ worker × core: map, link, pool, ready, accept
//!    └── HTTP over a Unix socket ◀── gaia status · ps · … (console, command line)
//! ```

pub mod capability;
pub mod channel;
pub mod check;
pub mod client;
pub mod compile;
pub mod complete;
pub mod console;
pub mod control;
pub mod deploy;
pub mod engine;
pub mod failure;
pub mod flame;
pub mod histogram;
pub mod kept;
pub mod key;
pub mod link;
pub mod log;
pub mod manual;
pub mod operate;
pub mod plan;
pub mod pprof;
pub mod profile;
pub mod progress;
pub mod registries;
pub mod remote;
pub mod review;
pub mod run;
pub mod secrets;
pub mod stacks;
pub mod statistics;
pub mod top;
pub mod trace;
pub mod worker;
