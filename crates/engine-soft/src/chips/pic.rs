//! The two cascaded interrupt controllers of a PC (Intel 8259A data sheet; edge/level control registers of the
//! Intel ICH data sheets, "ELCR1" and "ELCR2").
//!
//! Plain structs: [`Controller`] is one chip, [`Pic`] is the pair with the slave on input 2 of the master.
//!
//! One deliberate difference from the data sheet: an edge-triggered request stays latched when its input falls
//! before it is acknowledged, where the real chip forgets it and answers with input 7. Devices may therefore
//! pulse their lines. A level-triggered request that goes away does end in the spurious input 7.

use engine::state::PicState;

/// Ports of the pair.
pub mod port {
    #![allow(missing_docs)]
    pub const MASTER_COMMAND: u16 = 0x20;
    pub const MASTER_DATA: u16 = 0x21;
    pub const SLAVE_COMMAND: u16 = 0xa0;
    pub const SLAVE_DATA: u16 = 0xa1;
    pub const MASTER_ELCR: u16 = 0x4d0;
    pub const SLAVE_ELCR: u16 = 0x4d1;
}

/// Initialisation command words.
mod icw {
    /// ICW1, which every command write with this bit is.
    pub const ICW1: u8 = 1 << 4;
    pub const ICW1_NEEDS_ICW4: u8 = 1 << 0;
    pub const ICW1_SINGLE: u8 = 1 << 1;
    pub const ICW2_VECTOR: u8 = 0xf8;
    pub const ICW4_AUTO_EOI: u8 = 1 << 1;
    pub const ICW4_SPECIAL_FULLY_NESTED: u8 = 1 << 4;
}

/// Operation command words.
mod ocw {
    /// A command write with this bit (and not ICW1) is OCW3, else OCW2.
    pub const OCW3: u8 = 1 << 3;
    pub const OCW3_READ_ISR: u8 = 1 << 0;
    pub const OCW3_READ_REGISTER: u8 = 1 << 1;
    pub const OCW3_POLL: u8 = 1 << 2;
    pub const OCW3_SPECIAL_MASK: u8 = 1 << 5;
    pub const OCW3_SET_SPECIAL_MASK: u8 = 1 << 6;
    /// OCW2: which input, where one is named.
    pub const OCW2_LEVEL: u8 = 7;
    pub const OCW2_COMMAND_SHIFT: u32 = 5;
}

/// Input that stands for a request that went away.
const SPURIOUS: u8 = 7;
/// Input of the master that the slave drives.
const CASCADE: u8 = 2;
/// Inputs that can be level-triggered: not the timer, keyboard and cascade, nor the RTC and the FPU.
const MASTER_ELCR_MASK: u8 = 0xf8;
const SLAVE_ELCR_MASK: u8 = 0xde;
/// Poll word: there was a request.
const POLL_REQUEST: u8 = 0x80;

/// Where a chip is in its initialisation: which word it expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
pub struct Controller {
    /// Edge-triggered requests.
    latched: u8,
    isr: u8,
    imr: u8,
    lines: u8,
    level_triggered: u8,
    elcr_mask: u8,
    priority_base: u8,
    vector_base: u8,
    init: Init,
    needs_icw4: bool,
    /// Initialised as the only chip: no ICW3 comes.
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    /// Inputs behind which another controller sits.
    cascade: u8,
    read_isr: bool,
    poll: bool,
}

impl Controller {
    fn new(elcr_mask: u8, cascade: u8) -> Self {
        Controller {
            latched: 0,
            isr: 0,
            // The power-on state is undefined; nothing can come through until software has set the chip up.
            imr: 0xff,
            lines: 0,
            level_triggered: 0,
            elcr_mask,
            priority_base: 0,
            vector_base: 0,
            init: Init::Done,
            needs_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            cascade,
            read_isr: false,
            poll: false,
        }
    }

