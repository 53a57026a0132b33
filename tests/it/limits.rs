//! The limits of a brane: its part of a core, its deadline, its memory. Only the last needs a virtual machine.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gaia_tests::workstation::{Folder, Run, kib};
use gaia_tests::{Appliance, Setup, http};

/// Rounds of `burn` that do not end.
const FOREVER: &str = "n=1000000000000000";
/// What the quota is promised over.
const PERIOD: Duration = Duration::from_millis(100);
/// What may be measured in any period with half a core: the quota, and the 5 ms in which the kernel's own count is late and
/// the connection's share comes on top.
const AT_MOST: Duration = Duration::from_millis(55);
/// How long a tick is.
const TICK: Duration = Duration::from_millis(5);

/// One worker, so that all branes are on one core whatever connection goes where.
fn alone(graph: &str) -> (Folder, Run) {
    let folder = Folder::with(graph).unwrap();
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    (folder, run)
}

/// Sends a request, and hangs up when it is answered or nobody wants to know any more.
fn ask_until(port: u16, path: &str, stop: &AtomicBool) -> io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(20 * TICK))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    while !stop.load(Relaxed) {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => break,
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Sends requests from so many clients, one after the other, while something else is done.
fn meanwhile<T>(run: &Run, clients: usize, path: &str, work: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    // Some are never answered.
                    let _ = ask_until(run.port, path, &stop);
                }
            });
        }
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What the main thread of a process had of its core, and how long it was kept from it by others, until now.
fn schedstat(pid: i64) -> (Duration, Duration) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    let mut nanos = text.split_whitespace().map(|n| Duration::from_nanos(n.parse().unwrap()));
    (nanos.next().unwrap(), nanos.next().unwrap())
}

/// What a thread had of its core.
struct Had {
    /// The most in any 100 ms.
    most: Duration,
    /// In 100 ms, on average.
    mean: Duration,
    /// The same of the time in which no other process kept it from the core.
    unhindered: Duration,
}

/// Samples the main thread of a process about each millisecond.
fn had(pid: i64, during: Duration) -> Had {
    let sample = || {
        let (run, kept) = schedstat(pid);
        (Instant::now(), run, kept)
    };
    let first = sample();
    let mut all = vec![first];
    while first.0.elapsed() < during {
        std::thread::sleep(Duration::from_micros(900));
        all.push(sample());
    }
    let mut most = Duration::ZERO;
    let mut end = 0;
    for (from, before, _) in &all {
        while end + 1 < all.len() && all[end + 1].0 - *from <= PERIOD {
            end += 1;
        }
        most = most.max(all[end].1.saturating_sub(*before));
    }
    let last = all[all.len() - 1];
    let (run, wall, kept) = (last.1.abs_diff(first.1), last.0 - first.0, last.2.abs_diff(first.2));
    let part = |of: Duration| PERIOD.mul_f64(run.div_duration_f64(of));
    Had { most, mean: part(wall), unhindered: part(wall.saturating_sub(kept)) }
}

const HALF: &str = r#"
[brane.burn]
image = "file:./burn.wasm"
replicas = 1
limits = { cpu_quota = 0.5, deadline = "30s" }
"#;

/// Would miss: a quota kept only on average, or only within one instance; one that costs more than it should.
#[test]
fn half_a_core_is_half_of_any_100_ms() {
    let (_folder, run) = alone(HALF);
    let pid = run.worker().unwrap();
    // The last takes about 2 ms each: many instances, one replica.
    for (what, clients, path) in [
        ("one that spins", 1, format!("/burn?{FOREVER}")),
        ("short requests, one after the other", 1, "/burn?n=2000000".to_owned()),
        ("short requests, many at a time", 8, "/burn?n=2000000".to_owned()),
    ] {
        let had = meanwhile(&run, clients, &path, || {
            run.until("burn", "throttled_ns", |n| n > 0).unwrap();
            had(pid, Duration::from_secs(10))
        });
        println!(
            "{what}: at most {:?} in 100 ms, {:?} on average, {:?} unhindered",
            had.most, had.mean, had.unhindered
        );
        assert!(had.most <= AT_MOST, "{what}: {:?}", had.most);
        assert!(had.unhindered >= Duration::from_millis(45), "{what}: {:?}", had.unhindered);
        run.until("burn", "busy", |n| n == 0).unwrap();
    }
    let throttled = Duration::from_nanos(run.of("burn", "throttled_ns").unwrap());
    assert!(throttled > Duration::from_secs(5), "{throttled:?}");
}

