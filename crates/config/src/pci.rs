//! PCI devices on the command line: `-s [bus:]slot[:function],device[,conf]` of bhyve(8).
//!
//! Each device has a grammar of its own for what follows its name, older than the configuration tree. [`DEVICES`]
//! lists every device with its grammar and its variables (bhyve_config(5), "DEVICE SETTINGS"); an argument of
//! `-s` becomes variables below `pci.BUS.SLOT.FUNCTION`.

use std::fmt;

use crate::cli::ArgumentError;
use crate::error::nearest;
use crate::lpc::{SerialBackend, checked};
use crate::tree::Tree;
use crate::value::{
    MacAddr, SectorSize, ValueError, parse_bool, parse_integer, parse_size, parse_socket_address,
};

/// Where a device sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// 0 to 255.
    pub bus: u8,
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub function: u8,
}

/// The highest numbers that an address can have.
const MAX_BUS: u8 = 255;
const MAX_SLOT: u8 = 31;
const MAX_FUNCTION: u8 = 7;

impl PciAddress {
    /// From numbers as text, each checked against its range. Only plain decimal digits are taken.
    pub fn from_decimal(bus: &str, slot: &str, function: &str) -> Result<Self, PciAddressError> {
        Self::from_digits(bus, slot, function, 10)
    }

    fn from_digits(bus: &str, slot: &str, function: &str, radix: u32) -> Result<Self, PciAddressError> {
        let number = |part: &'static str, text: &str, max: u8| {
            if text.is_empty() || !text.chars().all(|c| c.is_digit(radix)) {
                return Err(PciAddressError::NotANumber { part, text: text.to_owned() });
            }
            match u8::from_str_radix(text, radix) {
                Ok(number) if number <= max => Ok(number),
                _ => Err(PciAddressError::OutOfRange { part, text: text.to_owned(), max }),
            }
        };
        Ok(Self {
            bus: number("bus", bus, MAX_BUS)?,
            slot: number("slot", slot, MAX_SLOT)?,
            function: number("function", function, MAX_FUNCTION)?,
        })
    }

    /// The path of the device's node, `pci.BUS.SLOT.FUNCTION`.
    pub fn node(&self) -> String {
        format!("pci.{}.{}.{}", self.bus, self.slot, self.function)
    }

    /// The address as Linux tools write it within a segment: `BB:SS.F` in hexadecimal.
    fn from_linux(text: &str) -> Option<Result<Self, PciAddressError>> {
        let (rest, function) = text.split_once('.')?;
        let mut parts = rest.rsplit(':');
        let (slot, bus) = (parts.next()?, parts.next()?);
        match (parts.next(), parts.next()) {
            (None, _) => {}
            (Some(domain), None) if !domain.is_empty() && domain.bytes().all(|b| b == b'0') => {}
            _ => return None,
        }
        Some(Self::from_digits(bus, slot, function, 16))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.bus, self.slot, self.function)
    }
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciAddressError {
    /// A part is not made of digits.
    #[error("the {part} '{text}' is not a number")]
    NotANumber {
        /// `bus`, `slot` or `function`.
        part: &'static str,
        /// What stands in its place.
        text: String,
    },
    /// A part is too large.
    #[error("{part} {text} is out of range: a {part} is from 0 to {max}")]
    OutOfRange {
        /// `bus`, `slot` or `function`.
        part: &'static str,
        /// What stands in its place.
        text: String,
        /// The largest number it can have.
        max: u8,
    },
    /// Not one to three parts.
    #[error("'{text}' is not a slot")]
    Parts {
        /// The text.
        text: String,
    },
}

