//! What is granted works, inside its bounds, and is not there without its grant. Through `gaia run`: the appliance's
//! workers are the same program.

use gaia_tests::workstation::Folder;

const FILES: &str = r#"
[brane.files]
image = "file:./files.wasm"
[brane.files.capability]
"fs.tmp" = { quota = "1 MiB", lifetime = "request" }
"clock"  = { resolution = "ms" }
"#;

/// Would miss: a file system that real programs stumble over, a quota that gives a byte too much or too little, files of
/// one request that another sees.
#[test]
fn files_are_there_within_their_quota_and_gone_with_the_request() {
    let run = Folder::with(FILES).unwrap();
    let run = run.run(&["--workers", "1"]).unwrap().serving().unwrap();
    for _ in 0..3 {
        let answer = run.get("/files").unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (200, "all good\n"));
    }
    for (bytes, wrote) in [(1 << 20, 1 << 20), ((1 << 20) + 1, 1 << 20), (1 << 30, 1 << 20), (5, 5)] {
        let answer = run.get(&format!("/files?bytes={bytes}")).unwrap();
        assert_eq!(answer.text(), format!("wrote {wrote}\n"), "{bytes}");
    }
}

fn senses(resolution: &str, more: &str) -> String {
    format!(
        "[brane.senses]\nimage = \"file:./senses.wasm\"\n[brane.senses.capability]\n\"clock\" = {{ resolution = \"{resolution}\" }}\n{more}"
    )
}

/// Would miss: a clock that is finer than its grant, a timer that is, randomness that repeats, an environment that is not
/// what the manifest says.
#[test]
fn clocks_have_their_step_and_randomness_and_environment_are_what_was_granted() {
    let more = "\"random\" = {}\n\"env\" = { vars = { MODE = \"fast\", EMPTY = \"\" } }\n";
    let folder = Folder::with(&senses("ms", more)).unwrap();
    for (resolution, nanos) in [("ms", 1_000_000_u128), ("us", 1000), ("ns", 1)] {
        folder.write(&senses(resolution, more)).unwrap();
        let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
        let (one, other) = (run.get("/senses").unwrap(), run.get("/senses").unwrap());
        assert_eq!(one.status, 200, "{}", one.text());
        let value = |text: &str, name: &str| {
            text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')).unwrap().to_owned()
        };
        for clock in ["monotonic", "wall", "slept"] {
            let step: u128 = value(&one.text(), clock).parse().unwrap();
            assert_eq!(step % nanos, 0, "{clock} of {resolution} showed a step of {step} ns");
        }
        let slept: u128 = value(&one.text(), "slept").parse().unwrap();
        assert!(slept >= 1_000_000 - nanos.min(999_999), "slept {slept} ns");
        assert_ne!(value(&one.text(), "random"), value(&other.text(), "random"));
        let text = one.text();
        let env: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("env ")).collect();
        assert_eq!(env, ["EMPTY=", "MODE=fast"]);
    }
}

/// Would miss: a component that is linked with what it was not granted.
#[test]
fn without_the_grant_there_is_nothing_to_link() {
    for (graph, words) in [
        ("[brane.files]\nimage = \"file:./files.wasm\"\n", "which needs \"fs.tmp\""),
        ("[brane.senses]\nimage = \"file:./senses.wasm\"\n", "which needs \"clock\""),
        ("[brane.senses]\nimage = \"file:./senses.wasm\"\n", "which needs \"random\""),
    ] {
        let folder = Folder::with(graph).unwrap();
        let mut run = folder.run(&[]).unwrap();
        assert_eq!(run.end().unwrap().code(), Some(1));
        assert!(run.error.all().iter().any(|line| line.contains(words)), "{:#?}", run.error.all());
    }
}

/// Would miss: a secret that does not reach its brane, that reaches another, or that is shown.
#[test]
fn secrets_reach_the_brane_that_names_them_and_are_shown_nowhere() {
    use std::os::unix::fs::PermissionsExt as _;
    let grants = "\"clock\" = { resolution = \"us\" }\n\"random\" = {}\n";
    let graph = format!(
        "[brane.senses]\nimage = \"file:./senses.wasm\"\n[brane.senses.capability]\n{grants}\"env\" = {{ secrets = [\"API_KEY\"] }}\n\
         [brane.other]\nimage = \"file:./senses.wasm\"\n[brane.other.capability]\n{grants}"
    );
    let folder = Folder::with(&graph).unwrap();
    let secrets = folder.path().join("secrets.toml");
    let fails = |arguments: &[&str], words: &str| {
        let mut run = folder.run(arguments).unwrap();
        assert_eq!(run.end().unwrap().code(), Some(1));
        let said = run.error.all();
        assert!(said.iter().any(|line| line.contains(words)), "{said:#?} lacks {words}");
        assert!(said.iter().all(|line| !line.contains("sesame")), "{said:#?}");
    };
    fails(&[], "senses needs a value for the secret \"API_KEY\"");
    std::fs::write(&secrets, "[senses]\nAPI_KEY = \"open sesame\"\n").unwrap();
    std::fs::set_permissions(&secrets, std::fs::Permissions::from_mode(0o644)).unwrap();
    fails(&["--secrets", "secrets.toml"], "chmod 600");
    std::fs::set_permissions(&secrets, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&secrets, "[senses]\nAPI_KEY = open sesame\n").unwrap();
    fails(&["--secrets", "secrets.toml"], "line 2");
    std::fs::write(&secrets, "[senses]\nAPI_KEY = \"open sesame\"\n").unwrap();
    let run = folder.run(&["--secrets", "secrets.toml", "--workers", "1"]).unwrap().serving().unwrap();
    assert!(run.get("/senses").unwrap().text().contains("env API_KEY=open sesame\n"));
    assert!(!run.get("/other").unwrap().text().contains("sesame"));
    let shown = [run.output.all(), run.error.all(), vec![run.ask("ps").unwrap().to_string()]].concat();
    assert!(shown.iter().all(|line| !line.contains("sesame")), "{shown:#?}");
}
