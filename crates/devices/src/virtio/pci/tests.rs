use std::sync::Mutex;

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::pci::bits::{self as pci_bits, class};
use crate::testing::{Line, Messages};
use crate::virtio::bits::{NO_VECTOR, common, device_type, isr, legacy};
use crate::virtio::queue::driver::Ring;

const RAM: u64 = 1 << 20;
const RINGS: u64 = 0x1_0000;
const FEATURE: u64 = 1 << 5;

/// Gives every buffer back with the number of bytes it may write, and remembers what happens to it.
#[derive(Default)]
struct Echo {
    driver: Mutex<Option<Driver>>,
    events: Mutex<Vec<String>>,
}

impl Echo {
    fn event(&self, what: impl Into<String>) {
        lock(&self.events).push(what.into());
    }

    fn events(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.events))
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        device_type::ENTROPY
    }
    fn class(&self) -> (u8, u8, u8) {
        class::STORAGE
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8, 16]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.iter_mut().zip(offset as u8..).for_each(|(byte, value)| *byte = value);
    }
    fn config_write(&self, offset: u64, data: &[u8]) {
        self.event(format!("config {offset} {data:?}"));
    }
    fn activate(&self, driver: Driver) {
        self.event(format!("activate {:x}", driver.features));
        *lock(&self.driver) = Some(driver);
    }
    fn notify(&self, queue: u16) {
        let driver = lock(&self.driver).clone().expect("active");
        let queue = driver.queues[usize::from(queue)].clone();
        queue.take_all(|buffer| queue.push(&buffer, buffer.chain.writable_len() as u32));
    }
    fn drain(&self) {
        self.event("drain");
    }
    fn reset(&self) {
        self.event("reset");
    }
    fn save(&self) -> Value {
        json!("echo")
    }
    fn restore(&self, state: &Value) -> Result<(), SnapshotError> {
        self.event(format!("restore {state}"));
        Ok(())
    }
}

struct Bed {
    device: VirtioPci<Echo>,
    messages: Arc<Messages>,
    pin: Arc<Line>,
    memory: GuestMemory,
}

fn bed(msix: bool) -> Bed {
    let region = memory::create_region("test", 0, RAM).unwrap();
    let memory = memory::join_regions(vec![region]).unwrap();
    let echo = Arc::new(Echo::default());
    let identity = VirtioPci::identity(&*echo);
    let device = VirtioPci::new(echo, identity, &memory, msix).unwrap();
    let (messages, pin) = (Messages::new(), Line::new());
    device.function().connect_messages(messages.clone());
    device.function().connect_intx(pin.clone());
    let command = pci_bits::command::BUS_MASTER.to_le_bytes();
    device.config_write(pci_bits::COMMAND as u16, &command);
    Bed { device, messages, pin, memory }
}

impl Bed {
    fn put<const N: usize>(&self, register: u64, value: [u8; N]) {
        self.device.bar_write(MODERN_BAR, COMMON + register, &value);
    }

    fn get<const N: usize>(&self, register: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.bar_read(MODERN_BAR, COMMON + register, &mut data);
        data
    }

    fn status(&self) -> u8 {
        self.get::<1>(common::DEVICE_STATUS)[0]
    }

    fn events(&self) -> Vec<String> {
        self.device.device().events()
    }

    /// Goes through §3.1.1 up to the features; returns the status then.
    fn negotiate(&self, features: u64) -> u8 {
        self.put(common::DEVICE_STATUS, [0]);
        self.put(common::DEVICE_STATUS, [status::ACKNOWLEDGE | status::DRIVER]);
        for select in 0..2u32 {
            self.put(common::DRIVER_FEATURE_SELECT, select.to_le_bytes());
            self.put(common::DRIVER_FEATURE, ((features >> (32 * select)) as u32).to_le_bytes());
        }
        self.put(common::DEVICE_STATUS, [status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK]);
        self.status()
    }

