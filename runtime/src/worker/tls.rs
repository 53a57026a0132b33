//! TLS on the way in: a certificate and its key, which control hands to each worker and may replace at any time.
//!
//! A handshake takes what is there when it begins, and its connection stays with that. The keys of sessions that clients
//! may take up again are of one certificate and one worker, and go with it.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{InconsistentKeys, ServerConfig};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// The largest file of certificates, or of a key, in bytes.
pub const MAX_BYTES: u64 = 256 * 1024;
/// What ALPN calls HTTP/2.
pub const H2: &[u8] = b"h2";
/// A handshake must be over within this.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How long a client of a worker that was just started waits for its certificate; then the connection is closed.
const CERTIFICATE_WITHIN: Duration = Duration::from_secs(1);

/// A certificate and a key that TLS cannot be served with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no certificate in the text.
    #[error("no certificate in it: no line \"-----BEGIN CERTIFICATE-----\"")]
    NoCertificate,
    /// The text of certificates is not PEM.
    #[error("not PEM: {0}")]
    Certificate(String),
    /// There is no key in the text.
    #[error("no private key in it: no line \"-----BEGIN PRIVATE KEY-----\"")]
    NoKey,
    /// The text of the key is not PEM. What it is instead is not said: it may be the key.
    #[error("not PEM")]
    Key,
    /// It is the key of another certificate.
    #[error("not the key of the certificate")]
    AnotherKey,
    /// No key or no certificate of a kind that is known.
    #[error("cannot be used: {0}")]
    Unusable(String),
}

impl Error {
    /// Whether it is the key that is wrong.
    #[must_use]
    pub fn is_of_the_key(&self) -> bool {
        matches!(self, Self::NoKey | Self::Key | Self::AnotherKey | Self::Unusable(_))
    }
}

/// What TLS 1.2 and 1.3 are served with: the certificate of `chain` comes first there, and those that lead to an authority
/// after it. Both in PEM.
///
/// # Errors
/// [`Error`]
pub fn config(chain: &[u8], key: &[u8]) -> Result<ServerConfig, Error> {
    let chain: Vec<CertificateDer<'static>> = certificates(chain)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| match e {
        pem::Error::NoItemsFound => Error::NoKey,
        _ => Error::Key,
    })?;
    let unusable = |e: rustls::Error| match e {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => Error::AnotherKey,
        other => Error::Unusable(other.to_string()),
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![H2.to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The SHA-256 digest of the certificate that comes first, in hexadecimal.
///
/// # Errors
/// As [`config`].
pub fn fingerprint(chain: &[u8]) -> Result<String, Error> {
    let chain = certificates(chain)?;
    let digest = Sha256::digest(chain.first().ok_or(Error::NoCertificate)?);
    Ok(digest.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|e| Error::Certificate(e.to_string()))?;
    if all.is_empty() { Err(Error::NoCertificate) } else { Ok(all) }
}

/// What a worker serves TLS with now; nothing before control has said.
#[derive(Default)]
pub struct Current(watch::Sender<Option<Arc<ServerConfig>>>);

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Current").field(&self.0.borrow().is_some()).finish()
    }
}

impl Current {
    /// From now on, for connections that come.
    pub fn set(&self, config: ServerConfig) {
        self.0.send_replace(Some(Arc::new(config)));
    }

    /// The server's side of a handshake, in the time it may take; nothing if it failed.
    pub async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> Option<TlsStream<S>> {
        let config = {
            let mut known = self.0.subscribe();
            timeout(CERTIFICATE_WITHIN, known.wait_for(Option::is_some)).await.ok()?.ok()?.clone()?
        };
        timeout(HANDSHAKE_WITHIN, TlsAcceptor::from(config).accept(stream)).await.ok()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn a_certificate_and_its_key_are_taken_and_nothing_else() {
        let ((chain, key), (other, other_key)) = (pair(), pair());
        let read =
            |chain: &str, key: &str| config(chain.as_bytes(), key.as_bytes()).map(|config| config.alpn_protocols);
        assert_eq!(read(&chain, &key).unwrap(), [b"h2".to_vec(), b"http/1.1".to_vec()]);
        assert!(read(&format!("{chain}{other}"), &key).is_ok(), "those that lead to an authority may follow");
        assert_eq!(read(&format!("{other}{chain}"), &key), Err(Error::AnotherKey), "but its own comes first");
        assert_eq!(read(&chain, &other_key), Err(Error::AnotherKey));
        assert_eq!(read("", &key), Err(Error::NoCertificate));
        assert_eq!(read(&key, &key), Err(Error::NoCertificate));
        assert_eq!(read(&chain, &chain), Err(Error::NoKey));
        assert_eq!(read(&chain, ""), Err(Error::NoKey));
        assert_eq!(read(&chain, &key[..key.len() / 2]), Err(Error::Key));
        let cut = chain[..chain.len() / 2].to_owned();
        assert!(matches!(read(&cut, &key), Err(Error::Certificate(_))));
        let noise = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        let Err(e @ Error::Unusable(_)) = read(&chain, noise) else { panic!("noise is a key") };
        assert!(e.is_of_the_key() && !Error::NoCertificate.is_of_the_key());
    }

    #[test]
    fn a_fingerprint_is_of_the_first_certificate() {
        let ((chain, _), (other, _)) = (pair(), pair());
        let of = |chain: &str| fingerprint(chain.as_bytes()).unwrap();
        assert_eq!(of(&chain), of(&format!("{chain}{other}")));
        assert_ne!(of(&chain), of(&other));
        assert_eq!(of(&chain).len(), 64);
    }
}
