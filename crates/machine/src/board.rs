//! The board: both buses, as vCPUs reach them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::bus::{Bus, MmioDevice, PioDevice};
use engine::{IoHandler, VcpuId};

use crate::lifecycle::{Ending, Lifecycle};

/// The port and memory buses. An access that no single device answers is split into bytes, as an 8-bit bus would;
/// bytes that nobody answers read as ones and swallow writes.
pub struct Board {
    /// Port I/O space.
    pub pio: Arc<Bus<dyn PioDevice>>,
    /// Memory space outside RAM.
    pub mmio: Arc<Bus<dyn MmioDevice>>,
    lifecycle: Arc<Lifecycle>,
    strict_ports: bool,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    unclaimed: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Board {
    /// Empty buses. With `strict_ports` (`-e`, `x86.strictio`) an access to a port that nobody answers ends the machine.
    pub fn new(lifecycle: Arc<Lifecycle>, strict_ports: bool) -> Self {
        Board {
            pio: Arc::default(),
            mmio: Arc::default(),
            lifecycle,
            strict_ports,
            counters: Counters::default(),
        }
    }

    /// Takes every device off both buses. Devices hold what they are wired to, and that holds the board: the end of
    /// a machine has to cut the circle.
    pub fn clear(&self) {
        for (base, ..) in self.pio.ranges() {
            self.pio.remove(base);
        }
        for (base, ..) in self.mmio.ranges() {
            self.mmio.remove(base);
        }
    }

    /// Accesses that reached the board, by kind.
    pub fn stats(&self) -> Vec<(String, u64)> {
        let c = &self.counters;
        [
            ("port reads", &c.port_reads),
            ("port writes", &c.port_writes),
            ("mmio reads", &c.mmio_reads),
            ("mmio writes", &c.mmio_writes),
            ("accesses without a device", &c.unclaimed),
        ]
        .map(|(name, value)| (name.to_owned(), value.load(Ordering::Relaxed)))
        .to_vec()
    }

    fn unclaimed_port(&self, vcpu: VcpuId, direction: &str, port: u16, len: usize) {
        count(&self.counters.unclaimed);
        if self.strict_ports {
            self.lifecycle.end(Ending::Failed(format!(
                "strict I/O (-e): vCPU {vcpu} {direction} {len} byte(s) at port {port:#06x}, where no device answers"
            )));
        }
    }
}

impl IoHandler for Board {
    fn port_read(&self, vcpu: VcpuId, port: u16, data: &mut [u8]) {
        count(&self.counters.port_reads);
        if let Some((device, offset)) = self.pio.find(port.into(), data.len() as u64) {
            return device.pio_read(offset as u16, data);
        }
        let mut answered = false;
        for (address, byte) in (u64::from(port)..).zip(data.iter_mut()) {
            *byte = 0xff;
            if let Some((device, offset)) = self.pio.find(address, 1) {
                device.pio_read(offset as u16, std::slice::from_mut(byte));
                answered = true;
            }
        }
        if !answered {
            self.unclaimed_port(vcpu, "reads", port, data.len());
        }
    }

    fn port_write(&self, vcpu: VcpuId, port: u16, data: &[u8]) {
        count(&self.counters.port_writes);
        if let Some((device, offset)) = self.pio.find(port.into(), data.len() as u64) {
            return device.pio_write(offset as u16, data);
        }
        let mut answered = false;
        for (address, byte) in (u64::from(port)..).zip(data) {
            if let Some((device, offset)) = self.pio.find(address, 1) {
                device.pio_write(offset as u16, std::slice::from_ref(byte));
                answered = true;
            }
        }
        if !answered {
            self.unclaimed_port(vcpu, "writes", port, data.len());
        }
    }

    fn mmio_read(&self, _vcpu: VcpuId, gpa: u64, data: &mut [u8]) {
        count(&self.counters.mmio_reads);
        if let Some((device, offset)) = self.mmio.find(gpa, data.len() as u64) {
            return device.mmio_read(offset, data);
        }
        let mut answered = false;
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = 0xff;
            if let Some((device, offset)) = self.mmio.find(gpa.wrapping_add(index as u64), 1) {
                device.mmio_read(offset, std::slice::from_mut(byte));
                answered = true;
            }
        }
        if !answered {
            count(&self.counters.unclaimed);
        }
    }

    fn mmio_write(&self, _vcpu: VcpuId, gpa: u64, data: &[u8]) {
        count(&self.counters.mmio_writes);
        if let Some((device, offset)) = self.mmio.find(gpa, data.len() as u64) {
            return device.mmio_write(offset, data);
        }
        let mut answered = false;
        for (index, byte) in data.iter().enumerate() {
            if let Some((device, offset)) = self.mmio.find(gpa.wrapping_add(index as u64), 1) {
                device.mmio_write(offset, std::slice::from_ref(byte));
                answered = true;
            }
        }
        if !answered {
            count(&self.counters.unclaimed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Answers each byte with its offset, and records writes.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl PioDevice for Recorder {
        fn pio_read(&self, offset: u16, data: &mut [u8]) {
            data.iter_mut().zip(offset as u8..).for_each(|(d, o)| *d = o);
        }
        fn pio_write(&self, offset: u16, data: &[u8]) {
            self.0.lock().unwrap().push((offset.into(), data.to_vec()));
        }
    }

    impl MmioDevice for Recorder {
        fn mmio_read(&self, offset: u64, data: &mut [u8]) {
            data.iter_mut().zip(offset as u8..).for_each(|(d, o)| *d = o);
        }
        fn mmio_write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn board(strict: bool) -> (Board, Arc<Recorder>) {
        let board = Board::new(Lifecycle::new(), strict);
        let device = Arc::new(Recorder::default());
        board.pio.insert(0x60, 2, "pio", device.clone()).unwrap();
        board.pio.insert(0xffff, 1, "top", device.clone()).unwrap();
        board.mmio.insert(0x1000, 0x10, "mmio", device.clone()).unwrap();
        (board, device)
    }

    #[test]
    fn accesses_split_where_a_device_ends() {
        let (board, device) = board(false);
        let mut data = [0; 4];
        board.port_read(0, 0x60, &mut data);
        assert_eq!(data, [0, 1, 0xff, 0xff]);
        board.port_write(0, 0x61, &[7, 8]);
        board.port_read(0, 0xffff, &mut data[..2]);
        assert_eq!(data[..2], [0, 0xff], "ports end at ffffh");
        board.mmio_read(0, 0x100e, &mut data);
        assert_eq!(data, [14, 15, 0xff, 0xff]);
        board.mmio_write(0, 0xfff, &[1, 2]);
        board.mmio_read(0, u64::MAX, &mut data[..2]);
        assert_eq!(data[..2], [0xff, 0xff], "an address that wraps is no panic");
        assert_eq!(*device.0.lock().unwrap(), [(1, vec![7]), (0, vec![2])]);
    }

    #[test]
    fn strict_ports_end_the_machine_with_the_port_named() {
        let (lenient, _) = board(false);
        lenient.port_read(0, 0x1234, &mut [0]);
        assert_eq!(lenient.lifecycle.now(), control::MachineState::Starting);
        let (strict, _) = board(true);
        strict.port_read(0, 0x61, &mut [0; 2]);
        assert_eq!(strict.lifecycle.now(), control::MachineState::Starting, "half answered is answered");
        strict.port_write(1, 0x1234, &[0]);
        let Ending::Failed(why) = strict.lifecycle.wait_end() else { panic!() };
        assert!(why.contains("vCPU 1 writes") && why.contains("0x1234"), "{why}");
    }
}
