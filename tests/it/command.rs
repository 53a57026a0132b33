//! The command as people and scripts have it: what it prints where, what it ends with, what a shell knows of it, and how it asks.
//!
//! These need no virtual machine: `gaia run` serves, and where another side is wanted that misbehaves, the test plays it.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gaia_init::key::PublicKey;
use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{ANSWER_WITHIN, out};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use serde_json::Value;

const GRAPH: &str = "[brane.hello]\nimage = \"file:./hello.wasm\"\n\n[brane.counter]\nimage = \"file:./counter.wasm\"\n\
                     execution = { lifecycle = \"pinned\" }\n";

/// A home of its own for whoever calls `gaia`.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        let folder = self.0.path().join("gaia");
        std::fs::create_dir_all(&folder).unwrap();
        folder.join(name)
    }

    /// `program` in this home, and in no other environment that could change what it does.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("XDG_CONFIG_HOME", self.0.path()).stdin(Stdio::null());
        for variable in ["GAIA_ON", "GAIA_API", "GAIA_COMPLETE"] {
            command.env_remove(variable);
        }
        command
    }

    fn gaia(&self, arguments: &[&str]) -> Output {
        self.command(out("bin/gaia")).args(arguments).output().unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One JSON value for each line.
fn values(bytes: &[u8]) -> Vec<Value> {
    let line = |line: &str| serde_json::from_str(line).map_err(|e| format!("{line:?}: {e}")).unwrap();
    text(bytes).lines().map(line).collect()
}

/// What a case prints on standard output.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Prints {
    /// Nothing.
    Nothing,
    /// One object, with this key.
    One(&'static str),
    /// As many objects as it likes, one a line.
    Lines,
}
use Prints::{Lines, Nothing, One};

/// Would miss: an answer that is no JSON although that was asked for, a failure that is none or is printed where answers are
/// expected, an exit status that means something else than the manual says, one that depends on `--json`.
#[test]
fn with_json_answers_and_failures_are_json_and_the_exit_status_tells_what_happened() {
    let folder = Folder::with(GRAPH).unwrap();
    let limited = format!("{GRAPH}limits = {{ mem_max = \"5 MiB\" }}\n");
    folder.put("limited.toml", &limited).unwrap();
    folder.put("bad.toml", "[brane.x]\nimage = 3\n").unwrap();
    folder.put("text.wasm", "no component").unwrap();
    let home = Home::new();
    let run = folder.run(&["--data", "data", "--workers", "1"]).unwrap().serving().unwrap();
    run.get("/hello").unwrap();
    let socket = run.socket().display().to_string();
    let there = ["--api", socket.as_str()];
    let nobody = ["--api", "/nonexistent/socket"];
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let away = ["--on", free.as_str()];
    let cases: &[(&[&str], &[&str], i32, Prints)] = &[
        (&there, &["status"], 0, One("roles")),
        (&there, &["ps"], 0, One("branes")),
        (&there, &["logs"], 0, Lines),
        (&there, &["graphs"], 0, One("graphs")),
        (&there, &["push", "omega/hello:1", "hello.wasm"], 0, One("digest")),
        (&there, &["deploy", "g.zgraph.toml", "--dry-run"], 0, One("branes")),
        (&there, &["deploy", "g.zgraph.toml"], 0, One("graph")),
        (&there, &["rollback"], 1, Nothing),
        (&there, &["deploy", "limited.toml"], 5, Nothing),
        (&there, &["deploy", "limited.toml", "--yes"], 0, One("graph")),
        (&there, &["rollback"], 5, Nothing),
        (&there, &["rollback", "--yes"], 0, One("graph")),
        (&there, &["deploy", "bad.toml"], 1, Nothing),
        (&there, &["deploy", "none.toml"], 2, Nothing),
        (&there, &["push", "omega/x:1", "none.wasm"], 2, Nothing),
        (&there, &["push", "omega/x:1", "text.wasm"], 2, Nothing),
        (&there, &["push", "Omega?", "hello.wasm"], 2, Nothing),
        (&[], &["check", "g.zgraph.toml"], 0, One("branes")),
        (&[], &["check", "bad.toml"], 1, One("diagnostics")),
        (&[], &["check", "none.toml"], 2, Nothing),
        (&[], &["key"], 0, One("key")),
        (&[], &["hosts"], 0, One("hosts")),
        (&[], &["trust", "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"], 2, Nothing),
        (&away, &["trust", "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"], 0, One("host")),
        (&away, &["trust", "ed25519:Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE"], 4, Nothing),
        (&away, &["ps"], 3, Nothing),
        (&["--on", "a b"], &["ps"], 2, Nothing),
        (&["--on", "nowhere.invalid"], &["ps"], 3, Nothing),
        (&nobody, &["status"], 3, Nothing),
        (&nobody, &["logs", "--follow"], 3, Nothing),
        (&nobody, &["deploy", "g.zgraph.toml"], 3, Nothing),
        (&nobody, &["rollback"], 3, Nothing),
        (&nobody, &["poweroff"], 5, Nothing),
        (&nobody, &["poweroff", "--yes"], 3, Nothing),
        (&nobody, &["reboot", "-y"], 3, Nothing),
        (&[], &["run", "none.toml"], 2, Nothing),
        (&[], &["dploy"], 2, Nothing),
        (&[], &["logs", "--since", "soon"], 2, Nothing),
        (&[], &["--accept-key", "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "ps"], 2, Nothing),
    ];
    for (before, arguments, status, prints) in cases {
        let arguments = [*before, *arguments].concat();
        let of = |json: &[&str]| {
            let mut command = home.command(out("bin/gaia"));
            command.args(json).args(&arguments).current_dir(folder.path()).output().unwrap()
        };
        let (json, human) = (of(&["--json"]), if *status == 0 { None } else { Some(of(&[])) });
        let said = || format!("{arguments:?}: {}{}", text(&json.stdout), text(&json.stderr));
        assert_eq!(json.status.code(), Some(*status), "{}", said());
        let answers = values(&json.stdout);
        match prints {
            Nothing => assert_eq!(answers, [] as [Value; 0], "{}", said()),
            One(key) => assert!(answers.len() == 1 && answers[0].get(key).is_some(), "{}", said()),
            Lines => assert!(answers.len() > 1 && answers.iter().all(Value::is_object), "{}", said()),
        }
        let failures = values(&json.stderr);
        if *status == 0 || *prints != Nothing {
            assert_eq!(failures, [] as [Value; 0], "{}", said());
        } else {
            let [failure] = failures.as_slice() else { panic!("{}", said()) };
            let kinds = ["", "failed", "usage", "unreachable", "untrusted", "not_agreed", "overtaken"];
            assert_eq!(failure["kind"], kinds[usize::try_from(*status).unwrap()], "{}", said());
            assert!(failure["error"].as_str().is_some_and(|error| !error.is_empty()), "{}", said());
        }
        if let Some(human) = human {
            assert_eq!(human.status.code(), Some(*status), "{arguments:?} without --json: {}", text(&human.stderr));
            let first = text(&human.stderr);
            let begins = ["gaia: ", "error: "].iter().any(|word| first.starts_with(word)) || *prints != Nothing;
            assert!(begins, "{arguments:?}: {first}");
        }
    }
    let off = home.command(out("bin/gaia")).args(there).args(["--json", "poweroff", "--yes"]).output().unwrap();
    assert_eq!((off.status.code(), values(&off.stdout).len()), (Some(0), 1), "{}", text(&off.stderr));
    let mut run = run;
    assert!(run.end().unwrap().success());
}

/// Would miss: a run whose log or words about itself are no JSON.
#[test]
fn a_run_with_json_writes_nothing_else() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&["--json", "--workers", "1"]).unwrap().serving().unwrap();
    assert_eq!(run.get("/hello").unwrap().status, 200);
    run.output.line("\"END\"").unwrap();
    let (log, said) = (run.output.clone(), run.error.clone());
    assert!(run.interrupt().unwrap().success());
    for line in log.all() {
        let line: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
        assert!(line["time_ns"].is_u64(), "{line}");
    }
    for line in said.all() {
        let line: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
        assert!(line["said"].is_string(), "{line}");
    }
}

/// Would miss: a mistake that is told in words which help nobody.
#[test]
fn who_cannot_be_reached_is_named_with_what_to_do() {
    let home = Home::new();
    let key = "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
    let says = |arguments: &[&str], words: &[&str]| {
        let output = home.gaia(arguments);
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains("\nhelp: "), "{arguments:?}: {said}");
        for words in words {
            assert!(said.contains(words), "{arguments:?} should say {words:?}: {said}");
        }
    };
    says(&["--api", "/nonexistent", "ps"], &["there is no socket /nonexistent", "gaia --on HOST"]);
    let left = home.file("left.sock");
    drop(UnixListener::bind(&left).unwrap());
    says(&["--api", left.to_str().unwrap(), "ps"], &["nobody listens on the socket", "is the appliance up?"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let free = listener.local_addr().unwrap();
    drop(listener);
    says(&["--on", &free.to_string(), "ps"], &["nobody listens on 127.0.0.1:", "[operators]"]);
    says(&["--on", "nowhere.invalid", "ps"], &["no address is found for \"nowhere.invalid\"", "gaia hosts"]);
    says(&["--on", "lab/1", "ps"], &["\"lab/1\" is no appliance", "hosts.toml"]);
    std::fs::write(home.file("hosts.toml"), "lab = { adress = \"a\" }\n").unwrap();
    says(&["--on", "lab", "ps"], &["hosts.toml:1:9", "adress"]);
    std::fs::remove_file(home.file("hosts.toml")).unwrap();
    // One that speaks something else, and one that says nothing the key of which could be taken.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = other.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = other.accept() {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").and_then(|()| stream.read(&mut [0; 512]));
        }
    });
    says(&["--on", &at, "ps"], &["does not speak as an appliance does", "control.port"]);
    says(&["--on", &at, "--accept-key", key, "ps"], &["does not speak as an appliance does"]);
}

