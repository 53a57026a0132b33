//! Very many requests at a time, each in an instance of its own. Needs no virtual machine, but root, for one of the kernel's
//! bounds: how many mappings a process may have.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gaia_tests::soak;
use gaia_tests::workstation::{Folder, Run, kib};
use tokio::net::TcpStream;

/// What each guest is asked to touch; its stack, its data and its allocator's own pages come on top.
const TOUCHED_KIB: u64 = 64;
/// What an instance may cost beyond what its guest touches, page tables and what the host holds included.
const BEYOND_KIB: u64 = 64;
/// Streams of one connection.
const STREAMS: usize = 124;
/// Mappings of one instance: its memory's parts and guards, its stack and guard, its tables.
const MAPPINGS: u64 = 8;

/// A bound of the kernel's, raised as long as this lives.
struct Raised(String);

const BOUND: &str = "/proc/sys/vm/max_map_count";

impl Raised {
    fn to(least: u64) -> Self {
        let before = std::fs::read_to_string(BOUND).unwrap();
        if before.trim().parse::<u64>().unwrap() < least {
            // Root may.
            std::fs::write(BOUND, least.to_string()).unwrap();
        }
        Self(before)
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        let _ = std::fs::write(BOUND, &self.0);
    }
}

fn workers(run: &Run) -> Vec<i64> {
    let status = run.ask("status").unwrap();
    status["workers"].as_array().unwrap().iter().map(|worker| worker["pid"].as_i64().unwrap()).collect()
}

/// Resident memory and page tables of all workers, in KiB.
fn memory(run: &Run) -> u64 {
    let of = |pid: i64| kib(pid, "VmRSS").unwrap() + kib(pid, "VmPTE").unwrap();
    workers(run).into_iter().map(of).sum()
}

/// What is resident of guests' memories, in KiB. A memory that is in use has its component's data mapped into it, writable, and what
/// is below and above belongs to it.
fn touched_by_guests(run: &Run) -> u64 {
    let of = |pid: i64| {
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        // Begin, end, whether it is such data, KiB.
        let mut mappings: Vec<(u64, u64, bool, u64)> = Vec::new();
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((begin, end)) = first.split_once('-') {
                let address = |hex| u64::from_str_radix(hex, 16).unwrap();
                let writable = words.next().is_some_and(|rights| rights.starts_with("rw"));
                let data = writable && line.contains("/memfd:artefact");
                let other = !writable || line.ends_with(']') || line.contains('/') && !data;
                mappings.push((address(begin), if other { 0 } else { address(end) }, data, 0));
            } else if first == "Rss:" {
                mappings.last_mut().unwrap().3 = words.next().unwrap().parse().unwrap();
            }
        }
        let mut sum = 0;
        for (at, (begin, end, data, kib)) in mappings.iter().enumerate() {
            let below = at.checked_sub(1).map(|below| mappings[below]).filter(|below| below.1 == *begin);
            let above = mappings.get(at + 1).filter(|above| above.0 == *end && above.1 > 0);
            sum += if *data { kib + below.map_or(0, |m| m.3) + above.map_or(0, |m| m.3) } else { 0 };
        }
        sum
    };
    workers(run).into_iter().map(of).sum()
}

/// How long `hello` takes, fifty times, sorted.
fn latencies(run: &Run) -> Vec<Duration> {
    let one = |_| {
        let began = Instant::now();
        assert_eq!(run.get("/hello").unwrap().text(), "hello\n");
        began.elapsed()
    };
    let mut all: Vec<_> = (0..50).map(one).collect();
    all.sort();
    all
}

/// Requests in flight.
fn inside(run: &Run) -> u64 {
    let status = run.ask("status").unwrap();
    status["workers"].as_array().unwrap().iter().map(|worker| worker["inside"].as_u64().unwrap()).sum()
}

