//! The servers that are compared, each as a process on the server's core.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal};
use rustix::thread::CpuSet;
use serde_json::Value;
use tempfile::TempDir;

use crate::load::{self, Request};
use crate::tools::Tools;
use crate::workload::Workload;

/// How long a server has to get ready.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// What instances of a brane there may be at a time, and how many `wasmtime serve` may have in its pool.
const INSTANCES: u32 = 128;
/// How many of a pinned one. Each is a process, and they share one core: more of them only take turns.
const PINNED: u32 = 4;

/// A server, and how it is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// hyper, without WebAssembly.
    Hyper,
    /// Gaia: an instance made when its request arrives.
    GaiaEphemeral,
    /// Gaia: an instance that is ready before its request arrives.
    GaiaPooled,
    /// Gaia: instances that stay.
    GaiaPinned,
    /// As `gaia-ephemeral`, without log and profile: what these cost.
    GaiaBare,
    /// As `gaia-ephemeral`, without profile alone.
    GaiaUnprofiled,
    /// As `gaia-ephemeral`, with all of Gaia's processes on the server's core.
    GaiaOneCore,
    /// `wasmtime serve` as shipped.
    Wasmtime,
    /// `wasmtime serve` with the fastest settings that were found.
    WasmtimeTuned,
    /// Node's own HTTP server.
    Node,
    /// workerd: V8 isolates.
    Workerd,
}

/// Where the measurement happens, and with what.
#[derive(Debug, Clone)]
pub struct Place {
    /// The server's core.
    pub server: usize,
    /// The load's.
    pub client: usize,
    /// Gaia's command.
    pub gaia: PathBuf,
    /// The folder of components.
    pub branes: PathBuf,
    /// Other servers and components.
    pub tools: Tools,
}

/// A server that runs; ended when dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub to: SocketAddr,
    /// Of Gaia: the process that serves. Of the others, the process.
    pub worker: Pid,
    /// Of Gaia: the socket of its control.
    pub api: Option<PathBuf>,
    child: Child,
    folder: TempDir,
}

/// What engines of JavaScript and Python import besides: all of it granted, as little as it can be.
const FOR_ENGINES: &str = r#"clock = { resolution = "ns" }
random = {}
env = {}
"fs.tmp" = { quota = "1 MiB" }
"net.http" = { allowlist = ["localhost"] }
"net.dns" = { allowlist = ["localhost"] }
"net.tcp" = { allowlist = ["localhost:9"] }
"net.udp" = { allowlist = ["localhost:9"] }"#;

/// Flags of the tuned `wasmtime serve`: pooled slots, of which only the pages are reset that were written. Without
/// concurrency support it would be faster still, but this command needs that for its own interfaces of WASI 0.3.
fn tuned() -> [String; 2] {
    let pool = format!(
        "pooling-allocator=y,pooling-pagemap-scan=y,pooling-memory-keep-resident=2097152,\
         pooling-table-keep-resident=524288,pooling-total-core-instances={0},pooling-total-component-instances={1},\
         pooling-total-memories={1},pooling-total-tables={1},pooling-total-stacks={1},\
         pooling-max-memory-size=268435456",
        INSTANCES * 16,
        INSTANCES * 4
    );
    ["-O".into(), pool]
}

/// A graph of one brane.
#[derive(Debug, Clone)]
pub struct Graph {
    /// The brane's name and its component's.
    pub name: String,
    /// `ephemeral`, `pooled`, `pinned`.
    pub lifecycle: &'static str,
    /// Instances at a time.
    pub replicas: u32,
    /// As the manifest writes it.
    pub mem_max: &'static str,
    /// The capability table's lines.
    pub grants: &'static str,
}

impl Graph {
    /// That of a workload's brane.
    #[must_use]
    pub fn of(workload: Workload, lifecycle: &'static str, replicas: u32) -> Self {
        let script = matches!(workload, Workload::JavaScript | Workload::Python);
        Self {
            name: workload.name().into(),
            lifecycle,
            replicas,
            mem_max: if script { "256 MiB" } else { "64 MiB" },
            grants: if script { FOR_ENGINES } else { "" },
        }
    }

