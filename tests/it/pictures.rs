//! The pictures in `docs/pictures` show what there is to be seen. `make pictures` takes them anew.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};
use gaia_qemu::Drive;
use gaia_tests::picture::Picture;
use gaia_tests::terminal::{Shell, shown};
use gaia_tests::{ANSWER_WITHIN, Appliance, HELLO, SETTINGS, STARVED, Setup, data_disk, out};

use crate::remote::Person;

/// Holds what is seen against the committed picture of this name. With `BLESS` in the environment, it is taken anew where the two
/// do not agree.
pub(crate) fn holds(name: &str, title: &str, seen: &Picture) -> Result<()> {
    let path = format!("../docs/pictures/{name}.svg");
    let committed = std::fs::read_to_string(&path).with_context(|| path.clone()).and_then(|svg| Picture::read(&svg));
    if committed.as_ref().is_ok_and(|(kept_title, kept)| kept_title == title && kept.masked() == seen.masked()) {
        return Ok(());
    }
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all("../docs/pictures")?;
        std::fs::write(&path, seen.svg(title))?;
        println!("{path} is taken anew");
        return Ok(());
    }
    let (kept, now) = (committed.context("`make pictures` takes it anew")?.1.masked(), seen.masked());
    let mut words = format!("{path} is not what is seen now; `make pictures` takes it anew");
    for (mark, these, those) in [('-', &kept, &now), ('+', &now, &kept)] {
        for line in these.iter().filter(|line| !those.contains(line)) {
            let _ = write!(words, "\n{mark} {line}");
        }
    }
    bail!("{words}\nseen:\n{}", seen.lines().join("\n"))
}

/// What a machine's console shows.
pub(crate) fn console(appliance: &Appliance) -> Picture {
    shown(appliance.machine().console().transcript().as_bytes())
}

/// Types a line at the prompt of the serial port and waits for the next prompt; the rows in between, with the line.
pub(crate) fn entered(appliance: &Appliance, line: &str) -> Picture {
    let before = console(appliance).lines();
    // It is typed behind the prompt, unless the machine has spoken since.
    let from = if before.last().is_some_and(|last| last == "ω") { before.len() - 1 } else { before.len() };
    appliance.machine().console().send_line(line).unwrap();
    let prompt = |seen: &Picture| {
        let is_prompt = |line: &String| line == "ω" || line.starts_with("ω gaia: ");
        seen.lines().iter().skip(from + 1).position(is_prompt).map(|at| from + 1 + at)
    };
    let mut seen = appliance.until(ANSWER_WITHIN, |a| Ok(console(a)), |seen| prompt(seen).is_some()).unwrap();
    seen.rows.truncate(prompt(&seen).unwrap());
    seen.rows.drain(..from);
    seen
}

/// Would miss: a boot report or a status that looks otherwise than in the documentation.
#[test]
fn the_picture_of_a_boot_is_true() {
    let ann = Person::new();
    let settings = format!("{SETTINGS}\n[operators]\nann = \"{}\"\n", ann.key);
    let disk = data_disk().unwrap();
    let setup = Setup::default().production().graph(HELLO).settings(settings).data(Drive::file(&*disk));
    let appliance = Appliance::boot(&setup).unwrap();
    appliance.serves_hello().unwrap();
    entered(&appliance, "status");
    let mut seen = console(&appliance);
    seen.rows.pop();
    let seen = seen.only(|line| !STARVED.iter().any(|words| line.contains(words)));
    holds("boot", "The boot report of an appliance, and its status", &seen).unwrap();
    appliance.power_off().unwrap();
}

/// Would miss: diagnostics that look otherwise than in the documentation.
#[test]
fn the_picture_of_a_review_is_true() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(out("branes/cloud-fetch.wasm"), folder.path().join("cloud-fetch.wasm")).unwrap();
    for (name, more) in [("fetch", ""), ("typo", "\n[brane.fetch.limits]\nmem_max = \"64 MIB\"\ndeadlin = \"8s\"\n")] {
        let graph = "[brane.fetch]\nimage    = \"file:./cloud-fetch.wasm\"\nreplicas = 32\n\n\
                     [brane.fetch.capability]\n\"fs.tmp\" = { quota = \"256 MiB\" }\n";
        std::fs::write(folder.path().join(format!("{name}.zgraph.toml")), format!("{graph}{more}")).unwrap();
    }
    let shell = Shell::in_folder(folder.path(), &[]).unwrap();
    shell.enter("gaia check fetch.zgraph.toml", ANSWER_WITHIN).unwrap();
    shell.enter("gaia check typo.zgraph.toml", ANSWER_WITHIN).unwrap();
    holds("check", "What gaia check says of a manifest that is wrong", &shell.picture()).unwrap();
}
