//! What the built kernel's `.config` must say: the promises of `kernel.config`, checked where it counts.
//!
//! Kconfig drops what misses a dependency and adds what another symbol selects, silently. So each line here is
//! compared with the finished configuration, and a kernel that differs is never put into the cache.

use std::collections::HashMap;
use std::fmt;

/// What one symbol must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// `=y`.
    Yes,
    /// `is not set`, or not there at all.
    Unset,
    /// `=` this text, quotes included where Kconfig writes them.
    Value(&'static str),
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "y",
            Self::Unset => "not set",
            Self::Value(value) => value,
        })
    }
}

/// One symbol that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Without the `CONFIG_` prefix.
    pub symbol: &'static str,
    /// From [`REQUIRED`].
    pub wanted: Want,
    /// The value found; `None` for "not set".
    pub found: Option<String>,
}

/// Every symbol of a configuration that is not what it must be. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigMismatch(pub Vec<Difference>);

impl fmt::Display for ConfigMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the kernel's configuration differs from what is required:")?;
        for Difference { symbol, wanted, found } in &self.0 {
            let found = found.as_deref().unwrap_or("not set");
            write!(f, "\n  CONFIG_{symbol}: wanted {wanted}, found {found}")?;
        }
        write!(
            f,
            "\na default or a missing dependency decided otherwise: look the symbol up in the source's Kconfig files, \
             then correct image/kernel.config"
        )
    }
}

/// Compares a `.config` with [`REQUIRED`].
///
/// ```
/// use gaia_image::kernel::check_config;
///
/// let error = check_config("CONFIG_MODULES=y\n").unwrap_err();
/// assert!(error.to_string().contains("CONFIG_MODULES: wanted not set, found y"));
/// ```
///
/// # Errors
/// All differences at once.
pub fn check_config(config: &str) -> Result<(), ConfigMismatch> {
    differences(config, REQUIRED)
}

