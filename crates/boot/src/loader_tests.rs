//! Both loaders, with images made here: placement, parameters, entry state, limits, and what damaged images do.

use engine::{GuestMemory, VcpuState};
use proptest::prelude::*;
use x86::bits::{cr0, cr4, efer};
use x86::paging::pte;
use x86::regs::{Gpr, attr};

use crate::entry::{EntryMode, EntryState};
use crate::error::LoadError;
use crate::image::Image;
use crate::layout::MemoryLayout;
use crate::loader::{KernelFormat, KernelRequest, detect, load};
use crate::testing::{GIB, MIB, guest, read, u32_at, u64_at};

/// What the test kernels are made of, so that their bytes can be recognised.
fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 + 1).collect()
}

const XLF_KERNEL_64: u16 = 1;
const SETUP_SECTORS: usize = 2;
const PAYLOAD_AT: usize = (SETUP_SECTORS + 1) * 512;

/// The fields of a bzImage that tests vary.
struct BzImage {
    version: u16,
    xloadflags: u16,
    relocatable: bool,
    alignment: u32,
    preferred: u64,
    init_size: u32,
    initrd_max: u32,
    cmdline_size: u32,
    payload_len: usize,
}

impl Default for BzImage {
    fn default() -> Self {
        BzImage {
            version: 0x20f,
            xloadflags: XLF_KERNEL_64,
            relocatable: true,
            alignment: 0x20_0000,
            preferred: 0x100_0000,
            init_size: 32 << 20,
            initrd_max: 0x7fff_ffff,
            cmdline_size: 2047,
            payload_len: 0x3_0010,
        }
    }
}

impl BzImage {
    fn bytes(&self) -> Vec<u8> {
        let mut image = vec![0; PAYLOAD_AT];
        let mut put =
            |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[SETUP_SECTORS as u8]);
        put(0x1f4, &((self.payload_len.div_ceil(16)) as u32).to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &self.version.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x22c, &self.initrd_max.to_le_bytes());
        put(0x230, &self.alignment.to_le_bytes());
        put(0x234, &[u8::from(self.relocatable)]);
        put(0x236, &self.xloadflags.to_le_bytes());
        put(0x238, &self.cmdline_size.to_le_bytes());
        put(0x258, &self.preferred.to_le_bytes());
        put(0x260, &self.init_size.to_le_bytes());
        image.extend(payload(self.payload_len));
        image
    }
    fn image(&self) -> Image {
        Image::from_bytes("bzImage", self.bytes())
    }
}

fn try_load(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    kernel: &Image,
    initrd: Option<&Image>,
    command_line: &str,
) -> Result<EntryState, LoadError> {
    load(memory, &KernelRequest { kernel, initrd, command_line, layout, rsdp: Some(0xf_2400) })
}

/// Follows the page tables that CR3 points to.
fn translate(memory: &GuestMemory, state: &VcpuState, address: u64) -> Option<u64> {
    let mut table = state.control.cr3;
    for shift in [39, 30, 21] {
        let entry = u64_at(&read(memory, table + 8 * (address >> shift & 511), 8), 0);
        if entry & pte::P == 0 {
            return None;
        }
        assert_ne!(entry & pte::RW, 0);
        if entry & pte::PS != 0 {
            return Some((entry & pte::ADDRESS) + (address & ((1 << shift) - 1)));
        }
        table = entry & pte::ADDRESS;
    }
    None
}

/// What a kernel finds when it is entered, checked against the descriptor table in memory.
fn entered(memory: &GuestMemory, entry: &EntryState) -> VcpuState {
    let mut state = VcpuState::reset(0);
    entry.apply(&mut state);
    let gdt = state.segments.gdt;
    for segment in [state.segments.cs, state.segments.ds, state.segments.ss, state.segments.tr] {
        assert!(segment.selector + 7 <= gdt.limit);
        let descriptor = u64_at(&read(memory, gdt.base + u64::from(segment.selector), 8), 0);
        assert_eq!(x86::Segment::from_descriptor(segment.selector, descriptor), segment);
    }
    assert_eq!(state.regs.rflags, 2, "interrupts off");
    assert_eq!((state.segments.cs.selector, state.segments.ds.selector), (0x10, 0x18));
    assert_eq!((state.segments.cs.limit, state.segments.ds.limit), (u32::MAX, u32::MAX));
    state
}

