//! Bugs that other shadow pagers have had, by the number they have in the public record: each one's scenario, and the
//! property that failed there. (What needs parallel faults, generations or stale entries in use does not exist here: every
//! event has the backend for itself, and nothing leads to a table that is out of sync.)

mod machine;

use guestmem::{FrameMark, Gfn, Gpa, Gva, Policy, RegionConfig, RegionKind, Slot};
use machine::*;
use mmu::entry::bits::{A, D, G, NX, P, PS, U, W};
use mmu::paging::bits::*;
use mmu::{Access, Counter, InvpcidKind, MmuBackend, PagingMode, PfCode, Privilege, TlbFlush};
use shadow::Options;

const RW: u64 = P | W | U;
use Privilege::{Implicit, Supervisor, User};

/// A guest with the top table at 0x10000 and one table a level below; entry 0 of each leads on.
fn guest(policy: Policy, options: Options) -> Machine {
    let mut m = Machine::new(policy, Options { audit_every_event: true, ..options });
    m.entry(0x10000, 0, 0x11000 | RW);
    m.entry(0x11000, 0, 0x12000 | RW);
    m.entry(0x12000, 0, 0x13000 | RW);
    m
}

fn running(policy: Policy, options: Options) -> Machine {
    let mut m = guest(policy, options);
    assert!(m.set_state(long_mode(0x10000)));
    m
}

/// R1 (CVE-2026-46113): a directory entry changes from outside while leaves below it are filled; then their memory goes.
#[test]
fn entries_are_found_by_frame_after_a_directory_changed() {
    let mut m = running(Policy::Linear, Options::default());
    m.entry(0x12000, 1, 0x20_0000 | RW | PS);
    for page in [0, 5, 9] {
        m.entry(0x13000, page, (0x20_0000 + page * 0x1000) | RW);
        m.access(Gva(page * 0x1000), write(User));
    }
    m.access(Gva(0x20_1000), write(User));
    m.dma(Gpa(0x12000), &(0x40_0000 | RW | PS).to_le_bytes());
    m.flush_all();
    m.access(Gva(0), read(User));
    m.access(Gva(0x9000), write(User));
    for gfn in 0x200..0x210 {
        m.change_slot(Gfn(gfn), SlotKind::Device);
    }
    m.audit();
    assert_eq!(m.access(Gva(0x20_1000), write(User)), Outcome::Device(Gpa(0x20_1000)));
}

/// R2 (CVE-2026-53359): the frames of a splintered large page are used as tables, and the other way round.
#[test]
fn a_direct_page_is_never_taken_for_a_table_of_the_same_frame() {
    let mut m = running(Policy::Scatter { seed: 3 }, Options::default());
    // A large page over 0x200000, splintered: a direct page of frame 0x200.
    m.entry(0x12000, 1, 0x20_0000 | RW | PS);
    m.access(Gva(0x20_0000), write(User));
    // The same frame as a table: its entries are what the guest writes there.
    m.entry(0x20_0000, 0, 0x30_0000 | RW);
    m.entry(0x12000, 2, 0x20_0000 | RW);
    assert_eq!(m.access(Gva(0x40_0000), read(User)), Outcome::Memory(Gpa(0x30_0000)));
    assert!(matches!(m.access(Gva(0x40_1000), read(User)), Outcome::Fault(_)));
    assert_eq!(m.access(Gva(0x20_1000), read(User)), Outcome::Memory(Gpa(0x20_1000)));
    // The same frame as tables of two levels at once.
    m.entry(0x11000, 1, 0x20_0000 | RW);
    m.entry(0x30_0000, 0, 0x31_0000 | RW);
    assert_eq!(m.access(Gva(1 << 30), read(User)), Outcome::Memory(Gpa(0x31_0000)));
    assert_eq!(m.access(Gva(0x40_0000), read(User)), Outcome::Memory(Gpa(0x30_0000)));
}

/// R3 (CVE-2026-64561): reclaim while a fault is filled. With a pool of eight pages almost every fill reclaims.
#[test]
fn reclaim_spares_the_root_and_the_path() {
    let mut m = running(Policy::Linear, Options { page_cap: Some(8), ..Options::default() });
    for top in 0..8 {
        m.entry(0x10000, top, 0x11000 | RW);
        m.entry(0x11000, top, 0x12000 | RW);
        m.entry(0x12000, top, 0x13000 | RW);
        m.entry(0x13000, top, (0x20_0000 + top * 0x1000) | RW);
    }
    for i in 0..400u64 {
        let pick = |shift: u64| ((i * 2_654_435_761) >> shift) & 7;
        let gva = pick(3) << 39 | pick(7) << 30 | pick(11) << 21 | pick(15) << 12;
        assert_eq!(m.access(Gva(gva), write(User)), Outcome::Memory(Gpa(0x20_0000 + pick(15) * 0x1000)));
        assert!(m.mmu.shadow_pages() <= 8);
        if i % 50 == 49 {
            assert!(m.load_cr3(0x10000, false));
        }
    }
    // Tables of different frames at every level, so that pages cannot be shared.
    let mut m = Machine::new(
        Policy::Linear,
        Options { page_cap: Some(8), audit_every_event: true, ..Options::default() },
    );
    for branch in 0..6 {
        let table = |level: u64| 0x10_0000 + (branch * 4 + level) * 0x1000;
        m.entry(0x10000, branch, table(3) | RW);
        m.entry(table(3), 0, table(2) | RW);
        m.entry(table(2), 0, table(1) | RW);
        m.entry(table(1), 0, 0x20_0000 | RW);
    }
    assert!(m.set_state(long_mode(0x10000)));
    for i in 0..60 {
        assert_eq!(m.access(Gva((i * 5 % 6) << 39), write(User)), Outcome::Memory(Gpa(0x20_0000)));
    }
    assert!(m.count(Counter::ShadowPagesReclaimed) > 50);
}

