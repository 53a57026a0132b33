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
            Some(rustls::Error::InvalidCertificate(why)) => Self::TlsCertificate(on_a_line(why)),
            Some(rustls::Error::NoCertificatesPresented) => Self::TlsCertificate("none was shown".into()),
            Some(rustls::Error::AlertReceived(alert)) => {
                Self::TlsAlert { id: u8::from(*alert), name: format!("{alert:?}") }
            }
            Some(other) => Self::TlsProtocol(on_a_line(other)),
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
            Self::Protocol(match error.source() {
                Some(source) => on_a_line(format_args!("{error}: {source}")),
                None => on_a_line(error),
            })
        }
    }
}

/// Words in which a server, or a guest, may have a part: at most 200 characters, with controls escaped.
pub(crate) fn on_a_line(words: impl std::fmt::Display) -> String {
    let text = words.to_string();
    let plain = |c: char| if c.is_control() { c.escape_default().collect() } else { c.to_string() };
    text.chars().take(200).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_words_stay_on_their_line() {
        assert_eq!(on_a_line("a\nΩ DENY\u{1b}[2J"), "a\\nΩ DENY\\u{1b}[2J");
        assert_eq!(on_a_line("x".repeat(9999)).len(), 200);
    }

    /// The names of `wasi:http/types@0.2`.
    #[test]
    fn every_error_has_a_name_that_guests_know() {
        let known = "DNS-timeout DNS-error destination-not-found destination-unavailable destination-IP-prohibited \
            destination-IP-unroutable connection-refused connection-terminated connection-timeout \
            connection-read-timeout connection-write-timeout connection-limit-reached TLS-protocol-error \
            TLS-certificate-error TLS-alert-received HTTP-request-denied HTTP-request-length-required \
            HTTP-request-body-size HTTP-request-method-invalid HTTP-request-URI-invalid HTTP-request-URI-too-long \
            HTTP-request-header-section-size HTTP-request-header-size HTTP-request-trailer-section-size \
            HTTP-request-trailer-size HTTP-response-incomplete HTTP-response-header-section-size \
            HTTP-response-header-size HTTP-response-body-size HTTP-response-trailer-section-size \
            HTTP-response-trailer-size HTTP-response-transfer-coding HTTP-response-content-coding \
            HTTP-response-timeout HTTP-upgrade-failed HTTP-protocol-error loop-detected configuration-error \
            internal-error";
        let text = String::new;
        for error in [
            Error::Denied(Denied::NoHost),
            Error::Dns(resolve::Error::Timeout),
            Error::Dns(resolve::Error::NotFound),
            Error::Connect(io::ErrorKind::ConnectionRefused),
            Error::Connect(io::ErrorKind::TimedOut),
            Error::Connect(io::ErrorKind::NetworkUnreachable),
            Error::Connect(io::ErrorKind::HostUnreachable),
            Error::ConnectTimeout,
            Error::ConnectionLimit,
            Error::TlsCertificate(text()),
            Error::TlsAlert { id: 0, name: text() },
            Error::TlsProtocol(text()),
            Error::Uri,
            Error::UriTooLong(0),
            Error::RequestHeaders(0),
            Error::ContentLength,
            Error::RequestBodySize(0),
            Error::RequestBody(text()),
            Error::WriteTimeout,
            Error::FirstByteTimeout,
            Error::BetweenBytesTimeout,
            Error::ResponseHeaders,
            Error::ResponseIncomplete,
            Error::Terminated,
            Error::Upgrade,
            Error::Protocol(text()),
        ] {
            assert!(known.split_whitespace().any(|name| name == error.code()), "{error:?}: {}", error.code());
        }
    }
}
