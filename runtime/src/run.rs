//! `gaia run`: a graph on a workstation. A launcher in init's place: the same table of roles and the same supervisor, in
//! an ordinary process.
//!
//! ```text
//! gaia run ── supervisor, one thread
//!  ├─ control      the manifest's folder in place of the seed
//!  ├─ compile …
//!  ├─ worker × core
//!  ├─ keeper × pinned
//!  └─ log          `gaia logs --follow` on this terminal
//! ```
//!
//! What it cannot do without privileges, or on this kernel, it says when it starts. The roles are in the same sandboxes as on
//! the appliance, unless somebody who measures wants to know what they cost. It opens one socket for
//! `gaia status`, `ps` and `logs`, in a folder of its own that nobody else may enter, and removes it at the end.

use std::cell::Cell;
use std::ffi::CStr;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use gaia_init::collector::Collector;
use gaia_init::cores::Cores;
use gaia_init::lines::Lines;
use gaia_init::listeners::{self, Listener, METRICS_PREFIX, Protocol};
use gaia_init::registries::Registries;
use gaia_init::roles::{Kind, Place, Role};
use gaia_init::sandbox::{self, Demand};
use gaia_init::spawn::Confinement;
use gaia_init::supervise::{End, Machine, Supervisor};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::Resource;

use crate::failure::{Failure, Kind as Failing};
use crate::log::text::clock;
use crate::progress::Progress;
use crate::registries;

/// The port of name servers.
const DNS: u16 = 53;
/// Where this machine has its own.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The variable in which the log's process is told to write JSON.
pub const JSON: &str = "GAIA_JSON";

/// A limit for core files that stops those that are piped to a program, too, to which 0 means nothing: the kernel takes 1 for
/// its own sign not to (Linux 6.12, fs/coredump.c, `do_coredump`), and no file is as short as that. There may be secrets in a core.
const NO_CORE: u64 = 1;

/// What is to be run, and how. The words are those of `gaia help run`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The manifest; images are looked up beside it
    #[arg(required_unless_present = "data")]
    pub file: Option<PathBuf>,
    /// Keep a store in this folder, so that graphs can be deployed here: one that was deployed is served in place of the manifest
    #[arg(long, value_name = "FOLDER", conflicts_with = "watch")]
    pub data: Option<PathBuf>,
    /// Deploy again when the manifest or a component changes
    #[arg(long)]
    pub watch: bool,
    /// Where to listen for HTTP; may be given more than once
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    pub listen: Vec<SocketAddr>,
    /// Where to listen for HTTP over TLS; may be given more than once
    #[arg(long, value_name = "ADDRESS:PORT", requires = "certificate")]
    pub tls_listen: Vec<SocketAddr>,
    /// The certificate to serve TLS with and those that lead to its authority, in PEM; read again when it changes
    #[arg(long, value_name = "FILE", requires = "key")]
    pub certificate: Option<PathBuf>,
    /// The certificate's private key, in PEM, readable by its owner alone
    #[arg(long, value_name = "FILE", requires = "certificate")]
    pub key: Option<PathBuf>,
    /// How many workers at most; one core each
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// A name server for the branes' look-ups; may be given more than once [default: this machine's]
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = name_server)]
    pub dns: Vec<SocketAddr>,
    /// Certificates, in PEM, of authorities that requests to the outside trust besides; may be given more than once
    #[arg(long = "root", value_name = "FILE")]
    pub roots: Vec<PathBuf>,
    /// The values of secrets: TOML, for each brane a table with NAME = "value", readable by its owner alone
    #[arg(long, value_name = "FILE")]
    pub secrets: Option<PathBuf>,
    /// A registry that images may name; may be given more than once, and names without one are looked for in the first
    #[arg(long, value_name = "HOST", value_parser = registry)]
    pub registry: Vec<gaia_init::registries::Host>,
    /// The registries, and as whom each is asked: the tables `registry` and `registries` of gaia.toml, or docker's config.json
    #[arg(long, value_name = "FILE")]
    pub registries: Option<PathBuf>,
    /// Where to answer /metrics in the clear
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Memory that all workers together may have, as in 512MiB; half of the machine's, if not said
    #[arg(long, value_name = "SIZE", value_parser = gaia_manifest::units::size)]
    pub memory: Option<u64>,
    /// Send the log to this collector, too
    #[arg(long, value_name = "syslog+tls://HOST[:PORT]")]
    pub log_export: Option<Collector>,
    /// Leave the log where it is kept, as an appliance does: `gaia logs` shows it
    #[arg(long, short)]
    pub quiet: bool,
    /// Leave every process without its sandbox, to measure what it costs: never with a component that you do not trust
    #[arg(long)]
    pub without_sandbox: bool,
    /// What workers and keepers leave out, to measure what it costs
    #[arg(long, hide = true, value_delimiter = ',', value_parser = ["log", "profile"])]
    pub without: Vec<String>,
}

