//! The guest's time and the devices' alarms.
//!
//! [`GuestClock`] counts host-monotonic nanoseconds since power-on, less the time the machine stood still.
//! [`Timers`] is one thread that rings every [`devices::host::Alarm`] of the board; it follows the guest's clock, so
//! no alarm rings while the machine is paused.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use devices::host::{Alarm, Clock, OnAlarm};

#[derive(Debug)]
struct Reading {
    /// Guest time when last started or stopped.
    base_ns: u64,
    /// Since when it runs.
    running_since: Option<Instant>,
}

/// The guest's time. It is made standing still at zero.
#[derive(Debug)]
pub struct GuestClock {
    reading: RwLock<Reading>,
}

impl Default for GuestClock {
    fn default() -> Self {
        GuestClock { reading: RwLock::new(Reading { base_ns: 0, running_since: None }) }
    }
}

impl GuestClock {
    /// Lets it run, if it stands.
    fn start(&self) {
        let mut reading = self.reading.write().unwrap_or_else(|e| e.into_inner());
        reading.running_since.get_or_insert_with(Instant::now);
    }

    /// Makes it stand still, if it runs.
    fn stop(&self) {
        let mut reading = self.reading.write().unwrap_or_else(|e| e.into_inner());
        reading.base_ns = reading.now_ns();
        reading.running_since = None;
    }

    fn runs(&self) -> bool {
        self.reading.read().unwrap_or_else(|e| e.into_inner()).running_since.is_some()
    }
}

impl Reading {
    fn now_ns(&self) -> u64 {
        let running = self.running_since.map_or(0, |since| since.elapsed().as_nanos());
        self.base_ns.saturating_add(u64::try_from(running).unwrap_or(u64::MAX))
    }
}

