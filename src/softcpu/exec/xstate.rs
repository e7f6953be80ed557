//! XSAVE, XSAVEOPT, XSAVEC, XRSTOR, XGETBV, XSETBV: the extended state in memory, and which of it is switched on (SDM Vol. 1
//! chapter 13, "Managing State Using the XSAVE Feature Set"; Vol. 2, each instruction).
//!
//! It stands among the handlers of [`crate::exec`]. An area is legacy region, header, and the upper halves of the YMM registers.
//! All stores of an instruction are translated before the first is done, and a restore changes nothing until everything was
//! read and found good. XINUSE is what the values say: a component is in use exactly if it is not in its initial
//! configuration, so that what is saved depends on nothing but the state. The modified optimization is not made.

use super::Selected;
use super::address::{read_address, write_address};
use crate::core::Core;
use crate::memory::{Target, Who};
use crate::native::{restored_image, saved_image};
use crate::op::{Flow, Handler, Op, Stop};
use crate::width::Width;
use iced_x86::{Instruction, Mnemonic};
use std::ops::Range;

const CR0_TS: u64 = 1 << 3;
const CR4_OSXSAVE: u64 = 1 << 18;
/// x87 and MMX registers: their bit in XCR0, XSTATE_BV and XCOMP_BV.
pub const X87: u64 = 1 << 0;
/// XMM registers.
pub const SSE: u64 = 1 << 1;
/// Upper halves of YMM registers.
pub const AVX: u64 = 1 << 2;
/// Bit 63 of XCOMP_BV: the area has the compacted format.
const COMPACTED: u64 = 1 << 63;
/// MXCSR in its initial configuration.
const MXCSR_FIRST: u32 = 0x1f80;

/// Where the header is, and where the first component behind it.
const HEADER: usize = 512;
const EXTENDED: usize = HEADER + 64;
/// An area with all that there is.
const WHOLE: usize = EXTENDED + 256;
/// Parts of the legacy region: x87 on either side of MXCSR and its mask, then the XMM registers.
const X87_WORDS: Range<usize> = 0..24;
const MXCSR: Range<usize> = 24..32;
const X87_REGISTERS: Range<usize> = 32..160;
const XMM: usize = 160;

/// Bytes of an area with these components, in either format: the one component behind the header has the same place in both.
pub fn area(components: u64) -> u32 {
    if components & AVX != 0 { WHOLE as u32 } else { EXTENDED as u32 }
}

/// Where the upper halves of the YMM registers are in an area, and how long they are.
pub const AVX_PLACE: (u32, u32) = (EXTENDED as u32, (WHOLE - EXTENDED) as u32);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Save,
    SaveOptimized,
    SaveCompacted,
}

impl Core {
    /// Whether the extended state may be touched: #UD until the system has said that it knows it, #NM when it is another task's.
    fn xsave_available(&mut self) -> Result<(), Stop> {
        if self.paging.cr4 & CR4_OSXSAVE == 0 {
            return Err(self.ud());
        }
        if self.paging.cr0 & CR0_TS != 0 {
            return Err(self.nm());
        }
        Ok(())
    }

    /// The components that EDX:EAX asks for and XCR0 has switched on.
    fn requested(&self) -> u64 {
        self.xcr0 & ((self.regs[2] & u32::MASK) << 32 | self.regs[0] & u32::MASK)
    }

    /// Registers that belong to the vector components in this mode.
    fn vector_count(&self) -> usize {
        if self.mode64 { 16 } else { 8 }
    }

    /// The components that are not in their initial configuration (SDM Vol. 1 §13.6).
    fn in_use(&self) -> u64 {
        let image = self.fpu.image();
        let first_words = |i: usize| if i < 2 { [0x7f, 3][i] } else { 0 };
        let x87 = X87_WORDS.clone().any(|i| image[i] != first_words(i))
            || image[X87_REGISTERS].iter().any(|&byte| byte != 0);
        let count = self.vector_count();
        let sse = (0..count).any(|n| self.fpu.xmm(n) != 0);
        let avx = (0..count).any(|n| self.fpu.ymm_high(n) != 0);
        (u64::from(x87) * X87) | (u64::from(sse) * SSE) | (u64::from(avx) * AVX)
    }

    /// The address of a part of an area.
    fn part(&self, lin: u64, at: usize) -> u64 {
        let sum = lin.wrapping_add(at as u64);
        if self.mode64 { sum } else { sum & u32::MASK }
    }

