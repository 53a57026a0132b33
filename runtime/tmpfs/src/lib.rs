//! The file system in memory behind the capability `fs.tmp`: what a guest sees as `/tmp`.
//!
//! Owns the semantics of `wasi:filesystem` 0.2 over memory that belongs to one instance: [`Descriptor`] has one method
//! for each of the interface's, with its flags and its error codes. Never opens a file, knows a clock, or calls
//! Wasmtime: the runtime's capability puts the interface over it and passes the time, already rounded to what the guest
//! may know. Used by one thread at a time, but may move between threads.
//!
//! ```text
//! guest ── wasi:filesystem ── Descriptor ─┐
//!                             Descriptor ─┼─ Tmp: nodes, names, quota ── chunks ── Budget
//!                                         └─────────── clear ──▶ Reaper ── chunks ──┘
//! ```
//!
//! **What is bounded.** The quota is exact to the byte: it counts the sizes of files, also of those without a name that
//! are still open, and of symbolic links. What passes it is [`ErrorCode::InsufficientSpace`] and changes nothing; no
//! write is shortened. Holes count, but hold no memory. Nodes and names are at most [`Limits::nodes`] each. A name has
//! [`NAME_MAX`] bytes, a path [`PATH_MAX`], a resolution [`SYMLINKS_MAX`] links. Directories are as deep as there are
//! nodes, and nothing recurses.
//!
//! **What the host holds.** [`Tmp::held_bytes`] is what was taken from the [`Budget`]: contents (chunks and their lists,
//! nodes, link targets) to the byte, names as the most that the B-tree can take for them; what the allocator adds is not
//! in it. A file of n bytes holds at most 2 n or [`PIECE`], and 1/4096 of the largest size it had since it was last at
//! a quarter of that. A node and its one name hold at most [`NODE_BYTES`], 849 bytes for a directory with the longest
//! name, and each further name [`NAME_BYTES`]: 54 MiB if all [`NODES`] are made so, asked of the budget like the rest. A
//! descriptor holds a few words and a listing one name; their number is the caller's to bound.
//!
//! **The end.** [`Tmp::clear`] and dropping a [`Tmp`] move everything to the [`Reaper`], in microseconds whatever there
//! was. The root's descriptors stay good, all others are from then on [`ErrorCode::BadDescriptor`].
//!
//! **Where it differs from wasmtime-wasi on Linux**, on purpose:
//! - The sync flags of `open-at` are accepted, since memory is always in sync; there they are `unsupported`.
//! - `remove-directory-at` accepts a trailing slash, and `unlink-file-at` tells a file with one from a directory, as
//!   Linux does; there both become the path `.` and fail in other ways.
//! - `get-flags` of a directory repeats `mutate-directory` where it was asked for. It is not enforced, as there: the
//!   adapters of WASI 0.1 never ask for it, and all of them would fail.
//! - The access time moves only when it is set: reading changes nothing. The status change time is one; there it is the
//!   time of birth.
//! - A directory has size 0. A name that is removed while a listing is under way is not listed; names that are added are
//!   not, as there. Listings are sorted by name.
//! - The hash of metadata is the object's identity, as there, but the same in every run.
//!
//! ```
//! use std::sync::Arc;
//! use gaia_tmpfs::{DescriptorFlags, ErrorCode, Limits, OpenFlags, PathFlags, Reaper, Time, Tmp, Unlimited};
//!
//! let reaper = Reaper::new(Arc::new(Unlimited), 0);
//! let tmp = Tmp::new(Limits::of_quota(5), &reaper);
//! let now = Time::default();
//! let file = tmp.root().open_at(PathFlags::empty(), "greeting", OpenFlags::CREATE, DescriptorFlags::WRITE, now)?;
//! assert_eq!(file.write(b"hello", 0, now)?, 5);
//! assert_eq!(file.write(b"!", 5, now), Err(ErrorCode::InsufficientSpace));
//! # Ok::<(), ErrorCode>(())
//! ```

#[doc(hidden)]
pub mod exercise;
mod file;
mod reaper;
#[cfg(test)]
mod tests;
mod tree;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use reaper::{Budget, CHUNK, PIECE, Reaper, Unlimited};

use tree::{Body, ROOT, Tree, Way};

