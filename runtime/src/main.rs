//! `gaia`: the operator's command, and each of the runtime's roles.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal as _, Write as _, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use gaia_init::descriptors::Descriptors;
use gaia_init::key::PublicKey;
use gaia_init::sandbox::{self, Demand};
use gaia_prompt::terminal::others_write;
use gaia_runtime::check::Review;
use gaia_runtime::client::{self, Client, DEFAULT_SOCKET};
use gaia_runtime::complete::{self, Shell};
use gaia_runtime::console::{self, Leave, Mode};
use gaia_runtime::failure::{Failure, Kind};
use gaia_runtime::kept::Kept;
use gaia_runtime::progress::Progress;
use gaia_runtime::remote::{Folder, Remote};
use gaia_runtime::{compile, control, deploy, manual, operate, run, worker};

#[global_allocator]
static ALLOCATOR: Kept = Kept;

/// Operate a Gaia appliance: WebAssembly components served from bare metal.
#[derive(Debug, Parser)]
#[command(name = "gaia", bin_name = "gaia", version, propagate_version = true, max_term_width = 80, after_help = manual::statuses())]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Answer in JSON, also where it fails: then on standard error
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
    /// The appliances that are known here: their short names, addresses, and the keys that they have to show
    Hosts,
    /// The security review of a manifest: what its components import, what it grants, what is missing or too much
    Check {
        /// The manifest; images are looked up beside it
        file: PathBuf,
        /// Print the smallest grants that link, ready to paste
        #[arg(long)]
        suggest: bool,
    },
    /// Run a graph right here, without an appliance: the same runtime, its log on standard output
    Run(Box<run::Options>),
    /// A prompt that takes these commands: what the serial port of the appliance runs
    Console,
    /// What a shell needs to know to offer commands, branes and hosts on Tab: source <(gaia completions bash)
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Write the manual's pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder; made if it is not there
        folder: PathBuf,
    },
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
    let mut words: Vec<OsString> = std::env::args_os().collect();
    if let Some(shell) = std::env::var_os(complete::VARIABLE) {
        // What the shell has of the line stands behind `--`.
        let line = words.split_off(words.len().min(2));
        let written = complete::answer(Cli::command(), &shell, line).and_then(|all| stdout().write_all(&all));
        return if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    // `ω gaia ps`, as it is said.
    if words.get(1).is_some_and(|first| first == "gaia") {
        words.remove(1);
    }
    let json = words.iter().any(|word| word == "--json");
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(e) if e.use_stderr() && json => return failed(&misused(&e), true),
        Err(e) => e.exit(),
    };
    let json = cli.json;
    match done(cli, &words) {
        Ok(code) => code,
        Err(e) => failed(&e, json),
    }
}

