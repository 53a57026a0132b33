//! The serial console: everything the machine prints, searched with a cursor; and the keyboard.

use crate::error::{Error, Tail};
use crate::process::{Ending, deadline, lock};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// More than this is forgotten from the front.
const KEPT_BYTES: usize = 16 << 20;
/// How many lines an error shows.
const TAIL_LINES: usize = 40;
/// A guest that reads its serial port at all reads within this.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Between the end of the console and the end of QEMU.
const DEATH_LIMIT: Duration = Duration::from_secs(5);

/// A line of the console in which a pattern was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The line as printed so far, without its end; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// Whether the line's end has been seen. A prompt has none.
    pub complete: bool,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The machine's serial port. Clones are the same console and share its cursor.
///
/// Every `wait_*` searches from the cursor, which stands right behind the last match: a pattern that came before an earlier
/// match is never found again, one that came after it is found even if it was printed long before the call.
#[derive(Debug, Clone)]
pub struct Console {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    keyboard: Mutex<UnixStream>,
    ending: Arc<Ending>,
}

#[derive(Debug)]
struct State {
    bytes: Bytes,
    cursor: u64,
    end: Option<End>,
    /// Nothing is read.
    mute: bool,
}

#[derive(Debug, Clone)]
enum End {
    Closed,
    Transcript(Arc<io::Error>),
}

impl Console {
    /// Starts to read at once, and writes everything also to `transcript`.
    pub(crate) fn open(stream: UnixStream, ending: Arc<Ending>, transcript: Option<File>) -> io::Result<Self> {
        let reader = stream.try_clone()?;
        stream.set_write_timeout(Some(SEND_LIMIT))?;
        let state = State { bytes: Bytes::new(KEPT_BYTES), cursor: 0, end: None, mute: false };
        let inner =
            Arc::new(Inner { state: Mutex::new(state), changed: Condvar::new(), keyboard: Mutex::new(stream), ending });
        let shared = Arc::clone(&inner);
        thread::Builder::new().name("qemu console".into()).spawn(move || shared.collect(reader, transcript))?;
        Ok(Self { inner })
    }

    /// Waits until `pattern` is printed, in a finished line or not, and puts the cursor right behind it.
    ///
    /// # Errors
    /// It is not printed in time, or QEMU ends: both show the console's last lines, the latter at once and with QEMU's words.
    pub fn wait_for(&self, pattern: &str, timeout: Duration) -> Result<Line, Error> {
        self.search(&[pattern], timeout, false).map(|(_, line)| line)
    }

    /// Like [`Console::wait_for`], but waits for the end of the line too and puts the cursor on the next one.
    ///
    /// # Errors
    /// As [`Console::wait_for`].
    pub fn wait_for_line(&self, pattern: &str, timeout: Duration) -> Result<Line, Error> {
        self.search(&[pattern], timeout, true).map(|(_, line)| line)
    }

    /// Waits for whichever pattern is printed first, and says which by its index.
    ///
    /// # Errors
    /// As [`Console::wait_for`].
    pub fn wait_for_any(&self, patterns: &[&str], timeout: Duration) -> Result<(usize, Line), Error> {
        self.search(patterns, timeout, false)
    }

    /// Nothing at all is printed from now on for this long.
    ///
    /// # Errors
    /// Something is, or QEMU ends.
    pub fn expect_quiet(&self, window: Duration) -> Result<(), Error> {
        let deadline = deadline(window);
        let mut state = lock(&self.inner.state);
        let from = state.bytes.end();
        loop {
            if state.bytes.end() > from {
                let expected = "been quiet".to_owned();
                let printed = String::from_utf8_lossy(state.bytes.since(from)).into_owned();
                return Err(Error::NotQuiet { expected, window, printed, tail: state.tail() });
            }
            state = match self.inner.wait(state, deadline, || "the end of a quiet time".to_owned())? {
                Waited::More(state) => state,
                Waited::Late(_) => return Ok(()),
            };
        }
    }

