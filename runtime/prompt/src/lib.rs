//! A prompt on any terminal, a serial line at 115,200 baud among them.
//!
//! It owns the line that is typed, with its history and completion ([`editor`]), the row it stands in ([`row`]), the words in it
//! ([`words`]), and a screen that is kept current ([`screen`]). It never asks the terminal for anything but its size, which the kernel
//! knows; it sends few bytes; it starts no thread and installs no handler of a signal; and nothing of what is typed is written anywhere.
//!
//! ```text
//! bytes ─▶ keys ─▶ editor ─▶ row ─▶ bytes
//! ```

pub mod editor;
pub mod keys;
pub mod row;
pub mod screen;
pub mod terminal;
pub mod words;

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;

use editor::{Editor, Effect};
use keys::Key;
use row::Row;
use terminal::{Event, Terminal};

/// Candidates that are listed; of more, their number is said.
const MAX_LISTED: usize = 60;

/// How a word may go on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Completion {
    /// Where the word begins, in bytes of the line.
    pub start: usize,
    /// What may stand there, as it has to be typed, each with the space behind it if it is a whole word.
    pub candidates: Vec<String>,
}

/// What came of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A line.
    Line(String),
    /// The line was given up with Ctrl-C.
    GivenUp,
    /// Ctrl-D on an empty line.
    End,
    /// The terminal is gone.
    Gone,
}

/// Prompts for lines, and remembers them.
#[derive(Debug)]
pub struct Prompt {
    mark: String,
    editor: Editor,
}

impl Prompt {
    /// With `mark` before each line.
    #[must_use]
    pub fn new(mark: &str) -> Self {
        Self { mark: mark.to_owned(), editor: Editor::default() }
    }

    /// Remembers a line, for the arrows.
    pub fn remember(&mut self, line: &str) {
        self.editor.remember(line);
    }

    /// Waits for a line. `complete` is asked for what the line up to the cursor may go on with.
    ///
    /// # Errors
    /// If the terminal cannot be read or written.
    pub fn line(
        &mut self,
        terminal: &mut Terminal,
        out: &mut dyn Write,
        complete: &mut dyn FnMut(&str) -> Completion,
    ) -> io::Result<Answer> {
        let _keys = terminal.keys()?;
        // What was written before the line begins is above it.
        terminal.seen();
        let mut row = Row::new(terminal.plain());
        let mut bytes = Vec::new();
        loop {
            // What was pasted is drawn once.
            if !terminal.more() {
                self.draw(&mut row, &mut bytes, terminal);
                out.write_all(&bytes)?;
                out.flush()?;
                bytes.clear();
            }
            let effect = match terminal.wait(None)? {
                Event::Key(key) => {
                    // What other keys do is done to what stands there.
                    if !matches!(key, Key::Char(_)) {
                        self.draw(&mut row, &mut bytes, terminal);
                    }
                    self.editor.key(key)
                }
                Event::Written => {
                    row.forget();
                    continue;
                }
                Event::Late => continue,
                Event::End => return Ok(Answer::Gone),
            };
            let answer = match effect {
                Effect::Changed => continue,
                Effect::Bell => {
                    bytes.push(7);
                    continue;
                }
                Effect::Clear => {
                    row.clear(&mut bytes);
                    continue;
                }
                Effect::Complete => {
                    self.completed(complete, &mut row, &mut bytes, terminal.size().0);
                    continue;
                }
                Effect::End => Answer::End,
                Effect::GivenUp => Answer::GivenUp,
                Effect::Done(line) => {
                    // All of it stands there when others read it.
                    let text: Vec<char> = line.chars().collect();
                    row.draw(&mut bytes, &self.mark, &text, text.len(), terminal.size().0);
                    Answer::Line(line)
                }
            };
            if answer == Answer::GivenUp {
                bytes.extend_from_slice(b"^C");
            }
            if answer != Answer::End {
                row.leave(&mut bytes);
            }
            out.write_all(&bytes)?;
            out.flush()?;
            return Ok(answer);
        }
    }

    fn draw(&self, row: &mut Row, bytes: &mut Vec<u8>, terminal: &Terminal) {
        let view = self.editor.view();
        let mark = view.search.as_ref().unwrap_or(&self.mark);
        row.draw(bytes, mark, view.text, view.cursor, terminal.size().0);
    }

