//! What runs a workload: a guest on one of the engines, or the host itself.

use std::fmt;
use std::str::FromStr;

use guest::{Machine, Vmm};
use serde::Serialize;

/// See `options::USAGE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Host,
    Soft,
    Interp,
    Qemu,
}

impl Engine {
    /// A machine on this engine, or `None` for the host.
    pub fn machine(self, name: &str) -> Option<Machine> {
        let machine = Machine::new(name);
        match self {
            Self::Host => None,
            Self::Soft => Some(machine.on(Vmm::Bhyve).options(&["--engine", "soft"])),
            Self::Interp => {
                Some(machine.on(Vmm::Bhyve).options(&["--engine", "soft", "-o", "soft.translate=off"]))
            }
            Self::Qemu => Some(machine.on(Vmm::Qemu)),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Host => "host",
            Self::Soft => "soft",
            Self::Interp => "interp",
            Self::Qemu => "QEMU",
        })
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "host" => Ok(Self::Host),
            "soft" => Ok(Self::Soft),
            "interp" => Ok(Self::Interp),
            "qemu" => Ok(Self::Qemu),
            _ => Err(format!("no engine {text}")),
        }
    }
}