    fn enable_queue(&self, index: u16, ring: &Ring) {
        self.put(common::QUEUE_SELECT, index.to_le_bytes());
        self.put(common::QUEUE_SIZE, ring.size.to_le_bytes());
        let registers = [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE];
        for (register, address) in registers.into_iter().zip(ring.parts()) {
            self.put(register, (address as u32).to_le_bytes());
            self.put(register + 4, 0u32.to_le_bytes());
        }
        self.put(common::QUEUE_ENABLE, 1u16.to_le_bytes());
    }

    fn start(&self, features: u64, layout: Layout) -> Ring {
        assert_ne!(self.negotiate(features) & status::FEATURES_OK, 0);
        let ring = Ring::new(&self.memory, layout, 8, RINGS);
        self.memory.write_slice(&[0; 0x3000], GuestAddress(RINGS)).unwrap();
        self.enable_queue(1, &ring);
        self.put(common::DEVICE_STATUS, [self.status() | status::DRIVER_OK]);
        ring
    }

    fn notify(&self, queue: u16) {
        let at = NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER);
        self.device.bar_write(MODERN_BAR, at, &queue.to_le_bytes());
    }

    fn enable_msix(&self) {
        let function = self.device.function();
        let at = function.with_config(|config| config.capability(pci_bits::capability::MSIX)).unwrap();
        self.device.config_write(at as u16 + 2, &pci_bits::msix::ENABLE.to_le_bytes());
        for vector in 0..3u64 {
            let words = [0xfee0_0000u64, 0x20 + vector];
            for (index, word) in words.into_iter().enumerate() {
                let at = 16 * vector + 8 * index as u64;
                self.device.bar_write(MSIX_BAR, at, &word.to_le_bytes());
            }
        }
    }
}

#[test]
fn modern_drivers_negotiate_start_and_reset() {
    let bed = bed(true);
    assert_eq!(bed.get(common::NUM_QUEUES), 2u16.to_le_bytes());
    bed.put(common::DEVICE_FEATURE_SELECT, 1u32.to_le_bytes());
    let high = u32::from_le_bytes(bed.get(common::DEVICE_FEATURE));
    assert_ne!(u64::from(high) << 32 & feature::VERSION_1, 0);
    bed.put(common::DEVICE_FEATURE_SELECT, 2u32.to_le_bytes());
    assert_eq!(bed.get(common::DEVICE_FEATURE), [0; 4], "there are no more");

    assert_eq!(bed.negotiate(FEATURE) & status::FEATURES_OK, 0, "a legacy driver does not come this way");
    assert_eq!(bed.negotiate(feature::VERSION_1 | 1 << 50) & status::FEATURES_OK, 0, "not offered");
    bed.events();
    for layout in [Layout::Split, Layout::Packed] {
        let packed = if layout == Layout::Packed { feature::RING_PACKED } else { 0 };
        let features = feature::VERSION_1 | FEATURE | packed;
        let mut ring = bed.start(features, layout);
        // Features that are agreed to, and queues that are enabled, stay as they are.
        bed.put(common::DRIVER_FEATURE, 0u32.to_le_bytes());
        bed.put(common::QUEUE_DESC, 0xdead_0000u32.to_le_bytes());
        assert_eq!(bed.get(common::QUEUE_DESC), (RINGS as u32).to_le_bytes());
        let activated = bed.events().pop();
        assert_eq!(activated, Some(format!("activate {features:x}")));
        let id = ring.offer(&[(0, 4)], &[(0, 7), (16, 8)]);
        assert_eq!(ring.used(), None);
        bed.notify(1);
        assert_eq!(ring.used(), Some((id, 15)), "{layout:?}");
        bed.notify(0);
        bed.notify(2);
        bed.put(common::DEVICE_STATUS, [0]);
        assert_eq!(bed.events(), ["drain", "reset"]);
        assert_eq!(bed.status(), 0);
        bed.put(common::QUEUE_SELECT, 1u16.to_le_bytes());
        assert_eq!(bed.get(common::QUEUE_ENABLE), [0, 0]);
        ring.offer(&[], &[(0, 1)]);
        bed.notify(1);
        assert_eq!(ring.used(), None, "not after a reset");
    }
    bed.put(common::QUEUE_SELECT, 2u16.to_le_bytes());
    assert_eq!(bed.get(common::QUEUE_SIZE), [0, 0], "no such queue");
}

