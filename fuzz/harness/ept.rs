//! What a processor makes of a guest-physical address, written from SDM Vol. 3 §29.3.2 "EPT translation mechanism" and
//! §29.3.3 "EPT-induced VM exits" alone. It stands beside [`mmu::nested`] as the crate `reference` stands beside
//! [`mmu::walk`]: slow, sharing nothing with what it judges, setting no flags.

use mmu::AccessKind;

/// The page that a guest-physical address lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// The host-physical address of the page.
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Bits 2:0 that every entry has.
    pub rights: u64,
}

/// Why there is no such page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An entry is not present.
    NotPresent,
    /// An entry is present and says what none may say.
    Misconfigured,
    /// The page is there, and the access is not permitted by these bits 2:0.
    Denied(u64),
}

fn bits(raw: u64, high: u32, low: u32) -> u64 {
    raw >> low & ((1 << (high - low + 1)) - 1)
}

/// §29.3.3.1, "EPT Misconfigurations", for an entry that is present.
fn is_misconfigured(raw: u64, level: u32, leaf: bool, maxphyaddr: u32) -> bool {
    let writable_only = bits(raw, 1, 0) == 0b10;
    let address_too_wide = maxphyaddr < 52 && bits(raw, 51, maxphyaddr) != 0;
    let reserved = match (level, leaf) {
        (4, _) => bits(raw, 7, 3) != 0,
        (_, false) => bits(raw, 6, 3) != 0,
        (3, true) => bits(raw, 29, 12) != 0,
        (2, true) => bits(raw, 20, 12) != 0,
        _ => false,
    };
    let memory_type = leaf && !matches!(bits(raw, 5, 3), 0 | 1 | 4 | 5 | 6);
    writable_only || address_too_wide || reserved || memory_type
}

/// Finds the page for a guest-physical address in the table at `root`; `read` reads host-physical memory.
pub fn page(read: impl Fn(u64) -> u64, root: u64, gpa: u64, maxphyaddr: u32) -> Result<Page, Refusal> {
    // A page walk of length 4 translates 48 bits.
    if bits(gpa, 63, 48) != 0 {
        return Err(Refusal::NotPresent);
    }
    let (mut table, mut rights) = (root, 0b111);
    for level in (1..=4).rev() {
        let shift = 12 + 9 * (level - 1);
        let raw = read(table | bits(gpa, shift + 8, shift) << 3);
        if bits(raw, 2, 0) == 0 {
            return Err(Refusal::NotPresent);
        }
        let leaf = level == 1 || level < 4 && bits(raw, 7, 7) == 1;
        if is_misconfigured(raw, level, leaf, maxphyaddr) {
            return Err(Refusal::Misconfigured);
        }
        rights &= bits(raw, 2, 0);
        table = bits(raw, 51, 12) << 12;
        if leaf {
            return Ok(Page { base: table, size: 1 << shift, rights });
        }
    }
    // Level 1 has only leaves.
    Err(Refusal::Misconfigured)
}

/// The host-physical address for an access of a kind.
pub fn translate(
    read: impl Fn(u64) -> u64,
    root: u64,
    gpa: u64,
    maxphyaddr: u32,
    kind: AccessKind,
) -> Result<u64, Refusal> {
    let page = page(read, root, gpa, maxphyaddr)?;
    let needed = match kind {
        AccessKind::Read => 0b001,
        AccessKind::Write => 0b010,
        AccessKind::Execute => 0b100,
    };
    if page.rights & needed == 0 {
        return Err(Refusal::Denied(page.rights));
    }
    Ok(page.base | gpa & (page.size - 1))
}
