//! The machine around an engine that executes no instructions: each vCPU is a closure that makes the accesses itself.

#[path = "common/guest.rs"]
#[allow(dead_code)]
mod guest;

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;

use config::Tree;
use control::{Client, Command, MachineState, Runtime};
use engine::{
    ChipState, Doorbell, Engine, EngineError, EngineKind, Exit, Fitness, Gsi, GuestRegion, IoHandler,
    IrqTarget, Kick, MsiMessage, Result, Vcpu, VcpuId, VcpuState, Vm, VmConfig,
};
use machine::{Ending, Environment, MachineError};
use tempfile::TempDir;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::eventfd::EventFd;
use x86::cpuid::{CpuidResult, CpuidTable};

/// What a vCPU does each time it is run.
type Script = dyn Fn(&mut Access<'_>) -> Result<Exit> + Send + Sync;

/// What a script works with.
struct Access<'a> {
    vcpu: VcpuId,
    io: &'a dyn IoHandler,
    kick: &'a Bell,
    nmis: &'a mut u32,
    log: &'a Log,
}

impl Access<'_> {
    fn out(&self, port: u16, value: u8) {
        self.io.port_write(self.vcpu, port, &[value]);
    }

    fn inb(&self, port: u16) -> u8 {
        let mut data = [0];
        self.io.port_read(self.vcpu, port, &mut data);
        data[0]
    }

    fn power_off(&self) -> Result<Exit> {
        self.io.port_write(self.vcpu, guest::PM1_CONTROL, &guest::POWER_OFF.to_le_bytes());
        self.kick.wait();
        Ok(Exit::Kicked)
    }
}

/// What the machine asked of the engine.
#[derive(Default)]
struct Log {
    lines: Mutex<Vec<(Gsi, bool)>>,
    regions: Mutex<Vec<Weak<GuestRegion>>>,
    cpuid: Mutex<BTreeMap<VcpuId, CpuidTable>>,
    states: Mutex<BTreeMap<VcpuId, VcpuState>>,
    threads: Mutex<BTreeMap<VcpuId, Option<String>>>,
    options: Mutex<Vec<(String, String)>>,
}

/// A sticky kick.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn wait(&self) {
        let rung = self.rung.lock().unwrap();
        *self.changed.wait_while(rung, |rung| !*rung).unwrap() = false;
    }
}

impl Kick for Bell {
    fn kick(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_all();
    }
    fn stats(&self) -> Vec<(String, u64)> {
        vec![("runs".into(), 7)]
    }
}

struct Scripted {
    script: Arc<Script>,
    log: Arc<Log>,
}

impl Engine for Scripted {
    fn kind(&self) -> EngineKind {
        EngineKind::Soft
    }
    fn probe(&self) -> Fitness {
        Fitness::Fit
    }
    fn supported_cpuid(&self) -> Result<CpuidTable> {
        let mut table = CpuidTable::new();
        table.set(0, None, CpuidResult { eax: 1, ebx: 0x756e_6547, ecx: 0x6c65_746e, edx: 0x4965_6e69 });
        table.set(1, None, CpuidResult { eax: 0x000c_06f2, edx: 0x1f8b_fbff, ..CpuidResult::default() });
        table.set(0x8000_0000, None, CpuidResult { eax: 0x8000_0008, ..CpuidResult::default() });
        table.set(0x8000_0008, None, CpuidResult { eax: 0x3027, ..CpuidResult::default() });
        Ok(table)
    }
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>> {
        *self.log.options.lock().unwrap() = config.options;
        Ok(Arc::new(ScriptedVm { io: config.io, script: self.script.clone(), log: self.log.clone() }))
    }
}

struct ScriptedVm {
    io: Arc<dyn IoHandler>,
    script: Arc<Script>,
    log: Arc<Log>,
}

fn unused<T>() -> Result<T> {
    Err(EngineError::Unsupported("not in this test".into()))
}

