//! What is measured beside Gaia and is no part of this repository: built or installed once, into the user's cache, in
//! the versions that stand here. What cannot be had is a reason in the results, not a failure.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::server::in_one_line;

const COMPONENTIZE_JS: &str = "@bytecodealliance/componentize-js@0.23.0";
const COMPONENTIZE_PY: &str = "componentize-py==0.25.1";
const WORKERD: &str = "workerd@1.20261117.1";
/// The component in JavaScript.
const JAVASCRIPT: &str = include_str!("hello.js");
/// The component in Python.
const PYTHON: &str = include_str!("hello.py");

/// What there is. Each part is a path, or why it is not there.
#[derive(Debug, Clone, Default)]
pub struct Tools {
    wasmtime: Option<Result<PathBuf, String>>,
    workerd: Option<Result<PathBuf, String>>,
    javascript: Option<Result<PathBuf, String>>,
    python: Option<Result<PathBuf, String>>,
}

/// What is wanted of it.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each is there or not, whatever the others are")]
pub struct Wanted {
    /// `wasmtime serve`.
    pub wasmtime: bool,
    /// workerd.
    pub workerd: bool,
    /// The component in JavaScript.
    pub javascript: bool,
    /// The component in Python.
    pub python: bool,
}

impl Tools {
    /// Gets what is wanted, into `cache`.
    #[must_use]
    pub fn get(wanted: Wanted, cache: &Path) -> Self {
        let part = |wanted: bool, get: fn(&Path) -> Result<PathBuf>| {
            wanted.then(|| std::fs::create_dir_all(cache).map_err(Into::into).and_then(|()| get(cache)))
        };
        let told = |part: Option<Result<PathBuf>>| part.map(|got| got.map_err(|e| format!("{e:#}")));
        Self {
            wasmtime: told(part(wanted.wasmtime, wasmtime)),
            workerd: told(part(wanted.workerd, workerd)),
            javascript: told(part(wanted.javascript, javascript)),
            python: told(part(wanted.python, python)),
        }
    }

    /// The program `wasmtime`.
    ///
    /// # Errors
    /// Why it is not there; likewise below.
    pub fn wasmtime(&self) -> Result<PathBuf> {
        Self::part(self.wasmtime.as_ref())
    }

    /// The program `workerd`.
    ///
    /// # Errors
    /// As above.
    pub fn workerd(&self) -> Result<PathBuf> {
        Self::part(self.workerd.as_ref())
    }

    /// The component in JavaScript.
    ///
    /// # Errors
    /// As above.
    pub fn javascript(&self) -> Result<PathBuf> {
        Self::part(self.javascript.as_ref())
    }

    /// The component in Python.
    ///
    /// # Errors
    /// As above.
    pub fn python(&self) -> Result<PathBuf> {
        Self::part(self.python.as_ref())
    }

    fn part(part: Option<&Result<PathBuf, String>>) -> Result<PathBuf> {
        match part {
            Some(Ok(path)) => Ok(path.clone()),
            Some(Err(reason)) => bail!("{reason}"),
            None => bail!("not asked for"),
        }
    }
}

/// Runs a program to its end, quietly.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{name} is not here"))?;
    let said = || in_one_line(&String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{name} failed: {}", said());
    Ok(())
}

/// The version of a package in `Cargo.lock`.
///
/// # Errors
/// If it is not there.
pub fn locked(lock: &str, name: &str) -> Result<String> {
    let lock: toml::Table = lock.parse().context("Cargo.lock")?;
    let packages = lock.get("package").and_then(toml::Value::as_array).context("Cargo.lock has no packages")?;
    let package = packages.iter().find(|package| package.get("name").and_then(toml::Value::as_str) == Some(name));
    let version = package.and_then(|package| package.get("version")?.as_str());
    Ok(version.with_context(|| format!("{name} is not in Cargo.lock"))?.to_owned())
}

/// `wasmtime` of the version that Gaia is built on, with its default features, built by cargo once: for this machine, as
/// its users install it.
fn wasmtime(cache: &Path) -> Result<PathBuf> {
    let version = locked(&std::fs::read_to_string("Cargo.lock").context("Cargo.lock")?, "wasmtime")?;
    let root = cache.join(format!("wasmtime-{version}"));
    let program = root.join("bin/wasmtime");
    if !program.exists() {
        eprintln!("compiling wasmtime-cli {version} into {}: once, some ten minutes on two cores", root.display());
        let target = cache.join("build");
        let mut command = Command::new("cargo");
        command.args(["install", "--quiet", "--locked", "wasmtime-cli", "--version", &format!("={version}"), "--root"]);
        command.arg(&root).env("CARGO_TARGET_DIR", &target).env_remove("RUSTFLAGS").env_remove("CARGO_BUILD_TARGET");
        // Not in the repository: the default target there is Gaia's.
        let installed = run(command.current_dir(cache));
        let _ = std::fs::remove_dir_all(target);
        installed?;
    }
    Ok(program)
}

