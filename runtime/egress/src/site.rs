//! From a request's address to the entry of the allowlist that covers it.
//!
//! The text is a guest's, so it is read once, strictly, and only what was read is used from then on: for the
//! comparison, the look-up, the `Host` header, TLS and the log. A second reader that might understand another host in
//! the same text does not exist.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gaia_manifest::{Host, Scheme, Site};
use http::Uri;

use crate::address::Reason;

/// The longest host name, in bytes (RFC 1035 2.3.4, without its final dot).
const MAX_NAME: usize = 253;

/// What a request is refused for, as a `DENY` line says it. Text of the guest in it is cut and escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// Neither `http` nor `https`.
    #[error("the scheme is neither http nor https")]
    Scheme,
    /// There is no host.
    #[error("no host")]
    NoHost,
    /// A user before the host.
    #[error("a user before the host")]
    Userinfo,
    /// A host that is not ASCII.
    #[error("{0}: a host in ASCII only, an international name as xn--…")]
    NotAscii(Quoted),
    /// Not 1 to 65535.
    #[error("{0}: not a port")]
    Port(Quoted),
    /// Not a host name.
    #[error("{0}: not a host name")]
    Name(Quoted),
    /// An address, but not as four decimal numbers.
    #[error("{0}: an IPv4 address as four decimal numbers only")]
    Notation(Quoted),
    /// What is in brackets is no IPv6 address.
    #[error("{0}: not an IPv6 address")]
    Brackets(Quoted),
    /// An IPv6 address with a zone.
    #[error("{0}: an IPv6 address without a zone only")]
    Zone(Quoted),
    /// Longer than a host name can be.
    #[error("a host of {0} bytes")]
    TooLong(usize),
    /// No entry of the allowlist covers it.
    #[error("{0} is not on the allowlist")]
    NotListed(String),
    /// The name stands for addresses that are refused, and only for such.
    #[error("{host} is at {address}: {reason}")]
    Address {
        /// The name, or the address itself.
        host: String,
        /// The first address that was refused.
        address: IpAddr,
        /// Why.
        reason: Reason,
    },
    /// An address that none of the instance's own look-ups returned.
    #[error("{0} is not on the allowlist, and no listed name was found to be there")]
    NotSeen(std::net::SocketAddr),
    /// A method that is not for requests to a site.
    #[error("method {0}")]
    Method(Quoted),
}

/// A guest's text for a log line: at most 80 characters, with controls and non-ASCII escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quoted(String);

impl Quoted {
    /// Of any text.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut quoted: String = text.chars().take(80).flat_map(char::escape_default).collect();
        if text.chars().nth(80).is_some() {
            quoted.push('…');
        }
        Self(quoted)
    }
}

impl fmt::Display for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