/// How the text after a device's name becomes variables.
#[derive(Clone, Copy, Debug)]
enum Grammar {
    /// `name=value` and `flag` items.
    Options,
    /// The first item is the value of this variable, options follow.
    First(&'static str),
    /// The backend of a serial port.
    Serial,
    /// `hd:path,options` and `cd:path,options`, one per port.
    AhciPorts,
    /// One drive of this type on port 0: `path,options`.
    AhciDrive(&'static str),
    /// Options; the host bridge shows AMD's vendor identity.
    AmdHostBridge,
    /// `name=socket` items, one per port.
    ConsolePorts,
    /// `device[=option]` items, one per USB slot, counted from 1.
    UsbSlots,
    /// `pptN`, `bus/slot/function`, `pcibus:slot:function`, or the address as lspci prints it; then options.
    Passthru,
    /// `sharename=path` and flags.
    Share,
}

/// A PCI device that `-s` can name.
#[derive(Debug)]
pub struct PciDevice {
    /// The name on the command line.
    pub name: &'static str,
    /// The value of the `device` variable. It differs where one model goes by several names.
    pub model: &'static str,
    /// What it is, in a few words.
    pub summary: &'static str,
    /// The form of what follows the name; empty if nothing does.
    pub form: &'static str,
    /// The variables that it, or each of its ports, understands.
    options: &'static [&'static [&'static str]],
    grammar: Grammar,
}

const BLOCK: &[&str] = &["path", "nocache", "nodelete", "sync", "direct", "ro", "sectorsize", "bootindex"];
/// What Apiary adds to each disk: see `docs/disks.md`.
const DISK: &[&str] =
    &["format", "keyfile", "cache", "rerror", "werror", "iops", "riops", "wiops", "bps", "rbps", "wbps"];
const DRIVE: &[&str] = &["nmrr", "ser", "rev", "model"];
const NETWORK: &[&str] =
    &["backend", "type", "mac", "mtu", "path", "peerhook", "socket", "hook", "hostfwd", "bootindex"];
const REGISTERS: &[&str] = &[
    "vendor",
    "devid",
    "pcireg.vendor",
    "pcireg.device",
    "pcireg.revid",
    "pcireg.subvendor",
    "pcireg.subdevice",
];

const BLOCK_FORM: &str = "PATH[,nocache][,direct][,ro][,nodelete][,sectorsize=LOGICAL[/PHYSICAL]][,bootindex=N]\
     [,format=raw|qcow2|vmdk|vhdx|luks][,keyfile=FILE][,cache=writeback|none|writethrough|directsync]\
     [,rerror|werror=stop|report|ignore][,iops|riops|wiops|bps|rbps|wbps=RATE[/BURST]]";
const NETWORK_FORM: &str = "tapN|vmnetN[,mac=XX:XX:XX:XX:XX:XX][,mtu=N] \
     | slirp[,hostfwd=PROTO:ADDR:PORT-ADDR:PORT[;...]] | netgraph,path=NODE,peerhook=HOOK[,socket=NAME][,hook=HOOK]";
const DRIVE_FORM: &str =
    "PATH[,nmrr=RPM][,ser=SERIAL][,rev=REVISION][,model=MODEL][,BLOCK OPTIONS AS virtio-blk]";

/// Every device, in alphabetical order.
pub const DEVICES: &[PciDevice] = &[
    PciDevice {
        name: "ahci",
        model: "ahci",
        summary: "SATA controller with any number of drives up to 32",
        form: "hd:|cd:PATH[,DRIVE OPTIONS AS ahci-hd][,hd:|cd:PATH...]",
        options: &[BLOCK, DISK, DRIVE, &["type"]],
        grammar: Grammar::AhciPorts,
    },
    PciDevice {
        name: "ahci-cd",
        model: "ahci",
        summary: "SATA controller with one CD/DVD drive",
        form: DRIVE_FORM,
        options: &[BLOCK, DISK, DRIVE, &["type"]],
        grammar: Grammar::AhciDrive("cd"),
    },
    PciDevice {
        name: "ahci-hd",
        model: "ahci",
        summary: "SATA controller with one hard disk",
        form: DRIVE_FORM,
        options: &[BLOCK, DISK, DRIVE, &["type"]],
        grammar: Grammar::AhciDrive("hd"),
    },
    PciDevice {
        name: "amd_hostbridge",
        model: "hostbridge",
        summary: "host bridge with AMD's vendor ID",
        form: "",
        options: &[REGISTERS],
        grammar: Grammar::AmdHostBridge,
    },
    PciDevice {
        name: "e1000",
        model: "e1000",
        summary: "Intel 82545 network card",
        form: NETWORK_FORM,
        options: &[NETWORK],
        grammar: Grammar::First("backend"),
    },
    PciDevice {
        name: "fbuf",
        model: "fbuf",
        summary: "frame buffer shown over VNC",
        form: "[rfb=[IP:]PORT][,w=WIDTH][,h=HEIGHT][,vga=io|on|off][,wait][,password=PASSWORD]",
        options: &[&["rfb", "tcp", "w", "h", "vga", "wait", "password"]],
        grammar: Grammar::Options,
    },
    PciDevice {
        name: "hda",
        model: "hda",
        summary: "High Definition Audio controller",
        form: "[play=DEVICE][,rec=DEVICE]",
        options: &[&["play", "rec"]],
        grammar: Grammar::Options,
    },
    PciDevice {
        name: "hostbridge",
        model: "hostbridge",
        summary: "host bridge, usually in slot 0",
        form: "",
        options: &[REGISTERS],
        grammar: Grammar::Options,
    },
    PciDevice {
        name: "lpc",
        model: "lpc",
        summary: "bridge to the devices of option -l, on bus 0",
        form: "",
        options: &[],
        grammar: Grammar::Options,
    },
    PciDevice {
        name: "nvme",
        model: "nvme",
        summary: "NVM Express controller",
        form: "PATH|ram=MIB[,maxq=N][,qsz=N][,ioslots=N][,sectsz=N][,ser=SERIAL][,eui64=N][,dsm=auto|enable|disable][,BLOCK OPTIONS AS virtio-blk]",
        options: &[BLOCK, DISK, &["maxq", "qsz", "ioslots", "sectsz", "ser", "eui64", "dsm", "ram"]],
        grammar: Grammar::First("path"),
    },
    PciDevice {
        name: "passthru",
        model: "passthru",
        summary: "PCI device of the host",
        form: "BUS/SLOT/FUNCTION|pciBUS:SLOT:FUNCTION|BB:SS.F|pptN[,rom=FILE][,bootindex=N]",
        options: &[&["bus", "slot", "func", "pptdev", "rom", "bootindex"]],
        grammar: Grammar::Passthru,
    },
    PciDevice {
        name: "uart",
        model: "uart",
        summary: "16550 serial port on PCI",
        form: "stdio|tcp=IP:PORT|/dev/nmdmNA|/dev/TTY",
        options: &[&["path"]],
        grammar: Grammar::Serial,
    },
    PciDevice {
        name: "virtio-9p",
        model: "virtio-9p",
        summary: "directory of the host as a 9P file system",
        form: "SHARENAME=PATH[,ro]",
        options: &[&["sharename", "path", "ro"]],
        grammar: Grammar::Share,
    },
    PciDevice {
        name: "virtio-blk",
        model: "virtio-blk",
        summary: "block device",
        form: BLOCK_FORM,
        options: &[BLOCK, DISK, &["ser", "queues"]],
        grammar: Grammar::First("path"),
    },
    PciDevice {
        name: "virtio-console",
        model: "virtio-console",
        summary: "up to 16 console ports, each a Unix socket of the host",
        form: "NAME=SOCKET[,NAME=SOCKET...]",
        options: &[&["name", "path"]],
        grammar: Grammar::ConsolePorts,
    },
    PciDevice {
        name: "virtio-input",
        model: "virtio-input",
        summary: "input device of the host",
        form: "/dev/input/eventN",
        options: &[&["path"]],
        grammar: Grammar::First("path"),
    },
    PciDevice {
        name: "virtio-net",
        model: "virtio-net",
        summary: "network card",
        form: NETWORK_FORM,
        options: &[NETWORK],
        grammar: Grammar::First("backend"),
    },
    PciDevice {
        name: "virtio-rnd",
        model: "virtio-rnd",
        summary: "random number generator",
        form: "",
        options: &[],
        grammar: Grammar::Options,
    },
    PciDevice {
        name: "virtio-scsi",
        model: "virtio-scsi",
        summary: "SCSI controller",
        form: "/dev/cam/ctl[PP.VP][,iid=N][,bootindex=N]",
        options: &[&["dev", "iid", "bootindex"]],
        grammar: Grammar::First("dev"),
    },
    PciDevice {
        name: "xhci",
        model: "xhci",
        summary: "USB 3 controller",
        form: "tablet",
        options: &[&["device"]],
        grammar: Grammar::UsbSlots,
    },
];

impl PciDevice {
    /// The device of that command-line name.
    pub fn by_name(name: &str) -> Option<&'static PciDevice> {
        DEVICES.iter().find(|device| device.name == name)
    }

    /// The device whose model the `device` variable names.
    pub fn by_model(model: &str) -> Option<&'static PciDevice> {
        DEVICES.iter().find(|device| device.model == model)
    }

    fn understands(&self, option: &str) -> bool {
        self.options.iter().any(|group| group.contains(&option))
    }
}

/// All names, as error messages list them.
pub(crate) fn known_names() -> String {
    DEVICES.iter().map(|device| device.name).collect::<Vec<_>>().join(", ")
}

/// All models, as error messages list them.
pub(crate) fn known_models() -> String {
    let mut models: Vec<&str> = DEVICES.iter().map(|device| device.model).collect();
    models.sort_unstable();
    models.dedup();
    models.join(", ")
}

/// The name spelt most nearly like `name`.
pub(crate) fn nearest_name(name: &str) -> Option<&'static str> {
    nearest(name, DEVICES.iter().map(|device| device.name))
}

