//! `clock`: the time, in steps of the granted resolution. Readings are rounded down to a step, and timers end on one, so
//! nothing finer than a step can be read off either.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gaia_manifest::{Capability as Grant, Resolution};
use wasmtime::component::{HasData, Resource, ResourceTable};
use wasmtime_wasi::p2::bindings::clocks::{monotonic_clock, wall_clock};
use wasmtime_wasi::p2::{DynPollable, Pollable, subscribe};

use super::{Capability, Granted};
use crate::link::Interface;
use crate::worker::host::{Host, Means};

/// See the module.
pub(super) struct Clock;

const WALL: Interface = Interface {
    name: "wasi:clocks/wall-clock",
    add: |linker| wall_clock::add_to_linker::<Host, Clocks>(linker, Host::clocks),
};
const MONOTONIC: Interface = Interface {
    name: "wasi:clocks/monotonic-clock",
    add: |linker| monotonic_clock::add_to_linker::<Host, Clocks>(linker, Host::clocks),
};

impl Capability for Clock {
    fn key(&self) -> &'static str {
        "clock"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[WALL, MONOTONIC]
    }

    fn smallest(&self) -> &'static str {
        "\"clock\" = { resolution = \"s\" }"
    }

    fn configure(&self, grant: &Grant, granted: &mut Granted, _: &Means) {
        if let Grant::Clock(resolution) = grant {
            granted.clock = Some(*resolution);
        }
    }
}

/// Marks the interfaces.
struct Clocks;

impl HasData for Clocks {
    type Data<'a> = View<'a>;
}

/// An instance's clocks.
pub struct View<'a> {
    /// The instance's resources.
    pub table: &'a mut ResourceTable,
    /// What everything is rounded to.
    pub step: Resolution,
    /// When the monotonic clock showed 0.
    pub since: Instant,
}

impl View<'_> {
    /// The monotonic clock as it is, not rounded.
    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A timer that ends on the first step at or after `when`.
    fn timer(&mut self, when: u64) -> wasmtime::Result<Resource<DynPollable>> {
        let step = up(when, self.step).map(Duration::from_nanos);
        let end = step.and_then(|step| self.since.checked_add(step)).map(tokio::time::Instant::from_std);
        let timer = self.table.push(Timer(end))?;
        subscribe(self.table, timer)
    }
}

/// The last step.
pub(super) fn down(nanos: u64, step: Resolution) -> u64 {
    nanos - nanos % step.nanos()
}

/// The next step; `None` if it is later than any clock can show.
fn up(nanos: u64, step: Resolution) -> Option<u64> {
    nanos.checked_next_multiple_of(step.nanos())
}

fn datetime(nanos: u64) -> wall_clock::Datetime {
    let time = Duration::from_nanos(nanos);
    wall_clock::Datetime { seconds: time.as_secs(), nanoseconds: time.subsec_nanos() }
}

impl wall_clock::Host for View<'_> {
    fn now(&mut self) -> wasmtime::Result<wall_clock::Datetime> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(datetime(down(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), self.step)))
    }

    fn resolution(&mut self) -> wasmtime::Result<wall_clock::Datetime> {
        Ok(datetime(self.step.nanos()))
    }
}

impl monotonic_clock::Host for View<'_> {
    fn now(&mut self) -> wasmtime::Result<monotonic_clock::Instant> {
        Ok(down(View::now(self), self.step))
    }

    fn resolution(&mut self) -> wasmtime::Result<monotonic_clock::Instant> {
        Ok(self.step.nanos())
    }

    fn subscribe_instant(&mut self, when: monotonic_clock::Instant) -> wasmtime::Result<Resource<DynPollable>> {
        self.timer(when)
    }

    fn subscribe_duration(&mut self, when: monotonic_clock::Duration) -> wasmtime::Result<Resource<DynPollable>> {
        // From now as it really is: from the last step it would end too early.
        let when = View::now(self).saturating_add(when);
        self.timer(when)
    }
}

/// Ends at an instant, or never.
struct Timer(Option<tokio::time::Instant>);

#[wasmtime_wasi::async_trait]
impl Pollable for Timer {
    async fn ready(&mut self) {
        match self.0 {
            None => std::future::pending().await,
            // A guest that polls in a loop without waiting must not keep the event loop from turning.
            Some(end) if end <= tokio::time::Instant::now() => tokio::task::yield_now().await,
            Some(end) => tokio::time::sleep_until(end).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wasmtime_wasi::p2::bindings::clocks::monotonic_clock::Host as _;

    const STEPS: [Resolution; 4] =
        [Resolution::Seconds, Resolution::Milliseconds, Resolution::Microseconds, Resolution::Nanoseconds];

    #[test]
    fn readings_are_whole_steps() {
        for step in STEPS {
            let mut table = ResourceTable::new();
            let mut view = View { table: &mut table, step, since: Instant::now() };
            std::thread::sleep(Duration::from_micros(1500));
            assert_eq!(monotonic_clock::Host::now(&mut view).unwrap() % step.nanos(), 0);
            let wall = wall_clock::Host::now(&mut view).unwrap();
            assert_eq!((u64::from(wall.nanoseconds) + wall.seconds * 1_000_000_000) % step.nanos(), 0);
            assert!(wall.seconds > 1_700_000_000, "it is later than 2023");
        }
    }

    #[test]
    fn a_timer_ends_on_a_step_and_never_early() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut table = ResourceTable::new();
            let since = Instant::now();
            for micros in [0, 1, 400, 999, 1000, 1700, 5300] {
                let mut view = View { table: &mut table, step: Resolution::Milliseconds, since };
                let (asked, began) = (View::now(&view), Instant::now());
                let pollable = view.subscribe_duration(micros * 1000).unwrap();
                let end = up(asked + micros * 1000, Resolution::Milliseconds).unwrap();
                // Resolved through the table, as the guest's poll does it.
                wasmtime_wasi::p2::bindings::io::poll::HostPollable::block(&mut table, pollable).await.unwrap();
                let ended = u64::try_from(since.elapsed().as_nanos()).unwrap();
                assert!(ended >= end, "{micros} µs: {ended} < {end}");
                assert!(began.elapsed() < Duration::from_micros(micros) + Duration::from_millis(50));
            }
        });
    }

    proptest! {
        #[test]
        fn rounding_moves_less_than_a_step(nanos in any::<u64>(), step in 0_usize..4) {
            let step = STEPS[step];
            prop_assert!(nanos - down(nanos, step) < step.nanos());
            if let Some(next) = up(nanos, step) { prop_assert!(next >= nanos && next - nanos < step.nanos()); }
        }
    }
}
