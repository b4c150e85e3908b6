use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::bits::{command, mechanism1, status};
use super::config::{ConfigError, ROM_BAR};
use super::*;
use crate::bus::{Bus, MmioBus, MmioDevice, PioBus, PioDevice};
use crate::host::IrqLine;
use crate::irq::SharedLine;
use crate::snapshot::{Persist, Snapshot};
use crate::testing::{Line, Messages};

const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x1234,
    device: 0x5678,
    revision: 1,
    class: (0xff, 0, 0),
    subsystem_vendor: 0xaaaa,
    subsystem: 0xbbbb,
};

/// A function with one BAR of each kind that remembers what was done to it.
struct Probe {
    function: PciFunction,
    events: Mutex<Vec<String>>,
}

impl Probe {
    fn new() -> Arc<Self> {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(BarSpec { index: 0, kind: BarKind::Io, size: 0x20 }).unwrap();
        config
            .add_bar(BarSpec { index: 1, kind: BarKind::Memory32 { prefetchable: false }, size: 0x1000 })
            .unwrap();
        config
            .add_bar(BarSpec { index: 2, kind: BarKind::Memory64 { prefetchable: true }, size: 1 << 30 })
            .unwrap();
        config.add_bar(BarSpec { index: ROM_BAR, kind: BarKind::Rom, size: 0x800 }).unwrap();
        config.add_capability(bits::capability::VENDOR, &[1, 2, 3], &[0, 0xf0]).unwrap();
        config.add_capability(bits::capability::VENDOR, &[9], &[]).unwrap();
        Arc::new(Probe { function: PciFunction::new(config, Some(IntxPin::A)), events: Mutex::default() })
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
}

impl PciDevice for Probe {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        self.events.lock().unwrap().push(format!("read {bar}+{offset:#x}"));
        data.fill(bar as u8);
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        self.events.lock().unwrap().push(format!("write {bar}+{offset:#x} {data:x?}"));
    }

    fn bar_mapped(&self, bar: usize, base: Option<u64>) {
        self.events.lock().unwrap().push(format!("bar {bar} at {base:x?}"));
    }
}

struct Board {
    root: Arc<PciRoot>,
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    apic: Vec<Arc<Line>>,
    resets: Arc<Resets>,
}

#[derive(Default)]
struct Resets(Mutex<Vec<u8>>);

impl PioDevice for Resets {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0x42);
    }

    fn pio_write(&self, _offset: u16, data: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(data);
    }
}

fn at(slot: u8, function: u8) -> PciAddress {
    PciAddress::new(0, slot, function).unwrap()
}

impl Board {
    fn new() -> Self {
        let (pio, mmio): (Arc<PioBus>, Arc<MmioBus>) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let apic: Vec<_> = (0..pirq::PIRQS).map(|_| Line::new()).collect();
        let apic_lines: Vec<Arc<dyn IrqLine>> = apic.iter().map(|l| l.clone() as _).collect();
        let isa: Vec<_> = (0..16).map(|_| SharedLine::new(Line::new())).collect();
        let router = Arc::new(PirqRouter::new(&apic_lines, &isa));
        let root = Arc::new(PciRoot::new(pio.clone(), mmio.clone(), router, Messages::new()));
        let resets = Arc::new(Resets::default());
        root.attach(resets.clone()).unwrap();
        Board { root, pio, mmio, apic, resets }
    }

    fn out(&self, port: u16, data: &[u8]) {
        let (device, offset) = self.pio.find(u64::from(port), data.len() as u64).expect("a port");
        device.pio_write(offset as u16, data);
    }

    fn input<const N: usize>(&self, port: u16) -> [u8; N] {
        let (device, offset) = self.pio.find(u64::from(port), N as u64).expect("a port");
        let mut data = [0; N];
        device.pio_read(offset as u16, &mut data);
        data
    }

    fn get(&self, address: PciAddress, offset: u16) -> u32 {
        let packed = u32::from(address.slot) << 11 | u32::from(address.function) << 8;
        self.out(mechanism1::BASE, &(mechanism1::ENABLE | packed | u32::from(offset)).to_le_bytes());
        u32::from_le_bytes(self.input(mechanism1::BASE + mechanism1::DATA))
    }

    fn put(&self, address: PciAddress, offset: u16, value: u32) {
        self.get(address, offset);
        self.out(mechanism1::BASE + mechanism1::DATA, &value.to_le_bytes());
    }
}

