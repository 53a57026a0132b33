//! A hostile program in each role's sandbox: tries what is forbidden, each act in a process of its own, and what is
//! permitted. It exists only in the test image and for the tests.
//!
//! Without arguments it tries everything and prints one line for each act: role, act, what came of it. It fails if an act
//! that must not succeed did, or one that must succeed did not. With a role it tries that one alone. With `layers` it tries
//! everything with each layer of the sandboxes alone, the others off, and prints a table of what that layer stops by itself.
//! With `keep` and a role it does what control's store does in the folder that it was handed.
//! With `bits` it says which secure bits it was started with. With a role, layers, an act, two addresses and a folder it is the process of that act.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io::IoSlice;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use gaia_init::sandbox::worker::{self, Reach};
use gaia_init::sandbox::{self, Demand, Layer, Sandbox};
use gaia_init::spawn;
use nix::libc;

/// What the sandbox of a role is to be tried with.
const ROLES: [&str; 8] = ["control", "compile", "starting", "sealed", "sealed-http", "sealed-net", "console", "log"];
/// As whom, where this is started by root: nobody else is.
const USER: u32 = 64_999;

/// Which layers of a role's sandbox an act meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layers {
    /// None: what comes of the act then is what a layer's work is held against.
    None,
    /// A user of its own, no group, no capability, secure bits locked, `no_new_privs`: what init does before a role's program begins,
    /// and what the role does again.
    Privileges,
    /// Landlock alone.
    Landlock,
    /// Seccomp alone.
    Seccomp,
    /// All, as the role has them.
    All,
}

impl Layers {
    const EACH: [Self; 5] = [Self::None, Self::Privileges, Self::Landlock, Self::Seccomp, Self::All];

    fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Privileges => "privileges",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::All => "all",
        }
    }
}

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
    /// A folder of the parent's with a file `victim`.
    folder: PathBuf,
    /// That folder and that file, open.
    held: std::fs::File,
    victim: std::fs::File,
    /// A socket that listens, and two that are connected.
    listener: TcpListener,
    channel: (UnixStream, UnixStream),
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
    Act { name: "write a file", permitted: &[], attempt: |p| io(std::fs::write(p.folder.join("new"), "x")) },
    Act { name: "make a folder", permitted: &[], attempt: |p| io(std::fs::create_dir(p.folder.join("new"))) },
    Act { name: "remove a file", permitted: &[], attempt: |p| io(std::fs::remove_file(p.folder.join("victim"))) },
    Act {
        name: "change a mode",
        permitted: &[],
        attempt: |p| {
            let path = CString::new(p.folder.join("victim").into_os_string().into_encoded_bytes()).unwrap_or_default();
            call(libc::SYS_chmod, &[path.as_ptr() as i64, 0o600])
        },
    },
    // With the calls that control keeps its files with, in a folder that is not control's.
    Act {
        name: "make a file in an open folder",
        permitted: &[],
        attempt: |p| {
            let flags = i64::from(libc::O_CREAT | libc::O_WRONLY);
            call(libc::SYS_openat, &[p.held.as_raw_fd().into(), c"new".as_ptr() as i64, flags, 0o600])
        },
    },
    Act {
        name: "make a folder in an open folder",
        permitted: &[],
        attempt: |p| call(libc::SYS_mkdirat, &[p.held.as_raw_fd().into(), c"new".as_ptr() as i64, 0o700]),
    },
    Act {
        name: "remove a file of an open folder",
        permitted: &[],
        attempt: |p| call(libc::SYS_unlinkat, &[p.held.as_raw_fd().into(), c"victim".as_ptr() as i64, 0]),
    },
    Act {
        name: "move a file of an open folder",
        permitted: &[],
        attempt: |p| {
            let held = i64::from(p.held.as_raw_fd());
            call(libc::SYS_renameat, &[held, c"victim".as_ptr() as i64, held, c"new".as_ptr() as i64])
        },
    },
    Act {
        name: "change the mode of an open file",
        permitted: &[],
        attempt: |p| call(libc::SYS_fchmod, &[p.victim.as_raw_fd().into(), 0o600]),
    },
    // A kind that no kernel has: whoever may mount is told so.
    Act {
        name: "mount",
        permitted: &[],
        attempt: |_| {
            call(libc::SYS_mount, &[c"none".as_ptr() as i64, c"/".as_ptr() as i64, c"gaia-none".as_ptr() as i64, 0, 0])
        },
    },
    Act { name: "change the root", permitted: &[], attempt: |_| call(libc::SYS_chroot, &[c"/".as_ptr() as i64]) },
    // ── processes ──
    Act {
        name: "exec",
        permitted: &[],
        attempt: |_| {
            let me = CString::new("/proc/self/exe").unwrap_or_default();
            let argv = [me.as_ptr(), c"ran".as_ptr(), std::ptr::null()];
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
        permitted: &["control", "starting"],
        attempt: |_| io(std::thread::Builder::new().spawn(|| ()).map(|t| drop(t.join()))),
    },
    Act { name: "kill its parent", permitted: &[], attempt: |p| call(libc::SYS_kill, &[i64::from(p.parent), 0]) },
    Act {
        name: "signal its parent's thread",
        permitted: &[],
        attempt: |p| call(libc::SYS_tkill, &[i64::from(p.parent), i64::from(libc::SIGCONT)]),
    },
    // A signal that each role may send to itself. The parent does not mind it.
    Act {
        name: "abort its parent",
        permitted: &[],
        attempt: |p| call(libc::SYS_tkill, &[i64::from(p.parent), i64::from(libc::SIGABRT)]),
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
    Act {
        name: "unlock its secure bits",
        permitted: &[],
        attempt: |_| call(libc::SYS_prctl, &[i64::from(libc::PR_SET_SECUREBITS), 0]),
    },
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
        permitted: &["control", "sealed-http", "sealed-net"],
        attempt: |p| connect(p.friend),
    },
    Act { name: "listen", permitted: &[], attempt: |_| io(TcpListener::bind("127.0.0.1:0").map(drop)) },
    Act {
        name: "send a datagram",
        permitted: &["control", "sealed-net"],
        attempt: |p| io(std::net::UdpSocket::bind("127.0.0.1:0").and_then(|s| s.send_to(b"x", p.stranger)).map(drop)),
    },
    Act {
        name: "take a port that only root may have",
        permitted: &[],
        attempt: |_| io(std::net::UdpSocket::bind("127.0.0.1:999").map(drop)),
    },
    Act {
        name: "bind to a port of the kernel's choice",
        permitted: &["sealed-net"],
        attempt: |_| {
            let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
            let address = SocketAddr::from(([127, 0, 0, 1], 0));
            let bound = socket.and_then(|socket| rustix::net::bind(&socket, &address));
            bound.map_err(rustix::io::Errno::raw_os_error)
        },
    },
    Act {
        name: "connect to an abstract socket",
        permitted: &[],
        attempt: |p| io(abstract_socket(p.parent).and_then(|a| UnixStream::connect_addr(&a)).map(drop)),
    },
    // Nobody waits there: that the kernel says so is what is permitted.
    Act {
        name: "accept on a socket that it was given",
        permitted: &["control", "starting", "sealed", "sealed-http", "sealed-net"],
        attempt: |p| match p.listener.accept() {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            other => io(other.map(drop)),
        },
    },
    Act {
        name: "write a message on a channel that it was given",
        permitted: &["control", "compile", "starting", "sealed", "sealed-http", "sealed-net"],
        attempt: |p| {
            let (words, flags) = ([IoSlice::new(b"x")], rustix::net::SendFlags::empty());
            let mut nothing = rustix::net::SendAncillaryBuffer::default();
            let sent = rustix::net::sendmsg(&p.channel.0, &words, &mut nothing, flags);
            sent.map(drop).map_err(rustix::io::Errno::raw_os_error)
        },
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
    // To what it is: whoever may set it does no harm.
    Act {
        name: "set the time",
        permitted: &[],
        attempt: |_| {
            let t = [0_i64; 2];
            call(libc::SYS_clock_gettime, &[0, pointer(&t)])?;
            call(libc::SYS_clock_settime, &[0, pointer(&t)])
        },
    },
    Act {
        name: "type into a terminal",
        permitted: &[],
        attempt: |p| {
            // Where there is none, standard input has to do for one.
            let terminal = p.terminal.as_ref().map_or(0, std::os::fd::AsRawFd::as_raw_fd);
            call(libc::SYS_ioctl, &[i64::from(terminal), 0x5412, pointer(&b'x')])
        },
    },
    Act { name: "look at a terminal's modes", permitted: &["console", "log"], attempt: |p| modes(p, 0x802c_542a) },
    Act { name: "set a terminal's modes", permitted: &[], attempt: |p| modes(p, 0x402c_542b) },
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
        name: "know every clock",
        permitted: EVERYONE,
        attempt: |_| {
            let t = [0_i64; 2];
            // From CLOCK_REALTIME to CLOCK_BOOTTIME, by the kernel and not by its page.
            (0..=7).try_for_each(|clock| call(libc::SYS_clock_gettime, &[clock, pointer(&t)]))
        },
    },
    Act {
        name: "panic, say so, and go on",
        permitted: EVERYONE,
        attempt: |_| {
            let nothing: Option<u8> = std::hint::black_box(None);
            #[expect(clippy::expect_used, reason = "the panic is what is to be tried")]
            let caught = std::panic::catch_unwind(|| nothing.expect("a panic that is caught"));
            if caught.is_err() { Ok(()) } else { Err(0) }
        },
    },
    // It ends by the signal that a host's panic ends with, and that is what is permitted.
    Act { name: "abort", permitted: EVERYONE, attempt: |_| std::process::abort() },
    Act { name: "take memory, grow it, trim it, give it back", permitted: EVERYONE, attempt: |_| churn() },
    Act {
        name: "make an event loop",
        permitted: &["control", "starting", "sealed", "sealed-http", "sealed-net", "console", "log"],
        attempt: |_| call(libc::SYS_epoll_create1, &[i64::from(libc::EPOLL_CLOEXEC)]),
    },
    Act {
        name: "make a file in memory",
        permitted: &["control", "compile", "starting", "sealed", "sealed-http", "sealed-net"],
        attempt: |_| {
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC)
                .map(drop)
                .map_err(rustix::io::Errno::raw_os_error)
        },
    },
];

