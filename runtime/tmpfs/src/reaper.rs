//! Host memory: who pays for it, and who frees it when nobody is waiting.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ErrorCode;
use crate::tree::{BLOCK_BYTES, Body, DIRECTORY_BYTES, Entry, Node, entry_bytes};

/// Bytes of a chunk, the unit in which contents are stored.
///
/// What one guest call moves at most, so that a call touches two chunks, and sixteen of the kernel's pages, so that
/// the list of a file's chunks is 1/8192 of it. Smaller files pay less: see [`PIECE`].
pub const CHUNK: usize = 64 * 1024;

/// Bytes of the smallest first chunk of a file. It doubles as the file grows, up to [`CHUNK`]; the chunks behind the
/// first are whole. So a file of n bytes holds at most 2 n, or this.
pub const PIECE: usize = 256;

pub(crate) type Chunk = Box<[u8; CHUNK]>;

/// Bytes that a list of chunks takes for each.
pub(crate) const PLACE: usize = size_of::<Option<Chunk>>();

/// How much cheaper it is to forget a name than to free a chunk (0.1 µs to 2 µs).
const STEPS: usize = 16;

/// How far a guest's demand for a chunk digs in what waits to be freed, in steps, before a fresh one is made.
const DIG: usize = 256;

/// The host's memory, shared by many file systems.
///
/// Called with locks of this crate held: it must answer at once and must not call back.
pub trait Budget: Send + Sync {
    /// Takes `bytes`, all or none; false if they are not to be had.
    fn take(&self, bytes: u64) -> bool;
    /// Gives back what was taken.
    fn give_back(&self, bytes: u64);
}

/// A budget that never refuses.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unlimited;

impl Budget for Unlimited {
    fn take(&self, _: u64) -> bool {
        true
    }

    fn give_back(&self, _: u64) {}
}

/// Makes an empty chunk. Zeroed by the allocator, which knows when the pages come fresh from the kernel.
fn fresh() -> Option<Chunk> {
    vec![0; CHUNK].into_boxed_slice().try_into().ok()
}

/// A chunk that holds zeros only. There is no other way to make one than [`Zeroed::wipe`].
struct Zeroed(Chunk);

impl Zeroed {
    fn wipe(mut chunk: Chunk) -> Self {
        chunk.fill(0);
        Self(chunk)
    }
}

/// What a file system was, and no longer is.
#[derive(Default)]
pub(crate) struct Remains {
    /// Nodes, the last block dismantled from its front up to `at`.
    pub(crate) blocks: Vec<Box<[Node]>>,
    pub(crate) at: usize,
    /// Of one directory.
    pub(crate) entries: BTreeMap<Box<str>, Entry>,
    /// Of one file.
    pub(crate) chunks: Vec<Option<Chunk>>,
}

/// What waits to be freed, and zeroed chunks for whoever comes next.
struct Pile {
    budget: Arc<dyn Budget>,
    dead: Vec<Remains>,
    spare: Vec<Zeroed>,
    spare_max: usize,
    held: u64,
}

impl Pile {
    fn give_back(&mut self, bytes: u64) {
        self.held -= bytes;
        self.budget.give_back(bytes);
    }

    /// Keeps a chunk, wiped, while there are fewer than `keep`; frees it otherwise.
    fn bury(&mut self, chunk: Chunk, keep: usize) {
        if self.spare.len() < keep {
            self.spare.push(Zeroed::wipe(chunk));
        } else {
            drop(chunk);
            self.give_back(CHUNK as u64);
        }
    }

    /// Frees the next thing and returns how many steps that was worth; `None` if there is none.
    fn step(&mut self, keep: usize) -> Option<usize> {
        let mut remains = self.dead.pop()?;
        let mut steps = 1;
        if remains.chunks.capacity() > 0 {
            match remains.chunks.pop() {
                Some(Some(chunk)) => {
                    self.bury(chunk, keep);
                    steps = STEPS;
                }
                Some(None) => {}
                None => {
                    let table = std::mem::take(&mut remains.chunks);
                    self.give_back((table.capacity() * PLACE) as u64);
                }
            }
        } else if let Some((name, _)) = remains.entries.pop_first() {
            self.give_back(entry_bytes(&name));
        } else if let Some(node) = remains.blocks.last_mut().and_then(|block| block.get_mut(remains.at)) {
            remains.at += 1;
            match std::mem::take(&mut node.body) {
                Body::Free(_) => {}
                Body::File(content) => {
                    let (head, rest) = content.into_parts();
                    remains.chunks = rest;
                    match Chunk::try_from(head) {
                        Ok(chunk) => self.bury(chunk, keep),
                        Err(head) => self.give_back(head.len() as u64),
                    }
                }
                Body::Directory(directory) => {
                    remains.entries = directory.entries;
                    self.give_back(DIRECTORY_BYTES);
                }
                Body::Link(target) => self.give_back(target.len() as u64),
            }
        } else if remains.blocks.pop().is_some() {
            remains.at = 0;
            self.give_back(BLOCK_BYTES);
        } else {
            return Some(steps);
        }
        self.dead.push(remains);
        Some(steps)
    }
}

impl Drop for Pile {
    fn drop(&mut self) {
        self.budget.give_back(self.held);
    }
}

