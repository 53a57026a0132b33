//! A disk whose power can be cut: a server of the NBD protocol that forgets what was not flushed.
//!
//! QEMU writes a file of its own host whether the guest flushes or not; a real disk does not. This one keeps every write in a
//! volatile list until the guest flushes, and when its power is cut each write on that list has survived, is lost, or is torn,
//! by chance from a seed. It cuts its power when it is told to, or by itself at the n-th write from now on: then there is one
//! that was not flushed.
//!
//! ```text
//! guest ── virtio-blk ── QEMU ── NBD, Unix socket ──▶ current  what a read sees
//!                                                     volatile writes since the last flush, in order
//!                                                     durable  what a flush, or a write with FUA, has reached ──▶ cut(seed)
//! ```
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use gaia_tests::{Appliance, Setup, data_disk, nbd};
//! let mut image = data_disk()?;
//! for seed in 0..200 {
//!     let disk = nbd::Disk::of(&image)?;
//!     let appliance = Appliance::boot(&Setup::default().data(disk.drive()))?;
//!     // … a push or a deploy, and at some moment of it:
//!     let cut = disk.cut(seed)?;
//!     appliance.machine().kill()?;
//!     image = cut.image;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The protocol is that of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle, one export
//! without a name, simple replies. Disk and list are in memory: twice the disk's size, for tests of some 100 MiB.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gaia_qemu::Drive;

/// What a disk writes whole, in bytes: a torn write ends, or begins, at such a boundary.
pub const SECTOR: usize = 512;
/// The most that one request may read or write, in bytes: QEMU's own bound.
const MOST: u32 = 32 << 20;
/// The most that an option of the handshake may bring, in bytes: a name and a list of numbers.
const MOST_OPTION: u32 = 8192;

/// Numbers from a seed: the constants of `SplitMix64` (Steele, Lea, Flood 2014).
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % (bound.max(1) as u64)).unwrap_or(0)
    }
}

/// What is on the disk, and what only seems to be.
#[derive(Debug)]
struct Medium {
    current: Vec<u8>,
    durable: Vec<u8>,
    volatile: Vec<(usize, Vec<u8>)>,
    /// Writes since it was made.
    writes: usize,
    /// The power goes at the write with this number, and what is lost is by this seed.
    armed: Option<(usize, u64)>,
    /// What the power left, until somebody takes it.
    left: Option<(Vec<u8>, Losses)>,
    cut: bool,
}

/// What became of the writes that had not been flushed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Losses {
    /// On the disk.
    pub survived: usize,
    /// Not on the disk.
    pub lost: usize,
    /// On the disk in part.
    pub torn: usize,
}

impl Medium {
    fn new(bytes: Vec<u8>) -> Self {
        let (volatile, writes, armed, left) = (Vec::new(), 0, None, None);
        Self { current: bytes.clone(), durable: bytes, volatile, writes, armed, left, cut: false }
    }

