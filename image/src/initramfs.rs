//! What the kernel unpacks into its root file system before it starts `/init`.
//!
//! ```text
//! initrd = base  ++ zeros to a multiple of 4 ++ seed
//!          │                                    └ newc, not compressed: /seed/gaia.toml, /seed/graph.zgraph.toml, …
//!          └ zstd(newc): /init, /bin.erofs, mount points, two device nodes
//!                              └ mounted on /bin by init: gaia
//! ```
//!
//! What lies in the initramfs itself stays in memory for ever. So the programs but init are in a file system of their own
//! (see `docs/decisions/012-programs-lie-packed-in-memory.md`), which is compressed there, too.
//!
//! The order and the padding are the kernel's demand (`unpack_to_rootfs` in `init/initramfs.c`, Linux 6.12): an
//! uncompressed archive is recognised only at an offset that is a multiple of 4, zeros between archives are skipped,
//! and after a zstd frame it goes on exactly behind the frame. [`base`] is padded already, so `cat` joins them too.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::{self, Archive, CpioError, Entry, Kind, pad4};
use crate::elf;
use crate::erofs::{self, ErofsError};

/// The zstd level of [`base`]. Measured on a stripped Rust binary of 31 MiB, one thread: level 3 12.7 MiB in 0.1 s, 9 11.4 MiB
/// in 0.5 s, 12 11.3 MiB in 1.3 s, 19 10.1 MiB in 12 s. 9 is where the next megabyte starts to cost seconds per build.
pub const ZSTD_LEVEL: i32 = 9;
/// log2 of the window: `ZSTD_WINDOWSIZE_MAX` in `lib/decompress_unzstd.c`.
const ZSTD_WINDOW_LOG: u32 = 23;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The reader stops here: nothing that fits the appliance unpacks to more, a decompression bomb does.
const UNPACKED_MAX: u64 = 2 << 30;

/// The file system with the programs, which init mounts on `/bin`.
pub const PROGRAMS: &str = "bin.erofs";

/// Mount points; anything else is made by init once its file systems are there.
const DIRECTORIES: [(&str, u32); 8] = [
    ("bin", 0o755),
    ("data", 0o755),
    ("dev", 0o755),
    ("efi", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// Where the seed archive puts everything.
const SEED_DIR: &str = "seed";

/// Why an initramfs or a seed archive could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file could not be read, written, or run.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `make a temporary file for`, …
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A binary that would not start on the appliance.
    #[error(
        "{} {why}; the appliance runs only static x86-64 executables: \
         build it with `--target x86_64-unknown-linux-musl`",
        path.display()
    )]
    NotStatic {
        /// The file.
        path: PathBuf,
        /// The reason, from [`elf::static_x86_64`].
        why: &'static str,
    },
    /// `strip` is missing or failed.
    #[error("`strip --strip-all {}` failed: {why}; it is in the package binutils", path.display())]
    Strip {
        /// The file.
        path: PathBuf,
        /// Its message, or why it did not start.
        why: String,
    },
    /// A name in the seed that is more than a file name.
    #[error("the seed is flat: `{0}` is not a plain file name; give it one without slashes")]
    SeedName(String),
    /// Writing or reading the programs' file system failed.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// Writing or reading an archive failed.
    #[error(transparent)]
    Cpio(#[from] CpioError),
    /// An archive inside a concatenation could not be read.
    #[error("the archive at byte {offset} cannot be read: {source}")]
    Archive {
        /// Where it begins.
        offset: usize,
        /// What is wrong with it; its offsets count from its own beginning, after decompression.
        source: CpioError,
    },
    /// Compression or decompression failed.
    #[error("zstd failed at byte {offset}: {source}; is the file complete?")]
    Zstd {
        /// Where the frame begins.
        offset: usize,
        /// zstd's message.
        source: std::io::Error,
    },
    /// Bytes between archives that the kernel would stop at.
    #[error(
        "at byte {0} there is neither an archive nor padding; \
         an uncompressed archive must begin at a multiple of 4, a compressed one must be zstd"
    )]
    Junk(usize),
}

