//! Tables that point at themselves and at each other: sixteen frames hold random entries whose addresses are those same
//! frames, so each of them is a table of every level and data at once. Every access is compared with the
//! manual's rules, and what it reads or writes with the memory behind it.
#![no_std]
#![no_main]

use rt::{
    Mode, check, cpu, frames, mem,
    model::{self, Access},
    paging::{NX, P, PS, Space, U, W},
    random::Random,
    same, say,
    trap::{self, Fault},
    user,
};

rt::guest!("tangle", main);

const FRAMES: usize = 16;
/// The first of the four slots in the PML4 that lead into the tangle.
const SLOT: u64 = 8;

struct Tangle {
    space: Space,
    frames: [u64; FRAMES],
    /// A block of 2 MiB behind large pages.
    block: u64,
    random: Random,
}

impl Tangle {
    fn entry(&mut self) -> u64 {
        let r = self.random.next();
        let mut entry = self.frames[self.random.below(FRAMES as u64) as usize] | P | W | U;
        // One bit in each of some places, seldom.
        if r & 15 == 0 {
            entry &= !P;
        }
        if r >> 4 & 7 == 0 {
            entry &= !W;
        }
        if r >> 7 & 7 == 0 {
            entry &= !U;
        }
        if r >> 10 & 15 == 0 && cpu::has_nx() {
            entry |= NX;
        }
        if r >> 14 & 31 == 0 {
            entry |= 1 << 51;
        }
        // As a directory's entry this is a large page, as a page table's it is just the PAT bit, elsewhere it is reserved.
        if r >> 19 & 15 == 0 {
            entry = self.block | PS | entry & (P | W | U | NX);
        }
        entry
    }

    fn fill(&mut self) {
        for n in 0..FRAMES {
            for i in 0..512 {
                let entry = self.entry();
                mem::write64(self.frames[n] + i * 8, entry);
            }
        }
        for i in 0..4 {
            mem::write64(self.space.root + (SLOT + i) * 8, self.frames[i as usize] | P | W | U);
        }
    }

    fn address(&mut self) -> u64 {
        let low = self.random.next() & ((1 << 39) - 1) & !7;
        (SLOT + self.random.below(4)) << 39 | low
    }
}

fn main() {
    let space = Space::new();
    user::map(space);
    let mut tangle = Tangle {
        space,
        frames: [(); FRAMES].map(|()| frames::take()),
        block: frames::block(2 << 20, 2 << 20),
        random: Random::new(16),
    };
    space.load();
    let mut counts = [0u64; 2];
    for _ in 0..40 {
        tangle.fill();
        cpu::flush();
        (0..250).for_each(|_| step(&mut tangle, &mut counts));
    }
    let [passed, faulted] = counts;
    check!(passed > 1000 && faulted > 1000);
    say!("10000 accesses: {passed} went through, {faulted} faults");
}

fn step(tangle: &mut Tangle, counts: &mut [u64; 2]) {
    let (va, kind) = (tangle.address(), tangle.random.below(4));
    let access = Access { write: kind & 1 != 0, fetch: false, user: kind & 2 != 0 };
    // The tables may have been changed by the last write, so nothing old may be used.
    cpu::flush();
    let want = model::translate(tangle.space, va, access, Mode::now());
    let value = tangle.entry();
    let got: Result<u64, Fault> = match (access.user, access.write) {
        (false, false) => trap::catch(|| mem::read64(va)),
        (false, true) => trap::catch(|| {
            mem::write64(va, value);
            value
        }),
        (true, false) => user::access(user::code::user_read64, va, 0),
        (true, true) => user::access(user::code::user_write64, va, value).map(|_| value),
    };
    match (got, want) {
        (Ok(seen), Ok((pa, _))) => {
            counts[0] += 1;
            let memory = mem::read64(pa);
            if seen != memory {
                same!(seen, memory, "{access:?} at {va:#x}, which is {pa:#x}");
            }
        }
        (Err(fault), Err(error)) => {
            counts[1] += 1;
            // QEMU's translator omits P beside RSVD.
            let error = if cpu::is_qemu_tcg() && error & 8 != 0 { error & !1 } else { error };
            if (fault.vector(), fault.error(), fault.cr2) != (14, error, va) {
                same!((fault.vector(), fault.error(), fault.cr2), (14, error, va), "{access:?} at {va:#x}");
            }
        }
        (got, want) => {
            let got = got.map_err(|f| (f.vector(), f.error()));
            check!(false, "{access:?} at {va:#x}: {got:x?}, the manual says {want:x?}");
        }
    }
}
