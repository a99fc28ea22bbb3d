//! Tells who is on the listeners' interfaces before our program, and so may keep datagrams from it. The kernel announces
//! none of that reliably, so it is looked at now and then.

use std::collections::BTreeMap;

use super::Daemon;

/// For each interface that carries our program, who is before it, in words.
pub(super) type Ahead = BTreeMap<String, Vec<String>>;

impl Daemon {
    /// Looks, and warns of what has not been there the last time.
    pub(super) fn look_ahead(&mut self) {
        let Some(kernel) = &self.kernel else {
            self.ahead.clear();
            return;
        };
        match kernel.preceding_programs() {
            Ok(ahead) => {
                new_warnings(&self.ahead, &ahead).iter().for_each(|text| tracing::warn!("{text}"));
                self.ahead = ahead;
            }
            // An interface has gone a moment ago, which the next look will know.
            Err(error) => tracing::debug!("{error:#}"),
        }
    }

    /// What holds of the last look, one line each.
    pub(super) fn programs_ahead(&self) -> Vec<String> {
        new_warnings(&Ahead::new(), &self.ahead)
    }
}

fn new_warnings(before: &Ahead, now: &Ahead) -> Vec<String> {
    let mut warnings = Vec::new();
    for (interface, ahead) in now {
        let known = before.get(interface).map_or(&[][..], Vec::as_slice);
        for what in ahead.iter().filter(|what| !known.contains(what)) {
            warnings.push(format!(
                "interface {interface}: {what} sees packets before udp-fanout and may take the listeners' datagrams: see \
                 that it passes them on, or that it comes later (for TCX programs and filters, attach = \"tcx\")"
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_warned_of_when_it_appears() {
        let ahead =
            |names: &[&str]| -> Ahead { [("eth0".to_owned(), names.iter().map(ToString::to_string).collect())].into() };
        let warned = |before: &[&str], now: &[&str]| new_warnings(&ahead(before), &ahead(now)).len();
        assert_eq!(warned(&[], &["a", "b"]), 2);
        assert_eq!(warned(&["a"], &["b", "a"]), 1);
        assert_eq!(warned(&["a", "b"], &["a"]), 0);
        let text = new_warnings(&Ahead::new(), &ahead(&["the XDP program x"])).remove(0);
        assert!(text.starts_with("interface eth0: the XDP program x sees packets before udp-fanout"), "{text}");
    }
}
