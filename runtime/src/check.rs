//! `gaia check`: the security review of a manifest on one screen.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use gaia_manifest::{Brane, Capability, Diagnostic, Image, Lifecycle, Manifest, Severity};
use serde::Serialize;

use crate::compile::{self, MAX_COMPONENT, Report};
use crate::{engine, link, review};

/// A manifest that could not even be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", .path.display())]
pub struct Unreadable {
    path: PathBuf,
    source: std::io::Error,
}

/// A reviewed manifest.
#[derive(Debug)]
pub struct Review {
    file: String,
    source: String,
    manifest: Option<Manifest>,
    /// Of each brane, in the manifest's order, what its component is; `None` where it could not be had.
    reports: Vec<Option<Report>>,
    said: Vec<Diagnostic>,
}

/// The review for scripts.
#[derive(Debug, Serialize)]
struct Json<'a> {
    file: &'a str,
    branes: Vec<JsonBrane<'a>>,
    diagnostics: Vec<JsonDiagnostic<'a>>,
    errors: usize,
    warnings: usize,
}

#[derive(Debug, Serialize)]
struct JsonBrane<'a> {
    name: &'a str,
    image: String,
    imports: Vec<&'a str>,
    granted: Vec<&'static str>,
    needed: Vec<&'static str>,
    replicas: u32,
    mem_max_bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonDiagnostic<'a> {
    severity: &'static str,
    message: &'a str,
    line: usize,
    column: usize,
    help: Option<&'a str>,
}

impl Review {
    /// Reads a manifest and the files its images name, and judges them.
    ///
    /// # Errors
    /// Only if the manifest itself cannot be read; everything else is part of the review.
    pub fn of(path: &Path) -> Result<Self, Unreadable> {
        let source = std::fs::read_to_string(path).map_err(|source| Unreadable { path: path.to_owned(), source })?;
        let file = path.display().to_string();
        let mut review = Self { file, source, manifest: None, reports: Vec::new(), said: Vec::new() };
        match gaia_manifest::parse(&review.source) {
            Err(wrong) => review.said = wrong,
            Ok(manifest) => {
                review.said = review::unsupported(&manifest);
                let folder = path.parent().unwrap_or(Path::new("."));
                for brane in &manifest.branes {
                    let report = match component(folder, brane) {
                        Ok(report) => Some(report),
                        Err(said) => {
                            review.said.push(*said);
                            None
                        }
                    };
                    review.said.extend(report.iter().flat_map(|report| review::of(brane, report)));
                    review.reports.push(report);
                }
                review.said.sort_by_key(|d| d.span.start);
                review.manifest = Some(manifest);
            }
        }
        Ok(review)
    }

    /// How many errors there are.
    #[must_use]
    pub fn errors(&self) -> usize {
        self.said.iter().filter(|d| d.severity == Severity::Error).count()
    }

    /// Everything that is to be said, as a terminal shows it.
    #[must_use]
    pub fn diagnostics(&self, colours: bool) -> String {
        let mut out = String::new();
        for diagnostic in &self.said {
            let _ = writeln!(out, "{}\n", diagnostic.render(&self.file, &self.source, colours));
        }
        out
    }

    fn branes(&self) -> impl Iterator<Item = (&Brane, Option<&Report>)> {
        let branes = self.manifest.iter().flat_map(|m| &m.branes);
        branes.zip(self.reports.iter().map(Option::as_ref))
    }

    /// The screen: each brane with what it imports and is granted, then the totals against this machine.
    #[must_use]
    pub fn screen(&self, machine_bytes: u64) -> String {
        let mut out = String::new();
        let (mut instances, mut memory) = (0_u64, 0_u64);
        for (brane, report) in self.branes() {
            let _ = writeln!(out, "{}  {}", brane.name.value, brane.image.value);
            for import in report.iter().flat_map(|r| &r.imports).filter(|i| i.authority) {
                let keys = link::keys_of(&import.name);
                let granted = brane.capabilities.iter().any(|g| keys.contains(&g.capability.key()));
                match keys.as_slice() {
                    [] if link::is_inert(&import.name) => {}
                    [] => drop(writeln!(out, "  imports  {:<44} unknown", import.name)),
                    keys => {
                        let verdict = if granted { "granted" } else { "MISSING" };
                        let _ = writeln!(out, "  imports  {:<44} {:<18} {verdict}", import.name, keys.join(" or "));
                    }
                }
            }
            if report.is_some_and(|r| review::suggested(&r.imports).is_empty()) {
                let _ = writeln!(out, "  imports  nothing that carries authority");
            }
            for grant in &brane.capabilities {
                let _ = writeln!(out, "  grants   {:<10} {}", grant.capability.key(), scope(&grant.capability));
            }
            if brane.lifecycle == Lifecycle::Pinned {
                let _ = writeln!(
                    out,
                    "  pinned   keeps what it knows from request to request, each replica in its own process"
                );
            }
            let (each, replicas) = (brane.limits.mem_max.value, u64::from(brane.replicas));
            let _ = writeln!(
                out,
                "  limits   {} × {replicas} = {} at most · {:?} · body {}",
                bytes(each),
                bytes(each.saturating_mul(replicas)),
                brane.limits.deadline,
                bytes(brane.limits.body_max)
            );
            instances += replicas;
            memory = memory.saturating_add(each.saturating_mul(replicas));
        }
        let warnings = self.said.len() - self.errors();
        let _ = writeln!(
            out,
            "total  {} branes, {instances} instances, {} at most; this machine has {}\n       {} errors, {warnings} warnings",
            self.manifest.as_ref().map_or(0, |m| m.branes.len()),
            bytes(memory),
            bytes(machine_bytes),
            self.errors()
        );
        out
    }

