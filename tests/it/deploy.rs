//! Deploys: what is lost by them, and what is left when something fails in the middle.
//!
//! `gaia run --data` serves; `version` answers with the number that its manifest gives it, over and over, so each answer tells which
//! graph it is from, and one that mixed two would show it.

use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use bytes::Bytes;
use gaia_tests::workstation::{Folder, Run, kib};
use gaia_tests::{ANSWER_WITHIN, out, soak};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// Where `gaia run` keeps its store, below the folder of the manifest.
const DATA: [&str; 2] = ["--data", "data"];
/// Bytes of an answer of `version`: 64 pieces of as many whole lines as 1 KiB has room for.
const BODY: usize = 64 * 1024;
/// One line of it.
const LINE: usize = 8;

/// `version` with this number, from this file, and what else the manifest has.
fn versioned(number: u64, image: &str, more: &str) -> String {
    format!(
        "[brane.version]\nimage = \"{image}\"\nreplicas = 16\nlimits = {{ deadline = \"20s\" }}\n\
         [brane.version.capability]\n\"env\" = {{ vars = {{ VERSION = \"v{number:06}\" }} }}\n{more}"
    )
}

fn guest(name: &str) -> Vec<u8> {
    std::fs::read(out(&format!("branes/{name}.wasm"))).unwrap()
}

/// The same component with another digest: a custom section is behind it (WebAssembly, section 5.5.3).
fn distinct(component: &[u8], by: u64) -> Vec<u8> {
    [component, &[0, 13, 3], b"tag", format!("{by:09}").as_bytes()].concat()
}

/// The version that a body tells.
fn version_of(body: &[u8]) -> Result<u64, String> {
    let Some(first) = body.get(..LINE).filter(|_| body.len() == BODY) else {
        return Err(format!(
            "a body of {} bytes: {:?}",
            body.len(),
            String::from_utf8_lossy(&body[..body.len().min(80)])
        ));
    };
    if let Some(other) = body.chunks(LINE).find(|line| *line != first) {
        let [first, other] = [first, other].map(String::from_utf8_lossy);
        return Err(format!("an answer that mixes {first:?} and {other:?}"));
    }
    let number = std::str::from_utf8(first).ok().and_then(|line| line.trim().strip_prefix('v')?.parse().ok());
    number.ok_or_else(|| format!("no version: {:?}", String::from_utf8_lossy(first)))
}

/// What the clients hold answers against.
#[derive(Default)]
struct Ledger {
    /// The newest version whose deploy has begun, and that whose deploy has answered.
    begun: AtomicU64,
    done: AtomicU64,
    answers: AtomicU64,
    /// Requests over HTTP/2 of which the server has said that it did not begin them (RFC 9113, section 6.8), to be asked again.
    refused: AtomicU64,
    stop: AtomicBool,
    /// Requests without a whole answer.
    failed: Mutex<Vec<String>>,
    /// Answers that must not be.
    wrong: Mutex<Vec<String>>,
}

impl Ledger {
    fn goes_on(&self) -> bool {
        !self.stop.load(Relaxed)
    }

    fn done(&self) -> u64 {
        self.done.load(SeqCst)
    }

    fn failed(&self, words: String) {
        self.failed.lock().unwrap().push(words);
        // Not again and again without an end.
        std::thread::sleep(Duration::from_millis(20));
    }

    fn wrong(&self, words: String) {
        self.wrong.lock().unwrap().push(words);
    }

    fn failures(&self) -> Vec<String> {
        self.failed.lock().unwrap().clone()
    }

    fn faults(&self) -> Vec<String> {
        self.wrong.lock().unwrap().clone()
    }
}

/// One connection, as a client sees it that knows when deploys have answered.
struct Seen<'a> {
    ledger: &'a Ledger,
    way: &'static str,
    /// The newest version that had been deployed when it was opened.
    opened: u64,
    /// Answers of a version that had been replaced before they were asked for.
    stale: u32,
}

impl<'a> Seen<'a> {
    /// Before the connection is made.
    fn now(ledger: &'a Ledger, way: &'static str) -> Self {
        Self { ledger, way, opened: ledger.done(), stale: 0 }
    }

    /// Holds an answer, asked for when `floor` was deployed, against what may be.
    fn answered(&mut self, floor: u64, body: &[u8]) {
        let way = self.way;
        let version = match version_of(body) {
            Ok(version) => version,
            Err(words) => return self.ledger.wrong(format!("{way}: {words}")),
        };
        self.ledger.answers.fetch_add(1, Relaxed);
        if version < self.opened {
            self.ledger
                .wrong(format!("{way}: {version} on a connection that was opened after {} had answered", self.opened));
        }
        if version > self.ledger.begun.load(SeqCst) {
            self.ledger.wrong(format!("{way}: {version} has not even begun"));
        }
        if version < floor {
            self.stale += 1;
            if self.stale > 1 {
                self.ledger.wrong(format!("{way}: {version} once more, after {floor} had answered"));
            }
        }
    }
}

/// Reads one answer from a connection that may go on; also says whether it does.
fn read_answer(stream: &mut BufReader<TcpStream>) -> io::Result<(u16, Vec<u8>, bool)> {
    let broken = |what: &str| io::Error::other(what.to_owned());
    let mut line = || -> io::Result<String> {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_ascii_lowercase())
    };
    let status = line()?.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| broken("no status"))?;
    let (mut length, mut goes_on) = (None, true);
    loop {
        let field = line()?;
        match field.split_once(':') {
            None => break,
            Some(("content-length", value)) => length = value.trim().parse::<usize>().ok(),
            Some(("connection", value)) => goes_on = value.trim() != "close",
            Some(_) => {}
        }
    }
    let mut body = Vec::new();
    if let Some(length) = length {
        body.resize(length, 0);
        stream.read_exact(&mut body)?;
        return Ok((status, body, goes_on));
    }
    loop {
        let mut size = String::new();
        stream.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim(), 16).map_err(|_| broken("an answer that breaks off"))?;
        let at = body.len();
        body.resize(at + size + 2, 0);
        stream.read_exact(&mut body[at..])?;
        body.truncate(at + size);
        if size == 0 {
            return Ok((status, body, goes_on));
        }
    }
}

