//! A request's head as it goes out, and an answer's as it comes in: what belongs to one connection stays out of both.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{PathAndQuery, Uri};
use http::{Method, request, response};

use crate::error::Error;
use crate::site::{Denied, Origin, Quoted};

/// The longest path with its query, in bytes; servers take 8 KiB and a little more.
const MAX_PATH: usize = 16 * 1024;
/// The largest header section, in bytes, counted as HTTP/2 does (RFC 9113 6.5.2): each with 32 on top.
const MAX_HEADERS: usize = 64 * 1024;

/// Fields of one connection (RFC 9110 7.6.1, RFC 9113 8.2.2). hyper writes those that are needed.
const OF_A_CONNECTION: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What else a guest does not write: `Host` comes from the address, there is no proxy to talk to, nobody waits for
/// `100 Continue` (RFC 9110 10.1.1), and HTTP/2 is agreed on in TLS alone.
const NOT_THE_GUESTS: [HeaderName; 5] = [
    header::HOST,
    header::EXPECT,
    header::PROXY_AUTHORIZATION,
    header::PROXY_AUTHENTICATE,
    HeaderName::from_static("http2-settings"),
];

/// A request's head, checked, without anything that says how it is sent.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) method: Method,
    path: PathAndQuery,
    headers: HeaderMap,
    /// What `Content-Length` says.
    pub(crate) length: Option<u64>,
}

