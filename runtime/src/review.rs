//! The security review of a manifest: what its components import, held against what it grants. The same judgement, in
//! the same words, for `gaia check` and for a deploy.

use gaia_init::supervise::MAX_KEEPERS;
use gaia_manifest::{Brane, Capability as Grant, Diagnostic, Lifecycle, Manifest};

use crate::capability::{self, Capability};
use crate::compile::{Import, Report};
use crate::link;

/// What a component must export to be served.
const HANDLER: &str = "wasi:http/incoming-handler";

/// What a manifest asks for that this version does not do, whatever its components are.
#[must_use]
pub fn unsupported(manifest: &Manifest) -> Vec<Diagnostic> {
    let mut all = Vec::new();
    let mut kept = 0;
    for brane in &manifest.branes {
        let name = &brane.name.value;
        if brane.lifecycle == Lifecycle::Pinned {
            let before = kept;
            kept += brane.replicas as usize;
            if before <= MAX_KEEPERS && kept > MAX_KEEPERS {
                let message =
                    format!("{name}: a graph can have {MAX_KEEPERS} pinned instances, each in a process of its own");
                all.push(
                    Diagnostic::error(brane.name.span.clone(), message, "one too many").help("fewer replicas of them"),
                );
            }
        }
        if brane.deterministic.is_some() {
            let message = format!("{name}: this version cannot run it deterministically");
            all.push(Diagnostic::error(brane.name.span.clone(), message, "is deterministic"));
        }
        for grant in &brane.capabilities {
            let key = grant.capability.key();
            if let Some(what) = capability::with_key(key).and_then(|c| c.missing(&grant.capability)) {
                let message = format!("{name}: \"{key}\" links, but in this version {what}");
                all.push(Diagnostic::warning(grant.span.clone(), message, "has no effect yet"));
            }
        }
    }
    all
}

/// What a brane's component means for it: imports without a grant and anything else that keeps it from running are errors,
/// grants that nothing needs are warnings.
#[must_use]
pub fn of(brane: &Brane, report: &Report) -> Vec<Diagnostic> {
    let name = &brane.name.value;
    let mut all: Vec<Diagnostic> = report.imports.iter().filter_map(|import| refused(brane, import)).collect();
    if let (true, Some(reason)) = (all.is_empty(), &report.unlinked) {
        all.push(Diagnostic::error(
            brane.image.span.clone(),
            format!("{name} cannot be linked: {reason}"),
            "this component",
        ));
    }
    if !report.exports.iter().any(|export| link::unversioned(export) == HANDLER) {
        let message = format!("{name} does not export {HANDLER}, so no request could be given to it");
        all.push(
            Diagnostic::error(brane.image.span.clone(), message, "this component")
                .help("build it for the world wasi:http/proxy"),
        );
    }
    let most = &brane.limits.mem_max;
    match report.needs {
        None => {
            let message = format!("{name}: its component imports or exports modules, so its needs cannot be known");
            all.push(Diagnostic::error(brane.image.span.clone(), message, "this component"));
        }
        Some(needs) if needs.initial_memory > most.value => {
            let message =
                format!("{name} starts with {} bytes of memory, but mem_max is {}", needs.initial_memory, most.value);
            all.push(Diagnostic::error(most.span.clone(), message, "too little to start").help("raise limits.mem_max"));
        }
        Some(_) => {}
    }
    all.extend(brane.capabilities.iter().filter(|g| !needed(&g.capability, &report.imports)).map(|grant| {
        let message = format!("nothing that {name} imports needs \"{}\"", grant.capability.key());
        Diagnostic::warning(grant.span.clone(), message, "not needed")
            .help("remove it: a grant that is not needed is a mistake")
    }));
    all
}

fn refused(brane: &Brane, import: &Import) -> Option<Diagnostic> {
    let granted = |key: &&str| brane.capabilities.iter().any(|g| g.capability.key() == *key);
    if !import.authority || link::is_inert(&import.name) {
        return None;
    }
    let (name, import) = (&brane.name.value, &import.name);
    let keys = link::keys_of(import);
    match keys.as_slice() {
        [] => {
            let message = format!("{name} imports {import}, which this runtime does not have");
            Some(Diagnostic::error(brane.image.span.clone(), message, "this component"))
        }
        keys if keys.iter().any(granted) => None,
        [key, ..] => {
            let quoted: Vec<_> = keys.iter().map(|key| format!("\"{key}\"")).collect();
            let message = format!("{name} imports {import}, which needs {}", quoted.join(" or "));
            Some(
                Diagnostic::error(brane.grants.clone(), message, "does not grant it")
                    .help(format!("grant it: {}", smallest(key))),
            )
        }
    }
}

/// Whether an import makes a grant useful.
fn needed(grant: &Grant, imports: &[Import]) -> bool {
    let links = capability::with_key(grant.key()).map_or(&[][..], Capability::interfaces);
    let by = |import: &Import| import.authority && links.iter().any(|i| i.name == link::unversioned(&import.name));
    imports.iter().any(by)
}