fn connected(port: u16) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// Asks over HTTP/1.1 until told to stop; `pause` between the requests of one connection.
fn ask_over_1(port: u16, ledger: &Ledger, keep: bool, pause: Duration) {
    let way = if keep { "HTTP/1.1, kept" } else { "HTTP/1.1, closed" };
    let connection = if keep { "" } else { "Connection: close\r\n" };
    while ledger.goes_on() {
        let mut seen = Seen::now(ledger, way);
        let mut stream = match connected(port) {
            Ok(stream) => stream,
            Err(e) => {
                ledger.failed(format!("{way}: connecting: {e}"));
                continue;
            }
        };
        let mut requests = 0;
        while ledger.goes_on() {
            let floor = ledger.done();
            let request = format!("GET /version HTTP/1.1\r\nHost: a\r\n{connection}\r\n");
            let answer = stream.get_mut().write_all(request.as_bytes()).and_then(|()| read_answer(&mut stream));
            match answer {
                Err(e) => {
                    ledger.failed(format!("{way}: request {requests} of a connection: {e}"));
                    break;
                }
                Ok((200, body, goes_on)) => {
                    seen.answered(floor, &body);
                    if !goes_on {
                        break;
                    }
                }
                Ok((status, body, _)) => {
                    ledger.failed(format!("{way}: {status}: {}", String::from_utf8_lossy(&body)));
                }
            }
            requests += 1;
            std::thread::sleep(pause);
        }
    }
}

/// Asks over HTTP/2 until told to stop. What was not sent because the connection had said that it ends, is no request; what
/// crossed that on its way is one that the server refuses, and any client asks again: it is counted.
fn ask_over_2(port: u16, ledger: &Ledger) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let way = "HTTP/2";
    let one = async || -> Result<(), String> {
        let mut seen = Seen::now(ledger, way);
        let stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.map_err(|e| e.to_string())?;
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 20);
        let handshake = builder.handshake::<_, Bytes>(stream).await;
        let (requests, connection) = handshake.map_err(|e| format!("handshake: {e}"))?;
        let over = tokio::spawn(connection);
        let mut count = 0;
        while ledger.goes_on() {
            let floor = ledger.done();
            let leaves = |e: &h2::Error| e.is_go_away() && e.reason() == Some(h2::Reason::NO_ERROR);
            let request = http::Request::get("http://a/version").body(()).unwrap();
            let sent = match requests.clone().ready().await {
                Ok(mut requests) => requests.send_request(request, true),
                Err(e) => Err(e),
            };
            let answer = match sent {
                Ok((answer, _)) => answer,
                Err(e) if leaves(&e) => break,
                Err(e) => return Err(format!("asking for stream {count}: {e:?}")),
            };
            let broken = |e: h2::Error| format!("stream {count}: {e:?}");
            let cut = |e: h2::Error| format!("stream {count}, in the middle of its answer: {e:?}");
            let answer = match tokio::time::timeout(ANSWER_WITHIN, answer).await.map_err(|e| e.to_string())? {
                Err(e) if leaves(&e) => {
                    ledger.refused.fetch_add(1, Relaxed);
                    break;
                }
                other => other.map_err(broken)?,
            };
            let (head, mut body) = answer.into_parts();
            let mut all = Vec::new();
            while let Some(piece) = body.data().await {
                let piece = piece.map_err(cut)?;
                body.flow_control().release_capacity(piece.len()).map_err(cut)?;
                all.extend_from_slice(&piece);
            }
            if head.status == 200 {
                seen.answered(floor, &all);
            } else {
                return Err(format!("{}: {}", head.status, String::from_utf8_lossy(&all)));
            }
            count += 1;
        }
        drop(requests);
        let _ = tokio::time::timeout(ANSWER_WITHIN, over).await.map_err(|_| "it does not end".to_owned())?;
        Ok(())
    };
    runtime.block_on(async {
        while ledger.goes_on() {
            if let Err(words) = one().await {
                ledger.failed(format!("{way}: {words}"));
            }
        }
    });
}

/// `wrk`, which reports when it is interrupted, and does not outlive a test that fails.
struct Wrk(Option<std::process::Child>);

impl Drop for Wrk {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Wrk {
    fn start(port: u16, arguments: &[&str]) -> Self {
        let url = format!("http://127.0.0.1:{port}/version?kib=4");
        let mut command = Command::new("wrk");
        command.args(["-t1", "-d36000s", "--timeout", "30s"]).args(arguments).arg(url);
        Self(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }

    /// How many requests there were, and what it counts as failed.
    fn end(mut self) -> (u64, Vec<String>) {
        let child = self.0.take().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, Signal::INT).unwrap();
        let said = String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned();
        let requests = said.lines().find_map(|l| l.trim().split_once(" requests in ")?.0.parse().ok());
        let failed = |line: &&str| line.contains("Socket errors") || line.contains("Non-2xx");
        let failed = said.lines().filter(failed).map(str::to_owned).collect();
        assert!(requests.is_some(), "no report of wrk: {said}");
        (requests.unwrap(), failed)
    }
}

/// Ends whatever asks when a test is over, also if it fails.
struct Stop<'a>(&'a Ledger);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Relaxed);
    }
}

