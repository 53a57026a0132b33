//! Who somebody is: an ed25519 key, shown raw in TLS (RFC 7250), for operators and appliances alike. No authority vouches
//! for it; whoever has it listed or pinned does.

use std::fmt;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gaia_init::key::{BYTES, PublicKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, ring::default_provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, PeerMisbehaved, SignatureScheme};

/// What is spoken inside.
pub const ALPN: &[u8] = b"http/1.1";
/// What stands before the key in a `SubjectPublicKeyInfo` of ed25519 (RFC 8410, section 4).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// What stands before the seed in a private key of ed25519 as PKCS #8 has it (RFC 8410, section 7).
const PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// A private key with its public half.
#[derive(Clone)]
pub struct Key {
    seed: [u8; BYTES],
    public: PublicKey,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Key").field(&self.public).finish()
    }
}

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// If the kernel has no random numbers.
    pub fn make() -> anyhow::Result<Self> {
        let mut seed = [0; BYTES];
        SystemRandom::new().fill(&mut seed).ok().context("there is no chance to be had")?;
        Self::of_seed(seed)
    }

    /// The one that follows from this seed (RFC 8032).
    ///
    /// # Errors
    /// None that is known: any seed is one.
    pub fn of_seed(seed: [u8; BYTES]) -> anyhow::Result<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).ok().context("not the seed of a key")?;
        let public = pair.public_key().as_ref().try_into().context("not a key of 32 bytes")?;
        Ok(Self { seed, public: PublicKey(public) })
    }

    /// Reads one in PEM, as [`Key::pem`] or `openssl genpkey -algorithm ed25519` writes it.
    ///
    /// # Errors
    /// That it is none; what it is instead is not said, since it may be a key.
    pub fn of_pem(pem: &[u8]) -> anyhow::Result<Self> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).ok().context("no line \"-----BEGIN PRIVATE KEY-----\"")?;
        let seed = der.secret_pkcs8_der().strip_prefix(&PKCS8).and_then(|seed| seed.try_into().ok());
        Self::of_seed(seed.context("not a private key of ed25519")?)
    }

    /// The key in PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        let encoded = STANDARD.encode(self.pkcs8());
        format!("-----BEGIN PRIVATE KEY-----\n{encoded}\n-----END PRIVATE KEY-----\n")
    }

    /// The seed that it follows from: the secret itself, for whoever stores it.
    #[must_use]
    pub fn seed(&self) -> &[u8; BYTES] {
        &self.seed
    }

    /// What others may know of it.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        self.public
    }

    fn pkcs8(&self) -> Vec<u8> {
        [PKCS8.as_slice(), &self.seed].concat()
    }

    /// As it is shown in TLS.
    ///
    /// # Errors
    /// As rustls says.
    pub fn shown(&self) -> Result<Arc<CertifiedKey>, rustls::Error> {
        let key = rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(self.pkcs8()))?;
        Ok(Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki(&self.public))], key)))
    }
}

/// What TLS is made of on both sides: there is one in a process.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(default_provider())))
}

/// The signatures that are taken: those of ed25519 alone.
pub const SCHEMES: [SignatureScheme; 1] = [SignatureScheme::ED25519];

fn spki(key: &PublicKey) -> Vec<u8> {
    [SPKI.as_slice(), &key.0].concat()
}

/// The key that the other side shows in the place of a certificate.
///
/// # Errors
/// If it shows anything else, or more than that.
pub fn of_peer(shown: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<PublicKey, rustls::Error> {
    let key = shown.strip_prefix(&SPKI).and_then(|key| key.try_into().ok()).filter(|_| more.is_empty());
    key.map(PublicKey).ok_or_else(|| CertificateError::BadEncoding.into())
}

/// Checks that the other side has the key that it shows.
///
/// # Errors
/// If it has not.
pub fn check_signature(
    message: &[u8],
    shown: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    if !SCHEMES.contains(&signed.scheme) {
        return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
    }
    let shown = SubjectPublicKeyInfoDer::from(shown.as_ref());
    verify_tls13_signature_with_raw_key(message, &shown, signed, &provider().signature_verification_algorithms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_is_that_of_the_standard_and_keeps_its_seed_to_itself() {
        // RFC 8032, section 7.1, test 1.
        let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let seed: Vec<u8> = (0..32).map(|i| u8::from_str_radix(&seed[2 * i..2 * i + 2], 16).unwrap()).collect();
        let key = Key::of_seed(seed.try_into().unwrap()).unwrap();
        assert_eq!(key.public().to_string(), "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
        let shown = format!("{key:?}");
        assert!(!shown.contains("157") && !shown.contains("9d"), "{shown}");
        // RFC 8410, section 10.3: a key in PEM.
        let pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let key = Key::of_pem(pem.as_bytes()).unwrap();
        assert_eq!(key.public().to_string(), "ed25519:Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE");
        assert_eq!(key.pem(), pem);
        assert!(Key::of_pem(b"").is_err() && Key::of_pem(&pem.as_bytes()[..80]).is_err());
    }

    #[test]
    fn what_is_shown_is_one_key_and_nothing_more() {
        let key = Key::make().unwrap();
        let shown = CertificateDer::from(spki(&key.public()));
        assert_eq!(of_peer(&shown, &[]).unwrap(), key.public());
        assert!(of_peer(&shown, std::slice::from_ref(&shown)).is_err(), "a chain");
        assert!(of_peer(&CertificateDer::from(spki(&key.public())[..43].to_vec()), &[]).is_err());
        assert_eq!(key.shown().unwrap().cert[0], shown);
        assert_ne!(Key::make().unwrap().public(), key.public());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_key_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Key::of_pem(&bytes);
            let _ = of_peer(&CertificateDer::from(bytes), &[]);
        }

        #[test]
        fn a_key_in_pem_is_read_as_it_is_written(seed in any::<[u8; BYTES]>()) {
            let key = Key::of_seed(seed).unwrap();
            prop_assert_eq!(Key::of_pem(key.pem().as_bytes()).unwrap().public(), key.public());
        }
    }
}
