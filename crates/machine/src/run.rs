//! One machine from its settings to its end.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use boot::MemoryLayout;
use config::{EngineChoice, NullModemEnd, SerialBackend, Tree, VmSettings};
use console::{Backend, Console, Place};
use control::{Runtime, Server, VmDirectory};
use engine::{Engine, EngineKind, GuestRegion, Vcpu, Vm, VmConfig};
use x86::cpuid::model::FeatureList;

use crate::assembly::{self, Devices};
use crate::clock::Timers;
use crate::control_handler::{Controls, Parts};
use crate::disks::{Disks, Watch};
use crate::firmware::{self, BootFiles};
use crate::lifecycle::{Ending, Lifecycle};
use crate::signals::Signals;
use crate::vcpu::VcpuHandle;
use crate::{Board, MachineError, cpu, engines, memory, signals};

/// How long vCPUs may take to leave the guest at the end. They take microseconds unless the host is stuck.
const VCPU_PATIENCE: Duration = Duration::from_secs(5);

/// Where a machine lives and what it may use.
pub struct Environment<'a> {
    /// Where its name is claimed.
    pub runtime: Runtime,
    /// The engines to choose from, the preferred one first.
    pub engines: Vec<Box<dyn Engine>>,
    /// Told about what the user should know while the machine starts: one line each.
    pub notice: &'a mut dyn FnMut(&str),
}

/// Runs the machine that `tree` describes to its end. SIGTERM, SIGINT and SIGHUP are blocked in the calling
/// thread and taken as in [`crate::signals`]: call it before making other threads.
///
/// # Errors
/// The machine could not be started; nothing of it is left.
pub fn run(tree: &Tree, environment: Environment<'_>) -> Result<Ending, MachineError> {
    let Environment { runtime, engines, notice } = environment;
    let settings = VmSettings::from_tree(tree)?;
    for note in &settings.notes {
        notice(note);
    }
    assembly::check_available(&settings)?;
    let layout = MemoryLayout::new(settings.memory.size_bytes)?;
    memory::check_host(&layout)?;
    let features = cpu::features(&settings)?;
    let files = BootFiles::open(&settings)?;

    signals::block().map_err(MachineError::host("blocking signals"))?;
    let directory = runtime.claim(settings.name.as_str())?;
    let consoles = open_consoles(&settings, &runtime, &directory)?;
    // Told only once the machine is complete: an error should be the one line that the user sees.
    let mut passed_over = None;
    let engine =
        engines::choose(engines, wanted(settings.engine), &mut |line| passed_over = Some(line.to_owned()))?;
    directory.set_engine(&engine.kind().to_string())?;
    let plan = Plan { tree, settings: &settings, layout: &layout, features, files: &files };
    let machine = Machine::build(&plan, engine.as_ref(), consoles, directory)?;
    passed_over.iter().for_each(|line| notice(line));
    Ok(machine.run())
}

/// What is to be built, checked as far as it can be before anything is.
struct Plan<'a> {
    tree: &'a Tree,
    settings: &'a VmSettings,
    layout: &'a MemoryLayout,
    features: FeatureList,
    files: &'a BootFiles,
}

fn wanted(choice: EngineChoice) -> Option<EngineKind> {
    match choice {
        EngineChoice::Auto => None,
        EngineChoice::Kvm => Some(EngineKind::Kvm),
        EngineChoice::Soft => Some(EngineKind::Soft),
    }
}

/// A machine that is ready to run. The fields are dropped in this order: what lets others in first, the name last.
struct Machine {
    _server: Server,
    _signals: Signals,
    vcpus: Vec<VcpuHandle>,
    lifecycle: Arc<Lifecycle>,
    timers: Arc<Timers>,
    consoles: Vec<(usize, Console)>,
    _disk_watch: Watch,
    disks: Arc<Disks>,
    board: Arc<Board>,
    _memory: Vec<Arc<GuestRegion>>,
    _directory: VmDirectory,
}

