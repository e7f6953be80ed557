//! Guest memory whose pages lie in no order: the loaders must go page by page and see no difference.

use std::ops::Deref;

use boot::{BootRequest, MemoryLayout};
use vm_memory::iommu::{Error, Iotlb, IotlbIterator, IovaRange};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Iommu, IommuMemory, Permissions,
};

use crate::images::{BzImage, Elf, Segment};
use crate::machine::Machine;

const PAGE: u64 = 0x1000;

/// A guest-physical map that reverses the order of pages over one backing object.
#[derive(Debug)]
struct Reversed {
    map: Iotlb,
}

impl Reversed {
    fn new(layout: &MemoryLayout) -> (Self, u64) {
        let pages: Vec<u64> = layout
            .backed()
            .into_iter()
            .flat_map(|(gpa, len)| (gpa..gpa + len).step_by(PAGE as usize))
            .collect();
        let mut map = Iotlb::new();
        for (n, gpa) in pages.iter().rev().enumerate() {
            let host = GuestAddress(n as u64 * PAGE);
            map.set_mapping(GuestAddress(*gpa), host, PAGE as usize, Permissions::ReadWrite).unwrap();
        }
        (Self { map }, pages.len() as u64 * PAGE)
    }
}

/// A borrowed table, which is all that translation needs here.
struct Borrowed<'a>(&'a Iotlb);

impl Deref for Borrowed<'_> {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        self.0
    }
}

impl Iommu for Reversed {
    type IotlbGuard<'a> = Borrowed<'a>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Borrowed<'_>>, Error> {
        Iotlb::lookup(Borrowed(&self.map), iova, length, access).map_err(|_| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason: "hole".into(),
        })
    }
}

#[test]
fn scattered_memory_is_loaded_like_plain_memory() {
    let plain = Machine::new(32 << 20);
    let (map, bytes) = Reversed::new(&plain.layout);
    let host = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
    let scattered = IommuMemory::new(host, map, true, ());
    assert!(scattered.physical_memory().is_none(), "no host-contiguous view is offered");

    let code: Vec<u8> = (0..0x2_0123).map(|n| (n % 241) as u8).collect();
    let initramfs: Vec<u8> = (0..0x1_2345).map(|n| (n % 239) as u8).collect();
    let bz = BzImage { code: code.clone(), ..BzImage::default() }.build();
    let pvh = Elf::wide(0x40_0000, vec![Segment::at(0x40_0000, &code)]).pvh(0x40_0000).build();
    for kernel in [&bz, &pvh] {
        let request = || BootRequest {
            initramfs: Some(&initramfs),
            cmdline: "scattered",
            ..BootRequest::new(kernel, &plain.layout)
        };
        let expected = boot::load(&plain.mem, request()).unwrap();
        let state = boot::load(&scattered, request()).unwrap();
        assert_eq!(state, expected);
    }
    for (gpa, len) in plain.layout.backed() {
        let mut bytes = vec![0; len as usize];
        scattered.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        assert!(bytes == plain.bytes(gpa, len as usize), "memory from {gpa:#x} is the same");
    }
}

#[test]
fn memory_that_lacks_what_the_layout_promises_is_an_error() {
    let layout = MemoryLayout::for_size(32 << 20).unwrap();
    let short = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0xa_0000)]).unwrap();
    let image = BzImage::default().build();
    let error = boot::load(&short, BootRequest::new(&image, &layout)).unwrap_err();
    let boot::BootError::Memory { gpa, source, .. } = &error else { panic!("{error}") };
    assert!((0xe_0000..0x10_0000).contains(gpa));
    assert!(matches!(source, GuestMemoryError::InvalidGuestAddress(_)), "{source}");
}
