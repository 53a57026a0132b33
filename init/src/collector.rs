//! Where the log is sent: the address of a syslog collector, as `gaia.toml` and `gaia run --log-export` write it.
//!
//! Read by init, which tells the operator what is wrong with it, and again by control, which connects.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::Deserialize;

/// The longest host name (RFC 1035 2.3.4, without the final dot).
const MAX_NAME: usize = 253;

/// A collector that takes RFC 5424 messages, each with its length before it (RFC 6587 3.4.1).
///
/// ```
/// use gaia_init::collector::Collector;
/// let collector: Collector = "syslog+tls://logs.example.org".parse().unwrap();
/// assert_eq!((collector.tls, collector.host.as_str(), collector.port), (true, "logs.example.org", 6514));
/// assert_eq!(collector.to_string(), "syslog+tls://logs.example.org:6514");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Collector {
    /// Over TLS (RFC 5425).
    pub tls: bool,
    /// A name, in lower case, or an address without brackets.
    pub host: String,
    /// The TCP port: 6514 over TLS, 601 without it, unless it says another.
    pub port: u16,
}

impl Collector {
    /// Its address, if it is not named.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "syslog+tls" } else { "syslog+tcp" };
        match self.address() {
            Some(IpAddr::V6(address)) => write!(f, "{scheme}://[{address}]:{}", self.port),
            _ => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for Collector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(300).collect();
        let wrong =
            |why: &str| format!("{shown:?} is no collector, such as \"syslog+tls://logs.example.org:6514\": {why}");
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong("there is no \"://\" in it"))?;
        let (tls, usual) = match scheme {
            "syslog+tls" => (true, 6514),
            "syslog+tcp" => (false, 601),
            _ => return Err(wrong("the schemes are syslog+tls and syslog+tcp")),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(inner) => {
                let (address, after) = inner.split_once(']').ok_or_else(|| wrong("a bracket is not closed"))?;
                let address: Ipv6Addr = address.parse().map_err(|_| wrong("in brackets stands an IPv6 address"))?;
                let port = after.strip_prefix(':').or(after.is_empty().then_some(""));
                (address.to_string(), port.ok_or_else(|| wrong("behind the brackets stands :PORT"))?)
            }
            None => {
                let (host, port) = rest.split_once(':').unwrap_or((rest, ""));
                (
                    named(host)
                        .ok_or_else(|| wrong("it needs a host: a name, or an address, an IPv6 one in brackets"))?,
                    port,
                )
            }
        };
        if rest.ends_with(':') {
            return Err(wrong("a port is missing"));
        }
        let port = match port {
            "" => usual,
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().unwrap_or(0),
            _ => 0,
        };
        if port == 0 {
            return Err(wrong("a port is a number from 1 to 65535"));
        }
        Ok(Self { tls, host, port })
    }
}

/// A host name or an IPv4 address.
fn named(host: &str) -> Option<String> {
    let name = host.strip_suffix('.').unwrap_or(host);
    let label = |label: &str| {
        let inside = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        (1..=63).contains(&label.len()) && inside && !label.starts_with('-') && !label.ends_with('-')
    };
    // What ends in a number is an address, or no name at all.
    let number = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    let address = number && name.parse::<std::net::Ipv4Addr>().is_err();
    (name.len() <= MAX_NAME && name.split('.').all(label) && !address).then(|| name.to_ascii_lowercase())
}

impl TryFrom<String> for Collector {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_collector_is_read_as_it_is_written() {
        for (text, wanted) in [
            ("syslog+tls://Collector.Example.", "syslog+tls://collector.example:6514"),
            ("syslog+tcp://192.0.2.7", "syslog+tcp://192.0.2.7:601"),
            ("syslog+tcp://192.0.2.7:514/", "syslog+tcp://192.0.2.7:514"),
            ("syslog+tls://[2001:db8::7]", "syslog+tls://[2001:db8::7]:6514"),
            ("syslog+tls://[::1]:9", "syslog+tls://[::1]:9"),
            ("syslog+tls://loghost:10514", "syslog+tls://loghost:10514"),
        ] {
            assert_eq!(text.parse::<Collector>().unwrap().to_string(), wanted);
        }
    }

    #[test]
    fn what_is_none_is_told_why() {
        for (text, wanted) in [
            ("", "://"),
            ("loghost:514", "://"),
            ("syslog://loghost", "the schemes are"),
            ("syslog+udp://loghost", "the schemes are"),
            ("https://loghost", "the schemes are"),
            ("syslog+tls://", "needs a host"),
            ("syslog+tls://a b", "needs a host"),
            ("syslog+tls://user@host", "needs a host"),
            ("syslog+tls://host/path", "needs a host"),
            ("syslog+tls://1.2.3", "needs a host"),
            ("syslog+tls://2001:db8::7", "in brackets"),
            ("syslog+tls://[::1", "not closed"),
            ("syslog+tls://[1.2.3.4]", "IPv6"),
            ("syslog+tls://[::1]x", ":PORT"),
            ("syslog+tls://host:", "missing"),
            ("syslog+tls://host:0", "from 1 to 65535"),
            ("syslog+tls://host:+1", "from 1 to 65535"),
            ("syslog+tls://host:65536", "from 1 to 65535"),
        ] {
            let error = text.parse::<Collector>().unwrap_err();
            assert!(error.contains(wanted) && error.contains("logs.example.org"), "{text:?} gave {error:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_collector_or_is_told_why_not(
            text in "\\PC{0,40}|syslog\\+(tls|tcp)://(\\[[0-9a-f:]{0,12}\\]|[a-zA-Z0-9._-]{0,20})(:[0-9]{0,6})?/?"
        ) {
            if let Ok(collector) = text.parse::<Collector>() {
                prop_assert_eq!(collector.to_string().parse::<Collector>().unwrap(), collector);
            }
        }
    }
}
