//! Random calls: against a model, against a real directory, and whatever a fuzzer makes of bytes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use gaia_tmpfs::exercise::{Counted, exercise};
use gaia_tmpfs::{
    CHUNK, Descriptor, DescriptorFlags, ErrorCode, Limits, NewTimestamp, OpenFlags, PathFlags, Reaper, Time, Tmp, Type,
};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;

const NOW: Time = Time { seconds: 3, nanoseconds: 0 };
const RW: DescriptorFlags = DescriptorFlags::READ.union(DescriptorFlags::WRITE);

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Everything in a directory: paths, with what files hold.
fn contents(at: &Descriptor) -> Result<BTreeMap<String, (Type, Vec<u8>)>, ErrorCode> {
    let mut found = BTreeMap::new();
    let mut listing = at.read_directory()?;
    while let Some(entry) = listing.read_directory_entry()? {
        let stat = at.stat_at(PathFlags::empty(), &entry.name)?;
        let open = |flags| at.open_at(PathFlags::empty(), &entry.name, flags, DescriptorFlags::READ, NOW);
        let bytes = match entry.kind {
            Type::Directory => {
                for (path, what) in contents(&open(OpenFlags::DIRECTORY)?)? {
                    found.insert(format!("{}/{path}", entry.name), what);
                }
                Vec::new()
            }
            Type::SymbolicLink => at.readlink_at(&entry.name)?.into_bytes(),
            Type::RegularFile => {
                let (file, mut bytes) = (open(OpenFlags::empty())?, Vec::new());
                while let (more, false) = file.read(u64::MAX, bytes.len() as u64)? {
                    bytes.extend(more);
                }
                bytes
            }
        };
        assert!(stat.kind == entry.kind && (entry.kind == Type::Directory || stat.size == bytes.len() as u64));
        found.insert(entry.name, (entry.kind, bytes));
    }
    Ok(found)
}

/// Positions and sizes around the edges of pieces and chunks.
fn position() -> impl Strategy<Value = u64> {
    let chunk = CHUNK as u64;
    prop_oneof![0..600_u64, chunk - 3..chunk + 4, 2 * chunk - 3..2 * chunk + 4, 0..4 * chunk]
}

// The model: a map of paths.

