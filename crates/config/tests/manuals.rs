//! Command lines that people copy: every one under EXAMPLES in bhyve(8), and every one that the bhyve handbook prints.

use config::{Action, Tree, VmSettings};

/// Splits as a shell does: words at spaces, a backslash before a line end joins lines, `#` starts a comment.
fn words(text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| {
        let line = line.split(" #").next().unwrap_or_default().trim_end();
        line.strip_suffix('\\').unwrap_or(line)
    });
    // A continued line goes on where its last word stopped, unless either side has a space.
    let mut joined = String::new();
    for line in lines {
        joined.push_str(line);
    }
    joined.split_whitespace().filter(|word| *word != "...").skip(1).map(str::to_owned).collect()
}

/// What a command line sets beyond what is set before it is read, as a dump.
fn variables(text: &str) -> String {
    let command_line = config::parse(words(text)).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(command_line.action, Action::Run, "{text}");
    assert_eq!(command_line.notes, Vec::<String>::new(), "{text}");
    VmSettings::from_tree(&command_line.tree).unwrap_or_else(|error| panic!("{text}: {error}"));
    let defaults = Tree::with_defaults();
    let changed = command_line.tree.iter().filter(|(path, value)| defaults.raw(path) != Some(value));
    changed.map(|(path, value)| format!("{path}={value}\n")).collect()
}

