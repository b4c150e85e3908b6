//! A vCPU's state between KVM's structures and [`VcpuState`].

use engine::state::{PendingEvents, Segments};
use engine::{EngineError, LapicState, MpState, Result, VcpuState};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs,
    kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use x86::bits::{cr4, efer, rflags};
use x86::regs::{Gpr, attr};
use x86::{ControlRegisters, DebugRegisters, DescriptorTable, Exception, Registers, Segment, Vector, msr};

use crate::error::host;
use crate::msrs;
use crate::vm::VmShared;

/// Bits of `kvm_vcpu_events.interrupt.shadow` (Linux `arch/x86/include/uapi/asm/kvm.h`).
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
/// Registers of a LAPIC page and the distance between two of them.
const LAPIC_REGISTERS: usize = 64;
const LAPIC_STRIDE: usize = 16;

/// Reads everything. The vCPU must not be in KVM_RUN.
pub(crate) fn save(fd: &VcpuFd, vm: &VmShared) -> Result<VcpuState> {
    // First, since asking for it makes KVM act on INIT and SIPI that have arrived.
    let mp_state = fd.get_mp_state().map_err(host("reading a vCPU's run state"))?;
    let regs = fd.get_regs().map_err(host("reading a vCPU's registers"))?;
    let sregs = fd.get_sregs().map_err(host("reading a vCPU's system registers"))?;
    refuse_nested(fd, &sregs)?;
    let xcrs = fd.get_xcrs().map_err(host("reading a vCPU's XCR0"))?;
    let debug = fd.get_debug_regs().map_err(host("reading a vCPU's debug registers"))?;
    let xsave = fd.get_xsave().map_err(host("reading a vCPU's XSAVE image"))?;
    let lapic = fd.get_lapic().map_err(host("reading a vCPU's LAPIC"))?;
    let events = fd.get_vcpu_events().map_err(host("reading a vCPU's pending events"))?;
    let mut values = msrs::read(fd, &vm.msrs)?;
    values.push((msr::APIC_BASE, sregs.apic_base));

    let image: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(VcpuState {
        regs: registers_from(&regs),
        segments: segments_from(&sregs),
        control: ControlRegisters {
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            xcr0: xcr0_from(&xcrs),
        },
        debug: DebugRegisters { dr: debug.db, dr6: debug.dr6, dr7: debug.dr7 },
        msrs: values,
        xsave: vm.host_layout.to_fixed(&image),
        lapic: lapic_from(&lapic),
        mp_state: mp_state_from(mp_state)?,
        events: events_from(&events, sregs.cr2)?,
    })
}

