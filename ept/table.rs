//! The store of EPT tables: which frames they are in, how they hang together, and which goes first when the pool is full
//! (SDM Vol. 3 §29.3.2).
//!
//! It stands below the events ([`crate::violation`], [`crate::change`]), which decide what an entry is to say, and above
//! the frames of the memory object, where the CPU's walker reads the entries. The walker sets accessed and dirty flags
//! there at any time, so every change of an entry is a compare-and-exchange that carries them over.
//!
//! Beside each table stand the facts that would cost a scan of 512 entries to find again: how many entries are in use
//! and how many of them lead to tables. The audit counts them anew.

use crate::Seeded;
use crate::entry::{self, ENTRIES, Kind, Leaf};
use guestmem::{Gfn, GuestMemory, Hfn, Hpa, MemoryError};
use mmu::{Counter, Counters};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is known of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// 4 for the root, 1 for a table of 4 KiB leaves.
    pub level: u8,
    /// The first guest frame that it translates.
    pub first: u64,
    /// The table that leads to it; the root leads to itself.
    pub parent: Hfn,
    /// Entries that are not empty.
    pub used: u16,
    /// Entries that lead to tables.
    pub children: u16,
    /// When it was made; the order of reclaim.
    pub born: u64,
}

/// All tables of one root.
#[derive(Debug)]
pub(crate) struct Tables {
    memory: Arc<GuestMemory>,
    root: Hfn,
    tables: BTreeMap<Hfn, Table>,
    /// Every table but the root, oldest first.
    by_age: BTreeMap<u64, Hfn>,
    born: u64,
    cap: usize,
    pub reclaimed: u64,
    pub counters: Counters,
    /// A rule to break on purpose.
    #[cfg(feature = "seeded-faults")]
    pub seeded: Option<Seeded>,
}

impl Tables {
    /// An empty root, in a store of at most `cap` tables.
    pub fn new(memory: Arc<GuestMemory>, cap: usize) -> Result<Self, MemoryError> {
        let root = memory.allocate_table()?;
        let table = Table { level: 4, first: 0, parent: root, used: 0, children: 0, born: 0 };
        let mut counters = Counters::default();
        counters.raise(Counter::TableFramesPeak, 1);
        Ok(Self {
            memory,
            root,
            tables: BTreeMap::from([(root, table)]),
            by_age: BTreeMap::new(),
            born: 0,
            cap,
            reclaimed: 0,
            counters,
            #[cfg(feature = "seeded-faults")]
            seeded: None,
        })
    }

    /// The root.
    pub fn root(&self) -> Hfn {
        self.root
    }

    /// How many tables there are.
    pub fn count(&self) -> usize {
        self.tables.len()
    }

    /// How many there may be.
    pub fn cap(&self) -> usize {
        self.cap
    }

    /// What is known of a table.
    pub fn get(&self, table: Hfn) -> Option<&Table> {
        self.tables.get(&table)
    }

    fn address(table: Hfn, index: u64) -> Hpa {
        table.base().wrapping_add(index % ENTRIES * 8)
    }

    /// An entry as it stands.
    pub fn raw(&self, table: Hfn, index: u64) -> u64 {
        self.memory.host().read_u64(Self::address(table, index)).unwrap_or(0)
    }

    /// What an entry of a table of `level` is.
    pub fn kind(&self, table: Hfn, index: u64, level: u8) -> Kind {
        Kind::of(self.raw(table, index), level)
    }

    /// Replaces an entry by what `change` makes of it; returns what stood there. Starts over when the walker set a flag
    /// in between, so no flag is lost.
    fn update(&mut self, table: Hfn, index: u64, change: impl Fn(u64) -> u64) -> u64 {
        let at = Self::address(table, index);
        loop {
            let old = self.raw(table, index);
            if self.memory.host().compare_exchange_u64(at, old, change(old)) != Some(false) {
                return old;
            }
        }
    }

    /// Puts `new` in the place of an entry, and keeps the accounts of its table.
    fn put(&mut self, table: Hfn, index: u64, new: u64) {
        let old = self.update(table, index, |_| new);
        let (children, used) =
            (!self.is_broken(Seeded::ChildrenNotCounted), !self.is_broken(Seeded::UsedNotCounted));
        if let Some(t) = self.tables.get_mut(&table) {
            let is_table = |raw| u16::from(matches!(Kind::of(raw, t.level), Kind::Table(_)));
            if children {
                t.children = t.children + is_table(new) - is_table(old);
            }
            if used {
                t.used = t.used + u16::from(new != 0) - u16::from(old != 0);
            }
        }
    }

    /// Writes a leaf.
    pub fn put_leaf(&mut self, table: Hfn, index: u64, leaf: Leaf) {
        self.put(table, index, leaf.raw());
    }

    /// Writes a marker.
    pub fn put_marker(&mut self, table: Hfn, index: u64, gfn: Gfn) {
        self.put(table, index, entry::marker(gfn));
    }

    /// Takes a leaf or a marker away.
    pub fn zap(&mut self, table: Hfn, index: u64) {
        self.put(table, index, 0);
        self.counters.count(Counter::EptEntriesZapped);
    }

