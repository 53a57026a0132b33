//! Whoever ends, and however, is started again, and nothing that was half done is left behind.

use gaia_tests::{ANSWER_WITHIN, Appliance, BOOT_WITHIN, Setup};

const SIGKILL: i32 = 9;
/// A real-time signal: it has no name.
const SIGNAL_40: i32 = 40;

/// Every guest that needs no network: so many components that the compilers are asked for more often than there are any.
const ALL: &str = include_str!("../../examples/all.zgraph.toml");

/// Would miss: a console that is dead for ever once its process has ended, or whose terminal is not as it was.
#[test]
fn the_console_comes_back_when_it_is_killed() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let console = appliance.machine().console();
    for round in 0..3 {
        appliance.kill(appliance.pid("console").unwrap(), SIGKILL).unwrap();
        let line = appliance.line("console (pid ", ANSWER_WITHIN).unwrap();
        assert!(line.contains("was killed by SIGKILL"), "round {round}: {line}");
        console.wait_for("ω ", ANSWER_WITHIN).unwrap();
        console.send_bytes(b"statusx\x7f\r").unwrap();
        appliance.line("serves   generation 1, 1 branes", ANSWER_WITHIN).unwrap();
    }
    appliance.power_off().unwrap();
}

/// Would miss: a half-started generation that the next control cannot get rid of, or takes for its own; an attempt that
/// fails because a compiler of the last control still runs.
#[test]
fn a_control_that_is_killed_while_it_deploys_leaves_nothing_in_the_way_of_the_next() {
    let appliance = Appliance::start(&Setup::default().graph(ALL)).unwrap();
    let mut killed = 0;
    for _ in 0..3 {
        let control = |a: &Appliance| a.pid("control");
        let pid = appliance.until(BOOT_WITHIN, control, |pid| *pid != killed).unwrap();
        appliance.kill(pid, SIGKILL).unwrap();
        killed = pid;
    }
    let transcript = appliance.machine().console().transcript();
    println!("{}", transcript.lines().filter(|l| l.starts_with("gaia")).collect::<Vec<_>>().join("\n"));
    assert!(!transcript.contains("gaia: serving"), "it served already: this run shows nothing");

    appliance.line("gaia: serving generation", BOOT_WITHIN).unwrap();
    assert_ne!(appliance.pid("control").unwrap(), killed);
    let ps = appliance.ask("GET /v1/ps").unwrap();
    let branes: Vec<_> = ps["branes"].as_array().unwrap().iter().filter_map(|b| b["name"].as_str()).collect();
    let wanted = ALL.lines().filter(|l| l.starts_with("[brane.") && l.matches('.').count() == 1);
    let wanted: Vec<_> = wanted.map(|l| &l["[brane.".len()..l.len() - 1]).collect();
    assert!(wanted.len() > 3 && wanted.iter().all(|name| branes.contains(name)), "{wanted:?}, but {branes:?}");
    assert_eq!(appliance.get("/hello").unwrap().status, 200);

    let status = appliance.ask("GET /v1/status").unwrap();
    let roles: Vec<_> = status["roles"].as_array().unwrap().iter().filter_map(|r| r["name"].as_str()).collect();
    let workers = roles.iter().filter(|name| name.starts_with("worker@")).count();
    assert_eq!(workers, 2, "of one generation only: {roles:?}");
    assert!(!roles.iter().any(|name| name.starts_with("compile")), "{roles:?}");
    appliance.power_off().unwrap();
}

/// Would miss: workers of a generation that nobody waits for any more, which go on and take part in the next one.
#[test]
fn a_control_that_is_killed_while_workers_start_takes_their_generation_with_it() {
    let appliance = Appliance::start(&Setup::default()).unwrap();
    let starting = |a: &Appliance| {
        let status = a.ask("GET /v1/status")?;
        let roles = status["roles"].as_array().cloned().unwrap_or_default();
        let pid = |name: &str| roles.iter().find(|r| r["name"] == name).and_then(|r| r["pid"].as_i64());
        Ok(pid("worker@0").and(pid("control")))
    };
    let control = appliance.until(BOOT_WITHIN, starting, Option::is_some).unwrap().unwrap();
    appliance.kill(control, SIGKILL).unwrap();
    // Either it served already, and stays; or it was still starting, and the next has another number.
    let console = appliance.machine().console();
    let (_, line) =
        console.wait_for_any(&["serving generation", "did not come up: control ended"], BOOT_WITHIN).unwrap();
    println!("{line}");
    appliance.until(ANSWER_WITHIN, |a| a.pid("control"), |pid| *pid != control).unwrap();
    appliance.until(BOOT_WITHIN, |a| a.get("/hello"), |answer| answer.status == 200).unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: a child whose end is not understood, by a signal without a name or by a fault, and that is never replaced; one
/// that takes the other worker with it.
#[test]
fn whatever_signal_ends_a_worker_it_is_told_and_the_worker_is_replaced() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let other = appliance.pid("worker@0").unwrap();
    for (number, name) in [(SIGNAL_40, "signal 40"), (11, "SIGSEGV"), (6, "SIGABRT"), (7, "SIGBUS")] {
        let worker = |a: &Appliance| a.pid("worker@1");
        let victim = appliance.until(ANSWER_WITHIN, worker, |_| true).unwrap();
        // The handlers of Wasmtime and Rust take the first fault that is sent and did not happen for none.
        let send = |a: &Appliance| a.kill(victim, number).and_then(|()| a.read(&format!("/proc/{victim}/status")));
        let gone = |a: &Appliance| Ok(send(a).map_or(true, |status| status.contains("State:\tZ")));
        appliance.until(ANSWER_WITHIN, gone, |gone| *gone).unwrap();
        appliance.line(&format!("worker@1 (pid {victim}) was killed by {name} after"), ANSWER_WITHIN).unwrap();
        appliance.line("worker@1 (pid ", ANSWER_WITHIN).unwrap();
        appliance.until(ANSWER_WITHIN, worker, |pid| *pid != victim).unwrap();
        assert_eq!(appliance.pid("worker@0").unwrap(), other, "the other one at {name}");
    }
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: a setting that is written where the kernel does not look for it; a part of the appliance that may take all
/// memory or all processes from the others.
#[test]
fn the_interface_believes_no_stranger_and_each_part_has_its_bounds() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let read = |path: &str| appliance.read(path).unwrap().trim().to_owned();
    for interface in ["eth0", "lo", "default"] {
        for (family, names) in
            [("ipv4", &["accept_redirects"][..]), ("ipv6", &["accept_redirects", "accept_ra", "autoconf"])]
        {
            for name in names {
                assert_eq!(read(&format!("/proc/sys/net/{family}/conf/{interface}/{name}")), "0", "{interface} {name}");
            }
        }
    }
    assert_eq!(read("/proc/sys/kernel/printk_devkmsg"), "on", "no role's words make those of another be dropped");
    for (part, pids) in [("system", "256"), ("workers", "320")] {
        assert_eq!(read(&format!("/sys/fs/cgroup/{part}/pids.max")), pids, "{part}");
        let memory: u64 = read(&format!("/sys/fs/cgroup/{part}/memory.max")).parse().unwrap();
        assert!((128 << 20..448 << 20).contains(&memory), "{part}: {memory} of 512 MiB");
        assert!(read(&format!("/sys/fs/cgroup/{part}/cgroup.procs")).lines().count() >= 2, "{part}: who is in it?");
    }
    appliance.power_off().unwrap();
}
