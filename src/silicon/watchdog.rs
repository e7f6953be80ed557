#![allow(unsafe_code, reason = "a signal is the one way to get a thread out of KVM_RUN")]
//! A limit to the time that a vCPU runs: a wrong stub, or a host that goes astray, must not hang whoever asked.
//!
//! A thread of its own looks at the clock. When a run takes longer than [`LIMIT`] it sends a signal to the thread that
//! runs the vCPU, again and again, so that it does not matter whether the first one comes just before KVM_RUN.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

/// The longest that a list of accesses may take. It takes milliseconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Shared {
    /// The thread that runs a vCPU now. Locked while it is signalled, so that it cannot end meanwhile.
    running: Mutex<Option<libc::pthread_t>>,
    /// Milliseconds after `epoch` when the run must be over.
    deadline: AtomicU64,
    epoch: Instant,
    closed: AtomicBool,
}

/// The watchdog.
#[derive(Debug)]
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn wake(_: libc::c_int) {}

/// Gives the signal a handler that does nothing: it is enough that the system call is interrupted.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let handler: extern "C" fn(libc::c_int) = wake;
        // SAFETY: the structure is plain data for which zeros are valid; the handler touches nothing, so it may run at
        // any place of any thread; the signal is not used elsewhere in this program.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            libc::sigaction(signal(), &action, std::ptr::null_mut());
        }
    });
}

impl Watchdog {
    /// Starts the thread.
    pub fn new() -> Self {
        install();
        let shared = Arc::new(Shared {
            running: Mutex::new(None),
            deadline: AtomicU64::new(0),
            epoch: Instant::now(),
            closed: AtomicBool::new(false),
        });
        let watched = shared.clone();
        let thread = std::thread::spawn(move || {
            while !watched.closed.load(Ordering::Acquire) {
                std::thread::park_timeout(STEP);
                watched.look();
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Does `run` on this thread; a system call in it is interrupted when `limit` has passed. Says whether it has.
    pub fn watch<T>(&self, limit: Duration, run: impl FnOnce() -> T) -> (T, bool) {
        let deadline = (self.shared.epoch.elapsed() + limit).as_millis() as u64;
        self.shared.deadline.store(deadline, Ordering::Release);
        // SAFETY: has no preconditions.
        *lock(&self.shared.running) = Some(unsafe { libc::pthread_self() });
        let value = run();
        *lock(&self.shared.running) = None;
        (value, self.shared.epoch.elapsed().as_millis() as u64 >= deadline)
    }
}

impl Shared {
    fn look(&self) {
        let running = lock(&self.running);
        let late = self.epoch.elapsed().as_millis() as u64 >= self.deadline.load(Ordering::Acquire);
        if let Some(thread) = *running
            && late
        {
            // SAFETY: the thread is inside `watch`, which takes itself out under the lock that is held here, so it lives.
            let _sent_or_not = unsafe { libc::pthread_kill(thread, signal()) };
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ended = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_call_that_takes_too_long_is_interrupted() {
        let watchdog = Watchdog::new();
        let began = Instant::now();
        let (interrupted, late) = watchdog.watch(Duration::from_millis(150), || {
            // SAFETY: no descriptors are given, so nothing is read or written.
            let ready = unsafe { libc::poll(std::ptr::null_mut(), 0, 60_000) };
            ready == -1 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        });
        assert!(interrupted && late);
        assert!(began.elapsed() < Duration::from_secs(30));
        assert_eq!(watchdog.watch(LIMIT, || 7), (7, false));
    }
}
