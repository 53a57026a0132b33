//! What the store knows, and the steps that change it on the disk and in memory together.
//!
//! ```text
//! replace a small file   x.new, x.copy.new: written, fsync │ rename to x │ fsync directory │ rename to x.copy │ fsync directory
//!                        └── no room: both removed, nothing changed ──┘└── a failure from here on: unsettled ──────────────┘
//! ```
//!
//! A power failure at any point leaves `x` as it was or as it is to be. Once it is acknowledged, both files hold it: bits that
//! flip in one of them lose nothing.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use crate::disk::{Dir, Disk, Handle};
use crate::form::{self, Current, Graph, Names, SEAL, SMALL_MAX};
use crate::{Error, Finding, Limits, Outcome, Subject};

/// What files take on the disk, in bytes, is a multiple of this: the block size of ext4.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes read at once.
pub(crate) const PIECE: usize = 256 << 10;
/// The end of a temporary file's name.
pub(crate) const TEMPORARY: &str = ".new";
/// The end of the name of a small file's second copy.
pub(crate) const COPY: &str = ".copy";
/// Findings that are kept until somebody takes them.
const FINDINGS_MAX: usize = 256;

/// What a file of so many bytes takes on the disk, in bytes.
pub(crate) fn taken(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK).max(1).saturating_mul(BLOCK)
}

/// Whether this is the disk having no room.
pub(crate) fn is_full(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::NOSPC | Errno::DQUOT))
}

/// Whether this says something about the process or the machine, and nothing about the file: that must not be moved away for it.
pub(crate) fn is_of_the_process(e: &io::Error) -> bool {
    use Errno as E;
    matches!(Errno::from_io_error(e), Some(E::MFILE | E::NFILE | E::NOMEM | E::ACCESS | E::PERM | E::INTR))
}

/// A file's path below the data directory, for messages.
pub(crate) fn path(dir: Dir, name: &str) -> String {
    if dir == Dir::Root { name.to_owned() } else { format!("{}/{name}", dir.name()) }
}

pub(crate) struct State {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) limits: Limits,
    /// Every file of the store but the temporary ones, with its size in bytes.
    pub(crate) files: BTreeMap<(Dir, String), u64>,
    /// What they take on the disk, in bytes.
    pub(crate) bytes: u64,
    /// What is promised to files that are being written, in bytes.
    pub(crate) pending: u64,
    pub(crate) names: Names,
    pub(crate) graphs: BTreeMap<u64, Arc<Graph>>,
    pub(crate) current: Option<Current>,
    /// The number of the next graph.
    pub(crate) next: u64,
    pub(crate) findings: VecDeque<Finding>,
    /// The number of the last temporary file, and of the last one in quarantine.
    serial: u64,
    unsettled: Option<String>,
}

impl State {
    pub(crate) fn of(disk: Arc<dyn Disk>, limits: Limits) -> Self {
        Self {
            disk,
            limits,
            files: BTreeMap::new(),
            bytes: 0,
            pending: 0,
            names: Names::new(),
            graphs: BTreeMap::new(),
            current: None,
            next: 1,
            findings: VecDeque::new(),
            serial: 0,
            unsettled: None,
        }
    }

    // What is counted.

    pub(crate) fn count(&mut self, dir: Dir, name: &str, size: u64) {
        self.bytes += taken(size);
        if let Some(before) = self.files.insert((dir, name.to_owned()), size) {
            self.bytes -= taken(before);
        }
    }

    fn uncount(&mut self, dir: Dir, name: &str) -> Option<u64> {
        let size = self.files.remove(&(dir, name.to_owned()))?;
        self.bytes -= taken(size);
        Some(size)
    }

    pub(crate) fn has(&self, dir: Dir, name: &str) -> bool {
        self.files.contains_key(&(dir, name.to_owned()))
    }

    /// The files of one directory, with their sizes in bytes.
    pub(crate) fn files_in(&self, dir: Dir) -> impl Iterator<Item = (&str, u64)> {
        let from = (dir, String::new());
        self.files
            .range(from..)
            .take_while(move |((d, _), _)| *d == dir)
            .map(|((_, name), size)| (name.as_str(), *size))
    }