/// What a failure in JSON says.
fn why(error: &str) -> String {
    let failure: Value = serde_json::from_str(error).map_err(|e| format!("{e}: {error}")).unwrap();
    failure["error"].as_str().unwrap().to_owned()
}

/// Deploys a manifest that lies in the folder. What it came to, or what it said.
fn deploy(run: &Run, file: &str) -> Result<Value, String> {
    let (status, output, error) = run.gaia(&["--json", "deploy", file, "--yes"]).unwrap();
    if !status.success() {
        assert_eq!(output, "", "{error}");
        return Err(why(&error));
    }
    Ok(serde_json::from_str(&output).unwrap())
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + 2 * ANSWER_WITHIN;
    loop {
        if let Some(there) = ask() {
            return there;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn roles(run: &Run) -> Vec<(String, i64)> {
    let Ok(status) = run.ask("status") else { return Vec::new() };
    let roles = status["roles"].as_array().unwrap().iter().filter(|role| role["pid"] != 0);
    roles.map(|role| (role["name"].as_str().unwrap().to_owned(), role["pid"].as_i64().unwrap())).collect()
}

fn role(run: &Run, name: &str) -> i64 {
    until(name, || roles(run).into_iter().find(|(role, _)| role == name).map(|(_, pid)| pid))
}

fn kill(pid: i64) -> bool {
    rustix::process::kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).is_ok()
}

/// The history, and the entry that is current.
fn current(run: &Run) -> Option<Value> {
    let graphs = run.ask("graphs").ok()?;
    graphs["graphs"].as_array()?.iter().find(|graph| graph["current"] == true).cloned()
}

/// What a process has open and holds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Holds {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    rss_kib: u64,
}

fn holds(pid: i64) -> Holds {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    let mappings = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default().lines().count();
    Holds { descriptors: count("fd"), threads: count("task"), mappings, rss_kib: kib(pid, "VmRSS").unwrap() }
}

/// Waits until the old workers and all keepers have ended, then says what supervisor and control hold, and how many roles
/// there are.
fn settled(run: &Run, workers: usize) -> (Holds, Holds, usize) {
    let roles = until("old workers or keepers stay", || {
        let roles = roles(run);
        let those = |kind: &str| roles.iter().filter(|(name, _)| name.starts_with(kind)).count();
        (those("worker@") == workers && those("keeper@") == 0).then_some(roles)
    });
    // Threads that waited for the disk end after ten seconds of idleness: they are counted where they stay.
    (holds(run.pid().into()), holds(role(run, "control")), roles.len())
}

/// Would miss: a request that a deploy costs, an answer that is half of one graph and half of another, a new connection that meets
/// the old graph although its deploy was over, an old connection that stays on it; what each deploy leaves behind.
#[test]
fn deploys_under_load_lose_nothing_mix_nothing_and_leave_nothing_behind() {
    let rounds = if soak() { 2000 } else { 32 };
    let shapes = [
        "",
        "[brane.hello]\nimage = \"file:./hello.wasm\"\n",
        "[brane.hello]\nimage = \"file:./hello.wasm\"\nreplicas = 40\n[brane.counter]\nimage = \"file:./counter.wasm\"\n\
         execution = { lifecycle = \"pinned\" }\n",
        "[brane.counter]\nimage = \"file:./counter.wasm\"\nlimits = { mem_max = \"4 MiB\" }\n",
    ];
    let folder = Folder::with(&versioned(0, "file:./version.wasm", shapes[2])).unwrap();
    folder.put("other.wasm", distinct(&guest("version"), 1)).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "2"]].concat()).unwrap().serving().unwrap();
    let ledger = Ledger::default();
    let port = run.port;
    let (mut millis, mut first, mut last) = (Vec::new(), None, None);
    std::thread::scope(|scope| {
        let _stop = Stop(&ledger);
        for pause in [0, 30, 300] {
            let ledger = &ledger;
            scope.spawn(move || ask_over_1(port, ledger, true, Duration::from_millis(pause)));
        }
        scope.spawn(|| ask_over_1(port, &ledger, false, Duration::ZERO));
        for _ in 0..2 {
            scope.spawn(|| ask_over_2(port, &ledger));
        }
        let load = [Wrk::start(port, &["-c4"]), Wrk::start(port, &["-c2", "-HConnection: close"])];
        for number in 1..=rounds {
            let image = ["file:./version.wasm", "file:./other.wasm"][usize::from(number % 2 == 1)];
            let file = "next.zgraph.toml";
            folder
                .put(file, versioned(number, image, shapes[usize::try_from(number / 2).unwrap() % shapes.len()]))
                .unwrap();
            ledger.begun.store(number, SeqCst);
            let done = deploy(&run, file).unwrap();
            ledger.done.store(number, SeqCst);
            assert_eq!(done["graph"], number);
            millis.push(done["millis"].as_u64().unwrap());
            let wrong = [ledger.failures(), ledger.faults()].concat();
            assert!(wrong.is_empty(), "after {number} deploys: {wrong:#?}");
            // The shape of the last one, which comes every eight deploys.
            if number == rounds - rounds * 3 / 4 / 8 * 8 {
                first = Some(settled(&run, 2));
            }
        }
        last = Some(settled(&run, 2));
        for (load, way) in load.into_iter().zip(["kept", "closed"]) {
            let (requests, failed) = load.end();
            println!("wrk, {way}: {requests} requests, failed: {failed:?}");
            assert!(requests > rounds && failed.is_empty(), "{way}: {failed:?}");
        }
    });
    millis.sort_unstable();
    let answers = ledger.answers.load(Relaxed);
    println!(
        "{rounds} deploys, {answers} answers checked; a deploy took {} ms, at most {}",
        millis[millis.len() / 2],
        millis[millis.len() - 1]
    );
    let refused = ledger.refused.load(Relaxed);
    println!("refused over HTTP/2, and asked again: {refused}\nbefore: {first:?}\nat the end: {last:?}");
    assert!(refused <= 1 + rounds / 100, "{refused} of {rounds} deploys refused a request");
    assert_eq!([ledger.failures(), ledger.faults()].concat(), [] as [&str; 0]);
    assert!(answers > 4 * rounds, "the clients hardly got to ask");
    let ((supervisor, control, processes), (supervisor_then, control_then, processes_then)) =
        (first.unwrap(), last.unwrap());
    // The two deploys are of one shape. In the short version control's log still grows towards its 8 MiB.
    let pieces = if soak() { 32 } else { 128 };
    assert_eq!(processes_then, processes);
    for (before, after, most) in [(supervisor, supervisor_then, 1 << 10), (control, control_then, 16 << 10)] {
        assert!(after.descriptors <= before.descriptors + 2, "{before:?} {after:?}");
        assert!(after.threads <= before.threads + 2, "{before:?} {after:?}");
        assert!(after.mappings <= before.mappings + pieces, "{before:?} {after:?}");
        assert!(after.rss_kib <= before.rss_kib + most, "{before:?} {after:?}");
    }
    assert!(run.interrupt().unwrap().success());
}

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The next frame: its kind, its flags, its stream, what it carries.
fn next_frame(stream: &mut TcpStream) -> io::Result<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [a, b, c, kind, flags, number @ ..] = head;
    let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap()];
    stream.read_exact(&mut payload)?;
    Ok((kind, flags, u32::from_be_bytes(number), payload))
}

