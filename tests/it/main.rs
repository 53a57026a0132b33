//! One file per promise. Each test boots an appliance of its own and says in one line what it would miss if it passed
//! wrongly.

#![allow(clippy::unwrap_used, reason = "everything here is a test, also what the tests share")]

mod boot;
mod capabilities;
mod command;
mod console;
mod costs;
mod density;
mod deploy;
mod disk;
mod egress;
mod hostile;
mod image;
mod ingress;
mod lifecycles;
mod limits;
mod logs;
mod memory;
mod metrics;
mod pages;
mod pictures;
mod pinned;
mod power;
mod profile;
mod registries;
mod remote;
mod requests;
mod run;
mod sandbox;
mod secrets;
mod seed;
mod soak;
mod strangers;
mod supervision;
mod workers;
