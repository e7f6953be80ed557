//! Port I/O: widths, registers kept, string forms, faults between elements, and the permission bitmap.

use core::arch::{asm, global_asm};
use rt::{
    check, cpu, descriptors, frames,
    global::Global,
    io::{self, COM1, inb, inl, inw, outb},
    mem,
    paging::{HIGH, P, Space, W},
    same, say, trap, user,
};

/// The serial line's scratch register keeps any byte.
const SCRATCH: u16 = COM1 + 7;
/// A port that nobody answers.
const NOBODY: u16 = 0x5670;

global_asm!(
    r#"
    .section .user.ports, "ax"
    .globl u_in8, u_in16, u_in32, u_out8, u_insb
u_in8:
    mov edx, edi
    in al, dx
    int 0x30
u_in16:
    mov edx, edi
    in ax, dx
    int 0x30
u_in32:
    mov edx, edi
    in eax, dx
    int 0x30
u_out8:
    mov edx, edi
    mov eax, esi
    out dx, al
    int 0x30
u_insb:
    mov edx, edi
    lea rdi, [rsp - 64]
    mov ecx, 3
    rep insb
    int 0x30
    .text
"#
);

unsafe extern "C" {
    fn u_in8();
    fn u_in16();
    fn u_in32();
    fn u_out8();
    fn u_insb();
}

pub fn run() {
    widths();
    strings();
    faults();
    bitmap();
}

fn widths() {
    for byte in [0u8, 0x55, 0xaa, 0xff, 0x12] {
        outb(SCRATCH, byte);
        same!(inb(SCRATCH), byte, "the scratch register");
    }
    // The slave controller's mask has an immediate form's address.
    let (mut value, flags): (u64, u64);
    // SAFETY: interrupts are off; the mask ends as all ones.
    unsafe {
        asm!("mov al, 0x5a", "out 0xa1, al", "mov rax, -1", "in al, 0xa1", out("rax") value);
        same!(value, 0xffff_ffff_ffff_ff5a, "IN AL keeps the upper bits of RAX");
        asm!("mov rax, -1", "in eax, dx", in("dx") NOBODY, out("rax") value);
        same!(value, 0xffff_ffff, "IN EAX clears them");
        asm!("xor eax, eax", "in ax, dx", in("dx") NOBODY, out("rax") value);
        same!(value, 0xffff, "IN AX keeps them");
        asm!("push 0x8d7", "popfq", "in al, dx", "out dx, al", "pushfq", "pop {f}", f = out(reg) flags,
            in("dx") NOBODY, out("al") _);
        same!(flags & 0x8d5, 0x8d5, "flags are left alone");
    }
    outb(0xa1, 0xff);
    same!((inb(NOBODY), inw(NOBODY), inl(NOBODY)), (0xff, 0xffff, !0), "a port that nobody answers");
    io::outw(NOBODY, 0x1234);
    io::outl(NOBODY, 0x1234_5678);
    same!(inl(NOBODY), !0, "and keeps nothing");
    say!("port widths");
}

