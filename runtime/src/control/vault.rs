//! The store under control's one thread: what blocks on the disk is done on a thread of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use gaia_store::{ArtefactKey, Digest, Finding, Limits, Store};
use rustix::fs::MemfdFlags;

use super::artefact::{Artefact, Key};
use super::pull::Remembered;
use crate::channel::SEALED;
use crate::compile::{MAX_ARTEFACT, MAX_COMPONENT};
use crate::engine;

/// The record with what control vouches for machine code with.
const KEY: &str = "artefact-key";
/// What the store may grow to on the largest disk, in bytes.
const MOST: u64 = 16 << 30;
/// What the disk is asked to take at a time, in bytes.
const PIECE: usize = 1 << 20;
/// How long a component that nothing refers to yet is kept: whoever pushed it is about to deploy it.
const FRESH: Duration = Duration::from_mins(15);

/// The store, shared with the threads that wait for the disk.
#[derive(Clone)]
pub(super) struct Vault {
    store: Arc<Store>,
    /// Components that came a moment ago.
    fresh: Arc<std::sync::Mutex<BTreeMap<Digest, Instant>>>,
    /// What machine code for each reservation depends on, in a word: Wasmtime takes a while to say it.
    settings: Arc<std::sync::Mutex<BTreeMap<u64, String>>>,
    /// Where components came from.
    pub(super) remembered: Remembered,
}

impl Vault {
    /// Opens the store in this directory; also says what is wrong with it.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub(super) fn open(directory: &OwnedFd) -> Result<(Self, Vec<Finding>), gaia_store::Error> {
        let disk = rustix::fs::fstatfs(directory).map_or(MOST, |s| s.f_blocks.saturating_mul(s.f_bsize.unsigned_abs()));
        let bytes = disk.min(MOST);
        let limits =
            Limits { bytes, component_bytes: MAX_COMPONENT, artefact_bytes: MAX_ARTEFACT, ..Limits::default() };
        let (store, findings) = Store::open(directory, limits)?;
        let remembered = Remembered::of(&store);
        Ok((Self { store: Arc::new(store), fresh: Arc::default(), settings: Arc::default(), remembered }, findings))
    }

    /// The store, for what it knows without the disk.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Does something that waits for the disk.
    ///
    /// # Errors
    /// What it says, or that it panicked.
    pub(super) async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, gaia_store::Error> + Send + 'static,
    ) -> anyhow::Result<T> {
        let store = Arc::clone(&self.store);
        Ok(tokio::task::spawn_blocking(move || work(&store)).await.context("the store's thread ended")??)
    }

    /// Puts a component into the store that has this digest.
    ///
    /// # Errors
    /// The disk's, that it is full, or that it has another digest.
    pub(super) async fn put(&self, component: Bytes, digest: Digest) -> anyhow::Result<()> {
        let put = move |store: &Store| {
            let mut upload = store.upload()?;
            component.chunks(PIECE).try_for_each(|piece| upload.append(piece))?;
            upload.finish(Some(digest)).map(drop)
        };
        self.with(put).await
    }

    /// The key that machine code on the disk is vouched for with, made if there is none.
    ///
    /// # Errors
    /// If it can be neither read nor kept.
    pub(super) fn key(&self) -> anyhow::Result<[u8; Key::BYTES]> {
        if let Some(kept) = self.store.record(KEY)?
            && let Ok(bytes) = kept.try_into()
        {
            return Ok(bytes);
        }
        let bytes = Key::chance()?;
        self.store.set_record(KEY, &bytes)?;
        Ok(bytes)
    }

    /// Keeps a component that came a moment ago from being collected.
    pub(super) fn came(&self, digest: Digest) {
        let mut fresh = self.fresh.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        fresh.retain(|_, since| since.elapsed() < FRESH);
        fresh.insert(digest, Instant::now());
    }

    /// Removes what no name, no kept graph and nobody who pushes needs any more.
    ///
    /// # Errors
    /// The disk's.
    pub(super) async fn collect(&self) -> anyhow::Result<gaia_store::Collected> {
        let keep: BTreeSet<Digest> = {
            let mut fresh = self.fresh.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            fresh.retain(|_, since| since.elapsed() < FRESH);
            fresh.keys().copied().collect()
        };
        self.with(move |store| store.collect(&keep)).await
    }

    /// Machine code that was made before from this component for such a reservation, by this very engine and for this very
    /// processor. None if there is none, or none that this key vouches for.
    pub(super) async fn artefact(&self, key: &Key, digest: &str, reservation: u64) -> Option<Artefact> {
        let of = self.artefact_key(digest, reservation)?;
        let (told, file) = self
            .with(move |store| {
                let Ok(mut split) = Split::new() else { return Ok(None) };
                Ok(store.copy_artefact(&of, &mut split)?.and_then(|_| split.finish().ok()))
            })
            .await
            .ok()??;
        key.check_told(&told, file).ok().filter(|a| a.digest == digest && a.reservation == reservation)
    }

    /// Keeps machine code for the next time. That it cannot be kept costs time then, and nothing else.
    ///
    /// # Errors
    /// The disk's, or that it is full.
    pub(super) async fn keep_artefact(&self, artefact: &Artefact) -> anyhow::Result<()> {
        let of = self.artefact_key(&artefact.digest, artefact.reservation).context("no digest")?;
        let told = artefact.told()?;
        let length = u32::try_from(told.len()).context("its origin is too long")?;
        let code = ByPosition { file: File::from(artefact.file.try_clone()?), at: 0 };
        let head = io::Cursor::new([length.to_le_bytes().as_slice(), &told].concat());
        self.with(move |store| store.put_artefact(&of, head.chain(code))).await
    }

    /// The engine is named by what Wasmtime says machine code depends on: version, settings, processor.
    fn artefact_key(&self, digest: &str, reservation: u64) -> Option<ArtefactKey> {
        let component = format!("sha256:{digest}").parse().ok()?;
        let mut known = self.settings.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(settings) = known.get(&reservation) {
            return Some(ArtefactKey { component, settings: settings.clone() });
        }
        let engine = engine::for_compiler(reservation).ok()?;
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        let settings = format!("{:016x}-{}", hasher.finish(), reservation >> 20);
        known.insert(reservation, settings.clone());
        Some(ArtefactKey { component, settings })
    }
}

