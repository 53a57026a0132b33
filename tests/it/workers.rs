//! Workers: where they run, and what is lost when one of them, or control, is killed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{ANSWER_WITHIN, Appliance, HELLO, Setup, http, soak};
use rustix::process::{Pid, Signal};

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

/// Would miss: a report that says what was asked for instead of what is; a deviation, when it boots or later, that nobody is told of.
#[test]
fn what_the_kernel_gave_the_cores_is_told_as_it_is_and_so_is_what_differs() {
    const GROUPS: &str = "/sys/fs/cgroup/workers";
    let appliance = Appliance::boot(&Setup::default().cpus(3)).unwrap();
    let line = appliance.line("gaia: cores: ", ANSWER_WITHIN).unwrap();
    assert!(
        line.contains("housekeeping on 0, workers on 1-2; isolated 1-2; ") && line.contains("nothing differs"),
        "{line}"
    );
    let given = |a: &Appliance| Ok(a.ask("GET /v1/status")?["cores"].clone());
    let read = |path: &str| appliance.read(path).unwrap().trim().to_owned();
    let ticks = || gaia_init::given::parse_interrupts(&read("/proc/interrupts"));
    let (before, told, after) = (ticks(), given(&appliance).unwrap(), ticks());
    println!("{told:#}");
    assert_eq!(told["deviations"], serde_json::json!([]));
    assert_eq!(told["isolated"], read("/sys/fs/cgroup/cpuset.cpus.isolated"));
    assert_eq!((&told["workqueues"], read("/sys/devices/virtual/workqueue/cpumask").as_str()), (&"0".into(), "1"));
    for (at, core) in [1, 2].into_iter().enumerate() {
        let told = &told["cores"][at];
        assert_eq!(told["core"], core);
        assert_eq!(told["partition"], read(&format!("{GROUPS}/core-{core}/cpuset.cpus.partition")));
        assert_eq!(told["effective"], read(&format!("{GROUPS}/core-{core}/cpuset.cpus.effective")));
        let count = |(_, rows): &(Vec<usize>, Vec<gaia_init::given::Counted>)| {
            rows.iter().find(|row| row.0 == "LOC").unwrap().1[core]
        };
        let counted = told["ticks"].as_u64().unwrap();
        assert!((count(&before)..=count(&after)).contains(&counted) && counted > 0, "{counted}");
        // All that fired there, and those that may, by what the kernel tells of each.
        let place = |number: &str, file: &str| read(&format!("/proc/irq/{number}/{file}_affinity_list"));
        let here = |list: &str| gaia_init::cores::parse_list(list).is_some_and(|all| all.contains(&core));
        let of_device = before.1.iter().filter(|row| row.0.parse::<u32>().is_ok());
        let there = of_device.filter(|row| row.1[core] > 0 || here(&place(&row.0, "effective")));
        let there: Vec<(u64, String, &str)> = there
            .map(|row| {
                let fires = match (here(&place(&row.0, "effective")), here(&place(&row.0, "smp"))) {
                    (true, true) => "here",
                    (true, false) => "once",
                    (false, _) => "elsewhere",
                };
                (row.0.parse().unwrap(), row.2.clone(), fires)
            })
            .collect();
        let all = told["interrupts"].as_array().unwrap().iter();
        let all = all.map(|i| {
            (i["number"].as_u64().unwrap(), i["name"].as_str().unwrap().to_owned(), i["fires"].as_str().unwrap())
        });
        assert_eq!(all.collect::<Vec<_>>(), there, "core {core}");
    }
    for thread in told["threads"].as_array().unwrap() {
        let (role, name) = (thread["role"].as_str().unwrap(), thread["name"].as_str().unwrap());
        let pid = appliance.pid(role).unwrap();
        let tasks = appliance.list(&format!("/proc/{pid}/task")).unwrap();
        let path = |task: &String| format!("/proc/{pid}/task/{task}/status");
        let of = tasks.iter().map(path).find(|path| read(path).starts_with(&format!("Name:\t{name}\n"))).unwrap();
        assert_eq!(thread["allowed"], allowed(&appliance, &of), "{role} {name}");
    }

    let differs = |words: &str| {
        let told = |told: &serde_json::Value| told["deviations"].to_string().contains(words);
        let told = appliance.until(ANSWER_WITHIN, given, told).unwrap();
        println!("{}", told["deviations"]);
    };
    let same =
        || drop(appliance.until(ANSWER_WITHIN, given, |told| told["deviations"] == serde_json::json!([])).unwrap());
    // The interrupt of the port that these questions come through: each of them has it fire.
    let ours = |(_, rows): &(Vec<usize>, Vec<gaia_init::given::Counted>)| {
        let busiest = rows.iter().filter(|row| row.2.contains("virtio")).max_by_key(|row| row.1[0]);
        busiest.map(|row| row.0.clone()).unwrap()
    };
    let number = ours(&after);
    // The first one is read-only.
    appliance.mount_proc("/run/proc").unwrap();
    let place = format!("/run/proc/irq/{number}/smp_affinity_list");
    appliance.write(&place, "1").unwrap();
    differs(&format!("interrupt {number} ("));
    appliance.write(&place, "0").unwrap();
    same();
    appliance.write(&format!("{GROUPS}/core-2/cpuset.cpus.partition"), "member").unwrap();
    differs("core 2 is not isolated: member");
    appliance.machine().console().send_line("status").unwrap();
    appliance.line("differs  core 2 is not isolated: member", ANSWER_WITHIN).unwrap();
    appliance.write(&format!("{GROUPS}/core-2/cpuset.cpus.partition"), "isolated").unwrap();
    same();
    // What it had to itself is taken away above it: the kernel says why its partition is none any more.
    appliance.write(&format!("{GROUPS}/cpuset.cpus.exclusive"), "1").unwrap();
    differs("core 2 is not isolated: isolated invalid (");
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
        // Or, on a machine that has too much to do, half as long as the slowest of the eight had to wait.
        let within = load.slowest.as_millis() / 2;
        assert!(u128::from(millis) < within.max(1000), "{back}");
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
    let transcript = appliance.machine().console().transcript();
    assert_eq!(waits(transcript.lines(), "worker@0"), [0, 100, 200, 400, 800, 1600]);
    appliance.power_off().unwrap();
}

