#![allow(unsafe_code, reason = "KVM is given memory of this process")]
//! Memory slots: the guest-physical map as KVM has it (the kernel's `api.rst`, KVM_SET_USER_MEMORY_REGION and
//! KVM_GET_DIRTY_LOG).
//!
//! One slot a run of guest frames whose host frames are contiguous too: one a region under the linear policy, hundreds of
//! thousands under `scatter`, which then is refused. Every frame is given its host frame before the guest runs: KVM takes
//! memory from the memory object as it is touched anyway, so nothing is gained by waiting. ROM is a read-only slot, whose
//! writes come out as device accesses.

use crate::error::{KvmError, doing};
use guestmem::{Backing, Gfn, GuestMemory, Hfn, PAGE_SIZE};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A run of guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    gfn: Gfn,
    hfn: Hfn,
    frames: u64,
    writable: bool,
    logged: bool,
}

/// The slots of one machine.
#[derive(Debug)]
pub struct Slots {
    // The machine before the memory that its slots show.
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    /// What is set, by the first guest frame: the slot's number and what it shows.
    set: BTreeMap<Gfn, (u32, Run)>,
    /// Numbers that were used and are free again.
    free: Vec<u32>,
    most: usize,
}

impl Slots {
    /// Gives the machine the guest's memory, in at most so many slots.
    pub fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>, most: usize) -> Result<Self, KvmError> {
        let mut slots = Self { vm, memory, set: BTreeMap::new(), free: Vec::new(), most };
        slots.refresh()?;
        Ok(slots)
    }

    /// Makes the slots what the guest-physical map and the dirty log now want. What has not changed is left alone: a slot
    /// that goes takes everything with it that KVM has derived from it.
    pub fn refresh(&mut self) -> Result<(), KvmError> {
        let wanted = self.runs()?;
        let stays = |old: &Run, wanted: &[Run]| {
            let found = wanted.binary_search_by_key(&old.gfn, |run| run.gfn).ok();
            found.is_some_and(|at| Run { logged: old.logged, ..wanted[at] } == *old)
        };
        let gone: Vec<Gfn> =
            self.set.values().filter(|(_, run)| !stays(run, &wanted)).map(|(_, run)| run.gfn).collect();
        for gfn in gone {
            self.take(gfn)?;
        }
        for run in wanted {
            let number = match self.set.get(&run.gfn) {
                Some((_, old)) if *old == run => continue,
                // The flag alone is changed in place.
                Some(&(number, _)) => number,
                None => self.free.pop().unwrap_or(self.set.len() as u32),
            };
            self.tell(number, &run, run.frames)?;
            self.set.insert(run.gfn, (number, run));
        }
        Ok(())
    }

    /// Marks in the dirty log what the guest has written since the last call.
    pub fn sync_dirty_log(&self) -> Result<(), KvmError> {
        for (number, run) in self.set.values().filter(|(_, run)| run.logged) {
            let size = (run.frames * PAGE_SIZE) as usize;
            let words = self
                .vm
                .get_dirty_log(*number, size)
                .map_err(doing("reading the dirty log of a memory slot"))?;
            for (i, mut word) in words.into_iter().enumerate() {
                while word != 0 {
                    self.memory
                        .dirty()
                        .mark(Gfn(run.gfn.0 + i as u64 * 64 + u64::from(word.trailing_zeros())));
                    word &= word - 1;
                }
            }
        }
        Ok(())
    }

    /// How many slots are in use.
    pub fn count(&self) -> usize {
        self.set.len()
    }

    fn runs(&self) -> Result<Vec<Run>, KvmError> {
        let logged = self.memory.dirty().is_active();
        let mut runs: Vec<Run> = Vec::new();
        for region in self.memory.regions() {
            let first = region.base.frame().0;
            for gfn in first..first + region.len / PAGE_SIZE {
                let Backing::Memory { frame, writable } = self.memory.backing(Gfn(gfn))? else { continue };
                let full = runs.len() == self.most;
                match runs.last_mut() {
                    Some(run)
                        if run.writable == writable
                            && run.gfn.0 + run.frames == gfn
                            && run.hfn.0 + run.frames == frame.0 =>
                    {
                        run.frames += 1;
                    }
                    _ if full => return Err(KvmError::Slots { slots: self.most }),
                    _ => runs.push(Run {
                        gfn: Gfn(gfn),
                        hfn: frame,
                        frames: 1,
                        writable,
                        logged: logged && writable,
                    }),
                }
            }
        }
        Ok(runs)
    }

    fn take(&mut self, gfn: Gfn) -> Result<(), KvmError> {
        if let Some(&(number, run)) = self.set.get(&gfn) {
            self.tell(number, &run, 0)?;
            self.set.remove(&gfn);
            self.free.push(number);
        }
        Ok(())
    }

    fn tell(&self, number: u32, run: &Run, frames: u64) -> Result<(), KvmError> {
        let mut flags = if run.writable { 0 } else { KVM_MEM_READONLY };
        if run.logged {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: number,
            flags,
            guest_phys_addr: run.gfn.base().0,
            memory_size: frames * PAGE_SIZE,
            userspace_addr: self.memory.host().base() as u64 + run.hfn.base().0,
        };
        // SAFETY: the run lies inside the memory object, whose frames the guest-physical map names, and the object stays
        // mapped for as long as `self` owns it, which is as long as the machine can run; nothing in this program refers to
        // its bytes but through atomics and volatile copies.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(doing("setting a memory slot"))
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        for (number, run) in self.set.values() {
            // Others may still hold the machine; it must not show memory that goes now.
            let _gone_with_the_machine_else = self.tell(*number, run, 0);
        }
    }
}
