//! The file system that holds the programs: EROFS, which only reads and whose files are compressed piece by piece.
//!
//! Made by `mkfs.erofs` and read back by `fsck.erofs`, both of Debian's erofs-utils: a format that the kernel parses is
//! written by those who wrote its parser. What they are given decides every byte: no time, no owner, a fixed identity, and
//! directories in the order of their names.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::{Entry, Kind};

/// LZ4 in its slow, thorough form, at this level. Measured on the program of 16.6 MiB, one thread, pieces of 64 KiB: level
/// 9 7.8 MiB in 0.8 s, 12 7.8 MiB in 2.9 s, the quick form 9.3 MiB in 0.1 s.
const COMPRESSOR: &str = "-zlz4hc,9";
/// What is unpacked at a time has at most this many bytes packed. Level 9, same program: 4 KiB 9.3 MiB, 16 KiB 8.4 MiB,
/// 64 KiB 7.8 MiB, 128 KiB 7.7 MiB; the kernel sets as much aside for each processor.
const PIECE: &str = "-C65536";
/// File systems can be told apart by this number; there is one.
const IDENTITY: &str = "-U00000000-0000-0000-0000-000000000000";

/// Why a file system could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// A file could not be read or written on the way.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A tool is missing or failed.
    #[error("`{tool}` failed: {why}; it is in the package erofs-utils")]
    Tool {
        /// Which.
        tool: &'static str,
        /// Its message, or why it did not start.
        why: String,
    },
    /// Something in it that this project does not put there.
    #[error("`{0}` is neither a directory nor a regular file with a name in UTF-8; is it made by another tool?")]
    Foreign(String),
}

/// A file system with these executables (name, content) in its root, readable and executable by all, owned by root. The
/// same input gives the same bytes.
///
/// # Errors
/// [`ErofsError::Tool`] if `mkfs.erofs` is missing or fails, [`ErofsError::Io`].
pub fn image(programs: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>, ErofsError> {
    let work = temporary()?;
    let (tree, out) = (work.path().join("tree"), work.path().join("out"));
    fs::create_dir(&tree).map_err(io_error("create", &tree))?;
    for (name, content) in programs {
        let path = tree.join(name);
        fs::write(&path, content).map_err(io_error("write", &path))?;
        permit(&path)?;
    }
    permit(&tree)?;
    run(
        "mkfs.erofs",
        Command::new("mkfs.erofs")
            .args(["--quiet", "--all-root", "-x-1", "-T0", COMPRESSOR, PIECE, IDENTITY])
            .args([&out, &tree]),
    )?;
    fs::read(&out).map_err(io_error("read", &out))
}

/// What is in a file system, by path, unpacked and checked.
///
/// # Errors
/// [`ErofsError::Tool`] if `fsck.erofs` is missing or does not accept it, [`ErofsError::Foreign`], [`ErofsError::Io`].
pub fn read(image: &[u8]) -> Result<Vec<Entry>, ErofsError> {
    let work = temporary()?;
    let (file, tree) = (work.path().join("in"), work.path().join("tree"));
    fs::write(&file, image).map_err(io_error("write", &file))?;
    let extract = [format!("--extract={}", tree.display()), "--preserve-perms".into(), "--no-preserve-owner".into()];
    run("fsck.erofs", Command::new("fsck.erofs").args(extract).arg(&file))?;
    let mut entries = Vec::new();
    collect(&tree, "", &mut entries)?;
    entries.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(entries)
}

fn collect(dir: &Path, prefix: &str, entries: &mut Vec<Entry>) -> Result<(), ErofsError> {
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let path = entry.map_err(io_error("list", dir))?.path();
        let foreign = || ErofsError::Foreign(path.display().to_string());
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(foreign)?;
        let name = format!("{prefix}{name}");
        let about = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
        let permissions = about.permissions().mode() & 0o7777;
        if about.is_dir() {
            entries.push(Entry { path: name.clone(), permissions, kind: Kind::Directory });
            collect(&path, &format!("{name}/"), entries)?;
        } else if about.is_file() {
            let content = fs::read(&path).map_err(io_error("read", &path))?;
            entries.push(Entry { path: name, permissions, kind: Kind::File(content) });
        } else {
            return Err(foreign());
        }
    }
    Ok(())
}

fn permit(path: &Path) -> Result<(), ErofsError> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(io_error("set the mode of", path))
}

fn temporary() -> Result<tempfile::TempDir, ErofsError> {
    tempfile::tempdir().map_err(io_error("make a directory in", &std::env::temp_dir()))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ErofsError {
    let path = path.to_owned();
    move |source| ErofsError::Io { what, path, source }
}

fn run(tool: &'static str, command: &mut Command) -> Result<(), ErofsError> {
    let output = command.env("LC_ALL", "C").output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            Err(ErofsError::Tool { tool, why: String::from_utf8_lossy(&said).trim().to_owned() })
        }
        Err(error) => Err(ErofsError::Tool { tool, why: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs(of: &[(&str, &[u8])]) -> BTreeMap<String, Vec<u8>> {
        of.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect()
    }

    #[test]
    fn what_is_put_in_comes_out_and_may_be_run() {
        // More than one piece, of which some compress and some do not.
        let mut large: Vec<u8> = (0..300_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        large.resize(3 << 20, 7);
        let image = image(&programs(&[("gaia", &large), ("debug", b"small"), ("empty", b"")])).unwrap();
        assert!(image.len() < 2 << 20, "{} bytes are not compressed", image.len());
        let entries = read(&image).unwrap();
        let found: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.permissions, &e.kind)).collect();
        assert!(
            found
                == [
                    ("debug", 0o755, &Kind::File(b"small".to_vec())),
                    ("empty", 0o755, &Kind::File(Vec::new())),
                    ("gaia", 0o755, &Kind::File(large)),
                ]
        );
    }

    #[test]
    fn the_root_is_everyones_to_search_and_nothing_tells_when_or_by_whom_it_was_made() {
        let made = image(&programs(&[("gaia", b"x")])).unwrap();
        // The superblock at 1024: build time at 24, at 32 its nanoseconds, the identity at 48. The root's number at 14, in
        // units of 32 bytes behind the block at 40 (Linux, fs/erofs/erofs_fs.h).
        assert_eq!(&made[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
        assert_eq!(&made[1024 + 24..1024 + 36], [0; 12]);
        assert_eq!(&made[1024 + 48..1024 + 64], [0; 16]);
        let number = usize::from(u16::from_le_bytes([made[1024 + 14], made[1024 + 15]]));
        assert_eq!(&made[1024 + 40..1024 + 44], [0; 4]);
        let root = &made[number * 32 + 4..number * 32 + 6];
        assert_eq!(u16::from_le_bytes([root[0], root[1]]), 0o040_755);
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert!(made == image(&programs(&[("gaia", b"x")])).unwrap(), "a second later, other bytes");
    }

    #[test]
    fn what_is_no_file_system_is_refused_by_the_tools_words() {
        let error = read(b"not a file system").unwrap_err().to_string();
        assert!(error.starts_with("`fsck.erofs` failed: ") && error.contains("erofs-utils"), "{error}");
    }
}