    /// Bytes that may still be written. Components and artefacts leave room for the small files, so that a store that is full of
    /// them can still go back to another graph.
    pub(crate) fn free_bytes(&self, dir: Dir) -> Result<u64, Error> {
        let on_disk = self.disk.free_bytes().map_err(|e| self.failed("asking for the free room", 0, e))?;
        let own = self.limits.bytes.saturating_sub(self.bytes).saturating_sub(self.pending);
        let reserve = if matches!(dir, Dir::Components | Dir::Artefacts) { self.limits.reserve() } else { 0 };
        Ok(own.min(on_disk).saturating_sub(reserve))
    }

    /// Promises room, in bytes.
    pub(crate) fn reserve(&mut self, dir: Dir, bytes: u64) -> Result<(), Error> {
        let free = self.free_bytes(dir)?;
        if bytes > free {
            return Err(Error::Full { needed: bytes, free });
        }
        self.pending += bytes;
        Ok(())
    }

    /// What an error of the disk is to the caller.
    pub(crate) fn failed(&self, step: impl Into<String>, needed: u64, source: io::Error) -> Error {
        if is_full(&source) {
            let free = self.disk.free_bytes().unwrap_or(0).min(self.limits.bytes.saturating_sub(self.bytes));
            return Error::Full { needed, free };
        }
        Error::Io { step: step.into(), source }
    }

    // Changes on the disk.

    /// # Errors
    /// [`Error::Unsettled`] if an earlier change failed half-way.
    pub(crate) fn settled(&self) -> Result<(), Error> {
        self.unsettled.clone().map_or(Ok(()), |why| Err(Error::Unsettled(why)))
    }

    /// A change failed in a way that leaves open what is on the disk: from now on nothing is changed.
    fn unsettle(&mut self, step: &str, e: io::Error) -> Error {
        self.unsettled.get_or_insert_with(|| format!("{step}: {e}"));
        Error::Io { step: step.to_owned(), source: e }
    }

    pub(crate) fn sync_directory(&mut self, dir: Dir) -> Result<(), Error> {
        self.disk.sync_directory(dir).map_err(|e| self.unsettle(&format!("making {} durable", dir.name()), e))
    }

    pub(crate) fn temporary(&mut self) -> String {
        self.serial += 1;
        format!("{}{TEMPORARY}", self.serial)
    }

    /// Gives a durable temporary file its name. Durable when it returns.
    pub(crate) fn put_in_place(&mut self, dir: Dir, temporary: &str, name: &str, size: u64) -> Result<(), Error> {
        if let Err(e) = self.disk.rename((dir, temporary), (dir, name)) {
            self.forget(dir, temporary);
            let step = format!("renaming {}", path(dir, name));
            return Err(if is_full(&e) { self.failed(step, taken(size), e) } else { self.unsettle(&step, e) });
        }
        self.sync_directory(dir)?;
        self.count(dir, name, size);
        Ok(())
    }

    /// Removes a temporary file. If that fails, the next to open the store does.
    fn forget(&self, dir: Dir, temporary: &str) {
        // Without a caller that could do more about it.
        let _ = self.disk.remove(dir, temporary);
    }

