//! Limits of a disk: operations and bytes per second, for reads, writes or both together, each with a burst.
//!
//! Each limit is a bucket of tokens that fills at its rate up to the burst. A request takes its tokens when it starts; it waits while
//! there are not enough. One that needs more than a full bucket starts at a full one and leaves it in debt. Requests wait in a queue,
//! reads and writes apart; one thread, which exists once a disk has been limited, starts them when their time has come.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Operation;

/// A rate: so much per second in the long run, and `burst` at once after a time of rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Operations or bytes per second; at least 1.
    pub per_second: u64,
    /// Operations or bytes; at least 1.
    pub burst: u64,
}

impl Rate {
    /// A rate with a burst of a tenth of a second's worth.
    pub fn new(per_second: u64) -> Self {
        Rate { per_second, burst: (per_second / 10).max(1) }
    }
}

/// The limits of one kind of access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// Operations per second.
    pub operations: Option<Rate>,
    /// Bytes per second. Those that carry no data (discards, zeroes) count as operations only.
    pub bytes: Option<Rate>,
}

/// The limits of a disk. A request has to keep all that are for it. Flushes are not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Reads.
    pub read: Limit,
    /// Writes, discards and zeroes.
    pub write: Limit,
    /// Both together.
    pub total: Limit,
}

/// Tokens of one limit.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// May be in debt.
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    fn new(rate: Rate, now: Duration) -> Self {
        let rate = Rate { per_second: rate.per_second.max(1), burst: rate.burst.max(1) };
        Bucket { rate, tokens: rate.burst as f64, filled: now }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate.per_second as f64).min(self.rate.burst as f64);
        self.filled = now;
    }

    /// How long until `cost` can be taken, after filling.
    fn wait(&self, cost: u64) -> Duration {
        let missing = (cost.min(self.rate.burst)) as f64 - self.tokens;
        if missing <= 0.0 {
            return Duration::ZERO;
        }
        // Never zero again, whatever the rounding.
        Duration::try_from_secs_f64(missing / self.rate.per_second as f64)
            .unwrap_or(Duration::MAX)
            .max(Duration::from_micros(1))
    }
}

/// Which limits a request has to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

fn direction(operation: Operation) -> Option<Direction> {
    match operation {
        Operation::Read => Some(Direction::Read),
        Operation::Flush => None,
        Operation::Write { .. } | Operation::Discard | Operation::WriteZeroes { .. } => {
            Some(Direction::Write)
        }
    }
}

/// The buckets of a disk, which know no clock.
#[derive(Debug, Default)]
struct Buckets {
    limits: Limits,
    /// Read operations, read bytes, write operations, write bytes, operations, bytes.
    buckets: [Option<Bucket>; 6],
}

impl Buckets {
    fn new(limits: Limits, now: Duration) -> Self {
        let Limits { read, write, total } = limits;
        let rates =
            [read.operations, read.bytes, write.operations, write.bytes, total.operations, total.bytes];
        Buckets { limits, buckets: rates.map(|rate| rate.map(|rate| Bucket::new(rate, now))) }
    }

    /// Takes what a request costs; if it cannot yet, says how long until it may be able to.
    fn take(&mut self, direction: Direction, bytes: u64, now: Duration) -> Result<(), Duration> {
        let [read_operations, read_bytes, write_operations, write_bytes, operations, all_bytes] =
            &mut self.buckets;
        let mut costs = match direction {
            Direction::Read => {
                [(read_operations, 1), (read_bytes, bytes), (operations, 1), (all_bytes, bytes)]
            }
            Direction::Write => {
                [(write_operations, 1), (write_bytes, bytes), (operations, 1), (all_bytes, bytes)]
            }
        };
        let mut wait = Duration::ZERO;
        for (bucket, cost) in &mut costs {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(*cost));
            }
        }
        if wait > Duration::ZERO {
            return Err(wait);
        }
        for (bucket, cost) in costs {
            if let Some(bucket) = bucket {
                bucket.tokens -= cost as f64;
            }
        }
        Ok(())
    }
}

/// What waits.
struct Waiting<T> {
    bytes: u64,
    item: T,
}

struct State<T> {
    buckets: Buckets,
    reads: VecDeque<Waiting<T>>,
    writes: VecDeque<Waiting<T>>,
    /// How many want everything to start at once.
    hurries: usize,
    closing: bool,
    thread: Option<JoinHandle<()>>,
}

struct Shared<T> {
    name: String,
    /// Whether there is any limit, or anything waits: without, nothing is locked.
    limited: AtomicBool,
    state: Mutex<State<T>>,
    changed: Condvar,
    epoch: Instant,
    start: Box<dyn Fn(T) + Send + Sync>,
}

/// Holds requests back so that limits are kept.
pub(crate) struct Throttle<T: Send + 'static> {
    shared: Arc<Shared<T>>,
}

