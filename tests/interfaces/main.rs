//! Makes a component for each interface of WASI 0.2, as a toolchain makes it, and some that no toolchain makes, into a folder:
//! `gaia-interfaces FOLDER`.
//!
//! A program of its own, because the crates that make components switch on features of what Wasmtime stands on: in a test
//! of the runtime they would have Wasmtime compiled twice.

use std::path::Path;

use anyhow::{Context as _, Result};
use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
use wit_parser::{ManglingAndAbi, Resolve};

const WASI: &str = include_str!("wasi.wit");
/// Not for the link stage, but for the test of reuse: no toolchain makes code that fills tables.
const REUSE: &str = include_str!("reuse.wat");
/// The oldest version that is compatible, and a later one.
const VERSIONS: [&str; 2] = ["0.2.0", "0.2.3"];

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).context("usage: gaia-interfaces FOLDER")?;
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder)?;
    for version in VERSIONS {
        let wasi = WASI.replace("@0.2.0", &format!("@{version}"));
        for interface in interfaces()? {
            let world = format!("world one {{ import {interface}@{version}; }}");
            let component = component(&wasi, &world).with_context(|| interface.clone())?;
            let name = interface.replace([':', '/'], "_");
            std::fs::write(folder.join(format!("{name}@{version}.wasm")), component)?;
        }
    }
    // One that needs an interface for its types alone.
    let types = WASI.replace("now: func() -> datetime;", "");
    let world = "world one { use wasi:clocks/wall-clock@0.2.0.{datetime}; export f: func(d: datetime); }";
    std::fs::write(folder.join("types.wasm"), component(&types, world)?)?;
    std::fs::write(folder.join("reuse.wasm"), wat::parse_str(REUSE)?)?;
    Ok(())
}

/// The interfaces of the text, without their versions.
fn interfaces() -> Result<Vec<String>> {
    let resolve = resolved(WASI)?;
    let ids = resolve.interfaces.iter().filter_map(|(id, _)| resolve.id_of(id));
    Ok(ids.map(|id| id.split('@').next().unwrap_or_default().to_owned()).collect())
}

fn resolved(text: &str) -> Result<Resolve> {
    let mut resolve = Resolve::default();
    resolve.push_str("wasi.wit", text).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    Ok(resolve)
}

/// A component for the world `one`, which does nothing but import and export.
fn component(wasi: &str, world: &str) -> Result<Vec<u8>> {
    let resolve = resolved(&format!("{wasi}\npackage gaia:one {{ {world} }}\n"))?;
    let (world, _) = resolve.worlds.iter().find(|(_, world)| world.name == "one").context("no world")?;
    let mut module = dummy_module(&resolve, world, ManglingAndAbi::Standard32);
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let encoder = ComponentEncoder::default().module(&module).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    encoder.validate(true).encode().map_err(|e| anyhow::anyhow!("{e:?}"))
}
