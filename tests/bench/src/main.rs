//! The command that measures. See the library.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures are shown with three digits"
)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command as Process;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum as _};

use gaia_bench::load::{Connections, Load};
use gaia_bench::numbers::{Sorted, median, ratio};
use gaia_bench::report::{self, Absent, Goal, Machine, Report, Sample};
use gaia_bench::server::{Kind, Place, Server, stay_on};
use gaia_bench::tools::{Tools, Wanted};
use gaia_bench::workload::{self, Workload};
use gaia_bench::{inside, instances, native};
use gaia_runtime::kept::Kept;

/// Gaia's own, for where its request path runs here. Elsewhere nobody says that it is to keep anything, and it is musl's.
#[global_allocator]
static ALLOCATOR: Kept = Kept;

/// Connections where only one number of them is measured.
const USUAL: usize = 16;

/// Measure Gaia beside others.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure, and write results.json, table.md and plots
    Run(Box<Options>),
    /// hyper alone: one of the servers that are measured
    #[command(hide = true)]
    Native {
        /// Where to listen
        listen: SocketAddr,
    },
    /// Gaia's request path without a network: what it takes, as JSON
    #[command(hide = true)]
    Inside {
        /// What is asked
        workload: Workload,
        /// Its component
        component: PathBuf,
        /// How many slots there are
        slots: u32,
        /// For how many seconds
        duration: f64,
    },
}

/// How much is measured.
#[derive(Debug, Args)]
struct Options {
    /// Rounds: in each of them every server has its turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each turn
    #[arg(long, default_value_t = 3.0)]
    duration: f64,
    /// Numbers of connections for hello; the other workloads have 16
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
    concurrency: Vec<usize>,
    /// Everything once and shortly, to see that it works: the figures mean little
    #[arg(long)]
    quick: bool,
    /// These workloads; all, if not said
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// These servers; all, if not said
    #[arg(long, value_delimiter = ',')]
    servers: Vec<Kind>,
    /// Numbers of instances at a time
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 4000, 8000, 16_000, 32_000, 60_000])]
    instances: Vec<u32>,
    /// The server's core and the load's
    #[arg(long, value_delimiter = ',', num_args = 1, default_values_t = [0, 1])]
    cores: Vec<usize>,
    /// The command that is measured
    #[arg(long, default_value = "out/bin/gaia")]
    gaia: PathBuf,
    /// The folder of its guests
    #[arg(long, default_value = "out/branes")]
    branes: PathBuf,
    /// Where other servers and components are kept
    #[arg(long)]
    cache: PathBuf,
    /// Where the results go
    #[arg(long, default_value = "bench")]
    out: PathBuf,
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Native { listen } => native::serve(listen),
        Command::Inside { workload, component, slots, duration } => {
            let measured = Duration::from_secs_f64(duration);
            let inside = inside::run(workload, &component, slots, measured, inside::told)?;
            println!("{}", serde_json::to_string(&inside)?);
            Ok(())
        }
        Command::Run(options) => run(*options),
    }
}

