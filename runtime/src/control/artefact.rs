//! Machine code that control vouches for: what its own compilers sent, bound to the component it was made from.
//!
//! Whoever maps an artefact runs it, so none leaves control that it has not vouched for or checked: an [`Artefact`] is made
//! in no other way. The generation's artefacts come back from init when control has been killed; the new control
//! takes over those that carry the mark of the key, and compiles the others anew.
//!
//! The key is 256 bits of chance in a sealed file in memory. The first control of a supervisor fills that file; init
//! keeps it open, never reads it, and hands it to control alone. Where there is a store, the key is a record of it, so that machine code
//! on the disk is vouched for as well; where there is none, it lives as long as init does.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use anyhow::Context as _;
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use rustix::fs::SealFlags;
use serde::{Deserialize, Serialize};

use crate::channel::{SEALED, is_sealed, read_whole};
use crate::compile::{MAX_ARTEFACT, MAX_REPORT, Report};

/// The name, among a generation's files, of the list of what is vouched for.
pub const ORIGINS: &str = "origins";
/// The longest such list, in bytes.
const MAX_ORIGINS: u64 = 8 << 20;
/// Bytes of the key: as many as HMAC-SHA256 has of strength.
const BYTES: usize = 32;

/// Machine code and what the compiler found out, both of them vouched for.
#[derive(Debug)]
pub struct Artefact {
    /// SHA-256 of the component, in hexadecimal.
    pub digest: String,
    /// What is reserved for each of its memories, in bytes.
    pub reservation: u64,
    /// What the compiler found out about it.
    pub report: Report,
    /// The code, in a sealed file.
    pub file: OwnedFd,
    mark: Vec<u8>,
}

impl Artefact {
    /// Its name among a generation's files.
    #[must_use]
    pub fn name(&self) -> String {
        name(&self.digest, self.reservation)
    }

    /// Another descriptor of the same.
    ///
    /// # Errors
    /// Too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let file = self.file.try_clone()?;
        let (digest, report, mark) = (self.digest.clone(), self.report.clone(), self.mark.clone());
        Ok(Self { digest, reservation: self.reservation, report, file, mark })
    }

    /// What is told of it beside the code, as [`Key::check_told`] reads it.
    ///
    /// # Errors
    /// None that is known of.
    pub fn told(&self) -> anyhow::Result<Vec<u8>> {
        Ok(serde_json::to_vec(&self.origin())?)
    }

    fn origin(&self) -> Origin {
        let (digest, report, mark) = (self.digest.clone(), self.report.clone(), self.mark.clone());
        Origin { digest, reservation: self.reservation, report, mark }
    }
}

/// The name, among a generation's files, of what was made from the component with this digest for such a reservation.
#[must_use]
pub fn name(digest: &str, reservation: u64) -> String {
    format!("artefact-{}-{}", digest.get(..32).unwrap_or(digest), reservation >> 20)
}

/// What is told of an artefact beside it.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    digest: String,
    reservation: u64,
    report: Report,
    mark: Vec<u8>,
}

/// The list of what is vouched for, as [`Key::check_all`] reads it.
///
/// # Errors
/// None that is known of: all of it can be written as JSON.
pub fn origins<'a>(artefacts: impl IntoIterator<Item = &'a Artefact>) -> anyhow::Result<Vec<u8>> {
    Ok(serde_json::to_vec(&artefacts.into_iter().map(Artefact::origin).collect::<Vec<_>>())?)
}

/// What only control holds.
pub struct Key(hmac::Key);

impl Key {
    /// Bytes of a key.
    pub const BYTES: usize = BYTES;

    /// A key of these bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; BYTES]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// The bytes of a new key.
    ///
    /// # Errors
    /// If there is no chance to be had.
    pub fn chance() -> anyhow::Result<[u8; BYTES]> {
        let mut bytes = [0; BYTES];
        SystemRandom::new().fill(&mut bytes).ok().context("there is no chance to be had")?;
        Ok(bytes)
    }

    /// Reads the key, or fills the file with what `make` says if this is the first control.
    ///
    /// # Errors
    /// If the file cannot be read or filled.
    pub fn of(file: OwnedFd, make: impl FnOnce() -> anyhow::Result<[u8; BYTES]>) -> anyhow::Result<Self> {
        let mut bytes = [0; BYTES];
        if is_sealed(&file) {
            File::from(file).read_exact_at(&mut bytes, 0).context("reading the key")?;
        } else {
            // Nothing was vouched for with what is not sealed yet.
            bytes = make()?;
            let mut file = File::from(file);
            file.rewind().and_then(|()| file.write_all(&bytes)).context("filling the key")?;
            rustix::fs::fcntl_add_seals(&file, SEALED).context("sealing the key")?;
        }
        Ok(Self::from_bytes(&bytes))
    }

