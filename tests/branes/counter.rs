//! Counts the visits to this instance, with state on the heap. `pooled` and `ephemeral` instances serve one request
//! each, so theirs is always the first; a `pinned` one counts on.

use std::cell::RefCell;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

thread_local! {
    /// One line for each visit.
    static VISITS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Counter;

impl Guest for Counter {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let count = VISITS.with_borrow_mut(|visits| {
            visits.push(request.path_with_query().unwrap_or_default());
            visits.len()
        });
        gaia_branes::answer(out, 200, &format!("count {count}\n"));
    }
}

wasip2::http::proxy::export!(Counter);
