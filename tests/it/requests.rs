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

    // More at once than there are instances: they wait their turn, and those whose turn cannot come are told so.
    let answers: Vec<u16> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..12).map(|_| scope.spawn(|| status("/burn?n=100000000000"))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|s| [503, 504].contains(s)) && answers.contains(&504), "{answers:?}");
    hello_is_well();
    let transcript = appliance.power_off().unwrap();
    assert!(
        transcript.contains("touch.") && transcript.contains("trap:"),
        "the trap's id is in the log:\n{transcript}"
    );
}