fn run(mut options: Options) -> Result<()> {
    if options.quick {
        (options.rounds, options.duration) = (1, 0.5);
        options.instances.retain(|number| *number <= 1000);
        options.concurrency.retain(|number| *number == USUAL);
    }
    if options.workloads.is_empty() {
        options.workloads = workload::ALL.to_vec();
    }
    if options.servers.is_empty() {
        options.servers = Kind::value_variants().to_vec();
    }
    let [server, client] = options.cores[..] else { anyhow::bail!("--cores takes two: the server's and the load's") };
    ensure!(server < client, "the server's core must be the lower one: of two, Gaia's worker has the first");
    let has = |workload| options.workloads.contains(&workload);
    let wanted = Wanted {
        wasmtime: options.servers.iter().any(|kind| matches!(kind, Kind::Wasmtime | Kind::WasmtimeTuned)),
        workerd: options.servers.contains(&Kind::Workerd),
        javascript: has(Workload::JavaScript),
        python: has(Workload::Python),
    };
    let tools = Tools::get(wanted, &options.cache);
    let place = Place { server, client, gaia: options.gaia.clone(), branes: options.branes.clone(), tools };
    let mut machine = machine(&place)?;
    stay_on(&[client])?;

    let (mut samples, mut absent) = (Vec::new(), Vec::new());
    for workload in &options.workloads {
        measure(*workload, &options, &place, &mut samples, &mut absent);
    }
    let rows = report::rows(&samples);
    let mut distribution = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.workload == "hello" && sample.concurrency == USUAL) {
        distribution.insert(sample.server.clone(), report::distribution(&sample.latencies));
    }
    let measured = Duration::from_secs_f64(options.duration);
    let mut cold = Vec::new();
    for kind in [Kind::GaiaEphemeral, Kind::GaiaPooled] {
        let most = rows.iter().find(|r| r.workload == "hello" && r.concurrency == USUAL && r.server == kind.name());
        let Some(most) = most else { continue };
        eprintln!("{} at half load", kind.name());
        match instances::cold(kind, most.requests_per_s, measured, &place) {
            Ok(row) => cold.push(row),
            Err(e) => absent.push(Absent {
                server: kind.name(),
                workload: "hello at half load".into(),
                reason: format!("{e:#}"),
            }),
        }
    }
    let gaia = options.servers.iter().any(|kind| kind.lifecycle().is_some());
    let deploys = if options.quick { 3 } else { 11 };
    let first = gaia.then(|| instances::first(Kind::GaiaPooled, deploys, &place));
    let mut many = Vec::new();
    for number in options.instances.iter().filter(|_| gaia) {
        eprintln!("{number} instances at a time");
        many.push(instances::at_once(*number, &place));
    }
    let mut released = Vec::new();
    for workload in options.workloads.iter().filter(|_| gaia) {
        eprintln!("{} without a network", workload.name());
        match inside::alone(*workload, measured, &place) {
            Ok(inside) => released.push((workload.name().to_owned(), inside)),
            Err(e) => absent.push(Absent {
                server: "gaia without a network".into(),
                workload: workload.name().into(),
                reason: format!("{e:#}"),
            }),
        }
    }
    let two = gaia.then(|| inside::two(measured, &place));
    let pages = (gaia && has(Workload::Touch)).then(|| inside::pages(measured, &place));
    machine.load_after = load_average();
    let load_check = if options.servers.contains(&Kind::Hyper) { wrk(measured, &place) } else { None };
    let goals = goals(&rows, &cold, &many, first, Inside { released: &released, two, pages });
    let instances = many;
    let report =
        Report { version: 2, machine, rows, absent, instances, cold, released, load_check, goals, distribution };
    report.write(&options.out)?;
    println!("{}", report.markdown());
    eprintln!("written to {}", options.out.display());
    Ok(())
}

/// All servers with one workload.
fn measure(workload: Workload, options: &Options, place: &Place, samples: &mut Vec<Sample>, absent: &mut Vec<Absent>) {
    let mut servers: Vec<(Kind, Server)> = Vec::new();
    for kind in &options.servers {
        eprintln!("{}: starting {}", workload.name(), kind.name());
        match kind.start(workload, place) {
            Ok(server) => servers.push((*kind, server)),
            Err(e) => {
                absent.push(Absent { server: kind.name(), workload: workload.name().into(), reason: format!("{e:#}") });
            }
        }
    }
    let concurrency = if workload == Workload::Hello { options.concurrency.clone() } else { vec![USUAL] };
    for round in 0..options.rounds {
        for connections in &concurrency {
            for turn in 0..servers.len() {
                // Nobody always comes first, or always behind the same one.
                let (kind, server) = &servers[(turn + round) % servers.len()];
                eprint!("\r\x1b[K{} round {} {} ×{connections}", workload.name(), round + 1, kind.name());
                let measured = Duration::from_secs_f64(options.duration);
                let load = Load { connections: *connections, warm: measured / 6, measured, rate: None };
                let before = server.cpu();
                let ran = Connections::open(&workload.request(server.to), *connections).and_then(|mut c| c.run(load));
                let outcome = match ran {
                    Ok(outcome) => outcome,
                    Err(e) => {
                        let reason = format!("round {}, {connections} connections: {e:#}", round + 1);
                        absent.push(Absent { server: kind.name(), workload: workload.name().into(), reason });
                        continue;
                    }
                };
                let cpu = before.and_then(|before| Ok(server.cpu()?.saturating_sub(before)));
                samples.push(Sample {
                    server: kind.name(),
                    workload: workload.name().into(),
                    concurrency: *connections,
                    rate: outcome.answers as f64 / outcome.seconds,
                    latencies: Sorted::new(outcome.latencies),
                    wrong: outcome.wrong,
                    server_cpu_us: cpu.ok().map(|cpu| cpu.as_secs_f64() * 1e6 / outcome.all.max(1) as f64),
                    client_busy: outcome.busy,
                });
            }
        }
    }
    eprint!("\r\x1b[K");
}