#[test]
fn interrupts_by_pin_by_msi_and_by_msix() {
    for msix in [false, true] {
        let bed = bed(msix);
        let mut ring = bed.start(feature::VERSION_1, Layout::Split);
        let serve = |ring: &mut Ring| {
            ring.offer(&[], &[(0, 1)]);
            bed.notify(1);
            ring.used().expect("a buffer");
        };
        serve(&mut ring);
        assert!(bed.pin.level() && bed.messages.take().is_empty());
        let mut status = [0];
        bed.device.bar_read(MODERN_BAR, ISR, &mut status);
        assert_eq!((status[0], bed.pin.level()), (isr::QUEUE, false), "reading acknowledges");
        bed.device.bar_read(MODERN_BAR, ISR, &mut status);
        assert_eq!(status[0], 0);

        let function = bed.device.function();
        if msix {
            bed.enable_msix();
            bed.put(common::QUEUE_SELECT, 1u16.to_le_bytes());
            for (vector, expected) in [(2u16, 2), (3, NO_VECTOR), (2, 2)] {
                bed.put(common::QUEUE_MSIX_VECTOR, vector.to_le_bytes());
                assert_eq!(bed.get(common::QUEUE_MSIX_VECTOR), expected.to_le_bytes());
            }
            serve(&mut ring);
            assert_eq!(bed.messages.take(), [(0xfee0_0000, 0x22)]);
            bed.put(common::CONFIG_MSIX_VECTOR, 0u16.to_le_bytes());
            bed.device.signals.config_changed();
            assert_eq!(bed.messages.take(), [(0xfee0_0000, 0x20)]);
            assert_eq!(bed.get(common::CONFIG_GENERATION), [1]);
        } else {
            let at = function.with_config(|config| config.capability(pci_bits::capability::MSI)).unwrap();
            bed.device.config_write(at as u16 + 4, &0xfee0_0000u32.to_le_bytes());
            bed.device.config_write(at as u16 + 12, &0x44u16.to_le_bytes());
            bed.device.config_write(at as u16 + 2, &pci_bits::msi::ENABLE.to_le_bytes());
            serve(&mut ring);
            assert_eq!(bed.messages.take(), [(0xfee0_0000, 0x44)]);
            bed.device.bar_read(MODERN_BAR, ISR, &mut status);
            assert_eq!(status[0], isr::QUEUE);
        }
        assert!(!bed.pin.level());
    }
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let bed = bed(true);
    let mut ring = bed.start(feature::VERSION_1, Layout::Split);
    bed.enable_msix();
    bed.put(common::CONFIG_MSIX_VECTOR, 1u16.to_le_bytes());
    ring.offer_head(99);
    bed.notify(1);
    assert_ne!(bed.status() & status::DEVICE_NEEDS_RESET, 0);
    assert_eq!(bed.messages.take(), [(0xfee0_0000, 0x21)]);
    // The driver cannot talk it away.
    bed.put(common::DEVICE_STATUS, [bed.status() & !status::DEVICE_NEEDS_RESET]);
    ring.offer(&[], &[(0, 1)]);
    bed.notify(1);
    assert_eq!((ring.used(), bed.messages.take()), (None, vec![]));
    let mut ring = bed.start(feature::VERSION_1, Layout::Split);
    ring.offer(&[], &[(0, 1)]);
    bed.notify(1);
    assert!(ring.used().is_some(), "works again");
}

