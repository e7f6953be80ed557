//! #TS, #NP, #SS and #GP with selectors in their error codes, LAR, LSL, VERR and VERW, in long mode.

use core::arch::asm;
use rt::{
    check, descriptors,
    descriptors::{FREE_SLOT, GDT, TSS, flat, segment},
    same, say,
    trap::{self, Fault},
};

/// Selector of the slot that the cases fill.
const SELECTOR: u64 = FREE_SLOT as u64 * 8;

fn caught(body: impl FnOnce()) -> (u64, u64) {
    let result: Result<(), Fault> = trap::catch(body);
    // Whatever a case loaded is put right again.
    restore();
    result.map_or_else(|f| (f.vector(), f.error()), |()| (!0, 0))
}

fn restore() {
    // SAFETY: the runtime's own selectors.
    unsafe {
        asm!("mov ds, {d:e}", "mov es, {d:e}", "mov ss, {d:e}", d = in(reg) u64::from(descriptors::KERNEL_DATA))
    };
}

fn load_ds(selector: u64) -> (u64, u64) {
    // SAFETY: DS plays no part in long mode.
    caught(|| unsafe { asm!("mov ds, {0:e}", in(reg) selector) })
}

fn load_ss(selector: u64) -> (u64, u64) {
    // SAFETY: a bad selector is refused; a good one is flat.
    caught(|| unsafe { asm!("mov ss, {0:e}", in(reg) selector) })
}

fn far_return(selector: u64) -> (u64, u64) {
    caught(|| {
        // SAFETY: comes back at the label, or by a fault.
        unsafe {
            asm!("push {s}", "lea {t}, [rip + 2f]", "push {t}", "retfq", "2:", "push 8", "lea {t}, [rip + 3f]", "push {t}", "retfq", "3:",
                s = in(reg) selector, t = out(reg) _)
        }
    })
}

const FINE: (u64, u64) = (!0, 0);

pub fn run() {
    selectors();
    task_register();
    stack_table();
    queries();
}

fn set(descriptor: u64) {
    GDT.get()[FREE_SLOT] = descriptor;
}

fn selectors() {
    let data = flat(0x93, 0xc);
    set(data);
    same!(load_ds(SELECTOR), FINE, "data in DS");
    same!(load_ds(0), FINE, "null in DS");
    same!(load_ds(3), FINE, "null with RPL 3 in DS");
    same!(load_ds(0x1000), (13, 0x1000), "a selector past the GDT");
    same!(load_ds(SELECTOR | 4), (13, SELECTOR | 4), "a selector of the LDT, where none is");
    set(data & !(1 << 47));
    same!(load_ds(SELECTOR), (11, SELECTOR), "data that is not present");
    same!(load_ss(SELECTOR), (12, SELECTOR), "a stack that is not present");
    set(flat(0x99, 0xa));
    same!(load_ds(SELECTOR), (13, SELECTOR), "code that cannot be read");
    set(flat(0x9b, 0xa));
    same!(load_ds(SELECTOR), FINE, "code that can");
    same!(load_ss(SELECTOR), (13, SELECTOR), "code as a stack");
    set(flat(0x91, 0xc));
    same!(load_ss(SELECTOR), (13, SELECTOR), "read-only data as a stack");
    set(segment(0, 103, 0x89, 0));
    same!(load_ds(SELECTOR), (13, SELECTOR), "a system descriptor in DS");
    set(flat(0x92, 0xc));
    same!(load_ss(SELECTOR), FINE, "a stack");
    same!(GDT.get()[FREE_SLOT] >> 40 & 1, 1, "the accessed bit is set");
    same!(load_ss(SELECTOR | 3), (13, SELECTOR), "a stack with another RPL");
    set(flat(0xf3, 0xc));
    same!(load_ss(SELECTOR), (13, SELECTOR), "a stack with another DPL");
    same!(load_ss(0), FINE, "a null stack at CPL 0");
    // QEMU's translator lets three things pass here.
    let strict = !rt::cpu::is_qemu_tcg();
    if strict {
        same!(load_ss(3), (13, 0), "a null stack with RPL 3");
    }
    set(flat(0x9b, 0xa));
    same!(far_return(SELECTOR), FINE, "a far return to code");
    set(flat(0x9b, 0xa) & !(1 << 47));
    same!(far_return(SELECTOR), (11, SELECTOR), "to code that is not present");
    set(flat(0x9b, 0xe));
    if strict {
        same!(far_return(SELECTOR), (13, SELECTOR), "to code with both L and D");
    }
    set(data);
    same!(far_return(SELECTOR), (13, SELECTOR), "to data");
    same!(far_return(0), (13, 0), "to null");
    set(flat(0xfb, 0xa));
    same!(far_return(SELECTOR), (13, SELECTOR), "to CPL 3's code without RPL 3");
    set(flat(0x9f, 0xa));
    same!(far_return(SELECTOR), FINE, "to conforming code");
    say!("selectors refused and taken");
}

