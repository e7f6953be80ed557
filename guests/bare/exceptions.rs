//! Every exception that the processor raises by itself, outside paging: vector, error code, whether RIP is that of the instruction (fault) or
//! of the next one (trap), what the debug registers say, and which of two comes first (SDM Vol. 3, 7.15; 18.3 "Debug Exceptions").
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "each exception has its instruction in assembly")]

#[path = "exceptions/debug.rs"]
mod debug;
#[path = "exceptions/segment.rs"]
mod segment;

use core::arch::{asm, global_asm};
use rt::{
    check, cpu,
    global::Global,
    mem,
    paging::{Space, U, W},
    same, say,
    trap::{self, Fault},
    user,
};

rt::guest!("exceptions", main);

/// Code as a function that is entered by its address.
pub type Code = unsafe extern "C" fn();

fn main() {
    let space = Space::new();
    user::map(space);
    space.load();
    plain();
    fpu();
    privileged();
    control_registers();
    alignment();
    priorities(space);
    debug::run(space);
    segment::run();
}

/// Runs code until its exception.
pub fn caught(code: Code) -> Fault {
    // SAFETY: the code ends in an exception, or returns, which the default result shows.
    match trap::catch(|| unsafe { code() }) {
        Ok(()) => Fault::default(),
        Err(fault) => fault,
    }
}

/// The vector, the error code, and how far RIP is from a label.
pub fn compare(fault: Fault, vector: u64, error: u64, rip: Code, what: &str) {
    same!((fault.vector(), fault.error(), fault.frame.rip), (vector, error, mem::code(rip)), "{what}");
}

macro_rules! snippets {
    ($($name:ident $at:ident: $before:literal, $text:literal, $after:literal;)*) => {
        global_asm!(
            ".section .user.snippets, \"ax\"",
            $(concat!(stringify!($name), ":"), $before, concat!(stringify!($at), ":"), $text, $after,
              concat!("0: ret"),)*
            ".text",
        );
        #[allow(dead_code, reason = "not every case looks at its label")]
        unsafe extern "C" { $(fn $name(); fn $at();)* }
    };
}
pub(crate) use snippets;

snippets! {
    // The label behind the name is the RIP that the frame must hold.
    x_de x_de_at: "xor ecx, ecx; mov eax, 1; cdq", "idiv ecx", "";
    x_de_overflow x_de_overflow_at: "xor eax, eax; mov edx, 0x80000000; mov ecx, -1", "idiv ecx", "";
    x_bp x_bp_at: "int3", "", "";
    x_bp_long x_bp_long_at: ".byte 0xcd, 3", "", "";
    x_of x_of_at: "int 4", "", "";
    x_ud x_ud_at: "", "ud2", "";
    x_ud1 x_ud1_at: "", ".byte 0x0f, 0xb9, 0xc0", "";
    x_nm_fpu x_nm_fpu_at: "", "fld1", "";
    x_nm_sse x_nm_sse_at: "", "pxor xmm0, xmm0", "";
    x_nm_mmx x_nm_mmx_at: "", "pxor mm0, mm0", "";
    x_wait x_wait_at: "", "wait", "";
    x_mf x_mf_at: "fninit; push 0x37b; fldcw [rsp]; pop rax; fld1; fldz; fdivp", "fld1", "";
    x_mf_wait x_mf_wait_at: "fninit; push 0x37b; fldcw [rsp]; pop rax; fld1; fldz; fdivp; fnop", "wait", "";
    x_xm x_xm_at: "push 0x1d80; ldmxcsr [rsp]; pop rax; mov eax, 1; cvtsi2ss xmm0, eax; xorps xmm1, xmm1", "divss xmm0, xmm1", "";
    x_gp_null x_gp_null_at: "mov rdi, 0x800000000000", "mov rax, [rdi]", "";
    p_hlt p_hlt_at: "", "hlt", "";
    p_cli p_cli_at: "", "cli", "";
    p_sti p_sti_at: "", "sti", "";
    p_cr0 p_cr0_at: "", "mov rax, cr0", "";
    p_cr3 p_cr3_at: "", "mov cr3, rax", "";
    p_cr8 p_cr8_at: "", "mov rax, cr8", "";
    p_dr7 p_dr7_at: "", "mov rax, dr7", "";
    p_lgdt p_lgdt_at: "", "lgdt [rsp]", "";
    p_lidt p_lidt_at: "", "lidt [rsp]", "";
    p_ltr p_ltr_at: "", "ltr ax", "";
    p_lldt p_lldt_at: "", "lldt ax", "";
    p_clts p_clts_at: "", "clts", "";
    p_lmsw p_lmsw_at: "", "lmsw ax", "";
    p_invlpg p_invlpg_at: "", "invlpg [rsp]", "";
    p_wbinvd p_wbinvd_at: "", "wbinvd", "";
    p_rdmsr p_rdmsr_at: "mov ecx, 0x1b", "rdmsr", "";
    p_wrmsr p_wrmsr_at: "mov ecx, 0x1b", "wrmsr", "";
    p_in p_in_at: "", "in al, 0x21", "";
    p_out p_out_at: "mov edx, 0xf4", "out dx, al", "";
    p_iret p_iret_at: "push 0; push 0; push 2; push 0x13; push 0", "iretq", "";
    p_sgdt p_sgdt_at: "lea rdi, [rsp - 64]", "sgdt [rdi]", "int 0x30";
    p_smsw p_smsw_at: "", "smsw rax", "int 0x30";
    p_str p_str_at: "", "str eax", "int 0x30";
    p_rdtsc p_rdtsc_at: "", "rdtsc", "int 0x30";
    p_popf p_popf_at: "push 0x3202; popfq; pushfq; pop rax", "", "int 0x30";
    a_mov a_mov_at: "", "mov rax, [rdi]", "int 0x30";
    a_mov2 a_mov2_at: "", "mov [rdi], ax", "int 0x30";
    a_movups a_movups_at: "", "movups xmm0, [rdi]", "int 0x30";
    a_movaps a_movaps_at: "", "movaps xmm0, [rdi]", "int 0x30";
    a_push a_push_at: "mov rsp, rdi", "push rax", "int 0x30";
}

