//! The requests of one pull or push: to whom, as whom, and where an answer may lead.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use gaia_egress::client::Timeouts;
use gaia_egress::resolve::{self, Resolve};
use gaia_egress::site::{Denied, Origin, Peer, Quoted};
use gaia_egress::{Bounds, Egress, Incoming, Shared, address};
use gaia_manifest::{Scheme, Site};
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use serde::Deserialize;

use crate::auth::{self, Challenge};
use crate::error::{Said, Why};
use crate::reference::Host;
use crate::settings::{Credentials, Settings};

/// Redirects that are followed one after the other: registries have one, to their storage.
const HOPS: usize = 3;
/// How often a token is asked for in one pull or push. One suffices unless it expires before a long push ends.
const SIGN_INS: usize = 4;
/// What a token service may answer, in bytes.
const TOKEN: u64 = 64 * 1024;
/// What is read of an answer that is no success, in bytes.
const COMPLAINT: u64 = 16 * 1024;
/// A request's body goes out in frames of so many bytes.
const FRAME: usize = 64 * 1024;
/// Resolving, connecting and TLS; and between two pieces of an answer.
const STEP: Duration = Duration::from_secs(30);
/// To the head of an answer.
const ANSWER: Duration = Duration::from_mins(1);
const AGENT: &str = concat!("gaia/", env!("CARGO_PKG_VERSION"));

/// Where a request goes: path and query behind the origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) origin: Origin,
    pub(crate) path: String,
}

impl Target {
    /// Reads what an answer refers to: an address, or a path on the same server.
    fn parse(text: &str, origin: &Origin) -> Result<Self, String> {
        if text.starts_with('/') && !text.starts_with("//") {
            let uri: Uri = text.parse().map_err(|_| "not an address")?;
            let path = uri.path_and_query().ok_or("not an address")?.to_string();
            return Ok(Self { origin: origin.clone(), path });
        }
        let uri: Uri = text.parse().map_err(|_| "not an address")?;
        let origin = Origin::of(&uri).map_err(|e| e.to_string())?;
        let path = uri.path_and_query().map_or_else(|| "/".into(), ToString::to_string);
        Ok(Self { origin, path })
    }

    /// With one more parameter in its query.
    pub(crate) fn with(mut self, parameter: &str) -> Self {
        self.path.push(if self.path.contains('?') { '&' } else { '?' });
        self.path.push_str(parameter);
        self
    }

    pub(crate) fn host(&self) -> Host {
        Host::of(&self.origin)
    }
}

/// A request as it is sent, and sent again once the registry knows who asks.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) method: Method,
    /// What an error says it was about.
    pub(crate) what: &'static str,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    /// `None`: it has no body, not even an empty one.
    pub(crate) body: Option<Bytes>,
    /// Bytes of the body that the connection took, on top of those of the requests before.
    pub(crate) sent: Arc<AtomicU64>,
    pub(crate) before: u64,
}

impl Ask {
    pub(crate) fn new(method: Method, what: &'static str) -> Self {
        Self { method, what, headers: Vec::new(), body: None, sent: Arc::default(), before: 0 }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(crate) fn body(mut self, body: Bytes) -> Self {
        self.body = Some(body);
        self
    }
}

/// A body in frames, counted as they go.
struct Frames {
    rest: Bytes,
    sent: Arc<AtomicU64>,
}

impl Body for Frames {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.rest.len().min(FRAME);
        let frame = self.rest.split_to(length);
        self.sent.fetch_add(length as u64, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// The addresses that were found and may be used: what was resolved once is not resolved again.
struct Found(Vec<IpAddr>);

impl Resolve for Found {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, resolve::Error>> {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
}

/// One pull or push at one registry.
pub(crate) struct Session<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) resolver: &'a Arc<dyn Resolve>,
    /// As the operator names it.
    pub(crate) host: Host,
    /// Where it is.
    pub(crate) origin: Origin,
    pub(crate) repository: String,
    /// What may be done, in a token's words: `pull`, `pull,push`.
    pub(crate) actions: &'static str,
    pub(crate) authorization: Option<HeaderValue>,
    pub(crate) sign_ins: usize,
    pub(crate) ways: BTreeMap<Origin, Arc<Egress>>,
}

impl Session<'_> {
    /// A place in the repository.
    pub(crate) fn at(&self, path: &str) -> Target {
        Target { origin: self.origin.clone(), path: format!("/v2/{}/{path}", self.repository) }
    }

