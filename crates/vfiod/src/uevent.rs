//! Uevents of the core into the daemon's own network namespace.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use vfio_core::Core;
use vfio_core::event::{Notice, Subscription};
use vfiod_control::uevent::{Injector, Uevent};

/// How many may wait. A burst beyond that loses the rest, and says so.
const QUEUE: usize = 65_536;

/// The same in the words of the control socket.
pub(crate) fn translate(uevent: &vfio_core::event::Uevent) -> Uevent {
    Uevent {
        action: uevent.action.clone(),
        devpath: uevent.devpath.clone(),
        subsystem: uevent.subsystem.clone(),
        env: uevent.env.clone(),
    }
}

/// Injects until it is dropped.
#[derive(Debug)]
pub(crate) struct Uevents {
    subscription: Option<Subscription>,
    thread: Option<JoinHandle<()>>,
}

impl Uevents {
    /// Starts injecting.
    ///
    /// # Errors
    /// When the kernel lets us have no socket or no thread for it.
    pub(crate) fn start(core: &Core) -> anyhow::Result<Uevents> {
        let injector = Injector::new()?;
        let (sender, receiver) = sync_channel::<Uevent>(QUEUE);
        let thread = std::thread::Builder::new()
            .name("uevents".to_owned())
            .spawn(move || {
                let mut failed = false;
                for uevent in receiver {
                    if let Err(errno) = injector.send(&uevent)
                        && !std::mem::replace(&mut failed, true)
                    {
                        tracing::warn!(
                            "uevents do not get through: {errno}; they need CAP_SYS_ADMIN in the \
                             user namespace that owns the network namespace"
                        );
                    }
                }
            })?;
        Ok(Uevents {
            subscription: Some(core.subscribe(forward(sender))),
            thread: Some(thread),
        })
    }
}

fn forward(sender: SyncSender<Uevent>) -> impl Fn(&Notice) + Send + Sync + 'static {
    let lost = AtomicU64::new(0);
    move |notice| {
        let Notice::Uevent(uevent) = notice else {
            return;
        };
        if sender.try_send(translate(uevent)).is_err() && lost.fetch_add(1, Ordering::Relaxed) == 0
        {
            tracing::warn!("uevents come faster than they can be sent; some are lost");
        }
    }
}

impl Drop for Uevents {
    fn drop(&mut self) {
        // The sender goes with the subscription, and the thread ends when the queue is empty.
        drop(self.subscription.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
