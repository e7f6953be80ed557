//! The software CPU's side of a comparison: executes one instruction at CPL 3 and catches the exception it may raise.

use super::machine::{ALL, Machine, Mode, P, RW};
use super::silicon::{Case, WINDOW, WINDOW_LEN};
use super::stub::{BASE, DATA, DATA_LEN, NO_TRAP, origin};
use crate::CpuModel;
use guestmem::PAGE_SIZE;
use vcpu::state::seg;
use vcpu::{ArchState, Entry, Exit, Vcpu, VcpuError};

/// Length of the run of NOPs behind the instruction.
const SLED: u64 = 128;

/// The guest.
pub struct Guest {
    machine: Machine,
    template: ArchState,
    address: u64,
}

/// What the host has, for the user, and behind it what the supervisor needs.
fn rights(linear: u64) -> u64 {
    match linear {
        _ if linear < BASE + 2 * PAGE_SIZE => ALL,
        _ if (DATA..DATA + DATA_LEN).contains(&linear) => ALL,
        _ if linear >= BASE + 0x1_0000 => P | RW,
        _ => 0,
    }
}

impl Guest {
    /// A guest that executes `bits`-bit code at `address`.
    pub fn new(bits: u32, address: u64) -> Result<Self, Box<dyn std::error::Error>> {
        let machine = Machine::new(BASE, rights)?;
        let mode = if bits == 64 { Mode::Long } else { Mode::Compatibility };
        let mut template = machine.state(mode, 3, address - origin(bits));
        if bits == 16 {
            for segment in &mut template.segments {
                segment.base = BASE;
                segment.limit = 0xffff;
                // Neither D nor G.
                segment.attributes &= !0xc000;
            }
        }
        Ok(Self { machine, template, address })
    }

    /// The CPU model.
    pub fn model(&self) -> &CpuModel {
        self.machine.cpu.model()
    }

    /// Executes the case in place, `slice` ticks at a time; gives the ticks it took.
    pub fn execute(&mut self, case: &mut Case, slice: u64) -> Result<u64, VcpuError> {
        let machine = &mut self.machine;
        let mut code = [0x90; SLED as usize];
        code[..case.len].copy_from_slice(&case.bytes[..case.len]);
        machine.write(self.address, &code);
        machine.write(WINDOW, &case.window);
        let mut state = self.template.clone();
        state.gprs = case.gprs;
        state.rflags = case.rflags;
        machine.cpu.set_state(&state);
        let start = machine.cpu.ticks();
        let after = loop {
            let exit = machine.cpu.run(Entry::Start, machine.cpu.ticks() + slice)?;
            assert_eq!(exit, Exit::Deadline, "in {:02x?}", &case.bytes[..case.len]);
            let state = machine.cpu.state();
            if state.rip != self.template.rip {
                break state;
            }
        };
        let mut ticks = machine.cpu.ticks() - start;
        case.gprs = after.gprs;
        case.rflags = after.rflags;
        case.trap = NO_TRAP;
        let end = self.template.rip + case.len as u64;
        if let Some(trap) = machine.trap() {
            assert_eq!(trap.rip, self.template.rip, "RIP in the frame");
            assert_eq!(trap.cs, u64::from(self.template.segments[seg::CS].selector), "CS in the frame");
            assert_eq!(trap.rflags >> 16 & 1, 1, "RF in the frame of a fault");
            case.trap = trap.vector;
            case.rflags = trap.rflags;
            case.gprs[4] = trap.rsp;
        } else {
            // Some NOPs may have been executed too.
            assert!((end..end + SLED).contains(&after.rip), "RIP is {:#x} after {end:#x}", after.rip);
            ticks -= after.rip - end;
        }
        machine.read(WINDOW, &mut case.window);
        Ok(ticks)
    }
}

const _: () = assert!(WINDOW >= DATA && WINDOW + WINDOW_LEN as u64 <= DATA + DATA_LEN);
