//! Supervision: who runs, as whom, with which descriptors, and what happens when it stops.
//!
//! This library is shared by PID 1 (`src/pid1/main.rs`) and by any launcher that plays init's part for an
//! unprivileged run. It owns the table of roles, the listening sockets, the channels between the roles
//! and the supervisor's event loop. It never speaks HTTP or TLS, never looks inside a component, and
//! reads three things that others wrote, each with its bound:
//!
//! | source                           | bound                                                              |
//! |----------------------------------|--------------------------------------------------------------------|
//! | control's and workers' messages  | [`wire::MAX_MESSAGE`] bytes and [`wire::MAX_DESCRIPTORS`] each      |
//! | `gaia.toml`                      | [`settings::MAX_BYTES`]; what does not parse becomes safe defaults  |
//! | the kernel command line          | what the kernel allows (2 KiB on x86-64)                            |
//!
//! ```text
//!                    ┌────────────── supervisor (one thread, one poll) ──────────────┐
//!                    │ signalfd · control's channel · one channel per worker         │
//!                    └──┬──────────┬─────────────┬─────────────────┬─────────────────┘
//!            spawn      │ console  │ control     │ compile (asked  │ worker × core
//!                       │          │ (channel)   │  for, one shot) │ (channel, listeners, stats)
//! ```

pub mod collector;
pub mod cores;
pub mod descriptors;
pub mod given;
pub mod key;
pub mod lines;
pub mod listeners;
pub mod registries;
pub mod roles;
pub mod sandbox;
pub mod settings;
pub mod spawn;
pub mod supervise;
pub mod wire;
