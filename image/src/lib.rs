//! Turns a kernel source, the binaries and a graph into something that boots.
//!
//! Owns: the kernel's configuration and its build ([`kernel`]), the initramfs and the seed archive ([`initramfs`]), the
//! formats they are written in ([`cpio`], [`erofs`], [`elf`]), and the data disk ([`disk`]). Never: parses a manifest, starts a machine, needs root, or puts
//! anything into an image that depends on when, where or by whom it was built. Called by the Makefile through the binary
//! `gaia-image`, and by the tests through this library.

pub mod cpio;
pub mod disk;
pub mod elf;
pub mod erofs;
pub mod initramfs;
pub mod kernel;
mod required;

/// The kernel command line that the appliance boots with: the serial port as console, only warnings of the kernel on it,
/// and a reboot five seconds after a kernel panic (which an exit of PID 1 is, too).
pub const COMMAND_LINE: &str = include_str!("../cmdline").trim_ascii();
