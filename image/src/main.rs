//! `gaia-image`: the parts of an image, one command per part.
//!
//! One line per artefact that was made, with its size and time; nothing when there was nothing to do.

use std::fs;
use std::io::{IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use gaia_image::cpio::{Entry, Kind};
use gaia_image::disk::{self, Disk};
use gaia_image::initramfs::{base, list_mounted, seed_archive};
use gaia_image::kernel::{Builder, Progress, SOURCE, cache_dir, check_config};

/// Makes the parts of a Gaia image.
#[derive(Debug, Parser)]
#[command(name = "gaia-image", version)]
struct Arguments {
    #[command(subcommand)]
    command: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Build the kernel, or take it from the cache: DIR/bzImage and DIR/kernel.config
    Kernel {
        /// Compilers at a time [default: one per processor]
        #[arg(long, value_name = "N")]
        jobs: Option<usize>,
        /// Where the two files go
        #[arg(long, value_name = "DIR")]
        out_dir: PathBuf,
    },
    /// Pack the base initramfs from static binaries
    Initramfs {
        /// The binary for /init
        #[arg(long, value_name = "PATH")]
        init: PathBuf,
        /// The binary for /bin/gaia
        #[arg(long, value_name = "PATH")]
        gaia: PathBuf,
        /// One more file: where it goes, and where it comes from
        #[arg(long, value_name = "/PATH=FILE", value_parser = named_file)]
        extra: Vec<(String, PathBuf)>,
        /// The archive to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Pack settings, graph and components into a seed archive, to be appended to the initramfs
    Seed {
        /// Take every file of this directory, under its own name
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// The device's settings, as gaia.toml
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The graph, as graph.zgraph.toml
        #[arg(long, value_name = "FILE")]
        graph: Option<PathBuf>,
        /// One more file, for what the graph calls `file:./NAME`
        #[arg(long, value_name = "NAME=FILE", value_parser = named_file)]
        file: Vec<(String, PathBuf)>,
        /// The archive to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Make a data disk: a sparse file with an ext4 file system labelled gaia-data
    Disk {
        /// Its size, as 1GiB or 512MiB
        #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = disk::size)]
        size: u64,
        /// Give it an identity of its own, for a device; otherwise the same size gives the same bytes
        #[arg(long)]
        random: bool,
        /// The file to make; one that is there is left alone
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// List the entries of an initramfs, a seed archive, or both in one file, and of the programs' file system in it
    List {
        /// The file
        file: PathBuf,
    },
    /// Compare a kernel configuration with what Gaia requires
    CheckConfig {
        /// The file, `.config` of a kernel
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain on one line, and no backtrace: these errors are for whoever typed the command.
            let _ = writeln!(stderr(), "gaia-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(part: Part) -> anyhow::Result<()> {
    match part {
        Part::Kernel { jobs, out_dir } => kernel(jobs, &out_dir),
        Part::Initramfs { init, gaia, extra, out } => {
            let start = Instant::now();
            let bytes = base(&init, &gaia, &extra)?;
            write_artefact(&out, &bytes)?;
            report("initramfs", &out, bytes.len(), start.elapsed());
            Ok(())
        }
        Part::Seed { dir, config, graph, file, out } => {
            let start = Instant::now();
            let bytes = seed_archive(seed_files(dir.as_deref(), config, graph, file)?)?;
            write_artefact(&out, &bytes)?;
            report("seed", &out, bytes.len(), start.elapsed());
            Ok(())
        }
        Part::Disk { size, random, out } => {
            let start = Instant::now();
            Disk { size, random }.make(&out)?;
            report("data disk", &out, usize::try_from(size)?, start.elapsed());
            Ok(())
        }
        Part::List { file } => {
            let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let entries = list_mounted(&bytes).with_context(|| format!("cannot list {}", file.display()))?;
            let mut out = std::io::stdout().lock();
            for entry in &entries {
                match writeln!(out, "{}", line(entry)) {
                    // `gaia-image list … | head` is no failure.
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break,
                    result => result.context("cannot write the list")?,
                }
            }
            Ok(())
        }
        Part::CheckConfig { file } => {
            let config = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            check_config(&config).with_context(|| format!("{} is not Gaia's", file.display()))
        }
    }
}

fn kernel(jobs: Option<usize>, out_dir: &Path) -> anyhow::Result<()> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = cache_dir(variable("XDG_CACHE_HOME").as_deref(), variable("HOME").as_deref())?;
    let jobs = jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let mut display = Display::new();
    let built = Builder { source: SOURCE.into(), cache, jobs }.kernel(&mut |progress| display.show(progress));
    display.clear();
    let built = built?;

    fs::create_dir_all(out_dir).with_context(|| format!("cannot create {}", out_dir.display()))?;
    let mut changed = false;
    let out = out_dir.join("bzImage");
    let bytes = fs::read(&built.bz_image).with_context(|| format!("cannot read {}", built.bz_image.display()))?;
    for (from, to) in [(&built.config, out_dir.join("kernel.config")), (&built.bz_image, out.clone())] {
        let wanted = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        if fs::read(&to).is_ok_and(|there| there == wanted) {
            // For make: up to date, as of now.
            fs::File::options()
                .append(true)
                .open(&to)
                .and_then(|file| file.set_modified(SystemTime::now()))
                .with_context(|| format!("cannot touch {}", to.display()))?;
        } else {
            write_artefact(&to, &wanted)?;
            changed = true;
        }
    }
    if changed || built.built_in.is_some() {
        report("kernel", &out, bytes.len(), built.built_in.unwrap_or_default());
    }
    Ok(())
}

/// Files for the seed: the directory's, then the named ones, which replace those of the same name.
fn seed_files(
    dir: Option<&Path>,
    config: Option<PathBuf>,
    graph: Option<PathBuf>,
    file: Vec<(String, PathBuf)>,
) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut sources = std::collections::BTreeMap::new();
    if let Some(dir) = dir {
        for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            match name {
                _ if path.is_dir() => bail!("{} is a directory; the seed is flat, move its files up", path.display()),
                Some(name) => sources.insert(name.to_owned(), path.clone()),
                None => bail!("{}: the name is not UTF-8; rename it", path.display()),
            };
        }
    }
    let fixed = [("gaia.toml", config), ("graph.zgraph.toml", graph)];
    sources.extend(fixed.into_iter().filter_map(|(name, path)| Some((name.to_owned(), path?))));
    sources.extend(file);
    if sources.is_empty() {
        bail!("an empty seed; name a directory with --dir, or files with --config, --graph and --file");
    }
    sources
        .into_iter()
        .map(|(name, path)| {
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            Ok((name, bytes))
        })
        .collect()
}

fn named_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), path.into())),
        _ => Err("write it as NAME=FILE".to_owned()),
    }
}

