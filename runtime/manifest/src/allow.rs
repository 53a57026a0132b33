//! Hosts as a manifest names them: in an ingress, and in the allowlists of the network capabilities.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A host, or all hosts under one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Host {
    /// This host alone. Lower case, without a final dot.
    Exact(String),
    /// Every host under this one, at any depth, but not it itself.
    Under(String),
}

impl Host {
    /// Parses `api.example.org`, `*.example.org`, or an address.
    ///
    /// # Errors
    /// What is wrong with it.
    ///
    /// ```
    /// use gaia_manifest::Host;
    /// assert_eq!(Host::parse("*.Crossref.org"), Ok(Host::Under("crossref.org".into())));
    /// assert!(Host::parse("*").is_err());
    /// ```
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("*.") {
            Some(rest) => name(rest).map(Self::Under),
            None if text == "*" => {
                Err("a star stands for hosts under a name, as in \"*.example.org\"; for every host there is no entry"
                    .into())
            }
            None => address(text).map_or_else(|| name(text), Ok).map(Self::Exact),
        }
    }

    /// Whether it covers `host`, which is lower case and has no final dot.
    #[must_use]
    pub fn covers(&self, host: &str) -> bool {
        match self {
            Self::Exact(name) => name == host,
            Self::Under(name) => {
                host.strip_suffix(name.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Under(name) => write!(f, "*.{name}"),
        }
    }
}

/// An address in its usual form: IPv4 with four decimal numbers, IPv6 with or without brackets.
fn address(text: &str) -> Option<String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    bare.parse::<std::net::IpAddr>().ok().map(|a| a.to_string())
}

/// A host name: labels of letters, digits and hyphens, 63 bytes each, 253 in all (RFC 1123).
fn name(text: &str) -> Result<String, String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.contains(['/', '@', '?', '#']) {
        return Err("a host alone: no user, no path".into());
    }
    if text.contains(':') {
        return Err("a host alone: no port here".into());
    }
    if !text.is_ascii() {
        return Err("write an international name in its ASCII form, as in \"xn--bcher-kva.example\"".into());
    }
    if text.contains('*') {
        return Err("a star stands alone and in front, as in \"*.example.org\"".into());
    }
    let label = |l: &str| {
        let inside = l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        inside && (1..=63).contains(&l.len()) && !l.starts_with('-') && !l.ends_with('-')
    };
    if text.len() > 253 || !text.split('.').all(label) {
        return Err("not a host name: labels of letters, digits and hyphens with dots between them".into());
    }
    if text.split('.').next_back().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit())) {
        return Err("not an address: four decimal numbers from 0 to 255, as in \"192.0.2.7\"".into());
    }
    Ok(text.to_ascii_lowercase())
}

/// An entry of `net.http`'s allowlist.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Site {
    /// `http` or `https`; both if not said.
    pub scheme: Option<Scheme>,
    /// Which hosts.
    pub host: Host,
    /// Which port; the scheme's own (80, 443) if not said.
    pub port: Option<u16>,
}

/// A scheme of `net.http`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// In the clear, port 80.
    Http,
    /// TLS, port 443.
    Https,
}

impl Scheme {
    /// 80 or 443.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Https => "https",
        })
    }
}

impl Site {
    /// Parses `[scheme://]host[:port]`.
    ///
    /// # Errors
    /// What is wrong with it.
    ///
    /// ```
    /// use gaia_manifest::{Host, Scheme, Site};
    /// let site = Site::parse("https://*.example.org:8443").unwrap();
    /// assert_eq!((site.scheme, site.port), (Some(Scheme::Https), Some(8443)));
    /// ```
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = match text.split_once("://") {
            Some(("http", rest)) => (Some(Scheme::Http), rest),
            Some(("https", rest)) => (Some(Scheme::Https), rest),
            Some((other, _)) => return Err(format!("\"{other}\" is no scheme of net.http: http or https")),
            None => (None, text),
        };
        if rest.contains(['/', '?', '#']) {
            return Err("an entry names a host, not a path: \"api.example.org\"".into());
        }
        let (host, port) = host_and_port(rest)?;
        Ok(Self { scheme, host: Host::parse(host)?, port })
    }

    /// Whether it covers `host`, as for [`Host::covers`], at `port` by `scheme`.
    ///
    /// ```
    /// use gaia_manifest::{Scheme, Site};
    /// let site = Site::parse("*.example.org").unwrap();
    /// assert!(site.covers(Scheme::Http, "api.example.org", 80));
    /// assert!(!site.covers(Scheme::Http, "api.example.org", 443));
    /// ```
    #[must_use]
    pub fn covers(&self, scheme: Scheme, host: &str, port: u16) -> bool {
        self.scheme.is_none_or(|own| own == scheme)
            && self.port.unwrap_or_else(|| scheme.default_port()) == port
            && self.host.covers(host)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scheme) = self.scheme {
            write!(f, "{scheme}://")?;
        }
        fmt_host_port(f, &self.host, self.port)
    }
}

/// An entry of `net.tcp`'s and `net.udp`'s allowlists: the port is a must.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint {
    /// Which hosts.
    pub host: Host,
    /// Which port.
    pub port: u16,
}