    /// Drives an input.
    fn set_line(&mut self, input: u8, asserted: bool) {
        let bit = 1 << input;
        if asserted {
            if self.lines & bit == 0 && self.follows_line() & bit == 0 {
                self.latched |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    /// Inputs whose request is their level. The slave's INT output is one: it falls when the slave has nothing
    /// more to ask for.
    fn follows_line(&self) -> u8 {
        self.level_triggered | self.cascade
    }

    /// The interrupt request register.
    fn irr(&self) -> u8 {
        self.latched & !self.follows_line() | self.lines & self.follows_line()
    }

    /// The set input with the highest priority, as its distance from the top and its number.
    fn highest(&self, inputs: u8) -> Option<(u8, u8)> {
        if inputs == 0 {
            return None;
        }
        let distance = inputs.rotate_right(u32::from(self.priority_base)).trailing_zeros() as u8;
        Some((distance, (distance + self.priority_base) & 7))
    }

    /// The input that the chip would have served now; its INT output is high when there is one.
    fn request(&self) -> Option<u8> {
        if self.init != Init::Done {
            return None;
        }
        let (distance, input) = self.highest(self.irr() & !self.imr)?;
        let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
        match self.highest(in_service) {
            Some((blocking, _)) if distance > blocking => None,
            Some((blocking, _)) if distance == blocking => {
                // Only a slave may interrupt itself: it has priorities of its own.
                (self.special_fully_nested && self.cascade >> input & 1 != 0).then_some(input)
            }
            _ => Some(input),
        }
    }

    /// The acknowledge cycle: the served input, 7 if the request is gone.
    fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.request() else { return SPURIOUS };
        let bit = 1 << input;
        self.latched &= !bit;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.priority_base = (input + 1) & 7;
        }
        input
    }

    fn vector(&self, input: u8) -> u8 {
        self.vector_base | input
    }

    fn write_command(&mut self, value: u8) {
        if value & icw::ICW1 != 0 {
            self.latched = 0;
            self.isr = 0;
            self.imr = 0;
            self.priority_base = 0;
            self.special_mask = false;
            self.read_isr = false;
            self.poll = false;
            self.needs_icw4 = value & icw::ICW1_NEEDS_ICW4 != 0;
            if !self.needs_icw4 {
                self.auto_eoi = false;
                self.special_fully_nested = false;
            }
            self.rotate_on_auto_eoi = false;
            self.single = value & icw::ICW1_SINGLE != 0;
            self.init = Init::Icw2;
        } else if value & ocw::OCW3 != 0 {
            if value & ocw::OCW3_SET_SPECIAL_MASK != 0 {
                self.special_mask = value & ocw::OCW3_SPECIAL_MASK != 0;
            }
            // Poll overrides a read command in the same word.
            self.poll = value & ocw::OCW3_POLL != 0;
            if !self.poll && value & ocw::OCW3_READ_REGISTER != 0 {
                self.read_isr = value & ocw::OCW3_READ_ISR != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & ocw::OCW2_LEVEL;
        match value >> ocw::OCW2_COMMAND_SHIFT {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => {
                self.end_highest();
            }
            0b101 => {
                if let Some(input) = self.end_highest() {
                    self.priority_base = (input + 1) & 7;
                }
            }
            0b011 => self.isr &= !(1 << level),
            0b111 => {
                self.isr &= !(1 << level);
                self.priority_base = (level + 1) & 7;
            }
            0b110 => self.priority_base = (level + 1) & 7,
            _ => {}
        }
    }

    /// Non-specific EOI: finishes what has the highest priority in service. In special mask mode masked inputs
    /// stay in service.
    fn end_highest(&mut self) -> Option<u8> {
        let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let (_, input) = self.highest(candidates)?;
        self.isr &= !(1 << input);
        Some(input)
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & icw::ICW2_VECTOR;
                self.init = if !self.single {
                    Init::Icw3
                } else if self.needs_icw4 {
                    Init::Icw4
                } else {
                    Init::Done
                };
            }
            // Which input the slave is on is wired.
            Init::Icw3 => self.init = if self.needs_icw4 { Init::Icw4 } else { Init::Done },
            Init::Icw4 => {
                self.auto_eoi = value & icw::ICW4_AUTO_EOI != 0;
                self.special_fully_nested = value & icw::ICW4_SPECIAL_FULLY_NESTED != 0;
                self.init = Init::Done;
            }
        }
    }

    /// A read at either address after a poll command is an acknowledge cycle.
    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return if self.request().is_some() { POLL_REQUEST | self.acknowledge() } else { 0 };
        }
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr(),
        }
    }

    fn set_elcr(&mut self, value: u8) {
        let value = value & self.elcr_mask;
        // An input that turns edge-triggered needs a new edge.
        self.latched &= !(self.level_triggered ^ value);
        self.level_triggered = value;
    }

    fn state(&self) -> PicState {
        PicState {
            irr: self.irr(),
            isr: self.isr,
            imr: self.imr,
            lines: self.lines,
            level_triggered: self.level_triggered,
            priority_base: self.priority_base,
            vector_base: self.vector_base,
            init_step: match self.init {
                Init::Done => 0,
                Init::Icw2 => 2,
                Init::Icw3 => 3,
                Init::Icw4 => 4,
            },
            needs_icw4: self.needs_icw4,
            auto_eoi: self.auto_eoi,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi,
            special_mask: self.special_mask,
            special_fully_nested: self.special_fully_nested,
            read_isr: self.read_isr,
            poll: self.poll,
        }
    }

    fn set_state(&mut self, state: &PicState) {
        let level_triggered = state.level_triggered & self.elcr_mask;
        *self = Controller {
            latched: state.irr & !level_triggered & !self.cascade,
            isr: state.isr,
            imr: state.imr,
            lines: state.lines,
            level_triggered,
            elcr_mask: self.elcr_mask,
            priority_base: state.priority_base & 7,
            vector_base: state.vector_base & icw::ICW2_VECTOR,
            init: match state.init_step {
                2 => Init::Icw2,
                3 => Init::Icw3,
                4 => Init::Icw4,
                _ => Init::Done,
            },
            needs_icw4: state.needs_icw4,
            single: false,
            auto_eoi: state.auto_eoi,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
            special_mask: state.special_mask,
            special_fully_nested: state.special_fully_nested,
            cascade: self.cascade,
            read_isr: state.read_isr,
            poll: state.poll,
        };
    }
}

