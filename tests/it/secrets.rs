//! Secrets: set by operators, given to the branes that name them, kept over restarts, and found nowhere else.
//!
//! `version` answers with its variable `VERSION`, which is a secret here. What is looked for is looked for in every file, line, answer and
//! process that there is, and where it must be it is found, so that the looking is known to work.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use gaia_qemu::Drive;
use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{ANSWER_WITHIN, Setup, data_disk, out};
use serde_json::Value;

use crate::remote::{Person, started_for};

const DATA: [&str; 4] = ["--data", "data", "--workers", "1"];
const HELLO: &str = "[brane.hello]\nimage = \"file:./hello.wasm\"\n";
/// Two branes that could be given the same secret, one of which names it; and a pinned one with its own.
const GRAPH: &str = r#"
[brane.version]
image = "file:./version.wasm"
replicas = 8
[brane.version.capability]
"env" = { secrets = ["VERSION"] }

[brane.other]
image = "file:./version.wasm"
replicas = 1
[brane.other.capability]
"env" = { vars = { MODE = "none" } }

[brane.counter]
image = "file:./counter.wasm"
replicas = 1
[brane.counter.capability]
"env" = { secrets = ["TOKEN"] }
[brane.counter.execution]
lifecycle = "pinned"
"#;
/// What no value here is without, and nothing else has.
const MARK: &str = "open-sesame-7c1f";

fn value(number: u32) -> String {
    format!("{MARK}-{number}")
}

/// A command whose standard input is this.
fn piped(run: &Run, arguments: &[&str], input: &str) -> Output {
    fed(run.command(arguments), input)
}

fn fed(mut command: Command, input: &str) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Who is refused before it reads may be gone.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Sets a secret, and says what was said.
fn set(run: &Run, brane: &str, name: &str, value: &str, more: &[&str]) -> Result<String, String> {
    let output = piped(run, &[&["secret", "set", brane, name], more].concat(), &format!("{value}\n"));
    if output.status.success() { Ok(said(&output)) } else { Err(said(&output)) }
}

/// Whether each secret is used, and where its value is, by brane and name.
fn listed(run: &Run) -> BTreeMap<(String, String), (bool, String)> {
    let list = run.ask("secret list").unwrap();
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_owned();
    let one = |e: &Value| ((text(e, "brane"), text(e, "name")), (e["used"].as_bool().unwrap(), text(e, "state")));
    list["secrets"].as_array().unwrap().iter().map(one).collect()
}

fn entry(run: &Run, brane: &str, name: &str) -> Option<(bool, String)> {
    listed(run).remove(&(brane.to_owned(), name.to_owned()))
}

/// The first line of what `version` answers.
fn version(run: &Run) -> String {
    run.get("/version?kib=1").unwrap().text().lines().next().unwrap_or_default().to_owned()
}

fn contains(bytes: &[u8], what: &str) -> bool {
    bytes.windows(what.len()).any(|piece| piece == what.as_bytes())
}

/// Every file below a folder that contains this.
fn files_with(folder: &Path, what: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, what));
        } else if path.is_file() && contains(&std::fs::read(&path).unwrap(), what) {
            found.push(path.display().to_string());
        }
    }
    found
}

/// The processes of a run, by role; the launcher is `run`.
fn processes(run: &Run) -> BTreeMap<String, i64> {
    let status = run.ask("status").unwrap();
    let roles = status["roles"].as_array().unwrap().iter();
    let roles = roles.map(|role| (role["name"].as_str().unwrap().to_owned(), role["pid"].as_i64().unwrap()));
    roles.filter(|(name, pid)| *pid > 0 && name != "init").chain([("run".to_owned(), i64::from(run.pid()))]).collect()
}