impl<T: Send + 'static> Throttle<T> {
    /// Without limits. What has waited is given to `start`. `name` is what the thread is called.
    pub fn new(name: &str, start: impl Fn(T) + Send + Sync + 'static) -> Self {
        let state = State {
            buckets: Buckets::default(),
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            hurries: 0,
            closing: false,
            thread: None,
        };
        Throttle {
            shared: Arc::new(Shared {
                name: format!("{name}/limit"),
                limited: AtomicBool::new(false),
                state: Mutex::new(state),
                changed: Condvar::new(),
                epoch: Instant::now(),
                start: Box::new(start),
            }),
        }
    }

    /// Takes a request. Gives it back if it may start now; else it is started later.
    pub fn admit(&self, operation: Operation, len: u64, item: T) -> Option<T> {
        if !self.shared.limited.load(Ordering::Acquire) {
            return Some(item);
        }
        let Some(direction) = direction(operation) else { return Some(item) };
        let bytes = if matches!(operation, Operation::Read | Operation::Write { .. }) { len } else { 0 };
        let mut state = self.shared.lock();
        let now = self.shared.epoch.elapsed();
        let queue = state.queue(direction);
        let others_wait = !queue.is_empty();
        if state.hurries > 0 || !others_wait && state.buckets.take(direction, bytes, now).is_ok() {
            return Some(item);
        }
        state.queue(direction).push_back(Waiting { bytes, item });
        drop(state);
        self.shared.changed.notify_all();
        None
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.shared.lock().buckets.limits
    }

    /// Sets other limits. Full buckets are what they begin with.
    ///
    /// # Errors
    /// The host refuses the thread; there are no limits then.
    pub fn set(&self, limits: Limits) -> io::Result<()> {
        let mut state = self.shared.lock();
        if limits != Limits::default() && state.thread.is_none() {
            let shared = self.shared.clone();
            state.thread =
                Some(thread::Builder::new().name(shared.name.clone()).spawn(move || shared.run())?);
        }
        state.buckets = Buckets::new(limits, self.shared.epoch.elapsed());
        let limited = limits != Limits::default() || !state.reads.is_empty() || !state.writes.is_empty();
        self.shared.limited.store(limited, Ordering::Release);
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Lets everything start without limits, while `true`. Can be nested.
    pub fn hurry(&self, begin: bool) {
        let mut state = self.shared.lock();
        state.hurries = if begin { state.hurries + 1 } else { state.hurries.saturating_sub(1) };
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl<T> State<T> {
    fn queue(&mut self, direction: Direction) -> &mut VecDeque<Waiting<T>> {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }

    /// Takes out what may start now, and says when there may be more.
    fn ready(&mut self, now: Duration) -> (Vec<T>, Option<Duration>) {
        let mut items = Vec::new();
        let mut next: Option<Duration> = None;
        let free = self.hurries > 0 || self.closing;
        for direction in [Direction::Read, Direction::Write] {
            while let Some(first) = self.queue(direction).front() {
                let bytes = first.bytes;
                if !free && let Err(wait) = self.buckets.take(direction, bytes, now) {
                    next = Some(next.map_or(wait, |next| next.min(wait)));
                    break;
                }
                items.extend(self.queue(direction).pop_front().map(|waiting| waiting.item));
            }
        }
        (items, next)
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            let (items, next) = state.ready(self.epoch.elapsed());
            if !items.is_empty() {
                drop(state);
                items.into_iter().for_each(|item| (self.start)(item));
                state = self.lock();
                continue;
            }
            if state.closing {
                return;
            }
            if next.is_none() && state.buckets.limits == Limits::default() {
                // The last of those that waited has gone.
                self.limited.store(false, Ordering::Release);
            }
            state = match next {
                Some(wait) => {
                    self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl<T: Send + 'static> Drop for Throttle<T> {
    /// Starts what waits, and ends the thread.
    fn drop(&mut self) {
        let thread = {
            let mut state = self.shared.lock();
            state.closing = true;
            state.thread.take()
        };
        self.shared.changed.notify_all();
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id()) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    const MS: Duration = Duration::from_millis(1);

    fn limit(operations: Option<Rate>, bytes: Option<Rate>) -> Limit {
        Limit { operations, bytes }
    }

    /// How many requests of a size can start one after the other within a time.
    fn within(buckets: &mut Buckets, direction: Direction, bytes: u64, from: Duration, to: Duration) -> u64 {
        let (mut now, mut started) = (from, 0);
        loop {
            match buckets.take(direction, bytes, now) {
                Ok(()) => started += 1,
                Err(wait) => now += wait,
            }
            if now > to {
                return started;
            }
        }
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let rate = Rate { per_second: 100, burst: 50 };
        let limits = Limits { read: limit(Some(rate), None), ..Limits::default() };
        let mut buckets = Buckets::new(limits, Duration::ZERO);
        assert_eq!(within(&mut buckets, Direction::Read, 512, Duration::ZERO, Duration::ZERO), 50);
        let second = within(&mut buckets, Direction::Read, 512, Duration::ZERO, 1000 * MS);
        assert!((99..=101).contains(&second), "{second}");
        // After rest there is a burst again, not more.
        let burst = within(&mut buckets, Direction::Read, 512, 60_000 * MS, 60_000 * MS);
        assert_eq!(burst, 50);
        assert_eq!(buckets.take(Direction::Write, 512, Duration::ZERO), Ok(()), "writes are not limited");
    }

    #[test]
    fn what_is_larger_than_a_burst_leaves_a_debt() {
        let limits =
            Limits { total: limit(None, Some(Rate { per_second: 1000, burst: 100 })), ..Limits::default() };
        let mut buckets = Buckets::new(limits, Duration::ZERO);
        assert_eq!(buckets.take(Direction::Write, 2100, Duration::ZERO), Ok(()));
        let wait = buckets.take(Direction::Read, 100, Duration::ZERO).unwrap_err();
        assert!(wait.abs_diff(2100 * MS) < MS, "{wait:?}");
        assert_eq!(buckets.take(Direction::Read, 100, 2101 * MS), Ok(()));
    }

    #[test]
    fn every_limit_has_to_be_kept() {
        let limits = Limits {
            read: limit(Some(Rate { per_second: 10, burst: 1 }), None),
            write: limit(None, Some(Rate { per_second: 4096, burst: 4096 })),
            total: limit(Some(Rate { per_second: 1000, burst: 2 }), None),
        };
        let mut buckets = Buckets::new(limits, Duration::ZERO);
        assert_eq!(buckets.take(Direction::Read, 4096, Duration::ZERO), Ok(()));
        assert!(buckets.take(Direction::Read, 4096, Duration::ZERO).is_err());
        assert_eq!(
            buckets.take(Direction::Write, 4096, Duration::ZERO),
            Ok(()),
            "a refused one takes nothing"
        );
        assert!(buckets.take(Direction::Write, 0, Duration::ZERO).is_err(), "the total is used up");
        assert_eq!(buckets.take(Direction::Write, 0, 2 * MS), Ok(()));
        assert!(buckets.take(Direction::Write, 4096, 5 * MS).is_err());
    }

    #[test]
    fn absurd_rates_do_no_harm() {
        for rate in
            [Rate { per_second: 0, burst: 0 }, Rate { per_second: u64::MAX, burst: u64::MAX }, Rate::new(1)]
        {
            let limits = Limits { read: limit(Some(rate), Some(rate)), ..Limits::default() };
            let mut buckets = Buckets::new(limits, Duration::ZERO);
            let _ = buckets.take(Direction::Read, u64::MAX, Duration::ZERO);
            let _ = buckets.take(Direction::Read, 1, Duration::ZERO);
            let _ = buckets.take(Direction::Read, 1, Duration::MAX);
        }
    }

    #[test]
    fn who_waits_starts_when_the_limits_change_or_there_is_a_hurry() {
        let (started, starts) = channel();
        let throttle = Throttle::new("test", move |number: u32| started.send(number).unwrap());
        let write = Operation::Write { fua: false };
        assert_eq!(throttle.admit(write, 512, 0), Some(0), "no limit");
        // One now, the next in more than eleven days.
        let slow = Limit { operations: None, bytes: Some(Rate { per_second: 1, burst: 1 }) };
        throttle.set(Limits { write: slow, ..Limits::default() }).unwrap();
        assert_eq!(throttle.admit(write, 1_000_000, 1), Some(1));
        assert_eq!(throttle.admit(write, 512, 2), None);
        assert_eq!(throttle.admit(Operation::Discard, 512, 3), None, "in the order they come");
        assert_eq!(throttle.admit(Operation::Read, 512, 4), Some(4));
        assert_eq!(throttle.admit(Operation::Flush, 0, 5), Some(5));
        assert!(starts.try_recv().is_err());
        throttle.hurry(true);
        assert_eq!((starts.recv().unwrap(), starts.recv().unwrap()), (2, 3));
        assert_eq!(throttle.admit(write, 512, 6), Some(6));
        throttle.hurry(false);
        assert_eq!(throttle.admit(write, 512, 7), None);
        throttle.set(Limits::default()).unwrap();
        assert_eq!(starts.recv().unwrap(), 7);
        throttle.set(Limits { read: slow, ..Limits::default() }).unwrap();
        assert_eq!(throttle.admit(Operation::Read, 512, 8), Some(8));
        assert_eq!(throttle.admit(Operation::Read, 512, 9), None);
        drop(throttle);
        assert_eq!(starts.recv().unwrap(), 9, "the end lets everything go");
    }
}