#[test]
fn a_64_bit_kernel_starts_in_long_mode() {
    for total in [128 * MIB, 512 * MIB, 3 * GIB, 6 * GIB] {
        let (layout, memory) = guest(total);
        let image = BzImage::default().image();
        let initrd = Image::from_bytes("initrd", payload(5000));
        let line = "console=ttyS0 root=/dev/vda";
        let entry = try_load(&memory, &layout, &image, Some(&initrd), line).unwrap();
        assert_eq!((entry.mode, entry.rip), (EntryMode::Long, 0x100_0200));
        let state = entered(&memory, &entry);
        assert_eq!(state.control.cr0 & (cr0::PE | cr0::PG), cr0::PE | cr0::PG);
        assert_eq!(state.control.cr4, cr4::PAE);
        assert_eq!(state.control.efer, efer::LME | efer::LMA);
        assert_eq!(state.segments.cs.attributes & (attr::L | attr::DB), attr::L);
        for address in [0, 0x1234, 0x100_0200, 0xbfff_ffff, 0xfee0_0300, 0xffff_ffff] {
            assert_eq!(translate(&memory, &state, address), Some(address));
        }
        assert_eq!(translate(&memory, &state, 4 * GIB), None);

        assert_eq!(read(&memory, 0x100_0000, 0x3_0010), payload(0x3_0010));
        let zero_page = read(&memory, state.regs.gpr[Gpr::Rsi as usize], 4096);
        assert_eq!(u64_at(&zero_page, 0x70), 0xf_2400);
        assert_eq!((&zero_page[0x202..0x206], zero_page[0x210], zero_page[0x1ef]), (&b"HdrS"[..], 0xff, 0));
        assert_eq!(u32_at(&zero_page, 0x214), 0x100_0000);
        let line_at = u32_at(&zero_page, 0x228).into();
        assert_eq!(read(&memory, line_at, line.len() + 1), [line.as_bytes(), b"\0"].concat());

        let (start, len) = (u64::from(u32_at(&zero_page, 0x218)), u32_at(&zero_page, 0x21c));
        let ceiling = layout.low_bytes().min(2 * GIB);
        assert_eq!((start, len), (ceiling - 8192, 5000), "as high as it goes");
        assert_eq!(read(&memory, start, 5000), payload(5000));

        let map: Vec<(u64, u64, u32)> = (0..usize::from(zero_page[0x1e8]))
            .map(|i| 0x2d0 + 20 * i)
            .map(|at| (u64_at(&zero_page, at), u64_at(&zero_page, at + 8), u32_at(&zero_page, at + 16)))
            .collect();
        let expected: Vec<(u64, u64, u32)> =
            layout.e820().iter().map(|e| (e.base, e.len, e.kind as u32)).collect();
        assert_eq!(map, expected);
    }
}

#[test]
fn the_lapic_is_in_virtual_wire_mode() {
    let entry = EntryState { mode: EntryMode::Long, rip: 0, rsp: 0, rbx: 0, rsi: 0 };
    let mut state = VcpuState::reset(0);
    entry.apply(&mut state);
    let register = |offset: usize| state.lapic.registers[offset / 16];
    assert_eq!((register(0xf0), register(0x350), register(0x360)), (0x1ff, 0x700, 0x400));
}

#[test]
fn mtrrs_make_ram_write_back_and_the_hole_uncached() {
    let msrs: std::collections::BTreeMap<u32, u64> = crate::entry::mtrr_msrs(40).into_iter().collect();
    assert_eq!(msrs.len(), 3 + 8 + 2 + 1);
    assert_eq!(msrs[&0x2ff], 0xc06, "enabled, fixed ranges too, write-back by default");
    assert_eq!((msrs[&0x200], msrs[&0x201]), (0xc000_0000, 0xff_c000_0800), "3 to 4 GiB uncached");
    assert_eq!((msrs[&0x250], msrs[&0x259], msrs[&0x26f]), (0x0606_0606_0606_0606, 0, 0x0505_0505_0505_0505));
}

