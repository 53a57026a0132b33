//! An appliance for tests: boots the image, talks to it as a user would, and looks inside through the debug role.
//!
//! Everything here has a limit and nothing sleeps to be on time: it waits for a line, a state or an answer. What it
//! boots is what `make image test-image` put into `out/`.

pub mod growth;
pub mod http;
pub mod nbd;
pub mod picture;
pub mod terminal;
pub mod workstation;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gaia_image::disk::{Disk, SMALLEST};
use gaia_image::initramfs::seed_archive;
use gaia_init::settings::CONTROL_PORT;
use gaia_qemu::{Drive, Forward, Machine, MachineBuilder};
use serde_json::{Value, json};

/// The port that the tests' `gaia.toml` names.
pub const PORT: u16 = 8080;
/// A port for TLS, for a `gaia.toml` that names it.
pub const SECURE_PORT: u16 = 8443;
/// What a boot may take, compilation of the guests included, on a slow machine under emulation.
pub const BOOT_WITHIN: Duration = Duration::from_mins(3);
/// What an answer from a living appliance may take.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The device's settings for QEMU's user network.
pub const SETTINGS: &str = include_str!("../../examples/gaia.toml");
/// A graph of `hello` alone: the quickest to boot.
pub const HELLO: &str = include_str!("../../examples/hello.zgraph.toml");

/// Whether the long versions are wanted (`make soak`).
#[must_use]
pub fn soak() -> bool {
    std::env::var_os("GAIA_SOAK").is_some()
}

/// A file under `out/`, which the build fills.
#[must_use]
pub fn out(name: &str) -> PathBuf {
    // Relative to where cargo runs a test: its package. A path from compile time would be that of whichever clone, of all
    // that share a target directory, compiled it.
    let relative = Path::new("../out").join(name);
    std::path::absolute(&relative).unwrap_or(relative)
}

/// An empty data disk of 64 MiB in a file that goes with the value.
///
/// # Errors
/// If it cannot be made.
pub fn data_disk() -> Result<tempfile::TempPath> {
    let path = tempfile::Builder::new().prefix("gaia-data-").tempfile()?.into_temp_path();
    // A disk is never made over a file that is there.
    std::fs::remove_file(&path)?;
    Disk { size: SMALLEST, random: false }.make(&path)?;
    Ok(path)
}

/// What `e2fsck` says of a file system that it is not to repair, and whether it was clean: nothing wrong, and nothing left in
/// its journal.
///
/// # Errors
/// If it cannot be run.
pub fn fsck(disk: &Path) -> Result<(bool, String)> {
    let found = ["/usr/sbin/e2fsck", "/sbin/e2fsck"].into_iter().find(|program| Path::new(program).exists());
    let output = std::process::Command::new(found.unwrap_or("e2fsck")).arg("-fn").arg(disk).output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    // Without leave to write it skips the journal, and says so.
    let clean = output.status.success() && !said.contains("journal");
    Ok((clean, said))
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct Setup {
    graph: Option<String>,
    settings: String,
    files: Vec<(String, Vec<u8>)>,
    cpus: u32,
    memory_mib: u32,
    data: Vec<Drive>,
    test_image: bool,
    restrict: bool,
    network: Option<Ipv4Addr>,
}

impl Default for Setup {
    fn default() -> Self {
        let (graph, settings, files) = (Some(HELLO.into()), SETTINGS.into(), Vec::new());
        let (cpus, memory_mib, data) = (2, 512, Vec::new());
        Self { graph, settings, files, cpus, memory_mib, data, test_image: true, restrict: true, network: None }
    }
}

impl Setup {
    /// With this graph instead of `hello`.
    #[must_use]
    pub fn graph(mut self, graph: impl Into<String>) -> Self {
        self.graph = Some(graph.into());
        self
    }

    /// Without a graph.
    #[must_use]
    pub fn no_graph(mut self) -> Self {
        self.graph = None;
        self
    }

    /// With this `gaia.toml`.
    #[must_use]
    pub fn settings(mut self, settings: impl Into<String>) -> Self {
        self.settings = settings.into();
        self
    }

    /// With this file beside the graph.
    #[must_use]
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), content.into()));
        self
    }

    /// With so many cores instead of two.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// With so much memory instead of 512 MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With this disk, after those that were named before: a file that [`data_disk`] made, or whatever else a test wants to find there.
    #[must_use]
    pub fn data(mut self, drive: Drive) -> Self {
        self.data.push(drive);
        self
    }

    /// With a way out: 10.0.2.2 is the loopback of the machine that runs the test.
    #[must_use]
    pub fn open(mut self) -> Self {
        self.restrict = false;
        self
    }

    /// In this network of 24 bits, from which it reaches the loopback of the test, at its gateway's address: the second one.
    #[must_use]
    pub fn network(mut self, address: Ipv4Addr) -> Self {
        self.network = Some(address);
        self
    }

    /// The image users get, without the debug role.
    #[must_use]
    pub fn production(mut self) -> Self {
        self.test_image = false;
        self
    }
}

