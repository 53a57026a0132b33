//! What tokio's event loop needs, and the channels between roles.

use nix::libc::MSG_FASTOPEN;

use super::{Call, Test, call, is, without};

/// Not from libc: its type differs from one C library to the other (asm-generic/ioctls.h).
const FIONBIO: i32 = 0x5421;
/// A message with this flag connects as it is sent, and Landlock is not asked for the port.
pub(super) const NO_FAST_OPEN_3: Test = without(3, MSG_FASTOPEN, "not MSG_FASTOPEN");
const NO_FAST_OPEN_2: Test = without(2, MSG_FASTOPEN, "not MSG_FASTOPEN");

/// The channels alone, without an event loop.
pub(super) const CHANNELS: &[Call] = &[
    call!(SYS_recvmsg = recvmsg, [], "messages of another role, with descriptors"),
    call!(SYS_sendmsg = sendmsg, [[NO_FAST_OPEN_2]], "messages to another role, with descriptors"),
    call!(SYS_memfd_create = memfd_create, [], "a file in memory, sealed and handed over; nothing can be run from it"),
];

/// The calls.
pub(super) const CALLS: &[Call] = &[
    call!(SYS_epoll_create1 = epoll_create1, [], "the event loop"),
    call!(SYS_epoll_ctl = epoll_ctl, [], "the event loop"),
    call!(SYS_epoll_pwait = epoll_pwait, [], "the event loop"),
    call!(SYS_epoll_wait = epoll_wait, [], "the event loop"),
    call!(SYS_eventfd2 = eventfd2, [], "waking the event loop"),
    call!(SYS_ioctl = ioctl, [[is(1, FIONBIO, "FIONBIO")]], "making what is open non-blocking; nothing of a terminal"),
    call!(SYS_recvfrom = recvfrom, [], "connections that are open"),
    call!(SYS_sendto = sendto, [[NO_FAST_OPEN_3]], "connections that are open"),
    call!(SYS_shutdown = shutdown, [], "the end of a connection"),
    call!(SYS_getsockopt = getsockopt, [], "how a connection fared"),
    call!(SYS_getsockname = getsockname, [], "the own end of a connection"),
    call!(SYS_getpeername = getpeername, [], "the other end of a connection"),
];
