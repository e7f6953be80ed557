//! Code whose pages move: another frame behind the same address, an instruction over two pages, protection against writes.

use super::{ALIAS, CODE, Pages, call, emit, emit_return, serialize};
use rt::{
    check, cpu, frames,
    global::Global,
    mem,
    paging::{HIGH, NX, P, U, W},
    same, say,
    trap::{self, Frame},
    user,
};

pub fn run(pages: &Pages) {
    remapped(pages);
    across(pages);
    guarded(pages);
    from_user(pages);
    other_space(pages);
}

/// Two frames with different code behind one address in turn, both executed before.
fn remapped(pages: &Pages) {
    let va = HIGH + 0x9000;
    let frames = [(); 3].map(|()| frames::take());
    frames.iter().enumerate().for_each(|(n, f)| emit_return(*f + 0x10, 1000 + n as u32));
    let slot = pages.space.map(va, frames[0], W);
    for round in 0..600usize {
        mem::write64(slot, frames[round % 3] | P | W);
        cpu::invlpg(va);
        same!(call(va + 0x10), 1000 + round as u64 % 3, "frame of round {round}");
        if round % 10 == 9 {
            // The frame that is not mapped here changes.
            emit_return(frames[(round + 1) % 3] + 0x10, 1000 + (round as u32 + 1) % 3);
        }
    }
    mem::write64(slot, frames[0] | P | NX);
    cpu::invlpg(va);
    if cpu::has_nx() {
        let fault = trap::catch(|| call(va + 0x10));
        check!(fault.is_err_and(|f| (f.error(), f.frame.rip) == (0x11, va + 0x10)), "no longer executable");
    }
    mem::write64(slot, 0);
    cpu::invlpg(va);
    check!(trap::catch(|| call(va + 0x10)).is_err_and(|f| f.error() & !0x10 == 0), "no longer there");
    say!("600 changes of the frame behind code");
}

/// An instruction over two pages: its second half changes, and moves.
fn across(pages: &Pages) {
    let edge = CODE + 4096;
    let other = frames::take();
    for k in 1..5u64 {
        let at = edge - k;
        emit_return(at, 0x1111_1111);
        mem::copy(other, pages.frames[1], 64);
        serialize();
        same!(call(at), 0x1111_1111, "over the edge, {k} before");
        // The bytes in the second page, through each address.
        for (n, base) in [edge, ALIAS + 4096, pages.frames[1]].into_iter().enumerate() {
            let last = base + 4 - k;
            mem::write8(last, 0x30 + n as u8);
            serialize();
            same!(call(at), (0x30 + n as u64) << 24 | 0x11_1111, "its last byte changed, {k} before");
        }
        // The second page replaced.
        mem::write8(other + 4 - k, 0x77);
        let slot = pages.space.slot(edge, 1);
        let old = mem::read64(slot);
        mem::write64(slot, other | P | W | U);
        cpu::invlpg(edge);
        same!(call(at), 0x7711_1111, "its second page replaced, {k} before");
        mem::write64(slot, 0);
        cpu::invlpg(edge);
        let fault = trap::catch(|| call(at));
        check!(fault.is_err_and(|f| (f.frame.rip, f.cr2) == (at, edge)), "its second page away, {k} before");
        mem::write64(slot, old);
        same!(call(at), 0x3211_1111, "and back");
        // The first page replaced.
        mem::copy(other, pages.frames[0], 4096);
        mem::write8(other + 4096 - k, 0xb9);
        mem::write64(pages.space.slot(CODE, 1), other | P | W | U);
        cpu::invlpg(CODE);
        // Now it loads ECX; EAX keeps what the call found in it.
        let value: u64;
        // SAFETY: as in `call`.
        unsafe { core::arch::asm!("call {}", in(reg) at, out("rcx") value, clobber_abi("C")) };
        same!(value, 0x3211_1111, "its first page replaced, {k} before");
        mem::write64(pages.space.slot(CODE, 1), pages.frames[0] | P | W | U);
        cpu::invlpg(CODE);
    }
    say!("instructions over two pages");
}

static SLOT: Global<u64> = Global::new(0);
static FAULTS: Global<u32> = Global::new(0);

fn on_fault(frame: &mut Frame) -> bool {
    FAULTS.store(FAULTS.load() + 1);
    if frame.error != 3 {
        return false;
    }
    mem::write64(SLOT.load(), mem::read64(SLOT.load()) | W);
    cpu::invlpg(cpu::cr2());
    true
}

/// A page that is executable and read-only by turns with writable.
fn guarded(pages: &Pages) {
    let at = CODE + 0x200;
    SLOT.store(pages.space.slot(CODE, 1));
    trap::on(14, Some(on_fault));
    for round in 0..200u32 {
        mem::write64(SLOT.load(), mem::read64(SLOT.load()) & !W);
        cpu::invlpg(CODE);
        emit_return(at, round);
        serialize();
        same!(call(at), u64::from(round), "code behind write protection");
    }
    trap::on(14, None);
    same!(FAULTS.load(), 200, "write faults");
    say!("200 rounds of writing to protected code");
}

/// CPL 3 changes its own code.
fn from_user(pages: &Pages) {
    let at = CODE + 0x300;
    // mov eax, 0; int 0x30
    emit(at, &[0xb8, 0, 0, 0, 0, 0xcd, 0x30]);
    for round in 0..100u64 {
        let to = at + 1 + round % 4;
        check!(user::access(user::code::user_write8, to, round).is_ok(), "CPL 3 writes code");
        let end = user::access(user::code::user_jump, at, 0);
        let want = u64::from(mem::read32(pages.frames[0] + 0x301));
        same!(end.ok(), Some(want), "CPL 3 runs what it wrote");
        check!(want >> (8 * (round % 4)) & 0xff == round, "the byte it wrote");
    }
    say!("100 changes from CPL 3");
}

/// The same frame is code in two address spaces; one writes, the other runs.
fn other_space(pages: &Pages) {
    let second = rt::paging::Space::new();
    second.map(CODE + 0x5000, pages.frames[0], W);
    for round in 0..100u32 {
        second.load();
        emit_return(CODE + 0x5000 + 0x380, round ^ 0x5500);
        pages.space.load();
        same!(call(CODE + 0x380), u64::from(round ^ 0x5500), "written in another space");
        emit_return(ALIAS + 0x3a0, round ^ 0x6600);
        second.load();
        same!(call(CODE + 0x5000 + 0x3a0), u64::from(round ^ 0x6600), "and the other way");
    }
    pages.space.load();
    say!("100 changes from another address space");
}