// What a shell knows.

/// Runs a script with bash, with `gaia` and `ω` where it looks for programs; what it printed, sorted.
fn bash(home: &Home, script: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    for name in ["gaia", "ω"] {
        std::os::unix::fs::symlink(out("bin/gaia"), folder.path().join(name)).unwrap();
    }
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap_or_default());
    let output = home.command("bash").args(["--norc", "-c", script]).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{script}\n{}{}", text(&output.stdout), text(&output.stderr));
    let mut lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// What bash offers for the last of these words.
fn offered(home: &Home, words: &[&str]) -> Vec<String> {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let (at, last) = (words.len() - 1, words[words.len() - 1]);
    // As bash calls it (bash(1), Programmable Completion): the command, the word, the word before it.
    let script = format!(
        "source <(gaia completions bash)\n\
         complete -p {0} | grep -q _clap_complete_gaia || exit 9\n\
         COMP_WORDS=({1}) COMP_CWORD={at} COMP_TYPE=9\n\
         _clap_complete_gaia {0} '{last}' ''\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words[0],
        quoted.join(" ")
    );
    bash(home, &script)
}

/// Would miss: a script that bash does not take, and Tab that offers nothing, or what is not there.
#[test]
fn tab_offers_commands_branes_and_hosts() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = home.gaia(&["completions", shell]);
        assert!(script.status.success(), "{}", text(&script.stderr));
        let path = home.file(shell);
        std::fs::write(&path, script.stdout).unwrap();
        match home.command(shell).arg("-n").arg(&path).output() {
            Ok(parsed) => assert!(parsed.status.success(), "{shell}: {}", text(&parsed.stderr)),
            Err(e) => assert!(shell != "bash", "{e}"),
        }
    }
    assert_eq!(offered(&home, &["gaia", "dep"]), ["deploy"]);
    assert_eq!(offered(&home, &["ω", "dep"]), ["deploy"]);
    assert_eq!(offered(&home, &["ω", "gaia", "dep"]), ["deploy"]);
    assert_eq!(offered(&home, &["gaia", "completions", "f"]), ["fish"]);
    assert_eq!(offered(&home, &["gaia", "deploy", "--dr"]), ["--dry-run"]);
    let all = offered(&home, &["gaia", ""]);
    assert!(all.contains(&"status".to_owned()) && !all.iter().any(|word| word == "role" || word == "man"), "{all:?}");

    std::fs::write(home.file("hosts.toml"), "lab = { address = \"192.0.2.7\" }\nlast = { address = \"::1\" }\n")
        .unwrap();
    let key = "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
    std::fs::write(home.file("known_hosts"), format!("attic:7250 {key}\n")).unwrap();
    assert_eq!(offered(&home, &["gaia", "--on", "la"]), ["lab", "last"]);
    assert_eq!(offered(&home, &["gaia", "status", "--on", "a"]), ["attic:7250"]);
    assert!(!home.file("key").exists(), "nothing is made for it");

    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let socket = run.socket().display().to_string();
    assert_eq!(offered(&home, &["gaia", "--api", &socket, "logs", "--brane", ""]), ["counter", "hello"]);
    assert_eq!(offered(&home, &["gaia", "logs", "--api", &socket, "--brane", "he"]), ["hello"]);
    assert!(run.interrupt().unwrap().success());
    let began = Instant::now();
    assert_eq!(offered(&home, &["gaia", "--api", &socket, "logs", "--brane", ""]), [""]);
    // Control that is there and says nothing.
    let mute = UnixListener::bind(home.file("mute.sock")).unwrap();
    let socket = home.file("mute.sock").display().to_string();
    assert_eq!(offered(&home, &["gaia", "--api", &socket, "logs", "--brane", ""]), [""]);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    drop(mute);
}

