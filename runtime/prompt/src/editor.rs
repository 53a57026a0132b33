//! The line that is being typed, and those before it. Keys go in; what is to be shown can be asked for.

use std::collections::VecDeque;

use crate::keys::{Key, is_shown};
use crate::row::is_mark;

/// The longest line, in characters.
pub const MAX_LINE: usize = 1024;
/// Lines that are remembered.
pub const MAX_HISTORY: usize = 200;

/// What a key has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing that could be done, which a terminal says with a bell.
    Bell,
    /// The line, or the cursor, or nothing.
    Changed,
    /// The line is finished.
    Done(String),
    /// The line is given up.
    GivenUp,
    /// Ctrl-D on an empty line.
    End,
    /// The word before the cursor is to be completed.
    Complete,
    /// The screen is to be emptied and drawn again.
    Clear,
}

/// What is to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View<'a> {
    /// What stands before the line instead of the prompt.
    pub search: Option<String>,
    /// The line.
    pub text: &'a [char],
    /// The cursor stands before this character.
    pub cursor: usize,
}

/// A line that is looked for among those before.
#[derive(Debug, Default)]
struct Search {
    query: String,
    /// The line found, counted from the newest.
    found: Option<usize>,
    /// What there was before.
    kept: (Vec<char>, usize),
}

/// The line, the lines before it, and what was cut out last.
#[derive(Debug, Default)]
pub struct Editor {
    text: Vec<char>,
    at: usize,
    cut: Vec<char>,
    history: VecDeque<String>,
    /// The line of the history that is shown, counted from the newest.
    recalled: Option<usize>,
    /// What was typed before one was recalled.
    draft: Vec<char>,
    search: Option<Search>,
}

