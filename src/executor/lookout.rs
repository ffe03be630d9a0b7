//! Whether anybody looks at the heartbeats. While every executor is parked nobody needs to, but now and then for one that
//! does not wake any more: the first that has something to do says so, and the supervisor sleeps until then.
//!
//! No executor goes unseen. Each says that it is up and then asks whether it is looked at; the supervisor says that it
//! does not look and then asks whether anybody is up. With a fence between the two on either side, one of them at least
//! sees what the other said.
//!
//! `tests/model` runs this file through every interleaving.

use std::sync::Arc;

use crate::sync::{AtomicUsize, Ordering, fence};

/// What the supervisor and the executors of one server share.
#[derive(Debug)]
pub(crate) struct Lookout {
    /// 1 while nobody looks.
    dozing: AtomicUsize,
}

/// Whether one executor is parked. It alone writes.
#[derive(Debug)]
pub(crate) struct Presence {
    lookout: Arc<Lookout>,
    /// 1 while it has nothing to do.
    parked: AtomicUsize,
}

impl Lookout {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { dozing: AtomicUsize::new(0) })
    }

    /// For the supervisor: true when all of `executors` are parked. From then on the first that is not has to tell.
    pub(crate) fn doze<'a>(&self, mut executors: impl Iterator<Item = &'a Presence>) -> bool {
        self.dozing.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let parked = executors.all(|executor| executor.parked.load(Ordering::Relaxed) == 1);
        if !parked {
            self.dozing.store(0, Ordering::Relaxed);
        }
        parked
    }
}

impl Presence {
    pub(crate) fn new(lookout: &Arc<Lookout>) -> Self {
        Self { lookout: Arc::clone(lookout), parked: AtomicUsize::new(0) }
    }

    /// The same for another thread in the place of this one's.
    pub(crate) fn successor(&self) -> Self {
        Self::new(&self.lookout)
    }

    /// There is nothing to do, and [`Presence::rouse`] will be called before there is.
    pub(crate) fn park(&self) {
        self.parked.store(1, Ordering::Relaxed);
    }

    /// Something is about to run, and may take its time.
    #[must_use = "true: nobody looks, and the supervisor is to be told"]
    pub(crate) fn rouse(&self) -> bool {
        self.parked.store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let dozing = &self.lookout.dozing;
        // Of several one tells.
        dozing.load(Ordering::Relaxed) == 1 && dozing.swap(0, Ordering::Relaxed) == 1
    }
}
