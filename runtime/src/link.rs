//! The link stage: a brane's linker holds the inert base and what is granted, nothing else.

use wasmtime::component::Linker;
use wasmtime_wasi::cli::{WasiCli, WasiCliView as _};
use wasmtime_wasi::p2::bindings as wasi;
use wasmtime_wasi::p2::bindings::io as wasi_io;
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi_http::p2::bindings as wasi_http;
use wasmtime_wasi_http::{WasiHttp, WasiHttpView as _};

use crate::compile::Import;
use crate::worker::host::{Host, Io};

/// Interfaces without authority: every brane has them. Names without their version; `*` stands for one more segment.
pub const BASE: &[&str] = &[
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:http/types",
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/stderr",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:cli/terminal-stderr",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
];

/// Which capability key links which interfaces.
pub const KEYS: &[(&str, &[&str])] = &[
    ("net.http", &["wasi:http/outgoing-handler"]),
    ("net.dns", &["wasi:sockets/network", "wasi:sockets/instance-network", "wasi:sockets/ip-name-lookup"]),
    (
        "net.tcp",
        &[
            "wasi:sockets/network",
            "wasi:sockets/instance-network",
            "wasi:sockets/tcp",
            "wasi:sockets/tcp-create-socket",
        ],
    ),
    (
        "net.udp",
        &[
            "wasi:sockets/network",
            "wasi:sockets/instance-network",
            "wasi:sockets/udp",
            "wasi:sockets/udp-create-socket",
        ],
    ),
    ("fs.tmp", &["wasi:filesystem/types", "wasi:filesystem/preopens"]),
    ("clock", &["wasi:clocks/wall-clock", "wasi:clocks/monotonic-clock"]),
    ("random", &["wasi:random/random"]),
];

/// Why a component's import is not linked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A capability would link it.
    #[error("imports {import}, which needs \"{key}\"; the manifest does not grant it")]
    NotGranted {
        /// The interface.
        import: String,
        /// The key that links it.
        key: &'static str,
    },
    /// Nothing links it.
    #[error("imports {import}, which this runtime does not have")]
    Unknown {
        /// The interface.
        import: String,
    },
}

/// Holds the imports against what is granted (keys of [`KEYS`]), and returns all that are refused.
#[must_use]
pub fn refused(imports: &[Import], granted: &[&str]) -> Vec<Refusal> {
    let check = |import: &&Import| {
        let name = import.name.split_once('@').map_or(import.name.as_str(), |(name, _)| name);
        let linked = BASE.contains(&name)
            || KEYS.iter().any(|(key, interfaces)| granted.contains(key) && interfaces.contains(&name));
        if linked || !import.authority {
            return None;
        }
        let import = import.name.clone();
        Some(match KEYS.iter().find(|(_, interfaces)| interfaces.contains(&name)) {
            Some((key, _)) => Refusal::NotGranted { import, key },
            None => Refusal::Unknown { import },
        })
    };
    imports.iter().filter_map(|import| check(&import)).collect()
}

/// Makes a linker with the base alone.
///
/// # Errors
/// Wasmtime's, if an interface were defined twice.
pub fn base(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<Host>> {
    let mut linker = Linker::new(engine);
    let l = &mut linker;
    wasi_io::error::add_to_linker::<Host, Io>(l, Host::table)?;
    wasi_io::poll::add_to_linker::<Host, Io>(l, Host::table)?;
    wasi_io::streams::add_to_linker::<Host, Io>(l, Host::table)?;
    wasi_http::http::types::add_to_linker::<Host, WasiHttp>(
        l,
        &wasi_http::http::types::LinkOptions::default(),
        Host::http,
    )?;
    wasi::cli::environment::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::exit::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::stdin::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::stdout::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::stderr::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::terminal_input::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::terminal_output::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::terminal_stdin::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::terminal_stdout::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::cli::terminal_stderr::add_to_linker::<Host, WasiCli>(l, Host::cli)?;
    wasi::random::insecure::add_to_linker::<Host, WasiRandom>(l, Host::random)?;
    wasi::random::insecure_seed::add_to_linker::<Host, WasiRandom>(l, Host::random)?;
    Ok(linker)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(name: &str, authority: bool) -> Import {
        Import { name: name.into(), authority }
    }

    #[test]
    fn the_base_needs_no_grant_and_the_rest_names_its_key() {
        let imports = [
            import("wasi:io/streams@0.2.6", true),
            import("wasi:http/outgoing-handler@0.2.6", true),
            import("wasi:clocks/monotonic-clock@0.2.6", false),
            import("acme:secret/door@1.0.0", true),
        ];
        let refused = refused(&imports, &[]);
        assert_eq!(refused.len(), 2);
        assert_eq!(
            refused[0].to_string(),
            "imports wasi:http/outgoing-handler@0.2.6, which needs \"net.http\"; the manifest does not grant it"
        );
        assert!(matches!(&refused[1], Refusal::Unknown { import } if import == "acme:secret/door@1.0.0"));
    }

    #[test]
    fn a_grant_links_its_interfaces_only() {
        let imports = [import("wasi:http/outgoing-handler@0.2.6", true), import("wasi:sockets/tcp@0.2.6", true)];
        assert_eq!(refused(&imports, &["net.http"]).len(), 1);
    }

    #[test]
    fn the_linker_of_the_base_can_be_made() {
        let engine = crate::engine::for_compiler().unwrap();
        assert!(base(&engine).is_ok());
    }
}
