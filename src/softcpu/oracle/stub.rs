//! The code around a case on the host: loads the guest's vector state, registers and flags, enters, stores everything.
//!
//! There is one such stub for each code size. 32-bit code is reached by a far jump: every Linux process may use the flat
//! 32-bit code segment. For 16-bit code there are segments of 64 KiB in the process's LDT, which begin at
//! [`super::place::BASE`].

use super::place::{BASE, CONTEXT, Trap};
use iced_x86::code_asm::*;
use std::mem::offset_of;

/// Selectors of the flat code and data segments of Linux.
const USER32_CS: u16 = 0x23;
const USER_CS: u16 = 0x33;
const USER_DS: u32 = 0x2b;
/// Selectors of the 16-bit segments, the first two of the LDT.
pub const LDT_CODE: u16 = 0x07;
pub const LDT_DATA: u16 = 0x0f;

/// What the stubs load and store.
#[repr(C, align(64))]
pub struct Context {
    /// The FXSAVE image.
    pub fx: [u8; 512],
    /// The upper halves of the YMM registers.
    pub ymm: [u8; 256],
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15.
    pub gprs: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// The host's stack while the registers are the guest's.
    pub host_rsp: u64,
    /// Where to go on after a trap, and after the code.
    pub resume: u64,
    /// Linear address of where the code is entered.
    pub entry: u64,
    /// The far pointer to where other code is entered.
    pub far: [u32; 2],
    /// FS base, the guest's and the host's.
    pub fs: u64,
    pub host_fs: u64,
    /// The host's MXCSR.
    pub host_mxcsr: u64,
    /// Set while the registers may be the guest's.
    pub running: u64,
    /// Set until the guest's code is reached in single steps.
    pub entering: u64,
    /// What the code adds to its addresses.
    pub origin: u64,
    /// What a trap found.
    pub trap: Trap,
    pub trap_rip: u64,
    pub trap_rflags: u64,
}

const _: () = assert!(size_of::<Context>() <= 0x1000);

/// No trap came.
pub const NO_TRAP: u64 = 0xff;

/// The stub for one code size.
#[derive(Clone)]
pub struct Stub {
    pub bits: u32,
    /// Code to be placed at [`BASE`].
    pub code: Vec<u8>,
    /// Offset of what follows a trap and the end of the code.
    pub resume: usize,
    /// What is placed behind a case's code to come back.
    pub back: Vec<u8>,
    /// The selector of the code.
    pub selector: u16,
}

impl Stub {
    /// Whether the segments of 16-bit code must exist.
    pub fn needs_ldt(&self) -> bool {
        self.bits == 16
    }
}

const REGISTERS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
const YMM: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

fn at(offset: usize) -> u64 {
    CONTEXT + offset as u64
}

fn field(offset: usize) -> AsmMemoryOperand {
    qword_ptr(at(offset))
}

/// The stub for 64-, 32- or 16-bit code.
pub fn assemble(bits: u32) -> Result<Stub, iced_x86::IcedError> {
    let fs_base = bits == 64 && super::silicon::has_fs();
    let mut a = CodeAssembler::new(64)?;
    for register in SAVED {
        a.push(register)?;
    }
    let data = if bits == 16 { LDT_DATA.into() } else { USER_DS };
    if bits != 64 {
        // 64-bit mode does not look at these, whatever they hold.
        a.mov(eax, data)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(ss, eax)?;
    }
    if fs_base {
        a.rdfsbase(rax)?;
        a.mov(field(offset_of!(Context, host_fs)), rax)?;
        a.mov(rax, field(offset_of!(Context, fs)))?;
        a.wrfsbase(rax)?;
    }
    a.stmxcsr(dword_ptr(at(offset_of!(Context, host_mxcsr))))?;
    a.fxrstor64(ptr(at(offset_of!(Context, fx))))?;
    if super::silicon::has_avx() {
        for (i, register) in YMM.into_iter().enumerate() {
            a.vinsertf128(register, register, xmmword_ptr(at(offset_of!(Context, ymm) + 16 * i)), 1)?;
        }
    }
    a.mov(field(offset_of!(Context, host_rsp)), rsp)?;
    a.push(field(offset_of!(Context, rflags)))?;
    a.popfq()?;
    for (i, register) in REGISTERS.into_iter().enumerate() {
        a.mov(register, field(8 * i + offset_of!(Context, gprs)))?;
    }
    let mut code = a.assemble(BASE)?;
    // JMP m64, or JMP m16:32, at an absolute address.
    let (reg, pointer) = match bits {
        64 => (0x24, offset_of!(Context, entry)),
        _ => (0x2c, offset_of!(Context, far)),
    };
    code.extend([0xff, reg, 0x25]);
    code.extend((at(pointer) as u32).to_le_bytes());
    let resume = code.len();
    let target = (BASE as u32 + resume as u32).to_le_bytes();
    let back = match bits {
        64 => [&[0xff, 0x24, 0x25][..], &(at(offset_of!(Context, resume)) as u32).to_le_bytes()].concat(),
        32 => [&[0xea][..], &target, &USER_CS.to_le_bytes()].concat(),
        _ => [&[0x66, 0xea][..], &target, &USER_CS.to_le_bytes()].concat(),
    };
    code.extend(leave(fs_base)?.assemble(BASE + resume as u64)?);
    let selector = match bits {
        64 => USER_CS,
        32 => USER32_CS,
        _ => LDT_CODE,
    };
    Ok(Stub { bits, code, resume, back, selector })
}

/// The way back.
fn leave(fs_base: bool) -> Result<CodeAssembler, iced_x86::IcedError> {
    let mut a = CodeAssembler::new(64)?;
    for (i, register) in REGISTERS.into_iter().enumerate() {
        a.mov(field(8 * i + offset_of!(Context, gprs)), register)?;
    }
    a.mov(eax, USER_DS)?;
    a.mov(ss, eax)?;
    a.mov(rsp, field(offset_of!(Context, host_rsp)))?;
    a.pushfq()?;
    a.pop(field(offset_of!(Context, rflags)))?;
    // Neither direction nor alignment checks nor single steps for what follows.
    a.push(2)?;
    a.popfq()?;
    if super::silicon::has_avx() {
        for (i, register) in YMM.into_iter().enumerate() {
            a.vextractf128(xmmword_ptr(at(offset_of!(Context, ymm) + 16 * i)), register, 1)?;
        }
        a.vzeroupper()?;
    }
    a.fxsave64(ptr(at(offset_of!(Context, fx))))?;
    a.fninit()?;
    a.ldmxcsr(dword_ptr(at(offset_of!(Context, host_mxcsr))))?;
    if fs_base {
        a.mov(rax, field(offset_of!(Context, host_fs)))?;
        a.wrfsbase(rax)?;
    }
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;
    Ok(a)
}

/// Selector of 64-bit user code, which a signal handler returns to.
pub const fn user_cs() -> u16 {
    USER_CS
}
