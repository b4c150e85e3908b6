//! ACPI fixed hardware (ACPI 6.5 §4.8): PM1 event and control registers, the power management timer, one block of
//! general-purpose events, the power button, and the SMI command port that switches ACPI on and off. Port numbers are bhyve's.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::access::{AlarmSetting, lock};
use crate::bus::{BusError, PioBus, PioDevice};
use crate::host::{Alarm, Clock, IrqLine, OnAlarm, PowerControl, PowerEvent};
use crate::irq::Output;
use crate::snapshot::{Persist, SnapshotError};

/// First port of the register block.
pub const PM_BASE: u16 = 0x400;
/// Ports of the register block.
pub const PM_PORTS: u16 = 0x0e;
/// PM1 event block: status and enable, 2 bytes each.
pub const PM1_EVENT_PORT: u16 = PM_BASE + register::PM1_STATUS;
/// PM1 control block, 2 bytes.
pub const PM1_CONTROL_PORT: u16 = PM_BASE + register::PM1_CONTROL;
/// Power management timer, 4 bytes.
pub const PM_TIMER_PORT: u16 = PM_BASE + register::TIMER;
/// General-purpose event block 0: status and enable, 1 byte each.
pub const GPE0_PORT: u16 = PM_BASE + register::GPE0_STATUS;
/// Length of the general-purpose event block.
pub const GPE0_BYTES: u8 = 2;
/// SMI command port.
pub const SMI_COMMAND_PORT: u16 = 0xb2;
/// Written to the SMI command port: ACPI on.
pub const ACPI_ENABLE: u8 = 0xa0;
/// Written to the SMI command port: ACPI off.
pub const ACPI_DISABLE: u8 = 0xa1;
/// Interrupt of the block.
pub const SCI_IRQ: u8 = 9;
/// Sleep type that turns the machine off (`\_S5` in the DSDT).
pub const S5_SLEEP_TYPE: u8 = 5;
/// Hertz of the power management timer (ACPI 6.5 §4.8.2.1).
pub const TIMER_HZ: u64 = 3_579_545;

mod register {
    pub const PM1_STATUS: u16 = 0x0;
    pub const PM1_ENABLE: u16 = 0x2;
    pub const PM1_CONTROL: u16 = 0x4;
    pub const TIMER: u16 = 0x8;
    pub const GPE0_STATUS: u16 = 0xc;
    pub const GPE0_ENABLE: u16 = 0xd;
}

/// PM1 status and enable registers (ACPI 6.5 tables 4.11 and 4.12).
pub mod pm1 {
    /// The timer's highest bit changed.
    pub const TIMER: u16 = 1 << 0;
    /// A bus master asked for memory.
    pub const BUS_MASTER: u16 = 1 << 4;
    /// Firmware released the global lock.
    pub const GLOBAL_LOCK: u16 = 1 << 5;
    /// The power button was pressed.
    pub const POWER_BUTTON: u16 = 1 << 8;
    /// The sleep button was pressed.
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    /// The clock's alarm rang.
    pub const RTC: u16 = 1 << 10;
    /// The machine woke up.
    pub const WAKE: u16 = 1 << 15;
    /// Bits of the enable register.
    pub const ENABLES: u16 = TIMER | GLOBAL_LOCK | POWER_BUTTON | SLEEP_BUTTON | RTC;
    /// Bits of the status register.
    pub const STATUSES: u16 = ENABLES | BUS_MASTER | WAKE;
}

/// PM1 control register (ACPI 6.5 table 4.13).
pub mod control {
    /// Events raise the SCI; set and cleared through the SMI command port only.
    pub const SCI_ENABLE: u16 = 1 << 0;
    /// Bus master requests wake the processor.
    pub const BUS_MASTER_RELOAD: u16 = 1 << 1;
    /// Position of the three-bit sleep type.
    pub const SLEEP_TYPE_SHIFT: u16 = 10;
    /// The sleep type.
    pub const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
    /// Goes to sleep; reads as zero.
    pub const SLEEP_ENABLE: u16 = 1 << 13;
    /// Bits software can change.
    pub const WRITABLE: u16 = BUS_MASTER_RELOAD | SLEEP_TYPE;
}

/// Registers of an [`AcpiPm`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AcpiPmState {
    pub pm1_status: u16,
    pub pm1_enable: u16,
    pub pm1_control: u16,
    /// Timer ticks since power-on; software sees the low 32 bits.
    pub timer: u64,
    pub gpe_status: u8,
    pub gpe_enable: u8,
    pub smi_command: u8,
}

#[derive(Default)]
struct Inner {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u8,
    gpe_enable: u8,
    smi_command: u8,
    /// Added to the ticks that the clock gives.
    timer_offset: u64,
    /// `timer >> 31` when it was last looked at.
    timer_half: u64,
    alarm_setting: AlarmSetting,
}

