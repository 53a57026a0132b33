//! What is counted, as whoever collects it finds it: in the form that it is to have, right, and no further than it is meant to go.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{ANSWER_WITHIN, Appliance, SECURE_PORT, SETTINGS, Setup, http};

const GRAPH: &str = "[brane.hello]\nimage = \"file:./hello.wasm\"\nreplicas = 3\n\
                     [brane.counter]\nimage = \"file:./counter.wasm\"\nreplicas = 1\n\
                     [brane.counter.execution]\nlifecycle = \"pinned\"\n\
                     [brane.faulty]\nimage = \"file:./faulty.wasm\"\nreplicas = 1\n";

/// A sample's name and labels, as they stand, and its value.
type Samples = BTreeMap<String, f64>;

/// Reads the text as the two forms have it, and says what is wrong with it: a grammar of what is used of them.
fn read(text: &str, open_metrics: bool) -> Result<Samples, String> {
    let (mut samples, mut families, mut kind, mut family) =
        (Samples::new(), BTreeSet::new(), String::new(), String::new());
    let mut lines = text.strip_suffix('\n').ok_or("no line end at its end")?.split('\n').peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" {
            let is_right = open_metrics && lines.peek().is_none();
            return is_right.then_some(samples).ok_or_else(|| "an end that is none".into());
        }
        if let Some(rest) = line.strip_prefix("# ") {
            let words: Vec<&str> = rest.splitn(3, ' ').collect();
            match words[..] {
                ["TYPE", name, of] => {
                    let known = ["counter", "gauge", "histogram"].contains(&of) || (open_metrics && of == "info");
                    let called = open_metrics == (of == "counter" && !name.ends_with("_total")) || of != "counter";
                    if !known || !called || !families.insert(name.to_owned()) {
                        return Err(format!("{line}: a family of no kind, or that was there"));
                    }
                    (family, kind) = (name.to_owned(), of.to_owned());
                }
                ["HELP", name, help] if name == family && !help.is_empty() => {}
                ["UNIT", name, unit] if open_metrics && name == family && name.ends_with(&format!("_{unit}")) => {}
                _ => return Err(format!("{line}: no such comment here")),
            }
            continue;
        }
        let (of, value) = line.rsplit_once(' ').ok_or_else(|| format!("{line}: no value"))?;
        let (name, labels) = of.split_once('{').map_or((of, None), |(name, rest)| (name, rest.strip_suffix('}')));
        let ends: &[&str] = match (kind.as_str(), open_metrics) {
            ("histogram", _) => &["_bucket", "_sum", "_count"],
            ("counter", true) => &["_total"],
            ("info", true) => &["_info"],
            _ => &[""],
        };
        let named = ends.iter().any(|end| name == format!("{family}{end}"));
        let bounded = of.contains(",le=\"") == (kind == "histogram" && name.ends_with("_bucket"));
        if !named || !bounded || of.contains('{') != labels.is_some() {
            return Err(format!("{line}: is no sample of {family}, which is a {kind}"));
        }
        for label in labels.iter().flat_map(|labels| labels.split("\",")) {
            let (key, value) = label.split_once("=\"").ok_or_else(|| format!("{line}: no label"))?;
            let plain = key.bytes().all(|b| b.is_ascii_lowercase());
            if !plain || value.trim_end_matches('"').contains(['"', '\\']) {
                return Err(format!("{line}: {key} is no label, or none that is written so"));
            }
        }
        let number: f64 = value.parse().map_err(|_| format!("{line}: no number"))?;
        if samples.insert(of.to_owned(), number).is_some() {
            return Err(format!("{line}: was there"));
        }
    }
    (!open_metrics).then_some(samples).ok_or_else(|| "no end".into())
}

fn counted(run: &Run) -> Samples {
    let (status, text, error) = run.gaia(&["metrics"]).unwrap();
    assert!(status.success(), "{error}");
    read(&text, false).unwrap()
}

fn of(samples: &Samples, name: &str) -> f64 {
    let found = samples.get(name).copied();
    assert!(found.is_some(), "no {name} in {samples:#?}");
    found.unwrap_or_default()
}

