//! Mixed load for as long as one likes, and whether anything grows with it: memory, page tables, descriptors, mappings, threads,
//! latency. These need no virtual machine.
//!
//! Two graphs are served at the same time, since each would hide what the other shows. In the steady one all processes live from the
//! first request to the last: what a request leaves behind adds up. The other one is deployed anew every few seconds: what a deploy
//! leaves behind adds up in those who stay, and workers that do not end would be counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gaia_tests::growth::{Allowance, Held, Verdict, judge, median};
use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{http, out, soak};

use super::egress::{PAGE, answer, encoded, fetching, web};
use super::ingress::{BOTH, Client, block, certify, free_port, get_1, secured};

/// What one answer may take, on whatever machine.
const WITHIN: Duration = Duration::from_secs(30);
/// What each client rests after each round, so that the machine is busy and not drowned.
const REST: Duration = Duration::from_millis(4);
/// Requests that a latency is the median of.
const PROBES: usize = 25;

const STEADY: &str = r#"
[brane.hello]
image = "file:./hello.wasm"
replicas = 8

[brane.fresh]
image = "file:./hello.wasm"
replicas = 8
execution = { lifecycle = "ephemeral" }

[brane.kept]
image = "file:./hello.wasm"
replicas = 2
execution = { lifecycle = "pinned" }

[brane.json]
image = "file:./json.wasm"
replicas = 4

[brane.mirror]
image = "file:./mirror.wasm"
replicas = 4

[brane.grow]
image = "file:./grow.wasm"
replicas = 2

[brane.chatty]
image = "file:./chatty.wasm"
replicas = 4

[brane.faulty]
image = "file:./faulty.wasm"
replicas = 4

[brane.wait]
image = "file:./wait.wasm"
replicas = 8
capability = { clock = { resolution = "ms" } }

[brane.late]
image = "file:./wait.wasm"
replicas = 4
capability = { clock = { resolution = "ms" } }
limits = { deadline = "100ms" }

[brane.probe]
image = "file:./hello.wasm"
replicas = 2

"#;

/// How long the load goes on.
fn seconds() -> u64 {
    let said = std::env::var("GAIA_SOAK_SECONDS").ok().map(|text| text.parse().unwrap());
    said.unwrap_or(if soak() { 3600 } else { 24 })
}

/// What came of one kind of work.
#[derive(Debug, Default)]
struct Tally {
    right: AtomicU64,
    wrong: AtomicU64,
    /// The first that was not right.
    first: Mutex<Option<String>>,
}

impl Tally {
    fn note(&self, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => _ = self.right.fetch_add(1, Relaxed),
            Err(why) => {
                self.wrong.fetch_add(1, Relaxed);
                self.first.lock().unwrap().get_or_insert(why);
            }
        }
    }

    fn check(&self, name: &str) {
        println!("{name}: {} right, {} wrong", self.right.load(Relaxed), self.wrong.load(Relaxed));
        let first = self.first.lock().unwrap();
        assert!(first.is_none(), "{name}: {first:?}");
        assert!(self.right.load(Relaxed) >= 5, "{name} was not done");
    }
}

/// Whether an answer has this status and this text.
fn is(got: std::io::Result<http::Answer>, status: u16, text: &str) -> Result<(), String> {
    match got {
        Ok(got) if got.status == status && (text.is_empty() || got.text() == text) => Ok(()),
        other => Err(format!("{other:?}, not {status} {text:?}")),
    }
}

fn get(port: u16, path: &str) -> std::io::Result<http::Answer> {
    http::get(port, path, WITHIN)
}

