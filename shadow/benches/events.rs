//! What one event costs: a hidden fault, a guest's own fault, a trapped table write, a CR3 load, a device access.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use guestmem::{Backing, Gpa, GuestMemory, Gva, MemoryConfig, Policy, RegionConfig, RegionKind};
use mmu::entry::bits::{A, D, P, U, W};
use mmu::paging::bits::*;
use mmu::{
    Access, AccessKind, CpuId, Fault, FaultKind, MmuBackend, PagingState, PfCode, Privilege, Resolution,
};
use shadow::{Options, ShadowMmu};
use std::hint::black_box;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const RW: u64 = P | W | U | A | D;
const ROOTS: [u64; 2] = [0x10_0000, 0x10_1000];

struct Guest {
    memory: Arc<GuestMemory>,
    mmu: ShadowMmu,
    cpu: CpuId,
    state: PagingState,
}

/// A 4-level guest of 64 MiB, whose first 32 MiB of address space map its last 32 MiB of memory by 4 KiB pages.
fn guest(options: Options) -> Guest {
    let memory = Arc::new(
        GuestMemory::new(&MemoryConfig {
            regions: vec![RegionConfig { base: Gpa(0), len: 64 * MIB, kind: RegionKind::Ram }],
            policy: Policy::Linear,
            table_frames: 1024,
        })
        .expect("64 MiB can be had"),
    );
    let put = |gpa: u64, raw: u64| memory.write(Gpa(gpa), &raw.to_le_bytes()).expect("it is memory");
    for root in ROOTS {
        put(root, 0x10_2000 | RW);
    }
    put(0x10_2000, 0x10_3000 | RW);
    for table in 0..16 {
        put(0x10_3000 + table * 8, (0x11_0000 + table * 0x1000) | RW);
        for page in 0..512 {
            put(0x11_0000 + table * 0x1000 + page * 8, (32 * MIB + (table * 512 + page) * 0x1000) | RW);
        }
    }
    put(0x10_3000 + 16 * 8, 0x12_0000 | RW);
    put(0x12_0000, 0xfee0_0000 | RW);
    let state = PagingState {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: ROOTS[0],
        cr4: CR4_PAE | CR4_PGE,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        ..PagingState::default()
    };
    let mut mmu = ShadowMmu::new(memory.clone(), options);
    let cpu = mmu.add_cpu(&state).expect("there is room for a root");
    Guest { memory, mmu, cpu, state }
}

impl Guest {
    fn fault(&mut self, gva: u64, code: PfCode, kind: AccessKind) -> Resolution {
        let access = Access::new(kind, Privilege::Supervisor);
        let fault = Fault { gva: Gva(gva), access, kind: FaultKind::Page(code) };
        self.mmu.fault(self.cpu, &fault, &self.state).expect("the host does not fail")
    }

    fn store(&mut self, gpa: u64, raw: u64) {
        let Ok(Backing::Memory { frame, .. }) = self.memory.backing(Gpa(gpa).frame()) else { return };
        let hpa = frame.base().wrapping_add(gpa & 0xfff);
        self.memory.host().write_u64(hpa, raw);
        let _ = black_box(self.mmu.guest_table_written(Gpa(gpa), 8).expect("the host does not fail"));
    }
}

fn events(c: &mut Criterion) {
    let full = |options: Options| {
        let mut g = guest(options);
        for page in 0..16 * 512 {
            let _ = black_box(g.fault(page * 0x1000, PfCode::empty(), AccessKind::Write));
        }
        g
    };
    c.bench_function("hidden fault, tables there", |b| {
        b.iter_batched_ref(
            || {
                let mut g = guest(Options::default());
                for table in 0..16 {
                    let _ = black_box(g.fault(table << 21, PfCode::empty(), AccessKind::Write));
                }
                (g, 0)
            },
            |(g, page)| {
                *page = (*page + 1) % (16 * 512);
                let _ = black_box(g.fault(*page * 0x1000, PfCode::empty(), AccessKind::Write));
            },
            BatchSize::NumIterations(8000),
        );
    });
    c.bench_function("reflected fault", |b| {
        let mut g = full(Options::default());
        b.iter(|| black_box(g.fault(1 << 30, PfCode::empty(), AccessKind::Read)));
    });
    for (name, eager_update) in
        [("table write, new entry filled", true), ("table write, entry zapped", false)]
    {
        c.bench_function(name, |b| {
            let mut g = full(Options { eager_update, flood_zap: false, ..Options::default() });
            let mut i = 0;
            b.iter(|| {
                i = (i + 1) % (16 * 512);
                let other = (32 * MIB + (i * 7 % 8192) * 0x1000) | RW;
                g.store(0x11_0000 + i * 8, other);
            });
        });
    }
    c.bench_function("CR3 load", |b| {
        let mut g = full(Options::default());
        let mut i = 0;
        b.iter(|| {
            i ^= 1;
            g.state.cr3 = ROOTS[i];
            black_box(g.mmu.load_cr3(g.cpu, &g.state, false).expect("the host does not fail"))
        });
    });
    c.bench_function("device access by its marker", |b| {
        let mut g = full(Options::default());
        let _ = black_box(g.fault(16 << 21, PfCode::empty(), AccessKind::Write));
        let code = PfCode::PRESENT | PfCode::RESERVED;
        b.iter(|| black_box(g.fault(16 << 21, code, AccessKind::Write)));
    });
    c.bench_function("tree of 16 tables built and zapped", |b| {
        let mut g = full(Options::default());
        b.iter(|| {
            g.store(0x10_2000, 0);
            g.store(0x10_2000, 0x10_3000 | RW);
            for table in 0..16 {
                let _ = black_box(g.fault(table << 21, PfCode::empty(), AccessKind::Write));
            }
        });
    });
}

criterion_group!(benches, events);
criterion_main!(benches);