/// R4 (CVE-2026-23401): memory becomes a device page under a filled leaf, by the guest's hand and by the host's.
#[test]
fn a_device_marker_replaces_a_leaf_whole() {
    let mut m = running(Policy::Linear, Options::default());
    m.entry(0x13000, 0, 0x20_0000 | RW | A | D);
    m.access(Gva(0), write(User));
    m.entry(0x13000, 0, MMIO_BASE | RW | A | D);
    m.flush_all();
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Device(Gpa(MMIO_BASE)));
    m.entry(0x13000, 0, 0x20_0000 | RW | A | D);
    m.flush_all();
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Memory(Gpa(0x20_0000)));
    m.change_slot(Gfn(0x200), SlotKind::Device);
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Device(Gpa(0x20_0000)));
    m.change_slot(Gfn(0x200), SlotKind::Fresh);
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Memory(Gpa(0x20_0000)));
}

/// A device marker is not cleverer than the guest's tables: rights, dirty flag and control bits still decide.
#[test]
fn a_device_marker_keeps_rights_and_flags() {
    let mut m = running(Policy::Linear, Options::default());
    m.entry(0x13000, 0, MMIO_BASE | P | W | NX);
    m.entry(0x13000, 1, MMIO_BASE | P | U);
    for _ in 0..2 {
        assert_eq!(m.access(Gva(8), read(Supervisor)), Outcome::Device(Gpa(MMIO_BASE + 8)));
        assert_eq!(code(m.access(Gva(8), read(User))), PfCode::PRESENT | PfCode::USER);
        assert_eq!(code(m.access(Gva(8), fetch(Supervisor))), PfCode::PRESENT | PfCode::FETCH);
        assert_eq!(code(m.access(Gva(0x1000), write(Supervisor))), PfCode::PRESENT | PfCode::WRITE);
        assert_eq!(m.access(Gva(0x1000), read(User)), Outcome::Device(Gpa(MMIO_BASE)));
    }
    assert_eq!(m.peek(0x13000) & D, 0);
    assert_eq!(m.access(Gva(8), write(Supervisor)), Outcome::Device(Gpa(MMIO_BASE + 8)));
    assert_eq!(m.peek(0x13000) & D, D);
    // The guest clears the flag: the next write sets it again.
    m.entry(0x13000, 0, MMIO_BASE | P | W | A);
    m.access(Gva(8), read(Supervisor));
    m.access(Gva(8), write(Supervisor));
    assert_eq!(m.peek(0x13000) & D, D);
    let s = m.state();
    assert!(m.set_state(mmu::PagingState { cr4: s.cr4 | CR4_SMAP, ..s }));
    assert!(matches!(m.access(Gva(0x1000), read(Supervisor)), Outcome::Fault(_)));
    let with_ac = Access { ac: true, ..read(Supervisor) };
    assert_eq!(m.access(Gva(0x1000), with_ac), Outcome::Device(Gpa(MMIO_BASE)));
    assert!(matches!(m.access(Gva(0x1000), Access { ac: true, ..read(Implicit) }), Outcome::Fault(_)));
    // WP off: the supervisor writes the read-only page, once its dirty flag is set too.
    assert!(m.set_state(mmu::PagingState { cr0: s.cr0 & !CR0_WP, ..s }));
    for _ in 0..2 {
        assert_eq!(m.access(Gva(0x1000), read(User)), Outcome::Device(Gpa(MMIO_BASE)));
        assert_eq!(m.access(Gva(0x1000), write(Supervisor)), Outcome::Device(Gpa(MMIO_BASE)));
        assert!(matches!(m.access(Gva(0x1000), write(User)), Outcome::Fault(_)));
    }
    assert_eq!(m.peek(0x13008) & D, D);
}