/// The base archive, compressed: `/init`, `/bin/gaia` and `extra` (path on the appliance, file here). What is in `/bin` is in
/// the file system [`PROGRAMS`].
///
/// Executables are checked and stripped; an extra file that is not ELF is taken as it is. The same input bytes give the
/// same output bytes. The length is a multiple of 4.
///
/// # Errors
/// [`InitramfsError`]: a file that cannot be read, a binary that is not static, a path that is taken.
pub fn base(init: &Path, gaia: &Path, extra: &[(String, PathBuf)]) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive::default();
    for (path, permissions) in DIRECTORIES {
        archive.directory(path, permissions)?;
    }
    // So that init can speak, and a child has a standard input, before devtmpfs is there.
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.char_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, binary(init)?)?;
    let mut programs = BTreeMap::from([("gaia".to_owned(), binary(gaia)?)]);
    for (path, from) in extra {
        let path = path.strip_prefix('/').unwrap_or(path);
        if let Some(name) = path.strip_prefix("bin/") {
            if programs.insert(name.to_owned(), binary(from)?).is_some() {
                return Err(CpioError::Duplicate(path.to_owned()).into());
            }
            continue;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            archive.directories(parent, 0o755)?;
        }
        let content = contents(from)?;
        if elf::is_elf(&content) {
            archive.file(path, 0o755, binary(from)?)?;
        } else {
            archive.file(path, 0o644, content)?;
        }
    }
    archive.file(PROGRAMS, 0o444, erofs::image(&programs)?)?;
    compressed(&archive.to_bytes()?)
}

/// Whatever can be opened on the appliance once init has mounted the programs: the archives' entries, and those of
/// [`PROGRAMS`] below `bin`.
///
/// # Errors
/// As [`list`], and [`InitramfsError::Erofs`].
pub fn list_mounted(bytes: &[u8]) -> Result<Vec<Entry>, InitramfsError> {
    let mut entries = list(bytes)?;
    let mut mounted = Vec::new();
    for entry in &entries {
        if let (PROGRAMS, Kind::File(image)) = (entry.path.as_str(), &entry.kind) {
            let below = |entry: Entry| Entry { path: format!("bin/{}", entry.path), ..entry };
            mounted.extend(erofs::read(image)?.into_iter().map(below));
        }
    }
    entries.extend(mounted);
    Ok(entries)
}

/// The seed archive, not compressed: every file at `/seed/<name>`, readable by all. The length is a multiple of 4.
///
/// ```
/// use gaia_image::initramfs::{list, seed_archive};
///
/// let seed = seed_archive([("gaia.toml", b"[network]\n".to_vec()), ("hello.wasm", vec![0])])?;
/// let paths: Vec<_> = list(&seed)?.into_iter().map(|entry| entry.path).collect();
/// assert_eq!(paths, ["seed", "seed/gaia.toml", "seed/hello.wasm"]);
/// # Ok::<(), gaia_image::initramfs::InitramfsError>(())
/// ```
///
/// # Errors
/// [`InitramfsError::SeedName`] for a name that would leave `/seed`, [`InitramfsError::Cpio`] for a name given twice.
pub fn seed_archive<N: AsRef<str>>(files: impl IntoIterator<Item = (N, Vec<u8>)>) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive::default();
    archive.directory(SEED_DIR, 0o755)?;
    for (name, content) in files {
        let name = name.as_ref();
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(InitramfsError::SeedName(name.to_owned()));
        }
        archive.file(&format!("{SEED_DIR}/{name}"), 0o644, content)?;
    }
    Ok(archive.to_bytes()?)
}

/// Base and seed as the one initrd that a boot loader or QEMU takes.
#[must_use]
pub fn initrd(base: &[u8], seed: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(base.len() + 3 + seed.len());
    out.extend_from_slice(base);
    pad4(&mut out);
    out.extend_from_slice(seed);
    out
}

