//! What a program by Rust and musl needs to run at all, whatever it is for: none of it reaches anything that the process
//! does not hold already.

use nix::libc::{
    F_ADD_SEALS, F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFD, F_GETFL, F_SETFD, F_SETFL, O_CREAT, O_RDWR, O_TRUNC, O_WRONLY,
    PROT_EXEC, PROT_READ, SIGABRT,
};

use super::{Call, Test, call, is, without};

/// Opening for more than reading. Not `O_ACCMODE`: musl counts `O_PATH` to it.
pub(super) const WRITES: i32 = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
pub(super) const NO_EXEC: Test = without(2, PROT_EXEC, "not PROT_EXEC");
pub(super) const READ_EXEC: Test = is(2, PROT_READ | PROT_EXEC, "PROT_READ|PROT_EXEC");

/// `linux/prctl.h`
const PR_GET_AUXV: i32 = 0x4155_5856;

/// The calls.
pub(super) const CALLS: &[Call] = &[
    call!(SYS_read = read, [], "what is open: the terminal, event counters"),
    call!(SYS_write = write, [], "what is open: standard error, files in memory, event counters"),
    call!(SYS_readv = readv, [], "tokio's streams"),
    call!(SYS_writev = writev, [], "tokio's streams: head and body in one piece"),
    call!(SYS_pread64 = pread64, [], "files in memory, by position: several hold the same open file"),
    call!(SYS_close = close, [], "what is open"),
    call!(SYS_fstat = fstat, [], "the size of what is open"),
    call!(SYS_lseek = lseek, [], "reading what is open to its end"),
    call!(
        SYS_fcntl = fcntl,
        [
            [is(1, F_GETFD, "F_GETFD")],
            [is(1, F_SETFD, "F_SETFD")],
            [is(1, F_GETFL, "F_GETFL")],
            [is(1, F_SETFL, "F_SETFL")],
            [is(1, F_DUPFD_CLOEXEC, "F_DUPFD_CLOEXEC")],
            [is(1, F_ADD_SEALS, "F_ADD_SEALS")],
            [is(1, F_GET_SEALS, "F_GET_SEALS")]
        ],
        "flags, copies and seals of what is open; no locks, leases or signals"
    ),
    call!(SYS_poll = poll, [], "waiting for what is open"),
    call!(SYS_brk = brk, [], "musl's allocator"),
    call!(SYS_mmap = mmap, [[NO_EXEC]], "musl's allocator; Wasmtime's pools and memories"),
    call!(SYS_mprotect = mprotect, [[NO_EXEC]], "guard pages; a guest's memory that grows"),
    call!(SYS_munmap = munmap, [], "musl's allocator"),
    call!(SYS_mremap = mremap, [], "musl's allocator: growing large pieces; what a page may do stays as it was"),
    call!(SYS_madvise = madvise, [], "giving memory back; huge pages"),
    call!(SYS_futex = futex, [], "locks and waiting threads"),
    call!(SYS_sched_yield = sched_yield, [], "a lock that is about to be free"),
    call!(SYS_rt_sigaction = rt_sigaction, [], "handlers of this process's own faults: stack overflow, guests' traps"),
    call!(SYS_rt_sigprocmask = rt_sigprocmask, [], "starting threads; aborting"),
    call!(SYS_rt_sigreturn = rt_sigreturn, [], "the end of a handler"),
    call!(SYS_sigaltstack = sigaltstack, [], "the handlers' stack"),
    call!(SYS_tkill = tkill, [[is(1, SIGABRT, "SIGABRT")]], "abort after a panic; Landlock keeps it inside"),
    call!(
        SYS_restart_syscall = restart_syscall,
        [],
        "a wait that a stop has interrupted, which the kernel goes on with"
    ),
    call!(SYS_getpid = getpid, [], "whether handed-down descriptors are meant for this process"),
    call!(SYS_gettid = gettid, [], "the name of a thread that panics; locks of standard output"),
    call!(
        SYS_clock_gettime = clock_gettime,
        [],
        "the time, where the kernel has no page for it; a thread's processor time"
    ),
    call!(SYS_clock_nanosleep = clock_nanosleep, [], "sleeping"),
    call!(SYS_nanosleep = nanosleep, [], "sleeping"),
    call!(SYS_getrandom = getrandom, [], "keys of hash tables; random numbers of guests"),
    call!(
        SYS_prctl = prctl,
        [[is(0, PR_GET_AUXV, "PR_GET_AUXV")]],
        "rustix looks up where the kernel has put its page with the time: what every process was told at its start"
    ),
    call!(SYS_exit = exit, [], "the end of a thread"),
    call!(SYS_exit_group = exit_group, [], "the end"),
];
