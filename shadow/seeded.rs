//! Faults planted on purpose: each breaks one rule of this backend, so that the suites can show that they would notice.
//!
//! They exist in test builds only (feature `seeded-faults`); without it [`ShadowMmu::is_broken`] is `false` at compile
//! time and nothing of them is left. One is chosen by `Options::seeded`.

use crate::ShadowMmu;

macro_rules! seeded {
    ($($(#[doc = $phrase:literal])* $fault:ident = $name:literal,)*) => {
        /// A rule of the shadow backend that can be broken on purpose.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Seeded {
            $($(#[doc = $phrase])* $fault,)*
        }

        impl Seeded {
            /// All of them.
            pub const ALL: &'static [Seeded] = &[$(Seeded::$fault,)*];

            /// The name by which it is chosen.
            pub const fn name(self) -> &'static str {
                match self { $(Seeded::$fault => $name,)* }
            }

            /// What it does.
            pub const fn phrase(self) -> &'static str {
                match self { $(Seeded::$fault => concat!($($phrase,)*),)* }
            }

            /// The fault of that name.
            pub fn named(name: &str) -> Option<Seeded> {
                Self::ALL.iter().copied().find(|fault| fault.name() == name)
            }
        }
    };
}

seeded! {
    /// The walk of a fault leaves the accessed and dirty flags of the guest's entries as they are.
    FlagsNotSet = "flags-not-set",
    /// INVLPG asks for no flush.
    InvlpgIgnored = "invlpg-ignored",
}

impl ShadowMmu {
    /// Whether this rule is broken on purpose.
    #[inline(always)]
    pub(crate) fn is_broken(&self, fault: Seeded) -> bool {
        #[cfg(feature = "seeded-faults")]
        return self.options.seeded == Some(fault);
        #[cfg(not(feature = "seeded-faults"))]
        {
            let _ = fault;
            false
        }
    }
}