    fn write_temporary(&self, dir: Dir, temporary: &str, file: &[u8]) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let mut handle = self.disk.create(dir, temporary)?;
            handle.append(file)?;
            handle.sync()
        };
        write().map_err(|e| {
            self.forget(dir, temporary);
            self.failed(format!("writing {}", path(dir, temporary)), taken(file.len() as u64), e)
        })
    }

    /// Replaces a small file and its copy. Durable when it returns.
    pub(crate) fn replace(&mut self, dir: Dir, name: &str, file: &[u8]) -> Result<(), Error> {
        self.settled()?;
        let size = file.len() as u64;
        if size > SMALL_MAX {
            return Err(Error::TooLarge { what: path(dir, name), limit: SMALL_MAX });
        }
        let copy = format!("{name}{COPY}");
        let temporaries = [format!("{name}{TEMPORARY}"), format!("{copy}{TEMPORARY}")];
        let (needed, free) = (2 * taken(size), self.free_bytes(dir)?);
        if needed > free {
            return Err(Error::Full { needed, free });
        }
        // Both before the first takes its place: if there is no room, nothing has changed.
        self.write_temporary(dir, &temporaries[0], file)?;
        if let Err(e) = self.write_temporary(dir, &temporaries[1], file) {
            self.forget(dir, &temporaries[0]);
            return Err(e);
        }
        if let Err(e) = self.put_in_place(dir, &temporaries[0], name, size) {
            self.forget(dir, &temporaries[1]);
            return Err(e);
        }
        match self.disk.rename((dir, &temporaries[1]), (dir, &copy)) {
            Ok(()) => self.sync_directory(dir)?,
            Err(e) => {
                self.forget(dir, &temporaries[1]);
                return Err(self.unsettle(&format!("renaming {}", path(dir, &copy)), e));
            }
        }
        self.count(dir, &copy, size);
        Ok(())
    }

    /// Removes a file. Not durable before its directory is.
    pub(crate) fn remove(&mut self, dir: Dir, name: &str) -> Result<Option<u64>, Error> {
        match self.disk.remove(dir, name) {
            Ok(()) => Ok(self.uncount(dir, name)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(self.uncount(dir, name)),
            Err(e) => Err(self.unsettle(&format!("removing {}", path(dir, name)), e)),
        }
    }

    /// Removes a small file and its copy. Durable when it returns. The copy first: alone it would look as if the file had been
    /// lost.
    pub(crate) fn remove_both(&mut self, dir: Dir, name: &str) -> Result<(), Error> {
        self.settled()?;
        self.remove(dir, &format!("{name}{COPY}"))?;
        self.sync_directory(dir)?;
        self.remove(dir, name)?;
        self.sync_directory(dir)
    }

    /// Moves a file out of the way, and says under which name.
    fn quarantine(&mut self, dir: Dir, name: &str) -> Result<String, Error> {
        // A disk that has failed says little about the file.
        self.settled()?;
        self.serial += 1;
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        let origin: String = if dir == Dir::Root { "" } else { dir.name() }.to_owned();
        let cleaned: String = name.chars().take(160).map(plain).collect();
        let to = format!("{:08}-{origin}-{cleaned}", self.serial);
        let step = format!("moving {} into quarantine", path(dir, name));
        self.disk.rename((dir, name), (Dir::Quarantine, &to)).map_err(|e| self.failed(&step, 0, e))?;
        // In this order: it may be in both directories for a while, but not in none.
        self.sync_directory(Dir::Quarantine)?;
        self.sync_directory(dir)?;
        let size = self.uncount(dir, name).unwrap_or(0);
        self.count(Dir::Quarantine, &to, size);
        self.trim_quarantine()?;
        Ok(to)
    }

    /// Removes the oldest of what is in quarantine, until it is within its bounds; files and bytes.
    pub(crate) fn trim_quarantine(&mut self) -> Result<(u64, u64), Error> {
        let mut held: VecDeque<(String, u64)> =
            self.files_in(Dir::Quarantine).map(|(name, size)| (name.to_owned(), taken(size))).collect();
        let mut bytes: u64 = held.iter().map(|(_, size)| size).sum();
        let (mut files, mut freed) = (0, 0);
        while held.len() > self.limits.quarantine_files || bytes > self.limits.quarantine_bytes {
            let Some((name, size)) = held.pop_front() else { break };
            self.remove(Dir::Quarantine, &name)?;
            bytes -= size;
            files += 1;
            freed += size;
        }
        if files > 0 {
            self.sync_directory(Dir::Quarantine)?;
        }
        Ok((files, freed))
    }

    /// The number from which names in quarantine go on.
    pub(crate) fn goes_on_from(&mut self, quarantined: &str) {
        let serial = quarantined.split('-').next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
        self.serial = self.serial.max(serial);
    }

    pub(crate) fn find(&mut self, finding: Finding) {
        if self.findings.len() == FINDINGS_MAX {
            self.findings.pop_front();
        }
        self.findings.push_back(finding);
    }

    // Reading what is kept twice.

    /// A whole small file. `None` if there is none; words if it cannot be read or is too long.
    fn whole(&self, dir: Dir, name: &str) -> Result<Result<Option<Vec<u8>>, String>, Error> {
        let read = || -> io::Result<Vec<u8>> {
            let handle = self.disk.open(dir, name)?;
            let size = handle.size()?;
            if size > SMALL_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{size} bytes are too many")));
            }
            whole_file(&*handle, size)
        };
        match read() {
            Ok(file) => Ok(Ok(Some(file))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Ok(None)),
            Err(e) if is_of_the_process(&e) => Err(self.failed(format!("reading {}", path(dir, name)), 0, e)),
            Err(e) => Ok(Err(format!("it cannot be read: {e}"))),
        }
    }

    /// What a small file says, without changing anything: of the file and of its copy. `None` where there is none.
    pub(crate) fn twice<T>(
        &self,
        dir: Dir,
        name: &str,
        parse: &dyn Fn(&[u8]) -> Result<T, String>,
    ) -> Result<[Read<T>; 2], Error> {
        let read = |each: &str| -> Result<Read<T>, Error> {
            let said = |file: Vec<u8>| Ok((form::unsealed(dir, name, &file).and_then(parse)?, file));
            Ok(self.whole(dir, each)?.and_then(|file| file.map(said).transpose()))
        };
        Ok([read(name)?, read(&format!("{name}{COPY}"))?])
    }

    /// What a small file says. What is wrong with it or its copy is mended from the other, if that is possible; whatever could
    /// not be done is a finding and no error, because a disk that can only be read must still be served from.
    ///
    /// # Errors
    /// [`Error::Io`] if it is this process that could not read.
    pub(crate) fn mended<T>(
        &mut self,
        subject: &Subject,
        dir: Dir,
        name: &str,
        parse: &dyn Fn(&[u8]) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        let copy = format!("{name}{COPY}");
        let [main, other] = self.twice(dir, name, parse)?;
        Ok(match (main, other) {
            (Ok(None), Ok(None)) => None,
            (Ok(Some((said, file))), other) => {
                match other {
                    Ok(Some((_, same))) if same == file => return Ok(Some(said)),
                    // As a power failure leaves it before the change is acknowledged.
                    Ok(_) => {}
                    Err(why) => self.found(subject, format!("its copy: {why}"), Outcome::Restored, Some((dir, &copy))),
                }
                self.mend(subject, dir, name, &file);
                Some(said)
            }
            (main, Ok(Some((said, file)))) => {
                let (why, wrong) = match main {
                    Err(why) => (why, Some((dir, name))),
                    Ok(_) => ("it is missing".to_owned(), None),
                };
                self.found(subject, why, Outcome::Restored, wrong);
                self.mend(subject, dir, name, &file);
                Some(said)
            }
            (main, other) => {
                for (read, each) in [(main, name), (other, &copy)] {
                    if let Err(why) = read {
                        self.found(subject, why, Outcome::Lost, Some((dir, each)));
                    }
                }
                None
            }
        })
    }

    /// Writes both files anew with what one of them holds.
    fn mend(&mut self, subject: &Subject, dir: Dir, name: &str, file: &[u8]) {
        // Said already, by the change that failed.
        if self.unsettled.is_some() {
            return;
        }
        if let Err(e) = self.replace(dir, name, file) {
            self.found(subject, format!("it could not be written anew: {e}"), Outcome::Restored, None);
        }
    }

    /// Remembers what was found, and moves the file out of the way.
    pub(crate) fn found(&mut self, subject: &Subject, why: String, outcome: Outcome, file: Option<(Dir, &str)>) {
        let (mut why, mut quarantined) = (why, None);
        if let Some((dir, name)) = file {
            match self.quarantine(dir, name) {
                Ok(to) => quarantined = Some(to),
                Err(e) => why = format!("{why}; {e}"),
            }
        }
        self.find(Finding { subject: subject.clone(), why, outcome, quarantined });
    }
}

/// Of a small file: nothing, what it says and holds, or what is wrong with it.
pub(crate) type Read<T> = Result<Option<(T, Vec<u8>)>, String>;

/// All of a file that has so many bytes.
fn whole_file(handle: &dyn Handle, size: u64) -> io::Result<Vec<u8>> {
    let mut file = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    let mut filled = 0;
    while let Some(rest) = file.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match handle.read_at(filled as u64, rest)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => filled += read,
        }
    }
    Ok(file)
}

/// The seal of an open file of so many bytes, and how many come before it.
pub(crate) fn seal_in(handle: &dyn Handle, size: u64) -> io::Result<Option<(u64, [u8; SEAL])>> {
    let Some(body) = size.checked_sub(SEAL as u64) else { return Ok(None) };
    let mut seal = [0; SEAL];
    let mut filled = 0;
    while filled < SEAL {
        match handle.read_at(body + filled as u64, &mut seal[filled..])? {
            0 => return Ok(None),
            read => filled += read,
        }
    }
    Ok(Some((body, seal)))
}
