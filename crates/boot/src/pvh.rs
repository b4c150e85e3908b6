//! ELF kernels, entered by PVH: 32-bit protected mode at the address in the `XEN_ELFNOTE_PHYS32_ENTRY` note, EBX at a start-info
//! structure (Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`). 32-bit and 64-bit images load alike:
//! each PT_LOAD segment goes to its physical address (System V ABI, "Program Header").

use std::mem::size_of;

use engine::GuestMemory;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use crate::entry::{EntryMode, EntryState, scratch};
use crate::error::LoadError;
use crate::image::Image;
use crate::layout::{HIGH_MEMORY_START, HIGHMEM_BASE};
use crate::loader::{KernelRequest, check_fits, page_up, place_command_line, place_initrd};

/// "xEn3" with bit 31 set (start_info.h).
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const START_INFO_VERSION: u32 = 1;

/// ELF constants (System V ABI, "ELF Header", "Program Header", "Note Section").
mod elf {
    pub const CLASS32: u8 = 1;
    pub const CLASS64: u8 = 2;
    pub const LITTLE_ENDIAN: u8 = 1;
    pub const MACHINE_386: u16 = 3;
    pub const MACHINE_X86_64: u16 = 62;
    pub const TYPE_RELOCATABLE: u16 = 1;
    pub const SEGMENT_LOAD: u32 = 1;
    pub const SEGMENT_NOTE: u32 = 4;
    pub const NOTE_HEADER_BYTES: usize = 12;
    /// Xen's note with the 32-bit physical entry point.
    pub const NOTE_PHYS32_ENTRY: u32 = 18;
    pub const NOTE_OWNER: &[u8] = b"Xen\0";
}

/// More program headers than any kernel has.
const MAX_SEGMENTS: usize = 128;
/// More notes than any kernel has.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// Little-endian fields of a byte slice; zero beyond its end, which callers exclude by sizing the slice.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(source) = self.0.get(offset..offset + N) {
            bytes.copy_from_slice(source);
        }
        bytes
    }
    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }
    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }
    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

/// One program header, of either class.
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    physical: u64,
    file_bytes: u64,
    memory_bytes: u64,
    alignment: u64,
}

/// Reads and checks the ELF header, and reads the program headers.
fn segments(image: &Image) -> Result<Vec<Segment>, LoadError> {
    let corrupt = |what: String| LoadError::Corrupt { name: image.name().to_owned(), what };
    let mut ident = [0u8; 16];
    image.read_exact_at(0, &mut ident)?;
    let wide = match ident[4] {
        elf::CLASS32 => false,
        elf::CLASS64 => true,
        class => return Err(corrupt(format!("unknown ELF class {class}"))),
    };
    if ident[5] != elf::LITTLE_ENDIAN {
        return Err(corrupt("a big-endian ELF image is for another machine".into()));
    }
    let mut bytes = [0u8; 64];
    let header_bytes = if wide { 64 } else { 52 };
    image.read_exact_at(0, &mut bytes[..header_bytes])?;
    let header = Fields(&bytes);
    let machine = header.u16(18);
    if machine != elf::MACHINE_386 && machine != elf::MACHINE_X86_64 {
        return Err(corrupt(format!("the ELF image is for machine type {machine}, not x86")));
    }
    if header.u16(16) == elf::TYPE_RELOCATABLE {
        return Err(corrupt("an ELF object file or kernel module cannot be started".into()));
    }
    let (table, entry_bytes, count) = if wide {
        (header.u64(32), header.u16(54), header.u16(56))
    } else {
        (u64::from(header.u32(28)), header.u16(42), header.u16(44))
    };
    let expected = if wide { 56 } else { 32 };
    if entry_bytes != expected {
        return Err(corrupt(format!("program headers of {entry_bytes} bytes where {expected} are expected")));
    }
    let count = usize::from(count);
    if count == 0 || count > MAX_SEGMENTS {
        return Err(corrupt(format!("{count} program headers; 1 to {MAX_SEGMENTS} are accepted")));
    }
    let mut bytes = vec![0; count * usize::from(entry_bytes)];
    image.read_exact_at(table, &mut bytes)?;
    let segment = |bytes: &[u8]| {
        let f = Fields(bytes);
        if wide {
            Segment {
                kind: f.u32(0),
                offset: f.u64(8),
                physical: f.u64(24),
                file_bytes: f.u64(32),
                memory_bytes: f.u64(40),
                alignment: f.u64(48),
            }
        } else {
            Segment {
                kind: f.u32(0),
                offset: f.u32(4).into(),
                physical: f.u32(12).into(),
                file_bytes: f.u32(16).into(),
                memory_bytes: f.u32(20).into(),
                alignment: f.u32(28).into(),
            }
        }
    };
    Ok(bytes.chunks_exact(usize::from(entry_bytes)).map(segment).collect())
}

