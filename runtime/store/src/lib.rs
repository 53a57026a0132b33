//! The durable store: what the appliance keeps when its power is cut.
//!
//! Owns the data directory, which it is given open and never leaves: components and artefacts by their digests, names that
//! stand for digests, graphs as an ordered history with one of them current, and small secret records. Never knows what a component
//! or a manifest means, fetches nothing, and prints nothing. Called by control alone; calls block on the disk.
//!
//! ```text
//! format  names  current            small files, sealed, each with a copy
//! graphs/<number>                   the same
//! records/<name>                    the same
//! components/<digest>               as they are
//! artefacts/<digest>-<settings>     machine code, sealed
//! quarantine/<serial>-<origin>      what was found to be wrong, the newest of it
//! ```
//!
//! **Durable.** What a call acknowledges is on the disk: written to a temporary file, synced, renamed, directory synced. When the
//! power fails in the middle of a call, the store has what was before it or what was to be after it. Small files have two copies, so that no
//! single damaged file loses what was acknowledged.
//!
//! **Verified.** Whatever is read is checked against its digest. What is wrong is moved into `quarantine/` and reported by name; the
//! rest serves.
//!
//! **Bounded.** By [`Limits`], and by the room on the disk. A call that finds no room says how much it needs, and leaves nothing.
//!
//! ```
//! use std::fs::File;
//! use gaia_store::{Limits, NewGraph, Store};
//!
//! let directory = tempfile::tempdir()?;
//! let (store, wrong) = Store::open(File::open(directory.path())?, Limits::default())?;
//! assert!(wrong.is_empty());
//!
//! let mut upload = store.upload()?;
//! upload.append(b"\0asm")?;
//! let digest = upload.finish(None)?;
//! store.set_name("omega/hello:1", digest)?;
//!
//! let images = [("omega/hello:1".to_owned(), digest)].into();
//! let number = store.append_graph(NewGraph { manifest: "[brane.hello]".into(), images, ..NewGraph::default() })?;
//! store.set_current(number)?;
//! assert_eq!(store.current().map(|graph| graph.number), Some(1));
//! assert_eq!(store.component(&digest)?, b"\0asm");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod digest;
mod disk;
#[doc(hidden)]
pub mod exercise;
mod form;
mod reference;
#[cfg(test)]
mod simulated;
mod state;
#[cfg(test)]
mod tests;
mod upload;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

pub use digest::{Digest, NotADigest};
pub use form::{Graph, VERSION};
pub use reference::{NotAReference, REFERENCE_MAX, Reference, WORD_MAX};
pub use upload::Upload;

use disk::{Dir, Directory, Disk};
use form::{Current, Format};
use reference::is_word;
use state::{COPY, PIECE, State, TEMPORARY, is_of_the_process, path, seal_in, taken};
use upload::Staged;

/// The longest manifest in a graph, in bytes: what the manifest's parser takes.
pub const MANIFEST_MAX: usize = 1 << 20;
/// Images of one graph at most.
pub const IMAGES_MAX: usize = 1024;
/// The longest of a graph's other texts, in bytes: file name, who deployed it, one image's name. An outcome is cut to it.
pub const TEXT_MAX: usize = 1024;
/// The longest record, in bytes: 64 KiB of somebody's, and what whoever keeps it puts around them.
pub const RECORD_MAX: usize = 68 << 10;
/// Records at most.
pub const RECORDS_MAX: usize = 256;

const FORMAT: &str = "format";
const NAMES: &str = "names";
const CURRENT: &str = "current";
/// Small files in the data directory itself.
const SMALL: [&str; 3] = [FORMAT, NAMES, CURRENT];

/// What the store may grow to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// All files together, in bytes as the disk counts them: multiples of 4096.
    pub bytes: u64,
    /// One component, in bytes.
    pub component_bytes: u64,
    /// One artefact, in bytes.
    pub artefact_bytes: u64,
    /// Names.
    pub names: usize,
    /// Graphs that are kept; 3 at least: the current one, the one before it, and the one that is to be current.
    pub graphs: usize,
    /// Files in quarantine.
    pub quarantine_files: usize,
    /// Bytes in quarantine.
    pub quarantine_bytes: u64,
}

impl Default for Limits {
    /// 4 GiB, components of 64 MiB, artefacts of 512 MiB, 1024 names, 64 graphs, 16 files of 64 MiB together in quarantine.
    fn default() -> Self {
        Self {
            bytes: 4 << 30,
            component_bytes: 64 << 20,
            artefact_bytes: 512 << 20,
            names: 1024,
            graphs: 64,
            quarantine_files: 16,
            quarantine_bytes: 64 << 20,
        }
    }
}

