//! Faults in the middle of instructions, at CPL 0 and CPL 3: nothing may have changed when the handler looks, and the
//! instruction must give the right result when it is started again.

use core::arch::asm;
use rt::{
    check, cpu, descriptors, frames, mem,
    paging::{P, Space, U, W},
    same, say,
    trap::{Fault, Frame},
    user,
};

/// Four pages: two that are always there around two that come and go.
const BASE: u64 = 3 << 39;
const MIDDLE: u64 = BASE + 0x2000;

use super::instructions::*;

struct Bench {
    space: Space,
    /// CPL 3 instead of CPL 0.
    user: bool,
    frames: [u64; 4],
}

/// What the two middle pages allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Page {
    Absent,
    ReadOnly,
    Whole,
}

impl Bench {
    fn set(&self, page: usize, state: Page) {
        let va = BASE + page as u64 * 0x1000;
        let flags = match state {
            Page::Absent => 0,
            Page::ReadOnly => P,
            Page::Whole => P | W,
        };
        let user = if self.user { U } else { 0 };
        let slot = self.space.slot(va, 1);
        mem::write64(slot, self.frames[page] | flags | user);
        cpu::invlpg(va);
    }

    fn fill(&self) {
        for (n, frame) in self.frames.iter().enumerate() {
            for i in 0..512 {
                // No word is zero, so that DIV does not overflow; the top bit is set.
                mem::write64(frame + i * 8, (0x8101_0203_0405_0607 + i * 0x0110) ^ n as u64);
            }
        }
    }

    fn sum(&self) -> u64 {
        let mut sum = 0u64;
        for frame in self.frames {
            for i in 0..512 {
                sum = sum.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mem::read64(frame + i * 8);
            }
        }
        sum
    }

    fn start(&self, code: Code) -> Frame {
        let mut frame =
            if self.user { user::frame(user::address(code)) } else { user::kernel_frame(mem::code(code)) };
        if !self.user {
            frame.rsp = user::STACK_TOP - 256;
        }
        (frame.rax, frame.rbx, frame.rcx, frame.rdx) = (0x1111_2222_3333_4444, 0x99, 0x55, 7);
        (frame.r8, frame.r15) = (0x88, 0xffff);
        frame
    }

    /// Runs from a frame with known floating-point registers.
    fn run(&self, frame: &Frame) -> Fault {
        // SAFETY: nothing else in this guest uses the x87 stack, and XMM0 is declared.
        unsafe { asm!("fninit", "fldpi", "pcmpeqd xmm0, xmm0", out("xmm0") _) };
        user::run(frame)
    }

    fn error(&self, state: Page, write: bool) -> u64 {
        u64::from(state == Page::ReadOnly) | if write { 2 } else { 0 } | if self.user { 4 } else { 0 }
    }

    /// Runs to the end, mending one page at each fault; the faults' number is returned with the end.
    fn finish(&self, mut fault: Fault) -> (u32, Fault) {
        let mut faults = 0;
        while fault.vector() == 14 && faults < 8 {
            faults += 1;
            self.set((fault.cr2.wrapping_sub(BASE) / 4096 & 3) as usize, Page::Whole);
            fault = self.run(&fault.frame);
        }
        (faults, fault)
    }
}

/// Equal in everything that a program sees; RF is the fault's own.
fn equal(a: &Frame, b: &Frame) -> bool {
    let mut a = *a;
    (a.vector, a.error, a.rflags) = (b.vector, b.error, a.rflags & !0x1_0000 | b.rflags & 0x1_0000);
    let (a, b) = ((&raw const a) as u64, (b as *const Frame) as u64);
    (0..size_of::<Frame>() as u64 / 8).all(|i| mem::read64(a + i * 8) == mem::read64(b + i * 8))
}

fn place(frame: &mut Frame, what: Where, operand: u64, size: u64) {
    match what {
        Memory => (frame.rdi, frame.rbp) = (operand, operand),
        Push => frame.rsp = operand + size,
        Pop => frame.rsp = operand,
    }
}

