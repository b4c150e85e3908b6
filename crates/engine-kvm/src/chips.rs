//! The 8259s, the IOAPIC and the 8254 between KVM's structures and [`ChipState`].
//!
//! KVM keeps an IOAPIC input's level and a pending request in one bit, and starts each 8254 count anew when it is
//! loaded; a timer's phase is therefore not kept across a load.

use engine::state::{IoApicState, PicState, PitChannelState, PitState};
use engine::{ChipState, Result};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use crate::error::host;

/// IOAPIC redirection entry: trigger mode (82093AA §3.2.4).
const REDIRECTION_LEVEL: u64 = 1 << 15;

/// What KVM's `count_latched`, `read_state` and `write_state` mean.
mod access {
    pub(super) const HIGH: u8 = 2;
    pub(super) const LOW_THEN_HIGH: u8 = 3;
    /// Low byte done, high byte next.
    pub(super) const HIGH_OF_TWO: u8 = 4;
}

/// KVM's mode of a channel that has not had a control word; in the state such a one has no access mode.
const NOT_PROGRAMMED: u8 = 0xff;

pub(crate) fn save(vm: &VmFd) -> Result<ChipState> {
    let now = monotonic_ns();
    let pit = vm.get_pit2().map_err(host("reading KVM's 8254"))?;
    Ok(ChipState {
        pic_master: pic_from(&get_pic(vm, KVM_IRQCHIP_PIC_MASTER)?),
        pic_slave: pic_from(&get_pic(vm, KVM_IRQCHIP_PIC_SLAVE)?),
        ioapic: ioapic_from(&get_ioapic(vm)?),
        pit: PitState {
            channels: std::array::from_fn(|n| channel_from(&pit.channels[n], now)),
            speaker_data: pit.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0,
        },
    })
}

pub(crate) fn load(vm: &VmFd, state: &ChipState) -> Result<()> {
    for (chip_id, pic) in
        [(KVM_IRQCHIP_PIC_MASTER, &state.pic_master), (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave)]
    {
        // What KVM keeps beyond the state (which inputs may be level-triggered) stays as it is.
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        chip.chip.pic = pic_to(pic, &get_pic(vm, chip_id)?);
        vm.set_irqchip(&chip).map_err(host("loading KVM's 8259"))?;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    chip.chip.ioapic = ioapic_to(&state.ioapic, &get_ioapic(vm)?);
    vm.set_irqchip(&chip).map_err(host("loading KVM's IOAPIC"))?;

    let old = vm.get_pit2().map_err(host("reading KVM's 8254"))?;
    let speaker = if state.pit.speaker_data { KVM_PIT_FLAGS_SPEAKER_DATA_ON } else { 0 };
    let pit = kvm_pit_state2 {
        channels: std::array::from_fn(|n| channel_to(&state.pit.channels[n])),
        flags: old.flags & !KVM_PIT_FLAGS_SPEAKER_DATA_ON | speaker,
        ..Default::default()
    };
    vm.set_pit2(&pit).map_err(host("loading KVM's 8254"))
}

fn get_pic(vm: &VmFd, chip_id: u32) -> Result<kvm_pic_state> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(host("reading KVM's 8259"))?;
    // SAFETY: the kernel has just filled this member, which is made of integers.
    Ok(unsafe { chip.chip.pic })
}

fn get_ioapic(vm: &VmFd) -> Result<kvm_ioapic_state> {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(host("reading KVM's IOAPIC"))?;
    // SAFETY: as above.
    Ok(unsafe { chip.chip.ioapic })
}

fn pic_from(pic: &kvm_pic_state) -> PicState {
    PicState {
        irr: pic.irr,
        isr: pic.isr,
        imr: pic.imr,
        lines: pic.last_irr,
        level_triggered: pic.elcr,
        priority_base: pic.priority_add,
        vector_base: pic.irq_base,
        // KVM counts the words that it has seen, from ICW1 on.
        init_step: if pic.init_state == 0 { 0 } else { pic.init_state + 1 },
        needs_icw4: pic.init4 != 0,
        auto_eoi: pic.auto_eoi != 0,
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi != 0,
        special_mask: pic.special_mask != 0,
        special_fully_nested: pic.special_fully_nested_mode != 0,
        read_isr: pic.read_reg_select != 0,
        poll: pic.poll != 0,
    }
}

fn pic_to(state: &PicState, old: &kvm_pic_state) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: state.lines,
        irr: state.irr,
        imr: state.imr,
        isr: state.isr,
        priority_add: state.priority_base & 7,
        irq_base: state.vector_base,
        read_reg_select: state.read_isr.into(),
        poll: state.poll.into(),
        special_mask: state.special_mask.into(),
        init_state: state.init_step.saturating_sub(1).min(3),
        auto_eoi: state.auto_eoi.into(),
        rotate_on_auto_eoi: state.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: state.special_fully_nested.into(),
        init4: state.needs_icw4.into(),
        elcr: state.level_triggered & old.elcr_mask,
        elcr_mask: old.elcr_mask,
    }
}

