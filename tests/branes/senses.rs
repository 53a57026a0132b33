//! What it can sense of the world, one per line: the finest step it saw of each clock in nanoseconds, how long a wait of
//! 1 ms took in steps of the clock, sixteen random bytes, and its environment.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// Different readings that are looked for, and how often it looks.
const READINGS: usize = 20;
const LOOKS: usize = 20_000_000;

/// The smallest difference between readings that follow one another and differ.
fn step(read: impl Fn() -> u128) -> u128 {
    let (mut smallest, mut last, mut seen) = (u128::MAX, read(), 0);
    for _ in 0..LOOKS {
        let now = read();
        if now != last {
            smallest = smallest.min(now.abs_diff(last));
            (last, seen) = (now, seen + 1);
            if seen == READINGS {
                break;
            }
        }
    }
    smallest
}

fn sensed() -> String {
    let began = Instant::now();
    let monotonic = step(|| began.elapsed().as_nanos());
    let wall = step(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos());
    let began = Instant::now();
    std::thread::sleep(Duration::from_millis(1));
    let slept = began.elapsed().as_nanos();
    let random = wasip2::random::random::get_random_bytes(16);
    let random = random.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let sensed = format!("monotonic {monotonic}\nwall {wall}\nslept {slept}\nrandom {random}\n");
    std::env::vars().fold(sensed, |text, (name, value)| text + &format!("env {name}={value}\n"))
}

struct Senses;

impl Guest for Senses {
    fn handle(_request: IncomingRequest, out: ResponseOutparam) {
        gaia_branes::answer(out, 200, &sensed());
    }
}

wasip2::http::proxy::export!(Senses);
