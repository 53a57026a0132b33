//! The machine in a box: an appliance image under QEMU, driven from Rust.
//!
//! Owns the QEMU process, the private directory with its sockets, the serial console, the machine
//! protocol (QMP), the debug channel and the forwarded ports. Chooses between hardware
//! virtualisation and emulation by a probe that runs guest code.
//! Never opens a network device, never needs root, never listens anywhere but on loopback, never
//! signals a process it did not start, and never prints: errors say it all.
//! Called by the integration tests (`gaia-tests`) and by its own binary, `gaia-qemu run`.
//!
//! ```text
//!   caller ──┬── Console ─────── console.sock ──┐
//!            ├── Qmp ─────────── qmp.sock ──────┤   QEMU (q35), started through
//!            ├── DebugChannel ── debug.sock ────┤   setpriv so that it dies with us
//!            └── 127.0.0.1:port ── user network ┘
//! ```
//!
//! ```no_run
//! use gaia_qemu::{Forward, Machine, MachineBuilder};
//! use std::time::Duration;
//!
//! let machine = Machine::boot(
//!     &MachineBuilder::new("bzImage").initrd("system.cpio").append("console=ttyS0").forward(Forward::to(8080)),
//! )?;
//! machine.console().wait_for("gaia: serving", Duration::from_mins(1))?;
//! let port = machine.port(8080)?; // 127.0.0.1:port reaches the guest's port 8080
//! machine.console().send_line("poweroff --yes")?;
//! assert!(machine.wait_exit(Duration::from_secs(30))?.success());
//! # Ok::<(), gaia_qemu::Error>(())
//! ```

mod accel;
mod console;
mod debug;
mod error;
mod machine;
mod net;
mod process;
mod qmp;

pub use accel::{Accel, Qemu, Version};
pub use console::{Console, Follower, Line};
pub use debug::DebugChannel;
pub use error::{Error, Tail};
pub use machine::{Drive, Machine, MachineBuilder};
pub use net::{Forward, Net, UserNet};
pub use process::Exit;
pub use qmp::{Event, Qmp, ShutdownReason};
