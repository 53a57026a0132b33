//! `net.http`: requests to the sites that are named.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use gaia_egress::resolve;
use gaia_egress::site::{Denied, Origin, Quoted};
use gaia_egress::{Bounds, Egress, Incoming, Timeouts};
use gaia_manifest::Capability as Grant;
use http::{HeaderMap, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use wasmtime_wasi_http::p2::bindings::http::outgoing_handler;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttp, WasiHttpHooks, WasiHttpView as _};

use super::{Capability, Granted, Instance};
use crate::link::Interface;
use crate::log::Event;
use crate::trace::Trace;
use crate::worker::host::{BODY_PIECE, Host, Means};

/// Characters of a path that a line shows.
const MAX_PATH: usize = 500;

/// See the module.
pub(super) struct Http;

const OUTGOING: Interface = Interface {
    name: "wasi:http/outgoing-handler",
    add: |linker| outgoing_handler::add_to_linker::<Host, WasiHttp>(linker, Host::http),
};

impl Capability for Http {
    fn key(&self) -> &'static str {
        "net.http"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[OUTGOING]
    }

    fn smallest(&self) -> &'static str {
        "\"net.http\" = { allowlist = [] }"
    }

    fn configure(&self, grant: &Grant, granted: &mut Granted, means: &Means) {
        if let (Grant::Http(sites), Some(network), Some(names)) = (grant, &means.network, &granted.names) {
            let shared = network.shared.resolving(Arc::clone(names) as _);
            granted.egress = Some(Arc::new(Egress::new(&shared, sites.clone(), Bounds::default())));
        }
    }
}

/// An instance's requests to the outside.
pub struct Requests {
    egress: Option<Arc<Egress>>,
    instance: Arc<Instance>,
    /// What the request that is served belongs to.
    trace: Option<Trace>,
}

impl Requests {
    /// All are refused where there is no way out.
    #[must_use]
    pub fn new(egress: Option<Arc<Egress>>, instance: Arc<Instance>) -> Self {
        Self { egress, instance, trace: None }
    }

    /// From here on they belong to what a request with these headers belongs to.
    pub fn follow(&mut self, headers: &HeaderMap) {
        self.trace = self.egress.as_ref().and_then(|_| Trace::of(headers));
    }
}

type Sending = Box<dyn Future<Output = Result<(), Error>> + Send>;

impl WasiHttpHooks for Requests {
    fn is_supported_scheme(&mut self, _: &http::uri::Scheme) -> bool {
        // Another one is refused like another host: by the allowlist, with a line that says so.
        true
    }

    fn set_host_header(&mut self) -> bool {
        false
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_PIECE
    }

    fn send_request(
        &mut self,
        mut request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Sending,
    ) -> Box<dyn Future<Output = Result<(http::Response<WasiBody>, Sending), Error>> + Send> {
        let Some(egress) = self.egress.clone() else {
            return Box::new(std::future::ready(Err(Error::HttpRequestDenied)));
        };
        let (instance, uri) = (Arc::clone(&self.instance), request.uri().clone());
        let exchange = Exchange::begin(Arc::clone(&self.instance), &uri);
        if let Some(trace) = &self.trace {
            trace.go_on(request.headers_mut());
        }
        Box::new(async move {
            match egress.send(request, timeouts(options.unwrap_or_default())).await {
                Ok(response) => {
                    let exchange = exchange.ended(Outcome::Answered);
                    let nothing: Sending = Box::new(std::future::ready(Ok(())));
                    Ok((response.map(|body| Answer::new(body, exchange).boxed_unsync()), nothing))
                }
                Err(error) => {
                    drop(exchange.ended(match &error {
                        gaia_egress::Error::Denied(denied) => {
                            instance.deny("net.http", words(denied, &uri));
                            Outcome::Denied
                        }
                        other => Outcome::Failed(other.code()),
                    }));
                    Err(of(error))
                }
            }
        })
    }
}

fn timeouts(options: RequestOptions) -> Timeouts {
    let usual = Timeouts::default();
    Timeouts {
        connect: options.connect_timeout.unwrap_or(usual.connect),
        first_byte: options.first_byte_timeout.unwrap_or(usual.first_byte),
        between_bytes: options.between_bytes_timeout.unwrap_or(usual.between_bytes),
    }
}

/// What a request is refused for, and whom it was for. What stands before the host may be a password: it is left out.
fn words(denied: &Denied, uri: &Uri) -> String {
    match denied {
        Denied::Scheme | Denied::NoHost | Denied::Userinfo | Denied::TooLong(_) | Denied::Method(_) => {
            let authority = uri.authority().map_or("", |a| a.as_str());
            let host = authority.rsplit('@').next().unwrap_or(authority);
            format!("{}: {denied}", Quoted::new(host))
        }
        other => other.to_string(),
    }
}

