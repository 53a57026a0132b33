//! The appliance as the supervisor sees it: where each role runs, what it holds, where its words go.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gaia_init::roles::{Kind, Place, Role, users};
use gaia_init::settings::Settings;
use gaia_init::spawn::Confinement;
use gaia_init::supervise::Machine;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Resource;
use rustix::termios::{ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex};

use crate::cgroups::{Groups, folder_of_core};
use crate::data;
use crate::kernel::Parameters;
use crate::report::{Failure, Report};
use crate::watchdog::Watchdog;

/// Where control's API listens for the console.
const API: &str = "/run/control.sock";

/// What control is handed open.
pub(crate) struct Folders {
    /// The graph and its components, to read.
    pub(crate) seed: Option<OwnedFd>,
    /// Its own folder on the data disk, to keep what outlives it.
    pub(crate) data: Option<OwnedFd>,
}

/// The machine and what init holds of it.
pub(crate) struct Appliance {
    report: Report,
    groups: Groups,
    watchdog: Option<Watchdog>,
    terminal: Option<Terminal>,
    folders: Folders,
    null: OwnedFd,
    /// Where roles without a terminal write: the kernel's log. One open file for all of them, so a limit for each open
    /// file would be one for all: the command line has `printk.devkmsg=on`, and each role limits itself.
    words: OwnedFd,
    console_mode: &'static str,
    term: &'static str,
    /// Name servers and extra roots, as control reads them.
    dns: String,
    roots: String,
    /// The registries, as control reads them, if there are any.
    registries: Option<OwnedFd>,
    /// The sockets on which control is reached, with their names.
    control: Vec<(String, OwnedFd)>,
    /// The operators, as control reads them.
    operators: String,
    /// The collector of the log, as control reads it.
    export: Option<String>,
    /// The networks that may ask for metrics, as control reads them.
    collectors: String,
    /// The files of the ingress's certificate and its key, if there are any.
    secured: Option<(String, String)>,
}

impl Appliance {
    pub(crate) fn new(
        report: Report,
        settings: &Settings,
        groups: Groups,
        control: Vec<(String, OwnedFd)>,
        watchdog: Option<Watchdog>,
        terminal: Option<Terminal>,
        folders: Folders,
    ) -> Result<Self, rustix::io::Errno> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let words = rustix::fs::open("/dev/kmsg", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .or_else(|_| null.try_clone().map_err(|_| rustix::io::Errno::MFILE))?;
        let (console_mode, term) = (settings.console.mode.word(), settings.console.terminal.word());
        let server = |address: &IpAddr| SocketAddr::new(*address, 53).to_string();
        let dns = settings.network.dns.iter().map(server).collect::<Vec<_>>().join(" ");
        let roots = settings.egress.roots.join("\n");
        let secured = settings.ingress.certificate.clone().zip(settings.ingress.key.clone());
        let registries = settings.all_registries();
        let sealed = (!registries.is_empty()).then(|| registries.sealed()).transpose();
        let registries = sealed.map_err(|_| rustix::io::Errno::MFILE)?;
        let operators: Vec<String> = settings.operators.iter().map(|(name, key)| format!("{name}={key}")).collect();
        Ok(Self {
            report,
            groups,
            watchdog,
            terminal,
            folders,
            null,
            words,
            console_mode,
            term,
            dns,
            roots,
            registries,
            control,
            operators: operators.join(" "),
            export: settings.logs.export.as_ref().map(ToString::to_string),
            collectors: settings.metrics.allow.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            secured,
        })
    }
}

impl Appliance {
    /// Ends the data disk in order, and shows what is left to be shown, before the machine ends.
    pub(crate) fn finish(&mut self) {
        self.folders.data = None;
        if let Err(why) = data::close() {
            self.report.say(why);
        }
        self.report.finish();
    }
}

impl Machine for Appliance {
    fn say(&mut self, line: &str) {
        self.report.say(line);
    }

    fn show(&mut self) -> bool {
        self.report.show()
    }

    /// A terminal that was hung up is dead for whoever has it open, and one whose prompt has died may be in any mode: so each prompt gets it
    /// anew.
    fn prepare(&mut self, role: &Role) {
        if let Some(terminal) = &mut self.terminal
            && role.terminal
            && let Ok(port) = opened(&terminal.path)
        {
            terminal.port = port;
        }
    }