#[test]
fn both_mechanisms_see_the_same_space() {
    let board = Board::new();
    board.root.insert(at(3, 0), Probe::new()).unwrap();
    assert_eq!(board.get(at(3, 0), 0), 0x5678_1234);
    let mut id = [0; 4];
    board.root.mmio_read(3 << 15, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x5678_1234);
    // Word and byte accesses to CONFIG_DATA pick their bytes.
    board.get(at(3, 0), 0);
    assert_eq!(board.input::<2>(0xcfe), 0x5678u16.to_le_bytes());
    assert_eq!(board.input::<1>(0xcfd), [0x12]);
    assert_eq!(board.input::<2>(0xcfd), [0xff; 2], "a misaligned access finds nothing");
    let mut extended = [0xee; 4];
    board.root.mmio_read(3 << 15 | 0x100, &mut extended);
    assert_eq!(extended, [0; 4], "no extended capability");
    let mut quad = [0; 8];
    board.root.mmio_read(3 << 15 | 0x28, &mut quad);
    assert_eq!(u64::from_le_bytes(quad), 0xbbbb_aaaa_0000_0000);
}

#[test]
fn absent_functions_read_as_ones() {
    let board = Board::new();
    board.root.insert(at(3, 0), Probe::new()).unwrap();
    assert_eq!(board.get(at(4, 0), 0), u32::MAX);
    assert_eq!(board.get(at(3, 1), 0), u32::MAX);
    board.put(at(4, 0), 4, u32::MAX);
    let mut other_bus = [0; 4];
    board.root.mmio_read(1 << 20 | 3 << 15, &mut other_bus);
    assert_eq!(other_bus, [0xff; 4]);
    board.out(mechanism1::BASE, &(3u32 << 11).to_le_bytes());
    assert_eq!(board.input::<4>(0xcfc), [0xff; 4], "mechanism #1 disabled");
}

#[test]
fn the_reset_register_lies_inside_config_address() {
    let board = Board::new();
    board.out(mechanism1::BASE, &0x8000_1234u32.to_le_bytes());
    board.out(0xcf9, &[6]);
    assert_eq!(*board.resets.0.lock().unwrap(), [6]);
    assert_eq!(board.input::<1>(0xcf9), [0x42]);
    assert_eq!(u32::from_le_bytes(board.input(0xcf8)), 0x8000_1234, "the byte write did not touch it");
    assert_eq!(board.input::<2>(0xcf8), [0xff; 2]);
    board.out(mechanism1::BASE, &[0xff; 4]);
    assert_eq!(u32::from_le_bytes(board.input(0xcf8)), 0x80ff_fffc, "reserved bits are zero");
}

#[test]
fn several_functions_show_in_the_header_type() {
    let board = Board::new();
    board.root.insert(at(3, 0), Probe::new()).unwrap();
    assert_eq!(board.get(at(3, 0), 0x0c) >> 16 & 0xff, 0);
    board.root.insert(at(3, 5), Probe::new()).unwrap();
    assert_eq!(board.get(at(3, 0), 0x0c) >> 16 & 0xff, 0x80);
    assert_eq!(board.get(at(3, 5), 0x0c) >> 16 & 0xff, 0x80);
    assert_eq!(board.input::<1>(0xcfe), [0x80], "as a byte too");
    assert_eq!(board.root.insert(at(3, 5), Probe::new()), Err(PciError::Occupied(at(3, 5))));
    assert!(board.root.remove(at(3, 5)).is_some());
    assert_eq!(board.get(at(3, 0), 0x0c) >> 16 & 0xff, 0);
}

#[test]
fn bars_can_be_sized() {
    let board = Board::new();
    board.root.insert(at(3, 0), Probe::new()).unwrap();
    let size = |offset| {
        board.put(at(3, 0), offset, u32::MAX);
        board.get(at(3, 0), offset)
    };
    assert_eq!(size(0x10), 0xffff_ffe1);
    assert_eq!(size(0x14), 0xffff_f000);
    assert_eq!((size(0x18), size(0x1c)), (0xc000_000c, 0xffff_ffff));
    assert_eq!(size(0x20), 0, "no such BAR");
    assert_eq!(size(0x30), 0xffff_f801);
}

