//! The commands that ask or tell a running appliance, the same on its console and on a command line.

pub mod secret;

use std::io::{self, IsTerminal as _, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::client::{Client, Error, Turn, ps_text, status_text};
use crate::control::log::{Query, instance};
use crate::control::report::{Line, Reason, Rollback, Step};
use crate::log::Kind;
use crate::log::time::Moment;
use crate::{deploy, profile, top};

/// A command to a running appliance.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Command {
    /// The appliance: what serves, its processes, its memory
    Status,
    /// Branes and the instances at work
    Ps,
    /// What branes said, and what became of their requests
    Logs {
        /// Which lines
        #[command(flatten)]
        which: Which,
        /// Kinds in colours; auto, on a terminal that has them
        #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
        color: Color,
    },
    /// The appliance and its branes, live, once a second
    Top,
    /// How long and how large the work of branes is, where its time goes, and what it costs
    Profile(profile::Options),
    /// The graphs that were deployed, oldest first
    Graphs,
    /// Serve the graph before the current one again, exactly
    Rollback {
        /// Agree to the end of the states of pinned instances
        #[arg(long, short)]
        yes: bool,
    },
    /// What is counted, in the text that Prometheus reads
    Metrics {
        /// In the form that its own standard gives it (`application/openmetrics-text`)
        #[arg(long)]
        open_metrics: bool,
    },
    /// Values that branes are given under a name: set, list, remove
    #[command(subcommand)]
    Secret(secret::Command),
    /// Finish what is inside, for at most five seconds, then switch the appliance off
    Poweroff {
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Finish what is inside, for at most five seconds, then start the appliance again
    Reboot {
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

/// Which lines of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Which {
    /// Of this brane; may be given more than once
    #[arg(long, value_name = "NAME")]
    pub brane: Vec<String>,
    /// Of this instance, such as fetch.034; may be given more than once
    #[arg(long, value_name = "NAME.NNN", value_parser = |text: &str| instance(text).map(|(_, name)| name))]
    pub instance: Vec<String>,
    /// Of these kinds: REQ, RES, END, LOG, DENY, TRAP, KILL, FAULT, AUDIT
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub kind: Vec<Kind>,
    /// Not older than this: 30s, 5m, 2026-05-01T13:41:07Z, or a time of day in UTC, 13:41:07
    #[arg(long, value_name = "WHEN", value_parser = Moment::parse)]
    pub since: Option<Moment>,
    /// Nor younger than this
    #[arg(long, value_name = "WHEN", value_parser = Moment::parse, conflicts_with = "follow")]
    pub until: Option<Moment>,
    /// The last so many of them
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<usize>,
    /// Go on with what comes
    #[arg(long, short)]
    pub follow: bool,
}

impl Which {
    /// As control is asked for them, if it is `now`.
    #[must_use]
    pub fn query(&self, now: Duration) -> Query {
        Query {
            branes: self.brane.clone(),
            instances: self.instance.clone(),
            kinds: self.kind.clone(),
            since_ns: self.since.map_or(0, |since| since.ns(now)),
            until_ns: self.until.map(|until| until.ns(now)),
            lines: self.lines,
            follow: self.follow,
            from: None,
        }
    }
}

/// When there are colours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    /// On a terminal that has them, unless `NO_COLOR` is set (no-color.org).
    #[default]
    Auto,
    /// Whoever reads.
    Always,
    /// Not at all.
    Never,
}

impl Color {
    fn is_wanted(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                let set = |name: &str| std::env::var_os(name).unwrap_or_default();
                // The serial console says that it is a VT100, which had none.
                let has_none = ["dumb", "vt100", "vt102", "vt220"].contains(&&*set("TERM").to_string_lossy());
                set("NO_COLOR").is_empty() && !has_none && io::stdout().is_terminal()
            }
        }
    }
}

impl Command {
    /// Whether it changes anything.
    #[must_use]
    pub fn changes(&self) -> bool {
        match self {
            Self::Status
            | Self::Ps
            | Self::Logs { .. }
            | Self::Metrics { .. }
            | Self::Profile(_)
            | Self::Graphs
            | Self::Top => false,
            Self::Secret(command) => command.changes(),
            Self::Rollback { .. } | Self::Poweroff { .. } | Self::Reboot { .. } => true,
        }
    }

    /// Whether it goes on until it is interrupted.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        self.is_a_screen() || matches!(self, Self::Logs { which: Which { follow: true, .. }, .. })
    }

    /// Whether it shows one thing that changes, and hears keys itself.
    #[must_use]
    pub fn is_a_screen(&self) -> bool {
        matches!(self, Self::Top | Self::Profile(profile::Options { watch: true, .. }))
    }

    /// Whether it writes files where it runs. The appliance's console can open none.
    #[must_use]
    pub fn writes_files(&self) -> bool {
        matches!(self, Self::Profile(options) if options.flame.is_some() || options.pprof.is_some())
    }
}

