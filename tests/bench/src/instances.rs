//! Many instances at a time, each with a request in it: what one costs in memory and time; and how an instance begins.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit};
use serde::Serialize;

use crate::load::{Connections, Load, Request};
use crate::numbers::{Sorted, median};
use crate::server::{Graph, Kind, Place, Server, ask, gaia};
use crate::workload::Workload;

/// KiB that each instance touches before it waits.
const TOUCHED_KIB: u64 = 64;
/// When no more instances come for so long, there will be none.
const STUCK: Duration = Duration::from_secs(5);

/// So many instances at a time.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// How many were wanted.
    pub instances: u32,
    /// How many there were, at most.
    pub live: u64,
    /// Requests that were answered rightly, after all of them had waited together.
    pub answered: usize,
    /// KiB of memory for each: resident beyond what the worker had before.
    pub resident_kib: Option<f64>,
    /// KiB of page tables for each.
    pub tables_kib: Option<f64>,
    /// The same together, without the 64 KiB that the guest itself touches.
    pub beyond_touched_kib: Option<f64>,
    /// Microseconds of the worker's processor time for each: connection, request, instance, 64 KiB touched.
    pub cpu_us: Option<f64>,
    /// Seconds until all of them were there.
    pub seconds: Option<f64>,
    /// Why there were fewer, or the figures are not there.
    pub reason: Option<String>,
}

/// Has this many requests in flight, each in an instance of its own that has touched 64 KiB and waits on a timer.
#[must_use]
pub fn at_once(number: u32, place: &Place) -> Row {
    let mut row = Row {
        instances: number,
        live: 0,
        answered: 0,
        resident_kib: None,
        tables_kib: None,
        beyond_touched_kib: None,
        cpu_us: None,
        seconds: None,
        reason: None,
    };
    if let Err(e) = measure(&mut row, place) {
        row.reason = Some(format!("{e:#}"));
    }
    row
}

/// As many descriptors as are needed, for this process and those it starts.
fn raise_descriptors(number: u64) -> Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map(|most| most.max(number));
    let raised = Rlimit { current: Some(limit.current.map_or(number, |now| now.max(number))), maximum };
    rustix::process::setrlimit(Resource::Nofile, raised).with_context(|| {
        format!("{number} descriptors are needed, and this process may have {}", limit.maximum.unwrap_or(0))
    })
}

