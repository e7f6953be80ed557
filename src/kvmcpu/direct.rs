#![allow(
    unsafe_code,
    reason = "KVM is given memory of this process, and a byte of the vCPU's page is shared with a signal handler"
)]
//! User mode on the host's processor, under the shadow tables as they are (`--cpu kvm --mmu shadow`).
//!
//! Where it stands in the path of one access: the host's processor walks the shadow tables, one-dimensionally, as the software
//! CPU does; HPAs are the vCPU's physical addresses. What leaves user mode comes here by the [`crate::stub`], and is not
//! handled: the registers go back, and the software CPU meets the same instruction, with the same fault, exit or system call. So there is
//! one place where a guest's exceptions are made, and nothing here has to know them.
//!
//! **Tables.** The processor's TLB, or a KVM that shadows the shadow tables, knows entries as they were. Before each entry the
//! stub writes those again that have changed ([`guestmem::TableEdits`]) and reloads CR3. Where a frame holds another table than
//! before, KVM is made to forget everything, by taking its memory slot away and giving it back.
//!
//! Manual: Intel SDM Vol. 3 §2.5 (CR0, CR4: TSD, UMIP, PCE), §4.10.4 (invalidation), §5.8.8 (SYSCALL).

use crate::blank::Blank;
use crate::error::{KvmError, doing};
use crate::extended::{Extended, is_same_registers};
use crate::figures::Figures;
use crate::kick::{Armed, Kick, monotonic};
use crate::registers::{to_regs, to_sregs};
use crate::run::{self, Left};
use crate::stub::{self, MOST_WORK, Stub};
use crate::synced::Synced;
use crate::tops::{Tops, Work};
use crate::visible;
use crate::walker::Walker;
use guestmem::{GuestMemory, Hpa};
use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use vcpu::{ArchState, FigureGroup};

const MEMORY_SLOT: u32 = 0;
const STUB_SLOT: u32 = 1;

// CR0: PE, MP, EM, TS, ET, NE, WP, AM, PG. EM, MP, TS and AM are the guest's, since user code feels them.
const CR0_OWN: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
const CR0_GUEST: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 18;
// CR4: TSD, PAE, UMIP; of the guest's OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE.
const CR4_OWN: u64 = 1 << 2 | 1 << 5 | 1 << 11;
const CR4_GUEST: u64 = 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18;
/// SCE is the guest's; LME, LMA and NXE are the tables'.
const EFER_SCE: u64 = 1;
const EFER_OWN: u64 = 1 << 8 | 1 << 10 | 1 << 11;
/// TF, IF, DF, IOPL, NT and AC go at SYSCALL.
const SYSCALL_MASK: u64 = 0x4_7700;
/// Faulting of CPUID (Intel, "Virtualization Technology FlexMigration Application Note" §2.3.2).
const PLATFORM_INFO: u32 = 0xce;
const CPUID_CAN_FAULT: u64 = 1 << 31;
const MISC_FEATURES: u32 = 0x140;
const CPUID_FAULTS: u64 = 1;
/// More entries than this are not written again one by one: a KVM that interprets the stub takes four microseconds for each,
/// and a millisecond to forget everything.
const MOST_REWRITTEN: usize = 512;

/// Why user mode was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// An exception.
    Vector(u8),
    /// The trap behind an instruction that began with RFLAGS.TF set.
    Step,
    /// SYSCALL.
    SystemCall,
    /// The time is over, or a signal came.
    Time,
    /// It was never entered: there is no place for the stub in the guest's address space, or user code could see something that
    /// cannot be shown.
    NoPlace,
    /// The host's KVM cannot execute the instruction that comes next.
    Emulation,
}

