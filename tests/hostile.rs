//! Guests and images that mean harm: each run ends in one clear sentence, and nothing panics.

mod common;

use antumbra::job::ends_as;
use antumbra::{End, Error, Limits, Machine, MachineConfig, MmuKind, Wiring};
use common::{Square, config, guest, run};
use guests::Ending;
use softcpu::EngineKind;

on_each_square! {
    fn every_hostile_guest_ends_as_it_says(square) {
        assert!(!guests::hostile().is_empty(), "there are no hostile guests");
        for guest in guests::hostile() {
            let short = matches!(guest.ending, Ending::Endless | Ending::Open);
            let instructions = if short { 3_000_000 } else { 500_000_000 };
            let limits = Limits { instructions: Some(instructions), seconds: None };
            let ran = run(MachineConfig { limits, ..square.config(guest) });
            assert!(ends_as(guest.ending, ran.end()), "{}: {}\n{}", guest.name, ran.end(), ran.serial);
            assert!(ran.report.sentence.len() > 20, "{}", ran.report.sentence);
        }
    }

    fn hostile_guests_repeat_too(square) {
        for guest in guests::hostile() {
            let build = || MachineConfig {
                limits: Limits { instructions: Some(1_000_000), seconds: None },
                ..square.config(guest)
            };
            assert_eq!(run(build()).deterministic(), run(build()).deterministic(), "{}", guest.name);
        }
    }

    fn a_hostile_guest_does_not_outgrow_its_table_memory(square) {
        for guest in guests::hostile() {
            let ran = run(MachineConfig {
                table_memory: 1 << 20,
                limits: Limits { instructions: Some(1_000_000), seconds: None },
                ..square.config(guest)
            });
            ran.end();
            assert!(ran.report.counts.table_bytes_peak <= 1 << 20, "{}", guest.name);
        }
    }

    fn damaged_images_never_panic(square) {
        let image = guest("hello").image;
        let mut seed = 99u64;
        let mut loaded = 0;
        for _ in 0..60 {
            let mut damaged = image.to_vec();
            for _ in 0..24 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (seed >> 33) as usize % damaged.len();
                damaged[at] ^= (seed >> 20) as u8;
            }
            let config = MachineConfig {
                memory: 16 << 20,
                limits: Limits { instructions: Some(300_000), seconds: Some(20) },
                ..MachineConfig::new("damaged", damaged).with_mmu(square.mmu).with_engine(square.engine)
            };
            match Machine::new(config, Wiring::default()) {
                Ok(mut machine) => {
                    loaded += 1;
                    if let Err(error) = machine.run() {
                        panic!("the engine failed where only the guest may: {error}");
                    }
                }
                Err(Error::Boot(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert!(loaded > 10, "hardly any damaged image was run");
    }
}

#[test]
fn both_engines_give_hostile_guests_the_same_course_and_leave_them_alike() {
    for guest in guests::hostile() {
        for mmu in MmuKind::ALL {
            let [interpreted, translated] = EngineKind::ALL.map(|engine| {
                let limits = Limits { instructions: Some(1_000_000), seconds: None };
                run(MachineConfig { limits, ..Square { mmu, engine }.config(guest) }).exits()
            });
            assert_eq!(interpreted, translated, "{} under {}", guest.name, mmu.name());
        }
    }
}

#[test]
fn both_backends_give_hostile_guests_the_same_course() {
    for guest in guests::hostile() {
        let [shadow, ept] = MmuKind::ALL.map(|mmu| {
            let limits = Limits { instructions: Some(1_000_000), seconds: None };
            run(MachineConfig { limits, ..config(guest, mmu) })
        });
        assert_eq!(shadow.course(), ept.course(), "{}", guest.name);
    }
}

#[test]
fn images_that_are_none_are_refused_with_a_reason() {
    let full = guest("hello").image;
    let images: [(&str, Vec<u8>); 6] = [
        ("empty", vec![]),
        ("zeros", vec![0; 1 << 16]),
        ("text", b"#!/bin/sh\necho hello\n".to_vec()),
        ("gzip", b"\x1f\x8b\x08\x00aaaaaaaaaaaaaaaa".to_vec()),
        ("half a header", full[..40].to_vec()),
        ("half a file", full[..full.len() / 2].to_vec()),
    ];
    for (name, image) in images {
        let config = MachineConfig::new(name, image);
        let error =
            Machine::new(config, Wiring::default()).err().unwrap_or_else(|| panic!("{name} was loaded"));
        assert!(matches!(error, Error::Boot(_)), "{name}: {error}");
        let sentence = error.to_string();
        assert!(sentence.starts_with("loading the guest failed: ") && sentence.len() > 40, "{sentence}");
    }
}

#[test]
fn absurd_sizes_are_refused() {
    for memory in [0, 1, 4095, 1 << 20, (64 << 20) + 1, 1 << 46, u64::MAX, u64::MAX - 4095] {
        let config = MachineConfig { memory, ..config(guest("hello"), MmuKind::Ept) };
        let error =
            Machine::new(config, Wiring::default()).err().unwrap_or_else(|| panic!("{memory} was taken"));
        assert!(matches!(error, Error::Option(_)), "{memory}: {error}");
    }
    let long = MachineConfig { cmdline: "x".repeat(1 << 20), ..config(guest("hello"), MmuKind::Ept) };
    assert!(matches!(Machine::new(long, Wiring::default()), Err(Error::Boot(_))));
    let initramfs =
        MachineConfig { initramfs: Some(vec![1; 70 << 20].into()), ..config(guest("hello"), MmuKind::Ept) };
    assert!(matches!(Machine::new(initramfs, Wiring::default()), Err(Error::Boot(_))));
}

#[test]
fn the_least_machine_runs() {
    let ran = run(MachineConfig { memory: 4 << 20, ..config(guest("hello"), MmuKind::Shadow) });
    assert!(matches!(ran.end(), End::DebugExit { .. }), "{}", ran.end());
}
