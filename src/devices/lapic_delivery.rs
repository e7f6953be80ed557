//! How interrupts get into and out of the local APIC: acceptance, priorities, EOI, IPIs, local sources, errors.
//!
//! In the path of one interrupt: message or local source → IRR here → the CPU acknowledges → ISR → EOI.
//! Follows the Intel SDM Vol. 3, sections 11.5–11.8 and 11.5.3 "Error Handling".

use serde::{Deserialize, Serialize};

use crate::lapic::{
    ERROR_RECEIVE_ILLEGAL, ERROR_SEND_ILLEGAL, LVT_ERROR, LVT_LINT0, LVT_LINT1, LVT_MASKED, LVT_TIMER,
    LocalApic, SVR_SUPPRESS_EOI,
};

/// Vectors below this are the processor's own; no interrupt may have them.
const FIRST_LEGAL_VECTOR: u8 = 16;

pub(crate) const DELIVERY_FIXED: u8 = 0;
const DELIVERY_LOWEST_PRIORITY: u8 = 1;
const DELIVERY_NMI: u8 = 4;
const DELIVERY_EXTINT: u8 = 7;

/// An interrupt on its way to local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Identifier or set of logical identifiers; `u32::MAX` is everybody.
    pub destination: u32,
    /// The destination is logical.
    pub logical: bool,
    /// Delivery mode, as in the registers: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 SIPI, 7 ExtINT.
    pub delivery: u8,
    /// The vector.
    pub vector: u8,
    /// Level triggered: the EOI must be told to the I/O APIC.
    pub level: bool,
}

impl LocalApic {
    /// Takes a message if it is for this APIC; false if nobody here wants it (it may be offered again).
    pub fn accept(&mut self, message: Message) -> bool {
        if !self.base.is_enabled() || !self.is_addressed(message) {
            return false;
        }
        match message.delivery {
            DELIVERY_FIXED | DELIVERY_LOWEST_PRIORITY => {
                if !self.is_enabled() {
                    return false;
                }
                self.request(message.vector, message.level);
            }
            DELIVERY_NMI => self.nmi = true,
            // ExtINT has its own path; there is no SMM; INIT and SIPI concern other processors only.
            _ => {}
        }
        true
    }

    /// True if the destination of `message` includes this APIC.
    pub(crate) fn is_addressed(&self, message: Message) -> bool {
        let (destination, own) = (message.destination, self.logical_id());
        if destination == u32::MAX {
            return true;
        }
        if self.base.is_x2apic() {
            return if message.logical {
                destination >> 16 == own >> 16 && destination & own & 0xffff != 0
            } else {
                destination == self.id
            };
        }
        if !message.logical {
            return destination == self.id || destination == 0xff;
        }
        let own = own >> 24;
        if self.dfr >> 28 == 0xf {
            return destination & own != 0;
        }
        let cluster = destination >> 4 == own >> 4 || destination >> 4 == 0xf;
        cluster && destination & own & 0xf != 0
    }