/// Does what was asked for.
fn done(cli: Cli, words: &[OsString]) -> anyhow::Result<ExitCode> {
    let json = cli.json;
    let local = || Client::new(cli.api.clone());
    let client = || {
        let client = cli.on.as_ref().map_or_else(|| Ok(local()), |on| reached(on, cli.accept_key, cli.json));
        client.map(|client| client.showing(Progress::on_terminal(!json)))
    };
    match cli.command {
        Command::Operate(command) => operate::run(&command, &client()?, json, &mut stdout())?,
        Command::Deploy(command) => {
            let client = if command.is_without_appliance() { local() } else { client()? };
            deploy::run(&command, &client, json, &mut stdout())?;
        }
        Command::Key => own_key(json)?,
        Command::Trust { key } => trust(cli.on.as_deref(), key, json)?,
        Command::Hosts => {
            let hosts = Folder::from_environment()?.all()?;
            let text = if json { serde_json::to_string(&hosts)? + "\n" } else { hosts.text() };
            written(&text)?;
        }
        Command::Check { file, suggest } => return check(&file, suggest, json),
        Command::Run(options) => {
            return run::run(&options, json).map_err(|e| Failure { kind: Kind::Usage, ..Failure::of(&e) }.into());
        }
        Command::Console => console::run(&client()?, Mode::Operate, Leave::Allowed)?,
        Command::Completions { shell } => {
            let program = complete::called(words.first().map_or("gaia".as_ref(), OsString::as_os_str));
            written(&complete::registration(shell, &program)?)?;
        }
        Command::Man { folder } => {
            let pages = manual::write(Cli::command(), &folder)?;
            pages.iter().try_for_each(|page| written(&format!("{}\n", page.display())))?;
        }
        Command::Role { role } => {
            end_on_panic();
            not_to_be_looked_into();
            match role {
                Role::Control => control::run()?,
                Role::Compile => compile::run()?,
                Role::Worker => worker::run()?,
                Role::Keeper => worker::keeper::run()?,
                Role::Console => prompt(&local())?,
                Role::Log => {
                    sandboxed(&sandbox::log::SANDBOX)?;
                    operate::show(&local(), std::env::var_os(run::JSON).is_some(), &mut stdout())?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Says why, and ends with the status that it has.
fn failed(error: &anyhow::Error, json: bool) -> ExitCode {
    // Whoever reads has read enough: `gaia ps | head`.
    let enough = error.chain().any(|cause| match cause.downcast_ref::<client::Error>() {
        Some(client::Error::Output(e)) => e.kind() == ErrorKind::BrokenPipe,
        _ => cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe),
    });
    if enough {
        return ExitCode::SUCCESS;
    }
    let failure = Failure::of(error);
    // In one piece: on the appliance each write is a record of the kernel's log.
    let _ = stderr().write_all(failure.text(json).as_bytes());
    ExitCode::from(failure.kind.status())
}

/// What is wrong with a command line.
fn misused(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let failure = match text.split_once("\n\n") {
        Some((error, help)) => Failure::new(Kind::Usage, error.trim()).help(help.trim()),
        None => Failure::new(Kind::Usage, text.trim()),
    };
    failure.into()
}

fn written(text: &str) -> anyhow::Result<()> {
    Ok(stdout().write_all(text.as_bytes())?)
}

/// The appliance at the other end of the network, if it is trusted. Who is at a terminal is asked, unless a script reads.
fn reached(on: &str, accepted: Option<PublicKey>, json: bool) -> anyhow::Result<Client> {
    let folder = Folder::from_environment()?;
    let host = folder.host(on)?;
    let remote = Remote::reach(&folder, host, accepted, |host, key| {
        let question = format!(
            "{host} is not known. It shows the key\n  {key}\nHold it against the one on its console.\nIs it the same? (yes/no) "
        );
        !json && gaia_prompt::asked(&question).is_ok_and(|answer| answer.is_some_and(|answer| answer.trim() == "yes"))
    })?;
    Ok(Client::remote(folder, remote))
}

fn own_key(json: bool) -> anyhow::Result<()> {
    let (key, made) = Folder::from_environment()?.key()?;
    let key = key.public();
    if json {
        return written(&format!("{}\n", serde_json::json!({ "key": key, "made": made })));
    }
    if let Some(path) = made {
        stderr().write_all(format!("made {}\n", path.display()).as_bytes())?;
    }
    written(&format!("{key}\n"))
}

fn trust(on: Option<&str>, key: PublicKey, json: bool) -> anyhow::Result<()> {
    let on = on.ok_or_else(|| Failure::new(Kind::Usage, "which appliance?").help("gaia --on HOST trust KEY"))?;
    let folder = Folder::from_environment()?;
    let host = folder.host(on)?;
    folder.trust(&host, key)?;
    let host = host.to_string();
    let text = if json {
        serde_json::json!({ "host": host, "key": key }).to_string()
    } else {
        format!("✓ {host} is the one with the key {key}")
    };
    written(&(text + "\n"))
}

/// The prompt of the serial port, in its sandbox.
fn prompt(client: &Client) -> anyhow::Result<()> {
    if let Ok(written) = Descriptors::inherit().and_then(|mut all| all.take("written")) {
        others_write(written);
    }
    sandboxed(&sandbox::console::SANDBOX)?;
    let observe = std::env::var("GAIA_CONSOLE").is_ok_and(|mode| mode == "observe");
    let mode = if observe { Mode::Observe } else { Mode::Operate };
    Ok(console::run(client, mode, Leave::Refused)?)
}

/// Enters the sandbox of a role that connects to nobody by TCP.
fn sandboxed(sandbox: &sandbox::Sandbox) -> anyhow::Result<()> {
    Ok(sandbox::enter(sandbox, &BTreeSet::new(), Demand::from_environment())?)
}

/// Reviews a manifest: the screen on standard output, what is wrong on standard error, 1 if there are errors.
fn check(file: &Path, suggest: bool, json: bool) -> anyhow::Result<ExitCode> {
    let review = Review::of(file).map_err(|e| Failure::new(Kind::Usage, e.to_string()))?;
    let info = rustix::system::sysinfo();
    let text = match (json, suggest) {
        (true, _) => review.json(),
        (false, true) => review.suggestion(),
        (false, false) => review.screen(info.totalram * u64::from(info.mem_unit)),
    };
    let wrong = if json { String::new() } else { review.diagnostics(stderr().is_terminal()) };
    stderr().write_all(wrong.as_bytes())?;
    written(&text)?;
    Ok(if review.errors() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_line_that_is_wrong_is_parted_into_what_and_what_to_do() {
        let wrong = Cli::try_parse_from(["gaia", "dploy", "x"]).unwrap_err();
        let failure = Failure::of(&misused(&wrong));
        assert_eq!(failure.kind, Kind::Usage);
        assert_eq!(failure.error, "unrecognized subcommand 'dploy'");
        assert!(failure.help.unwrap().contains("'deploy'"));
    }
}
