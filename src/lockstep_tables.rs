//! What a guest's table entry says, and which entry an address in guest memory is: for explaining a difference in memory.
//!
//! It stands behind [`crate::lockstep`], at a difference. Entry formats are those of SDM Vol. 3 §4.3 to §4.5; decoding is
//! left to [`mmu::entry`], here are only names.

use crate::lockstep_side::Side;
use crate::lockstep_translations::Look;
use guestmem::{Gfn, Gpa, Gva, PAGE_SIZE};
use mmu::entry::{Entry, EntryFormat};
use mmu::walk::TableMemory;
use mmu::{PagingMode, PagingState};
use std::collections::{BTreeSet, VecDeque};

/// So many tables are looked through, at most: a guest can make a maze of them.
const MOST_TABLES: usize = 1 << 20;

/// The flags of an entry in the guest's formats, which shadow tables share: bit, letter, name.
const FLAGS: [(u32, &str, &str); 10] = [
    (0, "P", "present"),
    (1, "W", "writable"),
    (2, "U", "user"),
    (3, "PWT", "write-through"),
    (4, "PCD", "cache disabled"),
    (5, "A", "accessed"),
    (6, "D", "dirty"),
    (7, "PS", "page size"),
    (8, "G", "global"),
    (63, "NX", "execute disable"),
];
/// Those of an entry in the EPT format.
const EPT_FLAGS: [(u32, &str); 7] =
    [(0, "R"), (1, "W"), (2, "X"), (6, "IPAT"), (7, "PS"), (8, "A"), (9, "D")];
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A table of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestTable {
    /// The level, 1 for the one whose entries are 4 KiB pages.
    pub(crate) level: u8,
    /// The lowest address that it translates.
    pub(crate) gva: Gva,
    /// 4 or 8.
    pub(crate) entry_bytes: u64,
    /// How far its entries are apart in addresses: each translates so many bytes, as a power of two.
    pub(crate) shift: u8,
}

/// The table that a guest frame is under the guest's current root; the one nearest to the root if it is several.
pub(crate) fn table_in(side: &Side, frame: Gfn) -> Option<GuestTable> {
    let state = side.machine.cpu.paging_state();
    let root = state.root_gpa().0;
    match state.mode() {
        PagingMode::Off => None,
        PagingMode::Bits32 => search(side, state.legacy_format(), &[(root, 0)], frame),
        PagingMode::Pae => {
            let directories = pae_directories(&state);
            search(side, state.pae_format(), &directories, frame)
        }
        PagingMode::Level4 | PagingMode::Level5 => search(side, state.long_format(), &[(root, 0)], frame),
    }
}

fn pae_directories(state: &PagingState) -> Vec<(u64, u64)> {
    let present = state.pdptes.iter().enumerate().filter(|(_, pdpte)| *pdpte & 1 != 0);
    present.map(|(i, pdpte)| (pdpte & state.phys_mask() & !0xfff, (i as u64) << 30)).collect()
}

/// Breadth first, so that a table that leads back to its own root is not taken for a lower one.
fn search<F: EntryFormat>(side: &Side, format: F, roots: &[(u64, u64)], wanted: Gfn) -> Option<GuestTable> {
    let mut memory = Look(side.machine.memory());
    let mut queue: VecDeque<(u64, u64, u8)> =
        roots.iter().map(|&(table, gva)| (table, gva, format.levels())).collect();
    let mut seen = BTreeSet::new();
    let bytes = format.entry_bytes();
    while let Some((table, gva, level)) = queue.pop_front() {
        if seen.len() >= MOST_TABLES || !seen.insert((table, level)) {
            continue;
        }
        let shift = format.shift(level);
        if Gpa(table).frame() == wanted {
            return Some(GuestTable {
                level,
                gva: canonical(gva, &format),
                entry_bytes: bytes,
                shift: shift as u8,
            });
        }
        if level == 1 || side.machine.memory().slot(Gpa(table).frame()) == guestmem::Slot::Mmio {
            continue;
        }
        for index in 0..PAGE_SIZE / bytes {
            let Ok(raw) = memory.load(table + index * bytes, bytes);
            if let Entry::Table { base, .. } = format.decode(raw, level) {
                queue.push_back((base, gva | index << shift, level - 1));
            }
        }
    }
    None
}

