//! The requests that were read and not yet answered, and who may answer them.
//!
//! Whoever takes an entry out of the table, under its lock, has the right to write the answer; there is exactly one such. That is what makes a
//! late answer, an interrupt and a deadline race without harm. Lookup by unique is a scan: it happens on INTERRUPT only, and the table is as
//! long as the number of requests under way.

use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;

type Callback = Box<dyn FnOnce() + Send>;

/// What most requests never need.
#[derive(Default)]
struct Extra {
    on_interrupt: Option<Callback>,
    interrupted: Option<Instant>,
    at_once: bool,
}

#[derive(Default)]
struct Slot {
    /// The request's unique; 0, which no request has, marks a free slot.
    unique: u64,
    /// Here and not with the rest, as every ioctl has one.
    deadline: Option<(Instant, Errno)>,
    extra: Option<Box<Extra>>,
}

impl Slot {
    fn is_timed(&self) -> bool {
        let extra = self.extra.as_ref();
        self.deadline.is_some() || extra.is_some_and(|extra| extra.interrupted.is_some())
    }
}

#[derive(Default)]
pub(crate) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// Proof that the entry was taken out: the holder answers. Dropping it drops the callback, so do that outside the lock.
pub(crate) struct Taken {
    timed: bool,
    _extra: Option<Box<Extra>>,
}

impl Taken {
    /// Whether the entry was counted as timed (see [`Table::timed`]).
    pub(crate) fn was_timed(&self) -> bool {
        self.timed
    }
}

/// What an INTERRUPT found.
pub(crate) enum Interrupt {
    /// Not here: not registered yet, or already answered.
    Unknown,
    /// The request asked to be answered EINTR at once, and was taken out for that.
    AnswerNow(Taken),
    /// Marked; the callback, if any, is to be called outside the lock. `newly_timed` tells whether the entry became timed.
    Marked {
        callback: Option<Callback>,
        newly_timed: bool,
    },
}

