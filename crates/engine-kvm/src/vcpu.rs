//! A virtual processor and its run loop.

use std::sync::Arc;

use engine::{EngineError, Exit, Kick, Result, Vcpu, VcpuId, VcpuState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use x86::bits::rflags;
use x86::cpuid::CpuidTable;

use crate::cpuid;
use crate::error::host;
use crate::halt::Activity;
use crate::kick::VcpuShared;
use crate::state;
use crate::stats::{KernelStats, count};
use crate::sys::{self, RunPage};
use crate::vm::VmShared;

/// A KVM vCPU.
pub(crate) struct KvmVcpu {
    fd: VcpuFd,
    shared: Arc<VcpuShared>,
    run_page: Arc<RunPage>,
    vm: Arc<VmShared>,
}

impl KvmVcpu {
    pub(crate) fn new(vm: Arc<VmShared>, id: VcpuId, table: &CpuidTable) -> Result<KvmVcpu> {
        // KVM's vCPU id is the APIC ID; the table decides it, because topologies leave gaps in the numbering.
        let apic_id = table.apic_id().unwrap_or(id);
        let fd = vm.fd.create_vcpu(u64::from(apic_id)).map_err(host("creating a vCPU"))?;
        fd.set_cpuid2(&cpuid::to_kvm(table)?).map_err(host("setting a vCPU's CPUID table"))?;
        let run_page = Arc::new(RunPage::map(&fd, vm.fd.run_size())?);
        let kernel_stats = sys::stats_fd(&fd).and_then(KernelStats::open);
        let shared = Arc::new(VcpuShared::new(id, kernel_stats));
        vm.halt_watch.add(shared.clone());
        Ok(KvmVcpu { fd, shared, run_page, vm })
    }

    /// An error that ends the vCPU, with the place where it happened.
    fn guest_error(&self, what: String) -> EngineError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        EngineError::Guest { vcpu: self.shared.id, rip, what }
    }

    /// What the vCPU is doing, for the halt watch.
    fn activity(&self) -> Result<Activity> {
        let mp_state = self.fd.get_mp_state().map_err(host("reading a vCPU's run state"))?.mp_state;
        Ok(match mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::NotStarted,
            KVM_MP_STATE_HALTED => {
                let regs = self.fd.get_regs().map_err(host("reading a vCPU's registers"))?;
                let events = self.fd.get_vcpu_events().map_err(host("reading a vCPU's pending events"))?;
                let deaf =
                    regs.rflags & rflags::IF == 0 && events.nmi.pending == 0 && events.nmi.injected == 0;
                if deaf { Activity::HaltedForGood } else { Activity::Alive }
            }
            _ => Activity::Alive,
        })
    }

    /// KVM_RUN ended with EINTR: somebody wants something, or a signal of no concern came by.
    fn interrupted(&mut self) -> Result<Option<Exit>> {
        count(&self.shared.counters.interrupted);
        // Before the flags are looked at: a request that comes in between sets it again.
        self.run_page.set_immediate_exit(false);
        if self.shared.take_kick() {
            return Ok(Some(Exit::Kicked));
        }
        if let Some(round) = self.shared.take_inspection() {
            let activity = self.activity()?;
            if self.vm.halt_watch.report(&self.shared, round, activity) {
                return Ok(Some(Exit::AllHalted));
            }
        }
        Ok(None)
    }

    fn run_until_exit(&mut self) -> Result<Exit> {
        let id = self.shared.id;
        let shared = self.shared.clone();
        let counters = &shared.counters;
        loop {
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                Err(error) if error.errno() == libc::EINTR => match self.interrupted()? {
                    Some(exit) => return Ok(exit),
                    None => continue,
                },
                // A vCPU that waited for INIT has received something: look again.
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) => {
                    let error = std::io::Error::from_raw_os_error(error.errno());
                    return Err(self.guest_error(format!("KVM_RUN failed: {error}")));
                }
            };
            count(&counters.userspace);
            match exit {
                VcpuExit::IoIn(port, data) => {
                    count(&counters.inout);
                    // A string instruction asks for several elements at once.
                    let element = self.run_page.io_element_bytes().clamp(1, 4);
                    if data.len() > element {
                        count(&counters.inout_string);
                    }
                    for value in data.chunks_mut(element) {
                        self.vm.io.port_read(id, port, value);
                    }
                }
                VcpuExit::IoOut(port, data) => {
                    count(&counters.inout);
                    let element = self.run_page.io_element_bytes().clamp(1, 4);
                    if data.len() > element {
                        count(&counters.inout_string);
                    }
                    for value in data.chunks(element) {
                        self.vm.io.port_write(id, port, value);
                    }
                }
                VcpuExit::MmioRead(gpa, data) => {
                    count(&counters.mmio);
                    self.vm.io.mmio_read(id, gpa, data);
                }
                VcpuExit::MmioWrite(gpa, data) => {
                    count(&counters.mmio);
                    self.vm.io.mmio_write(id, gpa, data);
                }
                // Only of registers that KVM does not know, and only if the machine is lenient about these.
                VcpuExit::X86Rdmsr(access) => {
                    count(&counters.unknown_msr);
                    *access.data = 0;
                    *access.error = 0;
                }
                VcpuExit::X86Wrmsr(access) => {
                    count(&counters.unknown_msr);
                    *access.error = 0;
                }
                VcpuExit::Shutdown => {
                    count(&counters.shutdown);
                    return Ok(Exit::TripleFault);
                }
                VcpuExit::Debug(_) => {
                    count(&counters.debug);
                    return Ok(Exit::Debug);
                }
                VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
                other => {
                    count(&counters.unknown);
                    let what = match other {
                        VcpuExit::InternalError => self.run_page.internal_error(),
                        VcpuExit::FailEntry(reason, cpu) => format!(
                            "the processor refused to enter the guest on host CPU {cpu} \
                             (hardware reason {reason:#x}): the guest's state is not valid for it"
                        ),
                        VcpuExit::SystemEvent(kind, _) => system_event(kind),
                        VcpuExit::MemoryFault { gpa, size, .. } => {
                            format!("KVM could not reach {size} bytes of guest memory at {gpa:#x}")
                        }
                        VcpuExit::Hypercall(call) => format!("the guest made unknown hypercall {}", call.nr),
                        other => format!("KVM returned with {other:?}, which this engine does not ask for"),
                    };
                    return Err(self.guest_error(what));
                }
            }
        }
    }
}

/// What a system event means (api.rst, KVM_EXIT_SYSTEM_EVENT).
fn system_event(kind: u32) -> String {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => "the guest shut down through a KVM system event".into(),
        KVM_SYSTEM_EVENT_RESET => "the guest asked for a reset through a KVM system event".into(),
        KVM_SYSTEM_EVENT_CRASH => "the guest reported a crash through a KVM system event".into(),
        other => format!("KVM system event {other}"),
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> VcpuId {
        self.shared.id
    }

    fn run(&mut self) -> Result<Exit> {
        let _running = self.shared.enter(&self.run_page);
        self.run_until_exit()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.shared.clone()
    }

    fn state(&mut self) -> Result<VcpuState> {
        state::save(&self.fd, &self.vm)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        state::load(&self.fd, &self.vm, state)
    }

    fn inject_nmi(&mut self) -> Result<()> {
        self.fd.nmi().map_err(host("injecting an NMI"))
    }
}
