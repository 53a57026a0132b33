//! Which addresses may be connected to.
//!
//! A name's owner decides which addresses it stands for, so a name that a manifest allows may point at the appliance
//! itself, its neighbours, or the metadata service of a cloud. Only what is reachable on the Internet at large passes;
//! the rest is refused by the registries named in the table. What a brane is to reach nevertheless is written into its
//! allowlist as that literal address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address is refused: what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Reason {
    /// The machine itself.
    Loopback,
    /// `0.0.0.0/8` and `::`: no address, and a connection to it ends on the machine itself.
    Unspecified,
    /// A private network.
    Private,
    /// A single link; the metadata services of clouds are there.
    LinkLocal,
    /// Between a provider's translator and its customers.
    CarrierNat,
    /// A private network of IPv6.
    UniqueLocal,
    /// Many hosts at once.
    Multicast,
    /// All hosts of a link.
    Broadcast,
    /// For examples in documents.
    Documentation,
    /// For measurements in laboratories.
    Benchmarking,
    /// Set aside for protocols.
    Protocol,
    /// For routers that drop what comes.
    Discard,
    /// An IPv4 address in the form of an IPv6 one, as sockets show it; never on a wire.
    Mapped,
    /// An IPv4 address in a tunnel's or translator's IPv6 one.
    Embedded,
    /// Not given out.
    Reserved,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::Unspecified => "unspecified",
            Self::Private => "private",
            Self::LinkLocal => "link-local",
            Self::CarrierNat => "carrier-grade NAT",
            Self::UniqueLocal => "unique local",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Documentation => "documentation",
            Self::Benchmarking => "benchmarking",
            Self::Protocol => "set aside for protocols",
            Self::Discard => "discard-only",
            Self::Mapped => "IPv4-mapped",
            Self::Embedded => "an embedded IPv4 address",
            Self::Reserved => "reserved",
        })
    }
}

/// IANA's "IPv4 Special-Purpose Address Registry" and what each entry cites; the first row that matches counts.
const V4: &[(Ipv4Addr, u32, Reason)] = &[
    (Ipv4Addr::UNSPECIFIED, 8, Reason::Unspecified), // RFC 791, RFC 1122 3.2.1.3
    (Ipv4Addr::new(10, 0, 0, 0), 8, Reason::Private), // RFC 1918
    (Ipv4Addr::new(100, 64, 0, 0), 10, Reason::CarrierNat), // RFC 6598
    (Ipv4Addr::new(127, 0, 0, 0), 8, Reason::Loopback), // RFC 1122 3.2.1.3
    (Ipv4Addr::new(169, 254, 0, 0), 16, Reason::LinkLocal), // RFC 3927
    (Ipv4Addr::new(172, 16, 0, 0), 12, Reason::Private), // RFC 1918
    (Ipv4Addr::new(192, 0, 0, 0), 24, Reason::Protocol), // RFC 6890
    (Ipv4Addr::new(192, 0, 2, 0), 24, Reason::Documentation), // RFC 5737
    (Ipv4Addr::new(192, 88, 99, 0), 24, Reason::Reserved), // RFC 7526: relays from IPv6, given up
    (Ipv4Addr::new(192, 168, 0, 0), 16, Reason::Private), // RFC 1918
    (Ipv4Addr::new(198, 18, 0, 0), 15, Reason::Benchmarking), // RFC 2544
    (Ipv4Addr::new(198, 51, 100, 0), 24, Reason::Documentation), // RFC 5737
    (Ipv4Addr::new(203, 0, 113, 0), 24, Reason::Documentation), // RFC 5737
    (Ipv4Addr::new(224, 0, 0, 0), 4, Reason::Multicast), // RFC 5771
    (Ipv4Addr::BROADCAST, 32, Reason::Broadcast),    // RFC 919, RFC 8190
    (Ipv4Addr::new(240, 0, 0, 0), 4, Reason::Reserved), // RFC 1112 4
];

