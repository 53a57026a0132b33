//! One row of a terminal, kept as it should be with few bytes: at 115,200 baud a row takes 7 ms.
//!
//! It is never left: what is wider than the terminal is scrolled to the side. So nothing has to be asked of the terminal, and nothing
//! known of how it breaks lines. On a plain terminal, characters, backspaces and spaces are all that is sent.

use unicode_width::UnicodeWidthChar as _;

/// The narrowest terminal that is drawn for; on a narrower one it does not look good.
const NARROWEST: usize = 12;

/// A character with the marks on it, in one column or two.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cell {
    text: String,
    columns: usize,
}

/// Whether a character is a mark on the one before it.
pub(crate) fn is_mark(c: char) -> bool {
    c.width() == Some(0)
}

/// A mark with nothing before it is left away.
fn cells(text: impl IntoIterator<Item = char>) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for c in text {
        match (c.width().unwrap_or(0), cells.last_mut()) {
            (0, None) => {}
            (0, Some(last)) => last.text.push(c),
            (columns, _) => cells.push(Cell { text: c.into(), columns }),
        }
    }
    cells
}

fn columns(cells: &[Cell]) -> usize {
    cells.iter().map(|cell| cell.columns).sum()
}

/// What of a text fits into so many columns.
#[must_use]
pub fn fitting(text: &str, width: usize) -> String {
    let mut left = width;
    let mut out = String::new();
    for c in text.chars() {
        let Some(rest) = left.checked_sub(c.width().unwrap_or(0)) else { break };
        left = rest;
        out.push(c);
    }
    out
}

/// What stands in the row, and where the cursor is.
#[derive(Debug, Default)]
pub struct Row {
    /// The terminal obeys no sequences.
    plain: bool,
    shown: Vec<Cell>,
    /// The cursor's column.
    at: usize,
    /// Others may have written: where the cursor is, is not known, but for the row.
    lost: bool,
    /// The first cell of the text that is shown, where not all is.
    first: usize,
}

impl Row {
    /// An empty row; `plain` is for a terminal that obeys no sequences.
    #[must_use]
    pub fn new(plain: bool) -> Self {
        Self { plain, lost: true, ..Self::default() }
    }

    /// The cursor is in another row, which is empty: others have written.
    pub fn forget(&mut self) {
        *self = Self { first: self.first, ..Self::new(self.plain) };
    }

    /// Goes on to the next row.
    pub fn leave(&mut self, out: &mut Vec<u8>) {
        out.push(b'\n');
        *self = Self::new(self.plain);
    }

