use std::collections::BTreeMap;
use std::process::Command;

use crate::layout::{ECAM_BASE, HPET_BASE};
use crate::platform::{PciRoot, Platform, fixed};
use crate::tables::{ACPI_BASE, TablesError, write_tables};
use crate::testing::{MIB, guest, platform, read, sum, u16_at, u32_at, u64_at};

/// Follows the RSDP as an operating system does: every table by signature, checksums checked.
fn tables(platform: &Platform) -> BTreeMap<String, Vec<u8>> {
    let (_, memory) = guest(platform.layout.total_bytes());
    let written = write_tables(&memory, platform).unwrap();
    let at = written.rsdp.unwrap();
    assert_eq!(at, ACPI_BASE);
    let rsdp = read(&memory, at, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));

    let table = |at: u64| {
        assert!(at >= ACPI_BASE && at < written.end, "{at:#x}");
        let len = u32_at(&read(&memory, at, 8), 4) as usize;
        assert!(at + len as u64 <= written.end);
        let bytes = read(&memory, at, len);
        assert_eq!(sum(&bytes), 0, "{:?}", &bytes[..4]);
        assert_eq!(&bytes[10..16], b"BHYVE ");
        bytes
    };
    let signature = |bytes: &[u8]| String::from_utf8(bytes[..4].to_vec()).unwrap();

    let rsdt = table(u32_at(&rsdp, 16).into());
    let xsdt = table(u64_at(&rsdp, 24));
    let from_rsdt: Vec<u64> = rsdt[36..].chunks(4).map(|entry| u32_at(entry, 0).into()).collect();
    let from_xsdt: Vec<u64> = xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0)).collect();
    assert_eq!(from_rsdt, from_xsdt);

    let mut tables: BTreeMap<_, _> =
        from_xsdt.iter().map(|at| table(*at)).map(|bytes| (signature(&bytes), bytes)).collect();
    assert_eq!(tables.len(), from_xsdt.len(), "no table twice");
    let fadt = &tables["FACP"];
    let (facs_at, dsdt_at) = (u32_at(fadt, 36), u32_at(fadt, 40));
    assert_eq!(u64_at(fadt, 140), u64::from(dsdt_at));
    assert_eq!(facs_at % 64, 0);
    let facs = read(&memory, facs_at.into(), 64);
    assert_eq!((&facs[..4], u32_at(&facs, 4)), (&b"FACS"[..], 64));
    let dsdt = table(dsdt_at.into());
    assert_eq!(signature(&dsdt), "DSDT");
    tables.insert("DSDT".into(), dsdt);
    tables
}

#[test]
fn every_table_is_reachable_at_any_memory_size() {
    for total in [128 * MIB, 512 * MIB, 3072 * MIB, 6144 * MIB] {
        let names: Vec<String> = tables(&platform(total, 2, 1)).into_keys().collect();
        assert_eq!(names, ["APIC", "DSDT", "FACP", "HPET", "MCFG", "SPCR"]);
    }
}

#[test]
fn absent_devices_have_no_table() {
    let mut platform = platform(128 * MIB, 1, 1);
    platform.hpet_capabilities = None;
    platform.serial_ports.clear();
    platform.pci_roots.clear();
    platform.ps2 = false;
    let tables = tables(&platform);
    assert_eq!(tables.keys().collect::<Vec<_>>(), ["APIC", "DSDT", "FACP"]);
    assert_eq!(u16_at(&tables["FACP"], 109), 1 << 2 | 1 << 4, "no legacy devices, no i8042, no VGA, no ASPM");
}

