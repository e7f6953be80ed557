//! The state of one software CPU while it runs: registers, hidden segment state, TLB, what an instruction under way has
//! asked the VMM and been answered.
//!
//! Instruction handlers get `&mut Core` and nothing else; decoded blocks live apart ([`crate::cache`]), so that a handler
//! cannot pull the code it runs in from under itself.

use crate::attention::Attention;
use crate::exceptions::{Event, Exception};
use crate::flags::Flags;
use crate::memory::Override;
use crate::op::{REG_IP, Stop};
use crate::tlb::Tlb;
use crate::width::REG_SLOTS;
use guestmem::{GuestMemory, Gva, Hpa};
use mmu::{Counter, Counters, Intercepts, PagingState, TableRoot, TlbFlush};
use std::sync::Arc;
use vcpu::state::seg;
use vcpu::{Answer, Exit, Segment, TableRegister, TableStores, VcpuError};

/// Model-specific registers that the CPU holds itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// Added to ticks to give the time-stamp counter (as WRMSR to IA32_TIME_STAMP_COUNTER leaves it).
    pub tsc_offset: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// Fixed- and variable-range MTRRs and the default type: held, with no effect, as memory types have none here.
    pub mtrr: [u64; 32],
}

/// The state of one CPU. What translated code uses stands at the front, within reach of short displacements.
#[repr(C)]
pub struct Core {
    /// 0–15: general registers; 16: zero; 17: RIP; the rest unused. While a block runs RIP is that of its first
    /// instruction.
    pub regs: [u64; REG_SLOTS],
    /// What translated code and its surroundings tell each other.
    pub hot: crate::translate::Hot,
    /// RFLAGS.
    pub flags: Flags,
    /// Segment bases as 64-bit addressing adds them: zero but for FS and GS.
    pub seg_base64: [u64; 8],
    /// The TLB.
    pub tlb: Tlb,
    /// Where host memory is mapped in this process.
    pub host_base: u64,
    /// Guest and host memory.
    pub memory: Arc<GuestMemory>,
    /// 64-bit mode: CS.L in long mode.
    pub mode64: bool,
    /// RIP alone names the code: 64-bit mode, or a CS that is the whole of the address space.
    pub flat_code: bool,
    /// Current privilege level.
    pub cpl: u8,
    /// Bits of RIP that count: 16, 32 or 64 of them.
    pub ip_mask: u64,
    /// What decoding depends on, as a key for decoded blocks: see [`crate::cache`].
    pub code_key: u64,
    /// What must be looked at before the next instruction.
    pub attention: Attention,
    /// Virtual time.
    pub ticks: u64,
    /// Ticks that were added and not executed.
    pub added_ticks: u64,
    /// When to stop.
    pub deadline: u64,
    /// Stop where plain user code begins: see [`crate::user_mode`].
    pub stop_at_user: bool,
    /// User code with interrupts disabled may be another processor's: see [`crate::user_mode`].
    pub goes_without_interrupts: bool,

    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0, CR3, CR4, EFER, PKRU, PDPTEs.
    pub paging: PagingState,
    /// CR2.
    pub cr2: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0–DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// MSRs.
    pub msrs: Msrs,
    /// x87, MMX and SSE.
    pub fpu: Box<crate::native::FpuContext>,
    /// The CPU model.
    pub model: crate::model::CpuModel,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,

    /// How the hardware walk finds translations.
    pub root: TableRoot,
    /// What exits.
    pub intercepts: Intercepts,
    /// What was counted.
    pub counters: Counters,

    /// The exception that [`Stop::Exception`] stands for.
    pub exception: Exception,
    /// The exit that [`Stop::Exit`] stands for.
    pub exit: Option<Exit>,
    /// The range that [`Stop::CodeWrite`] is about.
    pub code_write: (Hpa, u64),
    /// Ranges of decoded bytes written by the instruction under way, to be dropped when it is complete.
    pub code_writes_done: Vec<(Hpa, u64)>,
    /// The event being delivered; it stays until delivery is complete, so that an exit on the way can be resumed.
    pub event: Option<Event>,
    /// Answers that the instruction under way has received, in order.
    pub replay: Vec<Answer>,
    /// How many of them it has used in this attempt.
    pub replayed: usize,
    /// Translations that hold for the instruction under way only.
    pub overrides: Vec<Override>,
    /// Guest-physical pages that the nested walk is to find absent, for the instruction under way only.
    pub absent: Vec<mmu::nested::Absent>,
    /// Stores done under [`Answer::TableWrite`].
    pub table_stores: TableStores,
    /// A failure of the engine.
    pub failure: Option<VcpuError>,
    /// Native stubs and vector state.
    pub native: crate::vector::Native,
}

