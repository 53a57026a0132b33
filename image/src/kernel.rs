//! The kernel: built from the distribution's source with our configuration, once per content.
//!
//! ```text
//! /usr/src/linux-source-6.12.tar.xz ─┐
//! kernel.config (fragment) ──────────┼─ key = sha256(…) ─→ $XDG_CACHE_HOME/gaia/kernel/<key>/{bzImage,config}
//! compiler, linker ──────────────────┘
//!
//! .build-XXXX/   the unpacked source, removed at the end whatever happens
//! <key>.log      what make said, kept when it failed
//! lock           one builder at a time; whoever comes second finds the result
//! ```
//!
//! A result appears by renaming a finished directory, so it is whole or not there. This module runs compilers, and
//! nothing else in the project does; it never prints: progress goes to a callback.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

pub use crate::required::{ConfigMismatch, Difference, REQUIRED, Want, check_config};

/// Where Debian's package `linux-source-6.12` puts the source.
pub const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// The configuration fragment, merged onto `tinyconfig`.
pub const FRAGMENT: &str = include_str!("../kernel.config");

/// Part of the key: raise it when the steps below change what comes out.
const BUILDER_VERSION: u32 = 1;

/// Files compiled for this configuration (counted); for the progress line only.
const OBJECTS_ESTIMATE: usize = 1570;

/// What is needed besides the source, and the Debian packages that bring it.
const TOOLS: [&str; 10] = ["make", "gcc", "ld", "flex", "bison", "bc", "tar", "xz", "zstd", "strip"];
const PACKAGES: &str = "build-essential flex bison bc libelf-dev xz-utils zstd";

const LOG_TAIL_LINES: usize = 30;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The source package is not installed.
    #[error("no kernel source at {}; install it: apt-get install linux-source-6.12", .0.display())]
    NoSource(PathBuf),
    /// Programs the build needs are not installed.
    #[error("building the kernel needs {}; install them: apt-get install {PACKAGES}", .0.join(", "))]
    NoTools(Vec<&'static str>),
    /// Neither `XDG_CACHE_HOME` nor `HOME` says where to keep the result.
    #[error("no place for the cache: neither XDG_CACHE_HOME nor HOME is an absolute path; set one of them")]
    NoCache,
    /// A file could not be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A program of the build could not be started, or not be listened to.
    #[error("cannot run `{program}`: {source}")]
    Run {
        /// The program.
        program: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A program of the build failed.
    #[error("{step} failed ({status}); its last lines:\n{tail}\nthe whole log: {}", log.display())]
    Step {
        /// Which step.
        step: &'static str,
        /// Exit status, as the system words it.
        status: String,
        /// The last 30 lines.
        tail: String,
        /// The log file; it stays until the next build with the same key.
        log: PathBuf,
    },
    /// The build did not come out as required.
    #[error(transparent)]
    Config(#[from] ConfigMismatch),
}

/// What a build is doing, for whoever shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Another process is building; it is waited for.
    Waiting,
    /// The tree of an interrupted build is being removed.
    Tidying,
    /// The source is being unpacked.
    Unpacking,
    /// The configuration is being made.
    Configuring,
    /// Files compiled so far, of about `total`.
    Compiling {
        /// So far.
        done: usize,
        /// An estimate, never below `done`.
        total: usize,
    },
}

/// A kernel in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The image that a boot loader, the UKI or QEMU takes.
    pub bz_image: PathBuf,
    /// The complete configuration it was built with.
    pub config: PathBuf,
    /// How long the build took; `None` if it was there already.
    pub built_in: Option<Duration>,
}

/// Where things come from and go to.
#[derive(Debug, Clone)]
pub struct Builder {
    /// The source tarball; [`SOURCE`] unless a test says otherwise.
    pub source: PathBuf,
    /// The directory that holds the results; see [`cache_dir`].
    pub cache: PathBuf,
    /// Compilers at a time.
    pub jobs: usize,
}

