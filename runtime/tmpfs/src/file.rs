//! The contents of one file: chunks, and holes that cost nothing.

use crate::ErrorCode;
use crate::reaper::{CHUNK, Chunk, Ledger, PIECE, PLACE};

/// What a file holds. Whatever lies behind its size or in a hole is zero.
#[derive(Default)]
pub(crate) struct Content {
    size: u64,
    /// Chunk 0 up to the last byte that was written: empty, or 2ⁿ bytes from [`PIECE`] to [`CHUNK`].
    head: Box<[u8]>,
    /// Chunks 1 and following, as far as any was written.
    rest: Vec<Option<Chunk>>,
}

/// Bytes of the first chunk that `extent` bytes need.
fn piece_len(extent: usize) -> usize {
    if extent == 0 { 0 } else { extent.next_power_of_two().max(PIECE) }
}

/// In which chunk a byte lies, and where in it. The callers keep positions below the quota, which an address fits in.
fn place(position: u64) -> (usize, usize) {
    let chunk = usize::try_from(position / CHUNK as u64).unwrap_or(usize::MAX);
    let within = usize::try_from(position % CHUNK as u64).unwrap_or_default();
    (chunk, within)
}

impl Content {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn into_parts(self) -> (Box<[u8]>, Vec<Option<Chunk>>) {
        (self.head, self.rest)
    }

    /// The bytes of a chunk that exist; what is behind them is a hole.
    fn chunk(&self, index: usize) -> &[u8] {
        match index.checked_sub(1) {
            None => &self.head,
            Some(index) => self.rest.get(index).and_then(Option::as_ref).map_or(&[], |chunk| &chunk[..]),
        }
    }

    /// Passes `n` bytes from `position` on, which lie within the size, piece by piece; holes as their length.
    pub(crate) fn pieces(&self, mut position: u64, mut n: usize, mut take: impl FnMut(&[u8], usize)) {
        while n > 0 {
            let (index, from) = place(position);
            let here = n.min(CHUNK - from);
            let there = self.chunk(index);
            let bytes = there.get(from..there.len().min(from + here)).unwrap_or_default();
            take(bytes, here - bytes.len());
            position += here as u64;
            n -= here;
        }
    }

    /// Makes the head at least `extent` bytes.
    fn grow_head(&mut self, extent: usize, ledger: &mut Ledger) -> Result<(), ErrorCode> {
        let len = piece_len(extent);
        if len > self.head.len() {
            let mut head = ledger.piece(len)?;
            head[..self.head.len()].copy_from_slice(&self.head);
            ledger.bury_piece(std::mem::replace(&mut self.head, head));
        }
        Ok(())
    }

    /// Makes the list of chunks at least `len` long.
    fn grow_list(&mut self, len: usize, ledger: &mut Ledger) -> Result<(), ErrorCode> {
        let before = self.rest.capacity();
        if len > before {
            // Doubled, so that appending stays linear.
            let capacity = len.max(before.saturating_mul(2)).max(4);
            ledger.take((capacity * PLACE) as u64)?;
            let mut rest = Vec::with_capacity(capacity);
            rest.append(&mut self.rest);
            self.rest = rest;
            ledger.give_back((before * PLACE) as u64);
        }
        if len > self.rest.len() {
            self.rest.resize_with(len, || None);
        }
        Ok(())
    }

    /// Writes all of `bytes` at `position`, or nothing.
    pub(crate) fn write(&mut self, position: u64, bytes: &[u8], ledger: &mut Ledger) -> Result<(), ErrorCode> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = position + bytes.len() as u64;
        let (first, from) = place(position);
        let (last, last_byte) = place(end - 1);
        if first == 0 {
            self.grow_head(if last == 0 { last_byte + 1 } else { CHUNK }, ledger)?;
        }
        if last > 0 {
            let length = self.rest.len();
            self.grow_list(length.max(last), ledger)?;
            let mut made = Vec::new();
            for index in first.max(1) - 1..last {
                if self.rest[index].is_none() {
                    match ledger.chunk() {
                        Ok(chunk) => {
                            self.rest[index] = Some(chunk);
                            made.push(index);
                        }
                        Err(error) => {
                            let unmade = made.into_iter().map(|index| self.rest[index].take()).collect();
                            ledger.bury_chunks(unmade, false);
                            self.rest.truncate(length);
                            return Err(error);
                        }
                    }
                }
            }
        }
        let mut left = bytes;
        let (mut index, mut at) = (first, from);
        while !left.is_empty() {
            let n = left.len().min(CHUNK - at);
            let (now, later) = left.split_at(n);
            let chunk = match index.checked_sub(1) {
                None => Some(&mut self.head[..]),
                Some(index) => self.rest[index].as_mut().map(|chunk| &mut chunk[..]),
            };
            if let Some(chunk) = chunk {
                chunk[at..at + n].copy_from_slice(now);
            }
            left = later;
            (index, at) = (index + 1, 0);
        }
        self.size = self.size.max(end);
        Ok(())
    }

    /// Sets the size. Growing makes a hole; shrinking gives up what is cut off, and never fails.
    pub(crate) fn set_size(&mut self, size: u64, ledger: &mut Ledger) {
        if size < self.size {
            let (last, within) = place(size);
            // Whole chunks behind the new end. `last` holds the end itself, and is cut off too if nothing of it is left.
            let keep = if within == 0 { last } else { last + 1 };
            let keep_rest = keep.saturating_sub(1);
            if keep_rest == 0 && self.rest.capacity() > 0 {
                ledger.bury_chunks(std::mem::take(&mut self.rest), true);
            } else if keep_rest < self.rest.len() {
                ledger.bury_chunks(self.rest.split_off(keep_rest), false);
                self.shrink_list(ledger);
            }
            if within > 0 && last > 0 {
                if let Some(Some(chunk)) = self.rest.get_mut(last - 1) {
                    chunk[within..].fill(0);
                }
            } else if last == 0 {
                self.shrink_head(within, ledger);
            }
        }
        self.size = size;
    }

    /// Makes a list that became much too long for its file a fitting one, if there is memory for both.
    fn shrink_list(&mut self, ledger: &mut Ledger) {
        let (before, len) = (self.rest.capacity(), self.rest.len());
        if before / 4 > len && ledger.take((len * PLACE) as u64).is_ok() {
            let mut rest = Vec::with_capacity(len);
            rest.append(&mut self.rest);
            self.rest = rest;
            ledger.give_back((before * PLACE) as u64);
        }
    }

    /// Cuts the head to `extent` bytes.
    fn shrink_head(&mut self, extent: usize, ledger: &mut Ledger) {
        let len = piece_len(extent);
        if let Some(cut) = self.head.get_mut(extent..) {
            cut.fill(0);
        }
        if len < self.head.len() {
            let head = if len == 0 { Ok(Box::default()) } else { ledger.piece(len) };
            // Without memory for a smaller one, the larger one stays.
            if let Ok(mut head) = head {
                head.copy_from_slice(&self.head[..len]);
                ledger.bury_piece(std::mem::replace(&mut self.head, head));
            }
        }
    }

    /// Gives up everything.
    pub(crate) fn bury(self, ledger: &mut Ledger) {
        ledger.bury_piece(self.head);
        if self.rest.capacity() > 0 {
            ledger.bury_chunks(self.rest, true);
        }
    }
}
