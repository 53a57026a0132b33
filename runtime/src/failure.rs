//! Why a command did not do what it was to do: for a person in two sentences, for a script as an exit status and in JSON.

use std::fmt::{self, Write as _};
use std::path::Path;

use serde::Serialize;

use crate::client;
use crate::remote::Untrusted;

/// What kind of failure it is: each has an exit status of its own, because scripts go on differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It failed or was refused.
    Failed,
    /// The command line is wrong, or names what cannot be read.
    Usage,
    /// No appliance answers there.
    Unreachable,
    /// One side does not know the other's key.
    Untrusted,
    /// Somebody has to agree first.
    NotAgreed,
    /// Something else changes what serves, or has.
    Overtaken,
}

impl Kind {
    /// All there are, by their exit status.
    pub const ALL: [Self; 6] =
        [Self::Failed, Self::Usage, Self::Unreachable, Self::Untrusted, Self::NotAgreed, Self::Overtaken];

    /// The exit status.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::Untrusted => 4,
            Self::NotAgreed => 5,
            Self::Overtaken => 6,
        }
    }

    /// What it means, as the manual says it.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Failed => "It failed, or was refused. Nothing has changed, unless the message says so.",
            Self::Usage => "The command line is wrong, or names a file that cannot be read.",
            Self::Unreachable => "No appliance answers: it is not up, not there, or too slow.",
            Self::Untrusted => {
                "Not trusted: the appliance's key is not known or has changed, or yours is not an operator's."
            }
            Self::NotAgreed => "Nothing is changed, because somebody has to agree to it first: --yes.",
            Self::Overtaken => {
                "Nothing is changed, because something else changes what serves just now, or has since it was shown: look again."
            }
        }
    }
}

/// A failure. As JSON it is one object: `kind` and `error`, and `help` where something can be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// What kind it is.
    pub kind: Kind,
    /// What failed, and with what.
    pub error: String,
    /// What to do now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Failure {
    /// One about which nothing more is known.
    pub fn new(kind: Kind, error: impl Into<String>) -> Self {
        Self { kind, error: error.into(), help: None }
    }

    /// With what to do now.
    #[must_use]
    pub fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// A file that a command line names cannot be read.
    #[must_use]
    pub fn unreadable(file: &Path, error: &std::io::Error) -> Self {
        Self::new(Kind::Usage, format!("{}: {error}", file.display()))
    }

    /// What an error is: what is known of one in its chain, with what was being done in front.
    #[must_use]
    pub fn of(error: &anyhow::Error) -> Self {
        let mut before = String::new();
        for cause in error.chain() {
            let known = (cause.downcast_ref::<Self>().cloned())
                .or_else(|| cause.downcast_ref::<client::Error>().map(client::Error::failure))
                .or_else(|| cause.downcast_ref::<Untrusted>().map(Untrusted::failure));
            if let Some(known) = known {
                return Self { error: before + &known.error, ..known };
            }
            let _ = write!(before, "{cause}: ");
        }
        Self::new(Kind::Failed, format!("{error:#}"))
    }

    /// As it stands on standard error: one JSON object in a line, or for a person.
    #[must_use]
    pub fn text(&self, json: bool) -> String {
        if json { serde_json::to_string(self).unwrap_or_default() + "\n" } else { format!("gaia: {self}\n") }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.error.trim_end())?;
        match &self.help {
            Some(help) => write!(f, "\nhelp: {}", help.trim_end()),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn each_kind_has_a_status_of_its_own_and_none_is_zero() {
        let statuses: Vec<u8> = Kind::ALL.iter().map(|kind| kind.status()).collect();
        assert_eq!(statuses, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn what_is_known_of_a_failure_outlives_what_is_said_around_it() {
        let refused = Failure::new(Kind::NotAgreed, "it ends a state").help("--yes");
        let error = Err::<(), _>(refused.clone()).context("deploying a.toml").unwrap_err();
        let found = Failure::of(&error);
        assert_eq!(found.error, "deploying a.toml: it ends a state");
        assert_eq!((found.kind, found.help.as_deref()), (Kind::NotAgreed, Some("--yes")));
        assert_eq!(found.text(false), "gaia: deploying a.toml: it ends a state\nhelp: --yes\n");
        let json: serde_json::Value = serde_json::from_str(&refused.text(true)).unwrap();
        assert_eq!(json, serde_json::json!({ "kind": "not_agreed", "error": "it ends a state", "help": "--yes" }));
        let other = Failure::of(&anyhow::anyhow!("inner").context("outer"));
        assert_eq!((other.kind, other.error.as_str()), (Kind::Failed, "outer: inner"));
        assert!(!other.text(true).contains("help"));
    }

    #[test]
    fn an_appliances_error_keeps_its_kind_through_all_layers() {
        let nobody = client::Client::new("/nonexistent/socket".into()).status().unwrap_err();
        let failure = Failure::of(&anyhow::Error::from(nobody));
        assert_eq!(failure.kind, Kind::Unreachable);
        assert!(failure.error.contains("/nonexistent/socket") && failure.help.is_some(), "{failure}");
    }
}
