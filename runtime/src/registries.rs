//! The registries that an operator names: as whom each is asked, and which of them a manifest may name.
//!
//! The same two tables everywhere, `[registry]` and `[registries]`: in `gaia.toml` on an appliance, in the file of `--registries`
//! for `gaia run` and `gaia push`. That file may be docker's `config.json`, too, as `docker login` and its like write it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use gaia_egress::resolve::{self, Resolve};
use gaia_init::registries::{Access, Hidden, MAX_BYTES, Registries};
use gaia_registry::{Credentials, Host, Progress, Reference, Registry, Settings};
use serde::{Deserialize, Serialize};

use crate::remote::Folder;

/// The port of public registries.
const HTTPS: u16 = 443;
/// How often whoever waits is told how far it is.
const TOLD_EVERY: Duration = Duration::from_secs(1);

/// The registries that are known.
#[derive(Debug, Clone, Default)]
pub struct Known {
    default: Option<Host>,
    any: bool,
    listed: BTreeMap<Host, Access>,
}

impl Known {
    /// Those of these tables.
    ///
    /// # Errors
    /// Of a registry whose name is none after all: which, and why.
    pub fn of(said: &Registries) -> anyhow::Result<Self> {
        let host = |host: &gaia_init::registries::Host| {
            Host::parse(host.as_str()).with_context(|| format!("the registry {host}"))
        };
        Ok(Self {
            default: said.registry.default.as_ref().map(host).transpose()?,
            any: said.registry.any,
            listed: said
                .registries
                .iter()
                .map(|(name, access)| Ok((host(name)?, access.clone())))
                .collect::<anyhow::Result<_>>()?,
        })
    }

    /// Where a name without a registry is looked for after the store.
    #[must_use]
    pub fn default_host(&self) -> Option<&Host> {
        self.default.as_ref()
    }

    /// The TCP ports on which they answer.
    #[must_use]
    pub fn ports(&self) -> BTreeSet<u16> {
        let listed = self.listed.iter().map(|(host, access)| host.port(access.plain_http));
        let default = self.default.iter().filter(|host| !self.listed.contains_key(*host)).map(|host| host.port(false));
        listed.chain(default).chain(self.any.then_some(HTTPS)).collect()
    }

    /// Whether a manifest may name this registry.
    #[must_use]
    pub fn may(&self, host: &Host) -> bool {
        let public = || self.any && host.port(false) == HTTPS;
        self.default.as_ref() == Some(host) || self.listed.contains_key(host) || public()
    }

    /// Who speaks to this registry. What is listed may be anywhere; `root` reads the file of a root.
    ///
    /// # Errors
    /// If the root cannot be read, or is none.
    pub fn registry(
        &self,
        host: &Host,
        resolver: Arc<dyn Resolve>,
        root: impl FnOnce(&str) -> anyhow::Result<String>,
    ) -> anyhow::Result<Registry> {
        let mut settings = Settings::default();
        for (listed, access) in &self.listed {
            settings = settings.with_companion(listed.clone());
            if access.plain_http {
                settings = settings.with_plain_http(listed.clone());
            }
        }
        if let Some(default) = &self.default {
            settings = settings.with_default(default.clone());
        }
        if let Some(access) = self.listed.get(host) {
            let password = access.user.as_ref().zip(access.password.as_ref()).map(|(user, password)| {
                Credentials::Password { user: user.clone(), password: password.reveal().to_owned() }
            });
            let token = access.token.as_ref().map(|token| Credentials::Token(token.reveal().to_owned()));
            if let Some(credentials) = password.or(token) {
                settings = settings.with_credentials(host.clone(), credentials);
            }
            if let Some(path) = &access.root {
                let pem = root(path).with_context(|| format!("the root {path} of {host}"))?;
                settings = settings.with_roots(pem);
            }
        }
        Registry::new(settings, resolver).with_context(|| host.to_string())
    }
}

/// Reads a file of registries: the two tables in TOML, or docker's `config.json`. Roots are beside it.
///
/// # Errors
/// If it cannot be read, is neither, or has something in it that others should not read, and they can.
pub fn read(path: &Path) -> anyhow::Result<Registries> {
    let shown = path.display();
    let file = File::open(path).with_context(|| shown.to_string())?;
    let others = file.metadata().with_context(|| shown.to_string())?.mode() & 0o077;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).with_context(|| shown.to_string())?;
    ensure!(text.len() as u64 <= MAX_BYTES, "{shown}: more than {MAX_BYTES} bytes");
    let read = if text.trim_start().starts_with('{') { of_docker(&text) } else { Registries::parse(&text) };
    let mut read = read.map_err(|why| anyhow::anyhow!("{shown}: {why}"))?;
    ensure!(others == 0 || !read.has_secrets(), "others than its owner may read {shown}: chmod 600 {shown}");
    let folder = path.parent().unwrap_or(Path::new("."));
    for root in read.registries.values_mut().filter_map(|access| access.root.as_mut()) {
        let absolute = std::path::absolute(folder.join(&*root)).with_context(|| format!("{shown}: {root}"))?;
        *root =
            absolute.into_os_string().into_string().ok().with_context(|| format!("{shown}: a path that is no text"))?;
    }
    Ok(read)
}

