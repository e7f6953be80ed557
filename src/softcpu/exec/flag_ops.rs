//! Instructions on single flags: CLC, STC, CMC, CLD, STD, LAHF, SAHF, SALC (SDM Vol. 2). What moves IF, IOPL and the
//! rest of RFLAGS is in `system` and `stack`.

use super::Selected;
use crate::core::Core;
use crate::flags::bit::{AF, CF, DF, OF, ONE, PF, SF, ZF};
use crate::op::{Flow, Op};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};

/// Slot of RAX.
const RAX: u8 = 0;
/// The flags that AH holds for LAHF and SAHF.
const IN_AH: u64 = CF | PF | AF | ZF | SF;

fn clc(core: &mut Core, _: &Op) -> Flow {
    core.flags.set_cf(false);
    Ok(())
}

fn stc(core: &mut Core, _: &Op) -> Flow {
    core.flags.set_cf(true);
    Ok(())
}

fn cmc(core: &mut Core, _: &Op) -> Flow {
    let cf = core.flags.cf();
    core.flags.set_cf(!cf);
    Ok(())
}

fn cld(core: &mut Core, _: &Op) -> Flow {
    core.flags.remove(DF);
    Ok(())
}

fn std(core: &mut Core, _: &Op) -> Flow {
    core.flags.insert(DF);
    Ok(())
}

fn lahf(core: &mut Core, _: &Op) -> Flow {
    let flags = core.flags.arithmetic() & IN_AH | ONE;
    u8::set(&mut core.regs, RAX, 8, flags);
    Ok(())
}

fn sahf(core: &mut Core, _: &Op) -> Flow {
    let ah = u8::get(&core.regs, RAX, 8);
    let kept = core.flags.arithmetic() & OF;
    core.flags.set_arithmetic(kept | ah & IN_AH);
    Ok(())
}

/// SALC: AL = CF ? 0xff : 0. Not in the manual, in every processor.
fn salc(core: &mut Core, _: &Op) -> Flow {
    let al = if core.flags.cf() { 0xff } else { 0 };
    u8::set(&mut core.regs, RAX, 0, al);
    Ok(())
}

/// See [`super::select`].
pub fn select(insn: &Instruction, _op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    Some(Selected::plain(match insn.mnemonic() {
        M::Clc => clc,
        M::Stc => stc,
        M::Cmc => cmc,
        M::Cld => cld,
        M::Std => std,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Salc => salc,
        _ => return None,
    }))
}
