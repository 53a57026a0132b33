//! Messages between the supervisor and the roles: what is read fits into a packet when it is printed, and reads the same.

#![no_main]
#![allow(clippy::panic, reason = "a panic is what a fuzz target reports with")]

use std::fmt::Debug;

use gaia_init::wire::{FromControl, FromWorker, MAX_MESSAGE, Message, ToControl, ToWorker};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // A longer packet is refused before it is text.
    if text.len() <= MAX_MESSAGE {
        stable::<FromControl>(text);
        stable::<ToControl>(text);
        stable::<FromWorker>(text);
        stable::<ToWorker>(text);
    }
});

/// Reasons are cut and cleaned when they are printed, so the first printing may differ from the text; from then on nothing does.
fn stable<M: Message + PartialEq + Debug>(text: &str) {
    let Ok(message) = M::parse(text) else { return };
    let printed = message.to_string();
    assert!(printed.len() <= MAX_MESSAGE, "{} bytes: {printed:?}", printed.len());
    assert!(!printed.contains('\n'), "more than a line: {printed:?}");
    match M::parse(&printed) {
        Ok(again) => {
            assert_eq!(again.to_string(), printed);
            if printed == text {
                assert_eq!(again, message);
            }
        }
        Err(why) => panic!("{message:?} prints as what it is not: {why}"),
    }
}
