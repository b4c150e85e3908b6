//! Whether KVM on this host is worth taking.
//!
//! `/dev/kvm` may be absent, closed to the user, or too old. It may also be there and only emulate: then a guest's
//! kernel runs thousands of times too slowly and meets instructions that the emulation does not know. So a
//! throw-away VM runs a small long-mode guest that executes two instructions every x86-64 kernel of today relies on
//! and then counts in a loop whose time is compared with the same loop's outside. Processor time is what counts, so
//! that a busy host does not look like a slow one; a kick bounds the trial.

use std::io::ErrorKind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::memory::create_region;
use engine::state::Segments;
use engine::{Engine, EngineError, Exit, IoHandler, VcpuId, VcpuState, VmConfig};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
use x86::bits::{cr0, cr4, efer, rflags};
use x86::paging::pte;
use x86::regs::Gpr;
use x86::{Segment, xsave};

use crate::KvmEngine;

/// What the engine cannot do without, and the kernel's name of it.
const REQUIRED: [(Cap, &str); 16] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens `/dev/kvm` and checks what can be checked without running anything; `Err` is one line for the user.
pub(crate) fn open() -> Result<Kvm, String> {
    let kvm = Kvm::new().map_err(|error| {
        let error = std::io::Error::from_raw_os_error(error.errno());
        match (error.kind(), error.raw_os_error()) {
            (ErrorKind::NotFound, _) | (_, Some(libc::ENXIO | libc::ENODEV)) => {
                "/dev/kvm does not exist: enable VT-x or AMD-V in the firmware (or nested virtualization in the \
                 cloud) and load kvm_intel or kvm_amd"
                    .to_owned()
            }
            (ErrorKind::PermissionDenied, _) => {
                "no permission to open /dev/kvm: add the user to its group (`usermod -aG kvm USER`, then log in anew)"
                    .to_owned()
            }
            _ => format!("/dev/kvm cannot be opened: {error}"),
        }
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(format!(
            "KVM speaks API version {version}, not {KVM_API_VERSION}: update the host's kernel"
        ));
    }
    let missing: Vec<&str> =
        REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(format!("KVM on this host lacks {}: update the host's kernel", missing.join(", ")));
    }
    Ok(kvm)
}

/// How long the trial may take before it is ended; the second is for a host too busy to tell anything in the first.
const TRIAL_LIMITS: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(600)];
/// Turns of the trial's loop; a few milliseconds on any processor.
const TURNS: u64 = 5_000_000;
/// A guest loop may take this many times as long as the same loop outside. A KVM that emulates is thousands of times
/// slower; below that, a host that is itself a busy virtual machine must have its chance, and a second one.
const SLOWDOWN_LIMIT: f64 = 100.0;
const SLOWDOWN_CERTAIN: f64 = 1000.0;

/// The guest reports at this port how far it is.
const REPORT_PORT: u16 = 0x80;
/// Steps in the order in which the guest reports them.
const STARTED: u8 = 1;
const EXCHANGED: u8 = 2;
const SAVED: u8 = 3;
const COUNTED: u8 = 4;

/// Guest-physical places of the trial.
const MEMORY_BYTES: u64 = 0x20_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x8000;

/// Runs the trial; `Err` is one line for the user.
pub(crate) fn probe(engine: &KvmEngine) -> Result<(), String> {
    open()?;
    let with_xsave = std::arch::is_x86_feature_detected!("xsave");
    let mut verdict = Verdict::Unclear(String::new());
    for limit in TRIAL_LIMITS {
        let trial = run_trial(engine, with_xsave, limit)
            .map_err(|error| format!("a trial guest cannot be set up in KVM on this host: {error}"))?;
        verdict = judge(&trial, native_loop_time(), with_xsave);
        if !matches!(verdict, Verdict::Unclear(_)) {
            break;
        }
    }
    match verdict {
        Verdict::Fit => Ok(()),
        Verdict::Unfit(why) | Verdict::Unclear(why) => Err(why),
    }
}

