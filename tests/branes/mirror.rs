//! Says what it learned of a request: scheme, authority, path, `forwarded` and `cookie`, a line each, and `traceparent` and
//! `tracestate` if they are there. One with a body gets
//! that back instead, piece by piece as it comes, and its trailers behind it. Answers with `?status=` (default 200).

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{
    Fields, IncomingBody, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam, Scheme,
};

struct Mirror;

impl Guest for Mirror {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        if matches!(request.method(), Method::Post) {
            let _ = echo(&request, out);
            return;
        }
        let scheme = match request.scheme() {
            Some(Scheme::Http) => "http".to_owned(),
            Some(Scheme::Https) => "https".to_owned(),
            Some(Scheme::Other(other)) => other,
            None => "none".to_owned(),
        };
        let field = |name: &str| {
            let all = request.headers().get(name);
            all.iter().map(|value| String::from_utf8_lossy(value).into_owned()).collect::<Vec<_>>().join(" | ")
        };
        let mut text = format!(
            "scheme {scheme}\nauthority {}\npath {}\nforwarded {}\ncookie {}\n",
            request.authority().unwrap_or_default(),
            request.path_with_query().unwrap_or_default(),
            field("forwarded"),
            field("cookie"),
        );
        for name in ["traceparent", "tracestate"].into_iter().filter(|name| request.headers().has(name)) {
            text = text + name + " " + &field(name) + "\n";
        }
        let status = gaia_branes::query_number(&request, "status", 200);
        gaia_branes::answer(out, status.ok().and_then(|status| status.try_into().ok()).unwrap_or(400), &text);
    }
}

/// Sends a body back while it comes. Ends early if the client is gone, on either side.
fn echo(request: &IncomingRequest, out: ResponseOutparam) -> Option<()> {
    let incoming = request.consume().ok()?;
    let response = OutgoingResponse::new(Fields::new());
    let outgoing = response.body().ok()?;
    ResponseOutparam::set(out, Ok(response));
    {
        let (from, to) = (incoming.stream().ok()?, outgoing.write().ok()?);
        while let Ok(piece) = from.blocking_read(4096) {
            to.blocking_write_and_flush(&piece).ok()?;
        }
    }
    let trailers = IncomingBody::finish(incoming);
    trailers.subscribe().block();
    let trailers = trailers.get().and_then(Result::ok).and_then(Result::ok).flatten();
    // A copy: what came in cannot be changed, and what goes out must be its own.
    let trailers = trailers.and_then(|fields| Fields::from_list(&fields.entries()).ok());
    OutgoingBody::finish(outgoing, trailers).ok()
}

wasip2::http::proxy::export!(Mirror);
