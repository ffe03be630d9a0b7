//! The memory of requests' futures that have ended, kept for those of the next requests.
//!
//! A future of a kilobyte or two is more than what glibc's allocator keeps at hand (1,032 bytes), so each would be cut
//! from the end of its heap, where hyper's buffers are made next: written to and given back, it leaves behind pages in
//! the middle of those buffers that nobody uses and that count all the same, 1.2 KiB per connection. Besides, this is the
//! shorter way.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Bytes kept. More requests at once than fit get memory of the allocator's.
const KEPT_BYTES_MAX: usize = 64 * 1024;

type Place<F> = Pin<Box<Option<F>>>;

/// Empty places for futures of one type, on one executor.
pub(super) struct Spares<F>(RefCell<Vec<Place<F>>>);

impl<F> Spares<F> {
    /// One place at least, whatever its size.
    const KEPT_MAX: usize = if size_of::<F>() < KEPT_BYTES_MAX { KEPT_BYTES_MAX / (size_of::<F>() + 1) } else { 1 };

    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self(RefCell::default()))
    }

    pub(super) fn place(self: &Rc<Self>, future: F) -> Placed<F> {
        let spare = self.0.borrow_mut().pop();
        let place = match spare {
            Some(mut place) => {
                place.set(Some(future));
                place
            }
            None => Box::pin(Some(future)),
        };
        Placed { place: Some(place), spares: Rc::clone(self) }
    }

    fn keep(&self, place: Place<F>) {
        let mut spares = self.0.borrow_mut();
        if spares.len() < Self::KEPT_MAX {
            spares.push(place);
        }
    }
}

/// A future in a place of [`Spares`], which goes back with this.
pub(super) struct Placed<F> {
    /// `None` in `drop` only.
    place: Option<Place<F>>,
    spares: Rc<Spares<F>>,
}

impl<F: Future> Future for Placed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        match self.place.as_mut().and_then(|place| place.as_mut().as_pin_mut()) {
            Some(future) => future.poll(context),
            None => Poll::Pending,
        }
    }
}

impl<F> Drop for Placed<F> {
    fn drop(&mut self) {
        let Some(mut place) = self.place.take() else { return };
        // What the future holds is the user's, and its drop may panic: then the place goes with it.
        place.set(None);
        self.spares.keep(place);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::task::Waker;

    use super::*;

    fn kept<F>(spares: &Spares<F>) -> usize {
        spares.0.borrow().len()
    }

    /// The same function's futures are of one type.
    async fn holds(what: Rc<dyn std::any::Any>, bytes: [u8; 2000]) -> usize {
        std::future::ready(()).await;
        drop(what);
        bytes.len()
    }

    #[test]
    fn a_place_is_used_again_and_what_was_in_it_is_dropped() {
        let spares = Spares::new();
        let what = Rc::new(());
        for _ in 0..3 {
            let mut placed = spares.place(holds(what.clone(), [0; 2000]));
            assert_eq!((kept(&spares), Rc::strong_count(&what)), (0, 2));
            let polled = Pin::new(&mut placed).poll(&mut Context::from_waker(Waker::noop()));
            assert_eq!(polled, Poll::Ready(2000));
            drop(placed);
            assert_eq!((kept(&spares), Rc::strong_count(&what)), (1, 1));
            // One that was never polled.
            drop(spares.place(holds(what.clone(), [0; 2000])));
            assert_eq!((kept(&spares), Rc::strong_count(&what)), (1, 1));
        }
    }

    #[test]
    fn no_more_is_kept_than_is_allowed() {
        let spares = Spares::new();
        let many: Vec<_> = (0..100).map(|_| spares.place(holds(Rc::new(()), [0; 2000]))).collect();
        drop(many);
        assert!((2..=KEPT_BYTES_MAX / 2000).contains(&kept(&spares)), "{}", kept(&spares));
        let large = Spares::new();
        let many: Vec<_> = (0..3).map(|_| large.place([0_u8; KEPT_BYTES_MAX])).collect();
        drop(many);
        assert_eq!(kept(&large), 1);
    }

    #[test]
    fn a_panic_in_a_futures_drop_costs_its_place_only() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("drop");
            }
        }
        let spares = Spares::new();
        let placed = spares.place(holds(Rc::new(Bomb), [0; 2000]));
        assert!(catch_unwind(AssertUnwindSafe(|| drop(placed))).is_err());
        assert_eq!(kept(&spares), 0);
        drop(spares.place(holds(Rc::new(()), [0; 2000])));
        assert_eq!(kept(&spares), 1);
    }
}
