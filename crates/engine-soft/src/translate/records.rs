//! What is known of translated code, in few bytes: there are hundreds of thousands of units, and for each two sites and two
//! links. Records refer to each other by their numbers in their tables, and to code by offsets.

use x86::paging::PAGE_MASK;

use super::cache::Variant;
use super::flags::Place;
use super::spans::MAX_SPAN;
use crate::interp::op::{BASE_RIP, Op};
use crate::user::UserRegs;

/// In place of a record's number: there is none.
pub const NONE: u32 = u32::MAX;

/// Code that is entered from elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    /// Guest-physical address of the first byte that it was made from.
    pub gpa: u64,
    /// Its variant.
    pub variant: Variant,
    /// Generation of its page when its bytes were last known to be right.
    pub generation: u32,
    /// Offset of its code in code memory. Behind it are the bytes that it was made from.
    pub code: u32,
    /// First of its links; they are followed by those of the next unit.
    pub first_link: u32,
    /// The next unit in the same bucket of [`super::index::Index`].
    pub next_of_bucket: u32,
    /// The next unit that begins in the same page.
    pub next_of_page: u32,
    /// Bytes of code.
    pub code_len: u16,
    /// Bytes that it was made from.
    pub guest_len: u16,
    /// Where it is entered.
    pub entries: EntryOffsets,
    /// Its only instruction reaches into the next page.
    pub spans: bool,
}

/// Offsets of a unit's entries in its code.
#[derive(Clone, Copy, Debug, Default)]
pub struct EntryOffsets {
    /// With the flags in the host's register.
    pub host: u8,
    /// With the flags in memory.
    pub memory: u8,
    /// With the flags in both.
    pub both: u8,
}

impl EntryOffsets {
    /// The entry for flags that are at a place.
    pub fn of(self, flags: Place) -> u8 {
        match flags {
            Place::Host => self.host,
            Place::Memory => self.memory,
            Place::Both | Place::Repeat => self.both,
        }
    }
}

/// A place in translated code from which Rust code is called.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// The unit that it is in.
    pub unit: u32,
    displacement: i32,
    /// The span that the access is the first of, packed; 0 if it looks up for itself alone.
    span: u32,
    /// Base, index, scale and segment of the access.
    operand: u16,
    /// The instruction's offset in the page, and above it what is demanded of the access.
    place: u16,
    /// Where in the unit's code the lookup begins; without an access as [`Site::resume`].
    retry: u16,
    /// How far behind the lookup the code after the instruction begins; 0 if the unit has to be left there.
    rest: u8,
    /// Bytes accessed; 0 if the interpreter has to execute the instruction anyway.
    len: u8,
}

/// A memory access that was not found in the TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Added to the registers.
    pub displacement: i32,
    /// Register by its number in [`Op::base`].
    pub base: u8,
    /// Register by its number in [`Op::index`].
    pub index: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// The segment through which it is made.
    pub segment: u8,
    /// Bytes accessed.
    pub len: u8,
    /// It is a store, or a load of what is stored to.
    pub write: bool,
    /// What the address has to be a multiple of, a power of two, else the instruction faults before it accesses anything.
    pub alignment: u8,
}

/// Several accesses that share a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where the first access begins, from the span's first byte.
    pub offset: u16,
    /// Bytes from the span's first to its last.
    pub len: u16,
    /// One of the accesses is a store.
    pub write: bool,
    /// Which of the unit's links leads to the same instruction in a translation without spans.
    pub otherwise: u16,
}

impl Access {
    /// An access to the memory operand of an operation. `None` if the address is not as wide as addresses are in code of so many
    /// bits, or has a wide displacement.
    pub fn new(op: &Op, code_bits: u32, len: u8, write: bool, alignment: u8) -> Option<Access> {
        const NARROW: u64 = u32::MAX as u64;
        let displacement = match (code_bits, op.address_mask) {
            (64, u64::MAX) => i32::try_from(op.disp as i64).ok()?,
            (32, NARROW) => op.disp as i32,
            _ => return None,
        };
        let Op { base, index, scale, segment, .. } = *op;
        Some(Access { displacement, base, index, scale, segment, len, write, alignment })
    }

    /// The address without its segment, in 32-bit code to be truncated.
    pub fn offset(&self, user: &UserRegs) -> u64 {
        let register = |number: u8| match usize::from(number) {
            number @ 0..16 => user.gpr[number],
            _ if number == BASE_RIP => user.rip,
            _ => 0,
        };
        let (base, index) = (register(self.base), register(self.index));
        base.wrapping_add(index << self.scale).wrapping_add(self.displacement as u64)
    }
}

impl Site {
    /// Bits of an offset in a page, in `place`.
    const OFFSET: u16 = PAGE_MASK as u16;
    const ALIGNMENT_SHIFT: u32 = 12;
    const WRITE: u16 = 1 << 15;

    /// For the interpreter to execute the instruction at an offset of the page. `resume` is where in the unit's code it goes
    /// on after it, or 0.
    pub fn interpret(offset: u16, resume: u16) -> Site {
        Site {
            unit: NONE,
            displacement: 0,
            span: 0,
            operand: 0,
            place: offset,
            retry: resume,
            rest: 0,
            len: 0,
        }
    }

