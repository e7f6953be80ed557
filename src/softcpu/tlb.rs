//! The translation look-aside buffer (SDM Vol. 3 §4.10.2): three arrays, for reads, writes and fetches.
//!
//! A tag is a page address with 12 bits of context in place of the offset: which PCID generation, and by which kind of
//! access it was filled (user, supervisor, supervisor with EFLAGS.AC), so that one compare checks page, process and
//! rights. Flushing a PCID, or everything, gives out new generation numbers and costs nothing; when the numbers are used
//! up everything is emptied once. Global entries hit under any PCID: a miss looks at the slot once more and re-tags a global
//! entry.
//!
//! A page that has an entry for writes has one for reads: both come with one walk, and when the one for reads has to go the
//! other goes with it. So an instruction that reads and writes may look at the one for writes alone, and so may translated
//! code that checks a read and a later write to the same page at once: neither spares a walk that the other engine makes.

use crate::tlb_array::{MODE_BITS, MODE_MASK, TlbArray, TlbEntry};
use crate::tlb_inline::InlineTlb;
use guestmem::{Gva, Hfn, PageSize};
use mmu::TlbFlush;

/// How many flushed pages are remembered one by one.
const FLUSHED_PAGES: usize = 32;
/// One entry for writes, one for reads, and what goes with that.
const EVICTED: usize = 4;
/// Context numbers fill the tag bits above the mode; 0 is never used.
const CONTEXTS: u16 = 1 << (12 - MODE_BITS);

/// Who makes an access, as far as the TLB tells apart. Part of the tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TlbMode {
    /// Supervisor with EFLAGS.AC clear.
    Supervisor = 0,
    /// CPL 3.
    User = 1,
    /// Supervisor with EFLAGS.AC set.
    SupervisorAc = 2,
    /// No entry is ever filled: alignment checks or watchpoints must see each access.
    Uncached = 3,
}

/// Remembers, without ever forgetting wrongly, whether a large page that holds an address was filled: one bit a hashed
/// stretch. A false yes costs a flush of everything.
#[derive(Debug, Default)]
struct LargeFilter([u64; 16]);

impl LargeFilter {
    fn bit(lin: u64, size: PageSize) -> (usize, u64) {
        let hash =
            ((lin >> size.shift()) + u64::from(size.shift())).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
        ((hash / 64) as usize, 1 << (hash % 64))
    }

    fn insert(&mut self, lin: u64, size: PageSize) {
        let (word, bit) = Self::bit(lin, size);
        self.0[word] |= bit;
    }

    fn may_contain(&self, lin: u64) -> bool {
        [PageSize::Size2M, PageSize::Size4M, PageSize::Size1G].into_iter().any(|size| {
            let (word, bit) = Self::bit(lin, size);
            self.0[word] & bit != 0
        })
    }
}

/// Which array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbSide {
    /// Data reads.
    Read,
    /// Data writes.
    Write,
    /// Instruction fetches.
    Fetch,
}

/// The TLB of one CPU.
#[derive(Debug)]
pub struct Tlb {
    /// For data reads.
    pub read: TlbArray,
    /// For data writes.
    pub write: TlbArray,
    /// For fetches.
    pub fetch: TlbArray,
    /// Context number of each PCID; 0: none yet.
    contexts: Box<[u16; 4096]>,
    /// The PCIDs that have one.
    named: Vec<u16>,
    next_context: u16,
    pcid: u16,
    /// The current context and mode, as they stand in tags. Fetches never see EFLAGS.AC.
    pub key: u64,
    /// The same for fetches.
    pub fetch_key: u64,
    /// Which stretches of addresses had a large page filled in pieces, hashed.
    large: LargeFilter,
    /// Counts every flush of a context or more.
    pub flushes: u64,
    /// Entries for data that had to go for others.
    pub evictions: u64,
    /// The host pages of the last of them: as many as one walk can make go.
    pub evicted: [u64; EVICTED],
    /// Grows with whatever may change where a fetch goes; caches of fetch translations compare it.
    pub fetch_generation: u64,
    /// Grows with whatever may change where a fetch through any entry goes, single pages apart.
    pub global_generation: u64,
    /// Single pages that were flushed since somebody looked, as many as are remembered one by one.
    pub flushed_pages: Vec<u64>,
    /// What translated code looks into. It holds nothing that the arrays above do not hold for the current context.
    pub inline: InlineTlb,
}

