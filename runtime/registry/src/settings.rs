//! What the operator says about registries.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use gaia_egress::site::Origin;
use gaia_manifest::Scheme;

use crate::reference::Host;

/// How long a pull or a push may take, unless said otherwise.
const WITHIN: Duration = Duration::from_mins(10);

/// With what this appliance shows a registry who it is. What is secret in it is not printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user and a password, or what a registry calls an access token and takes in a password's place. It goes to the
    /// registry itself, or to the token service that the registry names.
    Password {
        /// The user; registries that look at the password alone take any.
        user: String,
        /// The secret.
        password: String,
    },
    /// A bearer token as the registry takes it. No token service is asked.
    Token(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { user, .. } => f.debug_struct("Password").field("user", user).finish_non_exhaustive(),
            Self::Token(_) => f.debug_tuple("Token").finish_non_exhaustive(),
        }
    }
}

/// What the operator says about registries. Empty, it reaches public ones without a name.
///
/// ```
/// use gaia_registry::{Credentials, Host, Settings};
/// let registry = Host::parse("registry.example").unwrap();
/// let password = Credentials::Password { user: "omega".into(), password: "hunter2".into() };
/// let settings = Settings::default().with_credentials(registry.clone(), password).with_default(registry);
/// assert!(!format!("{settings:?}").contains("hunter2"));
/// ```
#[derive(Debug, Clone)]
pub struct Settings {
    pub(crate) credentials: BTreeMap<Host, Credentials>,
    pub(crate) plain: BTreeSet<Host>,
    pub(crate) companions: BTreeSet<Host>,
    pub(crate) default: Option<Host>,
    pub(crate) roots: String,
    pub(crate) chunk: Option<u64>,
    pub(crate) within: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            credentials: BTreeMap::new(),
            plain: BTreeSet::new(),
            companions: BTreeSet::new(),
            default: None,
            roots: String::new(),
            chunk: None,
            within: WITHIN,
        }
    }
}

impl Settings {
    /// Credentials for a registry.
    #[must_use]
    pub fn with_credentials(mut self, host: Host, credentials: Credentials) -> Self {
        self.credentials.insert(host, credentials);
        self
    }

    /// A registry, or what one refers to, that is spoken to without TLS, credentials included. Nobody else is.
    #[must_use]
    pub fn with_plain_http(mut self, host: Host) -> Self {
        self.plain.insert(host);
        self
    }

    /// Where a name without a registry is looked for after the local store.
    #[must_use]
    pub fn with_default(mut self, host: Host) -> Self {
        self.default = Some(host);
        self
    }

    /// A token service or a storage service of the operator's own, which may have a private address though it is a
    /// registry that refers to it. A registry's own host needs no such word.
    #[must_use]
    pub fn with_companion(mut self, host: Host) -> Self {
        self.companions.insert(host);
        self
    }

    /// Certificates in PEM of authorities that are trusted besides Mozilla's list.
    #[must_use]
    pub fn with_roots(mut self, pem: impl Into<String>) -> Self {
        self.roots = pem.into();
        self
    }

    /// What is larger goes to a registry in pieces of so many bytes. Without this it goes in one request, and in pieces of
    /// 4 MiB if the registry says that this is too much.
    #[must_use]
    pub fn with_chunks_of(mut self, bytes: u64) -> Self {
        self.chunk = Some(bytes.max(1));
        self
    }

    /// How long a pull or a push may take in all; ten minutes if not said.
    #[must_use]
    pub fn with_time(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Whether a server is spoken to without TLS.
    pub(crate) fn is_plain(&self, origin: &Origin) -> bool {
        origin.scheme() == Scheme::Http && self.plain.iter().any(|host| host.is_at(origin))
    }

    /// Whether a server was named by the operator, and so may be anywhere.
    pub(crate) fn knows(&self, origin: &Origin) -> bool {
        let mut named = self.credentials.keys().chain(&self.plain).chain(&self.companions).chain(&self.default);
        named.any(|host| host.is_at(origin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_printed() {
        let host = |text| Host::parse(text).unwrap();
        let settings = Settings::default()
            .with_credentials(host("a.example"), Credentials::Token("t0k3n".into()))
            .with_credentials(host("b.example"), Credentials::Password { user: "u".into(), password: "s3cret".into() });
        let printed = format!("{settings:?} {settings:#?}");
        assert!(printed.contains("a.example") || printed.contains("\"a"), "{printed}");
        assert!(!printed.contains("t0k3n") && !printed.contains("s3cret"), "{printed}");
    }
}
