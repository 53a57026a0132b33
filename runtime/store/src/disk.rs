//! The calls on the file system that the store makes, and no others.
//!
//! Behind a trait, because what a power failure leaves is only to be tried on a disk that can be cut off at each call. All
//! names are single ones, made by this crate, and looked up in a directory that is held open, without following links: no
//! path is ever resolved, so nothing outside the data directory can be reached.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// The store's directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Dir {
    /// The data directory itself.
    Root,
    /// By digest.
    Components,
    /// By the digest of the component and what it was compiled for.
    Artefacts,
    /// By number.
    Graphs,
    /// By name.
    Records,
    /// What was found to be wrong.
    Quarantine,
}

impl Dir {
    /// Those below the data directory.
    pub(crate) const BELOW: [Self; 5] =
        [Self::Components, Self::Artefacts, Self::Graphs, Self::Records, Self::Quarantine];

    /// Its name in the data directory; a dot for that itself.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Root => ".",
            Self::Components => "components",
            Self::Artefacts => "artefacts",
            Self::Graphs => "graphs",
            Self::Records => "records",
            Self::Quarantine => "quarantine",
        }
    }
}

/// Something in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// `None` if it is no UTF-8, so none of the store's.
    pub(crate) name: Option<String>,
    /// In bytes. `None` if it is no regular file.
    pub(crate) size: Option<u64>,
}

/// An open file.
pub(crate) trait Handle: Send {
    /// Writes all of it behind what was written before.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Reads from there on; 0 bytes at the end alone.
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<usize>;
    /// In bytes.
    fn size(&self) -> io::Result<u64>;
    /// What was written is on the disk when this returns.
    fn sync(&self) -> io::Result<()>;
}

/// A file system.
pub(crate) trait Disk: Send + Sync {
    /// Takes the data directory for this process alone; false if another has it.
    fn lock(&self) -> io::Result<bool>;
    /// Makes the directory, if it is not there, and opens it.
    fn make_directory(&self, dir: Dir) -> io::Result<()>;
    /// What is in it.
    fn list(&self, dir: Dir) -> io::Result<Vec<Entry>>;
    /// A new file, for its owner alone. One of this name is removed before.
    fn create(&self, dir: Dir, name: &str) -> io::Result<Box<dyn Handle>>;
    /// A regular file, to read.
    fn open(&self, dir: Dir, name: &str) -> io::Result<Box<dyn Handle>>;
    /// Gives a file another name, and takes the place of what had that, in one step.
    fn rename(&self, from: (Dir, &str), to: (Dir, &str)) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, dir: Dir, name: &str) -> io::Result<()>;
    /// The names in a directory are on the disk when this returns.
    fn sync_directory(&self, dir: Dir) -> io::Result<()>;
    /// Bytes that are free.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// The real one: a directory that is held open.
#[derive(Debug)]
pub(crate) struct Directory {
    root: OwnedFd,
    below: [OnceLock<OwnedFd>; Dir::BELOW.len()],
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Directory {
    /// Opens the directory anew: a lock belongs to an open directory, and whoever handed this one down has it open too.
    pub(crate) fn of(dir: BorrowedFd<'_>) -> io::Result<Self> {
        let root = rustix::fs::openat(dir, c".", DIRECTORY, Mode::empty())?;
        Ok(Self { root, below: [const { OnceLock::new() }; Dir::BELOW.len()] })
    }

    fn at(&self, dir: Dir) -> io::Result<&OwnedFd> {
        match Dir::BELOW.iter().position(|below| *below == dir) {
            None => Ok(&self.root),
            Some(index) => self.below[index].get().ok_or_else(|| Errno::NOENT.into()),
        }
    }
}

impl Disk for Directory {
    fn lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.root, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn make_directory(&self, dir: Dir) -> io::Result<()> {
        let Some(index) = Dir::BELOW.iter().position(|below| *below == dir) else { return Ok(()) };
        let made = rustix::fs::mkdirat(&self.root, dir.name(), Mode::RWXU);
        // What counts is whether it is there: a disk that can no longer be written to says something else.
        match (rustix::fs::openat(&self.root, dir.name(), DIRECTORY, Mode::empty()), made) {
            (Ok(open), _) => {
                // Opened before: the same directory.
                let _ = self.below[index].set(open);
                Ok(())
            }
            (Err(Errno::NOENT), Err(e)) | (Err(e), _) => Err(e.into()),
        }
    }

    fn list(&self, dir: Dir) -> io::Result<Vec<Entry>> {
        let at = self.at(dir)?;
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::read_from(at)? {
            let entry = entry?;
            let name: &CStr = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(e.into()),
            };
            let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            let size = regular.then(|| u64::try_from(stat.st_size).unwrap_or(0));
            found.push(Entry { name: name.to_str().ok().map(str::to_owned), size });
        }
        Ok(found)
    }

    fn create(&self, dir: Dir, name: &str) -> io::Result<Box<dyn Handle>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create =
            || rustix::fs::openat(self.at(dir)?, name, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from);
        let file = match create() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.remove(dir, name)?;
                create()?
            }
            created => created?,
        };
        Ok(Box::new(File::from(file)))
    }

    fn open(&self, dir: Dir, name: &str) -> io::Result<Box<dyn Handle>> {
        // Not blocking: a pipe in the place of a file must not hold up whoever opens it.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.at(dir)?, name, flags, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no regular file"));
        }
        Ok(Box::new(File::from(file)))
    }

    fn rename(&self, from: (Dir, &str), to: (Dir, &str)) -> io::Result<()> {
        Ok(rustix::fs::renameat(self.at(from.0)?, from.1, self.at(to.0)?, to.1)?)
    }

    fn remove(&self, dir: Dir, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(self.at(dir)?, name, AtFlags::empty())?)
    }

    fn sync_directory(&self, dir: Dir) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.at(dir)?)?)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl Handle for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match FileExt::read_at(self, into, at) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(self)?.st_size).unwrap_or(0))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(self)?)
    }
}
