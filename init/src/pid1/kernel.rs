//! The kernel's own settings: command line, sysctls, huge pages, cores, interrupts.

use std::fmt::Write as _;
use std::fs;

use gaia_init::cores::{Cores, list, parse_list};
use gaia_init::sandbox;
use gaia_init::settings::Settings;

use crate::power::OnFailure;
use crate::report::Failure;

/// What the kernel command line says to init: words that begin with `gaia.`. All others are the kernel's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Parameters {
    /// `gaia.on_failure=reboot|poweroff`
    pub(crate) on_failure: OnFailure,
    /// `gaia.console=ttyS0`: the terminal of the prompt; by default the kernel's last active console.
    pub(crate) console: Option<String>,
}

impl Parameters {
    /// Reads the running kernel's.
    pub(crate) fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Unknown words and values are ignored: there is no one to complain to yet, and the default is safe.
    fn parse(line: &str) -> Self {
        let mut parameters = Self::default();
        for word in line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("gaia.on_failure", "poweroff")) => parameters.on_failure = OnFailure::PowerOff,
                Some(("gaia.on_failure", "reboot")) => parameters.on_failure = OnFailure::Reboot,
                Some(("gaia.console", name)) if !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric()) => {
                    parameters.console = Some(name.to_owned());
                }
                _ => {}
            }
        }
        parameters
    }
}

/// The kernel's name and version.
pub(crate) fn name() -> String {
    let uname = rustix::system::uname();
    format!(
        "{} {} {}",
        uname.sysname().to_string_lossy(),
        uname.release().to_string_lossy(),
        uname.machine().to_string_lossy()
    )
}

/// Settings under `/proc/sys`, each with its reason.
const SYSCTLS: &[(&str, &str)] = &[
    // 65,000 mappings for 900 engines; 62,000 instances in flight need one mapping or more each.
    ("vm/max_map_count", "4194304"),
    // Pools reserve address space far beyond memory; what is touched is bounded by cgroups, not by promises.
    ("vm/overcommit_memory", "1"),
    // A worker that is being replaced has its connections wait here.
    ("net/core/somaxconn", "4096"),
    ("net/ipv4/tcp_max_syn_backlog", "8192"),
    // Channels announce a whole generation in one burst.
    ("net/core/wmem_max", "4194304"),
    // One descriptor per connection, in each worker.
    ("fs/nr_open", "1048576"),
    // Kernel addresses, logs and counters are nobody's business.
    ("kernel/kptr_restrict", "2"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/perf_event_paranoid", "3"),
    // An oops is a reboot, not a machine in an unknown state.
    ("kernel/panic_on_oops", "1"),
    // A program that changes its user leaves no memory behind.
    ("fs/suid_dumpable", "0"),
    // The appliance answers; it does not route, and it does not believe strangers about routes.
    ("net/ipv4/conf/all/rp_filter", "1"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
];

/// Settings that the kernel takes from each interface's own entry, whatever `all` says (Linux,
/// Documentation/networking/ip-sysctl.rst): they are written to every entry, `default` for later interfaces among them,
/// before any interface is up.
const EACH_INTERFACE: &[(&str, &str, &str)] = &[
    ("ipv4", "accept_redirects", "0"),
    ("ipv6", "accept_redirects", "0"),
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "autoconf", "0"),
];

/// Writes all settings. One that this kernel does not have is named and skipped.
pub(crate) fn set_all(settings: &Settings) -> Result<String, Failure> {
    let mut missing = String::new();
    for (name, value) in SYSCTLS {
        if let Err(e) = fs::write(format!("/proc/sys/{name}"), value) {
            let _ = write!(missing, "; {name}: {e}");
        }
    }
    for (family, name, value) in EACH_INTERFACE {
        let root = format!("/proc/sys/net/{family}/conf");
        let entries = match fs::read_dir(&root) {
            Ok(entries) => entries,
            Err(e) => {
                let _ = write!(missing, "; {root}: {e}");
                continue;
            }
        };
        for entry in entries.flatten() {
            if let Err(e) = fs::write(entry.path().join(name), value) {
                let _ = write!(missing, "; {}/{name}: {e}", entry.path().display());
            }
        }
    }
    let pages = settings.workers.huge_pages.word();
    for (file, word) in [("enabled", pages), ("defrag", "madvise")] {
        if let Err(e) = fs::write(format!("/sys/kernel/mm/transparent_hugepage/{file}"), word) {
            let _ = write!(missing, "; transparent_hugepage/{file}: {e}");
        }
    }
    // With huge pages on, the kernel keeps tens of MiB free so that they can be had; on a small machine that is more
    // than the whole appliance takes. So: the kernel's own figure for a machine without them (Linux, mm/page_alloc.c,
    // calculate_min_free_kbytes), written after the policy has been set, because setting it raises this.
    let reserve = (total_kib() * 16).isqrt().clamp(128, 262_144);
    if let Err(e) = fs::write("/proc/sys/vm/min_free_kbytes", reserve.to_string()) {
        let _ = write!(missing, "; vm/min_free_kbytes: {e}");
    }
    // Ctrl-Alt-Del is a request to init, not an instant reset.
    nix::sys::reboot::set_cad_enabled(false)?;
    raise_own_limits()?;
    let count = SYSCTLS.len() + EACH_INTERFACE.len();
    Ok(format!("{count} sysctls, huge pages {pages}, {reserve} KiB kept free{missing}"))
}

/// The machine's memory as the kernel counts it, in KiB.
pub(crate) fn total_kib() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram * u64::from(info.mem_unit) / 1024
}

