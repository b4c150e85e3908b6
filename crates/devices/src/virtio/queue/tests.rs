use memory::GuestMemory;

use super::driver::Ring;
use super::*;

const RAM: u64 = 1 << 20;
const BASE: u64 = 0x1_0000;
const TABLE: u64 = 0x8_0000;
const LAYOUTS: [Layout; 2] = [Layout::Split, Layout::Packed];

fn memory() -> GuestMemory {
    memory::join_regions(vec![memory::create_region("test", 0, RAM).unwrap()]).unwrap()
}

fn spans(spans: &[Span]) -> Vec<(u64, usize)> {
    spans.iter().map(|span| (span.address.0, span.len)).collect()
}

#[test]
fn buffers_go_round_the_ring_many_times() {
    for layout in LAYOUTS {
        // A packed ring need not be a power of two.
        let size = if layout == Layout::Split { 8 } else { 7 };
        let mut ring = Ring::new(&memory(), layout, size, BASE);
        let mut queue = ring.queue(false);
        assert_eq!(queue.pop(), Ok(None));
        for round in 0..70_000u32 {
            let (a, b) = (u64::from(round) + 0x100, u64::from(round) + 0x200);
            let first = ring.offer(&[(a, 16), (b, 8)], &[(a, 1)]);
            let second = ring.offer_table(TABLE, &[(b, 3)], &[(a, 4), (b, 5)]);
            let chain = queue.pop().unwrap().expect("the first");
            assert_eq!(spans(&chain.readable), [(a, 16), (b, 8)]);
            assert_eq!(spans(&chain.writable), [(a, 1)]);
            let other = queue.pop().unwrap().expect("the second");
            assert_eq!((other.readable_len(), spans(&other.writable)), (3, vec![(a, 4), (b, 5)]));
            assert_eq!(queue.pop(), Ok(None), "{layout:?} {round}");
            // Not in the order in which they came.
            assert!(queue.push(&other, round).unwrap());
            assert!(queue.push(&chain, 1).unwrap());
            assert_eq!([ring.used(), ring.used()], [Some((second, round)), Some((first, 1))]);
            assert_eq!(ring.used(), None);
        }
    }
}

#[test]
fn interrupts_are_for_the_buffer_that_the_driver_names() {
    for layout in LAYOUTS {
        let mut ring = Ring::new(&memory(), layout, 8, BASE);
        let mut queue = ring.queue(true);
        for round in 0..10_000 {
            let skip = round % 3;
            ring.want_interrupt(skip);
            let mut wanted = Vec::new();
            for _ in 0..3 {
                ring.offer(&[(0, 1)], &[]);
                let chain = queue.pop().unwrap().unwrap();
                wanted.push(queue.push(&chain, 0).unwrap());
            }
            let expected: Vec<_> = (0..3).map(|index| index == skip).collect();
            assert_eq!(wanted, expected, "{layout:?} {round}");
            while ring.used().is_some() {}
        }
        // The rest of the words.
        let mut queue = Ring::new(&ring.memory, layout, 8, BASE + 0x8000).queue(false);
        let mut ring = Ring::new(&ring.memory, layout, 8, BASE + 0x8000);
        for wanted in [true, false, true] {
            ring.set_interrupts(wanted);
            ring.offer(&[(0, 1)], &[]);
            let chain = queue.pop().unwrap().unwrap();
            assert_eq!(queue.push(&chain, 0), Ok(wanted));
        }
    }
}

#[test]
fn notifications_are_wanted_from_the_next_buffer_on() {
    for layout in LAYOUTS {
        for event_index in [false, true] {
            let mut ring = Ring::new(&memory(), layout, 8, BASE);
            let mut queue = ring.queue(event_index);
            for _ in 0..5 {
                queue.set_notifications(true).unwrap();
                ring.offer(&[(0, 1)], &[]);
                assert!(ring.wants_notification(event_index), "{layout:?} {event_index}");
                queue.set_notifications(false).unwrap();
                if !event_index || layout == Layout::Packed {
                    assert!(!ring.wants_notification(event_index));
                }
                let chain = queue.pop().unwrap().unwrap();
                queue.push(&chain, 0).unwrap();
                ring.used().unwrap();
            }
        }
    }
}

