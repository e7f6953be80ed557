//! How a backend lists the rules that test builds of it can break on purpose: one fault a line, with its name, what it does and
//! its class. It stands beside the path of an access: without the feature `seeded-faults` of a backend nothing asks for a fault.

/// Declares the enum `Seeded` of a backend: its documentation, then each class with its faults. The documentation of a fault is
/// its phrase.
#[macro_export]
macro_rules! seeded_faults {
    ($(#[doc = $of:literal])* $($class:literal { $($(#[doc = $phrase:literal])* $fault:ident = $name:literal,)* })*) => {
        $(#[doc = $of])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Seeded {
            $($($(#[doc = $phrase])* $fault,)*)*
        }

        impl Seeded {
            /// All of them, class by class.
            pub const ALL: &'static [Seeded] = &[$($(Seeded::$fault,)*)*];

            /// The name by which it is chosen.
            pub const fn name(self) -> &'static str {
                match self { $($(Seeded::$fault => $name,)*)* }
            }

            /// What it does.
            pub const fn phrase(self) -> &'static str {
                match self { $($(Seeded::$fault => concat!($($phrase,)*).trim_ascii(),)*)* }
            }

            /// Which part of the backend it breaks.
            pub const fn class(self) -> &'static str {
                match self { $($(Seeded::$fault => $class,)*)* }
            }

            /// The fault of that name.
            pub fn named(name: &str) -> Option<Seeded> {
                Self::ALL.iter().copied().find(|fault| fault.name() == name)
            }
        }
    };
}
