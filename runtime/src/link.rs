//! The link stage: a brane's linker holds the inert base and what is granted, nothing else.

use wasmtime::component::Linker;
use wasmtime_wasi::cli::{WasiCli, WasiCliView as _};
use wasmtime_wasi::p2::bindings as wasi;
use wasmtime_wasi::p2::bindings::io as wasi_io;
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi_http::p2::bindings as wasi_http;
use wasmtime_wasi_http::{WasiHttp, WasiHttpView as _};

use crate::capability::{self, Capability};
use crate::worker::host::{Host, Io};

/// An interface that can be linked.
#[derive(Debug, Clone, Copy)]
pub struct Interface {
    /// Its name without a version.
    pub name: &'static str,
    /// Puts it into a linker.
    pub add: fn(&mut Linker<Host>) -> wasmtime::Result<()>,
}

/// The environment: every brane's, and empty without `env`.
pub const ENVIRONMENT: Interface = Interface {
    name: "wasi:cli/environment",
    add: |l| wasi::cli::environment::add_to_linker::<Host, WasiCli>(l, Host::cli),
};

/// Interfaces without authority: every brane has them.
pub const BASE: &[Interface] = &[
    Interface { name: "wasi:io/error", add: |l| wasi_io::error::add_to_linker::<Host, Io>(l, Host::table) },
    Interface { name: "wasi:io/poll", add: |l| wasi_io::poll::add_to_linker::<Host, Io>(l, Host::table) },
    Interface { name: "wasi:io/streams", add: |l| wasi_io::streams::add_to_linker::<Host, Io>(l, Host::table) },
    Interface {
        name: "wasi:http/types",
        add: |l| {
            let options = wasi_http::http::types::LinkOptions::default();
            wasi_http::http::types::add_to_linker::<Host, WasiHttp>(l, &options, Host::http)
        },
    },
    ENVIRONMENT,
    Interface { name: "wasi:cli/exit", add: |l| wasi::cli::exit::add_to_linker::<Host, WasiCli>(l, Host::cli) },
    Interface { name: "wasi:cli/stdin", add: |l| wasi::cli::stdin::add_to_linker::<Host, WasiCli>(l, Host::cli) },
    Interface { name: "wasi:cli/stdout", add: |l| wasi::cli::stdout::add_to_linker::<Host, WasiCli>(l, Host::cli) },
    Interface { name: "wasi:cli/stderr", add: |l| wasi::cli::stderr::add_to_linker::<Host, WasiCli>(l, Host::cli) },
    Interface {
        name: "wasi:cli/terminal-input",
        add: |l| wasi::cli::terminal_input::add_to_linker::<Host, WasiCli>(l, Host::cli),
    },
    Interface {
        name: "wasi:cli/terminal-output",
        add: |l| wasi::cli::terminal_output::add_to_linker::<Host, WasiCli>(l, Host::cli),
    },
    Interface {
        name: "wasi:cli/terminal-stdin",
        add: |l| wasi::cli::terminal_stdin::add_to_linker::<Host, WasiCli>(l, Host::cli),
    },
    Interface {
        name: "wasi:cli/terminal-stdout",
        add: |l| wasi::cli::terminal_stdout::add_to_linker::<Host, WasiCli>(l, Host::cli),
    },
    Interface {
        name: "wasi:cli/terminal-stderr",
        add: |l| wasi::cli::terminal_stderr::add_to_linker::<Host, WasiCli>(l, Host::cli),
    },
    Interface {
        name: "wasi:random/insecure",
        add: |l| wasi::random::insecure::add_to_linker::<Host, WasiRandom>(l, Host::random),
    },
    Interface {
        name: "wasi:random/insecure-seed",
        add: |l| wasi::random::insecure_seed::add_to_linker::<Host, WasiRandom>(l, Host::random),
    },
];

/// The name of an interface without its version.
#[must_use]
pub fn unversioned(import: &str) -> &str {
    import.split_once('@').map_or(import, |(name, _)| name)
}

/// Whether every brane has this interface.
#[must_use]
pub fn is_inert(import: &str) -> bool {
    BASE.iter().any(|interface| interface.name == unversioned(import))
}

/// The keys that link an interface; none if it is in the base, or if nothing links it.
#[must_use]
pub fn keys_of(import: &str) -> Vec<&'static str> {
    if is_inert(import) {
        return Vec::new();
    }
    let links = |c: &&dyn Capability| c.interfaces().iter().any(|interface| interface.name == unversioned(import));
    capability::ALL.into_iter().filter(links).map(Capability::key).collect()
}

/// Makes a linker with the base and what these capabilities link.
///
/// # Errors
/// Wasmtime's, if an interface cannot be defined.
pub fn linker(engine: &wasmtime::Engine, granted: &[&dyn Capability]) -> wasmtime::Result<Linker<Host>> {
    let mut interfaces = BASE.to_vec();
    interfaces.extend(granted.iter().flat_map(|capability| capability.interfaces()));
    interfaces.sort_by_key(|interface| interface.name);
    // Two capabilities may bring the same one.
    interfaces.dedup_by_key(|interface| interface.name);
    let mut linker = Linker::new(engine);
    interfaces.into_iter().try_for_each(|interface| (interface.add)(&mut linker))?;
    Ok(linker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_knows_its_keys() {
        assert_eq!(keys_of("wasi:http/outgoing-handler@0.2.12"), ["net.http"]);
        assert_eq!(keys_of("wasi:sockets/network@0.2.12"), ["net.dns", "net.tcp", "net.udp"]);
        assert!(keys_of("wasi:io/streams@0.2.12").is_empty());
        assert!(keys_of("wasi:cli/environment@0.2.12").is_empty());
    }
}
