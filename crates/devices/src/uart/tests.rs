use proptest::prelude::*;

use super::*;
use crate::testing::{Line, Sink};

struct Bench {
    uart: Uart,
    irq: Arc<Line>,
    sink: Arc<Sink>,
}

impl Bench {
    fn new() -> Self {
        let (irq, sink) = (Line::new(), Sink::new());
        Bench { uart: Uart::new(irq.clone(), sink.clone()), irq, sink }
    }

    fn get(&self, register: u16) -> u8 {
        let mut byte = [0];
        self.uart.pio_read(register, &mut byte);
        byte[0]
    }

    fn put(&self, register: u16, value: u8) {
        self.uart.pio_write(register, &[value]);
    }

    /// As a driver opens the port: FIFOs with a trigger level of 8, interrupts routed.
    fn open(&self, enable: u8) {
        self.put(bits::FCR, fcr::ENABLE | fcr::CLEAR_RECEIVE | fcr::CLEAR_TRANSMIT | 2 << fcr::TRIGGER_SHIFT);
        self.put(bits::MCR, mcr::DTR | mcr::RTS | mcr::OUT2);
        self.put(bits::IER, enable);
    }
}

#[test]
fn transmits_at_once_and_in_order() {
    let bench = Bench::new();
    for byte in b"hello" {
        assert_eq!(bench.get(bits::LSR), lsr::TRANSMIT_HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY);
        bench.put(bits::DATA, *byte);
    }
    assert_eq!(bench.sink.take(), b"hello");
}

#[test]
fn divisor_latch_hides_data_and_interrupt_enable() {
    let bench = Bench::new();
    bench.put(bits::IER, 0xff);
    bench.put(bits::LCR, lcr::DLAB | 3);
    bench.put(bits::DATA, 0x34);
    bench.put(bits::IER, 0x12);
    assert_eq!((bench.get(bits::DATA), bench.get(bits::IER)), (0x34, 0x12));
    bench.put(bits::LCR, 3);
    assert_eq!(bench.get(bits::IER), ier::MASK, "upper bits do not exist: Linux looks for them");
    assert!(bench.sink.take().is_empty(), "a divisor is not output");
    bench.put(bits::SCR, 0x5a);
    assert_eq!(bench.get(bits::SCR), 0x5a);
}

#[test]
fn linux_finds_a_16550a() {
    let bench = Bench::new();
    assert_eq!(bench.get(bits::IIR) & iir::FIFOS_ENABLED, 0);
    bench.put(bits::FCR, fcr::ENABLE);
    assert_eq!(bench.get(bits::IIR) & iir::FIFOS_ENABLED, iir::FIFOS_ENABLED);
    // Loopback test: OUT2 and RTS come back as DCD and CTS.
    bench.put(bits::MCR, mcr::LOOPBACK | mcr::OUT2 | mcr::RTS);
    assert_eq!(bench.get(bits::MSR) & 0xf0, msr::DCD | msr::CTS);
    bench.put(bits::DATA, b'x');
    assert_eq!(bench.get(bits::LSR) & lsr::DATA_READY, lsr::DATA_READY);
    assert_eq!(bench.get(bits::DATA), b'x');
    assert!(bench.sink.take().is_empty());
    bench.put(bits::MCR, 0);
    assert_eq!(bench.get(bits::MSR) & 0xf0, CONNECTED);
}

#[test]
fn enabling_the_transmit_interrupt_raises_it_every_time() {
    let bench = Bench::new();
    bench.open(0);
    for _ in 0..2 {
        bench.put(bits::IER, ier::TRANSMIT_EMPTY);
        assert!(bench.irq.level());
        assert_eq!(bench.get(bits::IIR) & 0x0f, iir::TRANSMIT_EMPTY);
        assert!(!bench.irq.level(), "reading IIR takes it away");
        assert_eq!(bench.get(bits::IIR) & 0x0f, iir::NONE);
        bench.put(bits::IER, 0);
    }
}

#[test]
fn every_transmitted_byte_gives_an_edge() {
    let bench = Bench::new();
    bench.open(ier::TRANSMIT_EMPTY);
    let before = bench.irq.edges();
    bench.put(bits::DATA, b'a');
    bench.put(bits::DATA, b'b');
    assert_eq!(bench.irq.edges(), before + 2, "even though IIR was never read");
    assert!(bench.irq.level());
}

