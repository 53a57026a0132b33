//! One machine: what it is made of, and its life from boot to exit.

use crate::accel::{Accel, Qemu, Version};
use crate::console::Console;
use crate::debug::{self, DebugChannel};
use crate::error::{Error, Tail};
use crate::net::{self, Forward, Net, UserNet};
use crate::process::{self, Exit, Process};
use crate::qmp::{Event, Qmp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// From the start of the process to its three connections; a busy host needs seconds.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// From `quit` or a kill to the end of the process.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What a machine is made of. Starts out as q35 with 512 MiB, two processors, a restricted user network without forwards, a
/// random number generator, and a watchdog; a reboot ends it.
///
/// ```
/// use gaia_qemu::{Forward, MachineBuilder};
/// let machine = MachineBuilder::new("bzImage").initrd("init.cpio").initrd("branes.cpio").append("quiet").memory_mib(256);
/// let machine = machine.forward(Forward::to(8080)).forward("2222:22".parse().unwrap());
/// ```
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own, set by its own method")]
#[must_use = "a builder does nothing until Machine::boot"]
pub struct MachineBuilder {
    kernel: Option<PathBuf>,
    initrds: Vec<PathBuf>,
    append: Vec<String>,
    memory_mib: u32,
    cpus: u32,
    net: Net,
    watchdog: bool,
    exit_on_reboot: bool,
    debug_channel: bool,
    paused: bool,
    drives: Vec<Drive>,
    transcript: Option<PathBuf>,
    accel: Option<Accel>,
    args: Vec<OsString>,
}

/// A disk of the machine, on virtio: the first is the guest's `/dev/vda`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive(Backing);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Backing {
    File(PathBuf),
    Nbd(PathBuf),
}

impl Drive {
    /// A file with the disk's bytes. What the guest has flushed is on this machine's disk; no second machine may use it at
    /// the same time, which QEMU sees to.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Backing::File(path.into()))
    }

    /// A server of the NBD protocol that listens on this Unix socket, its export without a name. The guest's flushes are the
    /// server's, and without the server the guest's requests wait for ever.
    pub fn nbd(socket: impl Into<PathBuf>) -> Self {
        Self(Backing::Nbd(socket.into()))
    }

    /// Makes its path absolute: QEMU runs in a directory of its own.
    fn locate(&mut self) -> Result<(), Error> {
        match &mut self.0 {
            Backing::File(path) => *path = readable("disk", path)?,
            Backing::Nbd(path) => {
                let absolute = std::path::absolute(&*path);
                *path = absolute.map_err(|source| Error::File { role: "disk", path: path.clone(), source })?;
            }
        }
        Ok(())
    }

    fn argv(&self, number: usize) -> [String; 4] {
        // A comma ends a value in QEMU's options unless it is doubled.
        let escaped = |path: &Path| path.to_string_lossy().replace(',', ",,");
        let backing = match &self.0 {
            Backing::File(path) => format!("file.driver=file,file.filename={}", escaped(path)),
            Backing::Nbd(path) => {
                format!("file.driver=nbd,file.server.type=unix,file.server.path={}", escaped(path))
            }
        };
        let drive = format!("{backing},format=raw,if=none,cache=writeback,id=disk{number}");
        ["-drive".into(), drive, "-device".into(), format!("virtio-blk-pci,drive=disk{number}")]
    }
}

impl Default for MachineBuilder {
    /// A machine without a kernel: firmware only, unless `args` adds a disk.
    fn default() -> Self {
        Self {
            kernel: None,
            initrds: Vec::new(),
            append: Vec::new(),
            memory_mib: 512,
            cpus: 2,
            net: Net::User(UserNet::default()),
            watchdog: true,
            exit_on_reboot: true,
            debug_channel: false,
            paused: false,
            drives: Vec::new(),
            transcript: None,
            accel: None,
            args: Vec::new(),
        }
    }
}

