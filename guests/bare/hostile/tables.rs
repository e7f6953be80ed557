//! Page tables in places where none should be. Each guest survives and ends by itself.

use super::{FAR, NOTHING};
use rt::{
    apic, check, cpu, frames, mem,
    model::{ERR_P, ERR_RSVD},
    paging::{ADDR, LOW, P, PS, Space, U, W},
    random::Random,
    same, say, trap,
};

/// Reads and writes at addresses that lead through the strange tables; whatever comes, the guest goes on.
fn poke(base: u64, count: u64, writes: bool) -> u64 {
    let mut random = Random::new(base);
    let mut faults = 0;
    for i in 0..count {
        let va = base + (random.next() & ((1 << 39) - 1) & !7);
        let result = trap::catch(|| {
            if writes && i % 2 == 0 {
                mem::write64(va, i);
            } else {
                mem::read64(va);
            }
        });
        if let Err(fault) = result {
            faults += 1;
            if (fault.vector(), fault.cr2) != (14, va) {
                same!((fault.vector(), fault.cr2), (14, va), "the only exception there can be");
            }
        }
    }
    faults
}

/// A PML4 whose every entry but the first is itself: all memory is the PML4.
pub fn own() {
    let space = Space::new();
    (1..512).for_each(|i| mem::write64(space.root + i * 8, space.root | P | W));
    space.load();
    let mut random = Random::new(1);
    for step in 0..2000u64 {
        // No index may be 0, where the kernel is.
        let index = |random: &mut Random| 1 + random.below(511);
        let [a, b, c, d] = [(); 4].map(|()| index(&mut random));
        let va = a << 39 | b << 30 | c << 21 | d << 12 | index(&mut random) << 3;
        let va = if a >= 256 { va | 0xffff << 48 } else { va };
        same!(mem::read64(va) & ADDR, space.root, "an entry through itself");
        mem::write64(va, mem::read64(va) ^ 1 << (52 + step % 7));
        same!(mem::read64(va), mem::read64(space.root + (va & 4095)), "written through itself");
    }
    // And one that takes its own write permission away, at the address it was reached by.
    let va = 5 << 39 | 5 << 30 | 5 << 21 | 5 << 12 | 5 << 3;
    mem::write64(va, space.root | P);
    cpu::flush();
    let fault = trap::catch(|| mem::write64(va, 0));
    check!(fault.is_err_and(|f| (f.vector(), f.error(), f.cr2) == (14, 3, va)), "no longer writable");
    say!("2000 entries through themselves");
}

/// Tables of every level on device pages.
pub fn mmio() {
    let space = Space::new();
    space.load();
    for device in [apic::LOCAL, apic::IO, 0xb_8000] {
        for level in 1..=4 {
            // A chain of good tables down to the level, then the device.
            let mut table = space.root;
            for at in (level..4).rev() {
                let next = frames::take();
                (0..512)
                    .filter(|i| at != 3 || *i != 0)
                    .for_each(|i| mem::write64(table + i * 8, next | P | W | U));
                mem::write64(space.root, mem::read64(Space::boot().root));
                table = next;
            }
            if level == 4 {
                mem::write64(space.root + 8, device | P | W | U);
            } else {
                (0..512).for_each(|i| mem::write64(table + i * 8, device | P | W | U));
            }
            cpu::flush();
            // As data (level 1's entries are pages), reads only: a write could switch the APIC off.
            poke(LOW, 64, false);
        }
    }
    Space::boot().load();
    say!("tables on device pages");
}

