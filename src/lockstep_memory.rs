//! Guest memory of the two sides, compared frame by frame.
//!
//! It stands at each stop of [`crate::lockstep`]. Frames are compared by guest-physical address, wherever each side has put
//! them. A frame without a host frame yet reads as zeros, and stays without one.

use crate::lockstep_side::{Side, host_frame};
use guestmem::{Gfn, Gpa, GuestMemory, PAGE_SIZE, Slot};

const FRAME: usize = PAGE_SIZE as usize;

/// Two frames being compared.
pub(crate) struct Frames {
    left: Box<[u8; FRAME]>,
    right: Box<[u8; FRAME]>,
}

impl Default for Frames {
    fn default() -> Self {
        Self { left: Box::new([0; FRAME]), right: Box::new([0; FRAME]) }
    }
}

impl Frames {
    /// Whether a guest frame holds the same bytes on both sides.
    pub(crate) fn same(&mut self, left: &Side, right: &Side, gfn: Gfn) -> bool {
        let (l, r) = (left.machine.memory(), right.machine.memory());
        let (of_left, of_right) = (l.slot(gfn), r.slot(gfn));
        if matches!(of_left, Slot::Unbacked | Slot::Mmio) && matches!(of_right, Slot::Unbacked | Slot::Mmio) {
            return (of_left == Slot::Mmio) == (of_right == Slot::Mmio);
        }
        if (of_left == Slot::Mmio) != (of_right == Slot::Mmio) {
            return false;
        }
        read(l, gfn, &mut self.left);
        read(r, gfn, &mut self.right);
        self.left == self.right
    }

    /// The aligned eight-byte words of a guest frame that differ.
    pub(crate) fn words(&mut self, left: &Side, right: &Side, gfn: Gfn) -> Vec<(Gpa, u64, u64)> {
        if self.same(left, right, gfn) {
            return Vec::new();
        }
        let words = |bytes: &[u8; FRAME]| -> Vec<u64> {
            bytes.chunks_exact(8).map(|w| w.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))).collect()
        };
        let pairs = words(&self.left).into_iter().zip(words(&self.right)).enumerate();
        let differ = pairs.filter(|(_, (l, r))| l != r);
        differ.map(|(i, (l, r))| (gfn.base().wrapping_add(i as u64 * 8), l, r)).collect()
    }
}

fn read(memory: &GuestMemory, gfn: Gfn, out: &mut [u8; FRAME]) {
    let read = host_frame(memory.slot(gfn)).is_some_and(|frame| memory.host().read(frame.base(), out));
    if !read {
        out.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::MmuKind;
    use crate::machine::{MachineConfig, Wiring};
    use guestmem::Policy;
    use std::collections::BTreeSet;

    fn side(guest: &str, mmu: MmuKind, policy: Policy) -> Side {
        let guest = guests::find(guest).unwrap();
        let config = MachineConfig { policy, memory: 16 << 20, ..MachineConfig::for_guest(guest) };
        Side::new(config.with_mmu(mmu), Wiring::default()).unwrap()
    }

    fn whole(memory: &GuestMemory) -> Vec<Box<[u8; FRAME]>> {
        let frame = |gfn| {
            let mut bytes = Box::new([0; FRAME]);
            read(memory, Gfn(gfn), &mut bytes);
            bytes
        };
        (0..memory.end().0).map(frame).collect()
    }

    /// Whatever changed between two stops was noted: by the CPU's stores, the flags that walks set, the engine's own flags,
    /// loaders and devices alike.
    fn notes_hold_all_that_changes(name: &str, policy: Policy) {
        for mmu in MmuKind::ALL {
            let mut side = side(name, mmu, policy);
            side.take_written(&mut BTreeSet::new());
            let mut before = whole(side.machine.memory());
            let (mut changes, mut notes) = (0, 0);
            for stop in 1..=60u64 {
                // Of several lengths, so that stops fall everywhere.
                side.advance(side.retired() + 500 + stop * 997 % 20_000, None);
                let mut noted = BTreeSet::new();
                side.take_written(&mut noted);
                let after = whole(side.machine.memory());
                for (gfn, (b, a)) in before.iter().zip(&after).enumerate() {
                    if b != a {
                        changes += 1;
                        assert!(
                            noted.contains(&Gfn(gfn as u64)),
                            "{name} {mmu:?} {policy:?}: frame {gfn:#x} changed before instruction {} and was not noted",
                            side.retired()
                        );
                    }
                }
                notes += noted.len();
                before = after;
            }
            assert!(changes > 20, "{name} writes hardly anything: {changes}");
            assert!(notes < changes * 200, "{name}: {notes} notes for {changes} changes");
        }
    }

    #[test]
    fn notes_hold_all_that_changes_in_ptemod() {
        notes_hold_all_that_changes("ptemod", Policy::Linear);
        notes_hold_all_that_changes("ptemod", Policy::Demand);
    }

    #[test]
    fn notes_hold_all_that_changes_in_guests_of_other_modes() {
        for guest in ["pae", "paging32", "smc", "syscall", "instr"] {
            notes_hold_all_that_changes(guest, Policy::Scatter { seed: 5 });
        }
    }

    #[test]
    fn words_are_found_wherever_each_side_has_its_frames() {
        let left = side("hello", MmuKind::Shadow, Policy::Linear);
        let right = side("hello", MmuKind::Ept, Policy::Scatter { seed: 3 });
        let mut frames = Frames::default();
        assert!((0..left.machine.memory().end().0).all(|gfn| frames.same(&left, &right, Gfn(gfn))));
        left.machine.memory().write(Gpa(0x5ff9), &[1, 2]).unwrap();
        right.machine.memory().write(Gpa(0x5008), &[7]).unwrap();
        assert_eq!(frames.words(&left, &right, Gfn(5)), [(Gpa(0x5008), 0, 7), (Gpa(0x5ff8), 0x20100, 0)]);
        assert!(frames.words(&left, &right, Gfn(6)).is_empty());
    }

    #[test]
    fn frames_without_memory_behind_them_are_zeros_and_stay_so() {
        let left = side("hello", MmuKind::Shadow, Policy::Demand);
        let right = side("hello", MmuKind::Ept, Policy::Linear);
        let used = left.machine.memory().frame_usage();
        let mut frames = Frames::default();
        assert!((0..left.machine.memory().end().0 + 10).all(|gfn| frames.same(&left, &right, Gfn(gfn))));
        assert_eq!(left.machine.memory().frame_usage(), used);
        right.machine.memory().write(Gpa(0x80_0000), &[9]).unwrap();
        assert_eq!(frames.words(&left, &right, Gfn(0x800)), [(Gpa(0x80_0000), 0, 9)]);
    }
}
