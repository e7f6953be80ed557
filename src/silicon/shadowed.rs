//! Shadow tables: the shadow backend builds its own for a random guest, and the root it built is loaded into CR3.
//!
//! The vCPU's physical memory is the object that holds guest memory and the tables, so that an HPA in an entry is a physical
//! address, as in direct execution. Two things are judged. The walk: the vCPU does with the shadow tables what the
//! reference does with them. And the promise: where the *guest's* tables let an access through, the vCPU reaches the
//! guest's data by the shadow tables, where they do not, it faults, and so it does where the backend wants a fault (a
//! device page, whose marker has a reserved bit on purpose, or a tracked table).

use crate::batch::{Answer, Bits, Touch};
use crate::error::Error;
use crate::examine::Examination;
use crate::expect::{Expected, Left, Mistake, expect};
use crate::features::{Features, Limits};
use crate::generate::{BANK_FRAMES, Chance, Ground, Space, one_in};
use crate::judge::Disagreement;
use crate::memory::{A, D, Image};
use crate::oracle::Oracle;
use crate::report::{Outcome, Tables};
use crate::touches::choose;
use guestmem::{
    Backing, Gfn, Gpa, GuestMemory, Gva, HostMemory, Hpa, MemoryConfig, Policy, RegionConfig, RegionKind,
};
use mmu::{
    Access, AccessKind, Counter, CpuId, Fault, FaultKind, MmuBackend, PagingMode, PagingState, PfCode,
    Privilege, Resolution, TableRoot,
};
use rand::RngExt;
use reference::{Cpu, Outcome as Walked, Ram, translate, visit};
use shadow::{Options, ShadowMmu};
use std::sync::Arc;

/// Guest memory: four banks; beyond are devices.
const GUEST_BANKS: u64 = 4;
const TABLE_FRAMES: u64 = 256;
/// A fault is answered at most so often before the access must get through: a debt of flushes may come first.
const ROUNDS: usize = 8;

/// What the backend makes of an access, once it has filled its tables for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fill {
    /// It is mapped.
    Mapped,
    /// The guest's own fault.
    GuestFault,
    /// A device page, or a write that the backend wants to see.
    Kept,
}

/// What the vCPU must do with an access by the shadow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// Get through; a read or executed code gives this value.
    Value(u64),
    /// Fault, because the guest's own tables do.
    GuestFault,
    /// Fault, because the backend wants to see it.
    Kept,
}

/// Physical memory for walks that set no flags: shadow entries have theirs set.
struct ShadowTables<'a>(&'a HostMemory);

impl Ram for ShadowTables<'_> {
    fn entry(&self, address: u64, _: u8) -> u64 {
        self.0.read_u64(Hpa(address)).unwrap_or(u64::MAX)
    }

    fn set_entry(&mut self, _: u64, _: u8, _: u64) {}
}

/// A guest, and the backend that shadows it.
struct Guest {
    space: Space,
    memory: Arc<GuestMemory>,
    mmu: ShadowMmu,
    id: CpuId,
    state: PagingState,
}

impl Guest {
    fn random(rng: &mut Chance, features: &Features) -> Result<Self, Error> {
        // What the guest has is the backend's business, but for what the hardware must check.
        let limits =
            Limits { bit_8_reserved: false, pse36_width: 40, nxe_needs_pae: false, ..features.limits };
        let offered = Features { maxphyaddr: 46, page1gb: true, limits, ..features.clone() };
        let modes = [PagingMode::Level4, PagingMode::Pae, PagingMode::Bits32];
        let mode = modes[rng.random_range(0..modes.len())];
        // The guest leaves the entry of the shadow root alone that the stub will have.
        let kept: &[_] = if mode == PagingMode::Level4 { &[(128, 0)] } else { &[] };
        let bank = rng.random_range(0..GUEST_BANKS);
        let device = Some(GUEST_BANKS * BANK_FRAMES * 4096);
        // The backend maps nothing large that holds a guest's table.
        let far = Some((bank + rng.random_range(1..GUEST_BANKS)) % GUEST_BANKS);
        let ground = Ground { features: &offered, mode, bank, far, alias: None, device, kept };
        let space = Space::random(rng, &ground);
        let policy = match rng.random_range(0..4) {
            0 => Policy::Demand,
            1 => Policy::Scatter { seed: rng.random() },
            _ => Policy::Linear,
        };
        let len = GUEST_BANKS * BANK_FRAMES * 4096;
        let regions = vec![RegionConfig { base: Gpa(0), len, kind: RegionKind::Ram }];
        let memory =
            Arc::new(GuestMemory::new(&MemoryConfig { regions, policy, table_frames: TABLE_FRAMES })?);
        for (frame, words) in space.image.frames() {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            memory.write(Gfn(frame).base(), &bytes)?;
        }
        let options =
            // Accesses are filled for first and made afterwards: a table that went out of sync between would take what was filled
            // before out of use.
            Options {
                large_pages: !one_in(rng, 3),
                mmio_markers: !one_in(rng, 4),
                unsync: false,
                ..Options::default()
            };
        let mut mmu = ShadowMmu::new(memory.clone(), options);
        let state = space.cpu.state();
        let id = mmu.add_cpu(&state)?;
        Ok(Self { space, memory, mmu, id, state })
    }