#[test]
fn a_kernel_without_the_64_bit_entry_starts_in_protected_mode() {
    let (layout, memory) = guest(128 * MIB);
    let image = BzImage {
        version: 0x20c,
        xloadflags: 0,
        relocatable: false,
        preferred: 0x10_0000,
        alignment: 0x1000,
        cmdline_size: 255,
        ..BzImage::default()
    };
    let entry = try_load(&memory, &layout, &image.image(), None, "").unwrap();
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected, 0x10_0000));
    let state = entered(&memory, &entry);
    assert_eq!((state.control.cr0 & cr0::PG, state.control.cr4, state.control.efer), (0, 0, 0));
    assert_eq!(state.segments.cs.attributes & (attr::L | attr::DB), attr::DB);
    assert_eq!(read(&memory, 0x10_0000, 64), payload(64));
    // An older protocol has neither flags nor a preferred address.
    let old = BzImage { version: 0x204, xloadflags: 1, preferred: 0x1234_5678, ..BzImage::default() };
    let entry = try_load(&memory, &layout, &old.image(), None, "").unwrap();
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected, 0x10_0000));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (layout, memory) = guest(64 * MIB);
    let load = |image: &BzImage, initrd: Option<usize>, line: &str| {
        let initrd = initrd.map(|len| Image::from_bytes("initrd", vec![1; len]));
        try_load(&memory, &layout, &image.image(), initrd.as_ref(), line).unwrap_err()
    };
    // 16 MiB + 49 MiB do not fit 64 MiB, 16 + 48 do.
    let exact = BzImage { init_size: 48 << 20, ..BzImage::default() };
    try_load(&memory, &layout, &exact.image(), None, "").unwrap();
    let error = load(&BzImage { init_size: 49 << 20, ..BzImage::default() }, None, "");
    assert!(matches!(error, LoadError::KernelTooLarge { need_mib: 65, have_mib: 64, .. }), "{error}");
    let error = load(&BzImage { init_size: u32::MAX, ..BzImage::default() }, None, "");
    assert!(matches!(error, LoadError::KernelTooLarge { .. }), "{error}");

    // 16 MiB are left above the kernel.
    let free = 16 * MIB as usize;
    let initrd = Image::from_bytes("initrd", vec![1; free]);
    try_load(&memory, &layout, &BzImage::default().image(), Some(&initrd), "").unwrap();
    let error = load(&BzImage::default(), Some(free + 1), "");
    assert!(matches!(error, LoadError::InitrdTooLarge { floor: 0x300_0000, .. }), "{error}");
    let low = BzImage { initrd_max: 0x30f_ffff, ..BzImage::default() };
    let error = load(&low, Some(2 * MIB as usize), "");
    assert!(matches!(error, LoadError::InitrdTooLarge { ceiling: 0x310_0000, .. }), "{error}");
    let error = load(&BzImage::default(), Some(0), "");
    assert!(matches!(error, LoadError::EmptyInitrd { .. }), "{error}");

    try_load(&memory, &layout, &BzImage::default().image(), None, &"x".repeat(2047)).unwrap();
    let error = load(&BzImage::default(), None, &"x".repeat(2048));
    assert!(matches!(error, LoadError::CommandLineTooLong { len: 2048, max: 2047, .. }), "{error}");
    let huge = BzImage { cmdline_size: u32::MAX, ..BzImage::default() };
    let error = load(&huge, None, &"x".repeat(0x1_0000));
    assert!(matches!(error, LoadError::CommandLineTooLong { max: 0xffff, .. }), "{error}");
    let error = load(&BzImage::default(), None, "a\0b");
    assert!(matches!(error, LoadError::CommandLineNul(1)), "{error}");
}

#[test]
fn a_truncated_kernel_is_recognised_at_any_length() {
    let (layout, memory) = guest(64 * MIB);
    let whole = BzImage::default().bytes();
    for len in (0..0x800).chain([whole.len() / 2, whole.len() - 16]) {
        let image = Image::from_bytes("bzImage", whole[..len].to_vec());
        let error = try_load(&memory, &layout, &image, None, "").unwrap_err();
        if len >= 0x206 {
            assert!(matches!(error, LoadError::Truncated { .. }), "{len}: {error}");
        } else {
            assert!(matches!(error, LoadError::UnknownFormat { .. }), "{len}: {error}");
        }
    }
}

