//! Hardware task switches: by a task gate, by CALL and JMP, back by IRET; what is saved, the busy bits, NT and CR0.TS
//! (SDM Vol. 3, 9.3 "Task Switching").

use crate::{DONE, Flat, SLOT, outcome, selector, set};
use core::arch::global_asm;
use rt::{
    check,
    descriptors::{GDT, segment},
    global::Global,
    legacy, mem, same, say,
};

global_asm!(
    r#"
    .section .text.tasks32, "ax"
    .code32
k_int: mov eax, 0x1001
    mov ebx, 0x1002
    int 0x31
    mov edx, cr0
    pushfd
    pop esi
    int 0x30
k_call: mov eax, 0x1001
    mov ebx, 0x1002
    call fword ptr [edi]
    mov edx, cr0
    pushfd
    pop esi
    int 0x30
k_jump: jmp fword ptr [edi]
    mov edx, cr0
    pushfd
    pop esi
    int 0x30
    // The other task: it notes what it was started with, changes things, and returns; once more from behind the IRETD.
k_other: mov ebx, [k_count]
    inc ebx
    mov [k_count], ebx
    mov [k_seen], eax
    mov [k_seen + 4], esp
    pushfd
    pop dword ptr [k_seen + 8]
    mov eax, cr0
    mov [k_seen + 12], eax
    str ecx
    mov [k_seen + 16], ecx
    clts
    add edi, 3
    iretd
    jmp k_other
k_back: // reached by a jump: goes back by a jump to the engine's task
    mov dword ptr [k_seen], 0x4242
    jmp fword ptr [edi]
    .code64
    .section .bss
    .balign 4
k_count: .skip 4
k_seen: .skip 32
    .text
"#
);

unsafe extern "C" {
    fn k_int();
    fn k_call();
    fn k_jump();
    fn k_other();
    fn k_back();
    static k_count: u8;
    static k_seen: u8;
}

static OTHER: Global<[u32; 26]> = Global::new([0; 26]);

const TASK: usize = SLOT + 2;

fn other(all: &Flat, code: unsafe extern "C" fn()) {
    let t = OTHER.get();
    *t = [0; 26];
    t[7] = all.directory as u32;
    t[8] = code as usize as u32;
    (t[9], t[10]) = (0x2, 0x7777);
    t[14] = all.stack as u32 - 2048;
    t[17] = 5;
    (t[18], t[19], t[20], t[21]) = (0x10, 0x30, 0x10, 0x10);
    t[25] = 104 << 16;
    set(TASK, segment(OTHER.addr(), 103, 0x89, 0));
}

fn seen(i: u64) -> u32 {
    mem::read32(&raw const k_seen as u64 + 4 * i)
}

fn busy(slot: usize) -> bool {
    GDT.get()[slot] >> 41 & 1 != 0
}

pub fn run(all: &Flat) {
    let (engine, engine_selector) = legacy::task();
    other(all, k_other);
    mem::write32(&raw const k_count as u64, 0);
    // A task gate at vector 0x31.
    legacy::set_gate(0x31, u64::from(selector(TASK)) << 16 | 0xe500 << 32);
    mem::write32(engine + 28, all.directory as u32);
    for round in 1..=4u32 {
        let end = all.run(all.start(k_int));
        same!(outcome(&end), DONE, "an interrupt by a task gate");
        same!((end.eax, end.ebx), (0x1001, 0x1002), "the registers come back");
        same!(end.edx & 8, 8, "CR0.TS after the switch back");
        same!(end.esi & 0x4000, 0, "NT after the switch back");
        same!(mem::read32(&raw const k_count as u64), round, "how often the task ran");
        same!(seen(0), if round == 1 { 0x7777 } else { seen(0) }, "its EAX");
        same!(seen(2) & 0x4000, 0x4000, "NT in the task");
        same!(seen(3) & 8, 8, "CR0.TS in the task");
        same!(seen(4), selector(TASK), "TR in the task");
        same!(OTHER.get()[0] & 0xffff, engine_selector, "the back link");
        check!(!busy(TASK), "no longer busy");
        same!(OTHER.get()[17], 5 + 3 * round, "its EDI is saved");
        check!(OTHER.get()[9] & 0x4000 == 0, "its saved NT is clear");
    }
    // CALL of a TSS.
    pointer(all, selector(TASK));
    let mut start = all.start(k_call);
    start.edi = all.scratch as u32;
    let end = all.run(start);
    same!((outcome(&end), end.eax, end.edi), (DONE, 0x1001, start.edi), "a call of a task");
    same!(mem::read32(&raw const k_count as u64), 5, "the task ran once more");
    refused(all);
    jumps(all, engine_selector);
    say!("task switches by gate, CALL and JMP");
}

fn pointer(all: &Flat, selector: u32) {
    mem::write32(all.scratch, 0);
    mem::write16(all.scratch + 4, selector as u16);
}

fn refused(all: &Flat) {
    let call = || {
        let mut start = all.start(k_call);
        start.edi = all.scratch as u32;
        outcome(&all.run(start))
    };
    let s = selector(TASK);
    set(TASK, segment(OTHER.addr(), 103, 0x8b, 0));
    same!(call(), (13, s), "a task that is busy");
    set(TASK, segment(OTHER.addr(), 103, 0x09, 0));
    same!(call(), (11, s), "a task that is not present");
    set(TASK, segment(OTHER.addr(), 102, 0x89, 0));
    same!(call(), (10, s), "a TSS that is too short");
    set(TASK, segment(OTHER.addr(), 103, 0x89, 0));
    let mut start = all.user(k_call);
    start.edi = all.scratch as u32;
    same!(outcome(&all.run(start)), (13, s), "a task that CPL 3 may not call");
}

/// There by a jump and back by a jump: no nesting.
fn jumps(all: &Flat, engine: u32) {
    other(all, k_back);
    // The pointer for the way back lies behind the one for the way there.
    mem::write32(all.scratch + 8, 0);
    mem::write16(all.scratch + 12, engine as u16);
    OTHER.get()[17] = all.scratch as u32 + 8;
    pointer(all, selector(TASK));
    let mut start = all.start(k_jump);
    start.edi = all.scratch as u32;
    let end = all.run(start);
    same!(outcome(&end), DONE, "there and back by jumps");
    same!(seen(0), 0x4242, "the other task ran");
    same!((end.edx & 8, end.esi & 0x4000), (8, 0), "CR0.TS is set, NT is not");
    check!(!busy(TASK) && busy(engine as usize / 8), "the busy bits follow");
    // Its state was saved when it jumped away.
    same!(OTHER.get()[17], all.scratch as u32 + 8, "its EDI");
}
