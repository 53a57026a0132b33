//! Grows its memory by `?mib=` MiB (default 16), one at a time, touches every page of it, and answers how much it got.
//! A growth that the host refuses is no fault: the guest stops there and says so.

use std::arch::wasm32;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// Pages of WebAssembly (64 KiB) in a MiB.
const PAGES_PER_MIB: usize = 16;
/// Bytes of a WebAssembly page.
const WASM_PAGE: usize = 65536;
/// Bytes of the smallest page the host's memory comes in.
const HOST_PAGE: usize = 4096;
/// Kept back for the answer, since the memory may be full by then.
const SPARE: usize = 16 * 1024;

/// Grows the memory by up to `wanted` MiB and writes one byte to each page of the host's; how many MiB it got.
#[inline(never)]
fn grow(wanted: u64) -> u64 {
    for got in 0..wanted {
        let pages_before = wasm32::memory_grow::<0>(PAGES_PER_MIB);
        if pages_before == usize::MAX {
            return got;
        }
        let start = pages_before * WASM_PAGE;
        for address in (start..start + PAGES_PER_MIB * WASM_PAGE).step_by(HOST_PAGE) {
            // SAFETY: these addresses came into being with the growth just made, and the allocator takes only what
            // growths of its own return, so nothing else refers to them.
            unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(1) };
        }
    }
    wanted
}

struct Grow;

impl Guest for Grow {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match gaia_branes::query_number(&request, "mib", 16) {
            Ok(wanted) => {
                let spare = std::hint::black_box(Vec::<u8>::with_capacity(SPARE));
                let got = grow(wanted);
                drop(spare);
                gaia_branes::answer(out, 200, &format!("got {got} of {wanted} MiB\n"));
            }
            Err(sentence) => gaia_branes::answer(out, 400, &sentence),
        }
    }
}

wasip2::http::proxy::export!(Grow);
