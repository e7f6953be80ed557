//! Programs under which the backends once differed, each written out.

use crate::case::Case;
use crate::layout::{CODE, DATA, GDT, Mode, Paging, STACKS, TSS};
use crate::stepped::{final_states, run_both};
use crate::{LONG, legacy};
use vcpu::ArchState;
use vcpu::state::seg;

/// A case without chance: no handlers but those that return, and every page mapped where it lies, under both roots.
fn case(mode: Mode, code: &[u8]) -> Case {
    let mut patches = Vec::new();
    for leaf in mode.leaves() {
        for page in 0..64u32 {
            patches.push(entry(&mode, leaf, page, page, 0x67));
        }
    }
    Case { pieces: vec![code.to_vec()], patches, steps: 12, ..Case::plain(mode) }
}

fn entry(mode: &Mode, leaf: u32, page: u32, frame: u32, flags: u32) -> (u32, Vec<u8>) {
    let size = mode.entry_size();
    let value = u64::from(frame << 12 | flags).to_le_bytes();
    (leaf + page * size, value[..size as usize].to_vec())
}

/// Runs the case, which both must take alike, and gives the state at its end.
fn run(case: &Case) -> ArchState {
    run_both(case).unwrap_or_else(|failure| panic!("{failure}\n{case}"));
    let [shadow, ept] = final_states(case);
    assert_eq!(shadow, ept);
    shadow
}

#[test]
fn a_step_over_a_cr3_load_is_delivered_through_the_new_root() {
    // NOP and MOV CR3, RAX under TF. The first step brings all that a delivery needs into the tables of the old root.
    let mut case = case(LONG, &[0x90, 0x0f, 0x22, 0xd8, 0x90]);
    let root = u64::from(LONG.roots()[1]);
    case.gprs[0] = root;
    case.rflags = 0x102;
    // Under the new root the stack is elsewhere.
    let stack = STACKS[0] >> 12;
    case.patches.push(entry(&LONG, LONG.leaves()[1], stack, DATA >> 12, 0x67));
    // The steps of NOP and of the handler's IRET come first.
    case.steps = 3;
    let state = run(&case);
    assert_eq!((state.cr3, state.rip), (root, u64::from(CODE) + 4));
    assert_eq!(state.pending.event.map(|event| event.vector), Some(1), "the step waits for the new root");
    case.steps = 8;
    run(&case);
}

/// A case that jumps to the TSS of selector 0x50, whose task has another root, and its TSS in words.
fn switching(mode: Mode, words: &[(u32, u32)]) -> Case {
    let mut far = if mode.bits == 16 { vec![0x66, 0xea] } else { vec![0xea] };
    far.extend([0, 0, 0, 0, 0x50, 0]);
    let mut case = case(mode, &far);
    let mut put =
        |offset: u32, value: u32| case.patches.push((TSS[1] + offset, value.to_le_bytes().to_vec()));
    put(28, mode.roots()[1]);
    put(32, CODE + 0x40);
    put(36, 2);
    put(56, STACKS[0] + 0x800);
    for offset in [72, 80, 84, 88, 92] {
        put(offset, 0x10);
    }
    put(76, 0x08);
    put(96, 0);
    put(100, 0);
    for &(offset, value) in words {
        put(offset, value);
    }
    case.patches.push((CODE + 0x40, vec![0xeb, 0xfe]));
    case
}

const PROTECTED: Mode = Mode { bits: 32, paging: Paging::Bits32, ..LONG };

#[test]
fn a_new_task_is_entered_through_its_own_tables() {
    for mode in [PROTECTED, Mode { paging: Paging::Pae, ..PROTECTED }] {
        let mut case = switching(mode, &[]);
        // Under the new root the GDT has another data segment.
        case.patches.push(entry(&mode, mode.leaves()[1], GDT >> 12, DATA >> 12, 0x67));
        case.patches.push((DATA + 0x08, 0x00cf_9b00_0000_ffffu64.to_le_bytes().to_vec()));
        case.patches.push((DATA + 0x10, 0x00c1_9300_0000_2345u64.to_le_bytes().to_vec()));
        let state = run(&case);
        assert_eq!((state.rip, state.cr3), (u64::from(CODE) + 0x40, u64::from(mode.roots()[1])));
        assert_eq!(state.segments[seg::DS].limit, 0x1234_5fff);
    }
}

