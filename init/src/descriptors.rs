//! Named descriptors, by systemd's socket-activation convention: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`.
//!
//! The supervisor gives a role its descriptors as 3, 4, 5, … and their names, joined by colons, in the
//! environment. The role takes them by name, once.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// The first inherited descriptor: 0, 1 and 2 are the standard streams.
pub const FIRST: RawFd = 3;

/// What is wrong with the inherited descriptors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The environment does not have the three variables for this process.
    #[error("no descriptors were handed down: {0}; this role is started by init or by `gaia run`, not by hand")]
    Absent(&'static str),
    /// The count and the names do not agree.
    #[error("LISTEN_FDS says {count}, LISTEN_FDNAMES has {names} names")]
    Count {
        /// `LISTEN_FDS`.
        count: usize,
        /// The number of names in `LISTEN_FDNAMES`.
        names: usize,
    },
    /// A descriptor that should be there is not open.
    #[error("descriptor {fd} (\"{name}\") is not open: {source}")]
    Closed {
        /// Its number.
        fd: RawFd,
        /// Its name.
        name: String,
        /// What the kernel said.
        source: rustix::io::Errno,
    },
    /// No descriptor has that name.
    #[error("no descriptor named \"{0}\" was handed down")]
    Missing(String),
}

/// The descriptors this process was started with.
#[derive(Debug)]
pub struct Descriptors(Vec<(String, OwnedFd)>);

impl Descriptors {
    /// Takes the descriptors out of the environment and marks each close-on-exec.
    ///
    /// Must be called at most once in a process, from `main`, before anything else opens or closes descriptors.
    ///
    /// # Errors
    /// If they were not meant for this process, or the variables contradict each other or the process's open files.
    pub fn inherit() -> Result<Self, Error> {
        let var = |name| std::env::var(name).ok();
        let pid: u32 = var("LISTEN_PID").and_then(|v| v.parse().ok()).ok_or(Error::Absent("LISTEN_PID is not set"))?;
        if pid != std::process::id() {
            return Err(Error::Absent("LISTEN_PID names another process"));
        }
        let count: usize =
            var("LISTEN_FDS").and_then(|v| v.parse().ok()).ok_or(Error::Absent("LISTEN_FDS is not set"))?;
        let names = names(&var("LISTEN_FDNAMES").unwrap_or_default());
        if names.len() != count {
            return Err(Error::Count { count, names: names.len() });
        }
        let mut taken = Vec::with_capacity(count);
        for (fd, name) in (FIRST..).zip(names) {
            // SAFETY: the parent passed descriptors FIRST.. to this process for it to own, and this function runs
            // once, before anything else could have taken or closed them. An absent one is found below and leaked.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            if let Err(source) = rustix::io::fcntl_setfd(&owned, FdFlags::CLOEXEC) {
                std::mem::forget(owned);
                return Err(Error::Closed { fd, name, source });
            }
            taken.push((name, owned));
        }
        Ok(Self(taken))
    }

    /// Takes the descriptor of that name.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is none, or if it was taken before.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, Error> {
        let i = self.0.iter().position(|(n, _)| n == name).ok_or_else(|| Error::Missing(name.to_owned()))?;
        Ok(self.0.swap_remove(i).1)
    }

    /// Takes all descriptors whose name begins with `prefix`, with the rest of their names, in the order given.
    pub fn take_all(&mut self, prefix: &str) -> Vec<(String, OwnedFd)> {
        let (taken, kept) = std::mem::take(&mut self.0).into_iter().partition(|(n, _)| n.starts_with(prefix));
        self.0 = kept;
        let strip = |(n, fd): (String, OwnedFd)| (n[prefix.len()..].to_owned(), fd);
        Vec::into_iter(taken).map(strip).collect()
    }
}

fn names(joined: &str) -> Vec<String> {
    if joined.is_empty() { Vec::new() } else { joined.split(':').map(str::to_owned).collect() }
}

/// Joins names for `LISTEN_FDNAMES`. A colon in a name would end it, so it is replaced by an underscore.
#[must_use]
pub fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|n| n.replace(':', "_")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_joining() {
        assert_eq!(names(&join(["init", "http-8080-v4"].into_iter())), ["init", "http-8080-v4"]);
        assert_eq!(names(&join(["a:b"].into_iter())), ["a_b"]);
        assert!(names(&join(std::iter::empty())).is_empty());
    }

    #[test]
    fn taking_by_prefix_leaves_the_others() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut all = Descriptors(vec![("own-a".into(), null()), ("init".into(), null()), ("own-b".into(), null())]);
        let own: Vec<_> = all.take_all("own-").into_iter().map(|(n, _)| n).collect();
        assert_eq!(own, ["a", "b"]);
        assert!(all.take("init").is_ok());
        assert!(matches!(all.take("init"), Err(Error::Missing(_))));
    }
}
