//! The pages under the guests: huge ones where they pay and nowhere else, and what is given back. All but
//! one need no virtual machine.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{Appliance, Setup};

/// Of a process, in KiB: what is in huge pages, and what is resident at all.
fn resident(pid: i64) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let sum = |name: &str| {
        let all = smaps.lines().filter_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        all.map(|kib| kib.parse::<u64>().unwrap()).sum()
    };
    (sum("AnonHugePages:"), sum("Rss:"))
}

/// The most that a worker has in huge pages while one client after the other asks a brane, in KiB, and what it has afterwards.
fn huge_while_asked(run: &Run, path: &str, requests: usize) -> (u64, u64) {
    let worker = run.worker().unwrap();
    let over = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..requests).for_each(|_| assert_eq!(run.get(path).unwrap().status, 200));
            over.store(true, Relaxed);
        });
        let mut most = 0;
        while !over.load(Relaxed) {
            most = most.max(resident(worker).0);
        }
        most
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let left = resident(worker).0;
        if left == 0 || Instant::now() > deadline {
            return (most, left);
        }
    }
}

/// Would miss: huge pages that nobody gets, that a small brane gets too, that a brane gets which only declares much memory, or
/// that stay with the slot after the release.
#[test]
fn a_brane_that_grows_by_much_gets_huge_pages_and_a_small_one_does_not() {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if !enabled.contains("[madvise]") {
        println!("not tried: the policy of this machine is {enabled:?}; the appliance's is madvise");
        return;
    }
    for lifecycle in ["ephemeral", "pooled"] {
        let graph = format!(
            "[brane.touch]\nimage = \"file:./touch.wasm\"\nexecution = {{ lifecycle = \"{lifecycle}\" }}\n\
             [brane.hello]\nimage = \"file:./hello.wasm\"\nexecution = {{ lifecycle = \"{lifecycle}\" }}\n"
        );
        let run = Folder::with(&graph).unwrap();
        let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
        let hello = huge_while_asked(&run, "/hello", 300);
        let touch = huge_while_asked(&run, "/touch", 150);
        println!("{lifecycle}: KiB in huge pages while asked and afterwards: hello {hello:?}, touch {touch:?}");
        assert_eq!(hello, (0, 0), "{lifecycle}");
        // It touches 32 MiB; how far it has come when it is looked at is chance.
        assert!(touch.0 >= 8 << 10, "{lifecycle}: {touch:?}");
        assert_eq!(touch.1, 0, "{lifecycle}: they are given back");
    }
}

/// Would miss: a policy of init's that leaves the advice without effect, a seal that refuses it, a kernel without huge pages.
#[test]
fn the_appliance_has_huge_pages_for_a_brane_that_grows_by_much() {
    let graph = "[brane.touch]\nimage = \"file:./touch.wasm\"\n[brane.hello]\nimage = \"file:./hello.wasm\"\n";
    let appliance = Appliance::boot(&Setup::default().graph(graph)).unwrap();
    let taken = || -> u64 {
        let vmstat = appliance.read("/proc/vmstat").unwrap();
        vmstat.lines().find_map(|line| line.strip_prefix("thp_fault_alloc ")?.parse().ok()).unwrap()
    };
    let asked = |path: &str, times: usize| {
        let before = taken();
        (0..times).for_each(|_| assert_eq!(appliance.get(path).unwrap().status, 200, "{path}"));
        taken() - before
    };
    let (hello, touch) = (asked("/hello", 20), asked("/touch", 20));
    println!("huge pages taken: {hello} by hello, {touch} by touch");
    assert_eq!(hello, 0);
    // Fourteen to sixteen for each request, if there are any free.
    assert!(touch >= 20 * 10, "{touch}");
    appliance.power_off().unwrap();
}

/// Would miss: huge pages that cost more than they save. A pool of more than 1,024 memories is not advised; the two alternate.
#[test]
#[ignore = "measures"]
fn bench_32_mib_take_a_third_of_the_time_in_huge_pages() {
    let brane = |name: &str, replicas: u32| {
        format!(
            "[brane.{name}]\nimage = \"file:./touch.wasm\"\nreplicas = {replicas}\nexecution = {{ lifecycle = \"ephemeral\" }}\n"
        )
    };
    let run = Folder::with(&(brane("single", 1025) + &brane("huge", 4))).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let mut all = [Vec::new(), Vec::new()];
    for _ in 0..20 {
        for (name, times) in ["single", "huge"].into_iter().zip(&mut all) {
            let get = || assert_eq!(run.get(&format!("/{name}")).unwrap().status, 200);
            // The release of the one before is on this one's time, so it is not one of the others.
            get();
            let began = Instant::now();
            (0..10).for_each(|_| get());
            times.push(began.elapsed().as_secs_f64() * 1e5);
        }
    }
    let [single, huge] = all.map(|mut all| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    });
    println!("32 MiB: {single:.0} µs in single pages, {huge:.0} µs in huge ones: {:.2}", single / huge);
    assert!(single / huge >= 3.0);
}

/// Would miss: memory that a brane's slots keep for good once they have been used.
#[test]
fn an_idle_brane_gives_back_what_its_slots_have_kept() {
    const REPLICAS: usize = 64;
    let graph = format!("[brane.burn]\nimage = \"file:./burn.wasm\"\nreplicas = {REPLICAS}\n");
    let run = Folder::with(&graph).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let worker = run.worker().unwrap();
    let ready = || run.until("burn", "ready", |n| n == REPLICAS as u64).unwrap();
    ready();
    let before = resident(worker).1;
    let ask = b"GET /burn?n=2000000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    // All slots at once, twice.
    for _ in 0..2 {
        let mut all: Vec<_> = (0..REPLICAS).map(|_| TcpStream::connect(("127.0.0.1", run.port)).unwrap()).collect();
        for one in &mut all {
            one.write_all(ask).unwrap();
        }
        for one in &mut all {
            let mut answer = String::new();
            one.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        ready();
    }
    let used = resident(worker).1;
    // Half of what a slot of this brane keeps.
    let kept = 64 * REPLICAS as u64;
    let deadline = Instant::now() + Duration::from_secs(30);
    let after = loop {
        let now = resident(worker).1;
        if now + kept <= used || Instant::now() > deadline {
            break now;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    ready();
    println!("KiB resident: {before} before, {used} after {REPLICAS} slots were used, {after} when idle");
    assert!(used >= before + kept, "nothing is kept: {before}, {used}");
    assert!(after + kept <= used, "{before}, {used}, {after}");
    assert_eq!(run.get("/burn?n=1").unwrap().status, 200);
}
