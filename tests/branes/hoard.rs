//! Has the host hold things for it, as many as it gets, as `what` says: `requests` (outgoing ones with a method of 1 MiB less a
//! page each), `bodies` (of answers that nobody asked for, with what is written to them), `fields` (60 KiB of values each). Then answers
//! how many they were.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, Method, OutgoingRequest, OutgoingResponse, ResponseOutparam};

/// Fewer than there are handles.
const MANY: usize = 300;

fn requests() -> usize {
    let long = "A".repeat((1 << 20) - 4096);
    let kept: Vec<_> = (0..MANY)
        .map(|_| {
            let request = OutgoingRequest::new(Fields::new());
            let _ = request.set_method(&Method::Other(long.clone()));
            request
        })
        .collect();
    kept.len()
}

fn bodies() -> usize {
    let kept: Vec<_> = (0..MANY)
        .filter_map(|_| {
            let response = OutgoingResponse::new(Fields::new());
            let body = response.body().ok()?;
            let stream = body.write().ok()?;
            while let Ok(room @ 1..) = stream.check_write() {
                stream.write(&vec![b'x'; usize::try_from(room).ok()?]).ok()?;
            }
            Some((stream, body, response))
        })
        .collect();
    kept.len()
}

fn fields() -> usize {
    let kept: Vec<_> = (0..MANY)
        .map(|_| {
            let fields = Fields::new();
            let _ = fields.set("x-a", &[vec![b'a'; 60_000]]);
            fields
        })
        .collect();
    kept.len()
}

struct Hoard;

impl Guest for Hoard {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let kept = match gaia_branes::query(&request, "what").as_deref() {
            Some("requests") => requests(),
            Some("bodies") => bodies(),
            Some("fields") => fields(),
            _ => return gaia_branes::answer(out, 400, "what=requests|bodies|fields\n"),
        };
        gaia_branes::answer(out, 200, &format!("kept {kept}\n"));
    }
}

wasip2::http::proxy::export!(Hoard);
