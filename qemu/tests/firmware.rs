//! A machine whose whole software is 58 bytes of firmware: prints a prompt on the serial port, echoes what it is sent, and
//! resets on `R`. Shows the console, the lifecycle and the guard against orphans without a kernel.

mod echo;

use gaia_qemu::{Accel, Error, Machine, MachineBuilder, Net, Qemu, ShutdownReason};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{self, BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs, thread};

const TEXT: &str = "firmware\r\nready> ";

const SOON: Duration = Duration::from_secs(30);

/// Nothing without a QEMU. Always emulated: the firmware stays in real mode, which says nothing about KVM.
fn firmware(dir: &tempfile::TempDir) -> io::Result<Option<MachineBuilder>> {
    if matches!(Qemu::find(), Err(Error::QemuMissing { .. })) {
        return Ok(None);
    }
    let mut rom = echo::software(0, TEXT);
    rom.resize(0xfff0, 0xf4);
    rom.extend([0xea, 0x00, 0x00, 0x00, 0xf0]); // jmp 0xf000:0
    rom.resize(0x1_0000, 0xf4);
    let path = dir.path().join("firmware.bin");
    fs::write(&path, rom)?;
    let builder = MachineBuilder::default().net(Net::None).memory_mib(32).cpus(1);
    let builder = builder.accel(Accel::Tcg { because: "a test says so".into() });
    Ok(Some(builder.args(["-bios"]).args([path])))
}

/// Would miss nothing but a console that loses what comes first or what has no newline.
#[test]
fn console_from_the_first_byte() {
    let dir = tempfile::tempdir().unwrap();
    let transcript = dir.path().join("transcript");
    let Some(builder) = firmware(&dir).unwrap() else { return };
    let machine = Machine::boot(&builder.transcript(&transcript)).unwrap();
    let console = machine.console();
    assert!(console.wait_for("firmware", SOON).unwrap().text.starts_with("firmware"));
    assert_eq!(console.wait_for("ready> ", SOON).unwrap().text, "ready> ");
    console.expect_quiet(Duration::from_millis(50)).unwrap();
    console.send_line("hello").unwrap();
    console.wait_for("hello\r", SOON).unwrap();
    let long = "0123456789".repeat(500);
    console.send_bytes(long.as_bytes()).unwrap();
    console.wait_for(&long, SOON).unwrap();
    let error = console.wait_for("never", Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }));

    console.send_bytes(b"R").unwrap();
    let exit = machine.wait_exit(SOON).unwrap();
    assert!(exit.success(), "{exit:?}");
    assert_eq!(exit.reason, Some(ShutdownReason::GuestReset));
    assert!(matches!(console.wait_for("never", SOON).unwrap_err(), Error::Died { .. }));
    let expected = format!("firmware\r\nready> hello\r{long}R");
    assert_eq!(console.transcript(), expected);
    assert_eq!(fs::read_to_string(transcript).unwrap(), expected);
}

/// Would miss a reset that QEMU announces but does not make: the firmware must print its prompt again.
#[test]
fn a_reboot_can_be_survived() {
    let dir = tempfile::tempdir().unwrap();
    let Some(builder) = firmware(&dir).unwrap() else { return };
    let machine = Machine::boot(&builder.exit_on_reboot(false)).unwrap();
    for _ in 0..3 {
        machine.console().wait_for("ready>", SOON).unwrap();
        machine.console().send_bytes(b"R").unwrap();
        machine.wait_event("RESET", SOON).unwrap();
    }
    machine.console().wait_for("ready>", SOON).unwrap();
    assert!(machine.power_off().unwrap().success());
}

/// Would miss a guard that hits too early: the parent-death signal is the forking thread's, not the process'.
#[test]
fn a_machine_outlives_the_thread_that_booted_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some(builder) = firmware(&dir).unwrap() else { return };
    let machine = thread::spawn(move || Machine::boot(&builder)).join().unwrap().unwrap();
    machine.console().wait_for("ready>", SOON).unwrap();
    machine.console().send_line("still here").unwrap();
    machine.console().wait_for("still here", SOON).unwrap();
}

/// Would miss an orphan only if its process id were taken by another process that ends just then.
#[test]
fn no_machine_outlives_a_killed_process() {
    const ROLE: &str = "GAIA_QEMU_TEST_PARENT";
    let dir = tempfile::tempdir().unwrap();
    let Some(builder) = firmware(&dir).unwrap() else { return };
    if env::var_os(ROLE).is_some() {
        let machine = Machine::boot(&builder).unwrap();
        machine.console().wait_for("ready>", SOON).unwrap();
        println!("\nmachine {} {} {}", machine.pid(), machine.dir().display(), dir.path().display());
        // Killed in here; the limit is for a test that was itself killed.
        let _ = machine.wait_exit(Duration::from_mins(1));
        return;
    }
    if Command::new("setpriv").args(["--pdeathsig", "KILL", "true"]).status().map_or(true, |status| !status.success()) {
        return;
    }
    let mut parent = Command::new(env::current_exe().unwrap());
    parent.args(["--exact", "no_machine_outlives_a_killed_process", "--nocapture"]).env(ROLE, "1");
    let mut parent = parent.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines().map_while(Result::ok);
    let told = lines.into_iter().find_map(|line| line.strip_prefix("machine ").map(str::to_owned)).unwrap();
    let told: Vec<&str> = told.split(' ').collect();
    let qemu = pidfd_open(Pid::from_raw(told[0].parse().unwrap()).unwrap(), PidfdFlags::empty()).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&qemu, PollFlags::IN)], Some(&limit)).unwrap(), 1, "QEMU outlives its parent");
    for left_behind in &told[1..] {
        fs::remove_dir_all(left_behind).unwrap();
    }
}
