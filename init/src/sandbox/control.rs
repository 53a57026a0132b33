//! Control: reads the seed, keeps files on the data disk, resolves names, answers operators.

use nix::libc::{IPPROTO_TCP, PR_SET_NAME, TCP_NODELAY, TCP_USER_TIMEOUT};

use super::program::WRITES;
use super::sockets::{DATAGRAM, STREAM, TCP, UDP, USUAL, V4, V6};
use super::worker::THREAD;
use super::{Call, Sandbox, Test, call, event_loop, is, program, without};

const READ_ONLY_1: Test = without(1, WRITES, "O_RDONLY");
const READ_ONLY_2: Test = without(2, WRITES, "O_RDONLY");
/// No current folder, which nobody here has: a path is taken from a folder that is open. Where it leads is Landlock's business.
const HELD_0: Test = Test { argument: 0, mask: 1 << 31, is: 0, says: "from a folder that is open" };
const HELD_2: Test = Test { argument: 2, mask: 1 << 31, is: 0, says: "to a folder that is open" };

/// Keeping files beneath the folder on the data disk that init has opened. By name from that folder: no path of the whole
/// system is ever opened to write.
const KEEPING: &[Call] = &[
    call!(SYS_openat = openat, [[HELD_0]], "files and folders of the store"),
    call!(SYS_openat2 = openat2, [[HELD_0]], "the same, where a link or a `..` in the path must fail"),
    call!(SYS_pwrite64 = pwrite64, [], "writing a file by position"),
    call!(SYS_ftruncate = ftruncate, [], "cutting off what a crash has left half written"),
    call!(SYS_fallocate = fallocate, [], "room for a file before it is written, so that it cannot end halfway"),
    call!(SYS_fsync = fsync, [], "what is written is on the disk; a folder's names, too"),
    call!(SYS_fdatasync = fdatasync, [], "what is written is on the disk"),
    call!(SYS_renameat = renameat, [[HELD_0, HELD_2]], "a file that is whole takes its name"),
    call!(SYS_renameat2 = renameat2, [[HELD_0, HELD_2]], "a file that is whole takes its name, if it is free"),
    call!(SYS_unlinkat = unlinkat, [[HELD_0]], "removing what nobody needs"),
    call!(SYS_mkdirat = mkdirat, [[HELD_0]], "the store's folders"),
    call!(SYS_getdents64 = getdents64, [], "what there is"),
    call!(SYS_fchmod = fchmod, [], "files that nobody changes any more"),
    call!(SYS_flock = flock, [], "one store at a time"),
    call!(SYS_fstatfs = fstatfs, [], "how much room is left"),
    call!(SYS_clone = clone, [[THREAD]], "the store's thread: a disk may take its time"),
    call!(SYS_prctl = prctl, [[is(0, PR_SET_NAME, "PR_SET_NAME")]], "its name"),
];

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
        "questions to name servers, requests to registries, the log to its collector; no raw, packet or netlink socket"
    ),
    call!(SYS_bind = bind, [], "a port of the kernel's choice for a question; Landlock refuses TCP's"),
    call!(
        SYS_connect = connect,
        [],
        "name servers, registries and the collector of the log; Landlock bounds TCP's ports to theirs"
    ),
    call!(
        SYS_setsockopt = setsockopt,
        [
            [is(1, IPPROTO_TCP, "IPPROTO_TCP"), is(2, TCP_NODELAY, "TCP_NODELAY")],
            [is(1, IPPROTO_TCP, "IPPROTO_TCP"), is(2, TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT")]
        ],
        "answers without delay; a collector that is gone is noticed"
    ),
];

/// What control may do.
pub const SANDBOX: Sandbox = Sandbox {
    calls: &[program::CALLS, event_loop::CHANNELS, event_loop::CALLS, KEEPING, OWN],
    files: &[
        ("/seed", "the graph, its components and roots"),
        ("/proc/meminfo", "the machine's memory, for the status"),
    ],
    data: &[("/data/control", "the store: its folder on the data disk")],
    files_of_a_workstation: &[("/", "a manifest may name components and roots anywhere")],
};
