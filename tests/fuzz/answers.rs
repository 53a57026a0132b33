//! Answers of name servers.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| gaia_egress::fuzz::answer(bytes));
