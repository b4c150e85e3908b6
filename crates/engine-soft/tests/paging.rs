//! Translation as guests see it: rights, error codes, accessed and dirty bits, page sizes; code that changes; atomics.

mod common;

use common::*;
use engine::{Exit, MpState, Vcpu};
use engine_soft::cpu::Cpu;
use engine_soft::mmu::Access;
use iced_x86::code_asm::*;
use x86::bits::{cr0, cr4, efer, rflags};
use x86::paging::{fault, pte};
use x86::{Exception, Vector};

/// The page under test.
const PAGE: u64 = 0x50000;
const ENTRY: u64 = PT + (PAGE >> 12) * 8;

fn attempt(cpu: &mut Cpu, gva: u64, access: Access) -> Result<(), Exception> {
    let result = match access {
        Access::Read => cpu.read::<u32>(gva).map(|_| ()),
        Access::Write => cpu.write(gva, 1u32),
        Access::Execute => cpu.translate(cpu.privilege, gva, Access::Execute).map(|_| ()),
    };
    result.map_err(|_| cpu.fault)
}

/// SDM 3A §4.6.1, read afresh: whether an access to a present page is allowed.
fn allowed(access: Access, user_mode: bool, bits: u64, wp: bool, smep: bool, smap: bool, ac: bool) -> bool {
    let (user, writable, executable) = (bits & pte::US != 0, bits & pte::RW != 0, bits & pte::NX == 0);
    if user_mode {
        return user && (access != Access::Write || writable) && (access != Access::Execute || executable);
    }
    match access {
        Access::Execute => executable && !(smep && user),
        Access::Read => !(smap && user && !ac),
        Access::Write => (writable || !wp) && !(smap && user && !ac),
    }
}

#[test]
fn every_combination_of_rights() {
    let mut bench = Bench::new(1);
    let mut seen = 0;
    for case in 0..1u32 << 8 {
        let bit = |n: u32| case >> n & 1 != 0;
        let bits = if bit(0) { pte::US } else { 0 }
            | if bit(1) { pte::RW } else { 0 }
            | if bit(2) { pte::NX } else { 0 };
        let (user_mode, wp, smep, smap, ac) = (bit(3), bit(4), bit(5), bit(6), bit(7));
        let mut state = bench.long_mode(if user_mode { 3 } else { 0 });
        state.control.cr0 = state.control.cr0 & !cr0::WP | if wp { cr0::WP } else { 0 };
        state.control.cr4 |= if smep { cr4::SMEP } else { 0 } | if smap { cr4::SMAP } else { 0 };
        state.control.cr4 &= bench.cpu().cr4_allowed();
        let (smep, smap) = (state.control.cr4 & cr4::SMEP != 0, state.control.cr4 & cr4::SMAP != 0);
        state.regs.rflags |= if ac { rflags::AC } else { 0 };
        bench.set64(ENTRY, PAGE | pte::P | bits);
        for access in [Access::Read, Access::Write, Access::Execute] {
            bench.load(&state);
            let expected = if allowed(access, user_mode, bits, wp, smep, smap, ac) {
                Ok(())
            } else {
                let code = fault::P
                    | if access == Access::Write { fault::W } else { 0 }
                    | if user_mode { fault::U } else { 0 }
                    | if access == Access::Execute { fault::I } else { 0 };
                Err(Exception::page_fault(PAGE + 8, code))
            };
            let name =
                format!("{access:?} user={user_mode} bits={bits:x} wp={wp} smep={smep} smap={smap} ac={ac}");
            assert_eq!(attempt(bench.cpu(), PAGE + 8, access), expected, "{name}");
            // Again, now that a translation may be remembered.
            assert_eq!(attempt(bench.cpu(), PAGE + 8, access), expected, "again: {name}");
            seen += 1;
        }
    }
    assert_eq!(seen, 3 * 256);
}