impl MachineBuilder {
    /// A machine that boots this kernel (a bzImage) directly.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self { kernel: Some(kernel.into()), ..Self::default() }
    }

    /// Adds an initial RAM file system. The kernel unpacks several in order, later files over earlier ones; QEMU takes one,
    /// so several are joined in a temporary file, each padded with zeros to four bytes as cpio headers need.
    pub fn initrd(mut self, initrd: impl Into<PathBuf>) -> Self {
        self.initrds.push(initrd.into());
        self
    }

    /// Adds to the kernel's command line, after a space.
    pub fn append(mut self, words: impl Into<String>) -> Self {
        self.append.push(words.into());
        self
    }

    /// Memory in MiB.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The number of processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// The network.
    pub fn net(mut self, net: Net) -> Self {
        self.net = net;
        self
    }

    /// Adds a port of 127.0.0.1 that leads into the guest; a machine without a network gets a restricted one.
    pub fn forward(self, forward: Forward) -> Self {
        self.user_net(|user| user.forwards.push(forward))
    }

    /// Whether the guest is cut off from everything outside (it is, unless told otherwise); forwards work either way.
    pub fn restrict(self, restrict: bool) -> Self {
        self.user_net(|user| user.restrict = restrict)
    }

    /// The network's own IPv4 address and the length of its prefix, instead of 10.0.2.0/24: see [`UserNet::network`].
    pub fn network(self, address: Ipv4Addr, length: u8) -> Self {
        self.user_net(|user| user.network = (address, length))
    }

    fn user_net(mut self, change: impl FnOnce(&mut UserNet)) -> Self {
        let mut user = match self.net {
            Net::User(user) => user,
            Net::None => UserNet::default(),
        };
        change(&mut user);
        self.net = Net::User(user);
        self
    }

    /// Whether there is an i6300esb watchdog, which resets the machine when it is not fed.
    pub fn watchdog(mut self, watchdog: bool) -> Self {
        self.watchdog = watchdog;
        self
    }

    /// Whether a reboot (the guest's own, or the watchdog's) ends QEMU instead of starting the machine anew.
    pub fn exit_on_reboot(mut self, exit: bool) -> Self {
        self.exit_on_reboot = exit;
        self
    }

    /// Whether there is a virtio-serial port `gaia.debug` for [`Machine::debug`].
    pub fn debug_channel(mut self, debug: bool) -> Self {
        self.debug_channel = debug;
        self
    }

    /// Whether the processors wait for [`Machine::resume`].
    pub fn paused(mut self, paused: bool) -> Self {
        self.paused = paused;
        self
    }

    /// Adds a disk.
    pub fn drive(mut self, drive: Drive) -> Self {
        self.drives.push(drive);
        self
    }

    /// Writes everything the console prints to this file, from its beginning.
    pub fn transcript(mut self, file: impl Into<PathBuf>) -> Self {
        self.transcript = Some(file.into());
        self
    }

    /// Uses this instead of what [`Accel::choose`] says.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// Adds arguments of QEMU as they are, behind all others. QEMU runs in a directory of its own: paths must be absolute.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// QEMU's arguments, with its sockets in `dir`. It always starts paused: its ports are known before the guest runs.
    fn argv(
        &self,
        qemu: Version,
        accel: &Accel,
        dir: &Path,
        kernel: Option<&Path>,
        initrd: Option<&Path>,
    ) -> Vec<OsString> {
        let mut argv: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| argv.extend(words.iter().map(Into::into));
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-S"]);
        add(&["-machine", "q35"]);
        add(&accel.argv(qemu));
        add(&["-m", &format!("{}M", self.memory_mib), "-smp", &self.cpus.to_string(), "-rtc", "base=utc"]);
        for channel in Channel::all(self.debug_channel) {
            let path = channel.path(dir);
            // A comma ends a value in QEMU's options unless it is doubled.
            let path = path.to_string_lossy().replace(',', ",,");
            add(&["-chardev", &format!("socket,id={},path={path},server=off", channel.id())]);
            match channel {
                Channel::Console => add(&["-serial", "chardev:console"]),
                Channel::Qmp => add(&["-mon", "chardev=qmp,mode=control"]),
                Channel::Debug => {
                    let port = format!("virtserialport,chardev=debug,name={}", debug::PORT);
                    add(&["-device", "virtio-serial-pci", "-device", &port]);
                }
            }
        }
        let network = self.net.argv();
        add(&network.iter().map(String::as_str).collect::<Vec<_>>());
        add(&["-device", "virtio-rng-pci"]);
        for (number, drive) in self.drives.iter().enumerate() {
            let drive = drive.argv(number);
            add(&drive.each_ref().map(String::as_str));
        }
        if self.watchdog {
            add(&["-device", "i6300esb", "-action", "watchdog=reset"]);
        }
        if self.exit_on_reboot {
            add(&["-no-reboot"]);
        }
        if let Some(kernel) = kernel {
            argv.extend(["-kernel".into(), kernel.into()]);
            if !self.append.is_empty() {
                argv.extend(["-append".into(), self.append.join(" ").into()]);
            }
        }
        if let Some(initrd) = initrd {
            argv.extend(["-initrd".into(), initrd.into()]);
        }
        argv.extend(self.args.iter().cloned());
        argv
    }
}