#[test]
fn broken_rings_are_errors() {
    let memory = memory();
    let broken = |layout: Layout, breaks: &dyn Fn(&mut Ring)| {
        let mut ring = Ring::new(&memory, layout, 8, BASE);
        memory.write_slice(&[0; 0x3000], GuestAddress(BASE)).unwrap();
        let mut queue = ring.queue(false);
        breaks(&mut ring);
        queue.pop()
    };
    use QueueError::*;
    use descriptor::{AVAIL, INDIRECT, NEXT, WRITE};
    let split = |breaks: &dyn Fn(&mut Ring)| broken(Layout::Split, breaks);
    let packed = |breaks: &dyn Fn(&mut Ring)| broken(Layout::Packed, breaks);

    assert_eq!(split(&|ring| ring.put16(BASE + 0x1002, 9)), Err(AvailableIndex(9, 8)));
    assert_eq!(split(&|ring| ring.offer_head(8)), Err(DescriptorIndex(8, 8)));
    let circle = |ring: &mut Ring| {
        ring.put_descriptor(ring.at(0), (0, 1), [NEXT, 1]);
        ring.put_descriptor(ring.at(1), (0, 1), [NEXT, 0]);
        ring.offer_head(0);
    };
    assert_eq!(split(&circle), Err(TooLong));
    let next_outside = |ring: &mut Ring| {
        ring.put_descriptor(ring.at(0), (0, 1), [NEXT, 300]);
        ring.offer_head(0);
    };
    assert_eq!(split(&next_outside), Err(DescriptorIndex(300, 8)));

    for layout in LAYOUTS {
        // Flags where the layout has them; the first descriptor of a packed ring has to be available.
        let words = |flags: u16| if layout == Layout::Split { [flags, 1] } else { [0, flags | AVAIL] };
        let one = |piece: (u64, u32), flags: u16| {
            broken(layout, &move |ring: &mut Ring| {
                ring.put_descriptor(ring.at(0), piece, words(flags));
                if layout == Layout::Split {
                    ring.offer_head(0);
                }
            })
        };
        for len in [0, 15, 17] {
            assert_eq!(one((TABLE, len), INDIRECT), Err(Indirect(len)));
        }
        assert_eq!(one((TABLE, 32), INDIRECT | NEXT), Err(Indirect(32)));
        assert_eq!(one((RAM, 16), INDIRECT), Err(Memory("a descriptor", RAM)));
        assert_eq!(one((u64::MAX - 7, 32), INDIRECT), Err(Memory("a descriptor", u64::MAX - 7)));
        let order = broken(layout, &|ring: &mut Ring| {
            ring.offer(&[], &[(0, 1), (8, 1)]);
            let second = ring.at(1) + if layout == Layout::Split { 12 } else { 14 };
            ring.put16(second, ring.get16(second) & !WRITE);
        });
        assert_eq!(order, Err(Order));
        // A table that is too long, and one that is a table's.
        let long = broken(layout, &|ring: &mut Ring| {
            for index in 0..=MAX_DESCRIPTORS as u64 {
                ring.put_descriptor(TABLE + 16 * index, (0, 1), [NEXT, index as u16 + 1]);
            }
            ring.put_descriptor(ring.at(0), (TABLE, 16 * (MAX_DESCRIPTORS as u32 + 1)), words(INDIRECT));
            if layout == Layout::Split {
                ring.offer_head(0);
            }
        });
        assert_eq!(long, Err(TooLong));
    }
    let nested = |ring: &mut Ring| {
        ring.put_descriptor(TABLE, (TABLE, 16), [INDIRECT, 0]);
        ring.put_descriptor(ring.at(0), (TABLE, 16), [INDIRECT, 0]);
        ring.offer_head(0);
    };
    assert_eq!(split(&nested), Err(Indirect(16)));
    // Every entry says that another follows.
    let endless = |ring: &mut Ring| {
        for index in 0..8 {
            ring.put_descriptor(ring.at(index), (0, 1), [0, NEXT | AVAIL]);
        }
    };
    assert_eq!(packed(&endless), Err(TooLong));
}

#[test]
fn queues_that_cannot_be_enabled() {
    let ring = Ring::new(&memory(), Layout::Split, 8, BASE);
    let with = |change: fn(&mut QueueState)| {
        let mut queue = ring.queue(false);
        change(queue.state_mut());
        queue.is_valid()
    };
    assert!(with(|_| ()));
    assert!(!with(|state| state.size = 0));
    assert!(!with(|state| state.size = 9));
    assert!(!with(|state| state.size = 6), "split rings are powers of two");
    assert!(with(|state| (state.size, state.layout) = (6, Layout::Packed)));
    assert!(!with(|state| state.descriptors += 8));
    assert!(!with(|state| state.driver += 1));
    assert!(!with(|state| state.device += 2));
    assert!(!with(|state| state.device = RAM - 4), "reaches over the end of memory");
    assert!(!with(|state| state.descriptors = u64::MAX - 15));
}