/// Asks for the same so many times at once, over HTTP/2; how many got this very answer.
async fn ask(port: u16, number: usize, path: String, wanted: String) -> usize {
    let connect = async |streams: usize| {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        let mut builder = h2::client::Builder::new();
        builder.initial_connection_window_size(1 << 20).initial_max_send_streams(STREAMS);
        let (mut requests, connection) = builder.handshake::<_, Bytes>(stream).await.unwrap();
        let over = tokio::spawn(connection);
        let mut answers = Vec::new();
        for _ in 0..streams {
            let request = http::Request::get(format!("http://appliance{path}")).body(()).unwrap();
            requests = requests.ready().await.unwrap();
            answers.push(requests.send_request(request, true).unwrap().0);
        }
        (answers, requests, over)
    };
    let mut connections = Vec::new();
    for begin in (0..number).step_by(STREAMS) {
        connections.push(connect(STREAMS.min(number - begin)).await);
    }
    let mut right = 0;
    for (answers, _requests, _over) in connections {
        for answer in answers {
            let Ok(answer) = answer.await else { continue };
            let (head, mut body) = answer.into_parts();
            let mut text = Vec::new();
            while let Some(Ok(piece)) = body.data().await {
                text.extend_from_slice(&piece);
            }
            right += usize::from(head.status == 200 && text == wanted.as_bytes());
        }
    }
    right
}

/// Would miss: a bound that is lower than it says, an instance that costs more than it should, a brane that has to wait for
/// another's sleepers, an answer that goes to another.
#[test]
fn very_many_requests_are_in_flight_at_once_and_each_is_answered() {
    let (number, sleep) = if soak() { (62_000, 60) } else { (6_200, 8) };
    let _raised = Raised::to(number as u64 / 2 * MAPPINGS + 100_000);
    let graph = format!(
        "[brane.wait]\nimage = \"file:./wait.wasm\"\nreplicas = {number}\nlimits = {{ deadline = \"5m\" }}\n\
         capability = {{ clock = {{ resolution = \"ms\" }} }}\nexecution = {{ lifecycle = \"ephemeral\" }}\n\
         [brane.hello]\nimage = \"file:./hello.wasm\"\n"
    );
    let run = Folder::with(&graph).unwrap();
    let run = run.run(&["--workers", "2", "--memory", "18GiB"]).unwrap().serving().unwrap();
    let (before, alone) = (memory(&run), latencies(&run));
    let (path, wanted) =
        (format!("/wait?sleep_ms={}&touch_kib={TOUCHED_KIB}", sleep * 1000), format!("waited {} ms\n", sleep * 1000));
    let began = Instant::now();
    let port = run.port;
    let client = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(ask(port, number, path, wanted))
    });
    let mut most = 0;
    while most < number as u64 && began.elapsed() < Duration::from_secs(sleep) {
        most = most.max(inside(&run));
        std::thread::sleep(Duration::from_millis(50));
    }
    // Their heads have been read; the guests are all there when nothing is touched any more.
    let mut held = memory(&run);
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = memory(&run);
        if now.abs_diff(held) < now / 1000 {
            break;
        }
        held = now;
    }
    let ramp = began.elapsed();
    let (each, guests) = ((held - before) / number as u64, touched_by_guests(&run) / number as u64);
    let latencies = latencies(&run);
    let inside_then = inside(&run);
    let right = client.join().unwrap();
    println!(
        "{most} in flight after {ramp:?}, {each} KiB each of which {guests} are the guest's; another brane meanwhile p50 {:?} \
         p90 {:?}; {right} answered right",
        latencies[25], latencies[45]
    );
    assert_eq!(most, number as u64, "all at a time");
    assert!(inside_then >= number as u64 * 9 / 10, "{inside_then} were still there");
    assert_eq!(right, number);
    assert!((TOUCHED_KIB..TOUCHED_KIB + 24).contains(&guests), "{guests} KiB are the guest's");
    assert!(each <= guests + BEYOND_KIB, "{each} KiB, {guests} of them the guest's");
    // Held against what the machine gave a moment before: others may use it, too.
    let most = alone[25] * 3 + Duration::from_millis(15);
    assert!(latencies[25] < most, "{:?}, alone {:?}", latencies[25], alone[25]);
}