    /// Vouches for what a compiler has just answered.
    ///
    /// # Errors
    /// If it could still change, is longer than [`MAX_ARTEFACT`], or cannot be read.
    pub fn vouch(&self, digest: &str, reservation: u64, report: Report, file: OwnedFd) -> anyhow::Result<Artefact> {
        let mark = self.context(digest, reservation, &report, &file)?.sign().as_ref().to_vec();
        Ok(Artefact { digest: digest.to_owned(), reservation, report, file, mark })
    }

    /// A word for these bytes, in hexadecimal: the same for the same, and it tells nobody else what they are. There may be
    /// secrets among them, and a plain digest of a short one could be tried out.
    #[must_use]
    pub fn word(&self, bytes: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(b"word");
        context.update(bytes);
        context.sign().as_ref().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
    }

    /// What only this key leads to: the seed of the device's key.
    #[must_use]
    pub fn seed(&self) -> [u8; 32] {
        let tag = hmac::sign(&self.0, b"seed of the device's key");
        let mut seed = [0; 32];
        seed.copy_from_slice(&tag.as_ref()[..32]);
        seed
    }

    /// What of a generation's files carries the mark of this key, and why others do not count.
    #[must_use]
    pub fn check_all(&self, files: Vec<(String, OwnedFd)>) -> (Vec<Artefact>, Vec<String>) {
        let (mut origins, mut artefacts) = (None, Vec::new());
        for (name, file) in files {
            if name == ORIGINS { origins = Some(file) } else { artefacts.push((name, file)) }
        }
        let origins = origins.context("no list of origins").and_then(|file| {
            let bytes = read_whole(file, MAX_ORIGINS)?;
            Ok(serde_json::from_slice::<Vec<Origin>>(&bytes)?)
        });
        let (mut good, mut wrong) = (Vec::new(), Vec::new());
        match origins {
            Err(e) => wrong.push(format!("{e:#}")),
            Ok(origins) => {
                for origin in origins {
                    let name = name(&origin.digest, origin.reservation);
                    let at = artefacts.iter().position(|(of, _)| *of == name);
                    let checked = at.context("is not there").and_then(|at| self.check(origin, artefacts.remove(at).1));
                    match checked {
                        Ok(artefact) => good.push(artefact),
                        Err(e) => wrong.push(format!("{name}: {e:#}")),
                    }
                }
            }
        }
        (good, wrong)
    }

    /// Checks code against what was told of it: [`Artefact::told`].
    ///
    /// # Errors
    /// If it is not what this key vouched for.
    pub fn check_told(&self, told: &[u8], file: OwnedFd) -> anyhow::Result<Artefact> {
        self.check(serde_json::from_slice(told)?, file)
    }

    fn check(&self, origin: Origin, file: OwnedFd) -> anyhow::Result<Artefact> {
        let Origin { digest, reservation, report, mark } = origin;
        let tag = self.context(&digest, reservation, &report, &file)?.sign();
        // Compared by their own marks, which takes the same time wherever they differ.
        let told = hmac::sign(&self.0, &mark);
        hmac::verify(&self.0, tag.as_ref(), told.as_ref()).ok().context("is not what was compiled here")?;
        Ok(Artefact { digest, reservation, report, file, mark })
    }

