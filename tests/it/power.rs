//! Deploys to an appliance, over the network and onto its disk, whose power may go at any moment.

use std::path::Path;

use gaia_init::key::PublicKey;
use gaia_qemu::Drive;
use gaia_tests::{ANSWER_WITHIN, Appliance, Setup, data_disk, nbd, out, soak};

use crate::remote::{Person, started_for};

/// A graph with one brane of this name; it is the guest `hello`, or a component that no other graph has.
fn graph(ann: &Person, name: &str, is_distinct: bool) -> String {
    let folder = ann.folder.path();
    let component = if is_distinct { format!("{name}.wasm") } else { "hello.wasm".to_owned() };
    std::fs::write(folder.join(&component), if is_distinct { distinct(name) } else { distinct("hello") }).unwrap();
    let path = folder.join(format!("{name}.zgraph.toml"));
    std::fs::write(&path, format!("[brane.{name}]\nimage = \"file:./{component}\"\n")).unwrap();
    path.to_string_lossy().into_owned()
}

/// The guest `hello` with a custom section behind it (WebAssembly, section 5.5.3) that no other has.
fn distinct(by: &str) -> Vec<u8> {
    let hello = std::fs::read(out("branes/hello.wasm")).unwrap();
    [&*hello, &[0, 13, 3], b"tag", format!("{by:>9}").as_bytes()].concat()
}

/// Which of these branes the appliance serves: one, and no other.
fn serves(appliance: &Appliance, names: &[String]) -> String {
    let status = |name: &String| appliance.get(&format!("/{name}")).unwrap().status;
    let served: Vec<_> = names.iter().filter(|name| status(name) == 200).cloned().collect();
    assert_eq!(served.len(), 1, "it serves {served:?} of {names:?}");
    served[0].clone()
}

fn on(ann: &Person, drive: Drive) -> (Appliance, PublicKey, u16) {
    let (appliance, key) = started_for(ann, Setup::default().data(drive));
    let port = appliance.control_port().unwrap();
    ann.does(port, &["trust", &key.to_string()]);
    (appliance, key, port)
}

/// What is under way when the power goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    /// Of a graph whose component is there.
    Deploy,
    /// Of one whose component is sent and compiled.
    DeployAll,
    Push,
}

/// What the power cuts have shown.
#[derive(Debug, Default)]
struct Shown {
    /// Rounds whose power went by itself, in the middle of each kind of change.
    middle: [usize; 3],
    /// Of those, in which writes were lost or torn.
    losing: usize,
    losses: nbd::Losses,
    /// Rounds after which the new graph served although its deploy had not answered.
    ahead: usize,
}

