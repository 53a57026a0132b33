//! What is written: `results.json`, `table.md` and four plots.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::inside::Inside;
use crate::instances::{Cold, Row as Instances};
use crate::numbers::{Sorted, median, ratio};
use crate::plot::{Axis, Scale, Series, svg};

/// One server with one workload at one number of connections.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The server.
    pub server: String,
    /// The workload.
    pub workload: String,
    /// Connections, each with one request at a time.
    pub concurrency: usize,
    /// Right answers a second: the median of the rounds.
    pub requests_per_s: f64,
    /// Latency in microseconds: the medians of the rounds' percentiles.
    pub p50_us: f64,
    /// The same.
    pub p99_us: f64,
    /// Of its requests/s to hyper's: the median of the rounds' ratios.
    pub ratio_to_hyper: Option<f64>,
    /// Likewise to `wasmtime serve` as shipped.
    pub ratio_to_wasmtime_serve: Option<f64>,
    /// Answers that were wrong, in all rounds: then the row means nothing.
    pub wrong: u64,
    /// Processor time of the serving process for each request, in microseconds: the median of the rounds. Who else uses the
    /// core changes it less than requests/s.
    pub server_cpu_us: Option<f64>,
    /// The part of the time in which the load had something to do; near 1, it was the load that was measured.
    pub client_busy: f64,
    /// The requests/s of each round.
    pub rounds: Vec<f64>,
}

/// A server that was not measured with a workload.
#[derive(Debug, Clone, Serialize)]
pub struct Absent {
    /// The server.
    pub server: String,
    /// The workload.
    pub workload: String,
    /// Why.
    pub reason: String,
}

/// A goal, and what was measured of it.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// What.
    pub what: &'static str,
    /// The goal, in words.
    pub goal: &'static str,
    /// The figure, in words; `None` if it was not measured.
    pub measured: Option<String>,
    /// Whether it is reached.
    pub reached: Option<bool>,
    /// Why it was not measured.
    pub reason: Option<String>,
}

/// The machine, as it was.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Seconds since the Unix epoch at the beginning.
    pub time: u64,
    /// The processor's name.
    pub processor: String,
    /// The kernel.
    pub kernel: String,
    /// Cores online.
    pub cores: usize,
    /// The server's core and the load's.
    pub server_core: usize,
    /// The same.
    pub client_core: usize,
    /// The load average of a minute, before and after.
    pub load_before: f64,
    /// The same.
    pub load_after: f64,
    /// The arguments of this run.
    pub arguments: Vec<String>,
    /// Versions of what was measured.
    pub versions: BTreeMap<String, String>,
}

/// All of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of this form.
    pub version: u32,
    /// Where and when.
    pub machine: Machine,
    /// The rows.
    pub rows: Vec<Row>,
    /// What is not among them.
    pub absent: Vec<Absent>,
    /// Many instances at a time.
    pub instances: Vec<Instances>,
    /// How instances begin.
    pub cold: Vec<Cold>,
    /// Each workload without a network, in one instance after the other.
    pub released: Vec<(String, Inside)>,
    /// Requests/s of hyper with `hello`, by this load and by `wrk`, if that is installed.
    pub load_check: Option<(f64, f64)>,
    /// The goals.
    pub goals: Vec<Goal>,
    /// For the plot: percentile and microseconds of each server with `hello`.
    pub distribution: BTreeMap<String, Vec<(f64, f64)>>,
}

/// What one run of a round gave.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The server.
    pub server: String,
    /// The workload.
    pub workload: String,
    /// Connections.
    pub concurrency: usize,
    /// Right answers a second.
    pub rate: f64,
    /// Latencies.
    pub latencies: Sorted,
    /// Wrong answers.
    pub wrong: u64,
    /// As in [`Row`], of this round.
    pub server_cpu_us: Option<f64>,
    /// As in [`Row`].
    pub client_busy: f64,
}