impl Default for Tlb {
    fn default() -> Self {
        let mut tlb = Self {
            read: TlbArray::new(),
            write: TlbArray::new(),
            fetch: TlbArray::new(),
            contexts: Box::new([0; 4096]),
            named: Vec::new(),
            next_context: 1,
            pcid: 0,
            key: 0,
            fetch_key: 0,
            large: LargeFilter::default(),
            flushes: 0,
            evictions: 0,
            evicted: [0; EVICTED],
            fetch_generation: 0,
            global_generation: 0,
            flushed_pages: Vec::new(),
            inline: InlineTlb::default(),
        };
        tlb.select(0, TlbMode::Supervisor, TlbMode::Supervisor);
        tlb
    }
}

impl Tlb {
    /// Sets the current PCID and the modes of data accesses and of fetches.
    #[inline]
    pub fn select(&mut self, pcid: u16, data: TlbMode, fetch: TlbMode) {
        self.pcid = pcid % 4096;
        self.enter(data as u64, fetch as u64);
    }

    /// Makes the context of the current PCID the one that is looked up.
    #[inline]
    fn enter(&mut self, data: u64, fetch: u64) {
        let context = u64::from(self.context(self.pcid));
        if self.key >> MODE_BITS != context {
            self.inline.forget_context();
        }
        self.key = context << MODE_BITS | data;
        self.fetch_key = context << MODE_BITS | fetch;
    }

    #[inline]
    fn context(&mut self, pcid: u16) -> u16 {
        let known = self.contexts[usize::from(pcid)];
        if known != 0 { known } else { self.new_context(pcid) }
    }

    #[cold]
    fn new_context(&mut self, pcid: u16) -> u16 {
        if self.next_context == CONTEXTS {
            self.empty();
        }
        let fresh = self.next_context;
        self.next_context += 1;
        self.contexts[usize::from(pcid)] = fresh;
        self.named.push(pcid);
        fresh
    }

    /// Ends every context. Their numbers are not given out again before [`Self::empty`], so nothing filled in them hits.
    fn end_contexts(&mut self) {
        for pcid in self.named.drain(..) {
            self.contexts[usize::from(pcid)] = 0;
        }
    }

    /// Forgets everything, at no price that depends on how much there is.
    fn forget(&mut self) {
        self.end_contexts();
        for array in [&mut self.read, &mut self.write, &mut self.fetch] {
            array.forget_global();
        }
        self.forgotten();
    }

    /// The same in earnest: context numbers begin anew.
    fn empty(&mut self) {
        self.end_contexts();
        for array in [&mut self.read, &mut self.write, &mut self.fetch] {
            array.clear();
        }
        self.next_context = 1;
        self.forgotten();
    }

    fn forgotten(&mut self) {
        self.large = LargeFilter::default();
        self.fetch_generation += 1;
        self.global_generation += 1;
        self.inline.clear();
    }

    fn reselect(&mut self) {
        self.enter(self.key & MODE_MASK, self.fetch_key & MODE_MASK);
    }

    /// Fills an entry of the current context for the page of `lin`. `addend` added to a linear address of the page
    /// gives the host address; `size` is that of the page in the guest's eyes. Nothing is filled in
    /// [`TlbMode::Uncached`].
    pub fn fill(&mut self, side: TlbSide, lin: u64, addend: u64, global: bool, size: PageSize) {
        let key = if side == TlbSide::Fetch { self.fetch_key } else { self.key };
        if key & MODE_MASK != TlbMode::Uncached as u64 {
            self.fill_for(key, side, lin, addend, global, size);
        }
    }

    /// The key under which the CPU's own accesses to system structures are held: those of a supervisor, whatever the
    /// privilege of the code that runs.
    #[inline(always)]
    pub fn system_key(&self) -> u64 {
        (self.key & !MODE_MASK) | TlbMode::Supervisor as u64
    }

    /// As [`Self::fill`], for the CPU's own accesses to system structures.
    pub fn fill_system(&mut self, side: TlbSide, lin: u64, addend: u64, global: bool, size: PageSize) {
        self.fill_for(self.system_key(), side, lin, addend, global, size);
    }

