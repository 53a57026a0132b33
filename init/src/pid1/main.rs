//! PID 1 of the appliance.
//!
//! Owns the machine: mounts, kernel settings, cores, network, listening sockets, watchdog, and the processes. It
//! runs one thread, has no async runtime, and after the boot report it is [`gaia_init::supervise`]'s loop until the
//! end. Called by the kernel, ended by the kernel. Each step of the boot prints one line with its milliseconds and
//! what it achieved; a step that fails says so and the boot goes on with what there is, because a device that
//! answers "no network: …" on its console can be mended, and one that stops cannot. Only what confines the roles is
//! needed whole: without cgroups, or with a file system that could still be changed, nothing is served.
//!
//! What it reads that others wrote is listed in the library's top comment.

mod cgroups;
mod data;
mod kernel;
mod machine;
mod mounts;
mod network;
mod power;
mod report;
mod watchdog;

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use gaia_init::cores::Cores;
use gaia_init::listeners::{Listener, Opened, Protocol};
use gaia_init::roles::Kind;
use gaia_init::settings::{ConsoleMode, Prefix, Settings};
use gaia_init::supervise::Supervisor;
use gaia_init::{listeners, registries, settings};
use rustix::fs::{Mode, OFlags};

use crate::machine::{Appliance, Folders};
use crate::report::Report;

/// Where the archive beside the system puts the device's settings, the graph and the components.
const SEED: &str = "/seed";

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("gaia-init is PID 1 of the appliance; on a workstation use `make run`.");
        return ExitCode::from(64);
    }
    std::panic::set_hook(Box::new(power::panicked));
    let Err(why) = boot_and_supervise();
    power::fail(&why)
}

/// Everything from the first mount to the end of the machine. An error is one that PID 1 cannot live with.
fn boot_and_supervise() -> Result<Infallible, String> {
    mounts::first().map_err(|e| e.to_string())?;
    let parameters = kernel::Parameters::read();
    power::set_policy(parameters.on_failure);
    let mut report = Report::open();
    report.line(&format!("gaia {} on {}", env!("CARGO_PKG_VERSION"), kernel::name()));
    // Of a step without a `?` the report has shown the error, and there is life without it.
    let _ = report.step("mounts", mounts::rest);
    let settings = report.step("settings", read_settings).unwrap_or_default();
    let _ = report.step("kernel", || kernel::set_all(&settings));
    let cores = report.step("cores", kernel::cores).unwrap_or_else(|_| Cores::divide(&[]));
    let groups = report.step("cgroups", || cgroups::Groups::make(&cores, kernel::total_kib() * 1024))?;
    report.step("sandboxes", kernel::sandboxes)?;
    let _ = report.step("interrupts", || kernel::steer_interrupts(&cores));
    let _ = report.step("network", || network::up(&settings.network));
    let listeners = report.step("listeners", || listen(&settings.ingress, &cores));
    let api = report.step("control socket", machine::api_socket).ok();
    let mut control = report.step("operators", || operators(&settings)).unwrap_or_default();
    if let Some(port) = settings.metrics.port {
        control.extend(report.step("metrics", || metrics(port, &settings.metrics.allow)).unwrap_or_default());
    }
    control.extend(api.map(|socket| ("api".to_owned(), socket)));
    // Before the watchdog, which nobody feeds meanwhile: a long journal is no hang.
    let data = report.step("data", data::open).ok().flatten();
    let watchdog = report.step("watchdog", watchdog::Watchdog::open).ok().flatten();
    let terminal = report.step("console", || machine::terminal(&parameters)).ok();
    let _ = report.step("programs", mounts::unpack);
    report.step("seal", mounts::seal)?;
    let seed = rustix::fs::open(SEED, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty()).ok();
    let folders = Folders { seed, data };

    let mut standing = vec![Kind::Control];
    if terminal.is_some() && settings.console.mode != ConsoleMode::Off {
        standing.push(Kind::Console);
    }
    #[cfg(feature = "debug-role")]
    standing.push(Kind::Debug);
    let appliance =
        Appliance::new(report, &settings, groups, control, watchdog, terminal, folders).map_err(|e| e.to_string())?;
    let supervisor = Supervisor::new(appliance, cores, listeners.unwrap_or_default(), &standing);
    let mut supervisor = supervisor.map_err(|e| e.to_string())?;
    let end = supervisor.run().map_err(|e| e.to_string())?;
    network::down();
    supervisor.machine().finish();
    // Inside, so that the watchdog is still held while the machine ends: closing it unasked is an alarm.
    power::end(end)
}