impl Core {
    /// A CPU after power-up (SDM Vol. 3 table 10-1), whose walks go nowhere until [`Core::root`] is set.
    pub fn new(memory: Arc<GuestMemory>, model: crate::model::CpuModel) -> Self {
        let data = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
        let code = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
        let paging = PagingState { phys_bits: model.phys_bits(), ..PagingState::default() };
        let mut core = Self {
            regs: [0; REG_SLOTS],
            hot: crate::translate::Hot::default(),
            flags: Flags::default(),
            seg_base64: [0; 8],
            tlb: Tlb::default(),
            host_base: memory.host().base() as u64,
            memory,
            mode64: false,
            flat_code: false,
            cpl: 0,
            ip_mask: 0xffff,
            code_key: 0,
            attention: Attention::empty(),
            ticks: 0,
            added_ticks: 0,
            deadline: u64::MAX,
            stop_at_user: false,
            goes_without_interrupts: false,
            segments: [data, code, data, data, data, data],
            ldtr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x82 },
            tr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            paging,
            cr2: 0,
            xcr0: 1,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            msrs: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
            fpu: Box::default(),
            model,
            nmi_blocked: false,
            root: TableRoot::Nested {
                root: Hpa(0),
                format: mmu::entry::Ept { phys_bits: 46, accessed_dirty: false },
            },
            intercepts: Intercepts::empty(),
            counters: Counters::default(),
            exception: Exception::default(),
            exit: None,
            code_write: (Hpa(0), 0),
            code_writes_done: Vec::new(),
            event: None,
            replay: Vec::new(),
            replayed: 0,
            overrides: Vec::new(),
            absent: Vec::new(),
            table_stores: TableStores::new(),
            failure: None,
            native: crate::vector::Native::default(),
        };
        core.regs[usize::from(REG_IP)] = 0xfff0;
        core.regs[2] = core.model.signature();
        core.mode_changed();
        core
    }

    /// Asks the VMM something: gives the answer if the instruction under way has already had it, else stops with the
    /// exit.
    pub fn ask(&mut self, exit: Exit) -> Result<Answer, Stop> {
        if let Some(answer) = self.replay.get(self.replayed) {
            self.replayed += 1;
            return Ok(answer.clone());
        }
        self.exit = Some(exit);
        Err(Stop::Exit)
    }

    /// As [`Self::ask`], for exits that are answered by `Done` or `GeneralProtection`.
    pub fn ask_done(&mut self, exit: Exit) -> Result<(), Stop> {
        match self.ask(exit)? {
            Answer::GeneralProtection => Err(self.gp(0)),
            _ => Ok(()),
        }
    }

    /// As [`Self::ask`], for exits that are answered by a value or `GeneralProtection`.
    pub fn ask_value(&mut self, exit: Exit) -> Result<u64, Stop> {
        match self.ask(exit)? {
            Answer::Value(v) => Ok(v),
            Answer::GeneralProtection => Err(self.gp(0)),
            _ => Ok(0),
        }
    }

    /// Raises an exception. `return Err(core.raise(...))`.
    #[cold]
    pub fn raise(&mut self, exception: Exception) -> Stop {
        self.exception = exception;
        Stop::Exception
    }

    /// #GP with an error code.
    #[cold]
    pub fn gp(&mut self, code: u16) -> Stop {
        self.raise(Exception::with_code(13, code))
    }

    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.raise(Exception::plain(6))
    }

    /// #NM.
    #[cold]
    pub fn nm(&mut self) -> Stop {
        self.raise(Exception::plain(7))
    }

    /// #SS with an error code.
    #[cold]
    pub fn ss(&mut self, code: u16) -> Stop {
        self.raise(Exception::with_code(12, code))
    }

    /// #TS with an error code.
    #[cold]
    pub fn ts(&mut self, code: u16) -> Stop {
        self.raise(Exception::with_code(10, code))
    }

    /// #NP with an error code.
    #[cold]
    pub fn np(&mut self, code: u16) -> Stop {
        self.raise(Exception::with_code(11, code))
    }

    /// RIP of the block that runs, or of the next instruction between blocks.
    #[inline(always)]
    pub fn ip(&self) -> u64 {
        self.regs[usize::from(REG_IP)]
    }

    /// Sets RIP, cut to the mode's width. Only terminators of blocks may.
    #[inline(always)]
    pub fn set_ip(&mut self, ip: u64) {
        self.regs[usize::from(REG_IP)] = ip & self.ip_mask;
    }

    /// Linear address of an instruction pointer.
    #[inline(always)]
    pub fn code_linear(&self, ip: u64) -> u64 {
        if self.mode64 { ip } else { self.segments[seg::CS].base.wrapping_add(ip) & 0xffff_ffff }
    }

    /// The time-stamp counter now, not counting the instruction under way.
    pub fn tsc(&self) -> u64 {
        self.model.ticks_to_tsc(self.ticks).wrapping_add(self.msrs.tsc_offset)
    }

    /// Makes the TLB forget, and counts it.
    pub fn flush_tlb(&mut self, flush: TlbFlush) {
        let before = self.tlb.flushes;
        self.tlb.flush(flush, self.host_base);
        self.counters.add(Counter::TlbFlushes, self.tlb.flushes - before);
    }

    /// Drops what held for the instruction under way: it is complete.
    pub fn end_transient(&mut self) {
        self.replay.clear();
        self.replayed = 0;
        self.overrides.clear();
        self.absent.clear();
        self.attention.remove(Attention::TRANSIENT);
    }

    /// Counts a delivered event.
    pub fn count_event(&mut self, is_page_fault: bool, is_exception: bool) {
        if is_page_fault {
            self.counters.count(Counter::GuestPageFaults);
        } else if is_exception {
            self.counters.count(Counter::GuestExceptions);
        }
    }

    /// A page fault or canonical violation is about this address.
    pub fn gva(&self, lin: u64) -> Gva {
        Gva(lin)
    }
}