/// IANA's "IPv6 Special-Purpose Address Registry" and "IPv6 Address Space"; the first row that matches counts.
const V6: &[(Ipv6Addr, u32, Reason)] = &[
    (Ipv6Addr::UNSPECIFIED, 128, Reason::Unspecified), // RFC 4291 2.5.2
    (Ipv6Addr::LOCALHOST, 128, Reason::Loopback),      // RFC 4291 2.5.3
    (Ipv6Addr::UNSPECIFIED, 96, Reason::Mapped),       // RFC 4291 2.5.5.1: IPv4-compatible, given up
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96, Reason::Mapped), // RFC 4291 2.5.5.2
    (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96, Reason::Mapped), // RFC 2765 2.1: IPv4-translated, given up
    (Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0), 48, Reason::Private), // RFC 8215: a network's own NAT64
    (Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64, Reason::Discard), // RFC 6666
    (Ipv6Addr::new(0x100, 0, 0, 1, 0, 0, 0, 0), 64, Reason::Discard), // RFC 9780: a dummy
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32, Reason::Embedded), // RFC 4380: Teredo, given up
    (Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 48, Reason::Benchmarking), // RFC 5180, RFC 1752
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, Reason::Protocol), // RFC 2928: ORCHID, DRIP, AMT and others
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, Reason::Documentation), // RFC 3849
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, Reason::Embedded), // RFC 3056: 6to4, given up by RFC 7526
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, Reason::Documentation), // RFC 9637
    (Ipv6Addr::new(0x5f00, 0, 0, 0, 0, 0, 0, 0), 16, Reason::Protocol), // RFC 9602: segments of SRv6
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, Reason::UniqueLocal), // RFC 4193
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, Reason::LinkLocal), // RFC 4291 2.5.6
    (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10, Reason::Private), // RFC 3879: site-local, given up
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, Reason::Multicast), // RFC 4291 2.7
];

/// NAT64's well-known prefix (RFC 6052): real hosts, in networks that have IPv6 alone.
const NAT64: (Ipv6Addr, u32) = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);
/// What is given out to hosts (RFC 4291 2.4, IANA's "IPv6 Address Space").
const GLOBAL_UNICAST: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Why an address may not be connected to; `None` if it may.
///
/// ```
/// use gaia_egress::address::{Reason, refused};
/// assert_eq!(refused("169.254.169.254".parse().unwrap()), Some(Reason::LinkLocal));
/// assert_eq!(refused("9.9.9.9".parse().unwrap()), None);
/// ```
#[must_use]
pub fn refused(address: IpAddr) -> Option<Reason> {
    match address {
        IpAddr::V4(address) => refused_v4(address),
        IpAddr::V6(address) => refused_v6(address),
    }
}

fn refused_v4(address: Ipv4Addr) -> Option<Reason> {
    V4.iter().find(|(prefix, bits, _)| in_v4(address, *prefix, *bits)).map(|(_, _, reason)| *reason)
}

fn refused_v6(address: Ipv6Addr) -> Option<Reason> {
    if in_v6(address, NAT64) {
        return refused_v4(last_four(address)).map(|_| Reason::Embedded);
    }
    if let Some((_, _, reason)) = V6.iter().find(|(prefix, bits, _)| in_v6(address, (*prefix, *bits))) {
        return Some(*reason);
    }
    if !in_v6(address, GLOBAL_UNICAST) {
        return Some(Reason::Reserved);
    }
    // ISATAP (RFC 5214 6.1): any prefix, then 0000:5efe or 0200:5efe and the IPv4 address.
    let isatap = matches!(address.segments(), [_, _, _, _, 0 | 0x200, 0x5efe, _, _]);
    isatap.then(|| refused_v4(last_four(address))).flatten().map(|_| Reason::Embedded)
}

fn last_four(address: Ipv6Addr) -> Ipv4Addr {
    let [.., a, b, c, d] = address.octets();
    Ipv4Addr::new(a, b, c, d)
}

/// `bits` is 1 to 32.
fn in_v4(address: Ipv4Addr, prefix: Ipv4Addr, bits: u32) -> bool {
    (address.to_bits() ^ prefix.to_bits()) >> (32 - bits) == 0
}

