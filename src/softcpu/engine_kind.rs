//! The choice between the two engines of the software CPU. Both stand behind the same [`vcpu::Vcpu`] and give the same guest,
//! tick by tick; they differ in what an instruction costs the host.

/// Which engine executes guest code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EngineKind {
    /// Decodes once, executes each instruction by a function: the reference.
    Interpret,
    /// Translates blocks of 64-bit code to code of the host; what does not pay is left to the interpreter.
    #[default]
    Translate,
}

impl EngineKind {
    /// Both, in the order of reports.
    pub const ALL: [Self; 2] = [Self::Interpret, Self::Translate];

    /// Its name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interpret => "interpret",
            Self::Translate => "translate",
        }
    }

    /// The engine of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|engine| engine.name() == name)
    }
}
