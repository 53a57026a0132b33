//! The pictures of the product page come true: its manifest as it is printed there, and what a terminal shows of it, line for
//! line.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Result;
use gaia_qemu::Drive;
use gaia_tests::picture::Picture;
use gaia_tests::terminal::Shell;
use gaia_tests::{ANSWER_WITHIN, Appliance, BOOT_WITHIN, SETTINGS, Setup, data_disk, out};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::egress::{names_at, secure_at};
use crate::pictures::{entered, holds};
use crate::remote::Person;

/// The product page's manifest, byte for byte.
const MANIFEST: &[u8] = include_bytes!("../../runtime/manifest/tests/right/seed.zgraph.toml");
/// What it shows of `ω gaia logs --brane fetch --since 30s`. It leaves out the end of the fourth line, and what follows the fifth.
const LOGS: [&str; 5] = [
    "Ω 13:41:07.118 fetch.034 REQ api.openalex.org/works bytes=12,422 dur=42ms",
    "Ω 13:41:07.118 fetch.034 RES 200 cpu=8ms",
    "Ω 13:41:07.121 fetch.034 END cold=1.1ms exec=42ms pooled✓",
    "Ω 13:41:07.198 fetch.039 REQ api.crossref.org/works/...",
    "Ω 13:41:07.241 fetch.039 RES 200 cpu=11ms",
];
/// What it shows of `ω gaia profile --brane fetch --p50 --p99`, in rows.
const PROFILE: [&str; 4] = [
    "      cold    exec    cpu    mem",
    "P50   1.0ms   42ms    8ms    18MiB",
    "P99   1.4ms   210ms   63ms   42MiB",
    "RPS   1.41 K (steady)",
];
/// The bytes of the page that its first line tells of.
const PAGE_BYTES: usize = 12_422;

/// How often a request comes whose rate is to be steady, and how long it may take to be so.
const PACE: Duration = Duration::from_millis(250);
const STEADY_WITHIN: Duration = Duration::from_mins(2);
/// What else a rate may be while requests come.
const TRENDS: [&str; 3] = ["(rising)", "(falling)", "(bursty)"];

/// Where both catalogues are, for the resolver: the gateway of the appliance's network, which leads to the test. An address that
/// anybody may connect to, as theirs are.
const GATEWAY: &str = "9.9.9.2";
const NETWORK: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 0);

/// The environment of a test that has a network of its own.
const ALONE: &str = "GAIA_TEST_ALONE";

/// Runs a test once more, in a network namespace of its own, whose loopback is nobody else's: there it may listen on ports 53 and
/// 443, and an appliance's gateway may have any address. Whether this is that other run.
fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        loopback_up();
        return true;
    }
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.arg("--net").arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]).env(ALONE, "1");
    let status = command.status().unwrap();
    assert!(status.success(), "in a network of its own: {status}");
    false
}

/// Brings up the loopback of a network namespace that was just made (Linux, `include/uapi/linux/rtnetlink.h`).
fn loopback_up() {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = [&32_u32.to_ne_bytes()[..], &RTM_NEWLINK.to_ne_bytes(), &REQUEST_AND_ACK.to_ne_bytes()].concat();
    // Number and sender of the message, family and type of the interface: any. The loopback is the first one of each namespace.
    message.extend([0; 12]);
    message.extend([1_u32, IFF_UP, IFF_UP].iter().flat_map(|word| word.to_ne_bytes()));
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None).unwrap();
    rustix::net::sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).unwrap();
    let mut answer = [0; 64];
    let (length, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty()).unwrap();
    assert!(length >= 20 && answer[16..20] == [0; 4], "the loopback stays down: {answer:?}");
}

/// A page of `OpenAlex` with so many bytes as in the picture, and one of Crossref.
fn page(head: &str) -> String {
    if head.contains("\r\nhost: api.crossref.org\r\n") || head.contains("\r\nHost: api.crossref.org\r\n") {
        return r#"{"message":{"total-results":2,"items":[{"DOI":"10.1/1","title":["two"]}]}}"#.to_owned();
    }
    let around = r#"{"meta":{"count":7},"results":[{"id":"https://openalex.org/W1","title":"one","abstract":""}]}"#;
    around.replace("\"\"", &format!("\"{}\"", "a".repeat(PAGE_BYTES - around.len())))
}