fn measure(row: &mut Row, place: &Place) -> Result<()> {
    raise_descriptors(u64::from(row.instances) + 1000)?;
    let graph = Graph {
        name: "wait".into(),
        lifecycle: "ephemeral",
        replicas: row.instances,
        mem_max: "1 MiB",
        grants: "clock = { resolution = \"ms\" }",
    };
    let mut server = gaia(&graph, &place.branes.join("wait.wasm"), place, false, &[])?;
    let request = |sleep_ms: u32| Request {
        to: server.to,
        bytes: format!("GET /wait?touch_kib={TOUCHED_KIB}&sleep_ms={sleep_ms} HTTP/1.1\r\nHost: a\r\n\r\n")
            .into_bytes(),
        wanted: Some(format!("waited {sleep_ms} ms\n").into_bytes()),
    };
    // Long enough for all to be there before the first is done.
    let (first, waiting) = (request(0), request(10_000 + row.instances));
    server.ready(&first)?;
    let api = server.api.clone().context("no control")?;
    let (before, cpu) = (server.memory()?, server.cpu()?);
    let begun = Instant::now();
    let mut connections = Connections::open(&waiting, row.instances as usize)?;
    connections.ask_all()?;
    let mut grown = Instant::now();
    while row.live < u64::from(row.instances) && grown.elapsed() < STUCK {
        let ps = ask(&place.gaia, &api, &["ps"])?;
        let busy = ps.first().and_then(|ps| ps["branes"][0]["busy"].as_u64()).context("no brane in ps")?;
        if busy > row.live {
            (row.live, grown) = (busy, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let took = grown - begun;
    // Its counters say "busy" before the guest has run: all have when the worker is idle.
    let mut last = server.cpu()?;
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(200));
        let now = server.cpu()?;
        if now.saturating_sub(last) < Duration::from_millis(20) {
            break;
        }
        last = now;
    }
    let (after, cpu) = (server.memory()?, server.cpu()?.saturating_sub(cpu));
    if row.live == u64::from(row.instances) {
        let number = f64::from(row.instances);
        let kib = |bytes: u64| bytes as f64 / 1024.0 / number;
        let (resident, tables) = (kib(after.0.saturating_sub(before.0)), kib(after.1.saturating_sub(before.1)));
        row.resident_kib = Some(resident);
        row.tables_kib = Some(tables);
        row.beyond_touched_kib = Some(resident + tables - TOUCHED_KIB as f64);
        row.cpu_us = Some(cpu.as_secs_f64() * 1e6 / number);
        row.seconds = Some(took.as_secs_f64());
    } else {
        row.reason = Some(format!("no more than {} instances at a time", row.live));
        return Ok(());
    }
    let (right, wrong) = connections.hear_all(Duration::from_mins(2))?;
    row.answered = right;
    ensure!(wrong == 0 && right == row.instances as usize, "{wrong} wrong answers, and {right} right ones");
    Ok(())
}

/// How instances of `hello` begin, at half of the load that there can be.
#[derive(Debug, Clone, Serialize)]
pub struct Cold {
    /// The server.
    pub server: String,
    /// From dispatch to the guest's first instruction, in microseconds, as END lines say.
    pub p50_us: f64,
    /// The same.
    pub p99_us: f64,
    /// Requests a second meanwhile.
    pub rate: f64,
    /// END lines that were read.
    pub instances: usize,
    /// The part of them whose instance was ready before the request.
    pub ready: f64,
    /// The latency that the client saw at this rate, in microseconds.
    pub client_p50_us: Option<f64>,
    /// The same.
    pub client_p99_us: Option<f64>,
}

/// Measures it, at half of `most` requests a second.
///
/// # Errors
/// Why there are no figures.
pub fn cold(kind: Kind, most: f64, measured: Duration, place: &Place) -> Result<Cold> {
    let server = kind.start(Workload::Hello, place)?;
    let rate = most / 2.0;
    let load = Load { connections: 16, warm: Duration::from_millis(300), measured, rate: Some(rate) };
    let outcome = Connections::open(&Workload::Hello.request(server.to), load.connections)?.run(load)?;
    let api = server.api.clone().context("no control")?;
    let lines = ask(&place.gaia, &api, &["logs"])?;
    let ends: Vec<(u64, bool)> = lines
        .iter()
        .filter(|line| line["kind"] == "END")
        .filter_map(|line| Some((line["cold_ns"].as_u64()?, line["ready"] == true)))
        .collect();
    ensure!(!ends.is_empty(), "no END lines in its log");
    let ready = ends.iter().filter(|(_, ready)| *ready).count() as f64 / ends.len() as f64;
    let nanos = Sorted::new(ends.iter().map(|(nanos, _)| *nanos).collect());
    let client = Sorted::new(outcome.latencies);
    Ok(Cold {
        server: kind.name(),
        p50_us: nanos.percentile(50.0).context("nothing")?,
        p99_us: nanos.percentile(99.0).context("nothing")?,
        rate,
        instances: nanos.len(),
        ready,
        client_p50_us: client.percentile(50.0),
        client_p99_us: client.percentile(99.0),
    })
}

/// What the very first request after a deploy takes, as its client sees it, in milliseconds: the median of so many deploys.
///
/// # Errors
/// Why there is no figure.
pub fn first(kind: Kind, deploys: usize, place: &Place) -> Result<f64> {
    let each = (0..deploys).map(|_| {
        let mut server: Server = kind.prepared(Workload::Hello, place)?;
        // The port is open before there is a worker, so it is control that says when there is one.
        server.serving()?;
        Ok(server.ready(&Workload::Hello.request(server.to))?.as_secs_f64() * 1000.0)
    });
    let each: Vec<f64> = each.collect::<Result<_>>()?;
    median(each).context("no deploys")
}
