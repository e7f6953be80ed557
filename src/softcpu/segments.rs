//! Segment descriptors: reading, checking and loading them (SDM Vol. 3 §3.4, §3.5, §5.6 "Privilege level checking when
//! accessing data segments", §7.2 "Task management data structures").

use crate::core::Core;
use crate::op::Stop;
use vcpu::Segment;
use vcpu::state::seg;

/// A descriptor as it stands in its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its first eight bytes.
    pub low: u64,
    /// The next eight, for a system descriptor in long mode; else 0.
    pub high: u64,
    /// Its linear address.
    pub address: u64,
}

impl Descriptor {
    /// The hidden part of a segment register for this descriptor.
    pub fn segment(&self, selector: u16) -> Segment {
        let low = self.low;
        let raw_limit = (low & 0xffff) as u32 | (low >> 32 & 0xf_0000) as u32;
        let limit = if low >> 55 & 1 != 0 { raw_limit << 12 | 0xfff } else { raw_limit };
        let base = (low >> 16 & 0xff_ffff) | (low >> 32 & 0xff00_0000) | self.high << 32;
        // Bits 40–47 and 52–55; 48–51 are part of the limit.
        Segment { selector, base, limit, attributes: (low >> 40 & 0xf0ff) as u16 }
    }

    /// S: code or data.
    pub fn is_code_or_data(&self) -> bool {
        self.low >> 44 & 1 != 0
    }

    /// Type, four bits.
    pub fn kind(&self) -> u8 {
        (self.low >> 40 & 0xf) as u8
    }

    /// DPL.
    pub fn dpl(&self) -> u8 {
        (self.low >> 45 & 3) as u8
    }

    /// P.
    pub fn present(&self) -> bool {
        self.low >> 47 & 1 != 0
    }
}