const TWO: &str = r#"
[brane.burn]
image = "file:./burn.wasm"
replicas = 4
limits = { cpu_quota = 0.5, deadline = "5m" }

[brane.free]
image = "file:./burn.wasm"
replicas = 4
limits = { deadline = "5m" }

[brane.quiet]
image = "file:./hello.wasm"
"#;

/// How long `quiet` takes to answer, without what other processes keep the worker from its core; sorted.
fn latencies(run: &Run, worker: i64) -> Vec<Duration> {
    let one = |_| {
        let (began, (_, kept)) = (Instant::now(), schedstat(worker));
        assert_eq!(run.get("/quiet").unwrap().status, 200);
        let took = began.elapsed().saturating_sub(schedstat(worker).1.saturating_sub(kept));
        // At another moment of the tick.
        std::thread::sleep(Duration::from_micros(17_300));
        took
    };
    let mut all: Vec<_> = (0..200).map(one).collect();
    all.sort();
    all
}

/// Would miss: latency that grows with the number of guests that spin, with a quota or without.
#[test]
fn a_neighbour_costs_a_tick_however_many_guests_it_spins_in() {
    let (_folder, run) = alone(TWO);
    let pid = run.worker().unwrap();
    let alone = latencies(&run, pid);
    for (brane, clients) in [("burn", 4), ("free", 1), ("free", 4)] {
        let beside = meanwhile(&run, clients, &format!("/{brane}?{FOREVER}"), || {
            run.until(brane, "busy", |n| n == clients as u64).unwrap();
            latencies(&run, pid)
        });
        let at = |all: &[Duration], percent: usize| all[all.len() * percent / 100];
        println!(
            "alone p50 {:?} p90 {:?}; beside {clients} of {brane} p50 {:?} p90 {:?}",
            at(&alone, 50),
            at(&alone, 90),
            at(&beside, 50),
            at(&beside, 90)
        );
        // A tick of the one that runs, and what the kernel takes to switch between the worker and the client.
        for percent in [50, 90] {
            assert!(at(&beside, percent) <= at(&alone, percent) + TICK + Duration::from_millis(3), "p{percent}");
        }
        run.until(brane, "busy", |n| n == 0).unwrap();
    }
}

const LATE: &str = r#"
[brane.burn]
image = "file:./burn.wasm"
limits = { deadline = "200ms" }

[brane.slow]
image = "file:./burn.wasm"
limits = { deadline = "200ms", cpu_quota = 0.1 }

[brane.wait]
image = "file:./wait.wasm"
capability = { "clock" = { resolution = "ms" } }
limits = { deadline = "200ms" }
"#;