/// The prefix's length is 1 to 128.
fn in_v6(address: Ipv6Addr, (prefix, bits): (Ipv6Addr, u32)) -> bool {
    (address.to_bits() ^ prefix.to_bits()) >> (128 - bits) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_row_refuses_its_first_and_last_address_and_not_its_neighbours() {
        for (text, reason) in [
            ("0.0.0.0", Some(Reason::Unspecified)),
            ("0.255.255.255", Some(Reason::Unspecified)),
            ("1.0.0.0", None),
            ("9.255.255.255", None),
            ("10.0.0.0", Some(Reason::Private)),
            ("10.255.255.255", Some(Reason::Private)),
            ("11.0.0.0", None),
            ("100.63.255.255", None),
            ("100.64.0.0", Some(Reason::CarrierNat)),
            ("100.127.255.255", Some(Reason::CarrierNat)),
            ("100.128.0.0", None),
            ("126.255.255.255", None),
            ("127.0.0.1", Some(Reason::Loopback)),
            ("127.255.255.255", Some(Reason::Loopback)),
            ("128.0.0.0", None),
            ("169.253.255.255", None),
            ("169.254.169.254", Some(Reason::LinkLocal)),
            ("169.255.0.0", None),
            ("172.15.255.255", None),
            ("172.16.0.0", Some(Reason::Private)),
            ("172.31.255.255", Some(Reason::Private)),
            ("172.32.0.0", None),
            ("192.0.0.8", Some(Reason::Protocol)),
            ("192.0.1.0", None),
            ("192.0.2.1", Some(Reason::Documentation)),
            ("192.88.99.1", Some(Reason::Reserved)),
            ("192.167.255.255", None),
            ("192.168.0.0", Some(Reason::Private)),
            ("192.169.0.0", None),
            ("198.17.255.255", None),
            ("198.18.0.0", Some(Reason::Benchmarking)),
            ("198.19.255.255", Some(Reason::Benchmarking)),
            ("198.20.0.0", None),
            ("198.51.100.7", Some(Reason::Documentation)),
            ("203.0.113.7", Some(Reason::Documentation)),
            ("223.255.255.255", None),
            ("224.0.0.1", Some(Reason::Multicast)),
            ("239.255.255.255", Some(Reason::Multicast)),
            ("240.0.0.0", Some(Reason::Reserved)),
            ("255.255.255.254", Some(Reason::Reserved)),
            ("255.255.255.255", Some(Reason::Broadcast)),
            ("::", Some(Reason::Unspecified)),
            ("::1", Some(Reason::Loopback)),
            ("::2", Some(Reason::Mapped)),
            ("::9.9.9.9", Some(Reason::Mapped)),
            ("::ffff:9.9.9.9", Some(Reason::Mapped)),
            ("::ffff:127.0.0.1", Some(Reason::Mapped)),
            ("::ffff:0:127.0.0.1", Some(Reason::Mapped)),
            ("64:ff9b::9.9.9.9", None),
            ("64:ff9b::10.0.0.1", Some(Reason::Embedded)),
            ("64:ff9b::169.254.169.254", Some(Reason::Embedded)),
            ("64:ff9b:0:0:0:1:909:909", Some(Reason::Reserved)),
            ("64:ff9b:1::9.9.9.9", Some(Reason::Private)),
            ("100::1", Some(Reason::Discard)),
            ("100:0:0:1::1", Some(Reason::Discard)),
            ("1fff:ffff::", Some(Reason::Reserved)),
            ("2000::", None),
            ("2001::1", Some(Reason::Embedded)),
            ("2001:2::1", Some(Reason::Benchmarking)),
            ("2001:20::1", Some(Reason::Protocol)),
            ("2001:1ff:ffff::", Some(Reason::Protocol)),
            ("2001:200::", None),
            ("2001:db7:ffff::", None),
            ("2001:db8::1", Some(Reason::Documentation)),
            ("2001:db9::", None),
            ("2002:909:909::1", Some(Reason::Embedded)),
            ("2002:a00:1::1", Some(Reason::Embedded)),
            ("2003::1", None),
            ("2620:fe::fe", None),
            ("2620:fe::5efe:9.9.9.9", None),
            ("2620:fe::5efe:10.0.0.1", Some(Reason::Embedded)),
            ("2620:fe::200:5efe:127.0.0.1", Some(Reason::Embedded)),
            ("3fff::1", Some(Reason::Documentation)),
            ("3fff:1000::", None),
            ("3fff:ffff::", None),
            ("4000::", Some(Reason::Reserved)),
            ("5f00::1", Some(Reason::Protocol)),
            ("fbff::", Some(Reason::Reserved)),
            ("fc00::1", Some(Reason::UniqueLocal)),
            ("fd00:ec2::254", Some(Reason::UniqueLocal)),
            ("fe00::", Some(Reason::Reserved)),
            ("fe80::1", Some(Reason::LinkLocal)),
            ("fec0::1", Some(Reason::Private)),
            ("ff02::1", Some(Reason::Multicast)),
        ] {
            assert_eq!(refused(text.parse().unwrap()), reason, "{text}");
        }
    }

    #[test]
    fn prefixes_have_no_bits_behind_their_length() {
        for (prefix, bits, _) in V4 {
            assert_eq!(prefix.to_bits().checked_shl(*bits).unwrap_or(0), 0, "{prefix}/{bits}");
        }
        for (prefix, bits, _) in V6 {
            assert_eq!(prefix.to_bits().checked_shl(*bits).unwrap_or(0), 0, "{prefix}/{bits}");
        }
    }

    /// An IPv4 address of one of the table's rows.
    fn refused_address() -> impl Strategy<Value = Ipv4Addr> {
        (0..V4.len(), any::<u32>()).prop_map(|(row, low)| {
            let (prefix, bits, _) = V4[row];
            Ipv4Addr::from_bits(prefix.to_bits() | low.checked_shr(bits).unwrap_or(0))
        })
    }

    proptest! {
        #[test]
        fn what_ipv4_refuses_no_form_of_ipv6_lets_through(
            v4 in refused_address(),
            high in any::<u64>(),
            low in any::<u32>(),
        ) {
            prop_assert!(refused(v4.into()).is_some());
            let [high_4, low_4] = [v4.to_bits() >> 16, v4.to_bits() & 0xffff].map(|n| u16::try_from(n).unwrap());
            let bits = u128::from(v4.to_bits());
            let prefix = |text: &str| text.parse::<Ipv6Addr>().unwrap().to_bits();
            let six_to_four = Ipv6Addr::new(0x2002, high_4, low_4, 0, 0, 0, 0, 0).to_bits() | u128::from(high);
            for form in [
                prefix("::") | bits,
                prefix("::ffff:0:0") | bits,
                prefix("::ffff:0:0:0") | bits,
                prefix("64:ff9b::") | bits,
                prefix("64:ff9b:1::") | bits,
                prefix("64:ff9b:1:ffff::") | bits,
                six_to_four,
                // Teredo: as the server, and as the client behind it.
                prefix("2001::") | bits << 64 | u128::from(low),
                prefix("2001::") | u128::from(low) << 64 | u128::from(!v4.to_bits()),
                // ISATAP in any network.
                u128::from(high) << 64 | 0x5efe << 32 | bits,
                u128::from(high) << 64 | 0x0200_5efe << 32 | bits,
            ] {
                let form = Ipv6Addr::from_bits(form);
                prop_assert!(refused(form.into()).is_some(), "{form} holds {v4}");
            }
        }

        #[test]
        fn std_agrees_where_it_has_a_word(bits in any::<u128>(), v4 in any::<u32>()) {
            let v4 = Ipv4Addr::from_bits(v4);
            if v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || v4.is_documentation() {
                prop_assert!(refused(v4.into()).is_some());
            }
            let v6 = Ipv6Addr::from_bits(bits);
            if v6.is_unique_local() || v6.is_unicast_link_local() || v6.is_multicast() || v6.is_loopback() {
                prop_assert!(refused(v6.into()).is_some());
            }
        }
    }
}
