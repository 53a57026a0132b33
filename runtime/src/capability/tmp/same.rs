//! The same calls on a file system in memory and, through wasmtime-wasi's own host, on a real directory: the guest must not
//! be able to tell which it has, beside what `gaia_tmpfs` lists as deliberate.

use std::sync::Arc;

use gaia_tmpfs::{Limits, Reaper, Time, Tmp, Unlimited};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use wasmtime::component::{Resource, ResourceTable};
use wasmtime_wasi::filesystem::{WasiFilesystemCtxView, WasiFilesystemView as _};
use wasmtime_wasi::p2::FsError;
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use super::host::{Clock, TmpView};

type Handle = Resource<types::Descriptor>;

/// Either of the two.
trait Host: preopens::Host + types::Host + types::HostDescriptor + types::HostDirectoryEntryStream {}

impl<H: preopens::Host + types::Host + types::HostDescriptor + types::HostDirectoryEntryStream> Host for H {}

struct Memory {
    table: ResourceTable,
    tmp: Tmp,
    clock: Clock,
}

impl Memory {
    fn view(&mut self) -> TmpView<'_> {
        TmpView { table: &mut self.table, tmp: &self.tmp, clock: &self.clock }
    }
}

struct Disk {
    table: ResourceTable,
    wasi: WasiCtx,
}

impl WasiView for Disk {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl Disk {
    fn view(&mut self) -> WasiFilesystemCtxView<'_> {
        self.filesystem()
    }
}