/// Reads the address of a name server, which has port 53 unless it says another.
///
/// # Errors
/// That it is none.
pub fn name_server(text: &str) -> Result<SocketAddr, String> {
    let bare = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS));
    bare.or_else(|_| text.parse()).map_err(|_| "not an address, such as 9.9.9.9, [::1]:5353 or 127.0.0.1:5353".into())
}

fn registry(text: &str) -> Result<gaia_init::registries::Host, String> {
    text.to_owned().try_into()
}

/// What is said about registries, in all.
fn registries(options: &Options) -> anyhow::Result<Registries> {
    let mut all = options.registries.as_deref().map(registries::read).transpose()?.unwrap_or_default();
    for host in &options.registry {
        all.registries.entry(host.clone()).or_default();
    }
    if all.registry.default.is_none() {
        all.registry.default = options.registry.first().cloned();
    }
    all.check().map_err(anyhow::Error::msg)?;
    // Whoever named one that is none is to hear of it here.
    registries::Known::of(&all)?;
    Ok(all)
}

/// The name servers of a `resolv.conf` (resolv.conf(5)). One with a zone is passed over: what a zone is called means
/// nothing to a socket.
fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split([' ', '\t']);
        let address = (words.next() == Some("nameserver")).then(|| words.find(|word| !word.is_empty()))??;
        Some(SocketAddr::new(address.parse().ok()?, DNS))
    };
    resolv_conf.lines().filter_map(server).collect()
}

