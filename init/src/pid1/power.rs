//! The end of the machine: orderly, or by policy when PID 1 itself cannot go on. Nothing here returns.

use std::convert::Infallible;
use std::io::Write as _;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use gaia_init::supervise::End;
use nix::sys::reboot::{RebootMode, reboot};

/// What happens when PID 1 cannot go on: `gaia.on_failure=` on the kernel command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub(crate) enum OnFailure {
    /// Start again: with slots to fall back to, this is what an unattended device wants.
    #[default]
    Reboot = 0,
    /// Switch off: for tests and for a person at the machine.
    PowerOff = 1,
}

static POLICY: AtomicU8 = AtomicU8::new(OnFailure::Reboot as u8);

/// Remembers the policy for [`fail`].
pub(crate) fn set_policy(policy: OnFailure) {
    POLICY.store(policy as u8, Ordering::Relaxed);
}

/// Says why and follows the policy. Also the panic hook, so it takes no lock and allocates little.
pub(crate) fn fail(why: &str) -> ! {
    if let Ok(mut console) = std::fs::OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "gaia: cannot go on: {why}");
    }
    // Long enough to be read on a serial line, short enough for an unattended device.
    std::thread::sleep(Duration::from_secs(3));
    end(if POLICY.load(Ordering::Relaxed) == OnFailure::PowerOff as u8 { End::PowerOff } else { End::Reboot })
}

/// Flushes what can be flushed and ends the machine.
pub(crate) fn end(end: End) -> ! {
    rustix::fs::sync();
    let mode = match end {
        End::PowerOff => RebootMode::RB_POWER_OFF,
        End::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let refused: Result<Infallible, _> = reboot(mode);
    if let Err(e) = refused
        && let Ok(mut console) = std::fs::OpenOptions::new().write(true).open("/dev/console")
    {
        let _ = writeln!(console, "gaia: reboot({mode:?}): {e}; exiting, which panics the kernel");
    }
    // An exit of PID 1 is a kernel panic, and `panic=` on the command line makes that a reboot.
    std::process::exit(70)
}
