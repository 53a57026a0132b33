//! Does with files in `/tmp` what programs do with files, and answers `all good`, or what went wrong. With `?bytes=` it
//! writes a file of so many bytes and answers how many were written before it was refused.

use std::fs;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::time::{Duration, SystemTime};

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// What is written at a time, in bytes.
const PIECE: usize = 64 << 10;

type Outcome = Result<(), String>;

/// An error of the file system, and where it was.
fn at(what: &str) -> impl Fn(std::io::Error) -> String {
    move |e| format!("{what}: {e} ({:?})", e.kind())
}

/// That a thing is as it should be.
fn is(fact: bool, what: &str) -> Outcome {
    if fact { Ok(()) } else { Err(what.to_owned()) }
}

/// That an operation fails, and as it should.
fn fails<T>(outcome: std::io::Result<T>, kind: ErrorKind, what: &str) -> Outcome {
    match outcome {
        Ok(_) => Err(format!("{what}: no error")),
        Err(e) => is(e.kind() == kind, &format!("{what}: {e} ({:?})", e.kind())),
    }
}

fn write_and_read() -> Outcome {
    fs::create_dir_all("/tmp/a/b/c").map_err(at("create_dir_all"))?;
    fs::write("/tmp/a/x", vec![7; 300_000]).map_err(at("write"))?;
    is(fs::read("/tmp/a/x").map_err(at("read"))? == vec![7; 300_000], "what was written is read")?;
    is(fs::copy("/tmp/a/x", "/tmp/a/y").map_err(at("copy"))? == 300_000, "copied whole")?;
    let new = || fs::OpenOptions::new().read(true).write(true).create_new(true).open("/tmp/a/b/new");
    let mut file = new().map_err(at("create_new"))?;
    fails(new(), ErrorKind::AlreadyExists, "create_new again")?;
    file.write_all(b"hello world").map_err(at("write_all"))?;
    file.seek(SeekFrom::Start(6)).map_err(at("seek"))?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(at("read_to_string"))?;
    is(text == "world", "read from where it was sought")?;
    file.set_len(5).map_err(at("set_len"))?;
    is(file.metadata().map_err(at("metadata"))?.len() == 5, "truncated")?;
    file.seek(SeekFrom::End(-1)).map_err(at("seek from the end"))?;
    file.write_all(b"O!").map_err(at("write_all"))?;
    file.sync_all().map_err(at("sync_all"))?;
    let mut more = fs::OpenOptions::new().append(true).open("/tmp/a/b/new").map_err(at("append"))?;
    more.write_all(b"++").map_err(at("append"))?;
    is(fs::read_to_string("/tmp/a/b/new").map_err(at("read_to_string"))? == "hellO!++", "appended")
}

fn names_and_times() -> Outcome {
    fs::rename("/tmp/a/b/new", "/tmp/a/x").map_err(at("rename over a file"))?;
    is(fs::read("/tmp/a/x").map_err(at("read"))? == b"hellO!++", "the renamed one is there")?;
    fs::hard_link("/tmp/a/x", "/tmp/a/l").map_err(at("hard_link"))?;
    let listing = fs::read_dir("/tmp/a").map_err(at("read_dir"))?;
    let names: Vec<_> = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    is(names == ["b", "l", "x", "y"], &format!("listed: {names:?}"))?;
    is(fs::remove_dir("/tmp/a").is_err(), "remove_dir of a full one")?;
    fails(fs::read("/tmp/none"), ErrorKind::NotFound, "read of none")?;
    is(fs::read("/tmp/../etc/passwd").is_err() && fs::read("/etc/passwd").is_err(), "nothing but /tmp")?;
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1234);
    let file = fs::File::options().write(true).open("/tmp/a/x").map_err(at("open"))?;
    file.set_modified(then).map_err(at("set_modified"))?;
    let modified = fs::metadata("/tmp/a/x").and_then(|m| m.modified()).map_err(at("modified"))?;
    is(modified == then, "its time was set")?;
    fs::remove_dir_all("/tmp/a").map_err(at("remove_dir_all"))?;
    is(fs::read_dir("/tmp").map_err(at("read_dir"))?.count() == 0, "everything is gone")
}

/// Writes a file of `bytes`; how many it got.
fn fill(bytes: usize) -> Result<usize, String> {
    let mut file = fs::File::create("/tmp/full").map_err(at("create"))?;
    let piece = vec![1; PIECE];
    let mut written = 0;
    while written < bytes {
        match file.write(&piece[..PIECE.min(bytes - written)]) {
            Ok(n) => written += n,
            Err(_) => break,
        }
    }
    Ok(written)
}

struct Files;

impl Guest for Files {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let left = fs::read_dir("/tmp").map_or(0, Iterator::count);
        let answer = match gaia_branes::query_number(&request, "bytes", 0) {
            _ if left > 0 => Err(format!("{left} files of another request are there\n")),
            Ok(0) => write_and_read().and_then(|()| names_and_times()).map(|()| "all good\n".to_owned()),
            Ok(bytes) => fill(usize::try_from(bytes).unwrap_or(usize::MAX)).map(|n| format!("wrote {n}\n")),
            Err(sentence) => return gaia_branes::answer(out, 400, &sentence),
        };
        match answer {
            Ok(text) => gaia_branes::answer(out, 200, &text),
            Err(text) => gaia_branes::answer(out, 500, &text),
        }
    }
}

wasip2::http::proxy::export!(Files);