/// R8 (5f0b819995e1): CR0.WP = 0 and SMEP while the guest has no execute-disable bit. The engine's own is no guest fault.
#[test]
fn the_supervisor_writes_read_only_pages_with_wp_clear() {
    for policy in [Policy::Linear, Policy::Scatter { seed: 2 }] {
        for (cr4, nxe, flip) in [
            (0, true, true),
            (CR4_SMEP, false, true),
            (CR4_SMAP | CR4_SMEP, true, true),
            (CR4_PKE, true, true),
            (0, false, false),
        ] {
            let mut m = guest(policy, Options { wp_flip: flip, ..Options::default() });
            m.entry(0x13000, 0, 0x20_0000 | P | U);
            m.entry(0x13000, 1, 0x20_1000 | P);
            m.entry(0x12000, 2, 0x20_0000 | P | U | PS);
            // Read-only by the level above.
            m.entry(0x12000, 3, 0x14000 | P | U);
            m.entry(0x14000, 0, 0x20_2000 | RW | 1 << 59);
            let s = long_mode(0x10000);
            let efer = if nxe { s.efer } else { s.efer & !EFER_NXE };
            let s = mmu::PagingState { cr0: s.cr0 & !CR0_WP, cr4: s.cr4 | cr4, efer, pkru: 2 << 2, ..s };
            assert!(m.set_state(s));
            for round in 0..3 {
                for gva in [0, 0x1000, 0x40_0000, 0x40_3000, 0x60_0000] {
                    for access in [
                        read(User),
                        write(User),
                        fetch(User),
                        Access { ac: true, ..write(Supervisor) },
                        fetch(Supervisor),
                        read(User),
                        write(Supervisor),
                        read(Implicit),
                        Access { ac: round == 1, ..read(Supervisor) },
                    ] {
                        m.access(Gva(gva), access);
                    }
                }
            }
            m.compare(0..0x300);
            // WP comes back: nothing of it may remain.
            assert!(m.set_state(mmu::PagingState { cr0: s.cr0 | CR0_WP, ..s }));
            assert!(matches!(m.access(Gva(0), Access { ac: true, ..write(Supervisor) }), Outcome::Fault(_)));
            assert!(matches!(m.access(Gva(0x1000), write(Supervisor)), Outcome::Fault(_)));
        }
    }
}

/// R9 (898761158be7): every control bit that changes what entries mean leads to other pages, and back to the same.
#[test]
fn control_bits_change_meaning_at_once_and_completely() {
    let mut m = guest(Policy::Scatter { seed: 8 }, Options::default());
    m.entry(0x13000, 0, 0x20_0000 | RW | NX);
    m.entry(0x13000, 1, 0x20_1000 | P | W);
    m.entry(0x13000, 2, 0x20_2000 | RW | 5 << 59);
    m.entry(0x12000, 1, 0x20_0000 | RW | PS | G);
    let s = long_mode(0x10000);
    let mut states = vec![s];
    for (cr0, cr4, efer) in [
        (CR0_WP, 0, 0),
        (0, CR4_SMEP, 0),
        (0, CR4_SMAP, 0),
        (0, CR4_PKE, 0),
        (0, CR4_PGE, 0),
        (0, 0, EFER_NXE),
        (CR0_WP, CR4_SMEP | CR4_SMAP, EFER_NXE),
        (0, CR4_PCIDE, 0),
    ] {
        states.push(mmu::PagingState {
            cr0: s.cr0 ^ cr0,
            cr4: s.cr4 ^ cr4,
            efer: s.efer ^ efer,
            pkru: 1 << 10,
            ..s
        });
        states.push(s);
    }
    states.push(mmu::PagingState { gib_pages: false, ..s });
    for state in states.iter().chain(&states) {
        assert!(m.set_state(*state));
        for gva in [0, 0x1000, 0x2000, 0x20_0000] {
            for privilege in [User, Supervisor, Implicit] {
                for access in [read(privilege), write(privilege), fetch(privilege)] {
                    if privilege != Implicit || !access.is_fetch() {
                        m.access(Gva(gva), access);
                        m.access(Gva(gva), Access { ac: true, ..access });
                    }
                }
            }
        }
    }
}

/// R10 (84e5ffd045f3): the same frame as the top of five levels and as the top of four.
#[test]
fn one_frame_can_be_the_top_of_four_and_of_five_levels() {
    let mut m = guest(Policy::Linear, Options::default());
    m.entry(0x13000, 0, 0x20_0000 | RW);
    m.entry(0x10000, 1, 0x10000 | RW);
    for _ in 0..2 {
        assert!(m.set_state(long_mode(0x10000)));
        assert_eq!(m.access(Gva(0), write(User)), Outcome::Memory(Gpa(0x20_0000)));
        assert!(m.set_state(mmu::PagingState::default()));
        assert!(m.set_state(five_levels(0x10000)));
        assert_eq!(m.access(Gva(1 << 48), write(User)), Outcome::Memory(Gpa(0x20_0000)));
        assert_eq!(
            m.access(Gva(0), write(User)),
            Outcome::Fault(mmu::PageFault { gva: Gva(0), code: PfCode::WRITE | PfCode::USER })
        );
    }
}