/// `${XDG_CACHE_HOME:-$HOME/.cache}/gaia/kernel`, from these two variables' values.
///
/// # Errors
/// [`KernelError::NoCache`]; relative paths count as unset, as the XDG specification has it.
pub fn cache_dir(xdg_cache_home: Option<&Path>, home: Option<&Path>) -> Result<PathBuf, KernelError> {
    let absolute = |path: &&Path| path.is_absolute();
    let base = match (xdg_cache_home.filter(absolute), home.filter(absolute)) {
        (Some(cache), _) => cache.to_owned(),
        (None, Some(home)) => home.join(".cache"),
        (None, None) => return Err(KernelError::NoCache),
    };
    Ok(base.join("gaia/kernel"))
}

impl Builder {
    /// The kernel from the cache, built first if it is not there. A cached one is checked again, it costs nothing.
    ///
    /// # Errors
    /// [`KernelError`]; nothing that is incomplete or configured otherwise is ever left in the cache.
    pub fn kernel(&self, progress: &mut dyn FnMut(Progress)) -> Result<Kernel, KernelError> {
        let missing: Vec<_> = TOOLS.into_iter().filter(|tool| !in_path(tool)).collect();
        if !missing.is_empty() {
            return Err(KernelError::NoTools(missing));
        }
        let key = self.key()?;
        if let Some(kernel) = self.cached(&key)? {
            return Ok(kernel);
        }
        fs::create_dir_all(&self.cache).map_err(io_error("create", &self.cache))?;
        // Held until this function returns, or this process ends in whatever way.
        let _lock = self.lock(progress)?;
        if let Some(kernel) = self.cached(&key)? {
            return Ok(kernel);
        }
        self.remove_interrupted(progress)?;
        let start = Instant::now();
        self.build(&key, progress)?;
        let built = self.cached(&key)?.ok_or_else(|| KernelError::Io {
            what: "find what was just put into",
            path: self.cache.join(&key),
            source: io::ErrorKind::NotFound.into(),
        })?;
        Ok(Kernel { built_in: Some(start.elapsed()), ..built })
    }