/// Writes beside the target and renames, so that nobody ever boots half a file.
fn write_artefact(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let context = || format!("cannot write {}", path.display());
    fs::create_dir_all(dir).with_context(context)?;
    let mut file = tempfile::Builder::new()
        .prefix(".gaia-image-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(dir)
        .with_context(context)?;
    file.write_all(bytes).with_context(context)?;
    file.persist(path).with_context(context)?;
    Ok(())
}

fn report(what: &str, path: &Path, len: usize, time: Duration) {
    // Tenths of a MiB, or of a KiB below one, in integers.
    let (unit, name) = if len < 1 << 20 { (1 << 10, "KiB") } else { (1 << 20, "MiB") };
    let tenths = (len * 10 + unit / 2) / unit;
    let time = format!("{:.1} s", time.as_secs_f64());
    println!("{what:<10} {:>6}.{} {name} {time:>9}  {}", tenths / 10, tenths % 10, path.display());
}

/// `-rwxr-xr-x     1234567 /bin/gaia`, as `ls -l` has it.
fn line(entry: &Entry) -> String {
    let (kind, size) = match &entry.kind {
        Kind::Directory => ('d', String::new()),
        Kind::File(content) => ('-', content.len().to_string()),
        Kind::CharDevice { major, minor } => ('c', format!("{major}, {minor}")),
        Kind::Symlink(target) => ('l', target.len().to_string()),
        Kind::Other(_) => ('?', String::new()),
    };
    let mut mode: String = (0..9)
        .map(|bit| if entry.permissions & (0o400 >> bit) == 0 { '-' } else { ['r', 'w', 'x'][bit % 3] })
        .collect();
    if entry.permissions & 0o1000 != 0 {
        mode.replace_range(8..9, if mode.ends_with('x') { "t" } else { "T" });
    }
    format!("{kind}{mode} {size:>11} /{}", entry.path.trim_start_matches('/'))
}

/// Progress: one line that changes on a terminal, a line every fifteen seconds elsewhere.
struct Display {
    terminal: bool,
    start: Instant,
    last: Option<Instant>,
}

impl Display {
    fn new() -> Self {
        Self { terminal: stderr().is_terminal(), start: Instant::now(), last: None }
    }

    fn show(&mut self, progress: Progress) {
        let pause = if self.terminal { Duration::from_millis(200) } else { Duration::from_secs(15) };
        let stage = !matches!(progress, Progress::Compiling { done, .. } if done > 0);
        if !stage && self.last.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        self.last = Some(Instant::now());
        let seconds = self.start.elapsed().as_secs();
        let what = match progress {
            Progress::Waiting => "waiting for another build".to_owned(),
            Progress::Tidying => "removing an interrupted build".to_owned(),
            Progress::Unpacking => "unpacking the source".to_owned(),
            Progress::Configuring => "configuring".to_owned(),
            Progress::Compiling { done, total } => format!("compiling {done}/{total}"),
        };
        let text = format!("kernel     {what}, {}:{:02}", seconds / 60, seconds % 60);
        // Progress that cannot be shown is no reason to stop.
        let _ = if self.terminal { write!(stderr(), "\r\x1b[K{text}") } else { writeln!(stderr(), "{text}") };
    }

    fn clear(&self) {
        if self.terminal && self.last.is_some() {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn a_named_file_has_two_halves() {
        assert_eq!(named_file("/bin/x=a=b"), Ok(("/bin/x".to_owned(), "a=b".into())));
        for wrong in ["", "x", "=x", "x="] {
            assert!(named_file(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_line_reads_like_ls() {
        let entry = |path: &str, permissions, kind| Entry { path: path.to_owned(), permissions, kind };
        assert_eq!(line(&entry("bin/gaia", 0o755, Kind::File(vec![0; 1234]))), "-rwxr-xr-x        1234 /bin/gaia");
        assert_eq!(line(&entry("tmp", 0o1777, Kind::Directory)), "drwxrwxrwt             /tmp");
        let console = Kind::CharDevice { major: 5, minor: 1 };
        assert_eq!(line(&entry("dev/console", 0o600, console)), "crw-------        5, 1 /dev/console");
    }

    #[test]
    fn named_files_replace_those_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let seed = dir.path().join("seed");
        fs::create_dir(&seed).unwrap();
        fs::write(seed.join("gaia.toml"), "old").unwrap();
        fs::write(seed.join("x.wasm"), "wasm").unwrap();
        let config = dir.path().join("other.toml");
        fs::write(&config, "new").unwrap();
        let files = seed_files(Some(&seed), Some(config), None, vec![]).unwrap();
        assert_eq!(files, [("gaia.toml".to_owned(), b"new".to_vec()), ("x.wasm".to_owned(), b"wasm".to_vec())]);
        assert!(seed_files(Some(dir.path()), None, None, vec![]).unwrap_err().to_string().contains("is a directory"));
        assert!(seed_files(None, None, None, vec![]).is_err());
    }
}
