//! How the machine reaches a network, and how the host reaches the machine.

use crate::error::Error;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// The machine's one network card is wired to this.
///
/// ```
/// use gaia_qemu::{Forward, Net, UserNet};
/// let net = Net::User(UserNet { forwards: vec![Forward { host: 8080, guest: 80 }], ..UserNet::default() });
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Net {
    /// No card at all.
    None,
    /// QEMU's user-mode network: DHCP at 10.0.2.2 and the guest is 10.0.2.15 unless another is named; no root needed.
    User(UserNet),
}

/// QEMU's user-mode network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNet {
    /// Ports of the host's loopback that lead into the guest.
    pub forwards: Vec<Forward>,
    /// The guest reaches nothing outside, neither the host nor any network. Forwards still work, and so do
    /// their answers. On unless switched off.
    pub restrict: bool,
    /// The network's own address and the length of its prefix. The second address in it is the gateway's, which leads to the
    /// loopback of this machine, the fifteenth the guest's. 10.0.2.0/24 unless named.
    pub network: (Ipv4Addr, u8),
}

impl Default for UserNet {
    fn default() -> Self {
        Self { forwards: Vec::new(), restrict: true, network: (Ipv4Addr::new(10, 0, 2, 0), 24) }
    }
}

/// A TCP port of 127.0.0.1 that leads to a port of the guest.
///
/// ```
/// use gaia_qemu::Forward;
/// assert_eq!("8080:80".parse::<Forward>().unwrap(), Forward { host: 8080, guest: 80 });
/// assert_eq!(Forward::to(80).to_string(), "0:80");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// The host's port; 0 lets the kernel pick a free one when QEMU binds it, so that nothing can take it in between.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl Forward {
    /// A free port of the host, found when the machine boots, to this port of the guest.
    #[must_use]
    pub const fn to(guest: u16) -> Self {
        Self { host: 0, guest }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.guest)
    }
}

impl FromStr for Forward {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        let port =
            |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u16>().ok()).flatten();
        word.split_once(':')
            .and_then(|(host, guest)| Some(Self { host: port(host)?, guest: port(guest).filter(|&p| p != 0)? }))
            .ok_or_else(|| Error::ForwardWord { word: word.to_owned() })
    }
}

impl Net {
    /// QEMU's arguments for this network and its card.
    pub(crate) fn argv(&self) -> Vec<String> {
        match self {
            Self::None => vec!["-nic".into(), "none".into()],
            Self::User(user) => {
                let mut netdev = vec!["user".to_owned(), "id=net0".to_owned()];
                netdev.push(format!("restrict={}", if user.restrict { "on" } else { "off" }));
                if user.network != UserNet::default().network {
                    netdev.push(format!("net={}/{}", user.network.0, user.network.1));
                }
                let rule = |forward: &Forward| format!("hostfwd=tcp:127.0.0.1:{}-:{}", forward.host, forward.guest);
                netdev.extend(user.forwards.iter().map(rule));
                // No option ROM: nothing boots from the network, and loading it costs time.
                let card = "virtio-net-pci,netdev=net0,romfile=".to_owned();
                vec!["-netdev".into(), netdev.join(","), "-device".into(), card]
            }
        }
    }

    pub(crate) fn forwards(&self) -> &[Forward] {
        match self {
            Self::None => &[],
            Self::User(user) => &user.forwards,
        }
    }
}

/// The forwards with the ports QEMU has really bound, from its `info usernet`. A fixed port is kept as asked.
pub(crate) fn bound(asked: &[Forward], listing: &str) -> Result<Vec<Forward>, Error> {
    let mut listed = listed(listing);
    listed.retain(|bound| !asked.contains(bound));
    let mut resolve = |forward: &Forward| {
        if forward.host != 0 {
            return Ok(*forward);
        }
        let at = listed.iter().position(|bound| bound.guest == forward.guest);
        at.map(|at| listed.remove(at))
            .ok_or_else(|| Error::ForwardMissing { forward: *forward, listing: listing.to_owned() })
    };
    asked.iter().map(&mut resolve).collect()
}

/// `TCP[HOST_FORWARD]   8       127.0.0.1 37339       10.0.2.15  8080     0     0`, as QEMU 7.2 to 10 print it.
fn listed(listing: &str) -> Vec<Forward> {
    let forward = |line: &str| {
        let mut words = line.split_whitespace();
        let kind = words.next()?;
        let mut ports = words.skip(2).step_by(2).filter_map(|word| word.parse().ok());
        let (host, guest) = (ports.next()?, ports.next()?);
        (kind == "TCP[HOST_FORWARD]").then_some(Forward { host, guest })
    };
    listing.lines().filter_map(forward).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forward_is_two_ports() {
        for (word, host, guest) in [("8080:80", 8080, 80), ("0:443", 0, 443), ("65535:1", 65535, 1)] {
            assert_eq!(word.parse::<Forward>().unwrap(), Forward { host, guest });
        }
        for word in ["", ":", "80", "80:", ":80", "80:0", "65536:1", "1:2:3", "+1:2", "-1:2", "127.0.0.1:80:80", " 1:2"]
        {
            let error = word.parse::<Forward>().unwrap_err();
            assert!(matches!(&error, Error::ForwardWord { word: kept } if kept == word), "{word}: {error}");
        }
    }

    const LISTING: &str = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
        TCP[ESTABLISHED]   9       127.0.0.1 37339       10.0.2.15  8080     0     0\r\n  \
        TCP[HOST_FORWARD]   8       127.0.0.1 37339       10.0.2.15  8080     0     0\r\n  \
        TCP[HOST_FORWARD]   4       127.0.0.1  9000       10.0.2.15  8080     0     0\r\n  \
        TCP[HOST_FORWARD]   3       127.0.0.1 37651       10.0.2.15   443     0     0\r\n";

    #[test]
    fn picked_ports_come_from_qemu() {
        let asked = [Forward { host: 9000, guest: 8080 }, Forward::to(8080), Forward::to(443)];
        let hosts: Vec<u16> = bound(&asked, LISTING).unwrap().iter().map(|forward| forward.host).collect();
        assert_eq!(hosts, [9000, 37339, 37651]);
        let error = bound(&[Forward::to(22)], LISTING).unwrap_err();
        assert!(matches!(error, Error::ForwardMissing { forward: Forward { host: 0, guest: 22 }, .. }));
        assert!(bound(&[Forward::to(22)], "").is_err());
    }
}
