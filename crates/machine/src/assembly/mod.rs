//! Puts the devices on the board.
//!
//! Every device goes the same way: it is made with what it needs from outside ([`devices::host`]: interrupt lines, the
//! clock, an alarm, a byte sink, the power switch), its alarm is connected, and it is attached to a bus. Chips that
//! every PC has are made always; PCI devices come from the tree, by name, through [`PCI_DEVICES`].

mod storage;

use std::sync::{Arc, Weak};

use config::settings::PciSlot;
use config::{PciAddress, SerialBackend, Tree, VmSettings};
use console::Console;
use devices::chipset::acpi_pm::{AcpiPm, SCI_IRQ};
use devices::chipset::hpet::{Hpet, HpetConfig, HpetLines};
use devices::chipset::i8042::{I8042, KEYBOARD_IRQ};
use devices::chipset::post::PostCode;
use devices::chipset::reset::{ResetControl, SystemControlPortA};
use devices::chipset::rtc::{RTC_IRQ, Rtc, RtcConfig};
use devices::host::{Alarm, IrqLine, MsiSink, OnAlarm};
use devices::irq::{SharedLine, Unconnected};
use devices::pci::config::ConfigError;
use devices::pci::pirq::{PIRQ_GSI_BASE, PIRQS};
use devices::pci::{
    HostBridge, LpcBridge, MEMORY_WINDOW, PciDevice, PciIdentity, PciRoot, PirqRouter, ResourceWindows,
};
use devices::uart::{COM_PORTS, Uart};
use engine::{Gsi, GuestMemory, IOAPIC_PINS, MsiMessage, Vm};

use crate::clock::{GuestClock, Timers};
use crate::disks::Disks;
use crate::lifecycle::{Ending, Lifecycle};
use crate::{Board, MachineError};

/// What builders of PCI devices work with.
struct Context<'a> {
    tree: &'a Tree,
    settings: &'a VmSettings,
    router: Arc<PirqRouter>,
    memory: &'a GuestMemory,
    disks: &'a Disks,
    clock: Arc<GuestClock>,
}

