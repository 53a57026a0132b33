//! What a shell offers when Tab is pressed: from the one tree of commands, with the names that there are just now.
//!
//! ```text
//! gaia completions bash ─▶ some lines for the shell ─▶ Tab: GAIA_COMPLETE=bash gaia -- gaia logs --brane fe ─▶ fetch
//! ```
//!
//! Somebody waits with a finger on a key: an appliance has a second for its answer, is asked only where its names are wanted, and
//! only if it was trusted before. Nothing is made, changed or asked.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};

use crate::client::{Client, DEFAULT_SOCKET};
use crate::remote::Folder;

/// The variable in which a shell says who it is when it asks.
pub const VARIABLE: &str = "GAIA_COMPLETE";
/// The program, and its other name.
const NAMES: [&str; 2] = ["gaia", "ω"];
/// What an appliance may take to name its branes.
const WITHIN: Duration = Duration::from_secs(1);

/// A shell that can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shell {
    /// 4.0 or newer
    Bash,
    /// With compinit
    Zsh,
    /// 3.0 or newer
    Fish,
}

impl Shell {
    fn completer(self) -> &'static dyn EnvCompleter {
        match self {
            Self::Bash => &Bash,
            Self::Zsh => &Zsh,
            Self::Fish => &Fish,
        }
    }
}

/// What a shell has to be told so that it asks `program` for both of its names.
///
/// # Errors
/// None that is known: it is written into memory.
pub fn registration(shell: Shell, program: &str) -> std::io::Result<String> {
    let mut out = Vec::new();
    match shell {
        // Both take several names there.
        Shell::Bash => shell.completer().write_registration(VARIABLE, NAMES[0], &NAMES.join(" "), program, &mut out)?,
        Shell::Zsh => shell.completer().write_registration(VARIABLE, NAMES[0], NAMES[0], program, &mut out)?,
        Shell::Fish => {
            for name in NAMES {
                shell.completer().write_registration(VARIABLE, NAMES[0], name, program, &mut out)?;
            }
        }
    }
    let text = String::from_utf8_lossy(&out).trim_start().to_owned();
    Ok(match shell {
        Shell::Bash | Shell::Fish => text,
        Shell::Zsh => {
            let [gaia, omega] = NAMES;
            let both = |text: &str, line: &str| text.replacen(line, &format!("{line} {omega}"), 1);
            let text = both(&text, &format!("#compdef {gaia}"));
            both(&text, &format!("compdef _clap_dynamic_completer_{gaia} {gaia}"))
        }
    })
}

/// How the shell is to call a program that was called by this name: by the same from its path, from anywhere else.
#[must_use]
pub fn called(argument_zero: &OsStr) -> String {
    let path = Path::new(argument_zero);
    let path = if path.components().count() > 1 { std::path::absolute(path).ok() } else { None };
    path.map_or_else(|| NAMES[0].to_owned(), |path| path.to_string_lossy().into_owned())
}

/// Answers a shell: what may stand in the place of the last of the words that it was given, one a line.
///
/// # Errors
/// If there is no such shell, or it has gone.
pub fn answer(tree: clap::Command, shell: &OsStr, words: Vec<OsString>) -> std::io::Result<Vec<u8>> {
    let shell = shell.to_str().and_then(|name| <Shell as clap::ValueEnum>::from_str(name, false).ok());
    let shell = shell.ok_or_else(|| std::io::Error::other("bash, zsh or fish"))?;
    let folder = std::env::current_dir().ok();
    let mut out = Vec::new();
    shell.completer().write_complete(&mut offering(tree), words, folder.as_deref(), &mut out)?;
    Ok(out)
}

/// The tree with values where they are known, and itself once more behind the word `gaia`, as in `ω gaia ps`.
fn offering(tree: clap::Command) -> clap::Command {
    let tree = with_values(tree);
    let again = tree.clone().name(NAMES[0]).hide(true);
    tree.subcommand(again)
}

fn with_values(tree: clap::Command) -> clap::Command {
    let tree = tree.mut_args(|argument| match argument.get_id().as_str() {
        "brane" => argument.add(ArgValueCompleter::new(branes)),
        "on" => argument.add(ArgValueCompleter::new(hosts)),
        _ => argument,
    });
    tree.mut_subcommands(with_values)
}

