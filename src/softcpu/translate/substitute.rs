//! An instruction of the guest with its operands replaced: registers by where they are, memory by a checked host address.
//!
//! Where it stands in the path of one access: the instruction itself, behind the check ([`super::check`]). Encodings are
//! iced's, made anew from the decoded instruction; nothing of the guest's bytes is copied.
//!
//! Manual: Intel SDM Vol. 2 §2.1 (ModR/M, SIB), and each instruction's operand encoding.

use super::asm::{Mem, host};
use super::emit::{Emitter, TooMany};
use super::guard::Place;
use super::homes::Homes;
use super::layout::Home;
use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};

const RAX: u8 = host::RAX;
const R10: u8 = host::R10;

impl Emitter<'_> {
    /// Emits the instruction with its operands replaced. `place` is where the memory operand is.
    pub fn substituted(
        &mut self,
        guest: &Instruction,
        place: Option<Place>,
        accumulator: bool,
    ) -> Result<(), TooMany> {
        let mut insn = *guest;
        insn.set_has_lock_prefix(false);
        insn.set_has_repe_prefix(false);
        insn.set_has_repne_prefix(false);
        insn.set_segment_prefix(Register::None);
        super::recode::without_fixed_registers(&mut insn);
        // Only the host's RAX has a second byte that can be named.
        let accumulator = accumulator || place.is_none() && names_ah(guest);
        let mut scratch = Scratch::new(place, accumulator, self);
        if place.is_none() && !accumulator {
            self.operand_in_memory(&mut insn);
        }
        for operand in 0..insn.op_count() {
            match insn.op_kind(operand) {
                OpKind::Register => {
                    let register = insn.op_register(operand);
                    if register.is_gpr() {
                        let replaced = scratch.replace(register, accumulator)?;
                        insn.set_op_register(operand, replaced);
                    }
                }
                OpKind::Memory => {
                    if let Some(place) = place {
                        insn.set_memory_base(sized(place.base, 8));
                        let (index, scale) = place
                            .index
                            .map_or((Register::None, 0), |(index, scale)| (sized(index, 8), scale));
                        insn.set_memory_index(index);
                        insn.set_memory_index_scale(1 << scale);
                        insn.set_memory_displacement64(place.disp as i64 as u64);
                        insn.set_memory_displ_size(u32::from(place.disp != 0));
                    }
                }
                _ => {}
            }
        }
        let (written, overwritten) = self.written(guest);
        if accumulator {
            self.asm.copy(RAX, host::R9);
            self.clobber(RAX);
        }
        for &(slot, number) in scratch.loaded() {
            self.clobber(number);
            if !overwritten.contains(&slot) {
                self.asm.load(number, Mem::frame(slot));
            }
        }
        let length = self.encoder.encode(&insn, 0).map_err(|_| TooMany)?;
        let code = self.encoder.take_buffer();
        debug_assert_eq!(length, code.len());
        self.asm.bytes(&code);
        for &(slot, number) in scratch.loaded() {
            if written.contains(&slot) {
                self.asm.store(Mem::frame(slot), number);
            }
        }
        if accumulator {
            self.asm.copy(host::R9, RAX);
        }
        Ok(())
    }

    /// The slots of guest registers in memory that the instruction writes, and those of them whose old value nobody wants.
    fn written(&mut self, guest: &Instruction) -> (Vec<i32>, Vec<i32>) {
        let (mut written, mut wanted) = (Vec::new(), Vec::new());
        let homes = self.homes;
        let info = self.info.info(guest);
        for i in 0..guest.op_count() {
            if guest.op_kind(i) != OpKind::Register || !guest.op_register(i).is_gpr() {
                continue;
            }
            let Home::Memory(slot) = homes.of(guest.op_register(i).full_register().number() as u8) else {
                continue;
            };
            match info.op_access(i) {
                OpAccess::Read | OpAccess::CondRead | OpAccess::None => wanted.push(slot),
                OpAccess::Write if guest.op_register(i).size() >= 4 => written.push(slot),
                _ => {
                    written.push(slot);
                    wanted.push(slot);
                }
            }
        }
        let overwritten = written.iter().copied().filter(|slot| !wanted.contains(slot)).collect();
        (written, overwritten)
    }

    /// If one operand is a register that lives in memory, and the instruction can take it from there, lets it.
    fn operand_in_memory(&mut self, insn: &mut Instruction) {
        let homes = self.homes;
        let in_memory =
            |insn: &Instruction, i| match homes.of(insn.op_register(i).full_register().number() as u8) {
                Home::Memory(slot) if insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr() => {
                    Some(slot)
                }
                _ => None,
            };
        let mut found = (0..insn.op_count()).filter_map(|i| Some((i, in_memory(insn, i)?)));
        let (Some((operand, slot)), None) = (found.next(), found.next()) else { return };
        // A 32-bit result clears the upper half of its register, which a store to memory would not; and a load of the whole
        // would have to wait for a store of a part.
        let access = self.info.info(insn).op_access(operand);
        let reads = matches!(access, OpAccess::Read | OpAccess::CondRead);
        let size = insn.op_register(operand).size();
        if !reads && size != 8 {
            return;
        }
        // A bit offset in a register is taken modulo the size of a register, but reaches anywhere from memory.
        let is_bit_test =
            matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if is_bit_test && insn.op1_kind() == OpKind::Register {
            return;
        }
        let mut candidate = *insn;
        let Some(operand) = super::recode::memory_operand(&mut candidate, operand) else { return };
        candidate.set_op_kind(operand, OpKind::Memory);
        candidate.set_memory_base(Register::RSP);
        candidate.set_memory_index(Register::None);
        candidate.set_memory_index_scale(1);
        candidate.set_memory_displacement64(slot as u64);
        candidate.set_memory_displ_size(1);
        // PEXTRB and its kin clear the rest of a register, and store a part only.
        let accessed = candidate.memory_size().size();
        if accessed == size || reads && (1..size).contains(&accessed) {
            *insn = candidate;
        }
    }
}

