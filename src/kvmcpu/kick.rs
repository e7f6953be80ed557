#![allow(unsafe_code, reason = "timers and signals are system calls")]
//! How a running vCPU is stopped in time: a timer whose signal goes to the vCPU's thread (timer_create(2), SIGEV_THREAD_ID;
//! the kernel's `api.rst`, KVM_RUN and `immediate_exit`).
//!
//! No kick is lost. A signal that comes while the guest runs interrupts KVM_RUN. One that comes a moment before finds the
//! thread in this program, where the handler sets `immediate_exit` in the vCPU's page, and KVM_RUN then returns at once. Which
//! page that is stands in a variable of the thread for as long as it is about to run a vCPU, and at no other time. The timer is set
//! only within that time ([`Armed`] is asked for): set before, it could run out before anybody was there to be told.

use crate::error::{KvmError, last};
use std::cell::Cell;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};

/// A vCPU is given at least this long, in nanoseconds, or a guest whose timers are due all the time would never execute an
/// instruction. Entering it takes about a microsecond, but milliseconds where the host is itself emulated and busy: so each time
/// that comes to nothing but a signal doubles what the next is given, [`MOST_DOUBLED`] times at most.
const LEAST: u64 = 100_000;
const MOST_DOUBLED: u32 = 8;
const SECOND: u64 = 1_000_000_000;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread is about to run.
    static ABOUT_TO_RUN: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// The signal. The first real-time signals are the C library's own, and tests of this project use another.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

extern "C" fn kicked(_: libc::c_int) {
    // A variable that needs neither construction nor destruction can be read in a handler.
    let flag = ABOUT_TO_RUN.with(Cell::get);
    if !flag.is_null() {
        // SAFETY: `Armed` set the pointer to a byte of the vCPU's page and clears it before the page can go; the handler
        // runs on the same thread, so in between.
        unsafe { &*flag }.store(1, Ordering::Relaxed);
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let handler: extern "C" fn(libc::c_int) = kicked;
        // SAFETY: the structure is plain data for which zeros are valid; the handler reads a variable of its thread and
        // stores one byte, so it may run at any place; nothing else in this program uses the signal. SA_RESTART keeps a late
        // signal from failing another system call; KVM_RUN returns EINTR all the same.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal(), &action, ptr::null_mut());
        }
    });
}

/// The host's monotonic clock in nanoseconds.
pub fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the answer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    (now.tv_sec as u64).saturating_mul(SECOND).saturating_add(now.tv_nsec as u64)
}

/// The timer of one vCPU.
#[derive(Debug)]
pub struct Kick {
    timer: Option<libc::timer_t>,
    thread: libc::pid_t,
    /// What it is set for: the deadline as it was given, and when the signal comes by the monotonic clock.
    set: Option<(u64, u64)>,
    /// How many times in a row the least was given and a signal was all that came of it.
    cut_short: u32,
}

impl Default for Kick {
    fn default() -> Self {
        Self::new()
    }
}

impl Kick {
    /// A timer that is not set.
    pub fn new() -> Self {
        install();
        Self { timer: None, thread: 0, set: None, cut_short: 0 }
    }

    /// Sets the timer so that this thread is signalled at `deadline`, which is `left` nanoseconds from now. Where it is set
    /// for that deadline already, nothing is done.
    pub fn set(&mut self, _armed: &Armed, deadline: u64, left: u64) -> Result<(), KvmError> {
        let now = monotonic();
        self.belong_to_this_thread()?;
        if let Some((for_deadline, at)) = self.set
            && for_deadline == deadline
            && at > now
        {
            return Ok(());
        }
        let least = LEAST << self.cut_short.min(MOST_DOUBLED);
        self.cut_short = if left < least { self.cut_short.saturating_add(1) } else { 0 };
        let at = now.saturating_add(left.max(least));
        self.tell(at)?;
        self.set = Some((deadline, at));
        Ok(())
    }

    /// The guest was left for another reason than a signal: it has moved.
    pub fn has_moved(&mut self) {
        self.cut_short = 0;
    }

    /// Whether the signal for this deadline is due.
    pub fn is_due(&self, deadline: u64) -> bool {
        self.set.is_some_and(|(set, at)| set == deadline && monotonic() >= at)
    }

    /// No signal is wanted any more.
    pub fn clear(&mut self) -> Result<(), KvmError> {
        if self.set.take().is_some() { self.tell(0) } else { Ok(()) }
    }

