//! What can happen to a machine. Every number shrinks towards the plain case, and every event can happen at any moment: one
//! that makes no sense in the current mode does the nearest thing that does.

use mmu::paging::bits::*;
use mmu::{Access, InvpcidKind, PagingMode, PagingState};

/// One event.
#[derive(Clone, Debug)]
pub enum Event {
    /// CPU 0 accesses memory.
    Access {
        /// Which of the addresses that `aim` takes.
        address: u16,
        /// Which addresses are taken.
        aim: Aim,
        /// Where in the page.
        offset: u16,
        /// The kind of access.
        access: Access,
        /// What a write stores, and how much of it.
        data: u64,
        /// Bytes stored: 1, 2, 4 or 8.
        len: u8,
    },
    /// An entry of a table is written, whole.
    Entry {
        /// Which table.
        table: u8,
        /// Which entry.
        index: u8,
        /// What.
        raw: u64,
        /// By whom.
        by: Writer,
    },
    /// Some bytes of tables are written, at any alignment, across entries too.
    Bytes {
        /// Which table.
        table: u8,
        /// Which entry.
        index: u8,
        /// How far into or before the entry.
        shift: i8,
        /// What.
        raw: u64,
        /// Bytes stored.
        len: u8,
        /// By whom.
        by: Writer,
    },
    /// One bit of an entry changes.
    Flip {
        /// Which table.
        table: u8,
        /// Which entry.
        index: u8,
        /// Which bit.
        bit: u8,
        /// By whom.
        by: Writer,
    },
    /// An entry that an address is translated by now changes.
    Edit {
        /// Which of the addresses that `aim` takes.
        address: u16,
        /// Which addresses are taken.
        aim: Aim,
        /// Which of the entries on the way, from the top.
        step: u8,
        /// Bits that change; all of them and more are replaced by `raw` if this is 0.
        flip: u64,
        /// The new entry.
        raw: u64,
        /// By whom.
        by: Writer,
    },
    /// A table of small pages becomes one large page, or the other way round, as kernels do it: the entry above it is
    /// replaced, and the page that it leads to holds what the small ones mapped.
    Reshape {
        /// The table that holds the entry.
        table: u8,
        /// Which entry.
        index: u8,
        /// The table of small pages.
        below: u8,
        /// Make it large.
        large: bool,
    },
    /// An entry is copied, with some bits changed: what it leads to has one more name, with other rights.
    Twin {
        /// The table and the entry that are copied.
        from: (u8, u8),
        /// Where to.
        to: (u8, u8),
        /// The bits that change.
        flip: u64,
        /// By whom.
        by: Writer,
    },
    /// An entry is written again and again, as by a guest that clears a table or gives its frame another use.
    Storm {
        /// Which table.
        table: u8,
        /// Which entry.
        index: u8,
        /// What, every other time.
        raw: u64,
        /// How often.
        times: u8,
        /// By whom.
        by: Writer,
    },
    /// CPU 0 loads CR3.
    LoadCr3 {
        /// Which table.
        table: u8,
        /// The low bits: flags, PCID, or place in the frame of PDPTEs.
        low: u16,
        /// Keep the TLB's entries of the PCID.
        keep: bool,
    },
    /// CPU 0 goes to another paging mode.
    Mode(Setup),
    /// One control bit changes.
    Control(Control),
    /// PKRU is written.
    Pkru(u32),
    /// INVLPG.
    Invlpg {
        /// Which of the addresses that `aim` takes.
        address: u16,
        /// Which addresses are taken.
        aim: Aim,
        /// Where in the page.
        offset: u16,
    },
    /// An entry that an address is translated by changes, and then INVLPG is executed for a place in the same page, as
    /// kernels do it.
    Unmap {
        /// Which of the addresses that `aim` takes.
        address: u16,
        /// Which addresses are taken.
        aim: Aim,
        /// Which of the entries on the way, from the top.
        step: u8,
        /// Bits that change; all of them and more are replaced by `raw` if this is 0.
        flip: u64,
        /// The new entry.
        raw: u64,
        /// Where in the page INVLPG is executed, in pages of 4 KiB.
        piece: u16,
    },
    /// INVPCID.
    Invpcid {
        /// Its type.
        kind: InvpcidKind,
        /// The PCID.
        pcid: u16,
        /// Which of the addresses that `aim` takes.
        address: u16,
        /// Which addresses are taken.
        aim: Aim,
    },
    /// The host puts something else behind a guest frame.
    Replace {
        /// The frame.
        gfn: u16,
        /// The frame that was changed last instead.
        again: bool,
        /// What comes there.
        by: Replacement,
    },
    /// The dirty log starts.
    StartLog,
    /// The dirty log is collected.
    Collect,
    /// The dirty log stops.
    StopLog,
    /// A control bit that no exit tells of changes.
    Drift,
}

impl Event {
    /// Whether the event changes what a TLB may hold in another way than by a table.
    pub fn concerns_tlb(&self) -> bool {
        matches!(
            self,
            Event::LoadCr3 { .. }
                | Event::Mode(_)
                | Event::Control(_)
                | Event::Pkru(_)
                | Event::Invlpg { .. }
                | Event::Unmap { .. }
                | Event::Invpcid { .. }
                | Event::Replace { .. }
                | Event::StartLog
                | Event::Collect
                | Event::StopLog
        )
    }

