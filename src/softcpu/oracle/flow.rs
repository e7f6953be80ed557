//! Which flags may be undefined before each instruction of a sequence, whatever way leads there.

use super::undefined;
use crate::flags::bit::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

/// A piece of a sequence: where it is in the code, its length, and the flags that may be undefined before it.
pub type Item = (usize, usize, u64);

/// The arithmetic flags that may be undefined after an instruction that begins with `before`.
pub fn after(insn: &Instruction, before: u64) -> u64 {
    let open = undefined::flags(insn, None);
    let by_cl = (0..insn.op_count())
        .any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i) == Register::CL);
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    // A count of zero leaves them as they were.
    let surely = if by_cl || repeated { 0 } else { arithmetic(insn.rflags_modified()) };
    before & !surely | open
}

/// The arithmetic flags that an instruction looks at.
pub fn reads(insn: &Instruction) -> u64 {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Pushf | M::Pushfd | M::Pushfq => ARITHMETIC,
        _ => arithmetic(insn.rflags_read()),
    }
}

/// Fills in the flags of every item; false if one reads what may be undefined. `ip` is that of the code. The last item
/// stands for the end and has no length.
pub fn settle(bits: u32, ip: u64, code: &[u8], items: &mut [Item]) -> bool {
    for item in items.iter_mut() {
        item.2 = 0;
    }
    loop {
        let mut changed = false;
        for i in 0..items.len().saturating_sub(1) {
            let (at, len, mut state) = items[i];
            let mut decoder =
                Decoder::with_ip(bits, &code[at..at + len], ip + at as u64, DecoderOptions::NO_PAUSE);
            let (mut falls_through, mut targets, mut pushed) = (true, Vec::new(), 0);
            while decoder.can_decode() {
                let insn = decoder.decode();
                if reads(&insn) & state != 0 {
                    return false;
                }
                state = after(&insn, state);
                match insn.flow_control() {
                    FlowControl::ConditionalBranch => targets.push(insn.near_branch_target()),
                    FlowControl::UnconditionalBranch | FlowControl::Call => {
                        targets.push(insn.near_branch_target());
                        falls_through = false;
                    }
                    FlowControl::Return => {
                        targets.push(pushed);
                        falls_through = false;
                    }
                    _ if insn.mnemonic() == Mnemonic::Push && insn.op0_kind() != OpKind::Register => {
                        pushed = insn.immediate(0);
                    }
                    _ => {}
                }
            }
            if falls_through {
                targets.push(ip + (at + len) as u64);
            }
            for item in items.iter_mut().filter(|item| targets.contains(&(ip + item.0 as u64))) {
                changed |= item.2 | state != item.2;
                item.2 |= state;
            }
        }
        if !changed {
            return true;
        }
    }
}

/// The decoder's flags as bits of RFLAGS.
pub fn arithmetic(bits: u32) -> u64 {
    const PLACES: [(u32, u64); 6] = [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ];
    PLACES.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, place)| all | place)
}
