//! A brane that floods the log, and what that costs its neighbour.

use std::time::{Duration, Instant};

use gaia_tests::http;
use gaia_tests::workstation::{Folder, Run, kib};

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
