//! Who asks the API: each request knows, and each change leaves a line that says so.

use std::fmt;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use gaia_init::roles::users;

use super::Control;
use super::report::Line;
use crate::log::Event;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A process of this machine, through the Unix socket.
    Local {
        /// Its user, as the kernel knows it; none, if the kernel did not say.
        user: Option<u32>,
    },
    /// An operator, over the network, who has shown the key that is listed under this name.
    Operator {
        /// The name.
        name: String,
        /// Where the connection comes from.
        from: SocketAddr,
    },
}

impl Caller {
    /// Whether it asks over the network.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Operator { .. })
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { user: Some(users::CONSOLE) } => f.write_str("the console"),
            Self::Local { user: Some(user) } => write!(f, "user {user}"),
            Self::Local { user: None } => f.write_str("somebody on this machine"),
            Self::Operator { name, from } => write!(f, "{name} from {from}"),
        }
    }
}

impl Control {
    /// Leaves a line in the log about a change: who, what, and what came of it. What was asked for over the network is
    /// shown on the console, too: a change may end the log, as switching off does.
    pub(super) async fn audit(&self, caller: &Caller, what: &str, outcome: &str) {
        let text = format!("{caller}: {what}: {outcome}");
        self.note(&text);
        if caller.is_remote() {
            self.say(&text).await;
        }
    }

    /// Leaves a line in the log that is nobody's but control's.
    pub(super) fn note(&self, text: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let event = Event::Audit { text: text.to_owned().into() };
        let branes = self.plan.borrow().as_ref().map_or(0, |p| p.branes.len());
        self.push(Line { seq: 0, time_ns, core: None, brane: None, instance: None, event }, branes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_is_named_as_an_operator_knows_it() {
        let local = |user| Caller::Local { user }.to_string();
        assert_eq!(local(Some(users::CONSOLE)), "the console");
        assert_eq!(local(Some(1000)), "user 1000");
        let from = "192.0.2.7:4711".parse().unwrap();
        assert_eq!(Caller::Operator { name: "ann".into(), from }.to_string(), "ann from 192.0.2.7:4711");
    }
}
