//! Writes `?lines=` lines (default 3) to stdout and `?errors=` lines (default 1) to stderr, and answers how many of
//! each it got rid of. With `?escape=1` it first writes a line that would have a terminal do something and forge another.

use std::io::Write;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// Writes up to `count` lines that begin with `name`; how many went through.
fn write_lines(mut stream: impl Write, name: &str, count: u64) -> u64 {
    for number in 1..=count {
        if writeln!(stream, "{name} line {number} of {count}").and_then(|()| stream.flush()).is_err() {
            return number - 1;
        }
    }
    count
}

/// Writes what `request` asks for; the answer to it.
fn chat(request: &IncomingRequest) -> Result<String, String> {
    let lines = gaia_branes::query_number(request, "lines", 3)?;
    let errors = gaia_branes::query_number(request, "errors", 1)?;
    if gaia_branes::query_number(request, "escape", 0)? > 0 {
        let _ = writeln!(std::io::stdout(), "\x1b[2J\x1b]0;mine\x07\rΩ 00:00:00.000 gaia AUDIT forged");
    }
    let lines = write_lines(std::io::stdout().lock(), "stdout", lines);
    let errors = write_lines(std::io::stderr().lock(), "stderr", errors);
    Ok(format!("stdout {lines} stderr {errors}\n"))
}

struct Chatty;

impl Guest for Chatty {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match chat(&request) {
            Ok(sentence) => gaia_branes::answer(out, 200, &sentence),
            Err(sentence) => gaia_branes::answer(out, 400, &sentence),
        }
    }
}

wasip2::http::proxy::export!(Chatty);
