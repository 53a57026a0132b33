//! The brane of the seed's manifest: gets a page of a catalogue of papers, and answers only what matters of it.
//!
//! ```text
//! GET /fetch                                      the default page, of OpenAlex
//! GET /fetch?url=https%3A%2F%2Fapi.crossref.org%2Fworks%3Frows%3D3
//! 200 {"source":"https://…","count":271…,"works":[{"id":"https://openalex.org/W…","title":"…"}]}
//! 400 {"error":"…","source":"ftp://…"}            no URL that can be asked for
//! 502 {"error":"…","source":"https://…"}          whatever went wrong upstream, the host's refusal included
//! ```
//!
//! It understands `OpenAlex` (`meta.count`, `results`) and Crossref (`message.total-results`, `message.items`). A
//! redirect is reported, not followed.

use serde::{Deserialize, Serialize};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingBody, IncomingRequest, IncomingResponse, OutgoingRequest, ResponseOutparam, Scheme,
};
use wasip2::io::streams::StreamError;

const DEFAULT_URL: &str = "https://api.openalex.org/works?per-page=3";
/// The longest page it reads, in bytes; a fraction of the default `mem_max` of 64 MiB.
const PAGE_MAX: usize = 8 << 20;
/// How much it asks the stream for at a time, in bytes.
const READ: u64 = 64 * 1024;

/// A page as either catalogue sends it. What is not named here is skipped without being kept.
#[derive(Deserialize)]
struct Page {
    meta: Option<Meta>,
    results: Option<Vec<Work>>,
    message: Option<Message>,
}

#[derive(Deserialize)]
struct Meta {
    count: u64,
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "total-results")]
    count: u64,
    items: Vec<Work>,
}

/// `OpenAlex` has `id`, `title` and `display_name`; Crossref has `DOI` and a list of titles.
#[derive(Deserialize)]
struct Work {
    id: Option<String>,
    #[serde(rename = "DOI")]
    doi: Option<String>,
    title: Option<Title>,
    display_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Title {
    One(String),
    Many(Vec<String>),
}

#[derive(Serialize)]
struct Answer<'a> {
    source: &'a str,
    count: u64,
    works: Vec<Item>,
}

#[derive(Serialize)]
struct Item {
    id: String,
    title: Option<String>,
}

#[derive(Serialize)]
struct Failure<'a> {
    error: &'a str,
    source: &'a str,
}

impl From<Work> for Item {
    fn from(work: Work) -> Self {
        let title = match work.title {
            Some(Title::One(title)) => Some(title),
            Some(Title::Many(titles)) => titles.into_iter().next(),
            None => None,
        };
        Self { id: work.id.or(work.doi).unwrap_or_default(), title: title.or(work.display_name) }
    }
}

/// The answer to `request`, made of the page at `url`.
fn fetched(request: OutgoingRequest, url: &str) -> Result<String, String> {
    let body = sent(request)?;
    let page = serde_json::from_slice(&body).map_err(|error| format!("the answer is no list of works: {error}"))?;
    let (count, works) = match page {
        Page { meta: Some(meta), results: Some(works), .. } => (meta.count, works),
        Page { message: Some(message), .. } => (message.count, message.items),
        Page { .. } => return Err("the answer is no list of works: neither meta and results nor message".to_owned()),
    };
    let answer = Answer { source: url, count, works: works.into_iter().map(Item::from).collect() };
    serde_json::to_string(&answer).map_err(|error| error.to_string())
}

/// Sends `request` and reads the whole answer, which must have status 200.
fn sent(request: OutgoingRequest) -> Result<Vec<u8>, String> {
    let pending = outgoing_handler::handle(request, None).map_err(|code| in_words(&code))?;
    pending.subscribe().block();
    let response = match pending.get() {
        Some(Ok(Ok(response))) => response,
        Some(Ok(Err(code))) => return Err(in_words(&code)),
        // Neither can be: it was waited for, and it is asked for once.
        Some(Err(())) | None => return Err("the host gave no answer".to_owned()),
    };
    match response.status() {
        200 => body_of(&response),
        status => Err(format!("the answer has status {status}")),
    }
}

/// A GET request for `url`, or nothing where that has no scheme, no host, or what no header may hold.
fn request_for(url: &str) -> Option<OutgoingRequest> {
    let (scheme, rest) = url.split_once("://")?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        _ => return None,
    };
    let rest = rest.split('#').next()?;
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    if authority.is_empty() {
        return None;
    }
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let headers = Fields::new();
    headers.set("accept", &[b"application/json".to_vec()]).ok()?;
    headers.set("user-agent", &[b"gaia-cloud-fetch/0.1".to_vec()]).ok()?;
    let request = OutgoingRequest::new(headers);
    request.set_scheme(Some(&scheme)).ok()?;
    request.set_authority(Some(authority)).ok()?;
    request.set_path_with_query(Some(&path)).ok()?;
    Some(request)
}

/// The whole body of `response`.
fn body_of(response: &IncomingResponse) -> Result<Vec<u8>, String> {
    const TWICE: &str = "the host gave the answer's body twice";
    let body: IncomingBody = response.consume().map_err(|()| TWICE)?;
    let stream = body.stream().map_err(|()| TWICE)?;
    let mut bytes = Vec::new();
    loop {
        match stream.blocking_read(READ) {
            Ok(piece) => bytes.extend_from_slice(&piece),
            Err(StreamError::Closed) => return Ok(bytes),
            Err(StreamError::LastOperationFailed(error)) => {
                return Err(format!("the answer broke off after {} bytes: {}", bytes.len(), error.to_debug_string()));
            }
        }
        if bytes.len() > PAGE_MAX {
            return Err(format!("the answer is longer than {PAGE_MAX} bytes"));
        }
    }
}

/// What the commonest codes mean, and the name of any other.
fn in_words(code: &ErrorCode) -> String {
    match code {
        ErrorCode::HttpRequestDenied => {
            "HTTP-request-denied: this brane's net.http does not allow the address".to_owned()
        }
        ErrorCode::DnsError(_) => "DNS-error: the host's name has no address".to_owned(),
        ErrorCode::ConnectionRefused => "connection-refused: nothing listens there".to_owned(),
        ErrorCode::ConnectionTimeout => "connection-timeout: the host does not answer".to_owned(),
        other => format!("{other:?}"),
    }
}

struct CloudFetch;

impl Guest for CloudFetch {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let url = gaia_branes::query(&request, "url").unwrap_or_else(|| DEFAULT_URL.to_owned());
        let fetched = match request_for(&url) {
            Some(request) => fetched(request, &url).map_err(|error| (502, error)),
            None => {
                Err((400, "the URL must begin with http:// or https://, name a host and hold no spaces".to_owned()))
            }
        };
        let (status, mut json) = fetched.map_or_else(
            |(status, error)| {
                let failure = Failure { error: &error, source: &url };
                (status, serde_json::to_string(&failure).unwrap_or_default())
            },
            |json| (200, json),
        );
        json.push('\n');
        gaia_branes::answer_with(out, status, "application/json", json.as_bytes());
    }
}

wasip2::http::proxy::export!(CloudFetch);