/// What `-s help` prints: one device name per line.
pub fn device_list() -> String {
    DEVICES.iter().map(|device| format!("{}\n", device.name)).collect()
}

/// The most ports that an AHCI controller has (AHCI 1.3.1 §1.1).
const MAX_AHCI_PORTS: usize = 32;
/// The most ports of a virtio console (bhyve(8)).
const MAX_CONSOLE_PORTS: usize = 16;

/// Reads an argument of `-s`, other than `help`, into the tree. Options that the device does not know are kept, as
/// bhyve does, and noted.
pub(crate) fn add_device(
    tree: &mut Tree,
    notes: &mut Vec<String>,
    argument: &str,
) -> Result<(), ArgumentError> {
    let (slot, rest) = argument.split_once(',').ok_or(ArgumentError::NoDevice)?;
    let address = parse_slot(slot)?;
    let (name, conf) = match rest.split_once(',') {
        Some((name, conf)) => (name, Some(conf)),
        None => (rest, None),
    };
    if name.is_empty() {
        return Err(ArgumentError::NoDevice);
    }
    let device = PciDevice::by_name(name).ok_or_else(|| ArgumentError::UnknownDevice {
        device: name.to_owned(),
        suggestion: nearest_name(name),
        known: known_names(),
    })?;
    let node = address.node();
    if let Some(occupant) = tree.raw(&format!("{node}.device")) {
        return Err(ArgumentError::SlotTaken { address, occupant: occupant.to_owned() });
    }
    let mut reader = Reader { tree, notes, device, node: node.clone() };
    reader.set("device", device.model)?;
    reader.read(conf)
}