    /// The control bits that go with the shadow root, as the backend says.
    fn shadow_cpu(&self, features: &Features) -> Cpu {
        let TableRoot::Shadow { root, controls, .. } = self.mmu.root(self.id) else {
            unreachable!("the shadow backend's roots are shadow roots")
        };
        Cpu {
            pg: true,
            pae: true,
            lma: true,
            wp: controls.wp,
            nxe: controls.nxe,
            smep: controls.smep,
            smap: controls.smap,
            pke: controls.pke,
            pkru: controls.pkru,
            pge: controls.global,
            cr3: root.0,
            maxphyaddr: features.maxphyaddr,
            page1gb: features.page1gb,
            ..Cpu::default()
        }
    }

    /// Lets the backend answer the faults of an access until it is mapped or stays a fault.
    fn fill(&mut self, cpu: &Cpu, touch: &Touch) -> Result<Fill, Error> {
        for _ in 0..ROUNDS {
            let (walked, _) =
                translate(cpu, &mut ShadowTables(self.memory.host()), touch.linear, &touch.access);
            let Walked::Fault(code) = walked else { return Ok(Fill::Mapped) };
            let kind = FaultKind::Page(PfCode::from_bits_truncate(code));
            let fault = Fault { gva: Gva(touch.linear), access: touch.access, kind };
            match self.mmu.fault(self.id, &fault, &self.state)? {
                // There is no TLB here to be flushed.
                Resolution::Fixed(_) | Resolution::Spurious => {}
                Resolution::GuestFault(_) => return Ok(Fill::GuestFault),
                Resolution::Mmio(_) | Resolution::TableWrite(_) => return Ok(Fill::Kept),
            }
        }
        // It still faults: the answers will say so.
        Ok(Fill::Mapped)
    }

    /// The address space of the shadow tables as they are now.
    fn shadow_space(&self, cpu: Cpu, features: &Features) -> Result<Space, Error> {
        let host = self.memory.host();
        let tables: Vec<u64> =
            (0..TABLE_FRAMES).filter(|&frame| self.memory.is_table_frame(guestmem::Hfn(frame))).collect();
        let mut image = Image::new(None);
        tables.iter().for_each(|&frame| image.add_from(host, frame));
        for (gfn, _) in self.space.image.frames() {
            if let Backing::Memory { frame, .. } = self.memory.backing(Gfn(gfn))? {
                image.add_from(host, frame.0);
            }
        }
        let (data, indexes, top_indexes) = (Vec::new(), Vec::new(), Vec::new());
        let (mode, limits) = (PagingMode::Level4, features.limits);
        Ok(Space { mode, cpu, image, tables, data, indexes, top_indexes, limits })
    }

    /// The accesses of the case, at CPL 3 and, now and then, at CPL 0: but not while CR0.WP = 0, when a page that users may
    /// read changes hands between them and the supervisor, so that the tables are not all that they were filled for.
    fn choose(&self, rng: &mut Chance, features: &Features) -> Vec<Vec<Touch>> {
        let bytes = Bits::Bits64.access_bytes();
        let mut image = self.space.image.clone();
        let mut user = choose(rng, &self.space, &mut image, Privilege::User, bytes);
        if features.maxphyaddr < 52 {
            user.extend(self.device_touches(rng));
        }
        let mut batches = vec![user];
        if self.space.cpu.wp && one_in(rng, 4) {
            batches.push(choose(rng, &self.space, &mut image, Privilege::Supervisor, bytes));
        }
        batches
    }