/// What a trial says about KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Fit,
    Unfit(String),
    /// It was ended too early to be sure.
    Unclear(String),
}

/// What the trial showed.
#[derive(Debug, Default)]
struct Trial {
    /// Steps with the thread's processor time at their report.
    steps: Vec<(u8, Duration)>,
    /// How it ended, if not by the last step.
    end: Option<String>,
    /// Turns the loop had done when the trial was cut off.
    turns: u64,
    /// Processor time when it was cut off, if it was.
    cut_off: Option<Duration>,
}

impl Trial {
    fn time_of(&self, step: u8) -> Option<Duration> {
        self.steps.iter().find(|(s, _)| *s == step).map(|(_, time)| *time)
    }
}

const ADVICE: &str = "it only emulates virtualization, and has no VT-x or AMD-V to offer";

fn judge(trial: &Trial, native: Duration, with_xsave: bool) -> Verdict {
    // A trial that was cut off may have been waiting for a processor all the time.
    let refuse =
        |why: String| if trial.cut_off.is_some() { Verdict::Unclear(why) } else { Verdict::Unfit(why) };
    let ending = || trial.end.clone().unwrap_or_else(|| "it did not get there in time".into());
    if trial.time_of(STARTED).is_none() {
        return refuse(format!("KVM on this host does not run even a trial guest ({}): {ADVICE}", ending()));
    }
    if trial.time_of(EXCHANGED).is_none() {
        tracing::debug!(end = ending(), "the trial guest stopped at CMPXCHG16B");
        return refuse(format!("KVM on this host cannot execute CMPXCHG16B for a guest: {ADVICE}"));
    }
    let Some(start) = trial.time_of(SAVED) else {
        let what = if with_xsave { "XSAVE" } else { "FXSAVE" };
        tracing::debug!(end = ending(), "the trial guest stopped at {what}");
        return refuse(format!("KVM on this host cannot execute {what} for a guest: {ADVICE}"));
    };
    let (end, turns) = match (trial.time_of(COUNTED), trial.cut_off) {
        (Some(end), _) => (end, TURNS),
        (None, Some(end)) => (end, trial.turns),
        (None, None) => {
            return refuse(format!("KVM on this host stopped a trial guest ({}): {ADVICE}", ending()));
        }
    };
    let elapsed = end.saturating_sub(start);
    let native_for_turns = native.as_secs_f64() * turns.max(1) as f64 / TURNS as f64;
    let slowdown = elapsed.as_secs_f64() / native_for_turns.max(f64::MIN_POSITIVE);
    if slowdown <= SLOWDOWN_LIMIT {
        return Verdict::Fit;
    }
    let why = format!(
        "KVM on this host runs guests about {slowdown:.0} times slower than the processor itself: {ADVICE}"
    );
    if elapsed >= ENOUGH && slowdown >= SLOWDOWN_CERTAIN {
        Verdict::Unfit(why)
    } else {
        Verdict::Unclear(why)
    }
}

/// Processor time in the loop that is enough to judge its speed.
const ENOUGH: Duration = Duration::from_millis(50);

/// The board of the trial: it writes down the steps.
struct Recorder {
    steps: Mutex<Vec<(u8, Duration)>>,
}