impl Vm for ScriptedVm {
    fn map_memory(&self, _slot: u32, region: Arc<GuestRegion>, _writable: bool) -> Result<()> {
        self.log.regions.lock().unwrap().push(Arc::downgrade(&region));
        Ok(())
    }
    fn unmap_memory(&self, _: u32) -> Result<()> {
        unused()
    }
    fn create_vcpu(&self, id: VcpuId, cpuid: &CpuidTable) -> Result<Box<dyn Vcpu>> {
        self.log.cpuid.lock().unwrap().insert(id, cpuid.clone());
        Ok(Box::new(ScriptedVcpu {
            id,
            io: self.io.clone(),
            script: self.script.clone(),
            log: self.log.clone(),
            bell: Arc::default(),
            nmis: 0,
        }))
    }
    fn set_irq_line(&self, gsi: Gsi, asserted: bool) -> Result<()> {
        self.log.lines.lock().unwrap().push((gsi, asserted));
        Ok(())
    }
    fn send_msi(&self, _: MsiMessage) -> Result<()> {
        unused()
    }
    fn connect_doorbell(&self, _: Doorbell, _: &EventFd) -> Result<bool> {
        Ok(false)
    }
    fn disconnect_doorbell(&self, _: Doorbell, _: &EventFd) -> Result<()> {
        unused()
    }
    fn connect_irq_event(&self, _: &EventFd, _: IrqTarget) -> Result<bool> {
        Ok(false)
    }
    fn disconnect_irq_event(&self, _: &EventFd, _: IrqTarget) -> Result<()> {
        unused()
    }
    fn set_dirty_log(&self, _: u32, _: bool) -> Result<()> {
        unused()
    }
    fn take_dirty_log(&self, _: u32) -> Result<Vec<u64>> {
        unused()
    }
    fn chips(&self) -> Result<ChipState> {
        unused()
    }
    fn set_chips(&self, _: &ChipState) -> Result<()> {
        unused()
    }
    fn stats(&self) -> Vec<(String, u64)> {
        vec![("whole".into(), 1)]
    }
}

struct ScriptedVcpu {
    id: VcpuId,
    io: Arc<dyn IoHandler>,
    script: Arc<Script>,
    log: Arc<Log>,
    bell: Arc<Bell>,
    nmis: u32,
}

impl Vcpu for ScriptedVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }
    fn run(&mut self) -> Result<Exit> {
        let name = thread::current().name().map(str::to_owned);
        self.log.threads.lock().unwrap().insert(self.id, name);
        let mut access =
            Access { vcpu: self.id, io: &*self.io, kick: &self.bell, nmis: &mut self.nmis, log: &self.log };
        (self.script)(&mut access)
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.bell.clone()
    }
    fn state(&mut self) -> Result<VcpuState> {
        Ok(VcpuState::reset(self.id))
    }
    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        self.log.states.lock().unwrap().insert(self.id, state.clone());
        Ok(())
    }
    fn inject_nmi(&mut self) -> Result<()> {
        self.nmis += 1;
        Ok(())
    }
}

struct Bed {
    directory: TempDir,
    log: Arc<Log>,
}

impl Bed {
    fn new() -> Self {
        Bed { directory: tempfile::tempdir().unwrap(), log: Arc::default() }
    }

    fn runtime(&self) -> Runtime {
        Runtime::at(self.directory.path().join("vmm"))
    }