fn post(port: u16, path: &str, body: &[u8]) -> std::io::Result<http::Answer> {
    let head =
        format!("POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    http::raw(port, &[head.as_bytes(), body].concat(), WITHIN)
}

/// A connection over HTTP/1.1 that is kept.
struct Kept(TcpStream);

impl Kept {
    fn connect(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(WITHIN))?;
        Ok(Self(stream))
    }

    /// Asks `hello` under this path.
    fn hello(&mut self, path: &str) -> Result<(), String> {
        self.0.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).map_err(|e| e.to_string())?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello\n") {
            let mut piece = [0; 1024];
            match self.0.read(&mut piece) {
                Ok(0) => return Err("the connection ended".into()),
                Ok(read) => answer.extend_from_slice(&piece[..read]),
                Err(e) => return Err(e.to_string()),
            }
        }
        let whole = answer.starts_with(b"HTTP/1.1 200 ");
        whole.then_some(()).ok_or_else(|| String::from_utf8_lossy(&answer).into_owned())
    }
}

/// Sends as much of this, reads as much of what comes, and goes.
fn hang_up(port: u16, request: &str, read: usize) -> Result<(), String> {
    let gone = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(WITHIN))?;
        stream.write_all(request.as_bytes())?;
        stream.read_exact(&mut vec![0; read])
    };
    gone().map_err(|e| format!("{request:?}: {e}"))
}

/// How long the probe takes, without what other processes kept its worker from the core; in milliseconds, of each.
fn probed(port: u16, path: &str, workers: &[i64]) -> Vec<f64> {
    let kept = || -> u64 {
        let of = |pid: &i64| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap_or_default();
            text.split_whitespace().nth(1).and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0)
        };
        workers.iter().map(of).sum()
    };
    let one = |_| {
        let (before, began) = (kept(), Instant::now());
        get(port, path).unwrap();
        let took = began.elapsed().saturating_sub(Duration::from_nanos(kept().saturating_sub(before)));
        took.as_secs_f64() * 1000.0
    };
    (0..PROBES).map(one).collect()
}

/// `gaia logs --follow`, and what reads it.
struct Follower(Child);

