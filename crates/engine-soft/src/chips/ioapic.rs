//! The IOAPIC (Intel 82093AA data sheet): 24 inputs, each with a redirection entry that turns its edges or
//! its level into interrupt messages.
//!
//! Version 11h, as the original part and bhyve have it: finished level-triggered interrupts are told by the
//! LAPICs' EOI broadcasts. With [`IoApic::new`]`(true)` it is version 20h with an EOI register (ICH data sheets),
//! which must go with LAPICs that can suppress the broadcast.
//!
//! A plain struct: messages leave through a closure that says whether any LAPIC took them. A level-triggered
//! entry whose message nobody took does not wait for an EOI; it is tried again at the next write to the entry or
//! change of its input.

use engine::IOAPIC_PINS;
use engine::state::IoApicState;

use super::message::{DeliveryMode, Destination, Message};

/// Bytes of the address space that the chip answers.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Memory-mapped registers (§3.1), by offset.
mod offset {
    pub const SELECT: u64 = 0x00;
    pub const WINDOW: u64 = 0x10;
    /// Version 20h only.
    pub const EOI: u64 = 0x40;
}

/// Registers behind the window (§3.2), by index.
mod index {
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    /// First half of the first redirection entry.
    pub const REDIRECTION: u8 = 0x10;
}

/// Redirection entry (§3.2.4).
mod entry {
    pub const VECTOR: u64 = 0xff;
    pub const MODE_SHIFT: u32 = 8;
    pub const LOGICAL: u64 = 1 << 11;
    /// Read-only: a message waits to be sent. They never wait here.
    pub const STATUS: u64 = 1 << 12;
    /// Read-only: a level-triggered interrupt was accepted and is not finished.
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const DESTINATION_SHIFT: u32 = 56;
    /// Fields that software writes; the others are reserved and read as zero.
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
}

const PINS: usize = IOAPIC_PINS as usize;
const VERSION: u32 = 0x11;
const VERSION_WITH_EOI: u32 = 0x20;
const ID_MASK: u8 = 0xf;

/// A level-triggered interrupt of the input has not been finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AwaitsEoi;

/// The chip.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u8,
    select: u8,
    lines: u32,
    redirection: [u64; PINS],
    has_eoi_register: bool,
}

impl IoApic {
    /// After reset: every input masked.
    pub fn new(has_eoi_register: bool) -> Self {
        IoApic { id: 0, select: 0, lines: 0, redirection: [entry::MASKED; PINS], has_eoi_register }
    }

    /// Returns to the state after reset, except for the input lines, which are returned.
    pub fn reset(&mut self) -> u32 {
        *self = IoApic { lines: self.lines, ..IoApic::new(self.has_eoi_register) };
        self.lines
    }

