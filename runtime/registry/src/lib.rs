//! Components from and to OCI registries.
//!
//! Owns the names of components ([`Reference`]) and the small part of the OCI distribution protocol that one component
//! needs: manifest, one layer, upload, and how a registry learns who asks. It speaks HTTP and TLS through `gaia-egress`,
//! with that crate's resolver, trust and bounds; it knows nothing of the store, reads no file and runs no component. Called by
//! control, in one thread.
//!
//! Registries are believed nothing: each has time, a number of bytes and a number of steps, what it refers to is checked, and
//! what it sends counts only if it has the digest it should have.

mod artefact;
mod auth;
mod error;
mod reference;
mod session;
mod settings;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use gaia_egress::resolve::Resolve;
use gaia_egress::site::Quoted;
use gaia_egress::{Shared, roots};
use gaia_manifest::Scheme;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use sha2::Digest as _;

use crate::artefact::{Artefact, Blob};
use crate::session::{Ask, Session, Target, read};

pub use crate::error::{Doing, Error, Said, Why};
pub use crate::reference::{Digest, Host, Reference, ReferenceError, Wrong};
pub use crate::settings::{Credentials, Settings};

/// The largest manifest or index, in bytes. That of a component has one kilobyte.
const MAX_MANIFEST: u64 = 1024 * 1024;
/// A manifest that was asked for by digest.
const PINNED: &str = "manifest with that digest (before a component's own there has to be a tag)";
/// The pieces of an upload where one request is too large, in bytes: what all registries take.
const CHUNK: u64 = 4 * 1024 * 1024;
/// The largest pieces that are sent because a registry wants no smaller ones, in bytes.
const LARGEST_CHUNK: u64 = 64 * 1024 * 1024;
/// How often the caller hears of an upload that is under way.
const TICK: Duration = Duration::from_millis(100);
/// What a registry calls a manifest's digest.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// The smallest pieces that a registry takes (OCI distribution 1.1, "Pushing a blob in chunks").
const MIN_CHUNK: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// How far a pull or a push is, in bytes of the component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are through.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What a pull brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Of the component's bytes.
    pub component: Digest,
    /// Of the manifest, or the index, that the name stood for: what pins it in the OCI sense.
    pub manifest: Digest,
    /// The layer's media type.
    pub media_type: String,
    /// Of the component, in bytes.
    pub size: u64,
}

