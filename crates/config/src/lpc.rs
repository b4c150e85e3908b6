//! Devices behind the LPC bridge: `-l device[,conf]` of bhyve(8), variables below `lpc` and `tpm`
//! (bhyve_config(5), "LPC Device Settings").

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::cli::ArgumentError;
use crate::error::nearest;
use crate::tree::Tree;
use crate::value::{ValueError, parse_socket_address};

/// A device that `-l` can name.
#[derive(Debug)]
pub struct LpcDevice {
    /// The name on the command line, in any case.
    pub name: &'static str,
    /// What it is, in a few words.
    pub summary: &'static str,
    /// The form of what follows the name; empty if nothing does.
    pub form: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    BootRom,
    Serial,
    FwCfg,
    TestDevice,
    Tpm,
}

const SERIAL_FORM: &str = "stdio|tcp=IP:PORT|/dev/nmdmNA|/dev/TTY";

/// Every device.
pub const DEVICES: &[LpcDevice] = &[
    LpcDevice {
        name: "bootrom",
        summary: "firmware below 4 GiB, with a file for its variables",
        form: "FILE[,VARIABLE FILE][,fwcfg=bhyve|qemu]",
        kind: Kind::BootRom,
    },
    LpcDevice { name: "com1", summary: "serial port at 0x3f8", form: SERIAL_FORM, kind: Kind::Serial },
    LpcDevice { name: "com2", summary: "serial port at 0x2f8", form: SERIAL_FORM, kind: Kind::Serial },
    LpcDevice { name: "com3", summary: "serial port at 0x3e8", form: SERIAL_FORM, kind: Kind::Serial },
    LpcDevice { name: "com4", summary: "serial port at 0x2e8", form: SERIAL_FORM, kind: Kind::Serial },
    LpcDevice {
        name: "fwcfg",
        summary: "firmware configuration interface",
        form: "bhyve|qemu",
        kind: Kind::FwCfg,
    },
    LpcDevice { name: "pc-testdev", summary: "debug and test device", form: "", kind: Kind::TestDevice },
    LpcDevice {
        name: "tpm",
        summary: "trusted platform module",
        form: "passthru|swtpm,PATH[,version=2.0]",
        kind: Kind::Tpm,
    },
];

/// What `-l help` prints: one device name per line.
pub fn device_list() -> String {
    DEVICES.iter().map(|device| format!("{}\n", device.name)).collect()
}

/// The words that `lpc.fwcfg` takes.
const FWCFG_WORDS: &str = "bhyve, qemu";

/// Which firmware configuration interface the guest finds (`lpc.fwcfg`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FwCfgInterface {
    /// bhyve's fwctl.
    #[default]
    Bhyve,
    /// QEMU's fw_cfg.
    Qemu,
}

impl FromStr for FwCfgInterface {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "bhyve" => Ok(Self::Bhyve),
            "qemu" => Ok(Self::Qemu),
            _ => Err(ValueError::Word { value: text.to_owned(), accepted: FWCFG_WORDS }),
        }
    }
}

/// The two ends of a null-modem cable (nmdm(4)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum NullModemEnd {
    A,
    B,
}

/// Where the bytes of a serial port go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialBackend {
    /// The process's standard input and output.
    Stdio,
    /// One end of the null-modem pair `/dev/nmdmUNIT`.
    NullModem {
        /// What stands between `nmdm` and the letter.
        unit: String,
        /// The end that the guest holds; the user takes the other.
        end: NullModemEnd,
    },
    /// A TCP port to listen on.
    Tcp(SocketAddr),
    /// A terminal device of the host.
    Device(PathBuf),
}

impl FromStr for SerialBackend {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "stdio" {
            return Ok(Self::Stdio);
        }
        if let Some(address) = text.strip_prefix("tcp=") {
            return parse_socket_address(address).map(Self::Tcp);
        }
        if let Some(name) = text.strip_prefix("/dev/nmdm") {
            let end = match name.chars().last() {
                Some('A') => NullModemEnd::A,
                Some('B') => NullModemEnd::B,
                _ => return Err(ValueError::SerialBackend { value: text.to_owned() }),
            };
            let unit = &name[..name.len() - 1];
            if unit.is_empty()
                || !unit.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
            {
                return Err(ValueError::SerialBackend { value: text.to_owned() });
            }
            return Ok(Self::NullModem { unit: unit.to_owned(), end });
        }
        if text.contains('/') {
            return Ok(Self::Device(PathBuf::from(text)));
        }
        Err(ValueError::SerialBackend { value: text.to_owned() })
    }
}