/// R11 (69397c92de77): the guest frees its tables, from the bottom up or from the top down; nothing stays behind.
#[test]
fn pages_of_freed_tables_are_freed() {
    for bottom_up in [true, false] {
        let mut m = running(Policy::Linear, Options { flood_zap: false, ..Options::default() });
        m.entry(0x13000, 0, 0x20_0000 | RW);
        let before = m.mmu.shadow_pages();
        m.access(Gva(0), write(User));
        assert_eq!(m.mmu.shadow_pages(), before + 3);
        let mut tables = [0x13000, 0x12000, 0x11000, 0x10000];
        if !bottom_up {
            tables.reverse();
        }
        for table in tables {
            m.entry(table, 0, 0);
        }
        m.flush_all();
        assert_eq!(m.mmu.shadow_pages(), before);
        for gfn in [0x11, 0x12, 0x13] {
            let Slot::Ram(frame) = m.memory.slot(Gfn(gfn)) else { panic!() };
            assert!(!m.memory.host().marks(frame).contains(FrameMark::TABLE));
        }
        let writes = m.faults[4];
        m.store(Gpa(0x13100), &[1; 8]);
        m.store(Gpa(0x13200), &[1; 8]);
        assert_eq!(m.faults[4], writes, "a frame that is no table any more is written freely");
    }
}

/// R12 (b28cb0c): a pool that cannot be made larger by reclaim says so instead of looking for ever.
#[test]
fn a_pool_without_room_is_an_error() {
    let mut m = Machine::with_pool(regions(), Policy::Linear, Options::default(), 5);
    // CPU 1 with paging off has taken some already; four levels do not fit beside it.
    m.dma(Gpa(0x10000), &(0x11000 | RW).to_le_bytes());
    m.dma(Gpa(0x11000), &(0x12000 | RW).to_le_bytes());
    m.dma(Gpa(0x12000), &(0x13000 | RW).to_le_bytes());
    m.dma(Gpa(0x13000), &(0x20_0000 | RW).to_le_bytes());
    assert!(m.set_state(long_mode(0x10000)));
    let fault = mmu::Fault { gva: Gva(0), access: read(User), kind: mmu::FaultKind::Page(PfCode::USER) };
    let state = m.state();
    for _ in 0..3 {
        // Two roots are pinned (and one more is spared): three pages remain, and three are needed.
        let answer = m.mmu.fault(m.cpus[0].id, &fault, &state);
        m.audit();
        match answer {
            Ok(mmu::Resolution::Fixed(_) | mmu::Resolution::Spurious) => return,
            Ok(other) => panic!("{other:?}"),
            Err(error) => assert!(error.to_string().contains("table"), "{error}"),
        }
    }
}

/// R13 (XSA-173): frame numbers wider than memory, by PSE-36 and by 52-bit entries, are never cut short.
#[test]
fn wide_frame_numbers_stay_whole() {
    let mut m = Machine::audited(Policy::Linear);
    m.entry4(0x10000, 1, (3 << 13) | (RW | PS) as u32);
    let state = mmu::PagingState { phys_bits: 40, ..legacy(0x10000) };
    assert!(m.set_state(state));
    for _ in 0..2 {
        assert_eq!(m.access(Gva(0x40_1234), write(User)), Outcome::Device(Gpa(3 << 32 | 0x1234)));
        assert_eq!(m.access(Gva(0x60_1234), write(User)), Outcome::Device(Gpa(3 << 32 | 0x20_1234)));
    }
    let top = (1 << 52) - 0x1000;
    m.entry(0x18000, 0, 0x19000 | RW);
    m.entry(0x19000, 0, 0x1a000 | RW);
    m.entry(0x1a000, 0, 0x1b000 | RW);
    m.entry(0x1b000, 0, top | RW);
    m.entry(0x1b000, 1, 1 << 51 | 0x20_0000 | RW);
    assert!(m.set_state(mmu::PagingState { phys_bits: 52, ..long_mode(0x18000) }));
    for _ in 0..2 {
        assert_eq!(m.access(Gva(0x10), write(User)), Outcome::Device(Gpa(top + 0x10)));
        assert_eq!(m.access(Gva(0x1010), write(User)), Outcome::Device(Gpa(1 << 51 | 0x20_0010)));
    }
    m.memory_changed(Gfn(top >> 12)..Gfn((top >> 12) + 1));
    assert_eq!(m.access(Gva(0x10), write(User)), Outcome::Device(Gpa(top + 0x10)));
}

/// R14 (XSA-427, XSA-438): the dirty log is switched on over large mappings and a full pool; the running root stays.
#[test]
fn the_dirty_log_sees_every_first_write() {
    let mut m = running(Policy::Linear, Options { page_cap: Some(12), ..Options::default() });
    m.entry(0x12000, 1, 0x20_0000 | RW | PS);
    m.entry(0x13000, 7, 0x80_0000 | RW);
    m.access(Gva(0x20_0000), write(User));
    m.access(Gva(0x7000), write(User));
    let all = Gfn(0)..m.memory.end();
    m.memory.dirty().set_active(true);
    m.model.dirty().set_active(true);
    m.memory_changed(all.clone());
    for round in 0..3 {
        for page in [0, 1, 511] {
            m.access(Gva(0x20_0000 + page * 0x1000), read(User));
        }
        m.access(Gva(0x20_1000), write(User));
        m.access(Gva(0x7000), write(User));
        m.store(Gpa(0x13000), &[0; 8]);
        let logged = m.memory.dirty().collect();
        for gfn in [0x13, 0x201, 0x800] {
            assert!(logged.contains(&Gfn(gfn)), "round {round}: frame {gfn:#x} is not in {logged:?}");
        }
        for gfn in [0x200, 0x3ff] {
            assert!(!logged.contains(&Gfn(gfn)), "round {round}: frame {gfn:#x} was only read");
        }
        m.memory_changed(all.clone());
    }
    assert!(m.count(Counter::DirtyLogFaults) >= 6);
    m.memory.dirty().set_active(false);
    m.memory_changed(all);
    let large = m.count(Counter::ShadowLargeFilled);
    m.access(Gva(0x20_0000), write(User));
    assert_eq!(m.count(Counter::ShadowLargeFilled), large + 1, "large again once the log is off");
}

