//! A disk for tests that knows what is durable and what is only cached, and whose power can be cut.
//!
//! More is lost than a journaling file system would lose: each change to a directory since that was synced survives or not by itself,
//! whatever its order; of the bytes of a file since it was synced, any part may be missing or zero. Only a rename is one
//! step, and what was synced stays.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::disk::{Dir, Disk, Entry, Handle};
use crate::state::taken;

/// Numbers by chance, from a seed: splitmix64.
#[derive(Debug, Clone)]
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    fn up_to(&mut self, most: usize) -> usize {
        usize::try_from(self.below(most as u64 + 1)).unwrap()
    }
}

/// What a disk promises and does not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// Syncing a file does nothing.
    File,
    /// Syncing a directory does nothing.
    Directory,
    /// A rename removes what is there, and then puts the other in its place.
    Rename,
}

/// What goes wrong at a call that changes or syncs something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The power: the call is done or not, and all further ones fail.
    Cut,
    /// The call fails, the next ones do not.
    Error(Errno),
}

#[derive(Debug, Clone)]
enum Change {
    Link(String, usize),
    Unlink(String),
    Rename(String, String, usize),
}

#[derive(Debug, Clone, Default)]
struct Names {
    cached: BTreeMap<String, usize>,
    durable: BTreeMap<String, usize>,
    since: Vec<Change>,
    made: bool,
    made_durable: bool,
}

#[derive(Debug, Clone)]
struct Inode {
    bytes: Vec<u8>,
    durable: usize,
}

#[derive(Debug, Clone)]
struct World {
    inodes: Vec<Inode>,
    names: BTreeMap<Dir, Names>,
    capacity: u64,
    calls: u64,
    fault: Option<(u64, Fault)>,
    lie: Option<Lie>,
    off: bool,
    read_only: bool,
    refusal: Option<Errno>,
    chance: Chance,
}

/// The disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub(crate) struct Simulated(Arc<Mutex<World>>);

fn error(errno: Errno) -> io::Error {
    errno.into()
}

impl World {
    fn on(&self) -> io::Result<()> {
        if self.off { Err(error(Errno::IO)) } else { Ok(()) }
    }

    /// Does something that changes or syncs, unless it is time for the fault.
    fn call<T>(&mut self, call: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        self.on()?;
        if self.read_only {
            return Err(error(Errno::ROFS));
        }
        let number = self.calls;
        self.calls += 1;
        match self.fault {
            Some((at, Fault::Cut)) if at == number => {
                if self.chance.coin() {
                    let _ = call(self);
                }
                self.off = true;
                Err(error(Errno::IO))
            }
            Some((at, Fault::Error(errno))) if at == number => Err(error(errno)),
            _ => call(self),
        }
    }

    fn at(&mut self, dir: Dir) -> io::Result<&mut Names> {
        let names = self.names.entry(dir).or_default();
        if names.made || dir == Dir::Root { Ok(names) } else { Err(error(Errno::NOENT)) }
    }

    fn used(&self) -> u64 {
        let linked = self.names.values().flat_map(|names| names.cached.values());
        linked.map(|inode| taken(self.inodes[*inode].bytes.len() as u64)).sum()
    }

    fn create(&mut self, dir: Dir, name: &str) -> io::Result<usize> {
        if self.used() >= self.capacity {
            return Err(error(Errno::NOSPC));
        }
        let inode = self.inodes.len();
        self.inodes.push(Inode { bytes: Vec::new(), durable: 0 });
        let names = self.at(dir)?;
        names.cached.insert(name.to_owned(), inode);
        names.since.push(Change::Link(name.to_owned(), inode));
        Ok(inode)
    }

    fn append(&mut self, inode: usize, bytes: &[u8]) -> io::Result<()> {
        let before = taken(self.inodes[inode].bytes.len() as u64);
        let room = usize::try_from(before + self.capacity.saturating_sub(self.used())).unwrap();
        let fits = room.saturating_sub(self.inodes[inode].bytes.len()).min(bytes.len());
        self.inodes[inode].bytes.extend(&bytes[..fits]);
        if fits < bytes.len() { Err(error(Errno::NOSPC)) } else { Ok(()) }
    }

    fn sync(&mut self, inode: usize) {
        if self.lie != Some(Lie::File) {
            self.inodes[inode].durable = self.inodes[inode].bytes.len();
        }
    }

