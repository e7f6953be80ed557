#![allow(
    unsafe_code,
    reason = "guest memory is accessed through host addresses that the TLB holds, checked when filled"
)]
//! Data accesses: linear address → TLB hit → host memory; or the hardware walk, a fault, an exit, a device.
//!
//! The path of one access begins here. A hit costs one tag compare and one page-crossing compare. A miss goes to
//! [`crate::walk`] (SDM Vol. 3 §4.10.2).
//!
//! Rules that make restarting an instruction safe: an access that can stop stops before anything was changed, and every
//! part of an access is translated before the first byte is written.

use crate::attention::Attention;
use crate::core::Core;
use crate::op::Stop;
use crate::tlb::TlbMode;
use crate::width::Width;
use guestmem::{FrameMark, Gpa, Gva, Hpa, PAGE_SIZE};
use mmu::AccessKind;
use vcpu::state::seg;
use vcpu::{Exit, TableStore};

/// A translation that the VMM gave for one access of one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override {
    /// Linear page address.
    pub page: u64,
    /// For which accesses.
    pub kind: AccessKind,
    /// Where they go.
    pub target: OverrideTarget,
}

/// Where an overridden access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverrideTarget {
    /// To the devices, at this guest-physical page.
    Mmio(Gpa),
    /// To a guest table: guest-physical and host-physical page.
    Table(Gpa, Hpa),
}

/// Where an access ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// In memory.
    Memory(Hpa),
    /// In a guest table, with permission.
    Table(Gpa, Hpa),
    /// At a device.
    Mmio(Gpa),
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The instruction's, at the current privilege level.
    Current,
    /// The CPU's own, to a system structure.
    System,
}

/// The segment that an access is charged to when it is not canonical: #SS for SS, else #GP.
pub type SegIndex = u8;

impl Core {
    /// Reads `W` at a linear address.
    #[inline(always)]
    pub fn load<W: Width>(&mut self, lin: u64, segment: SegIndex) -> Result<u64, Stop> {
        if lin & 0xfff <= PAGE_SIZE - W::BYTES as u64
            && let Some(addend) = self.tlb.read.lookup(lin, self.tlb.key)
        {
            // SAFETY: the entry was filled for this page by `fill`, which checked that the whole page lies in host
            // memory, mapped for as long as `self.memory` lives; the access does not leave the page.
            return Ok(unsafe { W::read(lin.wrapping_add(addend) as *const u8) });
        }
        self.load_slow(lin, W::BYTES as u64, segment)
    }

    /// Writes `W` at a linear address.
    #[inline(always)]
    pub fn store<W: Width>(&mut self, lin: u64, value: u64, segment: SegIndex) -> Result<(), Stop> {
        if lin & 0xfff <= PAGE_SIZE - W::BYTES as u64
            && let Some(addend) = self.tlb.write.lookup(lin, self.tlb.key)
        {
            // SAFETY: as in `load`; write entries are filled only for frames that may be written without a look.
            unsafe { W::write(lin.wrapping_add(addend) as *mut u8, value) };
            return Ok(());
        }
        self.store_slow(lin, W::BYTES as u64, value, segment)
    }

    /// Reads `W`, lets `f` compute what is written back, and writes it. `f` may change the flags; when the write stops,
    /// they are put back, so that nothing has changed.
    #[inline(always)]
    pub fn modify<W: Width>(
        &mut self,
        lin: u64,
        segment: SegIndex,
        f: impl FnOnce(&mut Core, u64) -> u64,
    ) -> Result<(), Stop> {
        if lin & 0xfff <= PAGE_SIZE - W::BYTES as u64
            && let Some(addend) = self.tlb.write.lookup(lin, self.tlb.key)
        {
            let ptr = lin.wrapping_add(addend) as *mut u8;
            // SAFETY: as in `store`.
            let old = unsafe { W::read(ptr) };
            let new = f(self, old);
            // SAFETY: as above; `f` computes and does not touch the TLB.
            unsafe { W::write(ptr, new) };
            return Ok(());
        }
        self.check_write(lin, W::BYTES as u64, segment)?;
        let old = self.load_slow(lin, W::BYTES as u64, segment)?;
        let flags = self.flags;
        let new = f(self, old);
        let done = self.store_slow(lin, W::BYTES as u64, new, segment);
        if done.is_err() {
            self.flags = flags;
        }
        done
    }