/// Would miss: a request that a client far away sent on a new connection before it could know that its worker was about to go.
#[test]
fn a_new_connection_that_is_told_to_go_has_a_round_trip_for_its_first_request() {
    const BODY_DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    const ACK: u8 = 1;
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, run.port)).unwrap();
    client.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
    client.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &*frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
    // The worker has it.
    until("no settings come", || (next_frame(&mut client).unwrap().0 == SETTINGS).then_some(()));
    deploy(&run, &put_version(&folder, 1, "file:./version.wasm", "")).unwrap();
    let (mut last, mut ping) = (None, None);
    while ping.is_none() {
        match next_frame(&mut client).expect("it ends without a word") {
            (GOAWAY, _, _, payload) => last = Some(payload),
            (PING, 0, _, payload) => ping = Some(payload),
            _ => {}
        }
    }
    // The last stream is the highest that there can be, the reason that there is none.
    assert_eq!(last.unwrap(), [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    // It takes that long to get there, and the request was sent before.
    std::thread::sleep(Duration::from_millis(300));
    let path = "/version?kib=4";
    // GET, http, the path and the authority `a`, none of them indexed (RFC 7541, sections 6.1 and 6.2.2).
    let head = [&[0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()], path.as_bytes(), &[0x01, 1, b'a']].concat();
    let asked = [frame(HEADERS, 4 | 1, 1, &head), frame(PING, ACK, 0, &ping.unwrap())].concat();
    client.write_all(&asked).expect("it is gone");
    let (mut body, mut last) = (Vec::new(), None);
    while let Ok((kind, _, _, payload)) = next_frame(&mut client) {
        match kind {
            BODY_DATA => body.extend(payload),
            GOAWAY => last = Some(payload),
            _ => {}
        }
    }
    assert_eq!(body.len(), 4096, "no answer");
    // The graph that it was opened to, once more.
    assert!(body.chunks(LINE).all(|line| line.starts_with(b"v000000")), "{}", String::from_utf8_lossy(&body));
    assert_eq!(last.unwrap()[..4], [0, 0, 0, 1], "which was the last, and it was served");
    assert!(run.interrupt().unwrap().success());
}

/// Chance that can be had again (xorshift, Marsaglia 2003).
struct Chance(u64);

impl Chance {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most
    }
}

/// The living children of a process that run as this role.
fn children(of: u32, role: &str) -> Vec<i64> {
    let list = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap();
    let is = |pid: &i64| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.ends_with(format!("role\0{role}\0").as_bytes()))
    };
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(is).collect()
}

/// The version that a new connection meets.
fn served(run: &Run) -> Result<u64, String> {
    let answer = run.get("/version").map_err(|e| e.to_string())?;
    if answer.status == 200 { version_of(&answer.body) } else { Err(format!("{}: {}", answer.status, answer.text())) }
}

/// The version that the store has as current: its manifest's file is called by it.
fn kept(run: &Run) -> Option<u64> {
    current(run)?["file"].as_str()?.strip_prefix('v')?.strip_suffix(".toml")?.parse().ok()
}

