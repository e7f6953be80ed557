//! One page, one defect in its tables, every access in every mode: outcome, error code, CR2, accessed and dirty bits.

use core::arch::{asm, global_asm};
use rt::{
    Mode, cpu, frames, mem,
    model::{self, Access},
    paging::{A, D, NX, P, PS, Space, U, W},
    random::Random,
    same, say,
    trap::{self, Fault},
    user,
};

/// The page under test, in a slot of its own so that defects at level 4 hit nothing else.
const VA: u64 = 2 << 39 | 3 << 30 | 5 << 21 | 7 << 12;
/// Offsets in the page: data, RET, INT 0x30.
const RET: u64 = 0x100;
const INT: u64 = 0x200;

global_asm!(
    r#"
    .section .user.matrix, "ax"
    .globl user_add64
user_add64:
    add qword ptr [rdi], 0
    int 0x30
    .text
"#
);

unsafe extern "C" {
    fn user_add64();
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    Modify,
    Fetch,
}

const KINDS: [Kind; 4] = [Kind::Read, Kind::Write, Kind::Modify, Kind::Fetch];

fn probe(kind: Kind, from_user: bool, ac: bool) -> Result<u64, Fault> {
    if from_user {
        return match kind {
            Kind::Read => user::access(user::code::user_read64, VA, 0),
            Kind::Write => user::access(user::code::user_write8, VA, 0x77),
            Kind::Modify => user::access(user_add64, VA, 0),
            Kind::Fetch => user::access(user::code::user_jump, VA + INT, 0),
        };
    }
    let flags = if ac { 1u64 << 18 | 2 } else { 2 };
    let result = trap::catch(|| {
        cpu::set_flags(flags);
        match kind {
            Kind::Read => mem::read64(VA),
            Kind::Write => {
                mem::write8(VA, 0x77);
                0
            }
            // SAFETY: the fault is what is asked for.
            Kind::Modify => unsafe {
                asm!("lock add qword ptr [{}], 0", in(reg) VA);
                0
            },
            // SAFETY: the page holds a RET there.
            Kind::Fetch => unsafe {
                asm!("call {}", in(reg) VA + RET, clobber_abi("C"));
                0
            },
        }
    });
    cpu::set_flags(2);
    result
}

/// The tables of one shape: the leaf's level and where each level's entry lies.
struct Shape {
    space: Space,
    leaf: u32,
    slots: [u64; 5],
    good: [u64; 5],
}

impl Shape {
    fn new(space: Space, leaf: u32) -> Self {
        let size = 1u64 << (12 + 9 * (leaf - 1));
        let page = if leaf == 3 { 0 } else { frames::block(size, size) };
        // A 1 GiB page cannot be all RAM: the image's own data is where it must hit, read by read.
        let pa = if leaf == 3 { frames::block(4096, 4096) } else { page + (VA & (size - 1)) };
        space.map_level(VA & !(size - 1), page, P | W | U, leaf);
        let mut shape = Self { space, leaf, slots: [0; 5], good: [0; 5] };
        for level in leaf..=4 {
            shape.slots[level as usize] = space.find(VA, level).unwrap_or(0);
            shape.good[level as usize] = mem::read64(shape.slots[level as usize]);
        }
        if leaf == 3 {
            return shape;
        }
        mem::write8(pa + RET, 0xc3);
        mem::write16(pa + INT, 0x30cd);
        shape
    }

    fn reset(&self) {
        for level in self.leaf..=4 {
            mem::write64(self.slots[level as usize], self.good[level as usize] & !(A | D));
        }
    }

    /// One probe against the model.
    fn compare(&self, kind: Kind, from_user: bool, ac: bool, mode: Mode) {
        for level in self.leaf..=4 {
            let slot = self.slots[level as usize];
            mem::write64(slot, mem::read64(slot) & !(A | D));
        }
        cpu::flush();
        cpu::set_cr2(0x1234);
        let access = Access {
            write: matches!(kind, Kind::Write | Kind::Modify),
            fetch: kind == Kind::Fetch,
            user: from_user,
        };
        let mode = Mode { smap: mode.smap && !(ac && !from_user), ..mode };
        let want = model::translate(self.space, VA, access, mode).map(|_| ());
        let at = match (kind, from_user) {
            (Kind::Fetch, true) => VA + INT,
            (Kind::Fetch, false) => VA + RET,
            _ => VA,
        };
        let before = self.slots.map(|s| if s == 0 { 0 } else { mem::read64(s) });
        let got = probe(kind, from_user, ac);
        let label = (kind, from_user, ac, mode, before);
        match (got, want) {
            (Ok(_), Ok(())) => {
                for level in self.leaf..=4 {
                    let dirty = if level == self.leaf && access.write { D } else { 0 };
                    let entry = mem::read64(self.slots[level as usize]);
                    same!(entry, before[level as usize] | A | dirty, "level {level} after {label:x?}");
                }
                same!(cpu::cr2(), 0x1234, "CR2 after {label:x?}");
            }
            (Err(fault), Err(error)) => {
                let (error, rereads) = tcg(error, kind);
                let got = fault.error() | if rereads { model::ERR_W } else { 0 };
                same!((fault.vector(), got), (14, error), "fault of {label:x?}");
                same!(fault.cr2, at, "CR2 of {label:x?}");
                // It also marks a 1 GiB page as accessed before it looks at the rights.
                if rereads || self.leaf == 3 && cpu::is_qemu_tcg() {
                    return;
                }
                if kind == Kind::Fetch {
                    same!(fault.frame.rip, at, "RIP of {label:x?}");
                }
                let slot = self.slots[self.leaf as usize];
                same!(mem::read64(slot), before[self.leaf as usize], "leaf after fault of {label:x?}");
            }
            (got, want) => {
                let got = got.map_err(|f| (f.vector(), f.error()));
                same!(got.is_ok(), want.is_ok(), "{got:x?} where the manual says {want:x?}: {label:x?}");
            }
        }
    }
}