impl Editor {
    /// What is to be shown.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        let search = self.search.as_ref().map(|search| {
            let failed = if search.found.is_none() && !search.query.is_empty() { "no " } else { "" };
            format!("({failed}search `{}`) ", search.query)
        });
        View { search, text: &self.text, cursor: self.at }
    }

    /// The line up to the cursor.
    #[must_use]
    pub fn before_cursor(&self) -> String {
        self.text[..self.at].iter().collect()
    }

    /// Remembers a line. Not one that begins with a space, nor the last one again.
    pub fn remember(&mut self, line: &str) {
        if line.trim().is_empty() || line.starts_with(' ') || self.history.back().is_some_and(|last| last == line) {
            return;
        }
        if self.history.len() >= MAX_HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(line.to_owned());
    }

    /// Puts `with` in the place of what stands from this byte of the line on, up to the cursor.
    pub fn replace(&mut self, from: usize, with: &str) -> Effect {
        let before = self.before_cursor();
        let from = before.char_indices().filter(|(at, _)| *at < from).count();
        let with: Vec<char> = with.chars().filter(|c| is_shown(*c)).collect();
        if self.text.len() - (self.at - from) + with.len() > MAX_LINE {
            return Effect::Bell;
        }
        let length = with.len();
        self.text.splice(from..self.at, with);
        self.at = from + length;
        Effect::Changed
    }

    /// Does what a key is for.
    pub fn key(&mut self, key: Key) -> Effect {
        if self.search.is_some() {
            match self.search_on(key) {
                Some(effect) => return effect,
                None => self.search = None,
            }
        }
        let (at, end) = (self.at, self.text.len());
        match key {
            Key::Char(c) => self.insert(&[c]),
            Key::Enter => Effect::Done(self.take()),
            Key::Tab => Effect::Complete,
            Key::Control('c') => {
                self.take();
                Effect::GivenUp
            }
            Key::Control('d') if self.text.is_empty() => Effect::End,
            Key::Control('l') => Effect::Clear,
            Key::Left | Key::Control('b') => self.go(self.left(at)),
            Key::Right | Key::Control('f') => self.go(self.right(at)),
            Key::Home | Key::Control('a') => self.go(0),
            Key::End | Key::Control('e') => self.go(end),
            Key::WordLeft | Key::Alt('b') => self.go(self.word_left(at, char::is_alphanumeric)),
            Key::WordRight | Key::Alt('f') => self.go(self.word_right(at)),
            Key::Backspace => self.remove(self.left(at), at, false),
            Key::Delete | Key::Control('d') => self.remove(at, self.right(at), false),
            Key::Control('k') => self.remove(at, end, true),
            Key::Control('u') => self.remove(0, at, true),
            Key::Control('w') => self.remove(self.word_left(at, |c| c != ' '), at, true),
            Key::Alt('d') => self.remove(at, self.word_right(at), true),
            Key::Control('y') => self.insert(&self.cut.clone()),
            Key::Up | Key::Control('p') => self.recall(self.recalled.map_or(0, |n| n + 1)),
            Key::Down | Key::Control('n') => match self.recalled {
                None => Effect::Bell,
                Some(0) => {
                    self.recalled = None;
                    self.text = std::mem::take(&mut self.draft);
                    self.go(self.text.len())
                }
                Some(n) => self.recall(n - 1),
            },
            Key::Control('r') => {
                self.search = Some(Search { kept: (self.text.clone(), self.at), ..Search::default() });
                Effect::Changed
            }
            Key::Control(_) | Key::Alt(_) => Effect::Bell,
        }
    }

    /// While one is looked for. `None` ends that, with what was found, and the key has its own meaning.
    fn search_on(&mut self, key: Key) -> Option<Effect> {
        let search = self.search.as_mut()?;
        let from = match key {
            Key::Char(c) if search.query.chars().count() < MAX_LINE / 8 => {
                search.query.push(c);
                search.found.unwrap_or(0)
            }
            Key::Backspace => {
                search.query.pop();
                0
            }
            Key::Control('r') => search.found.map_or(0, |n| n + 1),
            Key::Control('g' | 'c') => {
                (self.text, self.at) = std::mem::take(&mut search.kept);
                self.search = None;
                return Some(Effect::Changed);
            }
            Key::Char(_) => return Some(Effect::Bell),
            _ => return None,
        };
        let query = search.query.as_str();
        let mut older = self.history.iter().rev().enumerate().skip(from);
        let found = older.find_map(|(n, line)| Some((n, line, line.find(query)?))).filter(|_| !query.is_empty());
        match found {
            Some((n, line, at)) => {
                self.at = line[..at].chars().count();
                self.text = line.chars().collect();
                search.found = Some(n);
                self.recalled = None;
                Some(Effect::Changed)
            }
            // The oldest that has it stays.
            None if key == Key::Control('r') && search.found.is_some() => Some(Effect::Bell),
            None => {
                search.found = None;
                Some(if query.is_empty() { Effect::Changed } else { Effect::Bell })
            }
        }
    }

    fn take(&mut self) -> String {
        let line = std::mem::take(&mut self.text).into_iter().collect();
        (self.at, self.recalled) = (0, None);
        self.draft.clear();
        line
    }

    fn go(&mut self, at: usize) -> Effect {
        if at == self.at && self.at != 0 && self.at != self.text.len() {
            return Effect::Bell;
        }
        self.at = at;
        Effect::Changed
    }

    fn insert(&mut self, new: &[char]) -> Effect {
        let stray = self.at == 0 && new.first().is_some_and(|c| is_mark(*c));
        // A character with more marks than any language has is somebody's joke.
        let marks = self.text[..self.at].iter().rev().take_while(|c| is_mark(**c)).count();
        let too_many = marks >= 3 && new.first().is_some_and(|c| is_mark(*c));
        if new.is_empty() || stray || too_many || self.text.len() + new.len() > MAX_LINE {
            return Effect::Bell;
        }
        self.text.splice(self.at..self.at, new.iter().copied());
        self.at += new.len();
        Effect::Changed
    }

    fn remove(&mut self, from: usize, to: usize, keep: bool) -> Effect {
        if from >= to {
            return Effect::Bell;
        }
        let removed: Vec<char> = self.text.drain(from..to).collect();
        if keep {
            self.cut = removed;
        }
        self.at = from;
        Effect::Changed
    }

    fn recall(&mut self, n: usize) -> Effect {
        let Some(line) = self.history.len().checked_sub(n + 1).and_then(|at| self.history.get(at)) else {
            return Effect::Bell;
        };
        let line = line.chars().collect();
        let before = std::mem::replace(&mut self.text, line);
        if self.recalled.replace(n).is_none() {
            self.draft = before;
        }
        self.at = self.text.len();
        Effect::Changed
    }

    fn left(&self, at: usize) -> usize {
        let mut at = at.saturating_sub(1);
        while at > 0 && is_mark(self.text[at]) {
            at -= 1;
        }
        at
    }

    fn right(&self, at: usize) -> usize {
        let mut at = (at + 1).min(self.text.len());
        while at < self.text.len() && is_mark(self.text[at]) {
            at += 1;
        }
        at
    }

    fn word_left(&self, mut at: usize, is_word: impl Fn(char) -> bool) -> usize {
        let is_word = |c: char| is_word(c) || is_mark(c);
        while at > 0 && !is_word(self.text[at - 1]) {
            at -= 1;
        }
        while at > 0 && is_word(self.text[at - 1]) {
            at -= 1;
        }
        // Not between a character and its mark.
        while at > 0 && self.text.get(at).is_some_and(|c| is_mark(*c)) {
            at -= 1;
        }
        at
    }

    fn word_right(&self, mut at: usize) -> usize {
        let is_word = |c: &char| c.is_alphanumeric() || is_mark(*c);
        while self.text.get(at).is_some_and(|c| !is_word(c)) {
            at += 1;
        }
        while self.text.get(at).is_some_and(is_word) {
            at += 1;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Decoder;
    use crate::row::Row;
    use crate::row::tests::{screen, shown, terminal};
    use proptest::prelude::*;

    /// The line with its cursor as `|`.
    fn seen(editor: &Editor) -> String {
        let mut text: Vec<char> = editor.text.clone();
        text.insert(editor.at, '|');
        text.into_iter().collect()
    }

    fn typed(editor: &mut Editor, bytes: &str) -> Effect {
        let mut decoder = Decoder::default();
        bytes.bytes().filter_map(|b| decoder.key(b)).map(|key| editor.key(key)).last().unwrap_or(Effect::Changed)
    }

    #[test]
    fn each_key_edits_as_it_does_elsewhere() {
        for (bytes, wanted) in [
            ("status", "status|"),
            ("status\x1b[D\x1b[D", "stat|us"),
            ("status\x01x", "x|status"),
            ("status\x1b[H\x1b[3~", "|tatus"),
            ("status\x01\x05s", "statuss|"),
            ("status\x1b[D\x1b[D\x0b", "stat|"),
            ("status\x1b[D\x1b[D\x15", "|us"),
            ("logs --since 5m\x17", "logs --since |"),
            ("logs --since 5m\x17\x17\x19", "logs --since |"),
            ("logs --since 5m\x1b[1;5D\x1b[1;5D", "logs --|since 5m"),
            ("logs --since\x01\x1bf\x1bd", "logs|"),
            ("größe\x7f\x7f", "grö|"),
            ("ge\u{301}\x7f", "g|"),
            ("木\x1b[Da", "a|木"),
            ("ab\x04", "ab|"),
            ("ab\x01\x04", "|b"),
            ("\u{301}a", "a|"),
        ] {
            let mut editor = Editor::default();
            typed(&mut editor, bytes);
            assert_eq!(seen(&editor), wanted, "{bytes:?}");
        }
    }

    #[test]
    fn a_line_is_finished_given_up_or_left() {
        let mut editor = Editor::default();
        assert_eq!(typed(&mut editor, "ps\r"), Effect::Done("ps".into()));
        assert_eq!(typed(&mut editor, "powerof\x03"), Effect::GivenUp);
        assert_eq!(seen(&editor), "|");
        assert_eq!(typed(&mut editor, "\x04"), Effect::End);
        assert_eq!(typed(&mut editor, "\t"), Effect::Complete);
        assert_eq!(typed(&mut editor, "\x0c"), Effect::Clear);
        assert_eq!(typed(&mut editor, "\x1b[B"), Effect::Bell);
        assert_eq!(typed(&mut editor, "\x1bx"), Effect::Bell);
    }

    #[test]
    fn lines_before_come_back_in_order_and_the_draft_last() {
        let mut editor = Editor::default();
        for line in ["ps", "status", "status", " secret", ""] {
            editor.remember(line);
        }
        typed(&mut editor, "dra\x1b[A");
        assert_eq!(seen(&editor), "status|");
        typed(&mut editor, "\x1b[A");
        assert_eq!(seen(&editor), "ps|");
        assert_eq!(typed(&mut editor, "\x1b[A"), Effect::Bell, "what begins with a space is not kept");
        typed(&mut editor, "\x1b[B\x1b[B");
        assert_eq!(seen(&editor), "dra|");
        for n in 0..2 * MAX_HISTORY {
            editor.remember(&n.to_string());
        }
        assert_eq!(editor.history.len(), MAX_HISTORY);
    }

    #[test]
    fn a_line_is_looked_for_backwards() {
        let mut editor = Editor::default();
        for line in ["logs --brane a", "ps", "logs --brane b"] {
            editor.remember(line);
        }
        typed(&mut editor, "x\x12bra");
        assert_eq!(
            (seen(&editor).as_str(), editor.view().search.as_deref()),
            ("logs --|brane b", Some("(search `bra`) "))
        );
        typed(&mut editor, "\x12");
        assert_eq!(seen(&editor), "logs --|brane a");
        assert_eq!(typed(&mut editor, "\x12"), Effect::Bell, "the oldest stays");
        assert_eq!(seen(&editor), "logs --|brane a");
        typed(&mut editor, "q");
        assert_eq!(editor.view().search.as_deref(), Some("(no search `braq`) "));
        typed(&mut editor, "\x07");
        assert_eq!((seen(&editor).as_str(), editor.view().search), ("x|", None));
        assert_eq!(typed(&mut editor, "\x12ps\r"), Effect::Done("ps".into()));
        typed(&mut editor, "\x12ps\x1b[D");
        assert_eq!((seen(&editor).as_str(), editor.view().search), ("|ps", None));
    }

    #[test]
    fn a_word_is_replaced_and_no_line_grows_without_end() {
        let mut editor = Editor::default();
        typed(&mut editor, "ö --br x\x1b[D\x1b[D");
        assert_eq!(editor.replace("ö ".len(), "--brane "), Effect::Changed);
        assert_eq!(seen(&editor), "ö --brane | x");
        assert_eq!(editor.replace(0, &"x".repeat(MAX_LINE)), Effect::Bell);
        for _ in 0..2 * MAX_LINE {
            editor.key(Key::Char('x'));
        }
        assert_eq!(editor.text.len(), MAX_LINE);
    }

    proptest! {
        /// Any bytes at all: nothing fails, the cursor stays inside, and the terminal shows the line as if it alone had been drawn.
        #[test]
        fn any_bytes_are_survived_and_the_screen_stays_what_the_line_is(
            bytes in proptest::collection::vec(prop_oneof![
                4 => proptest::sample::select(&b"ab \x01\x02\x05\x06\x0b\x15\x17\x19\x12\x7f\x0e\x10\r"[..]).prop_map(|b| vec![b]),
                2 => proptest::sample::select(vec!["\x1b[D", "\x1b[C", "\x1b[A", "\x1b[B", "\x1b[3~", "\x1bb", "\x1bf", "\x1bd", "木", "é", "e\u{301}", "ω"])
                    .prop_map(|s| s.as_bytes().to_vec()),
                1 => any::<u8>().prop_map(|b| vec![b]),
            ], 0..150),
            width in 12_u16..50,
            plain in any::<bool>(),
        ) {
            let (mut editor, mut decoder, mut row) = (Editor::default(), Decoder::default(), Row::new(plain));
            let mut parser = screen(3, width);
            for byte in bytes.concat() {
                let Some(key) = decoder.key(byte) else { continue };
                let mut out = Vec::new();
                match editor.key(key) {
                    Effect::Done(line) => {
                        editor.remember(&line);
                        row.leave(&mut out);
                    }
                    Effect::GivenUp => row.leave(&mut out),
                    Effect::Clear => row.clear(&mut out),
                    _ => {}
                }
                let view = editor.view();
                prop_assert!(view.cursor <= view.text.len() && view.text.len() <= MAX_LINE);
                prop_assert!(view.text.get(view.cursor).is_none_or(|c| !is_mark(*c)), "between a character and its mark");
                let prompt = view.search.clone().unwrap_or("ω ".into());
                row.draw(&mut out, &prompt, view.text, view.cursor, width.into());
                terminal(&mut parser, &out);
                let all: String = prompt.chars().chain(view.text.iter().copied()).collect();
                // What is too wide is held against what is drawn anew in the row's own test.
                if unicode_width::UnicodeWidthStr::width(all.as_str()) < usize::from(width) && view.search.is_none() {
                    let before: String = prompt.chars().chain(view.text[..view.cursor].iter().copied()).collect();
                    let (text, column) = shown(&parser);
                    prop_assert_eq!(text.as_str(), all.trim_end());
                    prop_assert_eq!(column, before.chars().map(|c| unicode_width::UnicodeWidthChar::width(c).unwrap()).sum::<usize>());
                }
            }
        }
    }
}
