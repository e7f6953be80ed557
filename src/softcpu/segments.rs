//! Segment descriptors: loading and checking them (SDM Vol. 3 chapters 3 and 5).