impl Core {
    /// Linear address of the descriptor that a selector names; `None` outside its table or for a null LDT.
    fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let index = u64::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            if !self.ldtr.present() {
                return None;
            }
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        if index + size - 1 > limit {
            return None;
        }
        let at = base.wrapping_add(index);
        Some(if self.long_mode() { at } else { at & 0xffff_ffff })
    }

    /// Reads the descriptor that a selector names; `None` outside its table. The upper half is read for system
    /// descriptors in long mode.
    pub fn read_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let low = self.load_system(address, 8)?;
        Ok(Some(Descriptor { low, high: 0, address }))
    }

    /// Reads the system descriptor that a selector names: 16 bytes in long mode. `None` outside its table.
    pub fn read_system_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        let size = if self.long_mode() { 16 } else { 8 };
        let Some(address) = self.descriptor_address(selector, size) else { return Ok(None) };
        let low = self.load_system(address, 8)?;
        let high = if size == 16 { self.load_system(address.wrapping_add(8), 8)? } else { 0 };
        Ok(Some(Descriptor { low, high: high & 0xffff_ffff, address }))
    }

    /// Loads a data segment register (or SS) as MOV and POP do. The register changes only on success.
    pub fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Stop> {
        if self.real_or_v86() {
            self.load_segment_real(index, selector);
            return Ok(());
        }
        let segment =
            if index == seg::SS { self.checked_stack(selector)? } else { self.checked_data(selector)? };
        self.segments[index] = segment;
        self.mode_changed();
        Ok(())
    }

    /// Real and virtual-8086 mode: the base is the selector times 16; real mode keeps limit and attributes as they were
    /// ("unreal" mode lives from that), VM86 fixes them.
    pub fn load_segment_real(&mut self, index: usize, selector: u16) {
        let v86 = self.v86();
        let s = &mut self.segments[index];
        s.selector = selector;
        s.base = u64::from(selector) << 4;
        if v86 {
            s.limit = 0xffff;
            s.attributes = 0xf3;
        }
        self.mode_changed();
    }

    fn checked_data(&mut self, selector: u16) -> Result<Segment, Stop> {
        if selector & !3 == 0 {
            return Ok(Segment { selector, ..Segment::default() });
        }
        let error = selector & !3;
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.gp(error)) };
        let s = d.segment(selector);
        let readable = s.is_code_or_data() && (!s.is_code() || s.kind() & 2 != 0);
        let conforming = s.is_code() && s.kind() & 4 != 0;
        let rpl = (selector & 3) as u8;
        if !readable || !conforming && rpl.max(self.cpl) > s.dpl() {
            return Err(self.gp(error));
        }
        if !s.present() {
            return Err(self.np(error));
        }
        self.mark_accessed(selector, &d)?;
        Ok(d.segment_accessed(selector))
    }

    fn checked_stack(&mut self, selector: u16) -> Result<Segment, Stop> {
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            // A null SS is allowed in 64-bit mode below CPL 3.
            if self.mode64 && self.cpl < 3 && rpl == self.cpl {
                return Ok(null_stack(self.cpl, selector));
            }
            return Err(self.gp(0));
        }
        let error = selector & !3;
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.gp(error)) };
        let s = d.segment(selector);
        if !is_stack(&s) || rpl != self.cpl || s.dpl() != self.cpl {
            return Err(self.gp(error));
        }
        if !s.present() {
            return Err(self.ss(error));
        }
        self.mark_accessed(selector, &d)?;
        Ok(d.segment_accessed(selector))
    }

    /// The stack segment for a new privilege level, from the TSS (#TS and #SS as SDM Vol. 3 §6.12.1 has them).
    pub fn stack_segment(&mut self, selector: u16, cpl: u8, external: u16) -> Result<Segment, Stop> {
        let error = (selector & !3) | external;
        if selector & !3 == 0 {
            return Err(self.ts(external));
        }
        let Some(d) = self.read_descriptor(selector)? else { return Err(self.ts(error)) };
        let s = d.segment(selector);
        if (selector & 3) as u8 != cpl || s.dpl() != cpl || !is_stack(&s) {
            return Err(self.ts(error));
        }
        if !s.present() {
            return Err(self.ss(error));
        }
        self.mark_accessed(selector, &d)?;
        Ok(d.segment_accessed(selector))
    }

    /// SS and ESP for a privilege level from the current TSS, 16- or 32-bit.
    pub fn tss_stack(&mut self, cpl: u8, external: u16) -> Result<(u16, u64), Stop> {
        let error = (self.tr.selector & !3) | external;
        let wide = self.tr.kind() & 8 != 0;
        let (offset, size) = if wide { (u64::from(cpl) * 8 + 4, 8) } else { (u64::from(cpl) * 4 + 2, 4) };
        if offset + size - 1 > u64::from(self.tr.limit) {
            return Err(self.ts(error));
        }
        let at = self.tr.base.wrapping_add(offset) & 0xffff_ffff;
        if wide {
            let sp = self.load_system(at, 4)?;
            let ss = self.load_system(at.wrapping_add(4), 2)?;
            Ok((ss as u16, sp))
        } else {
            let sp = self.load_system(at, 2)?;
            let ss = self.load_system(at.wrapping_add(2), 2)?;
            Ok((ss as u16, sp))
        }
    }

    /// LLDT.
    pub fn load_ldt(&mut self, selector: u16) -> Result<(), Stop> {
        if selector & !3 == 0 {
            self.ldtr = Segment { selector, ..Segment::default() };
            return Ok(());
        }
        let error = selector & !3;
        if selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let Some(d) = self.read_system_descriptor(selector)? else { return Err(self.gp(error)) };
        if d.is_code_or_data() || d.kind() != 2 {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.np(error));
        }
        self.ldtr = d.segment(selector);
        Ok(())
    }

    /// LTR: the descriptor becomes busy.
    pub fn load_task_register(&mut self, selector: u16) -> Result<(), Stop> {
        let error = selector & !3;
        if selector & !3 == 0 || selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let Some(d) = self.read_system_descriptor(selector)? else { return Err(self.gp(error)) };
        let available = if self.long_mode() { d.kind() == 9 } else { matches!(d.kind(), 1 | 9) };
        if d.is_code_or_data() || !available {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.np(error));
        }
        let s = d.segment(selector);
        if self.long_mode() && !guestmem::Gva(s.base).is_canonical(self.paging.linear_bits()) {
            return Err(self.gp(error));
        }
        self.store_system(d.address.wrapping_add(5), (d.low >> 40 & 0xff) | 2, 1)?;
        self.tr = s;
        self.tr.attributes |= 2;
        Ok(())
    }

    /// On a return to an outer privilege level: data segments that the new level may not use become null (SDM Vol. 2,
    /// RET and IRET).
    pub fn drop_privileged_segments(&mut self) {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = self.segments[index];
            let conforming = s.is_code() && s.kind() & 4 != 0;
            if s.present() && s.is_code_or_data() && !conforming && s.dpl() < self.cpl {
                self.segments[index] = Segment::default();
            }
        }
    }
}

impl Descriptor {
    /// As [`Descriptor::segment`], with the accessed bit that loading sets.
    pub fn segment_accessed(&self, selector: u16) -> Segment {
        let mut s = self.segment(selector);
        s.attributes |= 1;
        s
    }
}

/// A writable data segment.
pub fn is_stack(s: &Segment) -> bool {
    s.is_code_or_data() && !s.is_code() && s.kind() & 2 != 0
}

/// What SS holds after a null selector was loaded in 64-bit mode.
pub fn null_stack(cpl: u8, selector: u16) -> Segment {
    Segment { selector, base: 0, limit: 0, attributes: u16::from(cpl) << 5 }
}