fn starting(current: &OsStr, all: impl IntoIterator<Item = (String, Option<String>)>) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else { return Vec::new() };
    let all = all.into_iter().filter(|(value, _)| value.starts_with(current));
    all.map(|(value, help)| CompletionCandidate::new(value).help(help.map(Into::into))).collect()
}

/// Short names, and addresses that were trusted.
fn hosts(current: &OsStr) -> Vec<CompletionCandidate> {
    let hosts = Folder::from_environment().and_then(|folder| folder.all()).map(|all| all.hosts).unwrap_or_default();
    starting(
        current,
        hosts.into_iter().map(|host| match host.name {
            Some(name) => (name, Some(host.address)),
            None => (host.address, None),
        }),
    )
}

/// The branes of the appliance that the line names.
fn branes(current: &OsStr) -> Vec<CompletionCandidate> {
    // The line itself stands in this process's own arguments.
    let words: Vec<String> = std::env::args().collect();
    let ps = asked(&words).and_then(|client| client.within(WITHIN).ps().ok());
    starting(current, ps.into_iter().flat_map(|ps| ps.branes).map(|brane| (brane.name, Some(brane.route))))
}

/// The appliance that a line asks.
fn asked(words: &[String]) -> Option<Client> {
    let named = |option: &str, variable: &str| option_in(words, option).or_else(|| std::env::var(variable).ok());
    match named("--on", "GAIA_ON") {
        Some(host) => {
            let folder = Folder::from_environment().ok()?;
            let remote = folder.trusted(&host)?;
            Some(Client::remote(folder, remote))
        }
        None => Some(Client::new(named("--api", "GAIA_API").map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from))),
    }
}

/// The last value of an option: `--on lab`, `--on=lab`, and as bash parts it, `--on = lab`.
fn option_in(words: &[String], option: &str) -> Option<String> {
    let at = words
        .iter()
        .rposition(|word| word.strip_prefix(option).is_some_and(|rest| rest.is_empty() || rest.starts_with('=')))?;
    match words[at].split_once('=') {
        Some((_, value)) if !value.is_empty() => Some(value.to_owned()),
        Some(_) => words.get(at + 1).cloned(),
        None => words[at + 1..].iter().find(|word| *word != "=").cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_appliance_that_a_line_names_is_the_one_that_is_asked() {
        for (line, wanted) in [
            ("gaia --on lab logs --brane f", Some("lab")),
            ("gaia --on=lab logs --brane f", Some("lab")),
            ("gaia --on = lab logs", Some("lab")),
            ("gaia --on lab --on attic", Some("attic")),
            ("gaia logs --brane f", None),
            ("gaia logs --only x", None),
            ("gaia --on", None),
        ] {
            assert_eq!(option_in(&words(line), "--on").as_deref(), wanted, "{line}");
        }
    }

    #[test]
    fn who_was_called_by_a_path_is_asked_by_it() {
        assert_eq!(called(OsStr::new("gaia")), "gaia");
        assert_eq!(called(OsStr::new("ω")), "gaia");
        assert_eq!(called(OsStr::new("/opt/bin/gaia")), "/opt/bin/gaia");
        assert!(called(OsStr::new("out/gaia")).starts_with('/'));
    }

    #[test]
    fn each_shell_learns_both_names() {
        let of = |shell| registration(shell, "gaia").unwrap();
        assert!(of(Shell::Bash).contains("-F _clap_complete_gaia gaia ω\n"), "{}", of(Shell::Bash));
        let zsh = of(Shell::Zsh);
        assert!(zsh.starts_with("#compdef gaia ω\n") && zsh.trim_end().ends_with("_gaia gaia ω"), "{zsh}");
        assert_eq!(of(Shell::Fish).matches("GAIA_COMPLETE=fish gaia --").count(), 2, "{}", of(Shell::Fish));
    }

    proptest! {
        #[test]
        fn any_line_names_an_appliance_or_none(line in proptest::collection::vec("(--on)?=?\\PC{0,5}", 0..6)) {
            let _ = option_in(&line, "--on");
        }
    }
}