/// Whether an operand is AH.
fn names_ah(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i) == Register::AH)
}

/// Scratch registers given to guest registers that live in memory.
struct Scratch {
    homes: Homes,
    free: Vec<u8>,
    loaded: Vec<(i32, u8)>,
}

impl Scratch {
    /// Registers that hold the host address of a stretch are taken last.
    fn new(place: Option<Place>, accumulator: bool, emitter: &Emitter<'_>) -> Self {
        let (homes, holds) = (emitter.homes, emitter.holds);
        let taken = |r: u8| {
            place.is_some_and(|p| p.base == r || p.index.is_some_and(|(index, _)| index == r))
                || accumulator && r == RAX
        };
        let order = if holds[0].is_some() && holds[1].is_none() { [RAX, R10] } else { [R10, RAX] };
        Self { homes, free: order.into_iter().filter(|&r| !taken(r)).collect(), loaded: Vec::new() }
    }

    fn loaded(&self) -> &[(i32, u8)] {
        &self.loaded
    }

    /// The host register for a guest register of any size.
    fn replace(&mut self, register: Register, accumulator: bool) -> Result<Register, TooMany> {
        if register == Register::AH && !accumulator {
            return Err(TooMany);
        }
        if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
            return Ok(register);
        }
        let guest = register.full_register().number() as u8;
        let number = match self.homes.of(guest) {
            Home::Host(_) if accumulator && guest == 0 => RAX,
            Home::Host(number) => number,
            Home::Memory(slot) => match self.loaded.iter().find(|(s, _)| *s == slot) {
                Some(&(_, number)) => number,
                None => {
                    let number = self.free.pop().ok_or(TooMany)?;
                    self.loaded.push((slot, number));
                    number
                }
            },
        };
        Ok(sized(number, register.size()))
    }
}

/// The host register of this number and size.
pub fn sized(number: u8, size: usize) -> Register {
    let first = match size {
        1 => {
            return match number {
                0 => Register::AL,
                1 => Register::CL,
                2 => Register::DL,
                3 => Register::BL,
                n => Register::SPL + u32::from(n - 4),
            };
        }
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + u32::from(number)
}
