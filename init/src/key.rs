//! Public keys as they are written everywhere: in `gaia.toml`, in an operator's list of known appliances, on the console.
//!
//! The text is the key itself, so it is its own fingerprint. Nothing here can sign or check a signature: PID 1 reads and hands on.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

/// What every text of a key begins with.
const KIND: &str = "ed25519:";
/// The length of a key, in bytes (RFC 8032).
pub const BYTES: usize = 32;

/// An ed25519 public key: `ed25519:` and 43 characters of base64url (RFC 4648) without padding.
///
/// ```
/// use gaia_init::key::PublicKey;
/// let text = "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
/// let key: PublicKey = text.parse().unwrap();
/// assert_eq!(key.0[..2], [0xd7, 0x5a]);
/// assert_eq!(key.to_string(), text);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; BYTES]);

/// A text is no public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a public key, such as \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\": `gaia key` prints an operator's own"
)]
pub struct NoKey(String);

impl FromStr for PublicKey {
    type Err = NoKey;

    fn from_str(text: &str) -> Result<Self, NoKey> {
        // What is much longer is shown in part: it may be anything.
        let wrong = || NoKey(text.chars().take(64).collect());
        let mut key = [0; BYTES];
        let encoded = text.strip_prefix(KIND).filter(|encoded| encoded.len() == 43).ok_or_else(wrong)?;
        let length = URL_SAFE_NO_PAD.decode_slice(encoded, &mut key).map_err(|_| wrong())?;
        if length == BYTES { Ok(Self(key)) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for PublicKey {
    type Error = NoKey;

    fn try_from(text: String) -> Result<Self, NoKey> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{KIND}{}", URL_SAFE_NO_PAD.encode(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_key_is_told_so() {
        let key = PublicKey([7; BYTES]).to_string();
        // The last character has four bits of the key and two that must be zero.
        let (last, rest) = (key.len() - 1, &key[..key.len() - 1]);
        assert_eq!(&key[last..], "c");
        for text in [
            "",
            "ed25519",
            "ed25519:",
            rest,
            &format!("{key}="),
            &format!("{key}A"),
            &format!(" {key}"),
            &format!("{rest}d"),
            &key.replace("ed25519", "ED25519"),
            &key.replace("ed25519", "rsa"),
            &format!("{}+{}", &key[..20], &key[21..]),
        ] {
            let error = text.parse::<PublicKey>().unwrap_err().to_string();
            assert!(error.contains("gaia key"), "{error}");
        }
        assert!("x".repeat(10_000).parse::<PublicKey>().unwrap_err().to_string().len() < 300);
    }

    proptest! {
        #[test]
        fn a_key_is_read_as_it_is_written(bytes in any::<[u8; BYTES]>()) {
            prop_assert_eq!(PublicKey(bytes).to_string().parse(), Ok(PublicKey(bytes)));
        }

        #[test]
        fn a_text_is_one_key_at_most_and_a_key_one_text(text in "(ed25519:)?[A-Za-z0-9_=+/-]{40,46}") {
            if let Ok(key) = text.parse::<PublicKey>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }

        #[test]
        fn any_text_is_a_key_or_is_told_why_not(text in "\\PC{0,80}") {
            let _ = text.parse::<PublicKey>();
        }
    }
}