#[test]
fn impossible_headers_are_refused() {
    let (layout, memory) = guest(128 * MIB);
    let refused = |image: Vec<u8>| {
        let error = try_load(&memory, &layout, &Image::from_bytes("bzImage", image), None, "").unwrap_err();
        assert!(matches!(error, LoadError::Corrupt { .. }), "{error}");
    };
    refused(BzImage { alignment: 3, ..BzImage::default() }.bytes());
    refused(BzImage { alignment: 0, ..BzImage::default() }.bytes());
    refused(BzImage { preferred: u64::MAX, ..BzImage::default() }.bytes());
    refused(BzImage { preferred: 0, relocatable: false, ..BzImage::default() }.bytes());
    refused(BzImage { version: 0x201, ..BzImage::default() }.bytes());
    refused(BzImage { payload_len: 0x200, ..BzImage::default() }.bytes());
    let mut zimage = BzImage::default().bytes();
    zimage[0x211] = 0;
    refused(zimage);
    let mut no_size = BzImage::default().bytes();
    no_size[0x1f4..0x1f8].fill(0);
    refused(no_size);
}

#[test]
fn other_files_are_named() {
    let found = |bytes: &[u8]| match detect(&Image::from_bytes("k", bytes.to_vec())) {
        Err(LoadError::UnknownFormat { found, .. }) => found,
        other => panic!("{other:?}"),
    };
    assert_eq!(found(b""), "empty");
    assert_eq!(found(b"\x1f\x8b\x08"), "a gzip file");
    assert_eq!(found(b"070701000"), "a cpio archive");
    assert_eq!(found(b"MZ\x90"), "an EFI or DOS program");
    assert_eq!(found(b"hello"), "of no known format");
    let mut iso = vec![0; 0x9000];
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    assert_eq!(found(&iso), "an ISO 9660 image");
    assert_eq!(detect(&BzImage::default().image()).unwrap(), KernelFormat::BzImage);
    assert_eq!(detect(&Elf::default().image()).unwrap(), KernelFormat::Elf);
}