/// QEMU's translator omits P beside RSVD, and reads before it writes: the error code of a read-modify-write is then the read's
/// where that fails too, and otherwise the read has set the accessed bit.
fn tcg(error: u64, kind: Kind) -> (u64, bool) {
    if !cpu::is_qemu_tcg() {
        return (error, false);
    }
    let error = if error & model::ERR_RSVD != 0 { error & !model::ERR_P } else { error };
    (error, kind == Kind::Modify)
}

/// Sets CR0.WP, EFER.NXE, CR4.SMEP and CR4.SMAP from four bits; false where the processor lacks one.
fn enter(bits: u32) -> Option<Mode> {
    if bits & 2 != 0 && !cpu::has_nx()
        || bits & 4 != 0 && !cpu::has_smep()
        || bits & 8 != 0 && !cpu::has_smap()
    {
        return None;
    }
    let choose = |bit: u32, value: u64| if bits & bit != 0 { (value, 0) } else { (0, value) };
    let (set, clear) = choose(1, cpu::CR0_WP);
    cpu::change_cr0(set, clear);
    let (set, clear) = choose(2, cpu::EFER_NXE);
    let efer = cpu::rdmsr(cpu::EFER) & !clear | set;
    if cpu::has_nx() {
        cpu::wrmsr(cpu::EFER, efer);
    }
    let (smep, smap) = (choose(4, cpu::CR4_SMEP), choose(8, cpu::CR4_SMAP));
    cpu::change_cr4(smep.0 | smap.0, smep.1 | smap.1);
    Some(Mode::now())
}

fn leave() {
    enter(if cpu::has_nx() { 3 } else { 1 });
}

const DEFECTS: [(u64, u64); 6] = [
    (0, 0),
    (0, P),
    (0, W),
    (0, U),
    (NX, 0),
    // The highest physical address bit that an entry can hold; beyond MAXPHYADDR on every processor up to 51 bits.
    (1 << 51, 0),
];

fn single(shape: &Shape) -> u32 {
    let mut count = 0;
    for bits in 0..16 {
        let Some(mode) = enter(bits) else { continue };
        for level in shape.leaf..=4 {
            for (set, clear) in DEFECTS {
                for kind in KINDS {
                    // The 1 GiB page has no code of ours in it and must not be written.
                    if shape.leaf == 3 && kind != Kind::Read {
                        continue;
                    }
                    for (from_user, ac) in [(false, false), (false, true), (true, false)] {
                        shape.reset();
                        let slot = shape.slots[level as usize];
                        mem::write64(slot, mem::read64(slot) & !clear | set);
                        shape.compare(kind, from_user, ac, mode);
                        count += 1;
                    }
                }
            }
        }
    }
    leave();
    shape.reset();
    count
}

/// Several defects at once, by chance.
fn storm(shape: &Shape, random: &mut Random) {
    for _ in 0..3000 {
        let Some(mode) = enter(random.below(16) as u32) else { continue };
        shape.reset();
        for level in shape.leaf..=4 {
            let slot = shape.slots[level as usize];
            let mut entry = mem::read64(slot);
            for (set, clear) in DEFECTS {
                if random.below(12) == 0 {
                    entry = entry & !clear | set;
                }
            }
            // Bits that software may use, and the caching bits, change nothing.
            entry |= random.next() & (7 << 9 | 0x7f << 52 | 3 << 3) & !(1 << 51);
            if level == 4 && random.below(16) == 0 {
                entry |= PS;
            }
            if level == shape.leaf && level == 2 && random.below(8) == 0 {
                entry |= 1 << (13 + random.below(8));
            }
            mem::write64(slot, entry);
        }
        let kind = KINDS[random.below(4) as usize];
        let from_user = random.below(2) == 0;
        shape.compare(kind, from_user, !from_user && random.below(2) == 0, mode);
    }
    leave();
    shape.reset();
}

pub fn run(space: Space) {
    let mut random = Random::new(13);
    let small = Shape::new(space, 1);
    let n = single(&small);
    storm(&small, &mut random);
    say!("4 KiB page: {n} single defects, 3000 mixtures");
    // The same slots now lead to a large page.
    mem::write64(small.slots[2], 0);
    let large = Shape::new(space, 2);
    let n = single(&large);
    storm(&large, &mut random);
    say!("2 MiB page: {n} single defects, 3000 mixtures");
    if cpu::has_gigabyte_pages() {
        mem::write64(small.slots[3], 0);
        let huge = Shape::new(space, 3);
        let n = single(&huge);
        say!("1 GiB page: {n} single defects");
    } else {
        rt::skip("1 GiB pages");
    }
    mem::write64(small.slots[4], 0);
    cpu::flush();
}
