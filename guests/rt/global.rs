//! Mutable globals for one processor without threads.
#![allow(unsafe_code, reason = "a guest has one processor and no threads, so a global needs no lock")]

use core::cell::UnsafeCell;

/// A global that its only processor may change.
#[repr(transparent)]
pub struct Global<T>(UnsafeCell<T>);

// SAFETY: there is one processor; an exception handler that changes a global interrupts code that does not hold it.
unsafe impl<T> Sync for Global<T> {}

impl<T> Global<T> {
    /// A global with its first value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The global itself; callers keep the reference for one statement only.
    #[allow(clippy::mut_from_ref, reason = "the point of the type: one processor, short borrows")]
    pub fn get(&self) -> &mut T {
        // SAFETY: see `Sync` above.
        unsafe { &mut *self.0.get() }
    }

    /// Where the global lies.
    pub const fn as_ptr(&self) -> *mut T {
        self.0.get()
    }

    /// Its address as a number.
    pub fn addr(&self) -> u64 {
        self.0.get() as u64
    }
}

impl<T: Copy> Global<T> {
    /// Reads it as memory (never from a register), since handlers change globals behind the compiler's back.
    pub fn load(&self) -> T {
        // SAFETY: see `Sync` above.
        unsafe { self.0.get().read_volatile() }
    }

    /// Writes it as memory.
    pub fn store(&self, value: T) {
        // SAFETY: see `Sync` above.
        unsafe { self.0.get().write_volatile(value) }
    }
}