    /// What kind of event it is, for counting.
    pub fn name(&self) -> &'static str {
        match self {
            Event::Access { .. } => "access",
            Event::Entry { .. } => "entry written",
            Event::Bytes { .. } => "bytes written",
            Event::Flip { .. } => "bit of an entry changed",
            Event::Edit { .. } => "entry in use changed",
            Event::Reshape { .. } => "large page formed or broken up",
            Event::Twin { .. } => "entry copied",
            Event::Storm { .. } => "entry written again and again",
            Event::LoadCr3 { .. } => "CR3 load",
            Event::Mode(_) => "mode switch",
            Event::Control(_) => "control bit changed",
            Event::Pkru(_) => "PKRU written",
            Event::Invlpg { .. } => "INVLPG",
            Event::Unmap { .. } => "entry in use changed, INVLPG",
            Event::Invpcid { .. } => "INVPCID",
            Event::Replace { .. } => "guest-physical map changed",
            Event::StartLog => "dirty log started",
            Event::Collect => "dirty log collected",
            Event::StopLog => "dirty log stopped",
            Event::Drift => "untold control bit",
        }
    }
}

/// Which addresses are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// Any of the mode's.
    Any,
    /// Those that are mapped now.
    Mapped,
    /// Those for which the TLB may hold a translation of before.
    Held,
    /// The one that an event concerned last.
    Again,
}

/// Who writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Another CPU of the guest, by the physical address.
    Cpu,
    /// CPU 0 itself, through a linear address that leads to the place, if there is one.
    Alias,
    /// A device.
    Device,
}

/// What comes behind a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replacement {
    /// A copy in another frame: copy-on-write is broken, or the host migrates the page.
    Copy,
    /// A zeroed frame.
    Fresh,
    /// A copy that the guest cannot write.
    ReadOnly,
    /// Nothing: hot removal, or a device over RAM.
    Device,
    /// Nothing yet: the next touch gets a zeroed frame.
    Unbacked,
    /// The same frame, which the guest cannot write any more.
    Frozen,
    /// The same frame, which the guest can write again.
    Thawed,
}

/// A control bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// CR0.WP.
    Wp,
    /// CR4.SMEP.
    Smep,
    /// CR4.SMAP.
    Smap,
    /// CR4.PKE.
    Pke,
    /// CR4.PGE.
    Pge,
    /// CR4.PSE.
    Pse,
    /// CR4.PCIDE.
    Pcide,
    /// EFER.NXE.
    Nxe,
    /// CR0.PG.
    Pg,
    /// Pages of 1 GiB: another CPU model takes over.
    GibPages,
    /// The width of physical addresses: another CPU model takes over.
    Width,
}

/// Everything that translation depends on, CR3 excepted.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The mode.
    pub mode: PagingMode,
    /// The control bits, as in [`Control`], one bit each.
    pub controls: u8,
    /// Whether there are pages of 1 GiB.
    pub gib_pages: bool,
    /// PKRU.
    pub pkru: u32,
}

impl Setup {
    /// As registers.
    pub fn state(&self, cr3: u64) -> PagingState {
        let on = |control: Control, bit: u64| if self.controls >> control as u8 & 1 == 1 { bit } else { 0 };
        let long = matches!(self.mode, PagingMode::Level4 | PagingMode::Level5);
        let when = |condition: bool, bit: u64| if condition { bit } else { 0 };
        PagingState {
            cr0: CR0_PE | when(self.mode != PagingMode::Off, CR0_PG) | on(Control::Wp, CR0_WP),
            cr3,
            cr4: on(Control::Pse, CR4_PSE)
                | when(long || self.mode == PagingMode::Pae, CR4_PAE)
                | on(Control::Pge, CR4_PGE)
                | when(self.mode == PagingMode::Level5, CR4_LA57)
                | when(long, on(Control::Pcide, CR4_PCIDE))
                | on(Control::Smep, CR4_SMEP)
                | on(Control::Smap, CR4_SMAP)
                | when(long, on(Control::Pke, CR4_PKE)),
            efer: when(long, EFER_LME | EFER_LMA) | on(Control::Nxe, EFER_NXE),
            pkru: self.pkru,
            gib_pages: self.gib_pages,
            ..PagingState::default()
        }
    }
}

/// The state with one control bit the other way round, as far as the mode lets it be changed: CR4.PCIDE cannot be set
/// while CR3 bits 11:0 are not zero (SDM Vol. 3 §4.10.1), nor outside long mode.
pub fn toggled(state: &PagingState, control: Control) -> PagingState {
    let mut new = *state;
    let long = matches!(state.mode(), PagingMode::Level4 | PagingMode::Level5);
    match control {
        Control::Wp => new.cr0 ^= CR0_WP,
        Control::Smep => new.cr4 ^= CR4_SMEP,
        Control::Smap => new.cr4 ^= CR4_SMAP,
        Control::Pke if long => new.cr4 ^= CR4_PKE,
        Control::Pge => new.cr4 ^= CR4_PGE,
        Control::Pse => new.cr4 ^= CR4_PSE,
        Control::Pcide if long && (state.cr4 & CR4_PCIDE != 0 || state.cr3 & 0xfff == 0) => {
            new.cr4 ^= CR4_PCIDE
        }
        Control::Nxe => new.efer ^= EFER_NXE,
        Control::GibPages => new.gib_pages ^= true,
        Control::Width => {
            new.phys_bits = match state.phys_bits {
                46 => 52,
                52 => 40,
                _ => 46,
            }
        }
        // CR4.PCIDE has to be clear before paging goes off (SDM Vol. 3 §4.10.1); EFER.LMA follows (§2.2.1).
        Control::Pg if state.cr4 & CR4_PCIDE == 0 => {
            new.cr0 ^= CR0_PG;
            let long = new.cr0 & CR0_PG != 0 && new.efer & EFER_LME != 0;
            new.efer = new.efer & !EFER_LMA | if long { EFER_LMA } else { 0 };
        }
        Control::Pke | Control::Pcide | Control::Pg => {}
    }
    new
}
