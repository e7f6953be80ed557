//! Context switches: many address spaces with different memory at the same addresses, tasks whose very stacks are switched
//! with CR3, global pages, process-context identifiers and INVPCID (SDM Vol. 3, 4.10).
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the switch of stacks is assembly")]

#[path = "ctxswitch/pcid.rs"]
mod pcid;

use core::arch::global_asm;
use rt::{
    check, cpu, entry, frames,
    global::Global,
    mem,
    paging::{G, HIGH, LOW, P, Space, U, W},
    same, say, trap, user,
};

rt::guest!("ctxswitch", main);

const SPACES: usize = 48;
const PAGES: u64 = 8;
/// The same addresses in every space.
const DATA: u64 = LOW + 0x1234_5000;
const STACK: u64 = HIGH + 0x10_0000;
const SHARED: u64 = HIGH + 0x4000_0000;

fn main() {
    let spaces = [(); SPACES].map(|()| Space::new());
    for (n, space) in spaces.iter().enumerate() {
        for page in 0..PAGES {
            let frame = frames::take();
            mem::write64(frame, (n as u64) << 32 | page);
            space.map(DATA + page * 4096, frame, W | U);
        }
        user::map(*space);
    }
    round_robin(&spaces);
    from_user(&spaces);
    inactive(&spaces);
    tasks();
    reused_roots();
    global_pages(&spaces);
    control_bits();
    if cpu::has_pcid() {
        pcid::run(&spaces);
    } else {
        rt::skip("process-context identifiers");
    }
}

fn round_robin(spaces: &[Space; SPACES]) {
    for round in 0..50u64 {
        for (n, space) in spaces.iter().enumerate() {
            space.load();
            for page in 0..PAGES {
                let va = DATA + page * 4096;
                let got = mem::read64(va);
                if got != (n as u64) << 32 | page {
                    same!(got, (n as u64) << 32 | page, "space {n}, page {page}, round {round}");
                }
                same!(mem::read64(va + 8 + page), round * page, "the counter of space {n}, page {page}");
                mem::write64(va + 8 + page, (round + 1) * page);
            }
        }
    }
    say!("50 rounds over {SPACES} spaces");
}

fn from_user(spaces: &[Space; SPACES]) {
    for round in 0..10u64 {
        for (n, space) in spaces.iter().enumerate() {
            space.load();
            let got = user::access(user::code::user_read64, DATA, 0);
            same!(got.ok(), Some((n as u64) << 32), "space {n} from CPL 3");
            let got = user::access(user::code::user_rmw64, DATA + 0x800, n as u64 + 1);
            same!(got.ok(), Some(round * (n as u64 + 1)), "CPL 3's counter in space {n}");
        }
    }
    say!("10 rounds with CPL 3");
}

/// Tables changed while another space is current: the next load must show it.
fn inactive(spaces: &[Space; SPACES]) {
    let frame = frames::take();
    for n in 0..SPACES {
        let (here, there) = (spaces[n], spaces[(n + 7) % SPACES]);
        there.load();
        mem::read64(DATA);
        here.load();
        let slot = there.slot(DATA, 1);
        let old = mem::read64(slot);
        mem::write64(frame, n as u64 ^ 0xff);
        mem::write64(slot, frame | P | W);
        there.load();
        same!(mem::read64(DATA), n as u64 ^ 0xff, "changed behind its back");
        here.load();
        mem::write64(slot, 0);
        there.load();
        check!(trap::catch(|| mem::read64(DATA)).is_err(), "unmapped behind its back");
        mem::write64(slot, old);
        same!(mem::read64(DATA), ((n + 7) % SPACES) as u64 * (1 << 32), "mapped again");
    }
    say!("{SPACES} changes of a space that was not current");
}

global_asm!(
    r#"
    .section .text.switch, "ax"
    // switch_to(where RSP is saved, new CR3, new RSP)
    .globl switch_to
switch_to:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi], rsp
    mov cr3, rsi
    mov rsp, rdx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .text
"#
);

unsafe extern "C" {
    fn switch_to(save: *mut u64, root: u64, rsp: u64);
}

const TASKS: usize = 8;
const YIELDS: u64 = 100;

#[derive(Clone, Copy)]
struct Task {
    root: u64,
    rsp: u64,
    done: bool,
}

/// Task 0 is the main program.
static RUNNING: Global<usize> = Global::new(0);
static TABLE: Global<[Task; TASKS + 1]> = Global::new([Task { root: 0, rsp: 0, done: false }; TASKS + 1]);
static TRACE: Global<u64> = Global::new(0);

/// Gives the processor to the next task that is not done; task 0 only when all others are.
fn give_way() {
    let me = RUNNING.load();
    let next = (1..=TASKS).map(|i| (me + i - 1) % TASKS + 1).find(|t| !TABLE.get()[*t].done && *t != me);
    let next = next.unwrap_or(if TABLE.get()[me].done || me == 0 { 0 } else { me });
    if next == me {
        return;
    }
    RUNNING.store(next);
    let to = TABLE.get()[next];
    // SAFETY: the task's stack was left by this function or laid out by `tasks`.
    unsafe { switch_to(&raw mut TABLE.get()[me].rsp, to.root, to.rsp) };
}

/// Computes on its own stack and data, yielding in between.
extern "C" fn task() -> ! {
    let me = RUNNING.load() as u64;
    let mut local = [me; 64];
    for step in 0..YIELDS {
        let i = (step * 7 % 64) as usize;
        local[i] = local[i].wrapping_mul(31).wrapping_add(step);
        mem::write64(DATA, mem::read64(DATA).wrapping_mul(17).wrapping_add(local[i]));
        TRACE.store(TRACE.load().wrapping_mul(3).wrapping_add(me));
        give_way();
        same!(RUNNING.load() as u64, me, "who runs");
    }
    mem::write64(DATA + 8, local.iter().fold(0, |a, b| a ^ *b));
    TABLE.get()[me as usize].done = true;
    give_way();
    unreachable!("a task that is done runs")
}

