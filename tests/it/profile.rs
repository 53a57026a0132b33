//! Profiles: the numbers that the log's lines tell one by one, and where guests spend their time. None of these needs a
//! virtual machine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use gaia_tests::ANSWER_WITHIN;
use gaia_tests::workstation::{Folder, Run};
use serde_json::Value;

fn serving(graph: &str, arguments: &[&str]) -> (Folder, Run) {
    let folder = Folder::with(graph).unwrap();
    let run = folder.run(arguments).unwrap().serving().unwrap();
    (folder, run)
}

fn brane(name: &str, guest: &str, more: &str) -> String {
    format!("[brane.{name}]\nimage = \"file:./{guest}.wasm\"\n{more}\n")
}

/// What `gaia profile` says of one brane or instance.
fn profile(run: &Run, whose: &str) -> Value {
    run.ask(&format!("profile {whose}")).unwrap()["branes"][0].clone()
}

/// Waits until so many requests of it are counted.
fn counted(run: &Run, whose: &str, number: u64) -> Value {
    let until = Instant::now() + ANSWER_WITHIN;
    loop {
        let profile = profile(run, whose);
        if profile["exec"]["count"] == number {
            return profile;
        }
        assert!(Instant::now() < until, "not {number} requests: {profile}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The value of rank `part` of these, as the profile tells it.
fn quantile(sorted: &[u64], part: f64) -> u64 {
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let rank = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len());
    sorted[rank - 1]
}

/// Of each instance of a brane, what the log says: cold, exec, cpu, status.
fn logged(run: &Run, brane: &str) -> Vec<[u64; 4]> {
    let (_, lines, _) = run.gaia(&["--json", "logs", "--brane", brane]).unwrap();
    let mut all = BTreeMap::<String, [u64; 4]>::new();
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let Some(instance) = line["instance"].as_str() else { continue };
        // Serial numbers are a worker's own.
        let own = all.entry(format!("{} {}", line["core"], instance)).or_default();
        match line["kind"].as_str().unwrap() {
            "END" => {
                own[0] = line["cold_ns"].as_u64().unwrap();
                own[1] = line["exec_ns"].as_u64().unwrap();
            }
            "RES" => {
                own[2] = line["cpu_ns"].as_u64().unwrap();
                own[3] = line["status"].as_u64().unwrap();
            }
            _ => {}
        }
    }
    all.into_values().collect()
}

/// The same, once it is so: the log is emptied a moment later than counters are read.
fn logged_at_last(run: &Run, brane: &str, so: impl Fn(&[[u64; 4]]) -> bool) -> Vec<[u64; 4]> {
    let until = Instant::now() + ANSWER_WITHIN;
    loop {
        let lines = logged(run, brane);
        if so(&lines) || Instant::now() > until {
            return lines;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Would miss: numbers that are not those of the requests, a request that is counted twice or not at all, a quantile farther off
/// than is promised, answers that failed and are not told.
#[test]
fn the_numbers_are_those_of_the_log() {
    let limits = "limits = { deadline = \"300ms\" }";
    let graph = brane("burn", "burn", limits) + &brane("faulty", "faulty", "");
    let (_folder, run) = serving(&graph, &["--workers", "2"]);
    for n in 1..=60 {
        assert_eq!(run.get(&format!("/burn?n={}", n * 40_000)).unwrap().status, 200);
    }
    assert_eq!(run.get("/burn?n=1000000000000").unwrap().status, 504);
    let of = counted(&run, "--brane burn", 61);
    let whole = |lines: &[[u64; 4]]| lines.len() == 61 && lines.iter().all(|line| line[1] > 0 && line[3] > 0);
    let lines = logged_at_last(&run, "burn", whole);
    assert_eq!(lines.len(), 61);
    for (column, name) in ["cold", "exec", "cpu"].into_iter().enumerate() {
        let mut all: Vec<u64> = lines.iter().map(|line| line[column]).collect();
        all.sort_unstable();
        let told = &of[name];
        assert_eq!((told["count"].as_u64(), told["max"].as_u64()), (Some(61), all.last().copied()), "{name}: {told}");
        assert_eq!(told["sum"].as_u64(), Some(all.iter().sum()), "{name}");
        for (key, part) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)] {
            let (told, exact) = (told[key].as_u64().unwrap(), quantile(&all, part));
            assert!(told.abs_diff(exact) * 128 <= exact, "{name} {key}: {told}, and the log says {exact}");
        }
    }
    assert_eq!(
        (&of["requests"], &of["failed"], &of["late"], &of["traps"]),
        (&61.into(), &1.into(), &1.into(), &0.into())
    );
    assert!(of["mem"]["p50"].as_u64().unwrap() >= 1 << 17, "{of}");

    for how in ["trap", "none", "read", "trap"] {
        run.get(&format!("/faulty?how={how}")).unwrap();
    }
    let of = counted(&run, "--brane faulty", 4);
    assert_eq!((&of["requests"], &of["failed"], &of["traps"]), (&4.into(), &3.into(), &2.into()));
    let failed = |lines: &[[u64; 4]]| lines.iter().filter(|line| line[3] >= 500).count();
    assert_eq!(failed(&logged_at_last(&run, "faulty", |lines| failed(lines) == 3)), 3, "as the log has it");

    // What a person sees: the seed's four lines when its options are given, more without.
    let (_, text, _) = run.gaia(&["profile", "--brane", "burn", "--p50", "--p99"]).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["cold", "exec", "cpu", "mem"], "{text}");
    let begins = lines.iter().skip(1).map(|line| &line[..6]).collect::<Vec<_>>();
    assert_eq!(begins, ["P50   ", "P99   ", "RPS   "], "{text}");
    let (_, text, _) = run.gaia(&["profile", "--price", "0.04"]).unwrap();
    assert!(text.contains("ERR   1 of 61 requests (1.64 %)") && text.contains("\nfaulty\n"), "{text}");
    assert!(text.contains("core-seconds per million requests") && text.contains("per core-hour"), "{text}");
    let (status, _, error) = run.gaia(&["profile", "--brane", "nobody"]).unwrap();
    assert!(!status.success() && error.contains("there is no brane \"nobody\": burn, faulty"), "{error}");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: counts that fall when a worker is replaced, by a crash or by a deploy; a pinned instance without numbers of its own.
#[test]
fn nothing_falls_when_a_worker_is_replaced_and_pinned_instances_have_their_own() {
    let pinned = "replicas = 2\nexecution = { lifecycle = \"pinned\" }";
    let graph = brane("burn", "burn", "") + &brane("counter", "counter", pinned);
    let (folder, run) = serving(&graph, &["--workers", "2", "--watch"]);
    for _ in 0..20 {
        assert_eq!(run.get("/burn?n=12000000").unwrap().status, 200);
        assert_eq!(run.get("/counter").unwrap().status, 200);
    }
    let before = counted(&run, "--brane burn", 20);
    let seen = |run: &Run| {
        let (_, text, error) = run.gaia(&["--json", "profile", "--brane", "burn", "--flame", "f.svg"]).unwrap();
        serde_json::from_str::<Value>(&text).expect(&error)["samples"].as_u64().unwrap()
    };
    let before_all = seen(&run);
    assert!(before_all > 10, "{before_all} samples");
    let worker = i32::try_from(run.worker().unwrap()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(worker).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    run.error.line("was killed by SIGKILL").unwrap();
    folder.write(&graph.replace("[brane.burn]", "[brane.hello]\nimage = \"file:./burn.wasm\"\n[brane.burn]")).unwrap();
    run.error.line("serving generation 2").unwrap();
    let after = counted(&run, "--brane burn", 20);
    for what in ["cold", "exec", "cpu", "mem"] {
        assert_eq!(after[what], before[what], "{what}");
    }
    assert_eq!(after["requests"], 20);
    assert!(seen(&run) >= before_all);

    let all = counted(&run, "--brane counter", 20);
    let each = ["counter.001", "counter.002"].map(|name| profile(&run, &format!("--instance {name}")));
    let sum: u64 = each.iter().map(|of| of["exec"]["count"].as_u64().unwrap()).sum();
    assert_eq!((sum, &all["requests"], &all["cold"]["count"]), (20, &20.into(), &2.into()));
    let (status, _, error) = run.gaia(&["profile", "--instance", "burn.001"]).unwrap();
    assert!(!status.success() && error.contains("not pinned"), "{error}");
    assert!(run.interrupt().unwrap().success());
}

/// Has `burn` work for so long.
fn burn_for(run: &Run, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        // Most are shorter than two ticks.
        assert_eq!(run.get("/burn?n=5000000").unwrap().status, 200);
    }
}

/// Ticks in a flame graph, by function.
fn flame(svg: &str) -> BTreeMap<String, u64> {
    let titles = svg.split("<title>").skip(1).filter_map(|rest| rest.split_once("</title>")).map(|(title, _)| title);
    let one = |title: &str| {
        let (name, rest) = title.rsplit_once(" (").unwrap();
        (name.to_owned(), rest.split(' ').next().unwrap().parse().unwrap())
    };
    titles.map(one).collect()
}

/// The names of a stack, the youngest first, and its two values.
type Stack = (Vec<String>, [u64; 2]);

/// The samples of a profile, as `protoc` reads it, and their labels.
fn decoded(file: &Path) -> (Vec<Stack>, Vec<String>) {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("it");
    let unpacked = Command::new("gzip").args(["-d", "-c"]).arg(file).output().unwrap();
    assert!(unpacked.status.success(), "gzip: {}", String::from_utf8_lossy(&unpacked.stderr));
    let plain = file.with_extension("plain");
    std::fs::write(&plain, unpacked.stdout).unwrap();
    let mut protoc = Command::new("protoc");
    protoc.arg("--decode=perftools.profiles.Profile").arg(format!("--proto_path={}", schema.display()));
    let read = protoc.arg("profile.proto").stdin(std::fs::File::open(&plain).unwrap()).output().unwrap();
    assert!(read.status.success(), "protoc: {}", String::from_utf8_lossy(&read.stderr));
    let text = String::from_utf8(read.stdout).unwrap();
    let (mut strings, mut functions, mut samples, mut labels) = (Vec::new(), BTreeMap::new(), Vec::new(), Vec::new());
    let mut within = Vec::new();
    let (mut id, mut name, mut places, mut values) = (0, 0, Vec::new(), Vec::new());
    for line in text.lines().map(str::trim) {
        if let Some(message) = line.strip_suffix(" {") {
            within.push(message.to_owned());
            continue;
        }
        let Some((key, value)) = line.split_once(": ") else {
            match within.pop().as_deref() {
                Some("function") => drop(functions.insert(id, name)),
                Some("sample") => samples.push((std::mem::take(&mut places), std::mem::take(&mut values))),
                _ => {}
            }
            continue;
        };
        let number = || value.parse::<u64>().unwrap();
        // A field without a name is one that no reader of pprof's knows.
        assert!(key.parse::<u64>().is_err(), "{within:?}: {line}");
        match (within.last().map(String::as_str), key) {
            (None, "string_table") => strings.push(value.trim_matches('"').to_owned()),
            (Some("function"), "id") => id = number(),
            (Some("function"), "name") => name = number(),
            (Some("sample"), "location_id") => places.push(number()),
            (Some("sample"), "value") => values.push(number()),
            (Some("label"), "str") => labels.push(number()),
            _ => {}
        }
    }
    let text = |at: u64| strings[usize::try_from(at).unwrap()].clone();
    let named = |places: Vec<u64>| places.into_iter().map(|place| text(functions[&place])).collect();
    let samples = samples.into_iter().map(|(places, values)| (named(places), values.try_into().unwrap())).collect();
    (samples, labels.into_iter().map(text).collect())
}

/// Would miss: samples that are not where the guest is, guests shorter than two ticks that are never seen, waiting that is counted as
/// work, a profile that no other tool reads.
#[test]
fn flame_graphs_and_pprof_name_the_function_where_the_time_goes() {
    let graph = brane("burn", "burn", "") + &brane("wait", "wait", "capability = { clock = { resolution = \"ms\" } }");
    let (folder, run) = serving(&graph, &["--workers", "1"]);
    burn_for(&run, Duration::from_secs(3));
    run.get("/wait?sleep_ms=1000").unwrap();
    let (flame_file, pprof_file) = (folder.path().join("out.svg"), folder.path().join("out.pb.gz"));
    let files = ["--flame", "out.svg", "--pprof", "out.pb.gz"];
    let (status, said, error) = run.gaia(&[&["profile", "--brane", "burn"], files.as_slice()].concat()).unwrap();
    assert!(status.success() && said.contains("✓ wrote out.svg"), "{said}{error}");
    let of = profile(&run, "--brane burn");
    let boxes = flame(&std::fs::read_to_string(&flame_file).unwrap());
    let spin = boxes.iter().find(|(name, _)| name.ends_with("burn::spin")).map_or(0, |(_, ticks)| *ticks);
    let all = boxes["all"];
    eprintln!("{spin} of {all} samples in spin; cpu {}", of["cpu"]["sum"]);
    assert!(spin * 10 > all * 9, "{boxes:?}");
    assert_eq!(boxes["burn"], all);
    // A sample weighs a tick of 5 ms: together they are the processor time, as far as chance has it.
    let cpu_ms = of["cpu"]["sum"].as_u64().unwrap() / 1_000_000;
    assert!((cpu_ms / 2..=cpu_ms * 2).contains(&(all * 5)), "{all} samples of 5 ms, and {cpu_ms} ms of processor time");

    let (samples, labels) = decoded(&pprof_file);
    let values: u64 = samples.iter().map(|(_, [ticks, _])| *ticks).sum();
    let hot =
        samples.iter().filter(|(names, _)| names[0].ends_with("burn::spin")).map(|(_, [ticks, _])| *ticks).sum::<u64>();
    assert_eq!((values, hot), (all, spin), "as the flame graph has it");
    assert!(
        samples.iter().all(|(names, [ticks, nanos])| names.last().unwrap() == "burn" && *nanos == ticks * 5_000_000)
    );
    assert!(labels.iter().all(|label| label == "burn"), "{labels:?}");

    run.gaia(&["profile", "--flame", "all.svg"]).unwrap();
    let boxes = flame(&std::fs::read_to_string(folder.path().join("all.svg")).unwrap());
    let waited = boxes.get("wait").copied().unwrap_or(0);
    assert!(waited < 10, "a second of waiting is no work: {waited} samples");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a rate that is another than that of the requests, `--watch` that shows no more than one block where there is no
/// terminal, `--during` that tells what was before.
#[test]
fn the_rate_is_that_of_the_last_seconds() {
    let (_folder, run) = serving(&brane("hello", "hello", ""), &["--workers", "1"]);
    run.get("/hello").unwrap();
    let began = Instant::now();
    let mut sent = 0_u32;
    while began.elapsed() < Duration::from_secs(14) {
        run.get("/hello").unwrap();
        sent += 1;
        std::thread::sleep(Duration::from_millis(10));
    }
    let rate = profile(&run, "--brane hello")["rate"].clone();
    let (told, expected) = (rate["per_second"].as_f64().unwrap(), f64::from(sent) / began.elapsed().as_secs_f64());
    assert!((told / expected - 1.0).abs() < 0.3, "{rate}, and {expected} were sent");
    assert_ne!((&rate["trend"], &rate["trend"]), (&"idle".into(), &"new".into()), "{rate}");
    let (_, text, _) = run.gaia(&["profile", "--brane", "hello", "--during", "1s", "--max"]).unwrap();
    assert!(text.lines().nth(1).is_some_and(|line| line.starts_with("MAX   -")), "nothing was asked meanwhile: {text}");
    let mut watch = run.command(&["profile", "--brane", "hello", "--p50", "--watch"]);
    let watch = watch.stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(4));
    let pid = rustix::process::Pid::from_raw(i32::try_from(watch.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let text = String::from_utf8(watch.wait_with_output().unwrap().stdout).unwrap();
    assert!(text.matches("RPS   ").count() >= 2, "{text}");
    assert!(run.interrupt().unwrap().success());
}
