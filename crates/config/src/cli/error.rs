//! What can be wrong with a command line. Every message is one line that names the option, the part of its argument
//! that is wrong, and what would be accepted.

use crate::error::{SettingError, TreeError, suggest};
use crate::file::{AssignmentError, FileError};
use crate::pci::{PciAddress, PciAddressError};
use crate::value::ValueError;

/// A command line that was not understood. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Options and paths become variables, which are text.
    #[error("the argument '{argument}' is not valid UTF-8")]
    NotUtf8 {
        /// The argument, with replacement characters.
        argument: String,
    },
    /// Variables are one line each.
    #[error("the argument '{argument}' contains a line break")]
    LineBreak {
        /// The argument, with line breaks written as escapes.
        argument: String,
    },
    /// An option that does not exist.
    #[error("unknown option {option}{}; bhyve -h lists all options", .suggestion.map(|name| format!(" (did you mean --{name}?)")).unwrap_or_default())]
    UnknownOption {
        /// The option.
        option: String,
        /// A long option that is spelt nearly so.
        suggestion: Option<&'static str>,
    },
    /// The command line ends where an argument is due.
    #[error("option {option} needs an argument: {form}")]
    MissingArgument {
        /// The option.
        option: String,
        /// How it is written.
        form: String,
    },
    /// `--option=value` for an option that takes none.
    #[error("option {option} takes no argument, but has '{argument}'")]
    UnwantedArgument {
        /// The option.
        option: String,
        /// The text after the equals sign.
        argument: String,
    },
    /// An argument that its option cannot take.
    #[error("{option} {argument}: {problem}{}", expected(.form))]
    Argument {
        /// The option.
        option: String,
        /// Its argument.
        argument: String,
        /// What is wrong with it.
        problem: Box<ArgumentError>,
        /// How the option is written, unless the problem says it already.
        form: Option<String>,
    },
    /// A list of CPU features with something else in it.
    #[error("{list}: {problem}")]
    Features {
        /// The list.
        list: String,
        /// What is wrong with it.
        problem: ValueError,
    },
    /// No name.
    #[error("the name of the virtual machine is missing: bhyve [options] NAME; bhyve -h lists all options")]
    NoName,
    /// A name that no virtual machine can have.
    #[error(transparent)]
    Name(ValueError),
    /// Something follows the name.
    #[error("'{extra}' comes after the name '{name}': the name of the virtual machine is the last argument")]
    AfterName {
        /// The first thing that follows.
        extra: String,
        /// The name.
        name: String,
    },
    /// `config.dump` is neither true nor false.
    #[error(transparent)]
    Dump(SettingError),
}

fn expected(form: &Option<String>) -> String {
    form.as_ref().map(|form| format!(" (accepted: {form})")).unwrap_or_default()
}

/// What is wrong with an option's argument.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// A value is not of its type.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The value of an option of a device is not of its type.
    #[error("{option}: {problem}")]
    #[allow(missing_docs)]
    Option { option: String, problem: ValueError },
    /// A variable cannot be set.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A variable cannot be set, or there is none.
    #[error(transparent)]
    Assignment(#[from] AssignmentError),
    /// A configuration file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not the place of a PCI device.
    #[error(transparent)]
    PciAddress(#[from] PciAddressError),
    /// A slot, but no device for it.
    #[error("no device is named for the slot")]
    NoDevice,
    /// A device that does not exist.
    #[error("unknown device '{device}'{}; known devices: {known}", suggest(.suggestion))]
    #[allow(missing_docs)]
    UnknownDevice { device: String, suggestion: Option<&'static str>, known: String },
    /// Two devices in one place.
    #[error("PCI slot {address} already holds the device {occupant}")]
    #[allow(missing_docs)]
    SlotTaken { address: PciAddress, occupant: String },
    /// Nothing, or only a value, where `name=value` is due.
    #[error("'{item}' is not an option of the form name or name=value")]
    #[allow(missing_docs)]
    EmptyOption { item: String },
    /// Nothing where the value of an option is due.
    #[error("'{option}' has no value")]
    #[allow(missing_docs)]
    NoValue { option: String },
    /// A device that is nothing without its configuration.
    #[error("{device} needs more: {device},{form}")]
    #[allow(missing_docs)]
    NeedsConf { device: &'static str, form: &'static str },
    /// A port of unknown type.
    #[error("'{item}' does not say what is on the port: write hd:{item} or cd:{item}")]
    #[allow(missing_docs)]
    AhciPort { item: String },
    /// More ports than the device has.
    #[error("{count} ports are more than the {max} that the device has")]
    #[allow(missing_docs)]
    TooManyPorts { count: usize, max: usize },
    /// A console port without name or socket.
    #[error("'{item}' is not a console port of the form name=/path/to/socket")]
    #[allow(missing_docs)]
    ConsolePort { item: String },
    /// A USB device that does not exist.
    #[error("unknown USB device '{device}'; known devices: tablet")]
    #[allow(missing_docs)]
    UnknownUsbDevice { device: String },
    /// No device of the host.
    #[error(
        "'{text}' is not a PCI device of the host: use BUS/SLOT/FUNCTION in decimal, the hexadecimal BB:SS.F that \
         lspci prints, or pptN"
    )]
    #[allow(missing_docs)]
    HostDevice { text: String },
    /// An address that no device of the host has.
    #[error("the host device '{text}': {problem}")]
    #[allow(missing_docs)]
    HostAddress { text: String, problem: PciAddressError },
    /// Two shared directories in one device.
    #[error("'{item}' is a second shared directory; add another virtio-9p device for it")]
    #[allow(missing_docs)]
    SecondShare { item: String },
    /// An unknown key of `-c`.
    #[error("'{key}' is not part of a CPU topology")]
    #[allow(missing_docs)]
    TopologyKey { key: String },
    /// Not `vcpu:hostcpu`.
    #[error("'{text}' is not a pair of a virtual CPU and a host CPU")]
    #[allow(missing_docs)]
    Pin { text: String },
    /// Not the address of a debug server.
    #[error("'{port}' is not a TCP port: use 1 to 65535")]
    #[allow(missing_docs)]
    Port { port: String },
    /// Not a file for the firmware configuration interface.
    #[error("'{text}' names no data for the guest")]
    #[allow(missing_docs)]
    FwCfg { text: String },
    /// A name that the interface has no room for.
    #[error("the name '{name}' is longer than {max} bytes")]
    #[allow(missing_docs)]
    FwCfgName { name: String, max: usize },
}

impl ArgumentError {
    /// Whether the message already says all there is to know about what would be accepted.
    pub(super) fn is_complete(&self) -> bool {
        matches!(
            self,
            Self::UnknownDevice { .. }
                | Self::UnknownUsbDevice { .. }
                | Self::SlotTaken { .. }
                | Self::NeedsConf { .. }
                | Self::HostDevice { .. }
                | Self::HostAddress { .. }
                | Self::AhciPort { .. }
                | Self::TooManyPorts { .. }
                | Self::ConsolePort { .. }
                | Self::SecondShare { .. }
                | Self::Option { .. }
                | Self::File(_)
                | Self::Value(_)
                | Self::FwCfgName { .. }
        )
    }
}