#[test]
fn a_buffer_of_an_earlier_life_is_not_given_back() {
    let bed = bed(true);
    let mut ring = bed.start(feature::VERSION_1, Layout::Split);
    ring.offer(&[], &[(0, 1)]);
    let mut held = Vec::new();
    bed.device.queues[1].take_all(|buffer| held.push(buffer));
    assert_eq!(held.len(), 1);
    let mut ring = bed.start(feature::VERSION_1, Layout::Split);
    bed.device.queues[1].push(&held[0], 1);
    assert_eq!(ring.used(), None);
}

#[test]
fn nothing_is_touched_without_bus_mastering_or_driver() {
    let bed = bed(true);
    bed.negotiate(feature::VERSION_1);
    let mut ring = Ring::new(&bed.memory, Layout::Split, 8, RINGS);
    bed.enable_queue(1, &ring);
    ring.offer(&[], &[(0, 1)]);
    bed.notify(1);
    assert_eq!(ring.used(), None, "the driver is not ready");
    bed.device.config_write(pci_bits::COMMAND as u16, &[0, 0]);
    bed.put(common::DEVICE_STATUS, [bed.status() | status::DRIVER_OK]);
    bed.notify(1);
    assert_eq!(ring.used(), None, "not a bus master");
    let command = pci_bits::command::BUS_MASTER.to_le_bytes();
    bed.device.config_write(pci_bits::COMMAND as u16, &command);
    bed.notify(1);
    assert!(ring.used().is_some());
}

#[test]
fn one_queue_is_reset_without_the_other() {
    let bed = bed(true);
    let mut ring = bed.start(feature::VERSION_1 | feature::RING_RESET, Layout::Split);
    ring.offer(&[], &[(0, 1)]);
    bed.events();
    bed.put(common::QUEUE_SELECT, 1u16.to_le_bytes());
    bed.put(common::QUEUE_RESET, 1u16.to_le_bytes());
    assert_eq!(bed.events(), ["drain"]);
    assert_eq!((bed.get(common::QUEUE_RESET), bed.get(common::QUEUE_ENABLE)), ([0, 0], [0, 0]));
    bed.notify(1);
    assert_eq!(ring.used(), None);
    bed.memory.write_slice(&[0; 0x3000], GuestAddress(RINGS)).unwrap();
    let mut ring = Ring::new(&bed.memory, Layout::Split, 4, RINGS);
    bed.enable_queue(1, &ring);
    ring.offer(&[], &[(0, 1)]);
    bed.notify(1);
    assert!(ring.used().is_some());
}

