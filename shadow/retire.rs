//! Roots that nobody will load again, and links of those that are new.
//!
//! A root is kept when its CPU leaves it ([`crate::cr3`]), and nothing in the architecture says when its address space has
//! ended. A dead root costs more than its page: its frame stays write protected, so that the guest traps at every entry when
//! it clears the frame for its next use, and what lies below it keeps counting as in use (a large page that only a boot loader's
//! tables had splintered would make every INVLPG in the same gigabyte flush everything). Two signs are taken for death:
//!
//! - The guest has emptied the lower half, where programs live, by its own writes. That is how kernels take an address
//!   space down, the kernel's half being shared. The root goes when no CPU uses it any more.
//! - As many other roots were made since its last load as [`OLD`] says.
//!
//! Neither can do harm: a root that is loaded after all is made again, as after reclaim.

use crate::Seeded;
use crate::ShadowMmu;
use crate::pages::{ENTRIES, EntryRef, PageId, Pages, frame_of};
use crate::role::{Kind, Target};
use crate::spte::{self, link_key};
use guestmem::{PAGE_SIZE, Slot};
use mmu::Counter;
use mmu::entry::bits::A;

/// A root not loaded while so many others were made is taken for dead.
const OLD: u32 = 64;
/// How many roots are made between two looks for old ones: each look costs a little for each root there is.
const LOOK_EVERY: u32 = 16;
/// The half of the address space where kernels live, as [`crate::splinter::half`] numbers them.
const UPPER: u8 = 2;

impl ShadowMmu {
    /// Whether entries of the lower half stand in a root that is a table of the guest's.
    pub(crate) fn has_lower_half(&self, id: PageId) -> bool {
        let page = &self.pages[id];
        page.role.kind == Kind::Guest
            && Pages::is_top(&page.role)
            && page.present[..4].iter().any(|&bits| bits != 0)
    }

    /// A write has emptied the lower half of a root.
    pub(crate) fn root_emptied(&mut self, id: PageId) {
        self.pages[id].emptied = true;
        self.root_left(id);
    }

    /// A CPU may have left a root: it goes if that was the last and the guest had emptied it.
    pub(crate) fn root_left(&mut self, id: PageId) {
        let page = &self.pages[id];
        if self.options.dead_roots && page.emptied && page.pins == 0 && !self.has_lower_half(id) {
            self.counters.count(Counter::ShadowRootsDead);
            self.zap_page(id);
        }
    }

    /// A root was taken for use; `new` if it was made for that.
    pub(crate) fn root_taken(&mut self, id: PageId, new: bool) {
        if new {
            if self.options.root_links {
                self.prefill_links(id);
            }
            self.roots_made = self.roots_made.wrapping_add(1);
            if self.options.dead_roots && self.roots_made.is_multiple_of(LOOK_EVERY) {
                self.retire_old_roots();
            }
        }
        self.pages[id].loaded = self.roots_made;
    }

    fn retire_old_roots(&mut self) {
        let made = self.roots_made;
        let old = |page: &crate::pages::Page| page.pins == 0 && made.wrapping_sub(page.loaded) >= OLD;
        let dead: Vec<PageId> =
            self.pages.tops().iter().copied().filter(|&id| old(&self.pages[id])).collect();
        for id in dead {
            self.counters.count(Counter::ShadowRootsDead);
            self.zap_page(id);
        }
    }

    /// Makes the links of the kernel's half that lead to tables which are shadowed already: they are the same in every
    /// address space of most kernels, and each would cost a fault otherwise.
    ///
    /// Only tables reached through the upper half and no other are taken, because through which half a table is reached is
    /// noted by faults on the way through it ([`crate::splinter`]), and there will be none here.
    fn prefill_links(&mut self, id: PageId) {
        let role = self.pages[id].role;
        let (Kind::Guest, Slot::Ram(frame)) = (role.kind, self.memory.slot(self.pages[id].gfn)) else {
            return;
        };
        let mut table = [0; PAGE_SIZE as usize];
        if !self.memory.host().read(frame.base(), &mut table) {
            return;
        }
        let (entries, _) = table.as_chunks::<8>();
        for (index, raw) in entries.iter().enumerate().skip(ENTRIES / 2) {
            let raw = u64::from_le_bytes(*raw);
            if raw & A == 0 && !self.is_broken(Seeded::RootLinkNotAccessed) {
                continue;
            }
            let Target::Table { gfn, role, rights } = role.guest_target(index, raw) else { continue };
            let Some(child) = self.pages.find(gfn, &role) else { continue };
            if self.pages[child].halves == UPPER {
                let at = EntryRef::new(id, index);
                self.set_link(at, spte::link(frame_of(child), rights), child, link_key(raw));
                self.counters.count(Counter::ShadowLinksPrefilled);
            }
        }
    }
}
