//! `[registry]` and `[registries]` of `gaia.toml`: from which registries components may come, and as whom they are asked for.
//!
//! The supervisor reads them, and control uses them: they go there as the same two tables, in a sealed file in memory, because
//! there are passwords among them. A password is on no command line and in no environment, and nothing here prints one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};
use serde::Deserialize;

/// The most registries: each may be a TCP port that control may connect to.
pub const MAX_REGISTRIES: usize = 32;
/// The longest text of them that is read, in bytes.
pub const MAX_BYTES: u64 = crate::settings::MAX_BYTES;
/// The longest user, password or token, in bytes: tokens of the services in use have up to 4 KiB.
const MAX_CREDENTIAL: usize = 8 * 1024;

/// `[registry]`: which registries a manifest may name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Where a name without a registry is looked for after the store.
    pub default: Option<Host>,
    /// Whether a manifest may name public registries that are not listed, on port 443.
    pub any: bool,
}

/// A table of `[registries]`: how one registry is spoken to. It may be empty; then the registry is known, and no more.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// Who asks.
    pub user: Option<String>,
    /// With what; what registries call an access token stands here, too.
    pub password: Option<Hidden>,
    /// A bearer token, in place of user and password.
    pub token: Option<Hidden>,
    /// The file with certificates, in PEM, of an authority that is trusted for this registry besides the usual ones.
    pub root: Option<String>,
    /// It is spoken to without TLS, credentials included.
    pub plain_http: bool,
}

/// Text that is not printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Hidden(String);

impl Hidden {
    /// Not to be printed.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for whom it is meant for.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A registry as it is written: `registry.example`, `localhost:5000`, `[::1]:5000`. Compared without its case, and `:443` is the
/// same as none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Host(String);

impl Host {
    /// As it is written, in lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Host {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || {
            let shown: String = text.chars().take(64).collect();
            format!(
                "{shown:?} is no registry: a host with a dot, or with a port, as in \"registry.example\" or \"registry.example:5000\""
            )
        };
        let lower = text.to_ascii_lowercase();
        let (host, port) = match lower.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or_else(wrong)?;
                address.parse::<Ipv6Addr>().map_err(|_| wrong())?;
                (
                    lower.get(..address.len() + 2).unwrap_or_default(),
                    port.strip_prefix(':').or((!port.is_empty()).then_some("?")),
                )
            }
            None => match lower.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (lower.as_str(), None),
            },
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let named = host.starts_with('[') || (host.len() <= 253 && host.split('.').all(label));
        let numbered = port.is_none_or(|port| {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        // What would be a part of a name in the store is no registry.
        let is_registry = host.contains(['.', '[']) || port.is_some() || host == "localhost";
        if !(named && numbered && is_registry) {
            return Err(wrong());
        }
        let bare = port == Some("443") && host.contains('.');
        Ok(Self(if bare { host.to_owned() } else { lower }))
    }
}

/// Both tables.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registries {
    /// `[registry]`
    pub registry: Registry,
    /// `[registries]`
    pub registries: BTreeMap<Host, Access>,
}

impl Registries {
    /// Reads the two tables where they stand alone.
    ///
    /// # Errors
    /// What is wrong, with line and column; a line with a password in it is not shown.
    ///
    /// ```
    /// use gaia_init::registries::Registries;
    /// let text = "[registry]\ndefault = \"registry.example\"\n\n[registries.\"registry.example\"]\nuser = \"omega\"\npassword = \"hunter2\"\n";
    /// let known = Registries::parse(text).unwrap();
    /// assert!(!format!("{known:?}").contains("hunter2"));
    /// assert_eq!(Registries::parse(&known.text()).unwrap(), known);
    /// ```
    pub fn parse(text: &str) -> Result<Self, String> {
        let read: Self = toml::from_str(text).map_err(|e| shown(&e))?;
        read.check()?;
        Ok(read)
    }

