//! What the guests share: reading the query of a request, and answering it.
//!
//! The guests are the examples of this package, one file each; `docs/guests.md` lists them. Each answers plain text
//! unless it says otherwise, and imports nothing that its purpose does not need.

use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wasip2::io::streams::StreamError;

/// How much is asked of a stream at a time, in bytes.
const READ: u64 = 64 * 1024;
/// `wasi:io/streams` takes at most this many bytes in one `blocking-write-and-flush`.
const WRITE_MAX: usize = 4096;

/// The value of the query parameter `key` of `request`, percent-decoded.
#[must_use]
pub fn query(request: &IncomingRequest, key: &str) -> Option<String> {
    query_value(&request.path_with_query()?, key)
}

/// The query parameter `key` of `request` as a number; `default` where there is none.
///
/// # Errors
///
/// A sentence for the client, where the value is not a number.
pub fn query_number(request: &IncomingRequest, key: &str, default: u64) -> Result<u64, String> {
    query(request, key).map_or(Ok(default), |value| {
        value.parse().map_err(|_| format!("{key}={value} is not a number between 0 and {}\n", u64::MAX))
    })
}

/// The value of `key` in the query of `path` (`/a?b=c&d=e`), percent-decoded. The first one where it is there twice.
#[must_use]
pub fn query_value(path: &str, key: &str) -> Option<String> {
    let (_, query) = path.split_once('?')?;
    let value = query.split('&').find_map(|pair| match pair.split_once('=') {
        Some((name, value)) => (name == key).then_some(value),
        None => (pair == key).then_some(""),
    })?;
    Some(percent_decoded(value))
}

/// Replaces `%41` with `A`. What is not two hexadecimal digits stays as it is; what is not UTF-8 becomes U+FFFD.
fn percent_decoded(text: &str) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let code = match (byte, digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => u8::try_from(high * 16 + low).ok(),
            _ => None,
        };
        decoded.push(code.unwrap_or(byte));
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The whole body of `request`.
///
/// # Errors
///
/// A sentence for the client, where it is longer than `most` bytes or breaks off.
pub fn body(request: &IncomingRequest, most: usize) -> Result<Vec<u8>, String> {
    const TWICE: &str = "the host gave the body twice\n";
    let body = request.consume().map_err(|()| TWICE)?;
    let stream = body.stream().map_err(|()| TWICE)?;
    let mut bytes = Vec::new();
    loop {
        match stream.blocking_read(READ) {
            Ok(piece) => bytes.extend_from_slice(&piece),
            Err(StreamError::Closed) => return Ok(bytes),
            Err(StreamError::LastOperationFailed(_)) => {
                return Err(format!("the body broke off after {} bytes\n", bytes.len()));
            }
        }
        if bytes.len() > most {
            return Err(format!("the body is longer than {most} bytes\n"));
        }
    }
}

/// Answers with `status` and a plain text.
pub fn answer(out: ResponseOutparam, status: u16, text: &str) {
    answer_with(out, status, "text/plain; charset=utf-8", text.as_bytes());
}

/// Answers with `status`, the content type and the whole body.
///
/// A client that has gone away is no fault of the guest's, so a write that fails only ends the answer.
pub fn answer_with(out: ResponseOutparam, status: u16, content_type: &str, body: &[u8]) {
    let headers = Fields::new();
    // Refused only for a malformed or forbidden header, and then the answer goes without.
    let _ = headers.set("content-type", &[content_type.as_bytes().to_vec()]);
    let _ = headers.set("content-length", &[body.len().to_string().into_bytes()]);
    let response = OutgoingResponse::new(headers);
    let _ = response.set_status_code(status);
    let Ok(outgoing) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    // The stream is a child of the body and goes first.
    {
        let Ok(stream) = outgoing.write() else { return };
        for piece in body.chunks(WRITE_MAX) {
            if stream.blocking_write_and_flush(piece).is_err() {
                return;
            }
        }
    }
    let _ = OutgoingBody::finish(outgoing, None);
}

#[cfg(test)]
mod tests {
    use super::query_value;

    #[test]
    fn the_first_value_of_a_key_is_decoded() {
        let path = "/fetch?n=12&url=https%3A%2F%2Fa.example%2Fb%3Fc%3Dd&n=13";
        assert_eq!(query_value(path, "n").as_deref(), Some("12"));
        assert_eq!(query_value(path, "url").as_deref(), Some("https://a.example/b?c=d"));
        assert_eq!(query_value(path, "u"), None);
    }

    #[test]
    fn a_value_may_hold_equals_signs_and_a_key_may_stand_alone() {
        assert_eq!(query_value("/?url=/x?a=b", "url").as_deref(), Some("/x?a=b"));
        assert_eq!(query_value("/?flag", "flag").as_deref(), Some(""));
        assert_eq!(query_value("/n=1", "n"), None);
    }

    #[test]
    fn broken_escapes_stay_as_they_are() {
        assert_eq!(query_value("/?a=100%", "a").as_deref(), Some("100%"));
        assert_eq!(query_value("/?a=%4", "a").as_deref(), Some("%4"));
        assert_eq!(query_value("/?a=%zz%C3%A9", "a").as_deref(), Some("%zzé"));
        assert_eq!(query_value("/?a=%FF", "a").as_deref(), Some("\u{fffd}"));
    }
}
