//! A worker's counters and its log in shared memory: the worker writes, control reads, and what a worker leaves behind
//! when it is killed can still be read.
//!
//! ```text
//! 0        256                                                            131,072                1,179,776  1,183,744
//! │ worker │ brane 0 (128 bytes) │ brane 1 │ …                  brane 1,021 │ log: cursors │ records │        │ profile of brane 0 │ …
//! ```
//!
//! The kernel gives memory to the pages that are touched, so what is not used costs nothing. Of the profiles a worker maps as many
//! as it has branes, and control none: it reads them by position, which touches nothing either.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gaia_init::supervise::STATISTICS_BYTES;
use rustix::mm::{MapFlags, ProtFlags};

use crate::histogram::Histogram;
use crate::log::Ring;
use crate::{histogram, stacks};

/// Branes that have a row.
pub const MAX_BRANES: usize = 1022;

/// The statuses of answers that the runtime gives itself. That of a head which is too long, 431, is the HTTP server's own.
pub const OWN_STATUSES: [u16; 8] = [400, 404, 413, 500, 501, 502, 503, 504];

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
    /// Answers the runtime gave itself, by status: [`OWN_STATUSES`].
    pub own: [AtomicU64; OWN_STATUSES.len()],
    reserved: [AtomicU64; 13],
}

impl Worker {
    /// Counts an answer that the runtime gave itself.
    pub fn answered_itself(&self, status: u16) {
        if let Some(count) = OWN_STATUSES.iter().position(|own| *own == status).and_then(|at| self.own.get(at)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
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
    /// Answers of 500 and above, the guest's and the runtime's own.
    pub failed: AtomicU64,
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

/// How long and how large the work of one brane in one worker is, and where it is at. There is one writer to it.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Profile {
    /// Requests whose work in an instance has ended. All that follow are counted then.
    pub finished: AtomicU64,
    reserved: [AtomicU64; 7],
    /// From dispatch to the guest's first instruction, in nanoseconds; of a pinned brane, its instances' starts.
    pub cold: Histogram,
    /// Wall time in the guest, in nanoseconds.
    pub exec: Histogram,
    /// Processor time, in nanoseconds.
    pub cpu: Histogram,
    /// What the instance held when it ended, or of a pinned brane when the request did, as `mem_max` counts it: memories, tables,
    /// and what the host held for it. In bytes.
    pub mem: Histogram,
    /// Where its instances were when ticks came.
    pub stacks: stacks::Tree,
}

/// Words of a profile before its histograms, and up to its stacks.
const PROFILE_HEAD: usize = 8;
const PROFILE_STACKS: usize = PROFILE_HEAD + 4 * histogram::WORDS;
/// Where the profiles begin, in bytes.
const PROFILES: u64 = (size_of::<Page>() as u64).next_multiple_of(4096);

const _: () = assert!(size_of::<Worker>() == 256 && size_of::<Brane>() == 128);
const _: () = assert!(PROFILES + (size_of::<Profile>() * MAX_BRANES) as u64 == STATISTICS_BYTES);
const _: () = assert!(std::mem::offset_of!(Profile, stacks) == PROFILE_STACKS * 8);

impl Profile {
    /// Counts a request whose work has ended.
    pub fn record(&self, exec: Duration, cpu: Duration, mem: u64) {
        self.exec.record(histogram::nanos(exec));
        self.cpu.record(histogram::nanos(cpu));
        self.mem.record(mem);
        histogram::add(&self.finished, 1);
    }
}

/// The profiles of a worker's branes, mapped for their writer.
#[derive(Debug)]
pub struct Profiles {
    at: NonNull<Profile>,
    branes: usize,
}

// SAFETY: everything in a profile is atomic, so any thread may hold and use it.
unsafe impl Send for Profiles {}
// SAFETY: as above.
unsafe impl Sync for Profiles {}

impl Profiles {
    /// Maps those of so many branes.
    ///
    /// # Errors
    /// As [`Statistics::map`].
    pub fn map(file: impl AsFd, branes: usize) -> Result<Self, rustix::io::Errno> {
        is_whole(&file)?;
        // One at least: nothing cannot be mapped.
        let branes = branes.clamp(1, MAX_BRANES);
        // SAFETY: as in `Statistics::map`; the bytes from `PROFILES` on are there, as is checked above.
        let at = unsafe {
            let length = branes * size_of::<Profile>();
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                PROFILES,
            )
        }?;
        Ok(Self { at: NonNull::new(at.cast()).ok_or(rustix::io::Errno::FAULT)?, branes })
    }

    /// That of the brane with this place.
    #[must_use]
    pub fn of(&self, index: usize) -> Option<&Profile> {
        // SAFETY: mapped by `map` for so many, page-aligned as `Profile` wants it, until `drop`; any bytes are valid atomics.
        (index < self.branes).then(|| unsafe { self.at.add(index).as_ref() })
    }
}

impl Drop for Profiles {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference outlives `self`. A failure leaves it mapped: harmless.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.branes * size_of::<Profile>()) };
    }
}