#[test]
fn accessed_and_dirty_are_set_when_they_should() {
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    bench.load(&state);
    let marks = |bench: &Bench| [PML4, PDPT, PD, ENTRY].map(|at| bench.get64(at) & (pte::A | pte::D));
    assert_eq!(marks(&bench), [0; 4]);
    attempt(bench.cpu(), PAGE, Access::Read).unwrap();
    assert_eq!(marks(&bench), [pte::A; 4]);
    attempt(bench.cpu(), PAGE, Access::Write).unwrap();
    assert_eq!(
        marks(&bench),
        [pte::A, pte::A, pte::A, pte::A | pte::D],
        "a read mapping must not swallow the store"
    );
    bench.set64(ENTRY, PAGE | pte::P);
    bench.load(&state);
    attempt(bench.cpu(), PAGE, Access::Write).unwrap_err();
    assert_eq!(bench.get64(ENTRY) & pte::D, 0, "a refused store leaves no mark");
}

#[test]
fn absent_and_reserved_entries_say_so() {
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    for (bits, code) in [(0, 0), (pte::P | 1 << 51, fault::P | fault::RSVD)] {
        bench.set64(ENTRY, PAGE | bits);
        bench.load(&state);
        let expected = Err(Exception::page_fault(PAGE + 4, code | fault::W));
        assert_eq!(attempt(bench.cpu(), PAGE + 4, Access::Write), expected);
    }
    // NX is reserved while EFER.NXE is clear.
    bench.set64(ENTRY, PAGE | pte::P | pte::NX);
    let mut without = state.clone();
    without.control.efer &= !efer::NXE;
    bench.load(&without);
    assert_eq!(
        attempt(bench.cpu(), PAGE, Access::Read),
        Err(Exception::page_fault(PAGE, fault::P | fault::RSVD))
    );
}

#[test]
fn large_pages_and_legacy_formats_translate() {
    let mut bench = Bench::new(1);
    let all = pte::P | pte::RW;
    bench.set64(0x40_1238, 0x1111);
    bench.set64(0x60_1238, 0x2222);
    let mut state = bench.long_mode(0);
    bench.set64(PD + 8, 0x40_0000 | all | pte::PS);
    bench.set64(PDPT + 8, all | pte::PS);
    bench.load(&state);
    assert_eq!(bench.cpu().read::<u64>(0x20_1238).ok(), Some(0x1111), "2 MiB page");
    if bench.cpu().has_1g_pages {
        assert_eq!(bench.cpu().read::<u64>((1 << 30) + 0x60_1238).ok(), Some(0x2222), "1 GiB page");
    }
    // PAE: four pointers, then the same directory.
    state = bench.protected_mode();
    bench.set64(0x9000, PD | pte::P);
    state.control.cr0 |= cr0::PG;
    state.control.cr4 = cr4::PAE;
    state.control.cr3 = 0x9000;
    bench.load(&state);
    assert_eq!(bench.cpu().read::<u64>(0x20_1238).ok(), Some(0x1111), "PAE");
    assert_eq!(attempt(bench.cpu(), 1 << 30, Access::Read), Err(Exception::page_fault(1 << 30, 0)));
    // Two levels: a 4 MiB page and a table.
    bench.set32(0xa000 + 4, 0x40_0000 | (all | pte::PS) as u32);
    bench.set32(0xa000 + 8, 0xb000 | all as u32);
    bench.set32(0xb000 + 4, 0x60_1000 | all as u32);
    state.control.cr4 = cr4::PSE;
    state.control.cr3 = 0xa000;
    bench.load(&state);
    assert_eq!(bench.cpu().read::<u64>(0x40_1238).ok(), Some(0x1111), "4 MiB page");
    assert_eq!(bench.cpu().read::<u64>(0x80_1238).ok(), Some(0x2222), "4 KiB page of two levels");
    assert_eq!(bench.get32(0xb004) & pte::A as u32, pte::A as u32);
}

