//! The alarm thread, and several threads at once.

use std::sync::mpsc;

use super::*;

/// Sends each vCPU number on.
struct Channel(Mutex<mpsc::Sender<VcpuId>>);

impl Attention for Channel {
    fn attention(&self, vcpu: VcpuId) {
        // The test may have seen enough and be gone.
        let _ = lock(&self.0).send(vcpu);
    }
}

/// The host's monotonic clock.
struct HostTime(std::time::Instant);

impl Time for HostTime {
    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }

    fn tsc(&self, _: VcpuId) -> u64 {
        self.now_ns()
    }

    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
}

#[test]
fn the_alarm_thread_rings() {
    let (sender, told) = mpsc::channel();
    let time = Arc::new(HostTime(std::time::Instant::now()));
    let attention = Arc::new(Channel(Mutex::new(sender)));
    let chips = Arc::new(Chips::new(ChipsConfig::new(2), time.clone(), attention));
    let alarm = timers::AlarmThread::start(chips.clone()).unwrap();
    let lapic = |vcpu, number: u32, value: u32| {
        chips.mmio_write(vcpu, 0xfee0_0000 + u64::from(number) * 16, &value.to_le_bytes());
    };
    for vcpu in 0..2 {
        lapic(vcpu, register::SVR, 0x1ff);
        lapic(vcpu, register::LVT_TIMER, 0x4_0040 + vcpu);
    }
    // A far deadline first, then a near one on the other vCPU, which has to move the alarm forward.
    chips.write_msr(0, msr::TSC_DEADLINE, time.now_ns() + 3_600_000_000_000).unwrap();
    chips.write_msr(1, msr::TSC_DEADLINE, time.now_ns() + 1_000_000).unwrap();
    assert_eq!(told.recv(), Ok(1));
    assert_eq!(chips.acknowledge(1), Some(0x41));
    lapic(1, register::EOI, 0);
    chips.write_msr(0, msr::TSC_DEADLINE, time.now_ns() + 1_000_000).unwrap();
    assert_eq!(told.recv(), Ok(0));
    assert_eq!(chips.acknowledge(0), Some(0x40));
    lapic(0, register::EOI, 0);
    // Paused, nothing rings; afterwards it does.
    chips.pause_timers(true);
    chips.write_msr(0, msr::TSC_DEADLINE, time.now_ns() + 100_000).unwrap();
    assert!(told.recv_timeout(std::time::Duration::from_millis(20)).is_err());
    chips.pause_timers(false);
    assert_eq!(told.recv(), Ok(0));
    assert_eq!(chips.acknowledge(0), Some(0x40));
    lapic(0, register::EOI, 0);
    // Stopped and started again.
    drop(alarm);
    chips.write_msr(1, msr::TSC_DEADLINE, time.now_ns() + 1000).unwrap();
    let alarm = timers::AlarmThread::start(chips.clone()).unwrap();
    assert_eq!(told.recv(), Ok(1));
    drop(alarm);
}