fn task_register() {
    let ltr = |selector: u64| {
        // SAFETY: refused, in all these cases.
        caught(|| unsafe { asm!("ltr {0:x}", in(reg) selector) })
    };
    same!(
        ltr(u64::from(descriptors::TASK)),
        (13, u64::from(descriptors::TASK)),
        "LTR of a task that is busy"
    );
    if !rt::cpu::is_qemu_tcg() {
        same!(ltr(0), (13, 0), "LTR of null");
    }
    set(flat(0x93, 0xc));
    same!(ltr(SELECTOR), (13, SELECTOR), "LTR of data");
    set(segment(TSS.addr(), 103, 0x09, 0));
    GDT.get()[FREE_SLOT + 1] = 0;
    same!(ltr(SELECTOR), (11, SELECTOR), "LTR of a task that is not present");
    let lldt = |selector: u64| {
        // SAFETY: a null or present LDT.
        caught(|| unsafe { asm!("lldt {0:x}", in(reg) selector) })
    };
    same!(lldt(0), FINE, "LLDT of null");
    set(segment(0, 7, 0x82, 0));
    same!(lldt(SELECTOR), FINE, "LLDT");
    set(segment(0, 7, 0x02, 0));
    same!(lldt(SELECTOR), (11, SELECTOR), "LLDT of one that is not present");
    set(flat(0x93, 0xc));
    same!(lldt(SELECTOR), (13, SELECTOR), "LLDT of data");
    // An LDT of one descriptor, in use.
    let table = [flat(0x93, 0xc)];
    set(segment(table.as_ptr() as u64, 7, 0x82, 0));
    GDT.get()[FREE_SLOT + 1] = 0;
    same!(lldt(SELECTOR), FINE, "LLDT");
    same!(load_ds(4), FINE, "a selector of the LDT");
    same!(load_ds(12), (13, 12), "one past its end");
    same!(lldt(0), FINE, "none again");
    same!(load_ds(4), (13, 4), "no LDT, no selector");
    say!("LTR and LLDT");
}

/// A TSS that ends before the stack that a gate asks for: #TS with the task's selector.
fn stack_table() {
    let saved = GDT.get()[10];
    // IST 7 lies at 0x54; the segment ends before it.
    GDT.get()[10] = segment(TSS.addr(), 0x53, 0x89, 0);
    descriptors::reload_task();
    descriptors::set_gate(0x90, trap::stub(0x90), 0, 7);
    let int = || {
        // SAFETY: the handler ends the guarded call.
        caught(|| unsafe { asm!("int 0x90") })
    };
    same!(int(), (10, u64::from(descriptors::TASK)), "a stack past the TSS's end");
    GDT.get()[10] = saved & !(2 << 40);
    descriptors::reload_task();
    // A stack pointer that is not canonical: #SS.
    TSS.get().ist[6] = 1 << 47;
    let got = int();
    // The error code is zero or SS, depending on the processor.
    let good = got == (12, 0) || got == (12, 0x10) || rt::cpu::is_qemu_tcg() && got.0 == 13;
    check!(good, "a stack that is not canonical: {got:x?}");
    TSS.get().ist[6] = descriptors::top(&descriptors::SPARE_STACK) - 3;
    // The stack is aligned to 16 bytes first, so any address will do.
    same!(int(), (0x90, 0), "a stack that is not aligned");
    descriptors::reset_gate(0x90);
    say!("#TS and #SS by the stack table");
}

fn queries() {
    let lar = |selector: u64| -> (u64, bool) {
        let (mut value, zero) = (0xdead_u64, 0u8);
        let mut zero = zero;
        // SAFETY: reads a descriptor.
        unsafe {
            asm!("lar {v:e}, {s:e}", "setz {z}", v = inout(reg) value, s = in(reg) selector, z = inout(reg_byte) zero)
        };
        (value, zero != 0)
    };
    let lsl = |selector: u64| -> (u64, bool) {
        let (mut value, mut zero) = (0xdead_u64, 0u8);
        // SAFETY: as above.
        unsafe {
            asm!("lsl {v:e}, {s:e}", "setz {z}", v = inout(reg) value, s = in(reg) selector, z = inout(reg_byte) zero)
        };
        (value, zero != 0)
    };
    let verify = |selector: u64| -> (bool, bool) {
        let (r, w): (u8, u8);
        // SAFETY: as above.
        unsafe {
            asm!("verr {s:x}", "setz {r}", "verw {s:x}", "setz {w}", s = in(reg) selector, r = out(reg_byte) r, w = out(reg_byte) w)
        };
        (r != 0, w != 0)
    };
    set(segment(0x1234_5678, 0xf_edcb, 0x93, 0xc));
    // The limit's bits among them are undefined.
    let (rights, valid) = lar(SELECTOR);
    same!((rights & !0xf_0000, valid), (0x00c0_9300, true), "LAR of data");
    same!(lsl(SELECTOR), (0xfedc_bfff, true), "LSL in pages");
    same!(verify(SELECTOR), (true, true), "VERR and VERW of data");
    set(segment(0, 0x1234, 0x91, 0));
    same!((lsl(SELECTOR), verify(SELECTOR)), ((0x1234, true), (true, false)), "read-only data");
    set(flat(0x99, 0xa));
    same!(verify(SELECTOR), (false, false), "code that cannot be read");
    set(segment(0, 0x67, 0x89, 0));
    same!((lar(SELECTOR), lsl(SELECTOR)), ((0x8900, true), (0x67, true)), "a task");
    set(0x8e00 << 32);
    same!((lar(SELECTOR).1, lsl(SELECTOR)), (false, (0xdead, false)), "an interrupt gate");
    same!((lar(0), lsl(0), verify(0)), ((0xdead, false), (0xdead, false), (false, false)), "null");
    same!(lar(0xfff8), (0xdead, false), "past the GDT");
    set(flat(0x93, 0xc));
    same!(lar(SELECTOR | 3), (0xdead, false), "a better segment asked for with RPL 3");
    say!("LAR, LSL, VERR, VERW");
}