    /// Gives a leaf its write right, or takes it away. Flags stay as they are.
    pub fn set_writable(&mut self, table: Hfn, index: u64, writable: bool) {
        use mmu::entry::bits::{EPT_W, EPT_X};
        let mask = if self.is_broken(Seeded::ProtectionTakesMore) { EPT_W | EPT_X } else { EPT_W };
        self.update(table, index, |raw| if writable { raw | EPT_W } else { raw & !mask });
    }

    /// Makes a table of `level` and lets the entry at `index` of `parent`, which must be empty or a leaf, lead to it.
    /// `fill` gives what its entries say: leaves or nothing.
    pub fn add(
        &mut self,
        parent: Hfn,
        index: u64,
        level: u8,
        first: u64,
        fill: impl Fn(u64) -> Option<Leaf>,
    ) -> Result<Hfn, MemoryError> {
        if self.tables.len() >= self.cap && !self.is_broken(Seeded::CapIgnored) {
            return Err(MemoryError::OutOfTableFrames { capacity: self.cap });
        }
        let frame = self.memory.allocate_table()?;
        let mut used = 0;
        for i in 0..ENTRIES {
            if let Some(leaf) = fill(i) {
                self.update(frame, i, |_| leaf.raw());
                used += 1;
            }
        }
        self.born += 1;
        self.tables.insert(frame, Table { level, first, parent, used, children: 0, born: self.born });
        self.by_age.insert(self.born, frame);
        self.counters.raise(Counter::TableFramesPeak, self.tables.len() as u64);
        // Only a finished table is led to: the walker may be under way.
        self.put(parent, index, entry::table(frame));
        if self.is_broken(Seeded::TableLinkedTwice) {
            self.put(parent, index + 1, entry::table(frame));
        }
        Ok(frame)
    }

    /// Frees a table and all below it, without touching the entry that leads to it. Returns how many leaves and markers
    /// went with it, and how many tables.
    fn forget(&mut self, table: Hfn) -> (u64, usize) {
        let Some(facts) = self.tables.remove(&table) else { return (0, 0) };
        self.by_age.remove(&facts.born);
        let (mut entries, mut tables) = (0, 1);
        for i in 0..ENTRIES {
            match self.kind(table, i, facts.level) {
                Kind::Empty => {}
                Kind::Table(_) if self.is_broken(Seeded::TablesBelowKept) => {}
                Kind::Table(child) => {
                    let below = self.forget(child);
                    entries += below.0;
                    tables += below.1;
                }
                _ => entries += 1,
            }
        }
        if !self.is_broken(Seeded::FrameLeaked) {
            self.memory.free_table(table);
        }
        (entries, tables)
    }

    /// Puts one leaf in the place of a table and all below it.
    pub fn put_leaf_for_table(&mut self, table: Hfn, index: u64, child: Hfn, leaf: Leaf) {
        self.put(table, index, leaf.raw());
        if !self.is_broken(Seeded::MergedTableKept) {
            self.forget(child);
        }
    }

    /// Frees a table if nothing is in it, and then the table above if that left it empty, up to the root or to one of
    /// `keep`. Returns how many were freed.
    pub fn prune(&mut self, table: Hfn, keep: &[Hfn]) -> usize {
        let (mut at, mut freed) = (table, 0);
        while let Some(&facts) = self.tables.get(&at) {
            if facts.used != 0 || at == self.root || keep.contains(&at) {
                break;
            }
            self.put(facts.parent, entry::index(facts.first, facts.level + 1), 0);
            freed += self.forget(at).1;
            at = facts.parent;
        }
        freed
    }

    /// Makes room: throws away the oldest tables that lead to no other, but for those in `keep` (the path of the fill
    /// under way). A sixteenth of the store goes at once, so that a guest larger than its tables pays for a flush of the
    /// whole TLB once in a while and not at every fill. False when there was nothing to throw away.
    ///
    /// The order is that of making, not of use: use is known only through accessed flags, which would have to be swept;
    /// and being the same in every run matters more here.
    pub fn reclaim(&mut self, keep: &[Hfn]) -> bool {
        let want = (self.cap.min(self.memory.table_usage().1) / 16).max(1);
        let keep = if self.is_broken(Seeded::ReclaimTakesThePath) { &[] } else { keep };
        let is_victim = |t: &Hfn| !keep.contains(t) && self.tables.get(t).is_some_and(|f| f.children == 0);
        let victims: Vec<Hfn> = self.by_age.values().copied().filter(is_victim).take(want).collect();
        let mut freed = 0;
        for victim in victims {
            let Some(&facts) = self.tables.get(&victim) else { continue };
            if !self.is_broken(Seeded::LinkToReclaimedKept) {
                self.put(facts.parent, entry::index(facts.first, facts.level + 1), 0);
            }
            let (entries, tables) = self.forget(victim);
            self.counters.add(Counter::EptEntriesZapped, entries);
            freed += tables;
            if !self.is_broken(Seeded::ReclaimLeavesEmptyTables) {
                freed += self.prune(facts.parent, keep);
            }
        }
        tracing::debug!(freed, "EPT tables reclaimed");
        self.reclaimed += freed as u64;
        freed != 0
    }
}

impl Drop for Tables {
    /// The pool outlives the backend: another may be put on the same memory.
    fn drop(&mut self) {
        for &table in self.tables.keys() {
            self.memory.free_table(table);
        }
    }
}
