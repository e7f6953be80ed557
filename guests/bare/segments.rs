//! Segmentation, in 32-bit protected mode where it still has all its powers: limits, types, call gates, 16-bit code, task
//! switches, virtual-8086 mode, and an excursion to real mode (SDM Vol. 3, chapters 3, 5, 6, 9 and 22).
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the code that is run is assembly")]

#[path = "segments/access.rs"]
mod access;
#[path = "segments/real.rs"]
mod real;
#[path = "segments/tasks.rs"]
mod tasks;
#[path = "segments/transfers.rs"]
mod transfers;

use rt::{
    descriptors::GDT,
    frames,
    legacy::{self, Do, State},
    mem,
    paging::{P, PS, U, W},
    trap,
};

rt::guest!("segments", main);

/// A piece of assembly by its address.
pub type Code = unsafe extern "C" fn();

/// GDT slots for the cases.
pub const SLOT: usize = 12;
/// The selector of a slot.
pub const fn selector(slot: usize) -> u32 {
    slot as u32 * 8
}

/// The directory: all memory one to one, for CPL 3 too.
pub struct Flat {
    /// Its address.
    pub directory: u64,
    /// A page of scratch memory.
    pub scratch: u64,
    /// Two pages of stack for the code under test; this is the top.
    pub stack: u64,
}

impl Flat {
    fn new() -> Self {
        let directory = frames::take();
        (0..1024u64).for_each(|i| mem::write32(directory + i * 4, (i << 22 | P | W | U | PS) as u32));
        let stack = frames::block(8192, 4096) + 8192;
        Self { directory, scratch: frames::take(), stack }
    }

    /// A start at CPL 0 with flat segments.
    pub fn start(&self, code: Code) -> State {
        State {
            eip: code as usize as u32,
            cs: 0x30,
            ss: 0x10,
            ds: 0x10,
            es: 0x10,
            eflags: 2,
            esp: self.stack as u32,
            ..State::default()
        }
    }

    /// The same at CPL 3.
    pub fn user(&self, code: Code) -> State {
        State { cs: 0x1b, ss: 0x23, ds: 0x23, es: 0x23, ..self.start(code) }
    }

    /// Runs code until its exception.
    pub fn run(&self, start: State) -> State {
        let mut state = start;
        let at = &raw mut state;
        legacy::clear();
        legacy::add(Do::Run, at as u64, 0);
        legacy::run(self.directory, rt::cpu::CR4_PSE, 0);
        // SAFETY: the engine has written to it behind the compiler's back.
        unsafe { at.read_volatile() }
    }
}

/// Vector and error code.
pub fn outcome(state: &State) -> (u32, u32) {
    (state.vector, state.error)
}

/// The outcome of code that came to its INT 0x30.
pub const DONE: (u32, u32) = (0x30, 0);

/// Sets a descriptor.
pub fn set(slot: usize, descriptor: u64) {
    GDT.get()[slot] = descriptor;
}

fn main() {
    let flat = Flat::new();
    access::run(&flat);
    transfers::run(&flat);
    tasks::run(&flat);
    real::run(&flat);
    let _ = trap::on(14, None);
}
