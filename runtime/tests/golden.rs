//! The seal that is computed from a graph, line by line, as the texts in `tests/seal/` say: whatever widens it shows as a
//! difference there. `GAIA_GOLDEN=write` writes them anew: then read the difference.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;

use gaia_init::sandbox::worker::text;
use gaia_runtime::plan::reach;

#[test]
fn the_seals_of_graphs_are_the_golden_texts() {
    let seed = "../runtime/manifest/tests/right/seed.zgraph.toml";
    let mut different = Vec::new();
    for (name, manifest) in
        [("empty", "tests/seal/empty.zgraph.toml"), ("seed", seed), ("everything", "tests/seal/everything.zgraph.toml")]
    {
        let manifest = gaia_manifest::parse(&fs::read_to_string(manifest).unwrap()).unwrap();
        let grants = manifest.branes.iter().flat_map(|brane| &brane.capabilities);
        let seal = text(&reach(grants.map(|grant| &grant.capability)));
        let golden = Path::new("tests/seal").join(name).with_extension("txt");
        if std::env::var_os("GAIA_GOLDEN").is_some() {
            fs::write(&golden, &seal).unwrap();
        } else if fs::read_to_string(&golden).unwrap_or_default() != seal {
            different.push(format!("{name}:\n{seal}"));
        }
    }
    assert!(different.is_empty(), "not as the golden texts say:\n{}", different.join("\n"));
}
