//! `gaia-qemu run`: a machine on this terminal. The command behind `make run`.
//!
//! ```text
//!   keys ── stdin thread ──► console ──► screen thread ── terminal
//!                               │
//!              ready thread: waits for the pattern, then for a 200
//!   main: waits for a key to quit, a signal, the answer, or the machine's end
//! ```

mod http;
mod terminal;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use gaia_qemu::{Accel, Console, Drive, Error, Exit, Forward, Machine, MachineBuilder, Qemu, ShutdownReason};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use terminal::RawTerminal;

/// Ctrl-], as in telnet: no shell, editor or pager uses it.
const QUIT_KEY: u8 = 0x1d;
/// From the ready line to a 200.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Between two attempts.
const ANSWER_PAUSE: Duration = Duration::from_millis(250);
/// What is printed last reaches the screen within this, or the screen is stuck.
const SCREEN_LIMIT: Duration = Duration::from_secs(2);
/// From the end of the console to the end of QEMU.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The machine in a box: runs an appliance image under QEMU.
#[derive(Debug, Parser)]
#[command(name = "gaia-qemu", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boots a machine on this terminal. Ctrl-] quits.
    Run(Box<Run>),
    /// Says which QEMU would be used, whether with hardware virtualisation, and why.
    Probe,
}

#[derive(Debug, Args)]
struct Run {
    /// The kernel, a bzImage.
    #[arg(long)]
    kernel: PathBuf,
    /// An initial RAM file system; several are unpacked in order, later files over earlier ones.
    #[arg(long)]
    initrd: Vec<PathBuf>,
    /// The kernel's command line; given several times, they are joined with spaces.
    #[arg(long, default_value = "console=ttyS0", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Memory in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(32..))]
    memory: u32,
    /// Processors.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=255))]
    cpus: u32,
    /// A port of 127.0.0.1 that leads to a port of the guest; HOST 0 picks a free one. The first is the one whose answer is awaited.
    #[arg(long, value_name = "HOST:GUEST", default_value = "8080:8080")]
    forward: Vec<Forward>,
    /// The path that must answer 200 before the address is shown.
    #[arg(long, default_value = "/hello")]
    url_path: String,
    /// What the machine prints once it serves.
    #[arg(long, value_name = "PATTERN", default_value = "gaia: serving")]
    ready: String,
    /// A file for the machine's disk, as `gaia-image disk` makes it; what the appliance keeps over restarts is there.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// A file for everything the machine prints.
    #[arg(long)]
    transcript: Option<PathBuf>,
    /// Lets the machine reach the network this host is in; it is cut off from it otherwise.
    #[arg(long)]
    online: bool,
    /// Ends when the machine reboots, instead of booting again.
    #[arg(long)]
    exit_on_reboot: bool,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(options) => run(&options),
        Command::Probe => probe(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("gaia-qemu: {error:#}");
        ExitCode::FAILURE
    })
}

fn probe() -> Result<ExitCode> {
    let qemu = Qemu::find()?;
    println!("{qemu}\n{}", Accel::choose(&qemu)?);
    Ok(ExitCode::SUCCESS)
}

/// What ends the wait of the main thread.
enum Happened {
    /// The quit key, the end of the terminal, or a signal.
    Leave,
    Answered(Result<String>),
    ConsoleEnded,
}

