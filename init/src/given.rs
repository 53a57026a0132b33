//! What the kernel really gave each core, read back from the kernel when somebody asks.
//!
//! Init asks for partitions, affinities and the places of interrupts and work queues when it boots, and each of these can be
//! refused, or changed later. So nothing here is what was asked for: every field is what a file of the kernel says now, and what
//! differs from what was meant is a deviation.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::cores::{Cores, list, parse_list};

/// The kernel's files. Another one is for tests.
pub trait Kernel {
    /// A file's text, without white space around it; `None` if it is not there or may not be read.
    fn read(&self, path: &str) -> Option<String>;
    /// The names in a folder; none if it is not there or may not be read.
    fn names(&self, folder: &str) -> Vec<String>;
}

/// The one that runs.
#[derive(Debug, Clone, Copy)]
pub struct Running;

impl Kernel for Running {
    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

/// A process, and where it is meant to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// `control`, `worker@1`, `keeper@counter.001`, …
    pub role: String,
    /// Its number.
    pub pid: i32,
    /// The cores of its first thread; `None` where it may run on any.
    pub main: Option<Vec<usize>>,
    /// The cores of its other threads.
    pub others: Option<Vec<usize>>,
}

/// What the kernel gave. Lists of cores are in the kernel's form: `0-3,5`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Cores that keep house.
    pub housekeeping: String,
    /// Cores that run a worker each.
    pub workers: String,
    /// Whether these are the same: then nothing is kept off any core.
    pub shared: bool,
    /// Whether it is the kernel that keeps others off the workers' cores. Under `gaia run` nobody does.
    pub enforced: bool,
    /// Cores that the kernel takes for isolated (`cpuset.cpus.isolated`), if it says so.
    pub isolated: Option<String>,
    /// Where interrupts go that are registered from now on.
    pub new_interrupts: Option<String>,
    /// Where the kernel's unbound work queues run.
    pub workqueues: Option<String>,
    /// Cores whose clock ticks stop while one process runs there alone (`nohz_full`); empty where the kernel cannot.
    pub tickless: String,
    /// Each worker core.
    pub cores: Vec<Core>,
    /// All threads of the roles.
    pub threads: Vec<Thread>,
    /// What is not as it was meant to be, in words. Nothing is meant of what is not [`Given::enforced`] but the affinity of threads.
    pub deviations: Vec<String>,
}

/// A worker core.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Core {
    /// Its number.
    pub core: usize,
    /// The state of its partition, with the reason where it is invalid.
    pub partition: Option<String>,
    /// The cores that its cgroup really has.
    pub effective: Option<String>,
    /// Clock ticks (`LOC`) since the boot.
    pub ticks: u64,
    /// Calls from other cores since the boot: to schedule, to run a function, to flush addresses (`RES`, `CAL`, `TLB`).
    pub calls: u64,
    /// Hundredths of a second since the boot that it worked, and that it did not, as the kernel counts them.
    #[serde(default)]
    pub busy: u64,
    /// The others.
    #[serde(default)]
    pub idle: u64,
    /// Interrupts of devices that may fire there, or have since the boot.
    pub interrupts: Vec<Interrupt>,
}

/// An interrupt of a device, on one core.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// Its number.
    pub number: u32,
    /// Whose it is, as its driver calls it.
    pub name: String,
    /// Whether it may fire there.
    pub fires: Fires,
    /// How many did since the boot.
    pub count: u64,
}

/// Whether an interrupt may fire on a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fires {
    /// It may.
    Here,
    /// Once more at most: it has been told to go, and x86 without remapping takes it away when it next fires
    /// (Linux, kernel/irq/migration.c).
    Once,
    /// Not any more; it did.
    Elsewhere,
}

/// A thread of a role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// `worker@1`
    pub role: String,
    /// `tick`
    pub name: String,
    /// Cores that it may run on.
    pub allowed: String,
}

