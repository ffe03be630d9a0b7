//! Each new connection goes to a random active slot.
//!
//! The connections of one client spread too, which a load balancer in front makes the usual case. A
//! retransmitted SYN may go to another slot; that is harmless, because the kernel finds the half-open
//! connection of the first one before it asks the program.

use libc::{BPF_ABS, BPF_LD, BPF_W, SKF_AD_OFF, SKF_AD_RANDOM, sock_filter};

use super::Steering;
use super::program::{choose, statement};

/// The default policy.
#[derive(Clone, Copy, Debug)]
pub struct Random;

impl Steering for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn program(&self, active: &[u16], _slots: u16) -> Option<Vec<sock_filter>> {
        if active.is_empty() {
            return None;
        }
        let random = (SKF_AD_OFF + SKF_AD_RANDOM) as u32;
        let load = statement(BPF_LD | BPF_W | BPF_ABS, random);
        Some(choose(vec![load], active))
    }
}
