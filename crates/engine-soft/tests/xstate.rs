//! XRSTOR's faults, in the order in which a processor finds them.

mod common;

use common::*;
use iced_x86::code_asm::*;
use x86::Exception;
use x86::bits::cr4;
use x86::xsave::component::{AVX, SSE, X87};

const ALL: u64 = X87 | SSE | AVX;
/// The start of a page.
const PAGE: u64 = 0x30000;
const HEADER_END: u64 = 576;
const AREA_END: u64 = 832;

const fn page_fault(gva: u64) -> Option<Exception> {
    Some(Exception::page_fault(gva, 0))
}
const GP: Option<Exception> = Some(Exception::gp(0));

/// An area in memory, and what is wrong with it.
struct Case {
    what: &'static str,
    area: u64,
    /// Pages that are not present.
    holes: &'static [u64],
    /// EDX:EAX.
    wanted: u64,
    /// XSTATE_BV.
    present: u64,
    /// Writes this byte.
    byte: Option<(u64, u8)>,
    fault: Option<Exception>,
}

const NOTHING_WRONG: Case = Case {
    what: "nothing wrong",
    area: PAGE,
    holes: &[],
    wanted: ALL,
    present: ALL,
    byte: None,
    fault: None,
};

/// Header at the end of a page, nothing after it.
const CUT: Case = Case { area: PAGE - HEADER_END, holes: &[PAGE], ..NOTHING_WRONG };
/// Header at the start of a page, nothing before it.
const HEADLESS: Case = Case { area: PAGE - 512, holes: &[PAGE - 0x1000], ..NOTHING_WRONG };
const XCOMP_BV: u64 = 520;
const MXCSR_HIGH: u64 = 27;

#[test]
fn xrstor_judges_the_header_before_it_looks_behind_it() {
    // All of these were seen on a processor, the fault addresses too.
    let behind = page_fault(CUT.area + AREA_END - 1);
    let before = page_fault(HEADLESS.area);
    for case in [
        NOTHING_WRONG,
        Case { what: "cut", fault: behind, ..CUT },
        Case { what: "cut; AVX not present", present: X87 | SSE, fault: behind, ..CUT },
        Case { what: "cut; AVX not wanted", wanted: X87 | SSE, ..CUT },
        Case { what: "cut; unknown component", present: ALL | 1 << 62, fault: GP, ..CUT },
        Case { what: "cut; compacted", byte: Some((XCOMP_BV + 7, 0x80)), fault: GP, ..CUT },
        Case { what: "cut; reserved byte", byte: Some((XCOMP_BV + 15, 1)), fault: GP, ..CUT },
        Case { what: "cut; free byte", byte: Some((XCOMP_BV + 16, 1)), fault: behind, ..CUT },
        Case { what: "cut; bad MXCSR", byte: Some((MXCSR_HIGH, 0xff)), fault: behind, ..CUT },
        Case { what: "bad MXCSR", byte: Some((MXCSR_HIGH, 0xff)), fault: GP, ..NOTHING_WRONG },
        Case {
            what: "bad MXCSR for AVX",
            wanted: AVX,
            byte: Some((MXCSR_HIGH, 0xff)),
            fault: GP,
            ..NOTHING_WRONG
        },
        Case { what: "bad MXCSR, not wanted", wanted: X87, byte: Some((MXCSR_HIGH, 0xff)), ..NOTHING_WRONG },
        Case { what: "headless", fault: before, ..HEADLESS },
        Case { what: "headless; nothing wanted", wanted: 0, fault: before, ..HEADLESS },
        Case { what: "headless; unknown component", present: 1 << 62, fault: before, ..HEADLESS },
        Case {
            what: "no header",
            area: PAGE - 512,
            holes: &[PAGE],
            wanted: 0,
            fault: page_fault(PAGE),
            ..NOTHING_WRONG
        },
    ] {
        let mut bench = Bench::new(1);
        let mut state = bench.long_mode(0);
        state.control.cr4 |= cr4::OSXSAVE;
        state.control.xcr0 = ALL;
        state.regs.gpr[0] = case.wanted & 0xffff_ffff;
        state.regs.gpr[2] = case.wanted >> 32;
        state.regs.gpr[3] = case.area;
        bench.set32(case.area + 24, 0x1f80);
        bench.set64(case.area + 512, case.present);
        if let Some((offset, value)) = case.byte {
            bench.write(case.area + offset, &[value]);
        }
        for hole in case.holes {
            bench.set64(PT + 8 * (hole >> 12), 0);
        }
        bench.assemble(64, CODE, |a| a.xrstor64(ptr(rbx)));
        bench.load(&state);
        let vectors = bench.cpu().user.vector;
        let found = bench.cpu().step().err();
        assert_eq!(found, case.fault, "{}", case.what);
        if found.is_some() {
            assert_eq!(bench.cpu().user.vector, vectors, "{}: a fault changes nothing", case.what);
        }
    }
}
