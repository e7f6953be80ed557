//! Process creation in miniature: programs at CPL 3 that fork, touch memory and exit, over copy-on-write address spaces.
//! What a kernel does for fork, exec-less exit and wait is done here in two hundred lines: tables are cloned, writable pages
//! become read-only in both, a write fault copies, the last user of a frame gets it back writable, exit takes all down.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the programs are assembly")]

use core::arch::global_asm;
use rt::{
    check, cpu, descriptors, frames,
    global::Global,
    mem,
    paging::{ADDR, LOW, P, Space, U, W, index},
    same, say,
    trap::{self, Frame},
    user,
};

rt::guest!("forkwait", main);

/// The system call gate of the miniature kernel.
const CALL: u8 = 0x31;
const FORK: u64 = 1;
const EXIT: u64 = 2;
const BAD: u64 = 3;

const HEAP: u64 = LOW + 0x10_0000_0000;
const HEAP_PAGES: u64 = 24;
/// Software's mark in an entry: writable once copied.
const COW: u64 = 1 << 9;

global_asm!(
    r#"
    .section .user.fork, "ax"
    .globl program
    // R12 heap, R13 pages, R14 depth left, R15 tag.
program:
    xor ecx, ecx
2:  mov rax, rcx
    shl rax, 12
    mov [r12 + rax], r15
    mov [r12 + rax + 4088], r15
    inc rcx
    cmp rcx, r13
    jb 2b
    test r14, r14
    jz 4f
    mov ebx, 3
3:  mov eax, 1
    int 0x31
    test rax, rax
    jz 5f
    call verify                 // children have changed nothing of ours
    dec ebx
    jnz 3b
4:  call verify
    mov eax, 2
    mov rdi, r15
    int 0x31
5:  call verify                 // a child begins with its parent's memory
    dec r14
    test bl, 1
    jz 4b                       // some leave at once and write nothing but their stack
    lea r15, [r15 + r15 * 4]
    add r15, rbx
    jmp program
verify:
    xor ecx, ecx
6:  mov rax, rcx
    shl rax, 12
    cmp [r12 + rax], r15
    jne 7f
    cmp [r12 + rax + 4088], r15
    jne 7f
    inc rcx
    cmp rcx, r13
    jb 6b
    ret
7:  mov eax, 3
    int 0x31
    .text
"#
);

unsafe extern "C" {
    fn program();
}

/// How many address spaces map a frame, by frame number.
static USERS: Global<[u16; 1 << 15]> = Global::new([0; 1 << 15]);

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Counts {
    processes: u64,
    faults: u64,
    copies: u64,
    reclaimed: u64,
    ended_well: u64,
}

static COUNTS: Global<Counts> =
    Global::new(Counts { processes: 0, faults: 0, copies: 0, reclaimed: 0, ended_well: 0 });

fn users(frame: u64) -> &'static mut u16 {
    &mut USERS.get()[(frame >> 12) as usize & 0x7fff]
}

/// A write fault on a page that was writable before a fork.
fn on_fault(frame: &mut Frame) -> bool {
    let va = cpu::cr2();
    let Some(slot) = Space::current().find(va, 1) else { return false };
    let entry = mem::read64(slot);
    if frame.error & !4 != 3 || entry & (P | COW) != P | COW {
        return false;
    }
    let old = entry & ADDR;
    let counts = COUNTS.get();
    counts.faults += 1;
    let flags = entry & !ADDR & !COW | W;
    if *users(old) == 1 {
        counts.reclaimed += 1;
        mem::write64(slot, old | flags);
    } else {
        counts.copies += 1;
        let new = frames::take_dirty();
        mem::copy(new, old, 4096);
        *users(old) -= 1;
        *users(new) = 1;
        mem::write64(slot, new | flags);
    }
    cpu::invlpg(va);
    true
}

fn give_page(frame: u64) {
    let n = users(frame);
    *n -= 1;
    if *n == 0 {
        frames::give(frame);
    }
}

