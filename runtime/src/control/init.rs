//! Control's side of its channel to init: questions with answers, and what init tells unasked.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write as _;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

use gaia_init::given::Given;
use gaia_init::wire::{self, FromControl, ToControl};
use tokio::sync::oneshot;

use super::{Control, Runs};
use crate::channel::{Channel, read_whole};

/// What init may have to say about the cores, in bytes: of a machine with 256 cores and 4,000 interrupts, some hundred thousand.
const MAX_GIVEN: u64 = 8 << 20;

/// What init found when control asked what is there.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) workers: usize,
    /// The newest number that any generation has had.
    pub(super) newest: u32,
    pub(super) generation: Option<u32>,
    pub(super) files: Vec<(String, OwnedFd)>,
}

/// One role, as init lists it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Role {
    /// `control`, `worker@1`, `keeper@counter.001`, …
    pub name: String,
    /// Its process, 0 when it is not running.
    pub pid: i32,
    /// Times it was started again.
    pub restarts: u32,
    /// Milliseconds since it was started, or until it will be.
    pub millis: u64,
    /// `up`, `starting`, `standing-in`, `draining`, `waiting`.
    pub state: String,
    /// What holds it, as init sees it: `whole`, `partly`, `none`, or what is missing: `no-seccomp.no-user`.
    pub sandbox: String,
}

/// A list that init sends in parts, ended by [`ToControl::End`].
enum Listing {
    Hello(Found, oneshot::Sender<Found>),
    Roles(Vec<Role>, oneshot::Sender<Vec<Role>>),
}

/// The channel and what is being waited for.
pub(super) struct Init {
    channel: Channel,
    /// In the order asked; init answers in that order.
    listings: RefCell<std::collections::VecDeque<Listing>>,
    compilers: RefCell<HashMap<u32, oneshot::Sender<Result<OwnedFd, String>>>>,
    starting: RefCell<HashMap<u32, oneshot::Sender<Result<(), String>>>>,
    /// Who asked for the cores, in the order asked.
    cores: RefCell<std::collections::VecDeque<oneshot::Sender<OwnedFd>>>,
}

impl Init {
    pub(super) fn new(channel: Channel) -> Self {
        Self {
            channel,
            listings: RefCell::default(),
            compilers: RefCell::default(),
            starting: RefCell::default(),
            cores: RefCell::default(),
        }
    }

