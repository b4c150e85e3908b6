//! The keyboard controller (IBM PC/AT Technical Reference, "Keyboard controller"; commands of the PS/2 generation) with
//! nothing plugged in: it answers its own commands, resets the machine on request, and tells drivers at once that no keyboard
//! and no mouse replies, so that their probes end quickly.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::access::lock;
use crate::bus::{BusError, PioBus, PioDevice, PioPart};
use crate::host::{IrqLine, PowerControl, PowerEvent};
use crate::irq::Output;
use crate::snapshot::{Persist, SnapshotError};

/// Data port.
pub const DATA_PORT: u16 = 0x60;
/// Status (read) and command (write) port.
pub const COMMAND_PORT: u16 = 0x64;
/// Interrupt of the keyboard port.
pub const KEYBOARD_IRQ: u8 = 1;

/// Status register.
mod status {
    /// A byte waits in the data port.
    pub const OUTPUT_FULL: u8 = 1 << 0;
    /// Self test passed.
    pub const SYSTEM: u8 = 1 << 2;
    /// The last write was a command.
    pub const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked.
    pub const UNLOCKED: u8 = 1 << 4;
    /// The device did not answer in time.
    pub const TIMEOUT: u8 = 1 << 6;
}

/// Configuration byte.
mod config {
    /// A byte from the keyboard interrupts.
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    /// Copied to the status register.
    pub const SYSTEM: u8 = 1 << 2;
    /// The keyboard's clock is held.
    pub const KEYBOARD_DISABLED: u8 = 1 << 4;
    /// The mouse's clock is held.
    pub const AUX_DISABLED: u8 = 1 << 5;
    /// Scan codes are translated.
    pub const TRANSLATE: u8 = 1 << 6;
}

mod command {
    pub const READ_RAM: u8 = 0x20;
    pub const READ_RAM_LAST: u8 = 0x3f;
    pub const WRITE_RAM: u8 = 0x60;
    pub const WRITE_RAM_LAST: u8 = 0x7f;
    pub const DISABLE_AUX: u8 = 0xa7;
    pub const ENABLE_AUX: u8 = 0xa8;
    pub const TEST_AUX: u8 = 0xa9;
    pub const SELF_TEST: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const READ_INPUT_PORT: u8 = 0xc0;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub const LOOP_KEYBOARD: u8 = 0xd2;
    pub const LOOP_AUX: u8 = 0xd3;
    pub const WRITE_AUX: u8 = 0xd4;
    /// The low four bits are output lines to pull low for a moment, if zero.
    pub const PULSE: u8 = 0xf0;
}

/// Output port.
mod output_port {
    /// Low resets the processor.
    pub const NO_RESET: u8 = 1 << 0;
    /// Address line 20.
    pub const A20: u8 = 1 << 1;
}

const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_LINE_GOOD: u8 = 0x00;
/// "Clock line stuck low": what a controller reports for a port that is not there.
const AUX_LINE_STUCK: u8 = 0x01;
/// Input port: keyboard not locked, colour display.
const INPUT_PORT: u8 = 0x80;
/// What the controller hands out for a device that does not answer.
const NO_ANSWER: u8 = 0xfe;

/// What the next write to the data port is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Expected {
    /// A byte for the keyboard.
    #[default]
    Keyboard,
    /// The byte of controller RAM with this index; 0 is the configuration byte.
    Ram(u8),
    OutputPort,
    /// To be handed back as if the keyboard had sent it.
    KeyboardLoop,
    /// A byte for, or as if from, the mouse.
    Aux,
}

/// Registers of an [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    ram: [u8; 32],
    output_port: u8,
    output: Option<u8>,
    last_output: u8,
    timeout: bool,
    last_was_command: bool,
    /// The waiting byte came from the keyboard's side rather than from the controller.
    from_keyboard: bool,
    expected: Expected,
}

impl Default for I8042State {
    fn default() -> Self {
        let mut ram = [0; 32];
        ram[0] = config::SYSTEM | config::TRANSLATE | config::AUX_DISABLED;
        I8042State {
            ram,
            output_port: output_port::NO_RESET | output_port::A20,
            output: None,
            last_output: 0,
            timeout: false,
            last_was_command: false,
            from_keyboard: false,
            expected: Expected::default(),
        }
    }
}

impl I8042State {
    fn answer(&mut self, byte: u8) {
        self.output = Some(byte);
        self.from_keyboard = false;
        self.timeout = false;
    }

    fn answer_from_keyboard(&mut self, byte: u8, timeout: bool) {
        self.output = Some(byte);
        self.from_keyboard = true;
        self.timeout = timeout;
    }

