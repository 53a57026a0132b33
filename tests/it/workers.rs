//! Workers: where they run, and what is lost when one of them, or control, is killed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gaia_tests::{ANSWER_WITHIN, Appliance, Setup, http, soak};

const SIGKILL: i32 = 9;
const SIGSTOP: i32 = 19;

const BUSY: &str = r#"
[brane.burn]
image = "file:./burn.wasm"
replicas = 16
limits = { deadline = "30s" }
"#;

fn allowed(appliance: &Appliance, path: &str) -> String {
    let status = appliance.read(path).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim().to_owned()
}

/// Would miss: a worker that wanders between cores, or housekeeping that sits on a worker's core.
#[test]
fn each_worker_is_pinned_to_its_core_and_keeps_it_to_itself() {
    let appliance = Appliance::boot(&Setup::default().cpus(3)).unwrap();
    for (role, core) in [("control", "0"), ("console", "0"), ("worker@1", "1"), ("worker@2", "2")] {
        let pid = appliance.pid(role).unwrap();
        assert_eq!(allowed(&appliance, &format!("/proc/{pid}/status")), core, "{role}");
    }
    let pid = appliance.pid("worker@2").unwrap();
    let threads = appliance.list(&format!("/proc/{pid}/task")).unwrap();
    let cores = threads.iter().map(|t| {
        let name = appliance.read(&format!("/proc/{pid}/task/{t}/comm")).unwrap();
        (name.trim().to_owned(), allowed(&appliance, &format!("/proc/{pid}/task/{t}/status")))
    });
    let mut cores: Vec<_> = cores.collect();
    cores.sort();
    assert_eq!(
        cores,
        [("gaia".into(), "2".into()), ("tick".into(), "0".into())],
        "the epochs tick from the housekeeping core"
    );
    for core in [1, 2] {
        let partition = appliance.read(&format!("/sys/fs/cgroup/workers/core-{core}/cpuset.cpus.partition")).unwrap();
        assert_eq!(partition.trim(), "isolated", "core {core}");
    }
    appliance.power_off().unwrap();
}

/// Would miss: a role that kept root, a capability or a way back to either.
#[test]
fn every_role_has_its_own_user_and_no_privilege() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    for (role, user) in [("control", "100"), ("worker@0", "1000"), ("worker@1", "1001"), ("console", "103")] {
        let pid = appliance.pid(role).unwrap();
        let status = appliance.read(&format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).unwrap().trim().to_owned()
        };
        assert_eq!(field("Uid"), [user; 4].join("\t"), "{role}");
        assert_eq!(field("Gid"), [user; 4].join("\t"), "{role}");
        assert_eq!(field("Groups"), "", "{role}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{role} {set}");
        }
        assert_eq!(field("NoNewPrivs"), "1", "{role}");
    }
    appliance.power_off().unwrap();
}

/// What became of a load of requests, each on a connection of its own.
struct Load {
    answered: usize,
    failed: usize,
    slowest: Duration,
}

