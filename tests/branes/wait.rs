//! Touches `?touch_kib=` KiB (default 0), waits `?sleep_ms=` milliseconds (default 0), touches `?then_touch_kib=` KiB that it has asked for before (default
//! 0), waits `?then_sleep_ms=` milliseconds with all of it (default 0) and answers; or, with `?trickle_ms=`, answers at once with a body that goes on
//! byte by byte, one each so many milliseconds, for `?sleep_ms=` milliseconds in all.

use std::time::Duration;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

/// Begins an answer of unknown length and sends `bytes` of it, each after a pause.
fn trickle(out: ResponseOutparam, pause: Duration, bytes: u64) {
    let response = OutgoingResponse::new(Fields::new());
    let Ok(body) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    {
        let Ok(stream) = body.write() else { return };
        for _ in 0..bytes {
            std::thread::sleep(pause);
            if stream.blocking_write_and_flush(b".").is_err() {
                return;
            }
        }
    }
    let _ = OutgoingBody::finish(body, None);
}

/// How long in all, how long between two bytes, and how long before the answer, in milliseconds.
fn asked(request: &IncomingRequest) -> Result<[u64; 3], String> {
    let number = |name| gaia_branes::query_number(request, name, 0);
    Ok([number("sleep_ms")?, number("trickle_ms")?, number("then_sleep_ms")?])
}

/// Memory of as many KiB as the query says.
fn asked_for(request: &IncomingRequest, name: &str) -> Vec<u8> {
    let kib = gaia_branes::query_number(request, name, 0).unwrap_or(0);
    Vec::with_capacity(usize::try_from(kib).unwrap_or(0) * 1024)
}

/// The same with one byte written in each page of the host.
fn touched(mut memory: Vec<u8>) -> Vec<u8> {
    memory.spare_capacity_mut().iter_mut().step_by(4096).for_each(|byte| _ = byte.write(1));
    memory
}

struct Wait;

impl Guest for Wait {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        // Held while it waits.
        let _memory = std::hint::black_box(touched(asked_for(&request, "touch_kib")));
        let later = std::hint::black_box(asked_for(&request, "then_touch_kib"));
        match asked(&request) {
            Ok([sleep, 0, then_sleep]) => {
                std::thread::sleep(Duration::from_millis(sleep));
                let _later = std::hint::black_box(touched(later));
                if then_sleep > 0 {
                    std::thread::sleep(Duration::from_millis(then_sleep));
                }
                gaia_branes::answer(out, 200, &format!("waited {sleep} ms\n"));
            }
            Ok([sleep, pause, _]) => trickle(out, Duration::from_millis(pause), sleep / pause),
            Err(sentence) => gaia_branes::answer(out, 400, &sentence),
        }
    }
}

wasip2::http::proxy::export!(Wait);
