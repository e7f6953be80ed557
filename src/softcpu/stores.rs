//! Several stores of one instruction: all are translated before the first is done.
//!
//! It stands beside [`crate::memory`], for what writes more than one operand: PUSHA, ENTER, far CALL, the frame of an event,
//! the state that a task switch saves. An instruction that stops has changed nothing (SDM Vol. 3 §6.5 "Exception
//! classifications", faults), and what it writes may be the very page tables that its next store goes through.

use crate::core::Core;
use crate::exec::address::checked;
use crate::memory::{Target, Who};
use crate::op::Stop;
use vcpu::state::seg;

/// Stores that are translated and not done yet, each within one page.
#[derive(Debug, Default)]
pub struct Stores {
    pieces: Vec<(Target, [u8; 8], u8)>,
    /// Whether devices have taken theirs.
    devices_done: bool,
}

impl Core {
    /// Adds a store of at most eight bytes. Stops as the store would.
    pub fn plan(
        &mut self,
        stores: &mut Stores,
        lin: u64,
        data: &[u8],
        who: Who,
        segment: u8,
    ) -> Result<(), Stop> {
        let mut done = 0;
        for (target, part) in self.store_targets(lin, data.len() as u64, who, segment)?.into_iter().flatten()
        {
            let mut bytes = [0; 8];
            bytes[..part as usize].copy_from_slice(&data[done..done + part as usize]);
            stores.pieces.push((target, bytes, part as u8));
            done += part as usize;
        }
        Ok(())
    }

    /// Adds a store to a system structure outside long mode.
    pub fn plan_system(&mut self, stores: &mut Stores, lin: u64, value: u64, len: usize) -> Result<(), Stop> {
        self.plan(stores, lin & 0xffff_ffff, &value.to_le_bytes()[..len], Who::System, seg::DS as u8)
    }

    /// Adds a push of `size` bytes below `sp` in the stack segment, and moves `sp`.
    pub fn plan_push(
        &mut self,
        stores: &mut Stores,
        sp: &mut u64,
        value: u64,
        size: u8,
    ) -> Result<u64, Stop> {
        let at = sp.wrapping_sub(u64::from(size)) & self.stack_mask();
        let lin = if self.mode64 { at } else { checked(self, seg::SS as u8, at, u64::from(size), true)? };
        self.plan(stores, lin, &value.to_le_bytes()[..usize::from(size)], Who::Current, seg::SS as u8)?;
        *sp = at;
        Ok(lin)
    }

    /// Does what devices are to be told. They may exit, and then nothing may have been written to memory.
    pub fn tell_devices(&mut self, stores: &mut Stores) -> Result<(), Stop> {
        for &(target, bytes, len) in &stores.pieces {
            if let Target::Mmio(gpa) = target {
                self.write_device(gpa, &bytes[..usize::from(len)])?;
            }
        }
        stores.devices_done = true;
        Ok(())
    }

    /// Does the stores, in order.
    pub fn commit(&mut self, mut stores: Stores) -> Result<(), Stop> {
        if !stores.devices_done {
            self.tell_devices(&mut stores)?;
        }
        for &(target, bytes, len) in &stores.pieces {
            self.write_target(target, &bytes[..usize::from(len)]);
        }
        Ok(())
    }

    /// Pushes words of `size` bytes, the first of them first; all of them or, when one stops, none.
    pub fn push_all(&mut self, words: &[u64], size: u8) -> Result<(), Stop> {
        let mut stores = Stores::default();
        let mut sp = self.regs[4];
        for &word in words {
            self.plan_push(&mut stores, &mut sp, word, size)?;
        }
        self.commit(stores)?;
        self.set_stack(sp);
        Ok(())
    }
}

#[cfg(test)]
#[path = "stores_tests.rs"]
mod tests;