impl fmt::Display for SerialBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => write!(f, "stdio"),
            Self::NullModem { unit, end } => write!(f, "/dev/nmdm{unit}{end:?}"),
            Self::Tcp(address) => write!(f, "tcp={address}"),
            Self::Device(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Reads an argument of `-l`, other than `help`, into the tree.
pub(crate) fn add_device(
    tree: &mut Tree,
    notes: &mut Vec<String>,
    argument: &str,
) -> Result<(), ArgumentError> {
    // `fwcfg=qemu` is as clear as `fwcfg,qemu`.
    let (name, conf) = match argument.split_once([',', '=']) {
        Some((name, conf)) => (name, Some(conf)),
        None => (argument, None),
    };
    let device = DEVICES.iter().find(|device| device.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
        let names = || DEVICES.iter().map(|device| device.name);
        ArgumentError::UnknownDevice {
            device: name.to_owned(),
            suggestion: nearest(name, names()),
            known: names().collect::<Vec<_>>().join(", "),
        }
    })?;
    let conf = conf.filter(|conf| !conf.is_empty());
    let needs = || ArgumentError::NeedsConf { device: device.name, form: device.form };
    match (device.kind, conf) {
        (Kind::TestDevice, None) => tree.set_bool("lpc.pc-testdev", true)?,
        (Kind::TestDevice, Some(conf)) => return Err(ArgumentError::EmptyOption { item: conf.to_owned() }),
        (_, None) => return Err(needs()),
        (Kind::Serial, Some(conf)) => {
            checked::<SerialBackend>(conf)?;
            tree.set(&format!("lpc.{}.path", device.name), conf)?;
        }
        (Kind::FwCfg, Some(conf)) => {
            checked::<FwCfgInterface>(conf)?;
            tree.set("lpc.fwcfg", conf)?;
        }
        (Kind::BootRom, Some(conf)) => boot_rom(tree, notes, conf)?,
        (Kind::Tpm, Some(conf)) => {
            let mut items = conf.split(',');
            let (kind, path) = items.next().zip(items.next()).ok_or_else(needs)?;
            if kind.is_empty() || path.is_empty() {
                return Err(needs());
            }
            tree.set("tpm.type", kind)?;
            tree.set("tpm.path", path)?;
            for item in items {
                option(tree, notes, "tpm", &["version", "intf", "ppi"], item)?;
            }
            tree.set_if_unset("tpm.version", "2.0")?;
        }
    }
    Ok(())
}

/// `FILE[,VARIABLE FILE][,options]`; the second item is an option if it has an equals sign.
fn boot_rom(tree: &mut Tree, notes: &mut Vec<String>, conf: &str) -> Result<(), ArgumentError> {
    let mut items = conf.split(',');
    tree.set("lpc.bootrom", items.next().unwrap_or_default())?;
    for (index, item) in items.enumerate() {
        if index == 0 && !item.contains('=') {
            tree.set("lpc.bootvars", item)?;
        } else {
            if let Some(interface) = item.strip_prefix("fwcfg=") {
                checked::<FwCfgInterface>(interface)?;
            }
            option(tree, notes, "lpc", &["fwcfg", "bootvars"], item)?;
        }
    }
    Ok(())
}

fn option(
    tree: &mut Tree,
    notes: &mut Vec<String>,
    node: &str,
    known: &[&'static str],
    item: &str,
) -> Result<(), ArgumentError> {
    let (name, value) = item.split_once('=').unwrap_or((item, "true"));
    if name.is_empty() {
        return Err(ArgumentError::EmptyOption { item: item.to_owned() });
    }
    if value.is_empty() {
        return Err(ArgumentError::NoValue { option: name.to_owned() });
    }
    if !known.contains(&name) {
        notes.push(format!("there is no option '{name}' here; it is ignored (known: {})", known.join(", ")));
    }
    Ok(tree.set(&format!("{node}.{name}"), value)?)
}

/// Checks a value at once unless it refers to variables, which may still change.
pub(crate) fn checked<T: FromStr<Err = ValueError>>(text: &str) -> Result<(), ValueError> {
    if text.contains('%') { Ok(()) } else { text.parse::<T>().map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_backends() {
        for (text, backend) in [
            ("stdio", SerialBackend::Stdio),
            ("tcp=127.0.0.1:9000", SerialBackend::Tcp("127.0.0.1:9000".parse().unwrap())),
            ("tcp=[::1]:9000", SerialBackend::Tcp("[::1]:9000".parse().unwrap())),
            ("/dev/nmdm0A", SerialBackend::NullModem { unit: "0".into(), end: NullModemEnd::A }),
            ("/dev/nmdmweb-1B", SerialBackend::NullModem { unit: "web-1".into(), end: NullModemEnd::B }),
            ("/dev/ttyS1", SerialBackend::Device("/dev/ttyS1".into())),
            ("./pty", SerialBackend::Device("./pty".into())),
        ] {
            assert_eq!(text.parse(), Ok(backend.clone()), "{text}");
            assert_eq!(backend.to_string(), text);
        }
        for text in
            ["", "sdtio", "tcp=", "tcp=x:1", "/dev/nmdm0", "/dev/nmdmA", "/dev/nmdm0/A", "/dev/nmdm0C"]
        {
            assert!(text.parse::<SerialBackend>().is_err(), "{text}");
        }
    }
}