/// Loads everything. The vCPU must not be in KVM_RUN.
pub(crate) fn load(fd: &VcpuFd, vm: &VmShared, state: &VcpuState) -> Result<()> {
    let xcr0 = state.control.xcr0 | x86::xsave::component::X87;
    if xcr0 & !vm.host_layout.known() != 0 {
        return Err(missing_components(xcr0 & !vm.host_layout.known()));
    }
    if state.xsave.len() < x86::xsave::MIN_BYTES {
        return Err(EngineError::InvalidState(format!(
            "the XSAVE image has {} bytes, fewer than legacy region and header take",
            state.xsave.len()
        )));
    }
    let image = vm.host_layout.to_host(&state.xsave).map_err(missing_components)?;

    fd.set_mp_state(mp_state_to(state.mp_state)).map_err(host("loading a vCPU's run state"))?;
    // The APIC base decides how KVM reads the LAPIC page, and CR4.OSXSAVE whether it takes XCR0.
    fd.set_sregs(&sregs_to(state)).map_err(host("loading a vCPU's system registers"))?;
    fd.set_regs(&registers_to(&state.regs)).map_err(host("loading a vCPU's registers"))?;
    if vm.has_xcrs {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = xcr0;
        fd.set_xcrs(&xcrs).map_err(host("loading a vCPU's XCR0"))?;
    }
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(image.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    // SAFETY: KVM reads more than `kvm_xsave` only if dynamically enabled components (AMX) were requested for the
    // process with arch_prctl, which nothing here does.
    unsafe { fd.set_xsave(&xsave) }.map_err(host("loading a vCPU's XSAVE image"))?;
    let debug = kvm_debugregs {
        db: state.debug.dr,
        dr6: state.debug.dr6,
        dr7: state.debug.dr7,
        ..Default::default()
    };
    fd.set_debug_regs(&debug).map_err(host("loading a vCPU's debug registers"))?;
    fd.set_lapic(&lapic_to(&state.lapic)?).map_err(host("loading a vCPU's LAPIC"))?;

    // Writing the TSC may move TSC_ADJUST, so that comes later. The deadline is compared with the TSC and counts only in
    // the LAPIC's deadline mode, so it comes last.
    let own_field = |index: u32| matches!(index, msr::APIC_BASE | msr::EFER | msr::FS_BASE | msr::GS_BASE);
    let mut values: Vec<(u32, u64)> =
        state.msrs.iter().copied().filter(|(index, _)| !own_field(*index)).collect();
    values.sort_by_key(|(index, _)| match *index {
        msr::TSC_DEADLINE => 2,
        msr::TSC_ADJUST => 1,
        _ => 0,
    });
    msrs::write(fd, &values)?;

    fd.set_vcpu_events(&events_to(state, vm.exception_payload))
        .map_err(host("loading a vCPU's pending events"))
}

/// A guest that is itself a hypervisor keeps state in the processor that has no engine-neutral form: it must not be
/// in the middle of its own guest.
fn refuse_nested(fd: &VcpuFd, sregs: &kvm_sregs) -> Result<()> {
    let vmx = sregs.cr4 & cr4::VMXE != 0;
    if !vmx && sregs.efer & efer::SVME == 0 {
        return Ok(());
    }
    let mut nested = KvmNestedStateBuffer::empty();
    fd.nested_state(&mut nested).map_err(host("reading a vCPU's nested state"))?;
    let flags = u32::from(nested.flags);
    if vmx || flags & KVM_STATE_NESTED_GUEST_MODE != 0 || flags & KVM_STATE_NESTED_GIF_SET == 0 {
        return Err(EngineError::Unsupported(
            "the guest runs guests of its own, whose state cannot be saved: stop them first".into(),
        ));
    }
    Ok(())
}

fn missing_components(bits: u64) -> EngineError {
    EngineError::InvalidState(format!(
        "the state uses XSAVE components {bits:#x} that this host's processor or KVM does not have"
    ))
}

fn registers_from(regs: &kvm_regs) -> Registers {
    let mut gpr = [0; 16];
    for (register, value) in [
        (Gpr::Rax, regs.rax),
        (Gpr::Rcx, regs.rcx),
        (Gpr::Rdx, regs.rdx),
        (Gpr::Rbx, regs.rbx),
        (Gpr::Rsp, regs.rsp),
        (Gpr::Rbp, regs.rbp),
        (Gpr::Rsi, regs.rsi),
        (Gpr::Rdi, regs.rdi),
        (Gpr::R8, regs.r8),
        (Gpr::R9, regs.r9),
        (Gpr::R10, regs.r10),
        (Gpr::R11, regs.r11),
        (Gpr::R12, regs.r12),
        (Gpr::R13, regs.r13),
        (Gpr::R14, regs.r14),
        (Gpr::R15, regs.r15),
    ] {
        gpr[register as usize] = value;
    }
    Registers { gpr, rip: regs.rip, rflags: regs.rflags }
}

fn registers_to(regs: &Registers) -> kvm_regs {
    let gpr = |register: Gpr| regs.gpr[register as usize];
    kvm_regs {
        rax: gpr(Gpr::Rax),
        rbx: gpr(Gpr::Rbx),
        rcx: gpr(Gpr::Rcx),
        rdx: gpr(Gpr::Rdx),
        rsi: gpr(Gpr::Rsi),
        rdi: gpr(Gpr::Rdi),
        rsp: gpr(Gpr::Rsp),
        rbp: gpr(Gpr::Rbp),
        r8: gpr(Gpr::R8),
        r9: gpr(Gpr::R9),
        r10: gpr(Gpr::R10),
        r11: gpr(Gpr::R11),
        r12: gpr(Gpr::R12),
        r13: gpr(Gpr::R13),
        r14: gpr(Gpr::R14),
        r15: gpr(Gpr::R15),
        rip: regs.rip,
        rflags: regs.rflags | rflags::RESERVED_ONE,
    }
}

fn segment_from(segment: &kvm_segment) -> Segment {
    let flag = |value: u8, bit: u16| if value != 0 { bit } else { 0 };
    Segment {
        selector: segment.selector,
        attributes: u16::from(segment.type_ & 0xf)
            | flag(segment.s, attr::S)
            | u16::from(segment.dpl & 3) << attr::DPL_SHIFT
            | flag(segment.present, attr::P)
            | flag(segment.avl, AVL)
            | flag(segment.l, attr::L)
            | flag(segment.db, attr::DB)
            | flag(segment.g, attr::G),
        limit: segment.limit,
        base: segment.base,
        unusable: segment.unusable != 0,
    }
}

/// Bit of [`Segment::attributes`] that the architecture leaves to software.
const AVL: u16 = 1 << 12;

fn segment_to(segment: &Segment) -> kvm_segment {
    let flag = |bit: u16| u8::from(segment.attributes & bit != 0);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (segment.attributes & attr::TYPE) as u8,
        present: flag(attr::P),
        dpl: segment.dpl(),
        db: flag(attr::DB),
        s: flag(attr::S),
        l: flag(attr::L),
        g: flag(attr::G),
        avl: flag(AVL),
        unusable: u8::from(segment.unusable),
        ..Default::default()
    }
}