/// A running appliance. Dropped, its machine is gone.
///
/// A test during which a role made a system call that its sandbox has not fails, whatever else it was about.
#[derive(Debug)]
pub struct Appliance {
    machine: Machine,
    _seed: tempfile::NamedTempFile,
    violations_meant: AtomicBool,
}

impl Drop for Appliance {
    fn drop(&mut self) {
        let transcript = self.machine.console().transcript();
        fail_for(&violations(transcript.lines()), self.violations_meant.load(Relaxed));
    }
}

/// The lines in which init reports that a role made a system call that its sandbox has not.
fn violations<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    lines.filter(|line| line.contains("violation: ") || line.contains("SIGSYS")).collect()
}

fn fail_for(violations: &[&str], meant: bool) {
    if meant || violations.is_empty() {
        return;
    }
    let violations = violations.join("\n");
    assert!(std::thread::panicking(), "{violations}");
    // A test that has failed already may have done so because of this.
    eprintln!("{violations}");
}

impl Appliance {
    /// Boots and does not wait.
    ///
    /// # Errors
    /// If the image is not there, or QEMU does not start.
    pub fn start(setup: &Setup) -> Result<Self> {
        let mut files = vec![("gaia.toml".to_owned(), setup.settings.clone().into_bytes())];
        files.extend(setup.graph.iter().map(|graph| ("graph.zgraph.toml".to_owned(), graph.clone().into_bytes())));
        files.extend(setup.files.iter().cloned());
        for entry in std::fs::read_dir(out("branes")).context("out/branes is not there: `make image` builds it")? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if setup.graph.as_ref().is_some_and(|graph| graph.contains(&name)) {
                files.push((name, std::fs::read(entry.path())?));
            }
        }
        let seed = tempfile::NamedTempFile::new()?;
        std::fs::write(&seed, seed_archive(files)?)?;
        let base = out(if setup.test_image { "initramfs-test.zst" } else { "initramfs.zst" });
        ensure!(base.exists(), "{} is not there: `make image test-image` builds it", base.display());
        let builder = MachineBuilder::new(out("bzImage"))
            .initrd(base)
            .initrd(seed.path())
            .append(gaia_image::COMMAND_LINE)
            .append("gaia.on_failure=poweroff")
            .memory_mib(setup.memory_mib)
            .cpus(setup.cpus)
            .forward(Forward::to(PORT))
            .forward(Forward::to(SECURE_PORT))
            .forward(Forward::to(CONTROL_PORT))
            .restrict(setup.restrict)
            .debug_channel(setup.test_image);
        let builder = match setup.network {
            Some(address) => builder.network(address, 24).restrict(false),
            None => builder,
        };
        let builder = setup.data.iter().cloned().fold(builder, MachineBuilder::drive);
        Ok(Self { machine: Machine::boot(&builder)?, _seed: seed, violations_meant: AtomicBool::new(false) })
    }

    /// Boots and waits until it serves.
    ///
    /// # Errors
    /// As [`Appliance::start`], or if it does not serve in time.
    pub fn boot(setup: &Setup) -> Result<Self> {
        let appliance = Self::start(setup)?;
        appliance.line("gaia: serving generation", BOOT_WITHIN)?;
        Ok(appliance)
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Waits for a line of the console that contains the pattern, from where the last wait ended.
    ///
    /// # Errors
    /// If it does not come in time; the error shows the console's last lines.
    pub fn line(&self, pattern: &str, within: Duration) -> Result<String> {
        Ok(self.machine.console().wait_for_line(pattern, within)?.to_string())
    }

    /// The port of this machine behind which the appliance's ingress is.
    ///
    /// # Errors
    /// Never, as booted here.
    pub fn port(&self) -> Result<u16> {
        Ok(self.machine.port(PORT)?)
    }

    /// The port of this machine behind which [`SECURE_PORT`] is.
    ///
    /// # Errors
    /// Never, as booted here.
    pub fn secure_port(&self) -> Result<u16> {
        Ok(self.machine.port(SECURE_PORT)?)
    }

    /// The port of this machine behind which control answers operators, if any are listed.
    ///
    /// # Errors
    /// Never, as booted here.
    pub fn control_port(&self) -> Result<u16> {
        Ok(self.machine.port(CONTROL_PORT)?)
    }

    /// One `GET` on a connection of its own.
    ///
    /// # Errors
    /// If there is no whole answer.
    pub fn get(&self, path: &str) -> Result<http::Answer> {
        Ok(http::get(self.port()?, path, ANSWER_WITHIN)?)
    }

    /// Asks `hello` ten times, so that more than one worker is asked.
    ///
    /// # Errors
    /// At the first answer that is not 200, with all the console ever showed.
    pub fn serves_hello(&self) -> Result<()> {
        for _ in 0..10 {
            let answer = self.get("/hello")?;
            let shown = || self.machine.console().transcript();
            ensure!(answer.status == 200, "{}: {}\n{}", answer.status, answer.text(), shown());
        }
        Ok(())
    }

    fn debug(&self, request: &Value) -> Result<Value> {
        let answer: Value = serde_json::from_str(&self.machine.debug()?.request(&request.to_string())?)?;
        match answer.get("error") {
            Some(error) => anyhow::bail!("{request}: {error}"),
            None => Ok(answer["ok"].clone()),
        }
    }

    /// Reads a file inside.
    ///
    /// # Errors
    /// What the machine says.
    pub fn read(&self, path: &str) -> Result<String> {
        Ok(self.debug(&json!({ "read": path }))?.as_str().unwrap_or_default().to_owned())
    }

    /// Lists a directory inside.
    ///
    /// # Errors
    /// What the machine says.
    pub fn list(&self, path: &str) -> Result<Vec<String>> {
        Ok(serde_json::from_value(self.debug(&json!({ "list": path }))?)?)
    }

    /// From here on a role may make a system call that its sandbox has not: it is made to.
    pub fn expect_violations(&self) {
        self.violations_meant.store(true, Relaxed);
    }

    /// Writes a file inside.
    ///
    /// # Errors
    /// What the machine says.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.debug(&json!({ "write": path, "text": text })).map(drop)
    }

    /// Mounts a second `/proc` inside, which can be written to.
    ///
    /// # Errors
    /// What the machine says.
    pub fn mount_proc(&self, path: &str) -> Result<()> {
        self.debug(&json!({ "proc": path })).map(drop)
    }

    /// Sets the clock inside, in seconds since 1970, and returns what it was.
    ///
    /// # Errors
    /// What the machine says.
    pub fn set_clock(&self, seconds: i64) -> Result<i64> {
        self.debug(&json!({ "clock": seconds }))?.as_i64().context("no time")
    }

    /// Sends a signal to a process inside.
    ///
    /// # Errors
    /// What the machine says.
    pub fn kill(&self, pid: i64, signal: i32) -> Result<()> {
        self.debug(&json!({ "kill": pid, "signal": signal })).map(drop)
    }

    /// Asks control's API: `GET /v1/status`.
    ///
    /// # Errors
    /// What the machine says.
    pub fn ask(&self, what: &str) -> Result<Value> {
        self.debug(&json!({ "ask": what }))
    }

    /// Where a symbolic link inside leads.
    ///
    /// # Errors
    /// What the machine says.
    pub fn link(&self, path: &str) -> Result<String> {
        Ok(self.debug(&json!({ "link": path }))?.as_str().unwrap_or_default().to_owned())
    }

    /// The user whose file, folder or process inside it is.
    ///
    /// # Errors
    /// What the machine says.
    pub fn owner(&self, path: &str) -> Result<u64> {
        self.debug(&json!({ "owner": path }))?.as_u64().context("no user")
    }

    /// What came of a hostile program's acts in the sandbox of a role.
    ///
    /// # Errors
    /// What the machine says.
    pub fn hostile(&self, role: &str) -> Result<String> {
        // Some 60 processes one after the other, under emulation.
        let request = json!({ "hostile": role }).to_string();
        let answer: Value = serde_json::from_str(&self.machine.debug()?.request_within(&request, BOOT_WITHIN)?)?;
        Ok(answer["ok"].as_str().with_context(|| answer.to_string())?.to_owned())
    }

    /// What a process says of its secure bits that was started as init starts a role of this user.
    ///
    /// # Errors
    /// What the machine says.
    pub fn secure_bits(&self, user: u32) -> Result<String> {
        Ok(self.debug(&json!({ "spawn": user }))?.as_str().unwrap_or_default().to_owned())
    }

    /// What a program says that does as this user what control's store does, in the sandbox of a role.
    ///
    /// # Errors
    /// What the machine says.
    pub fn keeps(&self, role: &str, user: u32) -> Result<String> {
        Ok(self.debug(&json!({ "keep": role, "user": user }))?.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until what is in a file was sent to the disk, which is not told to flush it.
    ///
    /// # Errors
    /// What the machine says.
    pub fn send(&self, path: &str) -> Result<()> {
        self.debug(&json!({ "begin": path })).map(drop)
    }

    /// Waits until a file or a folder's names are on the disk.
    ///
    /// # Errors
    /// What the machine says.
    pub fn sync(&self, path: &str) -> Result<()> {
        self.debug(&json!({ "sync": path })).map(drop)
    }

    /// A number that control lists about a running role: `pid`, `millis`, `restarts`.
    ///
    /// # Errors
    /// If control does not answer, or has no such role running.
    pub fn role(&self, role: &str, number: &str) -> Result<i64> {
        let status = self.ask("GET /v1/status")?;
        let roles = status["roles"].as_array().context("no roles")?;
        let found = roles.iter().find(|r| r["name"] == role && r["pid"].as_i64() > Some(0));
        found.and_then(|r| r[number].as_i64()).with_context(|| format!("no {role} is running: {status}"))
    }

    /// The process of a role.
    ///
    /// # Errors
    /// As [`Appliance::role`].
    pub fn pid(&self, role: &str) -> Result<i64> {
        self.role(role, "pid")
    }

    /// Asks until the answer is as wanted.
    ///
    /// # Errors
    /// If it is not in time; with the last answer.
    pub fn until<T: std::fmt::Debug>(
        &self,
        within: Duration,
        ask: impl Fn(&Self) -> Result<T>,
        wanted: impl Fn(&T) -> bool,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            let answer = ask(self);
            match answer {
                Ok(answer) if wanted(&answer) => return Ok(answer),
                other if Instant::now() > deadline => {
                    anyhow::bail!("not within {within:?}; the last answer: {other:?}")
                }
                _ => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Types `poweroff --yes`, waits for the machine to end by itself, and returns all it ever printed.
    ///
    /// # Errors
    /// If it does not end, or not with status 0.
    pub fn power_off(self) -> Result<String> {
        self.machine.console().send_line("poweroff --yes")?;
        let exit = self.machine.wait_exit(Duration::from_mins(1))?;
        ensure!(exit.success(), "QEMU ended with {exit:?}");
        Ok(self.machine.console().transcript())
    }
}

/// What the kernel says about clocks when a busy host starves the emulation while they are calibrated: true, and not of
/// the appliance's making.
pub const STARVED: [&str; 2] = ["tsc: Unable to calibrate against PIT", "APIC calibration not consistent"];

/// The kernel's own lines in a transcript. At the level the appliance boots with, each is a warning or worse; only the
/// last words of a machine that switches itself off are not.
#[must_use]
pub fn kernel_complaints(transcript: &str) -> Vec<&str> {
    let stamp = |line: &&str| {
        let inside = line.trim_start().strip_prefix('[').and_then(|l| l.split_once(']'));
        inside.is_some_and(|(time, _)| time.trim().parse::<f64>().is_ok())
    };
    let ours = |line: &&str| !line.contains("reboot: ") && !STARVED.iter().any(|words| line.contains(words));
    transcript.lines().filter(stamp).filter(ours).collect()
}

#[cfg(test)]
mod tests {
    use super::{fail_for, kernel_complaints, violations};

    #[test]
    #[should_panic(expected = "violation: worker@0 (pid 9)")]
    fn a_violation_fails_whoever_did_not_mean_it() {
        let said =
            "gaia: serving\ngaia: violation: worker@0 (pid 9) made a system call that its sandbox has not [1 s]\n";
        fail_for(&violations(said.lines()), true);
        fail_for(&violations("gaia: worker@0 (pid 9) was killed by SIGKILL".lines()), false);
        fail_for(&violations(said.lines()), false);
    }

    #[test]
    fn complaints_are_found_among_the_appliances_own_lines() {
        let transcript = "[    0.032000] tsc: Unable to calibrate against PIT\n[    1.5] BUG: unstable\n  2.1 ms  mounts /dev\n[   20.5] reboot: Power down\ngaia: x [0.1 s]\n";
        assert_eq!(kernel_complaints(transcript), ["[    1.5] BUG: unstable"]);
    }
}