fn plain() {
    compare(caught(x_de), 0, 0, x_de_at, "a division by zero");
    // QEMU's translator does this very division on its host, and dies of it.
    if !cpu::is_qemu_tcg() {
        compare(caught(x_de_overflow), 0, 0, x_de_overflow_at, "a quotient that is too large");
    }
    compare(caught(x_bp), 3, 0, x_bp_at, "INT3");
    compare(caught(x_bp_long), 3, 0, x_bp_long_at, "INT 3 in two bytes");
    compare(caught(x_of), 4, 0, x_of_at, "INT 4");
    compare(caught(x_ud), 6, 0, x_ud_at, "UD2");
    compare(caught(x_ud1), 6, 0, x_ud1_at, "UD1");
    let fault = caught(x_gp_null);
    compare(fault, 13, 0, x_gp_null_at, "an address that is not canonical");
    // Faults push RF as one, traps as it was; QEMU's translator does not.
    if !cpu::is_qemu_tcg() {
        for (code, rf) in [(x_de as Code, true), (x_ud, true), (x_gp_null, true), (x_bp, false)] {
            same!(caught(code).frame.rflags >> 16 & 1 != 0, rf, "RF in the frame");
        }
    }
    say!("#DE, #BP, #OF, #UD, #GP");
}

fn fpu() {
    cpu::change_cr0(cpu::CR0_TS, 0);
    compare(caught(x_nm_fpu), 7, 0, x_nm_fpu_at, "x87 with CR0.TS");
    compare(caught(x_nm_sse), 7, 0, x_nm_sse_at, "SSE with CR0.TS");
    compare(caught(x_nm_mmx), 7, 0, x_nm_mmx_at, "MMX with CR0.TS");
    compare(caught(x_wait), 7, 0, x_wait_at, "WAIT with TS and MP");
    cpu::change_cr0(0, cpu::CR0_MP);
    same!(caught(x_wait).vector(), 0, "WAIT with TS and without MP");
    cpu::change_cr0(cpu::CR0_EM | cpu::CR0_MP, cpu::CR0_TS);
    compare(caught(x_nm_fpu), 7, 0, x_nm_fpu_at, "x87 with CR0.EM");
    compare(caught(x_nm_sse), 6, 0, x_nm_sse_at, "SSE with CR0.EM");
    compare(caught(x_nm_mmx), 6, 0, x_nm_mmx_at, "MMX with CR0.EM");
    cpu::change_cr0(0, cpu::CR0_EM);
    // An x87 error is reported by the next waiting instruction.
    // QEMU's translator reports it at WAIT only, and later instructions of the snippet are not reached.
    if !cpu::is_qemu_tcg() {
        compare(caught(x_mf), 16, 0, x_mf_at, "an x87 division by zero, at the next instruction");
    }
    compare(caught(x_mf_wait), 16, 0, x_mf_wait_at_or_fnop(), "the same, at WAIT");
    // SAFETY: leaves the x87 clean.
    unsafe { asm!("fninit") };
    // QEMU's translator raises no #XM.
    if !cpu::is_qemu_tcg() {
        compare(caught(x_xm), 19, 0, x_xm_at, "an SSE division by zero");
        cpu::change_cr4(0, 1 << 10);
        compare(caught(x_xm), 6, 0, x_xm_at, "the same without CR4.OSXMMEXCPT");
        cpu::change_cr4(1 << 10, 0);
    }
    let mxcsr = 0x1f80u32;
    // SAFETY: the default value.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &mxcsr) };
    cpu::change_cr4(0, 1 << 9);
    compare(caught(x_nm_sse), 6, 0, x_nm_sse_at, "SSE without CR4.OSFXSR");
    cpu::change_cr4(1 << 9, 0);
    say!("#NM, #MF, #XM");
}