/// The pair.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Controller,
    slave: Controller,
}

impl Default for Pic {
    fn default() -> Self {
        Pic {
            master: Controller::new(MASTER_ELCR_MASK, 1 << CASCADE),
            slave: Controller::new(SLAVE_ELCR_MASK, 0),
        }
    }
}

impl Pic {
    /// Drives IRQ 0 to 15. IRQ 2 does not exist: the slave is there.
    pub fn set_line(&mut self, irq: u8, asserted: bool) {
        match irq {
            CASCADE => return,
            0..8 => self.master.set_line(irq, asserted),
            8..16 => self.slave.set_line(irq - 8, asserted),
            _ => return,
        }
        self.wire_cascade();
    }

    /// The slave's INT output goes to the master.
    fn wire_cascade(&mut self) {
        self.master.set_line(CASCADE, self.slave.request().is_some());
    }

    /// The INT output of the pair.
    pub fn output(&self) -> bool {
        self.master.request().is_some()
    }

    /// Whether an edge of IRQ `irq` of the master waits to be acknowledged, unmasked: a further one would be lost.
    pub fn requests(&self, irq: u8) -> bool {
        self.master.init == Init::Done && self.master.irr() & !self.master.imr & 1 << irq != 0
    }

    /// The vector that [`Pic::acknowledge`] would give.
    pub fn peek(&self) -> Option<u8> {
        self.output().then(|| self.clone().acknowledge())
    }

    /// The processor's acknowledge cycle: the vector, a spurious one if no request is left.
    pub fn acknowledge(&mut self) -> u8 {
        let input = self.master.acknowledge();
        if input != CASCADE {
            return self.master.vector(input);
        }
        let input = self.slave.acknowledge();
        self.wire_cascade();
        self.slave.vector(input)
    }