impl Table {
    pub(crate) fn insert(&mut self, unique: u64) -> u32 {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.slots.len())
                    .expect("fewer requests under way than the kernel has uniques for in memory");
                self.slots.push(Slot::default());
                slot
            }
        };
        if let Some(entry) = self.slots.get_mut(slot as usize) {
            entry.unique = unique;
        }
        slot
    }

    /// Takes the entry out, if it is still this request's.
    pub(crate) fn take(&mut self, slot: u32, unique: u64) -> Option<Taken> {
        let entry = self.slots.get_mut(slot as usize)?;
        if entry.unique != unique {
            return None;
        }
        let taken = Taken {
            timed: entry.is_timed(),
            _extra: entry.extra.take(),
        };
        entry.unique = 0;
        entry.deadline = None;
        self.free.push(slot);
        Some(taken)
    }

    pub(crate) fn contains(&self, slot: u32, unique: u64) -> bool {
        self.slots
            .get(slot as usize)
            .is_some_and(|entry| entry.unique == unique)
    }

    fn find(&self, unique: u64) -> Option<u32> {
        let position = self.slots.iter().position(|entry| entry.unique == unique)?;
        u32::try_from(position).ok()
    }

    fn entry(&mut self, slot: u32, unique: u64) -> Option<&mut Slot> {
        let entry = self.slots.get_mut(slot as usize)?;
        (entry.unique == unique).then_some(entry)
    }

    fn extra(&mut self, slot: u32, unique: u64) -> Option<&mut Extra> {
        Some(self.entry(slot, unique)?.extra.get_or_insert_default())
    }

    pub(crate) fn interrupt(&mut self, unique: u64, now: Instant) -> Interrupt {
        let Some(slot) = self.find(unique) else {
            return Interrupt::Unknown;
        };
        let Some(entry) = self.entry(slot, unique) else {
            return Interrupt::Unknown;
        };
        let newly_timed = !entry.is_timed();
        let extra = entry.extra.get_or_insert_default();
        if extra.at_once {
            return match self.take(slot, unique) {
                Some(taken) => Interrupt::AnswerNow(taken),
                None => Interrupt::Unknown,
            };
        }
        extra.interrupted.get_or_insert(now);
        Interrupt::Marked {
            callback: extra.on_interrupt.take(),
            newly_timed,
        }
    }

    /// Whether the request was interrupted; also true when it is not here any more, since nobody waits for its answer then.
    pub(crate) fn is_interrupted(&self, slot: u32, unique: u64) -> bool {
        match self.slots.get(slot as usize) {
            Some(entry) if entry.unique == unique => entry
                .extra
                .as_ref()
                .is_some_and(|extra| extra.interrupted.is_some()),
            _ => true,
        }
    }

    /// Keeps the callback for a later interrupt, or gives it back when that has already come.
    pub(crate) fn set_callback(
        &mut self,
        slot: u32,
        unique: u64,
        callback: Callback,
    ) -> Option<Callback> {
        match self.extra(slot, unique) {
            Some(extra) if extra.interrupted.is_none() => {
                extra.on_interrupt = Some(callback);
                None
            }
            _ => Some(callback),
        }
    }

    /// Asks that an interrupt answers EINTR at once; taken out when it has already come.
    pub(crate) fn set_at_once(&mut self, slot: u32, unique: u64) -> Option<Taken> {
        let extra = self.extra(slot, unique)?;
        if extra.interrupted.is_some() {
            return self.take(slot, unique);
        }
        extra.at_once = true;
        None
    }

    /// Sets the deadline; true when the entry became timed by it.
    pub(crate) fn set_deadline(
        &mut self,
        slot: u32,
        unique: u64,
        at: Instant,
        errno: Errno,
    ) -> bool {
        let Some(entry) = self.entry(slot, unique) else {
            return false;
        };
        let newly = !entry.is_timed();
        entry.deadline = Some((at, errno));
        newly
    }

    /// Takes out one request whose time is over: past its deadline, or interrupted longer than `grace` ago.
    pub(crate) fn take_expired(
        &mut self,
        now: Instant,
        grace: Duration,
    ) -> Option<(u64, Errno, Taken)> {
        let (slot, unique, errno) = self.slots.iter().enumerate().find_map(|(slot, entry)| {
            if entry.unique == 0 {
                return None;
            }
            let interrupted = entry.extra.as_ref().and_then(|extra| extra.interrupted);
            let errno = match (entry.deadline, interrupted) {
                (Some((at, errno)), _) if at <= now => errno,
                (_, Some(since)) if now.saturating_duration_since(since) >= grace => Errno::INTR,
                _ => return None,
            };
            Some((u32::try_from(slot).ok()?, entry.unique, errno))
        })?;
        Some((unique, errno, self.take(slot, unique)?))
    }

    /// The callbacks of all requests, when their connection has ended.
    pub(crate) fn take_callbacks(&mut self) -> Vec<Callback> {
        self.slots
            .iter_mut()
            .filter_map(|entry| entry.extra.as_mut()?.on_interrupt.take())
            .collect()
    }

    /// How many requests are under way.
    pub(crate) fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_millis(50);

    #[test]
    fn only_one_takes_an_entry_and_a_reused_slot_is_another_request() {
        let mut table = Table::default();
        let slot = table.insert(2);
        assert!(table.take(slot, 2).is_some());
        assert!(table.take(slot, 2).is_none());
        assert_eq!(table.insert(4), slot);
        assert!(table.take(slot, 2).is_none());
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn an_interrupt_before_the_callback_gives_the_callback_back() {
        let mut table = Table::default();
        let slot = table.insert(2);
        assert!(matches!(
            table.interrupt(8, Instant::now()),
            Interrupt::Unknown
        ));
        assert!(matches!(
            table.interrupt(2, Instant::now()),
            Interrupt::Marked {
                callback: None,
                newly_timed: true
            }
        ));
        assert!(table.set_callback(slot, 2, Box::new(|| {})).is_some());
        assert!(table.is_interrupted(slot, 2));
        assert!(table.set_at_once(slot, 2).is_some());
    }

    #[test]
    fn grace_and_deadline_expire_each_with_its_errno() {
        let mut table = Table::default();
        let now = Instant::now();
        table.insert(2);
        let slot = table.insert(4);
        assert!(table.set_deadline(slot, 4, now + GRACE * 2, Errno::TIMEDOUT));
        table.interrupt(2, now);
        assert!(table.take_expired(now, GRACE).is_none());
        let (unique, errno, taken) = table
            .take_expired(now + GRACE, GRACE)
            .expect("the grace is over");
        assert_eq!((unique, errno, taken.was_timed()), (2, Errno::INTR, true));
        let (unique, errno, _) = table
            .take_expired(now + GRACE * 2, GRACE)
            .expect("the deadline is over");
        assert_eq!((unique, errno), (4, Errno::TIMEDOUT));
        assert_eq!(table.len(), 0);
    }
}
