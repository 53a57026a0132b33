//! The debug channel: a virtio-serial port named `gaia.debug`, over which a guest that has a debug agent answers
//! one line to each line it is sent.

use crate::console::Console;
use crate::error::Error;
use crate::process::{Ending, deadline, lock};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The port's name, as the guest sees it in `/sys/class/virtio-ports/*/name`.
pub(crate) const PORT: &str = "gaia.debug";
/// The longest line, either way.
const LINE_LIMIT: usize = 16 << 20;
/// For an agent on a busy, emulated machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A machine's debug channel. One request at a time; calls from several threads queue up.
#[derive(Debug)]
pub struct DebugChannel {
    wire: Mutex<Wire>,
    console: Console,
    ending: Arc<Ending>,
}

#[derive(Debug)]
struct Wire {
    stream: UnixStream,
    received: Vec<u8>,
    in_step: bool,
}

impl DebugChannel {
    pub(crate) fn open(stream: UnixStream, console: Console, ending: Arc<Ending>) -> Self {
        Self { wire: Mutex::new(Wire { stream, received: Vec::new(), in_step: true }), console, ending }
    }

    /// Sends one line and returns the line that answers it, both without their ends; waits 30 seconds.
    ///
    /// QEMU holds the request until the guest has opened the port, so it may be sent before that.
    ///
    /// # Errors
    /// No answer comes in time, QEMU ends, or either is no single line. A request that is not answered spoils the channel,
    /// since its late answer would pass for the next one's.
    pub fn request(&self, line: &str) -> Result<String, Error> {
        self.request_within(line, ANSWER_LIMIT)
    }

    /// [`DebugChannel::request`] with another limit.
    ///
    /// # Errors
    /// As [`DebugChannel::request`].
    pub fn request_within(&self, line: &str, timeout: Duration) -> Result<String, Error> {
        if line.contains('\n') || line.len() > LINE_LIMIT {
            return Err(Error::DebugLine { which: "request", limit: LINE_LIMIT });
        }
        let mut wire = lock(&self.wire);
        if !wire.in_step {
            return Err(Error::DebugOutOfStep);
        }
        wire.in_step = false;
        match wire.exchange(line, deadline(timeout)) {
            Ok(Some(answer)) => {
                wire.in_step = true;
                Ok(answer)
            }
            Ok(None) => Err(Error::DebugLine { which: "answer", limit: LINE_LIMIT }),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(Error::DebugSilent { request: line.to_owned(), waited: timeout, tail: self.console.tail() })
            }
            Err(_) => Err(match self.ending.wait(Duration::from_secs(5)) {
                Some(exit) => Error::Died {
                    expected: format!("an answer to {line:?} on the debug channel"),
                    status: exit.status,
                    stderr: exit.stderr,
                    tail: self.console.tail(),
                },
                None => Error::ChannelClosed { channel: "debug channel", tail: self.console.tail() },
            }),
        }
    }
}

impl Wire {
    /// Nothing if the answer is no line of UTF-8 within the limit.
    fn exchange(&mut self, line: &str, deadline: Instant) -> io::Result<Option<String>> {
        let left = || match deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::Error::from(io::ErrorKind::TimedOut)),
            left => Ok(Some(left)),
        };
        self.stream.set_write_timeout(left()?)?;
        self.stream.write_all(format!("{line}\n").as_bytes())?;
        let mut chunk = vec![0; 64 << 10];
        let mut searched = 0;
        loop {
            if let Some(newline) = self.received[searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.received.split_off(searched + newline + 1);
                let mut answer = std::mem::replace(&mut self.received, rest);
                answer.pop();
                return Ok(String::from_utf8(answer).ok());
            }
            searched = self.received.len();
            if searched > LINE_LIMIT {
                return Ok(None);
            }
            self.stream.set_read_timeout(left()?)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::thread;

    fn channel() -> (DebugChannel, UnixStream) {
        let (console, _) = UnixStream::pair().unwrap();
        let ending = Arc::new(Ending::default());
        let status = std::os::unix::process::ExitStatusExt::from_raw(0);
        ending.set(crate::Exit { status, reason: None, stderr: String::new() });
        let console = Console::open(console, Arc::clone(&ending), None).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        (DebugChannel::open(near, console, ending), far)
    }

    #[test]
    fn line_for_line() {
        let (debug, mut guest) = channel();
        let agent = thread::spawn(move || {
            let mut lines = BufReader::new(guest.try_clone().unwrap()).lines();
            for _ in 0..2 {
                let line = lines.next().unwrap().unwrap();
                let (first, second) = line.split_at(1);
                guest.write_all(format!("<{first}").as_bytes()).unwrap();
                guest.write_all(format!("{second}>\n").as_bytes()).unwrap();
            }
        });
        assert_eq!(debug.request("ping").unwrap(), "<ping>");
        assert_eq!(debug.request("{}").unwrap(), "<{}>");
        agent.join().unwrap();
        assert!(matches!(debug.request("a\nb").unwrap_err(), Error::DebugLine { which: "request", .. }));
        assert!(matches!(debug.request("gone").unwrap_err(), Error::Died { .. }));
    }

    #[test]
    fn silence_spoils_the_channel() {
        let (debug, mut guest) = channel();
        let error = debug.request_within("x", Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, Error::DebugSilent { .. }), "{error}");
        guest.write_all(b"late\n").unwrap();
        assert!(matches!(debug.request("y").unwrap_err(), Error::DebugOutOfStep));
    }
}