/// R15 (XTF): no flags in PDPTEs, none below a large page's own entry, no flags where the access is denied.
#[test]
fn flags_are_set_where_hardware_sets_them_and_nowhere_else() {
    let mut m = Machine::audited(Policy::Scatter { seed: 4 });
    m.entry(0x14020, 0, 0x15000 | P);
    m.entry(0x15000, 0, 0x20_0000 | RW | PS);
    m.entry(0x15000, 1, 0x16000 | RW);
    m.entry(0x16000, 0, 0x20_0000 | P | W);
    assert!(m.set_state(pae(0x14020)));
    m.access(Gva(0x1000), write(User));
    m.access(Gva(0x20_0000), write(User));
    assert_eq!(m.peek(0x14020), 0x15000 | P);
    assert_eq!(m.peek(0x15000), 0x20_0000 | RW | PS | A | D);
    assert_eq!(m.peek(0x15008), 0x16000 | RW | A);
    assert_eq!(m.peek(0x16000), 0x20_0000 | P | W, "denied: the leaf is not touched");
    // PDPTEs are registers: memory may change, the registers do not.
    m.entry(0x14020, 0, 0);
    assert_eq!(m.access(Gva(0x1000), read(User)), Outcome::Memory(Gpa(0x20_1000)));
    assert!(m.load_cr3(0x14020, false));
    assert!(matches!(m.access(Gva(0x1000), read(User)), Outcome::Fault(_)));
    // Bits of PDPTEs that are ignored do not make other pages.
    let pages = m.mmu.shadow_pages();
    m.entry(0x14020, 0, 0x15000 | P | 0xe00);
    assert!(m.load_cr3(0x14020, false));
    m.access(Gva(0x1000), read(User));
    assert!(m.mmu.shadow_pages() <= pages + 1);
}

/// R16 (hypocaust #1): the frame of a top table gets a new life as data, and then as a top table again.
#[test]
fn a_root_frame_that_is_reused_is_never_stale() {
    let mut m = running(Policy::Linear, Options::default());
    m.entry(0x13000, 0, 0x20_0000 | RW);
    m.access(Gva(0), write(User));
    m.entry(0x18000, 0, 0x11000 | RW);
    assert!(m.load_cr3(0x18000, false));
    m.access(Gva(0), read(User));
    for i in 0..512 {
        m.store(Gpa(0x10000 + i * 8), &0xdead_0000u64.to_le_bytes());
    }
    let gone = m.count(Counter::ShadowFloodZaps) + m.count(Counter::ShadowRootsDead);
    assert!(gone > 0, "a root written all over is no root");
    m.entry(0x10000, 0, 0x19000 | RW);
    m.entry(0x19000, 0, 0x12000 | RW);
    m.entry(0x13000, 0, 0x30_0000 | RW);
    assert!(m.load_cr3(0x10000, false));
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Memory(Gpa(0x30_0000)));
    assert!(m.load_cr3(0x18000, false));
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Memory(Gpa(0x30_0000)));
}

/// R17 (virt-pvm #13): after INVLPG every root agrees, not only the current one.
#[test]
fn invlpg_leaves_all_roots_right() {
    let mut m = running(Policy::Scatter { seed: 6 }, Options::default());
    m.entry(0x18000, 0, 0x11000 | RW);
    m.entry(0x13000, 0, 0x20_0000 | RW | G);
    m.access(Gva(0), write(User));
    assert!(m.load_cr3(0x18000, false));
    m.access(Gva(0), write(User));
    m.entry(0x13000, 0, 0x30_0000 | P | U | G);
    assert_eq!(m.invlpg(Gva(0)), TlbFlush::Page(Gva(0)));
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Memory(Gpa(0x30_0000)));
    assert!(m.load_cr3(0x10000, false));
    assert!(matches!(m.access(Gva(0), write(User)), Outcome::Fault(_)));
}

