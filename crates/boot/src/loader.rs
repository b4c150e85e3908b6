//! What every kernel format shares: telling formats apart, the command line, where the initial RAM disk goes.

use engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use crate::entry::{EntryState, scratch};
use crate::error::LoadError;
use crate::image::Image;
use crate::layout::MemoryLayout;
use crate::{linux, pvh};

/// What to load and where it may go.
#[derive(Clone, Copy, Debug)]
pub struct KernelRequest<'a> {
    /// The kernel.
    pub kernel: &'a Image,
    /// Initial RAM disk, if any.
    pub initrd: Option<&'a Image>,
    /// Kernel command line, without a NUL.
    pub command_line: &'a str,
    /// Where RAM is; guest memory must hold at least these ranges.
    pub layout: &'a MemoryLayout,
    /// Address of the ACPI RSDP, if there are ACPI tables.
    pub rsdp: Option<u64>,
}

/// Formats that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// Linux x86 boot protocol.
    BzImage,
    /// ELF, to be entered by PVH.
    Elf,
}

/// How much of a file [`detect`] looks at: up to the volume descriptor of an ISO image.
const HEAD_BYTES: usize = 0x8800;

/// Tells what kind of kernel a file is by its contents.
///
/// # Errors
/// The file cannot be read, is empty, or is something else; the message says what it looks like.
pub fn detect(image: &Image) -> Result<KernelFormat, LoadError> {
    let head = image.head(HEAD_BYTES)?;
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    if at(0x202, b"HdrS") && at(0x1fe, &[0x55, 0xaa]) {
        return Ok(KernelFormat::BzImage);
    }
    if at(0, b"\x7fELF") {
        return Ok(KernelFormat::Elf);
    }
    const COMPRESSED: &str = "; decompress it first";
    const DISK: &str = "; attach it as a disk and boot from that";
    const INITRD: &str = "; it may be meant as the initial RAM disk (--initrd)";
    let (found, hint) = if head.is_empty() {
        ("empty", "")
    } else if at(0x38, b"ARM\x64") {
        ("a Linux kernel for 64-bit ARM", "")
    } else if at(0x30, b"RISCV") || at(0x38, b"RSC\x05") {
        ("a Linux kernel for RISC-V", "")
    } else if at(0, b"MZ") {
        ("an EFI or DOS program", "; EFI programs are started by a boot ROM (-l bootrom)")
    } else if at(0, &[0x1f, 0x8b]) {
        ("a gzip file", COMPRESSED)
    } else if at(0, b"\xfd7zXZ\0") {
        ("an xz file", COMPRESSED)
    } else if at(0, &[0x28, 0xb5, 0x2f, 0xfd]) {
        ("a zstd file", COMPRESSED)
    } else if at(0, b"BZh") {
        ("a bzip2 file", COMPRESSED)
    } else if at(0, &[0x04, 0x22, 0x4d, 0x18]) || at(0, &[0x02, 0x21, 0x4c, 0x18]) {
        ("an lz4 file", COMPRESSED)
    } else if at(0, b"070701") || at(0, b"070702") {
        ("a cpio archive", INITRD)
    } else if at(0, b"QFI\xfb") {
        ("a qcow2 disk image", DISK)
    } else if at(0x8001, b"CD001") {
        ("an ISO 9660 image", DISK)
    } else if at(0, b"!<arch>\n") {
        ("a Debian package or archive", "; the kernel is inside, as boot/vmlinuz-*")
    } else if at(0, &[0x27, 0x05, 0x19, 0x56]) {
        ("a U-Boot image", "")
    } else if at(0, b"#!") {
        ("a script", "")
    } else if at(0x1fe, &[0x55, 0xaa]) {
        ("a boot sector or disk image", DISK)
    } else {
        ("of no known format", "")
    };
    Err(LoadError::UnknownFormat { name: image.name().to_owned(), found, hint })
}

/// Loads a kernel of any known format.
///
/// # Errors
/// See [`LoadError`]. Guest memory may have been written to.
pub fn load(memory: &GuestMemory, request: &KernelRequest<'_>) -> Result<EntryState, LoadError> {
    let entry = match detect(request.kernel)? {
        KernelFormat::BzImage => linux::load(memory, request)?,
        KernelFormat::Elf => pvh::load(memory, request)?,
    };
    entry.write_tables(memory)?;
    Ok(entry)
}

/// Writes the command line, with its NUL, to its place; `kernel_max` is what the kernel reads, NUL not counted.
pub(crate) fn place_command_line(
    memory: &GuestMemory,
    request: &KernelRequest<'_>,
    kernel_max: usize,
) -> Result<u64, LoadError> {
    let line = request.command_line.as_bytes();
    let max = kernel_max.min(scratch::COMMAND_LINE_BYTES - 1);
    if line.len() > max {
        let name = request.kernel.name().to_owned();
        return Err(LoadError::CommandLineTooLong { name, len: line.len(), max });
    }
    if let Some(position) = line.iter().position(|byte| *byte == 0) {
        return Err(LoadError::CommandLineNul(position));
    }
    memory.write_slice(line, GuestAddress(scratch::COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(scratch::COMMAND_LINE + line.len() as u64))?;
    Ok(scratch::COMMAND_LINE)
}

/// Copies the initial RAM disk to the highest pages that end at or below `ceiling` and low RAM's end, and start at or above
/// `floor`. Returns address and length.
pub(crate) fn place_initrd(
    memory: &GuestMemory,
    request: &KernelRequest<'_>,
    floor: u64,
    ceiling: u64,
) -> Result<Option<(u64, u64)>, LoadError> {
    let Some(initrd) = request.initrd else { return Ok(None) };
    let name = || initrd.name().to_owned();
    let len = initrd.len();
    if len == 0 {
        return Err(LoadError::EmptyInitrd { name: name() });
    }
    let ceiling = ceiling.min(request.layout.low_bytes());
    let start = ceiling.checked_sub(len).map(|start| start & !PAGE_MASK).filter(|start| *start >= floor);
    let Some(start) = start else {
        return Err(LoadError::InitrdTooLarge { name: name(), len, floor, ceiling });
    };
    initrd.copy_to_guest(0, len, memory, start)?;
    Ok(Some((start, len)))
}

/// The kernel's memory up to `end` must be low RAM.
pub(crate) fn check_fits(request: &KernelRequest<'_>, end: u64) -> Result<(), LoadError> {
    const MIB: u64 = 1 << 20;
    let low = request.layout.low_bytes();
    if end > low {
        return Err(LoadError::KernelTooLarge {
            name: request.kernel.name().to_owned(),
            need_mib: end.div_ceil(MIB),
            have_mib: low / MIB,
        });
    }
    Ok(())
}

/// First page boundary at or above `address`, saturating.
pub(crate) fn page_up(address: u64) -> u64 {
    address.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX)
}
