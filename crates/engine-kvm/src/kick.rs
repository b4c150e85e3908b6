//! Stopping a vCPU from any thread.
//!
//! A kick sets a flag, sets `immediate_exit` in the run structure, and sends the vCPU's thread a real-time signal
//! whose handler does nothing. Whichever of these the thread meets first ends its KVM_RUN with EINTR: the signal
//! if it is in the guest, `immediate_exit` if it was about to enter. The flag is looked at only then, so an access
//! that a device has answered is always completed before [`engine::Vcpu::run`] returns.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use engine::{Kick, Result, VcpuId};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::signal::register_signal_handler;

use crate::error::host;
use crate::stats::{Counters, KernelStats};
use crate::sys::RunPage;

/// The signal that ends KVM_RUN.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

extern "C" fn ignore_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler, once per process.
pub(crate) fn install_kick_signal() -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), Errno>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), ignore_signal));
    installed.map_err(host("installing a signal handler"))
}

/// Where a vCPU is being run.
struct Running {
    thread: libc::pthread_t,
    run_page: Arc<RunPage>,
}

/// What other threads may know and ask of a vCPU.
pub(crate) struct VcpuShared {
    pub(crate) id: VcpuId,
    running: Mutex<Option<Running>>,
    kicked: AtomicBool,
    /// Round of the halt watch that wants to know what the vCPU does; zero for none.
    inspection: AtomicU64,
    pub(crate) counters: Counters,
    kernel_stats: Option<KernelStats>,
}

impl VcpuShared {
    pub(crate) fn new(id: VcpuId, kernel_stats: Option<KernelStats>) -> Self {
        VcpuShared {
            id,
            running: Mutex::new(None),
            kicked: AtomicBool::new(false),
            inspection: AtomicU64::new(0),
            counters: Counters::default(),
            kernel_stats,
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the vCPU's KVM_RUN, if it is in one or about to be.
    fn interrupt(&self) {
        if let Some(running) = &*self.running() {
            running.run_page.set_immediate_exit(true);
            // SAFETY: the thread takes itself out of `running` under the lock we hold before it can end.
            unsafe { libc::pthread_kill(running.thread, kick_signal()) };
        }
    }

    /// Declares the calling thread to be the one that runs the vCPU, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>, run_page: &Arc<RunPage>) -> RunGuard {
        allow_kick_signal();
        // SAFETY: has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.running() = Some(Running { thread, run_page: run_page.clone() });
        // A kick from before this point found nobody to signal.
        if self.kicked.load(Ordering::SeqCst) || self.inspection.load(Ordering::SeqCst) != 0 {
            run_page.set_immediate_exit(true);
        }
        RunGuard { vcpu: self.clone() }
    }

    /// Consumes a kick.
    pub(crate) fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Asks the vCPU's thread to report to the halt watch.
    pub(crate) fn request_inspection(&self, round: u64) {
        self.inspection.store(round, Ordering::SeqCst);
        self.interrupt();
    }

    /// Consumes such a request.
    pub(crate) fn take_inspection(&self) -> Option<u64> {
        match self.inspection.swap(0, Ordering::SeqCst) {
            0 => None,
            round => Some(round),
        }
    }

    /// Processor time of the thread that runs the vCPU, in nanoseconds; `None` while nobody does.
    pub(crate) fn thread_time_ns(&self) -> Option<u64> {
        let guard = self.running();
        let running = guard.as_ref()?;
        let mut clock: libc::clockid_t = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the thread lives while it is in `running`, which is locked; both results are our own variables.
        let failed = unsafe {
            libc::pthread_getcpuclockid(running.thread, &mut clock) != 0
                || libc::clock_gettime(clock, &mut time) != 0
        };
        (!failed).then_some(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }
}

impl Kick for VcpuShared {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.interrupt();
    }

    fn stats(&self) -> Vec<(String, u64)> {
        self.counters.named(self.kernel_stats.as_ref())
    }
}

/// Keeps a thread declared as the one that runs a vCPU.
pub(crate) struct RunGuard {
    vcpu: Arc<VcpuShared>,
}

impl Drop for RunGuard {
    fn drop(&mut self) {
        *self.vcpu.running() = None;
    }
}

/// Lets the calling thread receive the kick signal, whatever mask it inherited.
fn allow_kick_signal() {
    // SAFETY: an all-zero set is a valid object to initialise, and the calls only touch it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}