/// The vCPU that user mode runs on.
#[derive(Debug)]
pub struct Direct {
    // The vCPU before the machine, the machine before the memory that its slots show.
    pub(crate) vcpu: VcpuFd,
    vm: Arc<VmFd>,
    pub(crate) stub: Stub,
    memory: Arc<GuestMemory>,
    pub(crate) extended: Extended,
    initial: kvm_sregs,
    kick: Kick,
    pub(crate) synced: Synced,
    tops: Tops,
    flush: bool,
    /// The vector state and XCR0 that the vCPU has.
    pub(crate) held: Option<(Vec<u64>, Vec<u64>, u64)>,
    /// Where SYSCALL enters, as the vCPU has it.
    entry: u64,
    work: Vec<Work>,
    figures: Vec<(&'static str, Figures)>,
    /// User code has the host's own selectors, whatever the vCPU's are.
    pub(crate) host_selectors: bool,
    /// How often KVM had to forget everything.
    pub resets: u64,
    /// Entries that the stub has written again.
    pub rewritten: u64,
    /// Rounds of the stub's work.
    pub rounds: u64,
    /// Nanoseconds in KVM_RUN, for user mode and for the stub's work.
    pub inside: [u64; 2],
}

impl Direct {
    /// A vCPU over this memory.
    pub fn new(mut blank: Blank, memory: Arc<GuestMemory>) -> Result<Self, KvmError> {
        let size = memory.host().size();
        let stub = Stub::new(size)?;
        let initial = blank.vcpu.get_sregs().map_err(doing("reading the vCPU's system registers"))?;
        memory.host().start_edit_log();
        let mut figures = Vec::new();
        for (name, found) in [("machine", Figures::of(&*blank.vm)?), ("vCPU", Figures::of(&blank.vcpu)?)] {
            figures.extend(found.map(|found| (name, found)));
        }
        let synced = Synced::of(&blank.vm, &mut blank.vcpu);
        let direct = Self {
            vcpu: blank.vcpu,
            vm: blank.vm,
            stub,
            memory,
            extended: blank.extended,
            initial,
            kick: Kick::new(),
            synced,
            tops: Tops::default(),
            flush: true,
            held: None,
            entry: 0,
            work: Vec::new(),
            figures,
            host_selectors: blank.walker == Walker::KvmShadowsByItself,
            resets: 0,
            rewritten: 0,
            rounds: 0,
            inside: [0; 2],
        };
        // MSR_PLATFORM_INFO says that CPUID can be made to fault at CPL 3, MSR_MISC_FEATURES_ENABLES makes it. A host that
        // refuses answers CPUID at CPL 3 itself, of which the user is told.
        for (index, value) in [(PLATFORM_INFO, CPUID_CAN_FAULT), (MISC_FEATURES, CPUID_FAULTS)] {
            let _refused = crate::extended::write_msr(&direct.vcpu, index, value);
        }
        direct.slot(MEMORY_SLOT, size)?;
        direct.slot(STUB_SLOT, direct.stub.size())?;
        Ok(direct)
    }

    /// A TLB would have to forget something.
    pub fn flush(&mut self) {
        self.flush = true;
    }

    /// What KVM counted.
    pub fn figures(&self) -> Result<Vec<FigureGroup>, KvmError> {
        let group = |(name, figures): &(&str, Figures)| {
            Ok(FigureGroup { name: (*name).to_owned(), figures: figures.read()? })
        };
        self.figures.iter().map(group).collect()
    }

    /// Runs user mode from `state` under the tables at `root`, for so many nanoseconds at most; `table` is the guest's GDT. The state
    /// is then that before the next instruction.
    pub fn run(
        &mut self,
        state: &mut ArchState,
        root: Hpa,
        table: &[u8],
        left: u64,
    ) -> Result<Why, KvmError> {
        let Some(descriptors) = visible::to_user(table) else { return Ok(Why::NoPlace) };
        let host = self.memory.host();
        let Some(moved) = self.tops.find_place(&mut self.stub, host, root) else { return Ok(Why::NoPlace) };
        let edits = self.memory.host().take_table_edits();
        self.work.clear();
        // What KVM has forgotten it reads as it is.
        let all = moved || edits.everything || edits.entries.len() > MOST_REWRITTEN;
        if all {
            self.reset()?;
        }
        for at in edits.entries.into_iter().filter(|_| !all) {
            let value = self.memory.host().read_u64(at).unwrap_or(0);
            self.work.push((at.0, value));
        }
        let number = self.tops.update(&self.stub, self.memory.host(), root, &mut self.work);
        let cr3 = self.stub.root(number).0;
        if std::mem::take(&mut self.flush) || !self.work.is_empty() {
            self.do_work(cr3)?;
        }
        self.stub.put_descriptors(&descriptors);
        self.load(state, cr3)?;
        let why = self.enter(monotonic().saturating_add(left))?;
        self.take(state, why, table)
    }

    /// Into KVM_RUN until user mode is left.
    fn enter(&mut self, deadline: u64) -> Result<Why, KvmError> {
        loop {
            let left = match self.armed(deadline) {
                Err(KvmError::Emulation { .. }) => return Ok(Why::Emulation),
                left => left?,
            };
            match left {
                Left::Port { port, input: false, .. } => {
                    return Ok(match port as u8 {
                        stub::SYSCALL | stub::SYSCALL_32 => Why::SystemCall,
                        vector => Why::Vector(vector),
                    });
                }
                // In the stub its OUT comes next.
                Left::Interrupted if self.is_in_stub()? => {}
                Left::Interrupted => return Ok(Why::Time),
                other => {
                    let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
                    return Err(KvmError::Unasked { rip, what: format!("{other:?} from user mode") });
                }
            }
        }
    }

    fn armed(&mut self, deadline: u64) -> Result<Left, KvmError> {
        let page = self.vcpu.get_kvm_run();
        // SAFETY: the byte lies in the mapping of the vCPU's page, which lives as long as `self.vcpu`; while the reference is
        // in use only the kernel reads it and the handler of this thread's signal writes it.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut page.immediate_exit) };
        let armed = Armed::new(immediate_exit);
        self.kick.set(&armed, deadline, deadline.saturating_sub(monotonic()))?;
        let began = monotonic();
        let left = run::enter(&mut self.vcpu);
        self.inside[0] += monotonic() - began;
        drop(armed);
        if left.as_ref().is_ok_and(|left| *left != Left::Interrupted) {
            self.kick.has_moved();
        }
        left
    }

