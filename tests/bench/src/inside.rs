//! The request path without a network: in one process an instance is made, handles a request, and is released, one after the
//! other, with the pool and the linked component that a worker has.

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use gaia_manifest::Lifecycle;
use gaia_runtime::log::Log;
use gaia_runtime::plan::{self, Plan};
use gaia_runtime::statistics::Statistics;
use gaia_runtime::worker::brane::{Brane, Instance};
use gaia_runtime::worker::host::Means;
use gaia_runtime::worker::turns::{Terms, thread_cpu};
use gaia_runtime::{channel, compile, engine, kept};
use http_body_util::{BodyExt as _, Full};
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use wasmtime_wasi_http::WasiHttpView as _;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;

use crate::numbers::{Sorted, median};
use crate::server::{Graph, Place, stay_on};
use crate::workload::Workload;

/// What a worker keeps of freed memory.
const KEPT: usize = 2 << 20;
/// Slots of the pool. Of them one is used: the one that was used last.
const SLOTS: u32 = 16;
/// Slots of a pool that gets no huge pages, however much its instances grow.
const SINGLE_PAGES: u32 = 1025;
/// Rounds where two are compared.
const ROUNDS: usize = 5;

/// What was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Inside {
    /// Requests.
    pub requests: usize,
    /// Of them in a second.
    pub rate: f64,
    /// Processor time of each, in microseconds.
    pub cpu_us: f64,
    /// Page faults of each.
    pub faults: f64,
    /// From dispatch to the end of the guest's work, with its instance's start, in microseconds.
    pub work_p50_us: f64,
    /// The same.
    pub work_p99_us: f64,
    /// From the end of the guest's work to the moment its slot is free again, in microseconds.
    pub release_p50_us: f64,
    /// The same.
    pub release_p99_us: f64,
}

/// Measures it for so long, with so many slots, on the core that this thread is on; from the moment at which `started` returns,
/// when everything is ready and warm.
///
/// # Errors
/// If the component cannot be had, or answers wrongly.
pub fn run(
    workload: Workload,
    component: &Path,
    slots: u32,
    measured: Duration,
    started: impl FnOnce() -> Result<()>,
) -> Result<Inside> {
    kept::keep(KEPT);
    let graph = Graph::of(workload, "ephemeral", slots);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let brane = Rc::new(brane(&graph, component)?);
        brane.first_instance().await?;
        let request = Request::of(workload);
        let (mut all, mut released) = (Vec::new(), Vec::new());
        let warm = Instant::now() + measured / 6;
        while Instant::now() < warm {
            once(&brane, &request).await?;
        }
        started()?;
        let (before, faults, begun) = (thread_cpu(), faults()?, Instant::now());
        while begun.elapsed() < measured {
            let (work, release) = once(&brane, &request).await?;
            all.push(nanos(work));
            released.push(nanos(release));
        }
        let (cpu, took) = (thread_cpu().saturating_sub(before), begun.elapsed());
        let requests = all.len() as f64;
        let (faults, all, released) = (self::faults()? - faults, Sorted::new(all), Sorted::new(released));
        let of = |sorted: &Sorted, percent| sorted.percentile(percent).context("nothing was measured");
        Ok(Inside {
            requests: all.len(),
            rate: requests / took.as_secs_f64(),
            cpu_us: cpu.as_secs_f64() * 1e6 / requests,
            faults: faults as f64 / requests,
            work_p50_us: of(&all, 50.0)?,
            work_p99_us: of(&all, 99.0)?,
            release_p50_us: of(&released, 50.0)?,
            release_p99_us: of(&released, 99.0)?,
        })
    })
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Page faults of this process until now that needed no disk.
fn faults() -> Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').context("/proc/self/stat")?.1;
    fields.split_whitespace().nth(7).and_then(|minor| minor.parse().ok()).context("/proc/self/stat")
}

/// The graph's one brane, as a worker has it.
fn brane(graph: &Graph, component: &Path) -> Result<Brane> {
    let manifest = gaia_manifest::parse(&graph.manifest()).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let said = manifest.branes.first().context("no brane")?;
    let reservation = engine::reservation(said.replicas, said.limits.mem_max.value);
    let compiled = compile::compile(&std::fs::read(component)?, reservation);
    let (report, artefact) = compiled.map_err(|e| anyhow::anyhow!("{e:#}"))?;
    let plan = plan::Brane {
        name: said.name.value.clone(),
        image: said.image.value.to_string(),
        digest: String::new(),
        artefact: "artefact".into(),
        reservation,
        needs: report.needs.context("nobody knows what it needs")?,
        host: None,
        path: said.ingress.path.clone(),
        grants: said.capabilities.iter().map(|grant| grant.capability.clone()).collect(),
        secrets: Vec::new(),
        lifecycle: Lifecycle::Ephemeral,
        replicas: said.replicas,
        keeper: None,
        mem_max: said.limits.mem_max.value,
        cpu_quota: None,
        deadline: said.limits.deadline,
        body_max: said.limits.body_max,
    };
    let page = rustix::fs::memfd_create("statistics", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&page, gaia_init::supervise::STATISTICS_BYTES)?;
    rustix::fs::fcntl_add_seals(&page, SealFlags::SHRINK)?;
    let log = Arc::new(Log::new(Arc::new(Statistics::map(&page)?)));
    let plan = Plan { generation: 1, graph: None, trial: None, workers: 1, branes: vec![plan], roots: String::new() };
    let means = Rc::new(Means::of(&plan, u64::MAX)?);
    let artefact = channel::sealed("artefact", &artefact)?;
    Ok(Brane::link(&plan.branes[0], 0, (0, 1), &artefact, log, means)?)
}

