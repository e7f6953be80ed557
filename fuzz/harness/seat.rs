//! The machine of target `code`: the whole of Antumbra, with a CPU that is seated in the middle of a small kernel instead of
//! at a boot protocol's entry.
//!
//! The kernel is an image in which everything lies within the first megabyte: descriptor tables for every mode, page
//! tables of every format that map the first two or four megabytes to themselves (the tables too, so that the code can
//! change them), stacks, and handlers that step over the byte at which an exception happened. The last part is what lets
//! bytes of any kind be executed to their end. SDM Vol. 3 §2.4 and §3.4 to §3.5, §6.10 to §6.14, §7.2, §20.1.

use guestmem::GuestMemory;
use softcpu::{CpuModel, EngineKind, SoftCpu};
use std::sync::Arc;
use vcpu::state::seg;
use vcpu::{ArchState, Entry, Exit, Segment, TableRegister, Vcpu, VcpuError};

/// Where the image is loaded, and from where on 16-bit segments reach its parts.
pub const LOAD: u64 = 0x3_0000;
/// Where the code is.
pub const CODE: u64 = 0x4_0000;
/// The most bytes of code.
pub const CODE_LEN: usize = 256;
const IMAGE_LEN: usize = 0x1_2000;

const IDT64: u64 = LOAD + 0x1000;
const IDT32: u64 = LOAD + 0x2000;
const IVT: u64 = LOAD + 0x2800;
const HANDLERS32: u64 = LOAD + 0x3000;
const HANDLERS64: u64 = LOAD + 0x3100;
const HANDLERS16: u64 = LOAD + 0x3200;
const GDT: u64 = LOAD + 0x4000;
const TSS32: u64 = LOAD + 0x4100;
const TSS64: u64 = LOAD + 0x4200;
const PML4: u64 = LOAD + 0x5000;
const PDPT: u64 = LOAD + 0x6000;
const DIRECTORY: u64 = LOAD + 0x7000;
const TABLE: u64 = LOAD + 0x8000;
const PDPTES: u64 = LOAD + 0x9000;
const DIRECTORY32: u64 = LOAD + 0xa000;
const TABLE32: u64 = LOAD + 0xb000;
const KERNEL_STACK: u64 = LOAD + 0xd000;
const DATA: u64 = LOAD + 0xe000;
const STACK: u64 = LOAD + 0xfff0;

const CODE32: u16 = 0x08;
const DATA32: u16 = 0x10;
const CODE64: u16 = 0x18;
const USER_CODE32: u16 = 0x23;
const USER_DATA: u16 = 0x2b;
const USER_CODE64: u16 = 0x33;
const CODE16: u16 = 0x38;
const DATA16: u16 = 0x40;
const TASK32: u16 = 0x48;
const TASK64: u16 = 0x50;

/// The mode that the code is executed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode.
    Long,
    /// 64-bit mode at CPL 3.
    LongUser,
    /// Compatibility mode.
    Compatibility,
    /// Compatibility mode at CPL 3.
    CompatibilityUser,
    /// Protected mode with PAE paging.
    Pae,
    /// Protected mode with 32-bit paging.
    Bits32,
    /// Protected mode with 32-bit paging at CPL 3.
    Bits32User,
    /// Protected mode without paging.
    Flat,
    /// Protected mode without paging, in segments of 16 bits.
    Bits16,
    /// Real mode.
    Real,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 10] = [
        Mode::Long,
        Mode::LongUser,
        Mode::Bits32,
        Mode::Compatibility,
        Mode::CompatibilityUser,
        Mode::Pae,
        Mode::Bits32User,
        Mode::Flat,
        Mode::Bits16,
        Mode::Real,
    ];

    fn is_long(self) -> bool {
        matches!(self, Mode::Long | Mode::LongUser | Mode::Compatibility | Mode::CompatibilityUser)
    }
}

/// The CPU's seat: where it begins.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    /// The mode.
    pub mode: Mode,
    /// CR0.WP, CR4.PGE, CR4.PCIDE, EFLAGS.IF and large pages, one bit each.
    pub options: u8,
}

