//! What the host does to a guest's memory while the guest stands still: the dirty log, and moving frames.
//!
//! It stands beside the path of an access: each change of the guest-physical map is told to the MMU backend by
//! `memory_changed`, and the flush that it answers goes to the CPU, before the guest runs on. The guest must not notice
//! either; the tests see to that. The dirty log follows SDM Vol. 3 §29.3.5 in what it is for (what was written since), not
//! in how: write rights are taken away and given back at the first write.

use crate::error::Error;
use crate::machine::Machine;
use guestmem::{Gfn, PAGE_SIZE, Slot};

impl Machine {
    /// Begins to log which guest frames are written.
    pub fn start_dirty_log(&mut self) -> Result<(), Error> {
        self.memory.dirty().set_active(true);
        self.all_memory_changed()
    }

    /// The frames written since the log began or was last taken, ascending.
    pub fn take_dirty_log(&mut self) -> Result<Vec<Gfn>, Error> {
        self.cpu.sync_dirty_log()?;
        let written = self.memory.dirty().collect();
        self.all_memory_changed()?;
        Ok(written)
    }

    /// Ends the log.
    pub fn stop_dirty_log(&mut self) -> Result<(), Error> {
        self.memory.dirty().set_active(false);
        self.all_memory_changed()
    }

    fn all_memory_changed(&mut self) -> Result<(), Error> {
        let flush = self.mmu.memory_changed(Gfn(0)..self.memory.end());
        self.apply(flush)
    }

    /// Moves what a guest frame holds to another host frame; false if it has none, or is not RAM. Needs a free host frame,
    /// which there is only under the `demand` policy.
    pub fn move_frame(&mut self, gfn: Gfn) -> Result<bool, Error> {
        let Slot::Ram(old) = self.memory.slot(gfn) else { return Ok(false) };
        let new = self.memory.allocate_guest_frame(gfn)?;
        let mut bytes = vec![0; PAGE_SIZE as usize];
        let host = self.memory.host();
        if !host.read(old.base(), &mut bytes) || !host.write(new.base(), &bytes) {
            return Ok(false);
        }
        self.memory.set_slot(gfn, Slot::Ram(new));
        let flush = self.mmu.memory_changed(gfn..Gfn(gfn.0 + 1));
        self.apply(flush)?;
        self.memory.free_guest_frame(old);
        Ok(true)
    }
}
