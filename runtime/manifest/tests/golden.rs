//! Each wrong manifest of `tests/wrong/` is answered as the text beside it says. `GAIA_GOLDEN=write` writes the texts anew:
//! then read the difference.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};

fn manifests(folder: &str) -> Vec<PathBuf> {
    // Relative to where cargo runs a test: its package. A path from compile time would be that of whichever clone, of all
    // that share a target directory, compiled it.
    let folder = Path::new("tests").join(folder);
    let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.to_string_lossy().ends_with(".zgraph.toml"));
    all.sort();
    all
}

#[test]
fn every_wrong_manifest_is_told_what_to_write_instead() {
    let all = manifests("wrong");
    assert!(all.len() >= 40, "{} manifests", all.len());
    let mut different = Vec::new();
    for path in all {
        let source = fs::read_to_string(&path).unwrap();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let Err(wrong) = gaia_manifest::parse(&source) else { panic!("{file} is accepted") };
        let mut said = String::new();
        for diagnostic in &wrong {
            let (line, column) = diagnostic.line_and_column(&source);
            let text = diagnostic.render(&file, &source, false);
            assert!(text.contains(&format!("{file}:{line}:{column}")), "{file} has no true place:\n{text}");
            assert!(source.get(diagnostic.span.clone()).is_some(), "{file}: {:?} lies outside", diagnostic.span);
            said += &text;
            said += "\n\n";
        }
        let golden = path.with_extension("").with_extension("txt");
        if std::env::var_os("GAIA_GOLDEN").is_some() {
            fs::write(&golden, &said).unwrap();
        } else if fs::read_to_string(&golden).unwrap_or_default() != said {
            different.push(format!("{file}:\n{said}"));
        }
    }
    assert!(different.is_empty(), "not as the golden texts say:\n{}", different.join("\n"));
}

#[test]
fn the_schema_for_editors_is_that_of_the_parser() {
    let (file, printed) = ("zgraph.schema.json", gaia_manifest::schema());
    if std::env::var_os("GAIA_GOLDEN").is_some() {
        fs::write(file, &printed).unwrap();
    }
    assert!(
        fs::read_to_string(file).unwrap_or_default() == printed,
        "{file} is out of date: GAIA_GOLDEN=write renews it"
    );
}

#[test]
fn the_seeds_manifest_loads_byte_for_byte() {
    let seed = include_bytes!("right/seed.zgraph.toml");
    let manifest = gaia_manifest::parse(std::str::from_utf8(seed).unwrap()).unwrap();
    let [fetch] = manifest.branes.as_slice() else { panic!("{} branes", manifest.branes.len()) };
    assert_eq!((fetch.name.value.as_str(), fetch.replicas), ("fetch", 32));
    assert_eq!(fetch.image.value.to_string(), "omega/cloud-fetch:2.4.1");
    assert_eq!(
        fetch.capabilities.iter().map(|g| g.capability.key()).collect::<Vec<_>>(),
        ["net.http", "fs.tmp", "clock"]
    );
    assert_eq!(fetch.limits.mem_max.value, 64 << 20);
    assert_eq!(fetch.limits.deadline.as_secs(), 8);
    assert_eq!(fetch.limits.cpu_quota.as_ref().map(|q| q.value), Some(0.5));
}
