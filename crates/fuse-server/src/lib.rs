//! The /dev/fuse protocol: typed requests, replies that must be used, every interrupt answered.