    /// Stops as a write of `len` bytes would, without writing. `len` is at most a page.
    #[inline]
    pub fn check_write(&mut self, lin: u64, len: u64, segment: SegIndex) -> Result<(), Stop> {
        if lin & 0xfff <= PAGE_SIZE - len && self.tlb.write.lookup(lin, self.tlb.key).is_some() {
            return Ok(());
        }
        self.check_canonical(lin, len, Who::Current, segment)?;
        for (at, part) in self.pieces(lin, len, Who::Current) {
            let target = self.translate(at, AccessKind::Write, Who::Current, segment, len)?;
            self.check_code(target, part)?;
        }
        Ok(())
    }

    /// Stops as a read of `len` bytes would.
    pub fn check_read(&mut self, lin: u64, len: u64, segment: SegIndex) -> Result<(), Stop> {
        self.check_canonical(lin, len, Who::Current, segment)?;
        for (at, _) in self.pieces(lin, len, Who::Current) {
            self.translate(at, AccessKind::Read, Who::Current, segment, len)?;
        }
        Ok(())
    }

    #[cold]
    fn load_slow(&mut self, lin: u64, len: u64, segment: SegIndex) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        self.load_bytes(lin, &mut bytes[..len as usize], segment)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    fn store_slow(&mut self, lin: u64, len: u64, value: u64, segment: SegIndex) -> Result<(), Stop> {
        self.store_bytes(lin, &value.to_le_bytes()[..len as usize], segment)
    }

    /// Reads bytes at a linear address; at most a page of them.
    pub fn load_bytes(&mut self, lin: u64, out: &mut [u8], segment: SegIndex) -> Result<(), Stop> {
        self.load_as(lin, out, Who::Current, segment)
    }

    /// Writes bytes at a linear address; at most a page of them.
    pub fn store_bytes(&mut self, lin: u64, data: &[u8], segment: SegIndex) -> Result<(), Stop> {
        self.store_as(lin, data, Who::Current, segment)
    }