/// R18 (QEMU): INVLPG anywhere in a large page that is splintered forgets all of its pieces.
#[test]
fn invlpg_reaches_every_piece_of_a_large_page() {
    for policy in [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 7 }] {
        for size in [PageSizes::TwoMib, PageSizes::FourMib, PageSizes::OneGib] {
            let mut m = guest(policy, Options::default());
            let span = match size {
                PageSizes::TwoMib => {
                    m.entry(0x12000, 1, 0x20_0000 | RW | PS | G);
                    m.entry(0x12000, 2, 0x14000 | RW);
                    assert!(m.set_state(long_mode(0x10000)));
                    0x20_0000..0x40_0000
                }
                PageSizes::FourMib => {
                    m.entry4(0x15000, 1, 0x80_0000 | (RW | PS | G) as u32);
                    assert!(m.set_state(legacy(0x15000)));
                    0x40_0000..0x80_0000
                }
                PageSizes::OneGib => {
                    m.entry(0x11000, 1, RW | PS | G);
                    assert!(m.set_state(long_mode(0x10000)));
                    1 << 30..(1 << 30) + 0x60_0000
                }
            };
            let pieces = [span.start, span.start + 0x7000, (span.start + span.end) / 2, span.end - 0x1000];
            for &gva in &pieces {
                m.access(Gva(gva), write(User));
            }
            // The guest takes the page away and says so once, for an address in the middle.
            match size {
                PageSizes::TwoMib => m.entry(0x12000, 1, 0),
                PageSizes::FourMib => m.entry4(0x15000, 1, 0),
                PageSizes::OneGib => m.entry(0x11000, 1, 0),
            }
            let _applied = m.invlpg(Gva(span.start + 0x3000));
            for &gva in &pieces {
                assert!(
                    matches!(m.access(Gva(gva), read(User)), Outcome::Fault(_)),
                    "{policy:?} at {gva:#x}"
                );
            }
        }
    }
}

#[derive(Clone, Copy)]
enum PageSizes {
    TwoMib,
    FourMib,
    OneGib,
}

/// R19: a change that the guest does not flush may show late, but what shows is the old or the new entry, never a mix,
/// and a dirty flag once due is never lost.
#[test]
fn without_a_flush_the_old_or_the_new_is_seen() {
    let mut m = running(Policy::Linear, Options::default());
    m.entry(0x13000, 0, 0x20_0000 | RW);
    m.access(Gva(0), write(User));
    // From writable to another page that is read-only, without a flush.
    m.entry(0x13000, 0, 0x30_0000 | P | U);
    let outcome = m.hardware(0, Gva(0), &write(User), &[1]);
    let old = outcome == Outcome::Memory(Gpa(0x20_0000));
    let new = matches!(outcome, Outcome::Fault(_));
    assert!(old || new, "{outcome:?}");
    m.flush_all();
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Memory(Gpa(0x30_0000)));
    // The flag is cleared by the guest and flushed: the next write sets it.
    m.entry(0x13000, 0, 0x20_0000 | RW | A | D);
    m.flush_all();
    m.access(Gva(0), write(User));
    m.entry(0x13000, 0, 0x20_0000 | RW | A);
    let _applied = m.invlpg(Gva(0));
    m.access(Gva(0), write(User));
    assert_eq!(m.peek(0x13000) & D, D);
    m.entry(0x13000, 0, 0x20_0000 | RW);
    let _applied = m.invlpg(Gva(0));
    m.access(Gva(0), read(User));
    assert_eq!(m.peek(0x13000) & (A | D), A);
}

/// A frame becomes a table while the TLB still holds a translation that permits writes to it.
#[test]
fn a_frame_that_becomes_a_table_is_forgotten_by_the_tlb() {
    for policy in [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 11 }] {
        let mut m = running(policy, Options::default());
        m.entry(0x12000, 1, 0x20_0000 | RW | PS);
        m.entry(0x13000, 0, 0x20_5000 | RW);
        m.access(Gva(0), write(User));
        m.access(Gva(0x20_5000), write(User));
        // The mapping goes without a flush, and still counts: the TLB has it.
        m.entry(0x13000, 0, 0);
        m.entry(0x12000, 2, 0x20_5000 | RW);
        m.entry(0x20_5000, 0, 0x30_0000 | RW);
        m.access(Gva(0x40_0000), read(User));
        // Through the large page, and through the mapping that is gone but for the TLB.
        m.access_on(0, Gva(0x20_5000), write(User), &(0x31_0000 | RW).to_le_bytes());
        let _applied = m.invlpg(Gva(0x40_0000));
        assert_eq!(m.access(Gva(0x40_0000), read(User)), Outcome::Memory(Gpa(0x31_0000)), "{policy:?}");
        let stale = m.hardware(0, Gva(0), &write(User), &(0x32_0000u64 | RW).to_le_bytes());
        if stale == Outcome::Memory(Gpa(0x20_5000)) {
            m.model.write(Gpa(0x20_5000), &(0x32_0000u64 | RW).to_le_bytes()).unwrap();
        }
        let _applied = m.invlpg(Gva(0x40_0000));
        m.access(Gva(0x40_0000), read(User));
    }
}

