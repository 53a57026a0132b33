//! What a request costs, counted instead of timed: system calls and page faults of the worker. These need no virtual machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use gaia_tests::workstation::Folder;
use nix::libc;

/// Requests, one after the other on one connection.
const REQUESTS: u32 = 500;

/// Asks so often on this connection, and reads each answer before it asks again.
fn ask(stream: &mut TcpStream, path: &str, requests: u32) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut answer = Vec::new();
    for _ in 0..requests {
        stream.write_all(request.as_bytes()).unwrap();
        answer.clear();
        while !answer.ends_with(b"hello\n") {
            let mut piece = [0; 1024];
            let read = stream.read(&mut piece).unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&piece[..read]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
}

/// The page faults of a process that the kernel could settle without a disk.
fn faults(pid: i64) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    after_name.split(' ').nth(7).unwrap().parse().unwrap()
}

/// `ptrace` without data.
fn ptrace(request: libc::c_uint, thread: i32, data: usize) -> libc::c_long {
    // SAFETY: these requests read and write no memory of this process.
    unsafe { libc::ptrace(request.cast_signed(), thread, 0_usize, data) }
}

/// Waits for the thread to stop: its status; `None` if it has not.
fn stopped(thread: i32, flags: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: writes to `status` alone.
    let of = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | flags) };
    (of == thread).then_some(status)
}

/// The system calls that the first thread of a process makes during `work`, each with how often.
fn calls(pid: i64, work: impl FnOnce() + Send) -> BTreeMap<u64, u32> {
    // Stops at a system call are told from others by this bit.
    const SYSCALL: i32 = libc::SIGTRAP | 0x80;
    let thread = i32::try_from(pid).unwrap();
    assert_eq!(ptrace(libc::PTRACE_SEIZE as libc::c_uint, thread, 1), 0, "{}", std::io::Error::last_os_error());
    assert_eq!(ptrace(libc::PTRACE_INTERRUPT as libc::c_uint, thread, 0), 0);
    stopped(thread, 0).unwrap();
    ptrace(libc::PTRACE_SYSCALL as libc::c_uint, thread, 0);
    let over = AtomicBool::new(false);
    let mut calls = BTreeMap::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            work();
            over.store(true, Relaxed);
        });
        while !over.load(Relaxed) {
            let Some(status) = stopped(thread, libc::WNOHANG) else {
                std::thread::yield_now();
                continue;
            };
            assert!(libc::WIFSTOPPED(status), "the worker has ended: {status}");
            let mut signal = libc::WSTOPSIG(status);
            if signal == SYSCALL {
                // SAFETY: plain numbers, for all of which zero is one.
                let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
                // SAFETY: writes to `registers` alone.
                unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, 0_usize, &raw mut registers) };
                // What the result is before the call has begun.
                if registers.rax.cast_signed() == -i64::from(libc::ENOSYS) {
                    *calls.entry(registers.orig_rax).or_default() += 1;
                }
            }
            if signal == SYSCALL || status >> 16 != 0 {
                signal = 0;
            }
            ptrace(libc::PTRACE_SYSCALL as libc::c_uint, thread, usize::try_from(signal).unwrap());
        }
    });
    ptrace(libc::PTRACE_INTERRUPT as libc::c_uint, thread, 0);
    stopped(thread, 0).unwrap();
    ptrace(libc::PTRACE_DETACH as libc::c_uint, thread, 0);
    calls
}

const NAMES: &[(libc::c_long, &str)] = &[
    (libc::SYS_epoll_pwait, "epoll_pwait"),
    (libc::SYS_epoll_wait, "epoll_wait"),
    (libc::SYS_recvfrom, "recvfrom"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_clock_gettime, "clock_gettime"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_brk, "brk"),
    (libc::SYS_mremap, "mremap"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_getrandom, "getrandom"),
];

/// Would miss: an allocation that goes to the kernel, a page that is new for each request, one more system call on its path.
#[test]
fn a_warm_request_makes_few_system_calls_and_takes_no_memory_from_the_kernel() {
    let graph = "[brane.pooled]\nimage = \"file:./hello.wasm\"\nreplicas = 4\n\
                 [brane.ephemeral]\nimage = \"file:./hello.wasm\"\nreplicas = 4\nexecution = { lifecycle = \"ephemeral\" }\n";
    let run = Folder::with(graph).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    run.until("pooled", "ready", |n| n == 4).unwrap();
    let worker = run.worker().unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", run.port)).unwrap();
    stream.set_nodelay(true).unwrap();
    for brane in ["pooled", "ephemeral"] {
        let path = format!("/{brane}");
        ask(&mut stream, &path, 100);
        let before = faults(worker);
        ask(&mut stream, &path, REQUESTS);
        let of_each = |number: u32| f64::from(number) / f64::from(REQUESTS);
        let faults = of_each(faults(worker) - before);
        let calls = calls(worker, || ask(&mut stream, &path, REQUESTS));
        let number = |call: libc::c_long| of_each(calls.get(&call.cast_unsigned()).copied().unwrap_or(0));
        let mut table = format!("{brane}, of each request: {faults:.2} page faults");
        for (call, times) in &calls {
            let name = NAMES.iter().find(|(number, _)| number.cast_unsigned() == *call);
            let name = name.map_or_else(|| format!("call {call}"), |(_, name)| (*name).to_owned());
            let _ = write!(table, ", {:.2} {name}", of_each(*times));
        }
        println!("{table}");
        // One each, and a little for what is due by time and not by request: beats, keys of hash tables.
        for call in [libc::SYS_epoll_pwait, libc::SYS_recvfrom, libc::SYS_writev] {
            assert!((0.98..=1.05).contains(&number(call)), "{table}");
        }
        for call in [libc::SYS_mmap, libc::SYS_munmap, libc::SYS_brk, libc::SYS_mremap, libc::SYS_madvise] {
            assert!(number(call) <= 0.02, "{table}");
        }
        // What tells control that there is something to read depends on how soon it reads, and so on the machine's load: 0.08 to 0.3.
        let all = of_each(calls.values().sum());
        assert!(all - number(libc::SYS_sendmsg) <= 3.1 && all <= 3.5, "{all:.2}: {table}");
        assert!(faults <= 0.2, "{table}");
    }
}