#[derive(Debug, Clone)]
enum Step {
    Open { path: &'static str, create: bool, exclusive: bool, truncate: bool },
    Write(Index, u64, u64, u8),
    Append(Index, u64, u8),
    Read(Index, u64, u64),
    SetSize(Index, u64),
    Close(Index),
    CreateDirectory(&'static str),
    RemoveDirectory(&'static str),
    Unlink(&'static str),
    Rename(&'static str, &'static str),
    Link(&'static str, &'static str),
    Clear,
    Reap(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let path = || select(&["a", "b", "d", "d/a", "d/e", "d/e/a", "a/a", "e", "e/a", "e/e"][..]);
    let index = any::<Index>;
    prop_oneof![
        6 => (path(), any::<[bool; 3]>())
            .prop_map(|(path, [create, exclusive, truncate])| Step::Open { path, create, exclusive, truncate }),
        8 => (index(), position(), position(), 1..=255_u8).prop_map(|(i, at, n, byte)| Step::Write(i, at, n, byte)),
        3 => (index(), position(), 1..=255_u8).prop_map(|(i, n, byte)| Step::Append(i, n, byte)),
        5 => (index(), position(), position()).prop_map(|(i, at, n)| Step::Read(i, at, n)),
        3 => (index(), position()).prop_map(|(i, size)| Step::SetSize(i, size)),
        2 => index().prop_map(Step::Close),
        3 => path().prop_map(Step::CreateDirectory),
        2 => path().prop_map(Step::RemoveDirectory),
        2 => path().prop_map(Step::Unlink),
        4 => (path(), path()).prop_map(|(old, new)| Step::Rename(old, new)),
        2 => (path(), path()).prop_map(|(old, new)| Step::Link(old, new)),
        1 => Just(Step::Clear),
        2 => (0..8_usize).prop_map(Step::Reap),
    ]
}

#[derive(Debug, Default)]
struct Model {
    quota: u64,
    /// What paths name; `None` is a directory.
    names: BTreeMap<String, Option<usize>>,
    files: Vec<Vec<u8>>,
    open: Vec<usize>,
}

type Answer = Result<(), ErrorCode>;

impl Model {
    fn used(&self) -> u64 {
        let alive: BTreeSet<usize> = self.names.values().copied().flatten().chain(self.open.iter().copied()).collect();
        alive.into_iter().map(|file| self.files[file].len() as u64).sum()
    }

    fn parent(&self, path: &str) -> Answer {
        for (end, _) in path.match_indices('/') {
            match self.names.get(&path[..end]) {
                None => return Err(ErrorCode::NoEntry),
                Some(Some(_)) => return Err(ErrorCode::NotDirectory),
                Some(None) => {}
            }
        }
        Ok(())
    }

    fn get(&self, path: &str) -> Result<Option<usize>, ErrorCode> {
        self.parent(path)?;
        self.names.get(path).copied().ok_or(ErrorCode::NoEntry)
    }

    fn vacant(&self, path: &str) -> Answer {
        self.parent(path)?;
        if self.names.contains_key(path) { Err(ErrorCode::Exist) } else { Ok(()) }
    }

    fn is_empty(&self, path: &str) -> bool {
        !self.names.keys().any(|name| name.starts_with(&format!("{path}/")))
    }

    fn open(&mut self, path: &str, create: bool, exclusive: bool, truncate: bool) -> Answer {
        let file = match self.get(path) {
            Ok(_) if create && exclusive => return Err(ErrorCode::Exist),
            Ok(None) => return Err(ErrorCode::IsDirectory),
            Ok(Some(file)) => file,
            Err(ErrorCode::NoEntry) if create && self.parent(path).is_ok() => {
                self.files.push(Vec::new());
                self.names.insert(path.to_owned(), Some(self.files.len() - 1));
                self.files.len() - 1
            }
            Err(error) => return Err(error),
        };
        if truncate {
            self.files[file].clear();
        }
        self.open.push(file);
        Ok(())
    }

    fn resize(&mut self, file: usize, size: u64) -> Answer {
        let more = size.saturating_sub(self.files[file].len() as u64);
        if self.used() + more > self.quota {
            return Err(ErrorCode::InsufficientSpace);
        }
        self.files[file].resize(usize::try_from(size).unwrap(), 0);
        Ok(())
    }

    fn write(&mut self, file: usize, position: u64, n: u64, byte: u8) -> Answer {
        let size = self.files[file].len() as u64;
        if n > 0 {
            self.resize(file, size.max(position + n))?;
            self.files[file][usize::try_from(position).unwrap()..usize::try_from(position + n).unwrap()].fill(byte);
        }
        Ok(())
    }

    fn read(&self, file: usize, position: u64, n: u64) -> Vec<u8> {
        let bytes = self.files[file].iter().skip(usize::try_from(position).unwrap());
        bytes.take(usize::try_from(n).unwrap().min(CHUNK)).copied().collect()
    }

    fn rename(&mut self, old: &str, new: &str) -> Answer {
        self.parent(old)?;
        self.parent(new)?;
        let moved = self.get(old)?;
        let replaced = self.names.get(new).copied();
        if moved.is_none() && new.starts_with(&format!("{old}/")) {
            return Err(ErrorCode::Invalid);
        }
        if old.starts_with(&format!("{new}/")) {
            return Err(ErrorCode::NotEmpty);
        }
        match (moved, replaced) {
            (None, Some(None)) if old == new => return Ok(()),
            (None, Some(None)) if !self.is_empty(new) => return Err(ErrorCode::NotEmpty),
            (None, Some(Some(_))) => return Err(ErrorCode::NotDirectory),
            (Some(_), Some(None)) => return Err(ErrorCode::IsDirectory),
            (Some(one), Some(Some(other))) if one == other => return Ok(()),
            _ => {}
        }
        let inner = format!("{old}/");
        let moving: Vec<String> =
            self.names.keys().filter(|name| *name == old || name.starts_with(&inner)).cloned().collect();
        for name in moving {
            if let Some(what) = self.names.remove(&name) {
                self.names.insert(format!("{new}{}", &name[old.len()..]), what);
            }
        }
        Ok(())
    }

    fn contents(&self) -> BTreeMap<String, (Type, Vec<u8>)> {
        let what = |file: &Option<usize>| match file {
            None => (Type::Directory, Vec::new()),
            Some(file) => (Type::RegularFile, self.files[*file].clone()),
        };
        self.names.iter().map(|(name, file)| (name.clone(), what(file))).collect()
    }
}

fn take_step(
    step: &Step,
    model: &mut Model,
    tmp: &Tmp,
    open: &mut Vec<Descriptor>,
    reaper: &Reaper,
) -> (Answer, Answer) {
    let root = tmp.root();
    let stay = PathFlags::empty();
    let pick = |index: &Index| (!open.is_empty()).then(|| index.index(open.len()));
    let filled = |n: u64, byte| vec![byte; usize::try_from(n).unwrap()];
    match *step {
        Step::Open { path, create, exclusive, truncate } => {
            let mut flags = OpenFlags::empty();
            flags.set(OpenFlags::CREATE, create);
            flags.set(OpenFlags::EXCLUSIVE, exclusive);
            flags.set(OpenFlags::TRUNCATE, truncate);
            let opened = root.open_at(stay, path, flags, RW, NOW).map(|file| open.push(file));
            (opened, model.open(path, create, exclusive, truncate))
        }
        Step::Write(ref index, position, n, byte) => pick(index).map_or((Ok(()), Ok(())), |i| {
            let written = open[i].write(&filled(n, byte), position, NOW);
            assert!(written.is_err() || written == Ok(n), "shortened");
            (written.map(drop), model.write(model.open[i], position, n, byte))
        }),
        Step::Append(ref index, n, byte) => pick(index).map_or((Ok(()), Ok(())), |i| {
            let end = model.files[model.open[i]].len() as u64;
            (open[i].append(&filled(n, byte), NOW), model.write(model.open[i], end, n, byte))
        }),
        Step::Read(ref index, position, n) => pick(index).map_or((Ok(()), Ok(())), |i| {
            let expected = model.read(model.open[i], position, n);
            let end = expected.is_empty();
            assert!(open[i].read(n, position) == Ok((expected, end)), "other bytes");
            (Ok(()), Ok(()))
        }),
        Step::SetSize(ref index, size) => {
            pick(index).map_or((Ok(()), Ok(())), |i| (open[i].set_size(size, NOW), model.resize(model.open[i], size)))
        }
        Step::Close(ref index) => {
            if let Some(i) = pick(index) {
                open.remove(i);
                model.open.remove(i);
            }
            (Ok(()), Ok(()))
        }
        Step::CreateDirectory(path) => {
            let vacant = model.vacant(path);
            if vacant.is_ok() {
                model.names.insert(path.to_owned(), None);
            }
            (root.create_directory_at(path, NOW), vacant)
        }
        Step::RemoveDirectory(path) => {
            let removed = match model.get(path) {
                Ok(Some(_)) => Err(ErrorCode::NotDirectory),
                Ok(None) if !model.is_empty(path) => Err(ErrorCode::NotEmpty),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if removed.is_ok() {
                model.names.remove(path);
            }
            (root.remove_directory_at(path, NOW), removed)
        }
        Step::Unlink(path) => {
            let removed = match model.get(path) {
                Ok(Some(_)) => Ok(()),
                Ok(None) => Err(ErrorCode::IsDirectory),
                Err(error) => Err(error),
            };
            if removed.is_ok() {
                model.names.remove(path);
            }
            (root.unlink_file_at(path, NOW), removed)
        }
        Step::Rename(old, new) => (root.rename_at(old, &root, new, NOW), model.rename(old, new)),
        Step::Link(old, new) => {
            let linked = model.get(old).and_then(|file| {
                model.vacant(new)?;
                model.names.insert(new.to_owned(), Some(file.ok_or(ErrorCode::NotPermitted)?));
                Ok(())
            });
            (root.link_at(stay, old, &root, new, NOW), linked)
        }
        Step::Clear => {
            tmp.clear(NOW);
            for file in open.drain(..) {
                assert_eq!(file.stat(), Err(ErrorCode::BadDescriptor));
            }
            *model = Model { quota: model.quota, ..Model::default() };
            (Ok(()), Ok(()))
        }
        Step::Reap(chunks) => {
            let _more = reaper.free_some(chunks);
            (Ok(()), Ok(()))
        }
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn it_is_what_a_map_of_paths_would_be(
        quota in prop_oneof![Just(1_u64 << 40), 0..400_000_u64],
        spare in 0..6_usize,
        steps in proptest::collection::vec(step(), 0..120),
    ) {
        let budget = Arc::new(Counted::of(u64::MAX));
        let reaper = Reaper::new(Arc::<Counted>::clone(&budget), spare);
        let tmp = Tmp::new(Limits::of_quota(quota), &reaper);
        let mut model = Model { quota, ..Model::default() };
        let mut open = Vec::new();
        for step in &steps {
            let (got, expected) = take_step(step, &mut model, &tmp, &mut open, &reaper);
            prop_assert_eq!(got, expected, "{:?}", step);
            prop_assert_eq!(tmp.used_bytes(), model.used(), "{:?}", step);
            prop_assert_eq!(budget.taken(), tmp.held_bytes() + reaper.held_bytes(), "{:?}", step);
        }
        prop_assert!(contents(&tmp.root()).unwrap() == model.contents());
        prop_assert!(tmp.is_consistent());
        drop((tmp, open));
        while reaper.free_some(64) {}
        prop_assert!(budget.taken() <= (spare * CHUNK) as u64);
    }
}

// The real directory.

#[derive(Debug, Clone)]
enum Call {
    Open(PathFlags, String, OpenFlags, DescriptorFlags),
    Write(u64, u64, u8),
    Append(u64, u8),
    Read(u64, u64),
    SetSize(u64),
    Close,
    Stat,
    StatAt(PathFlags, String),
    SetTimesAt(PathFlags, String, u32, u32),
    CreateDirectory(String),
    RemoveDirectory(String),
    Unlink(String),
    Rename(String, Index, String),
    Link(String, Index, String),
    Symlink(String, String),
    Readlink(String),
    Same(Index),
    List,
}

fn any_path() -> impl Strategy<Value = String> {
    let part =
        || prop_oneof![8 => select(&["a", "b", "c", "l", "m"][..]), 1 => Just("."), 2 => Just(".."), 1 => Just("")];
    let several =
        (proptest::collection::vec(part(), 1..4), prop_oneof![5 => Just(""), 1 => Just("/"), 1 => Just("/.")])
            .prop_map(|(parts, end)| parts.join("/") + end);
    let long =
        prop_oneof![Just("n".repeat(256)), Just("n".repeat(255)), Just("a/".repeat(2100)), Just("./".repeat(2047))];
    prop_oneof![9 => part().prop_map(str::to_owned), 30 => several, 1 => long, 1 => Just("a\0".to_owned())]
}

fn call() -> impl Strategy<Value = (Index, Call)> {
    let path_flags = || any::<bool>().prop_map(|follow| PathFlags::from_bits_truncate(u8::from(follow)));
    let open_flags = prop_oneof![(0..16_u8).prop_map(OpenFlags::from_bits_truncate), Just(OpenFlags::empty())];
    let flags = (0..4_u8).prop_map(DescriptorFlags::from_bits_truncate);
    let open = (path_flags(), any_path(), open_flags, flags);
    let call = prop_oneof![
        10 => open.prop_map(|(path_flags, path, open_flags, flags)| Call::Open(path_flags, path, open_flags, flags)),
        3 => (position(), 0..2000_u64, any::<u8>()).prop_map(|(at, n, byte)| Call::Write(at, n, byte)),
        1 => (0..2000_u64, any::<u8>()).prop_map(|(n, byte)| Call::Append(n, byte)),
        3 => (position(), position()).prop_map(|(at, n)| Call::Read(at, n)),
        2 => position().prop_map(Call::SetSize),
        2 => Just(Call::Close),
        2 => Just(Call::Stat),
        6 => (path_flags(), any_path()).prop_map(|(flags, path)| Call::StatAt(flags, path)),
        1 => (path_flags(), any_path(), any::<u32>(), any::<u32>())
            .prop_map(|(flags, path, access, modification)| Call::SetTimesAt(flags, path, access, modification)),
        8 => any_path().prop_map(Call::CreateDirectory),
        3 => any_path().prop_map(Call::RemoveDirectory),
        3 => any_path().prop_map(Call::Unlink),
        8 => (any_path(), any::<Index>(), any_path()).prop_map(|(old, other, new)| Call::Rename(old, other, new)),
        4 => (any_path(), any::<Index>(), any_path()).prop_map(|(old, other, new)| Call::Link(old, other, new)),
        8 => (any_path(), any_path()).prop_map(|(target, path)| Call::Symlink(target, path)),
        3 => any_path().prop_map(Call::Readlink),
        2 => any::<Index>().prop_map(Call::Same),
        1 => Just(Call::List),
    ];
    (any::<Index>(), call)
}

/// What a call answers, as far as both must agree.
#[derive(Debug, PartialEq)]
enum Said {
    Nothing,
    /// Bytes, but for directories, and links, but for directories.
    Stat(Type, Option<(u64, u64)>),
    Bytes(Vec<u8>),
    Text(String),
    Is(bool),
    Names(Vec<(String, Type)>),
    Times(u64, u64),
}

/// The codes that wasmtime-wasi gives to errors; `EXDEV` is how `openat2` says that a path leads outside.
fn code_of(errno: Errno) -> ErrorCode {
    match errno {
        Errno::BADF => ErrorCode::BadDescriptor,
        Errno::BUSY => ErrorCode::Busy,
        Errno::EXIST => ErrorCode::Exist,
        Errno::FBIG => ErrorCode::FileTooLarge,
        Errno::NOSPC => ErrorCode::InsufficientSpace,
        Errno::INVAL => ErrorCode::Invalid,
        Errno::ISDIR => ErrorCode::IsDirectory,
        Errno::LOOP => ErrorCode::Loop,
        Errno::NAMETOOLONG => ErrorCode::NameTooLong,
        Errno::NOENT => ErrorCode::NoEntry,
        Errno::NOTDIR => ErrorCode::NotDirectory,
        Errno::NOTEMPTY => ErrorCode::NotEmpty,
        Errno::PERM | Errno::XDEV => ErrorCode::NotPermitted,
        other => panic!("{other} is not expected"),
    }
}

fn type_of(mode: rustix::fs::RawMode) -> Type {
    match FileType::from_raw_mode(mode) {
        FileType::Directory => Type::Directory,
        FileType::Symlink => Type::SymbolicLink,
        _ => Type::RegularFile,
    }
}

/// A descriptor of the real directory's.
struct Real(OwnedFd);

impl Real {
    fn resolve(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let mode = if flags.contains(OFlags::CREATE) { Mode::from(0o666) } else { Mode::empty() };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        loop {
            // A rename anywhere on the machine makes it uncertain.
            match rustix::fs::openat2(&self.0, path, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN) => {}
                answer => return answer,
            }
        }
    }

    fn find(&self, path: &str, path_flags: PathFlags) -> Result<OwnedFd, Errno> {
        let follow = path_flags.contains(PathFlags::SYMLINK_FOLLOW);
        self.resolve(path, OFlags::PATH | if follow { OFlags::empty() } else { OFlags::NOFOLLOW })
    }

    /// The directory before the last part, which is not looked at, and that part with the slashes behind it.
    fn parent<'p>(&self, path: &'p str) -> Result<(OwnedFd, &'p str), Errno> {
        let trimmed = path.trim_end_matches('/');
        let at = trimmed.rfind('/').map_or(0, |slash| slash + 1);
        if path.starts_with('/') {
            return Err(Errno::XDEV);
        } else if path.contains('\0') {
            return Err(Errno::INVAL);
        } else if path.len() > 4095 {
            return Err(Errno::NAMETOOLONG);
        } else if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let parent = self.resolve(if at == 0 { "." } else { &path[..at] }, OFlags::PATH | OFlags::DIRECTORY)?;
        if &trimmed[at..] == ".." {
            self.resolve(path, OFlags::PATH)?;
        }
        Ok((parent, &path[at..]))
    }

    fn stat(fd: &OwnedFd) -> Result<Said, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        let kind = type_of(stat.st_mode);
        let size = u64::try_from(stat.st_size).unwrap();
        #[allow(clippy::useless_conversion, reason = "its width differs between targets")]
        let links = u64::from(stat.st_nlink);
        Ok(Said::Stat(kind, (kind != Type::Directory).then_some((size, links))))
    }

    fn open(&self, path_flags: PathFlags, path: &str, open: OpenFlags, flags: DescriptorFlags) -> Result<Self, Errno> {
        let making = OpenFlags::CREATE | OpenFlags::EXCLUSIVE | OpenFlags::TRUNCATE;
        if open.contains(OpenFlags::DIRECTORY) && open.intersects(making) {
            return Err(Errno::INVAL);
        }
        let write = flags.contains(DescriptorFlags::WRITE);
        let writes = write || open.intersects(OpenFlags::CREATE | OpenFlags::TRUNCATE);
        let reads = !write || flags.contains(DescriptorFlags::READ);
        let mut oflags = match (reads, writes) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        };
        oflags.set(OFlags::CREATE, open.contains(OpenFlags::CREATE));
        oflags.set(OFlags::EXCL, open.contains(OpenFlags::CREATE | OpenFlags::EXCLUSIVE));
        oflags.set(OFlags::TRUNC, open.contains(OpenFlags::TRUNCATE));
        oflags.set(OFlags::NOFOLLOW, !path_flags.contains(PathFlags::SYMLINK_FOLLOW));
        let opened = self.resolve(path, oflags)?;
        if open.contains(OpenFlags::DIRECTORY) && type_of(rustix::fs::fstat(&opened)?.st_mode) != Type::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok(Self(opened))
    }

    fn link(&self, old: &str, other: &Self, new: &str) -> Result<(), Errno> {
        let found = self.find(old, PathFlags::empty())?;
        let (new_parent, new_name) = other.parent(new)?;
        let plain = self.parent(old).ok().filter(|(_, name)| !matches!(*name, "." | "..") && !name.ends_with('/'));
        match plain {
            Some((parent, name)) => rustix::fs::linkat(&parent, name, &new_parent, new_name, AtFlags::empty()),
            // A slash would be followed wherever the link leads.
            None => rustix::fs::linkat(&found, "", &new_parent, new_name, AtFlags::EMPTY_PATH),
        }
    }

    fn list(&self) -> Result<Vec<(String, Type)>, Errno> {
        let mut names = Vec::new();
        let directory = rustix::fs::openat(&self.0, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        for entry in rustix::fs::Dir::new(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_str().unwrap().to_owned();
            if name != "." && name != ".." {
                let stat = rustix::fs::statat(&self.0, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)?;
                names.push((name, type_of(stat.st_mode)));
            }
        }
        names.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(names)
    }

    fn contents(&self, prefix: &str, found: &mut BTreeMap<String, (Type, Vec<u8>)>) {
        for (name, kind) in self.list().unwrap() {
            let path = format!("{prefix}{name}");
            let bytes = match kind {
                Type::Directory => {
                    Self(self.resolve(&name, OFlags::RDONLY).unwrap()).contents(&format!("{path}/"), found);
                    Vec::new()
                }
                Type::SymbolicLink => rustix::fs::readlinkat(&self.0, name, Vec::new()).unwrap().into_bytes(),
                Type::RegularFile => {
                    let mut bytes = Vec::new();
                    let file = self.resolve(&name, OFlags::RDONLY).unwrap();
                    std::io::Read::read_to_end(&mut std::fs::File::from(file), &mut bytes).unwrap();
                    bytes
                }
            };
            found.insert(path, (kind, bytes));
        }
    }
}

/// One open node on both sides.
struct Pair {
    ours: Descriptor,
    real: Real,
    is_directory: bool,
}

fn stat_of(stat: gaia_tmpfs::DescriptorStat) -> Said {
    Said::Stat(stat.kind, (stat.kind != Type::Directory).then_some((stat.size, stat.link_count)))
}

fn ours(at: &Pair, other: &Pair, call: &Call) -> Result<(Said, Option<Descriptor>), ErrorCode> {
    let d = &at.ours;
    let nothing = |()| Said::Nothing;
    let said = match call {
        Call::Open(path_flags, path, open_flags, flags) => {
            let opened = d.open_at(*path_flags, path, *open_flags, *flags, NOW)?;
            return Ok((stat_of(opened.stat()?), Some(opened)));
        }
        Call::Write(position, n, byte) => {
            d.write(&vec![*byte; usize::try_from(*n).unwrap()], *position, NOW).map(|_| Said::Nothing)
        }
        Call::Append(n, byte) => d.append(&vec![*byte; usize::try_from(*n).unwrap()], NOW).map(nothing),
        Call::Read(position, n) => d.read(*n, *position).map(|(bytes, _)| Said::Bytes(bytes)),
        Call::SetSize(size) => d.set_size(*size, NOW).map(nothing),
        Call::Close => Ok(Said::Nothing),
        Call::Stat => d.stat().map(stat_of),
        Call::StatAt(flags, path) => d.stat_at(*flags, path).map(stat_of),
        Call::SetTimesAt(flags, path, access, modification) => {
            let time = |seconds: u32| NewTimestamp::Timestamp(Time { seconds: u64::from(seconds) / 2, nanoseconds: 0 });
            d.set_times_at(*flags, path, time(*access), time(*modification), NOW)?;
            let stat = d.stat_at(*flags, path)?;
            Ok(Said::Times(stat.access.seconds, stat.modification.seconds))
        }
        Call::CreateDirectory(path) => d.create_directory_at(path, NOW).map(nothing),
        Call::RemoveDirectory(path) => d.remove_directory_at(path, NOW).map(nothing),
        Call::Unlink(path) => d.unlink_file_at(path, NOW).map(nothing),
        Call::Rename(old, _, new) => d.rename_at(old, &other.ours, new, NOW).map(nothing),
        Call::Link(old, _, new) => d.link_at(PathFlags::empty(), old, &other.ours, new, NOW).map(nothing),
        Call::Symlink(target, path) => d.symlink_at(target, path, NOW).map(nothing),
        Call::Readlink(path) => d.readlink_at(path).map(Said::Text),
        Call::Same(_) => Ok(Said::Is(d.is_same_object(&other.ours) && d.metadata_hash() == other.ours.metadata_hash())),
        Call::List => {
            let (mut listing, mut names) = (d.read_directory()?, Vec::new());
            while let Some(entry) = listing.read_directory_entry()? {
                names.push((entry.name, entry.kind));
            }
            Ok(Said::Names(names))
        }
    };
    said.map(|said| (said, None))
}

fn theirs(at: &Pair, other: &Pair, call: &Call) -> Result<(Said, Option<Real>), Errno> {
    let Real(fd) = &at.real;
    let nothing = |()| Said::Nothing;
    let said = match call {
        Call::Open(path_flags, path, open_flags, flags) => {
            let opened = at.real.open(*path_flags, path, *open_flags, *flags)?;
            return Ok((Real::stat(&opened.0)?, Some(opened)));
        }
        Call::Write(position, n, byte) => {
            rustix::io::pwrite(fd, &vec![*byte; usize::try_from(*n).unwrap()], *position).map(|_| Said::Nothing)
        }
        Call::Append(n, byte) => {
            let end = u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap();
            rustix::io::pwrite(fd, &vec![*byte; usize::try_from(*n).unwrap()], end).map(|_| Said::Nothing)
        }
        Call::Read(position, n) => {
            let mut bytes = vec![0; usize::try_from(*n).unwrap().min(CHUNK)];
            let read = rustix::io::pread(fd, &mut bytes, *position)?;
            bytes.truncate(read);
            Ok(Said::Bytes(bytes))
        }
        Call::SetSize(size) => rustix::fs::ftruncate(fd, *size).map(nothing),
        Call::Close => Ok(Said::Nothing),
        Call::Stat => Real::stat(fd),
        Call::StatAt(flags, path) => Real::stat(&at.real.find(path, *flags)?),
        Call::SetTimesAt(flags, path, access, modification) => {
            let time = |seconds: u32| Timespec { tv_sec: i64::from(seconds) / 2, tv_nsec: 0 };
            let times = Timestamps { last_access: time(*access), last_modification: time(*modification) };
            let found = at.real.find(path, *flags)?;
            rustix::fs::utimensat(&found, "", &times, AtFlags::EMPTY_PATH)?;
            let stat = rustix::fs::fstat(&found)?;
            Ok(Said::Times(u64::try_from(stat.st_atime).unwrap(), u64::try_from(stat.st_mtime).unwrap()))
        }
        Call::CreateDirectory(path) => {
            let (parent, name) = at.real.parent(path)?;
            rustix::fs::mkdirat(&parent, name, Mode::from(0o777)).map(nothing)
        }
        Call::RemoveDirectory(path) => {
            let (parent, name) = at.real.parent(path)?;
            rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).map(nothing)
        }
        Call::Unlink(path) => {
            let (parent, name) = at.real.parent(path)?;
            rustix::fs::unlinkat(&parent, name, AtFlags::empty()).map(nothing)
        }
        Call::Rename(old, _, new) => {
            let (old_parent, old_name) = at.real.parent(old)?;
            let (new_parent, new_name) = other.real.parent(new)?;
            rustix::fs::renameat(&old_parent, old_name, &new_parent, new_name).map(nothing)
        }
        Call::Link(old, _, new) => at.real.link(old, &other.real, new).map(nothing),
        Call::Symlink(target, path) => {
            if target.starts_with('/') {
                return Err(Errno::XDEV);
            }
            let (parent, name) = at.real.parent(path)?;
            rustix::fs::symlinkat(target.as_str(), &parent, name).map(nothing)
        }
        Call::Readlink(path) => {
            let found = at.real.find(path, PathFlags::empty())?;
            if type_of(rustix::fs::fstat(&found)?.st_mode) != Type::SymbolicLink {
                return Err(Errno::INVAL);
            }
            rustix::fs::readlinkat(&found, "", Vec::new()).map(|target| Said::Text(target.into_string().unwrap()))
        }
        Call::Same(_) => {
            let [one, two] = [rustix::fs::fstat(fd)?, rustix::fs::fstat(&other.real.0)?];
            Ok(Said::Is((one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)))
        }
        Call::List => at.real.list().map(Said::Names),
    };
    said.map(|said| (said, None))
}

/// Whether the descriptors are of the kind that the call is for: what is refused for that reason alone, wasmtime-wasi
/// refuses before it asks the kernel.
fn fits(call: &Call, at: &Pair, other: &Pair) -> bool {
    match call {
        Call::Stat | Call::Close | Call::Same(_) => true,
        Call::Write(..) | Call::Append(..) | Call::Read(..) | Call::SetSize(_) => !at.is_directory,
        Call::Rename(..) | Call::Link(..) => at.is_directory && other.is_directory,
        _ => at.is_directory,
    }
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn it_is_what_a_real_directory_is(calls in proptest::collection::vec(call(), 0..80)) {
        let directory = tempfile::tempdir().unwrap();
        let real = rustix::fs::open(directory.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let reaper = Reaper::new(Arc::new(gaia_tmpfs::Unlimited), 0);
        let tmp = Tmp::new(Limits::of_quota(1 << 40), &reaper);
        let mut open = vec![Pair { ours: tmp.root(), real: Real(real), is_directory: true }];
        for (index, call) in &calls {
            let at = index.index(open.len());
            let other = match call {
                Call::Rename(_, other, _) | Call::Link(_, other, _) | Call::Same(other) => other.index(open.len()),
                _ => 0,
            };
            if !fits(call, &open[at], &open[other]) {
                continue;
            }
            if matches!(call, Call::Close) {
                if at > 0 {
                    open.swap_remove(at);
                }
                continue;
            }
            let got = ours(&open[at], &open[other], call);
            let expected = theirs(&open[at], &open[other], call).map_err(code_of);
            match (got, expected) {
                (Ok((said, ours)), Ok((expected, real))) => {
                    prop_assert_eq!(&said, &expected, "{:?}", call);
                    if let (Some(ours), Some(real)) = (ours, real) {
                        let is_directory = matches!(said, Said::Stat(Type::Directory, _));
                        open.push(Pair { ours, real, is_directory });
                    }
                }
                (Err(got), Err(expected)) => prop_assert_eq!(got, expected, "{:?}", call),
                (got, expected) => {
                    let (got, expected) = (got.map(|(said, _)| said), expected.map(|(said, _)| said));
                    prop_assert_eq!(got, expected, "{:?}", call);
                }
            }
        }
        prop_assert!(tmp.is_consistent());
        let mut expected = BTreeMap::new();
        open[0].real.contents("", &mut expected);
        prop_assert!(contents(&open[0].ours).unwrap() == expected, "the trees differ: {:?}", expected);
    }
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        exercise(&bytes);
    }
}
