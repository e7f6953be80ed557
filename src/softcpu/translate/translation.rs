//! The making of a block: from the bytes of a page to code in the arena.
//!
//! Where it stands in the path of one access: once for each block, before its first. [`super::decoded`] says what is in it,
//! [`super::block`] emits it, and [`super::blocks`] keeps it.
//!
//! Manual: Intel SDM Vol. 3 §11.6 (self-modifying code): a block depends on its bytes, and goes with them.

use super::block::{Emission, Parts};
use super::blocks::{Block, Link, key};
use super::classify::{Kind, Setting};
use super::crossing::Second;
use super::decoded::{self, Decoded};
use super::emit::Emitter;
use super::find::NO_BLOCK;
use super::flag_state::FlagState;
use super::frame::{self, FrameBox};
use super::mode::Mode;
use super::run::Translator;
use super::trust;
use crate::op::Stop;
use guestmem::{Hfn, Hpa, PAGE_SIZE};
use mmu::Counter;

impl Translator {
    /// Translates the block at a physical address, to which RIP leads.
    pub(super) fn translate(
        &mut self,
        core: &mut FrameBox,
        mode: Mode,
        hpa: Hpa,
        ip: u64,
    ) -> Result<u32, Stop> {
        let mut bytes = [0; 4096];
        core.memory.host().read(hpa.page_base(), &mut bytes);
        let index = self.translate_bytes(core, mode, hpa, &bytes, None);
        if index == NO_BLOCK { self.translate_crossing(core, mode, hpa, ip, &bytes) } else { Ok(index) }
    }

    /// Translates the block in a page's bytes, or one instruction that ends in another frame. [`NO_BLOCK`] if it needs one.
    pub(super) fn translate_bytes(
        &mut self,
        core: &mut FrameBox,
        mode: Mode,
        hpa: Hpa,
        bytes: &[u8],
        second: Option<Hfn>,
    ) -> u32 {
        if self.blocks.is_full() {
            self.overflow(core);
        }
        let setting = Setting { user: mode.user(), vectors: mode.vectors(), avx: self.avx, host: self.host };
        let offset = hpa.page_offset() as u32;
        let plain = mode.plain() || second.is_some();
        let mut decoded = decoded::decode(core, &mut self.info, bytes, offset, setting, plain);
        if decoded.insns.is_empty() {
            return NO_BLOCK;
        }
        // What jumps through another mode's indirect-branch cache finds it in order.
        match decoded.insns.last().map(|i| i.kind) {
            Some(Kind::SystemCall) => self.blocks.prepare_mode(core, Mode::KERNEL),
            Some(Kind::SystemReturn | Kind::InterruptReturn) => {
                self.blocks.prepare_mode(core, Mode::USER_VECTORS)
            }
            _ => {}
        }
        core.counters.count(Counter::BlocksTranslated);
        if let Some(index) = self.emit(core, mode, hpa, second, bytes, &mut decoded) {
            return index;
        }
        // No room: everything goes, and the pages have other numbers then.
        self.overflow(core);
        if let Some(index) = self.emit(core, mode, hpa, second, bytes, &mut decoded) {
            return index;
        }
        let page = self.blocks.page(core, hpa.frame(), mode.user());
        self.blocks.insert(core, untranslated(hpa, mode, page))
    }

    fn overflow(&mut self, core: &mut FrameBox) {
        self.blocks.overflows += 1;
        self.clear(core);
    }

    fn emit(
        &mut self,
        core: &mut FrameBox,
        mode: Mode,
        hpa: Hpa,
        second: Option<Hfn>,
        bytes: &[u8],
        decoded: &mut Decoded,
    ) -> Option<u32> {
        let page = self.blocks.page(core, hpa.frame(), mode.user());
        let second = second.map(|frame| Second { frame, page: self.blocks.page(core, frame, mode.user()) });
        let count = decoded.insns.iter().filter(|i| !i.kind.is_outside()).count() as u32;
        let gates = self.gates[usize::from(mode.vectors())];
        let linear_bits = core.paging.linear_bits();
        let to = Emitter::new(
            &mut self.asm,
            &mut self.encoder,
            &mut self.info,
            mode.with_plain(false),
            gates,
            linear_bits,
            count,
            FlagState::Saved,
        );
        let unshared = self.blocks.unshared(key(hpa, mode));
        let parts = Parts {
            tight: self.tight,
            plain: mode.plain(),
            bytes,
            second_word: second.map(|second| frame::page_word(second.page as usize)),
            page_word: frame::page_word(page as usize),
            targets: frame::targets(mode.index()),
            block: self.blocks.next_number(),
            unshared: &unshared,
        };
        let mut emission = Emission {
            to,
            parts,
            ops: Vec::new(),
            exits: Vec::new(),
            arrives_in: mode.with_plain(false),
            guard: None,
        };
        let entries = emission.block(core, decoded)?;
        let (ops, exits) = (emission.ops, emission.exits);
        let origin = self.blocks.arena.room(self.asm.size())?;
        let code = self.asm.finish(origin)?;
        self.blocks.arena.place(&code);
        core.counters.raise(Counter::TranslatedBytesPeak, self.blocks.arena.used() as u64);
        let at = |label| self.asm.offset(label).map(|offset| origin + offset);
        let links = exits
            .iter()
            .map(|e| {
                Some(Link {
                    operand: at(e.operand)?,
                    stub: at(e.stub)?,
                    form: e.form,
                    mode: e.mode,
                    to: None,
                    guard: e.guard,
                    failures: (0, 0),
                })
            })
            .collect::<Option<Vec<_>>>()?;
        let on_second = if second.is_some() { PAGE_SIZE - hpa.page_offset() + 1 } else { 0 };
        let block = Block {
            hpa,
            // Of an invalid instruction the first byte on the second page is looked at.
            len: (u64::from(decoded.end) - hpa.page_offset()).max(on_second),
            mode,
            page,
            second,
            count,
            entries: [at(entries.indirect)?, at(entries.page)?, at(entries.host)?, at(entries.saved)?],
            links,
            incoming: Vec::new(),
            ops,
            slots: Vec::new(),
            hash: 0,
        };
        let block = Block { hash: trust::hash_of(core, &block), ..block };
        Some(self.blocks.insert(core, block))
    }
}

/// A block that is left to the interpreter.
fn untranslated(hpa: Hpa, mode: Mode, page: u32) -> Block {
    Block {
        hpa,
        len: 0,
        mode,
        page,
        second: None,
        count: 0,
        entries: [0; 4],
        links: Vec::new(),
        incoming: Vec::new(),
        ops: Vec::new(),
        slots: Vec::new(),
        hash: 0,
    }
}