    /// Reads a little-endian integer of `len` bytes from a system structure (GDT, LDT, IDT, TSS).
    pub fn load_system(&mut self, lin: u64, len: usize) -> Result<u64, Stop> {
        if lin & 0xfff <= PAGE_SIZE - len as u64
            && let Some(addend) = self.tlb.read.lookup(lin, self.tlb.system_key())
            && self.overrides.is_empty()
        {
            let mut bytes = [0; 8];
            let from = Hpa(lin.wrapping_add(addend).wrapping_sub(self.host_base));
            self.memory.host().read(from, &mut bytes[..len]);
            return Ok(u64::from_le_bytes(bytes));
        }
        let mut bytes = [0; 8];
        self.load_as(lin, &mut bytes[..len], Who::System, seg::DS as u8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a little-endian integer of `len` bytes to a system structure.
    pub fn store_system(&mut self, lin: u64, value: u64, len: usize) -> Result<(), Stop> {
        self.store_as(lin, &value.to_le_bytes()[..len], Who::System, seg::DS as u8)
    }

    /// Reads bytes on behalf of `who`.
    pub fn load_as(&mut self, lin: u64, out: &mut [u8], who: Who, segment: SegIndex) -> Result<(), Stop> {
        let len = out.len() as u64;
        self.check_canonical(lin, len, who, segment)?;
        let mut targets = [(Target::Mmio(Gpa(0)), 0u64); 2];
        let mut count = 0;
        for (at, part) in self.pieces(lin, len, who) {
            targets[count] = (self.translate(at, AccessKind::Read, who, segment, len)?, part);
            count += 1;
        }
        let mut done = 0;
        for &(target, part) in &targets[..count] {
            let piece = &mut out[done..done + part as usize];
            match target {
                Target::Memory(hpa) | Target::Table(_, hpa) => {
                    self.memory.host().read(hpa, piece);
                }
                Target::Mmio(gpa) => self.read_device(gpa, piece)?,
            }
            done += part as usize;
        }
        Ok(())
    }

    /// Writes bytes on behalf of `who`.
    pub fn store_as(&mut self, lin: u64, data: &[u8], who: Who, segment: SegIndex) -> Result<(), Stop> {
        let targets = self.store_targets(lin, data.len() as u64, who, segment)?;
        // Devices first: they may exit, and then nothing may have been written.
        let mut done = 0;
        for (target, part) in targets.into_iter().flatten() {
            if let Target::Mmio(gpa) = target {
                self.write_device(gpa, &data[done..done + part as usize])?;
            }
            done += part as usize;
        }
        done = 0;
        for (target, part) in targets.into_iter().flatten() {
            self.write_target(target, &data[done..done + part as usize]);
            done += part as usize;
        }
        Ok(())
    }

    /// Writes words of 8 bytes from `lin` upwards if that needs no look at anything: the page may be written, all of them
    /// lie in it. Whether that was so.
    #[inline]
    pub fn store_words(&mut self, lin: u64, words: &[u64]) -> bool {
        let len = 8 * words.len() as u64;
        let Some(last) = PAGE_SIZE.checked_sub(len) else { return false };
        if lin & 0xfff > last || !self.overrides.is_empty() {
            return false;
        }
        let Some(addend) = self.tlb.write.lookup(lin, self.tlb.key) else { return false };
        let to = lin.wrapping_add(addend) as *mut u8;
        for (i, &word) in words.iter().enumerate() {
            // SAFETY: as in `store`: the words end before the page does.
            unsafe { u64::write(to.add(8 * i), word) };
        }
        true
    }

    /// Where a store's bytes go, on either side of a page boundary, after everything that could stop it but a device.
    pub(crate) fn store_targets(
        &mut self,
        lin: u64,
        len: u64,
        who: Who,
        segment: SegIndex,
    ) -> Result<[Option<(Target, u64)>; 2], Stop> {
        self.check_canonical(lin, len, who, segment)?;
        let mut targets = [None; 2];
        for (slot, (at, part)) in targets.iter_mut().zip(self.pieces(lin, len, who)) {
            let target = self.translate(at, AccessKind::Write, who, segment, len)?;
            self.check_code(target, part)?;
            *slot = Some((target, part));
        }
        Ok(targets)
    }

    /// Does a part of a store that goes to memory.
    pub(crate) fn write_target(&mut self, target: Target, piece: &[u8]) {
        match target {
            Target::Memory(hpa) => self.write_host(hpa, piece),
            Target::Table(gpa, hpa) => {
                self.write_host(hpa, piece);
                self.table_stores.push(TableStore { gpa, len: piece.len() as u64 });
                self.attention.insert(Attention::TABLE_STORES);
            }
            Target::Mmio(_) => {}
        }
    }

    /// Whether linear addresses of such an access have 64 bits. The CPU's own are 64 bits wide in all of long mode.
    #[inline]
    fn wide(&self, who: Who) -> bool {
        self.mode64 || who == Who::System && self.long_mode()
    }

    /// An address that is not canonical stops the access before any of its pages is looked at: on either side of a page
    /// boundary, so that the second half's #GP comes before the first half's #PF.
    #[inline]
    fn check_canonical(&mut self, lin: u64, len: u64, who: Who, segment: SegIndex) -> Result<(), Stop> {
        if !self.wide(who) {
            return Ok(());
        }
        let bits = self.paging.linear_bits();
        let last = lin.wrapping_add(len.saturating_sub(1));
        if Gva(lin).is_canonical(bits) && Gva(last).is_canonical(bits) {
            return Ok(());
        }
        Err(if usize::from(segment) == seg::SS { self.ss(0) } else { self.gp(0) })
    }

    /// The parts of an access on either side of a page boundary. Addresses of 32 bits wrap at 4 GiB.
    #[inline]
    fn pieces(&self, lin: u64, len: u64, who: Who) -> impl Iterator<Item = (u64, u64)> + use<> {
        let first = (PAGE_SIZE - (lin & 0xfff)).min(len);
        let mut second = lin.wrapping_add(first);
        if !self.wide(who) {
            second &= 0xffff_ffff;
        }
        [(lin, first), (second, len - first)].into_iter().filter(|&(_, part)| part != 0)
    }

    /// Writes host memory as the CPU does: without the note that other writers leave, since [`Self::check_code`] saw to it.
    fn write_host(&mut self, hpa: Hpa, data: &[u8]) {
        if self.memory.host().store(hpa, data) {
            self.memory.host().note_writable(hpa.frame());
        }
    }

    /// Stops when bytes that were decoded are about to be written, unless the instruction executes alone: then the range
    /// is noted, and the blocks dropped once more when it is complete.
    fn check_code(&mut self, target: Target, len: u64) -> Result<(), Stop> {
        let (Target::Memory(hpa) | Target::Table(_, hpa)) = target else { return Ok(()) };
        if !self.memory.host().marks(hpa.frame()).contains(FrameMark::CODE) {
            return Ok(());
        }
        if !self.native.code_map.overlaps(hpa, len) {
            return Ok(());
        }
        if self.attention.contains(Attention::CODE_WRITE) {
            self.code_writes_done.push((hpa, len));
            return Ok(());
        }
        self.code_write = (hpa, len);
        Err(Stop::CodeWrite)
    }

    fn read_device(&mut self, gpa: Gpa, out: &mut [u8]) -> Result<(), Stop> {
        let mut at = gpa;
        for chunk in out.chunks_mut(8) {
            let value = self.ask_value(Exit::MmioRead { gpa: at, size: chunk.len() as u8 })?;
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    pub(crate) fn write_device(&mut self, gpa: Gpa, data: &[u8]) -> Result<(), Stop> {
        let mut at = gpa;
        for chunk in data.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            let exit = Exit::MmioWrite { gpa: at, size: chunk.len() as u8, value: u64::from_le_bytes(bytes) };
            self.ask_done(exit)?;
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// The host address of `len` bytes that lie in one page and may be accessed directly, filling the TLB; `None` when
    /// they are a device's, a guest table's or decoded code. For string instructions.
    #[inline]
    pub fn direct(
        &mut self,
        lin: u64,
        len: u64,
        kind: AccessKind,
        segment: SegIndex,
    ) -> Result<Option<*mut u8>, Stop> {
        debug_assert!(lin & 0xfff <= PAGE_SIZE - len);
        let array = if kind == AccessKind::Write { &self.tlb.write } else { &self.tlb.read };
        if let Some(addend) = array.lookup(lin, self.tlb.key) {
            return Ok(Some(lin.wrapping_add(addend) as *mut u8));
        }
        // Alignment and watched addresses are looked at element by element, before any flag is set in the tables.
        if self.tlb.key & 3 == TlbMode::Uncached as u64 {
            return Ok(None);
        }
        let Target::Memory(hpa) = self.translate(lin, kind, Who::Current, segment, 1)? else {
            return Ok(None);
        };
        let decoded =
            kind == AccessKind::Write && self.memory.host().marks(hpa.frame()).contains(FrameMark::CODE);
        if decoded {
            return Ok(None);
        }
        Ok(Some(self.host_base.wrapping_add(hpa.0) as *mut u8))
    }
}
