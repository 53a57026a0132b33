//! The data disk: found by the label of its file system, mounted at `/data`, and one folder of it handed to control alone.
//!
//! ```text
//! /sys/class/block ── disks and partitions ──▶ superblock ── label gaia-data, sum right ──▶ mount ──▶ /data/control
//!                                              (1 KiB each)                                     user control, mode 0700
//! ```
//!
//! The appliance serves without it: what is missing or wrong is a line of the boot report. Which of two disks is meant is
//! not guessed: to write to the wrong one is worse than to keep nothing.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use gaia_init::roles::users;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::report::Failure;

/// What the file system is called (`image/src/disk.rs`).
const LABEL: &str = "gaia-data";
/// Where it is mounted: a folder of the initramfs.
const AT: &str = "/data";
/// Control's folder on it (`gaia_init::sandbox::control`).
const FOLDER: &str = "control";

/// Whoever is not control finds a folder there that it cannot enter, and nothing that runs, is a device, or gives rights.
const FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NOATIME);
/// An error stops all writing: what was written stays as it is, and control learns of it by its next write. A panic would
/// be a boot loop, and going on would make more of it wrong. Data is on the disk before metadata says so.
const OPTIONS: &str = "errors=remount-ro,data=ordered";

/// Disks that a data disk can be: virtio, SATA and USB, `NVMe`, eMMC and SD cards.
const DISKS: [&str; 4] = ["vd", "sd", "nvme", "mmcblk"];
/// Disks behind these appear some time after the boot; all others have before init runs (Linux, `init/main.c`,
/// `async_synchronize_full`).
const LATE: [&str; 2] = ["/sys/class/mmc_host", "/sys/bus/usb/devices"];
/// How long such disks are waited for: USB's own delay of a second (`usb-storage.delay_use`), and as much again.
const LATE_WITHIN: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Where a superblock lies in its file system, and its size in bytes (Linux, `Documentation/filesystems/ext4/super.rst`).
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK: usize = 1024;

/// What one of the machine's disks or partitions shows of itself.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// No ext4.
    Other,
    /// An ext4 whose superblock is not as it was written.
    Damaged,
    /// An ext4.
    Ext4(Superblock),
}

/// What is read of a superblock.
#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    /// The label up to its first zero, with anything unprintable escaped.
    label: String,
    /// It was not unmounted: the kernel replays its journal.
    replay: bool,
    /// The kernel once found something wrong in it.
    errors: bool,
}

impl Found {
    /// Reads a superblock, of which everything may be wrong. `None` is a device that has none that long.
    fn read(bytes: Option<&[u8; SUPERBLOCK]>) -> Self {
        const STATE: usize = 0x3a;
        const MAGIC: usize = 0x38;
        const INCOMPATIBLE: usize = 0x60;
        const READ_ONLY_COMPATIBLE: usize = 0x64;
        const NAME: std::ops::Range<usize> = 0x78..0x88;
        const SUM: usize = 0x3fc;
        // `EXT4_FEATURE_INCOMPAT_RECOVER`, `EXT4_FEATURE_RO_COMPAT_METADATA_CSUM`, `EXT4_ERROR_FS`.
        const RECOVER: u32 = 0x4;
        const METADATA_CSUM: u32 = 0x400;
        const ERRORS: u16 = 0x2;
        let Some(bytes) = bytes else { return Self::Other };
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if half(MAGIC) != 0xef53 {
            return Self::Other;
        }
        if word(READ_ONLY_COMPATIBLE) & METADATA_CSUM != 0 && word(SUM) != crc32c(&bytes[..SUM]) {
            return Self::Damaged;
        }
        let label = bytes[NAME].split(|byte| *byte == 0).next().unwrap_or_default().escape_ascii().to_string();
        let (replay, errors) = (word(INCOMPATIBLE) & RECOVER != 0, half(STATE) & ERRORS != 0);
        Self::Ext4(Superblock { label, replay, errors })
    }

    /// Whether this is the one.
    fn data(&self) -> bool {
        matches!(self, Self::Ext4(superblock) if superblock.label == LABEL)
    }

    fn words(&self) -> String {
        match self {
            Self::Other => "no ext4".into(),
            Self::Damaged => "ext4 with a damaged superblock".into(),
            Self::Ext4(superblock) => format!("ext4 labelled \"{}\"", superblock.label),
        }
    }
}

/// CRC-32C as ext4 has it: reflected, from all ones, not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0x82f6_3b78 };
    bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
}