/// `TCGETS2` or `TCSETS2`. Where there is no terminal, the kernel says so, and was asked.
fn modes(prepared: &Prepared, request: i64) -> Result<(), i32> {
    let terminal = prepared.terminal.as_ref().map_or(0, std::os::fd::AsRawFd::as_raw_fd);
    let modes = [0_u8; 64];
    match call(libc::SYS_ioctl, &[i64::from(terminal), request, pointer(&modes)]) {
        Err(libc::ENOTTY) => Ok(()),
        other => other,
    }
}

/// All that an allocator asks the kernel for: pieces of every size, grown where they are and elsewhere, shrunk, and given
/// back in an order that leaves whole pages free.
fn churn() -> Result<(), i32> {
    let mut large = vec![1_u8; 16 << 20];
    large.resize(64 << 20, 2);
    large.truncate(1 << 20);
    large.shrink_to_fit();
    let mut small: Vec<Vec<u8>> = (0..20_000).map(|n| vec![3; 16 + n % 4096]).collect();
    let mut number = 0;
    small.retain(|_| {
        number += 1;
        number % 2 == 0
    });
    let left = std::hint::black_box(&large).len() + std::hint::black_box(&small).len();
    if left == (1 << 20) + 10_000 { Ok(()) } else { Err(0) }
}

