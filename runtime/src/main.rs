//! `gaia`: the operator's command, and each of the runtime's roles.

use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write as _, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use gaia_init::key::PublicKey;
use gaia_init::sandbox::{self, Demand};
use gaia_runtime::check::Review;
use gaia_runtime::client::{Client, DEFAULT_SOCKET};
use gaia_runtime::console::{self, Mode};
use gaia_runtime::kept::Kept;
use gaia_runtime::remote::{Folder, Remote};
use gaia_runtime::{compile, control, deploy, operate, run, worker};

#[global_allocator]
static ALLOCATOR: Kept = Kept;

/// Operate a Gaia appliance: WebAssembly components served from bare metal.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
    /// The socket of the appliance's control
    #[arg(long, global = true, env = "GAIA_API", default_value = DEFAULT_SOCKET)]
    api: PathBuf,
    /// The appliance, over the network: its name in hosts.toml, HOST or HOST:PORT, an IPv6 address in brackets
    #[arg(long, global = true, value_name = "HOST", env = "GAIA_ON")]
    on: Option<String>,
    /// With --on, for an appliance that is not known yet: take it if this is the key that it shows
    #[arg(long, global = true, value_name = "KEY", requires = "on")]
    accept_key: Option<PublicKey>,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Operate(operate::Command),
    #[command(flatten)]
    Deploy(deploy::Command),
    /// This operator's key, to be listed in an appliance's gaia.toml; made if there is none
    Key,
    /// With --on: from now on that appliance is the one with this key
    Trust {
        /// The key that stands on its console
        key: PublicKey,
    },
    /// The security review of a manifest: what its components import, what it grants, what is missing or too much
    Check {
        /// The manifest; images are looked up beside it
        file: PathBuf,
        /// Print the smallest grants that link, ready to paste
        #[arg(long)]
        suggest: bool,
    },
    /// Run a graph right here, without an appliance: the same runtime, its log on standard output
    Run(run::Options),
    /// A prompt that takes these commands: what the serial port of the appliance runs
    Console,
    /// A process of the runtime: started by init, not by hand
    #[command(hide = true)]
    Role {
        #[command(subcommand)]
        role: Role,
    },
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Store, deploys, API
    Control,
    /// One component in, machine code out
    Compile,
    /// Runs the branes on one core
    Worker,
    /// Runs one instance of a pinned brane
    Keeper,
    /// The prompt, in its sandbox
    Console,
    /// Shows the log, in its sandbox
    Log,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let local = || Client::new(cli.api.clone());
    let client = || cli.on.as_ref().map_or_else(|| Ok(local()), |on| reached(on, cli.accept_key));
    let outcome = match cli.command {
        Command::Operate(command) => {
            client().and_then(|client| operate::run(&command, &client, cli.json, &mut stdout()).map_err(Into::into))
        }
        Command::Deploy(command) if command.is_without_appliance() => {
            deploy::run(&command, &local(), cli.json, &mut stdout())
        }
        Command::Deploy(command) => client().and_then(|client| deploy::run(&command, &client, cli.json, &mut stdout())),
        Command::Key => own_key(cli.json),
        Command::Trust { key } => trust(cli.on.as_deref(), key),
        Command::Check { file, suggest } => return check(&file, suggest, cli.json),
        Command::Run(options) => {
            return match run::run(&options) {
                Ok(code) => code,
                Err(e) => {
                    let _ = stderr().write_all(format!("gaia: {e:#}\n").as_bytes());
                    ExitCode::from(2)
                }
            };
        }
        Command::Console => client().and_then(|client| prompt(&client)),
        Command::Role { role } => {
            end_on_panic();
            not_to_be_looked_into();
            match role {
                Role::Control => control::run(),
                Role::Compile => compile::run(),
                Role::Worker => worker::run(),
                Role::Keeper => worker::keeper::run(),
                Role::Console => sandboxed(&sandbox::console::SANDBOX).and_then(|()| prompt(&local())),
                Role::Log => sandboxed(&sandbox::log::SANDBOX)
                    .and_then(|()| operate::show(&local(), &mut stdout()).map_err(Into::into)),
            }
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // In one piece: on the appliance each write is a record of the kernel's log.
            let _ = stderr().write_all(format!("gaia: {e:#}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// The appliance at the other end of the network, if it is trusted. Who is at a terminal is asked.
fn reached(on: &str, accepted: Option<PublicKey>) -> anyhow::Result<Client> {
    let folder = Folder::from_environment()?;
    let host = folder.host(on)?;
    let remote = Remote::reach(&folder, host, accepted, |host, key| {
        if !stdin().is_terminal() || !stderr().is_terminal() {
            return false;
        }
        let question = format!(
            "{host} is not known. It shows the key\n  {key}\nHold it against the one on its console. Is it the same? (yes/no) "
        );
        let mut answer = String::new();
        let asked = stderr().write_all(question.as_bytes()).and_then(|()| stdin().read_line(&mut answer));
        asked.is_ok() && answer.trim() == "yes"
    })?;
    Ok(Client::remote(folder, remote))
}

fn own_key(json: bool) -> anyhow::Result<()> {
    let (key, made) = Folder::from_environment()?.key()?;
    if let Some(path) = made {
        stderr().write_all(format!("made {}\n", path.display()).as_bytes())?;
    }
    let key = key.public();
    let text = if json { format!("{}\n", serde_json::json!({ "key": key })) } else { format!("{key}\n") };
    Ok(stdout().write_all(text.as_bytes())?)
}

fn trust(on: Option<&str>, key: PublicKey) -> anyhow::Result<()> {
    let folder = Folder::from_environment()?;
    let host = folder.host(on.context("which appliance? gaia --on HOST trust KEY")?)?;
    folder.trust(&host, key)
}

fn prompt(client: &Client) -> anyhow::Result<()> {
    let observe = std::env::var("GAIA_CONSOLE").is_ok_and(|mode| mode == "observe");
    let mode = if observe { Mode::Observe } else { Mode::Operate };
    Ok(console::converse(client, mode, &mut stdin().lock(), &mut stdout().lock())?)
}

/// Enters the sandbox of a role that connects to nobody by TCP.
fn sandboxed(sandbox: &sandbox::Sandbox) -> anyhow::Result<()> {
    Ok(sandbox::enter(sandbox, &BTreeSet::new(), Demand::from_environment())?)
}

/// Reviews a manifest: the screen on standard output, what is wrong on standard error, 1 if there are errors.
fn check(file: &Path, suggest: bool, json: bool) -> ExitCode {
    let review = match Review::of(file) {
        Ok(review) => review,
        Err(e) => {
            let _ = stderr().write_all(format!("gaia: {e}\n").as_bytes());
            return ExitCode::from(2);
        }
    };
    let info = rustix::system::sysinfo();
    let text = match (json, suggest) {
        (true, _) => review.json(),
        (false, true) => review.suggestion(),
        (false, false) => review.screen(info.totalram * u64::from(info.mem_unit)),
    };
    let wrong = if json { String::new() } else { review.diagnostics(stderr().is_terminal()) };
    let written = stderr().write_all(wrong.as_bytes()).and_then(|()| stdout().write_all(text.as_bytes()));
    if review.errors() > 0 || written.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Leaves no memory behind for whoever looks: no core file, whatever the machine makes of such, and nobody else's look into it but
/// root's (`PR_SET_DUMPABLE`, prctl(2)). Before the sandbox, which has no such call. On a workstation the roles are their
/// user's, who may look; there the limit for core files does as much of it as is wanted (see `run`).
fn not_to_be_looked_into() {
    if Demand::from_environment() == Demand::Whole {
        // The kernel knows this since before there was a Gaia: no error is known.
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    }
}

/// A role that panics ends at once: what it was in the middle of cannot be trusted, and init starts it again.
fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |what| {
        print(what);
        std::process::abort();
    }));
}
