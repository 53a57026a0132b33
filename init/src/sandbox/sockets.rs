//! Which sockets a `socket` call may ask for: what control and a worker's seal tell apart.

use nix::libc::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, SOCK_DGRAM, SOCK_STREAM};

use super::{Test, is};

pub(super) const V4: Test = is(0, AF_INET, "AF_INET");
pub(super) const V6: Test = is(0, AF_INET6, "AF_INET6");
pub(super) const STREAM: Test = Test { argument: 1, mask: 0xf, is: SOCK_STREAM.cast_unsigned(), says: "SOCK_STREAM" };
pub(super) const DATAGRAM: Test = Test { argument: 1, mask: 0xf, is: SOCK_DGRAM.cast_unsigned(), says: "SOCK_DGRAM" };
/// Not of another protocol: Landlock knows the ports of TCP alone, and MPTCP has streams too.
pub(super) const USUAL: Test = is(2, 0, "the usual protocol");
pub(super) const TCP: Test = is(2, IPPROTO_TCP, "TCP");
pub(super) const UDP: Test = is(2, IPPROTO_UDP, "UDP");
