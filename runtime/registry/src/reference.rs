//! Names of components: `registry.example/omega/cloud-fetch:2.4.1`, and what in one is wrong where.
//!
//! The grammar is that of the OCI distribution specification 1.1, with Docker's rule for the first part: it is a registry
//! if it has a dot or a colon or is `localhost`. What is read is used as read, in paths of requests too, so nothing in it
//! needs escaping there.

use std::fmt;
use std::ops::Range;

use gaia_egress::site::{Denied, Origin, Peer};
use gaia_manifest::Scheme;
use sha2::Digest as _;

/// The longest name of a repository, its registry included, in bytes: what other clients take.
const MAX_NAME: usize = 255;
/// The longest tag (OCI distribution 1.1, "Pulling manifests").
const MAX_TAG: usize = 128;
/// What is meant by a reference without tag and digest.
const LATEST: &str = "latest";

/// SHA-256 of a manifest's or a component's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Reads `sha256:` and 64 hexadecimal digits in lower case; nothing else is a digest here.
    ///
    /// ```
    /// use gaia_registry::Digest;
    /// let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    /// assert_eq!(Digest::parse(text), Some(Digest::of(b"")));
    /// ```
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("sha256:")?.as_bytes();
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        let (pairs, rest) = digits.as_chunks::<2>();
        if pairs.len() != bytes.len() || !rest.is_empty() {
            return None;
        }
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = value(*high)? << 4 | value(*low)?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A registry's host and, where it is not that of its scheme, port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host {
    peer: Peer,
    port: Option<u16>,
}

impl Host {
    /// Reads `host[:port]`; an IPv6 address stands in brackets. `:443` is the same as no port.
    ///
    /// # Errors
    /// What it is refused for.
    ///
    /// ```
    /// use gaia_registry::Host;
    /// assert_eq!(Host::parse("Registry.Example:443").unwrap().to_string(), "registry.example");
    /// assert!(Host::parse("registry.example/omega").is_err());
    /// ```
    pub fn parse(text: &str) -> Result<Self, Denied> {
        let origin = Origin::parse(Scheme::Https, text)?;
        let port = Some(origin.port()).filter(|port| *port != Scheme::Https.default_port());
        Ok(Self { peer: origin.host().clone(), port })
    }

    /// The TCP port that it answers on: the one it has, or that of HTTPS or, without TLS, of HTTP.
    #[must_use]
    pub fn port(&self, plain_http: bool) -> u16 {
        let scheme = if plain_http { Scheme::Http } else { Scheme::Https };
        self.origin(scheme).map_or(scheme.default_port(), |origin| origin.port())
    }

    /// Of whom a request is for, as messages name it.
    pub(crate) fn of(origin: &Origin) -> Self {
        let peer = origin.host().clone();
        let port = Some(origin.port()).filter(|port| *port != origin.scheme().default_port() || is_bare(&peer));
        Self { peer, port }
    }

    /// Whom a request to it is for.
    ///
    /// # Errors
    /// None that a host could have which was parsed.
    pub(crate) fn origin(&self, scheme: Scheme) -> Result<Origin, Denied> {
        Origin::parse(scheme, &self.to_string())
    }

    /// Whether a request for it goes there, with the scheme that it has there.
    pub(crate) fn is_at(&self, origin: &Origin) -> bool {
        self.origin(origin.scheme()).as_ref() == Ok(origin)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.peer)?;
        // Without its port, such a name in front of a repository would be a part of that.
        let port = self.port.or_else(|| is_bare(&self.peer).then(|| Scheme::Https.default_port()));
        port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// A name that only a port makes a registry's.
fn is_bare(peer: &Peer) -> bool {
    matches!(peer, Peer::Name(name) if !name.contains('.') && name != "localhost")
}

/// What is wrong with a reference, and where in its text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct ReferenceError {
    /// Bytes of the text.
    pub span: Range<usize>,
    /// What is wrong.
    pub why: Wrong,
}

/// What can be wrong with a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Wrong {
    /// No text.
    #[error("the name of a component is missing, as in \"omega/cloud-fetch:2.4.1\"")]
    Empty,
    /// A scheme before the registry.
    #[error("a registry without a scheme: \"registry.example/omega/cloud-fetch:2.4.1\"")]
    Scheme,
    /// The first part has a dot or a colon, and is no host.
    #[error("not a registry's host: {0}")]
    Host(Denied),
    /// A registry, and nothing behind it.
    #[error("the name behind the registry is missing, as in \"registry.example/omega/cloud-fetch:2.4.1\"")]
    NoName,
    /// A part of the name.
    #[error(
        "a part of a name has lower-case letters and digits, and single . or _, __ or any number of - between them"
    )]
    Part,
    /// The name is too long.
    #[error("a name of {0} bytes; registries take 255")]
    TooLong(usize),
    /// The tag.
    #[error("a tag has letters, digits, _, . and -, at most 128 of them, and begins with none of . and -")]
    Tag,
    /// The digest.
    #[error("a digest is sha256: and 64 hexadecimal digits in lower case")]
    Digest,
}

