//! Arbitrary bytes as a sequence of calls, with everything checked that must always hold.
//!
//! Part of the library, though hidden, because a fuzz target is a crate of its own and could not reach a test's files;
//! and not behind a feature, so that what is fuzzed is compiled as what is shipped. Nothing else calls it, so no program
//! carries it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{
    Budget, CHUNK, Descriptor, DescriptorFlags, DirectoryEntryStream, Limits, NewTimestamp, OpenFlags, PathFlags,
    Reaper, Time, Tmp,
};

/// A budget that counts what is taken.
#[derive(Debug)]
pub struct Counted {
    taken: AtomicU64,
    most: AtomicU64,
}

impl Counted {
    /// Of `most` bytes.
    #[must_use]
    pub fn of(most: u64) -> Self {
        Self { taken: AtomicU64::new(0), most: AtomicU64::new(most) }
    }

    /// Bytes taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Sets how many bytes there are, more or fewer than are taken.
    pub fn set(&self, most: u64) {
        self.most.store(most, Ordering::Relaxed);
    }
}

impl Budget for Counted {
    fn take(&self, bytes: u64) -> bool {
        let most = self.most.load(Ordering::Relaxed);
        let more = |taken: u64| taken.checked_add(bytes).filter(|taken| *taken <= most);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        let before = self.taken.fetch_sub(bytes, Ordering::Relaxed);
        assert!(before >= bytes, "{bytes} bytes given back of {before}");
    }
}

/// Parts of paths: few names, so that they meet, and what is special.
const PARTS: [&str; 16] =
    ["a", "b", "c", "d", "a/", "b/c", ".", "..", "a/..", "c/./d", "//", "é", "", "/", "\0", "d/a/b"];

struct Input<'b>(&'b [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let byte = self.0.split_off_first().copied();
        byte.unwrap_or_default()
    }

    fn path(&mut self) -> String {
        let byte = self.byte();
        let part = PARTS[usize::from(byte % 16)];
        match byte / 16 {
            0..12 => part.to_owned(),
            12..14 => format!("{part}/{}", PARTS[usize::from(self.byte() % 16)]),
            14 => "n".repeat(usize::from(self.byte()) + 128),
            _ => "a/".repeat(usize::from(self.byte()) * 16),
        }
    }

    /// Around the edges of chunks, mostly.
    fn position(&mut self) -> u64 {
        let [kind, near] = [self.byte(), self.byte()];
        let chunk = CHUNK as u64;
        match kind % 8 {
            0..3 => u64::from(near),
            3..6 => (u64::from(kind / 8 % 6) * chunk + u64::from(near)).saturating_sub(128),
            6 => u64::from(near) * 1024,
            _ => u64::MAX >> (near % 64),
        }
    }

    fn time(&mut self) -> NewTimestamp {
        match self.byte() {
            0..80 => NewTimestamp::NoChange,
            80..160 => NewTimestamp::Now,
            byte => NewTimestamp::Timestamp(Time { seconds: self.position(), nanoseconds: u32::from(byte) << 24 }),
        }
    }
}

/// Whatever the guest holds.
struct Guest {
    tmp: Tmp,
    root: Descriptor,
    open: Vec<Descriptor>,
    listings: Vec<DirectoryEntryStream>,
    now: Time,
    /// All that is written in one life of the file system, so that what was left by another is recognized.
    life: u8,
}

const OPEN: usize = 16;

impl Guest {
    fn pick(&self, input: &mut Input<'_>) -> Descriptor {
        let all = std::iter::once(&self.root).chain(&self.open);
        all.cycle().nth(usize::from(input.byte()) % (self.open.len() + 1)).unwrap_or(&self.root).clone()
    }

    fn keep(&mut self, descriptor: Descriptor, input: &mut Input<'_>) {
        if self.open.len() < OPEN {
            self.open.push(descriptor);
        } else {
            self.open[usize::from(input.byte()) % OPEN] = descriptor;
        }
    }

    fn write(&self, file: &Descriptor, input: &mut Input<'_>) {
        let position = input.position();
        let bytes = vec![self.life; usize::try_from(input.position()).unwrap_or(CHUNK).min(2 * CHUNK)];
        let used = self.tmp.used_bytes();
        let size = file.stat().map(|stat| stat.size);
        match file.write(&bytes, position, self.now) {
            Ok(n) => assert_eq!(n, bytes.len() as u64, "a write was shortened"),
            Err(error) => {
                assert_eq!(self.tmp.used_bytes(), used, "{error}, but the quota changed");
                assert_eq!(file.stat().map(|stat| stat.size), size, "{error}, but the size changed");
            }
        }
    }

