//! The CPU model: what CPUID says and what the CPU therefore executes. One fixed, named model by default, so that a run
//! does not depend on the host.

use iced_x86::Instruction;

/// MXCSR bits that can be set.
pub const MXCSR_MASK: u32 = 0xffff;

/// A CPU model.
#[derive(Clone, Debug)]
pub struct CpuModel {
    name: &'static str,
    tsc_hz: u64,
}

impl Default for CpuModel {
    fn default() -> Self {
        Self { name: "antumbra-v2", tsc_hz: 1_000_000_000 }
    }
}

impl CpuModel {
    /// The model of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        (name == "antumbra-v2").then(Self::default)
    }
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }
    /// Frequency of the time-stamp counter.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
    /// The time-stamp counter at a time in ticks (nanoseconds).
    pub fn ticks_to_tsc(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * u128::from(self.tsc_hz) / 1_000_000_000) as u64
    }
    /// MAXPHYADDR.
    pub fn phys_bits(&self) -> u8 {
        46
    }
    /// Family, model and stepping, as in EDX after reset.
    pub fn signature(&self) -> u64 {
        0x0060_0f12
    }
    /// Whether the model has the instruction.
    pub fn has(&self, _insn: &Instruction) -> bool {
        true
    }
}
