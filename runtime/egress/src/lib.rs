//! The outgoing side of the network capabilities: which name, which address, which connection.
//!
//! Owns the way of a guest's request to the outside: [`site`] reads whom it is for and finds the entry of the allowlist
//! that covers it, [`resolve`] asks for the name's addresses once, [`address`] says which of them may be used, and
//! [`client`] connects to one of just those, speaks TLS and HTTP, and hands the answer back as it arrives. [`endpoint`]
//! decides the same for sockets. It knows nothing of WebAssembly, reads no file, has no defaults of the system's (no
//! `resolv.conf`, no `/etc/hosts`, no proxy, no certificates but its own and those it was given) and follows no
//! redirect. Called by a worker, which runs one thread; control calls [`resolve::Stub`] on the workers' behalf.
//!
//! The client is a small pool of its own over hyper's connections, not hyper-util's `Client`: that one dials in the
//! background and keeps what it dialled after the request has gone, bounds idle connections per host but not in all and
//! open ones not at all, and hides from its caller which connection was used. Here every connection is opened for one
//! request, to an address that was just checked, under a permit of the brane and one of the worker; what is kept
//! afterwards is in one short list that can be read, bounded and thrown away with the brane.
//!
//! ```
//! use gaia_egress::site::{Denied, Origin, entry};
//! use gaia_manifest::Site;
//!
//! let allowlist = [Site::parse("api.openalex.org").unwrap()];
//! let request = http::Request::get("https://api.openalex.org.evil.example/works").body(()).unwrap();
//! let origin = Origin::of(request.uri()).unwrap();
//! let denied = entry(&allowlist, &origin).unwrap_err();
//! assert_eq!(denied.to_string(), "https://api.openalex.org.evil.example is not on the allowlist");
//! ```

pub mod address;
mod body;
pub mod client;
pub mod endpoint;
pub mod error;
pub mod fuzz;
mod head;
mod pool;
pub mod resolve;
pub mod site;
mod stream;

pub use body::Incoming;
pub use client::{Bounds, Egress, Shared, Timeouts, roots};
pub use error::Error;