/// Finds the disk, mounts it, and makes and opens control's folder. Without a disk there is none, and the words say so.
///
/// # Errors
/// If there is a disk but no folder for control: nothing is mounted then.
pub(crate) fn open() -> Result<(Option<OwnedFd>, String), Failure> {
    let (disks, waited) = look();
    let mut ours = disks.iter().filter(|(_, found)| found.data());
    let (name, superblock) = match (ours.next(), ours.next()) {
        (Some((name, Found::Ext4(superblock))), None) => (name, superblock),
        (Some((one, _)), Some((other, _))) => {
            return Err(format!("{one} and {other} are both labelled {LABEL}: nothing is kept, remove one").into());
        }
        _ => return Ok((None, absent(&disks, waited))),
    };
    let device = format!("/dev/{name}");
    mount(Some(device.as_str()), AT, Some("ext4"), FLAGS, Some(OPTIONS))
        .map_err(|e| format!("mounting {device}: {e}; nothing is kept over a restart"))?;
    let folder = folder().map_err(|e| {
        let _ = umount2(AT, MntFlags::MNT_DETACH);
        format!("{device}: control's folder: {e}; nothing is kept over a restart")
    })?;
    let mut said = format!("{device} at {AT}, for control alone");
    if let Ok(space) = rustix::fs::fstatvfs(&folder) {
        said = format!("{said}, {} of {} MiB free", mib(space.f_bavail, &space), mib(space.f_blocks, &space));
    }
    if superblock.replay {
        said.push_str("; it was not shut down in order, its journal was replayed");
    }
    if superblock.errors {
        said.push_str("; ERRORS are recorded in it, e2fsck repairs them");
    }
    Ok((Some(folder), said))
}

fn mib(blocks: u64, space: &rustix::fs::StatVfs) -> u64 {
    blocks.saturating_mul(space.f_frsize) >> 20
}

/// Why there is none, in words.
fn absent(disks: &[(String, Found)], waited: Duration) -> String {
    let seen = disks.iter().map(|(name, found)| format!("{name}: {}", found.words())).collect::<Vec<_>>().join(", ");
    let seen = if seen.is_empty() { "there are none".into() } else { seen };
    let waited = if waited.is_zero() { String::new() } else { format!(" after {} ms", waited.as_millis()) };
    format!("no disk is labelled {LABEL}{waited} ({seen}): nothing is kept over a restart")
}

/// All disks and partitions, by name. Where some may come late, they are waited for until the one that is sought is there.
fn look() -> (Vec<(String, Found)>, Duration) {
    let began = Instant::now();
    let late = LATE.iter().any(|folder| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()));
    loop {
        let disks = disks();
        if !late || disks.iter().any(|(_, found)| found.data()) || began.elapsed() >= LATE_WITHIN {
            return (disks, if late { began.elapsed() } else { Duration::ZERO });
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn disks() -> Vec<(String, Found)> {
    let entries = fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| DISKS.iter().any(|prefix| name.starts_with(prefix))).collect();
    names.sort();
    let seen = |name: String| {
        let found = found(&Path::new("/dev").join(&name));
        (name, found)
    };
    names.into_iter().map(seen).collect()
}

/// Reads what one shows. One that cannot be read is none.
fn found(device: &Path) -> Found {
    let mut bytes = [0; SUPERBLOCK];
    let read = fs::File::open(device).and_then(|file| file.read_exact_at(&mut bytes, SUPERBLOCK_AT));
    Found::read(read.is_ok().then_some(&bytes))
}

/// Control's folder, made where it is not, and made its own again where it is: what is on the disk may come from anywhere.
fn folder() -> Result<OwnedFd, Errno> {
    let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(AT, folder, Mode::empty())?;
    // Others may pass through and not look around; in control's own folder they may do neither.
    rustix::fs::fchown(&root, Some(Uid::ROOT), Some(Gid::ROOT))?;
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o711))?;
    match rustix::fs::mkdirat(&root, FOLDER, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    let own = rustix::fs::openat(&root, FOLDER, folder, Mode::empty())?;
    rustix::fs::fchown(&own, Some(Uid::from_raw(users::CONTROL)), Some(Gid::from_raw(users::CONTROL)))?;
    rustix::fs::fchmod(&own, Mode::RWXU)?;
    rustix::fs::fsync(&own)?;
    rustix::fs::fsync(&root)?;
    Ok(own)
}

