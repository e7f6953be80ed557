#![allow(unsafe_code, reason = "makes the frame in place: it is too large to pass over the stack")]
//! The frame of translated code: the CPU's state and the tables that the code looks into, at fixed distances from the host's
//! RSP.
//!
//! Where it stands in the path of one access: while translated code runs RSP points at [`Core`], so that registers in
//! memory, flags, TLB and jump tables are `[rsp + constant]` and no register is spent on them. The host's own stack stays
//! where it was; what a signal pushes below RSP lands in `Frame::below`, where nothing is kept.

use super::returns::STACK;
use crate::core::Core;
use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::mem::offset_of;
use std::ops::{Deref, DerefMut};

/// Room for the frames of signals that arrive while translated code runs; the kernel needs some 4 KiB with AVX-512.
const BELOW: usize = 64 * 1024;
/// Entries of the indirect-branch cache, which is indexed by the low 16 bits of the target.
pub const TARGETS: usize = 1 << 16;
/// Modes that code is translated for; see [`super::mode::Mode`].
pub const MODES: usize = 8;
/// Pages of code (with the privilege under which they run) that can be known at once.
pub const CODE_PAGES: usize = 1 << 16;

/// What translated code needs beside [`Core`].
#[repr(C, align(4096))]
pub struct Frame {
    below: [u8; BELOW],
    core: Core,
    /// Where to go for an indirect branch, by mode and low 16 bits of the target.
    targets: [[u64; TARGETS]; MODES],
    /// Where returns go on, by mode and the low bits of RSP.
    returns: [[u64; STACK / 8]; MODES],
    /// For each page of code, the linear page at which it is mapped now; 1 if unknown.
    pages: [u64; CODE_PAGES],
}

/// Distance of the indirect-branch cache of a mode from RSP.
pub const fn targets(mode: usize) -> i32 {
    (offset_of!(Frame, targets) - offset_of!(Frame, core) + mode * TARGETS * 8) as i32
}

/// Distance of the return-address cache of a mode from RSP.
pub const fn returns(mode: usize) -> i32 {
    (offset_of!(Frame, returns) - offset_of!(Frame, core) + mode * STACK) as i32
}

/// Distance of the word of a page of code from RSP.
pub const fn page_word(page: usize) -> i32 {
    (offset_of!(Frame, pages) - offset_of!(Frame, core) + page * 8) as i32
}

/// Owns a frame, and is used as the [`Core`] in it.
pub struct FrameBox(Box<Frame>);

impl FrameBox {
    /// A frame around a CPU.
    pub fn new(core: Core) -> Self {
        let layout = Layout::new::<Frame>();
        // SAFETY: the layout is not of size zero. Everything but `core` is integers, for which zero is a value, and
        // `core` is written before the box is made.
        let frame = unsafe {
            let frame = alloc_zeroed(layout).cast::<Frame>();
            if frame.is_null() {
                handle_alloc_error(layout);
            }
            std::ptr::write(&raw mut (*frame).core, core);
            Box::from_raw(frame)
        };
        Self(frame)
    }

    /// The frame as translated code is given it.
    pub fn pointer(&mut self) -> *mut Core {
        // The pointer must be good for the tables behind `core` too, so it is made from the whole.
        let frame: *mut Frame = &mut *self.0;
        // SAFETY: the offset lies inside the frame.
        unsafe { frame.byte_add(offset_of!(Frame, core)).cast() }
    }

    /// The indirect-branch cache of a mode.
    pub fn targets_mut(&mut self, mode: usize) -> &mut [u64; TARGETS] {
        &mut self.0.targets[mode % MODES]
    }

    /// The return-address cache of a mode.
    pub fn returns_mut(&mut self, mode: usize) -> &mut [u64; STACK / 8] {
        &mut self.0.returns[mode % MODES]
    }

    /// The word of a page of code.
    pub fn page_mut(&mut self, page: usize) -> &mut u64 {
        &mut self.0.pages[page % CODE_PAGES]
    }
}

impl Deref for FrameBox {
    type Target = Core;
    #[inline(always)]
    fn deref(&self) -> &Core {
        &self.0.core
    }
}

impl DerefMut for FrameBox {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Core {
        &mut self.0.core
    }
}
