//! The prompt: on the serial port, where keys edit and Tab completes, where what goes on ends with a key and a line that takes nothing
//! stalls nobody; and on a laptop.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use gaia_tests::workstation::Folder;
use gaia_tests::{ANSWER_WITHIN, Appliance, HELLO, SETTINGS, Setup};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::remote::{Person, started_for};

const QUIET: Duration = Duration::from_secs(3);
/// Of a status alone.
const SERVES: &str = "serves   generation 1, 1 branes";

fn ends_by_its_button(appliance: &Appliance) {
    appliance.machine().press_power_button().unwrap();
    assert!(appliance.machine().wait_exit(Duration::from_mins(1)).unwrap().success());
}

/// Would miss: a prompt that takes plain lines alone; a Ctrl-C, Ctrl-D or a mistake that does something; a power-off that nobody meant.
#[test]
fn keys_edit_the_line_tab_completes_it_and_what_is_dangerous_is_asked() {
    let appliance = Appliance::boot(&Setup::default().production()).unwrap();
    let console = appliance.machine().console();
    let typed = |bytes: &str, wanted: &str| {
        console.send_bytes(bytes.as_bytes()).unwrap();
        appliance.line(wanted, ANSWER_WITHIN).unwrap()
    };
    // Home, End, arrows, Backspace, Delete, and what is cut.
    typed("tatxus\x1b[D\x1b[D\x1b[3~\x08u\x01s\x05\r", SERVES);
    typed("nonsense\x15ps --json\x17\r", "file:./hello.wasm");
    // A brane's name, the option, and the command are completed.
    console.send_bytes(b"log\t--br\th\t").unwrap();
    console.wait_for("logs --brane hello ", ANSWER_WITHIN).unwrap();
    // More than one are listed.
    typed("\x15r\t", "reboot");
    // The line before the last again; one is looked for; one that was given up is not done; Ctrl-D does nothing.
    console.send_bytes(b"\x15").unwrap();
    typed("\x1b[A\x1b[A\x1b[B\r", "file:./hello.wasm");
    typed("\x12tat\r", SERVES);
    console.send_bytes(b"poweroff --yes\x03\x04\x04").unwrap();
    typed("\rstatus\r", SERVES);
    typed("statsu\r", "a similar subcommand exists: 'status'");
    typed("logs --brane \"a\r", "has none that closes it");
    // What is dangerous is asked; only yes is yes.
    for no in ["\r", "n\r", "\x03"] {
        console.send_bytes(b"poweroff\r").unwrap();
        appliance.line("the appliance switches off", ANSWER_WITHIN).unwrap();
        console.wait_for("Go on? [y/N] ", ANSWER_WITHIN).unwrap();
        typed(no, "nothing is changed");
    }
    typed("status\r", SERVES);
    console.send_bytes(b"poweroff\r").unwrap();
    console.wait_for("Go on? [y/N] ", ANSWER_WITHIN).unwrap();
    console.send_bytes(b"y\r").unwrap();
    assert!(appliance.machine().wait_exit(Duration::from_mins(1)).unwrap().success());
}