/// Sends requests from eight threads until told to stop.
fn load<T>(port: u16, path: &str, meanwhile: impl FnOnce() -> T) -> (Load, T) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = || {
            let mut load = Load { answered: 0, failed: 0, slowest: Duration::ZERO };
            // Bounded, should `meanwhile` never come back.
            while !stop.load(Ordering::Relaxed) && load.answered + load.failed < 100_000 {
                let began = Instant::now();
                match http::get(port, path, ANSWER_WITHIN) {
                    Ok(answer) if answer.status == 200 => load.answered += 1,
                    _ => load.failed += 1,
                }
                load.slowest = load.slowest.max(began.elapsed());
            }
            load
        };
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(client)).collect();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
        stop.store(true, Ordering::Relaxed);
        let mut sum = Load { answered: 0, failed: 0, slowest: Duration::ZERO };
        for client in clients {
            let one = client.join().unwrap();
            sum.answered += one.answered;
            sum.failed += one.failed;
            sum.slowest = sum.slowest.max(one.slowest);
        }
        match outcome {
            Ok(value) => (sum, value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Waits until the appliance has served so many more requests: the load is really on.
fn served(appliance: &Appliance, more: u64) {
    let requests = |a: &Appliance| Ok(a.ask("GET /v1/status")?["requests"].as_u64().unwrap_or(0));
    let before = requests(appliance).unwrap();
    appliance.until(ANSWER_WITHIN, requests, |now| *now >= before + more).unwrap();
}

/// Would miss: a kill that costs the requests which wait on the worker's socket, or that of another worker; a worker that
/// stays away.
#[test]
fn a_killed_worker_loses_only_the_requests_inside_it() {
    let appliance = Appliance::boot(&Setup::default().graph(BUSY)).unwrap();
    let rounds = if soak() { 20 } else { 2 };
    for round in 0..rounds {
        let worker = ["worker@0", "worker@1"][round % 2];
        // One that ended a moment ago is made to wait before it starts again, which is another test's business.
        let settled = |a: &Appliance| a.role(worker, "millis");
        if round >= 2 {
            appliance.until(2 * ANSWER_WITHIN, settled, |millis| *millis > 31_000).unwrap();
        }
        let lost = || appliance.ask("GET /v1/status").unwrap()["lost"].as_u64().unwrap();
        let before = lost();
        let (load, back) = load(appliance.port().unwrap(), "/burn?n=40000000", || {
            served(&appliance, 20);
            let pid = appliance.pid(worker).unwrap();
            // Which worker has how many of the eight is chance, and none is as likely as all.
            let inside = |a: &Appliance| {
                let status = a.ask("GET /v1/status")?;
                let workers = status["workers"].as_array().cloned().unwrap_or_default();
                Ok(workers.iter().find(|w| w["pid"] == pid).and_then(|w| w["inside"].as_u64()).unwrap_or(0))
            };
            appliance.until(ANSWER_WITHIN, inside, |requests| *requests >= 2).unwrap();
            appliance.kill(pid, SIGKILL).unwrap();
            let back = appliance.line("is back after", ANSWER_WITHIN).unwrap();
            served(&appliance, 20);
            back
        });
        let lost = usize::try_from(lost() - before).unwrap();
        println!(
            "{} answered, {} failed, {lost} were inside; slowest {:?}; {back}",
            load.answered, load.failed, load.slowest
        );
        assert!(lost >= 1, "nothing was inside the worker: this run shows nothing");
        assert!(load.failed >= 1, "the client felt nothing of a kill: did the worker die?");
        assert!(load.failed <= lost, "{} requests failed, {lost} were inside the killed worker", load.failed);
        // `served` counts each request as it begins, so those that are lost are among the forty.
        assert!(load.answered + load.failed >= 40);
        let millis: u64 = back.split("is back after ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(millis < 1000, "{back}");
    }
    appliance.power_off().unwrap();
}

/// Would miss: a worker that hangs for ever, because only its end is noticed and not its silence.
#[test]
fn a_worker_that_is_silent_is_replaced() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let hung = appliance.pid("worker@0").unwrap();
    appliance.kill(hung, SIGSTOP).unwrap();
    let within = Duration::from_mins(1);
    appliance.line("worker@0 (pid", within).unwrap();
    let transcript = appliance.machine().console().transcript();
    assert!(transcript.contains("is killed: silent for too long"), "{transcript}");
    appliance.line("is back after", within).unwrap();
    assert_ne!(appliance.pid("worker@0").unwrap(), hung);
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: a control that is needed for serving, or a new one that does not find what runs.
#[test]
fn a_killed_control_loses_nothing_and_the_new_one_finds_the_workers() {
    let appliance = Appliance::boot(&Setup::default().graph(BUSY)).unwrap();
    let workers = ["worker@0", "worker@1"].map(|w| appliance.pid(w).unwrap());
    let old = appliance.pid("control").unwrap();
    let (load, ()) = load(appliance.port().unwrap(), "/burn?n=1000000", || {
        served(&appliance, 20);
        appliance.kill(old, SIGKILL).unwrap();
        appliance.line("took over generation 1: 1 branes, 2 workers, 1 artefacts", ANSWER_WITHIN).unwrap();
        served(&appliance, 20);
    });
    println!("{} answered, {} failed; slowest {:?}", load.answered, load.failed, load.slowest);
    assert_eq!(load.failed, 0);
    assert!(load.answered >= 40);
    assert_ne!(appliance.pid("control").unwrap(), old);
    assert_eq!(["worker@0", "worker@1"].map(|w| appliance.pid(w).unwrap()), workers, "the same workers");
    assert_eq!(appliance.ask("GET /v1/ps").unwrap()["branes"][0]["name"], "burn");
    appliance.power_off().unwrap();
}

/// Would miss: a crash loop that takes a core's share of all connections with it, or that never ends.
#[test]
fn a_neighbour_accepts_while_a_worker_stays_away() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let (load, ()) = load(appliance.port().unwrap(), "/hello", || {
        // Each end in a row doubles the wait; after some, it is longer than a neighbour waits to stand in.
        for _ in 0..6 {
            let worker = |a: &Appliance| a.pid("worker@0");
            let pid = appliance.until(ANSWER_WITHIN, worker, |_| true).unwrap();
            appliance.kill(pid, SIGKILL).unwrap();
            appliance.until(ANSWER_WITHIN, |a| Ok(a.pid("worker@0").ok()), |now| *now != Some(pid)).unwrap();
        }
        appliance.line("worker@1 accepts on the sockets of worker@0", ANSWER_WITHIN).unwrap();
        served(&appliance, 30);
        appliance.line("worker@1 leaves the sockets of worker@0", ANSWER_WITHIN).unwrap();
        served(&appliance, 30);
    });
    println!("{} answered, {} failed; slowest {:?}", load.answered, load.failed, load.slowest);
    assert!(load.slowest < Duration::from_secs(5), "a request waited for {:?}", load.slowest);
    let lost = appliance.ask("GET /v1/status").unwrap()["lost"].as_u64().unwrap();
    assert!(load.failed as u64 <= lost, "{} failed, {lost} were inside", load.failed);
    appliance.power_off().unwrap();
}
