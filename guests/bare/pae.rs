//! PAE paging of 32-bit mode: every mixture of rights in two levels and what the four PDPTE registers hold, 2 MiB pages, NX, and the rule
//! that PDPTEs are read when CR3 is loaded and not before (SDM Vol. 3, 4.4 "PAE Paging").
#![no_std]
#![no_main]

use rt::{
    check, cpu, frames,
    legacy::{self, Do, NONE},
    mem,
    paging::{A, D, NX, P, PS, U, W, WINDOW},
    random::Random,
    same, say,
};

rt::guest!("pae", main);

const VA: u64 = 0x4080_5000;
const BASE_CR4: u64 = 0x600 | cpu::CR4_PAE;
const ALWAYS_CR0: u64 = cpu::CR0_PG | cpu::CR0_PE | 0x32;

struct Tables {
    /// The page-directory-pointer table, 32 bytes, and a second one in the same frame.
    pointers: u64,
    second: u64,
    directory: u64,
    table: u64,
    frame: u64,
    block: u64,
}

impl Tables {
    fn new() -> Self {
        // 32-byte aligned and not page aligned, as only PAE's CR3 can be.
        let pointers = frames::take() + 0x360;
        let second = pointers + 0x20;
        // The first GiB one to one, the fourth with the window, the second under test.
        let low = frames::take();
        (0..512u64).for_each(|i| mem::write64(low + i * 8, i << 21 | P | W | PS));
        mem::write64(pointers, low | P);
        let (window, high) = (frames::take(), frames::take());
        mem::write64(pointers + 24, high | P);
        mem::write64(high + (WINDOW >> 21 & 511) * 8, window | P | W | U);
        mem::write64(window, legacy::user_page() | P | U);
        mem::write64(window + 8, frames::take() | P | W | U);
        let (directory, table, frame) = (frames::take(), frames::take(), frames::take());
        mem::write64(pointers + 8, directory | P);
        (0..4).for_each(|i| mem::write64(second + i * 8, mem::read64(pointers + i * 8)));
        let block = frames::block(2 << 20, 2 << 20);
        for page in [frame, block + (VA & 0x1f_f000)] {
            mem::write8(page + 0x100, 0xc3);
            mem::write16(page + 0x200, 0x30cd);
        }
        Self { pointers, second, directory, table, frame, block }
    }

    fn pde(&self) -> u64 {
        self.directory + (VA >> 21 & 511) * 8
    }

    fn pte(&self) -> u64 {
        self.table + (VA >> 12 & 511) * 8
    }
}

/// Writes a 64-bit entry by two operations, the half with the present bit last.
fn put(slot: u64, value: u64) {
    legacy::add(Do::Write32, slot + 4, value >> 32);
    legacy::add(Do::Write32, slot, value);
}

fn bit(set: bool, value: u64) -> u64 {
    if set { value } else { 0 }
}

fn main() {
    let tables = Tables::new();
    let mut random = Random::new(36);
    let mut total = [0u32; 3];
    for _ in 0..60 {
        let counts = batch(&tables, &mut random);
        (0..3).for_each(|i| total[i] += counts[i]);
    }
    say!("{} accesses: {} went through, {} faults", total[0], total[1], total[2]);
    pointers(&tables);
    switches(&tables);
}

