//! Runs of accesses that share one check: pushes of a prologue, pops of an epilogue with their return, moves to and from
//! neighbouring words.
//!
//! The path of one access: the first instruction of a run checks the whole stretch that the run touches, and the others use
//! the host address that it left in RAX. When the check fails, because the stretch crosses a page or cannot be reached, the
//! interpreter executes the first instruction alone, and the rest is another block: nothing of the run was done.
//!
//! Only instructions that leave the flags alone and need one scratch register take part, so that RAX stays.

use super::asm::{Mem, host};
use super::block::{Emission, Insn};
use super::classify::{Kind, must_be_aligned};
use super::emit::{Address, TooMany, Wants};
use super::layout::{Home, home};
use iced_x86::{Mnemonic, OpKind, Register};

/// The longest stretch that is checked at once. Longer ones cross pages more often.
const LONGEST: i32 = 128;
const RAX: u8 = host::RAX;
const R10: u8 = host::R10;
const R11: u8 = host::R11;
const RSP: u8 = 4;

/// What accesses must have in common: base and index register of the guest, and log2 of the scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    base: u8,
    index: Option<(u8, u8)>,
}

/// An access of a run, at a distance from where the key pointed before the run.
#[derive(Clone, Copy, Debug)]
struct Access {
    key: Key,
    at: i32,
    size: i32,
    wants: Wants,
}

/// A run: how many instructions, and the stretch.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Instructions in it.
    pub count: usize,
    key: Key,
    low: i32,
    size: u32,
    wants: Wants,
}

impl Emission<'_, '_> {
    /// The run that begins with the first of these instructions, if two accesses or more can share a check.
    pub fn plan_run(&mut self, insns: &[Insn]) -> Option<Run> {
        let first = self.access_of(insns.first()?, 0)??;
        let mut run = Run { count: 0, key: first.key, low: first.at, size: 0, wants: first.wants };
        let mut high = first.at;
        let (mut moved, mut accesses) = (0, 0);
        for (i, insn) in insns.iter().enumerate() {
            let Some(access) = self.access_of(insn, moved) else { break };
            if let Some(a) = access {
                let (low, end) = (run.low.min(a.at), high.max(a.at + a.size));
                if a.key != run.key || a.wants != run.wants || end - low > LONGEST {
                    break;
                }
                (run.low, high) = (low, end);
                accesses += 1;
                run.count = i + 1;
            }
            moved += stack_move(insn);
            let keys = 1 << run.key.base | run.key.index.map_or(0, |(index, _)| 1 << index);
            let by_itself = matches!(insn.kind, Kind::Push | Kind::Pop);
            let changed = self.to.changed(&insn.insn) & if by_itself { !(1 << RSP) } else { u16::MAX };
            if changed & keys != 0 || insn.kind == Kind::Return {
                break;
            }
        }
        run.size = (high - run.low) as u32;
        (accesses >= 2).then_some(run)
    }

