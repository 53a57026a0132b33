//! The serial console: a prompt that takes the operator's commands. There is no shell behind it.

use std::io::{BufRead, Write};

use clap::Parser as _;

use crate::client::{Client, Error};
use crate::operate::{Command, run};

/// What a person at the line may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    Operate,
    /// Look.
    Observe,
}

/// The longest line that is taken, in bytes.
const MAX_LINE: u64 = 4096;

#[derive(Debug, clap::Parser)]
#[command(no_binary_name = true, name = "", disable_help_flag = true, help_template = "{subcommands}")]
struct Line {
    #[command(subcommand)]
    command: Command,
    /// As JSON.
    #[arg(long, global = true)]
    json: bool,
}

/// Reads commands until the input ends.
///
/// # Errors
/// If the terminal cannot be read or written.
pub fn converse(client: &Client, mode: Mode, input: &mut impl BufRead, output: &mut impl Write) -> std::io::Result<()> {
    loop {
        output.write_all("ω ".as_bytes())?;
        output.flush()?;
        let mut line = Vec::new();
        if std::io::Read::take(&mut *input, MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line);
        reply(client, mode, &line, output)?;
    }
}

/// Answers one line.
fn reply(client: &Client, mode: Mode, line: &str, out: &mut impl Write) -> std::io::Result<()> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    if words.first() == Some(&"gaia") {
        words.remove(0);
    }
    if words.is_empty() {
        return Ok(());
    }
    match Line::try_parse_from(words) {
        Err(e) => writeln!(out, "{}", e.to_string().trim_end()),
        Ok(line) if mode == Mode::Observe && line.command.changes() => {
            writeln!(out, "this console only observes: [console] mode in gaia.toml decides")
        }
        Ok(Line { command: Command::Secret(secret), .. }) if secret.takes_a_value() => {
            writeln!(out, "what is typed here is shown: gaia --on HOST secret set, from elsewhere")
        }
        // Nothing typed here is read while a command is at work.
        Ok(line) if line.command.goes_on() => writeln!(out, "a console cannot end it: leave --follow away"),
        Ok(line) => match run(&line.command, client, line.json, out) {
            Err(Error::Output(e)) => Err(e),
            Err(e) => writeln!(out, "{e}"),
            Ok(()) => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(client: &Client, mode: Mode, line: &str) -> String {
        let mut out = Vec::new();
        super::reply(client, mode, line, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn nobody() -> Client {
        Client::new("/nonexistent/socket".into())
    }

    #[test]
    fn help_names_the_commands() {
        let help = reply(&nobody(), Mode::Operate, "help\n");
        for command in ["status", "ps", "poweroff", "reboot"] {
            assert!(help.contains(command), "{help}");
        }
    }

    #[test]
    fn gaia_in_front_is_taken_and_nonsense_is_answered() {
        assert_eq!(reply(&nobody(), Mode::Operate, "\n"), "");
        assert!(reply(&nobody(), Mode::Operate, "gaia status\n").contains("is the appliance up?"));
        assert!(reply(&nobody(), Mode::Operate, "sh\n").contains("sh"));
    }

    #[test]
    fn observing_changes_nothing() {
        assert!(reply(&nobody(), Mode::Observe, "poweroff\n").contains("only observes"));
        assert!(reply(&nobody(), Mode::Observe, "status\n").contains("is the appliance up?"));
        assert!(reply(&nobody(), Mode::Observe, "logs --since 30s\n").contains("is the appliance up?"));
        assert!(reply(&nobody(), Mode::Observe, "logs --follow\n").contains("cannot end it"));
    }

    #[test]
    fn a_conversation_ends_with_its_input() {
        let mut said = Vec::new();
        converse(&nobody(), Mode::Operate, &mut &b"help\n\xff\xfe\nhelp"[..], &mut said).unwrap();
        assert_eq!(String::from_utf8_lossy(&said).matches("ω ").count(), 4);
    }

    proptest! {
        #[test]
        fn any_line_is_answered(line in "\\PC{0,80}") {
            prop_assume!(!line.contains("status") && !line.contains("ps") && !line.contains("logs"));
            let _ = reply(&nobody(), Mode::Observe, &line);
        }
    }
}
