//! Entries of allowlists: what is read prints as it would be read again, and covers what it says and nothing else.

#![no_main]
#![allow(clippy::panic, reason = "a panic is what a fuzz target reports with")]

use gaia_manifest::{Endpoint, Host, Site};
use libfuzzer_sys::fuzz_target;

// A line break parts an entry from the host that is asked for.
fuzz_target!(|text: &str| {
    let (entry, asked) = text.split_once('\n').unwrap_or((text, "api.example.org"));
    if let Ok(host) = Host::parse(entry) {
        assert_eq!(Host::parse(&host.to_string()).as_ref(), Ok(&host), "{host} is read as another host");
        covers(&host, asked);
    }
    if let Ok(site) = Site::parse(entry) {
        assert_eq!(Site::parse(&site.to_string()).as_ref(), Ok(&site), "{site} is read as another site");
        assert_ne!(site.port, Some(0));
        covers(&site.host, asked);
    }
    if let Ok(endpoint) = Endpoint::parse(entry) {
        assert_eq!(Endpoint::parse(&endpoint.to_string()).as_ref(), Ok(&endpoint), "{endpoint} is read as another");
        assert_ne!(endpoint.port, 0);
        covers(&endpoint.host, asked);
        let site = Site::parse(entry);
        assert_eq!(
            site.map(|site| (site.host, site.port)),
            Ok((endpoint.host, Some(endpoint.port))),
            "an endpoint names the site that it would be for net.http"
        );
    }
});

/// The rule again, in other words than the code's: a star needs at least one more label, and all that is left must be equal.
fn covers(host: &Host, asked: &str) {
    match host {
        Host::Exact(name) => {
            assert!(host.covers(name), "{host} does not cover itself");
            assert_eq!(host.covers(asked), asked == name, "{host} and {asked:?}");
        }
        Host::Under(name) => {
            assert!(!host.covers(name), "{host} covers its apex");
            assert!(host.covers(&format!("x.{name}")), "{host} does not cover a host under it");
            assert!(!host.covers(&format!("x{name}")), "{host} covers a neighbour");
            let under = asked.len() > name.len() + 1 && asked.ends_with(&format!(".{name}"));
            assert_eq!(host.covers(asked), under, "{host} and {asked:?}");
        }
    }
}