    /// Asks for something, and again where the answer redirects to.
    ///
    /// # Errors
    /// If there is no answer. One that is no success is an answer.
    pub(crate) async fn get(&mut self, ask: &Ask, target: Target) -> Result<(Target, Response<Incoming>), Why> {
        let mut target = target;
        for _ in 0..=HOPS {
            let response = self.ask(ask, &target).await?;
            if !is_redirect(response.status()) {
                return Ok((target, response));
            }
            target = self.referred(&target, &response)?;
        }
        let (host, to) = (self.host.clone(), Quoted::new(&format!("{}{}", target.origin, target.path)));
        Err(Why::Redirect { host, to, why: format!("the redirect after {HOPS} others") })
    }

    /// Sends a request; if it is for the registry and it wants to know who asks, tells it and sends it again.
    ///
    /// # Errors
    /// As [`Session::get`]; redirects are answers, too.
    pub(crate) async fn ask(&mut self, ask: &Ask, target: &Target) -> Result<Response<Incoming>, Why> {
        let own = target.origin == self.origin;
        let mut signed_in = false;
        loop {
            let response = self.once(ask, target, self.authorization.clone().filter(|_| own)).await?;
            if !own || response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            if signed_in || self.sign_ins == SIGN_INS {
                return Err(self.unknown(StatusCode::UNAUTHORIZED));
            }
            let (parts, body) = response.into_parts();
            // Its end gives the connection back.
            let _ = read(body, ask.what, COMPLAINT).await;
            self.sign_ins += 1;
            self.sign_in(&parts.headers).await?;
            signed_in = true;
        }
    }

    async fn once(
        &mut self,
        ask: &Ask,
        target: &Target,
        authorization: Option<HeaderValue>,
    ) -> Result<Response<Incoming>, Why> {
        let failed = |error| Why::Http { host: target.host(), error };
        let way = self.way(&target.origin).await.map_err(failed)?;
        let mut request = Request::builder()
            .method(ask.method.clone())
            .uri(format!("{}{}", target.origin, target.path))
            .header(header::USER_AGENT, AGENT);
        for (name, value) in &ask.headers {
            request = request.header(name, value);
        }
        if let Some(value) = authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        let mut timeouts = Timeouts { connect: STEP, first_byte: ANSWER, between_bytes: STEP };
        if let Some(body) = &ask.body {
            request = request.header(header::CONTENT_LENGTH, body.len());
            // The whole body has to go out before; one that does not move on ends by itself.
            timeouts.first_byte = self.settings.within.max(ANSWER);
        }
        ask.sent.store(ask.before, Ordering::Relaxed);
        let body = Frames { rest: ask.body.clone().unwrap_or_default(), sent: Arc::clone(&ask.sent) };
        let request = request.body(body).map_err(|_| failed(gaia_egress::Error::Uri))?;
        way.send(request, timeouts).await.map_err(failed)
    }

    /// The connections to a server. Its name is resolved once. One that the operator named may be anywhere; one that a
    /// registry refers to has to be on the Internet at large, so that no registry sends this appliance to its neighbours.
    async fn way(&mut self, origin: &Origin) -> Result<Arc<Egress>, gaia_egress::Error> {
        if let Some(way) = self.ways.get(origin) {
            return Ok(Arc::clone(way));
        }
        let trusted = *origin == self.origin || self.settings.knows(origin);
        let port = format!(":{}", origin.port());
        let site = |peer: &Peer| Site::parse(&format!("{}://{peer}{port}", origin.scheme()));
        let mut addresses = Vec::new();
        let mut sites = Vec::from_iter(site(origin.host()).ok());
        match origin.host() {
            Peer::Address(address) => {
                if let Some(reason) = address::refused(*address).filter(|_| !trusted) {
                    return Err(Denied::Address { host: address.to_string(), address: *address, reason }.into());
                }
            }
            Peer::Name(name) => {
                let resolving = tokio::time::timeout(STEP, self.resolver.resolve(name)).await;
                addresses = resolving.map_err(|_| gaia_egress::Error::ConnectTimeout)??;
                if trusted {
                    sites.extend(addresses.iter().filter_map(|address| site(&Peer::Address(*address)).ok()));
                }
            }
        }
        let shared = self.shared.resolving(Arc::new(Found(addresses)));
        let way = Arc::new(Egress::new(&shared, sites, Bounds { connections: 4, kept: 2, ..Bounds::default() }));
        self.ways.insert(origin.clone(), Arc::clone(&way));
        Ok(way)
    }

