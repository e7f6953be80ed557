//! The hardware over a backend's tables: a TLB that keeps whatever it is not told to forget, and the walk that fills it,
//! one-dimensional over shadow tables or two-dimensional through EPT (SDM Vol. 3 §4.10, §29.3). It knows nothing of the
//! guest's physical map.

use guestmem::{GuestMemory, Gva, Hpa};
use mmu::nested::{Absent, EptFault, NestedFault, NestedMemory, walk_nested};
use mmu::walk::{HostTables, absence, denial, walk_access};
use mmu::{
    Access, AccessKind, Controls, PageFault, PagingState, Privilege, Rights, TableRoot, TlbFlush, Translation,
};

/// Why the hardware stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A page fault of the walk.
    Page(PageFault),
    /// A page fault that is the guest's own, as the shadow table says.
    Guest(PageFault),
    /// An EPT violation or misconfiguration.
    Ept(EptFault),
}

/// One translation, of a page of any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    linear: u64,
    mask: u64,
    /// The page in the tables that linear addresses are looked up in, of which this may be a piece: forgetting any
    /// address of it forgets all (SDM Vol. 3 §4.10.2.3).
    whole: u64,
    pcid: u16,
    global: bool,
    /// The address that it was made for.
    made_for: u64,
    /// Host-physical address of the page.
    host: u64,
    rights: Rights,
    pkey: u8,
    /// A write needs no walk: every dirty flag is set and every dimension permits it.
    write_ready: bool,
}

impl Entry {
    /// An entry for the page of `mask` around `gva`, by what the walk found.
    fn new(gva: Gva, physical: u64, mask: u64, found: &Translation, pcid: u16) -> Self {
        Self {
            linear: gva.0 & !mask,
            mask,
            whole: found.size.offset_mask(),
            pcid,
            global: found.global,
            made_for: gva.0,
            host: physical & !mask,
            rights: found.rights,
            pkey: found.pkey,
            write_ready: true,
        }
    }
}

/// A translation that is held, as far as it concerns the address that it was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The address.
    pub gva: u64,
    /// Where it leads.
    pub hpa: Hpa,
    /// The PCID that it was made under.
    pub pcid: u16,
    /// Whether it serves all PCIDs.
    pub global: bool,
    rights: Rights,
    pkey: u8,
    write_ready: bool,
}

impl Held {
    /// Whether an access needs no walk.
    pub fn permits(&self, access: &Access, controls: &Controls) -> bool {
        let ready = !access.is_write() || self.write_ready;
        ready && denial(self.rights, self.pkey, access, controls).is_none()
    }

    /// Whether somebody may write by it.
    pub fn is_writable(&self) -> bool {
        self.write_ready && self.rights.contains(Rights::WRITE)
    }
}

/// A TLB without limit, and the walk behind it.
#[derive(Debug, Default)]
pub struct Hardware {
    entries: Vec<Entry>,
}

impl Hardware {
    /// Forgets what a backend asks for; `pcid` is the current one of the CPU concerned.
    pub fn forget(&mut self, flush: TlbFlush, pcid: u16) {
        self.entries.retain(|e| {
            let covers = |gva: Gva| gva.0 & !e.whole == e.linear & !e.whole;
            let frames = e.host >> 12..(e.host + e.mask + 1) >> 12;
            !match flush {
                TlbFlush::None => false,
                TlbFlush::Page(gva) => covers(gva) && (e.global || e.pcid == pcid),
                TlbFlush::PageOf(of, gva) => covers(gva) && !e.global && e.pcid == of,
                TlbFlush::Frame(frame) => frames.contains(&frame.0),
                TlbFlush::Pcid(of) => !e.global && e.pcid == of,
                TlbFlush::NonGlobal => !e.global,
                TlbFlush::All => true,
            }
        });
    }