#[test]
fn bars_move_with_their_registers() {
    let board = Board::new();
    let probe = Probe::new();
    board.root.insert(at(3, 0), probe.clone()).unwrap();
    board.put(at(3, 0), 0x10, 0x3000);
    board.put(at(3, 0), 0x14, 0xd000_0000);
    assert!(board.pio.find(0x3000, 1).is_none(), "not enabled yet");
    board.put(at(3, 0), 4, u32::from(command::IO_SPACE | command::MEMORY_SPACE));
    assert_eq!(probe.take(), ["bar 0 at Some(3000)", "bar 1 at Some(d0000000)"]);
    assert_eq!(board.input::<1>(0x3004), [0]);
    let (window, offset) = board.mmio.find(0xd000_0ff8, 8).unwrap();
    window.mmio_write(offset, &[7]);
    assert_eq!(probe.take(), ["read 0+0x4", "write 1+0xff8 [7]"]);

    board.put(at(3, 0), 0x14, 0xd100_0000);
    assert_eq!(probe.take(), ["bar 1 at None", "bar 1 at Some(d1000000)"]);
    assert!(board.mmio.find(0xd000_0000, 1).is_none());
    board.put(at(3, 0), 0x18, 0);
    board.put(at(3, 0), 0x1c, 0x10);
    assert!(board.mmio.find(0x10_0000_0000, 8).is_some());
    board.put(at(3, 0), 4, 0);
    assert!(board.pio.find(0x3000, 1).is_none());
    assert!(board.mmio.find(0x10_0000_0000, 8).is_none());
}

#[test]
fn overlapping_bars_do_not_take_each_other_away() {
    let board = Board::new();
    let (first, second) = (Probe::new(), Probe::new());
    board.root.insert(at(3, 0), first.clone()).unwrap();
    board.root.insert(at(4, 0), second.clone()).unwrap();
    for slot in [3, 4] {
        board.put(at(slot, 0), 0x14, 0xd000_0000);
        board.put(at(slot, 0), 4, u32::from(command::MEMORY_SPACE));
    }
    assert_eq!(first.take(), ["bar 1 at Some(d0000000)"]);
    assert!(second.take().is_empty());
    board.put(at(3, 0), 0x14, 0xd800_0000);
    assert_eq!(second.take(), ["bar 1 at Some(d0000000)"], "takes its place as soon as it is free");
    // ECAM stays reachable whatever a guest does.
    board.put(at(3, 0), 0x14, ECAM_BASE as u32);
    let mut id = [0; 4];
    let (window, offset) = board.mmio.find(ECAM_BASE + (4 << 15), 4).unwrap();
    window.mmio_read(offset, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x5678_1234);
}

#[test]
fn resources_are_assigned_without_overlap() {
    let board = Board::new();
    for slot in 1..4 {
        board.root.insert(at(slot, 0), Probe::new()).unwrap();
    }
    let windows =
        ResourceWindows { io: IO_WINDOW, memory: MEMORY_WINDOW, memory64: 0x10_0000_0000..0x20_0000_0000 };
    board.root.assign_resources(&windows).unwrap();
    assert_eq!(board.pio.ranges().len(), 1 + 3);
    assert_eq!(board.mmio.ranges().len(), 1 + 6);
    for (base, len, name) in board.mmio.ranges() {
        assert_eq!(base % len, 0, "{name}");
    }
    let small = ResourceWindows { memory: 0xc000_0000..0xc000_1000, ..windows };
    board.root.insert(at(9, 0), Probe::new()).unwrap();
    board.root.insert(at(10, 0), Probe::new()).unwrap();
    let error = board.root.assign_resources(&small).unwrap_err();
    assert!(matches!(error, PciError::NoRoom { index: 1, .. }), "{error}");
}

#[test]
fn interrupts_follow_disable_and_show_in_status() {
    let board = Board::new();
    let probe = Probe::new();
    board.root.insert(at(3, 0), probe.clone()).unwrap();
    let route = board.root.intx_routes()[0];
    assert_eq!((route.pirq, route.gsi, route.irq), (3, 19, Some(5)));
    assert_eq!(board.get(at(3, 0), 0x3c) & 0xffff, 0x0105);
    probe.function.set_intx(true);
    assert!(board.apic[3].level());
    assert_ne!(board.get(at(3, 0), 4) >> 16 & u32::from(status::INTERRUPT), 0);
    board.put(at(3, 0), 4, u32::from(command::INTX_DISABLE));
    assert!(!board.apic[3].level());
    assert_ne!(board.get(at(3, 0), 4) >> 16 & u32::from(status::INTERRUPT), 0);
    board.put(at(3, 0), 4, 0);
    assert!(board.apic[3].level());
    drop(board.root.remove(at(3, 0)));
    drop(probe);
    assert!(!board.apic[3].level(), "an unplugged device lets go");
}