/// A process of a workstation's role, and how many times it was started again.
fn role(run: &Run, name: &str) -> Option<(i64, u64)> {
    let status = run.ask("status").unwrap();
    let found = status["roles"].as_array().unwrap().iter().find(|r| r["name"] == name && r["pid"] != 0)?;
    Some((found["pid"].as_i64()?, found["restarts"].as_u64()?))
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + ANSWER_WITHIN;
    loop {
        if let Some(there) = ask() {
            return there;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal until the process has ended. A fault that is only sent and did not happen is taken for none by the
/// handlers of Wasmtime and Rust, once: they give the signal its usual effect, and nothing faults again.
fn crash(pid: i64, signal: Signal) {
    let process = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    until("it does not end", || {
        let _ = rustix::process::kill_process(process, signal);
        std::thread::sleep(Duration::from_millis(20));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        (!status.contains("State:") || status.contains("State:\tZ")).then_some(())
    });
}

/// Would miss: a crash that is not told by its name, that is not made good, or that the other worker or one of its requests
/// feels.
#[test]
fn however_a_worker_crashes_it_is_replaced_and_the_other_does_not_notice() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&["--workers", "2"]).unwrap().serving().unwrap();
    let signals = [
        ("SIGSEGV", Signal::SEGV),
        ("SIGABRT", Signal::ABORT),
        ("SIGBUS", Signal::BUS),
        ("SIGILL", Signal::ILL),
        ("SIGKILL", Signal::KILL),
    ];
    let (load, ()) = load(run.port, "/hello", || {
        for (round, (name, signal)) in signals.into_iter().enumerate() {
            let (seat, neighbour) = [("worker@0", "worker@1"), ("worker@1", "worker@0")][round % 2];
            let ((victim, restarts), other) = (role(&run, seat).unwrap(), role(&run, neighbour).unwrap());
            crash(victim, signal);
            run.error.line(&format!("{seat} (pid {victim}) was killed by {name} after")).unwrap();
            let new = until("it does not come back", || role(&run, seat).filter(|(pid, _)| *pid != victim));
            assert_eq!(new.1, restarts + 1, "{seat} after {name}");
            run.error.line(&format!("{seat} (pid {}) is back after", new.0)).unwrap();
            assert_eq!(role(&run, neighbour).unwrap(), other, "{neighbour} while {seat} had {name}");
        }
    });
    let lost = run.ask("status").unwrap()["lost"].as_u64().unwrap();
    println!("{} answered, {} failed, {lost} were inside; slowest {:?}", load.answered, load.failed, load.slowest);
    // A crash may come between what a worker did for a request and its counting it; and the first of the signals that stand for a
    // fault may end a guest, as a fault of its own would.
    let most = lost + signals.len() as u64;
    assert!(load.answered > 100 && load.failed as u64 <= most, "{} failed, {lost} were inside", load.failed);
    assert!(load.slowest < Duration::from_secs(2), "a request waited for {:?}", load.slowest);
    assert!(run.interrupt().unwrap().success());
}

/// Milliseconds that a role had to wait before each of its starts.
fn waits<'a>(lines: impl Iterator<Item = &'a str>, role: &str) -> Vec<u64> {
    let wait = |line: &str| {
        let (_, wait) = line.split_once(role)?.1.split_once("starting it again in ")?;
        wait.split(' ').next()?.parse().ok()
    };
    lines.filter_map(wait).collect()
}