impl Machine {
    fn build(
        plan: &Plan<'_>,
        engine: &dyn Engine,
        consoles: Vec<(usize, Console)>,
        directory: VmDirectory,
    ) -> Result<Self, MachineError> {
        let Plan { tree, settings, layout, features, files } = plan;
        let kind = engine.kind();
        let lifecycle = Lifecycle::new();
        let timers = Arc::new(Timers::new().map_err(MachineError::host("starting the timer thread"))?);
        let controls = Arc::new(Controls {
            name: settings.name.to_string(),
            engine: kind.to_string(),
            vcpus: settings.topology.vcpus(),
            memory_bytes: layout.total_bytes(),
            lifecycle: lifecycle.clone(),
            timers: timers.clone(),
            parts: OnceLock::new(),
        });
        let signals = {
            let controls = controls.clone();
            Signals::watch(move |nth| controls.on_signal(nth))
                .map_err(MachineError::host("watching signals"))?
        };
        let server = Server::start(&directory.socket(), &controls.name, controls.clone())
            .map_err(MachineError::host("opening the control socket"))?;

        let model = cpu::model(engine, settings, features, layout)?;
        let (guest_memory, regions) = memory::allocate(layout, &settings.memory)?;
        let board = Arc::new(Board::new(lifecycle.clone(), settings.strict_io));
        let disks = Disks::new();
        let disk_watch = disks.watch(lifecycle.clone(), timers.clone())?;
        let built = || -> Result<Vec<VcpuHandle>, MachineError> {
            let failed = MachineError::engine(kind);
            let config = VmConfig {
                vcpus: settings.topology.vcpus(),
                io: board.clone(),
                strict_msr: settings.strict_msr,
                options: engine_options(tree, kind)?,
            };
            let vm = engine.create_vm(config).map_err(&failed)?;
            for (slot, region) in (0..).zip(&regions) {
                vm.map_memory(slot, region.clone(), true).map_err(&failed)?;
            }
            let of = (*tree, *settings, *layout);
            let storage = (&guest_memory, &*disks);
            let devices = assembly::assemble(&board, &vm, &timers, &lifecycle, of, storage, &consoles)?;
            let entry = firmware::load(&guest_memory, files, settings, layout, &devices, &model.table(0))?;
            let mut vcpus: Vec<Box<dyn Vcpu>> = Vec::new();
            for id in 0..settings.topology.vcpus() {
                let table = model.table(id);
                let mut vcpu = vm.create_vcpu(id, &table).map_err(&failed)?;
                cpu::power_on(kind, vcpu.as_mut(), &table, &entry)?;
                vcpus.push(vcpu);
            }
            let handles = start_vcpus(vcpus, settings, &lifecycle)?;
            publish(&controls, vm, devices, (&board, &disks), &handles);
            Ok(handles)
        };
        match built() {
            Ok(vcpus) => Ok(Machine {
                _server: server,
                _signals: signals,
                vcpus,
                lifecycle,
                timers,
                consoles,
                _disk_watch: disk_watch,
                disks,
                board,
                _memory: regions,
                _directory: directory,
            }),
            Err(error) => {
                // Threads that have started wait for this; devices and buses hold each other.
                lifecycle.end(Ending::Failed(error.to_string()));
                board.clear();
                Err(error)
            }
        }
    }

    /// Lets the guest run and waits for its end.
    fn run(mut self) -> Ending {
        self.timers.start();
        self.lifecycle.run();
        let ending = self.lifecycle.wait_end();
        if self.lifecycle.wait_vcpus_gone(VCPU_PATIENCE) {
            self.vcpus.iter_mut().for_each(VcpuHandle::join);
        }
        self.timers.stop();
        self.consoles.clear();
        self.disks.close();
        self.board.clear();
        ending
    }
}

/// The children of the tree's node named like the engine.
fn engine_options(tree: &Tree, kind: EngineKind) -> Result<Vec<(String, String)>, MachineError> {
    let node = tree.node(&kind.to_string());
    let mut options = Vec::new();
    for name in node.children() {
        if let Some(value) = node.string(&name)? {
            options.push((name, value));
        }
    }
    Ok(options)
}

fn open_consoles(
    settings: &VmSettings,
    runtime: &Runtime,
    directory: &VmDirectory,
) -> Result<Vec<(usize, Console)>, MachineError> {
    let ports = assembly::serial_ports(settings);
    let mut consoles = Vec::with_capacity(ports.len());
    for (index, backend) in ports {
        let (name, ..) = devices::uart::COM_PORTS[index];
        let place = Place::new(name, directory.path(), runtime.shared());
        consoles.push((index, Console::open(&console_backend(backend), &place)?));
    }
    Ok(consoles)
}

fn console_backend(backend: &SerialBackend) -> Backend {
    match backend {
        SerialBackend::Stdio => Backend::Stdio,
        SerialBackend::Tcp(address) => Backend::Tcp(*address),
        SerialBackend::Device(path) => Backend::Tty(path.clone()),
        SerialBackend::NullModem { unit, end } => Backend::NullModem {
            unit: unit.clone(),
            end: match end {
                NullModemEnd::A => console::NullModemEnd::A,
                NullModemEnd::B => console::NullModemEnd::B,
            },
        },
    }
}

fn start_vcpus(
    vcpus: Vec<Box<dyn Vcpu>>,
    settings: &VmSettings,
    lifecycle: &Arc<Lifecycle>,
) -> Result<Vec<VcpuHandle>, MachineError> {
    let pinning = settings.pinning.iter().map(|set| set.iter().flat_map(|s| s.0.iter().copied()).collect());
    vcpus
        .into_iter()
        .zip(pinning.chain(std::iter::repeat(Vec::new())))
        .map(|(vcpu, host_cpus)| VcpuHandle::start(vcpu, lifecycle.clone(), host_cpus))
        .collect()
}

/// Gives the control socket and the signals what they act on.
fn publish(
    controls: &Controls,
    vm: Arc<dyn Vm>,
    devices: Devices,
    (board, disks): (&Arc<Board>, &Arc<Disks>),
    vcpus: &[VcpuHandle],
) {
    let parts = Parts {
        vm: Arc::downgrade(&vm),
        pm: Arc::downgrade(&devices.pm),
        board: Arc::downgrade(board),
        disks: Arc::downgrade(disks),
        vcpus: vcpus.iter().map(VcpuHandle::remote).collect(),
    };
    // Set once: `build` runs once for each `Controls`.
    let _ = controls.parts.set(parts);
}