/// A line of the log without what is another each time: `Ω HH:MM:SS.mmm fetch.NNN RES 200 cpu=T`.
fn form(line: &str) -> String {
    let all = |text: &str, min: usize| text.len() >= min && text.bytes().all(|b| b.is_ascii_digit());
    let is_clock = |word: &str| {
        let parts: Vec<&str> = word.split([':', '.']).collect();
        word.len() == 12 && parts.len() == 4 && parts.iter().all(|part| all(part, 2))
    };
    let is_duration = |word: &str| {
        let number = word.strip_suffix("µs").or(word.strip_suffix("ms")).or(word.strip_suffix('s'));
        number.is_some_and(|number| {
            let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
            all(whole, 1) && all(tenth, 1) && tenth.len() == 1
        })
    };
    let masked = |word: &str| match word.split_once('=') {
        Some((name @ ("dur" | "cpu" | "cold" | "exec"), value)) if is_duration(value) => format!("{name}=T"),
        _ if is_clock(word) => "HH:MM:SS.mmm".to_owned(),
        _ if word.strip_prefix("fetch.").is_some_and(|serial| all(serial, 3)) => "fetch.NNN".to_owned(),
        _ => word.to_owned(),
    };
    line.split(' ').map(masked).collect::<Vec<_>>().join(" ")
}

/// Whether these are the lines of the picture.
fn are_the_pictures(lines: &[String]) -> Result<(), String> {
    let whose = |at: usize| lines.get(at).and_then(|line| line.split(' ').nth(2));
    for (at, wanted) in LOGS.iter().enumerate() {
        let line = lines.get(at).ok_or(format!("no line {at}"))?;
        let same = match wanted.strip_suffix("...") {
            Some(begin) => form(line).starts_with(&form(begin)),
            None => form(line) == form(wanted),
        };
        if !same {
            return Err(format!("{line:?} is not as {wanted:?}"));
        }
    }
    let [first, second] = [0..3, 3..5].map(|these| these.clone().all(|at| whose(at) == whose(these.start)));
    if !first || !second || whose(0) == whose(3) {
        return Err("the instances are others".into());
    }
    // After those of the picture comes the end of the second instance, and nothing else.
    match lines.get(5..) {
        Some([end]) if form(end) == form(LOGS[2]) => Ok(()),
        rest => Err(format!("in the end: {rest:?}")),
    }
}

/// A row of the table without what is another each time, word by word: `P50 T T T SIZE`, `RPS N (steady)`.
fn row_form(row: &str) -> Vec<String> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || b == b'.') && text.parse::<f64>().is_ok();
    let of = |word: &str, units: &[&str]| units.iter().any(|unit| word.strip_suffix(unit).is_some_and(number));
    let masked = |word: &str| match word {
        _ if of(word, &["µs", "ms", "s"]) => "T".to_owned(),
        _ if of(word, &["KiB", "MiB"]) => "SIZE".to_owned(),
        _ if number(word) => "N".to_owned(),
        // A thousand requests a second, or fewer.
        "K" => String::new(),
        _ => word.to_owned(),
    };
    row.split_whitespace().map(masked).filter(|word| !word.is_empty()).collect()
}

/// Whether this is the table of the picture: the same rows, and each value below the name of its column.
fn is_the_pictures(rows: &[String]) -> Result<(), String> {
    let forms = |rows: &mut dyn Iterator<Item = &str>| rows.map(row_form).collect::<Vec<_>>();
    let (seen, wanted) = (forms(&mut rows.iter().map(String::as_str)), forms(&mut PROFILE.into_iter()));
    if seen != wanted {
        return Err(format!("{seen:?} is not {wanted:?}"));
    }
    let columns = |row: &str| -> Vec<usize> {
        let cells: Vec<char> = row.chars().collect();
        (6..cells.len()).filter(|at| cells[*at] != ' ' && cells[at - 1] == ' ').collect()
    };
    let all: Vec<_> = rows[..3].iter().map(|row| columns(row)).collect();
    if all.iter().all(|row| *row == all[0]) { Ok(()) } else { Err(format!("the columns begin at {all:?}")) }
}

