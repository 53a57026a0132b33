//! `fs.tmp`: a file system in memory, `/tmp`, that ends with its instance. What it does is `gaia_tmpfs`'s; here it is put
//! under the interface and given the time that the guest may know.

mod host;
#[cfg(test)]
mod same;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gaia_manifest::{Capability as Grant, Resolution};
use gaia_tmpfs::{Limits, Time};
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};

use self::host::TmpInterfaces;
pub use self::host::{Clock, TmpView};
use super::clock::down;
use super::{Capability, Granted};
use crate::link::Interface;
use crate::worker::host::{Host, Means};

/// See the module.
pub(super) struct Tmp;

const TYPES: Interface = Interface {
    name: "wasi:filesystem/types",
    add: |linker| types::add_to_linker::<Host, TmpInterfaces>(linker, Host::tmp),
};
const PREOPENS: Interface = Interface {
    name: "wasi:filesystem/preopens",
    add: |linker| preopens::add_to_linker::<Host, TmpInterfaces>(linker, Host::tmp),
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

    fn configure(&self, grant: &Grant, granted: &mut Granted, _: &Means) {
        // An instance serves one request, so both lifetimes end with it.
        if let Grant::Tmp { quota, lifetime: _ } = grant {
            granted.tmp = Some(Limits::of_quota(*quota));
        }
    }
}

/// The clock of an instance's files: the granted one's steps, or always the same time.
#[must_use]
pub fn clock(step: Option<Resolution>) -> Clock {
    match step {
        None => Arc::new(Time::default),
        Some(step) => Arc::new(move || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now = Duration::from_nanos(down(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), step));
            Time { seconds: now.as_secs(), nanoseconds: now.subsec_nanos() }
        }),
    }
}