    fn rename(&mut self, from: (Dir, &str), to: (Dir, &str)) -> io::Result<()> {
        let inode = self.at(from.0)?.cached.remove(from.1).ok_or_else(|| error(Errno::NOENT))?;
        let replaced = self.at(to.0)?.cached.insert(to.1.to_owned(), inode);
        let gone = Change::Unlink(from.1.to_owned());
        if self.lie == Some(Lie::Rename) {
            if replaced.is_some() {
                self.at(to.0)?.since.push(Change::Unlink(to.1.to_owned()));
            }
            self.at(to.0)?.since.push(Change::Link(to.1.to_owned(), inode));
            self.at(from.0)?.since.push(gone);
        } else if from.0 == to.0 {
            self.at(to.0)?.since.push(Change::Rename(from.1.to_owned(), to.1.to_owned(), inode));
        } else {
            self.at(to.0)?.since.push(Change::Link(to.1.to_owned(), inode));
            self.at(from.0)?.since.push(gone);
        }
        Ok(())
    }

    fn remove(&mut self, dir: Dir, name: &str) -> io::Result<()> {
        let names = self.at(dir)?;
        names.cached.remove(name).ok_or_else(|| error(Errno::NOENT))?;
        names.since.push(Change::Unlink(name.to_owned()));
        Ok(())
    }

    fn sync_directory(&mut self, dir: Dir) -> io::Result<()> {
        if self.lie == Some(Lie::Directory) {
            return Ok(());
        }
        let names = self.at(dir)?;
        names.durable.clone_from(&names.cached);
        names.since.clear();
        if dir == Dir::Root {
            for names in self.names.values_mut() {
                names.made_durable |= names.made;
            }
        }
        Ok(())
    }
}

impl Simulated {
    /// An empty disk with so many bytes.
    pub(crate) fn new(capacity: u64) -> Self {
        let world = World {
            inodes: Vec::new(),
            names: BTreeMap::new(),
            capacity,
            calls: 0,
            fault: None,
            lie: None,
            off: false,
            read_only: false,
            refusal: None,
            chance: Chance(0),
        };
        Self(Arc::new(Mutex::new(world)))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lying(self, lie: Option<Lie>) -> Self {
        self.world().lie = lie;
        self
    }

    /// The fault comes at so many calls from now.
    pub(crate) fn fails_after(&self, calls: u64, fault: Fault, seed: u64) {
        let mut world = self.world();
        world.fault = Some((world.calls + calls, fault));
        world.chance = Chance(seed);
    }

    /// From now on nothing can be changed.
    pub(crate) fn read_only(&self) {
        self.world().read_only = true;
    }

    /// From now on this is the answer to whoever opens a file.
    pub(crate) fn refuses_to_open(&self, errno: Option<Errno>) {
        self.world().refusal = errno;
    }

    pub(crate) fn limit(&self, capacity: u64) {
        self.world().capacity = capacity;
    }

    /// Calls so far that changed or synced something.
    pub(crate) fn calls(&self) -> u64 {
        self.world().calls
    }

    /// Whether the power is cut.
    pub(crate) fn is_off(&self) -> bool {
        self.world().off
    }

    /// Whether the fault was met.
    pub(crate) fn has_failed(&self) -> bool {
        let world = self.world();
        world.fault.is_some_and(|(at, _)| world.calls > at)
    }

    /// Another disk with the same on it.
    pub(crate) fn same(&self) -> Self {
        let mut world = self.world().clone();
        world.fault = None;
        world.off = false;
        Self(Arc::new(Mutex::new(world)))
    }

    /// What may be on the disk when the power comes back.
    pub(crate) fn survivor(&self, seed: u64) -> Self {
        let chance = &mut Chance(seed);
        // Every third time all or nothing of what was not synced.
        let extreme = [None, Some(true), Some(false)][chance.up_to(5).saturating_sub(3)];
        let mut world = self.world().clone();
        let survives = |chance: &mut Chance| extreme.unwrap_or_else(|| chance.coin());
        for names in world.names.values_mut() {
            names.made = names.made_durable || (names.made && survives(chance));
            names.made_durable = names.made;
            for change in std::mem::take(&mut names.since) {
                if !survives(chance) {
                    continue;
                }
                match change {
                    Change::Link(name, inode) => drop(names.durable.insert(name, inode)),
                    Change::Unlink(name) => drop(names.durable.remove(&name)),
                    Change::Rename(from, to, inode) => {
                        names.durable.insert(to, inode);
                        if names.durable.get(&from) == Some(&inode) && survives(chance) {
                            names.durable.remove(&from);
                        }
                    }
                }
            }
            names.cached.clone_from(&names.durable);
        }
        if let Some(root) = world.names.get(&Dir::Root).cloned() {
            // A directory that was not made has nothing in it.
            world.names.retain(|_, names| names.made);
            world.names.insert(Dir::Root, root);
        }
        for inode in &mut world.inodes {
            let whole = inode.bytes.len();
            if extreme != Some(true) && inode.durable < whole {
                match if extreme.is_some() { 0 } else { chance.below(5) } {
                    0 => inode.bytes.truncate(inode.durable),
                    1 => inode.bytes.truncate(inode.durable + chance.up_to(whole - inode.durable)),
                    2 => {
                        let from = inode.durable + chance.up_to(whole - inode.durable);
                        inode.bytes[from..].fill(0);
                    }
                    3 => {
                        for sector in inode.bytes[inode.durable..].chunks_mut(512) {
                            if chance.coin() {
                                sector.fill(0);
                            }
                        }
                    }
                    _ => {}
                }
            }
            inode.durable = inode.bytes.len();
        }
        world.fault = None;
        world.off = false;
        Self(Arc::new(Mutex::new(world)))
    }

    /// All files, by directory and name.
    pub(crate) fn files(&self) -> BTreeMap<(Dir, String), Vec<u8>> {
        let world = self.world();
        let all =
            world.names.iter().flat_map(|(dir, names)| names.cached.iter().map(|(name, inode)| (*dir, name, inode)));
        all.map(|(dir, name, inode)| ((dir, name.clone()), world.inodes[*inode].bytes.clone())).collect()
    }

    /// Puts a file there, or removes it, as no store would.
    pub(crate) fn put(&self, dir: Dir, name: &str, bytes: Option<Vec<u8>>) {
        let mut world = self.world();
        let inode = world.inodes.len();
        let names = world.names.entry(dir).or_default();
        names.made = true;
        match bytes {
            Some(bytes) => {
                names.cached.insert(name.to_owned(), inode);
                world.inodes.push(Inode { durable: bytes.len(), bytes });
            }
            None => drop(names.cached.remove(name)),
        }
    }
}

impl Disk for Simulated {
    fn lock(&self) -> io::Result<bool> {
        self.world().on()?;
        Ok(true)
    }

