//! A screen that is kept current: of each row, only what has changed is sent. A plain terminal gets the whole, below what it had.

use crate::row::fitting;

/// What stands on the screen.
#[derive(Debug, Default)]
pub struct Screen {
    plain: bool,
    rows: Option<Vec<String>>,
}

impl Screen {
    /// Nothing yet; `plain` is for a terminal that obeys no sequences.
    #[must_use]
    pub fn new(plain: bool) -> Self {
        Self { plain, rows: None }
    }

    /// Others have written: the next time, all is sent.
    pub fn forget(&mut self) {
        self.rows = None;
    }

    /// Makes these the rows of a terminal of so many columns and rows; what does not fit is left away.
    pub fn paint(&mut self, out: &mut Vec<u8>, rows: &[String], (width, height): (usize, usize)) {
        // The last column and row stay empty: nothing wraps and nothing scrolls.
        let fit = |row: &String| fitting(row, width.saturating_sub(1)).trim_end().to_owned();
        let rows: Vec<String> = rows.iter().take(height.saturating_sub(1)).map(fit).collect();
        if self.plain {
            let text = if self.rows.is_some() { "\n" } else { "" }.to_owned() + &rows.join("\n") + "\n";
            out.extend_from_slice(text.as_bytes());
            self.rows = Some(rows);
            return;
        }
        if self.rows.is_none() {
            out.extend_from_slice(b"\x1b[H\x1b[2J");
        }
        let before = self.rows.take().unwrap_or_default();
        for at in 0..rows.len().max(before.len()) {
            let [old, new] = [&before, &rows].map(|rows| rows.get(at).map_or("", String::as_str));
            if old == new {
                continue;
            }
            // From the first ASCII column that differs: before it, bytes are columns.
            let same = old.bytes().zip(new.bytes()).take_while(|(a, b)| a == b && a.is_ascii()).count();
            let same = if new.get(same..).is_some() { same } else { 0 };
            out.extend_from_slice(format!("\x1b[{};{}H{}", at + 1, same + 1, &new[same..]).as_bytes());
            if crate::columns(old) > crate::columns(new) || !old.is_ascii() {
                out.extend_from_slice(b"\x1b[K");
            }
        }
        out.extend_from_slice(format!("\x1b[{};1H", rows.len() + 1).as_bytes());
        self.rows = Some(rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn only_what_has_changed_is_sent() {
        let mut screen = Screen::new(false);
        let mut paint = |text: &str| {
            let mut out = Vec::new();
            screen.paint(&mut out, &lines(text), (80, 24));
            String::from_utf8(out).unwrap()
        };
        assert_eq!(paint("one 1\ntwo 2"), "\x1b[H\x1b[2J\x1b[1;1Hone 1\x1b[2;1Htwo 2\x1b[3;1H");
        assert_eq!(paint("one 1\ntwo 3"), "\x1b[2;5H3\x1b[3;1H");
        assert_eq!(paint("one\ntwo 3"), "\x1b[1;4H\x1b[K\x1b[3;1H");
        assert_eq!(paint("one\ntwo 3"), "\x1b[3;1H");
    }

    #[test]
    fn a_plain_terminal_gets_it_whole() {
        let mut screen = Screen::new(true);
        let mut out = Vec::new();
        screen.paint(&mut out, &lines("a\nb"), (80, 24));
        screen.paint(&mut out, &lines("a\nc"), (80, 24));
        assert_eq!(out, b"a\nb\n\na\nc\n");
    }

    proptest! {
        #[test]
        fn the_screen_is_as_it_should_be(
            steps in proptest::collection::vec((proptest::collection::vec("[a-c ·木é]{0,24}", 0..8), any::<bool>()), 1..8),
        ) {
            let mut screen = Screen::new(false);
            let mut parser = crate::row::tests::screen(6, 20);
            for (rows, forget) in steps {
                if forget {
                    parser.process(b"\r\nsomebody wrote\r\n");
                    screen.forget();
                }
                let mut out = Vec::new();
                screen.paint(&mut out, &rows, (20, 6));
                parser.process(&out);
                let wanted: Vec<String> = rows.iter().take(5).map(|row| fitting(row, 19).trim_end().to_owned()).collect();
                let seen: Vec<String> = parser.screen().rows(0, 20).map(|row| row.trim_end().to_owned()).collect();
                for (at, seen) in seen.iter().enumerate() {
                    prop_assert_eq!(seen, wanted.get(at).map_or("", String::as_str), "row {}", at);
                }
            }
        }
    }
}
