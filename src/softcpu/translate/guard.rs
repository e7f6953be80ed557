//! Guards: the one check of a stretch ([`super::stretch`]), and the accesses behind it.
//!
//! The path of one access: the first access of a stretch looks the whole of it up in the inline TLB and keeps the host
//! address in the frame; the others need a register with that address, which is often still there. A guard that fails, for
//! a page that is crossed or not in the TLB, gives back the instructions that are left and goes to the *plain* translation
//! of what follows, in which each access is checked by itself. The block's next round tries the guard again; one that fails
//! most of the time, because what it checks lies across two pages, is given up ([`super::blocks`]).
//!
//! Manual: as [`super::check`].

use super::asm::{Mem, Target, host};
use super::block::Emission;
use super::check::{Address, Wants};
use super::classify::Kind;
use super::decoded::Insn;
use super::emit::{Emitter, TooMany};
use super::flag_state::FlagState;
use super::layout::{Home, field, home, hot};
use super::stretch::{Share, Stretch};
use iced_x86::{OpKind, Register};

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const R11: u8 = host::R11;

/// A memory operand in host registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Holds a host address.
    pub base: u8,
    /// Register and log2 of the scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Place {
    /// What a register points at.
    pub fn at(base: u8) -> Self {
        Self { base, index: None, disp: 0 }
    }

    fn mem(self) -> Mem {
        Mem { base: Some(self.base), index: self.index, disp: self.disp }
    }
}

/// Where the frame keeps the host address of a stretch.
const fn kept(stretch: u8) -> Mem {
    field(hot!(stretches) + stretch as i32 * 8)
}

/// The scratch register that is not this one.
fn other(register: u8) -> u8 {
    if register == RAX { R10 } else { RAX }
}

impl Emission<'_, '_> {
    /// Emits an instruction whose access shares a check.
    pub fn shared(&mut self, insn: &Insn, share: Share, stretches: &[Stretch]) -> Result<(), TooMany> {
        let near = (0..4096).contains(&(insn.insn.near_branch_target() as i64));
        if insn.kind == Kind::Return || insn.kind == Kind::Call && !near {
            self.to.keep_flags();
        }
        if share.first {
            let stretch = *stretches.get(usize::from(share.stretch)).ok_or(TooMany)?;
            self.guard(insn, share, stretch)?;
        }
        match insn.kind {
            Kind::Same => self.to.same(insn, None, false)?,
            Kind::Merge(taken) => self.to.same(insn, Some(taken), false)?,
            Kind::Push => self.to.shared_push(insn, share)?,
            Kind::Pop => self.to.shared_pop(insn, share),
            Kind::Leave => {
                let place = self.to.place(share);
                self.to.asm.lea(R11, Mem::at(host::RBP, 8));
                self.to.asm.load(host::RBP, place.mem());
            }
            Kind::Call => {
                if near {
                    self.to.release_flags();
                }
                let place = self.to.place(share);
                self.to.store_return_address(insn, place.base, place.disp);
                self.note_return(insn);
                self.go(insn.insn.near_branch_target() as i64);
            }
            Kind::Return => {
                let place = self.to.place(share);
                self.to.asm.load(RAX, place.mem());
                self.leave_by_return(insn);
            }
            _ => return Err(TooMany),
        }
        Ok(())
    }

    /// The check of a stretch, before its first access.
    fn guard(&mut self, insn: &Insn, share: Share, stretch: Stretch) -> Result<(), TooMany> {
        let to = &mut self.to;
        to.release_flags();
        to.start_of(insn, share)?;
        let fails = to.asm.label();
        let wants = if stretch.writes { Wants::Write } else { Wants::Read };
        let hosts = to.look_up(stretch.size, wants, fails);
        to.asm.op_mem(8, &[0x03], RAX, Mem::element(R10, 0, hosts));
        to.asm.store(kept(share.stretch), RAX);
        to.holds = [Some(share.stretch), None];

        let (flags, holds, arrives_in) = (to.flags, to.holds, self.arrives_in);
        to.asm.cold(true);
        to.asm.bind(fails);
        if flags == FlagState::Again
            && let Some(recipe) = to.recipe
        {
            to.again(&recipe);
            to.save_flags();
        }
        let undone = to.total.saturating_sub(to.index);
        to.asm.load(RAX, field(hot!(budget)));
        to.asm.lea(RAX, Mem::at(RAX, undone as i32));
        to.asm.store(field(hot!(budget)), RAX);
        to.flags = FlagState::Saved;
        (self.arrives_in, self.guard) = (arrives_in.with_plain(true), Some(self.to.index));
        self.go(i64::from(insn.offset));
        self.guard = None;
        self.to.asm.cold(false);
        (self.to.flags, self.to.holds, self.arrives_in) = (flags, holds, arrives_in);
        Ok(())
    }
}