/// A file that others read, too, from its beginning.
struct ByPosition {
    file: File,
    at: u64,
}

impl io::Read for ByPosition {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let read = std::os::unix::fs::FileExt::read_at(&self.file, to, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Parts an artefact as it is kept into what is told of it and the code, which goes into memory.
struct Split {
    head: Vec<u8>,
    code: File,
}

impl Split {
    fn new() -> io::Result<Self> {
        let code = rustix::fs::memfd_create("artefact", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        Ok(Self { head: Vec::new(), code: code.into() })
    }

    /// Bytes of the head, with its length in front; none as long as the length is not there.
    fn length(&self) -> Option<usize> {
        let length = self.head.first_chunk().map(|length| u32::from_le_bytes(*length))?;
        usize::try_from(length).ok()?.checked_add(4)
    }

    fn finish(self) -> io::Result<(Vec<u8>, OwnedFd)> {
        let whole = self.length() == Some(self.head.len());
        let told = self.head.get(4..).filter(|_| whole).ok_or(io::ErrorKind::UnexpectedEof)?.to_vec();
        rustix::fs::fcntl_add_seals(&self.code, SEALED)?;
        Ok((told, self.code.into()))
    }
}

impl Write for Split {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wanted = self.length().unwrap_or(4).saturating_sub(self.head.len());
        if wanted == 0 {
            return self.code.write(bytes);
        }
        let taken = bytes.len().min(wanted);
        self.head.extend(bytes.get(..taken).unwrap_or_default());
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{read_whole, sealed};
    use crate::compile::Report;
    use proptest::prelude::*;

    fn vault() -> (tempfile::TempDir, Vault) {
        let folder = tempfile::tempdir().unwrap();
        let (vault, findings) = Vault::open(&File::open(folder.path()).unwrap().into()).unwrap();
        assert!(findings.is_empty());
        (folder, vault)
    }

    #[tokio::test]
    async fn machine_code_is_found_again_by_the_same_key_and_not_by_another() {
        let (folder, vault) = vault();
        let key = Key::from_bytes(&vault.key().unwrap());
        let report =
            Report { error: None, imports: Vec::new(), exports: vec!["a".into()], needs: None, unlinked: None };
        let digest = Digest::of(b"component").hex();
        let made = key.vouch(&digest, 1 << 20, report, sealed("artefact", &vec![7; 100_000]).unwrap()).unwrap();
        vault.keep_artefact(&made).await.unwrap();
        let found = vault.artefact(&key, &digest, 1 << 20).await.unwrap();
        assert_eq!((&found.digest, &found.report), (&made.digest, &made.report));
        assert_eq!(read_whole(found.file, 200_000).unwrap(), vec![7; 100_000]);
        assert!(vault.artefact(&key, &digest, 2 << 20).await.is_none(), "made for another reservation");
        assert!(vault.artefact(&Key::from_bytes(&[1; 32]), &digest, 1 << 20).await.is_none(), "another key");
        drop(vault);
        let (vault, _) = Vault::open(&File::open(folder.path()).unwrap().into()).unwrap();
        let again = Key::from_bytes(&vault.key().unwrap());
        assert!(vault.artefact(&again, &digest, 1 << 20).await.is_some(), "the key is kept");
    }

    proptest! {
        #[test]
        fn any_bytes_are_parted_where_they_say_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..60), told in 0..40_u32) {
            let mut split = Split::new().unwrap();
            let all = [told.to_le_bytes().as_slice(), &bytes].concat();
            for piece in all.chunks(7) {
                split.write_all(piece).unwrap();
            }
            match split.finish() {
                Ok((head, code)) => {
                    prop_assert_eq!(head.len(), told as usize);
                    let code = read_whole(code, 100).unwrap();
                    prop_assert_eq!([head, code].concat(), bytes);
                }
                Err(_) => prop_assert!((told as usize) > bytes.len()),
            }
        }
    }
}