/// A table that maps itself: the classical recursive mapping, written through itself at every level.
#[test]
fn a_recursive_mapping_is_written_through_itself() {
    let mut m = running(Policy::Linear, Options::default());
    m.entry(0x10000, 510, 0x10000 | RW);
    m.entry(0x13000, 3, 0x20_3000 | RW);
    assert_eq!(m.access(Gva(0x3000), write(User)), Outcome::Memory(Gpa(0x20_3000)));
    let slot = |a: u64, b: u64, c: u64, d: u64, i: u64| {
        Gva(((a << 39 | b << 30 | c << 21 | d << 12 | (i * 8)) << 16) as i64 as u64 >> 16 | 0xffff << 48)
    };
    // The level-1 table through the recursive slot, then the others.
    m.access_on(0, slot(510, 0, 0, 0, 3), write(User), &(0x20_4000 | RW).to_le_bytes());
    let _applied = m.invlpg(Gva(0x3000));
    assert_eq!(m.access(Gva(0x3000), write(User)), Outcome::Memory(Gpa(0x20_4000)));
    m.access_on(0, slot(510, 510, 0, 0, 1), write(User), &(0x20_0000 | RW | PS).to_le_bytes());
    m.access(Gva(0x20_3000), write(User));
    m.access_on(0, slot(510, 510, 510, 510, 1), write(User), &(0x11000 | RW).to_le_bytes());
    assert_eq!(m.access(Gva(1 << 39 | 0x3000), read(User)), Outcome::Memory(Gpa(0x20_4000)));
    m.access_on(0, slot(510, 510, 510, 510, 510), write(User), &0u64.to_le_bytes());
    m.flush_all();
    assert!(matches!(m.access(slot(510, 510, 510, 510, 1), read(User)), Outcome::Fault(_)));
    m.compare(0..0x300);
}

/// Tables where no memory is read as all ones, which 32-bit paging without PSE finds well formed.
#[test]
fn tables_outside_memory_are_walked() {
    let mut m = Machine::audited(Policy::Linear);
    let state = mmu::PagingState { cr4: 0, ..legacy(MMIO_BASE) };
    assert!(m.set_state(state));
    for access in [read(User), write(User), fetch(Supervisor)] {
        assert_eq!(m.access(Gva(0x1234_5678), access), Outcome::Device(Gpa(0xffff_f678)));
    }
    // The host puts memory there: an empty table.
    m.change_slot(Gfn(MMIO_BASE >> 12), SlotKind::Fresh);
    assert!(matches!(m.access(Gva(0x1234_5678), read(User)), Outcome::Fault(_)));
    m.entry4(MMIO_BASE, 0x48, 0x11000 | RW as u32);
    m.entry4(0x11000, 0x345, 0x20_0000 | RW as u32);
    assert_eq!(m.access(Gva(0x1234_5678), write(User)), Outcome::Memory(Gpa(0x20_0678)));
    // CR3 past the end of memory, in long mode: malformed.
    assert!(m.set_state(long_mode(1 << 45)));
    assert_eq!(code(m.access(Gva(0), read(User))), PfCode::PRESENT | PfCode::USER | PfCode::RESERVED);
}

/// Tables in read-only memory: flags that cannot be set are lost, and writes to them go to the devices.
#[test]
fn tables_in_read_only_memory_lose_their_flags() {
    let mut m = running(Policy::Demand, Options::default());
    let table = (0..512).flat_map(|i| ((0x20_0000 + i * 0x1000) | RW).to_le_bytes()).collect::<Vec<u8>>();
    m.dma(Gpa(ROM_BASE), &table);
    m.entry(0x12000, 1, ROM_BASE | RW);
    m.entry(0x12000, 2, ROM_BASE | RW | PS);
    for _ in 0..2 {
        assert_eq!(m.access(Gva(0x20_3000), write(User)), Outcome::Memory(Gpa(0x20_3000)));
        assert_eq!(m.access(Gva(0x40_0000), write(User)), Outcome::Device(Gpa(ROM_BASE)));
        assert_eq!(m.access(Gva(0x40_0000), read(User)), Outcome::Memory(Gpa(ROM_BASE)));
    }
    // A loader may still change it.
    m.dma(Gpa(ROM_BASE + 3 * 8), &(0x30_0000 | RW).to_le_bytes());
    m.flush_all();
    assert_eq!(m.access(Gva(0x20_3000), write(User)), Outcome::Memory(Gpa(0x30_0000)));
}

/// A table in read-only memory loses its flags, and its entries are filled as if they were set. When it becomes writable,
/// in the same frame and while the dirty log is on, they have to be set after all.
#[test]
fn flags_are_set_when_a_read_only_table_becomes_writable() {
    let mut m = running(Policy::Linear, Options::default());
    let memory = |m: &Machine| [m.memory.slot(Gfn(0x13)), m.model.slot(Gfn(0x13))];
    let change = |m: &mut Machine, to: fn(guestmem::Hfn) -> Slot| {
        for (slot, of) in memory(m).into_iter().zip([&*m.memory, &m.model]) {
            let (Slot::Ram(frame) | Slot::Rom(frame)) = slot else { panic!("{slot:?}") };
            of.set_slot(Gfn(0x13), to(frame));
        }
        m.memory_changed(Gfn(0x13)..Gfn(0x14));
    };
    m.entry(0x13000, 0, 0x20_0000 | RW);
    change(&mut m, Slot::Rom);
    m.memory.dirty().set_active(true);
    m.model.dirty().set_active(true);
    m.memory_changed(Gfn(0)..m.memory.end());
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Memory(Gpa(0x20_0000)));
    change(&mut m, Slot::Ram);
    m.audit();
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Memory(Gpa(0x20_0000)));
    m.compare(0x10..0x14);
}