/// A host: a name or an address, in the one form that is compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// Lower case, no final dot, never in an address's notation.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl Peer {
    /// Reads a host; an IPv6 address stands in brackets.
    ///
    /// # Errors
    /// What it is refused for.
    ///
    /// ```
    /// use gaia_egress::site::Peer;
    /// assert_eq!(Peer::parse("API.Example.ORG."), Ok(Peer::Name("api.example.org".into())));
    /// assert!(Peer::parse("0x7f.1").is_err());
    /// ```
    pub fn parse(text: &str) -> Result<Self, Denied> {
        if !text.is_ascii() {
            return Err(Denied::NotAscii(Quoted::new(text)));
        }
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').unwrap_or(inner);
            if inner.contains('%') {
                return Err(Denied::Zone(Quoted::new(text)));
            }
            let address = inner.parse::<Ipv6Addr>().ok().filter(|_| text.ends_with(']'));
            return address.map(|a| Self::Address(a.into())).ok_or_else(|| Denied::Brackets(Quoted::new(text)));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Err(Denied::NoHost);
        }
        if name.len() > MAX_NAME {
            return Err(Denied::TooLong(text.len()));
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Address(address.into()));
        }
        let label = |l: &str| {
            let inside = l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            inside && (1..=63).contains(&l.len()) && !l.starts_with('-') && !l.ends_with('-')
        };
        if !name.split('.').all(label) {
            return Err(Denied::Name(Quoted::new(text)));
        }
        // What ends in a number is read as an address by somebody: 0x7f.1, 017700000001, 2130706433, 127.1, 127.0.0.1.
        let last = name.rsplit('.').next().unwrap_or(name);
        let hexadecimal = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
        let number = last.bytes().all(|b| b.is_ascii_digit())
            || hexadecimal.is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()));
        if number {
            return Err(Denied::Notation(Quoted::new(text)));
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }

    /// As the allowlist writes it: an IPv6 address without brackets.
    #[must_use]
    pub fn listed(&self) -> String {
        match self {
            Self::Name(name) => name.clone(),
            Self::Address(address) => address.to_string(),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Whom a request is for: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    tls: bool,
    host: Peer,
    port: u16,
}

impl Origin {
    /// Of a request's address. Path and query are not looked at.
    ///
    /// # Errors
    /// What it is refused for.
    pub fn of(uri: &Uri) -> Result<Self, Denied> {
        let scheme = match uri.scheme_str() {
            Some("http") => Scheme::Http,
            Some("https") => Scheme::Https,
            _ => return Err(Denied::Scheme),
        };
        Self::parse(scheme, uri.authority().map_or("", |a| a.as_str()))
    }

    /// Of a scheme and `host[:port]`.
    ///
    /// # Errors
    /// What it is refused for.
    pub fn parse(scheme: Scheme, authority: &str) -> Result<Self, Denied> {
        if authority.contains('@') {
            return Err(Denied::Userinfo);
        }
        if authority.starts_with('[') && !authority.contains(']') {
            return Err(Denied::Brackets(Quoted::new(authority)));
        }
        let behind = authority.rfind(']').map_or(0, |i| i + 1);
        let (host, port) = match authority.get(behind..).and_then(|rest| rest.find(':')) {
            None => (authority, scheme.default_port()),
            Some(i) => {
                let (host, port) = authority.split_at(behind + i);
                let digits = port.trim_start_matches(':');
                let plain = digits.len() + 1 == port.len() && digits.bytes().all(|b| b.is_ascii_digit());
                let number = digits.parse::<u16>().ok().filter(|n| plain && *n > 0 && !digits.starts_with('0'));
                (host, number.ok_or_else(|| Denied::Port(Quoted::new(authority)))?)
            }
        };
        Ok(Self { tls: scheme == Scheme::Https, host: Peer::parse(host)?, port })
    }

    /// Its scheme.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        if self.tls { Scheme::Https } else { Scheme::Http }
    }

    /// Its host.
    #[must_use]
    pub fn host(&self) -> &Peer {
        &self.host
    }

    /// Its port, said or not.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The value of `Host`: without the port if it is the scheme's own.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.port == self.scheme().default_port() {
            self.host.to_string()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.authority())
    }
}

/// The entry of the allowlist that covers whom a request is for.
///
/// # Errors
/// [`Denied::NotListed`].
///
/// ```
/// use gaia_egress::site::{Origin, entry};
/// let sites = [gaia_manifest::Site::parse("*.crossref.org").unwrap()];
/// let origin = |text: &'static str| Origin::of(&http::Uri::from_static(text));
/// assert!(entry(&sites, &origin("https://api.crossref.org/works").unwrap()).is_ok());
/// assert!(entry(&sites, &origin("https://crossref.org/").unwrap()).is_err());
/// ```
pub fn entry<'a>(sites: &'a [Site], origin: &Origin) -> Result<&'a Site, Denied> {
    let host = origin.host.listed();
    let covers = |site: &&Site| site.covers(origin.scheme(), &host, origin.port);
    sites.iter().find(covers).ok_or_else(|| Denied::NotListed(origin.to_string()))
}