impl Limits {
    /// Bytes that components and artefacts leave to the small files: the longest of those, its copy, and what they are to take the place of;
    /// or an eighth of a small store.
    fn reserve(&self) -> u64 {
        (4 * form::SMALL_MAX).min(self.bytes / 8)
    }
}

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the store open.
    #[error("the store is in use by another process")]
    InUse,
    /// A later version has written the store. Nothing was changed.
    #[error(
        "the store has format {found}, and this version knows {known}: start the version that wrote it, or a later one"
    )]
    Newer {
        /// The store's.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// The store has no such component.
    #[error("{digest} is not in the store: push it again")]
    Missing {
        /// The component's.
        digest: Digest,
    },
    /// The component is damaged. It was moved into quarantine, if that could be done, and is then no longer in the store.
    #[error("{digest} is damaged: {why}; push it again")]
    Corrupt {
        /// The component's.
        digest: Digest,
        /// What is wrong with it.
        why: String,
    },
    /// There is no room, by the store's own limit or on the disk. Nothing was changed.
    #[error(
        "the store is full: this needs {needed} bytes, and {free} are free; remove names that nothing needs and collect, or take a larger disk"
    )]
    Full {
        /// What the step that failed needs, in bytes.
        needed: u64,
        /// What it could have, in bytes.
        free: u64,
    },
    /// Larger than it may be.
    #[error("{what}: more than {limit} bytes")]
    TooLarge {
        /// What it is.
        what: String,
        /// In bytes.
        limit: u64,
    },
    /// More of them than there may be.
    #[error("there are {limit} {what} already: remove some first")]
    TooMany {
        /// What they are.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// No name of a component.
    #[error("{name:?} is no name: {why}")]
    Name {
        /// As it was given.
        name: String,
        /// What is wrong with it.
        why: NotAReference,
    },
    /// No name of a record, or no settings of an artefact.
    #[error("{0:?} is not made of 1 to 64 letters, digits, _ and -")]
    Word(String),
    /// There is no graph of this number.
    #[error("there is no graph {0}, or no longer")]
    NoGraph(u64),
    /// What was uploaded is not what was expected.
    #[error("expected {expected}, and got {found}")]
    Differs {
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// An earlier change failed in a way that leaves open what is on the disk. It can be read, but nothing is changed until the
    /// store is opened anew.
    #[error("the disk failed while something was changed, so nothing more is until the store is opened again: {0}")]
    Unsettled(String),
    /// The disk.
    #[error("{step}: {source}")]
    Io {
        /// What was being done.
        step: String,
        /// What the kernel says.
        source: io::Error,
    },
}

/// What something that was found to be wrong is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// The store's format.
    Format,
    /// All names.
    Names,
    /// Which graph is current.
    Current,
    /// A graph.
    Graph(u64),
    /// A record.
    Record(String),
    /// A component.
    Component(Digest),
    /// An artefact.
    Artefact(ArtefactKey),
    /// A file that is none of the store's: its path below the data directory.
    Foreign(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format => f.write_str(FORMAT),
            Self::Names => f.write_str(NAMES),
            Self::Current => f.write_str(CURRENT),
            Self::Graph(number) => write!(f, "graph {number}"),
            Self::Record(name) => write!(f, "record {name}"),
            Self::Component(digest) => write!(f, "component {digest}"),
            Self::Artefact(key) => write!(f, "artefact of {} for {}", key.component, key.settings),
            Self::Foreign(path) => write!(f, "file {path}"),
        }
    }
}

/// What became of something that was found to be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Mended from its copy.
    Restored,
    /// Both copies were lost, and other files say what they said.
    Recovered,
    /// It is no longer in the store: a component may be pushed or fetched again, an artefact is compiled anew.
    Lost,
    /// It was never the store's.
    Foreign,
}

/// Something that was found to be wrong. Prints as a line for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub subject: Subject,
    /// What is wrong with it.
    pub why: String,
    /// What became of it.
    pub outcome: Outcome,
    /// The name of the damaged file in `quarantine/`, if there is one.
    pub quarantined: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.outcome {
            Outcome::Restored => "restored from its copy",
            Outcome::Recovered => "recovered from the history",
            Outcome::Lost => "lost",
            Outcome::Foreign => "none of the store's",
        };
        write!(f, "{}: {} ({outcome}", self.subject, self.why)?;
        if let Some(name) = &self.quarantined {
            write!(f, "; quarantine/{name}")?;
        }
        f.write_str(")")
    }
}

/// What an artefact is found by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ArtefactKey {
    /// What it was compiled from.
    pub component: Digest,
    /// All else that it depends on, as a word of 1 to [`WORD_MAX`] letters, digits, `_` and `-`.
    pub settings: String,
}

impl ArtefactKey {
    fn file(&self) -> Result<String, Error> {
        if !is_word(&self.settings) {
            return Err(Error::Word(self.settings.clone()));
        }
        Ok(format!("{}-{}", self.component.hex(), self.settings))
    }

    fn of_file(name: &str) -> Option<Self> {
        let (hex, settings) = name.split_once('-')?;
        let component = Digest::from_hex(hex).ok()?;
        is_word(settings).then(|| Self { component, settings: settings.to_owned() })
    }
}

/// A graph that is to be appended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewGraph {
    /// The manifest's text, up to [`MANIFEST_MAX`] bytes.
    pub manifest: String,
    /// The manifest's file name, for messages.
    pub file: String,
    /// Images, as the manifest calls them, and what they were resolved to. All of them must be in the store.
    pub images: BTreeMap<String, Digest>,
    /// Who deploys it.
    pub by: String,
    /// When, in ns since 1970.
    pub at_ns: u64,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Files.
    pub files: u64,
    /// Bytes that they took on the disk.
    pub bytes: u64,
}