    /// The graph as it is written.
    #[must_use]
    pub fn manifest(&self) -> String {
        let Self { name, lifecycle, replicas, mem_max, grants } = self;
        format!(
            "[brane.{name}]\ntier = \"standard\"\nimage = \"file:./{name}.wasm\"\nreplicas = {replicas}\n\
             [brane.{name}.execution]\nlifecycle = \"{lifecycle}\"\n[brane.{name}.capability]\n{grants}\n\
             [brane.{name}.limits]\nmem_max = \"{mem_max}\"\ndeadline = \"5m\"\n"
        )
    }
}

impl Kind {
    /// Its name in results.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Its lifecycle, if it is Gaia.
    #[must_use]
    pub fn lifecycle(self) -> Option<&'static str> {
        match self {
            Self::GaiaEphemeral | Self::GaiaBare | Self::GaiaUnprofiled | Self::GaiaOneCore => Some("ephemeral"),
            Self::GaiaPooled => Some("pooled"),
            Self::GaiaPinned => Some("pinned"),
            _ => None,
        }
    }

    /// Starts it for one workload, and asks once whether it answers rightly.
    ///
    /// # Errors
    /// Why it cannot be had, in words for whoever reads the results.
    pub fn start(self, workload: Workload, place: &Place) -> Result<Server> {
        let mut server = self.prepared(workload, place)?;
        server.ready(&workload.request(server.to))?;
        Ok(server)
    }

    /// Starts it without asking it anything.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn prepared(self, workload: Workload, place: &Place) -> Result<Server> {
        Ok(match self {
            Self::Hyper => {
                let to = free()?;
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("native").arg(to.to_string());
                Server::spawn(command, to, &[place.server], tempfile::tempdir()?)?
            }
            Self::GaiaEphemeral
            | Self::GaiaBare
            | Self::GaiaUnprofiled
            | Self::GaiaPooled
            | Self::GaiaPinned
            | Self::GaiaOneCore => {
                let replicas = if self == Self::GaiaPinned { PINNED } else { INSTANCES };
                let graph = Graph::of(workload, self.lifecycle().unwrap_or_default(), replicas);
                let component = place.component(workload)?;
                let without: &[&str] = match self {
                    Self::GaiaBare => &["--without", "log,profile"],
                    Self::GaiaUnprofiled => &["--without", "profile"],
                    _ => &[],
                };
                let mut server = gaia(&graph, &component, place, self == Self::GaiaOneCore, without)?;
                if self != Self::GaiaOneCore {
                    server.keep_housekeeping_off(place)?;
                }
                server
            }
            Self::Wasmtime | Self::WasmtimeTuned => {
                let (to, component) = (free()?, place.component(workload)?);
                let mut command = Command::new(place.tools.wasmtime()?);
                command.args(["serve", "-S", "cli=y", "--addr", &to.to_string()]);
                if self == Self::WasmtimeTuned {
                    command.args(tuned());
                }
                command.arg(component);
                Server::spawn(command, to, &[place.server], tempfile::tempdir()?)?
            }
            Self::Node => {
                ensure!(workload != Workload::Python, "Node runs no Python");
                let (to, folder) = (free()?, tempfile::tempdir()?);
                let script = folder.path().join("server.mjs");
                std::fs::write(&script, include_str!("server.mjs"))?;
                let mut command = Command::new("node");
                command.arg(script).arg(to.port().to_string());
                Server::spawn(command, to, &[place.server], folder)?
            }
            Self::Workerd => {
                ensure!(workload != Workload::Python, "only its JavaScript is measured");
                let (to, folder) = (free()?, tempfile::tempdir()?);
                std::fs::write(folder.path().join("worker.mjs"), include_str!("worker.mjs"))?;
                let config = include_str!("workerd.capnp").replace("ADDRESS", &to.to_string());
                std::fs::write(folder.path().join("config.capnp"), config)?;
                let mut command = Command::new(place.tools.workerd()?);
                command.arg("serve").arg(folder.path().join("config.capnp"));
                Server::spawn(command, to, &[place.server], folder)?
            }
        })
    }
}

