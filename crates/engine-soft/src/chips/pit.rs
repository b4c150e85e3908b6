//! The interval timer of a PC (Intel 8254 data sheet), with the part of port 61h that belongs to it.
//!
//! A plain struct that never counts: each channel keeps when its count was loaded, and counts, outputs and
//! deadlines are derived from the time that has passed. Deadlines are whole periods after the load, so a
//! periodic channel does not drift. Channel 0's gate is wired high, and so is channel 1's; channel 2's is bit 0
//! of port 61h.
//!
//! Differences from the data sheet, none of which software can depend on: a count is loaded with the write
//! rather than one clock later, and a reload value that waits for the end of a period is saved as if it had
//! taken effect.
//!
//! The interrupt request is a pulse at each rising edge of channel 0's output. Where that is periodic (modes 2 and
//! 3), edges are counted until [`Pit::take_interrupt`] takes them, one a call: on a host that runs the guest late
//! the ticks come late, and all come, as with KVM's 8254. A kernel that waits for its timer ("IO-APIC + timer doesn't
//! work!") or that counts ticks for the time of day needs them. No more than [`BACKLOG`] are kept, none across a
//! reprogramming of the channel, and none in saved state.

use engine::state::{PitChannelState, PitState};

use super::lapic::timer::SHORTEST_PERIOD_NS;

/// Counter clock of a PC in hertz.
pub const CLOCK_HZ: u64 = 1_193_182;

/// Ticks that are kept for a guest that has not taken the ones before. At the 250 Hz of Linux that is a quarter of a
/// second, longer than a busy host leaves a processor waiting; and after a pause of any length it is the most that the
/// guest gets at once, some ten thousand instructions of interrupt handlers.
pub const BACKLOG: u64 = 64;

/// Ports of the timer.
pub mod port {
    #![allow(missing_docs)]
    pub const CHANNEL_0: u16 = 0x40;
    pub const CHANNEL_2: u16 = 0x42;
    pub const CONTROL: u16 = 0x43;
    /// "NMI status and control": gate, speaker and output of channel 2.
    pub const SYSTEM_CONTROL: u16 = 0x61;
}

/// Control word and read-back command.
mod control {
    pub const BCD: u8 = 1 << 0;
    pub const MODE_SHIFT: u32 = 1;
    pub const ACCESS_SHIFT: u32 = 4;
    pub const CHANNEL_SHIFT: u32 = 6;
    /// Channel field that makes it a read-back command.
    pub const READ_BACK: u8 = 3;
    /// Read-back: clear to latch the status.
    pub const NO_STATUS: u8 = 1 << 4;
    /// Read-back: clear to latch the count.
    pub const NO_COUNT: u8 = 1 << 5;
    /// Read-back: bit of channel 0, shifted by the channel number.
    pub const SELECT_0: u8 = 1 << 1;
    /// Status: the count was not loaded yet.
    pub const NULL_COUNT: u8 = 1 << 6;
    /// Status: state of the output.
    pub const OUT: u8 = 1 << 7;
}

/// Port 61h.
mod system {
    pub const GATE_2: u8 = 1 << 0;
    pub const SPEAKER: u8 = 1 << 1;
    /// Toggles with each refresh cycle.
    pub const REFRESH: u8 = 1 << 4;
    pub const OUT_2: u8 = 1 << 5;
    /// Refresh cycles are 15 µs apart on the original machine.
    pub const REFRESH_NS: u64 = 15_085;
}

const NS_PER_SECOND: u128 = 1_000_000_000;

/// Counter clocks in a length of time, rounded down.
fn ticks_in(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(CLOCK_HZ) / NS_PER_SECOND) as u64
}

/// Time after which that many counter clocks have passed.
fn ns_of(ticks: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NS_PER_SECOND).div_ceil(u128::from(CLOCK_HZ))).unwrap_or(u64::MAX)
}

fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