fn differences(config: &str, required: &[(&'static str, Want)]) -> Result<(), ConfigMismatch> {
    let set: HashMap<&str, &str> =
        config.lines().filter_map(|line| line.trim().strip_prefix("CONFIG_")?.split_once('=')).collect();
    let different: Vec<_> = required
        .iter()
        .filter_map(|&(symbol, wanted)| {
            // Old tools write `=n` where the kernel's own write a comment.
            let found = set.get(symbol).copied().filter(|value| *value != "n");
            let right = match wanted {
                Want::Yes => found == Some("y"),
                Want::Unset => found.is_none(),
                Want::Value(value) => found == Some(value),
            };
            (!right).then(|| Difference { symbol, wanted, found: found.map(str::to_owned) })
        })
        .collect();
    if different.is_empty() { Ok(()) } else { Err(ConfigMismatch(different)) }
}

use Want::{Unset, Value, Yes};

/// The table. Not every line of the fragment is here: what is, is a promise or a trap.
pub const REQUIRED: &[(&str, Want)] = &[
    // The machine.
    ("64BIT", Yes),
    ("SMP", Yes),
    ("NR_CPUS", Value("64")),
    ("HYPERVISOR_GUEST", Yes),
    ("PARAVIRT", Yes),
    ("KVM_GUEST", Yes),
    ("X86_X2APIC", Yes),
    ("CPU_FREQ", Yes),
    ("CPU_FREQ_DEFAULT_GOV_PERFORMANCE", Yes),
    ("JUMP_LABEL", Yes),
    ("CC_OPTIMIZE_FOR_PERFORMANCE", Yes),
    ("KERNEL_ZSTD", Yes),
    ("NUMA", Unset),
    ("VIRTUALIZATION", Unset),
    ("MTRR", Unset),
    // Time and scheduling.
    ("HIGH_RES_TIMERS", Yes),
    ("NO_HZ_FULL", Yes),
    ("CPU_ISOLATION", Yes),
    ("HZ", Value("250")),
    ("PREEMPT_NONE", Yes),
    ("POSIX_TIMERS", Yes),
    // Memory.
    ("COMPACTION", Yes),
    ("MIGRATION", Yes),
    ("TRANSPARENT_HUGEPAGE", Yes),
    ("TRANSPARENT_HUGEPAGE_MADVISE", Yes),
    ("HUGETLBFS", Yes),
    ("HUGETLB_PAGE", Yes),
    ("PROC_PAGE_MONITOR", Yes),
    ("SHMEM", Yes),
    ("TMPFS", Yes),
    ("MEMFD_CREATE", Yes),
    ("ADVISE_SYSCALLS", Yes),
    ("SWIOTLB_DYNAMIC", Yes),
    ("CMDLINE", Value("\"swiotlb=1024 rootfstype=ramfs\"")),
    ("CMDLINE_OVERRIDE", Unset),
    ("SLUB_TINY", Unset),
    ("SWAP", Unset),
    ("ZSWAP", Unset),
    ("KSM", Unset),
    ("NUMA_BALANCING", Unset),
    ("MEMORY_HOTPLUG", Unset),
    ("MEMORY_FAILURE", Unset),
    ("USERFAULTFD", Unset),
    // Processes and limits.
    ("CGROUPS", Yes),
    ("MEMCG", Yes),
    ("CPUSETS", Yes),
    ("CGROUP_SCHED", Yes),
    ("FAIR_GROUP_SCHED", Yes),
    ("CFS_BANDWIDTH", Yes),
    ("CGROUP_PIDS", Yes),
    ("PID_NS", Yes),
    ("NET_NS", Yes),
    ("MULTIUSER", Yes),
    ("BINFMT_ELF", Yes),
    ("MEMCG_V1", Unset),
    ("CPUSETS_V1", Unset),
    ("USER_NS", Unset),
    ("BINFMT_MISC", Unset),
    ("BINFMT_SCRIPT", Unset),
    ("COREDUMP", Unset),
    // System calls.
    ("EPOLL", Yes),
    ("EVENTFD", Yes),
    ("TIMERFD", Yes),
    ("SIGNALFD", Yes),
    ("FUTEX", Yes),
    ("MEMBARRIER", Yes),
    ("RSEQ", Yes),
    ("FILE_LOCKING", Yes),
    ("IO_URING", Unset),
    ("AIO", Unset),
    ("FHANDLE", Unset),
    ("SYSVIPC", Unset),
    ("POSIX_MQUEUE", Unset),
    ("CROSS_MEMORY_ATTACH", Unset),
    ("MODIFY_LDT_SYSCALL", Unset),
    ("IA32_EMULATION", Unset),
    ("X86_X32_ABI", Unset),
    ("X86_VSYSCALL_EMULATION", Unset),
    ("X86_IOPL_IOPERM", Unset),
    ("KEYS", Unset),
    ("BPF_SYSCALL", Unset),
    // Ways in that stay shut.
    ("MODULES", Unset),
    ("KEXEC", Unset),
    ("KEXEC_FILE", Unset),
    ("KEXEC_CORE", Unset),
    ("CRASH_DUMP", Unset),
    ("HIBERNATION", Unset),
    ("SUSPEND", Unset),
    ("DEVMEM", Unset),
    ("DEVPORT", Unset),
    ("DEVKMEM", Unset),
    ("PROC_KCORE", Unset),
    ("X86_MSR", Unset),
    ("MAGIC_SYSRQ", Unset),
    ("DEBUG_FS", Unset),
    ("FTRACE", Unset),
    ("KPROBES", Unset),
    ("UPROBES", Unset),
    ("UEVENT_HELPER", Unset),
    ("STATIC_USERMODEHELPER", Yes),
    ("STATIC_USERMODEHELPER_PATH", Value("\"\"")),
    ("LEGACY_PTYS", Unset),
    ("UNIX98_PTYS", Unset),
    ("VT", Unset),
    ("INPUT", Unset),
    ("SERIO", Unset),
    ("LEGACY_TIOCSTI", Unset),
    ("LDISC_AUTOLOAD", Unset),
    // Sandboxes and lockdown.
    ("SECCOMP", Yes),
    ("SECCOMP_FILTER", Yes),
    ("BPF_JIT", Yes),
    ("BPF_JIT_DEFAULT_ON", Yes),
    ("SECURITY", Yes),
    ("SECURITYFS", Yes),
    ("SECURITY_LANDLOCK", Yes),
    ("SECURITY_NETWORK", Yes),
    ("SECURITY_PATH", Yes),
    ("SECURITY_YAMA", Yes),
    ("SECURITY_LOCKDOWN_LSM", Yes),
    ("SECURITY_LOCKDOWN_LSM_EARLY", Yes),
    ("LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY", Yes),
    ("LSM", Value("\"lockdown,yama,landlock\"")),
    ("SECURITY_DMESG_RESTRICT", Yes),
    ("PROC_MEM_NO_FORCE", Yes),
    // Hardening.
    ("STACKPROTECTOR_STRONG", Yes),
    ("RELOCATABLE", Yes),
    ("RANDOMIZE_BASE", Yes),
    ("RANDOMIZE_MEMORY", Yes),
    ("RANDOMIZE_KSTACK_OFFSET_DEFAULT", Yes),
    ("VMAP_STACK", Yes),
    ("STRICT_KERNEL_RWX", Yes),
    ("HARDENED_USERCOPY", Yes),
    ("FORTIFY_SOURCE", Yes),
    ("INIT_STACK_ALL_ZERO", Yes),
    ("INIT_ON_ALLOC_DEFAULT_ON", Yes),
    ("SLAB_FREELIST_RANDOM", Yes),
    ("SLAB_FREELIST_HARDENED", Yes),
    ("SHUFFLE_PAGE_ALLOCATOR", Yes),
    ("LIST_HARDENED", Yes),
    ("BUG_ON_DATA_CORRUPTION", Yes),
    ("SCHED_STACK_END_CHECK", Yes),
    ("X86_KERNEL_IBT", Yes),
    ("X86_UMIP", Yes),
    ("DEFAULT_MMAP_MIN_ADDR", Value("65536")),
    ("SYN_COOKIES", Yes),
    ("CPU_MITIGATIONS", Yes),
    ("MITIGATION_PAGE_TABLE_ISOLATION", Yes),
    ("MITIGATION_RETPOLINE", Yes),
    ("MITIGATION_RETHUNK", Yes),
    ("MITIGATION_UNRET_ENTRY", Yes),
    ("MITIGATION_IBPB_ENTRY", Yes),
    ("MITIGATION_IBRS_ENTRY", Yes),
    ("MITIGATION_SRSO", Yes),
    ("MITIGATION_SLS", Yes),
    ("MITIGATION_GDS", Yes),
    ("MITIGATION_RFDS", Yes),
    ("MITIGATION_SPECTRE_BHI", Yes),
    ("MITIGATION_MDS", Yes),
    ("MITIGATION_TAA", Yes),
    ("MITIGATION_MMIO_STALE_DATA", Yes),
    ("MITIGATION_L1TF", Yes),
    ("MITIGATION_RETBLEED", Yes),
    ("MITIGATION_SPECTRE_V1", Yes),
    ("MITIGATION_SPECTRE_V2", Yes),
    ("MITIGATION_SRBDS", Yes),
    ("MITIGATION_SSB", Yes),
    ("MITIGATION_ITS", Yes),
    ("MITIGATION_TSA", Yes),
    // When it fails.
    ("BUG", Yes),
    ("PANIC_ON_OOPS", Yes),
    ("PANIC_TIMEOUT", Value("5")),
    ("PRINTK", Yes),
    ("PRINTK_TIME", Yes),
    ("KALLSYMS", Yes),
    ("LOG_BUF_SHIFT", Value("15")),
    ("CONSOLE_LOGLEVEL_DEFAULT", Value("5")),
    ("DEBUG_INFO", Unset),
    ("SCHED_DEBUG", Unset),
    ("SLUB_DEBUG", Unset),
    ("KASAN", Unset),
    ("PROVE_LOCKING", Unset),
    // Start.
    ("BLK_DEV_INITRD", Yes),
    ("RD_ZSTD", Yes),
    ("RD_GZIP", Unset),
    ("RD_BZIP2", Unset),
    ("RD_LZMA", Unset),
    ("RD_XZ", Unset),
    ("RD_LZO", Unset),
    ("RD_LZ4", Unset),
    ("EFI", Yes),
    ("EFI_STUB", Yes),
    ("EFIVAR_FS", Yes),
    ("PCI", Yes),
    ("PCI_MSI", Yes),
    ("ACPI", Yes),
    ("ACPI_TINY_POWER_BUTTON", Yes),
    ("ACPI_TINY_POWER_BUTTON_SIGNAL", Value("15")),
    ("TTY", Yes),
    ("SERIAL_8250", Yes),
    ("SERIAL_8250_CONSOLE", Yes),
    ("SERIAL_8250_PNP", Yes),
    ("SERIAL_8250_RUNTIME_UARTS", Value("1")),
    ("DEVTMPFS", Yes),
    // Devices.
    ("VIRTIO_PCI", Yes),
    ("VIRTIO_NET", Yes),
    ("VIRTIO_BLK", Yes),
    ("VIRTIO_CONSOLE", Yes),
    ("HW_RANDOM_VIRTIO", Yes),
    ("BLK_DEV_NVME", Yes),
    ("SATA_AHCI", Yes),
    ("ATA_SFF", Unset),
    ("BLK_DEV_SD", Yes),
    ("USB_XHCI_HCD", Yes),
    ("USB_XHCI_PCI", Yes),
    ("USB_STORAGE", Yes),
    ("MMC_BLOCK", Yes),
    ("MMC_SDHCI_PCI", Yes),
    ("MMC_SDHCI_ACPI", Yes),
    ("E1000", Yes),
    ("E1000E", Yes),
    ("IGB", Yes),
    ("IGC", Yes),
    ("R8169", Yes),
    ("REALTEK_PHY", Yes),
    ("RTC_CLASS", Yes),
    ("RTC_DRV_CMOS", Yes),
    ("RTC_HCTOSYS", Yes),
    ("WATCHDOG", Yes),
    ("WATCHDOG_SYSFS", Yes),
    ("I6300ESB_WDT", Yes),
    ("ITCO_WDT", Yes),
    ("LPC_ICH", Yes),
    ("I2C_I801", Yes),
    ("SOFT_WATCHDOG", Unset),
    ("WIRELESS", Unset),
    ("WLAN", Unset),
    ("SOUND", Unset),
    ("DRM", Unset),
    ("FB", Unset),
    // Storage and file systems.
    ("EFI_PARTITION", Yes),
    ("MSDOS_PARTITION", Unset),
    ("EXT4_FS", Yes),
    ("VFAT_FS", Yes),
    ("NLS_CODEPAGE_437", Yes),
    ("NLS_ISO8859_1", Yes),
    ("BLK_DEV_DM", Yes),
    ("DM_VERITY", Yes),
    ("CRYPTO_SHA256", Yes),
    ("PROC_FS", Yes),
    ("PROC_SYSCTL", Yes),
    ("SYSFS", Yes),
    ("CRYPTO_MANAGER_DISABLE_TESTS", Yes),
    ("EROFS_FS", Yes),
    ("EROFS_FS_BACKED_BY_FILE", Yes),
    ("EROFS_FS_ZIP", Yes),
    ("EROFS_FS_XATTR", Unset),
    ("EROFS_FS_ZIP_LZMA", Unset),
    ("EROFS_FS_ZIP_DEFLATE", Unset),
    ("EROFS_FS_ZIP_ZSTD", Unset),
    ("EROFS_FS_ONDEMAND", Unset),
    ("SQUASHFS", Unset),
    ("PSTORE", Unset),
    ("BLK_DEV_LOOP", Unset),
    ("FUSE_FS", Unset),
    ("OVERLAY_FS", Unset),
    ("NETWORK_FILESYSTEMS", Unset),
    // Network.
    ("NET", Yes),
    ("INET", Yes),
    ("IPV6", Yes),
    ("PACKET", Yes),
    ("UNIX", Yes),
    ("NETFILTER", Unset),
    ("NET_SCHED", Unset),
    ("IPV6_SIT", Unset),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A configuration that says exactly what is required.
    fn right() -> String {
        REQUIRED
            .iter()
            .map(|(symbol, want)| match want {
                Yes => format!("CONFIG_{symbol}=y\n"),
                Unset => format!("# CONFIG_{symbol} is not set\n"),
                Value(value) => format!("CONFIG_{symbol}={value}\n"),
            })
            .collect()
    }

    #[test]
    fn the_right_configuration_passes() {
        assert_eq!(check_config(&right()), Ok(()));
    }

    #[test]
    fn each_wrong_symbol_is_named_with_both_values() {
        let wrong = right()
            .replace("CONFIG_SECURITY_LANDLOCK=y", "# CONFIG_SECURITY_LANDLOCK is not set")
            .replace("# CONFIG_SWAP is not set", "CONFIG_SWAP=y")
            .replace("CONFIG_HZ=250", "CONFIG_HZ=1000");
        let message = check_config(&wrong).unwrap_err().to_string();
        assert!(message.contains("CONFIG_SECURITY_LANDLOCK: wanted y, found not set"), "{message}");
        assert!(message.contains("CONFIG_SWAP: wanted not set, found y"), "{message}");
        assert!(message.contains("CONFIG_HZ: wanted 250, found 1000"), "{message}");
        assert_eq!(check_config(&wrong).unwrap_err().0.len(), 3);
    }

    #[test]
    fn a_module_is_not_a_yes() {
        let wrong = right().replace("CONFIG_EXT4_FS=y", "CONFIG_EXT4_FS=m");
        assert_eq!(
            check_config(&wrong).unwrap_err().0,
            [Difference { symbol: "EXT4_FS", wanted: Yes, found: Some("m".into()) }]
        );
    }

    #[test]
    fn an_explicit_no_is_not_set() {
        assert_eq!(check_config(&right().replace("# CONFIG_SWAP is not set", "CONFIG_SWAP=n")), Ok(()));
    }

    #[test]
    fn an_empty_file_is_not_a_configuration() {
        assert!(check_config("").unwrap_err().0.len() > 100);
    }

    #[test]
    fn no_symbol_is_listed_twice() {
        let mut symbols: Vec<_> = REQUIRED.iter().map(|(symbol, _)| symbol).collect();
        symbols.sort_unstable();
        let len = symbols.len();
        symbols.dedup();
        assert_eq!(symbols.len(), len);
    }

    proptest! {
        #[test]
        fn foreign_text_never_panics(text in ".*") {
            let _ = check_config(&text);
        }
    }
}
