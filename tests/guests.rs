//! Every embedded guest on each backend with each engine: it passes, it repeats, and it can tell neither how its memory is
//! virtualized nor how its instructions are executed.

mod common;

use antumbra::job::ends_as;
use antumbra::{End, Limits, Machine, MachineConfig, MmuKind, Wiring};
use common::{POLICIES, Square, config, finish, guest, run};
use guestmem::{Gfn, Policy};
use mmu::Counter;
use softcpu::EngineKind;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

on_each_square! {
    fn every_guest_passes_under_every_policy(square) {
        for guest in guests::list() {
            let mut first = None;
            for policy in POLICIES {
                let ran = run(MachineConfig { policy, ..square.config(guest) });
                assert!(ends_as(guest.ending, ran.end()), "{} {policy:?}: {}\n{}", guest.name, ran.end(), ran.serial);
                let course = ran.course();
                assert_eq!(first.get_or_insert_with(|| course.clone()), &course, "{} {policy:?}", guest.name);
            }
        }
    }

    fn two_runs_count_the_same(square) {
        for guest in guests::list() {
            let once = run(square.config(guest));
            let again = run(square.config(guest));
            assert_eq!(once.deterministic(), again.deterministic(), "{}", guest.name);
            assert_eq!(once.serial, again.serial, "{}", guest.name);
        }
    }

    fn no_switch_changes_what_a_guest_sees(square) {
        let defaults = MachineConfig::new("", Vec::new()).mmu_options;
        let all = [("all", "", true)];
        for guest in guests::list() {
            let course = run(square.config(guest)).course();
            for (name, _, _) in defaults.switches(square.mmu).into_iter().chain(all) {
                let mut changed = square.config(guest);
                changed.mmu_options.set(square.mmu, name, false).unwrap();
                assert_eq!(run(changed).course(), course, "{} without {name}", guest.name);
            }
        }
    }

    fn a_small_pool_of_tables_is_enough(square) {
        for name in ["hello", "demand-touch", "forkwait", "ctxswitch", "largepages"] {
            let guest = guest(name);
            let small = MachineConfig { table_memory: 512 << 10, ..square.config(guest) };
            assert_eq!(run(small).course(), run(square.config(guest)).course(), "{name}");
        }
    }

    fn little_room_for_translated_code_is_enough(square) {
        for name in ["instr", "exceptions", "smc"] {
            let guest = guest(name);
            let small = run(MachineConfig { code_cache: 256 << 10, ..square.config(guest) });
            assert_eq!(small.course(), run(square.config(guest)).course(), "{name}");
            let used = small.report.counts.counters["translated_bytes_peak"];
            assert!(used <= 256 << 10, "{name}: {used} bytes of translated code");
        }
    }

    fn the_tables_stay_sound_all_the_way(square) {
        for name in ["hello", "forkwait", "largepages", "smc"] {
            let ran = run(MachineConfig { audit_every: Some(101), ..square.config(guest(name)) });
            assert_eq!(ran.end(), End::DebugExit { code: guests::PASS }, "{name}");
        }
    }

    fn a_guest_does_not_notice_that_it_was_stopped(square) {
        let whole = run(square.config(guest("demand-touch")));
        let mut machine = Machine::new(square.config(guest("demand-touch")), Wiring::default()).unwrap();
        let mut stops = 0;
        while machine.cpu().retired() < whole.instructions() * 3 / 4 {
            let next = machine.cpu().retired() + 77_777;
            machine.set_limits(Limits { instructions: Some(next), seconds: None });
            assert_eq!(machine.run().unwrap(), End::InstructionLimit { instructions: next });
            stops += 1;
        }
        assert!(stops > 3, "the guest is too short for this test");
        machine.set_limits(Limits::default());
        assert_eq!(finish(&mut machine).course(), whole.course());
    }

    fn a_guest_does_not_notice_that_its_memory_moves(square) {
        for name in ["demand-touch", "forkwait", "smc"] {
            moves_unnoticed(name, square);
        }
    }

    fn the_dirty_log_knows_every_frame_that_changed(square) {
        for name in ["demand-touch", "forkwait", "largepages"] {
            logs_all(name, square);
        }
    }
}

/// Moves frames to other host frames every so many instructions.
fn moves_unnoticed(name: &str, square: Square) {
    let build = || MachineConfig { policy: Policy::Demand, ..square.config(guest(name)) };
    let whole = run(build());
    let mut machine = Machine::new(build(), Wiring::default()).unwrap();
    let frames = machine.memory().end().0;
    let mut seed = 12345u64;
    let mut moved = 0;
    let step = (whole.instructions() / 40).max(1);
    for round in 1..30 {
        machine.set_limits(Limits { instructions: Some(round * step), seconds: None });
        assert!(matches!(machine.run().unwrap(), End::InstructionLimit { .. }));
        for _ in 0..20 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            moved += u64::from(machine.move_frame(Gfn((seed >> 33) % frames)).unwrap());
        }
        for gfn in 0x100..0x140 {
            // Where the guest's code is.
            moved += u64::from(machine.move_frame(Gfn(gfn)).unwrap());
        }
        machine.audit().unwrap();
    }
    assert!(moved > 100, "{name}: hardly anything was moved");
    machine.set_limits(Limits::default());
    assert_eq!(finish(&mut machine).course(), whole.course(), "{name}");
}

