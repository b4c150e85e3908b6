//! The border between the machine and what runs its processors.
//!
//! An [`Engine`] makes a [`Vm`]; a [`Vm`] makes [`Vcpu`]s, owns the interrupt chips every PC has (LAPIC,
//! IOAPIC, two 8259s, 8254) and knows where guest memory is. Everything else on the board lives behind
//! [`IoHandler`]: the engine calls it for each port and MMIO access that is not RAM and not one of its own
//! chips. The calls happen on the vCPU's thread, in the middle of the instruction that caused them, so that an
//! instruction with several accesses needs no continuation (see `docs/decisions/0001-io-by-call.md`).
//!
//! State crosses the border in one architectural form ([`VcpuState`], [`ChipState`]), whatever the engine, so
//! what one engine saves another can load.

pub mod state;

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use x86::cpuid::CpuidTable;

pub use memory;
pub use memory::{GuestMemory, GuestRegion, PageTracker};
pub use state::{ChipState, LapicState, MpState, VcpuState};

/// Number of a virtual processor, from zero without gaps. Its initial APIC ID is what its CPUID table says
/// ([`CpuidTable::apic_id`]): topologies with sizes that are not powers of two leave gaps there.
pub type VcpuId = u32;

/// A global system interrupt: the number of an IOAPIC input (ACPI 6.5 §5.2.12.6).
pub type Gsi = u32;

/// Interrupt inputs of the IOAPIC that every engine provides.
pub const IOAPIC_PINS: u32 = 24;
/// Where the IOAPIC's registers are (Intel 82093AA §3.0).
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Where each LAPIC's registers are after reset.
pub const LAPIC_BASE: u64 = 0xfee0_0000;

/// What went wrong in an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host refused an operation.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The engine cannot do what was asked on this host.
    #[error("{0}")]
    Unsupported(String),
    /// State that was to be loaded is not valid.
    #[error("invalid state: {0}")]
    InvalidState(String),
    /// The guest did something the engine cannot carry out; the vCPU cannot go on.
    #[error("vCPU {vcpu} cannot go on at rip {rip:#x}: {what}")]
    Guest {
        /// Which processor.
        vcpu: VcpuId,
        /// Its instruction pointer.
        rip: u64,
        /// What happened.
        what: String,
    },
}

/// Result of engine operations.
pub type Result<T> = std::result::Result<T, EngineError>;

/// Whether an engine can run guests well on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fitness {
    /// Yes.
    Fit,
    /// No, and one line that says why.
    Unfit(String),
}

/// The names under which engines are chosen (`--engine`, variable `engine`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// Linux KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Kvm => "kvm",
            EngineKind::Soft => "soft",
        })
    }
}

/// A way to run virtual processors.
pub trait Engine: Send + Sync {
    /// Its name.
    fn kind(&self) -> EngineKind;

    /// Tries the host out; takes less than a second.
    fn probe(&self) -> Fitness;

    /// The CPUID leaves that a guest may be shown: host capabilities that the engine can provide.
    /// The machine derives each vCPU's table from it (topology, feature list).
    fn supported_cpuid(&self) -> Result<CpuidTable>;

    /// Makes a virtual machine with its interrupt chips, no memory mapped and no vCPU.
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>>;
}

/// What an engine needs to know to make a [`Vm`].
pub struct VmConfig {
    /// How many vCPUs will be created, with ids from zero.
    pub vcpus: u32,
    /// The rest of the board.
    pub io: Arc<dyn IoHandler>,
    /// RDMSR and WRMSR of a register that the engine does not implement raise #GP; if not, they read zero and do
    /// nothing (bhyve_config(5), `x86.strictmsr`). A value that an implemented register refuses is #GP either way.
    pub strict_msr: bool,
    /// Engine-specific settings from the configuration tree: the children of the node named like the engine
    /// (`soft.translate=off` is `("translate", "off")`).
    pub options: Vec<(String, String)>,
}

/// The board as seen from a vCPU: whatever is not RAM and not an engine's own chip.
///
/// `data` is 1, 2, 4 or 8 bytes (1, 2 or 4 for ports), little-endian. Reads that nothing answers must fill
/// `data` with ones. Calls come from any vCPU thread, several at once.
pub trait IoHandler: Send + Sync {
    /// IN or INS.
    fn port_read(&self, vcpu: VcpuId, port: u16, data: &mut [u8]);
    /// OUT or OUTS.
    fn port_write(&self, vcpu: VcpuId, port: u16, data: &[u8]);
    /// A load from an address that is not RAM.
    fn mmio_read(&self, vcpu: VcpuId, gpa: u64, data: &mut [u8]);
    /// A store to an address that is not RAM (or is read-only memory).
    fn mmio_write(&self, vcpu: VcpuId, gpa: u64, data: &[u8]);
}

