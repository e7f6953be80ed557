//! AVX instructions that are no stubs: moves, which every C library is made of; VZEROUPPER and VZEROALL; masked moves.
//!
//! It stands beside [`crate::vector`], which gives what VEX encodes to it first. A move of 32 bytes costs four loads through the
//! TLB here, a fifth of a stub. Masked moves touch only the elements that are chosen, so that the others cannot fault
//! (SDM Vol. 2, VMOVDQU, VZEROUPPER, VMASKMOV, VPMASKMOV; §2.4 for what VEX needs).

use crate::core::Core;
use crate::exec::Selected;
use crate::exec::address::{checked, offset, read_address, write_address};
use crate::memory::Who;
use crate::native::Class;
use crate::op::{Flow, Handler, Op, Stop};
use crate::stores::Stores;
use guestmem::PAGE_SIZE;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Both halves of a YMM register, the lower first.
pub type Ymm = [u128; 2];

impl Core {
    /// #UD or #NM where AVX is not to be had: outside protected mode, before the system has switched it on, or when the
    /// registers are another task's.
    #[inline]
    pub(crate) fn avx_available(&mut self) -> Result<(), Stop> {
        self.protected_only()?;
        self.available(Class::Avx)
    }

    #[inline]
    pub(crate) fn ymm(&self, number: u8) -> Ymm {
        [self.fpu.xmm(usize::from(number)), self.fpu.ymm_high(usize::from(number))]
    }

    #[inline]
    pub(crate) fn set_ymm(&mut self, number: u8, value: Ymm) {
        self.fpu.set_xmm(usize::from(number), value[0]);
        self.fpu.set_ymm_high(usize::from(number), value[1]);
    }

    /// Reads 16 or 32 bytes; what is not read is zero.
    fn load_vector(&mut self, lin: u64, len: u8, segment: u8) -> Result<Ymm, Stop> {
        let len = u64::from(len);
        if lin & 0xfff <= PAGE_SIZE - len && self.tlb.read.lookup(lin, self.tlb.key).is_some() {
            let mut halves = [0; 2];
            for (i, half) in halves.iter_mut().enumerate().take(len as usize / 16) {
                let at = lin + 16 * i as u64;
                let low = self.load::<u64>(at, segment)?;
                *half = u128::from(self.load::<u64>(at + 8, segment)?) << 64 | u128::from(low);
            }
            return Ok(halves);
        }
        let mut bytes = [0; 32];
        self.load_bytes(lin, &mut bytes[..len as usize], segment)?;
        Ok(halves(&bytes))
    }

    /// Writes 16 or 32 bytes.
    fn store_vector(&mut self, lin: u64, len: u8, segment: u8, value: Ymm) -> Flow {
        let len = u64::from(len);
        // What the TLB lets one word through lets through all words of the page: none of these stores stops.
        if lin & 0xfff <= PAGE_SIZE - len && self.tlb.write.lookup(lin, self.tlb.key).is_some() {
            for (i, half) in value.iter().enumerate().take(len as usize / 16) {
                let at = lin + 16 * i as u64;
                self.store::<u64>(at, *half as u64, segment)?;
                self.store::<u64>(at + 8, (*half >> 64) as u64, segment)?;
            }
            return Ok(());
        }
        self.store_bytes(lin, &bytes(value)[..len as usize], segment)
    }
}

/// The bytes of a register.
pub fn bytes(value: Ymm) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&value[0].to_le_bytes());
    bytes[16..].copy_from_slice(&value[1].to_le_bytes());
    bytes
}

/// The register with these bytes.
pub fn halves(bytes: &[u8; 32]) -> Ymm {
    let half = |at: usize| bytes[at..at + 16].iter().rev().fold(0, |v, &byte| v << 8 | u128::from(byte));
    [half(0), half(16)]
}

/// Moves: length in `osize`, whether it must be aligned in `aux`.
fn check_alignment(core: &mut Core, op: &Op, lin: u64) -> Flow {
    if op.aux != 0 && lin & (u64::from(op.osize) - 1) != 0 {
        return Err(core.gp(0));
    }
    Ok(())
}

