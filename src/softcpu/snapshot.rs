//! The CPU's architectural state as plain data, out and in; and what its TLB holds, out only.

use crate::attention::Attention;
use crate::core::Core;
use crate::flags::bit;
use crate::op::REG_IP;
use crate::tlb::TlbMode;
use guestmem::{Gva, Hpa};
use mmu::{Access, AccessKind, Privilege};
use vcpu::state::seg;
use vcpu::{ArchState, CachedTranslation, Pending};

/// The MSRs of a snapshot, in ascending order of index, and where they are kept.
macro_rules! msrs {
    ($m:expr) => {
        [
            (0x10, &mut $m.tsc_offset),
            (0x174, &mut $m.sysenter_cs),
            (0x175, &mut $m.sysenter_esp),
            (0x176, &mut $m.sysenter_eip),
            (0x1a0, &mut $m.misc_enable),
            (0x277, &mut $m.pat),
            (0xc000_0081, &mut $m.star),
            (0xc000_0082, &mut $m.lstar),
            (0xc000_0083, &mut $m.cstar),
            (0xc000_0084, &mut $m.sfmask),
            (0xc000_0102, &mut $m.kernel_gs_base),
            (0xc000_0103, &mut $m.tsc_aux),
        ]
    };
}

impl Core {
    /// A copy of everything architectural. Index 0x10 holds the offset of the time-stamp counter, not its value.
    pub fn arch_state(&self) -> ArchState {
        let mut gprs = [0; 16];
        gprs.copy_from_slice(&self.regs[..16]);
        let mut held = self.msrs;
        ArchState {
            gprs,
            rip: self.regs[usize::from(REG_IP)],
            rflags: self.flags.all(),
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.paging.cr0,
            cr2: self.cr2,
            cr3: self.paging.cr3,
            cr4: self.paging.cr4,
            efer: self.paging.efer,
            pdptes: self.paging.pdptes,
            debug: self.debug,
            pkru: self.paging.pkru,
            xcr0: self.xcr0,
            fxsave: self.fpu.image().chunks_exact(8).map(word).collect(),
            ymm_high: self.fpu.ymm_highs().iter().flat_map(|&v| [v as u64, (v >> 64) as u64]).collect(),
            msrs: msrs!(held).map(|(index, value)| (index, *value)).to_vec(),
            interrupt_shadow: self.attention.contains(Attention::SHADOW),
            nmi_blocked: self.nmi_blocked,
            halted: self.attention.contains(Attention::HALTED),
            pending: self.pending(),
            ticks: self.ticks,
        }
    }

    /// Every entry of the TLB.
    pub fn cached_translations(&self) -> Vec<CachedTranslation> {
        // A tag is the page's address with the context and, in its lowest two bits, the mode in place of the offset.
        const CONTEXT: u64 = 0xffc;
        let here = self.tlb.key & CONTEXT;
        let arrays = [
            (AccessKind::Read, &self.tlb.read),
            (AccessKind::Write, &self.tlb.write),
            (AccessKind::Execute, &self.tlb.fetch),
        ];
        let mut held = Vec::new();
        for (kind, array) in arrays {
            held.extend(array.held().map(|(entry, global)| {
                let (page, mode) = (entry.tag & !0xfff, entry.tag & 3);
                let user = mode == TlbMode::User as u64;
                let privilege = if user { Privilege::User } else { Privilege::Supervisor };
                CachedTranslation {
                    gva: Gva(page),
                    hpa: Hpa(page.wrapping_add(entry.addend).wrapping_sub(self.host_base)),
                    access: Access { kind, privilege, ac: mode == TlbMode::SupervisorAc as u64 },
                    current: global || entry.tag & CONTEXT == here,
                }
            }));
        }
        held
    }

    fn pending(&self) -> Pending {
        Pending {
            event: self.event.filter(|_| self.attention.contains(Attention::EVENT)),
            arrival: self.native.arrival,
            nmi: self.attention.contains(Attention::NMI),
            breakpoints: self.native.debug_hits | self.native.held_hits,
            stack_shadow: self.attention.contains(Attention::SHADOW) && self.native.stack_shadow,
            repeating: self.native.repeating,
            shut_down: self.attention.contains(Attention::SHUTDOWN),
        }
    }

    fn set_pending(&mut self, pending: &Pending) {
        self.event = pending.event;
        self.attention.set(Attention::EVENT, pending.event.is_some());
        self.native.arrival = pending.arrival;
        self.attention.set(Attention::ARRIVAL, pending.arrival.is_some());
        self.attention.set(Attention::NMI, pending.nmi);
        self.attention.set(Attention::SHUTDOWN, pending.shut_down);
        self.native.held_hits = pending.breakpoints;
        self.native.stack_shadow = pending.stack_shadow;
        self.native.repeating = pending.repeating;
    }

    /// Replaces the x87, SSE and AVX state.
    pub(crate) fn load_vector_state(&mut self, state: &ArchState) {
        let mut image = *self.fpu.image();
        for (bytes, word) in image.chunks_exact_mut(8).zip(&state.fxsave) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        // An image with reserved MXCSR bits, which no CPU can have held, leaves the state as it is.
        let _refused = self.fpu.load_image(&image);
        for (number, halves) in state.ymm_high.chunks_exact(2).take(16).enumerate() {
            self.fpu.set_ymm_high(number, u128::from(halves[1]) << 64 | u128::from(halves[0]));
        }
    }

    /// Replaces everything architectural. What an instruction under way had been answered is forgotten.
    pub fn set_arch_state(&mut self, state: &ArchState) {
        self.regs[..16].copy_from_slice(&state.gprs);
        self.segments = state.segments;
        self.ldtr = state.ldtr;
        self.tr = state.tr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.paging.cr0 = state.cr0;
        self.paging.cr3 = state.cr3;
        self.paging.cr4 = state.cr4;
        self.paging.efer = state.efer;
        self.paging.pkru = state.pkru;
        self.paging.pdptes = state.pdptes;
        self.cr2 = state.cr2;
        self.debug = state.debug;
        self.xcr0 = state.xcr0;
        self.load_vector_state(state);
        for (index, value) in &state.msrs {
            if let Some((_, slot)) = msrs!(self.msrs).into_iter().find(|(i, _)| i == index) {
                *slot = *value;
            }
        }
        self.nmi_blocked = state.nmi_blocked;
        self.attention = Attention::empty();
        self.attention.set(Attention::SHADOW, state.interrupt_shadow);
        self.attention.set(Attention::HALTED, state.halted);
        self.ticks = state.ticks;
        self.added_ticks = state.ticks;
        self.end_transient();
        self.table_stores.clear();
        self.code_writes_done.clear();
        self.exit = None;
        self.native.forget_instruction();
        self.set_pending(&state.pending);
        self.flags.set_all(state.rflags);
        // Outside protected mode and in virtual-8086 mode the CPL is fixed; else it is SS.DPL, or what a task that is to
        // be entered asks for.
        self.cpl = if self.flags.has(bit::VM) {
            3
        } else if state.pending.arrival.is_some() {
            (self.segments[seg::CS].selector & 3) as u8
        } else if self.protected() {
            self.segments[seg::SS].dpl()
        } else {
            0
        };
        self.mode_changed();
        // A task may have begun with an EIP beyond the limit of its CS, which is then in the frame of its fault.
        self.regs[usize::from(REG_IP)] = state.rip & if self.mode64 { u64::MAX } else { 0xffff_ffff };
        self.flush_tlb(mmu::TlbFlush::All);
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))
}