impl Head {
    /// Of a guest's request.
    pub(crate) fn of(parts: request::Parts) -> Result<Self, Error> {
        let request::Parts { method, uri, mut headers, .. } = parts;
        if method == Method::CONNECT {
            return Err(Denied::Method(Quoted::new(method.as_str())).into());
        }
        let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        match path.as_str() {
            "*" if method == Method::OPTIONS => {}
            text if text.len() > MAX_PATH => return Err(Error::UriTooLong(text.len())),
            text if text.starts_with('/') => {}
            _ => return Err(Error::Uri),
        }
        for name in OF_A_CONNECTION.iter().chain(&NOT_THE_GUESTS) {
            headers.remove(name);
        }
        // The one word of TE that is not about the connection's coding; gRPC asks for it (RFC 9113 8.2.2).
        let trailers = headers.remove(header::TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        if size > MAX_HEADERS {
            return Err(Error::RequestHeaders(size));
        }
        let length = content_length(&headers)?;
        if let Some(length) = length {
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        Ok(Self { method, path, headers, length })
    }

    /// As HTTP/1.1 wants it: the path alone, and `Host`, which comes first (RFC 9110 7.2).
    pub(crate) fn http1<B>(&self, origin: &Origin, chunked: bool, body: B) -> Result<http::Request<B>, Error> {
        let mut headers = HeaderMap::with_capacity(self.headers.len() + 2);
        let host = HeaderValue::from_maybe_shared(Bytes::from(origin.authority())).map_err(|_| Error::Uri)?;
        headers.insert(header::HOST, host);
        headers.extend(self.headers.clone());
        if chunked {
            headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        Ok(self.request(self.path.clone().into(), headers, body))
    }

    /// As HTTP/2 wants it: the whole address, and no `Host`.
    pub(crate) fn http2<B>(&self, origin: &Origin, body: B) -> Result<http::Request<B>, Error> {
        let uri = Uri::builder()
            .scheme(origin.scheme().to_string().as_str())
            .authority(origin.authority())
            .path_and_query(self.path.clone());
        Ok(self.request(uri.build().map_err(|_| Error::Uri)?, self.headers.clone(), body))
    }

    fn request<B>(&self, uri: Uri, headers: HeaderMap, body: B) -> http::Request<B> {
        let mut request = http::Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        request
    }
}

/// Removes from an answer what was meant for this side of the connection.
pub(crate) fn strip(parts: &mut response::Parts) {
    for name in &OF_A_CONNECTION {
        parts.headers.remove(name);
    }
}

/// Removes from a request's trailers what a next server might take for part of its head (RFC 9110 6.5.1).
pub(crate) fn strip_trailers(trailers: &mut HeaderMap) {
    for name in OF_A_CONNECTION.iter().chain(&NOT_THE_GUESTS).chain(&[header::CONTENT_LENGTH, header::TE]) {
        trailers.remove(name);
    }
}

/// One number, however often it is said (RFC 9110 8.6). Two different ones are how requests are smuggled.
fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Error> {
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        let text = value.to_str().map_err(|_| Error::ContentLength)?;
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number: u64 = text.parse().ok().filter(|_| plain).ok_or(Error::ContentLength)?;
        if length.is_some_and(|other| other != number) {
            return Err(Error::ContentLength);
        }
        length = Some(number);
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(build: impl FnOnce(request::Builder) -> request::Builder) -> Result<Head, Error> {
        Head::of(build(http::Request::builder().uri("https://example.org/a?b")).body(()).unwrap().into_parts().0)
    }

    fn origin() -> Origin {
        Origin::parse(gaia_manifest::Scheme::Https, "example.org:8443").unwrap()
    }

    #[test]
    fn the_host_is_the_addresss_and_not_the_guests() {
        let head = head(|r| r.header("host", "evil.example").header("host", "worse.example")).unwrap();
        let request = head.http1(&origin(), false, ()).unwrap();
        assert_eq!(request.headers().get_all("host").iter().collect::<Vec<_>>(), ["example.org:8443"]);
        assert_eq!(request.uri(), "/a?b");
        let request = head.http2(&origin(), ()).unwrap();
        assert!(!request.headers().contains_key("host"));
        assert_eq!(request.uri(), "https://example.org:8443/a?b");
    }

    #[test]
    fn what_belongs_to_a_connection_does_not_go_out() {
        let head = head(|r| {
            r.header("connection", "close, x-secret")
                .header("keep-alive", "timeout=9")
                .header("proxy-connection", "keep-alive")
                .header("proxy-authorization", "Basic eDp5")
                .header("transfer-encoding", "chunked")
                .header("upgrade", "h2c")
                .header("http2-settings", "AAMAAABkAAQAAP__")
                .header("expect", "100-continue")
                .header("te", "gzip")
                .header("x-own", "1")
        });
        let head = head.unwrap();
        assert_eq!(head.headers.keys().collect::<Vec<_>>(), ["x-own"]);
        let kept = self::head(|r| r.header("te", "Trailers")).unwrap();
        assert_eq!(kept.headers["te"], "trailers");
    }

    #[test]
    fn a_length_is_one_number() {
        for (values, wanted) in [
            (&["5"][..], Ok(Some(5))),
            (&["5", "5"], Ok(Some(5))),
            (&[], Ok(None)),
            (&["5", "6"], Err(Error::ContentLength)),
            (&["5, 5"], Err(Error::ContentLength)),
            (&["+5"], Err(Error::ContentLength)),
            (&[""], Err(Error::ContentLength)),
            (&["0x5"], Err(Error::ContentLength)),
            (&["99999999999999999999"], Err(Error::ContentLength)),
        ] {
            let head = head(|r| values.iter().fold(r, |r, v| r.header("content-length", *v)));
            let count = head.as_ref().map_or(0, |h| h.headers.get_all("content-length").iter().count());
            assert_eq!(head.map(|h| h.length), wanted, "{values:?}");
            assert!(count <= 1);
        }
    }

    #[test]
    fn methods_and_paths_that_are_for_proxies_are_refused() {
        assert!(matches!(head(|r| r.method("CONNECT")), Err(Error::Denied(Denied::Method(_)))));
        let star = |method: &str| {
            let uri = Uri::builder().scheme("http").authority("example.org").path_and_query("*").build().unwrap();
            head(|r| r.method(method).uri(uri))
        };
        assert_eq!(star("GET").unwrap_err(), Error::Uri);
        assert!(star("OPTIONS").is_ok());
        let long = format!("https://example.org/{}", "a".repeat(MAX_PATH));
        assert!(matches!(head(|r| r.uri(long)), Err(Error::UriTooLong(_))));
        let large = "a".repeat(MAX_HEADERS);
        assert!(matches!(head(|r| r.header("x-large", large)), Err(Error::RequestHeaders(_))));
    }
}
