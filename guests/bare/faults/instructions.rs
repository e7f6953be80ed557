//! Instructions with one memory operand, and what there is to know of each.

use core::arch::global_asm;

macro_rules! instructions {
    ($($name:ident: $text:literal),* $(,)?) => {
        global_asm!(
            ".section .user.restart, \"ax\"",
            $(concat!(stringify!($name), ":"), $text, "int 0x30",)*
            ".text",
        );
        unsafe extern "C" { $(pub fn $name();)* }
    };
}

instructions! {
    i_mov_load: "mov rax, [rdi]", i_mov_store: "mov [rdi], rax", i_mov32: "mov [rdi], eax", i_mov16: "mov [rdi], ax",
    i_add: "add [rdi], rax", i_lock_add: "lock add [rdi], rax", i_inc: "inc dword ptr [rdi]",
    i_not: "not qword ptr [rdi]", i_neg: "neg qword ptr [rdi]", i_shl: "shl qword ptr [rdi], 3",
    i_rcr: "rcr qword ptr [rdi], 5", i_xchg: "xchg [rdi], rax", i_xadd: "lock xadd [rdi], rbx",
    i_cmpxchg: "lock cmpxchg [rdi], rbx", i_cmpxchg8b: "lock cmpxchg8b [rdi]", i_cmpxchg16b: "lock cmpxchg16b [rdi]",
    i_bts: "lock bts qword ptr [rdi], 5", i_shld: "shld [rdi], rax, 9", i_imul: "imul rax, [rdi]",
    i_div: "div qword ptr [rdi]", i_cmp: "cmp [rdi], rax", i_test: "test [rdi], rax", i_adc: "adc [rdi], rbx",
    i_movups_load: "movups xmm0, [rdi]", i_movups_store: "movups [rdi], xmm0", i_movq: "movq [rdi], xmm0",
    i_fst: "fstp qword ptr [rdi]", i_fild: "fild qword ptr [rdi]", i_push: "push rax", i_push_imm: "push 0x1234",
    i_pushf: "pushfq", i_pop: "pop rax", i_popf: "popfq", i_ret: "ret", i_leave: "leave", i_enter: "enter 0, 0",
    i_call: "call 2f; 2:", i_setc: "setc byte ptr [rdi]", i_cmov: "cmovc rax, [rdi]", i_movbe: "movnti [rdi], rax",
    i_sgdt: "sgdt [rdi]", i_movsx: "movsxd rax, dword ptr [rdi]", i_xlat: "xlatb",
    i_stosb: "rep stosb", i_stosq: "rep stosq", i_movsb: "rep movsb", i_movsq: "rep movsq", i_cmpsb: "repe cmpsb",
    i_scasw: "repne scasw", i_lodsd: "rep lodsd", i_push_mem: "push qword ptr [rdi]", i_pop_mem: "pop qword ptr [rdi]",
    i_movs_one: "movsq", i_call_mem: "call [rdi]",
}

/// A piece of assembly by its address.
pub type Code = unsafe extern "C" fn();

#[derive(Clone, Copy, PartialEq, Eq)]
/// Where an instruction's memory operand lies.
pub enum Where {
    /// At [RDI].
    Memory,
    /// Below RSP.
    Push,
    /// At RSP.
    Pop,
}
pub use Where::{Memory, Pop, Push};

/// Name, code, where the operand lies, its size, whether it is written.
pub const CASES: &[(&str, Code, Where, u64, bool)] = &[
    ("mov load", i_mov_load, Memory, 8, false),
    ("mov store", i_mov_store, Memory, 8, true),
    ("mov store 4", i_mov32, Memory, 4, true),
    ("mov store 2", i_mov16, Memory, 2, true),
    ("add", i_add, Memory, 8, true),
    ("lock add", i_lock_add, Memory, 8, true),
    ("inc", i_inc, Memory, 4, true),
    ("not", i_not, Memory, 8, true),
    ("neg", i_neg, Memory, 8, true),
    ("shl", i_shl, Memory, 8, true),
    ("rcr", i_rcr, Memory, 8, true),
    ("xchg", i_xchg, Memory, 8, true),
    ("xadd", i_xadd, Memory, 8, true),
    ("cmpxchg", i_cmpxchg, Memory, 8, true),
    ("cmpxchg8b", i_cmpxchg8b, Memory, 8, true),
    ("cmpxchg16b", i_cmpxchg16b, Memory, 16, true),
    ("bts", i_bts, Memory, 8, true),
    ("shld", i_shld, Memory, 8, true),
    ("adc", i_adc, Memory, 8, true),
    ("imul", i_imul, Memory, 8, false),
    ("div", i_div, Memory, 8, false),
    ("cmp", i_cmp, Memory, 8, false),
    ("test", i_test, Memory, 8, false),
    ("movups load", i_movups_load, Memory, 16, false),
    ("movups store", i_movups_store, Memory, 16, true),
    ("movq store", i_movq, Memory, 8, true),
    ("fstp", i_fst, Memory, 8, true),
    ("fild", i_fild, Memory, 8, false),
    ("setc", i_setc, Memory, 1, true),
    ("cmovc not taken", i_cmov, Memory, 8, false),
    ("movnti", i_movbe, Memory, 8, true),
    ("movsxd", i_movsx, Memory, 4, false),
    ("push", i_push, Push, 8, true),
    ("push imm", i_push_imm, Push, 8, true),
    ("pushf", i_pushf, Push, 8, true),
    ("call", i_call, Push, 8, true),
    ("enter", i_enter, Push, 8, true),
    ("pop", i_pop, Pop, 8, false),
    ("popf", i_popf, Pop, 8, false),
    ("leave", i_leave, Memory, 8, false),
];
