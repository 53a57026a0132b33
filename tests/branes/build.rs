//! Gives the guests a small shadow stack.
//!
//! The linker's default is 1 MiB at the bottom of every instance's memory, most of it never used. 64 KiB holds the
//! deepest call of these guests many times over, and an instance starts with 128 KiB instead of 1088. The stack lies
//! below the data (`--stack-first` is the target's default), so running over its end is a trap, not a corruption.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("wasm32") {
        // Not `rustc-link-arg-examples`: cargo gives that only to examples that are programs.
        println!("cargo::rustc-link-arg=-zstack-size=65536");
    }
}