#[test]
fn files_are_opened_with_care() {
    let error = Image::open("/nonexistent/vmlinuz".as_ref()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/vmlinuz"), "{error}");
    let error = Image::open("/".as_ref()).unwrap_err();
    assert!(matches!(error, LoadError::NotAFile { .. }), "{error}");
    let error = Image::open("/dev/null".as_ref()).unwrap_err();
    assert!(matches!(error, LoadError::NotAFile { .. }), "{error}");
    let image = Image::open(std::env::current_exe().unwrap().as_ref()).unwrap();
    assert_eq!(detect(&image).unwrap(), KernelFormat::Elf);
    let error = image.read_exact_at(u64::MAX, &mut [0; 2]).unwrap_err();
    assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
}

/// An ELF image: one note segment, one loaded segment of 0x2000 bytes with 0x1000 of bss.
struct Elf {
    wide: bool,
    entry: u64,
    physical: u64,
    memory_bytes: u64,
    note_alignment: u64,
    note_name: &'static [u8],
}

impl Default for Elf {
    fn default() -> Self {
        Elf {
            wide: true,
            entry: 0x20_0010,
            physical: 0x20_0000,
            memory_bytes: 0x3000,
            note_alignment: 4,
            note_name: b"Xen\0",
        }
    }
}

impl Elf {
    const NOTES_AT: usize = 0x200;
    const TEXT_AT: usize = 0x1000;
    const TEXT_BYTES: usize = 0x2000;

    fn bytes(&self) -> Vec<u8> {
        // A note of another owner comes first; its value has an odd length.
        let mut notes = Vec::new();
        for (name, kind, value) in [
            (&b"Linux\0"[..], 18u32, vec![7u8; 5]),
            (self.note_name, 18, self.entry.to_le_bytes()[..4].to_vec()),
        ] {
            for field in [name.len() as u32, value.len() as u32, kind] {
                notes.extend_from_slice(&field.to_le_bytes());
            }
            notes.extend_from_slice(name);
            notes.resize(notes.len().next_multiple_of(self.note_alignment as usize), 0);
            notes.extend_from_slice(&value);
            notes.resize(notes.len().next_multiple_of(self.note_alignment as usize), 0);
        }
        let (notes_at, text_at) = (Self::NOTES_AT as u64, Self::TEXT_AT as u64);
        let text_bytes = Self::TEXT_BYTES as u64;
        let headers = [
            (4u32, notes_at, 0, notes.len() as u64, notes.len() as u64, self.note_alignment),
            (1, text_at, self.physical, text_bytes, self.memory_bytes, 0x1000),
        ];
        let mut image = b"\x7fELF".to_vec();
        image.extend_from_slice(&[if self.wide { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let machine: u16 = if self.wide { 62 } else { 3 };
        image.extend_from_slice(&2u16.to_le_bytes());
        image.extend_from_slice(&machine.to_le_bytes());
        image.extend_from_slice(&1u32.to_le_bytes());
        if self.wide {
            for field in [0u64, 64, 0] {
                image.extend_from_slice(&field.to_le_bytes());
            }
        } else {
            for field in [0u32, 52, 0] {
                image.extend_from_slice(&field.to_le_bytes());
            }
        }
        image.extend_from_slice(&0u32.to_le_bytes());
        for field in [if self.wide { 64u16 } else { 52 }, if self.wide { 56 } else { 32 }, 2, 0, 0, 0] {
            image.extend_from_slice(&field.to_le_bytes());
        }
        for (kind, offset, physical, file, memory, alignment) in headers {
            image.extend_from_slice(&kind.to_le_bytes());
            if self.wide {
                image.extend_from_slice(&5u32.to_le_bytes());
                for field in [offset, physical + 0xffff_8000_0000_0000, physical, file, memory, alignment] {
                    image.extend_from_slice(&field.to_le_bytes());
                }
            } else {
                for field in [offset, physical, physical, file, memory, 5, alignment] {
                    image.extend_from_slice(&(field as u32).to_le_bytes());
                }
            }
        }
        image.resize(Self::NOTES_AT, 0);
        image.extend(notes);
        image.resize(Self::TEXT_AT, 0);
        image.extend(payload(Self::TEXT_BYTES));
        image
    }
    fn image(&self) -> Image {
        Image::from_bytes("vmlinux", self.bytes())
    }
}

#[test]
fn an_elf_kernel_starts_by_pvh() {
    for (wide, note_alignment) in [(true, 4), (true, 8), (false, 4)] {
        let (layout, memory) = guest(3 * GIB + 16 * MIB);
        vm_memory::Bytes::write_slice(&memory, &[0xee; 0x4000], vm_memory::GuestAddress(0x20_0000)).unwrap();
        let image = Elf { wide, note_alignment, ..Elf::default() }.image();
        let initrd = Image::from_bytes("initrd", payload(3 * MIB as usize));
        let entry = try_load(&memory, &layout, &image, Some(&initrd), "quiet").unwrap();
        assert_eq!((entry.mode, entry.rip), (EntryMode::Protected, 0x20_0010));
        let state = entered(&memory, &entry);
        assert_eq!(state.control.cr0 & (cr0::PE | cr0::PG), cr0::PE);
        assert_eq!((state.segments.tr.attributes & 0xf, state.segments.tr.limit), (0xb, 0x67));

        assert_eq!(read(&memory, 0x20_0000, 0x2000), payload(0x2000));
        assert_eq!(read(&memory, 0x20_2000, 0x1000), [0; 0x1000], "bss is cleared");
        assert_eq!(read(&memory, 0x20_3000, 8), [0xee; 8], "and nothing beyond");

        let info = read(&memory, state.regs.gpr[Gpr::Rbx as usize], 56);
        assert_eq!((u32_at(&info, 0), u32_at(&info, 4), u32_at(&info, 12)), (0x336e_c578, 1, 1));
        let module = read(&memory, u64_at(&info, 16), 32);
        assert_eq!((u64_at(&module, 0), u64_at(&module, 8)), (3 * GIB - 3 * MIB, 3 * MIB));
        assert_eq!(read(&memory, u64_at(&module, 0), 3 * MIB as usize), payload(3 * MIB as usize));
        assert_eq!(read(&memory, u64_at(&info, 24), 6), b"quiet\0");
        assert_eq!(u64_at(&info, 32), 0xf_2400);
        let expected = layout.e820();
        assert_eq!(u32_at(&info, 48) as usize, expected.len());
        for (i, line) in expected.iter().enumerate() {
            let bytes = read(&memory, u64_at(&info, 40) + 24 * i as u64, 24);
            let found = (u64_at(&bytes, 0), u64_at(&bytes, 8), u32_at(&bytes, 16));
            assert_eq!(found, (line.base, line.len, line.kind as u32));
        }
    }
}

#[test]
fn unsuitable_elf_images_are_refused() {
    let (layout, memory) = guest(64 * MIB);
    let load = |bytes: Vec<u8>| {
        try_load(&memory, &layout, &Image::from_bytes("vmlinux", bytes), None, "").unwrap_err()
    };
    let error = load(Elf { note_name: b"Yen\0", ..Elf::default() }.bytes());
    assert!(
        matches!(error, LoadError::UnknownFormat { .. }) && error.to_string().contains("PHYS32"),
        "{error}"
    );
    let error = load(Elf { memory_bytes: 63 * MIB, ..Elf::default() }.bytes());
    assert!(matches!(error, LoadError::KernelTooLarge { need_mib: 65, .. }), "{error}");
    let error = load(Elf { memory_bytes: u64::MAX, ..Elf::default() }.bytes());
    assert!(matches!(error, LoadError::KernelTooLarge { .. }), "{error}");
    for damaged in [
        Elf { entry: 0x20_3000, ..Elf::default() },
        Elf { physical: 0xf_0000, entry: 0xf_0000, ..Elf::default() },
        Elf { physical: 4 * GIB, ..Elf::default() },
        Elf { memory_bytes: 0x1000, ..Elf::default() },
    ] {
        let error = load(damaged.bytes());
        assert!(matches!(error, LoadError::Corrupt { .. }), "{error}");
    }
    let mut arm = Elf::default().bytes();
    arm[18] = 183;
    assert!(matches!(load(arm), LoadError::Corrupt { .. }));
    let mut short = Elf::default().bytes();
    short.truncate(short.len() - 1);
    assert!(matches!(load(short), LoadError::Truncated { .. }));
    // Any other length is an error too, never a panic.
    let whole = Elf::default().bytes();
    for len in (0..0x400).chain([0x1000, 0x2000]) {
        load(whole[..len].to_vec());
    }
}

/// Overwrites bytes at random places.
fn damage(mut bytes: Vec<u8>, edits: &[(usize, u8)], len: usize) -> Vec<u8> {
    for (offset, value) in edits {
        let offset = offset % bytes.len();
        bytes[offset] = *value;
    }
    bytes.truncate(len);
    bytes
}

/// Loads into a small guest whose memory outside of what a kernel may occupy is watched.
fn load_damaged(bytes: Vec<u8>, command_line: &str) {
    let (layout, memory) = guest(40 * MIB);
    let image = Image::from_bytes("k", bytes);
    let initrd = Image::from_bytes("i", vec![0x5a; 100]);
    if let Ok(entry) = try_load(&memory, &layout, &image, Some(&initrd), command_line) {
        assert!((MIB..40 * MIB).contains(&entry.rip));
        entry.apply(&mut VcpuState::reset(0));
    }
    assert_eq!(read(&memory, 0x400, 0x100), [0; 0x100], "the BIOS data area is firmware's");
    assert!(read(&memory, 0xa_0000, 0x6_0000).iter().all(|byte| *byte == 0), "so is what is above the EBDA");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn damaged_bzimages_load_or_fail(
        edits in prop::collection::vec((0x1f0usize..0x270, any::<u8>()), 0..12),
        len in 0usize..0x4_0000,
        whole in any::<bool>(),
    ) {
        let bytes = BzImage { init_size: 1 << 20, ..BzImage::default() }.bytes();
        let len = if whole { bytes.len() } else { len };
        load_damaged(damage(bytes, &edits, len), "quiet");
    }

    #[test]
    fn damaged_elf_images_load_or_fail(
        edits in prop::collection::vec((0usize..0x240, any::<u8>()), 0..12),
        wide in any::<bool>(),
        len in 0usize..0x3000,
        whole in any::<bool>(),
    ) {
        let bytes = Elf { wide, ..Elf::default() }.bytes();
        let len = if whole { bytes.len() } else { len };
        load_damaged(damage(bytes, &edits, len), "quiet");
    }

    #[test]
    fn random_files_fail(bytes in prop::collection::vec(any::<u8>(), 0..2048), line in "\\PC{0,300}") {
        load_damaged(bytes, &line);
    }
}
