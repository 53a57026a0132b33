//! What is asked for: each workload's request, its right answer, and the same work without any WebAssembly.

use std::fmt::Write as _;
use std::net::SocketAddr;

use crate::load::Request;

/// What a server is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Answer `hello`.
    Hello,
    /// Read 10 KiB of JSON, compute sums, answer it with them.
    Json,
    /// Touch 32 MiB.
    Touch,
    /// Answer `hello` from a component written in JavaScript.
    #[value(name = "javascript")]
    JavaScript,
    /// Answer `hello` from a component written in Python.
    Python,
}

/// All of them.
pub const ALL: [Workload; 5] =
    [Workload::Hello, Workload::Json, Workload::Touch, Workload::JavaScript, Workload::Python];
/// Bytes that [`Workload::Touch`] touches.
const TOUCHED: usize = 32 << 20;
/// Bytes of the smallest page.
const PAGE: usize = 4096;
/// Orders in the document: with them it has 10 KiB.
const ORDERS: u64 = 36;

impl Workload {
    /// Its name: of the brane, the component's file and the path.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Json => "json",
            Self::Touch => "touch",
            Self::JavaScript => "javascript",
            Self::Python => "python",
        }
    }

    /// Its request to this server.
    #[must_use]
    pub fn request(self, to: SocketAddr) -> Request {
        let (body, wanted) = self.exchange();
        let bytes = if body.is_empty() {
            format!("GET /{} HTTP/1.1\r\nHost: {to}\r\n\r\n", self.name())
        } else {
            let kind = "application/json";
            let length = body.len();
            format!(
                "POST /json HTTP/1.1\r\nHost: {to}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
            )
        };
        Request { to, bytes: bytes.into_bytes(), wanted: Some(wanted) }
    }

    /// The request's body and the answer's.
    #[must_use]
    pub fn exchange(self) -> (String, Vec<u8>) {
        let body = if self == Self::Json { document() } else { String::new() };
        let wanted = worked(self.name(), body.as_bytes()).unwrap_or_default();
        (body, wanted)
    }
}

/// The document of [`Workload::Json`]: always the same.
#[must_use]
pub fn document() -> String {
    let mut text = String::from("{\"orders\":[");
    for id in 1..=ORDERS {
        let comma = if id == 1 { "" } else { "," };
        let _ = write!(text, "{comma}{{\"id\":{id},\"customer\":\"customer number {id} of many\",\"lines\":[");
        for line in 0..5 {
            let comma = if line == 0 { "" } else { "," };
            let (quantity, cents) = (1 + (id + line) % 9, 100 + id * 37 + line * 11);
            let _ = write!(text, "{comma}{{\"sku\":\"AB-{id:03}-{line}\",\"quantity\":{quantity},\"cents\":{cents}}}");
        }
        text.push_str("]}");
    }
    text.push_str("]}");
    text
}

/// The work itself, done natively: what the answer to `/<name>` with this body is; `None` if there is no such work.
#[must_use]
pub fn worked(name: &str, body: &[u8]) -> Option<Vec<u8>> {
    match name {
        "hello" | "javascript" | "python" => Some(b"hello\n".to_vec()),
        "json" => summed(body),
        "touch" => {
            let mut memory = Vec::<u8>::with_capacity(TOUCHED);
            let pages = memory.spare_capacity_mut().iter_mut().step_by(PAGE).map(|byte| byte.write(1)).count();
            std::hint::black_box(&memory);
            Some(format!("touched {pages} pages\n").into_bytes())
        }
        _ => None,
    }
}

#[derive(serde::Deserialize, serde::Serialize)]
struct Document {
    orders: Vec<Order>,
    #[serde(skip_deserializing)]
    total: u64,
}

#[derive(serde::Deserialize, serde::Serialize)]
struct Order {
    id: u64,
    customer: String,
    lines: Vec<Line>,
    #[serde(skip_deserializing)]
    total: u64,
}

#[derive(serde::Deserialize, serde::Serialize)]
struct Line {
    sku: String,
    quantity: u64,
    cents: u64,
    #[serde(skip_deserializing)]
    total: u64,
}

/// As the guest `json` does it: the comparison is of the same work in the same types.
fn summed(text: &[u8]) -> Option<Vec<u8>> {
    let mut document: Document = serde_json::from_slice(text).ok()?;
    for order in &mut document.orders {
        order.customer.make_ascii_uppercase();
        for line in &mut order.lines {
            line.total = line.quantity.saturating_mul(line.cents);
            order.total = order.total.saturating_add(line.total);
        }
        document.total = document.total.saturating_add(order.total);
    }
    serde_json::to_vec(&document).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_document_has_ten_kib_and_its_answer_has_the_sums() {
        let text = document();
        assert!((9_700..=10_800).contains(&text.len()), "{}", text.len());
        let value = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap();
        let (before, after) = (value(text.as_bytes()), value(&worked("json", text.as_bytes()).unwrap()));
        let lines = before["orders"].as_array().unwrap().iter().flat_map(|order| order["lines"].as_array().unwrap());
        let sum: u64 = lines.map(|line| line["quantity"].as_u64().unwrap() * line["cents"].as_u64().unwrap()).sum();
        assert_eq!(after["total"], sum);
        assert_eq!(after["orders"][0]["customer"], "CUSTOMER NUMBER 1 OF MANY");
        assert_eq!(worked("json", b"[]"), None);
    }

    #[test]
    fn a_request_says_how_long_its_body_is() {
        let request = Workload::Json.request("127.0.0.1:80".parse().unwrap());
        let text = String::from_utf8(request.bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
        assert_eq!(body, document());
        assert!(Workload::Hello.request("127.0.0.1:80".parse().unwrap()).bytes.ends_with(b"\r\n\r\n"));
    }
}