/// How much there is. Bytes are as the disk counts them: multiples of 4096.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// All files, and what is promised to those that are being written.
    pub bytes: u64,
    /// [`Limits::bytes`]
    pub limit: u64,
    /// What a component could still have, by the limit and the disk.
    pub free: u64,
    /// Components.
    pub components: u64,
    /// Their bytes.
    pub component_bytes: u64,
    /// Artefacts.
    pub artefacts: u64,
    /// Their bytes.
    pub artefact_bytes: u64,
    /// Names.
    pub names: u64,
    /// Graphs.
    pub graphs: u64,
    /// Records.
    pub records: u64,
    /// Files in quarantine.
    pub quarantined: u64,
    /// Their bytes.
    pub quarantined_bytes: u64,
}

/// What the store and its uploads share.
pub(crate) struct Shared {
    disk: Arc<dyn Disk>,
    limits: Limits,
    state: Mutex<State>,
}

impl Shared {
    /// A panic elsewhere leaves what is in memory behind what is on the disk at worst, as a failed change does.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The store. May be shared between threads: large files are read and written while others go on.
pub struct Store {
    shared: Arc<Shared>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("limits", &self.shared.limits).finish_non_exhaustive()
    }
}

/// Why a large file is not what it should be.
enum Wrong {
    Missing,
    Contents(String),
    /// Not the file's fault.
    Other(Error),
}

impl Store {
    /// Opens the store in this open directory, makes it if there is none, and says what is wrong with it. Other files in the directory
    /// are left alone. The descriptor is needed no longer when this returns: the directory is opened anew, because a lock belongs
    /// to an open directory, and whoever handed this one down may have it open, too.
    ///
    /// Removes what a power failure has left half done. Reads all small files; components and artefacts are verified whenever they are
    /// read. A disk that can only be read is opened, too, if there is a store on it.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Newer`]; [`Error::Full`] and [`Error::Io`] if there is no store and none can be made, or
    /// if a directory cannot be read.
    pub fn open(directory: impl AsFd, limits: Limits) -> Result<(Self, Vec<Finding>), Error> {
        let opened = Directory::of(directory.as_fd())
            .map_err(|source| Error::Io { step: "opening the data directory".to_owned(), source })?;
        Self::on(Arc::new(opened), limits)
    }

    fn on(disk: Arc<dyn Disk>, limits: Limits) -> Result<(Self, Vec<Finding>), Error> {
        let limits = Limits { graphs: limits.graphs.max(3), ..limits };
        let mut state = State::of(Arc::clone(&disk), limits);
        match disk.lock() {
            Ok(true) => {}
            Ok(false) => return Err(Error::InUse),
            Err(e) => return Err(state.failed("locking the data directory", 0, e)),
        }
        let formats = state.twice(Dir::Root, FORMAT, &form::format)?;
        let versions = formats.iter().flatten().flatten().map(|(format, _)| format.version);
        if let Some(found) = versions.max().filter(|version| *version > VERSION) {
            return Err(Error::Newer { found, known: VERSION });
        }
        let none = formats.iter().all(|format| matches!(format, Ok(None)));
        lay_out(&mut state, none)?;
        read_all(&mut state)?;
        let findings = state.findings.drain(..).collect();
        Ok((Self { shared: Arc::new(Shared { disk, limits, state: Mutex::new(state) }) }, findings))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// What was found to be wrong since the store was opened, or since this was called before: the newest 256.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        self.state().findings.drain(..).collect()
    }

    // Components.

    /// Begins to take a component.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Unsettled`], [`Error::Io`]
    pub fn upload(&self) -> Result<Upload, Error> {
        let limit = self.shared.limits.component_bytes;
        Ok(Upload::new(Staged::new(Arc::clone(&self.shared), Dir::Components, limit)?))
    }

    /// Whether the component is here. Not whether it is intact.
    #[must_use]
    pub fn has(&self, digest: &Digest) -> bool {
        self.state().has(Dir::Components, &digest.hex())
    }

