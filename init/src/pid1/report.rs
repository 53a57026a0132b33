//! The boot report: one line per step, on the console.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};

/// Why a step failed, in words for the console.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl<E: Into<Box<dyn std::error::Error>>> From<E> for Failure {
    fn from(e: E) -> Self {
        Self(e.into().to_string())
    }
}

/// The console, written to without ever waiting long for it.
pub(crate) struct Report {
    console: Option<OwnedFd>,
    started: Instant,
}

impl Report {
    /// Opens the kernel's console. Without one the report goes nowhere, and the boot goes on.
    pub(crate) fn open() -> Self {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let console = rustix::fs::open("/dev/console", flags, Mode::empty()).ok();
        Self { console, started: Instant::now() }
    }

    /// Writes one line.
    pub(crate) fn line(&self, text: &str) {
        self.write(format!("{text}\n").as_bytes());
    }

    /// Writes what it can within 200 ms. At 115,200 baud a full screen takes longer, but the kernel's buffer of 4 KiB
    /// empties meanwhile; a line that is unplugged or mute costs the rest of the text, never the boot.
    fn write(&self, mut bytes: &[u8]) {
        let Some(console) = &self.console else { return };
        while !bytes.is_empty() {
            match rustix::io::write(console, bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(rustix::io::Errno::AGAIN) => {
                    let wait = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
                    match rustix::event::poll(&mut [PollFd::new(console, PollFlags::OUT)], Some(&wait)) {
                        Ok(n) if n > 0 => {}
                        _ => return,
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Runs one step and writes its line: its name, what it achieved, its milliseconds.
    pub(crate) fn step<T: Outcome>(
        &mut self,
        name: &str,
        step: impl FnOnce() -> Result<T, Failure>,
    ) -> Option<T::Value> {
        let began = Instant::now();
        let outcome = step();
        let took = began.elapsed();
        match outcome {
            Ok(outcome) => {
                let (value, said) = outcome.split();
                self.line(&row(name, &said, took));
                Some(value)
            }
            Err(Failure(why)) => {
                self.line(&row(name, &format!("FAILED: {}", why.replace('\n', "\n                  ")), took));
                None
            }
        }
    }

    /// A line of the running appliance, with the seconds since init began.
    pub(crate) fn say(&self, text: &str) {
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
