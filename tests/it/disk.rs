//! What the data disk holds outlives the appliance, it is control's alone, and no disk keeps the appliance from serving.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use gaia_image::disk::{Disk, SMALLEST};
use gaia_qemu::Drive;
use gaia_tests::{ANSWER_WITHIN, Appliance, Setup, data_disk, fsck, kernel_complaints, nbd};

/// Control's user (`gaia_init::roles::users`).
const CONTROL: u32 = gaia_init::roles::users::CONTROL;

fn with(disk: &Path) -> Setup {
    Setup::default().data(Drive::file(disk))
}

/// What the boot report says of the disk.
fn told(transcript: &str) -> String {
    let line = transcript.lines().find(|line| line.contains(" ms  data "));
    assert!(line.is_some(), "nothing is told of it:\n{transcript}");
    line.unwrap().to_owned()
}

/// The mount of `/data`: its options, the file system, and the file system's own options.
fn mounted(appliance: &Appliance) -> Option<(String, String, String)> {
    let all = appliance.read("/proc/self/mountinfo").unwrap();
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let line = all.lines().map(words).find(|words| words[4] == "/data")?;
    let kind = line.iter().position(|word| word == "-").unwrap() + 1;
    Some((line[5].clone(), line[kind].clone(), line[kind + 2].clone()))
}

/// Would miss: a mount from which something could be run or that is slower than it must be; a folder that another role finds;
/// a disk that control is not given.
#[test]
fn it_is_mounted_safely_and_handed_to_control_alone() {
    let disk = data_disk().unwrap();
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let line = told(&appliance.machine().console().transcript());
    assert!(line.contains("/dev/vda at /data, for control alone") && line.contains(" MiB free"), "{line}");
    let (flags, kind, options) = mounted(&appliance).unwrap();
    for flag in ["rw", "nosuid", "nodev", "noexec", "noatime"] {
        assert!(flags.split(',').any(|f| f == flag), "no {flag} in {flags}");
    }
    assert_eq!(kind, "ext4");
    // What is the default, or what the disk itself says, is not shown.
    assert!(!options.contains("errors=") || options.contains("errors=remount-ro"), "{options}");
    assert!(!options.contains("data=") || options.contains("data=ordered"), "{options}");
    assert!(!options.contains("nobarrier") && !options.contains("barrier=0"), "{options}");

    let status = appliance.ask("GET /v1/status").unwrap();
    let mut holders = Vec::new();
    for role in status["roles"].as_array().unwrap() {
        let (name, pid) = (role["name"].as_str().unwrap(), role["pid"].as_i64().unwrap());
        let fds = appliance.list(&format!("/proc/{pid}/fd")).unwrap();
        let links = fds.iter().filter_map(|fd| appliance.link(&format!("/proc/{pid}/fd/{fd}")).ok());
        holders.extend(links.filter(|to| to.starts_with("/data")).map(|to| (name.to_owned(), to)));
    }
    // Control holds the store's folders beneath it, too.
    let held = |name: &str| (name.to_owned(), "/data/control".to_owned());
    assert!(holders.contains(&held("control")) && holders.contains(&held("init")), "{holders:?}");
    let others = holders.iter().filter(|(name, to)| name != "control" && (name != "init" || to != "/data/control"));
    assert_eq!(others.count(), 0, "{holders:?}");

    // A program that does what a store does: as control it may do all of that and goes nowhere else; in any other sandbox,
    // or as any other user, not even with the folder in hand.
    let kept = appliance.keeps("control", CONTROL).unwrap();
    assert!(kept.starts_with("control keeps \"Written\" of 7 bytes among "), "{kept}");
    assert!(kept.ends_with(" names, and 0 of 4 ways lead out\n"), "{kept}");
    for role in ["compile", "starting", "sealed", "sealed-net", "console", "log"] {
        let said = appliance.keeps(role, CONTROL).unwrap();
        assert!(said.contains("ended by signal 31"), "{role}: {said}");
    }
    for user in [gaia_init::roles::users::WORKER, gaia_init::roles::users::CONSOLE] {
        let said = appliance.keeps("control", user).unwrap();
        assert!(said.contains("mkdirat: Permission denied"), "{user}: {said}");
    }
    let transcript = appliance.power_off().unwrap();
    assert_eq!(kernel_complaints(&transcript), Vec::<&str>::new(), "in\n{transcript}");
}

