//! Capabilities: what a manifest can grant beyond the inert base, one file each.
//!
//! A capability has three moments: what it links ([`Capability::interfaces`]), what a grant of it means for a brane
//! ([`Capability::configure`]), and what an instance starts with ([`Capability::prepare`]). To add one, write its file
//! and name it in [`ALL`]; the manifest's grammar has its key in `gaia_manifest`.

pub mod clock;
mod dns;
mod env;
pub mod http;
mod random;
pub mod sockets;
mod tcp;
pub mod tmp;
mod udp;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gaia_egress::endpoint::Seen;
use gaia_egress::{Egress, Shared};
use gaia_manifest::{Capability as Grant, Resolution};
use wasmtime_wasi::WasiCtxBuilder;

use crate::link::Interface;
use crate::log::{Event, Log, Subject};
use crate::plan::Plan;
use crate::worker::conversation::{Names, Share};
use crate::worker::host::Means;

/// Something that can be granted.
pub trait Capability: Sync {
    /// Its key in `[brane.<name>.capability]`.
    fn key(&self) -> &'static str;

    /// The interfaces it links. Several capabilities may link the same one, in the same way.
    fn interfaces(&self) -> &'static [Interface];

    /// The smallest grant that links, as a manifest writes it.
    fn smallest(&self) -> &'static str;

    /// What of a grant this version does not do; `None` if it does everything.
    fn missing(&self, grant: &Grant) -> Option<&'static str> {
        let _ = grant;
        None
    }

    /// What a grant means for a brane: done once, when its component is linked.
    fn configure(&self, grant: &Grant, granted: &mut Granted, means: &Means) {
        let _ = (grant, granted, means);
    }

    /// What an instance of a brane starts with that has it.
    fn prepare(&self, granted: &Granted, instance: &mut WasiCtxBuilder) {
        let _ = (granted, instance);
    }
}

/// All capabilities, in the order of their keys.
pub const ALL: [&dyn Capability; 8] =
    [&clock::Clock, &env::Env, &tmp::Tmp, &dns::Dns, &http::Http, &tcp::Tcp, &udp::Udp, &random::Random];

/// The capability with this key.
#[must_use]
pub fn with_key(key: &str) -> Option<&'static dyn Capability> {
    ALL.into_iter().find(|capability| capability.key() == key)
}

/// Connections that a worker may have to the outside at a time, of its 65,536 files.
const CONNECTIONS: usize = 2048;
/// Of these, what is kept for branes' next requests.
const KEPT: usize = 256;

/// The way out of a worker, for all its branes.
pub struct Network {
    shared: Arc<Shared>,
    /// Whom they ask for names.
    pub names: Arc<Names>,
}

impl Network {
    /// For the branes of this plan; nothing if none of them is granted it.
    ///
    /// # Errors
    /// If the plan's extra roots are none; control has read them before.
    pub fn of(plan: &Plan) -> anyhow::Result<Option<Self>> {
        if !plan.here().flat_map(|(_, brane)| &brane.grants).any(|grant| grant.key().starts_with("net.")) {
            return Ok(None);
        }
        let names = Arc::new(Names::default());
        let shared = Shared::new(names.share(), gaia_egress::roots(&plan.roots)?, CONNECTIONS, KEPT)?;
        Ok(Some(Self { shared, names }))
    }
}

/// One instance, as what it is granted sees it.
pub struct Instance {
    log: Arc<Log>,
    subject: Subject,
    seen: Mutex<Seen>,
}

impl Instance {
    /// Whose lines are `subject`'s.
    #[must_use]
    pub fn new(log: Arc<Log>, subject: Subject) -> Self {
        Self { log, subject, seen: Mutex::default() }
    }

    fn log(&self, event: &Event<'_>) {
        self.log.write(self.subject, event);
    }

    /// Says what it was refused, under the key whose grant does not cover it.
    fn deny(&self, key: &str, what: impl fmt::Display) {
        self.log(&Event::Deny { text: format!("{key} {what}").into() });
    }

    /// What it has looked up.
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one brane is granted, ready for its instances.
#[derive(Default)]
pub struct Granted {
    capabilities: Vec<&'static dyn Capability>,
    /// What its clocks are rounded to.
    pub clock: Option<Resolution>,
    /// Its environment.
    pub vars: Vec<(String, String)>,
    /// What its file system may hold.
    pub tmp: Option<gaia_tmpfs::Limits>,
    /// Its requests and their connections.
    pub egress: Option<Arc<Egress>>,
    /// What its names and sockets lead to.
    pub reach: sockets::Reach,
    /// Its share of the look-ups.
    names: Option<Arc<Share>>,
}

/// Random bytes of one call: they are made on the host before the guest must have room for them.
const MAX_RANDOM: u64 = 1 << 20;

impl Granted {
    /// What these grants of a manifest mean.
    #[must_use]
    pub fn of(grants: &[Grant], means: &Means) -> Self {
        let names = means.network.as_ref().map(|network| network.names.share());
        let mut granted = Self { names, ..Self::default() };
        for grant in grants {
            if let Some(capability) = with_key(grant.key()) {
                capability.configure(grant, &mut granted, means);
                granted.capabilities.push(capability);
            }
        }
        granted
    }

    /// The capabilities.
    #[must_use]
    pub fn capabilities(&self) -> &[&'static dyn Capability] {
        &self.capabilities
    }

    /// What an instance starts with.
    #[must_use]
    pub fn instance(&self) -> WasiCtxBuilder {
        let mut instance = WasiCtxBuilder::new();
        instance.max_random_size(MAX_RANDOM);
        for capability in &self.capabilities {
            capability.prepare(self, &mut instance);
        }
        instance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_grammar_has_its_capability() {
        assert_eq!(ALL.map(Capability::key).as_slice(), gaia_manifest::KEYS);
    }

    #[test]
    fn the_smallest_grant_is_a_grant() {
        for capability in ALL {
            let text =
                format!("[brane.a]\nimage = \"file:./a.wasm\"\n[brane.a.capability]\n{}\n", capability.smallest());
            let manifest = gaia_manifest::parse(&text).unwrap();
            assert_eq!(manifest.branes[0].capabilities[0].capability.key(), capability.key(), "{text}");
        }
    }
}