/// Would miss: something that goes on for ever and takes the prompt with it.
#[test]
fn top_and_a_followed_log_end_with_a_key() {
    let appliance = Appliance::boot(&Setup::default().production()).unwrap();
    let console = appliance.machine().console();
    for end in ["q", "\x03"] {
        console.send_line("top").unwrap();
        console.wait_for("· 1 branes    q ends it", ANSWER_WITHIN).unwrap();
        console.wait_for("hello ", ANSWER_WITHIN).unwrap();
        console.wait_for("%", ANSWER_WITHIN).unwrap();
        console.send_bytes(end.as_bytes()).unwrap();
        console.send_line("status").unwrap();
        appliance.line(SERVES, ANSWER_WITHIN).unwrap();

        console.send_line("logs --follow").unwrap();
        appliance.line("q or Ctrl-C ends it", ANSWER_WITHIN).unwrap();
        for _ in 0..2 {
            assert_eq!(appliance.get("/hello").unwrap().status, 200);
            appliance.line(" RES 200 ", ANSWER_WITHIN).unwrap();
        }
        console.send_bytes(format!("x\x1b[A{end}").as_bytes()).unwrap();
        console.send_line("ps").unwrap();
        appliance.line("file:./hello.wasm", ANSWER_WITHIN).unwrap();
    }
    console.wait_for("ω ", ANSWER_WITHIN).unwrap();
    // Nothing that is not there any more goes on.
    console.expect_quiet(QUIET).unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: a change by who may only look; a sequence to what only prints.
#[test]
fn who_observes_changes_nothing_and_what_prints_gets_no_sequences() {
    let settings = format!("{SETTINGS}\n[console]\nmode = \"observe\"\nterminal = \"dumb\"\n");
    let appliance = Appliance::boot(&Setup::default().production().settings(settings)).unwrap();
    let console = appliance.machine().console();
    for line in ["poweroff", "poweroff --yes", "gaia reboot -y", "rollback"] {
        console.send_line(line).unwrap();
        appliance.line("this console only observes", ANSWER_WITHIN).unwrap();
    }
    console.send_bytes(b"powero\t").unwrap();
    console.wait_for("\x07", ANSWER_WITHIN).unwrap();
    console.send_bytes(b"\x15statxus\x1b[D\x1b[D\x08\r").unwrap();
    appliance.line(SERVES, ANSWER_WITHIN).unwrap();
    console.send_line("top").unwrap();
    for _ in 0..2 {
        appliance.line("core 1 ", ANSWER_WITHIN).unwrap();
    }
    console.send_bytes(b"q").unwrap();
    ends_by_its_button(&appliance);
    assert!(!console.transcript().contains('\x1b'), "{}", console.transcript().replace('\x1b', "ESC"));
}

/// Would miss: a prompt where there is to be none.
#[test]
fn without_a_prompt_nothing_that_is_typed_is_heard() {
    let settings = format!("{SETTINGS}\n[console]\nmode = \"off\"\n");
    let appliance = Appliance::boot(&Setup::default().production().settings(settings)).unwrap();
    let console = appliance.machine().console();
    console.send_line("status").unwrap();
    console.send_line("poweroff --yes").unwrap();
    console.expect_quiet(QUIET).unwrap();
    assert!(!console.transcript().contains('ω'), "{}", console.transcript());
    appliance.serves_hello().unwrap();
    ends_by_its_button(&appliance);
}

/// Would miss: a line on the console that takes the line with it that is being typed.
#[test]
fn events_are_shown_and_the_line_is_drawn_again_below() {
    let appliance = Appliance::boot(&Setup::default()).unwrap();
    let console = appliance.machine().console();
    console.send_bytes(b"statxus\x1b[D\x1b[D").unwrap();
    console.wait_for("statxus", ANSWER_WITHIN).unwrap();
    appliance.kill(appliance.pid("worker@0").unwrap(), 9).unwrap();
    console.wait_for("was killed by SIGKILL", ANSWER_WITHIN).unwrap();
    console.wait_for("ω statxus", ANSWER_WITHIN).unwrap();
    console.send_bytes(b"\x08\r").unwrap();
    appliance.line(SERVES, ANSWER_WITHIN).unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: an appliance that waits for somebody to read its console.
#[test]
fn a_line_that_takes_nothing_stalls_nobody_but_the_prompt() {
    const ASKED: usize = 500;
    let ann = Person::new();
    let (appliance, key) = started_for(&ann, Setup::default());
    let (console, port) = (appliance.machine().console(), appliance.control_port().unwrap());
    ann.does(port, &["--accept-key", &key.to_string(), "status"]);
    console.mute(true);
    // Far more than the ways to this test hold, and init's own lines besides.
    for _ in 0..ASKED {
        console.send_bytes(b"status\r").unwrap();
    }
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        appliance.serves_hello().unwrap();
        appliance.kill(appliance.pid("worker@1").unwrap(), 9).unwrap();
        ann.does(port, &["ps"]);
        let up = |a: &Appliance| a.ask("GET /v1/status");
        let both = |s: &serde_json::Value| s["workers"].as_array().is_some_and(|all| all.len() == 2);
        appliance.until(ANSWER_WITHIN, up, both).unwrap();
    }
    let asked = Instant::now();
    ann.does(port, &["poweroff", "--yes"]);
    assert!(appliance.machine().wait_exit(Duration::from_mins(1)).unwrap().success());
    println!("off after {:.1} s", asked.elapsed().as_secs_f32());
    let mut follower = console.follow();
    console.mute(false);
    while follower.next_chunk().is_some() {}
    let answered = console.transcript().matches(SERVES).count();
    println!("{answered} of {ASKED} were answered at the prompt");
    assert!(answered < ASKED / 2, "{answered}: somebody read, and this shows nothing");
}

/// A laptop's terminal, and what it shows.
struct Laptop {
    person: File,
    shown: String,
}

impl Laptop {
    fn types(&mut self, bytes: &str, wanted: &str) {
        self.person.write_all(bytes.as_bytes()).unwrap();
        let mut chunk = [0; 4096];
        while !self.shown.contains(wanted) {
            let mut typed = [PollFd::new(&self.person, PollFlags::IN)];
            let within = Timespec::try_from(ANSWER_WITHIN).unwrap();
            assert_eq!(poll(&mut typed, Some(&within)), Ok(1), "no {wanted:?} in\n{}", self.shown);
            let n = self.person.read(&mut chunk).unwrap();
            self.shown.push_str(&String::from_utf8_lossy(&chunk[..n]));
        }
        let at = self.shown.find(wanted).unwrap() + wanted.len();
        self.shown.drain(..at);
    }
}

/// Would miss: a laptop without the prompt; a terminal that is left as only the prompt wants it.
#[test]
fn a_laptop_has_the_same_prompt_and_top() {
    let folder = Folder::with(HELLO).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    let (person, program) = gaia_tests::terminal::pair((80, 24)).unwrap();
    let modes = || rustix::termios::tcgetattr(&program).unwrap().local_modes;
    let before = modes();
    let mut laptop = Laptop { person, shown: String::new() };
    let start = |command: &str| {
        let stream = || program.try_clone().unwrap();
        let mut child = run.command(&[command]);
        child.stdin(stream()).stdout(stream()).stderr(stream()).env("TERM", "vt100").spawn().unwrap()
    };
    let mut console = start("console");
    laptop.types("", "ω ");
    laptop.types("stax\x7ftus\r", SERVES);
    laptop.types("logs --brane h\t", "logs --brane hello ");
    laptop.types("\x03", "^C");
    laptop.types("\x1b[A\r", SERVES);
    laptop.types("top\r", "q ends it");
    laptop.types("", "%");
    laptop.types("qlogs --follow\r", "q or Ctrl-C ends it");
    assert_eq!(run.get("/hello").unwrap().status, 200);
    laptop.types("", " RES 200 ");
    laptop.types("qpoweroff\r", "Go on? [y/N] ");
    laptop.types("n\r", "nothing is changed");
    laptop.types("\x04", "\r\n");
    assert!(console.wait().unwrap().success());
    assert_eq!(modes(), before);

    let mut top = start("top");
    laptop.types("", "hello ");
    laptop.types("q", "");
    assert!(top.wait().unwrap().success());
    assert_eq!(modes(), before);

    // Nobody is at a terminal.
    let (status, _, told) = run.gaia(&["poweroff"]).unwrap();
    assert!(!status.success() && told.contains("--yes"), "{told}");
}