fn strings() {
    let text = *b"string output to the debug console\n";
    let mut buffer = [0u8; 64];
    // SAFETY: the buffers are ours.
    unsafe {
        let (rest, at): (u64, u64);
        asm!("rep outsb", inout("rcx") text.len() as u64 => rest, inout("rsi") text.as_ptr() => at, in("dx") 0xe9u16);
        same!((rest, at), (0, text.as_ptr() as u64 + text.len() as u64), "RCX and RSI after REP OUTSB");
        // To the scratch register: the last byte stays. Upwards, then downwards.
        asm!("rep outsb", inout("rcx") 5u64 => _, inout("rsi") text.as_ptr() => _, in("dx") SCRATCH);
        same!(inb(SCRATCH), text[4], "the last of five bytes");
        asm!("std", "rep outsb", "cld", inout("rcx") 5u64 => _, inout("rsi") text.as_ptr().add(4) => _, in("dx") SCRATCH);
        same!(inb(SCRATCH), text[0], "the last of five bytes, downwards");
        let end: u64;
        asm!("rep insb", inout("rcx") 32u64 => _, inout("rdi") buffer.as_mut_ptr() => end, in("dx") SCRATCH);
        same!(end, buffer.as_ptr() as u64 + 32, "RDI after REP INSB");
        check!(buffer[..32].iter().all(|b| *b == text[0]) && buffer[32] == 0, "32 bytes by REP INSB");
        asm!("rep insw", inout("rcx") 4u64 => _, inout("rdi") buffer.as_mut_ptr() => _, in("dx") NOBODY);
        check!(buffer[..8] == [0xff; 8] && buffer[8] == text[0], "4 words by REP INSW");
        asm!("std", "rep insd", "cld", inout("rcx") 3u64 => _, inout("rdi") buffer.as_mut_ptr().add(40) => _, in("dx") NOBODY);
        check!(
            buffer[32..44] == [0xff; 12] && buffer[31] == text[0] && buffer[44] == 0,
            "3 words downwards by REP INSD"
        );
        // A count of zero does nothing at all.
        let before = inb(SCRATCH);
        asm!("rep outsb", inout("rcx") 0u64 => _, inout("rsi") 1u64 << 50 => _, in("dx") SCRATCH);
        same!(inb(SCRATCH), before, "no byte");
        // With a 32-bit address size only ECX counts, and RSI is cut to 32 bits.
        let (rest, at): (u64, u64);
        let from = text.as_ptr() as u64;
        asm!(".byte 0x67", "rep outsb", inout("rcx") 2u64 => rest, inout("rsi") from | 1 << 40 => at, in("dx") SCRATCH);
        same!((rest, at, inb(SCRATCH)), (0, from + 2, text[1]), "REP OUTSB with a 32-bit address size");
        asm!("outsb", inout("rsi") text.as_ptr() => _, in("dx") SCRATCH);
        same!(inb(SCRATCH), text[0], "one OUTSB");
        asm!("insb", inout("rdi") buffer.as_mut_ptr().add(50) => _, in("dx") SCRATCH);
        same!(buffer[50], text[0], "one INSB");
    }
    say!("string I/O");
}

static WHERE: Global<u64> = Global::new(0);

fn faults() {
    let space = Space::current();
    let frames = [frames::take(), frames::take()];
    for (n, frame) in frames.iter().enumerate() {
        (0..512).for_each(|i| mem::write64(frame + i * 8, (n as u64 + 1) * 0x0101_0101_0101_0101));
        space.map(HIGH + n as u64 * 4096, *frame, W);
    }
    let slot = space.slot(HIGH + 4096, 1);
    let start = HIGH + 4096 - 10;
    mem::write64(slot, 0);
    cpu::invlpg(HIGH + 4096);
    outb(SCRATCH, 0x99);
    // SAFETY: the fault in the second page is wanted; RCX, RSI and RDI are in its frame.
    let fault = trap::catch(|| unsafe {
        asm!("rep outsb", inout("rcx") 20u64 => _, inout("rsi") start => _, in("dx") SCRATCH)
    });
    check!(fault.is_err_and(|f| (f.vector(), f.error(), f.cr2) == (14, 0, HIGH + 4096)), "REP OUTSB's fault");
    check!(fault.is_err_and(|f| (f.frame.rcx, f.frame.rsi) == (10, HIGH + 4096)), "after ten bytes");
    same!(inb(SCRATCH), 1, "the last byte before it");
    for flags in [0, P] {
        mem::write64(slot, frames[1] | flags);
        cpu::invlpg(HIGH + 4096);
        outb(SCRATCH, 0x77);
        // SAFETY: as above.
        let fault = trap::catch(|| unsafe {
            asm!("rep insb", inout("rcx") 20u64 => _, inout("rdi") start => _, in("dx") SCRATCH)
        });
        check!(
            fault.is_err_and(|f| (f.vector(), f.error(), f.cr2) == (14, flags | 2, HIGH + 4096)),
            "REP INSB's fault"
        );
        check!(fault.is_err_and(|f| (f.frame.rcx, f.frame.rdi) == (10, HIGH + 4096)), "after ten bytes");
        same!(mem::read64(HIGH + 4096 - 8), 0x7777_7777_7777_7777, "ten bytes came in");
        same!(mem::read64(frames[1]), 0x0202_0202_0202_0202, "and no more");
    }
    // The handler maps the page and the instruction goes on.
    WHERE.store(slot);
    trap::on(
        14,
        Some(|_| {
            let slot = WHERE.load();
            mem::write64(slot, mem::read64(slot) | P | W);
            cpu::invlpg(HIGH + 4096);
            true
        }),
    );
    let rest: u64;
    // SAFETY: as above.
    unsafe { asm!("rep insb", inout("rcx") 20u64 => rest, inout("rdi") start => _, in("dx") SCRATCH) };
    trap::on(14, None);
    same!(
        (rest, mem::read64(frames[1]), mem::read8(frames[1] + 10)),
        (0, 0x7777_7777_7777_7777, 2),
        "twenty bytes"
    );
    say!("faults between elements");
}

