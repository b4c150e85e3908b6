//! From the tree to checked settings.

use config::settings::{CpuFeature, FwCfgData, GdbSettings, TpmKind};
use config::{EngineChoice, FwCfgInterface, HostCpus, NullModemEnd, SerialBackend, Tree, VmSettings};
use x86::cpuid::Topology;

fn tree(assignments: &[&str]) -> Tree {
    let mut tree = Tree::with_defaults();
    tree.set("name", "g").unwrap();
    for assignment in assignments {
        config::file::assign(&mut tree, assignment).unwrap();
    }
    tree
}

fn settings(assignments: &[&str]) -> VmSettings {
    VmSettings::from_tree(&tree(assignments)).unwrap_or_else(|error| panic!("{assignments:?}: {error}"))
}

fn error(assignments: &[&str]) -> String {
    match VmSettings::from_tree(&tree(assignments)) {
        Ok(settings) => panic!("{assignments:?}: {settings:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn defaults_are_those_of_the_manual() {
    for tree in [tree(&[]), {
        let mut bare = Tree::new();
        bare.set("name", "g").unwrap();
        bare
    }] {
        let s = VmSettings::from_tree(&tree).unwrap();
        assert_eq!(s.name.as_str(), "g");
        assert_eq!(s.memory.size_bytes, 256 << 20);
        assert!(!s.memory.wired && !s.memory.in_core);
        assert_eq!(s.topology, Topology { sockets: 1, cores: 1, threads: 1 });
        assert_eq!(s.pinning, [None]);
        assert_eq!(s.engine, EngineChoice::Auto);
        assert!(!s.acpi_tables && s.acpi_tables_in_memory && s.mp_table && s.strict_msr && s.virtio_msix);
        assert!(!s.x2apic && !s.strict_io && !s.exit_on_halt && !s.exit_on_pause && !s.destroy_on_poweroff);
        assert!(s.rtc_local_time);
        assert_eq!((s.boot, s.uuid, s.gdb, s.tpm, s.keyboard_layout), (None, None, None, None, None));
        assert_eq!(s.lpc.com, [None, None, None, None]);
        assert_eq!(s.lpc.fwcfg, FwCfgInterface::Bhyve);
        assert!(s.pci.is_empty() && s.notes.is_empty() && s.cpu_features.0.is_empty() && s.fw_cfg.is_empty());
        assert_eq!((s.smbios.bios_vendor.as_str(), s.smbios.bios_version.as_str()), ("BHYVE", "14.0"));
        assert_eq!(s.smbios.bios_release_date, "10/17/2021");
        assert_eq!(
            (s.smbios.system_family_name.as_str(), s.smbios.system_sku.as_str()),
            ("Virtual Machine", "None")
        );
        assert_eq!(
            (s.smbios.board_product_name.as_str(), s.smbios.chassis_version.as_str()),
            ("BHYVE", "1.0")
        );
    }
}

#[test]
fn topologies() {
    for (assignments, (sockets, cores, threads)) in [
        (&["cpus=4"][..], (4, 1, 1)),
        (&["cpus=4", "sockets=2", "cores=2"], (2, 2, 1)),
        (&["cpus=2", "sockets=1", "cores=2"], (1, 2, 1)),
        (&["cpus=4", "cores=4"], (1, 4, 1)),
        (&["cores=2", "threads=2"], (1, 2, 2)),
        (&["sockets=3"], (3, 1, 1)),
        (&["cpus=65535"], (65535, 1, 1)),
    ] {
        let settings = settings(assignments);
        assert_eq!(settings.topology, Topology { sockets, cores, threads }, "{assignments:?}");
        assert_eq!(settings.pinning.len(), (sockets * cores * threads) as usize);
    }
    assert_eq!(
        error(&["cpus=2", "sockets=3"]),
        "the CPU topology does not add up: sockets=3 x cores=1 x threads=1 is 3, not cpus=2 (option -c \
         N,sockets=N,cores=N,threads=N; each that is left out counts as 1)"
    );
    assert!(error(&["cpus=8", "cores=2"]).contains("sockets=1 x cores=2 x threads=1 is 2, not cpus=8"));
    assert_eq!(error(&["cpus=0"]), "cpus: '0' is out of range: from 1 to 65535");
    assert!(error(&["sockets=65535", "cores=65535", "threads=65535"]).contains("are more than the 65535"));
}

#[test]
fn everything_set() {
    let s = settings(&[
        "ram=1",
        "memory.size=%(ram)G",
        "memory.wired=on",
        "memory.guest_in_core=yes",
        "cpus=2",
        "vcpu.1.cpuset=0-1,7",
        "cpu.features=+AVX2,-x2apic",
        "engine=soft",
        "boot.kernel=/k/%(name)",
        "boot.initrd=/i",
        "boot.cmdline=console=ttyS0 quiet",
        "uuid=01234567-89ab-cdef-0123-456789abcdef",
        "system.serial_number=%(name)-7",
        "gdb.port=1234",
        "gdb.wait=1",
        "tpm.type=passthru",
        "tpm.path=/dev/tpm0",
        "tpm.version=2.0",
        "fw_cfg.0.name=opt/a",
        "fw_cfg.0.string=x",
        "fw_cfg.1.name=opt/b",
        "fw_cfg.1.file=/f",
        "lpc.com1.path=stdio",
        "lpc.com2.path=/dev/nmdm%(name)A",
        "lpc.bootrom=/r",
        "lpc.bootvars=/v",
        "lpc.fwcfg=qemu",
        "lpc.pc-testdev=true",
        "pci.0.31.0.device=lpc",
        "pci.0.4.0.device=ahci",
        "pci.3.0.0.device=nvme",
    ]);
    assert_eq!(s.memory.size_bytes, 1 << 30);
    assert!(s.memory.wired && s.memory.in_core);
    assert_eq!(s.pinning, [None, Some(HostCpus([0, 1, 7].into()))]);
    let feature = |name: &str, add| CpuFeature { name: name.into(), add };
    assert_eq!(s.cpu_features.0, [feature("avx2", true), feature("x2apic", false)]);
    assert_eq!(s.engine, EngineChoice::Soft);
    let boot = s.boot.unwrap();
    assert_eq!(boot.kernel.to_str(), Some("/k/g"));
    assert_eq!(boot.cmdline, "console=ttyS0 quiet");
    assert_eq!(s.uuid.unwrap().to_string(), "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(s.smbios.system_serial_number, "g-7");
    assert_eq!(s.gdb, Some(GdbSettings { address: "localhost".into(), port: 1234, wait: true }));
    assert_eq!(s.tpm.unwrap().kind, TpmKind::Passthru);
    assert_eq!(s.fw_cfg[0].data, FwCfgData::Text("x".into()));
    assert_eq!((s.fw_cfg[1].name.as_str(), &s.fw_cfg[1].data), ("opt/b", &FwCfgData::File("/f".into())));
    let null_modem = SerialBackend::NullModem { unit: "g".into(), end: NullModemEnd::A };
    assert_eq!(s.lpc.com, [Some(SerialBackend::Stdio), Some(null_modem), None, None]);
    assert_eq!(s.lpc.fwcfg, FwCfgInterface::Qemu);
    assert!(s.lpc.test_device && s.notes.is_empty());
    let slots: Vec<String> =
        s.pci.iter().map(|slot| format!("{} {} {}", slot.address, slot.device, slot.node)).collect();
    assert_eq!(slots, ["0:4:0 ahci pci.0.4.0", "0:31:0 lpc pci.0.31.0", "3:0:0 nvme pci.3.0.0"]);
}

#[test]
fn errors_name_the_variable() {
    for (assignments, expected) in [
        (
            &["name=a/b"][..],
            "name: 'a/b' cannot be the name of a virtual machine: it contains a slash or a percent sign",
        ),
        (
            &["memory.size=lots"],
            "memory.size: 'lots' is not a size: use a whole number, with K, M, G or T for its unit",
        ),
        (&["memory.size=%(ram)"], "memory.size: the variable 'ram' that it refers to is not set"),
        (
            &["memory.size=9P"],
            "memory.size: '9P' is not a usable memory size: it is more than an x86-64 processor can address",
        ),
        (
            &["x86.x2apic=maybe"],
            "x86.x2apic: 'maybe' is not a boolean: use true, on, yes or 1, or false, off, no or 0",
        ),
        (&["engine=hvf"], "engine: 'hvf' is not one of auto, kvm, soft"),
        (&["gdb.port=70000"], "gdb.port: '70000' is out of range: from 0 to 65535"),
        (&["tpm.type=passthru"], "the variable tpm.path is not set"),
        (&["tpm.type=x"], "tpm.type: 'x' is not one of passthru, swtpm"),
        (&["tpm.type=swtpm", "tpm.path=/x", "tpm.version=1.2"], "tpm.version: '1.2' is not one of 2.0"),
        (&["fw_cfg.0.name=x"], "the variable fw_cfg.0.file is not set"),
        (&["fw_cfg.0.file=x"], "the variable fw_cfg.0.name is not set"),
        (
            &["vcpu.0.cpuset=x"],
            "vcpu.0.cpuset: 'x' is not a set of host CPUs: use numbers and ranges below 1024, as in 0-3,8",
        ),
        (
            &["lpc.bootvars=/v"],
            "lpc.bootvars is set, but lpc.bootrom is not: variables belong to a boot ROM (-l bootrom,FILE,VARIABLE FILE)",
        ),
        (
            &["boot.initrd=/i"],
            "boot.initrd is set, but boot.kernel is not: an initial file system goes with a kernel (--kernel)",
        ),
        (
            &["boot.cmdline=x"],
            "boot.cmdline is set, but boot.kernel is not: a command line goes with a kernel (--kernel)",
        ),
        (&["pci.0.3.0.path=/x"], "the variable pci.0.3.0.device is not set"),
        (&["pci.1.1.0.device=lpc"], "pci.1.1.0: the LPC bridge can only be on bus 0"),
        (
            &["pci.0.1.0.device=lpc", "pci.0.2.0.device=lpc"],
            "pci.0.2.0: there is an LPC bridge already, and it cannot be there twice",
        ),
        (
            &["lpc.com1.path=stdio", "lpc.com3.path=stdio"],
            "lpc.com3.path: stdio is already used by lpc.com1.path; give one of them another backend",
        ),
        (
            &["lpc.com1.path=/dev/nmdm0A", "pci.0.3.0.device=uart", "pci.0.3.0.path=/dev/nmdm0A"],
            "pci.0.3.0.path: /dev/nmdm0A is already used by lpc.com1.path; give one of them another backend",
        ),
    ] {
        assert_eq!(error(assignments), expected);
    }
    for variable in [
        "pci.0.32.0.device",
        "pci.256.0.0.device",
        "pci.0.0.8.device",
        "pci.0.x.0.device",
        "pci.0.3.device",
        "pci.0.03.0.device",
    ] {
        let message = error(&[&format!("{variable}=lpc")]);
        assert!(message.contains("PCI devices are pci.BUS.SLOT.FUNCTION"), "{message}");
    }
    let message = error(&["pci.0.3.0.device=virtio-bkl"]);
    assert!(message.starts_with("pci.0.3.0.device: unknown device 'virtio-bkl' (did you mean 'virtio-blk'?); known devices: ahci, e1000,"), "{message}");
    assert_eq!(VmSettings::from_tree(&Tree::new()).unwrap_err().to_string(), "the variable name is not set");
}

#[test]
fn both_ends_of_a_null_modem_are_not_the_same() {
    let s = settings(&["lpc.com1.path=/dev/nmdm0A", "lpc.com2.path=/dev/nmdm0B", "pci.0.1.0.device=lpc"]);
    assert!(s.notes.is_empty());
}

#[test]
fn what_has_no_effect_is_noted() {
    assert_eq!(
        settings(&["cpus=2", "vcpu.2.cpuset=3"]).notes,
        ["virtual CPU 2 is to be pinned, but there are only CPUs 0 to 1; it is ignored (option -p)"]
    );
    assert_eq!(
        settings(&["lpc.com1.path=stdio"]).notes,
        ["devices of option -l are configured, but the LPC bridge is missing; add -s 31,lpc"]
    );
    assert_eq!(
        settings(&["pci.0.3.1.device=nvme"]).notes,
        ["the guest will not find the nvme at 0:3:1: function 0 of that slot is empty"]
    );
    assert!(settings(&["my.own=1"]).notes.is_empty());
}
