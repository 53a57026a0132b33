//! The log: which lines are asked for, who follows, who floods, who does not read, and where it is sent to.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gaia_tests::workstation::{Folder, Run, kib};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::{Pid, Signal};
use serde_json::Value;

const GRAPH: &str = "[brane.hello]\nimage = \"file:./hello.wasm\"\nreplicas = 4\n\
                     [brane.chatty]\nimage = \"file:./chatty.wasm\"\nreplicas = 4\nlimits = { deadline = \"5m\" }\n";
/// What anything may take on a busy machine.
const WITHIN: Duration = Duration::from_mins(2);

fn start(arguments: &[&str]) -> (Folder, Run) {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&[&["--workers", "1"], arguments].concat()).unwrap().serving().unwrap();
    (folder, run)
}

/// The lines that `gaia logs` gives as JSON.
fn lines(run: &Run, arguments: &str) -> Vec<Value> {
    let all: Vec<&str> = ["--json", "logs"].into_iter().chain(arguments.split_whitespace()).collect();
    let (status, output, error) = run.gaia(&all).unwrap();
    assert!(status.success(), "{arguments}: {error}");
    output.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Waits until there are so many.
fn lines_at_last(run: &Run, arguments: &str, count: usize) -> Vec<Value> {
    let deadline = Instant::now() + WITHIN;
    loop {
        let lines = lines(run, arguments);
        if lines.len() >= count {
            return lines;
        }
        assert!(Instant::now() < deadline, "{} of {count}: {lines:#?}", lines.len());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn control(run: &Run) -> i64 {
    let status = run.ask("status").unwrap();
    let roles = status["roles"].as_array().unwrap();
    roles.iter().find(|role| role["name"] == "control").unwrap()["pid"].as_i64().unwrap()
}

/// Would miss: a filter that lets something else through or nothing at all, a name that is not known and answered with
/// nothing, escape sequences of a guest or of Gaia itself where nobody can use them.
#[test]
fn what_is_asked_for_is_what_comes_and_nothing_of_it_moves_a_cursor() {
    let (_folder, run) = start(&[]);
    for _ in 0..3 {
        run.get("/hello").unwrap();
        run.get("/chatty?lines=1&errors=1&escape=1").unwrap();
    }
    let ends = lines_at_last(&run, "--kind end", 6);
    assert!(ends.iter().all(|line| line["kind"] == "END"), "{ends:#?}");
    let hello = lines(&run, "--brane hello --kind RES,END");
    assert_eq!(hello.len(), 6);
    assert!(hello.iter().all(|line| line["brane"] == "hello"), "{hello:#?}");
    assert_eq!(lines(&run, "--brane hello --brane chatty --kind RES").len(), 6);
    let instance = ends[0]["instance"].as_str().unwrap();
    let of_one = lines(&run, &format!("--instance {instance}"));
    assert!(of_one.len() >= 2 && of_one.iter().all(|line| line["instance"] == instance), "{of_one:#?}");
    let all = lines(&run, "");
    assert_eq!(lines(&run, "-n 2"), all[all.len() - 2..]);
    assert_eq!(lines(&run, "--since 0s"), Vec::<Value>::new());
    assert_eq!(lines(&run, "--since 10m --until 2999-01-01T00:00:00Z").len(), all.len());
    assert_eq!(lines(&run, "--until 2026-01-01T00:00:00Z"), Vec::<Value>::new());

    let (status, output, _) = run.gaia(&["logs", "--brane", "chatty", "--kind", "LOG"]).unwrap();
    assert!(status.success() && !output.chars().any(|c| c.is_control() && c != '\n'), "{output:?}");
    assert!(
        output.contains(" LOG out \\u{1b}[2J\\u{1b}]0;mine\\u{7}\\u{d}Ω 00:00:00.000 gaia AUDIT forged"),
        "{output}"
    );
    let (_, output, _) = run.gaia(&["logs", "--color", "always", "-n", "1"]).unwrap();
    assert_eq!(output.matches('\x1b').count(), 2, "{output:?}");

    for (arguments, code, words) in [
        (["logs", "--brane", "helo"], 1, "there is no brane \"helo\"; did you mean \"hello\"?"),
        (["logs", "--instance", "helo.001"], 1, "did you mean \"hello\"?"),
        (["logs", "--instance", "hello"], 2, "such as fetch.034"),
        (["logs", "--kind", "denied"], 2, "did you mean DENY?"),
        (["logs", "--since", "2026-05-01T13:41:07"], 2, "2026-05-01T13:41:07Z"),
        (["logs", "--since", "yesterday"], 2, "30s"),
    ] {
        let (status, output, error) = run.gaia(&arguments).unwrap();
        assert_eq!((status.code(), output.as_str()), (Some(code), ""), "{arguments:?}");
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a flood that takes the place of another brane's lines on their way from the guest to the operator, drops that
/// nobody is told of.
#[test]
fn a_flood_beside_hello_costs_its_own_lines_alone_and_that_is_shown() {
    const LINES: u64 = 300_000;
    let (_folder, run) = start(&[]);
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| gaia_tests::http::get(run.port, &format!("/chatty?lines={LINES}&errors=0"), WITHIN));
        for _ in 0..100 {
            assert_eq!(run.get("/hello").unwrap().text(), "hello\n");
        }
        assert_eq!(flood.join().unwrap().unwrap().text(), format!("stdout {LINES} stderr 0\n"));
    });
    let hello = lines_at_last(&run, "--brane hello", 200);
    let count = |kind: &str| hello.iter().filter(|line| line["kind"] == kind).count();
    assert_eq!((hello.len(), count("RES"), count("END")), (200, 100, 100), "every line, and none about losses");
    // What the worker dropped is told to whoever has followed from the beginning.
    run.output.until(WITHIN, |lines| lines.iter().any(|l| l.contains(" chatty.") && l.contains(" END "))).unwrap();
    let log = run.output.all();
    let shown = log.iter().filter(|line| line.contains(" chatty.") && line.contains(" LOG out ")).count() as u64;
    let lost = |line: &String| {
        let number = line.split(" LOST ").nth(1)?.split(' ').next()?.replace(',', "");
        number.parse::<u64>().ok().filter(|_| line.contains(" chatty"))
    };
    assert_eq!(shown + log.iter().filter_map(lost).sum::<u64>(), LINES, "each was shown, or counted as lost");
    assert!(log.iter().filter(|line| line.contains(" LOST ")).all(|line| line.contains(" chatty")));
    let dropped = run.ask("status").unwrap()["workers"][0]["dropped"].as_u64().unwrap();
    let (_, status, _) = run.gaia(&["status"]).unwrap();
    assert!(dropped > 0 && status.contains(&format!("{dropped} records had no room")), "{status}");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a follower that does not read and for which control keeps lines, or for which a request waits.
#[test]
fn followers_that_never_read_cost_nothing() {
    let (_folder, run) = start(&[]);
    let control = control(&run);
    // So much of everything that what is kept is full.
    let load = || {
        let began = Instant::now();
        for _ in 0..4 {
            assert_eq!(run.get("/chatty?lines=5000&errors=0").unwrap().text(), "stdout 5000 stderr 0\n");
            for _ in 0..50 {
                assert_eq!(run.get("/hello").unwrap().status, 200);
            }
        }
        began.elapsed()
    };
    load();
    load();
    let before = kib(control, "VmRSS").unwrap();
    let (mut alone, mut beside, mut after) = (Duration::MAX, Duration::MAX, 0);
    let mut stuck = Vec::new();
    // In turns, and the quickest of each: the machine has other things to do, too.
    for _ in 0..4 {
        stuck.clear();
        alone = alone.min(load());
        for _ in 0..8 {
            let mut stream = UnixStream::connect(run.socket()).unwrap();
            stream.write_all(b"GET /v1/logs?follow=true HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            // It is answered, and from here on nobody reads.
            let mut first = [0; 16];
            stream.read_exact(&mut first).unwrap();
            assert!(first.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&first));
            stuck.push(stream);
        }
        beside = beside.min(load());
        after = after.max(kib(control, "VmRSS").unwrap());
    }
    println!("alone {alone:?}, beside {} who do not read {beside:?}; control {before} and {after} KiB", stuck.len());
    assert!(beside < alone * 2 + Duration::from_millis(200), "{alone:?} alone, {beside:?} beside them");
    assert!(after < before + 6 * 1024, "control had {before} KiB, and has {after}");
    // Who asks beside them is answered.
    assert!(lines(&run, "--brane hello -n 5").len() >= 5);
    drop(stuck);
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a follower that ends with control, prints a line twice, or misses what is still there for the next control.
#[test]
fn who_follows_goes_on_with_the_next_control() {
    let (_folder, run) = start(&[]);
    let get = || assert_eq!(run.get("/hello").unwrap().status, 200);
    let kill = || {
        let pid = Pid::from_raw(i32::try_from(control(&run)).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    };
    let answers = |count| lines_at_last(&run, "--brane hello --kind RES", count);
    goes_on_with_the_next_control(run.command(&["--json", "logs"]), &get, &kill, &answers);
    run.interrupt().unwrap();
}

/// Has this `gaia logs` follow the answers of `hello` while control is killed twice. `get` asks `hello`, and `answers` is what the log has of
/// that once there are so many lines.
pub(crate) fn goes_on_with_the_next_control(
    mut command: Command,
    get: &dyn Fn(),
    kill: &dyn Fn(),
    answers: &dyn Fn(usize) -> Vec<Value>,
) {
    command.args(["--follow", "-n", "0", "--brane", "hello", "--kind", "RES"]);
    let mut child = Stopped(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let output = gaia_tests::workstation::Lines::of(child.0.stdout.take().unwrap());
    let error = gaia_tests::workstation::Lines::of(child.0.stderr.take().unwrap());
    // It has begun when the first line comes.
    let mut asked = 0;
    let deadline = Instant::now() + WITHIN;
    while output.all().is_empty() {
        assert!(Instant::now() < deadline, "{:#?}", error.all());
        get();
        asked += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
    let first: Value = serde_json::from_str(&output.all()[0]).unwrap();
    let missed = asked - answers(asked).iter().filter(|l| l["seq"].as_u64() >= first["seq"].as_u64()).count();
    for control_number in 0..2 {
        for _ in 0..10 {
            get();
            asked += 1;
        }
        output.until(WITHIN, |lines| lines.len() + missed >= asked).unwrap();
        kill();
        // Before anybody is there to read them: they wait in the workers' memory.
        for _ in 0..10 {
            get();
            asked += 1;
        }
        let again = |lines: &[String]| lines.iter().filter(|line| line.contains("follows again")).count();
        error.until(WITHIN, |lines| again(lines) > control_number).unwrap();
    }
    output.until(WITHIN, |lines| lines.len() + missed >= asked).unwrap();
    get();
    output.until(WITHIN, |lines| lines.len() + missed > asked).unwrap();
    let all = output.all();
    let mut times = BTreeMap::<_, Vec<u64>>::new();
    for line in &all {
        let line: Value = serde_json::from_str(line).unwrap();
        times.entry(line["core"].as_u64().unwrap()).or_default().push(line["time_ns"].as_u64().unwrap());
    }
    // Each core's in the order of their times.
    assert!(times.values().all(|times| times.is_sorted_by(|one, next| one < next)), "each once: {times:#?}");
    assert_eq!(all.len() + missed, asked + 1, "{:#?}", error.all());
    let words = error.all();
    assert!(words.iter().all(|line| line.starts_with("gaia: ")) && words.len() == 4, "{words:#?}");
}

/// A child that is gone when this is dropped.
struct Stopped(Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's rsyslog on a port of this machine, with a configuration of its own and a file that has what it took.
struct Rsyslog {
    folder: tempfile::TempDir,
    port: u16,
    tls: bool,
    child: Option<Stopped>,
}

impl Rsyslog {
    /// Over TLS it shows this certificate.
    fn start(tls: Option<(&str, &str, &str)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = |name: &str| folder.path().join(name).display().to_string();
        if let Some((root, certificate, key)) = tls {
            for (name, text) in [("root.pem", root), ("own.pem", certificate), ("own.key", key)] {
                std::fs::write(path(name), text).unwrap();
            }
        }
        let driver = match tls {
            Some(_) => "StreamDriver.Name=\"gtls\" StreamDriver.Mode=\"1\" StreamDriver.AuthMode=\"anon\"",
            None => "StreamDriver.Name=\"ptcp\"",
        };
        let files = match tls {
            Some(_) => format!(
                "DefaultNetstreamDriverCAFile=\"{}\" DefaultNetstreamDriverCertFile=\"{}\" DefaultNetstreamDriverKeyFile=\"{}\"",
                path("root.pem"),
                path("own.pem"),
                path("own.key")
            ),
            None => String::new(),
        };
        let config = format!(
            "global(workDirectory=\"{}\" parser.escapeControlCharactersOnReceive=\"off\" {files})\n\
             module(load=\"imtcp\" {driver})\n\
             template(name=\"all\" type=\"string\" string=\"%syslogfacility-text%.%syslogseverity-text% %timereported:::date-rfc3339% \
             %hostname% %app-name% %procid% %msgid% %structured-data% %msg%\\n\")\n\
             input(type=\"imtcp\" address=\"127.0.0.1\" port=\"{port}\" ruleset=\"all\")\n\
             ruleset(name=\"all\") {{ action(type=\"omfile\" file=\"{}\" template=\"all\") }}\n",
            folder.path().display(),
            path("log"),
        );
        std::fs::write(path("rsyslog.conf"), config).unwrap();
        let mut own = Self { folder, port, tls: tls.is_some(), child: None };
        own.go_on();
        own
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn go_on(&mut self) {
        let program = ["/usr/sbin/rsyslogd", "/sbin/rsyslogd"].into_iter().find(|path| Path::new(path).exists());
        assert!(program.is_some(), "rsyslog is not there: image/setup.sh installs it");
        let mut command = Command::new(program.unwrap());
        command.arg("-n").arg("-i").arg(self.path("pid")).arg("-f").arg(self.path("rsyslog.conf"));
        let said = std::fs::File::create(self.path("said")).unwrap();
        command.stdin(Stdio::null()).stdout(said.try_clone().unwrap()).stderr(said);
        self.child = Some(Stopped(command.spawn().unwrap()));
        let deadline = Instant::now() + WITHIN;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(self.path("said")).unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(&mut self) {
        self.child = None;
        let _ = std::fs::remove_file(self.path("pid"));
    }

    fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", if self.tls { "syslog+tls" } else { "syslog+tcp" }, self.port)
    }

    /// Waits until what it has written has this; all of it.
    fn until(&self, run: &Run, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + WITHIN;
        loop {
            let text = String::from_utf8_lossy(&std::fs::read(self.path("log")).unwrap_or_default()).into_owned();
            if wanted(&text) {
                return text;
            }
            let said = || std::fs::read_to_string(self.path("said")).unwrap_or_default();
            let last = || text.lines().rev().take(20).collect::<Vec<_>>().join("\n");
            assert!(Instant::now() < deadline, "{}\n{}\n{:#?}", last(), said(), run.ask("status").unwrap()["export"]);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Would miss: messages that a collector of the field does not read as they were meant, structured data that it cannot take
/// apart, a port that control's sandbox does not let through, losses that are not told.
#[test]
fn the_log_goes_to_a_collector_that_may_go_away_and_come_back() {
    let mut rsyslog = Rsyslog::start(None);
    let (_folder, run) = start(&["--log-export", &rsyslog.url()]);
    run.get("/hello").unwrap();
    run.get("/chatty?lines=1&errors=1&escape=1").unwrap();
    let text = rsyslog.until(&run, |text| text.contains(" END [") && text.contains("forged"));
    for words in ["local0.info ", " gaia hello.", " RES [gaia@32473 kind=\"RES\" seq=\"", " status=\"200\" cpu_ns=\""] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let error = text.lines().find(|line| line.contains("stderr line 1")).unwrap();
    assert!(
        error.starts_with("local0.notice ") && error.contains(" stream=\"err\" brane=\"chatty\" instance=\"chatty.")
    );
    assert!(error.ends_with("LOG err stderr line 1 of 1"), "{error}");
    let escaped = text.lines().find(|line| line.contains("forged")).unwrap();
    assert!(
        escaped.ends_with("LOG out \\u{1b}[2J\\u{1b}]0;mine\\u{7}\\u{d}Ω 00:00:00.000 gaia AUDIT forged"),
        "{escaped}"
    );

    rsyslog.stop();
    let (_, status, _) = run.gaia(&["status"]).unwrap();
    assert!(status.contains(&format!("log      to {}: ", rsyslog.url())), "{status}");
    // More than is kept, while nobody takes it: no request fails for that.
    let next = lines(&run, "-n 1")[0]["seq"].as_u64().unwrap() + 1000;
    let deadline = Instant::now() + WITHIN;
    while lines(&run, "--brane chatty --kind LOG")[0]["seq"].as_u64().unwrap() < next {
        assert!(Instant::now() < deadline, "the first of them is still kept");
        assert_eq!(run.get("/chatty?lines=4000&errors=0").unwrap().status, 200);
    }
    rsyslog.go_on();
    run.get("/hello").unwrap();
    let text =
        rsyslog.until(&run, |text| text.lines().any(|l| l.contains(" LOST [") && l.contains("brane=\"chatty\"")));
    let lost = text.lines().find(|line| line.contains(" LOST [")).unwrap();
    assert!(lost.starts_with("local0.warning ") && lost.contains(" records=\""), "{lost}");
    let deadline = Instant::now() + WITHIN;
    loop {
        let export = run.ask("status").unwrap()["export"].clone();
        if export["connected"] == true && export["missed"].as_u64() > Some(0) {
            break;
        }
        assert!(Instant::now() < deadline, "{export}");
        std::thread::sleep(Duration::from_millis(50));
    }
    run.error.line("the log does not go to ").unwrap();
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: TLS that a collector of the field does not speak, and a log that goes to somebody who is not the collector.
#[test]
fn the_log_goes_to_a_collector_over_tls_and_to_nobody_else() {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let rsyslog = Rsyslog::start(Some((&root, &certificate.pem(), &key.serialize_pem())));
    let folder = Folder::with(GRAPH).unwrap();
    folder.put("root.pem", &root).unwrap();
    let (url, root) = (rsyslog.url(), folder.path().join("root.pem").display().to_string());
    {
        let stranger = folder.run(&["--workers", "1", "--log-export", &url]).unwrap().serving().unwrap();
        stranger.error.line("UnknownIssuer").unwrap();
        stranger.get("/hello").unwrap();
        assert_eq!(stranger.ask("status").unwrap()["export"]["sent"], 0);
        assert!(stranger.interrupt().unwrap().success());
    }
    let run = folder.run(&["--workers", "1", "--root", &root, "--log-export", &url]).unwrap().serving().unwrap();
    run.get("/chatty?lines=1&errors=0").unwrap();
    let text = rsyslog.until(&run, |text| text.contains("LOG out stdout line 1 of 1"));
    assert!(!text.contains(" gaia hello."), "the first told it nothing: {text}");
    assert!(run.interrupt().unwrap().success());
}