/// The rows of these samples, which are in the order of their rounds.
#[must_use]
pub fn rows(samples: &[Sample]) -> Vec<Row> {
    type Key = (String, String, usize);
    let mut groups: Vec<(Key, Vec<&Sample>)> = Vec::new();
    for sample in samples {
        let key = (sample.workload.clone(), sample.server.clone(), sample.concurrency);
        match groups.iter_mut().find(|(k, _)| *k == key) {
            Some((_, group)) => group.push(sample),
            None => groups.push((key, vec![sample])),
        }
    }
    let rates = |key: &Key| -> Vec<f64> {
        groups.iter().filter(|(k, _)| k == key).flat_map(|(_, group)| group.iter().map(|s| s.rate)).collect()
    };
    let row = |(key, group): &(Key, Vec<&Sample>)| {
        let (workload, server, concurrency) = key.clone();
        let own = rates(key);
        let to = |other: &str| ratio(&own, &rates(&(workload.clone(), other.into(), concurrency)));
        let middle = |percent| median(group.iter().filter_map(|s| s.latencies.percentile(percent))).unwrap_or(0.0);
        Row {
            requests_per_s: median(own.iter().copied()).unwrap_or(0.0),
            p50_us: middle(50.0),
            p99_us: middle(99.0),
            ratio_to_hyper: to("hyper"),
            ratio_to_wasmtime_serve: to("wasmtime"),
            wrong: group.iter().map(|s| s.wrong).sum(),
            server_cpu_us: median(group.iter().filter_map(|s| s.server_cpu_us)),
            client_busy: median(group.iter().map(|s| s.client_busy)).unwrap_or(0.0),
            rounds: own,
            server,
            workload,
            concurrency,
        }
    };
    let mut all: Vec<Row> = groups.iter().map(row).collect();
    // Together what is compared.
    let order = |name: &str| groups.iter().position(|((workload, ..), _)| workload == name);
    all.sort_by_key(|row| (order(&row.workload), row.concurrency));
    all
}

/// Points of a distribution: each percentile that the plot can show.
#[must_use]
pub fn distribution(latencies: &Sorted) -> Vec<(f64, f64)> {
    // Evenly on the plot's axis, up to the last that stands for more than a handful.
    let last = (latencies.len() as f64 / 10.0).max(1.0).log10();
    let places = (0..=60).map(|n| f64::from(n) / 60.0 * last);
    let percents = places.map(|place| 100.0 * (1.0 - 10_f64.powf(-place)));
    percents.filter_map(|percent| Some((percent, latencies.percentile(percent)?))).collect()
}