type Builder = fn(&Context<'_>, &PciSlot) -> Result<Arc<dyn PciDevice>, MachineError>;

/// The PCI devices of this build by the value of their `device` variable. A new device is one line here.
const PCI_DEVICES: &[(&str, Builder)] = &[
    ("ahci", storage::ahci),
    ("hostbridge", host_bridge),
    ("lpc", lpc_bridge),
    ("nvme", storage::nvme),
    ("virtio-blk", storage::virtio_blk),
];

fn host_bridge(context: &Context<'_>, slot: &PciSlot) -> Result<Arc<dyn PciDevice>, MachineError> {
    let default = HostBridge::identity(devices::pci::hostbridge::DEFAULT_IDS);
    let identity = identity(context.tree, &slot.node, default)?;
    Ok(Arc::new(HostBridge::new(identity).map_err(pci_config(slot))?))
}

fn pci_config(slot: &PciSlot) -> impl Fn(ConfigError) -> MachineError {
    let device = slot.device.clone();
    move |source| MachineError::PciConfig { device: device.clone(), source }
}

/// The LPC bridge keeps its variables below `lpc`, not below its slot (bhyve_config(5), "LPC Device Settings").
fn lpc_bridge(context: &Context<'_>, _slot: &PciSlot) -> Result<Arc<dyn PciDevice>, MachineError> {
    let identity = identity(context.tree, "lpc", devices::pci::lpc::DEFAULT_IDENTITY)?;
    Ok(Arc::new(LpcBridge::new(identity, context.router.clone())))
}

/// A device's identity with the variables `pcireg.*` of its node applied.
fn identity(tree: &Tree, node: &str, mut identity: PciIdentity) -> Result<PciIdentity, MachineError> {
    let registers = tree.node(node).node("pcireg");
    let word = |name: &str, default: u16| -> Result<u16, MachineError> {
        if registers.string(name)?.as_deref() == Some("host") {
            return Err(MachineError::NotAvailable(format!("the value host of {}", registers.path_of(name))));
        }
        let value = registers.integer(name, 0..=u16::MAX.into())?;
        Ok(value.and_then(|v| u16::try_from(v).ok()).unwrap_or(default))
    };
    identity.vendor = word("vendor", identity.vendor)?;
    identity.device = word("device", identity.device)?;
    identity.subsystem_vendor = word("subvendor", identity.subsystem_vendor)?;
    identity.subsystem = word("subdevice", identity.subsystem)?;
    if let Some(revision) = registers.integer("revid", 0..=u8::MAX.into())? {
        identity.revision = u8::try_from(revision).unwrap_or(identity.revision);
    }
    Ok(identity)
}

/// Refuses what the settings ask for and this build does not have, before anything on the host is touched.
///
/// # Errors
/// [`MachineError::NotAvailable`], naming the first such thing.
pub(crate) fn check_available(settings: &VmSettings) -> Result<(), MachineError> {
    let unavailable = |what: String| Err(MachineError::NotAvailable(what));
    for slot in &settings.pci {
        if !PCI_DEVICES.iter().any(|(name, _)| *name == slot.device) {
            return unavailable(format!("device {}", slot.device));
        }
        if slot.address.bus != 0 {
            return unavailable(format!(
                "PCI bus {} (device {} at {})",
                slot.address.bus, slot.device, slot.address
            ));
        }
    }
    let lpc = &settings.lpc;
    if lpc.bootrom.is_some() {
        return unavailable("device bootrom".into());
    }
    if lpc.test_device {
        return unavailable("device pc-testdev".into());
    }
    if lpc.fwcfg == config::FwCfgInterface::Qemu || !settings.fw_cfg.is_empty() {
        return unavailable("the firmware configuration interface (-f, fwcfg=qemu)".into());
    }
    if settings.tpm.is_some() {
        return unavailable("device tpm".into());
    }
    if settings.gdb.is_some() {
        return unavailable("the debug server (-G)".into());
    }
    Ok(())
}

/// The serial ports that exist: com ports are behind the LPC bridge, and without it they are not there.
pub(crate) fn serial_ports(settings: &VmSettings) -> Vec<(usize, &SerialBackend)> {
    if !settings.pci.iter().any(|slot| slot.device == "lpc") {
        return Vec::new();
    }
    settings.lpc.com.iter().enumerate().filter_map(|(index, b)| Some((index, b.as_ref()?))).collect()
}

/// The devices that the machine itself still talks to.
pub(crate) struct Devices {
    pub pm: Arc<AcpiPm>,
    pub hpet: Arc<Hpet>,
    pub pci: Arc<PciRoot>,
}

/// Builds every device and attaches it to `board`. `consoles` are the opened backends of [`serial_ports`], by index.
///
/// # Errors
/// A device cannot be made from its variables, or two want the same place.
pub(crate) fn assemble(
    board: &Board,
    vm: &Arc<dyn Vm>,
    timers: &Timers,
    lifecycle: &Arc<Lifecycle>,
    (tree, settings, layout): (&Tree, &VmSettings, &boot::MemoryLayout),
    (memory, disks): (&GuestMemory, &Disks),
    consoles: &[(usize, Console)],
) -> Result<Devices, MachineError> {
    let lines: Vec<Arc<SharedLine>> = (0..IOAPIC_PINS)
        .map(|gsi| SharedLine::new(Arc::new(EngineLine::new(vm.clone(), gsi, lifecycle.clone()))))
        .collect();
    let line = |irq: u8| lines[usize::from(irq)].input();
    let clock = timers.clock();

    let alarm = timers.alarm();
    let pm = Arc::new(AcpiPm::new(line(SCI_IRQ), lifecycle.clone(), clock.clone(), alarm.clone()));
    alarm.connect(weak(&pm));
    pm.attach(&board.pio)?;

    let alarm = timers.alarm();
    let config = RtcConfig {
        utc_offset_seconds: if settings.rtc_local_time { local_offset_seconds() } else { 0 },
        low_memory: layout.low_bytes(),
        high_memory: layout.high_bytes(),
    };
    let rtc = Arc::new(Rtc::new(config, line(RTC_IRQ), clock.clone(), alarm.clone()));
    alarm.connect(weak(&rtc));
    rtc.attach(&board.pio)?;

    let messages: Arc<dyn MsiSink> =
        Arc::new(EngineMessages { vm: vm.clone(), lifecycle: lifecycle.clone() });
    let alarm = timers.alarm();
    let config = HpetConfig::default();
    let inputs =
        lines.iter().enumerate().map(|(n, l)| (config.routes & 1 << n != 0).then(|| l.input())).collect();
    let hpet_lines = HpetLines {
        inputs,
        legacy: [Arc::new(Unconnected), Arc::new(Unconnected)],
        messages: messages.clone(),
    };
    let hpet = Arc::new(Hpet::new(config, hpet_lines, clock, alarm.clone() as Arc<dyn Alarm>));
    alarm.connect(weak(&hpet));
    hpet.attach(&board.mmio)?;

    Arc::new(I8042::new(line(KEYBOARD_IRQ), lifecycle.clone())).attach(&board.pio)?;
    Arc::new(SystemControlPortA::new(lifecycle.clone())).attach(&board.pio)?;
    Arc::new(PostCode::new()).attach(&board.pio)?;

    for (index, console) in consoles {
        let (name, base, irq) = COM_PORTS[*index];
        let uart = Arc::new(Uart::new(line(irq), console.sink()));
        uart.attach(&board.pio, base, name)?;
        console.start(move |bytes| uart.receive(bytes))?;
    }

    let apic: Vec<_> = lines.iter().skip(PIRQ_GSI_BASE as usize).take(PIRQS).map(|l| l.input()).collect();
    let router = Arc::new(PirqRouter::new(&apic, &lines[..16]));
    let pci = Arc::new(PciRoot::new(board.pio.clone(), board.mmio.clone(), router.clone(), messages));
    pci.attach(Arc::new(ResetControl::new(lifecycle.clone())))?;
    let context = Context { tree, settings, router, memory, disks, clock: timers.clock() };
    for slot in &settings.pci {
        let Some((_, build)) = PCI_DEVICES.iter().find(|(name, _)| *name == slot.device) else {
            return Err(MachineError::NotAvailable(format!("device {}", slot.device)));
        };
        let PciAddress { bus, slot: number, function } = slot.address;
        let address = devices::pci::PciAddress { bus, slot: number, function };
        pci.insert(address, build(&context, slot)?)?;
    }
    pci.assign_resources(&ResourceWindows {
        io: devices::pci::IO_WINDOW,
        memory: MEMORY_WINDOW,
        memory64: layout.pci_mmio64(),
    })?;
    Ok(Devices { pm, hpet, pci })
}

fn weak<T: OnAlarm + 'static>(device: &Arc<T>) -> Weak<dyn OnAlarm> {
    let weak: Weak<T> = Arc::downgrade(device);
    weak
}

