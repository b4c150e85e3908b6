//! Small programs on a machine that runs every block both ways; translations that were tampered with are found out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::{EngineError, Exit, GuestRegion, IoHandler, Vcpu, VcpuState, Vm, VmConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, MemoryRegionAddress};
use x86::Segment;
use x86::bits::cr0;

use super::*;
use crate::tlb::Tables;
use crate::vcpu::SoftVcpu;
use crate::vm::SoftVm;

const RAM: u64 = 1 << 20;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x7_0000;
/// What programs store.
const VALUE: u32 = 0x1122_3344;
/// Beyond the RAM.
const DEVICE: u64 = 0x20_0000;

/// A device that counts how often it is read.
#[derive(Default)]
struct Device {
    reads: AtomicU32,
}

impl IoHandler for Device {
    fn port_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u32, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(self.reads.fetch_add(1, Ordering::SeqCst) as u8);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
}

struct Bench {
    vcpu: SoftVcpu,
    region: Arc<GuestRegion>,
    device: Arc<Device>,
    _vm: SoftVm,
}

impl Bench {
    /// With a program of 32-bit code, which HLT ends.
    fn new(program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Bench {
        let mut assembler = CodeAssembler::new(32).unwrap();
        program(&mut assembler).unwrap();
        assembler.hlt().unwrap();
        let region = engine::memory::create_region("test", 0, RAM).unwrap();
        region.write_slice(&assembler.assemble(CODE).unwrap(), MemoryRegionAddress(CODE)).unwrap();
        let device = Arc::new(Device::default());
        let options = vec![("translate".to_owned(), "check".to_owned())];
        let vm = SoftVm::new(VmConfig { vcpus: 1, io: device.clone(), strict_msr: true, options }).unwrap();
        vm.map_memory(0, region.clone(), true).unwrap();
        let vcpu = vm.soft_vcpu(0, &crate::cpuid::supported_cpuid()).unwrap();
        Bench { vcpu, region, device, _vm: vm }
    }

    /// Runs the program from its beginning.
    fn run(&mut self) -> engine::Result<Exit> {
        let flat =
            |attributes| Segment { attributes, limit: u32::MAX, selector: 8, base: 0, unusable: false };
        let mut state = VcpuState::reset(0);
        state.control.cr0 = cr0::PE | cr0::NE | cr0::ET;
        state.segments.cs = flat(0xc09b);
        let data = flat(0xc093);
        (state.segments.ss, state.segments.ds, state.segments.es) = (data, data, data);
        state.regs.rip = CODE;
        self.region.write_obj(0u64, MemoryRegionAddress(DATA)).unwrap();
        self.vcpu.set_state(&state).unwrap();
        self.vcpu.run()
    }

    fn data(&self, at: u64) -> u32 {
        self.region.read_obj(MemoryRegionAddress(at)).unwrap()
    }

    /// Changes a word in the translation of the block at [`CODE`].
    fn patch(&mut self, from: u32, to: u32) {
        let cpu = self.vcpu.cpu();
        let pieces = &cpu.check.as_ref().unwrap().pieces.known;
        let (_, piece) = pieces.iter().find(|((gpa, ..), _)| *gpa == CODE).unwrap();
        let entry = piece.entries.0.into_iter().min().unwrap();
        let is_it = |address: &u64| {
            // SAFETY: translated code, of which there are more bytes than are looked through.
            unsafe { (*address as *const u32).read_unaligned() == from }
        };
        let at = (entry..entry + 64).find(is_it).expect("the word in the code");
        cpu.translator.as_mut().unwrap().cache.patch(at, to);
    }

    /// Runs the program, which is expected to be found wrong, and gives the report.
    fn report(&mut self) -> String {
        match self.run() {
            Err(EngineError::Guest { rip: CODE, what, .. }) => what,
            other => panic!("{other:?}"),
        }
    }
}

/// Stores [`VALUE`] to [`DATA`].
fn store(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ebx, DATA as u32)?;
    a.mov(eax, VALUE)?;
    a.mov(dword_ptr(ebx), eax)
}

#[test]
fn what_is_the_same_both_ways_goes_on() {
    let mut bench = Bench::new(store);
    assert_eq!(bench.run().unwrap(), Exit::AllHalted);
    assert_eq!(bench.data(DATA), VALUE);
    let counters = bench.vcpu.cpu().counters;
    assert_eq!((counters.blocks_compared, counters.instructions_compared), (1, 3));
    assert_eq!((counters.instructions, counters.comparisons_repeated), (1, 0), "HLT runs once");
}

