//! Where the walker reads: the engine's tables and the guest's, with what is not there.

use guestmem::{
    FrameMark, Gfn, Gpa, GuestMemory, Gva, HostMemory, Hpa, MemoryConfig, Policy, RegionConfig, RegionKind,
    Slot,
};
use mmu::paging::bits::{CR0_PE, CR0_PG, CR4_PAE, CR4_PSE, EFER_LMA, EFER_LME};
use mmu::walk::{GuestTables, HostTables, walk_guest};
use mmu::{Access, AccessKind, PagingState, Privilege, TableMemory};

const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);

fn guest(policy: Policy) -> GuestMemory {
    let region = |base, len, kind| RegionConfig { base: Gpa(base), len, kind };
    let regions = vec![region(0, 0x8000, RegionKind::Ram), region(0x9000, 0x4000, RegionKind::Rom)];
    GuestMemory::new(&MemoryConfig { regions, policy, table_frames: 4 }).unwrap()
}

fn long_mode(cr3: u64) -> PagingState {
    let efer = EFER_LME | EFER_LMA;
    PagingState { cr0: CR0_PE | CR0_PG, cr3, cr4: CR4_PAE, efer, ..PagingState::default() }
}

fn get(memory: &GuestMemory, gpa: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(Gpa(gpa), &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn host_tables_outside_memory_read_all_ones() {
    let host = HostMemory::new(1).unwrap();
    let mut tables = HostTables::new(&host);
    assert_eq!(tables.load(0x1000, 8), Ok(u64::MAX));
    assert_eq!(tables.load(0xff8, 8), Ok(0));
    assert_eq!(tables.load(!7, 8), Ok(u64::MAX));
    assert_eq!(tables.compare_exchange(0x1000, 8, u64::MAX, 1), Ok(true), "and swallow flags");
    assert_eq!(tables.compare_exchange(0xff8, 8, 0, 5), Ok(true));
    assert_eq!(tables.compare_exchange(0xff8, 8, 0, 6), Ok(false));
    assert_eq!((host.read_u64(Hpa(0xff8)), tables.references), (Some(5), 3));
}

#[test]
fn guest_tables_are_found_wherever_their_frames_are() {
    for policy in [Policy::Linear, Policy::Demand, Policy::Scatter { seed: 8 }] {
        let memory = guest(policy);
        for (table, next) in [(0x1000u64, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x5003)] {
            memory.write(Gpa(table), &next.to_le_bytes()).unwrap();
        }
        memory.dirty().set_active(true);
        let mut tables = GuestTables::new(&memory);
        let walk = walk_guest(&long_mode(0x1000), Gva(0x18), &READ, &mut tables, true).unwrap();
        assert_eq!(walk.result.unwrap().physical(0x18), 0x5018);
        assert_eq!(tables.references, 4);
        assert_eq!(get(&memory, 0x4000), 0x5023);
        assert_eq!(memory.dirty().collect(), [Gfn(1), Gfn(2), Gfn(3), Gfn(4)], "flags are writes");
    }
}

#[test]
fn flags_set_in_decoded_frames_are_noted() {
    let memory = guest(Policy::Linear);
    for (table, next) in [(0x1000u64, 0x2003u64), (0x2000, 0x83)] {
        memory.write(Gpa(table), &next.to_le_bytes()).unwrap();
    }
    let Slot::Ram(frame) = memory.slot(Gfn(2)) else { panic!() };
    memory.host().mark(frame, FrameMark::CODE);
    walk_guest(&long_mode(0x1000), Gva(0), &READ, &mut GuestTables::new(&memory), true)
        .unwrap()
        .result
        .unwrap();
    assert_eq!(memory.host().take_code_writes(), [(frame.base(), 8)]);
}

#[test]
fn guest_tables_in_rom_keep_no_flags() {
    let memory = guest(Policy::Linear);
    for (table, next) in [(0x9000u64, 0xa003u64), (0xa000, 0xb003), (0xb000, 0xc003), (0xc000, 0x5003)] {
        memory.write(Gpa(table), &next.to_le_bytes()).unwrap();
    }
    memory.dirty().set_active(true);
    let write = Access::new(AccessKind::Write, Privilege::Supervisor);
    let walk = walk_guest(&long_mode(0x9000), Gva(0), &write, &mut GuestTables::new(&memory), true).unwrap();
    assert_eq!(walk.result.unwrap().base, 0x5000);
    assert_eq!(get(&memory, 0xc000), 0x5003);
    assert!(memory.dirty().collect().is_empty());
}

#[test]
fn guest_tables_outside_memory_read_all_ones() {
    let memory = guest(Policy::Linear);
    let code = |state: &PagingState, gva| {
        let mut tables = GuestTables::new(&memory);
        let walk = walk_guest(state, Gva(gva), &READ, &mut tables, true).unwrap();
        (walk.result.map(|t| t.physical(gva)).map_err(|f| f.code.bits()), tables.references)
    };
    // In long mode all ones has reserved bits set, while MAXPHYADDR is below 52 or NXE off.
    assert_eq!(code(&long_mode(0x8000), 0), (Err(0b1001), 1));
    assert_eq!(code(&long_mode(0x3fff_ffff_f000), 0), (Err(0b1001), 1));
    // In 32-bit paging without PSE nothing is reserved: the last page of 4 GiB, through a table that is not there either.
    let legacy = PagingState { cr0: CR0_PE | CR0_PG, cr3: 0x8000, ..PagingState::default() };
    assert_eq!(code(&legacy, 0x12_3456), (Ok(0xffff_f456), 2));
    let pse = PagingState { cr4: CR4_PSE, ..legacy };
    assert_eq!(code(&pse, 0x12_3456), (Err(0b1001), 1), "bit 21 of a large PDE is reserved");
}

#[test]
fn memory_that_runs_out_under_a_walk_is_an_error() {
    let memory = guest(Policy::Demand);
    while memory.allocate_guest_frame(Gfn(0)).is_ok() {}
    let error =
        walk_guest(&long_mode(0x1000), Gva(0), &READ, &mut GuestTables::new(&memory), true).unwrap_err();
    assert!(error.to_string().contains("no host frame is free"), "{error}");
}
