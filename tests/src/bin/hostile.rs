//! A hostile program in each role's sandbox: tries what is forbidden, each act in a process of its own, and what is
//! permitted. It exists only in the test image and for the tests.
//!
//! Without arguments it tries everything and prints one line for each act: role, act, what came of it. It fails if an act
//! that must not succeed did, or one that must succeed did not. With a role it tries that one alone; with a role, an act
//! and two addresses it is the process of that act.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use gaia_init::sandbox::worker::{self, Reach};
use gaia_init::sandbox::{self, Demand};
use nix::libc;

/// What the sandbox of a role is to be tried with.
const ROLES: [&str; 7] = ["control", "compile", "starting", "sealed", "sealed-http", "console", "log"];

/// The end of a process whose act succeeded, was refused, or could not be tried.
const DONE: u8 = 0;
const REFUSED: u8 = 10;
const NOT_TRIED: u8 = 11;
const BROKEN: u8 = 12;

/// What an act may come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// It must not succeed, whatever stops it.
    Stopped,
    /// It must succeed: without it the others' failures would say nothing.
    Done,
}

/// One thing to try: its name, in which roles it must succeed, and how. Elsewhere it must be stopped.
struct Act {
    name: &'static str,
    permitted: &'static [&'static str],
    /// The error of the kernel, or that there is none.
    attempt: fn(&Prepared) -> Result<(), i32>,
}

/// What is made before the sandbox is entered.
struct Prepared {
    /// A TCP port of this machine that answers and is not in any list, and one that is.
    stranger: SocketAddr,
    friend: SocketAddr,
    parent: i32,
    terminal: Option<std::fs::File>,
    page: *mut libc::c_void,
}

const PAGE: usize = 4096;
const EVERYONE: &[&str] = &ROLES;