fn dump(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[test]
fn manual_one_gigabyte() {
    let text = r"bhyve -c 2 -s 0,hostbridge -s 1,lpc -s 2,virtio-blk,/my/image \
  -l com1,stdio -A -H -P -m 1G vm1";
    let expected = [
        "acpi_tables=true",
        "cpus=2",
        "lpc.com1.path=stdio",
        "memory.size=1G",
        "name=vm1",
        "pci.0.0.0.device=hostbridge",
        "pci.0.1.0.device=lpc",
        "pci.0.2.0.device=virtio-blk",
        "pci.0.2.0.path=/my/image",
        "x86.vmexit_on_hlt=true",
        "x86.vmexit_on_pause=true",
    ];
    assert_eq!(variables(text), dump(&expected));
}

#[test]
fn manual_three_network_ports() {
    let text = r"bhyve -s 0,hostbridge -s 1,lpc -s 2:0,virtio-net,tap0 \
  -s 2:1,virtio-net,tap1 \
  -s 2:2,virtio-net,tap2,mac=00:be:fa:76:45:00 \
  -s 3,virtio-blk,/my/image -l com1,stdio \
  -A -H -P -m 24G bigvm";
    let expected = [
        "acpi_tables=true",
        "lpc.com1.path=stdio",
        "memory.size=24G",
        "name=bigvm",
        "pci.0.0.0.device=hostbridge",
        "pci.0.1.0.device=lpc",
        "pci.0.2.0.backend=tap0",
        "pci.0.2.0.device=virtio-net",
        "pci.0.2.1.backend=tap1",
        "pci.0.2.1.device=virtio-net",
        "pci.0.2.2.backend=tap2",
        "pci.0.2.2.device=virtio-net",
        "pci.0.2.2.mac=00:be:fa:76:45:00",
        "pci.0.3.0.device=virtio-blk",
        "pci.0.3.0.path=/my/image",
        "x86.vmexit_on_hlt=true",
        "x86.vmexit_on_pause=true",
    ];
    assert_eq!(variables(text), dump(&expected));
}

/// The manual's text, which names no machine and puts two devices into slot 1:0.
const NINE_DRIVES: &str = r"bhyve -c 4 \
  -s 0,amd_hostbridge -s 1,lpc \
  -s 1:0,ahci,hd:/images/disk.1,hd:/images/disk.2,\
hd:/images/disk.3,hd:/images/disk.4,\
hd:/images/disk.5,hd:/images/disk.6,\
hd:/images/disk.7,hd:/images/disk.8,\
cd:/images/install.iso \
  -s 3,virtio-net,tap0 \
  -l com1,/dev/nmdm0A \
  -A -H -P -m 8G";

#[test]
fn manual_nine_drives_as_printed() {
    let error = config::parse(words(NINE_DRIVES)).unwrap_err().to_string();
    assert!(error.starts_with("-s 1:0,ahci,hd:/images/disk.1,"), "{error}");
    assert!(error.ends_with(": PCI slot 0:1:0 already holds the device lpc"), "{error}");
}

#[test]
fn manual_nine_drives_as_meant() {
    let text = NINE_DRIVES.replace("-s 1:0,ahci", "-s 1:1,ahci") + " disks";
    let mut expected = vec![
        "acpi_tables=true".to_owned(),
        "cpus=4".to_owned(),
        "lpc.com1.path=/dev/nmdm0A".to_owned(),
        "memory.size=8G".to_owned(),
        "name=disks".to_owned(),
        "pci.0.0.0.device=hostbridge".to_owned(),
        "pci.0.0.0.pcireg.device=0x7432".to_owned(),
        "pci.0.0.0.pcireg.vendor=0x1022".to_owned(),
        "pci.0.1.0.device=lpc".to_owned(),
        "pci.0.1.1.device=ahci".to_owned(),
    ];
    for port in 0..8 {
        expected.push(format!("pci.0.1.1.port.{port}.path=/images/disk.{}", port + 1));
        expected.push(format!("pci.0.1.1.port.{port}.type=hd"));
    }
    expected.push("pci.0.1.1.port.8.path=/images/install.iso".to_owned());
    expected.push("pci.0.1.1.port.8.type=cd".to_owned());
    expected.push("pci.0.3.0.backend=tap0".to_owned());
    expected.push("pci.0.3.0.device=virtio-net".to_owned());
    expected.push("x86.vmexit_on_hlt=true".to_owned());
    expected.push("x86.vmexit_on_pause=true".to_owned());
    assert_eq!(variables(&text), expected.join("\n") + "\n");
}

#[test]
fn manual_vnc() {
    let text = r"bhyve -c 2 -m 4G -w -H \
  -s 0,hostbridge \
  -s 3,ahci-cd,/path/to/uefi-OS-install.iso \
  -s 4,ahci-hd,disk.img \
  -s 5,virtio-net,tap0 \
  -s 29,fbuf,tcp=0.0.0.0:5900,w=800,h=600,wait \
  -s 30,xhci,tablet \
  -s 31,lpc -l com1,stdio \
  -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd \
   uefivm";
    let expected = [
        "cpus=2",
        "lpc.bootrom=/usr/local/share/uefi-firmware/BHYVE_UEFI.fd",
        "lpc.com1.path=stdio",
        "memory.size=4G",
        "name=uefivm",
        "pci.0.0.0.device=hostbridge",
        "pci.0.3.0.device=ahci",
        "pci.0.3.0.port.0.path=/path/to/uefi-OS-install.iso",
        "pci.0.3.0.port.0.type=cd",
        "pci.0.4.0.device=ahci",
        "pci.0.4.0.port.0.path=disk.img",
        "pci.0.4.0.port.0.type=hd",
        "pci.0.5.0.backend=tap0",
        "pci.0.5.0.device=virtio-net",
        "pci.0.29.0.device=fbuf",
        "pci.0.29.0.h=600",
        "pci.0.29.0.tcp=0.0.0.0:5900",
        "pci.0.29.0.w=800",
        "pci.0.29.0.wait=true",
        "pci.0.30.0.device=xhci",
        "pci.0.30.0.slot.1.device=tablet",
        "pci.0.31.0.device=lpc",
        "x86.strictmsr=false",
        "x86.vmexit_on_hlt=true",
    ];
    assert_eq!(variables(text), dump(&expected));
}

#[test]
fn manual_vnc_on_all_ipv6_addresses() {
    let text = r"bhyve -c 2 -m 4G -w -H \
  -s 0,hostbridge \
  -s 4,ahci-hd,disk.img \
  -s 5,virtio-net,tap0 \
  -s 29,fbuf,tcp=[::]:5900,w=800,h=600 \
  -s 30,xhci,tablet \
  -s 31,lpc -l com1,stdio \
  -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd \
   uefivm";
    let tree = config::parse(words(text)).unwrap().tree;
    assert_eq!(tree.raw("pci.0.29.0.tcp"), Some("[::]:5900"));
    assert_eq!(tree.raw("pci.0.29.0.wait"), None);
    assert_eq!(tree.children("pci.0"), ["0", "4", "5", "29", "30", "31"]);
}

#[test]
fn manual_uefi_variables() {
    // Here the manual misses a backslash; a shell would run the line without the name.
    let printed = r"bhyve -c 2 -m 4g -w -H \
  -s 0,hostbridge \
  -s 31,lpc -l com1,stdio \
  -l bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI_CODE.fd,BHYVE_UEFI_VARS.fd";
    assert!(
        config::parse(words(printed))
            .unwrap_err()
            .to_string()
            .contains("name of the virtual machine is missing")
    );
    let expected = [
        "cpus=2",
        "lpc.bootrom=/usr/local/share/uefi-firmware/BHYVE_UEFI_CODE.fd",
        "lpc.bootvars=BHYVE_UEFI_VARS.fd",
        "lpc.com1.path=stdio",
        "memory.size=4g",
        "name=uefivm",
        "pci.0.0.0.device=hostbridge",
        "pci.0.31.0.device=lpc",
        "x86.strictmsr=false",
        "x86.vmexit_on_hlt=true",
    ];
    assert_eq!(variables(&format!("{printed} uefivm")), dump(&expected));
}

#[test]
fn handbook_run_the_machine() {
    for name in ["guest1", "test_vm"] {
        let text = format!(
            r"bhyve -A -H -P -c 2 -m 4G \
        -s 0:0,hostbridge \
        -s 1:0,lpc \
        -s 2:0,virtio-net,tap0 \
        -s 3:0,virtio-blk,/vm/instances/{name}.img \
        -l com1,/dev/nmdm0A \
        {name}"
        );
        let (name, path) = (format!("name={name}"), format!("pci.0.3.0.path=/vm/instances/{name}.img"));
        let expected = [
            "acpi_tables=true",
            "cpus=2",
            "lpc.com1.path=/dev/nmdm0A",
            "memory.size=4G",
            &name,
            "pci.0.0.0.device=hostbridge",
            "pci.0.1.0.device=lpc",
            "pci.0.2.0.backend=tap0",
            "pci.0.2.0.device=virtio-net",
            "pci.0.3.0.device=virtio-blk",
            &path,
            "x86.vmexit_on_hlt=true",
            "x86.vmexit_on_pause=true",
        ];
        assert_eq!(variables(&text), dump(&expected));
    }
}

#[test]
fn handbook_single_lines() {
    for (text, expected) in [
        ("bhyve -m 4G guest1  # 4GBを割り当て", &["memory.size=4G", "name=guest1"][..]),
        ("bhyve -c 2 guest1  # 2コアを割り当て", &["cpus=2", "name=guest1"]),
        ("bhyve -c 2,sockets=1,cores=2 guest1", &["cores=2", "cpus=2", "name=guest1", "sockets=1"]),
        ("bhyve -c 2 +kvmclock,-x2apic guest1", &["cpu.features=+kvmclock,-x2apic", "cpus=2", "name=guest1"]),
        (
            "bhyve ... -s 3:0,virtio-blk,/vm/instances/guest1.img ... g",
            &["name=g", "pci.0.3.0.device=virtio-blk", "pci.0.3.0.path=/vm/instances/guest1.img"],
        ),
        (
            "bhyve ... -s 3:0,ahci-hd,/vm/instances/guest1.img ... g",
            &[
                "name=g",
                "pci.0.3.0.device=ahci",
                "pci.0.3.0.port.0.path=/vm/instances/guest1.img",
                "pci.0.3.0.port.0.type=hd",
            ],
        ),
        (
            "bhyve ... -s 5:0,passthru,2/0/0 ... g",
            &[
                "name=g",
                "pci.0.5.0.bus=2",
                "pci.0.5.0.device=passthru",
                "pci.0.5.0.func=0",
                "pci.0.5.0.slot=0",
            ],
        ),
        (
            "bhyve -s 5,passthru,0/1/0 \\  # PCIデバイスの指定\n      <VM名>",
            &[
                "name=<VM名>",
                "pci.0.5.0.bus=0",
                "pci.0.5.0.device=passthru",
                "pci.0.5.0.func=0",
                "pci.0.5.0.slot=1",
            ],
        ),
        ("bhyve -c 2 -m 2G -w <VM名>", &["cpus=2", "memory.size=2G", "name=<VM名>", "x86.strictmsr=false"]),
        (
            "bhyve -A -H -P \\\n      -s 0:0,hostbridge \\\n      -s 1:0,lpc \\\n      -s 2:0,virtio-net,tap0 \\\n      \
             -s 3:0,virtio-blk,disk.img \\\n      -c 2 -m 2G \\\n      testvm",
            &[
                "acpi_tables=true",
                "cpus=2",
                "memory.size=2G",
                "name=testvm",
                "pci.0.0.0.device=hostbridge",
                "pci.0.1.0.device=lpc",
                "pci.0.2.0.backend=tap0",
                "pci.0.2.0.device=virtio-net",
                "pci.0.3.0.device=virtio-blk",
                "pci.0.3.0.path=disk.img",
                "x86.vmexit_on_hlt=true",
                "x86.vmexit_on_pause=true",
            ],
        ),
        (
            "bhyve -c 2 -S \\\n      -p 2:3 \\ # CPU 2と3を割り当て\n      <VM名>",
            &["cpus=2", "memory.wired=true", "name=<VM名>", "vcpu.2.cpuset=3"],
        ),
        (
            "bhyve -c 2 -m 4G \\\n      -w \\  # EPTを有効化\n      -H \\  # CPU機能の受け渡し\n      <VM名>",
            &["cpus=2", "memory.size=4G", "name=<VM名>", "x86.strictmsr=false", "x86.vmexit_on_hlt=true"],
        ),
        ("bhyve -m 4G testvm", &["memory.size=4G", "name=testvm"]),
        (
            "bhyve -s 2:0,virtio-net,tap0 testvm",
            &["name=testvm", "pci.0.2.0.backend=tap0", "pci.0.2.0.device=virtio-net"],
        ),
        ("bhyve -c 2 -m 2G testvm", &["cpus=2", "memory.size=2G", "name=testvm"]),
    ] {
        assert_eq!(variables(text), dump(expected), "{text}");
    }
}

#[test]
fn the_line_that_boots_linux() {
    let text = "bhyve -A -H -P -c 2 -m 512M -s 0:0,hostbridge -s 1:0,lpc -l com1,stdio --kernel K --initrd I \
                --cmdline console=ttyS0 g1";
    let tree = config::parse(words(text)).unwrap().tree;
    let settings = VmSettings::from_tree(&tree).unwrap();
    let boot = settings.boot.unwrap();
    assert_eq!(
        (boot.kernel.to_str(), boot.initrd.as_deref().and_then(|i| i.to_str())),
        (Some("K"), Some("I"))
    );
    assert_eq!(boot.cmdline, "console=ttyS0");
    assert_eq!(settings.memory.size_bytes, 512 << 20);
    assert_eq!(settings.topology.vcpus(), 2);
    assert!(settings.acpi_tables && settings.exit_on_halt && settings.exit_on_pause && settings.mp_table);
    assert_eq!(settings.lpc.com[0], Some(config::SerialBackend::Stdio));
    assert_eq!(settings.notes, Vec::<String>::new());
}