    /// What an instruction accesses, RSP having moved by `moved` since the run began. `None`: it cannot be in a run.
    #[allow(clippy::option_option, reason = "not in a run, and in one without an access, are two things")]
    fn access_of(&mut self, insn: &Insn, moved: i32) -> Option<Option<Access>> {
        let stack = Key { base: RSP, index: None };
        let word = |at, wants| Some(Some(Access { key: stack, at, size: 8, wants }));
        let names_rsp = insn.insn.op_count() > 0 && insn.insn.op0_register() == Register::RSP;
        match insn.kind {
            Kind::Push if !names_rsp => word(moved - 8, Wants::Write),
            Kind::Pop if !names_rsp => word(moved, Wants::Read),
            Kind::Return => word(moved, Wants::Read),
            Kind::Same if is_move(insn.insn.mnemonic()) => {
                let i = &insn.insn;
                if !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
                    return Some(None);
                }
                let (size, wants) = self.to.access(i)?;
                let plain = i.memory_base().is_gpr64()
                    && (i.memory_index() == Register::None || i.memory_index().is_gpr64())
                    && !matches!(i.memory_segment(), Register::FS | Register::GS);
                if !plain || wants == Wants::Both || must_be_aligned(i) {
                    return None;
                }
                let base = i.memory_base().number() as u8;
                let index = (i.memory_index() != Register::None).then(|| {
                    (i.memory_index().number() as u8, i.memory_index_scale().trailing_zeros() as u8)
                });
                let homes = [Some(base), index.map(|(index, _)| index)];
                if homes.into_iter().flatten().any(|r| matches!(home(r), Home::Memory(_))) {
                    return None;
                }
                let at = i32::try_from(i.memory_displacement64() as i64).ok()?;
                let at = at.checked_add(if base == RSP { moved } else { 0 })?;
                // Far displacements are rare, and sums with them could overflow.
                (at.unsigned_abs() < 1 << 20).then_some(Some(Access {
                    key: Key { base, index },
                    at,
                    size: size as i32,
                    wants,
                }))
            }
            _ => None,
        }
    }

    /// Emits a run.
    pub fn run(&mut self, insns: &[Insn], run: Run) -> Result<(), TooMany> {
        let changed = insns.iter().fold(0, |mask, insn| mask | self.to.changed(&insn.insn));
        self.to.settle(changed);
        if insns.last().is_some_and(|insn| insn.kind == Kind::Return) {
            self.to.keep_flags();
        } else {
            self.to.release_flags();
        }
        let number = |register| match home(register) {
            Home::Host(number) => Ok(number),
            Home::Memory(_) => Err(TooMany),
        };
        let base = Some(number(run.key.base)?);
        let index = run.key.index.map(|(index, scale)| number(index).map(|n| (n, scale))).transpose()?;
        let stretch = Mem { base, index, disp: run.low };
        self.to.check(Address::Stack(stretch), run.size, run.wants, false, RAX)?;
        let mut moved = 0;
        for insn in insns {
            let at = match self.access_of(insn, moved) {
                Some(Some(access)) => access.at - run.low,
                _ => 0,
            };
            self.one_of_run(insn, at)?;
            moved += stack_move(insn);
        }
        Ok(())
    }

    /// Emits an instruction whose memory operand is at a distance from RAX.
    fn one_of_run(&mut self, insn: &Insn, at: i32) -> Result<(), TooMany> {
        let here = Mem::at(RAX, at);
        let register = insn.insn.op_count() > 0 && insn.insn.op0_kind() == OpKind::Register;
        let number = insn.insn.op0_register().full_register().number() as u8;
        match insn.kind {
            Kind::Push if register => {
                let from = self.to.value(number, R10);
                self.to.asm.store(here, from);
                self.to.asm.lea(R11, Mem::at(R11, -8));
            }
            Kind::Push => {
                let value = i32::try_from(insn.insn.immediate(0) as i64).map_err(|_| TooMany)?;
                self.to.asm.op_mem(8, &[0xc7], 0, here);
                self.to.asm.bytes(&value.to_le_bytes());
                self.to.asm.lea(R11, Mem::at(R11, -8));
            }
            Kind::Pop => {
                match home(number) {
                    Home::Host(to) => self.to.asm.load(to, here),
                    Home::Memory(slot) => {
                        self.to.asm.load(R10, here);
                        self.to.asm.store(Mem::frame(slot), R10);
                    }
                }
                self.to.asm.lea(R11, Mem::at(R11, 8));
            }
            Kind::Return => {
                self.to.asm.load(RAX, here);
                self.leave_by_return(insn);
            }
            _ => self.to.substituted(&insn.insn, Some(RAX), at, false)?,
        }
        Ok(())
    }
}

/// By how much an instruction of a run moves RSP.
fn stack_move(insn: &Insn) -> i32 {
    match insn.kind {
        Kind::Push => -8,
        Kind::Pop => 8,
        _ => 0,
    }
}

/// Moves, which neither read nor write flags.
fn is_move(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Movd
            | M::Movq
            | M::Movss
            | M::Movsd
            | M::Vmovups
            | M::Vmovupd
            | M::Vmovdqu
            | M::Vmovd
            | M::Vmovq
            | M::Vmovss
            | M::Vmovsd
    )
}
