//! QEMU's machine protocol: JSON objects, one per line (qemu: docs/interop/qmp-spec).

use crate::error::{Error, Tail};
use crate::process::{Ending, deadline, lock};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// QEMU answers from its main loop; on a busy host that can take seconds, never this long.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// The longest line that is read; QEMU's are far shorter.
const LINE_LIMIT: u64 = 4 << 20;
/// Older events than this many are forgotten.
const EVENTS_KEPT: usize = 1024;

/// Something QEMU tells unasked, such as `RESET` or `WATCHDOG`.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The event's name.
    pub name: String,
    /// Its details; `null` if it has none.
    pub data: Value,
}

/// Why a machine shut down (qemu: `ShutdownCause`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShutdownReason {
    /// The guest switched itself off.
    GuestShutdown,
    /// The guest, or its watchdog, asked for a reset, and this machine ends on a reset.
    GuestReset,
    /// The guest reported a panic.
    GuestPanic,
    /// `quit` on this connection.
    Quit,
    /// A signal to QEMU.
    Signal,
    /// Another reason, in QEMU's word.
    Other(String),
}

impl ShutdownReason {
    fn from_word(word: &str) -> Self {
        match word {
            "guest-shutdown" => Self::GuestShutdown,
            "guest-reset" => Self::GuestReset,
            "guest-panic" => Self::GuestPanic,
            "host-qmp-quit" => Self::Quit,
            "host-signal" => Self::Signal,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// A connection to QEMU's machine protocol.
#[derive(Debug)]
pub struct Qmp {
    commands: Mutex<(UnixStream, u64)>,
    shared: Arc<Shared>,
    ending: Arc<Ending>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    greeted: bool,
    closed: bool,
    answers: BTreeMap<u64, Result<Value, (String, String)>>,
    events: VecDeque<Event>,
    shutdown: Option<ShutdownReason>,
}

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode.
    pub(crate) fn open(stream: UnixStream, ending: Arc<Ending>) -> Result<Self, Error> {
        let broken = |source| Error::Send { channel: "qmp", source };
        let reader = BufReader::new(stream.try_clone().map_err(broken)?);
        stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(broken)?;
        let shared = Arc::new(Shared::default());
        let collector = Arc::clone(&shared);
        thread::Builder::new().name("qemu qmp".into()).spawn(move || collector.collect(reader)).map_err(broken)?;
        let qmp = Self { commands: Mutex::new((stream, 0)), shared, ending };
        qmp.wait("its greeting", ANSWER_LIMIT, |state| state.greeted.then_some(()))?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs a command; `arguments` is an object, or `null` for none.
    ///
    /// # Errors
    /// QEMU refuses it, ends, or does not answer within 30 seconds.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let id = {
            let mut commands = lock(&self.commands);
            commands.1 += 1;
            let id = commands.1;
            let mut request = json!({ "execute": command, "id": id });
            if !arguments.is_null() {
                request["arguments"] = arguments;
            }
            // A QEMU that is gone is found out below, with its last words.
            let sent = commands.0.write_all(format!("{request}\n").as_bytes());
            match sent {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(Error::Send { channel: "qmp", source: error });
                }
                _ => id,
            }
        };
        let answer = self.wait(&format!("an answer to {command}"), ANSWER_LIMIT, |state| state.answers.remove(&id))?;
        answer.map_err(|(class, text)| Error::QmpRefused { command: command.to_owned(), class, text })
    }