    /// Drives an input. Inputs beyond the last are ignored.
    pub fn set_line(&mut self, pin: u32, asserted: bool, deliver: &mut dyn FnMut(&Message) -> bool) {
        let Some(redirection) = self.redirection.get(pin as usize) else { return };
        let bit = 1u32 << pin;
        let rising = asserted && self.lines & bit == 0;
        if asserted {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if is_level(*redirection) {
            self.sample(pin as usize, deliver);
        } else if rising && redirection & entry::MASKED == 0 {
            // An edge that finds the entry masked is lost (§3.2.4, interrupt mask).
            deliver(&message(*redirection));
        }
    }

    /// Sends the message of an asserted input that does not depend on an edge, if it is due.
    fn sample(&mut self, pin: usize, deliver: &mut dyn FnMut(&Message) -> bool) {
        let redirection = &mut self.redirection[pin];
        let asserted = self.lines >> pin & 1 != 0;
        if !asserted || *redirection & (entry::MASKED | entry::REMOTE_IRR) != 0 {
            return;
        }
        if is_level(*redirection) {
            if deliver(&message(*redirection)) {
                *redirection |= entry::REMOTE_IRR;
            }
        } else if message(*redirection).mode == DeliveryMode::ExtInt {
            // The 8259 pair may have been asking before the entry was set up, and would not ask again.
            deliver(&message(*redirection));
        }
    }

    /// A level-triggered interrupt with this vector is finished: entries that waited for it look at their inputs
    /// again.
    pub fn end_of_interrupt(&mut self, vector: u8, deliver: &mut dyn FnMut(&Message) -> bool) {
        for pin in 0..PINS {
            let redirection = &mut self.redirection[pin];
            if *redirection & entry::REMOTE_IRR != 0 && *redirection & entry::VECTOR == u64::from(vector) {
                *redirection &= !entry::REMOTE_IRR;
                self.sample(pin, deliver);
            }
        }
    }

    /// The interrupt message that a pulse on an input would send; nothing if the entry is masked. For a level-triggered
    /// entry that waits for an EOI, `Err`: the pulse would be lost.
    pub fn would_send(&self, pin: u32) -> Result<Option<Message>, AwaitsEoi> {
        match self.redirection.get(pin as usize) {
            Some(redirection) if redirection & entry::MASKED == 0 => {
                if redirection & entry::REMOTE_IRR != 0 {
                    Err(AwaitsEoi)
                } else {
                    Ok(Some(message(*redirection)))
                }
            }
            _ => Ok(None),
        }
    }

    /// Reads the 32-bit register at an offset.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            offset::SELECT => self.select.into(),
            offset::WINDOW => match self.select {
                index::ID | index::ARBITRATION => u32::from(self.id) << 24,
                index::VERSION => {
                    let version = if self.has_eoi_register { VERSION_WITH_EOI } else { VERSION };
                    (IOAPIC_PINS - 1) << 16 | version
                }
                select => match self.redirection_of(select) {
                    Some((pin, shift)) => (self.redirection[pin] >> shift) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the 32-bit register at an offset.
    pub fn write(&mut self, offset: u64, value: u32, deliver: &mut dyn FnMut(&Message) -> bool) {
        match offset {
            offset::SELECT => self.select = value as u8,
            offset::EOI if self.has_eoi_register => self.end_of_interrupt(value as u8, deliver),
            offset::WINDOW if self.select == index::ID => self.id = (value >> 24) as u8 & ID_MASK,
            offset::WINDOW => {
                let Some((pin, shift)) = self.redirection_of(self.select) else { return };
                let redirection = &mut self.redirection[pin];
                let writable = entry::WRITABLE & 0xffff_ffff << shift;
                *redirection = *redirection & !writable | u64::from(value) << shift & writable;
                if !is_level(*redirection) {
                    // Software that has no EOI register finishes an interrupt by making the entry edge-triggered
                    // for a moment.
                    *redirection &= !entry::REMOTE_IRR;
                }
                self.sample(pin, deliver);
            }
            _ => {}
        }
    }

    /// Which entry, and which half by its shift, an index names.
    fn redirection_of(&self, select: u8) -> Option<(usize, u32)> {
        let half = usize::from(select.checked_sub(index::REDIRECTION)?);
        (half < 2 * PINS).then_some((half / 2, 32 * (half as u32 & 1)))
    }

    /// The registers as data.
    pub fn state(&self) -> IoApicState {
        IoApicState { id: self.id, select: self.select, lines: self.lines, redirection: self.redirection }
    }

    /// Loads saved registers; nothing is delivered, since whatever was deliverable had been when they were saved.
    pub fn set_state(&mut self, state: &IoApicState) {
        self.id = state.id & ID_MASK;
        self.select = state.select;
        self.lines = state.lines & ((1 << IOAPIC_PINS) - 1);
        self.redirection = state.redirection.map(|value| {
            let value = value & (entry::WRITABLE | entry::REMOTE_IRR) & !entry::STATUS;
            if is_level(value) { value } else { value & !entry::REMOTE_IRR }
        });
    }
}

/// Level-triggered, and in a delivery mode for which that means anything.
fn is_level(redirection: u64) -> bool {
    let mode = DeliveryMode::from_bits((redirection >> entry::MODE_SHIFT) as u32);
    redirection & entry::LEVEL != 0 && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority)
}

fn message(redirection: u64) -> Message {
    Message {
        vector: (redirection & entry::VECTOR) as u8,
        mode: match DeliveryMode::from_bits((redirection >> entry::MODE_SHIFT) as u32) {
            DeliveryMode::StartUp => DeliveryMode::Reserved,
            mode => mode,
        },
        level: is_level(redirection),
        destination: Destination::from_8bit(
            (redirection >> entry::DESTINATION_SHIFT) as u8,
            redirection & entry::LOGICAL != 0,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A board with one sink that accepts or refuses.
    struct Board {
        chip: IoApic,
        sent: Vec<Message>,
        accept: bool,
    }

    impl Board {
        fn new(eoi: bool) -> Self {
            Board { chip: IoApic::new(eoi), sent: Vec::new(), accept: true }
        }

        fn with<R>(&mut self, f: impl FnOnce(&mut IoApic, &mut dyn FnMut(&Message) -> bool) -> R) -> R {
            let Board { chip, sent, accept } = self;
            f(chip, &mut |message| {
                sent.push(*message);
                *accept
            })
        }

        fn write(&mut self, select: u8, value: u32) {
            self.with(|chip, deliver| {
                chip.write(offset::SELECT, select.into(), deliver);
                chip.write(offset::WINDOW, value, deliver);
            });
        }

        fn read(&mut self, select: u8) -> u32 {
            self.with(|chip, deliver| {
                chip.write(offset::SELECT, select.into(), deliver);
                chip.read(offset::WINDOW)
            })
        }

        fn line(&mut self, pin: u32, asserted: bool) -> usize {
            let before = self.sent.len();
            self.with(|chip, deliver| chip.set_line(pin, asserted, deliver));
            self.sent.len() - before
        }

        fn eoi(&mut self, vector: u8) -> usize {
            let before = self.sent.len();
            self.with(|chip, deliver| chip.end_of_interrupt(vector, deliver));
            self.sent.len() - before
        }
    }

    #[test]
    fn identity_and_reset() {
        let mut board = Board::new(false);
        assert_eq!(board.read(1), 0x0017_0011);
        assert_eq!(Board::new(true).read(1), 0x0017_0020);
        board.write(0, 0xffff_ffff);
        assert_eq!(board.read(0), 0x0f00_0000);
        for pin in 0..24 {
            assert_eq!(board.read(0x10 + 2 * pin), 0x1_0000);
            assert_eq!(board.read(0x11 + 2 * pin), 0);
        }
        assert_eq!(board.read(0x40), 0);
        // Reserved and read-only bits do not stick.
        board.write(0x10, 0xffff_ffff);
        board.write(0x11, 0xffff_ffff);
        assert_eq!(board.read(0x10), 0x1_afff);
        assert_eq!(board.read(0x11), 0xff00_0000);
    }

    #[test]
    fn edges_once_each_and_lost_while_masked() {
        let mut board = Board::new(false);
        board.write(0x10 + 2 * 4, 0x31);
        board.write(0x11 + 2 * 4, 0x0200_0000);
        assert_eq!(board.line(4, true), 1);
        assert_eq!(board.sent[0].vector, 0x31);
        assert_eq!(board.sent[0].destination, Destination::Physical(2));
        assert!(!board.sent[0].level);
        assert_eq!(board.line(4, true), 0);
        assert_eq!(board.line(4, false), 0);
        assert_eq!(board.line(4, true), 1);
        board.write(0x10 + 2 * 4, 0x1_0031);
        board.line(4, false);
        assert_eq!(board.line(4, true), 0);
        board.write(0x10 + 2 * 4, 0x31);
        assert_eq!(board.sent.len(), 2);
        assert_eq!(board.line(24, true), 0);
    }

    #[test]
    fn level_waits_for_eoi_and_is_delivered_again() {
        let mut board = Board::new(false);
        board.write(0x10 + 2 * 20, 0x8055);
        assert_eq!(board.line(20, true), 1);
        assert!(board.sent[0].level);
        assert_eq!(board.read(0x10 + 2 * 20), 0xc055);
        assert_eq!(board.line(20, false), 0);
        assert_eq!(board.line(20, true), 0);
        assert_eq!(board.eoi(0x54), 0);
        assert_eq!(board.eoi(0x55), 1);
        board.line(20, false);
        assert_eq!(board.eoi(0x55), 0);
        assert_eq!(board.read(0x10 + 2 * 20), 0x8055);
        // Unmasking an asserted input delivers.
        board.write(0x10 + 2 * 20, 0x1_8055);
        assert_eq!(board.line(20, true), 0);
        board.write(0x10 + 2 * 20, 0x8055);
        assert_eq!(board.sent.len(), 3);
    }

    #[test]
    fn remote_irr_goes_when_the_entry_becomes_edge_triggered() {
        let mut board = Board::new(false);
        board.write(0x10 + 2 * 20, 0x8055);
        board.line(20, true);
        board.write(0x10 + 2 * 20, 0x1_0055);
        assert_eq!(board.read(0x10 + 2 * 20), 0x1_0055);
        board.write(0x10 + 2 * 20, 0x8055);
        assert_eq!(board.sent.len(), 2);
    }

    #[test]
    fn refused_level_message_is_tried_again() {
        let mut board = Board::new(false);
        board.accept = false;
        board.write(0x10 + 2 * 20, 0x8055);
        assert_eq!(board.line(20, true), 1);
        assert_eq!(board.read(0x10 + 2 * 20), 0x8055);
        board.accept = true;
        board.write(0x10 + 2 * 20, 0x8056);
        assert_eq!(board.sent[1].vector, 0x56);
        assert_eq!(board.read(0x10 + 2 * 20), 0xc056);
    }

    #[test]
    fn eoi_register() {
        let mut board = Board::new(true);
        board.write(0x10 + 2 * 20, 0x8055);
        board.line(20, true);
        board.with(|chip, deliver| chip.write(offset::EOI, 0x55, deliver));
        assert_eq!(board.sent.len(), 2);
        let mut old = Board::new(false);
        old.write(0x10 + 2 * 20, 0x8055);
        old.line(20, true);
        old.with(|chip, deliver| chip.write(offset::EOI, 0x55, deliver));
        assert_eq!(old.sent.len(), 1);
    }

    #[test]
    fn nmi_is_an_edge_even_if_marked_level() {
        let mut board = Board::new(false);
        board.write(0x10 + 2 * 5, 0x8400);
        assert_eq!(board.line(5, true), 1);
        assert_eq!(board.sent[0].mode, DeliveryMode::Nmi);
        assert_eq!(board.read(0x10 + 2 * 5), 0x8400);
        assert_eq!(board.line(5, true), 0);
    }

    #[test]
    fn state_goes_round() {
        let mut board = Board::new(false);
        board.write(0x10 + 2 * 20, 0x8055);
        board.line(20, true);
        let state = board.chip.state();
        let mut other = Board::new(false);
        other.chip.set_state(&state);
        assert_eq!(other.chip.state(), state);
        assert_eq!(other.eoi(0x55), 1);
    }
}
