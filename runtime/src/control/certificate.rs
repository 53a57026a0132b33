//! The certificate that requests come in with, and its key: control reads both, checks that they can be served with, and
//! hands them to each worker in sealed files. It looks at the files for ever, so that a renewed certificate needs no restart;
//! what is wrong with a new one is said, and the old one stays.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags};

use super::stamp::Stamp;
use super::{Control, Worker};
use crate::channel::{read_whole, sealed};
use crate::worker::conversation::Word;
use crate::worker::tls;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where they are.
pub(super) struct Files {
    folder: OwnedFd,
    certificate: String,
    key: String,
    /// They are in the seed of the appliance, which is flat and nobody else's.
    seed: bool,
}

/// A certificate and its key that belong together, each in a sealed file.
pub(super) struct Pair {
    certificate: OwnedFd,
    key: OwnedFd,
    fingerprint: String,
}

impl Files {
    /// As the supervisor names them; nothing if it does not.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub(super) fn from_environment(folder: &OwnedFd) -> std::io::Result<Option<Self>> {
        let (Ok(certificate), Ok(key)) = (std::env::var("GAIA_CERTIFICATE"), std::env::var("GAIA_KEY")) else {
            return Ok(None);
        };
        let seed = std::env::var_os("GAIA_GRAPH").is_none();
        Ok(Some(Self { folder: folder.try_clone()?, certificate, key, seed }))
    }

    fn open(&self, path: &str) -> std::io::Result<OwnedFd> {
        let follow = if self.seed { OFlags::NOFOLLOW } else { OFlags::empty() };
        Ok(rustix::fs::openat(&self.folder, path, OFlags::RDONLY | OFlags::CLOEXEC | follow, Mode::empty())?)
    }

    /// Both, if they can be served with.
    fn read(&self) -> anyhow::Result<Pair> {
        let Self { certificate: of_certificate, key: of_key, .. } = self;
        let certificate = self.open(of_certificate).and_then(|file| read_whole(file, tls::MAX_BYTES));
        let certificate = certificate.with_context(|| format!("reading the certificate {of_certificate}"))?;
        let key = self.open(of_key).with_context(|| format!("reading the key {of_key}"))?;
        let others = rustix::fs::fstat(&key)?.st_mode & 0o077;
        let private = self.seed || others == 0;
        anyhow::ensure!(private, "others than its owner may use the key {of_key}: chmod 600 {of_key}");
        let key = read_whole(key, tls::MAX_BYTES).with_context(|| format!("reading the key {of_key}"))?;
        tls::config(&certificate, &key).map_err(|e| match e {
            tls::Error::AnotherKey => {
                anyhow::anyhow!("the key {of_key} is not that of the certificate {of_certificate}")
            }
            e if e.is_of_the_key() => anyhow::anyhow!("the key {of_key}: {e}"),
            e => anyhow::anyhow!("the certificate {of_certificate}: {e}"),
        })?;
        let fingerprint = tls::fingerprint(&certificate)?;
        Ok(Pair { certificate: sealed("certificate", &certificate)?, key: sealed("key", &key)?, fingerprint })
    }

    /// What both are like.
    fn stamps(&self) -> [Option<Stamp>; 2] {
        [&self.certificate, &self.key].map(|path| Stamp::of(&self.folder, path))
    }
}

/// Reads the files for the first time, and from then on whenever they change.
///
/// # Errors
/// If what is there at first cannot be served with; it is looked at nevertheless.
pub(super) async fn keep(control: &Rc<Control>, files: Files) -> anyhow::Result<()> {
    let mut seen = files.stamps();
    let first = take(control, &files).await;
    let control = Rc::clone(control);
    tokio::task::spawn_local(async move {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = files.stamps();
            // Both are written one after the other: what is different from look to look is not done yet.
            if now == seen || files_move(&files, now).await {
                continue;
            }
            seen = now;
            if let Err(e) = take(&control, &files).await {
                let words = format!("{e:#}; the certificate stays as it was");
                control.say(&words).await;
                control.words.borrow_mut().push(words);
            }
        }
    });
    first
}

/// Whether they change within a moment.
async fn files_move(files: &Files, now: [Option<Stamp>; 2]) -> bool {
    tokio::time::sleep(LOOK_EVERY / 4).await;
    files.stamps() != now
}

/// Reads, checks and hands them to all workers there are.
async fn take(control: &Control, files: &Files) -> anyhow::Result<()> {
    let pair = Rc::new(files.read()?);
    *control.certificate.borrow_mut() = Some(Rc::clone(&pair));
    // A keeper speaks to no client.
    let speaks = |worker: &&Rc<Worker>| worker.runs.core().is_some();
    let workers: Vec<Rc<Worker>> = control.workers.borrow().iter().filter(speaks).map(Rc::clone).collect();
    for worker in workers {
        pair.give(&worker).await;
    }
    control.say(&format!("certificate {}: served from now on, SHA-256 {}", files.certificate, pair.fingerprint)).await;
    Ok(())
}

impl Pair {
    /// Hands them to a worker. One that is gone is noticed by whoever listens to it.
    pub(super) async fn give(&self, worker: &Worker) {
        let _ = worker.channel.send(&Word::Certificate, &[self.certificate.as_fd(), self.key.as_fd()]).await;
    }
}
