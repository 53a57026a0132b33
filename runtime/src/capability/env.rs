//! `env`: values in `wasi:cli/environment`, which every brane has and which is empty without it.

use gaia_manifest::Capability as Grant;
use wasmtime_wasi::WasiCtxBuilder;

use super::{Capability, Granted};
use crate::link::{ENVIRONMENT, Interface};
use crate::worker::host::Means;

/// See the module.
pub(super) struct Env;

impl Capability for Env {
    fn key(&self) -> &'static str {
        "env"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[ENVIRONMENT]
    }

    fn smallest(&self) -> &'static str {
        "\"env\" = {}"
    }

    fn configure(&self, grant: &Grant, granted: &mut Granted, _: &Means) {
        // The values of secrets come with the plan, not with the manifest.
        if let Grant::Env { vars, secrets: _ } = grant {
            granted.vars = vars.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        }
    }

    fn prepare(&self, granted: &Granted, instance: &mut WasiCtxBuilder) {
        instance.envs(&granted.vars);
    }
}
