//! Any `gaia.toml` is read or told why not, within its bounds: the device boots either way.

#![no_main]
#![allow(clippy::panic, reason = "a panic is what a fuzz target reports with")]

use gaia_init::settings::{self, MAX_OPERATORS, MAX_PORTS};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match settings::parse(text) {
        Ok(settings) => {
            assert!(settings.ingress.http.len() <= MAX_PORTS, "too many ports");
            assert!(!settings.ingress.http.contains(&0), "0 is not a port");
            for prefix in &settings.network.address {
                let most = if prefix.address.is_ipv4() { 32 } else { 128 };
                assert!(prefix.length <= most, "{prefix:?}");
                assert_eq!(format!("{}/{}", prefix.address, prefix.length).parse().as_ref(), Ok(prefix));
            }
            assert!(settings.operators.len() <= MAX_OPERATORS && settings.control.port != 0, "out of bounds");
            for (name, key) in &settings.operators {
                assert!(!name.to_string().contains([' ', '=']), "{name:?} would be two words");
                assert_eq!(key.to_string().parse().as_ref(), Ok(key));
            }
            let fourth = settings.network.gateway.iter().filter(|gateway| gateway.is_ipv4()).count();
            assert!(fourth <= 1 && settings.network.gateway.len() - fourth <= 1, "two gateways of a family");
        }
        Err(why) => assert!(!why.trim().is_empty(), "refused without a reason"),
    }
});
