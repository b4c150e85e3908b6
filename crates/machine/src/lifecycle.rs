//! The life of a machine: it starts, runs, may pause and go on, and ends once, for one reason.
//!
//! ```text
//! Starting ──► Running ◄──► Paused
//!     └───────────┴────────────┴──────► Ended(why)
//! ```
//!
//! Whoever wants a change (a device, a signal, the control socket) calls a method here, from any thread and without
//! waiting. vCPU threads come by at [`Lifecycle::gate`] each time they leave the guest, and are made to leave it by their
//! kicks. The first reason to end wins.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use control::MachineState;
use devices::host::{PowerControl, PowerEvent};
use engine::Kick;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest, or somebody outside, pressed reset. A supervisor starts the machine again.
    Reset,
    /// The guest, or somebody outside, turned the power off.
    PowerOff,
    /// Every processor waits with interrupts disabled: nothing inside can go on.
    Halt,
    /// A processor shut down after a triple fault.
    TripleFault,
    /// Somebody destroyed the machine.
    Destroyed,
    /// The machine could not go on; one line.
    Failed(String),
}

impl Ending {
    /// The exit status that tells it (bhyve(8), "EXIT STATUS").
    pub fn exit_status(&self) -> u8 {
        match self {
            Ending::Reset => 0,
            Ending::PowerOff => 1,
            Ending::Halt => 2,
            Ending::TripleFault => 3,
            Ending::Destroyed | Ending::Failed(_) => 4,
        }
    }
}

impl From<PowerEvent> for Ending {
    fn from(event: PowerEvent) -> Self {
        match event {
            PowerEvent::Reset => Ending::Reset,
            PowerEvent::PowerOff => Ending::PowerOff,
        }
    }
}

/// Why a request to pause or resume is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine is {0}")]
pub struct WrongState(pub MachineState);

#[derive(Debug)]
enum Phase {
    Starting,
    Running,
    Paused,
    Ended(Ending),
}

struct State {
    phase: Phase,
    kickers: Vec<Arc<dyn Kick>>,
    /// vCPU threads that wait in [`Lifecycle::gate`].
    parked: usize,
    /// vCPU threads that have left [`Lifecycle::gate`] for good.
    gone: usize,
}

/// Where a machine is in its life.
pub struct Lifecycle {
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Lifecycle {
    fn default() -> Self {
        let state = State { phase: Phase::Starting, kickers: Vec::new(), parked: 0, gone: 0 };
        Lifecycle { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Lifecycle {
    /// A machine that is being put together.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn change(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        for kicker in &state.kickers {
            kicker.kick();
        }
        self.changed.notify_all();
    }

    /// What the machine is doing.
    pub fn now(&self) -> MachineState {
        describe(&self.lock().phase)
    }

    /// Makes a vCPU known; all of them before [`Lifecycle::run`].
    pub fn add_vcpu(&self, kicker: Arc<dyn Kick>) {
        self.lock().kickers.push(kicker);
    }

    /// Lets the vCPUs begin. A machine that has ended meanwhile stays so.
    pub fn run(&self) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Starting) {
            self.change(&mut state, Phase::Running);
        }
    }

