//! What a device needs from the world around it. The machine implements these; tests use their own.

use std::time::SystemTime;

/// An interrupt line from a device to the interrupt controllers.
pub trait IrqLine: Send + Sync {
    /// Drives the line. Setting the level it already has is harmless.
    fn set(&self, asserted: bool);

    /// An edge: asserts and releases.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// Carries message-signalled interrupts to the local APICs (SDM 3A §10.11; PCI 3.0 §6.8).
pub trait MsiSink: Send + Sync {
    /// Delivers the message.
    fn send(&self, address: u64, data: u32);
}

/// The guest's time. It stands still while the machine is paused.
pub trait Clock: Send + Sync {
    /// Nanoseconds since the machine was powered on; monotonic.
    fn now_ns(&self) -> u64;

    /// The host's wall clock.
    fn wall(&self) -> SystemTime;
}

/// A one-shot alarm that belongs to one device. When it rings the machine calls the device's [`OnAlarm::on_alarm`],
/// on a thread of its own, with no lock of the device held.
pub trait Alarm: Send + Sync {
    /// Rings at `deadline_ns` of the [`Clock`] (at once if past), replacing any earlier deadline; `None` cancels.
    fn set(&self, deadline_ns: Option<u64>);
}

/// The device's end of an [`Alarm`].
pub trait OnAlarm: Send + Sync {
    /// The deadline has come. May be called spuriously; the device looks at its own state.
    fn on_alarm(&self);
}

/// Where a device sends bytes (the host's end of a serial port).
pub trait ByteSink: Send + Sync {
    /// Takes bytes in order; never blocks for long, may drop them when nobody listens.
    fn write(&self, bytes: &[u8]);

    /// The device has room for more input again.
    fn input_ready(&self) {}
}

/// What a guest asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// Restart (reset register, keyboard controller pulse, port CF9h).
    Reset,
    /// Turn off (ACPI S5).
    PowerOff,
}

/// Receives [`PowerEvent`]s.
pub trait PowerControl: Send + Sync {
    /// Takes effect as soon as the vCPUs can be stopped; the current register access still completes.
    fn request(&self, event: PowerEvent);
}
