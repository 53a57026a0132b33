//! From a request's host and path to its brane.

use std::rc::Rc;

use super::brane::Brane;

/// The brane for this host (lower case, no port) and path: one that names the host before one that takes any, then the
/// longest path.
#[must_use]
pub fn find(branes: &[Rc<Brane>], host: &str, path: &str) -> Option<Rc<Brane>> {
    let of = |brane: &Rc<Brane>| rank(brane.plan.host.as_deref(), &brane.plan.path, host, path);
    branes.iter().filter_map(|b| of(b).map(|rank| (rank, b))).max_by_key(|(rank, _)| *rank).map(|(_, b)| Rc::clone(b))
}

/// How well a route fits, or `None` if it does not: whether it names the host, then how long its path is.
fn rank(route_host: Option<&str>, route_path: &str, host: &str, path: &str) -> Option<(bool, usize)> {
    if route_host.is_some_and(|h| h != host) {
        return None;
    }
    let prefix = route_path.trim_end_matches('/');
    let rest = path.strip_prefix(prefix)?;
    (rest.is_empty() || rest.starts_with('/')).then_some((route_host.is_some(), prefix.len()))
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
        let named = rank(Some("x.org"), "/a", "x.org", "/a/b/c").unwrap();
        assert!(any < longer && longer < named);
        assert_eq!(rank(Some("y.org"), "/a", "x.org", "/a"), None);
    }
}
