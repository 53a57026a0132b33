//! Whoever shows the log on the terminal of `gaia run`: the console without its questions.

use super::{Sandbox, console, event_loop, program};

/// What it may do.
pub const SANDBOX: Sandbox = Sandbox {
    calls: &[program::CALLS, event_loop::CALLS, console::OWN],
    files: &[],
    data: &[],
    files_of_a_workstation: &[],
};