    /// Sends and forgets. That init is gone is noticed by whoever listens.
    pub(super) async fn tell(&self, message: &FromControl, files: &[BorrowedFd<'_>]) {
        let _ = self.channel.send(message, files).await;
    }

    pub(super) async fn hello(&self) -> anyhow::Result<Found> {
        let (sender, answer) = oneshot::channel();
        self.channel.send(&FromControl::Hello, &[]).await?;
        // Only once it is sent, and before anything else can run: the listings are in the order of the questions.
        self.listings.borrow_mut().push_back(Listing::Hello(Found::default(), sender));
        Ok(answer.await?)
    }

    pub(super) async fn roles(&self) -> anyhow::Result<Vec<Role>> {
        let (sender, answer) = oneshot::channel();
        self.channel.send(&FromControl::Roles, &[]).await?;
        self.listings.borrow_mut().push_back(Listing::Roles(Vec::new(), sender));
        Ok(answer.await?)
    }

    /// What the kernel gave the cores, as init reads it now.
    pub(super) async fn given(&self) -> anyhow::Result<Given> {
        let (sender, answer) = oneshot::channel();
        self.channel.send(&FromControl::Cores, &[]).await?;
        self.cores.borrow_mut().push_back(sender);
        let text = String::from_utf8(read_whole(answer.await?, MAX_GIVEN)?)?;
        Ok(toml::from_str(&text)?)
    }

    /// A fresh compiler's channel.
    pub(super) async fn compiler(&self, ticket: u32) -> anyhow::Result<OwnedFd> {
        let (sender, answer) = oneshot::channel();
        self.compilers.borrow_mut().insert(ticket, sender);
        self.channel.send(&FromControl::Compile { ticket }, &[]).await?;
        answer.await?.map_err(|reason| anyhow::anyhow!("init gave no compiler: {reason}"))
    }

    /// Starts a generation whose files have been told, and waits until it serves or has failed.
    pub(super) async fn start(&self, generation: u32) -> anyhow::Result<()> {
        let (sender, answer) = oneshot::channel();
        self.starting.borrow_mut().insert(generation, sender);
        self.channel.send(&FromControl::Start { generation }, &[]).await?;
        answer.await?.map_err(|reason| anyhow::anyhow!("{reason}"))
    }

    /// Reads what init says until init is gone.
    pub(super) async fn listen(&self, control: &Rc<Control>) -> Result<(), wire::Error> {
        loop {
            match self.channel.receive::<ToControl>().await {
                Ok((message, files)) => self.heard(control, message, files),
                Err(e @ (wire::Error::Unknown(_) | wire::Error::Malformed)) => say(&format!("from init: {e}")),
                Err(wire::Error::Closed) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Hears what init has said until now, without waiting for more. Whoever saw a line of init's and asks about it then gets an
    /// answer that is as new, because init tells control first.
    pub(super) fn catch_up(&self, control: &Rc<Control>) {
        loop {
            match self.channel.receive_now::<ToControl>() {
                Ok((message, files)) => self.heard(control, message, files),
                Err(e @ (wire::Error::Unknown(_) | wire::Error::Malformed)) => say(&format!("from init: {e}")),
                // An end is seen by whoever listens.
                Err(_) => return,
            }
        }
    }

    fn heard(&self, control: &Rc<Control>, message: ToControl, files: Vec<OwnedFd>) {
        let mut files = files.into_iter();
        match message {
            ToControl::Machine { workers, newest, .. } => self.found(|found| {
                (found.workers, found.newest) = (workers.len(), newest);
            }),
            ToControl::Generation { generation } => self.found(|found| found.generation = Some(generation)),
            ToControl::File { name, .. } => {
                if let Some(file) = files.next() {
                    self.found(|found| found.files.push((name, file)));
                }
            }
            ToControl::Worker { core, pid, generation } => came(control, Runs::Branes { core }, pid, generation, files),
            ToControl::Keeper { pid, generation, name, replica, identity } => {
                came(control, Runs::Kept { name, replica, identity }, pid, generation, files);
            }
            ToControl::Compiler { ticket, .. } => {
                if let (Some(sender), Some(channel)) = (self.compilers.borrow_mut().remove(&ticket), files.next()) {
                    let _ = sender.send(Ok(channel));
                }
            }
            ToControl::Refused { ticket, reason } => {
                if let Some(sender) = self.compilers.borrow_mut().remove(&ticket) {
                    let _ = sender.send(Err(reason));
                }
            }
            ToControl::Serving { generation } => {
                control.serves(generation);
                self.started(generation, Ok(()));
            }
            ToControl::Failed { generation, reason } => self.started(generation, Err(reason)),
            ToControl::Exited { role, pid, cause } => control.process_ended(pid, &role, &cause),
            ToControl::Role { name, pid, restarts, millis, state, sandbox, .. } => {
                if let Some(Listing::Roles(roles, _)) = self.listings.borrow_mut().front_mut() {
                    roles.push(Role { name, pid, restarts, millis, state, sandbox });
                }
            }
            ToControl::Cores => {
                if let (Some(asker), Some(file)) = (self.cores.borrow_mut().pop_front(), files.next()) {
                    let _ = asker.send(file);
                }
            }
            ToControl::End => match self.listings.borrow_mut().pop_front() {
                Some(Listing::Hello(found, sender)) => drop(sender.send(found)),
                Some(Listing::Roles(roles, sender)) => drop(sender.send(roles)),
                None => {}
            },
        }
    }

    fn found(&self, note: impl FnOnce(&mut Found)) {
        if let Some(Listing::Hello(found, _)) = self.listings.borrow_mut().front_mut() {
            note(found);
        }
    }

    fn started(&self, generation: u32, outcome: Result<(), String>) {
        if let Some(sender) = self.starting.borrow_mut().remove(&generation) {
            let _ = sender.send(outcome);
        }
    }
}

/// A worker or keeper was started: its channel and its statistics are beside the message.
fn came(control: &Rc<Control>, runs: Runs, pid: i32, generation: u32, mut files: impl Iterator<Item = OwnedFd>) {
    let role = runs.role();
    if let (Some(channel), Some(statistics)) = (files.next(), files.next())
        && let Err(e) = control.worker_came(runs, pid, generation, channel, &statistics)
    {
        say(&format!("{role}: {e:#}"));
    }
}

/// One record in the kernel's log, for what cannot be told over the channel because the channel is what failed.
fn say(words: &str) {
    let _ = std::io::stderr().write_all(format!("gaia control: {words}\n").as_bytes());
}
