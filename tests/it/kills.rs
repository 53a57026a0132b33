//! A worker that is killed under load.

use gaia_tests::{ANSWER_WITHIN, Appliance, Setup, soak};

use crate::workers::{BUSY, SIGKILL, load, served};

/// Would miss: a kill that costs the requests which wait on the worker's socket, or that of another worker; a worker that
/// stays away.
#[test]
fn a_killed_worker_loses_only_the_requests_inside_it() {
    let appliance = Appliance::boot(&Setup::default().graph(BUSY)).unwrap();
    let rounds = if soak() { 20 } else { 2 };
    for round in 0..rounds {
        let worker = ["worker@0", "worker@1"][round % 2];
        // One that ended a moment ago is made to wait before it starts again, which is another test's business.
        let settled = |a: &Appliance| a.role(worker, "millis");
        if round >= 2 {
            appliance.until(2 * ANSWER_WITHIN, settled, |millis| *millis > 31_000).unwrap();
        }
        let lost = || appliance.ask("GET /v1/status").unwrap()["lost"].as_u64().unwrap();
        let before = lost();
        let (load, back) = load(appliance.port().unwrap(), "/burn?n=40000000", || {
            served(&appliance, 20);
            let pid = appliance.pid(worker).unwrap();
            // Which worker has how many of the eight is chance, and none is as likely as all.
            let inside = |a: &Appliance| {
                let status = a.ask("GET /v1/status")?;
                let workers = status["workers"].as_array().cloned().unwrap_or_default();
                Ok(workers.iter().find(|w| w["pid"] == pid).and_then(|w| w["inside"].as_u64()).unwrap_or(0))
            };
            appliance.until(ANSWER_WITHIN, inside, |requests| *requests >= 2).unwrap();
            appliance.kill(pid, SIGKILL).unwrap();
            let back = appliance.line("is back after", ANSWER_WITHIN).unwrap();
            served(&appliance, 20);
            back
        });
        let lost = usize::try_from(lost() - before).unwrap();
        println!(
            "{} answered, {} failed, {lost} were inside; slowest {:?}; {back}",
            load.answered, load.failed, load.slowest
        );
        assert!(lost >= 1, "nothing was inside the worker: this run shows nothing");
        assert!(load.failed >= 1, "the client felt nothing of a kill: did the worker die?");
        assert!(load.failed <= lost, "{} requests failed, {lost} were inside the killed worker", load.failed);
        // `served` counts each request as it begins, so those that are lost are among the forty.
        assert!(load.answered + load.failed >= 40);
        let millis: u64 = back.split("is back after ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        // Or, on a machine that has too much to do, half as long as the slowest of the eight had to wait.
        let within = load.slowest.as_millis() / 2;
        assert!(u128::from(millis) < within.max(1000), "{back}");
    }
    appliance.power_off().unwrap();
}