/// Would miss: a guest that is only looked at when it does something, or only when it does nothing.
#[test]
fn whatever_a_guest_does_it_ends_at_its_deadline() {
    let (_folder, run) = alone(LATE);
    let get = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: appliance\r\nConnection: close\r\n\r\n");
        let began = Instant::now();
        let answer = http::raw(run.port, request.as_bytes(), Duration::from_secs(10));
        (began.elapsed(), answer)
    };
    let (took, answer) = get("/wait?sleep_ms=50");
    assert_eq!(answer.unwrap().text(), "waited 50 ms\n");
    assert!(took >= Duration::from_millis(50));
    assert_eq!(get("/wait?sleep_ms=50&trickle_ms=5").1.unwrap().text(), "..........");
    for (brane, path, status) in [
        ("burn", format!("/burn?{FOREVER}"), Some(504)),
        ("slow", format!("/slow?{FOREVER}"), Some(504)),
        ("wait", "/wait?sleep_ms=10000".to_owned(), Some(504)),
        ("wait", "/wait?sleep_ms=10000&trickle_ms=10".to_owned(), None),
    ] {
        let before = run.of(brane, "late").unwrap();
        let one = |_| {
            let (took, answer) = get(&path);
            assert_eq!(answer.ok().map(|a| a.status), status, "{path}");
            run.until(brane, "busy", |n| n == 0).unwrap();
            took
        };
        let mut all: Vec<_> = (0..10).map(one).collect();
        all.sort();
        println!("{path}: ended after {:?} to {:?}", all[0], all[9]);
        assert!(all[0] >= Duration::from_millis(200), "{path}: {all:?}");
        // One may have met another process on its core.
        assert!(all[8] <= Duration::from_millis(250), "{path}: {all:?}");
        assert_eq!(run.of(brane, "late").unwrap(), before + 10, "{path}");
    }
}

const FULL: &str = r#"
[brane.touch]
image = "file:./touch.wasm"
replicas = 24

[brane.grow]
image = "file:./grow.wasm"
replicas = 24

[brane.late]
image = "file:./wait.wasm"
replicas = 24
capability = { clock = { resolution = "ms" } }

[brane.quiet]
image = "file:./hello.wasm"
replicas = 4
"#;

/// What the workers may have, in MiB: a tenth of what the guests ask for.
const BUDGET_MIB: u64 = 256;

/// What the guests of so many clients are asked: to touch what they get at once, to take as much as they can get, and to touch
/// it only when all others have theirs, too. That is when too much was granted.
fn wants_all(client: usize) -> &'static str {
    const LATE: &str = "/late?then_touch_kib=32768&sleep_ms=300";
    ["/touch", LATE, "/grow?mib=60", LATE][client % 4]
}

fn full() -> (Folder, Run) {
    let folder = Folder::with(FULL).unwrap();
    let memory = format!("{BUDGET_MIB}MiB");
    let run = folder.run(&["--workers", "1", "--memory", &memory]).unwrap().serving().unwrap();
    (folder, run)
}

