//! SMBIOS tables (DMTF DSP0134 3.6): what `dmidecode` shows. Structures of types 0 to 4, 16, 17, 19, 32 and 127, behind a 2.x
//! (32-bit) and a 3.x (64-bit) entry point.

use crate::layout::HIGHMEM_BASE;
use crate::platform::Platform;
use crate::tables::{TablesError, checksum};

/// Both entry points: the 2.x one at 0, the 3.x one at [`ENTRY_POINT3_OFFSET`].
pub(crate) const ENTRY_POINTS_BYTES: u64 = 0x40;
const ENTRY_POINT3_OFFSET: usize = 0x20;
/// The version that both announce.
const VERSION: (u8, u8) = (3, 6);

/// Structure types (DSP0134 §7).
mod kind {
    pub const BIOS: u8 = 0;
    pub const SYSTEM: u8 = 1;
    pub const BASEBOARD: u8 = 2;
    pub const CHASSIS: u8 = 3;
    pub const PROCESSOR: u8 = 4;
    pub const MEMORY_ARRAY: u8 = 16;
    pub const MEMORY_DEVICE: u8 = 17;
    pub const MEMORY_ARRAY_ADDRESS: u8 = 19;
    pub const BOOT: u8 = 32;
    pub const END: u8 = 127;
}

/// A handle that refers to nothing.
const NO_HANDLE: u16 = 0xffff;
/// "There is no such thing" for memory error handles.
const NO_ERROR_HANDLE: u16 = 0xfffe;
/// BIOS characteristics (§7.1.1): PCI, boot from CD, selectable boot.
const BIOS_CHARACTERISTICS: u64 = 1 << 7 | 1 << 15 | 1 << 16;
/// Extension bytes (§7.1.2): ACPI; virtual machine.
const BIOS_EXTENSION: [u8; 2] = [1 << 0, 1 << 4];

/// Finished structures.
#[derive(Debug)]
pub(crate) struct Structures {
    bytes: Vec<u8>,
    count: u16,
    longest: u16,
}

impl Structures {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Both entry points for structures at `table` (§5.2.1, §5.2.2).
    pub(crate) fn entry_points(&self, table: u32) -> [u8; ENTRY_POINTS_BYTES as usize] {
        const LENGTH2: usize = 0x1f;
        const LENGTH3: usize = 0x18;
        let len = self.bytes.len() as u16;
        let mut bytes = [0; ENTRY_POINTS_BYTES as usize];

        let entry = &mut bytes[..LENGTH2];
        entry[0x00..0x04].copy_from_slice(b"_SM_");
        entry[0x05] = LENGTH2 as u8;
        (entry[0x06], entry[0x07]) = VERSION;
        entry[0x08..0x0a].copy_from_slice(&self.longest.to_le_bytes());
        entry[0x10..0x15].copy_from_slice(b"_DMI_");
        entry[0x16..0x18].copy_from_slice(&len.to_le_bytes());
        entry[0x18..0x1c].copy_from_slice(&table.to_le_bytes());
        entry[0x1c..0x1e].copy_from_slice(&self.count.to_le_bytes());
        entry[0x1e] = VERSION.0 << 4 | VERSION.1;
        entry[0x15] = checksum(&entry[0x10..]);
        entry[0x04] = checksum(entry);

        let entry = &mut bytes[ENTRY_POINT3_OFFSET..ENTRY_POINT3_OFFSET + LENGTH3];
        entry[0x00..0x05].copy_from_slice(b"_SM3_");
        entry[0x06] = LENGTH3 as u8;
        (entry[0x07], entry[0x08]) = VERSION;
        entry[0x0a] = 1; // entry point revision
        entry[0x0c..0x10].copy_from_slice(&u32::from(len).to_le_bytes());
        entry[0x10..0x18].copy_from_slice(&u64::from(table).to_le_bytes());
        entry[0x05] = checksum(entry);
        bytes
    }
}

/// One structure while it is being written: fixed fields, then its strings.
struct Structure {
    fields: Vec<u8>,
    strings: Vec<u8>,
    string_count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let [low, high] = handle.to_le_bytes();
        Structure { fields: vec![kind, 0, low, high], strings: Vec::new(), string_count: 0 }
    }
    fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }
    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.fields.extend_from_slice(bytes);
        self
    }
    /// A string field: the number of a string in the set behind the fields, 0 for none (§6.1.3).
    fn text(&mut self, text: &str) -> &mut Self {
        if text.is_empty() {
            return self.u8(0);
        }
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        self.string_count += 1;
        self.u8(self.string_count)
    }
}