    fn tell(&self, at: u64) -> Result<(), KvmError> {
        let Some(timer) = self.timer else { return Ok(()) };
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let value = libc::timespec {
            tv_sec: (at / SECOND).min(i64::MAX as u64) as libc::time_t,
            tv_nsec: (at % SECOND) as libc::c_long,
        };
        let new = libc::itimerspec { it_interval: none, it_value: value };
        // SAFETY: the timer is ours and was made by timer_create; `new` is a valid structure, and no answer is wanted.
        let done = unsafe { libc::timer_settime(timer, libc::TIMER_ABSTIME, &new, ptr::null_mut()) };
        if done == 0 { Ok(()) } else { Err(last("setting the timer of a vCPU")) }
    }

    fn belong_to_this_thread(&mut self) -> Result<(), KvmError> {
        // SAFETY: has no preconditions.
        let thread = unsafe { libc::gettid() };
        if self.timer.is_some() && self.thread == thread {
            return Ok(());
        }
        self.delete();
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: zeros are a valid `sigevent`; the fields that SIGEV_THREAD_ID reads are set, and `timer` is a valid place.
        let made = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal();
            event.sigev_notify_thread_id = thread;
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer)
        };
        if made != 0 {
            return Err(last("making the timer of a vCPU"));
        }
        (self.timer, self.thread, self.set) = (Some(timer), thread, None);
        Ok(())
    }

    fn delete(&mut self) {
        if let Some(timer) = self.timer.take() {
            // SAFETY: the timer is ours and is not used again.
            unsafe { libc::timer_delete(timer) };
        }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        self.delete();
    }
}

/// While this lives, a signal makes KVM_RUN return at once.
#[derive(Debug)]
pub struct Armed<'a> {
    immediate_exit: &'a AtomicU8,
}

impl<'a> Armed<'a> {
    /// For the vCPU whose `immediate_exit` this is.
    pub fn new(immediate_exit: &'a AtomicU8) -> Self {
        ABOUT_TO_RUN.set(immediate_exit);
        compiler_fence(Ordering::SeqCst);
        Self { immediate_exit }
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        ABOUT_TO_RUN.set(ptr::null());
        compiler_fence(Ordering::SeqCst);
        // What came too late belongs to a deadline that the caller looks at by the clock.
        self.immediate_exit.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_kick_between_the_last_look_and_the_system_call_is_seen() {
        let flag = AtomicU8::new(0);
        let mut kick = Kick::new();
        let armed = Armed::new(&flag);
        kick.set(&armed, 7, 0).unwrap();
        let began = Instant::now();
        while flag.load(Ordering::Relaxed) == 0 {
            assert!(began.elapsed() < Duration::from_secs(10), "the signal never came");
            std::hint::spin_loop();
        }
        assert!(began.elapsed() >= Duration::from_nanos(LEAST / 2));
        drop(armed);
        assert_eq!(flag.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_signal_that_nobody_waits_for_changes_nothing() {
        let flag = AtomicU8::new(0);
        let mut kick = Kick::new();
        let armed = Armed::new(&flag);
        kick.set(&armed, 1, 0).unwrap();
        drop(armed);
        std::thread::sleep(Duration::from_millis(5));
        let armed = Armed::new(&flag);
        assert_eq!(flag.load(Ordering::Relaxed), 0);
        // The same deadline again: it is over, so the timer is set anew.
        kick.set(&armed, 1, 0).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(flag.load(Ordering::Relaxed), 1);
        drop(armed);
    }

    #[test]
    fn a_vcpu_that_does_not_move_is_given_more_and_more() {
        let mut kick = Kick::new();
        let flag = AtomicU8::new(0);
        let armed = Armed::new(&flag);
        let given = |kick: &mut Kick, deadline| {
            let now = monotonic();
            kick.set(&armed, deadline, 0).unwrap();
            let (_, at) = kick.set.unwrap();
            kick.clear().unwrap();
            (at - now) / LEAST
        };
        let spans: Vec<_> = (0..12).map(|n| given(&mut kick, n)).collect();
        assert!(spans[0] >= 1 && spans.windows(2).all(|pair| pair[0] <= pair[1]), "{spans:?}");
        assert!(spans[11] >= 1 << MOST_DOUBLED, "{spans:?}");
        kick.has_moved();
        assert!(given(&mut kick, 100) < 1 << MOST_DOUBLED);
    }

    #[test]
    fn a_vcpu_may_move_to_another_thread() {
        struct Sent(Kick);
        // SAFETY: a timer belongs to the process, and may be set and deleted by any of its threads.
        unsafe impl Send for Sent {}
        let mut kick = Kick::new();
        let flag = AtomicU8::new(0);
        kick.set(&Armed::new(&flag), 1, SECOND).unwrap();
        let sent = Sent(kick);
        std::thread::spawn(move || {
            let Sent(mut kick) = { sent };
            let flag = AtomicU8::new(0);
            let armed = Armed::new(&flag);
            kick.set(&armed, 1, 0).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(flag.load(Ordering::Relaxed), 1);
            drop(armed);
        })
        .join()
        .unwrap();
    }
}
