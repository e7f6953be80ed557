#![allow(unsafe_code, reason = "KVM is given memory of this process")]
//! One virtual machine with one vCPU, in one paging mode: memory slots, registers, and a list of accesses run to its end.
//!
//! The vCPU's physical memory is the memory object under test from address 0 (so an HPA of it is a physical address of the
//! vCPU), once more at [`alias`] so that entries with high address bits lead somewhere, and the stub's frames.

use crate::batch::{self, Answer, BATCH, Bits, Touch};
use crate::counts::Counts;
use crate::error::{Error, doing};
use crate::features::Features;
use crate::layout::*;
use crate::memory::Object;
use crate::watchdog::{LIMIT, Watchdog};
use guestmem::{GuestMemory, HostMemory, PAGE_SIZE, PageSize};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mmu::paging::bits::CR0_PG;
use mmu::{PagingMode, PagingState};
use std::sync::Arc;
use std::time::Duration;

const STUB_SLOT: u32 = 0;
const FIRST_SLOT: u32 = 1;

const CR0_FIXED: u64 = 0x33;
const FINISHED_PORT: u16 = 0xf4;
const RFLAGS_FIXED: u64 = 2;

/// Where the memory object is a second time: at the highest address bit that entries of the mode can name (in 32-bit paging
/// those of 4 MiB pages), but not above what any KVM has for slots.
pub(crate) fn alias(features: &Features, mode: PagingMode) -> Option<u64> {
    let width = match mode {
        PagingMode::Bits32 => features.limits.pse36_width,
        _ => 46,
    };
    let bit = width.min(features.maxphyaddr.into()) - 1;
    (bit > 32).then_some(1 << bit)
}

/// The machine.
pub(crate) struct Vm {
    // The vCPU before the machine, the machine before the memory that its slots show.
    vcpu: VcpuFd,
    fd: VmFd,
    pub home: Home,
    object: Option<Arc<dyn Object>>,
    /// Slots that show it, and where.
    pieces: Vec<(u32, u64)>,
    alias: Option<u64>,
    watchdog: Watchdog,
    initial: kvm_sregs,
    /// The longest that a list may take.
    limit: Duration,
    offers_keys: bool,
    tcg: bool,
}

impl Vm {
    /// A machine without a memory object.
    pub fn new(kvm: &Kvm, features: &Features, mode: PagingMode) -> Result<Self, Error> {
        let fd = kvm.create_vm().map_err(doing("creating a virtual machine"))?;
        // Intel's VMX wants three pages to itself; elsewhere it means nothing, and where it is unknown nothing is lost.
        let _only_for_vmx = fd.set_tss_address(0xfffb_d000);
        let _only_for_vmx = fd.set_identity_map_address(0xfffb_c000);
        let vcpu = fd.create_vcpu(0).map_err(doing("creating a vCPU"))?;
        vcpu.set_cpuid2(&features.cpuid).map_err(doing("setting the vCPU's CPUID"))?;
        let initial = vcpu.get_sregs().map_err(doing("reading the vCPU's registers"))?;
        let home = Home::new(HostMemory::new(STUB_FRAMES)?, mode);
        let alias = alias(features, mode);
        let watchdog = Watchdog::new();
        let (offers_keys, tcg) = (features.keys, features.limits.tcg);
        let vm = Self {
            vcpu,
            fd,
            home,
            object: None,
            pieces: Vec::new(),
            alias,
            watchdog,
            initial,
            limit: LIMIT,
            offers_keys,
            tcg,
        };
        vm.slot(STUB_SLOT, STUB_PHYSICAL, vm.home.memory(), 0, STUB_FRAMES * PAGE_SIZE)?;
        Ok(vm)
    }

