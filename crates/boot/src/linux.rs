//! Linux bzImages, by the kernel's `Documentation/arch/x86/boot.rst`: "The Real-Mode Kernel Header", "32-bit boot protocol" and
//! "64-bit boot protocol". The real-mode part is not run; the loader fills in the boot parameters itself.
//!
//! A kernel that has the 64-bit entry point (XLF_KERNEL_64) is entered there, any other at its 32-bit one. Structures come from
//! `linux-loader`; its own loading functions are not used, because they take a short header and a short payload for good.

use engine::GuestMemory;
use linux_loader::loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, KEEP_SEGMENTS, LOADED_HIGH, QUIET_FLAG, XLF_KERNEL_64, boot_e820_entry,
    boot_params, setup_header,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::entry::{EntryMode, EntryState, scratch};
use crate::error::LoadError;
use crate::image::Image;
use crate::layout::HIGH_MEMORY_START;
use crate::loader::{KernelRequest, check_fits, page_up, place_command_line, place_initrd};

/// Where the header starts in the image and in the boot parameters.
const HEADER_OFFSET: u64 = 0x1f1;
/// The jump instruction at 0x200 skips the header: its displacement, counted from here, gives the header's end.
const HEADER_MAGIC_OFFSET: u64 = 0x202;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;
/// Opcode of the short jump at 0x200.
const SHORT_JUMP: u8 = 0xeb;
/// Unit of `setup_sects`.
const SECTOR_BYTES: u64 = 512;
/// What `setup_sects` of zero stands for.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// Unit of `syssize`.
const PARAGRAPH_BYTES: u64 = 16;
/// "Undefined" boot loader (boot.rst, `type_of_loader`).
const LOADER_TYPE_UNDEFINED: u8 = 0xff;
/// The 64-bit entry point's offset in the loaded kernel.
const ENTRY64_OFFSET: u64 = 0x200;

/// Protocol versions that brought the fields used here.
mod version {
    /// `cmd_line_ptr`; the oldest that is supported.
    pub const COMMAND_LINE_POINTER: u16 = 0x0202;
    /// `initrd_addr_max`.
    pub const INITRD_MAX: u16 = 0x0203;
    /// 32-bit `syssize`.
    pub const SYSSIZE32: u16 = 0x0204;
    /// `kernel_alignment`, `relocatable_kernel`.
    pub const RELOCATABLE: u16 = 0x0205;
    /// `cmdline_size`.
    pub const COMMAND_LINE_SIZE: u16 = 0x0206;
    /// `pref_address`, `init_size`.
    pub const INIT_SIZE: u16 = 0x020a;
    /// `xloadflags`.
    pub const XLOADFLAGS: u16 = 0x020c;
}

/// `initrd_addr_max` and `cmdline_size` where the protocol is too old to have them.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;
const OLD_COMMAND_LINE_SIZE: u32 = 255;

/// A header that has been checked.
struct Kernel {
    header: setup_header,
    /// Where in the file the protected-mode kernel starts.
    payload_offset: u64,
    /// Its length in bytes.
    payload_len: u64,
}

impl Kernel {
    fn version(&self) -> u16 {
        self.header.version
    }

    fn is_64_bit(&self) -> bool {
        self.version() >= version::XLOADFLAGS && self.header.xloadflags & XLF_KERNEL_64 != 0
    }

    /// Highest address, exclusive, that the initial RAM disk may occupy.
    fn initrd_ceiling(&self) -> u64 {
        let max =
            if self.version() >= version::INITRD_MAX { self.header.initrd_addr_max } else { OLD_INITRD_MAX };
        u64::from(max) + 1
    }

    fn command_line_max(&self) -> usize {
        let max = if self.version() >= version::COMMAND_LINE_SIZE {
            self.header.cmdline_size
        } else {
            OLD_COMMAND_LINE_SIZE
        };
        max as usize
    }

    /// Where to load the kernel, and how many bytes from there it uses before it has read the memory map.
    fn placement(&self, name: &str) -> Result<(u64, u64), LoadError> {
        let corrupt = |what: String| LoadError::Corrupt { name: name.to_owned(), what };
        let has_init_size = self.version() >= version::INIT_SIZE;
        let preferred = if has_init_size { self.header.pref_address } else { HIGH_MEMORY_START };
        let relocatable = self.version() >= version::RELOCATABLE && self.header.relocatable_kernel != 0;
        let address = if relocatable {
            let alignment = u64::from(self.header.kernel_alignment);
            if !alignment.is_power_of_two() {
                return Err(corrupt(format!("kernel_alignment {alignment:#x} is not a power of two")));
            }
            preferred.max(HIGH_MEMORY_START).checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
        } else {
            preferred
        };
        if !(HIGH_MEMORY_START..=u64::from(u32::MAX)).contains(&address) {
            return Err(corrupt(format!(
                "it asks to be loaded at {preferred:#x}, outside of 1 MiB to 4 GiB"
            )));
        }
        let init_size = if has_init_size { u64::from(self.header.init_size) } else { 0 };
        Ok((address, init_size.max(self.payload_len)))
    }
}

