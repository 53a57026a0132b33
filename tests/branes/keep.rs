//! Keeps count: of the visits to this instance, and of those that came to their end. Answers `count 3 of 3`, or does first
//! what `how` says: `burn` (`n` rounds of a generator), `echo` (answers with the request's body), `stream` (`bytes` bytes),
//! `show` (answers with the request's headers), `forge` (answers with a header of the runtime's own), `open` (an answer that
//! is never finished), `trap`, `spin` (for ever), `hoard` (has the host hold more and more), `exit`.

use std::cell::{Cell, RefCell};

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

thread_local! {
    /// Visits.
    static BEGUN: Cell<u64> = const { Cell::new(0) };
    /// Visits that came to their end.
    static ENDED: Cell<u64> = const { Cell::new(0) };
    /// What the host is to hold.
    static HOARD: RefCell<Vec<Fields>> = const { RefCell::new(Vec::new()) };
    /// Bodies that are not finished.
    static OPEN: RefCell<Vec<OutgoingBody>> = const { RefCell::new(Vec::new()) };
}

struct Keep;

impl Guest for Keep {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        BEGUN.set(BEGUN.get() + 1);
        let number = |key| gaia_branes::query_number(&request, key, 0).unwrap_or(0);
        match gaia_branes::query(&request, "how").as_deref() {
            None => count(out),
            Some("burn") => {
                let mut state: u64 = 1;
                for _ in 0..number("n") {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                }
                std::hint::black_box(state);
                count(out);
            }
            Some("echo") => echo(&request, out),
            Some("stream") => stream(out, number("bytes")),
            Some("show") => {
                let line = |(name, value): (String, Vec<u8>)| format!("{name}: {}\n", String::from_utf8_lossy(&value));
                let all: String = request.headers().entries().into_iter().map(line).collect();
                gaia_branes::answer(out, 200, &all);
            }
            Some("forge") => {
                let headers = Fields::new();
                let _ = headers.set("gaia-keeper", &[b"late".to_vec()]);
                let response = OutgoingResponse::new(headers);
                let body = response.body();
                ResponseOutparam::set(out, Ok(response));
                let _ = body.map(|body| OutgoingBody::finish(body, None));
            }
            Some("open") => {
                let response = OutgoingResponse::new(Fields::new());
                let body = response.body();
                ResponseOutparam::set(out, Ok(response));
                OPEN.with_borrow_mut(|open| open.extend(body));
            }
            Some("trap") => std::process::abort(),
            Some("spin") => loop {
                std::hint::black_box(());
            },
            Some("hoard") => {
                for n in 0..500 {
                    let fields = Fields::new();
                    let _ = fields.set("x", &[vec![b'x'; 30_000]]);
                    HOARD.with_borrow_mut(|hoard| hoard.push(fields));
                    std::hint::black_box(n);
                }
                count(out);
            }
            Some("exit") => std::process::exit(0),
            Some(_) => gaia_branes::answer(out, 400, "no such thing is done here\n"),
        }
        ENDED.set(ENDED.get() + 1);
    }
}

fn count(out: ResponseOutparam) {
    // This one, too.
    let ended = ENDED.get() + 1;
    gaia_branes::answer(out, 200, &format!("count {ended} of {}\n", BEGUN.get()));
}

/// The request's body, as it comes.
fn echo(request: &IncomingRequest, out: ResponseOutparam) {
    let Ok(body) = request.consume() else { return };
    let response = OutgoingResponse::new(Fields::new());
    let Ok(outgoing) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    {
        let (Ok(from), Ok(to)) = (body.stream(), outgoing.write()) else { return };
        while to.blocking_splice(&from, 65_536).is_ok() {}
    }
    let _ = OutgoingBody::finish(outgoing, None);
}

fn stream(out: ResponseOutparam, bytes: u64) {
    let response = OutgoingResponse::new(Fields::new());
    let Ok(body) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    {
        let Ok(stream) = body.write() else { return };
        for _ in 0..bytes / 4096 {
            if stream.blocking_write_and_flush(&[b'x'; 4096]).is_err() {
                return;
            }
        }
    }
    let _ = OutgoingBody::finish(body, None);
}

wasip2::http::proxy::export!(Keep);
