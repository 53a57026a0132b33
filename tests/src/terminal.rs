//! A terminal of the tests' own: a shell in it, with the commands that a person would type, and what a person would see.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use vt100::{Color, Parser, Screen};

use crate::out;
use crate::picture::{Picture, Span, Style};

/// Wide enough for every line of a picture: none is broken, wherever its numbers end.
const COLUMNS: NonZeroU16 = NonZeroU16::MIN.saturating_add(131);
/// High enough that nothing scrolls away.
const ROWS: NonZeroU16 = NonZeroU16::MIN.saturating_add(399);
/// The shell's prompt.
const PROMPT: &str = "$ ";

/// A new terminal of this size (columns, rows): where a person sits, and where a program does.
///
/// Neither is for whatever else is started meanwhile: that would hold the terminal open, and nobody at the other end would learn
/// that the program has ended.
///
/// # Errors
/// If there is no more of them.
pub fn pair((columns, rows): (u16, u16)) -> Result<(File, File)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let person = posix_openpt(flags)?;
    grantpt(&person)?;
    unlockpt(&person)?;
    let program = ptsname_r(&person)?;
    // Closed in what is started, as all that the standard library opens.
    let program = File::options().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(program)?;
    tcsetwinsize(&program, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?;
    Ok((OwnedFd::from(person).into(), program))
}

/// What a terminal shows that was sent this.
#[must_use]
pub fn shown(bytes: &[u8]) -> Picture {
    let mut parser = Parser::new(ROWS, COLUMNS, 0);
    parser.process(bytes);
    picture(parser.screen())
}

fn picture(screen: &Screen) -> Picture {
    let mut rows: Vec<Vec<Span>> = (0..ROWS.get()).map(|row| spans(screen, row)).collect();
    let used = rows.iter().rposition(|row| !row.is_empty()).map_or(0, |last| last + 1);
    rows.truncate(used);
    Picture { rows }
}

/// A row without the spaces at its end.
fn spans(screen: &Screen, row: u16) -> Vec<Span> {
    let cells = (0..COLUMNS.get()).filter_map(|column| screen.cell(row, column));
    let mut spans: Vec<Span> = Vec::new();
    for cell in cells.filter(|cell| !cell.is_wide_continuation()) {
        let text = if cell.has_contents() { cell.contents() } else { " " };
        let colour = if let Color::Idx(colour @ 0..16) = cell.fgcolor() { Some(colour) } else { None };
        let bold = cell.bold() || cell.inverse();
        let style = Style { colour, bold, dim: cell.dim(), underlined: cell.underline() };
        // A space has no colour of its own: between two words of one colour it divides nothing.
        let before = spans.last().map(|last| last.style).filter(|before| !before.underlined);
        let style = if text == " " && !style.underlined { before.unwrap_or_default() } else { style };
        match spans.last_mut() {
            Some(last) if last.style == style => last.text.push_str(text),
            _ => spans.push(Span { style, text: text.to_owned() }),
        }
    }
    if let Some(last) = spans.last_mut() {
        last.text.truncate(last.text.trim_end().len());
    }
    if spans.last().is_some_and(|last| last.text.is_empty()) {
        spans.pop();
    }
    spans
}

/// A shell in a terminal. Dropped, it is gone.
#[derive(Debug)]
pub struct Shell {
    keys: File,
    child: Child,
    seen: Arc<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
}

impl Shell {
    /// One in this folder, with `gaia` in its path and these variables.
    ///
    /// # Errors
    /// If there is no terminal, or no shell in it.
    pub fn in_folder(folder: &Path, variables: &[(&str, &str)]) -> Result<Self> {
        let (keys, terminal) = pair((COLUMNS.get(), ROWS.get()))?;
        let mut command = Command::new("setsid");
        command.args(["--ctty", "sh", "-i"]).current_dir(folder).env_clear();
        command.env("PATH", format!("{}:/usr/bin:/bin", out("bin").display()));
        command.env("PS1", PROMPT).env("TERM", "xterm-256color").env("LC_ALL", "C.UTF-8").env("HOME", folder);
        command.envs(variables.iter().copied());
        command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
        let child = command.spawn().context("setsid, of util-linux")?;
        let mut screen = keys.try_clone()?;
        let seen = Arc::<Seen>::default();
        let to = Arc::clone(&seen);
        // Ends when the shell and all that it started are gone.
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(n @ 1..) = screen.read(&mut some) {
                to.bytes.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&some[..n]);
                to.more.notify_all();
            }
        });
        let shell = Self { keys, child, seen };
        shell.prompted(0, Duration::from_secs(10))?;
        Ok(shell)
    }

    /// Types a line and waits until the next can be typed.
    ///
    /// # Errors
    /// If that is not in time; with what is shown.
    pub fn enter(&self, line: &str, within: Duration) -> Result<()> {
        let before = self.picture().rows.len();
        (&self.keys).write_all(format!("{line}\r").as_bytes())?;
        // The line that was typed is one of them.
        self.prompted(before + 1, within)
    }

    /// Waits for a prompt below so many rows.
    fn prompted(&self, rows: usize, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        let mut bytes = self.seen.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let lines = shown(&bytes).lines();
            if lines.len() > rows && lines.last().is_some_and(|last| last == PROMPT.trim_end()) {
                return Ok(());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                bail!("no prompt within {within:?}:\n{}", lines.join("\n"));
            };
            bytes = self.seen.more.wait_timeout(bytes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What it shows, without the prompt that waits.
    #[must_use]
    pub fn picture(&self) -> Picture {
        let mut picture = shown(&self.seen.bytes.lock().unwrap_or_else(PoisonError::into_inner));
        if picture.lines().last().is_some_and(|last| last == PROMPT.trim_end()) {
            picture.rows.pop();
        }
        picture
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_shows_what_is_typed_and_answered_in_its_colours() {
        let folder = tempfile::tempdir().unwrap();
        let shell = Shell::in_folder(folder.path(), &[]).unwrap();
        shell
            .enter("printf 'one\\rO\\033[1;32m ok\\033[m µ\\n'; tty >/dev/null && echo here", Duration::from_secs(10))
            .unwrap();
        let picture = shell.picture();
        let lines = picture.lines();
        assert!(lines[0].starts_with("$ printf"), "{lines:?}");
        assert_eq!(lines[1..], ["O ok µ", "here"], "what is written over is not seen");
        let green = Style { colour: Some(2), bold: true, ..Style::default() };
        assert_eq!(picture.rows[1][1], Span { style: green, text: "ok ".into() });
    }
}