#[derive(Debug, Clone)]
enum Step {
    Open { at: Index, path: &'static str, follow: bool, how: types::OpenFlags, what: types::DescriptorFlags },
    Close(Index),
    Write(Index, u64, usize, u8),
    Read(Index, u64, u64),
    SetSize(Index, u64),
    Stat(Index),
    StatAt(&'static str, bool),
    List(Index),
    CreateDirectory(&'static str),
    RemoveDirectory(&'static str),
    Unlink(&'static str),
    Rename(&'static str, &'static str),
    Link(&'static str, &'static str),
    Symlink(&'static str, &'static str),
    Readlink(&'static str),
    Same(Index, Index),
}

fn step() -> impl Strategy<Value = Step> {
    let path =
        || select(&["a", "b", "d", "d/a", "d/e", "d/e/a", "a/a", "l", "l/a", ".", "d/../a", "../a", "/a", ""][..]);
    let index = any::<Index>;
    let how = any::<[bool; 4]>().prop_map(|wanted| {
        use types::OpenFlags as F;
        let all = [F::CREATE, F::DIRECTORY, F::EXCLUSIVE, F::TRUNCATE];
        all.into_iter().zip(wanted).fold(F::empty(), |flags, (flag, wanted)| if wanted { flags | flag } else { flags })
    });
    let what = (0..3_usize).prop_map(|which| {
        use types::DescriptorFlags as F;
        [F::READ, F::WRITE, F::READ | F::WRITE][which]
    });
    let position = || prop_oneof![0..40_u64, 65_530..65_545_u64];
    prop_oneof![
        8 => (index(), path(), any::<bool>(), how, what)
            .prop_map(|(at, path, follow, how, what)| Step::Open { at, path, follow, how, what }),
        2 => index().prop_map(Step::Close),
        5 => (index(), position(), 0..100_usize, 1..=255_u8).prop_map(|(i, at, n, byte)| Step::Write(i, at, n, byte)),
        4 => (index(), position(), position()).prop_map(|(i, at, n)| Step::Read(i, at, n)),
        2 => (index(), position()).prop_map(|(i, size)| Step::SetSize(i, size)),
        2 => index().prop_map(Step::Stat),
        3 => (path(), any::<bool>()).prop_map(|(path, follow)| Step::StatAt(path, follow)),
        3 => index().prop_map(Step::List),
        4 => path().prop_map(Step::CreateDirectory),
        2 => path().prop_map(Step::RemoveDirectory),
        2 => path().prop_map(Step::Unlink),
        3 => (path(), path()).prop_map(|(old, new)| Step::Rename(old, new)),
        2 => (path(), path()).prop_map(|(old, new)| Step::Link(old, new)),
        2 => (path(), path()).prop_map(|(old, new)| Step::Symlink(old, new)),
        1 => path().prop_map(Step::Readlink),
        1 => (index(), index()).prop_map(|(one, other)| Step::Same(one, other)),
    ]
}

fn borrowed(handle: &Handle) -> Handle {
    Resource::new_borrow(handle.rep())
}

fn told<T>(outcome: Result<T, FsError>, show: impl FnOnce(T) -> String) -> String {
    match outcome {
        Ok(value) => show(value),
        Err(e) => e.downcast().map_or_else(|trap| format!("trap: {trap}"), |code| format!("{code:?}")),
    }
}

fn is_error(told: &str) -> bool {
    told.starts_with("ErrorCode")
}

/// What a guest may rely on: the size of a directory and times are the file system's own business.
fn shown(stat: types::DescriptorStat) -> String {
    match stat.type_ {
        types::DescriptorType::Directory => "directory".to_owned(),
        kind => format!("{kind:?}, {} bytes, {} links", stat.size, stat.link_count),
    }
}

fn flags(follow: bool) -> types::PathFlags {
    if follow { types::PathFlags::SYMLINK_FOLLOW } else { types::PathFlags::empty() }
}

/// Makes one call. The handles' first is the root; what it answers is text, so that two can be compared.
async fn made(host: &mut impl Host, handles: &mut Vec<Handle>, step: &Step) -> String {
    let path = |text: &str| text.to_owned();
    let root = borrowed(&handles[0]);
    let nothing = |()| "done".to_owned();
    match step {
        Step::Open { at, path, follow, how, what } => {
            let at = borrowed(at.get(handles));
            match host.open_at(at, flags(*follow), (*path).to_owned(), *how, *what).await {
                Ok(handle) => {
                    let kind = host.get_type(borrowed(&handle)).await;
                    handles.push(handle);
                    told(kind, |kind| format!("opened {kind:?}"))
                }
                Err(e) => told(Err::<(), _>(e), nothing),
            }
        }
        Step::Close(index) => {
            let at = index.index(handles.len());
            if at == 0 {
                return "the root stays".to_owned();
            }
            let closed = types::HostDescriptor::drop(host, handles.swap_remove(at));
            format!("closed: {}", closed.is_ok())
        }
        Step::Write(index, at, length, byte) => {
            let written = host.write(borrowed(index.get(handles)), vec![*byte; *length], *at).await;
            told(written, |n| format!("wrote {n}"))
        }
        Step::Read(index, at, length) => {
            let read = host.read(borrowed(index.get(handles)), *length, *at).await;
            told(read, |(bytes, end)| format!("read {bytes:?}, end {end}"))
        }
        Step::SetSize(index, size) => told(host.set_size(borrowed(index.get(handles)), *size).await, nothing),
        Step::Stat(index) => told(host.stat(borrowed(index.get(handles))).await, shown),
        Step::StatAt(name, follow) => told(host.stat_at(root, flags(*follow), path(name)).await, shown),
        Step::List(index) => match host.read_directory(borrowed(index.get(handles))).await {
            Err(e) => told(Err::<(), _>(e), nothing),
            Ok(listing) => {
                let mut names = Vec::new();
                while let Ok(Some(entry)) = host.read_directory_entry(Resource::new_borrow(listing.rep())).await {
                    names.push(format!("{} {:?}", entry.name, entry.type_));
                }
                names.sort();
                let dropped = types::HostDirectoryEntryStream::drop(host, listing);
                format!("{names:?}, {}", dropped.is_ok())
            }
        },
        Step::CreateDirectory(name) => told(host.create_directory_at(root, path(name)).await, nothing),
        Step::RemoveDirectory(name) => told(host.remove_directory_at(root, path(name)).await, nothing),
        Step::Unlink(name) => told(host.unlink_file_at(root, path(name)).await, nothing),
        Step::Rename(old, new) => {
            let to = borrowed(&root);
            told(host.rename_at(root, path(old), to, path(new)).await, nothing)
        }
        Step::Link(old, new) => {
            let to = borrowed(&root);
            told(host.link_at(root, types::PathFlags::empty(), path(old), to, path(new)).await, nothing)
        }
        Step::Symlink(old, new) => told(host.symlink_at(root, path(old), path(new)).await, nothing),
        Step::Readlink(name) => told(host.readlink_at(root, path(name)).await, |target| target),
        Step::Same(one, other) => {
            let same = host.is_same_object(borrowed(one.get(handles)), borrowed(other.get(handles))).await;
            format!("same: {}", same.unwrap_or(false))
        }
    }
}

/// Both start with one directory.
fn root(host: &mut impl Host) -> Vec<Handle> {
    vec![host.get_directories().unwrap().remove(0).0]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]
    #[test]
    fn a_guest_cannot_tell_it_from_a_real_directory(steps in proptest::collection::vec(step(), 1..60)) {
        let folder = tempfile::tempdir().unwrap();
        let mut wasi = WasiCtxBuilder::new();
        wasi.allow_blocking_current_thread(true).preopened_dir(folder.path(), "/tmp", FsPerms::ReadWrite).unwrap();
        let mut disk = Disk { table: ResourceTable::new(), wasi: wasi.build() };
        let mut memory = Memory {
            table: ResourceTable::new(),
            tmp: Tmp::new(Limits::of_quota(1 << 30), &Reaper::new(Arc::new(Unlimited), 0)),
            clock: Arc::new(Time::default),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut ours, mut theirs) = (root(&mut memory.view()), root(&mut disk.view()));
            for (number, step) in steps.iter().enumerate() {
                let here = made(&mut memory.view(), &mut ours, step).await;
                let there = made(&mut disk.view(), &mut theirs, step).await;
                if matches!(step, Step::Link(..)) && is_error(&here) && is_error(&there) {
                    // Where both paths are wrong, either may be told first.
                    continue;
                }
                prop_assert_eq!(&here, &there, "step {}: {:?}, in memory and on disk, of {:#?}", number, step, &steps[..number]);
            }
            Ok(())
        })?;
    }
}
