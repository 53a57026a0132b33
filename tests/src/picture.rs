//! A picture of what a terminal shows: an SVG whose text is text, so that it can be selected, searched and compared.
//!
//! The pictures in `docs/pictures` are made of the real thing and held against it: [`Picture::masked`] is what must agree.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};

/// Columns that a picture has at least.
const NARROWEST: usize = 80;
/// In tenths of a pixel: how wide a character of a usual monospaced font is that is 13 pixels high.
const COLUMN: usize = 79;
/// In pixels: a row, the space around the text, the frame's bar above it.
const ROW: usize = 18;
const MARGIN: usize = 16;
const BAR: usize = 32;
/// The basic set of ANSI, as it looks on a dark ground.
const COLOURS: [&str; 16] = [
    "#484f58", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#b1bac4", "#6e7681", "#ffa198",
    "#56d364", "#e3b341", "#79c0ff", "#d2a8ff", "#56d4dd", "#ffffff",
];

/// How characters look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Style {
    /// One of the 16 of the basic set; any other is shown as the terminal's own.
    pub colour: Option<u8>,
    /// Bold, and what is reversed.
    pub bold: bool,
    /// Faint.
    pub dim: bool,
    /// Underlined.
    pub underlined: bool,
}

/// Characters in a row that look the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// How.
    pub style: Style,
    /// What.
    pub text: String,
}

/// What a terminal shows, row by row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Picture {
    /// Its rows; in each no two neighbours look the same.
    pub rows: Vec<Vec<Span>>,
}

impl Picture {
    /// Of rows of plain text.
    #[must_use]
    pub fn plain<'a>(rows: impl IntoIterator<Item = &'a str>) -> Self {
        let span = |text: &str| Span { style: Style::default(), text: text.to_owned() };
        let row = |text: &str| if text.is_empty() { Vec::new() } else { vec![span(text)] };
        Self { rows: rows.into_iter().map(row).collect() }
    }

    /// The text of each row.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.rows.iter().map(|row| row.iter().map(|span| span.text.as_str()).collect()).collect()
    }

    /// Without the rows of which this says no.
    #[must_use]
    pub fn only(mut self, mut wanted: impl FnMut(&str) -> bool) -> Self {
        let mut lines = self.lines().into_iter();
        self.rows.retain(|_| lines.next().is_some_and(|line| wanted(&line)));
        self
    }

    /// What must agree between two pictures of the same: text and looks, without what is another each time. Those are numbers with
    /// their units, digests, keys, and how many spaces there are between words; and where the prompt stands while the machine speaks.
    #[must_use]
    pub fn masked(&self) -> Vec<String> {
        let rows = self.rows.iter().map(|row| {
            let spans = row.iter().map(|Span { style, text }| {
                let looks = if *style == Style::default() { String::new() } else { format!("{style:?} ") };
                looks + &masked(text)
            });
            spans.filter(|span| !span.is_empty()).collect::<Vec<_>>().join(" | ")
        });
        let without_prompt = |row: String| match row.strip_prefix("ω ") {
            Some(rest) if rest.starts_with("gaia: ") => rest.to_owned(),
            _ => row,
        };
        rows.map(without_prompt).filter(|row| row != "ω").collect()
    }

    /// The picture, with this name for whoever cannot see it. What XML cannot hold is shown as U+FFFD.
    #[must_use]
    pub fn svg(&self, title: &str) -> String {
        let columns = self.lines().iter().map(|line| line.chars().count()).max().unwrap_or(0).max(NARROWEST);
        let width = (columns * COLUMN).div_ceil(10) + 2 * MARGIN;
        let height = BAR + self.rows.len() * ROW + MARGIN;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace\" font-size=\"13\" \
             fill=\"#e6edf3\">\n<title>"
        );
        escape(&mut out, title);
        let _ = write!(
            out,
            "</title>\n<rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"#0d1117\"/>\n\
             <circle cx=\"18\" cy=\"16\" r=\"5\" fill=\"#ff5f57\"/>\n<circle cx=\"36\" cy=\"16\" r=\"5\" fill=\"#febc2e\"/>\n\
             <circle cx=\"54\" cy=\"16\" r=\"5\" fill=\"#28c840\"/>\n<g xml:space=\"preserve\">\n"
        );
        for (number, row) in self.rows.iter().enumerate() {
            let y = BAR + (number + 1) * ROW - 4;
            let _ = write!(out, "<text x=\"{MARGIN}\" y=\"{y}\">");
            for Span { style, text } in row {
                if *style == Style::default() {
                    escape(&mut out, text);
                    continue;
                }
                out.push_str("<tspan");
                if let Some(colour) = style.colour.and_then(|colour| COLOURS.get(usize::from(colour))) {
                    let _ = write!(out, " fill=\"{colour}\"");
                }
                for (is, attribute) in [
                    (style.bold, " font-weight=\"bold\""),
                    (style.dim, " fill-opacity=\".6\""),
                    (style.underlined, " text-decoration=\"underline\""),
                ] {
                    out.push_str(if is { attribute } else { "" });
                }
                out.push('>');
                escape(&mut out, text);
                out.push_str("</tspan>");
            }
            out.push_str("</text>\n");
        }
        out.push_str("</g>\n</svg>\n");
        out
    }

    /// The name and the picture that such a text is of.
    ///
    /// # Errors
    /// If it is not one that [`Picture::svg`] made.
    pub fn read(svg: &str) -> Result<(String, Self)> {
        let document = roxmltree::Document::parse(svg)?;
        let named = |name: &'static str| document.descendants().filter(move |node| node.has_tag_name(name));
        let title = named("title").next().context("it has no title")?.text().unwrap_or_default().to_owned();
        let of = |text: &str, style| Span { style, text: text.to_owned() };
        let span = |node: roxmltree::Node<'_, '_>| {
            if !node.is_element() {
                return of(node.text().unwrap_or_default(), Style::default());
            }
            let colour = node.attribute("fill").and_then(|fill| COLOURS.iter().position(|known| *known == fill));
            let style = Style {
                colour: colour.and_then(|at| u8::try_from(at).ok()),
                bold: node.attribute("font-weight").is_some(),
                dim: node.attribute("fill-opacity").is_some(),
                underlined: node.attribute("text-decoration").is_some(),
            };
            of(node.text().unwrap_or_default(), style)
        };
        let picture = Self { rows: named("text").map(|row| row.children().map(span).collect()).collect() };
        ensure!(picture.svg(&title) == svg, "it was changed by hand");
        Ok((title, picture))
    }
}