fn run(options: &Run) -> Result<ExitCode> {
    // From here on they wait until somebody reads them below; QEMU, in a process group of its own, does not get them.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT]).context("catching signals")?;
    let machine = boot(options)?;
    let (happens, events) = mpsc::channel();
    let (opens, gate) = mpsc::channel();
    let console = machine.console();

    let screen = Arc::new(Mutex::new(Screen { line_end: "\n", column_zero: true }));
    note(&screen, &format!("gaia-qemu: {}, {}", machine.qemu(), machine.accel()));
    for Forward { host, guest } in machine.forwards() {
        note(&screen, &format!("gaia-qemu: 127.0.0.1:{host} leads to port {guest} of the machine"));
    }
    let raw = RawTerminal::enter().context("raw mode of the terminal")?;
    if raw.is_some() {
        lock(&screen).line_end = "\r\n";
    }
    let leave = if raw.is_some() { "Ctrl-] quits" } else { "SIGINT or SIGTERM quits" };
    note(&screen, &format!("gaia-qemu: {leave}, `poweroff` in the console shuts down"));

    start("signals", {
        let happens = happens.clone();
        move || forward_signals(signals, &happens)
    })?;
    start("screen", {
        let (mut output, screen, happens) = (console.follow(), Arc::clone(&screen), happens.clone());
        move || {
            while let Some(bytes) = output.next_chunk() {
                if lock(&screen).print(&bytes).is_err() {
                    break;
                }
            }
            let _ = happens.send(Happened::ConsoleEnded);
        }
    })?;
    start("keys", {
        let (console, happens, raw) = (console.clone(), happens.clone(), raw.is_some());
        move || if raw { forward_keys(&console, &happens) } else { forward_lines(&console, &gate) }
    })?;
    start("ready", {
        let (console, pattern, path) = (console.clone(), options.ready.clone(), options.url_path.clone());
        let port = machine.forwards().first().map(|forward| forward.host);
        move || await_answer(&console, &pattern, port, &path, &opens, &happens)
    })?;

    let exit = attend(&machine, &screen, &events);
    drop(raw);
    let exit = exit?;
    let reason = match &exit.reason {
        Some(ShutdownReason::GuestShutdown) => "the machine switched itself off".to_owned(),
        Some(ShutdownReason::GuestReset) => "the machine rebooted".to_owned(),
        Some(ShutdownReason::GuestPanic) => "the machine's kernel panicked".to_owned(),
        Some(ShutdownReason::Quit) => "power off".to_owned(),
        _ => format!("QEMU ended, {}", exit.status),
    };
    lock(&screen).line_end = "\n";
    note(&screen, &format!("gaia-qemu: {reason}"));
    if !exit.stderr.trim().is_empty() {
        eprintln!("gaia-qemu: QEMU said: {}", exit.stderr.trim());
    }
    Ok(exit_code(&exit))
}

fn boot(options: &Run) -> Result<Machine> {
    let mut builder = MachineBuilder::new(&options.kernel)
        .append(options.append.join(" "))
        .memory_mib(options.memory)
        .cpus(options.cpus)
        .restrict(!options.online)
        .exit_on_reboot(options.exit_on_reboot);
    for initrd in &options.initrd {
        builder = builder.initrd(initrd);
    }
    for forward in &options.forward {
        builder = builder.forward(*forward);
    }
    if let Some(data) = &options.data {
        builder = builder.drive(Drive::file(data));
    }
    if let Some(transcript) = &options.transcript {
        builder = builder.transcript(transcript);
    }
    Machine::boot(&builder).map_err(|error| match error {
        Error::PortTaken { forward, .. } => {
            let hint = format!("choose another host port: --forward 0:{0} picks a free one", forward.guest);
            anyhow!("{error}; {hint}")
        }
        error => error.into(),
    })
}

/// Until the machine has ended, by itself or because somebody wants out.
fn attend(machine: &Machine, screen: &Mutex<Screen>, events: &Receiver<Happened>) -> Result<Exit> {
    loop {
        match events.recv() {
            Ok(Happened::Answered(Ok(url))) => note(screen, &format!("→ {url}")),
            Ok(Happened::Answered(Err(error))) => note(screen, &format!("gaia-qemu: {error:#}")),
            Ok(Happened::ConsoleEnded) => match machine.wait_exit(END_LIMIT) {
                Ok(exit) => return Ok(exit),
                // The screen has ended, not the machine: nobody reads what it prints.
                Err(_) => return Ok(power_off(machine)?),
            },
            Ok(Happened::Leave) => {
                let exit = power_off(machine)?;
                let deadline = Instant::now() + SCREEN_LIMIT;
                while let Some(left) = deadline.checked_duration_since(Instant::now()) {
                    if let Ok(Happened::ConsoleEnded) | Err(_) = events.recv_timeout(left) {
                        break;
                    }
                }
                return Ok(exit);
            }
            Err(_) => return Ok(machine.wait_exit(END_LIMIT)?),
        }
    }
}

fn power_off(machine: &Machine) -> Result<Exit, Error> {
    machine.power_off().or_else(|_| machine.kill())
}

