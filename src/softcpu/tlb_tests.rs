//! What the TLB holds after flushes, under other PCIDs, and for whom.

use super::*;

const PAGE: u64 = 0xffff_8000_0012_3000;

fn hit(tlb: &mut Tlb, lin: u64) -> bool {
    let key = tlb.key;
    tlb.read.find(lin, key).is_some()
}

#[test]
fn entries_belong_to_their_pcid_unless_global() {
    let mut tlb = Tlb::default();
    tlb.fill(TlbSide::Read, PAGE, 1, false, PageSize::Size4K);
    tlb.fill(TlbSide::Read, PAGE + 0x1000, 2, true, PageSize::Size4K);
    tlb.select(5, TlbMode::Supervisor, TlbMode::Supervisor);
    assert!(!hit(&mut tlb, PAGE));
    assert!(hit(&mut tlb, PAGE + 0x1fff));
    tlb.select(0, TlbMode::Supervisor, TlbMode::Supervisor);
    assert!(hit(&mut tlb, PAGE));
    tlb.flush(TlbFlush::NonGlobal, 0);
    assert!(!hit(&mut tlb, PAGE));
    assert!(hit(&mut tlb, PAGE + 0x1000));
    tlb.flush(TlbFlush::All, 0);
    assert!(!hit(&mut tlb, PAGE + 0x1000));
}

#[test]
fn modes_do_not_share_entries() {
    let mut tlb = Tlb::default();
    tlb.fill(TlbSide::Read, PAGE, 1, true, PageSize::Size4K);
    tlb.select(0, TlbMode::User, TlbMode::User);
    assert!(!hit(&mut tlb, PAGE));
    tlb.select(0, TlbMode::SupervisorAc, TlbMode::Supervisor);
    assert!(!hit(&mut tlb, PAGE));
    tlb.select(0, TlbMode::Uncached, TlbMode::Supervisor);
    tlb.fill(TlbSide::Read, PAGE, 1, true, PageSize::Size4K);
    assert!(!hit(&mut tlb, PAGE));
}

#[test]
fn page_flushes_spare_what_they_must() {
    let mut tlb = Tlb::default();
    tlb.fill(TlbSide::Read, PAGE, 1, false, PageSize::Size4K);
    tlb.flush(TlbFlush::PageOf(3, Gva(PAGE)), 0);
    assert!(hit(&mut tlb, PAGE));
    tlb.flush(TlbFlush::PageOf(0, Gva(PAGE + 5)), 0);
    assert!(!hit(&mut tlb, PAGE));
    tlb.fill(TlbSide::Read, PAGE, 1, true, PageSize::Size4K);
    tlb.flush(TlbFlush::PageOf(0, Gva(PAGE)), 0);
    assert!(hit(&mut tlb, PAGE));
    tlb.flush(TlbFlush::Page(Gva(PAGE)), 0);
    assert!(!hit(&mut tlb, PAGE));
}

#[test]
fn a_frame_flush_takes_write_entries_of_every_context() {
    let mut tlb = Tlb::default();
    let host_base = 0x7000_0000_0000u64;
    let addend = host_base.wrapping_add(0x5000).wrapping_sub(PAGE);
    tlb.fill(TlbSide::Write, PAGE, addend, false, PageSize::Size4K);
    tlb.fill(TlbSide::Read, PAGE, addend, false, PageSize::Size4K);
    tlb.select(9, TlbMode::Supervisor, TlbMode::Supervisor);
    tlb.flush(TlbFlush::Frame(Hfn(5)), host_base);
    tlb.select(0, TlbMode::Supervisor, TlbMode::Supervisor);
    assert!(tlb.write.lookup(PAGE, tlb.key).is_none());
    assert!(hit(&mut tlb, PAGE));
}

#[test]
fn a_page_flush_takes_every_piece_of_a_large_page() {
    let mut tlb = Tlb::default();
    tlb.fill(TlbSide::Read, PAGE, 1, true, PageSize::Size2M);
    tlb.fill(TlbSide::Read, PAGE + 0x5000, 1, true, PageSize::Size2M);
    tlb.flush(TlbFlush::Page(Gva(PAGE + 0x2000)), 0);
    assert!(!hit(&mut tlb, PAGE));
    assert!(!hit(&mut tlb, PAGE + 0x5000));
}

#[test]
fn context_numbers_run_out_safely() {
    let mut tlb = Tlb::default();
    for i in 0..5000u64 {
        tlb.flush(TlbFlush::Pcid(0), 0);
        assert!(!hit(&mut tlb, PAGE), "a stale entry hit after {i} flushes");
        tlb.fill(TlbSide::Read, PAGE, 1, false, PageSize::Size4K);
        assert!(hit(&mut tlb, PAGE));
    }
}

