//! `make bench`: Gaia beside hyper alone, `wasmtime serve`, Node and workerd, in one run on one machine.
//!
//! ```text
//!  core 0: one server at a time      core 1: the load (this process)
//!  hyper · gaia · wasmtime · …  ◀──  1, 16, 64 connections, closed loop; then at half load
//! ```
//!
//! All servers of a workload are started, and take turns in every round: what disturbs the machine for a while disturbs all
//! of them. `docs/performance.md` says what each figure means.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures are shown with three digits"
)]

pub mod inside;
pub mod instances;
pub mod load;
pub mod native;
pub mod numbers;
pub mod plot;
pub mod report;
pub mod server;
pub mod tools;
pub mod workload;
