//! The manual: a page for each command, from the same tree that reads them, and what is the same for all in `gaia(1)`.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap_mangen::Man;

use crate::failure::Kind;

/// What stands in an operator's environment, and what it is for.
const ENVIRONMENT: [(&str, &str); 4] = [
    ("GAIA_ON", "The appliance, as --on names it."),
    ("GAIA_API", "The socket of a control on this machine, as --api names it."),
    ("XDG_CONFIG_HOME", "Where the folder gaia is, in place of ~/.config."),
    ("USER", "The name that is proposed for an operator."),
];
/// The operator's files.
const FILES: [(&str, &str); 3] = [
    ("~/.config/gaia/key", "This operator's private key, made when it is first needed; its owner's alone."),
    ("~/.config/gaia/known_hosts", "The appliances that were trusted: HOST:PORT and a key, one a line."),
    ("~/.config/gaia/hosts.toml", "Short names: lab = { address = \"192.0.2.7\", port = 7250 }."),
];

/// The exit statuses, one a line, as `gaia --help` shows them.
#[must_use]
pub fn statuses() -> String {
    let mut out = String::from("Exit status:\n  0  It is done.\n");
    for kind in Kind::ALL {
        let _ = writeln!(out, "  {}  {}", kind.status(), kind.meaning());
    }
    out
}

/// Writes the pages into a folder and returns their files: `gaia.1`, `gaia-deploy.1`, …
///
/// # Errors
/// What the file system says.
pub fn write(tree: clap::Command, folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut tree = tree.disable_help_subcommand(true);
    tree.build();
    std::fs::create_dir_all(folder)?;
    let mut written = Vec::new();
    page(&tree, true, folder, &mut written)?;
    Ok(written)
}

fn page(command: &clap::Command, first: bool, folder: &Path, written: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let command = command.clone();
    let below: Vec<clap::Command> = command.get_subcommands().filter(|below| !below.is_hide_set()).cloned().collect();
    let version = format!("gaia {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command).source(version).manual("Gaia");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if !below.is_empty() {
        man.render_subcommands_section(&mut out)?;
    }
    if first {
        let statuses = Kind::ALL.map(|kind| (kind.status().to_string(), kind.meaning()));
        let done = ("0".to_owned(), "It is done.");
        section(
            &mut out,
            "EXIT STATUS",
            [done].iter().chain(&statuses).map(|(status, meaning)| (status.as_str(), *meaning)),
        )?;
        let json = "With --json, standard output is one JSON object, or one a line where the answer goes on (logs, run). \
                    What failed is one object on standard error, with kind, error and, where something can be done about it, help; \
                    standard output is empty then.";
        section(&mut out, "JSON", [("", json)])?;
        section(&mut out, "ENVIRONMENT", ENVIRONMENT)?;
        section(&mut out, "FILES", FILES)?;
    } else {
        section(&mut out, "SEE ALSO", [("", "gaia(1), which tells the exit status, the files and the environment.")])?;
    }
    let path = folder.join(man.get_filename());
    std::fs::write(&path, out)?;
    written.push(path);
    below.iter().try_for_each(|below| page(below, false, folder, written))
}

/// A section of terms and what they mean; a meaning without a term is a paragraph.
fn section<'a>(
    out: &mut impl Write,
    title: &str,
    rows: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> std::io::Result<()> {
    writeln!(out, ".SH \"{title}\"")?;
    for (term, meaning) in rows {
        match term {
            "" => writeln!(out, "{}", text(meaning))?,
            term => writeln!(out, ".TP\n\\fB{}\\fR\n{}", text(term), text(meaning))?,
        }
    }
    Ok(())
}

/// As roff reads it: hyphens that are meant, backslashes, and no line that begins with a request.
fn text(words: &str) -> String {
    let escaped = words.replace('\\', "\\e").replace('-', "\\-");
    if escaped.starts_with(['.', '\'']) { format!("\\&{escaped}") } else { escaped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roff_takes_words_for_what_they_are() {
        assert_eq!(text("--on"), "\\-\\-on");
        assert_eq!(text(".x\\y"), "\\&.x\\ey");
    }

    #[test]
    fn there_is_a_page_for_each_command_that_is_shown() {
        let below = clap::Command::new("deploy").about("Serve").arg(clap::Arg::new("file").help("The manifest"));
        let tree = clap::Command::new("gaia").about("Operate").subcommand(below);
        let tree = tree.subcommand(clap::Command::new("role").hide(true));
        let folder = tempfile::tempdir().unwrap();
        let written = write(tree, folder.path()).unwrap();
        let names: Vec<_> =
            written.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["gaia.1", "gaia-deploy.1"]);
        let first = std::fs::read_to_string(&written[0]).unwrap();
        for kind in Kind::ALL {
            assert!(first.contains(&format!(".TP\n\\fB{}\\fR\n{}", kind.status(), text(kind.meaning()))), "{first}");
        }
        assert!(std::fs::read_to_string(&written[1]).unwrap().contains("gaia\\-deploy \\- Serve"));
    }
}
