//! A worker's counters and its log in shared memory: the worker writes, control reads, and what a worker leaves behind
//! when it is killed can still be read.
//!
//! ```text
//! 0        256                                                            131,072                1,179,776
//! │ worker │ brane 0 (128 bytes) │ brane 1 │ …                  brane 1,021 │ log: cursors │ records │
//! ```
//!
//! The kernel gives memory to the pages that are touched, so what is not used costs nothing.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gaia_init::supervise::STATISTICS_BYTES;
use rustix::mm::{MapFlags, ProtFlags};

use crate::log::Ring;

/// Branes that have a row.
pub const MAX_BRANES: usize = 1022;

/// Counts of a whole worker. All only grow, unless said otherwise.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Worker {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections open now.
    pub open: AtomicU64,
    /// Requests whose head was read.
    pub requests: AtomicU64,
    /// Requests without a finished answer now.
    pub inside: AtomicU64,
    /// Connections now that have not sent their first request's head yet.
    pub fresh: AtomicU64,
    /// Answers the runtime gave itself: 404.
    pub no_route: AtomicU64,
    /// Bytes that guests wrote to stdout and stderr.
    pub output: AtomicU64,
    /// What the log holds of the worker itself, and what it has dropped.
    pub log: Account,
    reserved: [AtomicU64; 21],
}

/// Counts of one brane in one worker. All only grow, unless said otherwise.
#[repr(C, align(128))]
#[derive(Debug, Default)]
pub struct Brane {
    /// Requests routed to it.
    pub requests: AtomicU64,
    /// Instances that serve now.
    pub busy: AtomicU64,
    /// Requests that wait for an instance now.
    pub waiting: AtomicU64,
    /// Instances that were given a request.
    pub instances: AtomicU64,
    /// Traps: 500.
    pub traps: AtomicU64,
    /// Missed deadlines: 504, or a reset stream.
    pub late: AtomicU64,
    /// Refused because the queue was too long: 503.
    pub refused: AtomicU64,
    /// Nanoseconds from dispatch to the guest's first instruction, summed over all instances.
    pub cold_ns: AtomicU64,
    /// What the log holds of it, and what it has dropped.
    pub log: Account,
    /// Nanoseconds that its instances waited for their quota of the core, summed over all.
    pub throttled_ns: AtomicU64,
    /// Instances ended because the host was short of memory, 503, or because the host held more for them than `mem_max`, 500; or
    /// a reset stream.
    pub killed: AtomicU64,
    /// Instances that are ready for a request now.
    pub ready: AtomicU64,
    reserved: [AtomicU64; 1],
}

/// What one brane, or the worker itself, has in the log.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Account {
    /// Slots of the ring that hold its records and have not been read.
    pub unread: AtomicU64,
    /// Records that were dropped, because it had its share of the ring or had said too much. Only grows.
    pub dropped: AtomicU64,
    /// Of these, how many a record in the log has told.
    pub told: AtomicU64,
    /// What it may still say at once, in thousandths of a slot, in bits 32 to 62; when that was reckoned, in milliseconds of
    /// the monotonic clock, in the lower; whether it was used up in the highest. 0 before its first record.
    pub allowance: AtomicU64,
}

/// All of it. Its layout is an agreement between processes of one build.
#[repr(C)]
#[derive(Debug)]
pub struct Page {
    /// The worker's own.
    pub worker: Worker,
    /// The branes', in the plan's order.
    pub branes: [Brane; MAX_BRANES],
    /// The log.
    pub log: Ring,
}

const _: () =
    assert!(size_of::<Page>() as u64 <= STATISTICS_BYTES && size_of::<Worker>() == 256 && size_of::<Brane>() == 128);

/// A mapped page. It stays mapped as long as this lives.
#[derive(Debug)]
pub struct Statistics(NonNull<Page>);

// SAFETY: everything in a page is atomic, so any thread may hold and use it.
unsafe impl Send for Statistics {}
// SAFETY: as above.
unsafe impl Sync for Statistics {}

impl Statistics {
    /// Maps a page for reading and writing.
    ///
    /// # Errors
    /// If the file is too short (`EINVAL`), can still shrink (`EPERM`: reading it might then fault), or cannot be mapped.
    pub fn map(file: impl AsFd) -> Result<Self, rustix::io::Errno> {
        use rustix::fs::SealFlags;
        // In this order: once sealed, its size stays what it is found to be.
        if !rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(rustix::io::Errno::PERM);
        }
        if rustix::fs::fstat(&file)?.st_size.cast_unsigned() < STATISTICS_BYTES {
            return Err(rustix::io::Errno::INVAL);
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address the kernel chooses, over a file that has at least these bytes and is
        // sealed against shrinking. Other processes may write to it at any time, which is why all in `Page` is atomic.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), size_of::<Page>(), protection, MapFlags::SHARED, file, 0)
        }?;
        NonNull::new(at.cast()).map(Self).ok_or(rustix::io::Errno::FAULT)
    }
}

#[cfg(test)]
impl Statistics {
    /// A page of its own, as init makes one.
    pub(crate) fn page() -> Arc<Self> {
        use rustix::fs::{MemfdFlags, SealFlags};
        let fd = rustix::fs::memfd_create("statistics", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, STATISTICS_BYTES).unwrap();
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        Arc::new(Self::map(&fd).unwrap())
    }
}

impl std::ops::Deref for Statistics {
    type Target = Page;

    fn deref(&self) -> &Page {
        // SAFETY: mapped by `map` for `size_of::<Page>()` bytes, page-aligned, until `drop`; any bytes are valid atomics.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference outlives `self`. A failure leaves it mapped: harmless.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), size_of::<Page>()) };
    }
}

/// Adds one now and takes it away again when dropped: for what is counted while it lasts.
#[derive(Debug)]
pub struct While {
    page: Arc<Statistics>,
    counter: fn(&Page) -> &AtomicU64,
}

impl While {
    /// Counts from now on.
    #[must_use]
    pub fn counted(page: &Arc<Statistics>, counter: fn(&Page) -> &AtomicU64) -> Self {
        counter(page).fetch_add(1, Ordering::Relaxed);
        Self { page: Arc::clone(page), counter }
    }
}

impl Drop for While {
    fn drop(&mut self) {
        (self.counter)(&self.page).fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, SealFlags};

    #[test]
    fn what_one_mapping_writes_another_reads() {
        let fd = rustix::fs::memfd_create("s", MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(Statistics::map(&fd).is_err(), "could still shrink under the reader");
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        assert!(Statistics::map(&fd).is_err(), "too short");
        rustix::fs::ftruncate(&fd, STATISTICS_BYTES).unwrap();
        let (writer, reader) = (Arc::new(Statistics::map(&fd).unwrap()), Statistics::map(&fd).unwrap());
        let inside = While::counted(&writer, |page| &page.worker.inside);
        writer.branes[MAX_BRANES - 1].traps.fetch_add(3, Ordering::Relaxed);
        assert_eq!(reader.worker.inside.load(Ordering::Relaxed), 1);
        assert_eq!(reader.branes[MAX_BRANES - 1].traps.load(Ordering::Relaxed), 3);
        drop(inside);
        assert_eq!(reader.worker.inside.load(Ordering::Relaxed), 0);
    }
}
