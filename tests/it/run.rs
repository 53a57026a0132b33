//! `gaia run`: a graph on a workstation, and its log. These need no virtual machine.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use gaia_tests::http;
use gaia_tests::workstation::{Folder, Run, kib};
use rustix::process::{Pid, Signal};

const HELLO: &str = "[brane.hello]\nimage = \"file:./hello.wasm\"\n";

/// Would miss: a launcher that serves but whose log, API or end do not work.
#[test]
fn it_serves_shows_its_log_and_ends_when_interrupted() {
    let graph = format!("{HELLO}[brane.chatty]\nimage = \"file:./chatty.wasm\"\n");
    let folder = Folder::with(&graph).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    assert_eq!(run.get("/hello").unwrap().text(), "hello\n");
    assert_eq!(run.get("/chatty?lines=2&errors=1").unwrap().text(), "stdout 2 stderr 1\n");
    assert_eq!(run.get("/nowhere").unwrap().status, 404);
    for words in [
        " hello.001 RES 200 cpu=",
        " hello.001 END cold=",
        " chatty.001 LOG out stdout line 1 of 2",
        " chatty.001 LOG out stdout line 2 of 2",
        " chatty.001 LOG err stderr line 1 of 1",
        " chatty.001 RES 200 cpu=",
        " gaia RES 404 cpu=0µs no brane is served at appliance/nowhere",
    ] {
        // Which worker accepts decides about the serial number, and it is not always the first.
        let words = words.replace(".001", ".");
        let (before, after) = words.split_once(". ").unwrap_or((&words, ""));
        let there = |line: &String| line.starts_with('Ω') && line.contains(before) && line.contains(after);
        run.output.until(Duration::from_secs(30), |lines| lines.iter().any(there)).unwrap();
    }
    assert_eq!(run.ask("ps").unwrap()["branes"][0]["name"], "hello");
    let error = run.error.clone();
    assert!(run.interrupt().unwrap().success());
    let left = std::fs::read_dir(folder.path()).unwrap().filter_map(|e| e.unwrap().file_name().into_string().ok());
    assert!(left.into_iter().all(|name| !name.starts_with("gaia-run")), "its socket is gone");
    assert!(error.all().iter().all(|line| line.starts_with('Ω')), "{:#?}", error.all());
}

/// Would miss: a log that is printed although nobody wants it, or that is not kept then.
#[test]
fn a_quiet_one_keeps_its_log_and_prints_none() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&["--quiet"]).unwrap().serving().unwrap();
    assert_eq!(run.get("/hello").unwrap().text(), "hello\n");
    let until = Instant::now() + Duration::from_secs(30);
    while !run.gaia(&["logs"]).unwrap().1.contains(" END cold=") {
        assert!(Instant::now() < until, "{:?}", run.gaia(&["logs"]));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(run.ask("status").unwrap()["roles"].as_array().unwrap().iter().all(|role| role["name"] != "log"));
    let output = run.output.clone();
    assert!(run.interrupt().unwrap().success());
    assert_eq!(output.all(), Vec::<String>::new());
}

/// Would miss: an error that `gaia check` finds and a deploy does not, or in other words.
#[test]
fn a_missing_grant_is_refused_alike_by_check_and_run() {
    let folder = Folder::with("[brane.fetch]\nimage = \"file:./cloud-fetch.wasm\"\n").unwrap();
    let (status, _, check) = folder.check(&[]).unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(check.contains("fetch imports wasi:http/outgoing-handler@"), "{check}");
    assert!(check.contains("needs \"net.http\"") && check.contains("g.zgraph.toml:1:8"), "{check}");
    let mut run = folder.run(&[]).unwrap();
    let status = run.end().unwrap();
    assert_eq!(status.code(), Some(1), "it never served");
    let said = run.error.all();
    for line in check.lines().filter(|line| !line.is_empty()) {
        assert!(said.iter().any(|said| said == line), "{line:?} is not among {said:#?}");
    }
}

