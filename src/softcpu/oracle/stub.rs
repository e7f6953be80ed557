//! The code around one instruction on the host: loads the guest's registers and flags, leaves room for the instruction,
//! stores everything.
//!
//! There is one such stub for each code size. 32-bit code is reached by a far jump: every Linux process may use the flat
//! 32-bit code segment. For 16-bit code there are segments of 64 KiB in the process's LDT, which begin at [`BASE`]. All
//! live at fixed addresses below 2 GiB, so that everything can be addressed absolutely once all sixteen registers hold
//! the guest's values, and so that the instruction has the same address here as in the guest.

use iced_x86::code_asm::*;

/// Where code, context and data lie, on the host and in the guest alike.
pub const BASE: u64 = 0x2000_0000;
/// The context, in the page after the code.
pub const CONTEXT: u64 = BASE + 0x1000;
/// Two pages of data; on either side is nothing.
pub const DATA: u64 = BASE + 0x3000;
/// Length of the data.
pub const DATA_LEN: u64 = 0x2000;
/// Room for an instruction.
pub const SLOT: usize = 16;

/// Selectors of the flat code and data segments of Linux.
const USER32_CS: u16 = 0x23;
const USER_CS: u16 = 0x33;
const USER_DS: u32 = 0x2b;
/// Selectors of the 16-bit segments, the first two of the LDT.
pub const LDT_CODE: u16 = 0x07;
pub const LDT_DATA: u16 = 0x0f;

/// What code of that size adds to its addresses.
pub const fn origin(bits: u32) -> u64 {
    if bits == 16 { BASE } else { 0 }
}

/// What the stubs load and store.
#[repr(C)]
pub struct Context {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15.
    pub gprs: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// The host's stack while the registers are the guest's.
    pub host_rsp: u64,
    /// Where to go on after a trap.
    pub resume: u64,
    /// The vector of the trap, or [`NO_TRAP`].
    pub trap: u64,
    /// The far pointer to a slot outside 64-bit mode.
    pub far: [u32; 2],
}

/// No trap came.
pub const NO_TRAP: u64 = 0xff;

/// The stub for one code size.
#[derive(Clone)]
pub struct Stub {
    /// Code to be placed at [`BASE`].
    pub code: Vec<u8>,
    /// Offset of the slot in it.
    pub slot: usize,
    /// Offset of what follows a trap.
    pub resume: usize,
    /// The far pointer to be stored in [`Context::far`].
    pub far: [u32; 2],
}

impl Stub {
    /// Whether the segments of 16-bit code must exist.
    pub fn needs_ldt(&self) -> bool {
        self.far[1] == u32::from(LDT_CODE)
    }
}

const REGISTERS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

fn field(offset: usize) -> AsmMemoryOperand {
    qword_ptr(CONTEXT + offset as u64)
}

/// The stub for 64-, 32- or 16-bit code.
pub fn assemble(bits: u32) -> Result<Stub, iced_x86::IcedError> {
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
    a.mov(field(std::mem::offset_of!(Context, host_rsp)), rsp)?;
    a.push(field(std::mem::offset_of!(Context, rflags)))?;
    a.popfq()?;
    for (i, register) in REGISTERS.into_iter().enumerate() {
        a.mov(register, field(8 * i))?;
    }
    let mut code = a.assemble(BASE)?;
    if bits != 64 {
        // JMP m16:32 at an absolute address.
        code.extend([0xff, 0x2c, 0x25]);
        code.extend(((CONTEXT as usize + std::mem::offset_of!(Context, far)) as u32).to_le_bytes());
    }
    let slot = code.len();
    code.extend([0x90; SLOT]);
    if bits != 64 {
        // JMP ptr16:32, back to 64-bit code; 16-bit code needs a prefix for it.
        code.extend(if bits == 16 { &[0x66][..] } else { &[] });
        let back = BASE as u32 + code.len() as u32 + 7;
        code.push(0xea);
        code.extend(back.to_le_bytes());
        code.extend(USER_CS.to_le_bytes());
    }
    let resume = code.len();

    let mut a = CodeAssembler::new(64)?;
    for (i, register) in REGISTERS.into_iter().enumerate() {
        a.mov(field(8 * i), register)?;
    }
    a.mov(eax, USER_DS)?;
    a.mov(ss, eax)?;
    a.mov(rsp, field(std::mem::offset_of!(Context, host_rsp)))?;
    a.pushfq()?;
    a.pop(field(std::mem::offset_of!(Context, rflags)))?;
    a.cld()?;
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;
    code.extend(a.assemble(BASE + resume as u64)?);
    let selector = if bits == 16 { LDT_CODE } else { USER32_CS };
    let offset = (BASE - origin(bits)) as u32 + slot as u32;
    Ok(Stub { code, slot, resume, far: [offset, selector.into()] })
}

/// Selector of 64-bit user code, which a signal handler returns to.
pub const fn user_cs() -> u16 {
    USER_CS
}
