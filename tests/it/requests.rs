//! What a client is answered.

use gaia_tests::{ANSWER_WITHIN, Appliance, Setup, http};

const GRAPH: &str = r#"
[brane.hello]
image = "file:./hello.wasm"
limits = { body_max = "10 kB" }

[brane.burn]
image = "file:./burn.wasm"
replicas = 2
limits = { deadline = "500ms" }

[brane.touch]
image = "file:./touch.wasm"
limits = { mem_max = "16 MiB" }

[brane.grow]
image = "file:./grow.wasm"
limits = { mem_max = "24 MiB" }

[brane.counter]
image = "file:./counter.wasm"
replicas = 4
[brane.counter.ingress]
host = "counter.example.org"
path = "/"

[brane.chatty]
image = "file:./chatty.wasm"

[brane.faulty]
image = "file:./faulty.wasm"
replicas = 4
limits = { deadline = "2s", body_max = "100 kB" }
"#;

/// Would miss: an answer of the wrong kind, a limit that does not bind, an instance that serves two requests, or a brane
/// whose failure another one feels.
#[test]
fn each_request_is_answered_as_the_contract_says() {
    let appliance = Appliance::boot(&Setup::default().graph(GRAPH)).unwrap();
    let port = appliance.port().unwrap();
    let status = |path: &str| appliance.get(path).unwrap().status;
    let raw = |request: &str| http::raw(port, request.as_bytes(), ANSWER_WITHIN).unwrap();
    let hello_is_well = || assert_eq!(appliance.get("/hello").unwrap().text(), "hello\n");

    // Routes: on segment boundaries, and by host.
    assert_eq!(status("/hello"), 200);
    assert_eq!(status("/hello/there"), 200);
    assert_eq!(status("/helloo"), 404);
    assert_eq!(status("/"), 404);
    let counted = || raw("GET / HTTP/1.1\r\nHost: Counter.Example.ORG:8080\r\nConnection: close\r\n\r\n");
    for _ in 0..3 {
        assert_eq!(counted().text(), "count 1\n", "a fresh instance for each request");
    }

    // What HTTP demands, and what is not there.
    assert_eq!(raw("GET /hello HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n").status, 400, "two hosts");
    assert_eq!(raw("GET /hello HTTP/1.1\r\nHost: me@a\r\nConnection: close\r\n\r\n").status, 400, "a user");
    assert_eq!(raw("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\n\r\n").status, 501);
    assert_eq!(raw("GET /hello HTTP/1.1\r\nConnection: close\r\n\r\n").status, 400, "no Host");
    assert_eq!(raw("GET /hello HTTP/1.0\r\n\r\n").status, 200, "needs none");
    let upgrade = "GET /hello HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n";
    assert_eq!(raw(upgrade).status, 501);
    let long = format!("GET /hello HTTP/1.1\r\nHost: a\r\nX: {}\r\nConnection: close\r\n\r\n", "x".repeat(100_000));
    assert_eq!(raw(&long).status, 431);

    // Two requests on one connection, sent at once.
    let both = "GET /hello HTTP/1.1\r\nHost: a\r\n\r\nGET /nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let both = String::from_utf8(http::exchange(port, both.as_bytes(), ANSWER_WITHIN).unwrap()).unwrap();
    assert!(both.starts_with("HTTP/1.1 200") && both.contains("HTTP/1.1 404"), "{both}");

    // Bodies: announced, and not.
    let big = format!(
        "POST /hello HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\nConnection: close\r\n\r\n{}",
        "x".repeat(20_000)
    );
    assert_eq!(raw(&big).status, 413);
    let fits = format!(
        "POST /hello HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\nConnection: close\r\n\r\n{}",
        "x".repeat(9_000)
    );
    assert_eq!(raw(&fits).status, 200);

    // Limits.
    let late = std::time::Instant::now();
    assert_eq!(status("/burn?n=100000000000"), 504);
    assert!(late.elapsed().as_millis() < 5_000, "the deadline is half a second, it took {:?}", late.elapsed());
    hello_is_well();
    let trapped = appliance.get("/touch").unwrap();
    assert_eq!(trapped.status, 500);
    assert!(trapped.text().starts_with("the brane trapped: touch."), "{}", trapped.text());
    hello_is_well();
    let grown = appliance.get("/grow?mib=100").unwrap().text();
    assert!(grown.starts_with("got 2") && grown.ends_with("of 100 MiB\n"), "{grown}");

    // Output is taken and counted, and nobody waits for it.
    assert_eq!(appliance.get("/chatty?lines=1000").unwrap().text(), "stdout 1000 stderr 1\n");
    let ps = appliance.ask("GET /v1/ps").unwrap();
    let brane = |name: &str| ps["branes"].as_array().unwrap().iter().find(|b| b["name"] == name).unwrap().clone();
    assert_eq!((&brane("touch")["traps"], &brane("burn")["late"]), (&1.into(), &1.into()));
    assert_eq!(brane("counter")["requests"], 3);
    let written = appliance.ask("GET /v1/status").unwrap()["workers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w["output_bytes"].as_u64().unwrap())
        .sum::<u64>();
    assert!(written > 1000, "{written} bytes of output");

    // More at once than there are instances: they wait their turn, and those whose turn cannot come are told so. On a machine so
    // slow that they come one after the other, each may still get the place of one whose deadline was before its own.
    let at_once = || -> Vec<u16> {
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..12).map(|_| scope.spawn(|| status("/burn?n=100000000000"))).collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        })
    };
    let mut answers = Vec::new();
    for _ in 0..10 {
        answers = at_once();
        assert!(answers.contains(&504) && answers.iter().all(|s| [503, 504].contains(s)), "{answers:?}");
        if answers.contains(&503) {
            break;
        }
    }
    assert!(answers.contains(&503), "a missed deadline and no full queue: {answers:?}");
    hello_is_well();
    // The trap's cause is in the log, under the name that the client was told.
    let name = trapped.text().rsplit(' ').next().unwrap().trim().to_owned();
    appliance.machine().console().send_line("logs --brane touch").unwrap();
    appliance.line(&format!("{name} TRAP wasm trap"), ANSWER_WITHIN).unwrap();
    appliance.line(&format!("{name} RES 500 "), ANSWER_WITHIN).unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: a guest's fault that looks like a good answer, that is held against the wrong one, or that leaves something
