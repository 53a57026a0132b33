//! The prompt that takes the operator's commands, on the serial port and on a laptop. There is no shell behind it.
//!
//! Completion and help are those of the commands themselves; what names there are is asked of the appliance as somebody presses Tab, with
//! little patience. What is typed stays in this process, and ends with it.

use std::io::{self, BufRead, Write, stdin, stdout};
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};
use gaia_prompt::terminal::Terminal;
use gaia_prompt::{Answer, Completion, Prompt, words};

use crate::client::{Client, Error};
use crate::operate::{Command, run as operate};
use crate::top::ENDS;

/// What a person at the line may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    Operate,
    /// Look.
    Observe,
}

/// Whether the prompt can be left: the appliance's cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// With Ctrl-D, `exit` or `quit`.
    Allowed,
    /// There is nowhere to go.
    Refused,
}

/// The longest line that is taken of what is no terminal, in bytes.
const MAX_LINE: u64 = 4096;
/// What asking for names may take: somebody has pressed Tab and waits.
const NAMES_WITHIN: Duration = Duration::from_secs(1);
/// Before each line.
const MARK: &str = "ω ";

#[derive(Debug, clap::Parser)]
#[command(
    no_binary_name = true,
    name = "",
    term_width = 79,
    help_template = "{subcommands}\n\n{options}\n\nTab completes; the arrows and Ctrl-R bring lines back; Ctrl-L draws it again."
)]
struct Line {
    #[command(subcommand)]
    command: Command,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

/// Takes commands until the input ends.
///
/// # Errors
/// If the terminal cannot be read or written.
pub fn run(client: &Client, mode: Mode, leave: Leave) -> io::Result<()> {
    let Some(mut terminal) = Terminal::of_stdio() else {
        return converse(client, mode, &mut stdin().lock(), &mut stdout().lock());
    };
    let (mut prompt, mut out) = (Prompt::new(MARK), stdout());
    let (tree, asked) = (tree(), client.within(NAMES_WITHIN));
    let mut complete = |before: &str| completion(&tree, mode, before, &mut |what| names(&asked, what));
    loop {
        match prompt.line(&mut terminal, &mut out, &mut complete)? {
            Answer::Line(line) if leave == Leave::Allowed && matches!(line.trim(), "exit" | "quit") => return Ok(()),
            Answer::Line(line) => {
                if is_remembered(&line) {
                    prompt.remember(&line);
                }
                // The terminal sends each key while something goes on; else a laptop's Ctrl-C is what it always is.
                reply(client, (mode, leave), Some(&terminal), &line, &mut out)?;
                out.flush()?;
            }
            Answer::End if leave == Leave::Allowed => return out.write_all(b"\n"),
            Answer::End | Answer::GivenUp => {}
            Answer::Gone => return Ok(()),
        }
    }
}

/// Reads commands of what is no terminal, until it ends.
fn converse(client: &Client, mode: Mode, input: &mut impl BufRead, output: &mut impl Write) -> io::Result<()> {
    loop {
        output.write_all(MARK.as_bytes())?;
        output.flush()?;
        let mut line = Vec::new();
        if io::Read::take(&mut *input, MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line);
        reply(client, (mode, Leave::Refused), None, &line, output)?;
    }
}

/// Answers one line.
fn reply(
    client: &Client,
    (mode, leave): (Mode, Leave),
    terminal: Option<&Terminal>,
    line: &str,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut words = match words::split(line) {
        Ok(words) => words,
        Err(e) => return writeln!(out, "{e}"),
    };
    // As it stands in a shell, also copied together with the prompt.
    for before in ["ω", "gaia"] {
        if words.first().is_some_and(|first| first == before) {
            words.remove(0);
        }
    }
    if words.is_empty() {
        return Ok(());
    }
    let line = match Line::try_parse_from(words) {
        Err(e) => return writeln!(out, "{}", e.to_string().trim_end()),
        Ok(line) => line,
    };
    if mode == Mode::Observe && line.command.changes() {
        return writeln!(out, "this console only observes: [console] mode in gaia.toml decides");
    }
    if leave == Leave::Refused && line.command.writes_files() {
        return writeln!(out, "there are no files here: gaia --on HOST writes them on your machine");
    }
    // Nobody sees what is typed at a terminal; what is no terminal would be a file of commands.
    if terminal.is_none() && matches!(&line.command, Command::Secret(secret) if secret.takes_a_value()) {
        return writeln!(out, "nobody is at a terminal to type it: gaia secret set, which reads a pipe");
    }
    let done = match (line.command.goes_on(), terminal) {
        (false, _) => operate(&line.command, client, line.json, out),
        // Nothing that comes is read while a command is at work.
        (true, None) => return writeln!(out, "nobody is at a terminal to end it: leave --follow away"),
        (true, Some(terminal)) => {
            let _keys = terminal.keys()?;
            if !line.command.is_a_screen() {
                out.write_all(ENDS.as_bytes())?;
                out.flush()?;
            }
            operate(&line.command, &client.ended_by_key(), line.json, out)
        }
    };
    match done {
        Err(Error::Output(e)) => Err(e),
        Err(e) => writeln!(out, "{e}"),
        Ok(()) => Ok(()),
    }
}

/// Whether a line may come back with the arrows. Not a single word that is no command, which may be a secret that was meant for
/// another question; nor a secret that was given as a word of the line, where it does not belong.
fn is_remembered(line: &str) -> bool {
    let words = words::begun(&format!("{line} ")).words;
    let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| !matches!(*word, "gaia" | "ω")).collect();
    match words.as_slice() {
        [] => false,
        [word] => *word == "help" || Line::command().find_subcommand(word).is_some(),
        ["secret", "set", _, _, ..] => words.len() <= 4,
        _ => true,
    }
}