/// Tables and pages where nothing is.
pub fn past_ram() {
    let space = Space::new();
    space.load();
    for nothing in [NOTHING, FAR, 0x100_0000_0000 & ((1 << cpu::physical_bits()) - 1)] {
        for level in 1..=4 {
            let slot = space.slot(LOW, level);
            let old = mem::read64(slot);
            mem::write64(slot, nothing | P | W | U);
            cpu::flush();
            let base = LOW;
            for i in 0..32u64 {
                let result = trap::catch(|| {
                    mem::write64(base + i * 8, i);
                    mem::read64(base + i * 8)
                });
                check!(result.is_ok() || result.is_err_and(|f| f.vector() == 14), "a page fault or nothing");
            }
            mem::write64(slot, old);
        }
        // A large page over nothing.
        let slot = space.slot(2 * LOW, 2);
        mem::write64(slot, nothing & !0x1f_ffff | P | W | PS);
        cpu::flush();
        check!(trap::catch(|| mem::write64(2 * LOW + 0x1000, 7)).is_ok(), "a write to nothing");
        check!(trap::catch(|| mem::read64(2 * LOW + 0x1000)).is_ok(), "a read of nothing");
        mem::write64(slot, 0);
    }
    Space::boot().load();
    say!("tables and pages where nothing is");
}

/// Tables in the firmware's place, which may be ROM: the accessed bits cannot be set there.
pub fn rom() {
    // QEMU's translator tries for ever to set an accessed bit in ROM.
    if cpu::is_qemu_tcg() {
        return rt::skip("tables in ROM");
    }
    let space = Space::new();
    for place in [0xf_0000u64, 0xf_f000, 0xc_0000, 0xe_0000] {
        mem::write64(space.root + 8, place | P | W | U);
        space.load();
        poke(LOW, 64, false);
        // And as the last level, so that the ROM's bytes are entries of pages.
        mem::write64(space.root + 8, 0);
        let slot = space.slot(LOW, 2);
        mem::write64(slot, place | P | W | U);
        cpu::flush();
        for i in 0..512u64 {
            let entry = mem::read64(place + i * 8);
            // Only where the page could not be a device's.
            if entry & P == 0 || entry & ADDR > frames::end() {
                let result = trap::catch(|| mem::read8(LOW + i * 4096));
                check!(result.is_ok() || result.is_err_and(|f| f.vector() == 14), "a page fault or nothing");
            }
        }
        space.load();
    }
    Space::boot().load();
    say!("tables in the firmware's place");
}

/// Reserved bits in every entry of every level.
pub fn reserved() {
    let space = Space::new();
    let frame = frames::take();
    let tables = [(); 4].map(|()| frames::take());
    // QEMU's translator omits P beside RSVD.
    let want = if cpu::is_qemu_tcg() { ERR_RSVD } else { ERR_P | ERR_RSVD };
    let mut random = Random::new(9);
    space.load();
    for level in 1..=4u32 {
        for bit in cpu::physical_bits()..52 {
            mem::write64(space.root + 8, tables[3] | P | W | U);
            for at in 1..=3u32 {
                let below = if at == 1 { frame } else { tables[at as usize - 1] };
                (0..512).for_each(|i| mem::write64(tables[at as usize] + i * 8, below | P | W | U));
            }
            let bad = 1 << bit;
            if level == 4 {
                mem::write64(space.root + 8, tables[3] | P | W | U | bad);
            } else {
                let table = tables[level as usize];
                (0..512).for_each(|i| mem::write64(table + i * 8, mem::read64(table + i * 8) | bad));
            }
            cpu::flush();
            for _ in 0..4 {
                let va = LOW + (random.next() & ((1 << 39) - 1));
                let fault = trap::catch(|| mem::read8(va));
                check!(
                    fault.is_err_and(|f| (f.vector(), f.error(), f.cr2) == (14, want, va)),
                    "bit {bit} at level {level}"
                );
            }
        }
    }
    Space::boot().load();
    say!("reserved bits in every entry of every level");
}

/// 512 GiB of addresses on one large page.
pub fn vast() {
    let space = Space::new();
    let (pointers, directory, page) = (frames::take(), frames::take(), frames::block(2 << 20, 2 << 20));
    (0..512).for_each(|i| mem::write64(pointers + i * 8, directory | P | W));
    (0..512).for_each(|i| mem::write64(directory + i * 8, page | P | W | PS));
    mem::write64(space.root + 8, pointers | P | W);
    space.load();
}