    /// Completes the word before the cursor as far as all candidates agree; where that is no farther, lists them.
    fn completed(
        &mut self,
        complete: &mut dyn FnMut(&str) -> Completion,
        row: &mut Row,
        bytes: &mut Vec<u8>,
        width: usize,
    ) {
        let before = self.editor.before_cursor();
        let Completion { start, candidates } = complete(&before);
        let word = before.get(start..).unwrap_or_default();
        let common = common(&candidates);
        match candidates.as_slice() {
            [] => bytes.push(7),
            _ if common.len() > word.len() || candidates.len() == 1 => {
                if self.editor.replace(start, &common) == Effect::Bell {
                    bytes.push(7);
                }
            }
            _ => {
                row.leave(bytes);
                bytes.extend_from_slice(columned(&candidates, width).as_bytes());
            }
        }
    }
}

/// Asks a question of whoever is at the terminal; its last line stands before the answer, and is cut to half of the terminal's width, so
/// it is short. `None` if nobody is there.
/// Ctrl-C and Ctrl-D are an empty answer.
///
/// # Errors
/// If the terminal cannot be read or written.
pub fn asked(question: &str) -> io::Result<Option<String>> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(None);
    }
    let mut terminal = Terminal::new(io::stdin().as_fd(), io::stderr().as_fd(), &terminal::term())?;
    let (above, question) = question.rsplit_once('\n').map_or(("", question), |(above, last)| (above, last));
    if !above.is_empty() {
        io::stderr().write_all(format!("{above}\n").as_bytes())?;
    }
    let answer = Prompt::new(question).line(&mut terminal, &mut io::stderr(), &mut |_| Completion::default())?;
    Ok(match answer {
        Answer::Line(line) => Some(line),
        Answer::GivenUp | Answer::Gone => Some(String::new()),
        Answer::End => {
            io::stderr().write_all(b"\n")?;
            Some(String::new())
        }
    })
}

pub(crate) fn columns(text: &str) -> usize {
    unicode_width::UnicodeWidthStr::width(text)
}

/// What all begin with.
fn common(candidates: &[String]) -> String {
    let Some((first, others)) = candidates.split_first() else { return String::new() };
    let same = |other: &String| first.chars().zip(other.chars()).take_while(|(a, b)| a == b).count();
    first.chars().take(others.iter().map(same).min().unwrap_or(usize::MAX)).collect()
}

