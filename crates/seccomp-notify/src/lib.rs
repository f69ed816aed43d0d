//! System calls of other processes answered by this one: seccomp user notifications.
//!
//! A [`Filter`] says which calls are trapped. A thread that [installs](Filter::install) it has them
//! trapped from then on, as have all its later children and programs, and cannot take the filter off.
//! What comes of it is a [`Listener`]: whoever holds it [receives](Listener::recv) each trapped call
//! and answers it, with a result, an errno, a descriptor, or by letting the kernel do the call.
//!
//! # What a supervisor must know
//! - A call is trapped before it has any effect. If a signal comes before the call was received, the
//!   kernel takes it back and the caller sees `EINTR` or makes the call again.
//! - From [`Listener::recv`] to the answer only a fatal signal ends a call
//!   (`SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, Linux 5.19). Before 5.19 any signal does, and an answer
//!   may find nobody: `ENOENT`. What it would have granted must then be taken back.
//! - Arguments are what the registers held. What they point to is read from the caller's memory while
//!   other threads of it run: copy it once, then ask [`Listener::is_valid`], because the number of a
//!   caller that died may be another's by now.
//! - [`Listener::let_through`] makes the kernel read the arguments anew. It is no way to forbid anything:
//!   another thread can have changed them. Use it only where the caller may do the call in any case.
//! - When the last copy of the listener is closed, each trapped call is `ENOSYS` at once, for ever.
//! - A task can have one listener among its filters. A second is refused with `EBUSY`
//!   (`kernel/seccomp.c`, `has_duplicate_listener`).
//! - Other system call tables than the native one (i386 and x32 on x86-64, 32-bit Arm on aarch64) are
//!   not trapped: those calls are let through as they are.

mod filter;
mod listener;
mod sys;

pub use filter::{Filter, InstallError, Installed};
pub use listener::{Listener, Notification};
pub use rustix::io::Errno;
