//! The runtime under every bare-metal guest: from the 32-bit entry that PVH and multiboot share to long mode, with
//! descriptor tables, exception handlers that can recover, page tables, frames, user mode, and a serial line.
//!
//! A guest owns its whole machine, so what would be undefined behaviour in a hosted program (reading an
//! unmapped address, changing the tables under one's feet) is here the thing under test: the fault is recorded and the
//! guest continues. The wrappers in `mem`, `cpu` and `io` are therefore safe functions, by decision: an `unsafe` at
//! each of a thousand probes would say nothing.
#![no_std]
#![warn(missing_docs)]

pub mod apic;
pub mod cpu;
pub mod descriptors;
pub mod entry;
pub mod exchange;
pub mod frames;
pub mod global;
pub mod io;
pub mod legacy;
pub mod mem;
pub mod model;
pub mod paging;
pub mod random;
pub mod report;
pub mod trap;
pub mod user;

pub use model::Mode;
pub use report::{finish, skip};

/// Declares the guest's name and its main function, which the entry code calls in long mode with interrupts off.
#[macro_export]
macro_rules! guest {
    ($name:expr, $main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() -> ! {
            $crate::report::begin($name);
            $main();
            $crate::finish()
        }
    };
}

/// Prints one line on the serial port.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        $crate::io::print(format_args!($($arg)*));
        $crate::io::print(format_args!("\n"));
    }};
}

/// Counts one check; a false condition is printed with its place and makes the guest fail.
#[macro_export]
macro_rules! check {
    ($cond:expr) => {
        $crate::report::checked($cond, file!(), line!(), format_args!("{}", stringify!($cond)))
    };
    ($cond:expr, $($arg:tt)+) => {
        $crate::report::checked($cond, file!(), line!(), format_args!($($arg)+))
    };
}

/// Counts one check that two values are equal; a difference is printed in hexadecimal and makes the guest fail.
#[macro_export]
macro_rules! same {
    ($got:expr, $want:expr, $($arg:tt)+) => {{
        let (got, want) = ($got, $want);
        $crate::report::checked(
            got == want,
            file!(),
            line!(),
            format_args!("{}: got {:#x?}, want {:#x?}", format_args!($($arg)+), got, want),
        )
    }};
}
