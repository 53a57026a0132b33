//! The hardware watchdog: armed at boot, petted by the supervisor while the runtime is well, never disarmed.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};

use crate::report::Failure;

const DEVICE: &str = "/dev/watchdog0";

/// An armed watchdog.
pub(crate) struct Watchdog(OwnedFd);

impl Watchdog {
    /// Opens it, which arms it with the driver's own timeout.
    pub(crate) fn open() -> Result<(Option<Self>, String), Failure> {
        match rustix::fs::open(DEVICE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => {
                let read = |what| std::fs::read_to_string(format!("/sys/class/watchdog/watchdog0/{what}"));
                let name = read("identity").unwrap_or_else(|_| DEVICE.into());
                let timeout =
                    read("timeout").map_or_else(|_| String::new(), |t| format!(", resets after {} s", t.trim()));
                Ok((Some(Self(device)), format!("{}{timeout} without the runtime's heartbeat", name.trim())))
            }
            Err(rustix::io::Errno::NOENT) => {
                Ok((None, "this machine has none: a hang of the kernel will stay one".into()))
            }
            Err(e) => Err(format!("{DEVICE}: {e}").into()),
        }
    }

    /// Gives it another period.
    pub(crate) fn pet(&self) {
        // Any byte but `V` (Linux, Documentation/watchdog/watchdog-api.rst). If it fails, the watchdog bites: right so.
        let _ = rustix::io::write(&self.0, b"\0");
    }
}
