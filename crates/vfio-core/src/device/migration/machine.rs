//! The state machine, once for all drivers: a driver sees single arcs, as calls of
//! [`Migratable`](super::Migratable).

use super::arcs::{is_stopped, opens, path};
use super::stream::{Incoming, Outgoing, max_len};
use super::{DataDirection, Form, State, StepError};
use crate::{Errno, Result};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The driver of an open device. `ENOTTY` from `form` when it cannot migrate.
pub(crate) trait Steps {
    fn form(&self) -> Result<Form>;
    fn pause_p2p(&self) -> Result<(), StepError>;
    fn resume_p2p(&self) -> Result<(), StepError>;
    fn stop(&self) -> Result<(), StepError>;
    fn resume(&self) -> Result<(), StepError>;
    fn save(&self) -> Result<Vec<u8>, StepError>;
    fn restore(&self, version: u32, state: &[u8]) -> Result<(), StepError>;
    /// `VFIO_DEVICE_RESET` of the driver.
    fn reset(&self) -> Result;
}

/// Where an open device is. It begins in `RUNNING` and ends with the last close.
#[derive(Debug)]
pub(crate) struct Machine(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    state: State,
    data: Data,
    /// Counts sessions, so that a file of one is not a file of the next.
    session: u32,
}

/// A data session that an arc has opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) direction: DataDirection,
    /// Never 0, and no larger than an `i32` can be.
    pub(crate) session: u32,
}

/// The data session.
#[derive(Debug)]
enum Data {
    None,
    Saving(Outgoing),
    Resuming(Incoming),
}

impl Default for Machine {
    fn default() -> Self {
        Machine(Mutex::new(Inner {
            state: State::Running,
            data: Data::None,
            session: 0,
        }))
    }
}

impl Machine {
    /// Held while the driver makes a step, so that a reset comes before or after it; never while
    /// a client's memory is touched.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> State {
        self.lock().state
    }

    pub(crate) fn set(&self, driver: &dyn Steps, to: State) -> Result<Option<Opened>> {
        let form = driver.form()?;
        let mut inner = self.lock();
        let mut opened = None;
        for hop in path(inner.state, to, form.flags())? {
            opened = opens(inner.state, hop);
            if let Err(error) = inner.step(driver, &form, hop) {
                return Err(match error {
                    StepError::Refused(errno) => errno,
                    StepError::Broken(errno) => {
                        inner.state = State::Error;
                        inner.data = Data::None;
                        errno
                    }
                });
            }
        }
        Ok(opened.map(|direction| {
            inner.session = (inner.session % (u32::MAX >> 1)) + 1;
            Opened {
                direction,
                session: inner.session,
            }
        }))
    }

    /// Whether the data of a session can still be had. `ENODEV` when it has ended.
    pub(crate) fn check(&self, session: u32) -> Result {
        self.lock().check(Some(session))
    }

    /// Bytes that can be read ahead. `EINVAL` when the device does not run, `ENODEV` when the session
    /// has ended.
    pub(crate) fn precopy_left(&self, session: u32) -> Result<u64> {
        let inner = self.lock();
        inner.check(Some(session))?;
        match &inner.data {
            Data::Saving(data) if inner.state != State::StopCopy => Ok(data.left() as u64),
            _ => Err(Errno::INVAL),
        }
    }

    /// Resets the device. What a reset in the midst of a step means for it is nobody's guess: it
    /// comes after the step. On success the device runs and no session is open.
    pub(crate) fn reset(&self, driver: &dyn Steps) -> Result {
        let form = match driver.form() {
            Ok(form) => form,
            Err(Errno::NOTTY) => return driver.reset(),
            Err(errno) => return Err(errno),
        };
        let mut inner = self.lock();
        driver.reset()?;
        let (stopped, paused) = match inner.state {
            State::Error => (true, form.p2p),
            state => (
                is_stopped(state),
                form.p2p && (is_stopped(state) || is_p2p(state)),
            ),
        };
        inner.data = Data::None;
        // Whatever comes now, the device is no longer what it was.
        inner.state = State::Error;
        let resumed = if stopped { driver.resume() } else { Ok(()) };
        resumed
            .and_then(|()| if paused { driver.resume_p2p() } else { Ok(()) })
            .map_err(StepError::errno)?;
        inner.state = State::Running;
        Ok(())
    }

    /// Of that session, or of whichever is open.
    pub(crate) fn read(&self, session: Option<u32>, buf: &mut [u8]) -> Result<usize> {
        let mut inner = self.lock();
        inner.check(session)?;
        let state = inner.state;
        match &mut inner.data {
            Data::Saving(data) => match data.read(buf) {
                0 if !buf.is_empty() && state != State::StopCopy => Err(Errno::NOMSG),
                len => Ok(len),
            },
            Data::Resuming(_) => Err(Errno::BADF),
            Data::None => Err(Errno::NODEV),
        }
    }

    /// As [`read`](Machine::read).
    pub(crate) fn write(
        &self,
        driver: &dyn Steps,
        session: Option<u32>,
        data: &[u8],
    ) -> Result<usize> {
        let form = driver.form()?;
        let mut inner = self.lock();
        inner.check(session)?;
        match &mut inner.data {
            Data::Resuming(incoming) => incoming.write(&form, data),
            Data::Saving(_) => Err(Errno::BADF),
            Data::None => Err(Errno::NODEV),
        }
    }

    /// While a session saves, what is left of it; else the most there can be.
    pub(crate) fn data_size(&self, driver: &dyn Steps) -> Result<u64> {
        let form = driver.form()?;
        let inner = self.lock();
        Ok(match &inner.data {
            Data::Saving(data) if inner.state == State::StopCopy => data.left() as u64,
            _ => max_len(&form) as u64,
        })
    }
}