impl IoHandler for Recorder {
    fn port_read(&self, _: VcpuId, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_write(&self, _: VcpuId, port: u16, data: &[u8]) {
        if port == REPORT_PORT {
            let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
            steps.push((data[0], thread_time()));
        }
    }

    fn mmio_read(&self, _: VcpuId, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: VcpuId, _: u64, _: &[u8]) {}
}

fn run_trial(engine: &KvmEngine, with_xsave: bool, limit: Duration) -> engine::Result<Trial> {
    let recorder = Arc::new(Recorder { steps: Mutex::default() });
    let vm = engine.create_vm(VmConfig {
        vcpus: 1,
        io: recorder.clone(),
        strict_msr: true,
        options: Vec::new(),
    })?;
    let memory = |source| EngineError::Host { what: "making the trial's memory", source };
    let region = create_region("kvm-trial", 0, MEMORY_BYTES).map_err(memory)?;
    let write = |address: u64, bytes: &[u8]| {
        region
            .write_slice(bytes, MemoryRegionAddress(address))
            .map_err(|error| memory(std::io::Error::other(error)))
    };
    let table = pte::P | pte::RW;
    write(PML4, &(PDPT | table).to_le_bytes())?;
    write(PDPT, &(PD | table).to_le_bytes())?;
    write(PD, &(table | pte::PS).to_le_bytes())?;
    write(CODE, &program(with_xsave))?;
    debug_assert_eq!(region.len(), MEMORY_BYTES);
    vm.map_memory(0, region.clone(), true)?;

    let mut vcpu = vm.create_vcpu(0, &engine.supported_cpuid()?)?;
    let mut state = vcpu.state()?;
    enter_long_mode(&mut state, with_xsave);
    if let Err(error) = vcpu.set_state(&state) {
        // A KVM that refuses CR4.OSXSAVE does not have XSAVE for its guests.
        let end = Some(error.to_string());
        let started = thread_time();
        return Ok(Trial { steps: vec![(STARTED, started), (EXCHANGED, started)], end, ..Trial::default() });
    }

    let kicker = vcpu.kicker();
    let (finished, watch) = mpsc::channel::<()>();
    let timer = std::thread::spawn(move || {
        if watch.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            kicker.kick();
        }
    });
    let exit = vcpu.run();
    let cut_off = matches!(exit, Ok(Exit::Kicked)).then(thread_time);
    drop(finished);
    // It cannot panic: nothing in it can.
    let _ = timer.join();

    let end = match exit {
        // The program ends with a triple fault once it has counted.
        Ok(Exit::TripleFault) => Some("it faulted".to_owned()),
        Ok(Exit::Kicked) => None,
        Ok(other) => Some(format!("it ended with {other:?}")),
        Err(error) => Some(error.to_string()),
    };
    let turns = TURNS.saturating_sub(vcpu.state()?.regs.gpr[Gpr::Rcx as usize]);
    let steps = std::mem::take(&mut *recorder.steps.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Trial { steps, end, turns, cut_off })
}

/// The guest: reports each step at [`REPORT_PORT`], counts down RCX, then faults without a handler.
fn program(with_xsave: bool) -> Vec<u8> {
    let report = |step: u8| [0xb0, step, 0xe6, REPORT_PORT as u8]; // mov al, step; out port, al
    let mut code = Vec::new();
    code.extend(report(STARTED));
    code.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0f]); // lock cmpxchg16b [rdi]
    code.extend(report(EXCHANGED));
    if with_xsave {
        code.extend([0x31, 0xd2, 0xb8, 3, 0, 0, 0]); // xor edx, edx; mov eax, 3
        code.extend([0x0f, 0xae, 0x27]); // xsave [rdi]
    } else {
        code.extend([0x0f, 0xae, 0x07]); // fxsave [rdi]
    }
    code.extend(report(SAVED));
    code.extend([0x48, 0xff, 0xc9, 0x75, 0xfb]); // again: dec rcx; jnz again
    code.extend(report(COUNTED));
    code.extend([0x0f, 0x0b]); // ud2
    code
}

/// A processor at the trial program in 64-bit mode.
fn enter_long_mode(state: &mut VcpuState, with_xsave: bool) {
    let data = Segment { selector: 0x10, attributes: 0xc093, limit: u32::MAX, base: 0, unusable: false };
    let old = state.segments;
    state.segments = Segments {
        cs: Segment { selector: 0x08, attributes: 0xa09b, ..data },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment { attributes: 0x8b, limit: 0x67, ..Segment::default() },
        ..old
    };
    // No handler can be reached: any exception ends the trial.
    state.segments.idt.limit = 0;
    state.control.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
    state.control.cr3 = PML4;
    state.control.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | if with_xsave { cr4::OSXSAVE } else { 0 };
    state.control.efer = efer::LME | efer::LMA;
    if with_xsave {
        state.control.xcr0 = xsave::component::X87 | xsave::component::SSE;
    }
    state.regs.rip = CODE;
    state.regs.rflags = rflags::RESERVED_ONE;
    state.regs.gpr[Gpr::Rdi as usize] = DATA;
    state.regs.gpr[Gpr::Rcx as usize] = TURNS;
}