    /// Runs a command of QEMU's human monitor and gives what it prints.
    ///
    /// # Errors
    /// As [`Qmp::execute`]. What the human monitor thinks of the command is in its text.
    pub fn monitor(&self, line: &str) -> Result<String, Error> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// The machine's run state: `running`, `paused`, `prelaunch`, `internal-error`, …
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn status(&self) -> Result<String, Error> {
        let answer = self.execute("query-status", Value::Null)?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The oldest event of this name that no earlier call has returned, as soon as there is one.
    ///
    /// # Errors
    /// It does not come in time, or QEMU ends.
    pub fn wait_event(&self, name: &str, timeout: Duration) -> Result<Event, Error> {
        self.wait(&format!("the event {name}"), timeout, |state| {
            let at = state.events.iter().position(|event| event.name == name)?;
            state.events.remove(at)
        })
    }

    /// Why the machine shut down, if it said so; waits for the end of the connection, as it is asked for only after QEMU's.
    pub(crate) fn shutdown_reason(&self) -> Option<ShutdownReason> {
        let known = |state: &mut State| (state.shutdown.is_some() || state.closed).then(|| state.shutdown.clone());
        self.wait("its end", Duration::from_secs(5), known).ok().flatten()
    }

    fn wait<T>(
        &self,
        expected: &str,
        timeout: Duration,
        mut found: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = deadline(timeout);
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(found) = found(&mut state) {
                return Ok(found);
            }
            if state.closed {
                drop(state);
                return Err(match self.ending.wait(Duration::from_secs(5)) {
                    Some(exit) => Error::Died {
                        expected: expected.to_owned(),
                        status: exit.status,
                        stderr: exit.stderr,
                        tail: Tail::default(),
                    },
                    None => Error::ChannelClosed { channel: "qmp", tail: Tail::default() },
                });
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return Err(Error::QmpSilent { expected: expected.to_owned(), waited: timeout });
            };
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    /// The reader thread. Lines that are not understood are passed over.
    fn collect(&self, mut reader: impl BufRead) {
        let mut line = Vec::new();
        while matches!((&mut reader).take(LINE_LIMIT).read_until(b'\n', &mut line), Ok(count) if count > 0) {
            if let Some(message) = Message::parse(&line) {
                lock(&self.state).take(message);
                self.changed.notify_all();
            }
            line.clear();
        }
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}

impl State {
    fn take(&mut self, message: Message) {
        match message {
            Message::Greeting => self.greeted = true,
            Message::Answer { id, result } => {
                self.answers.insert(id, result);
            }
            Message::Event(event) => {
                if event.name == "SHUTDOWN" {
                    self.shutdown = event.data["reason"].as_str().map(ShutdownReason::from_word);
                }
                if self.events.len() == EVENTS_KEPT {
                    self.events.pop_front();
                }
                self.events.push_back(event);
            }
        }
    }
}

#[derive(Debug, PartialEq)]
enum Message {
    Greeting,
    Answer { id: u64, result: Result<Value, (String, String)> },
    Event(Event),
}

impl Message {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut object: Value = serde_json::from_slice(line).ok()?;
        if object.get("QMP").is_some() {
            return Some(Self::Greeting);
        }
        if let Some(name) = object["event"].as_str() {
            return Some(Self::Event(Event { name: name.to_owned(), data: object["data"].take() }));
        }
        let id = object["id"].as_u64()?;
        if let Some(error) = object.get("error") {
            let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
            return Some(Self::Answer { id, result: Err((text("class"), text("desc"))) });
        }
        Some(Self::Answer { id, result: Ok(object.get_mut("return")?.take()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let parse = |line: &str| Message::parse(line.as_bytes());
        let greeting =
            r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
        assert_eq!(parse(greeting), Some(Message::Greeting));
        assert_eq!(parse(r#"{"return": {}, "id": 3}"#), Some(Message::Answer { id: 3, result: Ok(json!({})) }));
        let refused = r#"{"id": 4, "error": {"class": "CommandNotFound", "desc": "no such command"}}"#;
        let result = Err(("CommandNotFound".into(), "no such command".into()));
        assert_eq!(parse(refused), Some(Message::Answer { id: 4, result }));
        let event =
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "WATCHDOG", "data": {"action": "reset"}}"#;
        let data = json!({ "action": "reset" });
        assert_eq!(parse(event), Some(Message::Event(Event { name: "WATCHDOG".into(), data })));
        assert_eq!(
            parse("{\"event\": \"STOP\"}\r\n"),
            Some(Message::Event(Event { name: "STOP".into(), data: Value::Null }))
        );
        for junk in
            ["", "[]", "17", "null", "{", "{}", r#"{"return": 1}"#, r#"{"id": 1}"#, r#"{"id": "x", "return": 1}"#]
        {
            assert_eq!(parse(junk), None, "{junk}");
        }
    }

    /// QEMU's part: greets, then answers each command with the next of these lines.
    fn served(answers: Vec<&'static str>) -> Qmp {
        let (near, mut far) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            far.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            let mut commands = BufReader::new(far.try_clone().unwrap()).lines();
            for answer in [r#"{"return": {}, "id": 1}"#].into_iter().chain(answers) {
                commands.next().unwrap().unwrap();
                far.write_all(format!("{answer}\r\n").as_bytes()).unwrap();
            }
        });
        let ending = Ending::default();
        let status = std::os::unix::process::ExitStatusExt::from_raw(0);
        ending.set(crate::Exit { status, reason: None, stderr: "bye".into() });
        Qmp::open(near, Arc::new(ending)).unwrap()
    }

    #[test]
    fn answers_find_their_commands_among_events() {
        let qmp = served(vec![
            "{\"event\": \"RESUME\"}\r\n{\"return\": {\"status\": \"running\"}, \"id\": 2}",
            r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 3}"#,
            "{\"event\": \"RESET\"}\r\n{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}",
        ]);
        assert_eq!(qmp.status().unwrap(), "running");
        assert!(qmp.monitor("x").unwrap_err().to_string().contains("human-monitor-command: no (GenericError)"));
        let died = qmp.execute("quit", Value::Null).unwrap_err();
        assert!(matches!(&died, Error::Died { stderr, .. } if stderr == "bye"), "{died}");
        assert_eq!(qmp.wait_event("RESET", Duration::ZERO).unwrap().name, "RESET");
        assert!(matches!(qmp.wait_event("RESET", Duration::ZERO).unwrap_err(), Error::Died { .. }));
        assert_eq!(qmp.shutdown_reason(), Some(ShutdownReason::GuestReset));
    }
}