/// An appliance with nothing on its disk, for `ann`, whose command knows it as `edge`.
fn appliance_of(ann: &Person, authority: String, disk: &Path) -> Appliance {
    let settings = SETTINGS.replace("10.0.2.15", "9.9.9.15").replace("10.0.2.2", GATEWAY).replace("10.0.2.3", GATEWAY);
    let settings = format!("{settings}\n[egress]\nroots = [\"test-ca.pem\"]\n[operators]\nann = \"{}\"\n", ann.key);
    let setup = Setup::default().no_graph().production().settings(settings).file("test-ca.pem", authority);
    let appliance = Appliance::start(&setup.data(Drive::file(disk)).network(NETWORK)).unwrap();
    let line = appliance.line("control: key ed25519:", BOOT_WITHIN).unwrap();
    let key = line.split(' ').find(|word| word.starts_with("ed25519:")).unwrap().to_owned();
    appliance.line("gaia: serving generation", BOOT_WITHIN).unwrap();
    let port = appliance.control_port().unwrap();
    ann.does(port, &["trust", &key]);
    let hosts = format!("edge = {{ address = \"127.0.0.1\", port = {port} }}\n");
    std::fs::write(ann.folder.path().join("gaia/hosts.toml"), hosts).unwrap();
    appliance
}

/// Asks for a profile in a shell and at the serial prompt while requests come; what the shell shows once their rate is steady.
fn profiled(appliance: &Appliance, shell: impl Fn() -> Result<Shell>) -> Picture {
    let profile = "profile --brane fetch --p50 --p99";
    let over = AtomicBool::new(false);
    let (steady, typed) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let until = Instant::now() + STEADY_WITHIN * 2;
            while !over.load(Relaxed) && Instant::now() < until {
                let next = Instant::now() + PACE;
                assert_eq!(appliance.get("/fetch").unwrap().status, 200);
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        let asked = |_: &Appliance| {
            let shell = shell()?;
            shell.enter(&format!("gaia {profile}"), ANSWER_WITHIN)?;
            Ok(shell.picture())
        };
        let is_steady = |seen: &Picture| seen.lines().iter().any(|row| row.ends_with("(steady)"));
        let steady = appliance.until(STEADY_WITHIN, asked, is_steady).unwrap();
        let typed = ["", "gaia ", "ω gaia "].map(|before| entered(appliance, &format!("{before}{profile}")));
        over.store(true, Relaxed);
        (steady, typed)
    });
    for seen in [&steady].into_iter().chain(&typed) {
        // A moment later the rate may have become another: that it can be steady was seen.
        let usual = |row: &String| TRENDS.iter().fold(row.clone(), |row, trend| row.replace(trend, "(steady)"));
        let rows: Vec<String> = seen.lines().iter().skip(1).map(usual).collect();
        assert_eq!(is_the_pictures(&rows), Ok(()), "{}", seen.lines().join("\n"));
    }
    steady
}

/// Would miss: a manifest that does not deploy as it is printed, a request that does not get to api.openalex.org or is not believed
/// to be there, and lines of the log that look otherwise than on the product page, whichever way they are asked for.
#[test]
fn the_pictures_of_the_product_page_come_true_line_for_line() {
    if !alone("seed::the_pictures_of_the_product_page_come_true_line_for_line") {
        return;
    }
    let sites = ["api.openalex.org", "api.crossref.org"];
    names_at("127.0.0.1:53", &[(sites[0], &[&[GATEWAY]]), (sites[1], &[&[GATEWAY]])]);
    let (authority, _server) = secure_at("127.0.0.1:443", &sites, page);
    let (ann, disk) = (Person::new(), data_disk().unwrap());
    let appliance = appliance_of(&ann, authority, &disk);
    let port = appliance.control_port().unwrap();

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("essentials.zgraph.toml"), MANIFEST).unwrap();
    std::fs::copy(out("branes/cloud-fetch.wasm"), folder.path().join("cloud-fetch.wasm")).unwrap();
    let config = ann.folder.path().to_string_lossy().into_owned();
    let variables = [("XDG_CONFIG_HOME", config.as_str()), ("GAIA_ON", "edge"), ("USER", "ann")];
    let shell = Shell::in_folder(folder.path(), &variables).unwrap();
    shell.enter("gaia push omega/cloud-fetch:2.4.1 cloud-fetch.wasm", ANSWER_WITHIN).unwrap();
    shell.enter("gaia deploy essentials.zgraph.toml", BOOT_WITHIN).unwrap();
    let deployed = shell.picture();
    let text = deployed.lines().join("\n");
    for wanted in [
        "\n! fetch          is granted net.http api.openalex.org\n",
        "\n! fetch          is granted net.http *.crossref.org\n",
        "\nwarning: nothing that fetch imports needs \"fs.tmp\"\n",
        "\nwarning: nothing that fetch imports needs \"clock\"\n",
        "\n✓ graph 1 serves ",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
    assert!(!entered(&appliance, "status").lines().join("\n").contains("no graph"), "what was untrue is gone");

    let ends = |count: usize| {
        let logs = |_: &Appliance| Ok(ann.does(port, &["logs", "--brane", "fetch", "--since", "5m"]));
        appliance.until(ANSWER_WITHIN, logs, |logs| logs.matches(" END ").count() == count).unwrap();
    };
    let second = "/fetch?url=https%3A%2F%2Fapi.crossref.org%2Fworks%2F%3Frows%3D3";
    let asked = |before: usize| {
        for (n, (path, words)) in
            [("/fetch", "\"title\":\"one\""), (second, "\"title\":\"two\"")].into_iter().enumerate()
        {
            let answer = appliance.get(path).unwrap();
            assert!(answer.status == 200 && answer.text().contains(words), "{}: {}", answer.status, answer.text());
            ends(before + n + 1);
        }
    };
    let lines =
        |lines: Vec<String>| -> Vec<String> { lines.into_iter().filter(|line| line.starts_with("Ω ")).collect() };
    let logs = "logs --brane fetch --since 30s";
    let shell = Shell::in_folder(folder.path(), &variables).unwrap();
    asked(0);
    shell.enter(&format!("gaia {logs}"), ANSWER_WITHIN).unwrap();
    let seen = shell.picture();
    are_the_pictures(&lines(seen.lines())).unwrap_or_else(|e| panic!("{e} in\n{}", seen.lines().join("\n")));
    for (n, before) in ["", "gaia ", "ω gaia "].into_iter().enumerate() {
        asked(2 * n + 2);
        let typed = entered(&appliance, &format!("{before}{logs}"));
        // Some of those before them may be younger than 30 seconds, too.
        let all = lines(typed.lines());
        let last = &all[all.len().saturating_sub(6)..];
        are_the_pictures(last).unwrap_or_else(|e| panic!("{e} in\n{}", typed.lines().join("\n")));
    }

    let measured = profiled(&appliance, || Shell::in_folder(folder.path(), &variables));
    let words = "How long and how large the work of a brane is, and how much of it there is";
    holds("profile", words, &measured).unwrap();
    holds("deploy", "The first deploy of the product page's manifest: what is granted, what is too much", &deployed)
        .unwrap();
    holds("logs", "What became of two requests", &seen).unwrap();
    appliance.power_off().unwrap();
}