/// The table while it is being written.
struct Builder {
    structures: Structures,
    next_handle: u16,
}

impl Builder {
    /// Adds a structure that `fill` completes; returns its handle.
    fn add(&mut self, kind: u8, fill: impl FnOnce(&mut Structure)) -> Result<u16, TablesError> {
        let handle = self.next_handle;
        let mut structure = Structure::new(kind, handle);
        fill(&mut structure);
        let Structure { mut fields, mut strings, .. } = structure;
        fields[1] = fields.len() as u8;
        strings.extend_from_slice(if strings.is_empty() { &[0, 0] } else { &[0] });

        let len = u16::try_from(fields.len() + strings.len()).map_err(|_| TablesError::SmbiosTooLong)?;
        let table = &mut self.structures;
        table.bytes.extend_from_slice(&fields);
        table.bytes.extend_from_slice(&strings);
        if table.bytes.len() > usize::from(u16::MAX) {
            return Err(TablesError::SmbiosTooLong);
        }
        table.count += 1;
        table.longest = table.longest.max(len);
        self.next_handle += 1;
        Ok(handle)
    }
}

/// Refuses text that would end a string set early.
fn check_strings(platform: &Platform) -> Result<(), TablesError> {
    let mut strings = platform.smbios.clone();
    for variable in crate::platform::SmbiosStrings::VARIABLES {
        if strings.variable(variable).is_some_and(|text| text.contains('\0')) {
            return Err(TablesError::SmbiosText { variable });
        }
    }
    Ok(())
}

/// Makes every structure.
pub(crate) fn structures(platform: &Platform) -> Result<Structures, TablesError> {
    check_strings(platform)?;
    let text = &platform.smbios;
    let mut table =
        Builder { structures: Structures { bytes: Vec::new(), count: 0, longest: 0 }, next_handle: 1 };

    table.add(kind::BIOS, |s| {
        s.text(&text.bios_vendor).text(&text.bios_version);
        s.u16(0xf000); // its segment
        s.text(&text.bios_release_date);
        s.u8(0); // 64 KiB
        s.u64(BIOS_CHARACTERISTICS).bytes(&BIOS_EXTENSION);
        s.bytes(&[0, 0, 0xff, 0xff]); // release unknown, no embedded controller
        s.u16(0); // extended size, unused
    })?;
    table.add(kind::SYSTEM, |s| {
        const WAKE_POWER_SWITCH: u8 = 6;
        s.text(&text.system_manufacturer).text(&text.system_product_name).text(&text.system_version);
        s.text(&text.system_serial_number);
        s.bytes(&mixed_endian(platform.uuid)).u8(WAKE_POWER_SWITCH);
        s.text(&text.system_sku).text(&text.system_family_name);
    })?;
    let chassis = table.next_handle + 1;
    table.add(kind::BASEBOARD, |s| {
        const HOSTING_BOARD: u8 = 1;
        const MOTHERBOARD: u8 = 0xa;
        s.text(&text.board_manufacturer).text(&text.board_product_name).text(&text.board_version);
        s.text(&text.board_serial_number).text(&text.board_asset_tag);
        s.u8(HOSTING_BOARD).text(&text.board_location).u16(chassis).u8(MOTHERBOARD).u8(0);
    })?;
    table.add(kind::CHASSIS, |s| {
        const UNKNOWN: u8 = 2;
        const SAFE: u8 = 3;
        const SECURITY_NONE: u8 = 3;
        s.text(&text.chassis_manufacturer).u8(UNKNOWN).text(&text.chassis_version);
        s.text(&text.chassis_serial_number).text(&text.chassis_asset_tag);
        s.bytes(&[SAFE, SAFE, SAFE, SECURITY_NONE]).u32(0);
        s.bytes(&[0, 0, 0, 0]).text(&text.chassis_sku);
    })?;
    for socket in 0..platform.topology.sockets {
        processor(&mut table, platform, socket)?;
    }
    memory(&mut table, platform)?;
    table.add(kind::BOOT, |s| {
        s.bytes(&[0; 6]).u8(0); // no errors detected
    })?;
    table.add(kind::END, |_| {})?;
    Ok(table.structures)
}

