//! The outside world for device tests: lines that remember, a clock that is set, an alarm that is looked at.

pub mod disk;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::host::{Alarm, ByteSink, Clock, IrqLine, MsiSink, PowerControl, PowerEvent};

/// Remembers its level and counts rising edges.
#[derive(Default)]
pub struct Line {
    level: AtomicBool,
    edges: AtomicU64,
}

impl Line {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub fn edges(&self) -> u64 {
        self.edges.load(Ordering::SeqCst)
    }
}

impl IrqLine for Line {
    fn set(&self, asserted: bool) {
        if !self.level.swap(asserted, Ordering::SeqCst) && asserted {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Guest time that stands until it is moved; the wall clock shows `wall_start` plus guest time.
pub struct ManualClock {
    now_ns: AtomicU64,
    wall_start: u64,
}

impl ManualClock {
    /// `wall_start` in seconds since 1970.
    pub fn new(wall_start: u64) -> Arc<Self> {
        Arc::new(ManualClock { now_ns: AtomicU64::new(0), wall_start })
    }

    pub fn advance(&self, ns: u64) {
        self.now_ns.fetch_add(ns, Ordering::SeqCst);
    }

    pub fn set(&self, ns: u64) {
        self.now_ns.store(ns, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::SeqCst)
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.wall_start) + Duration::from_nanos(self.now_ns())
    }
}

/// Remembers its deadline.
#[derive(Default)]
pub struct ManualAlarm(Mutex<Option<u64>>);

impl ManualAlarm {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn deadline(&self) -> Option<u64> {
        *self.0.lock().unwrap()
    }

    /// Moves the clock to the deadline, which is then no longer set.
    pub fn ring(&self, clock: &ManualClock) -> u64 {
        let deadline = self.0.lock().unwrap().take().expect("an alarm is set");
        clock.set(deadline);
        deadline
    }
}

impl Alarm for ManualAlarm {
    fn set(&self, deadline_ns: Option<u64>) {
        *self.0.lock().unwrap() = deadline_ns;
    }
}

/// Collects output and counts invitations to send input.
#[derive(Default)]
pub struct Sink {
    pub bytes: Mutex<Vec<u8>>,
    pub ready: AtomicU64,
}

impl Sink {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.bytes.lock().unwrap())
    }
}

impl ByteSink for Sink {
    fn write(&self, bytes: &[u8]) {
        self.bytes.lock().unwrap().extend_from_slice(bytes);
    }

    fn input_ready(&self) {
        self.ready.fetch_add(1, Ordering::SeqCst);
    }
}

/// Collects power events.
#[derive(Default)]
pub struct Power(pub Mutex<Vec<PowerEvent>>);

impl Power {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn take(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl PowerControl for Power {
    fn request(&self, event: PowerEvent) {
        self.0.lock().unwrap().push(event);
    }
}

/// Collects message-signalled interrupts.
#[derive(Default)]
pub struct Messages(pub Mutex<Vec<(u64, u32)>>);

impl Messages {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiSink for Messages {
    fn send(&self, address: u64, data: u32) {
        self.0.lock().unwrap().push((address, data));
    }
}