/// Runs a graph until it is interrupted. Failure means that it never served, or that the supervision broke.
///
/// Must be called while the process has a single thread.
///
/// # Errors
/// If the manifest cannot be read, an address is taken, or the system refuses what is needed.
pub fn run(options: &Options, json: bool) -> anyhow::Result<ExitCode> {
    let folder = options.file.as_ref().map(|file| {
        File::open(file).with_context(|| format!("{}", file.display()))?;
        let folder = file.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).with_context(|| format!("{}", folder.display()))
    });
    let folder = folder.transpose()?;
    let data = options.data.as_ref().map(|data| {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(data).and_then(|()| File::open(data));
        made.with_context(|| format!("{}", data.display()))
    });
    let data = data.transpose()?;
    let cores = cores(options.workers);
    let plain = options.listen.iter().map(|address| (Protocol::Http, *address));
    let addresses: Vec<_> = plain.chain(options.tls_listen.iter().map(|a| (Protocol::Https, *a))).collect();
    let listeners = listen(&addresses, &cores)?;
    let own = Own::make()?;
    for root in options.roots.iter().chain(&options.secrets) {
        File::open(root).with_context(|| format!("{}", root.display()))?;
    }
    let metrics = options.metrics.map(|address| {
        let listener = TcpListener::bind(address);
        listener.with_context(|| format!("{address} cannot be had; another one: --metrics 127.0.0.1:9465"))
    });
    let metrics = metrics.transpose()?;
    let registries = registries(options)?;
    let mut launcher = Launcher::new(options, folder.map(OwnedFd::from), data.map(OwnedFd::from), &own, cores.clone())?;
    launcher.registries = (!registries.is_empty()).then(|| registries.sealed()).transpose()?;
    launcher.json = json;
    launcher.progress = Progress::on_terminal(!json);
    launcher.metrics = metrics.map(OwnedFd::from);
    let mut missing = vec!["users of their own", "cgroups"];
    if options.without_sandbox {
        anyhow::ensure!(
            std::process::id() != 1,
            "no child of process 1 is without a sandbox: --without-sandbox is not for containers"
        );
        missing.push("any sandbox");
    } else {
        missing.extend(sandbox::not_possible_here());
    }
    launcher.say(&format!("not enforced here: {}; the appliance has all of it", missing.join(", ")));
    launcher.say(&format!("{cores}; operate it with: gaia --api {} ps", own.socket().display()));
    if options.without_sandbox {
        launcher.say(
            "WARNING: --without-sandbox is for measuring. A component that breaks out of WebAssembly has all that this user has",
        );
    }
    let standing: &[Kind] = if options.quiet { &[Kind::Control] } else { &[Kind::Control, Kind::Log] };
    let mut supervisor = Supervisor::new(launcher, cores, listeners, standing)?;
    supervisor.run()?;
    let served = supervisor.serving().is_some();
    supervisor.machine().finish();
    Ok(if served { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The cores this process may use, divided as on the appliance.
fn cores(most: Option<NonZeroUsize>) -> Cores {
    let set = rustix::thread::sched_getaffinity(None).ok();
    let online: Vec<usize> =
        set.iter().flat_map(|set| (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core))).collect();
    let mut cores = Cores::divide(&online);
    cores.workers.truncate(most.map_or(usize::MAX, NonZeroUsize::get));
    cores
}

fn listen(addresses: &[(Protocol, SocketAddr)], cores: &Cores) -> anyhow::Result<Vec<Listener>> {
    for (at, (_, address)) in addresses.iter().enumerate() {
        anyhow::ensure!(!addresses[..at].iter().any(|(_, other)| other == address), "{address} is named twice");
        // The sockets themselves share their port with each other, so they would share it with a stranger's as well.
        let free = TcpListener::bind(address);
        free.map_err(|e| {
            let help = "somebody else listens there? Another one: --listen 127.0.0.1:8081, or --listen 127.0.0.1:0 for any that is free";
            Failure::new(Failing::Usage, format!("{address} cannot be had: {e}")).help(help)
        })?;
    }
    let opened = listeners::open(addresses, &cores.workers);
    match opened.errors.into_iter().next() {
        Some(error) => Err(error.into()),
        None => Ok(opened.listeners),
    }
}

/// A folder of this process's own, with the socket of control's API; both are gone when it is dropped.
struct Own {
    folder: PathBuf,
    listener: UnixListener,
}

impl Own {
    fn make() -> anyhow::Result<Self> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = parent.join(format!("gaia-run-{}", std::process::id()));
        // One that is there belongs to a process that had this number before and did not end well, or to a stranger:
        // then making it anew fails.
        let _ = std::fs::remove_file(folder.join("control.sock"));
        let _ = std::fs::remove_dir(&folder);
        DirBuilder::new().mode(0o700).create(&folder).with_context(|| format!("{}", folder.display()))?;
        let socket = folder.join("control.sock");
        let listener = UnixListener::bind(&socket).with_context(|| format!("{}", socket.display()))?;
        Ok(Self { folder, listener })
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// An ordinary process as the supervisor sees it.
struct Launcher {
    file: Option<String>,
    watch: bool,
    folder: Option<OwnedFd>,
    data: Option<OwnedFd>,
    registries: Option<OwnedFd>,
    api: OwnedFd,
    socket: String,
    dns: Vec<SocketAddr>,
    roots: Vec<String>,
    secrets: Option<String>,
    secured: Option<(String, String)>,
    export: Option<Collector>,
    /// The socket on which control answers with metrics.
    metrics: Option<OwnedFd>,
    null: OwnedFd,
    /// Bytes of memory that each worker may have, and each keeper.
    memory: u64,
    /// What workers and keepers leave out.
    without: String,
    demand: Demand,
    cores: Cores,
    /// What waits for standard error.
    lines: Lines,
    json: bool,
    /// How far the start is, until the first generation serves.
    progress: Progress,
    /// Compilers that were started before that, and whether workers were.
    begun: Cell<(usize, bool)>,
    error: OwnedFd,
    output: OwnedFd,
}

impl Launcher {
    fn new(
        options: &Options,
        folder: Option<OwnedFd>,
        data: Option<OwnedFd>,
        own: &Own,
        cores: Cores,
    ) -> io::Result<Self> {
        let dns = match options.dns.as_slice() {
            [] => name_servers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default()),
            said => said.to_vec(),
        };
        let absolute = |root: &PathBuf| Ok(std::path::absolute(root)?.to_string_lossy().into_owned());
        let info = rustix::system::sysinfo();
        let memory = options.memory.unwrap_or(info.totalram * u64::from(info.mem_unit) / 2);
        Ok(Self {
            memory: memory / cores.workers.len().max(1) as u64,
            without: options.without.join(" "),
            demand: if options.without_sandbox { Demand::Nothing } else { Demand::Possible },
            cores,
            dns,
            roots: options.roots.iter().map(absolute).collect::<io::Result<_>>()?,
            secrets: options.secrets.as_ref().map(absolute).transpose()?,
            secured: match options.certificate.as_ref().zip(options.key.as_ref()) {
                Some((certificate, key)) => Some((absolute(certificate)?, absolute(key)?)),
                None => None,
            },
            export: options.log_export.clone(),
            metrics: None,
            file: options.file.as_ref().map(|file| file.to_string_lossy().into_owned()),
            watch: options.watch,
            folder,
            data,
            registries: None,
            api: own.listener.try_clone()?.into(),
            socket: own.socket().to_string_lossy().into_owned(),
            null: File::options().read(true).write(true).open("/dev/null")?.into(),
            lines: Lines::default(),
            json: false,
            progress: Progress::default(),
            begun: Cell::default(),
            error: io::stderr().as_fd().try_clone_to_owned()?,
            output: io::stdout().as_fd().try_clone_to_owned()?,
        })
    }

    /// A process is about to be started: that is how far it is.
    fn starts(&self, kind: Kind) {
        let (compilers, _) = self.begun.get();
        match kind {
            Kind::Compile => {
                self.begun.set((compilers + 1, false));
                self.progress.doing(&format!("compiling, component {}", compilers + 1));
            }
            Kind::Worker => {
                self.begun.set((compilers, true));
                self.progress.doing("starting the workers");
            }
            _ => {}
        }
        self.progress.draw();
    }

    /// Shows what is left, for at most a second.
    fn finish(&mut self) {
        for _ in 0..50 {
            if !self.show() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Machine for Launcher {
    fn say(&mut self, line: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.json {
            return self.relay(line);
        }
        self.relay(&format!("Ω {} gaia {line}", clock(now)));
    }

    fn relay(&mut self, line: &str) {
        self.progress.clear();
        if self.begun.get().1 {
            // The log may write to this terminal from here on, and nobody else's line survives that.
            self.progress = Progress::default();
        }
        let line = if self.json { serde_json::json!({ "said": line }).to_string() } else { line.to_owned() };
        self.lines.push(line + "\n");
        self.show();
    }

    fn show(&mut self) -> bool {
        let error = &self.error;
        // A terminal may be stopped, and standard error is not this process's alone to make non-blocking. One line at a
        // time is never more than what is free when it says that it is ready.
        self.lines.write(|bytes| {
            let mut ready = [PollFd::new(error, PollFlags::OUT)];
            match rustix::event::poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Ok(0) => Err(Errno::AGAIN),
                Ok(_) => rustix::io::write(error, bytes),
                Err(e) => Err(e),
            }
        })
    }

    /// The program that runs, whatever has taken its place on the disk since it was started.
    fn program(&self, _: &Role) -> &CStr {
        c"/proc/self/exe"
    }

    fn farewell(&self, _: End) -> &'static str {
        "going down"
    }

    fn confinement(&self, role: &Role, number: Option<usize>) -> Confinement<'_> {
        self.starts(role.kind);
        let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let mut limits = vec![(Resource::Nofile, role.max_files.min(most)), (Resource::Core, NO_CORE)];
        limits.extend(role.max_cpu.map(|d| (Resource::Cpu, d.as_secs())));
        limits.extend(role.max_memory.map(|bytes| (Resource::As, bytes)));
        limits.extend(role.max_file.map(|bytes| (Resource::Fsize, bytes)));
        let core = match role.place {
            Place::OwnCore => number,
            Place::WorkerCores => number.and_then(|slot| self.cores.of_keeper(slot)),
            Place::Housekeeping => None,
        };
        Confinement { user: None, core, cgroups: Vec::new(), limits }
    }

    fn stdio(&self, role: &Role) -> [BorrowedFd<'_>; 3] {
        let output = if role.terminal { &self.output } else { &self.error };
        [self.null.as_fd(), output.as_fd(), self.error.as_fd()]
    }

    fn descriptors(&self, role: &Role) -> Vec<(String, BorrowedFd<'_>)> {
        match role.kind {
            Kind::Control => {
                let mut all = vec![("api".into(), self.api.as_fd())];
                all.extend(self.folder.as_ref().map(|folder| ("seed".into(), folder.as_fd())));
                all.extend(self.data.as_ref().map(|data| ("data".into(), data.as_fd())));
                all.extend(self.registries.as_ref().map(|file| ("registries".into(), file.as_fd())));
                all.extend(self.metrics.as_ref().map(|socket| (format!("{METRICS_PREFIX}run"), socket.as_fd())));
                all
            }
            _ => Vec::new(),
        }
    }

    fn environment(&self, role: &Role) -> Vec<(String, String)> {
        match role.kind {
            Kind::Control => {
                let mut all = Vec::new();
                all.extend(self.file.clone().map(|file| ("GAIA_GRAPH".into(), file)));
                all.extend(self.watch.then(|| ("GAIA_WATCH".into(), "1".into())));
                all.push(("GAIA_DNS".into(), spaced(&self.dns)));
                all.push(("GAIA_ROOTS".into(), self.roots.join("\n")));
                all.extend(self.export.as_ref().map(|to| ("GAIA_LOG_EXPORT".into(), to.to_string())));
                all.extend(self.secrets.clone().map(|path| ("GAIA_SECRETS".into(), path)));
                if let Some((certificate, key)) = &self.secured {
                    all.push(("GAIA_CERTIFICATE".into(), certificate.clone()));
                    all.push(("GAIA_KEY".into(), key.clone()));
                }
                all
            }
            Kind::Worker | Kind::Keeper => {
                vec![("GAIA_MEMORY".into(), self.memory.to_string()), ("GAIA_WITHOUT".into(), self.without.clone())]
            }
            Kind::Log => {
                let json = self.json.then(|| (JSON.into(), "1".into()));
                [("GAIA_API".into(), self.socket.clone())].into_iter().chain(json).collect()
            }
            _ => Vec::new(),
        }
    }

    fn demand(&self) -> Demand {
        self.demand
    }

    fn pet(&mut self) {
        self.progress.draw();
    }
}

/// As control reads them.
fn spaced(servers: &[SocketAddr]) -> String {
    servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_name_servers_of_a_machine_are_found_in_its_resolv_conf() {
        let text = "# nameserver 1.1.1.1\nsearch example.org\nnameserver 9.9.9.9\nnameserver\t 2620:fe::fe  # two\n\
                    nameserver fe80::1%eth0\nnameserver\nnameservers 8.8.8.8\n nameserver 8.8.4.4\noptions edns0\n";
        assert_eq!(spaced(&name_servers(text)), "9.9.9.9:53 [2620:fe::fe]:53");
    }

    #[test]
    fn a_name_server_has_port_53_unless_it_says_another() {
        for (text, wanted) in [("9.9.9.9", "9.9.9.9:53"), ("::1", "[::1]:53"), ("127.0.0.1:5353", "127.0.0.1:5353")] {
            assert_eq!(name_server(text).unwrap().to_string(), wanted);
        }
        assert_eq!(name_server("[::1]:5353").unwrap().to_string(), "[::1]:5353");
        for wrong in ["", "dns.example", "9.9.9.9:", "9.9.9.9:65536"] {
            assert!(name_server(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_resolv_conf_is_read(text in "((nameserver|#|[a-z]{0,9})[ \\t]{0,2}[0-9a-f.:%]{0,20}\\n?|\\PC{0,20}){0,9}") {
            for server in name_servers(&text) {
                prop_assert_eq!(server.port(), DNS);
                prop_assert!(text.contains("nameserver"));
            }
        }

        #[test]
        fn each_server_that_is_listed_is_found(servers in proptest::collection::vec(any::<IpAddr>(), 0..5)) {
            let text = servers.iter().fold(String::new(), |text, server| text + &format!("nameserver {server}\n"));
            let found: Vec<IpAddr> = name_servers(&text).iter().map(SocketAddr::ip).collect();
            prop_assert_eq!(found, servers);
        }
    }

    #[test]
    fn a_taken_address_is_refused_although_the_sockets_would_share_it() {
        let cores = Cores::divide(&[0]);
        let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (plain, secure) = ((Protocol::Http, address), (Protocol::Https, address));
        let held = listen(&[plain], &cores).unwrap();
        let error = listen(&[plain], &cores).err().unwrap();
        assert!(format!("{error:#}").contains(&address.to_string()), "{error:#}");
        drop(held);
        let error = listen(&[plain, secure], &cores).err().unwrap();
        assert!(format!("{error:#}").contains("named twice"), "{error:#}");
        assert!(listen(&[secure], &cores).is_ok());
    }

    #[test]
    fn the_socket_is_in_a_folder_of_its_own_and_goes_with_it() {
        let own = Own::make().unwrap();
        let folder = own.folder.clone();
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&folder).unwrap());
        assert_eq!(mode & 0o777, 0o700);
        assert!(own.socket().exists());
        drop(own);
        assert!(!folder.exists());
    }
}