fn abstract_socket(pid: i32) -> std::io::Result<std::os::unix::net::SocketAddr> {
    std::os::unix::net::SocketAddr::from_abstract_name(format!("gaia-hostile-{pid}"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        // Whoever was run by an act.
        ["ran"] => ExitCode::from(DONE),
        ["keep", role] => ExitCode::from(keeps(role).map_or_else(
            |e| {
                say(&format!("{role}: {e}"));
                BROKEN
            },
            |()| DONE,
        )),
        ["bits"] => ExitCode::from(secure_bits().map_or(BROKEN, |()| DONE)),
        [role, layers, act, stranger, friend, folder] => {
            ExitCode::from(try_one(role, layers, act, [stranger, friend], folder).unwrap_or(BROKEN))
        }
        [] | [_] => {
            let outcome = Tries::prepare().and_then(|tries| match arguments.as_slice() {
                [] => tries.all(&ROLES),
                ["layers"] => tries.layers(),
                roles => tries.all(roles),
            });
            match outcome {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::FAILURE,
                Err(e) => {
                    let _ = std::io::stderr().write_all(format!("{e}\n").as_bytes());
                    ExitCode::from(BROKEN)
                }
            }
        }
        _ => ExitCode::from(BROKEN),
    }
}

/// The process of one act. Nothing, if it was called with what does not exist.
fn try_one(role: &str, layers: &str, name: &str, addresses: [&str; 2], folder: &str) -> Option<u8> {
    let act = ACTS.iter().find(|act| act.name == name)?;
    let layers = Layers::EACH.into_iter().find(|l| l.word() == layers)?;
    let [stranger, friend] = addresses.map(|address| address.parse::<SocketAddr>().ok());
    let (stranger, friend) = (stranger?, friend?);
    // SAFETY: a fresh anonymous page; its address is used by nothing else.
    let page = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    let parent = std::os::unix::process::parent_id().cast_signed();
    let terminal = std::fs::File::options().read(true).write(true).open("/dev/ptmx").ok();
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|l| l.set_nonblocking(true).map(|()| l)).ok()?;
    let channel = UnixStream::pair().ok()?;
    let folder = PathBuf::from(folder);
    let (held, victim) = (std::fs::File::open(&folder).ok()?, std::fs::File::open(folder.join("victim")).ok()?);
    let prepared = Prepared { stranger, friend, parent, terminal, page, folder, held, victim, listener, channel };
    if let Err(e) = entered(role, layers, friend.port()) {
        let _ = std::io::stderr().write_all(format!("{role}: {e}\n").as_bytes());
        return Some(NOT_TRIED);
    }
    Some(match (act.attempt)(&prepared) {
        Ok(()) => DONE,
        Err(errno) => {
            let _ = std::io::stdout().write_all(std::io::Error::from_raw_os_error(errno).to_string().as_bytes());
            REFUSED
        }
    })
}

/// What control's store does, in the sandbox of a role, beneath the folder that was handed down as `data`: all of it on a
/// thread of its own. Started as init starts a role.
fn keeps(role: &str) -> Result<(), String> {
    let mut descriptors = gaia_init::descriptors::Descriptors::inherit().map_err(|e| e.to_string())?;
    let folder = descriptors.take("data").map_err(|e| e.to_string())?;
    // Some port: none is connected to.
    entered(role, Layers::Landlock, 53)?;
    entered(role, Layers::Seccomp, 53)?;
    let kept = || keep(&folder).map_err(|(what, e)| format!("{what}: {e}"));
    let thread = std::thread::Builder::new().name("store".into());
    let kept = std::thread::scope(|scope| match thread.spawn_scoped(scope, kept) {
        Ok(store) => store.join().unwrap_or_else(|_| Err("a panic".into())),
        Err(e) => Err(format!("a thread: {e}")),
    })?;
    say(&format!("{role} keeps {kept}"));
    Ok(())
}

