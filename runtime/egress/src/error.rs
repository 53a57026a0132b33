//! Why a request had no answer, in terms that `wasi:http` has names for.

use std::error::Error as StdError;
use std::io;

use crate::resolve;
use crate::site::Denied;

/// Why a request, or the rest of an answer's body, did not come through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The brane may not send it: a `DENY` line.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The name was not resolved.
    #[error(transparent)]
    Dns(#[from] resolve::Error),
    /// None of the addresses took the connection; the last one's answer.
    #[error("connect: {0}")]
    Connect(io::ErrorKind),
    /// Resolving, connecting and TLS together took longer than the guest allows.
    #[error("no connection in time")]
    ConnectTimeout,
    /// The brane, or all branes of the worker together, have as many connections as they may.
    #[error("too many connections at a time")]
    ConnectionLimit,
    /// The server's certificate is not good for the host.
    #[error("the server's certificate: {0}")]
    TlsCertificate(String),
    /// The server ended the handshake, or the connection, with an alert.
    #[error("TLS alert {id} from the server: {name}")]
    TlsAlert {
        /// Its number (RFC 8446 6).
        id: u8,
        /// Its name.
        name: String,
    },
    /// What the server said is not TLS, or none that is spoken here.
    #[error("TLS: {0}")]
    TlsProtocol(String),
    /// The address has no path that a server could be asked for.
    #[error("the path of the address")]
    Uri,
    /// Path and query are longer than 16 KiB.
    #[error("path and query of {0} bytes")]
    UriTooLong(usize),
    /// The request's headers are larger than 64 KiB, each with 32 bytes on top.
    #[error("request headers of {0} bytes")]
    RequestHeaders(usize),
    /// `Content-Length` is no number, or several.
    #[error("Content-Length is not one number")]
    ContentLength,
    /// The body has not as many bytes as `Content-Length` says.
    #[error("a request body that has not the {0} bytes of its Content-Length")]
    RequestBodySize(u64),
    /// The guest broke its own body off.
    #[error("the request's body broke off: {0}")]
    RequestBody(String),
    /// The server did not read the request for too long.
    #[error("the server does not read the request")]
    WriteTimeout,
    /// The answer's head did not come in time.
    #[error("no answer in time")]
    FirstByteTimeout,
    /// The answer's body paused for longer than the guest allows.
    #[error("the answer's body paused too long")]
    BetweenBytesTimeout,
    /// The answer's headers are larger than 32 KiB.
    #[error("response headers too large")]
    ResponseHeaders,
    /// The connection ended in the middle of the answer's body.
    #[error("the answer broke off")]
    ResponseIncomplete,
    /// The connection ended before an answer.
    #[error("the connection ended before an answer")]
    Terminated,
    /// The server wants to speak another protocol.
    #[error("the server changes the protocol")]
    Upgrade,
    /// What the server said is not HTTP.
    #[error("HTTP: {0}")]
    Protocol(String),
}

impl Error {
    /// The case of `wasi:http/types`' `error-code` that says the same to the guest.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Denied(_) => "HTTP-request-denied",
            Self::Dns(resolve::Error::Timeout) => "DNS-timeout",
            Self::Dns(_) => "DNS-error",
            Self::Connect(io::ErrorKind::ConnectionRefused) => "connection-refused",
            Self::Connect(io::ErrorKind::TimedOut) | Self::ConnectTimeout => "connection-timeout",
            Self::Connect(io::ErrorKind::NetworkUnreachable) => "destination-IP-unroutable",
            Self::Connect(_) => "destination-unavailable",
            Self::ConnectionLimit => "connection-limit-reached",
            Self::TlsCertificate(_) => "TLS-certificate-error",
            Self::TlsAlert { .. } => "TLS-alert-received",
            Self::TlsProtocol(_) => "TLS-protocol-error",
            Self::Uri => "HTTP-request-URI-invalid",
            Self::UriTooLong(_) => "HTTP-request-URI-too-long",
            Self::RequestHeaders(_) => "HTTP-request-header-section-size",
            Self::ContentLength | Self::RequestBodySize(_) => "HTTP-request-body-size",
            Self::WriteTimeout => "connection-write-timeout",
            Self::FirstByteTimeout => "HTTP-response-timeout",
            Self::BetweenBytesTimeout => "connection-read-timeout",
            Self::ResponseHeaders => "HTTP-response-header-section-size",
            Self::ResponseIncomplete => "HTTP-response-incomplete",
            Self::RequestBody(_) | Self::Terminated => "connection-terminated",
            Self::Upgrade => "HTTP-upgrade-failed",
            Self::Protocol(_) => "HTTP-protocol-error",
        }
    }

    /// Of the handshake, and of reading and writing afterwards.
    pub(crate) fn tls(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(why)) => Self::TlsCertificate(why.to_string()),
            Some(rustls::Error::NoCertificatesPresented) => Self::TlsCertificate("none was shown".into()),
            Some(rustls::Error::AlertReceived(alert)) => {
                Self::TlsAlert { id: u8::from(*alert), name: format!("{alert:?}") }
            }
            Some(other) => Self::TlsProtocol(other.to_string()),
            None => Self::TlsProtocol(error.kind().to_string()),
        }
    }

    /// Of an exchange; `in_body` once the head has come.
    pub(crate) fn http(error: &hyper::Error, in_body: bool) -> Self {
        let mut source: Option<&(dyn StdError + 'static)> = Some(error);
        while let Some(cause) = source {
            if let Some(own) = cause.downcast_ref::<Self>() {
                return own.clone();
            }
            if let Some(io) = cause.downcast_ref::<io::Error>() {
                if io.kind() == io::ErrorKind::TimedOut {
                    return Self::WriteTimeout;
                }
                if io.get_ref().is_some_and(<dyn StdError + Send + Sync>::is::<rustls::Error>) {
                    return Self::tls(io);
                }
                return if in_body { Self::ResponseIncomplete } else { Self::Terminated };
            }
            source = cause.source();
        }
        if error.is_parse_too_large() {
            Self::ResponseHeaders
        } else if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
            if in_body { Self::ResponseIncomplete } else { Self::Terminated }
        } else {
            let why = error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
            Self::Protocol(why)
        }
    }
}