#[test]
fn the_fadt_describes_the_fixed_hardware() {
    let fadt = &tables(&platform(128 * MIB, 1, 1))["FACP"];
    assert_eq!(fadt.len(), 276);
    assert_eq!((fadt[8], fadt[131]), (6, 3));
    assert_eq!(u16_at(fadt, 46), 9);
    assert_eq!((u32_at(fadt, 48), fadt[52], fadt[53]), (0xb2, 0xa0, 0xa1));
    assert_eq!((u32_at(fadt, 56), fadt[88]), (0x400, 4));
    assert_eq!((u32_at(fadt, 64), fadt[89]), (0x404, 2));
    assert_eq!((u32_at(fadt, 76), fadt[91]), (0x408, 4));
    assert_eq!((u32_at(fadt, 80), fadt[92]), (0, 0), "no general-purpose events");
    assert_eq!(fadt[108], 0x32);
    assert_eq!(u16_at(fadt, 109), 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4);
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & 1 << 4, 0, "the power button is fixed hardware");
    assert_ne!(flags & 1 << 5, 0, "the sleep button is not");
    assert_ne!(flags & 1 << 10, 0, "the reset register works");
    assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
    // Reset register: I/O, 8 bits, byte access, port CF9, value 6.
    assert_eq!((&fadt[116..120], u64_at(fadt, 120), fadt[128]), (&[1, 8, 0, 1][..], 0xcf9, 6));
    assert_eq!(u64_at(fadt, 132), 0, "the FACS is named once");
    assert_eq!((&fadt[148..152], u64_at(fadt, 152)), (&[1, 32, 0, 2][..], 0x400));
    assert_eq!((&fadt[172..176], u64_at(fadt, 176)), (&[1, 16, 0, 2][..], 0x404));
    assert_eq!((&fadt[208..212], u64_at(fadt, 212)), (&[1, 32, 0, 3][..], 0x408));
    assert_eq!((fixed::PM1_EVENT_PORT, fixed::PM1_CONTROL_PORT, fixed::PM_TIMER_PORT), (0x400, 0x404, 0x408));
}

/// Structures of the MADT: type, and the bytes after type and length.
fn madt(platform: &Platform) -> Vec<(u8, Vec<u8>)> {
    let table = tables(platform).remove("APIC").unwrap();
    assert_eq!((u32_at(&table, 36), u32_at(&table, 40)), (0xfee0_0000, 1));
    let mut rest = &table[44..];
    let mut structures = Vec::new();
    while !rest.is_empty() {
        let (structure, next) = rest.split_at(usize::from(rest[1]));
        structures.push((structure[0], structure[2..].to_vec()));
        rest = next;
    }
    structures
}

#[test]
fn the_madt_lists_processors_and_overrides() {
    assert_eq!(
        madt(&platform(128 * MIB, 2, 1)),
        [
            (0, vec![0, 0, 1, 0, 0, 0]),
            (0, vec![1, 1, 1, 0, 0, 0]),
            (1, vec![0, 0, 0x00, 0x00, 0xc0, 0xfe, 0, 0, 0, 0]),
            (2, vec![0, 0, 2, 0, 0, 0, 0b0101, 0]),
            (2, vec![0, 9, 9, 0, 0, 0, 0b1111, 0]),
            (4, vec![0xff, 0b0101, 0, 1]),
        ]
    );
}

#[test]
fn processors_beyond_254_are_x2apic_entries() {
    let mut platform = platform(128 * MIB, 1, 300);
    platform.apic_ids[3] = 0x1_0000;
    let structures = madt(&platform);
    let count = |kind| structures.iter().filter(|(k, _)| *k == kind).count();
    assert_eq!((count(0), count(9)), (254, 46));
    let x2apic: Vec<(u32, u32)> =
        structures.iter().filter(|(k, _)| *k == 9).map(|(_, b)| (u32_at(b, 2), u32_at(b, 10))).collect();
    assert_eq!((x2apic[0], x2apic[1], x2apic[45]), ((0x1_0000, 3), (255, 255), (299, 299)));
    assert_eq!(structures.last().unwrap(), &(10, vec![0b0101, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]));
}

#[test]
fn the_mcfg_hpet_and_spcr_point_at_the_devices() {
    let tables = tables(&platform(128 * MIB, 1, 1));
    let mcfg = &tables["MCFG"];
    assert_eq!((u64_at(mcfg, 44), u16_at(mcfg, 52), mcfg[54], mcfg[55]), (ECAM_BASE, 0, 0, 255));
    let hpet = &tables["HPET"];
    assert_eq!((hpet.len(), u32_at(hpet, 36), u64_at(hpet, 44)), (56, 0x8086_a701, HPET_BASE));
    let spcr = &tables["SPCR"];
    assert_eq!((spcr.len(), spcr[40], u64_at(spcr, 44), spcr[53], u32_at(spcr, 54)), (80, 1, 0x3f8, 4, 4));
}

