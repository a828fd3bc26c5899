//! The report as text: one line for each finding, its remedy below it, in columns.

use std::fmt::Write as _;
use std::io::IsTerminal;

use super::{Finding, Outcome, Report};

/// What the output can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Characters beyond ASCII.
    pub signs: bool,
    /// ANSI colors.
    pub colour: bool,
}

impl Style {
    /// Signs and colors on a terminal, plain ASCII elsewhere; no colors with `NO_COLOR` (<https://no-color.org>).
    pub fn of_stdout() -> Self {
        let terminal = std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { signs: terminal, colour: terminal && !no_colour }
    }

    fn mark(self, outcome: Outcome) -> &'static str {
        match (outcome, self.signs) {
            (Outcome::Pass, true) => "✓",
            (Outcome::Fail, true) => "✗",
            (Outcome::Warn, true) => "!",
            (Outcome::Skip, true) => "–",
            (Outcome::Pass, false) => "ok  ",
            (Outcome::Fail, false) => "FAIL",
            (Outcome::Warn, false) => "warn",
            (Outcome::Skip, false) => "-   ",
        }
    }

    fn paint(self, outcome: Outcome, text: &str) -> String {
        let code = match outcome {
            Outcome::Pass => "32",
            Outcome::Fail => "31;1",
            Outcome::Warn => "33",
            Outcome::Skip => "2",
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Keeps text of others from moving the cursor, and replaces what this output cannot show.
    fn clean(self, text: &str) -> String {
        let shown = |c: char| match c {
            c if c.is_control() => ' ',
            c if c.is_ascii() || self.signs => c,
            '…' => '.',
            _ => '?',
        };
        text.chars().map(shown).collect()
    }
}

/// A longer title only shifts its own line. Container names may have any length.
const WIDEST_TITLE: usize = 48;

impl Report {
    /// The report as text, with the totals in the last line.
    pub fn to_text(&self, style: Style) -> String {
        let mut text = String::new();
        let mut group = "";
        for finding in self.findings() {
            if finding.group != group {
                let gap = if group.is_empty() { "" } else { "\n" };
                group = finding.group;
                // Writing to a `String` does not fail, here and below.
                let _ = writeln!(text, "{gap}{group}");
            }
            write_line(&mut text, style, self.width(group), finding);
        }
        let sum = |outcome, word: &str| format!("{} {word}", self.count(outcome));
        let warnings = if self.count(Outcome::Warn) == 1 { "warning" } else { "warnings" };
        let sums = [
            sum(Outcome::Pass, "passed"),
            sum(Outcome::Fail, "failed"),
            sum(Outcome::Skip, "not tried"),
            sum(Outcome::Warn, warnings),
        ];
        let _ = writeln!(text, "\n{}", sums.join(", "));
        text
    }

    /// Width of a group's title column.
    fn width(&self, group: &str) -> usize {
        let titles = self.findings().iter().filter(|finding| finding.group == group);
        titles.map(|finding| finding.title.chars().count()).filter(|n| *n <= WIDEST_TITLE).max().unwrap_or_default()
    }
}

fn write_line(text: &mut String, style: Style, width: usize, finding: &Finding) {
    let mark = style.paint(finding.outcome, style.mark(finding.outcome));
    let title = style.clean(&finding.title);
    let line = format!("  {mark} {title:width$}  {}", style.clean(&finding.detail));
    let _ = writeln!(text, "{}", line.trim_end());
    if let Some(remedy) = &finding.remedy {
        let (indent, arrow) = if style.signs { (4, "→") } else { (7, "->") };
        let _ = writeln!(text, "{:indent$}{arrow} {}", "", style.clean(remedy));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Section;
    use super::*;

    fn report() -> Report {
        let mut section = Section::default();
        section.begin("master");
        section.pass("master.dns", "DNS", "m is 10.0.0.1");
        section.fail("master.key", "key accepted", "refused\x1b[2J", "set another…");
        section.begin("Docker");
        section.warn("docker.exec", "exec", "is let through", "set EXEC=0");
        section.skip("docker.image", "image", "– Grüße");
        Report { findings: section.findings }
    }

    #[test]
    fn the_columns_are_aligned_and_plain_where_nobody_looks_on() {
        let text = report().to_text(Style { signs: false, colour: false });
        let expected = "\
master
  ok   DNS           m is 10.0.0.1
  FAIL key accepted  refused [2J
       -> set another.

Docker
  warn exec   is let through
       -> set EXEC=0
  -    image  ? Gr??e

1 passed, 1 failed, 1 not tried, 1 warning
";
        assert_eq!(text, expected);
        assert!(text.is_ascii());
    }

    #[test]
    fn a_terminal_gets_signs_and_colours_and_no_control_characters_of_others() {
        let text = report().to_text(Style { signs: true, colour: true });
        assert!(text.contains("\x1b[32m✓\x1b[0m DNS") && text.contains("    → set another…"), "{text}");
        assert!(!text.contains("\x1b[2J"));
        let text = report().to_text(Style { signs: true, colour: false });
        assert!(text.contains("✗ key accepted") && !text.contains('\x1b'), "{text}");
    }

    #[test]
    fn the_document_has_stable_ids_and_the_sums() {
        let json = report().to_json();
        assert_eq!((&json["ok"], &json["failed"]), (&false.into(), &1.into()));
        assert_eq!(json["checks"][1]["id"], "master.key");
        assert_eq!(json["checks"][1]["outcome"], "fail");
        assert_eq!(json["checks"][0].get("remedy"), None);
    }
}
