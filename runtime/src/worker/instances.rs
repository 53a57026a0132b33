//! What a worker and control say to each other: which instances are at work, and that there is something in the log.

use std::fmt;
use std::os::fd::AsFd;
use std::rc::Rc;

use gaia_init::wire::{self, Message, Unknown};
use serde::{Deserialize, Serialize};

use super::Worker;
use crate::channel::{Channel, sealed};

/// The largest list, in bytes.
pub const MAX_BYTES: u64 = 64 << 20;

/// What control and a worker say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Asks for the instances; the answer carries the same ticket and, beside it, the list.
    Instances {
        /// Chosen by control.
        ticket: u32,
    },
    /// The worker's alone: there are records for a reader that asked to be woken.
    Records,
}

impl Message for Word {
    fn parse(text: &str) -> Result<Self, Unknown> {
        if text == "records" {
            return Ok(Self::Records);
        }
        let ticket = text.strip_prefix("instances ").and_then(|t| t.parse().ok());
        ticket.map(|ticket| Self::Instances { ticket }).ok_or_else(|| Unknown::of(text))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instances { ticket } => write!(f, "instances {ticket}"),
            Self::Records => f.write_str("records"),
        }
    }
}

/// One instance at work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// `brane.NNN`
    pub name: String,
    /// The core it runs on.
    pub core: usize,
    /// Milliseconds since it was made.
    pub millis: u64,
}

/// Answers control until it is gone for good: init hands the same channel to a new control, so a quiet one is waited
/// for.
pub(super) async fn answer(worker: Rc<Worker>, control: Channel) {
    loop {
        let heard = tokio::select! {
            heard = control.receive::<Word>() => heard,
            () = worker.log.reader_is_wanted() => {
                let _ = control.send(&Word::Records, &[]).await;
                continue;
            }
        };
        match heard {
            Ok((Word::Instances { ticket }, _)) => {
                let running = |b: &Rc<super::Brane>| {
                    let name = b.plan.name.clone();
                    b.running().into_iter().map(move |(serial, millis)| (format!("{name}.{serial:03}"), millis))
                };
                let core = worker.core;
                let all = worker.branes.iter().flat_map(running);
                let all: Vec<Instance> = all.map(|(name, millis)| Instance { name, core, millis }).collect();
                let list = serde_json::to_vec(&all).unwrap_or_default();
                if let Ok(list) = sealed("instances", &list) {
                    let _ = control.send(&Word::Instances { ticket }, &[list.as_fd()]).await;
                }
            }
            Ok((Word::Records, _)) | Err(wire::Error::Unknown(_) | wire::Error::Malformed) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_word_survives_the_wire() {
        for word in [Word::Instances { ticket: 12 }, Word::Records] {
            assert_eq!(Word::parse(&word.to_string()), Ok(word));
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not(text in "\\PC{0,60}") {
            let _ = Word::parse(&text);
        }
    }
}
