//! Command-line options that the examples share.
