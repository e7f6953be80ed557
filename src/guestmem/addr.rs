//! Address kinds and frame numbers.
//!
//! A guest-virtual address (GVA; "linear address" in SDM Vol. 3 §4.1) is what the guest's instructions name, a
//! guest-physical address (GPA) is what the guest's tables produce, a host-physical address (HPA) is what ours
//! produce: an offset into [`crate::HostMemory`]. The three are distinct types with no conversion between them but
//! a walk, so mixing them up does not compile.

use std::fmt;

/// log2 of the size of a base page.
pub const PAGE_SHIFT: u32 = 12;
/// Size of a base page in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset within the 4 KiB page.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// The address of the first byte of the 4 KiB page.
            #[inline]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// Whether the address is a multiple of `align`, a power of two.
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
            /// The address `bytes` further, or `None` past the end of the 64-bit space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }
            /// The address `bytes` further, modulo 2^64.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// A guest-virtual (linear) address.
    Gva
}
address! {
    /// A guest-physical address.
    Gpa
}
address! {
    /// A host-physical address: an offset into the engine's own memory object.
    Hpa
}
address! {
    /// A guest frame number: a GPA divided by 4096.
    Gfn
}
address! {
    /// A host frame number: an HPA divided by 4096.
    Hfn
}

impl Gva {
    /// The virtual page number.
    #[inline]
    pub const fn page_number(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// Whether bits 63 down to `width - 1` are all equal (SDM Vol. 1 §3.3.7.1); `width` is 48 or 57.
    #[inline]
    pub const fn is_canonical(self, width: u32) -> bool {
        let shift = 64 - width;
        (((self.0 << shift) as i64) >> shift) as u64 == self.0
    }
}

impl Gpa {
    /// The frame that holds this address.
    #[inline]
    pub const fn frame(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl Hpa {
    /// The frame that holds this address.
    #[inline]
    pub const fn frame(self) -> Hfn {
        Hfn(self.0 >> PAGE_SHIFT)
    }
}

impl Gfn {
    /// The address of the first byte of the frame. Frame numbers above 2^52 have no address; they wrap.
    #[inline]
    pub const fn base(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

impl Hfn {
    /// The address of the first byte of the frame.
    #[inline]
    pub const fn base(self) -> Hpa {
        Hpa(self.0 << PAGE_SHIFT)
    }
}

/// A page size that some entry format knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB: every format.
    Size4K,
    /// 2 MiB: PAE, 4- and 5-level, EPT.
    Size2M,
    /// 4 MiB: 32-bit two-level tables with CR4.PSE.
    Size4M,
    /// 1 GiB: 4- and 5-level, EPT.
    Size1G,
}

impl PageSize {
    /// log2 of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        match self {
            PageSize::Size4K => 12,
            PageSize::Size2M => 21,
            PageSize::Size4M => 22,
            PageSize::Size1G => 30,
        }
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The size in 4 KiB frames.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << (self.shift() - PAGE_SHIFT)
    }

    /// A mask of the offset bits.
    #[inline]
    pub const fn offset_mask(self) -> u64 {
        self.bytes() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_have_equal_upper_bits() {
        assert!(Gva(0x0000_7fff_ffff_ffff).is_canonical(48));
        assert!(!Gva(0x0000_8000_0000_0000).is_canonical(48));
        assert!(Gva(0xffff_8000_0000_0000).is_canonical(48));
        assert!(!Gva(0xffff_7fff_ffff_ffff).is_canonical(48));
        assert!(Gva(0x00ff_ffff_ffff_ffff).is_canonical(57));
        assert!(!Gva(0x0100_0000_0000_0000).is_canonical(57));
    }

    #[test]
    fn frames_and_addresses_agree() {
        assert_eq!(Gpa(0x1234_5678).frame(), Gfn(0x12345));
        assert_eq!(Gfn(0x12345).base(), Gpa(0x1234_5000));
        assert_eq!(Hpa(0x1fff).page_base(), Hpa(0x1000));
        assert_eq!(Hpa(0x1fff).page_offset(), 0xfff);
        assert_eq!(Gpa(u64::MAX).checked_add(1), None);
    }

    #[test]
    fn page_sizes() {
        assert_eq!(PageSize::Size2M.frames(), 512);
        assert_eq!(PageSize::Size1G.frames(), 262_144);
        assert_eq!(PageSize::Size4M.offset_mask(), 0x3f_ffff);
    }
}
