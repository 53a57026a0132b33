//! The words of a line, by a shell's simple rules: `"…"`, `'…'` and `\`. Nothing is expanded.

/// A line that ends inside quotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unclosed(
    /// The quote that is missing, or the backslash with nothing behind it.
    pub char,
);

impl std::fmt::Display for Unclosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            '\\' => f.write_str("nothing stands behind the last \\"),
            quote => write!(f, "the {quote} that opens has none that closes it"),
        }
    }
}

impl std::error::Error for Unclosed {}

/// A line that is not finished, as far as it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begun {
    /// The words before the last.
    pub words: Vec<String>,
    /// The last one, which may go on; empty behind a space.
    pub last: String,
    /// Where it begins, in bytes.
    pub start: usize,
    /// What it is inside of.
    pub open: Option<char>,
}

/// The words of a line.
///
/// # Errors
/// [`Unclosed`]
///
/// ```
/// let words = gaia_prompt::words::split(r#"push "a b" 'c "d"' e\ f"#).unwrap();
/// assert_eq!(words, ["push", "a b", "c \"d\"", "e f"]);
/// ```
pub fn split(line: &str) -> Result<Vec<String>, Unclosed> {
    let (mut begun, is_word) = parse(line);
    if let Some(open) = begun.open {
        return Err(Unclosed(open));
    }
    if is_word {
        begun.words.push(begun.last);
    }
    Ok(begun.words)
}

/// The words of a line that is still being typed.
#[must_use]
pub fn begun(line: &str) -> Begun {
    parse(line).0
}

/// What was begun, and whether a word was: `""` is one.
fn parse(line: &str) -> (Begun, bool) {
    let mut begun = Begun { words: Vec::new(), last: String::new(), start: 0, open: None };
    let mut is_word = false;
    let mut characters = line.char_indices();
    while let Some((at, c)) = characters.next() {
        match (begun.open, c) {
            (None, ' ' | '\t' | '\n') => {
                if std::mem::take(&mut is_word) {
                    begun.words.push(std::mem::take(&mut begun.last));
                }
                continue;
            }
            (Some(quote), c) if quote == c => begun.open = None,
            (Some('\''), c) => begun.last.push(c),
            (None, '"' | '\'') => {
                if !is_word {
                    begun.start = at;
                }
                begun.open = Some(c);
            }
            (_, '\\') => {
                if !is_word {
                    begun.start = at;
                }
                match characters.next() {
                    None => begun.open = Some(begun.open.unwrap_or('\\')),
                    // Inside "…" it stands for itself but before these.
                    Some((_, next)) => {
                        if begun.open.is_some() && !matches!(next, '"' | '\\' | '$' | '`') {
                            begun.last.push('\\');
                        }
                        begun.last.push(next);
                    }
                }
            }
            (_, c) => {
                if !is_word {
                    begun.start = at;
                }
                begun.last.push(c);
            }
        }
        is_word = true;
    }
    if !is_word {
        begun.start = line.len();
    }
    (begun, is_word)
}

/// A word as it has to be typed.
#[must_use]
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.,:/@=+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let mut out = String::from("\"");
    for c in word.chars() {
        if matches!(c, '"' | '\\' | '$' | '`') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_that_goes_on_says_where_its_last_word_begins() {
        let of = |line: &str| {
            let begun = begun(line);
            (begun.words.join("|"), begun.last, begun.start, begun.open)
        };
        assert_eq!(of("logs --br"), ("logs".into(), "--br".into(), 5, None));
        assert_eq!(of("logs "), ("logs".into(), String::new(), 5, None));
        assert_eq!(of("a \"b c"), ("a".into(), "b c".into(), 2, Some('"')));
        assert_eq!(of(""), (String::new(), String::new(), 0, None));
    }

    #[test]
    fn what_is_not_closed_is_said() {
        assert_eq!(split("a \"b"), Err(Unclosed('"')));
        assert_eq!(split("a 'b\""), Err(Unclosed('\'')));
        assert_eq!(split("a \\"), Err(Unclosed('\\')));
        assert_eq!(split("a \"\" ''").unwrap(), ["a", "", ""]);
    }

    proptest! {
        #[test]
        fn it_splits_as_shlex_does(line in "[a-c \"'\\\\$]{0,16}") {
            prop_assert_eq!(split(&line).ok(), shlex::split(&line), "{}", line);
        }

        #[test]
        fn what_was_quoted_is_one_word_again(word in "\\PC{0,20}", before in "[a-z]{1,5}") {
            let line = format!("{before} {}", quoted(&word));
            prop_assert_eq!(split(&line).unwrap(), [before, word]);
        }
    }
}
