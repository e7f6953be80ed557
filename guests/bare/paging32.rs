//! Two-level paging of 32-bit mode: every mixture of rights in both levels, 4 MiB pages with and without CR4.PSE, CR0.WP, SMEP and SMAP,
//! accessed and dirty bits, global pages, against the manual's rules (SDM Vol. 3, 4.3 "32-Bit Paging").
//! The guest is loaded by multiboot and does its work in 32-bit mode; only the comparison runs in long mode.
#![no_std]
#![no_main]

use rt::{
    check, cpu, frames,
    legacy::{self, Do, NONE},
    mem,
    paging::{A, D, G, P, PS, U, W, WINDOW},
    random::Random,
    same, say,
};

rt::guest!("paging32", main);

/// The page under test, and a second address for its frame.
const VA: u64 = 0x4080_5000;
/// Where the first 64 MiB lie once more, mapped by 4 KiB pages when PSE is off.
const LOW_END: u64 = 64 << 20;

struct Tables {
    directory: u64,
    table: u64,
    frame: u64,
    /// A block of 4 MiB for large pages.
    block: u64,
}

impl Tables {
    fn new() -> Self {
        let directory = frames::take();
        // One to one by 4 KiB pages, so that it works without PSE too.
        for big in 0..LOW_END >> 22 {
            let table = frames::take();
            (0..1024).for_each(|i| mem::write32(table + i * 4, (big << 22 | i << 12 | P | W) as u32));
            mem::write32(directory + big * 4, (table | P | W) as u32);
        }
        let window = frames::take();
        mem::write32(directory + (WINDOW >> 22) * 4, (window | P | W | U) as u32);
        mem::write32(window, (legacy::user_page() | P | U) as u32);
        mem::write32(window + 4, (frames::take() | P | W | U) as u32);
        let (table, frame) = (frames::take(), frames::take());
        Self { directory, table, frame, block: frames::block(4 << 20, 4 << 20) }
    }

    fn pde(&self) -> u64 {
        self.directory + (VA >> 22) * 4
    }

    fn pte(&self) -> u64 {
        self.table + (VA >> 12 & 1023) * 4
    }
}

fn main() {
    let tables = Tables::new();
    code_at(tables.frame);
    code_at(tables.block + (VA & 0x3f_f000));
    let mut random = Random::new(32);
    let mut total = [0u32; 3];
    for _ in 0..40 {
        let counts = batch(&tables, &mut random);
        (0..3).for_each(|i| total[i] += counts[i]);
    }
    say!("{} accesses: {} went through, {} faults", total[0], total[1], total[2]);
    stale_and_global(&tables);
    large_pages(&tables);
}

/// RET and INT 0x30 for the fetches.
fn code_at(page: u64) {
    mem::write8(page + 0x100, 0xc3);
    mem::write16(page + 0x200, 0x30cd);
}

