//! The debug role: answers the tests' questions from inside the machine. It exists only in the test image.
//!
//! One JSON object on each line of the virtio-serial port `gaia.debug`, one on each line back:
//! `{"read": "/proc/1/status"}`, `{"list": "/proc"}`, `{"link": "/proc/1/exe"}`, `{"owner": "/proc/77/fd"}`, `{"write": "/run/x", "text": "y"}`,
//! `{"clock": 1000000000}` in seconds since 1970, whose answer is what it was, `{"kill": 77, "signal": 9}`,
//! `{"proc": "/run/proc"}` to mount there a second `/proc`, which can be written to, `{"spawn": 1000}` for what a process of that user says of its secure bits,
//! `{"keep": "control", "user": 100}` for what one says of keeping files on the data disk in the sandbox of a role, `{"sync": "/data"}` once that is on
//! the disk, `{"begin": "/data/x"}` once it was sent there and not flushed, `{"ask": "GET /v1/status"}` of control's API, `{"hostile": "worker"}` for what `gaia-hostile` says. The answer is `{"ok": …}` or `{"error": "…"}`.

use std::ffi::CStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The port's name, as QEMU was told.
const PORT: &str = "gaia.debug";
/// The most of a file that is read, in bytes.
const MOST: u64 = 8 << 20;

fn main() -> anyhow::Result<()> {
    let path = port().context("no virtio-serial port is named gaia.debug")?;
    let mut port =
        fs::OpenOptions::new().read(true).write(true).open(&path).with_context(|| path.display().to_string())?;
    let mut lines = BufReader::new(port.try_clone()?);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            // Nobody is at the other end just now.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        let answer = match serde_json::from_str(&line).map_err(Into::into).and_then(|request| answer(&request)) {
            Ok(ok) => json!({ "ok": ok }),
            Err(e) => json!({ "error": format!("{e:#}") }),
        };
        port.write_all(format!("{answer}\n").as_bytes())?;
    }
}

fn port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let named =
        |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT);
    ports.into_iter().find(named).map(|entry| PathBuf::from("/dev").join(entry.file_name()))
}

fn answer(request: &Value) -> anyhow::Result<Value> {
    let text = |name: &str| request.get(name).and_then(Value::as_str);
    if let Some(path) = text("read") {
        let mut bytes = Vec::new();
        fs::File::open(path).and_then(|f| f.take(MOST).read_to_end(&mut bytes)).with_context(|| path.to_owned())?;
        return Ok(String::from_utf8_lossy(&bytes).into());
    }
    if let Some(path) = text("write") {
        fs::write(path, text("text").context("nothing to write")?).with_context(|| path.to_owned())?;
        return Ok(Value::Null);
    }
    if let Some(seconds) = request.get("clock").and_then(Value::as_i64) {
        use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
        let was = clock_gettime(ClockId::Realtime).tv_sec;
        clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: 0 })?;
        return Ok(was.into());
    }
    if let Some(path) = text("list") {
        let entries = fs::read_dir(path).with_context(|| path.to_owned())?;
        let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        return Ok(names.into());
    }
    if let Some(path) = text("link") {
        return Ok(fs::read_link(path).with_context(|| path.to_owned())?.to_string_lossy().into());
    }
    if let Some(path) = text("owner") {
        return Ok(std::os::unix::fs::MetadataExt::uid(&fs::metadata(path).with_context(|| path.to_owned())?).into());
    }
    if let Some(pid) = request.get("kill").and_then(Value::as_i64) {
        let signal = request.get("signal").and_then(Value::as_i64).unwrap_or(9);
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process id")?;
        let signal = i32::try_from(signal).ok().and_then(signal_of).context("no signal")?;
        kill_process(pid, signal)?;
        return Ok(Value::Null);
    }
    if let Some(path) = text("proc") {
        fs::create_dir(path).with_context(|| path.to_owned())?;
        let (nothing, flags) = (None::<&str>, nix::mount::MsFlags::empty());
        nix::mount::mount(nothing, path, Some("proc"), flags, nothing).with_context(|| path.to_owned())?;
        return Ok(Value::Null);
    }
    if let Some(role) = text("hostile") {
        let output = std::process::Command::new("/bin/gaia-hostile").arg(role).output().context("gaia-hostile")?;
        return Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into());
    }
    if let Some(user) = request.get("spawn").and_then(Value::as_u64) {
        return spawned(u32::try_from(user)?, &[c"gaia-hostile", c"bits"], Vec::new());
    }
    if let (Some(role), Some(user)) = (text("keep"), request.get("user").and_then(Value::as_u64)) {
        return kept(role, u32::try_from(user)?);
    }
    if let Some(path) = text("begin") {
        use nix::libc::{SYNC_FILE_RANGE_WAIT_AFTER, SYNC_FILE_RANGE_WRITE, sync_file_range};
        let file = fs::File::open(path).with_context(|| path.to_owned())?;
        // SAFETY: a descriptor that is open, and numbers.
        let done =
            unsafe { sync_file_range(file.as_raw_fd(), 0, 0, SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) };
        anyhow::ensure!(done == 0, "{path}: {}", std::io::Error::last_os_error());
        return Ok(Value::Null);
    }
    if let Some(path) = text("sync") {
        fs::File::open(path).and_then(|file| file.sync_all()).with_context(|| path.to_owned())?;
        return Ok(Value::Null);
    }
    if let Some(what) = text("ask") {
        return ask(what);
    }
    anyhow::bail!("not a request: {request}")
}

