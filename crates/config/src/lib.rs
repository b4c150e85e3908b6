//! What a virtual machine is to be, as data: the configuration tree of bhyve_config(5), and the command line of
//! bhyve(8) that fills it.
//!
//! Every option writes variables of one [`Tree`]; devices and the machine read only the tree, never the command
//! line. [`parse`] goes from arguments to a [`CommandLine`], [`VmSettings::from_tree`] from the tree to checked,
//! typed settings, and a device reads its own variables through a [`Node`].

#![forbid(unsafe_code)]

pub mod cli;
pub mod error;
pub mod expand;
pub mod file;
pub mod lpc;
pub mod pci;
pub mod settings;
pub mod tree;
pub mod usage;
pub mod value;

pub use cli::{Action, CliError, CommandLine, parse};
pub use error::{SettingError, TreeError};
pub use expand::ExpandError;
pub use lpc::{FwCfgInterface, NullModemEnd, SerialBackend};
pub use pci::PciAddress;
pub use settings::{EngineChoice, VmName, VmSettings};
pub use tree::{Node, Tree};
pub use value::{HostCpus, MacAddr, SectorSize, Uuid, ValueError};