/// The load average of the last minute.
fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

fn machine(place: &Place) -> Result<Machine> {
    let processors = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let names: Vec<&str> = processors
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.trim()))
        .collect();
    let mut versions = BTreeMap::new();
    let mut version = |name: &str, program: Result<PathBuf>| {
        let said = program.ok().and_then(|program| Process::new(program).arg("--version").output().ok());
        if let Some(said) = said {
            versions.insert(name.to_owned(), String::from_utf8_lossy(&said.stdout).trim().to_owned());
        }
    };
    version("gaia", Ok(std::path::absolute(&place.gaia)?));
    version("wasmtime", place.tools.wasmtime());
    version("workerd", place.tools.workerd());
    version("node", Ok("node".into()));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Machine {
        time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        processor: names.first().copied().unwrap_or("unknown").to_owned(),
        kernel: format!("Linux {}", kernel.trim()),
        cores: names.len(),
        server_core: place.server,
        client_core: place.client,
        load_before: load_average(),
        load_after: 0.0,
        arguments: std::env::args().skip(1).collect(),
        versions,
    })
}

/// Requests/s of hyper with `hello`, by this load and by `wrk` in turns: whether the load of this program is as good.
fn wrk(measured: Duration, place: &Place) -> Option<(f64, f64)> {
    let server = Kind::Hyper.start(Workload::Hello, place).ok()?;
    let seconds = format!("{}s", measured.as_secs().max(1));
    let url = format!("http://{}/hello", server.to);
    let load = Load { connections: USUAL, warm: measured / 6, measured, rate: None };
    let (mut own, mut other) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let outcome = Connections::open(&Workload::Hello.request(server.to), USUAL).ok()?.run(load).ok()?;
        own.push(outcome.answers as f64 / outcome.seconds);
        // It stays on this thread's core, as a child does.
        let output = Process::new("wrk").args(["-t1", "-c16", "-d", &seconds, &url]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"))?;
        other.push(line.trim().parse().ok()?);
    }
    Some((median(own)?, median(other)?))
}

/// What was measured without a network.
struct Inside<'a> {
    released: &'a [(String, inside::Inside)],
    two: Option<Result<inside::Two>>,
    pages: Option<Result<f64>>,
}

