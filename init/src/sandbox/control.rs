//! Control: reads the seed, resolves names, answers operators.

use nix::libc::{IPPROTO_TCP, TCP_NODELAY};

use super::program::WRITES;
use super::sockets::{DATAGRAM, STREAM, TCP, UDP, USUAL, V4, V6};
use super::{Call, Sandbox, Test, call, event_loop, is, program, without};

const READ_ONLY_1: Test = without(1, WRITES, "O_RDONLY");
const READ_ONLY_2: Test = without(2, WRITES, "O_RDONLY");
const OWN: &[Call] = &[
    call!(SYS_open = open, [[READ_ONLY_1]], "the machine's memory in figures, /proc/meminfo"),
    call!(SYS_openat = openat, [[READ_ONLY_2]], "the graph and its components in the seed"),
    call!(SYS_newfstatat = newfstatat, [], "whether a file has changed"),
    call!(SYS_statx = statx, [], "whether a file has changed"),
    call!(SYS_stat = stat, [], "what kind a path is"),
    call!(SYS_uname = uname, [], "the kernel's version"),
    call!(SYS_sysinfo = sysinfo, [], "the machine's memory"),
    call!(SYS_accept4 = accept4, [], "operators, on the sockets that init has opened"),
    call!(
        SYS_socket = socket,
        [
            [V4, DATAGRAM, USUAL],
            [V6, DATAGRAM, USUAL],
            [V4, DATAGRAM, UDP],
            [V6, DATAGRAM, UDP],
            [V4, STREAM, USUAL],
            [V6, STREAM, USUAL],
            [V4, STREAM, TCP],
            [V6, STREAM, TCP]
        ],
        "questions to name servers; no raw, packet or netlink socket"
    ),
    call!(SYS_bind = bind, [], "a port of the kernel's choice for a question; Landlock refuses TCP's"),
    call!(SYS_connect = connect, [], "name servers; Landlock bounds TCP's ports to theirs"),
    call!(
        SYS_setsockopt = setsockopt,
        [[is(1, IPPROTO_TCP, "IPPROTO_TCP"), is(2, TCP_NODELAY, "TCP_NODELAY")]],
        "answers without delay"
    ),
];

/// What control may do.
pub const SANDBOX: Sandbox = Sandbox {
    calls: &[program::CALLS, event_loop::CHANNELS, event_loop::CALLS, OWN],
    files: &[
        ("/seed", "the graph, its components and roots"),
        ("/proc/meminfo", "the machine's memory, for the status"),
    ],
    files_of_a_workstation: &[("/", "a manifest may name components and roots anywhere")],
};
