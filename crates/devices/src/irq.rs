//! Interrupt wiring on the board: several outputs on one line.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::access::lock;
use crate::host::IrqLine;

/// A line that several devices pull: asserted while any of them asserts (wired OR, as level-triggered PCI interrupts
/// and shared ISA interrupts are).
pub struct SharedLine {
    output: Arc<dyn IrqLine>,
    asserted_inputs: Mutex<u32>,
}

impl SharedLine {
    /// A line that drives `output` and has no input yet.
    pub fn new(output: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(SharedLine { output, asserted_inputs: Mutex::new(0) })
    }

    /// One more input, not asserted. Dropping it releases it.
    pub fn input(self: &Arc<Self>) -> Arc<dyn IrqLine> {
        Arc::new(SharedInput { line: self.clone(), asserted: AtomicBool::new(false) })
    }
}

struct SharedInput {
    line: Arc<SharedLine>,
    asserted: AtomicBool,
}

impl IrqLine for SharedInput {
    fn set(&self, asserted: bool) {
        // The count's lock also orders the calls to the output, so its last level is the right one.
        let mut count = lock(&self.line.asserted_inputs);
        if self.asserted.swap(asserted, Ordering::Relaxed) == asserted {
            return;
        }
        *count = if asserted { *count + 1 } else { count.saturating_sub(1) };
        match (asserted, *count) {
            (true, 1) => self.line.output.set(true),
            (false, 0) => self.line.output.set(false),
            _ => {}
        }
    }
}

impl Drop for SharedInput {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// A device's end of its line: passes changes on and keeps repetitions back, since a register access is cheap and telling
/// the interrupt controller may not be. To be driven under the device's own lock.
pub(crate) struct Output {
    line: Arc<dyn IrqLine>,
    asserted: AtomicBool,
}

impl Output {
    pub(crate) fn new(line: Arc<dyn IrqLine>) -> Self {
        Output { line, asserted: AtomicBool::new(false) }
    }

    pub(crate) fn set(&self, asserted: bool) {
        if self.asserted.swap(asserted, Ordering::Relaxed) != asserted {
            self.line.set(asserted);
        }
    }

    /// An edge, unless the line is asserted already.
    pub(crate) fn pulse(&self) {
        if !self.asserted.load(Ordering::Relaxed) {
            self.line.pulse();
        }
    }
}

/// An output that is connected to nothing.
pub struct Unconnected;

impl IrqLine for Unconnected {
    fn set(&self, _asserted: bool) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Line;

    #[test]
    fn asserted_while_any_input_is() {
        let output = Arc::new(Line::default());
        let shared = SharedLine::new(output.clone());
        let (a, b) = (shared.input(), shared.input());
        a.set(true);
        b.set(true);
        b.set(true);
        a.set(false);
        assert!(output.level(), "b still pulls");
        drop(b);
        assert!(!output.level(), "an unplugged device lets go");
        assert_eq!(output.edges(), 1);
    }
}