#[test]
fn a_store_across_pages_is_all_or_nothing() {
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    bench.set64(ENTRY + 8, 0);
    bench.set64(PAGE + 0xff8, 7);
    bench.load(&state);
    assert!(bench.cpu().write(PAGE + 0xffc, u64::MAX).is_err());
    assert_eq!(bench.cpu().fault, Exception::page_fault(PAGE + 0x1000, fault::W));
    assert_eq!(bench.get64(PAGE + 0xff8), 7);
}

#[test]
fn non_canonical_addresses_name_the_segment() {
    let mut bench = Bench::new(1);
    let mut state = bench.long_mode(0);
    state.regs.gpr[0] = 1 << 47;
    state.regs.gpr[5] = 1 << 47;
    bench.assemble(64, CODE, |a| a.mov(rcx, qword_ptr(rax)));
    bench.load(&state);
    assert_eq!(bench.cpu().step(), Err(Exception::gp(0)));
    bench.assemble(64, CODE, |a| a.mov(rcx, qword_ptr(rbp)));
    bench.load(&state);
    assert_eq!(bench.cpu().step(), Err(Exception::with_code(Vector::StackFault, 0)));
    state.regs.gpr[4] = 1 << 47;
    bench.assemble(64, CODE, |a| a.pop(rcx));
    bench.load(&state);
    assert_eq!(bench.cpu().step(), Err(Exception::with_code(Vector::StackFault, 0)));
}

#[test]
fn invlpg_and_cr3_make_changes_visible() {
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    bench.set64(0x60000, 1);
    bench.set64(0x61000, 2);
    bench.set64(0x62000, 3);
    let all = pte::P | pte::RW;
    bench.set64(ENTRY, 0x60000 | all);
    bench.load(&state);
    assert_eq!(bench.cpu().read::<u64>(PAGE).ok(), Some(1));
    bench.set64(ENTRY, 0x61000 | all);
    bench.assemble(64, CODE, |a| {
        a.invlpg(byte_ptr(PAGE))?;
        a.mov(rax, qword_ptr(PAGE))
    });
    bench.cpu().step().unwrap();
    bench.cpu().step().unwrap();
    assert_eq!(bench.cpu().user.gpr[0], 2);
    bench.set64(ENTRY, 0x62000 | all);
    let root = bench.cpu().control.cr3;
    assert!(bench.cpu().write_cr3(root).is_ok());
    assert_eq!(bench.cpu().read::<u64>(PAGE).ok(), Some(3));
}

/// Runs vCPU 0 until everything is halted.
fn run_to_halt(bench: &mut Bench) {
    assert_eq!(bench.vcpus[0].run().unwrap(), Exit::AllHalted);
}

#[test]
fn code_that_changes_the_next_instruction_executes_the_new_one() {
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    // Three passes, so that the block is cached when its own store changes it: `mov eax, N` gets another N each time.
    bench.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 3)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(CODE + 0x101), ecx)?;
        a.jmp(CODE + 0x100)
    });
    bench.assemble(64, CODE + 0x100, |a| {
        a.mov(eax, 0x7777)?;
        a.shl(ebx, 4)?;
        a.add(ebx, eax)?;
        a.dec(ecx)?;
        a.jne(CODE + 7)?;
        a.cli()?;
        a.hlt()
    });
    assert_eq!(bench.get32(CODE + 7) & 0xff, 0x89, "the loop starts where the test thinks");
    bench.load(&state);
    run_to_halt(&mut bench);
    assert_eq!(bench.cpu().user.gpr[3], 0x321);
    assert!(bench.cpu().counters.code_writes >= 2);
}

