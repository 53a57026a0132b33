//! What a deploy would change: the graph that serves held against the one that is to serve. Grants that widen come first.
//!
//! ```text
//! serving Plan ─┐
//!               ├─▶ report::Plan ── shown, agreed to ──▶ the swap
//! next Plan ────┘
//! ```

use std::collections::BTreeMap;

use gaia_init::sandbox::worker::Reach;
use gaia_manifest::{Capability, Endpoint, Host, Lifetime, Resolution, Site};

use super::deploy;
use super::report::{BraneChange, Change, GrantChange, PlanReport};
use crate::plan::{self, Plan};

/// All that a deploy of `next` would change. What only control knows is left empty.
pub(super) fn between(serving: Option<&Plan>, next: &Plan) -> PlanReport {
    let nothing = Plan::default();
    let before = serving.unwrap_or(&nothing);
    let branes = next.branes.iter().map(|after| changed(before.branes.iter().find(|b| b.name == after.name), after));
    let removed = before.branes.iter().filter(|b| !next.branes.iter().any(|after| after.name == b.name));
    let removed = removed.map(|b| BraneChange {
        name: b.name.clone(),
        change: Change::Removed,
        image: b.image.clone(),
        digest: b.digest.clone(),
        digest_before: None,
        grants: grants(&b.grants, &[]),
        others: Vec::new(),
    });
    PlanReport {
        branes: branes.chain(removed).collect(),
        ends: serving.map(|serving| deploy::ended_states(serving, next)).unwrap_or_default(),
        sandbox: reach(&next.reach()),
        sandbox_before: serving.map(|serving| reach(&serving.reach())),
        declared: next.branes.iter().map(|b| u64::from(b.replicas).saturating_mul(b.mem_max)).sum(),
        ..PlanReport::default()
    }
}

fn changed(before: Option<&plan::Brane>, after: &plan::Brane) -> BraneChange {
    let grants = grants(before.map_or(&[][..], |b| &b.grants), &after.grants);
    let others = before.map(|before| others(before, after)).unwrap_or_default();
    let other_image = before.is_some_and(|b| b.digest != after.digest);
    let change = match before {
        None => Change::Added,
        Some(_) if other_image || !grants.is_empty() || !others.is_empty() => Change::Changed,
        Some(_) => Change::Same,
    };
    BraneChange {
        name: after.name.clone(),
        change,
        image: after.image.clone(),
        digest: after.digest.clone(),
        digest_before: before.filter(|_| other_image).map(|b| b.digest.clone()),
        grants,
        others,
    }
}

/// What is granted now and was not, and the other way round; what widens first.
fn grants(before: &[Capability], after: &[Capability]) -> Vec<GrantChange> {
    let (old, new): (Vec<_>, Vec<_>) =
        (before.iter().flat_map(parts).collect(), after.iter().flat_map(parts).collect());
    let given = new.iter().filter(|part| !old.contains(part)).map(|part| {
        let covered = before.iter().any(|grant| covers(grant, part));
        GrantChange { text: text(part), widens: Some(!covered) }
    });
    let gone = old.iter().filter(|part| !new.contains(part)).map(|part| GrantChange { text: text(part), widens: None });
    let mut all: Vec<GrantChange> = given.chain(gone).collect();
    all.sort_by_key(|change| match change.widens {
        Some(true) => 0,
        Some(false) => 1,
        None => 2,
    });
    all
}

/// A grant in its smallest parts: each site, each variable by itself.
fn parts(grant: &Capability) -> Vec<Capability> {
    let each = match grant {
        Capability::Http(all) => all.iter().map(|one| Capability::Http(vec![one.clone()])).collect(),
        Capability::Dns(all) => all.iter().map(|one| Capability::Dns(vec![one.clone()])).collect(),
        Capability::Tcp(all) => all.iter().map(|one| Capability::Tcp(vec![one.clone()])).collect(),
        Capability::Udp(all) => all.iter().map(|one| Capability::Udp(vec![one.clone()])).collect(),
        Capability::Env { vars, secrets } => {
            let one = |name: &String, value: &String| BTreeMap::from([(name.clone(), value.clone())]);
            let vars = vars.iter().map(|(name, value)| Capability::Env { vars: one(name, value), secrets: Vec::new() });
            let secret = |name: &String| Capability::Env { vars: BTreeMap::new(), secrets: vec![name.clone()] };
            vars.chain(secrets.iter().map(secret)).collect()
        }
        Capability::Tmp { .. } | Capability::Clock(_) | Capability::Random => Vec::new(),
    };
    if each.is_empty() { vec![grant.clone()] } else { each }
}