/// Each call once that a store needs, and what a store must not be able to do.
fn keep(folder: &OwnedFd) -> Result<String, (&'static str, rustix::io::Errno)> {
    use rustix::fs::{self as f, AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags};
    let at = |what: &'static str| move |e| (what, e);
    let (rw, dir) =
        (OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, OFlags::DIRECTORY | OFlags::CLOEXEC);
    let mode = Mode::RUSR | Mode::WUSR;
    f::mkdirat(folder, "hostile", Mode::RWXU).map_err(at("mkdirat"))?;
    let own = f::openat(folder, "hostile", dir, Mode::empty()).map_err(at("openat of a folder"))?;
    let file = f::openat(&own, "new", rw, mode).map_err(at("openat to make a file"))?;
    // Not the folder: the store has locked that.
    f::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(at("flock"))?;
    f::fallocate(&file, FallocateFlags::empty(), 0, 8192).map_err(at("fallocate"))?;
    rustix::io::write(&file, b"written").map_err(at("write"))?;
    rustix::io::pwrite(&file, b"W", 0).map_err(at("pwrite"))?;
    f::ftruncate(&file, 7).map_err(at("ftruncate"))?;
    f::fdatasync(&file).map_err(at("fdatasync"))?;
    f::fsync(&file).map_err(at("fsync"))?;
    f::fchmod(&file, Mode::RUSR).map_err(at("fchmod"))?;
    f::renameat(&own, "new", &own, "whole").map_err(at("renameat"))?;
    f::mkdirat(&own, "deep", Mode::RWXU).map_err(at("mkdirat"))?;
    let deep = f::openat(&own, "deep", dir, Mode::empty()).map_err(at("openat of a folder"))?;
    f::renameat_with(&own, "whole", &deep, "whole", RenameFlags::NOREPLACE).map_err(at("renameat2"))?;
    f::fsync(&deep).map_err(at("fsync of a folder"))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let again = f::openat2(&own, "deep/whole", flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS);
    let again = again.map_err(at("openat2"))?;
    let mut read = [0; 16];
    let length = rustix::io::read(&again, &mut read).map_err(at("read"))?;
    rustix::io::pread(&again, &mut read[8..], 0).map_err(at("pread"))?;
    f::seek(&again, f::SeekFrom::Start(0)).map_err(at("lseek"))?;
    let size = f::fstat(&again).map_err(at("fstat"))?.st_size;
    f::statat(&own, "deep/whole", AtFlags::SYMLINK_NOFOLLOW).map_err(at("fstatat"))?;
    f::statx(&own, "deep", AtFlags::empty(), f::StatxFlags::BASIC_STATS).map_err(at("statx"))?;
    f::fstatfs(folder).map_err(at("fstatfs"))?;
    let names = f::Dir::read_from(&deep).map_err(at("getdents"))?.flatten().count();
    let refused = [
        f::openat(folder, "../../dev/null", flags, Mode::empty()).map(drop),
        f::openat(folder, "..", dir, Mode::empty()).map(drop),
        f::openat(folder, "../new", rw, mode).map(drop),
        f::renameat(&deep, "whole", folder, "../whole"),
    ];
    f::unlinkat(&deep, "whole", AtFlags::empty()).map_err(at("unlinkat"))?;
    f::unlinkat(&own, "deep", AtFlags::REMOVEDIR).map_err(at("unlinkat of a folder"))?;
    f::unlinkat(folder, "hostile", AtFlags::REMOVEDIR).map_err(at("unlinkat of a folder"))?;
    f::fsync(folder).map_err(at("fsync of a folder"))?;
    let text = String::from_utf8_lossy(&read[..length]).into_owned();
    let came_out = refused.iter().filter(|result| result.is_ok()).count();
    Ok(format!("{text:?} of {size} bytes among {names} names, and {came_out} of {} ways lead out", refused.len()))
}

