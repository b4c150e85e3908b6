use super::super::bits::{self, ghc, interrupt};
use super::*;
use crate::pci::bits as pci_bits;

#[test]
fn says_what_it_is() {
    let bed = bed();
    let bench = Bench::new(None, &bed.memory);
    let mut ids = [0; 12];
    for (i, part) in ids.chunks_mut(4).enumerate() {
        bench.ahci.config_read(4 * i as u16, part);
    }
    assert_eq!(ids[..4], [0x86, 0x80, 0x21, 0x28]);
    assert_eq!(ids[9..12], [1, 6, 1], "AHCI");
    assert_eq!(bench.get(bits::CAP), 0xc134_9f05, "64 bits, NCQ, 6 ports, 32 slots");
    assert_eq!(bench.get(bits::GHC), ghc::AE);
    assert_eq!(bench.get(bits::PI), 0x3f);
    assert_eq!(bench.get(bits::VS), 0x0001_0301);
    assert_eq!(bench.get(bits::CAP2), 0);
    assert_eq!(bench.get(PORTS + 6 * PORT_STRIDE + port::TFD), 0, "no seventh port");
    let all: Vec<_> = (0..32).map(|_| None).collect();
    let ahci = Ahci::new(Ahci::identity(), all, bed.memory.clone(), bench.clock.clone()).unwrap();
    let mut data = [0; 4];
    ahci.bar_read(5, bits::PI.into(), &mut data);
    assert_eq!(u32::from_le_bytes(data), u32::MAX);
    let spec = ahci.function().with_config(|config| config.bars().next()).unwrap();
    assert_eq!((spec.index, spec.size), (5, 0x2000));
    let many: Vec<_> = (0..33).map(|_| None).collect();
    assert!(matches!(
        Ahci::new(Ahci::identity(), many, bed.memory.clone(), bench.clock.clone()),
        Err(AhciError::Ports(33))
    ));
}

#[test]
fn a_port_without_a_device_is_silent() {
    let bed = bed();
    let bench = Bench::new(None, &bed.memory);
    bench.start();
    assert_eq!(bench.port(port::SSTS), 0);
    assert_eq!((bench.port(port::TFD), bench.port(port::SIG)), (0x7f, u32::MAX));
    bench.set_port(port::SCTL, 1);
    bench.set_port(port::SCTL, 0);
    assert_eq!((bench.port(port::SSTS), bench.port(port::SERR)), (0, 0));
    bench.prepare(0, Frame::new(0xec, 0, 0), &[(DATA, 512)]);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.port(port::CI), 1, "nobody takes it");
    bench.set_port(port::CMD, cmd::FRE | cmd::CLO);
    assert_eq!(bench.port(port::TFD), 0x7f);
}

