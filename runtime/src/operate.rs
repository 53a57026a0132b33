//! The commands that ask or tell a running appliance, the same on its console and on a command line.

use serde::Serialize;

use crate::client::{Client, Error, ps_text, status_text};

/// A command to a running appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Subcommand)]
pub enum Command {
    /// The appliance: what serves, its processes, its memory
    Status,
    /// Branes and the instances at work
    Ps,
    /// Finish what is inside, for at most five seconds, then switch the appliance off
    Poweroff,
    /// Finish what is inside, for at most five seconds, then start the appliance again
    Reboot,
}

impl Command {
    /// Whether it changes anything.
    #[must_use]
    pub fn changes(self) -> bool {
        match self {
            Self::Status | Self::Ps => false,
            Self::Poweroff | Self::Reboot => true,
        }
    }
}

/// Runs a command and returns what to print.
///
/// # Errors
/// [`Error`], with what to do about it.
pub fn run(command: &Command, client: &Client, json: bool) -> Result<String, Error> {
    match command {
        Command::Status => client.status().map(|s| text(&s, json, status_text)),
        Command::Ps => client.ps().map(|p| text(&p, json, ps_text)),
        Command::Poweroff => client.poweroff().map(|d| text(&d, json, |d| d.done.clone() + "\n")),
        Command::Reboot => client.reboot().map(|d| text(&d, json, |d| d.done.clone() + "\n")),
    }
}

fn text<T: Serialize>(value: &T, json: bool, human: impl FnOnce(&T) -> String) -> String {
    if json { serde_json::to_string(value).unwrap_or_default() + "\n" } else { human(value) }
}