/// Clones the tables of a level; pages become shared and read-only.
fn clone_table(from: u64, level: u32) -> u64 {
    let to = frames::take_dirty();
    for i in 0..512 {
        let slot = from + i * 8;
        let entry = mem::read64(slot);
        let copy = if entry & P == 0 {
            entry
        } else if level > 1 {
            clone_table(entry & ADDR, level - 1) | entry & !ADDR
        } else {
            let shared = if entry & W != 0 { entry & !W | COW } else { entry };
            if shared != entry {
                mem::write64(slot, shared);
            }
            *users(entry & ADDR) += 1;
            shared
        };
        mem::write64(to + i * 8, copy);
    }
    to
}

fn drop_table(table: u64, level: u32) {
    for i in 0..512 {
        let entry = mem::read64(table + i * 8);
        if entry & P == 0 {
            continue;
        }
        if level > 1 {
            drop_table(entry & ADDR, level - 1);
        } else {
            give_page(entry & ADDR);
        }
    }
    frames::give(table);
}

/// The programs' slot in the PML4; slot 0 is the kernel's and shared.
fn slot(space: Space) -> u64 {
    space.root + index(LOW, 4) * 8
}

fn fork(parent: Space) -> Space {
    let child = Space::new();
    let entry = mem::read64(slot(parent));
    mem::write64(slot(child), clone_table(entry & ADDR, 3) | entry & !ADDR);
    // The parent's writable translations are stale now.
    parent.load();
    child
}

fn exit(space: Space) {
    Space::boot().load();
    drop_table(mem::read64(slot(space)) & ADDR, 3);
    frames::give(space.root);
}

/// Runs a process, its children first, to its end.
fn run(space: Space, mut frame: Frame, depth: u32) {
    COUNTS.get().processes += 1;
    check!(depth < 6, "depth");
    loop {
        space.load();
        let end = user::run(&frame);
        frame = end.frame;
        if end.vector() != CALL.into() {
            check!(false, "a process ended by exception {:#x} at {:#x}", end.vector(), frame.rip);
            break;
        }
        match frame.rax {
            FORK => {
                let child = fork(space);
                let mut start = frame;
                start.rax = 0;
                run(child, start, depth + 1);
                frame.rax = COUNTS.get().processes;
            }
            EXIT => {
                same!(frame.rdi, frame.r15, "the exit status");
                COUNTS.get().ended_well += 1;
                break;
            }
            BAD => {
                check!(false, "a process found foreign memory: page {}", frame.rcx);
                break;
            }
            other => {
                check!(false, "system call {other}");
                break;
            }
        }
    }
    exit(space);
}

fn first() -> Space {
    let space = Space::new();
    user::map(space);
    for i in 0..HEAP_PAGES {
        space.map(HEAP + i * 4096, frames::take(), W | U);
    }
    // Every page of the new process has one user; code pages of the image are never given back.
    count_pages(mem::read64(slot(space)) & ADDR, 3);
    space
}

fn count_pages(table: u64, level: u32) {
    for i in 0..512 {
        let entry = mem::read64(table + i * 8);
        if entry & P == 0 {
            continue;
        }
        if level > 1 {
            count_pages(entry & ADDR, level - 1);
        } else {
            let n = users(entry & ADDR);
            // A page of the image counts once more, so that it never becomes free.
            *n = (*n).max(u16::from(entry & W == 0)) + 1;
        }
    }
}

fn main() {
    trap::on(14, Some(on_fault));
    descriptors::reset_gate(CALL);
    let before = frames::taken();
    for round in 0..8u64 {
        let mut frame = user::frame(user::address(program));
        (frame.r12, frame.r13, frame.r14, frame.r15) = (HEAP, HEAP_PAGES, 3, 0x1000 + round);
        run(first(), frame, 0);
        same!(frames::taken(), before, "frames taken after round {round}");
        if round == 0 {
            say!("one round: {:?}", COUNTS.get());
        }
    }
    let counts = *COUNTS.get();
    same!(counts.ended_well, counts.processes, "processes that ended well");
    same!(counts.faults, counts.copies + counts.reclaimed, "write faults");
    say!("8 rounds: {counts:?}");
}
