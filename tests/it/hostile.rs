//! A guest that tries to do harm ends, and nothing is left of it. Through `gaia run`, with one worker, so that everything is
//! in one process and can be counted.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use gaia_tests::http;
use gaia_tests::workstation::{Folder, Run, kib};

const GRAPH: &str = r#"
[brane.hello]
image = "file:./hello.wasm"

[brane.hostile]
image = "file:./hostile.wasm"
replicas = 4

[brane.hostile.limits]
mem_max  = "8 MiB"
deadline = "400ms"
body_max = "1 MiB"
"#;

/// What the worker holds: descriptors, and resident memory in KiB.
fn holds(pid: i64) -> (usize, u64) {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    (files, kib(pid, "VmRSS").unwrap())
}

/// Waits until nothing of any request is left in the worker.
fn idle(run: &Run) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let (status, ps) = (run.ask("status").unwrap(), run.ask("ps").unwrap());
        let worker = &status["workers"][0];
        let busy = ps["branes"].as_array().unwrap().iter().any(|b| b["busy"] != 0 || b["waiting"] != 0);
        if worker["inside"] == 0 && worker["open"] == 0 && !busy && ps["instances"].as_array().unwrap().is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{worker} {ps}");
    }
}

fn well(run: &Run, after: &str) {
    let began = Instant::now();
    assert_eq!(run.get("/hello").unwrap().text(), "hello\n", "after {after}");
    assert!(began.elapsed() < Duration::from_millis(500), "after {after}: {:?}", began.elapsed());
}

/// What a client sees.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Status(u16),
    /// The answer breaks off.
    Broken,
}

/// Would miss: a guest that does not end, that takes another brane's time with it, or that leaves an instance, a handle, memory
/// or a descriptor behind.
#[test]
fn a_hostile_guest_ends_and_nothing_is_left_of_it() {
    let run = Folder::with(GRAPH).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let worker = run.worker().unwrap();
    let ask = |how: &str| {
        let request = format!(
            "POST /hostile?how={how} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: close\r\n\r\nabcde"
        );
        match http::raw(run.port, request.as_bytes(), Duration::from_secs(10)) {
            Ok(answer) => Seen::Status(answer.status),
            Err(_) => Seen::Broken,
        }
    };
    // Once each, so that what is made at the first time is there.
    let table = [
        ("loop", Seen::Status(504)),
        ("recurse", Seen::Status(500)),
        ("recurse-wide", Seen::Status(500)),
        ("memory", Seen::Status(504)),
        ("handles", Seen::Status(500)),
        ("pollables", Seen::Status(500)),
        ("names", Seen::Status(500)),
        ("values", Seen::Status(500)),
        ("field", Seen::Status(500)),
        ("leak", Seen::Status(200)),
        ("log", Seen::Status(504)),
        ("trap-asked", Seen::Status(500)),
        ("trap-reading", Seen::Status(500)),
        ("trap-answered", Seen::Status(200)),
        ("trap-writing", Seen::Broken),
        ("trap-finished", Seen::Status(200)),
        ("endless", Seen::Broken),
        ("", Seen::Status(400)),
    ];
    for (how, seen) in &table {
        let got = ask(how);
        println!("{how}: {got:?}");
        assert_eq!(got, *seen, "{how}");
        well(&run, how);
    }
    idle(&run);
    let (files, resident) = holds(worker);
    for round in 0..3 {
        for (how, seen) in &table {
            // All replicas at once.
            let all = std::thread::scope(|scope| {
                let all: Vec<_> = (0..4).map(|_| scope.spawn(|| ask(how))).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
            });
            assert!(all.iter().all(|one| one == seen || *one == Seen::Status(503)), "{how}: {all:?}");
            well(&run, how);
        }
        idle(&run);
        let now = holds(worker);
        println!("round {round}: {files} descriptors and {resident} KiB before, {} and {} after", now.0, now.1);
        assert_eq!(now.0, files, "descriptors are left");
        // Four instances of 8 MiB each were touched; what a pool keeps of each is bounded.
        assert!(now.1 < resident + 16 * 1024, "{resident} KiB, now {}", now.1);
    }
    let role = run.ask("status").unwrap()["workers"][0]["pid"].as_i64().unwrap();
    assert_eq!(role, worker, "the same worker all the time");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a client that holds an instance by sending its body, or reading its answer, as slowly as it can.
#[test]
fn a_client_that_dawdles_holds_nothing_beyond_the_deadline() {
    let run = Folder::with(&GRAPH.replace("hostile.wasm", "faulty.wasm")).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", run.port)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.write_all(b"POST /hostile?how=read HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n").unwrap();
    let began = Instant::now();
    let mut answer = [0; 12];
    let answered = std::thread::scope(|scope| {
        let mut sender = client.try_clone().unwrap();
        scope.spawn(move || {
            // A byte each 20 ms would be twenty seconds of body.
            for _ in 0..500 {
                if sender.write_all(b"x").is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let read = client.read_exact(&mut answer);
        let answered = began.elapsed();
        let _ = client.shutdown(std::net::Shutdown::Both);
        read.map(|()| answered)
    });
    let answered = answered.unwrap();
    println!("{} after {answered:?}", String::from_utf8_lossy(&answer));
    assert_eq!(&answer, b"HTTP/1.1 504");
    assert!((Duration::from_millis(400)..Duration::from_millis(450)).contains(&answered), "{answered:?}");
    drop(client);
    idle(&run);
    // One that asks and never reads.
    let mut client = TcpStream::connect(("127.0.0.1", run.port)).unwrap();
    client.write_all(b"GET /hostile?how=stream HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let began = Instant::now();
    run.output
        .until(Duration::from_secs(5), |lines| lines.iter().filter(|l| l.contains(" KILL deadline")).count() == 2)
        .unwrap();
    assert!(began.elapsed() < Duration::from_millis(650), "{:?}", began.elapsed());
    well(&run, "a client that never reads");
    drop(client);
    idle(&run);
}