/// The entries of all archives in `bytes`, in order, read by the kernel's rules.
///
/// # Errors
/// [`InitramfsError`] with the offset of what the kernel would not take.
pub fn list(bytes: &[u8]) -> Result<Vec<Entry>, InitramfsError> {
    let mut entries = Vec::new();
    let mut at = 0;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        if rest[0] == 0 {
            at += 1;
        } else if rest[0] == b'0' && at.is_multiple_of(4) {
            let (found, used) = cpio::read(rest).map_err(|source| InitramfsError::Archive { offset: at, source })?;
            entries.extend(found);
            at += used;
        } else if rest.starts_with(&ZSTD_MAGIC) {
            let mut unread = rest;
            let mut unpacked = Vec::new();
            zstd::stream::read::Decoder::with_buffer(&mut unread)
                .and_then(|decoder| decoder.single_frame().take(UNPACKED_MAX).read_to_end(&mut unpacked))
                .map_err(|source| InitramfsError::Zstd { offset: at, source })?;
            let (found, _) = cpio::read(&unpacked).map_err(|source| InitramfsError::Archive { offset: at, source })?;
            entries.extend(found);
            at = bytes.len() - unread.len();
        } else {
            return Err(InitramfsError::Junk(at));
        }
    }
    Ok(entries)
}

fn compressed(archive: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    let zstd_error = |source| InitramfsError::Zstd { offset: 0, source };
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL).map_err(zstd_error)?;
    encoder.window_log(ZSTD_WINDOW_LOG).map_err(zstd_error)?;
    encoder.include_checksum(true).map_err(zstd_error)?;
    encoder.set_pledged_src_size(Some(archive.len() as u64)).map_err(zstd_error)?;
    encoder.write_all(archive).map_err(zstd_error)?;
    let mut out = encoder.finish().map_err(zstd_error)?;
    pad4(&mut out);
    Ok(out)
}

fn contents(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    std::fs::read(path).map_err(|source| InitramfsError::Io { what: "read", path: path.to_owned(), source })
}