fn case(bench: &Bench, (name, code, what, size, write): (&str, Code, Where, u64, bool)) {
    for (offset, page) in [(0xff0 - 0x1000i64, 1), (-(size as i64 / 2), 1), (-(size as i64 / 2), 2), (16, 2)]
    {
        // An operand of one byte cannot cross; CMPXCHG16B must not.
        let crossing = offset != 16 && offset != -16;
        if crossing && (size == 1 || name == "cmpxchg16b") {
            continue;
        }
        let operand = MIDDLE.wrapping_add(offset as u64);
        let mut start = bench.start(code);
        place(&mut start, what, operand, size);
        (1..=2).for_each(|p| bench.set(p, Page::Whole));
        bench.fill();
        if name == "popf" {
            // A harmless flags image.
            mem::write64(bench.frames[1] + 0xff0, 0x8d7);
            mem::write64(bench.frames[2] + 16, 0x8d7);
            mem::write32(bench.frames[1] + 0xffc, 0x8d7);
            mem::write32(bench.frames[2], 0);
        }
        let before = bench.sum();
        let whole = bench.run(&start);
        check!(whole.vector() == user::BACK, "{name} ends: {:#x}", whole.vector());
        let after = bench.sum();
        for state in [Page::Absent, Page::ReadOnly] {
            if state == Page::ReadOnly && !write {
                continue;
            }
            let label = (name, bench.user, offset, page, state);
            bench.fill();
            if name == "popf" {
                mem::write64(bench.frames[1] + 0xff0, 0x8d7);
                mem::write64(bench.frames[2] + 16, 0x8d7);
                mem::write32(bench.frames[1] + 0xffc, 0x8d7);
                mem::write32(bench.frames[2], 0);
            }
            bench.set(page, state);
            let fault = bench.run(&start);
            let at = if page == 2 && operand < MIDDLE { MIDDLE } else { operand };
            // A read-modify-write may say that it was the read which missed an absent page.
            let error =
                if state == Page::Absent { fault.error() | if write { 2 } else { 0 } } else { fault.error() };
            same!(
                (fault.vector(), error, fault.cr2),
                (14, bench.error(state, write), at),
                "fault of {label:?}"
            );
            // QEMU's translator sets RCR's flags before it stores, and stores sixteen bytes in two halves.
            if !(cpu::is_qemu_tcg() && matches!(name, "rcr" | "movups store")) {
                check!(equal(&fault.frame, &start), "registers at {label:?}: {:x?}", fault.frame);
                same!(bench.sum(), before, "memory at {label:?}");
            }
            let (faults, end) = bench.finish(fault);
            same!(faults, 1, "faults of {label:?}");
            check!(equal(&end.frame, &whole.frame), "result of {label:?}: {:x?}", end.frame);
            same!(bench.sum(), after, "memory after {label:?}");
        }
    }
}

/// String instructions stop between elements with RCX, RSI and RDI telling how far they came.
fn strings(bench: &Bench) {
    let cases: &[(&str, Code, u64, u64)] = &[
        ("stosb", i_stosb, 1, 0),
        ("stosq", i_stosq, 8, 0),
        ("movsb", i_movsb, 1, 0),
        ("movsq", i_movsq, 8, 0),
        ("movsb down", i_movsb, 1, 0x400),
        ("stosq down", i_stosq, 8, 0x400),
        ("lodsd", i_lodsd, 4, 0),
        ("cmpsb", i_cmpsb, 1, 0),
        ("scasw", i_scasw, 2, 0),
    ];
    for &(name, code, size, down) in cases {
        for page in 1..=2usize {
            let (reads, writes) = (
                matches!(name, "lodsd" | "cmpsb" | "scasw"),
                name.starts_with("stos") || name.starts_with("movs"),
            );
            let mut start = bench.start(code);
            // 64 elements in the page before the middle, the rest behind it (or the other way round, downwards).
            let count = 96;
            (start.rcx, start.rflags) = (count, 2 | down);
            let string = if down == 0 { MIDDLE - 64 * size } else { MIDDLE + 63 * size };
            (start.rdi, start.rsi) = match name {
                "lodsd" => (0, string),
                "cmpsb" => (string, string),
                _ if name.starts_with("movs") => (string, BASE + 0x800),
                _ => (string, 0),
            };
            start.rax = 0x4242_4242_4242_4242;
            (1..=2).for_each(|p| bench.set(p, Page::Whole));
            bench.fill();
            let whole = bench.run(&start);
            let after = bench.sum();
            bench.fill();
            bench.set(page, Page::Absent);
            let fault = bench.run(&start);
            let first = (page == 1) == (down == 0);
            let done = if first { 0 } else { 64 };
            let step = if down == 0 { size } else { size.wrapping_neg() };
            let label = (name, bench.user, page);
            same!(fault.vector(), 14, "{label:?}");
            same!(fault.error() & 2 != 0, writes && !reads, "write bit of {label:?}");
            same!(fault.frame.rcx, count - done, "RCX of {label:?}");
            let moved = start.rdi.wrapping_add(if name == "lodsd" { 0 } else { step.wrapping_mul(done) });
            same!(fault.frame.rdi, moved, "RDI of {label:?}");
            if start.rsi != 0 {
                same!(fault.frame.rsi, start.rsi.wrapping_add(step.wrapping_mul(done)), "RSI of {label:?}");
            }
            same!(fault.frame.rip, start.rip, "RIP of {label:?}");
            same!(fault.cr2, string.wrapping_add(step.wrapping_mul(done)), "CR2 of {label:?}");
            let (faults, end) = bench.finish(fault);
            same!(faults, 1, "faults of {label:?}");
            check!(equal(&end.frame, &whole.frame), "result of {label:?}: {:x?}", end.frame);
            same!(bench.sum(), after, "memory after {label:?}");
        }
    }
}

