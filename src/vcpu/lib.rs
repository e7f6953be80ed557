//! The contract between the run loop and any CPU: exits, entries and architectural state.