fn table_from(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit }
}

fn table_to(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..Default::default() }
}

fn segments_from(sregs: &kvm_sregs) -> Segments {
    Segments {
        es: segment_from(&sregs.es),
        cs: segment_from(&sregs.cs),
        ss: segment_from(&sregs.ss),
        ds: segment_from(&sregs.ds),
        fs: segment_from(&sregs.fs),
        gs: segment_from(&sregs.gs),
        ldt: segment_from(&sregs.ldt),
        tr: segment_from(&sregs.tr),
        gdt: table_from(&sregs.gdt),
        idt: table_from(&sregs.idt),
    }
}

fn sregs_to(state: &VcpuState) -> kvm_sregs {
    let segments = &state.segments;
    let control = &state.control;
    kvm_sregs {
        cs: segment_to(&segments.cs),
        ds: segment_to(&segments.ds),
        es: segment_to(&segments.es),
        fs: segment_to(&segments.fs),
        gs: segment_to(&segments.gs),
        ss: segment_to(&segments.ss),
        tr: segment_to(&segments.tr),
        ldt: segment_to(&segments.ldt),
        gdt: table_to(&segments.gdt),
        idt: table_to(&segments.idt),
        cr0: control.cr0,
        cr2: pending_page_fault(state).unwrap_or(control.cr2),
        cr3: control.cr3,
        cr4: control.cr4,
        cr8: control.cr8,
        efer: control.efer,
        apic_base: state.msr(msr::APIC_BASE).unwrap_or(msr::apic_base::DEFAULT_ADDRESS | msr::apic_base::EN),
        // An interrupt on its way is loaded with the other events.
        interrupt_bitmap: [0; 4],
    }
}

/// The address that a pending page fault will leave in CR2.
fn pending_page_fault(state: &VcpuState) -> Option<u64> {
    state.events.exception.filter(|e| e.vector == Vector::PageFault).map(|e| e.payload)
}

fn xcr0_from(xcrs: &kvm_xcrs) -> u64 {
    let present = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    xcrs.xcrs[..present]
        .iter()
        .find(|register| register.xcr == 0)
        .map_or(x86::xsave::component::X87, |register| register.value)
}

fn lapic_from(lapic: &kvm_lapic_state) -> LapicState {
    let byte = |at: usize| lapic.regs[at] as u8;
    let registers = (0..LAPIC_REGISTERS)
        .map(|n| n * LAPIC_STRIDE)
        .map(|at| u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]))
        .collect();
    LapicState { registers }
}

fn lapic_to(state: &LapicState) -> Result<kvm_lapic_state> {
    if state.registers.len() != LAPIC_REGISTERS {
        return Err(EngineError::InvalidState(format!(
            "a LAPIC has {LAPIC_REGISTERS} registers, the state has {}",
            state.registers.len()
        )));
    }
    let mut lapic = kvm_lapic_state::default();
    for (n, register) in state.registers.iter().enumerate() {
        for (k, byte) in register.to_le_bytes().into_iter().enumerate() {
            lapic.regs[n * LAPIC_STRIDE + k] = byte as _;
        }
    }
    Ok(lapic)
}

fn mp_state_from(state: kvm_mp_state) -> Result<MpState> {
    match state.mp_state {
        KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_SIPI_RECEIVED => Ok(MpState::Running),
        KVM_MP_STATE_HALTED => Ok(MpState::Halted),
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Ok(MpState::WaitForSipi),
        other => Err(EngineError::InvalidState(format!("KVM reports unknown run state {other}"))),
    }
}