    /// For an access of that instruction, whose lookup begins at `retry`. `None` if the code is too long.
    pub fn access_of(offset: u16, access: Access, retry: u16, resume: u16) -> Option<Site> {
        let Access { displacement, base, index, scale, segment, len, write, alignment } = access;
        let fields = [(base, 5), (index, 5), (scale, 2), (segment, 3)];
        Some(Site {
            unit: NONE,
            displacement,
            span: 0,
            operand: fields.iter().fold(0, |packed, (field, bits)| packed << bits | u16::from(*field)),
            place: offset
                | (alignment.trailing_zeros() as u16) << Self::ALIGNMENT_SHIFT
                | if write { Self::WRITE } else { 0 },
            retry,
            rest: if resume == 0 { 0 } else { u8::try_from(resume.checked_sub(retry)?).ok()? },
            len,
        })
    }

    /// The same for the first access of a span.
    pub fn of_span(self, span: Span) -> Site {
        let Span { offset, len, write, otherwise } = span;
        let fields = [(offset, 10), (len, 10), (u16::from(write), 1), (otherwise, 11)];
        Site {
            span: fields.iter().fold(0, |packed, (field, bits)| packed << bits | u32::from(*field)),
            ..self
        }
    }

    /// The span that the access is the first of, if it is.
    pub fn span(&self) -> Option<Span> {
        let field = |shift: u32, bits: u32| (self.span >> shift & ((1 << bits) - 1)) as u16;
        let span = Span {
            offset: field(22, 10),
            len: field(12, 10),
            write: field(11, 1) != 0,
            otherwise: field(0, 11),
        };
        (self.span != 0).then_some(span)
    }

    /// The instruction's offset in the page.
    pub fn offset(&self) -> u16 {
        self.place & Self::OFFSET
    }

    /// The access that was not found in the TLB, if it is for one, and where in the unit's code its lookup begins.
    pub fn access(&self) -> Option<(Access, u16)> {
        let field = |shift: u32, bits: u32| (self.operand >> shift & ((1 << bits) - 1)) as u8;
        let access = Access {
            displacement: self.displacement,
            base: field(10, 5),
            index: field(5, 5),
            scale: field(3, 2),
            segment: field(0, 3),
            len: self.len,
            write: self.place & Self::WRITE != 0,
            alignment: 1 << (self.place >> Self::ALIGNMENT_SHIFT & 7),
        };
        (self.len != 0).then_some((access, self.retry))
    }

    /// Where in the unit's code it goes on after the instruction; 0 if the unit has to be left there.
    pub fn resume(&self) -> u16 {
        match (self.len, self.rest) {
            (0, _) => self.retry,
            (_, 0) => 0,
            (_, rest) => self.retry + u16::from(rest),
        }
    }
}

/// A direct branch that can lead straight to another unit.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Offset of its rel32 in code memory.
    pub field: u32,
    /// Where it leads, relative to the page.
    pub target: i32,
    /// How far behind `field` the code begins that it leads to while it is not linked.
    pub unlinked: u16,
    /// For a branch into another page, how far before `field` the comparison with the mapping's number has the number's
    /// place, which the number follows; else [`Link::NEAR`] or [`Link::WITHOUT_SPANS`].
    pub guard: u8,
    /// Where the flags are when it is taken.
    pub flags: Place,
}

impl Link {
    /// In [`Link::guard`]: it stays in its page.
    pub const NEAR: u8 = 0;
    /// In [`Link::guard`]: it leads to the same instruction in a translation without spans.
    pub const WITHOUT_SPANS: u8 = 1;

    /// Whether it looks before it jumps whether its target is still where it was.
    pub fn is_guarded(&self) -> bool {
        self.guard > Self::WITHOUT_SPANS
    }

    /// Whether it leads to a translation without spans.
    pub fn is_without_spans(&self) -> bool {
        self.guard == Self::WITHOUT_SPANS
    }
}

const _: () = {
    assert!(MAX_SPAN < 1 << 10, "a site has ten bits for it");
    assert!(size_of::<Unit>() == 40);
    assert!(size_of::<Site>() == 20);
    assert!(size_of::<Link>() == 12);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_hold_what_is_put_into_them() {
        for (write, alignment, base, segment) in [(false, 1, 0, 5), (true, 64, 17, 0), (true, 16, 16, 3)] {
            let access = Access {
                displacement: -0x1234_5678,
                base,
                index: 17 - base,
                scale: 3,
                segment,
                len: 255,
                write,
                alignment,
            };
            let site = Site::access_of(0xfff, access, 0x1000, 0x10ff).unwrap();
            assert_eq!((site.offset(), site.access()), (0xfff, Some((access, 0x1000))));
            assert_eq!(site.resume(), 0x10ff);
            assert_eq!(Site::access_of(0, access, 0x1000, 0).unwrap().resume(), 0);
            assert!(Site::access_of(0, access, 0x1000, 0x1100).is_none());
            let span = Span { offset: 511, len: 512, write: !write, otherwise: 300 };
            assert_eq!((site.span(), site.of_span(span).span()), (None, Some(span)));
            assert_eq!(site.of_span(span).access(), site.access());
        }
        let site = Site::interpret(0xfff, 0xfffe);
        assert_eq!((site.offset(), site.resume()), (0xfff, 0xfffe));
        assert!(site.access().is_none());
    }
}
