//! The driver of an open device, as the state machine calls it: contained, so that a panic is an
//! error.

use super::{Form, Migratable, StepError, Steps};
use crate::device::DeviceOps;
use crate::device::shared::OpenSession;
use crate::{Errno, Result};

impl<O: DeviceOps> OpenSession<O> {
    /// A step of the migration. A panic leaves a device that nobody knows.
    fn step<R>(
        &self,
        f: impl FnOnce(&dyn Migratable<O::Session>, &O::Session) -> Result<R, StepError>,
    ) -> Result<R, StepError> {
        self.call(|ops, session| {
            let migratable = ops.migratable().ok_or(Errno::NOTTY)?;
            Ok(f(migratable, session))
        })
        .unwrap_or_else(|errno| Err(StepError::Broken(errno)))
    }
}

impl<O: DeviceOps> Steps for OpenSession<O> {
    fn form(&self) -> Result<Form> {
        self.call(|ops, _| Ok(ops.migratable().ok_or(Errno::NOTTY)?.form()))
    }
    fn pause_p2p(&self) -> Result<(), StepError> {
        self.step(|driver, session| driver.pause_p2p(session))
    }
    fn resume_p2p(&self) -> Result<(), StepError> {
        self.step(|driver, session| driver.resume_p2p(session))
    }
    fn stop(&self) -> Result<(), StepError> {
        self.step(|driver, session| driver.stop(session))
    }
    fn resume(&self) -> Result<(), StepError> {
        self.step(|driver, session| driver.resume(session))
    }
    fn save(&self) -> Result<Vec<u8>, StepError> {
        self.step(|driver, session| driver.save(session))
    }
    fn restore(&self, version: u32, state: &[u8]) -> Result<(), StepError> {
        self.step(|driver, session| driver.restore(session, version, state))
    }
    fn reset(&self) -> Result {
        self.call(|ops, session| ops.reset(session))
    }
}
