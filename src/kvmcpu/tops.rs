//! Copies of the shadow tables' top tables, each with the stub's entry in it.
//!
//! Where it stands in the path of one access: the first table that the processor's walker reads. A shadow top table itself has
//! no place for the stub, since each of its 512 entries belongs to the guest; so the real CR3 holds a copy, in which the
//! stub has an entry that the guest does not use now. Copies are brought up to date before each entry: 512 words
//! compared cost a tenth of a microsecond, an entry tens.
//!
//! Manual: Intel SDM Vol. 3 §4.5 (4-level paging).

use crate::stub::{ROOTS, Stub};
use guestmem::{HostMemory, Hpa, PAGE_SIZE};
use mmu::entry::bits::{A, P};

/// Entries of the top table that the stub may have, in the order of preference: first those that Linux leaves to
/// hypervisors, then the rest of the upper half from its middle on, then the lower half from its end.
fn places() -> impl Iterator<Item = usize> {
    (256..272).chain(272..512).chain((1..256).rev())
}

/// Which top tables have copies.
#[derive(Debug, Default)]
pub struct Tops {
    /// The shadow's top tables by the number of the copy, and when each was used last.
    copies: [Option<(Hpa, u64)>; ROOTS],
    time: u64,
}

/// An entry that the processor may have read and that must be written by the stub: its address and its value.
pub type Work = (u64, u64);

impl Tops {
    /// All copies are out of date, for the stub moves.
    fn forget(&mut self, stub: &Stub) {
        for number in 0..ROOTS {
            stub.memory.zero_frame(stub.root(number).1.frame());
        }
        self.copies = Default::default();
    }

    /// Finds a place for the stub in this top table; it moves if the guest has taken its own. True if it has moved, and all
    /// that the processor has read of the copies must be forgotten. `None` if there is no place.
    pub fn find_place(&mut self, stub: &mut Stub, host: &HostMemory, root: Hpa) -> Option<bool> {
        let present = |slot: usize| {
            host.read_u64(root.wrapping_add(slot as u64 * 8)).is_none_or(|entry| entry & P != 0)
        };
        if stub.slot != 0 && !present(stub.slot) {
            return Some(false);
        }
        let slot = places().find(|&slot| !present(slot))?;
        stub.settle(slot);
        self.forget(stub);
        Some(true)
    }

    /// Brings the copy of a top table up to date and gives its number. Entries that were present and are another now are
    /// added to the work and not written here.
    pub fn update(&mut self, stub: &Stub, host: &HostMemory, root: Hpa, work: &mut Vec<Work>) -> usize {
        self.time += 1;
        let known = self.copies.iter().position(|c| c.is_some_and(|(of, _)| of == root));
        let oldest = || (0..ROOTS).min_by_key(|&n| self.copies[n].map_or(0, |(_, used)| used)).unwrap_or(0);
        let number = known.unwrap_or_else(oldest);
        self.copies[number] = Some((root, self.time));
        let (physical, copy) = stub.root(number);
        for slot in 0..PAGE_SIZE / 8 {
            let wanted = match slot as usize == stub.slot {
                true => stub.top_entry(),
                false => host.read_u64(root.wrapping_add(slot * 8)).unwrap_or(0),
            };
            let at = copy.wrapping_add(slot * 8);
            let now = stub.memory.read_u64(at).unwrap_or(0);
            // The accessed flag is the processor's.
            if (now ^ wanted) & !A == 0 {
                continue;
            }
            if now & P != 0 {
                work.push((physical + slot * 8, wanted));
            } else {
                let written = stub.memory.write_u64(at, wanted);
                debug_assert!(written.is_some());
            }
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: u64 = 0x5000 | 0x27;

    #[test]
    fn a_copy_follows_and_what_was_present_is_left_to_the_stub() {
        let host = HostMemory::new(4).unwrap();
        let mut stub = Stub::new(4 << 12).unwrap();
        let (mut tops, mut work) = (Tops::default(), Vec::new());
        let root = Hpa(0x1000);
        host.write_u64(root, ENTRY).unwrap();
        assert_eq!(tops.find_place(&mut stub, &host, root), Some(true));
        let number = tops.update(&stub, &host, root, &mut work);
        let (physical, copy) = stub.root(number);
        assert!(work.is_empty());
        assert_eq!(stub.memory.read_u64(copy), Some(ENTRY));
        assert_eq!(stub.memory.read_u64(copy.wrapping_add(256 * 8)), Some(stub.top_entry()));
        // A new entry is written, an accessed flag is nobody's change, a change is work.
        host.write_u64(root.wrapping_add(8), ENTRY).unwrap();
        host.write_u64(root, ENTRY & !A).unwrap();
        assert_eq!(tops.update(&stub, &host, root, &mut work), number);
        assert!(work.is_empty());
        host.write_u64(root, 0).unwrap();
        tops.update(&stub, &host, root, &mut work);
        assert_eq!(work, [(physical, 0)]);
        // The guest takes the stub's place.
        host.write_u64(root.wrapping_add(256 * 8), ENTRY).unwrap();
        assert_eq!((tops.find_place(&mut stub, &host, root), stub.slot), (Some(true), 257));
        work.clear();
        tops.update(&stub, &host, root, &mut work);
        assert_eq!(stub.memory.read_u64(copy.wrapping_add(256 * 8)), Some(ENTRY));
        for slot in 0..512 {
            host.write_u64(root.wrapping_add(slot * 8), ENTRY).unwrap();
        }
        assert_eq!(tops.find_place(&mut stub, &host, root), None);
    }

    #[test]
    fn the_copy_unused_longest_goes() {
        let host = HostMemory::new(ROOTS as u64 + 3).unwrap();
        let mut stub = Stub::new(1 << 20).unwrap();
        stub.settle(300);
        let (mut tops, mut work) = (Tops::default(), Vec::new());
        let numbers: Vec<_> =
            (0..ROOTS as u64).map(|n| tops.update(&stub, &host, Hpa(n << 12), &mut work)).collect();
        assert_eq!(numbers, (0..ROOTS).collect::<Vec<_>>());
        assert_eq!(tops.update(&stub, &host, Hpa(0), &mut work), 0);
        assert_eq!(tops.update(&stub, &host, Hpa((ROOTS as u64) << 12), &mut work), 1);
    }
}