/// Time from `start_ns` to `now_ns`, zero if that is negative.
fn since(start_ns: i64, now_ns: i64) -> u64 {
    u64::try_from(now_ns.saturating_sub(start_ns)).unwrap_or(0)
}

/// How the two bytes of a count are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    Both,
}

impl Access {
    fn bits(self) -> u8 {
        match self {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        }
    }

    fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        }
    }
}

/// Operating modes by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Interrupt on terminal count.
    TerminalCount = 0,
    /// Hardware-retriggerable one-shot.
    OneShot = 1,
    /// Rate generator.
    Rate = 2,
    /// Square wave.
    Square = 3,
    /// Software-triggered strobe.
    SoftwareStrobe = 4,
    /// Hardware-triggered strobe.
    HardwareStrobe = 5,
}

impl Mode {
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Mode::TerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::Rate,
            3 | 7 => Mode::Square,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        }
    }

    fn periodic(self) -> bool {
        matches!(self, Mode::Rate | Mode::Square)
    }

    /// Starts at a rising gate rather than at the write of the count.
    fn gate_triggered(self) -> bool {
        matches!(self, Mode::OneShot | Mode::HardwareStrobe)
    }
}

/// What the counting element does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counting {
    /// No count since the control word, or no trigger since.
    Stopped,
    /// Counts down from a load at this time, which may lie before the VM's clock began.
    Since(i64),
    /// The gate holds the count after this much time.
    Held(u64),
}

/// A reload value that was written and not yet loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reload {
    count: u32,
    when: ReloadWhen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReloadWhen {
    /// At a rising gate.
    Trigger,
    /// When the period ends.
    PeriodEnd(i64),
    /// When the high half of the square wave ends; the new count times the low half.
    HighHalfEnd(i64),
}

/// `elapsed_ns` of a saved channel that is [`Counting::Stopped`]. To anyone who takes it as a time the count
/// has long run out, which in the modes concerned shows the same.
const STOPPED: u64 = u64::MAX;