#[test]
fn a_flush_of_everything_leaves_nothing_however_often() {
    let mut tlb = Tlb::default();
    for i in 0..3000u64 {
        tlb.select((i % 7) as u16, TlbMode::Supervisor, TlbMode::Supervisor);
        tlb.fill(TlbSide::Read, PAGE, 1, i % 3 == 0, PageSize::Size4K);
        tlb.fill(TlbSide::Write, PAGE, 1, true, PageSize::Size4K);
        assert!(tlb.fill_inline(TlbSide::Read, PAGE) && tlb.fill_inline(TlbSide::Write, PAGE));
        tlb.flush(TlbFlush::All, 0);
        assert_eq!(tlb.inline.held().count(), 0);
        for pcid in 0..7 {
            tlb.select(pcid, TlbMode::Supervisor, TlbMode::Supervisor);
            assert!(!hit(&mut tlb, PAGE) && tlb.write.find(PAGE, tlb.key).is_none(), "after {i} flushes");
        }
    }
}

#[test]
fn system_structures_are_held_for_the_supervisor_whoever_runs() {
    let mut tlb = Tlb::default();
    tlb.select(0, TlbMode::User, TlbMode::User);
    tlb.fill_system(TlbSide::Read, PAGE, 1, false, PageSize::Size4K);
    assert!(!hit(&mut tlb, PAGE));
    tlb.select(0, TlbMode::Uncached, TlbMode::User);
    assert_eq!(tlb.read.find(PAGE, tlb.system_key()), Some(1));
    tlb.select(0, TlbMode::Supervisor, TlbMode::Supervisor);
    assert!(hit(&mut tlb, PAGE));
}

#[test]
fn global_pages_stay_in_the_inline_arrays_when_the_context_changes() {
    let mut tlb = Tlb::default();
    let local = PAGE + 0x1000;
    tlb.fill(TlbSide::Read, PAGE, 1, true, PageSize::Size4K);
    tlb.fill(TlbSide::Read, local, 1, false, PageSize::Size4K);
    assert!(tlb.fill_inline(TlbSide::Read, PAGE) && tlb.fill_inline(TlbSide::Read, local));
    tlb.select(3, TlbMode::Supervisor, TlbMode::Supervisor);
    let held: Vec<u64> = tlb.inline.held().map(|(_, _, entry)| entry.tag).collect();
    assert_eq!(held, [PAGE]);
    tlb.flush(TlbFlush::Pcid(3), 0);
    assert_eq!(tlb.inline.held().count(), 1);
    tlb.flush(TlbFlush::Page(Gva(PAGE)), 0);
    assert_eq!(tlb.inline.held().count(), 0);
}

#[test]
fn what_may_be_written_may_be_read_whatever_had_to_go() {
    // Pages of few slots, in contexts of three PCIDs, some of them global, some filled again with something else behind them.
    let pages: Vec<u64> = (0..6u64).map(|n| n << 30 | ((n << 18 ^ n << 18 >> 11) & 0x7ff) << 12).collect();
    let mut tlb = Tlb::default();
    let (mut seed, mut both, mut gone) = (1u64, 0, 0);
    for step in 0..40_000 {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let chosen = seed >> 33;
        let page = pages[(chosen % 6) as usize];
        let (addend, global) = (1 + (chosen >> 4) % 2, chosen >> 6 & 7 == 0);
        match chosen >> 10 & 15 {
            0 => tlb.select((chosen >> 14) as u16 % 3, TlbMode::Supervisor, TlbMode::Supervisor),
            1 if chosen >> 14 & 15 == 0 => tlb.flush(TlbFlush::Page(Gva(page)), 0),
            2 if chosen >> 14 & 15 == 0 => tlb.flush(TlbFlush::Pcid((chosen >> 18) as u16 % 3), 0),
            3 => tlb.fill_system(TlbSide::Write, page, addend, global, PageSize::Size4K),
            side => {
                let side = if side % 2 == 0 { TlbSide::Read } else { TlbSide::Write };
                let array = if side == TlbSide::Read { &mut tlb.read } else { &mut tlb.write };
                if array.find(page, tlb.key).is_none() {
                    tlb.fill(side, page, addend, global, PageSize::Size4K);
                }
                tlb.fill_inline(side, page);
            }
        }
        for &page in &pages {
            let [read, write] =
                [&mut tlb.read, &mut tlb.write].map(|array| array.find(page, tlb.key).is_some());
            assert!(read || !write, "{page:#x} may be written and not read after {step} steps");
            (both, gone) = (both + u64::from(write), gone + u64::from(!read));
        }
        for (side, mode, entry) in tlb.inline.held() {
            let array = if side == TlbSide::Write { &mut tlb.write } else { &mut tlb.read };
            assert!(mode != 0 || array.find(entry.tag, tlb.key).is_some(), "{:#x} after {step}", entry.tag);
        }
    }
    assert!(both > 40_000 && gone > 40_000, "{both} and {gone}");
}