    /// A component, verified.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Corrupt`], and it is in quarantine; [`Error::TooLarge`]; [`Error::Io`]
    pub fn component(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let limit = self.shared.limits.component_bytes;
        let size = self.state().files.get(&(Dir::Components, digest.hex())).copied().unwrap_or(0);
        if size > limit {
            return Err(Error::TooLarge { what: digest.to_string(), limit });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        self.copy_component(digest, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes a component to somewhere, piece by piece, and says how many bytes it has. It is verified when this returns, and
    /// not before.
    ///
    /// # Errors
    /// Those of [`Store::component`] but for the size; [`Error::Io`] if it could not be written there.
    pub fn copy_component(&self, digest: &Digest, to: &mut dyn Write) -> Result<u64, Error> {
        let name = digest.hex();
        let why = match self.read_component(digest, &name, to) {
            Ok(bytes) => return Ok(bytes),
            Err(Wrong::Other(e)) => return Err(e),
            Err(Wrong::Missing) => "it is missing".to_owned(),
            Err(Wrong::Contents(why)) => why,
        };
        // Once more, while nobody can put another in its place.
        let mut state = self.state();
        match self.read_component(digest, &name, &mut io::sink()) {
            Ok(_) => Err(Error::Io { step: format!("reading {digest}"), source: io::Error::other(why) }),
            Err(Wrong::Other(e)) => Err(e),
            Err(Wrong::Missing) => {
                if state.has(Dir::Components, &name) {
                    state.remove(Dir::Components, &name)?;
                    state.found(&Subject::Component(*digest), "it is missing".to_owned(), Outcome::Lost, None);
                }
                Err(Error::Missing { digest: *digest })
            }
            Err(Wrong::Contents(why)) => {
                let file = Some((Dir::Components, name.as_str()));
                state.found(&Subject::Component(*digest), why.clone(), Outcome::Lost, file);
                Err(Error::Corrupt { digest: *digest, why })
            }
        }
    }

    fn read_component(&self, digest: &Digest, name: &str, to: &mut dyn Write) -> Result<u64, Wrong> {
        let (handle, size) = self.opened(Dir::Components, name)?;
        let mut hash = Sha256::new();
        copied(&*handle, size, &mut hash, to)?;
        let found = Digest::finished(hash);
        if found == *digest { Ok(size) } else { Err(Wrong::Contents(format!("its contents are {found}"))) }
    }

    /// A large file and its size in bytes.
    fn opened(&self, dir: Dir, name: &str) -> Result<(Box<dyn disk::Handle>, u64), Wrong> {
        let handle = self.shared.disk.open(dir, name).map_err(unreadable)?;
        let size = handle.size().map_err(unreadable)?;
        Ok((handle, size))
    }

    // Artefacts.

    /// Keeps an artefact, all that comes from there. Durable when it returns. One of the same key is replaced.
    ///
    /// # Errors
    /// [`Error::Word`], [`Error::TooLarge`], [`Error::Full`], [`Error::Unsettled`]; [`Error::Io`], also if it could not be
    /// read from there.
    pub fn put_artefact(&self, key: &ArtefactKey, mut from: impl Read) -> Result<(), Error> {
        let name = key.file()?;
        let limit = self.shared.limits.artefact_bytes.saturating_add(form::SEAL as u64);
        let mut staged = Staged::new(Arc::clone(&self.shared), Dir::Artefacts, limit)?;
        let mut hash = form::hash_of_place(Dir::Artefacts, &name);
        let mut piece = vec![0; PIECE];
        loop {
            match from.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => {
                    let bytes = piece.get(..read).unwrap_or_default();
                    hash.update(bytes);
                    staged.append(bytes)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Io { step: "reading the artefact to be kept".to_owned(), source }),
            }
        }
        staged.append(&form::seal_of(hash))?;
        staged.put_in_place(&name)
    }

    /// Writes an artefact to somewhere, piece by piece, and says how many bytes it has: `None` if there is none, or none that is
    /// intact. Then a part of it may have been written. It is verified when this returns, and not before.
    ///
    /// # Errors
    /// [`Error::Word`]; [`Error::Io`] if it could not be written there.
    pub fn copy_artefact(&self, key: &ArtefactKey, to: &mut dyn Write) -> Result<Option<u64>, Error> {
        let name = key.file()?;
        match self.read_artefact(&name, to) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(Wrong::Other(e)) => return Err(e),
            Err(Wrong::Missing | Wrong::Contents(_)) => {}
        }
        let mut state = self.state();
        match self.read_artefact(&name, &mut io::sink()) {
            // Another was put in its place meanwhile.
            Ok(_) => {}
            Err(Wrong::Other(e)) => return Err(e),
            Err(Wrong::Missing) => {
                if state.has(Dir::Artefacts, &name) {
                    state.remove(Dir::Artefacts, &name)?;
                }
            }
            Err(Wrong::Contents(why)) => {
                let file = Some((Dir::Artefacts, name.as_str()));
                state.found(&Subject::Artefact(key.clone()), why, Outcome::Lost, file);
            }
        }
        Ok(None)
    }

    /// An artefact in memory: see [`Store::copy_artefact`].
    ///
    /// # Errors
    /// [`Error::Word`], [`Error::Io`]; [`Error::TooLarge`] beyond [`Limits::artefact_bytes`].
    pub fn artefact(&self, key: &ArtefactKey) -> Result<Option<Vec<u8>>, Error> {
        let limit = self.shared.limits.artefact_bytes;
        let Some(size) = self.state().files.get(&(Dir::Artefacts, key.file()?)).copied() else { return Ok(None) };
        if size.saturating_sub(form::SEAL as u64) > limit {
            return Err(Error::TooLarge { what: Subject::Artefact(key.clone()).to_string(), limit });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        Ok(self.copy_artefact(key, &mut bytes)?.map(|_| bytes))
    }

    fn read_artefact(&self, name: &str, to: &mut dyn Write) -> Result<u64, Wrong> {
        let (handle, size) = self.opened(Dir::Artefacts, name)?;
        let short = || Wrong::Contents("it is too short".to_owned());
        let (body, seal) = seal_in(&*handle, size).map_err(unreadable)?.ok_or_else(short)?;
        let mut hash = form::hash_of_place(Dir::Artefacts, name);
        copied(&*handle, body, &mut hash, to)?;
        let wrong = || Wrong::Contents("its contents are not what was written".to_owned());
        if form::seal_of(hash) == seal { Ok(body) } else { Err(wrong()) }
    }

    // Names.

    /// Lets a name stand for a component, whatever it stood for before. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::Missing`] if the component is not here, [`Error::TooMany`], [`Error::Full`],
    /// [`Error::Unsettled`], [`Error::Io`]
    pub fn set_name(&self, name: &str, digest: Digest) -> Result<(), Error> {
        let name: Reference = name.parse().map_err(|why| Error::Name { name: name.to_owned(), why })?;
        let mut state = self.state();
        if !state.has(Dir::Components, &digest.hex()) {
            return Err(Error::Missing { digest });
        }
        let mut names = state.names.clone();
        names.insert(name.as_str().to_owned(), digest);
        if names.len() > state.limits.names.max(state.names.len()) {
            return Err(Error::TooMany { what: "names", limit: state.limits.names });
        }
        replace_names(&mut state, names)
    }

    /// Removes a name, and says whether there was one. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Unsettled`], [`Error::Io`]
    pub fn remove_name(&self, name: &str) -> Result<bool, Error> {
        let mut state = self.state();
        let mut names = state.names.clone();
        if names.remove(name).is_none() {
            return Ok(false);
        }
        replace_names(&mut state, names)?;
        Ok(true)
    }

    /// What a name stands for. The component may have been lost since.
    #[must_use]
    pub fn resolve(&self, name: &str) -> Option<Digest> {
        self.state().names.get(name).copied()
    }

    /// All names, sorted, and what they stand for.
    #[must_use]
    pub fn names(&self) -> Vec<(String, Digest)> {
        self.state().names.iter().map(|(name, digest)| (name.clone(), *digest)).collect()
    }

    // Graphs.

    /// Appends a graph to the history, and says its number. Durable when it returns, but not current. Beyond [`Limits::graphs`] the
    /// oldest is dropped that is neither current nor the one before that.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::TooMany`] images, [`Error::Missing`] if one of them is not here, [`Error::Full`],
    /// [`Error::Unsettled`], [`Error::Io`]
    pub fn append_graph(&self, new: NewGraph) -> Result<u64, Error> {
        let texts =
            [("manifest", &new.manifest, MANIFEST_MAX), ("file", &new.file, TEXT_MAX), ("by", &new.by, TEXT_MAX)];
        let images = new.images.keys().map(|image| ("image", image, TEXT_MAX));
        for (what, text, limit) in texts.into_iter().chain(images) {
            if text.len() > limit {
                return Err(Error::TooLarge { what: format!("a graph's {what}"), limit: limit as u64 });
            }
        }
        if new.images.len() > IMAGES_MAX {
            return Err(Error::TooMany { what: "images", limit: IMAGES_MAX });
        }
        let mut state = self.state();
        if let Some(digest) = new.images.values().find(|digest| !state.has(Dir::Components, &digest.hex())) {
            return Err(Error::Missing { digest: *digest });
        }
        let number = state.next;
        if number > form::NUMBER_MAX {
            return Err(Error::TooMany { what: "graphs", limit: state.limits.graphs });
        }
        let previous = state.current.map(|current| current.number);
        let NewGraph { manifest, file, images, by, at_ns } = new;
        let (outcome, made_current) = (None, None);
        write_graph(&mut state, Graph { number, previous, manifest, file, images, by, at_ns, outcome, made_current })?;
        state.next = number + 1;
        // The new one is durable, so it is acknowledged even if an old one cannot be dropped.
        let _ = drop_old_graphs(&mut state, number);
        Ok(number)
    }

    /// Makes a graph the current one: the acknowledgement of a deploy, or of a way back. Durable when it returns, and the graph's own
    /// file says so, too, if there is room to write that.
    ///
    /// # Errors
    /// [`Error::NoGraph`], [`Error::Full`], [`Error::Unsettled`], [`Error::Io`]
    pub fn set_current(&self, number: u64) -> Result<(), Error> {
        let mut state = self.state();
        let previous = state.graphs.get(&number).ok_or(Error::NoGraph(number))?.previous;
        replace_current(&mut state, Current { number, previous })?;
        // It is current, so it is acknowledged even if that cannot be written; the next to open the store tries again.
        let _ = tell_of_current(&mut state, number);
        Ok(())
    }

    /// Notes what became of a graph, in place of what was noted before; cut to [`TEXT_MAX`] bytes. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::NoGraph`], [`Error::Full`], [`Error::Unsettled`], [`Error::Io`]
    pub fn note(&self, number: u64, outcome: &str) -> Result<(), Error> {
        let mut state = self.state();
        let mut graph = Graph::clone(state.graphs.get(&number).ok_or(Error::NoGraph(number))?);
        let cut = outcome.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= TEXT_MAX).last();
        graph.outcome = outcome.get(..cut.unwrap_or(0)).map(str::to_owned);
        write_graph(&mut state, graph)
    }

    /// The current graph. `None` also if it was lost: [`Store::previous_of_current`] is known even then.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Graph>> {
        let state = self.state();
        state.graphs.get(&state.current?.number).cloned()
    }

