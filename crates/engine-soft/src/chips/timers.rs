//! The alarm clock of a VM's interrupt chips: one thread that sleeps until the next deadline of any LAPIC timer
//! or of the 8254 and fires what is due.
//!
//! The thread sleeps in a read of a timerfd. A vCPU that sets an earlier deadline moves the timerfd itself, one
//! system call and no wakeup; a later deadline costs nothing, since the thread looks at all deadlines anyway
//! when it next wakes. Each deadline is stored before `armed_ns` is compared, and the thread sets `armed_ns` to
//! "never" before it looks at the deadlines: one of the two notices the other.
//!
//! Without the thread (in tests) nothing is armed and [`Chips::run_timers`] does all the work.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::vcpu::NEVER;
use super::{Chips, Time, lock};

/// Deadlines that are not a LAPIC's, and what the alarm is set to.
pub(super) struct Timers {
    pit_deadline_ns: AtomicU64,
    /// VM time for which the timerfd is set; zero, so that nothing is earlier, while there is no thread.
    armed_ns: AtomicU64,
    clock: Mutex<Clock>,
}

#[derive(Default)]
struct Clock {
    timer: Option<File>,
    paused: bool,
}

impl Default for Timers {
    fn default() -> Self {
        Timers {
            pit_deadline_ns: AtomicU64::new(NEVER),
            armed_ns: AtomicU64::new(0),
            clock: Mutex::default(),
        }
    }
}

impl Timers {
    pub(super) fn pit_deadline_ns(&self) -> Option<u64> {
        Some(self.pit_deadline_ns.load(Ordering::SeqCst)).filter(|deadline| *deadline != NEVER)
    }

    pub(super) fn set_pit_deadline(&self, deadline_ns: Option<u64>, time: &dyn Time) {
        let deadline_ns = deadline_ns.unwrap_or(NEVER);
        if self.pit_deadline_ns.swap(deadline_ns, Ordering::SeqCst) != deadline_ns {
            self.note(deadline_ns, time);
        }
    }

    /// A deadline has been stored: wakes the thread no later than that.
    pub(super) fn note(&self, deadline_ns: u64, time: &dyn Time) {
        if deadline_ns >= self.armed_ns.load(Ordering::SeqCst) {
            return;
        }
        let clock = lock(&self.clock);
        if deadline_ns < self.armed_ns.load(Ordering::SeqCst) {
            self.arm(&clock, deadline_ns, time);
        }
    }

    fn arm(&self, clock: &Clock, deadline_ns: u64, time: &dyn Time) {
        let Some(timer) = &clock.timer else { return };
        self.armed_ns.store(deadline_ns, Ordering::SeqCst);
        if deadline_ns == NEVER {
            set_timer(timer, None);
        } else {
            set_timer(timer, Some(deadline_ns.saturating_sub(time.now_ns())));
        }
    }
}

/// The thread that fires timers. Dropping it stops and joins the thread.
pub struct AlarmThread {
    chips: Arc<Chips>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl AlarmThread {
    /// Starts the thread; at most one per [`Chips`] at a time.
    ///
    /// # Errors
    ///
    /// The host's, if it has no timerfd or thread to give.
    pub fn start(chips: Arc<Chips>) -> io::Result<Self> {
        let timer = new_timer()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut sleeper = timer.try_clone()?;
        let thread = std::thread::Builder::new().name("chips-alarm".into()).spawn({
            let (chips, stop) = (chips.clone(), stop.clone());
            move || {
                let mut expirations = [0; 8];
                // An error other than an interruption would mean that the descriptor is gone.
                while !stop.load(Ordering::SeqCst) {
                    match sleeper.read_exact(&mut expirations) {
                        Ok(()) => chips.ring(),
                        Err(error) => {
                            tracing::error!(%error, "the alarm clock of the interrupt chips cannot be read");
                            break;
                        }
                    }
                }
            }
        })?;
        lock(&chips.timers.clock).timer = Some(timer);
        chips.ring();
        Ok(AlarmThread { chips, stop, thread: Some(thread) })
    }
}

impl Drop for AlarmThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        {
            let mut clock = lock(&self.chips.timers.clock);
            if let Some(timer) = clock.timer.take() {
                set_timer(&timer, Some(0));
            }
            self.chips.timers.armed_ns.store(0, Ordering::SeqCst);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the alarm thread of the interrupt chips panicked");
        }
    }
}

impl Chips {
    /// Stops the timers, or lets them go on. To be called when [`Time::now_ns`] has come to stand still, and
    /// before it moves again.
    pub fn pause_timers(&self, paused: bool) {
        lock(&self.timers.clock).paused = paused;
        self.ring();
    }

    /// Fires what is due and sets the alarm for what is next.
    fn ring(&self) {
        if !lock(&self.timers.clock).paused {
            self.run_timers(self.time.now_ns());
        }
        let clock = lock(&self.timers.clock);
        if clock.timer.is_none() {
            return;
        }
        if clock.paused {
            self.timers.arm(&clock, NEVER, &*self.time);
            // Deadlines that come now wait for the end of the pause.
            self.timers.armed_ns.store(0, Ordering::SeqCst);
            return;
        }
        self.timers.armed_ns.store(NEVER, Ordering::SeqCst);
        self.timers.arm(&clock, self.next_deadline_ns().unwrap_or(NEVER), &*self.time);
    }
}

/// A timerfd on the monotonic clock.
fn new_timer() -> io::Result<File> {
    // SAFETY: timerfd_create takes no pointers.
    let descriptor = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// Sets the timer to go off after `wait_ns`, at once for zero, never for `None`.
fn set_timer(timer: &File, wait_ns: Option<u64>) {
    /// Longer waits end early, which is harmless; they would overflow the kernel's time.
    const LONGEST_NS: u64 = 86_400 * NS_PER_SECOND;
    const NS_PER_SECOND: u64 = 1_000_000_000;
    // A zero time disarms, so "at once" is one nanosecond.
    let wait_ns = wait_ns.map_or(0, |wait_ns| wait_ns.clamp(1, LONGEST_NS));
    let setting = libc::itimerspec {
        it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: libc::timespec {
            tv_sec: (wait_ns / NS_PER_SECOND) as libc::time_t,
            tv_nsec: (wait_ns % NS_PER_SECOND) as libc::c_long,
        },
    };
    // SAFETY: `setting` lives across the call, the old setting is not asked for.
    let result = unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &setting, std::ptr::null_mut()) };
    debug_assert_eq!(result, 0, "a valid timer takes a valid time");
}
