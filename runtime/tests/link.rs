//! The link stage, interface by interface: a component that imports one links with its grant, and fails without it with
//! the words that say what to write.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use gaia_manifest::{Manifest, Severity};
use gaia_runtime::capability::Granted;
use gaia_runtime::worker::host::Means;
use gaia_runtime::{compile, engine, link, review};
use wasmtime::component::Component;

/// Every interface of WASI 0.2 that a component can import, and the keys of which any one links it; none is needed for the
/// inert ones.
const INTERFACES: &[(&str, &[&str])] = &[
    ("wasi:io/error", &[]),
    ("wasi:io/poll", &[]),
    ("wasi:io/streams", &[]),
    ("wasi:http/types", &[]),
    ("wasi:cli/environment", &[]),
    ("wasi:cli/exit", &[]),
    ("wasi:cli/stdin", &[]),
    ("wasi:cli/stdout", &[]),
    ("wasi:cli/stderr", &[]),
    ("wasi:cli/terminal-input", &[]),
    ("wasi:cli/terminal-output", &[]),
    ("wasi:cli/terminal-stdin", &[]),
    ("wasi:cli/terminal-stdout", &[]),
    ("wasi:cli/terminal-stderr", &[]),
    ("wasi:random/insecure", &[]),
    ("wasi:random/insecure-seed", &[]),
    ("wasi:random/random", &["random"]),
    ("wasi:clocks/wall-clock", &["clock"]),
    ("wasi:clocks/monotonic-clock", &["clock"]),
    ("wasi:filesystem/types", &["fs.tmp"]),
    ("wasi:filesystem/preopens", &["fs.tmp"]),
    ("wasi:http/outgoing-handler", &["net.http"]),
    ("wasi:sockets/network", &["net.dns", "net.tcp", "net.udp"]),
    ("wasi:sockets/instance-network", &["net.dns", "net.tcp", "net.udp"]),
    ("wasi:sockets/ip-name-lookup", &["net.dns"]),
    ("wasi:sockets/tcp", &["net.tcp"]),
    ("wasi:sockets/tcp-create-socket", &["net.tcp"]),
    ("wasi:sockets/udp", &["net.udp"]),
    ("wasi:sockets/udp-create-socket", &["net.udp"]),
];

/// A component of those that `make out/interfaces` makes.
fn made(name: &str) -> Vec<u8> {
    // Relative to where cargo runs a test: its package.
    let path = format!("../out/interfaces/{name}.wasm");
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}; `make out/interfaces` makes it"))
}

/// A component that imports everything of `interface`, as a toolchain makes it.
fn component(interface: &str, version: &str) -> Vec<u8> {
    made(&format!("{}@{version}", interface.replace([':', '/'], "_")))
}

fn manifest(grants: &[&str]) -> Manifest {
    let grants: Vec<&str> = grants.iter().map(|key| review::smallest(key)).collect();
    let text = format!("[brane.fetch]\nimage = \"file:./f.wasm\"\n\n[brane.fetch.capability]\n{}\n", grants.join("\n"));
    gaia_manifest::parse(&text).unwrap_or_else(|wrong| panic!("{text}\n{wrong:?}"))
}

/// The errors of the review about imports; that these components serve nothing is another matter.
fn refused(manifest: &Manifest, report: &compile::Report) -> Vec<String> {
    let all = review::of(&manifest.branes[0], report).into_iter();
    let errors = all.filter(|d| d.severity == Severity::Error && !d.message.contains("does not export"));
    errors.map(|d| d.message).collect()
}

/// Whether a worker's linker for these grants takes the component.
fn links(manifest: &Manifest, component: &[u8]) -> Result<(), String> {
    let engine = engine::for_compiler(engine::WHOLE).unwrap();
    let grants: Vec<_> = manifest.branes[0].capabilities.iter().map(|grant| grant.capability.clone()).collect();
    let linker = link::linker(&engine, Granted::of(&grants, &Means::default()).capabilities()).unwrap();
    let component = Component::from_binary(&engine, component).unwrap();
    linker.instantiate_pre(&component).map(drop).map_err(|e| format!("{e:#}"))
}

#[test]
fn an_interface_links_with_its_grant_and_fails_without() {
    // The oldest that is compatible, and a later one.
    for version in ["0.2.0", "0.2.3"] {
        for (interface, keys) in INTERFACES {
            let component = component(interface, version);
            let (report, _) =
                compile::compile(&component, engine::WHOLE).unwrap_or_else(|e| panic!("{interface}: {e:#}"));
            let import = format!("{interface}@{version}");
            let listed = report.imports.iter().find(|i| i.name == import);
            assert!(listed.is_some_and(|i| i.authority), "{import}: {:?}", report.imports);
            assert_eq!(report.unlinked, None, "{import}");

            let bare = manifest(&[]);
            let errors = refused(&bare, &report);
            if keys.is_empty() {
                assert_eq!(errors, [""; 0], "{import} is inert");
                assert_eq!(links(&bare, &component), Ok(()), "{import}");
                continue;
            }
            let quoted: Vec<_> = keys.iter().map(|key| format!("{key:?}")).collect();
            let words = format!("fetch imports {import}, which needs {}", quoted.join(" or "));
            assert!(errors.contains(&words), "{errors:?} lacks {words}");
            let why = links(&bare, &component).unwrap_err();
            assert!(why.contains(interface) || why.contains("wasi:"), "{import}: {why}");

            for key in *keys {
                let granted = manifest(&[key]);
                assert_eq!(refused(&granted, &report), [""; 0], "{import} with {key}");
                assert_eq!(links(&granted, &component), Ok(()), "{import} with {key}");
            }
            let suggested = manifest(&review::suggested(&report.imports));
            assert_eq!(links(&suggested, &component), Ok(()), "{import} with what is suggested");
            // No other grant is as good.
            for other in gaia_manifest::KEYS.iter().filter(|key| !keys.contains(key)) {
                let granted = manifest(&[other]);
                assert!(refused(&granted, &report).contains(&words), "{import} with {other}");
                assert!(links(&granted, &component).is_err(), "{import} with {other}");
            }
        }
    }
}

#[test]
fn every_interface_of_the_standard_is_in_the_table() {
    let names = std::fs::read_dir("../out/interfaces").unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    let mut all: Vec<String> = names.filter_map(|name| name.strip_suffix("@0.2.0.wasm").map(str::to_owned)).collect();
    let mut table: Vec<&str> = INTERFACES.iter().map(|(name, _)| *name).collect();
    all.sort_unstable();
    table.sort_unstable();
    let mut written: Vec<String> = table.iter().map(|name| name.replace([':', '/'], "_")).collect();
    written.sort_unstable();
    assert_eq!(all, written);
    // And nothing is linked that the table does not know.
    let linked = gaia_runtime::capability::ALL.into_iter().flat_map(gaia_runtime::capability::Capability::interfaces);
    for interface in linked.chain(link::BASE) {
        assert!(table.contains(&interface.name), "{}", interface.name);
    }
}

#[test]
fn types_alone_need_no_grant() {
    let component = made("types");
    let (report, _) = compile::compile(&component, engine::WHOLE).unwrap();
    let clock = report.imports.iter().find(|i| i.name == "wasi:clocks/wall-clock@0.2.0").unwrap();
    assert!(!clock.authority, "{:?}", report.imports);
    let bare = manifest(&[]);
    assert_eq!(refused(&bare, &report), [""; 0]);
    assert_eq!(links(&bare, &component), Ok(()));
}
