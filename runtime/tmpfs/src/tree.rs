//! The nodes, the names, and how a path leads from one to the other.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::file::Content;
use crate::reaper::{Ledger, Reaper, Remains};
use crate::{DirectoryEntry, ErrorCode, Limits, NAME_MAX, PATH_MAX, SYMLINKS_MAX, Time, Type};

/// Nodes are made so many at a time: they never move, and whole blocks go to the reaper.
const BLOCK: usize = 64;
/// Bytes of a block, and of its place in the list of blocks, which doubles as it grows.
pub(crate) const BLOCK_BYTES: u64 = (BLOCK * size_of::<Node>() + 4 * size_of::<Box<[Node]>>()) as u64;
/// A node's part of a block, at most: the last block may have one node only, but there are 64 times fewer of those.
pub(crate) const NODE_BYTES: u64 = BLOCK_BYTES / BLOCK as u64 + 1;
/// Bytes of the longest name.
pub(crate) const NAME_BYTES: u64 = (ENTRY + NAME_MAX) as u64;
/// Bytes that a directory takes beside its node, at most: one leaf of the standard library's B-tree has room for 11.
pub(crate) const DIRECTORY_BYTES: u64 = 4 * ENTRY as u64;
/// Bytes that a name takes beside its letters, at most: leaves are at least five elevenths full.
const ENTRY: usize = 3 * (size_of::<Box<str>>() + size_of::<Entry>());
/// The root, which has no number.
pub(crate) const ROOT: u32 = 0;

/// Bytes that a name takes in a directory, at most.
pub(crate) fn entry_bytes(name: &str) -> u64 {
    (ENTRY + name.len()) as u64
}

/// A name's meaning.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    node: u32,
    /// When it was made, in the file system's own count: who lists a directory does not meet what came later.
    since: u64,
}

pub(crate) struct Directory {
    pub(crate) entries: BTreeMap<Box<str>, Entry>,
    parent: u32,
    /// Directories in it.
    inner: u32,
}

impl Directory {
    fn within(parent: u32) -> Self {
        Self { entries: BTreeMap::new(), parent, inner: 0 }
    }
}

pub(crate) enum Body {
    /// Nothing; the next free node.
    Free(u32),
    File(Content),
    Directory(Directory),
    Link(Box<str>),
}

impl Default for Body {
    fn default() -> Self {
        Self::Free(ROOT)
    }
}

impl Body {
    fn kind(&self) -> Type {
        match self {
            Self::Directory(_) => Type::Directory,
            Self::Link(_) => Type::SymbolicLink,
            Self::File(_) | Self::Free(_) => Type::RegularFile,
        }
    }

    /// What it has of the quota.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::File(content) => content.size(),
            Self::Link(target) => target.len() as u64,
            Self::Directory(_) | Self::Free(_) => 0,
        }
    }
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) access: Time,
    pub(crate) modification: Time,
    pub(crate) change: Time,
}

#[derive(Default)]
pub(crate) struct Node {
    /// Which object this is: never used twice, so a descriptor of what is gone is told from one of what took its place.
    pub(crate) serial: u64,
    /// Names of it. Of a directory: 1, or 0 once it is removed.
    pub(crate) links: u32,
    /// Descriptors of it.
    open: u32,
    pub(crate) times: Times,
    pub(crate) body: Body,
}

impl Node {
    pub(crate) fn kind(&self) -> Type {
        self.body.kind()
    }

    /// The link count that a guest sees.
    pub(crate) fn link_count(&self) -> u64 {
        match &self.body {
            Body::Directory(directory) if self.links > 0 => 2 + u64::from(directory.inner),
            _ => u64::from(self.links),
        }
    }

    fn changed(&mut self, now: Time) {
        self.times.change = now;
    }

    fn modified(&mut self, now: Time) {
        self.times.modification = now;
        self.times.change = now;
    }
}

/// Where a path leads.
enum Found {
    Node(u32),
    /// Nowhere, but this could be made.
    Missing {
        directory: u32,
        name: Box<str>,
    },
}

/// What the last part of a path is, when it is not looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last<'p> {
    Name(&'p str),
    Dot,
    DotDot,
}