    /// What the result depends on, as the name of its directory.
    fn key(&self) -> Result<String, KernelError> {
        let mut source = File::open(&self.source).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => KernelError::NoSource(self.source.clone()),
            _ => io_error("read", &self.source)(error),
        })?;
        let mut tarball = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match source.read(&mut buffer).map_err(io_error("read", &self.source))? {
                0 => break,
                len => tarball.update(&buffer[..len]),
            }
        }
        let mut key = Sha256::new();
        for part in [
            &BUILDER_VERSION.to_le_bytes()[..],
            FRAGMENT.as_bytes(),
            &tarball.finalize(),
            &version_line("gcc")?,
            &version_line("ld")?,
        ] {
            key.update((part.len() as u64).to_le_bytes());
            key.update(part);
        }
        // Half of the digest is plenty against accidents, and keeps paths readable.
        Ok(key.finalize()[..16].iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}")))
    }

    fn cached(&self, key: &str) -> Result<Option<Kernel>, KernelError> {
        let dir = self.cache.join(key);
        let (bz_image, config) = (dir.join("bzImage"), dir.join("config"));
        if !bz_image.is_file() || !config.is_file() {
            return Ok(None);
        }
        check_config(&fs::read_to_string(&config).map_err(io_error("read", &config))?)?;
        Ok(Some(Kernel { bz_image, config, built_in: None }))
    }

    fn lock(&self, progress: &mut dyn FnMut(Progress)) -> Result<File, KernelError> {
        let path = self.cache.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("open the lock", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                progress(Progress::Waiting);
                file.lock().map_err(io_error("lock", &path))?;
            }
            Err(fs::TryLockError::Error(source)) => return Err(io_error("lock", &path)(source)),
        }
        Ok(file)
    }

    /// Trees of builders that were killed. Only with the lock held: then none of them is alive.
    fn remove_interrupted(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), KernelError> {
        for entry in fs::read_dir(&self.cache).map_err(io_error("list", &self.cache))? {
            let entry = entry.map_err(io_error("list", &self.cache))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".build-") {
                progress(Progress::Tidying);
                fs::remove_dir_all(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    fn build(&self, key: &str, progress: &mut dyn FnMut(Progress)) -> Result<(), KernelError> {
        let work = tempfile::Builder::new()
            .prefix(".build-")
            .tempdir_in(&self.cache)
            .map_err(io_error("make a build directory in", &self.cache))?;
        let tree = work.path().join("linux");
        let result = work.path().join("result");
        for dir in [&tree, &result] {
            fs::create_dir(dir).map_err(io_error("create", dir))?;
        }
        let log_path = self.cache.join(format!("{key}.log"));
        let mut log = Log { file: File::create(&log_path).map_err(io_error("create", &log_path))?, path: log_path };

        progress(Progress::Unpacking);
        let mut tar = Command::new("tar");
        tar.arg("--extract")
            .arg("--no-same-owner")
            .arg("--strip-components=1")
            .arg("--directory")
            .arg(&tree)
            .arg("--file")
            .arg(&self.source);
        log.run("unpacking the kernel source", "tar", &mut tar, &mut |_| {})?;

        progress(Progress::Configuring);
        let fragment = work.path().join("fragment");
        fs::write(&fragment, FRAGMENT).map_err(io_error("write", &fragment))?;
        log.run("configuring the kernel", "make", make(&tree).arg("tinyconfig"), &mut |_| {})?;
        let mut merge = Command::new("scripts/kconfig/merge_config.sh");
        merge.current_dir(&tree).arg("-m").arg(".config").arg(&fragment);
        log.run("merging the configuration", "merge_config.sh", &mut merge, &mut |_| {})?;
        log.run("configuring the kernel", "make", make(&tree).arg("olddefconfig"), &mut |_| {})?;
        let config = tree.join(".config");
        // Now, not after minutes of compiling.
        check_config(&fs::read_to_string(&config).map_err(io_error("read", &config))?)?;

        let mut done = 0;
        progress(Progress::Compiling { done, total: OBJECTS_ESTIMATE });
        let mut compile = make(&tree);
        compile.arg(format!("-j{}", self.jobs.max(1))).arg("bzImage");
        log.run("compiling the kernel", "make", &mut compile, &mut |line| {
            if line.starts_with("  CC ") || line.starts_with("  AS ") {
                done += 1;
                progress(Progress::Compiling { done, total: OBJECTS_ESTIMATE.max(done) });
            }
        })?;

        // What was built, not what was meant to be: make may have asked Kconfig again.
        check_config(&fs::read_to_string(&config).map_err(io_error("read", &config))?)?;
        for (from, to) in [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")] {
            let (from, to) = (tree.join(from), result.join(to));
            fs::copy(&from, &to).map_err(io_error("copy", &from))?;
            File::open(&to).and_then(|file| file.sync_all()).map_err(io_error("write", &to))?;
        }
        let place = self.cache.join(key);
        if place.exists() {
            // A directory without its files: somebody tidied up by hand.
            fs::remove_dir_all(&place).map_err(io_error("remove", &place))?;
        }
        fs::rename(&result, &place).map_err(io_error("move the result to", &place))?;
        fs::remove_file(&log.path).map_err(io_error("remove", &log.path))
    }
}

/// make in the tree, in an environment of our own: flags and variables of a make that called us must not leak in, and
/// what is compiled into the kernel about its build is always the same.
fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    command.arg("--directory").arg(tree).arg("--no-print-directory");
    command
}

fn fixed_environment(command: &mut Command) {
    let kept = ["PATH", "HOME", "TMPDIR"].map(|name| (name, std::env::var_os(name)));
    command.env_clear();
    for (name, value) in kept {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    command
        .env("LC_ALL", "C")
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
        .env("KBUILD_BUILD_USER", "gaia")
        .env("KBUILD_BUILD_HOST", "gaia")
        .env("KBUILD_BUILD_VERSION", "1");
}

/// Everything the build's programs say.
struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    /// Runs one program to its end, copies its output into the log, and shows each line to `line`.
    fn run(
        &mut self,
        step: &'static str,
        program: &'static str,
        command: &mut Command,
        line: &mut dyn FnMut(&str),
    ) -> Result<(), KernelError> {
        let run_error = |source| KernelError::Run { program, source };
        fixed_environment(command);
        let (reader, writer) = io::pipe().map_err(run_error)?;
        command.stdin(Stdio::null()).stdout(writer.try_clone().map_err(run_error)?).stderr(writer);
        let mut child = command.spawn().map_err(run_error)?;
        // The command holds the pipe's other end: without this there would be no end of file.
        command.stdout(Stdio::null()).stderr(Stdio::null());

        let mut reader = BufReader::new(reader);
        let mut tail = std::collections::VecDeque::with_capacity(LOG_TAIL_LINES);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).map_err(run_error)? > 0 {
            self.file.write_all(&bytes).map_err(io_error("write", &self.path))?;
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            line(&text);
            if tail.len() == LOG_TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(text);
            bytes.clear();
        }
        let status = child.wait().map_err(run_error)?;
        if status.success() {
            return Ok(());
        }
        let tail: Vec<_> = tail.into_iter().map(|line| format!("  {line}")).collect();
        Err(KernelError::Step { step, status: status.to_string(), tail: tail.join("\n"), log: self.path.clone() })
    }
}

