//! Touches 32 MiB, one byte in each page: what a request costs when its memory is its main expense.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// Bytes touched.
const BYTES: usize = 32 << 20;
/// Bytes of the smallest page the host's memory comes in.
const HOST_PAGE: usize = 4096;

/// Allocates `bytes` and writes to each page once; how many pages that were.
#[inline(never)]
fn touch(bytes: usize) -> usize {
    // Not `vec![0; bytes]`, which would write to every byte.
    let mut memory = Vec::<u8>::with_capacity(bytes);
    let pages = memory.spare_capacity_mut().iter_mut().step_by(HOST_PAGE).map(|byte| byte.write(1)).count();
    std::hint::black_box(&memory);
    pages
}

struct Touch;

impl Guest for Touch {
    fn handle(_request: IncomingRequest, out: ResponseOutparam) {
        let pages = touch(BYTES);
        gaia_branes::answer(out, 200, &format!("touched {pages} pages\n"));
    }
}

wasip2::http::proxy::export!(Touch);