    /// Reads a port of the pair.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            port::MASTER_COMMAND => self.master.read(false),
            port::MASTER_DATA => self.master.read(true),
            port::SLAVE_COMMAND => self.slave.read(false),
            port::SLAVE_DATA => self.slave.read(true),
            port::MASTER_ELCR => self.master.level_triggered,
            port::SLAVE_ELCR => self.slave.level_triggered,
            _ => 0xff,
        };
        // A poll is an acknowledge.
        self.wire_cascade();
        value
    }

    /// Writes a port of the pair.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            port::MASTER_COMMAND => self.master.write_command(value),
            port::MASTER_DATA => self.master.write_data(value),
            port::SLAVE_COMMAND => self.slave.write_command(value),
            port::SLAVE_DATA => self.slave.write_data(value),
            port::MASTER_ELCR => self.master.set_elcr(value),
            port::SLAVE_ELCR => self.slave.set_elcr(value),
            _ => {}
        }
        self.wire_cascade();
    }

    /// The registers of master and slave as data.
    pub fn state(&self) -> (PicState, PicState) {
        (self.master.state(), self.slave.state())
    }

    /// Loads saved registers.
    pub fn set_state(&mut self, master: &PicState, slave: &PicState) {
        self.master.set_state(master);
        self.slave.set_state(slave);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use port::*;

    /// Both chips as Linux sets them up: vectors 30h and 38h, everything unmasked.
    fn linux() -> Pic {
        let mut pic = Pic::default();
        for (command, data, base, wiring) in [(0x20, 0x21, 0x30, 4), (0xa0, 0xa1, 0x38, 2)] {
            pic.write(command, 0x11);
            pic.write(data, base);
            pic.write(data, wiring);
            pic.write(data, 0x01);
        }
        pic
    }

    fn irr(pic: &mut Pic, command: u16) -> u8 {
        pic.write(command, 0x0a);
        pic.read(command)
    }

    fn isr(pic: &mut Pic, command: u16) -> u8 {
        pic.write(command, 0x0b);
        pic.read(command)
    }

    fn edge(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, true);
        pic.set_line(irq, false);
    }

    #[test]
    fn nothing_comes_through_before_or_during_initialisation() {
        let mut pic = Pic::default();
        edge(&mut pic, 3);
        assert!(!pic.output());
        pic.write(MASTER_COMMAND, 0x11);
        edge(&mut pic, 3);
        for word in [0x30, 4] {
            assert!(!pic.output());
            pic.write(MASTER_DATA, word);
        }
        assert!(!pic.output());
        pic.write(MASTER_DATA, 1);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn initialisation_words_are_as_many_as_icw1_says() {
        let mut pic = Pic::default();
        // Single, no ICW4: the second data write is already the mask.
        pic.write(MASTER_COMMAND, 0x12);
        pic.write(MASTER_DATA, 0x47);
        pic.write(MASTER_DATA, 0x5a);
        assert_eq!(pic.read(MASTER_DATA), 0x5a);
        pic.write(MASTER_DATA, 0);
        edge(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x41);
        // Cascaded, no ICW4.
        pic.write(MASTER_COMMAND, 0x10);
        assert_eq!(pic.read(MASTER_DATA), 0);
        pic.write(MASTER_DATA, 0x50);
        pic.write(MASTER_DATA, 0x04);
        pic.write(MASTER_DATA, 0xfe);
        assert_eq!(pic.read(MASTER_DATA), 0xfe);
    }

    #[test]
    fn icw1_resets_what_the_data_sheet_says() {
        let mut pic = linux();
        pic.write(MASTER_DATA, 0x80);
        edge(&mut pic, 4);
        pic.acknowledge();
        edge(&mut pic, 5);
        // Special mask mode, ISR selected for reading, lowest priority to input 5, a poll under way.
        for word in [0x68, 0x0b, 0xc5, 0x0c] {
            pic.write(MASTER_COMMAND, word);
        }
        pic.write(MASTER_COMMAND, 0x11);
        for word in [0x40, 0x04, 0x01] {
            pic.write(MASTER_DATA, word);
        }
        assert_eq!(pic.read(MASTER_DATA), 0);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0);
        pic.write(MASTER_COMMAND, 0x11);
        for word in [0x40, 0x04, 0x01] {
            pic.write(MASTER_DATA, word);
        }
        edge(&mut pic, 6);
        edge(&mut pic, 0);
        // The request register is selected, and input 0 is on top again.
        assert_eq!(pic.read(MASTER_COMMAND), 0x41);
        assert_eq!(pic.acknowledge(), 0x40);
        assert!(!pic.output());
    }

    #[test]
    fn priorities_nest_and_eoi_lets_the_next_in() {
        let mut pic = linux();
        edge(&mut pic, 5);
        assert_eq!(pic.peek(), Some(0x35));
        assert_eq!(pic.acknowledge(), 0x35);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x20);
        edge(&mut pic, 6);
        assert!(!pic.output());
        assert_eq!(irr(&mut pic, MASTER_COMMAND), 0x40);
        edge(&mut pic, 5);
        assert!(!pic.output());
        edge(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        // Non-specific EOIs end 1, then 5.
        pic.write(MASTER_COMMAND, 0x20);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x20);
        assert!(!pic.output());
        pic.write(MASTER_COMMAND, 0x20);
        assert_eq!(pic.acknowledge(), 0x35);
        // A specific EOI of something else does not help; the right one does.
        pic.write(MASTER_COMMAND, 0x63);
        assert!(!pic.output());
        pic.write(MASTER_COMMAND, 0x65);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn masking_holds_a_request_back() {
        let mut pic = linux();
        pic.write(MASTER_DATA, 0x08);
        edge(&mut pic, 3);
        assert!(!pic.output());
        assert_eq!(irr(&mut pic, MASTER_COMMAND), 0x08);
        pic.write(MASTER_DATA, 0x00);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn slave_through_the_cascade() {
        let mut pic = linux();
        edge(&mut pic, 12);
        edge(&mut pic, 8);
        assert_eq!(irr(&mut pic, MASTER_COMMAND), 0x04);
        assert_eq!(pic.acknowledge(), 0x38);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x04);
        assert_eq!(isr(&mut pic, SLAVE_COMMAND), 0x01);
        assert!(!pic.output());
        // Input 3 of the master is below the cascade.
        edge(&mut pic, 3);
        assert!(!pic.output());
        pic.write(SLAVE_COMMAND, 0x20);
        assert!(!pic.output());
        pic.write(MASTER_COMMAND, 0x62);
        assert_eq!(pic.acknowledge(), 0x3c);
        pic.write(SLAVE_COMMAND, 0x20);
        pic.write(MASTER_COMMAND, 0x62);
        assert_eq!(pic.acknowledge(), 0x33);
        // IRQ 2 is no line.
        pic.write(MASTER_COMMAND, 0x20);
        edge(&mut pic, 2);
        assert!(!pic.output());
    }

    #[test]
    fn special_fully_nested_lets_the_slave_interrupt_itself() {
        let mut pic = linux();
        edge(&mut pic, 12);
        pic.acknowledge();
        edge(&mut pic, 8);
        assert!(!pic.output());
        let mut pic = Pic::default();
        for (command, data, base, wiring, icw4) in [(0x20, 0x21, 0x30, 4, 0x11), (0xa0, 0xa1, 0x38, 2, 1)] {
            pic.write(command, 0x11);
            pic.write(data, base);
            pic.write(data, wiring);
            pic.write(data, icw4);
        }
        edge(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x3c);
        edge(&mut pic, 13);
        assert!(!pic.output());
        edge(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x38);
        // But not inputs of the master below it, nor any other input itself.
        edge(&mut pic, 3);
        assert!(!pic.output());
        edge(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        edge(&mut pic, 1);
        assert!(!pic.output());
    }

    #[test]
    fn automatic_eoi_and_rotation() {
        let mut pic = linux();
        pic.write(MASTER_COMMAND, 0x11);
        pic.write(MASTER_DATA, 0x30);
        pic.write(MASTER_DATA, 0x04);
        pic.write(MASTER_DATA, 0x03);
        edge(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0);
        edge(&mut pic, 4);
        edge(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x34);
        assert_eq!(pic.acknowledge(), 0x35);
        // Rotate in automatic EOI: the served one becomes the lowest.
        pic.write(MASTER_COMMAND, 0x80);
        edge(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        edge(&mut pic, 4);
        edge(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x35);
        // And off again: 6 is now the top and stays so.
        pic.write(MASTER_COMMAND, 0x00);
        edge(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x36);
        edge(&mut pic, 5);
        edge(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x36);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn rotation_by_command() {
        let mut pic = linux();
        edge(&mut pic, 4);
        pic.acknowledge();
        // Rotate on non-specific EOI: 4 becomes lowest, 5 highest.
        pic.write(MASTER_COMMAND, 0xa0);
        edge(&mut pic, 3);
        edge(&mut pic, 4);
        edge(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x36);
        // Rotate on specific EOI of 6: 7 highest, then 0 … 3, 4.
        pic.write(MASTER_COMMAND, 0xe6);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(MASTER_COMMAND, 0x63);
        // Set priority: 3 lowest, so 4 is the top.
        pic.write(MASTER_COMMAND, 0xc3);
        edge(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn special_mask_mode_lets_lower_ones_in() {
        let mut pic = linux();
        edge(&mut pic, 4);
        pic.acknowledge();
        edge(&mut pic, 6);
        assert!(!pic.output());
        pic.write(MASTER_COMMAND, 0x68);
        assert!(!pic.output());
        pic.write(MASTER_DATA, 0x10);
        assert_eq!(pic.acknowledge(), 0x36);
        // The non-specific EOI ends 6, not the masked 4.
        pic.write(MASTER_COMMAND, 0x20);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x10);
        pic.write(MASTER_COMMAND, 0x20);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x10);
        pic.write(MASTER_COMMAND, 0x48);
        pic.write(MASTER_COMMAND, 0x20);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0);
    }

    #[test]
    fn poll_is_an_acknowledge() {
        let mut pic = linux();
        pic.write(MASTER_COMMAND, 0x0c);
        assert_eq!(pic.read(MASTER_COMMAND), 0);
        edge(&mut pic, 9);
        pic.write(MASTER_COMMAND, 0x0c);
        assert_eq!(pic.read(MASTER_COMMAND), 0x82);
        pic.write(SLAVE_COMMAND, 0x0c);
        assert_eq!(pic.read(SLAVE_DATA), 0x81);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x04);
        assert_eq!(isr(&mut pic, SLAVE_COMMAND), 0x02);
        assert!(!pic.output());
    }

    #[test]
    fn level_triggered_requests_follow_their_line() {
        let mut pic = linux();
        pic.write(MASTER_ELCR, 0xff);
        pic.write(SLAVE_ELCR, 0xff);
        assert_eq!(pic.read(MASTER_ELCR), 0xf8);
        assert_eq!(pic.read(SLAVE_ELCR), 0xde);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(MASTER_COMMAND, 0x20);
        assert_eq!(pic.peek(), Some(0x35));
        pic.set_line(5, false);
        assert_eq!(pic.peek(), None);
        pic.set_line(10, true);
        assert!(pic.output());
        pic.set_line(10, false);
        assert!(!pic.output());
        // Inputs that cannot be level-triggered still latch edges.
        edge(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x38);
    }

    #[test]
    fn a_request_that_went_away_is_spurious() {
        let mut pic = linux();
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0);
        // The slave loses its request between the two acknowledge cycles: IRQ 15, and the master believes it.
        pic.write(SLAVE_ELCR, 0x02);
        pic.set_line(9, true);
        assert_eq!(pic.master.acknowledge(), CASCADE);
        pic.set_line(9, false);
        let input = pic.slave.acknowledge();
        assert_eq!(pic.slave.vector(input), 0x3f);
        assert_eq!(isr(&mut pic, MASTER_COMMAND), 0x04);
        assert_eq!(isr(&mut pic, SLAVE_COMMAND), 0);
    }

    #[test]
    fn state_goes_round() {
        let mut pic = linux();
        pic.write(SLAVE_ELCR, 0x02);
        pic.set_line(9, true);
        edge(&mut pic, 4);
        edge(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        let (master, slave) = pic.state();
        let mut other = Pic::default();
        other.set_state(&master, &slave);
        assert_eq!(other.state(), pic.state());
        for pic in [&mut pic, &mut other] {
            pic.write(MASTER_COMMAND, 0x20);
            assert_eq!(pic.acknowledge(), 0x39);
            pic.set_line(9, false);
            pic.write(SLAVE_COMMAND, 0x20);
            pic.write(MASTER_COMMAND, 0x20);
            assert_eq!(pic.acknowledge(), 0x34);
        }
    }
}
