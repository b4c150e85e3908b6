//! A virtual machine: memory, interrupt chips and event descriptors.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{
    ChipState, Doorbell, EngineError, Gsi, GuestRegion, IOAPIC_PINS, IoHandler, IrqTarget, MsiMessage,
    Result, Vcpu, VcpuId, Vm, VmConfig,
};
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_msi,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use x86::cpuid::CpuidTable;

use crate::chips;
use crate::cpuid;
use crate::error::host;
use crate::halt::HaltWatch;
use crate::routing::Routing;
use crate::stats::KernelStats;
use crate::sys;
use crate::vcpu::KvmVcpu;
use crate::xsave::HostLayout;

/// A page that Intel processors without unrestricted guests need for their identity map, and three more for a task
/// state segment (api.rst §4.35, §4.41). They lie between the LAPIC and the largest boot ROM (16 MiB below 4 GiB).
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;
const TSS_ADDRESS: usize = 0xfeff_d000;

/// A piece of guest memory that KVM knows.
struct Slot {
    region: Arc<GuestRegion>,
    writable: bool,
    dirty_log: bool,
}

impl Slot {
    fn describe(&self, slot: u32) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot,
            flags: if self.writable { 0 } else { KVM_MEM_READONLY }
                | if self.dirty_log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: self.region.start_addr().raw_value(),
            memory_size: self.region.len(),
            userspace_addr: self.region.get_mmap().as_ptr() as u64,
        }
    }
}

/// What a VM and its vCPUs share.
pub(crate) struct VmShared {
    pub(crate) fd: VmFd,
    pub(crate) io: Arc<dyn IoHandler>,
    pub(crate) halt_watch: HaltWatch,
    pub(crate) host_layout: HostLayout,
    /// MSRs that are part of a vCPU's state.
    pub(crate) msrs: Vec<u32>,
    /// KVM reports exceptions before they have had their effect on CR2 and DR6.
    pub(crate) exception_payload: bool,
    /// The host has XSAVE, and so XCR0.
    pub(crate) has_xcrs: bool,
    vcpus: u32,
    slots: Mutex<HashMap<u32, Slot>>,
    routing: Mutex<Routing>,
    kernel_stats: Option<KernelStats>,
    messages_sent: AtomicU64,
    line_changes: AtomicU64,
}

