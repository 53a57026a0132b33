//! Starting a process: fork, confine, hand down descriptors, exec. Each step has a name, and a failure says which.
//!
//! ```text
//! parent                         child
//! pipe (close-on-exec)
//! fork ───────────────────────▶  signals → session → cgroups → core → secure bits → capabilities → groups → user
//! read the pipe: end of file       → no_new_privs → descriptors → limits → exec
//! means exec; else step + errno  (any failure: step + errno into the pipe, exit)
//! ```

use std::ffi::{CStr, CString};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitiesSecureBits, CpuSet};

use crate::descriptors;

/// How a process is held.
#[derive(Debug, Default)]
pub struct Confinement<'a> {
    /// User and group, after which no capability is left in any set; `None` keeps the caller's.
    pub user: Option<u32>,
    /// The one core it runs on; `None` leaves that to its cgroup.
    pub core: Option<usize>,
    /// Open `cgroup.procs` or `cgroup.threads` files it joins, in this order.
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// Resource limits.
    pub limits: Vec<(Resource, u64)>,
}

/// A process to be started.
#[derive(Debug)]
pub struct Command<'a> {
    /// The program's path.
    pub program: &'a CStr,
    /// Its arguments, its name first.
    pub arguments: &'a [&'a CStr],
    /// Environment, beside the three `LISTEN_` variables.
    pub environment: Vec<(String, String)>,
    /// Descriptors from [`descriptors::FIRST`] on, with their names.
    pub descriptors: Vec<(String, BorrowedFd<'a>)>,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// How it is held.
    pub confinement: Confinement<'a>,
}

/// The steps of starting a process, in order. The number is what travels through the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// `pipe2`
    Pipe = 1,
    /// `fork`
    Fork,
    /// `sigprocmask`
    Signals,
    /// `setsid`
    Session,
    /// Writing to `cgroup.procs` or `cgroup.threads`.
    Cgroup,
    /// `sched_setaffinity`
    Cores,
    /// `prctl(PR_SET_SECUREBITS)`
    SecureBits,
    /// `prctl(PR_CAPBSET_DROP)`, `capset`
    Capabilities,
    /// `setgroups`, `setresgid`
    Groups,
    /// `setresuid`
    User,
    /// `prctl(PR_SET_NO_NEW_PRIVS)`
    NoNewPrivileges,
    /// `dup3`
    Descriptors,
    /// `setrlimit`
    Limits,
    /// `execve`
    Exec,
}

impl Step {
    const ALL: [Self; 14] = [
        Self::Pipe,
        Self::Fork,
        Self::Signals,
        Self::Session,
        Self::Cgroup,
        Self::Cores,
        Self::SecureBits,
        Self::Capabilities,
        Self::Groups,
        Self::User,
        Self::NoNewPrivileges,
        Self::Descriptors,
        Self::Limits,
        Self::Exec,
    ];
}

/// A process could not be started.
#[derive(Debug, thiserror::Error)]
#[error("starting {program}: {step:?}: {source}")]
pub struct Error {
    /// What was to be started.
    pub program: String,
    /// Which step failed.
    pub step: Step,
    /// What the kernel said.
    pub source: Errno,
}

