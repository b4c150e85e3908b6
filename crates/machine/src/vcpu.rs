//! The threads that run vCPUs.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use engine::{Exit, Kick, Vcpu};

use crate::MachineError;
use crate::lifecycle::{Ending, Lifecycle};

/// A vCPU's thread.
pub struct VcpuHandle {
    remote: VcpuRemote,
    thread: Option<JoinHandle<()>>,
}

/// What others may do to a vCPU while its thread runs it.
#[derive(Clone)]
pub struct VcpuRemote {
    kicker: Arc<dyn Kick>,
    nmi: Arc<AtomicBool>,
}

impl VcpuRemote {
    /// Makes a non-maskable interrupt pending.
    pub fn inject_nmi(&self) {
        self.nmi.store(true, Ordering::Release);
        self.kicker.kick();
    }
}

impl VcpuHandle {
    /// Starts the vCPU's thread, named like `vcpu 0`. It waits for [`Lifecycle::run`]. With `host_cpus` (`-p`) it
    /// runs only on those processors of the host.
    ///
    /// # Errors
    /// The host refuses the thread, or has none of those processors for it.
    pub fn start(
        vcpu: Box<dyn Vcpu>,
        lifecycle: Arc<Lifecycle>,
        host_cpus: Vec<u32>,
    ) -> Result<Self, MachineError> {
        let id = vcpu.id();
        let kicker = vcpu.kicker();
        let nmi = Arc::new(AtomicBool::new(false));
        lifecycle.add_vcpu(kicker.clone());
        let (pinned, is_pinned) = mpsc::sync_channel(1);
        let thread = {
            let (nmi, lifecycle, host_cpus) = (nmi.clone(), lifecycle.clone(), host_cpus.clone());
            thread::Builder::new().name(format!("vcpu {id}")).spawn(move || {
                // The receiver waits for it.
                let _ = pinned.send(pin(&host_cpus));
                run(vcpu, &lifecycle, &nmi);
            })
        };
        let thread = thread.map_err(MachineError::host("starting a vCPU's thread"))?;
        match is_pinned.recv() {
            Ok(Err(source)) => Err(MachineError::Pin { vcpu: id, host_cpus, source }),
            // A thread that ended without a word has panicked, and told the lifecycle so.
            Ok(Ok(())) | Err(_) => {
                Ok(VcpuHandle { remote: VcpuRemote { kicker, nmi }, thread: Some(thread) })
            }
        }
    }

    /// The side for others.
    pub fn remote(&self) -> VcpuRemote {
        self.remote.clone()
    }

    /// Waits for the thread, which ends with the machine.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs one vCPU from the start of the machine to its end.
fn run(mut vcpu: Box<dyn Vcpu>, lifecycle: &Lifecycle, nmi: &AtomicBool) {
    // A panic in an engine or a device must end the machine, not leave it with a processor short.
    let _guard = PanicGuard(lifecycle);
    while lifecycle.gate() {
        let result = if nmi.swap(false, Ordering::Acquire) { vcpu.inject_nmi() } else { Ok(()) };
        match result.and_then(|()| vcpu.run()) {
            // There is no debugger that could have asked for `Debug`.
            Ok(Exit::Kicked | Exit::Debug) => {}
            Ok(Exit::AllHalted) => lifecycle.end(Ending::Halt),
            Ok(Exit::TripleFault) => lifecycle.end(Ending::TripleFault),
            Err(error) => lifecycle.end(Ending::Failed(error.to_string())),
        }
    }
}

struct PanicGuard<'a>(&'a Lifecycle);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Ending::Failed("internal error in a vCPU thread (see above)".into()));
            // Ended, so this returns at once, and counts the thread as gone.
            self.0.gate();
        }
    }
}

/// Restricts the calling thread to `host_cpus`; an empty list leaves it free.
fn pin(host_cpus: &[u32]) -> io::Result<()> {
    if host_cpus.is_empty() {
        return Ok(());
    }
    // SAFETY: a CPU set is plain bits, for which zeros are valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in host_cpus {
        let cpu = *cpu as usize;
        if cpu >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the index was checked against the set's size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the set is valid and its size is given; 0 names the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