/// QEMU's ways to us, each a socket it connects to: the listener is there first, so nothing it says is lost.
#[derive(Debug, Clone, Copy)]
enum Channel {
    Console,
    Qmp,
    Debug,
}

impl Channel {
    fn all(debug: bool) -> impl Iterator<Item = Self> {
        [Self::Console, Self::Qmp].into_iter().chain(debug.then_some(Self::Debug))
    }

    fn id(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Qmp => "qmp",
            Self::Debug => "debug",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Qmp => "qmp",
            Self::Debug => "debug channel",
        }
    }

    fn path(self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.sock", self.id()))
    }

    fn listen(self, dir: &Path) -> Result<UnixListener, Error> {
        let path = self.path(dir);
        UnixListener::bind(&path).map_err(|source| Error::Socket { channel: self.name(), path, source })
    }

    /// Waits for QEMU to connect, for QEMU to end, or for the deadline.
    fn accept(self, listener: &UnixListener, process: &Process, deadline: Instant) -> Result<UnixStream, Error> {
        let broken = |source| Error::Send { channel: self.name(), source };
        // Interrupted polls are few; the deadline bounds the loop.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| broken(io::ErrorKind::InvalidInput.into()))?;
            let pidfd = process.pidfd();
            let mut ready = [PollFd::new(listener, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
            match poll(&mut ready, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(broken(errno.into())),
                Ok(_) if !ready[0].revents().is_empty() => return Ok(listener.accept().map_err(broken)?.0),
                Ok(_) => {}
            }
            let expected = format!("its {}", self.name());
            return Err(match process.ending().wait(if left.is_zero() { left } else { END_LIMIT }) {
                Some(Exit { status, stderr, .. }) => Error::Died { expected, status, stderr, tail: Tail::default() },
                None => Error::NoConnection { channel: self.name(), waited: CONNECT_LIMIT },
            });
        }
    }
}

/// A booted machine. Dropping it kills QEMU, the one child it started, and removes its directory.
#[derive(Debug)]
pub struct Machine {
    // Dropped in this order: first the process is killed and waited for, last its directory goes.
    process: Process,
    console: Console,
    qmp: Qmp,
    debug: Option<DebugChannel>,
    forwards: Vec<Forward>,
    accel: Accel,
    qemu: Qemu,
    dir: TempDir,
}

impl Machine {
    /// Starts QEMU, connects everything, learns the ports, and lets the machine run (unless it is to stay paused).
    ///
    /// # Errors
    /// There is no usable QEMU, a file cannot be read, a host port is taken, or QEMU refuses or dies; its words are in the error.
    pub fn boot(builder: &MachineBuilder) -> Result<Self, Error> {
        let qemu = Qemu::find()?;
        let accel = builder.accel.clone().map_or_else(|| Accel::choose(&qemu), Ok)?;
        let dir = process::private_dir()?;
        let kernel = builder.kernel.as_deref().map(|path| readable("kernel", path)).transpose()?;
        let initrd = initrd(&builder.initrds, dir.path())?;
        let mut builder = builder.clone();
        builder.drives.iter_mut().try_for_each(Drive::locate)?;
        let transcript = builder.transcript.as_deref().map(|path| {
            File::create(path).map_err(|source| Error::File { role: "transcript", path: path.to_owned(), source })
        });
        let transcript = transcript.transpose()?;
        let console = Channel::Console.listen(dir.path())?;
        let qmp = Channel::Qmp.listen(dir.path())?;
        let debug = builder.debug_channel.then(|| Channel::Debug.listen(dir.path())).transpose()?;
        let argv = builder.argv(qemu.version, &accel, dir.path(), kernel.as_deref(), initrd.as_deref());

        let process = Process::start(&qemu.path, argv, dir.path())?;
        let ending = || process.ending().clone();
        let connect = || {
            let deadline = Instant::now() + CONNECT_LIMIT;
            let stream = Channel::Console.accept(&console, &process, deadline)?;
            let console = Console::open(stream, ending(), transcript)
                .map_err(|source| Error::Send { channel: "console", source })?;
            let qmp = Qmp::open(Channel::Qmp.accept(&qmp, &process, deadline)?, ending())?;
            let stream = debug.map(|debug| Channel::Debug.accept(&debug, &process, deadline)).transpose()?;
            let debug = stream.map(|stream| DebugChannel::open(stream, console.clone(), ending()));
            Ok((console, qmp, debug))
        };
        let (console, qmp, debug) = connect().map_err(|error| port_error(error, builder.net.forwards()))?;
        let mut forwards = builder.net.forwards().to_vec();
        if forwards.iter().any(|forward| forward.host == 0) {
            forwards = net::bound(&forwards, &qmp.monitor("info usernet")?)?;
        }
        let machine = Self { process, console, qmp, debug, forwards, accel, qemu, dir };
        if !builder.paused {
            machine.resume()?;
        }
        Ok(machine)
    }

