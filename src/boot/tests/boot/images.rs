//! Small kernel images, built field by field.

/// A bzImage. The defaults are those of a current 64-bit Linux.
#[derive(Clone)]
pub struct BzImage {
    pub version: u16,
    pub setup_sects: u8,
    pub loadflags: u8,
    pub xloadflags: u16,
    pub code32_start: u32,
    pub relocatable: u8,
    pub alignment: u32,
    pub pref_address: u64,
    pub init_size: u32,
    pub initrd_addr_max: u32,
    pub cmdline_size: u32,
    /// In place of the true number of paragraphs.
    pub syssize: Option<u32>,
    /// The jump's displacement, which ends the header.
    pub jump: u8,
    pub code: Vec<u8>,
}

impl Default for BzImage {
    fn default() -> Self {
        Self {
            version: 0x20f,
            setup_sects: 2,
            loadflags: 1,
            xloadflags: 0x7f,
            code32_start: 0x10_0000,
            relocatable: 1,
            alignment: 0x20_0000,
            pref_address: 0x100_0000,
            init_size: 0x30_0000,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            syssize: None,
            jump: 0x6a,
            code: (0..0x1000).map(|n| (n % 251) as u8).collect(),
        }
    }
}

impl BzImage {
    pub fn build(&self) -> Vec<u8> {
        let sectors = if self.setup_sects == 0 { 4 } else { usize::from(self.setup_sects) };
        let mut image = vec![0xcc; (sectors + 1) * 512];
        let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let syssize = self.syssize.unwrap_or(self.code.len().div_ceil(16) as u32);
        set(0x1f1, &[self.setup_sects]);
        set(0x1f4, &syssize.to_le_bytes());
        set(0x1fe, &[0x55, 0xaa, 0xeb, self.jump]);
        set(0x202, b"HdrS");
        set(0x206, &self.version.to_le_bytes());
        set(0x211, &[self.loadflags]);
        set(0x214, &self.code32_start.to_le_bytes());
        set(0x22c, &self.initrd_addr_max.to_le_bytes());
        set(0x230, &self.alignment.to_le_bytes());
        set(0x234, &[self.relocatable]);
        set(0x236, &self.xloadflags.to_le_bytes());
        set(0x238, &self.cmdline_size.to_le_bytes());
        set(0x250, &0u64.to_le_bytes());
        set(0x258, &self.pref_address.to_le_bytes());
        set(0x260, &self.init_size.to_le_bytes());
        image.extend(&self.code);
        image
    }
}

/// One PT_LOAD.
#[derive(Clone)]
pub struct Segment {
    pub paddr: u64,
    pub vaddr: u64,
    pub data: Vec<u8>,
    pub memsz: u64,
}

impl Segment {
    /// A segment whose virtual and physical addresses are one.
    pub fn at(paddr: u64, data: &[u8]) -> Self {
        Self { paddr, vaddr: paddr, data: data.to_vec(), memsz: data.len() as u64 }
    }
}

/// One note of a PT_NOTE.
pub fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend((name.len() as u32).to_le_bytes());
    note.extend((desc.len() as u32).to_le_bytes());
    note.extend(kind.to_le_bytes());
    for part in [name, desc] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// An ELF of either class: header, program headers, then notes and segments without padding.
pub struct Elf {
    pub wide: bool,
    pub machine: u16,
    pub entry: u64,
    pub segments: Vec<Segment>,
    pub notes: Vec<u8>,
}

impl Elf {
    pub fn wide(entry: u64, segments: Vec<Segment>) -> Self {
        Self { wide: true, machine: 62, entry, segments, notes: vec![] }
    }

    pub fn narrow(entry: u64, segments: Vec<Segment>) -> Self {
        Self { wide: false, machine: 3, entry, segments, notes: vec![] }
    }

    /// With Xen's note that offers a PVH entry.
    pub fn pvh(mut self, entry: u32) -> Self {
        self.notes.extend(note(b"GNU\0", 3, &[0xab; 20]));
        self.notes.extend(note(b"Xen\0", 6, b"not the entry"));
        self.notes.extend(note(b"Xen\0", 18, &entry.to_le_bytes()));
        self
    }

    fn word(&self, value: u64, out: &mut Vec<u8>) {
        if self.wide {
            out.extend(value.to_le_bytes());
        } else {
            out.extend(u32::try_from(value).unwrap().to_le_bytes());
        }
    }

    pub fn build(&self) -> Vec<u8> {
        let (header_len, program_len) = if self.wide { (64, 56) } else { (52, 32) };
        let count = self.segments.len() + usize::from(!self.notes.is_empty());
        let mut image = b"\x7fELF".to_vec();
        image.extend([if self.wide { 2 } else { 1 }, 1, 1]);
        image.resize(16, 0);
        image.extend(2u16.to_le_bytes());
        image.extend(self.machine.to_le_bytes());
        image.extend(1u32.to_le_bytes());
        self.word(self.entry, &mut image);
        self.word(header_len, &mut image);
        self.word(0, &mut image);
        image.extend(0u32.to_le_bytes());
        for half in [header_len as u16, program_len as u16, count as u16, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        assert_eq!(image.len() as u64, header_len);

        let mut offset = header_len + program_len * count as u64;
        let mut bodies: Vec<&[u8]> = Vec::new();
        if !self.notes.is_empty() {
            let notes = Segment::at(0, &self.notes);
            self.program(4, offset, &notes, &mut image);
            offset += self.notes.len() as u64;
            bodies.push(&self.notes);
        }
        for segment in &self.segments {
            self.program(1, offset, segment, &mut image);
            offset += segment.data.len() as u64;
            bodies.push(&segment.data);
        }
        image.extend(bodies.concat());
        image
    }

    fn program(&self, kind: u32, offset: u64, segment: &Segment, image: &mut Vec<u8>) {
        image.extend(kind.to_le_bytes());
        if self.wide {
            image.extend(7u32.to_le_bytes());
        }
        for value in [offset, segment.vaddr, segment.paddr, segment.data.len() as u64, segment.memsz] {
            self.word(value, image);
        }
        if !self.wide {
            image.extend(7u32.to_le_bytes());
        }
        self.word(if kind == 4 { 4 } else { 0x1000 }, image);
    }
}

/// The words of a multiboot header with a right checksum; `addresses` are header, load, load end, BSS end
/// and entry.
pub fn multiboot_header(flags: u32, addresses: Option<[u32; 5]>) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, sum].into_iter().chain(addresses.into_iter().flatten());
    words.flat_map(u32::to_le_bytes).collect()
}