#[test]
fn wakeups_are_not_lost_between_threads() {
    // Two vCPUs play ping-pong with IPIs, sleeping in between like a halted vCPU: announce, look, sleep.
    struct Sleepers(Vec<(Mutex<bool>, std::sync::Condvar)>);
    impl Attention for Sleepers {
        fn attention(&self, vcpu: VcpuId) {
            let (flag, wake) = &self.0[vcpu as usize];
            *lock(flag) = true;
            wake.notify_one();
        }
    }
    const ROUNDS: u32 = 2000;
    let sleepers = Arc::new(Sleepers((0..2).map(|_| Default::default()).collect()));
    let chips = Arc::new(Chips::new(ChipsConfig::new(2), Arc::new(TestTime::default()), sleepers.clone()));
    for vcpu in 0..2 {
        chips.write_msr(vcpu, msr::APIC_BASE, chips.apic_base(vcpu) | apic_base::EXTD).unwrap();
        chips.write_msr(vcpu, X2APIC + register::SVR, 0x1ff).unwrap();
    }
    let vcpu_thread = |vcpu: u32| {
        let (chips, sleepers) = (chips.clone(), sleepers.clone());
        std::thread::spawn(move || {
            let send = || {
                let icr = u64::from(1 - vcpu) << 32 | 0x41;
                chips.write_msr(vcpu, X2APIC + register::ICR_LOW, icr).unwrap();
            };
            if vcpu == 0 {
                send();
            }
            for round in 0..ROUNDS {
                let (flag, wake) = &sleepers.0[vcpu as usize];
                let mut woken = lock(flag);
                while !chips.has_interrupt(vcpu) {
                    while !*woken {
                        woken = wake.wait(woken).unwrap();
                    }
                    *woken = false;
                }
                drop(woken);
                assert_eq!(chips.acknowledge(vcpu), Some(0x41));
                chips.write_msr(vcpu, X2APIC + register::EOI, 0).unwrap();
                if vcpu == 1 || round + 1 < ROUNDS {
                    send();
                }
            }
        })
    };
    let threads = [vcpu_thread(0), vcpu_thread(1)];
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn level_interrupts_survive_threads_and_locks_do_not_tangle() {
    const ROUNDS: u32 = 1000;
    let (sender, told) = mpsc::channel();
    let attention = Arc::new(Channel(Mutex::new(sender)));
    let time = Arc::new(HostTime(std::time::Instant::now()));
    let chips = Arc::new(Chips::new(ChipsConfig::new(2), time, attention));
    let _alarm = timers::AlarmThread::start(chips.clone()).unwrap();
    let lapic = |chips: &Chips, number: u32, value: u32| {
        chips.mmio_write(1, 0xfee0_0000 + u64::from(number) * 16, &value.to_le_bytes());
    };
    lapic(&chips, register::SVR, 0x1ff);
    // Input 20, level, to vCPU 1.
    for (select, value) in [(0x10 + 2 * 20 + 1, 0x0100_0000u32), (0x10 + 2 * 20, 0x8055)] {
        chips.mmio_write(0, IOAPIC_BASE, &u32::to_le_bytes(select));
        chips.mmio_write(0, IOAPIC_BASE + 0x10, &value.to_le_bytes());
    }
    let (served_sender, served) = mpsc::channel();
    let device = std::thread::spawn({
        let chips = chips.clone();
        move || {
            for _ in 0..ROUNDS {
                chips.set_irq_line(20, true);
                served.recv().unwrap();
            }
        }
    });
    // Everything else that takes locks, in the other directions.
    let noise = std::thread::spawn({
        let chips = chips.clone();
        move || {
            chips.write_msr(0, msr::APIC_BASE, 0xfee0_0100).unwrap();
            for (port, value) in
                [(0x43, 0x34), (0x40, 0x40), (0x40, 0), (0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)]
            {
                chips.port_write(port, &[value]);
            }
            for round in 0..ROUNDS {
                chips.set_irq_line(3, round % 2 == 0);
                chips.acknowledge(0);
                chips.port_write(0x61, &[round as u8]);
                chips.port_read(0x40, &mut [0]);
                chips.chips();
                chips.send_msi(MsiMessage { address: 0xfee0_1000, data: 0x33 });
            }
        }
    });
    let mut rounds = 0;
    while rounds < ROUNDS {
        told.recv().unwrap();
        while let Some(vector) = chips.acknowledge(1) {
            if vector == 0x55 {
                rounds += 1;
                chips.set_irq_line(20, false);
            }
            lapic(&chips, register::EOI, 0);
            if vector == 0x55 {
                served_sender.send(()).unwrap();
            }
        }
    }
    device.join().unwrap();
    noise.join().unwrap();
    while let Some(vector) = chips.acknowledge(1) {
        assert_eq!(vector, 0x33);
        lapic(&chips, register::EOI, 0);
    }
}
