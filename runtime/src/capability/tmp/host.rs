//! `wasi:filesystem` over the file system in memory: the interface's words in, its words out, nothing decided here.
//!
//! The traits are those of wasmtime-wasi's own bindings, whose resources are fixed to its own Rust types. Those are only
//! what the linker tells handles apart by: a [`Resource`] is a number, and what the table holds under it is looked up by
//! type. So the table holds our types, the handles carry the bindings' names, and [`ours`] and [`theirs`] are the two
//! ways between. A handle that meant something else would be an error of the table, which traps.

use std::sync::Arc;

use bytes::Bytes;
use gaia_tmpfs::{Descriptor, DirectoryEntryStream, ErrorCode, READ_MAX, Time, Tmp};
use wasmtime::component::{HasData, Resource, ResourceTable};
use wasmtime_wasi::p2::bindings::clocks::wall_clock::Datetime;
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};
use wasmtime_wasi::p2::{
    DynInputStream, DynOutputStream, FsError, FsResult, InputStream, OutputStream, Pollable, StreamError, StreamResult,
};

/// Where the guest finds it.
pub(super) const MOUNT: &str = "/tmp";

/// The time as the guest may know it; always the same if it may not.
pub type Clock = Arc<dyn Fn() -> Time + Send + Sync>;

/// Marks the `wasi:filesystem` interfaces.
pub(super) struct TmpInterfaces;

impl HasData for TmpInterfaces {
    type Data<'a> = TmpView<'a>;
}

/// What the interfaces need of an instance.
pub struct TmpView<'a> {
    /// Its resources.
    pub table: &'a mut ResourceTable,
    /// Its file system.
    pub tmp: &'a Tmp,
    /// Its clock.
    pub clock: &'a Clock,
}

/// The handle as the table knows it. It stays the caller's, so that only [`ResourceTable::delete`] ends it.
fn ours<Theirs: 'static, Ours: 'static>(handle: &Resource<Theirs>) -> Resource<Ours> {
    if handle.owned() { Resource::new_own(handle.rep()) } else { Resource::new_borrow(handle.rep()) }
}

/// The handle as the bindings know it.
fn theirs<Ours: 'static, Theirs: 'static>(handle: &Resource<Ours>) -> Resource<Theirs> {
    Resource::new_own(handle.rep())
}

fn code_of(error: ErrorCode) -> types::ErrorCode {
    match error {
        ErrorCode::BadDescriptor => types::ErrorCode::BadDescriptor,
        ErrorCode::Busy => types::ErrorCode::Busy,
        ErrorCode::CrossDevice => types::ErrorCode::CrossDevice,
        ErrorCode::Exist => types::ErrorCode::Exist,
        ErrorCode::FileTooLarge => types::ErrorCode::FileTooLarge,
        ErrorCode::InsufficientSpace => types::ErrorCode::InsufficientSpace,
        ErrorCode::Invalid => types::ErrorCode::Invalid,
        ErrorCode::IsDirectory => types::ErrorCode::IsDirectory,
        ErrorCode::Loop => types::ErrorCode::Loop,
        ErrorCode::NameTooLong => types::ErrorCode::NameTooLong,
        ErrorCode::NoEntry => types::ErrorCode::NoEntry,
        ErrorCode::NotDirectory => types::ErrorCode::NotDirectory,
        ErrorCode::NotEmpty => types::ErrorCode::NotEmpty,
        ErrorCode::NotPermitted => types::ErrorCode::NotPermitted,
        ErrorCode::Overflow => types::ErrorCode::Overflow,
    }
}

fn refused(error: ErrorCode) -> FsError {
    code_of(error).into()
}

fn type_of(kind: gaia_tmpfs::Type) -> types::DescriptorType {
    match kind {
        gaia_tmpfs::Type::Directory => types::DescriptorType::Directory,
        gaia_tmpfs::Type::SymbolicLink => types::DescriptorType::SymbolicLink,
        gaia_tmpfs::Type::RegularFile => types::DescriptorType::RegularFile,
    }
}

