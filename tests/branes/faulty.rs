//! Does wrong what a guest can do wrong, as `how` says: `trap` before it answers, `none` (comes back without an answer),
//! `error` (answers with an error code), `exit`, `status` (an informational one), `half` (traps in the middle of its answer),
//! `stream` (an answer without an end), `read` (reads the request's body and says how many bytes came).

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{ErrorCode, Fields, IncomingRequest, OutgoingResponse, ResponseOutparam};
use wasip2::io::streams::StreamError;

struct Faulty;

impl Guest for Faulty {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match gaia_branes::query(&request, "how").as_deref() {
            Some("trap") => std::process::abort(),
            // Dropping the outparam counts as setting it to an error, so it is leaked.
            Some("none") => std::mem::forget(out),
            Some("error") => ResponseOutparam::set(out, Err(ErrorCode::InternalError(Some("secret words".into())))),
            Some("exit") => std::process::exit(0),
            Some("status") => gaia_branes::answer(out, 103, ""),
            Some("half") => stream(out, 3),
            Some("stream") => stream(out, u64::MAX),
            Some("read") => {
                let bytes = read(&request);
                gaia_branes::answer(out, 200, &format!("{bytes} bytes\n"));
            }
            _ => gaia_branes::answer(out, 400, "how=trap|none|error|exit|status|half|stream|read\n"),
        }
    }
}

/// Begins an answer of unknown length and traps after so many pieces.
fn stream(out: ResponseOutparam, pieces: u64) {
    let response = OutgoingResponse::new(Fields::new());
    let Ok(body) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    let Ok(stream) = body.write() else { return };
    for _ in 0..pieces {
        if stream.blocking_write_and_flush(&[b'x'; 4096]).is_err() {
            return;
        }
    }
    std::process::abort();
}

/// Reads the whole body, or as much as comes.
fn read(request: &IncomingRequest) -> usize {
    let Ok(body) = request.consume() else { return 0 };
    let Ok(stream) = body.stream() else { return 0 };
    let mut bytes = 0;
    loop {
        match stream.blocking_read(65_536) {
            Ok(piece) => bytes += piece.len(),
            Err(StreamError::Closed | StreamError::LastOperationFailed(_)) => return bytes,
        }
    }
}

wasip2::http::proxy::export!(Faulty);
