//! What must be looked at before the next instruction, and what may not come before it.
//!
//! Where it stands in the path of one access: between two of them. While nothing is set here the engines run block after
//! block; [`crate::attend`] looks at what is set, and says in which order.
//!
//! Manual: Intel SDM Vol. 3 §6.8 (holding off interrupts), §6.9 (priority among events), table 6-2.

use crate::core::Core;
use crate::flags::bit;

bitflags::bitflags! {
    /// What must be looked at before the next instruction.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Attention: u32 {
        /// An event is to be delivered ([`Core::event`]).
        const EVENT = 1 << 0;
        /// An NMI is queued.
        const NMI = 1 << 1;
        /// The VMM wants to know when an interrupt can be delivered.
        const WINDOW = 1 << 2;
        /// Interrupts are held off for the next instruction (STI, MOV SS, POP SS).
        const SHADOW = 1 << 3;
        /// EFLAGS.TF or a breakpoint register asks for a look at each instruction.
        const DEBUG = 1 << 4;
        /// The instruction under way has answers or overrides: execute it alone, then drop them.
        const TRANSIENT = 1 << 5;
        /// HLT.
        const HALTED = 1 << 6;
        /// Shut down after a triple fault.
        const SHUTDOWN = 1 << 7;
        /// The next instruction writes decoded bytes: execute it alone.
        const CODE_WRITE = 1 << 8;
        /// Stores to guest tables are to be reported.
        const TABLE_STORES = 1 << 9;
        /// The hardware walk has set flags in a frame of decoded bytes: drop what was decoded from them.
        const HOST_WRITES = 1 << 10;
        /// A task was switched to and is to be entered ([`crate::task`]).
        const ARRIVAL = 1 << 11;
    }
}

impl Core {
    /// Holds interrupts off for the next instruction (STI).
    pub fn hold_interrupts(&mut self) {
        self.attention.insert(Attention::SHADOW);
        (self.native.fresh_shadow, self.native.stack_shadow) = (true, false);
    }

    /// Holds interrupts and debug exceptions off for the next instruction (MOV SS, POP SS). Of several loads of SS in a
    /// row only the first does, or they could hold them off for ever (SDM Vol. 3 §6.8.3).
    pub fn hold_events(&mut self) {
        if self.attention.contains(Attention::SHADOW) && self.native.stack_shadow {
            return;
        }
        self.attention.insert(Attention::SHADOW);
        (self.native.fresh_shadow, self.native.stack_shadow) = (true, true);
    }

    /// Whether a maskable interrupt can be delivered before the next instruction.
    pub fn interruptible(&self) -> bool {
        self.flags.has(bit::IF)
            && !self.attention.intersects(
                Attention::SHADOW
                    | Attention::EVENT
                    | Attention::ARRIVAL
                    | Attention::TRANSIENT
                    | Attention::SHUTDOWN
                    | Attention::CODE_WRITE
                    | Attention::TABLE_STORES,
            )
    }
}