    /// Ends the machine, unless it has ended already.
    pub fn end(&self, ending: Ending) {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Ended(_)) {
            self.change(&mut state, Phase::Ended(ending));
        }
    }

    /// Stops every vCPU and returns when all have stopped; `stopped` is then called before anything can resume them.
    ///
    /// # Errors
    /// The machine does not run, or ends before all have stopped.
    pub fn pause(&self, stopped: impl FnOnce()) -> Result<(), WrongState> {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Running) {
            return Err(WrongState(describe(&state.phase)));
        }
        self.change(&mut state, Phase::Paused);
        while matches!(state.phase, Phase::Paused) && state.parked < state.kickers.len() {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        if !matches!(state.phase, Phase::Paused) {
            return Err(WrongState(describe(&state.phase)));
        }
        stopped();
        Ok(())
    }

    /// Lets the vCPUs go on; `resuming` is called just before.
    ///
    /// # Errors
    /// The machine is not paused, or not all vCPUs have stopped yet.
    pub fn resume(&self, resuming: impl FnOnce()) -> Result<(), WrongState> {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Paused) || state.parked < state.kickers.len() {
            return Err(WrongState(describe(&state.phase)));
        }
        resuming();
        self.change(&mut state, Phase::Running);
        Ok(())
    }

    /// Called by a vCPU's thread outside the guest: waits while the machine stands still. False says that the machine has
    /// ended and the thread must not come again.
    pub fn gate(&self) -> bool {
        let mut state = self.lock();
        loop {
            match state.phase {
                Phase::Running => return true,
                Phase::Ended(_) => {
                    state.gone += 1;
                    self.changed.notify_all();
                    return false;
                }
                Phase::Starting | Phase::Paused => {
                    state.parked += 1;
                    self.changed.notify_all();
                    state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                    state.parked -= 1;
                }
            }
        }
    }

    /// Waits for the end.
    pub fn wait_end(&self) -> Ending {
        let mut state = self.lock();
        loop {
            if let Phase::Ended(ending) = &state.phase {
                return ending.clone();
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// After the end: waits until every vCPU thread has left the guest for good; false if they have not after `timeout`.
    pub fn wait_vcpus_gone(&self, timeout: Duration) -> bool {
        let remaining = |s: &mut State| s.gone < s.kickers.len();
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, remaining);
        !waited.unwrap_or_else(|e| e.into_inner()).1.timed_out()
    }

    /// Counters of each vCPU.
    pub fn vcpu_stats(&self) -> Vec<Vec<(String, u64)>> {
        let kickers = self.lock().kickers.clone();
        kickers.iter().map(|k| k.stats()).collect()
    }

    /// Makes every vCPU leave the guest for a moment.
    pub fn kick_all(&self) {
        for kicker in &self.lock().kickers {
            kicker.kick();
        }
    }
}

impl PowerControl for Lifecycle {
    fn request(&self, event: PowerEvent) {
        self.end(event.into());
    }
}

fn describe(phase: &Phase) -> MachineState {
    match phase {
        Phase::Starting => MachineState::Starting,
        Phase::Running => MachineState::Running,
        Phase::Paused => MachineState::Paused,
        Phase::Ended(_) => MachineState::Stopping,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};
    use std::thread;

    /// A vCPU that does nothing but leave the guest when kicked.
    struct Kicked(Sender<()>);

    impl Kick for Kicked {
        fn kick(&self) {
            let _ = self.0.send(());
        }
        fn stats(&self) -> Vec<(String, u64)> {
            vec![("kicks".into(), 1)]
        }
    }

    fn with_vcpus(count: usize) -> (Arc<Lifecycle>, Vec<thread::JoinHandle<()>>) {
        let lifecycle = Lifecycle::new();
        let threads = (0..count)
            .map(|_| {
                let (kick, kicks) = channel();
                lifecycle.add_vcpu(Arc::new(Kicked(kick)));
                let lifecycle = lifecycle.clone();
                thread::spawn(move || {
                    while lifecycle.gate() {
                        let _ = kicks.recv();
                    }
                })
            })
            .collect();
        (lifecycle, threads)
    }

    #[test]
    fn pauses_when_all_have_stopped_and_goes_on() {
        let (lifecycle, threads) = with_vcpus(3);
        assert_eq!(lifecycle.pause(|| ()), Err(WrongState(MachineState::Starting)));
        lifecycle.run();
        assert_eq!(lifecycle.resume(|| ()), Err(WrongState(MachineState::Running)));
        for _ in 0..50 {
            let mut stopped = false;
            lifecycle.pause(|| stopped = true).unwrap();
            assert!(stopped);
            assert_eq!(lifecycle.now(), MachineState::Paused);
            assert_eq!(lifecycle.lock().parked, 3);
            assert_eq!(lifecycle.pause(|| ()), Err(WrongState(MachineState::Paused)));
            lifecycle.resume(|| ()).unwrap();
        }
        lifecycle.pause(|| ()).unwrap();
        lifecycle.end(Ending::PowerOff);
        assert!(lifecycle.wait_vcpus_gone(Duration::from_secs(60)));
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn the_first_reason_to_end_wins() {
        let (lifecycle, threads) = with_vcpus(2);
        lifecycle.run();
        lifecycle.request(PowerEvent::Reset);
        lifecycle.request(PowerEvent::PowerOff);
        lifecycle.run();
        assert_eq!(lifecycle.wait_end(), Ending::Reset);
        assert_eq!(lifecycle.now(), MachineState::Stopping);
        assert_eq!(lifecycle.resume(|| ()), Err(WrongState(MachineState::Stopping)));
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn an_end_before_the_start_lets_nothing_run() {
        let (lifecycle, threads) = with_vcpus(1);
        lifecycle.end(Ending::Destroyed);
        lifecycle.run();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(lifecycle.wait_end().exit_status(), 4);
    }
}
