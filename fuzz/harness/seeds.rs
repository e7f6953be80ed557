//! The first inputs of every target: small valid images, code that does something, reports of a run; and for targets that
//! take any bytes, a few that get deep. They stand in `fuzz/corpus`, beside what fuzzing found.

#[path = "../../src/boot/tests/boot/images.rs"]
#[allow(dead_code, reason = "the builders of the boot crate's tests; not all are needed here")]
mod builders;

use antumbra::job::{GuestResult, JobReport};
use antumbra::{Comparison, Machine, MachineConfig, MmuKind, Report, Wiring};
use builders::{BzImage, Elf, Segment, multiboot_header};
use harness::seat::Mode;

/// Target, name, bytes.
pub type Seed = (&'static str, String, Vec<u8>);

/// All of them.
pub fn all() -> Vec<Seed> {
    [noises(), chains(), images(), codes(), texts()].concat()
}

/// Bytes that repeat from run to run.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Targets whose every byte is a choice: noise, led by each mode in turn.
fn noises() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for mode in 0..5 {
        let led = |lead: &[u8], len| [lead, &noise(u64::from(mode) + 7, len)].concat();
        seeds.push(("walker", format!("mode-{mode}"), led(&[mode, 0x27], 500)));
        seeds.push(("nested", format!("mode-{mode}"), led(&[0, 0, mode, 0x27], 400)));
        seeds.push(("lives", format!("mode-{mode}"), led(&[mode, 0, 0, 255, 0, mode], 900)));
        seeds.push(("registers", format!("noise-{mode}"), led(&[mode], 1000)));
    }
    seeds
}

/// Tables that lead to one another, with a hole, a large page and a page of few rights among them, and every kind of access.
fn chains() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for mode in 0..4u8 {
        let registers = if mode == 2 { &[0; 12][..] } else { &[] };
        let levels = [4, 5, 3, 2][usize::from(mode)];
        let accesses = |count: u8| -> Vec<u8> {
            (0..count).flat_map(|n| [&[n, 0][..], &vec![n % 3; levels], &[n]].concat()).collect()
        };
        // PSE and NXE; frame after frame, at three indexes each.
        let mut walker = [&[mode, 6, 2, 0, 0][..], registers, &[0, 0, 21]].concat();
        for frame in 0..7u8 {
            for index in 0..3u8 {
                let low = [0, 0, 0, 0x80, 2, 0x60, 4][usize::from(frame + index) % 7];
                walker.extend([frame, index, (frame + 1) % 7, low, 0]);
            }
        }
        walker.extend(accesses(16));
        seeds.push(("walker", format!("chain-{mode}"), walker));
        let mut nested = [&[0, 0, mode, 7, 2, 0, 0][..], registers, &[6]].concat();
        for n in 0..3u8 {
            // EPT: another leaf, one of few rights; the guest: another entry.
            nested.extend([0, 3, 3 + n, 8 + n, 0, [0, 2, 6][usize::from(n)], 0, 4, n, 0, n + 1, 0, 0]);
        }
        nested.extend(accesses(8));
        seeds.push(("nested", format!("chain-{mode}"), nested));
    }
    seeds
}

/// An image of every kind that the loaders take.
fn images() -> Vec<Seed> {
    let mut text = multiboot_header(3, None);
    text.resize(0x400, 0xf4);
    let narrow = Segment { memsz: 0x4000, ..Segment::at(0x10_0000, &text) };
    let wide = Segment { memsz: 0x4000, ..Segment::at(0x10_0000, &[0x90; 0x200]) };
    let more = Segment::at(0x11_0000, &[0xaa; 0x100]);
    let mut flat = multiboot_header(0x1_0001, Some([0x10_0000, 0x10_0000, 0x10_0220, 0x10_9000, 0x10_0020]));
    flat.resize(0x220, 0xf4);
    let small = BzImage {
        setup_sects: 1,
        alignment: 0x1000,
        pref_address: 0x10_0000,
        init_size: 0x8000,
        code: vec![0x90; 0x400],
        ..BzImage::default()
    };
    let fixed = BzImage { relocatable: 0, xloadflags: 0, ..small.clone() };
    let all = [
        ("bzimage-64", small.build()),
        ("bzimage-32", fixed.build()),
        ("pvh", Elf::wide(0x10_0000, vec![wide.clone(), more.clone()]).pvh(0x10_0010).build()),
        ("elf64", Elf::wide(0x10_0000, vec![wide, more.clone()]).build()),
        ("multiboot-elf32", Elf::narrow(0x10_0040, vec![narrow, more]).build()),
        ("multiboot-flat", flat),
    ];
    // The first byte asks for 4 MiB and an initramfs of 5000 bytes.
    all.map(|(name, image)| ("images", name.to_owned(), [vec![8], image].concat())).to_vec()
}