/// Would miss: a change that is not seen, a wrong manifest that takes down what serves, a deploy of nothing new, a deploy of what is not
/// written yet.
#[test]
fn watching_it_deploys_what_changes_and_keeps_what_serves_when_that_is_wrong() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&["--watch"]).unwrap().serving().unwrap();
    folder.write("[brane.hello]\nimage = \"file:./hello.wasm\"\nreplica = 3\n").unwrap();
    run.error.line("did you mean `replicas`?").unwrap();
    assert_eq!(run.get("/hello").unwrap().status, 200, "what served still serves");
    folder.write(&HELLO.replace("brane.hello", "brane.hallo")).unwrap();
    run.error.line("serving generation 2").unwrap();
    assert_eq!((run.get("/hallo").unwrap().status, run.get("/hello").unwrap().status), (200, 404));
    // A component, put in place as a build does it.
    let counter = gaia_tests::out("branes/counter.wasm");
    std::fs::copy(counter, folder.path().join("new.wasm")).unwrap();
    std::fs::rename(folder.path().join("new.wasm"), folder.path().join("hello.wasm")).unwrap();
    run.error.line("serving generation 3").unwrap();
    assert_eq!(run.get("/hallo").unwrap().text(), "count 1\n");
    folder.write(&format!("# a comment\n{}", HELLO.replace("brane.hello", "brane.hallo"))).unwrap();
    run.error.line("nothing has changed").unwrap();
    // As an editor writes that has much to do between two of its calls.
    folder.write("").unwrap();
    std::thread::sleep(Duration::from_millis(600));
    folder.write(&HELLO.replace("brane.hello", "brane.hullo")).unwrap();
    run.error.line("serving generation 4").unwrap();
    assert_eq!(run.get("/hullo").unwrap().status, 200);
    // Who means it gets it.
    folder.write("").unwrap();
    run.error.line("serving generation 5").unwrap();
    assert_eq!(run.get("/hullo").unwrap().status, 404);
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a line that says what control does not know yet, however late control comes to it.
#[test]
fn whoever_reads_that_a_generation_serves_finds_its_branes() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&["--watch"]).unwrap().serving().unwrap();
    let roles = run.ask("status").unwrap()["roles"].as_array().unwrap().clone();
    let control = roles.iter().find(|role| role["name"] == "control").unwrap()["pid"].as_i64().unwrap();
    let control = Pid::from_raw(i32::try_from(control).unwrap()).unwrap();
    // A conversation that has begun: control need not accept it first, and has it in hand as soon as it wakes.
    let mut api = UnixStream::connect(run.socket()).unwrap();
    let mut names = |before_reading: &dyn Fn()| {
        api.write_all(b"GET /v1/ps HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        before_reading();
        let mut answer = Vec::new();
        let body = loop {
            let mut piece = [0; 4096];
            let read = api.read(&mut piece).unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&piece[..read]);
            let text = String::from_utf8_lossy(&answer);
            let body = text.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str(body).ok());
            if let Some(body) = body {
                break body;
            }
        };
        let ps: serde_json::Value = body;
        let branes = ps["branes"].as_array().unwrap().iter().map(|brane| brane["name"].as_str().unwrap().to_owned());
        branes.collect::<Vec<_>>()
    };
    assert_eq!(names(&|| {}), ["hello"], "at the first moment");
    for generation in 2..12 {
        let name = format!("hello{generation}");
        folder.write(&HELLO.replace("hello]", &format!("{name}]"))).unwrap();
        // Held from before its workers are ready, where they are seen to start, until it has been asked: then it wakes to both.
        let starts = || {
            let status = run.ask("status").unwrap();
            let roles = status["roles"].as_array().unwrap();
            roles.iter().any(|role| role["name"] == "worker@0" && role["state"] == "starting")
                || status["generation"] == generation
        };
        while !starts() {}
        rustix::process::kill_process(control, Signal::STOP).unwrap();
        run.error.line(&format!("serving generation {generation}:")).unwrap();
        let names = names(&|| rustix::process::kill_process(control, Signal::CONT).unwrap());
        assert_eq!(names, [name], "{:#?}", run.error.all());
    }
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: roles that outlive a launcher that was killed.
#[test]
fn nothing_is_left_of_it_when_it_is_killed() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    let roles = run.ask("status").unwrap()["roles"].as_array().unwrap().clone();
    let pids: Vec<i64> = roles.iter().map(|role| role["pid"].as_i64().unwrap()).collect();
    assert!(pids.len() >= 4, "launcher, control, log, workers: {roles:?}");
    drop(run);
    let deadline = Instant::now() + Duration::from_secs(10);
    let alive = |pid: &i64| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("gaia") && !status.contains("State:\tZ")
    };
    while pids.iter().any(alive) {
        assert!(Instant::now() < deadline, "{pids:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

const FLOOD: &str = r#"
[brane.flood]
image = "file:./chatty.wasm"
replicas = 8
limits = { deadline = "5m" }

[brane.quiet]
image = "file:./chatty.wasm"
replicas = 8

[brane.burn]
image = "file:./burn.wasm"
replicas = 8
limits = { deadline = "8s" }
"#;

/// Lines that each request of the flood writes.
const LINES: usize = 10_000_000;

/// How long `quiet` takes to answer, so many times while `meanwhile` goes on; sorted.
fn latencies(run: &Run, times: usize, meanwhile: &str, beside: usize) -> Vec<Duration> {
    std::thread::scope(|scope| {
        for _ in 0..beside {
            scope.spawn(|| http::get(run.port, meanwhile, Duration::from_mins(5)).unwrap());
        }
        let busy = |run: &Run| {
            let branes = run.ask("ps").unwrap()["branes"].as_array().unwrap().clone();
            let name = meanwhile.trim_start_matches('/').split('?').next().unwrap().to_owned();
            branes.iter().find(|b| b["name"] == name.as_str()).unwrap()["busy"].as_u64().unwrap()
        };
        let deadline = Instant::now() + Duration::from_mins(1);
        while busy(run) < beside as u64 {
            assert!(Instant::now() < deadline, "{meanwhile} is not at work");
        }
        let one = |_| {
            let began = Instant::now();
            assert_eq!(run.get("/quiet?lines=1&errors=0").unwrap().text(), "stdout 1 stderr 0\n");
            began.elapsed()
        };
        let mut all: Vec<Duration> = (0..times).map(one).collect();
        assert_eq!(busy(run), beside as u64, "{meanwhile} ended too early to measure beside it");
        all.sort();
        all
    })
}

/// Would miss: a flood that costs another brane a line or its latency, that fills memory, or whose own losses are not told.
#[test]
fn ten_million_lines_cost_nobody_else_anything() {
    let folder = Folder::with(FLOOD).unwrap();
    // One worker, so that all of them are on one core whatever connection went where.
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let (times, beside) = (100, 2);
    // Beside as many who spin as long as they are let: what a neighbour that is only busy costs.
    let busy = latencies(&run, times, "/burn?n=1000000000000", beside);
    let flooded = latencies(&run, times, &format!("/flood?lines={LINES}&errors=0"), beside);
    let at = |all: &[Duration], percent: usize| all[times * percent / 100];
    println!(
        "quiet beside {beside} who spin: p50 {:?}, p90 {:?}; beside {beside} who write {LINES} lines each: p50 {:?}, p90 {:?}",
        at(&busy, 50),
        at(&busy, 90),
        at(&flooded, 50),
        at(&flooded, 90)
    );
    for percent in [50, 90] {
        let (busy, flooded) = (at(&busy, percent), at(&flooded, percent));
        assert!(flooded < busy * 3 / 2 + Duration::from_millis(5), "p{percent}: {busy:?}, with a flood {flooded:?}");
    }

    let ended = |lines: &[String]| lines.iter().filter(|l| l.contains(" flood.") && l.contains(" END ")).count();
    run.output.until(Duration::from_mins(2), |lines| ended(lines) == beside).unwrap();
    let log = run.output.all();
    let of = |brane: &str, words: &str| {
        log.iter().filter(|l| l.contains(brane) && l.contains(words)).cloned().collect::<Vec<_>>()
    };
    assert_eq!(of(" quiet.", " LOG out stdout line 1 of 1").len(), 2 * times, "every line of the other is there");
    assert!(of(" quiet", " LOST ").is_empty() && of(" gaia ", " LOST ").is_empty());
    let number = |line: &String| {
        let digits = line.split(" LOST ").nth(1).unwrap().split(' ').next().unwrap().replace(',', "");
        digits.parse::<usize>().unwrap()
    };
    let (shown, lost) = (of(" flood.", " LOG out ").len(), of(" flood", " LOST "));
    println!("{shown} lines of the flood were shown, {} losses told", lost.len());
    assert_eq!(
        shown + lost.iter().map(number).sum::<usize>(),
        beside * LINES,
        "each line was shown, or counted as lost"
    );
    assert!(lost.len() < shown / 10, "the losses are told in few lines: {}", lost.len());

    let status = run.ask("status").unwrap();
    for role in status["roles"].as_array().unwrap() {
        let kib = kib(role["pid"].as_i64().unwrap(), "VmRSS").unwrap();
        assert!(kib < 48 * 1024, "{} has {kib} KiB", role["name"]);
    }
    assert!(run.interrupt().unwrap().success());
}