#[test]
fn capabilities_form_a_list() {
    let board = Board::new();
    board.root.insert(at(3, 0), Probe::new()).unwrap();
    assert_ne!(board.get(at(3, 0), 4) >> 16 & u32::from(status::CAPABILITIES), 0);
    let first = board.get(at(3, 0), 0x34) as u16 & 0xff;
    assert_eq!(board.get(at(3, 0), first), 0x0201_4809);
    assert_eq!(board.get(at(3, 0), 0x48), 0x0009_0009);
    board.put(at(3, 0), first, u32::MAX);
    assert_eq!(board.get(at(3, 0), first), 0xf201_4809, "only the writable bits changed");
    let mut config = ConfigSpace::new(IDENTITY);
    config.add_capability(9, &[0; 180], &[]).unwrap();
    assert_eq!(config.add_capability(9, &[0; 20], &[]), Err(ConfigError::CapabilitySpace { id: 9, len: 22 }));
}

#[test]
fn impossible_bars_are_refused() {
    let mut config = ConfigSpace::new(IDENTITY);
    let wide = BarKind::Memory64 { prefetchable: false };
    assert_eq!(
        config.add_bar(BarSpec { index: 5, kind: wide, size: 4096 }),
        Err(ConfigError::BarIndex(5)),
        "no register for the high half"
    );
    config.add_bar(BarSpec { index: 2, kind: wide, size: 4096 }).unwrap();
    for index in [1, 2, 3] {
        let kind = if index == 3 { BarKind::Io } else { wide };
        assert_eq!(config.add_bar(BarSpec { index, kind, size: 4096 }), Err(ConfigError::BarIndex(index)));
    }
    assert!(matches!(
        config.add_bar(BarSpec { index: 0, kind: BarKind::Io, size: 24 }),
        Err(ConfigError::BarSize { .. })
    ));
}

#[test]
fn bridges_have_bhyves_identities() {
    let board = Board::new();
    let host = HostBridge::new(HostBridge::identity(hostbridge::DEFAULT_IDS)).unwrap();
    board.root.insert(at(0, 0), Arc::new(host)).unwrap();
    let lpc = Arc::new(LpcBridge::new(lpc::DEFAULT_IDENTITY, board.root.router().clone()));
    board.root.insert(at(31, 0), lpc.clone()).unwrap();
    assert_eq!((board.get(at(0, 0), 0), board.get(at(0, 0), 8) >> 8), (0x1275_1275, 0x06_0000));
    assert_eq!((board.get(at(31, 0), 0), board.get(at(31, 0), 8) >> 8), (0x7000_8086, 0x06_0100));
    assert_eq!(board.get(at(0, 0), 0x40) & 0xff, u32::from(bits::capability::EXPRESS));

    assert_eq!(board.get(at(31, 0), 0x60), 0x8080_8080);
    board.put(at(31, 0), 0x68, 0xffff_000b);
    assert_eq!(board.get(at(31, 0), 0x68), 0x8f8f_000b);
    assert_eq!(board.root.router().irq(4), Some(11));

    let saved = lpc.snapshot().unwrap();
    let other = Board::new();
    let copy = LpcBridge::new(lpc::DEFAULT_IDENTITY, other.root.router().clone());
    copy.load_snapshot(&saved).unwrap();
    assert_eq!(other.root.router().irq(4), Some(11));
    let mut future = saved.clone();
    future.version += 1;
    assert!(copy.load_snapshot(&future).is_err());
    let wrong =
        LpcBridge::new(PciIdentity { device: 1, ..lpc::DEFAULT_IDENTITY }, other.root.router().clone());
    assert!(wrong.load_snapshot(&saved).is_err(), "another device's state");
}

proptest! {
    #[test]
    fn any_access_survives_saving(accesses in proptest::collection::vec(
        (0u8..3, 0u16..0x110, any::<u32>(), prop_oneof![Just(1usize), Just(2), Just(4), Just(3)]), 0..100)) {
        let (board, copy) = (Board::new(), Board::new());
        let (probe, twin) = (Probe::new(), Probe::new());
        board.root.insert(at(1, 0), probe.clone()).unwrap();
        copy.root.insert(at(1, 0), twin.clone()).unwrap();
        for (slot, offset, value, len) in accesses {
            let mut data = value.to_le_bytes();
            board.root.config_write(at(slot, 0), offset, &data[..len]);
            board.root.config_read(at(slot, 0), offset, &mut data[..len]);
        }
        twin.function.restore(&probe.function.save(), &[]).unwrap();
        copy.root.restore(board.root.save()).unwrap();
        for offset in (0..256).step_by(4) {
            prop_assert_eq!(board.get(at(1, 0), offset), copy.get(at(1, 0), offset));
        }
        prop_assert_eq!(board.mmio.ranges(), copy.mmio.ranges());
        prop_assert_eq!(board.pio.ranges(), copy.pio.ranges());
    }
}
