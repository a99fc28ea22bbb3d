//! Mistakes in a configuration, as text for its author.
//!
//! One [`Problem`] is one line: `file:line: key: value, what is wrong with it; the fix`. Every stage of reading a file
//! adds to one [`Problems`], so that all mistakes of a stage are shown at once.

use std::fmt;
use std::path::Path;

/// Most problems shown of one file; the others are counted, so that the first ones stay on the screen.
const MOST_SHOWN: usize = 20;
/// Most problems counted. A file with more is checked no further.
const MOST_COUNTED: usize = 500;
/// Most characters shown of a value from the file.
const MOST_QUOTED: usize = 60;

/// One mistake in a configuration file. Its `Display` is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, as it was named.
    pub file: String,
    /// The line, from 1, if the mistake is on one.
    pub line: Option<usize>,
    /// The key, such as `listeners[0].bind`, if the mistake has one.
    pub key: Option<String>,
    /// The value, what is wrong with it, and the fix.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        f.write_str(": ")?;
        if let Some(key) = &self.key {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// All mistakes found in one configuration file. Its `Display` is one line for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    file: String,
    shown: Vec<Problem>,
    more: usize,
}

impl Problems {
    /// No problems yet, in this file.
    pub(super) fn new(path: &Path) -> Problems {
        Problems { file: one_line(&path.display().to_string()), shown: Vec::new(), more: 0 }
    }

    /// One problem that concerns no particular key.
    pub(super) fn one(path: &Path, line: Option<usize>, message: impl Into<String>) -> Problems {
        let mut problems = Problems::new(path);
        problems.add(line, None, message.into());
        problems
    }

    pub(super) fn add(&mut self, line: Option<usize>, key: Option<String>, message: String) {
        if self.shown.len() < MOST_SHOWN {
            self.shown.push(Problem { file: self.file.clone(), line, key, message });
        } else if !self.is_full() {
            self.more += 1;
        }
    }

    /// True once so many problems were found that more are not counted: the check can stop.
    pub(super) fn is_full(&self) -> bool {
        self.shown.len() + self.more >= MOST_COUNTED
    }

    pub(super) fn is_empty(&self) -> bool {
        self.shown.is_empty()
    }

    /// Sorted by line; problems without a line come first.
    pub(super) fn in_order(mut self) -> Problems {
        self.shown.sort_by_key(|problem| problem.line);
        self
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.shown.iter().enumerate() {
            let line_break = if n == 0 { "" } else { "\n" };
            write!(f, "{line_break}{problem}")?;
        }
        match self.more {
            0 => Ok(()),
            more => {
                let least = if self.is_full() { "at least " } else { "" };
                write!(f, "\n{}: {least}{more} more problems; fix the first {MOST_SHOWN} and run again", self.file)
            }
        }
    }
}

impl std::error::Error for Problems {}

/// The text in quotes, control characters escaped, cut after [`MOST_QUOTED`] characters.
pub(super) fn quoted(text: &str) -> String {
    let mut cut: String = text.chars().take(MOST_QUOTED).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("{cut:?}")
}

/// The text on one line, without control characters.
pub(super) fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_whatever_the_value() {
        let mut problems = Problems::new(Path::new("odd\nname.toml"));
        problems.add(Some(3), Some("health".into()), format!("got {}", quoted("a\nb\u{1b}[31m")));
        assert_eq!(problems.to_string(), r#"odd name.toml:3: health: got "a\nb\u{1b}[31m""#);
    }

    #[test]
    fn long_values_and_long_lists_are_cut() {
        assert_eq!(quoted(&"é".repeat(100)).chars().count(), MOST_QUOTED + 3);
        let mut problems = Problems::new(Path::new("c.toml"));
        for line in 1..=25 {
            problems.add(Some(line), None, "wrong".into());
        }
        let text = problems.to_string();
        assert_eq!(text.lines().count(), MOST_SHOWN + 1);
        assert!(text.ends_with("c.toml: 5 more problems; fix the first 20 and run again"));
        for line in 26..=MOST_COUNTED {
            assert!(!problems.is_full());
            problems.add(Some(line), None, "wrong".into());
        }
        problems.add(None, None, "one too many".into());
        assert!(problems.is_full());
        let text = problems.to_string();
        assert!(text.ends_with("c.toml: at least 480 more problems; fix the first 20 and run again"), "{text}");
    }
}
