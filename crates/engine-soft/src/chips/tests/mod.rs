//! The chips together, as processors and devices see them.

mod legacy;
mod pokes;
mod registers;
mod routing;
mod state;
mod threads;
mod ticks;
mod timer;

use std::sync::atomic::AtomicU64;

use engine::{IOAPIC_BASE, LapicState};
use x86::msr;
use x86::msr::apic_base;

use super::lapic::bits::register;
use super::*;

/// A clock that stands where it is put; the TSC runs at 3 GHz.
#[derive(Default)]
struct TestTime {
    now_ns: AtomicU64,
}

const TSC_PER_NS: u64 = 3;

impl TestTime {
    fn set(&self, now_ns: u64) {
        self.now_ns.store(now_ns, Ordering::SeqCst);
    }
}

impl Time for TestTime {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::SeqCst)
    }

    fn tsc(&self, vcpu: VcpuId) -> u64 {
        self.now_ns() * TSC_PER_NS + u64::from(vcpu)
    }

    fn tsc_hz(&self) -> u64 {
        TSC_PER_NS * 1_000_000_000
    }
}

/// Notes who was told, and looks at the locks: none may be held.
struct Recorder {
    told: Mutex<Vec<VcpuId>>,
    chips: std::sync::OnceLock<std::sync::Weak<Chips>>,
}

impl Attention for Recorder {
    fn attention(&self, vcpu: VcpuId) {
        lock(&self.told).push(vcpu);
        if let Some(chips) = self.chips.get().and_then(std::sync::Weak::upgrade) {
            assert!(chips.pit.try_lock().is_ok(), "called with the 8254 locked");
            assert!(chips.pic.try_lock().is_ok(), "called with the 8259s locked");
            assert!(chips.ioapic.try_lock().is_ok(), "called with the IOAPIC locked");
            assert!(
                chips.vcpus.iter().all(|cell| cell.lapic.try_lock().is_ok()),
                "called with a LAPIC locked"
            );
        }
    }
}

struct Board {
    chips: Arc<Chips>,
    time: Arc<TestTime>,
    recorder: Arc<Recorder>,
}

const X2APIC: u32 = msr::X2APIC_BASE;

impl Board {
    fn with(config: ChipsConfig) -> Self {
        let time = Arc::new(TestTime::default());
        let recorder = Arc::new(Recorder { told: Mutex::default(), chips: std::sync::OnceLock::new() });
        let chips = Arc::new(Chips::new(config, time.clone(), recorder.clone()));
        recorder.chips.set(Arc::downgrade(&chips)).unwrap();
        Board { chips, time, recorder }
    }

    /// LAPICs enabled in xAPIC mode, with flat logical IDs.
    fn new(vcpus: u32) -> Self {
        let board = Board::with(ChipsConfig::new(vcpus));
        for vcpu in 0..vcpus {
            board.lapic(vcpu, register::SVR, 0x1ff);
            board.lapic(vcpu, register::LDR, 1 << (24 + vcpu % 8));
        }
        board
    }

    /// LAPICs enabled in x2APIC mode.
    fn x2apic(vcpus: u32) -> Self {
        let board = Board::with(ChipsConfig::new(vcpus));
        for vcpu in 0..vcpus {
            let base = board.chips.apic_base(vcpu) | apic_base::EXTD;
            board.chips.write_msr(vcpu, msr::APIC_BASE, base).unwrap();
            board.chips.write_msr(vcpu, X2APIC + register::SVR, 0x1ff).unwrap();
        }
        board
    }

    fn lapic(&self, vcpu: VcpuId, number: u32, value: u32) {
        let gpa = 0xfee0_0000 + u64::from(number) * 16;
        assert!(self.chips.mmio_write(vcpu, gpa, &value.to_le_bytes()));
    }

    fn lapic_read(&self, vcpu: VcpuId, number: u32) -> u32 {
        let mut data = [0; 4];
        assert!(self.chips.mmio_read(vcpu, 0xfee0_0000 + u64::from(number) * 16, &mut data));
        u32::from_le_bytes(data)
    }

    fn eoi(&self, vcpu: VcpuId) {
        self.lapic(vcpu, register::EOI, 0);
    }

    fn ipi(&self, vcpu: VcpuId, destination: u8, low: u32) {
        self.lapic(vcpu, register::ICR_HIGH, u32::from(destination) << 24);
        self.lapic(vcpu, register::ICR_LOW, low);
    }

    fn redirect(&self, pin: u8, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            let select = u32::from(0x10 + 2 * pin + half);
            assert!(self.chips.mmio_write(0, IOAPIC_BASE, &select.to_le_bytes()));
            assert!(self.chips.mmio_write(0, IOAPIC_BASE + 0x10, &value.to_le_bytes()));
        }
    }

    fn out(&self, port: u16, value: u8) {
        self.chips.port_write(port, &[value]);
    }

    fn input(&self, port: u16) -> u8 {
        let mut data = [0];
        self.chips.port_read(port, &mut data);
        data[0]
    }

    /// The 8259 pair as Linux's `init_8259A` sets it up: vectors 30h, all masked, then `mask` for the master.
    fn linux_pic(&self, mask: u8) {
        self.out(0x21, 0xff);
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x01)] {
            self.out(port, value);
        }
        for (port, value) in [(0xa0, 0x11), (0xa1, 0x38), (0xa1, 0x02), (0xa1, 0x01)] {
            self.out(port, value);
        }
        self.out(0xa1, 0xff);
        self.out(0x21, mask);
    }

    /// LINT0 as the virtual wire that firmware leaves.
    fn virtual_wire(&self, vcpu: VcpuId) {
        self.lapic(vcpu, register::LVT_LINT0, 0x700);
    }

    fn told(&self) -> Vec<VcpuId> {
        std::mem::take(&mut lock(&self.recorder.told))
    }

    fn advance(&self, now_ns: u64) -> Option<u64> {
        self.time.set(now_ns);
        self.chips.run_timers(now_ns)
    }
}
