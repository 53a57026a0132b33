//! The compile role: a component in, machine code out, then the process ends.
//!
//! It holds one descriptor, the channel to control. Over it come the component's bytes; back go a report and, if all
//! went well, the artefact, both as sealed files in memory. What a stranger's bytes do to Cranelift ends with this
//! process: it can open, reach and start nothing (see [`sandbox::compile`]), and init bounds its memory, its processor time and
//! what it writes.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use gaia_init::descriptors::Descriptors;
use gaia_init::sandbox::{self, Demand};
use gaia_init::wire::{self, Message, Unknown};
use serde::{Deserialize, Serialize};
use wasmparser::{DataKind, KnownCustom, Name, Operator, Parser, Payload};
use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime::component::types::ComponentItem;

use crate::channel::{read_whole, sealed};
use crate::plan::Needs;
use crate::{capability, engine, link};

/// The largest component that is compiled, in bytes: JavaScript toolchains make up to 18 MB.
pub const MAX_COMPONENT: u64 = 64 << 20;
/// The largest artefact, in bytes.
pub const MAX_ARTEFACT: u64 = 512 << 20;
/// The largest report, in bytes.
pub const MAX_REPORT: u64 = 1 << 20;

/// What control and a compiler say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// One descriptor beside it: the component.
    Compile {
        /// What will be reserved for each of its memories, in bytes.
        reservation: u64,
    },
    /// One or two descriptors beside it: the report, the artefact.
    Done,
}

impl Message for Word {
    fn parse(text: &str) -> Result<Self, Unknown> {
        let reservation = text.strip_prefix("compile ").and_then(|bytes| bytes.parse().ok());
        match (text, reservation) {
            (_, Some(reservation)) => Ok(Self::Compile { reservation }),
            ("done", _) => Ok(Self::Done),
            _ => Err(Unknown::of(text)),
        }
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compile { reservation } => write!(f, "compile {reservation}"),
            Self::Done => f.write_str("done"),
        }
    }
}

/// What the compiler found out about a component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Why there is no artefact, with Wasmtime's whole chain of causes.
    pub error: Option<String>,
    /// Interfaces it imports.
    pub imports: Vec<Import>,
    /// Interfaces and functions it exports.
    pub exports: Vec<String>,
    /// What an instance needs of a pool.
    pub needs: Option<Needs>,
    /// Why it could not be instantiated even if everything were granted, in Wasmtime's words.
    pub unlinked: Option<String>,
}

/// One imported interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// Its full name: `wasi:http/types@0.2.3`.
    pub name: String,
    /// Whether anything can be called or held through it: functions or resources. Types alone carry no authority.
    pub authority: bool,
}

/// Runs the role.
///
/// # Errors
/// If its sandbox cannot be closed, or the channel to control breaks; a component that does not compile is a report, not an error here.
pub fn run() -> anyhow::Result<()> {
    sandbox::enter(&sandbox::compile::SANDBOX, &BTreeSet::new(), Demand::from_environment())?;
    let control = Descriptors::inherit()?.take("control")?;
    let (Word::Compile { reservation }, mut files) = wire::receive(&control)? else {
        anyhow::bail!("control sent something else than a component");
    };
    let (report, artefact) = match files.pop() {
        Some(file) => answer(file, reservation),
        None => (Report::failed("no component came with the request".into()), None),
    };
    let report = sealed("report", &serde_json::to_vec(&report)?)?;
    let artefact = artefact.map(|bytes| sealed("artefact", &bytes)).transpose()?;
    let both = [Some(report.as_fd()), artefact.as_ref().map(AsFd::as_fd)];
    let both: Vec<_> = both.into_iter().flatten().collect();
    wire::send(&control, &Word::Done, &both)?;
    Ok(())
}

fn answer(file: OwnedFd, reservation: u64) -> (Report, Option<Vec<u8>>) {
    let component = match read_whole(file, MAX_COMPONENT) {
        Ok(bytes) => bytes,
        Err(e) => return (Report::failed(format!("reading the component: {e}")), None),
    };
    match compile(&component, reservation) {
        Ok((report, artefact)) => (report, Some(artefact)),
        Err(e) => (Report::failed(format!("{e:#}")), None),
    }
}

/// Compiles one component for this processor, and for memories of which so many bytes are reserved.
///
/// # Errors
/// Wasmtime's, for bytes that are no valid component.
pub fn compile(component: &[u8], reservation: u64) -> wasmtime::Result<(Report, Vec<u8>)> {
    if component.starts_with(b"\0asm\x01\0\0\0") {
        wasmtime::bail!("this is a core WebAssembly module, not a component; build it for wasm32-wasip2");
    }
    let engine = engine::for_compiler(reservation)?;
    // From text it would be parsed as WAT; only binary components are taken.
    let compiled = Component::from_binary(&engine, component)?;
    let kind = compiled.component_type();
    let imports = kind.imports(&engine).map(|(name, item)| import(&engine, name, &item.ty));
    let exports = kind.exports(&engine).map(|(name, _)| name.to_owned());
    let needs = compiled.resources_required().map(|r| Needs {
        memories: r.num_memories,
        initial_memory: r.max_initial_memory_size.unwrap_or(0).saturating_mul(64 * 1024),
        data_end: data_end(component),
        tables: r.num_tables,
        table_elements: r.max_initial_table_size.unwrap_or(0),
        longest_name: longest_name(component),
    });
    let unlinked = link::linker(&engine, &capability::ALL)?.instantiate_pre(&compiled).err().map(|e| format!("{e:#}"));
    let report = Report { error: None, imports: imports.collect(), exports: exports.collect(), needs, unlinked };
    Ok((report, compiled.serialize()?))
}

