//! Decoding: bytes → iced-x86 → [`Op`]s, a block at a time.
//!
//! A block ends at a branch, before an instruction that crosses the page, before one that wants to stand alone, and after
//! anything that changes what decoding or translation depends on. Instruction fetch follows SDM Vol. 3 §4.6 (rights) and
//! Vol. 2 §2.3.11 (15 bytes at most).

use crate::core::Core;
use crate::exec::{self, Selected};
use crate::op::{EaKind, Op, REG_IP, REG_ZERO, Stop};
use guestmem::{Hpa, PAGE_SIZE};
use iced_x86::{CodeSize, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};
use vcpu::state::seg;

/// What decoding depends on, besides the bytes.
#[derive(Clone, Copy, Debug)]
pub struct CodeMode {
    /// 16, 32 or 64.
    pub bits: u32,
    /// The stack pointer is 32 bits (or 64 in 64-bit mode) and not 16.
    pub stack_big: bool,
    /// DS, ES and SS are flat.
    pub flat: bool,
}

impl CodeMode {
    fn of(core: &Core) -> Self {
        let key = core.code_key;
        Self { bits: 16 << (key & 3), stack_big: key & 4 != 0, flat: key & 8 != 0 }
    }
}

/// A decoded block.
pub struct Decoded {
    /// The instructions.
    pub ops: Box<[Op]>,
    /// Whether the last sets RIP itself.
    pub ends_in_branch: bool,
    /// Length in bytes.
    pub len: u64,
    /// See [`crate::cache::Block::crossing`].
    pub crossing: Option<Hpa>,
}

/// PAUSE does nothing here but take its time, so it is read as the NOP that it is without its prefix; and with REX.B it is
/// no PAUSE at all, but XCHG of R8 and RAX, which the decoder would not notice.
const OPTIONS: u32 = DecoderOptions::NO_PAUSE;
const MAX_OPS: usize = 48;
const MAX_BYTES: usize = 15;

/// Decodes the block whose first byte is at `lin`, in host memory at `hpa`.
pub fn decode_block(core: &mut Core, lin: u64, hpa: Hpa) -> Result<Decoded, Stop> {
    let mode = CodeMode::of(core);
    let mut buffer = [0u8; MAX_OPS * MAX_BYTES];
    let on_page = (PAGE_SIZE - hpa.page_offset()).min(buffer.len() as u64) as usize;
    core.memory.host().read(hpa, &mut buffer[..on_page]);
    let page_ends = on_page < buffer.len();

    let mut ops = Vec::new();
    let mut ends_in_branch = false;
    let mut at = 0;
    let mut decoder = Decoder::with_ip(mode.bits, &buffer[..on_page], 0, OPTIONS);
    let mut insn = Instruction::default();
    while ops.len() < MAX_OPS && decoder.can_decode() {
        decoder.decode_out(&mut insn);
        if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes && on_page - at < MAX_BYTES
        {
            // The rest of this instruction is on the next page, or in the part that was not read.
            if ops.is_empty() && page_ends {
                return decode_crossing(core, mode, lin, &buffer[..on_page]);
            }
            break;
        }
        let (op, selected) = translate(&insn, at, mode, core);
        if selected.solo && !ops.is_empty() {
            break;
        }
        at += insn.len();
        ops.push(op);
        if selected.ends() {
            ends_in_branch = selected.branch;
            break;
        }
    }
    Ok(Decoded { ops: ops.into(), ends_in_branch, len: at as u64, crossing: None })
}

/// Decodes the one instruction that begins with `head`, the last bytes of a page.
fn decode_crossing(core: &mut Core, mode: CodeMode, lin: u64, head: &[u8]) -> Result<Decoded, Stop> {
    let mut next = (lin & !0xfff).wrapping_add(PAGE_SIZE);
    if !core.mode64 {
        next &= 0xffff_ffff;
    }
    let second = core.translate_fetch(next)?;
    let mut buffer = [0u8; 2 * MAX_BYTES];
    buffer[..head.len()].copy_from_slice(head);
    let total = MAX_BYTES;
    core.memory.host().read(second, &mut buffer[head.len()..total]);
    let mut decoder = Decoder::with_ip(mode.bits, &buffer[..total], 0, OPTIONS);
    let insn = decoder.decode();
    let (op, selected) = translate(&insn, 0, mode, core);
    let len = insn.len().max(head.len() + 1) as u64;
    Ok(Decoded { ops: Box::new([op]), ends_in_branch: selected.branch, len, crossing: Some(second) })
}