impl Endpoint {
    /// Parses `host:port`.
    ///
    /// # Errors
    /// What is wrong with it.
    ///
    /// ```
    /// assert!(gaia_manifest::Endpoint::parse("db.example.org").is_err());
    /// ```
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return Err("no scheme here: host:port, as in \"db.example.org:5432\"".into());
        }
        match host_and_port(text)? {
            (host, Some(port)) => Ok(Self { host: Host::parse(host)?, port }),
            (_, None) => Err("the port is missing: host:port, as in \"db.example.org:5432\"".into()),
        }
    }

    /// Whether it covers `host`, as for [`Host::covers`], at `port`.
    #[must_use]
    pub fn covers(&self, host: &str, port: u16) -> bool {
        self.port == port && self.host.covers(host)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_host_port(f, &self.host, Some(self.port))
    }
}

/// Between processes they travel as a manifest writes them.
macro_rules! as_text {
    ($($kind:ident)*) => {$(
        impl From<$kind> for String {
            fn from(entry: $kind) -> Self {
                entry.to_string()
            }
        }
        impl TryFrom<String> for $kind {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                Self::parse(&text)
            }
        }
    )*};
}
as_text!(Host Site Endpoint);

fn fmt_host_port(f: &mut fmt::Formatter<'_>, host: &Host, port: Option<u16>) -> fmt::Result {
    match host {
        Host::Exact(name) if name.contains(':') => write!(f, "[{name}]")?,
        host => write!(f, "{host}")?,
    }
    port.map_or(Ok(()), |port| write!(f, ":{port}"))
}

/// Parts a port from what stands before it; an IPv6 address needs brackets for that.
fn host_and_port(text: &str) -> Result<(&str, Option<u16>), String> {
    let behind = text.rfind(']').map_or(0, |i| i + 1);
    let colon = text.get(behind..).and_then(|rest| rest.find(':')).map(|i| i + behind);
    match colon {
        // Several colons and no brackets: an IPv6 address on its own.
        Some(_) if behind == 0 && text.matches(':').count() > 1 => Ok((text, None)),
        Some(i) => {
            let behind = text.get(i + 1..).unwrap_or_default();
            let number = port(behind).ok_or_else(|| format!("\"{behind}\" is not a port: 1 to 65535"))?;
            Ok((text.get(..i).unwrap_or_default(), Some(number)))
        }
        None => Ok((text, None)),
    }
}

/// A port, in digits.
pub(crate) fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port > 0 && !text.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_star_covers_what_is_under_a_name_and_not_the_name() {
        let host = Host::parse("*.crossref.org").unwrap();
        for (name, covered) in [
            ("api.crossref.org", true),
            ("a.b.crossref.org", true),
            ("crossref.org", false),
            (".crossref.org", false),
            ("evilcrossref.org", false),
            ("api.crossref.org.evil.example", false),
        ] {
            assert_eq!(host.covers(name), covered, "{name}");
        }
    }

    #[test]
    fn a_site_without_a_port_means_its_schemes_own() {
        use Scheme::{Http, Https};
        for (site, scheme, port, covered) in [
            ("example.org", Https, 443, true),
            ("example.org", Http, 80, true),
            ("example.org", Http, 443, false),
            ("example.org", Https, 80, false),
            ("example.org", Https, 8443, false),
            ("https://example.org", Https, 443, true),
            ("https://example.org", Http, 80, false),
            ("https://example.org", Http, 443, false),
            ("example.org:8443", Https, 8443, true),
            ("example.org:8443", Http, 8443, true),
            ("example.org:8443", Https, 443, false),
            ("http://example.org:8080", Http, 8080, true),
            ("http://example.org:8080", Https, 8080, false),
            ("http://example.org:8080", Http, 80, false),
        ] {
            let covers = Site::parse(site).unwrap().covers(scheme, "example.org", port);
            assert_eq!(covers, covered, "{site}: {scheme} {port}");
        }
        let endpoint = Endpoint::parse("*.example.org:5432").unwrap();
        assert!(endpoint.covers("db.example.org", 5432));
        assert!(!endpoint.covers("db.example.org", 5433));
        assert!(!endpoint.covers("example.org", 5432));
    }

    #[test]
    fn sites_and_endpoints_say_what_is_wrong() {
        for (text, wanted) in [
            ("https://api.example.org/path", "not a path"),
            ("ftp://example.org", "no scheme"),
            ("user@example.org", "no user"),
            ("example.org:0", "not a port"),
            ("example.org:+80", "not a port"),
            ("a*.example.org", "star"),
            ("*", "star"),
            ("192.0.2.300", "not an address"),
            ("bücher.example", "ASCII form"),
            ("exa mple.org", "not a host name"),
            ("", "not a host name"),
        ] {
            let error = Site::parse(text).unwrap_err();
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
        assert!(Endpoint::parse("tcp://a:1").unwrap_err().contains("no scheme"));
        assert_eq!(Endpoint::parse("[2001:db8::1]:53").unwrap().to_string(), "[2001:db8::1]:53");
        assert_eq!(Site::parse("API.Example.org.").unwrap().to_string(), "api.example.org");
    }

    proptest! {
        #[test]
        fn any_text_is_an_entry_or_told_why_not(text in "\\PC{0,30}|(https?://)?(\\*\\.)?[a-z0-9.\\[\\]:-]{0,20}(:[0-9]{0,6})?") {
            if let Ok(site) = Site::parse(&text) {
                prop_assert_eq!(Site::parse(&site.to_string()), Ok(site));
            }
            let _ = Endpoint::parse(&text);
        }

        #[test]
        fn nothing_outside_is_covered(under in "[a-z]{1,5}\\.[a-z]{1,3}", host in "[a-z.]{0,20}") {
            let entry = Host::Under(under.clone());
            let really = host.ends_with(&format!(".{under}")) && host.len() > under.len() + 1;
            prop_assert_eq!(entry.covers(&host), really);
        }
    }
}