/// A name that may be looked up, in the form that is looked up; for `net.dns`.
///
/// # Errors
/// What it is refused for. An address is never listed for `net.dns`, nor is there anything to look up.
pub fn name(hosts: &[Host], text: &str) -> Result<String, Denied> {
    match Peer::parse(text)? {
        Peer::Name(name) if hosts.iter().any(|host| host.covers(&name)) => Ok(name),
        Peer::Name(name) => Err(Denied::NotListed(name)),
        Peer::Address(address) => Err(Denied::NotListed(address.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sites(entries: &[&str]) -> Vec<Site> {
        entries.iter().map(|e| Site::parse(e).unwrap()).collect()
    }

    fn verdict(entries: &[&str], uri: &str) -> Result<String, Denied> {
        let uri: Uri = uri.parse().unwrap();
        let origin = Origin::of(&uri)?;
        entry(&sites(entries), &origin).map(ToString::to_string)
    }

    #[test]
    fn what_an_entry_covers_is_allowed() {
        for (site, uri) in [
            ("api.openalex.org", "https://api.openalex.org/works?page=1"),
            ("api.openalex.org", "http://api.openalex.org/"),
            ("api.openalex.org", "https://API.OpenAlex.org"),
            ("API.OpenAlex.org", "HTTPS://api.openalex.ORG:443/"),
            ("api.openalex.org", "https://api.openalex.org./works"),
            ("api.openalex.org.", "https://api.openalex.org"),
            ("*.crossref.org", "https://api.crossref.org"),
            ("*.crossref.org", "https://a.b.crossref.org"),
            ("https://example.org:8443", "https://example.org:8443/"),
            ("xn--bcher-kva.example", "https://xn--bcher-kva.example/"),
            ("10.0.0.1", "http://10.0.0.1/"),
            ("[2001:db8::1]:8080", "http://[2001:DB8:0::1]:8080/"),
            ("2001:db8::1", "http://[2001:db8:0:0:0:0:0:1]/"),
            ("_dmarc.example.org", "https://_dmarc.example.org"),
        ] {
            assert!(verdict(&[site], uri).is_ok(), "{site} {uri}: {:?}", verdict(&[site], uri));
        }
    }

    #[test]
    fn what_no_entry_covers_is_refused() {
        for (site, uri) in [
            ("*.crossref.org", "https://crossref.org"),
            ("*.crossref.org", "https://evilcrossref.org"),
            ("*.crossref.org", "https://crossref.org.evil.example"),
            ("api.openalex.org", "https://openalex.org"),
            ("api.openalex.org", "https://x.api.openalex.org"),
            ("api.openalex.org", "https://api.openalex.org:8443"),
            ("api.openalex.org", "https://api.openalex.org:80"),
            ("api.openalex.org", "http://api.openalex.org:443"),
            ("https://api.openalex.org", "http://api.openalex.org"),
            ("http://example.org:8080", "https://example.org:8080"),
            ("10.0.0.1", "http://10.0.0.2/"),
            ("127.0.0.1", "http://[::ffff:127.0.0.1]/"),
            ("::1", "http://[::ffff:0:1]/"),
        ] {
            let denied = verdict(&[site], uri).unwrap_err();
            assert!(matches!(denied, Denied::NotListed(_)), "{site} {uri}: {denied}");
        }
        assert!(verdict(&[], "https://api.openalex.org").is_err(), "an empty list denies everything");
    }

    #[test]
    fn each_strange_host_is_refused_for_what_it_is() {
        use Denied::{Brackets, Name, NoHost, NotAscii, Notation, Port, TooLong, Userinfo, Zone};
        fn same(a: &Denied, b: &Denied) -> bool {
            std::mem::discriminant(a) == std::mem::discriminant(b)
        }
        let q = || Quoted::new("");
        let long = "a".repeat(64);
        let longer = "a".repeat(253);
        let longest = format!("{0}.{0}.{0}.{0}.{0}", "a".repeat(50));
        for (authority, wanted) in [
            ("", NoHost),
            (":443", NoHost),
            (".", Name(q())),
            ("..", Name(q())),
            ("a..b", Name(q())),
            (".example.org", Name(q())),
            ("example.org..", Name(q())),
            ("user@example.org", Userinfo),
            ("user:pass@example.org", Userinfo),
            ("example.org@", Userinfo),
            ("example.org:", Port(q())),
            ("example.org:0", Port(q())),
            ("example.org:65536", Port(q())),
            ("example.org:+80", Port(q())),
            ("example.org:0443", Port(q())),
            ("example.org::443", Port(q())),
            ("example.org:443:443", Port(q())),
            ("::1", Port(q())),
            ("bücher.example", NotAscii(q())),
            ("ｅxample.org", NotAscii(q())),
            ("example。org", NotAscii(q())),
            ("0x7f.1", Notation(q())),
            ("0x7f.0x1", Notation(q())),
            ("0X7F000001", Notation(q())),
            ("017700000001", Notation(q())),
            ("0177.0.0.01", Notation(q())),
            ("2130706433", Notation(q())),
            ("127.1", Notation(q())),
            ("127.0.1", Notation(q())),
            ("127.0.0.1.", Notation(q())),
            ("127.0.0.01", Notation(q())),
            ("127.0.0.256", Notation(q())),
            ("1.2.3.4.5", Notation(q())),
            ("example.0x", Notation(q())),
            ("example.123", Notation(q())),
            ("[::1", Brackets(q())),
            ("[]", Brackets(q())),
            ("[127.0.0.1]", Brackets(q())),
            ("[example.org]", Brackets(q())),
            ("[::1]evil.example", Brackets(q())),
            ("[fe80::1%eth0]", Zone(q())),
            ("[fe80::1%25eth0]:80", Zone(q())),
            ("::1]", Name(q())),
            ("exa%6dple.org", Name(q())),
            ("exa mple.org", Name(q())),
            ("example.org/", Name(q())),
            ("example.org#", Name(q())),
            ("example.org\\.evil.example", Name(q())),
            ("example.org\r\nHost: evil", Port(q())),
            ("-a.example", Name(q())),
            ("*.example.org", Name(q())),
            (&long, Name(q())),
            (&longer, Name(q())),
            (&longest, TooLong(0)),
        ] {
            let denied = Origin::parse(Scheme::Https, authority).unwrap_err();
            assert!(same(&denied, &wanted), "{authority:?}: {denied:?}");
        }
        for uri in ["ftp://example.org", "/only/a/path", "example.org:443", "*"] {
            assert_eq!(Origin::of(&uri.parse().unwrap()), Err(Denied::Scheme), "{uri}");
        }
    }

    #[test]
    fn a_denial_fits_on_a_line_whatever_the_guest_wrote() {
        let denied = Origin::parse(Scheme::Https, "a\n\u{1b}[2Jb").unwrap_err().to_string();
        assert!(denied.contains("\"a\\n\\u{1b}[2Jb\""), "{denied}");
        let denied = Origin::parse(Scheme::Https, &"ü".repeat(9999)).unwrap_err().to_string();
        assert!(denied.len() < 700, "{}", denied.len());
    }

    #[test]
    fn the_host_header_leaves_out_only_the_schemes_own_port() {
        for (uri, host) in [
            ("https://Example.org.:443/", "example.org"),
            ("http://example.org:443/", "example.org:443"),
            ("http://[2001:DB8::1]:8080/", "[2001:db8::1]:8080"),
        ] {
            assert_eq!(Origin::of(&uri.parse().unwrap()).unwrap().authority(), host);
        }
    }

    #[test]
    fn only_listed_names_are_looked_up() {
        let hosts = [Host::parse("*.example.org").unwrap(), Host::parse("192.0.2.1").unwrap()];
        assert_eq!(name(&hosts, "DB.example.org."), Ok("db.example.org".into()));
        for other in ["example.org", "192.0.2.1", "[::1]", "db.example.com", ""] {
            assert!(name(&hosts, other).is_err(), "{other}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_origin_or_told_why_not(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            crate::fuzz::site(&bytes);
        }

        #[test]
        fn near_misses_are_no_hits(
            text in "(https?://)?[a-z0-9@.:\\[\\]xX%-]{0,12}(\\*?\\.)?(Example\\.ORG|example\\.org)?\\.?(:[0-9]{0,6})?",
        ) {
            crate::fuzz::site(text.as_bytes());
        }

        #[test]
        fn an_origin_reads_back_as_itself(
            text in "[a-zA-Z0-9.-]{1,30}(:[0-9]{1,5})?|\\[[0-9a-f:]{2,20}\\](:[0-9]{1,5})?",
        ) {
            for scheme in [Scheme::Http, Scheme::Https] {
                if let Ok(origin) = Origin::parse(scheme, &text) {
                    prop_assert_eq!(Origin::parse(scheme, &origin.authority()), Ok(origin));
                }
            }
        }
    }
}
