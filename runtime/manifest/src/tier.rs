//! The seed's manifest says `capability` twice: a string (the tier) in `[brane.fetch]`, and a table
//! `[brane.fetch.capability]`. TOML forbids that. Inside a `[brane.<name>]` table, a bare string under `capability` is
//! therefore read as `tier`.
//!
//! It is done on TOML's own tokens: the key's bytes are replaced by `tier` and as many spaces as keep everything behind
//! it where it was, so that every line and column of every later error is true. Any other duplicate stays one.

use toml_parser::Source;
use toml_parser::lexer::{Token, TokenKind};

/// The key as the seed spells it.
pub(crate) const WRITTEN: &str = "capability";
/// The key as it is read, of the same length: spaces behind a key mean nothing.
const READ: &str = "tier      ";

/// The source with each such key replaced. Same length, same lines.
///
/// ```
/// let source = "[brane.fetch]\ncapability = \"standard\"\n[brane.fetch.capability]\n";
/// assert_eq!(gaia_manifest::tier::read(source), "[brane.fetch]\ntier       = \"standard\"\n[brane.fetch.capability]\n");
/// ```
#[must_use]
pub fn read(source: &str) -> String {
    let tokens = Source::new(source).lex().into_vec();
    let mut out = source.to_owned();
    let mut in_brane = false;
    // Brackets open in a value that goes on: its lines begin neither a table nor a key.
    let mut open = 0_usize;
    for line in tokens.split(|t| t.kind() == TokenKind::Newline) {
        // Whitespace decides nothing about the shape of a line.
        let shape: Vec<&Token> = line.iter().filter(|t| t.kind() != TokenKind::Whitespace).collect();
        let text = |t: &Token| source.get(t.span().start()..t.span().end()).unwrap_or_default();
        let value = match (open, line.iter().position(|t| t.kind() == TokenKind::Equals)) {
            (0, Some(equals)) => line.get(equals..).unwrap_or_default(),
            (0, None) => &[],
            _ => line,
        };
        let goes_on = open > 0;
        for token in value {
            match token.kind() {
                TokenKind::LeftSquareBracket | TokenKind::LeftCurlyBracket => open += 1,
                TokenKind::RightSquareBracket | TokenKind::RightCurlyBracket => open = open.saturating_sub(1),
                _ => {}
            }
        }
        if goes_on {
            continue;
        }
        match shape.as_slice() {
            [first, rest @ ..] if first.kind() == TokenKind::LeftSquareBracket => {
                in_brane = matches!(rest, [brane, dot, name, close, ..]
                    if text(brane) == "brane" && dot.kind() == TokenKind::Dot && is_key(name) && close.kind() == TokenKind::RightSquareBracket);
            }
            [key, equals, value, ..]
                if in_brane && text(key) == WRITTEN && equals.kind() == TokenKind::Equals && is_string(value) =>
            {
                let span = key.span().start()..key.span().end();
                out.replace_range(span, READ);
            }
            _ => {}
        }
    }
    out
}

fn is_key(token: &Token) -> bool {
    matches!(token.kind(), TokenKind::Atom | TokenKind::BasicString | TokenKind::LiteralString)
}

fn is_string(token: &Token) -> bool {
    matches!(token.kind(), TokenKind::BasicString | TokenKind::LiteralString)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_a_bare_string_in_a_branes_own_table_is_the_tier() {
        for untouched in [
            "capability = \"standard\"\n",
            "[brane.fetch.limits]\ncapability = \"standard\"\n",
            "[brane.fetch]\ncapability = { x = 1 }\n",
            "[brane.fetch]\n\"capability\" = \"standard\"\n",
            "[brane.fetch]\n# capability = \"standard\"\n",
            "[brane.fetch]\nimage = \"\"\"\ncapability = \"standard\"\n\"\"\"\n",
            "[[brane.fetch]]\ncapability = \"standard\"\n",
            "[brane.fetch]\nx.capability = \"standard\"\n",
        ] {
            assert_eq!(read(untouched), untouched);
        }
        assert!(read("[brane.a]\nx = [\n[1],\n]\ncapability = \"standard\"\n").contains("tier"));
        assert!(read("[ brane . 'fetch' ]\n  capability='standard' # x\n").contains("  tier      ='standard' # x"));
    }

    proptest! {
        #[test]
        fn nothing_moves(source in "(\\[brane\\.[a-z]\\]\n|capability = \"[a-z]\"\n|\\PC{0,10}\n|\"\"\"|'){0,12}") {
            let out = read(&source);
            prop_assert_eq!(out.len(), source.len());
            prop_assert!(out.bytes().zip(source.bytes()).all(|(a, b)| (a == b'\n') == (b == b'\n')));
            prop_assert_eq!(read(&out), out.clone(), "reading twice changes nothing");
        }
    }
}