#[test]
fn an_instruction_across_pages_faults_on_the_second_and_resumes() {
    let mut bench = Bench::new(1);
    let mut state = bench.long_mode(0);
    let at = PAGE + 0xffd;
    bench.assemble(64, at, |a| a.mov(eax, 0x1234_5678));
    bench.set64(ENTRY + 8, 0);
    state.regs.rip = at;
    bench.load(&state);
    assert_eq!(bench.cpu().step(), Err(Exception::page_fault(PAGE + 0x1000, fault::I)));
    assert_eq!(bench.cpu().user.rip, at);
    bench.set64(ENTRY + 8, (PAGE + 0x1000) | pte::P);
    assert_eq!(bench.cpu().step(), Ok(()));
    assert_eq!((bench.cpu().user.gpr[0], bench.cpu().user.rip), (0x1234_5678, at + 5));
}

#[test]
fn locked_operations_of_several_processors_lose_nothing() {
    const TURNS: u32 = 20_000;
    const COUNTERS: [u64; 4] = [0x60000, 0x60101, 0x60ffe, 0x62000];
    for vcpus in [2, 4] {
        let mut bench = Bench::new(vcpus);
        let state = bench.long_mode(0);
        bench.assemble(64, CODE, |a| {
            let mut again = a.create_label();
            a.mov(ecx, TURNS)?;
            a.set_label(&mut again)?;
            // Aligned, misaligned, across pages, and by XADD.
            a.lock().inc(dword_ptr(COUNTERS[0]))?;
            a.lock().add(dword_ptr(COUNTERS[1]), 3)?;
            a.lock().inc(dword_ptr(COUNTERS[2]))?;
            a.mov(eax, 2)?;
            a.lock().xadd(qword_ptr(COUNTERS[3]), rax)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.cli()?;
            a.hlt()
        });
        for (id, vcpu) in bench.vcpus.iter_mut().enumerate() {
            let mut own = state.clone();
            own.mp_state = MpState::Running;
            own.regs.gpr[4] = STACK + 0x1000 * id as u64;
            vcpu.set_state(&own).unwrap();
        }
        let kicks: Vec<_> = bench.vcpus.iter().map(|v| v.kicker()).collect();
        std::thread::scope(|scope| {
            for vcpu in &mut bench.vcpus {
                let kicks = &kicks;
                scope.spawn(move || {
                    if vcpu.run().unwrap() == Exit::AllHalted {
                        kicks.iter().for_each(|k| k.kick());
                    }
                });
            }
        });
        let total = u64::from(TURNS * vcpus);
        assert_eq!(u64::from(bench.get32(COUNTERS[0])), total);
        assert_eq!(u64::from(bench.get32(COUNTERS[1])), 3 * total);
        assert_eq!(u64::from(bench.get32(COUNTERS[2])), total, "across pages");
        assert_eq!(bench.get64(COUNTERS[3]), 2 * total);
    }
}

#[test]
fn the_dirty_log_names_the_pages_written() {
    use engine::Vm;
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    bench.load(&state);
    attempt(bench.cpu(), PAGE, Access::Write).unwrap();
    bench.vm.set_dirty_log(0, true).unwrap();
    assert!(bench.vm.take_dirty_log(0).unwrap().iter().all(|w| *w == 0));
    attempt(bench.cpu(), PAGE + 0x2000, Access::Write).unwrap();
    attempt(bench.cpu(), PAGE, Access::Write).unwrap();
    attempt(bench.cpu(), PAGE + 0x3000, Access::Read).unwrap();
    let log = bench.vm.take_dirty_log(0).unwrap();
    let pages: Vec<u64> =
        (0..log.len() as u64 * 64).filter(|p| log[*p as usize / 64] >> (p % 64) & 1 != 0).collect();
    // The page table is written too: accessed and dirty bits.
    assert_eq!(pages, [PT >> 12, PAGE >> 12, (PAGE >> 12) + 2]);
    attempt(bench.cpu(), PAGE, Access::Write).unwrap();
    assert_eq!(
        bench.vm.take_dirty_log(0).unwrap()[PAGE as usize >> 18],
        1 << (PAGE >> 12 & 63),
        "recorded again"
    );
}