/// A role's sandbox, and what its graph grants.
enum Closed {
    Role(&'static Sandbox, BTreeSet<u16>),
    Worker { reach: Reach, sealed: bool },
}

fn sandbox_of(role: &str, port: u16) -> Option<Closed> {
    let (port, none) = (BTreeSet::from([port]), BTreeSet::new());
    Some(match role {
        "control" => Closed::Role(&sandbox::control::SANDBOX, port),
        "compile" => Closed::Role(&sandbox::compile::SANDBOX, none),
        "console" => Closed::Role(&sandbox::console::SANDBOX, none),
        "log" => Closed::Role(&sandbox::log::SANDBOX, none),
        "starting" => Closed::Worker { reach: Reach::default(), sealed: false },
        "sealed" => Closed::Worker { reach: Reach::default(), sealed: true },
        "sealed-http" => Closed::Worker { reach: Reach { http: true, ports: port, ..Reach::default() }, sealed: true },
        "sealed-net" => Closed::Worker { reach: Reach { http: true, tcp: true, udp: true, ports: port }, sealed: true },
        _ => return None,
    })
}

/// Enters these layers of a role's sandbox.
fn entered(role: &str, layers: Layers, port: u16) -> Result<(), String> {
    let closed = sandbox_of(role, port).ok_or("no such role")?;
    if matches!(layers, Layers::Privileges | Layers::All) {
        dropped()?;
    }
    let one = match layers {
        Layers::None => return Ok(()),
        Layers::Privileges => Some(Layer::Capabilities),
        Layers::Landlock => Some(Layer::Landlock),
        Layers::Seccomp => Some(Layer::Seccomp),
        Layers::All => None,
    };
    #[expect(clippy::disallowed_methods, reason = "one layer with the others off is what is to be shown")]
    let entered = match (&closed, one) {
        (Closed::Role(sandbox, ports), None) => sandbox::enter(sandbox, ports, Demand::Whole),
        (Closed::Role(sandbox, ports), Some(layer)) => sandbox::enter_one_layer(layer, sandbox, ports),
        (Closed::Worker { reach, .. }, None) => worker::enter(reach, Demand::Whole),
        (Closed::Worker { reach, .. }, Some(layer)) => worker::enter_one_layer(layer, reach),
    };
    entered.map_err(|e| e.to_string())?;
    match closed {
        Closed::Worker { reach, sealed: true } if matches!(layers, Layers::Seccomp | Layers::All) => {
            worker::close(&reach, Demand::Whole).map_err(|e| e.to_string())
        }
        _ => Ok(()),
    }
}

/// What init does to each role before its program begins, as far as whoever started this may do it, and whether the kernel
/// shows it: secure bits are shown to nobody else, and under seccomp not even to the process itself.
fn dropped() -> Result<(), String> {
    let root = rustix::process::geteuid().is_root();
    spawn::drop_privileges(root.then_some(USER)).map_err(|(step, e)| format!("{step:?}: {e}"))?;
    let bits = rustix::thread::capabilities_secure_bits().map_err(|e| e.to_string())?;
    if root && bits != spawn::SECURE_BITS {
        return Err(format!("the secure bits are {bits:?}"));
    }
    Ok(())
}

/// Says which secure bits this process has, as it was started, and what comes of unlocking them.
fn secure_bits() -> std::io::Result<()> {
    let bits = rustix::thread::capabilities_secure_bits()?;
    let unlocked = rustix::thread::set_capabilities_secure_bits(rustix::thread::CapabilitiesSecureBits::empty());
    say(&format!("secure bits {:#x}, unlocking them: {unlocked:?}", bits.bits()));
    Ok(())
}

/// What is there for the acts to be tried on, and removed at the end.
struct Tries {
    stranger: TcpListener,
    friend: TcpListener,
    _abstract_socket: UnixListener,
    folder: PathBuf,
}

impl Drop for Tries {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

extern "C" fn ignored(_: libc::c_int) {}

impl Tries {
    fn prepare() -> std::io::Result<Self> {
        use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
        let pid = std::process::id();
        // Not `SIG_IGN`, which whoever is started would inherit.
        let ignore = SigAction::new(SigHandler::Handler(ignored), SaFlags::SA_RESTART, SigSet::empty());
        for signal in [Signal::SIGABRT, Signal::SIGCONT] {
            // SAFETY: the handler does nothing.
            unsafe { sigaction(signal, &ignore) }?;
        }
        // As a role has it: whoever is ended leaves nothing.
        let nothing = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, nothing)?;
        // Of the appliance's folders only the second can be written to.
        let folder = |base| Path::new(base).join(format!("gaia-hostile-{pid}"));
        let made = std::fs::create_dir_all(folder("/tmp")).map(|()| folder("/tmp"));
        let folder = made.or_else(|_| std::fs::create_dir_all(folder("/run")).map(|()| folder("/run")))?;
        Ok(Self {
            stranger: TcpListener::bind("127.0.0.1:0")?,
            friend: TcpListener::bind("127.0.0.1:0")?,
            _abstract_socket: UnixListener::bind_addr(&abstract_socket(pid.cast_signed())?)?,
            folder,
        })
    }