/// Would miss: guests that take what the machine has, together; one whose end costs the others their answer; a worker that
/// is ended instead.
#[test]
fn guests_that_want_all_memory_get_less_or_end_and_the_others_notice_nothing() {
    let (_folder, run) = full();
    let pid = run.worker().unwrap();
    println!("before: {} MiB", kib(pid, "VmRSS").unwrap() / 1024);
    let (mut most, mut answers) = (0, 0);
    let began = Instant::now();
    let killed = || ["touch", "grow", "late"].iter().map(|brane| run.of(brane, "killed").unwrap()).sum::<u64>();
    let over = AtomicBool::new(false);
    let got = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..48)
            .map(|client| {
                let path = wants_all(client);
                let (run, over) = (&run, &over);
                scope.spawn(move || {
                    let mut answers = Vec::new();
                    while !over.load(Relaxed) {
                        answers.push(http::get(run.port, path, Duration::from_secs(30)).unwrap());
                    }
                    answers
                })
            })
            .collect();
        // For some seconds, and until too much was granted once.
        let enough = |killed: &dyn Fn() -> u64| match began.elapsed().as_secs() {
            0..8 => false,
            8..40 => killed() > 0,
            _ => true,
        };
        while !enough(&killed) {
            let answer = run.get("/quiet");
            if !answer.as_ref().is_ok_and(|answer| answer.text() == "hello\n") {
                over.store(true, Relaxed);
                panic!("{answer:?}");
            }
            answers += 1;
            most = most.max(kib(pid, "VmRSS").unwrap());
        }
        over.store(true, Relaxed);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    most = most.max(kib(pid, "VmHWM").unwrap());
    let count = |what: &dyn Fn(&http::Answer) -> bool| got.iter().filter(|answer| what(answer)).count();
    let whole = count(&|a| a.status == 200 && !a.text().starts_with("got") || a.text() == "got 60 of 60 MiB\n");
    let less = count(&|a| a.status == 200) - whole;
    let (trapped, ended) = (count(&|a| a.status == 500), count(&|a| a.status == 503));
    let killed = killed();
    println!(
        "at most {} MiB of {BUDGET_MIB}; of {} guests {whole} got all, {less} less, {trapped} trapped, {ended} were ended; \
         {answers} answers of the other brane",
        most / 1024,
        got.len()
    );
    assert_eq!(run.worker().unwrap(), pid, "the same worker lives");
    assert!(most < BUDGET_MIB * 1024, "{most} KiB");
    assert_eq!(whole + less + trapped + ended, got.len(), "nothing else became of any");
    assert!(less + trapped > 0, "growth was never refused");
    assert!(killed > 0 && ended > 0, "no instance was ended");
    let told = |lines: &[String]| lines.iter().filter(|l| l.contains(" KILL memory: ")).count() as u64 == killed;
    run.output.until(Duration::from_secs(30), told).unwrap();
    assert!(
        !run.output
            .all()
            .iter()
            .any(|line| line.contains(" quiet") && !line.contains(" RES 200 ") && !line.contains(" END "))
    );
    for brane in ["grow", "touch", "late"] {
        run.until(brane, "busy", |n| n == 0).unwrap();
    }
    assert_eq!(run.get("/grow?mib=60").unwrap().text(), "got 60 of 60 MiB\n", "there is enough again");
}

/// Would miss: a worker that grants whatever is asked until it has counted for the first time.
#[test]
fn the_first_request_gets_no_more_than_there_is() {
    let folder = Folder::with("[brane.touch]\nimage = \"file:./touch.wasm\"\n").unwrap();
    for _ in 0..3 {
        let run = folder.run(&["--workers", "1", "--memory", "48MiB"]).unwrap().serving().unwrap();
        assert_eq!(run.get("/touch").unwrap().status, 500, "32 MiB below the mark at 30");
        run.output.line("memory allocation of 33554432 bytes failed").unwrap();
        assert!(run.interrupt().unwrap().success());
    }
}