    fn fill_for(&mut self, key: u64, side: TlbSide, lin: u64, addend: u64, global: bool, size: PageSize) {
        if size != PageSize::Size4K {
            self.large.insert(lin, size);
        }
        match side {
            TlbSide::Read => self.fill_read(key, lin, addend, global),
            TlbSide::Write => {
                // What may be written may be read, and mostly is. Both are global or neither, so that neither outlives the
                // other where contexts change.
                if self.read.find(lin, key) != Some(addend) || self.read.is_global(lin, key) != global {
                    self.fill_read(key, lin, addend, global);
                }
                if let Some((gone, held)) = self.write.fill(lin, key, addend, global)
                    && held
                {
                    self.evict(TlbSide::Write, gone);
                }
            }
            TlbSide::Fetch => {
                self.fetch.fill(lin, key, addend, global);
            }
        }
    }

    /// Fills an entry for reads. With the one that has to go for it goes that for writes to the same page.
    fn fill_read(&mut self, key: u64, lin: u64, addend: u64, global: bool) {
        let Some((gone, held)) = self.read.fill(lin, key, addend, global) else { return };
        if held {
            self.evict(TlbSide::Read, gone);
        }
        for twin in self.write.take_like(gone.tag).into_iter().flatten() {
            self.evict(TlbSide::Write, twin);
        }
    }

    /// Notes that an entry is gone.
    fn evict(&mut self, side: TlbSide, gone: TlbEntry) {
        self.evicted[self.evictions as usize % EVICTED] = (gone.tag & !0xfff).wrapping_add(gone.addend);
        self.evictions += 1;
        self.inline.remove(side, gone.tag);
    }

    /// Lets translated code find the entry that the current context has for `lin`. False if there is none.
    pub fn fill_inline(&mut self, side: TlbSide, lin: u64) -> bool {
        let key = self.key;
        let array = if side == TlbSide::Write { &mut self.write } else { &mut self.read };
        let Some(addend) = array.find(lin, key) else {
            return false;
        };
        let global = array.is_global(lin, key);
        self.inline.fill(side, lin, (key & MODE_MASK) as usize, addend, global);
        true
    }

    /// Forgets what `flush` says; `host_base` is where host memory is mapped.
    pub fn flush(&mut self, flush: TlbFlush, host_base: u64) {
        match flush {
            TlbFlush::None => return,
            // A large page is held in pieces, and a flush of one address must take all of them.
            TlbFlush::Page(Gva(lin)) | TlbFlush::PageOf(_, Gva(lin)) if self.large.may_contain(lin) => {
                self.forget();
            }
            TlbFlush::Page(Gva(lin)) => {
                let context = self.key & 0xfff & !MODE_MASK;
                self.remove_page(lin, |tag, global| global || tag & 0xfff & !MODE_MASK == context);
                return;
            }
            TlbFlush::PageOf(pcid, Gva(lin)) => {
                let context = u64::from(self.contexts[usize::from(pcid % 4096)]) << MODE_BITS;
                self.remove_page(lin, |tag, global| !global && tag & 0xfff & !MODE_MASK == context);
                return;
            }
            TlbFlush::Frame(frame) => {
                // After write protection: reads and fetches through the frame stay right.
                self.protect_frame(frame, host_base);
                return;
            }
            TlbFlush::Pcid(pcid) => {
                self.contexts[usize::from(pcid % 4096)] = 0;
                self.fetch_generation += 1;
            }
            TlbFlush::NonGlobal => {
                self.end_contexts();
                self.fetch_generation += 1;
            }
            TlbFlush::All => self.forget(),
        }
        self.flushes += 1;
        self.reselect();
    }

    fn remove_page(&mut self, lin: u64, wanted: impl Fn(u64, bool) -> bool) {
        self.read.remove_page(lin, &wanted);
        self.write.remove_page(lin, &wanted);
        self.fetch.remove_page(lin, &wanted);
        self.inline.remove_page(lin);
        self.fetch_generation += 1;
        if self.flushed_pages.len() < FLUSHED_PAGES {
            self.flushed_pages.push(lin & !0xfff);
        } else {
            self.flushed_pages.clear();
            self.global_generation += 1;
        }
    }

    /// Forgets write entries that lead to a frame: bytes of it were decoded.
    pub fn protect_frame(&mut self, frame: Hfn, host_base: u64) {
        let inline = &mut self.inline;
        self.write
            .remove_frame(host_base.wrapping_add(frame.base().0), |tag| inline.remove(TlbSide::Write, tag));
    }
}

#[cfg(test)]
#[path = "tlb_tests.rs"]
mod tests;
