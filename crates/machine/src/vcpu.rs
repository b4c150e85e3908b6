//! The threads that run vCPUs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use engine::{Exit, Kick, Vcpu};

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
    /// The host refuses the thread.
    pub fn start(vcpu: Box<dyn Vcpu>, lifecycle: Arc<Lifecycle>, host_cpus: Vec<u32>) -> io::Result<Self> {
        let id = vcpu.id();
        let kicker = vcpu.kicker();
        let nmi = Arc::new(AtomicBool::new(false));
        lifecycle.add_vcpu(kicker.clone());
        let thread = {
            let (nmi, lifecycle) = (nmi.clone(), lifecycle.clone());
            thread::Builder::new().name(format!("vcpu {id}")).spawn(move || {
                if let Err(error) = pin(&host_cpus) {
                    let cpus = host_cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
                    lifecycle.end(Ending::Failed(format!("-p {id}:{cpus}: cannot pin vCPU {id}: {error}")));
                }
                run(vcpu, &lifecycle, &nmi);
            })
        };
        Ok(VcpuHandle { remote: VcpuRemote { kicker, nmi }, thread: Some(thread?) })
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