fn stat_of(stat: gaia_tmpfs::DescriptorStat) -> types::DescriptorStat {
    let datetime = |time: Time| Some(Datetime { seconds: time.seconds, nanoseconds: time.nanoseconds });
    types::DescriptorStat {
        type_: type_of(stat.kind),
        link_count: stat.link_count,
        size: stat.size,
        data_access_timestamp: datetime(stat.access),
        data_modification_timestamp: datetime(stat.modification),
        status_change_timestamp: datetime(stat.change),
    }
}

fn hash_of(hash: gaia_tmpfs::MetadataHash) -> types::MetadataHashValue {
    types::MetadataHashValue { lower: hash.lower, upper: hash.upper }
}

fn timestamp(time: types::NewTimestamp) -> gaia_tmpfs::NewTimestamp {
    match time {
        types::NewTimestamp::NoChange => gaia_tmpfs::NewTimestamp::NoChange,
        types::NewTimestamp::Now => gaia_tmpfs::NewTimestamp::Now,
        types::NewTimestamp::Timestamp(Datetime { seconds, nanoseconds }) => {
            gaia_tmpfs::NewTimestamp::Timestamp(Time { seconds, nanoseconds })
        }
    }
}

fn path_flags(flags: types::PathFlags) -> gaia_tmpfs::PathFlags {
    let mut kept = gaia_tmpfs::PathFlags::empty();
    kept.set(gaia_tmpfs::PathFlags::SYMLINK_FOLLOW, flags.contains(types::PathFlags::SYMLINK_FOLLOW));
    kept
}

fn open_flags(flags: types::OpenFlags) -> gaia_tmpfs::OpenFlags {
    type Ours = gaia_tmpfs::OpenFlags;
    type Theirs = types::OpenFlags;
    let all = [
        (Theirs::CREATE, Ours::CREATE),
        (Theirs::DIRECTORY, Ours::DIRECTORY),
        (Theirs::EXCLUSIVE, Ours::EXCLUSIVE),
        (Theirs::TRUNCATE, Ours::TRUNCATE),
    ];
    all.into_iter().filter(|(theirs, _)| flags.contains(*theirs)).map(|(_, ours)| ours).collect()
}

/// Each flag of a descriptor, here and there.
const DESCRIPTOR_FLAGS: [(types::DescriptorFlags, gaia_tmpfs::DescriptorFlags); 6] = {
    type Ours = gaia_tmpfs::DescriptorFlags;
    type Theirs = types::DescriptorFlags;
    [
        (Theirs::READ, Ours::READ),
        (Theirs::WRITE, Ours::WRITE),
        (Theirs::FILE_INTEGRITY_SYNC, Ours::FILE_INTEGRITY_SYNC),
        (Theirs::DATA_INTEGRITY_SYNC, Ours::DATA_INTEGRITY_SYNC),
        (Theirs::REQUESTED_WRITE_SYNC, Ours::REQUESTED_WRITE_SYNC),
        (Theirs::MUTATE_DIRECTORY, Ours::MUTATE_DIRECTORY),
    ]
};

impl TmpView<'_> {
    fn at(&self, handle: &Resource<types::Descriptor>) -> FsResult<&Descriptor> {
        Ok(self.table.get(&ours::<_, Descriptor>(handle))?)
    }

    fn now(&self) -> Time {
        (self.clock)()
    }

    fn add(&mut self, descriptor: Descriptor) -> FsResult<Resource<types::Descriptor>> {
        Ok(theirs(&self.table.push(descriptor)?))
    }

    fn writer(
        &mut self,
        handle: &Resource<types::Descriptor>,
        position: Option<u64>,
    ) -> FsResult<Resource<DynOutputStream>> {
        let file = self.at(handle)?.clone();
        file.check_writable().map_err(refused)?;
        let writer: DynOutputStream = Box::new(Writer { file: Some(file), position, clock: Arc::clone(self.clock) });
        Ok(self.table.push(writer)?)
    }
}

