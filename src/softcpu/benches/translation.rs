//! What one translation costs, in nanoseconds: found in the TLB, refilled by the hardware walk in one dimension (the shadow
//! table) and in two (the guest's tables through EPT), and found in no table of ours: fault, fill, retry.
//!
//! Each is a guest's load, one after the other from page to page, executed by the software CPU. What a load costs that hits
//! is to be taken off from the others; the walks alone, as `mmu` makes them, are beside them. The loop here is the core
//! of the program's run loop: it has no devices, no counters and no clock. (SDM Vol. 3 §4.5, §4.10, §29.3.)

use criterion::{Criterion, criterion_group, criterion_main};
use guestmem::{Gfn, Gpa, GuestMemory, Gva, MemoryConfig, PAGE_SIZE, Policy, RegionConfig, RegionKind, Slot};
use mmu::entry::bits::{A, D, P, U, W};
use mmu::nested::walk_nested;
use mmu::paging::bits::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, EFER_LMA, EFER_LME, EFER_NXE};
use mmu::walk::{HostTables, walk_access};
use mmu::{
    Access, AccessKind, Counter, CpuId, MmuBackend, NestedMemory, Privilege, Resolution, TableRoot, TlbFlush,
};
use softcpu::{CpuModel, EngineKind, SoftCpu};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vcpu::state::seg;
use vcpu::{Answer, Entry, Exit, Segment, Vcpu};

const MIB: u64 = 1 << 20;
const ROOT: u64 = 0x10_0000;
const RW: u64 = P | W | U | A | D;
/// The pages that are loaded from, at linear address 0; in memory they are the upper half. More than any TLB of ours holds.
const DATA: u64 = 32 * MIB;
const PAGES: u64 = DATA / PAGE_SIZE;
/// As many as surely stay in the TLB.
const FEW: u64 = 256;
/// Where the guest's program is, linear and in memory.
const CODE: u64 = 1 << 30;
const CODE_GPA: u64 = 0x1000;
/// Instructions a load.
const LENGTH: u64 = 4;

/// `mov rax, [rdi]`, `add rdi, 4096`, `and rdi, pages * 4096 - 1`, and over again.
fn program(pages: u64) -> Vec<u8> {
    let mask = (pages * PAGE_SIZE - 1) as u32;
    let mut code = vec![0x48, 0x8b, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0x81, 0xe7];
    code.extend(mask.to_le_bytes());
    let back = -(code.len() as i8 + 2);
    code.extend([0xeb, back as u8]);
    code
}

/// Which tables the hardware walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tables {
    Shadow,
    /// EPT with entries of 2 MiB, as it is where memory is contiguous.
    EptLarge,
    /// EPT with entries of 4 KiB.
    EptSmall,
}

impl Tables {
    fn name(self) -> &'static str {
        match self {
            Tables::Shadow => "shadow, one-dimensional",
            Tables::EptLarge => "ept, two-dimensional, 2 MiB entries",
            Tables::EptSmall => "ept, two-dimensional, 4 KiB entries",
        }
    }

    fn backend(self, memory: &Arc<GuestMemory>) -> Box<dyn MmuBackend> {
        let memory = Arc::clone(memory);
        let large = self == Tables::EptLarge;
        let options = ept::Options { large_2m: large, large_1g: large, ..ept::Options::default() };
        match self {
            Tables::Shadow => Box::new(shadow::ShadowMmu::new(memory, shadow::Options::default())),
            _ => Box::new(ept::EptMmu::new(memory, options).expect("there is room for a root")),
        }
    }
}

/// A guest in 64-bit user mode, in front of its loop.
struct Guest {
    memory: Arc<GuestMemory>,
    mmu: Box<dyn MmuBackend>,
    cpu: SoftCpu,
    id: CpuId,
    faults: u64,
}

fn memory() -> Arc<GuestMemory> {
    let memory = GuestMemory::new(&MemoryConfig {
        regions: vec![RegionConfig { base: Gpa(0), len: 2 * DATA, kind: RegionKind::Ram }],
        policy: Policy::Linear,
        table_frames: 1024,
    })
    .expect("64 MiB can be had");
    let put = |gpa: u64, raw: u64| memory.write(Gpa(gpa), &raw.to_le_bytes()).expect("it is memory");
    let [directory, low, high, code] = [1, 2, 3, 4].map(|table| ROOT + table * PAGE_SIZE);
    put(ROOT, directory | RW);
    put(directory, low | RW);
    put(directory + 8, high | RW);
    put(high, code | RW);
    put(code, CODE_GPA | RW);
    for table in 0..PAGES / 512 {
        let leaves = ROOT + (8 + table) * PAGE_SIZE;
        put(low + table * 8, leaves | RW);
        for page in 0..512 {
            put(leaves + page * 8, (DATA + (table * 512 + page) * PAGE_SIZE) | RW);
        }
    }
    Arc::new(memory)
}

impl Guest {
    fn new(tables: Tables, engine: EngineKind, pages: u64) -> Self {
        let memory = memory();
        memory.write(Gpa(CODE_GPA), &program(pages)).expect("it is memory");
        let mut cpu = SoftCpu::with_engine(Arc::clone(&memory), CpuModel::default(), engine)
            .expect("the host has what the default model needs");
        let mut state = cpu.state();
        let data = Segment { selector: 0x2b, base: 0, limit: u32::MAX, attributes: 0xc0f3 };
        state.segments = [data; 6];
        state.segments[seg::CS] = Segment { selector: 0x33, attributes: 0xa0fb, ..data };
        (state.cr0, state.cr3, state.cr4) = (CR0_PE | CR0_PG | CR0_WP, ROOT, CR4_PAE | CR4_PGE);
        state.efer = EFER_LME | EFER_LMA | EFER_NXE;
        (state.rip, state.rflags) = (CODE, 2);
        cpu.set_state(&state);
        let mut mmu = tables.backend(&memory);
        let id = mmu.add_cpu(&cpu.paging_state()).expect("there is room for a root");
        cpu.set_translation(mmu.root(id), mmu.intercepts());
        let mut guest = Self { memory, mmu, cpu, id, faults: 0 };
        guest.load(2 * pages);
        guest
    }

