//! What lies in a registry: an index, a manifest, and a component as its one layer.
//!
//! Written as CNCF's "Wasm OCI Artifact Layout" has it and oci-wasm, under wkg and wash, writes it. Read more widely:
//! whatever the configuration is, one layer has to have a media type of WebAssembly.

use std::collections::BTreeMap;

use gaia_egress::site::Quoted;
use serde::{Deserialize, Serialize};
use wasmparser::{ComponentExternalKind, ComponentTypeRef, Encoding, Parser, Payload};

use crate::error::Why;
use crate::reference::Digest;

/// A manifest of OCI.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// What is asked for, in the form of an `Accept`.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";
/// The configuration of a component.
const CONFIG: &str = "application/vnd.wasm.config.v0+json";
/// A component.
const WASM: &str = "application/wasm";
/// Layers that are WebAssembly.
const LAYERS: [&str; 4] = [
    WASM,
    // wasm-to-oci, Krustlet and what pushes with oci-client alone; Spin's applications.
    "application/vnd.wasm.content.layer.v1+wasm",
    // wash before it wrote `application/wasm`.
    "application/vnd.module.wasm.content.layer.v1+wasm",
    // runwasi's oci-tar-builder.
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
];
/// Manifests of an index that are looked at; what has more is not for one component.
const MAX_ENTRIES: usize = 256;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u64,
    media_type: Option<String>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(skip_serializing)]
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

/// Something of which digest and size are known before it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// What a manifest leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Artefact {
    /// The component.
    Component(Blob),
    /// The manifest for WebAssembly.
    Index(Blob),
}

impl Artefact {
    /// Reads a manifest or an index, which the server called this.
    pub(crate) fn read(bytes: &[u8], called: Option<&str>) -> Result<Self, Why> {
        let document: Document = serde_json::from_slice(bytes)
            .map_err(|e| Why::Manifest(format!("not one that is understood: {}", Quoted::new(&e.to_string()))))?;
        if document.schema_version != 2 {
            return Err(Why::Manifest(format!("of version {}, and only 2 is read", document.schema_version)));
        }
        // Both a manifest and an index, or one that calls itself something else than the server does, would be read in one
        // way here and in another elsewhere (CVE-2021-41190).
        let called = called.map(|called| called.split(';').next().unwrap_or(called).trim());
        let called = called.filter(|called| !matches!(*called, "application/json" | "application/octet-stream" | ""));
        if let (Some(called), Some(own)) = (called, &document.media_type)
            && called != own
        {
            let (called, own) = (Quoted::new(called), Quoted::new(own));
            return Err(Why::Manifest(format!("the server calls it {called}, and it itself {own}")));
        }
        let is_index = match called.or(document.media_type.as_deref()) {
            Some(MANIFEST | DOCKER_MANIFEST) => false,
            Some(INDEX | DOCKER_INDEX) => true,
            Some(other) => return Err(Why::Manifest(format!("of the unknown type {}", Quoted::new(other)))),
            None => document.manifests.is_some(),
        };
        match (is_index, document.layers, document.manifests) {
            (false, Some(layers), None) => component(layers).map(Self::Component),
            (true, None, Some(manifests)) => entry(&manifests).map(Self::Index),
            (_, Some(_), Some(_)) => Err(Why::Manifest("at once a manifest and an index".into())),
            (false, None, _) => Err(Why::Manifest("without layers".into())),
            (true, _, None) => Err(Why::Manifest("an index without manifests".into())),
        }
    }
}

/// The one layer that is WebAssembly.
fn component(layers: Vec<Descriptor>) -> Result<Blob, Why> {
    let types: Vec<String> = layers.iter().take(4).map(|l| Quoted::new(&l.media_type).to_string()).collect();
    let mut wasm = layers.into_iter().filter(|layer| LAYERS.contains(&layer.media_type.as_str()));
    match (wasm.next(), wasm.count()) {
        (None, _) if types.is_empty() => Err(Why::NotWasm("a manifest without layers".into())),
        (None, _) => Err(Why::NotWasm(types.join(", "))),
        (Some(layer), 0) => layer.blob(),
        (Some(_), more) => Err(Why::SeveralComponents(more + 1)),
    }
}

/// The one manifest for WebAssembly; the only one, if there is no other.
fn entry(manifests: &[Descriptor]) -> Result<Blob, Why> {
    let count = manifests.len();
    if count > MAX_ENTRIES {
        return Err(Why::Index(count));
    }
    let is_wasm = |entry: &&Descriptor| {
        let of = |p: &Platform| p.architecture == "wasm" && (p.os.is_empty() || p.os.starts_with("was"));
        entry.platform.as_ref().is_some_and(of)
    };
    let components = |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|p| p.os == "wasip2");
    let wasm: Vec<&Descriptor> = manifests.iter().filter(is_wasm).collect();
    let chosen = wasm.iter().copied().find(components).or_else(|| wasm.first().copied());
    let only = manifests.first().filter(|entry| count == 1 && entry.platform.is_none());
    chosen.or(only).ok_or(Why::Index(count))?.blob()
}

