//! Stretches: accesses of a block that lie near each other and share one check.
//!
//! The path of one access: the first access of a stretch checks all of it ([`super::guard`]) and keeps the host address; the
//! others go there at a constant distance. What registers hold is followed through the block as *root plus offset*, so that
//! `[rsi]`, `add rsi, 8`, `[rsi]` are 8 bytes apart, in the copies of an unrolled loop too, and the pushes of a prologue are
//! one stretch with the call behind them. An index below a known bound (a byte that was zero-extended) makes the stretch as
//! long as it may reach: a table of 256 entries is one.
//!
//! A stretch is only good while nobody but the block's own accesses touches the TLB: a handler that is called ends all of
//! them, and a refill that has to evict an entry leaves the block ([`super::called`]), so that both engines walk at the same
//! accesses. Accesses that share a check cannot fault, so nobody sees the flags at them.
//!
//! Manual: Intel SDM Vol. 1 §3.7.5 (address of an operand), §3.4.1.1 (32-bit results clear the upper half).

use super::check::{Wants, access, changed};
use super::classify::{Kind, must_be_aligned};
use super::decoded::Insn;
use super::homes::Homes;
use super::layout::Home;
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

/// Stretches of one block at most: the frame has so many places for host addresses.
pub const MOST: usize = 8;
/// The longest stretch of constant distances. Longer ones cross pages more often, and a check that fails costs the block.
const LONGEST: i64 = 256;
/// The longest stretch with an index below a bound.
const LONGEST_INDEXED: i64 = 1152;
/// Bounds of an index that are of use.
const WIDEST: u64 = 1023;
const RSP: usize = 4;
const RBP: usize = 5;
/// The root of addresses relative to the page of the code, and of absolute ones.
const PAGE: u32 = 16;
const ABSOLUTE: u32 = 17;
const FIRST_FRESH: u32 = 18;

/// A stretch that is checked at once.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// Bytes.
    pub size: u32,
    /// The right to write is wanted.
    pub writes: bool,
}

/// What an access has of the stretch that it is part of.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// The number of the stretch.
    pub stretch: u8,
    /// It is the first, which does the check.
    pub first: bool,
    /// Where its operand is from the start of the stretch, without the index.
    pub at: i32,
    /// Guest register and log2 of the scale of an index that the distance does not hold.
    pub index: Option<(u8, u8)>,
}

/// What a register holds: a value that is not known, plus an offset; perhaps at most so much.
#[derive(Clone, Copy, Debug)]
struct Value {
    root: u32,
    offset: i64,
    most: Option<u64>,
}

/// What accesses must have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    base: u32,
    index: Option<(u32, u8)>,
    writes: bool,
}

/// An access of the block.
#[derive(Clone, Copy, Debug)]
struct Access {
    key: Key,
    at: i64,
    size: i64,
    index: Option<(u8, u8)>,
}

/// A stretch as it grows.
struct Growing {
    key: Key,
    low: i64,
    end: i64,
    /// Instructions, and where their operands are.
    parts: Vec<(usize, Access)>,
}

/// Finds the stretches of a block and notes in its instructions what they share. `alone` are those that cannot, `handled`
/// those for which the interpreter's handler is called although their kind does not say so.
pub fn plan(
    insns: &mut [Insn],
    info: &mut InstructionInfoFactory,
    homes: &Homes,
    alone: &[usize],
    handled: &[usize],
) -> Vec<Stretch> {
    let mut growing: Vec<Growing> = Vec::new();
    // Stretches before this one are over.
    let mut open = 0;
    let mut values = Values::new();
    for i in 0..insns.len() {
        insns[i].share = None;
        let insn = &insns[i];
        if is_barrier(insn.kind) || handled.contains(&i) {
            open = growing.len();
            values.forget();
            continue;
        }
        let in_shadow = i > 0 && insns[i - 1].kind == Kind::SetInterrupts;
        if !in_shadow
            && !alone.contains(&i)
            && let Some(access) = values.access_of(insn, info, homes)
        {
            join(&mut growing, open, i, access);
        }
        values.step(insn, info);
    }
    let mut stretches = Vec::new();
    for stretch in growing.into_iter().filter(|s| s.parts.len() >= 2).take(MOST) {
        for (nth, &(i, access)) in stretch.parts.iter().enumerate() {
            insns[i].share = Some(Share {
                stretch: stretches.len() as u8,
                first: nth == 0,
                at: (access.at - stretch.low) as i32,
                index: access.index,
            });
        }
        stretches.push(Stretch { size: (stretch.end - stretch.low) as u32, writes: stretch.key.writes });
    }
    stretches
}