    /// The processor-priority register: the higher of what software tolerates and what is being served.
    pub(crate) fn processor_priority(&self) -> u8 {
        let serving = self.in_service.highest().unwrap_or(0) & 0xf0;
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving }
    }

    /// The vector that would be delivered now: the highest request, if its class is above the processor's priority.
    pub fn pending(&self) -> Option<u8> {
        if !self.base.is_enabled() {
            return None;
        }
        self.requests.highest().filter(|vector| vector >> 4 > self.processor_priority() >> 4)
    }

    /// The processor takes the pending interrupt: from IRR to ISR.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.requests.remove(vector);
        self.in_service.insert(vector);
        Some(vector)
    }

    /// Takes the waiting NMI, if there is one.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// True if requests of the 8259A pass through LINT0, or past an APIC that is switched off.
    pub fn passes_ext_int(&self) -> bool {
        let lint0 = self.lvt[LVT_LINT0];
        !self.base.is_enabled() || lint0 & LVT_MASKED == 0 && (lint0 >> 8 & 7) as u8 == DELIVERY_EXTINT
    }

    /// The INT pin of the 8259A, wired to LINT0, has risen. (Where LINT0 is in ExtINT mode, its level counts.)
    pub fn raise_lint0(&mut self) {
        self.deliver_local(LVT_LINT0);
    }

    /// The NMI line, wired to LINT1, has risen.
    pub fn raise_lint1(&mut self) {
        if self.base.is_enabled() { self.deliver_local(LVT_LINT1) } else { self.nmi = true }
    }

    /// Bits 4–7 of the task priority, as CR8 shows them.
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// Writes CR8, which clears the low half of the task priority.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = value << 4;
    }

    /// Ends the interrupt of the highest vector in service; a level-triggered one is to be broadcast.
    pub(crate) fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.in_service.highest()?;
        self.in_service.remove(vector);
        let broadcast = self.trigger_mode.contains(vector) && self.svr & SVR_SUPPRESS_EOI == 0;
        broadcast.then_some(vector)
    }

    /// Delivers one of the local sources as its LVT entry says.
    pub(crate) fn deliver_local(&mut self, index: usize) {
        let entry = self.lvt[index];
        if !self.base.is_enabled() || entry & LVT_MASKED != 0 {
            return;
        }
        // Timer and error entries have no delivery mode; the bits are zero there, which is fixed.
        match (entry >> 8 & 7) as u8 {
            DELIVERY_FIXED => self.request(entry as u8, false),
            DELIVERY_NMI if index != LVT_TIMER && index != LVT_ERROR => self.nmi = true,
            _ => {}
        }
    }

    /// Sends what ICR says. Nobody else is there, so only what reaches this APIC matters.
    pub(crate) fn send(&mut self) {
        let (low, high) = (self.icr_low, self.icr_high);
        let message = Message {
            destination: if self.base.is_x2apic() { high } else { high >> 24 },
            logical: low & 1 << 11 != 0,
            delivery: (low >> 8 & 7) as u8,
            vector: low as u8,
            level: false,
        };
        let fixed = matches!(message.delivery, DELIVERY_FIXED | DELIVERY_LOWEST_PRIORITY);
        if fixed && message.vector < FIRST_LEGAL_VECTOR {
            self.record_error(ERROR_SEND_ILLEGAL);
            return;
        }
        let to_self = match low >> 18 & 3 {
            0 => message,
            1 | 2 => Message { destination: u32::MAX, ..message },
            // All but self: nobody.
            _ => return,
        };
        self.accept(to_self);
    }

    /// The x2APIC's SELF IPI register.
    pub(crate) fn send_to_self(&mut self, vector: u8) {
        if vector < FIRST_LEGAL_VECTOR {
            self.record_error(ERROR_SEND_ILLEGAL);
        } else if self.is_enabled() {
            self.request(vector, false);
        }
    }

    /// Records an error for ESR and raises the error interrupt.
    pub(crate) fn record_error(&mut self, error: u32) {
        self.new_errors |= error;
        let entry = self.lvt[LVT_ERROR];
        if entry & LVT_MASKED != 0 {
            return;
        }
        if (entry as u8) < FIRST_LEGAL_VECTOR {
            // The error interrupt's own vector is in error: record it, and go no deeper.
            self.new_errors |= ERROR_RECEIVE_ILLEGAL;
        } else {
            self.deliver_local(LVT_ERROR);
        }
    }

    fn request(&mut self, vector: u8, level: bool) {
        if vector < FIRST_LEGAL_VECTOR {
            self.record_error(ERROR_RECEIVE_ILLEGAL);
            return;
        }
        self.requests.insert(vector);
        if level { self.trigger_mode.insert(vector) } else { self.trigger_mode.remove(vector) }
    }
}
