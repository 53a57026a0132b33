//! The appliance boots, shows what it did, serves, and ends in order.

use std::time::{Duration, Instant};

use gaia_image::cpio::{Archive, Kind};
use gaia_qemu::{Forward, Machine, MachineBuilder};
use gaia_tests::{ANSWER_WITHIN, Appliance, BOOT_WITHIN, PORT, Setup, kernel_complaints, out};

const SOON: Duration = Duration::from_secs(20);

/// Would miss: an appliance whose start takes much longer than its kernel's. From power to the first answer of 200, over power to the first
/// words of an init that does nothing, in turns.
#[test]
#[ignore = "measures"]
fn bench_the_appliance_serves_soon_after_a_trivial_init_would_run() {
    let mut archive = Archive::default();
    archive.directory("dev", 0o755).unwrap();
    archive.char_device("dev/console", 0o600, 5, 1).unwrap();
    archive.file("init", 0o755, std::fs::read(out("bin/gaia-trivial")).unwrap()).unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&image, archive.to_bytes().unwrap()).unwrap();
    // The same machine as the appliance's.
    let trivial = MachineBuilder::new(out("bzImage")).initrd(image.path()).append(gaia_image::COMMAND_LINE);
    let trivial = trivial.memory_mib(512).cpus(2).forward(Forward::to(PORT));
    let mut all = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        let began = Instant::now();
        let machine = Machine::boot(&trivial).unwrap();
        machine.console().wait_for("trivial: running", BOOT_WITHIN).unwrap();
        all[0].push(began.elapsed().as_secs_f64());
        drop(machine);
        let began = Instant::now();
        let appliance = Appliance::boot(&Setup::default().production()).unwrap();
        assert_eq!(appliance.get("/hello").unwrap().status, 200);
        all[1].push(began.elapsed().as_secs_f64());
    }
    let ratios: Vec<f64> = all[0].iter().zip(&all[1]).map(|(trivial, gaia)| gaia / trivial).collect();
    let [trivial, gaia, ratio] = [all[0].clone(), all[1].clone(), ratios].map(|mut all| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    });
    println!("{trivial:.2} s to a trivial init, {gaia:.2} s to the first 200: {ratio:.2}");
}

/// Would miss: an appliance that boots only with the tests' debug role, or whose console is dead, or that does not end.
#[test]
fn it_serves_from_a_component_shows_itself_and_powers_off_without_a_complaint() {
    let appliance = Appliance::boot(&Setup::default().production()).unwrap();
    let answer = appliance.get("/hello").unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "hello\n"));

    let console = appliance.machine().console();
    console.send_line("help").unwrap();
    appliance.line("poweroff", SOON).unwrap();
    console.send_line("gaia status").unwrap();
    appliance.line("serves   generation 1, 1 branes", SOON).unwrap();
    for role in ["init", "console", "control", "worker@0", "worker@1"] {
        let line = appliance.line(role, SOON).unwrap();
        assert!(line.contains(" up "), "{line}");
    }
    console.send_line("ps").unwrap();
    let line = appliance.line("file:./hello.wasm", SOON).unwrap();
    assert!(line.starts_with("hello ") && line.contains("/hello"), "{line}");
    console.send_line("sh").unwrap();
    appliance.line("unrecognized subcommand 'sh'", SOON).unwrap();

    let transcript = appliance.power_off().unwrap();
    assert!(transcript.contains("going down: power off"));
    assert_eq!(kernel_complaints(&transcript), Vec::<&str>::new(), "in\n{transcript}");
    for step in [
        "mounts",
        "settings",
        "kernel",
        "cores",
        "cgroups",
        "sandboxes",
        "network",
        "listeners",
        "operators",
        "watchdog",
        "console",
        "programs",
        "seal",
    ] {
        let line = transcript
            .lines()
            .find(|l| l.contains(&format!(" ms  {step}")))
            .unwrap_or_else(|| panic!("no {step}:\n{transcript}"));
        assert!(!line.contains("FAILED"), "{line}");
    }
}

/// Would miss: a reboot that hangs, or that is a power-off.
#[test]
fn reboot_starts_the_machine_again() {
    let appliance = Appliance::boot(&Setup::default().production()).unwrap();
    appliance.machine().console().send_line("reboot --yes").unwrap();
    let exit = appliance.machine().wait_exit(Duration::from_mins(1)).unwrap();
    assert!(exit.success() && format!("{:?}", exit.reason).contains("Reset"), "{exit:?}");
}

/// Would miss: a power button that does nothing, or that cuts requests off.
#[test]
fn the_power_button_ends_it_in_order() {
    let appliance = Appliance::boot(&Setup::default().production()).unwrap();
    appliance.machine().press_power_button().unwrap();
    appliance.line("going down: power off", SOON).unwrap();
    assert!(appliance.machine().wait_exit(Duration::from_mins(1)).unwrap().success());
}

/// Would miss: a typing error in `gaia.toml` that makes a device unreachable even from its console.
#[test]
fn settings_that_do_not_parse_give_defaults_and_say_why() {
    let setup = Setup::default().production().settings("[network]\nadress = [\"10.0.2.15/24\"]\n");
    let appliance = Appliance::boot(&setup).unwrap();
    let transcript = appliance.machine().console().transcript();
    for words in ["FAILED", "line 2, column 1", "adress", "going on with defaults", "listening on port 80"] {
        assert!(transcript.contains(words), "no {words:?} in\n{transcript}");
    }
    appliance.power_off().unwrap();
}

