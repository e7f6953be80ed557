//! The 256-bit registers of the local APIC: IRR, ISR and TMR.
//!
//! Used by `LocalApic` for priority arbitration. Follows the Intel SDM Vol. 3, section 11.8.4 "Interrupt Acceptance
//! for Fixed Interrupts".

use serde::{Deserialize, Serialize};

/// One bit for each vector.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct VectorSet([u32; 8]);

impl VectorSet {
    pub(crate) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    pub(crate) fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    pub(crate) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
    }

    /// The highest vector, which has the highest priority.
    pub(crate) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        Some((word as u8) << 5 | self.0[word].ilog2() as u8)
    }

    /// One of the eight 32-bit registers; the index counts modulo 8.
    pub(crate) fn word(&self, index: u8) -> u32 {
        self.0[usize::from(index & 7)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn behaves_like_a_set(steps: Vec<(u8, bool)>) {
            let (mut bits, mut set) = (VectorSet::default(), BTreeSet::new());
            for (vector, insert) in steps {
                if insert {
                    bits.insert(vector);
                    set.insert(vector);
                } else {
                    bits.remove(vector);
                    set.remove(&vector);
                }
                prop_assert_eq!(bits.highest(), set.last().copied());
                prop_assert_eq!(bits.contains(vector), insert);
                prop_assert_eq!(bits.word(vector >> 5) >> (vector & 31) & 1 != 0, insert);
            }
        }
    }
}