fn load(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    let lin = read_address(core, op, op.osize.into())?;
    check_alignment(core, op, lin)?;
    let value = core.load_vector(lin, op.osize, op.seg)?;
    core.set_ymm(op.dst, value);
    Ok(())
}

fn store(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    let lin = write_address(core, op, op.osize.into())?;
    check_alignment(core, op, lin)?;
    let value = core.ymm(op.src);
    core.store_vector(lin, op.osize, op.seg, value)
}

fn copy(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    let [low, high] = core.ymm(op.src);
    core.set_ymm(op.dst, [low, if op.osize == 32 { high } else { 0 }]);
    Ok(())
}

/// VZEROUPPER, and with `aux` VZEROALL: the registers that the mode has.
fn zero(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    for number in 0..if core.mode64 { 16 } else { 8 } {
        core.fpu.set_ymm_high(number, 0);
        if op.aux != 0 {
            core.fpu.set_xmm(number, 0);
        }
    }
    Ok(())
}

/// A masked move's elements: the length of each in `aux`, the mask in register `imm`.
fn chosen(core: &Core, op: &Op) -> impl Iterator<Item = usize> + use<> {
    let mask = bytes(core.ymm(op.imm as u8));
    let size = usize::from(op.aux);
    (0..usize::from(op.osize)).step_by(size).filter(move |at| mask[at + size - 1] & 0x80 != 0)
}

fn element_address(core: &mut Core, op: &Op, at: usize, write: bool) -> Result<u64, Stop> {
    let base = offset(core, op).wrapping_add(at as u64);
    let cut = if op.asize == 8 { base } else { base & (u64::MAX >> (64 - 8 * u32::from(op.asize))) };
    checked(core, op.seg, cut, op.aux.into(), write)
}

fn masked_load(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    let mut value = [0; 32];
    let size = usize::from(op.aux);
    for at in chosen(core, op) {
        let lin = element_address(core, op, at, false)?;
        core.load_bytes(lin, &mut value[at..at + size], op.seg)?;
    }
    core.set_ymm(op.dst, halves(&value));
    Ok(())
}

fn masked_store(core: &mut Core, op: &Op) -> Flow {
    core.avx_available()?;
    let value = bytes(core.ymm(op.src));
    let size = usize::from(op.aux);
    let mut stores = Stores::default();
    for at in chosen(core, op) {
        let lin = element_address(core, op, at, true)?;
        core.plan(&mut stores, lin, &value[at..at + size], Who::Current, op.seg)?;
    }
    core.commit(stores)
}

/// The number of a vector register operand.
pub fn number(insn: &Instruction, operand: u32) -> u8 {
    (insn.op_register(operand).number() & 15) as u8
}

/// See [`crate::exec::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    if insn.code().encoding() != EncodingKind::VEX {
        return None;
    }
    let wide = (0..insn.op_count()).any(|operand| insn.op_register(operand).is_ymm());
    op.osize = if wide { 32 } else { 16 };
    if matches!(insn.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
        op.aux = u8::from(insn.mnemonic() == Mnemonic::Vzeroall);
        return Some(Selected::plain(zero));
    }
    select_move(insn, op).or_else(|| select_masked(insn, op))
}

fn select_move(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let aligned = match insn.mnemonic() {
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu => false,
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => true,
        _ => return None,
    };
    op.aux = u8::from(aligned);
    let run: Handler = match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => copy,
        (OpKind::Register, _) => load,
        _ => store,
    };
    op.dst = number(insn, 0);
    op.src = number(insn, 1);
    Some(Selected::plain(run))
}

fn select_masked(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    op.aux = match insn.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        _ => return None,
    };
    op.imm = number(insn, 1).into();
    if insn.op0_kind() == OpKind::Memory {
        op.src = number(insn, 2);
        return Some(Selected::plain(masked_store));
    }
    debug_assert_ne!(insn.op0_register(), Register::None);
    op.dst = number(insn, 0);
    Some(Selected::plain(masked_load))
}

#[cfg(test)]
#[path = "avx_tests.rs"]
mod tests;
