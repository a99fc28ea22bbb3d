//! Marks the datagrams of a batch that admission drops.

/// Which datagrams of a batch are dropped. Keeps its memory from batch to batch.
#[derive(Debug, Default)]
pub struct FilterMask {
    /// For each datagram of the batch, whether it is dropped; empty if none is.
    filtered: Vec<bool>,
    /// For each message, the index of its first datagram.
    firsts: Vec<usize>,
}

impl FilterMask {
    /// Empties the mask: no datagram is filtered.
    pub fn clear(&mut self) {
        self.filtered.clear();
        self.firsts.clear();
    }

    /// True if no datagram is filtered.
    #[must_use]
    pub fn filters_none(&self) -> bool {
        self.firsts.is_empty()
    }

    /// Appends the next message's datagrams. Must be called for every message of a batch or for none.
    pub fn push_message(&mut self, filtered: impl IntoIterator<Item = bool>) {
        self.firsts.push(self.filtered.len());
        self.filtered.extend(filtered);
    }

    /// True if this datagram of this message is filtered.
    #[must_use]
    pub fn is_filtered(&self, slot: usize, number: usize) -> bool {
        self.firsts.get(slot).is_some_and(|first| self.filtered[first + number])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(mask: &FilterMask, slot: usize, count: usize) -> Vec<usize> {
        (0..count).filter(|&number| !mask.is_filtered(slot, number)).collect()
    }

    #[test]
    fn only_what_is_taken_out_is_missing() {
        let mut mask = FilterMask::default();
        assert_eq!((mask.filters_none(), left(&mask, 1, 3)), (true, vec![0, 1, 2]));
        mask.push_message([false, true, false]);
        mask.push_message([true]);
        mask.push_message([false, false, true]);
        assert!(!mask.filters_none());
        assert_eq!([left(&mask, 0, 3), left(&mask, 1, 1), left(&mask, 2, 3)], [vec![0, 2], vec![], vec![0, 1]]);
        mask.clear();
        assert_eq!((mask.filters_none(), left(&mask, 0, 3)), (true, vec![0, 1, 2]));
    }
}