impl Place {
    /// The component of a workload.
    ///
    /// # Errors
    /// Why there is none.
    pub fn component(&self, workload: Workload) -> Result<PathBuf> {
        match workload {
            Workload::JavaScript => self.tools.javascript(),
            Workload::Python => self.tools.python(),
            _ => {
                let path = self.branes.join(format!("{}.wasm", workload.name()));
                ensure!(path.exists(), "{} is not there: make image", path.display());
                Ok(path)
            }
        }
    }
}

/// Runs a graph with one worker, on the server's core, with these arguments besides.
///
/// # Errors
/// If it cannot be started; whether it is ready is another question.
pub fn gaia(graph: &Graph, component: &Path, place: &Place, one_core: bool, more: &[&str]) -> Result<Server> {
    let (to, folder) = (free()?, tempfile::tempdir()?);
    std::fs::copy(component, folder.path().join(format!("{}.wasm", graph.name)))?;
    let manifest = folder.path().join("graph.zgraph.toml");
    std::fs::write(&manifest, graph.manifest())?;
    let mut command = Command::new(std::path::absolute(&place.gaia)?);
    command.arg("run").arg(manifest).args(["--quiet", "--workers", "1", "--listen", &to.to_string()]).args(more);
    command.env("XDG_RUNTIME_DIR", folder.path());
    // With two cores a worker runs on the first of them.
    let both = [place.server, place.client];
    let mut server = Server::spawn(command, to, if one_core { &both[..1] } else { &both }, folder)?;
    let number = server.child.id();
    server.api = Some(server.folder.path().join(format!("gaia-run-{number}/control.sock")));
    Ok(server)
}

fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn set(cores: &[usize]) -> CpuSet {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core);
    }
    set
}

/// Runs this thread, and what it starts, on these cores.
///
/// # Errors
/// If there is none of them.
pub fn stay_on(cores: &[usize]) -> Result<()> {
    rustix::thread::sched_setaffinity(None, &set(cores)).with_context(|| format!("running on the cores {cores:?}"))
}