/// Would miss: a deploy that is forgotten, or half remembered, after the power has gone; a component that was pushed and is not
/// there, or that keeps it from being pushed again; an appliance that is another to its operators after a restart; a store that does
/// not open.
///
/// The power goes at a write, each round at another one of those that a deploy or a push makes, so that there is always one at least
/// that was not flushed.
#[test]
fn what_was_deployed_outlives_a_power_cut_at_any_write() {
    let ann = Person::new();
    let rounds: u64 = if soak() { 200 } else { 5 };
    let names: Vec<String> = (0..=rounds).map(|round| format!("v{round}")).collect();
    let graphs: Vec<String> = (0..).zip(&names).map(|(number, name)| graph(&ann, name, number % 3 == 2)).collect();
    let mut image = data_disk().unwrap();
    // How many writes each kind of change makes, until it is known.
    let (mut writes, mut shown) = ([20_usize, 30, 12], Shown::default());
    let (mut device, mut begun, mut pushed) = (None, None::<String>, None::<(u64, bool)>);
    let mut acknowledged = None::<String>;
    for round in 0..rounds {
        let disk = nbd::Disk::of(&image).unwrap();
        let (appliance, key, port) = on(&ann, disk.drive());
        assert_eq!(*device.get_or_insert(key), key, "it is the same to its operators");
        let transcript = appliance.machine().console().transcript();
        assert!(!transcript.contains("store: "), "in round {round} something is wrong with the store:\n{transcript}");
        if let Some(acknowledged) = &acknowledged {
            let served = serves(&appliance, &names);
            let is_ahead = served != *acknowledged;
            assert!(!is_ahead || Some(&served) == begun.as_ref(), "round {round}: {served}, not {acknowledged}");
            shown.ahead += usize::from(is_ahead);
        }
        if let Some((pushed, answered)) = pushed.take() {
            is_there_if_it_answered(&ann, port, pushed, answered);
        }
        let at = usize::try_from(round).unwrap();
        // In the beginning, all of it.
        ann.does(port, &["deploy", &graphs[at]]);
        acknowledged = Some(names[at].clone());
        let change = [Change::Deploy, Change::DeployAll, Change::Push][at % 3];
        let arguments = match change {
            Change::Deploy | Change::DeployAll => vec!["deploy".to_owned(), graphs[at + 1].clone()],
            Change::Push => vec!["push".to_owned(), format!("omega/p{round}:1"), component(&ann, round)],
        };
        begun = (change != Change::Push).then(|| names[at + 1].clone());
        let most = writes[change as usize];
        let number = 1 + usize::try_from((round + 1).wrapping_mul(2_654_435_761) % most as u64).unwrap();
        let written = disk.writes();
        disk.arm(number, round);
        let (cut, by_itself, answered) = std::thread::scope(|scope| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let ann = &ann;
            let changing = scope.spawn(move || ann.on(port, &arguments));
            let by_itself = disk.has_cut_itself(ANSWER_WITHIN, || changing.is_finished());
            let made = disk.writes() - written;
            let cut = disk.cut(round).unwrap();
            // There may be more than was thought, and then later rounds go on to the last.
            writes[change as usize] = if by_itself { most.max(number + number / 4 + 1) } else { made.max(1) };
            appliance.machine().kill().unwrap();
            // It may have answered just before the cut; then what it answered holds.
            (cut, by_itself, changing.join().unwrap().status.success())
        });
        println!(
            "round {round}: {change:?}, write {number} of {most}, by itself: {by_itself}, answered: {answered}, {:?}",
            cut.losses
        );
        if by_itself {
            shown.middle[change as usize] += 1;
            shown.losing += usize::from(cut.losses.lost + cut.losses.torn > 0);
        }
        shown.losses.survived += cut.losses.survived;
        shown.losses.lost += cut.losses.lost;
        shown.losses.torn += cut.losses.torn;
        match (change, answered) {
            (Change::Push, answered) => pushed = Some((round, answered)),
            (_, true) => acknowledged.clone_from(&begun),
            (_, false) => {}
        }
        image = cut.image;
    }
    let (appliance, _, port) = on(&ann, Drive::file(Path::new(&image)));
    let served = serves(&appliance, &names);
    assert!(Some(&served) == acknowledged.as_ref() || Some(&served) == begun.as_ref(), "{served}");
    if let Some((pushed, answered)) = pushed.take() {
        is_there_if_it_answered(&ann, port, pushed, answered);
    }
    let graphs = ann.does(port, &["graphs"]);
    assert!(graphs.contains(&format!("{served}.zgraph.toml")), "{graphs}");
    appliance.power_off().unwrap();
    println!("{rounds} power cuts: {shown:?}; writes of each kind: {writes:?}");
    let middle: usize = shown.middle.iter().sum();
    assert!(
        2 * middle > usize::try_from(rounds).unwrap() && shown.middle.iter().all(|rounds| *rounds > 0),
        "this shows nothing: {shown:?}"
    );
    assert!(2 * shown.losing > middle && shown.losses.lost > 0, "this shows nothing: {shown:?}");
}

/// A file with a component that no round but this one has.
fn component(ann: &Person, round: u64) -> String {
    let path = ann.folder.path().join("pushed.wasm");
    std::fs::write(&path, distinct(&format!("p{round}"))).unwrap();
    path.to_string_lossy().into_owned()
}

/// After the power went in a push: what it answered is there, and otherwise it is there or can be pushed again.
fn is_there_if_it_answered(ann: &Person, port: u16, round: u64, answered: bool) {
    let path = ann.folder.path().join("pushed.zgraph.toml");
    let name = format!("omega/p{round}:1");
    std::fs::write(&path, format!("[brane.pushed]\nimage = \"{name}\"\n")).unwrap();
    let plan = ["deploy", &path.to_string_lossy(), "--dry-run"];
    let planned = ann.on(port, &plan);
    let said = String::from_utf8_lossy(&planned.stderr).into_owned();
    if planned.status.success() {
        return;
    }
    assert!(!answered && said.contains(&format!("\"{name}\" is not in the store")), "{name} was pushed: {said}");
    ann.does(port, &["push", &name, &component(ann, round)]);
    ann.does(port, &plan);
}