/// Credentials as `docker login` keeps them. What it keeps in a credential store is not asked for: no program is run.
fn of_docker(text: &str) -> Result<Registries, String> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        auths: BTreeMap<String, Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        auth: Option<String>,
        username: Option<String>,
        password: Option<String>,
        registrytoken: Option<String>,
    }
    // What is wrong without the text, which may be a secret.
    let config: Config = serde_json::from_str(text)
        .map_err(|e| format!("line {}, column {}: not what docker login writes", e.line(), e.column()))?;
    let mut all = Registries::default();
    for (key, auth) in config.auths {
        let host = ["https://", "http://"].iter().find_map(|scheme| key.strip_prefix(scheme)).unwrap_or(&key);
        let host = host.split('/').next().unwrap_or(host);
        let host = if host == "index.docker.io" { "docker.io" } else { host };
        // Other tools keep other things here.
        let Ok(host) = gaia_init::registries::Host::try_from(host.to_owned()) else { continue };
        let decoded = auth.auth.filter(|auth| !auth.is_empty()).map(|auth| {
            let bytes = base64::engine::general_purpose::STANDARD.decode(auth.trim()).ok();
            let pair = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = pair.as_ref().and_then(|pair| pair.split_once(':')).map(|(u, p)| (u.to_owned(), p.to_owned()));
            pair.ok_or_else(|| format!("auths.\"{host}\".auth: not user:password in Base64"))
        });
        let (user, password) = decoded.transpose()?.or_else(|| auth.username.zip(auth.password)).unzip();
        let token = auth.registrytoken.map(Hidden::new).filter(|_| user.is_none());
        let access = Access { user, password: password.map(Hidden::new), token, ..Access::default() };
        all.registries.insert(host, access);
    }
    all.check()?;
    Ok(all)
}

/// What an operator's own machine knows of a registry: the file that was named; or `registries.toml` beside the operator's key
/// and, where that has no credentials for it, docker's.
///
/// # Errors
/// If one of them is there and cannot be read.
fn of_operator(host: &Host, named: Option<&Path>) -> anyhow::Result<Known> {
    if let Some(path) = named {
        return Known::of(&read(path)?);
    }
    let there = |path: PathBuf| path.exists().then(|| read(&path)).transpose();
    let own = Folder::from_environment()?.path("registries.toml");
    let mut known = Known::of(&there(own)?.unwrap_or_default())?;
    let has =
        |known: &Known| known.listed.get(host).is_some_and(|access| access.user.is_some() || access.token.is_some());
    if !has(&known) {
        let folder = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
        let folder = folder.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
        let docker = folder.map(|folder| there(folder.join("config.json"))).transpose()?.flatten();
        let docker = Known::of(&docker.unwrap_or_default())?;
        if let Some(found) = docker.listed.get(host) {
            let access = known.listed.entry(host.clone()).or_default();
            let Access { user, password, token, .. } = found.clone();
            *access = Access { user, password, token, ..access.clone() };
        }
    }
    Ok(known)
}

/// What a push to a registry has come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pushed {
    /// The name, its tag included.
    pub name: String,
    /// The digest that pins it: of the manifest there.
    pub manifest: String,
    /// The digest of the component.
    pub digest: String,
    /// Its bytes.
    pub bytes: u64,
}

/// Puts a component into a registry, as this operator. `told` hears how far it is, if it takes longer than a second.
///
/// # Errors
/// What went wrong, and what to do.
pub fn push(
    name: &Reference,
    component: Bytes,
    registries: Option<&Path>,
    mut told: impl FnMut(&str),
) -> anyhow::Result<Pushed> {
    let host = name.host().context("a name without a registry")?;
    let mut known = of_operator(host, registries)?;
    // Whoever types its name trusts it that far.
    known.listed.entry(host.clone()).or_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let registry = known.registry(host, Arc::new(System), |path| Ok(std::fs::read_to_string(path)?))?;
    let (digest, bytes) = (gaia_registry::Digest::of(&component).to_string(), component.len() as u64);
    let mut paced = Paced::new();
    let progress = |progress: Progress| {
        if let Some(words) = paced.words("pushing", name, progress) {
            told(&words);
        }
    };
    let manifest = runtime.block_on(registry.push(name, component, &BTreeMap::new(), progress))?;
    let name = if name.tag().is_some() { name.to_string() } else { format!("{name}:latest") };
    Ok(Pushed { name, manifest: manifest.to_string(), digest, bytes })
}

