//! What any bytes from outside must leave true. Called by property tests, and by a fuzzer with bytes of its choice.

use gaia_manifest::{Host, Scheme, Site};
use http::Uri;

use crate::resolve;
use crate::site::{Origin, Peer, entry};

/// Reads any bytes as a request's address and as a host with a port: no panic, and what an allowlist lets through is
/// really covered by an entry of it, judged by the text of the origin alone.
///
/// # Panics
/// If it is not.
pub fn site(bytes: &[u8]) {
    let entries = ["example.org", "https://*.example.org", "http://a.example.org:8080", "10.0.0.1", "[::1]:1"];
    let sites: Vec<Site> = entries.iter().filter_map(|e| Site::parse(e).ok()).collect();
    assert_eq!(sites.len(), entries.len());
    let text = String::from_utf8_lossy(bytes);
    let uri = text.parse::<Uri>().ok().map(|uri| Origin::of(&uri));
    let read = [Scheme::Http, Scheme::Https].map(|scheme| Origin::parse(scheme, &text));
    for origin in uri.into_iter().chain(read) {
        let origin = match origin {
            Ok(origin) => origin,
            Err(denied) => {
                assert!(!denied.to_string().contains(|c: char| c.is_control()), "{denied:?}");
                continue;
            }
        };
        if let Peer::Name(name) = origin.host() {
            assert!(name.parse::<std::net::IpAddr>().is_err(), "{name} is an address");
            assert!(name.bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase()), "{name:?}");
        }
        let text = origin.to_string();
        let covered = match text.split_once("://") {
            Some((_, "example.org" | "10.0.0.1" | "[::1]:1") | ("http", "a.example.org:8080")) => true,
            Some(("https", host)) => host.strip_suffix(".example.org").is_some_and(|under| !under.contains(':')),
            _ => false,
        };
        assert_eq!(entry(&sites, &origin).is_ok(), covered, "{text}");
        assert_eq!(Origin::parse(origin.scheme(), &origin.authority()).as_ref(), Ok(&origin));
    }
    let _ = Host::parse(&text);
}

/// Reads any bytes as a name server's answer: no panic, and never more addresses than the bound.
///
/// # Panics
/// If there are more.
pub fn answer(bytes: &[u8]) {
    for family in [resolve::Family::V4, resolve::Family::V6] {
        if let Ok(answer) = resolve::read(bytes, family) {
            assert!((1..=resolve::MAX_ADDRESSES).contains(&answer.addresses.len()));
            assert!(answer.addresses.iter().all(|a| a.is_ipv4() == (family == resolve::Family::V4)));
        }
    }
}
