//! Large files, written piece by piece: into a temporary one that gets its name when all of it is on the disk.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::disk::{Dir, Handle};
use crate::state::taken;
use crate::{Error, Shared};

/// A temporary file with the room that is promised to it. Dropping it leaves nothing.
pub(crate) struct Staged {
    shared: Arc<Shared>,
    dir: Dir,
    temporary: String,
    handle: Option<Box<dyn Handle>>,
    bytes: u64,
    limit: u64,
}

impl Staged {
    pub(crate) fn new(shared: Arc<Shared>, dir: Dir, limit: u64) -> Result<Self, Error> {
        let mut state = shared.state();
        state.settled()?;
        state.reserve(dir, taken(0))?;
        let temporary = state.temporary();
        drop(state);
        let mut staged = Self { shared, dir, temporary, handle: None, bytes: 0, limit };
        let created = staged.shared.disk.create(dir, &staged.temporary);
        staged.handle =
            Some(created.map_err(|e| staged.shared.state().failed("making a temporary file", taken(0), e))?);
        Ok(staged)
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let failed = || Error::Io {
            step: "writing what could not be written before".to_owned(),
            source: std::io::ErrorKind::BrokenPipe.into(),
        };
        // Taken out, so that nothing follows what could not be written.
        let mut handle = self.handle.take().ok_or_else(failed)?;
        let size = self.bytes.saturating_add(bytes.len() as u64);
        if size > self.limit {
            return Err(Error::TooLarge { what: self.dir.name().to_owned(), limit: self.limit });
        }
        let more = taken(size) - taken(self.bytes);
        if more > 0 {
            self.shared.state().reserve(self.dir, more)?;
        }
        self.bytes = size;
        handle.append(bytes).map_err(|e| self.shared.state().failed("writing a temporary file", more, e))?;
        self.handle = Some(handle);
        Ok(())
    }

    /// Gives it its name. Durable when it returns.
    pub(crate) fn put_in_place(mut self, name: &str) -> Result<(), Error> {
        let failed =
            || Error::Io { step: "finishing a file".to_owned(), source: std::io::ErrorKind::BrokenPipe.into() };
        let handle = self.handle.as_ref().ok_or_else(failed)?;
        // The long part, while others may go on.
        handle.sync().map_err(|e| self.shared.state().failed("making a file durable", taken(self.bytes), e))?;
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state();
        state.settled()?;
        // Whether that works or not, the temporary name is gone, or left to whoever opens the store next.
        let temporary = std::mem::take(&mut self.temporary);
        state.put_in_place(self.dir, &temporary, name, self.bytes)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.handle = None;
        if !self.temporary.is_empty() {
            // Without a caller: what cannot be removed is when the store is opened the next time.
            let _ = self.shared.disk.remove(self.dir, &self.temporary);
        }
        let mut state = self.shared.state();
        state.pending = state.pending.saturating_sub(taken(self.bytes));
    }
}

/// A component on its way into the store. Dropped, it leaves nothing; after an error it can only be dropped.
pub struct Upload {
    staged: Staged,
    hash: Sha256,
}

impl Upload {
    pub(crate) fn new(staged: Staged) -> Self {
        Self { staged, hash: Sha256::new() }
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.staged.bytes
    }

    /// Adds the next bytes. Blocks on the disk.
    ///
    /// # Errors
    /// [`Error::TooLarge`] beyond [`Limits::component_bytes`](crate::Limits::component_bytes), [`Error::Full`], [`Error::Io`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.staged.append(bytes)?;
        self.hash.update(bytes);
        Ok(())
    }

    /// Puts it into the store. Durable when it returns. If the store has it already, it is written again: what it had may have been
    /// damaged meanwhile.
    ///
    /// # Errors
    /// [`Error::Differs`] if it is not what was expected, [`Error::Full`], [`Error::Unsettled`], [`Error::Io`].
    pub fn finish(self, expected: Option<Digest>) -> Result<Digest, Error> {
        let found = Digest::finished(self.hash);
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(Error::Differs { expected, found });
        }
        self.staged.put_in_place(&found.hex())?;
        Ok(found)
    }
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}