/// The commands with everything that clap adds to them.
fn tree() -> clap::Command {
    let mut tree = Line::command();
    tree.build();
    tree
}

/// What a line may go on with. `names` tells what there is of a kind: `brane`, `instance`, `graph`.
fn completion(
    tree: &clap::Command,
    mode: Mode,
    before: &str,
    names: &mut dyn FnMut(&str) -> Vec<String>,
) -> Completion {
    let words::Begun { mut words, last, start, .. } = words::begun(before);
    if words.first().is_some_and(|first| first == "gaia" || first == "ω") {
        words.remove(0);
    }
    let (mut command, mut path, mut positional, mut value_of) = (tree, Vec::new(), 0, None);
    for word in &words {
        if value_of.take().is_some() {
            continue;
        }
        if word.starts_with('-') {
            let takes = |arg: &&clap::Arg| is_called(arg, word) && arg.get_action().takes_values();
            value_of = command.get_arguments().find(takes);
        } else if let Some(below) = command.find_subcommand(word) {
            command = below;
            path.push(word.as_str());
        } else {
            positional += 1;
        }
    }
    let values = |arg: &clap::Arg, names: &mut dyn FnMut(&str) -> Vec<String>| -> Vec<String> {
        let possible = arg.get_possible_values();
        if possible.is_empty() {
            return names(arg.get_id().as_str());
        }
        possible.iter().filter(|value| !value.is_hide_set()).map(|value| value.get_name().to_owned()).collect()
    };
    let offered: Vec<String> = if let Some(arg) = value_of {
        values(arg, names)
    } else if last.starts_with('-') {
        let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
        let long = |arg: &clap::Arg| Some(format!("--{}", arg.get_long()?));
        shown.filter_map(long).filter(|long| !words.contains(long)).collect()
    } else if command.has_subcommands() {
        let may = |below: &&clap::Command| {
            let path: Vec<&str> = path.iter().copied().chain([below.get_name()]).collect();
            !below.is_hide_set() && (mode == Mode::Operate || !changes(&path))
        };
        command.get_subcommands().filter(may).map(|below| below.get_name().to_owned()).collect()
    } else {
        command.get_positionals().nth(positional).map(|arg| values(arg, names)).unwrap_or_default()
    };
    let mut candidates: Vec<String> = offered.into_iter().filter(|word| word.starts_with(&last)).collect();
    candidates.sort_unstable();
    candidates.dedup();
    Completion { start, candidates: candidates.iter().map(|word| words::quoted(word) + " ").collect() }
}

/// Whether an option is called by this word.
fn is_called(arg: &clap::Arg, word: &str) -> bool {
    let long = word.strip_prefix("--").is_some_and(|name| arg.get_long() == Some(name));
    let short = word.strip_prefix('-').is_some_and(|name| arg.get_short().is_some_and(|c| name == c.to_string()));
    long || short
}

/// Whether a command changes anything, as it says itself once it has as many words as it wants.
fn changes(path: &[&str]) -> bool {
    if path.first() == Some(&"help") {
        return false;
    }
    let parsed = (0..4).find_map(|more| Line::try_parse_from(path.iter().copied().chain(vec!["x"; more])).ok());
    parsed.is_none_or(|line| line.command.changes())
}