/// A request, and what is to be answered.
struct Request {
    head: http::request::Builder,
    body: Bytes,
    wanted: Vec<u8>,
}

impl Request {
    fn of(workload: Workload) -> Self {
        let (body, wanted) = workload.exchange();
        let method = if body.is_empty() { "GET" } else { "POST" };
        let head = http::Request::builder().method(method).uri(format!("http://a/{}", workload.name()));
        Self { head, body: body.into(), wanted }
    }

    fn get(&self) -> Result<http::Request<Full<Bytes>>> {
        let head = http::Request::builder();
        let from = self.head.method_ref().zip(self.head.uri_ref()).context("half a request")?;
        Ok(head.method(from.0.clone()).uri(from.1.clone()).body(Full::new(self.body.clone()))?)
    }
}

/// One request in an instance of its own: how long that worked, and how long its release took.
async fn once(brane: &Rc<Brane>, request: &Request) -> Result<(Duration, Duration)> {
    let request_in = request.get()?;
    let slot = Arc::clone(&brane.slots).try_acquire_owned()?;
    let began = Instant::now();
    let Instance { serial, mut store, held, .. } = brane.take();
    let (sender, head) = oneshot::channel();
    let cpu = Cell::default();
    let work = async {
        let proxy = brane.pre().instantiate_async(&mut store).await?;
        let mut http = store.data_mut().http();
        let incoming = http.new_incoming_request(Scheme::Http, request_in)?;
        let outparam = http.new_response_outparam(sender)?;
        proxy.wasi_http_incoming_handler().call_handle(&mut store, incoming, outparam).await
    };
    let throttled = &brane.count().throttled_ns;
    let terms = Terms { cpu: Some(&cpu), replica: None, throttled, memory: Some(brane.share(&held)) };
    let work = brane.turns().run(work, terms);
    let answer = async { anyhow::Ok(head.await??.into_body().collect().await?.to_bytes()) };
    let (worked, answer) = tokio::join!(work, answer);
    worked.map_err(|e| anyhow::anyhow!("{e:#}"))?;
    let answer = answer?;
    let ended = Instant::now();
    drop(store);
    drop(slot);
    let released = ended.elapsed();
    brane.end(serial);
    ensure!(answer == request.wanted, "wrong answer: {}", String::from_utf8_lossy(&answer));
    Ok((ended - began, released))
}

/// A process that measures it, ready and warm.
struct Measuring {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Measuring {
    fn on(core: usize, workload: Workload, slots: u32, measured: Duration, place: &Place) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["inside", workload.name()]).arg(place.component(workload)?);
        command.args([slots.to_string(), measured.as_secs_f64().to_string()]);
        // A child has the cores of the thread that starts it.
        stay_on(&[core])?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        stay_on(&[place.client])?;
        let mut child = child?;
        let mut said = BufReader::new(child.stdout.take().context("it says nothing")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        ensure!(line == "ready\n", "it did not get ready");
        Ok(Self { child, said })
    }

    fn begin(&mut self) -> Result<()> {
        Ok(self.child.stdin.take().context("it began before")?.write_all(b"begin\n")?)
    }

    fn end(mut self) -> Result<Inside> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        self.child.wait()?;
        serde_json::from_str(&line).context("it did not come to an end")
    }
}

/// What a process does that is to be told when to begin: the other end of `Measuring`.
///
/// # Errors
/// If nobody tells.
pub fn told() -> Result<()> {
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// Measures it in a process of its own, on the server's core.
///
/// # Errors
/// As [`run`].
pub fn alone(workload: Workload, measured: Duration, place: &Place) -> Result<Inside> {
    one(workload, SLOTS, measured, place)
}

fn one(workload: Workload, slots: u32, measured: Duration, place: &Place) -> Result<Inside> {
    let mut one = Measuring::on(place.server, workload, slots, measured, place)?;
    one.begin()?;
    one.end()
}

/// What two workers do together, each on a core, over what one does alone: medians of rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Two {
    /// By requests in a second.
    pub by_rate: f64,
    /// By the processor time of a request: what others take of the two cores is not in it, nor what two would wait for each other.
    pub by_cpu: f64,
}

/// Measures that with `hello`.
///
/// # Errors
/// As [`run`].
pub fn two(measured: Duration, place: &Place) -> Result<Two> {
    let (mut rates, mut cpus) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let alone = alone(Workload::Hello, measured, place)?;
        let start = |core| Measuring::on(core, Workload::Hello, SLOTS, measured, place);
        let mut both = [start(place.server)?, start(place.client)?];
        for one in &mut both {
            one.begin()?;
        }
        let [first, second] = both.map(Measuring::end);
        let (first, second) = (first?, second?);
        rates.push((first.rate + second.rate) / alone.rate);
        cpus.push(alone.cpu_us / first.cpu_us + alone.cpu_us / second.cpu_us);
    }
    Ok(Two { by_rate: median(rates).context("no rounds")?, by_cpu: median(cpus).context("no rounds")? })
}

/// How many times the processor time a request to `touch` takes in single pages that it takes in huge ones.
///
/// # Errors
/// As [`run`].
pub fn pages(measured: Duration, place: &Place) -> Result<f64> {
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let of = |slots| one(Workload::Touch, slots, measured, place);
        let (single, huge) = (of(SINGLE_PAGES)?, of(SLOTS)?);
        ratios.push(single.cpu_us / huge.cpu_us);
    }
    median(ratios).context("no rounds")
}
