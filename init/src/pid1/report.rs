//! The boot report, one line per step, and the events after it: the console's text, which PID 1 never waits for long.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// What waits for the console, in bytes. At 115,200 baud it is shown in 23 s.
const MAX_WAITING: usize = 256 * 1024;
/// What the whole boot may wait for the console. The report is about 2 KiB, 0.2 s at 115,200 baud; on a line that is
/// mute or unplugged the rest waits in the queue, and the boot goes on.
const BOOT_WAITS: Duration = Duration::from_secs(3);
/// What the last lines of the machine may take.
const LAST_WAITS: Duration = Duration::from_secs(1);
/// How often a console that takes nothing is tried.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// Why a step failed, in words for the console.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl<E: Into<Box<dyn std::error::Error>>> From<E> for Failure {
    fn from(e: E) -> Self {
        Self(e.into().to_string())
    }
}

/// Lines that wait for the console. When there are too many, the oldest give way, and their number is shown instead.
#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<String>,
    /// Their length together.
    bytes: usize,
    dropped: usize,
    /// The line that is being shown, and how much of it has been.
    begun: String,
    shown: usize,
}

impl Queue {
    fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > MAX_WAITING
            && let Some(oldest) = self.lines.pop_front()
        {
            self.bytes -= oldest.len();
            self.dropped += 1;
        }
    }

    fn next(&mut self) -> Option<String> {
        match std::mem::take(&mut self.dropped) {
            0 => {
                let line = self.lines.pop_front()?;
                self.bytes -= line.len();
                Some(line)
            }
            n => Some(format!("gaia: {n} lines are missing here: the console did not take them\n")),
        }
    }

    /// Writes until nothing is left, which it returns as `false`, or the writer takes no more for now.
    fn write(&mut self, mut writer: impl FnMut(&[u8]) -> Result<usize, Errno>) -> bool {
        loop {
            if self.shown >= self.begun.len() {
                let Some(line) = self.next() else { return false };
                (self.begun, self.shown) = (line, 0);
            }
            match writer(&self.begun.as_bytes()[self.shown..]) {
                Ok(0) | Err(Errno::AGAIN) => return true,
                Ok(n) => self.shown += n,
                Err(Errno::INTR) => {}
                Err(_) => {
                    // The console is gone, and with it whoever would have read this.
                    *self = Self::default();
                    return false;
                }
            }
        }
    }
}

/// The console's text.
pub(crate) struct Report {
    console: Option<OwnedFd>,
    queue: Queue,
    started: Instant,
    /// What the boot may still wait for the console.
    patience: Duration,
}

impl Report {
    /// Opens the kernel's console. Without one the report goes nowhere, and the boot goes on.
    pub(crate) fn open() -> Self {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let console = rustix::fs::open("/dev/console", flags, Mode::empty()).ok();
        Self { console, queue: Queue::default(), started: Instant::now(), patience: BOOT_WAITS }
    }

    /// Queues one line.
    pub(crate) fn line(&mut self, text: &str) {
        self.queue.push(format!("{text}\n"));
    }

    /// Shows what the console takes at once. Returns whether something is left.
    pub(crate) fn show(&mut self) -> bool {
        let console = self.console.as_ref();
        self.queue.write(|bytes| console.map_or(Ok(bytes.len()), |console| rustix::io::write(console, bytes)))
    }

    fn show_within(&mut self, most: Duration) -> Duration {
        let began = Instant::now();
        while self.show() && began.elapsed() < most {
            std::thread::sleep(TRY_EVERY);
        }
        began.elapsed()
    }

    /// Shows what is left before the machine ends.
    pub(crate) fn finish(&mut self) {
        self.show_within(LAST_WAITS);
    }

    /// Runs one step and writes its line: its name, what it achieved, its milliseconds. An error is its words.
    pub(crate) fn step<T: Outcome>(
        &mut self,
        name: &str,
        step: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T::Value, String> {
        let began = Instant::now();
        let outcome = step();
        let took = began.elapsed();
        let (value, said) = match outcome {
            Ok(outcome) => {
                let (value, said) = outcome.split();
                (Ok(value), said)
            }
            Err(Failure(why)) => {
                let said = format!("FAILED: {}", why.replace('\n', "\n                  "));
                (Err(format!("{name}: {why}")), said)
            }
        };
        self.line(&row(name, &said, took));
        let waited = self.show_within(self.patience);
        self.patience = self.patience.saturating_sub(waited);
        value
    }

    /// Queues a line of the running appliance, with the seconds since init began.
    pub(crate) fn say(&mut self, text: &str) {
        self.line(&format!("gaia: {text} [{:.3} s]", self.started.elapsed().as_secs_f32()));
    }
}

fn row(name: &str, said: &str, took: Duration) -> String {
    let micros = took.as_micros();
    format!("  {:>4}.{} ms  {name:<14} {said}", micros / 1000, micros / 100 % 10)
}

/// What a step gives: a value with words, or words alone.
pub(crate) trait Outcome {
    /// What is handed on.
    type Value;
    /// Parts the value from the words.
    fn split(self) -> (Self::Value, String);
}

impl Outcome for String {
    type Value = ();
    fn split(self) -> ((), String) {
        ((), self)
    }
}

impl<T> Outcome for (T, String) {
    type Value = T;
    fn split(self) -> (T, String) {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A console that takes `room` bytes more.
    fn shown(queue: &mut Queue, mut room: usize) -> (String, bool) {
        let mut all = Vec::new();
        let left = queue.write(|bytes| {
            let n = bytes.len().min(room);
            room -= n;
            all.extend_from_slice(&bytes[..n]);
            if n == 0 { Err(Errno::AGAIN) } else { Ok(n) }
        });
        (String::from_utf8(all).unwrap(), left)
    }

    #[test]
    fn what_the_console_does_not_take_waits_in_order() {
        let mut queue = Queue::default();
        queue.push("one\n".into());
        queue.push("two\n".into());
        assert_eq!(shown(&mut queue, 2), ("on".into(), true));
        queue.push("three\n".into());
        assert_eq!(shown(&mut queue, 100), ("e\ntwo\nthree\n".into(), false));
        assert_eq!(queue.bytes, 0);
    }

    #[test]
    fn the_oldest_lines_give_way_and_are_counted_but_none_is_cut_off() {
        let mut queue = Queue::default();
        queue.push("begun\n".into());
        assert_eq!(shown(&mut queue, 3), ("beg".into(), true));
        let line = |n: usize| format!("{n:>1023}\n");
        for n in 0..300 {
            queue.push(line(n));
            assert!(queue.bytes <= MAX_WAITING);
        }
        let (text, left) = shown(&mut queue, 1 << 20);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines[0], left), ("un", false));
        assert!(lines[1].contains("44 lines are missing here"), "{}", lines[1]);
        assert_eq!((lines.len(), lines[2].trim()), (2 + 256, "44"));
    }

    #[test]
    fn a_console_that_is_gone_ends_the_waiting() {
        let mut queue = Queue::default();
        queue.push("one\n".into());
        assert!(!queue.write(|_| Err(Errno::IO)));
        assert_eq!((queue.lines.len(), queue.bytes), (0, 0));
    }
}
