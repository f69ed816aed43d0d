//! What the end-to-end tests share: starting a daemon, finding the built programs, guests.
