//! `gaia run` as a person at a terminal has it: a child of the test, its output read as it comes.

use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::{http, out};

/// What starting takes, compilation of the guests included.
const START_WITHIN: Duration = Duration::from_mins(1);
/// What one request or the end may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What a child has written, line by line.
#[derive(Debug, Clone, Default)]
pub struct Lines(Arc<(Mutex<Vec<String>>, Condvar)>);

impl Lines {
    /// What is read there from now on.
    #[must_use]
    pub fn of(from: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let to = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                to.0.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                to.0.1.notify_all();
            }
        });
        lines
    }

    /// All so far.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All so far, which are not kept any longer: for whoever has very many.
    #[must_use]
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until `wanted` says yes to all that was written.
    ///
    /// # Errors
    /// If it does not in time; with the last lines.
    pub fn until(&self, within: Duration, wanted: impl Fn(&[String]) -> bool) -> Result<()> {
        let deadline = Instant::now() + within;
        let mut lines = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !wanted(&lines) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let last = lines.len().saturating_sub(20);
                bail!("not within {within:?}; the last lines:\n{}", lines[last..].join("\n"));
            };
            lines = self.0.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Waits for a line with these words.
    ///
    /// # Errors
    /// As [`Lines::until`].
    pub fn line(&self, words: &str) -> Result<()> {
        self.until(START_WITHIN, |lines| lines.iter().any(|line| line.contains(words)))
    }
}

/// A folder with a manifest and the guests it names, and what `gaia` makes of it.
#[derive(Debug)]
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// With this manifest and the guests that it names.
    ///
    /// # Errors
    /// If a guest has not been built.
    pub fn with(graph: &str) -> Result<Self> {
        let folder = Self(tempfile::tempdir()?);
        folder.write(graph)?;
        for entry in std::fs::read_dir(out("branes")).context("out/branes is not there: `make image` builds it")? {
            let entry = entry?;
            if graph.contains(&*entry.file_name().to_string_lossy()) {
                std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
            }
        }
        Ok(folder)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes the manifest anew.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, graph: &str) -> Result<()> {
        Ok(std::fs::write(self.path().join("g.zgraph.toml"), graph)?)
    }

    /// Writes another file beside the manifest.
    ///
    /// # Errors
    /// What the file system says.
    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        Ok(std::fs::write(self.path().join(name), bytes)?)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(out("bin/gaia"));
        command.args(arguments).arg("g.zgraph.toml").current_dir(self.path()).env("XDG_RUNTIME_DIR", self.path());
        command
    }

    /// Runs `gaia check`: status, standard output and error.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn check(&self, arguments: &[&str]) -> Result<(ExitStatus, String, String)> {
        let output = self.command(&[&["check"], arguments].concat()).output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status, text(output.stdout), text(output.stderr)))
    }

    /// Starts `gaia run` on a port that is free.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Result<Run> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let listen = format!("127.0.0.1:{port}");
        let mut command = self.command(&[&["run", "--listen", &listen], arguments].concat());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let output = Lines::of(child.stdout.take().context("no output")?);
        let error = Lines::of(child.stderr.take().context("no error")?);
        Ok(Run { child, port, output, error, folder: self.path().to_owned(), violations_meant: AtomicBool::new(false) })
    }
}

/// A running `gaia run`. Dropped, it is gone.
///
/// As with an appliance, a test during which a role made a system call that its sandbox has not fails.
#[derive(Debug)]
pub struct Run {
    child: Child,
    /// Where it answers.
    pub port: u16,
    /// The log.
    pub output: Lines,
    /// What it says of itself.
    pub error: Lines,
    folder: PathBuf,
    violations_meant: AtomicBool,
}

impl Run {
    /// From here on a role may make a system call that its sandbox has not: it is made to.
    pub fn expect_violations(&self) {
        self.violations_meant.store(true, Relaxed);
    }

    /// Waits until it serves.
    ///
    /// # Errors
    /// If it does not in time; with what it said.
    pub fn serving(self) -> Result<Self> {
        self.error.line("serving generation")?;
        Ok(self)
    }

    /// One `GET`.
    ///
    /// # Errors
    /// If there is no whole answer.
    pub fn get(&self, path: &str) -> Result<http::Answer> {
        Ok(http::get(self.port, path, ANSWER_WITHIN)?)
    }

    /// A command to it, in its folder and without a terminal: `deploy v1.toml`.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(out("bin/gaia"));
        command.arg("--api").arg(self.socket()).args(arguments).current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// Runs such a command: status, standard output and error.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn gaia(&self, arguments: &[&str]) -> Result<(ExitStatus, String, String)> {
        let output = self.command(arguments).output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status, text(output.stdout), text(output.stderr)))
    }

    /// Asks its API: `status`, `ps`, `graphs`; or has it change something, and reads what came of it.
    ///
    /// # Errors
    /// If it does not answer, with what it said.
    pub fn ask(&self, what: &str) -> Result<Value> {
        let arguments: Vec<&str> = ["--json"].into_iter().chain(what.split(' ')).collect();
        let (_, output, error) = self.gaia(&arguments)?;
        serde_json::from_str(&output).with_context(|| error)
    }

    /// Where its API listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join(format!("gaia-run-{}/control.sock", self.child.id()))
    }

    /// A number that `ps` knows of a brane.
    ///
    /// # Errors
    /// If it does not answer, or knows no such brane or number.
    pub fn of(&self, brane: &str, what: &str) -> Result<u64> {
        let ps = self.ask("ps")?;
        let of_brane = ps["branes"].as_array().and_then(|all| all.iter().find(|b| b["name"] == brane));
        of_brane.and_then(|brane| brane[what].as_u64()).with_context(|| format!("no {what} of {brane} in {ps}"))
    }

    /// Waits until such a number is as wanted.
    ///
    /// # Errors
    /// If it is not in time; with what it is.
    pub fn until(&self, brane: &str, what: &str, wanted: impl Fn(u64) -> bool) -> Result<u64> {
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            let now = self.of(brane, what)?;
            if wanted(now) {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "{what} of {brane} is {now}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process of its first worker.
    ///
    /// # Errors
    /// If it does not answer, or has none.
    pub fn worker(&self) -> Result<i64> {
        let status = self.ask("status")?;
        status["workers"][0]["pid"].as_i64().with_context(|| format!("no worker in {status}"))
    }

    /// The launcher's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Interrupts it, as ^C does, and waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn interrupt(mut self) -> Result<ExitStatus> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("no process")?;
        rustix::process::kill_process(pid, Signal::INT)?;
        self.end()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + ANSWER_WITHIN;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("it has not ended within {ANSWER_WITHIN:?}: {:#?}", self.error.all())
    }
}

/// A number of KiB that the kernel knows of a process of this machine: `VmRSS`, `VmHWM`, `VmPTE`.
///
/// # Errors
/// If there is no such process, or no such number.
pub fn kib(pid: i64, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = field.and_then(|field| field.trim().split(' ').next()?.parse().ok());
    number.with_context(|| format!("no {name} in {status}"))
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.error.all();
        crate::fail_for(&crate::violations(said.iter().map(String::as_str)), self.violations_meant.load(Relaxed));
    }
}
