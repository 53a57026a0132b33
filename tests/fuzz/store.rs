//! What the store finds on its disk, whatever wrote that.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| gaia_store::exercise::files(bytes));