/// Would miss: a page that is not there, or that the manual's reader complains of.
#[test]
fn each_command_has_a_page_that_the_manuals_reader_takes() {
    let home = Home::new();
    let folder = home.file("man");
    let written = home.gaia(&["man", folder.to_str().unwrap()]);
    assert!(written.status.success(), "{}", text(&written.stderr));
    let pages = text(&written.stdout);
    for name in ["gaia.1", "gaia-deploy.1", "gaia-run.1", "gaia-logs.1", "gaia-hosts.1"] {
        assert!(pages.contains(name), "{pages}");
    }
    assert!(!pages.contains("role") && !pages.contains("gaia-man"), "{pages}");
    let mut readers = 0;
    for page in pages.lines() {
        // `man` exits with 0 whatever it complains of.
        for reader in [&["man", "--warnings", "-E", "UTF-8", "-l"][..], &["mandoc", "-Tlint", "-Wwarning"]] {
            let mut command = home.command(reader[0]);
            let Ok(read) = command.args(&reader[1..]).arg(page).env("MANWIDTH", "80").env("PAGER", "cat").output()
            else {
                continue;
            };
            readers += 1;
            assert!(read.stderr.is_empty(), "{page}: {}", text(&read.stderr));
            let shown = text(&read.stdout);
            let whole = reader[0] == "mandoc" || page.ends_with("/gaia.1") == shown.contains("EXIT STATUS");
            assert!(whole, "{page}: {shown}");
        }
    }
    println!("{readers} pages were read");
}

