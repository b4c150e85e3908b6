//! The value types of bhyve_config(5): booleans, strtol(3) integers, expand_number(3) sizes, and the few that
//! bhyve(8) reads from strings of its own: memory sizes, UUIDs, MAC addresses, sets of host processors.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// A value that is not of its type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not one of the words for true and false.
    #[error("'{value}' is not a boolean: use true, on, yes or 1, or false, off, no or 0")]
    Boolean {
        /// The value.
        value: String,
    },
    /// Not an integer, or one beyond 64 bits.
    #[error("'{value}' is not an integer: use decimal, 0x hexadecimal or 0 octal digits")]
    Integer {
        /// The value.
        value: String,
    },
    /// An integer outside the range of its variable.
    #[error("'{value}' is out of range: from {min} to {max}")]
    OutOfRange {
        /// The value.
        value: String,
        /// The smallest that is accepted.
        min: i64,
        /// The largest that is accepted.
        max: i64,
    },
    /// Not a size.
    #[error("'{value}' is not a size: use a whole number, with K, M, G or T for its unit")]
    Size {
        /// The value.
        value: String,
    },
    /// A size beyond what 64 bits hold.
    #[error("'{value}' is too large a size")]
    SizeOverflow {
        /// The value.
        value: String,
    },
    /// A size that no memory of a virtual machine can have.
    #[error("'{value}' is not a usable memory size: {reason}")]
    MemorySize {
        /// The value.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// Not a UUID.
    #[error("'{value}' is not a UUID: use the form 01234567-89ab-cdef-0123-456789abcdef")]
    Uuid {
        /// The value.
        value: String,
    },
    /// Not a MAC address.
    #[error("'{value}' is not a MAC address: use six hexadecimal numbers, as in 00:be:fa:76:45:00")]
    Mac {
        /// The value.
        value: String,
    },
    /// A MAC address that no card can have.
    #[error("'{value}' cannot be the address of a network card: it is {kind}")]
    MacNotUnicast {
        /// The value.
        value: String,
        /// What it is instead.
        kind: &'static str,
    },
    /// Not a set of host processors.
    #[error("'{value}' is not a set of host CPUs: use numbers and ranges below {MAX_HOST_CPUS}, as in 0-3,8")]
    CpuSet {
        /// The value.
        value: String,
    },
    /// Not an address and port.
    #[error("'{value}' is not an address and port: use IPv4:PORT, [IPv6]:PORT or PORT")]
    SocketAddress {
        /// The value.
        value: String,
    },
    /// Not one of a few words.
    #[error("'{value}' is not one of {accepted}")]
    Word {
        /// The value.
        value: String,
        /// The words.
        accepted: &'static str,
    },
    /// Text for a field of fixed length.
    #[error("'{value}' has {length} characters, the field holds {max}")]
    TooLong {
        /// The value.
        value: String,
        /// Its length in characters.
        length: usize,
        /// The most that fit.
        max: usize,
    },
    /// Not the sector sizes of a disk.
    #[error(
        "'{value}' is not a sector size: use LOGICAL or LOGICAL/PHYSICAL, powers of two from 512 to 65536, the physical one not the smaller"
    )]
    SectorSize {
        /// The value.
        value: String,
    },
    /// Not a list of processor features.
    #[error("'{item}' is not a CPU feature change: use +feature or -feature, separated by commas")]
    Feature {
        /// The item of the list.
        item: String,
    },
    /// Not a name that a virtual machine can have.
    #[error("'{name}' cannot be the name of a virtual machine: {reason}")]
    VmName {
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// Not a serial port backend.
    #[error(
        "'{value}' is no backend for a serial port: use stdio, tcp=ADDRESS:PORT, /dev/nmdmNA, /dev/nmdmNB or the path of a terminal device"
    )]
    SerialBackend {
        /// The value.
        value: String,
    },
}

/// bhyve_config(5): "the following case-insensitive values".
pub fn parse_bool(text: &str) -> Result<bool, ValueError> {
    let is = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is(["true", "on", "yes", "1"]) {
        Ok(true)
    } else if is(["false", "off", "no", "0"]) {
        Ok(false)
    } else {
        Err(ValueError::Boolean { value: text.to_owned() })
    }
}