/// The longest name, in bytes: Linux's.
pub const NAME_MAX: usize = 255;
/// The longest path and the longest target of a symbolic link, in bytes: Linux's, without its closing zero.
pub const PATH_MAX: usize = 4095;
/// Symbolic links that one path may lead through: Linux's.
pub const SYMLINKS_MAX: u32 = 40;
/// What one read returns at most, in bytes, however much is asked for: one chunk, as much as wasmtime-wasi reads.
pub const READ_MAX: usize = CHUNK;
/// Nodes, and names, that a file system may have if nothing else is said: what a large source tree or a package with its
/// dependencies has.
pub const NODES: u32 = 65_536;
/// What a node and one name hold on the host at most, in bytes, beside its contents or target.
pub const NODE_BYTES: u64 = tree::NODE_BYTES + tree::DIRECTORY_BYTES + NAME_BYTES;
/// What a name holds on the host at most, in bytes.
pub const NAME_BYTES: u64 = tree::NAME_BYTES;

/// Why something was refused: the codes of `wasi:filesystem/types.error-code` that this file system returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ErrorCode {
    /// Not open for that, not a file, or of a file system that was cleared since.
    #[error("bad descriptor")]
    BadDescriptor,
    /// `.` and `..` cannot be renamed.
    #[error("busy")]
    Busy,
    /// The two descriptors are of different file systems.
    #[error("cross-device link")]
    CrossDevice,
    /// It exists.
    #[error("file exists")]
    Exist,
    /// Larger than a file can be.
    #[error("file too large")]
    FileTooLarge,
    /// The quota, the number of nodes or the host's budget is used up.
    #[error("no space left")]
    InsufficientSpace,
    /// The arguments make no sense.
    #[error("invalid argument")]
    Invalid,
    /// It is a directory.
    #[error("is a directory")]
    IsDirectory,
    /// Too many symbolic links, or one where none may be.
    #[error("too many levels of symbolic links")]
    Loop,
    /// A name or a path is too long.
    #[error("name too long")]
    NameTooLong,
    /// It does not exist.
    #[error("no such file or directory")]
    NoEntry,
    /// It is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// The directory is not empty.
    #[error("directory not empty")]
    NotEmpty,
    /// The path is absolute or leads out of the directory it starts from, or a directory was to be linked.
    #[error("not permitted")]
    NotPermitted,
    /// A time that cannot be stored.
    #[error("value too large")]
    Overflow,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    /// A directory.
    Directory,
    /// A symbolic link.
    SymbolicLink,
    /// A file.
    RegularFile,
}

bitflags::bitflags! {
    /// How paths are resolved. The bits are the interface's.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PathFlags: u8 {
        /// A symbolic link as the path's last part is followed.
        const SYMLINK_FOLLOW = 1;
    }

    /// How something is opened. The bits are the interface's.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct OpenFlags: u8 {
        /// A file is made if there is nothing.
        const CREATE = 1;
        /// Fails if it is no directory.
        const DIRECTORY = 1 << 1;
        /// With `CREATE`: fails if there is something.
        const EXCLUSIVE = 1 << 2;
        /// The file is cut to size 0.
        const TRUNCATE = 1 << 3;
    }

    /// What a descriptor is for. The bits are the interface's.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DescriptorFlags: u8 {
        /// It can be read.
        const READ = 1;
        /// It can be written.
        const WRITE = 1 << 1;
        /// Always so in memory.
        const FILE_INTEGRITY_SYNC = 1 << 2;
        /// Always so in memory.
        const DATA_INTEGRITY_SYNC = 1 << 3;
        /// Always so in memory.
        const REQUESTED_WRITE_SYNC = 1 << 4;
        /// The directory may be changed; repeated, not enforced.
        const MUTATE_DIRECTORY = 1 << 5;
    }
}

/// What a file system may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The sum of the sizes of files and symbolic links, in bytes.
    pub quota: u64,
    /// The number of nodes beside the root, and of names.
    pub nodes: u32,
}

impl Limits {
    /// This quota in bytes, and [`NODES`].
    #[must_use]
    pub const fn of_quota(quota: u64) -> Self {
        Self { quota, nodes: NODES }
    }
}

/// A moment since 1970, as in `wasi:clocks/wall-clock.datetime`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time {
    /// Whole seconds.
    pub seconds: u64,
    /// And nanoseconds, below 10⁹.
    pub nanoseconds: u32,
}

impl Time {
    /// With fewer than 10⁹ nanoseconds.
    fn normalized(self) -> Result<Self, ErrorCode> {
        const SECOND: u32 = 1_000_000_000;
        let seconds = self.seconds.checked_add(u64::from(self.nanoseconds / SECOND));
        let seconds = seconds.filter(|seconds| i64::try_from(*seconds).is_ok()).ok_or(ErrorCode::Overflow)?;
        Ok(Self { seconds, nanoseconds: self.nanoseconds % SECOND })
    }
}