impl Server {
    fn spawn(mut command: Command, to: SocketAddr, cores: &[usize], folder: TempDir) -> Result<Self> {
        let said = File::create(folder.path().join("stderr"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).process_group(0);
        let before = rustix::thread::sched_getaffinity(None)?;
        // A child has the cores of the thread that starts it.
        stay_on(cores)?;
        let child = command.spawn().with_context(|| format!("{}", command.get_program().display()));
        rustix::thread::sched_setaffinity(None, &before)?;
        let child = child?;
        let worker = Pid::from_child(&child);
        Ok(Self { to, worker, api: None, child, folder })
    }

    /// What it wrote to standard error.
    fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Waits for its first right answer; what it took.
    ///
    /// # Errors
    /// If it ends, or is not there within a minute, with what it said.
    pub fn ready(&mut self, request: &Request) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let asked = Instant::now();
            let problem = match load::once(request) {
                Ok(answer) if answer.status == 200 && request.wanted.as_ref().is_none_or(|w| *w == answer.body) => {
                    let took = asked.elapsed();
                    if let Some(api) = self.api.clone() {
                        let worker = status(&api)?["workers"][0]["pid"].as_i64().context("no worker")?;
                        self.worker = Pid::from_raw(i32::try_from(worker)?).context("no worker")?;
                    }
                    return Ok(took);
                }
                Ok(answer) if answer.status != 503 => {
                    bail!("wrong answer: {} {}", answer.status, String::from_utf8_lossy(&answer.body).trim())
                }
                Ok(answer) => format!("status {}", answer.status),
                Err(e) => format!("{e:#}"),
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}: {}", in_one_line(&self.said()));
            }
            if begun.elapsed() > READY_WITHIN {
                bail!("not ready: {problem}: {}", in_one_line(&self.said()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until Gaia has a worker that serves.
    ///
    /// # Errors
    /// If there is none within a minute.
    pub fn serving(&mut self) -> Result<Value> {
        let api = self.api.clone().context("not Gaia")?;
        let until = Instant::now() + READY_WITHIN;
        loop {
            match status(&api) {
                Ok(status) if status["workers"].as_array().is_some_and(|all| !all.is_empty()) => return Ok(status),
                _ if self.child.try_wait()?.is_some() => bail!("it ended: {}", in_one_line(&self.said())),
                _ if Instant::now() > until => bail!("no worker: {}", in_one_line(&self.said())),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Has Gaia's control and log run on the load's core, as they run on a core of their own where there are more than two.
    fn keep_housekeeping_off(&mut self, place: &Place) -> Result<()> {
        let status = self.serving()?;
        let roles = status["roles"].as_array().into_iter().flatten();
        for role in roles.filter(|role| matches!(role["name"].as_str(), Some("control" | "log"))) {
            let pid = role["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
            rustix::thread::sched_setaffinity(pid, &set(&[place.client]))?;
        }
        ensure!(status["workers"][0]["core"] == place.server, "its worker runs on another core");
        Ok(())
    }

    /// Processor time that the serving process has had, in all its threads.
    ///
    /// # Errors
    /// If it is gone.
    pub fn cpu(&self) -> Result<Duration> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.worker.as_raw_pid()))?;
        // One that has ended meanwhile is not counted.
        let texts = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok());
        let nanos = texts.filter_map(|text| text.split(' ').next()?.parse::<u64>().ok());
        Ok(Duration::from_nanos(nanos.sum()))
    }

    /// Bytes of memory of the serving process: resident, and its page tables.
    ///
    /// # Errors
    /// If it is gone.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.worker.as_raw_pid()))?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
        };
        Ok((field("VmRSS:")?, field("VmPTE:")?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // As from a terminal; Gaia takes its children with it.
        let _ = rustix::process::kill_process(Pid::from_child(&self.child), Signal::INT);
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `gaia <command> --json` answers.
///
/// # Errors
/// If it does not.
pub fn ask(gaia: &Path, api: &Path, command: &[&str]) -> Result<Vec<Value>> {
    let output = Command::new(gaia).arg("--api").arg(api).arg("--json").args(command).output()?;
    let values = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
    let values: Vec<Value> = values.collect::<Result<_, _>>().context("what gaia answered is no JSON")?;
    // A long log may break off: what came of it counts.
    let said = || in_one_line(&String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() || !values.is_empty(), "gaia {}: {}", command.join(" "), said());
    Ok(values)
}

/// `GET /v1/status` of Gaia's control.
fn status(api: &Path) -> Result<Value> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::os::unix::net::UnixStream::connect(api)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: gaia\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let answer = load::answer(&bytes)?.context("half an answer")?;
    Ok(serde_json::from_slice(&answer.body)?)
}

/// What a program said, as one line for a table: from its first error on, or its end.
#[must_use]
pub fn in_one_line(text: &str) -> String {
    let clean = |line: &str| line.trim_matches(|c: char| c.is_whitespace() || c == '|' || c == '^').to_owned();
    let lines: Vec<String> = text.lines().map(clean).filter(|line| !line.is_empty()).collect();
    let error = lines.iter().position(|line| line.to_ascii_lowercase().starts_with("error"));
    let from = error.unwrap_or(lines.len().saturating_sub(3));
    let shown = lines.get(from..lines.len().min(from + 3)).unwrap_or_default().join(" / ");
    shown.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_a_program_said_the_first_error_is_told() {
        let said = "Compiling\nError: failed to link\n\nCaused by:\n    concurrency\nstack\nbacktrace\n";
        assert_eq!(in_one_line(said), "Error: failed to link / Caused by: / concurrency");
        assert_eq!(in_one_line("a\nb\nc\nd\n"), "b / c / d");
        assert_eq!(in_one_line(""), "");
    }

    #[test]
    fn a_manifest_has_what_the_graph_says() {
        let graph =
            Graph { name: "x".into(), lifecycle: "pinned", replicas: 7, mem_max: "1 MiB", grants: "random = {}" };
        let manifest: toml::Table = graph.manifest().parse().unwrap();
        let brane = &manifest["brane"]["x"];
        assert_eq!(brane["replicas"].as_integer(), Some(7));
        assert_eq!(brane["execution"]["lifecycle"].as_str(), Some("pinned"));
        assert_eq!(brane["limits"]["mem_max"].as_str(), Some("1 MiB"));
        assert!(brane["capability"]["random"].is_table());
    }
}
