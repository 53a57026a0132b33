//! The end of the machine: orderly, or by policy when PID 1 itself cannot go on. Nothing here returns.

use std::convert::Infallible;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use gaia_init::supervise::End;
use nix::sys::reboot::{RebootMode, reboot};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::data;

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

/// What a panic does: it ends the machine by the policy, or only the process, if that is a child on its way to `exec`.
pub(crate) fn panicked(what: &PanicHookInfo<'_>) {
    if std::process::id() != 1 {
        // SAFETY: `_exit` has no preconditions. Not `exit`: nothing of the parent's may run in this child.
        unsafe { nix::libc::_exit(127) }
    }
    fail(&format!("init panicked: {what}"))
}

/// Says why and follows the policy. Also runs after a panic, so it takes no lock and allocates little.
pub(crate) fn fail(why: &str) -> ! {
    last_words(&format!("gaia: cannot go on: {why}\n"));
    // Long enough to be read on a serial line, short enough for an unattended device.
    std::thread::sleep(Duration::from_secs(3));
    end(if POLICY.load(Ordering::Relaxed) == OnFailure::PowerOff as u8 { End::PowerOff } else { End::Reboot })
}

/// Flushes what can be flushed and ends the machine.
pub(crate) fn end(end: End) -> ! {
    // Whoever said why it ends has said enough: with the roles still there this may not be possible, and the journal is
    // there for that.
    let _ = data::close();
    let mode = match end {
        End::PowerOff => RebootMode::RB_POWER_OFF,
        End::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err::<Infallible, _>(e) = reboot(mode);
    last_words(&format!("gaia: reboot({mode:?}): {e}; exiting, which panics the kernel\n"));
    // An exit of PID 1 is a kernel panic, and `panic=` on the command line makes that a reboot.
    std::process::exit(70)
}

/// Writes to the console what it takes within a second.
fn last_words(text: &str) {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) else { return };
    let mut left = text.as_bytes();
    for _ in 0..50 {
        match rustix::io::write(&console, left) {
            Ok(n) => left = &left[n..],
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return,
        }
        if left.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