/// The control bits of one step.
#[derive(Clone, Copy, Debug)]
struct Mode {
    wp: bool,
    pse: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

/// What the manual says: the error code, or where the access ends (true for a large page).
fn model(pde: u64, pte: u64, write: bool, fetch: bool, user: bool, mode: Mode) -> Result<bool, u64> {
    let mut error = if write { 2 } else { 0 } | if user { 4 } else { 0 };
    // Without PAE there is no NX, so the fetch bit appears with SMEP only.
    if fetch && mode.smep {
        error |= 16;
    }
    if pde & P == 0 {
        return Err(error);
    }
    let large = mode.pse && pde & PS != 0;
    // Bit 21 of a 4 MiB page is reserved; bits 13 to 20 are address bits 32 to 39, as far as the processor has those.
    let reserved =
        1 << 21 | (0xff << 13 & !((1u64 << (13 + cpu::physical_bits().clamp(32, 40) - 32)) - (1 << 13)));
    if large && pde & reserved != 0 {
        return Err(error | 9);
    }
    let rights = if large { pde } else { pde & pte };
    if !large && pte & P == 0 {
        return Err(error);
    }
    let user_page = rights & U != 0;
    let denied = user && !user_page
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

/// One list of steps, carried out in 32-bit mode and compared afterwards.
fn batch(tables: &Tables, random: &mut Random) -> [u32; 3] {
    legacy::clear();
    let mut steps = [const { None }; 96];
    for step in &mut steps {
        let coin = |random: &mut Random| random.below(2) == 0;
        let mode = Mode {
            wp: coin(random),
            pse: coin(random),
            smep: coin(random) && cpu::has_smep(),
            smap: coin(random) && cpu::has_smap(),
            ac: coin(random),
        };
        let large = random.below(3) == 0;
        let rights = |random: &mut Random| {
            let mut flags = P | W | U;
            for bit in [P, W, U] {
                if random.below(5) == 0 {
                    flags &= !bit;
                }
            }
            // The caching bits and those for software change nothing.
            flags | random.next() & (3 << 3 | 7 << 9)
        };
        let (mut pde, pte) = (rights(random), tables.frame | rights(random));
        if large && mode.pse {
            pde |= tables.block | PS;
            if random.below(6) == 0 {
                pde |= 1 << 21;
            }
        } else {
            // Without PSE the size bit means nothing.
            pde |= tables.table | if large { PS } else { 0 };
            if large && mode.pse {
                pde &= !PS;
            }
        }
        let (kind, user) = (random.below(4) as usize, coin(random));
        let va = VA
            + match (kind, user) {
                (3, true) => 0x200,
                (3, false) => 0x100,
                _ => 0,
            };
        legacy::add(Do::Write32, tables.pde(), pde);
        legacy::add(Do::Write32, tables.pte(), pte);
        legacy::add(Do::Flags, 2 | if mode.ac { 1 << 18 } else { 0 }, 0);
        legacy::add(
            Do::Cr4,
            0x600
                | bit(mode.pse, cpu::CR4_PSE)
                | bit(mode.smep, cpu::CR4_SMEP)
                | bit(mode.smap, cpu::CR4_SMAP),
            0,
        );
        legacy::add(Do::Cr0, cpu::CR0_PG | cpu::CR0_PE | 0x32 | bit(mode.wp, cpu::CR0_WP), 0);
        legacy::add(Do::Cr3, tables.directory, 0);
        let at = legacy::add(if user { USER[kind] } else { KERNEL[kind] }, va, 0);
        legacy::add(Do::Read32, tables.pde(), 0);
        legacy::add(Do::Read32, tables.pte(), 0);
        *step = Some(Step { at, kind, user, mode, pde, pte });
    }
    legacy::run(tables.directory, 0, 0);
    let mut counts = [0; 3];
    for step in steps.iter().flatten() {
        counts[0] += 1;
        counts[if compare(step) { 1 } else { 2 }] += 1;
    }
    counts
}

fn bit(set: bool, value: u64) -> u64 {
    if set { value } else { 0 }
}

/// Compares one step; true if the access went through.
fn compare(step: &Step) -> bool {
    let (write, fetch) = (step.kind == 1 || step.kind == 2, step.kind == 3);
    let va = VA
        + match (fetch, step.user) {
            (true, true) => 0x200,
            (true, false) => 0x100,
            _ => 0,
        };
    let got = legacy::result(step.at);
    let (pde, pte) = (legacy::result(step.at + 1).result, legacy::result(step.at + 2).result);
    let label = (step.kind, step.user, step.mode, step.pde, step.pte);
    match model(step.pde, step.pte, write, fetch, step.user, step.mode) {
        Ok(large) => {
            same!(got.vector, NONE, "an access that is allowed: {label:x?}, error {:#x}", got.error);
            let dirty = if write { D } else { 0 };
            let (want_pde, want_pte) =
                if large { (step.pde | A | dirty, step.pte) } else { (step.pde | A, step.pte | A | dirty) };
            same!((pde, pte), (want_pde as u32, want_pte as u32), "the entries after {label:x?}");
            true
        }
        Err(error) => {
            // QEMU's translator omits P beside RSVD, and a read-modify-write reads first.
            let tcg = cpu::is_qemu_tcg();
            let error = if tcg && error & 8 != 0 { error & !1 } else { error };
            let rmw = tcg && step.kind == 2;
            let code = u64::from(got.error) | bit(rmw, 2);
            same!((got.vector, code, got.cr2), (14, error, va as u32), "the fault of {label:x?}");
            if !rmw {
                let dirty = u64::from(pde | pte) & D;
                same!((dirty, u64::from(pte) & A), (0, 0), "the entries after the fault of {label:x?}");
            }
            false
        }
    }
}

/// Changes with INVLPG and CR3 loads; global pages.
fn stale_and_global(tables: &Tables) {
    let other = frames::take();
    mem::write32(tables.frame, 0x1111);
    mem::write32(other, 0x2222);
    legacy::clear();
    let mut wanted = [(0usize, 0u32, 0u32); 128];
    let mut count = 0;
    let mut want = |at: usize, value: u32, vector: u32| {
        wanted[count] = (at, value, vector);
        count += 1;
    };
    legacy::add(Do::Write32, tables.pde(), tables.table | P | W);
    for round in 0..8 {
        let global = if round % 2 == 1 { G } else { 0 };
        legacy::add(Do::Cr4, 0x600 | bit(global != 0, cpu::CR4_PGE), 0);
        legacy::add(Do::Write32, tables.pte(), tables.frame | P | W | global);
        legacy::add(Do::Invlpg, VA, 0);
        want(legacy::add(Do::Read32, VA, 0), 0x1111, NONE);
        legacy::add(Do::Write32, tables.pte(), other | P | W | global);
        legacy::add(Do::Invlpg, VA + 0xfff, 0);
        want(legacy::add(Do::Read32, VA, 0), 0x2222, NONE);
        legacy::add(Do::Write32, tables.pte(), other | P | global);
        legacy::add(Do::Invlpg, VA, 0);
        want(legacy::add(Do::Write32, VA, 0), 0, 14);
        // Absent to present needs nothing.
        legacy::add(Do::Write32, tables.pte(), 0);
        legacy::add(Do::Invlpg, VA, 0);
        want(legacy::add(Do::Read32, VA, 0), 0, 14);
        legacy::add(Do::Write32, tables.pte(), tables.frame | P | global);
        want(legacy::add(Do::Read32, VA, 0), 0x1111, NONE);
        // A page that is not global goes with CR3; a global one with CR4.PGE.
        legacy::add(Do::Write32, tables.pte(), other | P | global);
        legacy::add(Do::Cr3, tables.directory, 0);
        legacy::add(Do::Cr4, 0x600 | bit(global == 0, cpu::CR4_PGE), 0);
        want(legacy::add(Do::Read32, VA, 0), 0x2222, NONE);
    }
    let pwt = legacy::add(Do::Cr3, tables.directory | 0x18, 0);
    legacy::add(Do::GetCr3, 0, 0);
    legacy::run(tables.directory, 0, 0);
    for (at, value, vector) in &wanted[..count] {
        let got = legacy::result(*at);
        same!(got.vector, *vector, "operation {at}");
        if *vector == NONE {
            same!(got.result, *value, "value of operation {at}");
        }
    }
    same!(legacy::result(pwt + 1).result, tables.directory as u32 | 0x18, "CR3 with its cache bits");
    say!("8 rounds of INVLPG, CR3 and global pages");
}

/// 4 MiB pages: the same directory entry with and without PSE, split and merged.
fn large_pages(tables: &Tables) {
    let offset = VA & 0x3f_ffff;
    mem::write32(tables.block + offset, 0x4444);
    mem::write32(tables.frame, 0x1111);
    legacy::clear();
    let mut values = [(0usize, 0u32); 64];
    for round in 0..16usize {
        let entry = tables.block | P | W | PS;
        legacy::add(Do::Cr4, 0x600 | cpu::CR4_PSE, 0);
        legacy::add(Do::Write32, tables.pde(), entry);
        legacy::add(Do::Invlpg, VA ^ 0x20_0000, 0);
        values[round * 4] = (legacy::add(Do::Read32, VA, 0), 0x4444);
        // Split into a table.
        legacy::add(Do::Write32, tables.pte(), tables.frame | P | W);
        legacy::add(Do::Write32, tables.pde(), tables.table | P | W);
        legacy::add(Do::Invlpg, VA, 0);
        values[round * 4 + 1] = (legacy::add(Do::Read32, VA, 0), 0x1111);
        // The size bit without PSE: still a table.
        legacy::add(Do::Cr4, 0x600, 0);
        legacy::add(Do::Write32, tables.pde(), tables.table | P | W | PS);
        legacy::add(Do::Cr3, tables.directory, 0);
        values[round * 4 + 2] = (legacy::add(Do::Read32, VA, 0), 0x1111);
        // An edit of the entry through a 4 MiB page over the table itself.
        legacy::add(Do::Cr4, 0x600 | cpu::CR4_PSE, 0);
        let alias = 0x8000_0000 + (tables.pde() & 0x3f_ffff);
        legacy::add(
            Do::Write32,
            tables.directory + (0x8000_0000u64 >> 22) * 4,
            tables.pde() & !0x3f_ffff | P | W | PS,
        );
        legacy::add(Do::Invlpg, alias, 0);
        legacy::add(Do::Write32, alias, entry);
        legacy::add(Do::Invlpg, VA, 0);
        values[round * 4 + 3] = (legacy::add(Do::Read32, VA, 0), 0x4444);
    }
    legacy::run(tables.directory, 0, 0);
    for (at, value) in values {
        same!((legacy::result(at).vector, legacy::result(at).result), (NONE, value), "operation {at}");
    }
    check!(mem::read32(tables.pde()) as u64 & A != 0);
    say!("16 rounds of 4 MiB pages, split and with PSE off");
}
