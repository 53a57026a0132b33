//! What a file is like from outside: it differs when somebody has written to it or has put another in its place.

use std::os::fd::AsFd;

use rustix::fs::AtFlags;

/// Inode, size, and time of the last change in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp([i128; 4]);

impl Stamp {
    /// Of this file in a folder; none if it is not there.
    pub(super) fn of(folder: impl AsFd, path: &str) -> Option<Self> {
        let stat = rustix::fs::statat(folder, path, AtFlags::empty()).ok()?;
        Some(Self([stat.st_ino.into(), stat.st_size.into(), stat.st_mtime.into(), stat.st_mtime_nsec.into()]))
    }

    /// Whether there is nothing in it.
    pub(super) fn is_empty(self) -> bool {
        self.0[1] == 0
    }
}