    /// Where an answer refers to, if a request may go there: never from TLS to none, and without TLS only to whom the
    /// operator said so.
    pub(crate) fn referred(&self, from: &Target, response: &Response<Incoming>) -> Result<Target, Why> {
        let location = response.headers().get(header::LOCATION).map(HeaderValue::as_bytes);
        let location = location.map(String::from_utf8_lossy).unwrap_or_default();
        let refused = |why| Why::Redirect { host: from.host(), to: Quoted::new(&location), why };
        let target = Target::parse(&location, &from.origin).map_err(refused)?;
        self.may_follow(&from.origin, &target).map_err(refused)?;
        Ok(target)
    }

    fn may_follow(&self, from: &Origin, target: &Target) -> Result<(), String> {
        match (from.scheme(), target.origin.scheme()) {
            (_, Scheme::Https) => Ok(()),
            (Scheme::Https, Scheme::Http) => Err("from TLS to none is not followed".into()),
            (Scheme::Http, Scheme::Http) if target.origin == self.origin => Ok(()),
            (Scheme::Http, Scheme::Http) if self.settings.is_plain(&target.origin) => Ok(()),
            (Scheme::Http, Scheme::Http) => Err("without TLS, and it is not listed with plain_http = true".into()),
        }
    }

    fn credentials(&self) -> Option<&Credentials> {
        self.settings.credentials.get(&self.host)
    }

    /// The registry does not know who asks.
    fn unknown(&self, status: StatusCode) -> Why {
        match self.credentials() {
            Some(_) => Why::CredentialsRefused(self.host.clone(), status),
            None => Why::CredentialsMissing(self.host.clone(), status),
        }
    }

    /// Finds what to show to the registry that asked for it.
    async fn sign_in(&mut self, headers: &http::HeaderMap) -> Result<(), Why> {
        let challenge = |why: String| Why::Challenge { host: self.host.clone(), why };
        let (realm, service, scope) = match (Challenge::of(headers).map_err(challenge)?, self.credentials()) {
            (Challenge::Basic, None) => return Err(self.unknown(StatusCode::UNAUTHORIZED)),
            (Challenge::Basic, Some(credentials)) => {
                let basic = credentials.basic();
                let missing = || challenge("it wants user and password, and a token is what there is".into());
                self.authorization = Some(basic.ok_or_else(missing)?);
                return Ok(());
            }
            (Challenge::Bearer { .. }, Some(Credentials::Token(token))) => {
                let bearer = auth::bearer(token);
                let wrong = || challenge("the token for it is not one word of printable ASCII".into());
                self.authorization = Some(bearer.ok_or_else(wrong)?);
                return Ok(());
            }
            (Challenge::Bearer { realm, service, scope }, _) => (realm, service, scope),
        };
        let refused = |why: String| challenge(format!("tokens from {}: {why}", Quoted::new(&realm)));
        let target = Target::parse(&realm, &self.origin).map_err(refused)?;
        self.may_follow(&self.origin, &target).map_err(refused)?;
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(service) = &service {
            query.append_pair("service", service);
        }
        let own = || format!("repository:{}:{}", self.repository, self.actions);
        query.append_pair("scope", &scope.unwrap_or_else(own));
        let target = target.with(&query.finish());
        self.authorization = Some(self.token(&target).await?);
        Ok(())
    }

    /// A token of a token service: for whom the operator's credentials name, or for anybody.
    async fn token(&mut self, target: &Target) -> Result<HeaderValue, Why> {
        let ask = Ask::new(Method::GET, "a token");
        let basic = self.credentials().and_then(Credentials::basic);
        let response = self.once(&ask, target, basic).await?;
        let refused = |why| Why::Token { host: target.host(), why };
        match response.status() {
            StatusCode::OK => {}
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => return Err(self.unknown(status)),
            status if is_redirect(status) => return Err(refused("it redirects, with the credentials at stake".into())),
            _ => return Err(self.complaint(ask.what, target, response).await),
        }
        let answer = read(response.into_body(), ask.what, TOKEN).await.map_err(|error| error.of(target))?;
        auth::token(&answer).ok_or_else(|| refused("its answer has no token".into()))
    }

