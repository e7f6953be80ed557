//! A guest memory that follows a layout, and readers for what lies in it.

use boot::{BootError, BootRequest, BootState, MemoryLayout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Memory with its map.
pub struct Machine {
    pub mem: GuestMemoryMmap,
    pub layout: MemoryLayout,
}

impl Machine {
    pub fn new(bytes: u64) -> Self {
        let layout = MemoryLayout::for_size(bytes).unwrap();
        let ranges: Vec<_> =
            layout.backed().into_iter().map(|(gpa, len)| (GuestAddress(gpa), len as usize)).collect();
        Self { mem: GuestMemoryMmap::from_ranges(&ranges).unwrap(), layout }
    }

    /// Loads with defaults, after `change` had its say.
    pub fn load<'a>(
        &'a self,
        kernel: &'a [u8],
        change: impl FnOnce(&mut BootRequest<'a>),
    ) -> Result<BootState, BootError> {
        let mut request = BootRequest::new(kernel, &self.layout);
        change(&mut request);
        let result = boot::load(&self.mem, request);
        if let Ok(state) = &result {
            check(state, &self.layout);
        }
        result
    }

    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    pub fn u8(&self, gpa: u64) -> u8 {
        self.bytes(gpa, 1)[0]
    }

    pub fn u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.bytes(gpa, 2).try_into().unwrap())
    }

    pub fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa, 4).try_into().unwrap())
    }

    pub fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap())
    }

    /// A string that ends with a NUL.
    pub fn string(&self, gpa: u64) -> String {
        let bytes: Vec<u8> = (gpa..).map(|at| self.u8(at)).take_while(|&byte| byte != 0).collect();
        String::from_utf8(bytes).unwrap()
    }

    /// The memory map as the layout has it: `(gpa, len, type)`.
    pub fn map(&self) -> Vec<(u64, u64, u32)> {
        self.layout.regions().iter().map(|region| (region.gpa, region.len, region.kind.e820_type())).collect()
    }

    /// Walks the identity map by hand (SDM Vol. 3, 4.5): the physical address behind `gva`.
    pub fn walk(&self, cr3: u64, gva: u64) -> u64 {
        let mut table = cr3;
        for shift in [39, 30, 21, 12] {
            let entry = self.u64(table + (gva >> shift & 511) * 8);
            assert_eq!(entry & 3, 3, "entry for {gva:#x} at shift {shift} is present and writable");
            let address = entry & 0x000f_ffff_ffff_f000;
            if shift == 12 || entry & 0x80 != 0 {
                let inside = (1u64 << shift) - 1;
                assert_eq!(address & inside, 0, "a page is aligned to its size");
                return address | gva & inside;
            }
            table = address;
        }
        unreachable!("the last level returns")
    }
}

/// What must hold for every loaded guest, whatever its image said.
pub fn check(state: &BootState, layout: &MemoryLayout) {
    let placements = &state.placements;
    for placed in placements {
        assert!(layout.is_low_ram(placed.gpa, placed.len), "{placed:?} is RAM");
    }
    for pair in placements.windows(2) {
        assert!(pair[0].gpa + pair[0].len <= pair[1].gpa, "{pair:?} do not overlap");
    }
    let holds =
        |gpa: u64| placements.iter().find(|placed| placed.gpa <= gpa && gpa < placed.gpa + placed.len);
    let entry = holds(state.rip).expect("the entry is placed");
    assert!(entry.what.starts_with("kernel"), "the entry is the kernel's: {entry:?}");
    assert_eq!(holds(state.rsp).expect("the stack is placed").what, "boot stack");
    assert_eq!(holds(state.gdt.base).expect("the GDT is placed").what, "GDT");
    assert_eq!(state.rflags, 2);
}