    /// The serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// QEMU's machine protocol.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The debug channel.
    ///
    /// # Errors
    /// The machine was built without one.
    pub fn debug(&self) -> Result<&DebugChannel, Error> {
        self.debug.as_ref().ok_or(Error::NoDebugChannel)
    }

    /// The port of 127.0.0.1 that leads to this port of the guest.
    ///
    /// # Errors
    /// None does.
    pub fn port(&self, guest: u16) -> Result<u16, Error> {
        let forward = self.forwards.iter().find(|forward| forward.guest == guest);
        forward.map(|forward| forward.host).ok_or(Error::NotForwarded { guest })
    }

    /// All forwards, with the host ports that are really bound.
    #[must_use]
    pub fn forwards(&self) -> &[Forward] {
        &self.forwards
    }

    /// What runs the guest's instructions.
    #[must_use]
    pub fn accel(&self) -> &Accel {
        &self.accel
    }

    /// The QEMU in use.
    #[must_use]
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The private directory with the sockets, gone once the machine is dropped.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Stops the processors.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn pause(&self) -> Result<(), Error> {
        self.qmp.execute("stop", Value::Null).map(drop)
    }

    /// Lets the processors run.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn resume(&self) -> Result<(), Error> {
        self.qmp.execute("cont", Value::Null).map(drop)
    }

    /// Presses the ACPI power button. What follows is up to the guest.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn press_power_button(&self) -> Result<(), Error> {
        self.qmp.execute("system_powerdown", Value::Null).map(drop)
    }

    /// Presses the reset button. Ends QEMU if a reboot does.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn press_reset_button(&self) -> Result<(), Error> {
        self.qmp.execute("system_reset", Value::Null).map(drop)
    }

    /// Cuts the power: the guest learns nothing, but QEMU ends in order, with what it holds for disks written out.
    ///
    /// # Errors
    /// QEMU does not end within ten seconds.
    pub fn power_off(&self) -> Result<Exit, Error> {
        match self.qmp.execute("quit", Value::Null) {
            // Whether the answer or the end comes first is a matter of luck.
            Ok(_) | Err(Error::Died { .. }) => self.wait_exit(END_LIMIT),
            Err(error) => Err(error),
        }
    }

    /// Kills QEMU on the spot and waits until it is gone.
    ///
    /// # Errors
    /// It cannot be killed, or does not end within ten seconds.
    pub fn kill(&self) -> Result<Exit, Error> {
        self.process.kill()?;
        self.wait_exit(END_LIMIT)
    }

    /// Waits until QEMU has ended, and says how and why.
    ///
    /// # Errors
    /// It still runs.
    pub fn wait_exit(&self, timeout: Duration) -> Result<Exit, Error> {
        let exit = self.process.ending().wait(timeout);
        let mut exit = exit.ok_or_else(|| Error::StillRunning { waited: timeout, tail: self.console.tail() })?;
        exit.reason = self.qmp.shutdown_reason();
        Ok(exit)
    }

    /// Waits for one of QEMU's events, for example `RESET` or `WATCHDOG`; each is returned once.
    ///
    /// # Errors
    /// As [`Qmp::wait_event`].
    pub fn wait_event(&self, name: &str, timeout: Duration) -> Result<Event, Error> {
        self.qmp.wait_event(name, timeout)
    }
}

/// The absolute path of a file that can be opened.
fn readable(role: &'static str, path: &Path) -> Result<PathBuf, Error> {
    let absolute = std::path::absolute(path);
    absolute.and_then(|path| File::open(&path).map(|_| path)).map_err(|source| Error::File {
        role,
        path: path.to_owned(),
        source,
    })
}

