//! Calls on the file system in memory, whatever they are: what must always hold is checked after each.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| gaia_tmpfs::exercise::exercise(bytes));
