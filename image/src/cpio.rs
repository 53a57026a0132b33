//! The "newc" cpio format, as far as the kernel's initramfs needs it: one writer, one reader.
//!
//! ```text
//! "070701" + 13 fields of 8 hex digits          110 bytes
//! name, NUL                                     header + name padded to 4
//! content                                       padded to 4
//! …                                             one per entry
//! the same with the name "TRAILER!!!"           end of archive
//! ```
//!
//! The writer is deterministic: entries sorted by path, owner 0:0, time 0, inode numbers in sequence. What it is
//! given decides every byte. The reader takes bytes from anywhere, never panics, and names the offset it stopped at.
//! Format: `Documentation/driver-api/early-userspace/buffer-format.rst` of Linux 6.12.

use std::collections::BTreeMap;

const MAGIC: &[u8; 6] = b"070701";
const HEADER_LEN: usize = 110;
const TRAILER: &str = "TRAILER!!!";
/// `PATH_MAX` of Linux: the kernel skips what has a longer name, with its NUL.
const NAME_LEN_MAX: usize = 4096;
const TYPE_MASK: u32 = 0o170_000;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file and its content.
    File(Vec<u8>),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A symbolic link and its target. Read, never written.
    Symlink(String),
    /// Anything else, by the type bits of its mode. Read, never written.
    Other(u32),
}

impl Kind {
    /// The file type bits of `st_mode`.
    #[must_use]
    pub fn type_bits(&self) -> u32 {
        match self {
            Self::Directory => 0o040_000,
            Self::File(_) => 0o100_000,
            Self::CharDevice { .. } => 0o020_000,
            Self::Symlink(_) => 0o120_000,
            Self::Other(bits) => *bits,
        }
    }
}

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without a leading slash: `bin/gaia`.
    pub path: String,
    /// Permission bits, without the type.
    pub permissions: u32,
    /// Type and content.
    pub kind: Kind,
}

/// Why an archive could not be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpioError {
    /// A path the kernel would not unpack where it seems to say.
    #[error("`{path}` cannot be a path in an archive: {why}; name it like `bin/gaia`, with plain components")]
    Path {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two entries with one path.
    #[error("`{0}` is in the archive twice; leave one of them out")]
    Duplicate(String),
    /// An entry below something that is not a directory of the archive.
    #[error("`{0}` has no directory to be in; add its parent as a directory first")]
    NoParent(String),
    /// A file of 4 GiB or more: the format has 32 bits for it.
    #[error("`{path}` has {len} bytes, cpio holds less than 4 GiB per file; make it smaller")]
    TooLarge {
        /// The path as given.
        path: String,
        /// Its size.
        len: usize,
    },
    /// Something in foreign bytes that is not newc.
    #[error("not a newc cpio archive at byte {offset}: {why}; is it truncated, or made by another tool?")]
    Malformed {
        /// Offset into the bytes given.
        offset: usize,
        /// What was expected there.
        why: &'static str,
    },
}

/// An archive under construction.
///
/// ```
/// use gaia_image::cpio::{read, Archive};
///
/// let mut archive = Archive::default();
/// archive.directory("bin", 0o755)?;
/// archive.file("bin/true", 0o755, b"\x7fELF".to_vec())?;
/// let bytes = archive.to_bytes()?;
/// let (entries, used) = read(&bytes)?;
/// assert_eq!(entries[1].path, "bin/true");
/// assert_eq!(used, bytes.len());
/// # Ok::<(), gaia_image::cpio::CpioError>(())
/// ```
#[derive(Debug, Default, Clone)]
pub struct Archive {
    entries: BTreeMap<String, (u32, Kind)>,
}