    fn run(
        &self,
        arguments: &str,
        script: impl Fn(&mut Access<'_>) -> Result<Exit> + Send + Sync + 'static,
    ) -> std::result::Result<Ending, MachineError> {
        let kernel = self.directory.path().join("kernel");
        fs::write(&kernel, guest::kernel(guest::spin)).unwrap();
        let mut tree: Tree = config::parse(arguments.split_whitespace().chain(["g1"])).unwrap().tree;
        tree.set("boot.kernel", kernel.to_str().unwrap()).unwrap();
        let engine = Scripted { script: Arc::new(script), log: self.log.clone() };
        let environment = Environment {
            runtime: self.runtime(),
            engines: vec![Box::new(engine)],
            notice: &mut |line| panic!("{line}"),
        };
        let ending = machine::run(&tree, environment);
        assert_eq!(self.runtime().list().unwrap(), vec![]);
        ending
    }
}

#[test]
fn vcpus_are_named_threads_with_their_own_apic_ids() {
    let bed = Bed::new();
    let ending = bed.run("-c 4,sockets=2,cores=2 -m 5G -o soft.translate=off", |access| {
        if access.log.threads.lock().unwrap().len() == 4 {
            return access.power_off();
        }
        thread::yield_now();
        Ok(Exit::Kicked)
    });
    assert_eq!(ending.unwrap(), Ending::PowerOff);
    let log = &bed.log;
    let names: Vec<_> = log.threads.lock().unwrap().values().map(|n| n.clone().unwrap()).collect();
    assert_eq!(names, ["vcpu 0", "vcpu 1", "vcpu 2", "vcpu 3"]);
    let ids: Vec<_> = log.cpuid.lock().unwrap().values().map(|table| table.apic_id()).collect();
    assert_eq!(ids, [Some(0), Some(1), Some(2), Some(3)]);
    assert_eq!(*log.options.lock().unwrap(), [("translate".to_owned(), "off".to_owned())]);

    let states = log.states.lock().unwrap();
    assert_eq!(states[&0].regs.rip, 0x10_0000, "the first begins at the guest's entry");
    assert_eq!(states[&1].regs.rip, 0xfff0, "the others in reset");
    assert_eq!(states[&1].mp_state, engine::MpState::WaitForSipi);
    for state in states.values() {
        assert!(state.msr(x86::msr::MTRR_DEF_TYPE).is_some(), "firmware sets memory types on all");
    }
}

#[test]
fn nothing_of_a_machine_outlives_it() {
    let bed = Bed::new();
    bed.run("-s 0,hostbridge -s 31,lpc -l com1,tcp=127.0.0.1:0 -m 5G", |access| {
        let regions = access.log.regions.lock().unwrap();
        let lengths: Vec<_> = regions.iter().map(|r| r.upgrade().unwrap().len()).collect();
        assert_eq!(lengths, [3 << 30, 2 << 30], "both regions are mapped");
        drop(regions);
        access.power_off()
    })
    .unwrap();
    for region in bed.log.regions.lock().unwrap().iter() {
        assert!(region.upgrade().is_none(), "guest memory is still held");
    }
    assert_eq!(Arc::strong_count(&bed.log), 1, "the engine's VM is still held");
}

#[test]
fn devices_share_an_interrupt_line() {
    let bed = Bed::new();
    const IER: u16 = 1;
    const MCR: u16 = 4;
    let script = |access: &mut Access<'_>| {
        // com1 and com3 are both on IRQ 4: OUT2, then the transmitter-empty interrupt on each, then off again.
        for base in [0x3f8, 0x3e8] {
            access.out(base + MCR, 8);
            access.out(base + IER, 2);
        }
        access.out(0x3f8 + IER, 0);
        access.out(0x3e8 + IER, 0);
        access.power_off()
    };
    bed.run("-s 31,lpc -l com1,tcp=127.0.0.1:0 -l com3,tcp=127.0.0.2:0", script).unwrap();
    let lines = bed.log.lines.lock().unwrap();
    assert_eq!(*lines, [(4, true), (4, false)], "asserted by the first, released by the last");
}

#[test]
fn com_ports_are_behind_the_lpc_bridge() {
    let bed = Bed::new();
    // Without the bridge config notes that they are missing; the harness takes any notice for a failure, so none here.
    let script = |access: &mut Access<'_>| {
        assert_eq!(access.inb(0x3fd), 0xff, "no port there");
        access.power_off()
    };
    assert_eq!(bed.run("-s 0,hostbridge", script).unwrap(), Ending::PowerOff);
    let script = |access: &mut Access<'_>| {
        assert_eq!(access.inb(0x3fd), 0x60, "an idle 16550");
        access.power_off()
    };
    assert_eq!(bed.run("-s 1,lpc -l com1,tcp=127.0.0.1:0", script).unwrap(), Ending::PowerOff);
}

