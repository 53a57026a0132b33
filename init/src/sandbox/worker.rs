//! A worker: at first it maps and links, then it is sealed, and from there on it serves.
//!
//! Sealed, it opens no file and no page becomes executable, in any way. Whether it may make a socket, of which kind, and to
//! which TCP ports it may connect is what its graph grants, and nothing else is asked.

use std::collections::BTreeSet;

use nix::libc::{
    IP_TTL, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPV6_UNICAST_HOPS, IPV6_V6ONLY, PR_SET_NAME, PR_SET_NO_NEW_PRIVS,
    SO_KEEPALIVE, SO_LINGER, SO_RCVBUF, SO_REUSEADDR, SO_SNDBUF, SOL_SOCKET, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL,
    TCP_NODELAY, TCP_USER_TIMEOUT,
};

use super::program::WRITES;
use super::sockets::{DATAGRAM, STREAM, TCP, UDP, USUAL, V4, V6};
use super::{
    Call, Closing, Demand, Error, Layer, Sandbox, Test, Threads, call, event_loop, filter, is, program, without,
};

/// What a graph lets a worker reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// A brane has `net.http`: connections that the worker makes for it.
    pub http: bool,
    /// A brane has `net.tcp`: connections of its own.
    pub tcp: bool,
    /// A brane has `net.udp`: datagrams.
    pub udp: bool,
    /// The TCP ports that the allowlists name.
    pub ports: BTreeSet<u16>,
}

/// The flags of musl's `pthread_create`: `CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID`
/// and the historical `CLONE_DETACHED`.
pub(super) const THREAD: Test = is(0, 0x7d_0f00, "a thread");
const TCP_LEVEL: Test = is(1, IPPROTO_TCP, "IPPROTO_TCP");
const SOCKET_LEVEL: Test = is(1, SOL_SOCKET, "SOL_SOCKET");
/// Until the seal.
const STARTING: &[Call] = &[
    call!(SYS_open = open, [[without(1, WRITES, "O_RDONLY")]], "mapping an artefact by its descriptor's name in /proc"),
    call!(
        SYS_openat = openat,
        [[without(2, WRITES, "O_RDONLY")]],
        "mapping an artefact by its descriptor's name in /proc"
    ),
    call!(SYS_stat = stat, [], "Wasmtime asks for the number of cores; Landlock lets it see no limit"),
    call!(SYS_statx = statx, [], "Wasmtime asks for the number of cores"),
    call!(SYS_sched_getaffinity = sched_getaffinity, [], "Wasmtime asks for the number of cores"),
    call!(SYS_sched_setaffinity = sched_setaffinity, [], "the tick thread goes to the housekeeping cores"),
    call!(SYS_mprotect = mprotect, [[program::READ_EXEC]], "mapping an artefact's code"),
    call!(SYS_clone = clone, [[THREAD]], "starting the tick thread"),
    call!(
        SYS_prctl = prctl,
        [[is(0, PR_SET_NAME, "PR_SET_NAME")], [is(0, PR_SET_NO_NEW_PRIVS, "PR_SET_NO_NEW_PRIVS")]],
        "the tick thread's name; the seal"
    ),
    call!(SYS_seccomp = seccomp, [], "the seal"),
];

