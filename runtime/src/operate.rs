//! The commands that ask or tell a running appliance, the same on its console and on a command line.

pub mod secret;

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::client::{Client, Error, ps_text, status_text};
use crate::control::log::Query;
use crate::control::report::{Rollback, Step};
use crate::deploy;

/// A command to a running appliance.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Command {
    /// The appliance: what serves, its processes, its memory
    Status,
    /// Branes and the instances at work
    Ps,
    /// What branes said, and what became of their requests
    Logs {
        /// Of this brane alone
        #[arg(long)]
        brane: Option<String>,
        /// Not older than this: 30s, 5m
        #[arg(long, value_parser = gaia_manifest::units::duration)]
        since: Option<Duration>,
        /// Go on with what comes
        #[arg(long, short)]
        follow: bool,
    },
    /// The graphs that were deployed, oldest first
    Graphs,
    /// Serve the graph before the current one again, exactly
    Rollback {
        /// Agree to the end of the states of pinned instances
        #[arg(long, short)]
        yes: bool,
    },
    /// Values that branes are given under a name: set, list, remove
    #[command(subcommand)]
    Secret(secret::Command),
    /// Finish what is inside, for at most five seconds, then switch the appliance off
    Poweroff,
    /// Finish what is inside, for at most five seconds, then start the appliance again
    Reboot,
}

impl Command {
    /// Whether it changes anything.
    #[must_use]
    pub fn changes(&self) -> bool {
        match self {
            Self::Status | Self::Ps | Self::Logs { .. } | Self::Graphs => false,
            Self::Secret(command) => command.changes(),
            Self::Rollback { .. } | Self::Poweroff | Self::Reboot => true,
        }
    }

    /// Whether it goes on until it is interrupted.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        matches!(self, Self::Logs { follow: true, .. })
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
        Command::Logs { brane, since, follow } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let since = since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
            let since_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
            let query = Query { brane: brane.clone(), since_ns, follow: *follow };
            return logs(client, &query, json, out);
        }
        Command::Secret(command) => return secret::run(command, client, json, out),
        Command::Graphs => client.graphs().map(|g| text(&g, json, deploy::graphs_text)),
        Command::Rollback { yes } => {
            client.change("/v1/rollback", &Rollback { ends_states: *yes }, deploy::doing).map(|last| match last {
                // As `deploy` has it.
                Step::Done(done) => text(&done, json, deploy::deployed_text),
                other => text(&other, json, |_| String::new()),
            })
        }
        Command::Poweroff => client.poweroff().map(|d| text(&d, json, |d| d.done.clone() + "\n")),
        Command::Reboot => client.reboot().map(|d| text(&d, json, |d| d.done.clone() + "\n")),
    };
    out.write_all(text?.as_bytes()).map_err(Error::Output)
}

fn logs(client: &Client, query: &Query, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let mut written = Ok(());
    client.logs(query, |line| {
        written = out.write_all(text(&line, json, |line| line.text() + "\n").as_bytes()).and_then(|()| out.flush());
        written.is_ok()
    })?;
    match written {
        // Whoever reads has read enough: `gaia logs | head`.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::Output),
    }
}

fn text<T: Serialize>(value: &T, json: bool, human: impl FnOnce(&T) -> String) -> String {
    if json { serde_json::to_string(value).unwrap_or_default() + "\n" } else { human(value) }
}
