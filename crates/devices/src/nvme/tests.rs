use std::io::ErrorKind;

use block::ErrorPolicy;
use block::image::AtOnce;
use vm_memory::{Bytes, GuestAddress};

use super::bits::{admin, cns, feature, log, nvm, register};
use super::*;
use crate::pci::bits as pci_bits;
use crate::testing::disk::DiskBed;
use crate::testing::{Line, Messages};

const RAM: u64 = 1 << 20;
const ADMIN: u64 = 0x1_0000;
const ADMIN_DONE: u64 = 0x1_1000;
const IO: u64 = 0x1_2000;
const IO_DONE: u64 = 0x1_3000;
const LIST: u64 = 0x1_4000;
const DATA: u64 = 0x2_0000;
const ENTRIES: u16 = 4;
const SECTORS: u64 = 4096;

/// A driver with one I/O queue.
struct Bed {
    disk: DiskBed,
    nvme: Arc<Nvme>,
    messages: Arc<Messages>,
    pin: Arc<Line>,
    /// Of both pairs: where the next command goes, where the next completion is, and its phase.
    tails: [u16; 2],
    heads: [(u16, bool); 2],
    next: u16,
}

/// A command in the making.
#[derive(Clone, Copy, Default)]
struct Words([u32; 16]);

impl Words {
    fn new(opcode: u8, namespace: u32) -> Self {
        let mut words = [0; 16];
        (words[0], words[1]) = (opcode.into(), namespace);
        Words(words)
    }

    fn with(mut self, number: usize, value: u32) -> Self {
        self.0[number] = value;
        self
    }

    fn with64(self, number: usize, value: u64) -> Self {
        self.with(number, value as u32).with(number + 1, (value >> 32) as u32)
    }

    fn prp(self, first: u64, second: u64) -> Self {
        self.with64(6, first).with64(8, second)
    }
}

fn bed() -> Bed {
    start(DiskBed::new(RAM, SECTORS, |options| options.write_errors = ErrorPolicy::Report))
}

fn start(disk: DiskBed) -> Bed {
    let config = NvmeConfig {
        max_queues: 3,
        queue_size: 16,
        io_slots: 64,
        block_bytes: 512,
        serial: "serial".into(),
        eui64: 0x0102_0304_0506_0708,
        dataset_management: true,
    };
    let nvme = Nvme::new(disk.disk.clone(), disk.memory.clone(), IDENTITY, config).unwrap();
    let (messages, pin) = (Messages::new(), Line::new());
    nvme.function().connect_messages(messages.clone());
    nvme.function().connect_intx(pin.clone());
    nvme.config_write(pci_bits::COMMAND as u16, &pci_bits::command::BUS_MASTER.to_le_bytes());
    let mut bed = Bed { disk, nvme, messages, pin, tails: [0; 2], heads: [(0, true); 2], next: 0 };
    bed.enable();
    bed.create_queues();
    bed
}