/// What a time is set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewTimestamp {
    /// It stays.
    NoChange,
    /// The time that is passed as now.
    Now,
    /// This one.
    Timestamp(Time),
}

impl NewTimestamp {
    fn over(self, old: Time, now: Time) -> Result<Time, ErrorCode> {
        match self {
            Self::NoChange => Ok(old),
            Self::Now => Ok(now),
            Self::Timestamp(time) => time.normalized(),
        }
    }
}

/// What is known of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorStat {
    /// What it is.
    pub kind: Type,
    /// Names of a file. Of a directory: 2 and one for each directory in it, or 0 once it is removed.
    pub link_count: u64,
    /// Bytes of a file or of a symbolic link's target; 0 for a directory.
    pub size: u64,
    /// When it was made, or what was set.
    pub access: Time,
    /// When its contents or names changed last, or what was set.
    pub modification: Time,
    /// When anything of it changed last.
    pub change: Time,
}

/// The identity of a node, as a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MetadataHash {
    /// 64 bits. Some toolchains take them for the number of an inode: no two nodes share them.
    pub lower: u64,
    /// 64 more bits.
    pub upper: u64,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// What it is a name of.
    pub kind: Type,
    /// The name.
    pub name: String,
}

type Shared = Arc<Mutex<Tree>>;

fn lock(tree: &Shared) -> MutexGuard<'_, Tree> {
    tree.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file system. Dropping it clears it, whatever descriptors there still are.
pub struct Tmp(Shared);

impl fmt::Debug for Tmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tree = lock(&self.0);
        let Limits { quota, nodes } = tree.limits;
        write!(f, "Tmp({} of {quota} B, {} of {nodes} nodes)", tree.used, tree.nodes)
    }
}

impl Tmp {
    /// An empty file system, which holds nothing of the reaper's budget yet.
    #[must_use]
    pub fn new(limits: Limits, reaper: &Reaper) -> Self {
        Self(Arc::new(Mutex::new(Tree::new(limits, reaper.clone()))))
    }

    /// A descriptor of the root, for the preopen.
    #[must_use]
    pub fn root(&self) -> Descriptor {
        lock(&self.0).open(ROOT);
        let flags = DescriptorFlags::READ | DescriptorFlags::MUTATE_DIRECTORY;
        Descriptor { tree: Arc::clone(&self.0), number: ROOT, serial: 0, flags }
    }

    /// Empties it, in microseconds: what was there goes to the reaper. Only the root's descriptors stay good.
    pub fn clear(&self, now: Time) {
        lock(&self.0).clear(now);
    }

    /// Bytes of the quota in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        lock(&self.0).used
    }

    /// Bytes taken from the budget, without those that the reaper has.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        lock(&self.0).ledger.held()
    }

    /// Whether all its counts agree with what is there; looks at every node.
    #[doc(hidden)]
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        lock(&self.0).is_consistent()
    }
}

impl Drop for Tmp {
    fn drop(&mut self) {
        self.clear(Time::default());
    }
}

/// An open node. Dropping it closes it; a clone is one more descriptor of the same.
///
/// `now` is the time as the guest knows it, and always the same one if it knows none. Methods of directories are
/// [`ErrorCode::NotDirectory`] on others, methods of files [`ErrorCode::BadDescriptor`] on directories; a path that is
/// absolute or leads out of the descriptor's directory is [`ErrorCode::NotPermitted`], and the codes of a path's other
/// faults are Linux's.
pub struct Descriptor {
    tree: Shared,
    number: u32,
    serial: u64,
    flags: DescriptorFlags,
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Descriptor({}, {:?})", self.serial, self.flags)
    }
}

impl Clone for Descriptor {
    fn clone(&self) -> Self {
        let mut tree = lock(&self.tree);
        if tree.is(self.number, self.serial) {
            tree.open(self.number);
        }
        drop(tree);
        Self { tree: Arc::clone(&self.tree), ..*self }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        lock(&self.tree).close(self.number, self.serial);
    }
}

/// The finalizer of `SplitMix64`: one to one, so that different objects have different hashes.
fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn hash_of(serial: u64) -> MetadataHash {
    let seed = serial.wrapping_add(0x9e37_79b9_7f4a_7c15);
    MetadataHash { lower: mixed(seed), upper: mixed(!seed) }
}