    fn make_directory(&self, dir: Dir) -> io::Result<()> {
        let mut world = self.world();
        if world.names.get(&dir).is_some_and(|names| names.made) {
            return world.on();
        }
        world.call(|world| {
            world.names.entry(dir).or_default().made = true;
            Ok(())
        })
    }

    fn list(&self, dir: Dir) -> io::Result<Vec<Entry>> {
        let mut world = self.world();
        world.on()?;
        let names = world.at(dir)?.cached.clone();
        let entry = |(name, inode): (String, usize)| {
            let size = Some(world.inodes[inode].bytes.len() as u64);
            Entry { name: Some(name), size }
        };
        let mut entries: Vec<Entry> = names.into_iter().map(entry).collect();
        if dir == Dir::Root {
            let below = Dir::BELOW.into_iter().filter(|dir| world.names.get(dir).is_some_and(|names| names.made));
            entries.extend(below.map(|dir| Entry { name: Some(dir.name().to_owned()), size: None }));
        }
        Ok(entries)
    }

    fn create(&self, dir: Dir, name: &str) -> io::Result<Box<dyn Handle>> {
        let inode = self.world().call(|world| world.create(dir, name))?;
        Ok(Box::new((self.clone(), inode)))
    }

    fn open(&self, dir: Dir, name: &str) -> io::Result<Box<dyn Handle>> {
        let mut world = self.world();
        world.on()?;
        if let Some(errno) = world.refusal {
            return Err(error(errno));
        }
        let inode = *world.at(dir)?.cached.get(name).ok_or_else(|| error(Errno::NOENT))?;
        Ok(Box::new((self.clone(), inode)))
    }

    fn rename(&self, from: (Dir, &str), to: (Dir, &str)) -> io::Result<()> {
        self.world().call(|world| world.rename(from, to))
    }

    fn remove(&self, dir: Dir, name: &str) -> io::Result<()> {
        self.world().call(|world| world.remove(dir, name))
    }

    fn sync_directory(&self, dir: Dir) -> io::Result<()> {
        self.world().call(|world| world.sync_directory(dir))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let world = self.world();
        world.on()?;
        Ok(world.capacity.saturating_sub(world.used()))
    }
}

impl Handle for (Simulated, usize) {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.world().call(|world| world.append(self.1, bytes))
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<usize> {
        let world = self.0.world();
        world.on()?;
        let from = world.inodes[self.1].bytes.get(usize::try_from(at).unwrap()..).unwrap_or_default();
        // Never more than a page, so that no caller takes one read for all.
        let read = from.len().min(into.len()).min(4096);
        into[..read].copy_from_slice(&from[..read]);
        Ok(read)
    }

    fn size(&self) -> io::Result<u64> {
        let world = self.0.world();
        world.on()?;
        Ok(world.inodes[self.1].bytes.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.world().call(|world| {
            world.sync(self.1);
            Ok(())
        })
    }
}