/// Reads `slot`, `slot:function` or `bus:slot:function`.
fn parse_slot(text: &str) -> Result<PciAddress, PciAddressError> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts[..] {
        [slot] => PciAddress::from_decimal("0", slot, "0"),
        [slot, function] => PciAddress::from_decimal("0", slot, function),
        [bus, slot, function] => PciAddress::from_decimal(bus, slot, function),
        _ => Err(PciAddressError::Parts { text: text.to_owned() }),
    }
}

/// Sets the variables of one device.
struct Reader<'t> {
    tree: &'t mut Tree,
    notes: &'t mut Vec<String>,
    device: &'static PciDevice,
    node: String,
}

impl Reader<'_> {
    fn set(&mut self, name: &str, value: &str) -> Result<(), ArgumentError> {
        Ok(self.tree.set(&format!("{}.{name}", self.node), value)?)
    }

    /// Sets what `name=value` or `flag` says, below the node `prefix` of the device (which ends in a dot, or is
    /// empty).
    fn option(&mut self, prefix: &str, item: &str) -> Result<(), ArgumentError> {
        let (name, value) = item.split_once('=').unwrap_or((item, "true"));
        if name.is_empty() {
            return Err(ArgumentError::EmptyOption { item: item.to_owned() });
        }
        if value.is_empty() {
            return Err(ArgumentError::NoValue { option: name.to_owned() });
        }
        if !self.device.understands(name) {
            let hint = nearest(name, self.device.options.iter().copied().flatten().copied())
                .map(|near| format!("; did you mean '{near}'?"))
                .unwrap_or_default();
            self.notes.push(format!("{} has no option '{name}'; it is ignored{hint}", self.device.name));
        }
        check_option(name, value)
            .map_err(|problem| ArgumentError::Option { option: name.to_owned(), problem })?;
        self.set(&format!("{prefix}{name}"), value)
    }

    fn options(&mut self, prefix: &str, items: &str) -> Result<(), ArgumentError> {
        items.split(',').try_for_each(|item| self.option(prefix, item))
    }

    /// The first item as the value of `variable`, unless it already is an option of the device; options follow.
    fn first(&mut self, prefix: &str, variable: &str, conf: &str) -> Result<(), ArgumentError> {
        let (first, rest) = match conf.split_once(',') {
            Some((first, rest)) => (first, Some(rest)),
            None => (conf, None),
        };
        match first.split_once('=') {
            Some((name, _)) if self.device.understands(name) => self.option(prefix, first)?,
            _ if first.is_empty() => return Err(ArgumentError::NoValue { option: variable.to_owned() }),
            _ => self.set(&format!("{prefix}{variable}"), first)?,
        }
        rest.map_or(Ok(()), |rest| self.options(prefix, rest))
    }

    fn read(&mut self, conf: Option<&str>) -> Result<(), ArgumentError> {
        match self.device.grammar {
            Grammar::AmdHostBridge => {
                self.set("pcireg.vendor", "0x1022")?;
                self.set("pcireg.device", "0x7432")?;
            }
            Grammar::AhciDrive(kind) => self.set("port.0.type", kind)?,
            _ => {}
        }
        let Some(conf) = conf else { return Ok(()) };
        match self.device.grammar {
            Grammar::Options | Grammar::AmdHostBridge => self.options("", conf),
            Grammar::First(variable) => self.first("", variable, conf),
            Grammar::Serial => {
                checked::<SerialBackend>(conf)?;
                self.set("path", conf)
            }
            Grammar::AhciPorts => self.ahci_ports(conf),
            Grammar::AhciDrive(_) => self.first("port.0.", "path", conf),
            Grammar::ConsolePorts => self.console_ports(conf),
            Grammar::UsbSlots => self.usb_slots(conf),
            Grammar::Passthru => self.passthru(conf),
            Grammar::Share => self.share(conf),
        }
    }

    /// A port ends where the next `hd:` or `cd:` begins; the options between belong to it.
    fn ahci_ports(&mut self, conf: &str) -> Result<(), ArgumentError> {
        let mut ports: Vec<(&str, Vec<&str>)> = Vec::new();
        for item in conf.split(',') {
            let kind = ["hd", "cd"]
                .into_iter()
                .find_map(|kind| item.strip_prefix(kind)?.strip_prefix(':').map(|path| (kind, path)));
            match (kind, ports.last_mut()) {
                (Some((kind, path)), _) => ports.push((kind, vec![path])),
                (None, Some((_, options))) => options.push(item),
                (None, None) => return Err(ArgumentError::AhciPort { item: item.to_owned() }),
            }
        }
        if ports.len() > MAX_AHCI_PORTS {
            return Err(ArgumentError::TooManyPorts { count: ports.len(), max: MAX_AHCI_PORTS });
        }
        for (number, (kind, items)) in ports.into_iter().enumerate() {
            let prefix = format!("port.{number}.");
            self.set(&format!("{prefix}type"), kind)?;
            self.first(&prefix, "path", &items.join(","))?;
        }
        Ok(())
    }

    fn console_ports(&mut self, conf: &str) -> Result<(), ArgumentError> {
        let count = conf.split(',').count();
        if count > MAX_CONSOLE_PORTS {
            return Err(ArgumentError::TooManyPorts { count, max: MAX_CONSOLE_PORTS });
        }
        for (number, item) in conf.split(',').enumerate() {
            let (name, path) = match item.split_once('=') {
                Some((name, path)) if !name.is_empty() && !path.is_empty() => (name, path),
                _ => return Err(ArgumentError::ConsolePort { item: item.to_owned() }),
            };
            self.set(&format!("port.{number}.name"), name)?;
            self.set(&format!("port.{number}.path"), path)?;
        }
        Ok(())
    }

    fn usb_slots(&mut self, conf: &str) -> Result<(), ArgumentError> {
        for (index, item) in conf.split(',').enumerate() {
            let (device, option) = match item.split_once('=') {
                Some((device, option)) => (device, Some(option)),
                None => (item, None),
            };
            if device != "tablet" {
                return Err(ArgumentError::UnknownUsbDevice { device: device.to_owned() });
            }
            let prefix = format!("slot.{}.", index + 1);
            self.set(&format!("{prefix}device"), device)?;
            if let Some(option) = option.filter(|option| !option.is_empty()) {
                self.option(&prefix, option)?;
            }
        }
        Ok(())
    }

    fn passthru(&mut self, conf: &str) -> Result<(), ArgumentError> {
        let (host, rest) = match conf.split_once(',') {
            Some((host, rest)) => (host, Some(rest)),
            None => (conf, None),
        };
        if host.strip_prefix("ppt").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            self.set("pptdev", host)?;
        } else if host.split_once('=').is_some_and(|(name, _)| self.device.understands(name)) {
            self.option("", host)?;
        } else {
            let address = host_address(host)?;
            self.set("bus", &address.bus.to_string())?;
            self.set("slot", &address.slot.to_string())?;
            self.set("func", &address.function.to_string())?;
        }
        rest.map_or(Ok(()), |rest| self.options("", rest))
    }

    fn share(&mut self, conf: &str) -> Result<(), ArgumentError> {
        let mut named = false;
        for item in conf.split(',') {
            match item.split_once('=') {
                Some(("ro", _)) if named => self.option("", item)?,
                Some(_) if named => return Err(ArgumentError::SecondShare { item: item.to_owned() }),
                Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                    named = true;
                    self.set("sharename", name)?;
                    self.set("path", path)?;
                }
                Some(_) => return Err(ArgumentError::EmptyOption { item: item.to_owned() }),
                None => self.option("", item)?,
            }
        }
        Ok(())
    }
}

