//! Tasks that share the x87 and SSE registers: a switch only sets CR0.TS, and #NM brings the registers of the task that needs them.

use core::arch::global_asm;
use rt::{
    check, cpu, descriptors,
    global::Global,
    mem,
    paging::Space,
    same, say,
    trap::{self, Frame, TS_AT_EXIT},
    user,
};

const TASKS: usize = 4;
const ROUNDS: u64 = 200;
const YIELD: u8 = 0x31;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Area([u8; 512]);

/// Saved registers of each task, its frame, who runs and whose registers are loaded; how often #NM came.
static AREAS: Global<[Area; TASKS]> = Global::new([Area([0; 512]); TASKS]);
static FRAMES: Global<[Option<Frame>; TASKS]> = Global::new([None; TASKS]);
static CURRENT: Global<u64> = Global::new(0);
static OWNER: Global<u64> = Global::new(0);
static LOADS: Global<u64> = Global::new(0);
static RESULTS: Global<[u64; TASKS]> = Global::new([0; TASKS]);

global_asm!(
    r#"
    .section .text.lazy, "ax"
    .globl lazy_nm
lazy_nm:
    push rax
    push rcx
    clts
    mov rax, [{current}]
    mov rcx, [{owner}]
    cmp rax, rcx
    je 2f
    shl rcx, 9
    fxsave64 [{areas} + rcx]
    mov [{owner}], rax
    shl rax, 9
    fxrstor64 [{areas} + rax]
    inc qword ptr [{loads}]
2:  pop rcx
    pop rax
    iretq

    .section .user.lazy, "ax"
    .globl lazy_task, lazy_idle
    // R15: the task's number, RBX: rounds.
lazy_task:
    movq xmm8, r15
    movq xmm0, r15
    pshufd xmm15, xmm8, 0x44
    movdqa xmm7, xmm15
    push r15
    fild qword ptr [rsp]
    fild qword ptr [rsp]
2:  paddq xmm0, xmm8
    paddq xmm7, xmm15
    paddq xmm7, xmm15
    fadd st, st(1)
    int 0x31
    dec rbx
    jnz 2b
    fistp qword ptr [rsp]
    pop rcx
    movq rax, xmm0
    movq rdx, xmm7
    shl rdx, 20
    shl rcx, 40
    add rax, rdx
    add rax, rcx
    int 0x31
    ud2
lazy_idle:
    int 0x31
    dec rbx
    jnz lazy_idle
    mov rax, r15
    int 0x31
    ud2
    .text
"#,
    current = sym CURRENT,
    owner = sym OWNER,
    areas = sym AREAS,
    loads = sym LOADS,
);

unsafe extern "C" {
    fn lazy_nm();
    fn lazy_task();
    fn lazy_idle();
}

/// The scheduler: saves the frame of the task that gives way and installs the next one's; false when none is left.
fn on_yield(frame: &mut Frame) -> bool {
    let me = CURRENT.load() as usize;
    let frames = FRAMES.get();
    if frame.rbx == 0 && frame.rax != 0 {
        RESULTS.get()[me] = frame.rax;
        frames[me] = None;
    } else {
        frames[me] = Some(*frame);
    }
    let next = (1..=TASKS).map(|i| (me + i) % TASKS).find(|t| frames[*t].is_some());
    match next.and_then(|t| frames[t].map(|f| (t, f))) {
        Some((task, saved)) => {
            *frame = saved;
            CURRENT.store(task as u64);
            TS_AT_EXIT.store(if task as u64 == OWNER.load() { 0 } else { cpu::CR0_TS });
            true
        }
        None => {
            TS_AT_EXIT.store(0);
            false
        }
    }
}

pub fn run() {
    let space = Space::new();
    user::map(space);
    space.load();
    descriptors::reset_gate(YIELD);
    descriptors::set_gate(7, mem::code(lazy_nm), 0, 0);
    trap::on(YIELD, Some(on_yield));
    // A clean image for each task.
    for area in AREAS.get().iter_mut() {
        let at = area.0.as_mut_ptr();
        // SAFETY: 512 bytes, aligned.
        unsafe { core::arch::asm!("fninit", "fxsave64 [{}]", in(reg) at) };
    }
    for n in 0..TASKS {
        // The third never touches the registers, so it never brings #NM.
        let mut frame = user::frame(user::address(if n == 2 { lazy_idle } else { lazy_task }));
        frame.rsp = user::STACK_TOP - 8 - n as u64 * 4096;
        (frame.r15, frame.rbx) = (n as u64 + 3, ROUNDS);
        FRAMES.get()[n] = Some(frame);
    }
    let Some(first) = FRAMES.get()[0] else { return };
    // Nobody's registers are loaded: the last task's area takes what is in them now and is loaded when it runs.
    OWNER.store(2);
    CURRENT.store(0);
    cpu::change_cr0(cpu::CR0_TS, 0);
    let end = user::run(&first);
    cpu::change_cr0(0, cpu::CR0_TS);
    trap::on(YIELD, None);
    descriptors::reset_gate(7);
    same!(end.vector(), u64::from(YIELD), "the last task's end");
    for n in 0..TASKS as u64 {
        let k = n + 3;
        let want = if n == 2 {
            k
        } else {
            k * (ROUNDS + 1) + (k * (2 * ROUNDS + 1) << 20) + (k * (ROUNDS + 1) << 40)
        };
        same!(RESULTS.get()[n as usize], want, "result of task {n}");
    }
    // Three tasks in turn: one load for each of their turns, of which the last one's end needs none of its own.
    let loads = LOADS.load();
    check!((3 * ROUNDS..=3 * ROUNDS + 3).contains(&loads), "{loads} loads");
    say!("lazy switching: {TASKS} tasks, {ROUNDS} rounds, {loads} loads");
}