/// Programs of a few instructions, each led by its mode, its options and the placement of memory.
fn codes() -> Vec<Seed> {
    let programs: [(&str, &[u8]); 10] = [
        // MOV ECX, 40; MOV [EAX], ECX; ADD EAX, 4; LOOP.
        ("loop", &[0xb9, 40, 0, 0, 0, 0x89, 0x08, 0x83, 0xc0, 0x04, 0xe2, 0xf9]),
        // REP STOSB; REP MOVSB.
        ("strings", &[0xb9, 60, 0, 0, 0, 0xf3, 0xaa, 0xb9, 60, 0, 0, 0, 0xf3, 0xa4]),
        // MOV EDX, [ESI]; AND EDX, ~2; MOV [ESI], EDX; INVLPG [RBX]; MOV [RBX], AL; MOV EAX, CR3; MOV CR3, EAX.
        (
            "tables",
            &[
                0x8b, 0x16, 0x83, 0xe2, 0xfd, 0x89, 0x16, 0x0f, 0x01, 0x3b, 0x88, 0x03, 0x0f, 0x20, 0xd8,
                0x0f, 0x22, 0xd8,
            ],
        ),
        // PUSH; POP; CALL next; INT 3; UD2; INT 0x80; DIV by zero.
        ("exceptions", &[0x50, 0x59, 0xe8, 0, 0, 0, 0, 0xcc, 0x0f, 0x0b, 0xcd, 0x80, 0x31, 0xc9, 0xf7, 0xf1]),
        // OUT DX, AL; IN AL, DX; IN AX, 0x40; OUT 0x43, AL; CPUID; RDTSC; CLI; STI.
        ("devices", &[0xee, 0xec, 0x66, 0xe5, 0x40, 0xe6, 0x43, 0x0f, 0xa2, 0x0f, 0x31, 0xfa, 0xfb]),
        // MOV EAX, CR0; XOR EAX, 0x10000; MOV CR0, EAX; MOV EAX, CR4; XOR EAX, 0x80; MOV CR4, EAX.
        (
            "control",
            &[
                0x0f, 0x20, 0xc0, 0x35, 0, 0, 1, 0, 0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xe0, 0x35, 0x80, 0, 0, 0,
                0x0f, 0x22, 0xe0,
            ],
        ),
        // MOVDQU XMM0, [EAX]; PADDD XMM0, XMM1; MOVDQU [EAX], XMM0; FLD1; FADDP; FNSAVE [EAX].
        (
            "vectors",
            &[
                0xf3, 0x0f, 0x6f, 0x00, 0x66, 0x0f, 0xfe, 0xc1, 0xf3, 0x0f, 0x7f, 0x00, 0xd9, 0xe8, 0xde,
                0xc1, 0xdd, 0x30,
            ],
        ),
        // MOV BYTE [EBX + 8], 0x90; JMP $+2; NOP...; it changes what it is about to execute.
        ("itself", &[0xc6, 0x43, 0x08, 0x40, 0xeb, 0, 0x90, 0x90, 0xcc, 0x90, 0xc6, 0x03, 0xf4, 0xeb, 0xf1]),
        // PUSH CS; PUSH EIP; RETF; MOV DS, AX; LGDT; LTR; the far forms.
        (
            "far",
            &[
                0x0e, 0x68, 0x10, 0, 4, 0, 0xcb, 0x8e, 0xd8, 0x0f, 0x01, 0x10, 0x0f, 0x00, 0xd8, 0x8c, 0xc8,
                0xcf,
            ],
        ),
        // XOR AX, AX; LOCK CMPXCHG [EDI], EDX; XADD; BSF; SHLD; IMUL; BT.
        (
            "arithmetic",
            &[
                0x31, 0xc0, 0xf0, 0x0f, 0xb1, 0x17, 0x0f, 0xc1, 0x17, 0x0f, 0xbc, 0xca, 0x0f, 0xa4, 0xca, 5,
                0x0f, 0xaf, 0xca, 0x0f, 0xa3, 0x0f,
            ],
        ),
    ];
    let mut seeds = Vec::new();
    for (n, (name, program)) in programs.into_iter().enumerate() {
        for half in 0..2 {
            let mode = (n + 5 * half) % Mode::ALL.len();
            let lead = [mode as u8, [0x01, 0x10, 0x0f][n % 3], (n + half) as u8];
            seeds.push(("code", format!("{name}-{mode}"), [&lead, program].concat()));
        }
    }
    seeds
}

/// A report without what differs from run to run.
fn report(mmu: MmuKind) -> Report {
    let guest = guests::find("hello").expect("it is embedded");
    let mut machine = Machine::new(MachineConfig::for_guest(guest).with_mmu(mmu), Wiring::default())
        .unwrap_or_else(|error| panic!("{error}"));
    let ended = machine.run();
    Report { times: Default::default(), ..machine.report(&ended) }
}

fn texts() -> Vec<Seed> {
    let runs: Vec<_> = MmuKind::ALL.map(report).to_vec();
    let comparison = Comparison::new(runs.clone());
    let result = GuestResult { name: "hello".into(), failure: None, comparison: comparison.clone() };
    let job = JobReport { guests: vec![result] };
    let json = |kind: u8, value: serde_json::Result<Vec<u8>>| {
        [vec![kind], value.expect("reports are plain data")].concat()
    };
    vec![
        ("texts", "sizes".into(), b"\x00512M\n64K\n4096\n2G\n1T\n0\n12X".to_vec()),
        ("texts", "report".into(), json(1, serde_json::to_vec(&runs[0]))),
        ("texts", "comparison".into(), json(2, serde_json::to_vec(&comparison))),
        ("texts", "job".into(), json(3, serde_json::to_vec(&job))),
        ("texts", "altered".into(), [vec![4], noise(3, 200)].concat()),
        ("texts", "altered-once".into(), vec![5, 0, 0, 0, 0, 2, 0, 1, 0, 4, 0, 1, 9, 6, 3]),
    ]
}
