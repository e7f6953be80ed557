//! The walker against the manual. What is expected comes from [`reference`], which was written from SDM Vol. 3 chapter 4
//! section by section and shares no code with the walker, and from rows written down by hand, which hold both to account.

mod flags;
mod formats;
mod manual;
mod nested;
mod ram;
mod random;
mod rights;
mod tables;