fn join(growing: &mut Vec<Growing>, open: usize, insn: usize, access: Access) {
    let (at, end) = (access.at, access.at + access.size);
    let longest = |with_index: bool| if with_index { LONGEST_INDEXED } else { LONGEST };
    for stretch in growing[open..].iter_mut().rev().filter(|s| s.key == access.key) {
        let (low, end) = (stretch.low.min(at), stretch.end.max(end));
        let with_index = access.index.is_some() || stretch.end - stretch.low > LONGEST;
        if end - low <= longest(with_index) {
            (stretch.low, stretch.end) = (low, end);
            stretch.parts.push((insn, access));
            return;
        }
    }
    growing.push(Growing { key: access.key, low: at, end, parts: vec![(insn, access)] });
}

/// Instructions after which nothing is known of registers and the TLB.
fn is_barrier(kind: Kind) -> bool {
    matches!(kind, Kind::Callout | Kind::Exit | Kind::NeedsVectors | Kind::SetInterrupts | Kind::SetAc(_))
}

struct Values {
    registers: [Value; 16],
    next: u32,
}

impl Values {
    fn new() -> Self {
        let registers = std::array::from_fn(|i| Value { root: i as u32, offset: 0, most: None });
        Self { registers, next: FIRST_FRESH }
    }

    fn fresh(&mut self, most: Option<u64>) -> Value {
        self.next += 1;
        Value { root: self.next, offset: 0, most }
    }

    fn forget(&mut self) {
        self.registers = std::array::from_fn(|_| self.fresh(None));
    }

    fn of(&self, register: Register) -> Value {
        self.registers[register.full_register().number() & 15]
    }

    /// The access of an instruction, if it can share a check.
    fn access_of(&self, insn: &Insn, info: &mut InstructionInfoFactory, homes: &Homes) -> Option<Access> {
        let i = &insn.insn;
        let word = |register: usize, distance: i64, writes| {
            let value = self.registers[register];
            let key = Key { base: value.root, index: None, writes };
            Some(Access { key, at: value.offset.checked_add(distance)?, size: 8, index: None })
        };
        match insn.kind {
            Kind::Push => word(RSP, -8, true),
            Kind::Call => word(RSP, -8, true),
            Kind::Pop if i.op0_register() != Register::RSP => word(RSP, 0, false),
            Kind::Return => word(RSP, 0, false),
            Kind::Leave => word(RBP, 0, false),
            Kind::Same | Kind::Merge(_) => self.operand(i, info, homes),
            _ => None,
        }
    }

    fn operand(&self, i: &Instruction, info: &mut InstructionInfoFactory, homes: &Homes) -> Option<Access> {
        let (size, wants) = access(info, i)?;
        let (base, index) = (i.memory_base(), i.memory_index());
        let plain = (base == Register::None || base == Register::RIP || base.is_gpr64())
            && (index == Register::None || index.is_gpr64())
            && !matches!(i.memory_segment(), Register::FS | Register::GS);
        if !plain || must_be_aligned(i) || size > 64 {
            return None;
        }
        let mut at = i.memory_displacement64() as i64;
        let root = match base {
            Register::None => ABSOLUTE,
            Register::RIP => PAGE,
            register => {
                let value = self.of(register);
                at = at.checked_add(value.offset)?;
                value.root
            }
        };
        let (mut key_index, mut own_index, mut reach) = (None, None, 0);
        if index != Register::None {
            let (value, scale) = (self.of(index), i.memory_index_scale().trailing_zeros() as u8);
            match value.most {
                Some(most) if value.offset == 0 => {
                    own_index = Some((index.number() as u8, scale));
                    reach = (most << scale) as i64;
                }
                _ => {
                    key_index = Some((value.root, scale));
                    at = at.checked_add(value.offset.checked_mul(1 << scale)?)?;
                }
            }
        }
        if !registers_suffice(i, own_index, homes) || at.unsigned_abs() > 1 << 30 {
            return None;
        }
        let key = Key { base: root, index: key_index, writes: wants != Wants::Read };
        Some(Access { key, at, size: i64::from(size) + reach, index: own_index })
    }