    /// What comes of an act in a process that has these layers of a role's sandbox.
    fn outcome(&self, role: &str, layers: Layers, act: &str) -> std::io::Result<(ExitStatus, String)> {
        let _ = std::fs::remove_file(self.folder.join("new")).or_else(|_| std::fs::remove_dir(self.folder.join("new")));
        std::fs::write(self.folder.join("victim"), "")?;
        let (stranger, friend) = (self.stranger.local_addr()?.to_string(), self.friend.local_addr()?.to_string());
        let mut command = Command::new("/proc/self/exe");
        command.args([role, layers.word(), act, &stranger, &friend]).arg(&self.folder);
        // As init starts a role: nothing of this process's environment, no `RUST_BACKTRACE`.
        let output = command.env_clear().stdin(Stdio::null()).output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status, String::from_utf8_lossy(&said).trim().to_owned()))
    }

    /// Tries every act in each of these roles, and says what came of it. Whether all came as wanted.
    fn all(&self, roles: &[&str]) -> std::io::Result<bool> {
        let mut wrong = 0;
        for role in roles.iter().copied() {
            for act in ACTS {
                let wanted = if act.permitted.contains(&role) { Wanted::Done } else { Wanted::Stopped };
                let (status, said) = self.outcome(role, Layers::All, act.name)?;
                let (came, ok) = judged(status, &said, wanted);
                wrong += usize::from(!ok);
                let mark = if ok { "ok   " } else { "WRONG" };
                say(&format!("{mark} {role:<12} {:<46} {came}", act.name));
            }
        }
        say(&format!("{} acts in {} sandboxes, {wrong} wrong", ACTS.len(), roles.len()));
        Ok(wrong == 0)
    }

    /// Tries every act in each role with one layer alone, and prints which layers stop it: what comes of it is neither done
    /// nor what comes of it without any layer.
    fn layers(&self) -> std::io::Result<bool> {
        const LETTERS: [(Layers, char); 3] =
            [(Layers::Privileges, 'p'), (Layers::Landlock, 'l'), (Layers::Seccomp, 's')];
        let mut wrong = Vec::new();
        let mut alone = [0; 3];
        say(&format!("{:<46} {}", "", ROLES.map(|role| format!("{role:<11}")).join(" ").trim_end()));
        for act in ACTS {
            // These two are the same for all roles.
            let bare = self.outcome(ROLES[0], Layers::None, act.name)?;
            let dropped = self.outcome(ROLES[0], Layers::Privileges, act.name)?;
            let mut row = Vec::new();
            for role in ROLES {
                let permitted = act.permitted.contains(&role);
                let mut cell = String::new();
                for (layers, letter) in LETTERS {
                    let came = match layers {
                        Layers::Privileges => dropped.clone(),
                        layers => self.outcome(role, layers, act.name)?,
                    };
                    let code = code_of(came.0);
                    if !matches!(code, Some(DONE | REFUSED)) && came.0.signal() != Some(libc::SIGSYS) {
                        wrong.push(format!("{role}, {}: {}: {came:?}", layers.word(), act.name));
                    }
                    // What is permitted must be done with each layer; else its success with all would say nothing.
                    if code != Some(DONE) && (permitted || came != bare) {
                        cell.push(letter);
                    }
                }
                match (permitted, cell.as_str()) {
                    (true, "") => cell.push_str("may"),
                    (true, _) => wrong.push(format!("{role}: {} is permitted, but {cell} stops it", act.name)),
                    (false, "") => wrong.push(format!("{role}: {} is stopped by no layer", act.name)),
                    (false, _) => {}
                }
                for ((_, letter), count) in LETTERS.into_iter().zip(&mut alone) {
                    *count += usize::from(cell == letter.to_string());
                }
                row.push(format!("{cell:<11}"));
            }
            say(format!("{:<46} {}", act.name, row.join(" ")).trim_end());
        }
        for ((layers, _), count) in LETTERS.into_iter().zip(alone) {
            say(&format!("stopped by {} alone: {count}", layers.word()));
            if count == 0 {
                wrong.push(format!("{} alone stops nothing", layers.word()));
            }
        }
        for line in &wrong {
            say(&format!("WRONG {line}"));
        }
        Ok(wrong.is_empty())
    }
}

fn say(line: &str) {
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// What came of an act in words, and whether that was wanted.
fn judged(status: ExitStatus, said: &str, wanted: Wanted) -> (String, bool) {
    match (code_of(status), status.signal()) {
        (Some(DONE), _) => ("done".into(), wanted == Wanted::Done),
        (Some(REFUSED), _) => (format!("refused: {said}"), wanted == Wanted::Stopped),
        (_, Some(libc::SIGSYS)) => ("seccomp ended it".into(), wanted == Wanted::Stopped),
        (_, Some(signal)) => (format!("ended by signal {signal}"), false),
        (code, None) => (format!("not tried ({code:?}): {said}"), false),
    }
}

/// How the process of an act ended. Whoever could abort has done what it tried.
fn code_of(status: ExitStatus) -> Option<u8> {
    match status.signal() {
        Some(libc::SIGABRT) => Some(DONE),
        _ => status.code().and_then(|code| u8::try_from(code).ok()),
    }
}