/// A KVM virtual machine.
pub(crate) struct KvmVm {
    shared: Arc<VmShared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmVm {
    pub(crate) fn new(kvm: &Kvm, config: VmConfig) -> Result<KvmVm> {
        crate::kick::install_kick_signal()?;
        let fd = kvm.create_vm().map_err(host("creating a KVM virtual machine"))?;
        let most = fd.check_extension_int(Cap::MaxVcpus);
        if i64::from(config.vcpus) > i64::from(most) {
            return Err(EngineError::Unsupported(format!(
                "{} vCPUs were asked for, but KVM on this host allows {most}: use fewer",
                config.vcpus
            )));
        }
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(host("placing KVM's identity map"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(host("placing KVM's task state segment"))?;
        fd.create_irq_chip().map_err(host("creating KVM's interrupt chips"))?;
        // Port 61h belongs to the 8254: with this flag KVM answers it too.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(host("creating KVM's 8254"))?;

        let x2apic_api = u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        enable(&fd, KVM_CAP_X2APIC_API, x2apic_api).map_err(host("enabling 32-bit APIC IDs in KVM"))?;
        // Older kernels do without: state.rs knows both.
        let exception_payload = enable(&fd, KVM_CAP_EXCEPTION_PAYLOAD, 1).is_ok();

        if !config.strict_msr {
            // Without this, KVM raises #GP itself (unless the host's administrator told it to ignore such accesses).
            enable(&fd, KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_UNKNOWN)).map_err(|_| {
                EngineError::Unsupported(
                    "-w (x86.strictmsr=false) takes a KVM that leaves unknown MSRs to us: Linux 5.10 or later".into(),
                )
            })?;
        }

        let limit = usize::try_from(fd.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let routing = Routing::new(limit);
        routing.apply(&fd)?;

        let kernel_stats = sys::stats_fd(&fd).and_then(KernelStats::open);
        let shared = VmShared {
            halt_watch: HaltWatch::start(config.vcpus as usize)?,
            host_layout: cpuid::host_layout(kvm)?,
            msrs: crate::msrs::state_msrs(kvm)?,
            exception_payload,
            has_xcrs: fd.check_extension(Cap::Xcrs),
            io: config.io,
            vcpus: config.vcpus,
            slots: Mutex::default(),
            routing: Mutex::new(routing),
            kernel_stats,
            messages_sent: AtomicU64::new(0),
            line_changes: AtomicU64::new(0),
            fd,
        };
        Ok(KvmVm { shared: Arc::new(shared) })
    }
}

fn enable(fd: &VmFd, cap: u32, argument: u64) -> std::result::Result<(), kvm_ioctls::Error> {
    fd.enable_cap(&kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() })
}

impl VmShared {
    fn set_region(&self, region: kvm_userspace_memory_region, what: &'static str) -> Result<()> {
        // SAFETY: the memory is a live mapping, and the slot table keeps it for as long as KVM may use it: a slot is
        // dropped after KVM has let go of it, or with this structure, which every vCPU that could run holds.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(host(what))
    }
}

fn no_slot(slot: u32) -> EngineError {
    EngineError::Unsupported(format!("no memory is mapped in slot {slot}"))
}

impl Vm for KvmVm {
    fn map_memory(&self, slot: u32, region: Arc<GuestRegion>, writable: bool) -> Result<()> {
        let mut slots = lock(&self.shared.slots);
        if slots.contains_key(&slot) {
            return Err(EngineError::Unsupported(format!("memory slot {slot} is in use: unmap it first")));
        }
        let new = Slot { region, writable, dirty_log: false };
        self.shared.set_region(new.describe(slot), "mapping guest memory")?;
        slots.insert(slot, new);
        Ok(())
    }

    fn unmap_memory(&self, slot: u32) -> Result<()> {
        let mut slots = lock(&self.shared.slots);
        let old = slots.get(&slot).ok_or_else(|| no_slot(slot))?;
        let gone = kvm_userspace_memory_region { memory_size: 0, flags: 0, ..old.describe(slot) };
        self.shared.set_region(gone, "unmapping guest memory")?;
        slots.remove(&slot);
        Ok(())
    }

    fn create_vcpu(&self, id: VcpuId, cpuid: &CpuidTable) -> Result<Box<dyn Vcpu>> {
        if id >= self.shared.vcpus {
            return Err(EngineError::Unsupported(format!(
                "vCPU {id} was asked for, but the machine was made for {} vCPUs",
                self.shared.vcpus
            )));
        }
        Ok(Box::new(KvmVcpu::new(self.shared.clone(), id, cpuid)?))
    }

    fn set_irq_line(&self, gsi: Gsi, asserted: bool) -> Result<()> {
        if gsi >= IOAPIC_PINS {
            return Err(EngineError::Unsupported(format!(
                "interrupt line {gsi} was driven, but the IOAPIC has inputs 0 to {}",
                IOAPIC_PINS - 1
            )));
        }
        self.shared.line_changes.fetch_add(1, Ordering::Relaxed);
        self.shared.fd.set_irq_line(gsi, asserted).map_err(host("driving an interrupt line"))
    }

    fn send_msi(&self, message: MsiMessage) -> Result<()> {
        self.shared.messages_sent.fetch_add(1, Ordering::Relaxed);
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // The answer tells whether a processor took it; a message that none takes is lost, as on hardware.
        self.shared.fd.signal_msi(msi).map(|_| ()).map_err(host("sending a message-signalled interrupt"))
    }

    fn connect_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<bool> {
        sys::ioeventfd(&self.shared.fd, doorbell, event, true)?;
        Ok(true)
    }

    fn disconnect_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<()> {
        sys::ioeventfd(&self.shared.fd, doorbell, event, false)
    }

    fn connect_irq_event(&self, event: &EventFd, target: IrqTarget) -> Result<bool> {
        let what = "connecting an event to an interrupt";
        let fd = &self.shared.fd;
        match target {
            IrqTarget::Line(gsi) if gsi < IOAPIC_PINS => {
                fd.register_irqfd(event, gsi).map_err(host(what))?;
            }
            IrqTarget::Line(gsi) => {
                return Err(EngineError::Unsupported(format!("there is no interrupt line {gsi}")));
            }
            IrqTarget::Msi(message) => {
                let mut routing = lock(&self.shared.routing);
                let gsi = routing.acquire(fd, message)?;
                if let Err(error) = fd.register_irqfd(event, gsi) {
                    routing.release(fd, gsi)?;
                    return Err(host(what)(error));
                }
            }
        }
        Ok(true)
    }

    fn disconnect_irq_event(&self, event: &EventFd, target: IrqTarget) -> Result<()> {
        let what = "disconnecting an event from an interrupt";
        let fd = &self.shared.fd;
        match target {
            IrqTarget::Line(gsi) => fd.unregister_irqfd(event, gsi).map_err(host(what)),
            IrqTarget::Msi(message) => {
                let mut routing = lock(&self.shared.routing);
                let gsi = routing.lookup(message).ok_or_else(|| {
                    EngineError::Unsupported("the event is not connected to that message".into())
                })?;
                fd.unregister_irqfd(event, gsi).map_err(host(what))?;
                routing.release(fd, gsi)
            }
        }
    }

    fn set_dirty_log(&self, slot: u32, enabled: bool) -> Result<()> {
        let mut slots = lock(&self.shared.slots);
        let entry = slots.get_mut(&slot).ok_or_else(|| no_slot(slot))?;
        if entry.dirty_log == enabled {
            return Ok(());
        }
        let changed = Slot { region: entry.region.clone(), writable: entry.writable, dirty_log: enabled };
        self.shared.set_region(changed.describe(slot), "switching the dirty log")?;
        *entry = changed;
        Ok(())
    }

    fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        let slots = lock(&self.shared.slots);
        let entry = slots.get(&slot).ok_or_else(|| no_slot(slot))?;
        if !entry.dirty_log {
            return Err(EngineError::Unsupported(format!("the dirty log of memory slot {slot} is off")));
        }
        let bytes = usize::try_from(entry.region.len()).map_err(|_| no_slot(slot))?;
        self.shared.fd.get_dirty_log(slot, bytes).map_err(host("reading the dirty log"))
    }

    fn chips(&self) -> Result<ChipState> {
        chips::save(&self.shared.fd)
    }

    fn set_chips(&self, state: &ChipState) -> Result<()> {
        chips::load(&self.shared.fd, state)
    }

    fn stats(&self) -> Vec<(String, u64)> {
        let mut named = vec![
            ("interrupt line changes".to_owned(), self.shared.line_changes.load(Ordering::Relaxed)),
            (
                "message-signalled interrupts sent".to_owned(),
                self.shared.messages_sent.load(Ordering::Relaxed),
            ),
        ];
        if let Some(stats) = &self.shared.kernel_stats {
            named.extend(stats.read().into_iter().map(|(name, value)| (format!("kvm {name}"), value)));
        }
        named
    }
}
