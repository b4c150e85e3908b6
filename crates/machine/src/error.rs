//! What can go wrong while a machine is put together, in words that say what to do.

use std::io;

use engine::EngineKind;

use crate::memory::human;

/// Why a machine could not be started. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A variable has an impossible value.
    #[error(transparent)]
    Setting(#[from] config::SettingError),
    /// Something that bhyve has and this build has not.
    #[error("{0} is not available in this build")]
    NotAvailable(String),
    /// A device cannot be made as asked.
    #[error("{0}")]
    Device(String),
    /// The passphrase of an encrypted image cannot be read.
    #[error("keyfile {path}: {source}")]
    KeyFile {
        /// The file.
        path: String,
        /// The host's answer.
        source: io::Error,
    },
    /// A disk image cannot be used.
    #[error(transparent)]
    Disk(#[from] block::OpenError),
    /// There is nothing to run.
    #[error("nothing to boot: name a kernel with --kernel FILE (and --initrd FILE, --cmdline TEXT)")]
    NothingToBoot,
    /// More memory than the host has.
    #[error("{} of guest memory: this host has {} of memory and swap; ask for less (-m)", human(*.asked), human(*.host))]
    TooMuchMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes there are.
        host: u64,
    },
    /// The host refuses the memory.
    #[error("{} of guest memory: {source}", human(*.asked))]
    Memory {
        /// Bytes asked for.
        asked: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// The host refuses to lock the memory.
    #[error(
        "locking {} of guest memory (-S): {source}; raise the limit of locked memory (ulimit -l) or leave -S out",
        human(*.asked)
    )]
    Wire {
        /// Bytes asked for.
        asked: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// The memory size cannot be laid out.
    #[error("-m: {0}")]
    Layout(#[from] boot::LayoutError),
    /// The guest's processor cannot address its memory.
    #[error(
        "{} of guest memory needs {needed} physical address bits, and the guest's processor has {offered}; ask for less (-m)",
        human(*.asked)
    )]
    AddressBits {
        /// Bytes asked for.
        asked: u64,
        /// Bits of the highest address.
        needed: u32,
        /// Bits of CPUID leaf 80000008H.
        offered: u32,
    },
    /// The feature list or the topology does not suit the engine.
    #[error(transparent)]
    Cpu(#[from] x86::cpuid::model::ModelError),
    /// The build lacks the engine.
    #[error("engine {0} is not available in this build")]
    NoSuchEngine(EngineKind),
    /// `auto` finds none.
    #[error("engine auto: no engine can run guests here ({0})")]
    NoFitEngine(String),
    /// An engine refuses.
    #[error("engine {kind}: {source}")]
    Engine {
        /// Which.
        kind: EngineKind,
        /// Why.
        source: engine::EngineError,
    },
    /// A file to boot from cannot be used.
    #[error("{option}: {source}")]
    BootFile {
        /// The option that names it.
        option: &'static str,
        /// Why.
        source: boot::LoadError,
    },
    /// The guest cannot be loaded.
    #[error(transparent)]
    Load(#[from] boot::LoadError),
    /// The firmware tables cannot describe the machine.
    #[error(transparent)]
    Tables(#[from] boot::TablesError),
    /// A serial port's backend cannot be had.
    #[error(transparent)]
    Console(#[from] console::ConsoleError),
    /// Two devices want the same addresses.
    #[error("internal conflict on the board: {0}")]
    Bus(#[from] devices::bus::BusError),
    /// Two devices want the same slot, or too much address space.
    #[error(transparent)]
    Pci(#[from] devices::pci::PciError),
    /// A device's configuration space cannot be made.
    #[error("PCI device {device}: {source}")]
    PciConfig {
        /// Which device.
        device: String,
        /// Why.
        source: devices::pci::config::ConfigError,
    },
    /// The host has no processor to pin a vCPU to.
    #[error("-p {vcpu}:{}: {source}; the processors of this host are {}", list(.host_cpus), online())]
    Pin {
        /// Which vCPU.
        vcpu: u32,
        /// Where it was to run.
        host_cpus: Vec<u32>,
        /// The host's answer.
        source: io::Error,
    },
    /// The name is in use, or its directory cannot be made.
    #[error(transparent)]
    Runtime(#[from] control::RuntimeError),
    /// The host refuses something else.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

fn list(numbers: &[u32]) -> String {
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// The host's processors, as the kernel writes them: `0-3`.
fn online() -> String {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    if online.is_empty() { "not known".into() } else { online.trim_end().into() }
}

impl MachineError {
    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| MachineError::Host { what, source }
    }

    pub(crate) fn engine(kind: EngineKind) -> impl Fn(engine::EngineError) -> Self {
        move |source| MachineError::Engine { kind, source }
    }
}
