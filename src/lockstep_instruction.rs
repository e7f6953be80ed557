//! One guest instruction for people: its bytes, its text, and the linear addresses that it names.
//!
//! It stands behind [`crate::lockstep`], at a difference. Text and addresses come from iced-x86; the syntax is Intel's
//! (SDM Vol. 2 §3.1).

use crate::lockstep_side::Side;
use crate::lockstep_translations::guest_gives;
use guestmem::{Gva, PAGE_SIZE};
use iced_x86::{
    Decoder, DecoderOptions, Formatter, InstructionInfoFactory, IntelFormatter, Mnemonic, OpAccess, Register,
};
use mmu::{Access, AccessKind, Privilege};
use serde::{Deserialize, Serialize};
use vcpu::ArchState;
use vcpu::state::seg;

/// The longest instruction.
const LONGEST: usize = 15;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_VM: u64 = 1 << 17;

/// An instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instruction {
    /// RIP before it.
    pub rip: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its text.
    pub text: String,
    /// 16, 32 or 64.
    bitness: u32,
}

/// An address that an instruction accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operand {
    pub(crate) gva: Gva,
    pub(crate) write: bool,
}

/// The instruction that a side stands before; `None` where its bytes cannot be fetched.
pub(crate) fn fetch(side: &Side) -> Option<Instruction> {
    let state = side.machine.cpu.state();
    let long = state.efer & EFER_LMA != 0 && state.segments[seg::CS].long();
    let bitness = match (long, state.segments[seg::CS].big()) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    };
    let user = state.segments[seg::SS].dpl() == 3 || state.rflags & RFLAGS_VM != 0;
    let privilege = if user { Privilege::User } else { Privilege::Supervisor };
    let access = Access::new(AccessKind::Execute, privilege);
    let mut linear = state.rip;
    if !long {
        linear = linear.wrapping_add(state.segments[seg::CS].base) & 0xffff_ffff;
    }
    let mut bytes = Vec::new();
    while bytes.len() < LONGEST {
        let at = Gva(linear.wrapping_add(bytes.len() as u64));
        let Some(gpa) = guest_gives(side, at, &access) else { break };
        let len = ((PAGE_SIZE - at.page_offset()) as usize).min(LONGEST - bytes.len());
        let mut part = vec![0; len];
        if side.machine.memory().read(gpa, &mut part).is_err() {
            break;
        }
        bytes.extend(part);
    }
    Instruction::decode(bytes, state.rip, bitness)
}

impl Instruction {
    fn decode(mut bytes: Vec<u8>, rip: u64, bitness: u32) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        let decoded = Decoder::with_ip(bitness, &bytes, rip, DecoderOptions::NONE).decode();
        let mut formatter = IntelFormatter::new();
        let options = formatter.options_mut();
        options.set_hex_prefix("0x");
        options.set_hex_suffix("");
        options.set_space_after_operand_separator(true);
        options.set_uppercase_hex(false);
        let mut text = String::new();
        if decoded.is_invalid() {
            text += "(undefined)";
        } else {
            formatter.format(&decoded, &mut text);
            bytes.truncate(decoded.len());
        }
        Some(Self { rip, bytes, text, bitness })
    }

    fn decoded(&self) -> iced_x86::Instruction {
        Decoder::with_ip(self.bitness, &self.bytes, self.rip, DecoderOptions::NONE).decode()
    }

    /// The bytes as people write them.
    pub fn hex(&self) -> String {
        self.bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
    }

    /// The addresses of its memory operands, those of the stack included.
    pub(crate) fn operands(&self, state: &ArchState) -> Vec<Operand> {
        let decoded = self.decoded();
        let mut factory = InstructionInfoFactory::new();
        let used = factory.info(&decoded).used_memory();
        let mut operands = Vec::new();
        for memory in used {
            let write = match memory.access() {
                OpAccess::Read | OpAccess::CondRead => false,
                OpAccess::NoMemAccess | OpAccess::None => continue,
                _ => true,
            };
            if let Some(at) = memory.virtual_address(0, |register, _, _| self.register(register, state)) {
                operands.push(Operand { gva: Gva(at), write });
            }
        }
        operands
    }

    /// The address of an INVLPG.
    pub(crate) fn invalidates(&self, state: &ArchState) -> Option<Gva> {
        let decoded = self.decoded();
        if decoded.mnemonic() != Mnemonic::Invlpg {
            return None;
        }
        decoded.virtual_address(0, 0, |register, _, _| self.register(register, state)).map(Gva)
    }

    /// The value of a register that an address is made of; of a segment register, its base.
    fn register(&self, register: Register, state: &ArchState) -> Option<u64> {
        let flat = self.bitness == 64;
        let base = |index: usize| Some(if flat && index < seg::FS { 0 } else { state.segments[index].base });
        match register {
            Register::ES => base(seg::ES),
            Register::CS => base(seg::CS),
            Register::SS => base(seg::SS),
            Register::DS => base(seg::DS),
            Register::FS => base(seg::FS),
            Register::GS => base(seg::GS),
            Register::RIP | Register::EIP => Some(state.rip),
            _ if register.is_gpr() => {
                let value = state.gprs.get(register.full_register().number())?;
                Some(match register.size() {
                    8 => *value,
                    4 => *value & 0xffff_ffff,
                    2 => *value & 0xffff,
                    _ => *value & 0xff,
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{MachineConfig, Wiring};

    fn state() -> ArchState {
        let config = MachineConfig::for_guest(guests::find("hello").unwrap());
        let machine = crate::Machine::new(config, Wiring::default()).unwrap();
        machine.cpu().state()
    }

    #[test]
    fn text_and_addresses_of_operands() {
        let mut state = state();
        state.gprs[7] = 0x1000;
        state.gprs[4] = 0x8000;
        state.segments[seg::GS].base = 0x50_0000;
        for (bytes, text, operands) in [
            (&[0x48, 0x8b, 0x47, 0x08][..], "mov rax, [rdi+8]", &[(0x1008, false)][..]),
            (&[0x57], "push rdi", &[(0x7ff8, true)]),
            (&[0x65, 0x89, 0x07], "mov gs:[rdi], eax", &[(0x50_1000, true)]),
            (&[0x90, 0xcc], "nop", &[]),
        ] {
            let i = Instruction::decode(bytes.to_vec(), 0x400, 64).unwrap();
            assert_eq!(i.text, text);
            let found: Vec<_> = i.operands(&state).iter().map(|o| (o.gva.0, o.write)).collect();
            assert_eq!(found, operands, "{text}");
            assert_eq!(i.invalidates(&state), None);
        }
        let invlpg = Instruction::decode(vec![0x0f, 0x01, 0x3f], 0x400, 64).unwrap();
        assert_eq!(invlpg.invalidates(&state), Some(Gva(0x1000)));
        assert_eq!(invlpg.hex(), "0f 01 3f");
        assert_eq!(Instruction::decode(vec![0x0f, 0x0b, 0x90], 0, 64).unwrap().text, "ud2");
        assert_eq!(Instruction::decode(vec![0x06], 0, 64).unwrap().text, "(undefined)");
        assert!(Instruction::decode(vec![], 0, 64).is_none());
    }
}
