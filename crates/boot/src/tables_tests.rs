//! MP table and SMBIOS, found and read as a guest does.

use engine::GuestMemory;
use proptest::prelude::*;

use crate::platform::{Platform, SmbiosStrings};
use crate::tables::{ACPI_BASE, MP_TABLE_BASE, SMBIOS_BASE, TablesError, write_tables};
use crate::testing::{GIB, MIB, guest, platform, read, sum, u16_at, u32_at, u64_at};

fn written(platform: &Platform) -> GuestMemory {
    let (_, memory) = guest(platform.layout.total_bytes());
    write_tables(&memory, platform).unwrap();
    memory
}

/// Header and entries of the MP table.
fn mp_table(memory: &GuestMemory) -> (Vec<u8>, Vec<Vec<u8>>) {
    let pointer = read(memory, MP_TABLE_BASE, 16);
    assert_eq!((&pointer[..4], pointer[8], pointer[9], sum(&pointer)), (&b"_MP_"[..], 1, 4, 0));
    let at = u64::from(u32_at(&pointer, 4));
    let header = read(memory, at, 44);
    assert_eq!(&header[..4], b"PCMP");
    let table = read(memory, at, u16_at(&header, 4).into());
    assert_eq!(sum(&table), 0);
    let mut rest = &table[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let len = if rest[0] == 0 { 20 } else { 8 };
        entries.push(rest[..len].to_vec());
        rest = &rest[len..];
    }
    assert_eq!(entries.len(), usize::from(u16_at(&header, 34)));
    (header, entries)
}

#[test]
fn the_mp_table_lists_processors_buses_and_interrupts() {
    let memory = written(&platform(128 * MIB, 2, 1));
    let (header, entries) = mp_table(&memory);
    assert_eq!(
        (&header[8..16], &header[16..28], u32_at(&header, 36)),
        (&b"BHyVe   "[..], &b"Hypervisor  "[..], 0xfee0_0000)
    );
    // Bootstrap processor first, signature and features as CPUID has them.
    assert_eq!(entries[0][..12], [0, 0, 0x14, 3, 0xf2, 0x06, 0x0c, 0, 0xff, 0xfb, 0x8b, 0x1f]);
    assert_eq!(entries[1][..4], [0, 1, 0x14, 1]);
    assert_eq!((&entries[2][..], &entries[3][..]), (&b"\x01\x00PCI   "[..], &b"\x01\x01ISA   "[..]));
    assert_eq!(entries[4], [2, 0, 0x11, 1, 0x00, 0x00, 0xc0, 0xfe]);
    let io: Vec<&Vec<u8>> = entries.iter().filter(|e| e[0] == 3).collect();
    assert_eq!(io.len(), 16 + 2);
    assert_eq!(*io[0], [3, 3, 0, 0, 1, 0, 0, 0], "the 8259s on input 0");
    assert_eq!(*io[2], [3, 0, 0, 0, 1, 0, 0, 2], "IRQ 0 on input 2");
    assert_eq!(*io[4], [3, 0, 0, 0, 1, 4, 0, 4]);
    assert_eq!(*io[9], [3, 0, 0x0f, 0, 1, 9, 0, 9], "the SCI: level, low");
    assert_eq!(*io[16], [3, 0, 0x0f, 0, 0, 2 << 2, 0, 16]);
    assert_eq!(*io[17], [3, 0, 0x0f, 0, 0, 3 << 2 | 2, 0, 23]);
    let local: Vec<&Vec<u8>> = entries.iter().filter(|e| e[0] == 4).collect();
    assert_eq!((local[0][1], local[0][6..].to_vec()), (3, vec![0xff, 0]));
    assert_eq!((local[1][1], local[1][6..].to_vec()), (1, vec![0xff, 1]));
}

#[test]
fn a_large_mp_table_moves_and_skips_wide_apic_ids() {
    let memory = written(&platform(128 * MIB, 1, 300));
    assert!(u32_at(&read(&memory, MP_TABLE_BASE, 16), 4) > ACPI_BASE as u32);
    let (_, entries) = mp_table(&memory);
    assert_eq!(entries.iter().filter(|e| e[0] == 0).count(), 255);
}

#[test]
fn tables_can_be_left_out() {
    let mut platform = platform(128 * MIB, 1, 1);
    (platform.acpi, platform.mptable) = (false, false);
    let (_, memory) = guest(128 * MIB);
    let tables = write_tables(&memory, &platform).unwrap();
    assert_eq!((tables.rsdp, tables.mp_table, tables.smbios), (None, None, SMBIOS_BASE));
    assert_eq!(read(&memory, MP_TABLE_BASE, 16), [0; 16]);
    assert_eq!(read(&memory, ACPI_BASE, 8), [0; 8]);
}