/// One frame read as a table of 4-byte and of 8-byte entries: a flag that one walk sets is an address bit to the other.
#[test]
fn flags_of_one_format_are_address_bits_of_another() {
    let mut m = Machine::audited(Policy::Linear);
    // As 8-byte entries: entry 0 maps 0x200000. As 4-byte entries: entry 1 is its upper half.
    m.entry(0x14000, 0, 0x15000 | P);
    m.entry(0x15000, 0, 0x16000 | RW);
    m.entry(0x16000, 0, 0x20_0000 | RW | A | D);
    assert!(m.set_state(pae(0x14000)));
    assert_eq!(m.access(Gva(0), write(User)), Outcome::Memory(Gpa(0x20_0000)));
    // The upper half becomes a present 4-byte entry, and so bit 32 of the 8-byte entry's address.
    m.dma(Gpa(0x16004), &1u32.to_le_bytes());
    m.flush_all();
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Device(Gpa(1 << 32 | 0x20_0000)));
    m.entry4(0x17000, 0, 0x16000 | RW as u32);
    assert!(m.set_state(legacy(0x17000)));
    assert_eq!(m.access(Gva(0x1000), read(Supervisor)), Outcome::Memory(Gpa(0)));
    assert_eq!(m.peek(0x16000) >> 32, 1 | A, "the walk of 4-byte entries set a flag");
    assert!(m.set_state(pae(0x14000)));
    assert_eq!(m.access(Gva(0), read(User)), Outcome::Device(Gpa((1 | A) << 32 | 0x20_0000)));
}

/// Guests of every mode, and with paging off, share what the engine builds; none of it leaks into another.
#[test]
fn a_gigabyte_page_is_one_entry_where_it_can_be() {
    let regions = vec![RegionConfig { base: Gpa(0), len: 3 << 30, kind: RegionKind::Ram }];
    let options = Options { audit_every_event: true, ..Options::default() };
    let mut m = Machine::with_regions(regions, Policy::Linear, options);
    m.entry(0x10000, 0, 0x11000 | RW);
    m.entry(0x11000, 1, 1 << 30 | RW | PS);
    m.entry(0x11000, 2, RW | PS);
    assert!(m.set_state(long_mode(0x10000)));
    let large = m.count(Counter::ShadowLargeFilled);
    m.access(Gva(1 << 30), write(User));
    m.access(Gva((1 << 30) + 0x3fff_f000), write(User));
    assert_eq!(m.count(Counter::ShadowLargeFilled), large + 1);
    // The first gigabyte holds the tables: only the blocks without are large.
    m.access(Gva(2 << 30 | 0x1_2345_6000 & 0x3fff_ffff), write(User));
    m.access(Gva(2 << 30 | 0x10000), read(User));
    // A frame in the middle of the large gigabyte becomes a table.
    m.entry(1 << 30 | 0x1234_5000, 0, 0x20_0000 | RW);
    m.entry(0x11000, 3, 1 << 30 | 0x1234_5000 | RW);
    m.access(Gva(3 << 30), read(User));
    m.access(Gva((1 << 30) + 0x5000), write(User));
    m.access_on(0, Gva((1 << 30) + 0x1234_5000), write(User), &(0x20_0000 | RW | PS).to_le_bytes());
    let _applied = m.invlpg(Gva(3 << 30));
    m.access(Gva(3 << 30), write(User));
}

/// INVPCID of each type asks for the flush that the manual names.
#[test]
fn invpcid_flushes_what_its_type_says() {
    let mut m = running(Policy::Linear, Options::default());
    let s = m.state();
    assert!(m.set_state(mmu::PagingState { cr4: s.cr4 | CR4_PCIDE, ..s }));
    let gva = Gva(0x5000);
    assert_eq!(m.invpcid(InvpcidKind::Address, 3, gva), TlbFlush::PageOf(3, gva));
    assert_eq!(m.invpcid(InvpcidKind::SingleContext, 3, gva), TlbFlush::Pcid(3));
    assert_eq!(m.invpcid(InvpcidKind::AllNonGlobal, 3, gva), TlbFlush::NonGlobal);
    assert_eq!(m.invpcid(InvpcidKind::AllIncludingGlobal, 3, gva), TlbFlush::All);
    // The same PCID with another CR3, kept: stale by the guest's own choice, until it asks.
    m.entry(0x13000, 0, 0x20_0000 | RW);
    m.entry(0x18000, 0, 0x11000 | RW);
    assert!(m.load_cr3(0x10001, false));
    m.access(Gva(0), write(User));
    assert!(m.load_cr3(0x18001, true));
    m.access(Gva(0), write(User));
    assert_eq!(m.state().mode(), PagingMode::Level4);
}