impl Descriptor {
    fn blob(&self) -> Result<Blob, Why> {
        let unknown = || Why::Manifest(format!("a digest that is not SHA-256: {}", Quoted::new(&self.digest)));
        let digest = Digest::parse(&self.digest).ok_or_else(unknown)?;
        Ok(Blob { media_type: self.media_type.clone(), digest, size: self.size })
    }

    fn of(media_type: &str, bytes: &[u8]) -> Self {
        let (media_type, digest) = (media_type.to_owned(), Digest::of(bytes).to_string());
        Self { media_type, digest, size: bytes.len() as u64, platform: None }
    }
}

/// What goes to a registry beside the component.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

/// The configuration and the manifest of a component: always the same bytes for the same component and annotations, so that
/// a push that is repeated changes nothing. The time, which the layout wants, is that of the annotation
/// `org.opencontainers.image.created`, or 1970.
pub(crate) fn written(wasm: &[u8], annotations: &BTreeMap<String, String>) -> Result<Written, Why> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Config<'a> {
        created: &'a str,
        author: Option<&'a str>,
        architecture: &'static str,
        os: &'static str,
        layer_digests: [String; 1],
        component: World,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest<'a> {
        schema_version: u8,
        media_type: &'static str,
        config: Descriptor,
        layers: [Descriptor; 1],
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        annotations: &'a BTreeMap<String, String>,
    }
    let annotation = |name: &str| annotations.get(name).map(String::as_str);
    let layer = Descriptor::of(WASM, wasm);
    let config = Config {
        created: annotation("org.opencontainers.image.created").unwrap_or("1970-01-01T00:00:00Z"),
        author: annotation("org.opencontainers.image.authors"),
        architecture: "wasm",
        os: "wasip2",
        layer_digests: [layer.digest.clone()],
        component: World::of(wasm)?,
    };
    let unwritten = |e: serde_json::Error| Why::Manifest(e.to_string());
    let config = serde_json::to_vec(&config).map_err(unwritten)?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: MANIFEST,
        config: Descriptor::of(CONFIG, &config),
        layers: [layer],
        annotations,
    };
    let manifest = serde_json::to_vec(&manifest).map_err(unwritten)?;
    Ok(Written { config, manifest })
}

/// What a component takes and gives.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct World {
    exports: Vec<String>,
    imports: Vec<String>,
    target: Option<String>,
}