/// The settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The extra roots.
    #[error("the registries' roots: {0}")]
    Roots(#[from] gaia_egress::client::RootsError),
    /// TLS cannot be set up, which is a fault of the build.
    #[error(transparent)]
    Tls(#[from] gaia_egress::Error),
}

/// Pulls from and pushes to registries.
pub struct Registry {
    settings: Settings,
    shared: Arc<Shared>,
    resolver: Arc<dyn Resolve>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Registry {
    /// With these settings, and names resolved by this resolver alone.
    ///
    /// # Errors
    /// If the roots are no certificates.
    pub fn new(settings: Settings, resolver: Arc<dyn Resolve>) -> Result<Self, SettingsError> {
        let shared = Shared::new(Arc::clone(&resolver), roots(&settings.roots)?, 8, 4)?;
        Ok(Self { settings, shared, resolver })
    }

    /// The name with its registry: itself, or in the default registry; `None` if neither has one.
    #[must_use]
    pub fn remote(&self, reference: &Reference) -> Option<Reference> {
        match (reference.host(), &self.settings.default) {
            (Some(_), _) => Some(reference.clone()),
            (None, default) => default.clone().map(|host| reference.at(host)),
        }
    }

    /// Fetches a component, piece by piece into `sink`, at most `limit` bytes of it.
    ///
    /// A digest in the reference is that of the manifest (or index), as everywhere in OCI. Where a tag stands before it, it may
    /// also be that of the component itself, as in the local store: both fix the same bytes. A tag that has moved on does not
    /// matter as long as the registry has the manifest.
    ///
    /// What has gone to `sink` is the component only if this returns `Ok`: the digest is known at the end.
    ///
    /// # Errors
    /// [`Error`]. Nothing is tried again.
    pub async fn pull(
        &self,
        reference: &Reference,
        limit: u64,
        sink: impl FnMut(&[u8]) -> io::Result<()>,
        progress: impl FnMut(Progress),
    ) -> Result<Pulled, Error> {
        self.pull_unless(reference, limit, |_| false, sink, progress).await
    }

    /// The same, but what the name stands for is not fetched if `held` says that it is here already: then nothing goes to
    /// `sink`, and the registry is asked for its manifest alone.
    ///
    /// # Errors
    /// [`Error`]. Nothing is tried again.
    pub async fn pull_unless(
        &self,
        reference: &Reference,
        limit: u64,
        held: impl FnOnce(&Digest) -> bool,
        mut sink: impl FnMut(&[u8]) -> io::Result<()>,
        mut progress: impl FnMut(Progress),
    ) -> Result<Pulled, Error> {
        let remote = self.remote(reference);
        let pulling = async {
            let mut session = self.session(remote.as_ref().ok_or(Why::NoRegistry)?, "pull")?;
            session.pull(reference, limit, held, &mut sink, &mut progress).await
        };
        let done = tokio::time::timeout(self.settings.within, pulling).await;
        let done = done.unwrap_or(Err(Why::Time(self.settings.within)));
        done.map_err(|why| error(Doing::Pull, remote.as_ref().unwrap_or(reference), why))
    }

    /// Puts a component into a registry, under the reference's tag (`latest` without one), with annotations of the manifest;
    /// the digest of its manifest. The same component with the same annotations has always the same.
    ///
    /// # Errors
    /// [`Error`]. What was uploaded before it is of no consequence; registries collect it.
    pub async fn push(
        &self,
        reference: &Reference,
        wasm: Bytes,
        annotations: &BTreeMap<String, String>,
        mut progress: impl FnMut(Progress),
    ) -> Result<Digest, Error> {
        let remote = self.remote(reference);
        let pushing = async {
            let mut session = self.session(remote.as_ref().ok_or(Why::NoRegistry)?, "pull,push")?;
            session.push(reference, wasm, annotations, &mut progress).await
        };
        let done = tokio::time::timeout(self.settings.within, pushing).await;
        let done = done.unwrap_or(Err(Why::Time(self.settings.within)));
        done.map_err(|why| error(Doing::Push, remote.as_ref().unwrap_or(reference), why))
    }

    fn session(&self, reference: &Reference, actions: &'static str) -> Result<Session<'_>, Why> {
        let host = reference.host().ok_or(Why::NoRegistry)?.clone();
        let scheme = if self.settings.plain.contains(&host) { Scheme::Http } else { Scheme::Https };
        let mut repository = reference.repository().to_owned();
        let mut place = host.clone();
        // Docker Hub's registry is elsewhere, and its names of one part are in a namespace.
        if host.to_string() == "docker.io" {
            place = Host::parse("registry-1.docker.io").unwrap_or(place);
            if !repository.contains('/') {
                repository.insert_str(0, "library/");
            }
        }
        let origin = place.origin(scheme).map_err(|e| Why::Http { host: host.clone(), error: e.into() })?;
        Ok(Session {
            settings: &self.settings,
            shared: &self.shared,
            resolver: &self.resolver,
            host,
            origin,
            repository,
            actions,
            authorization: None,
            sign_ins: 0,
            ways: BTreeMap::new(),
        })
    }
}

fn error(doing: Doing, reference: &Reference, why: Why) -> Error {
    Error { doing, reference: reference.clone(), why }
}

/// A manifest as it came: what it leads to, and its digest.
struct Manifest {
    leads_to: Artefact,
    digest: Digest,
}

impl Session<'_> {
    async fn pull(
        &mut self,
        reference: &Reference,
        limit: u64,
        held: impl FnOnce(&Digest) -> bool,
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<Pulled, Why> {
        let (manifest, layer) = match (reference.tag_or_latest(), reference.digest()) {
            (None, None) => return Err(Why::Manifest("neither tag nor digest".into())),
            (Some(tag), None) => self.found(tag, None).await?,
            (None, Some(digest)) => self.found(&digest.to_string(), Some(digest)).await?,
            (Some(tag), Some(digest)) => self.found_pinned(tag, digest).await?,
        };
        if layer.size > limit {
            return Err(Why::TooLarge { what: "a component", size: layer.size, limit });
        }
        if !held(&layer.digest) {
            self.component(&layer, sink, progress).await?;
        }
        Ok(Pulled { component: layer.digest, manifest, media_type: layer.media_type, size: layer.size })
    }

    /// The digest of what a tag or a digest stands for, and the component in it.
    async fn found(&mut self, name: &str, digest: Option<Digest>) -> Result<(Digest, Blob), Why> {
        let top = self.manifest(name, digest, None).await?;
        let layer = match top.leads_to {
            Artefact::Component(layer) => layer,
            Artefact::Index(Blob { digest, size, .. }) => {
                match self.manifest(&digest.to_string(), Some(digest), Some(size)).await?.leads_to {
                    Artefact::Component(layer) => layer,
                    Artefact::Index(_) => return Err(Why::Manifest("an index in an index".into())),
                }
            }
        };
        Ok((top.digest, layer))
    }

    /// The same of a tag that is pinned. The tag comes first: asked for a manifest by the digest of a component, Docker's registry
    /// takes the component for one and answers 500. Where the tag has moved on, or is gone, the digest alone counts.
    async fn found_pinned(&mut self, tag: &str, pin: Digest) -> Result<(Digest, Blob), Why> {
        let moved = match self.found(tag, None).await {
            Ok((manifest, layer)) if manifest == pin || layer.digest == pin => return Ok((manifest, layer)),
            Ok((_, layer)) => Some(layer.digest),
            // Of the tag alone, and no matter for the digest.
            Err(
                Why::NotFound { .. }
                | Why::Manifest(_)
                | Why::NotWasm(_)
                | Why::SeveralComponents(_)
                | Why::Index(_)
                | Why::TooLarge { .. }
                | Why::Size { .. }
                | Why::Digest { .. },
            ) => None,
            Err(other) => return Err(other),
        };
        match (self.found(&pin.to_string(), Some(pin)).await, moved) {
            (Err(Why::NotFound { .. } | Why::Status { .. }), Some(got)) => {
                Err(Why::Digest { what: "neither the manifest nor the component", wanted: pin, got })
            }
            (found, _) => found,
        }
    }

    /// Reads a manifest by tag or digest; what is known of it before has to be true.
    async fn manifest(&mut self, name: &str, digest: Option<Digest>, size: Option<u64>) -> Result<Manifest, Why> {
        let what = if digest.is_some() { PINNED } else { "manifest" };
        let ask = Ask::new(Method::GET, what).header(header::ACCEPT, HeaderValue::from_static(artefact::ACCEPT));
        let (target, response) = self.get(&ask, self.at(&format!("manifests/{name}"))).await?;
        if response.status() != StatusCode::OK {
            return Err(self.complaint(ask.what, &target, response).await);
        }
        let (parts, body) = response.into_parts();
        let limit = size.unwrap_or(MAX_MANIFEST).min(MAX_MANIFEST);
        let bytes = read(body, "the manifest", limit).await.map_err(|error| error.of(&target))?;
        if let Some(announced) = size.filter(|size| *size != bytes.len() as u64) {
            return Err(Why::Size { what: "the manifest", announced, got: bytes.len() as u64 });
        }
        let got = Digest::of(&bytes);
        let header = |name: HeaderName| parts.headers.get(name).and_then(|value| value.to_str().ok());
        // Asked for by tag, the registry itself says which digest that is; in another algorithm than SHA-256 it says nothing here.
        let wanted = digest.or_else(|| header(CONTENT_DIGEST).and_then(Digest::parse));
        if let Some(wanted) = wanted.filter(|wanted| *wanted != got) {
            return Err(Why::Digest { what: "the manifest", wanted, got });
        }
        Ok(Manifest { leads_to: Artefact::read(&bytes, header(header::CONTENT_TYPE))?, digest: got })
    }

    /// Streams the component, no byte more than it was announced with.
    async fn component(
        &mut self,
        layer: &Blob,
        sink: &mut impl FnMut(&[u8]) -> io::Result<()>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Why> {
        const WHAT: &str = "the component";
        let ask = Ask::new(Method::GET, WHAT).header(header::ACCEPT, HeaderValue::from_static("*/*"));
        let (target, response) = self.get(&ask, self.at(&format!("blobs/{}", layer.digest))).await?;
        if response.status() != StatusCode::OK {
            return Err(self.complaint(WHAT, &target, response).await);
        }
        let (parts, mut body) = response.into_parts();
        if let Some(coding) = parts.headers.get(header::CONTENT_ENCODING).filter(|coding| *coding != "identity") {
            let coding = Quoted::new(&String::from_utf8_lossy(coding.as_bytes()));
            return Err(Why::Coding { host: target.host(), coding });
        }
        let announced = layer.size;
        let wrong = |got| Why::Size { what: WHAT, announced, got };
        if let Some(exact) = body.size_hint().exact().filter(|exact| *exact != announced) {
            return Err(wrong(exact));
        }
        let (mut done, mut hash) = (0, sha2::Sha256::new());
        progress(Progress { done, total: announced });
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Why::Http { host: target.host(), error })?;
            let Ok(data) = frame.into_data() else { continue };
            done += data.len() as u64;
            if done > announced {
                return Err(wrong(done));
            }
            hash.update(&data);
            sink(&data).map_err(Why::Sink)?;
            progress(Progress { done, total: announced });
        }
        if done != announced {
            return Err(wrong(done));
        }
        let got = Digest(hash.finalize().into());
        if got == layer.digest { Ok(()) } else { Err(Why::Digest { what: WHAT, wanted: layer.digest, got }) }
    }

    async fn push(
        &mut self,
        reference: &Reference,
        wasm: Bytes,
        annotations: &BTreeMap<String, String>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<Digest, Why> {
        if reference.digest().is_some() {
            return Err(Why::PushPinned);
        }
        let written = artefact::written(&wasm, annotations)?;
        self.upload("the configuration", &written.config.into(), &mut |_| ()).await?;
        self.upload("the component", &wasm, progress).await?;
        let digest = Digest::of(&written.manifest);
        let ask = Ask::new(Method::PUT, "the manifest's upload")
            .header(header::CONTENT_TYPE, HeaderValue::from_static(artefact::MANIFEST))
            .body(written.manifest.into());
        let target = self.at(&format!("manifests/{}", reference.tag_or_latest().unwrap_or_default()));
        let response = self.ask(&ask, &target).await?;
        if !response.status().is_success() {
            return Err(self.complaint(ask.what, &target, response).await);
        }
        let theirs = response.headers().get(CONTENT_DIGEST).and_then(|value| value.to_str().ok());
        match theirs.and_then(Digest::parse) {
            Some(got) if got != digest => Err(Why::Digest { what: "the manifest's upload", wanted: digest, got }),
            _ => Ok(digest),
        }
    }

    /// Sees to it that the registry has a blob: in one request, or in pieces.
    async fn upload(
        &mut self,
        what: &'static str,
        bytes: &Bytes,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Why> {
        let (total, digest) = (bytes.len() as u64, Digest::of(bytes));
        progress(Progress { done: 0, total });
        let head = Ask::new(Method::HEAD, what);
        let target = self.at(&format!("blobs/{digest}"));
        let response = self.ask(&head, &target).await?;
        match response.status() {
            StatusCode::NOT_FOUND => {}
            // A redirect leads to it.
            status if status.is_success() || status.is_redirection() => {
                progress(Progress { done: total, total });
                return Ok(());
            }
            _ => return Err(self.complaint(what, &target, response).await),
        }
        drop(response);
        let chunk = self.settings.chunk.unwrap_or(CHUNK);
        if self.settings.chunk.is_none() || total <= chunk {
            let (target, _) = self.upload_target(what).await?;
            match self.put(what, bytes, target, digest, progress).await {
                // The server may hang up before all of a body has come that is too large for it.
                Err(Why::Status { status: StatusCode::PAYLOAD_TOO_LARGE, .. } | Why::Http { .. }) if total > chunk => {}
                other => return other,
            }
        }
        self.upload_in_pieces(what, bytes, digest, chunk, progress).await
    }

    /// Where an upload goes to, and the smallest pieces for it.
    async fn upload_target(&mut self, what: &'static str) -> Result<(Target, u64), Why> {
        let ask = Ask::new(Method::POST, what).body(Bytes::new());
        let target = self.at("blobs/uploads/");
        let response = self.ask(&ask, &target).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.complaint(what, &target, response).await);
        }
        let least = response.headers().get(MIN_CHUNK).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok((self.referred(&target, &response)?, least.unwrap_or(0)))
    }

    /// The last request of an upload, with all of it or with nothing.
    async fn put(
        &mut self,
        what: &'static str,
        bytes: &Bytes,
        target: Target,
        digest: Digest,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Why> {
        let ask = Ask::new(Method::PUT, what)
            .header(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
            .body(bytes.clone());
        let target = target.with(&format!("digest={digest}"));
        let total = bytes.len() as u64;
        let response = self.watched(&ask, &target, total, progress).await?;
        if !response.status().is_success() {
            return Err(self.complaint(what, &target, response).await);
        }
        Ok(())
    }

    async fn upload_in_pieces(
        &mut self,
        what: &'static str,
        bytes: &Bytes,
        digest: Digest,
        chunk: u64,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Why> {
        let total = bytes.len() as u64;
        let (mut target, least) = self.upload_target(what).await?;
        let chunk = chunk.max(least.min(LARGEST_CHUNK));
        let mut rest = bytes.clone();
        let mut done = 0;
        while !rest.is_empty() {
            let piece = rest.split_to(usize::try_from(chunk).unwrap_or(usize::MAX).min(rest.len()));
            let after = done + piece.len() as u64;
            // Both ends are part of it, and there is neither a unit nor a total (OCI distribution 1.1).
            let range =
                HeaderValue::from_str(&format!("{done}-{}", after - 1)).map_err(|e| Why::Manifest(e.to_string()))?;
            let mut ask = Ask::new(Method::PATCH, what)
                .header(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
                .header(header::CONTENT_RANGE, range)
                .body(piece);
            ask.before = done;
            let response = self.watched(&ask, &target, total, progress).await?;
            if !response.status().is_success() {
                return Err(self.complaint(what, &target, response).await);
            }
            target = self.referred(&target, &response)?;
            done = after;
        }
        self.put(what, &Bytes::new(), target, digest, &mut |_| ()).await?;
        progress(Progress { done: total, total });
        Ok(())
    }

    /// Sends a request and tells how far it is.
    async fn watched(
        &mut self,
        ask: &Ask,
        target: &Target,
        total: u64,
        progress: &mut impl FnMut(Progress),
    ) -> Result<http::Response<gaia_egress::Incoming>, Why> {
        let sent: Arc<AtomicU64> = Arc::clone(&ask.sent);
        let told = |progress: &mut dyn FnMut(Progress)| {
            progress(Progress { done: sent.load(Ordering::Relaxed).min(total), total });
        };
        let mut sending = std::pin::pin!(self.ask(ask, target));
        let response = loop {
            tokio::select! {
                response = &mut sending => break response?,
                () = tokio::time::sleep(TICK) => told(progress),
            }
        };
        told(progress);
        Ok(response)
    }
}