/// Finds the PVH entry point in the notes of one segment.
fn entry_in_notes(image: &Image, segment: &Segment) -> Result<Option<u64>, LoadError> {
    let corrupt = |what: &str| LoadError::Corrupt { name: image.name().to_owned(), what: what.to_owned() };
    if segment.file_bytes > MAX_NOTE_BYTES {
        return Err(corrupt("the note segment is larger than 1 MiB"));
    }
    let mut bytes = vec![0; segment.file_bytes as usize];
    image.read_exact_at(segment.offset, &mut bytes)?;
    // Names and descriptors are padded to the segment's alignment, which is 4 unless it says 8 (System V ABI, x86-64 supplement).
    let alignment = if segment.alignment == 8 { 8 } else { 4 };
    let mut rest = &bytes[..];
    while rest.len() >= elf::NOTE_HEADER_BYTES {
        let header = Fields(rest);
        let (name_len, value_len, kind) = (header.u32(0) as usize, header.u32(4) as usize, header.u32(8));
        // At most 2^32 each, so the sums fit a 64-bit usize.
        let value_at = (elf::NOTE_HEADER_BYTES + name_len).next_multiple_of(alignment);
        let next = (value_at + value_len).next_multiple_of(alignment);
        let name = rest.get(elf::NOTE_HEADER_BYTES..elf::NOTE_HEADER_BYTES + name_len);
        let value = rest.get(value_at..value_at + value_len);
        let (Some(name), Some(value)) = (name, value) else {
            return Err(corrupt("a note reaches beyond its segment"));
        };
        if kind == elf::NOTE_PHYS32_ENTRY && name == elf::NOTE_OWNER {
            return match value_len {
                4 => Ok(Some(Fields(value).u32(0).into())),
                8 => Ok(Some(Fields(value).u64(0))),
                _ => Err(corrupt("the PVH entry note holds neither a 32-bit nor a 64-bit address")),
            };
        }
        rest = rest.get(next..).unwrap_or(&[]);
    }
    Ok(None)
}

/// Loads an ELF kernel with its start info.
///
/// # Errors
/// The image is damaged, has no PVH entry point or does not fit, or the command line or initial RAM disk do not.
pub fn load(memory: &GuestMemory, request: &KernelRequest<'_>) -> Result<EntryState, LoadError> {
    let image = request.kernel;
    let corrupt = |what: String| LoadError::Corrupt { name: image.name().to_owned(), what };
    let segments = segments(image)?;

    let mut entry = None;
    for segment in segments.iter().filter(|s| s.kind == elf::SEGMENT_NOTE) {
        entry = entry_in_notes(image, segment)?;
        if entry.is_some() {
            break;
        }
    }
    let entry = entry.ok_or_else(|| LoadError::UnknownFormat {
        name: image.name().to_owned(),
        found: "an ELF image without one (no XEN_ELFNOTE_PHYS32_ENTRY note)",
        hint: "; for Linux use the bzImage or a kernel built with CONFIG_PVH",
    })?;

    // All checks come before the first write.
    let loads: Vec<&Segment> =
        segments.iter().filter(|s| s.kind == elf::SEGMENT_LOAD && s.memory_bytes > 0).collect();
    let mut end = 0;
    let mut entry_is_loaded = false;
    for segment in &loads {
        if segment.file_bytes > segment.memory_bytes {
            return Err(corrupt("a segment is longer in the file than in memory".into()));
        }
        let segment_end = segment.physical.saturating_add(segment.memory_bytes);
        if segment.physical < HIGH_MEMORY_START || segment.physical >= HIGHMEM_BASE {
            return Err(corrupt(format!(
                "a segment is to be loaded at {:#x}, outside of 1 MiB to 4 GiB",
                segment.physical
            )));
        }
        check_fits(request, segment_end)?;
        let file_end = segment.offset.saturating_add(segment.file_bytes);
        if file_end > image.len() {
            return Err(LoadError::Truncated {
                name: image.name().to_owned(),
                have: image.len(),
                need: file_end,
            });
        }
        entry_is_loaded |= (segment.physical..segment_end).contains(&entry);
        end = end.max(segment_end);
    }
    if !entry_is_loaded {
        return Err(corrupt(format!("the entry point {entry:#x} is in no loaded segment")));
    }

    for segment in &loads {
        image.copy_to_guest(segment.offset, segment.file_bytes, memory, segment.physical)?;
        zero(memory, segment.physical + segment.file_bytes, segment.memory_bytes - segment.file_bytes)?;
    }
    let command_line = place_command_line(memory, request, scratch::COMMAND_LINE_BYTES - 1)?;
    let initrd = place_initrd(memory, request, page_up(end), HIGHMEM_BASE)?;

    // Start info, then the module list, then the memory map: 56 + 32 + 24 a line, all in one page.
    let info_at = scratch::BOOT_PARAMETERS;
    let modules_at = info_at + size_of::<hvm_start_info>() as u64;
    let map_at = modules_at + size_of::<hvm_modlist_entry>() as u64;
    let map = request.layout.e820();
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        memory.write_obj(module, GuestAddress(modules_at))?;
    }
    for (i, line) in map.iter().enumerate() {
        let line =
            hvm_memmap_table_entry { addr: line.base, size: line.len, type_: line.kind as u32, reserved: 0 };
        let at = map_at + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(line, GuestAddress(at))?;
    }
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { modules_at } else { 0 },
        cmdline_paddr: command_line,
        rsdp_paddr: request.rsdp.unwrap_or(0),
        memmap_paddr: map_at,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(info_at))?;

    Ok(EntryState { mode: EntryMode::Protected, rip: entry, rsp: scratch::STACK_TOP, rbx: info_at, rsi: 0 })
}

/// Clears guest memory, in pieces.
fn zero(memory: &GuestMemory, mut gpa: u64, len: u64) -> Result<(), LoadError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let end = gpa.saturating_add(len);
    while gpa < end {
        let chunk = (end - gpa).min(ZEROS.len() as u64);
        memory.write_slice(&ZEROS[..chunk as usize], GuestAddress(gpa))?;
        gpa += chunk;
    }
    Ok(())
}