/// The register block and the SMI command port.
pub struct AcpiPm {
    inner: Mutex<Inner>,
    sci: Output,
    power: Arc<dyn PowerControl>,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
}

const NANOSECONDS: u128 = 1_000_000_000;

fn ticks_at(now_ns: u64) -> u64 {
    (u128::from(now_ns) * u128::from(TIMER_HZ) / NANOSECONDS) as u64
}

/// The first nanosecond at which [`ticks_at`] gives `ticks`.
fn nanoseconds_of(ticks: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NANOSECONDS).div_ceil(u128::from(TIMER_HZ))).unwrap_or(u64::MAX)
}

impl AcpiPm {
    /// The block after power-up, ACPI off. `alarm` must call this device back.
    pub fn new(
        sci: Arc<dyn IrqLine>,
        power: Arc<dyn PowerControl>,
        clock: Arc<dyn Clock>,
        alarm: Arc<dyn Alarm>,
    ) -> Self {
        AcpiPm { inner: Mutex::default(), sci: Output::new(sci), power, clock, alarm }
    }

    /// Puts the block and the SMI command port on the bus.
    ///
    /// # Errors
    /// Another device is there.
    pub fn attach(self: &Arc<Self>, pio: &PioBus) -> Result<(), BusError> {
        pio.insert(u64::from(PM_BASE), u64::from(PM_PORTS), "acpi-pm", self.clone())?;
        pio.insert(u64::from(SMI_COMMAND_PORT), 1, "smi-command", Arc::new(SmiCommand(self.clone())))
    }

    /// Presses the power button. Returns whether the guest listens to it; if not, the press is remembered until it does.
    pub fn press_power_button(&self) -> bool {
        let mut inner = lock(&self.inner);
        inner.status |= pm1::POWER_BUTTON;
        self.update(&mut inner);
        inner.control & control::SCI_ENABLE != 0 && inner.enable & pm1::POWER_BUTTON != 0
    }

    /// Raises general-purpose event `event` (0 to 7).
    pub fn raise_gpe(&self, event: u8) {
        let mut inner = lock(&self.inner);
        inner.gpe_status |= 1u8.checked_shl(u32::from(event)).unwrap_or(0);
        self.update(&mut inner);
    }

    fn timer(&self, inner: &Inner) -> u64 {
        ticks_at(self.clock.now_ns()).wrapping_add(inner.timer_offset)
    }

    /// Notices that the timer has wrapped, drives the SCI, sets the alarm.
    fn update(&self, inner: &mut Inner) {
        let timer = self.timer(inner);
        if timer >> 31 != inner.timer_half {
            inner.timer_half = timer >> 31;
            inner.status |= pm1::TIMER;
        }
        let events =
            inner.status & inner.enable & pm1::ENABLES != 0 || inner.gpe_status & inner.gpe_enable != 0;
        let acpi = inner.control & control::SCI_ENABLE != 0;
        self.sci.set(events && acpi);
        let wanted = acpi && inner.enable & !inner.status & pm1::TIMER != 0;
        let deadline_ns = wanted.then(|| {
            let next = (inner.timer_half.wrapping_add(1) << 31).wrapping_sub(inner.timer_offset);
            nanoseconds_of(next)
        });
        inner.alarm_setting.set(&*self.alarm, deadline_ns);
    }

    fn read_bytes(&self, inner: &Inner) -> [u8; PM_PORTS as usize] {
        let mut bytes = [0; PM_PORTS as usize];
        let mut put = |at: u16, value: &[u8]| {
            let at = usize::from(at);
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        put(register::PM1_STATUS, &inner.status.to_le_bytes());
        put(register::PM1_ENABLE, &inner.enable.to_le_bytes());
        put(register::PM1_CONTROL, &inner.control.to_le_bytes());
        put(register::TIMER, &(self.timer(inner) as u32).to_le_bytes());
        put(register::GPE0_STATUS, &[inner.gpe_status]);
        put(register::GPE0_ENABLE, &[inner.gpe_enable]);
        bytes
    }

    fn smi_command(&self, value: u8) {
        let mut inner = lock(&self.inner);
        inner.smi_command = value;
        match value {
            ACPI_ENABLE => inner.control |= control::SCI_ENABLE,
            ACPI_DISABLE => inner.control &= !control::SCI_ENABLE,
            _ => {}
        }
        self.update(&mut inner);
    }
}

impl Inner {
    /// Writes one byte; returns whether software asked to sleep.
    fn write_byte(&mut self, offset: u16, value: u8) -> bool {
        // `value` in its place in the register it belongs to, and the bits it stands for.
        let (wide, mask) = if offset.is_multiple_of(2) {
            (u16::from(value), 0x00ff)
        } else {
            (u16::from(value) << 8, 0xff00)
        };
        match offset {
            register::GPE0_STATUS => self.gpe_status &= !value,
            register::GPE0_ENABLE => self.gpe_enable = value,
            _ => match offset & !1 {
                register::PM1_STATUS => self.status &= !wide,
                register::PM1_ENABLE => self.enable = self.enable & !mask | wide & pm1::ENABLES,
                register::PM1_CONTROL => {
                    let changed = mask & control::WRITABLE;
                    self.control = self.control & !changed | wide & changed;
                    return wide & control::SLEEP_ENABLE != 0;
                }
                // The timer cannot be written.
                _ => {}
            },
        }
        false
    }
}

impl PioDevice for AcpiPm {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = lock(&self.inner);
        self.update(&mut inner);
        let bytes = self.read_bytes(&inner);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.inner);
        self.update(&mut inner);
        let mut sleep = false;
        for (offset, byte) in (offset..).zip(data) {
            sleep |= inner.write_byte(offset, *byte);
        }
        self.update(&mut inner);
        let sleep_type = (inner.control & control::SLEEP_TYPE) >> control::SLEEP_TYPE_SHIFT;
        drop(inner);
        // Other sleep types are not in the DSDT; writing them does nothing.
        if sleep && sleep_type == u16::from(S5_SLEEP_TYPE) {
            self.power.request(PowerEvent::PowerOff);
        }
    }
}

