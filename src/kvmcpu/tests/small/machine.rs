//! A machine for small programs: 128 KiB of RAM, two pages of ROM, nothing else; flat 32-bit protected mode at CPL 0.

use guestmem::{Gpa, GuestMemory, MemoryConfig, Policy, RegionConfig, RegionKind};
use kvmcpu::{Blank, Host, HostPaging, KvmCpu, Leaf};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vcpu::state::{Segment, TableRegister};
use vcpu::{Answer, ArchState, Entry, Exit, Vcpu};

pub const CODE: u64 = 0x1000;
pub const DATA: u64 = 0x8000;
pub const GDT: u64 = 0x4000;
pub const IDT: u64 = 0x5000;
pub const ROM: u64 = 0x20000;
pub const NOWHERE: u64 = 0x10_0000;
pub const SECOND: u64 = 1_000_000_000;
pub const IF: u64 = 1 << 9;

/// A machine in the middle of a program.
pub struct Small {
    pub cpu: KvmCpu,
    pub paging: HostPaging,
    pub memory: Arc<GuestMemory>,
    pub entry: Entry,
}

/// Past the test harness, which keeps the output of tests that pass to itself.
pub fn skip(test: &str, why: &str) {
    let _said = std::io::stderr().write_all(format!("SKIP {test}: {why}\n").as_bytes());
}

pub fn host(test: &str) -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            skip(test, &error.to_string());
            None
        }
    }
}

pub fn memory(policy: Policy) -> Arc<GuestMemory> {
    let region = |base, len, kind| RegionConfig { base: Gpa(base), len, kind };
    let regions = vec![region(0, ROM, RegionKind::Ram), region(ROM, 0x2000, RegionKind::Rom)];
    Arc::new(GuestMemory::new(&MemoryConfig { regions, policy, table_frames: 4 }).unwrap())
}

pub fn model(host: &Host) -> Vec<Leaf> {
    let leaf = |e: &_| {
        let e: &kvm_bindings::kvm_cpuid_entry2 = e;
        Leaf { function: e.function, index: e.index, registers: [e.eax, e.ebx, e.ecx, e.edx] }
    };
    let mut leaves: Vec<_> = host.supported.as_slice().iter().map(leaf).collect();
    // What a machine with our local APIC declares.
    leaves.iter_mut().filter(|l| l.function == 1).for_each(|l| l.registers[2] |= 1 << 21);
    leaves
}

/// A machine with this code, about to execute it.
pub fn small(host: &Host, policy: Policy, code: &[u8]) -> Small {
    let memory = memory(policy);
    let blank = Blank::new(host, &model(host)).unwrap();
    assert!(blank.tsc_hz() > 1_000_000);
    let (mut cpu, paging) = KvmCpu::new(blank, Arc::clone(&memory)).unwrap();
    memory.write(Gpa(CODE), code).unwrap();
    for (n, word) in [(1, 0x00cf_9b00_0000_ffffu64), (2, 0x00cf_9300_0000_ffff)] {
        memory.write(Gpa(GDT + 8 * n), &word.to_le_bytes()).unwrap();
    }
    cpu.set_state(&flat(cpu.state()));
    Small { cpu, paging, memory, entry: Entry::Start }
}

pub fn flat(reset: ArchState) -> ArchState {
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
    let mut segments = [data; 6];
    segments[vcpu::state::seg::CS] = Segment { selector: 8, attributes: 0xc09b, ..data };
    let mut gprs = [0; 16];
    gprs[4] = 0x3000;
    ArchState {
        gprs,
        rip: CODE,
        rflags: 2,
        segments,
        ldtr: Segment::default(),
        tr: Segment { selector: 0x18, base: 0, limit: 0x67, attributes: 0x8b },
        gdtr: TableRegister { base: GDT, limit: 23 },
        idtr: TableRegister { base: IDT, limit: 0x7ff },
        cr0: 0x11,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..reset
    }
}

impl Small {
    /// Enters with the answer and gives the next exit that is not a deadline of this helper's.
    pub fn next(&mut self) -> Exit {
        let began = Instant::now();
        loop {
            let entry = std::mem::replace(&mut self.entry, Entry::Answer(Answer::Done));
            match self.cpu.run(entry, self.cpu.ticks() + SECOND).unwrap() {
                Exit::Deadline => assert!(began.elapsed() < Duration::from_secs(20), "it does not exit"),
                exit => return exit,
            }
        }
    }

    pub fn answer(&mut self, answer: Answer) {
        self.entry = Entry::Answer(answer);
    }

    pub fn gate(&self, vector: u64, handler: u64) {
        let gate = 0x0000_8e00_0008_0000 | handler;
        self.memory.write(Gpa(IDT + 8 * vector), &gate.to_le_bytes()).unwrap();
    }

    /// A handler at 0x2000 that does this and goes back. It does without IRET, which KVM's interpreter has in real mode only:
    /// pop ebx; add esp, 4; popfd; jmp ebx.
    pub fn handler(&self, deed: &[u8]) {
        let back = [0x5b, 0x83, 0xc4, 4, 0x9d, 0xff, 0xe3];
        self.memory.write(Gpa(0x2000), &[deed, &back].concat()).unwrap();
    }

    pub fn word(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(Gpa(at), &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }
}