/// The case of `wasi:http`'s `error-code` that says the same; [`gaia_egress::Error::code`] has its name.
fn of(error: gaia_egress::Error) -> Error {
    use gaia_egress::Error as E;
    use std::io::ErrorKind;
    let most = |bytes: usize| u32::try_from(bytes).ok();
    match error {
        E::Denied(_) => Error::HttpRequestDenied,
        E::Dns(resolve::Error::Timeout) => Error::DnsTimeout,
        E::Dns(why) => Error::DnsError { rcode: why.rcode().map(str::to_owned), info_code: None },
        E::Connect(ErrorKind::ConnectionRefused) => Error::ConnectionRefused,
        E::Connect(ErrorKind::TimedOut) | E::ConnectTimeout => Error::ConnectionTimeout,
        E::Connect(ErrorKind::NetworkUnreachable) => Error::DestinationIpUnroutable,
        E::Connect(_) => Error::DestinationUnavailable,
        E::ConnectionLimit => Error::ConnectionLimitReached,
        E::TlsCertificate(_) => Error::TlsCertificateError,
        E::TlsAlert { id, name } => Error::TlsAlertReceived { alert_id: Some(id), alert_message: Some(name) },
        E::TlsProtocol(_) => Error::TlsProtocolError,
        E::Uri => Error::HttpRequestUriInvalid,
        E::UriTooLong(_) => Error::HttpRequestUriTooLong,
        E::RequestHeaders(bytes) => Error::HttpRequestHeaderSectionSize(most(bytes)),
        E::ContentLength => Error::HttpRequestBodySize(None),
        E::RequestBodySize(bytes) => Error::HttpRequestBodySize(Some(bytes)),
        E::WriteTimeout => Error::ConnectionWriteTimeout,
        E::FirstByteTimeout => Error::HttpResponseTimeout,
        E::BetweenBytesTimeout => Error::ConnectionReadTimeout,
        E::ResponseHeaders => Error::HttpResponseHeaderSectionSize(None),
        E::ResponseIncomplete => Error::HttpResponseIncomplete,
        E::RequestBody(_) | E::Terminated => Error::ConnectionTerminated,
        E::Upgrade => Error::HttpUpgradeFailed,
        E::Protocol(_) => Error::HttpProtocolError,
        other => Error::InternalError(Some(other.to_string())),
    }
}

/// How a request ended.
enum Outcome {
    /// Whoever sent it is gone before there was an answer.
    GivenUp,
    /// There is a line that says so.
    Denied,
    /// With the name of the error that the guest sees.
    Failed(&'static str),
    /// As far as the guest read it.
    Answered,
}

/// A request from its head to the end of its answer; then its line is written, however it ends.
struct Exchange {
    instance: Arc<Instance>,
    /// Host and path.
    text: String,
    began: Instant,
    bytes: u64,
    outcome: Outcome,
}

impl Exchange {
    fn begin(instance: Arc<Instance>, uri: &Uri) -> Self {
        let mut text = Origin::of(uri).map(|origin| origin.authority()).unwrap_or_default();
        text.extend(uri.path().chars().take(MAX_PATH));
        if uri.path().chars().nth(MAX_PATH).is_some() {
            text.push_str("...");
        }
        Self { instance, text, began: Instant::now(), bytes: 0, outcome: Outcome::GivenUp }
    }

    fn ended(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let how = match self.outcome {
            Outcome::Denied => return,
            Outcome::Answered => "",
            Outcome::GivenUp => " given-up",
            Outcome::Failed(code) => {
                self.text.push(' ');
                code
            }
        };
        self.text.push_str(how);
        let text = self.text.as_str().into();
        self.instance.log(&Event::Request { text, bytes: self.bytes, dur: self.began.elapsed() });
    }
}

/// An answer's body on its way to the guest.
struct Answer {
    body: Incoming,
    /// Until its end.
    exchange: Option<Exchange>,
}

impl Answer {
    fn new(body: Incoming, exchange: Exchange) -> Self {
        let over = body.is_end_stream();
        Self { body, exchange: Some(exchange).filter(|_| !over) }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(exchange) = &mut self.exchange {
            match &frame {
                Some(Ok(frame)) => exchange.bytes += frame.data_ref().map_or(0, Bytes::len) as u64,
                Some(Err(error)) => exchange.outcome = Outcome::Failed(error.code()),
                None => {}
            }
        }
        if self.body.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.exchange = None;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(of)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Log, Reader, Subject};
    use crate::statistics::Statistics;
    use crate::worker::conversation::Names;
    use gaia_egress::{Error as E, Shared};
    use gaia_manifest::Site;
    use std::io::ErrorKind;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[test]
    fn each_error_is_the_case_that_it_says_it_is() {
        let all = [
            E::Denied(Denied::Scheme),
            E::Dns(resolve::Error::Timeout),
            E::Dns(resolve::Error::NotFound),
            E::Connect(ErrorKind::ConnectionRefused),
            E::Connect(ErrorKind::TimedOut),
            E::Connect(ErrorKind::NetworkUnreachable),
            E::Connect(ErrorKind::HostUnreachable),
            E::ConnectTimeout,
            E::ConnectionLimit,
            E::TlsCertificate(String::new()),
            E::TlsAlert { id: 40, name: String::new() },
            E::TlsProtocol(String::new()),
            E::Uri,
            E::UriTooLong(1),
            E::RequestHeaders(1),
            E::ContentLength,
            E::RequestBodySize(1),
            E::RequestBody(String::new()),
            E::WriteTimeout,
            E::FirstByteTimeout,
            E::BetweenBytesTimeout,
            E::ResponseHeaders,
            E::ResponseIncomplete,
            E::Terminated,
            E::Upgrade,
            E::Protocol(String::new()),
        ];
        for error in all {
            let code = error.code().replace('-', "").to_lowercase();
            let case: String = format!("{:?}", of(error)).chars().take_while(char::is_ascii_alphanumeric).collect();
            assert_eq!(case.to_lowercase(), code);
        }
    }