/// Words in columns, filled from top to bottom.
fn columned(words: &[String], width: usize) -> String {
    let shown: Vec<&str> = words.iter().take(MAX_LISTED).map(|word| word.trim_end()).collect();
    let widest = shown.iter().map(|word| columns(word)).max().unwrap_or(0) + 2;
    let rows = shown.len().div_ceil((width.saturating_sub(1) / widest).max(1)).max(1);
    let mut out = String::new();
    for row in 0..rows {
        let mut line = String::new();
        for word in shown.iter().skip(row).step_by(rows) {
            line.push_str(word);
            line.extend(std::iter::repeat_n(' ', widest - columns(word)));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    if words.len() > shown.len() {
        let _ = writeln!(out, "and {} more", words.len() - shown.len());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read as _;
    use std::os::fd::OwnedFd;

    use crate::row::tests::screen;

    /// The end that a person sits at, and the terminal.
    fn pty() -> (File, OwnedFd) {
        let pty = nix::pty::openpty(None, None).unwrap();
        (File::from(pty.master), pty.slave)
    }

    fn offered(before: &str) -> Completion {
        let begun = words::begun(before);
        let all = ["status ", "stop ", "ps "];
        let candidates =
            all.iter().filter(|word| word.starts_with(&begun.last)).map(|word| (*word).to_owned()).collect();
        Completion { start: begun.start, candidates }
    }

    /// Types all at once, and returns the lines that came of it and what a terminal of 40 columns shows.
    fn typed(term: &str, bytes: &[u8]) -> (Vec<Answer>, String) {
        let (mut person, line) = pty();
        let size = rustix::termios::Winsize { ws_row: 10, ws_col: 40, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&line, size).unwrap();
        let mut terminal = Terminal::new(line.as_fd(), line.as_fd(), term).unwrap();
        let keys = terminal.keys().unwrap();
        person.write_all(bytes).unwrap();
        let mut out = File::from(line.try_clone().unwrap());
        let mut prompt = Prompt::new("ω ");
        let mut answers = Vec::new();
        while terminal.more() {
            let answer = prompt.line(&mut terminal, &mut out, &mut offered).unwrap();
            if let Answer::Line(line) = &answer {
                prompt.remember(line);
            }
            answers.push(answer);
        }
        drop((keys, terminal, out, line));
        let mut parser = screen(10, 40);
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = person.read(&mut chunk) {
            parser.process(&chunk[..n]);
        }
        (answers, parser.screen().contents())
    }

    /// Would miss: a terminal that edits the line itself, or shows it twice.
    #[test]
    fn a_line_is_edited_completed_and_shown_once() {
        for term in ["vt100", "dumb"] {
            let (answers, shown) = typed(term, b"psx\x7f\rst\t\x15sta\tx\x17y\r\x1b[A\r\x03\x04");
            let lines = ["ps", "status y", "status y"].map(|line| Answer::Line(line.into()));
            assert_eq!(answers[..3], lines, "{term}");
            assert_eq!(answers[3..], [Answer::GivenUp, Answer::End], "{term}");
            let wanted = "ω ps\nω st\nstatus  stop\nω status y\nω status y\nω ^C\nω";
            assert_eq!(shown.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim_end(), wanted, "{term}");
        }
    }

    #[test]
    fn a_terminal_is_as_it_was_when_the_line_is_read_and_a_line_feed_stays_a_new_line() {
        let (_person, line) = pty();
        let terminal = Terminal::new(line.as_fd(), line.as_fd(), "vt100").unwrap();
        let modes = || {
            let mode = rustix::termios::tcgetattr(&line).unwrap();
            (mode.local_modes, mode.input_modes, mode.output_modes)
        };
        let before = modes();
        {
            let _keys = terminal.keys().unwrap();
            let during = modes();
            assert!(!during.0.intersects(rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ICANON));
            assert_eq!(during.2, before.2);
            assert!(terminal.keys().unwrap().before.is_none(), "nothing is set that is set");
        }
        assert_eq!(modes(), before);
    }

    #[test]
    fn who_hangs_up_is_gone() {
        let (person, line) = pty();
        let mut terminal = Terminal::new(line.as_fd(), line.as_fd(), "vt100").unwrap();
        let _keys = terminal.keys().unwrap();
        drop(person);
        let answer = Prompt::new("ω ").line(&mut terminal, &mut Vec::new(), &mut offered);
        assert!(matches!(answer, Ok(Answer::Gone) | Err(_)), "{answer:?}");
    }

    #[test]
    fn others_words_are_above_the_line_and_the_line_is_drawn_again() {
        let (mut person, line) = pty();
        let counter = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let mut terminal = Terminal::new(line.as_fd(), line.as_fd(), "vt100").unwrap();
        terminal.written = Some(counter.try_clone().unwrap());
        let (mut out, mut others) = (File::from(line.try_clone().unwrap()), File::from(line.try_clone().unwrap()));
        let reader = std::thread::spawn(move || {
            Prompt::new("ω ").line(&mut terminal, &mut out, &mut offered).unwrap();
        });
        let mut parser = screen(5, 40);
        let mut until = |person: &mut File, wanted: &str| {
            let mut chunk = [0; 256];
            while parser.screen().contents().trim_end() != wanted {
                let n = person.read(&mut chunk).unwrap();
                parser.process(&chunk[..n]);
            }
        };
        until(&mut person, "ω");
        person.write_all(b"stat").unwrap();
        until(&mut person, "ω stat");
        others.write_all(b"gaia: something\n").unwrap();
        rustix::io::write(&counter, &1_u64.to_ne_bytes()).unwrap();
        until(&mut person, "ω statgaia: something\nω stat");
        person.write_all(b"us\r").unwrap();
        until(&mut person, "ω statgaia: something\nω status");
        reader.join().unwrap();
    }

    #[test]
    fn many_candidates_fit_the_terminal_and_a_serial_line() {
        let words: Vec<String> = (0..200).map(|n| format!("brane-{n} ")).collect();
        let text = columned(&words, 80);
        assert!(text.lines().all(|line| line.len() < 80), "{text}");
        assert!(text.ends_with("and 140 more\n") && text.lines().count() < 12, "{text}");
        assert_eq!(columned(&["a ".into(), "b ".into()], 1), "a\nb\n");
    }
}