/// Would miss: a deploy that has answered and is not there afterwards, a store that a kill leaves broken, a graph that serves and is
/// not the one that is kept, and what a kill costs beyond what was inside.
#[test]
fn whatever_is_killed_in_a_deploy_one_graph_serves_and_it_is_the_one_that_is_kept() {
    let rounds = if soak() { 500 } else { 12 };
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "2"]].concat()).unwrap().serving().unwrap();
    let (ledger, port, component) = (Ledger::default(), run.port, guest("version"));
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    let (mut acknowledged, mut killed) = (0_u64, [0; 3]);
    std::thread::scope(|scope| {
        let _stop = Stop(&ledger);
        for _ in 0..3 {
            scope.spawn(|| ask_over_1(port, &ledger, false, Duration::ZERO));
        }
        for number in 1..=rounds {
            let which = usize::try_from(number % 3).unwrap();
            let role_of = ["control", "worker", "compile"][which];
            let (file, mut image) = (format!("v{number}.toml"), "version.wasm".to_owned());
            // A compiler is there when there is something to compile.
            if which == 2 {
                image = format!("c{number}.wasm");
                folder.put(&image, distinct(&component, number)).unwrap();
            }
            folder.put(&file, versioned(number, &format!("file:./{image}"), "")).unwrap();
            let lost = || run.ask("status").ok()?["lost"].as_u64();
            let (before, failed) = (until("no status", lost), ledger.failures().len());
            let old = until("nothing serves", || served(&run).ok());
            ledger.begun.store(number, SeqCst);
            let mut deploying = run.command(&["--json", "deploy", &file, "--yes"]);
            let mut deploying = deploying.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(Duration::from_micros(chance.below(if which == 2 { 60_000 } else { 150_000 })));
            let victim = loop {
                let all = children(run.pid(), role_of);
                if !all.is_empty() {
                    break Some(all[usize::try_from(chance.below(all.len() as u64)).unwrap()]);
                }
                if deploying.try_wait().unwrap().is_some() {
                    break None;
                }
            };
            let hit = victim.is_some_and(kill);
            killed[which] += u32::from(hit);
            let output = deploying.wait_with_output().unwrap();
            let answered = output.status.success();
            acknowledged += u64::from(answered);
            // What serves and what is kept become one, and stay it.
            let agreed = || served(&run).ok().filter(|serves| kept(&run).unwrap_or(0) == *serves);
            let now = until("what serves is not what is kept", || {
                let now = agreed()?;
                std::thread::sleep(Duration::from_millis(20));
                agreed().filter(|again| *again == now)
            });
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(now == number || (now == old && !answered), "round {number}, {role_of}: {now} after {old}: {said}");
            ledger.done.store(now, SeqCst);
            until("a worker stays away", || (children(run.pid(), "worker").len() >= 2).then_some(()));
            let most = match (role_of, hit) {
                // As in the tests of workers: it may come between what a worker did for a request and its counting it.
                ("worker", true) => until("no status", lost) - before + 1,
                _ => 0,
            };
            let failures = ledger.failures().split_off(failed);
            assert!(failures.len() as u64 <= most, "round {number}, {role_of}: {most} were inside, and {failures:#?}");
            assert_eq!(ledger.faults(), [] as [&str; 0], "round {number}, {role_of}");
        }
    });
    let answers = ledger.answers.load(Relaxed);
    let failed = ledger.failures().len();
    println!(
        "{rounds} deploys, {acknowledged} acknowledged; control, workers, compilers killed: {killed:?}; {answers} answers, {failed} failed"
    );
    assert!(killed.iter().all(|kills| *kills > 0) && acknowledged >= rounds / 6, "this run shows nothing");
    let last = kept(&run).unwrap();
    let wrong = |run: &Run| run.error.all().into_iter().filter(|line| line.contains("store: ")).collect::<Vec<_>>();
    assert_eq!(wrong(&run), [] as [&str; 0]);
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    assert_eq!((served(&run), kept(&run)), (Ok(last), Some(last)), "after a restart");
    assert_eq!(wrong(&run), [] as [&str; 0]);
    assert!(run.interrupt().unwrap().success());
}

const PINNED: &str = "[brane.counter]\nimage = \"file:./counter.wasm\"\nexecution = { lifecycle = \"pinned\" }\n";

fn put_version(folder: &Folder, number: u64, image: &str, more: &str) -> String {
    let file = format!("v{number}.toml");
    folder.put(&file, versioned(number, image, more)).unwrap();
    file
}

/// All that a deploy may change: the history, the processes, what answers. A compiler that has answered may not have ended yet.
fn all_of(run: &Run) -> (Value, Vec<(String, i64)>, Result<u64, String>) {
    let roles = roles(run).into_iter().filter(|(name, _)| !name.starts_with("compile@")).collect();
    (run.ask("graphs").unwrap(), roles, served(run))
}