fn tasks() {
    Space::boot().load();
    TABLE.get()[0].root = entry::boot_root();
    let mut data = [0; TASKS];
    for n in 1..=TASKS {
        let space = Space::new();
        let mut top = 0;
        for page in 0..4 {
            top = frames::take();
            space.map(STACK + page * 4096, top, W);
        }
        data[n - 1] = frames::take();
        mem::write64(data[n - 1], n as u64);
        space.map(DATA, data[n - 1], W);
        // Six registers, the return address, and a slot that leaves RSP as after a CALL.
        mem::write64(top + 4096 - 16, task as *const () as u64);
        TABLE.get()[n] = Task { root: space.root, rsp: STACK + 4 * 4096 - 16 - 48, done: false };
    }
    give_way();
    for (n, frame) in data.iter().enumerate() {
        let me = n as u64 + 1;
        let (mut local, mut sum) = ([me; 64], me);
        for step in 0..YIELDS {
            let i = (step * 7 % 64) as usize;
            local[i] = local[i].wrapping_mul(31).wrapping_add(step);
            sum = sum.wrapping_mul(17).wrapping_add(local[i]);
        }
        same!(mem::read64(*frame), sum, "result of task {me}");
        same!(mem::read64(*frame + 8), local.iter().fold(0, |a, b| a ^ *b), "stack of task {me}");
    }
    say!("{TASKS} tasks on stacks at one address, {YIELDS} yields each, trace {:#x}", TRACE.load());
}

/// A root that dies and comes back as another space.
fn reused_roots() {
    let mut roots = [0u64; 4];
    for round in 0..200u64 {
        Space::boot().load();
        let space = Space::new();
        roots[(round % 4) as usize] = space.root;
        let frame = frames::take();
        mem::write64(frame, round);
        let va = DATA + (round % 3) * 0x4000_0000;
        space.map(va, frame, W);
        space.load();
        same!(mem::read64(va), round, "space of round {round}");
        let other = DATA + ((round + 1) % 3) * 0x4000_0000;
        check!(trap::catch(|| mem::read64(other)).is_err(), "nothing of an earlier space");
        Space::boot().load();
        space.drop_tables();
        frames::give(frame);
    }
    check!(roots.iter().any(|r| *r == roots[0]), "roots come again");
    say!("200 spaces made and dropped");
}

fn global_pages(spaces: &[Space; SPACES]) {
    cpu::change_cr4(cpu::CR4_PGE, 0);
    let frames = [(); 4].map(|()| frames::take());
    frames.iter().enumerate().for_each(|(n, f)| mem::write64(*f, 0x600 + n as u64));
    for space in &spaces[..4] {
        space.map(SHARED, frames[0], W | G);
    }
    for round in 0..64u64 {
        let space = spaces[(round % 4) as usize];
        space.load();
        same!(mem::read64(SHARED), 0x600, "a global page in round {round}");
        same!(mem::read64(DATA) >> 32, round % 4, "a page that is not, in round {round}");
        // Moved everywhere: INVLPG in one space suffices for a global translation.
        let n = round % 3 + 1;
        spaces[..4].iter().for_each(|s| mem::write64(s.slot(SHARED, 1), frames[n as usize] | P | W | G));
        let got = mem::read64(SHARED);
        check!(got == 0x600 || got == 0x600 + n, "the old or the new frame");
        if round % 2 == 0 {
            cpu::invlpg(SHARED);
        } else {
            cpu::change_cr4(0, cpu::CR4_PGE);
            cpu::change_cr4(cpu::CR4_PGE, 0);
        }
        same!(mem::read64(SHARED), 0x600 + n, "the new frame");
        spaces[(round % 4 + 1) as usize % 4].load();
        same!(mem::read64(SHARED), 0x600 + n, "the new frame in another space");
        spaces[..4].iter().for_each(|s| mem::write64(s.slot(SHARED, 1), frames[0] | P | W | G));
        cpu::invlpg(SHARED);
    }
    // In a space that lacks the page the global translation may live on until it is invalidated.
    spaces[0].load();
    mem::read64(SHARED);
    spaces[5].load();
    let got = trap::catch(|| mem::read64(SHARED));
    check!(got.is_err() || got.is_ok_and(|v| v == 0x600), "a stale global page or none");
    cpu::invlpg(SHARED);
    check!(trap::catch(|| mem::read64(SHARED)).is_err(), "none after INVLPG");
    cpu::change_cr4(0, cpu::CR4_PGE);
    say!("64 rounds of global pages");
}

/// CR3's PWT and PCD bits are kept and mean nothing here; bits above the physical width are refused.
fn control_bits() {
    let root = Space::boot().root;
    for bits in [0u64, 8, 16, 24] {
        cpu::set_cr3(root | bits);
        same!(cpu::cr3(), root | bits, "CR3 with its cache bits");
    }
    cpu::set_cr3(root);
    // QEMU's translator takes any CR3.
    if !cpu::is_qemu_tcg() {
        for bit in [cpu::physical_bits(), 51, 52, 60] {
            let fault = trap::catch(|| cpu::set_cr3(root | 1 << bit));
            check!(fault.is_err_and(|f| (f.vector(), f.error()) == (13, 0)), "CR3 with bit {bit}");
        }
        let fault = trap::catch(|| cpu::set_cr3(root | 1 << 63));
        check!(fault.is_err_and(|f| f.vector() == 13), "CR3 bit 63 without PCIDs");
    }
    same!(cpu::cr3(), root, "CR3 as it was");
}
