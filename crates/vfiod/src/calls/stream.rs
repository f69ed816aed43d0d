//! Calls that are answered for as long as the client listens.

use super::failure::Stop;
use super::{Server, TICK};
use crate::control::Peer;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use vfio_core::event::Notice;
use vfiod_control::Answer;

/// Events that may wait for a slow reader.
const QUEUE: usize = 8192;

impl Server {
    /// Sends what `pick` makes of notices until the client closes. A queue lies between, so that a
    /// slow reader holds up nothing in the core; when it is full, the reader is told what it lost.
    pub(super) fn stream(
        &self,
        peer: &Peer<'_>,
        pick: impl Fn(&Notice) -> Option<Answer> + Send + Sync + 'static,
    ) -> Result<Answer, Stop> {
        let (sender, receiver) = sync_channel::<Answer>(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let _subscription = {
            let lost = Arc::clone(&lost);
            self.core.subscribe(move |notice| {
                if let Some(answer) = pick(notice)
                    && sender.try_send(answer).is_err()
                {
                    lost.fetch_add(1, Ordering::AcqRel);
                }
            })
        };
        peer.send(Answer::Subscribed)?;
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(answer) => peer.send(answer)?,
                Err(RecvTimeoutError::Timeout) => {
                    let count = lost.swap(0, Ordering::AcqRel);
                    if count > 0 {
                        peer.send(Answer::Lost { count })?;
                    }
                    if !peer.is_there() {
                        return Err(Stop::Gone(io::ErrorKind::BrokenPipe.into()));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Stop::Gone(io::ErrorKind::BrokenPipe.into()));
                }
            }
        }
    }
}