/// The smallest grant of a key that links its interfaces, as a manifest writes it.
#[must_use]
pub fn smallest(key: &str) -> &'static str {
    capability::with_key(key).map_or("", Capability::smallest)
}

/// The keys that must be granted for these imports to link: the first of those that would do, each once.
#[must_use]
pub fn suggested(imports: &[Import]) -> Vec<&'static str> {
    let mut keys: Vec<&'static str> = Vec::new();
    // Interfaces that only one key links decide first; one that several link may then be linked already.
    let mut wanted: Vec<Vec<&'static str>> =
        imports.iter().filter(|i| i.authority).map(|i| link::keys_of(&i.name)).collect();
    wanted.sort_by_key(Vec::len);
    for choice in wanted {
        if let Some(first) = choice.first()
            && !choice.iter().any(|key| keys.contains(key))
        {
            keys.push(first);
        }
    }
    keys.sort_unstable();
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Needs;
    use gaia_manifest::Severity;

    fn report(imports: &[(&str, bool)]) -> Report {
        let import = |(name, authority): &(&str, bool)| Import { name: (*name).into(), authority: *authority };
        Report {
            error: None,
            imports: imports.iter().map(import).collect(),
            exports: vec!["wasi:http/incoming-handler@0.2.12".into()],
            needs: Some(Needs {
                memories: 1,
                initial_memory: 1 << 17,
                data_end: 70_000,
                tables: 1,
                table_elements: 1,
                longest_name: 9,
            }),
            unlinked: None,
        }
    }

    fn judged(source: &str, imports: &[(&str, bool)]) -> Vec<(Severity, String, (usize, usize))> {
        let manifest = gaia_manifest::parse(source).unwrap();
        let said = of(&manifest.branes[0], &report(imports));
        said.into_iter().map(|d| (d.severity, d.message.clone(), d.line_and_column(source))).collect()
    }

    const BARE: &str = "[brane.fetch]\nimage = \"file:./f.wasm\"\n";

    #[test]
    fn a_missing_grant_names_the_import_the_key_and_the_line() {
        let said = judged(BARE, &[("wasi:io/streams@0.2.0", true), ("wasi:sockets/tcp@0.2.0", true)]);
        assert_eq!(
            said,
            [(Severity::Error, "fetch imports wasi:sockets/tcp@0.2.0, which needs \"net.tcp\"".into(), (1, 8))]
        );
        let with = format!("{BARE}\n[brane.fetch.capability]\n\"net.tcp\" = {{ allowlist = [] }}\n");
        assert_eq!(judged(&with, &[("wasi:sockets/tcp@0.2.0", true)]), []);
    }

    #[test]
    fn pinned_instances_are_bounded_and_the_first_beyond_is_named_once() {
        let brane = |name: &str, replicas: usize| {
            format!(
                "[brane.{name}]\nimage = \"file:./f.wasm\"\nreplicas = {replicas}\nexecution = {{ lifecycle = \"pinned\" }}\n"
            )
        };
        let said = |text: &str| unsupported(&gaia_manifest::parse(text).unwrap());
        assert!(said(&(brane("a", MAX_KEEPERS - 1) + &brane("b", 1))).is_empty());
        let too_many = said(&(brane("a", MAX_KEEPERS) + &brane("b", 1) + &brane("c", 1)));
        let [error] = too_many.as_slice() else { panic!("{too_many:?}") };
        assert!(error.message.starts_with("b: a graph can have 64 pinned instances"), "{}", error.message);
    }

    #[test]
    fn types_alone_need_no_grant_and_a_grant_nothing_needs_is_a_warning() {
        let with = format!("{BARE}\n[brane.fetch.capability]\n\"clock\" = {{ resolution = \"ms\" }}\n");
        let said = judged(&with, &[("wasi:clocks/monotonic-clock@0.2.0", false)]);
        assert_eq!(said, [(Severity::Warning, "nothing that fetch imports needs \"clock\"".into(), (5, 1))]);
    }

    #[test]
    fn what_cannot_start_or_serve_is_said() {
        let small = format!("{BARE}limits = {{ mem_max = \"64 KiB\" }}\n");
        assert!(judged(&small, &[])[0].1.contains("starts with 131072 bytes"));
        assert!(judged(BARE, &[("acme:door/open@1.0.0", true)])[0].1.contains("does not have"));
    }

    #[test]
    fn the_smallest_grant_is_as_small_as_it_can_be() {
        let import = |name: &str| Import { name: name.into(), authority: true };
        let sockets = [
            import("wasi:sockets/network@0.2.0"),
            import("wasi:sockets/udp@0.2.0"),
            import("wasi:clocks/wall-clock@0.2.0"),
        ];
        assert_eq!(suggested(&sockets), ["clock", "net.udp"]);
    }
}
