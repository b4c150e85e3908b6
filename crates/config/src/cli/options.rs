//! The table of options, from which arguments are read and the usage text is written.

use super::{Action, ArgumentError, Reader};
use crate::lpc::checked;
use crate::settings::EngineChoice;
use crate::value::{Uuid, ValueError, parse_memory_size};

/// Headings of the usage text, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Processors,
    Memory,
    Boot,
    Devices,
    Firmware,
    Running,
    Settings,
    Help,
}

/// What an option does.
pub(super) enum Effect {
    /// Sets a variable to true or false.
    Flag(&'static str, bool),
    /// Sets a variable to the argument, once it passes the check.
    Store(&'static str, fn(&str) -> Result<(), ValueError>),
    /// Reads its argument in a way of its own.
    Read(fn(&mut Reader, &str) -> Result<(), ArgumentError>),
    /// Ends the reading.
    Stop(Action),
    /// Nothing any more.
    Obsolete(&'static str),
}

/// One option.
pub(crate) struct OptionSpec {
    pub(crate) short: Option<char>,
    pub(crate) long: Option<&'static str>,
    /// The form of its argument; empty if it has none.
    pub(crate) argument: &'static str,
    pub(crate) group: Group,
    pub(crate) help: &'static str,
    pub(super) effect: Effect,
}

impl OptionSpec {
    pub(super) fn takes_argument(&self) -> bool {
        !self.argument.is_empty()
    }

    /// The option and its argument, as the user would write them.
    pub(crate) fn form(&self) -> String {
        let names: Vec<String> = [self.short.map(|c| format!("-{c}")), self.long.map(|l| format!("--{l}"))]
            .into_iter()
            .flatten()
            .collect();
        let names = names.join(", ");
        if self.takes_argument() { format!("{names} {}", self.argument) } else { names }
    }
}

const fn short(
    letter: char,
    argument: &'static str,
    group: Group,
    help: &'static str,
    effect: Effect,
) -> OptionSpec {
    OptionSpec { short: Some(letter), long: None, argument, group, help, effect }
}

const fn long(
    name: &'static str,
    argument: &'static str,
    group: Group,
    help: &'static str,
    effect: Effect,
) -> OptionSpec {
    OptionSpec { short: None, long: Some(name), argument, group, help, effect }
}

fn any(_: &str) -> Result<(), ValueError> {
    Ok(())
}

fn memory_size(text: &str) -> Result<(), ValueError> {
    if text.contains('%') { Ok(()) } else { parse_memory_size(text).map(drop) }
}

/// Every option of bhyve(8), and Apiary's own.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    short(
        'c',
        "[[cpus=]N][,sockets=N][,cores=N][,threads=N]",
        Group::Processors,
        "virtual CPUs and their topology; the CPUs are the product of the rest (default: 1)",
        Effect::Read(Reader::topology),
    ),
    short(
        'p',
        "VCPU:HOSTCPU",
        Group::Processors,
        "pin a virtual CPU to a host CPU; repeat for a set of them",
        Effect::Read(Reader::pin),
    ),
    short('x', "", Group::Processors, "local APICs start in x2APIC mode", Effect::Flag("x86.x2apic", true)),
    short(
        'a',
        "",
        Group::Processors,
        "local APICs start in xAPIC mode (default)",
        Effect::Flag("x86.x2apic", false),
    ),
    short(
        'H',
        "",
        Group::Processors,
        "give the host CPU away while the guest halts (HLT)",
        Effect::Flag("x86.vmexit_on_hlt", true),
    ),
    short(
        'P',
        "",
        Group::Processors,
        "leave the guest when it spins (PAUSE)",
        Effect::Flag("x86.vmexit_on_pause", true),
    ),
    short(
        'w',
        "",
        Group::Processors,
        "ignore accesses to MSRs that are not emulated",
        Effect::Flag("x86.strictmsr", false),
    ),
    long(
        "engine",
        "auto|kvm|soft",
        Group::Processors,
        "what runs the CPUs: the host's KVM, or in software (default: auto)",
        Effect::Store("engine", checked::<EngineChoice>),
    ),
    short(
        'm',
        "SIZE[K|M|G|T]",
        Group::Memory,
        "guest memory; megabytes if there is no suffix (default: 256M)",
        Effect::Store("memory.size", memory_size),
    ),
    short('S', "", Group::Memory, "lock guest memory into RAM", Effect::Flag("memory.wired", true)),
    short(
        'C',
        "",
        Group::Memory,
        "include guest memory in core files",
        Effect::Flag("memory.guest_in_core", true),
    ),
    long(
        "kernel",
        "FILE",
        Group::Boot,
        "boot this kernel (Linux bzImage or ELF)",
        Effect::Store("boot.kernel", any),
    ),
    long(
        "initrd",
        "FILE",
        Group::Boot,
        "initial file system for the kernel",
        Effect::Store("boot.initrd", any),
    ),
    long(
        "cmdline",
        "TEXT",
        Group::Boot,
        "command line for the kernel",
        Effect::Read(Reader::kernel_command_line),
    ),
    short(
        'r',
        "FILE",
        Group::Boot,
        "resume from a snapshot: memory from FILE, the rest from FILE.kern",
        Effect::Read(Reader::resume),
    ),
    short(
        's',
        "[BUS:]SLOT[:FUNCTION],DEVICE[,CONF]",
        Group::Devices,
        "PCI device, see below; -s help lists the names",
        Effect::Read(Reader::pci_device),
    ),
    short(
        'l',
        "DEVICE[,CONF]",
        Group::Devices,
        "device behind the LPC bridge, see below; -l help lists the names",
        Effect::Read(Reader::lpc_device),
    ),
    short(
        'W',
        "",
        Group::Devices,
        "virtio devices use MSI instead of MSI-X",
        Effect::Flag("virtio_msix", false),
    ),
    short(
        'K',
        "LAYOUT",
        Group::Devices,
        "keyboard layout of the VNC console",
        Effect::Store("keyboard.layout", any),
    ),
    short('u', "", Group::Devices, "the real-time clock keeps UTC", Effect::Flag("rtc.use_localtime", false)),
    short('A', "", Group::Firmware, "make ACPI tables", Effect::Flag("acpi_tables", true)),
    short('Y', "", Group::Firmware, "make no MP table", Effect::Flag("x86.mptable", false)),
    short(
        'U',
        "UUID",
        Group::Firmware,
        "UUID in the SMBIOS tables (default: from the host's and the guest's name)",
        Effect::Store("uuid", checked::<Uuid>),
    ),
    short(
        'f',
        "[name=]NAME,string=TEXT | [name=]NAME,file=FILE",
        Group::Firmware,
        "data for the firmware configuration interface",
        Effect::Read(Reader::fw_cfg),
    ),
    short(
        'D',
        "",
        Group::Running,
        "destroy the virtual machine when the guest powers off",
        Effect::Flag("destroy_on_poweroff", true),
    ),
    short(
        'e',
        "",
        Group::Running,
        "exit when the guest uses an I/O port that is not emulated",
        Effect::Flag("x86.strictio", true),
    ),
    short(
        'G',
        "[w][ADDRESS:]PORT",
        Group::Running,
        "debug server for gdb; w: wait for it before the first instruction",
        Effect::Read(Reader::debug_server),
    ),
    short(
        'I',
        "",
        Group::Running,
        "accepted for old scripts; an I/O APIC is always there",
        Effect::Obsolete("-I has no effect: every virtual machine has an I/O APIC"),
    ),
    short(
        'o',
        "VARIABLE=VALUE",
        Group::Settings,
        "set a configuration variable; config.dump=1 prints them all",
        Effect::Read(Reader::assignment),
    ),
    short(
        'k',
        "FILE",
        Group::Settings,
        "set the variables in a file, one VARIABLE=VALUE per line",
        Effect::Read(Reader::configuration_file),
    ),
    OptionSpec {
        short: Some('h'),
        long: Some("help"),
        argument: "",
        group: Group::Help,
        help: "print this text",
        effect: Effect::Stop(Action::Help),
    },
    long("version", "", Group::Help, "print the version", Effect::Stop(Action::Version)),
];
