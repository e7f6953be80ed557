//! Faults of the processor's own accesses (descriptor tables), faults while a fault is delivered, and addresses that
//! are not canonical (SDM Vol. 3, 7.15 "Interrupt 8—Double Fault Exception"; Vol. 1, 3.3.7.1 "Canonical Addressing").

use core::arch::{asm, global_asm};
use rt::{
    check, cpu, descriptors, frames, mem,
    paging::{P, Space, U, W},
    same, say,
    trap::{self, Fault},
    user,
};

const TABLE: u64 = 4 << 39;
const HOLE: u64 = 5 << 39;

global_asm!(
    r#"
    .section .user.nested, "ax"
    .globl user_load_ds, user_int90
user_load_ds:
    mov ds, edi
    int 0x30
user_int90:
    int 0x90
    int 0x30
    .section .text.nested, "ax"
    .globl nested_div, nested_ud
nested_div:
    xor ecx, ecx
    div ecx
    ret
nested_ud:
    ud2
    .text
"#
);

unsafe extern "C" {
    fn user_load_ds();
    fn user_int90();
    fn nested_div();
    fn nested_ud();
}

fn want(result: Result<u64, Fault>, vector: u64, error: u64, cr2: Option<u64>, what: &str) {
    match result {
        Ok(_) => check!(false, "{what}: no fault"),
        Err(f) => {
            same!((f.vector(), f.error()), (vector, error), "{what}");
            if let Some(cr2) = cr2 {
                same!(f.cr2, cr2, "CR2 of {what}");
            }
        }
    }
}

fn catch(body: impl FnOnce()) -> Result<u64, Fault> {
    trap::catch(|| {
        body();
        0
    })
}

/// The GDT and the IDT moved so that they end in a page which is not there.
fn tables(space: Space) {
    // GDT: the runtime's entries at the end of the first page, the rest in the second.
    let gdt = TABLE + 0x1000 - 16 * 8;
    let (first, second) = (frames::take(), frames::take());
    space.map(TABLE, first, W);
    let slot = space.map(TABLE + 0x1000, second, W);
    for i in 0..16 {
        mem::write64(first + 0x1000 - 16 * 8 + i * 8, descriptors::GDT.get()[i as usize]);
    }
    // Descriptor 20, in the second page: plain user data.
    mem::write64(second + 4 * 8, descriptors::flat(0xf3, 0xc));
    mem::write64(slot, second | W);
    cpu::invlpg(TABLE + 0x1000);
    descriptors::lgdt(gdt, 32 * 8 - 1);
    let selector = 20 * 8 + 3u64;
    let load = || {
        catch(|| {
            // SAFETY: DS is not used in long mode.
            unsafe { asm!("mov ds, {0:e}", in(reg) selector) }
        })
    };
    want(load(), 14, 0, Some(gdt + 20 * 8), "a descriptor in a missing page");
    want(user::access(user_load_ds, selector, 0), 14, 0, Some(gdt + 20 * 8), "the same from CPL 3");
    mem::write64(slot, second | P);
    check!(load().is_ok(), "the page is back");
    // Accessed is already set in the descriptor (type 3), so a read-only page will do. Without it the processor writes.
    mem::write64(second + 4 * 8, descriptors::flat(0xf2, 0xc));
    let fault = load();
    want(fault, 14, 3, None, "the accessed bit of a descriptor in a read-only page");
    // Which byte of the descriptor the processor writes is its own affair.
    check!(fault.is_err_and(|f| f.cr2 & !7 == gdt + 20 * 8), "CR2 of the accessed bit");
    mem::write64(slot, second | P | W);
    cpu::invlpg(TABLE + 0x1000);
    check!(load().is_ok(), "the page is writable");
    same!(mem::read64(second + 4 * 8), descriptors::flat(0xf3, 0xc), "the descriptor's accessed bit");
    descriptors::load_gdt();
    // SAFETY: as above.
    unsafe { asm!("mov ds, {0:e}", in(reg) u64::from(descriptors::KERNEL_DATA)) };

    // IDT: vectors from 0x80 on in the missing page.
    let idt = TABLE + 0x800;
    mem::copy(first + 0x800, descriptors::IDT.addr(), 0x800);
    mem::copy(second, descriptors::IDT.addr() + 0x800, 0x800);
    mem::write64(slot, second | W);
    cpu::invlpg(TABLE + 0x1000);
    descriptors::lidt(idt, 4095);
    let int90 = || {
        catch(|| {
            // SAFETY: the gate's handler ends the guarded call.
            unsafe { asm!("int 0x90") }
        })
    };
    want(int90(), 14, 0, Some(idt + 0x900), "a gate in a missing page");
    want(user::access(user_int90, 0, 0), 14, 0, Some(idt + 0x900), "the same from CPL 3");
    mem::write64(slot, second | P);
    want(int90(), 0x90, 0, None, "the gate is back");
    // A table that ends before the vector: #GP with the vector, IDT bit and (INT n) no EXT bit.
    descriptors::lidt(idt, 0x8ff);
    want(int90(), 13, trap::gate_error(0x90, false), None, "a vector past the IDT's limit");
    descriptors::load_idt();
    say!("descriptor tables in missing pages");
}

