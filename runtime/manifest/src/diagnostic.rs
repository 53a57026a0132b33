//! What is wrong in a manifest, where, and what to write instead.

use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is deployed.
    Error,
    /// It works, and is worth a look.
    Warning,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// Where, in bytes of the source; always inside it.
    pub span: Range<usize>,
    /// What stands there, or why it is wrong; beside the mark.
    pub label: String,
    /// Another place that belongs to it, with its label: the first of two duplicates, say.
    pub other: Option<(Range<usize>, String)>,
    /// What to write instead.
    pub help: Option<String>,
}

impl Diagnostic {
    /// An error at a place.
    #[must_use]
    pub fn error(span: Range<usize>, message: impl Into<String>, label: impl Into<String>) -> Self {
        let (message, label) = (message.into(), label.into());
        Self { severity: Severity::Error, message, span, label, other: None, help: None }
    }

    /// A warning at a place.
    #[must_use]
    pub fn warning(span: Range<usize>, message: impl Into<String>, label: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(span, message, label) }
    }

    /// With what to write instead.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With another place that belongs to it.
    #[must_use]
    pub fn with(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.other = Some((span, label.into()));
        self
    }

    /// Line and column of its place, both from 1; the column counts characters.
    ///
    /// ```
    /// use gaia_manifest::Diagnostic;
    /// assert_eq!(Diagnostic::error(5..6, "", "").line_and_column("a\nö = 1"), (2, 3));
    /// ```
    #[must_use]
    pub fn line_and_column(&self, source: &str) -> (usize, usize) {
        let before = source.get(..self.span.start).unwrap_or(source);
        let line = before.rsplit('\n').next().unwrap_or_default();
        (before.matches('\n').count() + 1, line.chars().count() + 1)
    }

    /// The whole message as a terminal shows it, with colours or without: message, file, line and column, the line itself
    /// with the place marked, and the remedy.
    #[must_use]
    pub fn render(&self, file: &str, source: &str, colours: bool) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let place = AnnotationKind::Primary.span(self.span.clone()).label(self.label.as_str());
        let other =
            self.other.as_ref().map(|(span, label)| AnnotationKind::Context.span(span.clone()).label(label.as_str()));
        let snippet = Snippet::source(source).path(file).annotation(place).annotations(other);
        let mut report = vec![level.primary_title(self.message.as_str()).element(snippet)];
        report.extend(
            self.help.as_deref().map(|help| annotate_snippets::Group::with_title(Level::HELP.secondary_title(help))),
        );
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        renderer.render(&report)
    }
}