impl Emitter<'_> {
    /// The linear address of the start of a stretch into RAX, from its first access.
    fn start_of(&mut self, insn: &Insn, share: Share) -> Result<(), TooMany> {
        let stack = match insn.kind {
            Kind::Push | Kind::Call => Some(Mem::at(R11, -8 - share.at)),
            Kind::Pop | Kind::Return => Some(Mem::at(R11, -share.at)),
            Kind::Leave => Some(Mem::at(host::RBP, -share.at)),
            _ => None,
        };
        if let Some(stack) = stack {
            return self.address(Address::Stack(stack));
        }
        let mut operand = insn.insn;
        let start =
            (operand.memory_displacement64() as i64).checked_sub(i64::from(share.at)).ok_or(TooMany)?;
        operand.set_memory_displacement64(start as u64);
        if share.index.is_some() {
            operand.set_memory_index(Register::None);
        }
        self.address(Address::Operand(&operand))
    }

    /// Where the operand of an access is: loads the host address of its stretch, where no register holds it, and its index,
    /// where that lives in memory.
    pub fn place(&mut self, share: Share) -> Place {
        let base = match self.holds {
            [Some(held), _] if held == share.stretch => RAX,
            [_, Some(held)] if held == share.stretch => R10,
            _ => {
                let base = if self.holds[1].is_some() && self.holds[0].is_none() { RAX } else { R10 };
                self.asm.load(base, kept(share.stretch));
                self.holds[usize::from(base == R10)] = Some(share.stretch);
                base
            }
        };
        let index = share.index.map(|(register, scale)| (self.value(register, other(base)), scale));
        Place { base, index, disp: share.at }
    }

    /// A scratch register has another value now.
    pub fn clobber(&mut self, register: u8) {
        match register {
            RAX => self.holds[0] = None,
            R10 => self.holds[1] = None,
            _ => {}
        }
    }

    fn shared_push(&mut self, insn: &Insn, share: Share) -> Result<(), TooMany> {
        let place = self.place(share);
        if insn.insn.op0_kind() == OpKind::Register {
            let from = self.value(insn.insn.op0_register().number() as u8, other(place.base));
            self.asm.store(place.mem(), from);
        } else {
            let value = i32::try_from(insn.insn.immediate(0) as i64).map_err(|_| TooMany)?;
            self.asm.op_mem(8, &[0xc7], 0, place.mem());
            self.asm.bytes(&value.to_le_bytes());
        }
        self.asm.lea(R11, Mem::at(R11, -8));
        Ok(())
    }

    fn shared_pop(&mut self, insn: &Insn, share: Share) {
        let place = self.place(share);
        match home(insn.insn.op0_register().number() as u8) {
            Home::Host(to) => self.asm.load(to, place.mem()),
            Home::Memory(slot) => {
                let scratch = other(place.base);
                self.asm.load(scratch, place.mem());
                self.clobber(scratch);
                self.asm.store(Mem::frame(slot), scratch);
            }
        }
        self.asm.lea(R11, Mem::at(R11, 8));
    }

    /// Stores the address behind a call at a host address, and moves the stack pointer.
    pub fn store_return_address(&mut self, insn: &Insn, base: u8, disp: i32) {
        let next = insn.offset as i32 + insn.insn.len() as i32;
        let scratch = other(base);
        self.asm.load(scratch, field(hot!(page)));
        self.asm.lea(scratch, Mem::at(scratch, next));
        self.asm.store(Mem::at(base, disp), scratch);
        self.clobber(scratch);
        self.asm.lea(R11, Mem::at(R11, -8));
    }

    /// Looks the address in RAX up: leaves it less the page's in RAX and the slot in R10, and gives where host addresses are.
    /// Goes to `fails` where it is not there, or the access leaves its page.
    pub fn look_up(&mut self, size: u32, wants: Wants, fails: super::asm::Label) -> i32 {
        let (tag, hosts) = super::check::array_of(wants, self.mode);
        if self.bmi2 {
            // RORX R10D, EAX, 8.
            self.asm.bytes(&[0xc4, 0x63, 0x7b, 0xf0, 0xd0, 8]);
        } else {
            self.asm.op_reg(4, &[0x8b], R10, RAX);
            self.asm.shift(4, 5, R10, 8);
        }
        self.asm.alu_imm(4, 4, R10, crate::tlb_inline::SLOT_MASK);
        self.asm.op_mem(8, &[0x2b], RAX, Mem::element(R10, 0, tag));
        // CMP RAX, imm32 has a short form.
        self.asm.bytes(&[0x48, 0x3d]);
        self.asm.bytes(&(4096 - size).to_le_bytes());
        self.asm.jcc(super::asm::cc::A, Target::Here(fails));
        hosts
    }
}
