//! The grammar of bhyve(8)'s command line, option by option and device by device, down to the variables.

use config::{Action, CliError, Tree, VmSettings};
use proptest::prelude::*;

fn parse(arguments: &[&str]) -> Result<config::CommandLine, CliError> {
    config::parse(arguments.iter().copied())
}

/// What the words set beyond the defaults, sorted as a dump.
fn changed(tree: &Tree) -> Vec<String> {
    let defaults = Tree::with_defaults();
    tree.iter()
        .filter(|(path, value)| defaults.raw(path) != Some(value))
        .map(|(p, v)| format!("{p}={v}"))
        .collect()
}

/// The variables that options set, the name left out.
fn variables(line: &str) -> Vec<String> {
    let words: Vec<&str> = line.split_whitespace().chain(["g"]).collect();
    let command_line = parse(&words).unwrap_or_else(|error| panic!("{line}: {error}"));
    assert_eq!(command_line.notes, Vec::<String>::new(), "{line}");
    let mut lines = changed(&command_line.tree);
    lines.retain(|line| line != "name=g");
    lines
}

fn error(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().chain(["g"]).collect();
    let message = match parse(&words) {
        Ok(command_line) => panic!("{line}: {command_line:?}"),
        Err(error) => error.to_string(),
    };
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn options() {
    for (line, expected) in [
        ("", &[][..]),
        ("-A", &["acpi_tables=true"]),
        ("-a", &["x86.x2apic=false"]),
        ("-x", &["x86.x2apic=true"]),
        ("-x -a", &["x86.x2apic=false"]),
        ("-C", &["memory.guest_in_core=true"]),
        ("-D", &["destroy_on_poweroff=true"]),
        ("-e", &["x86.strictio=true"]),
        ("-H", &["x86.vmexit_on_hlt=true"]),
        ("-P", &["x86.vmexit_on_pause=true"]),
        ("-S", &["memory.wired=true"]),
        ("-u", &["rtc.use_localtime=false"]),
        ("-W", &["virtio_msix=false"]),
        ("-w", &["x86.strictmsr=false"]),
        ("-Y", &["x86.mptable=false"]),
        ("-K jp", &["keyboard.layout=jp"]),
        ("-U 01234567-89AB-cdef-0123-456789abcdef", &["uuid=01234567-89AB-cdef-0123-456789abcdef"]),
        ("-m 2G", &["memory.size=2G"]),
        ("-m 512", &["memory.size=512"]),
        ("-m 512m -m %(ram)", &["memory.size=%(ram)"]),
        ("-c 2", &["cpus=2"]),
        ("-c cpus=2,sockets=1,cores=2,threads=1", &["cores=2", "cpus=2", "sockets=1", "threads=1"]),
        ("-c ,sockets=2", &["sockets=2"]),
        ("-c 4,cpus=6", &["cpus=6"]),
        ("-c 0x10", &["cpus=0x10"]),
        ("-G 1234", &["gdb.port=1234"]),
        ("-G w1234", &["gdb.port=1234", "gdb.wait=true"]),
        ("-G 10.0.0.1:1234", &["gdb.address=10.0.0.1", "gdb.port=1234"]),
        ("-G w[::1]:1234", &["gdb.address=[::1]", "gdb.port=1234", "gdb.wait=true"]),
        ("-p 0:3", &["vcpu.0.cpuset=3"]),
        ("-p 0:3 -p 1:4 -p 0:7", &["vcpu.0.cpuset=3,7", "vcpu.1.cpuset=4"]),
        ("-o a.b=c=d", &["a.b=c=d"]),
        ("-o cpus=3 -c 2", &["cpus=2"]),
        ("-f opt/a/b,string=x,y=z", &["fw_cfg.0.name=opt/a/b", "fw_cfg.0.string=x,y=z"]),
        (
            "-f name=opt/a,file=/f -f opt/b,string=x",
            &["fw_cfg.0.file=/f", "fw_cfg.0.name=opt/a", "fw_cfg.1.name=opt/b", "fw_cfg.1.string=x"],
        ),
        ("--engine soft", &["engine=soft"]),
        ("--engine=kvm", &["engine=kvm"]),
        ("--kernel=k --initrd i", &["boot.initrd=i", "boot.kernel=k"]),
        ("--cmdline=a=b", &["boot.cmdline=a=b"]),
        ("--cmdline=a --cmdline=", &[]),
        ("+avx2,-x2apic", &["cpu.features=+avx2,-x2apic"]),
        ("+avx2 -c 2 +sse4.2", &["cpu.features=+avx2,+sse4.2", "cpus=2"]),
        ("+avx2 --", &["cpu.features=+avx2"]),
        ("-- -x2apic,+avx", &["cpu.features=-x2apic,+avx"]),
        ("-l com1,stdio", &["lpc.com1.path=stdio"]),
        ("-l COM2,/dev/nmdm7B", &["lpc.com2.path=/dev/nmdm7B"]),
        ("-l com3,tcp=127.0.0.1:9000", &["lpc.com3.path=tcp=127.0.0.1:9000"]),
        ("-l com4,/dev/nmdm%(name)A", &["lpc.com4.path=/dev/nmdm%(name)A"]),
        ("-l bootrom,/rom", &["lpc.bootrom=/rom"]),
        ("-l bootrom,/rom,/vars", &["lpc.bootrom=/rom", "lpc.bootvars=/vars"]),
        ("-l bootrom,/rom,fwcfg=qemu", &["lpc.bootrom=/rom", "lpc.fwcfg=qemu"]),
        ("-l bootrom,/rom,/vars,fwcfg=qemu", &["lpc.bootrom=/rom", "lpc.bootvars=/vars", "lpc.fwcfg=qemu"]),
        ("-l fwcfg,qemu", &["lpc.fwcfg=qemu"]),
        ("-l fwcfg=qemu", &["lpc.fwcfg=qemu"]),
        ("-l pc-testdev", &["lpc.pc-testdev=true"]),
        ("-l tpm,passthru,/dev/tpm0", &["tpm.path=/dev/tpm0", "tpm.type=passthru", "tpm.version=2.0"]),
        (
            "-l tpm,passthru,/dev/tpm0,version=1.2",
            &["tpm.path=/dev/tpm0", "tpm.type=passthru", "tpm.version=1.2"],
        ),
    ] {
        assert_eq!(variables(line), expected, "{line}");
    }
}

/// What `-s 3,…` sets below pci.0.3.0.
#[test]
fn devices() {
    for (conf, expected) in [
        ("hostbridge", &["device=hostbridge"][..]),
        ("hostbridge,pcireg.vendor=0x8086", &["device=hostbridge", "pcireg.vendor=0x8086"]),
        ("amd_hostbridge", &["device=hostbridge", "pcireg.device=0x7432", "pcireg.vendor=0x1022"]),
        ("lpc", &["device=lpc"]),
        ("virtio-rnd", &["device=virtio-rnd"]),
        ("virtio-blk", &["device=virtio-blk"]),
        ("virtio-blk,/d", &["device=virtio-blk", "path=/d"]),
        (
            "virtio-blk,/d,nocache,direct,ro,nodelete,sectorsize=512/4096,bootindex=1,ser=abc",
            &[
                "bootindex=1",
                "device=virtio-blk",
                "direct=true",
                "nocache=true",
                "nodelete=true",
                "path=/d",
                "ro=true",
                "sectorsize=512/4096",
                "ser=abc",
            ],
        ),
        ("virtio-blk,path=/d,ro=off", &["device=virtio-blk", "path=/d", "ro=off"]),
        ("virtio-blk,/odd=name,ro", &["device=virtio-blk", "path=/odd=name", "ro=true"]),
        ("virtio-blk,/dev/zvol/%(name)", &["device=virtio-blk", "path=/dev/zvol/%(name)"]),
        ("ahci", &["device=ahci"]),
        ("ahci-hd", &["device=ahci", "port.0.type=hd"]),
        ("ahci-cd,/iso,ro", &["device=ahci", "port.0.path=/iso", "port.0.ro=true", "port.0.type=cd"]),
        (
            "ahci-hd,/d,nmrr=1,ser=S,rev=R,model=M",
            &[
                "device=ahci",
                "port.0.model=M",
                "port.0.nmrr=1",
                "port.0.path=/d",
                "port.0.rev=R",
                "port.0.ser=S",
                "port.0.type=hd",
            ],
        ),
        (
            "ahci,hd:/a,ro,ser=1,cd:/b,hd:/c",
            &[
                "device=ahci",
                "port.0.path=/a",
                "port.0.ro=true",
                "port.0.ser=1",
                "port.0.type=hd",
                "port.1.path=/b",
                "port.1.type=cd",
                "port.2.path=/c",
                "port.2.type=hd",
            ],
        ),
        ("nvme,/d,maxq=4,qsz=64", &["device=nvme", "maxq=4", "path=/d", "qsz=64"]),
        ("nvme,ram=64", &["device=nvme", "ram=64"]),
        ("nvme,ram=64,ser=X,dsm=auto", &["device=nvme", "dsm=auto", "ram=64", "ser=X"]),
        ("virtio-net", &["device=virtio-net"]),
        ("virtio-net,tap0", &["backend=tap0", "device=virtio-net"]),
        ("virtio-net,mac=02:00:00:00:00:01", &["device=virtio-net", "mac=02:00:00:00:00:01"]),
        (
            "e1000,vmnet3,mac=02:0:0:0:0:1,mtu=9000",
            &["backend=vmnet3", "device=e1000", "mac=02:0:0:0:0:1", "mtu=9000"],
        ),
        (
            "virtio-net,slirp,hostfwd=tcp:127.0.0.1:8080-10.0.2.15:80;udp::53-:53",
            &["backend=slirp", "device=virtio-net", "hostfwd=tcp:127.0.0.1:8080-10.0.2.15:80;udp::53-:53"],
        ),
        (
            "virtio-net,netgraph,path=sw:,peerhook=link1,socket=s,hook=h",
            &["backend=netgraph", "device=virtio-net", "hook=h", "path=sw:", "peerhook=link1", "socket=s"],
        ),
        ("passthru", &["device=passthru"]),
        ("passthru,2/0/1", &["bus=2", "device=passthru", "func=1", "slot=0"]),
        ("passthru,pci2:0:1,rom=/r", &["bus=2", "device=passthru", "func=1", "rom=/r", "slot=0"]),
        ("passthru,pci0:2:31:1", &["bus=2", "device=passthru", "func=1", "slot=31"]),
        ("passthru,0000:1f:0a.7", &["bus=31", "device=passthru", "func=7", "slot=10"]),
        ("passthru,1f:0a.7", &["bus=31", "device=passthru", "func=7", "slot=10"]),
        ("passthru,ppt12", &["device=passthru", "pptdev=ppt12"]),
        (
            "fbuf,rfb=[fe80::1%em0]:5900,w=1024,h=768,vga=off,wait,password=x",
            &[
                "device=fbuf",
                "h=768",
                "password=x",
                "rfb=[fe80::1%em0]:5900",
                "vga=off",
                "w=1024",
                "wait=true",
            ],
        ),
        ("xhci", &["device=xhci"]),
        ("xhci,tablet,tablet", &["device=xhci", "slot.1.device=tablet", "slot.2.device=tablet"]),
        ("hda,play=/dev/dsp0,rec=/dev/dsp1", &["device=hda", "play=/dev/dsp0", "rec=/dev/dsp1"]),
        ("uart,stdio", &["device=uart", "path=stdio"]),
        ("virtio-9p,share=/srv/a,ro", &["device=virtio-9p", "path=/srv/a", "ro=true", "sharename=share"]),
        (
            "virtio-console,port1=/a.sock,org.guest=/b.sock",
            &[
                "device=virtio-console",
                "port.0.name=port1",
                "port.0.path=/a.sock",
                "port.1.name=org.guest",
                "port.1.path=/b.sock",
            ],
        ),
        ("virtio-input,/dev/input/event3", &["device=virtio-input", "path=/dev/input/event3"]),
        ("virtio-scsi,/dev/cam/ctl1.2,iid=3", &["dev=/dev/cam/ctl1.2", "device=virtio-scsi", "iid=3"]),
    ] {
        let tree =
            parse(&["-s", &format!("3,{conf}"), "g"]).unwrap_or_else(|error| panic!("{conf}: {error}")).tree;
        let below: Vec<String> = changed(&tree)
            .iter()
            .filter_map(|line| line.strip_prefix("pci.0.3.0.").map(str::to_owned))
            .collect();
        assert_eq!(below, expected, "{conf}");
        assert_eq!(changed(&tree).len(), below.len() + 1, "{conf}: only the name and the device are set");
    }
}

#[test]
fn slots() {
    for (slot, node) in
        [("0", "0.0.0"), ("31", "0.31.0"), ("3:7", "0.3.7"), ("255:31:7", "255.31.7"), ("02:0", "0.2.0")]
    {
        let tree = parse(&["-s", &format!("{slot},nvme"), "g"]).unwrap().tree;
        assert_eq!(tree.raw(&format!("pci.{node}.device")), Some("nvme"), "{slot}");
    }
    for slot in [
        "",
        "x",
        "32",
        "3:8",
        "256:0:0",
        "0:32:0",
        "-1",
        "+1",
        "1:2:3:4",
        "3:",
        ":3",
        "1.2",
        "0x1",
        "999999999999",
    ] {
        let message = error(&format!("-s {slot},nvme"));
        assert!(message.starts_with(&format!("-s {slot},nvme: ")), "{message}");
        assert!(message.contains("-s [BUS:]SLOT[:FUNCTION],DEVICE[,CONF]"), "{message}");
    }
}

#[test]
fn getopt() {
    let same = |words: &[&str], as_words: &[&str]| {
        assert_eq!(parse(words).unwrap().tree, parse(as_words).unwrap().tree, "{words:?}");
    };
    same(&["-AHP", "-c2", "-m1G", "g"], &["-A", "-H", "-P", "-c", "2", "-m", "1G", "g"]);
    same(&["-AHPc2", "g"], &["-A", "-H", "-P", "-c", "2", "g"]);
    same(&["-AHPc", "2", "--", "g"], &["-A", "-H", "-P", "-c", "2", "g"]);
    same(&["-s3,lpc", "g"], &["-s", "3,lpc", "g"]);
    same(&["-K", "-A", "g"], &["-o", "keyboard.layout=-A", "g"]);
    same(&["-c", "", "g"], &["-c", "1,sockets=1,cores=1,threads=1", "g"]);
    same(&["--engine=soft", "g"], &["--engine", "soft", "g"]);
    same(&["-o", "name=g"], &["g"]);
    same(&["-o", "name=h", "g"], &["g"]);
}

#[test]
fn actions() {
    let action = |words: &[&str]| parse(words).unwrap().action;
    assert_eq!(action(&["g"]), Action::Run);
    assert_eq!(action(&["-h"]), Action::Help);
    assert_eq!(action(&["-AhZ"]), Action::Help, "what was printed before the mistake stays printed");
    assert_eq!(action(&["--help", "--nonsense"]), Action::Help);
    assert_eq!(action(&["--version"]), Action::Version);
    assert_eq!(action(&["-s", "help"]), Action::ListPciDevices);
    assert_eq!(action(&["-lhelp"]), Action::ListLpcDevices);
    assert_eq!(action(&["-r", "/snap"]), Action::Resume("/snap".into()));
    assert_eq!(action(&["-r", "/snap", "g"]), Action::Resume("/snap".into()));
    assert_eq!(action(&["-o", "config.dump=1", "g"]), Action::Dump);
    assert_eq!(action(&["-o", "config.dump=Yes"]), Action::Dump);
    assert_eq!(action(&["-o", "config.dump=off", "g"]), Action::Run);
    assert!(matches!(parse(&["-Zh"]), Err(CliError::UnknownOption { .. })));
}

#[test]
fn errors() {
    for (line, expected) in [
        ("-Z", "unknown option -Z; bhyve -h lists all options"),
        ("-é", "unknown option -é; bhyve -h lists all options"),
        ("--engin soft", "unknown option --engin (did you mean --engine?); bhyve -h lists all options"),
        ("--help=x", "option --help takes no argument, but has 'x'"),
        ("--engine hvf", "--engine hvf: 'hvf' is not one of auto, kvm, soft"),
        ("-c 0", "-c 0: cpus: '0' is out of range: from 1 to 65535"),
        ("-c two", "-c two: 'two' is not an integer: use decimal, 0x hexadecimal or 0 octal digits"),
        (
            "-c 2,socket=1",
            "-c 2,socket=1: 'socket' is not part of a CPU topology (accepted: -c \
             [[cpus=]N][,sockets=N][,cores=N][,threads=N])",
        ),
        (
            "-c cores=",
            "-c cores=: cores is given no value (accepted: -c [[cpus=]N][,sockets=N][,cores=N][,threads=N])",
        ),
        ("-m 0", "-m 0: '0' is not a usable memory size: it is less than one megabyte"),
        ("-m 1.5G", "-m 1.5G: '1.5G' is not a size: use a whole number, with K, M, G or T for its unit"),
        ("-U 1234", "-U 1234: '1234' is not a UUID: use the form 01234567-89ab-cdef-0123-456789abcdef"),
        ("-G 0", "-G 0: '0' is not a TCP port: use 1 to 65535 (accepted: -G [w][ADDRESS:]PORT)"),
        ("-p 1", "-p 1: '1' is not a pair of a virtual CPU and a host CPU (accepted: -p VCPU:HOSTCPU)"),
        ("-p 0:1024", "-p 0:1024: '1024' is out of range: from 0 to 1023"),
        ("-o x", "-o x: 'x' is not of the form variable=value (accepted: -o VARIABLE=VALUE)"),
        ("-o x=", "-o x=: x is given no value (accepted: -o VARIABLE=VALUE)"),
        (
            "-o lpc=x",
            "-o lpc=x: lpc has variables below it and cannot have a value itself (accepted: -o VARIABLE=VALUE)",
        ),
        (
            "-f opt/x",
            "-f opt/x: 'opt/x' names no data for the guest (accepted: -f [name=]NAME,string=TEXT | \
             [name=]NAME,file=FILE)",
        ),
        (
            "-l com5,stdio",
            "-l com5,stdio: unknown device 'com5' (did you mean 'com1'?); known devices: bootrom, com1, com2, com3, \
             com4, fwcfg, pc-testdev, tpm",
        ),
        ("-l com1", "-l com1: com1 needs more: com1,stdio|tcp=IP:PORT|/dev/nmdmNA|/dev/TTY"),
        ("-l bootrom", "-l bootrom: bootrom needs more: bootrom,FILE[,VARIABLE FILE][,fwcfg=bhyve|qemu]"),
        ("-l tpm,passthru", "-l tpm,passthru: tpm needs more: tpm,passthru|swtpm,PATH[,version=2.0]"),
        ("-l fwcfg,vmware", "-l fwcfg,vmware: 'vmware' is not one of bhyve, qemu"),
        (
            "-l com1,sdtio",
            "-l com1,sdtio: 'sdtio' is no backend for a serial port: use stdio, tcp=ADDRESS:PORT, /dev/nmdmNA, \
             /dev/nmdmNB or the path of a terminal device",
        ),
        ("-s 3", "-s 3: no device is named for the slot (accepted: -s [BUS:]SLOT[:FUNCTION],DEVICE[,CONF])"),
        (
            "-s 32,lpc",
            "-s 32,lpc: slot 32 is out of range: a slot is from 0 to 31 (accepted: -s \
             [BUS:]SLOT[:FUNCTION],DEVICE[,CONF])",
        ),
        (
            "-s 3,nosuch",
            "-s 3,nosuch: unknown device 'nosuch'; known devices: ahci, ahci-cd, ahci-hd, amd_hostbridge, e1000, \
             fbuf, hda, hostbridge, lpc, nvme, passthru, uart, virtio-9p, virtio-blk, virtio-console, virtio-input, \
             virtio-net, virtio-rnd, virtio-scsi, xhci",
        ),
        ("-s 3,lpc -s 0:3:0,nvme,/d", "-s 0:3:0,nvme,/d: PCI slot 0:3:0 already holds the device lpc"),
        (
            "-s 3,virtio-blk,/d,",
            "-s 3,virtio-blk,/d,: '' is not an option of the form name or name=value (accepted: -s \
             [BUS:]SLOT[:FUNCTION],DEVICE[,CONF])",
        ),
        (
            "-s 3,virtio-blk,/d,ser=",
            "-s 3,virtio-blk,/d,ser=: 'ser' has no value (accepted: -s [BUS:]SLOT[:FUNCTION],DEVICE[,CONF])",
        ),
        (
            "-s 3,virtio-blk,/d,ser=123456789012345678901",
            "-s 3,virtio-blk,/d,ser=123456789012345678901: ser: '123456789012345678901' has 21 characters, the \
             field holds 20",
        ),
        (
            "-s 3,nvme,/d,dsm=maybe",
            "-s 3,nvme,/d,dsm=maybe: dsm: 'maybe' is not one of auto, enable, disable",
        ),
        ("-s 3,fbuf,w=320", "-s 3,fbuf,w=320: w: '320' is out of range: from 640 to 1920"),
        (
            "-s 3,fbuf,tcp=localhost:1",
            "-s 3,fbuf,tcp=localhost:1: tcp: 'localhost:1' is not an address and port: use IPv4:PORT, [IPv6]:PORT \
             or PORT",
        ),
        (
            "-s 2,virtio-net,tap0,mac=01:00:00:00:00:00",
            "-s 2,virtio-net,tap0,mac=01:00:00:00:00:00: mac: '01:00:00:00:00:00' cannot be the address of a network \
             card: it is a multicast or broadcast address",
        ),
        ("-s 3,ahci,/x", "-s 3,ahci,/x: '/x' does not say what is on the port: write hd:/x or cd:/x"),
        ("-s 3,xhci,mouse", "-s 3,xhci,mouse: unknown USB device 'mouse'; known devices: tablet"),
        (
            "-s 3,virtio-console,/sock",
            "-s 3,virtio-console,/sock: '/sock' is not a console port of the form name=/path/to/socket",
        ),
        (
            "-s 3,virtio-9p,a=/x,b=/y",
            "-s 3,virtio-9p,a=/x,b=/y: 'b=/y' is a second shared directory; add another virtio-9p device for it",
        ),
        (
            "-s 5,passthru,2/0/9",
            "-s 5,passthru,2/0/9: the host device '2/0/9': function 9 is out of range: a function is from 0 to 7",
        ),
        (
            "-s 5,passthru,gpu",
            "-s 5,passthru,gpu: 'gpu' is not a PCI device of the host: use BUS/SLOT/FUNCTION in decimal, the \
             hexadecimal BB:SS.F that lspci prints, or pptN",
        ),
        ("+avx2,", "+avx2,: '' is not a CPU feature change: use +feature or -feature, separated by commas"),
        (
            "-o config.dump=maybe",
            "config.dump: 'maybe' is not a boolean: use true, on, yes or 1, or false, off, no or 0",
        ),
        (
            "-k /nonexistent/f",
            "-k /nonexistent/f: cannot read the configuration file /nonexistent/f: No such file or directory (os error 2)",
        ),
    ] {
        assert_eq!(error(line), expected);
    }
}

#[test]
fn too_many_ports() {
    let ports: Vec<String> = (0..17).map(|n| format!("p{n}=/s{n}")).collect();
    assert!(
        error(&format!("-s 3,virtio-console,{}", ports.join(",")))
            .ends_with("17 ports are more than the 16 that the device has")
    );
    assert!(parse(&["-s", &format!("3,virtio-console,{}", ports[..16].join(",")), "g"]).is_ok());
    let drives: Vec<String> = (0..33).map(|n| format!("hd:/d{n}")).collect();
    assert!(
        error(&format!("-s 3,ahci,{}", drives.join(",")))
            .ends_with("33 ports are more than the 32 that the device has")
    );
    assert!(parse(&["-s", &format!("3,ahci,{}", drives[..32].join(",")), "g"]).is_ok());
}

#[test]
fn names() {
    let long = "n".repeat(230);
    for (words, expected) in [
        (&[][..], "the name of the virtual machine is missing"),
        (&["-A"], "the name of the virtual machine is missing"),
        (&["+avx2"], "the name of the virtual machine is missing"),
        (&[""], "'' cannot be the name of a virtual machine: it is empty"),
        (&["a/b"], "it contains a slash"),
        (&[".."], "it starts with a dot"),
        (&["-"], "it starts with a dot, a dash or a plus sign"),
        (&["a b"], "it contains a space"),
        (&["a\tb"], "it contains a space or a control character"),
        (&["a\nb"], "the argument 'a\\nb' contains a line break"),
        (&[&long], "it is longer than 229 bytes"),
        (
            &["g", "-m", "2G"],
            "'-m' comes after the name 'g': the name of the virtual machine is the last argument",
        ),
        (&["g", "h"], "'h' comes after the name 'g'"),
        (&["-m"], "option -m needs an argument: -m SIZE[K|M|G|T]"),
        (&["-AHs"], "option -s needs an argument"),
        (&["--kernel"], "option --kernel needs an argument: --kernel FILE"),
    ] {
        let message = parse(words).unwrap_err().to_string();
        assert!(message.contains(expected), "{words:?}: {message}");
    }
    for name in ["g", "test_vm", "web-1.example", "仮想機械", &long[..229]] {
        assert_eq!(parse(&[name]).unwrap().tree.raw("name"), Some(name));
    }
}

#[test]
fn what_has_no_effect_is_noted() {
    let notes = |words: &[&str]| parse(words).unwrap().notes;
    assert_eq!(
        notes(&["-s", "3,virtio-blk,/d,nocahe", "g"]),
        [
            "-s 3,virtio-blk,/d,nocahe: virtio-blk has no option 'nocahe'; it is ignored; did you mean 'nocache'?"
        ]
    );
    assert_eq!(
        parse(&["-s", "3,virtio-blk,/d,nocahe", "g"]).unwrap().tree.raw("pci.0.3.0.nocahe"),
        Some("true")
    );
    assert_eq!(
        notes(&["-l", "bootrom,/r,/v,colour=red", "g"]),
        [
            "-l bootrom,/r,/v,colour=red: there is no option 'colour' here; it is ignored (known: fwcfg, bootvars)"
        ]
    );
    assert_eq!(notes(&["-I", "g"]).len(), 1);
    assert!(notes(&["-o", "my.own.variable=1", "g"]).is_empty());
}

#[test]
fn arguments_that_are_not_text() {
    use std::os::unix::ffi::OsStringExt;
    let word = std::ffi::OsString::from_vec(b"-s3,nvme,/\xff".to_vec());
    let message = config::parse([word]).unwrap_err().to_string();
    assert_eq!(message, "the argument '-s3,nvme,/\u{fffd}' is not valid UTF-8");
}

#[test]
fn configuration_files() {
    let file = std::env::temp_dir().join(format!("apiary-config-test-{}.conf", std::process::id()));
    let path = file.to_str().unwrap();
    std::fs::write(&file, "# a guest\ncpus=4\nname=web\npci.0.3.0.device=nvme\n").unwrap();
    let before_and_after = parse(&["-c", "2", "-k", path, "-o", "memory.size=1G"]).map(|c| c.tree);
    let taken = parse(&["-k", path, "-s", "3,lpc"]).map(drop);
    std::fs::write(&file, "cpus=4\nwhat\n").unwrap();
    let broken = parse(&["-k", path]).map(drop);
    std::fs::remove_file(&file).unwrap();
    let tree = before_and_after.unwrap();
    assert_eq!(changed(&tree), ["cpus=4", "memory.size=1G", "name=web", "pci.0.3.0.device=nvme"]);
    assert_eq!(taken.unwrap_err().to_string(), "-s 3,lpc: PCI slot 0:3:0 already holds the device nvme");
    assert_eq!(
        broken.unwrap_err().to_string(),
        format!("-k {path}: {path}:2: 'what' is not of the form variable=value")
    );
}

#[test]
fn lists_have_one_name_per_line() {
    let pci = config::pci::device_list();
    assert_eq!(pci.lines().count(), 20);
    assert!(pci.lines().any(|line| line == "virtio-blk") && pci.ends_with("xhci\n"));
    assert_eq!(config::lpc::device_list(), "bootrom\ncom1\ncom2\ncom3\ncom4\nfwcfg\npc-testdev\ntpm\n");
}

/// Words that resemble a command line closely enough to reach every branch.
fn word() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "-",
        "--",
        "+",
        "A",
        "c",
        "s",
        "l",
        "m",
        "o",
        "k",
        "p",
        "G",
        "f",
        "U",
        "r",
        "=",
        ",",
        ":",
        "/",
        ".",
        "%",
        "%(",
        ")",
        "0",
        "3",
        "31",
        "255",
        "cpus",
        "sockets",
        "com1",
        "stdio",
        "tcp",
        "bootrom",
        "tpm",
        "fwcfg",
        "ahci",
        "hd:",
        "cd:",
        "virtio-net",
        "tap0",
        "mac",
        "virtio-9p",
        "virtio-console",
        "nvme",
        "ram",
        "passthru",
        "pci",
        "ppt",
        "xhci",
        "tablet",
        "fbuf",
        "engine",
        "soft",
        "cmdline",
        "name",
        "config.dump",
        "help",
        "é",
        " ",
        "\n",
        "pci.0.3.0.device",
        "string",
        "file",
        "lpc",
        "G",
        "K",
        "uart",
        "hostbridge",
    ]);
    prop::collection::vec(pieces, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_command_line_panics(words in prop::collection::vec(word(), 0..6)) {
        // A stray -k may name a file of the host; that is no part of this.
        prop_assume!(!words.iter().any(|word| word.starts_with('-') && word.contains('k')));
        match config::parse(&words) {
            Ok(command_line) => {
                let mut again = Tree::new();
                config::file::load(&mut again, "dump", &command_line.tree.dump()).unwrap();
                prop_assert_eq!(&again, &command_line.tree);
                let _ = VmSettings::from_tree(&command_line.tree);
            }
            Err(error) => prop_assert!(error.to_string().lines().count() == 1, "{}", error),
        }
    }

    #[test]
    fn no_tree_panics(lines in prop::collection::vec((
        prop::sample::select(vec![
            "name", "cpus", "cores", "sockets", "memory.size", "pci.0.3.0.device", "pci.0.3.1.device", "pci.x.y",
            "pci.0.31.0.path", "vcpu.0.cpuset", "vcpu.x.cpuset", "lpc.com1.path", "lpc.com2.path", "gdb.port",
            "tpm.type", "tpm.path", "fw_cfg.0.name", "fw_cfg.0.string", "cpu.features", "uuid", "boot.kernel", "x",
        ]),
        prop_oneof!["[0-9]{1,5}[KMGT]?", "%\\([a-z.0-9]{1,12}\\)", "(uart|lpc|stdio|soft|\\+avx|g|0-3,5)", "\\PC{1,8}"],
    ), 0..16)) {
        let mut tree = Tree::with_defaults();
        for (path, value) in &lines {
            let _ = tree.set(path, value.as_str());
        }
        let _ = VmSettings::from_tree(&tree);
    }

    #[test]
    fn every_slot_is_its_own_node(bus in 0u8..=255, slot in 0u8..32, function in 0u8..8) {
        let tree = parse(&["-s", &format!("{bus}:{slot}:{function},virtio-rnd"), "g"]).unwrap().tree;
        let settings = VmSettings::from_tree(&tree).unwrap();
        prop_assert_eq!(settings.pci.len(), 1);
        let found = &settings.pci[0];
        prop_assert_eq!((found.address.bus, found.address.slot, found.address.function), (bus, slot, function));
        prop_assert_eq!(tree.node(&found.node).required("device").unwrap(), "virtio-rnd");
    }
}