/// Frees what file systems leave behind, when the caller has time for it, and keeps some chunks for the next.
///
/// One per worker: all of its file systems pay from the same budget and share the spare chunks. A clone is another
/// handle to the same reaper.
///
/// ```
/// let reaper = gaia_tmpfs::Reaper::new(std::sync::Arc::new(gaia_tmpfs::Unlimited), 64);
/// // between two requests:
/// while reaper.free_some(32) {}
/// assert_eq!(reaper.held_bytes(), 0);
/// ```
#[derive(Clone)]
pub struct Reaper {
    pile: Arc<Mutex<Pile>>,
    budget: Arc<dyn Budget>,
}

impl fmt::Debug for Reaper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reaper").field("held_bytes", &self.held_bytes()).finish_non_exhaustive()
    }
}

impl Reaper {
    /// A reaper that keeps up to `spare_chunks` zeroed chunks of [`CHUNK`] bytes, which stay taken from the budget.
    #[must_use]
    pub fn new(budget: Arc<dyn Budget>, spare_chunks: usize) -> Self {
        let pile =
            Pile { budget: Arc::clone(&budget), dead: Vec::new(), spare: Vec::new(), spare_max: spare_chunks, held: 0 };
        Self { pile: Arc::new(Mutex::new(pile)), budget }
    }

    fn pile(&self) -> MutexGuard<'_, Pile> {
        self.pile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees at most `max_chunks` chunks, or as much else as takes that long (a few µs each). True if there is more.
    #[must_use = "true says that there is more to free"]
    pub fn free_some(&self, max_chunks: usize) -> bool {
        let mut pile = self.pile();
        let keep = pile.spare_max;
        let mut left = max_chunks.saturating_mul(STEPS);
        while left > 0 {
            match pile.step(keep) {
                Some(steps) => left = left.saturating_sub(steps),
                None => return false,
            }
        }
        !pile.dead.is_empty()
    }

    /// Bytes that wait to be freed, and those of the spare chunks.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.pile().held
    }

    /// Frees one thing, even a spare chunk. False if nothing is left.
    fn free_one(&self) -> bool {
        let mut pile = self.pile();
        if pile.spare.pop().is_some() {
            pile.give_back(CHUNK as u64);
            return true;
        }
        pile.step(0).is_some()
    }

    /// A wiped chunk, already paid for, if one is near.
    fn recycled(&self) -> Option<Chunk> {
        let mut pile = self.pile();
        let keep = pile.spare_max.max(1);
        let mut left = DIG;
        while pile.spare.is_empty() && left > 0 {
            left = left.saturating_sub(pile.step(keep)?);
        }
        let Zeroed(chunk) = pile.spare.pop()?;
        pile.held -= CHUNK as u64;
        Some(chunk)
    }
}

/// What one file system holds of the host's memory.
pub(crate) struct Ledger {
    reaper: Reaper,
    held: u64,
}

impl Ledger {
    pub(crate) fn new(reaper: Reaper) -> Self {
        Self { reaper, held: 0 }
    }

    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// Takes `bytes`. What only waits to be freed is freed before anybody is refused.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<(), ErrorCode> {
        while !self.reaper.budget.take(bytes) {
            if !self.reaper.free_one() {
                return Err(ErrorCode::InsufficientSpace);
            }
        }
        self.held += bytes;
        Ok(())
    }

    pub(crate) fn give_back(&mut self, bytes: u64) {
        self.held -= bytes;
        self.reaper.budget.give_back(bytes);
    }

    /// A whole chunk of zeros.
    pub(crate) fn chunk(&mut self) -> Result<Chunk, ErrorCode> {
        if let Some(chunk) = self.reaper.recycled() {
            self.held += CHUNK as u64;
            return Ok(chunk);
        }
        self.take(CHUNK as u64)?;
        fresh().ok_or(ErrorCode::InsufficientSpace)
    }

    /// A first chunk of `len` zeros.
    pub(crate) fn piece(&mut self, len: usize) -> Result<Box<[u8]>, ErrorCode> {
        if len == CHUNK {
            return Ok(self.chunk()?);
        }
        self.take(len as u64)?;
        Ok(vec![0; len].into_boxed_slice())
    }

    /// Gives up a first chunk.
    pub(crate) fn bury_piece(&mut self, piece: Box<[u8]>) {
        match Chunk::try_from(piece) {
            Ok(chunk) => self.bury_chunks(vec![Some(chunk)], false),
            Err(piece) => self.give_back(piece.len() as u64),
        }
    }

    /// Gives up chunks and the list they are in, which may have been `paid` for before.
    pub(crate) fn bury_chunks(&mut self, chunks: Vec<Option<Chunk>>, paid: bool) {
        let list = (chunks.capacity() * PLACE) as u64;
        let whole = (chunks.iter().flatten().count() * CHUNK) as u64;
        if whole == 0 || !(paid || self.take(list).is_ok()) {
            drop(chunks);
            return self.give_back(if paid { whole + list } else { whole });
        }
        self.held -= whole + list;
        let mut pile = self.reaper.pile();
        pile.held += whole + list;
        pile.dead.push(Remains { chunks, ..Remains::default() });
    }

    /// Gives up everything at once, in the time of moving a pointer.
    pub(crate) fn bury(&mut self, remains: Remains) {
        let mut pile = self.reaper.pile();
        pile.held += std::mem::take(&mut self.held);
        pile.dead.push(remains);
    }
}