impl Bed {
    fn put(&self, offset: u64, value: u32) {
        self.nvme.bar_write(REGISTER_BAR, offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.nvme.bar_read(REGISTER_BAR, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn enable(&mut self) {
        (self.tails, self.heads) = ([0; 2], [(0, true); 2]);
        self.disk.memory.write_slice(&[0; 0x4000], GuestAddress(ADMIN)).unwrap();
        let last = u32::from(ENTRIES - 1);
        self.put(register::AQA, last | last << 16);
        self.put(register::ASQ, ADMIN as u32);
        self.nvme.bar_write(REGISTER_BAR, register::ACQ, &ADMIN_DONE.to_le_bytes());
        self.put(register::CC, cc::EN | 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT);
    }

    fn create_queues(&mut self) {
        let size = u32::from(ENTRIES - 1) << 16 | 1;
        let create = Words::new(admin::CREATE_CQ, 0).prp(IO_DONE, 0).with(10, size).with(11, 1 << 16 | 3);
        assert_eq!(self.ask(0, create), (Status::SUCCESS, 0));
        let create = Words::new(admin::CREATE_SQ, 0).prp(IO, 0).with(10, size).with(11, 1 << 16 | 1);
        assert_eq!(self.ask(0, create), (Status::SUCCESS, 0));
    }

    /// Puts a command into queue 0 or 1, without ringing.
    fn queue(&mut self, queue: usize, command: Words) -> u16 {
        let base = [ADMIN, IO][queue];
        self.next += 1;
        let mut words = command.0;
        words[0] |= u32::from(self.next) << 16;
        for (index, word) in words.into_iter().enumerate() {
            let at = base + 64 * u64::from(self.tails[queue]) + 4 * index as u64;
            self.disk.memory.write_obj(word, GuestAddress(at)).unwrap();
        }
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        self.next
    }

    fn ring(&self, queue: usize) {
        self.put(register::DOORBELLS + 8 * queue as u64, self.tails[queue].into());
    }

    /// The next completion: command, status, result. It is taken off the queue.
    fn completion(&mut self, queue: usize) -> Option<(u16, Status, u32)> {
        let (head, phase) = self.heads[queue];
        let at = [ADMIN_DONE, IO_DONE][queue] + 16 * u64::from(head);
        let words: [u32; 4] = self.disk.memory.read_obj(GuestAddress(at)).unwrap();
        if (words[3] >> 16 & 1 == 1) != phase {
            return None;
        }
        assert_eq!(words[2] >> 16, queue as u32, "submission queue");
        let next = (head + 1) % ENTRIES;
        self.heads[queue] = (next, phase ^ (next == 0));
        self.put(register::DOORBELLS + 8 * queue as u64 + 4, next.into());
        Some((words[3] as u16, Status((words[3] >> 17) as u16 & 0x7ff), words[0]))
    }

    fn ask(&mut self, queue: usize, command: Words) -> (Status, u32) {
        let id = self.queue(queue, command);
        self.ring(queue);
        let (done, status, result) = self.completion(queue).expect("a completion");
        assert_eq!(done, id);
        (status, result)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.disk.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn identify(&mut self, structure: u8, namespace: u32) -> (Status, Vec<u8>) {
        let command = Words::new(admin::IDENTIFY, namespace).prp(DATA, 0).with(10, structure.into());
        (self.ask(0, command).0, self.bytes(DATA, 4096))
    }
}

fn transfer(opcode: u8, first: u64, blocks: u32) -> Words {
    Words::new(opcode, 1).with64(10, first).with(12, blocks - 1)
}

const SUCCESS: (Status, u32) = (Status::SUCCESS, 0);

#[test]
fn enabled_shut_down_and_reset() {
    let mut bed = bed();
    assert_eq!(bed.get(register::CSTS), csts::RDY);
    assert_eq!(bed.get(register::VS), 0x10400);
    assert_eq!(bed.get(register::CAP) & 0xffff, 15);
    bed.put(register::CC, bed.get(register::CC) | 1 << 14);
    assert_eq!(bed.get(register::CSTS), csts::RDY | csts::SHST_COMPLETE);
    assert_eq!(bed.disk.contents.accesses(), ["flush 0+0"]);
    bed.put(register::CC, 0);
    assert_eq!(bed.get(register::CSTS), 0);
    bed.queue(0, Words::new(admin::ABORT, 0));
    bed.ring(0);
    assert_eq!(bed.completion(0), None);
    bed.enable();
    assert_eq!(bed.ask(0, Words::new(admin::ABORT, 0)), (Status::SUCCESS, 1));
    // Page sizes and command sets that are not there, and queues of one entry.
    for (configuration, sizes) in
        [(cc::EN | 1 << 7, 0x3_0003), (cc::EN | 1 << 4, 0x3_0003), (cc::EN, 0x3_0000)]
    {
        bed.put(register::CC, 0);
        bed.put(register::AQA, sizes);
        bed.put(register::CC, configuration);
        assert_eq!(bed.get(register::CSTS), csts::CFS, "{configuration:x} {sizes:x}");
    }
}

#[test]
fn pages_wherever_the_lists_say() {
    let mut bed = bed();
    // Within one page, over two, and over three with a list.
    assert_eq!(bed.ask(1, transfer(nvm::READ, 7, 1).prp(DATA + 0x10, 0)), SUCCESS);
    assert_eq!(bed.bytes(DATA + 0x10, 512), [7; 512]);
    assert_eq!(bed.ask(1, transfer(nvm::READ, 1, 8).prp(DATA + 0xe00, DATA + 0x3000)), SUCCESS);
    assert_eq!((bed.bytes(DATA + 0xe00, 512), bed.bytes(DATA + 0x3000, 512)), (vec![1; 512], vec![2; 512]));
    // A list that begins three entries before the end of its page and goes on in another.
    let list = LIST + 0x1000 - 24;
    let pages: Vec<u64> = (0..6).map(|page| DATA + 0x1_0000 + 0x2000 * page).collect();
    for (at, page) in [(list, pages[0]), (list + 8, pages[1]), (list + 16, LIST + 0x2000)] {
        bed.disk.memory.write_obj(page, GuestAddress(at)).unwrap();
    }
    for (index, page) in pages[2..].iter().enumerate() {
        bed.disk.memory.write_obj(*page, GuestAddress(LIST + 0x2000 + 8 * index as u64)).unwrap();
    }
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 56).prp(DATA, list)), SUCCESS);
    assert_eq!(bed.bytes(DATA + 0xe00, 512), [7; 512]);
    for (index, page) in pages.iter().enumerate() {
        assert_eq!(bed.bytes(*page, 512), vec![8 * (index as u8 + 1); 512], "page {index}");
    }
    bed.disk.memory.write_slice(&[0x5a; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(bed.ask(1, transfer(nvm::WRITE, 100, 2).prp(DATA, 0).with(12, 1 | nvm::FUA)), SUCCESS);
    assert_eq!(bed.disk.contents.bytes()[51200..52224], [0x5a; 1024]);
    assert!(bed.disk.contents.accesses().contains(&"write stable c800+400".to_owned()));
    assert_eq!(bed.ask(1, Words::new(nvm::FLUSH, u32::MAX)), SUCCESS);
    assert_eq!(bed.disk.contents.accesses(), ["flush 0+0"]);
}

#[test]
fn scatter_gather_lists() {
    let mut bed = bed();
    let descriptor = |bed: &Bed, at: u64, address: u64, len: u32, kind: u8| {
        bed.disk.memory.write_obj(address, GuestAddress(at)).unwrap();
        bed.disk.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        bed.disk.memory.write_obj(u32::from(kind) << 28, GuestAddress(at + 12)).unwrap();
    };
    let command = |address: u64, len: u32, kind: u8| {
        let command = transfer(nvm::READ, 9, 2);
        command
            .with(0, u32::from(nvm::READ) | 1 << 14)
            .with64(6, address)
            .with(8, len)
            .with(9, u32::from(kind) << 28)
    };
    assert_eq!(bed.ask(1, command(DATA + 3, 1024, 0)), SUCCESS);
    assert_eq!(bed.bytes(DATA + 3, 513), [vec![9; 512], vec![10]].concat());
    descriptor(&bed, LIST, DATA + 0x1000, 100, 0);
    descriptor(&bed, LIST + 16, LIST + 0x100, 32, 3);
    descriptor(&bed, LIST + 0x100, DATA + 0x2000, 900, 0);
    descriptor(&bed, LIST + 0x110, DATA + 0x3000, 24, 0);
    assert_eq!(bed.ask(1, command(LIST, 32, 2)), SUCCESS);
    assert_eq!((bed.bytes(DATA + 0x1000, 100), bed.bytes(DATA + 0x3000, 24)), (vec![9; 100], vec![10; 24]));
    assert_eq!(bed.ask(1, command(LIST + 0x100, 32, 3)).0, Status::SGL_LENGTH, "too short");
    assert_eq!(bed.ask(1, command(LIST, 32, 3)).0, Status::SGL_SEGMENT, "a last segment that is not");
    assert_eq!(bed.ask(1, command(LIST, 30, 2)).0, Status::SGL_SEGMENT);
    assert_eq!(bed.ask(1, command(LIST, 32, 7)).0, Status::SGL_TYPE);
    assert_eq!(bed.ask(1, command(RAM, 32, 2)).0, Status::DATA_TRANSFER_ERROR);
    // A segment that is its own next ends too.
    descriptor(&bed, LIST, LIST, 16, 2);
    assert_eq!(bed.ask(1, command(LIST, 16, 2)).0, Status::SGL_LENGTH);
}

#[test]
fn commands_that_cannot_be_done_fail_alone() {
    let mut bed = bed();
    bed.disk.contents.accesses();
    let read = |first, blocks| transfer(nvm::READ, first, blocks).prp(DATA, LIST);
    assert_eq!(bed.ask(1, read(SECTORS - 1, 2)).0, Status::LBA_OUT_OF_RANGE);
    assert_eq!(bed.ask(1, read(u64::MAX, 1)).0, Status::LBA_OUT_OF_RANGE);
    assert_eq!(bed.ask(1, read(u64::MAX / 512, 1)).0, Status::LBA_OUT_OF_RANGE);
    assert_eq!(bed.ask(1, read(0, 2049)).0, Status::INVALID_FIELD, "more than the controller transfers");
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 1).prp(DATA + 2, 0)).0, Status::PRP_OFFSET);
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 9).prp(DATA, DATA + 0x10)).0, Status::PRP_OFFSET);
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 17).prp(DATA, LIST + 4)).0, Status::PRP_OFFSET);
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 17).prp(DATA, RAM)).0, Status::DATA_TRANSFER_ERROR);
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 1).prp(RAM, 0)).0, Status::DATA_TRANSFER_ERROR);
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 1).prp(u64::MAX - 3, 0)).0, Status::DATA_TRANSFER_ERROR);
    assert_eq!(bed.ask(1, Words::new(nvm::READ, 2).prp(DATA, 0)).0, Status::INVALID_NAMESPACE);
    assert_eq!(bed.ask(1, Words::new(0x55, 1)).0, Status::INVALID_OPCODE);
    assert_eq!(
        bed.ask(1, transfer(nvm::READ, 0, 1).prp(DATA, 0).with(0, 2 | 1 << 8)).0,
        Status::INVALID_FIELD,
        "fused"
    );
    assert!(bed.disk.contents.accesses().is_empty());
    bed.disk.contents.fail(ErrorKind::StorageFull);
    assert_eq!(bed.ask(1, transfer(nvm::WRITE, 0, 1).prp(DATA, 0)).0, Status::CAPACITY_EXCEEDED);
    // Errors are counted for the driver to read.
    let smart =
        Words::new(admin::GET_LOG_PAGE, u32::MAX).prp(DATA, 0).with(10, u32::from(log::SMART) | 127 << 16);
    assert_eq!(bed.ask(0, smart), SUCCESS);
    assert_eq!(bed.bytes(DATA + 176, 1), [14]);
}

