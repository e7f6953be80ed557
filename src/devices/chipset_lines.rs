//! The wires of the chipset: from the devices' interrupt pins to the controllers, and from there to the CPU.
//!
//! In the path of one interrupt: device pin → here → 8259A and I/O APIC → local APIC → CPU.
//! Follows the wiring of the Intel MultiProcessor Specification 1.4, section 3.6.2.

use crate::acpi_pm::SCI_IRQ;
use crate::chipset::Chipset;

const IRQ_TIMER: u8 = 0;
const IRQ_KEYBOARD: u8 = 1;
const IRQ_SERIAL: u8 = 4;
const IRQ_RTC: u8 = 8;
const IRQ_MOUSE: u8 = 12;

/// The I/O APIC's pin for the 8259A's INT.
const PIN_PIC: u8 = 0;
/// The I/O APIC's pin for the 8254, because pin 0 is taken; ACPI's MADT says so with an interrupt source override.
pub(crate) const PIN_TIMER: u8 = 2;

impl Chipset {
    /// An interrupt waits for the CPU: one of the local APIC's above the processor's priority, or one of the 8259A's.
    pub fn interrupt_pending(&self) -> bool {
        let local = self.state.apics.as_ref().and_then(|apics| apics.local.pending());
        local.is_some() || self.ext_int_pending()
    }

    /// The CPU takes an interrupt: its vector, or `None` if there is none after all.
    ///
    /// The 8259A goes first: an ExtINT does not take part in the APIC's priorities.
    pub fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let vector = if self.ext_int_pending() {
            Some(self.state.pic.acknowledge())
        } else {
            self.state.apics.as_mut().and_then(|apics| apics.local.acknowledge())
        };
        self.settle();
        vector
    }

    /// Takes the NMI that waits, if there is one.
    pub fn take_nmi(&mut self) -> bool {
        self.state.apics.as_mut().is_some_and(|apics| apics.local.take_nmi())
    }

    /// The host presses an NMI button: a pulse on LINT1.
    pub fn raise_nmi(&mut self) {
        if let Some(apics) = &mut self.state.apics {
            apics.local.raise_lint1();
        }
    }

    /// Starts an access: nothing that is due before it may be left undone. Gives the time that counts.
    pub(crate) fn begin(&mut self, now: u64) -> u64 {
        let now = now.max(self.state.now);
        self.state.now = now;
        if self.next_due().is_some_and(|due| due <= now) {
            self.run_timers(now);
            self.drive_lines();
        }
        now
    }

    /// Ends an access: its effects reach the lines, and what it made due at once happens.
    pub(crate) fn settle(&mut self) {
        self.run_timers(self.state.now);
        self.drive_lines();
    }

    /// The 8254's output may have changed level as well as risen.
    pub(crate) fn follow_pit(&mut self) {
        let line = self.state.pit.advance(self.state.now);
        if line.rose {
            self.drive(IRQ_TIMER, false);
            self.drive(IRQ_TIMER, true);
        }
        self.drive(IRQ_TIMER, line.level);
    }

    /// IRQ 1 and 12 fall with each byte read, so that the next byte makes a new edge.
    pub(crate) fn drop_keyboard_lines(&mut self) {
        self.drive(IRQ_KEYBOARD, false);
        self.drive(IRQ_MOUSE, false);
    }

    /// Nobody would notice another edge of the 8254: one already waits in the 8259A, which is masked, and so is
    /// the I/O APIC's pin. The guest cannot change that without an access.
    pub(crate) fn ignores_pit(&self) -> bool {
        let io_masked = self.state.apics.as_ref().is_none_or(|apics| apics.io.is_masked(PIN_TIMER));
        io_masked && self.state.pic.ignores_edge(IRQ_TIMER)
    }

    fn next_due(&self) -> Option<u64> {
        use crate::clock::earlier;
        let state = &self.state;
        let local = state.apics.as_ref().and_then(|apics| apics.local.due());
        earlier(earlier(state.pit.due(), local), earlier(state.rtc.due(), state.pm.due()))
    }

    fn run_timers(&mut self, now: u64) {
        let is_due = |due: Option<u64>| due.is_some_and(|due| due <= now);
        if is_due(self.state.pit.due()) {
            self.follow_pit();
        }
        if is_due(self.state.rtc.due()) {
            self.state.rtc.advance(now);
        }
        if is_due(self.state.pm.due()) {
            self.state.pm.advance(now);
        }
        if let Some(apics) = &mut self.state.apics {
            apics.local.advance(now);
        }
    }

    fn drive_lines(&mut self) {
        let state = &self.state;
        let levels = [
            (IRQ_KEYBOARD, state.keyboard.interrupt()),
            (IRQ_SERIAL, state.uart.interrupt()),
            (IRQ_RTC, state.rtc.interrupt()),
            (IRQ_MOUSE, state.keyboard.mouse_interrupt()),
            (SCI_IRQ, state.pm.interrupt()),
        ];
        for (irq, level) in levels {
            self.drive(irq, level);
        }
        self.route_pic_output();
        self.route_level_pins();
    }

    /// Sets one ISA line at both controllers.
    fn drive(&mut self, irq: u8, level: bool) {
        let state = &mut self.state;
        if state.pic.line(irq) == level {
            return;
        }
        state.pic.set_line(irq, level);
        if let Some(apics) = &mut state.apics {
            let pin = if irq == IRQ_TIMER { PIN_TIMER } else { irq };
            if let Some(message) = apics.io.set_line(pin, level) {
                apics.local.accept(message);
            }
        }
    }

    /// The 8259A's INT goes to LINT0 and to the I/O APIC's pin 0. In ExtINT mode its level counts
    /// ([`Chipset::interrupt_pending`]), in all others its edge.
    fn route_pic_output(&mut self) {
        let state = &mut self.state;
        let level = state.pic.interrupt();
        if level == state.pic_output {
            return;
        }
        state.pic_output = level;
        if let Some(apics) = &mut state.apics {
            if level {
                apics.local.raise_lint0();
            }
            if let Some(message) = apics.io.set_line(PIN_PIC, level) {
                apics.local.accept(message);
            }
        }
    }

    /// Offers the message of each asserted level-triggered pin once.
    fn route_level_pins(&mut self) {
        let Some(apics) = &mut self.state.apics else { return };
        let mut from = 0;
        while let Some((pin, message)) = apics.io.ready(from) {
            if apics.local.accept(message) {
                apics.io.accepted(pin);
            }
            from = pin + 1;
        }
    }

    fn ext_int_pending(&self) -> bool {
        self.state.pic.interrupt()
            && self.state.apics.as_ref().is_none_or(|apics| {
                let through_io =
                    || apics.io.ext_int().is_some_and(|message| apics.local.is_addressed(message));
                apics.local.passes_ext_int() || through_io()
            })
    }
}