    /// All translations that are held.
    pub fn held(&self) -> impl Iterator<Item = Held> + '_ {
        self.entries.iter().map(|e| Held {
            gva: e.made_for,
            hpa: Hpa(e.host | e.made_for & e.mask),
            pcid: e.pcid,
            global: e.global,
            rights: e.rights,
            pkey: e.pkey,
            write_ready: e.write_ready,
        })
    }

    /// Forgets everything, behind everybody's back.
    pub fn forget_all(&mut self) {
        self.entries.clear();
    }

    /// Translates for one access: from the TLB if it permits the access, else by a walk. `absent` names pages of guest
    /// tables where the backend has said that no memory is.
    pub fn translate(
        &mut self,
        memory: &GuestMemory,
        root: &TableRoot,
        state: &PagingState,
        gva: Gva,
        access: &Access,
        absent: &[Absent],
    ) -> Result<Hpa, Stop> {
        let controls = match root {
            TableRoot::Shadow { controls, .. } => *controls,
            TableRoot::Nested { .. } => state.controls(),
        };
        let pcid = state.pcid();
        let usable =
            |e: &Entry| gva.0 & !e.mask == e.linear && (e.pcid == pcid || e.global && controls.global);
        // More than one may be held for an address; any of them may answer, so the oldest does.
        if let Some(i) = self.entries.iter().position(usable) {
            let e = self.entries[i];
            let ready = !access.is_write() || e.write_ready;
            if ready && denial(e.rights, e.pkey, access, &controls).is_none() {
                return Ok(Hpa(e.host | gva.0 & e.mask));
            }
            // A fault at an address forgets all that is held for it (SDM Vol. 3 §4.10.4.1); a walk in its place may.
            self.entries.retain(|e| !usable(e));
        }
        let entry = self.walk(memory, root, state, gva, access, absent)?;
        self.entries.push(entry);
        Ok(Hpa(entry.host | gva.0 & entry.mask))
    }

    /// Takes in what a walk for `gva` finds now, as speculation may; nothing if it finds a fault. The walk must have no
    /// flag to set.
    pub fn prefetch(&mut self, memory: &GuestMemory, root: &TableRoot, state: &PagingState, gva: Gva) {
        let access = Access { kind: AccessKind::Read, privilege: Privilege::Supervisor, ac: true };
        if let Ok(new) = self.walk(memory, root, state, gva, &access, &[])
            && !self.entries.iter().any(|old| Entry { made_for: new.made_for, ..*old } == new)
        {
            self.entries.push(new);
        }
    }

    fn walk(
        &mut self,
        memory: &GuestMemory,
        root: &TableRoot,
        state: &PagingState,
        gva: Gva,
        access: &Access,
        absent: &[Absent],
    ) -> Result<Entry, Stop> {
        let pcid = state.pcid();
        let (entry, controls) = match root {
            TableRoot::Shadow { root, format, controls } => {
                let mut tables = HostTables::new(memory.host());
                let Ok(walked) = walk_access(*format, root.0, gva, access, controls, &mut tables, true);
                if walked.walk.is_known_absent() {
                    return Err(Stop::Guest(absence(gva, access, state)));
                }
                let t = walked.result.map_err(Stop::Page)?;
                (Entry::new(gva, t.physical(gva.0), t.size.offset_mask(), &t, pcid), *controls)
            }
            TableRoot::Nested { root, format } => {
                let mut tables = NestedMemory::new(memory.host(), *format, *root, absent);
                let t = walk_nested(state, gva, access, &mut tables).map_err(|fault| match fault {
                    NestedFault::Guest(fault) => Stop::Page(fault),
                    NestedFault::Ept(fault) => Stop::Ept(fault),
                })?;
                let write_ready = t.guest.dirty && t.nested.dirty && t.nested.rights.contains(Rights::WRITE);
                let entry = Entry::new(gva, t.hpa.0, t.size.offset_mask(), &t.guest, pcid);
                (Entry { write_ready, ..entry }, state.controls())
            }
        };
        Ok(Entry { global: entry.global && controls.global, ..entry })
    }
}
