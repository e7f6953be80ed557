//! What the host counted while it ran a guest: figures whose names and meaning are the host's own.
//!
//! It stands after a run, beside the counters of ours (`mmu::counters`), with which they share nothing: which figures there
//! are differs from kernel to kernel.

/// Figures of one part of the machine, by name, in the host's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FigureGroup {
    /// Which part.
    pub name: String,
    /// The figures.
    pub figures: Vec<(String, u64)>,
}

/// All of them, and who it was that translated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFigures {
    /// Who walked the guest's tables, in a word.
    pub walker: String,
    /// The same for people.
    pub sentence: String,
    /// In how many pieces the host has the guest's memory.
    pub memory_slots: u64,
    /// The figures.
    pub groups: Vec<FigureGroup>,
}