#[test]
fn legacy_drivers_use_ports() {
    let bed = bed(true);
    let put = |register: u64, data: &[u8]| bed.device.bar_write(LEGACY_BAR, register, data);
    let get = |register: u64, len: usize| {
        let mut data = vec![0; len];
        bed.device.bar_read(LEGACY_BAR, register, &mut data);
        data
    };
    let offered = u32::from_le_bytes(get(legacy::DEVICE_FEATURES, 4).try_into().unwrap());
    assert_eq!(
        u64::from(offered),
        (FEATURE | feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX) | feature::ANY_LAYOUT
    );
    put(legacy::DEVICE_STATUS, &[3]);
    put(legacy::DRIVER_FEATURES, &(FEATURE as u32 | 1 << 30).to_le_bytes());
    put(legacy::QUEUE_SELECT, &[1, 0]);
    assert_eq!(get(legacy::QUEUE_SIZE, 2), [16, 0], "the size is the device's");
    put(legacy::QUEUE_ADDRESS, &(RINGS as u32 / 4096).to_le_bytes());
    assert_eq!(get(legacy::QUEUE_ADDRESS, 4), (RINGS as u32 / 4096).to_le_bytes());
    put(legacy::DEVICE_STATUS, &[7]);
    assert_eq!(bed.events(), [format!("activate {FEATURE:x}")]);
    // The three parts follow each other: the driver's at once, the device's on the next page.
    let state = bed.device.queues[1].with(|queue| queue.state().clone());
    assert_eq!([state.driver, state.device], [RINGS + 0x100, RINGS + 0x1000]);
    bed.memory.write_obj(0x1234_u64, GuestAddress(RINGS)).unwrap();
    bed.memory.write_obj(9u32, GuestAddress(RINGS + 8)).unwrap();
    bed.memory.write_obj(2u16, GuestAddress(RINGS + 12)).unwrap();
    bed.memory.write_obj(1u16, GuestAddress(RINGS + 0x102)).unwrap();
    put(legacy::QUEUE_NOTIFY, &[1, 0]);
    assert_eq!(bed.memory.read_obj::<u16>(GuestAddress(RINGS + 0x1002)).unwrap(), 1);
    assert_eq!(bed.memory.read_obj::<u32>(GuestAddress(RINGS + 0x1008)).unwrap(), 9);
    assert_eq!((get(legacy::ISR, 1), get(legacy::ISR, 1)), (vec![1], vec![0]));

    assert_eq!(get(0x14, 2), [0, 1], "the configuration");
    bed.enable_msix();
    put(legacy::QUEUE_MSIX_VECTOR, &[1, 0]);
    assert_eq!((get(legacy::QUEUE_MSIX_VECTOR, 2), get(0x18, 2)), (vec![1, 0], vec![0, 1]), "moves");
    put(0x18, &[7]);
    put(legacy::DEVICE_STATUS, &[0]);
    assert_eq!(bed.events(), ["config 0 [7]", "drain", "reset"]);
    assert_eq!(get(legacy::QUEUE_ADDRESS, 4), [0; 4]);
}

#[test]
fn firmware_reaches_bars_through_configuration_space() {
    let bed = bed(true);
    let window = bed.device.window as u16;
    let set = |bar: u8, offset: u32, len: u32| {
        bed.device.config_write(window + 4, &[bar]);
        bed.device.config_write(window + 8, &offset.to_le_bytes());
        bed.device.config_write(window + 12, &len.to_le_bytes());
    };
    set(MODERN_BAR as u8, common::NUM_QUEUES as u32, 2);
    let mut data = [0; 2];
    bed.device.config_read(window + 16, &mut data);
    assert_eq!(data, [2, 0]);
    set(MODERN_BAR as u8, common::DEVICE_STATUS as u32, 1);
    bed.device.config_write(window + 16, &[status::ACKNOWLEDGE]);
    assert_eq!(bed.status(), status::ACKNOWLEDGE);
    set(200, 0, 1);
    bed.device.config_read(window + 16, &mut data[..1]);
    assert_eq!(data[0], 0, "no such BAR");
    set(LEGACY_BAR as u8, u32::MAX, 4);
    bed.device.config_read(window + 16, &mut [0; 4]);
}

#[test]
fn a_started_device_is_saved_and_restored() {
    let bed = bed(true);
    let mut ring = bed.start(feature::VERSION_1 | feature::RING_PACKED, Layout::Packed);
    ring.offer(&[], &[(0, 1)]);
    bed.notify(1);
    ring.used().unwrap();
    let state = bed.device.save();
    let echo = Arc::new(Echo::default());
    let identity = VirtioPci::identity(&*echo);
    let other = VirtioPci::new(echo, identity, &bed.memory, true).unwrap();
    other.restore(state.clone()).unwrap();
    let features = feature::VERSION_1 | feature::RING_PACKED;
    assert_eq!(other.device().events(), ["restore \"echo\"".to_owned(), format!("activate {features:x}")]);
    let id = ring.offer(&[], &[(0, 3)]);
    other.bar_write(MODERN_BAR, NOTIFY + 4, &[1, 0]);
    assert_eq!(ring.used(), Some((id, 3)), "goes on where the other was");

    let mut wrong = state.clone();
    wrong.queues[1].descriptors = u64::MAX - 3;
    assert!(other.restore(wrong).is_err());
    let mut wrong = state;
    wrong.queues.pop();
    assert!(other.restore(wrong).is_err());
}