/// The goals, with what was measured of each.
fn goals(
    rows: &[report::Row],
    cold: &[instances::Cold],
    many: &[instances::Row],
    first: Option<Result<f64>>,
    inside: Inside<'_>,
) -> Vec<Goal> {
    let hello =
        |kind: Kind| rows.iter().find(|r| r.workload == "hello" && r.concurrency == USUAL && r.server == kind.name());
    let goal = |what, goal, measured: Option<(String, bool)>, reason: &str| Goal {
        what,
        goal,
        reached: measured.as_ref().map(|(_, reached)| *reached),
        reason: measured.is_none().then(|| reason.to_owned()),
        measured: measured.map(|(figure, _)| figure),
    };
    let fresh = [Kind::GaiaPooled, Kind::GaiaEphemeral].into_iter().filter_map(hello);
    let fresh = fresh.max_by(|a, b| a.requests_per_s.total_cmp(&b.requests_per_s));
    let over = |ratio: Option<f64>, least: f64| ratio.map(|ratio| (format!("{ratio:.2}"), ratio >= least));
    let against = |without: Kind| {
        let (with, without) = (hello(Kind::GaiaEphemeral)?, hello(without)?);
        let by_rate = ratio(&with.rounds, &without.rounds)?;
        let by_cpu = without.server_cpu_us.zip(with.server_cpu_us).map_or(0.0, |(without, with)| without / with);
        Some((format!("{by_rate:.3}; by the worker's processor time {by_cpu:.3}"), by_rate >= 0.95))
    };
    let ready = cold.iter().find(|row| row.server == Kind::GaiaPooled.name() && row.ready > 0.5);
    let ready = ready.map(|row| {
        let reached = row.p50_us <= 5.0 && row.p99_us <= 30.0;
        (format!("p50 {:.1} µs, p99 {:.1} µs", row.p50_us, row.p99_us), reached)
    });
    let (first, no_first) = match first {
        Some(Ok(millis)) => (Some((format!("p50 {millis:.2} ms at the client"), millis <= 1.2)), String::new()),
        Some(Err(e)) => (None, format!("{e:#}")),
        None => (None, "Gaia was not measured".into()),
    };
    let most = many.iter().filter(|row| row.reason.is_none()).max_by_key(|row| row.instances);
    let most = most.map(|row| {
        let each = row.beyond_touched_kib.unwrap_or(0.0);
        (format!("{}, {each:.1} KiB each by the process's count", row.answered), row.answered >= 62_000 && each <= 64.0)
    });
    let release = inside.released.iter().find(|(workload, _)| workload == "hello");
    let release = release.map(|(_, of)| {
        let figure = format!("p50 {:.1} µs, p99 {:.1} µs with hello", of.release_p50_us, of.release_p99_us);
        (figure, of.release_p99_us <= 100.0)
    });
    let why = |of: Option<anyhow::Error>| of.map_or("Gaia was not measured".into(), |e| format!("{e:#}"));
    let (two, no_two) = match inside.two {
        Some(Ok(two)) => {
            let figure = format!("{:.2}; by processor time {:.2}", two.by_rate, two.by_cpu);
            (Some((figure, two.by_rate >= 1.9)), String::new())
        }
        other => (None, why(other.and_then(Result::err))),
    };
    let (pages, no_pages) = match inside.pages {
        Some(Ok(pages)) => (over(Some(pages), 3.0), String::new()),
        other => (None, why(other.and_then(Result::err))),
    };
    let image = "tests/it measures it with the appliance: make it T=image, make it T=idle";
    vec![
        goal(
            "requests/s, hello, fresh instance per request, over `wasmtime serve` as shipped",
            "≥ 4",
            over(fresh.and_then(|r| r.ratio_to_wasmtime_serve), 4.0),
            "no row",
        ),
        goal("the same, of hyper", "≥ 0.40", over(fresh.and_then(|r| r.ratio_to_hyper), 0.40), "no row"),
        goal(
            "requests/s, pinned, of hyper",
            "≥ 0.60",
            over(hello(Kind::GaiaPinned).and_then(|r| r.ratio_to_hyper), 0.60),
            "no row: see what is absent",
        ),
        goal(
            "cold, ready instance, at half load",
            "p50 ≤ 5 µs, p99 ≤ 30 µs",
            ready,
            "no instance was ready before its request",
        ),
        goal("first request after a deploy", "p50 ≤ 1.2 ms", first, &no_first),
        goal("release", "p99 ≤ 100 µs", release, "hello was not measured"),
        goal("two workers against one, work in process", "≥ 1.9", two, &no_two),
        goal("requests in flight", "62,000, ≤ 64 KiB each", most, "no number of instances was reached"),
        goal("32 MiB with huge pages against without, by processor time", "≥ 3", pages, &no_pages),
        goal(
            "logging and profiling on, against off",
            "≥ 0.95",
            against(Kind::GaiaBare),
            "one of the two was not measured",
        ),
        goal("profiling on, against off", "≥ 0.95", against(Kind::GaiaUnprofiled), "one of the two was not measured"),
        goal(
            "boot, over a trivial init",
            "≤ 1.3",
            None,
            "tests/it measures it with the appliance: make it T=trivial, with --ignored",
        ),
        goal("image, idle memory", "≤ 16 MiB, ≤ 64 MiB", None, image),
    ]
}