/// Faults while a fault is delivered.
fn doubles(space: Space) {
    let bad_stack = || {
        catch(|| {
            // SAFETY: the push of #PF's frame fails too; #DF has a stack of its own and ends the guarded call.
            unsafe { asm!("mov rsp, {0}", "push 0", in(reg) HOLE, options(noreturn)) }
        })
    };
    want(bad_stack(), 8, 0, None, "a page fault whose frame cannot be pushed");
    check!(cpu::cr2() & !63 == HOLE - 64, "CR2 after the double fault: {:#x}", cpu::cr2());

    // #PF's gate not present: #PF then #NP.
    let gate = descriptors::IDT.get()[14];
    descriptors::IDT.get()[14][0] &= !(1 << 47);
    want(catch(|| mem::write8(HOLE, 1)), 8, 0, None, "a page fault without a present gate");
    descriptors::IDT.get()[14] = gate;

    // #GP's gate not present: #GP then #NP.
    let gate = descriptors::IDT.get()[13];
    descriptors::IDT.get()[13][0] &= !(1 << 47);
    want(catch(|| _ = mem::read8(1 << 47)), 8, 0, None, "#GP without a present gate");
    descriptors::IDT.get()[13] = gate;

    // #DE's gate not present: #DE then #NP.
    let gate = descriptors::IDT.get()[0];
    descriptors::IDT.get()[0][0] &= !(1 << 47);
    // SAFETY: ends in an exception.
    want(catch(|| unsafe { nested_div() }), 8, 0, None, "#DE without a present gate");
    descriptors::IDT.get()[0] = gate;

    // #UD is benign: #NP comes alone, with the vector, IDT and EXT bits.
    let gate = descriptors::IDT.get()[6];
    descriptors::IDT.get()[6][0] &= !(1 << 47);
    // SAFETY: ends in an exception.
    let fault = catch(|| unsafe { nested_ud() });
    want(fault, 11, trap::gate_error(6, true), None, "#UD without a present gate");
    if let Err(f) = fault {
        same!(f.frame.rip, mem::code(nested_ud), "RIP of #NP after #UD");
    }
    descriptors::IDT.get()[6] = gate;

    // A contributory exception and then a page fault: the page fault comes alone. #DE's gate lies in the first page, the
    // table's first page is missing, #PF's gate must not be: so the stack is what misses. #DE on IST 3 in a missing page.
    let ist = descriptors::TSS.get().ist[2];
    descriptors::TSS.get().ist[2] = HOLE + 0x1000;
    descriptors::set_gate(0, trap::stub(0), 0, 3);
    // SAFETY: ends in an exception.
    let fault = catch(|| unsafe { nested_div() });
    want(fault, 14, 2, Some(HOLE + 0x1000 - 8), "#DE whose frame cannot be pushed");
    descriptors::reset_gate(0);
    descriptors::TSS.get().ist[2] = ist;
    let _ = space;
    say!("double faults, and pairs that are none");
}

fn canonical(space: Space) {
    for at in [0x0000_8000_0000_0000u64, 0xffff_7fff_ffff_fff8, 1 << 63, 0x8000_0000_0000] {
        cpu::set_cr2(0x777);
        want(catch(|| _ = mem::read8(at)), 13, 0, None, "a read");
        want(catch(|| mem::write64(at, 0)), 13, 0, None, "a write");
        want(user::access(user::code::user_read8, at, 0), 13, 0, None, "a read from CPL 3");
        want(user::access(user::code::user_write64, at, 0), 13, 0, None, "a write from CPL 3");
        let jump = user::access(user::code::user_jump, at, 0);
        want(jump, 13, 0, None, "a jump from CPL 3");
        same!(cpu::cr2(), 0x777, "CR2 after #GP");
    }
    // The last bytes below the hole: mapped, but the access runs over the edge.
    let edge = 0x0000_7fff_ffff_f000;
    space.map(edge, frames::take(), W | U);
    check!(catch(|| mem::write64(edge + 0xff8, 1)).is_ok(), "the last word below the hole");
    want(catch(|| mem::write64(edge + 0xffc, 1)), 13, 0, None, "a write over the edge");
    check!(catch(|| _ = mem::read64(0xffff_8000_0000_0000)).is_err_and(|f| f.vector() == 14), "upper edge");
    for at in [0u64, 1 << 47] {
        let result = catch(|| {
            // SAFETY: the fault is wanted; where there is none the pushed word is popped.
            unsafe {
                asm!("mov {s}, rbp", "mov rbp, {a}", "mov {v}, [rbp]", "mov rbp, {s}", s = out(reg) _, a = in(reg) at | HOLE & 0, v = out(reg) _)
            }
        });
        if at != 0 {
            // #SS for the stack segment; QEMU's translator says #GP, so both vectors are taken, the error code is not.
            check!(
                result.is_err_and(|f| matches!(f.vector(), 12 | 13) && f.error() == 0),
                "RBP not canonical"
            );
        }
    }
    say!("addresses that are not canonical");
}

pub fn run(space: Space) {
    tables(space);
    doubles(space);
    canonical(space);
}