/// FNOP is an x87 instruction and waits, so the error is reported there, one instruction (two bytes) before WAIT.
fn x_mf_wait_at_or_fnop() -> Code {
    static PLACE: Global<u64> = Global::new(0);
    PLACE.store(mem::code(x_mf_wait_at) - 2);
    // SAFETY: only its address is used.
    unsafe { core::mem::transmute::<u64, Code>(PLACE.load()) }
}

fn at_user(code: Code) -> Fault {
    user::run(&user::frame(user::address(code)))
}

fn privileged() {
    let refused: [(&str, Code, Code); 18] = [
        ("HLT", p_hlt, p_hlt_at),
        ("CLI", p_cli, p_cli_at),
        ("STI", p_sti, p_sti_at),
        ("MOV from CR0", p_cr0, p_cr0_at),
        ("MOV to CR3", p_cr3, p_cr3_at),
        ("MOV from CR8", p_cr8, p_cr8_at),
        ("MOV from DR7", p_dr7, p_dr7_at),
        ("LGDT", p_lgdt, p_lgdt_at),
        ("LIDT", p_lidt, p_lidt_at),
        ("LTR", p_ltr, p_ltr_at),
        ("LLDT", p_lldt, p_lldt_at),
        ("CLTS", p_clts, p_clts_at),
        ("LMSW", p_lmsw, p_lmsw_at),
        ("INVLPG", p_invlpg, p_invlpg_at),
        ("WBINVD", p_wbinvd, p_wbinvd_at),
        ("RDMSR", p_rdmsr, p_rdmsr_at),
        ("WRMSR", p_wrmsr, p_wrmsr_at),
        ("IN", p_in, p_in_at),
    ];
    for (name, code, at) in refused {
        let fault = at_user(code);
        same!(
            (fault.vector(), fault.error(), fault.frame.rip),
            (13, 0, user::address(at)),
            "{name} at CPL 3"
        );
    }
    same!((at_user(p_out).vector(), at_user(p_out).error()), (13, 0), "OUT at CPL 3");
    same!(
        (at_user(p_iret).vector(), at_user(p_iret).error()),
        (13, 0x10),
        "IRETQ to CPL 3's better at CPL 3"
    );
    let back = user::BACK;
    for code in [p_sgdt as Code, p_smsw, p_str] {
        same!(at_user(code).vector(), back, "a store of system state at CPL 3");
    }
    if cpu::has(7, 2, 2) {
        cpu::change_cr4(cpu::CR4_UMIP, 0);
        for code in [p_sgdt as Code, p_smsw, p_str] {
            same!((at_user(code).vector(), at_user(code).error()), (13, 0), "the same with CR4.UMIP");
        }
        cpu::change_cr4(0, cpu::CR4_UMIP);
    }
    same!(at_user(p_rdtsc).vector(), back, "RDTSC at CPL 3");
    cpu::change_cr4(cpu::CR4_TSD, 0);
    same!((at_user(p_rdtsc).vector(), at_user(p_rdtsc).error()), (13, 0), "RDTSC with CR4.TSD");
    cpu::change_cr4(0, cpu::CR4_TSD);
    let end = at_user(p_popf);
    same!((end.vector(), end.frame.rax & 0x3200), (back, 0), "POPF at CPL 3 changes neither IF nor IOPL");
    say!("privileged instructions at CPL 3");
}

