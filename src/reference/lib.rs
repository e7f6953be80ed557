//! What an x86 CPU makes of a linear address, written from SDM Vol. 3 chapter 4 alone, one function a section.
//!
//! It stands beside the path of an access, never in it: tests, the property suites and the oracles hold the walker, both
//! backends and real processors against it. It is slow, it repeats itself where the manual does, and it shares nothing
//! with `mmu::walk` but the types of the question ([`mmu::Access`], [`mmu::PagingState`]), so that a mistake in one is not
//! a mistake in both. In the order of a translation:
//!
//! 1. [`Cpu`]: the control bits, one by one as the manual names them;
//! 2. [`visit`]: which entries the address selects, and where that ends (§4.3 to §4.5);
//! 3. [`Leaf::refusal`]: whether the access is permitted, and the error code if not (§4.6, §4.7);
//! 4. [`translate`]: all of it, with the accessed and dirty flags written (§4.8);
//! 5. [`Tlb`]: what may be remembered, and what has to be forgotten (§4.10).

mod cpu;
mod rights;
mod structures;
mod tlb;

pub use cpu::Cpu;
pub use structures::{Entry, Leaf, Visit, visit};
pub use tlb::{Cached, Tlb, must_forget};

use mmu::Access;

/// Physical memory as the walk sees it.
pub trait Ram {
    /// The `bytes` (4 or 8) at an aligned physical address.
    fn entry(&self, address: u64, bytes: u8) -> u64;
    /// Stores them.
    fn set_entry(&mut self, address: u64, bytes: u8, value: u64);
    /// Whether what is stored there stays. Where it does not (ROM, no memory at all), the processor stores its flags into
    /// the void and goes on as if they were set.
    fn keeps(&self, address: u64) -> bool {
        let _everywhere = address;
        true
    }
}

/// What a translation comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The access goes to physical memory.
    Page {
        /// The physical address.
        physical: u64,
        /// The size of the page in bytes.
        page_size: u64,
        /// Whether the leaf's G flag is set.
        global: bool,
    },
    /// A page fault with this error code.
    Fault(u32),
}

/// Translates, sets flags, and counts the entries read. Flags are set in the entries that the walk goes through even
/// where it then ends in a fault, which the manual leaves open and which processors do.
pub fn translate<R: Ram>(cpu: &Cpu, ram: &mut R, linear: u64, access: &Access) -> (Outcome, u64) {
    let visit = visit(cpu, ram, linear);
    let read = visit.entries().len() as u64;
    // §4.8: the accessed flag of each entry that was used to reach the next structure.
    let used = match visit.end {
        Ok(_) => visit.entries(),
        Err(_) => &visit.entries()[..visit.entries().len().saturating_sub(1)],
    };
    let tables = if visit.end.is_ok() { used.len().saturating_sub(1) } else { used.len() };
    for entry in &used[..tables] {
        let now = ram.entry(entry.address, entry.bytes);
        ram.set_entry(entry.address, entry.bytes, now | 1 << 5);
    }
    let leaf = match visit.end {
        Err(flags) => return (Outcome::Fault(rights::code(cpu, access, flags)), read),
        Ok(leaf) => leaf,
    };
    if let Some(code) = leaf.refusal(cpu, access) {
        return (Outcome::Fault(code), read);
    }
    if let Some(entry) = used.last() {
        let dirty = if access.is_write() { 1 << 6 } else { 0 };
        let now = ram.entry(entry.address, entry.bytes);
        ram.set_entry(entry.address, entry.bytes, now | 1 << 5 | dirty);
    }
    let physical = leaf.physical | linear & (leaf.page_size - 1);
    (Outcome::Page { physical, page_size: leaf.page_size, global: leaf.global }, read)
}