/// How long the loop takes outside.
fn native_loop_time() -> Duration {
    let start = thread_time();
    // SAFETY: the instructions touch one register, declared as clobbered, and the flags.
    unsafe {
        std::arch::asm!("2:", "dec {turns}", "jnz 2b", turns = inout(reg) TURNS => _, options(nomem, nostack));
    }
    thread_time().saturating_sub(start)
}

/// Processor time of the calling thread, guests that it runs included.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours and the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_millis(10);
    const NATIVE: Duration = Duration::from_millis(2);

    fn trial(steps: &[u8], counted_after: Duration) -> Trial {
        let time = |step: u8| if step == COUNTED { START + counted_after } else { START };
        Trial { steps: steps.iter().map(|s| (*s, time(*s))).collect(), ..Trial::default() }
    }

    /// A trial that was cut off in the loop.
    fn cut_off(turns: u64, after: Duration) -> Trial {
        Trial { turns, cut_off: Some(START + after), ..trial(&[STARTED, EXCHANGED, SAVED], Duration::ZERO) }
    }

    fn unfit(trial: &Trial) -> String {
        match judge(trial, NATIVE, true) {
            Verdict::Unfit(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_near_native_run_is_fit() {
        let good = trial(&[STARTED, EXCHANGED, SAVED, COUNTED], Duration::from_millis(3));
        assert_eq!(judge(&good, NATIVE, true), Verdict::Fit);
        // Cut off, but fast for as long as it had a processor.
        assert_eq!(judge(&cut_off(TURNS / 2, Duration::from_millis(1)), NATIVE, true), Verdict::Fit);
    }

    #[test]
    fn a_slow_run_is_unfit() {
        let slow = trial(&[STARTED, EXCHANGED, SAVED, COUNTED], Duration::from_secs(4));
        assert!(unfit(&slow).contains("2000 times slower"));
        assert!(unfit(&cut_off(TURNS / 1000, Duration::from_millis(200))).contains("100000 times slower"));
    }

    #[test]
    fn a_trial_that_proves_nothing_is_unclear() {
        assert!(matches!(judge(&cut_off(0, Duration::from_millis(1)), NATIVE, true), Verdict::Unclear(_)));
        let slow = trial(&[STARTED, EXCHANGED, SAVED, COUNTED], Duration::from_secs(1));
        assert!(matches!(judge(&slow, NATIVE, true), Verdict::Unclear(_)), "500 times slower");
        let not_started = Trial { cut_off: Some(START), ..Trial::default() };
        assert!(matches!(judge(&not_started, NATIVE, true), Verdict::Unclear(_)));
    }

    #[test]
    fn a_missing_instruction_is_named() {
        let mut no_exchange = trial(&[STARTED], Duration::ZERO);
        no_exchange.end = Some("it faulted".into());
        assert!(unfit(&no_exchange).contains("cannot execute CMPXCHG16B for a guest"));
        let no_xsave = trial(&[STARTED, EXCHANGED], Duration::ZERO);
        assert!(unfit(&no_xsave).contains("cannot execute XSAVE"));
    }

    #[test]
    fn the_probe_is_bounded() {
        // Whatever this host's KVM is, the answer comes, and an unfit one says what to do.
        if let engine::Fitness::Unfit(why) = KvmEngine::new().probe() {
            println!("KVM is unfit here: {why}");
            assert!(why.contains(": "), "{why}");
            assert!(!why.contains('\n'), "{why}");
        }
    }
}
