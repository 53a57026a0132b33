//! Burns CPU: `?n=` rounds of a xorshift generator, and the last state as the answer. It has no clock, so the work is
//! given in rounds; each is six dependent operations, and the default takes about 50 ms on a core of 3 to 4 GHz.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

const ROUNDS: u64 = 40_000_000;

/// The state after `rounds` of xorshift64 (shifts 13, 7, 17). A function of its own, so that a profile shows its name.
#[inline(never)]
fn spin(rounds: u64) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..rounds {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    state
}

struct Burn;

impl Guest for Burn {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match gaia_branes::query_number(&request, "n", ROUNDS) {
            Ok(rounds) => gaia_branes::answer(out, 200, &format!("{:016x}\n", spin(rounds))),
            Err(sentence) => gaia_branes::answer(out, 400, &sentence),
        }
    }
}

wasip2::http::proxy::export!(Burn);
