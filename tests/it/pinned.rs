//! Pinned branes: what an instance keeps between requests, and what ends it. All but the last need no virtual machine.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use gaia_tests::workstation::{Folder, Run, kib};
use gaia_tests::{ANSWER_WITHIN, Appliance, Setup, http};
use rustix::process::{Pid, Signal};

/// A pinned brane with these limits.
fn keep(name: &str, replicas: u32, limits: &str) -> String {
    format!(
        "[brane.{name}]\nimage = \"file:./keep.wasm\"\nreplicas = {replicas}\nlimits = {{ {limits} }}\n\
         execution = {{ lifecycle = \"pinned\" }}\n"
    )
}

fn serving(graph: &str, arguments: &[&str]) -> (Folder, Run) {
    let folder = Folder::with(graph).unwrap();
    let run = folder.run(arguments).unwrap().serving().unwrap();
    (folder, run)
}

fn text(run: &Run, path: &str) -> String {
    run.get(path).unwrap().text()
}

fn role(run: &Run, name: &str) -> Option<serde_json::Value> {
    run.ask("status").unwrap()["roles"].as_array().unwrap().iter().find(|r| r["name"] == name).cloned()
}

fn kill(run: &Run, name: &str, signal: Signal) {
    let pid = role(run, name).unwrap()["pid"].as_i64().unwrap();
    rustix::process::kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// A connection on which so much of a request has been sent.
fn sent(run: &Run, request: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", run.port)).unwrap();
    stream.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: appliance\r\nConnection: close\r\n\r\n")
}

/// Would miss: a worker that has an instance of its own, two requests at a time in one instance, a request that is served
/// twice, a keeper outside its sandbox.
#[test]
fn one_instance_counts_the_requests_of_all_workers_each_once() {
    let (_folder, run) = serving(&(keep("counter", 1, "") + gaia_tests::HELLO), &["--workers", "2"]);
    let counts: Vec<String> = std::thread::scope(|scope| {
        let client = || (0..25).map(|_| text(&run, "/counter?how=burn&n=100000")).collect::<Vec<_>>();
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    let expected: BTreeSet<String> = (1..=200).map(|n| format!("count {n} of {n}\n")).collect();
    assert_eq!(counts.len(), 200);
    assert_eq!(counts.into_iter().collect::<BTreeSet<_>>(), expected);
    let status = run.ask("status").unwrap();
    for worker in status["workers"].as_array().unwrap() {
        assert!(worker["requests"].as_u64().unwrap() > 10, "both workers had some: {status}");
    }
    assert_eq!(role(&run, "keeper@counter.001").unwrap()["sandbox"], "whole");
    let ps = run.ask("ps").unwrap();
    let instance = &ps["instances"][0];
    assert_eq!((&instance["name"], &instance["role"]), (&"counter.001".into(), &"keeper@counter.001".into()), "{ps}");
    let number = |what| run.of("counter", what).unwrap();
    assert_eq!((number("requests"), number("ready"), number("busy"), number("waiting")), (200, 1, 0, 0));
    run.output.line(" counter.001 RES 200 cpu=").unwrap();
    assert_eq!(text(&run, "/hello"), "hello\n");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: state that is lost to a deploy which does not concern it, or that outlives one which does; an end that is not
/// told.
#[test]
fn state_lives_over_deploys_until_its_brane_changes() {
    let both = |counter: &str, hello: &str| keep("counter", 2, counter) + "ingress = { path = \"/count\" }\n" + hello;
    let hello =
        |path: &str| format!("[brane.hello]\nimage = \"file:./hello.wasm\"\ningress = {{ path = \"{path}\" }}\n");
    let (folder, run) = serving(&both("", &hello("/a")), &["--watch", "--workers", "2"]);
    assert_eq!(text(&run, "/count"), "count 1 of 1\n");
    let keeper = role(&run, "keeper@counter.001").unwrap()["pid"].clone();
    // Another brane, and its own route.
    folder.write(&both("", &hello("/b")).replace("/count", "/visits")).unwrap();
    run.error.line("serving generation 2: 2 workers, 2 keepers ready").unwrap();
    assert_eq!(text(&run, "/b"), "hello\n");
    assert_eq!(text(&run, "/visits"), "count 2 of 2\n");
    // A replica more, and one less.
    folder.write(&both("", "").replace("replicas = 2", "replicas = 3")).unwrap();
    run.error.line("serving generation 3: 2 workers, 3 keepers ready").unwrap();
    assert_eq!(text(&run, "/count"), "count 3 of 3\n");
    folder.write(&both("", "").replace("replicas = 2", "replicas = 1")).unwrap();
    run.error.line("generation 4 ends the states of counter.002 to counter.003: there are fewer replicas").unwrap();
    run.error.line("serving generation 4: 2 workers, 1 keepers ready").unwrap();
    assert_eq!(text(&run, "/count"), "count 4 of 4\n");
    assert_eq!(role(&run, "keeper@counter.001").unwrap()["pid"], keeper, "the same process");
    assert!(!run.error.all().iter().any(|line| line.contains("ends the state of counter.001")));
    // A deploy that fails changes nothing.
    folder.write(&both("deadline = \"no\"", "")).unwrap();
    run.error.line("1 error, nothing is changed").unwrap();
    assert_eq!(text(&run, "/count"), "count 5 of 5\n");
    // Its limits.
    folder.write(&both("deadline = \"3s\"", "").replace("replicas = 2", "replicas = 1")).unwrap();
    run.error.line("generation 5 ends the state of counter.001: its limits change").unwrap();
    run.error.line("serving generation 5").unwrap();
    run.output.line("it is kept no longer: its state is gone").unwrap();
    assert_eq!(text(&run, "/count"), "count 1 of 1\n");
    // Its image, as a build puts it in place.
    std::fs::copy(gaia_tests::out("branes/counter.wasm"), folder.path().join("new.wasm")).unwrap();
    std::fs::rename(folder.path().join("new.wasm"), folder.path().join("keep.wasm")).unwrap();
    run.error.line("generation 6 ends the state of counter.001: its image changes").unwrap();
    run.error.line("serving generation 6").unwrap();
    assert_eq!((text(&run, "/count"), text(&run, "/count")), ("count 1\n".into(), "count 2\n".into()));
    folder.write(gaia_tests::HELLO).unwrap();
    run.error.line("generation 7 ends the state of counter.001: it is not there any more").unwrap();
    run.error.line("serving generation 7: 2 workers ready").unwrap();
    let gone = Instant::now();
    while role(&run, "keeper@counter.001").is_some() {
        assert!(gone.elapsed() < Duration::from_secs(10), "{}", run.ask("status").unwrap());
    }
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a deploy that costs the requests which were there before it, though their brane changes; one that serves them
/// with the new brane.
#[test]
fn requests_from_before_a_deploy_are_answered_by_the_keeper_from_before() {
    let (folder, run) = serving(&keep("k", 1, "deadline = \"30s\""), &["--watch", "--workers", "2"]);
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| text(&run, "/k?how=burn&n=2500000000"));
        run.until("k", "busy", |n| n == 1).unwrap();
        let waits = scope.spawn(|| text(&run, "/k"));
        run.until("k", "waiting", |n| n == 1).unwrap();
        folder.write(&keep("k", 1, "deadline = \"29s\"")).unwrap();
        run.error.line("serving generation 2").unwrap();
        // In the slot beside that of the old one, which still has both.
        assert_eq!(text(&run, "/k"), "count 1 of 1\n");
        let roles = run.ask("status").unwrap()["roles"].as_array().unwrap().clone();
        let states: BTreeSet<_> =
            roles.iter().filter(|r| r["name"] == "keeper@k.001").map(|r| r["state"].to_string()).collect();
        assert_eq!(states, ["\"draining\"".to_owned(), "\"up\"".to_owned()].into(), "it ended too early to tell");
        assert_eq!((inside.join().unwrap(), waits.join().unwrap()), ("count 1 of 1\n".into(), "count 2 of 2\n".into()));
    });
    run.output.line("it is kept no longer: its state is gone").unwrap();
    assert_eq!(text(&run, "/k"), "count 2 of 2\n");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a keeper that takes memory without a bound, or that never lets go of what its instance holds.
#[test]
fn a_keeper_for_which_there_is_no_memory_ends_its_instance() {
    // What the host holds is counted when it is there; of memory it would not be granted so much.
    let graph = "[brane.hoard]\nimage = \"file:./hoard.wasm\"\n\
                 limits = { mem_max = \"512 MiB\", deadline = \"30s\" }\nexecution = { lifecycle = \"pinned\" }\n";
    let (_folder, run) = serving(&(graph.to_owned() + &keep("k", 1, "")), &["--workers", "1", "--memory", "48MiB"]);
    assert_eq!(text(&run, "/k"), "count 1 of 1\n");
    let answer = run.get("/hoard?what=requests").unwrap();
    assert_eq!(answer.status, 503, "{}", answer.text());
    run.output.line(" hoard.001 KILL memory: the host is short of it, and this held ").unwrap();
    run.until("hoard", "ready", |n| n == 1).unwrap();
    assert_eq!(run.of("hoard", "killed").unwrap(), 1);
    let keeper = role(&run, "keeper@hoard.001").unwrap();
    assert_eq!((&keeper["state"], &keeper["restarts"]), (&"up".into(), &0.into()));
    let resident = kib(keeper["pid"].as_i64().unwrap(), "VmRSS").unwrap() / 1024;
    assert!(resident < 36, "{resident} MiB are there still, and there is too little");
    assert_eq!(text(&run, "/k"), "count 2 of 2\n", "the other has enough");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: an instance that goes on after it was ended in the middle of its work, an end without its line, a request
/// that is lost to the making of the next instance.
#[test]
fn what_goes_wrong_ends_the_state_with_a_line_and_the_next_is_served() {
    let (_folder, run) = serving(&keep("k", 1, "deadline = \"1s\", mem_max = \"4 MiB\""), &["--workers", "2"]);
    let pid = role(&run, "keeper@k.001").unwrap()["pid"].clone();
    for (how, status, lines) in [
        ("trap", 500, &["k.001 TRAP wasm trap", ": its state is gone"][..]),
        ("spin", 504, &["k.001 KILL deadline of 1s: its state is gone"]),
        ("hoard", 500, &["k.001 KILL memory: mem_max is 4096 KiB", ": its state is gone"]),
        ("exit", 502, &["k.001 END cold=", " it exited: its state is gone"]),
    ] {
        assert_eq!(text(&run, "/k"), "count 1 of 1\n", "before {how}");
        assert_eq!(text(&run, "/k"), "count 2 of 2\n");
        let (answer, waited) = std::thread::scope(|scope| {
            let answer = scope.spawn(|| run.get(&format!("/k?how={how}")).unwrap());
            // Beside this one another waits, and is served by the next instance.
            let waited = (how == "spin").then(|| {
                let began = Instant::now();
                // So much later is its own deadline.
                while run.of("k", "busy").unwrap() == 0 || began.elapsed() < Duration::from_millis(500) {}
                text(&run, "/k")
            });
            (answer.join().unwrap(), waited)
        });
        assert_eq!(answer.status, status, "{how}: {}", answer.text());
        let next = waited.unwrap_or_else(|| text(&run, "/k"));
        assert_eq!(next, "count 1 of 1\n", "after {how}");
        let told = |all: &[String]| all.iter().any(|line| lines.iter().all(|words| line.contains(words)));
        run.output.until(Duration::from_secs(10), told).unwrap();
        assert_eq!(run.get("/k?how=trap").unwrap().status, 500, "to begin anew");
    }
    assert_eq!(role(&run, "keeper@k.001").unwrap()["pid"], pid, "the same process all the time");
    assert!(!run.output.all().iter().any(|line| line.contains(" FAULT ")));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a client that takes the instance away from others by hanging up, whether it waits for its answer, is in the
/// middle of it, or still sends.
#[test]
fn a_client_that_hangs_up_cancels_nothing() {
    let graph = keep("k", 1, "deadline = \"20s\"") + &keep("slow", 1, "deadline = \"1s\"");
    let (_folder, run) = serving(&graph, &["--workers", "2"]);
    // Before there is an answer.
    let client = sent(&run, &get("/k?how=burn&n=300000000"));
    run.until("k", "busy", |n| n == 1).unwrap();
    drop(client);
    assert_eq!(text(&run, "/k"), "count 2 of 2\n", "the first came to its end");
    // In the middle of one: more than anything holds on the way.
    let mut client = sent(&run, &get("/k?how=stream&bytes=100000000"));
    let mut some = [0; 10_000];
    client.read_exact(&mut some).unwrap();
    drop(client);
    assert_eq!(text(&run, "/k"), "count 4 of 4\n");
    // While it waits for its turn: it never has one.
    let busy = sent(&run, &get("/k?how=burn&n=300000000"));
    run.until("k", "busy", |n| n == 1).unwrap();
    let waits = sent(&run, &get("/k"));
    run.until("k", "waiting", |n| n == 1).unwrap();
    drop(waits);
    run.until("k", "waiting", |n| n == 0).unwrap();
    assert_eq!(text(&run, "/k"), "count 6 of 6\n");
    drop(busy);
    // In the middle of a request's body.
    let half = "POST /k?how=echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf";
    let client = sent(&run, half);
    run.until("k", "busy", |n| n == 1).unwrap();
    client.shutdown(Shutdown::Both).unwrap();
    assert_eq!(text(&run, "/k"), "count 8 of 8\n");
    // One that stays and takes nothing: its answer is cut off at the deadline, and nobody else's state is its to end.
    let stalls = sent(&run, &get("/slow?how=stream&bytes=30000000"));
    run.until("slow", "busy", |n| n == 1).unwrap();
    let mut answers = std::iter::repeat_with(|| text(&run, "/slow"));
    assert_eq!(answers.find(|answer| answer != "all instances are busy\n").unwrap(), "count 2 of 2\n");
    run.output.line("slow.001 KILL deadline of 1s: its answer is cut off").unwrap();
    drop(stalls);
    let bad =
        |line: &&String| [" k.001 TRAP ", " k.001 KILL ", " FAULT ", " END "].iter().any(|kind| line.contains(kind));
    assert_eq!(run.output.all().iter().find(bad), None);
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a keeper that stays away, requests that are lost with it though they only waited, others that notice.
#[test]
fn a_killed_keeper_is_replaced_and_loses_the_request_inside_it_alone() {
    let graph = keep("k", 1, "deadline = \"20s\"") + &keep("other", 1, "");
    let (_folder, run) = serving(&graph, &["--workers", "2"]);
    assert_eq!((text(&run, "/other"), text(&run, "/k")), ("count 1 of 1\n".into(), "count 1 of 1\n".into()));
    let before = role(&run, "keeper@k.001").unwrap();
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| run.get("/k?how=spin").unwrap());
        run.until("k", "busy", |n| n == 1).unwrap();
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| text(&run, "/k"))).collect();
        run.until("k", "waiting", |n| n == 4).unwrap();
        kill(&run, "keeper@k.001", Signal::KILL);
        assert_eq!(inside.join().unwrap().status, 502);
        let waited: BTreeSet<String> = waiting.into_iter().map(|client| client.join().unwrap()).collect();
        assert_eq!(waited, (1..=4).map(|n| format!("count {n} of {n}\n")).collect());
    });
    run.output.line("k.001 FAULT its keeper was killed by SIGKILL: its state is gone").unwrap();
    run.error.line("keeper@k.001 (pid ").unwrap();
    assert_eq!(text(&run, "/k"), "count 5 of 5\n");
    assert_eq!(text(&run, "/other"), "count 2 of 2\n", "nobody else notices");
    let after = role(&run, "keeper@k.001").unwrap();
    assert_ne!(before["pid"], after["pid"]);
    assert_eq!((&after["restarts"], &after["sandbox"]), (&1.into(), &"whole".into()));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a keeper that a new worker, or a new control, cannot find.
#[test]
fn workers_and_control_come_back_to_the_keepers_that_are_there() {
    let graph = keep("k", 1, "") + gaia_tests::HELLO;
    let (folder, run) = serving(&graph, &["--workers", "1", "--watch"]);
    let keeper = role(&run, "keeper@k.001").unwrap()["pid"].clone();
    assert_eq!(text(&run, "/k"), "count 1 of 1\n");
    let worker = run.worker().unwrap();
    rustix::process::kill_process(Pid::from_raw(i32::try_from(worker).unwrap()).unwrap(), Signal::KILL).unwrap();
    run.error.line("is back after").unwrap();
    assert_eq!(text(&run, "/k"), "count 2 of 2\n");
    kill(&run, "control", Signal::KILL);
    run.error.line("took over generation 1: 2 branes, 1 workers and 1 keepers, 2 artefacts").unwrap();
    assert_eq!(text(&run, "/k"), "count 3 of 3\n");
    // What the brane is, the new control says in the same word.
    folder.write(&keep("k", 1, "")).unwrap();
    run.error.line("serving generation 2: 1 workers, 1 keepers ready").unwrap();
    assert_eq!(text(&run, "/k"), "count 4 of 4\n");
    assert_eq!(role(&run, "keeper@k.001").unwrap()["pid"], keeper);
    run.output.line(" k.001 RES 200 ").unwrap();
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: bodies that are held whole on their way, or come out as others; back-pressure that stops for good.
#[test]
fn large_bodies_stream_through_worker_and_keeper_both_ways() {
    let (_folder, run) = serving(&keep("k", 1, "body_max = \"200 MiB\", deadline = \"2m\""), &["--workers", "1"]);
    let (pieces, piece) = (1600, (0..=255).cycle().take(64 << 10).collect::<Vec<u8>>());
    let head = format!(
        "POST /k?how=echo HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        pieces << 16
    );
    let mut to = sent(&run, &head);
    let mut from = to.try_clone().unwrap();
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| (0..pieces).for_each(|_| to.write_all(&piece).unwrap()));
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    });
    let text = String::from_utf8_lossy(&answer[..200.min(answer.len())]).into_owned();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("transfer-encoding: chunked"), "{text}");
    // Chunked: what is between the pieces is some bytes for each.
    assert!(answer.len() > pieces << 16 && answer.len() < (pieces << 16) + (4 << 20), "{}", answer.len());
    assert!(answer.ends_with(b"\r\n0\r\n\r\n"), "whole");
    for name in ["worker@", "keeper@k.001"] {
        let status = run.ask("status").unwrap();
        let of = status["roles"].as_array().unwrap().iter().find(|r| r["name"].as_str().unwrap().starts_with(name));
        let memory = std::fs::read_to_string(format!("/proc/{}/status", of.unwrap()["pid"])).unwrap();
        let peak = memory.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap().trim();
        println!("{name} had at most {peak}");
        assert!(peak.split(' ').next().unwrap().parse::<u64>().unwrap() < 64 * 1024, "{name}: {peak}");
    }
    // Beyond its bound, as with other branes: and the instance lives on.
    let large =
        format!("POST /k?how=echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", 201 << 20);
    assert_eq!(http::raw(run.port, large.as_bytes(), ANSWER_WITHIN).unwrap().status, 413);
    assert_eq!(self::text(&run, "/k"), "count 2 of 2\n");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a queue without an end, a request that waits longer than its deadline, a refusal that does not say when to