#[test]
fn out2_gates_the_interrupt() {
    let bench = Bench::new();
    bench.put(bits::IER, ier::TRANSMIT_EMPTY);
    assert!(!bench.irq.level());
    assert_eq!(bench.get(bits::IIR), iir::TRANSMIT_EMPTY, "pollers see it all the same");
    bench.put(bits::IER, 0);
    bench.put(bits::IER, ier::TRANSMIT_EMPTY);
    bench.put(bits::MCR, mcr::OUT2);
    assert!(bench.irq.level());
}

#[test]
fn receives_with_back_pressure() {
    let bench = Bench::new();
    bench.open(ier::RECEIVED_DATA);
    let input: Vec<u8> = (0..40).collect();
    assert_eq!(bench.uart.receive(&input), FIFO_BYTES);
    assert_eq!(bench.uart.receive(&input[16..]), 0);
    assert_eq!(bench.sink.ready.load(std::sync::atomic::Ordering::SeqCst), 0);
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::RECEIVED_DATA);
    for expected in 0..16 {
        assert!(bench.irq.level());
        assert_eq!(bench.get(bits::DATA), expected);
    }
    assert!(!bench.irq.level());
    assert_eq!(bench.sink.ready.load(std::sync::atomic::Ordering::SeqCst), 1, "told once that there is room");
    assert_eq!(bench.get(bits::LSR) & (lsr::DATA_READY | lsr::OVERRUN), 0, "nothing was lost");
}

#[test]
fn bytes_below_the_trigger_time_out() {
    let bench = Bench::new();
    bench.open(ier::RECEIVED_DATA);
    bench.uart.receive(b"1234567");
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::CHARACTER_TIMEOUT);
    bench.uart.receive(b"8");
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::RECEIVED_DATA);
}

#[test]
fn without_fifos_one_byte_is_held() {
    let bench = Bench::new();
    assert_eq!(bench.uart.receive(b"ab"), 1);
    assert_eq!(bench.get(bits::DATA), b'a');
    assert_eq!(bench.uart.receive(b"b"), 1);
    bench.put(bits::FCR, fcr::ENABLE);
    assert_eq!(bench.get(bits::LSR) & lsr::DATA_READY, 0, "changing modes empties the receiver");
}

#[test]
fn overrun_has_the_highest_priority() {
    let bench = Bench::new();
    bench.open(ier::MASK);
    bench.put(bits::MCR, mcr::LOOPBACK);
    for byte in 0..17 {
        bench.put(bits::DATA, byte);
    }
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::LINE_STATUS);
    assert_ne!(bench.get(bits::LSR) & lsr::OVERRUN, 0);
    assert_eq!(bench.get(bits::LSR) & lsr::OVERRUN, 0, "reading clears it");
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::RECEIVED_DATA);
    for expected in 0..16 {
        assert_eq!(bench.get(bits::DATA), expected, "with FIFOs the newest byte is the lost one");
    }
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::TRANSMIT_EMPTY);
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::MODEM_STATUS);
    bench.get(bits::MSR);
    assert_eq!(bench.get(bits::IIR) & 0x0f, iir::NONE);
}

#[test]
fn word_accesses_are_split() {
    let bench = Bench::new();
    bench.put(bits::SCR, 0x77);
    let mut word = [0; 2];
    bench.uart.pio_read(bits::MSR, &mut word);
    assert_eq!(word, [CONNECTED, 0x77]);
}

#[test]
fn impossible_state_is_refused() {
    let bench = Bench::new();
    let state = UartState { received: (0..16).collect(), ..UartState::default() };
    assert!(matches!(bench.uart.restore(state), Err(SnapshotError::Invalid(_))));
}

proptest! {
    #[test]
    fn any_use_survives_saving(accesses in proptest::collection::vec((0u16..9, any::<u8>(), 0u8..3), 0..200)) {
        let bench = Bench::new();
        for (register, value, action) in accesses {
            match action {
                0 => { bench.get(register); }
                1 => bench.put(register, value),
                _ => { bench.uart.receive(&[value; 5]); }
            }
        }
        let copy = Bench::new();
        let saved = serde_json::to_string(&bench.uart.save()).unwrap();
        copy.uart.restore(serde_json::from_str(&saved).unwrap()).unwrap();
        prop_assert_eq!(bench.irq.level(), copy.irq.level());
        for register in [bits::LSR, bits::MSR, bits::IIR, bits::IER, bits::LCR, bits::MCR, bits::SCR]
            .into_iter().chain([bits::DATA; 17]) {
            prop_assert_eq!(bench.get(register), copy.get(register));
        }
    }
}
