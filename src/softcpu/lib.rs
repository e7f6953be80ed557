//! The software CPU: decode, execute, translation look-aside buffer, hardware walk, exceptions.