fn checked(result: i64) -> Result<(), i32> {
    if result >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

/// A system call by its number, with up to six arguments.
fn call(number: i64, arguments: &[i64]) -> Result<(), i32> {
    let a = |i: usize| arguments.get(i).copied().unwrap_or(0);
    // SAFETY: this process tries what should not work. Pointers among the arguments are to what lives on in its caller;
    // what a call that succeeds does to this process ends with it.
    checked(unsafe { libc::syscall(number, a(0), a(1), a(2), a(3), a(4), a(5)) })
}

fn io(result: std::io::Result<()>) -> Result<(), i32> {
    result.map_err(|e| e.raw_os_error().unwrap_or(libc::EPERM))
}

fn connect(to: SocketAddr) -> Result<(), i32> {
    io(TcpStream::connect(to).map(drop))
}

fn map(protection: i32, shared_with: i32, flags: i32) -> Result<(), i32> {
    let protection = i64::from(protection);
    call(libc::SYS_mmap, &[0, PAGE.cast_signed() as i64, protection, i64::from(flags), i64::from(shared_with), 0])
}

fn protect(p: &Prepared, protection: i32) -> Result<(), i32> {
    call(libc::SYS_mprotect, &[p.page as i64, PAGE.cast_signed() as i64, i64::from(protection)])
}

fn pointer<T>(to: &T) -> i64 {
    std::ptr::from_ref(to) as i64
}

const ACTS: &[Act] = &[
    // ── files ──
    Act {
        name: "open a file to read",
        permitted: &[],
        attempt: |_| {
            io(std::fs::File::open("/bin/gaia-hostile").or_else(|_| std::fs::File::open("/etc/passwd")).map(drop))
        },
    },
    Act {
        name: "read /proc of another process",
        permitted: &[],
        attempt: |p| io(std::fs::read(format!("/proc/{}/environ", p.parent)).map(drop)),
    },
    Act { name: "list /proc", permitted: &[], attempt: |_| io(std::fs::read_dir("/proc").map(drop)) },
    Act { name: "write a file", permitted: &[], attempt: |_| io(std::fs::write("/tmp/gaia-hostile", "x")) },
    Act { name: "make a folder", permitted: &[], attempt: |_| io(std::fs::create_dir("/tmp/gaia-hostile-folder")) },
    Act { name: "remove a file", permitted: &[], attempt: |_| io(std::fs::remove_file("/tmp/gaia-hostile-victim")) },
    Act {
        name: "change a mode",
        permitted: &[],
        attempt: |_| call(libc::SYS_chmod, &[c"/tmp".as_ptr() as i64, 0o777]),
    },
    Act {
        name: "mount",
        permitted: &[],
        attempt: |_| {
            call(libc::SYS_mount, &[c"none".as_ptr() as i64, c"/tmp".as_ptr() as i64, c"tmpfs".as_ptr() as i64, 0, 0])
        },
    },
    Act { name: "change the root", permitted: &[], attempt: |_| call(libc::SYS_chroot, &[c"/tmp".as_ptr() as i64]) },
    // ── processes ──
    Act {
        name: "exec",
        permitted: &[],
        attempt: |_| {
            let me = CString::new("/proc/self/exe").unwrap_or_default();
            let argv = [me.as_ptr(), std::ptr::null()];
            call(libc::SYS_execve, &[me.as_ptr() as i64, argv.as_ptr() as i64, 0])
        },
    },
    Act {
        name: "exec from memory",
        permitted: &[],
        attempt: |_| call(libc::SYS_execveat, &[0, c"".as_ptr() as i64, 0, 0, i64::from(libc::AT_EMPTY_PATH)]),
    },
    Act { name: "fork", permitted: &[], attempt: |_| call(libc::SYS_fork, &[]) },
    Act { name: "vfork by clone", permitted: &[], attempt: |_| call(libc::SYS_clone, &[i64::from(libc::SIGCHLD)]) },
    Act { name: "clone3", permitted: &[], attempt: |_| call(libc::SYS_clone3, &[0, 0]) },
    Act {
        name: "start a thread",
        permitted: &["starting"],
        attempt: |_| io(std::thread::Builder::new().spawn(|| ()).map(|t| drop(t.join()))),
    },
    Act { name: "kill its parent", permitted: &[], attempt: |p| call(libc::SYS_kill, &[i64::from(p.parent), 0]) },
    Act {
        name: "signal its parent's thread",
        permitted: &[],
        attempt: |p| call(libc::SYS_tkill, &[i64::from(p.parent), i64::from(libc::SIGCONT)]),
    },
    Act {
        name: "trace its parent",
        permitted: &[],
        attempt: |p| call(libc::SYS_ptrace, &[i64::from(libc::PTRACE_SEIZE), i64::from(p.parent), 0, 0]),
    },
    Act {
        name: "read its parent's memory",
        permitted: &[],
        attempt: |p| {
            let mut b = [0_u8; 8];
            let l = libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 8 };
            let r = libc::iovec { iov_base: p.page, iov_len: 8 };
            call(libc::SYS_process_vm_readv, &[i64::from(p.parent), pointer(&l), 1, pointer(&r), 1, 0])
        },
    },
    Act { name: "unshare", permitted: &[], attempt: |_| call(libc::SYS_unshare, &[i64::from(libc::CLONE_NEWUSER)]) },
    Act {
        name: "take its parent's limits",
        permitted: &[],
        attempt: |p| call(libc::SYS_prlimit64, &[i64::from(p.parent), 7, 0, 0]),
    },
    Act { name: "become another user", permitted: &[], attempt: |_| call(libc::SYS_setuid, &[12345]) },
    Act { name: "change its personality", permitted: &[], attempt: |_| call(libc::SYS_personality, &[0x040_0000]) },
    // ── the network ──
    Act { name: "connect to a port that is not listed", permitted: &[], attempt: |p| connect(p.stranger) },
    Act {
        name: "connect by sending, past Landlock",
        permitted: &[],
        attempt: |p| {
            let SocketAddr::V4(to) = p.stranger else { return Err(libc::EAFNOSUPPORT) };
            let mut address = [0_u8; 16];
            address[0] = 2;
            address[2..4].copy_from_slice(&to.port().to_be_bytes());
            address[4..8].copy_from_slice(&to.ip().octets());
            let kind = rustix::net::SocketType::STREAM;
            let socket = rustix::net::socket(rustix::net::AddressFamily::INET, kind, None);
            let socket = socket.map_err(rustix::io::Errno::raw_os_error)?;
            let flags = i64::from(libc::MSG_FASTOPEN);
            call(libc::SYS_sendto, &[i64::from(socket.as_raw_fd()), pointer(&b'x'), 1, flags, pointer(&address), 16])
        },
    },
    Act {
        name: "connect to a port that is listed",
        permitted: &["control", "sealed-http"],
        attempt: |p| connect(p.friend),
    },
    Act { name: "listen", permitted: &[], attempt: |_| io(TcpListener::bind("127.0.0.1:0").map(drop)) },
    Act {
        name: "send a datagram",
        permitted: &["control"],
        attempt: |p| io(std::net::UdpSocket::bind("127.0.0.1:0").and_then(|s| s.send_to(b"x", p.stranger)).map(drop)),
    },
    Act {
        name: "make a raw socket",
        permitted: &[],
        attempt: |_| call(libc::SYS_socket, &[i64::from(libc::AF_INET), i64::from(libc::SOCK_RAW), 1]),
    },
    Act {
        name: "make a packet socket",
        permitted: &[],
        attempt: |_| call(libc::SYS_socket, &[i64::from(libc::AF_PACKET), i64::from(libc::SOCK_RAW), 0]),
    },
    Act {
        name: "make a netlink socket",
        permitted: &[],
        attempt: |_| call(libc::SYS_socket, &[i64::from(libc::AF_NETLINK), i64::from(libc::SOCK_RAW), 0]),
    },
    Act {
        name: "make a multipath socket",
        permitted: &[],
        attempt: |_| call(libc::SYS_socket, &[i64::from(libc::AF_INET), i64::from(libc::SOCK_STREAM), 262]),
    },
    Act {
        name: "make a Unix socket",
        permitted: &["console", "log"],
        attempt: |_| call(libc::SYS_socket, &[i64::from(libc::AF_UNIX), i64::from(libc::SOCK_STREAM), 0]),
    },
    Act {
        name: "make a vsock",
        permitted: &[],
        attempt: |_| call(libc::SYS_socket, &[40, i64::from(libc::SOCK_STREAM), 0]),
    },
    // ── executable memory ──
    Act {
        name: "map writable and executable",
        permitted: &[],
        attempt: |_| {
            map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, -1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        },
    },
    Act {
        name: "map executable",
        permitted: &[],
        attempt: |_| map(libc::PROT_READ | libc::PROT_EXEC, -1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
    },
    Act {
        name: "make a page executable",
        permitted: &["compile", "starting"],
        attempt: |p| protect(p, libc::PROT_READ | libc::PROT_EXEC),
    },
    Act {
        name: "make a page writable and executable",
        permitted: &[],
        attempt: |p| protect(p, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC),
    },
    Act { name: "make a page executable alone", permitted: &[], attempt: |p| protect(p, libc::PROT_EXEC) },
    Act {
        name: "make a page executable by key",
        permitted: &[],
        attempt: |p| {
            call(
                libc::SYS_pkey_mprotect,
                &[p.page as i64, PAGE.cast_signed() as i64, i64::from(libc::PROT_READ | libc::PROT_EXEC), -1],
            )
        },
    },
    Act {
        name: "map a file in memory executable",
        permitted: &[],
        attempt: |_| {
            let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC)
                .map_err(rustix::io::Errno::raw_os_error)?;
            map(libc::PROT_READ | libc::PROT_EXEC, fd.as_raw_fd(), libc::MAP_SHARED)
        },
    },
    Act {
        name: "attach shared memory executable",
        permitted: &[],
        attempt: |_| call(libc::SYS_shmat, &[0, 0, 0o100_000]),
    },
    // ── the kernel ──
    Act {
        name: "set up an io_uring",
        permitted: &[],
        attempt: |_| {
            let p = [0_u8; 256];
            call(libc::SYS_io_uring_setup, &[4, pointer(&p)])
        },
    },
    Act {
        name: "open a performance counter",
        permitted: &[],
        attempt: |_| {
            let mut a = [0_u64; 16];
            a[0] = (128 << 32) | 1;
            call(libc::SYS_perf_event_open, &[pointer(&a), 0, -1, -1, 0])
        },
    },
    Act {
        name: "load a BPF program",
        permitted: &[],
        attempt: |_| {
            let a = [0_u64; 16];
            call(libc::SYS_bpf, &[0, pointer(&a), 128])
        },
    },
    Act { name: "handle faults of others", permitted: &[], attempt: |_| call(libc::SYS_userfaultfd, &[1]) },
    Act { name: "look for keys", permitted: &[], attempt: |_| call(libc::SYS_keyctl, &[0, -3, 0]) },
    Act { name: "reboot", permitted: &[], attempt: |_| call(libc::SYS_reboot, &[0, 0, 0, 0]) },
    Act { name: "load a module", permitted: &[], attempt: |_| call(libc::SYS_init_module, &[0, 0, 0]) },
    Act { name: "read the kernel's log", permitted: &[], attempt: |_| call(libc::SYS_syslog, &[3, 0, 0]) },
    Act {
        name: "set the time",
        permitted: &[],
        attempt: |_| {
            let t = [0_i64; 2];
            call(libc::SYS_clock_settime, &[0, pointer(&t)])
        },
    },
    Act {
        name: "type into a terminal",
        permitted: &[],
        attempt: |p| {
            p.terminal.as_ref().map_or(Err(libc::ENOTTY), |t| {
                call(libc::SYS_ioctl, &[i64::from(t.as_raw_fd()), 0x5412, pointer(&b'x')])
            })
        },
    },
    Act {
        name: "call the kernel by its 32-bit door",
        permitted: &[],
        attempt: |_| call(0x4000_0000 | libc::SYS_getpid, &[]),
    },
    Act { name: "set no_new_privs", permitted: &["starting"], attempt: |_| call(libc::SYS_prctl, &[38, 1, 0, 0, 0]) },
    // ── what everyone may, or the rest would say nothing ──
    Act { name: "write to standard output", permitted: EVERYONE, attempt: |_| io(std::io::stdout().write_all(b"")) },
    Act {
        name: "have memory",
        permitted: EVERYONE,
        attempt: |_| map(libc::PROT_READ | libc::PROT_WRITE, -1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
    },
    Act { name: "make a page readable", permitted: EVERYONE, attempt: |p| protect(p, libc::PROT_READ) },
    Act {
        name: "know the time",
        permitted: EVERYONE,
        attempt: |_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            let t = [0_i64; 2];
            call(libc::SYS_clock_gettime, &[0, pointer(&t)])
        },
    },
    Act {
        name: "have random bytes",
        permitted: EVERYONE,
        attempt: |_| {
            let b = [0_u8; 8];
            call(libc::SYS_getrandom, &[pointer(&b), 8, 0])
        },
    },
    Act {
        name: "make a file in memory",
        permitted: &["control", "compile", "starting", "sealed", "sealed-http"],
        attempt: |_| {
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC)
                .map(drop)
                .map_err(rustix::io::Errno::raw_os_error)
        },
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => try_all(&ROLES),
        [role] => try_all(&[role.as_str()]),
        [role, act, stranger, friend] => ExitCode::from(try_one(role, act, stranger, friend)),
        _ => ExitCode::from(BROKEN),
    }
}

