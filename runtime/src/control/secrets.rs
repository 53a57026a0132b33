//! Values of secrets: sealed in the store, set, listed and removed by operators, given to whatever names them.
//!
//! ```text
//! record secret-…   {"version":1,"brane":"fetch","name":"API_KEY","by":"ann …","at_ns":…}\n   nonce (12)   value, sealed   tag (16)
//!                   └────────────────────── in clear, and part of what is sealed ──────────────────────┘
//! key               HKDF-SHA256 (RFC 5869) of the seed of the device's key; ChaCha20-Poly1305 (RFC 8439), a nonce by chance
//! ```
//!
//! Brane and name are part of what is sealed, so a record that was moved to where another belongs does not open. One that does not
//! is named and moved into quarantine, and the others are as they were.
//!
//! Setting or removing what the serving graph uses starts the same graph as a new generation, as a deploy does: the workers
//! that have the old value finish what is inside.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use gaia_manifest::Capability;
use gaia_store::{Digest, Store};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::{aead, hkdf};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::api::{Answer, failed, json};
use super::caller::Caller;
use super::delivery::{self, NO_STORE, Tell, Unchanged, agree, millis};
use super::deploy::{self, Planned};
use super::report::{RemoveSecret, SecretChanged, SecretEntry, SecretState, Secrets as Listed, SetSecret, Step};
use super::{Control, change};
use crate::plan::Plan;
use crate::secrets::{MAX_OF_BRANE, MAX_SECRETS, MAX_VALUE, Secret, Secrets};

/// How the records of secrets begin.
const PREFIX: &str = "secret-";
/// The form that is written and read.
const VERSION: u32 = 1;
/// The longest head of a record, in bytes: a brane's name has 48, a secret's 255, an operator's with his address about 90.
const MAX_HEAD: usize = 2048;
/// The longest request: a value each byte of which JSON writes in six, and names.
const MAX_REQUEST: usize = 6 * MAX_VALUE + 4096;
/// Before the head, in what is sealed with a value: whatever else the key may be used for one day is something else.
const CONTEXT: &[u8] = b"gaia secret\n";

/// What stands before a value, in clear.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u32,
    brane: String,
    name: String,
    by: String,
    at_ns: u64,
}

/// Why a record is not what it should be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Damage {
    #[error("a secret that cannot be read: {0}")]
    Head(String),
    #[error("the secret {name} of {brane} is in the place of another")]
    Moved { brane: String, name: String },
    #[error(
        "the secret {name} of {brane} does not open: it was changed, or sealed by another device; gaia secret set {brane} {name}"
    )]
    Seal { brane: String, name: String },
}

/// The record of a brane's secret.
fn record_of(brane: &str, name: &str) -> String {
    let digest = Digest::of(format!("{brane}\n{name}").as_bytes()).hex();
    format!("{PREFIX}{}", digest.get(..40).unwrap_or(&digest))
}

/// What seals and opens.
struct Safe(aead::LessSafeKey);

impl Safe {
    fn of(seed: &[u8; 32]) -> anyhow::Result<Self> {
        let extracted = hkdf::Salt::new(hkdf::HKDF_SHA256, b"gaia").extract(seed);
        let expanded = extracted.expand(&[b"secrets at rest, 1"], &aead::CHACHA20_POLY1305);
        let key = expanded.ok().context("a key of this length is not derived")?;
        Ok(Self(aead::LessSafeKey::new(key.into())))
    }