/// Splits the digits of a C integer constant (base from its prefix: `0x`, `0` or none) from what follows them.
/// `None` if there are no digits or they exceed 64 bits.
fn leading_digits(text: &str) -> Option<(Option<u64>, &str)> {
    let (base, digits) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if hex.starts_with(|c: char| c.is_ascii_hexdigit()) => (16, hex),
        _ if text.starts_with('0') => (8, text),
        _ => (10, text),
    };
    let end = digits.find(|c: char| !c.is_digit(base)).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    (!digits.is_empty()).then(|| (u64::from_str_radix(digits, base).ok(), rest))
}

/// An integer in any syntax that strtol(3) takes with base 0: sign, decimal, `0x` hexadecimal, `0` octal.
pub fn parse_integer(text: &str) -> Result<i64, ValueError> {
    let error = || ValueError::Integer { value: text.to_owned() };
    let trimmed = text.trim_start();
    let (negative, digits) = match trimmed.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, trimmed.strip_prefix('+').unwrap_or(trimmed)),
    };
    match leading_digits(digits) {
        Some((Some(magnitude), "")) => {
            let value = if negative { -i128::from(magnitude) } else { i128::from(magnitude) };
            i64::try_from(value).map_err(|_| error())
        }
        _ => Err(error()),
    }
}

/// A number of bytes as expand_number(3) reads it: an integer and an optional suffix K, M, G, T, P or E in either
/// case, each 1024 times the one before; a further `B` or `iB` is taken too.
pub fn parse_size(text: &str) -> Result<u64, ValueError> {
    parse_size_and_unit(text).map(|(bytes, _)| bytes)
}

/// The bytes and whether a unit was given.
fn parse_size_and_unit(text: &str) -> Result<(u64, bool), ValueError> {
    let error = || ValueError::Size { value: text.to_owned() };
    let overflow = || ValueError::SizeOverflow { value: text.to_owned() };
    let (number, suffix) = leading_digits(text).ok_or_else(error)?;
    let unit = suffix.to_ascii_lowercase();
    let unit = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')) {
        Some(stem) if !stem.is_empty() => stem,
        _ => &unit,
    };
    let shift = match unit {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(error()),
    };
    let bytes = number.and_then(|n| n.checked_mul(1 << shift)).ok_or_else(overflow)?;
    Ok((bytes, !suffix.is_empty()))
}

const MIB: u64 = 1 << 20;

/// Guest memory is made of whole pages.
const PAGE: u64 = 4096;

/// What x86-64 can address physically: 52 bits (SDM 3A §5.1.4).
const MAX_MEMORY: u64 = 1 << 52;

/// The size of guest memory (`-m`, `memory.size`): as [`parse_size`], but a bare number below 1048576 counts
/// mebibytes and a larger one bytes, as it has always been in bhyve.
pub fn parse_memory_size(text: &str) -> Result<u64, ValueError> {
    let (number, has_unit) = parse_size_and_unit(text)?;
    let bytes = if !has_unit && number < MIB { number * MIB } else { number };
    let reason = if bytes < MIB {
        "it is less than one megabyte"
    } else if bytes > MAX_MEMORY {
        "it is more than an x86-64 processor can address"
    } else if !bytes.is_multiple_of(PAGE) {
        "it is not a multiple of 4096 bytes"
    } else {
        return Ok(bytes);
    };
    Err(ValueError::MemorySize { value: text.to_owned(), reason })
}

/// A universally unique identifier, its sixteen bytes in the order in which they are written (RFC 9562 §4).
/// SMBIOS stores the first three fields little-endian; [`Uuid::smbios_bytes`] gives that order.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// The bytes as the SMBIOS system information structure has them (SMBIOS 3.6 §7.2.1).
    pub fn smbios_bytes(&self) -> [u8; 16] {
        let mut bytes = self.0;
        bytes[0..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    }
}