    /// `pattern` is not printed between the cursor and now, nor for this long. The cursor stays.
    ///
    /// # Errors
    /// It is printed, or QEMU ends.
    pub fn expect_absent(&self, pattern: &str, window: Duration) -> Result<(), Error> {
        let deadline = deadline(window);
        let mut state = lock(&self.inner.state);
        loop {
            let from = state.cursor;
            if let Some(at) = state.bytes.find(from, pattern.as_bytes()) {
                let expected = format!("not printed {pattern:?}");
                let printed = state.bytes.line(at).0.text;
                return Err(Error::NotQuiet { expected, window, printed, tail: state.tail() });
            }
            state = match self.inner.wait(state, deadline, || format!("{pattern:?} to stay away"))? {
                Waited::More(state) => state,
                Waited::Late(_) => return Ok(()),
            };
        }
    }

    /// Types a line and presses Enter, which a terminal sends as a carriage return.
    ///
    /// # Errors
    /// The machine does not take it within ten seconds.
    pub fn send_line(&self, line: &str) -> Result<(), Error> {
        self.send_bytes(format!("{line}\r").as_bytes())
    }

    /// Types these bytes.
    ///
    /// # Errors
    /// The machine does not take them within ten seconds.
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<(), Error> {
        lock(&self.inner.keyboard).write_all(bytes).map_err(|source| Error::Send { channel: "console", source })
    }

    /// Reads nothing any more of what the machine prints, or reads on: a line that nobody listens to, and that takes nothing once what is
    /// on its way fills up.
    pub fn mute(&self, mute: bool) {
        lock(&self.inner.state).mute = mute;
        self.inner.changed.notify_all();
    }

    /// Everything printed so far (the last 16 MiB of it), as text.
    #[must_use]
    pub fn transcript(&self) -> String {
        lock(&self.inner.state).bytes.text()
    }

    /// A reader of its own, from the first byte that is still kept. It neither sees nor moves the cursor.
    #[must_use]
    pub fn follow(&self) -> Follower {
        Follower { inner: Arc::clone(&self.inner), next: 0 }
    }

    pub(crate) fn tail(&self) -> Tail {
        lock(&self.inner.state).tail()
    }

    fn search(&self, patterns: &[&str], timeout: Duration, whole: bool) -> Result<(usize, Line), Error> {
        let deadline = deadline(timeout);
        let overlap = patterns.iter().map(|pattern| pattern.len()).max().unwrap_or(0).saturating_sub(1) as u64;
        let mut state = lock(&self.inner.state);
        let mut from = state.cursor;
        loop {
            let first = |(index, pattern): (usize, &&str)| Some((state.bytes.find(from, pattern.as_bytes())?, index));
            if let Some((at, index)) = patterns.iter().enumerate().filter_map(first).min() {
                let (line, after) = state.bytes.line(at);
                if line.complete || !whole || state.end.is_some() {
                    state.cursor = if whole { after } else { at + patterns[index].len() as u64 };
                    return Ok((index, line));
                }
                from = at;
            } else {
                // What is already searched need not be again, but for a pattern whose beginning it ends with.
                from = from.max(state.bytes.end().saturating_sub(overlap));
            }
            state = match self.inner.wait(state, deadline, || alternatives(patterns))? {
                Waited::More(state) => state,
                Waited::Late(state) => {
                    return Err(Error::Timeout {
                        pattern: alternatives(patterns),
                        waited: timeout,
                        tail: state.tail(),
                    });
                }
            };
        }
    }
}

fn alternatives(patterns: &[&str]) -> String {
    patterns.iter().map(|pattern| format!("{pattern:?}")).collect::<Vec<_>>().join(" or ")
}