/// Installs packages of npm into a folder of their own, named by what they are.
fn npm(cache: &Path, packages: &[&str]) -> Result<PathBuf> {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '_' };
    let folder = cache.join(packages.join("+").chars().map(safe).collect::<String>());
    if !folder.join("done").exists() {
        eprintln!("installing {} by npm", packages.join(" "));
        std::fs::create_dir_all(&folder)?;
        run(Command::new("npm").args(["install", "--no-audit", "--no-fund", "--prefix"]).arg(&folder).args(packages))?;
        std::fs::write(folder.join("done"), "")?;
    }
    Ok(folder)
}

fn workerd(cache: &Path) -> Result<PathBuf> {
    let folder = npm(cache, &[WORKERD])?;
    let program = folder.join("node_modules/@cloudflare/workerd-linux-64/bin/workerd");
    ensure!(program.exists(), "npm has no workerd for this machine");
    Ok(program)
}

/// The component for this source, made by `make` unless it was made before.
fn component(path: PathBuf, source: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let kept = path.with_extension("source");
    if !path.exists() || std::fs::read_to_string(&kept).unwrap_or_default() != source {
        eprintln!("making {}", path.display());
        make(&path)?;
        std::fs::write(kept, source)?;
    }
    Ok(path)
}

fn javascript(cache: &Path) -> Result<PathBuf> {
    let folder = npm(cache, &[COMPONENTIZE_JS])?;
    component(folder.join("javascript.wasm"), JAVASCRIPT, |_| {
        std::fs::write(folder.join("hello.js"), JAVASCRIPT)?;
        std::fs::write(folder.join("component.mjs"), include_str!("component.mjs"))?;
        world(&folder)?;
        run(Command::new("node").arg("component.mjs").current_dir(&folder))
    })
}

fn python(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join(COMPONENTIZE_PY.replace("==", "-"));
    let program = folder.join("bin/componentize-py");
    if !program.exists() {
        eprintln!("installing {COMPONENTIZE_PY} by pip");
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
        run(Command::new(folder.join("bin/pip")).args(["install", "--quiet", COMPONENTIZE_PY]))?;
    }
    component(folder.join("python.wasm"), PYTHON, |_| {
        std::fs::write(folder.join("hello.py"), PYTHON)?;
        world(&folder)?;
        let words = ["-d", "wit", "-w", "bench", "componentize", "hello", "-o", "python.wasm"];
        run(Command::new(&program).args(words).current_dir(&folder))
    })
}

/// Puts the world of a server of HTTP where the tools look for it: with the packages it stands on, as the crate `wasip2`
/// has them, from which the other guests are built.
fn world(folder: &Path) -> Result<()> {
    let metadata =
        Command::new("cargo").args(["metadata", "--format-version", "1", "--locked", "--offline"]).output()?;
    ensure!(metadata.status.success(), "cargo metadata: {}", in_one_line(&String::from_utf8_lossy(&metadata.stderr)));
    let metadata: Value = serde_json::from_slice(&metadata.stdout)?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let package = packages.filter(|p| p["name"] == "wasip2").find_map(|p| p["manifest_path"].as_str());
    let from = Path::new(package.context("wasip2 is no dependency")?).with_file_name("wit").join("deps");
    let to = folder.join("wit/deps");
    std::fs::create_dir_all(&to)?;
    for file in std::fs::read_dir(&from).with_context(|| format!("{}", from.display()))? {
        let file = file?;
        std::fs::copy(file.path(), to.join(file.file_name()))?;
    }
    std::fs::write(folder.join("wit/world.wit"), include_str!("bench.wit"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_wasmtime_is_the_one_that_gaia_is_built_on() {
        let lock = "version = 4\n[[package]]\nname = \"wasmtime-wasi\"\nversion = \"1.0.0\"\n\
                    [[package]]\nname = \"wasmtime\"\nversion = \"48.0.8\"\n";
        assert_eq!(locked(lock, "wasmtime").unwrap(), "48.0.8");
        assert!(locked(lock, "wasm").is_err());
    }
}