#[derive(Clone, Copy, Debug)]
struct Mode {
    wp: bool,
    nxe: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

fn reserved(mode: Mode) -> u64 {
    // All of bits 62 to MAXPHYADDR: PAE has none for software there.
    bit(!mode.nxe, NX) | !NX & !((1u64 << cpu::physical_bits()) - 1)
}

fn model(pde: u64, pte: u64, write: bool, fetch: bool, user: bool, mode: Mode) -> Result<bool, u64> {
    let mut error = bit(write, 2) | bit(user, 4);
    if fetch && (mode.nxe || mode.smep) {
        error |= 16;
    }
    if pde & P == 0 {
        return Err(error);
    }
    let large = pde & PS != 0;
    if pde & (reserved(mode) | bit(large, 0x1f_e000)) != 0 {
        return Err(error | 9);
    }
    if !large && pte & P == 0 {
        return Err(error);
    }
    if !large && pte & reserved(mode) != 0 {
        return Err(error | 9);
    }
    let rights = if large { pde } else { pde & pte };
    let nx = (pde | if large { 0 } else { pte }) & NX != 0;
    let user_page = rights & U != 0;
    let denied = user && !user_page
        || fetch && nx
        || !user && user_page && (fetch && mode.smep || !fetch && mode.smap && !mode.ac)
        || write && rights & W == 0 && (user || mode.wp);
    if denied { Err(error | 1) } else { Ok(large) }
}

const KERNEL: [Do; 4] = [Do::Read32, Do::Write32, Do::Modify32, Do::Call];
const USER: [Do; 4] = [Do::UserRead32, Do::UserWrite32, Do::UserModify32, Do::UserJump];

struct Step {
    at: usize,
    kind: usize,
    user: bool,
    mode: Mode,
    pde: u64,
    pte: u64,
}

fn rights(random: &mut Random) -> u64 {
    let mut flags = P | W | U;
    for bit in [P, W, U] {
        if random.below(6) == 0 {
            flags &= !bit;
        }
    }
    if random.below(6) == 0 {
        flags |= NX;
    }
    if random.below(12) == 0 {
        flags |= 1 << (52 + random.below(11));
    }
    flags | random.next() & (3 << 3 | 7 << 9)
}

fn address(kind: usize, user: bool) -> u64 {
    VA + match (kind, user) {
        (3, true) => 0x200,
        (3, false) => 0x100,
        _ => 0,
    }
}

fn batch(tables: &Tables, random: &mut Random) -> [u32; 3] {
    legacy::clear();
    let mut steps = [const { None }; 64];
    for step in &mut steps {
        let mut coin = || random.below(2) == 0;
        let mode = Mode {
            wp: coin(),
            nxe: coin() && cpu::has_nx(),
            smep: coin() && cpu::has_smep(),
            smap: coin() && cpu::has_smap(),
            ac: coin(),
        };
        let (kind, user, large) = (random.below(4) as usize, random.below(2) == 0, random.below(3) == 0);
        let mut pde = rights(random) | if large { tables.block | PS } else { tables.table };
        if large && random.below(6) == 0 {
            pde |= 1 << (13 + random.below(8));
        }
        let pte = rights(random) | tables.frame;
        put(tables.pde(), pde);
        put(tables.pte(), pte);
        legacy::add(Do::Flags, 2 | bit(mode.ac, 1 << 18), 0);
        legacy::add(Do::Efer, bit(mode.nxe, cpu::EFER_NXE), 0);
        legacy::add(Do::Cr4, BASE_CR4 | bit(mode.smep, cpu::CR4_SMEP) | bit(mode.smap, cpu::CR4_SMAP), 0);
        legacy::add(Do::Cr0, ALWAYS_CR0 | bit(mode.wp, cpu::CR0_WP), 0);
        legacy::add(Do::Cr3, tables.pointers, 0);
        let at = legacy::add(if user { USER[kind] } else { KERNEL[kind] }, address(kind, user), 0);
        for slot in [tables.pde(), tables.pte()] {
            legacy::add(Do::Read32, slot, 0);
            legacy::add(Do::Read32, slot + 4, 0);
        }
        *step = Some(Step { at, kind, user, mode, pde, pte });
    }
    legacy::run(tables.pointers, cpu::CR4_PAE, 0);
    let mut counts = [0; 3];
    for step in steps.iter().flatten() {
        counts[0] += 1;
        counts[if compare(step) { 1 } else { 2 }] += 1;
    }
    counts
}

/// An entry as two operations from `at` on read it.
fn entry(at: usize) -> u64 {
    u64::from(legacy::result(at).result) | u64::from(legacy::result(at + 1).result) << 32
}

fn compare(step: &Step) -> bool {
    let (write, fetch) = (step.kind == 1 || step.kind == 2, step.kind == 3);
    let va = address(step.kind, step.user) as u32;
    let got = legacy::result(step.at);
    let (pde, pte) = (entry(step.at + 1), entry(step.at + 3));
    let label = (step.kind, step.user, step.mode, step.pde, step.pte);
    match model(step.pde, step.pte, write, fetch, step.user, step.mode) {
        Ok(large) => {
            same!(got.vector, NONE, "an access that is allowed: {label:x?}, error {:#x}", got.error);
            let dirty = bit(write, D);
            let (in_pde, in_pte) = if large { (A | dirty, 0) } else { (A, A | dirty) };
            same!((pde, pte), (step.pde | in_pde, step.pte | in_pte), "the entries after {label:x?}");
            true
        }
        Err(error) => {
            // QEMU's translator omits P beside RSVD, and a read-modify-write reads first.
            let tcg = cpu::is_qemu_tcg();
            let error = if tcg && error & 8 != 0 { error & !1 } else { error };
            let rmw = tcg && step.kind == 2;
            let code = u64::from(got.error) | bit(rmw, 2);
            same!((got.vector, code, got.cr2), (14, error, va), "the fault of {label:x?}");
            if !rmw {
                same!(((pde | pte) & D, pte & A), (0, 0), "the entries after the fault of {label:x?}");
            }
            false
        }
    }
}

/// PDPTEs in memory and PDPTEs in the processor. QEMU's translator has no such registers and reads memory at each walk; what
/// depends on them is left out there.
fn pointers(tables: &Tables) {
    let registers = !cpu::is_qemu_tcg();
    let slot = tables.pointers + 8;
    mem::write32(tables.frame, 0x5151);
    mem::write64(tables.pde(), tables.table | P | W);
    mem::write64(tables.pte(), tables.frame | P | W);
    // A second directory that shows another frame at the same address.
    let (directory, table, frame) = (frames::take(), frames::take(), frames::take());
    mem::write32(frame, 0x6262);
    mem::write64(directory + (VA >> 21 & 511) * 8, table | P | W);
    mem::write64(table + (VA >> 12 & 511) * 8, frame | P | W);
    legacy::clear();
    let mut wanted = [(0usize, 0u32, 0u32); 128];
    let mut count = 0;
    let mut want = |at: usize, value: u32, vector: u32| {
        wanted[count] = (at, value, vector);
        count += 1;
    };
    for _ in 0..4 {
        legacy::add(Do::Cr3, tables.pointers, 0);
        want(legacy::add(Do::Read32, VA, 0), 0x5151, NONE);
        put(slot, directory | P);
        if registers {
            legacy::add(Do::Invlpg, VA, 0);
            want(legacy::add(Do::Read32, VA, 0), 0x5151, NONE);
        }
        legacy::add(Do::Cr3, tables.pointers, 0);
        want(legacy::add(Do::Read32, VA, 0), 0x6262, NONE);
        // Absent, in memory only.
        put(slot, 0);
        if registers {
            legacy::add(Do::Invlpg, VA, 0);
            want(legacy::add(Do::Read32, VA, 0), 0x6262, NONE);
        }
        // A change of CR4.PGE or of CR0.CD's kin loads them as well; PGE is the harmless one.
        legacy::add(Do::Cr4, BASE_CR4 | cpu::CR4_PGE, 0);
        want(legacy::add(Do::Read32, VA, 0), 0, 14);
        legacy::add(Do::Cr4, BASE_CR4, 0);
        put(slot, tables.directory | P);
        legacy::add(Do::Cr3, tables.second, 0);
        want(legacy::add(Do::Read32, VA, 0), 0x5151, NONE);
        put(tables.second + 8, directory | P);
        legacy::add(Do::Cr3, tables.second, 0);
        want(legacy::add(Do::Read32, VA, 0), 0x6262, NONE);
        put(tables.second + 8, tables.directory | P);
        if registers {
            // Reserved bits of a present PDPTE: the load is refused and nothing changes. Bits 1 and 2 are reserved here.
            for bad in [W, U, 1 << 5, 1 << 8, NX, 1 << 62] {
                put(slot, directory | P | bad);
                want(legacy::add(Do::Cr3, tables.pointers, 0), 0, 13);
                want(legacy::add(Do::GetCr3, 0, 0), tables.second as u32, NONE);
                want(legacy::add(Do::Read32, VA, 0), 0x6262, NONE);
            }
        }
        // Not present, the other bits are nobody's business.
        put(slot, 0xffff_ffff_ffff_fff0);
        want(legacy::add(Do::Cr3, tables.pointers, 0), 0, NONE);
        want(legacy::add(Do::Read32, VA, 0), 0, 14);
        put(slot, tables.directory | P);
        legacy::add(Do::Cr3, tables.pointers | 0x18, 0);
        want(legacy::add(Do::GetCr3, 0, 0), tables.pointers as u32 | 0x18, NONE);
        want(legacy::add(Do::Read32, VA, 0), 0x5151, NONE);
    }
    legacy::run(tables.pointers, cpu::CR4_PAE, 0);
    for (at, value, vector) in &wanted[..count] {
        let got = legacy::result(*at);
        same!(got.vector, *vector, "operation {at}");
        if *vector == NONE && *value != 0 {
            same!(got.result, *value, "value of operation {at}");
        }
    }
    say!("PDPTEs: loaded with CR3, with CR4.PGE, and not otherwise");
}

/// Long mode, PAE and two-level paging in turn over memory that all see.
fn switches(tables: &Tables) {
    let (directory, frame) = (frames::take(), frames::take());
    // Two-level tables: 4 MiB pages one to one, and the test's address on another frame's 4 MiB.
    (0..1024u64).for_each(|i| mem::write32(directory + i * 4, (i << 22 | P | W | PS) as u32));
    let old = legacy::user_page();
    let window = frames::take();
    mem::write32(directory + (WINDOW >> 22) * 4, (window | P | W | U) as u32);
    mem::write32(window, (old | P | U) as u32);
    mem::write32(window + 4, (frames::take() | P | W | U) as u32);
    for round in 0..50u64 {
        mem::write32(tables.frame + 8, round as u32);
        mem::write32(frame, round as u32 ^ 0xff);
        legacy::clear();
        let read = legacy::add(Do::Read32, VA + 8, 0);
        legacy::add(Do::Write32, VA + 12, round * 3);
        legacy::run(tables.pointers, cpu::CR4_PAE, 0);
        same!(
            (legacy::result(read).vector, legacy::result(read).result),
            (NONE, round as u32),
            "PAE in round {round}"
        );
        same!(mem::read32(tables.frame + 12), round as u32 * 3, "what it wrote");
        legacy::clear();
        let read = legacy::add(Do::Read32, frame, 0);
        legacy::add(Do::Write32, frame + 4, round * 5);
        let miss = legacy::add(Do::UserRead32, frame, 0);
        legacy::run(directory, cpu::CR4_PSE, 0);
        same!(
            (legacy::result(read).vector, legacy::result(read).result),
            (NONE, round as u32 ^ 0xff),
            "two levels in round {round}"
        );
        same!((legacy::result(miss).vector, legacy::result(miss).error), (14, 5), "CPL 3 kept out");
        same!(mem::read32(frame + 4), round as u32 * 5, "what it wrote");
    }
    check!(cpu::cr4() & cpu::CR4_PAE != 0 && cpu::rdmsr(cpu::EFER) & 0x500 == 0x500, "long mode again");
    say!("50 rounds through three paging modes");
}