/// come again.
#[test]
fn the_queue_is_bounded_in_number_and_in_time() {
    let (_folder, run) = serving(&keep("k", 1, "deadline = \"4s\""), &["--workers", "1"]);
    let inside = sent(&run, &get("/k?how=spin"));
    run.until("k", "busy", |n| n == 1).unwrap();
    let began = Instant::now();
    let waiting: Vec<TcpStream> = (0..1024).map(|_| sent(&run, &get("/k"))).collect();
    run.until("k", "waiting", |n| n == 1024).unwrap();
    let refused = run.get("/k").unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "this machine is too slow to tell: {:?}", began.elapsed());
    assert_eq!((refused.status, refused.text().as_str()), (503, "all instances are busy\n"));
    assert!(refused.head.to_ascii_lowercase().contains("\r\nretry-after: "), "{}", refused.head);
    let mut statuses = std::collections::BTreeMap::<String, usize>::new();
    for mut client in waiting {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        *statuses.entry(answer.lines().next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    println!("{statuses:?}");
    assert!(statuses.keys().all(|s| s.contains(" 200 ") || s.contains(" 503 ")), "{statuses:?}");
    drop(inside);
    run.until("k", "waiting", |n| n == 0).unwrap();
    assert!(text(&run, "/k").starts_with("count "));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a request that waits at one keeper while another is free, or one that waits for none.
#[test]
fn a_request_goes_to_a_keeper_that_is_free() {
    let (_folder, run) = serving(&keep("k", 3, "deadline = \"20s\""), &["--workers", "2"]);
    for _ in 0..5 {
        std::thread::scope(|scope| {
            let spins: Vec<_> = (0..2).map(|_| sent(&run, &get("/k?how=burn&n=400000000"))).collect();
            run.until("k", "busy", |n| n == 2).unwrap();
            let began = Instant::now();
            let quick: Vec<_> = (0..4).map(|_| scope.spawn(|| run.get("/k").unwrap().status)).collect();
            assert!(quick.into_iter().all(|client| client.join().unwrap() == 200));
            let took = began.elapsed();
            assert_eq!(run.of("k", "busy").unwrap(), 2, "the others took less than four, {took:?}");
            drop(spins);
        });
        run.until("k", "busy", |n| n == 0).unwrap();
    }
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a header of the runtime's that a client or a guest can write, one that the guest of another brane would see
/// and this one does not, an answer without a body that is told as a broken one.
#[test]
fn a_request_and_its_answer_are_what_they_are_with_other_branes() {
    let files = "[brane.files]\nimage = \"file:./files.wasm\"\nexecution = { lifecycle = \"pinned\" }\n\
                 [brane.files.capability]\n\"fs.tmp\" = { quota = \"1 MiB\" }\n\"clock\" = { resolution = \"ms\" }\n";
    let quota = keep("q", 1, "cpu_quota = 0.2, deadline = \"20s\"");
    let here = "[brane.here]\nimage = \"file:./keep.wasm\"\nlimits = { deadline = \"1s\" }\n";
    let graph = keep("k", 1, "deadline = \"1s\"") + here + &quota + files;
    let (_folder, run) = serving(&graph, &["--workers", "1"]);
    let ask = |method: &str, path: &str, more: &str| {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: appliance\r\nConnection: close\r\n{more}\r\n");
        http::raw(run.port, request.as_bytes(), ANSWER_WITHIN).unwrap()
    };
    let more = "Gaia-Keeper: turn\r\nForwarded: for=1.2.3.4\r\nX-A: 1\r\nX-A: 2\r\n";
    let shown = ["/k", "/here"].map(|brane| ask("GET", &format!("{brane}?how=show"), more).text());
    assert!(
        shown[0].contains("forwarded: for=127.0.0.1;proto=http\n") && shown[0].contains("x-a: 2\n"),
        "{}",
        shown[0]
    );
    let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(sorted(&shown[0]), sorted(&shown[1].replace("gaia-keeper: turn\n", "")));
    let forged = ask("GET", "/k?how=forge", "");
    assert_eq!(forged.status, 200);
    assert!(!forged.head.to_ascii_lowercase().contains("gaia-keeper"), "{}", forged.head);
    // A head alone; the body that the guest writes goes nowhere, and it comes to its end.
    let bytes =
        http::exchange(run.port, b"HEAD /k HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", ANSWER_WITHIN).unwrap();
    let head = String::from_utf8(bytes).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200 ok\r\n") && head.contains("content-length: 13\r\n"), "{head}");
    assert_eq!(text(&run, "/k"), "count 4 of 4\n");
    // An answer that is never finished is cut off, and the instance lives on: nothing of it runs any more.
    let began = Instant::now();
    let open = http::raw(run.port, get("/k?how=open").as_bytes(), ANSWER_WITHIN);
    assert!(open.is_err() && began.elapsed() > Duration::from_millis(900), "{open:?}");
    run.output.line("k.001 KILL deadline of 1s: its answer is cut off").unwrap();
    assert_eq!(text(&run, "/k"), "count 6 of 6\n");
    // Its files are emptied after each request, if that is how long they are to live.
    for _ in 0..3 {
        assert_eq!(text(&run, "/files"), "all good\n");
    }
    assert!(run.get("/q?how=burn&n=500000000").unwrap().status == 200);
    assert!(run.of("q", "throttled_ns").unwrap() > 100_000_000);
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a keeper with another's user or a privilege, on a core of the house, outside the workers' cgroup or outside its
/// sandbox; one that the appliance does not start again.
#[test]
fn on_the_appliance_a_keeper_has_a_user_of_its_own_on_a_worker_core() {
    let graph = keep("counter", 1, "") + &keep("second", 1, "") + gaia_tests::HELLO;
    let appliance = Appliance::boot(&Setup::default().graph(graph).cpus(3)).unwrap();
    let count = || appliance.get("/counter").unwrap().text();
    for (keeper, user, core) in [("keeper@counter.001", "10000", "1"), ("keeper@second.001", "10001", "2")] {
        let pid = appliance.pid(keeper).unwrap();
        let status = appliance.read(&format!("/proc/{pid}/status")).unwrap();
        let field = |text: &str, name: &str| {
            text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).unwrap().trim().to_owned()
        };
        assert_eq!(field(&status, "Uid"), [user; 4].join("\t"), "{keeper}");
        assert_eq!((field(&status, "CapBnd").as_str(), field(&status, "Seccomp").as_str()), ("0000000000000000", "2"));
        let mut threads: Vec<(String, String)> = Vec::new();
        for thread in appliance.list(&format!("/proc/{pid}/task")).unwrap() {
            let name = appliance.read(&format!("/proc/{pid}/task/{thread}/comm")).unwrap();
            let status = appliance.read(&format!("/proc/{pid}/task/{thread}/status")).unwrap();
            threads.push((name.trim().to_owned(), field(&status, "Cpus_allowed_list")));
        }
        threads.sort();
        assert_eq!(threads, [("gaia".into(), core.into()), ("tick".into(), "0".into())], "{keeper}");
        let group = appliance.read(&format!("/proc/{pid}/cgroup")).unwrap();
        assert!(group.trim().ends_with(&format!("/workers/core-{core}")), "{group}");
    }
    let sandboxes = appliance.ask("GET /v1/status").unwrap()["roles"].as_array().unwrap().clone();
    assert!(
        sandboxes
            .iter()
            .filter(|r| r["name"].as_str().unwrap().starts_with("keeper@"))
            .all(|r| r["sandbox"] == "whole")
    );
    assert_eq!(
        (count(), count(), count()),
        ("count 1 of 1\n".into(), "count 2 of 2\n".into(), "count 3 of 3\n".into())
    );
    let pid = appliance.pid("keeper@counter.001").unwrap();
    appliance.kill(pid, Signal::KILL.as_raw()).unwrap();
    appliance.line("is back after", ANSWER_WITHIN).unwrap();
    assert_ne!(appliance.pid("keeper@counter.001").unwrap(), pid);
    assert!(count().starts_with("count 1 of 1\n"));
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
}
