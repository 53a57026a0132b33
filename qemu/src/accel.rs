//! Which QEMU, and whether it may use the processor's virtualisation.
//!
//! `/dev/kvm` proves nothing: on some rented and nested machines it opens, creates machines and then aborts on
//! a register it does not know, or emulates what the processor should run and gives up at the first SSE instruction.
//! So a machine of the very shape that will be used (same processor model) has to go from reset to 64-bit mode with
//! paging, use SSE, and end itself with a number it has computed.

use crate::error::Error;
use crate::process::{self, Process};
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::Duration;

/// A version of QEMU; the fourth number, if any, is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u16, pub u16, pub u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The oldest QEMU this crate is tested with.
const OLDEST: Version = Version(7, 2, 0);

/// `--version` only prints; the bound is for a program that is not QEMU.
const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// A `qemu-system-x86_64` that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
}

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU {} ({})", self.version, self.path.display())
    }
}

impl Qemu {
    /// `GAIA_QEMU`, else `qemu-system-x86_64` from `PATH`; looked for once per process.
    ///
    /// # Errors
    /// There is none, it is too old, or it is something else. The error says what to install.
    pub fn find() -> Result<Self, Error> {
        static FOUND: OnceLock<Qemu> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(found.clone());
        }
        let found = match env::var_os("GAIA_QEMU").filter(|word| !word.is_empty()) {
            Some(word) => Self::named(Path::new(&word))?,
            None => Self::named(Path::new("qemu-system-x86_64"))?,
        };
        Ok(FOUND.get_or_init(|| found).clone())
    }

    /// A name is looked for in `PATH`, anything with a slash is a path.
    fn named(name: &Path) -> Result<Self, Error> {
        let missing = || Error::QemuMissing { looked_for: name.display().to_string() };
        let bare = name.components().count() == 1 && !name.has_root();
        let path = match name.to_str() {
            Some(word) if bare && !word.contains('/') => process::in_path(word),
            _ => fs::canonicalize(name).ok().filter(|path| path.is_file()),
        };
        let path = path.ok_or_else(missing)?;
        let dir = process::private_dir()?;
        let asked = Process::start(&path, vec!["--version".into()], dir.path())?;
        let output = asked.ending().wait(VERSION_LIMIT).map(|exit| exit.stderr).unwrap_or_default();
        let Some(version) = version(&output) else { return Err(Error::NotQemu { path, output }) };
        if version < OLDEST {
            return Err(Error::QemuTooOld { path, found: version, needed: OLDEST });
        }
        Ok(Self { path, version })
    }
}

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`
fn version(output: &str) -> Option<Version> {
    let numbers = output.split_once("QEMU emulator version ")?.1.split([' ', '\n', '(', '-']).next()?;
    let mut numbers = numbers.split('.').map(|number| number.parse().ok());
    Some(Version(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

/// What runs the guest's instructions, and why.
///
/// Its `Display` is one line for a person: `tcg (emulation: /dev/kvm does not exist)`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Accel {
    /// The processor, through `/dev/kvm`.
    Kvm {
        /// How it is known to work.
        because: String,
    },
    /// QEMU translates each instruction; with one host thread per guest processor from QEMU 8.1 on.
    Tcg {
        /// Why nothing faster is used.
        because: String,
    },
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm { because } => write!(f, "kvm (hardware virtualisation: {because})"),
            Self::Tcg { because } => write!(f, "tcg (emulation: {because})"),
        }
    }
}

impl Accel {
    /// `GAIA_ACCEL` (`kvm` or `tcg`), else `kvm` if a probe machine has run with it, else `tcg`. Decided once per process.
    ///
    /// # Errors
    /// `GAIA_ACCEL` holds another word, or the probe's files cannot be written.
    pub fn choose(qemu: &Qemu) -> Result<Self, Error> {
        static CHOSEN: OnceLock<Accel> = OnceLock::new();
        if let Some(chosen) = CHOSEN.get() {
            return Ok(chosen.clone());
        }
        let chosen = match wish(env::var("GAIA_ACCEL").ok().as_deref())? {
            Some(wish) => wish,
            None => match probe(qemu)? {
                Ok(()) => Self::Kvm { because: "a probe machine ran".into() },
                Err(because) => Self::Tcg { because },
            },
        };
        Ok(CHOSEN.get_or_init(|| chosen).clone())
    }

    /// Two errors of old QEMUs kill a Linux guest in a few boots of a hundred, more of them on a busy host; both are avoided:
    ///
    /// - Before 8.1, a processor may run an `int3` that another one has already replaced, as Linux does to patch its own code
    ///   (`Oops: int3`; fixed by qemu deba78709ae8, "accel/tcg: Always lock pages before translation"). One thread for all
    ///   processors has no such race, and no parallelism.
    /// - Before 8.0, `cmpxchg16b` computes the flags from a stale state (fixed by "target/i386: Inline cmpxchg16b"). Linux'
    ///   slab allocator uses it, and a pointer's bits then end up in the flags: debug traps, lost errors. A processor without
    ///   it makes Linux take another way.
    pub(crate) fn argv(&self, qemu: Version) -> [&'static str; 4] {
        match self {
            Self::Kvm { .. } => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg { .. } if qemu < Version(8, 0, 0) => ["-accel", "tcg,thread=single", "-cpu", "max,-cx16"],
            Self::Tcg { .. } if qemu < Version(8, 1, 0) => ["-accel", "tcg,thread=single", "-cpu", "max"],
            Self::Tcg { .. } => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// What `GAIA_ACCEL` wants; nothing if it is unset or empty.
fn wish(word: Option<&str>) -> Result<Option<Accel>, Error> {
    let because = || "GAIA_ACCEL asks for it".to_owned();
    match word {
        None | Some("") => Ok(None),
        Some("tcg") => Ok(Some(Accel::Tcg { because: because() })),
        Some("kvm") => Ok(Some(Accel::Kvm { because: because() })),
        Some(word) => Err(Error::AccelWord { word: word.to_owned() }),
    }
}

/// A working one needs well under a tenth of a second.
const PROBE_LIMIT: Duration = Duration::from_secs(3);

/// Nothing if the probe machine ran under KVM, else why not.
fn probe(qemu: &Qemu) -> Result<Result<(), String>, Error> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Ok(Err(format!("/dev/kvm: {error}")));
    }
    run_probe(qemu, &Accel::Kvm { because: String::new() }, PROBE_LIMIT)
}

fn run_probe(qemu: &Qemu, accel: &Accel, limit: Duration) -> Result<Result<(), String>, Error> {
    let dir = process::private_dir()?;
    let firmware = dir.path().join("probe.bin");
    fs::write(&firmware, probe_firmware()).map_err(|source| Error::File {
        role: "probe firmware",
        path: firmware.clone(),
        source,
    })?;
    let mut argv: Vec<OsString> = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"]
        .into_iter()
        .chain(accel.argv(qemu.version))
        .chain(["-m", "16M", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .map(Into::into)
        .collect();
    argv.push(firmware.into());
    let machine = Process::start(&qemu.path, argv, dir.path())?;
    let exit = machine.ending().wait(limit);
    Ok(verdict(exit.as_ref().map(|exit| (exit.status, exit.stderr.as_str())), limit))
}

/// `isa-debug-exit` turns the byte `n` the guest writes into QEMU's exit code `2n + 1`; the probe writes 42.
fn verdict(exit: Option<(ExitStatus, &str)>, limit: Duration) -> Result<(), String> {
    match exit {
        Some((status, _)) if status.code() == Some(85) => Ok(()),
        Some((status, stderr)) => {
            let said = stderr.lines().next().unwrap_or("it said nothing").trim_start_matches("qemu-system-x86_64: ");
            Err(format!("a probe machine did not run under kvm, {status}: {said}"))
        }
        None => Err(format!("a probe machine did not come to its end under kvm within {limit:?}")),
    }
}

/// 64 KiB that end at the reset vector. The first instruction jumps to 0xf0000, where the machine shows the same ROM.
fn probe_firmware() -> Vec<u8> {
    const SIZE: usize = 0x1_0000;
    const RESET: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0]; // jmp 0xf000:0
    let mut rom = PROBE.to_vec();
    rom.resize(SIZE - 16, 0xf4); // hlt
    rom.extend(RESET);
    rom.resize(SIZE, 0xf4);
    rom
}

/// Real mode to 64-bit mode over one page of 2 MiB, then 21 + 21 in an SSE register.
#[rustfmt::skip]
const PROBE: &[u8] = &[
    0xfa,                                                 // cli
    0xfc,                                                 // cld
    0x66, 0x31, 0xc0,                                     // xor eax, eax
    0x8e, 0xd8,                                           // mov ds, ax
    0x8e, 0xc0,                                           // mov es, ax
    0x66, 0xbc, 0x00, 0x10, 0x00, 0x00,                   // mov esp, 0x1000
    0xbf, 0x00, 0x10,                                     // mov di, 0x1000
    0xb9, 0x00, 0x0c,                                     // mov cx, 3 * 4096 / 4
    0x66, 0xf3, 0xab,                                     // rep stosd
    0x66, 0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, 0x00, 0x00, // mov dword [0x1000], 0x2003    level 4: present, writable
    0x66, 0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, 0x00, 0x00, // mov dword [0x2000], 0x3003    level 3
    0x66, 0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, 0x00, 0x00, // mov dword [0x3000], 0x83      level 2: a page of 2 MiB at 0
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0x90, 0x00,             // lgdt cs:[0x90]
    0x66, 0xb8, 0x20, 0x06, 0x00, 0x00,                   // mov eax, 0x620                PAE, OSFXSR, OSXMMEXCPT
    0x0f, 0x22, 0xe0,                                     // mov cr4, eax
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00,                   // mov eax, 0x1000
    0x0f, 0x22, 0xd8,                                     // mov cr3, eax
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,                   // mov ecx, 0xc0000080           EFER
    0x0f, 0x32,                                           // rdmsr
    0x0d, 0x00, 0x01,                                     // or ax, 0x100                  LME
    0x0f, 0x30,                                           // wrmsr
    0x66, 0xb8, 0x03, 0x00, 0x00, 0x80,                   // mov eax, 0x80000003           PG, MP, PE
    0x0f, 0x22, 0xc0,                                     // mov cr0, eax
    0x66, 0xea, 0x6a, 0x00, 0x0f, 0x00, 0x08, 0x00,       // jmp 8:0xf006a                 64-bit from here
    0x6a, 0x15,                                           // push 21
    0x58,                                                 // pop rax
    0x66, 0x0f, 0x6e, 0xc0,                               // movd xmm0, eax
    0x66, 0x0f, 0xfe, 0xc0,                               // paddd xmm0, xmm0
    0x66, 0x0f, 0x7e, 0xc0,                               // movd eax, xmm0
    0xe6, 0xf4,                                           // out 0xf4, al
    0xf4,                                                 // hlt
    0xeb, 0xfd,                                           // jmp to the hlt
    0x66, 0x90,                                           // nop, for alignment
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,       // 0x80: the descriptors: none,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xaf, 0x00,       //       64-bit code
    0x0f, 0x00, 0x80, 0x00, 0x0f, 0x00,                   // 0x90: their limit and address, 0xf0080
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn version_is_read_from_the_first_line() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022\n";
        assert_eq!(version(debian), Some(Version(7, 2, 22)));
        assert_eq!(version("QEMU emulator version 10.1.0\n"), Some(Version(10, 1, 0)));
        assert_eq!(version("QEMU emulator version 9.2.91 (v10.0.0-rc1)\n"), Some(Version(9, 2, 91)));
        assert_eq!(version("QEMU emulator version 8.0\n"), Some(Version(8, 0, 0)));
        for output in ["", "GNU bash, version 5.2.15", "QEMU emulator version ", "QEMU emulator version x.2"] {
            assert_eq!(version(output), None, "{output}");
        }
        assert!(Version(10, 0, 0) > OLDEST && Version(7, 1, 9) < OLDEST);
    }

    #[test]
    fn the_environment_can_decide() {
        assert_eq!(wish(None).unwrap(), None);
        assert_eq!(wish(Some("")).unwrap(), None);
        assert!(matches!(wish(Some("tcg")).unwrap(), Some(Accel::Tcg { .. })));
        assert!(matches!(wish(Some("kvm")).unwrap(), Some(Accel::Kvm { .. })));
        assert!(wish(Some("hvf")).unwrap_err().to_string().contains("\"hvf\""));
    }

    #[test]
    fn old_emulators_are_spared_what_they_do_wrong() {
        let argv = |version| Accel::Tcg { because: String::new() }.argv(version).join(" ");
        assert_eq!(argv(Version(7, 2, 22)), "-accel tcg,thread=single -cpu max,-cx16");
        assert_eq!(argv(Version(8, 0, 5)), "-accel tcg,thread=single -cpu max");
        assert_eq!(argv(Version(8, 1, 0)), "-accel tcg,thread=multi -cpu max");
    }

    #[test]
    fn only_the_computed_number_is_a_proof() {
        let verdict = |exit| verdict(exit, Duration::from_secs(3));
        assert_eq!(verdict(Some((ExitStatus::from_raw(85 << 8), "warning: something"))), Ok(()));
        let abort = verdict(Some((ExitStatus::from_raw(6), "failed to set MSR 0x10a\nassertion"))).unwrap_err();
        assert!(abort.contains("signal: 6") && abort.contains("MSR 0x10a") && !abort.contains("assertion"), "{abort}");
        assert!(verdict(Some((ExitStatus::from_raw(0), ""))).unwrap_err().contains("said nothing"));
        assert!(verdict(Some((ExitStatus::from_raw(1 << 8), "Could not access KVM"))).is_err());
        assert!(verdict(None).unwrap_err().contains("3s"));
    }

    /// Would miss a probe that never succeeds: the same bytes must run where running is certain.
    #[test]
    fn probe_runs_under_emulation() {
        assert_eq!(probe_firmware().len(), 0x1_0000);
        let Ok(qemu) = Qemu::find() else { return };
        let tcg = Accel::Tcg { because: String::new() };
        assert_eq!(run_probe(&qemu, &tcg, Duration::from_mins(1)).unwrap(), Ok(()));
    }

    #[test]
    fn missing_qemu_says_what_to_install() {
        let error = Qemu::named(Path::new("/nowhere/qemu-system-x86_64")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/qemu-system-x86_64") && error.contains("Debian"), "{error}");
        assert!(matches!(Qemu::named(Path::new("/bin/true")).unwrap_err(), Error::NotQemu { .. }));
    }
}
