//! Takes a JSON document of orders and answers it with names in capitals and sums: what a request costs that parses, computes
//! and writes.
//!
//! ```text
//! POST /json {"orders":[{"id":1,"customer":"customer 1","lines":[{"sku":"A1","quantity":2,"cents":350}]}]}
//! 200 {"orders":[{"id":1,"customer":"CUSTOMER 1","lines":[{"sku":"A1","quantity":2,"cents":350,"total":700}],"total":700}],"total":700}
//! 400 a sentence                             no such document
//! ```

use serde::{Deserialize, Serialize};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// The longest document it reads, in bytes.
const MOST: usize = 1 << 20;

#[derive(Deserialize, Serialize)]
struct Document {
    orders: Vec<Order>,
    #[serde(skip_deserializing)]
    total: u64,
}

#[derive(Deserialize, Serialize)]
struct Order {
    id: u64,
    customer: String,
    lines: Vec<Line>,
    #[serde(skip_deserializing)]
    total: u64,
}

#[derive(Deserialize, Serialize)]
struct Line {
    sku: String,
    quantity: u64,
    cents: u64,
    #[serde(skip_deserializing)]
    total: u64,
}

/// The document with its sums.
fn summed(text: &[u8]) -> Result<Vec<u8>, String> {
    let mut document: Document =
        serde_json::from_slice(text).map_err(|error| format!("not such a document: {error}\n"))?;
    for order in &mut document.orders {
        order.customer.make_ascii_uppercase();
        for line in &mut order.lines {
            line.total = line.quantity.saturating_mul(line.cents);
            order.total = order.total.saturating_add(line.total);
        }
        document.total = document.total.saturating_add(order.total);
    }
    serde_json::to_vec(&document).map_err(|error| format!("{error}\n"))
}

struct Json;

impl Guest for Json {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match gaia_branes::body(&request, MOST).and_then(|text| summed(&text)) {
            Ok(answer) => gaia_branes::answer_with(out, 200, "application/json", &answer),
            Err(sentence) => gaia_branes::answer(out, 400, &sentence),
        }
    }
}

wasip2::http::proxy::export!(Json);