/// Checks the value of an option whose name says its type, unless it refers to variables, which may still change.
fn check_option(name: &str, value: &str) -> Result<(), ValueError> {
    if value.contains('%') {
        return Ok(());
    }
    let number = |min, max| match parse_integer(value)? {
        number if (min..=max).contains(&number) => Ok(()),
        _ => Err(ValueError::OutOfRange { value: value.to_owned(), min, max }),
    };
    let word = |words: &[&str], accepted| {
        let known = words.contains(&value);
        if known { Ok(()) } else { Err(ValueError::Word { value: value.to_owned(), accepted }) }
    };
    let at_most = |max| {
        let length = value.chars().count();
        if length <= max { Ok(()) } else { Err(ValueError::TooLong { value: value.to_owned(), length, max }) }
    };
    match name {
        "nocache" | "nodelete" | "sync" | "direct" | "ro" | "wait" => parse_bool(value).map(drop),
        "mac" => value.parse::<MacAddr>().map(drop),
        "mtu" => number(68, 65535),
        "w" => number(640, 1920),
        "h" => number(480, 1200),
        "rfb" | "tcp" => parse_socket_address(value).map(drop),
        "bootindex" | "iid" => number(0, i32::MAX.into()),
        "nmrr" => number(0, u16::MAX.into()),
        "maxq" | "qsz" | "ioslots" | "ram" => number(1, i32::MAX.into()),
        "sectorsize" => value.parse::<SectorSize>().map(drop),
        "sectsz" => word(&["512", "4096", "8192"], "512, 4096, 8192"),
        "format" => word(&["raw", "qcow2", "vmdk", "vhdx", "luks"], "raw, qcow2, vmdk, vhdx, luks"),
        "cache" => word(
            &["writeback", "none", "writethrough", "directsync"],
            "writeback, none, writethrough, directsync",
        ),
        "rerror" | "werror" => word(&["stop", "report", "ignore"], "stop, report, ignore"),
        "queues" => number(1, 8),
        "iops" | "riops" | "wiops" | "bps" | "rbps" | "wbps" => limit(value).map(drop),
        "dsm" => word(&["auto", "enable", "disable"], "auto, enable, disable"),
        "vga" => word(&["io", "on", "off"], "io, on, off"),
        "ser" => at_most(20),
        "rev" => at_most(8),
        "model" => at_most(40),
        _ => Ok(()),
    }
}

