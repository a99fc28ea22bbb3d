//! Datagrams sorted by downstream, so that those for the same one can leave together.

use super::super::mmsg::incoming::Piece;

/// Nobody's number.
const NONE: u32 = u32::MAX;

/// Datagrams of a batch, each with its downstream. Its memory is set aside once.
#[derive(Debug)]
pub struct Deal {
    cards: Vec<Card>,
    room: usize,
    /// For each downstream, its first and its last card.
    hands: Vec<(u32, u32)>,
    /// The downstreams that have any.
    players: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Card {
    piece: Piece,
    /// The next one for the same downstream.
    next: u32,
}

impl Deal {
    /// Room for so many datagrams.
    pub fn new(room: usize, downstreams: usize) -> Self {
        let mut deal = Deal { cards: Vec::with_capacity(room), room, hands: Vec::new(), players: Vec::new() };
        deal.resize(downstreams);
        deal
    }

    /// For another number of downstreams. It must be empty.
    pub fn resize(&mut self, downstreams: usize) {
        self.hands.resize(downstreams, (NONE, NONE));
        self.players.reserve(downstreams);
    }

    /// True if there is no room for another datagram.
    pub fn full(&self) -> bool {
        self.cards.len() == self.room
    }

    /// Adds a datagram.
    pub fn add(&mut self, downstream: u32, piece: Piece) {
        let card = self.cards.len() as u32;
        self.cards.push(Card { piece, next: NONE });
        let (first, last) = &mut self.hands[downstream as usize];
        if *first == NONE {
            *first = card;
            self.players.push(downstream);
        } else {
            self.cards[*last as usize].next = card;
        }
        *last = card;
    }

    /// The downstreams that have any datagrams, in the order of their first ones.
    pub fn downstreams(&self) -> &[u32] {
        &self.players
    }

    /// A downstream's datagrams, in the order in which they were added.
    pub fn pieces(&self, downstream: u32) -> impl Iterator<Item = Piece> + '_ {
        let mut next = self.hands[downstream as usize].0;
        std::iter::from_fn(move || {
            let card = self.cards.get(next as usize)?;
            next = card.next;
            Some(card.piece)
        })
    }

    /// Takes everything away.
    pub fn clear(&mut self) {
        for &player in &self.players {
            self.hands[player as usize] = (NONE, NONE);
        }
        self.players.clear();
        self.cards.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::mmsg::incoming::tests::piece;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn each_gets_what_is_its_own_in_order(rounds in prop::collection::vec(prop::collection::vec(0u32..9, 0..40), 1..4)) {
            let mut deal = Deal::new(40, 9);
            for targets in rounds {
                let mut expected: BTreeMap<u32, Vec<Piece>> = BTreeMap::new();
                for (number, &target) in targets.iter().enumerate() {
                    prop_assert!(!deal.full());
                    deal.add(target, piece(number as u32, 7));
                    expected.entry(target).or_default().push(piece(number as u32, 7));
                }
                prop_assert_eq!(deal.full(), targets.len() == 40);
                let dealt: BTreeMap<u32, Vec<Piece>> =
                    deal.downstreams().iter().map(|&target| (target, deal.pieces(target).collect())).collect();
                prop_assert_eq!(dealt.len(), deal.downstreams().len());
                prop_assert_eq!(dealt, expected);
                deal.clear();
                prop_assert!(deal.downstreams().is_empty());
                prop_assert_eq!(deal.pieces(3).count(), 0);
            }
        }
    }
}