fn is_p2p(state: State) -> bool {
    matches!(state, State::RunningP2p | State::PreCopyP2p)
}

impl Inner {
    fn check(&self, session: Option<u32>) -> Result {
        let other = session.is_some_and(|session| session != self.session);
        if other || matches!(self.data, Data::None) {
            return Err(Errno::NODEV);
        }
        Ok(())
    }

    /// One arc. On `Refused` nothing has changed.
    fn step(&mut self, driver: &dyn Steps, form: &Form, to: State) -> Result<(), StepError> {
        match (self.state, to) {
            (State::Running, State::RunningP2p) | (State::PreCopy, State::PreCopyP2p) => {
                driver.pause_p2p()?;
            }
            (State::RunningP2p, State::Running) | (State::PreCopyP2p, State::PreCopy) => {
                driver.resume_p2p()?;
            }
            (State::RunningP2p | State::Running, State::Stop) => driver.stop()?,
            (State::Stop, State::RunningP2p | State::Running) => driver.resume()?,
            (State::Stop, State::StopCopy) => {
                let state = driver.save()?;
                let mut data = Outgoing::new(form);
                data.finish(&state);
                self.data = Data::Saving(data);
            }
            (State::PreCopy | State::PreCopyP2p, State::StopCopy) => {
                driver.stop()?;
                let state = match driver.save() {
                    Ok(state) => state,
                    Err(StepError::Broken(errno)) => return Err(StepError::Broken(errno)),
                    Err(StepError::Refused(errno)) => {
                        // It still runs, as the state that remains says.
                        driver.resume().map_err(|_| StepError::Broken(errno))?;
                        return Err(StepError::Refused(errno));
                    }
                };
                if let Data::Saving(data) = &mut self.data {
                    data.finish(&state);
                }
            }
            (State::Running, State::PreCopy) | (State::RunningP2p, State::PreCopyP2p) => {
                self.data = Data::Saving(Outgoing::new(form));
            }
            (State::Stop, State::Resuming) => self.data = Data::Resuming(Incoming::default()),
            (State::Resuming, State::Stop) => {
                if let Data::Resuming(data) = &self.data {
                    let (version, state) = data.finish(form).map_err(StepError::Refused)?;
                    driver.restore(version, state)?;
                }
                self.data = Data::None;
            }
            (State::StopCopy, State::Stop)
            | (State::PreCopy, State::Running)
            | (State::PreCopyP2p, State::RunningP2p) => self.data = Data::None,
            // The table has no other.
            _ => return Err(StepError::Refused(Errno::INVAL)),
        }
        self.state = to;
        Ok(())
    }
}
