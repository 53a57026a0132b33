//! How long an instance lives, and when it is made. These need no virtual machine.

use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use gaia_tests::workstation::{Folder, Run};

const GRAPH: &str = r#"
[brane.pool]
image = "file:./counter.wasm"
replicas = 4

[brane.fresh]
image = "file:./counter.wasm"
replicas = 4
execution = { lifecycle = "ephemeral" }

[brane.burn]
image = "file:./burn.wasm"
replicas = 4
"#;

/// The lines of what ended, of one brane.
fn ends(run: &Run, brane: &str, number: usize) -> Vec<String> {
    let of_brane = |lines: &[String]| {
        let mine = format!(" {brane}.");
        lines.iter().filter(|l| l.contains(&mine) && l.contains(" END cold=")).cloned().collect::<Vec<_>>()
    };
    run.output.until(Duration::from_secs(30), |lines| of_brane(lines).len() >= number).unwrap();
    of_brane(&run.output.all())
}

/// Would miss: an instance that serves twice, a pool that is empty after its first requests, `pooled✓` where nothing was
/// ready, an ephemeral brane that keeps instances.
#[test]
fn pooled_instances_are_ready_before_their_request_and_ephemeral_ones_are_not() {
    let run = Folder::with(GRAPH).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    run.until("pool", "ready", |n| n == 4).unwrap();
    assert_eq!(run.of("fresh", "ready").unwrap(), 0);
    for _ in 0..10 {
        for brane in ["pool", "fresh"] {
            assert_eq!(run.get(&format!("/{brane}")).unwrap().text(), "count 1\n");
            if brane == "pool" {
                run.until("pool", "ready", |n| n == 4).unwrap();
            }
        }
    }
    let ends = ["pool", "fresh"].map(|brane| ends(&run, brane, 10));
    assert!(ends[0].iter().all(|line| line.ends_with(" pooled✓")), "{:#?}", ends[0]);
    assert!(!ends[1].iter().any(|line| line.contains("pooled✓")), "{:#?}", ends[1]);
    // Each of the first ten has a number of its own.
    let numbers: std::collections::BTreeSet<_> = ends[0].iter().map(|l| l.split_whitespace().nth(2)).collect();
    assert_eq!(numbers.len(), 10);
    assert_eq!(run.of("fresh", "ready").unwrap(), 0);
}

/// Would miss: more instances at a time than the pool has room for, which fails instead of waiting; a ready instance that is
/// lost when all are asked for at once.
#[test]
fn with_all_slots_taken_none_is_ready_and_afterwards_all_are_again() {
    let run = Folder::with(GRAPH).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    for round in 0..3 {
        run.until("burn", "ready", |n| n == 4).unwrap();
        let statuses = std::thread::scope(|scope| {
            let get = || run.get("/burn?n=5000000").unwrap().status;
            let clients: Vec<_> = (0..24).map(|_| scope.spawn(get)).collect();
            let all: Vec<u16> = clients.into_iter().map(|client| client.join().unwrap()).collect();
            all
        });
        assert!(statuses.iter().all(|status| *status == 200), "round {round}: {statuses:?}");
        run.until("burn", "ready", |n| n == 4).unwrap();
        assert_eq!((run.of("burn", "busy").unwrap(), run.of("burn", "waiting").unwrap()), (0, 0));
    }
    // Of each round, the first four had been ready.
    let ends = ends(&run, "burn", 72);
    assert!(ends.iter().filter(|line| line.ends_with(" pooled✓")).count() >= 12, "{ends:#?}");
    assert!(run.error.all().iter().chain(&run.output.all()).all(|line| !line.contains(" FAULT ")));
}

/// Would miss: instances whose clients have gone, in whose place none is made before the whole brane is idle, so that clients
/// with little patience leave a brane without any that is ready.
#[test]
fn in_the_place_of_instances_whose_clients_are_gone_others_are_ready() {
    let run = Folder::with(GRAPH).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    for round in 0..3 {
        run.until("burn", "ready", |n| n == 4).unwrap();
        let clients = [(); 4].map(|()| {
            let mut client = TcpStream::connect(("127.0.0.1", run.port)).unwrap();
            client.write_all(b"GET /burn?n=4000000000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            client
        });
        run.until("burn", "busy", |n| n == 4).unwrap();
        assert_eq!(run.of("burn", "ready").unwrap(), 0);
        let began = Instant::now();
        for client in clients {
            client.shutdown(Shutdown::Both).unwrap();
        }
        run.until("burn", "ready", |n| n == 4).unwrap();
        // A brane is idle after ten.
        assert!(began.elapsed() < Duration::from_secs(5), "round {round}: {:?}", began.elapsed());
        assert_eq!(run.of("burn", "busy").unwrap(), 0);
    }
}

/// Would miss: a page of an instance's memory that the next one, through the whole worker, still finds as it was.
#[test]
fn a_fresh_instance_finds_nothing_of_what_others_wrote() {
    const GRAPH: &str = r#"
[brane.pool]
image = "file:./secret.wasm"
replicas = 2
limits = { mem_max = "16 MiB" }

[brane.fresh]
image = "file:./secret.wasm"
replicas = 1
limits = { mem_max = "16 MiB" }
execution = { lifecycle = "ephemeral" }
"#;
    let run = Folder::with(GRAPH).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let number = |text: &str, before: &str| -> u64 {
        let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("{text}"));
        rest.split([',', '\n']).next().unwrap().parse().unwrap()
    };
    for brane in ["pool", "fresh"] {
        let ask = |what| run.get(&format!("/{brane}?do={what}")).unwrap().text();
        let both = ask("both");
        let (wrote, found) = (number(&both, "wrote "), number(&both, "found "));
        // Nearly all of what it may have, and its stack.
        assert!(wrote > (12 << 20) / 8 && found >= wrote, "{both}");
        for round in 0..150 {
            assert!(number(&ask("write"), "wrote ") > (12 << 20) / 8);
            assert_eq!(ask("look"), "found 0\n", "{brane}, round {round}");
        }
    }
}
