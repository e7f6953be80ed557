//! What must hold after an event: memory is the same on both sides, and the TLB holds nothing that it may not hold.

use crate::model::{Candidate, Outcome};
use crate::sequence::{Run, Wrong};
use guestmem::{FrameMark, Gfn, Gpa, Hpa, Slot};
use mmu::{Access, AccessKind, PagingMode, Privilege};

/// The accesses that translations in the TLB are tried with.
const TRIED: [Access; 8] = [
    Access { kind: AccessKind::Read, privilege: Privilege::User, ac: false },
    Access { kind: AccessKind::Write, privilege: Privilege::User, ac: false },
    Access { kind: AccessKind::Execute, privilege: Privilege::User, ac: false },
    Access { kind: AccessKind::Read, privilege: Privilege::Supervisor, ac: true },
    Access { kind: AccessKind::Write, privilege: Privilege::Supervisor, ac: true },
    Access { kind: AccessKind::Execute, privilege: Privilege::Supervisor, ac: false },
    Access { kind: AccessKind::Read, privilege: Privilege::Supervisor, ac: false },
    Access { kind: AccessKind::Write, privilege: Privilege::Implicit, ac: false },
];

impl Run {
    /// The TLB of CPU 0, in whatever context, permits no access without a walk that the architecture does not permit, and
    /// leads where the guest-physical map says. It is held against the model's without making the accesses.
    pub(crate) fn tlb_is_permitted(&mut self) -> Result<(), Wrong> {
        if self.model.state.mode() == PagingMode::Off {
            return Ok(());
        }
        self.model.learn();
        let log = self.machine.memory().dirty();
        let (held, controls) = self.machine.held(0);
        for held in held {
            for access in TRIED.iter().filter(|access| held.permits(access, &controls)) {
                let mut may = self.model.by_held(held.gva, held.pcid, held.global, access);
                let Some(gpa) = may.find(|&gpa| self.leads_to(gpa, held.hpa, access.is_write())) else {
                    return Err(Wrong::Held {
                        gva: held.gva,
                        pcid: held.pcid,
                        access: *access,
                        hpa: held.hpa,
                    });
                };
                if access.is_write() && log.is_active() && !log.is_marked(Gfn(gpa >> 12)) {
                    return Err(Wrong::HeldUnlogged { gva: held.gva, gfn: gpa >> 12 });
                }
            }
        }
        Ok(())
    }

    /// No TLB permits writes to a frame that the backend wants to see the writes to, nor leads a CPU without paging
    /// elsewhere than the guest-physical map.
    pub(crate) fn tlb_respects_the_host(&self) -> Result<(), Wrong> {
        let host = self.machine.memory().host();
        for cpu in 0..2 {
            for held in self.machine.held(cpu).0 {
                if held.is_writable() && host.marks(held.hpa.frame()).contains(FrameMark::TABLE) {
                    return Err(Wrong::HeldTable { gva: held.gva, hpa: held.hpa });
                }
                if cpu == 1 && !self.leads_to(held.gva, held.hpa, held.is_writable()) {
                    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
                    return Err(Wrong::Held { gva: held.gva, pcid: 0, access, hpa: held.hpa });
                }
            }
        }
        Ok(())
    }

    /// Whether memory at a guest-physical address is there, and may be written if that is asked.
    fn leads_to(&self, gpa: u64, hpa: Hpa, write: bool) -> bool {
        match self.machine.memory().slot(Gfn(gpa >> 12)) {
            Slot::Ram(frame) => frame == hpa.frame(),
            Slot::Rom(frame) => frame == hpa.frame() && !write,
            _ => false,
        }
    }

    /// Whether memory is as the candidate leaves it, at every entry in which any of them sets a flag.
    pub(crate) fn flags_are(
        &self,
        candidate: &Candidate,
        all: &[Candidate],
        access: &Access,
        data: &[u8],
    ) -> bool {
        let stored = match candidate.outcome {
            Outcome::Memory(gpa) if access.is_write() => Some(gpa),
            _ => None,
        };
        all.iter().flat_map(|c| &c.flags).all(|&(at, bytes, _)| {
            let bytes = usize::from(bytes);
            let (mut expected, mut now) = ([0; 8], [0; 8]);
            self.model.ram.load(at, &mut expected[..bytes]);
            if let Some(flag) = candidate.flags.iter().rev().find(|flag| flag.0 == at) {
                expected = flag.2.to_le_bytes();
            }
            // What is stored comes last, and may lie across the entry.
            for (i, byte) in expected[..bytes].iter_mut().enumerate() {
                let offset = stored.and_then(|gpa| (at + i as u64).checked_sub(gpa));
                if let Some(new) = offset.and_then(|offset| data.get(offset as usize)) {
                    *byte = *new;
                }
            }
            let read = self.machine.memory().read(Gpa(at), &mut now[..bytes]);
            read.is_err() || now[..bytes] == expected[..bytes]
        })
    }

    pub(crate) fn compare(&self, frames: impl Iterator<Item = u64>) -> Result<(), Wrong> {
        let mut bytes = [0; 4096];
        frames.into_iter().try_for_each(|gfn| self.same_bytes(gfn, &mut bytes))
    }

    /// A frame holds the same bytes on both sides.
    pub(crate) fn same_frame(&self, gfn: u64) -> Result<(), Wrong> {
        self.same_bytes(gfn, &mut [0; 4096])
    }

    /// The same, with room to read it into.
    pub(crate) fn same_bytes(&self, gfn: u64, bytes: &mut [u8; 4096]) -> Result<(), Wrong> {
        let memory = self.machine.memory();
        let here = match memory.slot(Gfn(gfn)) {
            Slot::Ram(frame) | Slot::Rom(frame) => {
                memory.host().read(frame.base(), bytes).then_some(&bytes[..])
            }
            Slot::Unbacked => Some(&[0; 4096][..]),
            Slot::Mmio => None,
        };
        let there = self.model.ram.frame(gfn);
        if here == there {
            return Ok(());
        }
        let at = match (here, there) {
            (Some(here), Some(there)) => (0..4096).find(|&i| here[i] != there[i]).unwrap_or(0),
            _ => 0,
        };
        let (got, expected) = (here.map(|b| b[at]), there.map(|b| b[at]));
        Err(Wrong::Memory { gpa: gfn << 12 | at as u64, got, expected })
    }
}