/// Whether `needle` occurs in the DSDT.
fn contains(dsdt: &[u8], needle: &[u8]) -> bool {
    dsdt.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_namespace_has_what_the_platform_has() {
    let mut platform = platform(6144 * MIB, 2, 1);
    let dsdt = tables(&platform).remove("DSDT").unwrap();
    for present in
        [&b"C000"[..], b"C001", b"PC00", b"ISA_", b"COM1", b"COM2", b"KBD_", b"HPET", b"_S5_", b"_PRT"]
    {
        assert!(contains(&dsdt, present), "{}", String::from_utf8_lossy(present));
    }
    assert!(!contains(&dsdt, b"C002") && !contains(&dsdt, b"COM3"));
    // \_S5 is Package { 5, 0, 0, 0 }.
    assert!(contains(&dsdt, b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00"));
    // Ports 3F8 to 3FF and IRQ 4 of com1.
    assert!(contains(&dsdt, &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x22, 0x10, 0]));
    // Slot 2 pin A leads to GSI 16, slot 3 pin C to 23.
    assert!(contains(&dsdt, &[0x12, 0x0b, 4, 0x0c, 0xff, 0xff, 2, 0, 0, 0, 0x0a, 16]));
    assert!(contains(&dsdt, &[0x12, 0x0c, 4, 0x0c, 0xff, 0xff, 3, 0, 0x0a, 2, 0, 0x0a, 23]));
    // The 64-bit window of a 6 GiB guest: 32 to 64 GiB.
    let mut window = vec![0x8a, 43, 0, 0, 0x0c, 1];
    for field in [0u64, 0x8_0000_0000, 0xf_ffff_ffff, 0, 0x8_0000_0000] {
        window.extend_from_slice(&field.to_le_bytes());
    }
    assert!(contains(&dsdt, &window));

    platform.ps2 = false;
    platform.hpet_capabilities = None;
    let dsdt = tables(&platform).remove("DSDT").unwrap();
    assert!(!contains(&dsdt, b"KBD_") && !contains(&dsdt, b"HPET"));
}

#[test]
fn several_roots_have_a_bridge_each() {
    let mut platform = platform(128 * MIB, 1, 1);
    platform.mptable = false;
    platform.pci_roots[0].buses = 0..=4;
    platform.pci_roots.push(PciRoot {
        buses: 5..=9,
        io: vec![0x3000..=0x3fff],
        mmio32: None,
        mmio64: None,
        interrupts: vec![],
    });
    let tables = tables(&platform);
    assert!(contains(&tables["DSDT"], b"PC00") && contains(&tables["DSDT"], b"PC05"));
    assert_eq!((tables["MCFG"][54], tables["MCFG"][55]), (0, 9));
    platform.mptable = true;
    let (_, memory) = guest(128 * MIB);
    assert!(matches!(write_tables(&memory, &platform), Err(TablesError::MpTableRoots)));
}

#[test]
fn too_many_processors_are_an_error() {
    let (_, memory) = guest(128 * MIB);
    let platform = platform(128 * MIB, 1, 5000);
    let error = write_tables(&memory, &platform).unwrap_err();
    assert!(matches!(error, TablesError::NoRoom { .. }), "{error}");
}

/// With ACPICA's compiler at hand: every table disassembles, and the DSDT compiles again without a complaint.
#[test]
fn acpica_accepts_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl is not installed");
        return;
    }
    let directory = std::env::temp_dir().join(format!("apiary-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let mut wide = platform(6144 * MIB, 1, 300);
    wide.pci_roots[0].interrupts = (0..32)
        .flat_map(|slot| {
            use crate::platform::{IntxPin::*, IntxRoute};
            [A, B, C, D].map(|pin| IntxRoute { slot, pin, gsi: 16 + u32::from(slot) % 8, pic_irq: Some(5) })
        })
        .collect();
    for platform in [platform(128 * MIB, 1, 1), wide] {
        for (name, bytes) in tables(&platform) {
            let aml = directory.join(format!("{name}.aml"));
            std::fs::write(&aml, bytes).unwrap();
            let output = Command::new("iasl").current_dir(&directory).arg("-d").arg(&aml).output().unwrap();
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(output.status.success(), "{name}: {text}");
            for complaint in ["Error", "Invalid", "Incorrect", "Warning"] {
                assert!(!text.contains(complaint), "{name}: {text}");
            }
        }
        let output = Command::new("iasl").current_dir(&directory).args(["-tc", "DSDT.dsl"]).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}