/// Init keeps every socket and every generation's files.
fn raise_own_limits() -> Result<(), Failure> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let most = Some(1 << 20);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?)
}

/// Divides the cores that are online.
pub(crate) fn cores() -> Result<(Cores, String), Failure> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online")?;
    let online = parse_list(&online).ok_or_else(|| format!("/sys/devices/system/cpu/online says {online:?}"))?;
    let cores = Cores::divide(&online);
    let said = cores.to_string();
    Ok((cores, said))
}

/// Whether this kernel can do all that the roles' sandboxes are made of.
pub(crate) fn sandboxes() -> Result<String, Failure> {
    match sandbox::not_possible_here().as_slice() {
        [] => Ok("Landlock and seccomp; a role that cannot close its own does not run, a worker does not serve".into()),
        missing => Err(format!("this kernel has not: {}", missing.join(", ")).into()),
    }
}

/// Keeps interrupts and kernel work off the worker cores, where the hardware lets itself be told, and says what the
/// kernel really did.
pub(crate) fn steer_interrupts(cores: &Cores) -> Result<String, Failure> {
    if cores.shared() {
        return Ok("left where they are: every core shares".into());
    }
    let home = list(&cores.housekeeping);
    let mask = cores.housekeeping.iter().filter(|c| **c < 64).fold(0_u64, |mask, core| mask | 1 << core);
    // Masks are hexadecimal words of 32 bits (Linux, Documentation/core-api/irq/irq-affinity.rst).
    let mask =
        if mask >> 32 == 0 { format!("{mask:x}") } else { format!("{:x},{:08x}", mask >> 32, mask & 0xffff_ffff) };
    let default = fs::write("/proc/irq/default_smp_affinity", &mask).is_ok();
    let (mut moved, mut fixed) = (0, 0);
    for entry in fs::read_dir("/proc/irq")?.flatten().filter(|e| e.path().is_dir()) {
        match fs::write(entry.path().join("smp_affinity_list"), &home) {
            Ok(()) => moved += 1,
            Err(_) => fixed += 1,
        }
    }
    let queues = fs::write("/sys/devices/virtual/workqueue/cpumask", &mask).is_ok();
    Ok(format!(
        "{moved} on core {home}, {fixed} fixed by the hardware; default {}, workqueues {}",
        if default { "too" } else { "not" },
        if queues { "too" } else { "not" }
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parameters_are_found_among_the_kernels_own() {
        let p = Parameters::parse("console=ttyS0,115200 quiet gaia.on_failure=poweroff panic=5 gaia.console=ttyS1\n");
        assert_eq!(p, Parameters { on_failure: OnFailure::PowerOff, console: Some("ttyS1".into()) });
    }

    #[test]
    fn a_console_that_is_a_path_is_not_taken() {
        assert_eq!(Parameters::parse("gaia.console=../../etc gaia.on_failure=explode"), Parameters::default());
    }

    proptest! {
        #[test]
        fn any_command_line_is_read(line in "\\PC{0,300}") {
            let _ = Parameters::parse(&line);
        }
    }
}