/// Instructions with two memory operands: the one that is read first faults first.
fn pairs(bench: &Bench) {
    // Source in page 1, destination in page 2, both absent.
    let (source, target) = (BASE + 0x1100, BASE + 0x2200);
    let cases: &[(&str, Code, u64, u64, u64)] = &[
        // Name, code, RSI, RDI, RSP (0: as it is).
        ("push [mem]", i_push_mem, 0, source, target + 8),
        ("pop [mem]", i_pop_mem, 0, target, source),
        ("movs", i_movs_one, source, target, 0),
        ("call [mem]", i_call_mem, 0, source, target + 8),
    ];
    for &(name, code, rsi, rdi, rsp) in cases {
        (1..=2).for_each(|p| bench.set(p, Page::Whole));
        bench.fill();
        let mut start = bench.start(code);
        if name == "call [mem]" {
            let back = if bench.user {
                user::address(user::code::user_back)
            } else {
                mem::code(user::code::user_back)
            };
            mem::write64(source, back);
        }
        (start.rsi, start.rdi) = (rsi, rdi);
        if rsp != 0 {
            start.rsp = rsp;
        }
        let whole = bench.run(&start);
        let wrote = mem::read64(target);
        mem::write64(target, 0);
        (1..=2).for_each(|p| bench.set(p, Page::Absent));
        let first = user::run(&start);
        same!((first.vector(), first.error() & 3, first.cr2), (14, 0, source), "first fault of {name}");
        check!(equal(&first.frame, &start), "registers at the first fault of {name}");
        bench.set(1, Page::Whole);
        let second = user::run(&first.frame);
        same!((second.vector(), second.error() & 3, second.cr2), (14, 2, target), "second fault of {name}");
        check!(equal(&second.frame, &start), "registers at the second fault of {name}: {:x?}", second.frame);
        bench.set(2, Page::Whole);
        let end = user::run(&second.frame);
        check!(equal(&end.frame, &whole.frame), "result of {name}");
        same!(mem::read64(target), wrote, "what {name} wrote");
    }
}

/// An instruction that lies across a page boundary, and a jump whose target is missing.
fn fetches(bench: &Bench) {
    (1..=2).for_each(|p| bench.set(p, Page::Whole));
    // mov rax, imm64 (ten bytes) from MIDDLE - k, then INT 0x30.
    for k in 1..10u64 {
        let code = [0x48, 0xb8, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, 0xcd, 0x30];
        let at = MIDDLE - k;
        for (i, byte) in code.iter().enumerate() {
            let to = at + i as u64 - BASE;
            mem::write8(bench.frames[(to >> 12) as usize] + (to & 4095), *byte);
        }
        let mut start = bench.start(user::code::user_back);
        start.rip = at;
        bench.set(2, Page::Absent);
        let fault = bench.run(&start);
        same!(
            (fault.vector(), fault.cr2, fault.frame.rip),
            (14, MIDDLE, at),
            "code across a boundary at -{k}"
        );
        check!(equal(&fault.frame, &start), "registers at -{k}");
        let (faults, end) = bench.finish(fault);
        same!(
            (faults, end.vector(), end.frame.rax),
            (1, user::BACK, 0x0123_4567_89ab_cdef),
            "result at -{k}"
        );
        bench.set(1, Page::Absent);
        let fault = bench.run(&start);
        same!((fault.vector(), fault.cr2, fault.frame.rip), (14, at, at), "first page missing at -{k}");
        bench.set(1, Page::Whole);
    }
}

pub fn run(space: Space) {
    // A fault at CPL 0 with a bad stack pointer needs a stack of its own.
    for vector in [14, 0x30] {
        descriptors::set_gate(vector, rt::trap::stub(vector), 3, 3);
    }
    for user in [false, true] {
        let bench = Bench { space, user, frames: [(); 4].map(|()| frames::take()) };
        for page in [0, 3] {
            bench.set(page, Page::Whole);
        }
        CASES.iter().for_each(|c| case(&bench, *c));
        strings(&bench);
        pairs(&bench);
        fetches(&bench);
        say!("CPL {}: {} instructions restarted", if user { 3 } else { 0 }, CASES.len() + 13);
    }
    for vector in [14, 0x30] {
        descriptors::reset_gate(vector);
    }
    let _ = (i_ret as Code, i_sgdt as Code, i_xlat as Code);
}