    /// Lets the backend fill its tables for the accesses, and says what they owe.
    fn promises(
        &mut self,
        cpu: &Cpu,
        batches: &[Vec<Touch>],
        mistake: Mistake,
    ) -> Result<Vec<Promise>, Error> {
        let bytes = Bits::Bits64.access_bytes();
        let mut model = self.space.image.clone();
        let mut expected = Vec::new();
        for touch in batches.iter().flatten() {
            let left = &mut Left::default();
            expected.push(expect(&self.space.cpu, &mut model, touch, bytes, mistake, left));
        }
        // Twice: what an access fills may take a right from one before (a frame that turns out to be a table).
        let mut fills = Vec::new();
        for _ in 0..2 {
            fills.clear();
            for touch in batches.iter().flatten() {
                fills.push(self.fill(cpu, touch)?);
            }
        }
        Ok(expected.into_iter().zip(fills).map(|(expected, fill)| promise(expected, fill)).collect())
    }

    /// Accesses to device pages: what the guest's tables permit, where no memory is.
    fn device_touches(&self, rng: &mut Chance) -> Vec<Touch> {
        let end = GUEST_BANKS * BANK_FRAMES * 4096;
        let mut touches = Vec::new();
        for _ in 0..64 {
            let linear = self.space.address(rng);
            let kind = if one_in(rng, 2) { AccessKind::Read } else { AccessKind::Write };
            let access = Access::new(kind, Privilege::User);
            let visit = visit(&self.space.cpu, &self.space.image, linear);
            let inside = !self.space.image.take_outside();
            let barred = self.space.limits.lower_half_only && linear >> 63 == 1;
            if let Ok(leaf) = visit.end
                && inside
                && !barred
                && leaf.refusal(&self.space.cpu, &access).is_none()
                && (leaf.physical | linear & (leaf.page_size - 1)) >= end
            {
                touches.push(Touch { linear, access, value: 0 });
            }
        }
        touches.truncate(8);
        touches
    }

    /// The shadow root's entry for the stub comes and goes with the run; the backend never learns of it.
    fn plant(&self, root: u64, (index, entry): (u64, u64)) {
        let inside = self.memory.host().write_u64(Hpa(root + index * 8), entry);
        debug_assert!(inside.is_some(), "the root is in the object");
    }
}

impl Oracle {
    /// One case of shadow tables.
    pub(crate) fn shadow_case(
        &mut self,
        rng: &mut Chance,
        outcome: &mut Outcome,
    ) -> Result<Option<(Space, Vec<Disagreement>)>, Error> {
        let (features, mistake) = (self.features.clone(), self.mistake);
        let mut guest = Guest::random(rng, &features)?;
        let batches = guest.choose(rng, &features);
        let cpu = guest.shadow_cpu(&features);
        let promises = guest.promises(&cpu, &batches, mistake)?;
        let vm = self.shadowing()?;
        vm.show_guest(guest.memory.clone(), TABLE_FRAMES)?;
        let stub = vm.home.top_entry();
        guest.plant(cpu.cr3, stub);
        outcome.large_leaves += guest.mmu.counters().get(Counter::ShadowLargeFilled);
        let space = guest.shadow_space(cpu, &features)?;
        let tables = Tables::Shadow(guest.space.mode);
        let mut examination = Examination::new(&space, guest.memory.host(), Mistake::None, tables);
        let mut answers = Vec::new();
        for touches in &batches {
            answers.extend(examination.batch(vm, touches, outcome)?);
        }
        let mut found = examination.finish(outcome);
        guest.plant(cpu.cr3, (stub.0, 0));
        for (nth, (touch, promise)) in batches.iter().flatten().zip(promises).enumerate() {
            outcome.promises[match promise {
                Promise::Value(_) => 0,
                Promise::GuestFault => 1,
                Promise::Kept => 2,
            }] += 1;
            // The backend has set the flags of all accesses before the first is made.
            let open =
                if guest.space.reads_a_table(&guest.space.image, touch) { (A | D) << 32 | A | D } else { 0 };
            let got = answers[nth];
            if !keeps(promise, got, open) {
                found.push(Disagreement::Promise { nth, touch: *touch, promise, got });
            }
        }
        Ok((!found.is_empty()).then_some((space, found)))
    }
}

fn promise(expected: Expected, fill: Fill) -> Promise {
    match (expected, fill) {
        (Expected::Fault(_), _) => Promise::GuestFault,
        (Expected::Done(_), Fill::Kept) => Promise::Kept,
        // A fault that the guest's tables do not have is a broken promise, which shows in the answer.
        (Expected::Done(value), _) => Promise::Value(value),
    }
}

fn keeps(promise: Promise, got: Answer, open: u64) -> bool {
    match (promise, got) {
        (Promise::Value(promised), Answer::Done(got)) => (promised ^ got) & !open == 0,
        (Promise::GuestFault | Promise::Kept, Answer::Fault { .. }) => true,
        _ => false,
    }
}