    fn seal(&self, head: &Head, value: &Secret) -> anyhow::Result<Vec<u8>> {
        let mut record = serde_json::to_vec(head)?;
        anyhow::ensure!(record.len() < MAX_HEAD, "its names are too long");
        record.push(b'\n');
        let mut nonce = [0; aead::NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok().context("there is no chance to be had")?;
        // As long as it will be: a buffer that grows leaves what it held behind.
        let mut sealed = Zeroizing::new(Vec::with_capacity(value.reveal().len() + aead::MAX_TAG_LEN));
        sealed.extend_from_slice(value.reveal().as_bytes());
        let with = aead::Aad::from([CONTEXT, &record].concat());
        let done = self.0.seal_in_place_append_tag(aead::Nonce::assume_unique_for_key(nonce), with, &mut *sealed);
        done.ok().context("it could not be sealed")?;
        record.extend_from_slice(&nonce);
        record.extend_from_slice(&sealed);
        Ok(record)
    }

    fn open(&self, place: &str, record: &[u8]) -> Result<(Head, Secret), Damage> {
        let end = record.iter().take(MAX_HEAD).position(|b| *b == b'\n');
        let (clear, sealed) =
            end.and_then(|end| record.split_at_checked(end + 1)).ok_or(Damage::Head("no head".into()))?;
        let head: Head = serde_json::from_slice(clear).map_err(|e| Damage::Head(e.to_string()))?;
        let Head { brane, name, .. } = &head;
        if head.version != VERSION {
            return Err(Damage::Head(format!("it has form {}, and this version knows {VERSION}", head.version)));
        }
        if record_of(brane, name) != place {
            return Err(Damage::Moved { brane: brane.clone(), name: name.clone() });
        }
        let opened = sealed.split_first_chunk().and_then(|(nonce, sealed)| {
            let mut sealed = Zeroizing::new(sealed.to_vec());
            let with = aead::Aad::from([CONTEXT, clear].concat());
            let value = self.0.open_in_place(aead::Nonce::assume_unique_for_key(*nonce), with, &mut sealed).ok()?;
            Secret::of_bytes(value)
        });
        match opened {
            Some(value) => Ok((head, value)),
            None => Err(Damage::Seal { brane: head.brane, name: head.name }),
        }
    }

    /// All that open, in the order of their branes and names, with the values of those that are wanted; what does not is set
    /// aside, and said why.
    fn open_all(
        &self,
        store: &Store,
        wanted: impl Fn(&str, &str) -> bool,
    ) -> Result<(Vec<Known>, Vec<String>), gaia_store::Error> {
        let (mut all, mut wrong) = (Vec::new(), Vec::new());
        for place in store.records(PREFIX) {
            // One that is lost is among the store's findings.
            let Some(record) = store.record(&place)? else { continue };
            match self.open(&place, &record) {
                Ok((head, value)) => {
                    let value = wanted(&head.brane, &head.name).then_some(value);
                    all.push((head, value));
                }
                Err(damage) => {
                    store.set_record_aside(&place, "it does not open")?;
                    wrong.push(damage.to_string());
                }
            }
        }
        all.sort_by(|(a, _), (b, _)| (&a.brane, &a.name).cmp(&(&b.brane, &b.name)));
        Ok((all, wrong))
    }
}

/// What opens, with its value if that is wanted.
type Known = (Head, Option<Secret>);

type Named = BTreeSet<(String, String)>;

/// All secrets that the branes of a plan name.
fn named(plan: &Plan) -> Named {
    let of =
        |grant: &Capability| if let Capability::Env { secrets, .. } = grant { secrets.clone() } else { Vec::new() };
    let all = plan.branes.iter().flat_map(|b| b.grants.iter().flat_map(of).map(|name| (b.name.clone(), name)));
    all.collect()
}

/// Opens what is in the store, and says on the console what does not.
async fn opened(control: &Control, wanted: impl Fn(&str, &str) -> bool + Send + 'static) -> anyhow::Result<Vec<Known>> {
    let Some(vault) = &control.vault else { return Ok(Vec::new()) };
    let safe = Safe::of(control.device.seed())?;
    let (all, wrong) = vault.with(move |store| safe.open_all(store, wanted)).await?;
    for words in wrong {
        control.note(&words);
        control.say(&words).await;
        control.words.borrow_mut().push(words);
    }
    control.say_findings().await;
    Ok(all)
}

/// The values of these: those of the file, and those of the store under other names.
///
/// # Errors
/// What is wrong with the file, or the disk.
pub(super) async fn values(control: &Control, wanted: Named) -> anyhow::Result<Secrets> {
    let source = control.source.as_ref();
    let mut secrets = source.map(deploy::Source::secrets).transpose()?.unwrap_or_default();
    let is_wanted = move |brane: &str, name: &str| wanted.contains(&(brane.to_owned(), name.to_owned()));
    for (head, value) in opened(control, is_wanted).await? {
        if let Some(value) = value {
            secrets.fill(&head.brane, &head.name, value);
        }
    }
    Ok(secrets)
}

/// `GET /v1/secrets?brane=NAME`
pub(super) async fn list(control: &Control, query: &str) -> Answer {
    if control.vault.is_none() {
        return failed(StatusCode::CONFLICT, NO_STORE);
    }
    let brane = match query.split_once('=') {
        None if query.is_empty() => None,
        Some(("brane", name)) => Some(name.to_owned()),
        _ => return failed(StatusCode::BAD_REQUEST, &format!("{query:?}: brane=NAME is known")),
    };
    let known = match opened(control, |_, _| false).await {
        Ok(known) => known,
        Err(e) => return failed(StatusCode::SERVICE_UNAVAILABLE, &format!("{e:#}")),
    };
    let file = control.source.as_ref().and_then(|source| source.secrets().ok()).unwrap_or_default();
    let mut unset = control.plan.borrow().as_deref().map(named).unwrap_or_default();
    let mut secrets = Vec::new();
    for (head, _) in known {
        let used = unset.remove(&(head.brane.clone(), head.name.clone()));
        let state = if file.of(&head.brane, &head.name).is_some() { SecretState::OfFile } else { SecretState::Set };
        let Head { brane, name, by, at_ns, .. } = head;
        secrets.push(SecretEntry { brane, name, by: Some(by), at_ns: Some(at_ns), used, state });
    }
    secrets.extend(unset.into_iter().map(|(brane, name)| {
        let state = if file.of(&brane, &name).is_some() { SecretState::OfFile } else { SecretState::Unset };
        SecretEntry { brane, name, by: None, at_ns: None, used: true, state }
    }));
    secrets.retain(|entry| brane.as_ref().is_none_or(|brane| *brane == entry.brane));
    secrets.sort_by(|a, b| (&a.brane, &a.name).cmp(&(&b.brane, &b.name)));
    json(StatusCode::OK, &Listed { secrets })
}

/// `POST /v1/secrets`
pub(super) async fn set(control: Rc<Control>, caller: Rc<Caller>, request: Request<Incoming>) -> Answer {
    // What is wrong with a value is never shown with it.
    let SetSecret { brane, name, value, ends_states } = match delivery::read(request, MAX_REQUEST, false).await {
        Ok(asked) => asked,
        Err(answer) => return *answer,
    };
    if let Err(why) = checked(&brane, &name).and_then(|()| value.check()) {
        return failed(StatusCode::BAD_REQUEST, &why);
    }
    let change = format!("secret set {brane} {name}");
    delivery::told(Rc::clone(&control), caller, change, async move |caller: &Caller, tell: &Tell| {
        let wanted = Wanted { brane, name, value: Some(value), force: false, ends_states };
        changed(&control, caller, wanted, tell).await
    })
}

/// `POST /v1/secrets/remove`
pub(super) async fn remove(control: Rc<Control>, caller: Rc<Caller>, request: Request<Incoming>) -> Answer {
    let RemoveSecret { brane, name, force, ends_states } = match delivery::read(request, MAX_REQUEST, true).await {
        Ok(asked) => asked,
        Err(answer) => return *answer,
    };
    if let Err(why) = checked(&brane, &name) {
        return failed(StatusCode::BAD_REQUEST, &why);
    }
    let change = format!("secret rm {brane} {name}");
    delivery::told(Rc::clone(&control), caller, change, async move |caller: &Caller, tell: &Tell| {
        changed(&control, caller, Wanted { brane, name, value: None, force, ends_states }, tell).await
    })
}

fn checked(brane: &str, name: &str) -> Result<(), String> {
    gaia_manifest::brane_name(brane).map_err(|why| format!("a brane's name has {why}"))?;
    gaia_manifest::variable(name).map(drop).map_err(|why| format!("a secret's name has {why}"))
}

/// What is to become of a secret.
struct Wanted {
    brane: String,
    name: String,
    /// None: it is to be gone.
    value: Option<Secret>,
    /// Even if what serves uses it.
    force: bool,
    ends_states: bool,
}

async fn changed(control: &Rc<Control>, caller: &Caller, wanted: Wanted, tell: &Tell) -> anyhow::Result<Step> {
    let began = Instant::now();
    let Wanted { brane, name, value, force, ends_states } = wanted;
    let vault = control.vault.as_ref().context(NO_STORE)?;
    let _changing = control.changing.try_lock().map_err(|_| Unchanged::busy())?;
    let place = record_of(&brane, &name);
    let of = place.clone();
    let before = vault.with(move |store| store.record(&of)).await?;
    if value.is_none() {
        anyhow::ensure!(before.is_some(), "there is no secret {name} of {brane}; what there is: gaia secret list");
        let used = control.plan.borrow().as_deref().is_some_and(|p| named(p).contains(&(brane.clone(), name.clone())));
        anyhow::ensure!(
            force || !used,
            "the graph that serves gives it to {brane}, which would go on without: gaia secret rm --force {brane} {name}"
        );
    } else if before.is_none() {
        let all = opened(control, |_, _| false).await?;
        let of_brane = all.iter().filter(|(head, _)| head.brane == brane).count();
        anyhow::ensure!(of_brane < MAX_OF_BRANE, "{brane} has {MAX_OF_BRANE} secrets already: gaia secret rm");
        anyhow::ensure!(all.len() < MAX_SECRETS, "there are {MAX_SECRETS} secrets already: gaia secret rm");
    }
    // What would serve, before anything is written.
    let next = next(control, &brane, &name, value.as_ref()).await?;
    if let Next::Generation(planned) = &next {
        let serving = control.plan.borrow().clone();
        agree(&change::between(serving.as_deref(), &planned.plan), ends_states)?;
    }
    let record = match &value {
        None => None,
        Some(value) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(Duration::ZERO, |now| now);
            let at_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            let head =
                Head { version: VERSION, brane: brane.clone(), name: name.clone(), by: caller.to_string(), at_ns };
            Some(Safe::of(control.device.seed())?.seal(&head, value)?)
        }
    };
    put(control, &place, record).await?;
    let replaced = before.is_some();
    let mut done =
        SecretChanged { brane, name, removed: value.is_none(), replaced, generation: None, of_file: false, millis: 0 };
    match next {
        Next::Nothing => {}
        Next::OfFile => done.of_file = true,
        Next::Generation(planned) => {
            let started = async {
                delivery::room(control, tell).await?;
                tell.doing("starting workers that are given it");
                deploy::start(control, *planned).await
            };
            if let Err(e) = started.await {
                // Nothing serves with it, so nothing is to find it when it starts again.
                put(control, &place, before).await.context("it is kept, although it could not be given to anybody")?;
                return Err(e.context("nothing is changed"));
            }
            done.generation = control.plan.borrow().as_ref().map(|plan| plan.generation);
            if let (Some(trial), Some(generation)) = (control.trial.borrow_mut().as_mut(), done.generation) {
                trial.goes_on_as(generation);
            }
        }
    }
    done.millis = millis(began);
    Ok(Step::Secret(done))
}