    /// What an answer that is no success means.
    pub(crate) async fn complaint(&self, what: &'static str, target: &Target, response: Response<Incoming>) -> Why {
        let (parts, body) = response.into_parts();
        let said = Said(read(body, what, COMPLAINT).await.ok().and_then(|body| complaint(&body)));
        let host = if target.origin == self.origin { self.host.clone() } else { target.host() };
        match parts.status {
            StatusCode::NOT_FOUND => Why::NotFound { host, what, said },
            StatusCode::FORBIDDEN if target.origin == self.origin => Why::Forbidden(host, said),
            status => Why::Status { host, what, status, said },
        }
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The first of the errors in a registry's answer (OCI distribution 1.1, "Error Codes").
fn complaint(body: &[u8]) -> Option<Quoted> {
    #[derive(Deserialize)]
    struct Complaint {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        code: Option<String>,
        message: Option<String>,
    }
    let first = serde_json::from_slice::<Complaint>(body).ok()?.errors.into_iter().next()?;
    let words: Vec<String> = [first.code, first.message].into_iter().flatten().collect();
    Some(Quoted::new(&words.join(": "))).filter(|_| !words.is_empty())
}

/// Why a body was not read.
#[derive(Debug)]
pub(crate) enum Unread {
    Broken(gaia_egress::Error),
    TooLarge { what: &'static str, size: u64, limit: u64 },
}

impl Unread {
    /// The same, of this server.
    pub(crate) fn of(self, target: &Target) -> Why {
        match self {
            Self::Broken(error) => Why::Http { host: target.host(), error },
            Self::TooLarge { what, size, limit } => Why::TooLarge { what, size, limit },
        }
    }
}

/// A body in one piece, if it is not larger than this.
pub(crate) async fn read(mut body: Incoming, what: &'static str, limit: u64) -> Result<Vec<u8>, Unread> {
    let announced = body.size_hint().lower();
    if announced > limit {
        return Err(Unread::TooLarge { what, size: announced, limit });
    }
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(Unread::Broken)?.into_data() {
            let size = bytes.len() as u64 + data.len() as u64;
            if size > limit {
                return Err(Unread::TooLarge { what, size, limit });
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin(text: &str) -> Origin {
        Origin::of(&text.parse().unwrap()).unwrap()
    }

    #[test]
    fn a_location_is_an_address_or_a_path() {
        let base = origin("https://registry.example:5000");
        for (text, wanted) in [
            ("/v2/a/blobs/uploads/1?_state=x", "https://registry.example:5000/v2/a/blobs/uploads/1?_state=x"),
            ("https://cdn.example/x?sig=a%2Fb#frag", "https://cdn.example/x?sig=a%2Fb"),
            ("HTTP://CDN.example:80", "http://cdn.example/"),
        ] {
            let target = Target::parse(text, &base).unwrap();
            assert_eq!(format!("{}{}", target.origin, target.path), wanted);
        }
        for text in ["", "x", "//evil.example/x", "ftp://a/b", "https://", "https://user@a/b", "https://a b/", "?x=1"] {
            assert!(Target::parse(text, &base).is_err(), "{text}");
        }
    }

    #[test]
    fn a_registrys_complaint_is_one_line() {
        let said = |body: &[u8]| Said(complaint(body)).to_string();
        assert_eq!(
            said(br#"{"errors":[{"code":"DENIED","message":"no\nway","detail":{}}]}"#),
            r#", saying "DENIED: no\nway""#
        );
        assert_eq!(said(br#"{"errors":[]}"#), "");
        assert_eq!(said(b"<html>"), "");
    }

    proptest! {
        #[test]
        fn any_location_is_a_target_or_told_why_not(text in "(https?://|/)?\\PC{0,60}") {
            if let Ok(target) = Target::parse(&text, &origin("http://a.example")) {
                prop_assert!(target.path.starts_with(['/', '?']), "{}", target.path);
            }
        }
    }
}