/// Reads and checks the header.
fn parse(image: &Image) -> Result<Kernel, LoadError> {
    let corrupt = |what: String| LoadError::Corrupt { name: image.name().to_owned(), what };

    let mut jump = [0u8; 2];
    image.read_exact_at(HEADER_MAGIC_OFFSET - 2, &mut jump)?;
    if jump[0] != SHORT_JUMP {
        return Err(corrupt(format!("no jump over the header at 0x200 ({:#04x})", jump[0])));
    }
    let header_end = HEADER_MAGIC_OFFSET + u64::from(jump[1]);
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let present = ((header_end - HEADER_OFFSET) as usize).min(bytes.len());
    image.read_exact_at(HEADER_OFFSET, &mut bytes[..present])?;

    if header.header != HEADER_MAGIC || header.boot_flag != BOOT_FLAG {
        return Err(corrupt("the setup header has no signature".into()));
    }
    let protocol = header.version;
    if protocol < version::COMMAND_LINE_POINTER || header.loadflags & LOADED_HIGH == 0 {
        return Err(corrupt(format!(
            "boot protocol {}.{:02} and a low-loaded (zImage) kernel are not supported; 2.02 and bzImage is the least",
            protocol >> 8,
            protocol & 0xff
        )));
    }

    let sectors = if header.setup_sects == 0 { DEFAULT_SETUP_SECTORS } else { header.setup_sects };
    let payload_offset = (u64::from(sectors) + 1) * SECTOR_BYTES;
    if header_end > payload_offset {
        return Err(corrupt("the setup header is longer than the setup code".into()));
    }
    let paragraphs = if protocol >= version::SYSSIZE32 { header.syssize } else { header.syssize & 0xffff };
    let declared = u64::from(paragraphs) * PARAGRAPH_BYTES;
    if declared == 0 {
        return Err(corrupt("the header declares a kernel of no size".into()));
    }
    // The size is rounded up to paragraphs, the file need not be.
    let need = payload_offset + declared - (PARAGRAPH_BYTES - 1);
    if image.len() < need {
        return Err(LoadError::Truncated { name: image.name().to_owned(), have: image.len(), need });
    }
    let payload_len = declared.min(image.len() - payload_offset);
    if payload_len <= ENTRY64_OFFSET {
        return Err(corrupt(format!("the kernel proper has only {payload_len} bytes")));
    }
    Ok(Kernel { header, payload_offset, payload_len })
}

/// Loads a bzImage with its boot parameters.
///
/// # Errors
/// The image is damaged or does not fit, or the command line or initial RAM disk do not.
pub fn load(memory: &GuestMemory, request: &KernelRequest<'_>) -> Result<EntryState, LoadError> {
    let kernel = parse(request.kernel)?;
    let (address, needed) = kernel.placement(request.kernel.name())?;
    let end = address.saturating_add(needed);
    check_fits(request, end)?;

    let command_line = place_command_line(memory, request, kernel.command_line_max())?;
    request.kernel.copy_to_guest(kernel.payload_offset, kernel.payload_len, memory, address)?;
    let initrd = place_initrd(memory, request, page_up(end), kernel.initrd_ceiling())?;

    let mut parameters = boot_params { hdr: kernel.header, ..Default::default() };
    parameters.acpi_rsdp_addr = request.rsdp.unwrap_or(0);
    let header = &mut parameters.hdr;
    header.type_of_loader = LOADER_TYPE_UNDEFINED;
    header.loadflags &= !(KEEP_SEGMENTS | QUIET_FLAG);
    // Low RAM ends at 3 GiB, so every address here fits 32 bits; the ext_* fields stay zero.
    header.code32_start = address as u32;
    header.cmd_line_ptr = command_line as u32;
    header.setup_data = 0;
    if let Some((start, len)) = initrd {
        header.ramdisk_image = start as u32;
        header.ramdisk_size = len as u32;
    }
    let map = request.layout.e820();
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: entry.base, size: entry.len, r#type: entry.kind as u32 };
    }
    parameters.e820_table = table;
    parameters.e820_entries = map.len().min(E820_MAX_ENTRIES_ZEROPAGE) as u8;
    memory.write_slice(parameters.as_slice(), GuestAddress(scratch::BOOT_PARAMETERS))?;

    let (mode, rip) = if kernel.is_64_bit() {
        (EntryMode::Long, address + ENTRY64_OFFSET)
    } else {
        (EntryMode::Protected, address)
    };
    Ok(EntryState { mode, rip, rsp: scratch::STACK_TOP, rbx: 0, rsi: scratch::BOOT_PARAMETERS })
}
