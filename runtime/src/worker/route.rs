//! From a request's host and path to its brane.

use std::rc::Rc;

use gaia_manifest::Host;

use super::brane::Brane;
use super::pinned::Pinned;

/// Where a request goes.
pub enum Target {
    /// To a brane that runs here.
    Here(Rc<Brane>),
    /// To a keeper.
    Kept(Rc<Pinned>),
}

/// The brane for this host (lower case, no port) and path: one that names the host before one that takes any, then the
/// longest path.
#[must_use]
pub fn find(branes: &[Rc<Brane>], pinned: &[Rc<Pinned>], host: &str, path: &str) -> Option<Target> {
    let here = branes.iter().filter_map(|b| Some((rank(b.host.as_ref(), &b.plan.path, host, path)?, b)));
    let here = here.max_by_key(|(rank, _)| *rank);
    let kept = pinned.iter().filter_map(|b| Some((rank(b.host.as_ref(), &b.plan.path, host, path)?, b)));
    match (here, kept.max_by_key(|(rank, _)| *rank)) {
        (Some((rank, brane)), kept) if kept.is_none_or(|(other, _)| other < rank) => {
            Some(Target::Here(Rc::clone(brane)))
        }
        (_, kept) => kept.map(|(_, brane)| Target::Kept(Rc::clone(brane))),
    }
}

/// How well a route fits, or `None` if it does not: how closely it names the host (exactly, by the longest name it is under,
/// not at all), then how long its path is.
fn rank(route_host: Option<&Host>, route_path: &str, host: &str, path: &str) -> Option<(usize, usize)> {
    if !route_host.is_none_or(|route| route.covers(host)) {
        return None;
    }
    let closeness = match route_host {
        None => 0,
        Some(Host::Under(name)) => name.len(),
        Some(Host::Exact(_)) => usize::MAX,
    };
    let prefix = route_path.trim_end_matches('/');
    let rest = path.strip_prefix(prefix)?;
    (rest.is_empty() || rest.starts_with('/')).then_some((closeness, prefix.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_match_on_segment_boundaries() {
        for (route, path, fits) in [
            ("/fetch", "/fetch", true),
            ("/fetch", "/fetch/", true),
            ("/fetch", "/fetch/works", true),
            ("/fetch/", "/fetch", true),
            ("/fetch", "/fetched", false),
            ("/fetch", "/", false),
            ("/", "/anything", true),
            ("/", "*", false),
        ] {
            assert_eq!(rank(None, route, "h", path).is_some(), fits, "{route} and {path}");
        }
    }

    #[test]
    fn a_named_host_wins_then_the_longest_path() {
        let any = rank(None, "/a/b", "x.org", "/a/b/c").unwrap();
        let longer = rank(None, "/a/b/c", "x.org", "/a/b/c").unwrap();
        let host = |text: &str| Host::parse(text).unwrap();
        let under = rank(Some(&host("*.org")), "/a", "x.org", "/a/b/c").unwrap();
        let named = rank(Some(&host("x.org")), "/a", "x.org", "/a/b/c").unwrap();
        assert!(any < longer && longer < under && under < named);
        assert_eq!(rank(Some(&host("y.org")), "/a", "x.org", "/a"), None);
        assert_eq!(rank(Some(&host("*.x.org")), "/a", "x.org", "/a"), None, "not the name itself");
    }
}