/// Would miss: a graph with an error that is half served, or refused without a word.
#[test]
fn a_graph_that_is_not_good_changes_nothing_and_says_all_that_is_wrong() {
    let graph = "[brane.hello]\nimage = \"file:./hello.wasm\"\n\n[brane.fetch]\nimage = \"file:./cloud-fetch.wasm\"\n\n\
                 [brane.small]\nimage = \"file:./hello.wasm\"\nlimits = { mem_max = \"64 KiB\" }\n";
    let appliance = Appliance::boot(&Setup::default().graph(graph)).unwrap();
    let transcript = appliance.machine().console().transcript();
    for words in [
        "2 errors, nothing is changed",
        "needs \"net.http\"",
        "graph.zgraph.toml:4:8",
        "mem_max is 65536",
        "graph.zgraph.toml:9:22",
    ] {
        assert!(transcript.contains(words), "no {words:?} in\n{transcript}");
    }
    assert_eq!(appliance.get("/hello").unwrap().status, 404, "not even the brane that is good");
    let status = appliance.ask("GET /v1/status").unwrap();
    assert!(status["words"].to_string().contains("net.http"), "{status}");
    appliance.power_off().unwrap();
}

/// Would miss: an appliance without a graph that never comes up, so that none can be deployed to it.
#[test]
fn without_a_graph_it_is_up_and_answers_404() {
    let appliance = Appliance::boot(&Setup::default().no_graph()).unwrap();
    assert_eq!(appliance.get("/anything").unwrap().status, 404);
    assert_eq!(
        appliance.ask("GET /v1/nothing").unwrap()["error"],
        "there is no \"/v1/nothing\" in version 1 of this API"
    );
    assert_eq!(appliance.ask("GET /v1/reboot").unwrap()["error"], "GET shows, POST changes");
    appliance.power_off().unwrap();
}

/// Would miss: an appliance that serves with roles that nothing confines.
#[test]
fn what_cannot_confine_its_roles_does_not_serve() {
    let machine = MachineBuilder::new(out("bzImage")).initrd(out("initramfs.zst")).append(gaia_image::COMMAND_LINE);
    let machine = machine.append("cgroup_disable=memory").append("gaia.on_failure=poweroff");
    let machine = Machine::boot(&machine).unwrap();
    let line = machine.console().wait_for_line("ms  cgroups", BOOT_WITHIN).unwrap().to_string();
    assert!(line.contains("FAILED"), "{line}");
    machine.console().wait_for("cannot go on: cgroups: ", ANSWER_WITHIN).unwrap();
    assert!(machine.wait_exit(ANSWER_WITHIN).unwrap().success());
    assert!(!machine.console().transcript().contains("serving"));
}

/// Would miss: a PID 1 that cannot go on and hangs, on a device that nobody is near.
#[test]
fn an_init_that_cannot_go_on_says_why_and_reboots() {
    // An image without a place for /proc: the first thing that init does fails.
    let mut archive = Archive::default();
    archive.directory("dev", 0o755).unwrap();
    archive.char_device("dev/console", 0o600, 5, 1).unwrap();
    archive.file("init", 0o755, std::fs::read(out("bin/gaia-init")).unwrap()).unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&image, archive.to_bytes().unwrap()).unwrap();
    let machine = MachineBuilder::new(out("bzImage")).initrd(image.path()).append(gaia_image::COMMAND_LINE);
    let machine = Machine::boot(&machine).unwrap();
    machine.console().wait_for("cannot go on: mounting /proc", BOOT_WITHIN).unwrap();
    let exit = machine.wait_exit(ANSWER_WITHIN).unwrap();
    assert!(exit.success() && format!("{:?}", exit.reason).contains("Reset"), "{exit:?}");
}

/// Would miss: an appliance whose programs cannot be read, and which goes on without any.
#[test]
fn without_a_file_system_of_programs_it_does_not_go_on() {
    let whole = gaia_image::initramfs::list(&std::fs::read(out("initramfs.zst")).unwrap()).unwrap();
    let mut archive = Archive::default();
    for entry in whole {
        match entry.kind {
            Kind::Directory => archive.directory(&entry.path, entry.permissions).unwrap(),
            Kind::File(_) if entry.path == gaia_image::initramfs::PROGRAMS => {
                archive.file(&entry.path, 0o444, vec![0; 8192]).unwrap();
            }
            Kind::File(content) => archive.file(&entry.path, entry.permissions, content).unwrap(),
            Kind::CharDevice { major, minor } => {
                archive.char_device(&entry.path, entry.permissions, major, minor).unwrap();
            }
            _ => {}
        }
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&image, archive.to_bytes().unwrap()).unwrap();
    let machine = MachineBuilder::new(out("bzImage")).initrd(image.path()).append(gaia_image::COMMAND_LINE);
    let machine = Machine::boot(&machine.append("gaia.on_failure=poweroff")).unwrap();
    machine.console().wait_for("cannot go on: mounting /bin", BOOT_WITHIN).unwrap();
    // Before the command line has been read, so by the default.
    let exit = machine.wait_exit(ANSWER_WITHIN).unwrap();
    assert!(exit.success() && format!("{:?}", exit.reason).contains("Reset"), "{exit:?}");
}