    /// The range of a request, if it is one of this disk's.
    fn range(&self, offset: u64, length: u32) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(length).ok()?)?;
        (end <= self.current.len()).then_some(start..end)
    }

    /// Writes within the disk's size.
    fn write(&mut self, at: usize, bytes: Vec<u8>, durable: bool) {
        let end = at + bytes.len();
        self.current[at..end].copy_from_slice(&bytes);
        if !durable {
            self.volatile.push((at, bytes));
            return;
        }
        self.durable[at..end].copy_from_slice(&bytes);
        // Whatever was to be written there is old: it may not come back over this.
        for (from, old) in std::mem::take(&mut self.volatile) {
            let (head, tail) = (at.saturating_sub(from).min(old.len()), end.saturating_sub(from).min(old.len()));
            for (from, part) in [(from, &old[..head]), (from + tail, &old[tail..])] {
                if !part.is_empty() {
                    self.volatile.push((from, part.to_vec()));
                }
            }
        }
    }

    /// A write that a client asks for. Whether it may be answered: not if the power goes at it, and then it is one of those that
    /// were not flushed, whatever the client wanted.
    fn asked_to_write(&mut self, at: usize, bytes: Vec<u8>, durable: bool) -> bool {
        self.writes += 1;
        let seed = self.armed.filter(|(number, _)| *number <= self.writes).map(|(_, seed)| seed);
        self.write(at, bytes, durable && seed.is_none());
        if let Some(seed) = seed {
            let left = self.power_off(seed);
            self.left = Some(left);
        }
        seed.is_none()
    }

    fn flush(&mut self) {
        for (at, bytes) in self.volatile.drain(..) {
            self.durable[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// What is found when the power comes back. From here on nothing is read, written or flushed.
    fn power_off(&mut self, seed: u64) -> (Vec<u8>, Losses) {
        self.cut = true;
        let (mut chance, mut losses) = (Chance(seed), Losses::default());
        let (mut left, mut disk) = (std::mem::take(&mut self.volatile), self.durable.clone());
        while !left.is_empty() {
            let (at, bytes) = left.swap_remove(chance.below(left.len()));
            let mut keep = 0..bytes.len();
            match chance.below(3) {
                0 => losses.survived += 1,
                1 => {
                    losses.lost += 1;
                    keep = 0..0;
                }
                _ => {
                    // Between the first and the last sector; a write within one is whole or lost.
                    let boundaries = (at + bytes.len()).div_ceil(SECTOR) - at / SECTOR - 1;
                    let boundary = match boundaries {
                        0 => bytes.len() * chance.below(2),
                        many => (at / SECTOR + 1 + chance.below(many)) * SECTOR - at,
                    };
                    keep = if chance.below(2) == 0 { 0..boundary } else { boundary..bytes.len() };
                    match keep.len() {
                        0 => losses.lost += 1,
                        all if all == bytes.len() => losses.survived += 1,
                        _ => losses.torn += 1,
                    }
                }
            }
            disk[at + keep.start..at + keep.end].copy_from_slice(&bytes[keep]);
        }
        (disk, losses)
    }
}

#[derive(Debug)]
struct Shared {
    medium: Mutex<Medium>,
    /// All connections, so that they stay open when the power is cut, and end with the disk. `None` once it has ended.
    connections: Mutex<Option<Vec<UnixStream>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk that a machine may have, as long as this value lives.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

/// What a disk holds after its power was cut.
#[derive(Debug)]
pub struct Cut {
    /// A file with its bytes, which goes with this value.
    pub image: tempfile::TempPath,
    /// What became of what had not been flushed.
    pub losses: Losses,
}

impl Disk {
    /// A disk with the bytes of this file, which stays as it is.
    ///
    /// # Errors
    /// If the file cannot be read, or the socket not be made.
    pub fn of(image: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(image)?;
        let folder = tempfile::Builder::new().prefix("gaia-nbd-").tempdir()?;
        let socket = folder.path().join("disk.sock");
        let listener = UnixListener::bind(&socket)?;
        let connections = Mutex::new(Some(Vec::new()));
        let shared = Arc::new(Shared { medium: Mutex::new(Medium::new(bytes)), connections });
        let accepting = Arc::clone(&shared);
        std::thread::Builder::new().name("nbd".into()).spawn(move || accept(&listener, &accepting))?;
        Ok(Self { shared, socket, _folder: folder })
    }

    /// The disk as a machine is given it.
    #[must_use]
    pub fn drive(&self) -> Drive {
        Drive::nbd(&self.socket)
    }

    /// How many writes would be at risk now.
    #[must_use]
    pub fn unflushed(&self) -> usize {
        locked(&self.shared.medium).volatile.len()
    }

    /// How many writes there were.
    #[must_use]
    pub fn writes(&self) -> usize {
        locked(&self.shared.medium).writes
    }

    /// Has the power go by itself at the n-th write from now on, 1 being the next: as [`Disk::cut`] does, which gives what is left
    /// then. That write is one of those that were not flushed.
    pub fn arm(&self, n: usize, seed: u64) {
        let mut medium = locked(&self.shared.medium);
        medium.armed = Some((medium.writes + n.max(1), seed));
    }

    /// Waits until the power has gone by itself, or `over` says that it will not, and says which.
    pub fn has_cut_itself(&self, within: Duration, over: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + within;
        loop {
            // In this order: what was over before it was looked at has made all its writes.
            let is_over = over() || Instant::now() >= deadline;
            let cut = locked(&self.shared.medium).left.is_some();
            if cut || is_over {
                return cut;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Cuts the power, if it has not gone by itself: from this moment on nothing is answered, so that the machine learns nothing more, and the surviving
    /// bytes are in a file. The same seed, after the same requests, gives the same bytes. The machine is to be killed then.
    ///
    /// # Errors
    /// If the file cannot be written, or the power was cut before.
    pub fn cut(&self, seed: u64) -> io::Result<Cut> {
        let (bytes, losses) = {
            let mut medium = locked(&self.shared.medium);
            match medium.left.take() {
                Some(left) => left,
                None if medium.cut => return Err(io::Error::other("its power was cut before")),
                None => medium.power_off(seed),
            }
        };
        let file = tempfile::Builder::new().prefix("gaia-data-").tempfile()?;
        file.as_file().set_len(bytes.len() as u64)?;
        // What is zero stays a hole.
        for (number, piece) in bytes.chunks(1 << 16).enumerate().filter(|(_, piece)| piece.iter().any(|b| *b != 0)) {
            file.as_file().write_all_at(piece, (number << 16) as u64)?;
        }
        Ok(Cut { image: file.into_temp_path(), losses })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for connection in locked(&self.shared.connections).take().into_iter().flatten() {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        // Wakes whoever accepts, who finds that it has ended.
        let _ = UnixStream::connect(&self.socket);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        match (locked(&shared.connections).as_mut(), stream.try_clone()) {
            (Some(connections), Ok(copy)) => connections.push(copy),
            _ => return,
        }
        let shared = Arc::clone(shared);
        // What it ends with is the other end's business: QEMU reports a connection that breaks off.
        let serving = move || drop(serve(&mut stream, &shared.medium));
        if std::thread::Builder::new().name("nbd".into()).spawn(serving).is_err() {
            return;
        }
    }
}

// ── the protocol ────────────────────────────────────────────────────────────────────────────────────────────────────

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Fixed newstyle; no zeros after the export.
const HANDSHAKE_FLAGS: u16 = 1 | 2;
/// There are flags; flushes, FUA, trims and writes of zeros are understood.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;
const ACK: u32 = 1;
const INFO: u32 = 3;
const UNSUPPORTED: u32 = 1 << 31 | 1;
const INVALID: u32 = 1 << 31 | 3;
const UNKNOWN: u32 = 1 << 31 | 6;
const INFO_BLOCK_SIZE: u16 = 3;

/// A request of the transmission phase.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

fn foreign(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The next bytes of a message, by their number.
fn taken<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*first)
}

/// Reads the head of an option: its number, and how many bytes follow.
fn option(head: [u8; 16]) -> io::Result<(u32, u32)> {
    let mut head = &head[..];
    let (magic, number, length) = (taken(&mut head), taken(&mut head), taken(&mut head));
    let number = number.map(u32::from_be_bytes);
    match (magic.map(u64::from_be_bytes), number, length.map(u32::from_be_bytes)) {
        (Some(OPTION_MAGIC), Some(number), Some(length)) if length <= MOST_OPTION => Ok((number, length)),
        _ => Err(foreign("not an option of the handshake")),
    }
}

/// Reads what `NBD_OPT_INFO` and `NBD_OPT_GO` ask: the export's name, and about what.
fn asked(mut bytes: &[u8]) -> Option<(Vec<u8>, Vec<u16>)> {
    let length = usize::try_from(u32::from_be_bytes(taken(&mut bytes)?)).ok()?;
    let (name, mut rest) = bytes.split_at_checked(length)?;
    let count = usize::from(u16::from_be_bytes(taken(&mut rest)?));
    let (numbers, []) = rest.as_chunks::<2>() else { return None };
    (numbers.len() == count).then(|| (name.to_vec(), numbers.iter().map(|n| u16::from_be_bytes(*n)).collect()))
}

fn request(head: [u8; 28]) -> io::Result<Request> {
    const MAGIC: u32 = 0x2560_9513;
    let mut head = &head[..];
    let mut read = || {
        if u32::from_be_bytes(taken(&mut head)?) != MAGIC {
            return None;
        }
        Some(Request {
            flags: u16::from_be_bytes(taken(&mut head)?),
            kind: u16::from_be_bytes(taken(&mut head)?),
            cookie: u64::from_be_bytes(taken(&mut head)?),
            offset: u64::from_be_bytes(taken(&mut head)?),
            length: u32::from_be_bytes(taken(&mut head)?),
        })
    };
    read().ok_or_else(|| foreign("not a request"))
}

fn next<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).map(|()| bytes)
}

fn long(stream: &mut impl Read, length: u32) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(length.into()).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == u64::from(length) { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Serves one connection until it ends or the power is cut.
fn serve(stream: &mut (impl Read + Write), medium: &Mutex<Medium>) -> io::Result<()> {
    if !handshake(stream, locked(medium).current.len() as u64)? {
        return Ok(());
    }
    loop {
        let request = request(next(stream)?)?;
        let writes = request.kind == 1;
        if (writes || request.kind == 0) && request.length > MOST {
            return Err(foreign("more than a request may have"));
        }
        let bytes = if writes { long(stream, request.length)? } else { Vec::new() };
        let Some((error, bytes)) = answer(&mut locked(medium), &request, bytes) else { return Ok(()) };
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend(error.to_be_bytes());
        reply.extend(request.cookie.to_be_bytes());
        reply.extend(bytes);
        stream.write_all(&reply)?;
    }
}

/// An error of the protocol, or 0, and what was read. Nothing, if there is to be no answer: the client goes, or the power is
/// cut.
fn answer(medium: &mut Medium, request: &Request, bytes: Vec<u8>) -> Option<(u32, Vec<u8>)> {
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    if medium.cut || request.kind == 2 {
        return None;
    }
    let durable = request.flags & 1 != 0;
    let outside = if request.kind == 0 { EINVAL } else { ENOSPC };
    let Some(range) = medium.range(request.offset, request.length) else { return Some((outside, Vec::new())) };
    match request.kind {
        0 => return Some((0, medium.current[range].to_vec())),
        1 if !medium.asked_to_write(range.start, bytes, durable) => return None,
        3 => medium.flush(),
        // What was trimmed may be anything; zeros show who reads it.
        4 | 6 if !medium.asked_to_write(range.start, vec![0; range.len()], durable) => return None,
        1 | 4 | 6 => {}
        _ => return Some((EINVAL, Vec::new())),
    }
    Some((0, Vec::new()))
}

/// Whether it leads to the transmission phase.
fn handshake(stream: &mut (impl Read + Write), size: u64) -> io::Result<bool> {
    let hello = [&b"NBDMAGIC"[..], b"IHAVEOPT", &HANDSHAKE_FLAGS.to_be_bytes()].concat();
    stream.write_all(&hello)?;
    let flags = u32::from_be_bytes(next(stream)?);
    if flags & 1 == 0 || flags & !3 != 0 {
        return Err(foreign("not the fixed newstyle handshake"));
    }
    let export = [&size.to_be_bytes()[..], &EXPORT_FLAGS.to_be_bytes()].concat();
    loop {
        let (number, length) = option(next(stream)?)?;
        let bytes = long(stream, length)?;
        let reply = |kind: u32, bytes: &[u8]| {
            let head = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &number.to_be_bytes(), &kind.to_be_bytes()];
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            [&head.concat()[..], &length.to_be_bytes(), bytes].concat()
        };
        match number {
            // An export by its name: no reply but the export, or the end.
            1 if bytes.is_empty() => {
                stream.write_all(&export)?;
                stream.write_all(if flags & 2 == 0 { &[0; 124] } else { &[] })?;
                return Ok(true);
            }
            1 => return Err(foreign("an export that is not there")),
            2 => return stream.write_all(&reply(ACK, &[])).map(|()| false),
            6 | 7 => match asked(&bytes) {
                Some((name, about)) if name.is_empty() => {
                    stream.write_all(&reply(INFO, &[&[0, 0], &export[..]].concat()))?;
                    if about.contains(&INFO_BLOCK_SIZE) {
                        let sizes = [1_u32 << 9, 1 << 12, MOST].map(u32::to_be_bytes).concat();
                        stream.write_all(&reply(INFO, &[&INFO_BLOCK_SIZE.to_be_bytes(), &sizes[..]].concat()))?;
                    }
                    stream.write_all(&reply(ACK, &[]))?;
                    if number == 7 {
                        return Ok(true);
                    }
                }
                Some(_) => stream.write_all(&reply(UNKNOWN, &[]))?,
                None => stream.write_all(&reply(INVALID, &[]))?,
            },
            _ => stream.write_all(&reply(UNSUPPORTED, &[]))?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 64 * SECTOR;

    /// What a client sends, and what it was answered.
    struct Client<'a>(&'a [u8], Vec<u8>);

    impl Read for Client<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }

    impl Write for Client<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn hello() -> Vec<u8> {
        [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &1_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat()
    }

    fn sent(kind: u16, flags: u16, offset: u64, length: u32, bytes: &[u8]) -> Vec<u8> {
        let head = [&0x2560_9513_u32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &[7; 8]].concat();
        [&head[..], &offset.to_be_bytes(), &length.to_be_bytes(), bytes].concat()
    }

    fn answered(medium: &Mutex<Medium>, bytes: &[u8]) -> Vec<u8> {
        let mut client = Client(bytes, Vec::new());
        let _ = serve(&mut client, medium);
        client.1
    }

    #[test]
    fn what_is_written_is_read_and_what_lies_outside_is_refused() {
        let medium = Mutex::new(Medium::new(vec![0; SIZE]));
        let said = [hello(), sent(1, 0, 512, 4, b"abcd"), sent(0, 0, 510, 8, b""), sent(3, 0, 0, 0, b"")];
        let all = answered(&medium, &said.concat());
        assert_eq!(&all[18..28], [&(SIZE as u64).to_be_bytes()[..], &EXPORT_FLAGS.to_be_bytes()].concat());
        let reply = |error: u32, bytes: &[u8]| {
            [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &[7; 8], bytes].concat()
        };
        assert_eq!(all[28..], [reply(0, b""), reply(0, b"\0\0abcd\0\0"), reply(0, b"")].concat());
        assert_eq!(&medium.lock().unwrap().durable[512..516], b"abcd");
        let said = [hello(), sent(0, 0, u64::MAX, 1, b""), sent(6, 0, 0, u32::MAX, b""), sent(9, 0, 0, 0, b"")];
        assert_eq!(answered(&medium, &said.concat())[28..], [reply(22, b""), reply(28, b""), reply(22, b"")].concat());
        medium.lock().unwrap().power_off(1);
        assert_eq!(answered(&medium, &[hello(), sent(3, 0, 0, 0, b"")].concat()).len(), 28, "no answer without power");
    }

    #[test]
    fn the_power_goes_at_the_write_that_it_is_to_go_at() {
        for n in 1..=4 {
            let medium = Mutex::new(Medium::new(vec![0; SIZE]));
            let write = |at: u8| sent(1, u16::from(at == 3), u64::from(at) * 512, 1, &[at]);
            answered(&medium, &[hello(), write(1), sent(3, 0, 0, 0, b"")].concat());
            medium.lock().unwrap().armed = Some((1 + n, 7));
            let said = answered(&medium, &[hello(), write(2), write(3), write(4), write(5), write(6)].concat());
            assert_eq!((said.len() - 28) / 16, n - 1, "no answer to what it goes at");
            let (disk, losses) = medium.lock().unwrap().left.take().unwrap();
            // The write with FUA is one that was not flushed only if the power goes at it.
            let volatile = n - usize::from(n > 2);
            assert_eq!(losses.survived + losses.lost + losses.torn, volatile, "{losses:?}");
            assert_eq!((disk[512], disk[6 * 512]), (1, 0));
            assert!(n <= 2 || disk[3 * 512] == 3);
        }
    }

    #[test]
    fn a_cut_really_loses_tears_and_keeps_and_the_same_seed_does_the_same() {
        let cut = |seed| {
            let mut medium = Medium::new(vec![0; SIZE]);
            medium.write(0, vec![1; 8 * SECTOR], false);
            medium.flush();
            for at in 1..8 {
                medium.write(at * 8 * SECTOR, vec![2; 8 * SECTOR], false);
            }
            medium.power_off(seed)
        };
        let mut sum = Losses::default();
        for seed in 0..100 {
            let (disk, losses) = cut(seed);
            assert_eq!((disk.clone(), losses), cut(seed));
            assert_eq!(losses.survived + losses.lost + losses.torn, 7);
            assert!(disk[..8 * SECTOR].iter().all(|b| *b == 1), "what was flushed");
            for sector in disk[8 * SECTOR..].chunks(SECTOR) {
                assert!(sector.iter().all(|b| *b == sector[0]), "no sector is torn");
            }
            sum = Losses {
                survived: sum.survived + losses.survived,
                lost: sum.lost + losses.lost,
                torn: sum.torn + losses.torn,
            };
        }
        assert!([sum.survived, sum.lost, sum.torn].iter().all(|count| *count > 150), "{sum:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_end_the_connection(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            greeted in any::<bool>(),
            kind in 0..8_u16,
            (flags, offset, length) in (any::<u16>(), 0..2 * SIZE as u64, 0..65_536_u32),
        ) {
            let medium = Mutex::new(Medium::new(vec![0; SIZE]));
            let hello = if greeted { [hello(), sent(kind, flags, offset, length, &[])].concat() } else { hello()[..4].to_vec() };
            answered(&medium, &[hello, bytes.clone()].concat());
            let _ = asked(&bytes);
        }

        /// Each sector is found as some write left it that was not older than the last flush, or the last write with FUA.
        #[test]
        fn a_sector_is_never_older_than_its_last_flush(
            acts in proptest::collection::vec((0..64_usize, 1..9_usize, 0..6_u8), 1..40),
            seed in any::<u64>(),
        ) {
            let mut medium = Medium::new(vec![0; SIZE]);
            let mut may: Vec<Vec<u8>> = vec![vec![0]; 64];
            for (number, (at, count, kind)) in acts.into_iter().enumerate() {
                let (mark, end) = (u8::try_from(number + 1).unwrap(), (at + count).min(64));
                match kind {
                    0 => {
                        medium.flush();
                        for versions in &mut may {
                            versions.drain(..versions.len() - 1);
                        }
                    }
                    1 => {
                        medium.write(at * SECTOR, vec![mark; (end - at) * SECTOR], true);
                        may[at..end].fill(vec![mark]);
                    }
                    _ => {
                        medium.write(at * SECTOR, vec![mark; (end - at) * SECTOR], false);
                        for versions in &mut may[at..end] {
                            versions.push(mark);
                        }
                    }
                }
                for (sector, versions) in medium.current.chunks(SECTOR).zip(&may) {
                    prop_assert_eq!(sector[0], *versions.last().unwrap(), "a read sees what was written last");
                }
            }
            let (disk, _) = medium.power_off(seed);
            for (number, (sector, versions)) in disk.chunks(SECTOR).zip(&may).enumerate() {
                prop_assert!(sector.iter().all(|b| *b == sector[0]), "sector {} is torn", number);
                prop_assert!(versions.contains(&sector[0]), "sector {}: {} of {:?}", number, sector[0], versions);
            }
        }
    }
}
