//! Answers `hello`. The smallest guest: what any request costs without work of its own.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

struct Hello;

impl Guest for Hello {
    fn handle(_request: IncomingRequest, out: ResponseOutparam) {
        gaia_branes::answer(out, 200, "hello\n");
    }
}

wasip2::http::proxy::export!(Hello);