    /// The number of the current graph, even if that was lost.
    #[must_use]
    pub fn current_number(&self) -> Option<u64> {
        self.state().current.map(|current| current.number)
    }

    /// What a way back leads to: what was current when the current graph was appended.
    #[must_use]
    pub fn previous_of_current(&self) -> Option<Arc<Graph>> {
        let state = self.state();
        state.graphs.get(&state.current?.previous?).cloned()
    }

    /// A graph of the history.
    #[must_use]
    pub fn graph(&self, number: u64) -> Option<Arc<Graph>> {
        self.state().graphs.get(&number).cloned()
    }

    /// The history, oldest first.
    #[must_use]
    pub fn graphs(&self) -> Vec<Arc<Graph>> {
        self.state().graphs.values().cloned().collect()
    }

    // Records.

    /// A record, verified. `None` if there is none, or if it was lost; then that is among the findings.
    ///
    /// # Errors
    /// [`Error::Word`]; [`Error::Io`] if it is this process that cannot read it.
    pub fn record(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        if !is_word(name) {
            return Err(Error::Word(name.to_owned()));
        }
        let subject = Subject::Record(name.to_owned());
        self.state().mended(&subject, Dir::Records, name, &|body| Ok(body.to_vec()))
    }

    /// Keeps a record of up to [`RECORD_MAX`] bytes, readable by this user alone. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Word`], [`Error::TooLarge`], [`Error::TooMany`], [`Error::Full`], [`Error::Unsettled`], [`Error::Io`]
    pub fn set_record(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        if !is_word(name) {
            return Err(Error::Word(name.to_owned()));
        }
        if bytes.len() > RECORD_MAX {
            return Err(Error::TooLarge { what: format!("record {name}"), limit: RECORD_MAX as u64 });
        }
        let mut state = self.state();
        if !state.has(Dir::Records, name) && records(&state).count() >= RECORDS_MAX {
            return Err(Error::TooMany { what: "records", limit: RECORDS_MAX });
        }
        state.replace(Dir::Records, name, &form::sealed(Dir::Records, name, bytes))
    }

