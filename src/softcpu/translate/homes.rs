//! Which guest registers live in host registers in a loop: those that the loop uses most.
//!
//! Three guest registers live in memory ([`super::layout`]), R9 to R11 everywhere. A loop of one block may have others there:
//! where its iterations begin, a busy one of the three changes places with a register that the loop hardly names, and at
//! each way out they change back. The gates, the other blocks and the interpreter never see it.
//!
//! Where it stands in the path of one access: nowhere; it saves the loads and stores of registers beside it.
//!
//! Manual: Intel SDM Vol. 1 §3.4.1.1 (general registers in 64-bit mode).

use super::asm::Mem;
use super::check::implicit;
use super::classify::Kind;
use super::decoded::Insn;
use super::emit::Emitter;
use super::layout::{Home, home, hot, slot};
use iced_x86::{InstructionInfoFactory, OpKind, Register};

/// Registers that live in memory outside such loops.
const IN_MEMORY: [u8; 3] = [9, 10, 11];
/// How much more often a register must be named than the one whose place it takes.
const WORTH: u32 = 2;
const RSP: u8 = 4;

/// Two registers that change places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swap {
    /// The guest register that comes into a host register.
    pub comes: u8,
    /// The host register.
    pub host: u8,
    /// Where in the frame the guest register that was there is meanwhile. Not in its own place, which the gates write.
    pub parked: i32,
}

/// Where guest registers are in one block.
#[derive(Clone, Copy, Debug)]
pub struct Homes {
    homes: [Home; 16],
    swaps: [Option<Swap>; 3],
}

impl Default for Homes {
    fn default() -> Self {
        Self { homes: std::array::from_fn(|register| home(register as u8)), swaps: [None; 3] }
    }
}

impl Homes {
    /// Where a guest register is.
    pub fn of(&self, register: u8) -> Home {
        self.homes[usize::from(register) & 15]
    }

    /// The registers that have changed places.
    pub fn swaps(&self) -> impl Iterator<Item = Swap> + use<> {
        self.swaps.into_iter().flatten()
    }

    /// Whether every register is where it is outside loops.
    pub fn is_common(&self) -> bool {
        self.swaps[0].is_none()
    }

    /// The best for a loop whose first round are these instructions.
    pub fn for_loop(body: &[Insn], info: &mut InstructionInfoFactory) -> Self {
        let mut homes = Self::default();
        let Some((uses, pinned)) = census(body, info) else { return homes };
        let mut busy = IN_MEMORY;
        busy.sort_by_key(|&register| std::cmp::Reverse(uses[usize::from(register)]));
        let mut idle: Vec<u8> =
            (0..16).filter(|&r| r != RSP && pinned & 1 << r == 0 && !IN_MEMORY.contains(&r)).collect();
        idle.sort_by_key(|&register| uses[usize::from(register)]);
        let pairs = busy
            .into_iter()
            .zip(idle)
            .take_while(|&(busy, idle)| uses[usize::from(busy)] >= uses[usize::from(idle)] + WORTH);
        for (nth, (comes, goes)) in pairs.enumerate() {
            let Home::Host(host) = homes.of(goes) else { break };
            let parked = hot!(parked) + nth as i32 * 8;
            homes.swaps[nth] = Some(Swap { comes, host, parked });
            homes.homes[usize::from(comes)] = Home::Host(host);
            homes.homes[usize::from(goes)] = Home::Memory(parked);
        }
        homes
    }
}

/// How often each register is named, and which must stay where they are. `None` where there are instructions whose emission
/// takes the common places for granted.
fn census(body: &[Insn], info: &mut InstructionInfoFactory) -> Option<([u32; 16], u16)> {
    let (mut uses, mut pinned) = ([0; 16], 0u16);
    for insn in body {
        let i = &insn.insn;
        if !matches!(insn.kind, Kind::Nothing | Kind::Same | Kind::Merge(_) | Kind::Branch) {
            return None;
        }
        let operands =
            (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
        for register in operands.chain([i.memory_base(), i.memory_index()]).filter(|r| r.is_gpr()) {
            let number = register.full_register().number() & 15;
            uses[number] += 1;
            // The count of a shift is in CL, and only the first four registers have a second byte.
            let fixed =
                matches!(register, Register::CL | Register::AH | Register::BH | Register::CH | Register::DH);
            pinned |= u16::from(fixed) << number;
        }
        pinned |= implicit(info, i);
    }
    Some((uses, pinned))
}

impl Emitter<'_> {
    /// Where a guest register is in this block.
    pub fn home(&self, register: u8) -> Home {
        self.homes.of(register)
    }

    /// Lets registers change places at the entry of a loop. Changes no flags.
    pub fn swap_in(&mut self) {
        for Swap { comes, host, parked } in self.homes.swaps() {
            self.asm.store(Mem::frame(parked), host);
            self.asm.load(host, Mem::frame(slot(comes)));
        }
    }

    /// Lets them change back before a way out. Changes no flags.
    pub fn swap_out(&mut self) {
        for Swap { comes, host, parked } in self.homes.swaps() {
            self.asm.store(Mem::frame(slot(comes)), host);
            self.asm.load(host, Mem::frame(parked));
        }
    }
}