impl Archive {
    /// Adds a directory.
    ///
    /// # Errors
    /// [`CpioError::Path`] or [`CpioError::Duplicate`].
    pub fn directory(&mut self, path: &str, permissions: u32) -> Result<(), CpioError> {
        self.add(path, permissions, Kind::Directory)
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// [`CpioError::Path`], [`CpioError::Duplicate`] or [`CpioError::TooLarge`].
    pub fn file(&mut self, path: &str, permissions: u32, content: Vec<u8>) -> Result<(), CpioError> {
        if u32::try_from(content.len()).is_err() {
            return Err(CpioError::TooLarge { path: path.to_owned(), len: content.len() });
        }
        self.add(path, permissions, Kind::File(content))
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// [`CpioError::Path`] or [`CpioError::Duplicate`].
    pub fn char_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) -> Result<(), CpioError> {
        self.add(path, permissions, Kind::CharDevice { major, minor })
    }

    /// Adds a directory and those above it, unless they are there.
    ///
    /// # Errors
    /// [`CpioError::Path`], or [`CpioError::Duplicate`] where one of them is there but not a directory.
    pub fn directories(&mut self, path: &str, permissions: u32) -> Result<(), CpioError> {
        valid_path(path)?;
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for end in ends {
            let above = &path[..end];
            match self.entries.get(above) {
                Some((_, Kind::Directory)) => {}
                _ => self.directory(above, permissions)?,
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &str, permissions: u32, kind: Kind) -> Result<(), CpioError> {
        valid_path(path)?;
        if self.entries.contains_key(path) {
            return Err(CpioError::Duplicate(path.to_owned()));
        }
        self.entries.insert(path.to_owned(), (permissions & 0o7777, kind));
        Ok(())
    }

    /// The archive, uncompressed; its length is a multiple of 4.
    ///
    /// # Errors
    /// [`CpioError::NoParent`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, CpioError> {
        let mut out = Vec::new();
        for (inode, (path, (permissions, kind))) in (1_u32..).zip(&self.entries) {
            if let Some((parent, _)) = path.rsplit_once('/')
                && !matches!(self.entries.get(parent), Some((_, Kind::Directory)))
            {
                return Err(CpioError::NoParent(path.clone()));
            }
            let (content, links, device): (&[u8], u32, (u32, u32)) = match kind {
                Kind::File(content) => (content, 1, (0, 0)),
                Kind::CharDevice { major, minor } => (&[], 1, (*major, *minor)),
                Kind::Directory => (&[], 2, (0, 0)),
                Kind::Symlink(target) => (target.as_bytes(), 1, (0, 0)),
                Kind::Other(_) => (&[], 1, (0, 0)),
            };
            let mode = kind.type_bits() | permissions;
            record(&mut out, path, inode, mode, links, device, content);
        }
        record(&mut out, TRAILER, 0, 0, 1, (0, 0), &[]);
        Ok(out)
    }
}

fn valid_path(path: &str) -> Result<(), CpioError> {
    let why = if path.is_empty() {
        "it is empty"
    } else if path.starts_with('/') {
        "it begins with a slash"
    } else if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        "it has an empty component, `.` or `..`"
    } else if path.contains('\0') {
        "it contains a NUL"
    } else if path.len() >= NAME_LEN_MAX {
        "it is longer than the kernel's PATH_MAX"
    } else if path == TRAILER {
        "it is the end mark of the format"
    } else {
        return Ok(());
    };
    Err(CpioError::Path { path: path.to_owned(), why })
}

/// Appends zeros up to a multiple of 4, the alignment of everything in newc.
pub(crate) fn pad4(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

fn record(out: &mut Vec<u8>, path: &str, inode: u32, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
    // The two lengths were checked when the entry was added.
    let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
    out.extend_from_slice(MAGIC);
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad4(out);
    out.extend_from_slice(content);
    pad4(out);
}

/// Reads one archive from the start of `bytes`: its entries, and how many bytes it took up to the end of its trailer.
///
/// # Errors
/// [`CpioError::Malformed`] with the offset.
pub fn read(bytes: &[u8]) -> Result<(Vec<Entry>, usize), CpioError> {
    let mut entries = Vec::new();
    let mut at = 0_usize;
    loop {
        let header = bytes
            .get(at..at.saturating_add(HEADER_LEN))
            .ok_or(malformed(at, "a header of 110 bytes should be here, the bytes end"))?;
        if !header.starts_with(MAGIC) {
            return Err(malformed(at, "the magic `070701` should be here"));
        }
        let field = |index: usize| hex_field(header, at, index);
        let mode = field(1)?;
        let size = field(6)? as usize;
        let (major, minor) = (field(9)?, field(10)?);
        let name_size = field(11)? as usize;
        let name_at = at + HEADER_LEN;
        if name_size == 0 || name_size > NAME_LEN_MAX {
            return Err(malformed(at, "its name's length is not within 1 and 4096 bytes"));
        }
        let name = bytes
            .get(name_at..name_at + name_size)
            .and_then(|name| name.strip_suffix(&[0]))
            .ok_or(malformed(name_at, "a name that ends with NUL should be here"))?;
        let path = std::str::from_utf8(name).map_err(|_| malformed(name_at, "the name is not UTF-8"))?.to_owned();
        let content_at = (name_at + name_size).next_multiple_of(4);
        let content = content_at
            .checked_add(size)
            .and_then(|end| bytes.get(content_at..end))
            .ok_or(malformed(content_at, "the content is longer than what is left"))?;
        at = (content_at + size).next_multiple_of(4);
        if path == TRAILER {
            return Ok((entries, at.min(bytes.len())));
        }
        let kind = match mode & TYPE_MASK {
            0o040_000 => Kind::Directory,
            0o100_000 => Kind::File(content.to_vec()),
            0o020_000 => Kind::CharDevice { major, minor },
            0o120_000 => Kind::Symlink(String::from_utf8_lossy(content).into_owned()),
            bits => Kind::Other(bits),
        };
        entries.push(Entry { path, permissions: mode & 0o7777, kind });
    }
}

fn malformed(offset: usize, why: &'static str) -> CpioError {
    CpioError::Malformed { offset, why }
}

fn hex_field(header: &[u8], at: usize, index: usize) -> Result<u32, CpioError> {
    let start = MAGIC.len() + index * 8;
    let digits = &header[start..start + 8];
    // `from_str_radix` would take a sign.
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(malformed(at + start, "eight hex digits should be here"));
    }
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or(malformed(at + start, "eight hex digits should be here"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_the_one_the_kernel_documents() {
        let mut archive = Archive::default();
        archive.directory("a", 0o755).unwrap();
        archive.file("a/b", 0o640, b"hello".to_vec()).unwrap();
        archive.char_device("a/c", 0o600, 5, 1).unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000041ed",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0",
            "070701",
            "00000002",
            "000081a0",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000004",
            "00000000",
            "a/b\0\0\0",
            "hello\0\0\0",
            "070701",
            "00000003",
            "00002180",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000005",
            "00000001",
            "00000004",
            "00000000",
            "a/c\0\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0\0\0\0",
        );
        assert_eq!(String::from_utf8(archive.to_bytes().unwrap()).unwrap(), expected);
    }

    #[test]
    fn the_order_of_adding_does_not_matter() {
        let mut one = Archive::default();
        one.directory("d", 0o755).unwrap();
        one.file("d/x", 0o644, vec![1]).unwrap();
        one.file("d-", 0o644, vec![2]).unwrap();
        let mut two = Archive::default();
        two.file("d-", 0o644, vec![2]).unwrap();
        two.file("d/x", 0o644, vec![1]).unwrap();
        two.directory("d", 0o755).unwrap();
        assert_eq!(one.to_bytes(), two.to_bytes());
    }

    #[test]
    fn directories_adds_what_is_missing() {
        let mut archive = Archive::default();
        archive.directory("a", 0o700).unwrap();
        archive.directories("a/b/c", 0o755).unwrap();
        let (entries, _) = read(&archive.to_bytes().unwrap()).unwrap();
        let found: Vec<_> = entries.iter().map(|e| (e.path.as_str(), e.permissions)).collect();
        assert_eq!(found, [("a", 0o700), ("a/b", 0o755), ("a/b/c", 0o755)]);
        archive.file("a/file", 0o644, vec![]).unwrap();
        assert_eq!(archive.directories("a/file/x", 0o755), Err(CpioError::Duplicate("a/file".into())));
    }

    #[test]
    fn bad_paths_are_refused() {
        let mut archive = Archive::default();
        for path in ["", "/a", "a/", "a//b", "./a", "a/../b", "a\0b", "TRAILER!!!", &"x".repeat(4096)] {
            let error = archive.directory(path, 0o755).unwrap_err();
            assert!(matches!(error, CpioError::Path { .. }), "{path:?}: {error}");
        }
        archive.directory("a", 0o755).unwrap();
        assert_eq!(archive.file("a", 0o644, vec![]), Err(CpioError::Duplicate("a".into())));
        archive.file("b/c", 0o644, vec![]).unwrap();
        assert_eq!(archive.to_bytes(), Err(CpioError::NoParent("b/c".into())));
    }

    #[test]
    fn a_cut_archive_names_the_offset() {
        let mut archive = Archive::default();
        archive.file("f", 0o644, vec![7; 100]).unwrap();
        let bytes = archive.to_bytes().unwrap();
        assert_eq!(read(&bytes[..150]).unwrap_err(), malformed(112, "the content is longer than what is left"));
        assert_eq!(
            read(&bytes[..212]).unwrap_err(),
            malformed(212, "a header of 110 bytes should be here, the bytes end")
        );
        let mut wrong = bytes;
        wrong[6 + 8] = b'+';
        assert_eq!(read(&wrong).unwrap_err(), malformed(14, "eight hex digits should be here"));
    }

    fn any_file() -> impl Strategy<Value = (String, u32, Vec<u8>)> {
        (
            "[a-zA-Z0-9._ -]{1,12}".prop_filter("a component", |name| name != "." && name != ".."),
            0..0o7777_u32,
            proptest::collection::vec(any::<u8>(), 0..40),
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(files in proptest::collection::vec(any_file(), 0..8)) {
            let mut archive = Archive::default();
            let mut model = BTreeMap::new();
            for (name, permissions, content) in files {
                if archive.file(&name, permissions, content.clone()).is_ok() {
                    model.insert(name, (permissions, content));
                }
            }
            let mut bytes = archive.to_bytes().unwrap();
            prop_assert_eq!(bytes.len() % 4, 0);
            let len = bytes.len();
            bytes.extend_from_slice(b"something else");
            let (entries, used) = read(&bytes).unwrap();
            prop_assert_eq!(used, len);
            let found: BTreeMap<_, _> = entries.into_iter().map(|entry| match entry.kind {
                Kind::File(content) => (entry.path, (entry.permissions, content)),
                other => (entry.path, (u32::MAX, format!("{other:?}").into_bytes())),
            }).collect();
            prop_assert_eq!(found, model);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes);
        }

        #[test]
        fn a_changed_archive_never_panics(at in 0..600_usize, value in any::<u8>(), cut in 0..600_usize) {
            let mut archive = Archive::default();
            archive.directory("dir", 0o755).unwrap();
            archive.file("dir/file", 0o644, vec![b'0'; 77]).unwrap();
            let mut bytes = archive.to_bytes().unwrap();
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            bytes.truncate(cut);
            if let Err(CpioError::Malformed { offset, .. }) = read(&bytes) {
                prop_assert!(offset <= bytes.len().next_multiple_of(4));
            }
        }
    }
}
