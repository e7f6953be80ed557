//! The second opinion: one instruction executed with the whole guest state loaded into the real registers.
//!
//! It shares nothing with the stubs but the processor: all sixteen general registers (RSP too) hold the guest's
//! values, the full image is loaded with the guest's own MXCSR, the upper halves of the YMM registers where the host has
//! them, exceptions unmasked as the guest has them, and a SIGFPE is caught and reported. The memory operand is addressed from RIP.

use std::cell::Cell;
use std::sync::Once;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, OpKind, Register, code_asm::*};

use crate::native::FpuContext;

const PAGE: usize = 4096;
const FX: usize = PAGE;
const HOST_FX: usize = PAGE + 512;
pub const MEM: usize = PAGE + 1024;
const GPR: usize = PAGE + 2048;
const RFLAGS: usize = PAGE + 2176;
const HOST_RSP: usize = PAGE + 2184;
const HIGH: usize = PAGE + 2560;

/// Every vector register.
const VECTORS: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];

thread_local! {
    /// Where the instruction is, where to go on after a trap, and whether one came.
    static WATCH: Cell<(u64, u64, bool)> = const { Cell::new((0, 0, false)) };
}

/// What the processor did.
pub struct Seen {
    pub image: [u8; 512],
    pub ymm_high: [u128; 16],
    pub mem: [u8; 512],
    pub gprs: [u64; 16],
    pub rflags: u64,
    pub trapped: bool,
}

pub struct Reference {
    base: *mut u8,
}

impl Reference {
    pub fn new() -> Self {
        catch_signals();
        // SAFETY: a fresh mapping for this test alone; writable and executable at once is tolerable in a test.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            libc::mmap(
                std::ptr::null_mut(),
                2 * PAGE,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self { base: base.cast() }
    }

    fn at(&self, place: usize) -> u64 {
        self.base as u64 + place as u64
    }

    fn put(&self, place: usize, bytes: &[u8]) {
        assert!(place + bytes.len() <= 2 * PAGE);
        // SAFETY: inside the mapping, as just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(place), bytes.len()) }
    }

    fn take<const N: usize>(&self, place: usize) -> [u8; N] {
        assert!(place + N <= 2 * PAGE);
        let mut bytes = [0; N];
        // SAFETY: inside the mapping, as just checked.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(place), bytes.as_mut_ptr(), N) }
        bytes
    }

