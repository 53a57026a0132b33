//! `fs.tmp`: a file system in memory.

use gaia_manifest::Capability as Grant;
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemView as _};
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};

use super::Capability;
use crate::link::Interface;
use crate::worker::host::Host;

/// See the module.
pub(super) struct Tmp;

const TYPES: Interface = Interface {
    name: "wasi:filesystem/types",
    add: |linker| types::add_to_linker::<Host, WasiFilesystem>(linker, Host::filesystem),
};
const PREOPENS: Interface = Interface {
    name: "wasi:filesystem/preopens",
    add: |linker| preopens::add_to_linker::<Host, WasiFilesystem>(linker, Host::filesystem),
};

impl Capability for Tmp {
    fn key(&self) -> &'static str {
        "fs.tmp"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[TYPES, PREOPENS]
    }

    fn smallest(&self) -> &'static str {
        "\"fs.tmp\" = { quota = \"0 B\" }"
    }

    fn missing(&self, _: &Grant) -> Option<&'static str> {
        Some("there is no directory to open")
    }
}