enum Waited<'a> {
    More(MutexGuard<'a, State>),
    Late(MutexGuard<'a, State>),
}

impl Inner {
    /// Until something changes or the deadline; an error once the console has ended.
    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
        expected: impl Fn() -> String,
    ) -> Result<Waited<'a>, Error> {
        if let Some(end) = state.end.clone() {
            let tail = state.tail();
            drop(state);
            return Err(self.ended(&end, expected(), tail));
        }
        let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
            return Ok(Waited::Late(state));
        };
        Ok(Waited::More(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0))
    }

    fn ended(&self, end: &End, expected: String, tail: Tail) -> Error {
        match end {
            End::Transcript(source) => Error::Transcript { source: Arc::clone(source) },
            End::Closed => match self.ending.wait(DEATH_LIMIT) {
                Some(exit) => Error::Died { expected, status: exit.status, stderr: exit.stderr, tail },
                None => Error::ChannelClosed { channel: "console", tail },
            },
        }
    }

    /// The reader thread: to the end of the stream, whatever happens to the transcript.
    fn collect(&self, mut stream: UnixStream, mut transcript: Option<File>) {
        let mut chunk = vec![0; 64 << 10];
        loop {
            let mut state = lock(&self.state);
            while state.mute {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            drop(state);
            let count = match stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let failed = transcript.as_mut().and_then(|file| file.write_all(&chunk[..count]).err());
            let mut state = lock(&self.state);
            state.bytes.push(&chunk[..count]);
            if let Some(error) = failed {
                transcript = None;
                state.end = Some(End::Transcript(Arc::new(error)));
            }
            drop(state);
            self.changed.notify_all();
        }
        lock(&self.state).end.get_or_insert(End::Closed);
        self.changed.notify_all();
    }
}

impl State {
    fn tail(&self) -> Tail {
        self.bytes.tail(TAIL_LINES)
    }
}

/// Reads a console from its beginning to its end, chunk by chunk.
#[derive(Debug)]
pub struct Follower {
    inner: Arc<Inner>,
    next: u64,
}

