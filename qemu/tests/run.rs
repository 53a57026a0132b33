//! `gaia-qemu run` as a user meets it when standard input is no terminal, with a kernel that needs no machine code but
//! its own 58 bytes: the real-mode part of a bzImage (linux: Documentation/arch/x86/boot.rst) that says it serves, echoes
//! what it is sent, and resets on `R`.

mod echo;

use gaia_qemu::{Error, Qemu};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tempfile::TempDir;

const TEXT: &str = "gaia: serving\r\n";

/// Nothing without a QEMU.
fn kernel(dir: &TempDir) -> io::Result<Option<PathBuf>> {
    if matches!(Qemu::find(), Err(Error::QemuMissing { .. })) {
        return Ok(None);
    }
    let mut image = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // one sector of setup code
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x7e]); // jmp to 0x280
    put(0x202, b"HdrS\x03\x02"); // protocol 2.3
    put(0x211, &[1]); // loaded high
    // The kernel's segment begins at 0x200 of the file.
    put(0x280, &echo::software(0x80, TEXT));
    let path = dir.path().join("bzImage");
    fs::write(&path, image)?;
    Ok(Some(path))
}

fn gaia_qemu() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gaia-qemu"));
    command.env("GAIA_ACCEL", "tcg").arg("run").stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Would miss keys that are lost because they come before the machine listens: they are written before it is started.
#[test]
fn a_pipe_is_typed_once_the_machine_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let Some(kernel) = kernel(&dir).unwrap() else { return };
    let mut run = gaia_qemu();
    run.arg("--kernel").arg(kernel).args(["--forward", "0:8080", "--memory", "64", "--exit-on-reboot"]);
    let transcript = dir.path().join("transcript");
    run.arg("--transcript").arg(&transcript);
    let mut run = run.stdin(Stdio::piped()).spawn().unwrap();
    run.stdin.take().unwrap().write_all(b"hello\nR\n").unwrap();
    let output = run.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("gaia-qemu: QEMU ") && out.contains("tcg (emulation: GAIA_ACCEL asks for it)"), "{out}");
    assert!(out.contains("gaia: serving\r\nhello\rR"), "{out}");
    assert!(out.ends_with("gaia-qemu: the machine rebooted\n"), "{out}");
    // The firmware and its option ROMs print nothing here: the machine's first word is the kernel's.
    assert_eq!(fs::read_to_string(transcript).unwrap(), "gaia: serving\r\nhello\rR");
}

/// Would miss a machine that stays behind: the program ends only after QEMU has.
#[test]
fn a_signal_switches_the_machine_off() {
    let dir = tempfile::tempdir().unwrap();
    let Some(kernel) = kernel(&dir).unwrap() else { return };
    let mut run = gaia_qemu();
    run.arg("--kernel").arg(kernel).args(["--forward", "0:8080", "--memory", "64"]).stdin(Stdio::null());
    let mut run = run.spawn().unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("gaia: serving")));
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(lines.last().unwrap(), "gaia-qemu: power off");
    assert!(run.wait().unwrap().success());
}

/// Would miss an error that names another port.
#[test]
fn a_taken_port_names_the_option() {
    let dir = tempfile::tempdir().unwrap();
    let Some(kernel) = kernel(&dir).unwrap() else { return };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut run = gaia_qemu();
    run.arg("--kernel").arg(kernel).args(["--forward", &format!("{port}:8080")]).stdin(Stdio::null());
    let output = run.output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains(&format!("host port {port}")) && err.contains("--forward 0:8080"), "{err}");
}

#[test]
fn a_missing_kernel_is_named() {
    let run = gaia_qemu().args(["--kernel", "/nowhere/bzImage"]).stdin(Stdio::null()).output().unwrap();
    let err = String::from_utf8_lossy(&run.stderr);
    assert!(
        !run.status.success() && (err.contains("kernel /nowhere/bzImage") || err.contains("install QEMU")),
        "{err}"
    );
}