impl OnAlarm for AcpiPm {
    fn on_alarm(&self) {
        let mut inner = lock(&self.inner);
        inner.alarm_setting.rang();
        self.update(&mut inner);
    }
}

struct SmiCommand(Arc<AcpiPm>);

impl PioDevice for SmiCommand {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(lock(&self.0.inner).smi_command);
    }

    fn pio_write(&self, _offset: u16, data: &[u8]) {
        if let Some(value) = data.first() {
            self.0.smi_command(*value);
        }
    }
}

impl Persist for AcpiPm {
    type State = AcpiPmState;
    const VERSION: u32 = 1;

    fn save(&self) -> AcpiPmState {
        let mut inner = lock(&self.inner);
        self.update(&mut inner);
        AcpiPmState {
            pm1_status: inner.status,
            pm1_enable: inner.enable,
            pm1_control: inner.control,
            timer: self.timer(&inner),
            gpe_status: inner.gpe_status,
            gpe_enable: inner.gpe_enable,
            smi_command: inner.smi_command,
        }
    }

    fn restore(&self, state: AcpiPmState) -> Result<(), SnapshotError> {
        let mut inner = lock(&self.inner);
        *inner = Inner {
            status: state.pm1_status & pm1::STATUSES,
            enable: state.pm1_enable & pm1::ENABLES,
            control: state.pm1_control & (control::WRITABLE | control::SCI_ENABLE),
            gpe_status: state.gpe_status,
            gpe_enable: state.gpe_enable,
            smi_command: state.smi_command,
            timer_offset: state.timer.wrapping_sub(ticks_at(self.clock.now_ns())),
            timer_half: state.timer >> 31,
            alarm_setting: std::mem::take(&mut inner.alarm_setting),
        };
        self.update(&mut inner);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bus::Bus;
    use crate::testing::{Line, ManualAlarm, ManualClock, Power};

    struct Bench {
        pm: Arc<AcpiPm>,
        bus: PioBus,
        sci: Arc<Line>,
        power: Arc<Power>,
        clock: Arc<ManualClock>,
        alarm: Arc<ManualAlarm>,
    }

    impl Bench {
        fn new() -> Self {
            let (sci, power, clock, alarm) =
                (Line::new(), Power::new(), ManualClock::new(0), ManualAlarm::new());
            let pm = Arc::new(AcpiPm::new(sci.clone(), power.clone(), clock.clone(), alarm.clone()));
            let bus = Bus::new();
            pm.attach(&bus).unwrap();
            Bench { pm, bus, sci, power, clock, alarm }
        }

        fn get<const N: usize>(&self, port: u16) -> u32 {
            let mut data = [0; 4];
            let (device, offset) = self.bus.find(u64::from(port), N as u64).unwrap();
            device.pio_read(offset as u16, &mut data[..N]);
            u32::from_le_bytes(data)
        }

        fn put(&self, port: u16, data: &[u8]) {
            let (device, offset) = self.bus.find(u64::from(port), data.len() as u64).unwrap();
            device.pio_write(offset as u16, data);
        }
    }

    #[test]
    fn power_button_raises_the_sci_once_acpi_is_on() {
        let bench = Bench::new();
        assert!(!bench.pm.press_power_button(), "nobody listens yet");
        bench.put(PM1_EVENT_PORT + 2, &pm1::POWER_BUTTON.to_le_bytes());
        assert!(!bench.sci.level());
        bench.put(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
        assert_eq!(bench.get::<2>(PM1_CONTROL_PORT), u32::from(control::SCI_ENABLE));
        assert!(bench.sci.level());
        assert_eq!(bench.get::<2>(PM1_EVENT_PORT), u32::from(pm1::POWER_BUTTON));
        bench.put(PM1_EVENT_PORT, &pm1::POWER_BUTTON.to_le_bytes());
        assert!(!bench.sci.level());
        assert!(bench.pm.press_power_button());
        bench.put(SMI_COMMAND_PORT, &[ACPI_DISABLE]);
        assert!(!bench.sci.level());
    }

    #[test]
    fn s5_powers_off_and_nothing_else_does() {
        let bench = Bench::new();
        for sleep_type in 0..8u16 {
            bench.put(PM1_CONTROL_PORT, &(sleep_type << 10).to_le_bytes());
            assert_eq!(bench.power.take(), []);
            bench.put(PM1_CONTROL_PORT, &(sleep_type << 10 | control::SLEEP_ENABLE).to_le_bytes());
            let expected: &[_] =
                if sleep_type == u16::from(S5_SLEEP_TYPE) { &[PowerEvent::PowerOff] } else { &[] };
            assert_eq!(bench.power.take(), expected);
            assert_eq!(bench.get::<2>(PM1_CONTROL_PORT), u32::from(sleep_type) << 10);
        }
        bench.put(PM1_CONTROL_PORT + 1, &[0x34]);
        assert_eq!(bench.power.take(), [PowerEvent::PowerOff], "as a byte too");
        bench.put(PM1_CONTROL_PORT, &u16::MAX.to_le_bytes());
        assert_eq!(bench.get::<2>(PM1_CONTROL_PORT) & 1, 0, "SCI_EN is not software's to set");
    }

    #[test]
    fn timer_counts_and_tells_of_its_top_bit() {
        let bench = Bench::new();
        bench.put(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
        bench.clock.set(1_000_000_000);
        assert_eq!(bench.get::<4>(PM_TIMER_PORT), 3_579_545);
        bench.put(PM_TIMER_PORT, &[0; 4]);
        assert_eq!(bench.get::<4>(PM_TIMER_PORT), 3_579_545, "read-only");
        assert_eq!(bench.alarm.deadline(), None);
        bench.put(PM1_EVENT_PORT + 2, &pm1::TIMER.to_le_bytes());
        let deadline = bench.alarm.deadline().unwrap();
        bench.clock.set(deadline - 1);
        bench.pm.on_alarm();
        assert!(!bench.sci.level(), "spurious");
        assert_eq!(bench.get::<4>(PM_TIMER_PORT), 0x7fff_ffff);
        assert_eq!(bench.alarm.ring(&bench.clock), deadline);
        bench.pm.on_alarm();
        assert!(bench.sci.level());
        assert_eq!(bench.get::<4>(PM_TIMER_PORT), 0x8000_0000);
        bench.put(PM1_EVENT_PORT, &pm1::TIMER.to_le_bytes());
        assert!(!bench.sci.level());
        assert!(bench.alarm.deadline().unwrap() > deadline);
        bench.clock.set(bench.alarm.deadline().unwrap());
        assert_eq!(bench.get::<4>(PM_TIMER_PORT), 0, "wraps at 32 bits");
    }

    #[test]
    fn general_purpose_events_raise_the_sci() {
        let bench = Bench::new();
        bench.put(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
        bench.pm.raise_gpe(3);
        bench.pm.raise_gpe(200);
        assert_eq!(bench.get::<1>(GPE0_PORT), 8);
        assert!(!bench.sci.level());
        bench.put(GPE0_PORT + 1, &[0xff]);
        assert!(bench.sci.level());
        bench.put(GPE0_PORT, &[8]);
        assert!(!bench.sci.level());
    }

    proptest! {
        #[test]
        fn any_use_survives_saving(
            accesses in proptest::collection::vec((0u16..PM_PORTS, any::<u32>(), 0usize..4), 0..60), later in 0u64..1 << 50,
        ) {
            let bench = Bench::new();
            for (offset, value, len) in accesses {
                let mut data = value.to_le_bytes();
                bench.pm.pio_write(offset, &data[..=len]);
                bench.pm.pio_read(offset, &mut data[..=len]);
                bench.clock.advance(u64::from(value) * 1000);
                bench.put(SMI_COMMAND_PORT, &[(value >> 8) as u8 | 0xa0]);
            }
            let copy = Bench::new();
            copy.clock.set(later);
            copy.pm.restore(bench.pm.save()).unwrap();
            prop_assert_eq!(bench.sci.level(), copy.sci.level());
            for offset in 0..PM_PORTS {
                prop_assert_eq!(bench.get::<1>(PM_BASE + offset), copy.get::<1>(PM_BASE + offset));
            }
        }
    }
}