/// The process of one act.
fn try_one(role: &str, name: &str, stranger: &str, friend: &str) -> u8 {
    let (Some(act), Ok(stranger), Ok(friend)) =
        (ACTS.iter().find(|act| act.name == name), stranger.parse(), friend.parse::<SocketAddr>())
    else {
        return BROKEN;
    };
    // SAFETY: a fresh anonymous page; its address is used by nothing else.
    let page = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    let parent = std::os::unix::process::parent_id().cast_signed();
    let terminal = std::fs::File::options().read(true).write(true).open("/dev/ptmx").ok();
    let prepared = Prepared { stranger, friend, parent, terminal, page };
    let ports = BTreeSet::from([friend.port()]);
    let nothing = Reach::default();
    let http = Reach { http: true, ports: ports.clone(), ..Reach::default() };
    let whole = Demand::Whole;
    let none = BTreeSet::new();
    let entered = match role {
        "control" => sandbox::enter(&sandbox::control::SANDBOX, &ports, whole),
        "compile" => sandbox::enter(&sandbox::compile::SANDBOX, &none, whole),
        "console" => sandbox::enter(&sandbox::console::SANDBOX, &none, whole),
        "log" => sandbox::enter(&sandbox::log::SANDBOX, &none, whole),
        "starting" => worker::enter(&nothing, whole),
        "sealed" => sealed(&nothing),
        "sealed-http" => sealed(&http),
        _ => return BROKEN,
    };
    if let Err(e) = entered {
        let _ = std::io::stderr().write_all(format!("{role}: {e}\n").as_bytes());
        return NOT_TRIED;
    }
    match (act.attempt)(&prepared) {
        Ok(()) => DONE,
        Err(errno) => {
            let _ = std::io::stdout().write_all(std::io::Error::from_raw_os_error(errno).to_string().as_bytes());
            REFUSED
        }
    }
}

