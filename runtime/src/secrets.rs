//! Values of secrets: given to branes whose `env` names them, and shown to nobody.
//!
//! A file of them is TOML, a table for each brane: `[fetch]` and `API_KEY = "…"`. Nobody but its owner may read it. An appliance keeps
//! them in its store, sealed: see `control::secrets`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

/// The largest file of secrets, in bytes.
pub const MAX_BYTES: u64 = 256 << 10;
/// The longest value that an appliance keeps, in bytes.
pub const MAX_VALUE: usize = 64 << 10;
/// Values that an appliance keeps for one brane at most.
pub const MAX_OF_BRANE: usize = 64;
/// And for all of them.
pub const MAX_SECRETS: usize = 192;

/// A value. Printing it shows that there is one; its memory is overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Secret {
    /// What came from a terminal or a pipe, without the line end that those put behind it.
    ///
    /// # Errors
    /// Why it cannot be the value of a variable, and what to do.
    pub fn of_input(bytes: Vec<u8>) -> Result<Self, String> {
        let bytes = Zeroizing::new(bytes);
        let line = bytes.strip_suffix(b"\n").map_or(&bytes[..], |line| line.strip_suffix(b"\r").unwrap_or(line));
        let text =
            std::str::from_utf8(line).map_err(|_| "a value is text in UTF-8: encode it, with base64 for example")?;
        let value = Self(text.to_owned());
        value.check().map(|()| value)
    }

    /// What was kept; none, if it is no text.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(std::str::from_utf8(bytes).ok()?.to_owned()))
    }

    /// Whether it can be the value of a variable, and be kept.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self) -> Result<(), String> {
        match self.0.len() {
            0 => Err("a value has some bytes, and none came; to have none: gaia secret rm".to_owned()),
            // A guest's C library ends a value there, and nobody would see that.
            _ if self.0.contains('\0') => Err("a value of a variable cannot have the byte 0: encode it".to_owned()),
            length if length > MAX_VALUE => Err(format!("a value has at most {MAX_VALUE} bytes")),
            _ => Ok(()),
        }
    }

    /// The value itself, for the guest it is for.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// All values that are known, by brane and name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secrets(BTreeMap<String, BTreeMap<String, Secret>>);

impl Secrets {
    /// Reads a file of secrets.
    ///
    /// # Errors
    /// What is wrong and in which line, without the line: it may be a secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            format!("line {line} is not of the form [brane] or NAME = \"value\"")
        })
    }

    /// Takes a value where there is none of that name.
    pub fn fill(&mut self, brane: &str, name: &str, value: Secret) {
        self.0.entry(brane.to_owned()).or_default().entry(name.to_owned()).or_insert(value);
    }

    /// A brane's value of this name.
    #[must_use]
    pub fn of(&self, brane: &str, name: &str) -> Option<&Secret> {
        self.0.get(brane)?.get(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_is_found_by_brane_and_name_and_never_printed() {
        let secrets = Secrets::parse("[fetch]\nAPI_KEY = \"open sesame\"\n").unwrap();
        assert_eq!(secrets.of("fetch", "API_KEY").map(Secret::reveal), Some("open sesame"));
        assert_eq!(secrets.of("other", "API_KEY"), None);
        assert!(!format!("{secrets:?}").contains("sesame"));
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line_alone() {
        for text in
            ["[fetch]\nAPI_KEY = \"open sesame\nX = 1\n", "[fetch]\nAPI_KEY = sesame\n", "[fetch]\nsesame = 3\n"]
        {
            let error = Secrets::parse(text).unwrap_err();
            assert!(error.contains("line 2") && !error.contains("sesame"), "{error}");
        }
        assert!(Secrets::parse("sesame = 1").unwrap_err().contains("line 1"));
    }

    #[test]
    fn what_comes_from_a_pipe_loses_one_line_end_and_what_no_variable_can_hold_is_refused() {
        let of = |bytes: &[u8]| Secret::of_input(bytes.to_vec()).map(|value| value.reveal().to_owned());
        for (bytes, value) in
            [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a\r", "a\r"), (" a ", " a ")]
        {
            assert_eq!(of(bytes.as_bytes()).as_deref(), Ok(value));
        }
        for (bytes, words) in [(&b""[..], "none came"), (b"\n", "none came"), (b"a\0b", "byte 0"), (b"\xff", "UTF-8")] {
            assert!(of(bytes).unwrap_err().contains(words), "{bytes:?}");
        }
        assert!(of(&vec![b'a'; MAX_VALUE]).is_ok());
        assert!(of(&vec![b'a'; MAX_VALUE + 1]).unwrap_err().contains("65536"));
    }

    #[test]
    fn what_is_there_is_not_taken_the_place_of() {
        let mut secrets = Secrets::parse("[fetch]\nA = \"file\"\n").unwrap();
        for (name, wanted) in [("A", "file"), ("B", "store")] {
            secrets.fill("fetch", name, Secret("store".to_owned()));
            assert_eq!(secrets.of("fetch", name).map(Secret::reveal), Some(wanted));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\[[a-z]{0,3}\\]\n|[A-Z]{0,3} ?= ?\"?[a-z]{0,4}\"?\n|\\PC{0,8}){0,5}") {
            let _ = Secrets::parse(&text);
        }
    }
}
