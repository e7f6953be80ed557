//! The MMU contract: paging state, entry formats, the one walker, the backend trait and the counters.