    fn read(&self, file: &Descriptor, input: &mut Input<'_>) {
        let (length, position) = (input.position(), input.position());
        if let Ok((bytes, end)) = file.read(length, position) {
            assert_eq!(end, bytes.is_empty());
            assert!(bytes.len() as u64 <= length.min(CHUNK as u64), "more was read than asked for");
            let foreign = bytes.iter().find(|byte| ![0, self.life].contains(byte));
            assert_eq!(foreign, None, "what another life left was read");
        }
    }

    fn list(&mut self) {
        let Some(listing) = self.listings.last_mut() else { return };
        let mut before: Option<String> = None;
        while let Ok(Some(entry)) = listing.read_directory_entry() {
            assert!(before.is_none_or(|before| before < entry.name), "not sorted");
            before = Some(entry.name);
        }
        self.listings.pop();
    }

    /// One call. What it answers is of no interest here, but that it answers.
    fn call(&mut self, input: &mut Input<'_>) {
        let now = self.now;
        let code = input.byte();
        let at = self.pick(input);
        let flags = PathFlags::from_bits_truncate(code >> 7);
        let answered = match code % 24 {
            0..5 => {
                let open_flags = OpenFlags::from_bits_truncate(input.byte());
                let descriptor_flags = DescriptorFlags::from_bits_truncate(input.byte());
                let opened = at.open_at(flags, &input.path(), open_flags, descriptor_flags, now);
                opened.map(|opened| self.keep(opened, input))
            }
            5..8 => {
                self.write(&at, input);
                at.advise()
            }
            8 => at.append(&[self.life; 300], now),
            9..11 => {
                self.read(&at, input);
                at.check_readable()
            }
            11 => at.set_size(input.position(), now),
            12 => at.create_directory_at(&input.path(), now),
            13 => at.remove_directory_at(&input.path(), now),
            14 => at.unlink_file_at(&input.path(), now),
            15 => {
                let (other, old) = (self.pick(input), input.path());
                at.rename_at(&old, &other, &input.path(), now)
            }
            16 => {
                let (other, old) = (self.pick(input), input.path());
                at.link_at(flags, &old, &other, &input.path(), now)
            }
            17 => {
                let target = input.path();
                at.symlink_at(&target, &input.path(), now)
            }
            18 => {
                let path = input.path();
                let hash = at.metadata_hash_at(flags, &path);
                if let Ok(target) = at.readlink_at(&path) {
                    assert!(!target.starts_with('/'), "{path:?} leads outside");
                }
                at.stat_at(flags, &path).map(|stat| assert!(hash.is_ok(), "{stat:?} has no hash"))
            }
            19 => at.set_times(input.time(), input.time(), now),
            20 => {
                let path = input.path();
                at.set_times_at(flags, &path, input.time(), input.time(), now)
            }
            21 => {
                self.list();
                at.read_directory().map(|listing| {
                    self.listings.truncate(OPEN);
                    self.listings.push(listing);
                })
            }
            22 if !self.open.is_empty() => {
                self.open.swap_remove(usize::from(input.byte()) % self.open.len());
                Ok(())
            }
            _ if code > 250 => {
                self.tmp.clear(now);
                self.life = self.life % 250 + 1;
                at.sync()
            }
            _ => at.get_flags().and_then(|_| at.sync_data()),
        };
        // The root answers whatever happened.
        let root = self.root.stat();
        assert!(root.is_ok(), "{answered:?}, and the root is {root:?}");
        self.now.seconds += 1;
    }
}

/// Does what `bytes` say, on a file system of 500 KB and 60 nodes.
///
/// # Panics
/// If anything is not as it must be.
pub fn exercise(bytes: &[u8]) {
    let input = &mut Input(bytes);
    let limits = Limits { quota: 500_000, nodes: 60 };
    let budget = Arc::new(Counted::of(u64::from(input.byte()) * 8192));
    let reaper = Reaper::new(Arc::<Counted>::clone(&budget), usize::from(input.byte() % 4));
    let tmp = Tmp::new(limits, &reaper);
    let root = tmp.root();
    let mut guest = Guest { tmp, root, open: Vec::new(), listings: Vec::new(), now: Time::default(), life: 1 };
    while !input.0.is_empty() {
        guest.call(input);
        assert!(guest.tmp.used_bytes() <= limits.quota);
        assert_eq!(budget.taken(), guest.tmp.held_bytes() + reaper.held_bytes());
        if guest.now.seconds.is_multiple_of(16) {
            assert!(guest.tmp.is_consistent());
            let _more = reaper.free_some(1);
        }
    }
    assert!(guest.tmp.is_consistent());
    drop(guest);
    while reaper.free_some(8) {}
    assert!(reaper.held_bytes() <= 3 * CHUNK as u64, "only spare chunks are left");
    drop(reaper);
    assert_eq!(budget.taken(), 0);
}
