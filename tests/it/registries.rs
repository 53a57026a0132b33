//! Components in registries, against one that is: Debian's `docker-registry`, started here on the loopback. `gaia run --data` serves,
//! and an appliance reaches it at the other end of QEMU's user network.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gaia_qemu::Drive;
use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{BOOT_WITHIN, Setup, data_disk, out};
use serde_json::Value;

use crate::remote::{Person, started_with};

/// How long the registry may take to listen.
const READY: Duration = Duration::from_mins(1);
/// User `omega`, password `hunter2`, in the form of htpasswd(1).
const HTPASSWD: &str = "omega:$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n";
/// What is served before anything is deployed.
const FIRST: &str = "[brane.hello]\nimage = \"file:./hello.wasm\"\nreplicas = 1\n";

/// A registry of its own for a test, without TLS; dropped, it is killed and what it stored goes.
struct Docker {
    child: Child,
    port: u16,
    files: tempfile::TempDir,
}

impl Docker {
    fn start(with_password: bool) -> Self {
        let files = tempfile::tempdir().unwrap();
        fs::write(files.path().join("passwords"), HTPASSWD).unwrap();
        // Between choosing a port and listening on it somebody else may take it.
        let started = (0..5).find_map(|_| {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let at = files.path().display();
            let auth = format!("auth: {{htpasswd: {{realm: registry, path: {at}/passwords}}}}\n");
            let config = format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
                 storage: {{filesystem: {{rootdirectory: {at}/store}}}}\nhttp:\n  addr: 127.0.0.1:{port}\n  secret: none\n{}",
                if with_password { auth.as_str() } else { "" }
            );
            fs::write(files.path().join("config.yml"), config).unwrap();
            serve(files.path(), port).map(|child| (child, port))
        });
        assert!(started.is_some(), "{}", fs::read_to_string(files.path().join("log")).unwrap());
        let (child, port) = started.unwrap();
        Self { child, port, files }
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Again, with what it stored, on the same port.
    fn go_on(&mut self) {
        self.child = serve(self.files.path(), self.port).unwrap();
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(folder: &Path, port: u16) -> Option<Child> {
    let log = || Stdio::from(File::options().create(true).append(true).open(folder.join("log")).unwrap());
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(folder.join("config.yml")).env_clear().env("OTEL_TRACES_EXPORTER", "none");
    let started = command.stdin(Stdio::null()).stdout(log()).stderr(log()).spawn();
    assert!(started.is_ok(), "docker-registry is not installed: make setup");
    let mut child = started.unwrap();
    let until = Instant::now() + READY;
    while Instant::now() < until {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Some(child);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// The same component with another digest: a custom section is behind it (WebAssembly, section 5.5.3).
fn distinct(component: &[u8], by: u8) -> Vec<u8> {
    [component, &[0, 5, 3], b"tag", &[b'0' + by]].concat()
}

fn hello() -> Vec<u8> {
    fs::read(out("branes/hello.wasm")).unwrap()
}

/// A folder with a manifest for the beginning, two components, and the registries as an operator keeps them.
fn folder(docker: &Docker, password: &str) -> Folder {
    let folder = Folder::with(FIRST).unwrap();
    folder.put("one.wasm", distinct(&hello(), 1)).unwrap();
    folder.put("two.wasm", distinct(&hello(), 2)).unwrap();
    listed(&folder, &docker.host(), password);
    folder
}

fn listed(folder: &Folder, host: &str, password: &str) {
    let who =
        if password.is_empty() { String::new() } else { format!("user = \"omega\"\npassword = \"{password}\"\n") };
    let text = format!("[registry]\ndefault = \"{host}\"\n[registries.\"{host}\"]\nplain_http = true\n{who}");
    folder.put("registries.toml", text).unwrap();
    let path = folder.path().join("registries.toml");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn run(folder: &Folder) -> Run {
    folder.run(&["--data", "data", "--workers", "1", "--registries", "registries.toml"]).unwrap()
}

/// Puts a component into a registry; the name that pins it.
fn push(run: &Run, name: &str, file: &str) -> String {
    let (status, output, error) = run.gaia(&["push", "--registries", "registries.toml", name, file]).unwrap();
    assert!(status.success(), "{error}");
    let pinned = output.strip_prefix("✓ ").and_then(|rest| rest.lines().next()).unwrap().to_owned();
    assert!(pinned.starts_with(&format!("{name}@sha256:")), "{output}");
    pinned
}

/// Deploys `hello` from this image: what it complained of, if it did not.
fn deploy(run: &Run, folder: &Folder, image: &str) -> Result<(), String> {
    folder.put("graph.toml", format!("[brane.hello]\nimage = \"{image}\"\nreplicas = 1\n")).unwrap();
    let (status, output, error) = run.gaia(&["deploy", "graph.toml"]).unwrap();
    if status.success() { Ok(()) } else { Err(output + &error) }
}

/// Which of the two components serves.
fn serves(run: &Run) -> u8 {
    assert_eq!(run.get("/hello").unwrap().status, 200);
    let graphs = run.ask("graphs").unwrap();
    let current = graphs["graphs"].as_array().unwrap().iter().find(|graph| graph["current"] == true).unwrap();
    let digest = current["images"].as_object().unwrap().values().next().unwrap().as_str().unwrap();
    (1..=2).find(|which| digest == digest_of(*which)).unwrap_or(0)
}

fn digest_of(which: u8) -> String {
    gaia_store::Digest::of(&distinct(&hello(), which)).to_string()
}

/// Where the store has one of the two components.
fn stored(folder: &Folder, which: u8) -> PathBuf {
    folder.path().join("data/components").join(digest_of(which).trim_start_matches("sha256:"))
}

/// Damages it, and forgets its machine code, so that it is read the next time.
fn harm(folder: &Folder, which: u8) {
    let path = stored(folder, which);
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let digest = digest_of(which);
    for entry in fs::read_dir(folder.path().join("data/artefacts")).unwrap().map(Result::unwrap) {
        if entry.file_name().to_string_lossy().starts_with(digest.trim_start_matches("sha256:")) {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

/// Would miss: a tag that is not asked for when it is deployed, a digest for which a registry is asked though it is here, and a registry
/// that is away and takes something with it.
#[test]
fn a_tag_is_asked_for_at_each_deploy_and_a_digest_that_is_here_of_nobody() {
    let mut docker = Docker::start(true);
    let folder = folder(&docker, "hunter2");
    let host = docker.host();
    let run = self::run(&folder).serving().unwrap();
    let tag = format!("{host}/omega/hello:1");

    let one = push(&run, &tag, "one.wasm");
    assert_eq!(push(&run, &tag, "one.wasm"), one, "the same has the same digest");
    deploy(&run, &folder, &tag).unwrap();
    assert_eq!(serves(&run), 1);
    let two = push(&run, &tag, "two.wasm");
    assert_ne!(one, two);
    deploy(&run, &folder, &tag).unwrap();
    assert_eq!(serves(&run), 2, "the tag has moved on");
    // A name without a registry is looked for in the default one.
    deploy(&run, &folder, "omega/hello:1").unwrap();
    deploy(&run, &folder, &one).unwrap();
    assert_eq!(serves(&run), 1);

    docker.stop();
    let error = deploy(&run, &folder, &tag).unwrap_err();
    for words in ["graph.toml:2:9", &format!("pull {tag}: {host}: connect:"), &format!("pin that: image = \"{two}\"")] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let error = deploy(&run, &folder, "omega/hello:1").unwrap_err();
    assert!(error.contains("graph.toml:2:9") && error.contains("connect:"), "{error}");
    assert_eq!(serves(&run), 1, "nothing is changed");
    deploy(&run, &folder, &two).unwrap();
    assert_eq!(serves(&run), 2);
    // By the digest of the component, as in the store.
    deploy(&run, &folder, &format!("{tag}@{}", digest_of(1))).unwrap();
    assert_eq!(serves(&run), 1);
    assert!(run.gaia(&["rollback"]).unwrap().0.success());
    assert_eq!(serves(&run), 2);
    assert!(run.interrupt().unwrap().success());

    let again = self::run(&folder).serving().unwrap();
    assert_eq!(serves(&again), 2);
    docker.go_on();
    deploy(&again, &folder, &tag).unwrap();
    assert!(again.interrupt().unwrap().success());
}

/// Would miss: a registry that is asked though nobody has named it, one that is not told who asks or is told the wrong, and a
/// password that is seen.
#[test]
fn what_is_refused_says_where_and_why_and_changes_nothing() {
    let docker = Docker::start(true);
    let folder = folder(&docker, "hunter2");
    let host = docker.host();
    let tag = format!("{host}/omega/hello:1");
    let right = self::run(&folder).serving().unwrap();
    push(&right, &tag, "one.wasm");
    deploy(&right, &folder, &tag).unwrap();
    let before = right.ask("graphs").unwrap();
    for (image, words) in [
        ("registry.example/omega/hello:1", "which the operator has not named"),
        ("localhost:1/omega/hello:1", "[registries.\"localhost:1\"]"),
        ("ghcr.io/omega/hello:1", "--registry ghcr.io"),
        (format!("{host}/omega/hello:none").as_str(), "has no such manifest (404)"),
        (format!("{host}/omega/hello:1@sha256:{}", "0".repeat(64)).as_str(), "neither the manifest nor the component"),
        ("omega/none:1", "has no such manifest"),
    ] {
        let error = deploy(&right, &folder, image).unwrap_err();
        assert!(error.contains("graph.toml:2:9") && error.contains(words), "{image}: {error}");
    }
    assert_eq!(right.ask("graphs").unwrap(), before);
    // Nothing of it is on a command line or in an environment.
    let launcher = right.pid();
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    assert!(children.split_whitespace().count() > 2, "{children}");
    for process in children.split_whitespace().chain([launcher.to_string().as_str()]) {
        for file in ["cmdline", "environ"] {
            let seen = fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&seen).contains("hunter2"), "{process}: {file}");
        }
    }
    let said = right.error.all().join("\n");
    assert!(!said.contains("hunter2"), "{said}");
    assert!(right.interrupt().unwrap().success());

    for (password, words) in [("wrong", "does not accept the credentials"), ("", "asks for credentials (401")] {
        listed(&folder, &host, password);
        let run = self::run(&folder).serving().unwrap();
        assert_eq!(serves(&run), 1, "a start asks nobody");
        let error = deploy(&run, &folder, &tag).unwrap_err();
        assert!(error.contains("graph.toml:2:9") && error.contains(words), "{error}");
        let pushed = run.gaia(&["push", "--registries", "registries.toml", &tag, "two.wasm"]).unwrap();
        assert!(!pushed.0.success() && pushed.2.contains(words), "{}", pushed.2);
        assert_eq!((serves(&run), run.ask("graphs").unwrap()), (1, before.clone()));
        assert!(run.interrupt().unwrap().success());
    }
    fs::set_permissions(folder.path().join("registries.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    listed(&folder, &host, "hunter2");
    fs::set_permissions(folder.path().join("registries.toml"), fs::Permissions::from_mode(0o644)).unwrap();
    let mut open = self::run(&folder);
    open.error.line("chmod 600").unwrap();
    assert!(!open.end().unwrap().success());
}

/// Would miss: a component that is lost for ever though its registry has it, a start that waits for a registry, and what a start lacked
/// that is never served again.
#[test]
fn what_is_lost_is_fetched_again_where_it_came_from() {
    let mut docker = Docker::start(false);
    let folder = folder(&docker, "");
    let tag = format!("{}/omega/hello:1", docker.host());
    let run = self::run(&folder).serving().unwrap();
    push(&run, &tag, "one.wasm");
    deploy(&run, &folder, &tag).unwrap();
    // Its machine code is not in memory any more, nor does its tag lead to it.
    push(&run, &tag, "two.wasm");
    deploy(&run, &folder, &tag).unwrap();
    harm(&folder, 1);
    assert!(run.gaia(&["rollback"]).unwrap().0.success());
    run.error.line(&format!("{} was lost, and is fetched again from {tag}@sha256:", digest_of(1))).unwrap();
    assert_eq!(serves(&run), 1);
    assert_eq!(fs::read(stored(&folder, 1)).unwrap(), distinct(&hello(), 1));
    assert!(run.interrupt().unwrap().success());

    // A start serves what is whole, here the graph before, and the lost one when its registry is there again.
    harm(&folder, 1);
    docker.stop();
    let run = self::run(&folder).serving().unwrap();
    run.error.line("graph 1 does not serve yet, and that is tried again").unwrap();
    docker.go_on();
    run.error.line("graph 1 serves: what it lacked has been fetched").unwrap();
    assert_eq!(serves(&run), 1);
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: `gaia run` without a store, for which a manifest that names a registry is nothing.
#[test]
fn a_graph_of_a_registry_runs_without_a_store() {
    let docker = Docker::start(false);
    let folder = folder(&docker, "");
    let tag = format!("{}/omega/hello:1", docker.host());
    let (status, _, error) = pushed(&folder, &["--registries", "registries.toml", &tag, "one.wasm"]);
    assert!(status, "{error}");
    folder.write(&format!("[brane.hello]\nimage = \"{tag}\"\nreplicas = 1\n")).unwrap();
    let run = folder.run(&["--workers", "1", "--registries", "registries.toml"]).unwrap().serving().unwrap();
    assert_eq!(run.get("/hello").unwrap().status, 200);
    assert!(run.interrupt().unwrap().success());
    // It has no TLS, and nobody says so.
    let mut run = folder.run(&["--workers", "1", "--registry", &docker.host()]).unwrap();
    run.error.line("g.zgraph.toml:2:9").unwrap();
    assert!(!run.end().unwrap().success());
    let said = run.error.all().join("\n");
    assert!(said.contains("plain_http = true"), "{said}");

    // As `docker login` leaves it, without its own file.
    fs::create_dir(folder.path().join("docker")).unwrap();
    let docker = Docker::start(true);
    let tag = format!("{}/omega/hello:1", docker.host());
    folder
        .put(
            "docker/config.json",
            format!("{{\"auths\": {{\"{}\": {{\"auth\": \"b21lZ2E6aHVudGVyMg==\"}}}}}}", docker.host()),
        )
        .unwrap();
    fs::set_permissions(folder.path().join("docker/config.json"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(folder.path().join("gaia")).unwrap();
    let plain = format!("[registries.\"{}\"]\nplain_http = true\n", docker.host());
    folder.put("gaia/registries.toml", plain).unwrap();
    let (status, output, error) = pushed(&folder, &["--json", &tag, "two.wasm"]);
    assert!(status, "{error}");
    let told: Value = serde_json::from_str(&output).unwrap();
    assert_eq!((told["name"].as_str(), told["digest"].as_str()), (Some(tag.as_str()), Some(digest_of(2).as_str())));
}

/// `gaia push` in the folder, without an appliance: success, standard output and error.
fn pushed(folder: &Folder, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(out("bin/gaia"));
    command.arg("push").args(arguments).current_dir(folder.path()).stdin(Stdio::null());
    command.env("XDG_CONFIG_HOME", folder.path()).env("DOCKER_CONFIG", folder.path().join("docker"));
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// A server that says to everybody that tokens are to be had on a port that nobody named.
fn misleading() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(
                b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer realm=\"https://1.1.1.1:8444/token\",service=\"x\"\r\n\
                  content-length: 0\r\nconnection: close\r\n\r\n",
            );
        }
    });
    port
}

/// Would miss: a registry of `gaia.toml` that control's sandbox keeps it from, or a port beyond those of the registries that it
/// does not.
#[test]
fn an_appliance_reaches_the_registries_of_its_settings_and_no_other_port() {
    let docker = Docker::start(true);
    let at = tempfile::tempdir().unwrap();
    for which in 1..=2 {
        fs::write(at.path().join(format!("{which}.wasm")), distinct(&hello(), which)).unwrap();
    }
    let listed =
        |host: &str| format!("[registries.\"{host}\"]\nplain_http = true\nuser = \"omega\"\npassword = \"hunter2\"\n");
    // The same registry, from here and from there.
    let (here, there) = (docker.host(), format!("10.0.2.2:{}", docker.port));
    let registries = at.path().join("registries.toml");
    fs::write(&registries, listed(&here)).unwrap();
    fs::set_permissions(&registries, fs::Permissions::from_mode(0o600)).unwrap();
    let ann = Person::new();
    for which in 1..=2 {
        let (name, file) = (format!("{here}/omega/hello:{which}"), at.path().join(format!("{which}.wasm")));
        // Nobody listens there: no appliance is asked.
        let [registries, file] = [&registries, &file].map(|path| path.to_str().unwrap());
        ann.does(1, &["push", "--registries", registries, &name, file]);
    }

    let misled = misleading();
    let more = listed(&there) + &listed(&format!("10.0.2.2:{misled}"));
    let disk = data_disk().unwrap();
    let manifest = |image: &str| format!("[brane.hello]\nimage = \"{image}\"\nreplicas = 1\n");
    let graph = |image: &str| {
        let path = at.path().join("graph.toml");
        fs::write(&path, manifest(image)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // The seed's graph is in the registry alone: the start does not wait for it.
    let setup = Setup::default().graph(manifest(&format!("{there}/omega/hello:1"))).data(Drive::file(&disk)).open();
    let (appliance, key) = started_with(&ann, setup, &more);
    let port = appliance.control_port().unwrap();
    ann.does(port, &["trust", &key.to_string()]);
    appliance.line("the seed's graph serves: what it lacked has been fetched", BOOT_WITHIN).unwrap();
    assert_eq!(appliance.get("/hello").unwrap().status, 200);
    ann.does(port, &["deploy", &graph(&format!("{there}/omega/hello:2"))]);
    assert_eq!(appliance.get("/hello").unwrap().status, 200);
    let closed = ann.fails(port, &["deploy", &graph(&format!("10.0.2.2:{misled}/omega/hello:1"))]);
    assert!(closed.contains("1.1.1.1:8444") && closed.contains("its port is closed"), "{closed}");
    let transcript = appliance.machine().console().transcript();
    assert!(transcript.contains(", registries 10.0.2.2:") && !transcript.contains("hunter2"), "{transcript}");
    appliance.power_off().unwrap();
}