#[test]
fn a_wrong_value_is_found() {
    let mut bench = Bench::new(store);
    bench.run().unwrap();
    bench.patch(VALUE, VALUE + 1);
    let report = bench.report();
    for part in [
        "mov eax,11223344h",
        "rax: interpreter 11223344, translator 11223345",
        "physical address 0x70000: interpreter [44], translator [45]",
    ] {
        assert!(report.contains(part), "{part}: {report}");
    }
    assert_eq!(bench.data(DATA), 0, "memory is as before the block");
    assert_eq!(u64::from(ATTEMPTS), bench.vcpu.cpu().counters.comparisons_repeated);
}

#[test]
fn a_store_to_a_wrong_place_is_found() {
    let mut bench = Bench::new(store);
    bench.run().unwrap();
    bench.patch(DATA as u32, DATA as u32 + 0x1008);
    let report = bench.report();
    for part in [
        "rbx: interpreter 70000, translator 71008",
        "physical address 0x70000: interpreter [44, 33, 22, 11], translator [00, 00, 00, 00]",
        "physical address 0x71008: interpreter [00, 00, 00, 00], translator [44, 33, 22, 11]",
    ] {
        assert!(report.contains(part), "{part}: {report}");
    }
    assert_eq!((bench.data(DATA), bench.data(DATA + 0x1008)), (0, 0));
}

#[test]
fn an_access_to_a_device_that_only_one_makes_is_found() {
    let mut bench = Bench::new(store);
    bench.run().unwrap();
    bench.patch(DATA as u32, DEVICE as u32);
    let report = bench.report();
    assert!(report.contains("the translator accesses a device"), "{report}");
}

#[test]
fn a_device_is_accessed_once() {
    let mut bench = Bench::new(|a| {
        a.mov(ebx, DEVICE as u32)?;
        a.mov(ecx, 7u32)?;
        a.mov(al, byte_ptr(ebx))?;
        a.mov(dl, byte_ptr(ebx + 1))?;
        a.inc(ecx)
    });
    assert_eq!(bench.run().unwrap(), Exit::AllHalted);
    assert_eq!(bench.device.reads.load(Ordering::SeqCst), 2);
    let cpu = bench.vcpu.cpu();
    assert_eq!((cpu.user.gpr[0] & 0xff, cpu.user.gpr[2] & 0xff, cpu.user.gpr[1]), (0, 1, 8));
    assert_eq!(cpu.counters.instructions_compared, 3, "the MOVs of constants, INC");
    assert_eq!(cpu.counters.instructions, 3, "the accesses, HLT");
}

#[test]
fn clocks_are_read_once() {
    let mut bench = Bench::new(|a| {
        a.mov(ecx, 1u32)?;
        a.rdtsc()?;
        a.add(ecx, ecx)
    });
    assert_eq!(bench.run().unwrap(), Exit::AllHalted);
    let counters = bench.vcpu.cpu().counters;
    assert_eq!((counters.blocks_compared, counters.instructions_compared, counters.instructions), (2, 2, 2));
}

/// Returns and indirect jumps go by what the translated code knows itself, but for some.
#[test]
fn indirect_branches_are_taken_in_each_way() {
    const TURNS: u32 = 64;
    let mut bench = Bench::new(|a| {
        let (mut again, mut function, mut last) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(esp, DATA as u32 + 0x1000)?;
        a.mov(ecx, TURNS)?;
        a.set_label(&mut again)?;
        a.call(function)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.jmp(last)?;
        a.set_label(&mut function)?;
        a.inc(edx)?;
        a.ret()?;
        a.set_label(&mut last)?;
        a.nop()
    });
    assert_eq!(bench.run().unwrap(), Exit::AllHalted);
    let cpu = bench.vcpu.cpu();
    assert_eq!(cpu.user.gpr[2] as u32 & 0xff, TURNS);
    let (calls, turns) = (cpu.counters.handler_calls, u64::from(TURNS));
    assert!((turns / 4..turns * 3 / 4).contains(&calls), "{calls} of {turns} returns by a handler");
}

