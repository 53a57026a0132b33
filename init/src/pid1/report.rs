//! The boot report, one line per step, and the events after it: the console's text, which PID 1 never waits for long.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use gaia_init::lines::Lines;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};

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

/// The console's text.
pub(crate) struct Report {
    console: Option<OwnedFd>,
    queue: Lines,
    /// Counts for the prompt that something was shown, when all of it was: the line that is being typed is drawn again below it.
    written: Option<OwnedFd>,
    started: Instant,
    /// What the boot may still wait for the console.
    patience: Duration,
}

impl Report {
    /// Opens the kernel's console. Without one the report goes nowhere, and the boot goes on.
    pub(crate) fn open() -> Self {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let console = rustix::fs::open("/dev/console", flags, Mode::empty()).ok();
        let written = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok();
        Self { console, queue: Lines::default(), written, started: Instant::now(), patience: BOOT_WAITS }
    }

    /// The counter of what was shown.
    pub(crate) fn written(&self) -> Option<&OwnedFd> {
        self.written.as_ref()
    }

    /// Liness one line.
    pub(crate) fn line(&mut self, text: &str) {
        self.queue.push(format!("{text}\n"));
    }

    /// Shows what the console takes at once. Returns whether something is left.
    pub(crate) fn show(&mut self) -> bool {
        let console = self.console.as_ref();
        let mut shown = false;
        let left = self.queue.write(|bytes| {
            let taken = console.map_or(Ok(bytes.len()), |console| rustix::io::write(console, bytes));
            shown |= taken.is_ok_and(|n| n > 0);
            taken
        });
        if let (true, false, Some(counter)) = (shown, left, &self.written) {
            // Where nobody reads it, it is full some day, and says the same.
            let _ = rustix::io::write(counter, &1_u64.to_ne_bytes());
        }
        left
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

    /// Liness a line of the running appliance, with the seconds since init began.
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