fn put(image: &mut [u8], at: u64, bytes: &[u8]) {
    let at = (at - LOAD) as usize;
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put_entry(image: &mut [u8], at: u64, raw: u64) {
    put(image, at, &raw.to_le_bytes());
}

/// Whether an exception pushes an error code.
fn has_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// A gate of 8 bytes, or the lower 8 of 16, for a 32-bit or 64-bit interrupt handler that anybody may call.
fn gate(handler: u64, selector: u16) -> u64 {
    handler & 0xffff | u64::from(selector) << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48
}

impl Seat {
    fn option(&self, n: u32) -> bool {
        self.options >> n & 1 == 1
    }

    /// The kernel with the code in it, as a multiboot image.
    pub fn image(&self, code: &[u8]) -> Vec<u8> {
        // HLT behind the code: where interrupts are off, it ends the run.
        let mut image = vec![0; IMAGE_LEN];
        image[(CODE - LOAD) as usize..].fill(0xf4);
        put(&mut image, CODE, &code[..code.len().min(CODE_LEN)]);
        let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
        let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
        let words = [magic, flags, sum, LOAD as u32, LOAD as u32, 0, 0, CODE as u32];
        put(&mut image, LOAD, &words.map(u32::to_le_bytes).concat());
        handlers(&mut image);
        descriptors(&mut image);
        self.tables(&mut image);
        image
    }

    /// Page tables of every format. User code may do everything, and the tables are mapped like the rest.
    fn tables(&self, image: &mut [u8]) {
        let all = 7;
        put_entry(image, PML4, PDPT | all);
        put_entry(image, PDPT, DIRECTORY | all);
        put_entry(image, PDPTES, DIRECTORY | 1);
        put_entry(image, DIRECTORY, if self.option(4) { 0x80 | all } else { TABLE | all });
        // Where else the code may look: the next two megabytes are one large page, and behind it is the table itself.
        put_entry(image, DIRECTORY + 8, 0x80 | all);
        put_entry(image, DIRECTORY + 16, TABLE | all);
        for page in 0..512 {
            put_entry(image, TABLE + page * 8, page << 12 | all);
        }
        let first = if self.option(4) { 0x80 | all } else { TABLE32 | all };
        put(image, DIRECTORY32, &(first as u32).to_le_bytes());
        put(image, DIRECTORY32 + 4, &(TABLE32 as u32 | all as u32).to_le_bytes());
        for page in 0..1024u32 {
            put(image, TABLE32 + u64::from(page) * 4, &(page << 12 | all as u32).to_le_bytes());
        }
    }

    /// The state to begin in; what the seat does not concern stays as it is after reset.
    pub fn state(&self, reset: &ArchState) -> ArchState {
        let mode = self.mode;
        let on = |option: u32, bit: u32| u64::from(self.option(option)) << bit;
        // In 16-bit segments addresses are offsets from the image's.
        let narrow = matches!(mode, Mode::Bits16 | Mode::Real);
        let near = |linear: u64| if narrow { linear - LOAD } else { linear };
        let paging = !matches!(mode, Mode::Flat | Mode::Bits16 | Mode::Real);
        let mut gprs = [
            near(DATA),
            7,
            0x3f8,
            if narrow { 0 } else { CODE },
            near(STACK),
            near(STACK - 0x800),
            near(TABLE + (CODE >> 12) * 8),
            near(DATA + 0x800),
            GDT,
            IDT64,
            PML4,
            0xfee0_0000,
            0x20_0000,
            DIRECTORY,
            !0,
            1 << 63,
        ];
        if !mode.is_long() {
            gprs[8..].fill(0);
        }
        ArchState {
            gprs,
            rip: if narrow { 0 } else { CODE },
            rflags: 2 | on(3, 9),
            segments: self.segments(),
            tr: self.task(),
            ldtr: Segment::default(),
            gdtr: TableRegister { base: GDT, limit: 0xff },
            idtr: match mode {
                Mode::Real => TableRegister { base: IVT, limit: 0x3ff },
                _ if mode.is_long() => TableRegister { base: IDT64, limit: 0xfff },
                _ => TableRegister { base: IDT32, limit: 0x7ff },
            },
            cr0: u64::from(mode != Mode::Real) | 0x30 | on(0, 16) | u64::from(paging) << 31,
            cr3: match mode {
                Mode::Pae => PDPTES,
                Mode::Bits32 | Mode::Bits32User => DIRECTORY32,
                _ if mode.is_long() => PML4,
                _ => 0,
            },
            // PSE, PAE, PGE, OSFXSR and OSXMMEXCPT, PCIDE.
            cr4: 1 << 4
                | u64::from(mode.is_long() || mode == Mode::Pae) << 5
                | on(1, 7)
                | 3 << 9
                | if mode.is_long() { on(2, 17) } else { 0 },
            // SCE, LME, LMA, NXE.
            efer: if mode.is_long() { 0xd01 } else { 0 },
            pdptes: if mode == Mode::Pae { [DIRECTORY | 1, 0, 0, 0] } else { [0; 4] },
            ..reset.clone()
        }
    }

    fn segments(&self) -> [Segment; 6] {
        let flat = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
        let (code, data) = match self.mode {
            Mode::Long => (flat(CODE64, 0xa09b), flat(DATA32, 0xc093)),
            Mode::LongUser => (flat(USER_CODE64, 0xa0fb), flat(USER_DATA, 0xc0f3)),
            Mode::CompatibilityUser | Mode::Bits32User => {
                (flat(USER_CODE32, 0xc0fb), flat(USER_DATA, 0xc0f3))
            }
            Mode::Bits16 | Mode::Real => {
                let real = self.mode == Mode::Real;
                let of = |paragraph: u64, selector: u16, attributes| Segment {
                    selector: if real { (paragraph >> 4) as u16 } else { selector },
                    base: paragraph,
                    limit: 0xffff,
                    attributes,
                };
                (of(CODE, CODE16, 0x9b), of(LOAD, DATA16, 0x93))
            }
            _ => (flat(CODE32, 0xc09b), flat(DATA32, 0xc093)),
        };
        let mut segments = [data; 6];
        segments[seg::CS] = code;
        segments
    }

    fn task(&self) -> Segment {
        let task = |selector, base| Segment { selector, base, limit: 0x67, attributes: 0x8b };
        match self.mode {
            Mode::Real => task(0, 0),
            mode if mode.is_long() => task(TASK64, TSS64),
            _ => task(TASK32, TSS32),
        }
    }
}

/// Handlers that add one to the saved instruction pointer and return, and the tables that lead to them.
fn handlers(image: &mut [u8]) {
    // INC dword [ESP]; IRET. Before it, where there is an error code: ADD ESP, 4. Then the same in 64 bits.
    put(image, HANDLERS32, &[0xff, 0x04, 0x24, 0xcf]);
    put(image, HANDLERS32 + 0x80, &[0x83, 0xc4, 0x04, 0xff, 0x04, 0x24, 0xcf]);
    put(image, HANDLERS64, &[0x48, 0xff, 0x04, 0x24, 0x48, 0xcf]);
    put(image, HANDLERS64 + 0x80, &[0x48, 0x83, 0xc4, 0x08, 0x48, 0xff, 0x04, 0x24, 0x48, 0xcf]);
    // PUSH BP; MOV BP, SP; INC word [BP + 2]; POP BP; IRET.
    put(image, HANDLERS16, &[0x55, 0x89, 0xe5, 0xff, 0x46, 0x02, 0x5d, 0xcf]);
    for vector in 0..256 {
        let behind = if has_code(vector) { 0x80 } else { 0 };
        put_entry(image, IDT64 + vector * 16, gate(HANDLERS64 + behind, CODE64));
        put_entry(image, IDT32 + vector * 8, gate(HANDLERS32 + behind, CODE32));
        let (segment, offset) = ((LOAD >> 4) as u16, (HANDLERS16 - LOAD) as u16);
        put(image, IVT + vector * 4, &[offset.to_le_bytes(), segment.to_le_bytes()].concat());
    }
}

fn descriptors(image: &mut [u8]) {
    let based = |attributes: u64, base: u64, limit: u64| {
        limit & 0xffff | (base & 0xff_ffff) << 16 | attributes << 40 | (base >> 24) << 56
    };
    let table = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        based(0x9b, CODE, 0xffff),
        based(0x93, LOAD, 0xffff),
        based(0x8b, TSS32, 0x67),
        based(0x8b, TSS64, 0x67),
        0,
        // A call gate that everybody may use.
        gate(HANDLERS32, CODE32) & !(0xff << 40) | 0xec << 40,
    ];
    for (n, raw) in table.into_iter().enumerate() {
        put_entry(image, GDT + 8 * n as u64, raw);
    }
    put(image, TSS32 + 4, &(KERNEL_STACK as u32).to_le_bytes());
    put(image, TSS32 + 8, &DATA32.to_le_bytes());
    put_entry(image, TSS64 + 4, KERNEL_STACK);
}

/// A software CPU that takes its seat when the machine sets its first state.
pub struct Seated {
    cpu: SoftCpu,
    seat: Option<Seat>,
}

impl Seated {
    /// A CPU over this memory, with this engine.
    pub fn new(
        memory: Arc<GuestMemory>,
        model: CpuModel,
        engine: EngineKind,
        seat: Seat,
    ) -> Result<Self, VcpuError> {
        Ok(Self { cpu: SoftCpu::with_engine(memory, model, engine)?, seat: Some(seat) })
    }
}

impl Vcpu for Seated {
    fn run(&mut self, entry: Entry, deadline: u64) -> Result<Exit, VcpuError> {
        self.cpu.run(entry, deadline)
    }
    fn set_state(&mut self, state: &ArchState) {
        match self.seat.take() {
            Some(seat) => self.cpu.set_state(&seat.state(state)),
            None => self.cpu.set_state(state),
        }
    }
    vcpu::vcpu_through!(
        cpu: ticks add_ticks retired paging_state set_translation flush can_take_interrupt is_delivering
        inject_interrupt inject_nmi request_interrupt_window state counters
    );
}
