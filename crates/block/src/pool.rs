//! I/O threads of one disk.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Threads of a disk at most, as many as bhyve's.
const MAX_THREADS: usize = 8;

/// What a thread does, once.
type Task = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Task>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    closing: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that do tasks in the order they come. The first is started at once, more as there is work for them. Dropping it does what
/// is queued and ends them.
pub(crate) struct Pool {
    name: String,
    shared: Arc<Shared>,
}

impl Pool {
    /// Threads called `name` and a number.
    ///
    /// # Errors
    /// The host refuses the first thread.
    pub fn new(name: &str) -> io::Result<Self> {
        let pool = Pool { name: name.to_owned(), shared: Arc::default() };
        pool.grow(&mut pool.shared.lock())?;
        Ok(pool)
    }

    /// Has a task done.
    pub fn push(&self, task: Task) {
        let mut state = self.shared.lock();
        state.queue.push_back(task);
        if state.idle < state.queue.len() && state.threads.len() < MAX_THREADS {
            // Without another thread the present ones do it, later.
            if let Err(error) = self.grow(&mut state) {
                tracing::warn!("{}: starting another I/O thread: {error}", self.name);
            }
        }
        drop(state);
        self.shared.work.notify_one();
    }

    fn grow(&self, state: &mut State) -> io::Result<()> {
        let shared = self.shared.clone();
        let name = format!("{}/{}", self.name, state.threads.len());
        state.threads.push(thread::Builder::new().name(name).spawn(move || work(&shared))?);
        Ok(())
    }
}

fn work(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(task) = state.queue.pop_front() {
            drop(state);
            task();
            state = shared.lock();
        } else if state.closing {
            return;
        } else {
            state.idle += 1;
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.shared.lock();
            state.closing = true;
            std::mem::take(&mut state.threads)
        };
        self.shared.work.notify_all();
        let own = thread::current().id();
        for thread in threads.into_iter().filter(|t| t.thread().id() != own) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    #[test]
    fn as_many_tasks_at_a_time_as_there_may_be_threads() {
        let pool = Pool::new("test").unwrap();
        let together = Arc::new(Barrier::new(MAX_THREADS));
        let (done, results) = channel();
        for number in 0..2 * MAX_THREADS {
            let (together, done) = (together.clone(), done.clone());
            pool.push(Box::new(move || {
                together.wait();
                done.send(number).unwrap();
            }));
        }
        drop((pool, done));
        let mut numbers: Vec<_> = results.iter().collect();
        numbers.sort_unstable();
        assert_eq!(numbers, Vec::from_iter(0..2 * MAX_THREADS), "dropping the pool does what is queued");
    }
}
