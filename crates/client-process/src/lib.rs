//! Another process as a request shows it: its memory, its descriptors, who it is.