/// A part as a person reads it.
fn text(part: &Capability) -> String {
    let key = part.key();
    let shown = match part {
        Capability::Http(all) => all.first().map(ToString::to_string),
        Capability::Dns(all) => all.first().map(ToString::to_string),
        Capability::Tcp(all) | Capability::Udp(all) => all.first().map(ToString::to_string),
        Capability::Tmp { quota, lifetime } => {
            let lifetime = if *lifetime == Lifetime::Instance { "instance" } else { "request" };
            Some(format!("{}, for each {lifetime}", size(*quota)))
        }
        Capability::Clock(resolution) => Some(unit(*resolution).to_owned()),
        Capability::Random => return key.to_owned(),
        Capability::Env { vars, secrets } => {
            // Values are no secrets, and still nothing that a plan should spread.
            let var = vars.first_key_value().map(|(name, value)| format!("{name} ({} bytes)", value.len()));
            var.or_else(|| secrets.first().map(|name| format!("secret {name}")))
        }
    };
    format!("{key} {}", shown.unwrap_or_else(|| "for nothing".to_owned()))
}

/// Whether a grant has room for this part of another.
fn covers(grant: &Capability, part: &Capability) -> bool {
    match (grant, part) {
        (Capability::Http(old), Capability::Http(new)) => new.iter().all(|n| old.iter().any(|o| site_covers(o, n))),
        (Capability::Dns(old), Capability::Dns(new)) => new.iter().all(|n| old.iter().any(|o| host_covers(o, n))),
        (Capability::Tcp(old), Capability::Tcp(new)) | (Capability::Udp(old), Capability::Udp(new)) => {
            let end = |o: &Endpoint, n: &Endpoint| o.port == n.port && host_covers(&o.host, &n.host);
            new.iter().all(|n| old.iter().any(|o| end(o, n)))
        }
        (Capability::Tmp { quota: old, lifetime: kept }, Capability::Tmp { quota, lifetime }) => {
            quota <= old && (kept == lifetime || *lifetime == Lifetime::Request)
        }
        (Capability::Clock(old), Capability::Clock(new)) => new.nanos() >= old.nanos(),
        // A secret is more than there was; another value of a variable is not.
        (Capability::Env { .. }, Capability::Env { secrets, .. }) => secrets.is_empty(),
        _ => false,
    }
}

fn site_covers(old: &Site, new: &Site) -> bool {
    (old.scheme.is_none() || old.scheme == new.scheme) && old.port == new.port && host_covers(&old.host, &new.host)
}

fn host_covers(old: &Host, new: &Host) -> bool {
    old == new
        || matches!(new, Host::Exact(name) | Host::Under(name) if matches!(old, Host::Under(_)) && old.covers(name))
}

/// What else of a brane is another than before.
fn others(before: &plan::Brane, after: &plan::Brane) -> Vec<String> {
    let mut all = Vec::new();
    let mut say = |what: &str, before: String, after: String| {
        if before != after {
            all.push(format!("{what} {before} → {after}"));
        }
    };
    let route = |b: &plan::Brane| format!("{}{}", b.host.as_deref().unwrap_or_default(), b.path);
    let quota = |b: &plan::Brane| b.cpu_quota.map_or_else(|| "none".to_owned(), |quota| quota.to_string());
    let lifecycle = |b: &plan::Brane| format!("{:?}", b.lifecycle).to_lowercase();
    say("image", before.image.clone(), after.image.clone());
    say("route", route(before), route(after));
    say("lifecycle", lifecycle(before), lifecycle(after));
    say("replicas", before.replicas.to_string(), after.replicas.to_string());
    say("mem_max", size(before.mem_max), size(after.mem_max));
    say("cpu_quota", quota(before), quota(after));
    say("deadline", format!("{:?}", before.deadline), format!("{:?}", after.deadline));
    say("body_max", size(before.body_max), size(after.body_max));
    if before.secrets != after.secrets {
        all.push("values of secrets".to_owned());
    }
    all
}

/// What workers can do towards the outside, as the seal lets them.
fn reach(reach: &Reach) -> String {
    let mut all = Vec::new();
    if reach.http || reach.tcp {
        let ports: Vec<String> = reach.ports.iter().map(ToString::to_string).collect();
        all.push(format!("TCP to port {}", ports.join(", ")));
    }
    if reach.udp {
        all.push("datagrams".to_owned());
    }
    if all.is_empty() {
        "workers make no socket".to_owned()
    } else {
        format!("workers connect by {}", all.join(" and "))
    }
}

fn unit(resolution: Resolution) -> &'static str {
    match resolution {
        Resolution::Seconds => "s",
        Resolution::Milliseconds => "ms",
        Resolution::Microseconds => "us",
        Resolution::Nanoseconds => "ns",
    }
}

