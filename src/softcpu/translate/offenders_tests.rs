//! Holds docs/popek-goldberg.md against the translator: what it says of each sensitive instruction is what is done.

use super::classify::{HostFlags, Kind, Setting};
use super::decoded;
use crate::core::Core;
use crate::model::CpuModel;
use guestmem::{Gpa, GuestMemory, MemoryConfig, Policy, RegionConfig, RegionKind};
use iced_x86::InstructionInfoFactory;
use std::sync::Arc;
use vcpu::state::seg;

/// A CPU in 64-bit mode.
pub(super) fn core() -> Core {
    let region = RegionConfig { base: Gpa(0), len: 1 << 20, kind: RegionKind::Ram };
    let config = MemoryConfig { regions: vec![region], policy: Policy::Linear, table_frames: 16 };
    let memory = GuestMemory::new(&config).unwrap();
    let mut core = Core::new(Arc::new(memory), CpuModel::default());
    core.paging.cr0 |= 1;
    core.paging.efer |= 1 << 10 | 1 << 8;
    core.segments[seg::CS].attributes = 0xa09b;
    core.mode_changed();
    assert!(core.mode64);
    core
}

/// How the first instruction of `bytes` is translated.
fn kind(core: &mut Core, bytes: &[u8], user: bool) -> Kind {
    let mut page = [0x90; 4096];
    page[..bytes.len()].copy_from_slice(bytes);
    let host = HostFlags { shifts: true };
    let setting = Setting { user, vectors: true, avx: true, host };
    let mut info = InstructionInfoFactory::new();
    decoded::decode(core, &mut info, &page, 0, setting, false).insns[0].kind
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Exit => "leaves",
        Kind::Callout => "handler",
        _ => "inline",
    }
}

#[test]
fn the_table_of_sensitive_instructions_is_true() {
    let text = include_str!("../../../docs/popek-goldberg.md");
    let mut core = core();
    let mut rows = 0;
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, name, bytes, _, kernel, user, _] = cells[..] else { continue };
        let Some(bytes) = bytes.strip_prefix('`').and_then(|b| b.strip_suffix('`')) else { continue };
        let bytes: Vec<u8> = bytes.split(' ').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        assert_eq!(word(kind(&mut core, &bytes, false)), kernel, "{name} at CPL 0");
        assert_eq!(word(kind(&mut core, &bytes, true)), user, "{name} at CPL 3");
        rows += 1;
    }
    assert!(rows >= 35, "only {rows} rows were found in the table");
}

#[test]
fn nothing_privileged_is_copied() {
    // Every instruction of one and two opcode bytes, with a register and with a memory operand: what iced calls privileged
    // is never executed by the host.
    let mut core = core();
    for second in 0..=0xffu8 {
        for modrm in [0xc1, 0x01, 0xd8, 0x18, 0xf8, 0x38] {
            for bytes in [[0x0f, second, modrm, 0, 0, 0, 0, 0], [second, modrm, 0, 0, 0, 0, 0, 0]] {
                let mut decoder = iced_x86::Decoder::new(64, &bytes, 0);
                let insn = decoder.decode();
                let found = kind(&mut core, &bytes, true);
                if insn.is_privileged() || insn.mnemonic() == iced_x86::Mnemonic::In {
                    assert!(matches!(found, Kind::Exit | Kind::Callout), "{insn} is {found:?}");
                }
            }
        }
    }
}