/// The address with its sign extended, where the format has one.
fn canonical<F: EntryFormat>(gva: u64, format: &F) -> Gva {
    let width = match format.levels() {
        4 => 48,
        5 => 57,
        _ => return Gva(gva),
    };
    Gva(((gva << (64 - width)) as i64 >> (64 - width)) as u64)
}

/// What the entries in the eight bytes at `gpa` are, and how they differ; `None` where the frame is no table.
pub(crate) fn explain(table: &GuestTable, gpa: Gpa, left: u64, right: u64) -> (Vec<Gva>, String) {
    let mut addresses = Vec::new();
    let mut sentences = Vec::new();
    for part in 0..8 / table.entry_bytes {
        let cut = |word: u64| if table.entry_bytes == 4 { word >> (32 * part) & 0xffff_ffff } else { word };
        let (l, r) = (cut(left), cut(right));
        if l == r {
            continue;
        }
        let index = gpa.page_offset() / table.entry_bytes + part;
        let gva = Gva(table.gva.0 | index << table.shift);
        addresses.push(gva);
        sentences.push(format!("level-{} entry for gva {gva}: {}", table.level, changes(l, r)));
    }
    (addresses, sentences.join("; "))
}

/// How two entries differ, in words.
fn changes(left: u64, right: u64) -> String {
    let mut words = Vec::new();
    for (bit, letter, name) in FLAGS {
        let side = match (left >> bit & 1, right >> bit & 1) {
            (1, 0) => "left",
            (0, 1) => "right",
            _ => continue,
        };
        words.push(format!("{letter} ({name}) is set on the {side} only"));
    }
    if (left ^ right) & ADDRESS != 0 {
        words.push(format!(
            "it leads to gpa {:#x} on the left and to gpa {:#x} on the right",
            left & ADDRESS,
            right & ADDRESS
        ));
    }
    let named = FLAGS.iter().fold(ADDRESS, |mask, flag| mask | 1 << flag.0);
    if (left ^ right) & !named != 0 {
        words.push("bits without a name differ".into());
    }
    words.join(", ")
}

/// The flags of an entry of the guest's or of a shadow table, by letters.
pub(crate) fn letters(raw: u64) -> String {
    let set: Vec<_> = FLAGS.iter().filter(|flag| raw >> flag.0 & 1 != 0).map(|flag| flag.1).collect();
    if raw & 1 == 0 { "not present".into() } else { set.join(" ") }
}

/// The flags of an EPT entry, by letters.
pub(crate) fn ept_letters(raw: u64) -> String {
    let set: Vec<_> = EPT_FLAGS.iter().filter(|flag| raw >> flag.0 & 1 != 0).map(|flag| flag.1).collect();
    if raw & 7 == 0 { "not present".into() } else { set.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_entries_are_said_in_words() {
        assert_eq!(changes(0x1007, 0x1027), "A (accessed) is set on the right only");
        assert_eq!(
            changes(0x1067, 0x2003),
            "U (user) is set on the left only, A (accessed) is set on the left only, D (dirty) is set on the left only, \
             it leads to gpa 0x1000 on the left and to gpa 0x2000 on the right"
        );
        assert_eq!(changes(1 << 60, 0), "bits without a name differ");
        assert_eq!(letters(0x8000_0000_0000_1067), "P W U A D NX");
        assert_eq!(letters(0x1066), "not present");
        assert_eq!(ept_letters(0xb7), "R W X PS");
    }

    #[test]
    fn a_word_of_two_entries_is_two_entries() {
        let table = GuestTable { level: 1, gva: Gva(0x40_0000), entry_bytes: 4, shift: 12 };
        let (addresses, text) = explain(&table, Gpa(0x5008), 0x1027_0000_2007, 0x1007_0000_2027);
        assert_eq!(addresses, [Gva(0x40_2000), Gva(0x40_3000)]);
        assert_eq!(
            text,
            "level-1 entry for gva 0x402000: A (accessed) is set on the right only; \
             level-1 entry for gva 0x403000: A (accessed) is set on the left only"
        );
        assert_eq!(explain(&table, Gpa(0x5008), 7, 0x27).0.len(), 1);
    }
}
