//! One file per promise. Each test boots an appliance of its own and says in one line what it would miss if it passed
//! wrongly. Two of them run at a time, but for those in [`alone`].

#![allow(clippy::unwrap_used, reason = "everything here is a test, also what the tests share")]

mod alone;
mod boot;
mod capabilities;
mod command;
mod console;
mod deploy;
mod disk;
mod egress;
mod image;
mod ingress;
mod lifecycles;
mod logs;
mod memory;
mod metrics;
mod pages;
mod pictures;
mod power;
mod profile;
mod registries;
mod remote;
mod requests;
mod run;
mod sandbox;
mod secrets;
mod seed;
mod supervision;
mod workers;