impl World {
    /// Of a component's outermost level. It is not validated: that is the deploy's business.
    fn of(wasm: &[u8]) -> Result<Self, Why> {
        let not = |e: wasmparser::BinaryReaderError| Why::NotAComponent(e.message().to_owned());
        if !Parser::is_component(wasm) {
            let is = if Parser::is_core_wasm(wasm) {
                "a core module; wasm-tools component new makes one"
            } else {
                "other bytes"
            };
            return Err(Why::NotAComponent(is.into()));
        }
        let mut world = Self { exports: Vec::new(), imports: Vec::new(), target: None };
        let mut depth = 0_usize;
        for payload in Parser::new(0).parse_all(wasm) {
            match payload.map_err(not)? {
                Payload::Version { encoding: Encoding::Module | Encoding::Component, .. } => depth += 1,
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::ComponentImportSection(section) if depth == 1 => {
                    for import in section {
                        let import = import.map_err(not)?;
                        if !matches!(import.ty, ComponentTypeRef::Type(_)) {
                            world.imports.push(import.name.name.to_owned());
                        }
                    }
                }
                Payload::ComponentExportSection(section) if depth == 1 => {
                    for export in section {
                        let export = export.map_err(not)?;
                        if export.kind != ComponentExternalKind::Type {
                            world.exports.push(export.name.name.to_owned());
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(world)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn blob(media_type: &str) -> Blob {
        Blob { media_type: media_type.into(), digest: Digest::of(b""), size: 7 }
    }

    fn descriptor(media_type: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{HEX}","size":7{more}}}"#)
    }

    fn manifest(layers: &[String]) -> String {
        format!(r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{}},"layers":[{}]}}"#, layers.join(","))
    }

    fn index(entries: &[String]) -> String {
        format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))
    }

    #[test]
    fn the_one_layer_of_wasm_is_the_component() {
        for wasm in LAYERS {
            let text = manifest(&[descriptor("text/plain", ""), descriptor(wasm, r#","annotations":{"a":"b"}"#)]);
            assert_eq!(Artefact::read(text.as_bytes(), Some(MANIFEST)).unwrap(), Artefact::Component(blob(wasm)));
        }
        let two = manifest(&[descriptor(WASM, ""), descriptor(WASM, "")]);
        assert!(matches!(Artefact::read(two.as_bytes(), None), Err(Why::SeveralComponents(2))));
        let none = manifest(&[descriptor("application/vnd.oci.image.layer.v1.tar+gzip", "")]);
        let error = Artefact::read(none.as_bytes(), None).unwrap_err().to_string();
        assert!(error.contains("tar+gzip"), "{error}");
    }

    #[test]
    fn of_an_index_the_manifest_for_wasm_is_taken() {
        let platform = |arch, os| format!(r#","platform":{{"architecture":"{arch}","os":"{os}"}}"#);
        let linux = descriptor(MANIFEST, &platform("amd64", "linux"));
        for (entries, chosen) in [
            (
                vec![
                    linux.clone(),
                    descriptor("x/p1", &platform("wasm", "wasip1")),
                    descriptor("x/p2", &platform("wasm", "wasip2")),
                ],
                Some("x/p2"),
            ),
            (vec![linux.clone(), descriptor("x/wasi", &platform("wasm", "wasi"))], Some("x/wasi")),
            (vec![descriptor(MANIFEST, "")], Some(MANIFEST)),
            (vec![descriptor(MANIFEST, ""), descriptor(MANIFEST, "")], None),
            (vec![linux], None),
            (vec![], None),
        ] {
            let read = Artefact::read(
                index(&entries).as_bytes(),
                Some("application/vnd.oci.image.index.v1+json; charset=utf-8"),
            );
            match chosen {
                Some(chosen) => assert_eq!(read.unwrap(), Artefact::Index(blob(chosen))),
                None => assert!(matches!(read, Err(Why::Index(n)) if n == entries.len())),
            }
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let both = format!(r#"{{"schemaVersion":2,"layers":[{}],"manifests":[]}}"#, descriptor(WASM, ""));
        for (text, called) in [
            (both.clone(), None),
            (both, Some(MANIFEST)),
            (manifest(&[descriptor(WASM, "")]), Some(INDEX)),
            (index(&[descriptor(MANIFEST, "")]), Some(MANIFEST)),
            (manifest(&[descriptor(WASM, "")]).replace("\"schemaVersion\":2", "\"schemaVersion\":1"), None),
            (manifest(&[descriptor(WASM, "")]).replace(HEX, "sha512:00"), None),
            ("[]".into(), None),
            ("<html>".into(), Some("text/html")),
        ] {
            assert!(matches!(Artefact::read(text.as_bytes(), called), Err(Why::Manifest(_))), "{text} {called:?}");
        }
    }

    #[test]
    fn a_component_is_described_by_its_outermost_level() {
        let text = r#"(component
            (import "wasi:clocks/wall-clock@0.2.0" (instance))
            (component (import "inner" (func)))
            (core module (import "a" "b" (func)))
            (type $t (func))
            (import "log" (func $log (type $t)))
            (export "run" (func $log)))"#;
        let wasm = wat::parse_str(text).unwrap();
        let world = World::of(&wasm).unwrap();
        assert_eq!(world.imports, ["wasi:clocks/wall-clock@0.2.0", "log"]);
        assert_eq!(world.exports, ["run"]);

        let annotations = BTreeMap::from([("org.opencontainers.image.authors".to_owned(), "omega".to_owned())]);
        let written = written(&wasm, &annotations).unwrap();
        assert_eq!(super::written(&wasm, &annotations).unwrap().manifest, written.manifest);
        let config: serde_json::Value = serde_json::from_slice(&written.config).unwrap();
        assert_eq!(config["component"]["exports"], serde_json::json!(["run"]));
        assert_eq!((&config["os"], &config["author"]), (&"wasip2".into(), &"omega".into()));
        assert_eq!(config["layerDigests"], serde_json::json!([Digest::of(&wasm).to_string()]));
        let Ok(Artefact::Component(layer)) = Artefact::read(&written.manifest, Some(MANIFEST)) else { panic!() };
        assert_eq!((layer.digest, layer.size), (Digest::of(&wasm), wasm.len() as u64));
    }

    #[test]
    fn what_is_no_component_is_not_written() {
        for (bytes, why) in [
            (wat::parse_str("(module)").unwrap(), "a core module"),
            (b"#!/bin/sh".to_vec(), "other bytes"),
            (vec![], "other bytes"),
            ([wat::parse_str("(component)").unwrap(), vec![11, 9, 1]].concat(), "unexpected end"),
        ] {
            let error = written(&bytes, &BTreeMap::new()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_told_why_not(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            called in proptest::option::of("\\PC{0,40}"),
        ) {
            let _ = Artefact::read(&bytes, called.as_deref());
        }

        #[test]
        fn any_bytes_are_a_component_or_told_why_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = World::of(&bytes);
            let _ = World::of(&[b"\0asm\x0d\0\x01\0".as_slice(), &bytes].concat());
        }
    }
}