#[derive(Clone, Debug)]
struct Channel {
    mode: Mode,
    bcd: bool,
    access: Access,
    /// Reload value in clocks: 1 to 65536.
    count: u32,
    counting: Counting,
    next_count: Option<Reload>,
    gate: bool,
    read_high: bool,
    /// The low byte of a two-byte write.
    written_low: Option<u8>,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// Rising edges of the output since the load that were noticed.
    edges: u64,
    /// Edges that were noticed and not yet taken.
    owed: u64,
    /// With periods shorter than [`SHORTEST_PERIOD_NS`]: no edge is reported before.
    quiet_until_ns: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Channel {
            mode: Mode::TerminalCount,
            bcd: false,
            access: Access::Both,
            count: 0x1_0000,
            counting: Counting::Stopped,
            next_count: None,
            gate,
            read_high: false,
            written_low: None,
            latched_count: None,
            latched_status: None,
            edges: 0,
            owed: 0,
            quiet_until_ns: 0,
        }
    }

    /// Brings the channel up to the present: notices edges and loads a reload value whose time has come.
    fn settle(&mut self, now_ns: u64) {
        if let Some(Reload { count, when: ReloadWhen::PeriodEnd(at_ns) | ReloadWhen::HighHalfEnd(at_ns) }) =
            self.next_count
            && signed(now_ns) >= at_ns
        {
            let high_half =
                self.next_count.is_some_and(|next| matches!(next.when, ReloadWhen::HighHalfEnd(_)));
            self.notice_edges(at_ns);
            let done_ns = if high_half { signed(ns_of(u64::from(count).div_ceil(2))) } else { 0 };
            self.load(count, at_ns.saturating_sub(done_ns));
        }
        self.notice_edges(signed(now_ns));
    }

    /// Loads the counting element.
    fn load(&mut self, count: u32, now_ns: i64) {
        self.next_count = None;
        self.count = count;
        self.edges = 0;
        self.counting = match self.gate || self.mode.gate_triggered() {
            true => Counting::Since(now_ns),
            false => Counting::Held(0),
        };
    }

    /// Clocks since the load; `None` if there was none.
    fn elapsed(&self, now_ns: u64) -> Option<u64> {
        match self.counting {
            Counting::Stopped => None,
            Counting::Since(start_ns) => Some(ticks_in(since(start_ns, signed(now_ns)))),
            Counting::Held(ns) => Some(ticks_in(ns)),
        }
    }

    /// The output, `elapsed` clocks after the load.
    fn out(&self, now_ns: u64) -> bool {
        let count = u64::from(self.count);
        match (self.mode, self.elapsed(now_ns)) {
            (Mode::TerminalCount, None) => false,
            (_, None) => true,
            (Mode::TerminalCount | Mode::OneShot, Some(elapsed)) => elapsed >= count,
            // A low gate forces the output of the periodic modes high.
            (Mode::Rate | Mode::Square, Some(_)) if !self.gate => true,
            (Mode::Rate, Some(elapsed)) => elapsed % count != count - 1,
            (Mode::Square, Some(elapsed)) => elapsed % count < count.div_ceil(2),
            (Mode::SoftwareStrobe | Mode::HardwareStrobe, Some(elapsed)) => elapsed != count,
        }
    }

    /// The counting element, as 16 bits in the channel's number format.
    fn current(&self, now_ns: u64) -> u16 {
        let count = u64::from(self.count);
        let modulus: u64 = if self.bcd { 10_000 } else { 0x1_0000 };
        let elapsed = self.elapsed(now_ns).unwrap_or(0);
        let value = match self.mode {
            Mode::Rate => count - elapsed % count,
            Mode::Square => {
                // Counts by twos through each half; an odd count spends the extra clock in the high half.
                let phase = elapsed % count;
                let high = count.div_ceil(2);
                let phase = if phase < high { phase } else { phase - high };
                (count & !1).saturating_sub(2 * phase)
            }
            // Goes on below zero.
            _ => (count + modulus - elapsed % modulus) % modulus,
        };
        self.encode((value % modulus) as u16)
    }

    fn encode(&self, value: u16) -> u16 {
        if !self.bcd {
            return value;
        }
        (0..4).fold(0, |bcd, digit| bcd | (value / 10u16.pow(digit) % 10) << (4 * digit))
    }

    /// A reload value as written, in clocks. Nonsense BCD digits count for what their bits are worth.
    fn decode(&self, value: u16) -> u32 {
        if !self.bcd {
            return if value == 0 { 0x1_0000 } else { value.into() };
        }
        let clocks: u32 = (0..4).map(|digit| u32::from(value >> (4 * digit) & 0xf) * 10u32.pow(digit)).sum();
        if clocks == 0 { 10_000 } else { clocks }
    }

    fn set_control(&mut self, word: u8) {
        self.mode = Mode::from_bits(word >> control::MODE_SHIFT);
        self.bcd = word & control::BCD != 0;
        self.access = Access::from_bits(word >> control::ACCESS_SHIFT);
        self.count = self.decode(0);
        self.counting = Counting::Stopped;
        self.next_count = None;
        self.read_high = false;
        self.written_low = None;
        self.latched_count = None;
        self.latched_status = None;
        self.edges = 0;
        self.owed = 0;
    }

    fn latch_count(&mut self, now_ns: u64) {
        // A second latch command before the first was read is ignored.
        if self.latched_count.is_none() {
            self.latched_count = Some(self.current(now_ns));
        }
    }

    fn latch_status(&mut self, now_ns: u64) {
        if self.latched_status.is_none() {
            let null = self.counting == Counting::Stopped || self.next_count.is_some();
            let bit = |set: bool, bit: u8| if set { bit } else { 0 };
            self.latched_status = Some(
                bit(self.out(now_ns), control::OUT)
                    | bit(null, control::NULL_COUNT)
                    | self.access.bits() << control::ACCESS_SHIFT
                    | (self.mode as u8) << control::MODE_SHIFT
                    | bit(self.bcd, control::BCD),
            );
        }
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.current(now_ns)).to_le_bytes();
        match self.access {
            Access::Low => {
                self.latched_count = None;
                low
            }
            Access::High => {
                self.latched_count = None;
                high
            }
            Access::Both if !self.read_high => {
                self.read_high = true;
                low
            }
            Access::Both => {
                self.read_high = false;
                self.latched_count = None;
                high
            }
        }
    }

    fn write(&mut self, value: u8, now_ns: u64) {
        self.owed = 0;
        let written = match (self.access, self.written_low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.written_low = Some(value);
                if self.mode == Mode::TerminalCount {
                    // The first byte stops the count and takes the output low.
                    self.counting = Counting::Stopped;
                    self.edges = 0;
                }
                return;
            }
        };
        let count = self.decode(written);
        match self.counting {
            _ if self.mode.gate_triggered() => {
                self.next_count = Some(Reload { count, when: ReloadWhen::Trigger });
            }
            Counting::Since(start_ns) if self.mode.periodic() => {
                // The running period (of the square wave, half period) goes on to its end.
                let period = u64::from(self.count);
                let elapsed = ticks_in(since(start_ns, signed(now_ns)));
                let phase = elapsed % period;
                let high = period.div_ceil(2);
                let at = |ticks| start_ns.saturating_add(signed(ns_of(ticks)));
                let when = if self.mode == Mode::Square && phase < high {
                    ReloadWhen::HighHalfEnd(at(elapsed - phase + high))
                } else {
                    ReloadWhen::PeriodEnd(at(elapsed - phase + period))
                };
                self.next_count = Some(Reload { count, when });
            }
            _ => self.load(count, signed(now_ns)),
        }
    }

    fn set_gate(&mut self, gate: bool, now_ns: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        let now = signed(now_ns);
        match (self.mode, self.counting) {
            (Mode::OneShot | Mode::HardwareStrobe, counting) => {
                if gate && (counting != Counting::Stopped || self.next_count.is_some()) {
                    self.load(self.written_count(), now);
                }
            }
            (Mode::Rate | Mode::Square, Counting::Since(start_ns)) => {
                // Stopped, with the output high; a rising gate starts afresh.
                self.counting = Counting::Held(since(start_ns, now));
                if let Some(next) = &mut self.next_count {
                    next.when = ReloadWhen::Trigger;
                }
            }
            (Mode::Rate | Mode::Square, Counting::Held(_)) => self.load(self.written_count(), now),
            (_, Counting::Since(start_ns)) => self.counting = Counting::Held(since(start_ns, now)),
            (_, Counting::Held(elapsed_ns)) => {
                self.counting = Counting::Since(now.saturating_sub(signed(elapsed_ns)));
            }
            (_, Counting::Stopped) => {}
        }
    }

    /// The reload value last written.
    fn written_count(&self) -> u32 {
        self.next_count.map_or(self.count, |next| next.count)
    }

    /// Rising edges of the output in the first `elapsed` clocks after the load.
    fn edges_in(&self, elapsed: u64) -> u64 {
        let count = u64::from(self.count);
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => u64::from(elapsed >= count),
            Mode::Rate | Mode::Square => elapsed / count,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => u64::from(elapsed > count),
        }
    }

    /// A periodic channel slow enough for each of its edges to be an interrupt of its own.
    fn counts_ticks(&self) -> bool {
        self.mode.periodic() && ns_of(u64::from(self.count)) >= SHORTEST_PERIOD_NS
    }

    fn notice_edges(&mut self, now_ns: i64) {
        let Counting::Since(start_ns) = self.counting else { return };
        let edges = self.edges_in(ticks_in(since(start_ns, now_ns)));
        if edges > self.edges {
            let most = if self.counts_ticks() { BACKLOG } else { 1 };
            self.owed = (self.owed + (edges - self.edges)).min(most);
            self.edges = edges;
        }
    }

    /// Whether the output has risen more often than [`Channel::take_edge`] has said.
    fn has_edge(&mut self, now_ns: u64) -> bool {
        self.settle(now_ns);
        self.owed != 0 && now_ns >= self.quiet_until_ns
    }

    /// Takes one rise of the output; false if there was none.
    fn take_edge(&mut self, now_ns: u64) -> bool {
        if !self.has_edge(now_ns) {
            return false;
        }
        self.owed -= 1;
        if self.mode.periodic() && !self.counts_ticks() {
            self.quiet_until_ns = now_ns.saturating_add(SHORTEST_PERIOD_NS);
        }
        true
    }

    /// When there will be an edge that is not there yet.
    fn deadline_ns(&self) -> Option<u64> {
        if self.owed != 0 && !self.counts_ticks() {
            return Some(self.quiet_until_ns);
        }
        let Counting::Since(start_ns) = self.counting else { return None };
        let count = u64::from(self.count);
        let ticks = match self.mode {
            Mode::Rate | Mode::Square => count.saturating_mul(self.edges + 1),
            _ if self.edges != 0 => return None,
            Mode::TerminalCount | Mode::OneShot => count,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => count + 1,
        };
        let mut deadline = start_ns.saturating_add(signed(ns_of(ticks)));
        if let Some(Reload { when: ReloadWhen::HighHalfEnd(at_ns), .. }) = self.next_count {
            deadline = deadline.min(at_ns);
        }
        Some(u64::try_from(deadline).unwrap_or(0).max(self.quiet_until_ns))
    }

    fn state(&self, now_ns: u64) -> PitChannelState {
        PitChannelState {
            count: self.written_count() & 0xffff,
            mode: self.mode as u8,
            bcd: self.bcd,
            access: self.access.bits(),
            read_high: self.read_high,
            write_high: self.written_low.is_some(),
            write_latch: self.written_low.unwrap_or(0),
            latched_count: self.latched_count,
            latched_status: self.latched_status,
            gate: self.gate,
            elapsed_ns: match self.counting {
                Counting::Stopped => STOPPED,
                Counting::Since(start_ns) => since(start_ns, signed(now_ns)),
                Counting::Held(elapsed_ns) => elapsed_ns,
            },
        }
    }

    fn set_state(&mut self, state: &PitChannelState, gate: bool, now_ns: u64) {
        let mut channel = Channel::new(gate);
        channel.mode = Mode::from_bits(state.mode);
        channel.bcd = state.bcd;
        channel.access = Access::from_bits(state.access);
        channel.count = match (state.count & 0xffff, state.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (count, _) => count,
        };
        channel.counting = match state.elapsed_ns {
            STOPPED => Counting::Stopped,
            elapsed_ns if gate || channel.mode.gate_triggered() => {
                Counting::Since(signed(now_ns).saturating_sub(signed(elapsed_ns)))
            }
            elapsed_ns => Counting::Held(elapsed_ns),
        };
        if channel.counting == Counting::Stopped && channel.mode.gate_triggered() {
            channel.next_count = Some(Reload { count: channel.count, when: ReloadWhen::Trigger });
        }
        channel.read_high = state.read_high;
        channel.written_low = state.write_high.then_some(state.write_latch);
        channel.latched_count = state.latched_count;
        channel.latched_status = state.latched_status;
        // Edges in the past were delivered before the state was saved, or are given up.
        channel.settle(now_ns);
        channel.owed = 0;
        *self = channel;
    }
}