impl preopens::Host for TmpView<'_> {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Resource<types::Descriptor>, String)>> {
        let root = self.table.push(self.tmp.root())?;
        Ok(vec![(theirs(&root), MOUNT.to_owned())])
    }
}

impl types::Host for TmpView<'_> {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<types::ErrorCode> {
        error.downcast()
    }

    fn filesystem_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<types::ErrorCode>> {
        Ok(self.table.get(&error)?.downcast_ref::<ErrorCode>().map(|error| code_of(*error)))
    }
}

impl types::HostDescriptor for TmpView<'_> {
    fn read_via_stream(&mut self, at: Resource<types::Descriptor>, offset: u64) -> FsResult<Resource<DynInputStream>> {
        let file = self.at(&at)?.clone();
        file.check_readable().map_err(refused)?;
        let reader: DynInputStream = Box::new(Reader { file: Some(file), position: offset });
        Ok(self.table.push(reader)?)
    }

    fn write_via_stream(
        &mut self,
        at: Resource<types::Descriptor>,
        offset: u64,
    ) -> FsResult<Resource<DynOutputStream>> {
        self.writer(&at, Some(offset))
    }

    fn append_via_stream(&mut self, at: Resource<types::Descriptor>) -> FsResult<Resource<DynOutputStream>> {
        self.writer(&at, None)
    }

    async fn advise(&mut self, at: Resource<types::Descriptor>, _: u64, _: u64, _: types::Advice) -> FsResult<()> {
        self.at(&at)?.advise().map_err(refused)
    }

    async fn sync_data(&mut self, at: Resource<types::Descriptor>) -> FsResult<()> {
        self.at(&at)?.sync_data().map_err(refused)
    }

    async fn get_flags(&mut self, at: Resource<types::Descriptor>) -> FsResult<types::DescriptorFlags> {
        let flags = self.at(&at)?.get_flags().map_err(refused)?;
        let kept = DESCRIPTOR_FLAGS.into_iter().filter(|(_, ours)| flags.contains(*ours));
        Ok(kept.fold(types::DescriptorFlags::empty(), |all, (theirs, _)| all | theirs))
    }

    async fn get_type(&mut self, at: Resource<types::Descriptor>) -> FsResult<types::DescriptorType> {
        self.at(&at)?.get_type().map(type_of).map_err(refused)
    }

    async fn set_size(&mut self, at: Resource<types::Descriptor>, size: u64) -> FsResult<()> {
        self.at(&at)?.set_size(size, self.now()).map_err(refused)
    }

    async fn set_times(
        &mut self,
        at: Resource<types::Descriptor>,
        access: types::NewTimestamp,
        modification: types::NewTimestamp,
    ) -> FsResult<()> {
        self.at(&at)?.set_times(timestamp(access), timestamp(modification), self.now()).map_err(refused)
    }

    async fn read(&mut self, at: Resource<types::Descriptor>, length: u64, offset: u64) -> FsResult<(Vec<u8>, bool)> {
        self.at(&at)?.read(length, offset).map_err(refused)
    }

    async fn write(&mut self, at: Resource<types::Descriptor>, bytes: Vec<u8>, offset: u64) -> FsResult<u64> {
        self.at(&at)?.write(&bytes, offset, self.now()).map_err(refused)
    }

    async fn read_directory(
        &mut self,
        at: Resource<types::Descriptor>,
    ) -> FsResult<Resource<types::DirectoryEntryStream>> {
        let listing = self.at(&at)?.read_directory().map_err(refused)?;
        Ok(theirs(&self.table.push(listing)?))
    }

    async fn sync(&mut self, at: Resource<types::Descriptor>) -> FsResult<()> {
        self.at(&at)?.sync().map_err(refused)
    }

    async fn create_directory_at(&mut self, at: Resource<types::Descriptor>, path: String) -> FsResult<()> {
        self.at(&at)?.create_directory_at(&path, self.now()).map_err(refused)
    }

    async fn stat(&mut self, at: Resource<types::Descriptor>) -> FsResult<types::DescriptorStat> {
        self.at(&at)?.stat().map(stat_of).map_err(refused)
    }

    async fn stat_at(
        &mut self,
        at: Resource<types::Descriptor>,
        flags: types::PathFlags,
        path: String,
    ) -> FsResult<types::DescriptorStat> {
        self.at(&at)?.stat_at(path_flags(flags), &path).map(stat_of).map_err(refused)
    }

    async fn set_times_at(
        &mut self,
        at: Resource<types::Descriptor>,
        flags: types::PathFlags,
        path: String,
        access: types::NewTimestamp,
        modification: types::NewTimestamp,
    ) -> FsResult<()> {
        let (access, modification) = (timestamp(access), timestamp(modification));
        self.at(&at)?.set_times_at(path_flags(flags), &path, access, modification, self.now()).map_err(refused)
    }

    async fn link_at(
        &mut self,
        at: Resource<types::Descriptor>,
        old_flags: types::PathFlags,
        old_path: String,
        other: Resource<types::Descriptor>,
        new_path: String,
    ) -> FsResult<()> {
        let new = self.at(&other)?;
        self.at(&at)?.link_at(path_flags(old_flags), &old_path, new, &new_path, self.now()).map_err(refused)
    }

    async fn open_at(
        &mut self,
        at: Resource<types::Descriptor>,
        how: types::PathFlags,
        path: String,
        open: types::OpenFlags,
        flags: types::DescriptorFlags,
    ) -> FsResult<Resource<types::Descriptor>> {
        let kept = DESCRIPTOR_FLAGS.into_iter().filter(|(theirs, _)| flags.contains(*theirs));
        let flags = kept.map(|(_, ours)| ours).collect();
        let opened = self.at(&at)?.open_at(path_flags(how), &path, open_flags(open), flags, self.now());
        self.add(opened.map_err(refused)?)
    }

    async fn readlink_at(&mut self, at: Resource<types::Descriptor>, path: String) -> FsResult<String> {
        self.at(&at)?.readlink_at(&path).map_err(refused)
    }

    async fn remove_directory_at(&mut self, at: Resource<types::Descriptor>, path: String) -> FsResult<()> {
        self.at(&at)?.remove_directory_at(&path, self.now()).map_err(refused)
    }

    async fn rename_at(
        &mut self,
        at: Resource<types::Descriptor>,
        old_path: String,
        other: Resource<types::Descriptor>,
        new_path: String,
    ) -> FsResult<()> {
        self.at(&at)?.rename_at(&old_path, self.at(&other)?, &new_path, self.now()).map_err(refused)
    }

    async fn symlink_at(
        &mut self,
        at: Resource<types::Descriptor>,
        old_path: String,
        new_path: String,
    ) -> FsResult<()> {
        self.at(&at)?.symlink_at(&old_path, &new_path, self.now()).map_err(refused)
    }

    async fn unlink_file_at(&mut self, at: Resource<types::Descriptor>, path: String) -> FsResult<()> {
        self.at(&at)?.unlink_file_at(&path, self.now()).map_err(refused)
    }

    async fn is_same_object(
        &mut self,
        at: Resource<types::Descriptor>,
        other: Resource<types::Descriptor>,
    ) -> wasmtime::Result<bool> {
        let [one, two] = [self.table.get(&ours::<_, Descriptor>(&at))?, self.table.get(&ours(&other))?];
        Ok(one.is_same_object(two))
    }

    async fn metadata_hash(&mut self, at: Resource<types::Descriptor>) -> FsResult<types::MetadataHashValue> {
        self.at(&at)?.metadata_hash().map(hash_of).map_err(refused)
    }

    async fn metadata_hash_at(
        &mut self,
        at: Resource<types::Descriptor>,
        flags: types::PathFlags,
        path: String,
    ) -> FsResult<types::MetadataHashValue> {
        self.at(&at)?.metadata_hash_at(path_flags(flags), &path).map(hash_of).map_err(refused)
    }

    fn drop(&mut self, at: Resource<types::Descriptor>) -> wasmtime::Result<()> {
        self.table.delete(ours::<_, Descriptor>(&at))?;
        Ok(())
    }
}