impl FromStr for Uuid {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || ValueError::Uuid { value: text.to_owned() };
        const HYPHENS: [usize; 4] = [8, 13, 18, 23];
        if text.len() != 36 || !text.is_ascii() {
            return Err(error());
        }
        let mut digits = Vec::with_capacity(32);
        for (at, byte) in text.bytes().enumerate() {
            match (HYPHENS.contains(&at), (byte as char).to_digit(16)) {
                (true, _) if byte == b'-' => {}
                (false, Some(digit)) => digits.push(digit as u8),
                _ => return Err(error()),
            }
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let hyphen = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{hyphen}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The address of a network card, written as in ethers(5).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl FromStr for MacAddr {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || ValueError::Mac { value: text.to_owned() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if !matches!(part.len(), 1 | 2) || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        const GROUP_BIT: u8 = 1;
        let not_unicast = |kind| Err(ValueError::MacNotUnicast { value: text.to_owned(), kind });
        if bytes == [0; 6] {
            not_unicast("all zeros")
        } else if bytes[0] & GROUP_BIT != 0 {
            not_unicast("a multicast or broadcast address")
        } else {
            Ok(Self(bytes))
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The sector sizes of a disk, in bytes (`sectorsize=LOGICAL[/PHYSICAL]`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SectorSize {
    pub logical: u32,
    pub physical: u32,
}

impl FromStr for SectorSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let size = |text: &str| {
            let size = u32::try_from(parse_integer(text).ok()?).ok()?;
            (size.is_power_of_two() && (512..=65536).contains(&size)).then_some(size)
        };
        let (logical, physical) = text.split_once('/').unwrap_or((text, text));
        match (size(logical), size(physical)) {
            (Some(logical), Some(physical)) if logical <= physical => Ok(Self { logical, physical }),
            _ => Err(ValueError::SectorSize { value: text.to_owned() }),
        }
    }
}

/// Host processors are numbered below this; it is the size of glibc's `cpu_set_t`.
pub const MAX_HOST_CPUS: u32 = 1024;

/// A set of host processors that a virtual one may run on (`vcpu.N.cpuset`): numbers and ranges, as in `0-3,8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpus(pub BTreeSet<u32>);

impl FromStr for HostCpus {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || ValueError::CpuSet { value: text.to_owned() };
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| *n < MAX_HOST_CPUS).ok_or_else(error);
        let mut cpus = BTreeSet::new();
        for item in text.split(',') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(error());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

/// Reads `IPv4:PORT`, `[IPv6]:PORT` or, on the local host, `PORT`.
pub fn parse_socket_address(text: &str) -> Result<SocketAddr, ValueError> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse().map_err(|_| ValueError::SocketAddress { value: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn booleans() {
        for text in ["true", "on", "yes", "1", "TRUE", "On", "yEs"] {
            assert_eq!(parse_bool(text), Ok(true), "{text}");
        }
        for text in ["false", "off", "no", "0", "FALSE", "Off"] {
            assert_eq!(parse_bool(text), Ok(false), "{text}");
        }
        for text in ["", "2", "t", "y", " true", "enable"] {
            assert!(parse_bool(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers() {
        for (text, value) in [
            ("0", 0),
            ("42", 42),
            ("-7", -7),
            ("+7", 7),
            (" 7", 7),
            ("0x1F", 31),
            ("0X1f", 31),
            ("-0x10", -16),
            ("010", 8),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
            ("0xffff", 65535),
        ] {
            assert_eq!(parse_integer(text), Ok(value), "{text}");
        }
        for text in
            ["", "-", "x", "0x", "08", "1 ", "1k", "--1", "+-1", "9223372036854775808", "0x10000000000000000"]
        {
            assert!(parse_integer(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("3m", 3 << 20),
            ("4G", 4 << 30),
            ("2t", 2 << 40),
            ("1P", 1 << 50),
            ("1e", 1 << 60),
            ("7b", 7),
            ("1KB", 1 << 10),
            ("1GiB", 1 << 30),
            ("0x10M", 16 << 20),
            ("010K", 8 << 10),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1X", "1 G", "1GG", "1iB", "09"] {
            assert!(matches!(parse_size(text), Err(ValueError::Size { .. })), "{text}");
        }
        for text in ["16E", "18446744073709551616", "18446744073709551615K"] {
            assert!(matches!(parse_size(text), Err(ValueError::SizeOverflow { .. })), "{text}");
        }
    }

    #[test]
    fn memory_sizes() {
        for (text, bytes) in [
            ("256", 256 << 20),
            ("256M", 256 << 20),
            ("1048575", 1048575 << 20),
            ("1048576", 1 << 20),
            ("536870912", 512 << 20),
            ("1024k", 1 << 20),
            ("4g", 4 << 30),
            ("100T", 100 << 40),
        ] {
            assert_eq!(parse_memory_size(text), Ok(bytes), "{text}");
        }
        for text in ["0", "4K", "1048577", "8P", "0M", "512b"] {
            assert!(matches!(parse_memory_size(text), Err(ValueError::MemorySize { .. })), "{text}");
        }
    }

    #[test]
    fn uuids() {
        let text = "FEDCba98-7654-3210-0123-456789abcdef";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!(uuid.to_string(), text.to_lowercase());
        assert_eq!(uuid.smbios_bytes()[..8], [0x98, 0xba, 0xdc, 0xfe, 0x54, 0x76, 0x10, 0x32]);
        assert_eq!(uuid.smbios_bytes()[8..], uuid.0[8..]);
        for text in [
            "",
            "fedcba98765432100123456789abcdef",
            "gedcba98-7654-3210-0123-456789abcdef",
            "fedcba98-7654-3210-0123-456789abcde",
            "fedcba987-654-3210-0123-456789abcdef",
            "日本語日本語日本語日本語",
        ] {
            assert!(text.parse::<Uuid>().is_err(), "{text}");
        }
    }

    #[test]
    fn mac_addresses() {
        assert_eq!("00:be:FA:76:45:00".parse(), Ok(MacAddr([0, 0xbe, 0xfa, 0x76, 0x45, 0])));
        assert_eq!("2:0:0:0:0:a".parse::<MacAddr>().unwrap().to_string(), "02:00:00:00:00:0a");
        for text in
            ["", "00:be:fa:76:45", "00:be:fa:76:45:00:00", "00-be-fa-76-45-00", "0:1:2:3:4:+5", "0:1:2:3:4:"]
        {
            assert!(matches!(text.parse::<MacAddr>(), Err(ValueError::Mac { .. })), "{text}");
        }
        for text in ["0:0:0:0:0:0", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"] {
            assert!(matches!(text.parse::<MacAddr>(), Err(ValueError::MacNotUnicast { .. })), "{text}");
        }
    }

    #[test]
    fn sector_sizes() {
        assert_eq!("4096".parse(), Ok(SectorSize { logical: 4096, physical: 4096 }));
        assert_eq!("512/4096".parse(), Ok(SectorSize { logical: 512, physical: 4096 }));
        for text in ["", "0", "256", "513", "4096/512", "512/", "512/4096/1", "-512", "131072"] {
            assert!(text.parse::<SectorSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn host_cpu_sets() {
        assert_eq!("0-2,8,2".parse(), Ok(HostCpus([0, 1, 2, 8].into())));
        assert_eq!("1023".parse(), Ok(HostCpus([1023].into())));
        for text in ["", "1024", "3-1", "1,", "a", "1-2-3", "-1", "0-4000000000"] {
            assert!(text.parse::<HostCpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn socket_addresses() {
        assert_eq!(parse_socket_address("5900").unwrap().to_string(), "127.0.0.1:5900");
        assert_eq!(parse_socket_address("0.0.0.0:59").unwrap().to_string(), "0.0.0.0:59");
        assert_eq!(parse_socket_address("[::]:5900").unwrap().to_string(), "[::]:5900");
        for text in ["", ":1", "localhost:1", "1.2.3.4", "70000", "::1:5900x"] {
            assert!(parse_socket_address(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn integers_of_every_base(value: i64) {
            let sign = if value < 0 { "-" } else { "" };
            let magnitude = value.unsigned_abs();
            prop_assert_eq!(parse_integer(&value.to_string()), Ok(value));
            let hexadecimal = format!("{sign}{magnitude:#x}");
            let octal = format!("{sign}0{magnitude:o}");
            prop_assert_eq!(parse_integer(&hexadecimal), Ok(value));
            prop_assert_eq!(parse_integer(&octal), Ok(value));
        }

        #[test]
        fn sizes_scale(count in 0u64..1 << 23, unit in 0usize..5) {
            let suffix = ["", "K", "M", "G", "T"][unit];
            let text = format!("{count}{suffix}");
            prop_assert_eq!(parse_size(&text), Ok(count << (10 * unit)));
        }

        #[test]
        fn addresses_round_trip(uuid: [u8; 16], mac: [u8; 6]) {
            prop_assert_eq!(Uuid(uuid).to_string().parse(), Ok(Uuid(uuid)));
            let unicast = MacAddr([mac[0] & !1 | 2, mac[1], mac[2], mac[3], mac[4], mac[5]]);
            prop_assert_eq!(unicast.to_string().parse(), Ok(unicast));
        }

        #[test]
        fn nothing_panics(text in "\\PC{0,40}") {
            let _ = (parse_bool(&text), parse_integer(&text), parse_size(&text), parse_memory_size(&text));
            let _ = (text.parse::<Uuid>(), text.parse::<MacAddr>(), text.parse::<HostCpus>());
            let _ = parse_socket_address(&text);
        }
    }
}
