//! How far a command is, in one line of a terminal that is drawn again and again and is gone before anything else is written. Who is
//! quick, writes to a file, or wants JSON sees nothing of it.
//!
//! No thread and no timer: whoever waits calls [`Progress::draw`] now and then.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _, stderr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Who is done before this has seen no line.
const AFTER: Duration = Duration::from_secs(1);
/// How often it is drawn again.
pub const EVERY: Duration = Duration::from_millis(100);
/// The widest line, in characters: one that is broken by the terminal cannot be taken back.
const WIDEST: usize = 200;

/// A line that tells how far something is.
#[derive(Debug, Clone, Default)]
pub struct Progress(Option<Arc<Mutex<Line>>>);

#[derive(Debug)]
struct Line {
    /// It is shown at all.
    shown: bool,
    since: Instant,
    words: String,
    /// Bytes that have gone, of how many.
    bytes: Option<(u64, u64)>,
    /// What stands on the terminal.
    drawn: String,
}

impl Progress {
    /// On standard error, if that is a terminal and `wanted`; what is told is kept from everybody otherwise.
    #[must_use]
    pub fn on_terminal(wanted: bool) -> Self {
        let shown = wanted && stderr().is_terminal();
        let (since, words, bytes, drawn) = (Instant::now(), String::new(), None, String::new());
        Self(Some(Arc::new(Mutex::new(Line { shown, since, words, bytes, drawn }))))
    }

    /// Whether what is told is taken care of here: if not, whoever tells it shows it in another way.
    #[must_use]
    pub fn cares(&self) -> bool {
        self.0.is_some()
    }

    /// Whether anything of it is ever drawn.
    #[must_use]
    pub fn is_seen(&self) -> bool {
        self.with(|line| line.shown).unwrap_or_default()
    }

    /// What is being done.
    pub fn doing(&self, words: &str) {
        self.with(|line| {
            words.clone_into(&mut line.words);
            line.bytes = None;
        });
    }

    /// How many bytes of how many have gone.
    pub fn bytes(&self, gone: u64, of: u64) {
        self.with(|line| line.bytes = Some((gone, of)));
    }

    /// Somebody was asked, and has taken their time.
    pub fn again(&self) {
        self.with(|line| line.since = Instant::now());
    }

    /// Draws the line, if it is time for it and it is another than the one that is there.
    pub fn draw(&self) {
        self.with(|line| {
            if let Some(bytes) = line.drawn(Instant::now(), width()) {
                let _ = stderr().write_all(bytes.as_bytes());
            }
        });
    }

    /// Takes the line away. What was being done is over.
    pub fn clear(&self) {
        self.with(|line| {
            line.words.clear();
            if !std::mem::take(&mut line.drawn).is_empty() {
                let _ = stderr().write_all(GONE.as_bytes());
            }
        });
    }

    fn with<T>(&self, act: impl FnOnce(&mut Line) -> T) -> Option<T> {
        let line = self.0.as_ref()?;
        Some(act(&mut line.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// To the line's beginning, and nothing in it (ECMA-48: CR, EL).
const GONE: &str = "\r\x1b[K";

impl Line {
    /// What to write so that the terminal shows how far it is now.
    fn drawn(&mut self, now: Instant, width: usize) -> Option<String> {
        if !self.shown || self.words.is_empty() || now.saturating_duration_since(self.since) < AFTER {
            return None;
        }
        let mut text = format!("· {}", self.words);
        if let Some((gone, of)) = self.bytes.filter(|(_, of)| *of > 0) {
            let percent = gone * 100 / of;
            let _ = match of >> 20 {
                0 => write!(text, "  {} of {} KiB, {percent} %", gone >> 10, of >> 10),
                _ => write!(text, "  {} of {} MiB, {percent} %", tenths(gone), tenths(of)),
            };
        }
        // The last column is left free: some terminals go on in the next line when it is taken.
        let text: String = text.chars().filter(|c| !c.is_control()).take(width.min(WIDEST).saturating_sub(1)).collect();
        if text == self.drawn {
            return None;
        }
        self.drawn.clone_from(&text);
        Some(format!("{GONE}{text}"))
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.drawn.is_empty() {
            let _ = stderr().write_all(GONE.as_bytes());
        }
    }
}

/// Bytes in MiB, with one digit behind the point.
fn tenths(bytes: u64) -> String {
    format!("{}.{}", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20)
}

/// The terminal's columns.
fn width() -> usize {
    let size = rustix::termios::tcgetwinsize(stderr());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).unwrap_or(80)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> (Line, Instant) {
        let since = Instant::now();
        (Line { shown: true, since, words: "sending a.wasm".into(), bytes: None, drawn: String::new() }, since)
    }

    #[test]
    fn nothing_is_shown_before_a_second_and_the_same_only_once() {
        let (mut line, since) = line();
        assert_eq!(line.drawn(since + AFTER / 2, 80), None);
        assert_eq!(line.drawn(since + AFTER, 80).unwrap(), "\r\x1b[K· sending a.wasm");
        assert_eq!(line.drawn(since + 2 * AFTER, 80), None);
        line.bytes = Some((3 << 19, 3 << 20));
        assert_eq!(line.drawn(since + 2 * AFTER, 80).unwrap(), "\r\x1b[K· sending a.wasm  1.5 of 3.0 MiB, 50 %");
        line.bytes = Some((2 << 10, 5 << 10));
        assert_eq!(line.drawn(since + 2 * AFTER, 80).unwrap(), "\r\x1b[K· sending a.wasm  2 of 5 KiB, 40 %");
        line.drawn.clear();
    }

    #[test]
    fn it_is_one_line_whatever_is_said_and_however_narrow_the_terminal() {
        let (mut line, since) = line();
        line.words = "a\nb\x1b[2J and more than there is room for".into();
        assert_eq!(line.drawn(since + AFTER, 12).unwrap(), "\r\x1b[K· ab[2J and");
        assert_eq!(line.drawn(since + AFTER, 0).unwrap(), GONE);
        line.drawn.clear();
    }

    #[test]
    fn who_is_no_terminal_is_told_nothing_and_takes_care_of_it() {
        let silent = Progress::on_terminal(false);
        silent.doing("x");
        assert!(silent.cares() && !silent.is_seen());
        silent.with(|line| assert_eq!(line.drawn(Instant::now() + 2 * AFTER, 80), None));
        assert!(!Progress::default().cares());
    }
}