    fn confinement(&self, role: &Role, number: Option<usize>) -> Confinement<'_> {
        let mut limits = vec![(Resource::Nofile, role.max_files), (Resource::Core, 0)];
        limits.extend(role.max_cpu.map(|d| (Resource::Cpu, d.as_secs())));
        limits.extend(role.max_memory.map(|bytes| (Resource::As, bytes)));
        limits.extend(role.max_file.map(|bytes| (Resource::Fsize, bytes)));
        let (core, cgroups) = match role.place {
            Place::Housekeeping => (None, vec![self.groups.system.as_fd()]),
            Place::OwnCore => (number, self.groups.of_core(number)),
            Place::WorkerCores => {
                let core = number.and_then(|slot| self.groups.divided.of_keeper(slot));
                (core, self.groups.of_core(core))
            }
        };
        Confinement { user: role.user.id(number), core, cgroups, limits }
    }

    fn stdio(&self, role: &Role) -> [BorrowedFd<'_>; 3] {
        match &self.terminal {
            Some(terminal) if role.terminal => [terminal.port.as_fd(); 3],
            _ => [self.null.as_fd(), self.words.as_fd(), self.words.as_fd()],
        }
    }

    fn descriptors<'a>(&'a self, role: &Role) -> Vec<(String, BorrowedFd<'a>)> {
        let mut all = Vec::new();
        let mut add = |name: &str, fd: Option<&'a OwnedFd>| all.extend(fd.map(|fd| (name.to_owned(), fd.as_fd())));
        match role.kind {
            Kind::Control => {
                add("seed", self.folders.seed.as_ref());
                add("data", self.folders.data.as_ref());
                add("registries", self.registries.as_ref());
                self.control.iter().for_each(|(name, socket)| add(name, Some(socket)));
            }
            Kind::Console => add("written", self.report.written()),
            Kind::Worker | Kind::Keeper => {
                add("tick", Some(&self.groups.tick));
                add("memory", Some(&self.groups.memory));
            }
            _ => {}
        }
        all
    }

    fn environment(&self, role: &Role) -> Vec<(String, String)> {
        match role.kind {
            Kind::Control => {
                let mut all = vec![("GAIA_DNS".into(), self.dns.clone()), ("GAIA_ROOTS".into(), self.roots.clone())];
                all.push(("GAIA_OPERATORS".into(), self.operators.clone()));
                all.extend(self.export.clone().map(|to| ("GAIA_LOG_EXPORT".into(), to)));
                all.push(("GAIA_METRICS_ALLOW".into(), self.collectors.clone()));
                if let Some((certificate, key)) = &self.secured {
                    all.push(("GAIA_CERTIFICATE".into(), certificate.clone()));
                    all.push(("GAIA_KEY".into(), key.clone()));
                }
                all
            }
            Kind::Console => vec![
                ("GAIA_API".into(), API.into()),
                ("GAIA_CONSOLE".into(), self.console_mode.into()),
                ("TERM".into(), self.term.into()),
            ],
            Kind::Worker | Kind::Keeper => vec![("GAIA_MEMORY".into(), self.groups.memory_max.to_string())],
            #[cfg(feature = "debug-role")]
            Kind::Debug => vec![("GAIA_API".into(), API.into())],
            _ => Vec::new(),
        }
    }

    fn group_of_core(&self, core: usize) -> Option<String> {
        Some(folder_of_core(core))
    }

    fn pet(&mut self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.pet();
        }
    }
}

/// Opens the socket of control's API. It belongs to the console's user; nobody else can connect.
pub(crate) fn api_socket() -> Result<(OwnedFd, String), Failure> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(API)?)?;
    rustix::net::listen(&socket, 16)?;
    rustix::fs::chmod(API, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::chown(
        API,
        Some(rustix::fs::Uid::from_raw(users::CONSOLE)),
        Some(rustix::fs::Gid::from_raw(users::CONSOLE)),
    )?;
    Ok((socket, API.into()))
}

/// The terminal of the prompt.
pub(crate) struct Terminal {
    path: String,
    port: OwnedFd,
}

/// Finds the terminal of the prompt and opens it.
pub(crate) fn terminal(parameters: &Parameters) -> Result<(Terminal, String), Failure> {
    let name = match &parameters.console {
        Some(name) => name.clone(),
        None => {
            let active = std::fs::read_to_string("/sys/class/tty/console/active")?;
            active
                .split_whitespace()
                .last()
                .ok_or("the kernel has no console: add console=ttyS0,115200 to its command line")?
                .to_owned()
        }
    };
    let path = format!("/dev/{name}");
    let port = opened(&path)?;
    Ok((Terminal { path: path.clone(), port }, path))
}

/// Opens a terminal and sets it so that nobody at the line can stall the appliance: no flow control by characters or lines (a ^S or a missing
/// CTS would stop every writer), no hang-up when the carrier goes. It sends each key, shows none and makes none a signal: the prompt does that,
/// and may not set anything itself. A line feed that is written stays a new line.
fn opened(path: &str) -> Result<OwnedFd, Failure> {
    // Non-blocking for the opening only: a port without a carrier must not be waited for.
    let open = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let port = rustix::fs::open(path, open, Mode::empty()).map_err(|e| format!("{path}: {e}"))?;
    rustix::fs::fcntl_setfl(&port, OFlags::empty())?;
    let mut mode = rustix::termios::tcgetattr(&port).map_err(|e| format!("{path} is no terminal: {e}"))?;
    let input = InputModes::IXON | InputModes::IXOFF | InputModes::INLCR | InputModes::IGNCR | InputModes::ISTRIP;
    mode.input_modes -= input | InputModes::BRKINT | InputModes::PARMRK;
    mode.input_modes |= InputModes::ICRNL | InputModes::IGNBRK;
    mode.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
    mode.control_modes |= ControlModes::CLOCAL | ControlModes::CS8;
    mode.control_modes -= ControlModes::CRTSCTS;
    mode.local_modes -= LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO | LocalModes::IEXTEN;
    mode.special_codes[SpecialCodeIndex::VMIN] = 1;
    mode.special_codes[SpecialCodeIndex::VTIME] = 0;
    // What waits to be shown is not waited for.
    rustix::termios::tcsetattr(&port, OptionalActions::Now, &mode)?;
    Ok(port)
}