/// A limit of a disk: so much per second, and how much at once after a time of rest: `RATE[/BURST]`, each with an optional suffix as
/// in expand_number(3).
///
/// # Errors
/// Not a number, or zero.
pub fn limit(text: &str) -> Result<(u64, Option<u64>), ValueError> {
    let size = |text: &str| match parse_size(text)? {
        0 => Err(ValueError::OutOfRange { value: text.to_owned(), min: 1, max: i64::MAX }),
        size => Ok(size),
    };
    match text.split_once('/') {
        None => Ok((size(text)?, None)),
        Some((rate, burst)) => Ok((size(rate)?, Some(size(burst)?))),
    }
}

/// A host device: `bus/slot/function`, `pci[0:]bus:slot:function` or `[0000:]bb:ss.f`.
fn host_address(text: &str) -> Result<PciAddress, ArgumentError> {
    let error = || ArgumentError::HostDevice { text: text.to_owned() };
    let outside = |problem| ArgumentError::HostAddress { text: text.to_owned(), problem };
    if let Some(address) = PciAddress::from_linux(text) {
        return address.map_err(outside);
    }
    let parts: Vec<&str> = match text.strip_prefix("pci") {
        Some(selector) => selector.split(':').collect(),
        None => text.split('/').collect(),
    };
    let (bus, slot, function) = match parts[..] {
        [bus, slot, function] => (bus, slot, function),
        ["0", bus, slot, function] if text.starts_with("pci") => (bus, slot, function),
        _ => return Err(error()),
    };
    PciAddress::from_decimal(bus, slot, function).map_err(outside)
}