impl Report {
    /// Writes everything into this folder.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        let put = |name: &str, text: String| {
            std::fs::write(folder.join(name), text).with_context(|| format!("{}", folder.join(name).display()))
        };
        put("results.json", serde_json::to_string_pretty(self)? + "\n")?;
        put("table.md", self.markdown())?;
        for (name, picture) in self.plots() {
            put(name, picture)?;
        }
        Ok(())
    }

    /// The tables.
    #[must_use]
    pub fn markdown(&self) -> String {
        let machine = &self.machine;
        let mut out = format!(
            "# Measured\n\n{}, {} cores, {}; server on core {}, load on core {}; load average {} before and {} after. \
             Ratios are the result, absolute figures are this machine's. docs/performance.md says what each means.\n\n\
             | workload | server | connections | requests/s | p50 µs | p99 µs | CPU µs | of hyper | of `wasmtime serve` |\n\
             |---|---|---|---|---|---|---|---|---|\n",
            machine.processor,
            machine.cores,
            machine.kernel,
            machine.server_core,
            machine.client_core,
            machine.load_before,
            machine.load_after
        );
        let two = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.2}"));
        for row in &self.rows {
            let mut notes = String::new();
            if row.wrong > 0 {
                let _ = write!(notes, " ({} wrong answers)", row.wrong);
            }
            if row.client_busy > 0.9 {
                notes.push_str(" (the load's core was full)");
            }
            let _ = writeln!(
                out,
                "| {} | {} | {} | {:.0}{notes} | {:.0} | {:.0} | {} | {} | {} |",
                row.workload,
                row.server,
                row.concurrency,
                row.requests_per_s,
                row.p50_us,
                row.p99_us,
                row.server_cpu_us.map_or(String::new(), |us| format!("{us:.1}")),
                two(row.ratio_to_hyper),
                two(row.ratio_to_wasmtime_serve)
            );
        }
        if let Some((own, wrk)) = self.load_check {
            let _ = writeln!(
                out,
                "\nThe load itself, against hyper at 16 connections: {own:.0} requests/s; `wrk` {wrk:.0}."
            );
        }
        if !self.cold.is_empty() {
            out.push_str(
                "\n| instances of `hello` at half load | p50 µs | p99 µs | requests/s | ready before | client p50 µs | p99 µs |\n\
                 |---|---|---|---|---|---|---|\n",
            );
        }
        for cold in &self.cold {
            let _ = writeln!(
                out,
                "| {} | {:.1} | {:.1} | {:.0} | {:.0} % | {} | {} |",
                cold.server,
                cold.p50_us,
                cold.p99_us,
                cold.rate,
                cold.ready * 100.0,
                two(cold.client_p50_us),
                two(cold.client_p99_us)
            );
        }
        self.without_a_network(&mut out);
        if !self.instances.is_empty() {
            out.push_str(
                "\n| instances at a time | live | answered | resident KiB each | page tables KiB each | beyond 64 KiB touched | \
                 CPU µs each | seconds to make | |\n|---|---|---|---|---|---|---|---|---|\n",
            );
        }
        let one = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.1}"));
        for row in &self.instances {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.instances,
                row.live,
                row.answered,
                one(row.resident_kib),
                one(row.tables_kib),
                one(row.beyond_touched_kib),
                one(row.cpu_us),
                two(row.seconds),
                row.reason.as_deref().unwrap_or("")
            );
        }
        out.push_str("\n| goal | | measured | reached |\n|---|---|---|---|\n");
        for goal in &self.goals {
            let measured = match (&goal.measured, &goal.reason) {
                (Some(measured), _) => measured.clone(),
                (None, reason) => format!("not measured: {}", reason.as_deref().unwrap_or("")),
            };
            let reached = goal.reached.map_or("", |reached| if reached { "yes" } else { "no" });
            let _ = writeln!(out, "| {} | {} | {measured} | {reached} |", goal.what, goal.goal);
        }
        self.not_measured(&mut out);
        out
    }

    fn not_measured(&self, out: &mut String) {
        if !self.absent.is_empty() {
            out.push_str("\nNot measured:\n\n");
        }
        for absent in &self.absent {
            let _ = writeln!(out, "- {} with {}: {}", absent.server, absent.workload, absent.reason);
        }
    }

    fn without_a_network(&self, out: &mut String) {
        if !self.released.is_empty() {
            out.push_str(
                "\n| without a network | CPU µs each | page faults each | work p50 µs | p99 µs | release p50 µs | p99 µs |\n\
                 |---|---|---|---|---|---|---|\n",
            );
        }
        for (workload, inside) in &self.released {
            let _ = writeln!(
                out,
                "| {workload} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
                inside.cpu_us,
                inside.faults,
                inside.work_p50_us,
                inside.work_p99_us,
                inside.release_p50_us,
                inside.release_p99_us
            );
        }
    }

    fn plots(&self) -> [(&'static str, String); 4] {
        let mut throughput: Vec<Series> = Vec::new();
        for row in self.rows.iter().filter(|row| row.workload == "hello") {
            let point = (row.concurrency as f64, row.requests_per_s);
            match throughput.iter_mut().find(|series| series.name == row.server) {
                Some(series) => series.points.push(point),
                None => throughput.push(Series { name: row.server.clone(), points: vec![point] }),
            }
        }
        let latency: Vec<Series> = self
            .distribution
            .iter()
            .map(|(name, points)| Series { name: name.clone(), points: points.clone() })
            .collect();
        let each = |name: &str, of: fn(&Instances) -> Option<f64>| {
            let points = self.instances.iter().filter_map(|row| Some((f64::from(row.instances), of(row)?))).collect();
            Series { name: name.into(), points }
        };
        let mib = |row: &Instances| Some((row.resident_kib? + row.tables_kib?) * f64::from(row.instances) / 1024.0);
        let touched = |row: &Instances| row.resident_kib.map(|_| f64::from(row.instances) / 16.0);
        let axis = |label, scale| Axis { label, scale };
        let live = axis("live instances", Scale::Log);
        [
            (
                "throughput.svg",
                svg(
                    "hello: throughput against concurrency",
                    axis("connections", Scale::Log),
                    axis("requests/s", Scale::Linear),
                    &throughput,
                ),
            ),
            (
                "latency.svg",
                svg(
                    "hello at 16 connections: latency distribution, closed loop",
                    axis("percentile", Scale::Percentile),
                    axis("µs", Scale::Log),
                    &latency,
                ),
            ),
            (
                "memory.svg",
                svg(
                    "memory against instances that have touched 64 KiB each",
                    live,
                    axis("MiB", Scale::Log),
                    &[each("resident and page tables", mib), each("touched by guests", touched)],
                ),
            ),
            (
                "instances.svg",
                svg(
                    "cost of an instance, from 100 to 60,000",
                    live,
                    axis("KiB, µs", Scale::Linear),
                    &[
                        each("KiB beyond what it touched", |row| row.beyond_touched_kib),
                        each("KiB of page tables", |row| row.tables_kib),
                        each("µs of processor time", |row| row.cpu_us),
                    ],
                ),
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn sample(server: &str, concurrency: usize, rate: f64) -> Sample {
        Sample {
            server: server.into(),
            workload: "hello".into(),
            concurrency,
            rate,
            latencies: Sorted::new((1..=1000).map(|n| n * 1000).collect()),
            wrong: 0,
            server_cpu_us: Some(20.0),
            client_busy: 0.5,
        }
    }

    fn report() -> Report {
        let samples = [
            sample("hyper", 16, 100.0),
            sample("gaia-pooled", 16, 40.0),
            sample("wasmtime", 16, 10.0),
            sample("hyper", 16, 50.0),
            sample("gaia-pooled", 16, 25.0),
            sample("wasmtime", 16, 5.0),
        ];
        Report {
            version: 2,
            machine: Machine {
                time: 0,
                processor: "p".into(),
                kernel: "k".into(),
                cores: 2,
                server_core: 0,
                client_core: 1,
                load_before: 0.1,
                load_after: 1.0,
                arguments: vec![],
                versions: BTreeMap::new(),
            },
            rows: rows(&samples),
            absent: vec![Absent {
                server: "node".into(),
                workload: "python".into(),
                reason: "Node runs no Python".into(),
            }],
            instances: vec![],
            cold: vec![],
            released: vec![(
                "json".into(),
                Inside {
                    requests: 1000,
                    rate: 8000.0,
                    cpu_us: 120.0,
                    faults: 0.5,
                    work_p50_us: 110.0,
                    work_p99_us: 130.0,
                    release_p50_us: 2.5,
                    release_p99_us: 11.25,
                },
            )],
            load_check: Some((100.0, 90.0)),
            goals: vec![Goal { what: "w", goal: "g", measured: None, reached: None, reason: Some("because".into()) }],
            distribution: [("hyper".to_owned(), distribution(&samples[0].latencies))].into(),
        }
    }

    #[test]
    fn rows_are_medians_of_rounds_and_ratios_within_them() {
        let rows = report().rows;
        let row = rows.iter().find(|row| row.server == "gaia-pooled").unwrap();
        assert_eq!((row.requests_per_s, row.p50_us, row.p99_us), (32.5, 500.0, 990.0));
        assert!((row.ratio_to_hyper.unwrap() - 0.45).abs() < 1e-9);
        assert!((row.ratio_to_wasmtime_serve.unwrap() - 4.5).abs() < 1e-9);
        assert_eq!(row.rounds, [40.0, 25.0]);
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn a_server_without_the_other_has_no_ratio_to_it() {
        let rows = rows(&[sample("gaia-pooled", 1, 1.0), sample("hyper", 16, 1.0)]);
        assert!(rows.iter().all(|row| row.ratio_to_wasmtime_serve.is_none()));
        assert_eq!(rows[0].ratio_to_hyper, None, "at another number of connections");
    }

    #[test]
    fn the_results_have_one_row_per_server_workload_and_concurrency() {
        let value: Value = serde_json::to_value(report()).unwrap();
        let rows = value["rows"].as_array().unwrap();
        for row in rows {
            for key in ["server", "workload"] {
                assert!(row[key].is_string(), "{row}");
            }
            for key in
                ["concurrency", "requests_per_s", "p50_us", "p99_us", "ratio_to_hyper", "ratio_to_wasmtime_serve"]
            {
                assert!(row[key].is_number(), "{key}: {row}");
            }
        }
        let names: std::collections::BTreeSet<_> = rows.iter().map(|row| row["server"].as_str()).collect();
        assert_eq!(names.len(), rows.len());
        for key in ["machine", "absent", "instances", "cold", "goals"] {
            assert!(!value[key].is_null(), "{key}");
        }
    }

    #[test]
    fn the_tables_say_what_was_not_measured_and_why() {
        let text = report().markdown();
        assert!(text.contains("| hello | gaia-pooled | 16 | 32 | 500 | 990 | 20.0 | 0.45 | 4.50 |"), "{text}");
        assert!(text.contains("- node with python: Node runs no Python") && text.contains("not measured: because"));
        for table in text.split("\n\n").filter(|part| part.starts_with('|')) {
            let columns: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
            assert!(columns.iter().all(|number| *number == columns[0]), "{table}");
        }
    }

    #[test]
    fn a_distribution_goes_no_further_than_there_are_values_for() {
        let points = distribution(&Sorted::new((1..=1000).collect()));
        assert_eq!(points[0], (0.0, 0.001));
        let last = points.last().unwrap().0;
        assert!((98.9..99.1).contains(&last), "{last}");
        assert!(distribution(&Sorted::default()).is_empty());
    }

    #[test]
    fn all_files_are_written() {
        let folder = tempfile::tempdir().unwrap();
        report().write(folder.path()).unwrap();
        for name in ["results.json", "table.md", "throughput.svg", "latency.svg", "memory.svg", "instances.svg"] {
            assert!(std::fs::metadata(folder.path().join(name)).unwrap().len() > 100, "{name}");
        }
    }
}
