//! Which datagrams of a batch are not to be forwarded, whoever would get them.

/// The datagrams that are taken out of a batch. Its memory is kept from batch to batch.
#[derive(Debug, Default)]
pub struct Screen {
    /// For each of the batch's datagrams, whether it is taken out; none at all if every one stays.
    taken_out: Vec<bool>,
    /// For each message, the number of its first datagram.
    firsts: Vec<usize>,
}

impl Screen {
    /// Every datagram of the next batch stays, until something else is said.
    pub fn clear(&mut self) {
        self.taken_out.clear();
        self.firsts.clear();
    }

    /// True if every datagram stays.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.firsts.is_empty()
    }

    /// Says of each of the next message's datagrams whether it is taken out. It must be said of every message or of none.
    pub fn message(&mut self, taken_out: impl IntoIterator<Item = bool>) {
        self.firsts.push(self.taken_out.len());
        self.taken_out.extend(taken_out);
    }

    /// True if the datagram of this number in this message is taken out.
    #[must_use]
    pub fn takes_out(&self, slot: usize, number: usize) -> bool {
        self.firsts.get(slot).is_some_and(|first| self.taken_out[first + number])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(screen: &Screen, slot: usize, count: usize) -> Vec<usize> {
        (0..count).filter(|&number| !screen.takes_out(slot, number)).collect()
    }

    #[test]
    fn only_what_is_taken_out_is_missing() {
        let mut screen = Screen::default();
        assert_eq!((screen.is_clear(), left(&screen, 1, 3)), (true, vec![0, 1, 2]));
        screen.message([false, true, false]);
        screen.message([true]);
        screen.message([false, false, true]);
        assert!(!screen.is_clear());
        assert_eq!([left(&screen, 0, 3), left(&screen, 1, 1), left(&screen, 2, 3)], [vec![0, 2], vec![], vec![0, 1]]);
        screen.clear();
        assert_eq!((screen.is_clear(), left(&screen, 0, 3)), (true, vec![0, 1, 2]));
    }
}