/// What `gaia-hostile` says of keeping files on the data disk in the sandbox of a role, started as init starts control: as
/// this user, with control's folder as `data`.
fn kept(role: &str, user: u32) -> anyhow::Result<Value> {
    let folder = fs::File::open("/data/control").context("/data/control")?;
    let role = std::ffi::CString::new(role)?;
    spawned(user, &[c"gaia-hostile", c"keep", &role], vec![("data".into(), folder.as_fd())])
}

/// What `gaia-hostile` says, started as init starts a role that is this user's.
fn spawned(user: u32, arguments: &[&CStr], descriptors: Vec<(String, BorrowedFd<'_>)>) -> anyhow::Result<Value> {
    use rustix::process::{WaitOptions, waitpid};
    let said = "/run/gaia-debug-said";
    let (null, file) = (fs::File::open("/dev/null")?, fs::File::create(said)?);
    let command = gaia_init::spawn::Command {
        program: c"/bin/gaia-hostile",
        arguments,
        environment: Vec::new(),
        descriptors,
        stdio: [null.as_fd(), file.as_fd(), file.as_fd()],
        confinement: gaia_init::spawn::Confinement { user: Some(user), ..Default::default() },
    };
    let pid = command.start()?;
    let ended = waitpid(Pid::from_raw(pid), WaitOptions::empty())?;
    let signal = ended.and_then(|(_, status)| status.terminating_signal());
    let text = fs::read_to_string(said)? + &signal.map(|s| format!("ended by signal {s}\n")).unwrap_or_default();
    fs::remove_file(said)?;
    Ok(text.into())
}

fn signal_of(number: i32) -> Option<Signal> {
    match number {
        // SAFETY: a real-time signal, and none of the first three, which musl and glibc keep for themselves.
        35..=64 => Some(unsafe { Signal::from_raw_unchecked(number) }),
        _ => Signal::from_named_raw(number),
    }
}

/// One request to control's API on its Unix socket.
fn ask(what: &str) -> anyhow::Result<Value> {
    let socket = std::env::var("GAIA_API").context("GAIA_API")?;
    let mut stream = UnixStream::connect(&socket).with_context(|| socket.clone())?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(stream, "{what} HTTP/1.1\r\nHost: appliance\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MOST).read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("an answer that breaks off: {answer:?}"))?;
    Ok(serde_json::from_str(body)?)
}