/// A component's name, in the local store or in a registry.
///
/// ```
/// use gaia_registry::Reference;
/// let remote = Reference::parse("registry.example:5000/omega/cloud-fetch:2.4.1").unwrap();
/// assert_eq!(remote.host().unwrap().to_string(), "registry.example:5000");
/// assert_eq!((remote.repository(), remote.tag()), ("omega/cloud-fetch", Some("2.4.1")));
/// assert!(Reference::parse("omega/cloud-fetch:2.4.1").unwrap().is_local());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    host: Option<Host>,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads `[host[:port]/]repository[:tag][@sha256:…]`.
    ///
    /// # Errors
    /// [`ReferenceError`], with the place.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let wrong = |span, why| Err(ReferenceError { span, why });
        if text.is_empty() {
            return wrong(0..0, Wrong::Empty);
        }
        if let Some(i) = text.find("://") {
            return wrong(0..i + 3, Wrong::Scheme);
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => match Digest::parse(digest) {
                Some(digest) => (rest, Some(digest)),
                None => return wrong(rest.len() + 1..text.len(), Wrong::Digest),
            },
        };
        let first = rest.split('/').next().unwrap_or(rest);
        let is_registry = first.contains(['.', ':', '[']) || first == "localhost";
        let (host, from) = if is_registry && (first.len() < rest.len() || first.starts_with('[')) {
            match Host::parse(first) {
                Ok(host) => (Some(host), first.len() + 1),
                Err(denied) => return wrong(0..first.len(), Wrong::Host(denied)),
            }
        } else {
            (None, 0)
        };
        let Some(named) = rest.get(from..).filter(|named| !named.is_empty()) else {
            return wrong(0..rest.len(), if host.is_some() { Wrong::NoName } else { Wrong::Empty });
        };
        // Behind the registry no colon is a port's.
        let (repository, tag) = match named.split_once(':') {
            None => (named, None),
            Some((repository, tag)) => (repository, Some(tag)),
        };
        let mut at = from;
        for part in repository.split('/') {
            if !is_part(part) {
                return wrong(at..at + part.len(), Wrong::Part);
            }
            at += part.len() + 1;
        }
        if from + repository.len() > MAX_NAME {
            return wrong(0..from + repository.len(), Wrong::TooLong(from + repository.len()));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return wrong(at..rest.len(), Wrong::Tag);
        }
        Ok(Self { host, repository: repository.to_owned(), tag: tag.map(str::to_owned), digest })
    }

    /// Its registry, if it names one.
    #[must_use]
    pub fn host(&self) -> Option<&Host> {
        self.host.as_ref()
    }

    /// Whether it names no registry: the local store is asked first, then the default registry.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.host.is_none()
    }

    /// Its name without registry, tag and digest.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Its tag.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// What it is pinned to: the manifest's digest, or the component's (see [`Registry::pull`](crate::Registry::pull)).
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The tag, or the one that is meant if there is neither tag nor digest.
    pub(crate) fn tag_or_latest(&self) -> Option<&str> {
        self.tag().or_else(|| self.digest.is_none().then_some(LATEST))
    }

    /// The same name in this registry.
    #[must_use]
    pub fn at(&self, host: Host) -> Self {
        Self { host: Some(host), ..self.clone() }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            write!(f, "{host}/")?;
        }
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_part(part: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = |b: Option<&u8>| b.is_some_and(|b| alphanumeric(*b));
    let bytes = part.as_bytes();
    let separators = bytes.split(|b| alphanumeric(*b)).filter(|s| !s.is_empty());
    ends(bytes.first())
        && ends(bytes.last())
        && separators.into_iter().all(|s| matches!(s, b"." | b"_" | b"__") || s.iter().all(|b| *b == b'-'))
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`
fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=MAX_TAG).contains(&tag.len()) && tag.bytes().all(word) && !tag.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn the_first_part_says_whether_it_is_a_registry() {
        for (text, host, repository) in [
            ("omega/cloud-fetch:2.4.1", None, "omega/cloud-fetch"),
            ("fetch", None, "fetch"),
            ("fetch:1", None, "fetch"),
            ("cloud.fetch:1", None, "cloud.fetch"),
            ("a/b/c", None, "a/b/c"),
            ("registry.example/fetch", Some("registry.example"), "fetch"),
            ("registry.example/omega/cloud-fetch:2.4.1", Some("registry.example"), "omega/cloud-fetch"),
            ("localhost/fetch:1", Some("localhost"), "fetch"),
            ("registry:5000/fetch:1", Some("registry:5000"), "fetch"),
            ("127.0.0.1:5000/a/b", Some("127.0.0.1:5000"), "a/b"),
            ("[::1]:5000/a", Some("[::1]:5000"), "a"),
            ("[::1]/a", Some("[::1]"), "a"),
            ("Registry.Example/a", Some("registry.example"), "a"),
            ("registry.example:443/a", Some("registry.example"), "a"),
            ("registry:443/a", Some("registry:443"), "a"),
            ("registry./a", Some("registry:443"), "a"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.host().map(ToString::to_string).as_deref(), host, "{text}");
            assert_eq!(reference.repository(), repository, "{text}");
            assert_eq!(reference.is_local(), host.is_none(), "{text}");
        }
    }

    #[test]
    fn a_port_is_that_of_the_scheme_unless_it_is_said() {
        let ports = |text| [false, true].map(|plain| Host::parse(text).unwrap().port(plain));
        assert_eq!(ports("registry.example"), [443, 80]);
        assert_eq!(ports("registry.example:5000"), [5000, 5000]);
        assert_eq!(ports("[::1]"), [443, 80]);
    }

    #[test]
    fn tag_and_digest_are_what_stands_there() {
        let pinned = format!("r.example/a:1@sha256:{HEX}");
        let reference = Reference::parse(&pinned).unwrap();
        assert_eq!((reference.tag(), reference.digest()), (Some("1"), Some(Digest::of(b""))));
        assert_eq!(reference.to_string(), pinned);
        assert_eq!(reference.tag_or_latest(), Some("1"));
        let bare = Reference::parse(&format!("a@sha256:{HEX}")).unwrap();
        assert_eq!((bare.tag(), bare.tag_or_latest()), (None, None));
        assert_eq!(Reference::parse("a").unwrap().tag_or_latest(), Some("latest"));
    }

    #[test]
    fn each_wrong_reference_is_told_why_and_where() {
        let upper = format!("a@sha256:{}", HEX.to_uppercase());
        let short = format!("a:1@sha256:{}", &HEX[1..]);
        let long = format!("registry.example/{}", "a".repeat(250));
        for (text, span, why) in [
            ("", "", "is missing"),
            ("https://registry.example/a", "https://", "without a scheme"),
            ("registry.example/", "registry.example/", "behind the registry is missing"),
            ("[::1]", "[::1]", "behind the registry is missing"),
            ("reg_.example:x/a", "reg_.example:x", "not a registry's host"),
            ("user@registry.example/a", "registry.example/a", "a digest is sha256:"),
            ("omega/Fetch:1", "Fetch", "lower-case"),
            ("omega//fetch", "", "lower-case"),
            ("omega/../fetch", "..", "lower-case"),
            ("omega/fetch/:1", "", "lower-case"),
            ("/omega", "", "lower-case"),
            ("omega/-fetch", "-fetch", "lower-case"),
            ("omega/a._b", "a._b", "lower-case"),
            ("omega/a___b", "a___b", "lower-case"),
            ("omega/fé", "fé", "lower-case"),
            ("omega/fetch:", "", "a tag has"),
            ("omega/fetch:.1", ".1", "a tag has"),
            ("omega/fetch:1:2", "1:2", "a tag has"),
            ("omega/fetch:1/2", "1/2", "a tag has"),
            ("omega/fetch:1?x", "1?x", "a tag has"),
            ("omega/fetch@sha512:00", "sha512:00", "a digest is sha256:"),
            (upper.as_str(), &upper[2..], "a digest is sha256:"),
            (short.as_str(), &short[4..], "a digest is sha256:"),
            (long.as_str(), &long, "registries take 255"),
        ] {
            let error = Reference::parse(text).expect_err(text);
            assert!(error.to_string().contains(why), "{text}: {error}");
            assert_eq!(text.get(error.span.clone()), Some(span), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_reference_or_told_where_it_is_not(text in "\\PC{0,80}") {
            check(&text)?;
        }

        #[test]
        fn near_misses_too(
            text in "(https?://)?([a-zA-Z0-9._:\\[\\]-]{0,12}/){0,3}[a-z0-9._-]{0,9}(:[a-zA-Z0-9._:/-]{0,6})?(@sha256:[0-9a-f]{63,65})?",
        ) {
            check(&text)?;
        }

        #[test]
        fn what_is_built_by_the_grammar_is_taken(
            host in proptest::option::of("[a-z]{1,8}(\\.[a-z]{1,8}|:[1-9][0-9]{0,3})"),
            parts in proptest::collection::vec("[a-z0-9]{1,5}((\\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}", 1..4),
            tag in proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}"),
            pinned: bool,
        ) {
            let mut text = parts.join("/");
            if host.is_none() && parts.len() > 1 {
                // Its first part would be a registry.
                prop_assume!(!parts[0].contains('.') && parts[0] != "localhost");
            }
            if let Some(host) = &host { text = format!("{host}/{text}"); }
            if let Some(tag) = &tag { text = format!("{text}:{tag}"); }
            if pinned { text = format!("{text}@sha256:{HEX}"); }
            let reference = Reference::parse(&text).unwrap();
            prop_assert_eq!(reference.repository(), parts.join("/"));
            prop_assert_eq!(reference.tag(), tag.as_deref());
            prop_assert_eq!(reference.digest().is_some(), pinned);
            prop_assert_eq!(reference.is_local(), host.is_none());
        }
    }

    fn check(text: &str) -> Result<(), TestCaseError> {
        match Reference::parse(text) {
            Ok(reference) => prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference)),
            Err(error) => prop_assert!(text.get(error.span.clone()).is_some(), "{error}: {:?}", error.span),
        }
        Ok(())
    }
}