    /// What is wrong with them together.
    ///
    /// # Errors
    /// The key, and what to write.
    pub fn check(&self) -> Result<(), String> {
        if self.registries.len() > MAX_REGISTRIES {
            return Err(format!("registries: at most {MAX_REGISTRIES}"));
        }
        for (host, access) in &self.registries {
            let Access { user, password, token, root, plain_http } = access;
            let said = match (user, password, token) {
                (Some(_), None, _) => "user: the password is missing",
                (None, Some(_), _) => "password: the user is missing; where only the password counts, any",
                (Some(_), Some(_), Some(_)) => "token: it takes the place of user and password, so one of both",
                _ if *plain_http && root.is_some() => "root: without TLS nothing is signed, so plain_http or root",
                _ if user.as_ref().is_some_and(|user| user.contains(':')) => "user: a colon ends a user",
                _ => "",
            };
            if !said.is_empty() {
                return Err(format!("registries.\"{host}\".{said}"));
            }
            let secret = |key, of: &Option<Hidden>| of.as_ref().map(|hidden| (key, hidden.0.clone()));
            let all = [user.clone().map(|user| ("user", user)), secret("password", password), secret("token", token)];
            for (key, text) in all.into_iter().flatten() {
                if text.is_empty() || text.len() > MAX_CREDENTIAL || text.contains(char::is_control) {
                    return Err(format!(
                        "registries.\"{host}\".{key}: 1 to {MAX_CREDENTIAL} bytes, without line ends and the like"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether nothing is said, so that no registry is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether there is something in them that others should not read.
    #[must_use]
    pub fn has_secrets(&self) -> bool {
        self.registries.values().any(|access| access.password.is_some() || access.token.is_some())
    }

    /// The same, to be read again by [`Registries::parse`].
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |key: &str, value: Option<&str>| {
            if let Some(value) = value {
                let _ = writeln!(out, "{key} = {}", quoted(value));
            }
        };
        line("registry.default", self.registry.default.as_ref().map(Host::as_str));
        for (host, access) in &self.registries {
            let mut line = |key: &str, value: Option<&str>| line(&format!("registries.\"{host}\".{key}"), value);
            line("user", access.user.as_deref());
            line("password", access.password.as_ref().map(Hidden::reveal));
            line("token", access.token.as_ref().map(Hidden::reveal));
            line("root", access.root.as_deref());
        }
        let _ = writeln!(out, "registry.any = {}", self.registry.any);
        for (host, access) in &self.registries {
            let _ = writeln!(out, "registries.\"{host}\".plain_http = {}", access.plain_http);
        }
        out
    }

    /// The same in a file in memory that nobody can change.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn sealed(&self) -> io::Result<OwnedFd> {
        let file = rustix::fs::memfd_create("registries", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut file = std::fs::File::from(file);
        io::Write::write_all(&mut file, self.text().as_bytes())?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(file.into())
    }

    /// The names of the registries, for the boot report.
    #[must_use]
    pub fn names(&self) -> BTreeSet<&Host> {
        self.registries.keys().chain(&self.registry.default).collect()
    }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\U{:08X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// An error of TOML as the console shows it, but for secrets: of a line that has one, what follows the key is left out.
pub(crate) fn shown(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let mut hidden = false;
    let mut hide = |line: &str| {
        // Lines of the file stand behind a number and a bar; a mark below one says nothing.
        let source = line.split_once(" | ").filter(|(number, _)| number.trim().bytes().all(|b| b.is_ascii_digit()));
        let secret =
            source.and_then(|(_, source)| ["password", "token"].into_iter().filter_map(|key| source.find(key)).min());
        match (source, secret) {
            (Some((number, source)), Some(at)) => {
                hidden = true;
                format!("{number} | {}…", source.get(..at + 5).unwrap_or_default())
            }
            // What it is instead would be said, too.
            _ if hidden && line.starts_with("invalid") => "invalid: it is text in quotes".to_owned(),
            _ => line.to_owned(),
        }
    };
    text.trim_end().lines().map(&mut hide).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_tables_whole() {
        let all = Registries::parse(
            "[registry]\ndefault = \"Registry.Example:443\"\nany = true\n[registries.\"registry.example\"]\nuser = \"omega\"\n\
             password = \"hunter2\"\nroot = \"ca.pem\"\n[registries.\"10.0.2.2:5000\"]\nplain_http = true\n\
             [registries.localhost]\ntoken = \"t\"\n[registries.\"[::1]:5000\"]\n",
        );
        let all = all.unwrap();
        assert_eq!((all.registry.default.as_ref().unwrap().as_str(), all.registry.any), ("registry.example", true));
        let names: Vec<&str> = all.names().into_iter().map(Host::as_str).collect();
        assert_eq!(names, ["10.0.2.2:5000", "[::1]:5000", "localhost", "registry.example"]);
        let first = &all.registries[&Host("registry.example".into())];
        assert_eq!((first.password.as_ref().unwrap().reveal(), first.root.as_deref()), ("hunter2", Some("ca.pem")));
        assert!(all.has_secrets() && !all.is_empty() && Registries::default().is_empty());
        let file = all.sealed().unwrap();
        assert!(rustix::io::write(&file, b"x").is_err(), "nobody changes it");
    }

    #[test]
    fn what_is_wrong_is_named_and_no_secret_is_shown() {
        for (text, wanted) in [
            ("[registry]\ndefault = \"registry\"", "no registry"),
            ("[registry]\ndefault = \"registry.example/omega\"", "no registry"),
            ("[registry]\ndefault = \"https://registry.example\"", "no registry"),
            ("[registry]\ndefault = \"registry.example:0\"", "no registry"),
            ("[registry]\ndefault = \"registry.example:+80\"", "no registry"),
            ("[registry]\ndefault = \"[::1]5000\"", "no registry"),
            ("[registry]\ndefault = \"[registry]:5000\"", "no registry"),
            ("[registry]\nal = true", "line 2, column 1"),
            ("[registries.a]", "no registry"),
            ("[registries.\"a.example\"]\nuser = \"omega\"", "password is missing"),
            ("[registries.\"a.example\"]\npassword = \"S3CRET\"", "user is missing"),
            ("[registries.\"a.example\"]\nuser = \"o\"\npassword = \"S3CRET\"\ntoken = \"S3CRET\"", "one of both"),
            ("[registries.\"a.example\"]\nuser = \"a:b\"\npassword = \"S3CRET\"", "a colon"),
            ("[registries.\"a.example\"]\ntoken = \"\"", "1 to 8192"),
            ("[registries.\"a.example\"]\ntoken = \"S3CRET\\n\"", "without line ends"),
            ("[registries.\"a.example\"]\nplain_http = true\nroot = \"a.pem\"", "without TLS"),
            ("[registries.\"a.example\"]\npassword = \"S3CRET\" x", "line 2"),
            ("[registries.\"a.example\"]\npassword = \"S3CRET", "line 2"),
            ("[registries.\"a.example\"]\ntoken = [\"S3CRET\"]", "line 2"),
            ("[registries.\"a.example\"]\npassword = 0x53C12E7", "in quotes"),
            ("[registries]\n\"a.example\" = { user = \"o\", password = \"S3CRET\", x = 1 }", "line 2"),
            ("[registries.\"a.example\"]\ntoken = \"S3CRET\"\ntoken = \"S3CRET\"", "line 3"),
        ] {
            let error = Registries::parse(text).unwrap_err();
            assert!(error.contains(wanted), "{text:?} gave {error:?}, which lacks {wanted:?}");
            assert!(!error.contains("S3CRET") && !error.contains("87823079"), "{text:?} gave {error:?}");
        }
        let many: Vec<String> = (0..=MAX_REGISTRIES).map(|n| format!("[registries.\"r{n}.example\"]\n")).collect();
        assert!(Registries::parse(&many.concat()).unwrap_err().contains("at most 32"));
    }

    proptest! {
        #[test]
        fn what_is_handed_on_is_read_as_it_was(
            any: bool,
            default in proptest::option::of("[a-z]{1,8}\\.[a-z]{1,8}(:[1-9][0-9]{0,3})?"),
            user in "\\P{Cc}{1,20}",
            password in "\\P{Cc}{1,40}",
            root in proptest::option::of("\\PC{1,20}"),
        ) {
            prop_assume!(!user.contains(':'));
            let host = |text: String| Host::try_from(text).unwrap();
            let known = Access { user: Some(user), password: Some(Hidden::new(password)), root, ..Access::default() };
            let plain = Access { plain_http: true, token: Some(Hidden::new("t")), ..Access::default() };
            let registries = [("a.example".to_owned(), known), ("b:5000".to_owned(), plain), ("c.example".to_owned(), Access::default())];
            let all = Registries {
                registry: Registry { default: default.map(host), any },
                registries: registries.map(|(name, access)| (host(name), access)).into(),
            };
            prop_assert_eq!(Registries::parse(&all.text()), Ok(all));
        }

        #[test]
        fn no_text_panics(text in "(\\[registr(y|ies\\.\"[a-z.:0-9\\[\\]]{0,9}\")\\]\n|(default|any|user|password|token) = \"?\\PC{0,9}\"?\n){0,6}") {
            let _ = Registries::parse(&text);
        }
    }
}
