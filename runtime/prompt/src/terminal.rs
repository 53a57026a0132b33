//! The terminal: whether there is one, its keys one by one, its size. It is asked nothing that it would have to answer.

use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize,
    tcsetattr,
};

use crate::keys::{Decoder, Key};

/// What a terminal is taken for that does not say how large it is: a serial line.
const USUAL: (usize, usize) = (80, 24);

/// Counts what others have written to the terminal of this process, if somebody tells.
static WRITTEN: OnceLock<OwnedFd> = OnceLock::new();

/// From now on this event counter says that others have written to the terminal. The first one counts.
pub fn others_write(counter: OwnedFd) {
    let _ = WRITTEN.set(counter);
}

/// What was waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A key.
    Key(Key),
    /// Others have written: the cursor stands at the beginning of an empty row.
    Written,
    /// Nothing in time.
    Late,
    /// There is nobody any more.
    End,
}

/// A terminal that a person sits at.
#[derive(Debug)]
pub struct Terminal {
    input: OwnedFd,
    output: OwnedFd,
    plain: bool,
    decoder: Decoder,
    /// Counts what others have written.
    pub(crate) written: Option<OwnedFd>,
}

impl Terminal {
    /// Standard input and output, if both are terminals. `TERM` says whether it obeys sequences.
    #[must_use]
    pub fn of_stdio() -> Option<Self> {
        let there = io::stdin().is_terminal() && io::stdout().is_terminal();
        there.then(|| Self::new(io::stdin().as_fd(), io::stdout().as_fd(), &term()).ok()).flatten()
    }

    /// The terminal behind these descriptors.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn new(input: BorrowedFd<'_>, output: BorrowedFd<'_>, term: &str) -> io::Result<Self> {
        let [input, output] = [input.try_clone_to_owned()?, output.try_clone_to_owned()?];
        let written = WRITTEN.get().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { input, output, plain: is_plain(term), decoder: Decoder::default(), written })
    }

    /// Whether it obeys no sequences.
    #[must_use]
    pub fn plain(&self) -> bool {
        self.plain
    }

    /// Its columns and rows.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        match tcgetwinsize(&self.output) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            _ => USUAL,
        }
    }

    /// Has it send each key as it is pressed, and show none, until the value is dropped.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn keys(&self) -> io::Result<KeyMode> {
        let before = tcgetattr(&self.input)?;
        let mut mode = before.clone();
        each_key(&mut mode);
        // On the appliance init has done it, and the console may not. What waits to be shown is not waited for.
        let same = (mode.local_modes, mode.input_modes) == (before.local_modes, before.input_modes);
        if !same {
            tcsetattr(&self.input, OptionalActions::Now, &mode)?;
        }
        Ok(KeyMode { terminal: self.input.try_clone()?, before: (!same).then_some(before) })
    }

    /// Waits for whatever comes first.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&mut self, within: Option<Duration>) -> io::Result<Event> {
        let until = within.map(|within| Instant::now() + within);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut all = vec![PollFd::new(&self.input, PollFlags::IN)];
            all.extend(self.written.as_ref().map(|counter| PollFd::new(counter, PollFlags::IN)));
            match poll(&mut all, left.as_ref()) {
                Ok(0) => return Ok(Event::Late),
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
                Ok(_) => {}
            }
            let (typed, written) = (!all[0].revents().is_empty(), all.get(1).is_some_and(|w| !w.revents().is_empty()));
            if written {
                self.seen();
                return Ok(Event::Written);
            }
            if typed {
                let mut byte = [0];
                match rustix::io::read(&self.input, &mut byte) {
                    Ok(0) => return Ok(Event::End),
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    Err(e) => return Err(e.into()),
                    Ok(_) => {
                        if let Some(key) = self.decoder.key(byte[0]) {
                            return Ok(Event::Key(key));
                        }
                    }
                }
            }
        }
    }

    /// Whether more has been typed: what was pasted is drawn once.
    #[must_use]
    pub fn more(&self) -> bool {
        let mut all = [PollFd::new(&self.input, PollFlags::IN)];
        matches!(poll(&mut all, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
            && all[0].revents() == PollFlags::IN
    }

    /// What others have written up to now is known.
    pub fn seen(&self) {
        let Some(counter) = &self.written else { return };
        let mut all = [PollFd::new(counter, PollFlags::IN)];
        if matches!(poll(&mut all, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..)) {
            let _ = rustix::io::read(counter, &mut [0; 8]);
        }
    }
}

/// Changes a terminal's modes to those of [`Terminal::keys`]: each byte as it comes, none shown and none a signal, Enter a line feed. A
/// line feed that is written stays a new line: others write to the terminal, too.
pub fn each_key(mode: &mut Termios) {
    mode.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
    mode.input_modes -= InputModes::IXON | InputModes::INLCR | InputModes::IGNCR | InputModes::ISTRIP;
    mode.input_modes |= InputModes::ICRNL;
    mode.control_modes |= ControlModes::CS8;
    mode.special_codes[SpecialCodeIndex::VMIN] = 1;
    mode.special_codes[SpecialCodeIndex::VTIME] = 0;
}

/// While it lives, the terminal sends each key; then it is as before.
#[derive(Debug)]
pub struct KeyMode {
    terminal: OwnedFd,
    pub(crate) before: Option<Termios>,
}

impl Drop for KeyMode {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, before);
        }
    }
}

pub(crate) fn term() -> String {
    std::env::var("TERM").unwrap_or_default()
}

/// Whether a terminal of this name obeys no sequences, as far as is known.
fn is_plain(term: &str) -> bool {
    matches!(term, "" | "dumb" | "unknown" | "network" | "emacs" | "tty" | "printer")
}
