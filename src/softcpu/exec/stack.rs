//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE, PUSHF, POPF (SDM Vol. 1 §6.2; Vol. 3 §20.2.7 for VM86).
//!
//! The stack pointer moves only after the memory access is done, so that a fault leaves it alone.

use super::address::{checked, read_address, write_address};
use super::{Form, Selected, operands};
use crate::by_width;
use crate::core::Core;
use crate::decode::CodeMode;
use crate::flags::bit;
use crate::op::{Flow, Handler, Op, Stop};
use crate::stores::Stores;
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic, OpKind};
use vcpu::state::seg;

const RSP: usize = 4;
const RBP: usize = 5;
const SS: u8 = seg::SS as u8;

impl Core {
    /// The bits of RSP that are the stack pointer.
    #[inline(always)]
    pub fn stack_mask(&self) -> u64 {
        if self.mode64 {
            u64::MAX
        } else if self.segments[seg::SS].big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the stack pointer at the stack's width.
    #[inline(always)]
    pub fn set_stack(&mut self, sp: u64) {
        if self.mode64 {
            self.regs[RSP] = sp;
        } else if self.segments[seg::SS].big() {
            self.regs[RSP] = sp & 0xffff_ffff;
        } else {
            self.regs[RSP] = (self.regs[RSP] & !0xffff) | (sp & 0xffff);
        }
    }

    /// Linear address of `len` bytes at an offset in the stack segment.
    #[inline(always)]
    fn stack_address(&mut self, sp: u64, len: u64, write: bool) -> Result<u64, Stop> {
        if self.mode64 { Ok(sp) } else { checked(self, SS, sp, len, write) }
    }

    /// Pushes `size` bytes (2, 4 or 8).
    #[inline(always)]
    pub fn push(&mut self, value: u64, size: u8) -> Result<(), Stop> {
        let sp = self.regs[RSP].wrapping_sub(u64::from(size)) & self.stack_mask();
        let lin = self.stack_address(sp, u64::from(size), true)?;
        match size {
            8 => self.store::<u64>(lin, value, SS)?,
            4 => self.store::<u32>(lin, value, SS)?,
            _ => self.store::<u16>(lin, value, SS)?,
        }
        self.set_stack(sp);
        Ok(())
    }

    /// Reads `size` bytes at `offset` above the top of the stack.
    #[inline(always)]
    pub fn peek(&mut self, offset: u64, size: u8) -> Result<u64, Stop> {
        let sp = self.regs[RSP].wrapping_add(offset) & self.stack_mask();
        let lin = self.stack_address(sp, u64::from(size), false)?;
        match size {
            8 => self.load::<u64>(lin, SS),
            4 => self.load::<u32>(lin, SS),
            _ => self.load::<u16>(lin, SS),
        }
    }

    /// Moves the stack pointer up.
    #[inline(always)]
    pub fn drop_stack(&mut self, bytes: u64) {
        let sp = self.regs[RSP].wrapping_add(bytes);
        self.set_stack(sp);
    }
}

fn push_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    core.push(W::get(&core.regs, op.dst, 0), W::BYTES as u8)
}

fn push_imm<W: Width>(core: &mut Core, op: &Op) -> Flow {
    core.push(op.imm & W::MASK, W::BYTES as u8)
}

fn push_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let lin = read_address(core, op, W::BYTES as u64)?;
    let v = core.load::<W>(lin, op.seg)?;
    core.push(v, W::BYTES as u8)
}

/// PUSH of a segment register writes 16 bits; the rest of the slot is written as zero, as newer CPUs do.
fn push_segment<W: Width>(core: &mut Core, op: &Op) -> Flow {
    core.push(u64::from(core.segments[usize::from(op.src) % 6].selector), W::BYTES as u8)
}

fn pop_reg<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = core.peek(0, W::BYTES as u8)?;
    core.drop_stack(W::BYTES as u64);
    // After the increment: POP RSP leaves the popped value.
    W::set(&mut core.regs, op.dst, 0, v);
    Ok(())
}

fn pop_mem<W: Width>(core: &mut Core, op: &Op) -> Flow {
    let v = core.peek(0, W::BYTES as u8)?;
    // An address that uses RSP uses it as it is after the increment.
    let old = core.regs[RSP];
    core.drop_stack(W::BYTES as u64);
    let done = write_address(core, op, W::BYTES as u64).and_then(|lin| core.store::<W>(lin, v, op.seg));
    if done.is_err() {
        core.regs[RSP] = old;
    }
    done
}

fn pusha<W: Width>(core: &mut Core, _op: &Op) -> Flow {
    let words = [0, 1, 2, 3, RSP, RBP, 6, 7].map(|reg| core.regs[reg] & W::MASK);
    core.push_all(&words, W::BYTES as u8)
}

fn popa<W: Width>(core: &mut Core, _op: &Op) -> Flow {
    let mut values = [0; 8];
    for (i, v) in values.iter_mut().enumerate() {
        *v = core.peek(i as u64 * W::BYTES as u64, W::BYTES as u8)?;
    }
    core.drop_stack(8 * W::BYTES as u64);
    for (i, v) in values.into_iter().enumerate() {
        let reg = 7 - i;
        if reg != RSP {
            W::set(&mut core.regs, reg as u8, 0, v);
        }
    }
    Ok(())
}

fn leave(core: &mut Core, op: &Op) -> Flow {
    let (old, frame) = (core.regs[RSP], core.regs[RBP]);
    core.set_stack(frame);
    let v = match core.peek(0, op.osize) {
        Ok(v) => v,
        Err(stop) => {
            core.regs[RSP] = old;
            return Err(stop);
        }
    };
    core.drop_stack(u64::from(op.osize));
    set_sized(core, RBP, op.osize, v);
    Ok(())
}

