#![allow(
    unsafe_code,
    reason = "the stubs are assembled into this program, and their bytes are read from there"
)]
//! The stubs: what a vCPU executes to make accesses, in 64-bit and in 32-bit code.
//!
//! A list of accesses is done by the vCPU alone. A loop at CPL 3 or CPL 0 reads a question, touches memory and notes what
//! came back; a page fault is noted by the stub's own handler at CPL 0 (vector, error code, CR2, RIP), which goes on with
//! the next question. Only the end of the list leaves the vCPU. Trips to user space are by far the dearest part where KVM
//! runs without VT-x or SVM below it.

use crate::batch::Bits;

std::arch::global_asm!(include_str!("stub64.s"));
std::arch::global_asm!(include_str!("stub32.s"));

unsafe extern "C" {
    static antumbra_stub64: u8;
    static antumbra_stub64_end: u8;
    static antumbra_stub32: u8;
    static antumbra_stub32_end: u8;
}

/// A stub's code and where in it things are.
#[derive(Clone, Debug)]
pub(crate) struct Stub {
    /// To be put at the start of the stub's frames.
    pub code: Vec<u8>,
    /// Where a batch begins, at CPL 0, the frame of an IRET on the stack.
    pub start: u64,
    /// The same, but PKRU is loaded from R8 first.
    pub start_with_keys: u64,
    /// The loop.
    pub next: u64,
    /// Where executed data goes back to.
    pub landed: u64,
    /// The handler of #PF.
    pub page_fault: u64,
    /// The handler of the loop's end.
    pub finished: u64,
    vectors: u64,
}

impl Stub {
    pub fn new(bits: Bits) -> Self {
        let (first, end) = match bits {
            Bits::Bits64 => (&raw const antumbra_stub64, &raw const antumbra_stub64_end),
            Bits::Bits32 => (&raw const antumbra_stub32, &raw const antumbra_stub32_end),
        };
        let length = end as usize - first as usize;
        // SAFETY: both symbols delimit one run of bytes of this program's text, which is mapped readable and is never
        // written.
        let code = unsafe { std::slice::from_raw_parts(first, length) }.to_vec();
        let offset = |nth: usize| {
            let bytes = code[nth * 4..nth * 4 + 4].try_into().expect("four bytes are four bytes");
            u64::from(u32::from_le_bytes(bytes))
        };
        Self {
            start: offset(0),
            next: offset(1),
            landed: offset(2),
            page_fault: offset(3),
            finished: offset(4),
            vectors: offset(5),
            start_with_keys: offset(6),
            code,
        }
    }

    /// The handler of an exception that is not expected.
    pub fn vector(&self, number: u8) -> u64 {
        self.vectors + 16 * u64::from(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stubs_fit_a_page_and_say_where_things_are() {
        for bits in [Bits::Bits64, Bits::Bits32] {
            let stub = Stub::new(bits);
            assert!(stub.code.len() > 512 && stub.code.len() <= 4096, "{} bytes", stub.code.len());
            let places = [stub.start, stub.next, stub.landed, stub.page_fault, stub.finished, stub.vector(0)];
            assert!(places.is_sorted() && places[0] >= 28, "{places:?}");
            // The handler of vector 31 begins with the load of its number.
            assert_eq!(stub.code[stub.vector(31) as usize..][..2], [0xb0, 31]);
        }
    }
}