    /// Loads from so many pages, one after the other.
    fn load(&mut self, loads: u64) {
        let deadline = self.cpu.ticks() + loads * LENGTH;
        let mut entry = Entry::Start;
        loop {
            match self.cpu.run(entry, deadline).expect("the host does not fail") {
                Exit::Deadline => return,
                Exit::Fault(fault) => {
                    self.faults += 1;
                    let state = self.cpu.paging_state();
                    match self.mmu.fault(self.id, &fault, &state).expect("the host does not fail") {
                        Resolution::Fixed(flush) => self.cpu.flush(flush),
                        other => panic!("{fault:?} was answered by {other:?}"),
                    }
                }
                exit => panic!("the guest only loads, and left by {exit:?}"),
            }
            entry = Entry::Answer(Answer::Done);
        }
    }

    /// Takes every data page out of the tables, and everything out of the TLB; a first load brings back the program's page.
    fn forget(&mut self) {
        let frames = || (DATA / PAGE_SIZE..2 * DATA / PAGE_SIZE).map(Gfn);
        // A backend keeps what is still true, so for a moment there is no memory behind these frames.
        let slots: Vec<_> = frames().map(|gfn| self.memory.set_slot(gfn, Slot::Unbacked)).collect();
        let range = Gfn(DATA / PAGE_SIZE)..Gfn(2 * DATA / PAGE_SIZE);
        let flush = self.mmu.memory_changed(range).expect("the host does not fail");
        self.cpu.flush(flush.and(TlbFlush::All));
        for (gfn, slot) in frames().zip(slots) {
            self.memory.set_slot(gfn, slot.expect("it is memory"));
        }
        self.load(1);
    }

    fn misses(&self) -> u64 {
        self.cpu.counters().get(Counter::TlbMisses)
    }

    /// The time of `count` loads, after which so many TLB misses and faults have to be counted.
    fn timed(&mut self, count: u64, misses: u64, faults: u64) -> Duration {
        let before = (self.misses(), self.faults);
        let started = Instant::now();
        self.load(count);
        let took = started.elapsed();
        let seen = (self.misses() - before.0, self.faults - before.1);
        assert_eq!(seen, (misses, faults), "{count} loads: misses and faults are not those to be measured");
        took
    }
}

const ENGINES: [EngineKind; 2] = [EngineKind::Interpret, EngineKind::Translate];

fn loads(c: &mut Criterion) {
    for engine in ENGINES {
        let mut group = c.benchmark_group(format!("a load, {}", engine.name()));
        // Guests are made outside the closures, which criterion calls again and again.
        let mut guest = Guest::new(Tables::Shadow, engine, FEW);
        group.bench_function("found in the TLB", |b| b.iter_custom(|loads| guest.timed(loads, 0, 0)));
        for tables in [Tables::Shadow, Tables::EptLarge, Tables::EptSmall] {
            let mut guest = Guest::new(tables, engine, PAGES);
            group.bench_function(format!("TLB refill: {}", tables.name()), |b| {
                b.iter_custom(|loads| guest.timed(loads, loads, 0));
            });
        }
        for (tables, name) in [
            (Tables::Shadow, "hidden fault: shadow"),
            (Tables::EptSmall, "EPT violation: ept, 4 KiB entries"),
        ] {
            let mut guest = Guest::new(tables, engine, PAGES);
            group.bench_function(name, |b| b.iter_custom(|loads| faulting(&mut guest, loads)));
        }
        group.finish();
    }
}

/// Loads that each find no entry of ours: fault, fill, retry. At a fault the walk is made twice.
fn faulting(guest: &mut Guest, loads: u64) -> Duration {
    let mut took = Duration::ZERO;
    let mut left = loads;
    while left > 0 {
        let some = left.min(PAGES - 1);
        guest.forget();
        took += guest.timed(some, 2 * some, some);
        left -= some;
    }
    took
}

fn walks(c: &mut Criterion) {
    let mut group = c.benchmark_group("the walk alone");
    let access = Access::new(AccessKind::Read, Privilege::User);
    for tables in [Tables::Shadow, Tables::EptLarge, Tables::EptSmall] {
        let guest = Guest::new(tables, EngineKind::Interpret, PAGES);
        group.bench_function(tables.name(), |b| {
            let (state, host) = (guest.cpu.paging_state(), guest.memory.host());
            let mut page = 0;
            b.iter(|| {
                page = (page + 1) % PAGES;
                let gva = black_box(Gva(page * PAGE_SIZE));
                match guest.mmu.root(guest.id) {
                    TableRoot::Shadow { root, format, controls } => {
                        let mut tables = HostTables::new(host);
                        let Ok(walked) =
                            walk_access(format, root.0, gva, &access, &controls, &mut tables, true);
                        black_box(walked.result.expect("it is mapped").base)
                    }
                    TableRoot::Nested { root, format } => {
                        let mut memory = NestedMemory::new(host, format, root, &[]);
                        black_box(walk_nested(&state, gva, &access, &mut memory).expect("it is mapped").hpa.0)
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    // Fifteen of them in half a minute.
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1000))
        .without_plots();
    targets = walks, loads
}
criterion_main!(benches);