impl Given {
    /// Reads it. `group_of` is where the cgroup of a worker core is; `None` where there is none.
    pub fn read(
        kernel: &impl Kernel,
        cores: &Cores,
        group_of: impl Fn(usize) -> Option<String>,
        processes: &[Process],
    ) -> Self {
        let groups: Vec<(usize, Option<String>)> = cores.workers.iter().map(|core| (*core, group_of(*core))).collect();
        let interrupts = Interrupts::read(kernel);
        let times = kernel.read("/proc/stat").unwrap_or_default();
        let core = |(core, group): &(usize, Option<String>)| {
            let (busy, idle) = times_of(&times, *core);
            let of_group = |file: &str| group.as_ref().and_then(|group| kernel.read(&format!("{group}/{file}")));
            Core {
                core: *core,
                partition: of_group("cpuset.cpus.partition"),
                effective: of_group("cpuset.cpus.effective"),
                ticks: interrupts.count("LOC", *core),
                calls: ["RES", "CAL", "TLB"].iter().map(|kind| interrupts.count(kind, *core)).sum(),
                busy,
                idle,
                interrupts: interrupts.on(*core),
            }
        };
        let mut given = Self {
            housekeeping: list(&cores.housekeeping),
            workers: list(&cores.workers),
            shared: cores.shared(),
            enforced: !cores.shared() && groups.iter().all(|(_, group)| group.is_some()),
            isolated: kernel.read("/sys/fs/cgroup/cpuset.cpus.isolated"),
            new_interrupts: kernel.read("/proc/irq/default_smp_affinity").and_then(|mask| cores_of_mask(&mask)),
            workqueues: kernel.read("/sys/devices/virtual/workqueue/cpumask").and_then(|mask| cores_of_mask(&mask)),
            // A kernel without any prints the address of nothing.
            tickless: kernel
                .read("/sys/devices/system/cpu/nohz_full")
                .filter(|all| !all.contains('('))
                .unwrap_or_default(),
            cores: groups.iter().map(core).collect(),
            ..Self::default()
        };
        given.look_at_threads(kernel, processes);
        if given.enforced {
            given.look_at_cores(cores);
        }
        given
    }

    fn look_at_threads(&mut self, kernel: &impl Kernel, processes: &[Process]) {
        for process in processes {
            let tasks = format!("/proc/{}/task", process.pid);
            let mut threads: Vec<u32> = kernel.names(&tasks).iter().filter_map(|name| name.parse().ok()).collect();
            threads.sort_unstable();
            for thread in threads {
                // Whoever has just ended is not told.
                let Some(status) = kernel.read(&format!("{tasks}/{thread}/status")) else { continue };
                let field =
                    |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
                let Some(allowed) = field("Cpus_allowed_list:") else { continue };
                let name = field("Name:").unwrap_or_default();
                let is_main = u32::try_from(process.pid) == Ok(thread);
                let meant = if is_main { &process.main } else { &process.others };
                if let Some(meant) = meant
                    && !parse_list(&allowed).is_some_and(|allowed| allowed.iter().all(|core| meant.contains(core)))
                {
                    let (role, meant) = (&process.role, list(meant));
                    self.deviations.push(format!("thread {name} of {role} may run on {allowed}, not only on {meant}"));
                }
                self.threads.push(Thread { role: process.role.clone(), name, allowed });
            }
        }
    }