impl Follower {
    fn start(run: &Run) -> Self {
        let mut command = Command::new(out("bin/gaia"));
        command.arg("--api").arg(run.socket()).args(["logs", "--follow"]);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Figures of many moments, by what they are of.
#[derive(Default)]
struct Figures(BTreeMap<String, (Vec<f64>, Allowance)>);

impl Figures {
    fn add(&mut self, of: String, figure: f64, allowance: Allowance) {
        self.0.entry(of).or_insert_with(|| (Vec::new(), allowance)).0.push(figure);
    }

    /// What a process, or several, hold. `memory` is what they may hold more in KiB.
    fn add_held(&mut self, of: &str, held: &Held, memory: f64) {
        let allow = |least, part| Allowance { least, part };
        self.add(format!("{of} memory/KiB"), held.memory, allow(memory, 0.1));
        self.add(format!("{of} tables/KiB"), held.tables, allow(512.0, 0.1));
        self.add(format!("{of} files"), held.files, allow(8.0, 0.1));
        self.add(format!("{of} mappings"), held.mappings, allow(48.0, 0.1));
        self.add(format!("{of} threads"), held.threads, allow(1.0, 0.0));
    }

    fn verdicts(&self) -> Vec<(&str, Verdict)> {
        self.0.iter().map(|(of, (figures, allowance))| (of.as_str(), judge(figures, *allowance))).collect()
    }

    /// Ten figures of each, at equal times, and what became of it.
    fn table(&self) -> String {
        let mut table = String::new();
        for (of, (figures, allowance)) in &self.0 {
            let some: Vec<String> = (0..10).map(|n| format!("{:.1}", figures[n * (figures.len() - 1) / 9])).collect();
            let _ = writeln!(table, "{of:<44} {}  [{}]", judge(figures, *allowance), some.join(" "));
        }
        table
    }
}

/// What each process of a run holds: by role, with its number.
fn held(run: &Run) -> Vec<(String, i64, Held)> {
    let status = run.ask("status").unwrap();
    let role = |role: &serde_json::Value| {
        let (name, pid) = (role["name"].as_str()?.to_owned(), role["pid"].as_i64()?);
        // One that has ended meanwhile holds nothing.
        Some((name, pid, Held::by(pid).ok()?))
    };
    status["roles"].as_array().unwrap().iter().filter_map(role).collect()
}

/// What control may hold more in KiB: it keeps 8 MiB of the log, and what fills it depends on the load.
const CONTROL: f64 = 12.0 * 1024.0;
/// What any other may.
const OTHERS: f64 = 4.0 * 1024.0;

/// What one kind of work does in a round, of which it is told the number.
type Round<'a> = Box<dyn FnMut(u64) -> Result<(), String> + Send + 'a>;

/// The work of the steady graph, each kind in a thread of its own: its name, and what it does in each round.
fn work<'a>(
    run: &'a Run,
    secure: u16,
    trusted: &'a rustls::pki_types::CertificateDer<'static>,
    site: u16,
) -> Vec<(&'static str, Round<'a>)> {
    let port = run.port;
    let line = r#"{"sku":"A1","quantity":2,"cents":350}"#;
    let order = format!(r#"{{"id":1,"customer":"one","lines":[{}]}}"#, [line; 8].join(","));
    let document = format!(r#"{{"orders":[{}]}}"#, vec![order; 20].join(","));
    let bytes: Vec<u8> = (0..32_768_u32).map(|n| n.to_le_bytes()[(n % 2) as usize]).collect();
    let url = format!("/fetch?url={}", encoded(&format!("http://127.0.0.1:{site}/works")));
    let mut kept = None;
    let secured = move |round: u64| {
        block(async {
            let protocol: &[&[u8]] = if round.is_multiple_of(2) { &[b"h2"] } else { &[b"http/1.1"] };
            let stream = secured(secure, trusted, "a.example", protocol, BOTH).await.map_err(|e| e.to_string())?;
            let text = match round % 2 {
                0 => Client::of(stream).await.get("/hello").await.map_err(|e| e.to_string())?.text(),
                _ => get_1(stream, "/hello").await.map_err(|e| e.to_string())?,
            };
            text.ends_with("hello\n").then_some(()).ok_or(text)
        })
    };
    let streams = move |_| {
        block(async {
            let client = Client::connect(port).await;
            let paths = ["/hello", "/fresh", "/hello", "/fresh"].repeat(5);
            let all = futures_util::future::join_all(paths.into_iter().map(|path| client.get(path))).await;
            let right = all.iter().all(|answer| answer.as_ref().is_ok_and(|answer| answer.text() == "hello\n"));
            right.then_some(()).ok_or_else(|| "a stream's answer is another".to_owned())
        })
    };
    vec![
        (
            "hello on a connection that is kept",
            Box::new(move |round| {
                if round % 100 == 0 || kept.is_none() {
                    kept = Some(Kept::connect(port).map_err(|e| e.to_string())?);
                }
                let asked = kept.as_mut().map_or(Err("no connection".into()), |kept| kept.hello("/hello"));
                if asked.is_err() {
                    kept = None;
                }
                asked
            }),
        ),
        ("an ephemeral instance", Box::new(move |_| is(get(port, "/fresh"), 200, "hello\n"))),
        // Not the guest that counts: it keeps a line for each visit, and that would be seen.
        ("a pinned instance", Box::new(move |_| is(get(port, "/kept"), 200, "hello\n"))),
        ("json", Box::new(move |_| is(post(port, "/json", document.as_bytes()), 200, ""))),
        (
            "a body there and back",
            Box::new(move |_| match post(port, "/mirror", &bytes) {
                Ok(answer) if answer.status == 200 && answer.body == bytes => Ok(()),
                other => Err(format!("{:?}", other.map(|answer| (answer.status, answer.body.len())))),
            }),
        ),
        ("memory that grows", Box::new(move |_| is(get(port, "/grow?mib=2"), 200, "got 2 of 2 MiB\n"))),
        ("lines for the log", Box::new(move |_| is(get(port, "/chatty?lines=20&errors=5"), 200, ""))),
        ("an outgoing request", Box::new(move |_| is(get(port, &url), 200, ""))),
        ("HTTP/2", Box::new(streams)),
        ("TLS", Box::new(secured)),
        (
            "clients that hang up",
            Box::new(move |round| match round % 5 {
                0 => hang_up(port, "GET /wait?sleep_ms=2000&trickle_ms=5 HTTP/1.1\r\nHost: a\r\n\r\n", 40),
                1 => hang_up(port, "GET /wait?sleep_ms=300 HTTP/1.1\r\nHost: a\r\n\r\n", 0),
                2 => hang_up(port, "POST /mirror HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nhalf", 10),
                3 => hang_up(port, "GET /hello HTTP/1.1\r\nHos", 0),
                _ => hang_up(port, "", 0),
            }),
        ),
        ("missed deadlines", Box::new(move |_| is(get(port, "/late?sleep_ms=5000"), 504, ""))),
        (
            "guests that fail",
            Box::new(move |round| match round % 4 {
                0 => is(get(port, "/faulty?how=trap"), 500, ""),
                1 => is(get(port, "/faulty?how=none"), 502, ""),
                2 => is(get(port, "/faulty?how=error"), 502, ""),
                _ => match get(port, "/faulty?how=half") {
                    Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
                    other => Err(format!("half an answer is {other:?}")),
                },
            }),
        ),
        (
            "what is refused",
            Box::new(move |round| match round % 2 {
                0 => is(get(port, "/nowhere"), 404, ""),
                _ => is(
                    http::raw(port, format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(70_000)).as_bytes(), WITHIN),
                    431,
                    "",
                ),
            }),
        ),
    ]
}

/// A graph that is another at each deploy: one brane has a new name, the others stay.
fn changing(deploy: usize) -> String {
    format!(
        "[brane.hello]\nimage = \"file:./hello.wasm\"\nreplicas = 4\n\
         [brane.kept]\nimage = \"file:./hello.wasm\"\nreplicas = 2\nexecution = {{ lifecycle = \"pinned\" }}\n\
         [brane.turn{}]\nimage = \"file:./json.wasm\"\n",
        deploy % 2
    )
}

/// Would miss: what a request, a connection, a failure or a deploy leaves behind, in any process; an answer in thousands that is wrong.
#[test]
fn nothing_grows_under_mixed_load() {
    let during = Duration::from_secs(seconds());
    let every = (during / 48).clamp(Duration::from_millis(400), Duration::from_secs(10));
    let redeploy = (during / 12).clamp(Duration::from_millis(1500), Duration::from_secs(6));
    let site = web(answer("200 OK", PAGE));
    let graph = format!("{STEADY}{}", fetching("fetch", &[&format!("127.0.0.1:{}", site.port)]));
    let steady_folder = Folder::with(&graph).unwrap();
    let (trusted, secure) = (certify(steady_folder.path(), "a.example"), free_port());
    let listen = format!("127.0.0.1:{secure}");
    let options = ["--tls-listen", &listen, "--certificate", "site.pem", "--key", "site.key", "--workers", "2"];
    let steady = steady_folder.run(&options).unwrap().serving().unwrap();
    let changing_folder = Folder::with(&changing(0)).unwrap();
    let other = changing_folder.run(&["--watch", "--workers", "2"]).unwrap().serving().unwrap();

    let (over, work) = (AtomicBool::new(false), work(&steady, secure, &trusted, site.port));
    let tallies: Vec<(&str, Tally)> = work.iter().map(|(name, _)| (*name, Tally::default())).collect();
    let (deploys, beside, mut figures, mut faults) =
        (AtomicU64::new(0), Tally::default(), Figures::default(), Vec::new());
    let first: BTreeMap<String, i64> = held(&steady).into_iter().map(|(role, pid, _)| (role, pid)).collect();
    std::thread::scope(|scope| {
        for ((_, mut round), (_, tally)) in work.into_iter().zip(&tallies) {
            let over = &over;
            scope.spawn(move || {
                for number in 0.. {
                    if over.load(Relaxed) {
                        return;
                    }
                    tally.note(round(number));
                    std::thread::sleep(REST);
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Relaxed) {
                beside.note(is(get(other.port, "/hello"), 200, "hello\n"));
                beside.note(is(get(other.port, "/kept"), 200, "hello\n"));
                std::thread::sleep(REST);
            }
        });
        scope.spawn(|| {
            for deploy in 1.. {
                std::thread::sleep(redeploy);
                if over.load(Relaxed) {
                    return;
                }
                changing_folder.write(&changing(deploy)).unwrap();
                deploys.fetch_add(1, Relaxed);
            }
        });
        // Whatever goes wrong here, the others are to end.
        let sampled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let began = Instant::now();
            let mut followers: Option<(Instant, [Follower; 2])> = None;
            while began.elapsed() < during {
                if followers.as_ref().is_none_or(|(since, _)| since.elapsed() > redeploy * 2) {
                    followers = Some((Instant::now(), [Follower::start(&steady), Follower::start(&other)]));
                }
                let here = held(&steady);
                for (role, pid, held) in &here {
                    assert_eq!(first.get(role), Some(pid), "{role} is another process");
                    figures.add_held(&format!("steady {role}"), held, if role == "control" { CONTROL } else { OTHERS });
                }
                let mut all = Held::default();
                for (role, _, held) in held(&other) {
                    if role.starts_with("worker@") || role.starts_with("compile@") {
                        all += held;
                    } else {
                        let memory = if role == "control" { CONTROL } else { OTHERS };
                        figures.add_held(&format!("changing {role}"), &held, memory);
                    }
                }
                figures.add_held("changing workers", &all, 4.0 * OTHERS);
                let workers = here.iter().filter(|(role, ..)| role.starts_with("worker@")).map(|(_, pid, _)| *pid);
                let latency = median(&probed(steady.port, "/probe", &workers.collect::<Vec<_>>()));
                figures.add("steady latency p50/ms".into(), latency, Allowance { least: 2.0, part: 1.0 });
                let ps = steady.ask("ps").unwrap();
                assert!(ps["silent"].as_array().unwrap().is_empty(), "{ps}");
                for run in [&steady, &other] {
                    faults.extend(run.output.take().into_iter().filter(|line| line.contains(" FAULT ")));
                }
                std::thread::sleep(every);
            }
        }));
        over.store(true, Relaxed);
        sampled.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });

    println!("{}", figures.table());
    tallies.iter().chain(&[("answers beside deploys", beside)]).for_each(|(name, tally)| tally.check(name));
    let deploys = deploys.load(Relaxed);
    println!("{deploys} deploys, {} figures of each", figures.0["steady latency p50/ms"].0.len());
    assert!(deploys >= 4, "{deploys} deploys");
    assert_eq!(faults, [] as [String; 0]);
    let growing: Vec<String> =
        figures.verdicts().iter().filter(|(_, v)| v.grows).map(|(of, v)| format!("{of} {v}")).collect();
    assert!(growing.is_empty(), "{growing:#?}");
    // What was inside is over, and given back.
    for brane in ["hello", "fresh", "wait", "late", "mirror", "faulty"] {
        steady.until(brane, "busy", |busy| busy == 0).unwrap();
        steady.until(brane, "waiting", |waiting| waiting == 0).unwrap();
    }
    for run in [steady, other] {
        assert!(run.interrupt().unwrap().success());
    }
}

/// Would miss: a soak that could not see what it is for. The connections are a leak made on purpose: the worker holds each.
#[test]
fn a_descriptor_that_is_held_for_each_request_is_seen_by_the_soak() {
    let folder = Folder::with("[brane.hello]\nimage = \"file:./hello.wasm\"\n").unwrap();
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let mut figures = Figures::default();
    let mut never_ended = Vec::new();
    for _ in 0..40 {
        let mut kept = Kept::connect(run.port).unwrap();
        kept.hello("/hello").unwrap();
        never_ended.push(kept);
        for (role, _, held) in held(&run) {
            figures.add_held(&role, &held, OTHERS);
        }
    }
    println!("{}", figures.table());
    let growing: Vec<&str> = figures.verdicts().iter().filter(|(_, v)| v.grows).map(|(of, _)| *of).collect();
    assert_eq!(growing, ["worker@0 files"]);
}
