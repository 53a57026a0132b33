//! No text makes the parser panic, and every place it names lies in the text.

use proptest::prelude::*;

/// Pieces of manifests, so that random texts reach the deeper parts of the parser.
fn manifest_like() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        "\\[brane\\.[a-z]{1,2}(\\.(limits|ingress|capability|execution|execution\\.deterministic))?\\]",
        "(image|replicas|tier|capability|substrate|host|path|mem_max|deadline|cpu_quota|lifecycle|seed) = (\"[^\"\\n]{0,12}\"|-?[0-9]{1,12}(\\.[0-9])?|true|\\[\\])",
        "\"(net\\.http|net\\.tcp|fs\\.tmp|clock|random|env)\" = \\{ ?((allowlist|quota|resolution|vars|secrets) = (\\[\"[a-z.:*/]{0,12}\"\\]|\"[a-z0-9 ]{0,8}\"|\\{\\}))? ?\\}",
        "\\PC{0,20}",
    ];
    proptest::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn places_lie_inside(source in prop_oneof![manifest_like(), "\\PC{0,200}", "(?s).{0,100}"]) {
        if let Err(wrong) = gaia_manifest::parse(&source) {
            prop_assert!(!wrong.is_empty());
            for diagnostic in wrong {
                prop_assert!(source.get(diagnostic.span.clone()).is_some(), "{:?} of {} bytes", diagnostic, source.len());
                let text = diagnostic.render("x.zgraph.toml", &source, false);
                prop_assert!(text.contains("x.zgraph.toml:"), "{}", text);
            }
        }
    }
}
