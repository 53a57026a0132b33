//! `gaia secret`: values that branes are given. One comes from a terminal that does not show it, or from a pipe; never from a
//! command line, which every process of a machine can read.

use std::fmt::Write as _;
use std::io::{self, BufRead, IsTerminal as _, Read as _, Write};
use std::os::fd::AsFd;
use std::time::{Duration, UNIX_EPOCH};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::client::{Client, Error};
use crate::control::report::{RemoveSecret, SecretChanged, SecretState, Secrets, SetSecret, Step};
use crate::deploy;
use crate::secrets::{MAX_VALUE, Secret};

/// What comes with ^C.
const INTERRUPT: u8 = 3;
/// What takes the letter before it back.
const BACKSPACE: u8 = 8;
/// What most terminals send for it.
const DELETE: u8 = 127;

/// What is done with secrets.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Command {
    /// Set a value, which comes from the terminal or a pipe; what serves is given it at once
    Set {
        /// The brane that is given it
        brane: String,
        /// The name of the variable, as its `env` says under `secrets`
        name: String,
        /// Agree to the end of the states of pinned instances
        #[arg(long, short)]
        yes: bool,
    },
    /// Names, who set them and when, whether the graph that serves uses them; never values
    List {
        /// Those of this brane alone
        brane: Option<String>,
    },
    /// Remove a value
    #[command(visible_alias = "remove")]
    Rm {
        /// The brane
        brane: String,
        /// The name of the variable
        name: String,
        /// Also if the graph that serves uses it, which then goes on without
        #[arg(long)]
        force: bool,
        /// Agree to the end of the states of pinned instances
        #[arg(long, short)]
        yes: bool,
    },
}

impl Command {
    /// Whether it changes anything.
    #[must_use]
    pub fn changes(&self) -> bool {
        !matches!(self, Self::List { .. })
    }

    /// Whether it takes a value from whoever types.
    #[must_use]
    pub fn takes_a_value(&self) -> bool {
        matches!(self, Self::Set { .. })
    }
}

/// Runs a command; a value comes from standard input.
///
/// # Errors
/// [`Error`]; no value is among its words.
pub fn run(command: &Command, client: &Client, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    match command {
        Command::Set { brane, name, yes } => {
            let value = of_standard_input(brane, name).map_err(Error::Input)?;
            set(client, brane, name, value, *yes, json, out)
        }
        Command::List { brane } => shown(out, &client.secrets(brane.as_deref())?, json, list_text),
        Command::Rm { brane, name, force, yes } => {
            let (brane, name) = (brane.clone(), name.clone());
            let asked = RemoveSecret { brane, name, force: *force, ends_states: *yes };
            done(client.change("/v1/secrets/remove", &asked, deploy::doing)?, json, out)
        }
    }
}

/// Sets a value, wherever it came from.
///
/// # Errors
/// [`Error`]; the value is not among its words.
pub fn set(
    client: &Client,
    brane: &str,
    name: &str,
    value: Secret,
    ends_states: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let asked = SetSecret { brane: brane.to_owned(), name: name.to_owned(), value, ends_states };
    done(client.change("/v1/secrets", &asked, deploy::doing)?, json, out)
}

fn of_standard_input(brane: &str, name: &str) -> Result<Secret, String> {
    let mut input = io::stdin().lock();
    if io::stdin().is_terminal() {
        let question = format!("{name} of {brane}, which is not shown: ");
        return typed(io::stdin(), &mut input, &mut io::stderr(), &question);
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_VALUE + 3));
    let most = MAX_VALUE as u64 + 3;
    input.take(most).read_to_end(&mut bytes).map_err(|e| format!("reading the value: {e}"))?;
    Secret::of_input(std::mem::take(&mut *bytes))
}

/// Asks for a value on a terminal and does not show what is typed. The line ends as any does; ^C gives up.
///
/// # Errors
/// Why there is no value, without what was typed.
pub fn typed(
    terminal: impl AsFd,
    input: &mut impl BufRead,
    output: &mut dyn Write,
    question: &str,
) -> Result<Secret, String> {
    let failed = |e: io::Error| format!("reading the value: {e}");
    let mut line = Zeroizing::new(Vec::with_capacity(MAX_VALUE + 3));
    {
        // Before the question: whoever types fast is not seen either.
        let _mute = Mute::of(terminal.as_fd()).map_err(failed)?;
        output.write_all(question.as_bytes()).and_then(|()| output.flush()).map_err(failed)?;
        read_line(input, &mut line).map_err(failed)?;
    }
    output.write_all(b"\n").and_then(|()| output.flush()).map_err(failed)?;
    if line.contains(&INTERRUPT) {
        return Err("given up: nothing is changed".to_owned());
    }
    Secret::of_input(std::mem::take(&mut *line))
}

