//! Which socket addresses `net.tcp` and `net.udp` may use.
//!
//! A guest connects to addresses, but its allowlist names hosts. So an instance's own look-ups are remembered: an
//! address may be used if a name that an entry covers was found to be there, by this instance, a short while ago in
//! terms of look-ups. A literal address in the list needs no look-up.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use gaia_manifest::Endpoint;

use crate::address;
use crate::site::{Denied, Peer};

/// Names that are remembered for an instance. With [`ADDRESSES`] of the longest names this is about 50 KiB.
const NAMES: usize = 64;
/// Addresses that are remembered of a name.
const ADDRESSES: usize = crate::resolve::MAX_ADDRESSES;

/// What an instance has looked up: the last names, and the addresses last seen for them.
#[derive(Debug, Default)]
pub struct Seen {
    names: VecDeque<(String, Vec<IpAddr>)>,
}

impl Seen {
    /// Remembers a look-up's whole answer in place of the last one for that name; the name longest ago is forgotten.
    /// `name` is in the form that [`crate::site::name`] returns.
    pub fn record(&mut self, name: &str, addresses: &[IpAddr]) {
        self.names.retain(|(known, _)| known != name);
        if self.names.len() == NAMES {
            self.names.pop_front();
        }
        self.names.push_back((name.to_owned(), addresses.iter().copied().take(ADDRESSES).collect()));
    }

    fn names_of(&self, address: IpAddr) -> impl Iterator<Item = &str> {
        self.names.iter().filter(move |(_, all)| all.contains(&address)).map(|(name, _)| name.as_str())
    }
}

/// Whether an instance may use a socket address, by the allowlist of its grant and what it has looked up.
///
/// # Errors
/// What it is refused for.
///
/// ```
/// use gaia_egress::endpoint::{Seen, check};
/// let listed = [gaia_manifest::Endpoint::parse("db.example.org:5432").unwrap()];
/// let mut seen = Seen::default();
/// let there = "9.9.9.9:5432".parse().unwrap();
/// assert!(check(&listed, &seen, there).is_err());
/// seen.record("db.example.org", &["9.9.9.9".parse().unwrap()]);
/// assert!(check(&listed, &seen, there).is_ok());
/// ```
pub fn check(listed: &[Endpoint], seen: &Seen, socket: SocketAddr) -> Result<(), Denied> {
    let address = socket.ip();
    if let SocketAddr::V6(v6) = socket
        && v6.scope_id() != 0
    {
        return Err(Denied::NotSeen(socket));
    }
    let literal = Peer::Address(address).listed();
    if listed.iter().any(|entry| entry.covers(&literal, socket.port())) {
        return Ok(());
    }
    let covered = |name: &&str| listed.iter().any(|entry| entry.covers(name, socket.port()));
    let name = seen.names_of(address).find(covered).ok_or(Denied::NotSeen(socket))?;
    match address::refused(address) {
        None => Ok(()),
        Some(reason) => Err(Denied::Address { host: name.to_owned(), address, reason }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_used_if_it_is_listed_or_was_looked_up() {
        let listed: Vec<Endpoint> = ["db.example.org:5432", "*.cache.example:6379", "10.0.0.7:25", "[fd00::1]:25"]
            .map(|e| Endpoint::parse(e).unwrap())
            .into();
        let mut seen = Seen::default();
        seen.record("db.example.org", &[ip("9.9.9.9"), ip("2620:fe::fe"), ip("10.0.0.8"), ip("::ffff:9.9.9.9")]);
        seen.record("a.cache.example", &[ip("9.9.9.10")]);
        seen.record("other.example", &[ip("9.9.9.11")]);
        for (socket, allowed) in [
            ("9.9.9.9:5432", true),
            ("[2620:fe::fe]:5432", true),
            ("[2620:fe::fe%3]:5432", false),
            ("9.9.9.9:5433", false),
            ("9.9.9.9:6379", false),
            ("9.9.9.10:6379", true),
            ("9.9.9.11:5432", false),
            ("9.9.9.12:5432", false),
            ("10.0.0.7:25", true),
            ("10.0.0.7:26", false),
            ("10.0.0.8:5432", false),
            ("[fd00::1]:25", true),
            ("[::ffff:9.9.9.9]:5432", false),
            ("[::ffff:10.0.0.7]:25", false),
        ] {
            let verdict = check(&listed, &seen, socket.parse().unwrap());
            assert_eq!(verdict.is_ok(), allowed, "{socket}: {verdict:?}");
        }
        let denied = check(&listed, &seen, "10.0.0.8:5432".parse().unwrap()).unwrap_err();
        assert_eq!(denied.to_string(), "db.example.org is at 10.0.0.8: private");
    }

    #[test]
    fn a_new_answer_takes_the_place_of_the_old_one() {
        let listed = [Endpoint::parse("db.example.org:1").unwrap()];
        let mut seen = Seen::default();
        seen.record("db.example.org", &[ip("9.9.9.9")]);
        seen.record("db.example.org", &[ip("9.9.9.10")]);
        assert!(check(&listed, &seen, "9.9.9.9:1".parse().unwrap()).is_err());
        assert!(check(&listed, &seen, "9.9.9.10:1".parse().unwrap()).is_ok());
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_the_last_look_up_always_counts(
            names in proptest::collection::vec((0..200_u32, 0..40_u8), 1..300),
        ) {
            let mut seen = Seen::default();
            for (name, count) in &names {
                let all: Vec<IpAddr> = (0..*count).map(|n| IpAddr::from([9, 9, 9, n])).collect();
                seen.record(&format!("n{name}.example"), &all);
                prop_assert!(seen.names.len() <= NAMES);
                prop_assert!(seen.names.iter().all(|(_, all)| all.len() <= ADDRESSES));
            }
            let (last, count) = names.last().unwrap();
            let listed = [Endpoint::parse(&format!("n{last}.example:1")).unwrap()];
            prop_assert_eq!(check(&listed, &seen, "9.9.9.0:1".parse().unwrap()).is_ok(), *count > 0);
        }
    }
}