    fn interrupt(&self) -> bool {
        self.output.is_some() && self.from_keyboard && self.ram[0] & config::KEYBOARD_INTERRUPT != 0
    }

    fn status(&self) -> u8 {
        let mut value = status::UNLOCKED;
        if self.output.is_some() {
            value |= status::OUTPUT_FULL;
            if self.timeout {
                value |= status::TIMEOUT;
            }
        }
        if self.ram[0] & config::SYSTEM != 0 {
            value |= status::SYSTEM;
        }
        if self.last_was_command {
            value |= status::COMMAND;
        }
        value
    }

    fn read_data(&mut self) -> u8 {
        if let Some(byte) = self.output.take() {
            self.last_output = byte;
            self.timeout = false;
        }
        self.last_output
    }

    /// Returns whether the machine is to be reset.
    fn write_command(&mut self, value: u8) -> bool {
        self.last_was_command = true;
        self.expected = Expected::Keyboard;
        match value {
            command::READ_RAM..=command::READ_RAM_LAST => {
                self.answer(self.ram[usize::from(value - command::READ_RAM)]);
            }
            command::WRITE_RAM..=command::WRITE_RAM_LAST => {
                self.expected = Expected::Ram(value - command::WRITE_RAM);
            }
            command::DISABLE_AUX => self.ram[0] |= config::AUX_DISABLED,
            command::ENABLE_AUX => self.ram[0] &= !config::AUX_DISABLED,
            command::TEST_AUX => self.answer(AUX_LINE_STUCK),
            command::SELF_TEST => {
                self.ram[0] |= config::SYSTEM;
                self.answer(SELF_TEST_PASSED);
            }
            command::TEST_KEYBOARD => self.answer(KEYBOARD_LINE_GOOD),
            command::DISABLE_KEYBOARD => self.ram[0] |= config::KEYBOARD_DISABLED,
            command::ENABLE_KEYBOARD => self.ram[0] &= !config::KEYBOARD_DISABLED,
            command::READ_INPUT_PORT => self.answer(INPUT_PORT),
            command::READ_OUTPUT_PORT => self.answer(self.output_port),
            command::WRITE_OUTPUT_PORT => self.expected = Expected::OutputPort,
            command::LOOP_KEYBOARD => self.expected = Expected::KeyboardLoop,
            command::LOOP_AUX | command::WRITE_AUX => self.expected = Expected::Aux,
            command::PULSE.. => return value & output_port::NO_RESET == 0,
            // Unknown commands do nothing, as on the chip.
            _ => {}
        }
        false
    }

    /// Returns whether the machine is to be reset.
    fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match std::mem::take(&mut self.expected) {
            Expected::Ram(index) => self.ram[usize::from(index) % 32] = value,
            Expected::OutputPort => {
                self.output_port = value | output_port::NO_RESET;
                return value & output_port::NO_RESET == 0;
            }
            Expected::KeyboardLoop => self.answer_from_keyboard(value, false),
            // There is no mouse port: what is said to it comes back as unanswered, and not marked as the mouse's.
            Expected::Aux | Expected::Keyboard => {
                // Talking to the keyboard starts its clock (PC/AT Technical Reference).
                self.ram[0] &= !config::KEYBOARD_DISABLED;
                self.answer_from_keyboard(NO_ANSWER, true);
            }
        }
        false
    }
}

/// The controller.
pub struct I8042 {
    registers: Mutex<I8042State>,
    keyboard_irq: Output,
    power: Arc<dyn PowerControl>,
}

impl I8042 {
    /// A controller after power-up; resets through `power`.
    pub fn new(keyboard_irq: Arc<dyn IrqLine>, power: Arc<dyn PowerControl>) -> Self {
        I8042 { registers: Mutex::default(), keyboard_irq: Output::new(keyboard_irq), power }
    }

    /// Puts both ports on the bus (port 61h between them is the engine's).
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, pio: &PioBus) -> Result<(), BusError> {
        pio.insert(u64::from(DATA_PORT), 1, "i8042-data", self.clone())?;
        let command = PioPart { device: self.clone(), shift: COMMAND_PORT - DATA_PORT };
        pio.insert(u64::from(COMMAND_PORT), 1, "i8042-command", Arc::new(command))
    }
}

impl PioDevice for I8042 {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        let mut registers = lock(&self.registers);
        let value = if offset == 0 { registers.read_data() } else { registers.status() };
        self.keyboard_irq.set(registers.interrupt());
        data.fill(value);
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        let Some(value) = data.first().copied() else { return };
        let mut registers = lock(&self.registers);
        let reset = if offset == 0 { registers.write_data(value) } else { registers.write_command(value) };
        self.keyboard_irq.set(registers.interrupt());
        drop(registers);
        if reset {
            self.power.request(PowerEvent::Reset);
        }
    }
}

