//! What is in the image, and what is not.

use std::fs;
use std::process::Command;

use gaia_image::cpio::{Entry, Kind};
use gaia_image::{initramfs, kernel};
use gaia_tests::{out, soak};

fn entries() -> Vec<Entry> {
    initramfs::list_mounted(&fs::read(out("initramfs.zst")).unwrap()).unwrap()
}

/// Would miss: a shell, a dynamic linker, or a debug role in the image that users get.
#[test]
fn nothing_in_the_image_can_be_run_but_our_own_two_programs() {
    let all = entries();
    let regular = |e: &&Entry| matches!(e.kind, Kind::File(_));
    let files: Vec<&str> = all.iter().filter(regular).map(|e| e.path.as_str()).collect();
    assert_eq!(
        files,
        ["bin.erofs", "init", "bin/gaia"],
        "these two programs, one of them in the file system, and no other"
    );
    let other = all.iter().filter(|e| !matches!(e.kind, Kind::File(_) | Kind::Directory | Kind::CharDevice { .. }));
    assert_eq!(other.count(), 0, "no links, no sockets");
    assert!(all.iter().all(|e| e.permissions & 0o6000 == 0), "nothing changes its user");
    let test = initramfs::list_mounted(&fs::read(out("initramfs-test.zst")).unwrap()).unwrap();
    assert!(
        test.iter().any(|e| e.path == "bin/gaia-debug"),
        "the debug role is in the test image, so it would be seen here"
    );
}

/// Would miss: an image that has grown beyond what fits the smallest boot partition.
#[test]
fn kernel_and_initramfs_fit_in_16_mib() {
    let size = |name: &str| fs::metadata(out(name)).unwrap().len();
    let (kernel, base) = (size("bzImage"), size("initramfs.zst"));
    println!("kernel {kernel} + initramfs {base} = {} bytes", kernel + base);
    assert!(kernel + base <= 16 << 20);
}

/// Would miss: a setting that the fragment asks for and the kernel's defaults or dependencies take away.
#[test]
fn the_kernels_final_configuration_is_as_required() {
    let config = fs::read_to_string(out("kernel.config")).unwrap();
    kernel::check_config(&config).unwrap();
    let broken = config.replace("CONFIG_SECURITY_LANDLOCK=y", "# CONFIG_SECURITY_LANDLOCK is not set");
    assert!(kernel::check_config(&broken).unwrap_err().to_string().contains("SECURITY_LANDLOCK"));
}

/// Would miss: a path, a user or a time of the building machine in what is shipped.
#[test]
fn the_image_tells_nothing_of_where_it_was_built() {
    let home = std::env::var("HOME").unwrap();
    let here = fs::canonicalize(out("..")).unwrap();
    for program in ["gaia", "gaia-init"] {
        let bytes = fs::read(out("bin").join(program)).unwrap();
        for trace in [format!("{home}/."), here.to_string_lossy().into_owned()] {
            let found = bytes.windows(trace.len()).any(|w| w == trace.as_bytes());
            assert!(!found, "{program} contains {trace:?}");
        }
    }
    // The same files, elsewhere and younger: the same archive.
    let elsewhere = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let to = elsewhere.path().join(name);
        fs::write(&to, fs::read(out("bin").join(name)).unwrap()).unwrap();
        to
    };
    let again = initramfs::base(&copy("gaia-init"), &copy("gaia"), &[]).unwrap();
    assert!(again == fs::read(out("initramfs.zst")).unwrap(), "a second packing gives other bytes");
}

/// Would miss: a build that depends on the folder, the cache or the time in which it happens. From nothing, so only when soaking.
#[test]
fn another_clone_gives_the_same_bytes() {
    if !soak() {
        println!("not run: it builds everything anew (`make soak`)");
        return;
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let clone = elsewhere.path().join("clone");
        let mut command = Command::new(program);
        command.args(arguments).env("XDG_CACHE_HOME", elsewhere.path().join("cache"));
        for inherited in ["CARGO_TARGET_DIR", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"] {
            command.env_remove(inherited);
        }
        let folder = if clone.exists() { clone } else { elsewhere.path().to_owned() };
        assert!(command.current_dir(folder).status().unwrap().success(), "{program} {arguments:?}");
    };
    let here = fs::canonicalize(out("..")).unwrap();
    run("git", &["clone", "--quiet", here.to_str().unwrap(), "clone"]);
    run("make", &["out/initramfs.zst"]);
    let there = fs::read(elsewhere.path().join("clone/out/initramfs.zst")).unwrap();
    assert!(there == fs::read(out("initramfs.zst")).unwrap(), "another clone gives other bytes");
}
