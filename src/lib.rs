//! The public facade of Antumbra.
