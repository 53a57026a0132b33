//! Names of components, and the short words that records and artefacts are named by.

use std::fmt;
use std::str::FromStr;

/// The longest name of a component, in bytes: the 255 that registries take, a colon, and a tag of 128.
pub const REFERENCE_MAX: usize = 384;
/// The longest repository, in bytes: what registries take.
const REPOSITORY_MAX: usize = 255;
/// The longest tag, in bytes: what registries take.
const TAG_MAX: usize = 128;
/// The longest name of a record, and the longest settings of an artefact, in bytes. They are file names.
pub const WORD_MAX: usize = 64;

/// The name of a component: `omega/cloud-fetch:2.4.1`, `registry.example:5000/omega/x:1`, `hello`.
///
/// The parts of the repository are lower-case letters and digits, with `.`, `_` or `-` between them; the first may be a registry
/// with its port, if a part follows. A tag is up to 128 letters, digits, `_`, `.` and `-`, and begins with none of the last two.
/// It is kept as it is written: `x` and `x:latest` are two names.
///
/// ```
/// use gaia_store::Reference;
///
/// let name: Reference = "registry.example:5000/omega/x:1".parse()?;
/// assert_eq!((name.repository(), name.tag()), ("registry.example:5000/omega/x", Some("1")));
/// assert!("../../etc/passwd".parse::<Reference>().is_err());
/// # Ok::<(), gaia_store::NotAReference>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    text: String,
    repository: usize,
}

/// No name of a component, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAReference {
    /// Longer than [`REFERENCE_MAX`], or one of its parts is too long.
    #[error("a name has up to 255 bytes before its tag, and a tag up to 128")]
    Long,
    /// The part before the tag.
    #[error(
        "a name is lower-case letters and digits, with . _ - between them and / between its parts, as in omega/cloud-fetch:2.4.1"
    )]
    Repository,
    /// The tag.
    #[error(
        "a tag has letters, digits, _ . and -, and begins with a letter, a digit or _, as in omega/cloud-fetch:2.4.1"
    )]
    Tag,
}

impl Reference {
    /// What comes before the tag.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.text.get(..self.repository).unwrap_or_default()
    }

    /// The tag, if there is one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.text.get(self.repository + 1..)
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Reference {
    type Err = NotAReference;

    fn from_str(text: &str) -> Result<Self, NotAReference> {
        if text.len() > REFERENCE_MAX {
            return Err(NotAReference::Long);
        }
        // A colon behind the last slash parts the tag; one before it is a registry's port.
        let last = text.rfind('/').map_or(0, |slash| slash + 1);
        let colon = text.get(last..).and_then(|part| part.find(':')).map(|colon| last + colon);
        let repository = text.get(..colon.unwrap_or(text.len())).ok_or(NotAReference::Repository)?;
        if repository.len() > REPOSITORY_MAX {
            return Err(NotAReference::Long);
        }
        let (first, others) = match repository.split_once('/') {
            Some((first, others)) => (first, Some(others)),
            None => (repository, None),
        };
        let host = match first.split_once(':') {
            Some((host, port)) if others.is_some() && is_port(port) => host,
            Some(_) => return Err(NotAReference::Repository),
            None => first,
        };
        if !is_part(host) || !others.is_none_or(|others| others.split('/').all(is_part)) {
            return Err(NotAReference::Repository);
        }
        if let Some(tag) = colon.and_then(|colon| text.get(colon + 1..)) {
            let good = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
            if tag.len() > TAG_MAX {
                return Err(NotAReference::Long);
            }
            if tag.is_empty() || tag.starts_with(['.', '-']) || !tag.bytes().all(good) {
                return Err(NotAReference::Tag);
            }
        }
        Ok(Self { text: text.to_owned(), repository: repository.len() })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// One part of a repository: separators stand between letters and digits, so none is `.` or `..`.
fn is_part(part: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = |b: Option<&u8>| b.is_some_and(|b| plain(*b));
    let bytes = part.as_bytes();
    ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(|b| plain(*b) || b"._-".contains(b))
}

/// 1 to 65535, without zeros before it.
fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port != 0 && port.to_string() == text)
}

/// A word that is a file's name as it is: 1 to [`WORD_MAX`] letters, digits, `_` and `-`.
pub(crate) fn is_word(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (1..=WORD_MAX).contains(&text.len()) && text.bytes().all(good)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_told_from_what_only_looks_like_one() {
        for good in ["x", "hello:1", "omega/cloud-fetch:2.4.1", "localhost:5000/x", "a.b/c_d/e:_X.y-Z", "a--b/c__d"] {
            assert_eq!(good.parse::<Reference>().map(|name| name.to_string()), Ok(good.to_owned()));
        }
        let (repository, tag, long) = (NotAReference::Repository, NotAReference::Tag, NotAReference::Long);
        for (bad, why) in [
            ("", repository),
            ("/", repository),
            ("a//b", repository),
            ("/a", repository),
            ("a/", repository),
            ("..", repository),
            ("a/../b", repository),
            ("A/b", repository),
            ("a/b@sha256:00", repository),
            ("h:0/x", repository),
            ("h:65536/x", repository),
            ("h:07/x", repository),
            ("a\0b", repository),
            ("å", repository),
            ("x:", tag),
            ("x:.1", tag),
            ("x:-1", tag),
            ("x:1:2", tag),
            ("x:1 ", tag),
            (&"a".repeat(256), long),
            (&format!("a:{}", "1".repeat(129)), long),
            (&"a/".repeat(200), long),
        ] {
            assert_eq!(bad.parse::<Reference>(), Err(why), "{bad:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn any_text_is_a_name_that_prints_the_same_or_is_refused(text in "[a-z0-9A-Z:/._@-]{0,40}|\\PC{0,40}") {
            if let Ok(name) = text.parse::<Reference>() {
                prop_assert_eq!(name.as_str(), &text);
                let again = match name.tag() {
                    Some(tag) => format!("{}:{tag}", name.repository()),
                    None => name.repository().to_owned(),
                };
                prop_assert_eq!(again, text.clone());
                prop_assert!(text.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
                prop_assert!(text.bytes().all(|b| b.is_ascii_graphic()));
            }
        }

        #[test]
        fn what_is_made_of_good_parts_is_a_name(
            port in proptest::option::of(1..=u16::MAX),
            parts in proptest::collection::vec("[a-z0-9]([a-z0-9._-]{0,10}[a-z0-9])?", 1..5),
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"),
        ) {
            let mut repository = parts.join("/");
            if let (Some(port), Some((host, path))) = (port, repository.split_once('/')) {
                repository = format!("{host}:{port}/{path}");
            }
            let text = tag.as_ref().map_or(repository.clone(), |tag| format!("{repository}:{tag}"));
            let name: Reference = text.parse().unwrap();
            prop_assert_eq!(name.repository(), repository);
            prop_assert_eq!(name.tag(), tag.as_deref());
        }

        #[test]
        fn a_word_is_never_a_path(text in "[a-zA-Z0-9_./-]{0,70}|\\PC{0,10}") {
            if is_word(&text) {
                prop_assert!(!text.contains(['/', '.', '\0']) && !text.is_empty() && text.len() <= WORD_MAX);
            }
        }
    }
}