fn exit_code(exit: &Exit) -> ExitCode {
    // As a shell counts: the status, or 128 and the signal.
    let code = exit.status.code().or(exit.status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// The terminal's output, shared by the machine and this program.
struct Screen {
    line_end: &'static str,
    column_zero: bool,
}

impl Screen {
    fn print(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(&last) = bytes.last() {
            self.column_zero = last == b'\n';
        }
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }
}

/// A line of its own, wherever the machine's output has stopped. Lost if nobody reads it.
fn note(screen: &Mutex<Screen>, text: &str) {
    let mut screen = lock(screen);
    let before = if screen.column_zero { "" } else { screen.line_end };
    let line = format!("{before}{text}{}", screen.line_end);
    let _ = screen.print(line.as_bytes());
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(body).map(drop).with_context(|| format!("thread {name}"))
}

fn forward_signals(mut signals: Signals, happens: &Sender<Happened>) {
    for _ in signals.forever() {
        if happens.send(Happened::Leave).is_err() {
            return;
        }
    }
}

/// A terminal's keys, as they come. A key that the machine does not take in time is dropped, as by any serial port.
fn forward_keys(console: &Console, happens: &Sender<Happened>) {
    let mut keys = [0; 4096];
    let mut stdin = io::stdin().lock();
    loop {
        let count = match stdin.read(&mut keys) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let quit = keys[..count].iter().position(|&key| key == QUIT_KEY);
        let _ = console.send_bytes(&keys[..quit.unwrap_or(count)]);
        if quit.is_some() {
            break;
        }
    }
    let _ = happens.send(Happened::Leave);
}

/// Lines of a pipe or a file, once the machine is ready: before, nobody there reads its serial port, and the kernel
/// throws away what has come when somebody opens it.
fn forward_lines(console: &Console, gate: &Receiver<()>) {
    if gate.recv().is_err() {
        return;
    }
    for line in io::stdin().lock().split(b'\n') {
        let Ok(mut line) = line else { return };
        line.push(b'\r');
        if console.send_bytes(&line).is_err() {
            return;
        }
    }
}

/// First the machine's word, then the proof.
fn await_answer(
    console: &Console,
    pattern: &str,
    port: Option<u16>,
    path: &str,
    opens: &Sender<()>,
    happens: &Sender<Happened>,
) {
    if console.wait_for(pattern, Duration::MAX).is_err() {
        return;
    }
    let _ = opens.send(());
    if let Some(port) = port {
        let url = format!("http://127.0.0.1:{port}{path}");
        let answered = answer(port, path).map(|()| url.clone()).with_context(|| format!("{url} does not answer 200"));
        let _ = happens.send(Happened::Answered(answered));
    }
}

/// Asks until a 200 comes or the time is up.
fn answer(port: u16, path: &str) -> Result<()> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    // Never sent to: its wait is a pause that no sleep is needed for.
    let (_pause, paused) = mpsc::channel::<()>();
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let problem = match http::get(port, path, left.min(Duration::from_secs(5))) {
            Ok(200) => return Ok(()),
            Ok(status) => anyhow!("status {status}"),
            Err(error) => error,
        };
        if deadline.saturating_duration_since(Instant::now()) < ANSWER_PAUSE {
            return Err(problem.context(format!("last of the attempts within {ANSWER_LIMIT:?}")));
        }
        if paused.recv_timeout(ANSWER_PAUSE) != Err(RecvTimeoutError::Timeout) {
            return Err(problem);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
        let cli = "gaia-qemu run --kernel k --initrd a --initrd b --append -x --forward 1:2 --forward 0:3 --memory 64";
        let Command::Run(run) = Cli::parse_from(cli.split(' ')).command else { panic!("run") };
        assert_eq!(run.forward, [Forward { host: 1, guest: 2 }, Forward { host: 0, guest: 3 }]);
        assert_eq!((run.initrd.len(), run.append, run.memory, run.cpus), (2, vec!["-x".to_owned()], 64, 2));
        assert!(Cli::try_parse_from("gaia-qemu run --kernel k --forward 80".split(' ')).is_err());
        let Command::Run(run) = Cli::parse_from("gaia-qemu run --kernel k".split(' ')).command else { panic!("run") };
        assert_eq!((run.forward, run.ready.as_str()), (vec![Forward { host: 8080, guest: 8080 }], "gaia: serving"));
    }

    #[test]
    fn exit_codes_are_a_shells() {
        let code = |raw| exit_code(&Exit { status: ExitStatusExt::from_raw(raw), reason: None, stderr: String::new() });
        assert_eq!(format!("{:?}", code(3 << 8)), format!("{:?}", ExitCode::from(3)));
        assert_eq!(format!("{:?}", code(9)), format!("{:?}", ExitCode::from(137)));
        assert_eq!(format!("{:?}", code(0)), format!("{:?}", ExitCode::SUCCESS));
    }
}
