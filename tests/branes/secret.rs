//! With `?do=write` fills all memory that it can get, and its stack, with a secret; with `?do=look` looks for it in all of
//! its memory. A fresh instance finds none.

use std::arch::wasm32;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

const SECRET: u64 = 0x5ec4_e75e_c4e7_5ec4;
/// Bytes of a WebAssembly page.
const WASM_PAGE: usize = 65536;
/// Kept back for the answer, since the memory will be full by then.
const SPARE: usize = 16 * 1024;
/// Words of the stack: an eighth of what a guest here has.
const STACK: usize = 1024;

/// Grows the memory as far as it goes; where the new part begins, and where it ends.
fn grow() -> (usize, usize) {
    let start = wasm32::memory_size::<0>() * WASM_PAGE;
    while wasm32::memory_grow::<0>(1) != usize::MAX {}
    (start, wasm32::memory_size::<0>() * WASM_PAGE)
}

#[inline(never)]
fn write() -> usize {
    std::hint::black_box([SECRET; STACK]);
    let (start, end) = grow();
    for address in (start..end).step_by(size_of::<u64>()) {
        // SAFETY: these addresses came into being with the growth just made, and the allocator takes only what
        // growths of its own return, so nothing else refers to them.
        unsafe { std::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(SECRET) };
    }
    (end - start) / size_of::<u64>()
}

#[inline(never)]
fn look() -> usize {
    let (_, end) = grow();
    // All but the first word, whose address is no pointer's.
    let words = (size_of::<u64>()..end).step_by(size_of::<u64>());
    // SAFETY: all of this is the instance's memory, which one thread alone uses; any bytes are a number.
    let word = |address: usize| unsafe { std::ptr::with_exposed_provenance::<u64>(address).read_volatile() };
    words.filter(|address| word(*address) == SECRET).count()
}

struct Secret;

impl Guest for Secret {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let what = gaia_branes::query(&request, "do");
        let spare = std::hint::black_box(Vec::<u8>::with_capacity(SPARE));
        let text = match what.as_deref() {
            Some("write") => format!("wrote {}\n", write()),
            Some("look") => format!("found {}\n", look()),
            // Both in one instance: what is looked for can be found.
            Some("both") => format!("wrote {}, found {}\n", write(), look()),
            _ => return gaia_branes::answer(out, 400, "do=write|look|both\n"),
        };
        drop(spare);
        gaia_branes::answer(out, 200, &text);
    }
}

wasip2::http::proxy::export!(Secret);