/// Compares the log with what really changed, several times in a run.
fn logs_all(name: &str, square: Square) {
    let whole = run(square.config(guest(name)));
    let mut machine = Machine::new(square.config(guest(name)), Wiring::default()).unwrap();
    let image = |machine: &Machine| {
        let frames = machine.memory().end().0;
        (0..frames)
            .map(|gfn| {
                let mut bytes = [0; 4096];
                let _hole = machine.memory().read(Gfn(gfn).base(), &mut bytes);
                crc(&bytes)
            })
            .collect::<Vec<_>>()
    };
    let step = whole.instructions() / 8;
    machine.set_limits(Limits { instructions: Some(step), seconds: None });
    assert!(matches!(machine.run().unwrap(), End::InstructionLimit { .. }));
    machine.start_dirty_log().unwrap();
    let mut before = image(&machine);
    let mut changes = 0;
    for round in 2..6 {
        machine.set_limits(Limits { instructions: Some(round * step), seconds: None });
        assert!(matches!(machine.run().unwrap(), End::InstructionLimit { .. }));
        let logged = machine.take_dirty_log().unwrap();
        let now = image(&machine);
        for gfn in (0..now.len()).filter(|&i| now[i] != before[i]) {
            assert!(logged.contains(&Gfn(gfn as u64)), "{name}: frame {gfn:#x} changed unseen");
            changes += 1;
        }
        before = now;
    }
    assert!(changes > 0, "{name}: nothing changed, so nothing was tested");
    machine.stop_dirty_log().unwrap();
    machine.set_limits(Limits::default());
    assert_eq!(finish(&mut machine).course(), whole.course(), "{name}");
    assert!(machine.counters().get(Counter::DirtyLogFaults) > 0, "{name}");
}

fn crc(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0u64, |sum, word| {
        let word = u64::from_le_bytes(word.try_into().unwrap());
        (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

#[test]
fn both_engines_give_every_guest_the_same_course_and_leave_it_alike() {
    for guest in guests::list() {
        for mmu in MmuKind::ALL {
            let [interpreted, translated] =
                EngineKind::ALL.map(|engine| run(Square { mmu, engine }.config(guest)));
            assert_eq!(interpreted.course(), translated.course(), "{} under {}", guest.name, mmu.name());
            // A table that is out of sync is synced at the first access that the TLB has nothing for, and what their TLBs
            // hold is the one thing that the engines do not share. Without that every exit is the same.
            let [interpreted, translated] = EngineKind::ALL.map(|engine| {
                let mut config = Square { mmu, engine }.config(guest);
                if mmu == MmuKind::Shadow {
                    config.mmu_options.set(mmu, "unsync", false).unwrap();
                }
                run(config).exits()
            });
            assert_eq!(interpreted, translated, "{} under {}", guest.name, mmu.name());
        }
    }
}

#[test]
fn both_backends_give_every_guest_the_same_course() {
    for guest in guests::list() {
        let shadow = run(config(guest, MmuKind::Shadow));
        let ept = run(config(guest, MmuKind::Ept));
        assert_eq!(shadow.course(), ept.course(), "{}", guest.name);
    }
}

#[test]
fn shadow_paging_costs_exits_that_nested_paging_does_not() {
    let [shadow, ept] = MmuKind::ALL.map(|mmu| run(config(guest("forkwait"), mmu)).report.counts);
    for counter in
        [Counter::ExitCr3Load, Counter::ExitInvlpg, Counter::ExitPageFault, Counter::FaultsTableWrite]
    {
        assert!(shadow.get(counter) > 100, "{}", counter.phrase());
        assert_eq!(ept.get(counter), 0, "{}", counter.phrase());
    }
    assert_eq!(shadow.get(Counter::ExitEptViolation), 0);
    assert!(
        ept.get(Counter::WalkReferences) > shadow.get(Counter::WalkReferences),
        "two dimensions cost more walks"
    );
}

#[test]
fn the_main_job_passes_and_survives_json() {
    let done = antumbra::job::run_all(guests::list(), EngineKind::default(), &Default::default()).unwrap();
    assert_eq!(done.failed(), 0, "{}", done.text());
    assert_eq!(done.guests.len(), guests::list().len());
    let text = serde_json::to_string(&done).unwrap();
    let back: antumbra::job::JobReport = serde_json::from_str(&text).unwrap();
    assert_eq!(back.text(), done.text());
    assert_eq!(done.status(), 0);
    let stopped =
        antumbra::job::run_all(guests::list(), EngineKind::default(), &Arc::new(AtomicBool::new(true)))
            .unwrap();
    assert_eq!(stopped.failed(), guests::list().len());
    assert_eq!(stopped.status(), 130);
}