#[test]
fn writing_again_leaves_nothing_of_the_last_time() {
    let (_, memory) = guest(128 * MIB);
    write_tables(&memory, &platform(128 * MIB, 1, 64)).unwrap();
    write_tables(&memory, &platform(128 * MIB, 1, 1)).unwrap();
    let (_, fresh) = guest(128 * MIB);
    write_tables(&fresh, &platform(128 * MIB, 1, 1)).unwrap();
    assert_eq!(read(&memory, 0xf_0000, 0x1_0000), read(&fresh, 0xf_0000, 0x1_0000));
}

#[test]
fn the_bios_data_area_names_serial_ports_and_the_ebda() {
    let memory = written(&platform(128 * MIB, 1, 1));
    let area = read(&memory, 0x400, 0x20);
    assert_eq!([u16_at(&area, 0), u16_at(&area, 2), u16_at(&area, 4)], [0x3f8, 0x2f8, 0]);
    assert_eq!((u16_at(&area, 0xe), u16_at(&area, 0x13)), (0x9fc0, 639));
}

/// An SMBIOS structure: type, fields from offset 0, strings.
#[derive(Debug)]
struct Structure {
    kind: u8,
    fields: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    /// The text that the string field at `offset` refers to.
    fn text(&self, offset: usize) -> &str {
        match self.fields[offset] {
            0 => "",
            number => &self.strings[usize::from(number) - 1],
        }
    }
}

fn smbios(memory: &GuestMemory) -> Vec<Structure> {
    let entry = read(memory, SMBIOS_BASE, 0x1f);
    assert_eq!((&entry[..4], &entry[0x10..0x15]), (&b"_SM_"[..], &b"_DMI_"[..]));
    assert_eq!((sum(&entry), sum(&entry[0x10..])), (0, 0));
    let entry3 = read(memory, SMBIOS_BASE + 0x20, 0x18);
    assert_eq!((&entry3[..5], sum(&entry3)), (&b"_SM3_"[..], 0));
    assert_eq!(
        (u32_at(&entry, 0x18).into(), u32::from(u16_at(&entry, 0x16))),
        (u64_at(&entry3, 0x10), u32_at(&entry3, 0xc))
    );

    let table = read(memory, u32_at(&entry, 0x18).into(), u16_at(&entry, 0x16).into());
    let mut rest = &table[..];
    let mut structures: Vec<Structure> = Vec::new();
    let mut longest = 0;
    while !rest.is_empty() {
        let len = usize::from(rest[1]);
        let end = (len..).find(|i| rest[*i] == 0 && rest[*i + 1] == 0).unwrap() + 2;
        let strings = rest[len..end - 2].split(|byte| *byte == 0).filter(|s| !s.is_empty());
        structures.push(Structure {
            kind: rest[0],
            fields: rest[..len].to_vec(),
            strings: strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect(),
        });
        longest = longest.max(end);
        rest = &rest[end..];
    }
    assert_eq!(structures.len(), usize::from(u16_at(&entry, 0x1c)));
    assert_eq!(longest, usize::from(u16_at(&entry, 8)));
    let mut handles: Vec<u16> = structures.iter().map(|s| u16_at(&s.fields, 2)).collect();
    handles.dedup();
    assert_eq!(handles.len(), structures.len());
    structures
}

fn find(structures: &[Structure], kind: u8) -> &Structure {
    structures.iter().find(|s| s.kind == kind).unwrap()
}