#[test]
fn pci_identity_comes_from_the_tree() {
    let bed = Bed::new();
    let script = |access: &mut Access<'_>| {
        let id = |slot: u32| {
            access.io.port_write(0, 0xcf8, &(1 << 31 | slot << 11).to_le_bytes());
            let mut data = [0; 4];
            access.io.port_read(0, 0xcfc, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(id(0), 0x7432_1022, "amd_hostbridge");
        assert_eq!(id(31), 0x7000_8086);
        assert_eq!(id(2), 0x0002_0001, "pcireg");
        assert_eq!(id(3), u32::MAX);
        access.power_off()
    };
    let arguments = "-s 0,amd_hostbridge -s 31,lpc -s 2,hostbridge -o pci.0.2.0.pcireg.vendor=1 -o pci.0.2.0.pcireg.device=2";
    assert_eq!(bed.run(arguments, script).unwrap(), Ending::PowerOff);
}

#[test]
fn an_nmi_reaches_every_vcpu() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let outside = thread::spawn(move || {
        // Until the machine is there, its socket is, and it is complete.
        let mut client = loop {
            if let Ok(Ok(mut client)) = runtime.find("g1").map(|entry| Client::connect(&entry.socket()))
                && client.status().unwrap().state != MachineState::Starting
            {
                break client;
            }
            thread::yield_now();
        };
        let stats = client.stats().unwrap();
        assert_eq!(stats.vm["whole"], 1);
        assert_eq!(stats.vcpus[1].counters["runs"], 7);
        client.call(Command::InjectNmi).unwrap();
    });
    let seen = Arc::new(Mutex::new(0));
    let script = move |access: &mut Access<'_>| {
        if *access.nmis > 0 {
            let mut seen = seen.lock().unwrap();
            *seen |= 1 << access.vcpu;
            if *seen == 3 {
                drop(seen);
                return access.power_off();
            }
        }
        access.kick.wait();
        Ok(Exit::Kicked)
    };
    let ending = bed.run("-c 2", script).unwrap();
    outside.join().unwrap();
    assert_eq!(ending, Ending::PowerOff);
}

#[test]
fn what_goes_wrong_in_a_vcpu_ends_the_machine() {
    let ending = Bed::new().run("-c 2", |access| match access.vcpu {
        0 => {
            access.kick.wait();
            Ok(Exit::Kicked)
        }
        vcpu => Err(EngineError::Guest { vcpu, rip: 0x1234, what: "an impossible instruction".into() }),
    });
    let Ok(Ending::Failed(why)) = ending else { panic!("{ending:?}") };
    assert!(why.contains("vCPU 1") && why.contains("0x1234"), "{why}");

    let ending = Bed::new().run("-c 2", |access| match access.vcpu {
        0 => {
            access.kick.wait();
            Ok(Exit::Kicked)
        }
        _ => panic!("on purpose"),
    });
    assert!(matches!(ending, Ok(Ending::Failed(_))), "{ending:?}");
    for (exit, ending) in [(Exit::AllHalted, Ending::Halt), (Exit::TripleFault, Ending::TripleFault)] {
        assert_eq!(Bed::new().run("", move |_| Ok(exit.clone())).unwrap(), ending);
    }
}

#[test]
fn memory_beyond_the_processors_reach_is_refused() {
    // The scripted processor has 39 address bits: 512 GiB, of which the 64-bit window takes 32. More than most hosts have.
    let error = Bed::new().run("-m 600G", |access| access.power_off()).unwrap_err();
    assert!(
        matches!(error, MachineError::AddressBits { .. } | MachineError::TooMuchMemory { .. }),
        "{error}"
    );
}