    fn look_at_cores(&mut self, cores: &Cores) {
        let deviations = &mut self.deviations;
        for core in &self.cores {
            let number = core.core;
            match core.partition.as_deref() {
                Some("isolated") => {}
                said => deviations
                    .push(format!("core {number} is not isolated: {}", said.unwrap_or("no word of the kernel"))),
            }
            match core.effective.as_deref().map(parse_list) {
                Some(Some(effective)) if effective == [number] => {}
                _ => {
                    let effective = core.effective.as_deref().unwrap_or("unknown cores");
                    deviations.push(format!("the worker of core {number} has the cores \"{effective}\""));
                }
            }
            for interrupt in core.interrupts.iter().filter(|interrupt| interrupt.fires == Fires::Here) {
                let Interrupt { number: which, name, count, .. } = interrupt;
                deviations.push(format!("interrupt {which} ({name}) may fire on core {number}: {count} did"));
            }
        }
        let on_workers = |where_to: &Option<String>| {
            let all = where_to.as_deref().and_then(parse_list);
            all.is_none_or(|all| all.iter().any(|core| cores.workers.contains(core)))
        };
        for (what, where_to) in [("new interrupts", &self.new_interrupts), ("work queues", &self.workqueues)] {
            if on_workers(where_to) {
                deviations.push(format!("{what} may run on {}", where_to.as_deref().unwrap_or("unknown cores")));
            }
        }
    }

    /// The whole in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { housekeeping, workers, .. } = self;
        if self.shared {
            return format!("workers and all else share {workers}");
        }
        if !self.enforced {
            return format!("workers on {workers}, by their affinity alone; nobody else is kept off");
        }
        let unknown = || "unknown cores".to_owned();
        let (isolated, queues) = [&self.isolated, &self.workqueues].map(|of| of.clone().unwrap_or_else(unknown)).into();
        let all = || self.cores.iter().flat_map(|core| &core.interrupts);
        let here = all().filter(|interrupt| interrupt.fires == Fires::Here).count();
        let devices = match all().filter(|interrupt| interrupt.fires == Fires::Once).count() {
            0 => here.to_string(),
            once => format!("{here}, and {once} once more"),
        };
        let ticks =
            if self.tickless.is_empty() { "on all".to_owned() } else { format!("on all but {}", self.tickless) };
        let deviations = match self.deviations.len() {
            0 => "nothing differs".to_owned(),
            n => format!("{n} deviations"),
        };
        format!(
            "housekeeping on {housekeeping}, workers on {workers}; isolated {isolated}; interrupts that may fire on workers' cores: \
             {devices}; work queues on {queues}; clock ticks {ticks}; {deviations}"
        )
    }
}