/// Whether a process has this in its memory: in what of it is there (`proc_pid_pagemap(5)`).
fn remembers(pid: i64, what: &str) -> bool {
    const PAGE: u64 = 4096;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut mapping = None;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        if let Some((from, to)) = range.filter(|_| !line.contains("kB")) {
            let number = |hex: &str| u64::from_str_radix(hex, 16).unwrap();
            mapping = Some((number(from), number(to)));
        }
        let touched = line.strip_prefix("Rss:").is_some_and(|rss| rss.trim() != "0 kB");
        let Some((from, to)) = mapping.filter(|_| touched) else { continue };
        let mut run: Vec<u8> = Vec::new();
        let mut entries = vec![0; 1 << 20];
        let mut at = from;
        while at < to {
            let most = entries.len().min(usize::try_from((to - at) / PAGE).unwrap() * 8);
            let read = pagemap.read_at(&mut entries[..most], at / PAGE * 8).unwrap_or(0);
            if read == 0 {
                break;
            }
            for entry in entries[..read].chunks_exact(8) {
                let mut page = [0; 4096];
                let there = u64::from_le_bytes(entry.try_into().unwrap()) >> 63 == 1;
                if there && memory.read_exact_at(&mut page, at).is_ok() {
                    run.extend_from_slice(&page);
                } else if !run.is_empty() {
                    if contains(&run, what) {
                        return true;
                    }
                    run.clear();
                }
                at += PAGE;
            }
        }
        if contains(&run, what) {
            return true;
        }
    }
    false
}

/// Deploys the graph with both of its secrets set.
fn with_both(folder: &Folder) -> Run {
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    folder.put("v.toml", GRAPH).unwrap();
    for guest in ["version.wasm", "counter.wasm"] {
        std::fs::copy(out("branes").join(guest), folder.path().join(guest)).unwrap();
    }
    let (status, _, error) = run.gaia(&["deploy", "v.toml"]).unwrap();
    assert!(!status.success() && error.contains("version needs a value for the secret \"VERSION\""), "{error}");
    assert!(
        error.contains("gaia secret set version VERSION") && error.contains("gaia secret set counter TOKEN"),
        "{error}"
    );
    assert_eq!(run.get("/hello").unwrap().status, 200, "nothing has changed");
    let told = set(&run, "version", "VERSION", &value(1), &[]).unwrap();
    assert!(told.contains("✓ VERSION of version is set · nothing that serves uses it"), "{told}");
    set(&run, "counter", "TOKEN", &format!("{MARK}-of-counter"), &[]).unwrap();
    assert_eq!(entry(&run, "version", "VERSION"), Some((false, "set".into())));
    let (status, _, error) = run.gaia(&["deploy", "v.toml"]).unwrap();
    assert!(status.success(), "{error}");
    assert_eq!(version(&run), value(1));
    run
}