impl types::HostDirectoryEntryStream for TmpView<'_> {
    async fn read_directory_entry(
        &mut self,
        listing: Resource<types::DirectoryEntryStream>,
    ) -> FsResult<Option<types::DirectoryEntry>> {
        let entry = self.table.get_mut(&ours::<_, DirectoryEntryStream>(&listing))?.read_directory_entry();
        let entry = entry.map_err(refused)?;
        Ok(entry.map(|entry| types::DirectoryEntry { type_: type_of(entry.kind), name: entry.name }))
    }

    fn drop(&mut self, listing: Resource<types::DirectoryEntryStream>) -> wasmtime::Result<()> {
        self.table.delete(ours::<_, DirectoryEntryStream>(&listing))?;
        Ok(())
    }
}

/// A file read from a position on; without a file at its end, or once it failed.
struct Reader {
    file: Option<Descriptor>,
    position: u64,
}

#[wasmtime_wasi::async_trait]
impl Pollable for Reader {
    async fn ready(&mut self) {}
}

impl InputStream for Reader {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        let file = self.file.as_ref().ok_or(StreamError::Closed)?;
        match file.read(size as u64, self.position) {
            Ok((_, true)) if size > 0 => {
                self.file = None;
                Err(StreamError::Closed)
            }
            Ok((bytes, _)) => {
                self.position += bytes.len() as u64;
                Ok(bytes.into())
            }
            Err(error) => {
                self.file = None;
                Err(StreamError::LastOperationFailed(error.into()))
            }
        }
    }
}

