//! Addresses of outgoing requests: what an allowlist lets through is covered by an entry of it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| gaia_egress::fuzz::site(bytes));