    /// All that a mark is of, each part with its length before it.
    fn context(
        &self,
        digest: &str,
        reservation: u64,
        report: &Report,
        file: &OwnedFd,
    ) -> anyhow::Result<hmac::Context> {
        anyhow::ensure!(is_sealed(file), "could still change");
        let size = rustix::fs::fstat(file)?.st_size.cast_unsigned();
        anyhow::ensure!(size <= MAX_ARTEFACT, "has {size} bytes, at most {MAX_ARTEFACT} are taken");
        let report = serde_json::to_vec(report)?;
        anyhow::ensure!(report.len() as u64 <= MAX_REPORT, "the report has {} bytes", report.len());
        let mut context = hmac::Context::with_key(&self.0);
        for part in [digest.as_bytes(), &reservation.to_le_bytes(), &report] {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        context.update(&size.to_le_bytes());
        let file = File::from(file.try_clone()?);
        let mut piece = vec![0; 1 << 18];
        let mut at = 0;
        while at < size {
            match file.read_at(&mut piece, at) {
                Ok(0) => anyhow::bail!("ends after {at} of {size} bytes"),
                Ok(n) => {
                    context.update(&piece[..n]);
                    at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(context)
    }
}

const _: () = assert!(SEALED.contains(SealFlags::WRITE));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::sealed;
    use rustix::fs::MemfdFlags;

    fn empty() -> OwnedFd {
        rustix::fs::memfd_create("key", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap()
    }

    fn report(export: &str) -> Report {
        Report { error: None, imports: Vec::new(), exports: vec![export.into()], needs: None, unlinked: None }
    }

    /// As the files of a generation come back.
    fn files(origins: &[u8], code: &[u8], digest: &str) -> Vec<(String, OwnedFd)> {
        vec![
            ("plan".into(), sealed("plan", b"{}").unwrap()),
            (ORIGINS.into(), sealed(ORIGINS, origins).unwrap()),
            (name(digest, 1 << 20), sealed("artefact", code).unwrap()),
        ]
    }

    const DIGEST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const CODE: &[u8] = b"machine code, or so";

    #[test]
    fn the_next_control_has_the_same_key_and_takes_over_what_it_vouches_for() {
        let file = empty();
        let first = Key::of(file.try_clone().unwrap(), Key::chance).unwrap();
        assert!(is_sealed(&file), "nobody can put another in its place");
        let vouched = first.vouch(DIGEST, 1 << 20, report("a"), sealed("artefact", CODE).unwrap()).unwrap();
        let next = Key::of(file, Key::chance).unwrap();
        let (good, wrong) = next.check_all(files(&origins([&vouched]).unwrap(), CODE, DIGEST));
        assert!(wrong.is_empty(), "{wrong:?}");
        assert_eq!((good[0].digest.as_str(), &good[0].report), (DIGEST, &report("a")));
        assert_eq!(read_whole(good[0].file.try_clone().unwrap(), 100).unwrap(), CODE);
    }

    #[test]
    fn a_control_that_ended_before_it_sealed_its_key_leaves_none() {
        let file = empty();
        File::from(file.try_clone().unwrap()).write_all(b"half").unwrap();
        let key = Key::of(file.try_clone().unwrap(), Key::chance).unwrap();
        let vouched = key.vouch(DIGEST, 1 << 20, report("a"), sealed("artefact", CODE).unwrap()).unwrap();
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size.cast_unsigned(), BYTES as u64);
        let next = Key::of(file, Key::chance).unwrap();
        assert_eq!(next.check_all(files(&origins([&vouched]).unwrap(), CODE, DIGEST)).0.len(), 1);
    }

    #[test]
    fn nothing_else_is_taken_over() {
        let key = Key::of(empty(), Key::chance).unwrap();
        let vouched = key.vouch(DIGEST, 1 << 20, report("a"), sealed("artefact", CODE).unwrap()).unwrap();
        let told = origins([&vouched]).unwrap();
        let text = String::from_utf8(told.clone()).unwrap();
        let other = DIGEST.replace('0', "f");
        for (what, key, told, code, digest) in [
            ("another key", &Key::of(empty(), Key::chance).unwrap(), told.clone(), CODE, DIGEST),
            ("other code", &key, told.clone(), b"machine code, or sO".as_slice(), DIGEST),
            ("longer code", &key, told.clone(), b"machine code, or so.", DIGEST),
            ("less code", &key, told.clone(), b"machine code, or s", DIGEST),
            ("another report", &key, text.replace(r#"["a"]"#, r#"["b"]"#).into_bytes(), CODE, DIGEST),
            ("another reservation", &key, text.replace(":1048576,", ":1048577,").into_bytes(), CODE, DIGEST),
            ("another component", &key, text.replace(DIGEST, &other).into_bytes(), CODE, &other),
            ("no code", &key, told.clone(), CODE, &other),
            ("no list", &key, b"[{".to_vec(), CODE, DIGEST),
        ] {
            let (good, wrong) = key.check_all(files(&told, code, digest));
            assert!(good.is_empty() && wrong.len() == 1, "{what}: {wrong:?}");
        }
    }

    #[test]
    fn what_could_still_change_is_not_vouched_for() {
        let key = Key::of(empty(), Key::chance).unwrap();
        let open = empty();
        assert!(
            key.vouch(DIGEST, 1 << 20, report("a"), open).err().unwrap().to_string().contains("could still change")
        );
    }
}