/// Would miss: a second name that is another command, or a word in front that is taken for a command.
#[test]
fn omega_is_gaia() {
    let home = Home::new();
    let omega = home.file("ω");
    std::os::unix::fs::symlink(out("bin/gaia"), &omega).unwrap();
    let version = home.gaia(&["--version"]).stdout;
    assert!(text(&version).starts_with("gaia "), "{}", text(&version));
    for words in [&["gaia", "--version"][..], &["--version"]] {
        let output = home.command(&omega).args(words).output().unwrap();
        assert_eq!(output.stdout, version, "{words:?}: {}", text(&output.stderr));
    }
    let hosts = home.command(&omega).args(["gaia", "hosts", "--json"]).output().unwrap();
    assert_eq!(values(&hosts.stdout)[0]["hosts"], Value::Array(Vec::new()));
    let twice = home.command(&omega).args(["gaia", "gaia", "ps"]).output().unwrap();
    assert_eq!(twice.status.code(), Some(2), "one such word is taken");
}

// Somebody at a terminal.

/// A command on a terminal of its own: `script`, of util-linux, makes it.
struct Terminal {
    child: Child,
    shown: BufReader<std::process::ChildStdout>,
    all: Vec<u8>,
}

impl Terminal {
    fn start(home: &Home, folder: &Path, arguments: &[&str]) -> Self {
        let words: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
        let line = format!("exec '{}' {}", out("bin/gaia").display(), words.join(" "));
        // Who waits for what never comes fails, and does not hang.
        let mut command = home.command("timeout");
        let within = ANSWER_WITHIN.as_secs().to_string();
        command
            .args([&within, "script", "-q", "-e", "-c", &line, "/dev/null"])
            .current_dir(folder)
            .env("SHELL", "/bin/sh");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let shown = BufReader::new(child.stdout.take().unwrap());
        Self { child, shown, all: Vec::new() }
    }