/// Runs a command and writes what it has to show.
///
/// # Errors
/// [`Error`], with what to do about it; [`Error::Output`] if nobody takes what is written.
pub fn run(command: &Command, client: &Client, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let text = match command {
        Command::Status => client.status().map(|s| text(&s, json, status_text)),
        Command::Ps => client.ps().map(|p| text(&p, json, ps_text)),
        Command::Logs { which, color } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            return logs(client, &which.query(now), json, *color, out);
        }
        Command::Profile(options) => return profile::run(options, client, json, out),
        Command::Top => return top::watch(client, json, out),
        Command::Metrics { open_metrics } => {
            client.metrics(*open_metrics).map(|shown| text(&Metrics { text: shown }, json, |m| m.text.clone()))
        }
        Command::Secret(command) => return secret::run(command, client, json, out),
        Command::Graphs => client.graphs().map(|g| text(&g, json, deploy::graphs_text)),
        Command::Rollback { yes } => {
            rollback(client, *yes, json).map(|last| match last {
                // As `deploy` has it.
                Step::Done(done) => text(&done, json, deploy::deployed_text),
                other => text(&other, json, |_| String::new()),
            })
        }
        Command::Poweroff { yes } => agreed(*yes, &format!("{} switches off", client.place()), json)
            .and_then(|()| client.poweroff())
            .map(|d| text(&d, json, |d| d.done.clone() + "\n")),
        Command::Reboot { yes } => agreed(*yes, &format!("{} starts again", client.place()), json)
            .and_then(|()| client.reboot())
            .map(|d| text(&d, json, |d| d.done.clone() + "\n")),
    };
    out.write_all(text?.as_bytes()).map_err(Error::Output)
}

/// The way back; where it would end states, that is asked about.
fn rollback(client: &Client, yes: bool, json: bool) -> Result<Step, Error> {
    let back = |ends_states| client.change("/v1/rollback", &Rollback { ends_states }, deploy::doing);
    match back(yes) {
        Err(Error::Unchanged(Reason::NotAgreed, ends)) => {
            agreed(false, &ends, json)?;
            back(true)
        }
        other => other,
    }
}

/// Asks whoever is at the terminal whether to go on, unless that was agreed to beforehand. A script is not asked, and one that reads
/// JSON is a script whatever it stands at.
///
/// # Errors
/// [`Reason::NotAgreed`] where nobody can be asked, [`Error::Declined`] if the answer is not yes.
pub(crate) fn agreed(yes: bool, what: &str, json: bool) -> Result<(), Error> {
    if yes {
        return Ok(());
    }
    let answer =
        if json { None } else { gaia_prompt::asked(&format!("{what}\nGo on? [y/N] ")).map_err(Error::Output)? };
    match answer {
        Some(answer) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        Some(_) => Err(Error::Declined),
        None => Err(Error::Unchanged(Reason::NotAgreed, what.to_owned())),
    }
}

fn logs(client: &Client, query: &Query, json: bool, color: Color, out: &mut dyn Write) -> Result<(), Error> {
    let colours = color.is_wanted();
    let mut written = Ok(());
    let show = |lines: Vec<Line>| {
        written = write(&lines, json, colours, out);
        written.is_ok()
    };
    if query.follow {
        client.follow(query, show, |turn| {
            let words = match turn {
                Turn::Broke(error) => format!("{}; tried again until it goes", error.failure().error),
                Turn::Again { anew: false } => "follows again".to_owned(),
                Turn::Again { anew: true } => {
                    "follows again: control was started again, and what it had not told yet is gone".to_owned()
                }
            };
            let _ = writeln!(io::stderr(), "gaia: {words}");
        })?;
    } else {
        client.logs(query, show)?;
    }
    match written {
        // Whoever reads has read enough: `gaia logs | head`.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::Output),
    }
}

/// Shows the log of this client's control as it comes, until the conversation ends: for whoever is started again then.
///
/// # Errors
/// [`Error`], with what to do about it; [`Error::Output`] if nobody takes what is written.
pub fn show(client: &Client, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let (colours, mut written) = (Color::Auto.is_wanted(), Ok(()));
    client.logs(&Query { follow: true, ..Query::default() }, |lines| {
        written = write(&lines, json, colours, out);
        written.is_ok()
    })?;
    written.map_err(Error::Output)
}

/// Writes the lines that have come at once, at once.
fn write(lines: &[Line], json: bool, colours: bool, out: &mut dyn Write) -> io::Result<()> {
    let human = |line: &Line| (if colours { line.coloured_text() } else { line.text() }) + "\n";
    let all: String = lines.iter().map(|line| text(line, json, human)).collect();
    out.write_all(all.as_bytes()).and_then(|()| out.flush())
}

/// What is counted, as JSON has it.
#[derive(Serialize)]
struct Metrics {
    text: String,
}

fn text<T: Serialize>(value: &T, json: bool, human: impl FnOnce(&T) -> String) -> String {
    if json { serde_json::to_string(value).unwrap_or_default() + "\n" } else { human(value) }
}
