//! What the idle appliance costs.

use std::time::{Duration, Instant};

use gaia_tests::{ANSWER_WITHIN, Appliance, Setup};

/// Idle RAM that the appliance may take, in KiB: what is not available, and what the kernel reserved for itself.
const IDLE_KIB: u64 = 64 * 1024;
/// The machine, in MiB.
const MACHINE_MIB: u32 = 512;
/// Idle means that the boot is over: for some seconds after it, the kernel keeps freed pages in lists per processor,
/// where they count neither as free nor as available.
const SETTLED_WITHIN: Duration = Duration::from_mins(2);

/// Between two looks, and what they may differ in when it has settled, in KiB.
const LOOKS: (Duration, u64) = (Duration::from_secs(8), 256);

/// Would miss: a role, a pool or a kernel table that takes memory before there is anything to serve.
#[test]
fn idle_it_takes_at_most_64_mib() {
    // As users get it: the test image has programs that they do not.
    let appliance = Appliance::boot(&Setup::default().memory_mib(MACHINE_MIB).production()).unwrap();
    let taken = || {
        appliance.machine().console().send_line("status --json").unwrap();
        let line = appliance.line("\"total_kib\":", ANSWER_WITHIN).unwrap();
        let status: serde_json::Value = serde_json::from_str(&line[line.find('{').unwrap_or(0)..]).unwrap();
        let kib = |name: &str| status["memory"][name].as_u64().unwrap();
        let (reserved, used) =
            (u64::from(MACHINE_MIB) * 1024 - kib("total_kib"), kib("total_kib") - kib("available_kib"));
        println!("idle: {used} KiB used + {reserved} KiB reserved by the kernel = {} KiB", used + reserved);
        used + reserved
    };
    let (begun, mut before) = (Instant::now(), taken());
    loop {
        std::thread::sleep(LOOKS.0);
        let now = taken();
        if before.abs_diff(now) <= LOOKS.1 {
            assert!(now <= IDLE_KIB, "{now} of {IDLE_KIB} KiB");
            break;
        }
        assert!(begun.elapsed() < SETTLED_WITHIN, "it does not settle: {before}, then {now} KiB");
        before = now;
    }
    appliance.power_off().unwrap();
}