impl Command<'_> {
    /// Starts the process and waits until it has reached `exec`. Returns its process id; whoever waits for any child
    /// will be told of its end.
    ///
    /// The calling process must have a single thread: the child allocates memory between fork and exec.
    ///
    /// # Errors
    /// [`Error`] with the step that failed; no process is left then, but an exit of the failed child is still to be
    /// waited for by the caller's loop.
    pub fn start(&self) -> Result<i32, Error> {
        let fail = |step| move |source| Error { program: self.program.to_string_lossy().into_owned(), step, source };
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(fail(Step::Pipe))?;
        // SAFETY: this process has one thread (see above), so no lock can be held by another one in the child.
        let forked = unsafe { nix::unistd::fork() };
        match forked.map_err(|e| fail(Step::Fork)(errno(e)))? {
            nix::unistd::ForkResult::Parent { child } => {
                drop(write);
                let mut answer = [0_u8; 5];
                let got = rustix::io::retry_on_intr(|| rustix::io::read(&read, &mut answer)).unwrap_or(0);
                let step = Step::ALL.into_iter().find(|s| *s as u8 == answer[0]);
                match (got, step) {
                    (5, Some(step)) => {
                        let raw = i32::from_ne_bytes([answer[1], answer[2], answer[3], answer[4]]);
                        Err(fail(step)(Errno::from_raw_os_error(raw)))
                    }
                    _ => Ok(child.as_raw()),
                }
            }
            nix::unistd::ForkResult::Child => {
                // Where no descriptor of the new program will be put.
                let most = RawFd::try_from(self.descriptors.len() + 3).unwrap_or(RawFd::MAX);
                // Below that number the pipe would be overwritten, and a failure told to whatever is there then: rather
                // nothing is told, and the parent sees a role that ended with this status.
                if let Ok(write) = rustix::io::fcntl_dupfd_cloexec(&write, most) {
                    let (step, errno) = self.become_it();
                    let mut answer = vec![step as u8];
                    answer.extend_from_slice(&errno.raw_os_error().to_ne_bytes());
                    let _ = rustix::io::write(&write, &answer);
                }
                // SAFETY: `_exit` has no preconditions. Not `exit`: nothing of the parent's may run in this child, no
                // destructor and no flush.
                unsafe { nix::libc::_exit(127) }
            }
        }
    }

    /// Runs in the child. Comes back only with the step that failed.
    fn become_it(&self) -> (Step, Errno) {
        match self.confine() {
            Err(failed) => failed,
            Ok(()) => match self.hand_down() {
                Err(e) => (Step::Descriptors, e),
                // Last, because one of them bounds the numbers that descriptors may have meanwhile.
                Ok(()) => match self.limit() {
                    Err(e) => (Step::Limits, e),
                    Ok(()) => (Step::Exec, self.exec()),
                },
            },
        }
    }

    fn limit(&self) -> Result<(), Errno> {
        for (resource, limit) in &self.confinement.limits {
            let limit = Rlimit { current: Some(*limit), maximum: Some(*limit) };
            rustix::process::setrlimit(*resource, limit)?;
        }
        Ok(())
    }

    fn confine(&self) -> Result<(), (Step, Errno)> {
        let at = |step| move |e| (step, e);
        let held = &self.confinement;
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
            .map_err(|e| (Step::Signals, errno(e)))?;
        // Without a controlling terminal, and so that nothing of this session reaches another role.
        rustix::process::setsid().map_err(at(Step::Session))?;
        for group in &held.cgroups {
            // "0" is the writing thread itself (Linux, Documentation/admin-guide/cgroup-v2.rst).
            rustix::io::write(group, b"0").map_err(at(Step::Cgroup))?;
        }
        if let Some(core) = held.core {
            let mut set = CpuSet::new();
            set.set(core);
            rustix::thread::sched_setaffinity(None, &set).map_err(at(Step::Cores))?;
        }
        drop_privileges(held.user)
    }

    /// Puts the descriptors at their numbers. First all are copied above the last of them, so that none is
    /// overwritten before it has been copied.
    fn hand_down(&self) -> Result<(), Errno> {
        let all: Vec<BorrowedFd<'_>> =
            self.stdio.iter().copied().chain(self.descriptors.iter().map(|(_, fd)| *fd)).collect();
        let above = RawFd::try_from(all.len()).map_err(|_| Errno::MFILE)?;
        let mut copies = Vec::with_capacity(all.len());
        for fd in all {
            copies.push(rustix::io::fcntl_dupfd_cloexec(fd, above)?);
        }
        for (number, copy) in (0..).zip(&copies) {
            // SAFETY: `number` becomes this process's from here on; the value is never dropped, so nothing closes it
            // before exec. What had the number before in this child is closed by `dup2`, as intended.
            let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
            rustix::io::dup2(copy.as_fd(), &mut target)?;
        }
        Ok(())
    }

    fn exec(&self) -> Errno {
        let mut environment = self.environment.clone();
        environment.push(("LISTEN_PID".into(), std::process::id().to_string()));
        environment.push(("LISTEN_FDS".into(), self.descriptors.len().to_string()));
        environment
            .push(("LISTEN_FDNAMES".into(), descriptors::join(self.descriptors.iter().map(|(n, _)| n.as_str()))));
        let environment: Result<Vec<_>, _> =
            environment.into_iter().map(|(k, v)| CString::new(format!("{k}={v}"))).collect();
        match environment {
            Err(_) => Errno::INVAL,
            Ok(environment) => match nix::unistd::execve(self.program, self.arguments, &environment) {
                Err(e) => errno(e),
                Ok(never) => match never {},
            },
        }
    }
}

/// Makes the calling thread one of this user's, without any way back: secure bits, capabilities, groups, user,
/// `no_new_privs`. Without a user only the last. What every role has before its program begins; must be called as root
/// where there is a user.
///
/// # Errors
/// The step that failed, and what the kernel said.
pub fn drop_privileges(user: Option<u32>) -> Result<(), (Step, Errno)> {
    let at = |step| move |e| (step, e);
    if let Some(user) = user {
        rustix::thread::set_capabilities_secure_bits(SECURE_BITS).map_err(at(Step::SecureBits))?;
        drop_capabilities().map_err(at(Step::Capabilities))?;
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        rustix::thread::set_thread_groups(&[]).map_err(at(Step::Groups))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(at(Step::Groups))?;
        // From root to another user: the kernel empties the effective, permitted and ambient sets with it.
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(at(Step::User))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(at(Step::NoNewPrivileges))
}

/// The user 0 is one like any other, capabilities do not survive a change of user, none is raised into the ambient set; all
/// of it locked, for the process and all that descend from it (capabilities(7)). All four are locked; two of them are locked
/// unset, because set they would keep what the change of user takes away.
pub const SECURE_BITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

/// Empties the bounding and inheritable sets; the others go with the change of user.
fn drop_capabilities() -> Result<(), Errno> {
    let failed = |_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::PERM);
    caps::clear(None, caps::CapSet::Ambient).map_err(failed)?;
    caps::clear(None, caps::CapSet::Bounding).map_err(failed)?;
    caps::clear(None, caps::CapSet::Inheritable).map_err(failed)
}

fn errno(e: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(e as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_its_own_number() {
        for (i, step) in (1_u8..).zip(Step::ALL) {
            assert_eq!(step as u8, i);
        }
    }
}
