//! Deploys to an appliance, over the network and onto its disk, whose power may go at any moment.

use std::path::Path;
use std::time::Duration;

use gaia_init::key::PublicKey;
use gaia_qemu::Drive;
use gaia_tests::{Appliance, Setup, data_disk, nbd, out, soak};

use crate::remote::{Person, started_for};

/// A graph with one brane of this name; it is the guest `hello`.
fn graph(ann: &Person, name: &str) -> String {
    let folder = ann.folder.path();
    std::fs::copy(out("branes/hello.wasm"), folder.join("hello.wasm")).unwrap();
    let path = folder.join(format!("{name}.zgraph.toml"));
    std::fs::write(&path, format!("[brane.{name}]\nimage = \"file:./hello.wasm\"\n")).unwrap();
    path.to_string_lossy().into_owned()
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

/// Would miss: a deploy that is forgotten, or half remembered, after the power has gone; an appliance that is another to its
/// operators after a restart; a store that does not open.
#[test]
fn what_was_deployed_outlives_a_power_cut_at_any_moment() {
    let ann = Person::new();
    let rounds: u64 = if soak() { 200 } else { 3 };
    let names: Vec<String> = (0..=rounds).map(|round| format!("v{round}")).collect();
    let graphs: Vec<String> = names.iter().map(|name| graph(&ann, name)).collect();
    let mut image = data_disk().unwrap();
    let (mut device, mut acknowledged, mut begun) = (None, None, None::<String>);
    for round in 0..rounds {
        let disk = nbd::Disk::of(&image).unwrap();
        let (appliance, key, port) = on(&ann, disk.drive());
        assert_eq!(*device.get_or_insert(key), key, "it is the same to its operators");
        let transcript = appliance.machine().console().transcript();
        assert!(!transcript.contains("store: "), "in round {round} something is wrong with the store:\n{transcript}");
        if let Some(acknowledged) = acknowledged.take() {
            let served = serves(&appliance, &names);
            assert!(
                Some(&served) == Some(&acknowledged) || Some(&served) == begun.as_ref(),
                "{served}, not {acknowledged}"
            );
        }
        let at = usize::try_from(round).unwrap();
        // In the first round, all of it; then the power goes in the middle, at a moment that the round tells.
        ann.does(port, &["deploy", &graphs[at]]);
        acknowledged = Some(names[at].clone());
        begun = Some(names[at + 1].clone());
        let cut = std::thread::scope(|scope| {
            let deploy = scope.spawn(|| ann.on(port, &["deploy", &graphs[at + 1]]));
            std::thread::sleep(Duration::from_millis((round + 1).wrapping_mul(2_654_435_761) % 500));
            let answered = deploy.is_finished();
            let cut = disk.cut(round).unwrap();
            appliance.machine().kill().unwrap();
            if deploy.join().unwrap().status.success() {
                // It may have answered between the question and the cut; then either is right.
                println!("round {round}: the second deploy has answered, before the cut: {answered}");
                if answered {
                    acknowledged.clone_from(&begun);
                }
            }
            cut
        });
        println!("round {round}: {:?}", cut.losses);
        image = cut.image;
    }
    let (appliance, _, port) = on(&ann, Drive::file(Path::new(&image)));
    let served = serves(&appliance, &names);
    assert!(Some(&served) == acknowledged.as_ref() || Some(&served) == begun.as_ref(), "{served}");
    let graphs = ann.does(port, &["graphs"]);
    assert!(graphs.contains(&format!("{served}.zgraph.toml")), "{graphs}");
    appliance.power_off().unwrap();
}