/// The one file QEMU gets: nothing, the only one, or all of them joined.
fn initrd(initrds: &[PathBuf], dir: &Path) -> Result<Option<PathBuf>, Error> {
    if let [] | [_] = initrds {
        return initrds.first().map(|path| readable("initrd", path)).transpose();
    }
    let joined = dir.join("initrd");
    let error = |path: &Path, source| Error::File { role: "initrd", path: path.to_owned(), source };
    let mut out = File::create(&joined).map_err(|source| error(&joined, source))?;
    for path in initrds {
        let mut part = File::open(path).map_err(|source| error(path, source))?;
        io::copy(&mut part, &mut out).map_err(|source| error(path, source))?;
        let length = out.stream_position().map_err(|source| error(&joined, source))?;
        let mut padding = io::repeat(0).take((4 - length % 4) % 4);
        io::copy(&mut padding, &mut out).map_err(|source| error(&joined, source))?;
    }
    Ok(Some(joined))
}

/// If QEMU died because it could not bind a fixed port, trying the same tells which, and why.
fn port_error(error: Error, forwards: &[Forward]) -> Error {
    if !matches!(error, Error::Died { .. }) {
        return error;
    }
    let taken = |forward: &Forward| {
        let source = TcpListener::bind(("127.0.0.1", forward.host)).err()?;
        Some(Error::PortTaken { forward: *forward, source })
    };
    forwards.iter().filter(|forward| forward.host != 0).find_map(taken).unwrap_or(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::ShutdownReason;
    use std::fs;

    fn tcg() -> Accel {
        Accel::Tcg { because: "a test says so".into() }
    }

    fn argv(builder: &MachineBuilder, accel: &Accel, kernel: Option<&str>, initrd: Option<&str>) -> String {
        let argv =
            builder.argv(Version(10, 0, 0), accel, Path::new("/run/x,y"), kernel.map(Path::new), initrd.map(Path::new));
        let words: Vec<String> = argv.into_iter().map(|word| word.into_string().unwrap()).collect();
        // One option a line, as a person would write it.
        words.join(" ").replace(" -", "\n-")
    }

    #[test]
    fn golden_argv_of_a_full_machine() {
        let builder = MachineBuilder::new("k")
            .append("console=ttyS0")
            .append("quiet")
            .memory_mib(256)
            .cpus(4)
            .forward(Forward::to(8080))
            .forward(Forward { host: 2222, guest: 22 })
            .debug_channel(true)
            .drive(Drive::file("/d,isk"))
            .drive(Drive::nbd("/n"))
            .args(["-name", "gaia"]);
        let golden = "\
-nodefaults
-no-user-config
-display none
-S
-machine q35
-accel tcg,thread=multi
-cpu max
-m 256M
-smp 4
-rtc base=utc
-chardev socket,id=console,path=/run/x,,y/console.sock,server=off
-serial chardev:console
-chardev socket,id=qmp,path=/run/x,,y/qmp.sock,server=off
-mon chardev=qmp,mode=control
-chardev socket,id=debug,path=/run/x,,y/debug.sock,server=off
-device virtio-serial-pci
-device virtserialport,chardev=debug,name=gaia.debug
-netdev user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-:8080,hostfwd=tcp:127.0.0.1:2222-:22
-device virtio-net-pci,netdev=net0,romfile=
-device virtio-rng-pci
-drive file.driver=file,file.filename=/d,,isk,format=raw,if=none,cache=writeback,id=disk0
-device virtio-blk-pci,drive=disk0
-drive file.driver=nbd,file.server.type=unix,file.server.path=/n,format=raw,if=none,cache=writeback,id=disk1
-device virtio-blk-pci,drive=disk1
-device i6300esb
-action watchdog=reset
-no-reboot
-kernel /k
-append console=ttyS0 quiet
-initrd /i
-name gaia";
        assert_eq!(argv(&builder, &tcg(), Some("/k"), Some("/i")), golden);
    }

    #[test]
    fn golden_argv_of_a_bare_machine() {
        let builder = MachineBuilder::default().net(Net::None).watchdog(false).exit_on_reboot(false);
        let golden = "\
-nodefaults
-no-user-config
-display none
-S
-machine q35
-accel kvm
-cpu host
-m 512M
-smp 2
-rtc base=utc
-chardev socket,id=console,path=/run/x,,y/console.sock,server=off
-serial chardev:console
-chardev socket,id=qmp,path=/run/x,,y/qmp.sock,server=off
-mon chardev=qmp,mode=control
-nic none
-device virtio-rng-pci";
        assert_eq!(argv(&builder, &Accel::Kvm { because: String::new() }, None, None), golden);
        let open = argv(&builder.clone().restrict(false), &tcg(), None, None);
        assert!(open.contains("-netdev user,id=net0,restrict=off\n"), "{open}");
        let elsewhere = argv(&builder.network(Ipv4Addr::new(192, 0, 2, 0), 24), &tcg(), None, None);
        assert!(elsewhere.contains("-netdev user,id=net0,restrict=on,net=192.0.2.0/24\n"), "{elsewhere}");
    }

    #[test]
    fn initrds_are_joined_on_four_bytes() {
        let dir = process::private_dir().unwrap();
        let part = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let parts = [part("a", b"12345"), part("b", b"1234"), part("c", b""), part("d", b"1")];
        assert_eq!(initrd(&[], dir.path()).unwrap(), None);
        assert_eq!(initrd(&parts[..1], dir.path()).unwrap().as_ref(), Some(&parts[0]));
        let joined = initrd(&parts, dir.path()).unwrap().unwrap();
        assert_eq!(fs::read(joined).unwrap(), b"12345\0\0\x001234\x31\0\0\0");
        let error = initrd(&[dir.path().join("missing")], dir.path()).unwrap_err();
        assert!(error.to_string().starts_with("initrd ") && error.to_string().contains("missing"), "{error}");
    }

    /// Would miss a QEMU that does not exist: without one there is nothing to start.
    #[test]
    fn a_machine_without_a_kernel_lives_and_dies() {
        if matches!(Qemu::find(), Err(Error::QemuMissing { .. })) {
            return;
        }
        let builder = MachineBuilder::default().accel(tcg()).memory_mib(64).paused(true).debug_channel(true);
        let machine = Machine::boot(&builder.clone().forward(Forward::to(80)).forward(Forward::to(443))).unwrap();
        let (http, https) = (machine.port(80).unwrap(), machine.port(443).unwrap());
        assert!(http != 0 && https != 0 && http != https);
        assert!(matches!(machine.port(22).unwrap_err(), Error::NotForwarded { guest: 22 }));
        assert_eq!(machine.qmp().status().unwrap(), "prelaunch");
        machine.resume().unwrap();
        assert_eq!(machine.qmp().status().unwrap(), "running");
        machine.pause().unwrap();
        assert_eq!(machine.qmp().status().unwrap(), "paused");
        assert!(matches!(machine.wait_exit(Duration::ZERO).unwrap_err(), Error::StillRunning { .. }));
        assert!(machine.qmp().execute("no-such-command", Value::Null).is_err());

        // The port is bound: a second machine cannot have it, and says so.
        let same = builder.clone().forward(Forward { host: http, guest: 80 });
        let error = Machine::boot(&same).unwrap_err();
        assert!(matches!(&error, Error::PortTaken { forward, .. } if forward.host == http), "{error}");

        let dir = machine.dir().to_owned();
        let exit = machine.power_off().unwrap();
        assert!(exit.success());
        assert_eq!(exit.reason, Some(ShutdownReason::Quit));
        assert!(matches!(machine.console().wait_for("x", Duration::from_mins(1)).unwrap_err(), Error::Died { .. }));
        drop(machine);
        assert!(!dir.exists());

        // A reset ends it; and an argument that QEMU does not know is reported in QEMU's words.
        let machine = Machine::boot(&builder).unwrap();
        machine.press_reset_button().unwrap();
        assert!(machine.wait_exit(Duration::from_secs(20)).unwrap().success());
        let error = Machine::boot(&builder.args(["-no-such-option"])).unwrap_err();
        assert!(error.to_string().contains("no-such-option"), "{error}");
    }

    #[test]
    fn dropping_kills_only_its_own() {
        if matches!(Qemu::find(), Err(Error::QemuMissing { .. })) {
            return;
        }
        let builder = MachineBuilder::default().accel(tcg()).memory_mib(64).paused(true);
        let (first, second) = (Machine::boot(&builder).unwrap(), Machine::boot(&builder).unwrap());
        let pid = first.pid();
        drop(first);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(second.qmp().status().unwrap(), "prelaunch");
        assert!(!second.kill().unwrap().success());
    }
}
