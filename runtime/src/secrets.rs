//! Values of secrets: given to branes whose `env` names them, and shown to nobody.
//!
//! A file of them is TOML, a table for each brane: `[fetch]` and `API_KEY = "…"`. Nobody but its owner may read it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The largest file of secrets, in bytes.
pub const MAX_BYTES: u64 = 256 << 10;

/// A value. Printing it shows that there is one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
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

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\[[a-z]{0,3}\\]\n|[A-Z]{0,3} ?= ?\"?[a-z]{0,4}\"?\n|\\PC{0,8}){0,5}") {
            let _ = Secrets::parse(&text);
        }
    }
}