async fn put(control: &Control, place: &str, record: Option<Vec<u8>>) -> anyhow::Result<()> {
    let place = place.to_owned();
    let vault = control.vault.as_ref().context(NO_STORE)?;
    vault
        .with(move |store| match record {
            Some(record) => store.set_record(&place, &record),
            None => store.remove_record(&place).map(drop),
        })
        .await
}

/// What a change means for what serves.
enum Next {
    /// Nothing: no brane names it, or it is the value that it has.
    Nothing,
    /// Nothing, because a file says what the value is.
    OfFile,
    /// The same graph with other values.
    Generation(Box<Planned>),
}

async fn next(control: &Control, brane: &str, name: &str, value: Option<&Secret>) -> anyhow::Result<Next> {
    let Some(serving) = control.plan.borrow().clone() else { return Ok(Next::Nothing) };
    let mut wanted = named(&serving);
    // It is as wanted, not as it is in the store.
    if !wanted.remove(&(brane.to_owned(), name.to_owned())) {
        return Ok(Next::Nothing);
    }
    let mut values = values(control, wanted).await?;
    if values.of(brane, name).is_some() {
        return Ok(Next::OfFile);
    }
    if let Some(value) = value {
        values.fill(brane, name, value.clone());
    }
    let planned = deploy::with_secrets(control, &serving, &values).await?;
    Ok(if planned.changes_nothing(control) { Next::Nothing } else { Next::Generation(Box::new(planned)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(text: &str) -> Secret {
        Secret::of_bytes(text.as_bytes()).unwrap()
    }

    fn head(brane: &str, name: &str) -> Head {
        Head { version: VERSION, brane: brane.into(), name: name.into(), by: "ann".into(), at_ns: 7 }
    }

    fn safe() -> Safe {
        Safe::of(&[7; 32]).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_in_its_place_alone_and_with_its_key_alone() {
        let of = head("fetch", "API_KEY");
        let record = safe().seal(&of, &value("open sesame")).unwrap();
        assert!(!record.windows(6).any(|piece| piece == b"sesame"));
        let place = record_of("fetch", "API_KEY");
        assert_eq!(safe().open(&place, &record), Ok((of.clone(), value("open sesame"))));
        let moved = safe().open(&record_of("other", "API_KEY"), &record).unwrap_err();
        assert!(matches!(moved, Damage::Moved { .. }) && moved.to_string().contains("API_KEY of fetch"), "{moved}");
        let stranger = Safe::of(&[8; 32]).unwrap().open(&place, &record).unwrap_err();
        assert!(matches!(stranger, Damage::Seal { .. }), "{stranger}");
        // As if it were another's: the head says so, and the seal does not.
        let other = [
            serde_json::to_vec(&head("other", "API_KEY")).unwrap(),
            record[record.iter().position(|b| *b == b'\n').unwrap()..].to_vec(),
        ]
        .concat();
        assert!(matches!(safe().open(&record_of("other", "API_KEY"), &other), Err(Damage::Seal { .. })));
        assert_ne!(record, safe().seal(&of, &value("open sesame")).unwrap(), "the nonce is another each time");
        // RFC 8439 leaves nothing between the value and its tag.
        assert_eq!(record.len(), serde_json::to_vec(&of).unwrap().len() + 1 + 12 + "open sesame".len() + 16);
    }

    #[test]
    fn of_several_those_that_are_damaged_are_named_and_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) =
            Store::open(std::fs::File::open(folder.path()).unwrap(), gaia_store::Limits::default()).unwrap();
        for name in ["A", "B", "C"] {
            let record = safe().seal(&head("fetch", name), &value(name)).unwrap();
            store.set_record(&record_of("fetch", name), &record).unwrap();
        }
        // One in the place of another, whole as far as the store knows.
        let of_b = store.record(&record_of("fetch", "B")).unwrap().unwrap();
        store.set_record(&record_of("fetch", "C"), &of_b).unwrap();
        let (all, wrong) = safe().open_all(&store, |_, name| name == "A").unwrap();
        let found: Vec<_> = all.iter().map(|(head, value)| (head.name.as_str(), value.is_some())).collect();
        assert_eq!(found, [("A", true), ("B", false)]);
        assert!(wrong.len() == 1 && wrong[0].contains("B of fetch is in the place of another"), "{wrong:?}");
        assert_eq!((store.records(PREFIX).len(), store.findings().len()), (2, 2));
        assert!(safe().open_all(&store, |_, _| true).unwrap().1.is_empty(), "it is said once");
    }

    #[test]
    fn names_are_those_of_the_manifest() {
        assert!(checked("fetch", "API_KEY").is_ok());
        for (brane, name) in [("", "A"), ("Fetch", "A"), ("fetch", ""), ("fetch", "A B"), ("fetch", "1A"), ("a/b", "A")]
        {
            assert!(checked(brane, name).is_err(), "{brane} {name}");
        }
    }

    proptest! {
        #[test]
        fn any_value_is_sealed_and_opened_and_any_change_is_seen(text in "\\PC{1,200}", at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let place = record_of("fetch", "API_KEY");
            let mut record = safe().seal(&head("fetch", "API_KEY"), &value(&text)).unwrap();
            let (_, opened) = safe().open(&place, &record).unwrap();
            prop_assert_eq!(opened.reveal(), text.as_str());
            let at = at.index(record.len());
            record[at] ^= flip;
            prop_assert!(safe().open(&place, &record).is_err());
        }

        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), honest: bool) {
            let head = serde_json::to_vec(&head("fetch", "API_KEY")).unwrap();
            let record = if honest { [head, b"\n".to_vec(), bytes].concat() } else { bytes };
            prop_assert!(safe().open(&record_of("fetch", "API_KEY"), &record).is_err());
        }
    }
}