/// The directory that a path leads to before its last part.
struct Parent<'p> {
    directory: u32,
    last: Last<'p>,
    /// Whether slashes follow.
    slash: bool,
}

/// How a path's last part is met.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// As it is.
    Stay,
    /// A symbolic link is followed.
    Follow,
    /// As it is, and it may be made.
    Create,
    /// A symbolic link is followed, and where it leads may be made.
    FollowCreate,
}

fn is_slashes(text: &str) -> bool {
    text.bytes().all(|byte| byte == b'/')
}

/// What can be said of a path without looking.
fn checked(path: &str) -> Result<(), ErrorCode> {
    if path.contains('\0') {
        Err(ErrorCode::Invalid)
    } else if path.is_empty() {
        Err(ErrorCode::NoEntry)
    } else if path.len() > PATH_MAX {
        Err(ErrorCode::NameTooLong)
    } else if path.starts_with('/') {
        Err(ErrorCode::NotPermitted)
    } else {
        Ok(())
    }
}

/// The whole file system.
pub(crate) struct Tree {
    root: Node,
    blocks: Vec<Box<[Node]>>,
    /// The first free node, or [`ROOT`].
    free: u32,
    /// Nodes in use, the root not among them.
    pub(crate) nodes: u32,
    /// Names.
    pub(crate) names: u32,
    /// Bytes of the quota in use.
    pub(crate) used: u64,
    pub(crate) limits: Limits,
    /// The next object's or name's number.
    pub(crate) serial: u64,
    pub(crate) ledger: Ledger,
}

impl Tree {
    pub(crate) fn new(limits: Limits, reaper: Reaper) -> Self {
        let body = Body::Directory(Directory::within(ROOT));
        let root = Node { serial: 0, links: 1, open: 0, times: Times::default(), body };
        let ledger = Ledger::new(reaper);
        Self { root, blocks: Vec::new(), free: ROOT, nodes: 0, names: 0, used: 0, limits, serial: 1, ledger }
    }

    /// Forgets all but the root, whose descriptors stay good.
    pub(crate) fn clear(&mut self, now: Time) {
        let blocks = std::mem::take(&mut self.blocks);
        let mut entries = BTreeMap::new();
        if let Body::Directory(directory) = &mut self.root.body {
            entries = std::mem::take(&mut directory.entries);
            directory.inner = 0;
        }
        self.root.times = Times { access: now, modification: now, change: now };
        (self.free, self.nodes, self.names, self.used) = (ROOT, 0, 0, 0);
        if !blocks.is_empty() {
            self.ledger.bury(Remains { blocks, entries, ..Remains::default() });
        }
    }

    // Node numbers: 1 is the first of the first block.

    pub(crate) fn node(&self, number: u32) -> &Node {
        match (number as usize).checked_sub(1) {
            None => &self.root,
            Some(index) => &self.blocks[index / BLOCK][index % BLOCK],
        }
    }

    pub(crate) fn node_mut(&mut self, number: u32) -> &mut Node {
        match (number as usize).checked_sub(1) {
            None => &mut self.root,
            Some(index) => &mut self.blocks[index / BLOCK][index % BLOCK],
        }
    }

    /// Whether the number still means the object of this serial.
    pub(crate) fn is(&self, number: u32, serial: u64) -> bool {
        match (number as usize).checked_sub(1) {
            None => true,
            Some(index) => self
                .blocks
                .get(index / BLOCK)
                .and_then(|block| block.get(index % BLOCK))
                .is_some_and(|node| node.serial == serial && !matches!(node.body, Body::Free(_))),
        }
    }

