//! A child process that is waited for, killed only through its own descriptor, and does not outlive us.
//!
//! Each child has a keeper: the thread that started it and waits for it. The keeper lives exactly as long as the child,
//! which matters because the parent-death signal (`PR_SET_PDEATHSIG`) is tied to the thread that forked, not to
//! the process. The signal is set by `setpriv` (util-linux 2.33 or newer) between fork and QEMU, so that no unsafe code is
//! needed here. Without a `setpriv` that knows it, a killed parent leaves QEMU behind.

use crate::error::Error;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How a machine ended.
#[derive(Debug, Clone)]
pub struct Exit {
    /// QEMU's exit status.
    pub status: ExitStatus,
    /// Why the machine shut down, if QEMU said so before it ended.
    pub reason: Option<crate::ShutdownReason>,
    /// What QEMU wrote to standard output and standard error.
    pub stderr: String,
}

impl Exit {
    /// QEMU ended with status 0, as it does after a power-off, a reboot that ends it, or `quit`.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success()
    }
}

/// The place where a process' end is written down and waited for.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    exit: Mutex<Option<Exit>>,
    changed: Condvar,
}

impl Ending {
    pub(crate) fn set(&self, exit: Exit) {
        *lock(&self.exit) = Some(exit);
        self.changed.notify_all();
    }

    pub(crate) fn wait(&self, timeout: Duration) -> Option<Exit> {
        let deadline = deadline(timeout);
        let mut exit = lock(&self.exit);
        loop {
            if exit.is_some() {
                return exit.clone();
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            exit = self.changed.wait_timeout(exit, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A running or ended child.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: OwnedFd,
    ending: Arc<Ending>,
}

impl Process {
    /// Starts `program` in `dir`, in a process group of its own, with nothing on standard input; what it prints goes to `dir/output`.
    pub(crate) fn start(program: &Path, argv: Vec<OsString>, dir: &Path) -> Result<Self, Error> {
        let spawn_error = |source| Error::Spawn { program: program.to_owned(), source };
        let output = dir.join("output");
        let file = File::create(&output).map_err(spawn_error)?;
        let mut command = match guard() {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--"]).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(argv).current_dir(dir).process_group(0).stdin(Stdio::null());
        command.stdout(file.try_clone().map_err(spawn_error)?).stderr(file);

        let ending = Arc::new(Ending::default());
        let (started, start) = mpsc::channel();
        let keeper = {
            let ending = Arc::clone(&ending);
            move || keep(command, &output, &ending, &started)
        };
        thread::Builder::new().name("qemu keeper".into()).spawn(keeper).map_err(spawn_error)?;
        let died = || io::Error::other("its keeper thread died");
        let (pid, pidfd) = start.recv().map_err(|_| died()).flatten().map_err(spawn_error)?;
        Ok(Self { pid, pidfd, ending })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }

    /// Readable once the process has ended.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Through the descriptor, so that it can only ever hit this child. Killing an ended one is no error.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(Error::Kill { source: errno.into() }),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing is left to tell an error to; the bound is for a child stuck in the kernel.
        if self.kill().is_ok() {
            self.ending.wait(Duration::from_secs(10));
        }
    }
}

fn keep(mut command: Command, output: &Path, ending: &Ending, started: &mpsc::Sender<io::Result<(u32, OwnedFd)>>) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            // The receiver waits for exactly this message.
            let _ = started.send(Err(error));
            return;
        }
    };
    // The child is not reaped before `wait` below, so its pid cannot have been given to another process.
    let pidfd = match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        Ok(pidfd) => Ok((child.id(), pidfd)),
        Err(errno) => child.kill().and(Err(errno.into())),
    };
    let _ = started.send(pidfd);
    if let Ok(status) = child.wait() {
        let text = fs::read(output).unwrap_or_default();
        ending.set(Exit { status, reason: None, stderr: String::from_utf8_lossy(&text).into_owned() });
    }
}

/// A `setpriv` that knows `--pdeathsig` (busybox' does not), looked for once.
fn guard() -> Option<&'static Path> {
    static GUARD: OnceLock<Option<PathBuf>> = OnceLock::new();
    let probe = || {
        let setpriv = in_path("setpriv")?;
        let mut command = Command::new(&setpriv);
        command.args(["--pdeathsig", "KILL", "--"]).arg(&setpriv).arg("--version");
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success()).then_some(setpriv)
    };
    GUARD.get_or_init(probe).as_deref()
}

/// The first file of this name in `PATH`.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A thread that died with a lock held leaves data that is still whole: every change here is a single step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// So far from now; a time beyond what the clock can count means a year.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_hours(365 * 24))
}

/// A directory of mode 0700 whose path leaves room for a socket's name: a Unix socket's path ends at 107 bytes (unix(7)).
pub(crate) fn private_dir() -> Result<tempfile::TempDir, Error> {
    use std::os::unix::fs::PermissionsExt;
    let mut parent = env::temp_dir();
    if parent.as_os_str().len() > 60 {
        parent = PathBuf::from("/tmp");
    }
    tempfile::Builder::new()
        .prefix("gaia-qemu-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in(&parent)
        .map_err(|source| Error::PrivateDir { parent, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, dir: &Path) -> Process {
        Process::start(Path::new("/bin/sh"), vec!["-c".into(), script.into()], dir).unwrap()
    }

    #[test]
    fn end_and_output_are_kept() {
        let dir = private_dir().unwrap();
        let process = shell("echo out; echo err >&2; exit 3", dir.path());
        let exit = process.ending().wait(Duration::from_secs(10)).unwrap();
        assert_eq!(exit.status.code(), Some(3));
        assert_eq!(exit.stderr, "out\nerr\n");
        process.kill().unwrap();
    }

    #[test]
    fn drop_kills_and_waits() {
        let dir = private_dir().unwrap();
        let process = shell("exec sleep 60", dir.path());
        let ending = Arc::clone(process.ending());
        assert!(ending.wait(Duration::from_millis(20)).is_none());
        drop(process);
        let exit = ending.wait(Duration::ZERO).unwrap();
        assert!(!exit.success());
    }

    #[test]
    fn missing_program_is_an_error_or_says_so() {
        let dir = private_dir().unwrap();
        // Through setpriv the failure is setpriv's, with its words on standard error.
        if let Ok(process) = Process::start(Path::new("/nowhere/qemu"), Vec::new(), dir.path()) {
            let exit = process.ending().wait(Duration::from_secs(10)).unwrap();
            assert!(!exit.success());
            assert!(exit.stderr.contains("/nowhere/qemu"), "{}", exit.stderr);
        }
    }

    #[test]
    fn private_dir_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = private_dir().unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