fn sealed(reach: &Reach) -> Result<(), sandbox::Error> {
    worker::enter(reach, Demand::Whole)?;
    worker::close(reach, Demand::Whole)
}

/// Tries every act in each of these roles, and says what came of it.
fn try_all(roles: &[&str]) -> ExitCode {
    let bind = || TcpListener::bind("127.0.0.1:0").and_then(|l| Ok((l.local_addr()?, l)));
    let (Ok((stranger, _one)), Ok((friend, _two))) = (bind(), bind()) else {
        let _ = std::io::stderr().write_all(b"no address to connect to\n");
        return ExitCode::from(BROKEN);
    };
    let _ = std::fs::write("/tmp/gaia-hostile-victim", "");
    let mut wrong = 0;
    for role in roles.iter().copied() {
        for act in ACTS {
            let wanted = if act.permitted.contains(&role) { Wanted::Done } else { Wanted::Stopped };
            let (came, ok) = match outcome(role, act.name, &stranger.to_string(), &friend.to_string()) {
                Ok((status, said)) => judged(status, &said, wanted),
                Err(e) => (format!("could not be started: {e}"), false),
            };
            wrong += usize::from(!ok);
            let mark = if ok { "ok   " } else { "WRONG" };
            let line = format!("{mark} {role:<12} {:<40} {came}\n", act.name);
            let _ = std::io::stdout().write_all(line.as_bytes());
        }
    }
    let _ = std::fs::remove_file("/tmp/gaia-hostile-victim");
    let _ = std::io::stdout()
        .write_all(format!("{} acts in {} sandboxes, {wrong} wrong\n", ACTS.len(), roles.len()).as_bytes());
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn outcome(role: &str, act: &str, stranger: &str, friend: &str) -> std::io::Result<(ExitStatus, String)> {
    let output = Command::new("/proc/self/exe").args([role, act, stranger, friend]).stdin(Stdio::null()).output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status, String::from_utf8_lossy(&said).trim().to_owned()))
}

/// What came of an act in words, and whether that was wanted.
fn judged(status: ExitStatus, said: &str, wanted: Wanted) -> (String, bool) {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match (status.signal(), code) {
        (Some(libc::SIGSYS), _) => ("seccomp ended it".into(), wanted == Wanted::Stopped),
        (Some(signal), _) => (format!("ended by signal {signal}"), false),
        (None, Some(DONE)) => ("done".into(), wanted == Wanted::Done),
        (None, Some(REFUSED)) => (format!("refused: {said}"), wanted == Wanted::Stopped),
        (None, code) => (format!("not tried ({code:?}): {said}"), false),
    }
}