#[test]
fn smbios_shows_every_variable() {
    let mut platform = platform(128 * MIB, 1, 1);
    for variable in SmbiosStrings::VARIABLES {
        *platform.smbios.variable(variable).unwrap() = format!("<{variable}>");
    }
    assert!(platform.smbios.variable("system.nosuch").is_none());
    let structures = smbios(&written(&platform));
    let shown = |kind, offset| find(&structures, kind).text(offset).to_owned();
    for (variable, kind, offset) in [
        ("bios.vendor", 0, 0x04),
        ("bios.version", 0, 0x05),
        ("bios.release_date", 0, 0x08),
        ("system.manufacturer", 1, 0x04),
        ("system.product_name", 1, 0x05),
        ("system.version", 1, 0x06),
        ("system.serial_number", 1, 0x07),
        ("system.sku", 1, 0x19),
        ("system.family_name", 1, 0x1a),
        ("board.manufacturer", 2, 0x04),
        ("board.product_name", 2, 0x05),
        ("board.version", 2, 0x06),
        ("board.serial_number", 2, 0x07),
        ("board.asset_tag", 2, 0x08),
        ("board.location", 2, 0x0a),
        ("chassis.manufacturer", 3, 0x04),
        ("chassis.version", 3, 0x06),
        ("chassis.serial_number", 3, 0x07),
        ("chassis.asset_tag", 3, 0x08),
        ("chassis.sku", 3, 0x15),
    ] {
        assert_eq!(shown(kind, offset), format!("<{variable}>"));
    }
    let system = find(&structures, 1);
    let uuid =
        [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
    assert_eq!(system.fields[8..24], uuid);
    // The board stands in the chassis.
    assert_eq!(u16_at(&find(&structures, 2).fields, 0x0b), u16_at(&find(&structures, 3).fields, 2));
}

#[test]
fn smbios_shows_processors_by_socket() {
    let structures = smbios(&written(&platform(128 * MIB, 2, 3)));
    let processors: Vec<&Structure> = structures.iter().filter(|s| s.kind == 4).collect();
    assert_eq!(processors.len(), 2);
    let second = processors[1];
    assert_eq!((second.text(4), second.text(7), second.text(0x10)), ("CPU #1", "GenuineIntel", "Test CPU"));
    assert_eq!(u64_at(&second.fields, 8), 0x1f8b_fbff_000c_06f2);
    assert_eq!((second.fields[0x23], second.fields[0x25], u16_at(&second.fields, 0x2a)), (3, 3, 3));
    let kinds: Vec<u8> = structures.iter().map(|s| s.kind).collect();
    assert_eq!(kinds, [0, 1, 2, 3, 4, 4, 16, 17, 19, 32, 127]);
}

#[test]
fn smbios_shows_memory_of_any_size() {
    for (total, size, extended, ranges) in [
        (128 * MIB, 128, 0, 1),
        (5 * MIB + 4096, 0x8000 | 5124, 0, 1),
        (3 * GIB, 3072, 0, 1),
        (6 * GIB, 6144, 0, 2),
        (40 * GIB, 0x7fff, 40 * 1024, 2),
    ] {
        let (layout, memory) = guest(total.min(6 * GIB));
        let mut platform = platform(total, 1, 1);
        platform.acpi = true;
        write_tables(&memory, &platform).unwrap();
        let structures = smbios(&memory);
        let (array, device) = (find(&structures, 16), find(&structures, 17));
        assert_eq!((u32_at(&array.fields, 7), u64_at(&array.fields, 15)), (0x8000_0000, total));
        assert_eq!((u16_at(&device.fields, 0x0c), u32_at(&device.fields, 0x1c)), (size, extended));
        assert_eq!(u16_at(&device.fields, 4), u16_at(&array.fields, 2));
        let mapped: Vec<u64> = structures
            .iter()
            .filter(|s| s.kind == 19)
            .map(|s| u64_at(&s.fields, 0x17) + 1 - u64_at(&s.fields, 0x0f))
            .collect();
        assert_eq!((mapped.len(), mapped.iter().sum::<u64>()), (ranges, total));
        assert!(layout.total_bytes() <= total);
    }
}

#[test]
fn smbios_text_is_checked() {
    let (_, memory) = guest(128 * MIB);
    let mut platform = platform(128 * MIB, 1, 1);
    platform.smbios.board_asset_tag = "a\0b".into();
    let error = write_tables(&memory, &platform).unwrap_err();
    assert!(matches!(error, TablesError::SmbiosText { variable: "board.asset_tag" }), "{error}");
    platform.smbios.board_asset_tag = "x".repeat(70_000);
    let error = write_tables(&memory, &platform).unwrap_err();
    assert!(matches!(error, TablesError::SmbiosTooLong), "{error}");
    // What outgrows bhyve's place but not the segment moves behind the ACPI tables.
    platform.smbios.board_asset_tag = "x".repeat(10_000);
    write_tables(&memory, &platform).unwrap();
    assert_eq!(find(&smbios(&memory), 2).text(8).len(), 10_000);
}

proptest! {
    #[test]
    fn any_text_is_shown_or_refused(texts in prop::collection::vec(".{0,40}", 20), cores in 1u32..64) {
        let mut platform = platform(16 * MIB, 1, cores);
        for (variable, text) in SmbiosStrings::VARIABLES.into_iter().zip(&texts) {
            platform.smbios.variable(variable).unwrap().clone_from(text);
        }
        let (_, memory) = guest(16 * MIB);
        match write_tables(&memory, &platform) {
            Ok(_) => {
                let structures = smbios(&memory);
                prop_assert_eq!(find(&structures, 0).text(4), platform.smbios.bios_vendor.as_str());
                prop_assert_eq!(find(&structures, 3).text(0x15), platform.smbios.chassis_sku.as_str());
            }
            Err(error) => prop_assert!(texts.iter().any(|t| t.contains('\0')), "{}", error),
        }
    }
}
