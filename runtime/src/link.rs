//! The link stage: a brane's linker holds the inert base and what is granted, nothing else.

use wasmtime::component::Linker;
use wasmtime_wasi::cli::{WasiCli, WasiCliView as _};
use wasmtime_wasi::p2::bindings as wasi;
use wasmtime_wasi::p2::bindings::io as wasi_io;
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi_http::p2::bindings as wasi_http;
use wasmtime_wasi_http::{WasiHttp, WasiHttpView as _};

use crate::worker::host::{Host, Io};

/// Interfaces without authority: every brane has them. Names without their version.
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

/// The name of an interface without its version.
#[must_use]
pub fn unversioned(import: &str) -> &str {
    import.split_once('@').map_or(import, |(name, _)| name)
}

/// The keys that link an interface; none if it is in the base, or if nothing links it.
#[must_use]
pub fn keys_of(import: &str) -> Vec<&'static str> {
    let name = unversioned(import);
    KEYS.iter().filter(|(_, interfaces)| interfaces.contains(&name)).map(|(key, _)| *key).collect()
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

    #[test]
    fn an_interface_knows_its_keys() {
        assert_eq!(keys_of("wasi:http/outgoing-handler@0.2.12"), ["net.http"]);
        assert_eq!(keys_of("wasi:sockets/network@0.2.12"), ["net.dns", "net.tcp", "net.udp"]);
        assert!(keys_of("wasi:io/streams@0.2.12").is_empty());
    }

    #[test]
    fn no_interface_is_both_inert_and_granted() {
        for (key, interfaces) in KEYS {
            assert!(gaia_manifest::KEYS.contains(key), "{key} cannot be written in a manifest");
            for interface in *interfaces {
                assert!(!BASE.contains(interface), "{interface}");
            }
        }
    }

    #[test]
    fn the_linker_of_the_base_can_be_made() {
        let engine = crate::engine::for_compiler().unwrap();
        assert!(base(&engine).is_ok());
    }
}
