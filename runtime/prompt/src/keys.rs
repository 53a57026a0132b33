//! Keys, out of the bytes that a terminal sends. Nothing here waits: what a lone escape means is said by the byte after it.

use unicode_width::UnicodeWidthChar as _;

/// What a person pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A character that can be shown.
    Char(char),
    /// With Ctrl: the letter.
    Control(char),
    /// With Alt, or after Escape: the character.
    Alt(char),
    /// Enter, or Ctrl-J.
    Enter,
    /// Tab.
    Tab,
    /// Backspace, whichever of its two codes the terminal sends.
    Backspace,
    /// Delete.
    Delete,
    /// The arrows.
    Left,
    /// To the right.
    Right,
    /// Up.
    Up,
    /// Down.
    Down,
    /// Home.
    Home,
    /// End.
    End,
    /// An arrow to the left with Ctrl or Alt.
    WordLeft,
    /// An arrow to the right with Ctrl or Alt.
    WordRight,
}

/// Takes bytes, gives keys. What is no key it knows is swallowed whole.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Ground,
    /// The first bytes of a character, and how many it has.
    Character(Vec<u8>, usize),
    Escape,
    /// After `ESC O`.
    Single,
    /// After `ESC [`: the bytes of its parameters, those after the sixteenth left away.
    Sequence(Vec<u8>),
    /// After `ESC [ [`, which the Linux console sends before the letter of a function key.
    Function,
}

impl Decoder {
    /// The key that ends with this byte, if one does.
    pub fn key(&mut self, byte: u8) -> Option<Key> {
        match std::mem::take(&mut self.state) {
            // Whatever was begun: these are keys of their own, so that Enter always is one.
            _ if byte < 0x20 || byte == 0x7f => self.control(byte),
            State::Ground => self.first(byte),
            State::Character(mut bytes, length) => {
                if byte & 0xc0 != 0x80 {
                    return self.first(byte);
                }
                bytes.push(byte);
                if bytes.len() < length {
                    self.state = State::Character(bytes, length);
                    return None;
                }
                let character = std::str::from_utf8(&bytes).ok()?.chars().next()?;
                is_shown(character).then_some(Key::Char(character))
            }
            State::Escape => match byte {
                b'[' => self.becomes(State::Sequence(Vec::new())),
                b'O' => self.becomes(State::Single),
                0x21..0x7f => Some(Key::Alt(char::from(byte))),
                _ => None,
            },
            State::Single => named(byte),
            State::Function => None,
            State::Sequence(mut parameters) => match byte {
                b'[' if parameters.is_empty() => self.becomes(State::Function),
                b'~' => match number(parameters.split(|b| *b == b';').next().unwrap_or_default()) {
                    Some(1 | 7) => Some(Key::Home),
                    Some(4 | 8) => Some(Key::End),
                    Some(3) => Some(Key::Delete),
                    _ => None,
                },
                0x40..0x7f => {
                    let modified = parameters.split(|b| *b == b';').nth(1).is_some_and(|m| number(m) != Some(1));
                    match named(byte) {
                        Some(Key::Left) if modified => Some(Key::WordLeft),
                        Some(Key::Right) if modified => Some(Key::WordRight),
                        key => key,
                    }
                }
                0x20..0x40 => {
                    if parameters.len() < 16 {
                        parameters.push(byte);
                    }
                    self.becomes(State::Sequence(parameters))
                }
                // No byte of a sequence: it was none.
                _ => self.first(byte),
            },
        }
    }

    fn becomes(&mut self, state: State) -> Option<Key> {
        self.state = state;
        None
    }

    fn first(&mut self, byte: u8) -> Option<Key> {
        let length = match byte {
            0xc2..0xe0 => 2,
            0xe0..0xf0 => 3,
            0xf0..0xf5 => 4,
            0x20..0x7f => return Some(Key::Char(char::from(byte))),
            // No character begins like this.
            _ => return None,
        };
        self.becomes(State::Character(vec![byte], length))
    }