/// A message-signalled interrupt as the device writes it (SDM 3A §10.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// Where an interrupt event leads (see [`Vm::connect_irq_event`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqTarget {
    /// A pulse on an IOAPIC input.
    Line(Gsi),
    /// A message.
    Msi(MsiMessage),
}

/// A place whose writes can be turned into events (see [`Vm::connect_doorbell`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Port or guest-physical address.
    pub address: DoorbellAddress,
    /// Width in bytes of the writes that ring it; 0 for any.
    pub len: u32,
    /// Only this value rings it, if given.
    pub value: Option<u64>,
}

/// Address of a [`Doorbell`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DoorbellAddress {
    Port(u16),
    Mmio(u64),
}

/// A running virtual machine, seen from outside its vCPUs. Every method may be called from any thread.
pub trait Vm: Send + Sync {
    /// Maps a region of guest memory at its own guest address. A region that is not `writable` is read-only
    /// memory: stores to it go to [`IoHandler::mmio_write`]. `slot` names the mapping for the other calls.
    fn map_memory(&self, slot: u32, region: Arc<GuestRegion>, writable: bool) -> Result<()>;

    /// Takes a mapping away.
    fn unmap_memory(&self, slot: u32) -> Result<()>;

    /// Makes the vCPU with this id; call once for each id below [`VmConfig::vcpus`]. Its APIC ID is
    /// [`CpuidTable::apic_id`] of `cpuid`, or the id where the table has none. vCPU 0 is the bootstrap
    /// processor; the others wait for INIT and SIPI.
    fn create_vcpu(&self, id: VcpuId, cpuid: &CpuidTable) -> Result<Box<dyn Vcpu>>;

    /// Drives an IOAPIC input (below 16, the 8259 input of the same number too).
    fn set_irq_line(&self, gsi: Gsi, asserted: bool) -> Result<()>;

    /// Sends a message-signalled interrupt.
    fn send_msi(&self, message: MsiMessage) -> Result<()>;

    /// Lets writes to `doorbell` signal `event` without leaving the engine. Returns false where the engine has no
    /// such path and the write will arrive at [`IoHandler`] as any other.
    fn connect_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<bool>;

    /// Undoes [`Vm::connect_doorbell`].
    fn disconnect_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<()>;

    /// Lets a signalled `event` raise an interrupt without passing through the machine. Returns false where the
    /// engine has no such path and the caller must wait on the event and call [`Vm::send_msi`] itself.
    fn connect_irq_event(&self, event: &EventFd, target: IrqTarget) -> Result<bool>;

    /// Undoes [`Vm::connect_irq_event`].
    fn disconnect_irq_event(&self, event: &EventFd, target: IrqTarget) -> Result<()>;

    /// Starts or stops recording which pages of a mapping are written.
    fn set_dirty_log(&self, slot: u32, enabled: bool) -> Result<()>;

    /// Pages of the mapping that vCPUs wrote since the last call, one bit a page from the lowest, and clears the
    /// record. Writes made by devices are in the region's own [`PageTracker`].
    fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>>;

    /// State of the interrupt chips outside the vCPUs. Call with every vCPU out of [`Vcpu::run`].
    fn chips(&self) -> Result<ChipState>;

    /// Loads what [`Vm::chips`] returned.
    fn set_chips(&self, state: &ChipState) -> Result<()>;

    /// Counters of the VM as a whole, by name; empty where the engine has none.
    fn stats(&self) -> Vec<(String, u64)>;
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Somebody called [`Kick::kick`].
    Kicked,
    /// Every vCPU that has been started waits in HLT with interrupts disabled: only an NMI, INIT or reset from
    /// outside could wake the machine. Returned by one vCPU; running it again waits on.
    AllHalted,
    /// A fault while delivering a double fault: the processor shut down (SDM 3A §6.15, #DF).
    TripleFault,
    /// A breakpoint or single step that the debugger asked for.
    Debug,
}

/// One virtual processor. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Its number.
    fn id(&self) -> VcpuId;

    /// Runs the guest until something in [`Exit`] happens. Waits for interrupts in HLT, and for INIT/SIPI, count as
    /// running: the thread sleeps inside.
    fn run(&mut self) -> Result<Exit>;

    /// A handle with which any thread makes [`Vcpu::run`] return soon, or the next call return at once.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// All architectural state. Call on the vCPU's thread, outside [`Vcpu::run`].
    fn state(&mut self) -> Result<VcpuState>;

    /// Loads all architectural state.
    fn set_state(&mut self, state: &VcpuState) -> Result<()>;

    /// Makes a non-maskable interrupt pending.
    fn inject_nmi(&mut self) -> Result<()>;
}

/// The cross-thread side of a [`Vcpu`]: stop it, look at its counters.
pub trait Kick: Send + Sync {
    /// Makes the vCPU leave [`Vcpu::run`] with [`Exit::Kicked`]; sticky until it does.
    fn kick(&self);

    /// Counters by name: exits by reason, instructions where the engine counts them. May be slightly stale.
    fn stats(&self) -> Vec<(String, u64)>;
}
