//! Strangers, crowds and nonsense on the control port.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gaia_tests::{ANSWER_WITHIN, Appliance, http, soak};

use crate::remote::{FROM, Person, Tls, operated_by};

/// Would miss: a handshake, a request or a crowd that control takes and should not, or that it cannot bear; and branes that are
/// slower while it goes on.
#[test]
fn what_is_wrong_is_refused_in_bounds_and_the_branes_do_not_notice() {
    let ann = Person::new();
    let (appliance, key) = operated_by(&ann);
    let port = appliance.control_port().unwrap();
    ann.does(port, &["trust", &key.to_string()]);
    ann.does(port, &["status"]);
    let quiet = median(&appliance, 100, &AtomicBool::new(false));

    // No handshake.
    let refused = |what: &str| {
        let line = appliance.line("control: refused ", ANSWER_WITHIN).unwrap();
        println!("{what}: {line}");
        assert!(line.contains(FROM), "{what}: {line}");
    };
    let answer = http::exchange(port, b"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n", ANSWER_WITHIN).unwrap_or_default();
    assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
    refused("plain HTTP");
    http::exchange(port, &[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc], ANSWER_WITHIN).unwrap_or_default();
    refused("the beginning of a long hello");
    for (what, versions) in [("TLS 1.2", &rustls::version::TLS12), ("without a key", &rustls::version::TLS13)] {
        let error = Tls::try_to(port, None, versions).err().unwrap_or_else(|| panic!("{what}"));
        println!("{what}: {error}");
        refused(what);
    }
    let recorded = recorded(port, &ann);
    assert!(recorded.len() > 300, "{}", recorded.len());
    let answer = http::exchange(port, &recorded, ANSWER_WITHIN).unwrap_or_default();
    assert!(!answer.windows(4).any(|w| w == b"HTTP"), "what was recorded is answered");
    refused("recorded");
    let began = Instant::now();
    http::exchange(port, b"", ANSWER_WITHIN).unwrap_or_default();
    assert!((3..12).contains(&began.elapsed().as_secs()), "silence lasted {:?}", began.elapsed());
    refused("silence");

    // An operator whose requests are wrong.
    let request = |text: &str| Tls::to(port, Some(ann.shown())).answer(text);
    let long = "x".repeat(40_000);
    let body = format!("POST /v1/poweroff HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n{long}");
    assert!(request(&body).contains(" 413 "), "a body that nobody asked for");
    let head = format!("GET /v1/status HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n");
    assert!(request(&head).contains(" 431 "), "a head without an end");
    refused("a long head");
    assert!(request("nonsense\r\n\r\n").contains(" 400 "));
    refused("nonsense");
    let began = Instant::now();
    assert_eq!(request("GET /v1/sta"), "", "half a head is answered");
    assert!((8..25).contains(&began.elapsed().as_secs()), "half a head lasted {:?}", began.elapsed());
    let mut tls = Tls::to(port, Some(ann.shown()));
    let many = "GET /v1/nothing HTTP/1.1\r\nHost: a\r\n\r\n".repeat(300);
    let answers = tls.answer(&many);
    let (found, refusals) = (answers.matches("404 Not Found").count(), answers.matches(" 429 ").count());
    assert!((50..300).contains(&found) && refusals == 1, "{found} answers, {refusals} refusals");

    // A crowd that says nothing.
    let crowd: usize = if soak() { 10_000 } else { 500 };
    let control = appliance.pid("control").unwrap();
    let memory = || resident(&appliance, control);
    let (before, restarts) = (memory(), appliance.role("control", "restarts").unwrap());
    let (over, mut most) = (AtomicBool::new(false), before);
    let crowded = std::thread::scope(|scope| {
        let measured = scope.spawn(|| median(&appliance, usize::MAX, &over));
        let mut silent = VecDeque::new();
        for n in 0..crowd {
            if let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                silent.push_back(stream);
            }
            // This machine and QEMU have a descriptor for each.
            if silent.len() > 300 {
                silent.pop_front();
            }
            if n % 100 == 99 {
                most = most.max(memory());
            }
            std::thread::sleep(Duration::from_millis(4));
        }
        over.store(true, Relaxed);
        measured.join().unwrap()
    });
    println!("/hello: {quiet:?} alone, {crowded:?} beside {crowd}; control: {before} KiB before, {most} at most");
    assert!(crowded < quiet * 4 + Duration::from_millis(20), "{quiet:?} became {crowded:?}");
    assert!(most < before + 4096, "{before} KiB became {most}");
    appliance.until(Duration::from_mins(1), |_| Ok(ann.on(port, &["status"])), |o| o.status.success()).unwrap();
    assert_eq!(appliance.role("control", "restarts").unwrap(), restarts);
    appliance.serves_hello().unwrap();
    appliance.line(" more in 10 s", ANSWER_WITHIN).unwrap();
    let shown = appliance.power_off().unwrap();
    let lines = shown.matches("control: refused ").count();
    println!("{lines} lines about refusals");
    assert!(lines < 60 + crowd / 100, "{lines} lines\n{shown}");
}

/// The median time of an answer of `hello`, of so many or until it is over.
fn median(appliance: &Appliance, most: usize, over: &AtomicBool) -> Duration {
    let mut all = Vec::new();
    while all.len() < most && !over.load(Relaxed) {
        let began = Instant::now();
        assert_eq!(appliance.get("/hello").unwrap().status, 200);
        all.push(began.elapsed());
        // Control keeps a KiB of log for each: with fewer of them, what it holds tells what the connections cost.
        std::thread::sleep(Duration::from_millis(30));
    }
    all.sort_unstable();
    all[all.len() / 2]
}

/// What a process holds of the machine's memory, in KiB.
fn resident(appliance: &Appliance, pid: i64) -> u64 {
    let status = appliance.read(&format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What `gaia` sends to ask for the status, from its first byte.
fn recorded(port: u16, ann: &Person) -> Vec<u8> {
    let between = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let own = between.local_addr().unwrap().port();
    let key = std::fs::read_to_string(ann.file("known_hosts")).unwrap();
    ann.does(own, &["trust", key.split_whitespace().nth(1).unwrap()]);
    std::thread::scope(|scope| {
        let recording = scope.spawn(move || {
            let (mut client, _) = between.accept().unwrap();
            let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            let (mut back, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let answers = std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
            let (mut all, mut some) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = client.read(&mut some) {
                all.extend_from_slice(&some[..n]);
                server.write_all(&some[..n]).unwrap();
            }
            let _ = server.shutdown(std::net::Shutdown::Both);
            answers.join().unwrap();
            all
        });
        ann.does(own, &["status"]);
        recording.join().unwrap()
    })
}
