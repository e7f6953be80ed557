//! User mode handed to another processor and taken back: what the direct execution of user code needs of this CPU.
//!
//! Where it stands in the path of one access: between two instructions of user mode. Whoever executes user code takes the
//! registers at one of them and gives them back at another, at which this CPU goes on; what the other cannot execute (a
//! fault, a system call, an interrupt) is met here again, and takes the way that it takes without the other.
//!
//! Manual: Intel SDM Vol. 3 §5.5 (privilege levels), §2.5 (control registers).

use crate::core::Core;
use crate::engine::SoftCpu;
use crate::flags::bit;
use crate::op::REG_IP;
use guestmem::{Gva, Hpa};
use mmu::walk::{HostTables, translate_access};
use mmu::{Access, AccessKind, Privilege, TableRoot};
use vcpu::state::seg;
use vcpu::{ArchState, Exit};

impl Core {
    /// Whether the next instruction is of user mode with nothing else to look at, in 64-bit paging, with interrupts enabled,
    /// unless it goes without, and nothing that single instructions have to be executed for.
    fn is_at_plain_user_code(&self) -> bool {
        self.cpl == 3
            && self.long_mode()
            && self.attention.is_empty()
            && (self.flags.has(bit::IF) || self.goes_without_interrupts)
            && self.flags.all() & (bit::TF | bit::NT | bit::RF | bit::VM | bit::IOPL | bit::AC) == 0
    }

    /// Whether the next instruction is for somebody else.
    #[inline]
    pub(crate) fn stops_here(&self) -> bool {
        self.stop_at_user && self.is_at_plain_user_code()
    }
}

impl SoftCpu {
    /// Whether the CPU stands at plain user code.
    pub fn is_at_plain_user_code(&self) -> bool {
        matches!(self.pending, None | Some(Exit::Deadline)) && self.core.is_at_plain_user_code()
    }

    /// Whether a run is to end where plain user code begins, with [`Exit::Deadline`] before its time. Translated code goes on
    /// into user code that it knows the way to; none is known after [`SoftCpu::take_user_registers`], and while this is on none
    /// comes to be.
    pub fn stop_at_user_code(&mut self, stop: bool) {
        self.core.stop_at_user = stop;
    }

    /// Lets user code with interrupts disabled be plain, too.
    pub fn go_without_interrupts(&mut self) {
        self.core.goes_without_interrupts = true;
    }

    /// Grows whenever code below privilege level 3 is entered.
    pub fn kernel_entries(&self) -> u64 {
        self.core.hot.kernel_entries
    }

    /// Where the tables are that translate.
    pub fn table_root(&self) -> TableRoot {
        self.core.root
    }

    /// Reads what the supervisor can, through the tables as they are, without a fault and without setting flags. False if not all
    /// of it is mapped.
    pub fn peek(&self, gva: Gva, bytes: &mut [u8]) -> bool {
        let TableRoot::Shadow { root, format, controls } = self.core.root else { return false };
        let access = Access { kind: AccessKind::Read, privilege: Privilege::Supervisor, ac: true };
        let mut done = 0;
        while done < bytes.len() {
            let at = Gva(gva.0.wrapping_add(done as u64));
            let part = (bytes.len() - done).min((4096 - at.page_offset()) as usize);
            let mut tables = HostTables::new(self.core.memory.host());
            let Ok(found) = translate_access(format, root.0, at, &access, &controls, &mut tables);
            let Ok(found) = found else { return false };
            self.core.memory.host().read(Hpa(found.physical(at.0)), &mut bytes[done..done + part]);
            done += part;
        }
        true
    }

    /// Takes registers over that user code has changed elsewhere: general registers, RIP, RFLAGS, data segments, vector state.
    /// Stores may have been made anywhere in what user mode can write.
    pub fn take_user_registers(&mut self, state: &ArchState) {
        let core = &mut self.core;
        core.regs[..16].copy_from_slice(&state.gprs);
        for index in [seg::ES, seg::DS, seg::FS, seg::GS, seg::CS, seg::SS] {
            core.segments[index] = state.segments[index];
        }
        core.load_vector_state(state);
        core.flags.set_all(state.rflags);
        core.mode_changed();
        core.set_ip(state.rip);
        self.pending = None;
        self.distrust_user_code();
    }

    /// The instruction that user code has just executed elsewhere was stepped over by RFLAGS.TF.
    pub fn trap_step(&mut self) {
        self.core.native.single_step = true;
        self.core.debug_trap();
    }

    /// What was made of user mode's code may be of other bytes than are there now. What the interpreter has decoded is dropped
    /// once it comes to user code: where a stay follows a stay, as between two ticks of a guest's clock, it never does.
    fn distrust_user_code(&mut self) {
        self.decoded_distrusted = true;
        if let Some(translator) = &mut self.translator {
            translator.distrust(&mut self.core);
        }
    }

    /// RIP.
    pub fn instruction_pointer(&self) -> u64 {
        self.core.regs[usize::from(REG_IP)]
    }
}