/// How far a push or a pull is, told now and then.
#[derive(Debug)]
pub(crate) struct Paced(Instant);

impl Paced {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    /// What is to be told, if it is time.
    pub(crate) fn words(&mut self, doing: &str, name: &Reference, progress: Progress) -> Option<String> {
        if self.0.elapsed() < TOLD_EVERY {
            return None;
        }
        self.0 = Instant::now();
        let mib = |bytes: u64| format!("{}.{}", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20);
        Some(format!("{doing} {name}: {} of {} MiB", mib(progress.done), mib(progress.total)))
    }
}

/// The names of this machine, as its own programs resolve them.
struct System;

impl Resolve for System {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, resolve::Error>> {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name, 0)).await.map_err(|_| resolve::Error::NotFound)?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn known(text: &str) -> Known {
        Known::of(&Registries::parse(text).unwrap()).unwrap()
    }

    fn host(text: &str) -> Host {
        Host::parse(text).unwrap()
    }

    #[test]
    fn a_manifest_may_name_what_is_listed_and_public_ones_if_the_operator_says_so() {
        let some = known(
            "[registry]\ndefault = \"a.example\"\n[registries.\"b.example:5000\"]\n[registries.\"10.0.2.2\"]\nplain_http = true\n",
        );
        assert_eq!(some.ports().into_iter().collect::<Vec<_>>(), [80, 443, 5000]);
        for (name, may) in [("a.example", true), ("b.example:5000", true), ("b.example", false), ("ghcr.io", false)] {
            assert_eq!(some.may(&host(name)), may, "{name}");
        }
        let any = known("registry.any = true\nregistries.\"b.example:5000\" = {}\n");
        assert_eq!(any.ports().into_iter().collect::<Vec<_>>(), [443, 5000]);
        for (name, may) in [("ghcr.io", true), ("ghcr.io:5000", false), ("b.example:5000", true)] {
            assert_eq!(any.may(&host(name)), may, "{name}");
        }
        assert!(known("").ports().is_empty(), "nothing is open to control");
        let plain = known("[registry]\ndefault = \"a.example\"\n[registries.\"a.example\"]\nplain_http = true\n");
        assert_eq!(plain.ports().into_iter().collect::<Vec<_>>(), [80]);
    }

    #[test]
    fn what_docker_login_wrote_is_read_and_what_it_does_not_tell_is_listed() {
        let text = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "b21lZ2E6aHVudGVyMjp4"}, "registry.example:5000": {},
            "t.example": {"registrytoken": "t"}, "user": {"auth": ""}, "p.example": {"username": "u", "password": "p"}}, "credsStore": "pass"}"#;
        let read = of_docker(text).unwrap();
        let shown: Vec<(&str, Option<&str>, Option<&str>)> = read
            .registries
            .iter()
            .map(|(host, a)| {
                (host.as_str(), a.user.as_deref(), a.password.as_ref().or(a.token.as_ref()).map(Hidden::reveal))
            })
            .collect();
        let wanted = [
            ("docker.io", Some("omega"), Some("hunter2:x")),
            ("p.example", Some("u"), Some("p")),
            ("registry.example:5000", None, None),
            ("t.example", None, Some("t")),
        ];
        assert_eq!(shown, wanted);
        for wrong in [r#"{"auths": {"a.example": {"auth": "S3CRET!"}}}"#, r#"{"auths": {"a.example": "S3CRET"}}"#, "{"]
        {
            let error = of_docker(wrong).unwrap_err();
            assert!(!error.contains("S3CRET"), "{error}");
        }
    }

    #[test]
    fn a_file_with_a_password_is_its_owners_alone_and_roots_are_beside_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("registries.toml");
        let written = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            read(&path)
        };
        let root = written("registries.\"a.example\".root = \"ca.pem\"\n", 0o644).unwrap();
        let root = root.registries.into_values().next().unwrap().root.unwrap();
        assert_eq!(Path::new(&root), folder.path().join("ca.pem"));
        let secret = "registries.\"a.example\" = { user = \"u\", password = \"S3CRET\" }\n";
        let error = written(secret, 0o640).unwrap_err().to_string();
        assert!(error.contains("chmod 600") && !error.contains("S3CRET"), "{error}");
        assert!(written(secret, 0o600).is_ok());
    }

    proptest! {
        #[test]
        fn no_docker_file_panics(text in "\\{\"auths\": \\{(\"\\PC{0,12}\": \\{\"auth\": \"[A-Za-z0-9+/=]{0,12}\"\\},?){0,3}\\}\\}") {
            let _ = of_docker(&text);
        }
    }
}