/// Would miss: guests that each get their memory while there is enough, wait, and touch it one right after the other, quicker
/// than the count of memory is read from tick to tick: in huge pages that is some 80 MiB.
#[test]
fn what_was_granted_long_ago_is_not_touched_beyond_what_there_is() {
    let (_folder, run) = full();
    let pid = run.worker().unwrap();
    let began = Instant::now();
    let got: Vec<_> = std::thread::scope(|scope| {
        // Not together, or too little would be granted: what was granted in the last ticks counts as touched.
        let each = |client: u32| {
            let (run, since) = (&run, client * 5 * TICK);
            scope.spawn(move || {
                std::thread::sleep(since.saturating_sub(began.elapsed()));
                let left = Duration::from_secs(2).saturating_sub(began.elapsed());
                let path = format!("/late?then_touch_kib=32768&sleep_ms={}&then_sleep_ms=500", left.as_millis());
                run.get(&path).unwrap().status
            })
        };
        let clients: Vec<_> = (0..24).map(each).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let (most, killed) = (kib(pid, "VmHWM").unwrap() / 1024, run.of("late", "killed").unwrap());
    println!("at most {most} MiB of {BUDGET_MIB}; {killed} were ended: {got:?}");
    assert!(most < BUDGET_MIB);
    assert!(got.iter().all(|status| [200, 503].contains(status)));
    assert_eq!(got.iter().filter(|status| **status == 503).count() as u64, killed);
    assert!(got.contains(&200) && killed > 0, "nothing was short: this shows nothing");
}

const NEAR: &str = r#"
[brane.ready]
image = "file:./hello.wasm"
replicas = 16

[brane.hold]
image = "file:./wait.wasm"
replicas = 128
capability = { clock = { resolution = "ms" } }
limits = { mem_max = "200 MiB", deadline = "5m" }
execution = { lifecycle = "ephemeral" }
"#;

/// Would miss: ready instances that hold memory while there is none for guests, or that go before growth is refused; that are not made
/// again; a brane that does not answer without them; guests that are ended although less would do.
#[test]
fn near_the_mark_growth_is_refused_first_then_ready_instances_go_and_they_come_back() {
    // Of 256 MiB: growth ends at 184, and the largest is ended at 208 (`runtime/src/worker/memory.rs`).
    const ENOUGH: u64 = 190 * 1024;
    let folder = Folder::with(NEAR).unwrap();
    let run = folder.run(&["--workers", "1", "--memory", "256MiB"]).unwrap().serving().unwrap();
    let pid = run.worker().unwrap();
    let resident = || kib(pid, "VmRSS").unwrap();
    let is_ready = || run.of("ready", "ready").unwrap();
    run.until("ready", "ready", |n| n == 16).unwrap();
    // Whoever asks for so much holds it until its client goes; so many do then.
    let hold = |kib: u64, busy: u64| {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", run.port)).unwrap();
        let request = format!("GET /hold?touch_kib={kib}&sleep_ms=200000 HTTP/1.1\r\nHost: a\r\n\r\n");
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        run.until("hold", "busy", |n| n == busy).unwrap();
        stream
    };
    let mut holders = vec![hold(140 * 1024, 1)];
    let deadline = Instant::now() + Duration::from_secs(30);
    while resident() < 140 * 1024 {
        assert!(Instant::now() < deadline, "{} KiB", resident());
        std::thread::sleep(Duration::from_millis(5));
    }
    // For three readings, what was granted counts beside what was touched of it.
    std::thread::sleep(Duration::from_millis(200));
    // What is left is for somebody who wants less.
    assert_eq!(run.get("/hold?touch_kib=61440").unwrap().status, 500, "{} KiB", resident());
    assert_eq!(is_ready(), 16, "growth is refused first");
    assert_eq!(run.get("/hold?touch_kib=8192").unwrap().status, 200);
    run.until("hold", "busy", |n| n == 1).unwrap();
    // What an instance may always have takes it beyond the mark.
    while resident() < ENOUGH {
        holders.push(hold(600, holders.len() as u64 + 1));
        assert!(holders.len() < 120, "{} KiB", resident());
    }
    run.until("ready", "ready", |n| n == 0).unwrap();
    println!("{} hold {} KiB, and no instance is ready", holders.len(), resident());
    for _ in 0..5 {
        assert_eq!(run.get("/hold?touch_kib=8192").unwrap().status, 500, "no more growth");
        assert_eq!(run.get("/ready").unwrap().text(), "hello\n", "it answers without");
        assert_eq!(is_ready(), 0, "none is made again");
    }
    assert_eq!((run.of("hold", "busy").unwrap(), run.of("hold", "killed").unwrap()), (holders.len() as u64, 0));
    drop(holders);
    run.until("hold", "busy", |n| n == 0).unwrap();
    run.until("ready", "ready", |n| n == 16).unwrap();
    assert_eq!(run.get("/hold?touch_kib=61440").unwrap().status, 200, "there is enough again");
    assert_eq!(run.worker().unwrap(), pid, "the same worker lives");
}

/// In place of a status.
const BROKEN_OFF: u16 = 0;

/// Would miss: a worker that does not read its cgroup, marks that are too high, a limit that the kernel enforces first.
#[test]
fn on_the_appliance_the_kernel_has_nobody_to_kill() {
    let appliance = Appliance::boot(&Setup::default().graph(FULL)).unwrap();
    let number = |file: &str| {
        let text = appliance.read(&format!("/sys/fs/cgroup/workers/{file}")).unwrap();
        text.trim().parse::<u64>().unwrap() >> 20
    };
    let (limit, before) = (number("memory.max"), number("memory.current"));
    let workers = ["worker@0", "worker@1"].map(|worker| appliance.pid(worker).unwrap());
    let port = appliance.port().unwrap();
    let heard = Duration::from_secs(30);
    let stop = Instant::now() + Duration::from_secs(20);
    let mut quiet = 0;
    let got = std::thread::scope(|scope| {
        let client = |client: usize| {
            let path = wants_all(client);
            scope.spawn(move || {
                // QEMU's user network listens with a queue of one (`ss -ltn` shows it). Of connections that are made at
                // once, the others wait on this side for their retransmissions, which come at once again: on the wire to
                // the machine they never appear, for minutes.
                std::thread::sleep(Duration::from_millis(25) * u32::try_from(client).unwrap());
                let mut all = Vec::new();
                while Instant::now() < stop {
                    all.push(match http::get(port, path, heard) {
                        Ok(answer) => answer.status,
                        // It was ended after its answer's head had gone out.
                        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => BROKEN_OFF,
                        Err(e) => panic!("{path}: {e}"),
                    });
                }
                all
            })
        };
        let clients: Vec<_> = (0..48).map(client).collect();
        while Instant::now() < stop {
            assert_eq!(http::get(port, "/quiet", heard).unwrap().text(), "hello\n");
            quiet += 1;
        }
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    let count = |status: u16| got.iter().filter(|got| **got == status).count();
    println!(
        "{before} MiB, at most {} of {limit}; {} guests answered, {} trapped, {} were ended; {quiet} answers of the other brane",
        number("memory.peak"),
        count(200),
        count(500),
        count(503) + count(BROKEN_OFF)
    );
    assert_eq!(count(200) + count(500) + count(503) + count(BROKEN_OFF), got.len(), "nothing else became of any");
    assert!(count(503) > 0, "no instance was ended");
    let events = appliance.read("/sys/fs/cgroup/workers/memory.events").unwrap();
    assert!(events.contains("oom 0\n") && events.contains("oom_kill 0\n"), "{events}");
    assert_eq!(["worker@0", "worker@1"].map(|worker| appliance.pid(worker).unwrap()), workers);
    appliance.power_off().unwrap();
}

const HOARD: &str = r#"
[brane.little]
image = "file:./hoard.wasm"
limits = { mem_max = "8 MiB" }

[brane.much]
image = "file:./hoard.wasm"
limits = { mem_max = "512 MiB" }
"#;

/// Would miss: memory that a guest has the host hold for it, which is not in its own.
#[test]
fn what_the_host_holds_for_a_guest_counts_as_its_own() {
    let (_folder, run) = alone(HOARD);
    let pid = run.worker().unwrap();
    for what in ["requests", "bodies", "fields"] {
        let before = kib(pid, "VmRSS").unwrap();
        let answer = run.get(&format!("/little?what={what}")).unwrap();
        println!(
            "{what}: {} at most {} MiB, before {}",
            answer.status,
            kib(pid, "VmHWM").unwrap() / 1024,
            before / 1024
        );
        assert_eq!(answer.status, 500, "{what}: {}", answer.text());
    }
    // 8 MiB, what sixteen calls move, and what the worker is without.
    assert!(kib(pid, "VmHWM").unwrap() < 64 * 1024, "{} KiB", kib(pid, "VmHWM").unwrap());
    run.output.line(" KILL memory: mem_max is 8192 KiB, ").unwrap();
    assert!(run.of("little", "killed").unwrap() > 0);
    for what in ["bodies", "fields"] {
        assert_eq!(run.get(&format!("/much?what={what}")).unwrap().text(), "kept 300\n");
    }
}