    /// Assembles around the instruction; returns the addresses of the instruction and of what follows it.
    fn assemble(&self, instruction: &Instruction, shift: u64) -> (u64, u64) {
        let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        let avx = is_x86_feature_detected!("avx");
        let mut a = CodeAssembler::new(64).unwrap();
        for register in [rbx, rbp, r12, r13, r14, r15] {
            a.push(register).unwrap();
        }
        a.mov(rdi, self.at(0)).unwrap();
        a.mov(qword_ptr(rdi + HOST_RSP), rsp).unwrap();
        a.fxsave64(byte_ptr(rdi + HOST_FX)).unwrap();
        a.fxrstor64(byte_ptr(rdi + FX)).unwrap();
        if avx {
            for (number, ymm) in VECTORS.into_iter().enumerate() {
                a.vinsertf128(ymm, ymm, xmmword_ptr(rdi + HIGH + 16 * number), 1).unwrap();
            }
        }
        a.push(qword_ptr(rdi + RFLAGS)).unwrap();
        a.popfq().unwrap();
        for (number, register) in registers.into_iter().enumerate() {
            if number != 7 {
                a.mov(register, qword_ptr(rdi + GPR + 8 * number)).unwrap();
            }
        }
        a.mov(rdi, qword_ptr(rdi + GPR + 56)).unwrap();
        let mut code = a.assemble(self.at(0)).unwrap();
        let start = self.at(0) + code.len() as u64;

        let mut op = *instruction;
        if (0..op.op_count()).any(|operand| op.op_kind(operand) == OpKind::Memory) {
            op.set_segment_prefix(Register::None);
            op.set_memory_base(Register::RIP);
            op.set_memory_index(Register::None);
            op.set_memory_index_scale(1);
            op.set_memory_displ_size(8);
            op.set_memory_displacement64(self.at(MEM) + shift);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&op, start).unwrap_or_else(|error| panic!("{:?}: {error}", op.code()));
        code.extend(encoder.take_buffer());
        let end = self.at(0) + code.len() as u64;

        let mut a = CodeAssembler::new(64).unwrap();
        // The accumulator has a form with a full address.
        let place = MemoryOperand::with_displ(self.at(GPR), 8);
        a.add_instruction(Instruction::with2(Code::Mov_moffs64_RAX, place, Register::RAX).unwrap()).unwrap();
        a.mov(rax, self.at(0)).unwrap();
        for (number, register) in registers.into_iter().enumerate().skip(1) {
            a.mov(qword_ptr(rax + GPR + 8 * number), register).unwrap();
        }
        a.mov(rsp, qword_ptr(rax + HOST_RSP)).unwrap();
        a.pushfq().unwrap();
        a.pop(qword_ptr(rax + RFLAGS)).unwrap();
        if avx {
            for (number, ymm) in VECTORS.into_iter().enumerate() {
                a.vextractf128(xmmword_ptr(rax + HIGH + 16 * number), ymm, 1).unwrap();
            }
            a.vzeroupper().unwrap();
        }
        a.fxsave64(byte_ptr(rax + FX)).unwrap();
        a.fninit().unwrap();
        a.fxrstor64(byte_ptr(rax + HOST_FX)).unwrap();
        for register in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(register).unwrap();
        }
        a.ret().unwrap();
        code.extend(a.assemble(end).unwrap());
        self.put(0, &code);
        (start, end)
    }

    /// Executes one instruction on a copy of the state.
    pub fn run(
        &self,
        instruction: &Instruction,
        context: &FpuContext,
        gprs: &[u64; 16],
        rflags: u64,
    ) -> Seen {
        let (start, end) = self.assemble(instruction, 0);
        self.run_assembled(start, end, context, gprs, rflags)
    }

    /// Whether the processor refuses a memory operand that is not aligned.
    pub fn wants_alignment(&self, instruction: &Instruction, context: &FpuContext) -> bool {
        let (start, end) = self.assemble(instruction, 1);
        self.run_assembled(start, end, context, &[0; 16], 2).trapped
    }

    fn run_assembled(
        &self,
        start: u64,
        end: u64,
        context: &FpuContext,
        gprs: &[u64; 16],
        rflags: u64,
    ) -> Seen {
        self.put(FX, context.image());
        self.put(HIGH, &context.ymm_highs().map(u128::to_le_bytes).concat());
        self.put(MEM, &context.mem);
        for (number, value) in gprs.iter().enumerate() {
            self.put(GPR + 8 * number, &value.to_le_bytes());
        }
        self.put(RFLAGS, &((rflags & 0x8D5) | 0x202).to_le_bytes());
        WATCH.with(|watch| watch.set((start, end, false)));
        // SAFETY: the code was just assembled there, follows the calling convention and returns; a trap in the middle
        // of it is brought to its end by the handler.
        unsafe {
            std::arch::asm!(
                "mov {saved}, rbx", "cpuid", "mov rbx, {saved}",
                saved = out(reg) _, inout("eax") 0 => _, out("ecx") _, out("edx") _,
                options(nostack, preserves_flags)
            );
            let entry: extern "sysv64" fn() = std::mem::transmute(self.base);
            entry();
        }
        let mut after = [0; 16];
        for (number, value) in after.iter_mut().enumerate() {
            *value = u64::from_le_bytes(self.take(GPR + 8 * number));
        }
        let trapped = WATCH.with(|watch| watch.replace((0, 0, false)).2);
        Seen {
            image: self.take(FX),
            ymm_high: std::array::from_fn(|i| u128::from_le_bytes(self.take(HIGH + 16 * i))),
            mem: self.take(MEM),
            gprs: after,
            rflags: u64::from_le_bytes(self.take(RFLAGS)),
            trapped,
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value.
        unsafe { libc::munmap(self.base.cast(), 2 * PAGE) };
    }
}

/// Lets SIGFPE and SIGSEGV in a watched instruction continue after it, on a stack of its own since RSP may be the guest's.
pub fn catch_signals() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: an all-zero sigaction is valid, and the handler has the signature that SA_SIGINFO wants.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in [libc::SIGFPE, libc::SIGSEGV] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
    });
    thread_local! {
        static STACK: () = alternate_stack();
    }
    STACK.with(|()| ());
}

/// RSP may be the guest's when a signal comes: the handler needs a stack of its own on each thread of the tests.
fn alternate_stack() {
    let size = 64 << 10;
    let stack = Box::leak(vec![0_u8; size].into_boxed_slice());
    let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: size };
    // SAFETY: the memory is never freed.
    assert_eq!(unsafe { libc::sigaltstack(&alternate, std::ptr::null_mut()) }, 0);
}

extern "C" fn on_signal(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO.
    let rip = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let (start, end, _) = WATCH.with(Cell::get);
    if *rip as u64 != start || start == 0 {
        // SAFETY: ends the process; nothing of ours runs on.
        unsafe { libc::abort() };
    }
    WATCH.with(|watch| watch.set((0, 0, true)));
    *rip = end as i64;
}