/// A file written from a position on, or at its end; without a file once it failed.
struct Writer {
    file: Option<Descriptor>,
    position: Option<u64>,
    clock: Clock,
}

#[wasmtime_wasi::async_trait]
impl Pollable for Writer {
    async fn ready(&mut self) {}
}

impl OutputStream for Writer {
    /// Done when it returns: nothing is buffered, so nothing can fail later.
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        let file = self.file.as_ref().ok_or(StreamError::Closed)?;
        let now = (self.clock)();
        let written = match &mut self.position {
            Some(position) => file.write(&bytes, *position, now).map(|n| *position += n),
            None => file.append(&bytes, now),
        };
        written.map_err(|error| {
            self.file = None;
            StreamError::LastOperationFailed(error.into())
        })
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.check_write().map(drop)
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        if self.file.is_some() { Ok(READ_MAX) } else { Err(StreamError::Closed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaia_tmpfs::{Limits, Reaper, Unlimited};
    use types::{Host as _, HostDescriptor as _, HostDirectoryEntryStream as _};

    struct Instance {
        table: ResourceTable,
        tmp: Tmp,
        clock: Clock,
    }

    impl Instance {
        fn new(quota: u64) -> Self {
            let tmp = Tmp::new(Limits::of_quota(quota), &Reaper::new(Arc::new(Unlimited), 0));
            let clock: Clock = Arc::new(|| Time { seconds: 7, nanoseconds: 0 });
            Self { table: ResourceTable::new(), tmp, clock }
        }

        fn view(&mut self) -> TmpView<'_> {
            TmpView { table: &mut self.table, tmp: &self.tmp, clock: &self.clock }
        }
    }

    fn borrowed(handle: &Resource<types::Descriptor>) -> Resource<types::Descriptor> {
        Resource::new_borrow(handle.rep())
    }

    fn code(error: FsError) -> types::ErrorCode {
        error.downcast().unwrap()
    }

    async fn created(view: &mut TmpView<'_>, root: &Resource<types::Descriptor>) -> Resource<types::Descriptor> {
        let flags = types::DescriptorFlags::READ | types::DescriptorFlags::WRITE;
        let how = types::PathFlags::empty();
        view.open_at(borrowed(root), how, "a".to_owned(), types::OpenFlags::CREATE, flags).await.unwrap()
    }

    #[tokio::test]
    async fn handles_of_the_bindings_reach_what_the_table_holds() {
        use preopens::Host as _;
        let mut instance = Instance::new(10);
        let mut view = instance.view();
        let (root, path) = view.get_directories().unwrap().remove(0);
        assert_eq!(path, "/tmp");
        let file = created(&mut view, &root).await;
        assert_eq!(view.write(borrowed(&file), b"hello".to_vec(), 0).await.unwrap(), 5);
        assert_eq!(view.read(borrowed(&file), 9, 1).await.unwrap(), (b"ello".to_vec(), false));
        let stat = view.stat(borrowed(&file)).await.unwrap();
        assert_eq!((stat.size, stat.data_modification_timestamp.unwrap().seconds), (5, 7));
        let flags = view.get_flags(borrowed(&file)).await.unwrap();
        assert_eq!(flags, types::DescriptorFlags::READ | types::DescriptorFlags::WRITE);
        let full = view.write(borrowed(&file), vec![0; 6], 5).await.unwrap_err();
        assert_eq!(code(full), types::ErrorCode::InsufficientSpace);
        assert!(view.is_same_object(borrowed(&file), borrowed(&file)).await.unwrap());
        let listing = view.read_directory(borrowed(&root)).await.unwrap();
        let next = |listing: &Resource<types::DirectoryEntryStream>| Resource::new_borrow(listing.rep());
        assert_eq!(view.read_directory_entry(next(&listing)).await.unwrap().unwrap().name, "a");
        assert!(view.read_directory_entry(next(&listing)).await.unwrap().is_none());
        types::HostDirectoryEntryStream::drop(&mut view, listing).unwrap();
        types::HostDescriptor::drop(&mut view, file).unwrap();
        types::HostDescriptor::drop(&mut view, root).unwrap();
        assert!(instance.table.is_empty());
    }

    #[tokio::test]
    async fn a_handle_of_something_else_traps() {
        let mut instance = Instance::new(10);
        let other = instance.table.push("something else").unwrap();
        let mut view = instance.view();
        let error = view.stat(Resource::new_borrow(other.rep())).await.unwrap_err();
        assert!(error.downcast().is_err(), "no code: it traps");
    }

    #[tokio::test]
    async fn streams_read_write_and_say_why_they_fail() {
        use preopens::Host as _;
        let mut instance = Instance::new(10);
        let mut view = instance.view();
        let (root, _) = view.get_directories().unwrap().remove(0);
        let file = created(&mut view, &root).await;
        let writer = view.write_via_stream(borrowed(&file), 2).unwrap();
        let appender = view.append_via_stream(borrowed(&file)).unwrap();
        let reader = view.read_via_stream(borrowed(&file), 1).unwrap();
        let write = |view: &mut TmpView<'_>, stream: &Resource<DynOutputStream>, bytes: &'static [u8]| {
            view.table.get_mut(stream).unwrap().write(Bytes::from_static(bytes))
        };
        write(&mut view, &writer, b"ab").unwrap();
        write(&mut view, &writer, b"cd").unwrap();
        write(&mut view, &appender, b"ef").unwrap();
        types::HostDescriptor::drop(&mut view, file).unwrap();
        let input = view.table.get_mut(&reader).unwrap();
        assert_eq!(input.read(0).unwrap(), "");
        assert_eq!(input.read(3).unwrap(), "\0ab");
        assert_eq!(input.blocking_read(99).await.unwrap(), "cdef");
        assert!(matches!(input.read(9), Err(StreamError::Closed)));
        let Err(StreamError::LastOperationFailed(error)) = write(&mut view, &appender, b"more") else {
            panic!("the quota was passed");
        };
        assert!(matches!(write(&mut view, &appender, b"x"), Err(StreamError::Closed)));
        let error = view.table.push(error).unwrap();
        assert_eq!(view.filesystem_error_code(error).unwrap(), Some(types::ErrorCode::InsufficientSpace));
        let refused = view.read_via_stream(borrowed(&root), 0).unwrap_err();
        assert_eq!(code(refused), types::ErrorCode::IsDirectory);
        let refused = view.write_via_stream(borrowed(&root), 0).unwrap_err();
        assert_eq!(code(refused), types::ErrorCode::BadDescriptor);
    }
}