    /// Reads until these words are shown.
    fn until(&mut self, words: &str) {
        while !text(&self.all).contains(words) {
            let some = self.shown.fill_buf().unwrap().to_vec();
            assert!(!some.is_empty(), "{words:?} is not in {}", text(&self.all));
            self.shown.consume(some.len());
            self.all.extend_from_slice(&some);
        }
    }

    fn types(&mut self, line: &str) {
        self.child.stdin.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// What it ended with, and all it ever showed.
    fn end(mut self) -> (Option<i32>, String) {
        self.shown.read_to_end(&mut self.all).unwrap();
        (self.child.wait().unwrap().code(), text(&self.all))
    }
}

/// Takes whoever has a raw key.
#[derive(Debug)]
struct AnyOperator;

impl ClientCertVerifier for AnyOperator {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// A side that shows a key in TLS and answers each request with an empty `ps`.
fn appliance_with_a_key() -> (String, PublicKey) {
    let home = Home::new();
    home.gaia(&["key"]);
    let pem = std::fs::read(home.file("key")).unwrap();
    let key = rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from_pem_slice(&pem).unwrap()).unwrap();
    let spki = key.public_key().unwrap().to_vec();
    let public = PublicKey(spki[spki.len() - 32..].try_into().unwrap());
    let shown = Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], key));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider);
    let config = config.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let config = config.with_client_cert_verifier(Arc::new(AnyOperator));
    let mut config = config.with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(shown)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut tls = rustls::StreamOwned::new(connection, stream);
            // Who only looks at the key says nothing.
            if matches!(tls.read(&mut [0; 4096]), Ok(1..)) {
                let body = "{\"branes\":[],\"instances\":[],\"silent\":[]}";
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = tls.write_all((head + body).as_bytes()).and_then(|()| tls.flush());
                tls.conn.send_close_notify();
                let _ = tls.flush();
            }
        }
    });
    (at, public)
}

/// Would miss: an appliance that is trusted although nobody said yes, or not although somebody did.
#[test]
fn who_is_at_a_terminal_is_asked_whether_an_appliance_is_the_one() {
    let (at, key) = appliance_with_a_key();
    let home = Home::new();
    for (answer, status) in [("no", 4), ("y", 4), ("yes", 0)] {
        let mut terminal = Terminal::start(&home, home.0.path(), &["--on", &at, "ps"]);
        terminal.until("Is it the same? (yes/no) ");
        terminal.types(answer);
        let (code, shown) = terminal.end();
        assert_eq!(code, Some(status), "{answer}: {shown}");
        assert!(shown.contains(&key.to_string()), "{shown}");
        assert_eq!(home.file("known_hosts").exists(), status == 0, "{answer}");
    }
    assert_eq!(std::fs::read_to_string(home.file("known_hosts")).unwrap(), format!("{at} {key}\n"));
    // From now on nobody is asked, also where nobody is.
    let known = home.gaia(&["--on", &at, "--json", "ps"]);
    assert_eq!(known.status.code(), Some(0), "{}", text(&known.stderr));
    let hosts = values(&home.gaia(&["hosts", "--json"]).stdout);
    assert_eq!(
        (&hosts[0]["hosts"][0]["address"], &hosts[0]["hosts"][0]["key"]),
        (&at.clone().into(), &key.to_string().into())
    );
    // Another key in its place.
    let (other, _) = appliance_with_a_key();
    std::fs::write(home.file("known_hosts"), format!("{other} {key}\n")).unwrap();
    let changed = home.gaia(&["--on", &other, "--json", "ps"]);
    assert_eq!(changed.status.code(), Some(4), "{}", text(&changed.stderr));
    assert!(values(&changed.stderr)[0]["error"].as_str().unwrap().contains("has changed"));
}

fn counted(run: &Run) -> String {
    run.get("/counter").unwrap().text()
}

