//! Warns of programs that run before ours on the listeners' interfaces, and so may take datagrams from it. The kernel does
//! not announce them reliably, so they are listed every few seconds.

use std::collections::BTreeMap;

use super::Daemon;

/// Descriptions of the programs that precede ours, by interface.
pub(super) type PrecedingPrograms = BTreeMap<String, Vec<String>>;

impl Daemon {
    /// Lists the programs before ours, and warns of new ones.
    pub(super) fn check_preceding_programs(&mut self) {
        let Some(kernel) = &self.kernel else {
            self.preceding_programs.clear();
            return;
        };
        match kernel.preceding_programs() {
            Ok(programs) => {
                new_warnings(&self.preceding_programs, &programs).iter().for_each(|text| tracing::warn!("{text}"));
                self.preceding_programs = programs;
            }
            // An interface has just gone; the next attempt does not include it.
            Err(error) => tracing::debug!("{error:#}"),
        }
    }

    /// A warning for each program found last.
    pub(super) fn preceding_program_warnings(&self) -> Vec<String> {
        new_warnings(&PrecedingPrograms::new(), &self.preceding_programs)
    }
}

fn new_warnings(before: &PrecedingPrograms, now: &PrecedingPrograms) -> Vec<String> {
    let mut warnings = Vec::new();
    for (interface, programs) in now {
        let known = before.get(interface).map_or(&[][..], Vec::as_slice);
        for program in programs.iter().filter(|program| !known.contains(program)) {
            warnings.push(format!(
                "interface {interface}: {program} sees packets before udp-fanout and may take the listeners' datagrams: \
                 make sure that it passes them on, or that it runs after udp-fanout (for TCX programs and filters, attach \
                 = \"tcx\")"
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_warned_of_once_when_it_appears() {
        let found = |names: &[&str]| -> PrecedingPrograms {
            [("eth0".to_owned(), names.iter().map(ToString::to_string).collect())].into()
        };
        let warned = |before: &[&str], now: &[&str]| new_warnings(&found(before), &found(now)).len();
        assert_eq!(warned(&[], &["a", "b"]), 2);
        assert_eq!(warned(&["a"], &["b", "a"]), 1);
        assert_eq!(warned(&["a", "b"], &["a"]), 0);
        let text = new_warnings(&PrecedingPrograms::new(), &found(&["the XDP program x"])).remove(0);
        assert!(text.starts_with("interface eth0: the XDP program x sees packets before udp-fanout"), "{text}");
    }
}
