//! Why a component did not come or go: which one, from whom, what was said, what to do.

use std::fmt;
use std::io;
use std::time::Duration;

use gaia_egress::site::Quoted;
use http::StatusCode;

use crate::reference::{Digest, Host, Reference};

/// What was under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// A pull.
    Pull,
    /// A push.
    Push,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pull => "pull",
            Self::Push => "push",
        })
    }
}

/// A pull or a push failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {reference}: {why}")]
pub struct Error {
    /// Which of the two.
    pub doing: Doing,
    /// Of what, the default registry filled in.
    pub reference: Reference,
    /// Why. Text of servers in it is cut and escaped.
    pub why: Why,
}

/// Why a pull or a push failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// A name without a registry, and no default one.
    #[error("no registry is named, and there is no default one: [registry] default = \"registry.example\"")]
    NoRegistry,
    /// The server was not reached, or the exchange broke off.
    #[error("{host}: {error}{}", hint(host, error))]
    Http {
        /// Which server.
        host: Host,
        /// How.
        error: gaia_egress::Error,
    },
    /// All of it together took too long.
    #[error("not done within {} s", .0.as_secs_f32())]
    Time(Duration),
    /// The registry wants to know who asks, and there is nothing to show it.
    #[error(
        "{0} asks for credentials ({1}), and there are none for it: [registries.\"{0}\"] user, password; some registries say so of names that do not exist, too"
    )]
    CredentialsMissing(Host, StatusCode),
    /// The registry does not take the credentials.
    #[error("{0} does not accept the credentials of [registries.\"{0}\"] ({1})")]
    CredentialsRefused(Host, StatusCode),
    /// They are right, and do not suffice.
    #[error("{0} forbids it (403){1}: do the credentials of [registries.\"{0}\"] allow this for the repository?")]
    Forbidden(Host, Said),
    /// What the registry wants to see of who asks is not known here.
    #[error("{host} asks for credentials in a way that cannot be answered: {why}")]
    Challenge {
        /// The registry.
        host: Host,
        /// What is wrong with it.
        why: String,
    },
    /// The token service has no token.
    #[error("the token service {host}: {why}")]
    Token {
        /// The service.
        host: Host,
        /// What is wrong.
        why: String,
    },
    /// There is no such thing.
    #[error("{host} has no such {what} (404){said}")]
    NotFound {
        /// The registry.
        host: Host,
        /// What was asked for.
        what: &'static str,
        /// What it said.
        said: Said,
    },
    /// Another answer than the protocol has for it.
    #[error("{host} answered {status} to a request for {what}{said}")]
    Status {
        /// Who.
        host: Host,
        /// What the request was about.
        what: &'static str,
        /// The answer.
        status: StatusCode,
        /// What it said.
        said: Said,
    },
    /// It refers to a place where no request is sent.
    #[error("{host} refers to {to}: {why}")]
    Redirect {
        /// Who.
        host: Host,
        /// Where to.
        to: Quoted,
        /// Why not.
        why: String,
    },
    /// More than is taken.
    #[error("{what} of {size} bytes, and at most {limit} are taken")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its size, or what of it had come.
        size: u64,
        /// How much would have been taken.
        limit: u64,
    },
    /// Not as many bytes as were announced.
    #[error("{what} has not the {announced} bytes that it was announced with ({got} came)")]
    Size {
        /// What.
        what: &'static str,
        /// How many there should be.
        announced: u64,
        /// How many came, until it was clear.
        got: u64,
    },
    /// Other bytes than were asked for.
    #[error("{what} has not the digest that it should have: {wanted} was wanted, {got} came")]
    Digest {
        /// What.
        what: &'static str,
        /// What was asked for.
        wanted: Digest,
        /// What came.
        got: Digest,
    },
    /// What came as a manifest is none.
    #[error("the manifest: {0}")]
    Manifest(String),
    /// No layer is a component.
    #[error("no WebAssembly in it, only {0}")]
    NotWasm(String),
    /// Several are.
    #[error("{0} layers of WebAssembly, and a brane is one component; push it by itself")]
    SeveralComponents(usize),
    /// An index, and none of its entries is for WebAssembly.
    #[error("an index of {0} manifests, none of them for wasm")]
    Index(usize),
    /// Coded as it was not asked for.
    #[error("{host} sent the component in the coding {coding}, which was not asked for")]
    Coding {
        /// Who.
        host: Host,
        /// What.
        coding: Quoted,
    },
    /// What is to be pushed is no component.
    #[error("not a WebAssembly component: {0}")]
    NotAComponent(String),
    /// A push to a digest.
    #[error("a component is pushed to a tag; its digest is told afterwards")]
    PushPinned,
    /// Where the bytes go to does not take them.
    #[error("storing it: {0}")]
    Sink(#[source] io::Error),
}

/// What an answer that is no success had to say: empty, or `, "CODE: message"`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Said(pub(crate) Option<Quoted>);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |text| write!(f, ", saying {text}"))
    }
}

/// What an operator can do about it.
fn hint(host: &Host, error: &gaia_egress::Error) -> String {
    match error {
        gaia_egress::Error::TlsCertificate(_) => {
            "; if an authority of your own signed it, name that one as the root of the registry: [registries.…] root"
                .into()
        }
        gaia_egress::Error::TlsProtocol(_) => {
            format!("; if it speaks without TLS: [registries.\"{host}\"] plain_http = true")
        }
        gaia_egress::Error::Denied(gaia_egress::site::Denied::Address { .. }) => {
            format!("; if it is yours, list it: [registries.\"{host}\"]")
        }
        // Whose sandbox knows the ports of those that are listed.
        gaia_egress::Error::Connect(io::ErrorKind::PermissionDenied) => {
            format!("; its port is closed unless it is listed: [registries.\"{host}\"]")
        }
        _ => String::new(),
    }
}