/// A static executable without its symbols.
fn binary(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    elf::static_x86_64(&contents(path)?).map_err(|why| InitramfsError::NotStatic { path: path.to_owned(), why })?;
    let stripped = tempfile::NamedTempFile::new().map_err(|source| InitramfsError::Io {
        what: "make a temporary file for",
        path: path.to_owned(),
        source,
    })?;
    let strip_error = |why| InitramfsError::Strip { path: path.to_owned(), why };
    let output = Command::new("strip")
        .arg("--strip-all")
        .arg("-o")
        .arg(stripped.path())
        .arg(path)
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| strip_error(error.to_string()))?;
    if !output.status.success() {
        return Err(strip_error(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    contents(stripped.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A binary of a few kilobytes.
    fn small(dir: &Path) -> PathBuf {
        let source = dir.join("small.s");
        let object = dir.join("small.o");
        let path = dir.join("small");
        std::fs::write(&source, ".globl _start\n_start: mov $60,%eax\n xor %edi,%edi\n syscall\n").unwrap();
        let run = |command: &mut Command| assert!(command.status().unwrap().success());
        run(Command::new("as").arg("-o").arg(&object).arg(&source));
        run(Command::new("ld").args(["-static", "-o"]).arg(&path).arg(&object));
        path
    }

    #[test]
    fn base_has_what_the_kernel_and_init_need() {
        let dir = tempfile::tempdir().unwrap();
        let small = small(dir.path());
        let text = dir.path().join("note");
        std::fs::write(&text, "hello").unwrap();
        let extra = [("/bin/gaia-debug".to_owned(), small.clone()), ("/etc/x/note".to_owned(), text)];
        let bytes = base(&small, &small, &extra).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let entries = list_mounted(&bytes).unwrap();
        let paths: Vec<_> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "bin",
                "bin.erofs",
                "data",
                "dev",
                "dev/console",
                "dev/null",
                "efi",
                "etc",
                "etc/x",
                "etc/x/note",
                "init",
                "proc",
                "run",
                "sys",
                "tmp",
                "bin/gaia",
                "bin/gaia-debug",
            ]
        );
        let find = |path: &str| entries.iter().find(|entry| entry.path == path).unwrap();
        assert_eq!(find("dev/console").kind, Kind::CharDevice { major: 5, minor: 1 });
        assert_eq!(find("dev/null").kind, Kind::CharDevice { major: 1, minor: 3 });
        assert_eq!(find("etc/x/note").kind, Kind::File(b"hello".to_vec()));
        assert_eq!(find("init").permissions, 0o755);
        for program in ["init", "bin/gaia", "bin/gaia-debug"] {
            let Kind::File(content) = &find(program).kind else { panic!("{program} is no file") };
            assert!(content.len() < std::fs::read(&small).unwrap().len(), "{program} is not stripped");
            assert_eq!(find(program).permissions, 0o755);
        }
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes_wherever_and_whenever() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let small_one = small(one.path());
        let small_two = two.path().join("other-name");
        std::fs::copy(&small_one, &small_two).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        std::fs::File::options().append(true).open(&small_two).unwrap().set_modified(long_ago).unwrap();
        let first = base(&small_one, &small_one, &[]).unwrap();
        // No other test here depends on the current directory.
        std::env::set_current_dir(two.path()).unwrap();
        let second = base(Path::new("other-name"), Path::new("./other-name"), &[]).unwrap();
        std::env::set_current_dir("/").unwrap();
        assert!(first == second);
    }

    #[test]
    fn what_would_not_start_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        let message = base(&script, &script, &[]).unwrap_err().to_string();
        assert!(message.contains("script is not an ELF file"), "{message}");
        let missing = dir.path().join("missing");
        let message = base(&missing, &missing, &[]).unwrap_err().to_string();
        assert!(message.starts_with("cannot read") && message.contains("missing"), "{message}");
    }

    #[test]
    fn an_extra_cannot_take_the_place_of_another_program() {
        let dir = tempfile::tempdir().unwrap();
        let small = small(dir.path());
        for taken in ["init", "bin/gaia", "bin.erofs"] {
            let error = base(&small, &small, &[(format!("/{taken}"), small.clone())]).unwrap_err();
            assert!(matches!(error, InitramfsError::Cpio(CpioError::Duplicate(path)) if path == taken));
        }
    }

    #[test]
    fn a_seed_stays_in_its_directory() {
        for name in ["../init", "a/b", "/init", "", ".", ".."] {
            let error = seed_archive([(name, vec![])]).unwrap_err();
            assert!(matches!(error, InitramfsError::SeedName(_)), "{name}: {error}");
        }
        let twice = seed_archive([("a", vec![]), ("a", vec![])]).unwrap_err();
        assert!(matches!(twice, InitramfsError::Cpio(CpioError::Duplicate(_))));
    }

    #[test]
    fn base_and_seed_are_listed_together() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, vec![1; 1001]).unwrap();
        let base = compressed(&archive.to_bytes().unwrap()).unwrap();
        let seed = seed_archive([("gaia.toml", b"x".to_vec())]).unwrap();
        let paths = |bytes: &[u8]| list(bytes).unwrap().into_iter().map(|entry| entry.path).collect::<Vec<_>>();
        assert_eq!(paths(&initrd(&base, &seed)), ["init", "seed", "seed/gaia.toml"]);
        assert_eq!(paths(&[base.clone(), seed.clone()].concat()), ["init", "seed", "seed/gaia.toml"]);
        assert_eq!(paths(&initrd(&seed, &base)), ["seed", "seed/gaia.toml", "init"]);
        // One byte off, and the kernel would say "junk": so does the reader.
        let shifted = [base.as_slice(), &[0], &seed].concat();
        assert!(matches!(list(&shifted), Err(InitramfsError::Junk(at)) if at == base.len() + 1));
        assert!(list(&base[..base.len() - 8]).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 4..300), zstd in any::<bool>()) {
            if zstd {
                bytes[..4].copy_from_slice(&ZSTD_MAGIC);
            }
            let _ = list(&bytes);
        }
    }
}
