//! Each new connection goes to a random active slot.
//!
//! The connections of one client spread too, which a load balancer in front makes the usual case. A
//! retransmitted SYN may go to another slot; that is harmless, because the kernel finds the half-open
//! connection of the first one before it asks the program.

use libc::sock_filter;

use super::program::random_by_weight;
use super::{Draw, Share, Steering};

/// The default policy.
#[derive(Clone, Copy, Debug)]
pub struct Random;

impl Steering for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn draw(&self) -> Draw {
        Draw::Random
    }

    fn program(&self, shares: &[Share], _slots: u16) -> Option<Vec<sock_filter>> {
        random_by_weight(shares)
    }
}