#[test]
fn a_table_of_another_form_is_none_of_the_pictures() {
    let rows = PROFILE.map(String::from).to_vec();
    is_the_pictures(&rows).unwrap();
    for (at, wrong) in [
        (0, "      cold    exec    cpu    memory"),
        (1, "P50   1.0ms   42ms    8ms    18 MiB"),
        (1, "P50   1.0     42ms    8ms    18MiB"),
        (1, "P50   -       42ms    8ms    18MiB"),
        (2, "P99   1.4ms  210ms    63ms   42MiB"),
        (2, "P90   1.4ms   210ms   63ms   42MiB"),
        (3, "RPS   1.41 K"),
    ] {
        let mut others = rows.clone();
        others[at] = wrong.into();
        assert!(is_the_pictures(&others).is_err(), "{wrong}");
    }
    assert!(is_the_pictures(&rows[..3]).is_err());
}

#[test]
fn a_line_of_another_form_is_none_of_the_pictures() {
    let mut lines = LOGS.map(String::from).to_vec();
    lines[3] = "Ω 13:41:07.198 fetch.039 REQ api.crossref.org/works/ bytes=7 dur=1.1s".into();
    lines.push("Ω 13:41:07.241 fetch.039 END cold=99µs exec=4ms pooled✓".into());
    are_the_pictures(&lines).unwrap();
    for (at, wrong) in [
        (0, "Ω 13:41:07.118 fetch.034 REQ api.openalex.org/works bytes=12422 dur=42ms"),
        (0, "Ω 13:41:07.118 fetch.34 REQ api.openalex.org/works bytes=12,422 dur=42ms"),
        (1, "Ω 13:41:07.118 fetch.034 RES 200 cpu=8 ms"),
        (1, "Ω 13:41:07 fetch.034 RES 200 cpu=8ms"),
        (1, "Ω 13:41:07.118 fetch.035 RES 200 cpu=8ms"),
        (2, "Ω 13:41:07.121 fetch.034 END cold=1.1ms exec=42ms pooled✓ the client was gone"),
        (2, "Ω 13:41:07.121 fetch.034 END cold=1.1ms exec=42ms"),
        (5, "Ω 13:41:07.241 fetch.040 LOG out hello"),
    ] {
        let mut others = lines.clone();
        others[at] = wrong.into();
        assert!(are_the_pictures(&others).is_err(), "{wrong}");
    }
}