#[test]
fn a_task_that_cannot_be_entered_faults_with_its_own_eip() {
    // Its stack segment is code: #TS, delivered on the stack that cannot be had either, and so through a double fault.
    let mut case = switching(PROTECTED, &[(80, 0x08)]);
    case.steps = 2;
    let state = run(&case);
    let event = state.pending.event.expect("a fault waits");
    assert_eq!((event.vector, event.code), (10, Some(0x08)));
    assert_eq!((state.rip, state.pending.arrival), (u64::from(CODE) + 0x40, None));
}

#[test]
fn a_page_fault_on_the_way_to_the_ldt_of_a_task_stays_one() {
    let mut case = switching(PROTECTED, &[(96, 0x88)]);
    case.patches.push(entry(&PROTECTED, PROTECTED.leaves()[1], GDT >> 12, 0, 0));
    case.steps = 2;
    let state = run(&case);
    assert_eq!(state.pending.event.map(|event| event.vector), Some(14));
    assert_eq!(state.cr2, u64::from(GDT) + 0x88);
}

#[test]
fn a_user_task_switch_in_16_bit_pae_code_after_a_store_to_the_pdpt() {
    let [_, _, _, mode] = legacy(Paging::Pae);
    let mut case = switching(mode, &[(76, 0x1b), (80, 0x23), (72, 0x23), (84, 0x23), (88, 0x23), (92, 0x23)]);
    // ADD [EDX], AL
    case.pieces.insert(0, vec![0x67, 0x00, 0x02]);
    case.gprs[2] = u64::from(mode.offset(mode.roots()[0]) + 0x1f);
    let state = run(&case);
    assert_eq!((state.rip, state.tr.selector), (u64::from(CODE) + 0x40, 0x50));
    assert_eq!(state.cr0 >> 3 & 1, 1, "CR0.TS");
}

#[test]
fn a_task_with_virtual_8086_mode_and_an_eip_beyond_its_limit_faults_on_arrival() {
    let mut case = switching(PROTECTED, &[(36, 0x2_0002), (32, 0x1_0020)]);
    case.steps = 2;
    let state = run(&case);
    assert_eq!(state.pending.event.map(|event| event.vector), Some(13));
    assert_eq!(state.rip, 0x1_0020);
}

#[test]
fn a_task_gate_delivers_its_error_code_on_the_stack_of_the_task() {
    // #GP through a task gate; the new stack is mapped elsewhere by the old root.
    let mut case = switching(PROTECTED, &[]);
    case.pieces = vec![vec![0x0f, 0x30]];
    case.gprs[1] = 0xdead;
    case.patches.push((GDT - 0x2000 + 0x3000 + 13 * 8, 0x0000_e500_0050_0000u64.to_le_bytes().to_vec()));
    case.patches.push(entry(&PROTECTED, PROTECTED.leaves()[0], STACKS[0] >> 12, 0, 0));
    let state = run(&case);
    assert_eq!((state.rip, state.gprs[4]), (u64::from(CODE) + 0x40, u64::from(STACKS[0]) + 0x7fc));
    assert_eq!(state.rflags >> 14 & 1, 1, "NT");
}

#[test]
fn cmpxchg16b_on_the_entry_that_maps_itself_is_one_store() {
    // LOCK CMPXCHG16B on the first entries of the page-directory-pointer table, which then map nothing, with a breakpoint
    // that keeps translations out of the TLB.
    let [table, directory] = LONG.middle();
    let mut code = vec![0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25];
    code.extend(table.to_le_bytes());
    let mut set = vec![0xb8, 0x00, 0x7f, 0x01, 0x00, 0x0f, 0x23, 0xc0, 0xb8];
    set.extend(0x1_0402u32.to_le_bytes());
    set.extend([0x0f, 0x23, 0xf8]);
    let mut case = case(LONG, &code);
    case.patches.push((table + 8, vec![0; 8]));
    // What is compared with is what is there, flags of the directory's own use included.
    (case.gprs[0], case.gprs[2]) = (u64::from(directory) | 0x27, 0);
    (case.gprs[3], case.gprs[1]) = (0x1_7000, 0x55);
    case.patches.push((table, (u64::from(directory) | 0x27).to_le_bytes().to_vec()));
    // RAX is needed for the debug registers first.
    let rax = case.gprs[0] as u32;
    set.push(0xb8);
    set.extend(rax.to_le_bytes());
    case.pieces.insert(0, set);
    case.steps = 7;
    run(&case);
}