    /// Empties the screen, if the terminal can, and begins anew.
    pub fn clear(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.plain { b"\n" } else { b"\x1b[H\x1b[2J" });
        self.forget();
    }

    /// Makes the row `prompt` and `text`, with the cursor before the text's character `cursor`, on a terminal of so many columns.
    pub fn draw(&mut self, out: &mut Vec<u8>, prompt: &str, text: &[char], cursor: usize, width: usize) {
        // The last column stays empty: what a terminal does behind it differs from one to the other.
        let width = width.max(NARROWEST) - 1;
        let mut wanted = Vec::new();
        for cell in cells(prompt.chars()) {
            if columns(&wanted) + cell.columns <= width / 2 {
                wanted.push(cell);
            }
        }
        let room = width - columns(&wanted);
        let all = cells(text.iter().copied());
        let before = cells(text.iter().take(cursor).copied()).len();
        let column = if columns(&all) <= room {
            self.first = 0;
            let column = columns(&wanted) + columns(&all[..before]);
            wanted.extend(all);
            column
        } else {
            // A column on each side says that there is more.
            let inner = room - 2;
            if before < self.first || columns(&all[self.first..before]) > inner {
                self.first = before;
                while self.first > 0 && columns(&all[self.first - 1..before]) <= inner / 2 {
                    self.first -= 1;
                }
            }
            let mark = |text: &str| Cell { text: text.into(), columns: 1 };
            if self.first > 0 {
                wanted.push(mark("<"));
            }
            let column = columns(&wanted) + columns(&all[self.first..before]);
            let mut left = inner;
            let mut rest = all[self.first..].iter().peekable();
            while let Some(cell) = rest.next_if(|cell| cell.columns <= left) {
                left -= cell.columns;
                wanted.push(cell.clone());
            }
            if rest.peek().is_some() {
                wanted.push(mark(">"));
            }
            column
        };
        if std::mem::take(&mut self.lost) {
            out.push(b'\r');
            if !self.plain {
                out.extend_from_slice(b"\x1b[K");
            }
        }
        self.change(out, wanted);
        self.go(out, column);
    }

    /// Writes what differs.
    fn change(&mut self, out: &mut Vec<u8>, wanted: Vec<Cell>) {
        let same = self.shown.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
        let (old, new) = (columns(&self.shown), columns(&wanted));
        if same == wanted.len() && old == new {
            self.shown = wanted;
            return;
        }
        // Where nothing moves, what stands behind the difference stays.
        let behind = self.shown[same..].iter().rev().zip(wanted[same..].iter().rev()).take_while(|(a, b)| a == b);
        let kept = if old == new { behind.count() } else { 0 };
        let first = columns(&wanted[..same]);
        self.go(out, first);
        let written = &wanted[same..wanted.len() - kept];
        for cell in written {
            out.extend_from_slice(cell.text.as_bytes());
        }
        self.at += columns(written);
        self.shown = wanted;
        if let Some(left) = old.checked_sub(new).filter(|left| *left > 0) {
            if left > 2 && !self.plain {
                out.extend_from_slice(b"\x1b[K");
            } else {
                out.resize(out.len() + left, b' ');
                self.at += left;
            }
        }
    }

    /// Moves the cursor, whichever way is shorter.
    fn go(&mut self, out: &mut Vec<u8>, column: usize) {
        if let Some(left) = self.at.checked_sub(column) {
            let sequence = format!("\x1b[{left}D");
            if column == 0 && left > 1 {
                out.push(b'\r');
            } else if left > sequence.len() && !self.plain {
                out.extend_from_slice(sequence.as_bytes());
            } else {
                out.resize(out.len() + left, 8);
            }
        } else {
            let right = column - self.at;
            let sequence = format!("\x1b[{right}C");
            if right > sequence.len() && !self.plain {
                out.extend_from_slice(sequence.as_bytes());
            } else {
                // What stands there is written once more.
                let mut place = 0;
                for cell in &self.shown {
                    if (self.at..column).contains(&place) {
                        out.extend_from_slice(cell.text.as_bytes());
                    }
                    place += cell.columns;
                }
            }
        }
        self.at = column;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A terminal of so many rows and columns.
    pub(crate) fn screen(rows: u16, columns: u16) -> vt100::Parser {
        vt100::Parser::new(rows.try_into().unwrap(), columns.try_into().unwrap(), 0)
    }

    /// What the terminal driver makes of line ends, and then a terminal.
    pub(crate) fn terminal(parser: &mut vt100::Parser, bytes: &[u8]) {
        let mut mapped = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                mapped.push(b'\r');
            }
            mapped.push(*byte);
        }
        parser.process(&mapped);
    }

    /// The row of the screen that the cursor is in, and the cursor's column.
    pub(crate) fn shown(parser: &vt100::Parser) -> (String, usize) {
        let (row, column) = parser.screen().cursor_position();
        let (_, width) = parser.screen().size();
        let text = parser.screen().rows(0, width.get()).nth(row.into()).unwrap();
        (text.trim_end().to_owned(), column.into())
    }

    fn draw(row: &mut Row, prompt: &str, text: &str, cursor: usize, width: usize) -> Vec<u8> {
        let mut out = Vec::new();
        row.draw(&mut out, prompt, &text.chars().collect::<Vec<_>>(), cursor, width);
        out
    }

    /// Would miss: a redraw of the whole line for each key, which is felt at 115,200 baud and seen at 9,600.
    #[test]
    fn few_bytes_are_sent_for_a_key() {
        for plain in [false, true] {
            let mut row = Row::new(plain);
            let first = draw(&mut row, "ω ", "", 0, 80);
            assert_eq!(String::from_utf8(first).unwrap(), if plain { "\rω " } else { "\r\x1b[Kω " });
            assert_eq!(draw(&mut row, "ω ", "s", 1, 80), b"s", "typed at the end");
            assert_eq!(draw(&mut row, "ω ", "sta", 3, 80), b"ta");
            assert_eq!(draw(&mut row, "ω ", "sta", 2, 80), b"\x08", "to the left");
            assert_eq!(draw(&mut row, "ω ", "stxa", 3, 80), b"xa\x08", "typed inside");
            assert_eq!(draw(&mut row, "ω ", "stya", 3, 80), b"\x08y", "another in its place");
            assert_eq!(draw(&mut row, "ω ", "stya", 4, 80), b"a", "to the right");
            assert_eq!(draw(&mut row, "ω ", "sty", 3, 80), b"\x08 \x08", "taken away at the end");
            assert_eq!(draw(&mut row, "ω ", "sty", 3, 80), b"", "nothing is nothing");
        }
        let mut row = Row::new(false);
        draw(&mut row, "ω ", "a rather long line", 18, 80);
        assert_eq!(draw(&mut row, "ω ", "a rather long line", 0, 80), b"\x1b[18D");
        assert_eq!(draw(&mut row, "ω ", "", 0, 80), b"\x1b[K");
    }

    #[test]
    fn what_is_wider_than_the_terminal_is_scrolled_and_says_so() {
        let mut row = Row::new(true);
        let text: String = ('a'..='z').collect();
        let mut parser = screen(4, 20);
        let mut see = |row: &mut Row, cursor| {
            terminal(&mut parser, &draw(row, "> ", &text, cursor, 20));
            shown(&parser)
        };
        assert_eq!(see(&mut row, 0), ("> abcdefghijklmno>".into(), 2));
        assert_eq!(see(&mut row, 26), ("> <tuvwxyz".into(), 10));
        assert_eq!(see(&mut row, 19), ("> <tuvwxyz".into(), 3), "it stays while the cursor is inside");
        assert_eq!(see(&mut row, 10), ("> <defghijklmnopqr>".into(), 10));
        assert_eq!(see(&mut row, 0), ("> abcdefghijklmno>".into(), 2));
    }

    #[test]
    fn a_text_is_cut_where_it_fits() {
        assert_eq!(fitting("abc", 2), "ab");
        assert_eq!(fitting("a木b", 2), "a");
        assert_eq!(fitting("e\u{301}x", 1), "e\u{301}");
    }

    proptest! {
        /// Whatever is drawn after whatever, the screen is as if it alone had been drawn.
        #[test]
        fn the_row_is_as_it_should_be(
            steps in proptest::collection::vec(("[ab木\u{301}é ]{0,40}", any::<prop::sample::Index>(), any::<bool>()), 1..12),
            width in 12_usize..60,
            plain in any::<bool>(),
        ) {
            let mut row = Row::new(plain);
            let mut parser = screen(3, u16::try_from(width).unwrap());
            for (text, cursor, forget) in steps {
                let text: String = text.split("\u{301}\u{301}").collect::<Vec<_>>().join("").replace("\u{301}\u{301}", "");
                let starts: Vec<usize> = text.chars().enumerate().filter(|(_, c)| !is_mark(*c)).map(|(at, _)| at).chain([text.chars().count()]).collect();
                let cursor = starts[cursor.index(starts.len())];
                if forget {
                    terminal(&mut parser, b"\nsomebody wrote\n");
                    row.forget();
                }
                terminal(&mut parser, &draw(&mut row, "ω ", &text, cursor, width));
                let (row_text, column) = shown(&parser);
                let kept: String = row.shown.iter().map(|c| c.text.as_str()).collect();
                prop_assert_eq!(row_text.trim_end(), kept.trim_end());
                prop_assert_eq!(column, row.at);
                let mut only = Row::new(plain);
                only.first = row.first;
                let mut fresh = screen(3, u16::try_from(width).unwrap());
                terminal(&mut fresh, &draw(&mut only, "ω ", &text, cursor, width));
                prop_assert_eq!((row_text, column), shown(&fresh));
                prop_assert!(column < width);
            }
        }
    }
}
