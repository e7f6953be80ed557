//! Which accesses are made in an address space: those that can be judged.
//!
//! Each candidate is put to the reference first. One that would read tables where no memory is, reach a page of which no
//! frame is known, execute what is no code of ours, or write to a table is not made: the first two are a matter of devices,
//! the third could do anything, and the last would change what is being judged (what a TLB may then remember is
//! [`reference::Tlb`]'s subject). Reads of tables through tables are made.

use crate::batch::Touch;
use crate::expect::{Expected, Left, Mistake, expect};
use crate::generate::{Chance, Space, levels, one_in};
use crate::memory::{Image, landed, landing, written_id};
use mmu::entry::bits::{G, P, PS};
use mmu::{Access, AccessKind, PagingMode, Privilege};
use rand::RngExt;
use rand::seq::IndexedRandom;
use reference::{Visit, visit};

/// Accesses of one batch.
const WANTED: usize = 64;
const TRIES: usize = 400;

/// Chooses the accesses of a batch at one privilege, data accesses of `bytes`. `image` is the state before, and becomes the state after.
pub(crate) fn choose(
    rng: &mut Chance,
    space: &Space,
    image: &mut Image,
    privilege: Privilege,
    bytes: u8,
) -> Vec<Touch> {
    let ac = rng.random();
    let addresses: Vec<u64> = (0..WANTED / 2).map(|_| space.address(rng)).collect();
    let mut touches = Vec::new();
    for _ in 0..TRIES {
        if touches.len() == WANTED {
            break;
        }
        let Some(&linear) = addresses.choose(rng) else { break };
        let kind = match rng.random_range(0..10) {
            0..4 => AccessKind::Read,
            4..7 => AccessKind::Write,
            _ => AccessKind::Execute,
        };
        let value = landing(written_id(touches.len()));
        let value = if bytes == 8 { value } else { value & 0xffff_ffff };
        let access = Access { kind, privilege, ac };
        let touch = Touch { linear: aimed(rng, space, image, linear), access, value };
        let Some(touch) = fit(space, image, touch) else { continue };
        let expected = expect(&space.cpu, image, &touch, bytes, Mistake::None, &mut Left::default());
        touches.push(touch);
        if one_in(rng, 16) && matches!(expected, Expected::Done(_)) && touches.len() < WANTED {
            // The same again: what a TLB remembers must not matter.
            touches.push(touch);
        }
    }
    touches
}

/// In a large page, most of which is none of the case's, the address of a frame that is.
fn aimed(rng: &mut Chance, space: &Space, image: &Image, linear: u64) -> u64 {
    let Ok(leaf) = visit(&space.cpu, image, linear).end else { return linear };
    if leaf.page_size == 4096 {
        return linear;
    }
    let among = if one_in(rng, 5) { &space.tables } else { &space.data };
    let inside = leaf.page_size - 1;
    // The alias differs above bit 32.
    let lies_inside = |frame: &u64| (frame << 12 ^ leaf.physical) & !inside & 0xffff_ffff == 0;
    let among: Vec<u64> = among.iter().copied().filter(lies_inside).collect();
    let Some(&frame) = among.choose(rng) else { return linear };
    space.canonical(linear & !inside | frame << 12 & inside | linear & 0xfff)
}

/// The access, or one like it that can be judged.
fn fit(space: &Space, image: &Image, touch: Touch) -> Option<Touch> {
    let visit = visit(&space.cpu, image, touch.linear);
    if image.take_outside() || space.is_beyond_limits(&touch, &visit) {
        return None;
    }
    let Ok(leaf) = visit.end else { return Some(touch) };
    if leaf.refusal(&space.cpu, &touch.access).is_some() {
        return Some(touch);
    }
    let physical = leaf.physical | touch.linear & (leaf.page_size - 1);
    let frame = image.frame_of(physical)?;
    let harmless = match touch.access.kind {
        AccessKind::Read => true,
        AccessKind::Write => !space.tables.contains(&frame),
        AccessKind::Execute => landed(image.get(physical & !7, 8)).is_some() && physical & 7 == 0,
    };
    if harmless {
        return Some(touch);
    }
    let access = Access { kind: AccessKind::Read, ..touch.access };
    fit(space, image, Touch { access, ..touch })
}

impl Space {
    /// Whether the access goes to a table, by the tables as they are in `image`.
    pub fn reads_a_table(&self, image: &Image, touch: &Touch) -> bool {
        visit(&self.cpu, image, touch.linear).end.is_ok_and(|leaf| {
            let physical = leaf.physical | touch.linear & (leaf.page_size - 1);
            image.frame_of(physical).is_some_and(|frame| self.tables.contains(&frame))
        })
    }

    /// Whether the vCPU is known to go its own way: see [`crate::features::Limits`].
    fn is_beyond_limits(&self, touch: &Touch, visit: &Visit) -> bool {
        let entries = visit.entries();
        if self.limits.lower_half_only && touch.linear >> 63 == 1 && touch.access.is_user() {
            return true;
        }
        if self.mode == PagingMode::Bits32 {
            let large = self.cpu.pse && entries[0].raw & (P | PS) == P | PS;
            // Address bit 32 is at bit 13, bit 39 at bit 20.
            let above = (1 << 21) - (1 << (self.limits.pse36_width - 19));
            return large && entries[0].raw & above != 0;
        }
        // Of the entries that were read, those above the page-directory table; a last one may map a page.
        let last = entries.len().saturating_sub(1);
        let above = levels(self.mode).iter().filter(|&&lowest| lowest >= 30).count();
        let leads_on = |nth: usize| nth < last || visit.end.is_err();
        let lma = self.cpu.lma;
        let mut upper = entries.iter().take(above).enumerate();
        lma && self.limits.bit_8_reserved && upper.any(|(nth, e)| leads_on(nth) && e.raw & (P | G) == P | G)
    }
}
