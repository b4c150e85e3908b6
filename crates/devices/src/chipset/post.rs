//! The power-on self test port: firmware writes progress codes to port 80h (IBM PC/AT Technical Reference, "I/O address
//! map"). Port 84h, part of the same chip, is what FreeBSD reads to pass a microsecond.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use crate::bus::{BusError, PioBus, PioDevice};
use crate::snapshot::{Persist, SnapshotError};

/// Where codes are written.
pub const POST_PORT: u16 = 0x80;
/// Read for its delay only.
pub const DELAY_PORT: u16 = 0x84;

/// The last code written.
#[derive(Default)]
pub struct PostCode {
    code: AtomicU8,
}

/// Register of a [`PostCode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCodeState {
    /// The last code.
    pub code: u8,
}

impl PostCode {
    /// No code yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts both ports on the bus.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, pio: &PioBus) -> Result<(), BusError> {
        pio.insert(u64::from(POST_PORT), 1, "post", self.clone())?;
        pio.insert(u64::from(DELAY_PORT), 1, "post-delay", Arc::new(DelayPort))
    }

    /// How far firmware got.
    pub fn last(&self) -> u8 {
        self.code.load(Ordering::Relaxed)
    }
}

impl PioDevice for PostCode {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.last());
    }

    fn pio_write(&self, _offset: u16, data: &[u8]) {
        if let Some(code) = data.first() {
            self.code.store(*code, Ordering::Relaxed);
        }
    }
}

struct DelayPort;

impl PioDevice for DelayPort {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, _offset: u16, _data: &[u8]) {}
}

impl Persist for PostCode {
    type State = PostCodeState;
    const VERSION: u32 = 1;

    fn save(&self) -> PostCodeState {
        PostCodeState { code: self.last() }
    }

    fn restore(&self, state: PostCodeState) -> Result<(), SnapshotError> {
        self.code.store(state.code, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Bus;

    #[test]
    fn remembers_the_last_code() {
        let (bus, post): (PioBus, _) = (Bus::new(), Arc::new(PostCode::new()));
        post.attach(&bus).unwrap();
        let (port, offset) = bus.find(0x80, 1).unwrap();
        port.pio_write(offset as u16, &[0xab]);
        assert_eq!(post.last(), 0xab);
        let copy = PostCode::new();
        copy.restore(post.save()).unwrap();
        assert_eq!(copy.last(), 0xab);
        assert!(bus.find(0x84, 1).is_some());
    }
}