/// Would miss: a worker that is started again and again without a pause, or silently; requests on its socket that nobody
/// answers meanwhile, although a neighbour is well.
#[test]
fn a_crash_loop_backs_off_is_told_and_its_requests_are_answered_meanwhile() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&["--workers", "2"]).unwrap().serving().unwrap();
    let neighbour = role(&run, "worker@1").unwrap();
    let (load, ()) = load(run.port, "/hello", || {
        let mut killed = 0;
        for _ in 0..7 {
            let (pid, _) = until("it does not come back", || role(&run, "worker@0").filter(|(pid, _)| *pid != killed));
            crash(pid, Signal::KILL);
            killed = pid;
        }
        run.error.line("worker@1 accepts on the sockets of worker@0").unwrap();
        // Away for more than three seconds: so many connections that half of them are on its socket.
        for _ in 0..40 {
            assert_eq!(run.get("/hello").unwrap().status, 200);
        }
        let status = run.ask("status").unwrap();
        let roles = status["roles"].as_array().unwrap().clone();
        let state = |name: &str| roles.iter().find(|r| r["name"] == name).unwrap()["state"].clone();
        assert_eq!((state("worker@0"), state("worker@1")), ("waiting".into(), "standing-in".into()), "{status}");
        run.error.line("worker@1 leaves the sockets of worker@0").unwrap();
    });
    let lines = run.error.all();
    assert_eq!(waits(lines.iter().map(String::as_str), "worker@0"), [0, 100, 200, 400, 800, 1600, 3200]);
    assert_eq!(role(&run, "worker@1").unwrap(), neighbour, "the neighbour is the same");
    let lost = run.ask("status").unwrap()["lost"].as_u64().unwrap();
    println!("{} answered, {} failed, {lost} were inside; slowest {:?}", load.answered, load.failed, load.slowest);
    // As above: a kill may come just after a connection was accepted, and before that is counted.
    assert!(load.answered > 1000 && load.failed as u64 <= lost + 7, "{} failed, {lost} were inside", load.failed);
    assert!(load.slowest < Duration::from_secs(3), "a request waited for {:?}", load.slowest);
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: an end by the kernel, for memory, that is not told or not made good.
#[test]
fn a_worker_that_the_kernel_ends_for_its_memory_is_replaced() {
    const MAX: &str = "/sys/fs/cgroup/workers/memory.max";
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let pids = || ["worker@0", "worker@1"].map(|name| appliance.pid(name).unwrap());
    let before = pids();
    let max = appliance.read(MAX).unwrap();
    let kills = || {
        let events = appliance.read("/sys/fs/cgroup/workers/memory.events").unwrap();
        events.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap().trim() != "0"
    };
    // No guest gets there, so the limit comes to the workers, a step at a time: what one gives back must be enough. It is
    // as it was before a new worker needs its share.
    let used: u64 = appliance.read("/sys/fs/cgroup/workers/memory.current").unwrap().trim().parse().unwrap();
    let mut limit = used;
    while !kills() {
        limit -= 64 << 10;
        appliance.write(MAX, &limit.to_string()).unwrap();
    }
    appliance.write(MAX, max.trim()).unwrap();
    let told = appliance.line("was killed by SIGKILL", ANSWER_WITHIN).unwrap();
    println!("{used} bytes were used, {limit} too little; {told}");
    appliance.line("is back after", ANSWER_WITHIN).unwrap();
    let up = |a: &Appliance| Ok(["worker@0", "worker@1"].iter().all(|name| a.pid(name).is_ok()));
    appliance.until(ANSWER_WITHIN, up, |up| *up).unwrap();
    let after = pids();
    // The limit is of all workers together, and until what the first had is given back, the kernel may choose a second.
    assert_ne!(before, after);
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
}
