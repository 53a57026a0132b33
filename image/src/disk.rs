//! The data disk: a file with an ext4 file system, which init finds by its label and mounts for control.
//!
//! Made by `mke2fs` of e2fsprogs on an ordinary file, which needs neither root nor a loop device. The file is sparse: of
//! 1 GiB less than one MiB is written. Same size, same bytes, unless a random one is asked for.
//!
//! ```text
//! the whole file is the file system, without a partition table
//! label gaia-data · journal · checksums on all metadata · 4 KiB blocks · nothing reserved for root · errors: read-only
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What init looks for (`init/src/pid1/data.rs`).
pub const LABEL: &str = "gaia-data";
/// Bytes of the smallest disk: a smaller one gets a journal of less than 4 MiB, or none.
pub const SMALLEST: u64 = 64 << 20;
/// Bytes of the largest: 2^32 blocks, from where on `mke2fs` wants other features.
pub const LARGEST: u64 = 16 << 40;

/// The identity of a disk that is not random, and the seed of its directories' hashes.
const FIXED_UUID: &str = "a19e4f6c-3d0b-4f0e-9c55-0d6b7e1a4b21";
const FIXED_HASH_SEED: &str = "4be2a7d3-7f6e-4d3c-8a10-5c9d2f8e6b74";
/// Seconds since 1970 at which such a disk says it was made: the start of 2026.
const FIXED_TIME: &str = "1767225600";

/// Features by name, because the host's `mke2fs.conf` decides otherwise. `resize_inode` lets the file system grow while it
/// is mounted. Left out is what e2fsck before 1.47 does not know.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Where `mke2fs` is for root, if it is not on the path of whoever calls.
const SUPERUSERS_PATH: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The size is no size, or not between [`SMALLEST`] and [`LARGEST`].
    #[error("`{text}` is {why}; write a size between 64MiB and 16TiB, as 1GiB")]
    Size {
        /// As it was written.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is a file of that name, and it may hold somebody's data.
    #[error("{} is there already, perhaps with data; remove it, or choose another name", .0.display())]
    Exists(PathBuf),
    /// The file could not be made.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// `mke2fs` is missing.
    #[error("cannot run mke2fs: {0}; it is in the package e2fsprogs, which image/setup.sh installs")]
    Missing(io::Error),
    /// `mke2fs` failed.
    #[error("mke2fs failed on {}: {said}", path.display())]
    Failed {
        /// The file it worked on.
        path: PathBuf,
        /// Its words.
        said: String,
    },
}

/// What a data disk is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Bytes; what is over a whole block of 4 KiB stays unused.
    pub size: u64,
    /// With an identity, a hash seed and a time of its own, for a device. Otherwise they are fixed.
    pub random: bool,
}

impl Disk {
    /// Makes it. The file appears under its name once it is whole; one that is there stays as it is.
    ///
    /// # Errors
    /// [`DiskError`]: a file of that name, no `mke2fs`, or one that fails.
    pub fn make(&self, path: &Path) -> Result<(), DiskError> {
        let failed = |what| move |source| DiskError::Io { what, path: path.to_owned(), source };
        // Asked before the work; below it is asked again, by the kernel.
        if path.symlink_metadata().is_ok() {
            return Err(DiskError::Exists(path.to_owned()));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
        let file = tempfile::Builder::new()
            .prefix(".gaia-image-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .tempfile_in(folder)
            .map_err(failed("make"))?;
        file.as_file().set_len(self.size).map_err(failed("set the size of"))?;
        self.format(file.path())?;
        file.persist_noclobber(path).map(drop).map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => DiskError::Exists(path.to_owned()),
            _ => failed("name")(e.error),
        })
    }

    /// Runs `mke2fs` on a file of zeros.
    fn format(&self, file: &Path) -> Result<(), DiskError> {
        let (uuid, seed) = if self.random { ("random", None) } else { (FIXED_UUID, Some(FIXED_HASH_SEED)) };
        // All blocks are zeros already, so none is written, here or by the kernel later.
        let seed = seed.map(|seed| format!(",hash_seed={seed}")).unwrap_or_default();
        let extended =
            format!("root_owner=0:0,nodiscard,assume_storage_prezeroed=1,lazy_itable_init=1,lazy_journal_init=1{seed}");
        let mut command = Command::new(program());
        command
            .args(["-q", "-F", "-L", LABEL, "-U", uuid, "-b", "4096", "-I", "256", "-m", "0", "-e", "remount-ro"])
            .args(["-O", FEATURES, "-E", &extended])
            .arg(file)
            // What the host prefers is nothing to a device.
            .env("MKE2FS_CONFIG", "/dev/null")
            .env_remove("MKE2FS_DEVICE_SECTSIZE")
            .env_remove("MKE2FS_DEVICE_PHYS_SECTSIZE")
            .env_remove("E2FSPROGS_FAKE_TIME")
            .env_remove("SOURCE_DATE_EPOCH");
        if !self.random {
            // The first until 1.47.0, the second since.
            command.env("E2FSPROGS_FAKE_TIME", FIXED_TIME).env("SOURCE_DATE_EPOCH", FIXED_TIME);
        }
        let output = command.output().map_err(DiskError::Missing)?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let said = if said.is_empty() { output.status.to_string() } else { said };
        Err(DiskError::Failed { path: file.to_owned(), said })
    }
}

fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(SUPERUSERS_PATH.map(PathBuf::from));
    let found = folders.map(|folder| folder.join("mke2fs")).find(|file| file.is_file());
    found.unwrap_or_else(|| "mke2fs".into())
}

/// Reads a disk's size: `1GiB`, `512 MiB`, or bytes.
///
/// # Errors
/// [`DiskError::Size`]
pub fn size(text: &str) -> Result<u64, DiskError> {
    let wrong = |why| DiskError::Size { text: text.to_owned(), why };
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.trim_ascii() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(wrong("no size in KiB, MiB, GiB or TiB")),
    };
    let number: u64 = number.parse().map_err(|_| wrong("no number with a unit"))?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if bytes < SMALLEST => Err(wrong("too small")),
        Some(bytes) if bytes <= LARGEST => Ok(bytes),
        _ => Err(wrong("too large")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt as _;

    const SMALL: Disk = Disk { size: SMALLEST, random: false };

    #[test]
    fn the_same_disk_is_the_same_bytes_and_a_random_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let made = |name: &str, disk: Disk| {
            let path = dir.path().join("made/here").join(name);
            disk.make(&path).unwrap();
            std::fs::read(path).unwrap()
        };
        let first = made("a", SMALL);
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert!(first == made("b", SMALL), "two disks of one size differ");
        assert!(first != made("c", Disk { random: true, ..SMALL }), "a random disk is the fixed one");
        assert_eq!(&first[1024 + 0x78..][..LABEL.len()], LABEL.as_bytes());
        let names: Vec<_> = std::fs::read_dir(dir.path().join("made/here")).unwrap().flatten().collect();
        assert_eq!(names.len(), 3, "nothing half made is left: {names:?}");
    }

    #[test]
    fn a_disk_is_sparse_sound_and_all_of_it_for_its_user() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.img");
        Disk { size: 1 << 30, random: false }.make(&path).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (1 << 30, 0o600));
        assert!(metadata.blocks() * 512 < 4 << 20, "{} KiB were written", metadata.blocks() / 2);
        let run = |program: &str, arguments: &[&str]| {
            let program = super::program().with_file_name(program);
            let output = Command::new(program).args(arguments).arg(&path).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            String::from_utf8(output.stdout).unwrap()
        };
        run("e2fsck", &["-fn"]);
        let shown = run("dumpe2fs", &["-h"]);
        for words in ["gaia-data", "has_journal", "metadata_csum", "Remount read-only"] {
            assert!(shown.contains(words), "no {words} in\n{shown}");
        }
        let reserved = shown.lines().find(|line| line.starts_with("Reserved block count:")).unwrap();
        assert!(reserved.ends_with(" 0"), "{reserved}");
    }

    #[test]
    fn a_file_that_is_there_is_never_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.img");
        std::fs::write(&path, "somebody's").unwrap();
        assert!(matches!(SMALL.make(&path), Err(DiskError::Exists(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
        std::fs::remove_file(&path).unwrap();
        // Nor is a link followed to where there is nothing yet.
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(SMALL.make(&path), Err(DiskError::Exists(_))));
    }

    #[test]
    fn sizes_have_units_and_bounds() {
        for (text, bytes) in [("64MiB", 64 << 20), ("1GiB", 1 << 30), ("2 TiB", 2 << 40), ("67108864", 64 << 20)] {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for text in
            ["", "GiB", "1G", "-1GiB", "1.5GiB", "63MiB", "17TiB", "99999999999999999999", "18446744073709551615TiB"]
        {
            let said = size(text).unwrap_err().to_string();
            assert!(said.starts_with(&format!("`{text}` is ")) && said.ends_with("as 1GiB"), "{said}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_within_bounds_or_none(text in "[ 0-9KMGTiB]{0,12}|.{0,12}") {
            if let Ok(bytes) = size(&text) {
                prop_assert!((SMALLEST..=LARGEST).contains(&bytes));
            }
        }
    }
}