/// The timer with its three channels.
#[derive(Clone, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    speaker_data: bool,
}

/// The channel whose gate and output are in port 61h.
const SPEAKER_CHANNEL: usize = 2;

impl Default for Pit {
    fn default() -> Self {
        Pit { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], speaker_data: false }
    }
}

impl Pit {
    /// Reads a port.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        self.channels.iter_mut().for_each(|channel| channel.settle(now_ns));
        match port {
            port::CHANNEL_0..=port::CHANNEL_2 => {
                self.channels[usize::from(port - port::CHANNEL_0)].read(now_ns)
            }
            port::SYSTEM_CONTROL => {
                let speaker = &self.channels[SPEAKER_CHANNEL];
                let refresh = !(now_ns / system::REFRESH_NS).is_multiple_of(2);
                let bit = |set: bool, bit: u8| if set { bit } else { 0 };
                bit(speaker.gate, system::GATE_2)
                    | bit(self.speaker_data, system::SPEAKER)
                    | bit(refresh, system::REFRESH)
                    | bit(speaker.out(now_ns), system::OUT_2)
            }
            // The control word cannot be read.
            _ => 0xff,
        }
    }

    /// Writes a port. Programming channel 0 gives up requests that were not taken.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        self.channels.iter_mut().for_each(|channel| channel.settle(now_ns));
        match port {
            port::CHANNEL_0..=port::CHANNEL_2 => {
                self.channels[usize::from(port - port::CHANNEL_0)].write(value, now_ns);
            }
            port::CONTROL => self.control(value, now_ns),
            port::SYSTEM_CONTROL => {
                self.speaker_data = value & system::SPEAKER != 0;
                self.channels[SPEAKER_CHANNEL].set_gate(value & system::GATE_2 != 0, now_ns);
            }
            _ => {}
        }
    }

    fn control(&mut self, word: u8, now_ns: u64) {
        match word >> control::CHANNEL_SHIFT {
            control::READ_BACK => {
                for (number, channel) in self.channels.iter_mut().enumerate() {
                    if word & control::SELECT_0 << number == 0 {
                        continue;
                    }
                    if word & control::NO_COUNT == 0 {
                        channel.latch_count(now_ns);
                    }
                    if word & control::NO_STATUS == 0 {
                        channel.latch_status(now_ns);
                    }
                }
            }
            number => {
                let channel = &mut self.channels[usize::from(number)];
                if word >> control::ACCESS_SHIFT & 3 == 0 {
                    channel.latch_count(now_ns);
                } else {
                    channel.set_control(word);
                }
            }
        }
    }

    /// Whether channel 0 requests an interrupt: [`Pit::take_interrupt`] would be true.
    pub fn has_interrupt(&mut self, now_ns: u64) -> bool {
        self.channels[0].has_edge(now_ns)
    }

    /// Whether a request may wait while an earlier one has not been taken by a processor. If not, it is to be taken at
    /// once, and the interrupt controller makes one of the two.
    pub fn can_wait(&self) -> bool {
        self.channels[0].counts_ticks()
    }

    /// Takes one rise of channel 0's output, that is, one request of an interrupt; false if there was none that earlier
    /// calls did not take.
    pub fn take_interrupt(&mut self, now_ns: u64) -> bool {
        self.channels[0].take_edge(now_ns)
    }

    /// When there will be a request that is not there yet.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.channels[0].deadline_ns()
    }

    /// The registers as data.
    pub fn state(&mut self, now_ns: u64) -> PitState {
        self.channels.iter_mut().for_each(|channel| channel.settle(now_ns));
        PitState {
            channels: [0, 1, 2].map(|number: usize| self.channels[number].state(now_ns)),
            speaker_data: self.speaker_data,
        }
    }

    /// Loads saved registers; counts go on from where they were.
    pub fn set_state(&mut self, state: &PitState, now_ns: u64) {
        for (number, (channel, saved)) in self.channels.iter_mut().zip(&state.channels).enumerate() {
            let gate = number != SPEAKER_CHANNEL || saved.gate;
            channel.set_state(saved, gate, now_ns);
        }
        self.speaker_data = state.speaker_data;
    }
}

#[cfg(test)]
mod tests;
