//! Addresses, host frames, the guest-physical map and the dirty log.