/// Bytes as a manifest writes them.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// How many there are of each kind of change.
#[must_use]
pub fn counts(branes: &[BraneChange]) -> [usize; 4] {
    let of = |change| branes.iter().filter(|b| b.change == change).count();
    [of(Change::Added), of(Change::Changed), of(Change::Removed), of(Change::Same)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The plans' branes of this manifest, as far as they are compared here.
    fn plan(text: &str) -> Plan {
        let manifest = gaia_manifest::parse(text).unwrap();
        let branes = manifest.branes.iter().map(|b| plan::Brane {
            name: b.name.value.clone(),
            image: b.image.value.to_string(),
            digest: b.image.value.to_string(),
            artefact: String::new(),
            reservation: 0,
            needs: plan::Needs {
                memories: 1,
                initial_memory: 0,
                tables: 0,
                table_elements: 0,
                data_end: 0,
                longest_name: 0,
            },
            host: b.ingress.host.as_ref().map(ToString::to_string),
            path: b.ingress.path.clone(),
            grants: b.capabilities.iter().map(|g| g.capability.clone()).collect(),
            secrets: Vec::new(),
            lifecycle: b.lifecycle,
            replicas: b.replicas,
            keeper: None,
            mem_max: b.limits.mem_max.value,
            cpu_quota: b.limits.cpu_quota.as_ref().map(|q| q.value),
            deadline: b.limits.deadline,
            body_max: b.limits.body_max,
        });
        Plan { branes: branes.collect(), ..Plan::default() }
    }

    fn with(grants: &str) -> Plan {
        plan(&format!("[brane.fetch]\nimage = \"file:./f.wasm\"\n[brane.fetch.capability]\n{grants}\n"))
    }

    fn said(before: &str, after: &str) -> Vec<(Option<bool>, String)> {
        let report = between(Some(&with(before)), &with(after));
        report.branes[0].grants.iter().map(|g| (g.widens, g.text.clone())).collect()
    }

    #[test]
    fn what_widens_is_told_from_what_does_not_and_comes_first() {
        let http = |list: &str| format!("\"net.http\" = {{ allowlist = [{list}] }}");
        let (wide, same, gone) = (Some(true), Some(false), None);
        for (before, after, wanted) in [
            (String::new(), http("\"a.example\""), vec![(wide, "net.http a.example")]),
            (http("\"a.example\""), String::new(), vec![(gone, "net.http a.example")]),
            (http("\"a.example\""), http("\"a.example\""), vec![]),
            (
                http("\"*.example\""),
                http("\"a.example\""),
                vec![(same, "net.http a.example"), (gone, "net.http *.example")],
            ),
            (
                http("\"a.example\""),
                http("\"*.example\""),
                vec![(wide, "net.http *.example"), (gone, "net.http a.example")],
            ),
            (
                http("\"*.a.example\""),
                http("\"a.example\""),
                vec![(wide, "net.http a.example"), (gone, "net.http *.a.example")],
            ),
            (
                http("\"https://a.example\""),
                http("\"a.example\""),
                vec![(wide, "net.http a.example"), (gone, "net.http https://a.example")],
            ),
            (
                "\"clock\" = { resolution = \"ms\" }".into(),
                "\"clock\" = { resolution = \"us\" }".into(),
                vec![(wide, "clock us"), (gone, "clock ms")],
            ),
            (
                "\"clock\" = { resolution = \"ms\" }".into(),
                "\"clock\" = { resolution = \"s\" }".into(),
                vec![(same, "clock s"), (gone, "clock ms")],
            ),
            (
                "\"fs.tmp\" = { quota = \"1 MiB\" }".into(),
                "\"fs.tmp\" = { quota = \"2 MiB\" }".into(),
                vec![(wide, "fs.tmp 2 MiB, for each request"), (gone, "fs.tmp 1 MiB, for each request")],
            ),
            (
                "\"env\" = { vars = { A = \"1\" } }".into(),
                "\"env\" = { vars = { A = \"22\" }, secrets = [\"KEY\"] }".into(),
                vec![(wide, "env secret KEY"), (same, "env A (2 bytes)"), (gone, "env A (1 bytes)")],
            ),
            (String::new(), "\"random\" = {}".into(), vec![(wide, "random")]),
        ] {
            let wanted: Vec<_> = wanted.into_iter().map(|(w, t)| (w, t.to_owned())).collect();
            assert_eq!(said(&before, &after), wanted, "{before} to {after}");
        }
    }

    #[test]
    fn branes_come_go_and_change() {
        let one = |name: &str, more: &str| format!("[brane.{name}]\nimage = \"file:./{name}.wasm\"\n{more}\n");
        let before = plan(&(one("a", "") + &one("b", "replicas = 4") + &one("c", "")));
        let after = plan(&(one("a", "") + &one("b", "replicas = 8") + &one("d", "")));
        let report = between(Some(&before), &after);
        let shown: Vec<_> = report.branes.iter().map(|b| (b.name.as_str(), b.change)).collect();
        let wanted = [("a", Change::Same), ("b", Change::Changed), ("d", Change::Added), ("c", Change::Removed)];
        assert_eq!(shown, wanted);
        assert_eq!(report.branes[1].others, ["replicas 4 → 8"]);
        assert_eq!(counts(&report.branes), [1, 1, 1, 1]);
        assert_eq!(between(None, &after).branes.len(), 3);
    }

    #[test]
    fn the_sandbox_is_told_as_the_seal_has_it() {
        let report = between(
            Some(&with("")),
            &with("\"net.http\" = { allowlist = [\"https://a.example\", \"b.example:8443\"] }"),
        );
        assert_eq!(report.sandbox_before.as_deref(), Some("workers make no socket"));
        assert_eq!(report.sandbox, "workers connect by TCP to port 443, 8443");
    }
}