/// behind.
#[test]
fn what_a_guest_does_wrong_is_told_and_leaves_nothing_behind() {
    let appliance = Appliance::boot(&Setup::default().graph(GRAPH)).unwrap();
    let port = appliance.port().unwrap();
    let faulty = |how: &str| appliance.get(&format!("/faulty?how={how}"));
    for (how, status) in [("trap", 500), ("none", 502), ("error", 502), ("exit", 502), ("status", 502), ("", 400)] {
        let answer = faulty(how).unwrap();
        assert_eq!(answer.status, status, "{how}: {}", answer.text());
        assert!(!answer.text().contains("secret"), "the guest's words are not the client's: {}", answer.text());
    }

    // A head is out, the rest does not come: the client must not take the part for the whole.
    for how in ["half", "stream"] {
        let broken = faulty(how).unwrap_err();
        println!("{how}: {broken}");
    }
    // Bodies without a length: what fits is read whole, what does not is 413, whatever the guest makes of it.
    let chunked = |bytes: usize| {
        let head =
            "POST /faulty?how=read HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
        let chunk = format!("3e8\r\n{}\r\n", "x".repeat(1000));
        http::raw(port, format!("{head}{}0\r\n\r\n", chunk.repeat(bytes / 1000)).as_bytes(), ANSWER_WITHIN).unwrap()
    };
    assert_eq!(chunked(90_000).text(), "90000 bytes\n");
    assert_eq!(chunked(200_000).status, 413);
    let unread = "POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
    let unread = format!("{unread}{}0\r\n\r\n", format!("3e8\r\n{}\r\n", "x".repeat(1000)).repeat(100));
    assert_eq!(http::raw(port, unread.as_bytes(), ANSWER_WITHIN).unwrap().status, 404);

    // Clients that ask and do not read: the guest ends at its deadline, and its slot is free again.
    let silent: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            std::io::Write::write_all(&mut stream, b"GET /faulty?how=stream HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            stream
        })
        .collect();
    let brane = |a: &Appliance| {
        let ps = a.ask("GET /v1/ps")?;
        Ok(ps["branes"].as_array().unwrap().iter().find(|b| b["name"] == "faulty").unwrap().clone())
    };
    let after = 6 + 2 + 2 + silent.len() as u64;
    appliance.until(ANSWER_WITHIN, brane, |b| b["requests"].as_u64() >= Some(after)).unwrap();
    appliance.until(ANSWER_WITHIN, brane, |b| b["busy"] == 0 && b["waiting"] == 0).unwrap();
    drop(silent);
    assert_eq!(faulty("").unwrap().status, 400);
    let ps = brane(&appliance).unwrap();
    assert_eq!(ps["traps"], 2, "one before the head, one in the middle of an answer: {ps}");
    appliance
        .until(
            ANSWER_WITHIN,
            |a| a.ask("GET /v1/status"),
            |s| s["workers"].as_array().unwrap().iter().all(|w| w["inside"] == 0),
        )
        .unwrap();
    appliance.power_off().unwrap();
}