    /// The bytes of an area that these components have, in order and without seams; of the header nothing.
    fn ranges(&self, components: u64, mxcsr: bool) -> Vec<Range<usize>> {
        let count = 16 * self.vector_count();
        let all = [
            (components & X87 != 0, X87_WORDS),
            (mxcsr, MXCSR),
            (components & X87 != 0, X87_REGISTERS),
            (components & SSE != 0, XMM..XMM + count),
            (components & AVX != 0, EXTENDED..EXTENDED + count),
        ];
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(all.len() + 1);
        for (_, range) in all.into_iter().filter(|(there, _)| *there) {
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Stores parts of an area, all or none of them. What is in the header depends on what memory holds there, and is asked for
    /// after everything that could stop the stores but a device.
    fn store_area(
        &mut self,
        lin: u64,
        segment: u8,
        area: &mut [u8; WHOLE],
        ranges: &[Range<usize>],
        header: impl FnOnce(&mut Core, &mut [u8; WHOLE]) -> Flow,
    ) -> Flow {
        let mut pieces: Vec<(Target, Range<usize>)> = Vec::with_capacity(2 * ranges.len());
        for range in ranges {
            let mut at = range.start;
            let targets =
                self.store_targets(self.part(lin, at), range.len() as u64, Who::Current, segment)?;
            for (target, len) in targets.into_iter().flatten() {
                pieces.push((target, at..at + len as usize));
                at += len as usize;
            }
        }
        header(self, area)?;
        // Devices first: they may exit, and then nothing may have been written.
        for (target, range) in &pieces {
            if let Target::Mmio(gpa) = *target {
                self.write_device(gpa, &area[range.clone()])?;
            }
        }
        for (target, range) in pieces {
            self.write_target(target, &area[range]);
        }
        Ok(())
    }

    fn load_part(&mut self, lin: u64, segment: u8, area: &mut [u8; WHOLE], range: Range<usize>) -> Flow {
        self.load_bytes(self.part(lin, range.start), &mut area[range], segment)
    }

    /// The area as it would be with everything in it, its header apart.
    fn whole_area(&self, wide: bool) -> [u8; WHOLE] {
        let mut area = [0; WHOLE];
        area[..HEADER].copy_from_slice(&saved_image(&self.fpu, wide));
        for (bytes, half) in area[EXTENDED..].chunks_exact_mut(16).zip(self.fpu.ymm_highs()) {
            bytes.copy_from_slice(&half.to_le_bytes());
        }
        area
    }
}

fn word(area: &[u8; WHOLE], at: usize) -> u64 {
    area[at..at + 8].iter().rev().fold(0, |v, &byte| v << 8 | u64::from(byte))
}

/// XSAVE, XSAVEOPT, XSAVEC and their forms with REX.W: the kind in `imm`, the form in `aux`.
fn save(core: &mut Core, op: &Op) -> Flow {
    let kind = match op.imm {
        0 => Kind::Save,
        1 => Kind::SaveOptimized,
        _ => Kind::SaveCompacted,
    };
    core.xsave_available()?;
    let (requested, in_use) = (core.requested(), core.in_use());
    let lin = write_address(core, op, u64::from(area(requested)))?;
    if lin & 63 != 0 {
        return Err(core.gp(0));
    }
    let first = core.fpu.mxcsr() == MXCSR_FIRST;
    let (saved, mxcsr) = match kind {
        Kind::Save => (requested, requested & (SSE | AVX) != 0),
        Kind::SaveOptimized => (requested & in_use, requested & (SSE | AVX) != 0),
        Kind::SaveCompacted => {
            // Here MXCSR belongs to SSE, which is in use if MXCSR is.
            let saved = requested & (in_use | (u64::from(!first) * SSE));
            (saved, saved & SSE != 0)
        }
    };
    let mut area = core.whole_area(op.aux != 0);
    let mut ranges = core.ranges(saved, mxcsr);
    let compacted = kind == Kind::SaveCompacted;
    ranges.push(HEADER..HEADER + if compacted { 16 } else { 8 });
    let segment = op.seg;
    core.store_area(lin, segment, &mut area, &ranges, |core, area| {
        let (components, format) = if compacted {
            (saved, requested | COMPACTED)
        } else {
            core.load_part(lin, segment, area, HEADER..HEADER + 8)?;
            (word(area, HEADER) & !requested | in_use & requested, 0)
        };
        area[HEADER..HEADER + 8].copy_from_slice(&components.to_le_bytes());
        area[HEADER + 8..HEADER + 16].copy_from_slice(&format.to_le_bytes());
        Ok(())
    })
}

/// XRSTOR, XRSTOR64: the form in `aux`.
fn restore(core: &mut Core, op: &Op) -> Flow {
    core.xsave_available()?;
    let requested = core.requested();
    let lin = read_address(core, op, u64::from(area(requested)))?;
    if lin & 63 != 0 {
        return Err(core.gp(0));
    }
    let mut area = [0; WHOLE];
    core.load_part(lin, op.seg, &mut area, HEADER..EXTENDED)?;
    let (components, format) = (word(&area, HEADER), word(&area, HEADER + 8));
    let compacted = format & COMPACTED != 0;
    let reserved = if compacted { HEADER + 16..EXTENDED } else { HEADER + 8..HEADER + 24 };
    let allowed = if compacted { format & !COMPACTED } else { core.xcr0 };
    let bad_format =
        compacted && (!core.model.has_compacted_areas() || format & !COMPACTED & !core.xcr0 != 0);
    if bad_format || components & !allowed != 0 || area[reserved].iter().any(|&byte| byte != 0) {
        return Err(core.gp(0));
    }
    let restored = requested & components;
    // In the standard format MXCSR comes from memory whatever the header says of SSE.
    let mxcsr = if compacted { restored & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    for range in core.ranges(restored, mxcsr) {
        core.load_part(lin, op.seg, &mut area, range)?;
    }
    // What is not there was left as zeros, the initial configuration of all but two words.
    if restored & X87 == 0 {
        area[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    }
    if !mxcsr && requested & SSE != 0 {
        area[24..28].copy_from_slice(&MXCSR_FIRST.to_le_bytes());
    }
    let mut image = *core.fpu.image();
    let xmm_end = XMM + 16 * core.vector_count();
    for (wanted, range) in [
        (requested & X87 != 0, X87_WORDS),
        (requested & X87 != 0, X87_REGISTERS),
        (mxcsr || requested & SSE != 0, MXCSR),
        (requested & SSE != 0, XMM..xmm_end),
    ] {
        if wanted {
            image[range.clone()].copy_from_slice(&area[range]);
        }
    }
    // Reserved bits of MXCSR are refused before anything has changed.
    let wide = op.aux != 0 || requested & X87 == 0;
    if restored_image(&mut core.fpu, &image, wide).is_err() {
        return Err(core.gp(0));
    }
    if requested & AVX != 0 {
        for number in 0..core.vector_count() {
            let at = EXTENDED + 16 * number;
            let half = u128::from(word(&area, at + 8)) << 64 | u128::from(word(&area, at));
            core.fpu.set_ymm_high(number, half);
        }
    }
    Ok(())
}

fn xgetbv(core: &mut Core, _op: &Op) -> Flow {
    if core.paging.cr4 & CR4_OSXSAVE == 0 {
        return Err(core.ud());
    }
    // XCR1, which would be XINUSE, is not declared.
    if core.regs[1] as u32 != 0 {
        return Err(core.gp(0));
    }
    core.regs[0] = core.xcr0 & u32::MASK;
    core.regs[2] = core.xcr0 >> 32;
    Ok(())
}

fn xsetbv(core: &mut Core, _op: &Op) -> Flow {
    if core.paging.cr4 & CR4_OSXSAVE == 0 {
        return Err(core.ud());
    }
    core.privileged()?;
    let value = (core.regs[2] & u32::MASK) << 32 | core.regs[0] & u32::MASK;
    let supported = value & !core.model.xcr0_mask() == 0;
    // x87 cannot be switched off, and the upper halves need the lower ones.
    let sensible = value & X87 != 0 && (value & AVX == 0 || value & SSE != 0);
    if core.regs[1] as u32 != 0 || !supported || !sensible {
        return Err(core.gp(0));
    }
    core.xcr0 = value;
    Ok(())
}

/// See [`super::select`].
pub fn select(insn: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let run: Handler = match insn.mnemonic() {
        M::Xsave | M::Xsave64 => save,
        M::Xsaveopt | M::Xsaveopt64 => {
            op.imm = 1;
            save
        }
        M::Xsavec | M::Xsavec64 => {
            op.imm = 2;
            save
        }
        M::Xrstor | M::Xrstor64 => restore,
        M::Xgetbv => xgetbv,
        M::Xsetbv => xsetbv,
        _ => return None,
    };
    op.aux = u8::from(matches!(insn.mnemonic(), M::Xsave64 | M::Xsaveopt64 | M::Xsavec64 | M::Xrstor64));
    Some(Selected::ending(run))
}

#[cfg(test)]
#[path = "xstate_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "xstate_host_tests.rs"]
mod host_tests;