    /// The smallest grants with which each brane links, ready to paste.
    #[must_use]
    pub fn suggestion(&self) -> String {
        let mut out = String::new();
        for (brane, report) in self.branes() {
            let keys = report.map(|r| review::suggested(&r.imports)).unwrap_or_default();
            if keys.is_empty() {
                let _ = writeln!(out, "# [brane.{}] needs no grant", brane.name.value);
                continue;
            }
            let _ = writeln!(out, "[brane.{}.capability]", brane.name.value);
            for key in keys {
                let _ = writeln!(out, "{}", review::smallest(key));
            }
        }
        out
    }

    /// The review for scripts.
    #[must_use]
    pub fn json(&self) -> String {
        let branes = self.branes().map(|(brane, report)| JsonBrane {
            name: &brane.name.value,
            image: brane.image.value.to_string(),
            imports: report.iter().flat_map(|r| &r.imports).map(|i| i.name.as_str()).collect(),
            granted: brane.capabilities.iter().map(|g| g.capability.key()).collect(),
            needed: report.map(|r| review::suggested(&r.imports)).unwrap_or_default(),
            replicas: brane.replicas,
            mem_max_bytes: brane.limits.mem_max.value,
        });
        let diagnostics = self.said.iter().map(|d| {
            let (line, column) = d.line_and_column(&self.source);
            let severity = if d.severity == Severity::Error { "error" } else { "warning" };
            JsonDiagnostic { severity, message: &d.message, line, column, help: d.help.as_deref() }
        });
        let json = Json {
            file: &self.file,
            branes: branes.collect(),
            diagnostics: diagnostics.collect(),
            errors: self.errors(),
            warnings: self.said.len() - self.errors(),
        };
        serde_json::to_string(&json).unwrap_or_default() + "\n"
    }
}

/// Reads and compiles the component of a brane.
fn component(folder: &Path, brane: &Brane) -> Result<Report, Box<Diagnostic>> {
    let Image::File(name) = &brane.image.value else {
        let (brane_name, image) = (&brane.name.value, &brane.image.value);
        let registry = gaia_registry::Reference::parse(&image.to_string()).is_ok_and(|name| !name.is_local());
        let place = if registry { "in a registry, and none is asked" } else { "in a store" };
        let message = format!("{brane_name}: \"{image}\" is a name {place}, so what it imports is not seen here");
        let help = "gaia --on HOST deploy --dry-run shows it";
        return Err(Box::new(Diagnostic::warning(brane.image.span.clone(), message, "not looked at").help(help)));
    };
    let wrong = |message: String| Box::new(Diagnostic::error(brane.image.span.clone(), message, "this image"));
    let path = folder.join(name);
    let size = std::fs::metadata(&path).map_err(|e| wrong(format!("{}: {e}", path.display())))?.len();
    if size > MAX_COMPONENT {
        return Err(wrong(format!("{} has {size} bytes, at most {MAX_COMPONENT} are compiled", path.display())));
    }
    let component = std::fs::read(&path).map_err(|e| wrong(format!("{}: {e}", path.display())))?;
    let (report, _) =
        compile::compile(&component, engine::WHOLE).map_err(|e| wrong(format!("{}: {e:#}", path.display())))?;
    Ok(report)
}

fn scope(capability: &Capability) -> String {
    fn list<T: ToString>(entries: &[T]) -> String {
        if entries.is_empty() {
            "nothing".into()
        } else {
            entries.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
        }
    }
    match capability {
        Capability::Http(sites) => list(sites),
        Capability::Dns(hosts) => list(hosts),
        Capability::Tcp(endpoints) | Capability::Udp(endpoints) => list(endpoints),
        Capability::Tmp { quota, lifetime } => {
            format!("{} per {}", bytes(*quota), format!("{lifetime:?}").to_lowercase())
        }
        Capability::Clock(resolution) => format!("steps of {} ns", resolution.nanos()),
        Capability::Random => String::new(),
        Capability::Env { vars, secrets } => format!("{} variables, {} secrets", vars.len(), secrets.len()),
    }
}

/// `64 MiB`, `1.5 GiB`
fn bytes(n: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| n >> shift > 0) {
        None => format!("{n} B"),
        Some((unit, shift)) if n.trailing_zeros() >= *shift => format!("{} {unit}", n >> shift),
        Some((unit, shift)) => {
            let tenths = (u128::from(n) * 10) >> shift;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!((bytes(0), bytes(64 << 20), bytes(3 << 29)), ("0 B".into(), "64 MiB".into(), "1.5 GiB".into()));
        assert!(bytes(u64::MAX).ends_with("GiB"));
    }

    #[test]
    fn a_component_that_is_not_there_is_an_error_at_its_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.zgraph.toml");
        std::fs::write(&path, "[brane.a]\nimage = \"file:./none.wasm\"\n").unwrap();
        let review = Review::of(&path).unwrap();
        assert_eq!(review.errors(), 1);
        assert!(review.diagnostics(false).contains("x.zgraph.toml:2:9"), "{}", review.diagnostics(false));
        assert!(review.json().contains("\"line\":2"));
    }

    #[test]
    fn the_empty_component_is_reviewed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.wasm"), b"\0asm\x0d\0\x01\0").unwrap();
        let path = folder.path().join("x.zgraph.toml");
        std::fs::write(&path, "[brane.a]\nimage = \"file:./a.wasm\"\nreplicas = 2\n").unwrap();
        let review = Review::of(&path).unwrap();
        assert!(review.diagnostics(false).contains("does not export wasi:http/incoming-handler"));
        assert!(review.screen(1 << 30).contains("64 MiB × 2 = 128 MiB at most"), "{}", review.screen(1 << 30));
        assert!(review.suggestion().contains("[brane.a] needs no grant"));
    }
}
