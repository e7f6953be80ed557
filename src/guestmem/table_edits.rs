//! Which entries of the engine's tables were changed that a processor may already have read.
//!
//! A CPU that walks the engine's tables in memory needs no more than the flushes that a backend asks for. A processor whose
//! host shadows those tables once more (the host's KVM, without EPT or NPT) does not see them written from outside its guest: it
//! keeps what a present entry said until the guest itself writes the entry. So the entries are noted here, for whoever
//! runs such a processor to write them again from inside.
//!
//! It stands beside the path of an access: behind every change of a table, and only once somebody has asked.

use crate::addr::Hpa;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// More changes than this are told as [`TableEdits::everything`].
const MOST: usize = 1 << 14;

/// What was changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableEdits {
    /// Addresses of entries that were present and have another value now, each once, ascending.
    pub entries: Vec<Hpa>,
    /// Beyond these anything may have changed: a frame that held a table holds another one, or there were too many.
    pub everything: bool,
}

/// The log.
#[derive(Debug, Default)]
pub(crate) struct EditLog {
    active: AtomicBool,
    noted: Mutex<TableEdits>,
}

impl EditLog {
    pub(crate) fn start(&self) {
        self.active.store(true, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    #[cold]
    pub(crate) fn note(&self, entry: Hpa) {
        let mut noted = self.noted.lock().unwrap_or_else(|e| e.into_inner());
        if noted.everything {
            return;
        }
        noted.entries.push(entry);
        if noted.entries.len() > MOST {
            noted.entries.sort_unstable();
            noted.entries.dedup();
            noted.everything = noted.entries.len() > MOST / 2;
        }
    }

    pub(crate) fn note_everything(&self) {
        self.noted.lock().unwrap_or_else(|e| e.into_inner()).everything = true;
    }

    pub(crate) fn take(&self) -> TableEdits {
        let mut edits = std::mem::take(&mut *self.noted.lock().unwrap_or_else(|e| e.into_inner()));
        edits.entries.sort_unstable();
        edits.entries.dedup();
        if edits.everything {
            edits.entries.clear();
        }
        edits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_once_and_in_order_and_too_many_are_everything() {
        let log = EditLog::default();
        assert!(!log.is_active());
        log.start();
        [3, 1, 3, 2].into_iter().for_each(|n| log.note(Hpa(n * 8)));
        let entries = vec![Hpa(8), Hpa(16), Hpa(24)];
        assert_eq!(log.take(), TableEdits { entries, everything: false });
        assert_eq!(log.take(), TableEdits::default());
        (0..MOST as u64 * 3).for_each(|n| log.note(Hpa(n % 5 * 8)));
        assert_eq!(log.take().entries.len(), 5);
        (0..MOST as u64 * 3).for_each(|n| log.note(Hpa(n * 8)));
        assert_eq!(log.take(), TableEdits { entries: Vec::new(), everything: true });
        log.note_everything();
        assert!(log.take().everything && !log.take().everything);
    }
}
