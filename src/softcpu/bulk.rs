#![allow(unsafe_code, reason = "copies and fills guest memory through host addresses that the TLB gave out")]
//! Runs of string-instruction elements within one page, done in one go through host addresses.
//!
//! REP MOVS and REP STOS ([`crate::exec::string`]) come here; [`Core::direct`] gives the host addresses of their operands.
//! The result is that of the element-by-element order of SDM Vol. 2 "MOVS", overlap included: a destination shortly above
//! its source repeats the source's beginning, as guests rely on.

use crate::core::Core;
use crate::memory::SegIndex;
use crate::op::Stop;
use crate::width::Width;
use guestmem::PAGE_SIZE;
use mmu::AccessKind;

/// A run of elements: the linear address of the first, its segment, and how many. It must not leave its page.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Linear address of the lowest element.
    pub lin: u64,
    /// The segment that a fault is charged to.
    pub segment: SegIndex,
    /// How many elements.
    pub count: u64,
}

impl Run {
    /// Length in bytes, where the run keeps to its page.
    fn len<W: Width>(&self) -> Option<u64> {
        let room = PAGE_SIZE - (self.lin & (PAGE_SIZE - 1));
        (self.count <= room / W::BYTES as u64).then_some(self.count * W::BYTES as u64)
    }
}

impl Core {
    /// Copies the elements of `from` to the address of `to`, lowest first. False, and nothing done, when either cannot be
    /// reached directly: devices, guest tables, decoded code, watched addresses.
    pub fn copy_run<W: Width>(&mut self, from: Run, to: Run) -> Result<bool, Stop> {
        let to = Run { count: from.count, ..to };
        let (Some(len), Some(_)) = (from.len::<W>(), to.len::<W>()) else { return Ok(false) };
        let Some(src) = self.direct(from.lin, len, AccessKind::Read, from.segment)? else { return Ok(false) };
        let Some(dst) = self.direct(to.lin, len, AccessKind::Write, to.segment)? else { return Ok(false) };
        // SAFETY: `direct` gave the host addresses of the two linear ones, and `len` bytes from each keep to its page, so
        // all of them are mapped guest memory, to which no Rust reference exists.
        unsafe { copy_forward::<W>(src, dst, from.count as usize) };
        Ok(true)
    }

    /// Writes `value` to every element of `to`. False, and nothing done, as for [`Self::copy_run`].
    pub fn fill_run<W: Width>(&mut self, to: Run, value: u64) -> Result<bool, Stop> {
        let Some(len) = to.len::<W>() else { return Ok(false) };
        let Some(dst) = self.direct(to.lin, len, AccessKind::Write, to.segment)? else { return Ok(false) };
        // SAFETY: as for `copy_run`.
        unsafe { fill::<W>(dst, value, to.count as usize) };
        Ok(true)
    }
}

/// Copies `count` elements of `W` from `src` to `dst`, lowest first.
///
/// # Safety
/// `src` must point to `count * W::BYTES` readable bytes and `dst` to as many writable ones. They may overlap, and no
/// Rust reference to any of them may exist.
unsafe fn copy_forward<W: Width>(src: *const u8, dst: *mut u8, count: usize) {
    let len = count * W::BYTES;
    let distance = (dst as usize).wrapping_sub(src as usize);
    if distance >= len {
        // Below the source, or clear of it: no element is read after it was overwritten.
        // SAFETY: the caller guarantees both ranges; `copy` permits that they overlap.
        unsafe { std::ptr::copy(src, dst, len) };
        return;
    }
    for at in (0..len).step_by(W::BYTES) {
        // SAFETY: `at + W::BYTES <= len`, and the caller guarantees `len` bytes at each pointer.
        unsafe { W::write(dst.add(at), W::read(src.add(at))) };
    }
}

/// Writes `value` to `count` elements of `W` at `dst`.
///
/// # Safety
/// `dst` must point to `count * W::BYTES` writable bytes to which no Rust reference exists.
unsafe fn fill<W: Width>(dst: *mut u8, value: u64, count: usize) {
    let byte = value as u8;
    if value & W::MASK == u64::from_ne_bytes([byte; 8]) & W::MASK {
        // SAFETY: the caller guarantees the bytes.
        unsafe { std::ptr::write_bytes(dst, byte, count * W::BYTES) };
        return;
    }
    for i in 0..count {
        // SAFETY: `i < count`, and the caller guarantees `count` elements.
        unsafe { W::write(dst.add(i * W::BYTES), value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The architecture's order, one element after the other.
    fn reference<W: Width>(bytes: &mut [u8], src: usize, dst: usize, count: usize) {
        for at in (0..count * W::BYTES).step_by(W::BYTES) {
            let element = bytes[src + at..src + at + W::BYTES].to_vec();
            bytes[dst + at..dst + at + W::BYTES].copy_from_slice(&element);
        }
    }

    fn check<W: Width>(bytes: &[u8], src: usize, dst: usize, count: usize) -> Result<(), TestCaseError> {
        let count = count.min((bytes.len() - src.max(dst)) / W::BYTES);
        let mut want = bytes.to_vec();
        reference::<W>(&mut want, src, dst, count);
        let mut got = bytes.to_vec();
        let base = got.as_mut_ptr();
        // SAFETY: `count` was limited to what fits behind both offsets of the vector, which nothing else refers to.
        unsafe { copy_forward::<W>(base.add(src), base.add(dst), count) };
        prop_assert_eq!(got, want);
        Ok(())
    }

    proptest! {
        #[test]
        fn overlapping_copies_follow_the_order_of_elements(
            bytes in proptest::collection::vec(any::<u8>(), 128),
            src in 0usize..128, near in -12i64..12, count in 0usize..64, far in 0usize..128,
        ) {
            let close = (src as i64 + near).clamp(0, 127) as usize;
            for dst in [close, far] {
                check::<u8>(&bytes, src, dst, count)?;
                check::<u16>(&bytes, src, dst, count)?;
                check::<u32>(&bytes, src, dst, count)?;
                check::<u64>(&bytes, src, dst, count)?;
            }
        }

        #[test]
        fn fills_write_every_element_and_no_more(value: u64, uniform: bool, count in 0usize..30, at in 0usize..8) {
            let value = if uniform { u64::from_ne_bytes([value as u8; 8]) } else { value };
            let mut got = [0x5au8; 256];
            // SAFETY: 8 + 30 * 4 bytes lie within the array, which nothing else refers to.
            unsafe { fill::<u32>(got.as_mut_ptr().add(at), value, count) };
            for (i, &b) in got.iter().enumerate() {
                let inside = i >= at && i < at + 4 * count;
                let want = if inside { value.to_le_bytes()[(i - at) % 4] } else { 0x5a };
                prop_assert_eq!(b, want, "byte {}", i);
            }
        }
    }
}