/// Would miss: a disk that is made anew, that loses what was written, or that is not ended in order with the machine.
#[test]
fn what_it_holds_outlives_a_power_off_and_the_file_system_is_clean() {
    let disk = data_disk().unwrap();
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    // Not on the disk yet when the machine is told to go.
    appliance.write("/data/control/kept", "what was written").unwrap();
    appliance.power_off().unwrap();
    let (clean, said) = fsck(&disk).unwrap();
    assert!(clean, "{said}");

    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let line = told(&appliance.machine().console().transcript());
    assert!(!line.contains("journal") && !line.contains("ERRORS"), "{line}");
    assert_eq!(appliance.read("/data/control/kept").unwrap(), "what was written");
    appliance.serves_hello().unwrap();
    appliance.machine().console().send_line("reboot --yes").unwrap();
    assert!(appliance.machine().wait_exit(Duration::from_mins(1)).unwrap().success());
    let (clean, said) = fsck(&disk).unwrap();
    assert!(clean, "{said}");
}

/// Would miss: an appliance that is still in order after its disk was not, and a check of the two tests above that is always
/// content.
#[test]
fn a_machine_that_is_killed_leaves_a_journal_which_the_next_boot_replays() {
    let disk = data_disk().unwrap();
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    appliance.write("/data/control/kept", "what was written").unwrap();
    appliance.sync("/data/control/kept").unwrap();
    appliance.machine().kill().unwrap();
    drop(appliance);
    let (clean, said) = fsck(&disk).unwrap();
    assert!(!clean, "{said}");

    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let line = told(&appliance.machine().console().transcript());
    assert!(line.contains("its journal was replayed"), "{line}");
    assert_eq!(appliance.read("/data/control/kept").unwrap(), "what was written");
    let transcript = appliance.power_off().unwrap();
    assert_eq!(kernel_complaints(&transcript), Vec::<&str>::new(), "in\n{transcript}");
    let (clean, said) = fsck(&disk).unwrap();
    assert!(clean, "{said}");
}

/// Would miss: a control that does not come back with its folder.
#[test]
fn a_control_that_is_killed_is_given_the_folder_again() {
    let disk = data_disk().unwrap();
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let before = appliance.pid("control").unwrap();
    appliance.kill(before, 9).unwrap();
    let pid = appliance.until(ANSWER_WITHIN, |a| a.pid("control"), |pid| *pid != before).unwrap();
    let fds = appliance.list(&format!("/proc/{pid}/fd")).unwrap();
    let holds = |fd: &String| appliance.link(&format!("/proc/{pid}/fd/{fd}")).is_ok_and(|to| to == "/data/control");
    assert!(fds.iter().any(holds));
    appliance.power_off().unwrap();
    assert!(fsck(&disk).unwrap().0);
}