/// Would miss: a secret that does not reach its brane or reaches another, that a restart forgets, or that stands in a file, a line, an
/// answer, a command line, an environment or the memory of a process that has nothing to do with it; a damaged one that takes the
/// others with it or goes without a word.
#[test]
fn secrets_reach_the_brane_that_names_them_outlive_a_restart_and_are_found_nowhere_else() {
    let folder = Folder::with(HELLO).unwrap();
    let run = with_both(&folder);
    assert!(!run.get("/other?kib=1").unwrap().text().contains(MARK));
    assert_eq!(entry(&run, "version", "VERSION"), Some((true, "set".into())));
    let of_counter = format!("{MARK}-of-counter");

    let mut answers = Vec::new();
    for what in ["status", "ps", "graphs", "secret list", "secret list version"] {
        answers.push(run.ask(what).unwrap().to_string());
    }
    for arguments in [&["logs"][..], &["secret", "list"], &["deploy", "v.toml", "--dry-run"]] {
        let (_, output, error) = run.gaia(arguments).unwrap();
        answers.extend([output, error]);
    }
    assert!(answers.iter().any(|answer| answer.contains("secret set version VERSION")), "it leaves a line in the log");
    answers.extend([run.output.all(), run.error.all()].concat());
    for answer in &answers {
        assert!(!answer.contains(MARK), "{answer}");
    }
    assert_eq!(files_with(folder.path(), MARK), [] as [&str; 0]);

    let processes = processes(&run);
    let holds = |role: &str, what: &str| remembers(processes[role], what);
    for (role, pid) in &processes {
        for file in ["cmdline", "environ"] {
            assert!(!contains(&std::fs::read(format!("/proc/{pid}/{file}")).unwrap(), MARK), "{role}: {file}");
        }
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert!(role == "run" || cores.split_whitespace().any(|word| word == "1"), "{role}: {cores}");
    }
    assert!(holds("worker@0", &value(1)), "what is there is not found");
    assert!(holds("keeper@counter.001", &of_counter), "what is there is not found");
    assert!(!holds("worker@0", &of_counter), "a worker has what is a keeper's");
    assert!(!holds("keeper@counter.001", &value(1)), "a keeper has what is a worker's");
    for role in ["run", "log"] {
        assert!(!holds(role, MARK), "{role} has it in its memory");
    }

    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    assert_eq!(version(&run), value(1));
    assert!(run.interrupt().unwrap().success());

    // Both copies of one of the two.
    let records = folder.path().join("data/records");
    let is_of = |path: &Path, brane: &str| contains(&std::fs::read(path).unwrap(), &format!("\"brane\":\"{brane}\""));
    let all = std::fs::read_dir(records).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let damaged: Vec<_> = all.iter().filter(|path| is_of(path, "version")).collect();
    assert_eq!(damaged.len(), 2, "{all:?}");
    for path in damaged {
        let mut bytes = std::fs::read(path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    run.error.line("version serves without the secret \"VERSION\", which has no value").unwrap();
    run.error.line("gaia secret set version VERSION").unwrap();
    assert_eq!(version(&run), "");
    assert_eq!(entry(&run, "version", "VERSION"), Some((true, "unset".into())));
    assert_eq!(entry(&run, "counter", "TOKEN"), Some((true, "set".into())));
    set(&run, "version", "VERSION", &value(2), &[]).unwrap();
    assert_eq!(version(&run), value(2));
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a request that is lost when a value changes, an old value after the change has answered, a pinned instance whose state
/// ends for a secret that it does not have, or without anybody having agreed; a secret in use that is removed by mistake.
#[test]
fn a_changed_value_is_given_at_once_and_no_request_is_lost() {
    let folder = Folder::with(HELLO).unwrap();
    let run = with_both(&folder);
    assert_eq!(run.get("/counter").unwrap().text(), "count 1\n");
    let (stop, wrong, answers) = (AtomicBool::new(false), Mutex::new(Vec::new()), Mutex::new(0_u32));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    match run.get("/version?kib=4") {
                        Ok(answer) if answer.status == 200 => {
                            let text = answer.text();
                            let first = text.lines().next().unwrap_or_default();
                            if !first.starts_with(MARK) || text.lines().any(|line| line != first) {
                                wrong.lock().unwrap().push(text);
                            }
                            *answers.lock().unwrap() += 1;
                        }
                        other => wrong.lock().unwrap().push(format!("{other:?}")),
                    }
                }
            });
        }
        let changed = (2..6).try_for_each(|number| {
            let told = set(&run, "version", "VERSION", &value(number), &[])?;
            let now = version(&run);
            let right = now == value(number) && told.contains("is set anew · generation");
            right.then_some(()).ok_or_else(|| format!("{number}: {now}: {told}"))
        });
        // The same again changes nothing.
        let same = set(&run, "version", "VERSION", &value(5), &[]);
        stop.store(true, Relaxed);
        changed.unwrap();
        assert!(same.unwrap().contains("nothing that serves"));
    });
    assert_eq!(*wrong.lock().unwrap(), [] as [String; 0]);
    assert!(*answers.lock().unwrap() > 10);
    assert_eq!(run.get("/counter").unwrap().text(), "count 2\n", "its state went on");

    let refused = set(&run, "counter", "TOKEN", "another", &[]).unwrap_err();
    assert!(refused.contains("ends the state of counter.001") && refused.contains("--yes"), "{refused}");
    assert_eq!(run.get("/counter").unwrap().text(), "count 3\n");
    set(&run, "counter", "TOKEN", "another", &["--yes"]).unwrap();
    assert_eq!(run.get("/counter").unwrap().text(), "count 1\n");

    let (status, _, error) = run.gaia(&["secret", "rm", "version", "VERSION"]).unwrap();
    assert!(!status.success() && error.contains("gaia secret rm --force version VERSION"), "{error}");
    assert_eq!(version(&run), value(5));
    let (status, output, _) = run.gaia(&["secret", "rm", "--force", "version", "VERSION"]).unwrap();
    assert!(status.success() && output.contains("serves without it"), "{output}");
    assert_eq!((version(&run).as_str(), entry(&run, "version", "VERSION")), ("", Some((true, "unset".into()))));
    let (status, _, error) = run.gaia(&["secret", "rm", "version", "VERSION"]).unwrap();
    assert!(!status.success() && error.contains("there is no secret VERSION of version"), "{error}");
    // As it was left, it is started again: nobody is there to be told.
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    assert_eq!(version(&run), "");
    let (status, _, error) = run.gaia(&["deploy", "v.toml"]).unwrap();
    assert!(!status.success() && error.contains("gaia secret set version VERSION"), "{error}");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a value that a terminal shows or an argument carries, one that is taken although it cannot be given, requests without a
