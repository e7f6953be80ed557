//! The choice between the two engines of the software CPU. Both stand behind the same [`vcpu::Vcpu`] and give the same guest,
//! tick by tick; they differ in what an instruction costs the host.

/// Which engine executes guest code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// Decodes once, executes each instruction by a function: the reference.
    Interpret,
    /// Translates blocks of 64-bit code to code of the host; what does not pay is left to the interpreter.
    #[default]
    Translate,
}

impl EngineKind {
    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Interpret => "interpret",
            Self::Translate => "translate",
        }
    }
}