/// Would miss: a folder that whoever had the disk elsewhere has made somebody else's, or a link to somewhere else.
#[test]
fn what_was_done_to_its_folder_elsewhere_is_undone_or_refused() {
    let disk = data_disk().unwrap();
    let debugfs = |disk: &std::path::Path, commands: &[&str]| {
        for command in commands {
            let output = std::process::Command::new("/usr/sbin/debugfs").args(["-w", "-R", command]).arg(disk).output();
            assert!(output.unwrap().status.success(), "{command}");
        }
    };
    debugfs(&disk, &["mkdir control", "set_inode_field control mode 040777", "set_inode_field control uid 1000"]);
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let said = appliance.keeps("control", CONTROL).unwrap();
    assert!(said.contains("control keeps"), "it is not control's: {said}");
    let said = appliance.keeps("control", gaia_init::roles::users::WORKER).unwrap();
    assert!(said.contains("Permission denied"), "{said}");
    appliance.power_off().unwrap();

    // The store is in it by now: so another disk.
    let disk = data_disk().unwrap();
    debugfs(&disk, &["symlink control /run"]);
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let line = told(&appliance.machine().console().transcript());
    assert!(line.contains("FAILED: /dev/vda: control's folder: "), "{line}");
    assert_eq!(mounted(&appliance), None);
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: an appliance that does not serve, or does not say why it keeps nothing, because of what is on a disk.
#[test]
fn without_a_disk_or_with_one_that_is_not_good_it_serves_and_says_so() {
    let at = |bytes: &[u8], offset: u64| {
        let disk = data_disk().unwrap();
        std::fs::File::options().write(true).open(&disk).unwrap().write_all_at(bytes, offset).unwrap();
        Some(disk)
    };
    let garbage: Vec<u8> = (0..1_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (what, disk, words) in [
        ("no disk", None, "no disk is labelled gaia-data (there are none): nothing is kept over a restart"),
        ("garbage", at(&garbage, 0), "(vda: no ext4)"),
        // The sum is wrong then, and that is what is told first.
        ("a damaged label", at(b"x", 1024 + 0x78), "(vda: ext4 with a damaged superblock)"),
        ("a damaged superblock", at(b"\xff\xff", 1024 + 0x18), "(vda: ext4 with a damaged superblock)"),
        ("damaged group descriptors", at(&garbage[..4096], 4096), "FAILED: mounting /dev/vda: "),
    ] {
        let setup = Setup::default();
        let setup = disk.iter().fold(setup, |setup, disk| setup.data(Drive::file(disk.to_path_buf())));
        let appliance = Appliance::boot(&setup).unwrap();
        let line = told(&appliance.machine().console().transcript());
        assert!(line.contains(words), "{what}: {line}");
        assert_eq!(mounted(&appliance), None, "{what}");
        appliance.serves_hello().unwrap();
        appliance.power_off().unwrap();
    }
}

/// Would miss: somebody else's disk that is written to.
#[test]
fn a_disk_with_another_label_is_left_alone() {
    let disk = data_disk().unwrap();
    let output = std::process::Command::new("/usr/sbin/tune2fs").args(["-L", "other\n\u{1b}[31m"]).arg(&*disk).output();
    assert!(output.unwrap().status.success());
    let before = std::fs::read(&disk).unwrap();
    let appliance = Appliance::boot(&with(&disk)).unwrap();
    let line = told(&appliance.machine().console().transcript());
    assert!(line.contains("(vda: ext4 labelled \"other\\n\\x1b[31m\")"), "{line}");
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
    assert!(std::fs::read(&disk).unwrap() == before, "it was written to");
}

/// Would miss: a data disk that init writes to while it is the wrong one of two.
#[test]
fn of_two_data_disks_none_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (data_disk().unwrap(), folder.path().join("other.img"));
    Disk { size: SMALLEST, random: true }.make(&other).unwrap();
    let setup = with(&one).data(Drive::file(&other));
    let appliance = Appliance::boot(&setup).unwrap();
    let line = told(&appliance.machine().console().transcript());
    assert!(line.contains("FAILED: vda and vdb are both labelled gaia-data: nothing is kept, remove one"), "{line}");
    assert_eq!(mounted(&appliance), None);
    appliance.serves_hello().unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: a flush that does not reach the disk, from the guest's fsync through the mount's barriers to QEMU; and a disk
/// that loses nothing when its power is cut, with which all tests of power cuts would say nothing.
#[test]
fn what_was_flushed_outlives_a_power_cut() {
    let large = "much ".repeat(200_000);
    let (mut lost, mut image) = (0, data_disk().unwrap());
    for seed in 0..3 {
        let disk = nbd::Disk::of(&image).unwrap();
        let appliance = Appliance::boot(&Setup::default().data(disk.drive())).unwrap();
        // By a store's rules: the file, then its name.
        appliance.write(&format!("/data/control/flushed-{seed}"), &large).unwrap();
        appliance.sync(&format!("/data/control/flushed-{seed}")).unwrap();
        appliance.sync("/data/control").unwrap();
        // The same without: it is with the disk, and not on it.
        appliance.write(&format!("/data/control/unflushed-{seed}"), &large).unwrap();
        appliance.send(&format!("/data/control/unflushed-{seed}")).unwrap();
        assert!(disk.unflushed() > 0);
        let cut = disk.cut(seed).unwrap();
        appliance.machine().kill().unwrap();
        println!("{seed}: {:?}", cut.losses);
        lost += cut.losses.lost + cut.losses.torn;
        drop(appliance);
        image = cut.image;

        let appliance = Appliance::boot(&with(&image)).unwrap();
        let line = told(&appliance.machine().console().transcript());
        assert!(line.contains("its journal was replayed"), "{line}");
        for flushed in 0..=seed {
            let found = appliance.read(&format!("/data/control/flushed-{flushed}")).unwrap();
            assert!(found == large, "after {seed}, of {flushed}: {} of {} bytes", found.len(), large.len());
        }
        let transcript = appliance.power_off().unwrap();
        assert_eq!(kernel_complaints(&transcript), Vec::<&str>::new(), "in\n{transcript}");
        let (clean, said) = fsck(&image).unwrap();
        assert!(clean, "{said}");
    }
    assert!(lost > 0, "no write was lost in any cut: this run shows nothing");
}