/// bound, and a file of `--secrets` that counts for nothing beside the store, or is not told of.
#[test]
fn a_value_is_typed_unseen_or_piped_and_what_cannot_be_given_is_refused() {
    let folder = Folder::with(HELLO).unwrap();
    let run = with_both(&folder);
    // util-linux's `script` is the terminal.
    let gaia = format!("{} --api {} secret set version VERSION", out("bin/gaia").display(), run.socket().display());
    let mut script = Command::new("script");
    script.args(["-qec", &gaia, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut script = script.spawn().unwrap();
    let (mut keys, mut screen) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
    let (mut shown, deadline) = (Vec::new(), Instant::now() + ANSWER_WITHIN);
    let mut piece = [0; 256];
    let mut read = |shown: &mut Vec<u8>| {
        let count = std::io::Read::read(&mut screen, &mut piece).unwrap_or(0);
        shown.extend_from_slice(&piece[..count]);
        count > 0
    };
    while !contains(&shown, "which is not shown: ") && Instant::now() < deadline && read(&mut shown) {}
    keys.write_all(format!("{}\n", value(7)).as_bytes()).unwrap();
    while read(&mut shown) {}
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(script.wait().unwrap().success(), "{shown}");
    assert!(shown.contains("VERSION of version, which is not shown: ") && shown.contains("is set anew"), "{shown}");
    assert!(!shown.contains(MARK), "{shown}");
    assert_eq!(version(&run), value(7));

    let (status, _, error) = run.gaia(&["secret", "set", "version", "VERSION", &value(8)]).unwrap();
    assert_eq!((status.code(), error.contains("unexpected argument")), (Some(2), true), "{error}");
    for (brane, name, value, words) in [
        ("version", "VERSION", String::new(), "none came"),
        ("version", "VERSION", "a\0b".into(), "byte 0"),
        ("version", "VERSION", "a".repeat(65_537), "at most 65536 bytes"),
        ("Version", "VERSION", "a".into(), "a brane's name has 1 to 48 of a-z"),
        ("version", "1", "a".into(), "a secret's name has letters"),
    ] {
        let refused = set(&run, brane, name, &value, &[]).unwrap_err();
        assert!(refused.contains(words), "{refused}");
    }
    assert_eq!(version(&run), value(7));
    set(&run, "many", "LARGE", &"b".repeat(65_536), &[]).unwrap();
    for number in 0..63 {
        let name = format!("N{number}");
        let told = set(&run, "many", &name, "a", &[]).unwrap();
        assert!(told.contains("nothing that serves"), "{told}");
    }
    assert!(set(&run, "many", "ONE_MORE", "a", &[]).unwrap_err().contains("many has 64 secrets already"));
    // What is wrong with a request is told without what it has in it.
    let request = format!("{{\"brane\":\"version\",\"name\":\"VERSION\",\"value\":[\"{MARK}\"]}}");
    let answer = posted(&run, &request);
    assert!(answer.contains(" 400 ") && !answer.contains(MARK), "{answer}");
    assert!(posted(&run, &"x".repeat(500_000)).contains(" 413 "));
    assert!(run.output.all().iter().chain(&run.error.all()).all(|line| !line.contains(MARK)));
    assert!(run.interrupt().unwrap().success());

    // A file besides: it is what counts, and it is told.
    let file = folder.path().join("secrets.toml");
    std::fs::write(&file, format!("[version]\nVERSION = \"{}\"\n", value(9))).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let run = folder.run(&[&DATA[..], &["--secrets", "secrets.toml"]].concat()).unwrap().serving().unwrap();
    assert_eq!((version(&run), entry(&run, "version", "VERSION")), (value(9), Some((true, "of_file".into()))));
    assert!(set(&run, "version", "VERSION", &value(10), &[]).unwrap().contains("the file of --secrets says another"));
    assert_eq!(version(&run), value(9));
    assert!(run.interrupt().unwrap().success());
    let run = folder.run(&DATA).unwrap().serving().unwrap();
    assert_eq!(version(&run), value(10));
    assert!(run.interrupt().unwrap().success());
    // With nothing to keep it in.
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    assert!(set(&run, "version", "VERSION", "a", &[]).unwrap_err().contains("no data disk"));
}

/// Posts this to the API, and returns the answer's beginning.
fn posted(run: &Run, body: &str) -> String {
    let mut stream = std::os::unix::net::UnixStream::connect(run.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let head =
        format!("POST /v1/secrets HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    // It may be refused before all of it is sent.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    let mut answer = vec![0; 4096];
    let read = std::io::Read::read(&mut stream, &mut answer).unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

/// Would miss: an appliance that forgets a secret with its power, an operator who cannot set one over the network or at the prompt, a
/// console that shows what is typed, and a role that can be looked into.
#[test]
fn an_appliance_with_a_data_disk_keeps_them_and_nobody_looks_into_its_roles() {
    let ann = Person::new();
    let disk = data_disk().unwrap();
    let graph = "[brane.version]\nimage = \"file:./version.wasm\"\n[brane.version.capability]\n\"env\" = { secrets = [\"VERSION\"] }\n";
    let (appliance, key) = started_for(&ann, Setup::default().data(Drive::file(&disk)));
    let port = appliance.control_port().unwrap();
    ann.does(port, &["--accept-key", &key.to_string(), "status"]);
    let folder = ann.folder.path();
    std::fs::write(folder.join("v.toml"), graph).unwrap();
    std::fs::copy(out("branes/version.wasm"), folder.join("version.wasm")).unwrap();
    let manifest = folder.join("v.toml").display().to_string();
    let refused = said(&ann.on(port, &["deploy", &manifest]));
    assert!(refused.contains("gaia secret set version VERSION"), "{refused}");
    let mut command = Command::new(out("bin/gaia"));
    let on = format!("127.0.0.1:{port}");
    command.args(["--on", &on, "secret", "set", "version", "VERSION"]).env("XDG_CONFIG_HOME", folder);
    let told = fed(command, &value(1));
    assert!(told.status.success(), "{}", said(&told));
    ann.does(port, &["deploy", &manifest]);
    let list = ann.does(port, &["secret", "list"]);
    assert!(list.contains("ann from 10.0.2.2") && list.contains("yes"), "{list}");
    let answered = |appliance: &gaia_tests::Appliance| appliance.get("/version?kib=1").unwrap().text();
    assert!(answered(&appliance).starts_with(&value(1)));
    for role in ["control", "worker@1", "console"] {
        let pid = appliance.pid(role).unwrap();
        assert_eq!(appliance.owner(&format!("/proc/{pid}/fd")).unwrap(), 0, "{role} can be looked into by its user");
    }
    let transcript = appliance.power_off().unwrap();
    assert!(transcript.contains("secret set version VERSION") && !transcript.contains(MARK), "{transcript}");
    assert!(!contains(&std::fs::read(&disk).unwrap(), MARK), "it is on the disk");

    let (appliance, _) = started_for(&ann, Setup::default().data(Drive::file(&disk)));
    assert!(answered(&appliance).starts_with(&value(1)));
    let console = appliance.machine().console();
    let set = |typed: &str, told: &str| {
        console.send_line("secret set version VERSION").unwrap();
        console.wait_for("VERSION of version, which is not shown: ", ANSWER_WITHIN).unwrap();
        console.send_bytes(typed.as_bytes()).unwrap();
        appliance.line(told, ANSWER_WITHIN).unwrap()
    };
    set(&format!("{}\x03", value(2)), "nothing is changed");
    assert!(answered(&appliance).starts_with(&value(1)));
    // A mistake is taken back.
    set(&format!("{}9\x7f\r", value(3)), "VERSION of version is set anew");
    assert!(answered(&appliance).starts_with(&value(3)));
    // What was typed is not among the lines that the arrow brings back.
    console.send_bytes(b"\x1b[A\x1b[A").unwrap();
    console.wait_for("secret set version VERSION", ANSWER_WITHIN).unwrap();
    console.send_bytes(b"\x15").unwrap();
    let transcript = appliance.power_off().unwrap();
    assert!(!transcript.contains(MARK), "{transcript}");
}