impl Follower {
    /// The next bytes, as soon as there are any; nothing once the console has ended, which it does with QEMU.
    pub fn next_chunk(&mut self) -> Option<Vec<u8>> {
        let mut state = lock(&self.inner.state);
        loop {
            let fresh = state.bytes.since(self.next).to_vec();
            self.next = state.bytes.end();
            if !fresh.is_empty() {
                return Some(fresh);
            }
            if state.end.is_some() {
                return None;
            }
            state = self.inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A stream's bytes under their positions since its beginning, of which only the last `limit` are kept.
#[derive(Debug)]
struct Bytes {
    /// How many bytes came before the first kept one.
    start: u64,
    kept: Vec<u8>,
    limit: usize,
}

impl Bytes {
    fn new(limit: usize) -> Self {
        Self { start: 0, kept: Vec::new(), limit }
    }

    fn end(&self) -> u64 {
        self.start + self.kept.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
        if self.kept.len() > self.limit {
            // A quarter more than necessary, so that not every push moves everything.
            let forgotten = self.kept.len() - (self.limit - self.limit / 4);
            self.kept.drain(..forgotten);
            self.start += forgotten as u64;
        }
    }

    fn since(&self, position: u64) -> &[u8] {
        let skipped = usize::try_from(position.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.kept.get(skipped..).unwrap_or_default()
    }

    /// Where `pattern` begins, at `from` or later.
    fn find(&self, from: u64, pattern: &[u8]) -> Option<u64> {
        let from = from.max(self.start);
        let offset = match pattern.len() {
            0 => Some(0),
            length => self.since(from).windows(length).position(|window| window == pattern),
        };
        offset.map(|offset| from + offset as u64)
    }

    /// The line around a kept position, and where the next one begins.
    fn line(&self, position: u64) -> (Line, u64) {
        let at = self.kept.len() - self.since(position).len();
        let begin = self.kept[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let length = self.kept[at..].iter().position(|&byte| byte == b'\n');
        let end = length.map_or(self.kept.len(), |length| at + length);
        let text = String::from_utf8_lossy(&self.kept[begin..end]);
        let line = Line { text: text.trim_end_matches('\r').to_owned(), complete: length.is_some() };
        (line, self.start + end as u64 + u64::from(length.is_some()))
    }

    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept);
        if self.start == 0 { text.into_owned() } else { format!("[{} bytes forgotten]\n{text}", self.start) }
    }

    fn tail(&self, lines: usize) -> Tail {
        let body = self.kept.strip_suffix(b"\n").unwrap_or(&self.kept);
        let newlines = body.iter().enumerate().rev().filter(|&(_, &byte)| byte == b'\n').map(|(at, _)| at + 1);
        let begin = newlines.take(lines).nth(lines - 1).unwrap_or(0);
        Tail(String::from_utf8_lossy(&body[begin..]).replace('\r', ""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Exit;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    const SOON: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(30);

    fn console() -> (Console, UnixStream, Arc<Ending>) {
        let (near, far) = UnixStream::pair().unwrap();
        let ending = Arc::new(Ending::default());
        (Console::open(near, Arc::clone(&ending), None).unwrap(), far, ending)
    }

    #[test]
    fn a_mute_console_reads_nothing_until_it_reads_on() {
        let (console, mut machine, _) = console();
        console.mute(true);
        machine.set_write_timeout(Some(SHORT)).unwrap();
        // At most what one read takes is read.
        let mut taken = 0;
        while let Ok(n) = machine.write(&[b'x'; 4096]) {
            taken += n;
            assert!(taken < 8 << 20, "somebody reads");
        }
        console.mute(false);
        machine.set_write_timeout(None).unwrap();
        machine.write_all(b"the end\n").unwrap();
        console.wait_for_line("the end", SOON).unwrap();
    }

    #[test]
    fn cursor_stands_behind_the_match() {
        let (console, mut machine, _) = console();
        machine.write_all(b"one two one\r\nthree\r\n").unwrap();
        let line = Line { text: "one two one".into(), complete: true };
        assert_eq!(console.wait_for("one", SOON).unwrap(), line);
        assert_eq!(console.wait_for("one", SOON).unwrap(), line);
        console.wait_for("one", SHORT).unwrap_err();
        // A wait that failed has not moved it.
        assert_eq!(console.wait_for("three", SOON).unwrap().to_string(), "three");
        console.wait_for("two", SHORT).unwrap_err();
    }

    #[test]
    fn whole_lines_skip_their_rest() {
        let (console, mut machine, _) = console();
        machine.write_all(b"port=80").unwrap();
        console.wait_for_line("port=", SHORT).unwrap_err();
        machine.write_all(b"80 port=9\nnext").unwrap();
        let line = console.wait_for_line("port=", SOON).unwrap();
        assert_eq!(line, Line { text: "port=8080 port=9".into(), complete: true });
        console.wait_for("port=", SHORT).unwrap_err();
        console.wait_for("next", SOON).unwrap();
    }

    #[test]
    fn prompts_have_no_newline() {
        let (console, mut machine, _) = console();
        machine.write_all(b"boot\r\ngaia> ").unwrap();
        assert_eq!(console.wait_for("gaia>", SOON).unwrap(), Line { text: "gaia> ".into(), complete: false });
        machine.write_all(b"help\r\nnothing\r\ngaia> ").unwrap();
        assert_eq!(console.wait_for("gaia>", SOON).unwrap().text, "gaia> ");
        assert_eq!(console.transcript(), "boot\r\ngaia> help\r\nnothing\r\ngaia> ");
    }

    #[test]
    fn a_pattern_may_arrive_in_pieces() {
        let (console, mut machine, _) = console();
        let waiting = {
            let console = console.clone();
            thread::spawn(move || console.wait_for("serving", SOON))
        };
        for byte in b"xx serv serving" {
            machine.write_all(&[*byte]).unwrap();
        }
        assert!(waiting.join().unwrap().unwrap().text.starts_with("xx serv serving"));
    }

    #[test]
    fn first_of_several_wins() {
        let (console, mut machine, _) = console();
        machine.write_all(b"b then a\n").unwrap();
        assert_eq!(console.wait_for_any(&["a", "zzz", "b"], SOON).unwrap().0, 2);
        assert_eq!(console.wait_for_any(&["a", "b"], SOON).unwrap().0, 0);
        assert!(console.wait_for_any(&["a", "b"], SHORT).unwrap_err().to_string().contains("\"a\" or \"b\""));
    }

    #[test]
    fn timeout_shows_the_last_lines() {
        let (console, mut machine, _) = console();
        for n in 1..=60 {
            write!(machine, "line {n}\r\n").unwrap();
        }
        console.wait_for("line 60", SOON).unwrap();
        let error = console.wait_for("never", SHORT).unwrap_err();
        assert!(matches!(&error, Error::Timeout { waited, .. } if *waited == SHORT));
        let text = error.to_string();
        assert!(text.contains("\"never\"") && text.contains("| line 21\n") && text.ends_with("| line 60"), "{text}");
        assert!(!text.contains("line 20\n"), "{text}");
    }

    #[test]
    fn death_is_reported_at_once_with_its_words() {
        let (console, mut machine, ending) = console();
        machine.write_all(b"last words").unwrap();
        drop(machine);
        let stderr = "no such device\n".to_owned();
        ending.set(Exit { status: ExitStatus::from_raw(1 << 8), reason: None, stderr });
        let hour = Duration::from_hours(1);
        assert_eq!(console.wait_for("words", hour).unwrap().text, "last words");
        let error = console.wait_for("more", hour).unwrap_err();
        assert!(matches!(error, Error::Died { .. }));
        let text = error.to_string();
        assert!(text.contains("no such device") && text.contains("last words") && text.contains("\"more\""), "{text}");
        assert!(matches!(console.expect_quiet(hour).unwrap_err(), Error::Died { .. }));
    }

    #[test]
    fn quiet_is_quiet() {
        let (console, mut machine, _) = console();
        machine.write_all(b"oops\n").unwrap();
        console.wait_for("oops", SOON).unwrap();
        console.wait_for("\n", SOON).unwrap();
        console.expect_quiet(SHORT).unwrap();
        console.expect_absent("oops", SHORT).unwrap();
        machine.write_all(b"again oops\n").unwrap();
        let error = console.expect_absent("oops", SOON).unwrap_err();
        assert!(matches!(&error, Error::NotQuiet { printed, .. } if printed == "again oops"), "{error}");
        let noisy = thread::spawn(move || machine.write_all(b"!").map(|()| machine));
        let result = console.expect_quiet(SHORT);
        drop(noisy.join().unwrap().unwrap());
        // Whether the byte came before or within the window is the scheduler's choice; both are described right.
        assert!(result.is_ok() || matches!(result, Err(Error::NotQuiet { printed, .. }) if printed == "!"));
    }

    #[test]
    fn keys_go_in_and_a_follower_sees_all() {
        let (console, mut machine, _) = console();
        console.send_line("poweroff").unwrap();
        let mut typed = [0; 9];
        machine.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"poweroff\r");
        machine.write_all(b"bye").unwrap();
        console.wait_for("bye", SOON).unwrap();
        let mut follower = console.follow();
        assert_eq!(follower.next_chunk().unwrap(), b"bye");
        drop(machine);
        assert_eq!(follower.next_chunk(), None);
    }

    #[test]
    fn transcript_file_gets_everything() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let console = Console::open(near, Arc::default(), Some(file.reopen().unwrap())).unwrap();
        far.write_all(b"a\r\nb> ").unwrap();
        console.wait_for("b>", SOON).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"a\r\nb> ");
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let console = Console::open(near, Arc::default(), Some(full)).unwrap();
        far.write_all(b"a").unwrap();
        assert!(matches!(console.wait_for("b", SOON).unwrap_err(), Error::Transcript { .. }));
    }

    #[test]
    fn old_bytes_are_forgotten_but_keep_their_places() {
        let mut bytes = Bytes::new(16);
        bytes.push(b"0123456789abcdef");
        assert_eq!(bytes.start, 0);
        bytes.push(b"gh\nij");
        assert_eq!((bytes.start, bytes.end(), bytes.kept.as_slice()), (9, 21, b"9abcdefgh\nij".as_slice()));
        assert_eq!(bytes.find(0, b"0"), None);
        assert_eq!(bytes.find(0, b"9a"), Some(9));
        assert_eq!(bytes.find(19, b"ij"), Some(19));
        assert_eq!(bytes.find(20, b"ij"), None);
        assert_eq!(bytes.find(99, b"ij"), None);
        assert_eq!(bytes.line(12), (Line { text: "9abcdefgh".into(), complete: true }, 19));
        assert_eq!(bytes.line(20), (Line { text: "ij".into(), complete: false }, 21));
        assert_eq!(bytes.text(), "[9 bytes forgotten]\n9abcdefgh\nij");
        assert_eq!(bytes.tail(1), Tail("ij".into()));
        bytes.push(&[b'z'; 1000]);
        assert_eq!((bytes.end(), bytes.kept.len()), (1021, 12));
    }
}