/// An input of the engine's interrupt controllers.
struct EngineLine {
    vm: Arc<dyn Vm>,
    gsi: Gsi,
    lifecycle: Arc<Lifecycle>,
}

impl EngineLine {
    fn new(vm: Arc<dyn Vm>, gsi: Gsi, lifecycle: Arc<Lifecycle>) -> Self {
        EngineLine { vm, gsi, lifecycle }
    }
}

impl IrqLine for EngineLine {
    fn set(&self, asserted: bool) {
        if let Err(error) = self.vm.set_irq_line(self.gsi, asserted) {
            self.lifecycle.end(Ending::Failed(format!("interrupt line {}: {error}", self.gsi)));
        }
    }
}

/// The engine's way for message-signalled interrupts.
struct EngineMessages {
    vm: Arc<dyn Vm>,
    lifecycle: Arc<Lifecycle>,
}

impl MsiSink for EngineMessages {
    fn send(&self, address: u64, data: u32) {
        // A guest may write nonsense into the message: that interrupt is lost, as on hardware.
        match self.vm.send_msi(MsiMessage { address, data }) {
            Ok(()) | Err(engine::EngineError::InvalidState(_)) => {}
            Err(error) => self.lifecycle.end(Ending::Failed(format!("message-signalled interrupt: {error}"))),
        }
    }
}

/// How far the host's local time is east of UTC now.
fn local_offset_seconds() -> i64 {
    // SAFETY: both structures are plain data and valid for writes; the C library initialises them.
    unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut local: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut local).is_null() { 0 } else { local.tm_gmtoff }
    }
}