/// What a core's line of `/proc/stat` says of its time: at work, and not. What waits for a disk does not work. Nothing of guests is counted,
/// which are in the first two already (Linux, Documentation/filesystems/proc.rst, 1.7).
fn times_of(stat: &str, core: usize) -> (u64, u64) {
    let name = format!("cpu{core} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or_default();
    let mut sums = (0_u64, 0_u64);
    for (at, word) in line.split_whitespace().take(8).enumerate() {
        let sum = if matches!(at, 3 | 4) { &mut sums.1 } else { &mut sums.0 };
        *sum = sum.saturating_add(word.parse().unwrap_or(0));
    }
    sums
}

/// `/proc/interrupts`, and where each may fire.
struct Interrupts {
    /// The columns.
    cores: Vec<usize>,
    rows: Vec<Row>,
}

struct Row {
    label: String,
    counts: Vec<u64>,
    name: String,
    /// Where it is to fire, and what the hardware was told, if the kernel keeps that.
    asked: Vec<usize>,
    told: Option<Vec<usize>>,
}

impl Interrupts {
    fn read(kernel: &impl Kernel) -> Self {
        let text = kernel.read("/proc/interrupts").unwrap_or_default();
        let (cores, rows) = parse_interrupts(&text);
        let row = |(label, counts, name): Counted| {
            let is_device = label.bytes().all(|b| b.is_ascii_digit());
            let place = |file: &str| {
                let text = is_device.then(|| kernel.read(&format!("/proc/irq/{label}/{file}")));
                text.flatten().and_then(|text| parse_list(&text))
            };
            let (asked, told) = (place("smp_affinity_list").unwrap_or_default(), place("effective_affinity_list"));
            Row { label, counts, name, asked, told }
        };
        Self { cores, rows: rows.into_iter().map(row).collect() }
    }

    fn count(&self, label: &str, core: usize) -> u64 {
        let column = self.cores.iter().position(|c| *c == core);
        let row = self.rows.iter().find(|row| row.label == label);
        column.zip(row).and_then(|(column, row)| row.counts.get(column).copied()).unwrap_or(0)
    }

    fn on(&self, core: usize) -> Vec<Interrupt> {
        let one = |row: &Row| {
            let (number, count) = (row.label.parse().ok()?, self.count(&row.label, core));
            let fires = match (row.told.as_ref().unwrap_or(&row.asked).contains(&core), row.asked.contains(&core)) {
                (true, true) => Fires::Here,
                (true, false) => Fires::Once,
                (false, _) => Fires::Elsewhere,
            };
            let matters = fires != Fires::Elsewhere || count > 0;
            matters.then(|| Interrupt { number, name: row.name.clone(), fires, count })
        };
        self.rows.iter().filter_map(one).collect()
    }
}

/// A row of `/proc/interrupts`: its label, its counts, and whose it is.
pub type Counted = (String, Vec<u64>, String);

/// Reads `/proc/interrupts`: the numbers of its columns' cores, and of each row its label, its counts and whose it is. What is no
/// such row is passed over.
#[must_use]
pub fn parse_interrupts(text: &str) -> (Vec<usize>, Vec<Counted>) {
    let mut lines = text.lines();
    let cores = lines.next().unwrap_or_default().split_whitespace();
    let cores: Vec<usize> = cores.filter_map(|core| core.strip_prefix("CPU")?.parse().ok()).collect();
    let row = |line: &str| {
        let (label, mut rest) = line.trim_start().split_once(':')?;
        let mut counts = Vec::new();
        while counts.len() < cores.len() {
            let word = rest.trim_start();
            let end = word.find(' ').unwrap_or(word.len());
            let Ok(count) = word[..end].parse() else { break };
            counts.push(count);
            rest = &word[end..];
        }
        // Chip, number there and kind are in columns; the names of the drivers follow two spaces (Linux, kernel/irq/proc.c).
        let name = rest.trim_end().rsplit("  ").next().unwrap_or_default().trim().to_owned();
        (!label.is_empty() && !counts.is_empty()).then(|| (label.to_owned(), counts, name))
    };
    let rows = lines.filter_map(row).collect();
    (cores, rows)
}

/// The cores of a mask, hexadecimal in words of 32 bits with commas between (Linux,
/// Documentation/core-api/irq/irq-affinity.rst), as a list. `None` for anything else.
fn cores_of_mask(mask: &str) -> Option<String> {
    let mut cores = Vec::new();
    for (place, word) in mask.rsplit(',').enumerate() {
        let word = u32::from_str_radix(word, 16).ok()?;
        cores.extend((0..32).filter(|bit| word & 1 << bit != 0).map(|bit| place * 32 + bit));
    }
    Some(list(&cores))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// As Linux 6.12 writes it on a machine with three cores.
    const INTERRUPTS: &str = "           CPU0       CPU1       CPU2       \n  \
          0:         50          0          0  IO-APIC   2-edge      timer\n  \
          4:        700          3          0  IO-APIC   4-edge      ttyS0\n \
         25:          9          0          4  PCI-MSIX-0000:00:02.0   1-edge      virtio0-input.0, and another\n\
        LOC:       1000         90         80   Local timer interrupts\n\
        RES:          1          2          3   Rescheduling interrupts\n\
        CAL:          4          5          6   Function call interrupts\n\
        TLB:          7          8          9   TLB shootdowns\n\
        ERR:          0\n";

    struct Files(BTreeMap<String, String>);

    impl Kernel for Files {
        fn read(&self, path: &str) -> Option<String> {
            self.0.get(path).cloned()
        }
        fn names(&self, folder: &str) -> Vec<String> {
            let below = self.0.keys().filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/'));
            below.filter_map(|rest| rest.split('/').next()).map(str::to_owned).collect()
        }
    }

    /// A machine on which all is as it was meant.
    fn good() -> Files {
        let mut files = BTreeMap::new();
        let mut put = |path: &str, text: &str| drop(files.insert(path.to_owned(), text.to_owned()));
        put("/proc/interrupts", INTERRUPTS);
        for number in [0, 4, 25] {
            put(&format!("/proc/irq/{number}/effective_affinity_list"), "0");
            put(&format!("/proc/irq/{number}/smp_affinity_list"), "0-2");
        }
        put("/proc/irq/default_smp_affinity", "1");
        put("/sys/devices/virtual/workqueue/cpumask", "00000000,00000001");
        put("/sys/devices/system/cpu/nohz_full", "(null)");
        put("/sys/fs/cgroup/cpuset.cpus.isolated", "1-2");
        for core in [1, 2] {
            put(&format!("/group-{core}/cpuset.cpus.partition"), "isolated");
            put(&format!("/group-{core}/cpuset.cpus.effective"), &core.to_string());
        }
        put("/proc/70/task/70/status", "Name:\tgaia\nCpus_allowed_list:\t1");
        put("/proc/70/task/71/status", "Name:\ttick\nCpus_allowed_list:\t0");
        Files(files)
    }

    fn read(files: &Files) -> Given {
        let worker = Process { role: "worker@1".into(), pid: 70, main: Some(vec![1]), others: Some(vec![0]) };
        Given::read(files, &Cores::divide(&[0, 1, 2]), |core| Some(format!("/group-{core}")), &[worker])
    }

    #[test]
    fn where_all_is_as_meant_nothing_differs_and_the_counts_are_the_kernels() {
        let given = read(&good());
        assert_eq!(given.deviations, [] as [&str; 0]);
        assert_eq!(
            given.line(),
            "housekeeping on 0, workers on 1-2; isolated 1-2; interrupts that may fire on workers' cores: 0; work queues on 0; \
             clock ticks on all; nothing differs"
        );
        let [one, two] = given.cores.as_slice() else { panic!("{given:?}") };
        assert_eq!((one.ticks, one.calls, two.ticks, two.calls), (90, 15, 80, 18));
        let serial = Interrupt { number: 4, name: "ttyS0".into(), fires: Fires::Elsewhere, count: 3 };
        assert_eq!(one.interrupts, [serial], "fired before it was moved");
        assert_eq!(two.interrupts[0].name, "virtio0-input.0, and another");
        let threads: Vec<_> = given.threads.iter().map(|t| (t.name.as_str(), t.allowed.as_str())).collect();
        assert_eq!(threads, [("gaia", "1"), ("tick", "0")]);
        let text = toml::to_string(&given).unwrap();
        assert_eq!(toml::from_str::<Given>(&text).unwrap(), given);
    }

    #[test]
    fn each_deviation_is_told() {
        for (path, text, wanted) in [
            (
                "/group-1/cpuset.cpus.partition",
                "isolated invalid (Parent is not a partition root)",
                &["core 1 is not isolated: isolated invalid (Parent is not a partition root)"][..],
            ),
            ("/group-2/cpuset.cpus.effective", "0-2", &["the worker of core 2 has the cores \"0-2\""]),
            ("/group-2/cpuset.cpus.effective", "", &["the worker of core 2 has the cores \"\""]),
            ("/proc/irq/4/effective_affinity_list", "1", &["interrupt 4 (ttyS0) may fire on core 1: 3 did"]),
            // One that the hardware was not told of, or a kernel that does not say what it was told.
            (
                "/proc/irq/0/effective_affinity_list",
                "",
                &["interrupt 0 (timer) may fire on core 1: 0 did", "interrupt 0 (timer) may fire on core 2: 0 did"],
            ),
            ("/proc/irq/default_smp_affinity", "7", &["new interrupts may run on 0-2"]),
            ("/sys/devices/virtual/workqueue/cpumask", "?", &["work queues may run on unknown cores"]),
            (
                "/proc/70/task/70/status",
                "Name:\tgaia\nCpus_allowed_list:\t0-2",
                &["thread gaia of worker@1 may run on 0-2, not only on 1"],
            ),
            (
                "/proc/70/task/71/status",
                "Name:\ttick\nCpus_allowed_list:\t1",
                &["thread tick of worker@1 may run on 1, not only on 0"],
            ),
        ] {
            let mut files = good();
            files.0.insert(path.into(), text.into());
            assert_eq!(read(&files).deviations, wanted, "{path} {text}");
        }
        let nothing = read(&Files(BTreeMap::new()));
        assert_eq!(nothing.deviations.len(), 6, "silence is a deviation: {:?}", nothing.deviations);
    }

    #[test]
    fn an_interrupt_that_goes_when_it_next_fires_is_told_and_is_no_deviation() {
        let mut files = good();
        files.0.insert("/proc/irq/25/effective_affinity_list".into(), "1".into());
        files.0.insert("/proc/irq/25/smp_affinity_list".into(), "0".into());
        let given = read(&files);
        assert_eq!((given.deviations.len(), given.cores[0].interrupts[1].fires), (0, Fires::Once));
        assert!(given.line().contains("on workers' cores: 0, and 1 once more;"), "{}", given.line());
    }

    #[test]
    fn where_nobody_enforces_it_only_threads_are_meant_to_be_somewhere() {
        let files = Files(BTreeMap::new());
        let given = Given::read(&files, &Cores::divide(&[0, 1, 2]), |_| None, &[]);
        assert!(given.deviations.is_empty() && !given.enforced, "{given:?}");
        assert!(given.line().contains("by their affinity alone"));
        let given = Given::read(&good(), &Cores::divide(&[0, 1]), |core| Some(format!("/group-{core}")), &[]);
        assert!(given.deviations.is_empty() && given.line().contains("share 0-1"), "{given:?}");
    }

    #[test]
    fn the_time_of_a_core_is_read_as_the_kernel_writes_it() {
        let stat = "cpu  90 0 0 900 0 0 0 0 0 0\ncpu1 10 2 30 400 5 6 7 8 9 9\ncpu10 1 1 1 1 1 1 1 1 0 0\nintr 5 0\n";
        assert_eq!(times_of(stat, 1), (10 + 2 + 30 + 6 + 7 + 8, 405));
        assert_eq!(times_of(stat, 10), (6, 2));
        assert_eq!(times_of("cpu1 99999999999999999999 x", 1), (0, 0));
        assert_eq!(times_of(stat, 2), (0, 0));
    }

    #[test]
    fn masks_are_read_as_the_kernel_writes_them() {
        assert_eq!(cores_of_mask("f").unwrap(), "0-3");
        assert_eq!(cores_of_mask("00000001,80000000").unwrap(), "31-32");
        assert_eq!(cores_of_mask(""), None);
        assert_eq!(cores_of_mask("x,1"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_interrupts(text in "( {0,3}(CPU[0-9]|[0-9]{1,3}:|[A-Z]{3}:|[0-9]{1,9}|\\PC{0,9})){0,20}\n?( {0,3}[0-9A-Z]{1,3}:( {1,9}[0-9]{1,20}){0,4}[^\n]{0,20}\n){0,5}") {
            let (cores, rows) = parse_interrupts(&text);
            prop_assert!(rows.iter().all(|(_, counts, _)| counts.len() <= cores.len()));
        }

        #[test]
        fn any_text_is_a_mask_or_none(text in "[0-9a-f,x]{0,30}") {
            let _ = cores_of_mask(&text);
        }
    }
}