    #[test]
    fn a_denial_names_its_host_and_never_what_stands_before_it() {
        let uri: Uri = "https://user:secret@api.example:8443/".parse().unwrap();
        assert_eq!(words(&Denied::Userinfo, &uri), "\"api.example:8443\": a user before the host");
    }

    /// An instance that may send to these sites, and its log.
    fn instance(sites: &[String]) -> (Requests, Arc<Statistics>) {
        let page = Statistics::page();
        let names = Arc::new(Names::default()).share();
        let shared = Shared::new(names, gaia_egress::roots("").unwrap(), 1, 1).unwrap();
        let sites = sites.iter().map(|site| Site::parse(site).unwrap()).collect();
        let egress = Arc::new(Egress::new(&shared, sites, Bounds::default()));
        let own = Instance::new(Arc::new(Log::new(Arc::clone(&page))), Subject::Brane(0, 1));
        (Requests::new(Some(egress), Arc::new(own)), page)
    }

    fn posted(uri: &str, body: WasiBody) -> http::Request<WasiBody> {
        http::Request::post(uri).body(body).unwrap()
    }

    #[test]
    fn another_scheme_is_a_denial_and_not_a_protocol_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (mut requests, page) = instance(&["evil.example".into()]);
        assert!(requests.is_supported_scheme(&"ftp".parse().unwrap()), "it comes as far as to be refused");
        let body = http_body_util::Empty::new().map_err(Error::from).boxed_unsync();
        let nothing: Sending = Box::new(std::future::ready(Ok(())));
        let refused = requests.send_request(posted("ftp://evil.example/", body), None, nothing);
        let refused = runtime.block_on(Pin::from(refused)).map(|(response, _)| response);
        assert!(matches!(refused, Err(Error::HttpRequestDenied)));
        let mut reader = Reader::new(&page);
        let text = "net.http \"evil.example\": the scheme is neither http nor https".into();
        assert_eq!(reader.next().unwrap().event, Event::Deny { text });
        assert_eq!(reader.next(), None, "a denial is no request besides");
    }

    /// Would miss: a body that is sent only when it is whole, or an answer that is.
    #[test]
    fn bodies_go_both_ways_piece_by_piece() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let site = listener.local_addr().unwrap().to_string();
            let (mut requests, page) = instance(std::slice::from_ref(&site));
            let (pieces, body) = tokio::sync::mpsc::channel::<Bytes>(1);
            let body = futures_util::stream::unfold(body, |mut body| async {
                body.recv().await.map(|piece| (Ok::<_, Error>(Frame::data(piece)), body))
            });
            let body = http_body_util::StreamBody::new(body).boxed_unsync();
            let nothing: Sending = Box::new(std::future::ready(Ok(())));
            let sending = requests.send_request(posted(&format!("http://{site}/echo?q"), body), None, nothing);
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"3\r\none\r\n") {
                    assert!(stream.read_buf(&mut request).await.unwrap() > 0);
                }
                let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nuno\r\n";
                stream.write_all(head).await.unwrap();
                stream
            };
            pieces.send("one".into()).await.unwrap();
            let (response, mut stream) = tokio::join!(Pin::from(sending), server);
            let mut body = response.unwrap().0.into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "uno");
            pieces.send("two".into()).await.unwrap();
            drop(pieces);
            let mut rest = Vec::new();
            while !rest.ends_with(b"3\r\ntwo\r\n0\r\n\r\n") {
                assert!(stream.read_buf(&mut rest).await.unwrap() > 0);
            }
            assert_eq!(Reader::new(&page).next(), None, "it is not over");
            stream.write_all(b"5\r\ndos!!\r\n0\r\n\r\n").await.unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "dos!!");
            assert!(body.frame().await.is_none());
            let event = Reader::new(&page).next().unwrap().event;
            let Event::Request { text, bytes, .. } = event else { panic!("{event:?}") };
            assert_eq!((text.as_ref(), bytes), (format!("{site}/echo").as_str(), 8));
        });
    }
}