    fn is_in_stub(&self) -> Result<bool, KvmError> {
        Ok(self.stub.contains(self.synced.take(&self.vcpu)?.0.rip))
    }

    /// What every entry has: the stub's descriptors, the tables at `cr3`.
    fn system(&self, state: Option<&ArchState>, cr3: u64) -> kvm_sregs {
        let mut sregs = state.map_or(self.initial, |state| to_sregs(state, &self.initial));
        let [gdt, idt] = self.stub.descriptor_tables();
        let table = |(base, limit)| kvm_dtable { base, limit, ..kvm_dtable::default() };
        (sregs.gdt, sregs.idt) = (table(gdt), table(idt));
        let (base, limit) = self.stub.task();
        sregs.tr = kvm_segment {
            base,
            limit,
            selector: stub::TASK,
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, type_: 2, ..kvm_segment::default() };
        let guest = state.map_or((0, 0, 0), |state| (state.cr0, state.cr4, state.efer));
        sregs.cr0 = CR0_OWN | guest.0 & CR0_GUEST;
        sregs.cr3 = cr3;
        sregs.cr4 = CR4_OWN | guest.1 & CR4_GUEST;
        sregs.efer = EFER_OWN | guest.2 & EFER_SCE;
        sregs
    }

    /// The stub writes entries again and reloads CR3.
    fn do_work(&mut self, cr3: u64) -> Result<(), KvmError> {
        let mut sregs = self.system(None, cr3);
        let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
        sregs.cs = kvm_segment { selector: stub::CODE, type_: 11, l: 1, ..flat };
        let data = kvm_segment { selector: stub::DATA, type_: 3, db: 1, ..flat };
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        self.synced.put_sregs(&mut self.vcpu, &sregs)?;
        let work = std::mem::take(&mut self.work);
        let (rip, list, rsp) = self.stub.work();
        let mut rounds = work.chunks(MOST_WORK).collect::<Vec<_>>();
        if rounds.is_empty() {
            rounds.push(&[]);
        }
        for round in rounds {
            for (number, &(physical, value)) in round.iter().enumerate() {
                self.stub.put_work(number, physical, value);
            }
            let regs = kvm_bindings::kvm_regs {
                rip,
                rsp,
                rsi: list,
                rcx: round.len() as u64,
                rflags: 2,
                ..Default::default()
            };
            self.synced.put_regs(&mut self.vcpu, &regs)?;
            let began = monotonic();
            loop {
                match run::enter(&mut self.vcpu)? {
                    Left::Port { port, .. } if port == u16::from(stub::WORK_DONE) => break,
                    Left::Interrupted => {}
                    other => {
                        let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
                        return Err(KvmError::Unasked {
                            rip,
                            what: format!("{other:?} from the stub's work"),
                        });
                    }
                }
            }
            self.inside[1] += monotonic() - began;
            self.rounds += 1;
            self.rewritten += round.len() as u64;
        }
        self.work = work;
        Ok(())
    }

    /// Registers into the vCPU.
    fn load(&mut self, state: &ArchState, cr3: u64) -> Result<(), KvmError> {
        let [long, other] = self.stub.system_call_entries();
        if self.entry != long {
            for (index, value) in [
                (0xc000_0081, u64::from(stub::CODE) << 32),
                (0xc000_0082, long),
                (0xc000_0083, other),
                (0xc000_0084, SYSCALL_MASK),
                (0x174, 0),
            ] {
                crate::extended::write_msr(&self.vcpu, index, value)?;
            }
            self.entry = long;
        }
        let same = self.held.as_ref().is_some_and(|(fxsave, ymm, xcr0)| {
            is_same_registers(fxsave, &state.fxsave) && *ymm == state.ymm_high && *xcr0 == state.xcr0
        });
        if !same {
            self.extended.write_vectors(&self.vcpu, state)?;
        }
        let sregs = self.system(Some(state), cr3);
        self.synced.put_sregs(&mut self.vcpu, &sregs)?;
        self.synced.put_regs(&mut self.vcpu, &to_regs(state))
    }

    /// Makes KVM forget all that it has made of the tables.
    fn reset(&mut self) -> Result<(), KvmError> {
        self.resets += 1;
        for (slot, size) in [(MEMORY_SLOT, self.memory.host().size()), (STUB_SLOT, self.stub.size())] {
            self.slot(slot, 0)?;
            self.slot(slot, size)?;
        }
        self.flush = true;
        Ok(())
    }

    fn slot(&self, slot: u32, size: u64) -> Result<(), KvmError> {
        let (at, base) = match slot {
            MEMORY_SLOT => (0, self.memory.host().base()),
            _ => (self.stub.physical, self.stub.memory.base()),
        };
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: base as u64,
        };
        // SAFETY: both objects are mapped for as long as `self` owns them, which is as long as the vCPU can run; nothing in
        // this program refers to their bytes but through atomics and volatile copies.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(doing("setting a memory slot"))
    }
}