    /// Follows an instruction.
    fn step(&mut self, insn: &Insn, info: &mut InstructionInfoFactory) {
        let i = &insn.insn;
        let moved = match insn.kind {
            Kind::Push | Kind::PushMemory | Kind::PushFlags => Some(-8),
            Kind::Pop if i.op0_register() != Register::RSP => Some(8),
            _ => None,
        };
        if let Some(moved) = moved {
            self.registers[RSP] = self.moved(self.registers[RSP], moved);
            if insn.kind == Kind::Pop {
                self.registers[i.op0_register().full_register().number() & 15] = self.fresh(None);
            }
            return;
        }
        if insn.kind == Kind::Same
            && let Some(value) = self.known_result(i)
        {
            self.registers[i.op0_register().full_register().number() & 15] = value;
            return;
        }
        let mask = changed(info, i);
        for register in (0..16).filter(|r| mask & 1 << r != 0) {
            self.registers[register] = self.fresh(None);
        }
    }

    fn moved(&mut self, value: Value, by: i64) -> Value {
        match value.offset.checked_add(by) {
            Some(offset) if offset.unsigned_abs() < 1 << 40 => Value { offset, most: None, ..value },
            _ => self.fresh(None),
        }
    }

    /// What the first operand holds after an instruction, if more can be said than that it is something else.
    fn known_result(&mut self, i: &Instruction) -> Option<Value> {
        use Mnemonic as M;
        if i.op0_kind() != OpKind::Register || !i.op0_register().is_gpr() {
            return None;
        }
        let to = i.op0_register();
        let (wide, from_register) = (to.is_gpr64(), i.op_count() == 2 && i.op1_kind() == OpKind::Register);
        let constant =
            (i.op_count() == 2 && i.op1_kind() != OpKind::Register && i.op1_kind() != OpKind::Memory)
                .then(|| i.immediate(1) as i64);
        match i.mnemonic() {
            M::Mov if wide && from_register && i.op1_register().is_gpr64() => Some(self.of(i.op1_register())),
            // A bound below 2^32 says that the upper half was clear already.
            M::Mov if to.is_gpr32() && from_register && i.op1_register().is_gpr32() => {
                let value = self.of(i.op1_register());
                (value.most.is_some() && value.offset == 0).then_some(value)
            }
            M::Movzx if to.size() >= 4 => {
                let byte =
                    if from_register { i.op1_register().is_gpr8() } else { i.memory_size().size() == 1 };
                byte.then(|| self.fresh(Some(255)))
            }
            M::And if to.size() >= 4 => {
                let most = u64::try_from(constant?).ok().filter(|&most| most <= WIDEST)?;
                Some(self.fresh(Some(most)))
            }
            M::Shr if to.is_gpr32() => {
                let most = u64::from(u32::MAX) >> (constant? & 31);
                (most <= WIDEST).then(|| self.fresh(Some(most)))
            }
            M::Add if wide => {
                let by = constant?;
                Some(self.moved(self.of(to), by))
            }
            M::Sub if wide => {
                let by = constant?.checked_neg()?;
                Some(self.moved(self.of(to), by))
            }
            M::Inc if wide => Some(self.moved(self.of(to), 1)),
            M::Dec if wide => Some(self.moved(self.of(to), -1)),
            M::Lea if wide && i.memory_index() == Register::None && i.memory_base().is_gpr64() => {
                Some(self.moved(self.of(i.memory_base()), i.memory_displacement64() as i64))
            }
            _ => None,
        }
    }
}

/// Whether the two scratch registers are enough: one is for the host address, the other for one register that lives in
/// memory. Second bytes of registers cannot be named beside a register above the eighth.
fn registers_suffice(i: &Instruction, index: Option<(u8, u8)>, homes: &Homes) -> bool {
    let mut in_memory = [false; 16];
    for operand in 0..i.op_count() {
        if i.op_kind(operand) != OpKind::Register || !i.op_register(operand).is_gpr() {
            continue;
        }
        let register = i.op_register(operand);
        if matches!(register, Register::AH | Register::BH | Register::CH | Register::DH) {
            return false;
        }
        let number = register.full_register().number() & 15;
        in_memory[number] |= matches!(homes.of(number as u8), Home::Memory(_));
    }
    let operands = in_memory.iter().filter(|&&there| there).count();
    let index = index.is_some_and(|(register, _)| matches!(homes.of(register), Home::Memory(_)));
    operands + usize::from(index) <= 1
}
