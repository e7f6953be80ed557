//! The trace: a line for each exit, with the instructions retired before it and what it was answered.
//!
//! It stands behind the run loop, after an exit is handled. A trace that cannot be written ends, and the report says so; the
//! guest runs on.

use crate::machine::Machine;
use crate::run::Step;
use vcpu::Exit;

impl Machine {
    /// Writes the line of an exit to the trace, if there is one.
    pub(crate) fn note_exit(&mut self, exit: &Exit, step: &Step) {
        let Some(trace) = &mut self.trace else { return };
        let at = self.cpu.retired();
        let written = match step {
            Step::Enter(answer) => writeln!(trace, "{at} {exit:?} -> {answer:?}"),
            Step::End(end) => writeln!(trace, "{at} {exit:?} -> {end}"),
        };
        if let Err(error) = written {
            self.trace = None;
            self.notes.push(format!("writing the trace failed after {at} instructions: {error}"));
        }
    }

    /// Writes out what is held back.
    pub(crate) fn flush_trace(&mut self) {
        let Some(trace) = &mut self.trace else { return };
        if let Err(error) = trace.flush() {
            self.trace = None;
            self.notes.push(format!("writing the end of the trace failed: {error}"));
        }
    }
}