/// Ends the file system in order, once nobody writes any more: unmounted, or at least read-only. Words, if it is neither.
/// Without one there is nothing to do. Called where the machine ends, for whatever reason: allocates little, takes no lock.
pub(crate) fn close() -> Result<(), &'static str> {
    rustix::fs::sync();
    match umount2(AT, MntFlags::empty()) {
        // Nothing is mounted there.
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(_) => mount(None::<&str>, AT, None::<&str>, FLAGS | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>)
            .map_err(|_| "the data disk is still in use: what its journal holds is replayed at the next boot"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A superblock as `mke2fs` writes one, as far as it is read here.
    fn superblock(label: &[u8]) -> [u8; SUPERBLOCK] {
        let mut bytes = [0; SUPERBLOCK];
        bytes[0x38..0x3c].copy_from_slice(&[0x53, 0xef, 1, 0]);
        bytes[0x60] = 0x40;
        bytes[0x65] = 0x4;
        bytes[0x78..0x78 + label.len()].copy_from_slice(label);
        summed(bytes)
    }

    fn summed(mut bytes: [u8; SUPERBLOCK]) -> [u8; SUPERBLOCK] {
        let sum = crc32c(&bytes[..0x3fc]);
        bytes[0x3fc..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn the_sum_is_the_one_of_the_standard() {
        // The check value of CRC-32C (iSCSI, RFC 3720), which is inverted at its end.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_label_is_read_with_what_else_is_to_be_said() {
        let of = |bytes: &[u8; SUPERBLOCK]| Found::read(Some(bytes));
        let bytes = superblock(b"gaia-data");
        let plain = Superblock { label: LABEL.into(), replay: false, errors: false };
        assert_eq!(of(&bytes), Found::Ext4(plain));
        assert!(of(&bytes).data());
        let mut torn = bytes;
        torn[0x60] |= 0x4;
        torn[0x3a] |= 0x2;
        let torn = summed(torn);
        assert_eq!(of(&torn), Found::Ext4(Superblock { label: LABEL.into(), replay: true, errors: true }));
        assert!(!of(&superblock(b"gaia-data2")).data());
        assert_eq!(of(&superblock(b"sixteen-letters!")).words(), "ext4 labelled \"sixteen-letters!\"");
        assert_eq!(of(&superblock(b"a\n\xff")).words(), "ext4 labelled \"a\\n\\xff\"");
        // Without sums there is none to be wrong.
        let mut old = superblock(b"gaia-data");
        (old[0x65], old[0x3fc]) = (0, 7);
        assert!(of(&old).data());
    }

    #[test]
    fn what_is_no_superblock_is_none() {
        assert_eq!(Found::read(None), Found::Other);
        assert_eq!(Found::read(Some(&[0; SUPERBLOCK])), Found::Other);
        assert_eq!(Found::read(Some(&[0xff; SUPERBLOCK])), Found::Other);
    }

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let said = absent(&[("vda".into(), Found::Other), ("vdb".into(), Found::Damaged)], Duration::ZERO);
        assert_eq!(
            said,
            "no disk is labelled gaia-data (vda: no ext4, vdb: ext4 with a damaged superblock): nothing is kept over a \
             restart"
        );
        assert!(absent(&[], LATE_WITHIN).contains("gaia-data after 2000 ms (there are none)"));
    }

    proptest! {
        #[test]
        fn any_kibibyte_is_read_and_its_words_are_one_printable_line(
            bytes in proptest::collection::vec(any::<u8>(), SUPERBLOCK),
            magic in any::<bool>(),
            sums in any::<bool>(),
        ) {
            let mut bytes: [u8; SUPERBLOCK] = bytes.try_into().unwrap();
            if magic {
                bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
            }
            if sums {
                bytes = summed(bytes);
            }
            let found = Found::read(Some(&bytes));
            prop_assert!(!magic || found != Found::Other);
            let words = found.words();
            prop_assert!(words.len() < 100 && words.bytes().all(|b| (0x20..0x7f).contains(&b)), "{words:?}");
        }

        #[test]
        fn no_changed_bit_of_a_superblock_goes_unseen(label in proptest::collection::vec(1_u8..128, 0..=16), bit in 0..8192_usize) {
            let mut bytes = superblock(&label);
            let whole = Found::read(Some(&bytes));
            bytes[bit / 8] ^= 1 << (bit % 8);
            // But the bits that say what it is, and that there is a sum.
            let says = [0x38 * 8..0x3a * 8, 0x65 * 8 + 2..0x65 * 8 + 3].iter().any(|bits| bits.contains(&bit));
            prop_assert!(says || Found::read(Some(&bytes)) == Found::Damaged, "{whole:?}");
        }
    }
}