/// The [`Op`] of an instruction that was decoded at address 0, alone in its block.
pub fn alone(insn: &Instruction, core: &mut Core) -> (Op, Selected) {
    let mode = CodeMode::of(core);
    translate(insn, 0, mode, core)
}

/// Makes an [`Op`] of an instruction at offset `at` of its block.
fn translate(insn: &Instruction, at: usize, mode: CodeMode, core: &mut Core) -> (Op, Selected) {
    let mut op = Op {
        run: exec::undefined,
        imm: 0,
        disp: 0,
        base: REG_ZERO,
        index: REG_ZERO,
        scale: 0,
        seg: seg::DS as u8,
        ea: EaKind::Checked,
        asize: (mode.bits / 8) as u8,
        osize: 0,
        dst: 0,
        src: 0,
        dst_shift: 0,
        src_shift: 0,
        aux: 0,
        branch: false,
        off: at as u16,
        next: (at + insn.len()) as u16,
        insn: None,
        ext: None,
    };
    if has_memory(insn) {
        memory_operand(insn, &mut op, mode);
    }
    let selected = if insn.is_invalid() {
        let run = if insn.len() >= MAX_BYTES { exec::too_long } else { exec::undefined };
        Selected::ending(run)
    } else {
        exec::select(insn, &mut op, mode, core)
    };
    op.run = selected.run;
    op.branch = selected.branch;
    if selected.keep {
        op.insn = Some(Box::new(*insn));
    }
    (op, selected)
}

/// Whether an operand is memory with base, index and displacement.
pub fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Slot and shift of a general register.
pub fn gpr(reg: Register) -> (u8, u8) {
    match reg {
        Register::AH => (0, 8),
        Register::CH => (1, 8),
        Register::DH => (2, 8),
        Register::BH => (3, 8),
        Register::None => (REG_ZERO, 0),
        Register::RIP | Register::EIP => (REG_IP, 0),
        _ => (reg.full_register().number() as u8, 0),
    }
}

/// Index of a segment register, as [`vcpu::state::seg`].
pub fn segment_index(reg: Register) -> u8 {
    (match reg {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }) as u8
}

/// Index of the segment that a memory operand is in. In 64-bit mode only prefixes for FS and GS count (SDM Vol. 1 §3.4.2.1):
/// with another, an address that is not canonical is still charged to the segment that its base register implies.
pub fn operand_segment(insn: &Instruction) -> u8 {
    let ignored = matches!(insn.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
    if insn.code_size() != CodeSize::Code64 || !ignored {
        return segment_index(insn.memory_segment());
    }
    let mut plain = *insn;
    plain.set_segment_prefix(Register::None);
    segment_index(plain.memory_segment())
}

fn memory_operand(insn: &Instruction, op: &mut Op, mode: CodeMode) {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    op.base = gpr(base).0;
    op.index = gpr(index).0;
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    op.disp = insn.memory_displacement64();
    op.seg = operand_segment(insn);
    let size = if base != Register::None {
        base.size()
    } else if index != Register::None {
        index.size()
    } else {
        insn.memory_displ_size() as usize
    };
    op.asize = match size {
        2 => 2,
        4 => 4,
        8 => 8,
        _ => (mode.bits / 8) as u8,
    };
    let plain_segment = matches!(usize::from(op.seg), seg::DS | seg::ES | seg::SS);
    op.ea = match mode.bits {
        64 if op.asize == 8 => EaKind::Flat64,
        32 if op.asize == 4 && mode.flat && plain_segment => EaKind::Flat32,
        _ => EaKind::Checked,
    };
}