/// Would miss: a deploy that fails and leaves something changed, that does not say where it fails, or that a script takes for one
/// that went well; a state that ends without a word.
#[test]
fn a_deploy_that_fails_changes_nothing_and_says_where() {
    let folder = Folder::with(&versioned(0, "file:./version.wasm", PINNED)).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    deploy(&run, &put_version(&folder, 1, "file:./version.wasm", PINNED)).unwrap();
    assert_eq!(run.get("/counter").unwrap().text(), "count 1\n");
    folder.put("senses.wasm", guest("senses")).unwrap();
    folder.put("text.wasm", "no component").unwrap();
    folder.put("module.wasm", b"\0asm\x01\0\0\0").unwrap();
    std::fs::File::create(folder.path().join("large.wasm")).unwrap().set_len((64 << 20) + 1).unwrap();
    let before = all_of(&run);
    let image = |image: &str| format!("[brane.x]\nimage = \"{image}\"\n");
    let unknown = "0".repeat(64);
    let cases: [(String, &[&str]); 9] = [
        ("[brane.x]\nimage = 3\n".into(), &["bad.toml: 1 errors", "bad.toml:2:9", "nothing is changed"]),
        ("[brane.x]\n".into(), &["image"]),
        (image("file:./none.wasm"), &["none.wasm", "No such file"]),
        (image("file:./text.wasm"), &["./text.wasm is no WebAssembly"]),
        (image("file:./module.wasm"), &["bad.toml: 1 error, nothing is changed", "bad.toml:2:9", "./module.wasm"]),
        (image("file:./large.wasm"), &["large.wasm has 67108865 bytes, at most 67108864"]),
        (image("file:./senses.wasm"), &["bad.toml: ", "nothing is changed", "\"clock\"", "\"random\""]),
        (image("omega/none:1"), &["bad.toml:2:9", "\"omega/none:1\" is not in the store", "gaia push"]),
        (image(&format!("omega/none:1@sha256:{unknown}")), &["bad.toml:2:9", "is not in the store"]),
    ];
    for (manifest, words) in cases {
        folder.put("bad.toml", &manifest).unwrap();
        for dry in [&["--json", "deploy", "bad.toml", "--yes"][..], &["deploy", "bad.toml", "--dry-run"]] {
            let (status, output, error) = run.gaia(dry).unwrap();
            assert_eq!((status.code(), output.as_str()), (Some(1), ""), "{manifest}: {error}");
            let error = if dry[0] == "--json" { why(&error) } else { error };
            for words in words {
                assert!(error.contains(words), "{manifest}\nshould say {words}, and says {error}");
            }
        }
        assert_eq!(all_of(&run), before, "{manifest}");
    }
    // What would go well, only shown.
    let file =
        put_version(&folder, 2, "file:./version.wasm", &(PINNED.to_owned() + "limits = { mem_max = \"4 MiB\" }\n"));
    let (status, output, error) = run.gaia(&["deploy", &file, "--dry-run"]).unwrap();
    assert!(
        status.success() && output.contains("! ends the state of counter.001: its limits change"),
        "{output}{error}"
    );
    assert_eq!(all_of(&run), before);
    // What was only shown is not kept at hand for ever: each of these is machine code in memory, with a descriptor.
    let control = role(&run, "control");
    let mut held = Vec::new();
    for number in 0..6 {
        folder.put("shown.wasm", distinct(&guest("hello"), 1000 + number)).unwrap();
        folder.put("shown.toml", image("file:./shown.wasm")).unwrap();
        assert!(run.gaia(&["deploy", "shown.toml", "--dry-run"]).unwrap().0.success());
        held.push(holds(control).descriptors);
    }
    assert!(held[5] <= held[0] + 2, "{held:?}");
    // Nobody is there to be asked.
    for arguments in [&["deploy", &file][..], &["--json", "deploy", &file]] {
        let (status, _, error) = run.gaia(arguments).unwrap();
        assert_eq!(status.code(), Some(5));
        assert!(
            error.contains("ends the state of counter.001: its limits change") && error.contains("--yes"),
            "{error}"
        );
        assert_eq!(all_of(&run), before);
    }
    assert_eq!(run.get("/counter").unwrap().text(), "count 2\n");
    deploy(&run, &file).unwrap();
    assert_eq!((served(&run), run.get("/counter").unwrap().text().as_str()), (Ok(2), "count 1\n"));
    let (status, _, error) = run.gaia(&["rollback"]).unwrap();
    assert!(!status.success() && error.contains("counter.001") && error.contains("--yes"), "{error}");
    assert_eq!((served(&run), kept(&run)), (Ok(2), Some(2)));
    // With nothing to push to.
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let (status, _, error) = run.gaia(&["push", "omega/x:1", "version.wasm"]).unwrap();
    assert!(!status.success() && error.contains("no data disk"), "{error}");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a way back that leads to something that only looks like what was there; a name that, moved, takes a graph with it that
/// was deployed before; a restart that serves something else than what was deployed last.
#[test]
fn the_way_back_and_a_restart_lead_to_exactly_what_was_there() {
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    folder.put("hello.wasm", guest("hello")).unwrap();
    let push =
        |file: &str| run.ask(&format!("push omega/version:1 {file}")).unwrap()["digest"].as_str().unwrap().to_owned();
    let digest = push("version.wasm");
    deploy(&run, &put_version(&folder, 1, "omega/version:1", "# the first\n")).unwrap();
    // All that the file says but when it was last made current, which is another.
    let bytes = |number: u64| {
        let file = std::fs::read_to_string(folder.path().join(format!("data/graphs/{number}"))).unwrap();
        let mut graph: Value = serde_json::from_str(file.lines().next().unwrap()).unwrap();
        let changes = graph.as_object_mut().unwrap().remove("made_current").unwrap();
        assert!(changes.as_u64() > Some(0), "{changes}");
        graph.to_string()
    };
    let first = (bytes(1), current(&run).unwrap());
    assert_eq!(first.1["images"]["omega/version:1"], digest.as_str());
    let other = push("hello.wasm");
    assert_ne!(other, digest);
    // What serves is what was deployed; what is pinned is that, whatever the name stands for.
    assert_eq!(served(&run), Ok(1));
    let pinned = format!("omega/version:1@{digest}");
    deploy(&run, &put_version(&folder, 2, &pinned, "")).unwrap();
    assert_eq!((served(&run), current(&run).unwrap()["images"][&pinned].as_str()), (Ok(2), Some(digest.as_str())));
    let done = run.ask("rollback").unwrap();
    assert_eq!((&done["graph"], &done["plan"]["compiled"]), (&1.into(), &0.into()), "{done}");
    assert_eq!((served(&run), bytes(1), current(&run).unwrap()), (Ok(1), first.0.clone(), first.1.clone()));
    let outcome = run.ask("graphs").unwrap()["graphs"][1]["outcome"].clone();
    assert!(outcome.as_str().unwrap().contains("went back to graph 1"), "{outcome}");
    assert!(run.interrupt().unwrap().success());
    // Not even with the files of the manifest.
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    assert_eq!((served(&run), bytes(1), current(&run).unwrap()), (Ok(1), first.0, first.1));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a graph that crashes its workers and stays, or that goes without its reason being kept.
#[test]
fn a_graph_whose_workers_keep_dying_is_taken_back_and_says_why() {
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    for number in [1, 2] {
        deploy(&run, &put_version(&folder, number, "file:./version.wasm", "")).unwrap();
        assert_eq!(served(&run), Ok(number));
    }
    let mut victim = 0;
    for death in 1..=3 {
        victim = until("it does not come back", || {
            roles(&run).into_iter().find(|(name, pid)| name == "worker@0" && *pid != victim)
        })
        .1;
        // One that has not become ready yet is no worker of the graph that serves to whoever asks.
        until("it does not serve", || served(&run).ok());
        assert_eq!(kept(&run), Some(2), "before death {death}");
        assert!(kill(victim));
    }
    run.error.line("graph 2 is taken back by itself: 3 of its processes died within 60s, the last was worker@0, which was killed by SIGKILL; graph 1 serves again").unwrap();
    until("the graph before does not serve", || (served(&run) == Ok(1) && kept(&run) == Some(1)).then_some(()));
    let history = run.gaia(&["graphs"]).unwrap().1;
    assert!(history.contains("graph 2 is taken back by itself"), "{history}");
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    assert_eq!((served(&run), kept(&run)), (Ok(1), Some(1)));
    assert!(run.gaia(&["graphs"]).unwrap().1.contains("graph 2 is taken back by itself"));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a graph that crashes its workers and stays because control died in between, or a control that begins to count anew.
#[test]
fn a_graph_on_trial_stays_on_it_when_control_is_killed() {
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    for number in [1, 2] {
        deploy(&run, &put_version(&folder, number, "file:./version.wasm", "")).unwrap();
    }
    let another = |name: &str, than: i64| {
        let found = || roles(&run).into_iter().find(|(role, pid)| role == name && *pid != than);
        until(&format!("{name} does not come back"), found).1
    };
    let mut worker = 0;
    for death in 1..=3 {
        worker = another("worker@0", worker);
        until("it does not serve", || served(&run).ok());
        assert_eq!((kept(&run), served(&run)), (Some(2), Ok(2)), "before death {death}");
        let control = role(&run, "control");
        // The second one while there is no control: another is started some ms later.
        if death == 2 {
            assert!(kill(control) && kill(worker));
        } else {
            assert!(kill(worker));
            if death == 1 {
                until("it does not come back", || (another("worker@0", worker) != 0).then_some(()));
                assert!(kill(control));
            }
        }
        if death < 3 {
            another("control", control);
        }
    }
    run.error.line("graph 2 is taken back by itself: 3 of its processes died within 60s").unwrap();
    until("the graph before does not serve", || (served(&run) == Ok(1) && kept(&run) == Some(1)).then_some(()));
    let outcome = run.ask("graphs").unwrap()["graphs"][1]["outcome"].clone();
    assert!(outcome.as_str().unwrap().contains("graph 1 serves again"), "{outcome}");
    // The graph before is not on trial, whoever counts.
    for _ in 0..2 {
        worker = another("worker@0", worker);
        until("it does not serve", || served(&run).ok());
        assert!(kill(worker));
    }
    let control = role(&run, "control");
    assert!(kill(control));
    another("control", control);
    until("it does not serve", || served(&run).ok());
    assert_eq!((served(&run), kept(&run)), (Ok(1), Some(1)));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a control that ends between the cut-over and the moment at which the graph is kept as the current one, and a new one
/// that leaves it at that: the next restart would serve another graph than the one that serves.
#[test]
fn what_serves_is_kept_by_the_next_control_if_the_last_one_could_not() {
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    deploy(&run, &put_version(&folder, 1, "file:./version.wasm", "")).unwrap();
    let file = put_version(&folder, 2, "file:./version.wasm", "");
    let control = Pid::from_raw(i32::try_from(role(&run, "control")).unwrap()).unwrap();
    let before = children(run.pid(), "worker").len();
    let mut deploying = run.command(&["--json", "deploy", &file, "--yes"]);
    let deploying = deploying.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + ANSWER_WITHIN;
    // There is a new worker, so the supervisor knows the whole generation and goes on by itself.
    while children(run.pid(), "worker").len() == before {
        assert!(Instant::now() < deadline, "no new worker");
        std::thread::yield_now();
    }
    rustix::process::kill_process(control, Signal::STOP).unwrap();
    run.error.line("serving generation 3").unwrap();
    assert_eq!(kept_on_disk(&folder), 1, "it was stopped in time");
    rustix::process::kill_process(control, Signal::KILL).unwrap();
    assert!(!deploying.wait_with_output().unwrap().status.success(), "nobody was left to answer");
    run.error.line("graph 2 serves and is the current one now; kept as that was 1").unwrap();
    assert_eq!((served(&run), kept(&run), kept_on_disk(&folder)), (Ok(2), Some(2), 2));
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    assert_eq!((served(&run), kept(&run)), (Ok(2), Some(2)));
    assert!(run.interrupt().unwrap().success());
}

/// The number in the file `current`.
fn kept_on_disk(folder: &Folder) -> u64 {
    let file = std::fs::read_to_string(folder.path().join("data/current")).unwrap();
    serde_json::from_str::<Value>(file.lines().next().unwrap()).unwrap()["number"].as_u64().unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Harm {
    Flip,
    Truncate,
    Delete,
}

fn harm(path: &Path, how: Harm) {
    let mut bytes = std::fs::read(path).unwrap();
    let half = bytes.len() / 2;
    match how {
        Harm::Delete => return std::fs::remove_file(path).unwrap(),
        Harm::Flip => bytes[half] ^= 1,
        Harm::Truncate => bytes.truncate(half),
    }
    std::fs::write(path, bytes).unwrap();
}

fn copied(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copied(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Would miss: damage that is served, that is not told by name, or that takes with it what is whole.
#[test]
fn what_is_damaged_while_the_store_is_down_is_told_by_name_and_the_rest_serves() {
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let with = |data: &str| folder.run(&["--workers", "1", "--data", data]).unwrap().serving().unwrap();
    folder.put("other.wasm", distinct(&guest("version"), 1)).unwrap();
    let run = with("data");
    let push = |name: &str, file: &str| {
        run.ask(&format!("push {name} {file}")).unwrap()["digest"].as_str().unwrap()[7..].to_owned()
    };
    let digests = [push("omega/version:1", "version.wasm"), push("omega/version:2", "other.wasm")];
    for number in [1, 2] {
        deploy(&run, &put_version(&folder, number, &format!("omega/version:{number}"), "")).unwrap();
    }
    assert!(run.interrupt().unwrap().success());
    let (data, hurt) = (folder.path().join("data"), folder.path().join("hurt"));
    let artefact = std::fs::read_dir(data.join("artefacts"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let artefact = format!("artefacts/{}", artefact.into_iter().find(|name| name.starts_with(&digests[1])).unwrap());
    let component = format!("components/{}", digests[1]);
    // What is hurt, what is said of it, and the version that serves then.
    let cases: [(&[&str], &str, u64); 7] = [
        (&["graphs/2"], "store: graph 2: ", 2),
        (&["current"], "store: current: ", 2),
        (&["current", "current.copy"], "store: current: both copies are lost; graph 2 was the last to be", 2),
        (&["names"], "store: names: ", 2),
        (&[&artefact], "store: artefact of sha256:", 2),
        (&[&component, &artefact], "store: component sha256:", 1),
        (&["graphs/2", "graphs/2.copy"], "store: graph 2: ", 1),
    ];
    for (files, words, version) in cases {
        for how in [Harm::Flip, Harm::Truncate, Harm::Delete] {
            let _ = std::fs::remove_dir_all(&hurt);
            copied(&data, &hurt);
            for file in files {
                harm(&hurt.join(file), how);
            }
            let run = with("hurt");
            assert_eq!(served(&run), Ok(version), "{files:?} {how:?}: {:#?}", run.error.all());
            let told: Vec<String> = run.error.all().into_iter().filter(|line| line.contains("store: ")).collect();
            // Machine code that is gone is made anew, and nothing is lost by it.
            if how == Harm::Delete && files[0] == artefact {
                assert_eq!(told, [] as [&str; 0]);
            } else {
                assert!(told.iter().any(|line| line.contains(words)), "{files:?} {how:?}: {told:?}");
            }
            let quarantine = std::fs::read_dir(hurt.join("quarantine")).unwrap().count();
            assert_eq!(quarantine > 0, how != Harm::Delete, "{files:?} {how:?}: {quarantine} files, {told:?}");
            if files[0] == component {
                // What is brought again is taken, and serves.
                let (status, _, error) = run.gaia(&["push", "omega/version:2", "other.wasm"]).unwrap();
                assert!(status.success(), "{error}");
                deploy(&run, "v2.toml").unwrap();
            } else if version == 2 {
                // All of it is there: the names, too.
                deploy(&run, &put_version(&folder, 3, "omega/version:1", "")).unwrap();
                assert_eq!(served(&run), Ok(3));
                run.ask("rollback").unwrap();
            } else {
                deploy(&run, "v2.toml").unwrap();
            }
            assert_eq!(served(&run), Ok(2), "{files:?} {how:?}");
            assert!(run.interrupt().unwrap().success());
            // Said once; from then on the store is whole.
            let run = with("hurt");
            assert_eq!(served(&run), Ok(2), "{files:?} {how:?}: {:#?}", run.error.all());
            let told: Vec<String> = run.error.all().into_iter().filter(|line| line.contains("store: ")).collect();
            assert_eq!(told, [] as [&str; 0], "{files:?} {how:?}");
            assert!(run.interrupt().unwrap().success());
        }
    }
}

/// Would miss: a deploy of many branes that does not come up, or one that compiles again what has not changed.
#[test]
fn many_branes_are_deployed_and_what_has_not_changed_is_not_compiled_again() {
    let many: usize = if soak() { 200 } else { 40 };
    let folder = Folder::with(&versioned(0, "file:./version.wasm", "")).unwrap();
    let run = folder.run(&[&DATA[..], &["--workers", "1"]].concat()).unwrap().serving().unwrap();
    let component = guest("hello");
    let mut manifest = String::new();
    for n in 0..many {
        folder.put(&format!("h{n}.wasm"), distinct(&component, n as u64)).unwrap();
        write!(manifest, "[brane.h{n}]\nimage = \"file:./h{n}.wasm\"\n").unwrap();
    }
    folder.put("many.toml", manifest).unwrap();
    for (compiled, changed) in [(many, many + 1), (1, 1)] {
        let began = Instant::now();
        let done = deploy(&run, "many.toml").unwrap();
        let took = began.elapsed();
        let plan = &done["plan"];
        let changes = plan["branes"].as_array().unwrap().iter().filter(|brane| brane["change"] != "same").count();
        assert_eq!((plan["compiled"].as_u64(), changes), (Some(compiled as u64), changed));
        let (micros, millis) = (plan["micros"].as_u64().unwrap(), done["millis"].as_u64().unwrap());
        println!(
            "{many} branes, {compiled} compiled: {micros} µs to plan twice, {} for each; {millis} ms to plan again and swap, {} µs for each; {took:?} \
             in all",
            micros / many as u64,
            1000 * millis / many as u64
        );
        // Nothing has changed, and nothing is compiled.
        assert_eq!(run.ask("deploy many.toml --dry-run").unwrap()["compiled"], 0);
        folder.put("h7.wasm", distinct(&component, 1_000_007)).unwrap();
    }
    for n in [0, 7, many - 1] {
        assert_eq!(run.get(&format!("/h{n}")).unwrap().text(), "hello\n");
    }
    assert!(run.interrupt().unwrap().success());
}