/// Always.
const SERVING: &[Call] = &[
    call!(SYS_accept4 = accept4, [], "connections, on the sockets that init has opened"),
    call!(
        SYS_setsockopt = setsockopt,
        [
            [TCP_LEVEL, is(2, TCP_NODELAY, "TCP_NODELAY")],
            [TCP_LEVEL, is(2, TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT")],
            [SOCKET_LEVEL, is(2, SO_LINGER, "SO_LINGER")]
        ],
        "answers without delay; clients that take nothing; an answer that is broken off"
    ),
];

/// With any way out.
const REACHING: &[Call] =
    &[call!(SYS_connect = connect, [], "net.*: addresses are checked before, TCP's ports by Landlock")];

/// With `net.http` or `net.tcp`.
const STREAMS: &[Call] = &[call!(
    SYS_socket = socket,
    [[V4, STREAM, USUAL], [V6, STREAM, USUAL], [V4, STREAM, TCP], [V6, STREAM, TCP]],
    "net.http, net.tcp"
)];

/// With `net.udp`.
const DATAGRAMS: &[Call] = &[call!(
    SYS_socket = socket,
    [[V4, DATAGRAM, USUAL], [V6, DATAGRAM, USUAL], [V4, DATAGRAM, UDP], [V6, DATAGRAM, UDP]],
    "net.udp"
)];

/// With `net.tcp` or `net.udp`: what a guest may do to sockets of its own.
const SOCKETS: &[Call] = &[
    call!(SYS_bind = bind, [], "any address, any port: a guest may ask for no other; TCP's by Landlock"),
    call!(
        SYS_setsockopt = setsockopt,
        [
            [SOCKET_LEVEL, is(2, SO_RCVBUF, "SO_RCVBUF")],
            [SOCKET_LEVEL, is(2, SO_SNDBUF, "SO_SNDBUF")],
            [SOCKET_LEVEL, is(2, SO_KEEPALIVE, "SO_KEEPALIVE")],
            [SOCKET_LEVEL, is(2, SO_REUSEADDR, "SO_REUSEADDR")],
            [TCP_LEVEL, is(2, TCP_KEEPIDLE, "TCP_KEEPIDLE")],
            [TCP_LEVEL, is(2, TCP_KEEPINTVL, "TCP_KEEPINTVL")],
            [TCP_LEVEL, is(2, TCP_KEEPCNT, "TCP_KEEPCNT")],
            [is(1, IPPROTO_IP, "IPPROTO_IP"), is(2, IP_TTL, "IP_TTL")],
            [is(1, IPPROTO_IPV6, "IPPROTO_IPV6"), is(2, IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS")],
            [is(1, IPPROTO_IPV6, "IPPROTO_IPV6"), is(2, IPV6_V6ONLY, "IPV6_V6ONLY")]
        ],
        "what wasi:sockets lets a guest set"
    ),
];

/// Until the seal, without what the graph grants: that comes from [`seal`].
pub const START: Sandbox = Sandbox {
    calls: &[program::CALLS, event_loop::CHANNELS, event_loop::CALLS, SERVING, STARTING],
    files: &[],
    data: &[],
    files_of_a_workstation: &[("/proc/self/statm", "its own memory in figures, where no cgroup counts it")],
};

/// The calls of a sealed worker.
pub fn seal(reach: &Reach) -> impl Iterator<Item = &'static Call> {
    let mut lists = vec![program::CALLS, event_loop::CHANNELS, event_loop::CALLS, SERVING];
    for (granted, list) in [
        (reach.http || reach.tcp || reach.udp, REACHING),
        (reach.http || reach.tcp, STREAMS),
        (reach.udp, DATAGRAMS),
        (reach.tcp || reach.udp, SOCKETS),
    ] {
        lists.extend(granted.then_some(list));
    }
    lists.into_iter().flatten()
}

/// The first moment, when the plan has been read and nothing else, and while there is one thread: no capability, no files,
/// no TCP ports but the graph's, and of the network no call that the seal would not leave.
///
/// # Errors
/// [`Error`]
pub fn enter(reach: &Reach, demand: Demand) -> Result<(), Error> {
    closing(reach).enter(demand)
}

fn closing(reach: &Reach) -> Closing<'_> {
    let calls = START.calls.iter().copied().flatten().chain(seal(reach)).collect();
    Closing { sandbox: &START, ports: &reach.ports, bind: reach.tcp, keeps: None, calls }
}

/// Enters one layer of the first moment and leaves the others off, to show what it stops by itself, as
/// [`super::enter_one_layer`] does; sealed is only who calls [`close`] then.
///
/// # Errors
/// If the layer could not be had.
pub fn enter_one_layer(layer: Layer, reach: &Reach) -> Result<(), Error> {
    closing(reach).enter_one(layer, Demand::Whole)
}

/// The second, when everything is mapped, linked and pooled: the seal, on all threads.
///
/// # Errors
/// [`Error`]
pub fn close(reach: &Reach, demand: Demand) -> Result<(), Error> {
    if demand == Demand::Nothing {
        return Ok(());
    }
    filter(seal(reach), Threads::All, demand)
}

/// The seal as a person reads it.
#[must_use]
pub fn text(reach: &Reach) -> String {
    let ports = reach.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let ports = if ports.is_empty() { "none".into() } else { ports };
    let bind = if reach.tcp { "of the kernel's choice" } else { "none" };
    format!(
        "files: none\nTCP ports to connect to: {ports}\nTCP ports to bind to: {bind}\n\n{}",
        super::text(seal(reach))
    )
}
