//! Answers the variable `VERSION` of its environment over and over, a line each, and ends with a whole one: `?kib=` (default 64)
//! KiB, in pieces, so that the answer's head is on its way long before its end. What mixes two versions shows it.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

struct Version;

impl Guest for Version {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let kib = match gaia_branes::query_number(&request, "kib", 64) {
            Ok(kib) => kib,
            Err(words) => return gaia_branes::answer(out, 400, &words),
        };
        let line = std::env::var("VERSION").unwrap_or_default() + "\n";
        let piece = line.repeat((1024 / line.len()).max(1));
        let response = OutgoingResponse::new(Fields::new());
        let Ok(body) = response.body() else { return };
        ResponseOutparam::set(out, Ok(response));
        {
            let Ok(stream) = body.write() else { return };
            for _ in 0..kib {
                if stream.blocking_write_and_flush(piece.as_bytes()).is_err() {
                    return;
                }
            }
        }
        let _ = OutgoingBody::finish(body, None);
    }
}

wasip2::http::proxy::export!(Version);