fn set_sized(core: &mut Core, reg: usize, size: u8, v: u64) {
    match size {
        8 => core.regs[reg] = v,
        4 => core.regs[reg] = v & u32::MASK,
        _ => u16::set(&mut core.regs, reg as u8, 0, v & u16::MASK),
    }
}

/// ENTER: `imm` is the frame's size, `aux` the nesting level.
fn enter(core: &mut Core, op: &Op) -> Flow {
    let size = op.osize;
    let level = op.aux % 32;
    let frame_pointer = core.regs[RBP];
    let mut stores = Stores::default();
    let mut sp = core.regs[RSP];
    // Linear addresses and values of what is pushed: the display may lie where it goes.
    let mut pushed = Vec::new();
    pushed.push((core.plan_push(&mut stores, &mut sp, frame_pointer, size)?, frame_pointer));
    let frame = sp;
    for i in 1..level {
        let at = frame_pointer.wrapping_sub(u64::from(i) * u64::from(size)) & core.stack_mask();
        let display = display_word(core, at, size, &pushed)?;
        pushed.push((core.plan_push(&mut stores, &mut sp, display, size)?, display));
    }
    if level > 0 {
        core.plan_push(&mut stores, &mut sp, frame, size)?;
    }
    let sp = sp.wrapping_sub(op.imm) & core.stack_mask();
    // The instruction ends with a probe of the new top of the stack.
    let lin = core.stack_address(sp, u64::from(size), true)?;
    core.check_write(lin, u64::from(size), SS)?;
    core.commit(stores)?;
    core.set_stack(sp);
    set_sized(core, RBP, size, frame);
    Ok(())
}

/// A word of the display at an offset in the stack, as it is after `pushed`.
fn display_word(core: &mut Core, at: u64, size: u8, pushed: &[(u64, u64)]) -> Result<u64, Stop> {
    let lin = core.stack_address(at, u64::from(size), false)?;
    let mut bytes = [0; 8];
    core.load_bytes(lin, &mut bytes[..usize::from(size)], SS)?;
    for (to, value) in pushed {
        for (i, byte) in bytes[..usize::from(size)].iter_mut().enumerate() {
            let inside = lin.wrapping_add(i as u64).wrapping_sub(*to);
            if inside < u64::from(size) {
                *byte = (value >> (8 * inside)) as u8;
            }
        }
    }
    Ok(u64::from_le_bytes(bytes))
}

fn pushf(core: &mut Core, op: &Op) -> Flow {
    if core.v86() && core.flags.iopl() < 3 {
        return Err(core.gp(0));
    }
    let v = core.flags.all() & !(bit::VM | bit::RF);
    core.push(v, op.osize)
}

fn popf(core: &mut Core, op: &Op) -> Flow {
    if core.v86() && core.flags.iopl() < 3 {
        return Err(core.gp(0));
    }
    let v = core.peek(0, op.osize)?;
    core.drop_stack(u64::from(op.osize));
    // SDM Vol. 2, POPF, table 4-15: IOPL changes at CPL 0 only, IF where CPL <= IOPL; VM, VIP and VIF never; RF clears.
    let mut mask = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT | bit::AC | bit::ID | bit::RF;
    if core.cpl == 0 && !core.v86() {
        mask |= bit::IOPL;
    }
    if core.cpl <= core.flags.iopl() || !core.protected() {
        mask |= bit::IF;
    }
    if op.osize == 2 {
        mask &= 0xffff;
    }
    core.set_flags_masked(v & !bit::RF, mask);
    Ok(())
}

/// Operand size of an implicit push or pop, from how far the stack pointer moves.
fn stack_size(insn: &Instruction) -> u8 {
    insn.stack_pointer_increment().unsigned_abs() as u8
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op, _mode: CodeMode) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Push => {
            op.osize = stack_size(insn);
            match insn.op0_kind() {
                OpKind::Register if insn.op0_register().is_segment_register() => {
                    op.src = crate::decode::segment_index(insn.op0_register());
                    by_width!(op.osize, push_segment)
                }
                OpKind::Register => {
                    operands(insn, op)?;
                    by_width!(op.osize, push_reg)
                }
                OpKind::Memory => by_width!(op.osize, push_mem),
                _ => {
                    op.imm = insn.immediate(0);
                    by_width!(op.osize, push_imm)
                }
            }
        }
        M::Pop => {
            if insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register() {
                return None;
            }
            match operands(insn, op)? {
                Form::Reg => by_width!(op.osize, pop_reg),
                _ => by_width!(op.osize, pop_mem),
            }
        }
        M::Pusha => pusha::<u16>,
        M::Pushad => pusha::<u32>,
        M::Popa => popa::<u16>,
        M::Popad => popa::<u32>,
        M::Leave => {
            op.osize = match insn.code() {
                iced_x86::Code::Leavew => 2,
                iced_x86::Code::Leaved => 4,
                _ => 8,
            };
            leave
        }
        M::Enter => {
            op.osize = match insn.code() {
                iced_x86::Code::Enterw_imm16_imm8 => 2,
                iced_x86::Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            op.imm = u64::from(insn.immediate16());
            op.aux = insn.immediate8_2nd();
            enter
        }
        M::Pushf | M::Pushfd | M::Pushfq => {
            op.osize = stack_size(insn);
            pushf
        }
        M::Popf | M::Popfd | M::Popfq => {
            op.osize = stack_size(insn);
            return Some(Selected::ending(popf));
        }
        _ => return None,
    };
    Some(Selected::plain(run))
}