    /// Removes a record, and says whether there was one. Durable when it returns; the bytes may be on the disk still.
    ///
    /// # Errors
    /// [`Error::Word`], [`Error::Unsettled`], [`Error::Io`]
    pub fn remove_record(&self, name: &str) -> Result<bool, Error> {
        if !is_word(name) {
            return Err(Error::Word(name.to_owned()));
        }
        let mut state = self.state();
        if !state.has(Dir::Records, name) {
            return Ok(false);
        }
        state.remove_both(Dir::Records, name)?;
        Ok(true)
    }

    /// The names of all records that begin like this, sorted. Not whether they are intact.
    #[must_use]
    pub fn records(&self, prefix: &str) -> Vec<String> {
        records(&self.state()).filter(|name| name.starts_with(prefix)).map(str::to_owned).collect()
    }

    /// Moves a record into quarantine that is as it was written and yet means nothing to whoever reads it; says so among the
    /// findings.
    ///
    /// # Errors
    /// [`Error::Word`]
    pub fn set_record_aside(&self, name: &str, why: &str) -> Result<(), Error> {
        if !is_word(name) {
            return Err(Error::Word(name.to_owned()));
        }
        let mut state = self.state();
        let subject = Subject::Record(name.to_owned());
        // The copy first: alone it would be taken for what is left of the record.
        for file in [format!("{name}{COPY}"), name.to_owned()] {
            if state.has(Dir::Records, &file) {
                state.found(&subject, why.to_owned(), Outcome::Lost, Some((Dir::Records, &file)));
            }
        }
        Ok(())
    }

    // Room.

    /// Removes components that no name, no graph and none of `keep` refers to, and the artefacts of all but those; and the oldest in
    /// quarantine, beyond its bounds. Durable when it returns; whatever interrupts it, nothing that is referred to is lost.
    ///
    /// `keep` is for what is about to get a name or a graph: a component that was uploaded just now has neither.
    ///
    /// # Errors
    /// [`Error::Unsettled`], [`Error::Io`]
    pub fn collect(&self, keep: &BTreeSet<Digest>) -> Result<Collected, Error> {
        let mut state = self.state();
        state.settled()?;
        let graphs = state.graphs.values().flat_map(|graph| graph.images.values());
        let referred: BTreeSet<Digest> = state.names.values().chain(graphs).chain(keep).copied().collect();
        let mut collected = Collected::default();
        // Artefacts first: none is ever without its component.
        for dir in [Dir::Artefacts, Dir::Components] {
            let digest = |name: &str| match dir {
                Dir::Artefacts => ArtefactKey::of_file(name).map(|key| key.component),
                _ => Digest::from_hex(name).ok(),
            };
            let unreferred = |name: &str| digest(name).is_none_or(|digest| !referred.contains(&digest));
            let names: Vec<String> =
                state.files_in(dir).map(|(name, _)| name.to_owned()).filter(|name| unreferred(name)).collect();
            for name in &names {
                let size = state.remove(dir, name)?.unwrap_or(0);
                collected.files += 1;
                collected.bytes += taken(size);
            }
            if !names.is_empty() {
                state.sync_directory(dir)?;
            }
        }
        let (files, bytes) = state.trim_quarantine()?;
        Ok(Collected { files: collected.files + files, bytes: collected.bytes + bytes })
    }

    /// How much there is.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk does not say how much is free.
    pub fn usage(&self) -> Result<Usage, Error> {
        let state = self.state();
        let sum = |dir| state.files_in(dir).fold((0, 0), |(files, bytes), (_, size)| (files + 1, bytes + taken(size)));
        let (components, component_bytes) = sum(Dir::Components);
        let (artefacts, artefact_bytes) = sum(Dir::Artefacts);
        let (quarantined, quarantined_bytes) = sum(Dir::Quarantine);
        Ok(Usage {
            bytes: state.bytes + state.pending,
            limit: state.limits.bytes,
            free: state.free_bytes(Dir::Components)?,
            components,
            component_bytes,
            artefacts,
            artefact_bytes,
            names: state.names.len() as u64,
            graphs: state.graphs.len() as u64,
            records: records(&state).count() as u64,
            quarantined,
            quarantined_bytes,
        })
    }
}

/// The names of the records.
fn records(state: &State) -> impl Iterator<Item = &str> {
    state.files_in(Dir::Records).map(|(name, _)| name).filter(|name| !name.ends_with(COPY))
}