/// Loops whose translation runs all rounds, short ones and one that is compared in pieces.
#[test]
fn loops_run_to_their_end() {
    for turns in [1, 2, 5, 8, 9, 100] {
        let mut bench = Bench::new(|a| {
            let mut again = a.create_label();
            a.mov(ebx, DATA as u32)?;
            a.mov(ecx, turns)?;
            a.set_label(&mut again)?;
            a.mov(eax, dword_ptr(ebx))?;
            a.add(eax, 3)?;
            a.mov(dword_ptr(ebx), eax)?;
            a.dec(ecx)?;
            a.jne(again)
        });
        for _ in 0..4 {
            assert_eq!(bench.run().unwrap(), Exit::AllHalted);
            assert_eq!(bench.data(DATA), 3 * turns);
        }
        let compared = bench.vcpu.cpu().counters.instructions_compared;
        assert_eq!(compared, 4 * (2 + 5 * u64::from(turns)));
    }
}

/// A handler executes the PUSH, since its operand spans pages; the block is not left for that.
#[test]
fn a_block_goes_on_behind_a_handler() {
    let mut bench = Bench::new(|a| {
        a.mov(esp, DATA as u32 + 0x3000)?;
        a.mov(ebx, DATA as u32 + 0xffd)?;
        a.mov(dword_ptr(ebx), VALUE)?;
        a.push(dword_ptr(ebx))?;
        a.pop(eax)?;
        a.inc(eax)
    });
    for _ in 0..4 {
        assert_eq!(bench.run().unwrap(), Exit::AllHalted);
        assert_eq!(bench.vcpu.cpu().user.gpr[0], u64::from(VALUE) + 1);
    }
    assert_eq!(bench.vcpu.cpu().counters.instructions_compared, 4 * 6);
}

/// Code that a string instruction rewrites byte by byte, of which only the first finds code there.
#[test]
fn rewritten_code_is_noticed_both_ways() {
    const TURNS: u32 = 12;
    let mut bench = Bench::new(|a| {
        let (mut start, mut again) = (a.create_label(), a.create_label());
        let mut rewritten = a.create_label();
        // Two bytes, and one before the immediate operand that the bytes of DATA become.
        a.jmp(start)?;
        let last_byte_rewritten = CODE as u32 + 2 + 1 + 3;
        a.set_label(&mut rewritten)?;
        a.mov(eax, VALUE)?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.mov(esp, DATA as u32 + 0x1000)?;
        a.mov(ebx, DATA as u32)?;
        a.mov(ebp, TURNS)?;
        a.xor(edx, edx)?;
        a.std()?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(ebx))?;
        a.lea(esi, dword_ptr(ebx + 3))?;
        a.mov(edi, last_byte_rewritten)?;
        a.mov(ecx, 4u32)?;
        a.rep().movsb()?;
        a.call(rewritten)?;
        a.add(edx, eax)?;
        a.dec(ebp)?;
        a.jne(again)
    });
    assert_eq!(bench.run().unwrap(), Exit::AllHalted);
    assert_eq!(bench.vcpu.cpu().user.gpr[2], u64::from(TURNS * (TURNS + 1) / 2));
}

/// What a device writes to a page that the block stores to as well.
#[test]
fn writes_of_devices_are_not_lost() {
    #[repr(align(4096))]
    struct Memory([u8; 4096]);
    let mut memory = Box::new(Memory([0; 4096]));
    let at = memory.0.as_mut_ptr();
    // SAFETY: indexes are inside the page.
    let (put, get) = (|i, value| unsafe { at.add(i).write(value) }, |i| unsafe { at.add(i).read() });
    let area = crate::area::Area::new().unwrap();
    let (map, tlb): (_, &Tables) = (crate::memory::MemoryMap::default(), area.tlb());
    let mut journal = Journal::kept();
    let interpret = |journal: &mut Journal| {
        journal.begin_stores();
        journal.before_store(at, 1);
        put(0, 5);
        journal.take_back_stores(&map, tlb);
        assert_eq!(get(0), 0);
        journal.begin_pages(tlb, false);
        assert!(journal.permits_stores(crate::tlb::Privilege::User, 0x1000, at as u64, true));
        put(0, 5);
    };

    interpret(&mut journal);
    put(100, 7);
    assert!(!journal.end_pages(tlb), "somebody else wrote");
    journal.reject(&map, tlb);
    assert_eq!((get(0), get(100)), (0, 0));
    interpret(&mut journal);
    assert!(journal.end_pages(tlb));
    journal.accept();
    assert_eq!((get(0), get(100)), (5, 7));
}
