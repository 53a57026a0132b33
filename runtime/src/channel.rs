//! A [`wire`] channel under tokio, and files handed over in memory.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use gaia_init::wire::{self, Message};
use rustix::fs::{MemfdFlags, SealFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One end of a channel, read and written from a single task each.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes an end over; it becomes non-blocking. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(end: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&end, true)?;
        // SAFETY: `end` owns its descriptor: `as_raw_fd` gives the same one each time, and it stays open until the
        // `AsyncFd` has left the reactor, because nothing can take it out of there.
        Ok(Self(unsafe { AsyncFd::register_with_interest(end, Interest::READABLE | Interest::WRITABLE) }?))
    }

    /// Waits for the next message. Safe to cancel: a message is taken whole or not at all.
    ///
    /// # Errors
    /// As [`wire::receive`], except that it never would block.
    pub async fn receive<M: Message>(&self) -> Result<(M, Vec<OwnedFd>), wire::Error> {
        loop {
            let mut ready = self.0.readable().await.map_err(|_| wire::Error::Closed)?;
            match wire::receive(self.0.get_ref()) {
                Err(wire::Error::WouldBlock) => ready.clear_ready(),
                other => return other,
            }
        }
    }

    /// Takes the next message if there is one, and does not wait.
    ///
    /// # Errors
    /// As [`wire::receive`].
    pub fn receive_now<M: Message>(&self) -> Result<(M, Vec<OwnedFd>), wire::Error> {
        wire::receive(self.0.get_ref())
    }

    /// Sends one message, waiting for room.
    ///
    /// # Errors
    /// As [`wire::send`], except that it never would block.
    pub async fn send(&self, message: &impl Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), wire::Error> {
        loop {
            let mut ready = self.0.writable().await.map_err(|_| wire::Error::Closed)?;
            match wire::send(self.0.get_ref(), message, descriptors) {
                Err(wire::Error::WouldBlock) => ready.clear_ready(),
                other => return other,
            }
        }
    }
}

/// All seals: nobody can change the content any more, so it can be read and mapped without fear of who else holds it.
pub(crate) const SEALED: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// Puts bytes into a file in memory and seals it.
///
/// # Errors
/// What the kernel said; usually that there is no memory.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SEALED)?;
    Ok(file.into())
}

/// Whether the file is one that [`sealed`] could have made: in memory, and never to change again.
#[must_use]
pub fn is_sealed(file: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALED))
}

/// Reads a whole file from its beginning, refusing more than `most` bytes. By position: all workers of a generation hold
/// the same open file, and would move each other's offset.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] beyond the bound, else what the kernel said.
pub fn read_whole(file: OwnedFd, most: u64) -> io::Result<Vec<u8>> {
    let file = File::from(file);
    let mut bytes = Vec::new();
    let mut piece = [0; 8192];
    loop {
        match file.read_at(&mut piece, bytes.len() as u64) {
            Ok(0) => return Ok(bytes),
            Ok(n) => bytes.extend_from_slice(&piece[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if bytes.len() as u64 > most {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {most} bytes")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_file_cannot_be_changed() {
        let fd = sealed("test", b"abc").unwrap();
        assert!(is_sealed(&fd));
        assert!(rustix::io::write(&fd, b"x").is_err());
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        assert_eq!(read_whole(fd, 3).unwrap(), b"abc");
    }

    #[test]
    fn readers_of_one_open_file_do_not_disturb_each_other() {
        let content: Vec<u8> = (0_u32..100_000).flat_map(u32::to_ne_bytes).collect();
        let fd = sealed("plan", &content).unwrap();
        std::thread::scope(|scope| {
            let read = || (0..20).all(|_| read_whole(fd.try_clone().unwrap(), 1 << 20).unwrap() == content);
            let all: Vec<_> = (0..4).map(|_| scope.spawn(read)).collect();
            assert!(all.into_iter().all(|reader| reader.join().unwrap()));
        });
    }

    #[test]
    fn what_is_not_sealed_or_too_long_is_seen() {
        let open = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(!is_sealed(&open));
        assert!(!is_sealed(File::open("/dev/null").unwrap()));
        let error = read_whole(sealed("test", b"abcd").unwrap(), 3).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