fn stat_of(node: &tree::Node) -> DescriptorStat {
    let tree::Times { access, modification, change } = node.times;
    let (kind, link_count, size) = (node.kind(), node.link_count(), node.body.size());
    DescriptorStat { kind, link_count, size, access, modification, change }
}

fn follows(flags: PathFlags) -> bool {
    flags.contains(PathFlags::SYMLINK_FOLLOW)
}

// Each method's errors are those of its type and what its line says.
#[expect(clippy::missing_errors_doc, reason = "the type's documentation has what all methods share")]
impl Descriptor {
    fn tree(&self) -> Result<MutexGuard<'_, Tree>, ErrorCode> {
        let tree = lock(&self.tree);
        if tree.is(self.number, self.serial) { Ok(tree) } else { Err(ErrorCode::BadDescriptor) }
    }

    fn directory(&self) -> Result<MutexGuard<'_, Tree>, ErrorCode> {
        let tree = self.tree()?;
        tree.directory(self.number)?;
        Ok(tree)
    }

    /// The tree of both, which must be one.
    fn directory_with(&self, other: &Self) -> Result<MutexGuard<'_, Tree>, ErrorCode> {
        let tree = self.directory()?;
        if !Arc::ptr_eq(&self.tree, &other.tree) {
            return Err(ErrorCode::CrossDevice);
        }
        if !tree.is(other.number, other.serial) {
            return Err(ErrorCode::BadDescriptor);
        }
        tree.directory(other.number)?;
        Ok(tree)
    }

    fn file(&self, flags: DescriptorFlags) -> Result<MutexGuard<'_, Tree>, ErrorCode> {
        let tree = self.tree()?;
        tree.content(self.number)?;
        if self.flags.contains(flags) { Ok(tree) } else { Err(ErrorCode::BadDescriptor) }
    }

    /// Opens what the path names, or makes a file of it.
    ///
    /// Without `WRITE` it is open for reading; `CREATE` and `TRUNCATE` imply that it is open for writing, which is
    /// [`ErrorCode::IsDirectory`] for a directory. `DIRECTORY` cannot be had together with the other open flags
    /// ([`ErrorCode::Invalid`]). A symbolic link that is not followed is [`ErrorCode::Loop`].
    pub fn open_at(
        &self,
        path_flags: PathFlags,
        path: &str,
        open_flags: OpenFlags,
        flags: DescriptorFlags,
        now: Time,
    ) -> Result<Self, ErrorCode> {
        let mut tree = self.directory()?;
        let making = OpenFlags::CREATE | OpenFlags::EXCLUSIVE | OpenFlags::TRUNCATE;
        if open_flags.contains(OpenFlags::DIRECTORY) && open_flags.intersects(making) {
            return Err(ErrorCode::Invalid);
        }
        let create = open_flags.contains(OpenFlags::CREATE);
        let exclusive = create && open_flags.contains(OpenFlags::EXCLUSIVE);
        let write = flags.contains(DescriptorFlags::WRITE);
        let writes = write || open_flags.intersects(OpenFlags::CREATE | OpenFlags::TRUNCATE);
        let way = match (create, follows(path_flags) && !exclusive) {
            (false, false) => Way::Stay,
            (false, true) => Way::Follow,
            (true, false) => Way::Create,
            (true, true) => Way::FollowCreate,
        };
        let number = tree.open_at(self.number, path, way, exclusive, now)?;
        let mut kept = flags - DescriptorFlags::MUTATE_DIRECTORY;
        kept.set(DescriptorFlags::READ, flags.contains(DescriptorFlags::READ) || !write);
        kept.set(DescriptorFlags::WRITE, writes);
        match &tree.node(number).body {
            Body::Directory(_) if writes => return Err(ErrorCode::IsDirectory),
            Body::Directory(_) => kept |= flags & DescriptorFlags::MUTATE_DIRECTORY,
            Body::Link(_) => return Err(ErrorCode::Loop),
            _ if open_flags.contains(OpenFlags::DIRECTORY) => return Err(ErrorCode::NotDirectory),
            _ if open_flags.contains(OpenFlags::TRUNCATE) => tree.set_size(number, 0, now)?,
            _ => {}
        }
        tree.open(number);
        Ok(Self { tree: Arc::clone(&self.tree), number, serial: tree.node(number).serial, flags: kept })
    }

    /// What it is open for.
    pub fn get_flags(&self) -> Result<DescriptorFlags, ErrorCode> {
        self.tree().map(|_| self.flags)
    }

    /// What it is.
    pub fn get_type(&self) -> Result<Type, ErrorCode> {
        Ok(self.tree()?.node(self.number).kind())
    }

    /// Reads up to `length` bytes at `offset`, but not more than [`READ_MAX`]; true if there were none.
    pub fn read(&self, length: u64, offset: u64) -> Result<(Vec<u8>, bool), ErrorCode> {
        let tree = self.file(DescriptorFlags::READ)?;
        if i64::try_from(offset).is_err() {
            return Err(ErrorCode::Invalid);
        }
        let content = tree.content(self.number)?;
        let there = content.size().saturating_sub(offset).min(length);
        let n = usize::try_from(there).unwrap_or(usize::MAX).min(READ_MAX);
        let mut bytes = Vec::with_capacity(n);
        content.pieces(offset, n, |piece, hole| {
            bytes.extend_from_slice(piece);
            bytes.resize(bytes.len() + hole, 0);
        });
        Ok((bytes, n == 0))
    }

    /// Writes all of `bytes` at `offset`, or nothing; returns how many.
    pub fn write(&self, bytes: &[u8], offset: u64, now: Time) -> Result<u64, ErrorCode> {
        self.file(DescriptorFlags::WRITE)?.write(self.number, offset, bytes, now)?;
        Ok(bytes.len() as u64)
    }

    /// Writes all of `bytes` at the file's end, or nothing.
    pub fn append(&self, bytes: &[u8], now: Time) -> Result<(), ErrorCode> {
        let mut tree = self.file(DescriptorFlags::WRITE)?;
        let end = tree.content(self.number)?.size();
        tree.write(self.number, end, bytes, now)
    }

    /// Says whether `read-via-stream` may be opened: not on a directory ([`ErrorCode::IsDirectory`]).
    pub fn check_readable(&self) -> Result<(), ErrorCode> {
        match self.tree()?.node(self.number).kind() {
            Type::Directory => Err(ErrorCode::IsDirectory),
            _ => Ok(()),
        }
    }

    /// Says whether `write-via-stream` and `append-via-stream` may be opened: not on a directory.
    pub fn check_writable(&self) -> Result<(), ErrorCode> {
        self.file(DescriptorFlags::empty()).map(drop)
    }

    /// Sets the size: cuts, or adds a hole. [`ErrorCode::Invalid`] if it is not open for writing.
    pub fn set_size(&self, size: u64, now: Time) -> Result<(), ErrorCode> {
        let mut tree = self.file(DescriptorFlags::empty())?;
        if !self.flags.contains(DescriptorFlags::WRITE) {
            return Err(ErrorCode::Invalid);
        }
        tree.set_size(self.number, size, now)
    }

    /// Listens to advice about a file, and does nothing.
    pub fn advise(&self) -> Result<(), ErrorCode> {
        self.file(DescriptorFlags::empty()).map(drop)
    }

    /// Does nothing: memory is in sync.
    pub fn sync_data(&self) -> Result<(), ErrorCode> {
        self.tree().map(drop)
    }

    /// Does nothing: memory is in sync.
    pub fn sync(&self) -> Result<(), ErrorCode> {
        self.tree().map(drop)
    }

    /// What is known of it.
    pub fn stat(&self) -> Result<DescriptorStat, ErrorCode> {
        Ok(stat_of(self.tree()?.node(self.number)))
    }

    /// What is known of what the path names.
    pub fn stat_at(&self, path_flags: PathFlags, path: &str) -> Result<DescriptorStat, ErrorCode> {
        let tree = self.directory()?;
        Ok(stat_of(tree.node(tree.find(self.number, path, follows(path_flags))?)))
    }

    fn set_times_of(
        tree: &mut Tree,
        number: u32,
        access: NewTimestamp,
        modification: NewTimestamp,
        now: Time,
    ) -> Result<(), ErrorCode> {
        let times = &mut tree.node_mut(number).times;
        let (access, modification) = (access.over(times.access, now)?, modification.over(times.modification, now)?);
        *times = tree::Times { access, modification, change: now };
        Ok(())
    }

    /// Sets its times; a time after the year 292277026596 is [`ErrorCode::Overflow`].
    pub fn set_times(&self, access: NewTimestamp, modification: NewTimestamp, now: Time) -> Result<(), ErrorCode> {
        Self::set_times_of(&mut *self.tree()?, self.number, access, modification, now)
    }

    /// Sets the times of what the path names.
    pub fn set_times_at(
        &self,
        path_flags: PathFlags,
        path: &str,
        access: NewTimestamp,
        modification: NewTimestamp,
        now: Time,
    ) -> Result<(), ErrorCode> {
        let mut tree = self.directory()?;
        let number = tree.find(self.number, path, follows(path_flags))?;
        Self::set_times_of(&mut tree, number, access, modification, now)
    }

    /// Begins a listing: sorted by name, of what is there now.
    pub fn read_directory(&self) -> Result<DirectoryEntryStream, ErrorCode> {
        let until = self.directory()?.serial;
        Ok(DirectoryEntryStream { directory: Some(self.clone()), after: None, until })
    }

    /// Makes a directory.
    pub fn create_directory_at(&self, path: &str, now: Time) -> Result<(), ErrorCode> {
        self.directory()?.create_directory_at(self.number, path, now)
    }

    /// Gives a file one more name. [`ErrorCode::Invalid`] if a symbolic link were to be followed,
    /// [`ErrorCode::NotPermitted`] for a directory.
    pub fn link_at(
        &self,
        old_path_flags: PathFlags,
        old_path: &str,
        new_descriptor: &Self,
        new_path: &str,
        now: Time,
    ) -> Result<(), ErrorCode> {
        let mut tree = self.directory_with(new_descriptor)?;
        if follows(old_path_flags) {
            return Err(ErrorCode::Invalid);
        }
        tree.link_at((self.number, old_path), (new_descriptor.number, new_path), now)
    }

    /// Where a symbolic link points; [`ErrorCode::Invalid`] if it is none.
    pub fn readlink_at(&self, path: &str) -> Result<String, ErrorCode> {
        self.directory()?.readlink_at(self.number, path)
    }

    /// Removes an empty directory.
    pub fn remove_directory_at(&self, path: &str, now: Time) -> Result<(), ErrorCode> {
        self.directory()?.remove_directory_at(self.number, path, now)
    }

    /// Renames, over what is there if that is of the same kind and, if a directory, empty. [`ErrorCode::Invalid`] if a
    /// directory would come to be in itself.
    pub fn rename_at(&self, old_path: &str, new_descriptor: &Self, new_path: &str, now: Time) -> Result<(), ErrorCode> {
        let mut tree = self.directory_with(new_descriptor)?;
        tree.rename_at((self.number, old_path), (new_descriptor.number, new_path), now)
    }

    /// Makes a symbolic link. A target that is absolute is refused here; one that leads out of the directory it is met
    /// from is refused when it is met, because only then it is known where it leads.
    pub fn symlink_at(&self, old_path: &str, new_path: &str, now: Time) -> Result<(), ErrorCode> {
        self.directory()?.symlink_at(self.number, old_path, new_path, now)
    }

    /// Removes a name that is not a directory's.
    pub fn unlink_file_at(&self, path: &str, now: Time) -> Result<(), ErrorCode> {
        self.directory()?.unlink_file_at(self.number, path, now)
    }

    /// Whether both are the same object.
    #[must_use]
    pub fn is_same_object(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tree, &other.tree) && (self.number, self.serial) == (other.number, other.serial)
    }

    /// The same as long as the object lives, and no other object's.
    pub fn metadata_hash(&self) -> Result<MetadataHash, ErrorCode> {
        self.tree().map(|_| hash_of(self.serial))
    }

    /// [`Self::metadata_hash`] of what the path names.
    pub fn metadata_hash_at(&self, path_flags: PathFlags, path: &str) -> Result<MetadataHash, ErrorCode> {
        let tree = self.directory()?;
        let number = tree.find(self.number, path, follows(path_flags))?;
        Ok(hash_of(tree.node(number).serial))
    }
}

/// A listing under way. It holds its place and no copy, so that listings cost a hostile guest's host nothing.
#[derive(Debug)]
pub struct DirectoryEntryStream {
    /// None at the end.
    directory: Option<Descriptor>,
    after: Option<String>,
    until: u64,
}

impl DirectoryEntryStream {
    /// The next name; none at the end, and from then on.
    ///
    /// # Errors
    /// [`ErrorCode::BadDescriptor`] if the file system was cleared.
    pub fn read_directory_entry(&mut self) -> Result<Option<DirectoryEntry>, ErrorCode> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let entry = directory.tree()?.entry_after(directory.number, self.after.as_deref(), self.until)?;
        match &entry {
            Some(entry) => self.after = Some(entry.name.clone()),
            None => self.directory = None,
        }
        Ok(entry)
    }
}
