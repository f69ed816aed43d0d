//! Migration of a card. It does no DMA, so the states without peer-to-peer DMA are free, as in the
//! kernel's sample.

use vfio_core::Result;
use vfio_core::device::Form;
use vfio_core::device::Migratable;
use vfio_core::device::StepError;

use super::Model;
use super::Mtty;
use super::Session;
use super::card::Card;

/// The layout of [`Card::save`].
const VERSION: u32 = 1;

impl Migratable<Session> for Mtty {
    fn form(&self) -> Form {
        Form {
            kind: match self.model {
                Model::Single => "mtty-1",
                Model::Dual => "mtty-2",
            }
            .into(),
            version: VERSION,
            oldest: VERSION,
            max_len: Card::saved_len(self.model.ports() as usize),
            p2p: true,
            pre_copy: true,
        }
    }

    fn stop(&self, session: &Session) -> Result<(), StepError> {
        self.card.stop(&session.irqs);
        Ok(())
    }

    fn resume(&self, session: &Session) -> Result<(), StepError> {
        self.card.resume(&session.irqs, |port| session.wire(port));
        Ok(())
    }

    fn save(&self, _session: &Session) -> Result<Vec<u8>, StepError> {
        Ok(self.card.save())
    }

    fn restore(&self, _session: &Session, _version: u32, state: &[u8]) -> Result<(), StepError> {
        Ok(self.card.restore(state)?)
    }
}
