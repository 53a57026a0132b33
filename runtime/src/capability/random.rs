//! `random`: randomness that nobody can foresee, the kernel's.

use wasmtime_wasi::p2::bindings::random::random;
use wasmtime_wasi::random::WasiRandom;

use super::Capability;
use crate::link::Interface;
use crate::worker::host::Host;

/// See the module.
pub(super) struct Random;

const RANDOM: Interface = Interface {
    name: "wasi:random/random",
    add: |linker| random::add_to_linker::<Host, WasiRandom>(linker, Host::random),
};

impl Capability for Random {
    fn key(&self) -> &'static str {
        "random"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[RANDOM]
    }

    fn smallest(&self) -> &'static str {
        "\"random\" = {}"
    }
}