/// Would miss: a plan that is carried out although nobody agreed, or not although somebody did; one that asks a script.
#[test]
fn who_is_at_a_terminal_is_asked_whether_a_state_may_end() {
    let folder = Folder::with(GRAPH).unwrap();
    folder.put("limited.toml", format!("{GRAPH}limits = {{ mem_max = \"5 MiB\" }}\n")).unwrap();
    let home = Home::new();
    let run = folder.run(&["--data", "data", "--workers", "1"]).unwrap().serving().unwrap();
    assert!(run.gaia(&["deploy", "g.zgraph.toml"]).unwrap().0.success());
    assert_eq!(counted(&run), "count 1\n");
    let socket = run.socket().display().to_string();
    let mut kept = 1;
    for (answer, status) in [("n", 5), ("", 5), ("perhaps", 5), ("y", 0)] {
        let mut terminal = Terminal::start(&home, folder.path(), &["--api", &socket, "deploy", "limited.toml"]);
        terminal.until("Go on? [y/N] ");
        terminal.types(answer);
        let (code, shown) = terminal.end();
        assert_eq!(code, Some(status), "{answer:?}: {shown}");
        assert!(shown.contains("ends the state of counter.001: its limits change"), "{shown}");
        kept = if status == 0 { 1 } else { kept + 1 };
        assert_eq!(counted(&run), format!("count {kept}\n"), "{answer:?}");
    }
    // A script that has a terminal is still one.
    let terminal = Terminal::start(&home, folder.path(), &["--api", &socket, "--json", "deploy", "g.zgraph.toml"]);
    let (code, shown) = terminal.end();
    assert_eq!((code, counted(&run).as_str()), (Some(5), "count 2\n"), "{shown}");
    assert!(run.interrupt().unwrap().success());
}

/// A control that takes a request and answers when it is told to.
fn slow_control(socket: &Path) -> std::sync::mpsc::Sender<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let (answer, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let asked = stream.read(&mut [0; 4096]);
            if asked.is_err() || told.recv_timeout(ANSWER_WITHIN).is_err() {
                return;
            }
            let body = "{\"branes\":[],\"instances\":[],\"silent\":[]}";
            let _ = write_answer(&mut stream, body);
        }
    });
    answer
}

fn write_answer(stream: &mut UnixStream, body: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes())
}

/// Would miss: a wait of which nobody is told, a line about it that stays or comes where none is wanted.
#[test]
fn who_waits_at_a_terminal_sees_for_what_and_nothing_is_left_of_it() {
    let home = Home::new();
    let socket = home.file("slow.sock");
    let answer = slow_control(&socket);
    let socket = socket.display().to_string();
    let mut terminal = Terminal::start(&home, home.0.path(), &["--api", &socket, "ps"]);
    terminal.until("· waiting for the appliance");
    answer.send(()).unwrap();
    let (code, shown) = terminal.end();
    assert_eq!(code, Some(0), "{shown}");
    let (before, after) = shown.split_once("· waiting for the appliance").unwrap();
    assert_eq!(before, "\r\x1b[K", "in one line");
    assert!(after.starts_with("\r\x1b[KBRANE"), "{after:?}");
    // At once, without a terminal, and with JSON: nothing.
    answer.send(()).unwrap();
    let (_, quick) = Terminal::start(&home, home.0.path(), &["--api", &socket, "ps"]).end();
    assert!(quick.starts_with("BRANE"), "{quick:?}");
    let waiting = |json: bool, on_terminal: bool| {
        let arguments = [&["--api", socket.as_str()][..], if json { &["--json"] } else { &[] }, &["ps"]].concat();
        let began = Instant::now();
        let later = std::thread::spawn({
            let answer = answer.clone();
            move || {
                // Longer than it takes until a line would be shown.
                std::thread::sleep(Duration::from_millis(1500));
                answer.send(()).unwrap();
            }
        });
        let shown = if on_terminal {
            Terminal::start(&home, home.0.path(), &arguments).end().1
        } else {
            let output = home.gaia(&arguments);
            text(&output.stdout) + &text(&output.stderr)
        };
        later.join().unwrap();
        assert!(began.elapsed() > Duration::from_secs(1));
        shown
    };
    assert!(waiting(true, true).starts_with("{\"branes\""));
    assert!(waiting(false, false).starts_with("BRANE"));
}