/// Processor information (§7.5).
fn processor(table: &mut Builder, platform: &Platform, socket: u32) -> Result<(), TablesError> {
    const CENTRAL: u8 = 3;
    const FAMILY_OTHER: u8 = 1;
    const POPULATED_ENABLED: u8 = 0x41;
    const UPGRADE_NONE: u8 = 6;
    /// 64-bit capable, and one bit each for more than one core and more than one thread.
    const CAPABLE_64_BIT: u16 = 1 << 2;
    const MULTI_CORE: u16 = 1 << 3;
    const MULTI_THREAD: u16 = 1 << 4;
    let cores = platform.topology.cores;
    let threads = cores.saturating_mul(platform.topology.threads);
    // The byte says 255 where the word has to be read.
    let short = |count: u32| u8::try_from(count).unwrap_or(0xff);
    let long = |count: u32| u16::try_from(count).unwrap_or(0xffff);
    let mut characteristics = CAPABLE_64_BIT;
    if cores > 1 {
        characteristics |= MULTI_CORE;
    }
    if platform.topology.threads > 1 {
        characteristics |= MULTI_THREAD;
    }
    let identity = u64::from(platform.processor.features) << 32 | u64::from(platform.processor.signature);
    let clean = |text: &str| text.replace('\0', "").trim().to_owned();
    table.add(kind::PROCESSOR, |s| {
        s.text(&format!("CPU #{socket}")).u8(CENTRAL).u8(FAMILY_OTHER);
        s.text(&clean(&platform.processor.vendor)).u64(identity).text(&clean(&platform.processor.brand));
        s.u8(0).u16(0).u16(0).u16(0); // voltage and speeds unknown
        s.u8(POPULATED_ENABLED).u8(UPGRADE_NONE);
        s.u16(NO_HANDLE).u16(NO_HANDLE).u16(NO_HANDLE);
        s.text("None").text("None").text("None");
        s.u8(short(cores)).u8(short(cores)).u8(short(threads));
        s.u16(characteristics).u16(u16::from(FAMILY_OTHER));
        s.u16(long(cores)).u16(long(cores)).u16(long(threads));
    })?;
    Ok(())
}

/// Memory array, its one device, and the addresses it is mapped at (§7.17, §7.18, §7.20).
fn memory(table: &mut Builder, platform: &Platform) -> Result<(), TablesError> {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_ECC: u8 = 3;
    const UNKNOWN: u8 = 2;
    const DETAIL_UNKNOWN: u16 = 1 << 2;
    /// Sizes in MiB from here on are in the extended field; a set top bit means KiB.
    const SIZE_EXTENDED: u16 = 0x7fff;
    const SIZE_IN_KIB: u16 = 1 << 15;
    const ARRAY_EXTENDED: u32 = 0x8000_0000;

    let total = platform.layout.total_bytes();
    let array = table.add(kind::MEMORY_ARRAY, |s| {
        s.bytes(&[SYSTEM_BOARD, SYSTEM_MEMORY, NO_ECC]).u32(ARRAY_EXTENDED);
        s.u16(NO_ERROR_HANDLE).u16(1).u64(total);
    })?;
    let (kib, mib) = (total >> 10, total >> 20);
    let (size, extended) = if !total.is_multiple_of(1 << 20) && kib < u64::from(SIZE_EXTENDED) {
        (kib as u16 | SIZE_IN_KIB, 0)
    } else if mib < u64::from(SIZE_EXTENDED) {
        (mib as u16, 0)
    } else {
        (SIZE_EXTENDED, mib.min(0x7fff_ffff) as u32)
    };
    table.add(kind::MEMORY_DEVICE, |s| {
        s.u16(array).u16(NO_ERROR_HANDLE).u16(64).u16(64).u16(size);
        s.u8(UNKNOWN).u8(0).text("DIMM 0").text("");
        s.u8(UNKNOWN).u16(DETAIL_UNKNOWN).u16(0);
        s.text("").text("None").text("None").text("None");
        s.u8(0).u32(extended).u16(0);
        s.u16(0).u16(0).u16(0); // voltages unknown
    })?;
    for range in platform.layout.ram_ranges() {
        debug_assert!(range.start == 0 || range.start == HIGHMEM_BASE);
        table.add(kind::MEMORY_ARRAY_ADDRESS, |s| {
            // The KiB fields give way to the byte fields; the end is the last byte.
            s.u32(u32::MAX).u32(u32::MAX).u16(array).u8(1).u64(range.start).u64(range.end - 1);
        })?;
    }
    Ok(())
}

/// A UUID in SMBIOS order: the first three fields are little-endian (§7.2.1).
fn mixed_endian(uuid: [u8; 16]) -> [u8; 16] {
    let mut bytes = uuid;
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}