fn mp_state_to(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Running => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // Unlike the state of a fresh vCPU, this one takes a SIPI whose INIT came before the state was saved.
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

fn events_from(events: &kvm_vcpu_events, cr2: u64) -> Result<PendingEvents> {
    let exception = if events.exception.injected != 0 || events.exception.pending != 0 {
        let number = events.exception.nr;
        let vector = Vector::from_number(number)
            .ok_or_else(|| EngineError::InvalidState(format!("KVM reports unknown exception {number}")))?;
        let payload = match (events.exception_has_payload != 0, vector) {
            (true, _) => events.exception_payload,
            (false, Vector::PageFault) => cr2,
            (false, _) => 0,
        };
        let error_code = if events.exception.has_error_code != 0 { events.exception.error_code } else { 0 };
        Some(Exception { vector, error_code, payload })
    } else {
        None
    };
    // An NMI that was about to be delivered blocks further ones already; undelivered, it must not block itself.
    let nmi_injected = events.nmi.injected != 0;
    Ok(PendingEvents {
        exception,
        interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
        nmi_pending: nmi_injected || events.nmi.pending != 0,
        nmi_masked: !nmi_injected && events.nmi.masked != 0,
        interrupt_shadow: events.interrupt.shadow != 0,
    })
}

fn events_to(state: &VcpuState, with_payload: bool) -> kvm_vcpu_events {
    let pending = &state.events;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if with_payload {
        events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(exception) = pending.exception {
        // A fault whose effect on CR2 or DR6 is still to come is pending; one without such an effect, or on a KVM
        // that cannot tell them apart, goes straight in.
        let has_payload =
            matches!(exception.vector, Vector::PageFault | Vector::Debug) && exception.payload != 0;
        if with_payload && has_payload {
            events.exception.pending = 1;
            events.exception_has_payload = 1;
            events.exception_payload = exception.payload;
        } else {
            events.exception.injected = 1;
        }
        events.exception.nr = exception.vector as u8;
        events.exception.has_error_code = u8::from(exception.vector.has_error_code());
        events.exception.error_code = exception.error_code;
    }
    if let Some(vector) = pending.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    events.nmi.pending = u8::from(pending.nmi_pending);
    events.nmi.masked = u8::from(pending.nmi_masked);
    if pending.interrupt_shadow {
        // Intel processors refuse an STI shadow while interrupts are disabled (SDM 3C §26.3.1.5).
        events.interrupt.shadow =
            if state.regs.rflags & rflags::IF != 0 { SHADOW_STI } else { SHADOW_MOV_SS };
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_keep_every_attribute() {
        for attributes in [0xa09b, 0xc093, 0x0082, 0x008b, 0x5fff & 0xf0ff] {
            let segment = Segment {
                selector: 0x1b,
                attributes,
                limit: 0xffff_ffff,
                base: 0x1234_5678,
                unusable: false,
            };
            assert_eq!(segment_from(&segment_to(&segment)), segment);
        }
    }

    #[test]
    fn an_nmi_in_delivery_does_not_block_itself() {
        let mut events = kvm_vcpu_events::default();
        events.nmi.injected = 1;
        events.nmi.masked = 1;
        let pending = events_from(&events, 0).unwrap();
        assert!(pending.nmi_pending && !pending.nmi_masked);
    }

    #[test]
    fn a_page_fault_keeps_its_address() {
        let mut state = VcpuState::reset(0);
        state.events.exception = Some(Exception::page_fault(0xdead_b000, 2));
        let events = events_to(&state, true);
        assert_eq!((events.exception.pending, events.exception_payload), (1, 0xdead_b000));
        assert_eq!(events_from(&events, 0).unwrap(), state.events);
        let without = events_to(&state, false);
        assert_eq!((without.exception.injected, without.exception_has_payload), (1, 0));
        assert_eq!(events_from(&without, sregs_to(&state).cr2).unwrap(), state.events);
    }

    #[test]
    fn lapic_registers_sit_sixteen_bytes_apart() {
        let mut state = LapicState::default();
        state.registers[0x32] = 0x0001_00ef;
        let kvm = lapic_to(&state).unwrap();
        assert_eq!(kvm.regs[0x320] as u8, 0xef);
        assert_eq!(lapic_from(&kvm), state);
        assert!(lapic_to(&LapicState { registers: vec![0; 3] }).is_err());
    }
}
