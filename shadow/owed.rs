//! The flushes that an event owes, each by itself.
//!
//! An answer carries one [`TlbFlush`], and one fault may make several pages, each of which takes the write right for a frame
//! away. The sum of two frames is everything, and emptying the TLB costs a walk for each translation that was in use: a
//! hundred times what forgetting two frames costs. So the answer carries the sum, which is enough for anyone, and whoever
//! wants to forget no more than necessary asks for its parts ([`mmu::MmuBackend::flush_parts`]).

use mmu::TlbFlush;

/// So many flushes one by one are no cheaper than one of everything.
const MOST: usize = 8;

/// Flushes owed, and those of the last answer.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    owed: Vec<TlbFlush>,
    paid: Vec<TlbFlush>,
}

impl Owed {
    /// One more. What one covers the other is kept once.
    pub fn add(&mut self, flush: TlbFlush) {
        if flush == TlbFlush::None {
            return;
        }
        for known in &mut self.owed {
            let sum = known.and(flush);
            if sum != TlbFlush::All || *known == TlbFlush::All {
                *known = sum;
                return;
            }
        }
        if flush == TlbFlush::All || self.owed.len() == MOST {
            self.owed.clear();
            self.owed.push(TlbFlush::All);
            return;
        }
        self.owed.push(flush);
    }

    /// All that is owed, as one flush. Nothing is owed after it.
    pub fn pay(&mut self) -> TlbFlush {
        self.paid.clear();
        std::mem::swap(&mut self.owed, &mut self.paid);
        self.paid.iter().fold(TlbFlush::None, |sum, &flush| sum.and(flush))
    }

    /// What the last payment was the sum of, if of more than one.
    pub fn parts(&self) -> &[TlbFlush] {
        if self.paid.len() > 1 { &self.paid } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TlbFlush::*;
    use guestmem::{Gva, Hfn};

    fn paid(flushes: &[TlbFlush]) -> (TlbFlush, Vec<TlbFlush>) {
        let mut owed = Owed::default();
        flushes.iter().for_each(|&flush| owed.add(flush));
        let sum = owed.pay();
        let parts = owed.parts().to_vec();
        assert_eq!((owed.pay(), owed.parts()), (None, &[][..]), "it is owed once");
        (sum, parts)
    }

    #[test]
    fn the_sum_is_enough_and_its_parts_are_no_less() {
        assert_eq!(paid(&[]), (None, vec![]));
        assert_eq!(paid(&[None, Frame(Hfn(3)), Frame(Hfn(3))]), (Frame(Hfn(3)), vec![]));
        let two = [Pcid(5), Frame(Hfn(3))];
        assert_eq!(paid(&two), (All, two.to_vec()));
        let covered = [Pcid(5), Frame(Hfn(3)), NonGlobal, PageOf(5, Gva(0x1000))];
        assert_eq!(paid(&covered), (All, vec![NonGlobal, Frame(Hfn(3))]));
        assert_eq!(paid(&[Frame(Hfn(1)), All, Frame(Hfn(2))]), (All, vec![]));
        let many: Vec<_> = (0..=MOST as u64).map(|frame| Frame(Hfn(frame))).collect();
        assert_eq!(paid(&many[..MOST]), (All, many[..MOST].to_vec()));
        assert_eq!(paid(&many), (All, vec![]));
    }
}