/// Writes text as XML has it. What XML 1.0 has no place for (its production `Char`) is U+FFFD, and so is what a parser would change:
/// the line breaks.
fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

/// Units that stand behind a number and change with it.
const UNITS: [&str; 13] = ["µs", "ms", "s", "m", "h", "d", "B", "KiB", "MiB", "GiB", "K", "M", "bytes"];

/// Text without what is another each time.
fn masked(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let word = word_length(rest);
        let digest = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
        let inside = out.ends_with(|c: char| c.is_ascii_alphanumeric());
        if !inside && word == 43 {
            rest = &rest[word..];
            out.push('#');
        } else if !inside && digest >= 12 && digest == word {
            rest = &rest[digest..];
            out.push('#');
        } else if c.is_ascii_digit() {
            rest = behind_number(rest);
            out.push('#');
        } else {
            rest = &rest[c.len_utf8()..];
            if c != ' ' || !(out.is_empty() || out.ends_with(' ')) {
                out.push(c);
            }
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// The bytes of the word that a text begins with, as base64url has them.
fn word_length(text: &str) -> usize {
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).unwrap_or(text.len())
}

/// What comes behind a number and its unit: `3m12s`, `12,422`, `13:41:07.118`, `4.9 ms`.
fn behind_number(mut text: &str) -> &str {
    loop {
        text = text.trim_start_matches(|c: char| c.is_ascii_digit());
        // A digest or a key behind a colon, in `sha256:…`, is no part of it.
        let goes_on = |more: &&str| more.starts_with(|c: char| c.is_ascii_digit()) && word_length(more) < 12;
        let more = text.strip_prefix(['.', ',', ':']).filter(goes_on);
        if let Some(more) = more {
            text = more;
            continue;
        }
        let unit = UNITS.iter().filter_map(|unit| text.strip_prefix(' ').unwrap_or(text).strip_prefix(unit));
        let Some(behind) = unit.min_by_key(|behind| behind.len()) else { return text };
        match behind.chars().next() {
            Some(c) if c.is_ascii_digit() => text = behind,
            Some(c) if c.is_alphanumeric() => return text,
            _ => return behind,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_another_each_time_is_masked_and_the_rest_is_not() {
        let key = "ed25519:WI9qvL9uTdhWuGlkp2IaWzDz_DcBpdjOWBz5J4iSbDg";
        for (text, wanted) in [
            (
                "Ω 13:41:07.118 fetch.034 REQ a.example/works bytes=12,422 dur=42ms",
                "Ω # fetch.# REQ a.example/works bytes=# dur=#",
            ),
            ("   117.3 ms  programs       18440 KiB of /bin/gaia", "# programs # of /bin/gaia"),
            ("up 3m12s, 872µs", "up #, #"),
            ("2 workers, 56 of 57 MiB free", "# workers, # of # free"),
            ("sha256:132ad8a2923060d80afd6a7c8988a5f2e29ff9388c720dd85b086d08e72408e6 @132ad8a29230", "sha#:# @#"),
            ("sha256:ad8a2923060d80afd6a7c8988a5f2e29ff9388c720dd85b086d08e72408e6132", "sha#:#"),
            (key, "ed#:#"),
            ("ed25519:7I9qvL9uTdhWuGlkp2IaWzDz_DcBpdjOWBz5J4iSbDg", "ed#:#"),
            ("a decade", "a decade"),
            ("", ""),
        ] {
            assert_eq!(masked(text), wanted);
        }
        let shown = Picture::plain(["ω gaia: serving generation 1", "ω ", "ω status"]);
        assert_eq!(shown.masked(), ["gaia: serving generation #", "ω status"]);
    }

    /// Would miss: a picture that was changed by hand, is no XML, or has grown beyond what a page can carry.
    #[test]
    fn the_pictures_in_the_documentation_are_what_is_made_of_their_text() {
        let mut count = 0;
        for entry in std::fs::read_dir("../docs/pictures").unwrap() {
            let path = entry.unwrap().path();
            let svg = std::fs::read_to_string(&path).unwrap();
            Picture::read(&svg).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(svg.len() < 20_000, "{} has {} bytes", path.display(), svg.len());
            count += 1;
        }
        assert!(count > 0, "there are none");
    }

    fn style() -> impl Strategy<Value = Style> {
        let one = (proptest::option::of(0..16_u8), any::<bool>(), any::<bool>(), any::<bool>());
        one.prop_map(|(colour, bold, dim, underlined)| Style { colour, bold, dim, underlined })
    }

    proptest! {
        #[test]
        fn any_text_gives_valid_xml_with_the_same_text(
            title in any::<String>(),
            rows in proptest::collection::vec(proptest::collection::vec((style(), any::<String>()), 0..4), 0..8),
        ) {
            let rows: Vec<Vec<Span>> = rows.into_iter().map(|row| row.into_iter().map(|(style, text)| Span { style, text }).collect()).collect();
            let picture = Picture { rows };
            let svg = picture.svg(&title);
            let document = roxmltree::Document::parse(&svg).unwrap();
            let held = |text: &str| text.replace(|c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'), "\u{fffd}");
            let all = |node: roxmltree::Node<'_, '_>| node.descendants().filter(roxmltree::Node::is_text).filter_map(|n| n.text()).collect::<String>();
            let of = |name: &'static str| document.descendants().filter(move |n| n.has_tag_name(name)).map(all).collect::<Vec<_>>();
            prop_assert_eq!(of("text"), picture.lines().iter().map(|line| held(line)).collect::<Vec<_>>());
            prop_assert_eq!(of("title"), [held(&title)]);
        }

        #[test]
        fn what_a_terminal_can_show_is_read_back(texts in proptest::collection::vec((style(), "[^\\p{C}]{1,20}"), 0..6)) {
            let mut row: Vec<Span> = texts.into_iter().map(|(style, text)| Span { style, text }).collect();
            row.dedup_by_key(|span| span.style);
            let picture = Picture { rows: vec![row, Vec::new()] };
            let read = Picture::read(&picture.svg("a < b")).unwrap();
            prop_assert_eq!(&read.1, &picture);
            prop_assert_eq!(read.1.masked(), picture.masked());
        }

        #[test]
        fn masking_takes_any_text_and_masks_nothing_twice(text in "[0-9a-fms.,: µBKiM-]{0,60}|.{0,60}") {
            let once = masked(&text);
            prop_assert!(!once.contains(|c: char| c.is_ascii_digit()));
            prop_assert_eq!(masked(&once), once);
        }
    }
}