fn unreadable(e: io::Error) -> Wrong {
    match e.kind() {
        io::ErrorKind::NotFound => Wrong::Missing,
        _ if is_of_the_process(&e) => Wrong::Other(Error::Io { step: "reading".to_owned(), source: e }),
        _ => Wrong::Contents(format!("it cannot be read: {e}")),
    }
}

/// No value of these is known that JSON has no words for.
fn unwritable(why: String) -> Error {
    Error::Io { step: "writing JSON".to_owned(), source: io::Error::other(why) }
}

/// Hands on so many bytes of a file, and hashes them.
fn copied(handle: &dyn disk::Handle, bytes: u64, hash: &mut Sha256, to: &mut dyn Write) -> Result<(), Wrong> {
    let mut buffer = vec![0; usize::try_from(bytes).map_or(PIECE, |bytes| bytes.min(PIECE))];
    let mut at = 0;
    while at < bytes {
        let most = usize::try_from(bytes - at).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let read = handle.read_at(at, &mut buffer[..most]).map_err(unreadable)?;
        let Some(piece) = buffer.get(..read).filter(|piece| !piece.is_empty()) else {
            return Err(Wrong::Contents("it ends too early".to_owned()));
        };
        hash.update(piece);
        let failed = |source| Wrong::Other(Error::Io { step: "handing on what was read".to_owned(), source });
        to.write_all(piece).map_err(failed)?;
        at += read as u64;
    }
    Ok(())
}

fn replace_names(state: &mut State, names: form::Names) -> Result<(), Error> {
    let file = form::sealed_json(Dir::Root, NAMES, &names).map_err(unwritable)?;
    state.replace(Dir::Root, NAMES, &file)?;
    state.names = names;
    Ok(())
}

fn replace_current(state: &mut State, current: Current) -> Result<(), Error> {
    let file = form::sealed_json(Dir::Root, CURRENT, &current).map_err(unwritable)?;
    state.replace(Dir::Root, CURRENT, &file)?;
    state.current = Some(current);
    Ok(())
}

/// The graph that was made current last, as the graphs say it themselves, and by which change.
fn newest_current(state: &State) -> Option<(u64, u64)> {
    let all = state.graphs.values().filter_map(|graph| Some((graph.made_current?, graph.number)));
    all.max().map(|(change, number)| (number, change))
}

/// Has the current graph's own file say that it is. Durable when it returns.
fn tell_of_current(state: &mut State, number: u64) -> Result<(), Error> {
    let newest = newest_current(state);
    let Some(graph) = state.graphs.get(&number).filter(|_| newest.is_none_or(|(of, _)| of != number)) else {
        return Ok(());
    };
    let made_current = Some(newest.map_or(0, |(_, change)| change).saturating_add(1).min(form::NUMBER_MAX));
    let graph = Graph { made_current, ..Graph::clone(graph) };
    write_graph(state, graph)
}

fn write_graph(state: &mut State, graph: Graph) -> Result<(), Error> {
    let name = graph.number.to_string();
    let file = form::sealed_json(Dir::Graphs, &name, &graph).map_err(unwritable)?;
    state.replace(Dir::Graphs, &name, &file)?;
    state.graphs.insert(graph.number, Arc::new(graph));
    Ok(())
}

/// Drops the oldest graphs beyond the limit, but none that a way leads to.
fn drop_old_graphs(state: &mut State, newest: u64) -> Result<(), Error> {
    while state.graphs.len() > state.limits.graphs {
        let current = state.current.map(|current| [Some(current.number), current.previous]).unwrap_or_default();
        let kept = |number: u64| number == newest || current.contains(&Some(number));
        let Some(oldest) = state.graphs.keys().copied().find(|number| !kept(*number)) else { break };
        state.remove_both(Dir::Graphs, &oldest.to_string())?;
        state.graphs.remove(&oldest);
    }
    Ok(())
}

/// Makes what is missing, removes temporary files, and counts the others.
fn lay_out(state: &mut State, no_format: bool) -> Result<(), Error> {
    let listed = |state: &State, dir: Dir| {
        state.disk.list(dir).map_err(|e| state.failed(format!("listing {}", dir.name()), 0, e))
    };
    let mut laid_out = false;
    for entry in listed(state, Dir::Root)? {
        let Some(name) = entry.name.as_deref() else { continue };
        laid_out |= Dir::BELOW.iter().any(|dir| dir.name() == name);
        let temporary = name.strip_suffix(TEMPORARY);
        let own = temporary.unwrap_or(name);
        if !SMALL.contains(&own.strip_suffix(COPY).unwrap_or(own)) {
            continue;
        }
        if temporary.is_some() {
            remove_temporary(state, Dir::Root, name);
        } else if let Some(size) = entry.size {
            state.count(Dir::Root, name, size);
        }
    }
    if no_format {
        // Before the directories, so that a store that has those and no format is known to be damaged.
        let made = write_format(state);
        if laid_out {
            state.found(&Subject::Format, "it is missing".to_owned(), Outcome::Lost, None);
        } else {
            made?;
        }
    }
    for dir in Dir::BELOW {
        let made = state.disk.make_directory(dir);
        made.map_err(|e| state.failed(format!("making {}", dir.name()), taken(0), e))?;
    }
    // A store that can only be read has had them for long.
    let synced = state.sync_directory(Dir::Root);
    if !laid_out {
        synced?;
    }
    let mut foreign = Vec::new();
    // The quarantine first: the numbers there go on.
    for dir in Dir::BELOW.into_iter().rev() {
        for entry in listed(state, dir)? {
            match (entry.name, entry.size) {
                (Some(name), Some(_)) if name.ends_with(TEMPORARY) => remove_temporary(state, dir, &name),
                (Some(name), Some(size)) => {
                    state.count(dir, &name, size);
                    if dir == Dir::Quarantine {
                        state.goes_on_from(&name);
                    } else if !belongs(dir, &name) {
                        foreign.push((dir, name));
                    }
                }
                (name, _) => {
                    let name = name.unwrap_or_else(|| "a name that is no text".to_owned());
                    let subject = Subject::Foreign(path(dir, &name));
                    state.found(
                        &subject,
                        "it is no file of the store, and is left alone".to_owned(),
                        Outcome::Foreign,
                        None,
                    );
                }
            }
        }
    }
    for (dir, name) in foreign {
        let subject = Subject::Foreign(path(dir, &name));
        state.found(&subject, "no file of the store has such a name".to_owned(), Outcome::Foreign, Some((dir, &name)));
    }
    Ok(())
}

