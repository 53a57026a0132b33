//! Tries what a hostile guest tries, as `how` says; `HOWS` has the list. It answers only where that is the attempt.

use std::hint::black_box;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

/// What it can try.
const HOWS: &str = "loop, recurse, recurse-wide, memory, handles, pollables, names, values, field, leak, log, \
    trap-asked, trap-reading, trap-answered, trap-writing, trap-finished, endless\n";

/// Pages of memory, touched as they come, until there are no more.
fn memory() {
    const PAGE: usize = 64 << 10;
    loop {
        let before = core::arch::wasm32::memory_grow(0, 1);
        if before == usize::MAX {
            return;
        }
        for at in (before * PAGE..(before + 1) * PAGE).step_by(4096) {
            // SAFETY: the page was just added to this memory, and nothing else knows of it.
            unsafe { (at as *mut u8).write_volatile(1) };
        }
    }
}

/// Calls itself without end, on the host's stack alone.
fn recurse(depth: u64) -> u64 {
    if black_box(depth) == u64::MAX { 0 } else { black_box(recurse(depth + 1)) + 1 }
}

/// Calls itself without end, with much of its own stack each time.
fn recurse_wide(depth: u64) -> u64 {
    let wide = black_box([depth; 512]);
    if wide[3] == u64::MAX { 0 } else { black_box(recurse_wide(depth + 1)) + wide[7] }
}

/// Begins an answer and writes to it; gives back what is needed to end it.
fn begin(out: ResponseOutparam, headers: Fields) -> Option<OutgoingBody> {
    let response = OutgoingResponse::new(headers);
    let body = response.body().ok()?;
    ResponseOutparam::set(out, Ok(response));
    body.write().ok()?.blocking_write_and_flush(b"begun\n").ok()?;
    Some(body)
}

/// Reads a piece of the request and keeps the stream.
fn reading(request: &IncomingRequest) {
    if let Ok(body) = request.consume() {
        if let Ok(stream) = body.stream() {
            let _ = stream.blocking_read(1);
            std::mem::forget(stream);
        }
        std::mem::forget(body);
    }
}

struct Hostile;

impl Guest for Hostile {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let how = gaia_branes::query(&request, "how").unwrap_or_default();
        match how.as_str() {
            "loop" => loop {
                black_box(0);
            },
            "recurse" => drop(black_box(recurse(0))),
            "recurse-wide" => drop(black_box(recurse_wide(0))),
            "memory" => {
                memory();
                loop {
                    black_box(0);
                }
            }
            "handles" => loop {
                std::mem::forget(Fields::new());
            },
            "pollables" => {
                let stdin = wasip2::cli::stdin::get_stdin();
                loop {
                    std::mem::forget(stdin.subscribe());
                }
            }
            // Each is refused once the headers are too large, and the attempt goes on.
            "names" => {
                let headers = Fields::new();
                for n in 0..1_000_000_000 {
                    let _ = headers.append(&format!("x-{n}"), &[b'v'; 100]);
                }
                drop(begin(out, headers));
            }
            "values" => {
                let headers = Fields::new();
                let _ = headers.set("x", &vec![vec![b'v'; 100]; 20_000]);
                drop(begin(out, headers));
            }
            "field" => {
                let headers = Fields::new();
                let _ = headers.set("x", &[vec![b'v'; 3 << 20]]);
                drop(begin(out, headers));
            }
            "leak" => {
                reading(&request);
                std::mem::forget(Fields::new());
                std::mem::forget(request);
                std::mem::forget(begin(out, Fields::new()));
            }
            "log" => {
                for n in 0..1_000_000_000 {
                    println!("{n}");
                }
                gaia_branes::answer(out, 200, "said\n");
            }
            "trap-asked" => std::process::abort(),
            "trap-reading" => {
                reading(&request);
                std::process::abort();
            }
            "trap-answered" => {
                let response = OutgoingResponse::new(Fields::new());
                ResponseOutparam::set(out, Ok(response));
                std::process::abort();
            }
            "trap-writing" => {
                std::mem::forget(begin(out, Fields::new()));
                std::process::abort();
            }
            "trap-finished" => {
                gaia_branes::answer(out, 200, "finished\n");
                std::process::abort();
            }
            "endless" => {
                let Some(body) = begin(out, Fields::new()) else { return };
                let Ok(stream) = body.write() else { return };
                while stream.blocking_write_and_flush(&[b'x'; 4096]).is_ok() {}
            }
            _ => gaia_branes::answer(out, 400, HOWS),
        }
    }
}

wasip2::http::proxy::export!(Hostile);