impl Clock for GuestClock {
    fn now_ns(&self) -> u64 {
        self.reading.read().unwrap_or_else(|e| e.into_inner()).now_ns()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// One device's alarm.
#[derive(Default)]
struct Slot {
    deadline_ns: Option<u64>,
    device: Option<Weak<dyn OnAlarm>>,
}

#[derive(Default)]
struct Schedule {
    slots: Vec<Slot>,
    /// Every armed alarm: deadline and index.
    armed: BTreeSet<(u64, usize)>,
    ending: bool,
}

struct Shared {
    clock: Arc<GuestClock>,
    schedule: Mutex<Schedule>,
    changed: Condvar,
}

impl Shared {
    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The clock and the thread that rings the alarms. Dropping it ends the thread.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Timers {
    /// A clock at zero, standing still, and its thread.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub fn new() -> io::Result<Self> {
        let shared =
            Arc::new(Shared { clock: Arc::default(), schedule: Mutex::default(), changed: Condvar::new() });
        let ringing = shared.clone();
        let thread = thread::Builder::new().name("timers".into()).spawn(move || ring(&ringing))?;
        Ok(Timers { shared, thread: Some(thread) })
    }

    /// The guest's clock.
    pub fn clock(&self) -> Arc<GuestClock> {
        self.shared.clock.clone()
    }

    /// An alarm; [`DeviceAlarm::connect`] says whom it rings.
    pub fn alarm(&self) -> Arc<DeviceAlarm> {
        let mut schedule = self.shared.schedule();
        schedule.slots.push(Slot::default());
        Arc::new(DeviceAlarm { shared: self.shared.clone(), index: schedule.slots.len() - 1 })
    }

    /// Lets the guest's time run.
    pub fn start(&self) {
        self.shared.clock.start();
        self.wake();
    }

    /// Makes the guest's time stand still.
    pub fn stop(&self) {
        self.shared.clock.stop();
        self.wake();
    }

    fn wake(&self) {
        // The lock makes sure that the thread either has not looked at the clock yet or already waits.
        drop(self.shared.schedule());
        self.shared.changed.notify_all();
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.schedule().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An alarm of [`Timers`].
pub struct DeviceAlarm {
    shared: Arc<Shared>,
    index: usize,
}

impl DeviceAlarm {
    /// Says which device it rings. Until then it rings nobody.
    pub fn connect(&self, device: Weak<dyn OnAlarm>) {
        self.shared.schedule().slots[self.index].device = Some(device);
    }
}

impl Alarm for DeviceAlarm {
    fn set(&self, deadline_ns: Option<u64>) {
        let mut schedule = self.shared.schedule();
        let first_before = schedule.armed.first().copied();
        if let Some(old) = std::mem::replace(&mut schedule.slots[self.index].deadline_ns, deadline_ns) {
            schedule.armed.remove(&(old, self.index));
        }
        if let Some(new) = deadline_ns {
            schedule.armed.insert((new, self.index));
        }
        if schedule.armed.first().copied() != first_before {
            self.shared.changed.notify_all();
        }
    }
}

/// The thread: waits for the earliest deadline and rings.
fn ring(shared: &Shared) {
    // SAFETY: takes plain numbers; asks the kernel not to bundle this thread's wake-ups with others' (50 µs by default).
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) };
    let mut schedule = shared.schedule();
    loop {
        if schedule.ending {
            return;
        }
        let next = if shared.clock.runs() { schedule.armed.first().copied() } else { None };
        let Some((deadline_ns, index)) = next else {
            schedule = shared.changed.wait(schedule).unwrap_or_else(|e| e.into_inner());
            continue;
        };
        let left_ns = deadline_ns.saturating_sub(shared.clock.now_ns());
        if left_ns > 0 {
            let waited = shared.changed.wait_timeout(schedule, Duration::from_nanos(left_ns));
            schedule = waited.unwrap_or_else(|e| e.into_inner()).0;
            continue;
        }
        schedule.armed.remove(&(deadline_ns, index));
        schedule.slots[index].deadline_ns = None;
        let device = schedule.slots[index].device.as_ref().and_then(Weak::upgrade);
        drop(schedule);
        if let Some(device) = device {
            device.on_alarm();
        }
        schedule = shared.schedule();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

    struct Bell(Mutex<Sender<&'static str>>, &'static str);

    impl OnAlarm for Bell {
        fn on_alarm(&self) {
            self.0.lock().unwrap().send(self.1).unwrap();
        }
    }

    struct Bed {
        timers: Timers,
        rings: Receiver<&'static str>,
        _bells: [Arc<Bell>; 2],
        first: Arc<DeviceAlarm>,
        second: Arc<DeviceAlarm>,
    }

    fn bed() -> Bed {
        let timers = Timers::new().unwrap();
        let (send, rings) = channel();
        let bells = ["first", "second"].map(|n| Arc::new(Bell(Mutex::new(send.clone()), n)));
        let alarms = [timers.alarm(), timers.alarm()];
        for (alarm, bell) in alarms.iter().zip(&bells) {
            let bell: Weak<dyn OnAlarm> = Arc::<Bell>::downgrade(bell);
            alarm.connect(bell);
        }
        let [first, second] = alarms;
        Bed { timers, rings, _bells: bells, first, second }
    }

    #[test]
    fn rings_in_the_order_of_deadlines() {
        let bed = bed();
        bed.second.set(Some(2_000_000));
        bed.first.set(Some(1_000_000));
        bed.timers.start();
        assert_eq!(bed.rings.recv(), Ok("first"));
        assert_eq!(bed.rings.recv(), Ok("second"));
        assert!(bed.timers.clock().now_ns() >= 2_000_000, "never early");
        bed.first.set(Some(0));
        assert_eq!(bed.rings.recv(), Ok("first"), "a deadline in the past rings at once");
        assert_eq!(bed.rings.try_recv(), Err(TryRecvError::Empty), "and once");
    }

    #[test]
    fn a_new_deadline_replaces_the_old_one() {
        let bed = bed();
        bed.timers.start();
        bed.first.set(Some(u64::MAX));
        bed.first.set(None);
        bed.first.set(Some(u64::MAX));
        bed.first.set(Some(bed.timers.clock().now_ns() + 1000));
        assert_eq!(bed.rings.recv(), Ok("first"));
        assert!(bed.timers.shared.schedule().armed.is_empty());
    }

    #[test]
    fn time_and_alarms_stand_still_together() {
        let bed = bed();
        let clock = bed.timers.clock();
        assert_eq!(clock.now_ns(), 0);
        bed.first.set(Some(0));
        bed.timers.start();
        assert_eq!(bed.rings.recv(), Ok("first"));
        bed.timers.stop();
        let stood = clock.now_ns();
        bed.first.set(Some(0));
        bed.second.set(Some(stood + 1));
        assert_eq!(clock.now_ns(), stood);
        // Ringing is on another thread; the end of that thread shows that it did not happen.
        let Bed { timers, rings, .. } = bed;
        drop(timers);
        assert_eq!(rings.try_recv(), Err(TryRecvError::Empty));
    }
}