/// What there is of a kind, as far as the appliance says in time.
fn names(client: &Client, what: &str) -> Vec<String> {
    match what {
        "brane" => client.ps().map(|ps| ps.branes.into_iter().map(|b| b.name).collect()),
        "instance" => client.ps().map(|ps| ps.instances.into_iter().map(|i| i.name).collect()),
        "graph" => client.graphs().map(|all| all.graphs.iter().map(|g| g.number.to_string()).collect()),
        _ => Ok(Vec::new()),
    }
    .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(client: &Client, mode: Mode, line: &str) -> String {
        let mut out = Vec::new();
        super::reply(client, (mode, Leave::Refused), None, line, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn nobody() -> Client {
        Client::new("/nonexistent/socket".into())
    }

    fn offered(mode: Mode, before: &str) -> Vec<String> {
        let names = |what: &str| match what {
            "brane" => vec!["fetch".to_owned(), "flaky".to_owned(), "hello".to_owned()],
            _ => Vec::new(),
        };
        completion(&tree(), mode, before, &mut { names }).candidates
    }

    #[test]
    fn help_names_the_commands_and_fits_a_serial_terminal() {
        let help = reply(&nobody(), Mode::Operate, "help\n");
        for command in ["status", "ps", "poweroff", "reboot", "top"] {
            assert!(help.contains(command), "{help}");
        }
        for command in tree().get_subcommands() {
            let name = command.get_name();
            let texts =
                [format!("help {name}"), format!("{name} --help"), format!("{name} -h"), format!("{name} --nonsense")];
            for line in texts.iter().filter(|line| name != "help" || !line.starts_with("help -")) {
                let text = reply(&nobody(), Mode::Operate, line);
                assert!(!text.is_empty() && text.lines().all(|line| line.chars().count() < 80), "{line}:\n{text}");
            }
        }
        assert!(help.lines().all(|line| line.chars().count() < 80), "{help}");
        assert!(reply(&nobody(), Mode::Operate, "help logs").contains("--since"));
        assert!(reply(&nobody(), Mode::Operate, "logs --help").contains("--since"));
    }

    #[test]
    fn gaia_in_front_is_taken_and_nonsense_is_answered() {
        assert_eq!(reply(&nobody(), Mode::Operate, "\n"), "");
        for line in ["gaia status\n", "ω gaia status\n", "ω status\n"] {
            assert!(reply(&nobody(), Mode::Operate, line).contains("is the appliance up?"), "{line}");
        }
        assert!(reply(&nobody(), Mode::Operate, "gaia ω status\n").contains("ω"));
        assert!(reply(&nobody(), Mode::Operate, "sh\n").contains("sh"));
        let told = reply(&nobody(), Mode::Operate, "statsu\n");
        assert!(told.contains("a similar subcommand exists: 'status'"), "{told}");
        assert!(reply(&nobody(), Mode::Operate, "logs --brane \"a").contains("has none that closes it"));
        assert!(reply(&nobody(), Mode::Operate, "logs \"--brane\" 'a b'").contains("is the appliance up?"));
    }

    #[test]
    fn observing_changes_nothing() {
        for line in ["poweroff\n", "reboot --yes", "rollback -y"] {
            assert!(reply(&nobody(), Mode::Observe, line).contains("only observes"), "{line}");
        }
        assert!(reply(&nobody(), Mode::Observe, "status\n").contains("is the appliance up?"));
        assert!(reply(&nobody(), Mode::Observe, "logs --since 30s\n").contains("is the appliance up?"));
        for line in ["logs --follow\n", "top\n"] {
            assert!(reply(&nobody(), Mode::Observe, line).contains("nobody is at a terminal"), "{line}");
        }
    }

    #[test]
    fn a_conversation_ends_with_its_input() {
        let mut said = Vec::new();
        converse(&nobody(), Mode::Operate, &mut &b"help\n\xff\xfe\nhelp"[..], &mut said).unwrap();
        assert_eq!(String::from_utf8_lossy(&said).matches("ω ").count(), 4);
    }

    #[test]
    fn a_line_goes_on_with_commands_options_and_what_there_is() {
        let all = offered(Mode::Operate, "");
        assert!(["help ", "poweroff ", "status "].iter().all(|word| all.iter().any(|o| o == word)), "{all:?}");
        assert_eq!(offered(Mode::Operate, "gaia stat"), ["status "]);
        assert_eq!(offered(Mode::Operate, "help sta"), ["status "]);
        assert_eq!(offered(Mode::Operate, "logs --f"), ["--follow "]);
        assert!(offered(Mode::Operate, "logs --").iter().any(|option| option == "--json "));
        assert_eq!(offered(Mode::Operate, "logs --follow --f"), [] as [&str; 0]);
        assert_eq!(offered(Mode::Operate, "logs --brane f"), ["fetch ", "flaky "]);
        assert_eq!(offered(Mode::Operate, "logs --brane hello --fo"), ["--follow "]);
        assert_eq!(offered(Mode::Operate, "logs --since "), [] as [&str; 0]);
        assert_eq!(offered(Mode::Operate, "status "), [] as [&str; 0]);
    }

    #[test]
    fn who_observes_is_offered_what_changes_nothing() {
        let all = offered(Mode::Observe, "");
        assert!(["help ", "logs ", "status ", "top "].iter().all(|word| all.iter().any(|o| o == word)), "{all:?}");
        assert!(["poweroff ", "reboot ", "rollback "].iter().all(|word| all.iter().all(|o| o != word)), "{all:?}");
    }

    #[test]
    fn what_may_be_a_secret_is_not_remembered() {
        for line in ["status", "gaia help", "logs --brane a", "lgos --brane a", "secret set fetch API_KEY"] {
            assert!(is_remembered(line), "{line}");
        }
        for line in ["hunter2", "", " ", "gaia", "secret set fetch API_KEY hunter2", "gaia secret set fetch K hunter2"]
        {
            assert!(!is_remembered(line), "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_answered_and_goes_on(line in "\\PC{0,80}") {
            prop_assume!(!line.contains("status") && !line.contains("ps") && !line.contains("logs"));
            let _ = reply(&nobody(), Mode::Observe, &line);
            let _ = offered(Mode::Observe, &line);
        }
    }
}
