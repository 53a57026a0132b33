//! The manifest, `*.zgraph.toml`: what runs, and all that it may do.
//!
//! Owns the grammar: TOML with spans in, a typed [`Manifest`] out, or every error of the file in one run, each with its
//! line, column, mark and remedy. Never opens a file, resolves an image or knows what this runtime can do: whoever
//! deploys decides about that, with the spans that are kept here. Called by control, by `gaia check` and by `gaia run`.
//!
//! ```
//! let source = "[brane.fetch]\nimage = \"omega/cloud-fetch:2.4.1\"\nreplica = 32\n";
//! let wrong = gaia_manifest::parse(source).unwrap_err();
//! assert_eq!(wrong[0].line_and_column(source), (3, 1));
//! assert!(wrong[0].help.as_deref().unwrap().contains("replicas"));
//! ```

mod allow;
mod diagnostic;
mod grammar;
mod model;
mod read;
pub mod tier;
pub mod units;

pub use allow::{Endpoint, Host, Scheme, Site};
pub use diagnostic::{Diagnostic, Severity};
pub use grammar::{brane_name, schema, variable};
pub use model::{
    Brane, Capability, Deterministic, Grant, Image, Ingress, KEYS, Lifecycle, Lifetime, Limits, Manifest, Resolution,
    Spanned,
};
pub use read::parse;

/// The largest manifest that is parsed, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