    pub(crate) fn directory(&self, number: u32) -> Result<&Directory, ErrorCode> {
        match &self.node(number).body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(ErrorCode::NotDirectory),
        }
    }

    fn is_directory(&self, number: u32) -> bool {
        self.directory(number).is_ok()
    }

    fn directory_mut(&mut self, number: u32) -> Result<&mut Directory, ErrorCode> {
        match &mut self.node_mut(number).body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(ErrorCode::NotDirectory),
        }
    }

    fn child(&self, directory: u32, name: &str) -> Result<Option<u32>, ErrorCode> {
        let entries = &self.directory(directory)?.entries;
        if self.node(directory).links == 0 {
            // Removed: nothing is in it, and nothing will be.
            Err(ErrorCode::NoEntry)
        } else if name.len() > NAME_MAX {
            Err(ErrorCode::NameTooLong)
        } else {
            Ok(entries.get(name).map(|entry| entry.node))
        }
    }

    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial - 1
    }

    /// Takes from the quota.
    fn use_quota(&mut self, more: u64) -> Result<(), ErrorCode> {
        let used = self.used.checked_add(more).filter(|used| *used <= self.limits.quota);
        self.used = used.ok_or(ErrorCode::InsufficientSpace)?;
        Ok(())
    }

    /// Makes a node without a name.
    fn make(&mut self, body: Body, now: Time) -> Result<u32, ErrorCode> {
        if self.nodes >= self.limits.nodes {
            return Err(ErrorCode::InsufficientSpace);
        }
        if self.free == ROOT {
            self.ledger.take(BLOCK_BYTES)?;
            let first = u32::try_from(self.blocks.len() * BLOCK + 1).map_err(|_| ErrorCode::InsufficientSpace)?;
            let free = |next| Node { body: Body::Free(next), ..Node::default() };
            let nexts = (first + 1..).take(BLOCK - 1).chain([ROOT]);
            self.blocks.push(nexts.map(free).collect());
            self.free = first;
        }
        let bytes = match &body {
            Body::Directory(_) => DIRECTORY_BYTES,
            Body::Link(target) => target.len() as u64,
            Body::File(_) | Body::Free(_) => 0,
        };
        self.ledger.take(bytes)?;
        let serial = self.next_serial();
        let number = self.free;
        let times = Times { access: now, modification: now, change: now };
        let made = Node { serial, links: 0, open: 0, times, body };
        if let Body::Free(next) = std::mem::replace(self.node_mut(number), made).body {
            self.free = next;
        }
        self.nodes += 1;
        Ok(number)
    }

    /// Ends a node that has neither names nor descriptors.
    fn end_if_unused(&mut self, number: u32) {
        let free = self.free;
        let node = self.node_mut(number);
        if number == ROOT || node.links > 0 || node.open > 0 {
            return;
        }
        let body = std::mem::replace(&mut node.body, Body::Free(free));
        self.used -= body.size();
        match body {
            Body::File(content) => content.bury(&mut self.ledger),
            Body::Directory(_) => self.ledger.give_back(DIRECTORY_BYTES),
            Body::Link(target) => self.ledger.give_back(target.len() as u64),
            Body::Free(_) => {}
        }
        self.free = number;
        self.nodes -= 1;
    }

    /// Counts one more descriptor.
    pub(crate) fn open(&mut self, number: u32) {
        self.node_mut(number).open += 1;
    }

    /// Counts one descriptor less.
    pub(crate) fn close(&mut self, number: u32, serial: u64) {
        if self.is(number, serial) {
            self.node_mut(number).open -= 1;
            self.end_if_unused(number);
        }
    }

    /// Gives a node a name that is not in the directory.
    fn name(&mut self, directory: u32, name: Box<str>, number: u32, now: Time) -> Result<(), ErrorCode> {
        if self.node(directory).links == 0 {
            return Err(ErrorCode::NoEntry);
        }
        if self.names >= self.limits.nodes {
            return Err(ErrorCode::InsufficientSpace);
        }
        self.ledger.take(entry_bytes(&name))?;
        let since = self.next_serial();
        let is_directory = self.is_directory(number);
        let parent = self.directory_mut(directory)?;
        parent.entries.insert(name, Entry { node: number, since });
        parent.inner += u32::from(is_directory);
        self.names += 1;
        self.node_mut(directory).modified(now);
        let node = self.node_mut(number);
        node.links += 1;
        node.changed(now);
        if let Body::Directory(inner) = &mut node.body {
            inner.parent = directory;
        }
        Ok(())
    }

    /// Takes a name away, and returns what it meant.
    fn unname(&mut self, directory: u32, name: &str, now: Time) -> Result<u32, ErrorCode> {
        let entry = self.directory_mut(directory)?.entries.remove(name).ok_or(ErrorCode::NoEntry)?;
        self.ledger.give_back(entry_bytes(name));
        self.names -= 1;
        let is_directory = self.is_directory(entry.node);
        self.directory_mut(directory)?.inner -= u32::from(is_directory);
        self.node_mut(directory).modified(now);
        let node = self.node_mut(entry.node);
        node.links -= 1;
        node.changed(now);
        Ok(entry.node)
    }

    /// Makes a node with a name, or neither.
    fn add(&mut self, directory: u32, name: &str, body: Body, now: Time) -> Result<u32, ErrorCode> {
        if self.node(directory).links == 0 {
            return Err(ErrorCode::NoEntry);
        }
        let size = body.size();
        self.use_quota(size)?;
        let number = self.make(body, now).inspect_err(|_| self.used -= size)?;
        if let Err(error) = self.name(directory, name.into(), number, now) {
            self.end_if_unused(number);
            return Err(error);
        }
        Ok(number)
    }

    // Paths.

    /// Follows a path as Linux does, never above `base`.
    fn walk(&self, base: u32, path: &str, way: Way) -> Result<Found, ErrorCode> {
        checked(path)?;
        let create = matches!(way, Way::Create | Way::FollowCreate);
        let follow = matches!(way, Way::Follow | Way::FollowCreate);
        let mut at = base;
        let mut rest = path;
        // What is left of the paths in which symbolic links were met.
        let mut above: Vec<&str> = Vec::new();
        let mut followed = 0;
        let mut slash = false;
        loop {
            rest = rest.trim_start_matches('/');
            if rest.is_empty() {
                match above.pop() {
                    Some(path) => {
                        rest = path;
                        continue;
                    }
                    None if slash && !self.is_directory(at) => return Err(ErrorCode::NotDirectory),
                    None => return Ok(Found::Node(at)),
                }
            }
            let (name, after) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let ends = is_slashes(after);
            let last = ends && above.is_empty();
            let directory = self.directory(at)?;
            rest = after;
            match name {
                "." => slash |= last,
                ".." if at == base => return Err(ErrorCode::NotPermitted),
                ".." => {
                    slash |= last;
                    at = directory.parent;
                }
                _ => {
                    slash |= last && !after.is_empty();
                    if last && slash && create {
                        return Err(ErrorCode::IsDirectory);
                    }
                    match self.child(at, name)? {
                        None if last => return Ok(Found::Missing { directory: at, name: name.into() }),
                        None => return Err(ErrorCode::NoEntry),
                        Some(number) => match &self.node(number).body {
                            Body::Link(target) if !last || follow || slash => {
                                followed += 1;
                                if followed > SYMLINKS_MAX {
                                    return Err(ErrorCode::Loop);
                                }
                                if target.starts_with('/') {
                                    return Err(ErrorCode::NotPermitted);
                                }
                                if !ends {
                                    above.push(after);
                                }
                                rest = target;
                            }
                            _ => at = number,
                        },
                    }
                }
            }
        }
    }

    /// The node that a path leads to.
    pub(crate) fn find(&self, base: u32, path: &str, follow: bool) -> Result<u32, ErrorCode> {
        match self.walk(base, path, if follow { Way::Follow } else { Way::Stay })? {
            Found::Node(number) => Ok(number),
            Found::Missing { .. } => Err(ErrorCode::NoEntry),
        }
    }

    /// Follows a path up to its last part, which is not looked at.
    fn parent<'p>(&self, base: u32, path: &'p str) -> Result<Parent<'p>, ErrorCode> {
        checked(path)?;
        let trimmed = path.trim_end_matches('/');
        let (before, name) = trimmed.split_at(trimmed.rfind('/').map_or(0, |slash| slash + 1));
        let directory = if before.is_empty() { base } else { self.find(base, before, true)? };
        self.directory(directory)?;
        let last = match name {
            "." => Last::Dot,
            ".." if directory == base => return Err(ErrorCode::NotPermitted),
            ".." => Last::DotDot,
            name => Last::Name(name),
        };
        Ok(Parent { directory, last, slash: trimmed.len() < path.len() })
    }

    /// Where something new is to be made.
    fn vacancy<'p>(&self, base: u32, path: &'p str, is_directory: bool) -> Result<(u32, &'p str), ErrorCode> {
        let Parent { directory, last, slash } = self.parent(base, path)?;
        let Last::Name(name) = last else { return Err(ErrorCode::Exist) };
        match self.child(directory, name)? {
            Some(_) => Err(ErrorCode::Exist),
            None if slash && !is_directory => Err(ErrorCode::NoEntry),
            None => Ok((directory, name)),
        }
    }

    /// Whether `outer` is `inner` or above it. As slow as directories are deep, 2 ms for [`crate::NODES`] of them, but
    /// at once for the many that hold no directory.
    fn holds(&self, outer: u32, mut inner: u32) -> bool {
        if self.directory(outer).is_ok_and(|directory| directory.inner == 0) {
            return inner == outer;
        }
        while inner != outer {
            match self.directory(inner) {
                // One that was removed is in no other.
                Ok(directory) if inner != ROOT && self.node(inner).links > 0 => inner = directory.parent,
                _ => return false,
            }
        }
        true
    }

    // Operations, each all or nothing.

    /// Finds or makes what is to be opened.
    pub(crate) fn open_at(
        &mut self,
        base: u32,
        path: &str,
        way: Way,
        exclusive: bool,
        now: Time,
    ) -> Result<u32, ErrorCode> {
        let create = matches!(way, Way::Create | Way::FollowCreate);
        match self.walk(base, path, way)? {
            Found::Node(_) if exclusive => Err(ErrorCode::Exist),
            Found::Node(number) => Ok(number),
            Found::Missing { directory, name } if create => {
                self.add(directory, &name, Body::File(Content::default()), now)
            }
            Found::Missing { .. } => Err(ErrorCode::NoEntry),
        }
    }

    pub(crate) fn create_directory_at(&mut self, base: u32, path: &str, now: Time) -> Result<(), ErrorCode> {
        let (directory, name) = self.vacancy(base, path, true)?;
        self.add(directory, name, Body::Directory(Directory::within(directory)), now)?;
        Ok(())
    }

    pub(crate) fn symlink_at(&mut self, base: u32, target: &str, path: &str, now: Time) -> Result<(), ErrorCode> {
        if target.starts_with('/') {
            return Err(ErrorCode::NotPermitted);
        }
        // Where it is to be is resolved before the target is looked at.
        self.parent(base, path)?;
        checked(target)?;
        let (directory, name) = self.vacancy(base, path, false)?;
        self.add(directory, name, Body::Link(target.into()), now)?;
        Ok(())
    }

    pub(crate) fn readlink_at(&self, base: u32, path: &str) -> Result<String, ErrorCode> {
        match &self.node(self.find(base, path, false)?).body {
            Body::Link(target) => Ok(target.to_string()),
            _ => Err(ErrorCode::Invalid),
        }
    }

    pub(crate) fn link_at(
        &mut self,
        (old_base, old): (u32, &str),
        (new_base, new): (u32, &str),
        now: Time,
    ) -> Result<(), ErrorCode> {
        let number = self.find(old_base, old, false)?;
        let (directory, name) = self.vacancy(new_base, new, false)?;
        if self.node(directory).links == 0 {
            return Err(ErrorCode::NoEntry);
        }
        if self.is_directory(number) {
            return Err(ErrorCode::NotPermitted);
        }
        self.name(directory, name.into(), number, now)
    }

    pub(crate) fn unlink_file_at(&mut self, base: u32, path: &str, now: Time) -> Result<(), ErrorCode> {
        let Parent { directory, last, slash } = self.parent(base, path)?;
        let Last::Name(name) = last else { return Err(ErrorCode::IsDirectory) };
        let number = self.child(directory, name)?.ok_or(ErrorCode::NoEntry)?;
        if self.is_directory(number) {
            return Err(ErrorCode::IsDirectory);
        }
        if slash {
            return Err(ErrorCode::NotDirectory);
        }
        let number = self.unname(directory, name, now)?;
        self.end_if_unused(number);
        Ok(())
    }

    pub(crate) fn remove_directory_at(&mut self, base: u32, path: &str, now: Time) -> Result<(), ErrorCode> {
        let Parent { directory, last, .. } = self.parent(base, path)?;
        let name = match last {
            Last::Name(name) => name,
            Last::Dot => return Err(ErrorCode::Invalid),
            Last::DotDot => return Err(ErrorCode::NotEmpty),
        };
        let number = self.child(directory, name)?.ok_or(ErrorCode::NoEntry)?;
        if !self.directory(number)?.entries.is_empty() {
            return Err(ErrorCode::NotEmpty);
        }
        let number = self.unname(directory, name, now)?;
        self.end_if_unused(number);
        Ok(())
    }

    pub(crate) fn rename_at(
        &mut self,
        (old_base, old): (u32, &str),
        (new_base, new): (u32, &str),
        now: Time,
    ) -> Result<(), ErrorCode> {
        let old = self.parent(old_base, old)?;
        let new = self.parent(new_base, new)?;
        let (Last::Name(old_name), Last::Name(new_name)) = (old.last, new.last) else {
            return Err(ErrorCode::Busy);
        };
        let moved = self.child(old.directory, old_name)?.ok_or(ErrorCode::NoEntry)?;
        let replaced = self.child(new.directory, new_name)?;
        if self.is_directory(moved) {
            if old.directory != new.directory && self.holds(moved, new.directory) {
                return Err(ErrorCode::Invalid);
            }
        } else if old.slash || new.slash {
            return Err(ErrorCode::NotDirectory);
        }
        if let Some(replaced) = replaced {
            let above = |number| old.directory != new.directory && self.holds(number, old.directory);
            if self.is_directory(replaced) && above(replaced) {
                return Err(ErrorCode::NotEmpty);
            }
            if moved == replaced {
                return Ok(());
            }
            match (self.is_directory(moved), &self.node(replaced).body) {
                (true, Body::Directory(directory)) if !directory.entries.is_empty() => return Err(ErrorCode::NotEmpty),
                (true, Body::Directory(_)) => {}
                (true, _) => return Err(ErrorCode::NotDirectory),
                (false, Body::Directory(_)) => return Err(ErrorCode::IsDirectory),
                (false, _) => {}
            }
        }
        self.replace((old.directory, old_name), (new.directory, new_name), now)
    }

    /// Moves a name to where another may be, once nothing is against it.
    fn replace(
        &mut self,
        (old_directory, old_name): (u32, &str),
        (new_directory, new_name): (u32, &str),
        now: Time,
    ) -> Result<(), ErrorCode> {
        if self.node(new_directory).links == 0 {
            return Err(ErrorCode::NoEntry);
        }
        if self.child(new_directory, new_name)?.is_some() {
            let moved = self.unname(old_directory, old_name, now)?;
            // The name stays, and with it its place in a listing that is under way. A directory took a directory's place,
            // or neither is one: the count of directories stays too.
            let entry = self.directory_mut(new_directory)?.entries.get_mut(new_name).ok_or(ErrorCode::NoEntry)?;
            let replaced = std::mem::replace(&mut entry.node, moved);
            self.node_mut(new_directory).modified(now);
            let node = self.node_mut(moved);
            node.links += 1;
            if let Body::Directory(inner) = &mut node.body {
                inner.parent = new_directory;
            }
            let node = self.node_mut(replaced);
            node.links -= 1;
            node.changed(now);
            self.end_if_unused(replaced);
            return Ok(());
        }
        // The old name pays for the new one, so only a longer one can be refused.
        let (freed, needed) = (entry_bytes(old_name), entry_bytes(new_name));
        self.ledger.take(needed.saturating_sub(freed))?;
        let moved = self.directory_mut(old_directory)?.entries.remove(old_name).ok_or(ErrorCode::NoEntry)?.node;
        self.ledger.give_back(freed.saturating_sub(needed));
        let is_directory = self.is_directory(moved);
        self.directory_mut(old_directory)?.inner -= u32::from(is_directory);
        self.node_mut(old_directory).modified(now);
        let since = self.next_serial();
        let directory = self.directory_mut(new_directory)?;
        directory.entries.insert(new_name.into(), Entry { node: moved, since });
        directory.inner += u32::from(is_directory);
        self.node_mut(new_directory).modified(now);
        let node = self.node_mut(moved);
        node.changed(now);
        if let Body::Directory(inner) = &mut node.body {
            inner.parent = new_directory;
        }
        Ok(())
    }

    /// The first name behind `after` that was there before `until`.
    pub(crate) fn entry_after(
        &self,
        directory: u32,
        after: Option<&str>,
        until: u64,
    ) -> Result<Option<DirectoryEntry>, ErrorCode> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut later = self.directory(directory)?.entries.range::<str, _>((from, Bound::Unbounded));
        let found = later.find(|(_, entry)| entry.since < until);
        Ok(found.map(|(name, entry)| DirectoryEntry { kind: self.node(entry.node).kind(), name: name.to_string() }))
    }

    // Contents.

    pub(crate) fn content(&self, number: u32) -> Result<&Content, ErrorCode> {
        match &self.node(number).body {
            Body::File(content) => Ok(content),
            _ => Err(ErrorCode::BadDescriptor),
        }
    }

    pub(crate) fn write(&mut self, number: u32, position: u64, bytes: &[u8], now: Time) -> Result<(), ErrorCode> {
        let end = position.checked_add(bytes.len() as u64).filter(|end| i64::try_from(*end).is_ok());
        if i64::try_from(position).is_err() {
            return Err(ErrorCode::Invalid);
        }
        let end = end.ok_or(ErrorCode::FileTooLarge)?;
        let size = self.content(number)?.size();
        if bytes.is_empty() {
            return Ok(());
        }
        let more = end.saturating_sub(size);
        self.use_quota(more)?;
        if let Err(error) = self.change(number, now, |content, ledger| content.write(position, bytes, ledger)) {
            self.used -= more;
            return Err(error);
        }
        Ok(())
    }

    pub(crate) fn set_size(&mut self, number: u32, size: u64, now: Time) -> Result<(), ErrorCode> {
        if i64::try_from(size).is_err() {
            return Err(ErrorCode::Invalid);
        }
        let before = self.content(number)?.size();
        self.use_quota(size.saturating_sub(before))?;
        self.used -= before.saturating_sub(size);
        self.change(number, now, |content, ledger| {
            content.set_size(size, ledger);
            Ok(())
        })
    }

    fn change(
        &mut self,
        number: u32,
        now: Time,
        change: impl FnOnce(&mut Content, &mut Ledger) -> Result<(), ErrorCode>,
    ) -> Result<(), ErrorCode> {
        let node = match (number as usize).checked_sub(1) {
            None => &mut self.root,
            Some(index) => &mut self.blocks[index / BLOCK][index % BLOCK],
        };
        let Body::File(content) = &mut node.body else { return Err(ErrorCode::BadDescriptor) };
        change(content, &mut self.ledger)?;
        node.modified(now);
        Ok(())
    }

    /// Whether all counts agree with what is there. Slow: for tests.
    pub(crate) fn is_consistent(&self) -> bool {
        let all = (0..=self.blocks.len() * BLOCK).filter_map(|number| u32::try_from(number).ok());
        let (mut nodes, mut names, mut used) = (0, 0, 0);
        let mut links = vec![0; self.blocks.len() * BLOCK + 1];
        let mut good = true;
        for number in all {
            let node = self.node(number);
            if matches!(node.body, Body::Free(_)) {
                continue;
            }
            nodes += u32::from(number != ROOT);
            used += node.body.size();
            good &= number == ROOT || node.links > 0 || node.open > 0;
            if let Body::Directory(directory) = &node.body {
                good &= node.links <= 1 && (node.links == 1 || directory.entries.is_empty());
                let mut inner = 0;
                for entry in directory.entries.values() {
                    names += 1;
                    links[entry.node as usize] += 1;
                    good &= entry.since < self.serial;
                    if let Body::Directory(child) = &self.node(entry.node).body {
                        inner += 1;
                        good &= child.parent == number;
                    }
                }
                good &= inner == directory.inner;
            }
        }
        links[ROOT as usize] = 1;
        let linked = (0_u32..).zip(&links).all(|(number, links)| {
            matches!(self.node(number).body, Body::Free(_)) || self.node(number).links == *links
        });
        good && linked && (nodes, names, used) == (self.nodes, self.names, self.used)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.clear(Time::default());
    }
}