    fn control(&mut self, byte: u8) -> Option<Key> {
        match byte {
            0x1b => self.becomes(State::Escape),
            b'\r' | b'\n' => Some(Key::Enter),
            b'\t' => Some(Key::Tab),
            0x08 | 0x7f => Some(Key::Backspace),
            1..27 => Some(Key::Control(char::from(byte + b'a' - 1))),
            _ => None,
        }
    }
}

fn named(byte: u8) -> Option<Key> {
    Some(match byte {
        b'A' => Key::Up,
        b'B' => Key::Down,
        b'C' => Key::Right,
        b'D' => Key::Left,
        b'F' => Key::End,
        b'H' => Key::Home,
        _ => return None,
    })
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Whether a character has a place on the screen, or is a mark on the one before it. Not those that turn the order around or join
/// what is beside them: what is shown is what was typed.
#[must_use]
pub fn is_shown(c: char) -> bool {
    let format = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{1f3fb}'..='\u{1f3ff}' | '\u{e0000}'..='\u{e0fff}');
    !format && !c.is_control() && c.width().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut decoder = Decoder::default();
        bytes.iter().filter_map(|b| decoder.key(*b)).collect()
    }

    #[test]
    fn terminals_call_the_same_key_differently() {
        for (bytes, key) in [
            ("\x1b[A", Key::Up),
            ("\x1bOA", Key::Up),
            ("\x1b[B", Key::Down),
            ("\x1b[C", Key::Right),
            ("\x1bOD", Key::Left),
            ("\x1b[H", Key::Home),
            ("\x1bOH", Key::Home),
            ("\x1b[1~", Key::Home),
            ("\x1b[7~", Key::Home),
            ("\x1b[F", Key::End),
            ("\x1b[4~", Key::End),
            ("\x1b[8~", Key::End),
            ("\x1b[3~", Key::Delete),
            ("\x1b[3;5~", Key::Delete),
            ("\x1b[1;5C", Key::WordRight),
            ("\x1b[1;3D", Key::WordLeft),
            ("\x1bf", Key::Alt('f')),
            ("\x7f", Key::Backspace),
            ("\x08", Key::Backspace),
            ("\r", Key::Enter),
            ("\n", Key::Enter),
            ("\x01", Key::Control('a')),
            ("\x1a", Key::Control('z')),
            ("ω", Key::Char('ω')),
            ("木", Key::Char('木')),
            ("\u{1f980}", Key::Char('\u{1f980}')),
        ] {
            assert_eq!(keys(bytes.as_bytes()), [key], "{bytes:?}");
        }
    }

    #[test]
    fn what_is_no_key_is_swallowed_whole_and_enter_always_is_one() {
        assert_eq!(keys(b"\x1b[200~a\x1b[15~\x1b[[Ab\x1b[?1;2cx"), [Key::Char('a'), Key::Char('b'), Key::Char('x')]);
        assert_eq!(keys(b"\x1b[1;\r"), [Key::Enter]);
        assert_eq!(keys(b"\x1b\x1b[A\x1b\r"), [Key::Up, Key::Enter]);
        assert_eq!(keys(b"\xc3\r\xff\x80\xc3a\xe2\x82"), [Key::Enter, Key::Char('a')]);
        assert_eq!(keys("a\u{202e}\u{200d}\u{85}b".as_bytes()), [Key::Char('a'), Key::Char('b')]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_keys_or_none_and_the_next_line_is_heard(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut decoder = Decoder::default();
            for byte in bytes {
                if let Some(Key::Char(c)) = decoder.key(byte) {
                    prop_assert!(is_shown(c));
                }
            }
            prop_assert_eq!(decoder.key(b'\r'), Some(Key::Enter));
            prop_assert_eq!(decoder.key(b'x'), Some(Key::Char('x')));
        }

        #[test]
        fn typed_text_comes_out_as_it_was(text in "[a-zäöüωλ木林 €\u{1f980}]{0,30}") {
            let typed: String = keys(text.as_bytes()).into_iter().filter_map(|k| if let Key::Char(c) = k { Some(c) } else { None }).collect();
            prop_assert_eq!(typed, text);
        }
    }
}