fn write_format(state: &mut State) -> Result<(), Error> {
    let file = form::sealed_json(Dir::Root, FORMAT, &Format { version: VERSION }).map_err(unwritable)?;
    state.replace(Dir::Root, FORMAT, &file)
}

fn remove_temporary(state: &mut State, dir: Dir, name: &str) {
    if let Err(e) = state.disk.remove(dir, name) {
        let why = format!("a temporary file that cannot be removed: {e}");
        state.found(&Subject::Foreign(path(dir, name)), why, Outcome::Foreign, None);
    }
}

/// Whether a file of the store may have this name.
fn belongs(dir: Dir, name: &str) -> bool {
    let single = name.strip_suffix(COPY).unwrap_or(name);
    match dir {
        Dir::Root | Dir::Quarantine => true,
        Dir::Components => Digest::from_hex(name).is_ok(),
        Dir::Artefacts => ArtefactKey::of_file(name).is_some(),
        Dir::Graphs => form::graph_number(single).is_some(),
        Dir::Records => is_word(single),
    }
}

/// Reads all small files, and says what is wrong with them and what they refer to in vain.
fn read_all(state: &mut State) -> Result<(), Error> {
    let small = |state: &State, dir| -> BTreeSet<String> {
        state.files_in(dir).map(|(name, _)| name.strip_suffix(COPY).unwrap_or(name).to_owned()).collect()
    };
    if state.mended(&Subject::Format, Dir::Root, FORMAT, &form::format)?.is_none() {
        // Both are damaged, and named by now. What the files say they are is in their seals, too.
        let _ = write_format(state);
    }
    for name in small(state, Dir::Records) {
        let _ = state.mended(&Subject::Record(name.clone()), Dir::Records, &name, &|_| Ok(()))?;
    }
    for name in small(state, Dir::Graphs) {
        let Some(number) = form::graph_number(&name) else { continue };
        // A number is never given twice, even if its graph is lost.
        state.next = state.next.max(number + 1);
        let parse = |body: &[u8]| form::graph(number, body);
        if let Some(graph) = state.mended(&Subject::Graph(number), Dir::Graphs, &name, &parse)? {
            state.graphs.insert(number, Arc::new(graph));
        }
    }
    state.current = state.mended(&Subject::Current, Dir::Root, CURRENT, &form::current)?;
    match (state.current, newest_current(state)) {
        // The power may have failed between the two. What cannot be written on this disk is written by the next change.
        (Some(current), _) => drop(tell_of_current(state, current.number)),
        (None, Some((number, _))) => {
            let previous = state.graphs.get(&number).and_then(|graph| graph.previous);
            let current = Current { number, previous };
            let mut why = format!("both copies are lost; graph {number} was the last to be, and is again");
            if let Err(e) = replace_current(state, current) {
                why = format!("{why}; it could not be written anew: {e}");
            }
            state.current = Some(current);
            state.found(&Subject::Current, why, Outcome::Recovered, None);
        }
        (None, None) => {}
    }
    if let Some(current) = state.current {
        state.next = state.next.max(current.number + 1);
        let subject = Subject::Graph(current.number);
        let known = state.findings.iter().any(|finding| finding.subject == subject);
        if !state.graphs.contains_key(&current.number) && !known {
            state.found(&subject, "it is current, and missing".to_owned(), Outcome::Lost, None);
        }
    }
    state.names = state.mended(&Subject::Names, Dir::Root, NAMES, &form::names)?.unwrap_or_default();

    let mut missing: BTreeMap<Digest, String> = BTreeMap::new();
    let names = state.names.iter().map(|(name, digest)| (*digest, name.clone()));
    let graphs = state
        .graphs
        .values()
        .flat_map(|graph| graph.images.values().map(|digest| (*digest, format!("graph {}", graph.number))));
    for (digest, by) in names.chain(graphs) {
        if !state.has(Dir::Components, &digest.hex()) {
            missing.entry(digest).or_insert(by);
        }
    }
    for (digest, by) in missing {
        let why = format!("it is missing, and {by} refers to it");
        state.found(&Subject::Component(digest), why, Outcome::Lost, None);
    }
    Ok(())
}