/// Holds a sample against what it must be.
fn is(samples: &Samples, name: &str, value: f64) {
    let found = of(samples, name);
    assert!((found - value).abs() < f64::EPSILON, "{name} is {found} and not {value}");
}

/// Waits until a sample has this value.
fn becomes(run: &Run, name: &str, value: f64) {
    let deadline = std::time::Instant::now() + ANSWER_WITHIN;
    while (of(&counted(run), name) - value).abs() > 0.0 {
        assert!(std::time::Instant::now() < deadline, "{name} is {}", of(&counted(run), name));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn asked(port: u16, request: &str) -> http::Answer {
    http::raw(port, request.as_bytes(), ANSWER_WITHIN).unwrap()
}

/// Would miss: a text that no collector reads, counts that are wrong or fall with a deploy, series without a bound, and a port that
/// answers anything else, or is there unasked.
#[test]
fn what_is_counted_is_right_outlives_a_deploy_and_is_read_by_collectors_alone() {
    let folder = Folder::with(GRAPH).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let metrics = format!("127.0.0.1:{port}");
    let run = folder.run(&["--data", "data", "--workers", "1", "--metrics", &metrics]).unwrap().serving().unwrap();
    for _ in 0..5 {
        assert_eq!(run.get("/hello").unwrap().status, 200);
    }
    for _ in 0..2 {
        assert_eq!(run.get("/counter").unwrap().status, 200);
    }
    assert_eq!(run.get("/nowhere").unwrap().status, 404);
    assert_eq!(run.get("/faulty?how=trap").unwrap().status, 500);
    becomes(&run, "gaia_requests_inside", 0.0);
    let now = counted(&run);
    for (name, value) in [
        ("gaia_requests_total", 9.0),
        ("gaia_own_answers_total{status=\"404\"}", 1.0),
        ("gaia_own_answers_total{status=\"500\"}", 1.0),
        ("gaia_own_answers_total{status=\"503\"}", 0.0),
        ("gaia_requests_without_route_total", 1.0),
        ("gaia_requests_lost_total", 0.0),
        ("gaia_generation", 1.0),
        ("gaia_graph", 0.0),
        ("gaia_branes", 3.0),
        ("gaia_processes{role=\"worker\"}", 1.0),
        ("gaia_processes{role=\"keeper\"}", 1.0),
        ("gaia_processes{role=\"control\"}", 1.0),
        ("gaia_brane_replicas{brane=\"hello\"}", 3.0),
        ("gaia_brane_requests_total{brane=\"hello\"}", 5.0),
        ("gaia_brane_requests_total{brane=\"counter\"}", 2.0),
        ("gaia_brane_traps_total{brane=\"faulty\"}", 1.0),
        ("gaia_brane_traps_total{brane=\"hello\"}", 0.0),
        ("gaia_brane_busy{brane=\"hello\"}", 0.0),
        ("gaia_brane_late_total{brane=\"hello\"}", 0.0),
        ("gaia_brane_throttled_seconds_total{brane=\"hello\"}", 0.0),
    ] {
        is(&now, name, value);
    }
    assert!(of(&now, "gaia_uptime_seconds") > 0.0 && of(&now, "gaia_memory_total_bytes") > 1e8);
    for name in ["cold_seconds", "exec_seconds", "cpu_seconds", "memory_bytes"] {
        let series = |end: &str, le: &str| format!("gaia_brane_{name}_{end}{{brane=\"hello\"{le}}}");
        is(&now, &series("count", ""), 5.0);
        is(&now, &series("bucket", ",le=\"+Inf\""), 5.0);
        assert!(of(&now, &series("sum", "")) > 0.0, "{name}");
        is(&now, &format!("gaia_brane_{name}_count{{brane=\"faulty\"}}"), 1.0);
    }
    // It takes longer than a microsecond and less than ten seconds, and has more than a page of memory.
    is(&now, "gaia_brane_exec_seconds_bucket{brane=\"hello\",le=\"0.000001\"}", 0.0);
    is(&now, "gaia_brane_exec_seconds_bucket{brane=\"hello\",le=\"10.0\"}", 5.0);
    is(&now, "gaia_brane_memory_bytes_bucket{brane=\"hello\",le=\"65536.0\"}", 0.0);
    is(&now, "gaia_brane_memory_bytes_bucket{brane=\"hello\",le=\"16777216.0\"}", 5.0);
    let version = format!("gaia_build_info{{version=\"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(now.keys().any(|name| name.starts_with(&version)), "{now:#?}");

    // In both forms, and the same through each door.
    let (_, text, _) = run.gaia(&["metrics", "--open-metrics"]).unwrap();
    is(&read(&text, true).unwrap(), "gaia_requests_total", 9.0);
    let answer = asked(port, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(answer.status == 200 && answer.head.contains("text/plain; version=0.0.4"), "{}", answer.head);
    is(&read(&answer.text(), false).unwrap(), "gaia_requests_total", 9.0);
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    let answer =
        asked(port, &format!("GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"));
    assert!(answer.head.contains("application/openmetrics-text; version=1.0.0"), "{}", answer.head);
    is(&read(&answer.text(), true).unwrap(), "gaia_requests_total", 9.0);
    let mut stream = UnixStream::connect(run.socket()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut whole = String::new();
    stream.read_to_string(&mut whole).unwrap();
    assert!(whole.starts_with("HTTP/1.1 200") && whole.contains("\ngaia_requests_total 9\n"), "{whole}");

    // Nothing else is behind the port.
    for (line, status) in [
        ("GET /v1/status", 404),
        ("POST /v1/poweroff", 404),
        ("GET /", 404),
        ("POST /metrics", 405),
        ("DELETE /metrics", 405),
    ] {
        let answer = asked(port, &format!("{line} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"));
        assert_eq!(answer.status, status, "{line}");
    }
    let once_more = "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert!((0..400).any(|_| asked(port, once_more).status == 429), "it is answered as often as anybody likes");

    // Another generation: what its predecessor counted stays, and what is gone has no series.
    folder.write(&GRAPH.replace("replicas = 3", "replicas = 4").replace("[brane.faulty]", "[brane.flawed]")).unwrap();
    let (status, _, error) = run.gaia(&["deploy", "g.zgraph.toml"]).unwrap();
    assert!(status.success(), "{error}");
    assert_eq!(run.get("/hello").unwrap().status, 200);
    becomes(&run, "gaia_processes{role=\"worker\"}", 1.0);
    becomes(&run, "gaia_brane_requests_total{brane=\"hello\"}", 6.0);
    let then = counted(&run);
    is(&then, "gaia_requests_total", 10.0);
    is(&then, "gaia_graph", 1.0);
    is(&then, "gaia_own_answers_total{status=\"404\"}", 1.0);
    assert!(!then.keys().any(|name| name.contains("faulty")) && then.keys().any(|name| name.contains("flawed")));
    let of_branes = |samples: &Samples| samples.keys().filter(|name| name.contains("{brane=")).count();
    // As docs/metrics.md has it, of three branes.
    assert_eq!((of_branes(&then), of_branes(&now)), (3 * 99, 3 * 99));
    let grows = |name: &str| ["_total", "_bucket", "_sum", "_count"].iter().any(|end| name.contains(end));
    for (name, before) in now.iter().filter(|(name, _)| grows(name) && !name.contains("faulty")) {
        assert!(of(&then, name) >= *before, "{name} has fallen from {before} to {}", of(&then, name));
    }
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err(), "it is there unasked");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: an appliance whose settings open no port, or one that its boot report does not tell of.
#[test]
fn an_appliance_answers_on_the_port_that_its_settings_name() {
    // QEMU's user network is where this asks from.
    let settings = format!("{SETTINGS}\n[metrics]\nport = {SECURE_PORT}\nallow = [\"10.0.2.0/24\"]\n");
    let appliance = Appliance::boot(&Setup::default().settings(settings)).unwrap();
    appliance.serves_hello().unwrap();
    let port = appliance.secure_port().unwrap();
    let answer = asked(port, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let samples = read(&answer.text(), false).unwrap();
    is(&samples, "gaia_brane_requests_total{brane=\"hello\"}", 10.0);
    is(&samples, "gaia_processes{role=\"worker\"}", 2.0);
    let transcript = appliance.power_off().unwrap();
    let told = format!("on port {SECURE_PORT}, in the clear, for 10.0.2.0/24");
    assert!(transcript.contains(&told), "{transcript}");
}
