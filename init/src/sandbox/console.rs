//! The prompt on the serial port: reads keys, asks control, writes answers.

use nix::libc::{AF_UNIX, SOCK_STREAM};

use super::{Call, Sandbox, Test, call, event_loop, is, program};

// Not from libc: their type differs from one C library to the other (asm-generic/ioctls.h).
const TCGETS: i32 = 0x5401;
const TCGETS2: i32 = 0x802c_542a_u32.cast_signed();
const TIOCGWINSZ: i32 = 0x5413;
const STREAM: Test = Test { argument: 1, mask: 0xf, is: SOCK_STREAM.cast_unsigned(), says: "SOCK_STREAM" };

pub(super) const OWN: &[Call] = &[
    call!(SYS_socket = socket, [[is(0, AF_UNIX, "AF_UNIX"), STREAM]], "asking control"),
    call!(
        SYS_connect = connect,
        [],
        "asking control: its sockets are Unix sockets, and the modes of files say to whom it may speak"
    ),
    call!(SYS_ppoll = ppoll, [], "waiting for a key, for lines of init's, or for a time"),
    call!(
        SYS_ioctl = ioctl,
        [[is(1, TCGETS, "TCGETS")], [is(1, TCGETS2, "TCGETS2")], [is(1, TIOCGWINSZ, "TIOCGWINSZ")]],
        "whether it writes to a terminal, how wide that is, and that init has set it to send each key; nothing is typed into it, and it sets \
         nothing"
    ),
];

/// What the console may do.
pub const SANDBOX: Sandbox =
    Sandbox { calls: &[program::CALLS, event_loop::CALLS, OWN], files: &[], data: &[], files_of_a_workstation: &[] };