impl Persist for I8042 {
    type State = I8042State;
    const VERSION: u32 = 1;

    fn save(&self) -> I8042State {
        lock(&self.registers).clone()
    }

    fn restore(&self, state: I8042State) -> Result<(), SnapshotError> {
        let mut registers = lock(&self.registers);
        *registers = state;
        self.keyboard_irq.set(registers.interrupt());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Line, Power};

    struct Bench {
        chip: I8042,
        irq: Arc<Line>,
        power: Arc<Power>,
    }

    impl Bench {
        fn new() -> Self {
            let (irq, power) = (Line::new(), Power::new());
            Bench { chip: I8042::new(irq.clone(), power.clone()), irq, power }
        }

        fn get(&self, offset: u16) -> u8 {
            let mut byte = [0];
            self.chip.pio_read(offset, &mut byte);
            byte[0]
        }

        fn ask(&self, value: u8) -> u8 {
            self.chip.pio_write(4, &[value]);
            assert_ne!(self.get(4) & status::OUTPUT_FULL, 0, "{value:#x} is answered");
            self.get(0)
        }
    }

    #[test]
    fn answers_a_drivers_probe() {
        let bench = Bench::new();
        assert_eq!(bench.get(4) & (status::OUTPUT_FULL | status::SYSTEM), status::SYSTEM);
        assert_eq!(bench.ask(command::SELF_TEST), SELF_TEST_PASSED);
        assert_eq!(bench.ask(command::TEST_KEYBOARD), KEYBOARD_LINE_GOOD);
        assert_ne!(bench.ask(command::TEST_AUX), 0);
        bench.chip.pio_write(4, &[command::WRITE_RAM]);
        assert_ne!(bench.get(4) & status::COMMAND, 0);
        bench.chip.pio_write(0, &[0x47]);
        assert_eq!(bench.ask(command::READ_RAM), 0x47);
        assert_eq!(bench.get(4) & status::OUTPUT_FULL, 0);
    }

    #[test]
    fn an_absent_keyboard_is_reported_at_once() {
        let bench = Bench::new();
        bench.chip.pio_write(4, &[command::WRITE_RAM]);
        bench.chip.pio_write(0, &[config::KEYBOARD_INTERRUPT]);
        assert!(!bench.irq.level());
        bench.chip.pio_write(0, &[0xf2]);
        assert!(bench.irq.level());
        assert_ne!(bench.get(4) & status::TIMEOUT, 0);
        assert_eq!(bench.get(0), NO_ANSWER);
        assert!(!bench.irq.level());
        assert_eq!(bench.get(4) & status::TIMEOUT, 0);
    }

    #[test]
    fn resets_by_pulse_and_by_output_port() {
        let bench = Bench::new();
        bench.chip.pio_write(4, &[0xff]);
        assert_eq!(bench.power.take(), [], "no line pulled");
        bench.chip.pio_write(4, &[0xfe]);
        assert_eq!(bench.power.take(), [PowerEvent::Reset]);
        bench.chip.pio_write(4, &[command::WRITE_OUTPUT_PORT]);
        bench.chip.pio_write(0, &[0xdf]);
        assert_eq!(bench.power.take(), []);
        assert_eq!(bench.ask(command::READ_OUTPUT_PORT), 0xdf);
        bench.chip.pio_write(4, &[command::WRITE_OUTPUT_PORT]);
        bench.chip.pio_write(0, &[0xde]);
        assert_eq!(bench.power.take(), [PowerEvent::Reset]);
    }

    proptest! {
        #[test]
        fn any_use_survives_saving(writes in proptest::collection::vec((any::<bool>(), any::<u8>(), any::<bool>()), 0..100)) {
            let bench = Bench::new();
            for (is_command, value, read) in writes {
                bench.chip.pio_write(if is_command { 4 } else { 0 }, &[value]);
                if read { bench.get(0); }
            }
            let copy = Bench::new();
            let saved = serde_json::to_string(&bench.chip.save()).unwrap();
            copy.chip.restore(serde_json::from_str(&saved).unwrap()).unwrap();
            prop_assert_eq!(bench.irq.level(), copy.irq.level());
            for offset in [4, 0, 4, 0] {
                prop_assert_eq!(bench.get(offset), copy.get(offset));
            }
            for index in 0..32 {
                prop_assert_eq!(bench.ask(command::READ_RAM + index), copy.ask(command::READ_RAM + index));
            }
        }
    }
}
