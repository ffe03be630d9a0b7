//! The supervisor's own failure: a defect, or a panic in what it calls of the embedder's, wakers and the log's subscriber.
//! Executors would go on with nobody to order anything, and signals would reach nobody: so the server ends, and says so.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::post::PostBox;
use super::rescue::Rescue;
use super::{SlotOrder, Supervisor};
use crate::Error;
use crate::error::Kind;
use crate::handle::ExecutorState;
use crate::panics::{self, Panic, caught};

impl Supervisor {
    /// From the first start to the server's end.
    pub(super) fn run(mut self, inbox: &PostBox) {
        panics::mark_thread();
        let shared = Arc::clone(&self.shared);
        let ended = guarded(|| {
            let outcome = self.supervise(inbox);
            self.exit(outcome, inbox)
        });
        let result = ended.unwrap_or_else(|panic| Err(self.fall(&panic)));
        // What a caller sees after the end is final: nothing of the server's is left open when it is told.
        let _ = guarded(|| drop(self));
        shared.ended(&result);
    }

    /// Ends everything without a policy. Each step by itself: what has failed once may fail again.
    fn fall(&mut self, panic: &Panic) -> Error {
        let error = Error::new(Kind::Defect, format!("the supervisor panicked, which ends the server: {panic}"));
        let _ = guarded(|| tracing::error!("{error}"));
        self.shared.ready.store(false, Ordering::Relaxed);
        self.rescue = Rescue::default();
        let _ = guarded(|| self.steer.end());
        for seat in self.seats.iter().chain(self.former_seats()) {
            seat.release_listeners();
            seat.inbox.order(SlotOrder::Stop);
            seat.inbox.order(SlotOrder::Quit);
            let _ = guarded(|| seat.inbox.close());
        }
        let _ = guarded(|| drop(self.signals.take()));
        let _ = guarded(|| self.directory().clear());
        let _ = guarded(|| self.join_all());
        let _ = guarded(|| self.blocking.close(Instant::now()));
        self.shared.slots.iter().for_each(|slot| slot.set_state(ExecutorState::Idle));
        if let Some(promise) = self.starting.take() {
            let _ = guarded(|| promise.fulfil(Err(error.clone())));
        }
        error
    }
}

fn guarded<T>(act: impl FnOnce() -> T) -> Result<T, Panic> {
    catch_unwind(AssertUnwindSafe(act)).map_err(caught)
}