/// Values that the control registers refuse. QEMU's translator takes what it does not know.
fn control_registers() {
    if cpu::is_qemu_tcg() {
        return rt::skip("control register values that are refused");
    }
    let gp = |body: &dyn Fn()| trap::catch(body).is_err_and(|f| (f.vector(), f.error()) == (13, 0));
    check!(gp(&|| cpu::set_cr0(cpu::cr0() & !cpu::CR0_PE)), "PG without PE");
    check!(gp(&|| cpu::set_cr0(cpu::cr0() & !(1 << 30) | 1 << 29)), "NW without CD");
    check!(gp(&|| cpu::set_cr0(cpu::cr0() | 1 << 32)), "CR0 bit 32");
    check!(gp(&|| cpu::set_cr4(cpu::cr4() & !cpu::CR4_PAE)), "PAE off in long mode");
    check!(gp(&|| cpu::set_cr4(cpu::cr4() | 1 << 31)), "CR4 bit 31");
    check!(gp(&|| cpu::set_cr4(cpu::cr4() | 1 << 63)), "CR4 bit 63");
    check!(gp(&|| cpu::wrmsr(cpu::EFER, cpu::rdmsr(cpu::EFER) | 1 << 63)), "EFER bit 63");
    check!(gp(&|| cpu::set_dr7(1 << 32)), "DR7 bit 32");
    check!(gp(&|| cpu::set_dr6(1 << 32)), "DR6 bit 32");
    for msr in [cpu::FS_BASE, cpu::GS_BASE, cpu::KERNEL_GS_BASE, cpu::LSTAR] {
        check!(gp(&|| cpu::wrmsr(msr, 1 << 63)), "MSR {msr:#x} not canonical");
    }
    say!("control register values that are refused");
}

fn alignment() {
    cpu::change_cr0(cpu::CR0_AM, 0);
    let at = user::STACK_TOP - 0x800;
    let go = |code: Code, offset: u64, ac: bool| {
        let mut frame = user::frame(user::address(code));
        frame.rdi = at + offset;
        frame.rflags |= if ac { 1 << 18 } else { 0 };
        let end = user::run(&frame);
        (end.vector(), end.error())
    };
    let back = (user::BACK, 0);
    for code in [a_mov as Code, a_mov2, a_push] {
        same!(go(code, 0, true), back, "an aligned access with AC");
        same!(go(code, 1, false), back, "one that is not, without AC");
        if !cpu::is_qemu_tcg() {
            same!(go(code, 1, true), (17, 0), "one that is not, with AC");
        }
    }
    same!(go(a_mov2, 2, true), back, "two bytes at an even address");
    same!(go(a_movups, 0, true), back, "MOVUPS, aligned");
    same!(go(a_movaps, 8, false), (13, 0), "MOVAPS that is not aligned");
    // Not at CPL 0, and not without CR0.AM.
    cpu::set_flags(1 << 18 | 2);
    mem::read64((&raw const at) as u64 + 1);
    cpu::set_flags(2);
    cpu::change_cr0(0, cpu::CR0_AM);
    same!(go(a_mov, 1, true), back, "without CR0.AM");
    say!("#AC");
}

snippets! {
    q_nm_pf q_nm_pf_at: "", "fld qword ptr [rdi]", "";
    q_ud_pf q_ud_pf_at: "", ".byte 0xf0; mov rax, [rdi]", "";
    q_gp_nm q_gp_nm_at: "", "movaps xmm0, [rdi]", "";
}

/// Two at once: the one that the manual puts first.
fn priorities(space: Space) {
    let hole = rt::paging::HIGH + 0x1000;
    let go = |code: Code, rdi: u64| {
        let mut frame = user::frame(user::address(code));
        frame.rdi = rdi;
        let end = user::run(&frame);
        (end.vector(), end.error())
    };
    cpu::change_cr0(cpu::CR0_TS, 0);
    same!(go(q_nm_pf, hole), (7, 0), "#NM before the operand's #PF");
    same!(go(q_gp_nm, 1 << 47), (7, 0), "#NM before the operand's #GP");
    cpu::change_cr0(0, cpu::CR0_TS);
    same!(go(q_nm_pf, hole), (14, 4), "the #PF without TS");
    if !cpu::is_qemu_tcg() {
        same!(go(q_ud_pf, hole), (6, 0), "#UD before the operand's #PF");
        same!(go(q_gp_nm, hole + 8), (13, 0), "#GP of alignment before #PF");
    }
    // An instruction over a page boundary whose second page is missing: the fetch comes before decoding an undefined one.
    let edge = rt::paging::HIGH + 0x9000;
    space.map(edge - 4096, rt::frames::take(), W | U);
    mem::write16(edge - 2, 0x0f66);
    let mut frame = user::frame(edge - 2);
    frame.rdi = hole;
    let end = user::run(&frame);
    same!((end.vector(), end.cr2, end.frame.rip), (14, edge, edge - 2), "a fetch that needs the next page");
    mem::write16(edge - 2, 0x0b0f);
    let end = user::run(&frame);
    same!((end.vector(), end.frame.rip), (6, edge - 2), "one that does not");
    say!("priorities");
}