#[test]
fn the_signature_comes_when_there_is_where_to_put_it() {
    let bed = bed();
    let identity = DiskIdentity::disk("S".into());
    let bench = Bench::new(Some(Drive::Disk(bed.disk.clone(), identity)), &bed.memory);
    assert_eq!(bench.port(port::SSTS), 0x133);
    assert_eq!(bench.port(port::SERR), 1 << 26);
    assert_eq!((bench.port(port::TFD), bench.port(port::SIG)), (0x80, u32::MAX), "busy");
    bench.set_port(port::FB, FRAMES as u32 | 0xff);
    assert_eq!(bench.port(port::FB), FRAMES as u32);
    bench.set_port(port::CMD, cmd::FRE);
    assert_eq!(bench.port(port::CMD), cmd::FRE | cmd::FR | cmd::SUD | cmd::POD);
    assert_eq!((bench.port(port::TFD), bench.port(port::SIG)), (0x0150, 0x0101));
    assert_eq!(bench.frame::<16>(0x40), [0x34, 0, 0x50, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(bench.port(port::IS), interrupt::PCS, "the signature does not interrupt");
    bench.set_port(port::SERR, 1 << 26);
    assert_eq!(bench.port(port::IS), 0);
}

#[test]
fn registers_keep_what_exists_and_take_accesses_of_any_size() {
    let bed = bed();
    let bench = Bench::new(None, &bed.memory);
    let at = u64::from(PORTS);
    bench.ahci.bar_write(5, at, &0x1_2345_6789_abcd_u64.to_le_bytes());
    assert_eq!((bench.port(port::CLB), bench.port(port::CLBU)), (0x6789_a800, 0x1_2345));
    let mut both = [0; 8];
    bench.ahci.bar_read(5, at, &mut both);
    assert_eq!(u64::from_le_bytes(both), 0x1_2345_6789_a800);
    bench.ahci.bar_write(5, at + 2, &[0xaa]);
    assert_eq!(bench.port(port::CLB), 0x67aa_a800);
    let mut byte = [0; 2];
    bench.ahci.bar_read(5, at + 1, &mut byte);
    assert_eq!(byte, [0xa8, 0xaa]);
    // Over the border of two registers.
    bench.ahci.bar_read(5, at + 3, &mut byte);
    assert_eq!(byte, [0x67, 0x45]);
    bench.set_port(port::IE, u32::MAX);
    assert_eq!(bench.port(port::IE), interrupt::ENABLES);
    bench.set_port(port::CI, 1);
    bench.set_port(port::SACT, 1);
    assert_eq!((bench.port(port::CI), bench.port(port::SACT)), (0, 0), "only while ST is set");
    bench.ahci.bar_read(5, 0xffff_ffff_ffff_fffe, &mut both);
    bench.ahci.bar_write(5, u64::MAX, &[1, 2, 3, 4]);
    bench.ahci.bar_read(0, 0, &mut both);
    assert_eq!(both, [0; 8], "no other BAR");
}

#[test]
fn the_line_follows_the_interrupt_status() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    assert!(!bench.line.level());
    bench.prepare(0, Frame::new(0xea, 0, 0), &[]);
    bench.set_port(port::CI, 1);
    assert!(bench.line.level());
    assert_eq!(bench.get(bits::IS), 1);
    assert_eq!(bench.port(port::IS), interrupt::DHRS);
    bench.put(bits::IS, 1);
    assert!(bench.line.level(), "the port has not been acknowledged");
    bench.set_port(port::IS, interrupt::DHRS);
    assert!(bench.line.level(), "the summary stays until it is cleared");
    bench.put(bits::IS, 1);
    assert!(!bench.line.level());
    // Not enabled in the port, not enabled at all, disabled in configuration space.
    bench.set_port(port::IE, 0);
    bench.set_port(port::CI, 1);
    assert_eq!((bench.get(bits::IS), bench.port(port::IS)), (0, interrupt::DHRS));
    bench.put(bits::GHC, 0);
    bench.set_port(port::IE, interrupt::DHRS);
    assert_eq!((bench.get(bits::IS), bench.line.level()), (1, false));
    bench.put(bits::GHC, ghc::IE);
    assert!(bench.line.level());
    let disable = pci_bits::command::BUS_MASTER | pci_bits::command::INTX_DISABLE;
    bench.ahci.config_write(COMMAND as u16, &disable.to_le_bytes());
    assert!(!bench.line.level());
}

#[test]
fn messages_come_with_each_new_cause() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bench.prepare(0, Frame::new(0xea, 0, 0), &[]);
    bench.set_port(port::CI, 1);
    assert!(bench.line.level());
    bench.enable_msi();
    assert!(!bench.line.level(), "messages take the line's place");
    bench.acknowledge();
    assert_eq!(bench.messages.take(), []);
    let message = (0xfee0_0000, 0x31);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.messages.take(), [message]);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.messages.take(), [], "the first cause is still there");
    bench.put(bits::IS, 1);
    assert_eq!(bench.messages.take(), [message], "cleared before its cause was");
    bench.acknowledge();
    assert_eq!(bench.messages.take(), []);
    bench.put(bits::GHC, 0);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.messages.take(), []);
    bench.put(bits::GHC, ghc::IE);
    assert_eq!(bench.messages.take(), [message]);
    assert!(!bench.line.level());
}

#[test]
fn without_bus_mastering_memory_is_left_alone() {
    let bed = bed();
    let bench = Bench::disk(&bed);
    bench.ahci.config_write(COMMAND as u16, &pci_bits::command::MEMORY_SPACE.to_le_bytes());
    bench.prepare(0, Frame::new(0x25, 5, 1), &[(DATA, 512)]);
    bench.set_port(port::CI, 1);
    assert_eq!(bench.port(port::CI), 1);
    assert_eq!(bed.contents.accesses(), [""; 0]);
    bench.ahci.config_write(COMMAND as u16, &pci_bits::command::BUS_MASTER.to_le_bytes());
    assert_eq!(bench.port(port::CI), 0, "it was waiting for that");
    assert_eq!(bench.data(DATA, 1), [5]);
}