fn version_line(program: &'static str) -> Result<Vec<u8>, KernelError> {
    let output = Command::new(program)
        .arg("--version")
        .env("LC_ALL", "C")
        .output()
        .map_err(|source| KernelError::Run { program, source })?;
    Ok(output.stdout.split(|byte| *byte == b'\n').next().unwrap_or_default().to_vec())
}

fn in_path(tool: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_owned();
    move |source| KernelError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(dir: &Path, source: &[u8]) -> Builder {
        let path = dir.join("source.tar.xz");
        fs::write(&path, source).unwrap();
        Builder { source: path, cache: dir.join("cache"), jobs: 1 }
    }

    /// A source package whose make "compiles" by running this recipe.
    fn fake_source(dir: &Path, bz_image: &str) -> Vec<u8> {
        let tree = dir.join("linux-source-0");
        fs::create_dir_all(tree.join("scripts/kconfig")).unwrap();
        fs::create_dir_all(tree.join("arch/x86/boot")).unwrap();
        let config: String = REQUIRED
            .iter()
            .map(|(symbol, want)| match want {
                Want::Unset => String::new(),
                other => format!("CONFIG_{symbol}={other}\n"),
            })
            .collect();
        fs::write(tree.join("right"), config).unwrap();
        let makefile =
            format!("tinyconfig:\n\t@touch .config\nolddefconfig:\n\t@cp right .config\nbzImage:\n{bz_image}");
        fs::write(tree.join("Makefile"), makefile).unwrap();
        let merge = tree.join("scripts/kconfig/merge_config.sh");
        fs::write(&merge, "#!/bin/sh\ntest \"$1\" = -m && grep -q CONFIG_ \"$3\"\n").unwrap();
        fs::set_permissions(&merge, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let tarball = dir.join("fake.tar.xz");
        let packed = Command::new("tar").arg("-C").arg(dir).arg("-cJf").arg(&tarball).arg("linux-source-0").status();
        assert!(packed.unwrap().success());
        fs::read(tarball).unwrap()
    }

    const COMPILES: &str = "\t@echo '  CC      a.o'\n\t@echo '  AS      b.o'\n\t@printf %s \"$$KBUILD_BUILD_USER\" > arch/x86/boot/bzImage\n";

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_kernel_is_built_once_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let builder = builder(dir.path(), &fake_source(dir.path(), COMPILES));
        let mut seen = Vec::new();
        let kernel = builder.kernel(&mut |progress| seen.push(progress)).unwrap();
        assert!(kernel.built_in.is_some());
        assert_eq!(fs::read(&kernel.bz_image).unwrap(), b"gaia");
        assert_eq!(seen[..2], [Progress::Unpacking, Progress::Configuring]);
        assert_eq!(seen.last(), Some(&Progress::Compiling { done: 2, total: OBJECTS_ESTIMATE }));
        assert_eq!(names(&builder.cache), [builder.key().unwrap().as_str(), "lock"]);
        let again = builder.kernel(&mut |progress| panic!("{progress:?} for a cached kernel")).unwrap();
        assert_eq!(again, Kernel { built_in: None, ..kernel });
    }

    #[test]
    fn what_a_killed_builder_left_is_no_result() {
        let dir = tempfile::tempdir().unwrap();
        let builder = builder(dir.path(), &fake_source(dir.path(), COMPILES));
        let key = builder.key().unwrap();
        fs::create_dir_all(builder.cache.join(".build-dead/linux")).unwrap();
        fs::create_dir_all(builder.cache.join(&key)).unwrap();
        fs::write(builder.cache.join(&key).join("bzImage"), "half").unwrap();
        let kernel = builder.kernel(&mut |_| {}).unwrap();
        assert_eq!(fs::read(&kernel.bz_image).unwrap(), b"gaia");
        assert_eq!(names(&builder.cache), [key.as_str(), "lock"]);
    }

    #[test]
    fn two_builders_make_one_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let builder = builder(dir.path(), &fake_source(dir.path(), COMPILES));
        let built = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| builder.kernel(&mut |_| {}).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).filter(|kernel| kernel.built_in.is_some()).count()
        });
        assert_eq!(built, 1);
    }

    #[test]
    fn a_failed_build_shows_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = "\t@for i in $$(seq 1 50); do echo line $$i; done\n\t@echo 'cc1: out of luck' >&2; false\n";
        let builder = builder(dir.path(), &fake_source(dir.path(), recipe));
        let error = builder.kernel(&mut |_| {}).unwrap_err();
        let KernelError::Step { step, tail, log, .. } = &error else { panic!("{error}") };
        assert_eq!(*step, "compiling the kernel");
        assert!(tail.contains("cc1: out of luck") && tail.contains("line 50") && !tail.contains("line 10\n"), "{tail}");
        assert!(fs::read_to_string(log).unwrap().contains("line 10\n"));
        assert_eq!(names(&builder.cache), [format!("{}.log", builder.key().unwrap()), "lock".to_owned()]);
    }

    #[test]
    fn a_kernel_configured_otherwise_does_not_enter_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        // The configuration changes while compiling, after the first check.
        let recipe = format!("{COMPILES}\t@echo CONFIG_MODULES=y >> .config\n");
        let builder = builder(dir.path(), &fake_source(dir.path(), &recipe));
        let error = builder.kernel(&mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("CONFIG_MODULES: wanted not set, found y"), "{error}");
        assert!(!builder.cache.join(builder.key().unwrap()).exists());
    }

    #[test]
    fn the_key_follows_the_source() {
        let dir = tempfile::tempdir().unwrap();
        let one = builder(dir.path(), b"one").key().unwrap();
        let two = builder(dir.path(), b"two").key().unwrap();
        assert_ne!(one, two);
        assert_eq!(one.len(), 32);
    }

    #[test]
    fn a_missing_source_says_what_to_install() {
        let builder = Builder { source: "/nonexistent.tar.xz".into(), cache: "/nonexistent".into(), jobs: 1 };
        let message = builder.kernel(&mut |_| {}).unwrap_err().to_string();
        assert!(message.contains("/nonexistent.tar.xz") && message.contains("linux-source-6.12"), "{message}");
    }

    #[test]
    fn the_cache_is_where_xdg_says() {
        let path = |text: &'static str| Some(Path::new(text));
        assert_eq!(cache_dir(path("/c"), path("/h")).unwrap(), Path::new("/c/gaia/kernel"));
        assert_eq!(cache_dir(None, path("/h")).unwrap(), Path::new("/h/.cache/gaia/kernel"));
        assert_eq!(cache_dir(path("relative"), path("/h")).unwrap(), Path::new("/h/.cache/gaia/kernel"));
        assert!(matches!(cache_dir(None, None), Err(KernelError::NoCache)));
    }

    #[test]
    fn the_fragment_says_what_the_table_wants() {
        // The table may want what Kconfig derives; but where both speak of a symbol, they must agree.
        for (symbol, want) in REQUIRED {
            let set = format!("CONFIG_{symbol}=");
            let unset = format!("# CONFIG_{symbol} is not set");
            for line in FRAGMENT.lines() {
                if let Some(value) = line.strip_prefix(&set) {
                    assert_eq!(value, want.to_string(), "{symbol}");
                } else if line == unset {
                    assert_eq!(*want, Want::Unset, "{symbol}");
                }
            }
        }
    }
}