fn ioapic_from(ioapic: &kvm_ioapic_state) -> IoApicState {
    IoApicState {
        id: (ioapic.id & 0xff) as u8,
        select: (ioapic.ioregsel & 0xff) as u8,
        lines: ioapic.irr,
        // SAFETY: both members of the union are plain bits of the same size.
        redirection: std::array::from_fn(|n| unsafe { ioapic.redirtbl[n].bits }),
    }
}

fn ioapic_to(state: &IoApicState, old: &kvm_ioapic_state) -> kvm_ioapic_state {
    let mut ioapic = *old;
    ioapic.ioregsel = state.select.into();
    ioapic.id = state.id.into();
    // KVM delivers each bit set here as if the input had just been asserted. For an edge-triggered input that is
    // merely still high, that would be an interrupt which has been delivered before.
    let level = |n: usize| state.redirection[n] & REDIRECTION_LEVEL != 0;
    ioapic.irr =
        (0..state.redirection.len()).filter(|n| level(*n)).fold(0, |bits, n| bits | (state.lines & 1 << n));
    for (entry, bits) in ioapic.redirtbl.iter_mut().zip(state.redirection) {
        entry.bits = bits;
    }
    ioapic
}

fn channel_from(channel: &kvm_pit_channel_state, now_ns: i64) -> PitChannelState {
    let latched = channel.count_latched != 0;
    let two_bytes = channel.rw_mode == access::LOW_THEN_HIGH;
    PitChannelState {
        count: if channel.count == 0x1_0000 { 0 } else { channel.count },
        mode: if channel.mode == NOT_PROGRAMMED { 0 } else { channel.mode },
        bcd: channel.bcd != 0,
        access: channel.rw_mode,
        // A latched count has its own place in the sequence of two bytes.
        read_high: two_bytes
            && if latched {
                channel.count_latched == access::HIGH
            } else {
                channel.read_state == access::HIGH_OF_TWO
            },
        write_high: two_bytes && channel.write_state == access::HIGH_OF_TWO,
        write_latch: channel.write_latch,
        latched_count: latched.then_some(channel.latched_count),
        latched_status: (channel.status_latched != 0).then_some(channel.status),
        gate: channel.gate != 0,
        elapsed_ns: u64::try_from(now_ns.saturating_sub(channel.count_load_time)).unwrap_or(0),
    }
}

fn channel_to(state: &PitChannelState) -> kvm_pit_channel_state {
    let two_bytes = state.access == access::LOW_THEN_HIGH;
    let sequence = |high: bool| if two_bytes && high { access::HIGH_OF_TWO } else { state.access & 3 };
    kvm_pit_channel_state {
        count: state.count & 0xffff,
        latched_count: state.latched_count.unwrap_or(0),
        count_latched: match state.latched_count {
            None => 0,
            Some(_) if two_bytes && state.read_high => access::HIGH,
            Some(_) => state.access & 3,
        },
        status_latched: state.latched_status.is_some().into(),
        status: state.latched_status.unwrap_or(0),
        read_state: sequence(state.read_high && state.latched_count.is_none()),
        write_state: sequence(state.write_high),
        write_latch: state.write_latch,
        rw_mode: state.access & 3,
        // Modes 6 and 7 are 2 and 3 (8254 data sheet, "Control word format").
        mode: match state.mode & 7 {
            _ if state.access & 3 == 0 => NOT_PROGRAMMED,
            mode @ 0..=5 => mode,
            mode => mode & 3,
        },
        bcd: state.bcd.into(),
        gate: state.gate.into(),
        count_load_time: 0,
    }
}

/// The clock that KVM stamps counts with.
fn monotonic_ns() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours and the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initialisation_words_are_counted_alike() {
        for (kvm, ours) in [(0, 0), (1, 2), (2, 3), (3, 4)] {
            let pic = kvm_pic_state { init_state: kvm, elcr_mask: 0xf8, ..Default::default() };
            assert_eq!(pic_from(&pic).init_step, ours);
            assert_eq!(pic_to(&pic_from(&pic), &pic), pic);
        }
    }

    #[test]
    fn an_edge_that_was_delivered_is_not_delivered_again() {
        let mut state = IoApicState { lines: 0b11, ..Default::default() };
        state.redirection[1] = REDIRECTION_LEVEL | 0x31;
        state.redirection[0] = 0x30;
        assert_eq!(ioapic_to(&state, &kvm_ioapic_state::default()).irr, 0b10);
    }

    #[test]
    fn half_read_counts_survive() {
        let half_latched = kvm_pit_channel_state {
            count: 0x1_0000,
            latched_count: 0x1234,
            count_latched: access::HIGH,
            read_state: 3,
            write_state: access::HIGH_OF_TWO,
            write_latch: 0x56,
            rw_mode: 3,
            mode: 2,
            gate: 1,
            ..Default::default()
        };
        let state = channel_from(&half_latched, 0);
        assert_eq!(
            (state.count, state.latched_count, state.read_high, state.write_high),
            (0, Some(0x1234), true, true)
        );
        assert_eq!(channel_to(&state), kvm_pit_channel_state { count: 0, ..half_latched });
    }
}