#[test]
fn ranges_are_compared_zeroed_and_deallocated() {
    let mut bed = bed();
    bed.disk.memory.write_slice(&[3; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(bed.ask(1, transfer(nvm::COMPARE, 3, 1).prp(DATA, 0)), SUCCESS);
    assert_eq!(bed.ask(1, transfer(nvm::COMPARE, 4, 1).prp(DATA, 0)).0, Status::COMPARE_FAILURE);
    bed.disk.contents.accesses();
    assert_eq!(bed.ask(1, transfer(nvm::WRITE_ZEROES, 8, 8)), SUCCESS);
    assert_eq!(bed.ask(1, transfer(nvm::WRITE_ZEROES, 16, 1).with(12, nvm::DEALLOCATE)), SUCCESS);
    assert_eq!(bed.disk.contents.accesses(), ["zero 1000+1000", "unmap 2000+200"]);
    let range = |bed: &Bed, index: u64, first: u64, blocks: u32| {
        bed.disk.memory.write_obj(blocks, GuestAddress(DATA + 16 * index + 4)).unwrap();
        bed.disk.memory.write_obj(first, GuestAddress(DATA + 16 * index + 8)).unwrap();
    };
    let deallocate =
        |ranges: u32| Words::new(nvm::DATASET_MANAGEMENT, 1).prp(DATA, 0).with(10, ranges - 1).with(11, 4);
    range(&bed, 0, 32, 8);
    range(&bed, 1, 64, 16);
    assert_eq!(bed.ask(1, deallocate(2)), SUCCESS);
    assert_eq!(bed.disk.contents.accesses(), ["discard 4000+1000", "discard 8000+2000"]);
    range(&bed, 1, SECTORS, 1);
    assert_eq!(bed.ask(1, deallocate(2)).0, Status::LBA_OUT_OF_RANGE);
    assert!(bed.disk.contents.accesses().is_empty(), "all or none");
}

#[test]
fn what_it_says_of_itself() {
    let mut bed = bed();
    let (status, page) = bed.identify(cns::CONTROLLER, 0);
    assert_eq!((status, &page[4..24]), (Status::SUCCESS, &b"serial              "[..]));
    assert_eq!((page[77], page[512], page[513], page[525]), (8, 0x66, 0x44, 1));
    let (_, page) = bed.identify(cns::NAMESPACE, 1);
    assert_eq!((u64::from_le_bytes(page[..8].try_into().unwrap()), page[130]), (SECTORS, 9));
    assert_eq!(page[120..128], [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(bed.identify(cns::ACTIVE_NAMESPACES, 0).1[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bed.identify(cns::ACTIVE_NAMESPACES, 1).1[..4], [0; 4]);
    assert_eq!(bed.identify(cns::DESCRIPTORS, 1).1[..12], [1, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(bed.identify(cns::NAMESPACE, 2).0, Status::INVALID_NAMESPACE);
    assert_eq!(bed.identify(0x77, 1).0, Status::INVALID_FIELD);
    let features = |number: u8| Words::new(admin::GET_FEATURES, 0).with(10, number.into());
    assert_eq!(bed.ask(0, features(feature::NUMBER_OF_QUEUES)), (Status::SUCCESS, 2 | 2 << 16));
    assert_eq!(bed.ask(0, features(feature::VOLATILE_WRITE_CACHE)), (Status::SUCCESS, 1));
    assert_eq!(bed.ask(0, features(0x70)).0, Status::INVALID_FIELD);
    let page = |number: u32, offset: u64| {
        Words::new(admin::GET_LOG_PAGE, 0).prp(DATA, 0).with(10, number | 3 << 16).with64(12, offset)
    };
    assert_eq!(bed.ask(0, page(99, 0)).0, Status::LOG_PAGE);
    assert_eq!(bed.ask(0, page(2, 2)).0, Status::INVALID_FIELD);
    assert_eq!(bed.ask(0, page(2, u64::MAX - 3)).0, Status::INVALID_FIELD);
    assert_eq!(bed.ask(0, page(2, 508)), SUCCESS);
}

#[test]
fn queues_are_made_and_deleted_in_order() {
    let mut bed = bed();
    let completion = |id: u32, size: u32| {
        Words::new(admin::CREATE_CQ, 0).prp(DATA, 0).with(10, size << 16 | id).with(11, 3)
    };
    let submission = |id: u32, to: u32| {
        Words::new(admin::CREATE_SQ, 0).prp(DATA, 0).with(10, 3 << 16 | id).with(11, to << 16 | 1)
    };
    for (command, status) in [
        (completion(1, 3), Status::QUEUE_IDENTIFIER),
        (completion(0, 3), Status::QUEUE_IDENTIFIER),
        (completion(4, 3), Status::QUEUE_IDENTIFIER),
        (completion(2, 0), Status::QUEUE_SIZE),
        (completion(2, 16), Status::QUEUE_SIZE),
        (completion(2, 3).with(11, 2), Status::INVALID_FIELD),
        (completion(2, 3).prp(DATA + 8, 0), Status::INVALID_FIELD),
        (completion(2, 3).with(11, 4 << 16 | 3), Status::INTERRUPT_VECTOR),
        (submission(2, 2), Status::CQ_INVALID),
        (submission(2, 0), Status::CQ_INVALID),
        (submission(1, 1), Status::QUEUE_IDENTIFIER),
        (Words::new(admin::DELETE_CQ, 0).with(10, 1), Status::QUEUE_DELETION),
        (Words::new(admin::DELETE_CQ, 0).with(10, 2), Status::QUEUE_IDENTIFIER),
        (Words::new(admin::DELETE_SQ, 0).with(10, 0), Status::QUEUE_IDENTIFIER),
        (Words::new(admin::DELETE_SQ, 0).with(10, 1), Status::SUCCESS),
        (Words::new(admin::DELETE_CQ, 0).with(10, 1), Status::SUCCESS),
    ] {
        assert_eq!(bed.ask(0, command).0, status, "{:x?}", command.0);
    }
    bed.queue(1, transfer(nvm::READ, 0, 1).prp(DATA, 0));
    bed.ring(1);
    assert_eq!(bed.completion(1), None);
    (bed.tails[1], bed.heads[1]) = (0, (0, true));
    bed.disk.memory.write_slice(&[0; 0x1000], GuestAddress(IO_DONE)).unwrap();
    bed.create_queues();
    assert_eq!(bed.ask(1, transfer(nvm::READ, 0, 1).prp(DATA, 0)), SUCCESS);
}

#[test]
fn completions_wait_for_room() {
    let mut bed = bed();
    let ids: Vec<u16> = (0..3)
        .map(|_| {
            let id = bed.queue(1, Words::new(nvm::FLUSH, 1));
            bed.ring(1);
            id
        })
        .collect();
    // Three of four entries are taken; the next finds the queue full.
    let last = bed.queue(1, Words::new(nvm::FLUSH, 1));
    bed.ring(1);
    let (head, phase) = bed.heads[1];
    assert_eq!((head, phase), (0, true));
    for id in ids.into_iter().chain([last]) {
        assert_eq!(bed.completion(1).map(|(id, ..)| id), Some(id));
    }
    // Doorbells that name no queue, or no entry, do nothing.
    bed.put(register::DOORBELLS + 8, 99);
    bed.put(register::DOORBELLS + 12, 99);
    bed.put(register::DOORBELLS + 8 * 3, 1);
    assert_eq!(bed.completion(1), None);
}

#[test]
fn interrupts_by_pin_by_msi_and_by_msix() {
    let mut bed = bed();
    assert!(!bed.pin.level(), "every completion so far was taken");
    bed.queue(1, Words::new(nvm::FLUSH, 1));
    bed.ring(1);
    assert!(bed.pin.level());
    bed.put(register::INTMS, 1 << 1);
    assert!(!bed.pin.level());
    bed.put(register::INTMC, 1 << 1);
    assert!(bed.pin.level());
    bed.completion(1).unwrap();
    bed.put(register::INTMC, 0);
    assert_eq!((bed.pin.level(), bed.messages.take()), (false, vec![]));
    let at = |id| bed.nvme.function().with_config(|config| config.capability(id)).unwrap() as u16;
    let msix = at(pci_bits::capability::MSIX);
    bed.nvme.config_write(msix + 2, &pci_bits::msix::ENABLE.to_le_bytes());
    for vector in 0..4u64 {
        bed.nvme.bar_write(MSIX_BAR, 16 * vector, &0xfee0_0000u64.to_le_bytes());
        bed.nvme.bar_write(MSIX_BAR, 16 * vector + 8, &(0x30 + vector).to_le_bytes());
    }
    bed.ask(1, Words::new(nvm::FLUSH, 1));
    bed.ask(0, Words::new(admin::ABORT, 0));
    assert_eq!(bed.messages.take(), [(0xfee0_0000, 0x31), (0xfee0_0000, 0x30)]);
    assert!(!bed.pin.level());
}

#[test]
fn a_change_of_size_is_told_once_until_it_is_looked_at() {
    let mut bed = bed();
    let request = Words::new(admin::ASYNC_EVENT_REQUEST, 0);
    let waiting = bed.queue(0, request);
    bed.ring(0);
    bed.nvme.resized();
    assert_eq!(bed.completion(0), None, "the driver does not want to know");
    let notice = feature::NOTICE_NAMESPACE;
    let set = Words::new(admin::SET_FEATURES, 0).with(10, feature::ASYNC_EVENT.into()).with(11, notice);
    let set = bed.queue(0, set);
    bed.ring(0);
    assert_eq!(bed.completion(0), Some((waiting, Status::SUCCESS, 0x04_0002)));
    assert_eq!(bed.completion(0), Some((set, Status::SUCCESS, 0)));
    bed.queue(0, request);
    bed.ring(0);
    bed.nvme.resized();
    assert_eq!(bed.completion(0), None, "not before it has looked");
    let changed =
        Words::new(admin::GET_LOG_PAGE, 0).prp(DATA, 0).with(10, u32::from(log::CHANGED_NAMESPACES));
    assert_eq!(bed.ask(0, changed), SUCCESS);
    assert_eq!(bed.bytes(DATA, 4), [1, 0, 0, 0]);
    bed.nvme.resized();
    assert!(bed.completion(0).is_some());
    for expected in [None, None, None, None, Some(Status::ASYNC_EVENT_LIMIT)] {
        bed.queue(0, request);
        bed.ring(0);
        assert_eq!(bed.completion(0).map(|(_, status, _)| status), expected);
    }
}

#[test]
fn a_reset_waits_for_commands_and_nothing_of_before_is_posted() {
    let disk = DiskBed::with(AtOnce::Never, RAM, SECTORS, |_| ());
    let mut bed = start(disk);
    for block in 0..3 {
        bed.queue(1, transfer(nvm::READ, block, 1).prp(DATA + 512 * block, 0));
    }
    bed.ring(1);
    bed.put(register::CC, 0);
    bed.disk.memory.write_slice(&[0; 0x4000], GuestAddress(ADMIN)).unwrap();
    bed.disk.disk.drain();
    assert_eq!(bed.bytes(IO_DONE, 64), [0; 64]);
    bed.enable();
    bed.create_queues();
    bed.queue(1, transfer(nvm::READ, 5, 1).prp(DATA, 0));
    bed.ring(1);
    bed.disk.disk.drain();
    assert_eq!(bed.completion(1).map(|(_, status, _)| status), Some(Status::SUCCESS));
    assert_eq!(bed.bytes(DATA, 512), [5; 512]);
}

#[test]
fn saved_and_restored() {
    let mut bed = bed();
    let state = bed.nvme.save();
    let config = bed.nvme.config.clone();
    let other = Nvme::new(bed.disk.disk.clone(), bed.disk.memory.clone(), IDENTITY, config).unwrap();
    other.restore(state.clone()).unwrap();
    bed.nvme = other;
    assert_eq!(bed.ask(1, transfer(nvm::READ, 6, 1).prp(DATA, 0)), SUCCESS);
    let mut wrong = state;
    wrong.controller.submission.get_mut(&1).unwrap().head = 99;
    assert!(bed.nvme.restore(wrong).is_err());
}