/// A TSS with a permission bitmap for all ports, and the byte of ones behind it.
#[repr(C, align(4096))]
struct Task {
    tss: [u8; 104],
    bitmap: [u8; 8193],
}

static TASK: Global<Task> = Global::new(Task { tss: [0; 104], bitmap: [0xff; 8193] });

fn bitmap() {
    let task = TASK.get();
    let old = descriptors::TSS.addr();
    mem::copy(TASK.addr(), old, 104);
    let gdt = descriptors::GDT.get();
    let saved = gdt[10];
    let install = |limit: u64| {
        descriptors::GDT.get()[10] = descriptors::segment(TASK.addr(), limit, 0x89, 0);
        descriptors::reload_task();
    };
    install(104 + 8192);
    let denied = |code: unsafe extern "C" fn(), port: u16| {
        user::access(code, port.into(), 0).is_err_and(|f| (f.vector(), f.error()) == (13, 0))
    };
    let code: [unsafe extern "C" fn(); 5] = [u_in8, u_in16, u_in32, u_out8, u_insb];
    check!(code.iter().all(|c| denied(*c, SCRATCH)), "everything denied");
    task.bitmap[usize::from(SCRATCH) / 8] &= !(1 << (SCRATCH % 8));
    outb(SCRATCH, 0x3c);
    same!(user::access(u_in8, SCRATCH.into(), 0).map(|v| v as u8).ok(), Some(0x3c), "one port allowed");
    check!(user::access(u_out8, SCRATCH.into(), 0xc3).is_ok());
    same!(inb(SCRATCH), 0xc3, "written from CPL 3");
    check!(user::access(u_insb, SCRATCH.into(), 0).is_ok(), "INSB from the port");
    check!(denied(u_in8, SCRATCH - 1) && denied(u_in8, SCRATCH + 1), "its neighbours denied");
    check!(denied(u_in16, SCRATCH) && denied(u_in16, SCRATCH - 1), "a word needs both ports");
    for i in 0..4 {
        let port = usize::from(NOBODY) + i;
        check!(denied(u_in32, NOBODY), "four ports, {i} allowed");
        task.bitmap[port / 8] &= !(1 << (port % 8));
    }
    same!(user::access(u_in32, NOBODY.into(), 0).ok(), Some(0xffff_ffff), "four ports allowed");
    // The last port needs the byte behind the bitmap.
    task.bitmap[8191] &= 0x7f;
    check!(user::access(u_in8, 0xffff, 0).is_ok(), "port 0xffff");
    check!(denied(u_in16, 0xffff), "a word over the end");
    // A TSS that ends before the bitmap's byte denies.
    install(104 + u64::from(SCRATCH) / 8 - 1);
    check!(denied(u_in8, SCRATCH), "a bitmap cut off");
    // IOPL 3 asks no bitmap.
    let mut frame = user::frame(user::address(u_in8));
    frame.rflags |= 3 << 12;
    frame.rdi = SCRATCH.into();
    same!(user::run(&frame).vector(), user::BACK, "IOPL 3");
    gdt[10] = saved & !(2 << 40);
    descriptors::reload_task();
    say!("the permission bitmap");
}
