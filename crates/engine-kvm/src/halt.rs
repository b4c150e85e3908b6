//! Noticing that the machine has halted for good.
//!
//! KVM carries out HLT itself, so a vCPU that waits with interrupts disabled, which only an NMI, INIT or reset can
//! end, looks from outside like one that waits for its next timer. The watch compares the processor time of the
//! vCPU threads at long intervals. Only when none of them has run at all for a whole interval does it interrupt
//! them to look at their run state; the verdict must be the same twice, with stillness between, before it counts.
//! An idle guest thus costs a few clock readings a second and, if it is very quiet, an exit every few seconds.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use engine::{EngineError, Result};

use crate::kick::VcpuShared;

/// How long the vCPUs must have been still before they are looked at.
const FIRST_INTERVAL: Duration = Duration::from_millis(400);
/// The interval grows to this while looking finds a machine that is merely idle.
const LAST_INTERVAL: Duration = Duration::from_secs(4);
/// How long the vCPUs may take to report. One that is inside a device answers late: then it was not halted.
const REPORT_TIMEOUT: Duration = Duration::from_millis(200);
/// Equal verdicts that are needed.
const CONFIRMATIONS: u32 = 2;

/// What a vCPU does, for the purpose of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    /// Runs, or waits for something that can come from inside the machine.
    Alive,
    /// Waits in HLT with interrupts disabled.
    HaltedForGood,
    /// Waits for INIT or SIPI.
    NotStarted,
}

#[derive(Default)]
struct State {
    vcpus: Vec<Arc<VcpuShared>>,
    /// Number of the latest round.
    round: u64,
    /// Reports of the latest round, by position in `vcpus`.
    reports: Vec<Option<Activity>>,
    /// Rounds in a row that found every vCPU halted for good.
    confirmed: u32,
    stop: bool,
}

impl State {
    /// The verdict of the latest round, once every vCPU has reported.
    fn verdict(&self) -> Option<bool> {
        let reports: Option<Vec<Activity>> = self.reports.iter().copied().collect();
        let reports = reports?;
        Some(reports.contains(&Activity::HaltedForGood) && !reports.contains(&Activity::Alive))
    }
}

struct Inner {
    /// vCPUs that the VM will have; the watch begins when all exist.
    expected: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watch of one VM and its thread.
pub(crate) struct HaltWatch {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl HaltWatch {
    /// Starts watching a VM that will have `expected` vCPUs.
    pub(crate) fn start(expected: usize) -> Result<HaltWatch> {
        let inner = Arc::new(Inner { expected, state: Mutex::default(), changed: Condvar::new() });
        let thread = std::thread::Builder::new()
            .name("kvm-halt-watch".into())
            .spawn({
                let inner = inner.clone();
                move || watch(&inner)
            })
            .map_err(|source| EngineError::Host { what: "starting the halt watch", source })?;
        Ok(HaltWatch { inner, thread: Some(thread) })
    }

    /// Adds a vCPU.
    pub(crate) fn add(&self, vcpu: Arc<VcpuShared>) {
        self.inner.lock().vcpus.push(vcpu);
    }

    /// A vCPU's thread answers an inspection. Returns whether this completes the proof that all have halted for
    /// good: then the caller is the one to say so.
    pub(crate) fn report(&self, vcpu: &VcpuShared, round: u64, activity: Activity) -> bool {
        let mut state = self.inner.lock();
        if round != state.round {
            return false;
        }
        let Some(position) = state.vcpus.iter().position(|v| v.id == vcpu.id) else { return false };
        state.reports[position] = Some(activity);
        let Some(halted) = state.verdict() else { return false };
        state.confirmed = if halted { state.confirmed + 1 } else { 0 };
        let proven = state.confirmed >= CONFIRMATIONS;
        if proven {
            state.confirmed = 0;
        }
        self.inner.changed.notify_all();
        proven
    }
}

impl Drop for HaltWatch {
    fn drop(&mut self) {
        self.inner.lock().stop = true;
        self.inner.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic; if it did there is nothing left to undo.
            let _ = thread.join();
        }
    }
}

/// Processor time of every vCPU thread; `None` unless all vCPUs exist and are being run.
fn thread_times(state: &State, expected: usize) -> Option<Vec<u64>> {
    if state.vcpus.len() != expected {
        return None;
    }
    state.vcpus.iter().map(|vcpu| vcpu.thread_time_ns()).collect()
}

fn watch(inner: &Inner) {
    let mut interval = FIRST_INTERVAL;
    let mut before: Option<Vec<u64>> = None;
    let mut state = inner.lock();
    loop {
        state = wait(inner, state, interval, |state| state.stop);
        if state.stop {
            return;
        }
        let now = thread_times(&state, inner.expected);
        if now.is_none() || now != before {
            state.confirmed = 0;
            interval = FIRST_INTERVAL;
            before = now;
            continue;
        }

        state.round += 1;
        state.reports = vec![None; state.vcpus.len()];
        let (round, vcpus) = (state.round, state.vcpus.clone());
        // Interrupting takes a vCPU's lock, and a vCPU reports with ours wanted: never hold both.
        drop(state);
        for vcpu in &vcpus {
            vcpu.request_inspection(round);
        }
        state = wait(inner, inner.lock(), REPORT_TIMEOUT, |state| state.stop || state.verdict().is_some());
        if state.verdict() != Some(true) {
            state.confirmed = 0;
            interval = (interval * 2).min(LAST_INTERVAL);
        } else {
            interval = FIRST_INTERVAL;
        }
        // The vCPUs need a moment to be back in the guest; their time so far is the inspection's.
        state = wait(inner, state, FIRST_INTERVAL / 4, |state| state.stop);
        before = thread_times(&state, inner.expected);
    }
}

/// Waits until `done` or for at most `timeout`.
fn wait<'a>(
    inner: &'a Inner,
    state: MutexGuard<'a, State>,
    timeout: Duration,
    mut done: impl FnMut(&State) -> bool,
) -> MutexGuard<'a, State> {
    inner
        .changed
        .wait_timeout_while(state, timeout, |state| !done(state))
        .unwrap_or_else(PoisonError::into_inner)
        .0
}