/// Reads words of a brane's profile by position: no page of it that was not touched is touched by this. What is not there is 0.
fn words(file: impl AsFd, brane: usize, first: usize, number: usize) -> Vec<u64> {
    let mut bytes = vec![0; number * 8];
    let at = PROFILES + (brane * size_of::<Profile>() + first * 8) as u64;
    let mut read = 0;
    while brane < MAX_BRANES && read < bytes.len() {
        match rustix::io::pread(&file, &mut bytes[read..], at + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

/// How many requests of a brane have finished, by its worker's page.
#[must_use]
pub fn finished(file: impl AsFd, brane: usize) -> u64 {
    words(file, brane, 0, 1)[0]
}

/// The distributions of a brane in its worker's page: cold, exec, cpu, mem.
#[must_use]
pub fn distributions(file: impl AsFd, brane: usize) -> [histogram::Counts; 4] {
    let all = words(file, brane, PROFILE_HEAD, 4 * histogram::WORDS);
    std::array::from_fn(|at| histogram::Counts::of(&all[at * histogram::WORDS..][..histogram::WORDS]))
}

/// The stacks of a brane in its worker's page.
#[must_use]
pub fn sampled(file: impl AsFd, brane: usize) -> stacks::Stacks {
    stacks::Stacks::of(&words(file, brane, PROFILE_STACKS, stacks::WORDS))
}

/// Whether the file has the bytes that it must have, and cannot lose them.
fn is_whole(file: impl AsFd) -> Result<(), rustix::io::Errno> {
    use rustix::fs::SealFlags;
    // In this order: once sealed, its size stays what it is found to be.
    if !rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
        return Err(rustix::io::Errno::PERM);
    }
    if rustix::fs::fstat(&file)?.st_size.cast_unsigned() < STATISTICS_BYTES {
        return Err(rustix::io::Errno::INVAL);
    }
    Ok(())
}

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
        is_whole(&file)?;
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
        Arc::new(Self::map(Self::file()).unwrap())
    }

    /// The profiles of so many branes.
    pub(crate) fn profiles(branes: usize) -> Arc<Profiles> {
        Arc::new(Profiles::map(Self::file(), branes).unwrap())
    }

    pub(crate) fn file() -> std::os::fd::OwnedFd {
        use rustix::fs::{MemfdFlags, SealFlags};
        let fd = rustix::fs::memfd_create("statistics", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, STATISTICS_BYTES).unwrap();
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        fd
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

    /// Would miss: a reader by position that looks elsewhere than the writer wrote, or that takes memory by looking.
    #[test]
    fn what_a_worker_counts_is_read_by_position_and_reading_takes_no_memory() {
        let fd = Statistics::file();
        let blocks = || rustix::fs::fstat(&fd).unwrap().st_blocks;
        let profiles = Profiles::map(&fd, 3).unwrap();
        assert!(profiles.of(3).is_none());
        for brane in 0..MAX_BRANES {
            assert_eq!(finished(&fd, brane), 0);
            assert_eq!(distributions(&fd, brane), <[histogram::Counts; 4]>::default());
            assert_eq!(sampled(&fd, brane), stacks::Stacks::default());
        }
        assert_eq!((blocks(), finished(&fd, MAX_BRANES)), (0, 0));
        let profile = profiles.of(2).unwrap();
        profile.cold.record(7);
        profile.record(Duration::from_micros(42), Duration::from_micros(8), 1 << 20);
        assert_eq!(finished(&fd, 2), 1);
        let [cold, exec, cpu, mem] = distributions(&fd, 2).map(|of| (of.count(), of.max));
        assert_eq!([cold, exec, cpu, mem], [(1, 7), (1, 42_000), (1, 8_000), (1, 1 << 20)]);
        assert_eq!(finished(&fd, 1), 0);
        // Of 140 KiB, what was touched.
        assert!((1..=10 * 8).contains(&blocks()), "{} blocks", blocks());
    }
}