/// Where the data ends that the component's modules begin with, in bytes: of the one in which it ends last.
fn data_end(component: &[u8]) -> u64 {
    // Modules lie within components and are parsed with them.
    let sections = Parser::new(0).parse_all(component).filter_map(|payload| match payload {
        Ok(Payload::DataSection(section)) => Some(section),
        _ => None,
    });
    let ends = sections.flatten().flatten().filter_map(|data| {
        let DataKind::Active { offset_expr, .. } = data.kind else { return None };
        match offset_expr.get_operators_reader().read() {
            Ok(Operator::I32Const { value }) => Some(u64::from(value.cast_unsigned()) + data.data.len() as u64),
            _ => None,
        }
    });
    ends.max().unwrap_or(0)
}

/// The longest name that the component's modules give a function, in bytes: by their names, or where there are none by what they
/// export.
fn longest_name(component: &[u8]) -> u64 {
    let mut longest = 0;
    for payload in Parser::new(0).parse_all(component).map_while(Result::ok) {
        match payload {
            Payload::CustomSection(section) => {
                let KnownCustom::Name(names) = section.as_known() else { continue };
                // What cannot be read is none to Wasmtime either.
                for name in names.map_while(Result::ok) {
                    let Name::Function(names) = name else { continue };
                    let names = names.into_iter().map_while(Result::ok).map(|name| name.name.len() as u64);
                    longest = longest.max(names.max().unwrap_or(0));
                }
            }
            Payload::ExportSection(exports) => {
                let names = exports.into_iter().map_while(Result::ok).map(|export| export.name.len() as u64);
                longest = longest.max(names.max().unwrap_or(0));
            }
            _ => {}
        }
    }
    longest
}

fn import(engine: &Engine, name: &str, item: &ComponentItem) -> Import {
    let authority = match item {
        ComponentItem::ComponentInstance(instance) => {
            instance.exports(engine).any(|(_, e)| !matches!(e.ty, ComponentItem::Type(_)))
        }
        ComponentItem::Type(_) => false,
        _ => true,
    };
    Import { name: name.to_owned(), authority }
}

impl Report {
    fn failed(error: String) -> Self {
        Self { error: Some(error), imports: Vec::new(), exports: Vec::new(), needs: None, unlinked: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The smallest component there is: the header alone.
    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    #[test]
    fn the_empty_component_compiles_and_imports_nothing() {
        let (report, artefact) = compile(EMPTY, engine::WHOLE).unwrap();
        assert!(report.imports.is_empty() && report.exports.is_empty());
        assert_eq!(report.unlinked, None);
        assert!(!artefact.is_empty());
    }

    #[test]
    fn a_core_module_is_told_what_it_is() {
        let error = compile(b"\0asm\x01\0\0\0", engine::WHOLE).unwrap_err().to_string();
        assert!(error.contains("core WebAssembly module") && error.contains("wasm32-wasip2"), "{error}");
    }

    #[test]
    fn data_ends_where_the_furthest_of_all_modules_ends() {
        // One byte at 8; eight bytes at 2 MiB, and twenty that lie nowhere until a guest copies them.
        let first = b"\0asm\x01\0\0\0\x0b\x07\x01\x00\x41\x08\x0b\x01x".as_slice();
        let second = b"\0asm\x01\0\0\0\x0b\x27\x02\x00\x41\x80\x80\x80\x01\x0b\x0812345678\x01\x14passive, and further";
        let mut component = EMPTY.to_vec();
        for module in [second.as_slice(), first] {
            component.extend([1, u8::try_from(module.len()).unwrap()]);
            component.extend(module);
        }
        assert_eq!(data_end(&component), (2 << 20) + 8);
        assert_eq!(data_end(EMPTY), 0);
        assert_eq!(data_end(b"nothing"), 0);
    }

    #[test]
    fn the_longest_name_is_that_of_all_modules() {
        // In a section `name`, the names of functions: of number 0, `spin`.
        let first = b"\0asm\x01\0\0\0\0\x0e\x04name\x01\x07\x01\0\x04spin".as_slice();
        // And of another, sixteen bytes.
        let second = b"\0asm\x01\0\0\0\0\x1a\x04name\x01\x13\x01\0\x10sixteen is a lot".as_slice();
        let mut component = EMPTY.to_vec();
        for module in [second, first] {
            component.extend([1, u8::try_from(module.len()).unwrap()]);
            component.extend(module);
        }
        assert_eq!(longest_name(&component), 16);
        assert_eq!(longest_name(EMPTY), 0);
        assert_eq!(longest_name(b"nothing"), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_compiled(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), headed: bool) {
            if headed { bytes.splice(0..0, EMPTY.iter().copied()); }
            let _ = compile(&bytes, engine::WHOLE);
        }
    }
}