    fn slot(&self, slot: u32, at: u64, memory: &HostMemory, offset: u64, size: u64) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: memory.base() as u64 + offset,
        };
        // SAFETY: the object is mapped for as long as `self` owns it, and `hide` takes the slots away before it lets go of
        // it; offset and length lie inside; nothing in this program refers to the bytes but through atomics and volatile copies.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(doing("setting a memory slot"))
    }

    /// Makes `object` the vCPU's physical memory, from 0 and at the alias. All that KVM has derived from its tables is
    /// forgotten, also when it is the object that was there before.
    pub fn show_all(&mut self, object: Arc<HostMemory>) -> Result<(), Error> {
        let size = object.size().min(STUB_PHYSICAL);
        let mut pieces = vec![(0, 0, size)];
        pieces.extend(self.alias.map(|alias| (alias, 0, size)));
        self.show(object, &pieces)
    }

    /// Makes a guest's memory the vCPU's physical memory: the engine's tables and the guest's frames, without the gap that
    /// lies between.
    pub fn show_guest(&mut self, memory: Arc<GuestMemory>, table_frames: u64) -> Result<(), Error> {
        let tables = table_frames * PAGE_SIZE;
        let guest = tables.next_multiple_of(PageSize::Size1G.bytes());
        let size = memory.host().size().min(STUB_PHYSICAL);
        self.show(memory, &[(0, 0, tables), (guest, guest, size - guest)])
    }

    /// Pieces: physical address, offset in the object, length.
    fn show<M: Object + 'static>(&mut self, object: Arc<M>, pieces: &[(u64, u64, u64)]) -> Result<(), Error> {
        self.hide()?;
        // Kept from now on: should a piece fail, those before it still show the object.
        self.object = Some(object.clone());
        for (&(at, offset, length), slot) in pieces.iter().zip(FIRST_SLOT..) {
            self.slot(slot, at, object.bytes(), offset, length)?;
            self.pieces.push((slot, at));
        }
        Ok(())
    }

    /// What KVM has counted of this machine.
    pub fn counts(&self) -> Result<Counts, Error> {
        let mut counts = Counts::default();
        counts.add_those_of(&self.fd)?;
        counts.add_those_of(&self.vcpu)?;
        Ok(counts)
    }

    fn hide(&mut self) -> Result<(), Error> {
        if let Some(object) = self.object.clone() {
            while let Some(&(slot, at)) = self.pieces.last() {
                self.slot(slot, at, object.bytes(), 0, 0)?;
                self.pieces.pop();
            }
            self.object = None;
        }
        Ok(())
    }

    /// Whether KVM takes the paging mode: there are some that have long mode only, and drop CR0.PG without a word.
    pub fn takes(&self, state: &PagingState) -> bool {
        let kept = self.vcpu.set_sregs(&self.system(state)).and_then(|()| self.vcpu.get_sregs());
        kept.is_ok_and(|sregs| sregs.cr0 & CR0_PG != 0)
    }

    /// Makes the accesses, all of them at the privilege of the first, in the address space of `state`, whose top table has the
    /// stub's entry.
    pub fn run(&mut self, state: &PagingState, touches: &[Touch]) -> Result<Vec<Answer>, Error> {
        let Some(first) = touches.first() else { return Ok(Vec::new()) };
        assert!(touches.len() <= BATCH, "a batch has at most {BATCH} accesses");
        let user = first.access.is_user();
        let view = if user { self.home.user } else { self.home.supervisor };
        let (questions, answers) = (self.home.questions(), self.home.answers());
        batch::ask(self.home.memory(), questions, answers, touches);
        let rflags = RFLAGS_FIXED | u64::from(first.access.ac) << 18;
        let rsp = self.home.write_frame(view + self.home.stub.next, rflags, user);
        self.vcpu.set_sregs(&self.system(state)).map_err(doing("setting the vCPU's system registers"))?;
        let keys = self.offers_keys && state.controls().pke;
        let start = if keys { self.home.stub.start_with_keys } else { self.home.stub.start };
        let regs = kvm_regs {
            rip: self.home.supervisor + start,
            rsp,
            rflags: RFLAGS_FIXED,
            rsi: view + questions.0,
            rdi: view + answers.0,
            rbx: view + self.home.stub.landed,
            rbp: self.home.supervisor + questions.0,
            r8: u64::from(state.pkru & !(3 << (2 * STUB_KEY))),
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs).map_err(doing("setting the vCPU's registers"))?;
        self.run_to_the_end(state)?;
        Ok(batch::answers(self.home.memory(), answers, touches.len()))
    }

    fn run_to_the_end(&mut self, state: &PagingState) -> Result<(), Error> {
        let vcpu = &mut self.vcpu;
        let (exit, late) = self.watchdog.watch(self.limit, || {
            loop {
                match vcpu.run() {
                    Ok(VcpuExit::IoOut(FINISHED_PORT, _)) => return Ok(()),
                    Ok(exit) => return Err(format!("it ended with {exit:?}")),
                    Err(error) if error.errno() == libc::EAGAIN => {}
                    Err(error) if error.errno() == libc::EINTR => return Err("it was interrupted".to_owned()),
                    Err(error) => return Err(format!("KVM_RUN failed: {error}")),
                }
            }
        });
        match exit {
            Ok(()) => Ok(()),
            Err(what) if late => {
                Err(self.astray(format!("it took longer than {:?}; {what}", self.limit), state))
            }
            Err(what) => Err(self.astray(what, state)),
        }
    }

    fn astray(&self, what: String, state: &PagingState) -> Error {
        let stack = self.home.stack();
        let state = match (self.vcpu.get_regs(), self.vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "{regs:x?} CS {:#x} CR0 {:#x} CR2 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x}; the stack ends with {stack:x?}; \
                 {state:x?}",
                sregs.cs.selector, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
            ),
            _ => "its registers cannot be read".to_owned(),
        };
        Error::Astray { what, state }
    }

    /// The system registers: at CPL 0, in the address space of `state`.
    fn system(&self, state: &PagingState) -> kvm_sregs {
        let long = self.home.bits() == Bits::Bits64;
        let segment = |selector: u16, type_: u8| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            dpl: (selector & 3) as u8,
            db: u8::from(type_ == 3 || !long),
            s: 1,
            l: u8::from(type_ == 11 && long),
            g: 1,
            ..kvm_segment::default()
        };
        let mut sregs = self.initial;
        let [gdt, idt, tss, _] = self.home.structures();
        sregs.cs = segment(KERNEL_CODE, 11);
        sregs.ss = segment(KERNEL_DATA, 3);
        let data = segment(USER_DATA, 3);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
        // A busy 32-bit or 64-bit TSS; see `Limits::tcg`.
        let type_ = if self.tcg { 9 } else { 11 };
        let task = kvm_segment { base: tss, limit: TSS_LIMIT, db: 0, s: 0, g: 0, ..segment(TASK, type_) };
        sregs.tr = kvm_segment { l: 0, ..task };
        (sregs.gdt.base, sregs.gdt.limit) = (gdt, GDT_LIMIT);
        (sregs.idt.base, sregs.idt.limit) = (idt, IDT_LIMIT);
        sregs.cr0 = state.cr0 | CR0_FIXED;
        sregs.cr3 = state.cr3;
        sregs.cr4 = state.cr4;
        sregs.efer = state.efer;
        sregs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Walker;
    use crate::memory::landing;
    use guestmem::Hpa;
    use mmu::{Access, AccessKind, Privilege};
    use reference::Cpu;

    #[test]
    fn a_vcpu_that_does_not_come_back_is_ended() {
        let features = Kvm::new().ok().and_then(|kvm| Some((Features::of(&kvm, Walker::Unknown).ok()?, kvm)));
        let Some((features, kvm)) = features else {
            return eprintln!("SKIP: a_vcpu_that_does_not_come_back_is_ended: KVM does not open");
        };
        let mut vm = Vm::new(&kvm, &features, PagingMode::Level4).unwrap();
        let object = Arc::new(HostMemory::new(6).unwrap());
        for table in 1..5 {
            object.write_u64(Hpa(table * 4096), ((table + 1) * 4096) | 0x67).unwrap();
        }
        let (index, entry) = vm.home.top_entry();
        object.write_u64(Hpa(4096 + index * 8), entry).unwrap();
        // A jump to itself, and beside it what goes back.
        object.write_u64(Hpa(0x5000), 0xfeeb).unwrap();
        object.write_u64(Hpa(0x5008), landing(77)).unwrap();
        vm.show_all(object).unwrap();
        let state = Cpu { maxphyaddr: features.maxphyaddr, ..Cpu::level4(0x1000) }.state();
        for privilege in [Privilege::User, Privilege::Supervisor] {
            let access = Access::new(AccessKind::Execute, privilege);
            let touch = |linear| [Touch { linear, access, value: 0 }];
            vm.limit = Duration::from_millis(300);
            let error = vm.run(&state, &touch(0)).unwrap_err().to_string();
            assert!(error.contains("it took longer than 300ms"), "{error}");
            vm.limit = LIMIT;
            assert_eq!(vm.run(&state, &touch(8)).unwrap(), [Answer::Done(77)]);
        }
    }
}