/// Opens the listening sockets and says which are missing, and why.
fn listen(ingress: &settings::Ingress, cores: &Cores) -> Result<(Vec<Listener>, String), report::Failure> {
    let all = [(Protocol::Http, &ingress.http), (Protocol::Https, &ingress.https)];
    let ports: Vec<u16> = all.iter().flat_map(|(_, ports)| ports.iter().copied()).collect();
    let addresses: Vec<_> = all.iter().flat_map(|(of, ports)| listeners::everywhere(*of, ports)).collect();
    let Opened { listeners, errors, only_v4 } = listeners::open(&addresses, &cores.workers);
    let wrong = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let mut said = format!("{} sockets on port {ports:?}, one per worker core and family", listeners.len());
    if ports.is_empty() {
        said = "no port is configured: [ingress] http = [80] in gaia.toml".into();
    } else if listeners.is_empty() {
        return Err(format!("no socket listens: {wrong}").into());
    }
    if only_v4 {
        said.push_str("; none for IPv6, which this kernel does not have");
    }
    if !wrong.is_empty() {
        said = format!("FAILED: {wrong}; what is there: {said}");
    }
    Ok((listeners, said))
}

/// Opens the sockets on which operators reach control, if there are operators.
fn operators(settings: &Settings) -> Result<(Vec<(String, OwnedFd)>, String), report::Failure> {
    let names: Vec<String> = settings.operators.keys().map(ToString::to_string).collect();
    if names.is_empty() {
        return Ok((Vec::new(), "none are listed: the console alone operates".into()));
    }
    let (sockets, errors) = listeners::open_control(settings.control.port);
    let wrong = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let mut said = format!("{} on port {}", names.join(", "), settings.control.port);
    if sockets.is_empty() {
        return Err(format!("no socket listens for {said}: {wrong}").into());
    }
    if !wrong.is_empty() {
        said = format!("FAILED: {wrong}; what is there: {said}");
    }
    Ok((sockets, said))
}

/// Opens the sockets on which control answers with metrics.
fn metrics(port: u16, allowed: &[Prefix]) -> Result<(Vec<(String, OwnedFd)>, String), report::Failure> {
    let (sockets, errors) = listeners::open_metrics(port);
    let wrong = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let whom = allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let said = format!("on port {port}, in the clear, for {}", if whom.is_empty() { "everybody" } else { &whom });
    if sockets.is_empty() {
        return Err(format!("no socket listens {said}: {wrong}").into());
    }
    Ok((sockets, if wrong.is_empty() { said } else { format!("FAILED: {wrong}; what is there: {said}") }))
}

/// Reads `gaia.toml`. What does not parse becomes safe defaults, and the console says why.
fn read_settings() -> Result<(Settings, String), report::Failure> {
    let path = format!("{SEED}/gaia.toml");
    let file: OwnedFd = match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT) => return Ok((Settings::default(), format!("no {path}: defaults"))),
        Err(e) => return Err(format!("{path}: {e}; going on with defaults").into()),
    };
    let size = rustix::fs::fstat(&file).map_err(|e| format!("{path}: {e}"))?.st_size.cast_unsigned();
    if size > settings::MAX_BYTES {
        return Err(format!(
            "{path} has {size} bytes, at most {} are read; going on with defaults",
            settings::MAX_BYTES
        )
        .into());
    }
    let text = std::io::read_to_string(std::fs::File::from(file)).map_err(|e| format!("{path}: {e}"))?;
    let parsed = settings::parse(&text).map_err(|e| format!("{path}: {e}\ngoing on with defaults"))?;
    let mut said = format!(
        "{path}: {} addresses, http on {:?}, https on {:?}, huge pages {}",
        parsed.network.address.len(),
        parsed.ingress.http,
        parsed.ingress.https,
        parsed.workers.huge_pages.word()
    );
    let known = parsed.all_registries();
    if !known.is_empty() {
        let names: Vec<&str> = known.names().into_iter().map(registries::Host::as_str).collect();
        let any = if known.registry.any { " and any public one" } else { "" };
        said += &[", registries ", &names.join(" "), any].concat();
    }
    Ok((parsed, said))
}