/// Reads up to the end of a line, or to ^C, of which each is kept; at most as much as `line` has room for. The appliance's terminal sends
/// each key: what is taken back is taken back here.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<()> {
    for byte in input.bytes().take(line.capacity()) {
        match byte? {
            BACKSPACE | DELETE => {
                // A whole letter, however many bytes it has.
                while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
            }
            byte => line.push(byte),
        }
        if line.last().is_some_and(|last| [b'\n', INTERRUPT].contains(last)) {
            break;
        }
    }
    Ok(())
}

/// A terminal that does not show what is typed, as long as this is there.
struct Mute<'a> {
    terminal: std::os::fd::BorrowedFd<'a>,
    /// How it was, unless it shows nothing in any case: the appliance's, which its console may not set.
    before: Option<Termios>,
}

impl<'a> Mute<'a> {
    fn of(terminal: std::os::fd::BorrowedFd<'a>) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let shows = LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ISIG;
        if !before.local_modes.intersects(shows) {
            return Ok(Self { terminal, before: None });
        }
        let mut mute = before.clone();
        // ^C is a letter that ends the line, and no signal: that would leave the terminal mute behind.
        mute.local_modes.remove(shows);
        mute.special_codes[SpecialCodeIndex::VEOL] = INTERRUPT;
        tcsetattr(terminal, OptionalActions::Now, &mute)?;
        Ok(Self { terminal, before: Some(before) })
    }
}

impl Drop for Mute<'_> {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Whoever sits there sees it if this fails, and has `reset`.
            let _ = tcsetattr(self.terminal, OptionalActions::Now, before);
        }
    }
}

fn done(last: Step, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let Step::Secret(done) = last else {
        return Err(Error::Broken("the appliance did not say what came of it".into()));
    };
    shown(out, &done, json, done_text)
}

fn shown<T: serde::Serialize>(
    out: &mut dyn Write,
    value: &T,
    json: bool,
    human: fn(&T) -> String,
) -> Result<(), Error> {
    out.write_all(super::text(value, json, human).as_bytes()).map_err(Error::Output)
}

/// What became of a secret, as a person reads it.
#[must_use]
pub fn done_text(done: &SecretChanged) -> String {
    let SecretChanged { brane, name, .. } = done;
    let what = if done.removed {
        "removed"
    } else if done.replaced {
        "set anew"
    } else {
        "set"
    };
    let so = match done.generation {
        _ if done.of_file => "the file of --secrets says another, which is given".to_owned(),
        Some(generation) if done.removed => format!("generation {generation} serves without it · {} ms", done.millis),
        Some(generation) => format!("generation {generation} serves with it · {} ms", done.millis),
        None => "nothing that serves uses it".to_owned(),
    };
    format!("✓ {name} of {brane} is {what} · {so}\n")
}

/// Secrets as a person reads them.
#[must_use]
pub fn list_text(list: &Secrets) -> String {
    let mut out = format!("{:<16} {:<24} {:<6} {:<30} {}\n", "BRANE", "NAME", "USED", "SET", "BY");
    for secret in &list.secrets {
        let at = secret.at_ns.map(|at_ns| httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_nanos(at_ns)));
        let set = match secret.state {
            SecretState::Set => at.unwrap_or_default(),
            SecretState::OfFile => "in the file of --secrets".to_owned(),
            SecretState::Unset => "not set".to_owned(),
        };
        let (used, by) = (if secret.used { "yes" } else { "no" }, secret.by.as_deref().unwrap_or_default());
        let line = format!("{:<16} {:<24} {used:<6} {set:<30} {by}", secret.brane, secret.name);
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::SecretEntry;

    #[test]
    fn a_line_ends_with_enter_or_control_c_and_letters_are_taken_back() {
        for (keys, read) in [
            ("key\nmore", "key\n"),
            ("ke\u{e9}\u{7f}y\u{8}\u{8}x\n", "kx\n"),
            ("\u{7f}\u{7f}a\n", "a\n"),
            ("half\u{3}rest\n", "half\u{3}"),
            ("no end", "no end"),
        ] {
            let mut line = Vec::with_capacity(64);
            read_line(&mut keys.as_bytes(), &mut line).unwrap();
            assert_eq!(String::from_utf8(line).unwrap(), read, "{keys:?}");
        }
        let mut line = Vec::with_capacity(4);
        read_line(&mut &b"longer than that\n"[..], &mut line).unwrap();
        assert_eq!(line, b"long");
    }

    #[test]
    fn a_list_says_who_when_and_whether_it_is_used() {
        let entry = |name: &str, by: Option<&str>, used, state| SecretEntry {
            brane: "fetch".into(),
            name: name.into(),
            by: by.map(str::to_owned),
            at_ns: by.map(|_| 0),
            used,
            state,
        };
        let secrets = vec![
            entry("API_KEY", Some("ann from 192.0.2.7:4711"), true, SecretState::Set),
            entry("OTHER", None, true, SecretState::Unset),
        ];
        let text = list_text(&Secrets { secrets });
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..4], ["fetch", "API_KEY", "yes", "Thu,"]);
        assert!(lines[1].ends_with(&["ann", "from", "192.0.2.7:4711"]));
        assert_eq!(lines[2], ["fetch", "OTHER", "yes", "not", "set"]);
    }
}
